"""The command line where its surroundings fail: streams, disks, signals."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import ROOT, folder, write_model  # noqa: F401  a fixture

from gptoss.cli import terminal
from gptoss.cli.commands import main
from gptoss.cli.mistakes import UsageError, tidily
from gptoss.cli.terminal import TerminalSession, obey
from gptoss.weights.config import GptOssConfig


def shell(line: str, **changes: str) -> subprocess.CompletedProcess:
    """A line for the shell, in which $G starts the program."""
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=ROOT, capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL, env=os.environ | {
            "G": f"{sys.executable} -m gptoss"} | changes)


# -- streams ----------------------------------------------------------------

@pytest.mark.parametrize(("line", "code", "out", "err"), [
    ("$G --version >&-", 2, "", "gptoss: error: stdout is closed: nobody can "
     "read the answer\n"),
    ("$G --version <&- 2>&-", 0, "0.1.0\n", ""),
    ("$G sing 2>&-", 2, "", ""),  # not on stdout instead
    ("$G sing >&- 2>&-", 2, "", ""),
    ("$G sing 2>/dev/full", 2, "", ""),
    ("$G --version >&- 2>&- <&-", 2, "", "")])
def test_a_closed_stream_is_no_traceback(line, code, out, err):
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_no_stdin_is_an_empty_one_and_a_full_disk_is_told():
    done = shell("$G generate --prompt - <&-; echo $?; $G inspect --plan "
                 ">/dev/full; echo $?")
    assert done.stdout == "2\n2\n"
    prompt, full = done.stderr.splitlines()
    assert "prompt: expected at least one token" in prompt
    assert "No space left" in full


@pytest.mark.parametrize("columns", ["0", "1", "-3", "x", "39", ""])
def test_a_terminal_that_says_it_has_no_columns(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "layout" in out and "config.vocab_size" in out
    assert out.count("\n") > 20


# -- signals ----------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_away_what_is_half_written(
        number, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    from gptoss.weights import write

    def slow(tensor):
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal did not come")

    before = signal.getsignal(number)
    monkeypatch.setattr(write.Writer, "put", lambda *_: slow(None))
    assert main(["convert", str(folder), str(tmp_path / "there"),
                 "--layout", "original"]) == 128 + number
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_what_was_ignored_stays_ignored(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("changed"))
    with tidily():
        pass


# -- memory -----------------------------------------------------------------

@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("std::bad_alloc"), None])
def test_a_lack_of_memory_is_a_line(error, monkeypatch, capsys):
    from gptoss.weights import hub

    def greedy(path):
        if error is not None:
            raise error
        torch.empty(2 ** 50, dtype=torch.uint8)

    monkeypatch.setattr(hub, "resolve", greedy)
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == "gptoss: error: not enough memory" + (
        "\n" if error is not None else f" for {2 ** 50} bytes\n")
    monkeypatch.setattr(hub, "resolve", lambda path: int("x"))
    with pytest.raises(ValueError):  # others are bugs
        main(["inspect"])


# -- /save ------------------------------------------------------------------

@pytest.fixture
def session(tmp_path, monkeypatch) -> TerminalSession:
    monkeypatch.chdir(tmp_path)
    session = TerminalSession(None, lambda text, style="": None, True)
    session.messages = [{"role": "user", "content": "né 🙂"}]
    return session


def kept(name: str) -> list:
    return json.loads(Path(name).read_text("utf-8"))


@pytest.mark.parametrize("words", [
    "/save", "/save!", "/save ~nobody-is-called-so/x", "/save a\0b",
    "/save! a\0b", "/save! .", "/save! /dev/null", "/save /dev/null",
    "/save no/such/folder", "/save! no/such/folder", "/save! loop",
    f"/save {'x' * 300}"])
def test_what_cannot_be_saved_is_told_and_the_session_goes_on(
        words, session, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    said = []
    session.draw = lambda text, style="": said.append(text)
    terminal._step(session, words)
    assert len(said) == 1 and said[0].startswith("[error] ")
    assert said[0].count("\n") == 1
    assert os.listdir() == ["loop"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert session.messages


def test_a_full_disk_keeps_the_old_file(session, monkeypatch):
    Path("talk").write_text("[1]")

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for name in ("/save! talk", "/save new", "/save! new"):
            with pytest.raises(OSError, match="No space"):
                obey(session, name)
            assert os.listdir() == ["talk"] and kept("talk") == [1]
    obey(session, "/save new")
    obey(session, "/save! talk")
    assert kept("new") == kept("talk") == session.messages


def test_what_is_replaced_keeps_its_place_and_mode(session):
    Path("real").write_text("[]")
    os.chmod("real", 0o640)
    Path("link").symlink_to("real")
    obey(session, "/save! link")
    assert os.path.islink("link") and kept("real") == session.messages
    assert stat.S_IMODE(os.stat("real").st_mode) == 0o640
    with pytest.raises(UsageError, match="link exists; /save! link replaces"):
        obey(session, "/save link")
    assert sorted(os.listdir()) == ["link", "real"]


def test_a_bug_in_a_turn_is_shown_and_the_session_goes_on(session, capsys):
    said = []
    session.draw = lambda text, style="": said.append(text)
    session.ask = lambda text: {}["a bug"]
    terminal._step(session, "hello")
    assert said == ["[error] 'a bug'\n"] and session.messages
    assert "KeyError: 'a bug'" in capsys.readouterr().err


# -- settings ---------------------------------------------------------------

@pytest.mark.parametrize("rank", ["x", "", "-1", "2", "1" * 5000, "\u0661"])
def test_a_rank_that_is_none_is_told(rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert main(["generate"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "RANK: torchrun sets it to 0 ... 1, found" in err


def test_a_process_without_a_gpu_number_is_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["generate", "--device", "cuda"]) == 2
    assert "LOCAL_RANK: torchrun sets it to 0 ... 1, found ''" \
        in capsys.readouterr().err


def test_a_plan_for_cards_that_do_not_divide_a_model(tmp_path, capsys):
    odd = GptOssConfig(
        num_hidden_layers=3, num_local_experts=3, num_experts_per_tok=2,
        vocab_size=287, hidden_size=32, intermediate_size=32, head_dim=8,
        num_attention_heads=3, num_key_value_heads=3, sliding_window=8)
    (tmp_path / "config.json").write_text(json.dumps(odd.to_hf_dict()))
    assert main(["inspect", str(tmp_path), "--plan"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.endswith("not divisible") for row in rows] \
        == [False, False, True, True] * 3
    assert main(["inspect", str(tmp_path), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)[str(tmp_path)]
    assert plan[0]["fits"] and not plan[2]["fits"]
    assert plan[2]["tensor"] is plan[2]["pipeline"] is None
    assert main(["inspect", "20b", "--plan", "--context", "1" + "0" * 400]) \
        == 2
    assert len(capsys.readouterr().err) < 200


def test_a_plan_for_the_parent_of_original(tmp_path, capsys):
    from gptoss.weights.convert import convert

    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole" / "original", "original")
    assert main(["inspect", str(tmp_path / "whole"), "--plan"]) == 0
    assert "does not" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [10 ** 22, 2 ** 63, -1])
def test_train_looks_at_its_numbers_first(seed, tmp_path, capsys):
    assert main(["train", str(tmp_path / "t"), "--seed", str(seed)]) == 2
    assert "--seed: expected 0 to" in capsys.readouterr().err
