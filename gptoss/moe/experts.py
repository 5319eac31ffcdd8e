"""Experts

Generated from book/moe/experts.py; edit the chapter, not this file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.weights.mxfp4 import decode

# --- How does one expert answer? ---------------------------------------------

ALPHA = 1.702  # makes z * sigmoid(ALPHA * z) close to GELU; not in config


def clamped_swiglu(gate_up: Tensor, limit: float = 7.0) -> Tensor:
    """(…, 2F) with gate at even, up at odd entries -> (…, F), same dtype.

    The gate is clamped from above only, up on both sides. The order of the
    multiplications is that of transformers, so that equal inputs give equal
    bits. Source: openai/gpt-oss gpt_oss/torch/model.py, swiglu.
    """
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


def one_expert(x: Tensor, gate_up_FD: Tensor, gate_up_bias: Tensor,
               down_DF: Tensor, down_bias: Tensor, limit: float = 7.0
               ) -> Tensor:
    """(…, D) -> (…, D) through one expert.

    gate_up_FD (2F, D), gate_up_bias (2F,), down_DF (D, F), down_bias (D,),
    all in x.dtype, any strides.
    """
    hidden = clamped_swiglu(F.linear(x, gate_up_FD, gate_up_bias), limit)
    return F.linear(hidden, down_DF, down_bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the K results are summed in: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# --- What is the loop, word for word? ----------------------------------------

def experts_loop(x: Tensor, ids: Tensor, weights: Tensor,
                 gate_up_EFD: Tensor, gate_up_bias: Tensor,
                 down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                 ) -> Tensor:
    """The slow twin: every token, every choice, one after the other.

    x (N, D); ids (N, K) int64, distinct in a row; weights (N, K);
    gate_up_EFD (E, 2F, D), gate_up_bias (E, 2F), down_EDF (E, D, F),
    down_bias (E, D). Returns (N, D) in x.dtype, summed in fp32.
    """
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for n, chosen in enumerate(ids.tolist()):
        for k, e in enumerate(chosen):
            out = one_expert(x[n], gate_up_EFD[e], gate_up_bias[e],
                             down_EDF[e], down_bias[e], limit)
            y[n] += out.to(y.dtype) * weights[n, k].to(y.dtype)
    return y.to(x.dtype)


# --- What does OpenAI's code do? ---------------------------------------------

def experts_gather(x: Tensor, ids: Tensor, weights: Tensor,
                   gate_up_EFD: Tensor, gate_up_bias: Tensor,
                   down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                   ) -> Tensor:
    """OpenAI's form: copy the K chosen experts to every token, contract.

    Arguments as in `experts_loop`. Takes 3NKFD numbers of memory.
    """
    gate_up = torch.einsum("nd,nkfd->nkf", x, gate_up_EFD[ids])
    hidden = clamped_swiglu(gate_up + gate_up_bias[ids], limit)
    out = torch.einsum("nkf,nkdf->nkd", hidden, down_EDF[ids])
    out = (out + down_bias[ids]).to(_wide(x.dtype))
    return (out * weights.to(out.dtype)[..., None]).sum(1).to(x.dtype)


# --- How are the tokens sorted by expert? ------------------------------------

def by_expert(x: Tensor, ids: Tensor, weights: Tensor, experts: int,
              apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over the chosen experts, each called once with all its tokens.

    apply(e, rows (M, D)) -> (M, D) is called in ascending order of e and
    only for the experts hit. Arguments and result as in `experts_loop`.
    """
    order = ids.flatten().argsort(stable=True)  # pick n * K + k, by expert
    counts = torch.bincount(ids.flatten(), minlength=experts).tolist()
    tokens = order // ids.shape[1]
    rows = x.index_select(0, tokens).split(counts)
    shares = weights.flatten().index_select(0, order)[:, None].split(counts)
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for e, which in enumerate(tokens.split(counts)):
        if counts[e]:
            out = apply(e, rows[e]).to(y.dtype) * shares[e].to(y.dtype)
            y.index_add_(0, which, out)
    return y.to(x.dtype)


