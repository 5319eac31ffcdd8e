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
#     module: commands
# ---

# %% [markdown]
# # The command line

# %% [markdown]
# ## Question
#
# What does a program owe to somebody who mistypes a path? The Python
# interface of chapter 10 answers with a traceback, of which one line is of
# use. And what does it owe to a terminal? Four characters, `ESC [ 2 J`,
# clear the screen, and a model is free to write them.
#
# Two things come out of this appendix: `gptoss/__init__.py`, the names that
# `import gptoss` offers, and the commands, in five modules: how a mistake is
# told (`mistakes`), what the options mean (`options`), what a terminal shows
# (`terminal`), commands that print tables (`tables`), and the rest with the
# list of them all (`commands`).

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a table of dots, commands by modules in the order of the book: blue
# where a command loads a module. --help loads none, convert few, the commands
# that run a model most.
import ast
import os
from importlib.resources import files

import matplotlib.pyplot as plt

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
plt.style.use("_static/book.mplstyle")
PACKAGE = files("gptoss")
front = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
(ORDER,) = (ast.literal_eval(node.value) for node in front.body
            if isinstance(node, ast.Assign)
            and node.targets[0].id == "_MODULES")


def imported(tree: ast.AST) -> set[str]:
    """Modules of this package that `tree` imports from."""
    return {node.module.removeprefix("gptoss.") for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("gptoss.")}


RUNS = ("generate", "chat", "bench")  # load a model as options say


def closure(names: set[str]) -> set[str]:
    """`names` and all that they import, directly or not."""
    for name in list(names):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))
        names = names | closure(imported(tree))
    return names


found = {node.name: imported(node)
         for name in ("options", "tables", "commands")
         for node in ast.parse((PACKAGE / f"{name}.py").read_text(
             "utf-8")).body if isinstance(node, ast.FunctionDef)}
model = found["load_model"] - {"split"}  # that is for torchrun
needs = {"--help": set()} | {
    name: closure(found[f"run_{name}"] | (model if name in RUNS else set()))
    for name in ("generate", "chat", "inspect", "convert", "bench", "parity",
                 "vectors", "train")}
fig, ax = plt.subplots(figsize=(7, 2.1))
for y, used in enumerate(needs.values()):
    for x, name in enumerate(ORDER):
        ax.plot(x, y, "o", color="C0" if name in used else "0.85")
ax.set_xticks(range(len(ORDER)), ORDER, rotation=40, ha="right")
ax.set_yticks(range(len(needs)), needs)
ax.invert_yaxis()
ax.set_ylim(len(needs) - 0.5, -0.5)
ax.grid(visible=False)
plt.show()

# %% [markdown]
# Which modules, in the book's order, a command loads (blue), read off the
# import statements. `--help` and a mistyped option load none, so they answer
# in the time Python takes to start; `convert` needs no model, and `inspect`
# only for its line on which kernels a model would use. Chapter 15's modules
# come in only under `torchrun` and with `inspect --plan`.

# %% [markdown]
# ## The naive version
#
# Call the library, let Python report what goes wrong.

# %%
import contextlib
import io
import tempfile
import traceback

from gptoss.model.transformer import GptOss

try:
    GptOss.from_pretrained("./no-such-folder")
except Exception:
    report = traceback.format_exc().splitlines()
print("more than four lines, and then:", len(report) - 1 > 4)
print(report[-1].partition(": ")[2])
story = "Once \x1b[2Jupon a time"
print("ESC reaches the terminal:", "\x1b" in story)

# %% [markdown]
# The reader of a traceback has to know that the last line is the message.
# And `print(story)` on a terminal would clear the screen: `\x1b[2J` is an
# instruction to it. Worse ones exist, which retitle windows, forge links or
# write to the clipboard, and a model can be led to emit them by any text
# that it is given to read.

# %% [markdown]
# ## Derivation
#
# **Exit codes.** A shell needs these kept apart: it worked, a check failed,
# what you asked for is wrong, a signal ended it. Signals are reported as 128
# plus their number, so
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
# this package declares nor one of the machine's (a file, memory) is a bug. It
# keeps its traceback, with which Python gives 1: hiding it would only make it
# harder to report.
#
# **Harmless text.** A terminal obeys characters of Unicode category Cc:
# 32 below the space, DEL, and 32 more from U+0080 on. Nine others, U+202A to
# U+202E and U+2066 to U+2069, turn the writing direction and can make a
# line read as something else. Mapping each to a visible one-character
# picture, newline and tab excepted,
#
# $$ v(c) = \begin{cases}
#    \text{U+2400} + c & c < 32 \\ \text{U+2421} & c = 127 \\
#    \text{U+FFFD} & \text{C1, direction} \\ c & \text{else} \end{cases}
#    $$ (cli-visible)
#
# acts on characters one at a time (C1 are the 32 from U+0080 on). So it can be
# applied to a stream however that is cut; a filter that removes whole escape
# sequences cannot.
#
# **Ctrl-C in a conversation.** It means "stop", and what is to stop depends
# on when it comes:
#
# | at that moment | what stops | what stays |
# |---|---|---|
# | an answer is being written | the answer | its text so far, as a message |
# | a tool runs | the answer | the call is forgotten |
# | nothing has been written yet | the answer | the question is forgotten |
# | the prompt waits | nothing; a second one leaves | everything |
#
# The signal may arrive in the middle of a forward. Chapter 12 keeps the
# cache's books so that this needs no care here.

# %% [markdown]
# ## Code
#
# ### The package's front door
#
# `import gptoss` loads nothing: a name is looked up in its module when it is
# first used (`__getattr__` of a module). With this the command line can
# answer `--help` without loading torch. A class is the same by whichever path
# it came: the kernels of chapter 13 are loaded by what first computes (chapter
# 10), and `GPTOSS_KERNELS=torch` in the environment declines them.

# %% tags=["export:/__init__"]
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.chat.chat import Chat as Chat
    from gptoss.model.transformer import GptOss as GptOss
    from gptoss.text.tokenizer import Tokenizer as Tokenizer
    from gptoss.weights.config import GptOssConfig as GptOssConfig
    from gptoss.weights.errors import Error as Error

__version__ = "0.1.0"
_HOME = {"Chat": "chat.chat", "Error": "weights.errors",
         "GptOss": "model.transformer", "GptOssConfig": "weights.config",
         "Tokenizer": "text.tokenizer"}
_PARTS = ("weights", "attention", "moe", "model", "text", "kernels",
          "parallel", "chat", "training", "parity", "cli")
