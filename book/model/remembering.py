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
# A model writes a text token by token, and for each token it looks back at
# all that was said. What must be kept of the tokens already read, so that
# nothing is computed twice? And what does it take to *forget* some of them,
# when the user changes the last question?
#
# Kept in all 24 layers of the 20b, a conversation of 131,072 tokens takes
# 6.44 GB, and half of that is never looked at again. But what is let go is
# gone: take back 200 tokens, and half the layers no longer know what stood
# before them. Feeding the last 1524 tokens again mends it, exactly.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch

from gptoss.attention.masks import picture, visible
from gptoss.attention.sinks import attention_concat
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import cache_bytes

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
L, longest = small.num_hidden_layers, small.max_position_embeddings
sliding = small.layer_types.count("sliding_attention")
token = 2 * small.num_key_value_heads * small.head_dim * 2  # k and v, bf16
print(f"{token} bytes a token and layer; {L} layers, {longest:,} tokens: "
      f"{L * token * longest / 1e9:.2f} GB")
print(f"the {sliding} sliding layers need "
      f"{sliding * token * small.sliding_window / 1e6:.1f} MB of it; replay: "
      f"{sliding * (small.sliding_window - 1)} tokens")

# %% [markdown]
# ## Picture
#
# Writing 24 tokens. A row is a step, a column a position whose key and value
# the step uses. Dark: computed in this step. Pale: kept from an earlier one
# and read. (The cell also loads the model that ships with the package, for
# the experiments below.)

# %% tags=["hide-input", "picture"]
# Figure: three triangles of steps by positions. Without a cache every cell of
# the triangle is computed again in every step; with one only the diagonal is
# computed and the rest read; in a sliding layer a band of 8 is read and what
# lies left of it never again.
from importlib.resources import files

from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer

pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
model = GptOss.from_pretrained(pocket, dtype=torch.float32)
steps = torch.arange(24)
past = steps[:, None] >= steps
band = past & (steps > steps[:, None] - 8)
diagonal = steps[:, None] == steps
fig, axes = plt.subplots(1, 3, figsize=(7.4, 2.7), sharey=True)
for ax, read, made, title in (
        (axes[0], past, past, "no cache"),
        (axes[1], past, diagonal, "a cache"),
        (axes[2], band, diagonal, "a sliding layer, window 8")):
    shade = torch.where(made, 2.0, torch.where(read, 0.7, torch.nan))
    ax.imshow(shade, cmap="Blues", vmin=0, vmax=2.4)
    ax.set(title=title, xlabel="position", xticks=(0, 8, 16, 23),
           yticks=(0, 8, 16, 23))
    ax.text(23, 1, f"{int(made.sum())} computed", ha="right", va="center")
    ax.text(23, 3.6, f"{int((read & ~made).sum())} read", ha="right",
            va="center")
    ax.grid(False)
axes[0].set_ylabel("step")
plt.show()

# %% [markdown]
# What to see: without a cache the work is a triangle, with one a line. What
# is read is still a triangle, but reading a key is far cheaper than computing
# it. And in a sliding layer most of what was kept is never read again.
#
# ## The naive version
#
# To write a token, run the model on all tokens so far and take the logits of
# the last one. The token with the largest joins them, and so on.

# %%
prompt = reader.encode("Once upon a time there was a little fox named Mira.")


@torch.inference_mode()
def naive(ids, new):
    """ids and `new` more; how many tokens went through the model."""
    ids, work = list(ids), 0
    for _ in range(new):
        tokens, where = torch.tensor([ids]), torch.arange(len(ids))[None]
        logits = model.run(tokens, where)[0, -1]  # (V,)
        work += len(ids)
        ids.append(int(logits.argmax()))
    return ids, work, logits


written, work, last = naive(prompt, 100)
print(reader.decode(written)[:150], "…")
print(f"prompt {len(prompt)}, new 100: {work:,} tokens went through the model")

# %% [markdown]
# In general $n$ new tokens after a prompt of $p$ cost
# $p + (p + 1) + \dots + (p + n - 1) = np + n(n - 1)/2$. That is quadratic in
# $n$: a text of twice the length costs four times the work.
#
# ### Why may we keep anything?
#
# Because attention looks back only. The key and the value of token 5 are made
# from its vector in that layer, which is made from tokens 0 to 5. Whatever
# follows cannot change them. To see it, we need to look at the keys of a
# layer. The model offers one place for that: in every layer it hands its new
# keys and values to an object's `update`, and attends to what it gets back.
# So an object that appends and returns everything is a cache:

# %%
class Growing:
    """A cache that keeps everything: k and v (B, S, G, C) of each layer."""

    def __init__(self):
        self.held = {}

    def update(self, layer, k, v):
        if layer in self.held:
            old_k, old_v = self.held[layer]
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        self.held[layer] = k, v
        return k, v, torch.arange(k.shape[1])[None]  # their positions


def run(cache, ids, first):
    """Logits of tokens `ids` that stand at positions first, first + 1, …"""
    with torch.inference_mode():
        return model.run(torch.tensor([ids]),
                         first + torch.arange(len(ids))[None], cache)[0]


short, whole = Growing(), Growing()
run(short, written[:30], 0)
run(whole, written, 0)
for layer in (0, 3):
    a, b = short.held[layer][0], whole.held[layer][0][:, :30]
    assert (a - b).abs().max() < 1e-3
    print(f"layer {layer}: keys of 30 tokens, alone and in a text of "
          f"{len(written)}: equal within 1e-3, of values up to "
          f"{b.abs().max():.0f}")

# %% [markdown]
# ### The growing cache
#
# So we feed the prompt once, and after it one token a step:

# %%
def cached(ids, new):
    cache, ids, todo, work = Growing(), list(ids), list(ids), 0
    for _ in range(new):
        logits = run(cache, todo, len(ids) - len(todo))[-1]
        work += len(todo)
        todo = [int(logits.argmax())]
        ids += todo
    return ids, work, logits, cache


again, few, logits, growing = cached(prompt, 100)
assert again == written and (logits - last).abs().max() < 1e-3
print(f"the same {len(again)} tokens; {few:,} went through the model instead "
      f"of {work:,}")
print(f"last logits: up to {last.abs().max():.0f}, equal within 1e-3")

# %% [markdown]
# $p + n - 1$ instead of $np + n(n-1)/2$. What grows now is memory: a key and
# a value for each token, in every layer.
#
# ### Half of it is never read
#
# Every second layer slides: a token sees the last W positions and nothing
# before ([masks](../attention/masks.ipynb)). What lies further back may be
# anything. Let us write noise over it and ask for one more token:

# %%
window = model.config.sliding_window
kinds = model.config.layer_types
S = len(again) - 1  # keys held; the last token is still to be fed
print(f"{S} keys a layer, window {window}")
for kind in ("sliding_attention", "full_attention"):
    damaged = Growing()
    for layer, (k, v) in growing.held.items():
        k, v = k.clone(), v.clone()
        if kinds[layer] == kind:
            for held in (k, v):
                held[:, :S - window + 1] = torch.randn_like(
                    held[:, :S - window + 1])
        damaged.held[layer] = k, v
    intact = Growing()
    intact.held = dict(growing.held)
    gap = (run(damaged, again[-1:], S) - run(intact, again[-1:], S)).abs()
    print(f"noise in the old keys of {kind:17}: logits change by "
          f"{gap.max():.1f}")

# %% [markdown]
# So a sliding layer needs W slots, however long the text. It gets a *ring* of
# R slots: position p goes into slot p mod R, over the one that stood there. A
# full layer gets a *full cache*: position p in slot p, and a larger one,
# usually of twice the size, when there is no slot left. Doubling means that a
# token is copied about once on average, however long the text becomes. Read a
# column as the memory after that many tokens; the colour says which position
# a slot holds.

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
fig, (left, right) = plt.subplots(
    1, 2, figsize=(7, 2.9), gridspec_kw={"width_ratios": [1, 1.15]})
for axes, held, title in ((left, ring, f"Ring, R = {R}"),
                          (right, full, "Full cache, doubling from 4")):
    drawn = axes.imshow(held, origin="lower", aspect="auto", vmin=0,
                        vmax=steps, extent=(0.5, steps + 0.5, -0.5,
                                            len(held) - 0.5))
    axes.set(xlabel="tokens taken in", ylabel="slot", title=title)
    axes.grid(False)
capacity = 4 * 2 ** ((time[0] / 4).log2().ceil().clamp(min=0))
right.step(time[0], capacity - 0.5, where="mid", color="#D55E00")
right.text(1, 36, "capacity", color="#D55E00")
right.text(17.2, 26, "reserved", color="0.4", fontsize=8)
fig.colorbar(drawn, ax=right, label="position held")
plt.show()

