"""The command line

Generated from book/B_cli.py; edit the chapter, not this file.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

# --- Text that a terminal cannot obey ----------------------------------------

POCKET = Path(__file__).parent / "pocket" if "__file__" in globals() else None
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class UsageError(ValueError):
    """What the command line itself says cannot be done."""


def visible(text: str, keep: str = "\n\t") -> str:
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


# --- One line for every mistake ----------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr and exit 2 for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


MISTAKES = {"gptoss.config": "ConfigError", "gptoss.mxfp4": "MXFP4Error",
            "gptoss.checkpoint": "CheckpointError",
            "gptoss.cache": "CacheError", "gptoss.model": "ModelError",
            "gptoss.harmony": "HarmonyError",
            "gptoss.generate": "GenerateError",
            "gptoss.messages": "ChatError", "gptoss.parity": "ParityError",
            "gptoss.vectors": "VectorError",
            "gptoss.kernels": "KernelError",
            "gptoss.parallel": "ParallelError",
            "torch": "OutOfMemoryError"}


def lacks_memory(error: BaseException) -> bool:
    """Whether there was not enough of it: torch's allocator for the CPU
    says so by a RuntimeError like any other."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("allocate memory|bad_alloc", str(error)) is not None)


def is_mistake(error: BaseException) -> bool:
    """Whether `error` is told in one line. Others are bugs: a traceback.

    A module that was never imported has raised nothing, so none is imported
    here: a wrong option answers at once.
    """
    classes = [getattr(sys.modules[module], name, UsageError)
               for module, name in MISTAKES.items() if module in sys.modules]
    return isinstance(error, (UsageError, OSError, *classes)) \
        or lacks_memory(error)


def reason(error: BaseException) -> str:
    """What `error` says, in one line that a terminal cannot obey."""
    line = visible(" ".join(str(error).split()), keep="")
    if lacks_memory(error):
        asked = re.search(r"[0-9]+ bytes", line)
        return f"not enough memory{f' for {asked[0]}' if asked else ''}"
    return line or type(error).__name__


# --- Streams that are not there ----------------------------------------------

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


# --- Told to end -------------------------------------------------------------

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


# --- One of several processes ------------------------------------------------

def _number(name: str, size: int | None = None) -> int:
    """A number that torchrun has put into the environment, and which is to
    be below `size`; -1 for anything else."""
    text = os.environ.get(name, "")
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if size is not None and not 0 <= number < size:
        raise UsageError(f"{name}: torchrun sets it to 0 ... {size - 1}, "
                         f"found {text!r}")
    return number


def several() -> int:
    """How many processes torchrun has started, if more than one; else 0."""
    size = _number("WORLD_SIZE") if "RANK" in os.environ else 0
    return size if size > 1 else 0


def process_rank() -> int:
    """Which of them this is; 0 speaks for all."""
    return max(_number("RANK"), 0) if several() else 0


def agreed(args: argparse.Namespace, make: Callable[[], object]) -> object:
    """make(), as the first process finds it."""
    if not several():
        return make()
    from gptoss.parallel import join

    kind = getattr(args, "device", "cpu").partition(":")[0]
    return join(kind).same(make)


def _model(args: argparse.Namespace, folder: Path, device="cpu"):
    """The model in a folder, or this process's part of it."""
    dtype = _dtype(getattr(args, "dtype", "bfloat16"))
    alone = not several() and args.stages == 1
    if args.compact and (not alone or (str(device), str(dtype))
                         != ("cpu", "torch.bfloat16")):
        raise UsageError("--compact: for one process, --device cpu and "
                         "--dtype bfloat16")
    if not alone:
        from gptoss.parallel import load_split

        return load_split(folder, dtype, device, stages=args.stages)
    from gptoss.model import GptOss

    model = GptOss.from_pretrained(folder, dtype=dtype, device=device)
    if args.compact:
        from gptoss.compact import make_compact

        make_compact(model)
    return model


# --- What the options mean ---------------------------------------------------

