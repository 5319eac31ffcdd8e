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
#     module: chapters
#     folder: book/_ext
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
# This appendix and the next export `book/_ext/`, the program that wrote every
# module of the package, and itself.
#
# ## Picture

# %% tags=["hide-input"]
# Figure: five boxes: the chapter, edited by hand; made from it by tangling the
# module, by freezing the notebook; and from those the import and the web book.
# Dashed arrows back to the chapter are the checks.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")


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
box(ax, 1.3, 2, "book/\nattention/sinks.py\n(edited by hand)", "#fff3d6")
box(ax, 5.2, 3.3, "gptoss/\nattention/sinks.py", "#d9ecf7")
box(ax, 5.2, 0.7, "book/\nattention/sinks.ipynb", "#d9ecf7")
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
(root / "book" / "shapes").mkdir(parents=True)
_ = (root / "_toc.yml").write_text("- file: book/shapes/areas\n", "utf-8")
chapter = root / "book" / "shapes" / "areas.py"
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
# one. `tests/book/test_book.py` holds this for the book.
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
    """What one chapter gives to one file.

    Attributes:
        name: "attention/sinks", "__init__", or with a suffix
            "kernels/base.h"; below `folder`.
        chapter: the chapter's file below book/, "attention/sinks.py".
        title: the chapter's first heading.
        cells: (section heading, source) in reading order.
        folder: where it goes, from the project's root.
        siblings: all modules of the chapter by name, this one too.
        public: names that the chapter has its part hand on.
    """

    name: str
    chapter: str
    title: str
    cells: list[tuple[str, str]] = field(default_factory=list)
    folder: str = OWN
    siblings: dict[str, "Module"] = field(default_factory=dict, repr=False)
    public: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Path of the generated file from the project's root."""
        end = "" if "." in self.name else ".py"
        return f"{self.folder}/{self.name}{end}"

    @property
    def dotted(self) -> str:
        """The name by which others import it."""
        path = self.name.replace("/", ".")
        return f"{OWN}.{path}" if self.folder == OWN else path


# %% [markdown]
# The two trees are one tree: a chapter in the folder `attention` of the book
# exports to the folder `attention` of the package. A code cell tagged `export`
# goes into the module that the front matter names, one tagged `export:NAME`
# into `NAME.py` beside it, one tagged `export:/NAME` to the package's top,
# where a chapter that lies in no folder exports to anyway.
# A markdown cell can be exported as well: tagged `export:base.h`, it gives its
# fenced blocks to `base.h`.

# %% tags=["export"]
_TARGET = re.compile(r"/?([A-Za-z_]\w*/)*[A-Za-z_]\w*(\.\w+)?")
_HEADING = re.compile(r"^#+[ \t]+(.*?)[ \t]*$", re.MULTILINE)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def place(path: Path) -> Path:
    """A chapter's path below the nearest folder called book."""
    parts = path.absolute().parts
    at = len(parts) - parts[::-1].index("book") if "book" in parts else -1
    return Path(*parts[at:])


def read_chapter(path: Path) -> dict[str, Module]:
    """The modules that a chapter exports to, by name.

    Raises TangleError for an exported cell without a target, with one that
    is no plain path, or with one that does not fit the kind of cell.
    """
    notebook, own = jupytext.read(path), place(path)
    front = notebook.metadata.get("gptoss", {})
    title, heading, modules = "", "", {}
    for cell in notebook.cells:
        source, prose = cell.source, cell.cell_type == "markdown"
        if prose:
            for text in _HEADING.findall(FENCE.sub("", source)):
                title, heading = title or text, text
            source = "\n\n".join(FENCE.findall(source))
        for tag in cell.metadata.get("tags", []):
            if tag.split(":")[0] != "export":
                continue
            name = tag.partition(":")[2] or front.get("module", "")
            if not _TARGET.fullmatch(name) or prose != ("." in name):
                raise TangleError(f"{own}, {heading!r}: a "
                                  f"{cell.cell_type} cell cannot go to "
                                  f"{name!r} (tag {tag!r})")
            if "folder" not in front and "/" not in name:
                name = (own.parent / name).as_posix()
            name = name.removeprefix("/")
            modules.setdefault(name, Module(
                name, own.as_posix(), title, [], front.get("folder", OWN),
                modules, tuple(front.get("public", ())))
                ).cells.append((heading, source))
    return modules


