"""The form of chapters: sections, references, exercises, imports, outputs.

`test_book.py` holds what is made to what is written; this file looks at what
is written.
"""

import ast
import re
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import jupytext
import nbformat
import pytest
from chapters import read_chapter
from tangle import listed

from gptoss.kernels.build import PARTS as PARTS_IN_C

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CHAPTERS = listed(ROOT)   # in reading order
# the others: they need none of the sections
MAIN = [path for path in CHAPTERS if path.parent.name != "cli"]
PAGES = [*CHAPTERS, *sorted(BOOK.glob("*.md"))]
NOTEBOOKS = sorted(BOOK.rglob("*.ipynb"))

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


def code(chapter: Path) -> str:
    """The code of a chapter, without cells for IPython alone."""
    return "\n\n".join(cell.source for cell in cells(chapter)
                       if cell.cell_type == "code"
                       and not cell.source.startswith("%"))


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


# --- The anatomy -------------------------------------------------------------

# between them the argument decides
FIRST, LAST = ["Question"], ["Takeaways", "Exercises", "Sources"]
each_main = pytest.mark.parametrize("chapter", MAIN,
                                    ids=lambda path: path.stem)


def parts(notebook: nbformat.NotebookNode) -> dict[str, list]:
    """Heading of a section -> its cells; a markdown cell without the lines
    that belong to another section."""
    found, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            found.setdefault(heading, []).append(cell)
            continue
        text = re.sub(r"^```.*?^```", "", cell.source,
                      flags=re.MULTILINE | re.DOTALL)
        before, *rest = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
        for title, body in [(heading, before),
                            *zip(rest[::2], rest[1::2], strict=True)]:
            heading = title
            found.setdefault(heading, []).append(
                nbformat.v4.new_markdown_cell(body))
    return found


def frozen(chapter: Path) -> nbformat.NotebookNode:
    return nbformat.read(chapter.with_suffix(".ipynb"), 4)


def faults_of_form(notebook: nbformat.NotebookNode) -> list[str]:
    """What a frozen chapter lacks of what CONTRIBUTING.md asks for."""
    part, found = parts(notebook), []
    titles = [title for title in part if title]
    if titles[:1] != FIRST or titles[-3:] != LAST:
        return ["sections"]
    if "Picture" in part and not any(
            kind.startswith("image/") for cell in part["Picture"]
            for output in cell.get("outputs", [])
            for kind in output.get("data", {})):
        found.append("Picture: no figure")
    if "It holds" in part and not any(
            isinstance(node, ast.Assert) for cell in part["It holds"]
               if cell.cell_type == "code"
               for node in ast.walk(ast.parse(cell.source))):
        found.append("It holds: no assert")
    for cell in part["Exercises"]:
        if cell.cell_type == "code" and cell.execution_count is None:
            found.append("Exercises: a solution that was not run")
    if not any(re.search(r"\{cite|https?://|\w/\w", cell.source)
               for cell in part["Sources"]):
        found.append("Sources: nothing that can be followed")
    return found


def test_faults_of_form() -> None:
    new = nbformat.v4
    picture = new.new_output("display_data", {"image/png": "abcd"})
    fit = {"Picture": [new.new_code_cell("1", outputs=[picture])],
           "It holds": [new.new_code_cell("if 1:\n    assert True")],
           "Exercises": [new.new_code_cell("1", execution_count=1)],
           "Sources": [new.new_markdown_cell("- A file in owner/name.")]}

    def made(but: str = "", cell: nbformat.NotebookNode | None = None,
             ) -> nbformat.NotebookNode:
        whole = [new.new_markdown_cell("# A chapter")]
        for title in [*FIRST, "Picture", "It holds", "Cost", *LAST]:
            whole.append(new.new_markdown_cell(f"## {title}\n\n"))
            whole += [cell] if title == but else fit.get(title, [])
        return new.new_notebook(cells=whole)

    assert faults_of_form(made()) == []
    code, words = new.new_code_cell("1"), new.new_markdown_cell("- A book")
    assert faults_of_form(made("Picture", words)) == ["Picture: no figure"]
    assert faults_of_form(made("It holds", code)) == ["It holds: no assert"]
    assert faults_of_form(made("Exercises", code)) == [
        "Exercises: a solution that was not run"]
    assert faults_of_form(made("Sources", words)) == [
        "Sources: nothing that can be followed"]
    late = new.new_markdown_cell("more\n## Afterthought\n")
    assert faults_of_form(made("Sources", late)) == ["sections"]


@each_main
def test_form(chapter: Path) -> None:
    assert faults_of_form(frozen(chapter)) == []


@each_chapter
def test_sections(chapter: Path) -> None:
    lines = prose(chapter).splitlines()
    found = [line[3:] for line in lines if line.startswith("## ")]
    assert len(found) == len(set(found))
    assert sum(line.startswith("# ") for line in lines) == 1


