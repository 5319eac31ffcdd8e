"""Which mistake explains the numbers?

Generated from book/parity/suspects.py; edit the chapter, not this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.attention.rope import rope_parameters
from gptoss.model.layers import Block
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import ALPHA, by_expert
from gptoss.moe.routing import softmax_then_topk
from gptoss.parity.contracts import ParityError, expert_weights, held
from gptoss.parity.judge import RIGHT, Judge, excess
from gptoss.parity.walk import Key, Parts, Trace, points, trace_ours
from gptoss.weights.config import GptOssConfig

# --- Who is suspected? -------------------------------------------------------

Mistakes = dict[str, dict[str, Any]]  # cause -> fields of Formula
_BIASES: Mistakes = {
    "bias added twice": {"bias": 2.0}, "bias left out": {"bias": 0.0}}
_TURNS: Mistakes = {
    "YaRN's range is rounded (truncate)": {"truncate": True},
    "YaRN's range is not rounded": {"truncate": False},
    "the concentration is missing": {"concentrated": False},
    "plain RoPE, no YaRN": {"stretched": False, "concentrated": False},
    "YaRN's frequencies are missing": {"stretched": False},
    "pairs (2i, 2i + 1) instead of halves": {"interleaved": True},
    "positions count from 1": {"shift": 1}}
_MASKS: Mistakes = {
    "the window is one key too long": {"longer": 1},
    "the window is one key too short": {"longer": -1},
    "sliding and full layers are exchanged": {"exchanged": True},
    "the sink is dropped": {"sink": False},
    "scores are not divided by sqrt(head size)": {"scaled": False},
    "query head h reads key head h % G": {"modulo": True}}
_NORMS: Mistakes = {
    "the norm multiplies by 1 + weight": {"norm_plus_one": True}}
SUSPECTS: dict[str, Mistakes] = {  # by the point that they show at
    "norm": _NORMS, "norm 2": _NORMS, "last norm": _NORMS,
    "q": _BIASES, "k": _BIASES, "v": _BIASES, "attention": _BIASES,
    "router": _BIASES, "q turned": _TURNS, "k turned": _TURNS,
    "weights": _MASKS, "heads": _MASKS,
    "shares": {"softmax over all experts, before the choice":
               {"softmax_first": True}},
    "hidden": {
        "the nibbles of a byte are swapped": {"nibbles": True},
        "gate and up are swapped": {"gate_up": "swapped"},
        "gate and up are halves, not interleaved": {"gate_up": "halves"},
        "the gate is clamped from below, not above": {"clamp": "gate below"},
        "the gate is clamped on both sides": {"clamp": "gate both"},
        "up is clamped from above only": {"clamp": "up above"},
        "nothing is clamped": {"clamp": "none"},
        "SiLU instead of alpha 1.702": {"alpha": 1.0},
        "up is not raised by 1": {"plus_one": 0.0},
        "gate_up's bias added twice": {"up_bias": 2.0},
        "gate_up's bias left out": {"up_bias": 0.0}},
    "experts": {
        "down's nibbles are swapped": {"nibbles": True},
        "down's bias added twice": {"down_bias": 2.0},
        "down's bias left out": {"down_bias": 0.0}}}


# --- What does a finding say? ------------------------------------------------

@dataclass(frozen=True)
class Finding:
    """An operation that rounding does not explain."""

    side: str  # "ours" or the reference's name
    layer: int | None
    point: str
    excess: float  # how many times its bound
    cause: str | None  # a suspect that explains it
    cause_excess: float | None  # how many times its bound then

    def describe(self) -> str:
        """Two lines for a person."""
        where = "" if self.layer is None else f"layer {self.layer}, "
        first = (f"{self.side}: first beyond rounding at {where}"
                 f"{self.point}, {self.excess:.1e} times its bound")
        if self.cause is None:
            return f"{first}\n  no known cause explains it"
        return (f"{first}\n  {self.cause}: with that, "
                f"{self.cause_excess:.2f} of the bound")


# --- Which suspect explains the numbers? -------------------------------------

def explain(judge: Judge, trace: Trace, key: Key
            ) -> tuple[str, float] | tuple[None, None]:
    """The suspect with the least excess among those that explain key."""
    tried = [(excess(trace[key], judge.expected(
        trace, key, replace(RIGHT, **fields))), cause)
        for cause, fields in SUSPECTS.get(key[1], {}).items()]
    best = min(tried, default=(math.inf, ""))
    return (best[1], best[0]) if best[0] <= 1 else (None, None)


@torch.inference_mode()
def judge_walk(judge: Judge, trace: Trace, side: str
            ) -> tuple[dict[Key, float], Finding | None]:
    """Every operation's excess, and the first that is above 1."""
    found = {key: excess(trace[key], judge.expected(trace, key))
             for key in points(judge.config)}
    for key, value in found.items():
        if not value <= 1:
            return found, Finding(side, *key, value,
                                  *explain(judge, trace, key))
    return found, None


