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
#     module: layout
#     public: [CheckpointError, tensor_table]
# ---

# %% [markdown]
# # What is in the file?
#
# ## Question
#
# The 20b is 13,761,264,768 bytes of numbers in 459 tensors, in three files.
# How much must be read to know every tensor's name, shape, dtype and place,
# and to be sure that the files are whole and belong to this model? None of
# the numbers, only 53 kB of headers, one byte in 260,000. What is in them?
#
# ## Picture

# %%
from safetensors.torch import save

# %% tags=["hide-input"]
# Figure: left, the file of the 20b as a map of which each line is one layer:
# the parts form columns, mostly expert blocks, between two tables of the
# vocabulary. Right, the bytes of each part of a layer, from 265 MB of blocks
# down to 128 bytes of sinks.
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bf16_bytes, checkpoint_bytes

plt.style.use("../_static/book.mplstyle")

c = GptOssConfig.gpt_oss_20b()
D, F, E, V = (c.hidden_size, c.intermediate_size, c.num_local_experts,
              c.vocab_size)
Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
layer = {  # bytes, in the order of the file
    "q and o": 4 * Q * D, "k and v": 4 * KV * D,
    "gate_up blocks": E * F * D, "gate_up scales": E * F * D // 16,
    "down blocks": E * D * F // 2, "down scales": E * D * F // 32}
small = {"experts' biases": 2 * E * (2 * F + D), "router": 2 * E * (D + 1),
         "other biases": 2 * (Q + 2 * KV + D), "two norms": 4 * D,
         "sinks": 2 * c.num_attention_heads}
colours = ["#000000", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73",
           "#CC79A7", "#888888"]
kinds = ["embedding", *layer, "lm_head"]
order = ([("embedding", 2 * V * D)] + list(layer.items())
         * c.num_hidden_layers + [("lm_head", 2 * V * D)])
width = 240
step = sum(layer.values()) / width  # bytes in a pixel
ends = np.cumsum([size for _, size in order])
rows = int(np.ceil(ends[-1] / step / width))
part = np.searchsorted(ends, (np.arange(rows * width) + 0.5) * step)
picture = np.array([kinds.index(kind) for kind, _ in order] + [np.nan])[part]

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9),
                                  width_ratios=(1.35, 1))
left.imshow(picture.reshape(rows, width), aspect="auto",
            interpolation="nearest", vmin=-0.5, vmax=7.5,
            cmap=plt.matplotlib.colors.ListedColormap(colours))
begin = 2 * V * D + 12 * sum(layer.values()) + layer["q and o"] \
    + layer["k and v"] + 17 * layer["gate_up blocks"] // E
