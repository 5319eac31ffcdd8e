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
#     module: terminal
#     public: [TerminalSession, converse]
# ---

# %% [markdown]
# # A conversation in a terminal
#
# ## Question
#
# Ctrl-C means "stop". But what is to stop while an answer is being written, a
# tool runs, or the prompt waits? And how is one conversation the same on a
# terminal, in a pipe and on several processes?

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a time line of one question: the prompt waits, the prompt is read,
# the answer is written, a tool runs, the prompt waits again. Under each
# stretch stands what Ctrl-C stops there and what stays of the conversation.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
PHASES = [  # wide, name, what stops, what stays, colour
    (22, "the prompt waits", "nothing; a second\none leaves", "everything",
     "0.6"),
    (24, "nothing written yet", "the answer", "not the question", "C1"),
    (26, "an answer is written", "the answer", "its text so far", "C2"),
    (20, "a tool runs", "the answer", "not the call", "C3")]
fig, ax = plt.subplots(figsize=(7, 1.9))
x = 0
for wide, name, stops, stays, colour in PHASES:
    ax.barh(0, wide - 0.6, 0.7, x, color=colour, alpha=0.35)
    ax.text(x + wide / 2, 0, name, ha="center", va="center", fontsize=8)
    ax.text(x + wide / 2, -0.75, stops, ha="center", va="center", fontsize=8)
    ax.text(x + wide / 2, -1.5, stays, ha="center", va="center", fontsize=8)
    x += wide
ax.text(-1, -0.75, "Ctrl-C stops", ha="right", va="center", fontsize=8)
ax.text(-1, -1.5, "and stays:", ha="right", va="center", fontsize=8)
ax.annotate("", (x + 3, 0.55), (0, 0.55), arrowprops={"arrowstyle": "->"})
ax.text(x + 3, 0.62, "time", ha="right", fontsize=8)
ax.set(xlim=(-15, x + 4), ylim=(-1.9, 1.0))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: one question on its way, from left to right. Whatever is
# stopped, the conversation can go on, because only whole or half *messages*
# stay, never a call without its answer or a question that nobody has begun to
# answer. The signal may arrive in the middle of a layer. The chat keeps [the
# cache's books](../chat/memory.ipynb) so that this needs no care here.

# %% [markdown]
# ## The twenty lines
#
# [The chat](../chat/chat.ipynb) gives events; a terminal shows them and keeps
# the messages. That alone is a program that one can talk to:

# %%
import os

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor

from gptoss.chat.turn import ChatEvent


class Terse:
    """Stands for a chat: answers every message with its length."""

    turn: list = []

    def events(self, messages):
        yield ChatEvent("analysis", "I count. ")
        text = str(len(messages[-1]["content"]))
        self.turn = [{"role": "assistant", "content": text}]
        yield ChatEvent("final", text)