def experts_grouped(x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_EFD: Tensor, gate_up_bias: Tensor,
                    down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                    ) -> Tensor:
    """One pair of matrix products for every expert hit; differentiable.

    Arguments as in `experts_loop`; the weights may have any strides.
    """
    parts = list(zip(gate_up_EFD.unbind(), gate_up_bias.unbind(),
                     down_EDF.unbind(), down_bias.unbind(), strict=True))
    return by_expert(x, ids, weights, len(parts),
                     lambda e, rows: one_expert(rows, *parts[e], limit))


# --- What if the weights are packed in four bits? ----------------------------

def packed_by_decoding(x: Tensor, ids: Tensor, weights: Tensor,
                       gate_up_blocks: Tensor, gate_up_scales: Tensor,
                       gate_up_bias: Tensor, down_blocks: Tensor,
                       down_scales: Tensor, down_bias: Tensor, limit: float
                       ) -> Tensor:
    """`packed_experts` in plain torch: decode an expert, use it, drop it."""
    def apply(e: int, rows: Tensor) -> Tensor:
        return one_expert(
            rows, decode(gate_up_blocks[e], gate_up_scales[e], x.dtype),
            gate_up_bias[e], decode(down_blocks[e], down_scales[e], x.dtype),
            down_bias[e], limit)
    return by_expert(x, ids, weights, len(gate_up_scales), apply)


# --- How do gradients pass packed experts? -----------------------------------

def swiglu_backward(gate_up: Tensor, grad: Tensor, limit: float) -> Tensor:
    """Gradient of `clamped_swiglu` at gate_up (…, 2F) for grad (…, F)."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(ALPHA * g)
    slope = s + ALPHA * g * s * (1 - s)  # of g * sigmoid(ALPHA * g)
    d_gate = grad * (u + 1) * slope * (gate <= limit)
    d_up = grad * g * s * (up.abs() <= limit)
    return torch.stack([d_gate, d_up], dim=-1).flatten(-2)


def packed_backward(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_blocks: Tensor, gate_up_scales: Tensor,
                    gate_up_bias: Tensor, down_blocks: Tensor,
                    down_scales: Tensor, down_bias: Tensor, limit: float
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and both biases; one expert at a time."""
    wide = _wide(x.dtype)
    d_x, d_weights, d_up, d_down = (
        torch.zeros_like(t, dtype=wide)
        for t in (x, weights, gate_up_bias, down_bias))
    for e in ids.unique().tolist():
        n, k = (ids == e).nonzero(as_tuple=True)
        gate_up_FD = decode(gate_up_blocks[e], gate_up_scales[e], x.dtype)
        down_DF = decode(down_blocks[e], down_scales[e], x.dtype)
        gate_up = F.linear(x[n], gate_up_FD, gate_up_bias[e])
        out = F.linear(clamped_swiglu(gate_up, limit), down_DF, down_bias[e])
        d_weights[n, k] = (grad[n] * out).sum(-1, dtype=wide)
        d_out = grad[n] * weights[n, k, None].to(x.dtype)
        d_gate_up = swiglu_backward(gate_up, d_out @ down_DF, limit)
        d_x.index_add_(0, n, (d_gate_up @ gate_up_FD).to(wide))
        d_up[e], d_down[e] = (t.sum(0, dtype=wide)
                              for t in (d_gate_up, d_out))
    return (d_x.to(x.dtype), d_weights.to(weights.dtype),
            d_up.to(gate_up_bias.dtype), d_down.to(down_bias.dtype))


__all__ = [
    "ALPHA",
    "by_expert",
    "clamped_swiglu",
    "experts_gather",
    "experts_grouped",
    "experts_loop",
    "one_expert",
    "packed_backward",
    "packed_by_decoding",
    "swiglu_backward",
]
