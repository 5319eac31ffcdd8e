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
#     module: rows
#     public: [CacheError]
# ---

# %% [markdown]
# # What must be remembered, and how to forget it again?
#
# ## Question
#
# What must be kept of the tokens already read, and what does it take to
# forget some of them again?
#
# A token leaves 2048 bytes in each layer: 8 key heads and 8 value heads of
# 64 bf16 numbers. Kept in all 24 layers of the 20b, a conversation of
# 131,072 tokens takes 6.44 GB. Half of that is never looked at again: the 12
# sliding layers need 3.1 MB together. But what they let go is gone. Take back
# 200 tokens of a chat and the sliding layers no longer know what stood before
# them; recomputing the whole conversation would mend it, and so do its last
# 1524 tokens, exactly.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import cache_bytes
from gptoss.attention.masks import picture, visible
from gptoss.attention.sinks import attention_concat

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
sliding = small.layer_types.count("sliding_attention")
token = 2 * small.num_key_value_heads * small.head_dim * 2  # k and v, bf16
print(f"{token} bytes a token and layer")
print(f"all in every layer: {small.num_hidden_layers * token * 131_072:,}")
print(f"sliding layers need: {sliding * token * small.sliding_window:,}")
print(f"replay: {sliding * (small.sliding_window - 1)} tokens")

# %% [markdown]
# ## Picture
#
# A *ring* of R slots, for a sliding layer, puts position p into slot p mod R;
# the *full cache* of a full layer puts it into slot p and is replaced by one
# of twice the size when there is no slot left. Read a
# column as the memory after that many tokens; the colour says which position
# a slot holds. In the ring the colours climb in a sawtooth, each slot being
# overwritten after R tokens; in the full cache it keeps its colour for ever,
# and the white area under the line is memory reserved but not yet used.

# %% tags=["hide-input"]
# Figure: the position held by each slot over the tokens taken in. Left, a ring
# of 8 slots: each is overwritten every 8 tokens. Right, a full cache: each
# slot keeps its first position, and the capacity doubles when it is full.
R, steps = 8, 40
time = torch.arange(1, steps + 1)[None, :]
slot = torch.arange(R)[:, None]
ring = time - 1 - (time - 1 - slot) % R  # the latest p < time with p % R = s
ring = ring.float().masked_fill(ring < 0, float("nan"))
slot = torch.arange(64)[:, None]
full = slot.expand(64, steps).float().masked_fill(slot >= time, float("nan"))
figure, (left, right) = plt.subplots(
    1, 2, figsize=(7, 2.9), gridspec_kw={"width_ratios": [1, 1.15]})
for axes, held, title in ((left, ring, f"Ring, R = {R}"),
                          (right, full, "Full cache, doubling from 4")):
    drawn = axes.imshow(held, origin="lower", aspect="auto", vmin=0,
                        vmax=steps, extent=(0.5, steps + 0.5, -0.5,
                                            len(held) - 0.5))
    axes.set(xlabel="tokens taken in", ylabel="slot", title=title)
    axes.grid(False)
capacity = 4 * 2 ** ((time[0] / 4).log2().ceil().clamp(min=0))
right.step(time[0], capacity - 0.5, where="mid", color="#D55E00",
           label="capacity")
right.legend(loc="upper left")
figure.colorbar(drawn, ax=right, label="position held")
plt.show()

# %% [markdown]
# ## The naive version
#
# Write the chunk into the ring, then attend to the ring. For one token at a
# time that is right. For a prompt longer than the window it is wrong twice
# over: the early queries' keys are gone, and if the mask is the usual
# triangle, cut to R columns, what stands in their slots comes from the
# future. litgpt did exactly this until it refused such prompts (litgpt#2182).
# Ten tokens, window 4:

# %%
W, T, H, G, C = 4, 10, 2, 1, 8
q = torch.randn(1, T, H, C)
k, v = torch.randn(2, 1, T, G, C).unbind()
sinks, where = torch.zeros(H), torch.arange(T)[None]
ring_k, ring_v = torch.zeros(2, 1, W, G, C).unbind()
ring_at = torch.zeros(1, W, dtype=torch.int64)
for p in range(T):
    ring_k[:, p % W], ring_v[:, p % W] = k[:, p], v[:, p]
    ring_at[:, p % W] = p

truth = visible(where, where, W)
right = attention_concat(q, k, v, sinks, truth, C ** -0.5)
triangle = torch.ones(T, T).tril().bool()[None, :, :W]
wrong = attention_concat(q, ring_k, ring_v, sinks, triangle, C ** -0.5)
print("query 2 should see", where[0, truth[0, 2]].tolist(), "and sees",
      ring_at[0, triangle[0, 2]].tolist())
honest = attention_concat(q, ring_k, ring_v, sinks,
                          visible(where, ring_at, W), C ** -0.5)
for name, out in (("triangle", wrong), ("by position", honest)):
    bad = (out - right).abs().amax((0, 2, 3)) > 1e-5
    print(f"mask {name:12} wrong at queries {bad.nonzero()[:, 0].tolist()}")