# %% [markdown]
# What to see: in the ring the colours climb in a sawtooth, each slot being
# overwritten after R tokens; in the full cache a slot keeps its colour for
# ever.
#
# ### Writing first is not always right
#
# Write a chunk of tokens into the ring, then attend to the ring. For one
# token at a time that is right. For a prompt longer than the window it is
# wrong twice over: the early queries' keys are gone, and if the mask is the
# usual triangle, cut to R columns, what stands in their slots comes from the
# future. [litgpt](https://github.com/Lightning-AI/litgpt/issues/2182) did
# exactly this until it refused such prompts. Ten tokens, window 4:

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
# ### How many bytes?
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
# ### When may we write before we read?
#
# Let W = 4 and s = 1, so R = 5. After 20 tokens the ring holds 15 to 19. Two
# more tokens, 20 and 21, overwrite 15 and 16. The query at 20 needs 17, 18
# and 19: still there, so we may write first. Three tokens overwrite 17 as
# well: too many.
#
# In general a ring of $R = W + s$ slots has position p in slot $p \bmod R$.
# After $t$ tokens a chunk brings positions $t, …, t + T - 1$. Writing it
# overwrites positions up to $t + T - 1 - R$; its first query still needs
# $t - W + 1$. So the ring may be written first and then read, in place,
# exactly if
# $t + T - 1 - R < t - W + 1$, that is
#
# $$ T \le s + 1 . $$ (eq-cache-inplace)
#
# One token always fits. A longer chunk must look at a copy: the old ring,
# then the whole chunk, with a mask made of positions; only then is the ring
# overwritten by the chunk's last R tokens.
#
# ### Taking back a few
#
# The same ring, 15 to 19 after 20 tokens. Go back to 18 tokens: the next
# query stands at 18 and needs 15, 16 and 17 (it brings its own key). All
# there. Go back to 17, and it needs 14, which is gone.
#
# In general the ring holds $t - R, …, t - 1$ after $t$ tokens. The query at
# $\ell < t$ needs $\ell - W + 1, …, \ell - 1$. They are all there if the
# oldest held is no later than the oldest needed,
#
# $$ t - R \le \ell - W + 1, \qquad R = W + s, $$ (eq-cache-oldest)
#
# that is, $t - W - s \le \ell - W + 1$; add $W + s - \ell$ on both sides:
#
# $$ t - \ell \le s + 1 . $$ (eq-cache-slack)
#
# The same number twice: with slack s a forward of $s + 1$ tokens, say guesses
# of a smaller model ([drafts are an exercise](cache.ipynb) of the next
# chapter), runs in place, and all can be taken back.
#
# ### Taking back more: the replay
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
fig, axes = plt.subplots(figsize=(7.4, 2.7))
for name, (marker, colour) in styles.items():
    axes.scatter(*zip(*points[name], strict=True), marker=marker, s=60,
                 c=colour)
for row in range(0, 2 * n, 2):
    axes.add_patch(plt.Rectangle((length - W + 0.5, row - 0.4), W - 1, 0.8,
                                 fill=False, ec="black", lw=1.5))
axes.axvline(length - 0.5, color="black", ls="--", lw=1)
axes.set(xlabel="position", yticks=range(2 * n), yticklabels=names,
         xticks=range(6, length + 1, 2), ylim=(-0.6, 2 * n - 0.4),
         xlim=(5.4, 20.4), title="Stored keys after the replay")
axes.grid(False)
axes.text(20.9, 1, "kept in full layers", color="#0072B2", va="center")
axes.text(20.9, 2, "right after the replay", color="#00795A", va="center")
axes.text(20.9, 4, "replayed, wrong: ×", color="#D55E00", va="center")
plt.show()

# %% [markdown]
# What to see: the wrong keys (×) form a staircase from below that ends just
# where the framed keys begin, those that the next query needs.
#
# <div class="live" data-live="rollback">In the web book, two sliders take
# tokens back here, with more or less slack, and show what is fed again.</div>
#
# ## Code
#
# ### What does a row remember of itself?
#
# A batch has rows of unequal length, and padding never enters the cache.
# Every row counts its own positions. All rings hold the same positions, and
# so do all full layers: four small tensors describe the whole cache.
#
# - `lengths`: how many tokens the row has taken in, so its next position.
# - `held`: how many positions the full layers hold. It is the same number,
#   but for one time: in a replay. There the row stands at $r$, below $\ell$,
#   and the full layers still hold all up to $\ell$. Then `held` says which
#   positions must not be written again.
# - `start`: where the last replay began, $r$, and 0 if there was none. From
#   it we know from where on the rings are right: `start` plus the length of a
#   replay, $n(W-1)$.
# - `ring`: which position stands in each slot of the rings, −1 in an empty
#   one.
#
# For example, 20 tokens, W = 4, two sliding layers, so $n(W-1) = 6$. Before:
# lengths 20, held 20, start 0, ring 16 to 19. After a rollback to 15: lengths
# 9, held 15, start 9, ring empty. After the replay of 9 to 14: lengths 15,
# held 15, start 9, ring 11 to 14.
#
# The tensors are never changed, only replaced, so that a failed forward
# leaves them as they were.

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
print("two rows, a ring of four:", rows.lengths.tolist(), rows.ring.tolist())