@pytest.mark.parametrize("file", [*CHAPTERS, *sorted(
    (ROOT / "gptoss").rglob("*.py"))], ids=lambda path: path.name)
def test_lines_fit_the_page(file: Path) -> None:
    long = [number for number, line in enumerate(
        file.read_text("utf-8").splitlines(), 1) if len(line) > 79]
    assert not long


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


# --- Kernels -----------------------------------------------------------------

def test_pages_of_kernels_load_the_parts_they_derive() -> None:
    """Or they would test plain torch, and nothing would tell."""
    pages = {chapter.stem: (
        re.findall(r"export:(\w+)\.h\b", text := chapter.read_text("utf-8")),
        re.findall(r"\bload_upto\(\"(\w+)\"\)", text),
        re.findall(r"^(?:path = )?load_kernels\(\)", text, re.MULTILINE))
        for chapter in CHAPTERS}
    for name, (derived, upto, _) in pages.items():
        if upto:
            last = max([PARTS_IN_C.index(part) for part in derived], default=0)
            assert all(PARTS_IN_C.index(part) >= last for part in upto), name
    with_some = {name for name, (derived, *_) in pages.items() if derived}
    loading = {name for name, (_, *loads) in pages.items() if any(loads)}
    assert len(with_some) > 10
    assert with_some - loading == {"tangle"}  # which only speaks of one


# --- Exercises ---------------------------------------------------------------

@each_chapter
def test_exercises_are_numbered_and_solved(chapter: Path) -> None:
    found, solved = [], set()
    for cell in cells(chapter):
        if cell.cell_type == "markdown":
            found += re.findall(r"^### Exercise (\d+)$", cell.source,
                                re.MULTILINE)
        elif "hide-cell" in tags(cell) and found:
            solved.add(found[-1])
    assert found == [str(n + 1) for n in range(len(found))]
    assert len(found) <= 5 and (found or chapter not in MAIN)
    assert solved == set(found)


# --- Imports -----------------------------------------------------------------

HOME = {name: n for n, chapter in enumerate(CHAPTERS)
        for name, module in read_chapter(chapter).items()
        if module.folder == "gptoss" and "." not in name}
PARTS = {name.rpartition("/")[0] for name in HOME} - {""}


def homes(dotted: str, names: Iterable[str] = ()) -> set[str]:
    """The modules of the package behind `from dotted import names`, or
    `import dotted`; a part or the package itself by its __init__."""
    path = dotted.replace(".", "/").removeprefix("gptoss").strip("/")
    if path in HOME:
        return {path}
    inside = {f"{path}/{name}".strip("/") for name in names} & HOME.keys()
    return inside or {f"{path}/__init__".strip("/")}


