"""Chapters to modules and notebooks, on chapters of a few lines."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from api import api_page
from blank import blank, first_lines
from chapters import (
    Module,
    TangleError,
    import_block,
    module_text,
    public_names,
    read_chapter,
    split_imports,
)
from freeze import freeze, prepared, run_freeze, stale
from hypothesis import given, settings
from hypothesis import strategies as st
from tangle import left_behind, listed, main, part_text, tangle

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
{module}# ---
"""
AREAS = '''\
# %% [markdown]
# # Areas
#
# ## Code
#
# ### A square

# %% tags=["export"]
def square(side: float) -> float:
    """Area of a *square*.

    Not for the reference page.
    """
    return side * side


# %%
print("shown", square(3))

# %% [markdown]
# ### A circle

# %% tags=["export"]
import math

_HALF = 0.5
PI = math.pi


def circle(diameter: float) -> float:
    """Area of a circle."""
    return PI * square(_HALF * diameter)
'''
AREAS_MODULE = '''\
"""Areas

Generated from book/01_areas.py; edit the chapter, not this file.
"""

import math

# --- A square ----------------------------------------------------------------

def square(side: float) -> float:
    """Area of a *square*.

    Not for the reference page.
    """
    return side * side


# --- A circle ----------------------------------------------------------------

_HALF = 0.5
PI = math.pi


def circle(diameter: float) -> float:
    """Area of a circle."""
    return PI * square(_HALF * diameter)


__all__ = [
    "PI",
    "circle",
    "square",
]
'''


def write(root: Path, name: str, body: str, module: str = "") -> Path:
    """A chapter in root/book and in root/_toc.yml; `module`: front matter."""
    (root / "gptoss").mkdir(exist_ok=True)
    front = f"#   gptoss:\n#     module: {module}\n" if module else ""
    path = root / "book" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(root / "_toc.yml", "a") as file:
        file.write(f"  - file: book/{name.removesuffix('.py')}\n")
    path.write_text(f"{HEADER.format(module=front)}\n{body}", "utf-8")
    return path


def exported(*sources: str, name: str = "m") -> str:
    """The module made of these cells."""
    return module_text(Module(name, "00_m.py", "M",
                              [("", source) for source in sources]))


def imports(source: str) -> str:
    return import_block(ast.parse(source).body)


# --- What is exported, and where to ------------------------------------------

def test_whole_module(tmp_path: Path) -> None:
    path = write(tmp_path, "01_areas.py", AREAS, "areas")
    assert tangle([path]) == {"gptoss/areas.py": AREAS_MODULE}


def test_export_to_a_named_module(tmp_path: Path) -> None:
    path = write(tmp_path, "01_two.py", '# %% tags=["export:other"]\nA = 1\n\n'
                 '# %% tags=["export"]\nB = 2\n\n'
                 '# %% tags=["hide-input", "export:other"]\nC = 3\n\n'
                 '# %% tags=["exported"]\nD = 4\n', "two")
    texts = tangle([path])
    assert list(texts) == ["gptoss/other.py", "gptoss/two.py"]
    assert "A = 1\n\n\nC = 3\n" in texts["gptoss/other.py"]
    assert "B" not in texts["gptoss/other.py"].split("__all__")[1]
    assert "A = 1" not in texts["gptoss/two.py"]
    assert not any("D = 4" in text for text in texts.values())


def test_fenced_source_of_another_language(tmp_path: Path) -> None:
    path = write(tmp_path, "01_k.py", '# %% [markdown]\n# # K\n\n'
                 '# %% [markdown] tags=["export:k.cpp"]\n# Prose.\n#\n'
                 "# ```cpp\n# # define X 1\n# int x = X;\n# ```\n")
    text = tangle([path])["gptoss/k.cpp"]
    assert text == ("// K\n// Generated from book/01_k.py; edit the chapter, "
                    "not this file.\n\n# define X 1\nint x = X;\n")


def test_a_comment_in_a_fence_is_no_heading(tmp_path: Path) -> None:
    path = write(tmp_path, "01_k.py", "# %% [markdown]\n# # K\n#\n# ## Real\n"
                 "#\n# ```python\n# # not a heading\n# ```\n\n"
                 '# %% tags=["export"]\nA = 1\n', "k")
    assert read_chapter(path)["k"].cells == [("Real", "A = 1")]


