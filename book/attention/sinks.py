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
#   gptoss: {module: sinks, public: [attention_concat, attention_flash]}
# ---

# %% [markdown]
# # Sinks: attention that may decline
#
# ## Question
#
# A head compares its query with 128 keys, none of them fits, and every
# score is $-20$. How much do the 128 values weigh in what the head adds to
# the text? In ordinary attention: exactly as much as if every score were
# $+20$, because softmax sees only differences. With one more logit in the
# denominator, a learned number per head, here $0$: $2.6 \cdot 10^{-7}$.
#
# gpt-oss has such a number in every head of every layer, `self_attn.sinks`.
# In the 20b they weigh 3 kB in all, and when the model came out, vLLM
# did not start it on cards for which its attention kernel knew no sinks
# ([vllm#22331][v]). Where do sinks enter, and what does a kernel that does
# not know them need?
#
# [v]: https://github.com/vllm-project/vllm/issues/22331
#
# ## Picture
#
# Two heads of the model that ships with the package, on the first sentences
# of a story. A row is a query. The map shows what it gives to each key, the
# bar beside it what the sink takes, and together they make one.

# %% tags=["hide-input", "picture"]
# Figure: two heads on a text of 43 tokens: the weights as a map, and what
# the sink takes as a bar beside each row. The first has dark cells far from
# the diagonal, its bars are long in the first sentence only. The second is
# pale nearly everywhere, and nearly all of its bars are long.
import math
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
trace = trace_ours(GptOss.from_pretrained(pocket, dtype=torch.float32),
                   torch.tensor([ids]))
every = {(layer, head): trace[layer, "weights"][:, head]
         for layer in range(4) for head in range(8)}
asks, lamp = len(words) - 3, words.index("lamp")
measures = {  # the head that is largest in it is drawn
    "fetches what may come next": lambda w: w[asks, lamp],
    "mostly declines": lambda w: (w.sum(-1) < 0.5).sum() * w.max()}
fig, axes = plt.subplots(1, 4, figsize=(7.4, 5.4), sharey=True,
                         width_ratios=[5, 1.2] * 2)
declined = []
for (says, measure), left, right in zip(
        measures.items(), axes[::2], axes[1::2], strict=True):
    layer, head = max(every, key=lambda key: measure(every[key]).item())
    left.imshow(every[layer, head], cmap="Blues", vmin=0, vmax=1,
                aspect="auto")
    left.set(title=f"layer {layer}, head {head}: {says}", xlabel="key")
    left.set_xticks(range(0, len(ids), 5))
    sink = 1 - every[layer, head].sum(-1)
    right.barh(range(len(ids)), sink, height=0.9, color="C1")
    right.set(xlim=(0, 1), xticks=(0, 1), xlabel="to the sink")
    for ax in (left, right):
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
    declined.append((sink > 0.5).sum().item())
axes[0].annotate("`the` takes the lamp", (lamp, asks), (1, asks - 4.5),
                 fontsize=8, arrowprops={"arrowstyle": "-", "color": "C1"})
axes[0].set_yticks(range(len(ids)), words, fontsize=7)
axes[0].set(ylabel="query, from top to bottom")
plt.show()
print(f"of {len(ids)} queries, more than half to the sink: {declined[0]} in "
      f"the first head, {declined[1]} in the second")

# %% [markdown]
# What to see: the first head fetches a word that may come next. The `the`
# before the last `lamp` takes from the first `lamp`. (A dot is a full stop,
# or the blank piece that this tokenizer puts before some words, names among
# them; there the head fetches the first `Mira`.) In the first sentence there
# is nothing to fetch yet, and the sink takes most. The second head has
# something to say at a few tokens, the dark cells, and declines at all the
# others.
#
# ## The naive version
#
# Two attempts. The first is attention [as we have built
# it](scores.ipynb), which has no sink. A query that no key fits gets what it
# would get if all did:

# %%
values = torch.randn(128, 64)
hopeless, perfect = torch.full((128,), -20.0), torch.full((128,), 20.0)
for name, row in (("hopeless", hopeless), ("perfect", perfect)):
    said = row.softmax(0) @ values
    print(f"a {name:8} row says", [round(n, 3) for n in said[:4].tolist()])

# %% [markdown]
# To say nothing, such a head needs a key to waste its weight on. To leave
# 1 % to $n = 128$ keys of score 0, one key must score
# $\ln(128 \cdot 99) = 9.4$, and its value must be near zero. Trained models
# grow one: the first token, which every query sees. StreamingLLM
# {cite}`sinks2023` named it an attention sink, and found that a model with
# a sliding window breaks down once that token leaves the window; its
# remedy keeps the first four tokens in the cache for ever. In gpt-oss
# half of the layers slide: there, position 128 no longer sees position 0.
# Its sink has no such trouble. It is a parameter: no token, no key, no
# value, no position, no slot in the cache, and the same number for every
# query.

# %%
print(f"one key must score {math.log(128 * 99):.1f}")

# %% [markdown]
# The second attempt adds the sink's exponential to the denominator and
# computes the fraction as it stands:

# %%
def naive(scores, sinks):
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    return weights / total


sinks = torch.tensor([0.0, 2.0])
for value, dtype in ((0, torch.float32), (100, torch.float32),
                     (12, torch.float16)):
    weights = naive(torch.full((2, 1, 3), value, dtype=dtype), sinks)
    print(f"scores {value:3} in {str(dtype)[6:]}: weights of one key",
          [f"{w:.2f}" for w in weights[:, 0, 0].tolist()])

# %% [markdown]
# `exp(100)` is infinite in fp32, `exp(12)` in fp16. Softmax is usually saved
# from this by taking the largest score off all of them first, which changes
# no weight. We must do the same, and the sink must take part in the maximum:
# a row whose keys are all masked has no finite maximum of its own.
#
# ## Derivation
#
# One head, one query: scores $a_1 \dots a_S$ (scaled; $-\infty$ where a key
# is masked), values $v_j$, sink $s$. The weights and the output are
#
# $$
# p_j = \frac{e^{a_j}}{e^{s} + \sum_i e^{a_i}}, \qquad
# o = \sum_j p_j v_j .
# $$ (sinks-softmax)
#
# Say two keys with scores 1 and 0, and a sink of 1. The powers of $e$ are
# 2.72, 1 and 2.72, together 6.44: the keys get 0.42 and 0.16, the sink
# keeps 0.42, and without it they would have got 0.73 and 0.27. Three ways to
# compute this follow, since the world has three kinds of attention code:
# some hold all scores, some return only a sum of them, some never hold more
# than a few.

# %%
powers = torch.tensor([1.0, 0.0, 1.0]).exp()
shares = powers / powers.sum(), powers[:2] / powers[:2].sum()
for name, row in zip(("powers", "with a sink", "without"),
                     (powers, *shares), strict=True):
    print(f"{name:12}", [round(n, 2) for n in row.tolist()],
          f"sum {row.sum():.2f}")

# %% [markdown]
# **Form 1, concat.** {eq}`sinks-softmax` is a softmax over $S + 1$ logits
# $(a_1, \dots, a_S, s)$ of which the last weight is thrown away; or, which
# is the same, the sink is one more key, of constant score, whose value is
# zero.
#
# **Form 2, rescale.** With $\ell = \ln \sum_i e^{a_i}$, the log-sum-exp,
# divide numerator and denominator by $e^{\ell}$:
#
# $$
# p_j = e^{a_j - \ell} \cdot \frac{1}{1 + e^{s - \ell}}
#     = \operatorname{softmax}(a)_j \cdot \sigma(\ell - s) .
# $$ (sinks-rescale)
#
# $\sigma(x) = 1 / (1 + e^{-x})$. The factor depends on no $j$: it goes in
# front of the sum, $o = \sigma(\ell - s)\,\bar o$ with $\bar o$ the output
# of ordinary attention. So any kernel that returns $\ell$ beside $\bar o$
# can serve gpt-oss, and $\sigma(s - \ell)$ is what the sink takes.
# In the example $\ell = \ln 3.72 = 1.31$, and $\sigma(1.31 - 1) = 0.58$ of
# everything is kept: $0.58 \cdot 0.73 = 0.42$. For $n$ keys of one score
# $a$, $\ell = a + \ln n$, which draws the next figure.

# %%
lse = torch.tensor([1.0, 0.0]).logsumexp(0)
kept = torch.sigmoid(lse - 1)
print(f"lse {lse:.2f}, kept {kept:.2f}, first key {kept * 0.7311:.2f}")

# %% tags=["hide-input"]
# Figure: left, the weight of the values over the score of 128 keys: always
# one without a sink, a step from zero to one with it, further right for a
# larger sink. Right, the weight of the sink falls as more keys are seen.
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
level = torch.linspace(-20, 20, 400)
left.plot(level, torch.ones(400), color="C0")
left.text(-19.5, 0.93, "no sink", color="C0")
for sink, color in ((-4, "C3"), (0, "C1"), (4, "C2")):
    kept = torch.sigmoid(level + math.log(128) - sink)
    left.plot(level, kept, color=color)
    left.text(sink - 4.4, 0.62 - 0.05 * sink, f"sink {sink}", color=color,
              ha="center", backgroundcolor="white", fontsize=8)
left.set(xlabel="the score of all 128 keys", ylabel="weight of the values",
         ylim=(-0.03, 1.03))
n = 2 ** torch.arange(18)
for sink, color, at in ((0, "C1", 3), (4, "C2", 170), (8, "C5", 8000)):
    right.plot(n, 1 / (1 + n * math.exp(-sink)), color=color)
    right.text(at, 0.33, f"sink {sink}", color=color, fontsize=8)
right.axvline(128, color="black", lw=0.8, ls=":")
right.text(150, 0.95, "window")
right.set(xscale="log", xlabel="keys seen, all of score 0",
          ylabel="weight of the sink", ylim=(-0.03, 1.03))
plt.show()

