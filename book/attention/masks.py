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
#     module: masks
#     public: [visible]
# ---

# %% [markdown]
# # The sliding mask

# %% [markdown]
# ## Question
#
# Every second layer of gpt-oss looks back at 128 tokens and no further,
# in a model that reads 131,072. At that length a sliding layer needs 512
# times fewer scores than a full one. How can half the layers be so
# short-sighted? And is it 127, 128 or 129 tokens? Released software has got
# that number wrong in two places, in the mask itself and in the option that
# sets it, and we shall see why nobody noticed.
#
# ## Picture
#
# A **mask** says, for each query (row), which keys (columns) it may see. The
# model that ships with the package is built like gpt-oss, with four layers
# and a window of 64. It reads a story of some 170 tokens. What is tinted may
# be seen; the dark marks are what one head of the layer takes.

# %% tags=["hide-input", "picture"]
# Figure: two square maps of a story. Left, a sliding layer: a band along the
# diagonal is tinted, and all marks lie in it. Right, a full layer: the whole
# triangle is tinted, with dark marks far from the diagonal, many of them more
# than the window away.
from importlib.resources import files
from itertools import islice

import matplotlib.pyplot as plt
import torch

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss
from gptoss.parity.walk import trace_ours
from gptoss.training.stories import story_stream

plt.style.use("../_static/book.mplstyle")
_ = torch.manual_seed(0)

pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
model = GptOss.from_pretrained(pocket, dtype=torch.float32)
told = [reader.encode(story) for story in islice(story_stream(5, True), 12)]
tokens = torch.tensor([ids[:min(map(len, told))] for ids in told])
trace = trace_ours(model, tokens[:1])
n, window = tokens.shape[1], model.config.sliding_window
order = torch.arange(n)
distance = order[:, None] - order
seen = {2: (distance >= 0) & (distance < window), 3: distance >= 0}
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.7), sharey=True)
for ax, (layer, mask) in zip(axes, seen.items(), strict=True):
    weights = trace[layer, "weights"].transpose(0, 1)  # (H, T, S)
    weights = max(weights, key=lambda w: w[distance > window // 2].sum())
    ax.imshow(torch.where(mask, 0.12 + weights, 0), cmap="Blues", vmax=0.9,
              vmin=0)
    ax.set(title=f"layer {layer}, {model.config.layer_types[layer][:-10]}",
           xlabel="key", xticks=(0, 64, 128), yticks=(0, 64, 128))
    ax.grid(False)
axes[0].set_ylabel("query")
axes[0].annotate("", (n - 1 - window, n - 4), (n - 1, n - 4),
                 arrowprops={"arrowstyle": "<->", "color": "C1"})
axes[0].text(n - 0.5 * window, n - 9, "window", color="C1", ha="center",
             bbox={"fc": "white", "ec": "none", "pad": 1})
axes[1].text(95, 22, "not visible:\nthe future", ha="left", fontsize=8)
axes[0].text(8, 150, "not visible:\ntoo long ago", ha="left", fontsize=8)
plt.show()


@torch.no_grad()
def losses(sliding, full=0):
    """Nats of each next token, (stories, n - 1), with these windows; 0: none
    (used below)."""
    for block in model.layers:
        own = block.self_attn
        kind = model.config.layer_types[own.layer]
        own.window = full if kind == "full_attention" else sliding
    log_p = model(tokens).log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, tokens[:, 1:, None])[..., 0]


windows = (16, 32, 48, 63, 64, 65, 80, 96, 128, 0)
nats = {w: losses(w) for w in windows}
nats["short"] = losses(window, full=window)
far = weights[distance >= window].sum() / weights.sum()
print(f"the head on the right takes {100 * far:.0f} % from further away "
      f"than {window} tokens")

# %% [markdown]
# What to see: the full layer's triangle grows with the text, and this head
# reaches across all of it, to where the story told what it now speaks of. The
# sliding layer's band keeps its width. No head of that layer, whatever it
# has learnt, can take anything from beyond.
#
# Any row of the band holds as many keys as the window is wide, except at the
# beginning of the text, where there are not yet so many.
#
# <div class="live" data-live="masks">In the web book, the edge of the window
# can be dragged here.</div>
#
# ## The naive version
#
# "A window of 128" reads like "not more than 128 back":

# %%
def naive(length, window):
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    return (k <= q) & (k >= q - window)


print("keys seen by a late query:", naive(300, 128)[-1].sum().item())

# %% [markdown]
# 129: the query's own key and 128 before it. gpt-oss counts the query
# itself, so this is one too many. Texts of up to 128 tokens come out the
# same, so short tests pass. Do long ones find it? Our model has a window of
# 64. The cell of the picture has read twelve stories with other windows in
# the sliding layers, and noted the loss (nats per token, from token 65 on):

# %%
loss = {w: x[:, 65:].mean().item() for w, x in nats.items()}
for w in (63, 64, 65):
    print(f"window {w}: loss {loss[w]:.2f}")
change = (nats[65] - nats[64]).abs()
assert abs(loss[63] / loss[64] - 1) < 0.02 > abs(loss[65] / loss[64] - 1)
moved = (change[:, 64:] > 0.001).double().mean()
print("64 against 65: up to token 64 no loss changes by more than",
      f"{change[:, :64].max():.3f}, of the later ones {100 * moved:.0f} % do",
      "by 0.001")

# %% [markdown]
# No loss, no benchmark and no reader will find that. Yet single
# probabilities are wrong, in every long text, and whoever trains on them
# (reinforcement learning does) trains on numbers of another model. This has
# to be found by looking at the mask.
#
# The naive mask fails in a second way. It numbers columns, and in a batch of
# unequal prompts a column is not a position:

# %%
batch = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
rows = naive(6, 3).expand(2, 6, 6)
print("keys seen by the last query:", rows[:, -1].sum(-1).tolist())
print("of those, padding:", (rows[:, -1] & ~batch).sum(-1).tolist())

# %% [markdown]
# The first prompt's last token attends to a padding slot. In a cache,
# whose slots need not even be in order, the columns mean nothing.
#
# ## Derivation
#
# Let everything be said in **positions**. A query at position $q$ sees
# the keys
#
# $$
# \mathcal V(q) = \{\,k : 0 \le k \le q,\; k > q - W\,\},
# \qquad |\mathcal V(q)| = \min(q + 1,\, W).
# $$ (masks-visible)
#
# The three conditions read: it exists, it is not in the future, it is
# among the last $W$. A full layer drops the last condition. Count the
# integers from $q-W+1$ to $q$: there are $W$, the query's own included.
#
# **Padding.** Give padding, and an empty slot of a cache, the position
# $-1$. As a key it fails $0 \le k$. As a query it needs $0 \le k \le -1$
# and sees nothing. So {eq}`masks-visible` handles both with no further
# case, and nothing depends on the order of the columns.
#
# **The same window in other words.** FlashAttention and its relatives
# take inclusive bounds `(left, right)` around the query:
#
# | convention | gpt-oss | keys seen |
# |---|---|---|
# | `k > q - W` | $W = 128$ | 128 |
# | `k >= q - W` | would need $W = 127$ | 128 |
# | `window_size=(left, 0)`, inclusive | $(127, 0)$ | 128 |
#
# **How far it sees.** Let the output of sliding layer $\ell$ at position
# $t$ rest on the $R_\ell$ positions $t - R_\ell + 1 \dots t$; the embedding
# has $R_0 = 1$. The layer combines outputs at $t - W + 1 \dots t$, and the
# oldest of these rests on positions from $(t - W + 1) - R_{\ell-1} + 1$ on:
#
# $$
# R_\ell = R_{\ell-1} + (W - 1)
# \quad\Rightarrow\quad
# R_{L_{sliding}} = 1 + L_{sliding}\,(W - 1) .
# $$ (masks-reach)
#
# One full layer makes it everything. In gpt-oss that is layer 1, the second.

# %% tags=["hide-input"]
# Figure: what the last of 24 tokens rests on after 0 to 4 layers, a row a
# layer. Left, four sliding layers of window 6: a stair of steps of five.
# Right, sliding and full in turns: after the first full layer, everything.
length, w = 24, 6
at = torch.arange(length)
band = (at[:, None] >= at) & (at > at[:, None] - w)
triangle = at[:, None] >= at
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.0), sharey=True)
for ax, layers, title in zip(axes, (
        [band] * 4, [band, triangle] * 2), (
        "four sliding layers", "sliding and full in turns"), strict=True):
    rows = [at == length - 1]
    for i in range(1, 5):  # the last layer's query first
        reached = at == length - 1
        for mask in reversed(layers[:i]):
            reached = mask[reached].any(0)
        rows.append(reached)
    ax.pcolormesh(torch.stack(rows), cmap="Blues", vmin=0, vmax=1.3,
                  edgecolors="white", linewidth=1)
    for y, row in enumerate(rows):
        ax.text(length + 0.4, y + 0.5, str(row.sum().item()), va="center",
                fontsize=8)
    ax.set(xlabel="position", title=title, xticks=(0.5, 12.5, 23.5))
    ax.set_xticklabels(("0", "12", "23"))
    ax.grid(False)
    ax.spines[:].set_visible(False)
