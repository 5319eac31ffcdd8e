"""The book as a whole: what is made is what the chapters say, and contents,
versions and sizes agree. (test_book_form.py: the form of a chapter.)"""

import ast
import re
import tomllib
from pathlib import Path

import jupytext
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gptoss import tangle

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*_*.py"))
IDS = [path.stem for path in CHAPTERS]
MEGABYTE = 1_000_000

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=IDS)


def exports() -> dict[str, Path]:
    """Module -> the chapter that exports it."""
    return {name: path for path in CHAPTERS
            for name in tangle.read_chapter(path)}


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


def test_every_module_has_a_chapter() -> None:
    there = {path.stem for path in (ROOT / "gptoss").glob("*.py")}
    assert there == {name for name in exports() if "." not in name}


@each_chapter
def test_frozen_notebook_is_the_chapter(path: Path) -> None:
    assert tangle.stale(path) == ""


def test_no_name_means_two_things() -> None:
    """A public name belongs to one module."""
    owners: dict[str, set[str]] = {}
    for file in sorted((ROOT / "gptoss").glob("*.py")):
        if file.stem == "__init__":
            continue
        for name in tangle.public_names(ast.parse(file.read_text("utf-8")),
                                        file.stem):
            owners.setdefault(name, set()).add(file.stem)
    twice = {name: modules for name, modules in owners.items()
             if len(modules) > 1 and name != "main"}
    assert not twice


def test_contents_lists_every_chapter() -> None:
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    listed = re.findall(r"file: book/(\S+)", contents)
    assert [name for name in listed if name in IDS] == IDS
    for name in listed:
        assert any((ROOT / "book" / f"{name}{end}").exists()
                   for end in (".md", ".ipynb"))


@each_chapter
def test_titles_agree(path: Path) -> None:
    title = next(line[2:] for line in prose(path).splitlines()
                 if line.startswith("# "))
    number = path.stem.split("_")[0].lstrip("0")
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    assert f'title: "{number} · {title}"' in contents
    index = (ROOT / "book" / "index.md").read_text("utf-8")
    assert re.search(rf"\| {number} \| \[{re.escape(title)}\]\({path.stem}",
                     index)


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
    """`pip install .` alone runs every module but the two that make the
    book, which say what they need when they are imported."""
    allowed = {"torch", "safetensors", "huggingface_hub", "tokenizers",
               "rich", "gptoss"}
    for file in (ROOT / "gptoss").glob("*.py"):
        if file.stem == "tangle":
            continue
        for node in ast.parse(file.read_text("utf-8")).body:
            names = ([alias.name for alias in node.names]
                     if isinstance(node, ast.Import) else [node.module or ""]
                     if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                root = name.split(".")[0]
                assert root in allowed or tangle._group(root) < 2, (
                    f"{file.name} imports {name}")


def test_repository_stays_small() -> None:
    notebooks = sum(path.stat().st_size
                    for path in (ROOT / "book").glob("*.ipynb"))
    assert notebooks <= 25 * MEGABYTE
    pocket = [path for path in (ROOT / "gptoss" / "pocket").rglob("*")
              if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in pocket) <= 8 * MEGABYTE