# %% [markdown]
# What to see: left, $n = 128$: without a sink the weights of the values sum
# to one, whatever the scores are; with a sink they fall to zero when no key
# fits. Right: what the sink takes shrinks as more keys are seen. A sliding
# layer never sees more than 128, so there a sink keeps its force in a long
# text.
#
# <div class="live" data-live="sinks">In the web book, sliders move a sink,
# and all scores of a row together, here.</div>
#
# **Form 3, online.** Keys that arrive in chunks are folded into a running
# maximum $m$, sum $z$ and output $u$ {cite}`flash2022`. For a chunk with
# scores $a$ and $m' = \max(m, \max_j a_j)$,
#
# $$
# z' = e^{m - m'} z + \sum_j e^{a_j - m'}, \quad
# u' = e^{m - m'} u + \sum_j e^{a_j - m'} v_j, \quad
# o = u / z .
# $$ (sinks-online)
#
# By form 1 the sink is a key like any other with value zero, so it goes
# first: $m = s$, $z = e^{s - m} = 1$, $u = 0$. This start is finite and $z$
# is positive; the row without any visible key, $0/0$ in other kernels, comes
# out as $0$ with no special case. For training, let gradients run through
# $m$: written with a detached $m$ and a plain $1$, the same lines would give
# the sink no gradient.
#
# **Gradients.** The derivative of $\sigma(x)$ is $\sigma(x)\,\sigma(-x)$,
# so that of $o = \sigma(\ell - s)\,\bar o$ is
#
# $$
# \frac{\partial o}{\partial s}
#   = -\sigma(\ell - s)\,\sigma(s - \ell)\;\bar o = -\sigma(s - \ell)\; o .
# $$ (sinks-grad)
#
# A sink learns only while it takes a share and the head says something. For
# the scores, form 1 is a softmax, with
# $\partial p_i / \partial a_j = p_i\,([i = j] - p_j)$. With $g$ the
# gradient of the loss by $o$,
#
# $$
# \frac{\partial \mathcal{L}}{\partial a_j}
#   = p_j \,\bigl(g^\top v_j - g^\top o\bigr), \qquad
# p_j = e^{a_j - \ell'}, \quad \ell' = \ln(e^{\ell} + e^{s}) .
# $$ (sinks-backward)
#
# This is the backward formula of ordinary attention with $\ell'$ in the
# place of $\ell$ and the rescaled $o$ in the place of the plain one. A
# backward kernel takes both as inputs, so it too can be used unchanged.
#
# ## Code
#
# ### Form 1: how does the sink join the softmax?
#
# As one more column, dropped afterwards. The result has the type of the
# scores, whatever that is.

# %% tags=["export"]
import torch
from torch import Tensor


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """Softmax over S keys and one sink: (…, H, T, S), (H,) -> (…, H, T, S).

    The sink's share is dropped, so a row sums to less than one. Masked
    scores are -inf; a row of nothing but -inf gives 0. Any float dtype.
    Source: openai/gpt-oss gpt_oss/torch/model.py, sdpa.
    """
    column = _column(sinks, scores).unsqueeze(-1)
    column = column.expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]

# %% [markdown]
# One case needs a helper. A sink of $-\infty$ means "no sink", and in a row
# without a visible key there would then be no finite logit at all, $0/0$. So
# a sink is never taken lower than the lowest finite number of the type in
# hand: its weight beside any visible key is $e^{-3 \cdot 10^{38}} = 0$, and
# when there is no other it takes everything.

# %% tags=["export"]
def _column(sinks: Tensor, like: Tensor) -> Tensor:
    """Sinks (H,) -> (H, 1) in like.dtype, never below its lowest number."""
    lowest = torch.finfo(like.dtype).min
    return sinks.to(like.dtype).clamp_min(lowest).unsqueeze(-1)

# %% [markdown]
# Torch's softmax takes the maximum off, the sink included. The row of the
# question, a row where the naive version overflowed, and an empty one:

# %%
rows = torch.stack([hopeless, torch.full((128,), 100.0),
                    torch.full((128,), -torch.inf)])[None]
weight = softmax_with_sink(rows, torch.zeros(1)).sum(-1)
print("weight of the values:", [f"{w:.1e}" for w in weight[0].tolist()])
no_sink = softmax_with_sink(rows, torch.tensor([-torch.inf])).sum(-1)
print("and without a sink:  ", [f"{w:.0f}" for w in no_sink[0].tolist()])

# %% [markdown]
# The whole form 1 is then three calls. `scores` and `mix` are those of [who
# looks at whom](scores.ipynb): grouped heads, fp32 or wider inside, and the
# two refusals (H no multiple of G, a mask that is not of booleans or does not
# fit), which hold for every form. The result is rounded once, at the very end,
# to the type of the queries.

# %% tags=["export"]
from gptoss.attention.scores import check_heads_and_mask, mix, scores


