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
# ## Question
#
# How does a reader know that the code on the page is the code that runs, and
# that the numbers under it are its numbers? The usual check, nbval, does not
# tell by itself: a notebook whose every run prints something else passes it
# with 0 failures, as long as nobody stored a first run.
#
# This appendix exports `gptoss/tangle.py`, the program that wrote every module
# of the package, itself included.
#
# ## Picture

# %% tags=["hide-input"]
# Figure: five boxes: the chapter, edited by hand; made from it by tangling the
# module, by freezing the notebook; and from those the import and the web book.
# Dashed arrows back to the chapter are the checks.
import matplotlib.pyplot as plt

plt.style.use("_static/book.mplstyle")


def box(axis, x, y, text, color):
    axis.text(x, y, text, ha="center", va="center", fontsize=9,
              bbox={"boxstyle": "round,pad=0.5", "fc": color, "ec": "0.3",
                    "alpha": 0.9})


def arrow(axis, start, end, text, where, check=False, bend=0.0):
    color = "#D55E00" if check else "0.3"
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": "<|-|>" if check else "-|>", "color": color, "lw": 1.4,
        "ls": "--" if check else "-",
        "connectionstyle": f"arc3,rad={bend}"})
    axis.text(*where, text, fontsize=8, color=color, ha="center")


fig, ax = plt.subplots(figsize=(7, 2.9))
ax.set(xlim=(0.2, 10), ylim=(-0.5, 3.8))
ax.axis("off")
box(ax, 1.3, 2, "book/05_sinks.py\nprose + code\n(edited by hand)", "#fff3d6")
box(ax, 5.2, 3.3, "gptoss/sinks.py\nthe module", "#d9ecf7")
box(ax, 5.2, 0.7, "book/05_sinks.ipynb\nexecuted, frozen", "#d9ecf7")
box(ax, 9, 0.7, "web book", "#e3f3ec")
box(ax, 9, 3.3, "import gptoss", "#e3f3ec")
arrow(ax, (2.25, 2.4), (4.4, 3.3), "tangle", (3.1, 3.05))
arrow(ax, (2.25, 1.6), (4.1, 0.7), "freeze", (2.9, 0.8))
arrow(ax, (6.3, 0.7), (8.4, 0.7), "render", (7.3, 0.8))
arrow(ax, (6.05, 3.3), (8.2, 3.3), "install", (7.1, 3.4))
arrow(ax, (2.25, 2.1), (4.4, 2.95), "--check", (3.75, 2.3), check=True)
arrow(ax, (2.25, 1.9), (4.1, 1.1), "--freeze --check", (4.0, 1.55),
      check=True)
arrow(ax, (4.6, 0.3), (5.8, 0.3), "nbval: run again, compare", (5.2, -0.45),
      check=True, bend=0.5)
plt.show()

# %% [markdown]
# One file is written by hand, two are made from it (solid arrows): *tangling*
# collects a chapter's exported cells into a module, *freezing* runs all its
# cells and stores what they print. Three checks (dashed) hold the copies to
# the original.
#
# ## The naive version
#
# Take the exported cells and join them. Here is a chapter small enough to
# see through; the rest of this appendix works on it, in a temporary folder.

# %%
import tempfile
from pathlib import Path

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
(root / "book").mkdir()
(root / "gptoss").mkdir()
chapter = root / "book" / "01_areas.py"
_ = chapter.write_text(SAMPLE, "utf-8")

# %%
import jupytext

cells = jupytext.read(chapter).cells
naive = "\n\n\n".join(cell.source for cell in cells
                      if "export" in cell.metadata.get("tags", []))
scope = {}
exec(naive, scope)
print([name for name in scope if not name.startswith("_")])

# %% [markdown]
# It runs, and it is wrong in two ways that a reader of the module meets at
# once. `from areas import *` hands out `math`, which is not ours to give.
# And a chapter imports where it first needs something, so `import math`
# stands in the middle of the module, where a linter refuses it:

# %%
import os
import subprocess
import sys

PLAIN = {key: value for key, value in os.environ.items()
         if "COLOR" not in key}


