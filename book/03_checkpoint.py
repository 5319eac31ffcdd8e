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
#     module: checkpoint
# ---

# %% [markdown]
# # What is in the file?
#
# ## Question
#
# The 20b is 13,761,264,768 bytes of numbers in 459 tensors, in three files.
# How much must be read to know every tensor's name, shape, dtype and place,
# and to be sure that the files are whole and belong to this model? None of
# the numbers, only 53 kB of headers, one byte in 260,000. What is in them,
# and how can 65 GB be read, checked and rewritten in another layout on a
# machine with 16 GB of memory?
#
# ## Picture

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

plt.style.use("_static/book.mplstyle")

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
# The usual loop over its files still takes far more memory than it should:

# %%
from safetensors.torch import load, save

raw = save({"w": torch.zeros(1000, 1000, dtype=torch.bfloat16)})
tensors = load(raw)                                       # a second copy
wide = {name: t.float() for name, t in tensors.items()}   # twice as wide
held = len(raw) + sum(t.nbytes for d in (tensors, wide) for t in d.values())
print(f"{held / len(raw):.1f} times the file")
for name, c in (("20b", GptOssConfig.gpt_oss_20b()),
                ("120b", GptOssConfig.gpt_oss_120b())):
    held = 2 * checkpoint_bytes(c) + bf16_bytes(c)  # experts decoded to bf16
    print(f"{name}: {checkpoint_bytes(c) / 1e9:.3g} GB of file, "
          f"{held / 1e9:.3g} GB to load it so")

# %% [markdown]
# In practice: one loader took 50.14 GiB of memory for the 20b, and 3.49 GiB
# after it was made to read a layer at a time (NeMo
# [Automodel#3667](https://github.com/NVIDIA-NeMo/Automodel/issues/3667)).
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
# For the experts a row is an expert. A file that is mapped into memory
# (`mmap`) gets addresses, and only the first access to a page of 4096 bytes
# reads it. A tensor made from such addresses is a view of the file; a run
# that nobody touches is never read.
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
# **Writing before the numbers are there.** The configuration decides every
# $b_t$, hence every header and, by {eq}`checkpoint-offset`, every $o_t$. So
# all files can be laid out empty; then tensors may come in any order, a few
# rows at a time. Memory is bounded by the rows in flight, not by a tensor, a
# shard or the model.
#
# ## Code
#
# ### Names, shapes and dtypes as one table

# %% tags=["export:weights/layout"]
import ctypes
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from gptoss.weights.config import ConfigError, GptOssConfig
from gptoss.weights.sizes import (
    active_parameters,
    cache_bytes,
    cache_bytes_per_token,
    parameter_counts,
    total_parameters,
)
from gptoss.weights.config_file import read_json
from gptoss.weights.errors import Error, mismatch
from gptoss.weights.mxfp4 import BLOCK, SCALE_NAN, MXFP4Error, decode
from gptoss.weights.encoding import encode

class CheckpointError(Error):
    """A checkpoint that is not what it should be; names file and tensor."""


faulty = partial(mismatch, CheckpointError)

# %% tags=["export:weights/layout"]
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

# %% tags=["export:weights/layout"]
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

# %% tags=["export:weights/layout"]
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

# %% tags=["export:weights/layout"]
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
# v apart: the *canonical* one, which the model of chapter 10 uses too.

# %% tags=["export:weights/layout"]
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
# ### The header of one file
#
# Every number in a header is somebody else's claim. It is believed if
# {eq}`checkpoint-offset` holds exactly: no gap, no overlap, no missing end.

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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

# %% tags=["export:weights/files"]
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
# ### Names that other programs give
#
# Programs that train write the same tensors under other names. Wrappers of
# modules leave a word in the middle; a save of the inner model has no
# `model.` in front; and unsloth, which needs ordinary linear layers to put
# its adapters on, has one tensor for each expert, (out, in), and one word
# more for the router. The first table says what becomes of a part of a
# name. The second names kinds of files that hold a gpt-oss and cannot be
# read, by the names that give them away, and says what to do. And tensors
# that hold nothing that was learnt, tables of rotary frequencies, are left
# out.

# %% tags=["export:weights/files"]
ALIASES = (  # a part of a name, and what we call it
    (r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
     r"module)\.", ""),
    (r"^base_model\.model\.", ""),
    (r"^(?=(embed_tokens|layers|norm\.weight)\b)", "model."),
    (r"\.router\.linear\.", ".router."),
)
ONE_EXPERT = re.compile(
    r"(.*\.experts\.(?:gate_up|down)_proj)s\.(0|[1-9]\d{0,5})\."
    r"(weight|bias)")
NOT_LEARNT = re.compile(r".*\brotary_emb\.(original_)?inv_freq")
REFUSED = (  # what is in a name, and what it shows
    (r"\b(lora_|base_layer\b|modules_to_save\b)", ADAPTER),
    (r"bitsandbytes__|\b(nested_)?(absmax|quant_map)$|\bSCB$",
     "weights that bitsandbytes has quantised: save the model merged, in 16 "
     "bits"),
    (r"\b(qweight|qzeros|g_idx)$",
     "weights quantised as GPTQ or AWQ do: take the model that was quantised"),
    (r"(_packed|_scale|_scale_inv|_zero_point)$",
     "weights quantised to FP8 or INT4: take the model that was quantised"),
    (r"\bexperts\.((gate|up)_proj\b|(gate_up|down)_proj\.|\d+\.)",
     "experts as MLX and others save them, each in a way of its own: take "
     "the model that was converted"),
    (r"^(score|classifier|v_head)\b",
     "a model with another head than a language model's"),
)

# %% tags=["export:weights/files"]
def known_name(stored: Stored) -> str:
    """What we call a tensor of a file, if we know it under another name;
    CheckpointError for one of a kind that is not read."""
    name = stored.spec.name
    for pattern, what in REFUSED:
        if re.search(pattern, name):
            raise faulty(f"{stored.file}: {name}", "a tensor of gpt-oss",
                         what)
    for pattern, ours in ALIASES:
        name = re.sub(pattern, ours, name)
    return name

# %%
for name in ("model.layers.3._orig_mod.mlp.router.linear.bias",
             "layers.0.input_layernorm.weight", "model.norm.weight",
             "block.3.mlp.gate.bias"):
    print(known_name(Stored(TensorSpec(name, (4,), "F32"), file, 0, 16)))
for name in ("model.layers.0.self_attn.q_proj.lora_A.weight",
             "model.layers.0.mlp.experts.down_projs.0.weight.absmax"):
    report(known_name, Stored(TensorSpec(name, (4,), "F32"), file, 0, 16))

# %% [markdown]
# The one tensor of each expert makes a row of the tensor that we know. It
# lies (out, in) in the file; the decoded experts of Hugging Face are (E, in,
# out), so it is turned when it is read.