_SUBJECTS = {
    "mxfp4": ("weights.mxfp4", "weights.encoding", "model.ops"),
    "checkpoint": ("weights.layout", "weights.files", "weights.checkpoint",
                   "weights.write", "weights.convert", "weights.hub"),
    "harmony": ("text.vocabulary", "text.tokenizer", "text.typescript",
                "text.harmony", "text.template", "text.parser")}


class _Subject(ModuleType):
    """Several modules under the name of what they are about."""

    def __getattr__(self, name: str) -> object:
        homes = _SUBJECTS[self.__name__.rpartition(".")[2]]
        for home in homes if not name.startswith("__") else ():
            module = import_module(f"gptoss.{home}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute "
                             f"{name!r}")


for _name in _SUBJECTS:
    sys.modules[f"gptoss.{_name}"] = _Subject(f"gptoss.{_name}")


def __getattr__(name: str) -> object:
    """`gptoss.GptOss`, `gptoss.mxfp4` ...: loaded when first asked for."""
    if name in _HOME:
        return getattr(import_module(f"gptoss.{_HOME[name]}"), name)
    if name in _PARTS or name in _SUBJECTS:
        return import_module(f"gptoss.{name}")
    raise AttributeError(f"module 'gptoss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_PARTS, *_SUBJECTS])

# %%
print(_HOME["GptOss"], "|", *_SUBJECTS)
import gptoss

print(gptoss.mxfp4.decode.__module__, gptoss.mxfp4.encode.__module__)

# %% [markdown]
# ### Text that a terminal cannot obey

# %% tags=["export:cli/mistakes"]
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
from typing import NoReturn

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

# %%
print(printable(story), printable("bell \x07, tab \t, delete \x7f, \x9b2J"))

# %% [markdown]
# ### One line for every mistake

# %% tags=["export:cli/mistakes"]
class Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr and exit 2 for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

# %%
try:
    Parser(prog="gptoss").parse_args(["--loud"])
except UsageError as error:
    print(error)

# %% tags=["export:cli/mistakes"]
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
# ### Streams that are not there
#
# A program can be started with a standard stream closed (`gptoss inspect
# >&-`, some service managers). Python then has None in its place, and the
# system gives its number to the next file that is opened, into which any
# library that writes to "number 2" would write. So the hole is filled first.
# No stdin is an empty one; whoever closes stderr wants no complaints; but an
# answer that nobody can read is refused.

# %% tags=["export:cli/mistakes"]
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
# ### Told to end
#
# Ctrl-C is an exception, so what is half written is taken away by the
# `finally` of whoever writes it. SIGTERM (a shutdown, `timeout`, a container
# that stops) and SIGHUP (the terminal is gone) would end the process on the
# spot. For the commands that write for minutes they are made an exception
# too.

# %% tags=["export:cli/mistakes"]
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
# ### One of several processes
#
# Under `torchrun` the same command runs in every process, and chapter 15
# splits the model among them. The first one alone reads stdin, draws the
# seed and prints; what it read and drew, the others are told, so that all
# compute the same tokens. A mistake is told once: the others wait five
# seconds before they say what the first may be saying, and by then `torchrun`
# has usually ended them.

# %% tags=["export:cli/mistakes"]
def torchrun_number(name: str, size: int | None = None) -> int:
    """A number that torchrun has put into the environment, and which is to
    be below `size`; -1 for anything else."""
    text = os.environ.get(name, "")
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if size is not None and not 0 <= number < size:
        raise UsageError(f"{name}: torchrun sets it to 0 ... {size - 1}, "
                         f"found {text!r}")
    return number


def agreed(args: argparse.Namespace, make: Callable[[], object]) -> object:
    """make(), as the first process finds it."""
    if launched() == 1:
        return make()
    from gptoss.parallel.collectives import join

    kind = getattr(args, "device", "cpu").partition(":")[0]
    return join(kind).same(make)

# %%
alone = argparse.Namespace()
assert launched() == 1 and process_rank() == 0
assert agreed(alone, lambda: "what was typed") == "what was typed"

# %% [markdown]
# ### What the options mean
#
# An option is written down once, in the words of argparse, and handed to each
# command that has it.

# %% tags=["export:cli/options"]
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
COMPACT = Option("--compact", action="store_true", help="on a CPU: dense "
                 "matrices in twelve bits without loss, a copy to decode "
                 "faster")
SAMPLING = (
    Option("--temperature", type=float, default=1.0, metavar="X",
           help="0 is greedy (default: 1)"),
    Option("--top-p", type=float, default=1.0, metavar="X"),
    Option("--top-k", type=int, default=0, metavar="N"),
    Option("--seed", type=int, metavar="N"),
    Option("--dtype", default="bfloat16", choices=(
        "bfloat16", "float16", "float32"), help="default: bfloat16"),
    Option("--device", default="cpu", help="cpu (default), cuda, ..."),
)

# %% [markdown]
# What stands in an option is looked at before anything slow: a device by
# putting a byte on it, the numbers of sampling by chapter 12's own object.

# %% tags=["export:cli/options"]
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
    return agreed(args, _stdin) if args.prompt == "-" else args.prompt


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

# %% tags=["export:cli/options"]
def load_model(args: argparse.Namespace, folder: Path,
               device: "torch.device | str" = "cpu") -> "GptOss":
    """The model in a folder, or this process's part of it; the kernels
    after it, for the first time they are compiled."""
    from gptoss.kernels.build import load_kernels
    from gptoss.kernels.compact import make_compact
    from gptoss.model.transformer import GptOss

    dtype = torch_dtype(getattr(args, "dtype", "bfloat16"))
    alone = launched() == args.stages == 1
    if args.compact and (not alone or (str(device), str(dtype))
                         != ("cpu", "torch.bfloat16")):
        raise UsageError("--compact: for one process, --device cpu and "
                         "--dtype bfloat16")
    if alone:
        model = GptOss.from_pretrained(folder, dtype=dtype, device=device)
    else:
        from gptoss.parallel.split import load_split

        model = load_split(folder, dtype, device, stages=args.stages)
    if args.compact:
        make_compact(model)
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
# ### What a terminal shows

# %% tags=["export:cli/terminal"]
import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gptoss.parallel.launch import launched, process_rank


if TYPE_CHECKING:
    from rich.console import Console

    from gptoss.chat.chat import Chat
    from gptoss.chat.turn import ChatEvent


def writer(stream: IO[str]) -> Callable[[str], None]:
    """Writes text at once; to a terminal without its control characters."""
    terminal = stream.isatty()

    def write(text: str) -> None:
        stream.write(printable(text) if terminal else text)
        stream.flush()
    return write

# %%
class Terminal(list):
    """Stands for a stream that is a terminal."""

    write, flush = list.append, lambda self: None
    isatty = lambda self: True  # noqa: E731


screen = Terminal()
writer(screen)(story)
print(screen)

# %% [markdown]
# ### chat: a turn as pieces of text
#
# What the model thinks and calls is labelled in words, so that a file or a
# terminal without colours says the same as one with them.

# %% tags=["export:cli/terminal"]
STYLES = {"user": "bold", "analysis": "dim", "commentary": "dim",
          "final": "", "call": "cyan", "result": "cyan", "notice": "yellow"}


def drawn(events: Iterable["ChatEvent"], everything: bool = True
          ) -> Iterator[tuple[str, str]]:
    """The events of a turn as (text, style); whole lines at its end.

    Without `everything` only the answer, and an empty line if there is
    none.
    """
    last = ""  # the kind of the line that has been begun
    for event in events:
        kind = event.kind
        if kind == "done" or not (everything or kind == "final"):
            continue
        whole = kind in ("call", "result", "notice")
        if whole or kind != last:
            label = "" if kind == "final" else (
                f"[{event.name if kind == 'call' else kind}] ")
            if last or label:
                yield "\n" * bool(last) + label, STYLES[kind]
        yield event.text, STYLES[kind]
        last = kind
    if last or not everything:
        yield "\n", ""

# %%
from gptoss.chat.turn import ChatEvent

happened = [ChatEvent("analysis", "Six "), ChatEvent("analysis", "sevens."),
            ChatEvent("call", '{"expression": "6*7"}', "calculator"),
            ChatEvent("result", "42", "calculator"),
            ChatEvent("final", "It is 42."), ChatEvent("done", "stop")]
print("".join(text for text, style in drawn(happened)), end="")
print(list(drawn(happened, everything=False)))

# %% tags=["export:cli/terminal"]
NARROWEST = 40  # columns; some containers say that a terminal has none


def console(stream: IO[str]) -> "Console":
    """rich's console on a stream: a terminal if that is one."""
    from rich.console import Console

    return Console(file=stream, force_jupyter=False,
                   force_terminal=stream.isatty(), width=max(
                       NARROWEST, shutil.get_terminal_size().columns))


def drawer(stream: IO[str]) -> Callable[..., None]:
    """Writes (text, style) at once; on a terminal in its style and without
    its control characters."""
    write = writer(stream)
    if not stream.isatty():
        return lambda text, style="": write(text)
    rich = console(stream)

    def draw(text: str, style: str = "") -> None:
        rich.out(printable(text), style=style or None, highlight=False,
                 end="")
        stream.flush()
    return draw

# %%
screen = type("Tube", (io.StringIO,), {"isatty": lambda self: True})()
for piece in drawn([ChatEvent("analysis", story), happened[4]]):
    drawer(screen)(*piece)
print(repr(screen.getvalue()))

# %% [markdown]
# ### chat: a session
#
# `Session` holds the messages; the model sees them all in each turn, and
# `Chat` knows which of their tokens it need not feed again.

# %% tags=["export:cli/terminal"]
@contextmanager
def stoppable() -> Iterator[dict[str, Callable[[], bool]]]:
    """Options of `Chat.events` with which Ctrl-C stops a turn.

    One process needs none: there it is an exception, wherever it comes.
    One of several must not leave the others in the middle of a sum, so the
    first notes that the key was pressed, and says so before the next token.
    """
    if launched() == 1 or (threading.current_thread()
                           is not threading.main_thread()):
        yield {}
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame:
                           pressed.append(number))
    try:
        yield {"stop": lambda: bool(pressed)}
    finally:
        signal.signal(signal.SIGINT, before)

