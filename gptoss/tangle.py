"""The book builds itself

Generated from book/A_tangle.py; edit the chapter, not this file.
"""

import argparse
import ast
import builtins
import difflib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat

# --- What a chapter gives away -----------------------------------------------

OWN = "gptoss"


class TangleError(ValueError):
    """A chapter that cannot be turned into a module."""


@dataclass
class Module:
    """What one chapter gives to one file of the package.

    Attributes:
        name: "sinks", "__init__", or with a suffix "base.h".
        chapter: file name of the chapter.
        title: the chapter's first heading.
        cells: (section heading, source) in reading order.
    """

    name: str
    chapter: str
    title: str
    cells: list[tuple[str, str]] = field(default_factory=list)

    @property
    def file(self) -> str:
        """Path of the generated file from the project's root."""
        return f"{OWN}/{self.name}" + ("" if "." in self.name else ".py")


_TARGET = re.compile(r"[A-Za-z_]\w*(\.\w+)?")
_HEADING = re.compile(r"^#+[ \t]+(.*?)[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def read_chapter(path: Path) -> dict[str, Module]:
    """The modules that a chapter exports to, by name.

    Raises TangleError for an exported cell without a target, with one that
    is no plain name, or with one that does not fit the kind of cell.
    """
    notebook = jupytext.read(path)
    default = notebook.metadata.get("gptoss", {}).get("module", "")
    title, heading, modules = "", "", {}
    for cell in notebook.cells:
        source, prose = cell.source, cell.cell_type == "markdown"
        if prose:
            for text in _HEADING.findall(_FENCE.sub("", source)):
                title, heading = title or text, text
            source = "\n\n".join(_FENCE.findall(source))
        for tag in cell.metadata.get("tags", []):
            if tag.split(":")[0] != "export":
                continue
            name = tag.partition(":")[2] or default
            if not _TARGET.fullmatch(name) or prose != ("." in name):
                raise TangleError(f"{path.name}, {heading!r}: a "
                                  f"{cell.cell_type} cell cannot go to "
                                  f"{name!r} (tag {tag!r})")
            modules.setdefault(name, Module(name, path.name, title)
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


def _from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 79:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inner})"


def import_block(nodes: list[ast.stmt]) -> str:
    """Import statements merged, sorted and grouped, as source text."""
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
        lines = "\n".join(_from(module, part) for part in parts)
        entries.append((_group(module), 1, module.lower(), lines))
    entries.sort()
    groups = sorted({group for group, *_ in entries})
    return "\n\n".join("\n".join(text for group, *_, text in entries
                                 if group == wanted) for wanted in groups)


# --- What is public ----------------------------------------------------------

def _bound(node: ast.stmt) -> list[str]:
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
    if name == "__init__":
        nodes = [node for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom)
                 and (node.module or "").split(".")[0] == OWN]
    else:
        nodes = [node for node in tree.body if name != "__main__"
                 and isinstance(node, ast.FunctionDef | ast.ClassDef
                                | ast.Assign | ast.AnnAssign)]
    return sorted({text for node in nodes for text in _bound(node)
                   if not text.startswith("_")})


# --- The text of a module ----------------------------------------------------

def module_text(module: Module) -> str:
    """The whole generated file, Python or not."""
    note = (f"Generated from book/{module.chapter}; edit the chapter, not "
            "this file.")
    if "." in module.name:
        return "\n\n".join([f"// {module.title}\n// {note}", *(
            source.strip("\n") for _, source in module.cells)]) + "\n"
    imports, body, last = [], [], ""
    for heading, source in module.cells:
        found, rest = split_imports(source, f"{module.chapter}, {heading!r}")
        imports += found
        if rest and heading != last:
            rule = f"# --- {heading} ".ljust(79, "-")
            rest, last = f"{rule}\n\n{rest}", heading
        body += [rest] if rest else []
    _refuse_clash(module, imports, ast.parse("\n".join(body)))
    code = "\n\n\n".join(body)
    parts = [f'"""{module.title}\n\n{note}\n"""', import_block(imports)]
    text = "\n\n".join([part for part in parts if part] + [code])
    names = public_names(ast.parse(text), module.name)
    if names:
        listed = "".join(f'    "{name}",\n' for name in names)
        text += f"\n\n\n__all__ = [\n{listed}]"
    return text.rstrip("\n") + "\n"