at = begin / step
left.add_patch(Rectangle((at % width - 0.5, at // width - 0.5),
                         layer["gate_up blocks"] / E / step, 1, fill=False,
                         edgecolor="white", lw=1.4))
left.annotate("layer 12,\nexpert 17", (at % width, at // width), (145, 6),
              color="white", fontsize=8,
              arrowprops={"arrowstyle": "-", "color": "white"})
left.set(title="13.76 GB of the 20b, line by line", xticks=[], yticks=[],
         ylabel="a line is one layer, 476 MB")
left.grid(False)
left.legend(handles=[Patch(color=colour, label=kind) for kind, colour
                     in zip(kinds, colours, strict=True)], ncols=4,
            loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=7,
            handlelength=1, columnspacing=1)
sizes = dict(sorted({**layer, **small}.items(), key=lambda kv: -kv[1]))
right.barh(list(sizes), list(sizes.values()), color=[
    colours[kinds.index(kind)] if kind in kinds else "#bbbbbb"
    for kind in sizes])
right.invert_yaxis()
right.set(xscale="log", xlabel="bytes in one layer", xlim=(50, 2e9),
          title="one layer")
plt.show()

# %% [markdown]
# Left: the tensors of the 20b one after the other. Between the two tables of
# the vocabulary lie 24 layers of the same make, so that in lines as long as
# a layer their parts form columns; five sixths of each are four-bit blocks
# of the experts, orange and green. One expert's gate and up
# projection, the white frame, is an unbroken run of 8.3 MB that can be read
# alone. Right: what one layer is made of, on a logarithmic axis. Six decades
# lie between the blocks and the 64 sinks, and a reader that loses the 128
# bytes at the bottom gets every answer wrong all the same.
#
# ## The naive version
#
# PyTorch's own format is a pickle, and a pickle is a program:

# %%
import io

import torch


class Weights:
    def __reduce__(self):  # what unpickling calls, with which arguments
        return print, ("this file has just run code of its own",)


file = io.BytesIO()
torch.save({"lm_head.weight": Weights()}, file)
file.seek(0)
loaded = torch.load(file, weights_only=False)

# %% [markdown]
# (By default `torch.load` has refused such a file since torch 2.6.)
# safetensors holds numbers and a table of contents, nothing that can run.
#
# ## Derivation
#
# **The file.** A safetensors file is eight bytes, a JSON text and the
# numbers. Let $n$ be the little-endian integer in the eight bytes; the JSON
# has $n$ bytes and gives for each tensor its dtype, its shape and the half
# open interval of its bytes, counted from the end of the JSON. By hand:

# %%
import json
import struct

from safetensors.torch import save

raw = save({"sinks": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
            "blocks": torch.tensor([[0x21, 0x43]], dtype=torch.uint8)})
(n,) = struct.unpack("<Q", raw[:8])
header = json.loads(raw[8:8 + n])
print(n, header)
begin, end = header["sinks"]["data_offsets"]
print(raw[8 + n + begin:8 + n + end].hex(" "))

# %% [markdown]
# Low byte first, `80 3f` and `00 c0` are 3f80 and c000, the upper halves of
# the floats 1.0 and -2.0: bf16. If tensor $t$ has $b_t$ bytes and tensors
# follow one another without a gap, then in a file of $m$ tensors tensor $t$
# begins at byte $o_t$:
#
# $$
# o_t = 8 + n + \sum_{s < t} b_s , \qquad
# \text{size} = 8 + n + \sum_{t \le m} b_t .
# $$ (checkpoint-offset)
#
# The second equation is the test for a download that broke off: it needs the
# header and the file's length, and none of the numbers.
#
# **A row.** Numbers are stored row by row. If $t$ has $R$ rows, its first
# dimension, then rows $r$ to $r' - 1$ are one run of bytes,
#
# $$
# \Big[\, o_t + r\,\frac{b_t}{R},\; o_t + r'\,\frac{b_t}{R} \Big) .
# $$ (checkpoint-rows)
#
# For the experts a row is an expert.
#
# **Two layouts.** OpenAI's `original/` and the Hugging Face layout hold the
# same bytes under other names, but for one thing: `original/` has one matrix
# `qkv`, whose rows are those of q, k and v, one matrix under the other. With
# H query heads and G key/value heads of C numbers,
#
# $$
# W_{qkv} = \begin{pmatrix} W_q \\ W_k \\ W_v \end{pmatrix}, \qquad
# \text{first rows } 0,\; HC,\; HC + GC .
# $$ (checkpoint-qkv)
#
# By {eq}`checkpoint-rows` each of the three is a run of bytes: it can be
# read from the joined matrix without a copy, and written into it before the
# other two are there. So each tensor has a *place*: the stored tensor, and
# its first row in it. One table of names, shapes and places serves reading,
# checking, writing and converting. Fine-tuned models often come in a third
# layout, Hugging Face's with the experts decoded to bf16 and transposed,
# (E, in, out) instead of (E, out, in).
#
# ## Code
#
# ### Names, shapes and dtypes as one table

# %% tags=["export"]
import itertools
import json
import logging
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gptoss.weights.config import ConfigError, GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.errors import Error, mismatch
from gptoss.weights.mxfp4 import BLOCK

class CheckpointError(Error):
    """A checkpoint that is not what it should be; names file and tensor."""


faulty = partial(mismatch, CheckpointError)

# %% tags=["export"]
# Hugging Face name, original name, shape. `L.` is "model.layers.N." in the
# one, "block.N." in the other. Q = H C, KV = G C. The three rows of the
# original qkv stand one under the other. blocks and scales are U8.
NAME_MAP = (
    ("model.embed_tokens.weight", "embedding.weight", "V D"),
    ("L.input_layernorm.weight", "L.attn.norm.scale", "D"),
    ("L.self_attn.q_proj.weight", "L.attn.qkv.weight", "Q D"),
    ("L.self_attn.k_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.v_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.q_proj.bias", "L.attn.qkv.bias", "Q"),
    ("L.self_attn.k_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.v_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.o_proj.weight", "L.attn.out.weight", "D Q"),
    ("L.self_attn.o_proj.bias", "L.attn.out.bias", "D"),
    ("L.self_attn.sinks", "L.attn.sinks", "H"),
    ("L.post_attention_layernorm.weight", "L.mlp.norm.scale", "D"),
    ("L.mlp.router.weight", "L.mlp.gate.weight", "E D"),
    ("L.mlp.router.bias", "L.mlp.gate.bias", "E"),
    ("L.mlp.experts.gate_up_proj_blocks", "L.mlp.mlp1_weight.blocks",
     "E 2F D/32 16"),
    ("L.mlp.experts.gate_up_proj_scales", "L.mlp.mlp1_weight.scales",
     "E 2F D/32"),
    ("L.mlp.experts.gate_up_proj_bias", "L.mlp.mlp1_bias", "E 2F"),
    ("L.mlp.experts.down_proj_blocks", "L.mlp.mlp2_weight.blocks",
     "E D F/32 16"),
    ("L.mlp.experts.down_proj_scales", "L.mlp.mlp2_weight.scales",
     "E D F/32"),
    ("L.mlp.experts.down_proj_bias", "L.mlp.mlp2_bias", "E D"),
    ("model.norm.weight", "norm.scale", "D"),
    ("lm_head.weight", "unembedding.weight", "V D"),
)

# %%
print(len(NAME_MAP), "rows, of which", sum(
    hf.startswith("L.") for hf, _, _ in NAME_MAP), "in every layer")

# %% [markdown]
# With the sizes of a configuration filled in, the 22 rows become the
# complete list of what a checkpoint holds. (`groupby` keeps the order: the
# row before the layers, all layers, the rows after.)

# %% tags=["export"]
LAYOUTS = ("hf", "original", "bf16")
PACKED = ("_blocks", "_scales")
DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "F16": torch.float16,
          "F32": torch.float32, "F64": torch.float64}
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor; dtype as safetensors spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

# %% tags=["export"]
def _rows(c: GptOssConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """NAME_MAP with layer numbers and sizes filled in."""
    D, F, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    for key, width in (("hidden_size", D), ("intermediate_size", F)):
        if width % BLOCK:
            raise faulty(key, f"a multiple of {BLOCK} (MXFP4 blocks)", width)
    sizes = {"V": c.vocab_size, "D": D, "2F": 2 * F, "D/32": D // 32,
             "F/32": F // 32, "16": 16, "H": H, "E": c.num_local_experts,
             "Q": H * c.head_dim, "KV": c.num_key_value_heads * c.head_dim}
    for layered, group in itertools.groupby(
            NAME_MAP, lambda row: row[0].startswith("L.")):
        rows = list(group)
        for n in range(c.num_hidden_layers if layered else 1):
            for hf, original, shape in rows:
                if layered:
                    hf = f"model.layers.{n}.{hf[2:]}"
                    original = f"block.{n}.{original[2:]}"
                yield hf, original, tuple(sizes[s] for s in shape.split())

# %% tags=["export"]
def tensor_table(config: GptOssConfig, layout: str = "hf",
                 floats: str = "BF16") -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint: name there -> TensorSpec, in order.

    "hf" and "original" are the released layouts; "bf16" is Hugging Face's
    with decoded experts, (E, in, out). Other layouts: CheckpointError.
    floats: the dtype of what is not packed, as safetensors spells it.
    """
    if layout not in LAYOUTS:
        raise faulty("layout", f"one of {LAYOUTS}", repr(layout))
    table: dict[str, TensorSpec] = {}
    for hf, original, shape in _rows(config):
        name = original if layout == "original" else hf
        dtype = "U8" if hf.endswith(PACKED) else floats
        if layout == "bf16" and dtype == "U8":
            if hf.endswith("_scales"):
                continue
            name, dtype = hf.removesuffix("_blocks"), floats
            experts, out, blocks, _ = shape
            shape = (experts, 32 * blocks, out)
        if name in table:  # k below q, v below k
            above = table[name].shape
            shape = (above[0] + shape[0], *above[1:])
        table[name] = TensorSpec(name, shape, dtype)
    return table

# %%
SMALL, LARGE = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
for name in ("block.7.attn.qkv.weight", "block.7.mlp.mlp1_weight.blocks"):
    print(name, tensor_table(SMALL, "original")[name])
print([len(tensor_table(SMALL, layout)) for layout in LAYOUTS], "tensors")

# %% [markdown]
# ### Where a canonical tensor lies
#
# From here on a name without further remark is Hugging Face's, with q, k and
# v apart: the *canonical* one, which
# [the model](../model/transformer.ipynb) uses too.

# %% tags=["export"]
@dataclass(frozen=True)
class Place:
    """A tensor under its canonical name, and where its rows are stored."""

    spec: TensorSpec  # canonical: Hugging Face's name, unfused
    stored: str  # name in the file
    first: int  # its first row there


def places(config: GptOssConfig, layout: str, floats: str = "BF16"
           ) -> dict[str, Place]:
    """Canonical name -> Place. Only q, k, v of "original" share one."""
    if layout != "original":
        table = tensor_table(config, layout, floats)
        return {name: Place(spec, name, 0) for name, spec in table.items()}
    table, filled, found = tensor_table(config, "hf", floats), Counter(), {}
    for hf, original, shape in _rows(config):
        found[hf] = Place(table[hf], original, filled[original])
        filled[original] += shape[0]
    return found

# %%
for part in "qkv":
    place = places(SMALL, "original")[
        f"model.layers.7.self_attn.{part}_proj.weight"]
    print(part, list(place.spec.shape), "from row", place.first, "of",
          place.stored)

# %% [markdown]
# Which layout a file has can be seen from the names in it:

# %% tags=["export"]
def find_layout(names: Iterable[str]) -> str:
    """"hf", "original" or "bf16", from the names that we know."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    dense = ("experts.gate_up_proj", "experts.down_proj")
    return "bf16" if any(name.endswith(dense) for name in names) else "hf"

# %%
for layout in LAYOUTS:
    assert find_layout(tensor_table(SMALL, layout)) == layout

# %% [markdown]
# And a name tells the component of the model that a tensor belongs to, in
# the words of [the counts](counts.ipynb):

# %% tags=["export"]
COMPONENTS = {"embed_tokens": "embedding", "self_attn": "attention",
              ".router.": "router", ".experts.": "experts", "norm": "norms",
              "lm_head": "lm_head"}


def component_of(name: str) -> str:
    """The component of `parameter_counts` that a tensor belongs to."""
    return next(part for word, part in COMPONENTS.items() if word in name)

# %%
sums = dict.fromkeys(COMPONENTS.values(), 0)
for name, spec in tensor_table(SMALL).items():
    sums[component_of(name)] += spec.nbytes
print({part: f"{size / 1e9:.3f} GB" for part, size in sums.items()})

# %% [markdown]
# ### The header of one file
#
# Every number in a header is somebody else's claim. It is believed if
# {eq}`checkpoint-offset` holds exactly: no gap, no overlap, no missing end.

# %% tags=["export:files"]
import logging

_log = logging.getLogger("gptoss")


MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    spec: TensorSpec
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int

# %% tags=["export:files"]
def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, from its header alone.

    CheckpointError if the header is none, if tensors overlap or leave a
    gap, or if the file is shorter or longer than the header says.
    """
    status = file.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise faulty(file, "a file", "a folder, a pipe or a device")
    with open(file, "rb") as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise faulty(file, "safetensors", "a git-lfs pointer (git lfs "
                         "pull fetches the file)")
        if len(first) < 8 or length > min(size - 8, MAX_HEADER):
            raise faulty(file, f"safetensors with a header of {length} bytes",
                         f"{size} bytes (cut off, or another format)")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        stored = [_stored(file, name, entry, 8 + length)
                  for name, entry in header.items()]
    except CheckpointError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError,
            KeyError) as error:
        raise faulty(file, "a safetensors header",
                     f"{raw[:40]!r}...") from error
    _check_cover(file, stored, 8 + length, size)
    return {s.spec.name: s for s in stored}

# %% tags=["export:files"]
def _stored(file: Path, name: str, entry: dict, base: int) -> Stored:
    """One entry of a header; any malformed one raises some ValueError."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if (not all(type(n) is int and n >= 0 for n in numbers)
            or not isinstance(entry["dtype"], str)):
        raise ValueError(name)
    spec = TensorSpec(name, shape, entry["dtype"])
    if spec.dtype in DTYPES and spec.nbytes != end - begin:
        raise faulty(f"{file}: {name}", f"{spec.nbytes} bytes for {spec}",
                     end - begin)
    return Stored(spec, file, base + begin, end - begin)


def _check_cover(file: Path, stored: list[Stored], end: int,
                 size: int) -> None:
    """Tensors must follow one another from the header to the file's end."""
    for s in sorted(stored, key=lambda s: (s.offset, s.nbytes)):
        where = f"{file}: {s.spec.name}"
        if s.offset != end:
            raise faulty(where, f"at byte {end}", f"at {s.offset}")
        end += s.nbytes
        if end > size:
            raise faulty(where, f"to end at byte {end}",
                         f"a file of {size} bytes (cut off?)")
    if end != size:
        raise faulty(file, f"{end} bytes", size)

# %%
import tempfile

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)


