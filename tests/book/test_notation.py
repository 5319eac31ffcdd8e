"""One letter, one meaning: book/notation.md against prose and code.

A program cannot read prose, but it can see that "$E$ tokens" is not what the
table says of E, or that code calls `hidden_size` H.
"""

import ast
import re
from pathlib import Path

import pytest
from test_book_form import cells, code, each_chapter

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([A-Z]) \| ([^|]+) \|([^|]*)\|", re.MULTILINE)
NOUNS = {"sequences", "tokens", "queries", "keys", "heads", "channels",
         "experts", "layers"}
TABLE = {letter: (meaning, key.strip(" `")) for letter, meaning, key in
         ROW.findall((ROOT / "book" / "notation.md").read_text("utf-8"))}
COUNTS = {letter: NOUNS & set(re.findall(r"\w+", meaning))
          for letter, (meaning, _) in TABLE.items()}
LETTER = {key: letter for letter, (_, key) in TABLE.items() if key}
PROSE = re.compile(r"\$([A-Z])\$ (?:(?:is|are|be) (?:the )?(?:number of )?)?"
                   rf"(?:[\w/]+ )?({'|'.join(sorted(NOUNS))})\b")


def test_the_table_has_all_letters() -> None:
    assert "".join(TABLE) == "BTSDHGCEKFVLWN"
    assert COUNTS["E"] == COUNTS["K"] == {"experts"}
    assert COUNTS["T"] == {"tokens", "queries"} and not COUNTS["D"]
    assert LETTER["hidden_size"] == "D" and len(LETTER) == 10


def test_the_table_has_the_released_sizes() -> None:
    from gptoss import GptOssConfig

    defaults = GptOssConfig()  # the 120b's
    text = (ROOT / "book" / "notation.md").read_text("utf-8")
    for key, letter in LETTER.items():
        row = next(line for line in text.splitlines()
                   if line.startswith(f"| {letter} |"))
        assert row.split("|")[5].strip().replace(",", "") == str(
            getattr(defaults, key))


# --- Prose -------------------------------------------------------------------

def misused(text: str) -> list[str]:
    """Where a letter of the table counts something else."""
    return [found[0] for found in PROSE.finditer(" ".join(text.split()))
            if found[1] in COUNTS and found[2] not in COUNTS[found[1]]]


@pytest.mark.parametrize(("text", "wrong"), [
    ("each of the $E$ experts, $T$ tokens", 0),
    ("all $H$ query heads and $G$\nkey/value heads", 0),
    ("$P$ tokens", 0), ("$H/G$ tokens", 0), ("where $L$ is the layer", 0),
    ("$E$ tokens", 1), ("$K$ is the number of keys", 1), ("$D$ layers", 1),
    ("let $N$ be the experts, $S$ keys", 1)])
def test_misused(text: str, wrong: int) -> None:
    assert len(misused(text)) == wrong


@each_chapter
def test_letters_in_prose(chapter: Path) -> None:
    text = "\n\n".join(cell.source for cell in cells(chapter)
                       if cell.cell_type == "markdown")
    assert misused(text) == []


# --- Code --------------------------------------------------------------------

def misnamed(source: str) -> list[str]:
    """Assignments of a configuration's size to another letter than its own,
    or of something else of it to a letter of the table."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or len(node.targets) > 1:
            continue
        pair = [node.targets[0], node.value]
        pairs = (zip(*(part.elts for part in pair), strict=False)
                 if all(isinstance(part, ast.Tuple) for part in pair)
                 else [pair])
        for name, value in pairs:
            if not (isinstance(name, ast.Name) and len(name.id) == 1
                    and name.id.isupper()):
                continue
            key = ""
            if isinstance(value, ast.Attribute):
                key = value.attr
            elif (isinstance(value, ast.Subscript)
                  and isinstance(value.slice, ast.Constant)):
                key = str(value.slice.value)
            if key in LETTER and LETTER[key] != name.id:
                wrong.append(f"{name.id} = {key}")
    return wrong


@pytest.mark.parametrize(("source", "wrong"), [
    ("D = config.hidden_size", 0), ("D, C = c.hidden_size, c.head_dim", 0),
    ("C = config['head_dim']", 0), ("x = config.hidden_size", 0),
    ("H = config.hidden_size", 1), ("C, D = c.hidden_size, c.head_dim", 2),
    ("D = config['head_dim']", 1)])
def test_misnamed(source: str, wrong: int) -> None:
    assert len(misnamed(source)) == wrong


@each_chapter
def test_letters_in_code(chapter: Path) -> None:
    assert misnamed(code(chapter)) == []
