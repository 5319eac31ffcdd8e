"""python -m gptoss: what it prints, where, and how it ends."""

import io
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_tensors
from safetensors.torch import load_file
from scripted import TOKENIZER, Scripted, called, said

import gptoss
from gptoss.chat.turn import ChatEvent
from gptoss.cli.commands import COMMANDS, build_parser, main
from gptoss.cli.mistakes import UsageError, is_mistake, printable
from gptoss.cli.terminal import drawn
from gptoss.model.transformer import GptOss
from gptoss.text.generate import complete
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import tokenizer_json
from gptoss.weights.config import GptOssConfig
from gptoss.weights.write import write_checkpoint

ROOT = Path(gptoss.__file__).parents[1]
CONFIG = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=288, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    max_position_embeddings=4096, initial_context_length=128,
    eos_token_id=287, pad_token_id=286)


def write_model(path: Path, **generation) -> Path:
    """A random model of 288 tokens that writes any bytes at all."""
    write_checkpoint(path, CONFIG, random_tensors(CONFIG, 1).items())
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {f"{n:02d}".encode(): 256 + n for n in range(30)}
    (path / "tokenizer.json").write_text(tokenizer_json(
        ranks, {286: "<|endoftext|>", 287: "<|return|>"}), "utf-8")
    (path / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [287, 286]} | generation))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """The same, but nothing stops it."""
    return write_model(tmp_path_factory.mktemp("cli") / "endless",
                       eos_token_id=[999])  # of no token


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def wanted(folder: Path, prompt: str, **options):
    return complete(
        GptOss.from_pretrained(folder, dtype=torch.float32),
        Tokenizer.from_pretrained(folder), prompt, stop=(287, 286),
        **options)


# -- generate ---------------------------------------------------------------

