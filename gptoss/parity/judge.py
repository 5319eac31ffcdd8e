"""Which operation parted first?

Generated from book/parity/judge.py; edit the chapter, not this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.attention.masks import visible
from gptoss.attention.rope import concentration as rope_concentration
from gptoss.attention.rope import inverse_frequencies
from gptoss.moe.experts import ALPHA
from gptoss.parity.rounding import (
    FLOOR,
    KEYS_AT_ONCE,
    Pair,
    Rounding,
    half_step,
)
from gptoss.parity.walk import Key, Trace, dense_shares
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.mxfp4 import FP4_VALUES, SCALE_BIAS

# --- The idea in twelve lines ------------------------------------------------

def excess(found: Tensor, expected: Pair) -> float:
    """max |found - value| / bound; infinite for NaN, infinity or another
    shape. At most 1: rounding explains it."""
    value, bound = expected
    if found.shape != value.shape or not found.isfinite().all():
        return math.inf
    error = (found.double() - value).abs()
    return (error / bound.clamp_min(FLOOR)).max().item()


# --- What should an operation give? ------------------------------------------

@dataclass(frozen=True)
class Formula:
    """The model's arithmetic; every field but the default is a mistake."""

    norm_plus_one: bool = False  # Gemma's (1 + weight)
    bias: float = 1.0  # times the bias of q, k, v, o or the router
    truncate: bool | None = None  # None: as the configuration says
    stretched: bool = True  # YaRN at all
    concentrated: bool = True
    interleaved: bool = False  # pairs (2i, 2i + 1)
    shift: int = 0  # positions count from here
    longer: int = 0  # keys beyond the window
    exchanged: bool = False  # sliding and full layers
    sink: bool = True
    scaled: bool = True
    modulo: bool = False  # head h reads key head h % G
    softmax_first: bool = False
    nibbles: bool = False  # high nibble first
    gate_up: str = "interleaved"  # "swapped", "halves"
    clamp: str = "right"
    alpha: float = ALPHA
    plus_one: float = 1.0
    up_bias: float = 1.0
    down_bias: float = 1.0


RIGHT = Formula()
_INF = math.inf
CLAMPS = {  # limits of gate and up, in units of swiglu_limit
    "right": ((-_INF, 1), (-1, 1)), "gate below": ((-1, _INF), (-1, 1)),
    "gate both": ((-1, 1), (-1, 1)), "up above": ((-_INF, 1), (-_INF, 1)),
    "none": ((-_INF, _INF), (-_INF, _INF))}


# --- Where does the judge get its weights? -----------------------------------

