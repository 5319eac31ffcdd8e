"""What must be remembered, and how to forget it again?

Generated from book/model/remembering.py; edit the chapter, not this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss.weights.errors import Error

# --- What does a row remember of itself? -------------------------------------

class CacheError(Error, RuntimeError):
    """The cache cannot hold, or was not given, what a forward needs."""


@dataclass(frozen=True)
class Rows:
    """The state of B rows, the same for every layer; int64 tensors."""

    lengths: Tensor  # (B,) tokens taken in; the next has this position
    held: Tensor  # (B,) positions in full layers; in a replay above lengths
    start: Tensor  # (B,) where the last replay began, 0 without one
    ring: Tensor  # (B, W + slack) position in each ring slot, -1 = empty

    @classmethod
    def empty(cls, batch: int, size: int, device=None) -> "Rows":
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        ring = torch.full((batch, size), -1, device=device)
        return cls(zeros, zeros, zeros, ring)


# --- How does a row go back? -------------------------------------------------

def roll_back(rows: Rows, length: int, window: int, replay: int
              ) -> tuple[Rows, Tensor]:
    """Forget positions >= length; also (B,) bool: rows that must replay.

    replay = sliding layers * (window - 1). A row goes on where it stands if
    its ring reaches back far enough and if what lies in it is right, which
    it is `replay` positions after a replay began; otherwise it replays.
    """
    held = rows.held.clamp(max=length)
    here = torch.minimum(rows.lengths, held)
    oldest = rows.ring.where(rows.ring >= 0, torch.iinfo(torch.int64).max)
    reached = oldest.amin(1) <= torch.maximum(rows.start, here - window + 1)
    right = (rows.start == 0) | (rows.start + replay <= held)
    again = ~((reached | (here == rows.start)) & right)
    lengths = here.where(~again, (held - replay).clamp(min=0))
    keep = (rows.ring < lengths[:, None]) & ~again[:, None]
    return Rows(lengths, held, rows.start.where(~again, lengths),
                rows.ring.where(keep, -1)), again


__all__ = [
    "CacheError",
    "Rows",
    "roll_back",
]
