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
#     module: planting
#     public: [plant_copying]
# ---

# %% [markdown]
# # Can a circuit be planted?
#
# ## Question
#
# Does a network have to find by itself what is known about it? With two heads
# set by hand, a model that has not been trained for a single step continues
# text without sense whose pieces come again at less than one nat per token.
# Guessing blindly costs more than seven.
#
# ## Picture

# %% tags=["hide-input"]
# Figure: the tokens of "Zorali lives in Bomak. Where does Zor" in a row with
# arrows. Short arrows from each token to the next: layer 0 writes the token
# before beside it. One long arrow: the last "or" finds the earlier "al",
# which has "or" beside it, and says "al".
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
pieces = ["␣", "Z", "or", "al", "i", "lives", "in", "…", "where", "does",
          "␣", "Z", "or"]
fig, ax = plt.subplots(figsize=(7.4, 2.5))
ax.axis("off")
ax.set_xlim(-.6, len(pieces) + .4)
ax.set_ylim(-.9, 2.7)
for n, piece in enumerate(pieces):
    ax.text(n, 0, piece, ha="center", va="center", family="monospace",
            size=10)
    if n:
        ax.annotate("", (n, .85), (n - .95, .2), arrowprops={
            "arrowstyle": "->", "color": "#0072b2", "lw": .9})
        ax.text(n, 1.05, pieces[n - 1], ha="center", va="center", size=8,
                color="#0072b2", family="monospace")
ax.text(0, -.75, "layer 0: beside each token, the one before it", size=9,
        color="#0072b2")
ax.annotate("", (3.05, 1.25), (12, .25), arrowprops={
    "arrowstyle": "->", "color": "#d55e00", "lw": 1.3,
    "connectionstyle": "arc3,rad=.28"})
ax.text(7.6, 2.5, 'layer 1: who has "or" beside them?  "al". Say "al".',
        size=9, color="#d55e00", ha="center")
ax.add_patch(plt.Rectangle((2.6, -.25), .8, 1.6, fill=False, ec="#d55e00",
                           lw=1))
plt.show()

# %% [markdown]
# What to see: a name that was read once is to be said again. The last token is
# "or". Which one comes next? Blue, in the first layer: every token notes its
# predecessor. Orange, in a later layer: the present "or" looks for a place
# that has noted "or", finds "al", and says it. These two heads are all the
# circuit there is.

# %% tags=["export"]
import torch
from torch import Tensor, nn

from gptoss.model.transformer import GptOss
from gptoss.weights.config import GptOssConfig

# %%
import random
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.rows import Row, drill_row, padded
from gptoss.weights.config import GptOssConfig

torch.set_num_threads(1)
plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
config = GptOssConfig.from_pretrained(POCKET)
reader = Tokenizer.from_pretrained(POCKET)

# %% [markdown]
# ## Derivation
#
# Most of what the small model has to learn is to say again what stands
# further up: the colour of the kite, the name of a cat, of a tool, of its
# parameters. The circuit that does it is known as an *induction head*
# {cite}`induction2022` and needs two layers:
#
# 1. A head of the first layer writes beside each token the one before it.
# 2. A head of a later layer looks, with the present token as its query, for
#    a place that has this token written beside it, and says the token there.
#
# Small models find this pair late, and all at once, since neither head is of
# any use before the other is there. Left to itself, a model of this size
# has not learnt to read the name of a tool after seven thousand steps. But a
# circuit that is understood need not be found: it can be where the training
# starts {cite}`mimetic2023`.
#
# *Step 1 needs no token at all.* "One token back" is a question of position
# alone. The projections of gpt-oss have biases, so queries and keys can be
# constants, the same at every position; and
# [RoPE](../attention/rope.ipynb) turns a constant into a clock. It reads the
# channels of a head in pairs, each pair a hand of a clock, and turns pair $i$
# by $\theta_i$ for each position. A query and a key that are $d$ tokens apart
# then differ by the angle $\theta_i d$, whatever they stand for.
#
# Take one pair that turns by 1 radian a token. If both hands pointed the same
# way, the score would be $\cos d$, largest for the token itself. Turn the
# query *back* by one radian beforehand, and it is $\cos(d - 1)$: 0.54 for the
# token itself, 1 for the one before, 0.54 for the one before that.

# %%
import math

print([round(math.cos(d - 1), 2) for d in range(5)], "at d = 0, 1, 2, 3, 4")