axes[0].set_yticks([y + 0.5 for y in range(5)],
                   ["the token itself", *(f"after layer {n}" for n in
                                          range(4))])
plt.show()

# %% [markdown]
# What to see: each row is what the output for the last token can rest on,
# with the number of positions beside it. Sliding layers alone move the
# horizon back by 5 a layer, {eq}`masks-reach` with $W = 6$; one full layer
# lifts it.
#
# **Are short-sighted layers a loss?** The model of the picture can tell. We
# change the windows of its sliding layers, then cut the full layers down to
# 64 as well. (It was trained with 64 and full; nothing is trained anew.)

# %%
for w, name in ((16, "16"), (32, "32, half"), (64, "64, as trained"),
                (96, "96"), (128, "128, twice"), (0, "none: all full")):
    print(f"sliding layers {name:15} loss {loss[w]:.2f}")
print(f"full layers cut to 64 too      loss {loss['short']:.2f}")
assert loss[64] < loss[32] < loss[16] and loss[64] < loss[128]
assert loss["short"] > 1.3 * loss[64]

# %% tags=["hide-input"]
# Figure: loss over the window of the sliding layers. It falls to a flat
# bottom from 48 to 80 and rises again for wider windows; a point far above
# marks the model with no full layer.
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.plot(windows[:-1], [loss[w] for w in windows[:-1]], "o-", ms=4)
ax.plot(64, loss["short"], "D", color="C5")
ax.text(66, loss["short"], "full layers cut to 64, too", color="C5",
        va="center")
ax.text(64, loss[64] - 0.006, "as trained", ha="center", va="top")
ax.set(xlabel="window of the sliding layers", ylabel="loss",
       xticks=(16, 32, 48, 64, 80, 96, 128))
ax.margins(y=0.15)
ax.set_title("What the window does to the loss")
plt.show()

# %% [markdown]
# What to see: half the window costs a little, and the full layers are what
# this model cannot do without: they alone fetch what lies further back. A
# *wider* window is worse again. The sliding layers have never met keys at
# such distances, and more keys share the same softmax. So a window is no
# limit to be lifted by hand; it is part of what was trained, and the number
# in the configuration is the right one.
#
# Nor does what sliding layers remember depend on more than {eq}`masks-reach`
# says: [a replay](../model/remembering.ipynb) refills their lost caches from
# the last $L_{sliding}(W-1)$ tokens.
#
# ## Code
#
# ### Who sees whom?
#
# Equation {eq}`masks-visible`, once, for every use in the book. A window of
# None is a full layer; one below 1 is refused with a ValueError (`window:
# expected None or >= 1, found 0`). One row of queries or keys serves a batch
# of the other.

# %% tags=["export"]
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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

# %%
order = torch.arange(300)[None]
seen = visible(order, order, 128)[0].sum(-1)
print("keys seen by queries 0, 126, 127, 128, 299:",
      [seen[i].item() for i in (0, 126, 127, 128, 299)])
ring = torch.tensor([[8, 9, -1, 6, 7]])  # slots of a cache, one empty
print(visible(torch.tensor([[9, -1]]), ring, 3).int().tolist())

