"""Edge cases of tangling and freezing, beside `test_tangle.py`."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.tangle import (
    Module,
    TangleError,
    freeze,
    import_block,
    main,
    module_text,
    prepared,
    read_chapter,
    run_freeze,
    split_imports,
    stale,
    tangle,
)

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
    """Area of a square."""
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


# %% tags=["export"]
UNIT = circle(1)
'''
AREAS_MODULE = '''\
"""Areas

Generated from book/01_areas.py; edit the chapter, not this file.
"""

import math

# --- A square ----------------------------------------------------------------

def square(side: float) -> float:
    """Area of a square."""
    return side * side


# --- A circle ----------------------------------------------------------------

_HALF = 0.5
PI = math.pi


def circle(diameter: float) -> float:
    """Area of a circle."""
    return PI * square(_HALF * diameter)


UNIT = circle(1)


__all__ = [
    "PI",
    "UNIT",
    "circle",
    "square",
]
'''


def write(root: Path, name: str, body: str, module: str = "") -> Path:
    """A chapter in root/book, with the folders that tangling needs."""
    for folder in ("book", "gptoss"):
        (root / folder).mkdir(exist_ok=True)
    front = f"#   gptoss:\n#     module: {module}\n" if module else ""
    path = root / "book" / name
    path.write_text(HEADER.format(module=front) + body, "utf-8")
    return path


def exported(*sources: str, name: str = "m") -> str:
    """The module made of these cells."""
    return module_text(Module(name, "00_m.py", "M",
                              [("H", source) for source in sources]))


def imports(source: str) -> str:
    return import_block(ast.parse(source).body)


# --- What is exported --------------------------------------------------------

def test_the_whole_text_of_a_module(tmp_path: Path) -> None:
    path = write(tmp_path, "01_areas.py", AREAS, "areas")
    assert tangle([path]) == {"gptoss/areas.py": AREAS_MODULE}


def test_other_tags_beside_export(tmp_path: Path) -> None:
    path = write(tmp_path, "01_two.py", '# %% tags=["export:other"]\nA = 1\n\n'
                 '# %% tags=["hide-input", "export:other"]\nC = 3\n\n'
                 '# %% tags=["exported"]\nD = 4\n')
    texts = tangle([path])
    assert list(texts) == ["gptoss/other.py"]
    assert "A = 1\n\n\nC = 3\n\n\n__all__" in texts["gptoss/other.py"]


def test_fences_hold_no_headings(tmp_path: Path) -> None:
    path = write(tmp_path, "01_k.py", "# %% [markdown]\n# # K\n#\n# ## Real\n"
                 "#\n# ```python\n# # not a heading\n# ```\n\n"
                 '# %% tags=["export:k"]\nA = 1\n\n'
                 '# %% [markdown] tags=["export:k.cpp"]\n# Prose.\n#\n'
                 "# ```cpp\n# # define X 1\n# int x = X;\n# ```\n")
    assert read_chapter(path)["k"].cells == [("Real", "A = 1")]
    text = tangle([path])["gptoss/k.cpp"]
    assert text == ("// K\n// Generated from book/01_k.py; edit the chapter, "
                    "not this file.\n\n# define X 1\nint x = X;\n")


@pytest.mark.parametrize("body", [
    '# %% tags=["export"]\nx = 1\n',
    '# %% tags=["export:"]\nx = 1\n',
    '# %% tags=["export:a/b"]\nx = 1\n',
    '# %% [markdown] tags=["export:x"]\n# text\n',
])
def test_no_target_names_the_section(tmp_path: Path, body: str) -> None:
    path = write(tmp_path, "07_lost.py", "# %% [markdown]\n# # A\n#\n# ## B\n"
                 f"\n{body}")
    with pytest.raises(TangleError, match=r"07_lost.py, 'B'.*cannot go to"):
        read_chapter(path)


def test_syntax_error_names_chapter_and_section(tmp_path: Path) -> None:
    path = write(tmp_path, "01_areas.py",
                 AREAS.replace("PI = math.pi", "PI = ("), "areas")
    with pytest.raises(TangleError, match="01_areas.py, 'A circle': not Py"):
        tangle([path])


# --- Imports -----------------------------------------------------------------

@pytest.mark.parametrize("source", [
    "import a; x = 1", "x = 1; import a", "x = (\n1); import a"])
def test_an_import_needs_its_own_line(source: str) -> None:
    with pytest.raises(TangleError, match="here: line 1 holds an import"):
        split_imports(source, "here")


def test_aliases() -> None:
    """As ruff orders them: by the first member, unchanged names first."""
    assert imports("import numpy as np\nimport torch, numpy\n"
                   "from a import b as c, b, d, X as y\nfrom a import b as c"
                   ) == ("import numpy\nimport numpy as np\nimport torch\n"
                         "from a import X as y\nfrom a import b, d\n"
                         "from a import b as c")


def test_future_first_relative_last() -> None:
    assert imports("from . import z\nimport os\nfrom b import c\n"
                   "from __future__ import annotations").split("\n\n") == [
        "from __future__ import annotations", "import os", "from b import c",
        "from . import z"]


LINES = st.lists(st.sampled_from([
    "import os", "import sys as system", "import numpy as np", "import torch",
    "from math import tau, e, pi", "from collections import OrderedDict, abc",
    "from gptoss.mxfp4 import decode, BLOCK, PackedMXFP4, encode, MXFP4Error",
    "from gptoss.mxfp4 import MXFP4Error as Wrong, audit, FP4_VALUES, Audit",
    "from torch.nn import functional as F, Linear", "import gptoss.rope",
    "from __future__ import annotations"]), min_size=1)


@given(LINES, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_order_of_imports_does_not_matter(lines: list[str], rng) -> None:
    block = imports("\n".join(lines))
    assert imports(block) == block
    assert max(map(len, block.split("\n"))) <= 79
    rng.shuffle(lines)
    assert imports("\n".join(lines)) == block


@pytest.mark.parametrize("cells", [
    ("import math", "def math(): ..."),
    ("from a import b as f", "class f: ..."),
    ("import a.b", "for a in (): ..."),
    ("import a", "with open('x') as a: ..."),
])
def test_an_import_that_may_not_move(cells: tuple[str, ...]) -> None:
    with pytest.raises(TangleError, match="is imported and also bound"):
        exported(*cells)


def test_reading_an_imported_name_is_no_clash() -> None:
    text = exported("import math", "X: float = math.pi", "math.tau")
    assert '__all__ = [\n    "X",\n]' in text
    assert "__all__" not in exported("import math", "_x = math.pi")
    assert "__all__" not in exported("x = 1", name="__main__")


# --- Writing and checking ----------------------------------------------------

@pytest.mark.parametrize("name", ["gptoss/areas.py", "book/api.md"])
def test_check_covers_modules_and_reference(
        tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "01_areas.py", AREAS, "areas")
    monkeypatch.chdir(tmp_path)
    assert main([]) == main(["--check"]) == 0
    capsys.readouterr()
    file = tmp_path / name
    edited = file.read_text("utf-8") + "# by hand\n"
    file.write_text(edited, "utf-8")
    assert main(["--check"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"--- {name}\n") and "\n-# by hand\n" in out
    assert file.read_text("utf-8") == edited
    assert main([]) == main(["--check"]) == 0


def test_a_missing_chapter_is_one_line(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.py")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tangle: error: ") and error.count("\n") == 1


# --- Freezing ----------------------------------------------------------------

TINY = '''\
# %% [markdown]
# # Tiny

# %%
import os

for n in range(3):
    print(n, flush=True)
os.getcwd().endswith("book"), os.environ["PYTHONHASHSEED"]

# %% tags=["skip-execution", "nbval-skip"]
raise RuntimeError("not here")

# %%
"end"
'''


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("frozen"), "01_tiny.py", TINY)
    assert freeze(path) == path.with_suffix(".ipynb")
    return path


@pytest.fixture
def copied(frozen: Path, tmp_path: Path) -> Path:
    """A frozen chapter for the test to spoil."""
    path = tmp_path / frozen.name
    for suffix in (".py", ".ipynb"):
        path.with_suffix(suffix).write_bytes(
            frozen.with_suffix(suffix).read_bytes())
    assert stale(path) == ""
    return path


def test_frozen_notebook(frozen: Path) -> None:
    assert not any(cell.get("outputs") for cell in prepared(frozen).cells)
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


def test_the_environment_does_not_reach_the_bytes(
        frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = frozen.with_suffix(".ipynb").read_bytes()
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert freeze(frozen).read_bytes() == before


def test_stale_finds_another_kind_of_cell(copied: Path) -> None:
    file = copied.with_suffix(".ipynb")
    notebook = nbformat.read(file, 4)
    notebook.cells[0] = nbformat.v4.new_code_cell(
        notebook.cells[0].source, id="01-tiny-0")
    nbformat.write(notebook, file)
    assert "cell 01-tiny-0: cell_type differs" in stale(copied)


def test_stale_finds_edited_prose(copied: Path) -> None:
    text = copied.read_text("utf-8")
    copied.write_text(text.replace("# # Tiny", "# # Small"), "utf-8")
    assert "cell 01-tiny-0: source differs" in stale(copied)


def test_what_is_fresh_is_not_written_again(
        copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied.with_suffix(".ipynb")
    os.utime(file, (1, 1))
    assert run_freeze([copied]) == run_freeze([copied], check=True) == 0
    assert (file.stat().st_mtime, capsys.readouterr().out) == (1, "")
    file.unlink()
    assert run_freeze([copied], check=True) == 1
    assert "01_tiny.ipynb: no such file" in capsys.readouterr().out
    assert not file.exists()