# %% [markdown]
# In general, with each pair read as a complex number, let all keys be
# $k_i = r_i$ and all queries $q_i = r_i e^{-\mathrm{i} \theta_i}$. The score
# of a key that is $d$ tokens back is
#
# $$ s(d) = \sum_i \operatorname{Re}\big( q_i e^{\mathrm{i} \theta_i d}
#    \, \overline{k_i} \big) = \sum_i r_i^2 \cos\big( \theta_i (d - 1)
#    \big), $$ (train-clock)
#
# largest at $d = 1$. Three fast pairs make the peak sharp: one clock alone
# strikes again after $2 \pi / \theta_i$ tokens, three hardly ever agree.
#
# *Step 2 must not see the clock.* Query and key are now the embedding of the
# present token and the copy beside an earlier one, both projected by the same
# matrix, so that their product is large where the two are the same. RoPE
# turns them apart, but at very different speeds: over a hundred tokens the
# fastest pair of this model turns sixteen times round, the fifth a quarter,
# and from the sixth on each turns by less than a third of a radian, for YaRN
# has slowed them down. So the three fastest pairs keep the clock, and those
# from the fifth on compare.

# %%
from gptoss.attention.rope import rope_parameters

frequencies = rope_parameters(config)[0]
turns = 100 * frequencies / (2 * torch.pi)
for n in (0, 1, 2, 3, 4, 5):
    print(f"pair {n + 1}: {turns[n]:7.3f} turns in a hundred tokens, "
          f"{100 * frequencies[n]:.2f} rad")

# %% [markdown]
# ## Code
#
# ### Where do the weights start?