# %% [markdown]
# The ring of five slots holds positions 6 to 9 in no particular order; the
# query at 9 finds 7, 8 and 9, and the padding query finds nothing.
#
# ### How does one read a mask?
#
# Tests that compare a mask with a drawing are hard to get wrong. `picture`
# draws a line for each query, `#` for a key that is seen and `.` for one that
# is not. It draws one mask, not a batch of them: `picture: expected a (T, S)
# mask, found (1, 3, 3)`.

# %% tags=["export"]
def picture(mask: Tensor) -> str:
    """A (T, S) bool mask as text: a row a query, # seen, . not seen."""
    if mask.ndim != 2:
        raise ValueError(
            f"picture: expected a (T, S) mask, found {tuple(mask.shape)}"
        )
    return "\n".join(
        "".join("#" if seen else "." for seen in row) for row in mask.tolist()
    )

# %%
eight = torch.arange(8)[None]
drawn = [picture(visible(eight, eight, w)[0]) for w in (3, 4, 5)]
print("window 3   window 4   window 5")
for lines in zip(*(d.splitlines() for d in drawn), strict=True):
    print("   ".join(lines))
assert drawn[1].splitlines()[-1] == "....####"

# %% [markdown]
# These are the small twins of 127, 128 and 129: in the last row three, four
# and five marks, the last of them on the diagonal. The real ones are too wide
# for the page, but their last row is quickly told:

# %%
for w in (127, 128, 129):
    keys = visible(order, order, w)[0, 299].nonzero().flatten()
    print(f"window {w}: query 299 sees keys {keys[0]} to {keys[-1]},",
          len(keys), "of them")

# %% [markdown]
# ### Which position has a token among padding?
#
# Users pad left, right, or in the middle (two pieces of a conversation,
# each padded). Tokens are numbered as if the padding were not there, from 0
# or from where an earlier chunk ended. The mask may be of any type; what is
# not zero is a token.

# %% tags=["export"]
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

# %%
masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1]])
for name, row in zip(
    ("left", "right", "middle"), positions_from_mask(masks), strict=True
):
    print(f"{name:8}", row.tolist())
follow = positions_from_mask(torch.ones(3, 2), start=torch.tensor([3, 3, 3]))
print("two more tokens:", follow[0].tolist())
middle = positions_from_mask(masks)[2:]
print(picture(visible(middle, middle, 2)[0]))

# %% [markdown]
# In the middle-padded row the token after the gap still sees the one
# before it: their positions are 0 and 1.
#
# ### How far does a layer see?
#
# Equation {eq}`masks-reach`, layer by layer, by way of sliding layers alone
# and by way of all; None stands for "everything before". The first number
# is needed where caches of sliding layers are refilled. A full layer leaves it
# as it is; what has once become "everything" stays so. A layer of another
# kind is a ValueError that ends with its name, without quotes: `layer type:
# expected sliding_attention or full_attention, found chunked_attention`.

# %% tags=["export"]
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

# %%
for reach in receptive_field(["sliding_attention", "full_attention"] * 2, 128):
    print(reach)

# %% [markdown]
# ## It holds
#
# **Exactly min(q + 1, W) keys**, the query's own among them, all windows
# up to 130 and all queries up to 299; and one more or one less window
# changes exactly one key of each query that is old enough.

# %%
q = torch.arange(300)
for w in range(1, 131):
    mask = visible(order, order, w)[0]
    assert torch.equal(mask.sum(-1), (q + 1).clamp(max=w))
    assert mask.diagonal().all() and not mask.triu(1).any()
    wider = visible(order, order, w + 1)[0]
    assert torch.equal((wider & ~mask).sum(-1), (q >= w).long())
print("130 windows x 300 queries")

# %% [markdown]
# **Padding never happened.** Take a text, scatter padding anywhere, drop
# the padding's rows and columns from the mask: what is left is the mask of
# the text alone.

