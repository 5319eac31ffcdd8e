"""A conversation in a terminal

Generated from book/cli/terminal.py; edit the chapter, not this file.
"""

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

from gptoss.cli.mistakes import (
    UsageError,
    agreed,
    is_mistake,
    printable,
    reason,
)
from gptoss.parallel.launch import launched, process_rank

# --- What may a terminal be sent? --------------------------------------------

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


# --- How does a turn look? ---------------------------------------------------

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


# --- What does a session remember? -------------------------------------------

@contextmanager
def stoppable() -> Iterator[dict[str, Any]]:
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


class TerminalSession:
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
        if (used := self.chat.usage) is None:
            return ""
        return (f"[{used.finish_reason}: {used.generated_tokens} tokens in "
                f"{used.seconds:.1f} s; {used.prefilled_tokens} of "
                f"{used.prompt_tokens} read anew]\n")


# --- What does a line with a slash do? ---------------------------------------

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


def _save(session: TerminalSession, name: str, again: bool = False) -> str:
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


def _reset(session: TerminalSession, _: str) -> str:
    session.messages = list(session.head)
    session.chat.reset()
    return "forgotten"


def _effort(session: TerminalSession, level: str) -> str:
    from gptoss.text.harmony import EFFORTS

    if level not in ("", *EFFORTS):
        raise UsageError(f"/effort: expected {', '.join(EFFORTS)}, found "
                         f"{level}")
    settings = session.chat.settings
    settings = settings.with_changes(effort=level or settings.effort)
    session.chat.settings = settings
    return f"effort: {settings.effort}"


def _quit(session: TerminalSession, _: str) -> str:
    raise EOFError


def _help(session: TerminalSession, _: str) -> str:
    return "\n".join([f"{name:15}{about}" for name, (_, about)
                      in SLASH.items()] +
                     ["Ctrl-C stops an answer. A line that begins with a "
                      "space is never a command."])


SLASH: dict[str, tuple[Callable[[TerminalSession, str], str], str]] = {
    "/help": (_help, "this list"),
    "/effort": (_effort, "LEVEL: low, medium or high"),
    "/reset": (_reset, "forget what was said"),
    "/save": (_save, "FILE: write the messages to a new file, as JSON"),
    "/save!": (lambda session, name: _save(session, name, True),
               "FILE: the same, over an old file"),
    "/quit": (_quit, "leave, as Ctrl-D does")}


def obey(session: TerminalSession, line: str) -> None:
    """Carries out a line that begins with a slash."""
    name, _, rest = line.partition(" ")
    if name not in SLASH:
        raise UsageError(f"{name}: no such command; /help lists them")
    session.draw(SLASH[name][0](session, rest.strip()) + "\n", "dim")


# --- Typed, or piped? --------------------------------------------------------

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


def _step(session: TerminalSession, line: str) -> None:
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


def converse(session: TerminalSession) -> None:
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


__all__ = [
    "NARROWEST",
    "SLASH",
    "STYLES",
    "TerminalSession",
    "console",
    "converse",
    "drawer",
    "drawn",
    "obey",
    "piped",
    "stoppable",
    "typed",
    "write_whole",
    "writer",
]
