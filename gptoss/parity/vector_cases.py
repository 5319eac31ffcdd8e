"""How is a port in another language held to it?

Generated from book/parity/vectors.py; edit the chapter, not this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
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
from gptoss.weights.write import random_tensors

# --- Operations --------------------------------------------------------------

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


# --- Cases at the edges ------------------------------------------------------

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


__all__ = [
    "EDGES",
    "FILES",
    "FORMAT",
    "GREEDY",
    "OPERATIONS",
    "TINY_CONFIG",
    "Tensors",
    "VERSION",
    "VectorCase",
    "VectorError",
    "all_cases",
    "attention_cases",
    "cast_inputs",
    "model_cases",
    "part_cases",
    "run_case",
]