# %%
for _ in range(200):
    length = int(torch.randint(1, 40, ()))
    keep = torch.rand(1, length) < 0.6
    p = positions_from_mask(keep)
    w = int(torch.randint(1, 12, ()))
    mask = visible(p, p, w)[0]
    text = torch.arange(int(keep.sum()))[None]
    inner = mask[keep[0]][:, keep[0]]
    assert torch.equal(inner, visible(text, text, w)[0])
    assert mask.sum() == inner.sum()  # and nothing else is seen
print("200 paddings, nothing leaks")

# %% [markdown]
# **The horizon.** Walk the masks themselves: mark the last position, and
# go back through the layers, each time marking all that a marked query
# sees. The number of marks is {eq}`masks-reach`.

# %%
def marks(kinds, window, length):
    position = torch.arange(length)[None]
    reached = torch.zeros(length, dtype=torch.bool)
    reached[-1] = True
    for kind in reversed(kinds):
        w = window if kind == "sliding_attention" else None
        reached = visible(position, position, w)[0][reached].any(0)
    return reached.sum().item()


for window in (1, 2, 7, 16):
    for n in range(1, 9):
        kinds = ["sliding_attention"] * n
        got = receptive_field(kinds, window)[-1]
        assert marks(kinds, window, 200) == got.sliding == got.total
kinds = ["sliding_attention", "full_attention"] * 2
assert receptive_field(kinds, 7)[-1].total is None
print("four layers, one of them full:", marks(kinds, 7, 200), "of 200")

# %% [markdown]
# **The sentence again.** Let our `visible` decide in the attention of
# [the page](../one_page.ipynb): the story goes on as it did. It is still
# shorter than the window, so we shorten the window to 4 as well. Then the
# story is another one, and the page's own rule tells it with us.

# %%
from gptoss import one_page as page


def nearer(rule):
    return lambda q_pos, k_pos, window: rule(q_pos, k_pos, window and 4)


retold = page.sentence(12, visible=visible)
shorter = page.sentence(12, visible=nearer(visible))
assert retold == page.sentence(12) != shorter
assert shorter == page.sentence(12, visible=nearer(page.visible))
for text in (retold, shorter):
    print(text.removeprefix(page.SENTENCE).strip())

# %% [markdown]
# ## Against the others
#
# **Hugging Face** builds its mask from `sliding_window_overlay` and the
# causal rule, by column. The finished mask, with and without padding, on
# the rows of real tokens (it adds 0 where a key is seen):

# %%
from transformers import GptOssConfig as HFConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)


def hf_masks(attention_mask, window):
    config = HFConfig(sliding_window=window, attn_implementation="eager")
    kwargs = {
        "config": config,
        "inputs_embeds": torch.zeros(*attention_mask.shape, 1),
        "attention_mask": attention_mask,
        "past_key_values": None,
    }
    sliding = create_sliding_window_causal_mask(**kwargs)
    full = create_causal_mask(**kwargs)
    return sliding[:, 0] == 0, full[:, 0] == 0


def compare(keep, window):
    """Entries that differ, sliding and full, on rows of real tokens."""
    p = positions_from_mask(keep)
    ours = visible(p, p, window), visible(p, p, None)
    return [
        (o != h)[keep].sum().item()
        for o, h in zip(ours, hf_masks(keep, window), strict=True)
    ]


ones = torch.ones(2, 300, dtype=torch.bool)
left, right, gap = ones.clone(), ones.clone(), ones.clone()
left[0, :60] = False
right[0, -60:] = False
gap[0, 100:160] = False
for w in (127, 128, 129):
    assert compare(ones, w) == compare(left, w) == compare(right, w) == [0, 0]
print("no, left, right padding: equal at 127, 128, 129")
print("padding in the middle, entries that differ:", compare(gap, 128))

# %% [markdown]
# The last line is a difference of meaning. HF measures the window in
# columns, so 60 columns of padding in the middle use up 60 of the 128
# keys. Here padding counts for nothing, and the row equals the unpadded
# text.
#
# **OpenAI** adds two matrices of $-\infty$ in `sdpa`, one above the
# diagonal and one from the $W$-th diagonal below it down; a window of 0
# means none. Written out:

# %%
def openai_mask(length, window):
    blocked = torch.full((length, length), -torch.inf)
    mask = blocked.triu(1)
    if window > 0:
        mask = mask + blocked.tril(-window)
    return mask == 0


