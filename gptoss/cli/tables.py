"""Commands that print tables

Generated from book/cli/tables.py; edit the chapter, not this file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptoss.cli.mistakes import UsageError, printable, tidily
from gptoss.cli.options import POCKET, load_model
from gptoss.cli.terminal import console
from gptoss.parallel.launch import launched

# --- inspect: what is in the file, and who can run it? -----------------------

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


# --- convert: the same weights in another layout -----------------------------

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


# --- bench: how fast is it here? ---------------------------------------------

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


__all__ = [
    "SIZES",
    "UNITS",
    "figures",
    "run_bench",
    "run_convert",
    "run_inspect",
    "show_plan",
    "summary",
    "with_unit",
]
