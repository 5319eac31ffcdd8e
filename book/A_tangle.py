# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: tangle
# ---

# %% [markdown]
# # The book builds itself
#
# ## Code
#
# ### Reading a chapter

# %% tags=["export"]
import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

EXPORT = "export"


class TangleError(ValueError):
    """A chapter that cannot be turned into a module."""


@dataclass
class Module:
    """What one chapter gives to one module.

    Attributes:
        name: module name, for example "sinks" or "__init__".
        chapter: file name of the chapter.
        title: the chapter's first heading.
        cells: (section heading, source) in reading order.
    """

    name: str
    chapter: str
    title: str
    cells: list[tuple[str, str]] = field(default_factory=list)


# %% tags=["export"]
HEADING = re.compile(r"^(#+)\s+(.*?)\s*$", re.MULTILINE)


def read_chapter(path: Path) -> dict[str, Module]:
    """The modules that a chapter exports to, by name.

    A cell tagged `export` goes to the module of the front matter, one
    tagged `export:NAME` to NAME. TangleError: no module named, a cell that
    is not Python.
    """
    notebook = jupytext.read(path)
    default = notebook.metadata.get("gptoss", {}).get("module")
    title, heading, modules = "", "", {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for level, text in HEADING.findall(cell.source):
                title = title or text
                heading = text if len(level) > 1 else heading
        for tag in cell.metadata.get("tags", []):
            first, _, name = tag.partition(":")
            if first == EXPORT:
                name = name or default
                if not name:
                    raise TangleError(f"{path}: an exported cell under "
                                      f"{heading!r}, but no gptoss.module")
                module = Module(name, path.name, title)
                modules.setdefault(name, module).cells.append(
                    (heading, cell.source))
    return modules


# %% [markdown]
# ### Imports go to the top

# %% tags=["export"]
def split_imports(source: str, where: str) -> tuple[list[ast.stmt], str]:
    """Top-level imports of a cell, and the cell without their lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise TangleError(f"{where}: {error}") from error
    imports = [node for node in tree.body
               if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = source.splitlines()
    for node in imports:
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = None
    kept = "\n".join(line for line in lines if line is not None)
    return imports, kept.strip("\n")


OWN = "gptoss"


def import_block(nodes: list[ast.stmt]) -> str:
    """Imports merged, sorted and grouped: standard, third party, own.

    `import a` stands before `from a import b`; names of the same module
    share a line, broken at 79 columns.
    """
    plain, named = set(), {}
    for node in nodes:
        for alias in node.names:
            text = alias.name + (f" as {alias.asname}" if alias.asname
                                 else "")
            if isinstance(node, ast.Import):
                plain.add(text)
            else:
                module = "." * node.level + (node.module or "")
                named.setdefault(module, set()).add(text)
    groups = {}
    for text in plain:
        groups.setdefault(_group(text), []).append((0, text, f"import {text}"))
    for module, names in named.items():
        renamed = sorted(name for name in names if " as " in name)
        rest = sorted(names.difference(renamed), key=_member_key)
        lines = [_from_line(module, [name]) for name in renamed]
        lines += [_from_line(module, rest)] if rest else []
        groups.setdefault(_group(module), []).append(
            (1, module, "\n".join(lines)))
    blocks = ("\n".join(line for *_, line in sorted(
        entries, key=lambda e: (e[0], e[1].lower())))
        for _, entries in sorted(groups.items()))
    return "\n\n".join(blocks)


# %% tags=["export"]
import sys


def _group(module: str) -> int:
    root = module.split()[0].split(".")[0]
    if root == "__future__":
        return 0
    if root in sys.stdlib_module_names:
        return 1
    return 3 if root in ("", OWN) else 2


def _member_key(name: str) -> tuple[int, str]:
    """isort's order: CONSTANTS, then Classes, then functions."""
    first = name.split()[0]
    kind = 0 if first.isupper() and len(first) > 1 else (
        1 if first[:1].isupper() else 2)
    return kind, first


def _from_line(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 79:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inner})"


# %% [markdown]
# ### The text of a module

# %% tags=["export"]
def public_names(body: str, name: str, imports: list[ast.stmt]) -> list[str]:
    """What `__all__` lists: public functions, classes and constants; for
    `__init__` what it imports, too; nothing for `__main__`."""
    if name == "__main__":
        return []
    found = []
    for node in ast.parse(body).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else (
            [node.target] if isinstance(node, ast.AnnAssign) else [])
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            found += [part.id for part in parts if isinstance(part, ast.Name)]
    if name == "__init__":
        found += [alias.asname or alias.name
                  for node in imports for alias in node.names
                  if isinstance(node, ast.ImportFrom)]
    return sorted({text for text in found if not text.startswith("_")})


# %% tags=["export"]
def module_text(module: Module) -> str:
    """The whole file: docstring, imports, cells, `__all__`."""
    imports, body, last = [], [], None
    for heading, source in module.cells:
        found, rest = split_imports(source, f"{module.chapter}, {heading!r}")
        imports += found
        if not rest:
            continue
        if heading != last:
            rule = f"# --- {heading} ".ljust(79, "-")
            rest, last = f"{rule}\n\n{rest}", heading
        body.append(rest)
    head = (f'"""{module.title}\n\nGenerated from book/{module.chapter}; '
            'edit the chapter, not this file.\n"""')
    code = "\n\n\n".join(body)
    names = public_names(code, module.name, imports)
    top = "\n\n".join(part for part in (head, import_block(imports)) if part)
    parts = [f"{top}\n\n{code}"]
    if names:
        listed = "".join(f'    "{name}",\n' for name in names)
        parts.append(f"__all__ = [\n{listed}]")
    return "\n\n\n".join(parts).rstrip() + "\n"