for w in (1, 2, 127, 128, 129, 299, 300):
    assert torch.equal(openai_mask(300, w), visible(order, order, w)[0])
assert torch.equal(openai_mask(300, 0), visible(order, order, None)[0])
print("equal for 7 windows and none")

# %% [markdown]
# **Known bugs.** All one key too many:
#
# - [mlx-lm#390](https://github.com/ml-explore/mlx-lm/pull/390): the mask
#   was `k >= q - W`, the naive version above; fixed in August 2025 after
#   a reading of OpenAI's code.
# - [Megatron-LM#2771](https://github.com/NVIDIA/Megatron-LM/pull/2771):
#   the mask was right, the scripts passed `--window-size 128,0`, which
#   with inclusive bounds is 129 keys; now `127,0`.
#   [Megatron-Bridge#2656][mb] fixed the same for four model families, and
#   [transformers#39408][tf] reported it for FlashAttention.
#
# [mb]: https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/2656
# [tf]: https://github.com/huggingface/transformers/issues/39408
#
# One function in positions, and the pictures, are this book's guard. The
# wrong keys of two of these, among 300 queries:

# %%
def inclusive(length, left):
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    return (k >= q - left) & (k <= q)


ours = visible(order, order, 128)[0]
for name, other in (
    ("k >= q - 128", naive(300, 128)),
    ("--window-size 128,0", inclusive(300, 128)),
    ("--window-size 127,0", inclusive(300, 127)),
):
    print(f"{name:20} wrong keys: {(other != ours).sum().item()}")

# %% [markdown]
# One wrong key for each of the queries 128 to 299, and none before.
#
# ## In the 20b and the 120b

# %%
from gptoss.weights.config import GptOssConfig

models = {
    "20b": GptOssConfig.gpt_oss_20b(),
    "120b": GptOssConfig.gpt_oss_120b(),
}
for name, config in models.items():
    reach = receptive_field(config.layer_types, config.sliding_window)
    count = config.layer_types.count("sliding_attention")
    print(f"{name}: {count} sliding layers alone reach",
          f"{reach[-1].sliding:,} tokens; all layers everything, from layer",
          next(i for i, r in enumerate(reach) if r.total is None))
    assert reach[-1].sliding == 1 + count * 127

# %% [markdown]
# ## Cost
#
# Only pairs that are seen need a score; the attention of [sinks](sinks.ipynb)
# computes every pair that it is handed, so it is best handed few. Sum
# {eq}`masks-visible` over $T \ge W$ queries: a full layer has one pair for
# each query and each key up to it, a sliding layer loses the corner before
# the band is full:
#
# $$
# P_{full} = \frac{T(T+1)}{2}, \qquad
# P_{sliding} = T\,W - \frac{W(W-1)}{2} .
# $$ (masks-pairs)
#
# A pair costs $4CH$ FLOPs: $2C$ for the score and $2C$ for the sum of values,
# in each of $H$ heads ([sinks](sinks.ipynb) has torch count it). The pairs,
# counted in the masks:

# %%
def pairs(tokens, window=None):
    w = min(window or tokens, tokens)
    return tokens * w - w * (w - 1) // 2


for length in (1, 5, 127, 128, 129, 300):
    p = torch.arange(length)[None]
    assert visible(p, p, None).sum() == pairs(length)
    assert pairs(length) == length * (length + 1) // 2
    for w in (1, 2, 127, 128, 129):
        assert visible(p, p, w).sum() == pairs(length, w)
print("   tokens            full       sliding   ratio")
for length in (128, 4096, 131_072):
    full, sliding = pairs(length), pairs(length, 128)
    print(f"{length:9,}{full:16,}{sliding:14,}{full / sliding:8.1f}")

# %% [markdown]
# 12 of the 24 layers have the small number, which halves the cost of
# attention at long context, nothing more: the full layers still pay
# $T^2/2$. The cache halves too: those 12 layers keep 128 tokens instead of
# $T$ ([the cache](../model/remembering.ipynb)).
#
# A mask is not free either. As a (T, S) tensor of bools it takes one byte for
# each pair, seen or not: [the operator](../model/operators.ipynb) builds it
# for a tile of queries at a time.