def report(call, *args, **options):
    """Print the error that a call ends in, without the folder's name."""
    try:
        call(*args, **options)
    except (CheckpointError, ValueError) as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")
    else:
        raise AssertionError("no error")


file = here / "x.safetensors"
file.write_bytes(raw)
for stored in read_header(file).values():
    print(stored.spec.name, stored.spec, "at byte", stored.offset)
file.write_bytes(raw[:-1])
report(read_header, file)
file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
report(read_header, file)
file.unlink()

# %% [markdown]
# ### Which files
#
# A large checkpoint is cut into shards, and `model.safetensors.index.json`
# says which tensor is in which. It comes from the internet and contains file
# names, so a name that leaves the folder is refused. And the index and the
# headers of the files that it names must name the same tensors: one that
# only one of them knows means that shards of two versions lie side by side.

# %% tags=["export:files"]
def _read_index(index: Path) -> dict[str, str]:
    """The weight_map of an index; file names that leave the folder, or that
    are not there, are a CheckpointError."""
    try:
        said = read_json(index)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    named = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(named, dict):
        raise faulty(index, "JSON with a weight_map", "none")
    for name, file in named.items():
        where = f"{index}: {name}"
        if (not isinstance(file, str) or not file.endswith(".safetensors")
                or re.search(r"[/\\:\0]", file)):
            raise faulty(where, "the name of a .safetensors file in this "
                         "folder", repr(file))
        if not (index.parent / file).is_file():
            raise faulty(where, f"in {file}", "no such file")
    return named

