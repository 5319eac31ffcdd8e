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
#     module: cache
#     public: [Cache]
# ---

# %% [markdown]
# # One memory for all layers
#
# ## Question
#
# [What must be remembered](remembering.ipynb) said what a ring and a full
# cache hold, and how far back they go. The 20b has 12 of each, a batch has
# rows of unequal length, and a forward may fail half-way. How do **24 layers**
# keep one account, computed once a forward and asked 24 times?
#
# ## Picture
#
# A batch of two rows takes in three columns. The first row had read 2 tokens
# and brings one more, after two columns of padding; the second had read 5 and
# brings three. Where does each token go?

# %% tags=["hide-input"]
# Figure: left, a chunk of two rows and three columns with positions; two are
# padding. Middle, the ring of four slots of each row after writing: position p
# in slot p mod 4, in the second row three were overwritten. Right, the full
# caches, position p in slot p. New tokens are orange, old ones blue.
import matplotlib.pyplot as plt
import torch

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
chunk, read = ((-1, -1, 2), (5, 6, 7)), (2, 5)
fig, axes = plt.subplots(1, 3, figsize=(7.4, 1.9), width_ratios=(3, 4, 9))
for row, positions in enumerate(chunk):
    length = read[row] + sum(p >= 0 for p in positions)
    ring, full = [-1] * 4, [-1] * 9
    for p in range(length):
        ring[p % 4], full[p] = p, p
    for ax, held in zip(axes, (positions, ring, full), strict=True):
        for x, p in enumerate(held):
            new = p >= read[row]
            color = "#E69F00" if new else "#9AC7E4" if p >= 0 else "white"
            ax.add_patch(plt.Rectangle((x + 0.04, row + 0.1), 0.92, 0.8,
                                       fc=color, ec="0.6"))
            ax.text(x + 0.5, row + 0.5, p if p >= 0 else "–", ha="center",
                    va="center")
for ax, title, size in zip(axes, ("chunk, by column", "ring, by slot",
                                  "full cache, by slot"), (3, 4, 9),
                           strict=True):
    ax.set(xlim=(0, size), ylim=(2, 0), title=title, yticks=(0.5, 1.5))
    ax.set_yticklabels(("row 0", "row 1") if size == 3 else ("", ""))
    ax.set_xticks([x + 0.5 for x in range(size)], range(size))
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
plt.show()

# %% [markdown]
# What to see: the numbers are positions, each row counts its own, and padding
# (–) goes nowhere. New tokens are orange. All twelve rings get the same
# columns into the same slots, and so do all twelve full caches. So it is
# enough to work this out once.
#
# ## The naive version
#
# Every layer counts for itself. It is what a cache in many programs does, and
# it is right, as long as nothing fails. Four layers, and a forward that is
# interrupted (memory, Ctrl-C) after the second:

# %%
counts = [0, 0, 0, 0]


def forward(tokens, fails_after=4):
    for layer in range(4):
        if layer == fails_after:
            return "interrupted"
        counts[layer] += tokens  # the layer writes, and counts
    return "done"


print(forward(5), counts)
print(forward(1, fails_after=2), counts)
print(forward(1), counts)

# %% [markdown]
# After that, token 6 stands at position 6 in two layers and at 5 in two. The
# text goes on, slightly mad. Nobody sees it. So we want: one account; it
# changes at the end of a forward, all at once; and a forward that did not
# reach its end is known.
#
# ## The idea, in twenty lines
#
# For one row and keys alone, without any checks. A forward begins with a
# *plan* (where its tokens stand), each layer updates with it, and `commit`
# moves the account:

# %%
class OneRow:
    """slots[i] slots in layer i; position p in slot p mod slots."""

    def __init__(self, slots, width):
        self.length = 0
        self.keys = [torch.zeros(n, width) for n in slots]

    def begin(self, tokens):
        return torch.arange(self.length, self.length + tokens)  # the plan

    def update(self, layer, k, plan):
        store = self.keys[layer]
        size = len(store)
        old = torch.arange(max(0, self.length - size), self.length)
        seen = torch.cat([store[old % size], k])  # a copy: old, then new
        store[plan[-size:] % size] = k[-size:]
        return seen, torch.cat([old, plan])  # keys and their positions

    def commit(self, plan):
        self.length += len(plan)


one = OneRow(slots=(4, 100), width=1)  # a ring and a full cache
for tokens in (6, 1):
    plan = one.begin(tokens)
    for layer in (0, 1):
        _, where = one.update(layer, plan[:, None].float(), plan)
        print(f"{tokens} tokens, layer {layer} may look at", where.tolist())
    one.commit(plan)