# %%
T = 131_072
print(f"the whole mask at {T:,} tokens: {T * T / 1e9:.1f} GB")
print(f"a tile of 64 queries: {64 * T / 1e6:.1f} MB")
mask = visible(torch.arange(64)[None], torch.arange(1000)[None], 128)
assert mask.element_size() * mask.numel() == 64 * 1000

# %% [markdown]
# ## Takeaways
#
# - A window of 128 is 128 keys with the query's own: `k > q - 128`, or
#   `(127, 0)` in inclusive bounds. The error is one key from position 128
#   on, so test with more than 128 tokens.
# - Compare positions, not columns, and let padding be position $-1$: left,
#   right and middle padding and a ring cache need no case of their own.
# - Sliding layers alone reach $1 + L_{sliding}(W-1)$ positions; one full
#   layer reaches all.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A test compares whole masks of one text. How many tokens must the text
# have at least to tell a window of 128 from 127, and how many to tell it
# from 129? What if the test compares only the last query's row?

# %% tags=["hide-cell"]
def differ(tokens, w):
    p = torch.arange(tokens)[None]
    return visible(p, p, w)[0] != visible(p, p, 128)[0]


for w in (127, 129):
    whole = [n for n in range(1, 200) if differ(n, w).any()]
    row = [n for n in range(1, 200) if differ(n, w)[-1].any()]
    assert whole == row == list(range(whole[0], 200))
    print(f"128 against {w}: from {whole[0]} tokens on, by the last row too")

# %% [markdown]
# ### Exercise 2
#
# `nats[w]` of the picture holds the losses of the twelve stories with window
# `w`; column $t$ belongs to query $t$. From which query on do 63 and 65
# differ from 64? First say what you expect.

# %% tags=["hide-cell"]
for w in (63, 65):
    change = (nats[w] - nats[64]).abs().amax(0)
    first = (change > 1e-6).nonzero()[0].item()
    print(f"{w}: from query {first} on")
print("query 63 is the first to see 64 keys, query 64 the first to lose one")

# %% [markdown]
# ### Exercise 3
#
# From how many tokens on does attention in the 20b (pairs over all layers)
# cost at most 1 % more than half of what it would with full layers only?

# %% tags=["hide-cell"]
def share(tokens):
    both = pairs(tokens, 128) + pairs(tokens)
    return both / (2 * pairs(tokens))


length = next(n for n in range(1, 131_072) if share(n) <= 0.505)
print(f"from {length:,} tokens on")
assert share(length - 1) > 0.505 > share(131_072) > 0.5

# %% [markdown]
# ### Exercise 4
#
# A chunk of 5 tokens at positions 200 to 204 arrives while a ring holds
# the last 128 positions, 72 to 199. Which ring slots does no query of the
# chunk see, and what would go wrong if the ring were overwritten by the
# chunk *before* attending?

# %% tags=["hide-cell"]
chunk = torch.arange(200, 205)[None]
held = torch.arange(72, 200)[None]
unseen = ~visible(chunk, held, 128)[0].any(0)
print("unseen positions:", held[0][unseen].tolist())
overwritten = held[held > 76][None]  # what five writes leave of the old
lost = visible(chunk, held, 128).sum(-1)
lost -= visible(chunk, overwritten, 128).sum(-1)
print("keys lost by each query:", lost[0].tolist())
assert unseen.sum() == 1

# %% [markdown]
# Position 72 alone is out of everybody's sight. Written first, the chunk
# would push out 72 to 76, of which the first query still needs four.
#
# ## Sources
#
# - Sliding windows and their horizon: {cite}`longformer2020`; alternating
#   local and global layers: {cite}`sparse2019`; the model:
#   {cite}`gptoss2025`.
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `sdpa`.
# - huggingface/transformers 5.23, `masking_utils.py`:
#   `sliding_window_overlay`, `create_sliding_window_causal_mask`.
# - google-deepmind/gemma, `gm/nn/_modules_test.py`: masks asserted as
#   pictures.