def attention_concat(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float) -> Tensor:
    """Attention with sinks, concat form: -> (B, T, H, C) in q.dtype.

    q (B, T, H, C); k, v (B, S, G, C), query head h uses key head
    h // (H // G); sinks (H,); mask bool (B or 1, T, S), true = visible.
    Computed in fp32 (float64 for float64) from q to the one rounding at the
    end. A row with no visible key gives 0. Memory O(B H T S).
    ValueError: H not a multiple of G, a mask of another shape or dtype.
    """
    weights = softmax_with_sink(scores(q, k, mask, scale), sinks)
    return mix(weights, v).to(q.dtype)

# %%
q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((5, 8), (7, 2),
                                                         (7, 2)))
seen, sinks = torch.rand(2, 5, 7) < 0.7, torch.randn(8)
seen[1, 4] = False  # the last query of the second text sees nothing
out = attention_concat(q, k, v, sinks, seen, 0.25)
print(tuple(out.shape), "the empty row:", out[1, 4, 0, :3].tolist())

# %% [markdown]
# ### Form 2: what does a kernel have to return?
#
# Only $\ell$, as (B, H, T) in natural logarithms, beside its output
# (B, T, H, C), which must be 0 where a row sees no key. There $\ell$ is
# $-\infty$, and the sink takes 1.

# %% tags=["export"]
def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What the sink takes of each row: (…, H, T), (H,) -> (…, H, T), 0..1.

    lse is the log-sum-exp of the row's scores, -inf for an empty row.
    """
    return torch.sigmoid(_column(sinks, lse) - lse)


def rescale(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add sinks to the result of any attention that returns its lse.

    out (B, T, H, C) of attention without sinks, 0 in empty rows; lse
    (B, H, T), natural logarithm, of its scaled scores. Returns out's shape
    and dtype.
    """
    kept = torch.sigmoid(lse - _column(sinks, lse)).transpose(1, 2)
    return (out * kept.unsqueeze(-1)).to(out.dtype)


def attention_rescale(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                      mask: Tensor, scale: float) -> Tensor:
    """`attention_concat` as plain attention and then `rescale`."""
    a = scores(q, k, mask, scale)
    lse = a.logsumexp(-1)
    # finite even for an empty row: exp(-inf - lowest) = 0, not NaN
    floor = lse.clamp_min(torch.finfo(lse.dtype).min)
    out = mix((a - floor.unsqueeze(-1)).exp(), v)
    return rescale(out, lse, sinks).to(q.dtype)

# %% [markdown]
# `rescale` multiplies by $\sigma(\ell - s)$, not by $1 - \sigma(s - \ell)$:
# the two are equal on paper, but $1 - x$ for $x$ near one keeps few digits
# (10 % off below), and that is the case in which a head declines.

# %%
again = attention_rescale(q, k, v, sinks, seen, 0.25)
torch.testing.assert_close(again, out)
print("form 1:   ", [round(n, 4) for n in out[0, 0, 0, :4].tolist()])
print("form 2:   ", [round(n, 4) for n in again[0, 0, 0, :4].tolist()])
lse = torch.tensor([[-20.0 + math.log(128)]])
print(f"kept:      {torch.sigmoid(lse).item():.2e}")
print(f"1 - share: {1 - sink_share(lse, torch.zeros(1)).item():.2e}")

# %% [markdown]
# ### Form 3: what if only a few keys fit into memory?
#
# Three running numbers a row, {eq}`sinks-online`, and `chunk` keys at a time.
# Fewer than one is a ValueError: `chunk: expected at least 1`.