def plainly(chat, lines: list[str]) -> list[dict]:
    """Asks each line, prints the answers; the messages."""
    messages: list[dict] = []
    for line in lines:
        asked = [*messages, {"role": "user", "content": line}]
        try:
            for event in chat.events(asked):
                if event.kind == "final":
                    print(event.text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
        messages = asked + chat.turn
    return messages


print(len(plainly(Terse(), ["one", "three"])), "messages")

# %% [markdown]
# What it lacks: text that a terminal must not obey, a look for what is thought
# and called, the lines of the table above, commands, files, pipes, and several
# processes that hold one conversation.

# %% [markdown]
# ## Code
#
# ### What may a terminal be sent?
#
# A file or a pipe gets the bytes as they are. A terminal gets
# [visible text](mistakes.ipynb).

# %% tags=["export"]
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


screen, story = Terminal(), "Once \x1b[2Jupon a time"
writer(screen)(story)
print(screen)

# %% [markdown]
# ### How does a turn look?
#
# What the model thinks and calls is labelled in words, so that a file or a
# terminal without colours says the same as one with them.

# %% tags=["export"]
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
happened = [ChatEvent("analysis", "Six "), ChatEvent("analysis", "sevens."),
            ChatEvent("call", '{"expression": "6*7"}', "calculator"),
            ChatEvent("result", "42", "calculator"),
            ChatEvent("final", "It is 42."), ChatEvent("done", "stop")]
print("".join(text for text, style in drawn(happened)), end="")
print(list(drawn(happened, everything=False)))

# %% tags=["export"]
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
import io

screen = type("Tube", (io.StringIO,), {"isatty": lambda self: True})()
for piece in drawn([ChatEvent("analysis", story), happened[4]]):
    drawer(screen)(*piece)
print(repr(screen.getvalue()))

# %% [markdown]
# ### What does a session remember?
#
# `TerminalSession` holds the messages; the model sees them all in each turn,
# and `Chat` knows which of their tokens it need not feed again.

# %% tags=["export"]
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

# %%
with stoppable() as options:
    print(options)  # in one process

# %% tags=["export"]
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

# %% [markdown]
# ### What does a line with a slash do?
#
# A line at the prompt that begins with a slash is for the program. Each is a
# row of a table; a mistake in one is told, and the conversation goes on.
#
# A file that is opened for writing is empty at once, and if the disk is full
# it stays so. What is saved is therefore written beside the file, whole, and
# put into its place in one step: a reader, a full disk or a power cut finds
# the old file or the new one.

# %% tags=["export"]
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
import contextlib
import tempfile

with tempfile.TemporaryDirectory() as folder:
    kept = Path(folder, "kept")
    write_whole(str(kept), "old")
    for text in ("\udcff", "new"):
        with contextlib.suppress(UnicodeEncodeError):
            write_whole(str(kept), text, again=True)
        print(kept.read_text(), len(os.listdir(folder)))

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
said = []
session = TerminalSession(None, lambda text, style="": said.append(text),
                          True)
session.messages = [{"role": "user", "content": "né"}]
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    obey(session, "/save talk.json")
    try:
        obey(session, "/save talk.json")
    except UsageError as error:
        print(error)
    print(said, json.loads(Path("talk.json").read_text("utf-8")))

# %% [markdown]
# ### Typed, or piped?
#
# With a terminal on stdin the program asks and answers until it is left.
# Without one it reads a message a line and writes the answers: the same
# conversation for scripts, and for `make demo`.

# %% tags=["export"]
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

# %% tags=["export"]
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
session = TerminalSession(None, lambda text, style="": heard.append(text),
                          True)
for line in ("/reset now", "/sing", "/effort loud", "/help"):
    session.chat = argparse.Namespace(reset=lambda: None)
    _step(session, line)
print("".join(heard))

# %%
screen = []
session = TerminalSession(Terse(), lambda text, style: screen.append(text),
                          False)
for line in ("one", "three"):
    session.ask(line)
print("".join(screen), end="")

# %% [markdown]
# ## It holds
#
# Whatever stops an answer, the conversation is one that can go on: what came
# of it stays as a message, and if nothing came the question is forgotten.

# %%
class Stopped(Terse):
    """Stands for a chat that is stopped after so many pieces."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def events(self, messages):
        self.turn = []
        for n in range(self.pieces):
            self.turn = [{"role": "assistant", "content": "a" * (n + 1)}]
            yield ChatEvent("final", "a")
        raise KeyboardInterrupt


for pieces in (0, 1, 3):
    session = TerminalSession(Stopped(pieces), lambda text, style: None, True)
    with contextlib.suppress(KeyboardInterrupt):
        session.ask("why?")
    print(pieces, session.messages)
    assert len(session.messages) == (2 if pieces else 0)

# %% [markdown]
# ## Takeaways
#
# - Ctrl-C stops an answer, not the conversation; what was said so far stays.
# - A terminal, a pipe and several processes run the same turn; only where it
#   is read and drawn differs.
# - What is saved is written beside the file and put into its place whole.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Add a command `/undo` that takes back the last question and its answer.

# %% tags=["hide-cell"]
def undo(session: TerminalSession, _: str) -> str:
    """Forgets all from the last user message on."""
    asked = [n for n, message in enumerate(session.messages)
             if message["role"] == "user"]
    if not asked:
        raise UsageError("/undo: nothing was asked")
    del session.messages[asked[-1]:]
    return f"{len(session.messages)} messages stay"


SLASH["/undo"] = (undo, "take back the last question")
session.draw = lambda text, style="": print(text, end="")
obey(session, "/undo")
try:
    obey(session, "/undo")
except UsageError as error:
    print(error)
# The cache needs no word about it: the next prompt shares a shorter beginning
# with it, and that is what is kept.

# %% [markdown]
# ### Exercise 2
#
# `/save` is given a name in a folder that does not exist, and a name that
# exists. What does the user read, and is the conversation still there?

# %% tags=["hide-cell"]
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("old.json").write_text("mine")
    session.draw = lambda text, style="": print(text.partition(": '")[0])
    for name in ("nowhere/talk.json", "old.json"):
        _step(session, f"/save {name}")
    print(Path("old.json").read_text(), os.listdir("."))
# A line each, nothing is written, and the prompt comes again.

# %% [markdown]
# ## Sources
#
# - Will McGugan and others, rich: `Console.out` writes without wrapping.
# - POSIX, `rename`: a file is replaced in one step.