def _short(value: object) -> str:
    """A value as a message may show it: nobody reads 400 digits."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"


def _dtype(name: str):
    import torch

    return getattr(torch, name)


def _device(name: str):
    """The torch device `name`, after a byte was put on it."""
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and several():  # each its own
            device = torch.device("cuda", _number("LOCAL_RANK", several()))
        if device.type == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(1, dtype=torch.uint8, device=device)
        return device
    except UsageError:
        raise
    except Exception as error:  # a backend may raise anything, ImportError too
        why = (str(error).splitlines() or ["not available"])[0]
        raise UsageError(f"--device {name}: {why}") from error


def _prompt(args: argparse.Namespace) -> str:
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


# --- generate ----------------------------------------------------------------

def _writer(stream) -> Callable[[str], None]:
    """Writes text at once; to a terminal without its control characters."""
    terminal = stream.isatty()

    def write(text: str) -> None:
        stream.write(visible(text) if terminal else text)
        stream.flush()
    return write


def run_generate(args: argparse.Namespace) -> None:
    """Writes the continuation of a prompt to stdout as it comes."""
    from gptoss.checkpoint import Checkpoint, resolve
    from gptoss.generate import (
        Sampler,
        complete,
        peak_rss_bytes,
        stop_ids,
    )
    from gptoss.harmony import Tokenizer
    from gptoss.kernels import load_kernels

    sampler = Sampler(args.temperature, args.top_k, args.top_p)
    prompt, device = _prompt(args), _device(args.device)
    folder = resolve(args.model)
    Checkpoint.open(folder).close()  # the headers, before anything slow
    tokenizer, stop = Tokenizer.from_pretrained(folder), stop_ids(folder)
    model = _model(args, folder, device)
    load_kernels()  # after all that may be wrong: the first time it compiles
    write = _writer(sys.stdout)
    if not args.json and sys.stdout.isatty():
        write(prompt)  # a reader wants the whole; a program has its prompt
    done = complete(model, tokenizer, prompt, sampler=sampler, stop=stop,
                    seed=args.seed, max_new_tokens=args.max_new_tokens,
                    on_text=None if args.json else write)
    if args.json:
        print(json.dumps(asdict(done) | {"peak_rss_bytes": peak_rss_bytes()}))
        return
    write("\n")
    if sys.stderr.isatty():
        print(f"[{len(done.tokens)} tokens, {done.seconds:.1f} s, "
              f"{done.finish_reason}]", file=sys.stderr)


# --- chat: a turn as pieces of text ------------------------------------------

STYLES = {"user": "bold", "analysis": "dim", "commentary": "dim",
          "final": "", "call": "cyan", "result": "cyan", "notice": "yellow"}


def drawn(events: Iterable, everything: bool = True
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


def _console(stream):
    """rich's console on a stream: a terminal if that is one."""
    from rich.console import Console

    return Console(file=stream, force_jupyter=False,
                   force_terminal=stream.isatty(), width=max(
                       NARROWEST, shutil.get_terminal_size().columns))


def _drawer(stream) -> Callable[[str, str], None]:
    """Writes (text, style) at once; on a terminal in its style and without
    its control characters."""
    write = _writer(stream)
    if not stream.isatty():
        return lambda text, style="": write(text)
    console = _console(stream)

    def draw(text: str, style: str = "") -> None:
        console.out(visible(text), style=style or None, highlight=False,
                    end="")
        stream.flush()
    return draw


# --- chat: a session ---------------------------------------------------------