# %% [markdown]
# Other files of the kind may lie in the folder: shards that an earlier, longer
# save has left, or an adapter that has been merged since. The index decides:
# what it does not name is not read. Without an index `model.safetensors` is
# the model, and without that all files but an adapter's. One case is too
# close to call, an index and a `model.safetensors` that it does not name.
# The one is left from another save, and `transformers` reads the second
# where people mean the first.

# %% tags=["export:files"]
WHOLE = "model.safetensors"


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a folder that are its model's, and the index
    that says so, if there is one."""
    files = sorted(file for file in folder.glob("*.safetensors")
                   if not file.name.startswith("adapter_"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise faulty(folder, "one index",
                     f"{indexes[0].name} and {indexes[1].name}")
    if not indexes:
        return [file for file in files if file.name == WHOLE] or files, None
    named = set(_read_index(indexes[0]).values())
    if (folder / WHOLE).exists() and WHOLE not in named:
        raise faulty(folder / WHOLE, f"only files that {indexes[0].name} "
                     "names", "this one (which of the two is the model?)")
    return [folder / name for name in sorted(named)], indexes[0]

# %% tags=["export:files"]
def find_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's model by their names there, from headers
    alone. An index must name exactly what is in the files that it names."""
    files, index = weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise faulty(f"{file}: {name}", "once",
                             f"in {found[name].file.name} as well")
            found[name] = stored
    if index is not None:
        _check_index(index, _read_index(index), found)
    return found