print("the ring holds", one.keys[0].flatten().long().tolist())

# %% [markdown]
# What is missing: rows of unequal length, values, reading in place where it
# is allowed, growth, going back, and refusals. That is the rest of the
# chapter.
#
# ## Code
#
# ### What does a layer ask?
#
# One call, `update`, and whatever has it can stand for a cache ([the recorded
# step](../kernels/step.ipynb) has another). A `Plan` serves one forward: it
# knows which layers were updated, and refuses a second time. `rows` is the
# state afterwards; `before` the rings' positions until then, or None if the
# ring is read in place; `sliding` and `full` say what is written: row, column
# and slot of each token.

# %% tags=["export"]
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from gptoss.model.rows import CacheError, Rows, roll_back
from gptoss.weights.config import GptOssConfig

# %%
from gptoss.attention.masks import positions_from_mask, visible
from gptoss.attention.sinks import attention_concat

small = GptOssConfig.gpt_oss_20b()

# %% tags=["export"]
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

# %% [markdown]
# ### What is worked out once a forward?
#
# For each column of the chunk: is it kept, and in which slot of which row?
# A ring keeps the last of each row, a full layer what it does not hold yet
# (in a replay it holds some already). And what can be seen afterwards, by
# position.
#
# The sizes of what comes out, and whether anything is wrong, must be known to
# the host. On a GPU each such question waits for the device, so there is one,
# for four numbers together (`tolist`): how many rows are wrong, how many
# tokens go into a ring and into a full layer, and how many slots the longest
# row holds afterwards. Nothing after it asks again.

# %% tags=["export"]
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

# %% [markdown]
# ### Does a row continue where it stands?
#
# The positions of a row must be the next ones, in order, with −1 for padding
# anywhere (`positions_from_mask` of [masks](../attention/masks.ipynb) makes
# them). A row that leaves one out would be a silent error.

# %% tags=["export"]
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

# %%
rows = Rows.empty(batch=2, size=4)
mask = torch.tensor([[False, True, True, True], [True, True, True, True]])
chunk = positions_from_mask(mask, rows.lengths)
wrong = discontinued(rows, chunk + torch.tensor([[0], [1]]))
print(chunk.tolist(), "wrong if row 1 began at 1: row",
      wrong.nonzero().item())

# %% [markdown]
# Two rows of 3 and 4 tokens, then 3 more for the second: the first row, all
# padding, keeps its ring; the second overwrites three of its slots.

# %%
plan = plan_chunk(rows, chunk, slack=0)
rows = plan.rows
print("rings:", rows.ring.tolist(), "lengths:", rows.lengths.tolist())
mask = torch.tensor([[False] * 3, [True] * 3])
chunk = positions_from_mask(mask, rows.lengths)
plan = plan_chunk(rows, chunk, slack=0)
print("rings:", plan.rows.ring.tolist())
print("full layers:", plan.full_positions.tolist())

# %% [markdown]
# ### How does a ring take in a chunk?
#
# A short chunk (at most slack + 1 tokens) is written and then read in place,
# without a copy; a longer one looks at a copy, made before the ring forgets.

# %% tags=["export"]
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

# %%
ring = SlidingCache((2, 4, 1, 1), torch.float32, None)
values = 10 * plan.positions[..., None, None].float()
seen, _, positions = ring.update(values, values, plan)
print("looks at positions", positions[1].tolist())
print("ring afterwards   ", ring.k[1].flatten().tolist())

# %% [markdown]
# ### How does a full layer grow?
#
# When a chunk needs more slots than there are, to twice as many, or to what
# the chunk needs if that is more, and never beyond the limit. A layer returns
# views of what is held, no copies. Slots are reserved before the first layer
# writes, so a cache that is too small is found early.

# %% tags=["export"]
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

# %%
full = FullCache((2, 4, 1, 1), torch.float32, None)
full.reserve(7, limit=100)
seen, _, positions = full.update(values, values, plan)
print("slots:", full.k.shape[1], " returned:", seen.shape[1], " a view:",
      seen.data_ptr() == full.k.data_ptr())