@contextmanager
def stoppable() -> Iterator[dict]:
    """Options of `Chat.events` with which Ctrl-C stops a turn.

    One process needs none: there it is an exception, wherever it comes.
    One of several must not leave the others in the middle of a sum, so the
    first notes that the key was pressed, and says so before the next token.
    """
    if not several() or (threading.current_thread()
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


class Session:
    """A chat and the messages that were exchanged."""

    def __init__(self, chat, draw: Callable[..., None], everything: bool,
                 system: str | None = None,
                 read: Callable[[str], str] = input) -> None:
        self.chat, self.draw, self.everything = chat, draw, everything
        self.read = read
        self.head = ([{"role": "system", "content": system}] if system
                     else [])
        self.messages = list(self.head)

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


# --- chat: commands ----------------------------------------------------------

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
    from gptoss.harmony import EFFORTS

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


# --- chat: typed or piped ----------------------------------------------------

def _lines(args: argparse.Namespace) -> Iterator[str]:
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
            if several():  # the others have no part in this one's bug
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


def _tools(args: argparse.Namespace, known: dict) -> list:
    """The tools that the options name."""
    names = [] if args.no_tools else list(filter(None, args.tools.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"--tools: expected {', '.join(known)}, found "
                             f"{name}")
    return [known[name] for name in names]


def _reader(args: argparse.Namespace) -> Callable[[str], str]:
    """input(), of the first process if there are several."""
    def typed(words: str) -> str | None:
        try:
            return input(words)
        except EOFError:
            return None

    def read(words: str) -> str:
        line = agreed(args, lambda: typed(words))
        if line is None:
            raise EOFError
        return line
    return read


def _split_chat(args: argparse.Namespace) -> tuple:
    """Model and tokenizer for this process, the same seed in all."""
    from gptoss.checkpoint import resolve
    from gptoss.harmony import Tokenizer

    folder, device = resolve(args.model), _device(args.device)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = _model(args, folder, device)
    if args.seed is None:
        args.seed = agreed(args, lambda: secrets.randbits(48))
    return model, tokenizer


def run_chat(args: argparse.Namespace) -> None:
    """A conversation; with a pipe, one message a line of stdin."""
    from gptoss.calculator import TOOLS
    from gptoss.chat import Chat
    from gptoss.kernels import load_kernels

    if args.json and args.prompt is None:
        raise UsageError("--json: needs --prompt")
    model, tools = args.model, TOOLS
    if several() or args.stages != 1 or args.compact:
        model = _split_chat(args)
    chat = Chat(model, args.effort, _tools(args, tools), date=args.date,
                temperature=args.temperature, top_k=args.top_k,
                top_p=args.top_p, seed=args.seed, dtype=_dtype(args.dtype),
                max_new_tokens=args.max_new_tokens,
                device=_device(args.device))
    load_kernels()
    everything = args.transcript or sys.stdout.isatty()
    draw = (lambda *_: None) if args.json else _drawer(sys.stdout)
    session = Session(chat, draw, everything, args.system, _reader(args))
    if args.prompt is None and agreed(args, sys.stdin.isatty):
        return converse(session)
    for line in [_prompt(args)] if args.prompt is not None else _lines(args):
        if line and args.prompt is None and everything:
            draw(f"> {line}\n", STYLES["user"])
        if line or args.prompt is not None:
            session.ask(line)
    if args.json:
        print(json.dumps({"messages": chat.turn} | asdict(chat.usage)))


# --- inspect -----------------------------------------------------------------

def show_plan(args: argparse.Namespace) -> None:
    """Prints what 1 to 8 GPUs could do with a model."""
    from gptoss.checkpoint import config_folder, resolve
    from gptoss.config import GptOssConfig
    from gptoss.plan import plan, plan_table

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
    print(visible("\n\n".join(plan_table(name, config, args.context)
                              for name, config in models.items())))


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


def summary(report: dict) -> Iterator[tuple[str, str]]:
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


def run_inspect(args: argparse.Namespace) -> None:
    """Prints what a checkpoint holds, without reading its weights."""
    if args.plan:
        return show_plan(args)
    from gptoss.checkpoint import Checkpoint, describe, resolve
    from gptoss.kernels import kernel_path

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
        table.add_row(Text(visible(label, "")), Text(visible(value, "")))
    _console(sys.stdout).print(table)


# --- convert -----------------------------------------------------------------

def run_convert(args: argparse.Namespace) -> None:
    """Rewrites a checkpoint in another layout, with a hash per tensor."""
    from rich.progress import Progress

    from gptoss.checkpoint import Checkpoint, convert, resolve

    source = resolve(args.source)
    with Checkpoint.open(source) as checkpoint:
        count = len(checkpoint.names())
    with tidily(), Progress(console=_console(sys.stderr), transient=True,
                            disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("converting", total=count)
        manifest = convert(source, Path(args.target), args.layout,
                           progress=lambda name: bar.advance(task))
    print(f"{len(manifest)} tensors written to {visible(args.target, '')}")


# --- bench -------------------------------------------------------------------

def figures(found: dict) -> str:
    """What `measure` found, a line each; rates with their spread."""
    def shown(value) -> str:
        return (f"{value:,.4g}" if isinstance(value, float)
                else f"{value:,}" if isinstance(value, int) else str(value))

    lines = []
    for key, value in found.items():
        if not isinstance(value, dict):  # a spread goes with its median
            around = found.get(f"{key}_spread")
            lines.append(f"{key:>26}  {shown(value)}" + (
                f"  ({shown(around['low'])} to {shown(around['high'])})"
                if around else ""))
    return "\n".join(lines)


def run_bench(args: argparse.Namespace) -> None:
    """Measures loading, reading and writing on random tokens."""
    from gptoss.checkpoint import Checkpoint, resolve
    from gptoss.kernels import measure

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
                    load=lambda folder: _model(args, folder))
    if several():
        found |= {"processes": several(), "stages": args.stages}
    print(json.dumps(found) if args.json else figures(found))


# --- parity and vectors ------------------------------------------------------

def _walked(folder: Path, prompts: list[str] | None) -> list:
    """Tokens (1, T) of each prompt; [None], the report's own, for none."""
    if prompts is None:
        return [None]
    import torch

    from gptoss.harmony import Tokenizer

    encode = Tokenizer.from_pretrained(folder).encode
    found = [encode(prompt) for prompt in prompts]
    if not all(found):
        raise UsageError("--prompt: expected at least one token")
    return [torch.tensor([ids]) for ids in found]


def run_parity(args: argparse.Namespace) -> None:
    """Walks ours and a reference and names the first that goes wrong."""
    from gptoss.checkpoint import resolve
    from gptoss.parity import parity_table, report

    folder = resolve(args.path)
    if args.new_tokens < 0:
        raise UsageError(f"--new-tokens: expected at least 0, found "
                         f"{args.new_tokens}")
    if args.plain and args.contract == "kernels":
        raise UsageError("--plain: not with --contract kernels")
    contract = args.contract or ("fp32" if args.plain else None)
    results = [report(folder, args.against, tokens, _dtype(args.dtype),
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
        print(visible("\n\n".join(tables)))
    if any(result["findings"] for result in results):
        raise SystemExit(1)


def run_vectors(args: argparse.Namespace) -> None:
    """Writes conformance vectors, or checks this package or a port."""
    from gptoss.vectors import check, write

    if args.action == "write":
        print(*(visible(str(file), "") for file in write(args.folder)),
              sep="\n")
        return
    wrong = check(args.folder, args.answers, args.dtype)
    print("\n".join(visible(line, "") for line in wrong)
          if wrong else "every case passes")
    if wrong:
        raise SystemExit(1)


# --- train -------------------------------------------------------------------

def run_train(args: argparse.Namespace) -> None:
    """Trains the shipped checkpoint anew, with a given seed."""
    from gptoss.train import Recipe, make_pocket

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
    print(f"written to {visible(args.target, '')}")


# --- The table of commands ---------------------------------------------------

FIRST_WORDS = "Once upon a time"
_MODEL = {"--model": dict(default=str(POCKET), metavar="PATH_OR_ID",
                          help="folder or hub id (default: the one shipped)")}
_JSON = {"--json": dict(action="store_true", help="one JSON object")}
_STAGES = {"--stages": dict(type=int, default=1, metavar="N",
                            help="with torchrun: split the layers into N "
                            "stages, and each among the rest (default: 1)")}
_COMPACT = {"--compact": dict(action="store_true", help="on a CPU: dense "
                              "matrices in twelve bits without loss, a copy "
                              "to decode faster")}
_SAMPLING = {
    "--temperature": dict(type=float, default=1.0, metavar="X",
                          help="0 is greedy (default: 1)"),
    "--top-p": dict(type=float, default=1.0, metavar="X"),
    "--top-k": dict(type=int, default=0, metavar="N"),
    "--seed": dict(type=int, metavar="N"),
    "--dtype": dict(default="bfloat16", choices=(
        "bfloat16", "float16", "float32"), help="default: bfloat16"),
    "--device": dict(default="cpu", help="cpu (default), cuda, ..."),
}
COMMANDS = {
    "generate": (run_generate, _MODEL | {
        "--prompt": dict(help="text to go on from; - reads stdin"),
        "--max-new-tokens": dict(type=int, default=256, metavar="N"),
    } | _SAMPLING | _COMPACT | _STAGES | _JSON),
    "chat": (run_chat, _MODEL | {
        "--prompt": dict(help="one message, answered; - reads stdin"),
        "--effort": dict(default="medium", choices=(
            "low", "medium", "high"), help="default: medium"),
        "--system": dict(metavar="TEXT", help="instructions"),
        "--max-new-tokens": dict(type=int, metavar="N", help="in an answer"),
        "--tools": dict(default="calculator,today", metavar="NAMES",
                        help="default: calculator,today"),
        "--no-tools": dict(action="store_true"),
        "--date": dict(help="what the model is told (default: today)"),
        "--transcript": dict(action="store_true", help="write analysis and "
                             "calls too, as a terminal always shows"),
    } | _SAMPLING | _COMPACT | _STAGES | _JSON),
    "inspect": (run_inspect, {
        "path": dict(metavar="PATH_OR_ID", nargs="?", default=str(POCKET),
                     help="folder or hub id (default: the one shipped)"),
        "--tensors": dict(action="store_true", help="list each tensor"),
        "--plan": dict(action="store_true", help="what 1 to 8 GPUs could do "
                       "with it, or with 20b, 120b (default: those two)"),
        "--context": dict(type=int, default=8192, metavar="N",
                          help="tokens, for --plan (default: 8192)"),
    } | _JSON),
    "convert": (run_convert, {
        "source": dict(metavar="SOURCE"), "target": dict(metavar="TARGET"),
        "--layout": dict(required=True, choices=("hf", "original", "bf16")),
    }),
    "bench": (run_bench, {
        "path": dict(metavar="PATH_OR_ID", nargs="?", default=str(POCKET),
                     help="folder or hub id (default: the one shipped)"),
        "--prompt-tokens": dict(type=int, default=512, metavar="N"),
        "--new-tokens": dict(type=int, default=32, metavar="N"),
        "--repeats": dict(type=int, default=3, metavar="N"),
    } | _COMPACT | _STAGES | _JSON),
    "parity": (run_parity, {
        "path": dict(metavar="PATH_OR_ID", nargs="?", default=str(POCKET),
                     help="folder or hub id (default: the one shipped)"),
        "--against": dict(default="transformers", choices=(
            "transformers", "streamed", "grouped_mm", "openai", "float64")),
        "--dtype": dict(default="bfloat16", choices=("float32", "bfloat16")),
        "--contract": dict(choices=(
            "fp32", "hf-eager", "openai-torch", "kernels"),
            help="how ours rounds (default: as what runs does)"),
        "--plain": dict(action="store_true",
                        help="ours in plain torch, not by the kernels"),
        "--prompt": dict(action="append", help="text to walk over, once or "
                         "more (default: random tokens)"),
        "--new-tokens": dict(type=int, default=0, metavar="N",
                             help="written first, and walked over too"),
        "--plant": dict(metavar="FAULT", help="break ours first: window ..."),
    } | _COMPACT | _JSON),
    "vectors": (run_vectors, {
        "action": dict(choices=("write", "check")),
        "folder": dict(metavar="DIR"),
        "--answers": dict(metavar="FILE", help="a port's outputs to check"),
        "--dtype": dict(default="float32", choices=("float32", "bfloat16"),
                        help="of the answers"),
    }),
    "train": (run_train, {
        "target": dict(metavar="TARGET", help="folder to be made"),
        "--seed": dict(type=int, default=0, metavar="N"),
        "--steps": dict(type=int, metavar="N",
                        help="default: as many as the recipe says"),
    }),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser for `COMMANDS`."""
    import gptoss

    parser = Parser(prog="gptoss", description="gpt-oss, from the book.")
    parser.add_argument("--version", action="version",
                        version=gptoss.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, options) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__,
                                      description=run.__doc__)
        for option, how in options.items():
            command.add_argument(option, **how)
        command.set_defaults(run=run)
    return parser


# --- From arguments to an exit code ------------------------------------------

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
    if several() and _number("RANK", several()):
        sys.stdout = open(os.devnull, "w")
    args = build_parser().parse_args(argv)
    if several() and not hasattr(args, "stages"):
        raise UsageError("torchrun is for generate, chat and bench")
    args.run(args)
    sys.stdout.flush()
    if several():
        sys.modules["gptoss.parallel"].leave()
    return 0


# `python -m gptoss` runs this file as the package's main module; a notebook,
# whose __name__ is "__main__" too, has no package
if __name__ == "__main__" and globals().get("__package__") == "gptoss":
    sys.exit(main())