# %% tags=["export:weights/files"]
@dataclass(frozen=True)
class PerExpert:
    """A tensor of which each row is one in a file; matrices are turned."""

    name: str
    parts: tuple[Stored, ...]

    @property
    def spec(self) -> TensorSpec:
        first = self.parts[0].spec
        return TensorSpec(self.name, (len(self.parts), *first.shape[::-1]),
                          first.dtype)

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def stacked(folder: Path, name: str, rows: dict[int, Stored]) -> PerExpert:
    """The rows as one tensor; CheckpointError if one is missing or differs."""
    first = rows[min(rows)].spec
    for n in range(len(rows)):
        if n not in rows:
            raise faulty(f"{folder}: {name}, expert {n}", "a tensor", "none")
        spec = rows[n].spec
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise faulty(f"{rows[n].file}: {spec.name}", first, spec)
    return PerExpert(name, tuple(rows[n] for n in sorted(rows)))

# %% [markdown]
# A fourth kind is read by its dtype. Since transformers 5.5 a model that was
# decoded on loading, trained and saved has its *floats* under the names
# `..._blocks`, and no scales. `transformers` itself does not recognise them:
# it takes its own file for a packed one without scales, leaves the experts
# as they are drawn at random, and warns. The numbers are all there, so here
# they are decoded experts under another name.

# %% tags=["export:weights/files"]
def recognise(folder: Path, found: dict[str, Stored]
              ) -> dict[str, Stored | PerExpert]:
    """The tensors of a file under the names that we know them by."""
    known: dict[str, Stored | PerExpert] = {}
    experts: dict[str, dict[int, Stored]] = {}
    for stored in found.values():
        if NOT_LEARNT.fullmatch(stored.spec.name):
            continue
        name = known_name(stored)
        one = ONE_EXPERT.fullmatch(name)
        bare = name.removesuffix("_blocks")
        scales = stored.spec.name.removesuffix("_blocks") + "_scales"
        if one:
            name = one[1] + "_bias" * (one[3] == "bias")
            rows, n = experts.setdefault(name, {}), int(one[2])
            name = f"{name}, expert {n}" if n in rows else ""
            rows[n] = stored
        elif stored.spec.dtype in FLOATS and scales not in found:
            name = bare
        if name in known or one and name:
            raise faulty(f"{stored.file}: {stored.spec.name}",
                         f"{name} once", "it under two names")
        if name:
            known[name] = stored
    for name, rows in experts.items():
        if name in known:
            raise faulty(f"{folder}: {name}", "once", "each expert as well")
        known[name] = stacked(folder, name, rows)
    return known

# %%
def stand(name, shape, dtype="BF16"):
    spec = TensorSpec(name, shape, dtype)
    return Stored(spec, here / "model.safetensors", 0, spec.nbytes)


layer = "model.layers.0.mlp.experts."
strange = {name: stand(name, shape) for name, shape in {
    layer + "gate_up_proj_blocks": (2, 64, 192),
    layer + "down_projs.0.weight": (64, 96),
    layer + "down_projs.1.weight": (64, 96),
    "model.rotary_emb.inv_freq": (8,)}.items()}
for name, what in recognise(here, strange).items():
    print(name, what.spec)
report(recognise, here, {name: tensor for name, tensor in strange.items()
                         if "projs.0" not in name})

# %% [markdown]
# ### One matrix for both ends
#
# A model may look tokens up in the matrix that it reads the logits from. No
# released gpt-oss does, but a configuration may say so, and then a file has
# one of the two. It is read twice; a file with both has both, equal or not,
# as in `transformers`. What we write always has both.

# %% tags=["export:weights/files"]
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def untied(config: GptOssConfig, found: dict[str, Stored | PerExpert]
           ) -> GptOssConfig:
    """If embedding and head are tied, the one that is missing is the other,
    in `found`; returns the configuration of the two matrices."""
    if config.tie_word_embeddings:
        for missing, other in (ENDS, ENDS[::-1]):
            if missing not in found and other in found:
                found[missing] = found[other]
    return replace(config, tie_word_embeddings=False)

# %%
one = {ENDS[0]: stand(ENDS[0], (256, 64))}
print(untied(replace(SMALL, tie_word_embeddings=True), one) == SMALL,
      sorted(one))

# %% [markdown]
# ### Files against the table
#
# The names tell the layout; layout and configuration make the table; and the
# files must hold what is in it and nothing else. Packed experts are bytes.
# Everything else may be any float that safetensors has: some programs save
# what they merged in fp32 beside experts that they have not touched, in
# MXFP4. The model's dtype decides what becomes of them.

