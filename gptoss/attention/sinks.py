"""Sinks: attention that may decline

Generated from book/attention/sinks.py; edit the chapter, not this file.
"""

import torch
from torch import Tensor

from gptoss.attention.scores import check_heads_and_mask, mix, scores

# --- Form 1: how does the sink join the softmax? -----------------------------

def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """Softmax over S keys and one sink: (…, H, T, S), (H,) -> (…, H, T, S).

    The sink's share is dropped, so a row sums to less than one. Masked
    scores are -inf; a row of nothing but -inf gives 0. Any float dtype.
    Source: openai/gpt-oss gpt_oss/torch/model.py, sdpa.
    """
    column = _column(sinks, scores).unsqueeze(-1)
    column = column.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _column(sinks: Tensor, like: Tensor) -> Tensor:
    """Sinks (H,) -> (H, 1) in like.dtype, never below its lowest number."""
    lowest = torch.finfo(like.dtype).min
    return sinks.to(like.dtype).clamp_min(lowest).unsqueeze(-1)


def attention_concat(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float) -> Tensor:
    """Attention with sinks, concat form: -> (B, T, H, C) in q.dtype.

    q (B, T, H, C); k, v (B, S, G, C), query head h uses key head
    h // (H // G); sinks (H,); mask bool (B or 1, T, S), true = visible.
    Computed in fp32 (float64 for float64) from q to the one rounding at the
    end. A row with no visible key gives 0. Memory O(B H T S).
    ValueError: H not a multiple of G, a mask of another shape or dtype.
    """
    weights = softmax_with_sink(scores(q, k, mask, scale), sinks)
    return mix(weights, v).to(q.dtype)


# --- Form 2: what does a kernel have to return? ------------------------------

def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What the sink takes of each row: (…, H, T), (H,) -> (…, H, T), 0..1.

    lse is the log-sum-exp of the row's scores, -inf for an empty row.
    """
    return torch.sigmoid(_column(sinks, lse) - lse)


def rescale(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add sinks to the result of any attention that returns its lse.

    out (B, T, H, C) of attention without sinks, 0 in empty rows; lse
    (B, H, T), natural logarithm, of its scaled scores. Returns out's shape
    and dtype.
    """
    kept = torch.sigmoid(lse - _column(sinks, lse)).transpose(1, 2)
    return (out * kept.unsqueeze(-1)).to(out.dtype)


def attention_rescale(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                      mask: Tensor, scale: float) -> Tensor:
    """`attention_concat` as plain attention and then `rescale`."""
    a = scores(q, k, mask, scale)
    lse = a.logsumexp(-1)
    # finite even for an empty row: exp(-inf - lowest) = 0, not NaN
    floor = lse.clamp_min(torch.finfo(lse.dtype).min)
    out = mix((a - floor.unsqueeze(-1)).exp(), v)
    return rescale(out, lse, sinks).to(q.dtype)


# --- Form 3: what if only a few keys fit into memory? ------------------------

def attention_online(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float, chunk: int = 64) -> Tensor:
    """`attention_concat` with `chunk` keys at a time: O(B H T chunk) memory.

    The running maximum and sum of a row start as if the sink had been its
    first key, with a value of zero. ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, found {chunk}")
    check_heads_and_mask(q, k, mask)
    B, T, H, C = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, T, H, C, dtype=wide, device=q.device)
    top = _column(sinks, out).expand(B, H, T)
    total = torch.ones_like(top)
    for s in range(0, k.shape[1], chunk):
        keys = slice(s, s + chunk)
        a = scores(q, k[:, keys], mask[..., keys], scale)
        higher = torch.maximum(top, a.amax(-1))
        shrink = (top - higher).exp()
        weights = (a - higher.unsqueeze(-1)).exp()
        total = total * shrink + weights.sum(-1)
        out = out * shrink.transpose(1, 2).unsqueeze(-1)
        out = out + mix(weights, v[:, keys])
        top = higher
    return (out / total.transpose(1, 2).unsqueeze(-1)).to(q.dtype)


# --- Can a kernel serve that knows nothing of sinks? -------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)


class _FlashWithSinks(torch.autograd.Function):
    """Torch's CPU kernel, rescaled; heads before tokens, as it wants them."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, bias, scale):
        out, lse = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        out = rescale(out.transpose(1, 2), lse, sinks).transpose(1, 2)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        column = _column(sinks, lse)
        dq, dk, dv = _flash_backward(
            grad, q, k, v, out, torch.logaddexp(lse, column), 0.0, False,
            attn_mask=bias, scale=ctx.scale)
        said = (grad.to(lse.dtype) * out).sum(-1)
        ds = -(sink_share(lse, sinks) * said).sum((0, 2))
        return dq, dk, dv, ds.to(sinks.dtype), None, None


def attention_flash(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                    mask: Tensor, scale: float) -> Tensor:
    """`attention_concat` by torch's CPU kernel and `rescale`; it trains.

    Memory O(B T S) for the mask, none for scores. In bf16 the kernel rounds
    its weights and its output before the rescaling: less exact than the
    other forms. ValueError: tensors that are not on a CPU.
    """
    if q.device.type != "cpu":
        raise ValueError(f"attention_flash: expected cpu, found {q.device}")
    check_heads_and_mask(q, k, mask)
    bias = torch.zeros(mask.shape, dtype=q.dtype)
    bias = bias.masked_fill_(~mask, -torch.inf).unsqueeze(1)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = _FlashWithSinks.apply(*heads_first, sinks, bias, scale)
    return out.transpose(1, 2)


__all__ = [
    "attention_concat",
    "attention_flash",
    "attention_online",
    "attention_rescale",
    "rescale",
    "sink_share",
    "softmax_with_sink",
]
