"""The book builds itself

Generated from book/cli/tangle.py; edit the chapter, not this file.
"""

import ast
import builtins
import re
import symtable
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

# --- What a chapter gives away -----------------------------------------------

OWN = "gptoss"


class TangleError(ValueError):
    """A chapter that cannot be turned into a module."""


@dataclass
class Module:
    """What one chapter gives to one file.

    Attributes:
        name: "attention/sinks", "__init__", or with a suffix
            "kernels/base.h"; below `folder`.
        chapter: the chapter's file below book/, "attention/sinks.py".
        title: the chapter's first heading.
        cells: (section heading, source) in reading order.
        folder: where it goes, from the project's root.
        siblings: all modules of the chapter by name, this one too.
        public: names that the chapter has its part hand on.
    """

    name: str
    chapter: str
    title: str
    cells: list[tuple[str, str]] = field(default_factory=list)
    folder: str = OWN
    siblings: dict[str, "Module"] = field(default_factory=dict, repr=False)
    public: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Path of the generated file from the project's root."""
        end = "" if "." in self.name else ".py"
        return f"{self.folder}/{self.name}{end}"

    @property
    def dotted(self) -> str:
        """The name by which others import it."""
        path = self.name.replace("/", ".")
        return f"{OWN}.{path}" if self.folder == OWN else path


_TARGET = re.compile(r"/?([A-Za-z_]\w*/)*[A-Za-z_]\w*(\.\w+)?")
_HEADING = re.compile(r"^#+[ \t]+(.*?)[ \t]*$", re.MULTILINE)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def place(path: Path) -> Path:
    """A chapter's path below the nearest folder called book."""
    parts = path.absolute().parts
    at = len(parts) - parts[::-1].index("book") if "book" in parts else -1
    return Path(*parts[at:])


def read_chapter(path: Path) -> dict[str, Module]:
    """The modules that a chapter exports to, by name.

    Raises TangleError for an exported cell without a target, with one that
    is no plain path, or with one that does not fit the kind of cell.
    """
    notebook, own = jupytext.read(path), place(path)
    front = notebook.metadata.get("gptoss", {})
    title, heading, modules = "", "", {}
    for cell in notebook.cells:
        source, prose = cell.source, cell.cell_type == "markdown"
        if prose:
            for text in _HEADING.findall(FENCE.sub("", source)):
                title, heading = title or text, text
            source = "\n\n".join(FENCE.findall(source))
        for tag in cell.metadata.get("tags", []):
            if tag.split(":")[0] != "export":
                continue
            name = tag.partition(":")[2] or front.get("module", "")
            if not _TARGET.fullmatch(name) or prose != ("." in name):
                raise TangleError(f"{own}, {heading!r}: a "
                                  f"{cell.cell_type} cell cannot go to "
                                  f"{name!r} (tag {tag!r})")
            if "folder" not in front and "/" not in name:
                name = (own.parent / name).as_posix()
            name = name.removeprefix("/")
            modules.setdefault(name, Module(
                name, own.as_posix(), title, [], front.get("folder", OWN),
                modules, tuple(front.get("public", ())))
                ).cells.append((heading, source))
    return modules


# --- Imports go to the top ---------------------------------------------------