# %% tags=["export:files"]
def _check_index(index: Path, named: dict[str, str],
                 found: dict[str, Stored]) -> None:
    for name, file in named.items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise faulty(f"{index}: {name}", f"in {file}", f"in {where}")
    for name, stored in found.items():
        if name not in named:
            raise faulty(f"{stored.file}: {name}", f"in {index.name}",
                         "only in the file")

# %% tags=["export:files"]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADAPTER = ("a LoRA adapter, which changes a model and is none: merge it first "
           "(peft: merge_and_unload(), then save_pretrained())")


def weights_folder(path: Path) -> Path:
    """`path`, or its original/ if only that holds safetensors."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory")
    if not path.is_dir():
        raise faulty(path, "a directory", "a file")
    adapter = any(path.glob("adapter_*"))
    for folder in (path, path / "original"):
        if weight_files(folder)[0]:
            if adapter:
                _log.warning("%s: an adapter lies beside the weights and is "
                             "not applied", path)
            return folder
    if adapter:
        raise faulty(path, "a model", ADAPTER)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise faulty(path, "*.safetensors", f"{pickles[0]}: a pickle can run "
                     "any code, so none is opened")
    there = "only config.json" if (path / "config.json").exists() else "none"
    raise faulty(path, "config.json and *.safetensors", there)

# %% tags=["export:files"]
def config_folder(path: Path) -> Path:
    """`path`, or its original/ if only that has a config.json."""
    below = path / "original"
    return below if ((below / "config.json").exists() and not (
        path / "config.json").exists()) else path

# %%
index = here / "model.safetensors.index.json"
for name in ("model-00001-of-00002.safetensors", "../../secret.safetensors"):
    index.write_text(json.dumps({"weight_map": {"norm.scale": name}}))
    report(find_tensors, here)
index.unlink()
(here / "pytorch_model.bin").touch()
report(weights_folder, here)
(here / "pytorch_model.bin").unlink()
(here / "adapter_model.safetensors").touch()
report(weights_folder, here)
(here / "adapter_model.safetensors").unlink()

# %% [markdown]
# ### A header of one's own
#
# The other way round, {eq}`checkpoint-offset` gives the header of tensors of
# which only names, shapes and dtypes are known: none of the numbers.

# %% tags=["export:files"]
def make_header(specs: Iterable[TensorSpec]) -> bytes:
    """The safetensors header of tensors stored one after the other."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape),
                             "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers start aligned
    return len(text).to_bytes(8, "little") + text

