"""book/traps.md: every command on the page does what the page says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from gptoss.cli.commands import main
from gptoss.parity.suspects import FAULTS
from gptoss.parity.vector_cases import all_cases

PAGE = Path(__file__).resolve().parents[2] / "book" / "traps.md"
TEXT = PAGE.read_text("utf-8")
TRAPS = re.split(r"^## (?=\d+\. )", TEXT, flags=re.MULTILINE)[1:]
BLOCKS = re.findall(r"^```console\n(.*?)^```", TEXT.replace("\\\n", ""),
                    re.DOTALL | re.MULTILINE)
# a command, and what it prints in the end
COMMANDS = [tuple(part.split("\n", 1)) for block in BLOCKS
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
PROGRAMS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", TEXT,
                      re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def ran(line: str) -> tuple[int, str]:
    """Exit code and stdout of a command of the page."""
    python, m, package, *argv = shlex.split(line)
    assert (python, m, package) == ("python", "-m", "gptoss")
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            code = main(argv)
        except SystemExit as ended:
            code = int(str(ended.code))
    return code, out.getvalue()


@pytest.mark.parametrize("line, shown", [
    each for each in COMMANDS if " parity " in each[0]],
    ids=lambda value: value.split()[-1] if " parity " in value else "")
def test_a_planted_fault_is_named(line, shown):
    """The words are the same; numbers may differ where processors do."""
    code, out = ran(line)
    end = "\n".join(out.splitlines()[-len(shown.splitlines()):]) + "\n"
    assert NUMBER.sub("#", end) == NUMBER.sub("#", shown)
    assert code == ("first beyond rounding" in shown)
    wrote, found = (float(re.search(r"argmax ([\d.]+)%", text)[1])
                    for text in (shown, end))
    assert abs(wrote - found) <= 5


def test_the_vectors_are_written_and_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, shown in COMMANDS:
        if " vectors " in line:
            assert ran(line) == (0, shown)


@pytest.mark.parametrize("code, shown", PROGRAMS,
                         ids=range(len(PROGRAMS)))
def test_a_program_prints_what_stands_below_it(code, shown, capsys):
    exec(compile(code, str(PAGE), "exec"), {"__name__": "trap"})
    assert capsys.readouterr().out == shown


def test_each_trap_has_a_wrong_number_a_vector_and_a_thread():
    cases, planted = {case.name for case in all_cases()}, set()
    assert len(TRAPS) == 14
    for number, trap in enumerate(TRAPS, 1):
        assert trap.startswith(f"{number}. ")
        assert "```console" in trap or "```text" in trap, trap[:40]
        assert re.search(r"https://github.com/[\w.-]+/[\w.-]+/(pull|issues)"
                         r"/\d+\)", trap), trap[:40]
        (vector,) = re.findall(r"^Vector: (none|`[\w ]+`)", trap,
                               re.MULTILINE)
        assert vector == "none" or vector.strip("`") in cases, vector
        planted.update(re.findall(r"--plant (\w+)", trap))
        for link, shown in re.findall(r"\[([\w./#-]+#\d+)\]\((\S+)\)", trap):
            owner, thread = link.split("#")
            assert shown.split("github.com/")[1].startswith(owner + "/")
            assert shown.endswith("/" + thread)
    assert planted == {*FAULTS}
    assert len(PROGRAMS) == TEXT.count("```python")