# %%
areas = read_chapter(chapter)["shapes/areas"]
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


def _from(module: str, names: list[str], width: int) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= width:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inner})"


# %% tags=["export"]
def import_block(nodes: list[ast.stmt], width: int = 79) -> str:
    """Import statements merged, sorted and grouped, as source text.

    What would be longer than `width` columns gets a line for each name.
    """
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
        lines = "\n".join(_from(module, part, width) for part in parts)
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
def bound_names(node: ast.stmt) -> list[str]:
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
    name = name.rpartition("/")[2]
    if name == "__init__":
        nodes = [node for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom)
                 and (node.module or "").split(".")[0] == OWN]
    else:
        nodes = [node for node in tree.body if name != "__main__"
                 and isinstance(node, ast.FunctionDef | ast.ClassDef
                                | ast.Assign | ast.AnnAssign)]
    return sorted({text for node in nodes for text in bound_names(node)
                   if not text.startswith("_")})


# %%
print(public_names(ast.parse(naive), "areas"))
print(public_names(ast.parse("from gptoss.model import GptOss"), "__init__"))

# %% [markdown]
# ### The text of a module
#
# A first line that says where to edit, the imports, the cells under their
# section headings, `__all__`; and the test of {eq}`tangle-commute`.
#
# A notebook is one namespace, and a chapter may fill several modules. So a
# module gets from its chapter what it reads and does not bind itself: imports
# that stand in any exported cell, and names that a sibling binds, by an import
# from there. Which names a module reads, Python's own compiler says
# (`symtable`): a local variable that happens to have the name of a sibling's
# function is none of them. Two modules of a chapter may bind one name by the
# same statement, as each has its logger, and by no other: in the notebook the
# second would have replaced the first.

# %% tags=["export"]
import builtins
import symtable