def test_generate_writes_the_continuation(folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "Once",
                 "--max-new-tokens", "20", "--temperature", "0",
                 "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    done = wanted(folder, "Once", max_new_tokens=20, sampler=Sampler(0))
    assert out == done.text + "\n" and len(done.text) > 5
    assert err == ""


def test_generate_json_is_one_object_with_all_fields(folder, capsys):
    args = ["generate", "--model", str(folder), "--prompt", "Once",
            "--max-new-tokens", "20", "--temperature", "0.8", "--top-k",
            "50", "--top-p", "0.9", "--seed", "5", "--dtype", "float32",
            "--json"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    done = wanted(folder, "Once", max_new_tokens=20, seed=5,
                  sampler=Sampler(0.8, 50, 0.9))
    assert found.pop("seconds") > 0
    # torch alone is larger than 50 MiB
    assert found.pop("peak_rss_bytes") > 50 * 2 ** 20
    assert found == {"prompt_tokens": done.prompt_tokens,
                     "tokens": done.tokens, "text": done.text,
                     "finish_reason": done.finish_reason}
    assert done.prompt_tokens == list(b"Once")
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == done.tokens
    assert main([*args, "--seed", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] != done.tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_generate_in_every_dtype(folder, capsys, dtype):
    assert main(["generate", "--model", str(folder), "--prompt", "a",
                 "--max-new-tokens", "3", "--dtype", dtype, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]


def test_prompt_from_stdin(folder, capsys, monkeypatch):
    def run(data: bytes):
        stdin = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main(["generate", "--model", str(folder), "--prompt", "-",
                     "--max-new-tokens", "1", "--json"])
        return code, capsys.readouterr()

    code, (out, _) = run("né\n".encode())
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == list("né".encode())
    code, (out, err) = run(b"ok \xff")
    assert code == 2 and out == ""
    assert err == ("gptoss: error: --prompt -: stdin is not UTF-8 (invalid "
                   "start byte at byte 3)\n")


def test_a_typed_control_token_stays_text(folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt",
                 "<|return|>", "--max-new-tokens", "1", "--json"]) == 0
    ids = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert ids == list(b"<|return|>")


def test_terminal_sees_prompt_and_no_control_characters(
        endless, monkeypatch, capsys):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    # every byte is a token: among 250 some are control characters
    assert main(["generate", "--model", str(endless), "--prompt",
                 "a\x1b[2J", "--max-new-tokens", "250", "--seed", "0"]) == 0
    shown = screen.getvalue()
    assert shown.startswith("a\u241b[2J")
    assert not [c for c in shown if unicodedata.category(c) == "Cc"
                and c not in "\n\t"]
    assert any("\u2400" <= c <= "\u2421" for c in shown[5:])


def test_pipe_gets_the_bytes_as_they_are(endless, capsys):
    args = ["generate", "--model", str(endless), "--prompt", "a",
            "--max-new-tokens", "250", "--seed", "0"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == text
    assert any(unicodedata.category(c) == "Cc" and c not in "\n\t"
               for c in text)


@settings(deadline=None, max_examples=300)
@given(st.text(), st.text())
def test_printable_is_harmless_and_works_piece_by_piece(one, two):
    shown = printable(one + two)
    assert shown == printable(one) + printable(two)
    assert len(shown) == len(one + two)
    assert not set(shown) & {chr(c) for c in (*range(9), *range(11, 32),
                                              *range(127, 160), 0x202E)}
    assert printable(shown) == shown


def test_printable_leaves_ordinary_text_alone():
    text = "né 中文 🙂 a\tb\nc \u200d \u00ad"
    assert printable(text) == text


# -- chat -------------------------------------------------------------------

@pytest.fixture
def script(monkeypatch):
    """Makes the command's model write what is scripted."""
    from gptoss.cli import commands

    def use(*rounds: str) -> None:
        monkeypatch.setattr(
            commands, "load_pair", lambda *_: (Scripted(*rounds), TOKENIZER))
    return use


GREEDY = ["chat", "--temperature", "0"]


def test_chat_json_is_one_object(script, capsys):
    script(called("calculator", '{"expression": "6*7"}'), said("42", "ok"))
    assert main([*GREEDY, "--prompt", "6*7?", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    assert [m["role"] for m in found["messages"]] == [
        "assistant", "tool", "assistant"]
    assert found["messages"][-1] == {
        "role": "assistant", "content": "42", "reasoning": "ok"}
    assert found["finish_reason"] == "stop" and found["seconds"] > 0
    assert found["prompt_tokens"] < found["prefilled_tokens"]
    assert found["generated_tokens"] > 40


def test_chat_writes_the_answer_or_the_whole_transcript(script, capsys,
                                                        monkeypatch):
    rounds = called("calculator", '{"expression": "6*7"}'), said("42", "ok")
    script(*rounds)
    assert main([*GREEDY, "--prompt", "6*7?"]) == 0
    assert capsys.readouterr() == ("42\n", "")
    script(*rounds)
    stdin = io.TextIOWrapper(io.BytesIO(b"6*7?\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main([*GREEDY, "--transcript"]) == 0
    assert capsys.readouterr() == (
        '> 6*7?\n[calculator] {"expression": "6*7"}\n[result] 42\n'
        "[analysis] ok\n42\n", "")


def test_chat_options_reach_the_prompt(script, capsys, monkeypatch):
    from gptoss.chat import chat

    prompts = []
    render = chat.render

    def spy(*args, **options):
        prompts.append(TOKENIZER.decode(render(*args, **options)))
        return render(*args, **options)

    monkeypatch.setattr(chat, "render", spy)
    for more in (["--tools", "today"], ["--no-tools", "--system", "Be kind.",
                                        "--effort", "low", "--date", ""]):
        script(said("x"))
        assert main([*GREEDY, "--prompt", "a", *more]) == 0
    assert "type today" in prompts[0] and "calculator" not in prompts[0]
    assert "Reasoning: medium" in prompts[0]
    assert "Current date: 20" in prompts[0]
    assert "# Tools" not in prompts[1] and "Reasoning: low" in prompts[1]
    assert "# Instructions\n\nBe kind." in prompts[1]
    assert "Current date" not in prompts[1]


def test_chat_stdin_must_be_utf8(script, capsys, monkeypatch):
    script(said("one"))
    stdin = io.TextIOWrapper(io.BytesIO(b"good\nbad \xff\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(GREEDY) == 2
    out, err = capsys.readouterr()
    assert out == "one\n"
    assert err == ("gptoss: error: stdin is not UTF-8 in line 2 (invalid "
                   "start byte)\n")


def test_chat_interrupted_in_a_script_is_130(script, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    script(said("one"))
    monkeypatch.setattr(Scripted, "forward", interrupted)
    assert main([*GREEDY, "--prompt", "a"]) == 130
    assert capsys.readouterr().err == ""


def test_chat_needs_a_model_that_speaks_harmony(folder, capsys):
    assert main(["chat", "--model", str(folder), "--prompt", "a"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "control tokens" in err


def test_drawn_lines_are_whole():
    def text(*kinds: str, everything: bool = True) -> str:
        return "".join(piece for piece, _ in drawn(
            [ChatEvent(kind, f"{kind} text", "tool") for kind in kinds],
            everything))

    assert text("analysis", "analysis", "final", "done") == (
        "[analysis] analysis textanalysis text\nfinal text\n")
    assert text("call", "result", "call", "notice") == (
        "[tool] call text\n[result] result text\n[tool] call text\n"
        "[notice] notice text\n")
    assert text("analysis", "final", everything=False) == "final text\n"
    assert text("analysis", everything=False) == "\n" and text() == ""


# -- inspect and convert ----------------------------------------------------

def test_inspect_reads_no_weights(folder, capsys, monkeypatch):
    from gptoss.weights import checkpoint

    def never(*args, **options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint.Checkpoint, "read", never)
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().err == ""


def test_inspect_lists_each_tensor(folder, capsys):
    from gptoss.weights.layout import tensor_table

    assert main(["inspect", "--tensors", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = tensor_table(CONFIG)
    assert len(lines) == len(table)
    for line, spec in zip(lines, table.values(), strict=True):
        assert spec.name in line and f"{spec.nbytes:,}" in line


def test_inspect_without_a_path_is_the_shipped_one(capsys):
    assert main(["inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_total"] == 2313408


def test_inspect_says_what_the_issue_asks_for(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    for words in ("hf, 41 tensors in 1 file", "bytes in the file",
                  "parameters a token uses", "weight bytes read for a token",
                  "cache bytes a token adds", "config.num_hidden_layers",
                  "kernels on a CPU",
                  "1 full_attention, 1 sliding_attention"):
        assert words in text
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = load_file(folder / "model.safetensors")
    assert report["bytes"] == sum(t.nbytes for t in stored.values())
    assert report["tensors"] == len(stored) == 41
    assert report["parameters_total"] == sum(
        t.numel() * (2 if name.endswith("_blocks") else 1)
        for name, t in stored.items() if not name.endswith("_scales"))
    assert report["kernels"]  # in words: a path, or why there is none
    # keys and values of the one full layer, in bf16
    assert report["cache_bytes_per_token"] == 2 * 2 * 2 * 8


def test_convert_there_and_back(folder, tmp_path, capsys):
    there, back = tmp_path / "original", tmp_path / "hf"
    assert main(["convert", str(folder), str(there),
                 "--layout", "original"]) == 0
    assert main(["convert", str(there), str(back), "--layout", "hf"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    for name, tensor in GptOss.from_pretrained(folder).state_dict().items():
        other = GptOss.from_pretrained(back).state_dict()[name]
        assert torch.equal(tensor, other), name


def test_train_hands_over_its_recipe(tmp_path, capsys, monkeypatch):
    from gptoss.training import pocket, train

    found = []

    def make(out, recipe, report):
        found.append((out, recipe))
        for step in range(recipe.steps):
            report({"step": step, "loss": 1.5, "seconds": 2.0})

    monkeypatch.setattr(pocket, "make_pocket", make)
    target, whole = tmp_path / "new", train.Recipe()
    assert main(["train", str(target), "--steps", "30", "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-2] == "step 30 of 30, loss 1.500, 2 s"
    assert out.endswith(f"written to {target}\n") and err == ""
    assert main(["train", str(target)]) == 0
    (there, short), (_, full) = found
    assert there == target and full == whole
    assert (short.seed, short.steps) == (5, 30)
    # looked at before any work
    capsys.readouterr()
    assert main(["train", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "a" / "b")]) == 2
    assert main(["train", str(tmp_path / "c"), "--steps", "0"]) == 2
    assert len(found) == 2


# -- options ----------------------------------------------------------------

@pytest.mark.parametrize("argv, why", [
    ([], "arguments are required: COMMAND"),
    (["sing"], "invalid choice: 'sing'"),
    (["generate", "--loud"], "unrecognized arguments: --loud"),
    (["generate", "--top-k", "x"], "--top-k: invalid int value: 'x'"),
    (["generate", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["generate", "--temperature", "-1"], "temperature: expected"),
    (["generate", "--temperature", "nan"], "temperature: expected"),
    (["generate", "--top-p", "0"], "top_p: expected"),
    (["generate", "--top-p", "1.5"], "top_p: expected"),
    (["generate", "--top-k", "-3"], "top_k: expected"),
    (["generate", "--device", "toaster"], "--device toaster: "),
    (["generate", "--device", "cuda:99"], "--device cuda:99: "),
    (["generate", "--device", "meta"], "--device meta: "),
    (["chat", "--json"], "--json: needs --prompt"),
    (["chat", "--tools", "a,today"], "--tools: expected calculator, today"),
    (["chat", "--effort", "all"], "--effort: invalid choice: 'all'"),
    (["chat", "--prompt", "a", "--max-new-tokens", "0"],
     "max_new_tokens: expected an integer >= 1"),
    (["chat", "--prompt", "a", "--seed", "-1"], "seed: expected"),
    (["chat", "--prompt", "a", "--top-p", "2"], "top_p: expected"),
    (["chat", "--prompt", "a\udcff"], "messages[0].content: expected Unic"),
    (["chat", "--prompt", "a", "--device", "meta"], "--device meta: "),
    (["chat", "--prompt", "a", "--model", "./none"], "./none: no such"),
    (["convert", "a"], "arguments are required: TARGET, --layout"),
    (["convert", "a", "b", "--layout", "gguf"], "invalid choice: 'gguf'"),
])
def test_bad_options_give_one_line_and_2(argv, why, capsys):
    if argv[:1] == ["generate"]:
        argv = [*argv, "--prompt", "a"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("gptoss: error: ") and why in err


@pytest.mark.parametrize("option, value, why", [
    ("--max-new-tokens", "0", "max_new_tokens: expected"),
    ("--seed", "-1", "seed: expected"),
    ("--prompt", "", "prompt: expected at least one token"),
    ("--prompt", "x" * 4097, "max_position_embeddings is 4096"),
    ("--prompt", "a\udcff", "U+DCFF at index 1"),
])
def test_bad_values_are_named(folder, capsys, option, value, why):
    assert main(["generate", "--model", str(folder), "--prompt", "a",
                 option, value]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and why in err


def test_an_error_is_one_line_without_control_characters(capsys):
    assert main(["inspect", "no\nsuch\x1b[2J"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("gptoss: error: ")
    assert "\x1b" not in err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(path):
        raise KeyError("a bug")

    from gptoss.weights import checkpoint, hub
    monkeypatch.setattr(checkpoint, "describe", broken)
    monkeypatch.setattr(hub, "resolve", lambda path: path)
    with pytest.raises(KeyError, match="a bug"):
        main(["inspect", "anything"])


def test_ctrl_c_is_130_and_quiet(monkeypatch, capsys):
    from gptoss.weights import hub

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "resolve", interrupted)
    assert main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err == ""


def test_every_error_of_the_package_is_told_in_a_line():
    """Whatever class a module refuses with, by the one they derive from."""
    found = 0
    for info in pkgutil.walk_packages(gptoss.__path__, "gptoss."):
        if info.name.endswith(("__main__", "triton_kernels")):
            continue
        module = import_module(info.name)
        for name, value in vars(module).items():
            if name.endswith("Error") and value.__module__ == module.__name__:
                assert is_mistake(value("no")), name
                found += 1
    assert found > 10
    assert is_mistake(torch.OutOfMemoryError("no"))
    assert not is_mistake(ValueError("a bug"))


def test_the_table_names_functions_and_says_what_they_say():
    for name, row in COMMANDS.items():
        module, _, function = row.target.partition(":")
        run = getattr(import_module(module), function)
        assert run.__doc__ == row.about and function == f"run_{name}"


def test_parser_itself_raises_usage_errors():
    with pytest.raises(UsageError):
        build_parser().parse_args(["--nonsense"])


# -- the real process -------------------------------------------------------

def start(*args: str, **options) -> subprocess.Popen:
    """`python -m gptoss` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "gptoss", *args], cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell may have started the tests with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options)


def test_version_help_and_mistake_need_no_torch():
    code = ("import sys; from gptoss.cli.commands import main\n"
            "try: main(['--help'])\nexcept SystemExit as e: print(e.code)\n"
            "print(main(['generate', '--no']), main(['convert']))\n"
            "print([m for m in ('torch', 'transformers', 'rich')"
            " if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-3:] == ["0", "2 2", "[]"]
    assert done.stderr.count("\n") == 2
    process = start("--version")
    assert process.communicate(timeout=60)[0].decode().strip() \
        == gptoss.__version__


def test_package_offers_its_names():
    code = ("import gptoss, sys; assert 'torch' not in sys.modules\n"
            "from gptoss import Chat, GptOss, GptOssConfig, Tokenizer, mxfp4\n"
            "gptoss.model.cache.Cache; gptoss.text.sampling.Sampler\n"
            "assert gptoss.harmony.Tokenizer is Tokenizer is not None\n"
            "gptoss.mxfp4, gptoss.checkpoint, gptoss.kernels, gptoss.chat\n"
            "assert 'transformers' not in sys.modules\n"
            "assert {'Chat', 'GptOss', 'mxfp4'} <= set(dir(gptoss))\n"
            "try: gptoss.nothing\nexcept AttributeError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() == "module 'gptoss' has no attribute 'nothing'"


def test_a_terminal_that_is_not_utf8(endless):
    process = subprocess.run(
        [sys.executable, "-m", "gptoss", "generate", "--model", str(endless),
         "--prompt", "a", "--max-new-tokens", "60"], cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True,
        timeout=60)
    assert process.returncode == 0 and process.stderr == b""
    assert process.stdout.isascii() and b"\\ufffd" in process.stdout


def test_interrupted_process_ends_130_without_a_word(endless):
    process = start("generate", "--model", str(endless), "--prompt", "a",
                    "--max-new-tokens", "4000")
    assert process.stdout.read(1)  # the first text is out
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""


def test_closed_pipe_ends_141_without_a_word(endless):
    process = start("generate", "--model", str(endless), "--prompt", "a",
                    "--max-new-tokens", "4000")
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert process.returncode == 141 and err == b""


def test_vectors_are_written_and_checked(tmp_path, capsys):
    folder = tmp_path / "set"
    assert main(["vectors", "write", str(folder)]) == 0
    capsys.readouterr()
    assert main(["vectors", "check", str(folder)]) == 0
    assert capsys.readouterr() == ("every case passes\n", "")
    next(folder.glob("*.safetensors")).unlink()
    assert main(["vectors", "check", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


def test_parity_finds_nothing_until_something_is_planted(capsys):
    argv = ["parity", "--against", "float64", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--plant", "window"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["findings"]
    assert main([*argv, "--plant", "nonsense"]) == 2


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None, reason="no c++")
def test_parity_judges_the_kernels_unless_told_otherwise():
    """As `generate` computes, in bf16; --plain asks for the other path."""
    argv = ("parity", "--against", "float64", "--json")
    contracts = []
    for more in ((), ("--plain",)):
        done = with_kernels(*argv, *more, GPTOSS_KERNELS="auto")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["findings"] == [] and found["dtype"] == "bfloat16"
        assert (found["kernels"] == "plain torch") == ("--plain" in more)
        contracts.append(found["contract"])
    assert contracts == ["kernels", "fp32"]


@pytest.mark.parametrize("argv", [
    ["--contract", "kernels"], ["--compact"], ["--dense", "8"],
    ["--plain", "--contract", "kernels"],
    ["--contract", "kernels", "--dtype", "float32"]])
def test_kernels_that_cannot_be_judged_are_one_line(argv, capsys):
    """Here, where GPTOSS_KERNELS declines them."""
    assert main(["parity", "--against", "float64", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "kernels" in err


def test_parity_walks_each_prompt(capsys):
    argv = ["parity", "--against", "float64", "--new-tokens", "2",
            "--prompt", "Once upon a time", "--prompt", "The \x1b fox saw it"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == ["Once upon a time", "The \x1b fox saw it"]
    one, two = found["reports"]
    assert one["tokens"] != two["tokens"] and one["rows"] != two["rows"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.count("2 tokens written") == 2 and "\x1b" not in text
    assert main([*argv, "--prompt", ""]) == 2


def test_bench_measures_what_it_says(capsys):
    argv = ["bench", "--prompt-tokens", "32", "--new-tokens", "4"]
    assert main([*argv, "--repeats", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("load_seconds", "peak_rss_bytes", "time_to_first_token",
                "prefill_tokens_per_second", "decode_tokens_per_second",
                "bytes_per_token", "read_bandwidth_share"):
        assert found[key] > 0
    for part in ("prefill", "decode"):
        middle = found[f"{part}_tokens_per_second"]
        around = found[f"{part}_tokens_per_second_spread"]
        assert around["low"] <= middle <= around["high"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    (decode,) = (line for line in lines if "decode_tokens" in line)
    assert re.search(r"[0-9.,]+  \([0-9.,]+ to [0-9.,]+\)$", decode)
    assert len(lines) == len(found) - 2  # a spread stands with its median


@pytest.mark.parametrize(("options", "words"), [
    (["--new-tokens", "1"], "--new-tokens >= 2, found 512 and 1"),
    (["--new-tokens", "1537"],
     "--new-tokens: the model's context holds 2048 tokens, found 512 of "
     "prompt and 1537 new ones"),
    (["--prompt-tokens", "2048"], "--prompt-tokens: the model's context"),
    (["--repeats", "0"], "--repeats: expected >= 1, found 0")])
def test_bench_refuses_what_it_cannot_measure(options, words, capsys):
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


# -- drafts ----------------------------------------------------------------

@pytest.mark.parametrize("command", [
    ["generate", "--max-new-tokens", "20"],
    ["chat", "--prompt", "My cat is called Zorali.", "--date", ""]])
def test_drafts_write_the_same(command, capsys):
    from gptoss.cli.options import POCKET

    texts = []
    for more in ([], ["--draft", "lookup"], ["--draft", str(POCKET)]):
        assert main([*command, "--temperature", "0", "--dtype", "float32",
                     *more]) == 0
        texts.append(capsys.readouterr())
    assert texts[0] == texts[1] == texts[2] and texts[0].out.strip()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_drafts_that_are_none(command, folder, tmp_path, capsys, monkeypatch):
    def told(draft):
        assert main([command, "--prompt", "x", "--draft", draft]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "no such directory" in told("look-up")
    assert str(tmp_path) in told(str(tmp_path))
    assert "--draft" in (err := told(str(folder))) and "vocabulary" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--draft: with torchrun only lookup" in told(str(folder))


# -- the kernels -----------------------------------------------------------

@pytest.mark.parametrize("command", [
    ["generate", "--dtype", "float32"], ["generate", "--dtype", "float16"],
    ["chat", "--prompt", "x", "--stages", "2"], ["bench", "--stages", "2"]])
def test_compact_is_for_one_process_on_a_cpu_in_bf16(command, capsys):
    for how in (["--compact"], ["--dense", "12"], ["--dense", "8"],
                ["--activations", "8"]):
        assert main([*command, *how]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "--dense and --compact: for one process" in err
        assert err.count("\n") == 1


def test_dense_matrices_have_sixteen_twelve_or_eight_bits(capsys):
    assert main(["generate", "--dense", "4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--dense" in err and "16, 12, 8" in err


def test_eight_bits_write_and_are_counted():
    """--compact is --dense 12; eight bits read fewer bytes than that."""
    write = ("generate", "--temperature", "0", "--max-new-tokens", "20")
    done = [with_kernels(*write, *more, GPTOSS_KERNELS="auto")
            for more in (["--dense", "12"], ["--compact"], ["--dense", "8"])]
    assert all(each.returncode == 0 and each.stdout for each in done), done
    assert done[0].stdout == done[1].stdout
    plain = with_kernels(*write, "--dense", "8", GPTOSS_KERNELS="torch")
    assert plain.stderr.startswith("gptoss: matrices stay in sixteen bits")
    if done[2].stderr.startswith("gptoss: matrices stay"):
        return  # no kernels here
    size = [json.loads(with_kernels(
        "bench", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats",
        "1", "--json", "--dense", bits, GPTOSS_KERNELS="auto").stdout
        )["bytes_per_token"] for bits in ("16", "12", "8")]
    assert size[0] >= size[1] > size[2]


def test_compact_writes_the_same():
    """With kernels where there are some, in words where there are none."""
    write = ("generate", "--temperature", "0", "--max-new-tokens", "20")
    done = [with_kernels(*write, *more, GPTOSS_KERNELS="auto")
            for more in ([], ["--compact"])]
    assert done[0].returncode == done[1].returncode == 0
    assert done[0].stdout == done[1].stdout != ""
    plain = with_kernels(*write, "--compact", GPTOSS_KERNELS="torch")
    assert plain.stderr.startswith("gptoss: matrices stay in sixteen bits")
    chat = [with_kernels("chat", "--prompt", "What is 2 + 3?", "--temperature",
                         "0", "--json", *more, GPTOSS_KERNELS="auto")
            for more in ([], ["--compact"])]
    texts = [json.loads(each.stdout)["messages"] for each in chat]
    assert texts[0] == texts[1]


def with_kernels(*argv, **changes):
    """A command as a user runs it: the tests alone ask for plain torch."""
    return subprocess.run(
        [sys.executable, "-m", "gptoss", *argv], capture_output=True,
        text=True, timeout=280, env=os.environ | changes)


WRITE = ("generate", "--max-new-tokens", "4", "--seed", "1", "--json")


def test_without_a_compiler_one_line_says_so_and_text_comes(tmp_path):
    done = with_kernels(*WRITE, GPTOSS_KERNELS="auto", CXX="no-such-compiler",
                        XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) == 4
    assert done.stderr.count("\n") == 1
    assert "no kernels" in done.stderr and "no-such-compiler" in done.stderr


def test_the_first_use_says_on_stderr_that_it_compiles(tmp_path):
    """The stand-in for a compiler fails: that is told as well."""
    argv = ("chat", "--prompt", "Hi", "--max-new-tokens", "2", "--json")
    done = with_kernels(*argv, GPTOSS_KERNELS="auto", CXX="false",
                        XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0
    assert json.loads(done.stdout)["generated_tokens"] == 2
    compiling, failed = done.stderr.splitlines()
    assert compiling.startswith("gptoss: compiling the kernels, once")
    assert failed.startswith("gptoss: no kernels, plain torch is used")


def test_a_mistake_is_told_before_anything_is_compiled(tmp_path):
    argvs = [[*command, "./nothing"] for command in (
        ("generate", "--prompt", "a", "--model"),
        ("chat", "--prompt", "a", "--model"), ("bench",))]
    done = subprocess.run(
        [sys.executable, "-c", "from gptoss.cli.commands import main\n"
         f"print([main(argv) for argv in {argvs}])"],
        capture_output=True, text=True, timeout=280,
        env=os.environ | {"GPTOSS_KERNELS": "auto", "CXX": "false",
                          "XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout == "[2, 2, 2]\n" and done.stderr.count("\n") == 3
    assert "compiling" not in done.stderr