# %% [markdown]
# A mask made of true positions stops the look into the future and nothing
# else: queries 0 to 8 still miss keys. Below, a row a query: left, which of
# the ten keys it may see; right, which of the ring's four slots, now holding
# positions 8, 9, 6 and 7, it may look at. Only query 9 finds all of its keys.

# %%
found = visible(where, ring_at, W)
for full, part in zip(picture(truth[0]).split(), picture(found[0]).split(),
                      strict=True):
    print(full, " ", part)

# %% [markdown]
# ## Derivation
#
# ### Bytes
#
# With $n$ sliding and $m$ full layers, window W, $b$ bytes a number and $t$
# tokens,
#
# $$ \text{bytes} = 2\,G\,C\,b\,\bigl(n\,(W + s) + m\,t\bigr)
#    \quad\text{a row of the batch} $$ (eq-cache-bytes)
#
# where $s \ge 0$ is the *slack*, slots of the ring beyond the window. What
# they buy comes out below. Only the second term grows.
#
# ### Reading before or after writing
#
# A ring of $R = W + s$ slots has position p in slot $p \bmod R$. After $t$
# tokens a chunk brings positions $t, …, t + T - 1$. Writing it overwrites
# positions up to $t + T - 1 - R$; its first query still needs $t - W + 1$. So
# the ring may be written first and then read, in place, exactly if
# $t + T - 1 - R < t - W + 1$, that is
#
# $$ T \le s + 1 . $$ (eq-cache-inplace)
#
# One token always fits. A longer chunk must look at a copy: the old ring,
# then the whole chunk, with a mask made of positions; only then is the ring
# overwritten by the chunk's last R tokens.
#
# ### Taking back
#
# After $t$ tokens the ring holds $t - R, …, t - 1$. Go back to $\ell < t$
# tokens: the next query is at $\ell$ and needs $\ell - W + 1, …, \ell - 1$
# from the ring (it brings its own key). So they are all there if
# $t - W - s \le \ell - W + 1$:
#
# $$ t - \ell \le s + 1 . $$ (eq-cache-slack)
#
# The same number twice: with slack s a forward of $s + 1$ tokens, say guesses
# of a smaller model (see the exercises of [the next chapter](cache.ipynb)),
# runs in place, and all can be taken back.
#
# ### Taking back more: replay
#
# Beyond the slack the rings have lost keys. The full layers have not: their
# keys of positions below $\ell$ are still there and still right.
# Clear the rings and feed positions $r, …, \ell - 1$ again. From where on is
# what the layers compute right?
#
# Number the sliding layers $j = 0, …, n-1$ from below and let layer j's
# input, and so its keys, be right from position $c_j$ on. Its output at p
# mixes values of $p - W + 1, …, p$ and is right from $c_j + W - 1$ on. A full
# layer delays nothing: where its input is right its query is, and the keys
# it looks at are those in its cache. Nor do norms and experts, which see one
# token at a time. Embeddings know nothing of the past, so $c_0 = r$ and
#
# $$ c_{j+1} = c_j + (W - 1) \quad\Rightarrow\quad
#    c_j = r + j\,(W - 1) . $$ (eq-cache-front)
#
# A replayed token must therefore **not** be written to a full layer's cache,
# which already holds its position: where the layer's input is not right yet,
# the new key is wrong and the old one right. The next query, at $\ell$, needs
# all rings right from $\ell - W + 1$ on. The last one, $j = n - 1$, is the
# hardest:
# $r + (n-1)(W-1) \le \ell - W + 1$, or
#
# $$ r = \max\bigl(0,\; \ell - n\,(W - 1)\bigr) . $$ (eq-cache-replay)
#
# From r = 0 everything is computed anew, and right. Otherwise outputs are
# exact from $\ell$ on; those of the replayed tokens, $\ell - 1$ included, are
# not: to draw the token at $\ell$ anew, roll back to $\ell - 1$ and feed the
# token at $\ell - 1$ after the replay. In the picture (n = 3, W = 4,
# $\ell$ = 20, so r = 11) the wrong keys form a staircase from below that ends
# just where the framed keys, those the next query needs, begin.

# %% tags=["hide-input"]
# Figure: six layers by position after the replay of nine tokens. Full layers
# keep all they held. In the sliding layers the wrong keys form a stair, three
# more a layer, and end where the framed keys begin that the next query needs.
W, n, length = 4, 3, 20
start = length - n * (W - 1)
names = [f"{kind} {j}" for j in range(n) for kind in ("sliding", "full")]
styles = {"in a full layer, kept": ("s", "#0072B2"),
          "replayed, wrong": ("x", "#D55E00"),
          "replayed, right": ("s", "#009E73")}