# %%
with stoppable() as options:
    print(options)  # in one process

# %% tags=["export:cli/terminal"]
class Session:
    """A chat and the messages that were exchanged."""

    def __init__(self, chat: "Chat", draw: Callable[..., None],
                 everything: bool, system: str | None = None,
                 read: Callable[[str], str] = input) -> None:
        self.chat, self.draw, self.everything = chat, draw, everything
        self.read = read
        self.head = ([{"role": "system", "content": system}] if system
                     else [])
        self.messages: list[dict[str, Any]] = list(self.head)

    def ask(self, text: str) -> None:
        """Draws the answer to `text`. What came of it before a Ctrl-C stays
        in the messages, be it half a thought; if nothing came, the question
        is forgotten."""
        asked = [*self.messages, {"role": "user", "content": text}]
        with stoppable() as options:
            events = self.chat.events(asked, **options)
            try:
                for piece in drawn(events, self.everything):
                    self.draw(*piece)
            finally:
                if self.chat.turn:
                    self.messages = asked + self.chat.turn

    def cost(self) -> str:
        """One line about the last turn."""
        used = self.chat.usage
        return (f"[{used.finish_reason}: {used.generated_tokens} tokens in "
                f"{used.seconds:.1f} s; {used.prefilled_tokens} of "
                f"{used.prompt_tokens} read anew]\n")

# %% [markdown]
# ### chat: commands
#
# A line at the prompt that begins with a slash is for the program. Each is a
# row of a table; a mistake in one is told, and the conversation goes on.
#
# A file that is opened for writing is empty at once, and if the disk is full
# it stays so. What is saved is therefore written beside the file, whole, and
# put into its place in one step: a reader, a full disk or a power cut finds
# the old file or the new one.

