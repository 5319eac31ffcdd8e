"""The book as a whole: what is made is what the chapters say, and contents,
versions and sizes agree. (test_book_form.py: the form of a chapter.)"""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import chapters
import freeze
import jupytext
import pytest
import tangle
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = tangle.listed(ROOT)
IDS = [path.stem for path in CHAPTERS]
MEGABYTE = 1_000_000

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=IDS)


def prose(path: Path) -> str:
    """The markdown of a chapter without its fenced blocks."""
    text = "\n\n".join(cell.source for cell in jupytext.read(path).cells
                       if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def test_modules_and_reference_are_in_sync() -> None:
    texts = tangle.tangle(CHAPTERS, whole=True)
    wrong = [name for name, text in texts.items()
             if (ROOT / name).read_text("utf-8") != text]
    assert not wrong, "run `make tangle`"
    there = {path.relative_to(ROOT).as_posix()
             for path in (ROOT / "gptoss").rglob("*")
             if path.suffix in (".py", ".pyi", ".h", ".cpp", ".jinja")}
    assert there == {name for name in texts if name.startswith("gptoss/")}


def test_modules_lie_in_the_tree() -> None:
    """An editable install of another folder fills in what is missing here."""
    for file in (ROOT / "gptoss").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if not name.endswith("__main__"):
            found = importlib.util.find_spec(name)
            assert found and Path(found.origin).resolve() == file, name


@pytest.mark.parametrize(("folder", "end", "most"), [
    ("gptoss", ".py", 400), ("gptoss", ".h", 300), ("book", ".py", 900)])
def test_sizes(folder: str, end: str, most: int) -> None:
    """A module, a C++ part and a chapter, in lines."""
    long = {path.relative_to(ROOT).as_posix(): count
            for path in (ROOT / folder).rglob(f"*{end}")
            if (count := len(path.read_text("utf-8").splitlines())) > most}
    assert not long


@each_chapter
def test_frozen_notebook_is_the_chapter(path: Path) -> None:
    assert freeze.stale(path) == ""


def test_no_name_means_two_things() -> None:
    """A public name belongs to one module. Only the one page has the short
    forms of functions that later chapters derive, under their names."""
    owners: dict[str, set[str]] = {}
    for file in sorted((ROOT / "gptoss").rglob("*.py")):
        if file.stem in ("__init__", "one_page"):
            continue
        for name in chapters.public_names(ast.parse(file.read_text("utf-8")),
                                          file.stem):
            owners.setdefault(name, set()).add(file.as_posix())
    twice = {name: modules for name, modules in owners.items()
             if len(modules) > 1 and name != "main"}
    assert not twice


def test_contents_lists_every_chapter() -> None:
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    listed = re.findall(r"file: book/(\S+)", contents)
    assert len(IDS) == len(set(IDS))
    assert {path for path in (ROOT / "book").rglob("*.py")
            if path.parent.name != "_ext" and path.name != "conftest.py"
            } == set(CHAPTERS)
    for name in listed:
        assert any((ROOT / "book" / f"{name}{end}").exists()
                   for end in (".md", ".ipynb"))


@each_chapter
def test_titles_agree(path: Path) -> None:
    title = next(line[2:] for line in prose(path).splitlines()
                 if line.startswith("# "))
    index = (ROOT / "book" / "index.md").read_text("utf-8")
    page = path.relative_to(ROOT / "book").with_suffix("").as_posix()
    assert f"[{title}]({page})" in index


@pytest.mark.parametrize("path", [
    *CHAPTERS, *sorted((ROOT / "book").glob("*.md")), ROOT / "README.md",
    *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.stem)
def test_no_chapter_is_named_by_its_number(path: Path) -> None:
    """The table of contents counts them; a link says which one is meant."""
    found = [line for line in path.read_text("utf-8").splitlines()
             if re.search(r"\b[Cc]hapters? \d", line)]
    assert not found


def test_versions_agree() -> None:
    pins = {}
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
        "project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *sum(extras.values(), [])]:
        wanted = Requirement(text)
        assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_package_imports_only_its_dependencies() -> None:
    """`pip install .` alone runs every module."""
    allowed = {"torch", "safetensors", "huggingface_hub", "tokenizers",
               "rich", "gptoss"}
    for file in (ROOT / "gptoss").rglob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            names = ([alias.name for alias in node.names]
                     if isinstance(node, ast.Import) else [node.module or ""]
                     if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                root = name.split(".")[0]
                assert root in allowed or chapters._group(root) < 2, (
                    f"{file.name} imports {name}")


def test_repository_stays_small() -> None:
    notebooks = sum(path.stat().st_size
                    for path in (ROOT / "book").rglob("*.ipynb"))
    assert notebooks <= 25 * MEGABYTE
    pocket = [path for path in (ROOT / "gptoss" / "pocket").rglob("*")
              if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in pocket) <= 8 * MEGABYTE