# %% [markdown]
# ### How does a row go back?
#
# For one row that never was replayed it is four lines, {eq}`eq-cache-slack`
# and {eq}`eq-cache-replay`:

# %%
def back(length, tokens, oldest, window, replay):
    """Where to feed from after going back to `length` of `tokens`."""
    length = min(length, tokens)  # beyond the end: nothing is forgotten
    if length == 0 or oldest <= max(0, length - window + 1):
        return length  # all that the next query needs is in the ring
    return max(0, length - replay)


for length in (25, 19, 18, 15, 3, 0):
    print(f"20 tokens, ring from 16, back to {length}: feed from",
          back(length, 20, 16, window=4, replay=6))

# %% [markdown]
# A batch needs two things more. Rows shorter than `length` stay as they are.
# And a row may be in the middle of a replay, or have been through one, so its
# ring may begin late or hold what is not right yet. A row goes on without a
# (new) replay if both of these hold:
#
# 1. *Its ring reaches back far enough*: to `here - W + 1`, where `here` is
#    where it would stand, or to where its replay began, as it holds nothing
#    before that. If it stands exactly at its start, the ring is still empty,
#    and that is right, too.
# 2. *What it will hold is right*: there was no replay, or the replay will be
#    complete by `held`, that is `start + replay <= held`.
#
# Take W = 4 and 6 for a replay, and go back to 15 or to 13. The long row
# needs a ring that begins at 12, or at 10, and has one that begins at 16; the
# third row's replay began at 8 and makes all right from 8 + 6 = 14 on:
#
# | row | lengths | held | start | ring | back to 15 | back to 13 |
# |---|---|---|---|---|---|---|
# | long | 20 | 20 | 0 | 16 to 19 | 16 > 12: feed from 9 | 16 > 10: from 7 |
# | short | 5 | 5 | 0 | 1 to 4 | shorter, stays at 5 | stays at 5 |
# | in a replay | 11 | 20 | 8 | 8 to 10 | 14 ≤ 15: on at 11 | 14 > 13: from 7 |
#
# A row that must replay gets an empty ring, `lengths` and `start` at where it
# is fed from, and `held` at `length`. From the ring of the others, positions
# at or beyond their new end are struck out. `roll_back` returns new `Rows`
# and which rows replay; the old ones are not touched. The rows of the table:

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
numbers = torch.tensor([[20, 5, 11], [20, 5, 20], [0, 0, 8]])
ring = torch.tensor([[16, 17, 18, 19], [4, 1, 2, 3], [8, 9, 10, -1]])
rows = Rows(*numbers, ring)
for length in (15, 13, 100):
    after, again = roll_back(rows, length, window=4, replay=6)
    print(f"to {length}: replay {[int(x) for x in again]}, feed from "
          f"{after.lengths.tolist()}, held {after.held.tolist()}")

# %% [markdown]
# (A length beyond the end forgets nothing.)
#
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
print(counted, "stacks: the replayed tokens suffice")

# %% [markdown]
# On the trained model: feed a text, empty the sliding layers, feed the last
# $n(W-1)$ tokens again, without writing to the full layers, and compare the
# next logits with those of before. Then with fewer tokens.

# %%
class Replaying(Growing):
    """Full layers keep what they hold; sliding ones begin at `start`."""

    def __init__(self, held, start):
        self.start, self.next = start, {}
        self.held = {layer: pair for layer, pair in held.items()
                     if kinds[layer] == "full_attention"}

    def update(self, layer, k, v):
        first = self.next.get(layer, self.start)
        self.next[layer] = first + k.shape[1]
        if kinds[layer] == "full_attention":  # only what it does not hold
            skip = max(0, self.held[layer][0].shape[1] - first)
            return super().update(layer, k[:, skip:], v[:, skip:])
        k, v, where = super().update(layer, k, v)
        return k, v, where + self.start