points = {name: [] for name in styles}
for row, name in enumerate(names):
    for p in range(6, length):
        if name.startswith("full"):
            points["in a full layer, kept"].append((p, row))
        elif p >= start:
            ok = p >= start + (row // 2) * (W - 1)
            points[f"replayed, {'right' if ok else 'wrong'}"].append((p, row))
figure, axes = plt.subplots(figsize=(7, 2.6))
for name, (marker, colour) in styles.items():
    axes.scatter(*zip(*points[name], strict=True), marker=marker, s=60,
                 c=colour, label=name)
for row in range(0, 2 * n, 2):
    axes.add_patch(plt.Rectangle((length - W + 0.5, row - 0.4), W - 1, 0.8,
                                 fill=False, ec="black", lw=1.5))
axes.axvline(length - 0.5, color="black", ls="--", lw=1)
axes.set(xlabel="position", yticks=range(2 * n), yticklabels=names,
         xticks=range(6, length + 1, 2), ylim=(-0.6, 2 * n - 0.4),
         xlim=(5.4, 20.4), title="Stored keys after the replay")
axes.grid(False)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Code
#
# ### What a row holds
#
# A batch has rows of unequal length, and padding never enters the cache.
# Every row counts its own positions. All rings hold the same positions, and
# so do all full layers: four small tensors describe the whole cache. They are
# never changed, only replaced, so that a failed forward leaves them as they
# were.

# %% tags=["export"]
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error


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

# %%
rows = Rows.empty(batch=2, size=4)
print(rows.lengths.tolist(), rows.ring.tolist())

# %% [markdown]
# ### Going back
#
# {eq}`eq-cache-slack` and {eq}`eq-cache-replay` for a batch. `held` stays
# above `lengths` while a replay is under way; that is how `plan_chunk` knows
# what not to write to a full layer. Two conditions must hold for a row to go
# on without a replay: its ring reaches back far enough, and what lies in it is
# right. The second can fail when one replay is cut short by the next
# rollback.

# %% tags=["export"]
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

# %%
full = Rows(*torch.tensor([[20], [20], [0]]),
            ring=torch.tensor([[20 - 4 + i for i in range(4)]]))
for length in (19, 18):  # window 4, two sliding layers, no slack
    after, again = roll_back(full, length, window=4, replay=2 * 3)
    print(f"to {length}: replay {again.item()}, feed from "
          f"{after.lengths.item()}, full layers hold {after.held.item()}")

# %% [markdown]
# ## It holds
#
# Which keys are wrong after a replay, counted layer by layer: the front of
# {eq}`eq-cache-front` for every number of sliding layers up to 12 and every
# window up to 9, by letting each layer look at what the one before has right.

# %%
counted = 0
for n in range(1, 13):
    for W in range(2, 10):
        length = n * (W - 1) + W + 5
        start = length - n * (W - 1)
        right = list(range(start, length))  # the embeddings'
        for _ in range(n):  # a query is right if all keys in its window are
            assert set(range(length - W + 1, length)) <= set(right)
            right = [p for p in right
                     if all(q in right for q in range(p - W + 1, p + 1))]
        counted += 1
assert counted == 12 * 8
print(counted, "stacks: the replayed tokens suffice;",
      "one fewer leaves the last layer short of a key")

# %% [markdown]
# ## Takeaways
#
# - Sliding layers need a ring of W slots, full layers a slot for every token.
# - A chunk of at most s + 1 tokens may be written before it is read; a longer
#   one looks at the old ring and at itself. Masks are made of positions.
# - s + 1 tokens can be taken back for nothing, any number for a replay of
#   n (W - 1) tokens, which must not touch what full layers hold.
#
# ## Exercises
#
# ### Exercise 1
#
# How many conversations of 8192 tokens fit beside the packed
# 120b (65.2 GB) in 80 GB? How many with every layer full?

# %% tags=["hide-cell"]
room = 80e9 - 65.25e9
ring_and_full = cache_bytes(large, 8192)
assert int(room // ring_and_full) == 48
assert int(room // (36 * token * 8192)) == 24
print(int(room // ring_and_full), "and", int(room // (36 * token * 8192)))

# %% [markdown]
# ### Exercise 2
#
# Hugging Face's sliding layers hold W - 1 positions, ours W.
# Who is right?

# %% tags=["hide-cell"]
# Both. The query brings its own key. Who reads old keys and new chunk
# together needs W - 1 old ones; who writes first and reads in place needs a
# slot for the new one as well. A ring of W - 1, read in place, is off by one:
positions = torch.arange(20)[None]
ring_of_7 = torch.arange(13, 20)[None]  # what 7 slots hold after token 19
seen = int(visible(positions[:, -1:], ring_of_7, 8).sum())
print("both; but read in place, 7 slots give", seen, "keys of 8")
assert seen == 7

# %% [markdown]
# ## Sources
#
# - {cite}`longformer2020` and {cite}`sparse2019` for windows in alternating
#   layers, {cite}`gqa2023` for G < H, {cite}`gptoss2025` for the model.
# - huggingface/transformers, `cache_utils.py`: `DynamicSlidingWindowLayer`
#   (W - 1 positions, `crop`), transformers#47447, #48280.
# - mistralai/mistral-inference, `cache.py`: a rotating buffer per layer.
# - Lightning-AI/litgpt#2182 and #2215, pytorch/executorch#20346.
