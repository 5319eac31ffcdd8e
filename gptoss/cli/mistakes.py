"""What does a program owe to somebody who mistypes?

Generated from book/cli/mistakes.py; edit the chapter, not this file.
"""

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

from gptoss.parallel.launch import launched, process_rank
from gptoss.weights.errors import Error

# --- Which text cannot be obeyed? --------------------------------------------

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


# --- What is told in one line? -----------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr and exit 2 for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


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


# --- What if a stream is closed? ---------------------------------------------

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


# --- What if the program is told to end? -------------------------------------

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


# --- Who speaks for several processes? ---------------------------------------

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


__all__ = [
    "BIDI",
    "Ended",
    "Parser",
    "UsageError",
    "agreed",
    "complain",
    "drop_stdout",
    "fill_streams",
    "is_mistake",
    "lacks_memory",
    "printable",
    "reason",
    "shortened",
    "tidily",
    "torchrun_number",
]