def _refuse_clash(module: Module, imports: list[ast.stmt],
                  body: ast.Module) -> None:
    own = {name for node in body.body for name in _bound(node)}
    own |= set(dir(builtins))
    for name in (name for node in imports for name in _bound(node)):
        if name in own:
            raise TangleError(f"{module.chapter}: {name!r} is imported and "
                              f"also bound in module {module.name}")


# --- A page for every name ---------------------------------------------------

def _first_paragraph(node: ast.AST) -> str:
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if n % 2 else re.sub(r"([\\*_<$\[\]{}])", r"\\\1",
                                             part)
                   for n, part in enumerate(parts))


def _call(name: str, node: ast.FunctionDef) -> str:
    if any(ast.unparse(mark) == "property" for mark in node.decorator_list):
        return name
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [arg.arg for arg in every if arg.arg not in ("self", "cls")]
    return f"{name}({', '.join(names)})"


def _anchor(heading: str) -> str:
    """The fragment that MyST gives a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.strip().replace(" ", "-")


def _entry(node: ast.stmt, link: str) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        shown = (node.name if isinstance(node, ast.ClassDef)
                 else _call(node.name, node))
        lines = [f"- [`{shown}`]({link}) {_first_paragraph(node)}"]
        for inner in getattr(node, "body", []):
            if (isinstance(inner, ast.FunctionDef)
                    and isinstance(node, ast.ClassDef)
                    and not inner.name.startswith("_")
                    and ast.get_docstring(inner)):
                lines.append(f"  - `.{_call(inner.name, inner)}` "
                             f"{_first_paragraph(inner)}")
        return lines
    names = [name for name in _bound(node) if not name.startswith("_")]
    value = ast.unparse(node.value) if getattr(node, "value", None) else ""
    shown = f" `{value}`" if len(names) == 1 and 0 < len(value) <= 40 else ""
    return [f"- [`{name}`]({link}) constant{shown}" for name in names]


def api_page(modules: list[Module]) -> str:
    """Markdown: all public names of all modules, in the book's order."""
    lines = ["# Every name in the package", "",
             "Made by `make tangle` from the syntax trees of the chapters: "
             "what a module", "exports, its first words, and a link to the "
             "section that derives it.", ""]
    for module in modules:
        page = module.chapter.removesuffix(".py") + ".ipynb"
        lines += [f"## `{module.file}`", "",
                  f"From [{module.title}]({page}).", ""]
        for heading, source in module.cells:
            if "." in module.name or module.name == "__main__":
                continue
            link = f"{page}#{_anchor(heading)}"
            for node in ast.parse(source).body:
                names = public_names(ast.Module([node], []), module.name)
                if names and module.name == "__init__":
                    lines += [f"- [`{name}`]({link})" for name in names]
                elif names:
                    lines += _entry(node, link)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


# --- Writing and checking ----------------------------------------------------

def tangle(chapters: list[Path], whole: bool = False) -> dict[str, str]:
    """Path from the project's root -> text, for all exports of `chapters`.

    With `whole`, the reference page of all these chapters is one of them.
    Raises TangleError if two chapters export to the same module.
    """
    modules = {}
    for chapter in chapters:
        for name, module in read_chapter(chapter).items():
            if name in modules:
                raise TangleError(f"module {name}: exported by both "
                                  f"{modules[name].chapter} and "
                                  f"{chapter.name}")
            modules[name] = module
    texts = {module.file: module_text(module) for module in modules.values()}
    if whole:
        texts["book/api.md"] = api_page(list(modules.values()))
    return texts


def run_tangle(texts: dict[str, str], root: Path, check: bool) -> int:
    """Write what differs, or with `check` print a diff; the exit code."""
    code = 0
    for name, text in texts.items():
        file = root / name
        there = file.read_text("utf-8") if file.exists() else ""
        if there == text:
            continue
        if check:
            code = 1
            print("".join(difflib.unified_diff(
                there.splitlines(True), text.splitlines(True), name,
                f"{name}, from its chapter")), end="")
        else:
            file.write_text(text, "utf-8")
            print(f"wrote {name}")
    return code


# --- Freezing ----------------------------------------------------------------

# GPU or real weights: not executed by nbclient, not compared by nbval
_ELSEWHERE = {"skip-execution", "nbval-skip"}