def ruff(source: str, rules: str = "E,F,I,UP,B") -> list[str]:
    """The rules that a module breaks."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet",
         "--line-length=79", f"--select={rules}",
         "--config", 'lint.isort.known-first-party=["gptoss"]',
         "--output-format=concise", "-"],
        input=source, capture_output=True, text=True, env=PLAIN)
    return [line.split()[1] for line in done.stdout.splitlines()]


ruff(naive)

# %% [markdown]
# The other half of the naive version is to convert the chapter and to trust
# nbval with the outputs. Two notebooks with the same cell, which gives another
# number in every run; one was executed before it was stored, one was not:

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
# ## Derivation
#
# Call $c$ a chapter, $m$ its module and $n$ its notebook, as they lie in the
# repository. $M$ tangles, $S$ takes the sources of the cells, $O$ the outputs
# that are stored beside them, and $R$ the outputs that running some sources
# gives. Three checks suffice:
#
# $$
# m = M(c), \qquad S(n) = S(c), \qquad O(n) = R(S(n)) .
# $$ (tangle-checks)
#
# The second put into the third gives $O(n) = R(S(c))$: the outputs on the
# page belong to the chapter. The exported cells are among $S(c)$, so by the
# first equation the module holds the very statements that produced them.
# nbval checks the third equation only for a cell with an execution count,
# so the second check also has to ask for that count, in every cell. And of a
# picture it compares nothing that depends on the data, so an output has to
# say in text what was drawn.
#
# That leaves $M$. It moves the imports to the top, which changes the order
# of execution. Let $i$ be an import that binds the name $a$ and let $s$ be
# any statement before it. The two commute unless
#
# $$
# a \in \mathrm{bound}(s) \cup \mathrm{read}(s) .
# $$ (tangle-commute)
#
# A statement that reads $a$ before the import fails in the notebook, or else
# finds an $a$ that something else bound, another statement or Python itself.
# So one test covers both: a name that is imported may not be a builtin, and
# may not be bound at the top level by anything but imports. $M$ refuses such
# a chapter. Two things it leaves to others. One name imported from two places
# is the linter's to find (F811). And an import that reads what a statement
# *does*, say an environment variable that it sets, is the author's to avoid:
# no syntax tree shows it.
#
# The last rule makes the order of reading an order of execution. If $D(k)$
# are the chapters that the module of chapter $k$ imports from,
#
# $$
# D(k) \subseteq \{1, \dots, k - 1\} \quad \text{for all } k ,
# $$ (tangle-order)
#
# then no import is circular, and nothing used in a chapter comes from a later
# one. `tests/test_book.py` holds this for the book.
#
# ## Code
#
# ### What a chapter gives away

# %% tags=["export"]
import re
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

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


# %% [markdown]
# A code cell tagged `export` goes into the module which the front matter
# names, one tagged `export:NAME` into `gptoss/NAME.py`. A markdown cell can
# be exported as well: tagged `export:base.h`, it gives its fenced blocks
# to `gptoss/base.h`.

# %% tags=["export"]
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


# %%
areas = read_chapter(chapter)["areas"]
print(areas.file, "from", areas.chapter)
for section, source in areas.cells:
    print(f"  {section:8} {len(source.splitlines())} lines")

# %% [markdown]
# ### Imports go to the top
#
# A cell is taken apart by its syntax tree, never by its indentation: an
# import inside a function, or under `if TYPE_CHECKING`, stays where it is.

# %% tags=["export"]
import ast


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


# %%
found, rest = split_imports(areas.cells[1][1], "areas")
print([ast.unparse(node) for node in found])
print(rest.splitlines()[0])
try:
    split_imports("import math; PI = math.pi", "sample")
except TangleError as error:
    print(error)

# %% [markdown]
# Merged, they have to stand as ruff's isort wants them, or the generated file
# would fail the linter: `import a` before `from b import c`; the standard
# library, then others, then our own; among the names, CONSTANTS before
# Classes before functions.

# %% tags=["export"]
import sys


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


# %% tags=["export"]
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


# %%
messy = ast.parse("""
from gptoss.mxfp4 import decode, BLOCK, PackedMXFP4
import torch, math
from torch import nn
from pathlib import Path
from math import tau
from gptoss.mxfp4 import BLOCK
""")
block = import_block(messy.body)
print(block)
assert ruff(block + "\n", "I") == []

# %% [markdown]
# ### What is public
#
# `__all__` is read from the tree: functions, classes and constants without a
# leading underscore, and no imports. For `__init__` it is the other way
# round: what it imports from the package is what it offers.

# %% tags=["export"]
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


# %%
print(public_names(ast.parse(naive), "areas"))
print(public_names(ast.parse("from gptoss.model import GptOss"), "__init__"))

# %% [markdown]
# ### The text of a module
#
# A first line that says where to edit, the imports, the cells under their
# section headings, `__all__`; and the test of {eq}`tangle-commute`.

# %% tags=["export"]
import builtins


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


# %%
text = module_text(areas)
print(text)
assert ruff(text) == []

# %% [markdown]
# ### A page for every name
#
# The reference of the whole package needs no second source: name, arguments
# and the docstring's first paragraph, linked to the section that derives it.
# A character that Markdown would take for markup is escaped, unless it stands
# between backticks.

# %% tags=["export"]
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


# %% tags=["export"]
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
print(api_page([areas]).split("\n\n", 2)[2])

# %% [markdown]
# ### Writing and checking

# %% tags=["export"]
import difflib


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


# %%
texts = tangle([chapter], whole=True)
print("exit", run_tangle(texts, root, check=False))
module = root / "gptoss" / "areas.py"
module.write_text(text.replace("side * side", "side ** 2"), "utf-8")
print("exit", run_tangle(texts, root, check=True))

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

import nbformat

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


# %%
first = freeze(chapter).read_bytes()
assert freeze(chapter).read_bytes() == first
for cell in nbformat.read(root / "book" / "01_areas.ipynb", 4).cells:
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

import numpy as np

figures = runpy.run_path("_ext/figures.py")
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
print("jitter passes:", figures["same"](chart(heights),
                                        chart(heights * (1 + 1e-6))))
print("a longer bar passes:", figures["same"](chart(heights), chart(other)))
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
frozen = root / "book" / "01_areas.ipynb"
notebook = nbformat.read(frozen, 4)
notebook.cells[2].execution_count = None
nbformat.write(notebook, frozen)
print(stale(chapter))
chapter.write_text(SAMPLE.replace("square(3)", "square(4)"), "utf-8")
print(stale(chapter))

# %% [markdown]
# ### One command

# %% tags=["export"]
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


# %% tags=["export"]
import argparse


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

# %% [markdown]
# The last condition keeps the notebook from running the program: a notebook
# is `__main__` too, but has no `__file__`. The file runs by itself, without
# importing the package, so `python gptoss/tangle.py` works when every other
# module is broken. That is how the Makefile calls it, and how this appendix,
# which is tangled by its own output, gets out of a hole.

# %%
print("exit", run_freeze([chapter]))
print("exit", run_freeze([chapter], check=True))
print("exit", run_freeze([chapter]), "(nothing was left to do)")

# %% [markdown]
# ## It holds
#
# **Nothing is invented.** Every line of the module stands in the chapter, in
# the same order, except for the four things that were said: header, imports,
# section rules, `__all__`.

# %%
def from_chapter(text: str, module: Module) -> bool:
    """Whether the body of a module is a subsequence of the chapter."""
    imports = [node for _, source in module.cells
               for node in split_imports(source, "")[0]]
    body = text.split('"""\n', 1)[1].split("\n__all__ = [")[0]
    body = body.removeprefix("\n" + import_block(imports))
    lines = iter("\n".join(source for _, source in module.cells).split("\n"))
    return all(line in lines for line in body.split("\n")
               if line.strip() and not line.startswith("# --- "))