# %% tags=["export"]
def attention_online(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float, chunk: int = 64) -> Tensor:
    """`attention_concat` with `chunk` keys at a time: O(B H T chunk) memory.

    The running maximum and sum of a row start as if the sink had been its
    first key, with a value of zero. ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, found {chunk}")
    check_heads_and_mask(q, k, mask)
    B, T, H, C = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, T, H, C, dtype=wide, device=q.device)
    top = _column(sinks, out).expand(B, H, T)
    total = torch.ones_like(top)
    for s in range(0, k.shape[1], chunk):
        keys = slice(s, s + chunk)
        a = scores(q, k[:, keys], mask[..., keys], scale)
        higher = torch.maximum(top, a.amax(-1))
        shrink = (top - higher).exp()
        weights = (a - higher.unsqueeze(-1)).exp()
        total = total * shrink + weights.sum(-1)
        out = out * shrink.transpose(1, 2).unsqueeze(-1)
        out = out + mix(weights, v[:, keys])
        top = higher
    return (out / total.transpose(1, 2).unsqueeze(-1)).to(q.dtype)

# %%
for chunk in (1, 3, 7, 100):
    online = attention_online(q, k, v, sinks, seen, 0.25, chunk)
    torch.testing.assert_close(online, out)
    print(f"{chunk:3} keys at a time:",
          [round(n, 4) for n in online[0, 0, 0, :4].tolist()])

# %% [markdown]
# ### Can a kernel serve that knows nothing of sinks?
#
# Torch carries a tiled attention for CPUs which returns $\ell$ beside its
# output: the operator `_scaled_dot_product_flash_attention_for_cpu` behind
# `scaled_dot_product_attention`. It wants heads before tokens, takes grouped
# heads as they are, and a mask as a bias to add, 0 or $-\infty$, in the type
# of the queries. Form 2 makes it a kernel for gpt-oss, and
# {eq}`sinks-backward` makes a backward of the operator that ends in
# `_backward`: it is handed the rescaled output and $\ell'$. Only the sink's
# own gradient needs writing, {eq}`sinks-grad` summed over all rows. In an
# empty row the kernel returns zeros and $\ell = 0$, not $-\infty$, but zeros
# stay zeros whatever $\sigma(\ell - s)$ is.

# %% tags=["export"]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)


class _FlashWithSinks(torch.autograd.Function):
    """Torch's CPU kernel, rescaled; heads before tokens, as it wants them."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, bias, scale):
        out, lse = _flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        out = rescale(out.transpose(1, 2), lse, sinks).transpose(1, 2)
        ctx.save_for_backward(q, k, v, sinks, bias, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, bias, out, lse = ctx.saved_tensors
        column = _column(sinks, lse)
        dq, dk, dv = _flash_backward(
            grad, q, k, v, out, torch.logaddexp(lse, column), 0.0, False,
            attn_mask=bias, scale=ctx.scale)
        said = (grad.to(lse.dtype) * out).sum(-1)
        ds = -(sink_share(lse, sinks) * said).sum((0, 2))
        return dq, dk, dv, ds.to(sinks.dtype), None, None

# %% [markdown]
# The operator exists on a CPU only, so tensors elsewhere are a ValueError
# (`attention_flash: expected cpu, found meta`). Nothing else is checked.

# %% tags=["export"]
def attention_flash(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                    mask: Tensor, scale: float) -> Tensor:
    """`attention_concat` by torch's CPU kernel and `rescale`; it trains.

    Memory O(B T S) for the mask, none for scores. In bf16 the kernel rounds
    its weights and its output before the rescaling: less exact than the
    other forms. ValueError: tensors that are not on a CPU.
    """
    if q.device.type != "cpu":
        raise ValueError(f"attention_flash: expected cpu, found {q.device}")
    check_heads_and_mask(q, k, mask)
    bias = torch.zeros(mask.shape, dtype=q.dtype)
    bias = bias.masked_fill_(~mask, -torch.inf).unsqueeze(1)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = _FlashWithSinks.apply(*heads_first, sinks, bias, scale)
    return out.transpose(1, 2)

# %% [markdown]
# What goes wrong without the class? Autograd does not know that $\ell$
# depends on `q` and `k` (`lse` requires no gradient). So plain `rescale` on
# the kernel's output gives the right output, the right gradients for `v` and
# for the sink, and wrong ones for `q` and `k`, without a word. The smallest
# case has one key: $q = k = 1$, $v = 2$, $s = 0$.

# %%
def without_the_class(q, k, v, sinks, mask, scale):
    bias = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
    out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, False,
                      attn_mask=bias[:, None], scale=scale)
    return rescale(out.transpose(1, 2), lse, sinks)


print("gradient of            q       k       v       s")
for attention in (attention_concat, attention_flash, without_the_class):
    leaves = [torch.full(shape, value).double().requires_grad_()
              for shape, value in (((1, 1, 1, 1), 1.0), ((1, 1, 1, 1), 1.0),
                                   ((1, 1, 1, 1), 2.0), ((1,), 0.0))]
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    grads = torch.autograd.grad(attention(*leaves, one, 1.0).sum(), leaves)
    print(f"{attention.__name__:17}",
          *(f"{g.item():8.4f}" for g in grads))
    assert (abs(grads[0].item() - 0.3932) < 1e-4) == (
        attention is not without_the_class)

# %% [markdown]
# Zero, where 0.3932 is right. pytorch/torchtitan, which trains gpt-oss, had
# exactly this in 2026, and gives this case ([torchtitan#4796][n]).
#
# [n]: https://github.com/pytorch/torchtitan/pull/4796

# %% [markdown]
# ## It holds
#
# All forms against the first one, in fp32 and in float64: random sizes,
# grouped heads, masks with empty rows, sinks up to $\pm 10^4$ and
# $-\infty$.

# %%
forms = {
    "rescale": attention_rescale,
    "online, 1 key": lambda *a: attention_online(*a, chunk=1),
    "online, 5 keys": lambda *a: attention_online(*a, chunk=5),
    "flash": attention_flash,
}
bound = {torch.float32: 5e-6, torch.float64: 1e-12}
worst = {dtype: dict.fromkeys(forms, 0.0) for dtype in bound}
empty = cases = 0
for seed in range(60):
    g = torch.Generator().manual_seed(seed)
    B, T, S, G, R, C = (int(torch.randint(1, n, (), generator=g))
                        for n in (4, 9, 20, 4, 5, 33))
    tensors = [torch.randn(shape, generator=g).double() for shape in (
        (B, T, G * R, C), (B, S, G, C), (B, S, G, C), (G * R,))]
    tensors[0] *= 3
    tensors[3] += (0, 1e4, -1e4, -math.inf)[seed % 4]
    mask = torch.rand(B, T, S, generator=g) < torch.rand((), generator=g)
    for dtype in bound:
        inputs = [x.to(dtype) for x in tensors] + [mask, C ** -0.5]
        first = attention_concat(*inputs)
        assert first.isfinite().all()
        assert (first[~mask.any(-1)] == 0).all()
        for name, form in forms.items():
            delta = (form(*inputs) - first).abs().max().item()
            worst[dtype][name] = max(worst[dtype][name], delta)
        cases += len(forms)
    empty += int((~mask.any(-1)).sum())
