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
#     module: freeze
#     folder: book/_ext
# ---

# %% [markdown]
# # What is on the page was run
#
# ## Question
#
# How do we know that a number on a page is what its cell prints, today and on
# every machine? nbval, which runs every cell again and compares, does not tell
# by itself: a notebook whose every run prints something else passes it with 0
# failures, as long as nobody stored a first run.
#
# This appendix goes on from [the one before](tangle.ipynb): it writes the
# modules, makes the page of all names, executes chapters, and stores them so
# that a second run gives the same bytes. The sample is the same, two areas.

# %%
import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, "../_ext")

SAMPLE = '''\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: areas
# ---

# %% [markdown]
# # Areas
#
# ## Code
#
# ### A square

# %% tags=["export"]
def square(side: float) -> float:
    """Area of a square, in the unit of `side`, squared."""
    return side * side


# %%
square(3)

# %% [markdown]
# ### A circle

# %% tags=["export"]
import math

_HALF = 0.5
PI = math.pi


def circle(diameter: float) -> float:
    """Area of a circle."""
    return PI * square(_HALF * diameter)


# %%
print(f"{circle(2):.2f}")
'''
folder = tempfile.TemporaryDirectory()
root = Path(folder.name)
(root / "book" / "shapes").mkdir(parents=True)
_ = (root / "_toc.yml").write_text("- file: book/shapes/areas\n", "utf-8")
chapter = root / "book" / "shapes" / "areas.py"
_ = chapter.write_text(SAMPLE, "utf-8")

# %% [markdown]
# ## The naive version
#
# Convert the chapter and trust nbval with the outputs. Two notebooks with the
# same cell, which gives another number in every run; one was executed before
# it was stored, one was not:

# %%
import nbformat
from nbformat import v4

DRAW = "import random; random.SystemRandom().random()"
drawn = v4.new_output("execute_result", {"text/plain": "0.5"},
                      execution_count=1)
for name, count, outputs in (("executed", 1, [drawn]), ("not", None, [])):
    cell = v4.new_code_cell(DRAW, outputs=outputs, id="draw",
                            execution_count=count)
    nbformat.write(v4.new_notebook(cells=[cell]), root / f"{name}.ipynb")


PLAIN = {key: value for key, value in os.environ.items()
         if "COLOR" not in key}


def nbval(*names: str) -> list[str]:
    """Notebook, cell and verdict, from a run of nbval in `root`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider",
         "--nbval", "--nbval-kernel-name", "python3", *names],
        cwd=root, capture_output=True, text=True, env=PLAIN)
    return [line.split(" [")[0].strip() for line in done.stdout.splitlines()
            if "::" in line and "%]" in line]


print(*nbval("executed.ipynb", "not.ipynb"), sep="\n")

# %% [markdown]
# ## Code
#
# ### A page for every name
#
# The reference of the whole package needs no second source: name, arguments
# and the docstring's first paragraph, linked to the section that derives it.
# A character that Markdown would take for markup is escaped, unless it stands
# between backticks.

# %% tags=["export:api"]
import ast
import re

from chapters import Module, bound_names, public_names


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
    names = [name for name in bound_names(node) if not name.startswith("_")]
    value = ast.unparse(node.value) if getattr(node, "value", None) else ""
    shown = f" `{value}`" if len(names) == 1 and 0 < len(value) <= 40 else ""
    return [f"- [`{name}`]({link}) constant{shown}" for name in names]


# %% tags=["export:api"]
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


# %%
from chapters import read_chapter

areas = read_chapter(chapter)["shapes/areas"]
print(api_page([areas]).split("\n\n", 2)[2])

# %% [markdown]
# ### Writing and checking
#
# The order of the chapters is that of the table of contents. What a part of
# the book hands on, its front matters say (`public`), and its `__init__.py`
# loads it when it is first asked for. A file that says it was generated, and
# that no chapter makes any more, is removed: left behind, it would be imported
# unnoticed.

# %% tags=["export:tangle"]
import argparse
import ast
import difflib
import sys
from pathlib import Path
from textwrap import indent

from chapters import (
    OWN,
    Module,
    TangleError,
    import_block,
    module_text,
    public_names,
    read_chapter,
)


def listed(root: Path) -> list[Path]:
    """The chapters that _toc.yml names, in its order."""
    contents = root / "_toc.yml"
    names = re.findall(r"file: (book/\S+)", contents.read_text("utf-8"))
    return [path for path in (root / f"{name}.py" for name in names)
            if path.exists()]


# %% tags=["export:tangle"]
_PART = '''\
"""Part {part} of the book: {count} names, loaded when first asked for

