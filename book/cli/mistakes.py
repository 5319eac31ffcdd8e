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
#     module: mistakes
#     public: [UsageError, printable]
# ---

# %% [markdown]
# # What does a program owe to somebody who mistypes?
#
# ## Question
#
# Somebody mistypes a path. The
# [Python interface](../model/transformer.ipynb) answers with a traceback, of
# which one line is of use. And somebody reads what a model has written. Four
# characters, `ESC [ 2 J`, clear their screen, and a model is free to write
# them. What does a program owe to both?
#
# The command line takes four chapters. This one tells mistakes in one line
# (`mistakes`) and says what options mean (`options`).
# [The next](terminal.ipynb) holds a conversation in a terminal. Then come
# [commands that print tables](tables.ipynb) and [the rest](commands.ipynb)
# with the list of them all.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: six rows, what happened: done, a check found a fault, a mistake of
# the user, a bug, Ctrl-C, another signal; for each the exit code and what
# stands on stdout and stderr. Only a mistake has exactly one line on stderr.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
ROWS = [("it worked", "0", "the answer", "nothing", "C2"),
        ("a check found a fault", "1", "what it found", "nothing", "C1"),
        ("you mistyped something", "2", "nothing", "one line", "C1"),
        ("the program has a bug", "1", "", "a traceback", "C5"),
        ("Ctrl-C", "130 = 128 + 2", "what came so far", "nothing", "0.5"),
        ("nobody reads stdout", "141 = 128 + 13", "", "nothing", "0.5"),
        ("told to end", "143 = 128 + 15", "what came so far", "nothing",
         "0.5")]
HEADS = ("what happened", "exit code", "on stdout", "on stderr")
X = (0, 32, 56, 82)
fig, ax = plt.subplots(figsize=(7, 2.6))
for x, head in zip(X, HEADS, strict=True):
    ax.text(x, 0.9, head, weight="bold", fontsize=8.5)
for n, (*texts, colour) in enumerate(ROWS):
    ax.barh(-n + 0.15, 102, 0.86, -1, color=colour, alpha=0.2)
    for x, text in zip(X, texts, strict=True):
        ax.text(x, -n, text, fontsize=8.5)
ax.set(xlim=(-1, 101), ylim=(-len(ROWS) + 0.6, 1.4))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: a script that calls the program can tell the cases apart by the
# code alone, and a person finds one line where a mistake is their own. Only a
# bug, which they cannot mend, keeps its traceback: hiding it would make it
# harder to report.

# %% [markdown]
# ## The naive version
#
# Call the library, let Python report what goes wrong.

# %%
import contextlib
import io
import traceback

from gptoss.model.transformer import GptOss

try:
    GptOss.from_pretrained("./no-such-folder")
except Exception:
    report = traceback.format_exc().splitlines()
files = sum(line.lstrip().startswith('File "') for line in report)
print(f"{files} places in files, and then:")
print(report[-1].partition(": ")[2])
story = "Once \x1b[2Jupon a time"
print("for the terminal:", [char for char in story if ord(char) < 32])

# %% [markdown]
# The reader of a traceback has to know that the last line is the message.
# And `print(story)` on a terminal would clear the screen: `\x1b[2J` is an
# instruction to it. Worse ones exist, which retitle windows, forge links or
# write to the clipboard, and a model can be led to emit them by any text
# that it is given to read.

# %% [markdown]
# ## The twenty lines
#
# What we owe is little. Catch what the package refuses, say it in a line, give
# 2. And show control characters instead of sending them:

# %%
from gptoss.weights.errors import Error


def shown(text: str) -> str:
    """`text` without the characters that a terminal obeys."""
    return "".join(char if ord(char) >= 32 or char in "\n\t"
                   else chr(0x2400 + ord(char)) for char in text)


def plainly(command, *typed: str) -> int:
    """Runs a command; its exit code."""
    try:
        print(shown(command(*typed)))
        return 0
    except (Error, OSError) as error:
        print("gptoss: error:", shown(str(error)))
        return 2
    except KeyboardInterrupt:
        return 130


