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
# How much of them must be read to know every tensor's name, shape, dtype and
# place, and to be sure that the files are whole and belong to this model?
# None of the numbers. What must be read is 53 kB, one byte in 258,709.

# %% [markdown]
# ## Picture
#
# Left, the file of the 20b as a map. A line is one layer, 476 MB, and the 24
# layers lie one after the other. The tables of the vocabulary lie before and
# after them, drawn to the same scale. Right, the tensors of one layer, on a
# logarithmic axis. (The table behind the figure is the one that this chapter
# writes.)
#
# What to see: all layers are alike, so a part is a column of the map, and
# five sixths of its area are blocks, the four-bit codes of the experts. One
# expert's gate and up projection, the white frame, is an unbroken run of
# bytes that can be read alone. On the right, six decades lie between the
# blocks and the sinks, and a reader that loses those 128 bytes gets every
# answer wrong all the same.

# %% tags=["hide-input", "picture"]
# Figure: left, a map with 24 equal lines, one a layer, between two boxes for
# the tables of the vocabulary; its columns are q k v o, blocks and scales of
# gate and up, blocks and scales of down. Right, the bytes of the 19 tensors of
# a layer, from 265 MB of blocks down to 64 bytes of the router's bias.
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from gptoss.weights.config import GptOssConfig
from gptoss.weights.layout import tensor_table

plt.style.use("../_static/book.mplstyle")
SMALL, LARGE = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
layer = {name.removeprefix("model.layers.0."): spec.nbytes
         for name, spec in tensor_table(SMALL).items() if ".layers.0." in name}
total = sum(layer.values())
COLUMNS = (("q k v o", "proj.weight", "C0", "white"),
           ("gate and up: blocks", "gate_up_proj_blocks", "C1", "black"),
           ("scales", "gate_up_proj_scales", "C5", "black"),
           ("down: blocks", "down_proj_blocks", "C2", "white"),
           ("scales", "down_proj_scales", "C3", "black"))
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9),
                                  width_ratios=(1.5, 1))
start, edges = 0.0, {}
for word, end, colour, ink in COLUMNS:
    size = sum(n for name, n in layer.items() if name.endswith(end)) / 1e6
    left.add_patch(Rectangle((start, 0), size, 24, fc=colour))
    edges[end] = (start, size)
    left.text(start + size / 2, 17.5, word, color=ink, ha="center",
              va="center", rotation=90 * (size < 60),
              fontsize=7 if size > 10 else 5, bbox={
                  "fc": colour, "ec": "none", "pad": 0.5})
    start += size
left.hlines(range(25), 0, start, color="white", lw=0.5)
table_lines = SMALL.vocab_size * SMALL.hidden_size * 2 / total
for top, word in ((-table_lines - 0.7, "embedding"), (24.7, "lm_head")):
    left.add_patch(Rectangle((0, top), start, table_lines, fc="0.45"))
    left.text(start / 2, top + table_lines / 2, f"{word}, 1.16 GB",
              ha="center", va="center", color="white")
at, width = edges["gate_up_proj_blocks"]
left.add_patch(Rectangle((at + 17 * width / 32, 12), width / 32, 1,
                         fill=False, ec="white", lw=1.8))
left.annotate("layer 12, expert 17", (at + 17.5 * width / 32, 12),
              (at + width / 2, 6), ha="center", fontsize=8, bbox={
                  "fc": "C1", "ec": "none"}, arrowprops={"arrowstyle": "-"})
left.set(xlim=(0, start), ylim=(24.9 + table_lines, -table_lines - 0.9),
         yticks=(0.5, 12.5, 23.5), xlabel="MB from the layer's first byte",
         title="The 20b, a line for each layer")
