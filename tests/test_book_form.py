"""The form of chapters: references, asserts, exercises, imports, outputs.

`test_book.py` holds what is made to what is written; this file looks at what
is written.
"""

import ast
import re
import sys
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import jupytext
import nbformat
import pytest

from gptoss.tangle import read_chapter

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*_*.py"))   # reading order: 01 ... 16, A, B
PAGES = [*CHAPTERS, *sorted(BOOK.glob("*.md"))]
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS,
                                       ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@cache
def cells(chapter: Path) -> list[nbformat.NotebookNode]:
    return jupytext.read(chapter).cells


@cache
def prose(page: Path) -> str:
    """The markdown of a chapter or a page, without its fenced blocks."""
    text = page.read_text("utf-8")
    if page.suffix == ".py":
        text = "\n\n".join(cell.source for cell in cells(page)
                           if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


# --- References --------------------------------------------------------------

KEYS = re.findall(r"^@\w+\{([^,\s]+)",
                  (BOOK / "references.bib").read_text("utf-8"), re.MULTILINE)


def cited(text: str) -> list[str]:
    groups = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
    return [key.strip() for group in groups for key in group.split(",")]


def test_citations_are_found() -> None:
    assert cited("{cite}`a`, {cite:p}`b,\nc` and `{cite}`") == ["a", "b", "c"]
    assert len(KEYS) == len(set(KEYS)) > 0


@each_page
def test_citations_exist(page: Path) -> None:
    assert [key for key in cited(prose(page)) if key not in KEYS] == []


@each_page
def test_equations(page: Path) -> None:
    """A label is defined once in the book; what is referred to exists."""
    pattern = r"\$\$ *\(([\w-]+)\)"
    every = re.findall(pattern, "\n".join(map(prose, PAGES)))
    own = re.findall(pattern, prose(page))
    assert [label for label in own if every.count(label) > 1] == []
    assert [label for label in re.findall(r"\{eq\}`([^`]+)`", prose(page))
            if label not in every] == []


# --- Asserts and exercises ---------------------------------------------------

@each_chapter
def test_asserts(chapter: Path) -> None:
    shown = [ast.parse(cell.source) for cell in cells(chapter)
             if cell.cell_type == "code"
             and not any(tag.startswith("export") for tag in tags(cell))]
    assert any(isinstance(node, ast.Assert)
               for tree in shown for node in ast.walk(tree))


@each_chapter
def test_exercises_are_numbered_and_solved(chapter: Path) -> None:
    found, solved = [], set()
    for cell in cells(chapter):
        if cell.cell_type == "markdown":
            found += re.findall(r"^(?:#+ |\*\*)Exercise (\d+)", cell.source,
                                re.MULTILINE)
        elif "hide-cell" in tags(cell) and found:
            solved.add(found[-1])
    assert found == [str(n + 1) for n in range(len(found))]
    assert 3 <= len(found) <= 5
    assert solved == set(found)


# --- Imports -----------------------------------------------------------------

HOME = {name: chapter for chapter in CHAPTERS
        for name in read_chapter(chapter)}


def imported(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, at any depth; the package
    itself is `__init__`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("gptoss." * bool(node.level)
                    + (node.module or "")).rstrip(".")
            found |= ({f"gptoss.{alias.name}" if alias.name in HOME else base
                       for alias in node.names} if base == "gptoss"
                      else {base})
        elif (isinstance(node, ast.Call) and node.args
              and isinstance(node.args[0], ast.Constant)
              and ast.unparse(node.func).endswith(
                  ("import_module", "__import__"))):
            found.add(str(node.args[0].value))
    return {(name.split(".") + ["__init__"])[1] for name in found
            if name.split(".")[0] == "gptoss"}


@pytest.mark.parametrize(("source", "names"), [
    ("import gptoss.rope as r", {"rope"}),
    ("def f():\n    from gptoss.rope import g", {"rope"}),
    ("from gptoss import rope, GptOss", {"rope", "__init__"}),
    ("from . import rope\nfrom .masks import visible", {"rope", "masks"}),
    ("import importlib\nimportlib.import_module('gptoss.rope')", {"rope"}),
    ("import gptoss", {"__init__"}),
    ("import torch\nfrom gptossy import x\nf('gptoss.rope')", set()),
])
def test_imported(source: str, names: set[str]) -> None:
    assert imported(ast.parse(source)) == names


def needs(name: str) -> set[str]:
    """Modules that a module imports, directly or not."""
    found, todo = set(), [name]
    while todo:
        tree = ast.parse((ROOT / "gptoss" / f"{todo.pop()}.py").read_text(
            "utf-8"))
        todo += sorted(imported(tree) - found)
        found |= imported(tree)
    return found


@pytest.mark.parametrize("name", [name for name in HOME if "." not in name])
def test_modules_import_only_earlier_ones(name: str) -> None:
    """Or others of the same chapter that do not need this one."""
    assert needs(name) <= set(HOME) - {name}
    assert not {other for other in needs(name) if HOME[other] > HOME[name]}


@each_chapter
def test_chapters_import_only_earlier_modules(chapter: Path) -> None:
    """A chapter of several modules may import those that it has made."""
    own = {name for name, home in HOME.items() if home == chapter}
    allowed = {name for name, home in HOME.items() if home < chapter}
    if len(own) > 1:
        allowed |= own - {"__main__"}
    for cell in cells(chapter):
        if cell.cell_type == "code":
            assert imported(ast.parse(cell.source)) <= allowed


# --- Outputs -----------------------------------------------------------------

HERE = {str(ROOT), sys.prefix, tempfile.gettempdir(), str(Path.home())}
FOLDERS = {"/home", "/root", "/tmp", "/work", "/usr", "/var", "/opt", "/mnt",
           "/data", "/private", "/etc", "/Users", "/Volumes"}
ABSOLUTE = re.compile(
    rf"(?<![\w.:/~-])(?:{'|'.join(map(re.escape, HERE | FOLDERS))})/\w"
    r"|\b[A-Z]:\\\w|\bat 0x[0-9a-f]{6,}")


def words(output: nbformat.NotebookNode) -> str:
    """All that is text in an output, HTML too; images are not."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *output.get("traceback", []),
             *(data[kind] for kind in data if not kind.startswith("image/"))]
    return "\n".join(map(str, parts))


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Cells with an output that must not be frozen, and why."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            kind = output.get("name", output.output_type)
            if kind in ("error", "stderr"):
                found.append(f"{cell.id}: {kind}")
            if ABSOLUTE.search(words(output)):
                found.append(f"{cell.id}: absolute path or address")
    return found


def test_faults() -> None:
    new = nbformat.v4.new_output
    outputs = [
        new("stream", name="stdout", text="a/b, 1/2, https://x.org/tmp/y"),
        new("stream", name="stderr", text="careful"),
        new("stream", name="stdout", text=f"wrote {ROOT}/book"),
        new("stream", name="stdout", text="in /home/someone/x"),
        new("execute_result", {"text/plain": "<f at 0x7fffdeadbeef>"}),
        new("display_data", {"text/html": "<b>/tmp/a</b>",
                             "text/plain": "b"}),
        new("display_data", {"image/png": "/tmp/abcd"}),
        new("error", ename="E", evalue="", traceback=[]),
    ]
    made = [nbformat.v4.new_code_cell("1", id=str(n), outputs=[output])
            for n, output in enumerate(outputs)]
    assert faults(nbformat.v4.new_notebook(cells=made)) == [
        "1: stderr", *(f"{n}: absolute path or address" for n in (2, 3, 4, 5)),
        "7: error"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs(file: Path) -> None:
    notebook = nbformat.read(file, 4)
    assert faults(notebook) == []
    counts = [cell.execution_count for cell in notebook.cells
              if cell.get("execution_count")]
    assert all(a < b for a, b in pairwise(counts)), "ran out of order"


def test_no_notebook_without_a_chapter() -> None:
    assert ({path.stem for path in NOTEBOOKS}
            <= {path.stem for path in CHAPTERS})