print(plainly(lambda path: str(GptOss.from_pretrained(path)), "./no-such"))
print(plainly(lambda: story))

# %% [markdown]
# The rest of the chapter is what these lines forget: more characters than 32,
# errors that are neither ours nor a bug, streams that are closed, signals, and
# several processes that make one mistake together.

# %% [markdown]
# ## Derivation
#
# **Exit codes.** A shell needs these kept apart: it worked, a check failed,
# what you asked for is wrong, a signal ended it. Shells report a signal as 128
# plus its number; Ctrl-C is signal 2. So
#
# $$ \text{code} = \begin{cases} 0 & \text{done} \\
#    1 & \texttt{parity}\text{ or }\texttt{vectors}\text{ found a fault} \\
#    2 & \text{wrong argument or file} \\
#    128 + 2 = 130 & \text{Ctrl-C (SIGINT)} \\
#    128 + 13 = 141 & \text{nobody reads stdout (SIGPIPE)} \\
#    128 + 15 = 143 & \text{told to end (SIGTERM)}
#    \end{cases} $$ (cli-codes)
#
# With 2 goes one line on stderr. What is neither an error that a module of
# this package declares nor one of the machine's (a file, memory) is a bug, and
# Python gives 1 with its traceback.
#
# **Harmless text.** A terminal obeys characters of Unicode category Cc:
# 32 below the space, DEL, and 32 more from U+0080 on, called C1. Nine others,
# U+202A to U+202E and U+2066 to U+2069, turn the writing direction and can
# make a line read as something else. We map each to a visible one-character
# picture, newline and tab excepted. ESC is number 27, so it becomes U+241B:
#
# $$ v(c) = \begin{cases}
#    \text{U+2400} + c & c < 32 \\ \text{U+2421} & c = 127 \\
#    \text{U+FFFD} & \text{C1, direction} \\ c & \text{else} \end{cases}
#    $$ (cli-visible)
#
# This acts on one character at a time. So it can be applied to a stream
# however that is cut; a filter that removes whole escape sequences cannot.

# %% [markdown]
# ## Code
#
# ### Which text cannot be obeyed?

# %% tags=["export"]
import argparse
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from gptoss.weights.errors import Error
from gptoss.parallel.launch import launched, process_rank

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class UsageError(Error):
    """What the command line itself says cannot be done."""


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with control characters made visible, so that a terminal
    obeys none of them: ESC becomes U+241B and so on; C1 and the ones that
    turn the writing direction become U+FFFD. Those in `keep` stay."""
    def show(char: str) -> str:
        code = ord(char)
        if char in keep or not (unicodedata.category(char) == "Cc"
                                or char in BIDI):
            return char
        if code < 32:
            return chr(0x2400 + code)
        return "\u2421" if code == 127 else "\ufffd"
    return "".join(map(show, text))


def shortened(value: object) -> str:
    """A value as a message may show it: nobody reads 400 digits."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"

# %%
print(shortened(7 ** 500))
print(printable(story), printable("bell \x07, tab \t, delete \x7f, \x9b2J"))

# %% [markdown]
# ### What is told in one line?
#
# argparse, Python's reader of command lines, ends the process by itself when
# an option is wrong. Ours raises, so that all mistakes go one way:

# %% tags=["export"]
class Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr and exit 2 for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

# %%
try:
    Parser(prog="gptoss").parse_args(["--loud"])
except UsageError as error:
    print(error)

# %% [markdown]
# A mistake is what this package refuses (all its errors are one class), what
# the system refuses (a file, memory), and nothing else. That memory is lacking
# is said in three ways, one of them a RuntimeError like any other.