# %% [markdown]
# ### Who keeps the account?
#
# A forward calls `begin` and gets a plan, hands it to each layer, and ends
# with `commit`. The rows change in `commit` only. A forward that dies half-way
# leaves some rings overwritten; the plan that is still open gives it away,
# and `rollback` knows that these rings cannot be trusted: it replays. One that
# dies before its first layer has written leaves no trace.
#
# `rollback(length)` returns where to feed again. With one row that is its
# length afterwards. With several it is the least length among the rows that
# must replay, or, if none must, the length of the longest row; row b is fed
# from `lengths[b]` on. `reset` forgets everything and keeps the memory.
#
# Without `max_tokens` the full layers start with 256 slots (or as many as the
# model has positions) and grow. Keys and values are stored without gradient,
# and a cache that was made or grown under `inference_mode` works outside. On
# the meta device it has its shapes, and so its bytes, and takes none.
#
# What one can ask: `layers`, a list of `SlidingCache` and `FullCache` with
# their `k` and `v` of (B, slots, G, C), views of (B, G, slots, C): the keys of
# a head lie together in memory, as attention reads them; `lengths` (B,) and
# `length`, that of the longest row; `nbytes`; `replay`, how many tokens a
# rollback feeds again at most; `rows`, which is refused while a forward is
# half written (`_rows` holds them all the same); and a `repr` that says how
# many layers of which kind, slots and dtype there are.

# %% tags=["export"]
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

