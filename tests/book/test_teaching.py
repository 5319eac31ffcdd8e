"""What makes a chapter teach: it shows its numbers, and it asks for work.

`test_book_form.py` looks at the form of what is written; this file holds what
is written to what the cells print.
"""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from test_book_form import cells, each_chapter, each_main, tags

Cell = nbformat.NotebookNode


def sections(whole: list[Cell]) -> list[tuple[str, Cell]]:
    """Each cell with the `## ` heading that it stands under. A cell with
    several headings is cut at them."""
    found, section = [], ""
    for cell in whole:
        if cell.cell_type != "markdown":
            found.append((section, cell))
            continue
        for text in re.split(r"(?m)^(?=## )", cell.source):
            if heading := re.match(r"## (.*)", text):
                section = heading[1].strip()
            if text.strip():
                found.append((section, nbformat.v4.new_markdown_cell(
                    text, metadata=cell.metadata)))
    return found


@cache
def frozen(chapter: Path) -> list[tuple[str, Cell]]:
    return sections(nbformat.read(chapter.with_suffix(".ipynb"), 4).cells)


def printed(cell: Cell) -> str:
    """All that a code cell shows as text, the figures' texts included."""
    said = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            said.append(output.text)
        for kind, data in output.get("data", {}).items():
            if kind != "image/png":
                said.append(str(data))
    return "\n".join(said)


# --- Printed numbers instead of True -----------------------------------------

def only_booleans(text: str) -> bool:
    words = re.findall(r"[\w.%+-]+", text)
    return bool(words) and set(words) <= {"True", "False"}


@pytest.mark.parametrize("text, found", [
    ("True\n", True), ("(True, False)", True), ("[True, True] False", True),
    ("", False), ("equal: True", False), ("0.5 True", False)])
def test_only_booleans(text: str, found: bool) -> None:
    assert only_booleans(text) == found


@each_chapter
def test_a_cell_prints_more_than_true(chapter: Path) -> None:
    bare = [cell.source.splitlines()[-1] for section, cell in frozen(chapter)
            if cell.cell_type == "code" and section != "It holds"
            and only_booleans(printed(cell))]
    assert not bare


# --- Exercises and pictures --------------------------------------------------

@each_main
def test_three_exercises_that_answer(chapter: Path) -> None:
    asked, mute = 0, []
    for section, cell in frozen(chapter):
        if section != "Exercises":
            continue
        if cell.cell_type == "markdown":
            asked += len(re.findall(r"(?m)^### Exercise \d", cell.source))
        elif not cell.get("outputs"):
            mute.append(cell.source.splitlines()[0])
    assert asked >= 3 and not mute


@each_main
def test_a_picture(chapter: Path) -> None:
    drawn = [cell for _, cell in frozen(chapter)
             if cell.cell_type == "code" and "image/png" in str(
                 [out.get("data", {}).keys() for out in
                  cell.get("outputs", [])])
             or cell.cell_type == "markdown" and re.search(
                 r"!\[|<svg|```\{(image|figure)", cell.source)]
    assert drawn


# --- A number in the prose is printed by a cell ------------------------------

# 13.8, 131,072, 91 %, 12 times; neither versions (5.5.0) nor names (gpt-2)
NUMBER = re.compile(
    r"(?<![\w.\-/#^_])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+(?!\d|\.\d)"
    r"|\d+(?= ?%| times| percent))")
# what says where its numbers come from: a source that is named, a machine
MARKS = {"given", "measured"}
# code, links, formulas and raw HTML are not read
UNREAD = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)"
                    r"|<[^>]*>|https?://\S+", re.DOTALL)


def numbers(text: str) -> set[str]:
    return {number.replace(",", "")
            for number in NUMBER.findall(UNREAD.sub(" ", text))}


def unprinted(said: set[str], known: str) -> set[str]:
    """Those of the numbers `said` that no number in the text `known` rounds
    to, as it stands or as a percentage."""
    known = re.sub(r"(?<=\d)[,_](?=\d)", "", known)
    values = [float(number) for pair in re.findall(   # 6.6e-6: 6.6 as well
        r"(?<![\w.])((\d+(?:\.\d+)?)(?:e[+-]?\d+)?)", known)
        for number in pair]

    def is_known(number: str) -> bool:
        half = 0.5000001 * 10.0 ** -len(number.partition(".")[2])
        return any(abs(factor * value - float(number)) <= half
                   for value in values for factor in (1, 100))
    return {number for number in said if not is_known(number)}


@pytest.mark.parametrize("text, known, found", [
    ("it has 13.8 GB", "13.78", set()), ("it has 13.8 GB", "13.4", {"13.8"}),
    ("are 91 % of", "0.9137", set()), ("are 91 % of", "0.9157", {"91"}),
    ("131,072 tokens", "n = 131_072", set()), ("in 3 parts", "", set()),
    ("torch 2.13.0", "", set()), ("`1.5` and $2.5$", "", set()),
    ("0.25 of", "2.5e-1", set()), ("6.6 us", "6.6e-6", set()),
    ("7 times", "x7 8", {"7"})])
def test_unprinted(text: str, known: str, found: set[str]) -> None:
    assert unprinted(numbers(text), known) == found


@each_chapter
def test_numbers_are_printed(chapter: Path) -> None:
    known = "\n".join(cell.source + "\n" + printed(cell)
                      for _, cell in frozen(chapter)
                      if cell.cell_type == "code")
    said = [(section, cell) for section, cell in sections(cells(chapter))
        if cell.cell_type == "markdown" and section != "Sources"
        and not MARKS & set(tags(cell))]
    missing = {f"{section}: {number}" for section, cell in said
               for number in unprinted(numbers(cell.source), known)}
    assert not missing