# %% tags=["export"]
def lacks_memory(error: BaseException) -> bool:
    """Whether there was not enough of it: torch's allocator for the CPU
    says so by a RuntimeError like any other."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("allocate memory|bad_alloc", str(error)) is not None)


def is_mistake(error: BaseException) -> bool:
    """Whether `error` is told in one line. Others are bugs: a traceback.

    If torch was never imported, it has raised nothing, and is not imported
    here: a wrong option answers at once.
    """
    torch_lacks = getattr(sys.modules.get("torch"), "OutOfMemoryError", Error)
    return (isinstance(error, (Error, OSError, torch_lacks))
            or lacks_memory(error))


def reason(error: BaseException) -> str:
    """What `error` says, in one line that a terminal cannot obey."""
    line = printable(" ".join(str(error).split()), keep="")
    if lacks_memory(error):
        asked = re.search(r"[0-9]+ bytes", line)
        return f"not enough memory{f' for {asked[0]}' if asked else ''}"
    return line or type(error).__name__

# %%
from gptoss.weights.config import ConfigError

print(is_mistake(ConfigError("rope_type")), is_mistake(KeyError("a bug")))
greedy = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. Default"
                      "CPUAllocator: can't allocate memory: you tried to "
                      "allocate 68719476736 bytes. Error code 12")
print(is_mistake(greedy), reason(greedy), reason(MemoryError()), sep="\n")

# %% [markdown]
# ### What if a stream is closed?
#
# A program can be started with a standard stream closed (`gptoss inspect
# >&-`, some service managers). Python then has None in its place, and the
# system gives its number to the next file that is opened, into which any
# library that writes to "number 2" would write. So the hole is filled first.
# No stdin is an empty one; whoever closes stderr wants no complaints; but an
# answer that nobody can read is refused.

# %% tags=["export"]
def fill_streams() -> list[str]:
    """Opens the null device for each closed standard stream: their names."""
    closed = [name for name in ("stdin", "stdout", "stderr")
              if getattr(sys, name) is None]
    for name in closed:
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    return closed


def drop_stdout() -> None:
    """If stdout cannot be written to, what it still holds goes nowhere: the
    interpreter flushes it once more when it exits, and would complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # no file, but a test's stream
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def complain(error: BaseException) -> None:
    """One line on stderr, if there is one that can be written to."""
    where = ""
    if process_rank():
        time.sleep(5)  # the first process says it, if it can
        where = f"process {process_rank()}: "
    with suppress(OSError, ValueError):
        print(f"gptoss: error: {where}{reason(error)}", file=sys.stderr,
              flush=True)

# %%
kept, sys.stderr = sys.stderr, None
print(fill_streams(), sys.stderr.write("a complaint"))
sys.stderr.close()
sys.stderr = kept

# %% [markdown]
# ### What if the program is told to end?
#
# Ctrl-C is an exception, so what is half written is taken away by the
# `finally` of whoever writes it. SIGTERM (a shutdown, `timeout`, a container
# that stops) and SIGHUP (the terminal is gone) would end the process on the
# spot. For the commands that write for minutes they are made an exception
# too.

# %% tags=["export"]
class Ended(BaseException):
    """A signal, its number in args[0]; no `except Exception` stops it."""