text, before = cached(prompt, 290)[0][:300], Growing()
run(before, text[:-1], 0)
held = dict(before.held)  # of 299 tokens
wanted = run(before, text[-1:], 299)[-1]
n = kinds.count("sliding_attention")
for fewer in (0, 60, 120):
    start = 299 - n * (window - 1) + fewer
    got = run(Replaying(held, start), text[start:], start)[-1]
    print(f"{n} sliding layers, {299 - start} tokens fed again: the next "
          f"logits differ by {(got - wanted).abs().max():.3f}")

# %% [markdown]
# **The sentence again.** [The page](../one_page.ipynb) feeds the whole text
# for every new token. We put `cached` in the place of its `generate`; now a
# token goes through the model once, and the story is the same.

# %%
from gptoss.one_page import SENTENCE, sentence

retold = sentence(12, generate=lambda ids, w, settings, new: (
    cached(ids, new)[0]))
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## In the 20b and the 120b
#
# What a conversation takes: with every layer full, and with rings.

# %% tags=["hide-input"]
# Figure: gigabytes over the tokens of a conversation, for the 20b: a line to
# 6.44 if every layer keeps all, one of half the slope with rings, and the
# rings themselves a flat line at the bottom.
fig, ax = plt.subplots(figsize=(7, 2.6))
tokens = torch.arange(0, 131_073, 4096)
full = small.num_hidden_layers * token * tokens / 1e9
ours = torch.tensor([cache_bytes(small, int(t)) for t in tokens]) / 1e9
rings = sliding * token * tokens.clamp(max=128) / 1e9
for line, name, color in ((full, "every layer keeps all", "C5"),
                          (ours, "12 full layers and 12 rings", "C0"),
                          (rings, "the rings alone", "C2")):
    ax.plot(tokens / 1000, line, color=color)
    ax.text(133, line[-1] - 0.1, f"{name}\n{line[-1]:.2g} GB", color=color,
            va="bottom" if name.startswith("the") else "center", fontsize=8)
ax.set(xlabel="thousand tokens", ylabel="GB", xlim=(0, 178), ylim=(-0.2, 7),
       title="Cache of one conversation, 20b", xticks=range(0, 129, 32))
plt.show()

# %%
for name, config in (("20b", small), ("120b", large)):
    layers = config.num_hidden_layers
    half = layers // 2
    print(f"{name:>4}: {layers * token * longest / 1e9:.2f} GB with all, "
          f"{cache_bytes(config, longest) / 1e9:.2f} GB with rings; replay "
          f"{half * 127} tokens")

# %% [markdown]
# ## Takeaways
#
# - The key of a token never changes, as attention looks back only: compute it
#   once, keep it. Work becomes linear, memory grows.
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
# 120b (65.25 GB) in 80 GB? How many with every layer full?

# %% tags=["hide-cell"]
room = 80e9 - 65.25e9
ring_and_full = cache_bytes(large, 8192)
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

# %% [markdown]
# ### Exercise 3
#
# An answer of 1,000 tokens after a prompt of 8,192: how many tokens go
# through the model without a cache, and with one?

# %% tags=["hide-cell"]
p, n = 8192, 1000
print(f"{n * p + n * (n - 1) // 2:,} and {p + n - 1:,}: "
      f"{(n * p + n * (n - 1) / 2) / (p + n - 1):.0f} times as many")

# %% [markdown]
# ### Exercise 4
#
# A program wants to take back up to 32 tokens without any replay. Which slack
# does it need, and how much memory does that cost in the 20b?

# %% tags=["hide-cell"]
slack = 32 - 1
print(f"slack {slack}: {sliding * token * slack / 1e6:.2f} MB more, beside "
      f"{sliding * token * 128 / 1e6:.1f} MB of the rings")

# %% [markdown]
# ## Sources
#
# - {cite}`longformer2020` and {cite}`sparse2019` for windows in alternating
#   layers, {cite}`gqa2023` for G < H, {cite}`gptoss2025` for the model.
# - huggingface/transformers, `cache_utils.py`: `DynamicSlidingWindowLayer`
#   (W - 1 positions, `crop`), transformers#47447, #48280.
# - mistralai/mistral-inference, `cache.py`: a rotating buffer per layer.
# - Lightning-AI/litgpt#2182 and #2215, pytorch/executorch#20346.