assert from_chapter(module_text(areas), areas)
assert not from_chapter(text.replace("side * side", "side ** 2"), areas)

# %% [markdown]
# **Moving imports changes nothing.** Cells with imports in random places give
# the same names and values, run in order or tangled; what does not commute is
# refused.

# %%
import random

PIECES = ("import math", "from math import tau", "A = 1", "B = math.pi",
          "def f(x):\n    from math import pi\n    return pi * x + A",
          "C = tau + f(1)", "import os.path as path", "D = path.sep")
ran = failed = 0
rng = random.Random(0)
for _ in range(500):
    pieces = rng.sample(PIECES, len(PIECES))
    expected = {}
    try:
        exec("\n".join(pieces), expected)
    except NameError:
        failed += 1
        continue
    sample = Module("m", "00_m.py", "M", [("", piece) for piece in pieces])
    got = {}
    exec(module_text(sample), got)
    for name in ("A", "B", "C", "D"):
        assert got[name] == expected[name]
    ran += 1
assert ran > 10
print(f"{failed} orders already fail in the notebook, {ran} run both ways")

# %%
for pieces in (("math = 1", "import math"), ("import math", "math = 1"),
               ("import math", "def math(): ..."),
               ("x = print", "from rich import print")):
    try:
        module_text(Module("m", "00_m.py", "M", [("", p) for p in pieces]))
    except TangleError as error:
        print(error)

# %% [markdown]
# **What cannot be exported is refused by name.**

# %%
BAD = ('# %% tags=["export"]\nx = 1',
       '# %% tags=["export:../x"]\nx = 1',
       '# %% tags=["export:base.h"]\nx = 1',
       '# %% [markdown] tags=["export:notes"]\n# text',
       '# %% tags=["export:m"]\nx = (')
for source in BAD:
    (root / "00_bad.py").write_text(source, "utf-8")
    try:
        tangle([root / "00_bad.py"])
    except TangleError as error:
        print(error)

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
print("demonstrations in jupytext's script:", "square(4)" in script)
print("demonstrations in the module:", "square(4)" in module_text(areas))
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
# No check of this book needs 13.8 or 65.2 GB of weights, or a GPU. A cell
# that does need them carries two tags, because two programs have to leave it
# alone: `skip-execution` is read by nbclient, `nbval-skip` by nbval. With
# both tags, and only then, a cell may be frozen without having run.