@contextmanager
def tidily() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Ended instead of ending at once;
    where they were ignored (nohup) or handled they still are."""
    def end(number: int, frame: object) -> NoReturn:
        raise Ended(number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main_thread = threading.current_thread() is threading.main_thread()
    changed = [number for number in map(signal.Signals.__getitem__, names)
               if main_thread and signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)

# %%
try:
    with tidily():
        signal.raise_signal(signal.SIGTERM)
except Ended as ended:
    print("exit code", 128 + ended.args[0])

# %% [markdown]
# ### Who speaks for several processes?
#
# Under `torchrun` the same command runs in every process, and the model is
# [split](../parallel/splitting.ipynb) among them. The first one alone reads
# stdin, draws the seed and prints; what it read and drew, the others are told,
# so that all compute the same tokens. A mistake is told once: the others wait
# five seconds before they say what the first may be saying, and by then
# `torchrun` has usually ended them.

# %% tags=["export"]
def torchrun_number(name: str, size: int | None = None) -> int:
    """A number that torchrun has put into the environment, and which is to
    be below `size`; -1 for anything else."""
    text = os.environ.get(name, "")
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if size is not None and not 0 <= number < size:
        raise UsageError(f"{name}: torchrun sets it to 0 ... {size - 1}, "
                         f"found {text!r}")
    return number


def agreed(args: argparse.Namespace, make: Callable[[], Any]) -> Any:
    """make(), as the first process finds it."""
    if launched() == 1:
        return make()
    from gptoss.parallel.collectives import join

    kind = getattr(args, "device", "cpu").partition(":")[0]
    return join(kind).same(make)

# %%
alone = argparse.Namespace()
print(launched(), "process, and its number is", process_rank())
print(agreed(alone, lambda: "what was typed"))

# %% [markdown]
# ### What the options mean
#
# An option is written down once, in the words of argparse, and handed to each
# command that has it.

# %% tags=["export:options"]
import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptoss
from gptoss.parallel.launch import launched


if TYPE_CHECKING:
    import torch

    from gptoss.model.transformer import GptOss
    from gptoss.text.sampling import SamplingOptions
    from gptoss.text.tokenizer import Tokenizer

POCKET = Path(gptoss.__file__).parent / "pocket"
FIRST_WORDS = "Once upon a time"


class Option:
    """One argument of a command: its name, and `how` it is read, which is
    what argparse's `add_argument` takes."""

    def __init__(self, name: str, **how: Any) -> None:
        self.name, self.how = name, how


MODEL = Option("--model", default=str(POCKET), metavar="PATH_OR_ID",
               help="folder or hub id (default: the one shipped)")
PATH = Option("path", metavar="PATH_OR_ID", nargs="?", default=str(POCKET),
              help="folder or hub id (default: the one shipped)")
JSON = Option("--json", action="store_true", help="one JSON object")
STAGES = Option("--stages", type=int, default=1, metavar="N",
                help="with torchrun: split the layers into N stages, and "
                "each among the rest (default: 1)")
DENSE = (
    Option("--dense", type=int, choices=(16, 12, 8), default=16,
           help="bits of the dense matrices, on a CPU: 16 as stored (default),"
           " 12 a copy without loss to decode faster, 8 rounded"),
    Option("--compact", action="store_const", dest="dense", const=12,
           default=16, help="the same as --dense 12"))
ACTIVATIONS = Option(
    "--activations", type=int, choices=(16, 8), default=16,
    help="bits of what enters the experts, on a CPU: 16 (default), 8 rounded,"
    " to read prompts faster")
RUNNING = (*DENSE, ACTIVATIONS, STAGES)
SAMPLING = (
    Option("--temperature", type=float, default=1.0, metavar="X",
           help="0 is greedy (default: 1)"),
    Option("--top-p", type=float, default=1.0, metavar="X"),
    Option("--top-k", type=int, default=0, metavar="N"),
    Option("--seed", type=int, metavar="N"),
    Option("--dtype", default="bfloat16", choices=(
        "bfloat16", "float16", "float32"), help="default: bfloat16"),
    Option("--device", default="cpu", help="cpu (default), cuda, ..."),
    Option("--draft", metavar="lookup|PATH_OR_ID", help="guess tokens and "
           "check several at once: look them up in the text, or ask a small "
           "model of the same vocabulary"),
)

# %% [markdown]
# What stands in an option is looked at before anything slow: a device by
# putting a byte on it, the numbers of sampling by
# [sampling's](../text/sampling.ipynb) own object.

# %% tags=["export:options"]
def torch_dtype(name: str) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def sampling(args: argparse.Namespace) -> "SamplingOptions":
    """The options of sampling that a command was given."""
    from gptoss.text.sampling import SamplingOptions

    return SamplingOptions(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, max_new_tokens=args.max_new_tokens)


