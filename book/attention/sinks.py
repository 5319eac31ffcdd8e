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
# In the 20b they weigh 3 kB of 13.8 GB, and most fast attention kernels did
# not know them when the model came out. Where do they enter, and what does
# a kernel that does not know them need?
#
# ## Picture
#
# The model that ships with the package drew this: three of its 32 heads on the
# first sentences of a story. A row is a query; the map shows what it gives to
# each key, the bar what the sink takes, and together they make one.

# %% tags=["hide-input", "picture"]
# Figure: three heads of the shipped model on a text of 43 tokens: the
# weights as a map, and what the sink takes as a bar beside each row. The
# first looks at the token before and its bars are empty. The second has
# dark cells far back. The third is pale, and most of its bars are long.
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
at, named = len(words) - 3, [words.index(w) for w in ("Mira", "lamp")]
measures = {  # the head that is largest in it is drawn
    "the token before": lambda w: w.diagonal(-1).mean(),
    "what may come next": lambda w: w[at, named[1]],
    "often nothing": lambda w: (w.sum(-1) < 0.5).sum() * w.max()}
fig, axes = plt.subplots(1, 6, figsize=(7.4, 5.2), sharey=True,
                         width_ratios=[5, 1.1] * 3)
declined = []
for (says, measure), left, right in zip(
        measures.items(), axes[::2], axes[1::2], strict=True):
    layer, head = max(every, key=lambda key: measure(every[key]).item())
    left.imshow(every[layer, head], cmap="Blues", vmin=0, vmax=1,
                aspect="auto")
    left.set_title(f"layer {layer}, head {head}:\n{says}", fontsize=9)
    left.set_xticks(named, ["Mira", "lamp"], rotation=90)
    sink = 1 - every[layer, head].sum(-1)
    right.barh(range(len(ids)), sink, height=0.9, color="C1")
    right.set(xlim=(0, 1), xticks=(0, 1), title="sink")
    for ax in (left, right):
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
    declined.append((sink > 0.5).sum().item())
axes[0].set_yticks(range(len(ids)), words, fontsize=7)
axes[0].set(ylabel="query", xlabel="key")
plt.show()
print("queries that leave more than half to the sink:", declined)

# %% [markdown]
# What to see: the first head always knows where to look, at the token
# before, and its sink gets next to nothing. The second fetches a word that
# may come next: the `the` before the last `lamp` looks at the first `lamp`,
# a blank (·), after which names come, at the first `Mira`. In the first
# line there is little to fetch, and the sink takes most. The third has
# something to say at a few tokens, the dark cells; at three tokens of
# four it leaves more than half of its weight to the sink.
#
# ## The naive version
#
# Two attempts. The first is attention as everybody has it, which ignores
# the sink. A query that no key fits gets what it would get if all did:

# %%
values = torch.randn(128, 64)
hopeless, perfect = torch.full((128,), -20.0), torch.full((128,), 20.0)
said = [row.softmax(0) @ values for row in (hopeless, perfect)]
print("a hopeless row says what a perfect row says:", torch.equal(*said))

# %% [markdown]
# To say nothing, such a head needs a key to waste its weight on. To leave
# 1 % to $n = 128$ keys of score 0, one key must score
# $\ln(128 \cdot 99) = 9.4$ and its value must be near zero. Trained models
# grow one: the first token, which every query sees. StreamingLLM
# {cite}`sinks2023` named it an attention sink, and found that a model with
# a sliding window breaks down once that token leaves the window; its
# remedy keeps the first four tokens in the cache for ever. In gpt-oss
# half of the layers slide, and position 128 no longer sees position 0. So
# here the sink is a parameter: no token, no key, no value, no position, no
# slot in the cache, and the same number for every query.
#
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
# `exp(100)` is infinite in fp32, `exp(12)` in fp16. The maximum must be
# taken off first, and the sink must take part in it: a row whose keys are
# all masked has no finite maximum of its own.
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
# For $n$ keys of one score $a$, $\ell = a + \ln n$:

# %% tags=["hide-input"]
# Figure: left, the weight of the values over the score of 128 keys: always
# one without a sink, a step from zero to one with it, further right for a
# larger sink. Right, the weight of the sink falls as more keys are seen.
fig, (left, right) = plt.subplots(1, 2)
level = torch.linspace(-20, 20, 400)
left.plot(level, torch.ones(400), label="no sink")
for sink, color in ((-4, "C3"), (0, "C1"), (4, "C2")):
    kept = torch.sigmoid(level + math.log(128) - sink)
    left.plot(level, kept, color=color, label=f"sink {sink}")
left.set(xlabel="the score of all 128 keys", ylabel="weight of the values",
         ylim=(-0.03, 1.08))
left.legend(loc="center right")
n = 2 ** torch.arange(18)
for sink, color in ((0, "C1"), (4, "C2"), (8, "C5")):
    right.plot(n, 1 / (1 + n * math.exp(-sink)), color=color,
               label=f"sink {sink}")
right.axvline(128, color="black", lw=0.8, ls=":")
right.text(150, 0.55, "window")
right.set(xscale="log", xlabel="keys seen, all of score 0",
          ylabel="weight of the sink")
right.legend(loc="upper right", bbox_to_anchor=(1, 0.88))
plt.show()

# %% [markdown]
# Left, $n = 128$: without a sink the weights of the values sum to one,
# whatever the scores are; with a sink they fall to zero when no key fits.
# Right: what the sink takes shrinks as more keys are seen. A sliding layer
# never sees more than 128, so there the sink keeps its force in a long text.
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
# first: $m = s$, $z = 1$, $u = 0$. This start is finite and $z$ is
# positive; the row without any visible key, $0/0$ in other kernels, comes
# out as $0$ with no special case.
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
# ### A softmax with a sink

# %% tags=["export"]
import torch
from torch import Tensor


def _column(sinks: Tensor, like: Tensor) -> Tensor:
    """Sinks (H,) -> (H, 1) in like.dtype, never below its lowest number.

    A sink of -inf (no sink) would leave a row without visible keys with no
    finite logit, 0 / 0. The lowest finite number weighs exp(-3e38) = 0
    beside any visible key and takes everything when there is none.
    """
    lowest = torch.finfo(like.dtype).min
    return sinks.to(like.dtype).clamp_min(lowest).unsqueeze(-1)


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
# ### Scores and mixing with grouped heads
#
# Query head $h$ uses key head $\lfloor h / (H/G) \rfloor$. Repeating the
# keys $H/G = 8$ times would copy the cache eight times over at each step.
# Instead the queries that share a key head are stacked: $(H/G) \cdot T$
# rows against one $(S, C)$ matrix, one larger product instead of eight.