def prepared(path: Path) -> nbformat.NotebookNode:
    """A chapter as a notebook whose cell ids depend on nothing but the
    chapter's name and the cell's place; no outputs yet."""
    notebook = jupytext.read(path)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata.pop("jupytext", None)
    for n, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{n}".replace("_", "-")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def freeze(path: Path) -> Path:
    """Execute a chapter in its own folder; store it beside itself.

    Raises nbclient.exceptions.CellExecutionError for a cell that fails, and
    writes nothing then.
    """
    from nbclient import NotebookClient

    notebook = prepared(path)
    client = NotebookClient(notebook, timeout=600, record_timing=False,
                            coalesce_streams=True, kernel_name="python3",
                            extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": path.parent}})
    watch = path.parent.absolute() / "_ext" / "kernel.py"
    client.execute(env=os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0",
        "GPTOSS_KERNELS": "torch",  # chapter 13 asks for its kernels itself
        } | ({"PYTHONSTARTUP": str(watch)} if watch.exists() else {}))
    notebook.metadata["language_info"] = {"name": "python"}
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


def stale(path: Path) -> str:
    """Why the frozen notebook is not its chapter's own; "" if it is."""
    frozen = path.with_suffix(".ipynb")
    if not frozen.exists():
        return f"{frozen.name}: no such file; `make freeze` writes it"
    there, here = nbformat.read(frozen, 4), prepared(path)
    if len(there.cells) != len(here.cells):
        return (f"{frozen.name}: {len(there.cells)} cells, the chapter has "
                f"{len(here.cells)}")
    for old, new in zip(there.cells, here.cells, strict=True):
        where = f"{frozen.name}: cell {new.id}"
        for key in ("id", "cell_type", "source"):
            if old.get(key) != new.get(key):
                return f"{where}: {key} differs from the chapter"
        tags = set(new.metadata.get("tags", []))
        if set(old.metadata.get("tags", [])) != tags:
            return f"{where}: tags differ from the chapter"
        if new.cell_type != "code" or not new.source.strip():
            continue
        if old.execution_count is None and not _ELSEWHERE <= tags:
            return f"{where}: never executed"
        kinds = {out.get("name", out.output_type) for out in old.outputs}
        if kinds & {"error", "stderr"}:
            return f"{where}: holds an error or wrote to stderr"
    return ""


# --- One command -------------------------------------------------------------

def run_freeze(chapters: list[Path], check: bool = False,
               force: bool = False, jobs: int = 1) -> int:
    """Execute what is stale, or all with `force`; `check` only reports.

    A failing chapter is reported and does not stop the others. Returns the
    exit code.
    """
    reasons = {path: stale(path) for path in chapters}
    if check:
        print("".join(f"{text}\n" for text in reasons.values() if text),
              end="")
        return int(any(reasons.values()))

    def attempt(path: Path) -> int:
        try:
            print(f"froze {freeze(path).name}", flush=True)
        except Exception as error:
            print(f"{path.name}: {error}", file=sys.stderr, flush=True)
            return 1
        return 0

    todo = [path for path, text in reasons.items() if text or force]
    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(attempt, todo), default=0)


def main(arguments: list[str] | None = None) -> int:
    """Generate the package from the chapters of book/, or execute them."""
    parser = argparse.ArgumentParser(prog="tangle", description=main.__doc__)
    parser.add_argument("chapters", nargs="*", type=Path,
                        help="default: all of book/")
    parser.add_argument("--check", action="store_true",
                        help="write nothing, exit 1 if anything differs")
    parser.add_argument("--freeze", action="store_true",
                        help="execute chapters that changed into .ipynb")
    parser.add_argument("--force", action="store_true",
                        help="freeze also what did not change")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N",
                        help="chapters to execute at the same time")
    options = parser.parse_args(arguments)
    chapters = options.chapters or sorted(Path("book").glob("*_*.py"))
    try:
        if options.freeze:
            return run_freeze(chapters, options.check, options.force,
                              options.jobs)
        return run_tangle(tangle(chapters, whole=not options.chapters),
                          Path(), options.check)
    except (TangleError, OSError) as error:
        print(f"tangle: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())


__all__ = [
    "Module",
    "OWN",
    "TangleError",
    "api_page",
    "freeze",
    "import_block",
    "main",
    "module_text",
    "prepared",
    "public_names",
    "read_chapter",
    "run_freeze",
    "run_tangle",
    "split_imports",
    "stale",
    "tangle",
]
