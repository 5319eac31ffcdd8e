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
#     module: vectors
#     public: [VectorError, read_vectors, run_case]
# ---

# %% [markdown]
# # How is a port in another language held to it?

# %% [markdown]
# ## Question
#
# An engine in Rust or C++ cannot run [the walk](walk.ipynb). What can be put
# into its hands instead, so that it finds the same mistakes?
#
# Two files, together less than 200 kB: numbers that go into an operation,
# numbers that must come out, and how near. Fourteen cases stand where
# implementations went wrong, from equal router logits to position 131,071,
# and a reader of the files takes twenty lines in any language.

# %% tags=["export:vector_cases"]
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from gptoss.attention.masks import visible
from gptoss.attention.rope import (
    apply_rope,
    inverse_frequencies,
    rope_parameters,
    rope_tables,
)
from gptoss.attention.rope import concentration as yarn_concentration
from gptoss.attention.sinks import attention_concat
from gptoss.model.layers import Block
from gptoss.model.norm import rms_norm
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import clamped_swiglu
from gptoss.moe.routing import route
from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import decode
from gptoss.weights.disk import drafted
from gptoss.weights.write import random_tensors

# %% [markdown]
# ## Picture
#
# Seven mistakes that ports have made, held to the fourteen cases by the
# finished package: a field is dark where numbers are out of their tolerance.

# %% tags=["hide-input", "picture"]
# Figure: seven rows of mistakes, fourteen columns of cases, nearly all fields
# empty. Each mistake fills the field of its own case and at most two more:
# the missing sink those of the three attention cases, for instance.
import tempfile

import matplotlib.pyplot as plt

from gptoss.parity.vector_cases import run_case
from gptoss.parity.vectors import far_off, read_vectors, write

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
folder = tempfile.TemporaryDirectory()


WRONG = {  # mistake -> operation, what it makes of inputs and of parameters
    "nibbles swapped": ("mxfp4", lambda t: {
        "blocks": t["blocks"] << 4 | t["blocks"] >> 4}, {}),
    "YaRN's range rounded": ("frequencies", dict, {"truncate": True}),
    "no concentration": ("tables", dict, {"concentration": 1.0}),
    "no window": ("mask", dict, {"window": None}),
    "no sink": ("attention", lambda t: {"sinks": t["sinks"] - 1e30}, {}),
    "norm with 1 + weight": ("norm", lambda t: {"weight": 1 + t["weight"]},
                             {}),
    "gate clamped below": ("swiglu", lambda t: {"gate_up": torch.stack([
        t["gate_up"][::2].clamp(min=-7), t["gate_up"][1::2]], 1).flatten()},
        {})}
write(Path(folder.name) / "first")
index, stored = read_vectors(Path(folder.name) / "first")
cases, grid = index["cases"], torch.zeros(len(WRONG), len(index["cases"]))
for y, (operation, change, more) in enumerate(WRONG.values()):
    for x, case in enumerate(cases):
        if case["operation"] == operation:
            t = {name: stored[key] for name, key in case["inputs"].items()}
            wrong = run_case(operation, t | change(t),
                             case["parameters"] | more, torch.float32)
            grid[y, x] = any(far_off(
                wrong[name], stored[out["tensor"]], *out["float32"]) > 1
                for name, out in case["outputs"].items())
fig, ax = plt.subplots(figsize=(7.4, 2.9))
ax.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1.3, edgecolors="0.9")
ax.set_yticks([y + 0.5 for y in range(len(WRONG))], WRONG)
ax.set_xticks([x + 0.5 for x in range(len(cases))],
              [case["name"] for case in cases], rotation=45, ha="right")
ax.invert_yaxis()
ax.grid(visible=False)
plt.show()

# %% [markdown]
# What to see: a mistake fails the cases of its own operation and no others, so
# the name of the case that fails is the diagnosis.
#
# ## One case by hand
#
# `ties` has four rows of eight router logits, and asks for the four largest
# and their softmax. The second row is 0 2 1 2 2 0 2 2: five of its logits are
# equal. The rule is that the lower index wins. So a port must say 1, 3, 4, 6,
# and four times a quarter:

# %%
logits = torch.tensor([[0.0, 2, 1, 2, 2, 0, 2, 2]])
for name, flip in (("the lower index", False), ("the higher index", True)):
    values, ids = (logits.flip(-1) if flip else logits).sort(
        dim=-1, descending=True, stable=True)
    ids = 7 - ids if flip else ids
    print(f"{name:17} {sorted(ids[0, :4].tolist())}, weights",
          values[0, :4].softmax(-1).tolist())

