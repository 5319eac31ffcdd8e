"""One memory for all layers

Generated from book/model/cache.py; edit the chapter, not this file.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from gptoss.model.rows import CacheError, Rows, roll_back
from gptoss.weights.config import GptOssConfig

# --- What does a layer ask? --------------------------------------------------

class CacheView(Protocol):
    """A cache as the layers see it in one forward."""

    def update(self, layer: int, k: Tensor, v: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Take in k, v (B, T, G, C) of one layer; return what it may see.

        Returns k (B, S, G, C), v and their positions (B, S), -1 = empty
        slot.
        """
        ...


@dataclass
class Plan:
    """Where one chunk goes: a `CacheView`, made once for all layers."""

    positions: Tensor  # (B, T) of the chunk, -1 = padding
    rows: Rows  # the state afterwards
    before: Tensor | None  # (B, size) ring positions, None = read in place
    sliding: tuple[Tensor, Tensor, Tensor]  # row, column, slot to write
    full: tuple[Tensor, Tensor, Tensor]  # row, column, slot to write
    full_positions: Tensor  # (B, S) position in each slot, or -1
    layers: list["SlidingCache | FullCache"] = field(default_factory=list)
    done: set[int] = field(default_factory=set)  # layers already written
    open: bool = True  # until committed, or given up

    @torch.no_grad()
    def update(self, layer: int, k: Tensor, v: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `CacheView`; padding is never stored."""
        store = self.layers[layer]
        shape = (*self.positions.shape, *store.k.shape[2:])
        if (k.shape, v.shape, k.dtype) != (shape, shape, store.k.dtype):
            raise CacheError(f"layer {layer}: expected k and v {shape} "
                             f"{store.k.dtype}, found {tuple(k.shape)}, "
                             f"{tuple(v.shape)} {k.dtype}")
        if layer in self.done or not self.open:
            raise CacheError(f"layer {layer}: updated twice in one forward, "
                             "or after its end; begin() another")
        self.done.add(layer)
        return store.update(k, v, self)


# --- What is worked out once a forward? --------------------------------------

def _targets(keep: Tensor, slots: Tensor, count: int
             ) -> tuple[Tensor, Tensor, Tensor]:
    """keep, slots (B, T) -> row, column and slot of the count kept."""
    row, column = torch.nonzero_static(keep, size=count).unbind(1)
    return row, column, slots[row, column]


def plan_chunk(rows: Rows, positions: Tensor, slack: int) -> Plan:
    """Plan for positions (B, T); CacheError unless they continue the rows.

    A ring keeps the last of each row; a full layer, what it does not hold
    yet.
    """
    wrong, size = discontinued(rows, positions), rows.ring.shape[1]
    real = positions >= 0
    lengths = rows.lengths + real.sum(1)
    held = torch.maximum(lengths, rows.held)
    kept = real & (positions >= (lengths - size)[:, None])
    new = real & (positions >= rows.held[:, None])
    bad, n_kept, n_new, longest = torch.stack(
        [wrong.sum(), kept.sum(), new.sum(), held.max()]).tolist()
    if bad:
        b = int(wrong.nonzero()[0])
        raise CacheError(f"positions: expected row {b} to continue at "
                         f"{int(rows.lengths[b])} (-1 for padding), found "
                         f"{positions[b].tolist()[:8]}")
    sliding = _targets(kept, positions % size, n_kept)
    after = rows.ring.clone()
    after[sliding[0], sliding[2]] = positions[sliding[0], sliding[1]]
    slots = torch.arange(max(1, longest), device=held.device)
    return Plan(
        positions, Rows(lengths, held, rows.start, after),
        None if positions.shape[1] <= slack + 1 else rows.ring, sliding,
        _targets(new, positions, n_new),
        slots.where(slots < held[:, None], -1))


# --- Does a row continue where it stands? ------------------------------------

def discontinued(rows: Rows, positions: Tensor) -> Tensor:
    """(B,) bool: rows that positions (B, T), -1 = padding, do not continue.

    CacheError if positions are of another batch size or no int64.
    """
    batch = rows.lengths.shape[0]
    if (positions.ndim != 2 or positions.shape[0] != batch
            or positions.dtype != torch.int64):
        raise CacheError(f"positions: expected ({batch}, T) int64, found "
                         f"{tuple(positions.shape)} {positions.dtype}")
    real = positions >= 0
    expected = rows.lengths[:, None] + real.cumsum(1) - 1
    return (positions != expected.where(real, -1)).any(1)


# --- How does a ring take in a chunk? ----------------------------------------

class SlidingCache:
    """Keys and values of one sliding layer, a ring: p in slot p % size."""

    def __init__(self, shape: tuple[int, int, int, int], dtype, device):
        self.k, self.v = _zeros(shape, dtype, device)  # (B, size, G, C)

    def update(self, k: Tensor, v: Tensor, plan: Plan
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the chunk; return what its queries may look at.

        A long chunk looks at a copy, old ring + whole chunk, made before
        the ring forgets; a short one at the ring itself, after writing.
        """
        seen, positions = (self.k, self.v), plan.rows.ring
        if plan.before is not None:
            seen = (torch.cat([self.k, k], 1), torch.cat([self.v, v], 1))
            positions = torch.cat([plan.before, plan.positions], 1)
        _write(self.k, k, plan.sliding)
        _write(self.v, v, plan.sliding)
        return *seen, positions


def _write(to: Tensor, new: Tensor,
           target: tuple[Tensor, Tensor, Tensor]) -> None:
    """Put the tokens of new (B, T, G, C) that a plan keeps into their slots.

    If it keeps all, as for every token of decode, nothing is gathered.
    """
    row, column, slot = target
    kept = new.flatten(0, 1)
    if len(row) < len(kept):
        kept = new[row, column]
    to[row, slot] = kept


@torch.inference_mode(False)
def _zeros(shape, dtype, device) -> tuple[Tensor, Tensor]:
    """Two ordinary tensors, also when asked for under inference_mode.

    (B, S, G, C) to look at; in memory the keys of a head lie together, as
    attention reads them.
    """
    B, S, G, C = shape
    pair = torch.zeros(2, B, G, S, C, dtype=dtype, device=device)
    return pair[0].transpose(1, 2), pair[1].transpose(1, 2)


# --- How does a full layer grow? ---------------------------------------------

class FullCache:
    """Keys and values of one full layer: position p in slot p."""

    def __init__(self, shape: tuple[int, int, int, int], dtype, device):
        self.k, self.v = _zeros(shape, dtype, device)  # (B, capacity, G, C)

    def reserve(self, tokens: int, limit: int) -> None:
        """Have at least `tokens` slots: double, but not beyond limit."""
        k, v = self.k, self.v
        capacity = k.shape[1]
        if tokens > capacity:
            capacity = max(tokens, min(2 * capacity, limit))
            shape = (k.shape[0], capacity, *k.shape[2:])
            new_k, new_v = _zeros(shape, k.dtype, k.device)
            new_k[:, :k.shape[1]], new_v[:, :k.shape[1]] = k, v
            self.k, self.v = new_k, new_v

    def update(self, k: Tensor, v: Tensor, plan: Plan
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the chunk; return views of all that is held."""
        _write(self.k, k, plan.full)
        _write(self.v, v, plan.full)
        used = plan.full_positions.shape[1]
        return self.k[:, :used], self.v[:, :used], plan.full_positions


# --- Who keeps the account? --------------------------------------------------

class Cache:
    """Keys and values of all layers, for a batch of unequal rows.

    max_tokens preallocates the full layers and is a limit; without it they
    grow by doubling. slack: ring slots beyond the window; slack + 1 tokens
    can be taken back without replay. replay: how many tokens a rollback
    feeds again at most; if None, what these layers need, sliding layers *
    (window - 1). Keys and values are detached. Misuse raises CacheError.
    """

    def __init__(self, config: GptOssConfig, batch_size: int = 1,
                 max_tokens: int | None = None,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 slack: int = 0, replay: int | None = None) -> None:
        longest = config.max_position_embeddings
        if max_tokens is not None and not 1 <= max_tokens <= longest:
            raise CacheError(f"max_tokens: expected 1 to {longest} (max_"
                             f"position_embeddings), found {max_tokens}")
        if batch_size < 1 or slack < 0:
            raise CacheError("expected batch_size >= 1 and slack >= 0, found "
                             f"{batch_size} and {slack}")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.window, self.slack = config.sliding_window, slack
        kinds = config.layer_types or ()
        sliding = kinds.count("sliding_attention")
        self.replay = (sliding * (self.window - 1) if replay is None
                       else replay)
        self.limit = ((longest, "max_position_embeddings")
                      if max_tokens is None else (max_tokens, "max_tokens"))
        sizes: dict[str, tuple[type[SlidingCache | FullCache], int]] = {
            "sliding_attention": (SlidingCache, self.window + slack),
            "full_attention": (FullCache, max_tokens or min(256, longest))}
        self.layers: list[SlidingCache | FullCache] = [
            make((batch_size, size, config.num_key_value_heads,
                  config.head_dim), dtype, device)
            for make, size in map(sizes.__getitem__, kinds)]
        self._plan: Plan | None = None  # of a forward under way
        self.reset()

    def __repr__(self) -> str:
        kinds = Counter((type(x).__name__, x.k.shape[1], x.k.dtype)
                        for x in self.layers)
        stores = "".join(
            f"{count} {name} of {slots} slots {str(dtype)[6:]}, "
            for (name, slots, dtype), count in kinds.items())
        return (f"Cache(batch_size={self.batch_size}, {stores}"
                f"{self.nbytes:,} bytes)")

    @property
    def rows(self) -> Rows:
        """The state; whatever changes it puts new `Rows` in its place.

        Who can run a forward by other means sets it. CacheError while a
        forward is under way, or after one that failed.
        """
        if self._plan is not None and self._plan.done:
            raise CacheError("the forward before this one did not reach "
                             "commit(): call rollback() or reset()")
        return self._rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        if self._plan is not None:
            self._plan.open = False
        self._rows, self._plan = rows, None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens taken in by each row, its next position."""
        return self._rows.lengths

    @property
    def length(self) -> int:
        """Tokens taken in by the longest row."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, slots not yet used included."""
        return sum(x.k.nbytes + x.v.nbytes for x in self.layers)

    def reset(self) -> None:
        """Forget everything; keep the memory."""
        self.rows = Rows.empty(self.batch_size, self.window + self.slack,
                               self.layers[0].k.device)

    def reserve(self, tokens: int) -> None:
        """Have at least `tokens` slots in every full layer."""
        most, option = self.limit
        if tokens > most:
            raise CacheError(f"cache too small: {option} is {most}, this "
                             f"forward needs {tokens} tokens")
        for layer in self.layers:
            if isinstance(layer, FullCache):
                layer.reserve(tokens, most)

    def begin(self, positions: Tensor) -> Plan:
        """Plan a forward of positions (B, T) int64, -1 = padding.

        CacheError if it cannot run; nothing is changed then. All that asks
        for numbers is over before the arithmetic begins.
        """
        plan = plan_chunk(self.rows, positions, self.slack)
        self.reserve(plan.full_positions.shape[1])
        self.rows = self._rows  # gives up a plan that nobody used
        plan.layers, self._plan = self.layers, plan
        return plan

    def commit(self, plan: Plan) -> None:
        """End a forward: from now on its tokens belong to the rows."""
        if plan is not self._plan:
            raise CacheError("commit: expected the plan of the forward under "
                             "way, found another")
        if len(plan.done) < len(self.layers):
            raise CacheError(f"commit: expected {len(self.layers)} layers "
                             f"updated, found {len(plan.done)}")
        self.rows = plan.rows

    def rollback(self, length: int) -> int:
        """Forget every position >= length; return where to feed again.

        That is length if the rings reach back far enough, else
        r = max(0, length - sliding layers * (window - 1)): feed tokens
        r … length - 1 once more, ignore their logits, and go on; the
        result is exact. Rows shorter than length stay as they are. With
        several rows, row b is fed from lengths[b] on.
        """
        if length < 0:
            raise CacheError(f"rollback: expected >= 0, found {length}")
        rows = self._rows
        if self._plan is not None and self._plan.done:  # half written rings
            rows = replace(rows, ring=torch.full_like(rows.ring, -1))
        self.rows, again = roll_back(rows, length, self.window, self.replay)
        if again.any():
            return int(self.lengths[again].min())
        return self.length


__all__ = [
    "Cache",
    "CacheView",
    "FullCache",
    "Plan",
    "SlidingCache",
    "discontinued",
    "plan_chunk",
]