def torch_device(name: str) -> "torch.device":
    """The torch device `name`, after a byte was put on it."""
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and launched() > 1:  # each its own
            own = torchrun_number("LOCAL_RANK", launched())
            device = torch.device("cuda", own)
        if device.type == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(1, dtype=torch.uint8, device=device)
        return device
    except UsageError:
        raise
    except Exception as error:  # a backend may raise anything, ImportError too
        why = (str(error).splitlines() or ["not available"])[0]
        raise UsageError(f"--device {name}: {why}") from error


def read_prompt(args: argparse.Namespace) -> str:
    """--prompt, or what stdin holds, or a beginning for the model that is
    shipped."""
    if args.prompt is None:
        if args.model != str(POCKET):
            raise UsageError("--prompt: needed with --model")
        return FIRST_WORDS
    text: str = agreed(args, _stdin) if args.prompt == "-" else args.prompt
    return text


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: stdin is not UTF-8 ({error.reason} "
                         f"at byte {error.start})") from error

# %%
for device in ("toaster", "meta"):
    try:
        torch_device(device)
    except UsageError as error:
        print(str(error)[:60])
print(torch_dtype("bfloat16"), torch_device("cpu"))

# %% [markdown]
# A model is loaded in one place, whether whole or this process's part. A
# mistyped folder is told before the kernels are compiled.

# %% tags=["export:options"]
def load_model(args: argparse.Namespace, folder: Path,
               device: "torch.device | str" = "cpu") -> "GptOss":
    """The model in a folder, or this process's part of it; the kernels
    after it, for the first time they are compiled."""
    from gptoss.kernels.build import load_kernels
    from gptoss.kernels.coarse import hold_activations
    from gptoss.kernels.eight import hold_dense
    from gptoss.model.transformer import GptOss

    dtype = torch_dtype(getattr(args, "dtype", "bfloat16"))
    alone = launched() == args.stages == 1
    activations = getattr(args, "activations", 16)
    if (args.dense, activations) != (16, 16) and (
            not alone or (str(device), str(dtype))
            != ("cpu", "torch.bfloat16")):
        raise UsageError("--dense and --compact: for one process, --device "
                         "cpu and --dtype bfloat16; --activations, too")
    if alone:
        model = GptOss.from_pretrained(folder, dtype=dtype, device=device)
    else:
        from gptoss.parallel.split import load_split

        model = load_split(folder, dtype, device, stages=args.stages)
    if args.dense != 16:
        hold_dense(model, args.dense)
    if activations != 16:
        hold_activations(model, activations)
    load_kernels()
    return model


def load_pair(args: argparse.Namespace) -> "tuple[GptOss, Tokenizer]":
    """Model and tokenizer, the quick one of the two first."""
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.weights.checkpoint import Checkpoint
    from gptoss.weights.hub import resolve

    device, folder = torch_device(args.device), resolve(args.model)
    Checkpoint.open(folder).close()  # the headers, before anything slow
    tokenizer = Tokenizer.from_pretrained(folder)
    return load_model(args, folder, device), tokenizer

# %% [markdown]
# `--draft` is looked at first, and a small model read before the large one.
# Two vocabularies of one size need not be the same, and no error would tell:
# every guess would just be wrong. So the tokens are compared, one by one.

# %% tags=["export:options"]
def load_draft(args: argparse.Namespace) -> "GptOss | str | None":
    """What --draft asks for; a small model on the device of the large one."""
    device = torch_device(args.device)
    if args.draft in (None, "lookup"):
        found: str | None = args.draft
        return found
    if launched() > 1:
        raise UsageError("--draft: with torchrun only lookup")
    from gptoss.model.transformer import GptOss
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.weights.hub import resolve

    folder = resolve(args.draft)
    own, other = (Tokenizer.from_pretrained(path)
                  for path in (folder, resolve(args.model)))
    if own.vocab_size != other.vocab_size or any(
            own.token_bytes(n) != other.token_bytes(n)
            for n in range(own.vocab_size)):
        raise UsageError(f"--draft {args.draft}: expected the vocabulary of "
                         f"{args.model}, found another")
    return GptOss.from_pretrained(folder, torch_dtype(args.dtype), device)