# %%
file = here / "x.safetensors"
two = [TensorSpec("sinks", (2,), "BF16"), TensorSpec("blocks", (1, 2), "U8")]
file.write_bytes(make_header(two) + raw[8 + n:])
print(file.read_bytes()[8:].split(b"  ")[0].decode())
print([stored.offset for stored in read_header(file).values()])
file.unlink()

# %% [markdown]
# ## It holds
#
# Places tile the stored tensors: every row of each belongs to exactly one
# canonical tensor. In any layout, for both models and a tiny one:

# %%
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)
for config in (TINY, SMALL, LARGE):
    for layout in LAYOUTS:
        table = tensor_table(config, layout)
        filled = dict.fromkeys(table, 0)
        for place in places(config, layout).values():
            assert place.first == filled[place.stored]
            filled[place.stored] += place.spec.shape[0]
        assert filled == {name: s.shape[0] for name, s in table.items()}
        print(len(places(config, layout)), "tensors in", len(table))

# %% [markdown]
# A file that was cut is noticed wherever it was cut, and the first tensor
# that is not whole is named. The tiny model in the original layout, with
# zeros for numbers, at 222 lengths:

# %%
whole = here / "model.safetensors"
table = tensor_table(TINY, "original")
whole.write_bytes(make_header(table.values())
                  + bytes(sum(spec.nbytes for spec in table.values())))
stored = read_header(whole)
data = whole.read_bytes()
start = min(s.offset for s in stored.values())
cut = here / "cut.safetensors"
lengths = [*range(len(data) - 1, start, -997), start, start - 1, 9, 7, 0]
for length in lengths:
    cut.write_bytes(data[:length])
    try:
        read_header(cut)
        raise AssertionError(length)
    except CheckpointError as error:
        lost = [s for s in stored.values() if s.offset + s.nbytes > length]
        first = min(lost, key=lambda s: s.offset).spec.name
        assert length < start or first in str(error)