left.set_yticklabels(["layer 0", "12", "23"])
left.grid(False)
ordered = sorted(layer.items(), key=lambda item: -item[1])
for n, (name, size) in enumerate(ordered):
    right.barh(n, size, color=next((ink for _, end, ink, _ in COLUMNS
                                    if name.endswith(end)), "0.6"))
    unit, of = (("MB", 1e6) if size > 1e6 else ("kB", 1e3) if size > 1e3
                else ("bytes", 1))
    right.text(size * 1.3, n, f"{size / of:.3g} {unit}", va="center",
               fontsize=6.5)
right.set_yticks(range(19), [name.split("experts.")[-1].split("attn.")[-1]
                             for name, _ in ordered], fontsize=6.5)
right.invert_yaxis()
right.set(xscale="log", xlabel="bytes", xlim=(30, 1e11),
          title="The 19 tensors of a layer")
right.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# ## The naive version
#
# PyTorch's own format is a *pickle*, and a pickle is a program. Here is a file
# that claims to hold `lm_head.weight`:

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

# %% [markdown] tags=["given"]
# Instead of `print` it could have been anything. (By default `torch.load` has
# refused such a file since torch 2.6.) So gpt-oss, like most models now,
# comes as *safetensors*: numbers and a table of contents, nothing that can
# run.

# %% [markdown]
# ## The file, read by hand
#
# A safetensors file has three parts: eight bytes, a JSON text, and the
# numbers. The eight bytes are one little-endian integer $n$, the length of
# the text. The text, called the header, gives for each tensor its dtype, its
# shape, and where its bytes begin and end, counted from the end of the
# header. We let the library write two small tensors, and read them:

# %%
import json
import struct

from safetensors.torch import load, save

raw = save({"sinks": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
            "blocks": torch.tensor([[0x21, 0x43]], dtype=torch.uint8)})
(n,) = struct.unpack("<Q", raw[:8])
print(n, raw[8:8 + n].decode())
print(raw[8 + n:].hex(" "))

# %% [markdown]
# The last six bytes are all the numbers. `80 3f` and `00 c0` are 3f80 and
# c000 with the low byte first: the upper halves of the floats 1.0 and -2.0,
# that is bf16. A whole reader is ten lines:

# %%
TYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}