@pytest.mark.parametrize("body", [
    '# %% tags=["export"]\nx = 1\n',
    '# %% tags=["export:"]\nx = 1\n',
    '# %% tags=["export:../x"]\nx = 1\n',
    '# %% tags=["export://b"]\nx = 1\n',
    '# %% tags=["export:a/"]\nx = 1\n',
    '# %% tags=["export:x.cpp"]\nx = 1\n',
    '# %% [markdown] tags=["export:x"]\n# text\n',
])
def test_no_target(tmp_path: Path, body: str) -> None:
    path = write(tmp_path, "07_lost.py", "# %% [markdown]\n# # A\n#\n# ## B\n"
                 f"\n{body}")
    with pytest.raises(TangleError, match=r"07_lost.py, 'B'.*cannot go to"):
        read_chapter(path)


def test_two_chapters_of_one_module(tmp_path: Path) -> None:
    cell = '# %% tags=["export"]\nx = 1\n'
    paths = [write(tmp_path, name, cell, "same")
             for name in ("01_a.py", "02_b.py")]
    with pytest.raises(TangleError, match="same.*01_a.py and 02_b.py"):
        tangle(paths)


def test_syntax_error_names_chapter_and_heading(tmp_path: Path) -> None:
    path = write(tmp_path, "01_areas.py",
                 AREAS.replace("PI = math.pi", "PI = ("), "areas")
    with pytest.raises(TangleError, match="01_areas.py, 'A circle': not Py"):
        tangle([path])


def test_same_heading_is_written_once(tmp_path: Path) -> None:
    cell = '\n# %% tags=["export"]\n{} = 1\n'
    path = write(tmp_path, "01_a.py", "# %% [markdown]\n# # One\n"
                 + cell.format("A") + cell.format("B"), "a")
    assert tangle([path])["gptoss/a.py"].count("# --- One ---") == 1


# --- Imports -----------------------------------------------------------------

def test_split_imports() -> None:
    nodes, rest = split_imports(
        "import a\nfrom b import (\n    c,\n    d,\n)\n\n\nX = 1\nimport e\n"
        "def f():\n    import g\n    return g\n", "here")
    assert [ast.unparse(node) for node in nodes] == [
        "import a", "from b import c, d", "import e"]
    assert rest == "X = 1\ndef f():\n    import g\n    return g"


@pytest.mark.parametrize("source", [
    "import a; x = 1", "x = 1; import a", "x = (\n1); import a"])
def test_an_import_needs_its_own_line(source: str) -> None:
    with pytest.raises(TangleError, match="here: line 1 holds an import"):
        split_imports(source, "here")


def test_imports_hoisted_merged_grouped() -> None:
    text = exported("from b import y\nX = y", "import os\nfrom b import x, z\n"
                    "from gptoss.rope import rope\nY = x, os, rope")
    assert ("import os\n\nfrom b import x, y\n\nfrom gptoss.rope import rope"
            "\n\nX = y\n\n\nY = x, os, rope\n") in text


def test_aliases() -> None:
    assert imports("import numpy as np\nimport torch, numpy\n"
                   "from a import b as c, b, d\nfrom a import b as c") == (
        "import numpy\nimport numpy as np\nimport torch\n"
        "from a import b, d\nfrom a import b as c")


def test_future_first_relative_last() -> None:
    assert imports("from . import z\nimport os\n"
                   "from __future__ import annotations").split("\n\n") == [
        "from __future__ import annotations", "import os", "from . import z"]


def test_long_import_is_wrapped() -> None:
    names = [f"name_number_{n}" for n in range(9)]
    block = imports(f"from a import {', '.join(names)}")
    assert max(map(len, block.splitlines())) <= 79
    assert block.splitlines()[0] == "from a import ("
    assert ast.unparse(ast.parse(block)) == f"from a import {', '.join(names)}"