# %%
tiny = GptOssConfig(
    num_hidden_layers=4, num_local_experts=2, num_experts_per_tok=1,
    vocab_size=64, hidden_size=16, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
cache = Cache(tiny, batch_size=3, max_tokens=100, slack=2)
print(cache)
assert cache.nbytes == 3 * 2 * 2 * 8 * 2 * (2 * (8 + 2) + 2 * 100)

# %% [markdown]
# Taking back three tokens of forty costs nothing with a slack of two; ten
# more cost a replay of the fourteen before them:

# %%
cache = Cache(tiny, slack=2)
k = torch.zeros(1, 40, 2, 8, dtype=torch.bfloat16)
plan = cache.begin(torch.arange(40)[None])
for i in range(4):
    plan.update(i, k, k)
cache.commit(plan)
print("back to 37, feed from", cache.rollback(37))
print("back to 30, feed from", cache.rollback(30), "= 30 - 2 * 7")

# %% [markdown]
# ### What is refused?
#
# Everything is a `CacheError`, and is found before anything is written. Who
# reads it was in the middle of something else, so it says where (the option,
# the row, the layer, the call), what was expected, and what was found. A
# closed plan refuses as one used twice does. Too small is the option that set
# the limit: without `max_tokens` that is `max_position_embeddings`. The words:

# %%
def refuse(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except CacheError as error:
        print(f"- {error}")


refuse(Cache, tiny, max_tokens=0)
refuse(Cache, tiny, slack=-1)
cache = Cache(tiny, batch_size=2, max_tokens=10)
refuse(cache.begin, torch.tensor([[0]]))
refuse(cache.begin, torch.tensor([[0, 1], [0, 2]]))
refuse(cache.begin, torch.arange(11).expand(2, 11))
plan = cache.begin(torch.tensor([[0], [0]]))
k = torch.zeros(2, 1, 2, 8, dtype=torch.bfloat16)
refuse(plan.update, 0, k.float(), k.float())
plan.update(0, k, k)
refuse(plan.update, 0, k, k)
refuse(cache.commit, plan)
refuse(cache.commit, plan_chunk(cache._rows, torch.tensor([[0], [0]]), 0))
refuse(cache.begin, torch.tensor([[0], [0]]))  # layer 0 was written
refuse(cache.rollback, -1)
print("rollback to 5 of 0 tokens: feed from", cache.rollback(5))
refuse(plan.update, 1, k, k)  # the plan was given up

# %% [markdown]
# ## It holds
#
# A stack of attention layers with sinks and nothing else, alternating like
# gpt-oss, in float64, with random weights. Without a cache it is the truth;
# with one it must say the same, however the tokens are cut up.

# %%
class Stack:
    """Embedding, place and attention layers: tokens (B, T) -> (B, T, D)."""

    def __init__(self, config):
        g = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)
        D, H, G, C = 16, 4, 2, 8
        self.config, self.heads = config, (H, G, G)
        self.embed, self.place = draw(64, D), draw(1024, D)
        self.layers = [(draw(D, (H + 2 * G) * C) / 2, draw(H * C, D) / 4,
                        draw(H)) for _ in config.layer_types]

    def new_cache(self, batch=1, **options):
        return Cache(self.config, batch, dtype=torch.float64, **options)

    def __call__(self, tokens, cache=None, mask=None):
        mask = torch.ones_like(tokens) > 0 if mask is None else mask
        positions = positions_from_mask(mask, cache and cache.lengths)
        plan = cache and cache.begin(positions)
        x = self.embed[tokens] + self.place[positions]
        for i, (into, out, sinks) in enumerate(self.layers):
            normed = 4 * x / x.norm(dim=-1, keepdim=True)
            qkv = (normed @ into).unflatten(-1, (sum(self.heads), 8))
            q, k, v = qkv.split(self.heads, dim=2)
            where = positions
            if plan is not None:
                k, v, where = plan.update(i, k, v)
            slides = self.config.layer_types[i] == "sliding_attention"
            seen = visible(positions, where,
                           self.config.sliding_window if slides else None)
            x = x + attention_concat(q, k, v, sinks, seen,
                                     8 ** -0.5).flatten(2) @ out
        if cache is not None:
            cache.commit(plan)
        return x


net = Stack(tiny)  # four layers, window 8
tokens = torch.randint(64, (1, 80))
whole = net(tokens)


def same(a, b):
    return bool((a - b).abs().max() < 1e-10)

# %% [markdown]
# Every split of 80 tokens into a prefill and up to 12 single tokens after it
# (the tests do 300 tokens and windows of 16 and 128), and chunks of 1 to 34
# tokens with three slacks.

# %%
for split in range(81):
    cache = net.new_cache()
    parts = [net(tokens[:, :split], cache)] if split else []
    for i in range(split, min(split + 12, 80)):
        parts.append(net(tokens[:, i:i + 1], cache))
    assert same(torch.cat(parts, 1), whole[:, :split + 12])
for slack in (0, 3, 20):
    for size in (1, 2, 3, 5, 8, 13, 21, 34):
        cache = net.new_cache(slack=slack)
        parts = [net(part, cache) for part in tokens.split(size, 1)]
        assert same(torch.cat(parts, 1), whole)
print("81 splits and 24 chunkings agree")

# %% [markdown]
# Three rows in one batch, each with another share of padding at random
# places, answer as if each were alone.

# %%
batch = torch.randint(64, (3, 80))
rows_fed, cache = [[], [], []], net.new_cache(3)
outputs = [[], [], []]
for width in (1, 17, 30, 1, 1, 9, 2):
    mask = torch.rand(3, width) < torch.tensor([[0.3], [0.7], [1.0]])
    chunk = torch.randint(64, (3, width))
    out = net(chunk, cache, mask)
    for b in range(3):
        rows_fed[b] += chunk[b, mask[b]].tolist()
        outputs[b].append(out[b, mask[b]])
for fed, parts in zip(rows_fed, outputs, strict=True):
    assert same(torch.cat(parts), net(torch.tensor([fed]))[0])
print("lengths", cache.lengths.tolist(), "agree")

# %% [markdown]
# Rollback with replay, to every length, with other tokens afterwards: equal
# to a fresh cache. And {eq}`eq-cache-replay` is tight: a replay that starts
# one token later is wrong.

# %%
n, W = 2, 8
other = torch.randint(64, (1, 10))
late = 0.0
for length in range(1, 79):
    expected = net(torch.cat([tokens[:, :length], other], 1))[:, length:]
    for delay in (0, 1) if length % 10 == 0 else (0,):
        cache = net.new_cache()
        net(tokens, cache)
        start = cache.rollback(length)
        assert start == max(0, length - n * (W - 1))
        if delay and start:
            cache.rows = replace(cache.rows,
                                 lengths=cache.rows.lengths + 1)
        if cache.length < length:
            net(tokens[:, cache.length:length], cache)
        got = net(other, cache)
        if delay:
            late = max(late, float((got - expected).abs().max()))
        else:
            assert same(got, expected)
assert late > 1e-3
print(f"78 replays exact to 1e-10; one token late: wrong by {late:.1f}")

# %% [markdown]
# ## Against the others
#
# Hugging Face's `DynamicCache` keeps W - 1 positions of a sliding layer and
# always concatenates. Feed both the same chunks: whatever a query may see
# must be the same keys in the same order.

# %%
from transformers import DynamicCache
from transformers import GptOssConfig as HFConfig

hf = DynamicCache(config=HFConfig(
    num_hidden_layers=4, sliding_window=8, num_key_value_heads=2,
    head_dim=8, layer_types=list(tiny.layer_types)))
ours, first = Cache(tiny, dtype=torch.float32), 0
for T in (5, 1, 1, 20, 1, 9):
    positions = torch.arange(first, first + T)[None]
    k = torch.randn(1, T, 2, 8)
    plan = ours.begin(positions)
    for i, kind in enumerate(tiny.layer_types):
        a, _, at = plan.update(i, k, k)
        b, _ = hf.update(k.transpose(1, 2), k.transpose(1, 2), i)
        b = b.transpose(1, 2)  # (B, G, S, C) to (B, S, G, C)
        b_at = torch.arange(first + T - b.shape[1], first + T)[None]
        window = 8 if kind == "sliding_attention" else None
        for t in range(T):
            p = positions[:, t:t + 1]
            mine = a[0][visible(p, at, window)[0, 0]]
            at_mine = at[0][visible(p, at, window)[0, 0]]
            theirs = b[0][visible(p, b_at, window)[0, 0]]
            assert torch.equal(mine[at_mine.argsort()], theirs)
    ours.commit(plan)
    first += T
print(f"{first} tokens, 4 layers: the same keys")

# %% [markdown]
# Going back is where they part. transformers can take back what it was fed
# since recording was switched on (`activate_past_recording`, added in
# [transformers#47447](https://github.com/huggingface/transformers/pull/47447))
# or since the last `crop`, and no more.

# %%
try:
    hf.crop(-20)
except RuntimeError as error:
    print("transformers:", str(error).split(", ")[1])
print("ours: feed again from", ours.rollback(first - 20))

# %% [markdown]
# OpenAI's torch code has no cache. Known elsewhere: chunks longer than the
# ring can serve, whose first queries lose the keys before the chunk
# ([executorch#20346](https://github.com/pytorch/executorch/issues/20346): a
# ring of 2W slots, so {eq}`eq-cache-inplace` with s = W, and chunks of 2W).

# %% [markdown]
# ## Takeaways
#
# - Which token goes into which slot is computed and checked once a forward;
#   a layer makes one call.
# - The account changes in `commit` alone. What was interrupted half-way is
#   known by the plan that is still open.
# - A cache on the meta device has its bytes without taking any.
#
# ## Exercises
#
# ### Exercise 1
#
# A small model proposes 5 tokens, the large one verifies them
# in one forward, together with the token before them. What slack lets it run
# in place and take back any number of the 5? Show both.

# %% tags=["hide-cell"]
for slack in (4, 5):
    cache = net.new_cache(slack=slack)
    net(tokens[:, :60], cache)
    memory = cache.layers[0].k.data_ptr()
    k = torch.zeros(1, 6, 2, 8, dtype=torch.float64)
    plan = cache.begin(torch.arange(60, 66)[None])
    seen, _, _ = plan.update(0, k, k)
    print(f"slack {slack}: in place {seen.data_ptr() == memory}")
starts = []
for back in range(6):
    cache = net.new_cache(slack=5)
    net(tokens[:, :60], cache)
    net(tokens[:, 60:66], cache)
    starts.append(cache.rollback(66 - back))
print("slack 5: 0 to 5 taken back, feed from", starts)

# %% [markdown]
# ### Exercise 2
#
# Let the replay overwrite the full layers (set `held` to where the
# replay starts). Is the next output still right?

# %% tags=["hide-cell"]
errors = []
for overwrite in (False, True):
    cache = net.new_cache()
    net(tokens, cache)
    start = cache.rollback(60)
    if overwrite:
        cache.rows = replace(cache.rows, held=cache.rows.lengths)
    net(tokens[:, start:60], cache)
    got = net(tokens[:, 60:], cache)
    errors.append(float((got - whole[:, 60:]).abs().max()))
assert errors[0] < 1e-10
print(f"no: right to 1e-10 without, wrong by {errors[1]:.1f} with it: the "
      "full layers look at wrong keys")

# %% [markdown]
# ### Exercise 3
#
# Two answers to one prompt: fork a cache after the prompt and
# continue both copies. Then say what it costs in the 20b after 8192 tokens,
# and which part of it could be shared.

# %% tags=["hide-cell"]
from copy import deepcopy

cache = net.new_cache()
net(tokens[:, :50], cache)
fork = deepcopy(cache)
a, b = net(tokens[:, 50:60], cache), net(other, fork)
assert same(a, whole[:, 50:60])
assert same(b, net(torch.cat([tokens[:, :50], other], 1))[:, 50:])
cost = Cache(small, max_tokens=8192, device="meta").nbytes
rings = 12 * 2048 * 128
print(f"{cost / 1e6:.0f} MB; of the full layers' {(cost - rings) / 1e6:.0f} "
      f"MB all could be shared, only read from then on; the rings "
      f"({rings / 1e6:.1f} MB) are overwritten and could not")

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`; {cite}`longformer2020`, {cite}`sparse2019`: windows.
# - huggingface/transformers, `cache_utils.py`: `DynamicSlidingWindowLayer`
#   (W - 1 positions, `crop`).
# - mistralai/mistral-inference, `cache.py`: a rotating buffer per layer.