Generated from the front matter of book/{part}/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
{typed}

_HOME = {{
{home}
}}
_MODULES = {modules}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{{__name__}}.{{_HOME[name]}}"), name)
    if name in _MODULES:
        return import_module(f"{{__name__}}.{{name}}")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
{names}
]
'''


def part_text(part: str, modules: list[Module]) -> str:
    """The __init__.py of a part that consists of `modules`.

    Raises TangleError for a public name that no module of its chapter binds.
    """
    homes, stems = {}, [module.name.rpartition("/")[2] for module in modules]
    for module in modules:
        tree = ast.parse(module_text(module))
        for name in public_names(tree, module.name):
            if name in module.public:
                homes[name] = module.name.rpartition("/")[2]
    asked = {name: module.chapter for module in modules
             for name in module.public}
    for name, chapter in asked.items():
        if name not in homes or name in stems:
            raise TangleError(f"{chapter}: public name {name!r} is "
                              + ("a module's too" if name in stems else
                                 "bound in none of its modules"))
    names = sorted(homes)
    typed = import_block([ast.ImportFrom(
        f"{OWN}.{part}.{homes[name]}", [ast.alias(name, name)], 0)
        for name in names], width=75)  # they stand under an `if`
    return _PART.format(
        part=part, count=len(names), typed=indent(typed or "pass", "    "),
        home="\n".join(f'    "{name}": "{homes[name]}",' for name in names),
        modules="(" + "".join(f'\n    "{stem}",' for stem in stems) + "\n)",
        names="\n".join(f'    "{name}",' for name in names))


# %% tags=["export:tangle"]
def tangle(chapters: list[Path], whole: bool = False) -> dict[str, str]:
    """Path from the project's root -> text, for all exports of `chapters`.

    With `whole`, the parts' __init__.py and the reference page of all these
    chapters are among them.
    Raises TangleError if two chapters export to the same module, or for
    public names of a chapter that lies in no folder.
    """
    modules: dict[str, Module] = {}
    for chapter in chapters:
        for module in read_chapter(chapter).values():
            if module.file in modules:
                raise TangleError(f"module {module.name}: exported by both "
                                  f"{modules[module.file].chapter} and "
                                  f"{module.chapter}")
            if module.public and "/" not in module.chapter:
                raise TangleError(f"{module.chapter}: public names, and no "
                                  "part of the book to hand them on")
            modules[module.file] = module
    texts = {file: module_text(module) for file, module in modules.items()}
    if whole:
        parts: dict[str, list[Module]] = {}
        for module in modules.values():
            if (module.folder == OWN and "/" in module.name
                    and "." not in module.name):
                parts.setdefault(module.name.rpartition("/")[0],
                                 []).append(module)
        for part, members in parts.items():
            texts.setdefault(f"{OWN}/{part}/__init__.py",
                             part_text(part, members))
        texts["book/api.md"] = api_page(list(modules.values()))
    return texts


def left_behind(texts: dict[str, str], root: Path) -> list[str]:
    """Generated files of the package that no chapter makes any more."""
    there = (path for path in (root / OWN).rglob("*")
             if path.suffix in (".py", ".pyi", ".h", ".cpp"))
    return sorted(name for name, path in (
        (path.relative_to(root).as_posix(), path) for path in there)
        if name not in texts
        and "Generated from " in path.read_text("utf-8")[:400])


# %% tags=["export:tangle"]
def run_tangle(texts: dict[str, str], root: Path, check: bool,
               whole: bool = False) -> int:
    """Write what differs, or with `check` print a diff; the exit code.

    With `whole`, `texts` is all there should be: other generated files are
    removed, or with `check` reported.
    """
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
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
            print(f"wrote {name}")
    for name in left_behind(texts, root) if whole else ():
        print(f"{'no chapter makes' if check else 'removed'} {name}")
        if check:
            code = 1
        else:
            (root / name).unlink()
    return code


# %%
from tangle import run_tangle, tangle

texts = tangle([chapter], whole=True)
print("exit", run_tangle(texts, root, check=False, whole=True))
module = root / "gptoss" / "shapes" / "areas.py"
edited = module.read_text("utf-8").replace("side * side", "side ** 2")
_ = module.write_text(edited, "utf-8")
print("exit", run_tangle(texts, root, check=True, whole=True))
_ = module.with_name("old.py").write_text('"""Generated from book/x.py"""\n')
print("exit", run_tangle(texts, root, check=False, whole=True))

# %% [markdown]
# An edit in the module is found, and it is undone by tangling again; the
# place for it is the chapter.
#
# ### Freezing
#
# A notebook stores more than its sources and outputs: random cell ids, times,
# the version of the interpreter, and one printed text in as many pieces as
# the kernel happened to send. All of this would differ in every run. Freezing
# removes or fixes it, so that the same chapter gives the same bytes.

# %% tags=["export"]
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from traitlets.config import Config

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


def _talks_by(folder: str) -> dict[str, str]:
    """How a kernel listens: at sockets in a folder of its own, if it can.

    A TCP port is found free and only then taken; of two kernels that start
    in the same moment, one may find its port gone and never answer.
    """
    return ({"transport": "ipc", "ip": f"{folder}/kernel"}
            if os.name == "posix" else {})


def freeze(path: Path) -> Path:
    """Execute a chapter in its own folder; store it beside itself.

    Raises nbclient.exceptions.CellExecutionError for a cell that fails, and
    writes nothing then.
    """
    from nbclient import NotebookClient

    notebook = prepared(path)
    watch = next(filter(Path.exists, (
        up / "_ext" / "kernel.py" for up in path.absolute().parents)), None)
    with TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook, timeout=600, record_timing=False, coalesce_streams=True,
            kernel_name="python3", extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": path.parent}},
            config=Config(KernelManager=_talks_by(sockets)))
        client.execute(env=os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0",
            "GPTOSS_KERNELS": "torch",  # who wants kernels asks for them
            } | ({"PYTHONSTARTUP": str(watch)} if watch else {}))
    notebook.metadata["language_info"] = {"name": "python"}
    target = path.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


# %%
first = freeze(chapter).read_bytes()
assert freeze(chapter).read_bytes() == first
for cell in nbformat.read(root / "book" / "shapes/areas.ipynb", 4).cells:
    if cell.get("outputs"):
        print(cell.id, cell.execution_count, cell.outputs[0].output_type)

# %% [markdown]
# **Pictures.** The bytes of an image differ between machines, so nbval leaves
# them out, and a frozen figure could go stale unnoticed. What nbval does
# compare is the text beside the image: the figure's repr, which names a size
# and nothing else. So a kernel that freezes or checks a chapter first runs
# `_ext/kernel.py` (by way of `PYTHONSTARTUP`), and there the repr of a figure
# tells what it shows: labels, colours, and of every array the means of up to
# 24 stretches, as shares of the frame.

# %%
import runpy

import matplotlib.pyplot as plt
import numpy as np

figures = runpy.run_path("../_ext/figures.py")
heights = np.array([1.0, 2.0, 3.0])


def chart(heights: np.ndarray) -> str:
    """What a small bar chart says of itself."""
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.bar(range(3), heights, color="#0072B2")
    axis.set(title="three bars", ylim=(0, 4))
    plt.close(figure)
    return figures["drawn"](figure)


print(chart(heights))

# %% [markdown]
# `book/conftest.py` lets nbval compare two such texts number by number: words
# and colours must be equal, and nothing may have moved by more than 0.002 of
# the frame. Rounding differs between processors by a millionth or so, and
# passes; a changed datum does not. A figure of rounding errors themselves
# asks for a coarser comparison in its cell, `fig.tolerance = 0.05`.

# %%
other = heights + [0, 0, 0.1]
for name, drawn in (("a millionth higher", heights * (1 + 1e-6)),
                    ("one bar longer", other)):
    alike = figures["same"](chart(heights), chart(drawn))
    print(f"{name}: {'the same' if alike else 'another'} figure")
assert not figures["same"](chart(heights), chart(other))

# %% [markdown]
# The next check runs nothing. It compares sources, kinds, tags and ids, and
# asks that every cell was executed, without an error and with nothing on
# stderr.

# %% tags=["export"]
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


# %%
print(repr(stale(chapter)))
frozen = root / "book" / "shapes/areas.ipynb"
notebook = nbformat.read(frozen, 4)
notebook.cells[2].execution_count = None
nbformat.write(notebook, frozen)
print(stale(chapter))
chapter.write_text(SAMPLE.replace("square(3)", "square(4)"), "utf-8")
print(stale(chapter))

# %% [markdown]
# ### One command

# %% tags=["export"]
import sys
from concurrent.futures import ThreadPoolExecutor


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


# %% tags=["export:tangle"]
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
    try:
        chapters = options.chapters or listed(Path())
        if options.freeze:
            return run_freeze(chapters, options.check, options.force,
                              options.jobs)
        whole = not options.chapters
        return run_tangle(tangle(chapters, whole), Path(), options.check,
                          whole)
    except (TangleError, OSError) as error:
        print(f"tangle: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__" and Path(sys.argv[0]).stem == "tangle":
    raise SystemExit(main())

# %% [markdown]
# The last condition keeps the notebook from running the program: a notebook
# is `__main__` too. The files of `book/_ext` need nothing of the package,
# so `python book/_ext/tangle.py` works when every module of it is broken. That
# is how the Makefile calls it, and how these two appendices, which are tangled
# by their own output, get out of a hole.

# %%
print("exit", run_freeze([chapter]))
print("exit", run_freeze([chapter], check=True))
print("exit", run_freeze([chapter]), "(nothing was left to do)")

# %% [markdown]
# ### The blank page
#
# Does a chapter explain its code, or does it only show it? Take the exported
# cells out and give the rest to somebody who has not read them. Whoever can
# write the module from that, so that its tests pass, had every rule told. In
# place of a cell stand the file it went to and the first lines of what it
# defines, because a test calls things by their names:
#
#     python book/_ext/blank.py book/attention/sinks.py > sinks.md

# %% tags=["export:blank"]
import ast
import re
import sys
from pathlib import Path

import jupytext
import nbformat

from chapters import FENCE, bound_names, read_chapter

_PAGE = "{prose}\n\n```{kind}\n{text}\n```"


def first_lines(source: str) -> str:
    """What a cell defines: functions and classes without their bodies, and
    the names of its constants; nothing that begins with an underscore."""
    found = []
    for node in ast.parse(source).body:
        names = [name for name in bound_names(node)
                 if not name.startswith("_")]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and names:
            found.append(_without_body(node, ""))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and names:
            found.append(f"{', '.join(names)} = ...")
    return "\n".join(found)


def _without_body(node: ast.stmt, indent: str) -> str:
    """A class keeps its fields and the heads of its methods."""
    if isinstance(node, ast.AnnAssign):
        return indent + ast.unparse(node)
    inner = [part for part in node.body if isinstance(node, ast.ClassDef)
             and isinstance(part, ast.FunctionDef | ast.AnnAssign)
             and not re.match("_(?!_)", bound_names(part)[0])]
    bare = type(node)(**{**vars(node), "body": [ast.Expr(ast.Constant(...))]})
    head = indent + ast.unparse(bare).replace("\n    ...", "").replace(
        "\n", f"\n{indent}")
    if not inner:
        return f"{head} ..."
    return "\n".join([head, *(_without_body(part, indent + "    ")
                              for part in inner)])


# %% tags=["export:blank"]
def _printed(cell: nbformat.NotebookNode) -> str:
    """The text under a cell; a figure says its own text in the source."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        shown = "" if "image/png" in data else data.get("text/plain", "")
        texts.append(output.get("text", "") or shown)
    return "\n".join(text.rstrip("\n") for text in texts if text)


def blank(path: Path) -> str:
    """A chapter as Markdown, without its exported cells.

    The other cells are shown, each with what it printed when the notebook
    beside the chapter was frozen, if there is one.
    """
    files = {source: module.file for module in read_chapter(path).values()
             for _, source in module.cells}
    frozen, printed = path.with_suffix(".ipynb"), {}
    if frozen.exists():
        printed = {cell.source: _printed(cell)
                   for cell in nbformat.read(frozen, 4).cells}
    page = []
    for cell in jupytext.read(path).cells:
        source, prose = cell.source, cell.cell_type == "markdown"
        code = "\n\n".join(FENCE.findall(source)) if prose else source
        out = any(tag.split(":")[0] == "export"
                  for tag in cell.metadata.get("tags", []))
        if out:
            text = "" if prose else first_lines(source)
            if prose:
                page.append(FENCE.sub("", source).strip())
            note = f"To be written: a part of `{files[code]}`."
            page.append(_PAGE.format(prose=note, kind="python", text=text)
                        if text else note)
        elif prose:
            page.append(source)
        else:
            page.append(f"```python\n{source}\n```")
            if printed.get(source):
                page.append(f"```text\n{printed[source]}\n```")
    return "\n\n".join(text for text in page if text) + "\n"


if __name__ == "__main__" and Path(sys.argv[0]).stem == "blank":
    asked = [Path(name) for name in sys.argv[1:]]
    if not asked or not all(path.is_file() for path in asked):
        sys.exit("usage: python book/_ext/blank.py book/PART/CHAPTER.py ...")
    print("\n".join(map(blank, asked)), end="")

# %%
from blank import blank

_ = chapter.write_text(SAMPLE, "utf-8")
run_freeze([chapter])
print(blank(chapter))

# %% [markdown]
# ## Against the others
#
# | | source | marks in the exported file | outputs |
# |---|---|---|---|
# | nbdev 3 | `.ipynb` | a `# %%` line a cell | run, not compared |
# | Entangled 2 | Markdown | begin and end of each block | not its matter |
# | jupytext `--sync` | `.py` + `.ipynb` | a percent line a cell | optional |
# | here | `.py` | section headings | frozen, compared |
#
# Each is the right choice for another wish. nbdev and Entangled take edits
# of the generated file back into the source and pay with marks in it; here
# the generated file is read by people, so it carries none, and an edit in it
# is an error. jupytext does the hard part for us: the percent format is read
# and written by it, both ways without loss. It has no notion of exporting a
# part: what it writes of the sample is the whole chapter.

# %%
script = jupytext.writes(jupytext.read(chapter), fmt="py:light")
print("demonstrations in jupytext's script:", script.count("square(4)"))
print("in the module:", module_text(areas).count("square(4)"))
again = jupytext.reads(jupytext.writes(jupytext.read(chapter),
                                       fmt="py:percent"), fmt="py:percent")
assert [cell.source for cell in again.cells] == [
    cell.source for cell in jupytext.read(chapter).cells]

# %% [markdown]
# nbval's leniency towards cells that never ran is meant so: since
# computationalmodelling/nbval#82 a cell without an execution count is
# "evaluated in lax mode", that is, run but not compared. So `stale` asks for
# the count.
#
# ## In the 20b and the 120b
#
# No check of this book needs the released weights, or a GPU. A cell
# that does need them carries two tags, because two programs have to leave it
# alone: `skip-execution` is read by nbclient, `nbval-skip` by nbval. With
# both tags, and only then, a cell may be frozen without having run.

# %%
REAL = '\n# %% tags=[{}]\nraise RuntimeError("13.8 GB are not here")\n'
for tags in ('"skip-execution"', '"skip-execution", "nbval-skip"'):
    chapter.write_text(SAMPLE + REAL.format(tags), "utf-8")
    freeze(chapter)
    print(stale(chapter) or "in order")
print(*nbval("book/shapes/areas.ipynb"), sep="\n")

# %% [markdown]
# ## Takeaways
#
# - A stored output proves something only if its cell was executed, and nbval
#   does not ask. The freeze check does.
# - A picture is compared by what it draws, not by its bytes.
# - Two runs of a chapter give the same bytes, or nothing can be compared.

