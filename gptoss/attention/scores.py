"""Who looks at whom?

Generated from book/attention/scores.py; edit the chapter, not this file.
"""

import torch
from torch import Tensor

# --- How are the scores of all heads computed at once? -----------------------

def scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, H, T, S), fp32 or wider, -inf where mask is false.

    q (B, T, H, C); k (B, S, G, C), query head h uses key head h // (H / G);
    mask bool (B or 1, T, S), true = visible. The H / G query heads that
    share a key head are stacked along T: the keys are never repeated.
    ValueError: H not a multiple of G, a mask of another shape or dtype.
    """
    check_heads_and_mask(q, k, mask)
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(wide) * scale).view(B, T, G, H // G, C)
    q = q.permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, C)
    a = (q @ k.to(wide).permute(0, 2, 3, 1)).view(B, H, T, S)
    return a.masked_fill_(~mask.unsqueeze(1), -torch.inf)


# --- How are the values mixed? -----------------------------------------------

def mix(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values: (B, H, T, S), (B, S, G, C) -> (B, T, H, C).

    In the dtype of the weights; a value of another dtype is cast to it.
    """
    B, H, T, S = weights.shape
    G, C = v.shape[2:]
    grouped = weights.reshape(B, G, H // G * T, S)
    out = grouped @ v.to(weights.dtype).transpose(1, 2)
    return out.view(B, H, T, C).transpose(1, 2)


# --- What is refused ---------------------------------------------------------

def check_heads_and_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless H is a multiple of G and the mask fits."""
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    if H % G:
        raise ValueError(f"heads: expected H a multiple of G, found {H}, {G}")
    fits = mask.shape in ((1, T, S), (B, T, S))
    if not fits or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool ({B} or 1, {T}, {S}), found "
                         f"{mask.dtype} {tuple(mask.shape)}")


__all__ = [
    "check_heads_and_mask",
    "mix",
    "scores",
]