# %%
REAL = '\n# %% tags=[{}]\nraise RuntimeError("13.8 GB are not here")\n'
for tags in ('"skip-execution"', '"skip-execution", "nbval-skip"'):
    chapter.write_text(SAMPLE + REAL.format(tags), "utf-8")
    freeze(chapter)
    print(stale(chapter) or "in order")
print(*nbval("book/01_areas.ipynb"), sep="\n")

# %% [markdown]
# ## Cost
#
# Tangling parses. With $X$ exported cells in $Y$ Python modules, the syntax
# tree is built once a cell and twice a module: once to test
# {eq}`tangle-commute`, once to list the names.
#
# $$
# \text{parses} = X + 2 Y .
# $$ (tangle-cost)

# %%
from unittest.mock import patch

with patch.object(ast, "parse", wraps=ast.parse) as counted:
    tangle([chapter])
X, Y = len(areas.cells), 1
assert counted.call_count == X + 2 * Y
print("parses:", counted.call_count)

# %% [markdown]
# For the whole book that is a few seconds. Freezing costs what the chapters
# cost, so it skips what did not change, and checking a frozen notebook
# executes nothing.
#
# ## Takeaways
#
# - One file is edited; the module and the notebook are made from it, and
#   three equalities, {eq}`tangle-checks`, are checked on every change.
# - A stored output proves something only if its cell was executed, and nbval
#   does not ask. The freeze check does.
# - A picture is compared by what it draws, not by its bytes.
# - Imports may move to the top because no imported name is bound a second
#   time; that is tested, not hoped.
#
# ## Exercises
#
# ### Exercise 1
#
# Which names does `__all__` list for this module: a class `A`, a function
# `_b`, `C, D = 1, 2`, `E: int = 3`, `for F in (1,): pass`, `import math`?

# %% tags=["hide-cell"]
source = """
import math
class A: ...
def _b(): ...
C, D = 1, 2
E: int = 3
for F in (1,): pass
"""
assert public_names(ast.parse(source), "m") == ["A", "C", "D", "E"]
print("A, C, D, E: a loop binds F, but a loop defines nothing")

# %% [markdown]
# ### Exercise 2
#
# How much of a chapter is explanation? Count the lines of prose, of exported
# code and of demonstrations in a chapter.

# %% tags=["hide-cell"]
from collections import Counter


def shares(path: Path) -> Counter:
    count = Counter()
    for cell in jupytext.read(path).cells:
        kind = ("prose" if cell.cell_type == "markdown" else "exported"
                if "export" in cell.metadata.get("tags", []) else "shown")
        count[kind] += sum(bool(line.strip())
                           for line in cell.source.splitlines())
    return count


chapter.write_text(SAMPLE, "utf-8")
assert shares(chapter) == {"prose": 4, "exported": 9, "shown": 2}
print(dict(shares(chapter)))

# %% [markdown]
# ### Exercise 3
#
# A C++ kernel stands in a fenced block of a markdown cell. Export it.

# %% tags=["hide-cell"]
CPP = '''
# %% [markdown] tags=["export:base.h"]
# ```cpp
# float half(float x) { return 0.5f * x; }
# ```
'''
chapter.write_text(SAMPLE + CPP, "utf-8")
got = tangle([chapter])
assert list(got) == ["gptoss/areas.py", "gptoss/base.h"]
print(got["gptoss/base.h"])

# %% [markdown]
# ### Exercise 4
#
# Somebody edited the module. Write the inverse of tangling for the simplest
# case: find the cell that the edit belongs to. When is this not possible?

# %% tags=["hide-cell"]
def edited_section(module: Module, text: str) -> set[str]:
    """Sections whose source does not stand in the module any more."""
    return {heading for heading, source in module.cells
            if split_imports(source, "")[1] not in text}


edited = module_text(areas).replace("side * side", "side ** 2")
assert edited_section(areas, edited) == {"A square"}
assert edited_section(areas, module_text(areas)) == set()
print("A square. Not for an import: several cells may own it.")

# %%
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - Donald Knuth's WEB gave tangling its name {cite}`literate1984`. There the
#   program could be written in any order; Python's functions already can, so
#   concatenation is enough here.
# - jupytext, nbformat, nbclient: reading, ids, execution. nbclient's
#   `coalesce_streams` is what makes a printed text one output.
# - nbdev `nbdev/export.py` and `nbdev/sync.py`; Entangled, `entangled-cli`;
#   nbval `nbval/plugin.py`; thread computationalmodelling/nbval#82.