# %% [markdown]
# Same weights, other experts, another model. Integers must be equal, floats
# within $\text{atol} + \text{rtol}\,|\text{wanted}|$ as the index says.

# %% [markdown]
# ## Code
#
# ### Operations
#
# Every float input is a bf16 number, so that one set serves fp32 and bf16;
# every float output comes from a float64 run. First the operations, each with
# the line that explains it in the index.

# %% tags=["export:vector_cases"]
VERSION, FORMAT = 1, "gpt-oss conformance vectors"
FILES = ("index.json", "vectors.safetensors")
GREEDY = 1000  # tokens at most that a case may ask for
Tensors = dict[str, Tensor]


class VectorError(Error):
    """A folder of vectors that cannot be read or written; names the file,
    and the case where it is one."""


def _op_mxfp4(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"values": decode(t["blocks"], t["scales"], dtype)}


def _op_frequencies(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"inv_freq": inverse_frequencies(
        p["head_dim"], p["theta"], p["factor"], p["original"],
        p["beta_fast"], p["beta_slow"], p["truncate"]),
        "concentration": torch.tensor([yarn_concentration(p["factor"])])}


def _op_tables(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    """The angle is a product in fp32 in every dtype, as in the released
    code; from there on a float64 run is exact."""
    angle = t["positions"][:, None].float() * t["inv_freq"].float()
    wide = torch.promote_types(dtype, torch.float32)
    return {name: (wave(angle.to(wide)) * p["concentration"]).to(dtype)
            for name, wave in (("cos", torch.cos), ("sin", torch.sin))}

# %% tags=["export:vector_cases"]
def _op_rope(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"y": apply_rope(t["x"][None], t["cos"][None], t["sin"][None])[0]}


def _op_mask(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"seen": visible(t["q_pos"][None], t["k_pos"][None],
                            p["window"])[0].byte()}


def _op_attention(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    q, k, v = (t[name][None] for name in "qkv")
    mask = visible(t["q_pos"][None], t["k_pos"][None], p["window"])
    return {"y": attention_concat(q, k, v, t["sinks"], mask,
                                  p["scale"])[0]}


def _op_norm(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"y": rms_norm(t["x"], t["weight"], p["eps"])}


def _op_swiglu(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    return {"y": clamped_swiglu(t["gate_up"], p["limit"])}


def _op_route(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    weights, ids = route(t["logits"], p["k"])
    return {"weights": weights, "ids": ids.int()}

# %% tags=["export:vector_cases"]
def _state(t: Tensors, prefix: str) -> Tensors:
    """Weights by the names that a module of ours has for them."""
    return {name.removeprefix(prefix): tensor for name, tensor in t.items()
            if name.startswith((prefix, "lm_head"))}


def _config(t: Tensors, p: Mapping) -> GptOssConfig:
    """The case's, if it has weights for as many layers: making a million
    empty ones would take hours."""
    config = GptOssConfig.from_dict(p["config"])
    if config.num_hidden_layers > len(t):
        raise VectorError(f"{config.num_hidden_layers} layers of which only "
                          f"{len(t)} tensors are there")
    return config


@torch.inference_mode()
def _op_block(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    config = _config(t, p)
    block = Block(config, p["layer"], dtype, "meta")
    block.load_state_dict(_state(t, f"model.layers.{p['layer']}."),
                          assign=True)
    positions = torch.arange(len(t["x"]))[None]
    inv_freq, factor = rope_parameters(config)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = rope_tables(positions, inv_freq.to(wide), factor, dtype)
    return {"y": block(t["x"][None], cos, sin, positions)[0]}


@torch.inference_mode()
def _op_model(t: Tensors, p: Mapping, dtype: torch.dtype) -> Tensors:
    model = GptOss(_config(t, p), dtype, "meta")
    model.load_state_dict(_state(t, "model."), assign=True)
    row = t["tokens"].long()[None]
    if not 0 < p["greedy"] <= GREEDY:
        raise VectorError(f"greedy: expected 1 to {GREEDY}, found "
                          f"{p['greedy']}")
    logits = model(row)[0]
    for _ in range(p["greedy"]):
        best = model(row)[:, -1:].argmax(-1)
        row = torch.cat([row, best], 1)
    return {"logits": logits, "greedy": row[0, -p["greedy"]:].int()}

# %% tags=["export:vector_cases"]
OPERATIONS: dict[str, tuple[Callable[..., Tensors], str]] = {
    "mxfp4": (
        _op_mxfp4, "byte b holds two values, its low nibble first: nibble n "
        "is the sign (bit 3) and one of 0 .5 1 1.5 2 3 4 6 (bits 0-2), times "
        "2**(scale - 127); scale 255 is NaN"),
    "frequencies": (
        _op_frequencies, "f_i = theta**(-2i/C); pair(t) = C ln(original / "
        "2 pi t) / (2 ln theta); r = (i - pair(beta_fast)) / "
        "(pair(beta_slow) - pair(beta_fast)) in 0..1; inv_freq = f (1 - r) "
        "+ f r / factor; concentration = 0.1 ln(factor) + 1; nothing is "
        "rounded to whole pairs"),
    "tables": (
        _op_tables, "angle = fp32(position) * fp32(inv_freq), one fp32 "
        "product; cos and sin of it times concentration"),
    "rope": (
        _op_rope, "x (T, H, C) in halves a, b: a cos - b sin, then "
        "b cos + a sin"),
    "mask": (
        _op_mask, "a key is seen if 0 <= k_pos <= q_pos and, with a window, "
        "k_pos > q_pos - window; -1 is padding"),
    "attention": (
        _op_attention, "q (T, H, C), k and v (S, G, C), head h reads "
        "h // (H / G); softmax over scale * q.k of the seen keys and the "
        "head's sink, whose weight meets no value; a row that sees nothing "
        "gives 0"),
    "norm": (
        _op_norm, "y = x / sqrt(mean(x**2) + eps) * weight, rounded once"),
    "swiglu": (
        _op_swiglu, "gate = even, up = odd entries; gate at most limit, up "
        "in -limit..limit; (up + 1) gate sigmoid(1.702 gate)"),
    "route": (
        _op_route, "the k largest logits, ties to the lower index; softmax "
        "over those k"),
    "block": (
        _op_block, "x + attention(norm(x)), then + experts(norm(.)): "
        "model.layers.N of the model below"),
    "model": (
        _op_model, "embedding, blocks, norm, lm_head; greedy: the likeliest "
        "token, appended, again")}

# %% tags=["export:vector_cases"]
_EXACT = {"float32": (0.0, 0.0), "bfloat16": (0.0, 0.0)}


@dataclass(frozen=True)
class VectorCase:
    """One line of the index: inputs, and how near outputs must come."""

    name: str
    operation: str  # of OPERATIONS
    explains: str
    inputs: Mapping[str, str | Tensor]  # a string: another case's tensor
    parameters: Mapping[str, object]
    float32: tuple[float, float]  # atol, rtol of every float output
    bfloat16: tuple[float, float] | None  # None: not defined in bf16

# %% [markdown]
# ### Cases at the edges
#
# The cases stand at the edges: bytes at the ends of the scale, positions 127,
# 128, 4095, 4096 and 131071, gates just above and below 7, equal router
# logits, rows that see no key.

# %% tags=["export:vector_cases"]
TINY_CONFIG = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=64, hidden_size=64, intermediate_size=32, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    swiglu_limit=1.0, eos_token_id=2, pad_token_id=0)
EDGES = (0, 127, 128, 4095, 4096, 131071)
_YARN = {"head_dim": 64, "theta": 150000.0, "factor": 32.0,
         "original": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
         "truncate": False}


def _draw(seed: int, *shape: int) -> Tensor:
    """bf16 numbers: the same in fp32 and in bf16."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).bfloat16()

# %% tags=["export:vector_cases"]
def part_cases() -> list[VectorCase]:
    """Cases of single operations without attention."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.tensor([0, 1, 2, 120, 127, 128, 253, 254, 255],
                          dtype=torch.uint8)
    ints = torch.tensor(EDGES, dtype=torch.int32)
    edge = torch.tensor([-1e4, -7.0625, -7.03125, -7, -6.96875, -1, -0.0, 0,
                         1, 6.96875, 7, 7.03125, 7.0625, 1e4])
    ties = torch.tensor([[1.0] * 8, [0, 2, 1, 2, 2, 0, 2, 2],
                         [-3, 5, 5, 5, 5, 5, 5, -3],
                         [100, -100, 0, 50, 99, 98, 97, 96]])
    rows = torch.stack([torch.zeros(64), _draw(1, 64).float(),
                        torch.full((64,), 1e-4), 1e4 * _draw(2, 64).float()])
    return [
        VectorCase("mxfp4", "mxfp4", "every byte at the edge scales 0, 1, 2,"
                   " 253, 254 (overflows to infinity), 255 (NaN)",
                   {"blocks": every.expand(9, 16, 16).contiguous(),
                    "scales": scales[:, None].expand(9, 16).contiguous()},
                   {}, *_EXACT.values()),
        VectorCase("frequencies", "frequencies", "YaRN of the released"
                   " models, range not truncated", {}, _YARN, (0, 1e-6),
                   None),
        VectorCase("tables", "tables", "cos and sin at the edges of the"
                   " window, of the original context and of the extended",
                   {"positions": ints, "inv_freq": "frequencies/out/inv_freq"},
                   {"concentration": yarn_concentration(32.0)}, (2e-6, 0),
                   (1e-6, 2 ** -8)),
        VectorCase("rope", "rope", "halves, not neighbours, are turned",
                   {"x": _draw(3, 6, 2, 64), "cos": "tables/out/cos",
                    "sin": "tables/out/sin"}, {}, (2e-6, 0), (0.05, 0.01)),
        VectorCase("norm", "norm", "a row of zeros, one of size 1, one near"
                   " sqrt(eps), one large; bf16 is rounded once",
                   {"x": rows.bfloat16(), "weight": 1 + _draw(4, 64) / 4},
                   {"eps": 1e-5}, (0, 2e-6), (0, 2 ** -8 * 1.001)),
        VectorCase("clamp", "swiglu", "gates and ups around the limit of 7"
                   " and far beyond: the gate has no lower limit",
                   {"gate_up": torch.cartesian_prod(edge, edge).flatten(
                       ).bfloat16()},
                   {"limit": 7.0}, (1e-6, 2e-6), (1e-3, 2 ** -5)),
        VectorCase("ties", "route", "equal logits: the lower index wins",
                   {"logits": ties.bfloat16()}, {"k": 4}, (0, 2e-6),
                   (0, 2 ** -8 * 1.001))]

# %% tags=["export:vector_cases"]
def attention_cases() -> list[VectorCase]:
    """Masks at the edges, and what a sink does to a row."""
    q_pos = torch.tensor([0, 1, 126, 127, 128, 129, 255, -1])
    k_pos = torch.tensor([*range(257), -1])
    five = torch.arange(5)
    alone = torch.tensor([-1, -1, 2, 3, 4])
    q, k, v = (_draw(seed, 5, heads, 16)
               for seed, heads in ((5, 4), (6, 2), (7, 2)))
    sinks = torch.tensor([-30.0, 0, 3, 30]).bfloat16()

    def mask(name: str, window: int | None, why: str) -> VectorCase:
        return VectorCase(name, "mask", why, {
            "q_pos": q_pos.int(), "k_pos": k_pos.int()}, {"window": window},
            *_EXACT.values())

    def attend(name: str, seen: Tensor, window: int | None, why: str
               ) -> VectorCase:
        return VectorCase(name, "attention", why, {
            "q": 2 * q, "k": 2 * k, "v": v, "sinks": sinks,
            "q_pos": five.int(), "k_pos": seen.int()},
            {"window": window, "scale": 0.25}, (1e-5, 1e-5), (0.03, 0.03))
    return [
        mask("mask window", 128, "exactly 128 keys, the query's own"
             " included; -1 sees nothing and is not seen"),
        mask("mask full", None, "all keys up to the query's own"),
        attend("sinks", five, None, "a sink of -30 takes nothing, one of 30"
               " nearly all"),
        attend("sinks window", five, 2, "two keys and the sink"),
        attend("sinks only", alone, 2, "the first two queries see no key:"
               " their rows are 0, not NaN")]

# %% tags=["export:vector_cases"]
def model_cases() -> list[VectorCase]:
    """One block, and a whole model with its weights and tokens."""
    config = TINY_CONFIG.to_hf_dict()
    weights = dict(random_tensors(TINY_CONFIG))
    tokens = torch.tensor([5, 9, 33, 2, 60, 17, 5, 5, 41, 63, 0, 12],
                          dtype=torch.int32)
    names = {name: f"model/in/{name}" for name in weights}
    one = {name: key for name, key in names.items() if ".layers.0." in name}
    return [
        VectorCase("model", "model", "two layers, four experts, twelve"
                   " tokens, eight more greedily", {
                       "tokens": tokens, **weights},
                   {"config": config, "greedy": 8}, (2e-5, 1e-5),
                   (0.15, 0.03)),
        VectorCase("block", "block", "layer 0 of that model, sliding, on"
                   " rows of its own", {"x": _draw(8, 12, 64), **one},
                   {"config": config, "layer": 0}, (2e-5, 1e-5),
                   (0.15, 0.03))]


def all_cases() -> list[VectorCase]:
    """Every case of the set, in the order of the index."""
    return part_cases() + attention_cases() + model_cases()

# %%
import textwrap

for case in all_cases():
    print(textwrap.fill(f"{case.name:12} {case.explains}", 79,
                        subsequent_indent=" " * 13))

# %% tags=["export:vector_cases"]
def cast_inputs(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floats in dtype; positions and ids stay integers. Frequencies and
    tables are fp32 in every run that they enter."""
    return {name: tensor.to(dtype) if tensor.is_floating_point()
            and name != "inv_freq" else tensor
            for name, tensor in tensors.items()}


def run_case(operation: str, inputs: Tensors, parameters: Mapping,
             dtype: torch.dtype) -> Tensors:
    """Outputs of the package's own code with inputs in dtype."""
    return OPERATIONS[operation][0](cast_inputs(inputs, dtype), parameters,
                                    dtype)

# %% [markdown]
# ### The set
#
# How near is near enough, and the files.

# %% tags=["export"]
def far_off(found: Tensor, wanted: Tensor, atol: float, rtol: float
            ) -> float:
    """max |found - wanted| / (atol + rtol |wanted|), at most 1 if near
    enough. Equal infinities and NaN in the same place are equal; another
    shape is infinitely far."""
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = ((a - b).abs() / (atol + rtol * b.abs())).nan_to_num(
        nan=torch.inf, posinf=torch.inf)
    return max(error.masked_fill(same, 0.0).flatten().tolist(), default=0.0)

# %% tags=["export"]
def write(folder: str | Path) -> list[Path]:
    """Write the set: index.json and vectors.safetensors; returns both.

    Float inputs are bf16 numbers, so they are the same in every dtype.
    Float outputs come from a run in float64, rounded once to fp32: what
    exact arithmetic gives (frequencies are fp32 by definition). An older
    set is replaced; VectorError: other files of these names are there.
    """
    folder, index = Path(folder), []
    stored: Tensors = {}
    for file in FILES:
        _check_ours(folder, folder / file)
    for case in all_cases():
        keys = {name: value if isinstance(value, str)
                else f"{case.name}/in/{name}"
                for name, value in case.inputs.items()}
        stored |= {keys[name]: value for name, value in case.inputs.items()
                   if isinstance(value, Tensor)}
        inputs = {name: stored[key] for name, key in keys.items()}
        outputs = {}
        for name, tensor in run_case(case.operation, inputs, case.parameters,
                                     torch.float64).items():
            key, exact = f"{case.name}/out/{name}", tensor.dtype
            floats = exact.is_floating_point
            stored[key] = tensor.float() if floats else tensor
            near = (case.float32, case.bfloat16) if floats else (
                (0, 0), None if name == "greedy" else (0, 0))
            outputs[name] = {"tensor": key, "float32": near[0],
                             "bfloat16": near[1]}
        index.append({"name": case.name, "operation": case.operation,
                      "explains": case.explains,
                      "parameters": dict(case.parameters), "inputs": keys,
                      "outputs": outputs})
    return _save(folder, stored, index)

# %% [markdown]
# ## What is refused
#
# **Overwriting.** A file of that name may be somebody else's. Ours are an
# index that says so, and the data whose checksum it holds; an earlier set is
# replaced, anything else (a folder, a link) is left alone and "nothing was
# written". Files are written beside and moved when whole.

# %% tags=["export"]
def _check_ours(folder: Path, file: Path) -> None:
    """Raise VectorError if `file` is there and not of an earlier set."""
    if not os.path.lexists(file):
        return
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        index = json.loads((folder / FILES[0]).read_bytes())
        whole = file.name == FILES[0] or index["sha256"] == hashlib.sha256(
            file.read_bytes()).hexdigest()
        if index["format"] == FORMAT and whole:
            return
    raise VectorError(f"{file}: exists, and is not of a set of vectors; "
                      "nothing was written")


def _save(folder: Path, stored: Tensors, cases: list[dict]) -> list[Path]:
    files = [folder / name for name in FILES]
    data = save({key: stored[key].contiguous().clone()
                 for key in sorted(stored)})
    index = {
        "format": FORMAT, "version": VERSION, "file": FILES[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "near": "[atol, rtol]: |found - wanted| <= atol + rtol |wanted|; "
                "NaN equals NaN; null: not defined in this dtype",
        "operations": {name: text for name, (_, text)
                       in OPERATIONS.items()},
        "cases": cases}
    folder.mkdir(parents=True, exist_ok=True)
    for file, raw in ((files[1], data), (files[0], (
            json.dumps(index, indent=1) + "\n").encode())):
        with drafted(file) as draft:
            draft.write_bytes(raw)
    return files

# %% [markdown]
# **Sets from anywhere.** A set may be damaged, or made to do damage. So before
# anything is computed the index is held to a form, and what is wrong names the
# file and the case: the version; a data file by a plain name in this folder
# (no path, no link out of it, no pipe); its checksum; of each case a name, a
# known operation, parameters whose numbers are at most $2^{20}$, inputs and
# outputs that are tensors of the file, and for each output both tolerances,
# `[atol, rtol]` or null, not negative. A model's case may ask for 1 to 1,000
# greedy tokens and has at most as many layers as tensors. If an operation
# fails on a case's inputs all the same, that too is told as the case's
# mistake.

# %% tags=["export"]
_KIND: dict[type, str] = {
    str: "a string", dict: "an object", list: "a list"}


def _entry(of: object, name: str, kind: type, where: str) -> Any:
    """of[name], which must be of that kind."""
    found = of.get(name) if isinstance(of, dict) else None
    if not isinstance(found, kind):
        raise VectorError(f"{where}: {name}: expected {_KIND[kind]}, found "
                          f"{type(found).__name__}")
    return found


def _check_near(near: object, where: str) -> None:
    """[atol, rtol], neither negative nor huge, or None."""
    if near is not None and not (
            isinstance(near, list) and len(near) == 2 and all(
                type(x) in (int, float) and 0 <= x < 2 ** 60
                for x in near)):
        raise VectorError(f"{where}: expected [atol, rtol] or null, found "
                          f"{near!r}")


def _check_numbers(value: object, where: str) -> None:
    """No number is so large that a case could ask for all memory."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_numbers(each, where)
    elif (isinstance(value, int | float) and type(value) is not bool
          and not abs(value) <= 2 ** 20):
        raise VectorError(f"{where}: expected numbers up to 2**20, found "
                          f"{value!r:.40}")

# %% tags=["export"]
def _check_case(case: object, number: int, file: Path, stored: Tensors
                ) -> None:
    """Raise VectorError unless `check` can work with a case's entries."""
    where = f"{file}: case {number}"
    where = f"{file}: case {_entry(case, 'name', str, where)!r}"
    operation = _entry(case, "operation", str, where)
    if operation not in OPERATIONS:
        raise VectorError(f"{where}: operation: expected one of "
                          f"{', '.join(OPERATIONS)}, found {operation!r}")
    _check_numbers(_entry(case, "parameters", dict, where),
                   f"{where}: parameters")
    used = [*_entry(case, "inputs", dict, where).items()]
    for name, out in _entry(case, "outputs", dict, where).items():
        at = f"{where}: outputs: {name}"
        used.append((name, _entry(out, "tensor", str, at)))
        for kind in ("float32", "bfloat16"):
            if kind not in out:
                raise VectorError(f"{at}: {kind}: expected [atol, rtol] or "
                                  "null, found nothing")
            _check_near(out[kind], f"{at}: {kind}")
    for name, key in used:
        if not isinstance(key, str) or key not in stored:
            raise VectorError(f"{where}: {name}: expected a tensor of "
                              f"{FILES[1]}, found {key!r}")

# %% tags=["export"]
def _read(file: Path) -> bytes:
    """A plain file's content, which leaves its folder by no link."""
    try:
        if file.resolve().parent != file.parent.resolve():
            raise VectorError(f"{file}: expected a file in its folder, found "
                              f"a link to {file.resolve()}")
        if file.exists() and not file.is_file():
            raise VectorError(f"{file}: expected a plain file")
        return file.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        why = getattr(error, "strerror", None) or error
        raise VectorError(f"{file}: {why}") from error


def _read_index(file: Path) -> dict:
    """index.json, its head checked, its cases not yet."""
    try:
        index = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, VectorError):
            raise
        raise VectorError(f"{file}: expected an index of vectors, found "
                          f"{type(error).__name__}: {error}") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        found = index.get("version") if isinstance(index, dict) else index
        raise VectorError(f"{file}: version: expected {VERSION}, found "
                          f"{found!r:.40}")
    name = _entry(index, "file", str, str(file))
    if "/" in name or "\\" in name or name in ("", ".", "..") or (
            "\0" in name):
        raise VectorError(f"{file}: file: expected a name in this folder, "
                          f"found {name!r:.80}")
    _entry(index, "sha256", str, str(file))
    _entry(index, "cases", list, str(file))
    return index

# %% tags=["export"]
def read_vectors(folder: str | Path) -> tuple[dict, Tensors]:
    """The index and all tensors. VectorError: a file that is missing,
    changed, or of another version; an index that is not one."""
    file = Path(folder) / FILES[0]
    index = _read_index(file)
    data = file.parent / index["file"]
    raw = _read(data)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != index["sha256"]:
        raise VectorError(f"{data}: expected sha256 {index['sha256']:.80}, "
                          f"found {digest}")
    stored = _tensors(lambda: load(raw), data)
    for number, case in enumerate(index["cases"]):
        _check_case(case, number, file, stored)
    return index, stored


def _tensors(read: Callable[[], Tensors], file: Path) -> Tensors:
    """Tensors of a safetensors file; VectorError, if it is none."""
    try:
        return read()
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError,
            TypeError, AttributeError, OverflowError) as error:
        raise VectorError(f"{file}: expected a safetensors file, found "
                          f"{type(error).__name__}: {error}") from error

# %% [markdown]
# ## The check
#
# `check` returns a line for each output that is too far off. Without `answers`
# it computes every case itself, in both dtypes; a port hands in a file.

# %% tags=["export"]
def _computed(case: dict, inputs: Tensors, kind: str, file: Path) -> Tensors:
    """`run_case`; what it cannot compute from such inputs is told as the
    case's mistake."""
    try:
        return run_case(case["operation"], inputs, case["parameters"],
                        getattr(torch, kind))
    except Exception as error:  # any: inputs of any shape, type and number
        raise VectorError(
            f"{file}: case {case['name']!r}: inputs that {case['operation']} "
            f"cannot take ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.160})") from error


def check(folder: str | Path, answers: str | Path | None = None,
          dtype: str = "float32") -> list[str]:
    """Hold an implementation to a set of vectors; returns what is wrong.

    By default this package, in float32 and bfloat16. With answers: a port's
    safetensors file, which has the outputs that it computed, in dtype, under
    the names of the index. VectorError: as `read_vectors`, and a case that
    cannot be computed.
    """
    index, stored = read_vectors(folder)
    given = None if answers is None else _tensors(
        lambda: load_file(answers), Path(answers))
    wrong = []
    for case in index["cases"]:
        inputs = {name: stored[key] for name, key in case["inputs"].items()}
        for kind in ("float32", "bfloat16") if given is None else (dtype,):
            found = given if given is not None else _computed(
                case, inputs, kind, Path(folder) / FILES[0])
            for name, out in case["outputs"].items():
                key = name if given is None else out["tensor"]
                if out[kind] is None:
                    continue
                far = (far_off(found[key], stored[out["tensor"]], *out[kind])
                       if key in found else float("inf"))
                if not far <= 1:
                    wrong.append(f"{out['tensor']} in {kind}: {far:.3g} "
                                 "times the tolerance")
    return wrong

# %%
vector_folder = Path(folder.name) / "vectors"
vector_files = write(vector_folder)
assert check(vector_folder) == []
size = sum(file.stat().st_size for file in vector_files)
assert size < 200_000
print(*(file.name for file in vector_files), f"{size / 1e3:.0f} kB,",
      len(all_cases()), "cases")

# %% [markdown]
# ## What a port needs
#
# All that a port needs, in twenty lines and without torch. `my_port` is the
# code under test: operation, inputs and parameters to outputs. (Here it is
# this package, so that the cell runs.)

# %%
import struct

import numpy as np


def my_port(operation, inputs, parameters):
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    return run_case(operation, tensors, parameters, torch.float32)


raw = (vector_folder / "vectors.safetensors").read_bytes()
size = struct.unpack("<Q", raw[:8])[0]
header, data = json.loads(raw[8:8 + size]), raw[8 + size:]
kinds = {"F32": "<f4", "I32": "<i4", "U8": "u1", "BF16": "<u2"}


def tensor(key):
    entry = header[key]
    start, end = entry["data_offsets"]
    x = np.frombuffer(data[start:end], kinds[entry["dtype"]])
    if entry["dtype"] == "BF16":  # the upper half of an fp32
        x = (x.astype("<u4") << 16).view("<f4")
    return x.reshape(entry["shape"])


for case in json.loads((vector_folder / "index.json").read_text())["cases"]:
    found = my_port(case["operation"], {
        name: tensor(key) for name, key in case["inputs"].items()},
        case["parameters"])
    for name, out in case["outputs"].items():
        atol, rtol = out["float32"]
        assert np.allclose(found[name], tensor(out["tensor"]), rtol, atol,
                           equal_nan=True), (case["name"], case["explains"])
print(f"every case passes, down to {case['name']!r}")

# %% [markdown]
# `tests/parity/numpy_vectors.py` is a whole port of this kind, all operations
# and the model in numpy, and `tests/parity/vectors` holds the set.

# %% [markdown]
# ## It holds
#
# A port hands in its outputs under the names of the index. Here they are the
# wanted ones, but for a window of 129 keys and one that is missing:

# %%
from safetensors.torch import save_file

index, stored = read_vectors(vector_folder)
answers = {out["tensor"]: stored[out["tensor"]] for case in index["cases"]
           for out in case["outputs"].values()}
file = vector_folder / "answers.safetensors"
save_file(answers, file)
assert check(vector_folder, file) == []
q, k = (stored[f"mask window/in/{name}"] for name in ("q_pos", "k_pos"))
answers["mask window/out/seen"] = visible(q[None], k[None], 129)[0].byte()
del answers["clamp/out/y"]
save_file(answers, file)
print(*check(vector_folder, file), sep="\n")

# %% [markdown]
# ## Takeaways
#
# 1. Numbers in and numbers out, with a tolerance for each dtype, hold an
#    implementation in any language to the model, without its code.
# 2. Inputs that bf16 holds exactly serve every dtype with one file.
# 3. Cases belong at the edges: there implementations part, and the name of
#    the case is then the diagnosis.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Hold a port that rounds YaRN's range to the vectors: compute its frequencies
# and see which case tells.

# %% tags=["hide-cell"]
parameters = next(case["parameters"] for case in index["cases"]
                  if case["name"] == "frequencies")
port = {out["tensor"]: stored[out["tensor"]] for case in index["cases"]
        for out in case["outputs"].values()}
port["frequencies/out/inv_freq"] = inverse_frequencies(
    64, parameters["theta"], parameters["factor"], truncate=True)
save_file(port, file)
told = check(vector_folder, file)
assert len(told) == 1 and told[0].startswith("frequencies/out/inv_freq")
print(told[0].split(":")[0])

# %% [markdown]
# ### Exercise 2
#
# A port rounds the norm twice in bf16: once after the division, once after the
# weight. Does the case `norm` see it, in fp32 and in bf16?

# %% tags=["hide-cell"]
near = next(case["outputs"]["y"] for case in index["cases"]
            if case["name"] == "norm")
for kind in ("float32", "bfloat16"):
    t = cast_inputs({name: stored[f"norm/in/{name}"]
                     for name in ("x", "weight")}, getattr(torch, kind))
    wide = t["x"].float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    twice = t["weight"] * wide.to(t["x"].dtype)
    print(f"{kind}: {far_off(twice, stored['norm/out/y'], *near[kind]):.1f} "
          "times the tolerance")

# %% [markdown]
# ### Exercise 3
#
# Flip the last bit of the data file. Which of the package's functions tells,
# and what would happen without it?

# %% tags=["hide-cell"]
data = bytearray((vector_folder / index["file"]).read_bytes())
data[-1] ^= 1
(vector_folder / index["file"]).write_bytes(data)
try:
    check(vector_folder)  # by `read_vectors`
except VectorError as error:
    print(*str(error).removeprefix(f"{vector_folder}/").split()[:3], "…")
# a right port would be told that it is wrong
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`, {cite}`ocpmx2023`, {cite}`yarn2023`: what the vectors
#   hold a port to.
# - huggingface/safetensors, `README.md`: the format that a port reads.