def tangle(chapters: list[Path]) -> dict[str, str]:
    """Module file name -> its text, for all exports of `chapters`."""
    texts, owner = {}, {}
    for chapter in chapters:
        for name, module in read_chapter(chapter).items():
            if name in owner:
                raise TangleError(f"module {name}: exported by both "
                                  f"{owner[name]} and {chapter.name}")
            owner[name] = chapter.name
            texts[f"{name}.py"] = module_text(module)
    return texts


# %% [markdown]
# ### Writing and checking

# %% tags=["export"]
def differences(texts: dict[str, str], folder: Path) -> Iterator[str]:
    """Unified diffs between `folder` and what the chapters say."""
    for name, text in sorted(texts.items()):
        file = folder / name
        there = file.read_text("utf-8") if file.exists() else ""
        yield from difflib.unified_diff(
            there.splitlines(keepends=True), text.splitlines(keepends=True),
            str(file), f"{file} (from the chapter)")


def write(texts: dict[str, str], folder: Path) -> list[Path]:
    """Write what differs; the files written."""
    changed = [name for name, text in texts.items()
               if not (folder / name).exists()
               or (folder / name).read_text("utf-8") != text]
    for name in changed:
        (folder / name).write_text(texts[name], "utf-8")
    return [folder / name for name in changed]


# %% [markdown]
# ### Freezing

# %% tags=["export"]
import nbformat


def prepared(path: Path) -> nbformat.NotebookNode:
    """A chapter as a notebook with cell ids that depend on nothing but the
    chapter's name and the cell's place, and no outputs yet."""
    notebook = jupytext.read(path)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata.pop("jupytext", None)
    for n, cell in enumerate(notebook.cells):
        cell.id = f"{path.stem}-{n}".replace("_", "-")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def freeze(path: Path) -> Path:
    """Execute a chapter in its own folder and store it beside itself.

    Twice the same chapter gives twice the same bytes. An error in a cell is
    raised (nbclient.exceptions.CellExecutionError) and nothing is written.
    """
    from nbclient import NotebookClient

    notebook = prepared(path)
    NotebookClient(notebook, timeout=600, record_timing=False,
                   kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}},
                   ).execute()
    notebook.metadata.pop("language_info", None)
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


# %% tags=["export"]
def stale(path: Path) -> str:
    """Why the frozen notebook of a chapter is not its own; "" if it is.

    Compares sources, kinds, tags and ids, and asks that every code cell
    was executed without error: nbval passes cells that never ran.
    """
    frozen = path.with_suffix(".ipynb")
    if not frozen.exists():
        return f"{frozen}: no such file"
    there, here = nbformat.read(frozen, 4), prepared(path)
    if len(there.cells) != len(here.cells):
        return (f"{frozen}: {len(there.cells)} cells, the chapter has "
                f"{len(here.cells)}")
    for old, new in zip(there.cells, here.cells, strict=True):
        for key in ("id", "cell_type", "source"):
            if old.get(key) != new.get(key):
                return f"{frozen}: cell {new.id}: another {key}"
        if old.metadata.get("tags") != new.metadata.get("tags"):
            return f"{frozen}: cell {new.id}: other tags"
        if old.cell_type == "code" and old.source.strip():
            if old.execution_count is None:
                return f"{frozen}: cell {new.id}: never executed"
            if any(out.output_type == "error" for out in old.outputs):
                return f"{frozen}: cell {new.id}: holds an error"
    return ""


# %% [markdown]
# ### One command

# %% tags=["export"]
import argparse
from concurrent.futures import ThreadPoolExecutor


def run_tangle(chapters: list[Path], check: bool, folder: Path) -> int:
    """Write the modules, or with `check` print how they differ."""
    texts = tangle(chapters)
    if check:
        diff = list(differences(texts, folder))
        print("".join(diff), end="")
        return 1 if diff else 0
    for file in write(texts, folder):
        print(f"wrote {file}")
    return 0


def run_freeze(chapters: list[Path], check: bool, force: bool,
               jobs: int) -> int:
    """Execute what is stale (or all with `force`); `check` only reports."""
    reasons = {path: stale(path) for path in chapters}
    if check:
        print("".join(f"{text}\n" for text in reasons.values() if text),
              end="")
        return 1 if any(reasons.values()) else 0
    todo = [path for path, text in reasons.items() if text or force]
    with ThreadPoolExecutor(jobs) as pool:
        for target in pool.map(freeze, todo):
            print(f"froze {target}")
    return 0


# %% tags=["export"]
def main(arguments: list[str] | None = None) -> int:
    """`tangle.py [--freeze] [--check] [--force] [-j N] [CHAPTER …]`."""
    parser = argparse.ArgumentParser(prog="tangle", description=main.__doc__)
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("chapters", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    book = Path("book")
    chapters = options.chapters or sorted(book.glob("[0-9AB]*_*.py"))
    try:
        if options.freeze:
            return run_freeze(chapters, options.check, options.force,
                              options.jobs)
        return run_tangle(chapters, options.check, Path(OWN))
    except TangleError as error:
        print(f"tangle: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