def test_a_long_name_of_its_own_statement_is_wrapped() -> None:
    """As in a part's __init__, where imports stand under an `if`."""
    line = ("from gptoss.weights.sizes import bytes_read_per_token as "
            "bytes_read_per_token")
    assert len(line) == 77 and imports(line) == line
    assert import_block(ast.parse(line).body, width=75) == (
        "from gptoss.weights.sizes import (\n"
        "    bytes_read_per_token as bytes_read_per_token,\n)")


LINES = st.lists(st.sampled_from([
    "import os", "import sys as system", "import numpy as np", "import torch",
    "from math import tau, e, pi", "from collections import OrderedDict, abc",
    "from gptoss.mxfp4 import decode, BLOCK, PackedMXFP4, encode, MXFP4Error",
    "from gptoss.mxfp4 import MXFP4Error as Wrong, audit, FP4_VALUES, Audit",
    "from torch import nn", "from torch.nn import functional as F, Linear",
    "import gptoss.rope", "from gptoss import config", "import torch.nn",
    "from torch import nn as _nn, Tensor as T", "import os as _os",
    "from torch import A, a1, Bb, _hidden, _UP, x2y, is_tensor",
    "from __future__ import annotations"]), min_size=1)


def bindings(source: str) -> set[tuple[str, str]]:
    return {(getattr(node, "module", ""), ast.unparse(alias))
            for node in ast.parse(source).body for alias in node.names}


@given(LINES)
@settings(deadline=None, max_examples=100)
def test_import_block_loses_nothing_and_is_stable(lines: list[str]) -> None:
    block = imports("\n".join(lines))
    assert bindings(block) == bindings("\n".join(lines))
    assert imports(block) == block
    random.Random(0).shuffle(lines)
    assert imports("\n".join(lines)) == block


@given(LINES)
@settings(deadline=None, max_examples=30)
def test_import_block_is_what_ruff_wants(lines: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=I",
         "--line-length=79", "--diff",
         "--config", 'lint.isort.known-first-party=["gptoss"]', "-"],
        input=imports("\n".join(lines)) + "\n", capture_output=True,
        text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("cells", [
    ("math = 1", "import math"),
    ("import math", "math = 1"),
    ("import math", "def math(): ..."),
    ("from a import b as f", "class f: ..."),
    ("import a.b", "for a in (): ..."),
    ("import a", "with open('x') as a: ..."),
    ("x = print", "from rich import print"),
])
def test_an_import_that_may_not_move(cells: tuple[str, ...]) -> None:
    with pytest.raises(TangleError, match="is imported and also bound"):
        exported(*cells)


def test_reading_an_imported_name_is_no_clash() -> None:
    text = exported("import math", "X: float = math.pi", "math.tau")
    assert '__all__ = [\n    "X",\n]' in text


# --- __all__ -----------------------------------------------------------------

@pytest.mark.parametrize(("source", "names"), [
    ("class A: ...\ndef b(): ...\nC = 1\nD: int = 2", "A C D b"),
    ("E, (F, *G) = 1, (2, 3)\nH = I = 4", "E F G H I"),
    ("_a = 1\ndef _b(): ...\n__version__ = '1'", ""),
    ("import os\nfrom a import b as c", ""),
    ("for x in (): y = 1\nif True: z = 1\nwith a as w: ...", ""),
    ("a.b = 1\na[i] = 2", ""),
    ("def f():\n    g = 1", "f"),
])
def test_public_names(source: str, names: str) -> None:
    assert public_names(ast.parse(source), "m") == names.split()


def test_public_names_of_the_package_itself() -> None:
    tree = ast.parse("import os\nfrom gptoss.model import GptOss as GptOss\n"
                     "from a import b\nVERSION = 1")
    assert public_names(tree, "__init__") == ["GptOss"]
    assert public_names(tree, "__main__") == []


def test_no_all_where_nothing_is_public() -> None:
    assert "__all__" not in exported("_x = 1")
    assert "__all__" not in exported("x = 1", name="__main__")


# --- The page of names -------------------------------------------------------

