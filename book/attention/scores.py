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
#   gptoss: {module: scores}
# ---

# %% [markdown]
# # Who looks at whom?
#
# ## Question
#
# In "Mira got a white lamp. One morning she went to the park with the", the
# next word is easy for us: we look back and find the lamp. Inside the model
# every token is a row of numbers (2,880 of them in the 20b), and nearly all
# that a layer does, it does to each row alone. One operation lets a row take
# something from the rows before it: **attention**. How does a row find out
# which of them to take from? By sums of 64 products: over 131,072 tokens, one
# layer of the 20b forms 550 billion of them.
#
# ## Picture
#
# Two of the 32 heads of the small model that ships with the package read
# these sentences. A head is one way of looking back. We ask each of them the
# same: the last `the`, after which comes `lamp`, from which tokens does it
# take something, and how much? (A dot is a full stop, or a blank piece that
# comes before names. Two sentences before these were read, too.)

# %% tags=["hide-input", "picture"]
# Figure: the tokens of two sentences in a row, twice, with arcs from the
# last "the" back to those that it takes from. In the upper row one thick arc
# reaches back to the first "lamp"; in the lower one a thick arc goes to the
# token just before.
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss
from gptoss.parity.walk import trace_ours

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

text = ("Once upon a time there was a little fox named Mira. Mira lived in "
        "the cave. For her birthday Mira got a white lamp. One morning she "
        "went to the park with the lamp.")
pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
ids = reader.encode(text)
words = [reader.decode([token]).strip() or "·" for token in ids]
asks, lamp, first = len(words) - 3, words.index("lamp"), words.index("For")
trace = trace_ours(GptOss.from_pretrained(pocket, dtype=torch.float32),
                   torch.tensor([ids]))
looks = {(layer, head): trace[layer, "weights"][asks, head]
         for layer in range(4) for head in range(8)}
fig, axes = plt.subplots(2, 1, figsize=(7.4, 3.6), sharex=True)
for ax, at, color in zip(axes, (lamp, asks - 1), ("C0", "C2"), strict=True):
    layer, head = max(looks, key=lambda one: looks[one][at].item())
    for key, weight in enumerate(looks[layer, head].tolist()):
        if weight > 0.02 and key < asks:
            x = torch.linspace(key, asks, 60)
            y = (1 - ((x - key) / (asks - key) * 2 - 1) ** 2).sqrt()
            ax.plot(x, y * (asks - key) ** 0.5, lw=0.5 + 6 * weight,
                    color=color, alpha=0.75, solid_capstyle="butt")
    share = 100 * looks[layer, head][at]
    ax.text(first, 3.6, f"layer {layer}, head {head}: {share:.0f} % from "
            f"`{words[at]}`", color=color, fontsize=9)
    ax.set(yticks=(), ylim=(0, 5.2), xlim=(first - 0.8, asks + 0.8))
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="x", length=0)
axes[1].set_xticks(range(first, asks + 1), words[first:asks + 1], rotation=90)
axes[1].get_xticklabels()[-1].set_weight("bold")
plt.show()

# %% [markdown]
# What to see: the upper head passes over ten tokens and takes the lamp; the
# lower one takes from the token just before. An arc is as thick as what
# flows along it. Nobody wrote down who should look at whom. It follows from
# the rows, by a computation that fits into five lines, and this chapter
# builds it: first with three tokens of two numbers, then for all heads at
# once.
#
# ## The naive version
#
# Here are three tokens as rows of two numbers. Say that the first number
# means "a name" and the second "a thing":

# %%
names = ["Mira", "lamp", "the"]
x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

# %% [markdown]
# **First attempt: take the average** of the rows so far. Every row then
# knows a little of all, but nobody has chosen anything: with $n$ tokens each
# gives $1/n$, the lamp as much as the full stop. In a story of 200 tokens,
# half a per cent.
#
# **Second attempt: let similar rows take from each other.** How similar two
# rows are, their dot product tells: multiply number by number and add. It is
# large when both are large in the same places.

# %%
print("      ", *(f"{name:>6}" for name in names))
for name, row in zip(names, x @ x.T, strict=True):
    print(f"{name:6}", *(f"{n:6.0f}" for n in row.tolist()))