def read_file(raw):
    """name -> tensor, of the bytes of a safetensors file"""
    (n,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, entry in json.loads(raw[8:8 + n]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = bytearray(raw[8 + n + begin:8 + n + end])
            tensors[name] = torch.frombuffer(
                numbers, dtype=TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


print({name: t.tolist() for name, t in read_file(raw).items()})

# %% [markdown]
# It reads the trained model that ships with this package, too, which is a
# gpt-oss of four small layers:

# %%
from importlib.resources import files

found = read_file((files("gptoss") / "pocket/model.safetensors").read_bytes())
print(len(found), "tensors; the embedding has",
      len(found["model.embed_tokens.weight"]), "rows")

# %% [markdown]
# What is missing? It copies all the numbers, where the question was to read
# none. It believes everything that the header says. And it does not know
# which names to expect. The rest of the chapter mends that.
#
# ## Where does a tensor begin?
#
# If tensor $t$ has $b_t$ bytes and tensors follow one another without a gap,
# then in a file of $m$ tensors tensor $t$ begins at byte $o_t$:
#
# $$
# o_t = 8 + n + \sum_{s < t} b_s , \qquad
# \text{size} = 8 + n + \sum_{t \le m} b_t .
# $$ (layout-offset)
#
# For our two tensors:

# %%
print(f"sinks at 8 + {n} = {8 + n}, blocks at 8 + {n} + 4 = {8 + n + 4},",
      f"size 8 + {n} + 4 + 2 = {8 + n + 6}; the file has {len(raw)} bytes")

# %% [markdown]
# The second equation is the test for a download that broke off. It needs the
# header and the file's length, and none of the numbers.
#
# **A row.** Numbers are stored row by row. If $t$ has $R$ rows, its first
# dimension, then rows $r$ to $r' - 1$ are one run of bytes,
#
# $$
# \Big[\, o_t + r\,\frac{b_t}{R},\; o_t + r'\,\frac{b_t}{R} \Big) .
# $$ (layout-rows)
#
# In the tensors of experts a row is an expert: that is why the frame in the
# picture is one piece.
#
# ## Which tensors must be there?
#
# A configuration decides it. The list of all names, shapes and dtypes is one
# table, written once; reading, checking, writing and converting all use it.
#
# There are two released spellings. Hugging Face's files and OpenAI's own, in
# a folder `original/`, hold the same bytes under other names, but for one
# thing: `original/` has one matrix `qkv`, whose rows are those of q, k and v,
# one matrix under the other. With $H$ query heads and $G$ key/value heads of
# $C$ numbers,
#
# $$
# W_{qkv} = \begin{pmatrix} W_q \\ W_k \\ W_v \end{pmatrix}, \qquad
# \text{first rows } 0,\; HC,\; HC + GC .
# $$ (layout-qkv)
#
# By {eq}`layout-rows` each of the three is a run of bytes. It can be read
# from the joined matrix without a copy, and written into it before the other
# two are there.

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

# %% [markdown]
# With the sizes of a configuration filled in, these rows become the complete
# list. (`groupby` keeps the order: the row before the layers, all layers, the
# rows after.) The experts' matrices are cut into blocks of 32, so a
# `hidden_size` or `intermediate_size` that is no multiple of 32 is refused.
#
# There is a third layout. Fine-tuned models often come in Hugging Face's
# names with the experts decoded to bf16: one tensor `gate_up_proj` in the
# place of `_blocks` and `_scales`, and transposed, (E, in, out) instead of
# (E, out, in). So a layout is `hf`, `original` or `bf16`. The argument
# `floats` is the dtype of all that is not packed, in the spelling of
# safetensors (`BF16`, `F32` …).

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
for layout, name in (("hf", "model.layers.7.self_attn.k_proj.weight"),
                     ("original", "block.7.attn.qkv.weight"),
                     ("original", "block.7.mlp.mlp1_weight.blocks"),
                     ("bf16", "model.layers.7.mlp.experts.gate_up_proj")):
    print(f"{layout:8} {name:40} {tensor_table(SMALL, layout)[name]}")

# %% [markdown]
# From here on a name is Hugging Face's, with q, k and v apart: the *canonical*
# one, which [the model](../model/transformer.ipynb) uses too. Each has a
# *place*: the stored tensor in which its rows lie, and the first of them.

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
    table, found = tensor_table(config, "hf", floats), {}
    filled: Counter[str] = Counter()
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
# **Which layout is it?** That can be seen from the names in a file. One that
# begins with `block.`, or `embedding.weight`, is OpenAI's; one that ends in
# `experts.gate_up_proj` or `experts.down_proj` is of decoded experts; what is
# neither is taken for Hugging Face's.

# %% tags=["export"]
def find_layout(names: Iterable[str]) -> str:
    """"hf", "original" or "bf16", from the names that we know."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    dense = ("experts.gate_up_proj", "experts.down_proj")
    return "bf16" if any(name.endswith(dense) for name in names) else "hf"

# %% [markdown]
# And a name tells which component of the model a tensor belongs to, in the
# words of [the counts](counts.ipynb): `component_of`.

# %% tags=["export"]
COMPONENTS = {"embed_tokens": "embedding", "self_attn": "attention",
              ".router.": "router", ".experts.": "experts", "norm": "norms",
              "lm_head": "lm_head"}


def component_of(name: str) -> str:
    """The component of `parameter_counts` that a tensor belongs to."""
    return next(part for word, part in COMPONENTS.items() if word in name)

# %%
print([find_layout(tensor_table(SMALL, layout)) for layout in LAYOUTS],
      component_of("model.layers.7.mlp.router.bias"))

# %% [markdown]
# ## How is a header made?
#
# By {eq}`layout-offset` a header can be written for tensors of which only
# names, shapes and dtypes are known, and none of the numbers. Two details:
# the text is filled up with spaces to a multiple of eight bytes, so that the
# numbers begin aligned, and `__metadata__` says `{"format": "pt"}`, which
# `transformers` asks for.

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
two = [TensorSpec("sinks", (2,), "BF16"), TensorSpec("blocks", (1, 2), "U8")]
made = make_header(two) + raw[8 + n:]
print(made[8:].split(b"  ")[0].decode())
print("the library reads:", {name: t.tolist()  # it keeps no order
                             for name, t in sorted(load(made).items())})
for config in (SMALL, LARGE):
    for layout in LAYOUTS:
        table = tensor_table(config, layout)
        size, numbers = len(make_header(table.values())), sum(
            spec.nbytes for spec in table.values())
        print(f"{layout:8} {len(table)} tensors, {numbers:,} bytes,",
              f"header {size:,}: one in {numbers / size:,.0f}")

# %% [markdown]
# These 53 kB are the answer to the question. The counts and sums are those of
# the released index files: 459 and 363 tensors, 13,761,264,768 bytes for the
# 20b, and 687 and 543 tensors, 65,248,815,744 bytes for the 120b.
#
# ## What is refused
#
# Every number in a header is somebody else's claim. We believe it if
# {eq}`layout-offset` holds exactly: no gap, no overlap, no missing end.
# Everything else is a `CheckpointError` that names the file, and the tensor
# where there is one:
#
# - what is no regular file (a pipe would be waited for without end);
# - a git-lfs pointer, a text that stands in for a file not fetched: it begins
#   with `version `, and the message says `git lfs pull`. (Read as a length,
#   these eight bytes are $2.3 \cdot 10^{18}$, so other programs report
#   `HeaderTooLarge`: transformers
#   [#27923](https://github.com/huggingface/transformers/issues/27923));
# - fewer than eight bytes, or a header longer than the file or than 100 MB,
#   the limit of the library: such a length is not read at all;
# - a header that is no JSON object of entries with a dtype, a shape of
#   whole numbers that are not negative, and two offsets;
# - a tensor whose bytes are more or fewer than its shape says, that does not
#   begin where the one before it ends, or that ends beyond the file;
# - a file that goes on behind its last tensor.

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
    except ValueError as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")


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
# ### Which files of a folder are the model's?
#
# A large checkpoint is cut into *shards*, and `model.safetensors.index.json`
# says which tensor is in which. The index comes from the internet and
# contains file names, so a name with a folder in it, or one that does not end
# in `.safetensors`, is refused, and so is one that is not there.

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
# Other files of the kind may lie in the folder: shards that an earlier,
# longer save has left, or an adapter that has been merged since. So:
#
# - The index decides. What it does not name is not read.
# - Without an index `model.safetensors` is the model, and without that all
#   files but those that begin with `adapter_`.
# - Two indexes are refused. So is an index beside a `model.safetensors` that
#   it does not name: one of them is left from another save, and
#   `transformers` reads the second where people mean the first.
# - Index and headers must name the same tensors, each of them once. If not,
#   shards of two versions lie side by side.

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
    """CheckpointError unless index and headers name the same tensors."""
    for name, file in named.items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise faulty(f"{index}: {name}", f"in {file}", f"in {where}")
    for name, stored in found.items():
        if name not in named:
            raise faulty(f"{stored.file}: {name}", f"in {index.name}",
                         "only in the file")

# %%
index = here / "model.safetensors.index.json"
for name in ("model-00001-of-00002.safetensors", "../../secret.safetensors"):
    index.write_text(json.dumps({"weight_map": {"norm.scale": name}}))
    report(find_tensors, here)
index.unlink()

# %% [markdown]
# **Which folder?** A released repository holds everything twice, in its root
# in Hugging Face's layout and in `original/`. The root is taken if it has
# safetensors, else `original/`; the configuration is looked for in the same
# way, by itself. Where there is nothing to read, the message says what is
# there instead: a pickle, which is never opened, or an *adapter*, which
# changes a model and is none. One that lies beside a model is not applied,
# and one line of the log says so.

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
for name in ("pytorch_model.bin", "adapter_model.safetensors"):
    (here / name).touch()
    report(weights_folder, here)
    (here / name).unlink()

# %% [markdown]
# ## It holds
#
# **Places tile the stored tensors**: every row of each belongs to exactly one
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
        print(f"{layout:8} {len(places(config, layout))} tensors tile",
              f"{len(table)}, {sum(filled.values()):,} rows")

# %% [markdown]
# **A file that was cut is noticed** wherever it was cut, and the first tensor
# that is not whole is named. We cut the tiny model in the original layout,
# with zeros for numbers:

# %%
whole, cut = here / "model.safetensors", here / "cut.safetensors"
table = tensor_table(TINY, "original")
whole.write_bytes(make_header(table.values())
                  + bytes(sum(spec.nbytes for spec in table.values())))
data = whole.read_bytes()
ends = {s.spec.name: s.offset + s.nbytes for s in read_header(whole).values()}
lengths = range(len(data) - 1, len(make_header(table.values())), -997)
for length in lengths:
    cut.write_bytes(data[:length])
    try:
        read_header(cut)
        raise AssertionError(length)
    except CheckpointError as error:
        first = next(name for name, end in ends.items() if end > length)
        assert first in str(error)
print("cut at", len(lengths), "lengths, noticed at all; the last message:")
report(read_header, cut)

# %% [markdown]
# ## Takeaways
#
# - A safetensors file is a JSON table and numbers; nothing in it can run.
# - The configuration determines the table of all tensors, so a file can be
#   checked before a number of it is read.
# - Rows of the first dimension are runs of bytes: an expert, q, k or v, or a
#   range of the vocabulary lies in one piece.
# - Names and numbers from a file are claims: no path that leaves the folder,
#   no gap, no overlap, no pickle.
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
print(f"byte {offset + 17 * row:,}, {row:,} bytes: 2880 x 90 blocks of 16")

# %% [markdown]
# ### Exercise 2
#
# Two tensors of a header lie over one another: `a` in bytes 0 to 8 and `b` in
# bytes 4 to 12. Each of them is whole. What does our reader say, and what
# could go wrong if it accepted them?

# %% tags=["hide-cell"]
text = json.dumps({
    name: {"dtype": "U8", "shape": [8], "data_offsets": [start, start + 8]}
    for name, start in (("a", 0), ("b", 4))}).encode()
file = here / "overlap.safetensors"
file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
report(read_header, file)
print("whoever changes one would change the other; and a file of 12 bytes",
      "could claim any number of tensors, all at one place", sep="\n")
folder.cleanup()

# %% [markdown]
# ### Exercise 3
#
# Which rows of which stored tensor must be read for the value matrix of layer
# 3 of the 120b in the original layout, and how many bytes are they? What
# share of the stored tensor is that?

# %% tags=["hide-cell"]
place = places(LARGE, "original")["model.layers.3.self_attn.v_proj.weight"]
last = place.first + place.spec.shape[0]
whole = tensor_table(LARGE, "original")[place.stored]
print(f"rows {place.first} to {last - 1} of {place.stored},",
      f"{place.spec.nbytes:,} bytes, {place.spec.nbytes / whole.nbytes:.0%}")

# %% [markdown]
# ## Sources
#
# - safetensors 0.8: the format, `README.md` of huggingface/safetensors.
# - openai/gpt-oss, `gpt_oss/torch/weights.py`, `PARAM_NAME_MAP`;
#   transformers 5.23, `models/gpt_oss/convert_gpt_oss_weights_to_hf.py` (the
#   names, q, k and v taken apart).
# - The released index files, for names, shapes and totals {cite}`gptoss2025`;
#   the block format {cite}`ocpmx2023`.