def global_reads(source: str) -> set[str]:
    """Names that the code takes from its module's namespace or Python's."""
    found, todo = set(), [symtable.symtable(source, "module", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols()
                  if symbol.is_referenced() and (
                      symbol.is_global() or table.get_type() == "module")}
    return found


def _kept(node: ast.stmt, wanted: set[str]) -> list[ast.stmt]:
    """An import statement without the names that nobody wants."""
    if getattr(node, "module", "") == "__future__":
        return [node]
    names = [alias for alias in node.names
             if (alias.asname or alias.name.split(".")[0]) in wanted]
    again = type(node)(**{**vars(node), "names": names})
    return [again] if names else []


def _taken_apart(module: Module) -> tuple[list[ast.stmt], list[tuple]]:
    """Its imports, and (heading, source) of the rest of its cells."""
    imports, rest = [], []
    for heading, source in module.cells:
        found, text = split_imports(source, f"{module.chapter}, {heading!r}")
        imports += found
        rest += [(heading, text)] if text else []
    return imports, rest


def _own(cells: list[tuple[str, str]]) -> dict[str, str]:
    """The names that cells bind, and the statement that did it last."""
    return {name: ast.unparse(node) for _, source in cells
            for node in ast.parse(source).body for name in bound_names(node)}


# %% tags=["export"]
_COMMENT = {"h": "// {}", "cpp": "// {}", "jinja": "{{#- {} #}}",
            "pyi": "# {}"}


def imports_of(module: Module) -> list[ast.stmt]:
    """What stands at the top of a module: of all imports in its chapter
    those that it needs, and what it reads of its siblings.

    Raises TangleError if moving an import could change what a name means.
    """
    chapter = module.siblings or {module.name: module}
    apart = {name: _taken_apart(other) for name, other in chapter.items()
             if "." not in name}
    imports = [node for nodes, _ in apart.values() for node in nodes]
    bound = {name: _own(rest) for name, (_, rest) in apart.items()}
    _refuse_clash(module, imports, bound)
    text = "\n".join(source for _, source in apart[module.name][1])
    wanted = global_reads(text) - bound[module.name].keys()
    if module.name.startswith("__"):
        return apart[module.name][0]
    found = [kept for node in imports for kept in _kept(node, wanted)]
    for name, names in bound.items():
        shared = sorted(names.keys() & wanted)
        if private := [text for text in shared if text.startswith("_")]:
            raise TangleError(f"{module.chapter}: {private[0]!r} of {name} is "
                              f"used in {module.name}: no underscore then")
        if shared:
            found.append(ast.ImportFrom(
                chapter[name].dotted, [ast.alias(text) for text in shared],
                0))
    return found


def _refuse_clash(module: Module, imports: list[ast.stmt],
                  bound: dict[str, dict[str, str]]) -> None:
    own = set().union(*bound.values(), dir(builtins))
    for name in (name for node in imports for name in bound_names(node)):
        if name in own:
            raise TangleError(f"{module.chapter}: {name!r} is imported and "
                              f"also bound in module {module.name}")
    for other, names in bound.items():
        for name in sorted(names.keys() & bound[module.name].keys()):
            if names[name] != bound[module.name][name]:
                raise TangleError(f"{module.chapter}: {name!r} is bound in "
                                  f"{other} and in {module.name}")


def module_text(module: Module) -> str:
    """The whole generated file, Python or not."""
    note = (f"Generated from book/{module.chapter}; edit the chapter, not "
            "this file.")
    if "." in module.name:
        mark = _COMMENT[module.name.rpartition(".")[2]]
        return "\n\n".join(["\n".join(map(mark.format, (module.title, note))),
                            *(source.strip("\n")
                              for _, source in module.cells)]) + "\n"
    body, last = [], ""
    for heading, rest in _taken_apart(module)[1]:
        if heading != last:
            rule = f"# --- {heading} ".ljust(79, "-")
            rest, last = f"{rule}\n\n{rest}", heading
        body.append(rest)
    code = "\n\n\n".join(body)
    parts = [f'"""{module.title}\n\n{note}\n"""',
             import_block(imports_of(module))]
    text = "\n\n".join([part for part in parts if part] + [code])
    names = public_names(ast.parse(text), module.name)
    if names:
        listed = "".join(f'    "{name}",\n' for name in names)
        text += f"\n\n\n__all__ = [\n{listed}]"
    return text.rstrip("\n") + "\n"


# %%
text = module_text(areas)
print(text)
assert ruff(text) == []

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
# **One chapter, two modules.** What the second reads of the first it imports;
# what crosses the border may not begin with an underscore.

# %%
TWO = SAMPLE.replace('# ### A circle\n\n# %% tags=["export"]',
                     '# ### A circle\n\n# %% tags=["export:round"]')
_ = chapter.write_text(TWO, "utf-8")
for two in read_chapter(chapter).values():
    print(two.file, [ast.unparse(node) for node in imports_of(two)])
_ = chapter.write_text(TWO.replace("square", "_square"), "utf-8")
try:
    module_text(read_chapter(chapter)["shapes/round"])
except TangleError as error:
    print(error)
_ = chapter.write_text(SAMPLE, "utf-8")

# %% [markdown]
# **What cannot be exported is refused by name.**

# %%
BAD = ('# %% tags=["export"]\nx = 1',
       '# %% tags=["export:../x"]\nx = 1',
       '# %% tags=["export:base.h"]\nx = 1',
       '# %% [markdown] tags=["export:notes"]\n# text',
       '# %% tags=["export:m"]\nx = (')
for source in BAD:
    (root / "bad.py").write_text(source, "utf-8")
    try:
        for module in read_chapter(root / "bad.py").values():
            module_text(module)
    except TangleError as error:
        print(error)

# %% [markdown]
# ## Takeaways
#
# - One file is edited; the module and the notebook are made from it, and
#   three equalities, {eq}`tangle-checks`, are checked on every change.
# - Imports may move to the top because no imported name is bound a second
#   time; that is tested, not hoped.
# - A chapter is one namespace; each of its modules imports what it reads.
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


_ = chapter.write_text(SAMPLE, "utf-8")
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
_ = chapter.write_text(SAMPLE + CPP, "utf-8")
got = read_chapter(chapter)
assert list(got) == ["shapes/areas", "shapes/base.h"]
print(module_text(got["shapes/base.h"]))

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