def imported(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:  # the package is there before its parts
                if alias.name.startswith("gptoss."):
                    found |= homes(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used"
            if (node.module or "").split(".")[0] == "gptoss":
                found |= homes(node.module,
                               [alias.name for alias in node.names])
        elif (isinstance(node, ast.Call) and node.args
              and isinstance(node.args[0], ast.Constant)
              and ast.unparse(node.func).endswith(
                  ("import_module", "__import__"))):
            name = str(node.args[0].value).partition(":")[0]
            if name.split(".")[0] == "gptoss":
                found |= homes(name)
    return found


@pytest.mark.parametrize(("source", "names"), [
    ("import gptoss.attention.rope as r", {"attention/rope"}),
    ("def f():\n    from gptoss.attention.rope import g",
     {"attention/rope"}),
    ("from gptoss.attention import rope, masks",
     {"attention/rope", "attention/masks"}),
    ("from gptoss.attention import apply_rope", {"attention/__init__"}),
    ("from gptoss import GptOss", {"__init__"}),
    ("import importlib\nimportlib.import_module('gptoss.attention.rope')",
     {"attention/rope"}),
    ("import gptoss", set()),
    ("import torch\nfrom gptossy import x\nf('gptoss.attention.rope')",
     set()),
])
def test_imported(source: str, names: set[str]) -> None:
    assert imported(ast.parse(source)) == names


@cache
def at_loading(name: str) -> set[str]:
    """Modules that a module imports when it is loaded."""
    tree = ast.parse((ROOT / "gptoss" / f"{name}.py").read_text("utf-8"))
    tree.body = [node for node in tree.body
                 if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported(tree)


def needs(name: str) -> set[str]:
    """Modules that are loaded with it, directly or not."""
    found, todo = set(), [name]
    while todo:
        new = at_loading(todo.pop()) - found
        todo += new
        found |= new
    return found


@pytest.mark.parametrize("name", [name for name in HOME
                                  if not name.startswith("__")])
def test_modules_import_only_earlier_ones(name: str) -> None:
    """What a module imports when it is loaded; inside a function it may
    reach ahead: that is how the front door offers what comes later."""
    for other in at_loading(name):
        assert HOME[other] <= HOME[name], other
    assert name not in needs(name)


@each_chapter
def test_chapters_import_only_earlier_modules(chapter: Path) -> None:
    """A chapter of several modules may import those that it has made. A
    cell tagged `picture` may import the finished package."""
    at = CHAPTERS.index(chapter)
    allowed = {name for name, home in HOME.items() if home <= at}
    for cell in cells(chapter):
        if (cell.cell_type != "code" or "picture" in tags(cell)
                or "export:/__init__" in tags(cell)):
            continue
        tree = ast.parse(cell.source)
        if any(tag.startswith("export") for tag in tags(cell)):
            tree.body = [node for node in tree.body if isinstance(
                node, ast.Import | ast.ImportFrom)]
        assert imported(tree) <= allowed


def stray_pictures(found: list[nbformat.NotebookNode]) -> list[int]:
    """Cells tagged `picture` that may not be: not the first code cell under
    `## Picture`, not hidden, exported, or without a figure."""
    stray, first = [], False
    for place, cell in enumerate(found):
        if cell.cell_type == "markdown":
            for line in re.findall(r"^## .*", cell.source, re.MULTILINE):
                first = line == "## Picture"
        elif "picture" in tags(cell) and not (
                first and "hide-input" in tags(cell)
                and not any(tag.startswith("export") for tag in tags(cell))
                and "plt.show()" in cell.source):
            stray.append(place)
        if cell.cell_type == "code":
            first = False
    return stray


def test_stray_pictures() -> None:
    new, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    good = new("plt.show()", metadata={"tags": ["hide-input", "picture"]})
    bare = new("plt.show()", metadata={"tags": ["picture"]})
    made = new("plt.show()",
               metadata={"tags": ["hide-input", "picture", "export"]})
    blind = new("f()", metadata={"tags": ["hide-input", "picture"]})
    under, other = text("## Picture\n\nWords."), text("## Picture\n## Code")
    assert stray_pictures([under, good]) == []
    for wrong in ([under, bare], [under, made], [under, blind],
                  [other, good], [text("## Code"), good]):
        assert stray_pictures(wrong) == [1]
    assert stray_pictures([under, new("1"), good]) == [2]


@each_chapter
def test_the_finished_package_only_in_the_opening_picture(
        chapter: Path) -> None:
    assert stray_pictures(cells(chapter)) == []


# --- Figures -----------------------------------------------------------------

def without_text(found: list[nbformat.NotebookNode]) -> list[str]:
    """Cells that show a figure and do not begin with its text."""
    return [cell.source[:60] for cell in found
            if cell.cell_type == "code"
            and re.search(r"^\s*plt\.show\(\)", cell.source, re.MULTILINE)
            and not re.match(r"# Figure: \w", cell.source)]


def test_without_text() -> None:
    new = nbformat.v4.new_code_cell
    good, bad = "# Figure: two lines.\nplt.show()", "f()\n    plt.show()"
    assert without_text([new(good), new("# plt.show()"), new(bad)]) == [bad]


@each_chapter
def test_every_figure_has_a_text(chapter: Path) -> None:
    assert without_text(cells(chapter)) == []


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


# --- Randomness --------------------------------------------------------------

DRAWS = {"randn", "rand", "randint", "randperm", "multinomial", "normal",
         "bernoulli", "randn_like", "rand_like", "randint_like", "normal_",
         "uniform_", "random_", "bernoulli_", "exponential_"}


def unseeded(source: str) -> int | None:
    """The line of the first draw from torch's own generator that no
    `torch.manual_seed` precedes: such a number differs in every process."""
    calls = [(node.lineno, ast.unparse(node.func), node.keywords)
             for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call)]
    seeds = [line for line, name, _ in calls if name == "torch.manual_seed"]
    drawn = [line for line, name, keywords in calls
             if name.rpartition(".")[2] in DRAWS
             and (name.startswith("torch.") or name.endswith("_"))
             and all(word.arg != "generator" for word in keywords)]
    if drawn and min(drawn) < min(seeds, default=1 + max(drawn)):
        return min(drawn)
    return None


@pytest.mark.parametrize("source, line", [
    ("x = 1\ny = torch.randn(3)", 2),
    ("torch.manual_seed(0)\ny = torch.randn(3)", None),
    ("y = torch.randn(3)\ntorch.manual_seed(0)", 1),
    ("y = torch.rand(3, generator=g)", None), ("x.normal_()", 1)])
def test_unseeded(source: str, line: int | None) -> None:
    assert unseeded(source) == line


@each_chapter
def test_draws_are_seeded(chapter: Path) -> None:
    assert unseeded(code(chapter)) is None