# %% tags=["export"]
def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, H, T, S), fp32 or wider, -inf where mask is false.

    The H / G query heads that share a key head are stacked along T: the
    keys are never repeated.
    """
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    if H % G:
        raise ValueError(f"heads: expected H a multiple of G, found {H}, {G}")
    if mask.shape[1:] != (T, S) or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool ({B} or 1, {T}, {S}), found "
                         f"{mask.dtype} {tuple(mask.shape)}")
    wide = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(wide) * scale).view(B, T, G, H // G, C)
    q = q.permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, C)
    scores = (q @ k.to(wide).permute(0, 2, 3, 1)).view(B, H, T, S)
    return scores.masked_fill_(~mask.unsqueeze(1), -torch.inf)


def _mix(probs: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values: (B, H, T, S), (B, S, G, C) -> (B, T, H, C)."""
    B, H, T, S = probs.shape
    G, C = v.shape[2:]
    grouped = probs.reshape(B, G, H // G * T, S)
    out = grouped @ v.to(probs.dtype).transpose(1, 2)
    return out.view(B, H, T, C).transpose(1, 2)

# %% [markdown]
# Widening `q` and `k` to fp32 before the product, not the scores after it,
# is what accuracy hangs on in bf16; a
# {ref}`comparison below <sinks-rounding>` measures it. The stacking agrees
# with repeated keys:

# %%
q, k = torch.randn(2, 5, 8, 16), torch.randn(2, 7, 2, 16)
seen = torch.rand(2, 5, 7) < 0.7
repeated = k.repeat_interleave(4, dim=2)
plain = torch.einsum("bthc,bshc->bhts", q, repeated) * 0.25
plain = plain.masked_fill(~seen[:, None], -torch.inf)
torch.testing.assert_close(_scores(q, k, seen, 0.25), plain)
print(tuple(plain.shape), "stacked = repeated")

# %% [markdown]
# ### Form 1: concat

# %% tags=["export"]
def attention_concat(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float) -> Tensor:
    """Attention with sinks, concat form: -> (B, T, H, C) in q.dtype.

    q (B, T, H, C); k, v (B, S, G, C), query head h uses key head
    h // (H // G); sinks (H,); mask bool (B or 1, T, S), true = visible.
    Computed in fp32 (float64 for float64) from q to the one rounding at the
    end. A row with no visible key gives 0. Memory O(B H T S).
    ValueError: H not a multiple of G, a mask of another shape or dtype.
    """
    probs = softmax_with_sink(_scores(q, k, mask, scale), sinks)
    return _mix(probs, v).to(q.dtype)

# %%
v, sinks = torch.randn(2, 7, 2, 16), torch.randn(8)
out = attention_concat(q, k, v, sinks, seen, 0.25)
print(tuple(out.shape), out.dtype)

# %% [markdown]
# ### Form 2: rescale

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
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    # finite even for an empty row: exp(-inf - lowest) = 0, not NaN
    floor = lse.clamp_min(torch.finfo(lse.dtype).min)
    out = _mix((scores - floor.unsqueeze(-1)).exp(), v)
    return rescale(out, lse, sinks).to(q.dtype)

# %% [markdown]
# `rescale` multiplies by $\sigma(\ell - s)$, not by $1 - \sigma(s - \ell)$:
# the two are equal on paper, but $1 - x$ for $x$ near one keeps few digits
# (10 % off below), and that is the case in which a head declines.

# %%
torch.testing.assert_close(attention_rescale(q, k, v, sinks, seen, 0.25), out)
lse = torch.tensor([[-20.0 + math.log(128)]])
print(f"kept:      {torch.sigmoid(lse).item():.2e}")
print(f"1 - share: {1 - sink_share(lse, torch.zeros(1)).item():.2e}")

# %% [markdown]
# ### Form 3: online

# %% tags=["export"]
def attention_online(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     mask: Tensor, scale: float, chunk: int = 64) -> Tensor:
    """`attention_concat` with `chunk` keys at a time: O(B H T chunk) memory.

    The running maximum and sum of a row start as if the sink had been its
    first key, with a value of zero. ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, found {chunk}")
    B, T, H, C = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, T, H, C, dtype=wide, device=q.device)
    top = _column(sinks, out).expand(B, H, T)
    total = torch.ones_like(top)
    for s in range(0, k.shape[1], chunk):
        keys = slice(s, s + chunk)
        scores = _scores(q, k[:, keys], mask[..., keys], scale)
        higher = torch.maximum(top, scores.amax(-1))
        shrink = (top - higher).exp()
        weights = (scores - higher.unsqueeze(-1)).exp()
        total = total * shrink + weights.sum(-1)
        out = out * shrink.transpose(1, 2).unsqueeze(-1)
        out = out + _mix(weights, v[:, keys])
        top = higher
    return (out / total.transpose(1, 2).unsqueeze(-1)).to(q.dtype)

# %%
for chunk in (1, 3, 7, 100):
    torch.testing.assert_close(
        attention_online(q, k, v, sinks, seen, 0.25, chunk), out)
print("chunks of 1, 3, 7 and 100 keys: equal")

# %% [markdown]
# ### A kernel that knows nothing of sinks
#
# Torch carries a tiled attention for CPUs which returns $\ell$ beside its
# output (the operator behind `scaled_dot_product_attention`; it takes
# grouped heads as they are). Form 2 makes it a kernel for gpt-oss, and
# {eq}`sinks-backward` makes its backward one.

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
# The only thing that needs writing is the sink's own gradient,
# {eq}`sinks-grad` summed over all rows.

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
    bias = torch.zeros(mask.shape, dtype=q.dtype)
    bias = bias.masked_fill_(~mask, -torch.inf).unsqueeze(1)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = _FlashWithSinks.apply(*heads_first, sinks, bias, scale)
    return out.transpose(1, 2)

# %% [markdown]
# What goes wrong without the class: autograd does not know that $\ell$
# depends on `q` and `k` (`lse` requires no gradient), so plain `rescale` on
# the kernel's output gives the right output, the right gradient for `v`
# and for the sink, and wrong ones for `q` and `k`, without a word.

# %%
leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
grad = torch.randn(2, 5, 8, 16, dtype=torch.float64)


def gradients(attention):
    return torch.autograd.grad(attention(*leaves, seen, 0.25), leaves, grad)


def without_the_class(q, k, v, sinks, mask, scale):
    bias = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
    out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, False,
                      attn_mask=bias[:, None], scale=scale)
    return rescale(out.transpose(1, 2), lse, sinks)


seen[..., 0] = True  # no empty rows, which are another matter
exact = gradients(attention_concat)
for attention in (attention_flash, without_the_class):
    off = [not torch.allclose(a, b, atol=1e-10)
           for a, b in zip(gradients(attention), exact, strict=True)]
    print(f"{attention.__name__:18} wrong:",
          [n for n, bad in zip("qkvs", off, strict=True) if bad])

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
print(cases, "comparisons,", empty, "empty rows, all 0, no NaN")

# %% [markdown]
# A sink of $-\infty$ is no sink, and the derivatives are those of finite
# differences (`gradcheck`, float64), all four inputs, all four forms:

# %%
import torch.nn.functional as F

nothing = torch.full((8,), -torch.inf)
sdpa = F.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, repeated, v.repeat_interleave(4, 2))),
    attn_mask=seen[:, None]).transpose(1, 2)
torch.testing.assert_close(
    attention_concat(q, k, v, nothing, seen, 0.25), sdpa)

small = [torch.randn(s).double().requires_grad_()
         for s in ((1, 3, 4, 2), (1, 5, 2, 2), (1, 5, 2, 2), (4,))]
few = torch.tensor([[[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]) > 0
for form in (attention_concat, *forms.values()):
    assert torch.autograd.gradcheck(lambda *x, f=form: f(*x, few, 0.5), small)
share = sink_share(_scores(*small[:2], few, 0.5).logsumexp(-1), small[3])
by_hand = -share.transpose(1, 2)[..., None] * attention_concat(
    *small, few, 0.5)
tangent = torch.func.jvp(
    lambda s: attention_concat(*small[:3], s, few, 0.5), (small[3],),
    (torch.ones(4).double(),))[1]
torch.testing.assert_close(tangent, by_hand)
print("sink -inf = torch's attention; gradients hold")

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
        layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        bias[:, None], scale)[0]


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
    print(f"{other.__name__:12} max |Δ| below 5e-6:", delta < 5e-6)

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
    a = _scores(q, k, mask, scale).bfloat16().float()
    return _mix(softmax_with_sink(a, sinks), v).to(q.dtype)


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
# the curve of one rounding, flash a little above; Hugging Face, OpenAI and
# ours with scores in bf16 start twice as high and end six times as high.
fig, ax = plt.subplots()
for (name, line), mark in zip(errors.items(), "osv^xD", strict=True):
    dashed = {"ls": "--"} if name in ("one rounding", "OpenAI") else {}
    ax.plot(spreads, line, marker=mark, ms=4, label=name, **dashed)
ax.set(xscale="log", yscale="log", xlabel="standard deviation of the scores",
       ylabel="rms error against float64", xticks=spreads)
ax.set_xticks(spreads, [str(s) for s in spreads])
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
assert all(a < 1.001 * b for a, b in
           zip(errors["ours"], errors["one rounding"], strict=True))
ratio = [h / o for h, o in
         zip(errors["Hugging Face"], errors["ours"], strict=True)]
least = 1.5, 2.5, 3.5, 5
assert all(r > bound for r, bound in zip(ratio, least, strict=True))
print("HF's error is more than", least, "times ours")
alone = [a / h for a, h in zip(errors["ours, scores in bf16"],
                               errors["Hugging Face"], strict=True)]
print("from rounding the scores alone, more than 75 % of it:",
      min(alone) > 0.75)
assert min(alone) > 0.75

# %% [markdown]
# Ours lies on the dashed line of the exact result rounded once: nothing
# better fits into bf16. Most of the error of the two others is the rounding
# of the scores: with it alone, and a softmax in fp32, our code loses nearly
# as much. A score of 10 in bf16 is off by up to 0.03, which is 3 % of a
# weight, and no later fp32 brings that back.
#
# ### Known trouble
#
# - [vllm#22331][v]: `Sinks are only supported in FlashAttention 3`, so
#   gpt-oss did not start on cards without it. [flash-attention#1797][f1]
#   asks for the sink in that library; the answer in August 2025 was that
#   no version had a backward. By {eq}`sinks-rescale` and
#   {eq}`sinks-backward` a kernel need not know the sink, forward or
#   backward, if it returns $\ell$, as these do anyway.
# - [flash-attention#404][f2] and [#1137][f3]: the gradient of the returned
#   $\ell$ is dropped. This is the silent error shown above.
# - [torchtitan#2211][t], an open pull request, calls $\sigma(\ell - s)$
#   "mathematically incorrect" and puts $e^{\ell - \ell'}$ in its place.
#   By {eq}`sinks-rescale` they are one function; transformers'
#   `integrations/flex_attention.py` writes the second, torchtitan the
#   first:
#
# [v]: https://github.com/vllm-project/vllm/issues/22331
# [f1]: https://github.com/Dao-AILab/flash-attention/issues/1797
# [f2]: https://github.com/Dao-AILab/flash-attention/issues/404
# [f3]: https://github.com/Dao-AILab/flash-attention/issues/1137
# [t]: https://github.com/pytorch/torchtitan/pull/2211

# %%
lse = torch.linspace(-50, 50, 1001).double()
for s in torch.linspace(-30, 30, 61).double():
    torch.testing.assert_close(
        (lse - torch.logaddexp(lse, s)).exp(), torch.sigmoid(lse - s))
print("one function at", 61 * 1001, "points")

# %% [markdown]
# - StreamingLLM's sinks are tokens that stay in the cache. A runtime that
#   offers "attention sinks" in that sense (MLC's `attention_sink_size`, for
#   one) does not thereby have what gpt-oss needs.
#
# ## In the 20b and the 120b

# %%
from gptoss.weights.config import GptOssConfig

for name, c in (("20b", GptOssConfig.gpt_oss_20b()),
                ("120b", GptOssConfig.gpt_oss_120b())):
    H, G, L = (c.num_attention_heads, c.num_key_value_heads,
               c.num_hidden_layers)
    print(f"{name:4}: {H} sinks x {L} layers = {H * L}, {2 * H * L} bytes")
tokens = c.max_position_embeddings
kv = 2 * tokens * G * c.head_dim * 2
print(f"keys and values of one full layer, {tokens} tokens, bf16: "
      f"{kv / 1e9:.2f} GB")
print(f"the same repeated for {H} heads: {kv * H // G / 1e9:.2f} GB")
print(f"its scores, fp32, all at once: {4 * H * tokens ** 2 / 1e12:.1f} TB")

# %% [markdown] The last line is why [the operator](../model/operators.ipynb)
# calls `attention_concat` on some queries at a time, and the line before it
# why the keys are not repeated.
#
# ## Cost
#
# Scores and mixing cost $4 B T S H C$ FLOPs (a multiply and an add each); the
# sink adds one exponential a row, $B T H$ of them, and form 2 the
# multiplication of $B T H C$ outputs: $1/(4S)$ of the whole. The sinks
# themselves are $2H$ bytes a layer. Masked keys cost as much as seen ones
# here; the ring of [the cache](../model/remembering.ipynb) keeps the sliding
# layers from having many.

# %%
from torch.utils.flop_counter import FlopCounterMode

B, T, S, H, G, C = 2, 16, 48, 8, 2, 32
inputs = (torch.randn(B, T, H, C), torch.randn(B, S, G, C),
          torch.randn(B, S, G, C), torch.zeros(H),
          torch.ones(1, T, S, dtype=torch.bool), C ** -0.5)
for form in (attention_concat, attention_rescale, attention_online):
    with FlopCounterMode(display=False) as counter:
        form(*inputs)
    assert counter.get_total_flops() == 4 * B * T * S * H * C
print(4 * B * T * S * H * C, "FLOPs in each form")

# %% [markdown]
# ## Takeaways
#
# - A sink is one more logit in the softmax whose value is zero: a head may
#   say less than everything, or nothing.
# - $\sigma(\ell - s)$ turns any attention kernel that returns its
#   log-sum-exp into one with sinks; for training, hand its backward the
#   rescaled output and $\ln(e^\ell + e^s)$.
# - In bf16, widen queries and keys before their product: rounding the
#   scores makes more than three quarters of the others' error.
#
# ## Exercises
#
# ### Exercise 1
#
# "Softmax off by one" puts $1 + \sum_i e^{a_i}$ in the denominator. Which
# sink is it? And which sink makes a head that sees $n$ keys of score 0 give
# them exactly half of its weight?

# %% tags=["hide-cell"]
scores = torch.randn(1, 4, 10).double()
off_by_one = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
zero = torch.zeros(1).double()
torch.testing.assert_close(softmax_with_sink(scores, zero), off_by_one)
# e^s = n: the sink must weigh as much as the n keys together
half = softmax_with_sink(torch.zeros(1, 1, 10), torch.tensor([math.log(10)]))
torch.testing.assert_close(half.sum(-1), torch.full((1, 1), 0.5))
print("s = 0, and s = ln n")

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
    lse = _scores(x[0], x[1][:, keys], x[4][..., keys], x[5]).logsumexp(-1)
    parts.append((
        attention_concat(x[0], x[1][:, keys], x[2][:, keys], own,
                         x[4][..., keys], x[5]),
        torch.logaddexp(lse, own[:, None])))
share = torch.stack([p[1] for p in parts]).softmax(0).transpose(2, 3)
merged = sum(s[..., None] * p[0] for s, p in zip(share, parts, strict=True))
torch.testing.assert_close(merged, attention_concat(*x))
print("s - ln P")

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
print("one key and one channel more")

# %% [markdown]
# ### Exercise 4
#
# A head's $\ell$ and $\bar o$ are given. At which $s$ does it learn its
# sink fastest, and how many times slower is it at 10 more? Use
# {eq}`sinks-grad`.

# %% tags=["hide-cell"]
# |do/ds| = σ(s - ℓ) σ(ℓ - s) |plain output|: largest, 1/4, at s = ℓ
gap = torch.arange(-1200, 1201).double() / 100
speed = torch.sigmoid(gap) * torch.sigmoid(-gap)
assert gap[speed.argmax()].abs() < 1e-9 and (speed.max() - 0.25).abs() < 1e-12
print(f"at s = ℓ; 10 above, {0.25 / speed[2200].item():.0f} times slower")

# %% [markdown]
# ## Sources
#
# - OpenAI, gpt-oss: `gpt_oss/torch/model.py`, `sdpa`; the model card
#   {cite}`gptoss2025`.
# - transformers: `models/gpt_oss/modeling_gpt_oss.py`,
#   `eager_attention_forward`; `integrations/flex_attention.py`.
# - pytorch/torchtitan: `models/gpt_oss/model.py`, the rescaled form.
# - Sinks as tokens, and a learned one: {cite}`sinks2023`. Online softmax
#   and the backward from $\ell$: {cite}`flash2022`. Grouped heads:
#   {cite}`gqa2023`.