# %% tags=["export:weights/layout"]
def find_layout(names: Iterable[str]) -> str:
    """"hf", "original" or "bf16", from the names that we know."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    dense = ("experts.gate_up_proj", "experts.down_proj")
    return "bf16" if any(name.endswith(dense) for name in names) else "hf"

# %% tags=["export:weights/checkpoint"]
def check_tensors(folder: Path, found: dict[str, Stored | PerExpert],
                  table: dict[str, TensorSpec]) -> None:
    """CheckpointError at the first tensor that is missing, superfluous, or
    of another shape or dtype. What is not packed may be any float."""
    for name, spec in table.items():
        if name not in found:
            tied = " (or tie_word_embeddings)" * (name in ENDS)
            raise faulty(f"{folder}: {name}", f"{spec}{tied}",
                         "no such tensor")
        stored = found[name]
        dtypes = FLOATS if spec.dtype in FLOATS else (spec.dtype,)
        if (stored.spec.shape != spec.shape
                or stored.spec.dtype not in dtypes):
            raise faulty(f"{stored.file}: {name}", spec, stored.spec)
    for name, stored in found.items():
        if name not in table:
            raise faulty(f"{stored.file}: {name}", "no such tensor",
                         stored.spec)

# %%
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)
table = tensor_table(TINY)
found = {name: Stored(spec, here / "model.safetensors", 0, spec.nbytes)
         for name, spec in table.items()}
check_tensors(here, found, table)
name = "model.layers.1.mlp.experts.down_proj_scales"
spoilt = TensorSpec(name, (4, 64, 2), "U8")
report(check_tensors, here, found | {
    name: Stored(spoilt, here / "model.safetensors", 0, 512)}, table)
del found[name]
report(check_tensors, here, found, table)

# %% [markdown]
# ### Laying out files before writing them
#
# A header needs the table and no tensor.

# %% tags=["export:weights/write"]
MAX_SHARD_BYTES = 5 * 10 ** 9


def plan_shards(table: dict[str, TensorSpec], max_shard_bytes: int
                ) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order; a shard is closed before it would
    pass max_shard_bytes (one tensor may be longer alone)."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in table.values():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": specs
            for i, specs in enumerate(shards, 1)}

# %% tags=["export:weights/files"]
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
for config in (SMALL, LARGE):
    shards = plan_shards(tensor_table(config), MAX_SHARD_BYTES)
    headers = sum(len(make_header(specs)) for specs in shards.values())
    print(f"{len(shards)} shards, {headers:,} bytes of headers,",
          list(shards)[-1])

# %% [markdown]
# Three and fifteen, as many as were released.
#
# ### Writing tensors in any order
#
# A writer makes all files at full length, puts rows where they belong, and
# counts and hashes them as they pass.

# %% tags=["export:weights/write"]
OUR_FILES = ("config.json", "manifest.json", "model.safetensors.index.json")


class Writer:
    """Files of full length with headers; rows are put where they belong.

    `put` every canonical tensor once, in any order and a few rows at a time,
    then `finish`. dtype: of what is not packed.
    """

    def __init__(self, folder: Path, config: GptOssConfig, layout: str,
                 max_shard_bytes: int, dtype: torch.dtype = torch.bfloat16
                 ) -> None:
        self.folder, self.layout = folder, layout
        floats = next((name for name in FLOATS if DTYPES[name] == dtype), "")
        if not floats:
            raise faulty("dtype", f"one of {FLOATS}", dtype)
        table = tensor_table(config, layout, floats)
        self.places = places(config, layout, floats)
        self.hashes = {name: hashlib.sha256() for name in self.places}
        self.rows = dict.fromkeys(self.places, 0)  # written so far
        config = replace(config, tie_word_embeddings=False)  # it has both
        self.config = (config.to_original_dict() if layout == "original"
                       else config.to_hf_dict())
        if layout == "bf16":
            del self.config["quantization_config"]
        if dtype != torch.bfloat16:
            self.config["dtype"] = str(dtype).removeprefix("torch.")
        self.shards = plan_shards(table, max_shard_bytes)
        need = sum(spec.nbytes for spec in table.values())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise faulty(folder.parent, f"{need:,} bytes free", f"{free:,}")
        self.stored: dict[str, Stored] = {}
        for name, specs in self.shards.items():
            header = make_header(specs)
            file = folder / name
            with open(file, "wb") as f:
                f.write(header)
                f.truncate(len(header) + sum(s.nbytes for s in specs))
            self.stored |= read_header(file)

    def put(self, name: str, tensor: Tensor, start: int | None = None
            ) -> None:
        """Write rows from `start` on; None: the whole tensor at once."""
        if name not in self.places:
            raise faulty(name, f"a canonical name of layout {self.layout}",
                         "this")
        place, shape = self.places[name], tuple(tensor.shape)
        spec = place.spec
        good = (shape == spec.shape if start is None
                else shape[1:] == spec.shape[1:])
        if not good or tensor.dtype != DTYPES[spec.dtype]:
            raise faulty(name, spec, f"{tensor.dtype} {list(shape)}")
        if self.rows[name] != (start or 0):
            raise faulty(name, "once", "again")
        stored = self.stored[place.stored]
        width = stored.nbytes // stored.spec.shape[0]
        data = tensor.detach().cpu().contiguous()
        # numpy is no dependency of ours: the bytes straight from memory
        raw = memoryview((ctypes.c_ubyte * data.nbytes).from_address(
            data.data_ptr()))
        with open(stored.file, "r+b") as f:
            f.seek(stored.offset + (place.first + (start or 0)) * width)
            f.write(raw)
        self.hashes[name].update(raw)
        self.rows[name] += shape[0]

    def finish(self, extra_files: Iterable[Path]) -> dict[str, str]:
        """Check that nothing is missing, write the JSON; return the hashes."""
        for name, place in self.places.items():
            rows = self.rows[name]
            if rows != place.spec.shape[0]:
                raise faulty(name, place.spec, f"{rows} rows" if rows
                             else "nothing")
        for file in map(Path, extra_files):
            if (self.folder / file.name).exists() or file.name in OUR_FILES:
                raise CheckpointError(f"{file}: expected another name")
            shutil.copyfile(file, self.folder / file.name)
        json_file(self.folder / "config.json", self.config)
        if len(self.shards) > 1:
            total = sum(stored.nbytes for stored in self.stored.values())
            json_file(self.folder / "model.safetensors.index.json", {
                "metadata": {"total_size": total},
                "weight_map": {name: stored.file.name for name, stored
                               in sorted(self.stored.items())}})
        return {name: each.hexdigest() for name, each in self.hashes.items()}


def json_file(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")

# %% [markdown]
# The three biases go into one joined vector, v first, and come to lie in
# order; what is still missing is named:

# %%
(here / "draft").mkdir()
writer = Writer(here / "draft", TINY, "original", MAX_SHARD_BYTES)
for part in "vqk":
    name = f"model.layers.0.self_attn.{part}_proj.bias"
    writer.put(name, torch.full(writer.places[name].spec.shape,
                                float("qkv".index(part)),
                                dtype=torch.bfloat16))
stored = writer.stored["block.0.attn.qkv.bias"]
data = stored.file.read_bytes()[stored.offset:][:stored.nbytes]
values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
print([x.tolist() for x in values.unique_consecutive(return_counts=True)])
report(writer.finish, [])

# %% [markdown]
# ### All or nothing
#
# Renaming a folder is atomic. So everything is written to a hidden folder
# beside the target and flushed to the disk, and then the folder gets its
# name. Whatever fails before, a full disk or a killed process included,
# leaves nothing under that name.
#
# Three cases need more. An empty folder that is there already may be a disk,
# mounted at this place: what is written beside it lands on another disk, and
# no rename goes from one to the other. So there the draft is made inside, and
# its files get their places one by one, `config.json` last: without it no
# program takes the folder for a model. A process that is told to end
# (SIGTERM; SIGHUP, when the line to the terminal breaks) removes its draft
# first. One that is killed cannot; so a draft is locked as long as its
# writer lives, and the next one to write under that name removes those that
# nobody holds.

# %% tags=["export:weights/write"]
def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process
    dies; None if another one holds it, or if this system has no locks."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except OSError:
        os.close(held)
        return None


def _sweep(home: Path, name: str) -> None:
    """Remove the drafts of `name` in `home` whose writers have died. An
    empty one is left: its writer may be about to lock it."""
    for old in home.glob(f".{escape(name)}.*.partial"):
        held = None if old.is_symlink() else _lock(old)
        if held is not None:
            if any(old.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
            os.close(held)

# %% tags=["export:weights/write"]
@contextmanager
def _draft(home: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `home`, gone at the end."""
    draft = home / f".{name}.{secrets.token_hex(4)}.partial"
    draft.mkdir()
    held = _lock(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if held is not None:
            os.close(held)

# %%
(here / ".new.1234.partial").mkdir()
(here / ".new.1234.partial" / "model.safetensors").touch()
with _draft(here, "new") as draft:
    (draft / "model.safetensors").touch()
    _sweep(here, "new")
    print(len(list(here.glob(".new.*"))), draft.exists())
print(len(list(here.glob(".new.*"))))

# %% tags=["export:weights/write"]
@contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the process by SystemExit, as long as
    nobody else has a say in that: what was begun is undone on the way."""
    def end(number: int, frame: object) -> None:
        for each in mine:  # a second one does not stop the undoing
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    mine: list[int] = []
    if threading.current_thread() is threading.main_thread():
        names = ("SIGTERM", "SIGHUP")
        mine += [number for name in names
                 if (number := getattr(signal, name, None)) is not None
                 and signal.getsignal(number) == signal.SIG_DFL]
    for each in mine:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)

# %% tags=["export:weights/write"]
@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target`, or all that is in it.

    Whatever fails before leaves nothing behind. CheckpointError if `target`
    is there already, unless it is an empty folder.
    """
    target = Path(os.path.abspath(target))
    inside = target.is_dir() and not target.is_symlink()
    home = target if inside else target.parent
    above = [path for path in (home, *home.parents) if not path.exists()]
    try:
        _sweep(home, target.name)
        there = [file for file in target.iterdir()
                 if file.name != "lost+found"] if inside else []
        if there or os.path.lexists(target) and not inside:
            raise faulty(target, "a new or empty folder", "something there")
        home.mkdir(parents=True, exist_ok=True)
        with _told_to_end(), _draft(home, target.name) as draft:
            yield draft
            for file in draft.iterdir():
                _sync(file)  # whole on disk before it has its name
            _appear(draft, target, inside)
    except BaseException as error:
        for path in above:
            with suppress(OSError):
                path.rmdir()  # unless somebody has put something there
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: {error.strerror or error}"
                                  ) from error
        raise