# %% tags=["export"]
def start_at_random(model: GptOss, seed: int) -> None:
    """Draw the matrices from normal(0, 1 / columns), in place.

    A standard deviation of 0.02 suits D = 2880, since 2880**-0.5 = 0.019;
    in a narrow model it makes every layer whisper, and learning to look
    back took more than twice the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            scale = parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=scale, generator=generator)

# %% [markdown]
# ### How are the two heads set?
#
# An attention head is four matrices. Queries and keys decide where it looks,
# values what it takes from there, and the output matrix where it puts that.
# We set all four, once for each of the two key/value heads. The first half of
# the residual stream belongs to the token itself, the second to what stands
# beside it:
#
# | | looks (q, k) | takes (v) | puts (o) |
# |---|---|---|---|
# | layer 0 | one token back, by the clock | the token | beside |
# | layers 1, 3 | for the present token, beside | the token | beside, rotated |
#
# `look_back` and `look_for` are the first column, `carry` the other two. The
# output is read from the second half as well. So that a note of layer 0 ("the
# token before me") is not mistaken for an answer of layer 1 ("say this"), the
# two are written in two random rotations, `inner` and `outer`, which hardly
# overlap; the output matrix reads the second one only. The remaining numbers
# (0.7, 1.3, 2, 4 and the heights of PULL) are how loud each part speaks; they
# were found by trying, and training changes them anyway.

# %% tags=["export"]
from typing import cast

from gptoss.model.layers import Attention, Block
from gptoss.attention.rope import rope_parameters

PULL = (8.0, 8.0, 4.0)  # on the score, of the three fastest pairs


def rows_of(n: int, size: int) -> slice:
    """The rows of head, or of group, `n`."""
    return slice(n * size, (n + 1) * size)


def look_back(attention: Attention, config: GptOssConfig, group: int,
              head: int) -> None:
    """`head` of `group` and the next look one and two tokens back, whatever
    these are: biases alone decide, in the three fastest pairs."""
    C, n = config.head_dim, len(PULL)
    frequencies, concentration = rope_parameters(config)
    fast = frequencies[:n].float()
    size = (torch.tensor(PULL) * C ** 0.5 / concentration ** 2).sqrt()
    keys = rows_of(group, C)
    attention.k_proj.bias[keys] = 0
    for start in (0, C // 2):
        channels = slice(keys.start + start, keys.start + start + n)
        attention.k_proj.weight[channels] = 0
    attention.k_proj.bias[keys.start:keys.start + n] = size
    for offset in (1, 2):
        rows = rows_of(head + offset - 1, C)
        queries = attention.q_proj.bias[rows].zero_()
        attention.q_proj.weight[rows] = 0
        queries[:n] = size * torch.cos(fast * offset)
        queries[C // 2:C // 2 + n] = -size * torch.sin(fast * offset)


def look_for(attention: Attention, config: GptOssConfig, group: int,
             head: int, token: Tensor) -> None:
    """`head` of `group` looks for places with the present token beside
    them, in pairs slow enough to mean the same far away."""
    C, half = config.head_dim, config.hidden_size // 2
    slow = torch.tensor([n for n in range(C) if n % (C // 2) > len(PULL)])
    queries, keys = torch.zeros(C, 2 * half), attention.k_proj.weight
    queries[slow, :half] = 2.0 * token[:len(slow)]
    attention.q_proj.weight[rows_of(head, C)] = queries
    keys[group * C + slow] = 0
    beside = half + group * C + torch.arange(len(slow))
    keys[group * C + slow, beside] = 4.0

# %% tags=["export"]
def carry(attention: Attention, group: int, head: int, token: Tensor,
          out: Tensor, start: int) -> None:
    """What `head` of `group` sees, it writes from `start` on."""
    size, half = token.shape
    values = attention.v_proj.weight[rows_of(group, size)].zero_()
    values[:, :half] = token
    written = attention.o_proj.weight[:, rows_of(head, size)].zero_()
    written[start:start + len(out)] = out


@torch.no_grad()
def plant_copying(model: GptOss, seed: int) -> None:
    """Begin with the circuit that copies, in place.

    Layer 0 writes the previous token beside each one; layers 1 and 3 look
    for the present token beside an earlier one, and say that one. The
    first half of the residual stream holds the token itself. Every other
    head and expert starts more quietly than `start_at_random` left it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    C, half = config.head_dim, config.hidden_size // 2
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    words = torch.randn(len(embedding), half, generator=generator) * 0.7
    inner, outer = (torch.linalg.qr(torch.randn(
        half, half, generator=generator))[0].T for _ in range(2))
    embedding.zero_()[:, :half] = words
    head.zero_()[:, half:] = words / 0.7 / half ** 0.5 @ inner.T @ outer
    blocks = [cast(Block, layer) for layer in model.layers]
    for layer in blocks:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.experts.down_proj.mul_(0.1)
    for group in range(config.num_key_value_heads):
        at, first = rows_of(group, C), blocks[0].self_attn
        place = group, group * (config.num_attention_heads
                                // config.num_key_value_heads)
        look_back(first, config, *place)
        carry(first, *place, inner[at], torch.eye(C) / 2, half + at.start)
        for layer in blocks[1:4:2]:
            look_for(layer.self_attn, config, *place, inner[at])
            carry(layer.self_attn, *place, inner[at], 1.3 * outer[at].T, half)

# %% [markdown]
# ### What can it do before the first step?
#
# Not a step has been trained, and the planted model copies: given text
# without sense whose pieces come again, it finds the continuation. Guessing
# blindly among all tokens is the price to compare with.

# %%
def nats_of(model: GptOss, row: Row) -> float:
    """Nats per token of those that count in a row."""
    tokens, weights = padded([row])
    nats = nn.functional.cross_entropy(
        model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")
    return ((weights[0, 1:] * nats).sum() / weights.sum()).item()


print(f"guessing among {config.vocab_size:,} tokens: "
      f"{math.log(config.vocab_size):.1f} nats a token")
drills = [drill_row(reader, random.Random(n)) for n in range(20)]
for name in ("at random", "planted"):
    fresh = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(fresh, seed=0)
    if name == "planted":
        plant_copying(fresh, seed=0)
    with torch.inference_mode():
        nats = sum(nats_of(fresh, row) for row in drills) / 20
    print(f"{name}: {nats:.1f}")

# %% tags=["hide-input"]
# Figure: where two planted heads look, token by token, on a sentence said
# twice. In layer 0 all look at the token before: a line beside the diagonal.
# In layer 1 the second sentence looks at the first, one place further on.
from gptoss.attention.rope import apply_rope, rope_tables
from gptoss.attention.sinks import softmax_with_sink


def looks(layer: int, tokens: Tensor) -> Tensor:
    """Where head 0 of a layer of `fresh` looks: (T, T) probabilities."""
    block, seen, C = fresh.layers[layer], [], fresh.config.head_dim
    hook = block.self_attn.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]))
    fresh(tokens)
    hook.remove()
    tables = rope_tables(torch.arange(tokens.shape[1])[None],
                         *rope_parameters(fresh.config), torch.float32)
    q, k = (apply_rope(project(seen[0])[:, :, None, :C], *tables)[0, :, 0]
            for project in (block.self_attn.q_proj, block.self_attn.k_proj))
    scores = (q @ k.T / C ** 0.5).masked_fill(
        ~torch.ones(len(q), len(q)).tril().bool(), float("-inf"))
    return softmax_with_sink(scores[None, None],
                             block.self_attn.sinks[:1])[0, 0]