def test_api_page(tmp_path: Path) -> None:
    path = write(tmp_path, "01_areas.py", AREAS, "areas")
    page = api_page(list(read_chapter(path).values()))
    assert page.startswith("# Every name in the package\n")
    assert "## `gptoss/areas.py`\n\nFrom [Areas](01_areas.ipynb).\n" in page
    assert ("- [`square(side)`](01_areas.ipynb#a-square) "
            "Area of a \\*square\\*.\n") in page
    assert "- [`PI`](01_areas.ipynb#a-circle) constant `math.pi`\n" in page
    assert "_HALF" not in page and "Not for the reference" not in page


# --- Writing and checking ----------------------------------------------------

@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a project of one chapter, as working directory."""
    write(tmp_path, "01_areas.py", AREAS, "areas")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_main_writes_then_has_nothing_to_do(
        inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == ("wrote gptoss/areas.py\n"
                                       "wrote book/api.md\n")
    assert (inside / "gptoss/areas.py").read_text("utf-8") == AREAS_MODULE
    assert main([]) == main(["--check"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["gptoss/areas.py", "book/api.md"])
def test_check_shows_a_diff_and_writes_nothing(
        inside: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    capsys.readouterr()
    file = inside / name
    edited = file.read_text("utf-8") + "# by hand\n"
    file.write_text(edited, "utf-8")
    assert main(["--check"]) == 1
    out = capsys.readouterr().out
    assert f"--- {name}\n" in out and "\n-# by hand\n" in out
    assert file.read_text("utf-8") == edited
    assert main([]) == 0 and main(["--check"]) == 0


def test_check_finds_a_missing_file(inside: Path) -> None:
    assert main(["--check"]) == 1
    assert list((inside / "gptoss").iterdir()) == []


def test_given_chapters_leave_the_page_of_names_alone(inside: Path) -> None:
    assert main(["book/01_areas.py"]) == 0
    assert (inside / "gptoss/areas.py").exists()
    assert not (inside / "book/api.md").exists()


@pytest.mark.parametrize("arguments", [["book/none.py"], []])
def test_main_reports_errors_in_one_line(
        inside: Path, arguments: list[str],
        capsys: pytest.CaptureFixture[str]) -> None:
    write(inside, "02_bad.py", '# %% tags=["export"]\nx = (\n', "bad")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tangle: error: ") and error.count("\n") == 1
    assert list((inside / "gptoss").iterdir()) == []


def test_runs_without_the_package(inside: Path) -> None:
    file = Path(main.__code__.co_filename).resolve()
    copy = inside / "alone" / "tangle.py"
    copy.parent.mkdir()
    for part in ("tangle", "chapters", "api", "freeze"):
        copy.with_name(f"{part}.py").write_bytes(
            file.with_name(f"{part}.py").read_bytes())
    done = subprocess.run([sys.executable, "-S", "-c", (
        f"import sys; sys.path[:0] = [{str(copy.parent)!r}, *{sys.path!r}]; "
        "sys.modules['gptoss'] = None; import runpy; "
        f"sys.argv = ['tangle.py']; runpy.run_path({str(copy)!r}, "
        "run_name='__main__')")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (inside / "gptoss/areas.py").read_text("utf-8") == AREAS_MODULE


# --- A chapter at the top of the book ----------------------------------------

def test_a_chapter_in_no_folder_exports_to_the_top(tmp_path: Path) -> None:
    path = write(tmp_path, "page.py", AREAS, "page")
    inside = write(tmp_path, "shapes/two.py", TWO, "first")
    texts = tangle(listed(tmp_path), whole=True)
    assert list(texts)[0] == "gptoss/page.py"
    assert 'Generated from book/page.py;' in texts["gptoss/page.py"]
    assert "gptoss/shapes/__init__.py" in texts
    assert "gptoss/__init__.py" not in texts  # it belongs to no part
    assert "(page.ipynb#a-square)" in texts["book/api.md"]
    assert {path.name, inside.name} == {"page.py", "two.py"}


def test_a_chapter_in_no_folder_hands_nothing_on(tmp_path: Path) -> None:
    path = write(tmp_path, "page.py", AREAS, "page\n#     public: [circle]")
    with pytest.raises(TangleError, match="page.py: public names, and no p"):
        tangle([path])


# --- The blank page ----------------------------------------------------------

def test_blank_takes_out_what_is_exported(tmp_path: Path) -> None:
    path = write(tmp_path, "shapes/areas.py", AREAS, "areas")
    page = blank(path)
    assert "# Areas" in page and "### A circle" in page
    assert "To be written: a part of `gptoss/shapes/areas.py`." in page
    assert "def square(side: float) -> float: ...\n" in page
    assert "PI = ...\ndef circle(diameter: float) -> float: ...\n" in page
    assert "Area of" not in page and "_HALF" not in page
    assert "side * side" not in page
    assert '```python\nprint("shown", square(3))\n```' in page


def test_blank_shows_what_was_printed(tmp_path: Path) -> None:
    path = write(tmp_path, "shapes/areas.py", AREAS, "areas")
    notebook = prepared(path)
    shown = next(cell for cell in notebook.cells if "shown" in cell.source)
    shown.outputs = [nbformat.v4.new_output("stream", text="shown 9\n")]
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    assert "```text\nshown 9\n```" in blank(path)


def test_blank_takes_out_other_languages(tmp_path: Path) -> None:
    path = write(tmp_path, "k/k.py", '# %% [markdown]\n# # K\n\n'
                 '# %% [markdown] tags=["export:k.h"]\n# Before.\n#\n'
                 "# ```cpp\n# int x = 1;\n# ```\n# After.\n")
    page = blank(path)
    assert "Before." in page and "After." in page and "int x" not in page
    assert "To be written: a part of `gptoss/k/k.h`." in page


def test_first_lines() -> None:
    assert first_lines(
        "@dataclass\nclass A(B):\n    x: int = 3\n    _y: int = 4\n\n"
        "    def __len__(self): return 1\n    def _p(self): pass\n"
        "    @property\n    def q(self) -> int:\n        'Doc.'\n"
        "        return 2\n"
        "def _h(): pass\nC, D = 1, 2\nimport os\nf(C)") == (
        "@dataclass\nclass A(B):\n    x: int = 3\n"
        "    def __len__(self): ...\n    @property\n"
        "    def q(self) -> int: ...\nC, D = ...")


def test_every_chapter_can_be_blanked() -> None:
    """No line of what is exported is left, but those of the first lines."""
    path = ROOT / "book" / "attention" / "sinks.py"
    page = blank(path)
    cells = [cell for module in read_chapter(path).values()
             for cell in module.cells]
    assert cells and not [source for _, source in cells if source in page]
    assert "def softmax_with_sink(" in page
    done = subprocess.run(
        [sys.executable, "book/_ext/blank.py", "book/attention/sinks.py"],
        cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (page, "")


# --- Freezing ----------------------------------------------------------------

TINY = '''\
# %% [markdown]
# # Tiny

# %%
import os
import sys

for n in range(3):
    print(n, flush=True)
os.getcwd().endswith("book"), os.environ["PYTHONHASHSEED"]

# %% tags=["skip-execution", "nbval-skip"]
raise RuntimeError("not here")

# %%
{last}
'''


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chapter that has been frozen once."""
    path = write(tmp_path_factory.mktemp("frozen"), "01_tiny.py",
                 TINY.format(last="'end'"))
    assert freeze(path) == path.with_suffix(".ipynb")
    return path


