"""The sliding mask

Generated from book/attention/masks.py; edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# --- Who sees whom? ----------------------------------------------------------

def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """Which keys each query may see: (B, T), (B, S) int -> (B, T, S) bool.

    A key is seen when it is not in the future and, with a window, among the
    last `window` positions, the query's own included. Position -1 marks
    padding or an empty cache slot: it sees nothing and nothing sees it.
    ValueError: window < 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or >= 1, found {window}")
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    seen = (k <= q) & (k >= 0)  # so q >= 0 too
    return seen if window is None else seen & (k > q - window)


# --- How does one read a mask? -----------------------------------------------

def picture(mask: Tensor) -> str:
    """A (T, S) bool mask as text: a row a query, # seen, . not seen."""
    if mask.ndim != 2:
        raise ValueError(
            f"picture: expected a (T, S) mask, found {tuple(mask.shape)}"
        )
    return "\n".join(
        "".join("#" if seen else "." for seen in row) for row in mask.tolist()
    )


# --- Which position has a token among padding? -------------------------------

def positions_from_mask(
    attention_mask: Tensor, start: Tensor | None = None
) -> Tensor:
    """(B, T) mask, true = a token -> (B, T) int64 positions, -1 = padding.

    Tokens are numbered without gaps from start (B,) (default 0), wherever
    the padding stands: left, right or in the middle.
    """
    mask = attention_mask.to(torch.bool)
    numbers = mask.cumsum(-1) - 1
    if start is not None:
        numbers = numbers + start.to(numbers).unsqueeze(-1)
    return numbers.masked_fill(~mask, -1)


# --- How far does a layer see? -----------------------------------------------

class Reach(NamedTuple):
    """Positions, the query's own included, that a layer's output rests on."""

    sliding: int  # by way of the sliding layers alone
    total: int | None  # by way of all layers; None: everything before


def receptive_field(
    layer_types: Sequence[str], window: int
) -> list[Reach]:
    """One Reach for the output of each layer, from the first to the last."""
    reaches, sliding = [], 1
    total: int | None = 1
    for kind in layer_types:
        if kind == "sliding_attention":
            sliding += window - 1
            total = None if total is None else total + window - 1
        elif kind == "full_attention":
            total = None
        else:
            raise ValueError(
                "layer type: expected sliding_attention or full_attention,"
                f" found {kind}"
            )
        reaches.append(Reach(sliding, total))
    return reaches


__all__ = [
    "Reach",
    "picture",
    "positions_from_mask",
    "receptive_field",
    "visible",
]