# %% [markdown]
# Two things are wrong with this table. It is symmetric: `lamp` cannot be
# interesting for `the` without `the` being just as interesting for `lamp`.
# And a row is most similar to itself, so `Mira` finds `Mira` and `lamp`
# finds `lamp`. But `the` does not look for another `the`. It looks for a
# thing.
#
# ## Derivation
#
# **Three views of a row.** So let a row play three parts, by three matrices
# that the model learns. Its *query* says what the token looks for,
# its *key* what it has to offer, its *value* what it hands over when
# somebody takes from it. Each is a linear function of the row $x_t$ (with a
# bias, in gpt-oss, left out here):
#
# $$
# q_t = W_q\,x_t, \qquad k_t = W_k\,x_t, \qquad v_t = W_v\,x_t .
# $$ (scores-views)
#
# In our example the key is the row itself. The query of `the` becomes
# $(0, 2)$, "no name, a thing":

# %%
W_q = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
W_k = torch.eye(2)
W_v = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
q, k, v = x @ W_q.T, x @ W_k.T, x @ W_v.T
for name, *rows in zip(names, q, k, v, strict=True):
    print(f"{name:5}", *(f"{part} {row.tolist()}" for part, row in
                         zip("qkv", rows, strict=True)), sep="  ")

# %% [markdown]
# **From a score to a share.** How well a key fits a query is their dot
# product. The query of `the` meets the keys $(2, 0)$, $(0, 2)$ and $(1, 1)$:
# the products are 0, 4 and 2. We divide by $\sqrt 2$ (why, we shall see)
# and have the **scores**. Shares should be positive and sum to one, and a
# higher score should mean a larger share. The softmax does that: take $e$
# to the power of each score, divide by the sum. Last, the row takes that
# share of every value:

# %%
score = torch.tensor([0.0, 4.0, 2.0]) / 2 ** 0.5
powers = score.exp()
share = powers / powers.sum()
print("scores ", *(f"{n:5.2f}" for n in score.tolist()))
print("powers ", *(f"{n:5.2f}" for n in powers.tolist()))
print("shares ", *(f"{n:5.2f}" for n in share.tolist()))
print("`the` takes", [round(n, 2) for n in (share @ v).tolist()])

# %% [markdown]
# Mostly what the lamp hands over, $(0, 2)$. In general, with $C$ numbers in
# a query and a key, the score of key $s$ for query $t$, its share, and the
# output $o_t$ are
#
# $$
# a_{ts} = \frac{q_t \cdot k_s}{\sqrt C}, \qquad
# p_{ts} = \frac{e^{a_{ts}}}{\sum_i e^{a_{ti}}}, \qquad
# o_t = \sum_s p_{ts}\,v_s ,
# $$ (scores-attention)
#
# and here are the five lines that are this equation, for all tokens at once.
# Rows of `a` are queries, columns are keys:

# %%
def attend(q, k, v, mask=None):
    """q (T, C), k and v (S, C) -> (T, C)."""
    a = q @ k.T / q.shape[-1] ** 0.5
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf)
    return a.softmax(-1) @ v


for name, row in zip(names, attend(q, k, v), strict=True):
    print(f"{name:5} takes", [round(n, 2) for n in row.tolist()])

# %% [markdown]
# ### Why the square root of C?
#
# Suppose that the $C$ numbers of a query and of a key are independent, with
# mean 0 and variance 1, which is about what a new network has. A product of
# two of them has variance 1, and variances of independent numbers add:
#
# $$
# \operatorname{Var}(q \cdot k) = \sum_{c=1}^{C} 1 = C .
# $$ (scores-variance)
#
# With $C = 64$ the standard deviation of a dot product is 8. Is that bad? To
# see what softmax does with such numbers, we draw 2,000 queries with 128
# keys each, and note how much the most favoured key gets, with the scores as
# they are and divided by $\sqrt C$. We also note the slope: if a score grows
# a little, its share $p$ grows by $p(1 - p)$ times as much, and without that
# slope nothing can be learnt. It is summed over the 128 keys.