# %% tags=["export:cli/terminal"]
def write_whole(name: str, text: str, again: bool = False) -> None:
    """Writes a file, all of it or nothing; a link's own file, if it is one.

    FileExistsError if it is there, unless `again`: then it is replaced and
    keeps its mode. What is no file (a device, a folder) is refused.
    """
    path = _local(name)
    if not again:
        path.touch(exist_ok=False)  # ours from now on
    elif path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise UsageError(f"{name}: expected a file that may be written")
    draft = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(draft, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        os.replace(draft, path)
    except BaseException:
        for mine in (draft, path)[:2 - again]:
            mine.unlink(missing_ok=True)
        raise


def _local(name: str) -> Path:
    """The path that a person typed, ~ and links followed."""
    try:
        return Path(name).expanduser().resolve()
    except (ValueError, RuntimeError) as error:  # NUL; no such user; a loop
        raise UsageError(f"{name}: {error}") from error

# %%
with tempfile.TemporaryDirectory() as folder:
    kept = Path(folder, "kept")
    write_whole(str(kept), "old")
    for text in ("\udcff", "new"):
        with contextlib.suppress(UnicodeEncodeError):
            write_whole(str(kept), text, again=True)
        print(kept.read_text(), len(os.listdir(folder)))

# %% tags=["export:cli/terminal"]
def _save(session: Session, name: str, again: bool = False) -> str:
    if not name:
        raise UsageError("/save: expected a file name")
    if process_rank():
        return ""
    try:
        write_whole(name, json.dumps(session.messages, ensure_ascii=False,
                                     indent=1), again)
    except FileExistsError:
        raise UsageError(f"{name} exists; /save! {name} replaces it"
                         ) from None
    number = len(session.messages)
    return f"{number} message{'s' * (number != 1)} saved"


def _reset(session: Session, _: str) -> str:
    session.messages = list(session.head)
    session.chat.reset()
    return "forgotten"


def _effort(session: Session, level: str) -> str:
    from gptoss.text.harmony import EFFORTS

    if level not in ("", *EFFORTS):
        raise UsageError(f"/effort: expected {', '.join(EFFORTS)}, found "
                         f"{level}")
    settings = session.chat.settings
    settings = settings.with_changes(effort=level or settings.effort)
    session.chat.settings = settings
    return f"effort: {settings.effort}"


def _quit(session: Session, _: str) -> str:
    raise EOFError


def _help(session: Session, _: str) -> str:
    return "\n".join([f"{name:15}{about}" for name, (_, about)
                      in SLASH.items()] +
                     ["Ctrl-C stops an answer. A line that begins with a "
                      "space is never a command."])

# %% tags=["export:cli/terminal"]
SLASH = {"/help": (_help, "this list"),
         "/effort": (_effort, "LEVEL: low, medium or high"),
         "/reset": (_reset, "forget what was said"),
         "/save": (_save, "FILE: write the messages to a new file, as JSON"),
         "/save!": (lambda session, name: _save(session, name, True),
                    "FILE: the same, over an old file"),
         "/quit": (_quit, "leave, as Ctrl-D does")}


def obey(session: Session, line: str) -> None:
    """Carries out a line that begins with a slash."""
    name, _, rest = line.partition(" ")
    if name not in SLASH:
        raise UsageError(f"{name}: no such command; /help lists them")
    session.draw(SLASH[name][0](session, rest.strip()) + "\n", "dim")

# %%
said = []
session = Session(None, lambda text, style="": said.append(text), True)
session.messages = [{"role": "user", "content": "né"}]
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    obey(session, "/save talk.json")
    try:
        obey(session, "/save talk.json")
    except UsageError as error:
        print(error)
    print(said, json.loads(Path("talk.json").read_text("utf-8")))

# %% [markdown]
# ### chat: typed or piped
#
# With a terminal on stdin the program asks and answers until it is left.
# Without one it reads a message a line and writes the answers: the same
# conversation for scripts, and for `make demo`.

# %% tags=["export:cli/terminal"]
def piped(args: argparse.Namespace) -> Iterator[str]:
    """The lines of stdin, which must be UTF-8."""
    lines = _own_lines()
    return iter(lambda: agreed(args, lambda: next(lines, None)), None)


def _own_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not UTF-8 in line {number} "
                             f"({error.reason})") from error


def _step(session: Session, line: str) -> None:
    """Does what a line typed at the prompt says."""
    try:
        if line.startswith("/"):
            obey(session, line)
        elif line.strip():
            session.ask(line.strip())
            session.draw(session.cost(), "dim")
    except Exception as error:
        if not is_mistake(error):
            if launched() > 1:  # the others have no part in this one's bug
                raise
            traceback.print_exc()  # a bug, but not the end of what was said
        session.draw(f"[error] {reason(error)}\n", STYLES["notice"])


def converse(session: Session) -> None:
    """Prompt and answer until Ctrl-D, /quit or Ctrl-C twice."""
    try:
        import readline  # noqa: F401  line editing for input()
    except ImportError:
        pass
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    session.draw("/help lists the commands, Ctrl-D leaves\n", "dim")
    leaving = False
    while True:
        line = None
        try:
            line = session.read("> ")
            leaving = False
            _step(session, line)
        except EOFError:
            return session.draw("\n" * (line is None))
        except KeyboardInterrupt:
            if leaving:
                return session.draw("\n")
            leaving = line is None  # at the prompt
            session.draw("\n[Ctrl-C again or Ctrl-D leaves]\n" if leaving
                         else "\n[stopped]\n", STYLES["notice"])

# %% tags=["export:cli/terminal"]
def typed(args: argparse.Namespace) -> Callable[[str], str]:
    """input(), of the first process if there are several."""
    def asked(words: str) -> str | None:
        try:
            return input(words)
        except EOFError:
            return None

    def read(words: str) -> str:
        line = agreed(args, lambda: asked(words))
        if line is None:
            raise EOFError
        return line
    return read

# %%
heard = []
session = Session(None, lambda text, style="": heard.append(text), True)
for line in ("/reset now", "/sing", "/effort loud", "/help"):
    session.chat = argparse.Namespace(reset=lambda: None)
    _step(session, line)
print("".join(heard))

# %%
class Terse:
    """Stands for a chat: answers every message with its length."""

    turn = ()

    def events(self, messages):
        yield ChatEvent("final", str(len(messages[-1]["content"])))


screen = []
session = Session(Terse(), lambda text, style: screen.append(text), False)
for line in ("one", "three"):
    session.ask(line)
print("".join(screen), end="")

# %% [markdown]
# ### inspect
#
# `inspect` reads headers, not weights. With `--plan` it answers, from chapter
# 15's formulas, which cards a model fits on and how fast they could be.

# %% tags=["export:cli/tables"]
import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptoss.parallel.launch import launched





def show_plan(args: argparse.Namespace) -> None:
    """Prints what 1 to 8 GPUs could do with a model."""
    from gptoss.parallel.plan import plan, plan_table
    from gptoss.weights.config import GptOssConfig
    from gptoss.weights.files import config_folder
    from gptoss.weights.hub import resolve

    known = {"20b": GptOssConfig.gpt_oss_20b,
             "120b": GptOssConfig.gpt_oss_120b}
    if args.path == str(POCKET):
        models = {name: make() for name, make in known.items()}
    elif args.path in known:
        models = {args.path: known[args.path]()}
    else:
        models = {args.path: GptOssConfig.from_pretrained(
            config_folder(resolve(args.path)))}
    if args.json:
        print(json.dumps({name: [asdict(row) for row in plan(
            config, args.context)] for name, config in models.items()}))
        return
    print(printable("\n\n".join(plan_table(name, config, args.context)
                              for name, config in models.items())))

# %%
show_plan(argparse.Namespace(path="20b", context=131072, json=False))

