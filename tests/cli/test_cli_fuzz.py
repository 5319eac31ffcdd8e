"""Any value of any option: an answer, or one line and exit code 2.

GPTOSS_FUZZ=N tries N times as many. Options and their kinds are read off
the table of commands, so a new one is tried as soon as it is there.
"""

import io
import os
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from test_cli import write_model

import gptoss
from gptoss.cli.commands import COMMANDS, main
from gptoss.kernels import bench
from gptoss.parity import report as walked
from gptoss.parity import vectors
from gptoss.training import pocket

ROUNDS = 40 * int(os.environ.get("GPTOSS_FUZZ", "1"))
INTS = ["0", "-1", "1", "2", "3", "7", str(2 ** 31), str(2 ** 32),
        str(2 ** 53 + 1), str(2 ** 63 - 1), str(2 ** 63), str(2 ** 64),
        str(10 ** 22), str(-10 ** 22), "1" + "0" * 400, "9" * 5000, "1_0",
        " 5", "\u0663", "\u00b2", "0x10", "", "nan", "1e3", "+2"]
FLOATS = ["0", "1", "0.5", "-0.0", "-1", "nan", "inf", "-inf", "1e-320",
          "1e-30", "1e30", "1e308", "1e400", "1,5", "", "\u0663", "1_0.5"]
TEXTS = ["a", "", " ", "-", "\n", "\0", "\udcff", "\x1b[2J", "\u202e", "x" *
         5000, "<|start|>", "<|return|>", "né 🙂", "{}", "today", ",", "20b",
         "window", "1999-13-45"]
DEVICES = ["cpu", "cpu:0", "cpu:7", "cpu:-1", "cuda", "cuda:x", "cuda:99",
           "", "CPU", "cpu ", "hpu", "ipu", "xpu", "mkldnn", "opengl",
           "opencl", "ideep", "hip", "ve", "fpga", "maia", "xla", "lazy",
           "vulkan", "mps", "meta", "mtia", "privateuseone", "cpu\0", "\udcff"]
SETTINGS = {"COLUMNS": ["0", "1", "-5", "x", "200", "1" * 30],
            "TERM": ["", "dumb", "\udcff"], "RANK": ["x", "", "-1", "9"],
            "WORLD_SIZE": ["2", "x", "", "0", "9" * 5000, "-3"],
            "LOCAL_RANK": ["x", ""], "HOME": ["", "/nowhere", "~"],
            "GPTOSS_KERNELS": ["torch"]}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """A model, and much that is none."""
    base = tmp_path_factory.mktemp("fuzz")
    model = write_model(base / "model")
    (base / "empty").mkdir()
    (base / "file").write_text("{}")
    (base / "loop").symlink_to(base / "loop")
    return [str(model)] * 12 + [
        str(base / "empty"), str(base / "file"), str(base / "loop"),
        str(base / "file" / "below"), "", ".", "/", "~", "~nobody-is-so/x",
        "a\0b", "x" * 300, "x/" * 3000, "x/y", "\udcff", "/dev/null",
        "\x1b[2J", "..", "a b/c d", "20b", "http://127.0.0.1/x"]


def value(chance: random.Random, option: str, how: dict, paths: list[str],
          there: Path) -> str:
    """Something for an option that may be right, or nearly, or not."""
    if "choices" in how and chance.random() < 0.9:
        return str(chance.choice(how["choices"]))
    if option in ("target", "folder") and chance.random() < 0.5:
        return str(there / f"new{chance.random()}")
    if option in ("--model", "path", "source", "target", "folder",
                  "--answers"):
        return chance.choice(paths)
    if option == "--device" and chance.random() < 0.9:
        return chance.choice(DEVICES)
    if option == "--repeats":  # a large number is only slow
        return chance.choice([text for text in INTS if len(text) < 4])
    kinds = {int: INTS, float: FLOATS}
    return chance.choice(kinds.get(how.get("type"), TEXTS))


def command(chance: random.Random, name: str, paths: list[str], there: Path
            ) -> list[str]:
    """A command line, of which most values make sense."""
    options = {option.name: option.how for option in COMMANDS[name].options}
    argv = [name]
    small = {"--max-new-tokens": "2", "--repeats": "1", "--new-tokens": "2",
             "--prompt-tokens": "9", "--model": paths[0], "path": paths[0],
             "--context": "9", "--steps": "1", "--prompt": "a"}
    bad = chance.sample(sorted(options), chance.choice([1, 1, 2, 3]))
    for option, how in options.items():
        if option in bad or option[0] != "-" or how.get("required"):
            given = ([] if how.get("action") == "store_true" else [
                small[option] if option in small and option not in bad
                else value(chance, option, how, paths, there)])
        elif option in small:
            given = [small[option]]
        else:
            continue
        if option[0] != "-":
            argv += given
        elif given and chance.random() < 0.5:
            argv.append(f"{option}={given[0]}")
        else:
            argv += [option, *given]
    return argv


@pytest.mark.parametrize("name", COMMANDS)
def test_any_value_of_any_option(name, paths, tmp_path, monkeypatch, capsys):
    chance = random.Random(f"{name} 1")
    if name == "chat":  # a model that knows the form of a conversation
        good = str(Path(gptoss.__file__).with_name("pocket"))
        paths = [good if path == paths[0] else path for path in paths]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pocket, "make_pocket",
                        lambda out, recipe, report: None)
    monkeypatch.setattr(bench, "read_speed", lambda: 1e9)
    monkeypatch.setattr(vectors, "write", lambda folder: [Path(folder)])
    real = walked.report  # the other references take seconds each
    monkeypatch.setattr(
        walked, "report", lambda path, against, *more, **named: real(
            path, "float64", *more, **named))
    codes = []
    for _ in range(ROUNDS):
        argv = command(chance, name, paths, tmp_path)
        said = chance.choice(TEXTS).encode("utf-8", "surrogateescape")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
            for key in chance.sample(sorted(SETTINGS), chance.choice(
                    [0, 0, 1, 2])):
                patch.setenv(key, chance.choice(SETTINGS[key]))
            shown = ([text[:60] for text in argv],
                     {key: os.environ.get(key, "")[:9] for key in SETTINGS})
            try:
                code = main(argv)
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                raise AssertionError(f"a traceback: {shown}") from error
        out, err = capsys.readouterr()
        codes.append(code)
        if code == 2:
            assert err.startswith("gptoss: error: "), shown
            assert err.count("\n") == 1 and err.endswith("\n"), shown
            assert len(err) < 12_000, shown
            assert not [char for char in err[:-1] if unicodedata.category(
                char) == "Cc"], shown
        else:
            assert code in ((0, 1) if name == "vectors" else (0,)), shown
            assert err == "", (shown, err)
            assert out, shown
    assert 0 in codes and 2 in codes  # some of them make sense