# %%
print("  C   deviation   largest share    sum of slopes")
print("      raw  /√C    raw   /√C        raw   /√C")
for C in (4, 16, 64, 256):
    wide_q, wide_k = torch.randn(2000, 1, C), torch.randn(2000, 128, C)
    raw = (wide_q * wide_k).sum(-1)
    both = [raw, raw / C ** 0.5]
    p = [a.softmax(-1) for a in both]
    print(f"{C:3}", *(f"{a.std():5.0f}" for a in both),
          *(f"{w.amax(-1).mean():6.2f}" for w in p), "    ",
          *(f"{(w * (1 - w)).sum(-1).mean():5.2f}" for w in p))
    if C == 64:
        drawn = [w.sort(-1, descending=True).values.mean(0) for w in p]
        assert 7.5 < raw.std() < 8.5 and 0.95 < both[1].std() < 1.05
        assert drawn[0][0] > 0.7 and drawn[1][0] < 0.1

# %% [markdown]
# Undivided, the wider the head, the more of everything goes to one key,
# though these keys are noise: the choice is made before anything has been
# learnt, and the slope is nearly gone. Divided by $\sqrt C$, the deviation is
# 1 whatever $C$ is, and every key still has a say.
#
# What to see: the shares of the ten most favoured of 128 keys, at $C = 64$.

# %% tags=["hide-input"]
# Figure: shares of the ten most favoured of 128 random keys at C = 64.
# Undivided, the first takes three quarters and the second most of the rest;
# divided by the root of C, the shares fall gently from below a tenth.
fig, ax = plt.subplots(figsize=(5, 2.4))
rank = torch.arange(1, 11)
for line, shift, color in zip(drawn, (-0.2, 0.2), ("C5", "C0"), strict=True):
    ax.bar(rank + shift, line[:10], 0.4, color=color)
ax.text(1.15, 0.8, "undivided", color="C5")
ax.text(3, 0.13, "divided by √C = 8", color="C0")
ax.set(xlabel="keys, the most favoured first", ylabel="share",
       xticks=rank.tolist(), ylim=(0, 1))
ax.grid(axis="x", visible=False)
ax.set_title("What softmax makes of 128 random scores")
plt.show()

# %% [markdown]
# ### Why does nobody look ahead?
#
# The model is trained to predict the next token, at all positions of a text
# in one pass. If row $t$ could look at row $t + 1$, it would find there the
# very token that it must predict. So the scores of later keys are set to
# $-\infty$ before the softmax, where $e^{-\infty} = 0$. What is left is a
# triangle: token $t$ sees keys $0 \dots t$, and itself among them. This is
# called **causal** attention. The choice of keys is a table of booleans, the
# *mask* ([masks](masks.ipynb) has more of them):

# %%
causal = torch.ones(3, 3, dtype=torch.bool).tril()
shares = (q @ k.T / 2 ** 0.5).masked_fill(~causal, -torch.inf).softmax(-1)
print("      ", *(f"{name:>6}" for name in names))
for name, row in zip(names, shares, strict=True):
    print(f"{name:6}", *(f"{n:6.2f}" for n in row.tolist()))

# %% [markdown]
# There is a second gain, which no one had to ask for. A fourth token
# arrives, say another thing. What happens to the outputs of the first three?

# %%
four = torch.cat([x, torch.tensor([[0.0, 1.0]])])
q4, k4, v4 = four @ W_q.T, four @ W_k.T, four @ W_v.T
triangle = torch.ones(4, 4, dtype=torch.bool).tril()
for how, three_mask, four_mask in (("without a mask", None, None),
                                   ("causal", causal, triangle)):
    old = attend(q, k, v, three_mask)
    new = attend(q4, k4, v4, four_mask)[:3]
    change = (new - old).abs().amax(-1)
    print(f"{how:15} rows change by",
          [round(n, 2) for n in change.tolist()])
assert torch.equal(new, old)

# %% [markdown]
# With the mask, nothing: a row depends on itself and on what came before.
# That holds in every layer, as the rows of layer 1 are made from those of
# layer 0 in the same way. **So the keys and values of the past never
# change.** Who writes a text token by token may keep them, and compute for a
# new token only its own query, key and value:

# %%
kept_k, kept_v = k, v  # from the three tokens before
newest = attend(q4[3:], torch.cat([kept_k, k4[3:]]),
                torch.cat([kept_v, v4[3:]]))
whole = attend(q4, k4, v4, triangle)[3]
print("with kept keys:", [round(n, 4) for n in newest[0].tolist()])
print("all over again:", [round(n, 4) for n in whole.tolist()])
torch.testing.assert_close(newest[0], whole)

# %% [markdown]
# That is the seed of the cache, to which [a later
# chapter](../model/remembering.ipynb) is given.
#
# ### Why more than one head?
#
# A softmax deals out its shares once. The `the` of the picture wants the
# lamp *and* wants to know what stands just before it; if one set of shares
# serves both, each gets half. So the model looks several times at once, with
# $H$ *heads*. Each has a query, a key and a value of its own, of $C$ numbers,
# and all heads work by {eq}`scores-attention` without knowing of one
# another. Their outputs are laid side by side, $H \cdot C$ numbers, and a
# last matrix $W_o$ brings them back to the width $D$ of a row. In the 20b,
# $H = 64$ heads of $C = 64$.
#
# ### Why do heads share keys?
#
# What the model must keep of each past token are its keys and values, not
# its queries: a query is used once. With 64 heads that would be 64 keys and
# 64 values of 64 numbers, in each layer. gpt-oss keeps 8 of each: eight
# query heads ask the same key head eight different things. This is
# **grouped-query attention** {cite}`gqa2023`. Query head $h$ uses key and
# value head
#
# $$
# g = \lfloor h\,G / H \rfloor ,
# $$ (scores-group)
#
# so the first $H/G$ query heads share key head 0, the next ones key head 1.

# %% tags=["hide-input"]
# Figure: 64 small squares in a row, the query heads, in eight colours; lines
# lead from each eight neighbours of one colour down to one large square, a
# key and value head.
fig, ax = plt.subplots(figsize=(7.4, 2.1))
shade = [f"C{n}" for n in range(7)] + ["#999999"]
for h in range(64):
    g = h // 8
    ax.plot([h, 8 * g + 3.5], [1.62, 0.75], color=shade[g], lw=0.8)
    ax.add_patch(plt.Rectangle((h - 0.42, 1.6), 0.84, 0.45, fc=shade[g]))
for g in range(8):
    for name, side in (("K", -1.8), ("V", 0.2)):
        ax.add_patch(plt.Rectangle((8 * g + 3.5 + side, 0.2), 1.6, 0.55,
                                   fc=shade[g], alpha=0.45, ec=shade[g]))
        ax.text(8 * g + 4.3 + side, 0.47, name, ha="center", va="center",
                fontsize=8)
    ax.text(8 * g + 3.5, -0.12, f"g = {g}", ha="center", fontsize=8)
for h in (0, 7, 8, 15, 56, 63):
    ax.text(h, 2.13, str(h), ha="center", fontsize=8)
ax.text(31.5, 2.13, "64 query heads, used once", ha="center")
ax.text(31.5, -0.55, "8 key and value heads, kept for every token",
        ha="center")
ax.set(xlim=(-1, 64), ylim=(-0.65, 2.4))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: neighbours share. Query heads 0 to 7 go to key head 0, heads
# 56 to 63 to key head 7. The next cell prints what the sharing saves.

# %%
from gptoss.weights.config import GptOssConfig

config = GptOssConfig.gpt_oss_20b()
H, G, C = (config.num_attention_heads, config.num_key_value_heads,
           config.head_dim)
print(f"rows of {config.hidden_size:,} numbers, heads of {C}")
for heads in (H, G):
    size = 2 * heads * C * 2  # keys and values, two bytes a number
    print(f"{heads:2} key heads: {size:6,} bytes a token and layer")

# %% [markdown]
# ## Code
#
# ### How are the scores of all heads computed at once?
#
# From here on, queries are a tensor of shape (B, T, H, C): B texts of T
# tokens, H heads, C numbers. Keys and values are (B, S, G, C). S is not
# always T: with kept keys there are more keys than queries.
#
# The obvious way repeats every key $H/G$ times, so that each head has its
# own. That would copy all kept keys eight times over, for each new token.
# We turn it round. The $H/G$ query heads that share a key head are stacked
# on top of each other, as if they were more tokens: $(H/G) \cdot T$ rows
# against one matrix of $S$ keys. For H = 4, G = 2 and two tokens, the rows
# of key head 0 are: head 0 token 0, head 0 token 1, head 1 token 0, head 1
# token 1.