def split_imports(source: str, where: str) -> tuple[list[ast.stmt], str]:
    """Top-level imports of a cell, and the cell without their lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise TangleError(f"{where}: not Python: {error}") from error
    imports = [node for node in tree.body
               if isinstance(node, ast.Import | ast.ImportFrom)]
    gone = {number for node in imports
            for number in range(node.lineno, node.end_lineno + 1)}
    for node in tree.body:
        if node not in imports and gone & {node.lineno, node.end_lineno}:
            raise TangleError(f"{where}: line {node.lineno} holds an import "
                              "and something else")
    kept = [line for number, line in enumerate(source.splitlines(), 1)
            if number not in gone]
    return imports, "\n".join(kept).strip("\n")


def _group(module: str) -> int:
    root = module.split()[0].split(".")[0]
    if root == "__future__":
        return 0
    if root in sys.stdlib_module_names:
        return 1
    return 3 if root in ("", OWN) else 2


def _member(name: str) -> tuple[int, str]:
    first = name.split()[0]
    if first.isupper() and len(first) > 1:
        return 0, first
    return 1 if first[:1].isupper() else 2, first


def _from(module: str, names: list[str], width: int) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= width:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inner})"


def import_block(nodes: list[ast.stmt], width: int = 79) -> str:
    """Import statements merged, sorted and grouped, as source text.

    What would be longer than `width` columns gets a line for each name.
    """
    plain, named = set(), {}
    for node in nodes:
        for alias in node.names:
            text = ast.unparse(alias)
            if isinstance(node, ast.Import):
                plain.add(text)
            else:
                module = "." * node.level + (node.module or "")
                named.setdefault(module, set()).add(text)
    entries = [(_group(text), 0, text.lower(), f"import {text}")
               for text in plain]
    for module, names in named.items():
        renamed = sorted(name for name in names if " as " in name)
        rest = sorted(names.difference(renamed), key=_member)
        parts = [[name] for name in renamed] + ([rest] if rest else [])
        parts.sort(key=lambda part: (_member(part[0]), part[0]))
        lines = "\n".join(_from(module, part, width) for part in parts)
        entries.append((_group(module), 1, module.lower(), lines))
    entries.sort()
    groups = sorted({group for group, *_ in entries})
    return "\n\n".join("\n".join(text for group, *_, text in entries
                                 if group == wanted) for wanted in groups)


# --- What is public ----------------------------------------------------------

def bound_names(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0]
                for alias in node.names]
    targets = [node]  # of an assignment its left side only
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = getattr(node, "targets", None) or [node.target]
    return [part.id for target in targets for part in ast.walk(target)
            if isinstance(part, ast.Name)
            and isinstance(part.ctx, ast.Store)]


def public_names(tree: ast.Module, name: str) -> list[str]:
    """What `__all__` of module `name` lists; nothing for `__main__`."""
    name = name.rpartition("/")[2]
    if name == "__init__":
        nodes = [node for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom)
                 and (node.module or "").split(".")[0] == OWN]
    else:
        nodes = [node for node in tree.body if name != "__main__"
                 and isinstance(node, ast.FunctionDef | ast.ClassDef
                                | ast.Assign | ast.AnnAssign)]
    return sorted({text for node in nodes for text in bound_names(node)
                   if not text.startswith("_")})


# --- The text of a module ----------------------------------------------------

def global_reads(source: str) -> set[str]:
    """Names that the code takes from its module's namespace or Python's."""
    found, todo = set(), [symtable.symtable(source, "module", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols()
                  if symbol.is_referenced() and (
                      symbol.is_global() or table.get_type() == "module")}
    return found


def _kept(node: ast.stmt, wanted: set[str]) -> list[ast.stmt]:
    """An import statement without the names that nobody wants."""
    if getattr(node, "module", "") == "__future__":
        return [node]
    names = [alias for alias in node.names
             if (alias.asname or alias.name.split(".")[0]) in wanted]
    again = type(node)(**{**vars(node), "names": names})
    return [again] if names else []


def _taken_apart(module: Module) -> tuple[list[ast.stmt], list[tuple]]:
    """Its imports, and (heading, source) of the rest of its cells."""
    imports, rest = [], []
    for heading, source in module.cells:
        found, text = split_imports(source, f"{module.chapter}, {heading!r}")
        imports += found
        rest += [(heading, text)] if text else []
    return imports, rest


def _own(cells: list[tuple[str, str]]) -> dict[str, str]:
    """The names that cells bind, and the statement that did it last."""
    return {name: ast.unparse(node) for _, source in cells
            for node in ast.parse(source).body for name in bound_names(node)}


_COMMENT = {"h": "// {}", "cpp": "// {}", "jinja": "{{#- {} #}}",
            "pyi": "# {}"}


def imports_of(module: Module) -> list[ast.stmt]:
    """What stands at the top of a module: of all imports in its chapter
    those that it needs, and what it reads of its siblings.

    Raises TangleError if moving an import could change what a name means.
    """
    chapter = module.siblings or {module.name: module}
    apart = {name: _taken_apart(other) for name, other in chapter.items()
             if "." not in name}
    imports = [node for nodes, _ in apart.values() for node in nodes]
    bound = {name: _own(rest) for name, (_, rest) in apart.items()}
    _refuse_clash(module, imports, bound)
    text = "\n".join(source for _, source in apart[module.name][1])
    wanted = global_reads(text) - bound[module.name].keys()
    if module.name.startswith("__"):
        return apart[module.name][0]
    found = [kept for node in imports for kept in _kept(node, wanted)]
    for name, names in bound.items():
        shared = sorted(names.keys() & wanted)
        if private := [text for text in shared if text.startswith("_")]:
            raise TangleError(f"{module.chapter}: {private[0]!r} of {name} is "
                              f"used in {module.name}: no underscore then")
        if shared:
            found.append(ast.ImportFrom(
                chapter[name].dotted, [ast.alias(text) for text in shared],
                0))
    return found


def _refuse_clash(module: Module, imports: list[ast.stmt],
                  bound: dict[str, dict[str, str]]) -> None:
    own = set().union(*bound.values(), dir(builtins))
    for name in (name for node in imports for name in bound_names(node)):
        if name in own:
            raise TangleError(f"{module.chapter}: {name!r} is imported and "
                              f"also bound in module {module.name}")
    for other, names in bound.items():
        for name in sorted(names.keys() & bound[module.name].keys()):
            if names[name] != bound[module.name][name]:
                raise TangleError(f"{module.chapter}: {name!r} is bound in "
                                  f"{other} and in {module.name}")


def module_text(module: Module) -> str:
    """The whole generated file, Python or not."""
    note = (f"Generated from book/{module.chapter}; edit the chapter, not "
            "this file.")
    if "." in module.name:
        mark = _COMMENT[module.name.rpartition(".")[2]]
        return "\n\n".join(["\n".join(map(mark.format, (module.title, note))),
                            *(source.strip("\n")
                              for _, source in module.cells)]) + "\n"
    body, last = [], ""
    for heading, rest in _taken_apart(module)[1]:
        if heading != last:
            rule = f"# --- {heading} ".ljust(79, "-")
            rest, last = f"{rule}\n\n{rest}", heading
        body.append(rest)
    code = "\n\n\n".join(body)
    parts = [f'"""{module.title}\n\n{note}\n"""',
             import_block(imports_of(module))]
    text = "\n\n".join([part for part in parts if part] + [code])
    names = public_names(ast.parse(text), module.name)
    if names:
        listed = "".join(f'    "{name}",\n' for name in names)
        text += f"\n\n\n__all__ = [\n{listed}]"
    return text.rstrip("\n") + "\n"


__all__ = [
    "FENCE",
    "Module",
    "OWN",
    "TangleError",
    "bound_names",
    "global_reads",
    "import_block",
    "imports_of",
    "module_text",
    "place",
    "public_names",
    "read_chapter",
    "split_imports",
]
