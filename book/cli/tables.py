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
#     module: tables
# ---

# %% [markdown]
# # Commands that print tables
#
# ## Question
#
# What can be said of a checkpoint before one weight is read? How it is laid
# out, what a token costs, and which cards would hold it: all of that stands in
# a config and in headers, less than a hundredth of the file. Three commands
# answer in tables: `inspect`, `convert` and `bench`.

# %% [markdown]
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: three bars on a logarithmic axis of bytes, for the shipped model:
# inspect reads the header, some thousand bytes; a token reads about a million;
# convert reads the whole file, some millions.
import json
import os
from importlib.resources import files

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
shards = [path for path in POCKET.iterdir()
          if path.name.endswith(".safetensors")]


def header(path) -> dict:
    """The header of a safetensors file: name -> dtype, shape, place."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def header_bytes(path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


shipped = GptOssConfig.from_pretrained(POCKET)
BYTES = {"inspect reads the header": sum(map(header_bytes, shards)),
         "a token reads": bytes_read_per_token(shipped),
         "convert reads the file": sum(os.path.getsize(p) for p in shards)}
fig, ax = plt.subplots(figsize=(7, 1.8))
for y, count in enumerate(BYTES.values()):
    ax.barh(y, count, color=("C2", "C0", "C1")[y], height=0.6)
    ax.text(count * 1.1, y, f"{count:,}", va="center", fontsize=8)
ax.set_yticks(range(3), BYTES)
ax.set(xscale="log", xlabel="bytes", ylim=(2.5, -0.5), xlim=(1e3, 1e8))
ax.grid(visible=False)
plt.show()
first, *_, last = BYTES.values()
print(f"the header is {first / last:.2%} of the file")

# %% [markdown]
# What to see: the shipped model's bytes, each step of the axis ten times as
# many. `inspect` needs the smallest bar only, so it answers at once, for the
# released models as well. (This cell uses the finished package.)

# %% [markdown]
# ## The twenty lines
#
# The [header](../weights/file.ipynb) of a safetensors file names each tensor,
# its shape and its place. That is already a table:

# %%
found: dict[str, int] = {}
for path in shards:
    for name, entry in header(path).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            part = name.split(".")[3] if ".layers." in name else name
            found[part] = found.get(part, 0) + end - start
for part, count in sorted(found.items(), key=lambda item: -item[1]):
    print(f"{count:>12,}  {part}")

# %% [markdown]
# What is left is to say what a token costs, to do it for every layout, and to
# print nothing that a terminal obeys: a file's name and its tensors' names are
# text from somebody else.

# %% [markdown]
# ## Code
#
# ### inspect: what is in the file, and who can run it?
#
# With `--plan`, `inspect` answers, from the formulas of
# [a second card](../parallel/second_card.ipynb), which cards a model fits on
# and how fast they could be at best.

# %% tags=["export"]
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
# faster when they share each matrix (`tensor`), by less and less; none does
# when they take turns (`stages`).
#
# Without `--plan` it prints a row for each number, large ones with a unit for
# people. A name or a value is made harmless ([visible](mistakes.ipynb)) on its
# way.

# %% tags=["export"]
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

# %% tags=["export"]
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
import contextlib
import io
import tempfile

from gptoss.weights.write import random_tensors, write_checkpoint

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
# ### convert: the same weights in another layout
#
# [Writing](../weights/writing.ipynb) does the work; the command adds a bar, on
# a terminal only, and [takes care](mistakes.ipynb) that a signal leaves
# nothing half-written.

# %% tags=["export"]
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
# ### bench: how fast is it here?
#
# [The measuring](../kernels/measured.ipynb) is done elsewhere; here a median
# stands with its spread beside it. What cannot be measured is refused before
# anything is loaded: fewer than two tokens, no repeat, more tokens than the
# context holds.

# %% tags=["export"]
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
# ## In the 20b and the 120b

# %%
for name, real in (("20b", GptOssConfig.gpt_oss_20b()),
                   ("120b", GptOssConfig.gpt_oss_120b())):
    print(name, "reads", with_unit(bytes_read_per_token(real)),
          "bytes of weights for a token")

# %% [markdown]
# ## Takeaways
#
# - The headers of a checkpoint suffice for its sizes, costs and cards.
# - What a file says of itself is made harmless before it is printed.
# - A measured number stands with its spread.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# From the headers alone: how many bytes would the shipped model take as bf16?
# (A byte of `_blocks` holds two weights, one of `_scales` none.)

# %% tags=["hide-cell"]
bf16 = 0
for path in shards:
    for name, entry in header(path).items():
        if name != "__metadata__" and not name.endswith("_scales"):
            start, end = entry["data_offsets"]
            bf16 += (end - start) * (4 if name.endswith("_blocks") else 1)
print(f"{BYTES['convert reads the file']:,} -> {bf16:,} bytes")

# %% [markdown]
# ### Exercise 2
#
# Which cards hold the 120b with 131,072 tokens, by the plan?

# %% tags=["hide-cell"]
from gptoss.parallel.plan import plan_table

config_120b = GptOssConfig.gpt_oss_120b()
lines = plan_table("120b", config_120b, 131072).splitlines()
print(*[line for line in lines if "131,072" in line], sep="\n")

# %% [markdown]
# ## Sources
#
# - huggingface/safetensors: the header's form.
# - Textualize/rich: tables and bars of progress.