# --- How is a fault planted? -------------------------------------------------

def _swap_rows(block: Block) -> None:
    """Gate rows where up rows belong, and the other way round."""
    experts = block.mlp.experts
    for name, t in [*experts.named_parameters(), *experts.named_buffers()]:
        if name.startswith("gate_up"):
            t.data = t.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _swap_nibbles(block: Block) -> None:
    for name, t in block.mlp.experts.named_buffers():
        if name.endswith("_blocks"):
            t.data = t << 4 | t >> 4


def _clamp_below(block: Block) -> None:
    """The gate's clamp(max=limit) becomes clamp(min=-limit); in fp32, which
    is within the rounding of every contract."""
    experts = block.mlp.experts

    def one(e: int, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        up, down, up_bias, down_bias = (t.to(wide) for t in (
            *expert_weights(experts, e, wide),
            held(experts, "gate_up_proj_bias")[e],
            held(experts, "down_proj_bias")[e]))
        gate, up = F.linear(rows.to(wide), up, up_bias).unflatten(
            -1, (-1, 2)).unbind(-1)
        gate = gate.clamp(min=-experts.limit)
        up = up.clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * (gate * torch.sigmoid(ALPHA * gate))
        return F.linear(hidden, down, down_bias)
    count = len(held(experts, "gate_up_proj_bias"))
    experts.forward = (  # type: ignore[method-assign]  # the fault itself
        lambda x, ids, weights: by_expert(x, ids, weights, count, one))


def _softmax_first(block: Block) -> None:
    router = block.mlp.router
    router.forward = (  # type: ignore[method-assign]  # the fault itself
        lambda x: softmax_then_topk(F.linear(x, router.weight, router.bias),
                                    router.k, renormalise=False))


def _wider(block: Block) -> None:
    block.self_attn.window += bool(block.self_attn.window)


def _no_sink(block: Block) -> None:
    sinks = block.self_attn.sinks
    sinks.data = torch.full_like(sinks, -torch.inf)


def _bias_twice(block: Block) -> None:
    bias = block.self_attn.o_proj.bias
    bias.data = 2 * bias


def _truncated(config: GptOssConfig) -> tuple[Tensor, float]:
    return rope_parameters(replace(config, rope_truncate=True))


def _unconcentrated(config: GptOssConfig) -> tuple[Tensor, float]:
    return rope_parameters(config)[0], 1.0


# name -> what is done to each block or to RoPE, the cause to be named
FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "truncate": (_truncated, "YaRN's range is rounded (truncate)"),
    "concentration": (_unconcentrated, "the concentration is missing"),
    "window": (_wider, "the window is one key too long"),
    "sink": (_no_sink, "the sink is dropped"),
    "bias": (_bias_twice, "bias added twice"),
    "softmax": (_softmax_first,
                "softmax over all experts, before the choice"),
    "nibbles": (_swap_nibbles, "the nibbles of a byte are swapped"),
    "swapped": (_swap_rows, "gate and up are swapped"),
    "clamp": (_clamp_below, "the gate is clamped from below, not above")}


def trace_faulty(model: GptOss, tokens: Tensor, fault: str,
                 contract: str = "fp32", parts: Parts | None = None) -> Trace:
    """`trace_ours` after one of FAULTS was planted; the model stays broken.

    ParityError: no such fault.
    """
    if fault not in FAULTS:
        raise ParityError(f"fault: expected one of {', '.join(FAULTS)}, "
                          f"found {fault}")
    change = FAULTS[fault][0]
    if change in (_truncated, _unconcentrated):
        return trace_ours(model, tokens, contract, change, parts)
    for block in model.layers:
        change(block)
    return trace_ours(model, tokens, contract, parts=parts)


__all__ = [
    "FAULTS",
    "Finding",
    "Mistakes",
    "SUSPECTS",
    "explain",
    "judge_walk",
    "trace_faulty",
]