cut.unlink()
print("cut in", len(lengths), "places")

# %% [markdown]
# ## Against the others
#
# The safetensors library reads a file that was laid out with our header:

# %%
from safetensors import safe_open

with safe_open(whole, "pt") as f:
    print(f.metadata(), len(list(f.keys())), "tensors")
    for name in f.keys():  # noqa: SIM118
        assert tuple(f.get_slice(name).get_shape()) == table[name].shape
        assert f.get_slice(name).get_dtype() == table[name].dtype
whole.unlink()

# %% [markdown]
# *`HeaderTooLarge`.* What many report under this name (transformers
# [#27923](https://github.com/huggingface/transformers/issues/27923),
# DeepSeek-V3
# [#557](https://github.com/deepseek-ai/DeepSeek-V3/issues/557)) is a git-lfs
# pointer in place of the file: its first eight bytes, `version `, announce
# a header of $2.3 \cdot 10^{18}$ bytes. Here the message says what it is.
#
# ## In the 20b and the 120b
#
# The table for the released configurations has exactly the published numbers
# of tensors and bytes:

# %%
for name, config, size, hf, original in (
        ("20b", SMALL, 13_761_264_768, 459, 363),
        ("120b", LARGE, 65_248_815_744, 687, 543)):
    tables = [tensor_table(config, layout) for layout in LAYOUTS]
    sizes = [sum(s.nbytes for s in table.values()) for table in tables]
    assert sizes[:2] == [size, size] == [checkpoint_bytes(config)] * 2
    assert [len(table) for table in tables][:2] == [hf, original]
    assert sizes[2] == bf16_bytes(config)
    print(f"{name:>4}: {len(tables[0])} tensors, or {len(tables[1])}; "
          f"{sizes[0]:,} bytes, decoded {sizes[2]:,}")

# %% [markdown]
# A released repository holds the numbers twice, in `original/` too, one file
# for the 20b and seven for the 120b.
#
# ## Takeaways
#
# - A checkpoint is a table of names, shapes and places; the configuration
#   determines all of it, so a file can be checked before a number is read.
# - Rows of the first dimension are runs of bytes: an expert, q, k or v, or a
#   range of the vocabulary lies in one piece.
# - Names from a file are claims: no path that leaves the folder, no gap, no
#   overlap, no pickle.
#
# ## Exercises
#
# ### Exercise 1
#
# In a single file of the 20b in the original layout, at which byte does
# expert 17's down projection in layer 12 begin, and how many bytes has it?

# %% tags=["hide-cell"]
table = tensor_table(SMALL, "original")
name = "block.12.mlp.mlp2_weight.blocks"
before = itertools.takewhile(lambda n: n != name, table)
offset = len(make_header(table.values())) + sum(
    table[n].nbytes for n in before)
row = table[name].nbytes // SMALL.num_local_experts
print(f"byte {offset + 17 * row:,}, {row:,} bytes")
assert row == 2880 * 90 * 16

# %% [markdown]
# ### Exercise 2
#
# Two tensors of a header lie over one another: `a` in bytes 0 to 8 and `b` in
# bytes 4 to 12. Why is that refused, although each of them is whole?

# %% tags=["hide-cell"]
text = json.dumps({
    name: {"dtype": "U8", "shape": [8], "data_offsets": [start, start + 8]}
    for name, start in (("a", 0), ("b", 4))}).encode()
file = here / "overlap.safetensors"
file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
report(read_header, file)
# whoever changes one changes the other; and a small file could claim to be
# a large one, by tensors that all lie at the same place
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - safetensors 0.8: the format, `README.md` of huggingface/safetensors.
# - openai/gpt-oss, `gpt_oss/torch/weights.py`, `Checkpoint` and
#   `PARAM_NAME_MAP`; `gpt_oss/torch/model.py`, `AttentionBlock`.
# - transformers 5.23, `models/gpt_oss/convert_gpt_oss_weights_to_hf.py`
#   (the names, q, k and v taken apart) and `modeling_gpt_oss.py`,
#   `GptOssExperts`.
# - The released index files, for names, shapes and totals {cite}`gptoss2025`;
#   the block format {cite}`ocpmx2023`.