def _appear(draft: Path, target: Path, inside: bool) -> None:
    """Give the draft its name, or its files their places; all or none."""
    if not inside:
        os.replace(draft, target)
        return
    names = sorted((file.name for file in draft.iterdir()),
                   key=lambda name: (name == "config.json", name))
    try:
        for name in names:
            os.replace(draft / name, target / name)
    except BaseException:
        for name in names:
            (target / name).unlink(missing_ok=True)
        raise

# %% tags=["export:weights/write"]
def write_checkpoint(path: str | Path, config: GptOssConfig,
                     tensors: Iterable[tuple[str, Tensor]],
                     layout: str = "hf",
                     max_shard_bytes: int = MAX_SHARD_BYTES,
                     extra_files: Iterable[str | Path] = (),
                     dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Write a checkpoint; returns canonical name -> sha256 of its bytes.

    tensors: (canonical name, tensor) in any order, one held at a time; with
    layout "original" q, k and v still come apart. Shapes and dtypes must be
    those of `tensor_table`; `dtype` is that of what is not packed.
    extra_files are copied along. The folder appears whole or not at all.
    CheckpointError names the tensor or the file.
    """
    with new_folder(Path(path)) as draft:
        writer = Writer(draft, config, layout, max_shard_bytes, dtype)
        for name, tensor in tensors:
            writer.put(name, tensor)
        return writer.finish(map(Path, extra_files))

# %% [markdown]
# ### Random checkpoints
#
# Something to try it on, of the right shapes and sensible sizes. Nothing is
# zero, so that a tensor that goes missing, or a bias that is not added,
# shows.

# %% tags=["export:weights/write"]
def random_tensors(config: GptOssConfig, seed: int = 0, layout: str = "hf"
                   ) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, random tensor) for `write_checkpoint`, one by one.

    A tensor depends on seed and name alone. Weights have a spread of about
    1/sqrt(in), so that activations stay of order one; norms vary around 1;
    biases and sinks are not zero; scales are never 255. "bf16" gives the
    decoded experts of the same model; "original" is the same as "hf".
    """
    if layout not in LAYOUTS:
        raise faulty("layout", f"one of {LAYOUTS}", repr(layout))
    table = tensor_table(config)
    for name, spec in table.items():
        if layout != "bf16" or not name.endswith(PACKED):
            yield name, _random_tensor(spec, seed)
        elif name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            pair = (_random_tensor(table[name + p], seed) for p in PACKED)
            yield name, decode(*pair).transpose(1, 2)


def _random_tensor(spec: TensorSpec, seed: int) -> Tensor:
    key = zlib.crc32(f"{seed} {spec.name}".encode())
    g = torch.Generator().manual_seed(key)
    if spec.name.endswith("_blocks"):
        return torch.randint(256, spec.shape, generator=g, dtype=torch.uint8)
    if spec.name.endswith("_scales"):
        # the 16 codes have a spread of 2.9; three scales around the middle
        middle = 127 - round(math.log2(2.9 * math.sqrt(32 * spec.shape[-1])))
        return torch.randint(middle - 1, middle + 2, spec.shape, generator=g,
                             dtype=torch.uint8)
    mean, spread = 0.0, 1 / math.sqrt(spec.shape[-1])
    if spec.name.endswith("norm.weight"):
        mean, spread = 1.0, 0.2
    elif spec.name.endswith(("bias", "sinks", "embed_tokens.weight")):
        spread = 2.0 if spec.name.endswith("sinks") else 0.5
    out = torch.empty(spec.shape, dtype=torch.bfloat16)
    return out.normal_(mean, spread, generator=g)

# %%
manifest = write_checkpoint(here / "hf", TINY, random_tensors(TINY),
                            max_shard_bytes=50_000)
print(*sorted(file.name for file in (here / "hf").iterdir()), sep="\n")
print(len(manifest), "hashes of", len(manifest["lm_head.weight"]), "digits")

# %% [markdown]
# A writer that fails half-way leaves nothing, in an empty folder neither, and
# a folder that has something in it is not touched:

# %%
def half():
    yield from list(random_tensors(TINY))[:20]


(here / "empty").mkdir()
before = sorted(here.rglob("*"))
report(write_checkpoint, here / "new" / "one", TINY, half())
report(write_checkpoint, here / "empty", TINY, half())
report(write_checkpoint, here / "hf", TINY, random_tensors(TINY))
assert sorted(here.rglob("*")) == before
write_checkpoint(here / "empty", TINY, random_tensors(TINY))
print(*sorted(file.name for file in (here / "empty").iterdir()))

# %% [markdown]
# ### Reading
#
# Opening reads the configuration, the index and the headers, and does all the
# checks above. One is left: whether a scale is 255, NaN, only the numbers
# can tell, 0.6 GB of scales in the 20b. `check_scales` is for those who read
# them anyway, the model's loader and `convert`.

# %% tags=["export:weights/checkpoint"]
class Checkpoint:
    """An open checkpoint in any of the three layouts; see `open`.

    Every name is canonical: Hugging Face's, q, k and v apart. Attributes:
    path (as given), folder (of the weights), config, layout.
    """

    def __init__(self, path: Path, folder: Path, config: GptOssConfig,
                 layout: str, found: dict[str, Stored | PerExpert]) -> None:
        self.path, self.folder, self.config = path, folder, config
        self.layout, self._found = layout, found
        self._places = places(config, layout)
        self._maps: dict[Path, Tensor] = {}

    @classmethod
    def open(cls, path: str | Path, config: GptOssConfig | None = None
             ) -> "Checkpoint":
        """Open a folder; reads config.json, the index and the headers.

        Raises CheckpointError or ConfigError, naming the file and the
        tensor, unless every tensor is there once, whole, and of the shape
        and dtype that config (by default the folder's) asks for.
        """
        path = Path(path)
        try:
            folder = weights_folder(path)
            config = config or GptOssConfig.from_pretrained(
                config_folder(path))
            found = recognise(folder, find_tensors(folder))
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: "
                                  f"{error.strerror}") from error
        layout, config = find_layout(found), untied(config, found)
        check_tensors(folder, found, tensor_table(config, layout))
        return cls(path, folder, config, layout, found)

    def names(self) -> list[str]:
        """Canonical names, in the order of the table."""
        return list(self._places)

    def spec(self, name: str) -> TensorSpec:
        """Canonical name, shape, and the dtype found in the file."""
        place = self._place(name)
        return replace(place.spec,
                       dtype=self._found[place.stored].spec.dtype)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._found[self._place(name).stored].file

    @property
    def files(self) -> list[Path]:
        """All files with weights."""
        return sorted({part.file for stored in self._found.values()
                       for part in getattr(stored, "parts", [stored])})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers; of a tied one, once."""
        return sum(stored.nbytes for stored in set(self._found.values()))

    @property
    def dtype(self) -> torch.dtype:
        """What a model of this checkpoint was saved as: `dtype` (before
        transformers 5, `torch_dtype`) of config.json. Without one bf16 if
        the experts are packed, else the embedding's."""
        file = config_folder(self.path) / "config.json"
        said = read_json(file) if file.exists() else {}
        for key in ("dtype", "torch_dtype"):
            name = said.get(key) if isinstance(said, dict) else None
            for dtype in map(DTYPES.get, FLOATS):
                if name == str(dtype).removeprefix("torch."):
                    return dtype
        return (torch.bfloat16 if self.layout != "bf16"
                else DTYPES[self.spec(ENDS[0]).dtype])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows (its first dimension).

        A view of the mapped file: no byte is read before it is used, none
        outside `rows` ever, and writing to it does not reach the file. It
        outlives `close`. Of a stack of experts, a copy of the rows. Unknown
        name, or a step: CheckpointError.
        """
        place, rows = self._place(name), rows or slice(None)
        start, stop, step = rows.indices(place.spec.shape[0])
        if step != 1:
            raise faulty(place.spec.name, "rows with step 1", rows)
        stored = self._found[place.stored]
        count, shape = max(0, stop - start), place.spec.shape[1:]
        if isinstance(stored, Stored):
            return self._mapped(stored, place.first + start, count)
        parts = [self._mapped(part, 0, part.spec.shape[0])
                 for part in stored.parts[start:stop]]
        out = torch.empty(count, *shape, dtype=DTYPES[stored.spec.dtype])
        for row, part in zip(out, parts, strict=True):
            row.copy_(part.t())  # a vector stays as it is
        return out

    def check_scales(self, name: str | None = None) -> None:
        """CheckpointError if a scale is 255 (NaN), in one tensor or in all.

        Reads the scales, 1/17 of the packed bytes: 0.6 GB for the 20b.
        """
        for each in [name] if name else self.names():
            if each.endswith("_scales"):
                check_scales(f"{self.file(each)}: {each}", self.read(each))

    def close(self) -> None:
        """Forget the mappings; tensors read so far stay good, and reading
        on maps the files again."""
        self._maps.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise faulty(f"{self.folder}: {name}", "a tensor's name in "
                         f"layout {self.layout}", "no such tensor")
        return self._places[name]

    def _map(self, file: Path) -> Tensor:
        """The whole file as bytes, mapped privately."""
        if file not in self._maps:
            self._maps[file] = torch.from_file(
                str(file), shared=False, size=file.stat().st_size,
                dtype=torch.uint8)
        return self._maps[file]

    def _mapped(self, stored: Stored, first: int, count: int) -> Tensor:
        """`count` rows of what is stored, from row `first`."""
        width = stored.nbytes // stored.spec.shape[0]  # bytes in a row
        begin = stored.offset + first * width
        whole = self._map(stored.file).untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8).set_(
            whole[begin:begin + count * width])  # torch.save: its own storage
        dtype = DTYPES[stored.spec.dtype]
        if begin % dtype.itemsize:
            raw = raw.clone()  # a file whose tensors are not aligned
        return raw.view(dtype).view(count, *stored.spec.shape[1:])

# %% tags=["export:weights/checkpoint"]
def check_scales(name: str, scales: Tensor) -> None:
    """CheckpointError naming `name` if a scale byte is 255, which is NaN."""
    if scales.numel() and scales.max() == SCALE_NAN:
        bad = int((scales == SCALE_NAN).sum())
        raise faulty(name, "scales 0 to 254", f"{bad} of {SCALE_NAN} (NaN)")

# %%
with Checkpoint.open(here / "hf") as checkpoint:
    print(checkpoint.layout, len(checkpoint.names()), checkpoint.nbytes)
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    print(checkpoint.spec(name), "in", checkpoint.file(name).name)
    expert = checkpoint.read(name, rows=slice(2, 3))
    size = checkpoint.file(name).stat().st_size
    checkpoint.check_scales()
print(tuple(expert.shape), "is a view of a mapped file:",
      expert.untyped_storage().nbytes() == size)
report(check_scales, "some scales", torch.tensor([[126, 255, 127, 255]]))

# %% [markdown]
# ### Converting
#
# Between the two released layouts rows are copied; to and from bf16 each
# expert is decoded or encoded alone (chapter 2). The hashes are those of
# canonical tensors, so one model has the same in both released layouts.

# %% tags=["export:weights/convert"]
import logging

_log = logging.getLogger("gptoss")


CHUNK = 2 ** 26  # bytes copied at a time
Piece = tuple[str, int, Tensor]  # canonical name, first row, rows


def _pieces(old: Checkpoint, name: str, layout: str) -> Iterator[Piece]:
    """What `layout` makes of one tensor of `old`, a few rows at a time."""
    dense = name.endswith(("gate_up_proj", "down_proj"))
    if name.endswith("_scales"):
        old.check_scales(name)
    if layout == "bf16" and name.endswith(PACKED):
        if name.endswith("_blocks"):
            yield from _unpacked(old, name.removesuffix("_blocks"))
    elif layout != "bf16" and dense:
        yield from _packed(old, name)
    else:
        yield from _copied(old, name)

# %% tags=["export:weights/convert"]
def _copied(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Rows as they are; floats of another dtype are rounded to bf16."""
    spec = old.spec(name)
    step = max(1, CHUNK * spec.shape[0] // spec.nbytes)
    for start in range(0, spec.shape[0], step):
        rows = old.read(name, slice(start, start + step))
        yield name, start, rows if spec.dtype == "U8" else rows.bfloat16()


def _unpacked(old: Checkpoint, name: str) -> Iterator[Piece]:
    """MXFP4 -> bf16, one expert at a time, transposed to (in, out)."""
    for e in range(old.config.num_local_experts):
        blocks, scales = (old.read(name + part, slice(e, e + 1))
                          for part in PACKED)
        yield name, e, decode(blocks, scales).transpose(1, 2)


def _packed(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Floats (in, out) -> MXFP4 (out, in), one expert at a time."""
    for e in range(old.config.num_local_experts):
        values = old.read(name, slice(e, e + 1)).transpose(1, 2)
        try:
            pair = encode(values)
        except MXFP4Error as error:
            raise CheckpointError(f"{old.file(name)}: {name}, expert {e}: "
                                  f"{error}") from error
        for part, rows in zip(PACKED, pair, strict=True):
            yield name + part, e, rows

# %% [markdown]
# A new folder should be one that other programs can use, so the small files
# beside the weights come along: those on a list, by their names. A pattern
# such as `*.json` would be shorter, and would publish whatever else lies
# there. For the same reason a link is followed only to where its folder
# leads anyway: the folder itself, or the store of the hub's cache, whose
# folders are links throughout.

# %% tags=["export:weights/convert"]
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "USAGE_POLICY", "USAGE_POLICY.md")


def home_file(folder: Path, name: str) -> Path | None:
    """A small file of a model: in its folder or, for original/ alone, in
    the folder above, where the released ones lie."""
    places = [folder]
    if folder.resolve().name == "original":
        places.append(folder.resolve().parent)
    return next((place / name for place in places
                 if (place / name).is_file()), None)

# %% tags=["export:weights/convert"]
def companions(old: Checkpoint) -> list[Path]:
    """Tokenizer, generation_config and the like beside the weights."""
    found = [home_file(old.folder, name) for name in COMPANIONS]
    return [file for file in found if file and _stays(file)]


def _stays(file: Path) -> bool:
    """Whether a file is where its folder says; if not, one line of log."""
    folder, real = file.parent.resolve(), file.resolve().parent
    store = folder.parent.parent / "blobs"
    if real == folder or (folder.parent.name, real) == ("snapshots", store):
        return True
    _log.warning("%s: a link that leaves its folder is not copied", file)
    return False

# %%
for name in ("README.md", "secrets.json"):
    (here / "hf" / name).write_text("{}")
(here / "hf" / "LICENSE").symlink_to("/etc/hostname")
logging.disable()  # it would say that the link was not copied
with Checkpoint.open(here / "hf") as checkpoint:
    print([file.name for file in companions(checkpoint)])
logging.disable(logging.NOTSET)
(here / "hf" / "LICENSE").unlink()

# %% [markdown]
# OpenAI's spelling of the configuration has no token ids; the released
# `generation_config.json` has them.

# %% tags=["export:weights/convert"]
def _config_for(old: Checkpoint, extra: list[Path]) -> GptOssConfig:
    """The configuration to write, with the ids that only
    generation_config.json says."""
    files = [f for f in extra if f.name == "generation_config.json"]
    if old.layout != "original" or not files:
        return old.config
    said = read_json(files[0])
    if not isinstance(said, dict):
        raise faulty(files[0], "a JSON object", type(said).__name__)
    ids = {key: said[key] for key in ("eos_token_id", "pad_token_id")
           if said.get(key) is not None}
    return GptOssConfig.from_dict(old.config.to_hf_dict() | ids,
                                  str(files[0]))

# %% tags=["export:weights/convert"]
def convert(source: str | Path, target: str | Path, layout: str,
            max_shard_bytes: int = MAX_SHARD_BYTES,
            progress: Callable[[str], None] | None = None
            ) -> dict[str, str]:
    """Rewrite a checkpoint in another layout (or the same, resharded).

    hf <-> original keeps every byte; to "bf16" decodes, which is exact as
    far as bf16 reaches; from "bf16" encodes, which rounds what is not on
    the MXFP4 grid. The new folder `target` also gets manifest.json, the
    returned canonical name -> sha256, and the tokenizer and other small
    files. progress(name) is called before each tensor of the source.
    Memory: 64 MiB of rows, and one mapped tensor of the source at a time.
    CheckpointError; nothing half-written.
    """
    with Checkpoint.open(source) as old, new_folder(Path(target)) as draft:
        extra = companions(old)
        writer = Writer(draft, _config_for(old, extra), layout,
                        max_shard_bytes)
        for source_name in old.names():
            if progress:
                progress(source_name)
            for name, start, rows in _pieces(old, source_name, layout):
                writer.put(name, rows, start)
            old.close()  # unmap: pages read so far count as memory in use
        manifest = writer.finish(extra)
        json_file(draft / "manifest.json", manifest)
    return manifest

# %%
there = convert(here / "hf", here / "original", "original")
back = convert(here / "original", here / "again", "hf", 50_000)
print("the same bytes:", manifest == there == back)
convert(here / "hf", here / "bf16", "bf16")
for layout in LAYOUTS:
    size = (here / ("again" if layout == "hf" else layout)).glob("model*")
    print(f"{layout:8} {sum(f.stat().st_size for f in size):,} bytes")

# %% [markdown]
# ### What a file holds, without its weights

# %% tags=["export:weights/layout"]
COMPONENTS = {"embed_tokens": "embedding", "self_attn": "attention",
              ".router.": "router", ".experts.": "experts", "norm": "norms",
              "lm_head": "lm_head"}


def component_of(name: str) -> str:
    """The component of `parameter_counts` that a tensor belongs to."""
    return next(part for word, part in COMPONENTS.items() if word in name)

# %% tags=["export:weights/checkpoint"]
def describe(path: str | Path) -> dict[str, object]:
    """What `inspect` prints, from config and headers alone; JSON as it is.

    Bytes are those of the file: a bf16 checkpoint reads more for a token
    than a packed one. Raises as `Checkpoint.open` does.
    """
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
        parts = dict.fromkeys(COMPONENTS.values(), 0)
        dtypes: Counter[str] = Counter()
        for spec in map(checkpoint.spec, checkpoint.names()):
            parts[component_of(spec.name)] += spec.nbytes
            dtypes[spec.dtype] += spec.nbytes
        row = parts["embedding"] // config.vocab_size
        idle = config.num_local_experts - config.num_experts_per_tok
        unread = parts["experts"] // config.num_local_experts * idle
        return {
            "path": str(path), "layout": checkpoint.layout,
            "config": config.to_hf_dict(),
            "files": [file.name for file in checkpoint.files],
            "tensors": len(checkpoint._found), "bytes": checkpoint.nbytes,
            "bytes_by_dtype": dict(dtypes), "bytes_by_component": parts,
            "parameters": parameter_counts(config),
            "parameters_total": total_parameters(config),
            "parameters_active": active_parameters(config),
            "bytes_read_per_token":
                sum(parts.values()) - parts["embedding"] + row - unread,
            "cache_bytes_per_token": cache_bytes_per_token(config),
            "cache_bytes_full": cache_bytes(
                config, config.max_position_embeddings)}

# %%
for key, value in describe(here / "bf16").items():
    if key not in ("path", "config", "parameters"):
        print(f"{key}: {value}")

# %% [markdown]
# ### From the hub
#
# A name like `openai/gpt-oss-20b` is a folder if there is one and otherwise
# a repository, which `huggingface_hub` fetches into the cache that HF_HOME
# names, or not at all if HF_HUB_OFFLINE is set. A broken download goes on
# where it stopped; after the process has died, whole files are kept and the
# others begin anew. What is not of the form owner/name can only be a path,
# and a mistyped path must not travel over the network.

# %% tags=["export:weights/hub"]
def is_repo_id(text: str) -> bool:
    """Whether `text` can be a hub id, owner/name, and not a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id (owner/name) as its downloaded one.

    Only a string of exactly that form, with no such file or folder here, is
    asked for at the hub: JSON and safetensors of the repository's root, at
    `revision` (branch, tag or commit), resumed and cached as HF_HOME and
    HF_HUB_OFFLINE say. CheckpointError, in one line, if that fails.
    """
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
    except RuntimeError:
        raise CheckpointError(f"{path}: no such user") from None
    if isinstance(path, Path) or not is_repo_id(path):
        raise CheckpointError(f"{path}: no such directory"
                              " (and a hub id is owner/name)")
    return _fetch(path, revision)

# %% tags=["export:weights/hub"]
def _fetch(path: str, revision: str | None) -> Path:
    at = f"{path} at revision {revision}" if revision else path
    try:
        import huggingface_hub.constants  # noqa: F401  it reads HF_...
    except ValueError as error:
        raise CheckpointError(f"{at}: no such directory, and a setting HF_... "
                              f"of the environment: {error}") from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(
            path, revision=revision, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client has many kinds, and so its own
        raise CheckpointError(f"{at}: no such directory, and "
                              f"{_why(error)}") from error


def _why(error: Exception) -> str:
    """What went wrong at the hub, in a line."""
    from huggingface_hub import constants, errors

    known = {errors.GatedRepoError:
             "the hub wants a token with access (hf auth login)",
             errors.RepositoryNotFoundError:
             "the hub knows no such repository",
             errors.RevisionNotFoundError: "the hub knows no such revision",
             errors.LocalEntryNotFoundError: "the hub cannot be reached"}
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache has none"
    for kind, why in known.items():
        if isinstance(error, kind):
            return why
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{constants.ENDPOINT} cannot be asked: {line}"

# %%
for text in ("openai/gpt-oss-20b", "./gpt-oss-20b", "gpt-oss-20b",
             "models/openai/gpt-oss-20b", "~/gpt-oss-20b"):
    print(f"{text:26}", "hub" if is_repo_id(text) else "path")
report(resolve, "./gpt-oss-20b")
assert resolve(here / "hf") == here / "hf"

# %% [markdown]
# ## It holds
#
# Places tile the stored tensors: every row of each belongs to exactly one
# canonical tensor. In any layout, for both models and the tiny one:

# %%
for config in (TINY, SMALL, LARGE):
    for layout in LAYOUTS:
        table = tensor_table(config, layout)
        filled = dict.fromkeys(table, 0)
        for place in places(config, layout).values():
            assert place.first == filled[place.stored]
            filled[place.stored] += place.spec.shape[0]
        assert filled == {name: s.shape[0] for name, s in table.items()}

# %% [markdown]
# What is written is what is read, in every layout, whole and by rows,
# whatever the order of writing and the size of the shards:

# %%
import random

chance = random.Random(0)
for layout in LAYOUTS:
    wanted = dict(random_tensors(TINY, layout=layout))
    for trial in range(4):
        pairs = list(wanted.items())
        chance.shuffle(pairs)
        path = here / f"trial-{layout}-{trial}"
        write_checkpoint(path, TINY, pairs, layout,
                         max_shard_bytes=10 ** chance.randint(0, 6))
        with Checkpoint.open(path) as checkpoint:
            for name, tensor in wanted.items():
                a, b = sorted(chance.choices(range(len(tensor) + 1), k=2))
                assert torch.equal(checkpoint.read(name), tensor)
                assert torch.equal(checkpoint.read(name, slice(a, b)),
                                   tensor[a:b])
print("every tensor, every layout")

# %% [markdown]
# A file that was cut is noticed wherever it was cut, and the first tensor
# that is not whole is named. One file at 222 lengths:

# %%
whole = here / "original" / "model.safetensors"
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
# Decoding to bf16 and encoding again gives equal values, and here even equal
# bytes, because each of these random blocks contains a 4 or a 6 (chapter 2):

# %%
back = convert(here / "bf16", here / "packed-again", "hf")
print(sum(back[name] == manifest[name] for name in manifest), "of",
      len(manifest), "tensors have the same hash")

# %% [markdown]
# ## Against the others
#
# The safetensors library reads what we write, and we read what it writes:

# %%
from safetensors import safe_open
from safetensors.torch import load_file, save_file

theirs = load_file(here / "original" / "model.safetensors")
with Checkpoint.open(here / "hf") as checkpoint:
    for name, place in places(TINY, "original").items():
        rows = theirs[place.stored][place.first:]
        assert torch.equal(rows[:place.spec.shape[0]], checkpoint.read(name))
(here / "saved").mkdir()
save_file(theirs, here / "saved" / "model.safetensors")
(here / "saved" / "config.json").write_bytes(
    (here / "original" / "config.json").read_bytes())
print("as theirs:", convert(here / "saved", here / "x", "hf") == manifest)
with safe_open(here / "original" / "model.safetensors", "pt") as f:
    print(f.metadata())

# %% [markdown]
# The rows of q, k and v that OpenAI's `AttentionBlock` cuts out of its
# product with the joined matrix are thus the rows of our three products.
#
# What has gone wrong elsewhere, and what happens here:
#
# - *Missing experts.* A program that reads the packed files as if they were
#   bf16 does not find the experts and leaves them random (tt-forge-models
#   [#443](https://github.com/tenstorrent/tt-forge-models/pull/443)). Here
#   every name that is missing or superfluous is an error.
# - *Orientation.* Packed experts are (E, out, in), decoded ones (E, in, out);
#   with `down_proj`, which is square, no shape tells
#   ([mlx-lm#1079](https://github.com/ml-explore/mlx-lm/issues/1079),
#   Megatron-Bridge
#   [#3743](https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3743)). Here
#   the names tell the layout, and the layout the orientation.
# - *`HeaderTooLarge`.* What many report under this name (transformers
#   [#27923](https://github.com/huggingface/transformers/issues/27923),
#   DeepSeek-V3
#   [#557](https://github.com/deepseek-ai/DeepSeek-V3/issues/557)) is a git-lfs
#   pointer in place of the file: its first eight bytes, `version `, announce
#   a header of $2.3 \cdot 10^{18}$ bytes. Here the message says what it is.
# - *Floats under packed names.* After a decoded load, transformers 5.23
#   saves floats as `..._blocks` unless `save_original_format=False` is given
#   ([#44983](https://github.com/huggingface/transformers/pull/44983) made it
#   save them at all), and loads its own file with random experts. Here it is
#   read. The same model as it is written by three programs, and one file in
#   which floats stand where bytes were promised:

# %%
def renamed(tensors, kind):
    """Decoded tensors under the names of another program."""
    for name, tensor in tensors:
        if kind == "transformers" and name.endswith("_proj"):
            yield name + "_blocks", tensor.float()
        elif kind == "unsloth" and ".experts." in name:
            end = ".bias" if name.endswith("_bias") else ".weight"
            for e, row in enumerate(tensor):
                yield f"{name.removesuffix('_bias')}s.{e}{end}", row.t()
        elif kind == "unsloth":
            yield name.replace("router.", "router.linear."), tensor
        else:
            yield name.replace("self_attn", "_orig_mod.self_attn"), tensor


with Checkpoint.open(here / "bf16") as checkpoint:
    wanted = {n: checkpoint.read(n).clone() for n in checkpoint.names()}
for kind in ("transformers", "unsloth", "a compiled model"):
    bad = here / kind
    bad.mkdir()
    save_file({n: t.contiguous() for n, t in renamed(wanted.items(), kind)},
              bad / "model.safetensors")
    (bad / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    with Checkpoint.open(bad) as checkpoint:
        same = sum(torch.equal(checkpoint.read(name).bfloat16(), tensor)
                   for name, tensor in wanted.items())
    print(f"{kind}: {len(load_file(bad / 'model.safetensors'))} tensors,",
          f"{same} of {len(wanted)} read as they were")
with Checkpoint.open(here / "hf") as checkpoint:
    tensors = {n: checkpoint.read(n).clone() for n in checkpoint.names()}
name = "model.layers.0.mlp.experts.down_proj_blocks"
tensors[name] = tensors[name].bfloat16()
save_file(tensors, bad / "model.safetensors")
report(Checkpoint.open, bad)

# %% [markdown]
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
# With the files at hand, `python -m gptoss inspect openai/gpt-oss-20b` prints
# what `describe` finds in the headers. A released repository holds the
# numbers twice, in `original/` too, one file for the 20b and seven for the
# 120b; `resolve` fetches the root only.
#
# ## Cost
#
# Let $b = \sum_t b_t$ be the bytes of the numbers, $P$ the parameters and
# $n_f$ the length of file $f$'s header.
#
# | operation | reads | writes | memory of its own |
# |---|---|---|---|
# | open, describe | $\sum_f (8 + n_f)$ | 0 | the headers |
# | read rows $[r, r')$ of $t$ | $(r' - r)\, b_t / R$ | 0 | 0 |
# | check scales | $1/17$ of the experts | 0 | one byte a scale of a tensor |
# | hf to original, or back | $b$ | $b$ | 64 MiB of rows |
# | to bf16 | $b$ | $2P$ | one expert |
#
# `tests/test_checkpoint.py` holds the memory of converting below the bytes
# of the file. The first and third line, counted:

# %%
with Checkpoint.open(here / "hf") as checkpoint:
    size = sum(file.stat().st_size for file in checkpoint.files)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little")
                  for file in checkpoint.files)
    assert size == headers + checkpoint.nbytes  # (checkpoint-offset)
for config in (SMALL, LARGE):
    blocks, scales = (sum(s.nbytes for n, s in tensor_table(config).items()
                          if n.endswith(part)) for part in PACKED)
    assert blocks == 16 * scales
    print(f"{scales:,} bytes of scales")

# %% [markdown]
# ## Takeaways
#
# - A checkpoint is a table of names, shapes and places; the configuration
#   determines all of it, so a file can be checked before a number is read
#   and laid out before a number is there.
# - Rows of the first dimension are runs of bytes: an expert, q, k or v, or a
#   range of the vocabulary is read alone and without a copy.
# - Names from a file are claims: no path that leaves the folder, no gap, no
#   extra tensor, no pickle; and a new folder appears whole or not at all.
# - One model has many spellings. Those that are known to mean the same are
#   read through a table; what is of another kind is named; nothing is left
#   at random.
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
# Write `verify(path)`, which names the tensors that do not have the hash in
# `manifest.json`. Flip one bit of a file: the header is whole and
# `Checkpoint.open` is content, but `verify` is not.

# %% tags=["hide-cell"]
def verify(path):
    wanted = json.loads((path / "manifest.json").read_text())
    with Checkpoint.open(path) as checkpoint:
        for name, digest in wanted.items():
            data = checkpoint.read(name).flatten().view(torch.uint8)
            if hashlib.sha256(memoryview(data.numpy())).hexdigest() != digest:
                yield name


shard = sorted((here / "again").glob("*.safetensors"))[1]
assert list(verify(here / "again")) == []
data = bytearray(shard.read_bytes())
data[-1] ^= 1
shard.write_bytes(data)
print(*verify(here / "again"))
assert len(list(verify(here / "again"))) == 1

# %% [markdown]
# ### Exercise 3
#
# A machine has room for half of each layer's experts. Write a checkpoint that
# keeps the first half: a legal gpt-oss with fewer experts, made without ever
# reading the other half.

# %% tags=["hide-cell"]
def keep_experts(source, target, count):
    with Checkpoint.open(source) as checkpoint:
        config = replace(checkpoint.config, num_local_experts=count)
        tensors = ((name, checkpoint.read(name, slice(
            spec.shape[0]))) for name, spec in tensor_table(config).items())
        return write_checkpoint(target, config, tensors)


keep_experts(here / "hf", here / "half", 2)
with Checkpoint.open(here / "hf") as old, \
        Checkpoint.open(here / "half") as new:
    print(f"{new.nbytes / old.nbytes:.2f} of the bytes")
    for name in new.names():
        rows = new.spec(name).shape[0]
        assert torch.equal(new.read(name), old.read(name)[:rows])

# %% [markdown]
# ### Exercise 4
#
# Two GPUs split every expert's gate_up projection by its output rows, the
# second dimension. How many runs of bytes does each read from a tensor of
# blocks, and of what length in the 20b? Read the second one's part of a
# tensor without touching the first one's.

# %% tags=["hide-cell"]
def read_split(checkpoint, name, rank, ranks):
    """One of `ranks` parts of dimension 1: (E, out / ranks, ...)"""
    experts, out = checkpoint.spec(name).shape[:2]
    part = slice(rank * out // ranks, (rank + 1) * out // ranks)
    return torch.stack([checkpoint.read(name, slice(e, e + 1))[0, part]
                        for e in range(experts)])


name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
with Checkpoint.open(here / "hf") as checkpoint:
    half = checkpoint.spec(name).shape[1] // 2
    assert torch.equal(read_split(checkpoint, name, 1, 2),
                       checkpoint.read(name)[:, half:])
spec = tensor_table(SMALL)[name]
runs, length = spec.shape[0], spec.nbytes // spec.shape[0] // 2
print(f"{runs} runs of {length:,} bytes")
folder.cleanup()

# %% [markdown]
# A view of an expert reads nothing yet; only the stacked halves are touched.
#
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