# %% tags=["export"]
import torch
from torch import Tensor


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

# %% [markdown]
# Line by line: inputs in sixteen bits are widened to fp32 *before* the
# product ([sinks](sinks.ipynb) measures what that is worth); float64 stays
# float64. The scale, mostly $1/\sqrt C$, is multiplied into the queries,
# which are fewer than the scores. Splitting H into (G, H/G) puts head $h$
# at $(\lfloor h/(H/G) \rfloor,\ h \bmod (H/G))$, which is {eq}`scores-group`.
# The last line writes $-\infty$ into a tensor of its own: neither input is
# changed.
#
# ### How are the values mixed?
#
# The same stacking backwards. `mix` takes any weights, whatever they sum to,
# and their type is that of the result: values of another type are cast to it.

# %% tags=["export"]
def mix(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values: (B, H, T, S), (B, S, G, C) -> (B, T, H, C).

    In the dtype of the weights; a value of another dtype is cast to it.
    """
    B, H, T, S = weights.shape
    G, C = v.shape[2:]
    grouped = weights.reshape(B, G, H // G * T, S)
    out = grouped @ v.to(weights.dtype).transpose(1, 2)
    return out.view(B, H, T, C).transpose(1, 2)

# %% [markdown]
# ### What is refused
#
# Two mistakes deserve words of our own. If $H$ is no multiple of $G$, the
# heads cannot be shared out. A mask of zeros and $-\infty$, as other programs
# add it to the scores, holds no booleans to invert, and a mask for other
# lengths might be stretched to fit, which would give numbers and no error. So
# the mask must be of booleans and its last two sizes T and S. Both are
# ValueErrors, which first say what we expected and then what we found, the
# sizes plain: `heads: expected H a multiple of G, found 3, 2`, or, where an
# additive mask came for one text of three tokens, `mask: expected bool (1 or
# 1, 3, 3), found torch.float32 (1, 3, 3)`.

# %% tags=["export"]
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

# %% [markdown]
# Our three tokens again, now as one text with one head; then an additive
# mask:

# %%
one_head = [part[None, :, None] for part in (q, k, v)]  # (1, 3, 1, 2)
a = scores(*one_head[:2], causal[None], 2 ** -0.5)
out = mix(a.softmax(-1), one_head[2])
print("`lamp` scores ", [round(n, 2) for n in a[0, 0, 1].tolist()])
print("`the` takes   ", [round(n, 2) for n in out[0, 2, 0].tolist()])
torch.testing.assert_close(out[0, :, 0], attend(q, k, v, causal))
try:
    scores(*one_head[:2], torch.zeros(1, 3, 3), 1.0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# **Torch's own attention** is the judge: `scaled_dot_product_attention` with
# `enable_gqa=True` shares keys as {eq}`scores-group` says. It wants heads
# before tokens. 40 cases of random sizes, in which every query sees its own
# key and some others:

# %%
import torch.nn.functional as F

far = {torch.float32: 0.0, torch.float64: 0.0}
bound = {torch.float32: 5e-6, torch.float64: 1e-13}
for seed in range(40):
    g = torch.Generator().manual_seed(seed)
    B, T, more, groups, R, width = (
        int(torch.randint(1, n, (), generator=g)) for n in (4, 9, 9, 4, 5, 33))
    S, heads = T + more, groups * R
    q3, k3, v3 = (torch.randn(shape, generator=g, dtype=torch.float64)
                  for shape in ((B, T, heads, width), (B, S, groups, width),
                                (B, S, groups, width)))
    seen = torch.rand(B, T, S, generator=g) < 0.5
    seen.diagonal(dim1=-2, dim2=-1).fill_(True)
    for dtype in far:
        inputs = [part.to(dtype) for part in (q3, k3, v3)]
        ours = mix(scores(*inputs[:2], seen, width ** -0.5).softmax(-1),
                   inputs[2])
        torchs = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in inputs),
            attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)
        far[dtype] = max(far[dtype], (ours - torchs).abs().max().item())
print("ours  ", [round(n, 4) for n in ours[0, 0, 0, :4].tolist()])
print("torch ", [round(n, 4) for n in torchs[0, 0, 0, :4].tolist()])
for dtype, most in bound.items():
    assert far[dtype] < most
    print(f"40 cases in {str(dtype)[6:]}: never further apart than {most}")

# %% [markdown]
# **Stacked is repeated.** The slow and obvious form, in which every query
# head gets a copy of its keys:

# %%
q3, k3 = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
seen = torch.rand(2, 5, 7) < 0.7
repeated = k3.repeat_interleave(4, dim=2)
plain = torch.einsum("bthc,bshc->bhts", q3, repeated) * 0.25
plain = plain.masked_fill(~seen[:, None], -torch.inf)
stacked = scores(q3, k3, seen, 0.25)
torch.testing.assert_close(stacked, plain)
print("stacked", [round(n, 3) for n in stacked[0, 5, 0, :4].tolist()])
print("copied ", [round(n, 3) for n in plain[0, 5, 0, :4].tolist()])

# %% [markdown]
# **The past stands still**, for grouped heads too: a text of nine tokens
# read at once, and read token by token with kept keys and values.

# %%
q3, k3, v3 = (torch.randn(1, 9, n, 16) for n in (8, 2, 2))
triangle = torch.ones(1, 9, 9, dtype=torch.bool).tril()
at_once = mix(scores(q3, k3, triangle, 0.25).softmax(-1), v3)
for t in range(9):
    so_far = triangle[:, t:t + 1, :t + 1]
    a = scores(q3[:, t:t + 1], k3[:, :t + 1], so_far, 0.25)
    row = mix(a.softmax(-1), v3[:, :t + 1])
    torch.testing.assert_close(row[:, 0], at_once[:, t])
print("at once, last row  ",
      [round(n, 3) for n in at_once[0, -1, 0, :4].tolist()])
print("one by one, the same",
      [round(n, 3) for n in row[0, -1, 0, :4].tolist()])

# %% [markdown]
# **The sentence again.** We put our `scores` and `mix` into the attention of
# [the page](../one_page.ipynb). Between them stands the softmax that it has,
# with one [sink](sinks.ipynb) more in every row, which comes later:

# %%
from gptoss.one_page import SENTENCE, sentence, visible


def with_ours(q, k, v, sinks, window):
    seen = visible(torch.arange(len(q)), torch.arange(len(q)), window)
    a = scores(q[None], k[None], seen[None], q.shape[-1] ** -0.5)
    sink = sinks[:, None, None].expand(1, -1, len(q), 1)
    shares = torch.cat([a, sink], -1).softmax(-1)[..., :-1]
    return mix(shares, v[None])[0]


retold = sentence(12, attention=with_ours)
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## What is still missing
#
# This is attention as it was published in 2017 {cite}`attention2017`, plus
# shared keys. gpt-oss adds three things, one a chapter. Attention as it
# stands does not know in which order the tokens come (the third exercise
# shows it): [RoPE](rope.ipynb) turns queries and keys by their positions.
# The shares of a row always sum to one, so a head must take something even
# if nothing fits: [sinks](sinks.ipynb) let it decline. And a row with no
# visible key at all would be $0/0$; that, too, a sink repairs. In every
# second layer the triangle is cut down to the last 128 keys:
# [masks](masks.ipynb).
#
# ## Cost
#
# A score is $C$ multiplications and $C$ additions, and mixing costs the same
# for every pair of a query and a key:
#
# $$
# 4\,B\,T\,S\,H\,C \quad \text{FLOPs}, \qquad
# 4\,B\,H\,T\,S \quad \text{bytes of scores in fp32} .
# $$ (scores-cost)
#
# The projections {eq}`scores-views` grow with the number of tokens, these
# with its square. We let torch count, and then put in the 20b's numbers:

# %%
from torch.utils.flop_counter import FlopCounterMode

with FlopCounterMode(display=False) as counter:
    mix(scores(q3, k3, triangle, 0.25).softmax(-1), v3)
print("counted", counter.get_total_flops(), "= 4 x 9 x 9 x 8 x 16 =",
      4 * 9 * 9 * 8 * 16)
assert counter.get_total_flops() == 4 * 9 * 9 * 8 * 16
tokens = config.max_position_embeddings
visible = H * tokens * (tokens + 1) // 2
print(f"{tokens:,} tokens, one full layer of the 20b:")
print(f"  scores of visible keys {visible / 1e9:.0f} billion")
print(f"  all scores at once, in fp32 {4 * H * tokens ** 2 / 1e12:.1f} TB")

# %% [markdown]
# Nobody stores those terabytes: queries are taken some at a time, as a row of
# scores depends on no other row. And nobody wants to form them all, which is
# why half the layers see 128 keys only.
#
# ## Takeaways
#
# - A query says what a token looks for, a key what one offers, a value what
#   it hands over. Score = query times key, share = softmax of the scores,
#   output = values mixed by shares.
# - Without the division by $\sqrt C$ a wide head gives nearly everything to
#   one key before it has learnt anything.
# - Nobody looks ahead, so keys and values of the past never change and can
#   be kept. Query head $h$ uses key head $\lfloor hG/H \rfloor$; in gpt-oss
#   eight query heads share one, and what is kept is eight times smaller.
#
# ## Exercises
#
# ### Exercise 1
#
# In the example with three tokens, which query $(c, 0)$ makes `the` take
# 90 % from `Mira`? Work it out on paper first: the scores are
# $2c/\sqrt2$, $0$ and $c/\sqrt2$.

# %% tags=["hide-cell"]
# with u = exp(c / √2): u² = 0.9 (u² + 1 + u), so u² - 9u - 9 = 0
u = (9 + (81 + 36) ** 0.5) / 2
c = 2 ** 0.5 * torch.tensor(u).log()
a = torch.tensor([2 * c, 0, c]) / 2 ** 0.5
print(f"c = {c:.3f}, shares", [round(n, 3) for n in a.softmax(0).tolist()])

# %% [markdown]
# ### Exercise 2
#
# Somebody divides by $C = 64$ instead of by 8. What becomes of the
# deviation of random scores, and how much does the most favoured of 128 keys
# get? What is wrong with that?

# %% tags=["hide-cell"]
a = (torch.randn(2000, 1, 64) * torch.randn(2000, 128, 64)).sum(-1) / 64
largest = a.softmax(-1).amax(-1).mean()
print(f"deviation {a.std():.3f}, largest share {largest:.3f},",
      f"an even share {1 / 128:.3f}")
print("hardly anybody is favoured: it is the average of the first attempt")

# %% [markdown]
# ### Exercise 3
#
# Leave the mask away and shuffle the tokens. What happens to the outputs?
# What does that say about "fox bites dog" and "dog bites fox"?

# %% tags=["hide-cell"]
order = torch.tensor([2, 0, 1])
straight, shuffled = attend(q, k, v), attend(q[order], k[order], v[order])
for n, row in zip(order, shuffled, strict=True):
    print(f"{names[n]:5}", [round(r, 2) for r in row.tolist()],
          "before:", [round(r, 2) for r in straight[n].tolist()])
torch.testing.assert_close(shuffled, straight[order])
print("the same rows, shuffled: without positions both sentences are one")

# %% [markdown]
# ### Exercise 4
#
# A port shares keys by $h \bmod G$ instead of $\lfloor hG/H \rfloor$. Shapes
# fit, nothing crashes. Which of the 64 query heads get the right keys all
# the same?

# %% tags=["hide-cell"]
lucky = [h for h in range(64) if h % 8 == h * 8 // 64]
print(len(lucky), "of 64:", lucky)

# %% [markdown]
# ## Sources
#
# - Scaled dot-product attention and heads: {cite}`attention2017`, section
#   3.2, whose footnote 4 has the variance argument; shared keys:
#   {cite}`gqa2023`; the model: {cite}`gptoss2025`.
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `AttentionBlock`, `sdpa`.
# - d2l-ai/d2l-en, the section on attention scoring functions: the same from
#   another side, with exercises.
