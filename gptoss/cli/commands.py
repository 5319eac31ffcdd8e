"""The command line

Generated from book/cli/commands.py; edit the chapter, not this file.
"""

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
from gptoss.cli.mistakes import (
    Ended,
    Parser,
    UsageError,
    agreed,
    complain,
    drop_stdout,
    fill_streams,
    is_mistake,
    printable,
    shortened,
    tidily,
    torchrun_number,
)
from gptoss.cli.options import (
    DENSE,
    JSON,
    MODEL,
    PATH,
    RUNNING,
    SAMPLING,
    Option,
    load_draft,
    load_pair,
    read_prompt,
    sampling,
    torch_dtype,
)
from gptoss.cli.terminal import (
    STYLES,
    TerminalSession,
    converse,
    drawer,
    piped,
    typed,
    writer,
)
from gptoss.parallel.launch import launched

# --- generate: text as it comes ----------------------------------------------

def run_generate(args: argparse.Namespace) -> None:
    """Writes the continuation of a prompt to stdout as it comes."""
    from gptoss.kernels.bench import peak_rss_bytes
    from gptoss.text.generate import complete
    from gptoss.text.stops import stop_ids
    from gptoss.weights.hub import resolve

    options, prompt = sampling(args), read_prompt(args)
    draft, stop = load_draft(args), stop_ids(resolve(args.model))
    model, tokenizer = load_pair(args)
    write = writer(sys.stdout)
    if not args.json and sys.stdout.isatty():
        write(prompt)  # a reader wants the whole; a program has its prompt
    done = complete(model, tokenizer, prompt, options, stop=stop,
                    on_text=None if args.json else write, draft=draft)
    if args.json:
        print(json.dumps(asdict(done) | {"peak_rss_bytes": peak_rss_bytes()}))
        return
    write("\n")
    if sys.stderr.isatty():
        print(f"[{len(done.tokens)} tokens, {done.seconds:.1f} s, "
              f"{done.finish_reason}]", file=sys.stderr)


# --- chat: a conversation ----------------------------------------------------

def _tools(args: argparse.Namespace, known: dict) -> list:
    """The tools that the options name."""
    names = [] if args.no_tools else list(filter(None, args.tools.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"--tools: expected {', '.join(known)}, found "
                             f"{name}")
    return [known[name] for name in names]


def run_chat(args: argparse.Namespace) -> None:
    """A conversation; with a pipe, one message a line of stdin."""
    from gptoss.chat.calculator import TOOLS
    from gptoss.chat.chat import Chat

    if args.json and args.prompt is None:
        raise UsageError("--json: needs --prompt")
    options, tools = sampling(args), _tools(args, TOOLS)
    draft, pair = load_draft(args), load_pair(args)
    seed = options.seed
    if seed is None and launched() > 1:
        seed = agreed(args, lambda: secrets.randbits(48))
    chat = Chat(pair, args.effort, tools, date=args.date, seed=seed,
                max_new_tokens=options.max_new_tokens, top_k=options.top_k,
                temperature=options.temperature, top_p=options.top_p,
                draft=draft)
    everything = args.transcript or sys.stdout.isatty()
    draw = (lambda *_: None) if args.json else drawer(sys.stdout)
    session = TerminalSession(chat, draw, everything, args.system, typed(args))
    if args.prompt is None and agreed(args, sys.stdin.isatty):
        return converse(session)
    asked = args.prompt is not None
    for line in [read_prompt(args)] if asked else piped(args):
        if line and not asked and everything:
            draw(f"> {line}\n", STYLES["user"])
        if line or asked:
            session.ask(line)
    if args.json:
        used = asdict(chat.usage) if chat.usage else {}
        print(json.dumps({"messages": chat.turn} | used))


# --- parity and vectors: is it the same model? -------------------------------

def _walked(folder: Path, prompts: list[str] | None) -> list:
    """Tokens (1, T) of each prompt; [None], the report's own, for none."""
    if prompts is None:
        return [None]
    import torch

    from gptoss.text.tokenizer import Tokenizer

    found = list(map(Tokenizer.from_pretrained(folder).encode, prompts))
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
                      contract, args.plant, args.new_tokens, dense=args.dense)
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


# --- train: the shipped model again ------------------------------------------

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
                             f"found {shortened(value)}")
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


# --- The table of commands ---------------------------------------------------

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
            *SAMPLING, *RUNNING, JSON)),
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
            *SAMPLING, *RUNNING, JSON)),
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
            *RUNNING, JSON)),
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
            *DENSE, JSON)),
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


__all__ = [
    "COMMANDS",
    "Command",
    "build_parser",
    "main",
    "run_chat",
    "run_generate",
    "run_parity",
    "run_train",
    "run_vectors",
]