for dtype, found in worst.items():
    assert max(found.values()) < bound[dtype], found
    print(f"{str(dtype)[6:]}: forms never further apart than {bound[dtype]}")
print(cases, "comparisons,", empty, "empty rows, all 0, no NaN")

# %% [markdown]
# A sink of $-\infty$ is no sink, and the derivatives are those of finite
# differences (`gradcheck`, float64), all four inputs, all four forms:

# %%
import torch.nn.functional as F

nothing = torch.full((8,), -torch.inf)
seen[..., 0] = True  # torch's own has 0 / 0 in empty rows
sdpa = F.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen[:, None],
    enable_gqa=True).transpose(1, 2)
plain = attention_concat(q, k, v, nothing, seen, 0.25)
torch.testing.assert_close(plain, sdpa)

small = [torch.randn(s).double().requires_grad_()
         for s in ((1, 3, 4, 2), (1, 5, 2, 2), (1, 5, 2, 2), (4,))]
few = torch.tensor([[[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]) > 0
for form in (attention_concat, *forms.values()):
    assert torch.autograd.gradcheck(lambda *x, f=form: f(*x, few, 0.5), small)
share = sink_share(scores(*small[:2], few, 0.5).logsumexp(-1), small[3])
by_hand = -share.transpose(1, 2)[..., None] * attention_concat(
    *small, few, 0.5)
tangent = torch.func.jvp(
    lambda s: attention_concat(*small[:3], s, few, 0.5), (small[3],),
    (torch.ones(4).double(),))[1]
torch.testing.assert_close(tangent, by_hand)
print("gradient of a sink, -share x output:",
      [round(n, 4) for n in by_hand[0, 0, :, 0].tolist()])

# %% [markdown]
# **The sentence again:** every form, put into [the page](../one_page.ipynb).

# %%
from gptoss.one_page import SENTENCE, sentence, visible

for form in (attention_concat, *forms.values()):
    def ours(q, k, v, sinks, window, form=form):
        mask = visible(*[torch.arange(len(q))] * 2, window)[None]
        return form(q[None], k[None], v[None], sinks, mask,
                    q.shape[-1] ** -0.5)[0]

    retold = sentence(12, attention=ours)
    assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Against the others
#
# Hugging Face's `eager_attention_forward` and OpenAI's formula (the
# einsums of `sdpa`, in our words), causal, fp32:

# %%
from types import SimpleNamespace

from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward,
)


def hugging_face(q, k, v, sinks, mask, scale):
    layer = SimpleNamespace(
        sinks=sinks, training=False,
        num_key_value_groups=q.shape[2] // k.shape[2])
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(
        ~mask, torch.finfo(q.dtype).min)
    return eager_attention_forward(
        layer, *(x.transpose(1, 2) for x in (q, k, v)), bias[:, None],
        scale)[0]


def openai(q, k, v, sinks, mask, scale):
    B, T, H, C = q.shape
    G = k.shape[2]
    a = torch.einsum("btgrc,bsgc->bgrts", q.view(B, T, G, H // G, C), k)
    a = a * scale + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(
        ~mask, -torch.inf)[:, None, None]
    s = sinks.view(1, G, H // G, 1, 1).expand(B, -1, -1, T, -1)
    p = torch.softmax(torch.cat([a, s], -1), -1)[..., :-1]
    return torch.einsum("bgrts,bsgc->btgrc", p, v).flatten(2, 3)


def draw(seed, spread, B=1, T=192, H=8, G=1, C=64):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, C), (B, T, G, C), (B, T, G, C), (H,)
    q, *rest = (torch.randn(s, generator=g) for s in shapes)
    causal = torch.ones(1, T, T, dtype=torch.bool).tril()
    return [spread * q, *rest, causal, C ** -0.5]


for other in (hugging_face, openai):
    delta = max(
        (attention_concat(*x) - other(*x)).abs().max().item()
        for x in (draw(s, 2.0, B=2, T=40, G=2) for s in range(10)))
    assert delta < 5e-6
    print(f"{other.__name__:12} 10 cases, never further apart than 5e-06")

# %% [markdown]
# (sinks-rounding)=
# ### In bf16
#
# Here implementations differ, and float64 is the judge. Random bf16 inputs;
# the queries are multiplied so that the scores have standard deviation 1
# to 8:

# %%
def rms_error(attention, inputs):
    exact = attention_concat(
        *(x.double() for x in inputs[:4]), *inputs[4:])
    return (attention(*inputs).double() - exact).square().mean().sqrt()


def rounded_once(*inputs):
    return attention_concat(
        *(x.double() for x in inputs[:4]), *inputs[4:]).bfloat16()


def scores_in_bf16(q, k, v, sinks, mask, scale):
    """Ours, but the scores leave their product in bf16."""
    a = scores(q, k, mask, scale).bfloat16().float()
    return mix(softmax_with_sink(a, sinks), v).to(q.dtype)


judged = {"ours": attention_concat, "flash": attention_flash,
          "ours, scores in bf16": scores_in_bf16,
          "Hugging Face": hugging_face, "OpenAI": openai,
          "one rounding": rounded_once}
spreads = (1, 2, 4, 8)
errors = {name: [] for name in judged}
for spread in spreads:
    batch = [[x.bfloat16() for x in case[:4]] + case[4:]
             for case in (draw(seed, spread) for seed in range(5))]
    for name, attention in judged.items():
        found = torch.stack([rms_error(attention, x) for x in batch])
        errors[name].append(found.median().item())

# %% tags=["hide-input"]
# Figure: error against float64 over the spread of the scores. Ours lies on
# the dashed line of one rounding, flash a little above; Hugging Face, OpenAI
# and ours with scores in bf16 start twice as high and end six times as high.
fig, ax = plt.subplots(figsize=(7, 3.2))
for name, color, style, text in (
        ("Hugging Face", "C5", "^-", "Hugging Face, OpenAI (alike)"),
        ("OpenAI", "C1", "v:", ""),
        ("ours, scores in bf16", "C3", "s-", "ours, but scores in bf16"),
        ("flash", "C2", "D-", "flash"),
        ("ours", "C0", "o-", "ours"),
        ("one rounding", "C6", "--", "")):
    ax.plot(spreads, errors[name], style, ms=4, color=color)
    ax.text(8.4, errors[name][-1], text, color=color, va={
        "ours, scores in bf16": "top", "Hugging Face": "bottom",
        "ours": "top", "flash": "bottom"}.get(name, "center"))
ax.text(1.5, 3.2e-4, "dashed: the exact result, rounded once")
ax.set(xscale="log", yscale="log", xlabel="standard deviation of the scores",
       ylabel="rms error against float64", xlim=(0.95, 22),
       ylim=(2.5e-4, 1.3e-2))
ax.set_xticks(spreads, [str(s) for s in spreads])
ax.minorticks_off()
plt.show()

# %%
assert all(a < 1.001 * b for a, b in
           zip(errors["ours"], errors["one rounding"], strict=True))
ratio = [h / o for h, o in
         zip(errors["Hugging Face"], errors["ours"], strict=True)]
alone = [a / h for a, h in zip(errors["ours, scores in bf16"],
                               errors["Hugging Face"], strict=True)]
print("deviation  HF's error over ours  of it from rounding scores alone")
for spread, r, part, least in zip(spreads, ratio, alone, (1.5, 2.5, 3.5, 5),
                                  strict=True):
    assert r > least and part > 0.75
    print(f"{spread:6}{'more than':>17} {least:3}{'more than':>21} 0.75")

# %% [markdown]
# What to see: ours lies on the dashed line of the exact result rounded once;
# nothing better fits into bf16. Most of the error of the two others is the
# rounding of the scores: with it alone, and a softmax in fp32, our code loses
# nearly as much. A score of 10 in bf16 is off by up to 0.03, which is 3 % of a
# weight, and no later fp32 brings that back.
#
# ### Known trouble
#
# - [flash-attention#1797][f1] asks for the sink in that library; the answer
#   in August 2025 was that no version had a backward. By
#   {eq}`sinks-rescale` and {eq}`sinks-backward` a kernel need not know the
#   sink, forward or backward, if it returns $\ell$, as these do anyway.
# - [flash-attention#404][f2] and [#1137][f3]: the gradient of the returned
#   $\ell$ is dropped. This is the silent error shown above.
# - [torchtitan#2211][t], an open pull request, calls $\sigma(\ell - s)$
#   "mathematically incorrect" and puts $e^{\ell - \ell'}$ in its place.
#   By {eq}`sinks-rescale` they are one function; transformers'
#   `integrations/flex_attention.py` writes the second, torchtitan the
#   first.
# - StreamingLLM's sinks are tokens that stay in the cache. A runtime that
#   offers "attention sinks" in that sense (MLC's `attention_sink_size`, for
#   one) does not thereby have what gpt-oss needs.
#
# [f1]: https://github.com/Dao-AILab/flash-attention/issues/1797
# [f2]: https://github.com/Dao-AILab/flash-attention/issues/404
# [f3]: https://github.com/Dao-AILab/flash-attention/issues/1137
# [t]: https://github.com/pytorch/torchtitan/pull/2211
#
# ## In the 20b and the 120b

# %%
from gptoss.weights.config import GptOssConfig

for name, c in (("20b", GptOssConfig.gpt_oss_20b()),
                ("120b", GptOssConfig.gpt_oss_120b())):
    H, L = c.num_attention_heads, c.num_hidden_layers
    print(f"{name:4}: {H} sinks x {L} layers = {H * L}, {2 * H * L} bytes")

# %% [markdown]
# ## Cost
#
# The scores and the mixing cost what they cost without sinks, $4 B T S H C$
# FLOPs ([scores](scores.ipynb)). The sink adds one exponential a row,
# $B T H$ of them, and form 2 the multiplication of $B T H C$ outputs: $1/(4S)$
# of the whole, for 128 keys a five-hundredth. Form 1 holds $B H T S$ scores;
# form 3 only $B H T$ times its chunk; the flash form none, but the mask as a
# bias. [The operator](../model/operators.ipynb) calls `attention_concat` on
# some queries at a time.
#
# ## Takeaways
#
# - A sink is one more logit in the softmax whose value is zero: a head may
#   say less than everything, or nothing.
# - $\sigma(\ell - s)$ turns any attention kernel that returns its
#   log-sum-exp into one with sinks; for training, hand its backward the
#   rescaled output and $\ln(e^\ell + e^s)$.
# - In bf16, widen queries and keys before their product.
#
# ## Exercises
#
# ### Exercise 1
#
# "Softmax off by one" puts $1 + \sum_i e^{a_i}$ in the denominator. Which
# sink is it? And which sink makes a head that sees $n$ keys of score 0 give
# them exactly half of its weight?

# %% tags=["hide-cell"]
a = torch.randn(1, 4, 10).double()
off_by_one = a.exp() / (1 + a.exp().sum(-1, keepdim=True))
zero = torch.zeros(1).double()
torch.testing.assert_close(softmax_with_sink(a, zero), off_by_one)
# e^s = n: the sink must weigh as much as the n keys together
half = softmax_with_sink(torch.zeros(1, 1, 10), torch.tensor([math.log(10)]))
torch.testing.assert_close(half.sum(-1), torch.full((1, 1), 0.5))
print(f"s = 0; and s = ln n: 10 keys get {half[0, 0].sum():.3f} with ln 10")

# %% [markdown]
# ### Exercise 2
#
# A decoder splits the keys among $P$ workers. Worker $p$ returns an output
# and a log-sum-exp $\ell'_p$ that already contain the sink, and the outputs
# are averaged with weights $e^{\ell'_p}$. The sink now counts $P$ times.
# Which sink must be handed to the workers instead?

# %% tags=["hide-cell"]
x = [t.double() for t in draw(0, 1.0, T=48)[:4]] + draw(0, 1.0, T=48)[4:]
P, parts = 3, []
for part in range(P):
    keys = slice(part * 16, part * 16 + 16)
    own = x[3] - math.log(P)  # P e^(s - ln P) = e^s
    lse = scores(x[0], x[1][:, keys], x[4][..., keys], x[5]).logsumexp(-1)
    parts.append((
        attention_concat(x[0], x[1][:, keys], x[2][:, keys], own,
                         x[4][..., keys], x[5]),
        torch.logaddexp(lse, own[:, None])))
share = torch.stack([p[1] for p in parts]).softmax(0).transpose(2, 3)
merged = sum(s[..., None] * p[0] for s, p in zip(share, parts, strict=True))
torch.testing.assert_close(merged, attention_concat(*x))
print("s - ln P: three parts, merged, are the whole")

# %% [markdown]
# ### Exercise 3
#
# Your kernel returns no log-sum-exp. A key row of zeros scores 0, not $s$,
# and no fixed key row scores $s$ for every query. Find a way that uses
# `F.scaled_dot_product_attention` alone. (Give $q$, $k$ and $v$ one channel
# more.)

# %% tags=["hide-cell"]
q, k, v, sinks, mask, scale = x
# channel C: 1 in every query, 0 in every key, s / scale in the sink's key
heads = k.new_zeros(1, 1, 8, 65)
heads[..., -1] = sinks / scale
wide_q = F.pad(q, (0, 1), value=1.0)
wide_k = torch.cat([F.pad(k, (0, 1)).expand(-1, -1, 8, -1), heads], 1)
wide_v = F.pad(v, (0, 1, 0, 0, 0, 1)).expand(-1, -1, 8, -1)
got = F.scaled_dot_product_attention(
    *(t.transpose(1, 2) for t in (wide_q, wide_k, wide_v)),
    attn_mask=F.pad(mask, (0, 1), value=True)[:, None], scale=scale)
torch.testing.assert_close(got.transpose(1, 2)[..., :64],
                           attention_concat(*x))
print("torch, one key and one channel more: equal to the form with the sink")

# %% [markdown]
# ## Sources
#
# - gpt-oss: `gpt_oss/torch/model.py`, `sdpa`; its card {cite}`gptoss2025`.
# - transformers: `eager_attention_forward`, `integrations/flex_attention.py`.
# - pytorch/torchtitan: `models/gpt_oss/model.py`, the rescaled form.
# - Sinks as tokens, and a learned one: {cite}`sinks2023`. Online softmax
#   and the backward from $\ell$: {cite}`flash2022`.