# %% [markdown]
# One card of 24 GB holds the 20b with its whole context. More cards make it
# faster when they share each matrix (`tensor`), not when they take turns
# (`stages`).

# %% tags=["export:cli/tables"]
SIZES = {"bytes": "bytes in the file",
         "parameters_total": "parameters",
         "parameters_active": "parameters a token uses",
         "bytes_read_per_token": "weight bytes read for a token",
         "cache_bytes_per_token": "cache bytes a token adds",
         "cache_bytes_full": "cache bytes at full length"}
UNITS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def with_unit(number: int) -> str:
    """13761264768 -> '13,761,264,768  (13.8 billion)'."""
    for size, name in UNITS:
        if number >= size:
            return f"{number:,}  ({number / size:.3g} {name})"
    return f"{number:,}"


def summary(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows that `inspect` prints of what `describe` returns."""
    yield "folder", report["path"]
    files = report["files"]
    yield "layout", (f"{report['layout']}, {report['tensors']} tensors in "
                     f"{len(files)} file{'s' * (len(files) != 1)}")
    yield "kernels on a CPU", report["kernels"]
    for key, label in SIZES.items():
        yield label, with_unit(report[key])
    for part, number in report["parameters"].items():
        share = number / report["parameters_total"]
        yield f"  {part}", f"{number:,}  ({share:.1%} of parameters)"
    for key, value in report["config"].items():
        if key == "layer_types":
            value = ", ".join(f"{value.count(kind)} {kind}"
                              for kind in sorted(set(value)))
        if not isinstance(value, dict | list):
            yield f"config.{key}", str(value)

# %% tags=["export:cli/tables"]
def run_inspect(args: argparse.Namespace) -> None:
    """Prints what a checkpoint holds, without reading its weights."""
    if args.plan:
        return show_plan(args)
    from gptoss.kernels.build import kernel_path
    from gptoss.weights.checkpoint import Checkpoint, describe
    from gptoss.weights.hub import resolve

    folder = resolve(args.path)
    report = describe(folder) | {"kernels": kernel_path()}
    if args.json:
        print(json.dumps(report))
        return
    if args.tensors:
        with Checkpoint.open(folder) as checkpoint:
            for spec in map(checkpoint.spec, checkpoint.names()):
                print(f"{spec.nbytes:>16,}  {spec.name}  {spec}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary(report):  # Text: nothing in it is markup
        table.add_row(Text(printable(label, "")), Text(printable(value, "")))
    console(sys.stdout).print(table)

# %%
from gptoss.weights.write import random_tensors, write_checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

config = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=64, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
    eos_token_id=1, pad_token_id=0)
with tempfile.TemporaryDirectory() as folder:
    write_checkpoint(Path(folder, "tiny"), config,
                     random_tensors(config))
    page = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(page):
        run_inspect(argparse.Namespace(path="tiny", json=False,
                                       tensors=False, plan=False))
print(*map(str.rstrip, page.getvalue().splitlines()[:15]), sep="\n")

# %% [markdown]
# ### convert
#
# Chapter 3 does the work; the command adds a bar, on a terminal only.

# %% tags=["export:cli/tables"]
def run_convert(args: argparse.Namespace) -> None:
    """Rewrites a checkpoint in another layout, with a hash per tensor."""
    from rich.progress import Progress

    from gptoss.weights.checkpoint import Checkpoint
    from gptoss.weights.convert import convert
    from gptoss.weights.hub import resolve

    source = resolve(args.source)
    with Checkpoint.open(source) as checkpoint:
        count = len(checkpoint.names())
    with tidily(), Progress(console=console(sys.stderr), transient=True,
                            disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("converting", total=count)
        manifest = convert(source, Path(args.target), args.layout,
                           progress=lambda name: bar.advance(task))
    print(f"{len(manifest)} tensors written to {printable(args.target, '')}")

# %%
with tempfile.TemporaryDirectory() as folder:
    write_checkpoint(Path(folder, "tiny"), config,
                     random_tensors(config))
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        for there in ("original", "bf16"):
            run_convert(argparse.Namespace(
                source="tiny", target=there, layout=there))
        print(sorted(path.name for path in Path("original").iterdir()))

# %% [markdown]
# ### bench
#
# Chapter 13 measures; here a median stands with its spread beside it.

# %% tags=["export:cli/tables"]
def figures(found: dict[str, Any]) -> str:
    """What `measure` found, a line each; rates with their spread."""
    def number(value: object) -> str:
        return (f"{value:,.4g}" if isinstance(value, float)
                else f"{value:,}" if isinstance(value, int) else str(value))

    lines = []
    for key, value in found.items():
        if not isinstance(value, dict):  # a spread goes with its median
            around = found.get(f"{key}_spread")
            lines.append(f"{key:>26}  {number(value)}" + (
                f"  ({number(around['low'])} to {number(around['high'])})"
                if around else ""))
    return "\n".join(lines)


def run_bench(args: argparse.Namespace) -> None:
    """Measures loading, reading and writing on random tokens."""
    from gptoss.kernels.bench import measure
    from gptoss.weights.checkpoint import Checkpoint
    from gptoss.weights.hub import resolve

    if min(args.prompt_tokens, args.new_tokens) < 2:
        raise UsageError(f"expected --prompt-tokens and --new-tokens >= 2, "
                         f"found {args.prompt_tokens} and {args.new_tokens}")
    if args.repeats < 1:
        raise UsageError(f"--repeats: expected >= 1, found {args.repeats}")
    folder = resolve(args.path)
    with Checkpoint.open(folder) as file:  # the headers, before anything slow
        room = file.config.max_position_embeddings - args.prompt_tokens
    if args.new_tokens > room:
        option = "--new-tokens" if room > 1 else "--prompt-tokens"
        raise UsageError(
            f"{option}: the model's context holds {room + args.prompt_tokens}"
            f" tokens, found {args.prompt_tokens} of prompt and "
            f"{args.new_tokens} new ones")
    found = measure(folder, args.prompt_tokens, args.new_tokens, args.repeats,
                    load=lambda folder: load_model(args, folder))
    if launched() > 1:
        found |= {"processes": launched(), "stages": args.stages}
    print(json.dumps(found) if args.json else figures(found))

# %%
print(figures({"kernels": "C++ with AVX2", "bytes_per_token": 3714085888,
               "decode_tokens_per_second": 7.0312,
               "decode_tokens_per_second_spread": {"low": 6.5, "high": 7.2}}))

# %% [markdown]
# ### generate
#
# Commands that compute: a `run_` function each, which gets what was typed.

# %% tags=["export:cli/commands"]
import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import gptoss
from gptoss.parallel.launch import launched





def run_generate(args: argparse.Namespace) -> None:
    """Writes the continuation of a prompt to stdout as it comes."""
    from gptoss.kernels.bench import peak_rss_bytes
    from gptoss.text.generate import complete, stop_ids
    from gptoss.weights.hub import resolve

    options, prompt = sampling(args), read_prompt(args)
    torch_device(args.device)
    stop = stop_ids(resolve(args.model))
    model, tokenizer = load_pair(args)
    write = writer(sys.stdout)
    if not args.json and sys.stdout.isatty():
        write(prompt)  # a reader wants the whole; a program has its prompt
    done = complete(model, tokenizer, prompt, options, stop=stop,
                    on_text=None if args.json else write)
    if args.json:
        print(json.dumps(asdict(done) | {"peak_rss_bytes": peak_rss_bytes()}))
        return
    write("\n")
    if sys.stderr.isatty():
        print(f"[{len(done.tokens)} tokens, {done.seconds:.1f} s, "
              f"{done.finish_reason}]", file=sys.stderr)

# %% [markdown]
# ### chat
#
# The prompt of a conversation knows its tools and its date; the seed is the
# same in all processes.

# %% tags=["export:cli/commands"]
def _tools(args: argparse.Namespace, known: dict) -> list:
    """The tools that the options name."""
    names = [] if args.no_tools else list(filter(None, args.tools.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"--tools: expected {', '.join(known)}, found "
                             f"{name}")
    return [known[name] for name in names]

# %% tags=["export:cli/commands"]
def run_chat(args: argparse.Namespace) -> None:
    """A conversation; with a pipe, one message a line of stdin."""
    from gptoss.chat.calculator import TOOLS
    from gptoss.chat.chat import Chat

    if args.json and args.prompt is None:
        raise UsageError("--json: needs --prompt")
    options, tools = sampling(args), _tools(args, TOOLS)
    pair = load_pair(args)
    seed = options.seed
    if seed is None and launched() > 1:
        seed = agreed(args, lambda: secrets.randbits(48))
    chat = Chat(pair, args.effort, tools, date=args.date, seed=seed,
                temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, max_new_tokens=options.max_new_tokens)
    everything = args.transcript or sys.stdout.isatty()
    draw = (lambda *_: None) if args.json else drawer(sys.stdout)
    session = Session(chat, draw, everything, args.system, typed(args))
    if args.prompt is None and agreed(args, sys.stdin.isatty):
        return converse(session)
    asked = args.prompt is not None
    for line in [read_prompt(args)] if asked else piped(args):
        if line and not asked and everything:
            draw(f"> {line}\n", STYLES["user"])
        if line or asked:
            session.ask(line)
    if args.json:
        print(json.dumps({"messages": chat.turn} | asdict(chat.usage)))

# %% [markdown]
# ### parity and vectors
#
# Chapter 16's walk and vectors. A fault that they find is no mistake of the
# user: it goes to stdout, and the exit code is 1. The walk is over what
# `generate` computes with: bf16, and the kernels where there are some;
# `--plain` and `--dtype` ask for something else.

# %% tags=["export:cli/commands"]
def _walked(folder: Path, prompts: list[str] | None) -> list:
    """Tokens (1, T) of each prompt; [None], the report's own, for none."""
    if prompts is None:
        return [None]
    import torch

    from gptoss.text.tokenizer import Tokenizer

    encode = Tokenizer.from_pretrained(folder).encode
    found = [encode(prompt) for prompt in prompts]
    if not all(found):
        raise UsageError("--prompt: expected at least one token")
    return [torch.tensor([ids]) for ids in found]


def run_parity(args: argparse.Namespace) -> None:
    """Walks ours and a reference and names the first that goes wrong."""
    from gptoss.parity.report import parity_table, report
    from gptoss.weights.hub import resolve

    folder = resolve(args.path)
    if args.new_tokens < 0:
        raise UsageError(f"--new-tokens: expected at least 0, found "
                         f"{args.new_tokens}")
    if args.plain and args.contract == "kernels":
        raise UsageError("--plain: not with --contract kernels")
    contract = args.contract or ("fp32" if args.plain else None)
    results = [report(folder, args.against, tokens, torch_dtype(args.dtype),
                      contract, args.plant, args.new_tokens, args.compact)
               for tokens in _walked(folder, args.prompt)]
    if args.json:
        whole = results[0] if len(results) == 1 else {
            "prompts": args.prompt, "reports": results}
        print(json.dumps(json.loads(json.dumps(whole),
                                    parse_constant=lambda name: None)))
    else:
        tables = [parity_table(result) for result in results]
        if len(tables) > 1:
            tables = [f"{prompt!r}\n{table}" for prompt, table
                      in zip(args.prompt, tables, strict=True)]
        print(printable("\n\n".join(tables)))
    if any(result["findings"] for result in results):
        raise SystemExit(1)


def run_vectors(args: argparse.Namespace) -> None:
    """Writes conformance vectors, or checks this package or a port."""
    from gptoss.parity.vectors import check, write

    if args.action == "write":
        print(*(printable(str(file), "") for file in write(args.folder)),
              sep="\n")
        return
    wrong = check(args.folder, args.answers, args.dtype)
    print("\n".join(printable(line, "") for line in wrong)
          if wrong else "every case passes")
    if wrong:
        raise SystemExit(1)

# %% [markdown]
# ### train
#
# The shipped checkpoint again, from nothing (chapter 14). The target is
# looked at first: "already there" is no news for somebody who has waited
# for the whole training.

# %% tags=["export:cli/commands"]
def _short(value: object) -> str:
    """A value as a message may show it: nobody reads 400 digits."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"


def run_train(args: argparse.Namespace) -> None:
    """Trains the shipped checkpoint anew, with a given seed."""
    from gptoss.training.pocket import make_pocket
    from gptoss.training.train import Recipe

    out = Path(args.target)
    if out.exists() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: expected a folder that does not exist, in "
                         f"one that does")
    for option, value, least in (("--steps", args.steps, 1),
                                 ("--seed", args.seed, 0)):
        if value is not None and not least <= value < 2 ** 63:
            raise UsageError(f"{option}: expected {least} to 2**63 - 1, "
                             f"found {_short(value)}")
    recipe = Recipe(seed=args.seed)
    if args.steps is not None:
        recipe = replace(recipe, steps=args.steps)

    def report(entry: dict) -> None:
        step = entry["step"] + 1
        if step % 50 == 0 or step == recipe.steps:
            print(f"step {step} of {recipe.steps}, loss {entry['loss']:.3f}, "
                  f"{entry['seconds']:.0f} s", flush=True)

    with tidily():
        make_pocket(out, recipe, report)
    print(f"written to {printable(args.target, '')}")

# %%
try:
    run_train(argparse.Namespace(target=".", steps=1, seed=0))
except UsageError as error:
    print(error)

# %% [markdown]
# ### The table of commands
#
# A row names the function that runs a command, as `module:function`. It is
# looked up when the command is called, so a command loads what it needs, and
# `--help` nothing.

# %% tags=["export:cli/commands"]
@dataclass(frozen=True)
class Command:
    """A row of the table: `target` is "module:function", which gets what was
    typed; `about` is its help."""

    target: str
    about: str
    options: tuple[Option, ...] = ()

    def run(self, args: argparse.Namespace) -> None:
        """Calls the target."""
        module, _, name = self.target.partition(":")
        getattr(import_module(module), name)(args)


COMMANDS = {
    "generate": Command(
        "gptoss.cli.commands:run_generate",
        "Writes the continuation of a prompt to stdout as it comes.", (
            MODEL,
            Option("--prompt", help="text to go on from; - reads stdin"),
            Option("--max-new-tokens", type=int, default=256, metavar="N"),
            *SAMPLING, COMPACT, STAGES, JSON)),
    "chat": Command(
        "gptoss.cli.commands:run_chat",
        "A conversation; with a pipe, one message a line of stdin.", (
            MODEL,
            Option("--prompt", help="one message, answered; - reads stdin"),
            Option("--effort", default="medium", choices=(
                "low", "medium", "high"), help="default: medium"),
            Option("--system", metavar="TEXT", help="instructions"),
            Option("--max-new-tokens", type=int, metavar="N",
                   help="in an answer"),
            Option("--tools", default="calculator,today", metavar="NAMES",
                   help="default: calculator,today"),
            Option("--no-tools", action="store_true"),
            Option("--date", help="what the model is told (default: today)"),
            Option("--transcript", action="store_true", help="write analysis "
                   "and calls too, as a terminal always shows"),
            *SAMPLING, COMPACT, STAGES, JSON)),
    "inspect": Command(
        "gptoss.cli.tables:run_inspect",
        "Prints what a checkpoint holds, without reading its weights.", (
            PATH,
            Option("--tensors", action="store_true", help="list each tensor"),
            Option("--plan", action="store_true", help="what 1 to 8 GPUs "
                   "could do with it, or with 20b, 120b (default: those "
                   "two)"),
            Option("--context", type=int, default=8192, metavar="N",
                   help="tokens, for --plan (default: 8192)"),
            JSON)),
    "convert": Command(
        "gptoss.cli.tables:run_convert",
        "Rewrites a checkpoint in another layout, with a hash per tensor.", (
            Option("source", metavar="SOURCE"),
            Option("target", metavar="TARGET"),
            Option("--layout", required=True,
                   choices=("hf", "original", "bf16")))),
    "bench": Command(
        "gptoss.cli.tables:run_bench",
        "Measures loading, reading and writing on random tokens.", (
            PATH,
            Option("--prompt-tokens", type=int, default=512, metavar="N"),
            Option("--new-tokens", type=int, default=32, metavar="N"),
            Option("--repeats", type=int, default=3, metavar="N"),
            COMPACT, STAGES, JSON)),
    "parity": Command(
        "gptoss.cli.commands:run_parity",
        "Walks ours and a reference and names the first that goes wrong.", (
            PATH,
            Option("--against", default="transformers", choices=(
                "transformers", "streamed", "grouped_mm", "openai",
                "float64")),
            Option("--dtype", default="bfloat16",
                   choices=("float32", "bfloat16")),
            Option("--contract", choices=(
                "fp32", "hf-eager", "openai-torch", "kernels"),
                help="how ours rounds (default: as what runs does)"),
            Option("--plain", action="store_true",
                   help="ours in plain torch, not by the kernels"),
            Option("--prompt", action="append", help="text to walk over, "
                   "once or more (default: random tokens)"),
            Option("--new-tokens", type=int, default=0, metavar="N",
                   help="written first, and walked over too"),
            Option("--plant", metavar="FAULT",
                   help="break ours first: window ..."),
            COMPACT, JSON)),
    "vectors": Command(
        "gptoss.cli.commands:run_vectors",
        "Writes conformance vectors, or checks this package or a port.", (
            Option("action", choices=("write", "check")),
            Option("folder", metavar="DIR"),
            Option("--answers", metavar="FILE",
                   help="a port's outputs to check"),
            Option("--dtype", default="float32",
                   choices=("float32", "bfloat16"), help="of the answers"))),
    "train": Command(
        "gptoss.cli.commands:run_train",
        "Trains the shipped checkpoint anew, with a given seed.", (
            Option("target", metavar="TARGET", help="folder to be made"),
            Option("--seed", type=int, default=0, metavar="N"),
            Option("--steps", type=int, metavar="N",
                   help="default: as many as the recipe says"))),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser for `COMMANDS`."""
    parser = Parser(prog="gptoss", description="gpt-oss, from the book.")
    parser.add_argument("--version", action="version",
                        version=gptoss.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, row in COMMANDS.items():
        command = commands.add_parser(name, help=row.about,
                                      description=row.about)
        for option in row.options:
            command.add_argument(option.name, **option.how)
        command.set_defaults(run=row.run)
    return parser

# %%
print(build_parser().parse_args(["generate", "--top-k", "5"]).top_k)

# %% [markdown]
# ### From arguments to an exit code

# %% tags=["export:cli/commands"]
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a mistake in the
    arguments or files (one line on stderr), 130 for Ctrl-C, 141 if nobody
    reads stdout any more, 128 + n for a signal n that a command minds."""
    closed = fill_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every terminal is UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        if "stdout" in closed:
            raise UsageError("stdout is closed: nobody can read the answer")
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except Ended as ended:
        return 128 + ended.args[0]
    except BrokenPipeError:
        drop_stdout()
        return 141
    except Exception as error:
        if not is_mistake(error):
            raise
        complain(error)
        drop_stdout()
        return 2


def _run(argv: Sequence[str] | None) -> int:
    if launched() > 1 and torchrun_number("RANK", launched()):
        sys.stdout = open(os.devnull, "w")
    args = build_parser().parse_args(argv)
    if launched() > 1 and not hasattr(args, "stages"):
        raise UsageError("torchrun is for generate, chat and bench")
    args.run(args)
    sys.stdout.flush()
    if launched() > 1:
        from gptoss.parallel.collectives import leave

        leave()
    return 0

# %% [markdown]
# `python -m gptoss` runs a file of three lines. (A notebook is called
# `__main__` too, but belongs to no package.)

# %% tags=["export:/__main__"]
import sys

from gptoss.cli import commands

if __name__ == "__main__" and __package__ == "gptoss":
    sys.exit(commands.main())

# %%
def run(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


POCKET = str(files("gptoss") / "pocket")
code, out, err = run("generate", "--model", POCKET, "--dtype", "float32",
                     "--prompt", "Once upon a time", "--temperature", "0",
                     "--max-new-tokens", "24", "--json")
done = json.loads(out)
print(code, sorted(done))
print(done["text"])

# %%
code, out, err = run("chat", "--model", POCKET, "--dtype", "float32",
                     "--date", "2025-06-28", "--temperature", "0",
                     "--prompt", "What is 347 + 285?", "--transcript",
                     "--no-tools")
print(code, err)
print(out)

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
# **Every mistake is one line and a 2**: whatever is wrong, with its name in
# the line, nothing on stdout. (`tests/test_bad_input.py` breaks a checkpoint
# in more than thirty ways.)

# %%
for argv in (["sing"], ["convert"], ["inspect", "./no-such"],
             ["generate", "--temperature", "cold"],
             ["generate", "--temperature", "-1"],
             ["generate", "--top-p", "0"], ["generate", "--prompt", ""],
             ["generate", "--seed", "-1"],
             ["chat", "--json"], ["chat", "--tools", "hammer"],
             ["chat", "--effort", "all", "--prompt", "a"],
             ["chat", "--model", "./no-such", "--prompt", "a"],
             ["chat", "--max-new-tokens", "0", "--prompt", "a"],
             ["chat", "--prompt", "again " * 5000],
             ["generate", "--device", "toaster"],
             ["generate", "--prompt", "again " * 5000],
             ["convert", POCKET, POCKET, "--layout", "original"]):
    if argv[0] == "generate":
        argv[1:1] = ["--model", POCKET, "--prompt", "Once"]
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1), (argv, err)
    assert err.startswith("gptoss: error: ")
print(run("generate", "--model", POCKET, "--prompt", "a", "--top-p", "0")[2])

# %% [markdown]
# **A bug is not hidden.**

# %%
def buggy(args: argparse.Namespace) -> None:
    raise ZeroDivisionError("a bug")


kept = COMMANDS["inspect"]
COMMANDS["inspect"] = replace(kept, target="__main__:buggy")
try:
    run("inspect", "anything")
except ZeroDivisionError:
    print("the traceback of a bug reaches the reader")
COMMANDS["inspect"] = kept

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
# ## In the 20b and the 120b
#
# The same commands; only `--model` differs. A folder is read where it lies,
# anything else of the form `owner/name` is a repository on the hub and is
# fetched once.
#
# ```console
# $ python -m gptoss inspect openai/gpt-oss-20b
# $ python -m gptoss generate --model openai/gpt-oss-20b \
#       --prompt "The capital of France is" --max-new-tokens 32
# $ python -m gptoss chat --model openai/gpt-oss-20b --effort high
# $ python -m gptoss convert openai/gpt-oss-20b there --layout original
# ```

# %%
for name, real in (("20b", GptOssConfig.gpt_oss_20b()),
                   ("120b", GptOssConfig.gpt_oss_120b())):
    print(name, "reads", with_unit(bytes_read_per_token(real)),
          "bytes of weights for a token")

# %% [markdown]
# ## Cost
#
# The price of a command is what it imports. `--help` and a mistyped option
# import nothing of the package beyond the modules of this chapter:

# %%
import subprocess

script = ("import sys; from gptoss.cli.commands import main; "
          "code = main(['generate', '--loud']); "
          "print(code, [m for m in ('torch', 'tokenizers', 'transformers') "
          "if m in sys.modules])")
print(subprocess.run([sys.executable, "-c", script], capture_output=True,
                     text=True).stdout)

# %% [markdown]
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
# - What a model or a file says reaches a terminal only as visible text.
# - Commands are rows of a table; each imports what it needs when it runs.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Add a command `count` that prints how many tokens a text has, as a row of the
# table.

# %% tags=["hide-cell"]
def run_count(args: argparse.Namespace) -> None:
    """Prints the number of tokens of a text."""
    from gptoss.text.tokenizer import Tokenizer

    print(len(Tokenizer.from_pretrained(args.model).encode(args.text)))


COMMANDS["count"] = Command("__main__:run_count", str(run_count.__doc__),
                            (MODEL, Option("text")))
code, out, err = run("count", "--model", POCKET, "Once upon a time")
print(code, out)
assert code == 0 and int(out) > 0
assert run("count", "--model", "./no-such", "a")[0] == 2  # errors come along

# %% [markdown]
# ### Exercise 2
#
# Why does `printable` also act on U+202E? Show a file name that reads as a
# text file and is not one.

# %% tags=["hide-cell"]
name = "report\u202etxt.exe"
print(printable(name))
# a terminal that obeys U+202E shows the rest from right to left:
assert name.replace("\u202etxt.exe", "exe.txt") == "reportexe.txt"

# %% [markdown]
# ### Exercise 3
#
# Python ignores SIGPIPE, so a program whose reader has gone is not killed but
# sees an error when it writes. What does `main` return then, and why must it
# point stdout at the null device first?

# %% tags=["hide-cell"]
script = ("import sys; from gptoss.cli import commands\n"
          "def endless(args):\n    while True: print('text')\n"
          "row = commands.Command('__main__:endless', '')\n"
          "commands.COMMANDS['inspect'] = row\n"
          "sys.exit(commands.main(['inspect']))")
process = subprocess.Popen([sys.executable, "-c", script],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
process.stdout.readline()
process.stdout.close()
complaint = process.stderr.read()
process.stderr.close()
print(process.wait(), complaint)
# Python flushes stdout once more when it exits; with the pipe still behind
# it that fails again and prints "Exception ignored ... BrokenPipeError"
assert process.returncode == 141 and complaint == b""

# %% [markdown]
# ## Sources
#
# - Python, `argparse` (`ArgumentParser.error`) and `sys` on SIGPIPE
#   ("Note on SIGPIPE" of the `signal` module); PEP 562 for `__getattr__` of
#   a module.
# - OpenAI, `gpt_oss/generate.py` in openai/gpt-oss.
# - Will McGugan and others, rich: `Console.out` writes without wrapping.
# - Escape sequences in files and model output: llama.cpp#28969, CWE-150.
