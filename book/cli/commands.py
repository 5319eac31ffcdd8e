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
#     public: [COMMANDS, main]
# ---

# %% [markdown]
# # The command line
#
# ## Question
#
# How does a program whose commands need torch, tokenizers and transformers
# answer `--help` without loading one of them? It writes down *names* of what
# it may need, and imports what a name stands for when it is used. Two things
# come out of this: the names that `import gptoss` offers
# (`gptoss/__init__.py`), and the table of eight commands, with the functions
# of those that compute.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a table of numbers, commands by parts of the package in the order of
# the book: blue where a command loads modules of a part, and how many. --help
# loads four of the command line and two others, commands that run a model
# most.
import ast
import os
from functools import cache
from importlib.resources import files

import matplotlib.pyplot as plt

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
plt.style.use("../_static/book.mplstyle")
PACKAGE = files("gptoss")
front = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
(PARTS,) = (ast.literal_eval(node.value) for node in front.body
            if isinstance(node, ast.Assign)
            and node.targets[0].id == "_PARTS")


@cache
def parsed(name: str) -> ast.Module:
    """A module of this package; "cli.tables" is one."""
    file = PACKAGE / f"{name.replace('.', '/')}.py"
    return ast.parse(file.read_text("utf-8"))


def imported(nodes) -> set[str]:
    """Modules of this package that the nodes import from."""
    return {node.module.removeprefix("gptoss.") for node in nodes
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("gptoss.")}


def closure(names: set[str]) -> set[str]:
    """`names` and all that they import when they are loaded."""
    known: set[str] = set()
    while new := names - known:
        known |= new
        names = set().union(*(imported(parsed(name).body) for name in new))
    return known


found = {node.name: imported(ast.walk(node))
         for name in ("options", "tables", "commands")
         for node in parsed(f"cli.{name}").body
         if isinstance(node, ast.FunctionDef)}
model = found["load_model"] - {"parallel.split"}  # that is for torchrun
pair = model | found["load_pair"]
needs = {"--help": set()} | {
    name: found[f"run_{name}"] | more for name, more in (
        ("generate", pair | found["sampling"]),
        ("chat", pair | found["sampling"]), ("inspect", {"cli.tables"}),
        ("convert", {"cli.tables"}), ("bench", model | {"cli.tables"}),
        ("parity", set()), ("vectors", set()), ("train", set()))}
fig, ax = plt.subplots(figsize=(7, 2.4))
for y, names in enumerate(needs.values()):
    used = closure(names | {"cli.commands"})
    for x, part in enumerate(PARTS):
        count = sum(name.startswith(f"{part}.") for name in used)
        ax.text(x, y, count or "·", ha="center", va="center", fontsize=9,
                color="C0" if count else "0.6",
                weight="bold" if count else "normal")
ax.set_xticks(range(len(PARTS)), PARTS, rotation=30, ha="right")
ax.set_yticks(range(len(needs)), needs)
ax.set(xlim=(-0.5, len(PARTS) - 0.5), ylim=(len(needs) - 0.5, -0.5))
ax.grid(visible=False)
plt.show()

# %% [markdown]
# How many modules of each part a command loads (blue), read off the import
# statements. `--help` and a mistyped option load four modules of the command
# line and two small ones, so they answer in the time Python takes to start;
# `convert` needs no model. What splits a model comes in only under `torchrun`
# and with `inspect --plan`.

# %% [markdown]
# ## The twenty lines
#
# A name is a text, `module:function`. It costs nothing until it is looked up:

# %%
import sys
from importlib import import_module

TABLE = {"root": "math:sqrt", "pack": "lzma:compress"}


def plainly(command: str, argument: object) -> object:
    """Runs a command of the table."""
    module, _, name = TABLE[command].partition(":")
    return getattr(import_module(module), name)(argument)


sys.modules.pop("lzma", None)
for name, value in (("root", 2.25), ("pack", b"once " * 99)):
    done = plainly(name, value)
    print(name, "gives", type(done).__name__, "| loaded:",
          {"lzma"} & sys.modules.keys())

# %% [markdown]
# The package's front door does this for classes, the table of commands for
# functions. The rest of the chapter is what stands in the two tables.

# %% [markdown]
# ## Code
#
# ### What does `import gptoss` load?
#
# `import gptoss` loads nothing: a name is looked up in its module when it is
# first used (`__getattr__` of a module). With this the command line can
# answer `--help` without loading torch. A class is the same by whichever path
# it came: [the kernels](../kernels/building.ipynb) are loaded by what first
# [computes](../model/operators.ipynb), and `GPTOSS_KERNELS=torch` in the
# environment declines them.