# %% [markdown]
# ## It holds
#
# **No character that a terminal obeys comes through**, over all of Unicode,
# and nothing else is touched.

# %%
changed = [char for char in map(chr, range(0x110000))
           if printable(char) != char]
assert len(changed) == 32 + 1 + 32 + len(BIDI) - len("\n\t")
assert all(printable(printable(char)) == printable(char) for char in changed)
assert not any(unicodedata.category(printable(char)) == "Cc"
               for char in map(chr, range(0x110000)) if char not in "\n\t")
print(len(changed), "characters are shown by a picture of themselves")

# %% [markdown]
# ## Against the others
#
# argparse alone answers a mistake with the usage and then the message:

# %%
plain = argparse.ArgumentParser(prog="plain")
plain.add_argument("--model")
heard = io.StringIO()
with contextlib.redirect_stderr(heard):
    try:
        plain.parse_args(["--loud"])
    except SystemExit as error:
        print(error.code, "after", heard.getvalue().count("\n"), "lines")

# %% [markdown]
# OpenAI's `gpt_oss/generate.py`, a demonstration by its own words, prints
# one line a token, each decoded alone (so characters of several tokens are
# lost), and stops at `<|endoftext|>` only. Names in a file can carry escape
# sequences too: llama.cpp#28969 has them act through the program that
# lists a model's tensors. Here file names, tensor names and model text all
# pass {eq}`cli-visible` on the way to a terminal.

# %% [markdown]
# ## Cost
#
# Making text visible costs one look at each character and keeps no state, so
# the pieces of a stream give what the whole would:

# %%
pieces = ["a\x1b", "[2", "Jb"]
assert "".join(map(printable, pieces)) == printable("".join(pieces))

# %% [markdown]
# ## Takeaways
#
# - A mistake of the user is one line that names the culprit, and exit 2. A
#   mistake of the program is a traceback.
# - What a model or a file says reaches a terminal only as visible text, one
#   character at a time.
# - Signals that would end a half-written file become exceptions.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Why does `printable` also act on U+202E? Show a file name that reads as a
# text file and is not one.

# %% tags=["hide-cell"]
name = "report\u202etxt.exe"
print(printable(name))
seen = name.replace("\u202etxt.exe", "exe.txt")  # from right to left
print(f"a terminal that obeys U+202E shows {seen}")

# %% [markdown]
# ### Exercise 2
#
# Why not remove escape sequences instead of showing them? Write the filter
# with a regular expression, and feed it a stream that is cut in a bad place.

# %% tags=["hide-cell"]
import re


def removed(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


whole, cut = "a\x1b[2Jb", ["a\x1b[2", "Jb"]
print(repr(removed(whole)), repr("".join(map(removed, cut))))
print(repr("".join(map(printable, cut))))
# Neither piece holds a whole sequence, so both pass, and the terminal joins
# them again.

# %% [markdown]
# ### Exercise 3
#
# Which of these are told in a line, and which keep their traceback: a full
# disk, a config without a key, a division by zero, Ctrl-D at a prompt?

# %% tags=["hide-cell"]
for error in (OSError(28, "No space left on device"),
              ConfigError("vocab_size"), ZeroDivisionError(), EOFError()):
    print(type(error).__name__, "a line" if is_mistake(error)
          else "a traceback")
# Ctrl-D is no mistake at all: whoever asks at a prompt catches it.

# %% [markdown]
# ## Sources
#
# - Python, `argparse` (`ArgumentParser.error`).
# - OpenAI, `gpt_oss/generate.py` in openai/gpt-oss.
# - Escape sequences in files and model output: llama.cpp#28969, CWE-150.