@pytest.fixture
def copied(frozen: Path, tmp_path: Path) -> Path:
    """The same, for the test to spoil."""
    path = tmp_path / frozen.name
    for suffix in (".py", ".ipynb"):
        path.with_suffix(suffix).write_bytes(
            frozen.with_suffix(suffix).read_bytes())
    assert stale(path) == ""
    return path


def test_prepared_ids_and_no_outputs(frozen: Path) -> None:
    cells = prepared(frozen).cells
    assert [cell.id for cell in cells] == [
        f"01-tiny-{n}" for n in range(len(cells))]
    assert not any(cell.get("outputs") for cell in cells)


def test_frozen_notebook(frozen: Path) -> None:
    notebook = nbformat.read(frozen.with_suffix(".ipynb"), 4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert [cell.get("execution_count") for cell in cells] == [
        None, 1, None, 2]
    assert cells[1].outputs[0] == {
        "output_type": "stream", "name": "stdout", "text": "0\n1\n2\n"}
    assert cells[1].outputs[1].data["text/plain"] == "(True, '0')"
    assert cells[2].outputs == []
    assert not any("execution" in cell.metadata for cell in cells)
    assert notebook.metadata.language_info == {"name": "python"}


def test_freezing_again_gives_the_same_bytes(
        frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = frozen.with_suffix(".ipynb").read_bytes()
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert freeze(frozen).read_bytes() == before


def spoil(path: Path, change) -> str:
    """What `stale` says after `change(notebook)`."""
    file = path.with_suffix(".ipynb")
    notebook = nbformat.read(file, 4)
    change(notebook)
    nbformat.write(notebook, file)
    return stale(path)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("source", "'END'", "cell 01-tiny-3: source differs"),
    ("id", "other", "cell 01-tiny-3: id differs"),
    ("execution_count", None, "cell 01-tiny-3: never executed"),
    ("outputs", [nbformat.v4.new_output("stream", name="stderr", text="!")],
     "cell 01-tiny-3: holds an error or wrote to stderr"),
    ("outputs", [nbformat.v4.new_output("error", ename="E", evalue="")],
     "cell 01-tiny-3: holds an error or wrote to stderr"),
])
def test_stale_finds(copied: Path, key: str, value, said: str) -> None:
    def change(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[3][key] = value

    assert spoil(copied, change).startswith(f"01_tiny.ipynb: {said}")


def test_stale_finds_other_tags(copied: Path) -> None:
    def change(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[3].metadata["tags"] = ["hide-cell"]

    assert "cell 01-tiny-3: tags differ" in spoil(copied, change)


def test_stale_finds_another_kind_of_cell(copied: Path) -> None:
    def change(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[0] = nbformat.v4.new_code_cell(
            notebook.cells[0].source, id="01-tiny-0")

    assert "cell 01-tiny-0: cell_type differs" in spoil(copied, change)


def test_stale_finds_a_cell_too_many(copied: Path) -> None:
    said = spoil(copied, lambda notebook: notebook.cells.append(
        nbformat.v4.new_code_cell("1", id="more")))
    assert said == "01_tiny.ipynb: 5 cells, the chapter has 4"


def test_stale_finds_an_edited_chapter(copied: Path) -> None:
    text = copied.read_text("utf-8")
    copied.write_text(text.replace("# # Tiny", "# # Small"), "utf-8")
    assert "cell 01-tiny-0: source differs" in stale(copied)


def test_stale_finds_a_missing_notebook(copied: Path) -> None:
    copied.with_suffix(".ipynb").unlink()
    assert "01_tiny.ipynb: no such file" in stale(copied)


@pytest.mark.parametrize("tag", ["skip-execution", "nbval-skip"])
def test_one_of_the_two_tags_is_not_enough(copied: Path, tag: str) -> None:
    text = copied.read_text("utf-8")
    copied.write_text(text.replace('["skip-execution", "nbval-skip"]',
                                   f'["{tag}"]'), "utf-8")

    def change(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[2].metadata["tags"] = [tag]

    assert "cell 01-tiny-2: never executed" in spoil(copied, change)


def test_run_freeze_skips_what_is_fresh(
        copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied.with_suffix(".ipynb")
    os.utime(file, (1, 1))
    assert run_freeze([copied]) == run_freeze([copied], check=True) == 0
    assert (file.stat().st_mtime, capsys.readouterr().out) == (1, "")
    file.unlink()
    assert run_freeze([copied], check=True) == 1
    assert "01_tiny.ipynb: no such file" in capsys.readouterr().out
    assert not file.exists()


def test_a_failing_chapter_writes_nothing_and_stops_nobody(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path, "01_bad.py", TINY.format(last="1 / 0"))
    good = write(tmp_path, "02_good.py", "# %% [markdown]\n# # Good\n")
    assert run_freeze([bad, good], jobs=2) == 1
    out, error = capsys.readouterr()
    assert out == "froze 02_good.ipynb\n"
    assert error.startswith("01_bad.py: ") and "ZeroDivisionError" in error
    assert not bad.with_suffix(".ipynb").exists()


# --- Folders, several modules a chapter --------------------------------------

TWO = """\
# %% [markdown]
# # Two

# %% tags=["export"]
import math
import os


def half(x: float) -> float:
    return x / 2

# %% tags=["export:second"]
def quarter(x: float) -> float:
    other = [half for half in (x,)]
    return half(half(math.fabs(x))) or other

# %% tags=["export:/front"]
HERE = os.sep
"""


def test_a_folder_of_the_book_is_one_of_the_package(tmp_path: Path) -> None:
    path = write(tmp_path, "shapes/two.py", TWO, "first")
    texts = tangle([path])
    assert list(texts) == ["gptoss/shapes/first.py",
                           "gptoss/shapes/second.py", "gptoss/front.py"]
    first, second, front = texts.values()
    assert "import math" not in first and "import os" not in first
    assert "import math\n\nfrom gptoss.shapes.first import half\n" in second
    assert "import os" not in second and "\nimport os\n\n" in front
    assert "Generated from book/shapes/two.py;" in front


def test_only_what_is_read_is_imported(tmp_path: Path) -> None:
    """A local variable with the name of a sibling's function is none."""
    path = write(tmp_path, "a/two.py", TWO.replace(
        "return half(half(math.fabs(x))) or other", "return other"), "first")
    assert "import" not in tangle([path])["gptoss/a/second.py"].split(
        "---")[0].replace("edit the chapter", "")


@pytest.mark.parametrize(("old", "new", "said"), [
    ("half", "_half", "'_half' of a/first is used in a/second: no under"),
    ("HERE", "half", "'half' is bound in front and in a/first"),
    ("HERE", "math", "'math' is imported and also bound"),
])
def test_what_two_modules_may_not_share(tmp_path: Path, old: str, new: str,
                                        said: str) -> None:
    path = write(tmp_path, "a/two.py", TWO.replace(old, new), "first")
    with pytest.raises(TangleError, match=said):
        tangle([path])


def test_the_same_statement_may_stand_in_both(tmp_path: Path) -> None:
    log = 'import logging\n_log = logging.getLogger("x")\n'
    path = write(tmp_path, "a/two.py", f'# %% tags=["export:b"]\n{log}\n'
                 f'# %% tags=["export:c"]\n{log}')
    for text in tangle([path]).values():
        assert text.count("_log = ") == text.count("import logging") == 1


def test_a_part_hands_on_what_its_chapters_say(tmp_path: Path) -> None:
    write(tmp_path, "shapes/two.py", TWO, "first\n#     public: [quarter]")
    texts = tangle(listed(tmp_path), whole=True)
    assert list(texts)[-2:] == ["gptoss/shapes/__init__.py", "book/api.md"]
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "gptoss" / "__init__.py").write_text("")
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "import gptoss.shapes as s\n"
            "assert 'gptoss.shapes.second' not in sys.modules\n"
            "print(s.quarter(0.0), s.first.half(2), s.__all__)\n"
            "try: s.half\nexcept AttributeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "[0.0] 1.0 ['quarter']",
        "module 'gptoss.shapes' has no attribute 'half'"], done.stderr


@pytest.mark.parametrize(("public", "said"), [
    ("third", "two.py: public name 'third' is bound in none"),
    ("second", "two.py: public name 'second' is a module's too"),
])
def test_a_part_cannot_hand_on(tmp_path: Path, public: str,
                               said: str) -> None:
    path = write(tmp_path, "a/two.py", TWO, f"first\n#     public: [{public}]")
    modules = [module for module in read_chapter(path).values()
               if module.name != "front"]
    with pytest.raises(TangleError, match=said):
        part_text("a", modules)


def test_what_no_chapter_makes_is_removed(
        inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    old = inside / "gptoss" / "shapes" / "old.py"
    old.parent.mkdir()
    old.write_text('"""Old\n\nGenerated from book/old.py; edit ..."""\n')
    ours = old.with_name("hand.py")
    ours.write_text('"""By hand."""\n')
    assert left_behind(tangle(listed(inside), True), inside) == [
        "gptoss/shapes/old.py"]
    capsys.readouterr()
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == (
        "no chapter makes gptoss/shapes/old.py\n")
    assert main(["book/01_areas.py"]) == 0 and old.exists()
    assert main([]) == 0 and not old.exists() and ours.exists()
    assert main(["--check"]) == 0