text = "Listen: Zorali lives in Bomak. Zorali lives in Bomak."
ids = reader.encode(text)
pieces = [reader.decode([token]) for token in ids]
fig, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True)
with torch.inference_mode():
    for ax, layer, title in ((axes[0], 0, "Layer 0: one back"),
                             (axes[1], 1, "Layer 1: what came after")):
        ax.imshow(looks(layer, torch.tensor([ids])), vmin=0, vmax=1,
                  cmap="Blues")
        ax.set(title=title, xlabel="looked at", xticks=range(len(ids)),
               yticks=range(len(ids)))
        ax.set_xticklabels(pieces, rotation=90, fontsize=7)
        ax.set_yticklabels(pieces, fontsize=7)
        ax.grid(False)
axes[0].set_ylabel("looking")
plt.show()

# %% [markdown]
# Before the first step. Left, by the clock: each token looks at the one
# before it. Right, by content: in the second sentence each token looks at the
# one that *followed* its double. In the first sentence hardly anything
# matches, and where it looks is chance.

# %% [markdown]
# ## It holds
#
# Equation {eq}`train-clock` in numbers: the score of a key $d$ tokens back,
# as the formula has it and as the planted head computes it.

# %%
first, C = fresh.layers[0].self_attn, config.head_dim
T, size = 60, torch.tensor(PULL)
tables = rope_tables(torch.arange(T)[None], *rope_parameters(config),
                     torch.float32)
q, k = (apply_rope(project.bias[:C].expand(1, T, 1, C), *tables)[0, :, 0]
        for project in (first.q_proj, first.k_proj))
scores = (q[-1] @ k.T / C ** 0.5).flip(0).detach()      # by distance
fast = frequencies[:len(PULL)].float()
formula = torch.stack([(size * torch.cos(fast * (d - 1))).sum()
                       for d in range(T)])
print("formula:", [f"{value:.1f}" for value in formula[:6]])
print("head:   ", [f"{value:.1f}" for value in scores[:6]])
torch.testing.assert_close(scores, formula, rtol=0, atol=1e-3)
assert scores.argmax() == 1

# %% [markdown]
# ## Takeaways
#
# - Copying takes two heads: one writes beside each token the one before it,
#   one looks for the present token there.
# - Constant queries and keys under RoPE look back by a fixed distance; three
#   fast pairs make the peak sharp, and slow ones compare over any distance.
# - A circuit that is understood can be given instead of found: heads planted
#   by hand copy before the first step.
#
# ## Exercises
#
# ### Exercise 1
#
# How sharp would the clock be with the fastest pair alone, at the same
# height? Find the first distance at which it strikes nearly as high again.

# %% tags=["hide-cell"]
heights = sum(PULL)
alone = heights * torch.cos(fast[0] * (torch.arange(T) - 1))
again = next(d for d in range(2, T) if alone[d] > 0.95 * heights)
best = formula[2:].argmax().item() + 2
print(f"alone: {alone[again]:.1f} of {heights:.0f} at d = {again}; "
      f"three: at most {formula[best]:.1f}, at d = {best}")
assert again == 7 and formula[best] < 0.95 * heights

# %% [markdown]
# ### Exercise 2
#
# Does the shipped model still have its planted heads? Let head 0 of its first
# layer look at the sentence of the figure and find the distance that it
# looks at most.

# %% tags=["hide-cell"]
fresh = GptOss.from_pretrained(POCKET, dtype=torch.float32)
with torch.inference_mode():
    share = looks(0, torch.tensor([ids]))
back = [share.diagonal(-d).mean().item() for d in range(5)]
print("shares by distance:", [f"{value:.1f}" for value in back])

# %% [markdown]
# ### Exercise 3
#
# Which of the two heads is needed? Silence one of them (set its output matrix
# to zero) in a planted model that has not been trained, and let it read the
# drills.

# %% tags=["hide-cell"]
for silent in ((), (0,), (1, 3)):
    fresh = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(fresh, seed=0)
    plant_copying(fresh, seed=0)
    for layer in silent:
        fresh.layers[layer].self_attn.o_proj.weight.detach().zero_()
    with torch.inference_mode():
        nats = sum(nats_of(fresh, row) for row in drills) / 20
    print(f"silent layers {silent}: {nats:.1f} nats a token")

# %% [markdown]
# Both, and that is why a model finds them so late: each alone is worth
# nothing.
#
# ## Sources
#
# - Induction heads: {cite}`induction2022`; weights that begin with what
#   attention is known to become: {cite}`mimetic2023`.