# %% tags=["export:/__init__"]
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss import chat as chat
    from gptoss import checkpoint as checkpoint
    from gptoss import harmony as harmony
    from gptoss import kernels as kernels
    from gptoss import mxfp4 as mxfp4
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
    "checkpoint": ("weights.layout", "weights.files", "weights.spellings",
                   "weights.checkpoint", "weights.write", "weights.convert",
                   "weights.hub"),
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
# A type checker runs nothing, so it sees nothing of what `__getattr__` finds.
# For mypy and for editors each subject has a *stub*, a file of types beside
# the code that Python itself never reads:

# %% [markdown] tags=["export:/mxfp4.pyi"]
# ```python
# from gptoss.weights.mxfp4 import *
# from gptoss.weights.encoding import *
# from gptoss.model.ops import *
# ```

# %% [markdown] tags=["export:/checkpoint.pyi"]
# ```python
# from gptoss.weights.layout import *
# from gptoss.weights.files import *
# from gptoss.weights.spellings import *
# from gptoss.weights.checkpoint import *
# from gptoss.weights.write import *
# from gptoss.weights.convert import *
# from gptoss.weights.hub import *
# ```

# %% [markdown] tags=["export:/harmony.pyi"]
# ```python
# from gptoss.text.vocabulary import *
# from gptoss.text.tokenizer import *
# from gptoss.text.typescript import *
# from gptoss.text.harmony import *
# from gptoss.text.template import *
# from gptoss.text.parser import *
# ```

# %% [markdown]
# ### generate: text as it comes
#
# The commands that compute come first: a `run_` function each, which gets what
# was typed. Most of it is order: first what can be refused at once (options, a
# prompt, a device), then the slow part, the model.

# %% tags=["export"]
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

# %% [markdown]
# ### chat: a conversation
#
# The prompt of a conversation knows its tools and its date; the seed is the
# same in all processes.

# %% tags=["export"]
def _tools(args: argparse.Namespace, known: dict) -> list:
    """The tools that the options name."""
    names = [] if args.no_tools else list(filter(None, args.tools.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"--tools: expected {', '.join(known)}, found "
                             f"{name}")
    return [known[name] for name in names]

# %% tags=["export"]
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

# %% [markdown]
# ### parity and vectors: is it the same model?
#
# [The walk](../parity/final.ipynb) and the [vectors](../parity/vectors.ipynb).
# A fault that they find is no mistake of the user: it goes to stdout, and the
# exit code is 1. The walk is over what `generate` computes with: bf16, and the
# kernels where there are some; `--plain` and `--dtype` ask for something else.

# %% tags=["export"]
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

# %% [markdown]
# ### train: the shipped model again
#
# The [shipped checkpoint](../training/training.ipynb) again, from nothing. The
# target is looked at first: "already there" is no news for somebody who has
# waited for the whole training.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
print(build_parser().parse_args(["generate", "--top-k", "5"]).top_k)

# %% [markdown]
# ### From arguments to an exit code

# %% tags=["export"]
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
import contextlib
import io


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
# **Every mistake is one line and a 2**: whatever is wrong, with its name in
# the line, nothing on stdout. (A test breaks a checkpoint in more than thirty
# ways.)

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
# ## In the 20b and the 120b
#
# The same commands; only `--model` differs. A folder is read where it lies,
# anything else of the form `owner/name` is a repository on the hub and is
# fetched once.

# %% [markdown]
# ```console
# $ python -m gptoss inspect openai/gpt-oss-20b
# $ python -m gptoss generate --model openai/gpt-oss-20b \
#       --prompt "The capital of France is" --max-new-tokens 32
# $ python -m gptoss chat --model openai/gpt-oss-20b --effort high
# $ python -m gptoss convert openai/gpt-oss-20b there --layout original
# ```

# %% [markdown]
# ## Cost
#
# The price of a command is what it imports. `--help` and a mistyped option
# import nothing of the package beyond what the picture shows:

# %%
import subprocess

script = ("import sys; from gptoss.cli.commands import main; "
          "code = main(['generate', '--loud']); "
          "print(code, [m for m in ('torch', 'tokenizers', 'transformers') "
          "if m in sys.modules])")
print(subprocess.run([sys.executable, "-c", script], capture_output=True,
                     text=True).stdout)

# %% [markdown]
# ## Takeaways
#
# - A command is a row of a table: a name that is looked up when it is called,
#   its help, its options.
# - So `--help` costs what Python costs, and a mistyped option is told at once.
# - What can be refused at once is refused before anything slow.
# - Bugs keep their tracebacks; everything else is a line and a code.

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