class Judge:
    """Recomputes one operation in float64 from a run's own inputs.

    checkpoint: open; its weights are rounded to dtype first, as every
    loader does. inner, kernels: of the run's `Contract`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype,
                 inner: bool, kernels: bool = False) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype, self.rounding = dtype, Rounding.of(dtype, inner, kernels)
        packed = kernels and checkpoint.layout != "bf16"
        self.packed = Rounding.of(dtype, inner, packed)  # of its experts

    def weight(self, name: str, layer: int | None = None,
               rows: slice | Tensor = slice(None)) -> Tensor:
        """A tensor, or rows of it, as the run holds it, in float64."""
        name = name if layer is None else f"model.layers.{layer}.{name}"
        return self.checkpoint.read(name)[rows].to(self.dtype).double()

    def expert(self, name: str, layer: int | None, e: int, f: Formula
               ) -> Tensor:
        """gate_up_proj or down_proj of expert e, (out, in), in float64."""
        full = f"model.layers.{layer}.mlp.experts.{name}"
        rows, read = slice(e, e + 1), self.checkpoint.read
        if self.checkpoint.layout == "bf16":
            return read(full, rows)[0].T.to(self.dtype).double()
        blocks, scales = (read(f"{full}_{part}", rows)[0]
                          for part in ("blocks", "scales"))
        nibbles = [blocks & 15, blocks >> 4]
        codes = torch.stack(nibbles[::-1] if f.nibbles else nibbles, -1)
        grid = torch.tensor(FP4_VALUES, dtype=torch.float64)
        power = torch.exp2(scales.double() - SCALE_BIAS)[..., None]
        values = grid[codes.flatten(-2).long()] * power
        return values.flatten(-2).to(self.dtype).double()

    def expected(self, trace: Trace, key: Key, f: Formula = RIGHT
                 ) -> Pair:
        """What the operation at key should give, and how far off it may
        be: float64 tensors of the recorded shape."""
        layer, point = key

        def see(name: str, at: int | None = layer) -> Tensor:
            value = trace[at, name]
            return value.double() if value.is_floating_point() else value
        return JUDGES[point](self, see, layer, point, f)


# --- Norms, projections, sums ------------------------------------------------

See = Callable[..., Tensor]
_NAMES = {"norm": "input_layernorm", "norm 2": "post_attention_layernorm",
          "router": "mlp.router", "attention": "self_attn.o_proj"}
_BEFORE = {"norm 2": "middle", "attention": "heads", "router": "norm 2",
           "q": "norm", "k": "norm", "v": "norm"}


def _stream(j: Judge, see: See, layer: int | None) -> Tensor:
    """The residual stream as it enters a layer, or leaves the last."""
    layer = j.config.num_hidden_layers if layer is None else layer
    return see("block", layer - 1) if layer else see("embedding", None)


def _norm(j: Judge, see: See, layer: int | None, point: str, f: Formula
          ) -> Pair:
    x = (see("middle") if point == "norm 2" else _stream(j, see, layer))
    name = f"{_NAMES[point]}.weight" if layer is not None else (
        "model.norm.weight")
    weight = j.weight(name, layer) + f.norm_plus_one
    y = x * (x.square().mean(-1, keepdim=True)
             + j.config.rms_norm_eps).rsqrt() * weight
    r = j.rounding
    return r.stored(y, y.abs() * (r.sums(x.shape[-1]) + 4 * r.wide))


def _linear(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    x = see(_BEFORE[point]).flatten(1)
    name = _NAMES.get(point, f"self_attn.{point}_proj")
    value, error = j.rounding.linear(
        (x, torch.zeros_like(x)), j.weight(f"{name}.weight", layer),
        f.bias * j.weight(f"{name}.bias", layer), False)
    shape = see(point).shape
    return value.view(shape), error.view(shape)


def _logits(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """Some rows of lm_head at a time: 201,088 of them take 4.6 GB."""
    x = see("last norm")
    step = max(1, 2 ** 24 // x.shape[1])
    values, errors = zip(*(j.rounding.linear(
        (x, torch.zeros_like(x)),
        j.weight("lm_head.weight", rows=slice(start, start + step)),
        torch.zeros(1), False)
        for start in range(0, j.config.vocab_size, step)), strict=True)
    return torch.cat(values, -1), torch.cat(errors, -1)


def _sum(j: Judge, see: See, layer: int | None, point: str, f: Formula
         ) -> Pair:
    y = (see("middle") + see("experts") if point == "block"
         else _stream(j, see, layer) + see("attention"))
    return j.rounding.stored(y, torch.zeros_like(y))


def _tables(j: Judge, length: int, f: Formula) -> tuple[Pair, Pair]:
    """cos and sin (T, 1, C/2) with their errors."""
    c, r = j.config, j.rounding
    yarn = c.rope_type == "yarn" and f.stretched
    factor = c.rope_factor if yarn else 1.0
    truncate = c.rope_truncate if f.truncate is None else f.truncate
    inv_freq = inverse_frequencies(
        c.head_dim, c.rope_theta, factor, c.initial_context_length,
        c.rope_beta_fast, c.rope_beta_slow, truncate).double()
    angle = (torch.arange(length).double() + f.shift)[:, None] * inv_freq
    m = rope_concentration(factor) if f.concentrated else 1.0
    error = m * (4 * r.wide * angle.abs() + 4 * r.wide)
    cos, sin = (r.stored(m * wave, error)
                for wave in (angle.cos(), angle.sin()))
    return (cos[0][:, None], cos[1][:, None]), (sin[0][:, None],
                                                sin[1][:, None])


def _turned(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    x, u = see(point[0]), j.rounding.step
    (cos, e_cos), (sin, e_sin) = _tables(j, len(x), f)
    half = x.shape[-1] // 2
    a, b = ((x[..., ::2], x[..., 1::2]) if f.interleaved
            else (x[..., :half], x[..., half:]))
    out = []
    for p, q in ((a, -b), (b, a)):  # p cos + q sin
        error = (p.abs() * e_cos + q.abs() * e_sin
                 + u * (p * cos).abs() + u * (q * sin).abs()) * (1 + u)
        out.append(j.rounding.stored(p * cos + q * sin, error))

    def join(first: Tensor, second: Tensor) -> Tensor:
        return (torch.stack((first, second), -1).flatten(-2) if f.interleaved
                else torch.cat((first, second), -1))
    return join(out[0][0], out[1][0]), join(out[0][1], out[1][1])


# --- Attention ---------------------------------------------------------------

def _scores(j: Judge, see: See, layer: int | None, f: Formula) -> Pair:
    """Scores (T, H, S + 1) with the sink last, -inf where hidden."""
    c, r = j.config, j.rounding
    q, k = see("q turned"), see("k turned")
    T, H, C = q.shape
    heads = torch.arange(H)
    heads = (heads % k.shape[1] if f.modulo
             else heads // (H // k.shape[1]))
    scale, k = C ** -0.5 if f.scaled else 1.0, k[:, heads]
    raw = torch.einsum("thc,shc->ths", q, k) * scale
    size = torch.einsum("thc,shc->ths", q.abs(), k.abs()) * scale
    kinds = c.layer_types or ()
    sliding = (kinds[layer or 0] == "sliding_attention") ^ f.exchanged
    window = c.sliding_window + f.longer if sliding else None
    positions = torch.arange(T)[None]
    seen = visible(positions, positions, window)[0][:, None]
    sink = j.weight("self_attn.sinks", layer).view(1, -1, 1).expand(T, H, 1)
    sink = sink if f.sink else torch.full_like(sink, -torch.inf)
    scores = torch.cat([raw.masked_fill(~seen, -torch.inf), sink], -1)
    finite = scores.masked_fill(scores.isinf(), 0.0)
    top = scores.amax(-1, keepdim=True)
    inner = r.inner * (2 * finite.abs() + (finite - top).abs())
    error = F.pad((r.sums(C) + 2 * r.wide) * size, (0, 1)) + inner
    if r.kernels:  # what was summed is rescaled when the maximum rises
        error = error + 3 * r.wide * math.ceil(T / KEYS_AT_ONCE)
    return scores, error.masked_fill(scores.isinf(), 0.0)


def _weights(j: Judge, see: See, layer: int | None, point: str, f: Formula
             ) -> Pair:
    scores, error = _scores(j, see, layer, f)
    r, probs = j.rounding, scores.softmax(-1)
    shift = error + (probs * error).sum(-1, keepdim=True)
    relative = torch.expm1(shift) + r.inner + r.sums(scores.shape[-1]) + (
        8 * r.wide + 2 * r.power)
    value, error = probs[..., :-1], (probs * relative)[..., :-1]
    return r.stored(value, error) if point == "weights" else (value, error)


def _heads(j: Judge, see: See, layer: int | None, point: str, f: Formula
           ) -> Pair:
    probs, error = _weights(j, see, layer, point, f)
    v = see("v")
    group = probs.shape[1] // v.shape[1]
    v, r = v.repeat_interleave(group, 1), j.rounding
    error = error + r.sums(len(v)) * probs
    return r.stored(torch.einsum("ths,shc->thc", probs, v),
                    torch.einsum("ths,shc->thc", error, v.abs()))


# --- Routing -----------------------------------------------------------------

def _shares(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    logits, ids, r = see("router"), see("chosen"), j.rounding
    chosen = logits.gather(1, ids)
    weights = (logits.softmax(-1).gather(1, ids) if f.softmax_first
               else chosen.softmax(-1))
    span = (logits if f.softmax_first else chosen)
    span = span.amax(1, keepdim=True) - chosen
    error = weights * (r.sums(logits.shape[1]) + (8 + span) * r.wide)
    weights, error = r.stored(weights, error)
    return (dense_shares(ids, weights, logits.shape[1]),
            dense_shares(ids, error, logits.shape[1]))


def _chosen(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """Whether a choice is a top-K of the recorded logits: 1 where so."""
    logits, ids = see("router"), see("chosen")
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    worst = logits.gather(1, ids).amin(1)
    best = logits.masked_fill(taken, -torch.inf).amax(1)
    right = (worst >= best) & (taken.sum(1) == j.config.num_experts_per_tok)
    value = torch.where(right[:, None], ids, -1).double()
    return value, torch.zeros_like(value) + FLOOR


# --- Experts, in two halves --------------------------------------------------

def _swiglu(r: Rounding, gate_up: Pair, f: Formula, limit: float) -> Pair:
    """The clamped product, each of its five steps stored as a step."""
    keep = partial(r.stored, step=True)
    low, high = ((t[..., ::2], t[..., 1::2]) for t in gate_up)
    (gate, up), (e_gate, e_up) = low, high
    gate, up = (t.clamp(a * limit, b * limit) for t, (a, b) in
                zip((gate, up), CLAMPS[f.clamp], strict=True))
    scaled, e = keep(f.alpha * gate, f.alpha * e_gate)
    sigmoid = torch.sigmoid(scaled)
    sigmoid, e_sig = keep(sigmoid, e / 4 + (4 * r.wide + r.power) * sigmoid)
    glu, e_glu = keep(gate * sigmoid, e_gate * (sigmoid + e_sig)
                      + gate.abs() * e_sig)
    more, e_more = keep(up + f.plus_one, e_up)
    return keep(more * glu, more.abs() * e_glu
                + e_more * (glu.abs() + e_glu))


def _as_rows(t: Tensor, how: str) -> Tensor:
    """Gate and up interleaved, if they lie as `how` says."""
    if how == "swapped":
        return t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return t if how == "interleaved" else torch.stack(
        t.chunk(2, -1), -1).flatten(-2)


def _hidden(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """(T, K, F), experts ascending in each row."""
    x, ids, r = see("norm 2"), see("chosen"), j.packed
    half = torch.zeros_like(x)
    if r.kernels:
        half = half_step((x, half), stored=True)
    bias = f.up_bias * j.weight("mlp.experts.gate_up_proj_bias", layer)
    out = [torch.zeros(*ids.shape, bias.shape[1] // 2, dtype=x.dtype)
           for _ in range(2)]
    for e in ids.unique().tolist():
        n, k = torch.where(ids == e)
        both = r.linear((x[n], half[n]),
                        j.expert("gate_up_proj", layer, e, f), bias[e], True)
        hidden = _swiglu(r, (_as_rows(both[0], f.gate_up), _as_rows(
            both[1], f.gate_up)), f, j.config.swiglu_limit)
        if r.kernels:  # integers once more, and only then into bf16
            value, error = hidden
            hidden = r.stored(value, error + half_step(hidden, stored=False))
        for whole, part in zip(out, hidden, strict=True):
            whole[n, k] = part
    return out[0], out[1]


def _experts(j: Judge, see: See, layer: int | None, point: str, f: Formula
             ) -> Pair:
    """The K outputs, weighted and summed, from the hidden vectors."""
    hidden, ids, shares = see("hidden"), see("chosen"), see("shares")
    r = j.packed
    off = r.unit * hidden.abs()  # the probe may have rounded the other way
    if r.kernels:  # and an integer may be another there: a whole step
        off = off + 2 * half_step((hidden, off), stored=False)
    bias = f.down_bias * j.weight("mlp.experts.down_proj_bias", layer)
    y, size, error = (torch.zeros(len(ids), bias.shape[1], dtype=bias.dtype)
                      for _ in range(3))
    for e in ids.unique().tolist():
        n, k = torch.where(ids == e)
        weight, down = shares[n, e, None], j.expert("down_proj", layer, e, f)
        value, wrong = r.linear((hidden[n, k], off[n, k]), down, bias[e],
                                True)
        y[n] += weight * value
        size[n] += weight * value.abs()
        error[n] += weight * wrong
    steps = ids.shape[1] + 1  # the weighting, and K additions
    return r.stored(y, error + steps * r.inner * size)


def _embedding(j: Judge, see: See, layer: int | None, point: str,
               f: Formula) -> Pair:
    value = j.weight("model.embed_tokens.weight", rows=see("tokens"))
    return value, torch.zeros_like(value) + FLOOR


JUDGES = {"embedding": _embedding, "norm": _norm, "q": _linear,
          "k": _linear, "v": _linear, "q turned": _turned,
          "k turned": _turned, "weights": _weights, "heads": _heads,
          "attention": _linear, "middle": _sum, "norm 2": _norm,
          "router": _linear, "chosen": _chosen, "shares": _shares,
          "hidden": _hidden, "experts": _experts, "block": _sum,
          "last norm": _norm, "logits": _logits}


__all__ = [
    "CLAMPS",
    "Formula",
    "JUDGES",
    "Judge",
    "RIGHT",
    "See",
    "excess",
]
