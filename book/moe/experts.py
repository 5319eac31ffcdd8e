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
#     module: experts
#     public: [clamped_swiglu, experts_grouped]
# ---

# %% [markdown]
# # Experts
#
# ## Question
#
# A router has named 4 of 32 experts for each token. How does a token pass
# through its four without anybody touching, or copying, the other 28?
#
# The experts are nine tenths of gpt-oss-20b. The shortest correct program
# copies each token's four experts to that token and multiplies. For a prompt
# of 512 tokens these copies take **102 GB** in every layer, of a model whose
# file has 13.8.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from gptoss.weights import sizes
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
one = sizes.expert_size(small)
experts = sizes.parameter_counts(small)["experts"]
print(f"one expert has {one:,} parameters, all have {experts:,}: "
      f"{experts / sizes.total_parameters(small):.0%} of the model")
print(f"512 tokens x 4 experts in bf16: {512 * 4 * one * 2 / 1e9:.0f} GB; "
      f"the file: {sizes.checkpoint_bytes(small) / 1e9:.1f} GB")

# %% [markdown]
# ## Picture
#
# Seven tokens, five experts, two choices a token. The colour of a row is the
# expert that is asked. Each token is written down twice, once for each choice
# (we call such a row a *pick*). The picks are sorted by expert; each expert
# then computes all its rows in one go; and the results are added back to the
# tokens they belong to.

# %% tags=["hide-input"]
# Figure: four columns. Seven tokens; their fourteen picks in the order of the
# tokens, colours mixed; the picks sorted, so that each colour is one stretch
# beside a box for its expert; seven results again. Lines join each row to its
# place in the next column.
E, K, N = 5, 2, 7
ids = torch.tensor([[1, 4], [0, 4], [2, 1], [4, 0], [1, 2], [4, 1], [2, 4]])
order = ids.flatten().argsort(stable=True).tolist()
place = {pick: at for at, pick in enumerate(order)}
fig, ax = plt.subplots(figsize=(7.4, 4.0))
for n in range(N):
    for x, word in ((0, "token"), (9, "result")):
        ax.add_patch(plt.Rectangle((x, 2 * n + 0.35), 1.2, 1.3, fc="0.92",
                                   ec="0.6"))
        ax.text(x + 0.6, 2 * n + 1, f"{word} {n}", ha="center", va="center",
                fontsize=8)
for pick in range(N * K):
    n, color, at = pick // K, f"C{ids.flatten()[pick]}", place[pick]
    ax.plot((1.2, 2), (2 * n + 1, pick + 0.5), color="0.7", lw=0.8)
    ax.plot((3, 4.4), (pick + 0.5, at + 0.5), color=color, lw=1.2)
    ax.plot((7.1, 9), (at + 0.5, 2 * n + 1), color=color, lw=1.2)
    for x, y in ((2, pick), (4.4, at)):
        ax.add_patch(plt.Rectangle((x, y + 0.08), 1, 0.84, color=color))
        ax.text(x + 0.5, y + 0.5, str(n), ha="center", va="center",
                color="white", fontsize=8, weight="bold")
load = torch.bincount(ids.flatten(), minlength=E).tolist()
for e in range(E):
    first = sum(load[:e])
    if load[e]:
        ax.add_patch(plt.Rectangle((5.5, first + 0.08), 1.6, load[e] - 0.16,
                                   fc="white", ec=f"C{e}", lw=2))
        ax.text(6.3, first + load[e] / 2, f"expert {e}", ha="center",
                va="center", fontsize=8)
for x, title in ((0.6, "tokens"), (2.5, "picks"), (4.9, "sorted"),
                 (6.3, "experts"), (9.6, "added up")):
    ax.text(x, -0.5, title, ha="center")
ax.set(xlim=(-0.1, 10.3), ylim=(14.2, -1))
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: after the sort every colour is one stretch. An expert is
# fetched once, whatever the number of its rows, and one that nobody chose
# (number 3) is not fetched at all. Nothing of an expert is copied; what moves
# are rows of tokens, which are small.
#
# ## The naive version
#
# **A loop over the choices** is correct, and we keep it as the reference.
# But it fetches an expert for each of the NK picks, where at most E fetches
# are needed. **A gather** (`weights[ids]`) fetches them all at once, which is
# the 102 GB above.

# %%
tokens, chosen = 512, torch.rand(512, 32).topk(4).indices
print(f"{tokens} tokens: {chosen.numel():,} picks, "
      f"{len(chosen.unique())} different experts among them")

# %% [markdown]
# **The activation from memory** is the other trap. Inside an expert one
# matrix makes 2F numbers, F pairs of a *gate* and an *up*, and an activation
# makes one number of each pair. Most models with such pairs store all gates
# first and all ups after them, so the reflex is `chunk`, then the textbook's
# SwiGLU {cite}`glu2020`. Every shape is right. Here the rows alternate, gate
# and up, and the function is another. How much has the guess to do with the
# truth? Correlate them:

# %%
gate_up = torch.randn(1000, 64)


def textbook_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


guess = textbook_swiglu(gate_up)
gate, up = gate_up[:, ::2], gate_up[:, 1::2]  # what the rows really are
truth = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(
    1.702 * gate.clamp(max=7))
pair = torch.stack([guess.flatten(), truth.flatten()])
print(f"shapes {tuple(guess.shape)} and {tuple(truth.shape)}, correlation "
      f"{torch.corrcoef(pair)[0, 1].abs():.1f}")

# %% [markdown]
# Nothing. And it happened: vLLM's CPU path assumed gates first and wrote
# garbage ([vllm#29273](https://github.com/vllm-project/vllm/pull/29273)).
#
# ## Derivation
#
# ### What does an expert compute?
#
# One pair by hand. The gate is 2, the up is 1. The logistic function
# $\sigma(x) = 1 / (1 + e^{-x})$ gives $\sigma(1.702 \cdot 2) = 0.968$. So the
# gate lets $2 \cdot 0.968 = 1.936$ through, the up multiplies it by
# $1 + 1 = 2$, and the unit says 3.87. With a gate of $-2$ it is
# $-2 \cdot 0.032 \cdot 2 = -0.13$: nearly shut.
#
# In general the activation $a$ turns $z \in \mathbb{R}^{2F}$ into F numbers.
# With $\ell = 7$ and $\alpha = 1.702$,
#
# $$ g_i = \min(z_{2i}, \ell), \quad
#    u_i = \max(-\ell, \min(z_{2i+1}, \ell)), \quad
#    a_i(z) = (u_i + 1)\; g_i\, \sigma(\alpha g_i) . $$ (experts-swiglu)
#
# This *clamped SwiGLU* stands between two matrices with biases:
#
# $$ f_e(x) = W^\mathrm{down}_e\, a(W^\mathrm{up}_e x + b^\mathrm{up}_e)
#             + b^\mathrm{down}_e $$ (experts-one)
#
# with $W^\mathrm{up}_e$ of 2F rows and D columns, $W^\mathrm{down}_e$ of D
# rows and F columns. An expert is these four lines:

# %%
def expert(x, up, up_bias, down, down_bias):
    z = F.linear(x, up, up_bias)  # (…, 2F): gate, up, gate, up, …
    gate, up = z[..., ::2].clamp(max=7), z[..., 1::2].clamp(-7, 7)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return F.linear(hidden, down, down_bias)


for pair in ((2.0, 1.0), (-2.0, 1.0)):  # one unit; x and down are 1
    up, down = torch.tensor(pair)[:, None], torch.ones(1, 1)
    print(pair, f"{expert(torch.ones(1), up, None, down, None).item():.2f}")

# %% [markdown]
# Why these pieces? Below, left, the value over the plane of gate and up;
# right, a cut along the gate beside the two functions it descends from.

# %% tags=["hide-input"]
# Figure: left, the activation over gate and up: red where positive, blue
# where negative, white at zero, which is along up = -1 and wherever the gate
# is far below zero; it stops changing beyond gate 7 and up 7 and -7. Right, a
# cut at up = 0 beside GELU and SiLU, which go on rising beyond 7.
axis = torch.linspace(-11, 11, 221)
gate, up = axis.clamp(max=7)[None, :], axis.clamp(-7, 7)[:, None]
surface = (up + 1) * (gate * torch.sigmoid(1.702 * gate))
fig, (left, right) = plt.subplots(
    1, 2, figsize=(7.4, 3.1), gridspec_kw={"width_ratios": [1.2, 1]})
image = left.imshow(surface, origin="lower", extent=(-11, 11, -11, 11),
                    cmap="RdBu_r", vmin=-56, vmax=56, aspect="auto")
lines = left.contour(axis, axis, surface, (-30, -15, 15, 30, 45),
                     colors="black", linewidths=0.6)
left.clabel(lines, fontsize=7)
left.axvline(7, color="0.3", ls="--", lw=1)
left.hlines([-7, 7], -11, 11, color="0.3", ls="--", lw=1)
left.axhline(-1, color="black", lw=1)
left.text(-10.5, -0.5, "up = −1: off", fontsize=8)
left.text(-10.5, 3, "gate shut", fontsize=8)
left.text(7.2, -10.5, "clamped", fontsize=8)
ticks = (-10, -5, 0, 5, 10)
left.set(xlabel="gate", ylabel="up", title="Value of one unit", xticks=ticks,
         yticks=ticks)
left.grid(False)
fig.colorbar(image, ax=left, ticks=(-42, -20, 0, 20, 40, 56))
cut = torch.linspace(-5, 10, 151)
right.plot(cut, F.gelu(cut), lw=4, color="#9AD0F0")
right.plot(cut, F.silu(cut), ls="--", color="#D55E00")
clamped = cut.clamp(max=7)
right.plot(cut, clamped * torch.sigmoid(1.702 * clamped), color="black")
right.text(6.3, 8.6, "GELU", color="#3A8FC0", ha="right")
right.text(-2.2, -1.0, "SiLU", color="#D55E00", ha="center")
right.text(10.2, 3.4, "black: gpt-oss\nat up = 0", ha="right")
right.set(xlabel="gate", ylabel="value", title="Cut at up = 0",
          ylim=(-1.5, 10), xticks=ticks[1:])
plt.show()

# %% [markdown]
# What to see: the value stops changing beyond the dashed lines, but to the
# left nothing is clamped, the function dies out by itself. At up = −1 the
# unit is off, whatever the gate.
#
# - *1.702* makes $g\,\sigma(1.702 g)$ nearly the GELU (printed below).
# - *The 1*: at $u = 0$ a unit is this near-GELU of its gate. In the
#   textbook's $u\,g\,\sigma(g)$ it would be off there, and so would its
#   gate's gradient.
# - *The clamps* bound the unit. The factor $g\,\sigma(\alpha g)$ lies between
#   −0.164 and 7, the factor $u + 1$ between −6 and 8, so
#
# $$ -42 \le a_i \le 56 . $$ (experts-range)
#
# - *Only from above for the gate*: at −7 the factor has faded to
#   $-4.7 \cdot 10^{-5}$. A clamp there would change $a$ by at most 8 times
#   that, too little to see in a text and enough to fail a comparison in fp32.
# - *Alternating rows* keep a gate beside its up. Cut the rows of
#   $W^\mathrm{up}_e$ before any even row, and both parts are experts of
#   fewer units (exercise 2).

# %%
z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
unit = z * torch.sigmoid(1.702 * z)
print(f"furthest from GELU: {(unit - F.gelu(z)).abs().max():.3f}, "
      f"least: {unit.min():.3f}, at -7: {unit[130_000]:.1e}")
grid = torch.cartesian_prod(*2 * [torch.arange(-9, 9.01, 0.25)]).double()
g, u = grid[:, 0].clamp(max=7), grid[:, 1].clamp(-7, 7)
value = (u + 1) * g * torch.sigmoid(1.702 * g)
print(f"range: {value.min():.2f} to {value.max():.2f}")
symmetric = grid[:, 0].clamp(-7, 7)
change = (u + 1) * symmetric * torch.sigmoid(1.702 * symmetric) - value
print(f"a lower clamp of the gate changes at most {change.abs().max():.1e}")

# %% [markdown]
# ### From tokens to experts and back
#
# The [router](routing.ipynb) gives token $x_n$ K experts $e_{nk}$ and as many
# positive weights $w_{nk}$ with sum 1. The layer answers
#
# $$ y_n = \sum_{k=0}^{K-1} w_{nk}\, f_{e_{nk}}(x_n) . $$ (experts-sum)
#
# The bias of `down` is inside $f_e$, so it is weighted like the rest. Nothing
# says in which order the NK terms are added. Number the picks: the k-th
# choice of token n is pick $s = nK + k$, so pick 5 is the second choice of
# token 2. Sort the picks by expert, and collect those of one expert in
# $P_e$:
#
# $$ y_n = \sum_{e=0}^{E-1} \; \sum_{s \in P_e,\ \lfloor s/K \rfloor = n}
#    w_s\, f_e(x_n), \qquad P_e = \{ s : e_s = e \} $$ (experts-swap)
#
# The first three tokens of the picture, in this notation:

# %%
few = ids[:3].flatten()
for name, row in (("pick", range(6)), ("token", [s // K for s in range(6)]),
                  ("expert", few.tolist())):
    print(f"{name:7}", *row)
sorted_picks = few.argsort(stable=True)
print("sorted by expert: picks", sorted_picks.tolist(), "of tokens",
      (sorted_picks // K).tolist(), "for experts", few[sorted_picks].tolist())

# %% [markdown]
# Each $f_e$ is now called once, with the rows of all its tokens: one matrix
# product of $|P_e|$ rows instead of $|P_e|$ products of one row. Experts with
# an empty set are skipped. The sum is taken in fp32 (in float64 for float64)
# and rounded once at the end; a bf16 accumulator would round K times.
#
# ## Code
#
# ### How does one expert answer?

# %% tags=["export"]
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.weights.mxfp4 import decode

ALPHA = 1.702  # makes z * sigmoid(ALPHA * z) close to GELU; not in config


def clamped_swiglu(gate_up: Tensor, limit: float = 7.0) -> Tensor:
    """(…, 2F) with gate at even, up at odd entries -> (…, F), same dtype.

    The gate is clamped from above only, up on both sides. The order of the
    multiplications is that of transformers, so that equal inputs give equal
    bits. Source: openai/gpt-oss gpt_oss/torch/model.py, swiglu.
    """
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))

# %%
assert torch.allclose(clamped_swiglu(gate_up), truth, atol=1e-6)
print(tuple(gate_up.shape), "->", tuple(clamped_swiglu(gate_up).shape))
edges = torch.tensor([[9.0, 0], [-9.0, 0], [2.0, 9.0], [2.0, -9.0], [5, -1]])
for pair, value in zip(edges.tolist(), clamped_swiglu(edges)[:, 0].tolist(),
                       strict=True):
    print(f"gate {pair[0]:4}, up {pair[1]:4}: {value:.1f}")

# %% tags=["export"]
def one_expert(x: Tensor, gate_up_FD: Tensor, gate_up_bias: Tensor,
               down_DF: Tensor, down_bias: Tensor, limit: float = 7.0
               ) -> Tensor:
    """(…, D) -> (…, D) through one expert.

    gate_up_FD (2F, D), gate_up_bias (2F,), down_DF (D, F), down_bias (D,),
    all in x.dtype, any strides.
    """
    hidden = clamped_swiglu(F.linear(x, gate_up_FD, gate_up_bias), limit)
    return F.linear(hidden, down_DF, down_bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the K results are summed in: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)

# %% [markdown]
# ### What is the loop, word for word?
#
# {eq}`experts-sum`: token by token, choice by choice.

# %% tags=["export"]
def experts_loop(x: Tensor, ids: Tensor, weights: Tensor,
                 gate_up_EFD: Tensor, gate_up_bias: Tensor,
                 down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                 ) -> Tensor:
    """The slow twin: every token, every choice, one after the other.

    x (N, D); ids (N, K) int64, distinct in a row; weights (N, K);
    gate_up_EFD (E, 2F, D), gate_up_bias (E, 2F), down_EDF (E, D, F),
    down_bias (E, D). Returns (N, D) in x.dtype, summed in fp32.
    """
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for n, chosen in enumerate(ids.tolist()):
        for k, e in enumerate(chosen):
            out = one_expert(x[n], gate_up_EFD[e], gate_up_bias[e],
                             down_EDF[e], down_bias[e], limit)
            y[n] += out.to(y.dtype) * weights[n, k].to(y.dtype)
    return y.to(x.dtype)

# %% [markdown]
# The case of the picture, with D = 64 and F = 32. The up weights are large
# enough to bring both clamps to work.

# %%
D, width = 64, 32
x, weights = torch.randn(N, D), torch.randn(N, K).softmax(-1)
dense = (torch.randn(E, 2 * width, D) / 2, torch.randn(E, 2 * width),
         torch.randn(E, D, width) / 6, torch.randn(E, D))
slow = experts_loop(x, ids, weights, *dense)
raw = F.linear(x, dense[0][0], dense[1][0])
print(f"{tuple(x.shape)} -> {tuple(slow.shape)}; of expert 0's gates and ups "
      f"{(raw.abs() > 7).float().mean():.0%} are beyond 7")

# %% [markdown]
# ### What does OpenAI's code do?
#
# The same sum as two `einsum`s over gathered weights, the form of the
# reference implementation. Short, and fine for one token; this is the one
# that needs 102 GB for 512.

# %% tags=["export"]
def experts_gather(x: Tensor, ids: Tensor, weights: Tensor,
                   gate_up_EFD: Tensor, gate_up_bias: Tensor,
                   down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                   ) -> Tensor:
    """OpenAI's form: copy the K chosen experts to every token, contract.

    Arguments as in `experts_loop`. Takes 3NKFD numbers of memory.
    """
    gate_up = torch.einsum("nd,nkfd->nkf", x, gate_up_EFD[ids])
    hidden = clamped_swiglu(gate_up + gate_up_bias[ids], limit)
    out = torch.einsum("nkf,nkdf->nkd", hidden, down_EDF[ids])
    out = (out + down_bias[ids]).to(_wide(x.dtype))
    return (out * weights.to(out.dtype)[..., None]).sum(1).to(x.dtype)

# %% [markdown]
# ### How are the tokens sorted by expert?
#
# `by_expert` is {eq}`experts-swap` with the function left open: sort, split,
# call, weigh, add. The experts are called in ascending order, only those that
# were chosen, each with its tokens in their order (the sort is stable). So
# exchanging a token's two choices changes no bit of the result. Rows are
# gathered and split once, because a slice taken inside the loop would give
# autograd one full-size gradient for every expert.

# %% tags=["export"]
def by_expert(x: Tensor, ids: Tensor, weights: Tensor, experts: int,
              apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over the chosen experts, each called once with all its tokens.

    apply(e, rows (M, D)) -> (M, D) is called in ascending order of e and
    only for the experts hit. Arguments and result as in `experts_loop`.
    """
    order = ids.flatten().argsort(stable=True)  # pick n * K + k, by expert
    counts = torch.bincount(ids.flatten(), minlength=experts).tolist()
    tokens = order // ids.shape[1]
    rows = x.index_select(0, tokens).split(counts)
    shares = weights.flatten().index_select(0, order)[:, None].split(counts)
    y = torch.zeros_like(x, dtype=_wide(x.dtype))
    for e, which in enumerate(tokens.split(counts)):
        if counts[e]:
            out = apply(e, rows[e]).to(y.dtype) * shares[e].to(y.dtype)
            y.index_add_(0, which, out)
    return y.to(x.dtype)

# %%
calls = []


def echo(e, rows):
    calls.append((e, len(rows)))
    return rows


echoed = by_expert(x, ids, weights, E, echo)
print("expert and number of its tokens:", calls)
assert torch.allclose(echoed, x, atol=1e-6)  # the weights sum to 1

# %% [markdown]
# With an expert for the function it is the form to train with. An expert
# without tokens gets a gradient of zeros. `unbind` gives views, so weights
# that lie transposed in memory (dequantised Hugging Face files hold
# [E, in, out]) are used where they lie, without a copy.

# %% tags=["export"]
def experts_grouped(x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_EFD: Tensor, gate_up_bias: Tensor,
                    down_EDF: Tensor, down_bias: Tensor, limit: float = 7.0
                    ) -> Tensor:
    """One pair of matrix products for every expert hit; differentiable.

    Arguments as in `experts_loop`; the weights may have any strides.
    """
    parts = list(zip(gate_up_EFD.unbind(), gate_up_bias.unbind(),
                     down_EDF.unbind(), down_bias.unbind(), strict=True))
    return by_expert(x, ids, weights, len(parts),
                     lambda e, rows: one_expert(rows, *parts[e], limit))

# %% [markdown]
# ### What if the weights are packed in four bits?
#
# The released ones are [MXFP4](../weights/mxfp4.ipynb). We decode an expert
# when its turn comes, first gate and up, then down, and drop it after.
# Decoding a whole layer of the 20b to bf16 would take

# %%
for what, count in (("a layer", 32), ("one expert", 1)):
    print(f"{what}: {count * 3 * 2880 * 2880 * 2 / 1e9:.2f} GB")

# %% tags=["export"]
def packed_by_decoding(x: Tensor, ids: Tensor, weights: Tensor,
                       gate_up_blocks: Tensor, gate_up_scales: Tensor,
                       gate_up_bias: Tensor, down_blocks: Tensor,
                       down_scales: Tensor, down_bias: Tensor, limit: float
                       ) -> Tensor:
    """`packed_experts` in plain torch: decode an expert, use it, drop it."""
    def apply(e: int, rows: Tensor) -> Tensor:
        return one_expert(
            rows, decode(gate_up_blocks[e], gate_up_scales[e], x.dtype),
            gate_up_bias[e], decode(down_blocks[e], down_scales[e], x.dtype),
            down_bias[e], limit)
    return by_expert(x, ids, weights, len(gate_up_scales), apply)

# %% [markdown]
# ## It holds
#
# The four forms agree for E up to 6, every K, and 0, 1, 2 and 5 tokens;
# `tests/moe/test_experts.py` draws D and F as well.

# %%
from gptoss.weights.mxfp4 import PackedMXFP4


def by_decoding(x, ids, weights, up, up_bias, down, down_bias):
    return packed_by_decoding(x, ids, weights, up.blocks, up.scales, up_bias,
                              down.blocks, down.scales, down_bias, 7.0)


cases = worst = 0
for E in range(1, 7):
    for K in range(1, E + 1):
        for N in (0, 1, 2, 5):
            x = torch.randn(N, 32)
            ids = torch.rand(N, E).topk(K).indices
            weights = torch.randn(N, K).softmax(-1)
            up, down = (PackedMXFP4(*encode(torch.randn(E, r, 32)))
                        for r in (64, 32))
            dense = (up.decode(torch.float32), torch.randn(E, 64),
                     down.decode(torch.float32), torch.randn(E, 32))
            slow = experts_loop(x, ids, weights, *dense)
            for fast in (experts_gather(x, ids, weights, *dense),
                         experts_grouped(x, ids, weights, *dense),
                         by_decoding(x, ids, weights, up, dense[1], down,
                                     dense[3])):
                assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-3)
            cases += 1
print(cases, "cases: loop = gather = grouped = packed, to 1e-5")

# %% [markdown]
# Only the experts hit are decoded. Write scale 255, which means NaN, into
# all the others: whoever touches one shows it.

# %%
x, ids, weights = x[:1], ids[:1, :2], torch.tensor([[0.25, 0.75]])
before = by_decoding(x, ids, weights, up, dense[1], down, dense[3])
unhit = torch.ones(E, dtype=torch.bool)
unhit[ids[0]] = False
for packed in (up, down):
    packed.scales[unhit] = 255
after = by_decoding(x, ids, weights, up, dense[1], down, dense[3])
assert torch.equal(before, after)
print(f"poisoned: {int(unhit.sum())} of {E} experts, without a trace")

# %% [markdown]
# **The sentence again,** with `packed_by_decoding` in the place of [the
# page's](../one_page.ipynb) experts:

# %%
from gptoss.one_page import SENTENCE, sentence

names = [f"{name}_{part}" for name in ("gate_up_proj", "down_proj")
         for part in ("blocks", "scales", "bias")]
retold = sentence(12, experts=lambda x, ids, shares, w, limit: (
    packed_by_decoding(x, ids, shares, *map(w.get, names), limit)))
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## How do gradients pass packed experts?
#
# (Needed to train adapters around frozen experts; may be skipped at first.)
#
# Torch could differentiate `packed_by_decoding`, but it would keep what the
# forward decoded until the backward pass, up to 1.59 GB a layer. So we write
# the gradient ourselves, one decoded expert at a time. The packed weights are
# constants; the tokens, the router's weights and the biases are not.
# Differentiate {eq}`experts-swiglu`, with $\sigma$ short for
# $\sigma(\alpha g_i)$:
#
# $$ \frac{\partial a_i}{\partial z_{2i}} = (u_i + 1)
#    \bigl(\sigma + \alpha g_i \sigma (1 - \sigma)\bigr)
#    [z_{2i} \le \ell], \qquad
#    \frac{\partial a_i}{\partial z_{2i+1}} = g_i \sigma
#    [\,|z_{2i+1}| \le \ell\,] $$ (experts-gradient)
#
# where the bracket is 1 if the condition holds and 0 if not: nothing flows
# back through a clamp that is at work.

# %% tags=["export"]
def swiglu_backward(gate_up: Tensor, grad: Tensor, limit: float) -> Tensor:
    """Gradient of `clamped_swiglu` at gate_up (…, 2F) for grad (…, F)."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(ALPHA * g)
    slope = s + ALPHA * g * s * (1 - s)  # of g * sigmoid(ALPHA * g)
    d_gate = grad * (u + 1) * slope * (gate <= limit)
    d_up = grad * g * s * (up.abs() <= limit)
    return torch.stack([d_gate, d_up], dim=-1).flatten(-2)

# %%
z = (5 * torch.randn(20, 8)).double().requires_grad_()
ones = torch.ones(20, 4, dtype=torch.float64)
wanted, = torch.autograd.grad(clamped_swiglu(z), z, ones)
assert torch.allclose(swiglu_backward(z.detach(), ones, 7.0), wanted)
print(f"as torch says; {int((wanted == 0).sum())} of {z.numel()} entries "
      "have no gradient")

# %% [markdown]
# The rest is the chain rule. Write $\bar v$ for the gradient of the loss by
# $v$. A choice (n, k) of expert e gives
#
# $$ \bar w_{nk} = \bar y_n \cdot f_e(x_n), \qquad
#    \bar z_{2i}, \bar z_{2i+1} = \bar a_i
#    \Bigl(\frac{\partial a_i}{\partial z_{2i}},
#    \frac{\partial a_i}{\partial z_{2i+1}}\Bigr), \qquad
#    \bar a = (W^\mathrm{down}_e)^\top (w_{nk} \bar y_n)
# $$ (experts-chain)
#
# and adds $(W^\mathrm{up}_e)^\top \bar z$ to $\bar x_n$, $\bar z$ to the
# gradient of $b^\mathrm{up}_e$ and $w_{nk} \bar y_n$ to that of
# $b^\mathrm{down}_e$. Returned are those of x, weights and the two biases.

# %% tags=["export"]
def packed_backward(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor,
                    gate_up_blocks: Tensor, gate_up_scales: Tensor,
                    gate_up_bias: Tensor, down_blocks: Tensor,
                    down_scales: Tensor, down_bias: Tensor, limit: float
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and both biases; one expert at a time."""
    wide = _wide(x.dtype)
    d_x, d_weights, d_up, d_down = (
        torch.zeros_like(t, dtype=wide)
        for t in (x, weights, gate_up_bias, down_bias))
    for e in ids.unique().tolist():
        n, k = (ids == e).nonzero(as_tuple=True)
        gate_up_FD = decode(gate_up_blocks[e], gate_up_scales[e], x.dtype)
        down_DF = decode(down_blocks[e], down_scales[e], x.dtype)
        gate_up = F.linear(x[n], gate_up_FD, gate_up_bias[e])
        out = F.linear(clamped_swiglu(gate_up, limit), down_DF, down_bias[e])
        d_weights[n, k] = (grad[n] * out).sum(-1, dtype=wide)
        d_out = grad[n] * weights[n, k, None].to(x.dtype)
        d_gate_up = swiglu_backward(gate_up, d_out @ down_DF, limit)
        d_x.index_add_(0, n, (d_gate_up @ gate_up_FD).to(wide))
        d_up[e], d_down[e] = (t.sum(0, dtype=wide)
                              for t in (d_gate_up, d_out))
    return (d_x.to(x.dtype), d_weights.to(weights.dtype),
            d_up.to(gate_up_bias.dtype), d_down.to(down_bias.dtype))

# %%
x, ids, weights = torch.randn(6, 32), ids.expand(6, 2), torch.rand(6, 2)
up, down = (PackedMXFP4(*encode(torch.randn(E, r, 32))) for r in (64, 32))
case = (x, ids, weights, up.blocks, up.scales, dense[1], down.blocks,
        down.scales, dense[3], 7.0)
got, *_ = packed_backward(torch.ones_like(x), *case)
leaf = x.clone().requires_grad_()
wanted, = torch.autograd.grad(experts_grouped(
    leaf, ids, weights, up.decode(torch.float32), dense[1],
    down.decode(torch.float32), dense[3]).sum(), leaf)
assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-2)
print(f"torch's own, within 0.01 of values up to {wanted.abs().max():.0f}")

# %% [markdown]
# ## Against the others
#
# Hugging Face's module (eager) and OpenAI's formula on the same random
# weights, in fp32; `tests/moe/test_experts.py` runs OpenAI's `MLPBlock`
# itself. Hugging Face stores the matrices transposed.

# %%
from transformers import GptOssConfig as HFConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts


def hf_experts(x, ids, weights, up, up_bias, down, down_bias):
    hf = GptOssExperts(HFConfig(
        hidden_size=x.shape[1], intermediate_size=down.shape[2],
        num_local_experts=len(down), experts_implementation="eager"))
    hf.load_state_dict({
        "gate_up_proj": up.transpose(1, 2), "gate_up_proj_bias": up_bias,
        "down_proj": down.transpose(1, 2), "down_proj_bias": down_bias,
    }, assign=True)
    with torch.no_grad():
        return hf(x, ids, weights)


def openai_experts(x, ids, weights, mlp1, bias1, mlp2, bias2):
    t = torch.einsum("beck,bk->bec", mlp1[ids], x) + bias1[ids]
    glu, linear = t[..., ::2].clamp(max=7), t[..., 1::2].clamp(-7, 7)
    t = glu * torch.sigmoid(1.702 * glu) * (linear + 1)
    t = torch.einsum("beck,bek->bec", mlp2[ids], t) + bias2[ids]
    return torch.einsum("bec,be->bc", t, weights)


def draw(dtype, seed, N=16, E=8, K=4, D=64, width=64):
    torch.manual_seed(seed)
    floats = (torch.randn(N, D), torch.randn(N, K).softmax(-1),
              torch.randn(E, 2 * width, D) / 8, torch.randn(E, 2 * width),
              torch.randn(E, D, width) / 8, torch.randn(E, D))
    x, weights, *rest = (t.to(dtype) for t in floats)
    return x, torch.rand(N, E).topk(K).indices, weights, *rest


case = draw(torch.float32, 0)
ours = experts_grouped(*case)
for name, theirs in (("transformers", hf_experts(*case)),
                     ("openai", openai_experts(*case))):
    gap = (ours - theirs).abs().max()
    assert gap < 1e-5
    print(f"{name:13} within 1e-5, of values up to {ours.abs().max():.0f}")

# %% [markdown]
# In bf16 each rounds in other places, and comparing them with each other
# decides nothing. Compare each with float64 on the same bf16 inputs (root
# mean square error, median of 20 draws), in units of what rounding the exact
# answer to bf16 costs.

# %%
errors = []
for seed in range(20):
    case = draw(torch.bfloat16, seed)
    exact = experts_loop(*(t.double() if t.is_floating_point() else t
                           for t in case))
    runs = (exact.bfloat16(), experts_grouped(*case), openai_experts(*case),
            hf_experts(*case))
    errors.append([(r.double() - exact).square().mean().sqrt()
                   for r in runs])
least, ours, openai, hf = torch.tensor(errors).median(0).values.tolist()
assert least < ours < openai < hf
for name, error in (("ours", ours), ("OpenAI's formula", openai),
                    ("transformers", hf)):
    print(f"{name:16} {error / least:.1f} times the error of one rounding")

# %% [markdown]
# All three round $z$, the steps of the activation and $f_e(x)$; ours rounds
# nothing else. OpenAI's formula rounds between products and biases, too. So
# does transformers, and it adds the K results into a bf16 accumulator.
#
# Known to have been wrong elsewhere, besides the gates of vLLM: in
# onnxruntime's WebGPU kernel, a missing `swiglu_limit` was read as 0, which
# clamps everything to nothing
# ([onnxruntime#27220](https://github.com/microsoft/onnxruntime/issues/27220)).
#
# ## In the 20b and the 120b
#
# On the meta device a layer's tensors have the shapes, and therefore the
# bytes, of the published files.

# %%
for name, config in (("20b", small), ("120b", large)):
    held, E = 0, config.num_local_experts
    D, width = config.hidden_size, config.intermediate_size
    for rows, columns in ((2 * width, D), (D, width)):
        shape = (E, rows, columns // 32)
        held += sum(torch.empty(*size, dtype=dtype, device="meta").nbytes
                    for size, dtype in (((*shape, 16), torch.uint8),
                                        (shape, torch.uint8),
                                        ((E, rows), torch.bfloat16)))
    part = held // config.num_local_experts
    print(f"{name:>4}: {config.num_local_experts:3} experts a layer, "
          f"{held:13,} bytes, {part:,} an expert")
assert part == 3 * 2880 * 2880 * 17 // 32 + 2 * (2 * 2880 + 2880)

# %% [markdown]
# ## Cost
#
# Three matrices of FD numbers, a multiplication and an addition each, K
# times a token:
#
# $$ \text{FLOPs} = 6\,N K F D, \qquad
#    \text{bytes} = \min(NK, E)\,\bigl(3FD \cdot \tfrac{17}{32}
#    + 2(2F + D)\bigr) $$ (experts-cost)
#
# (17/32 bytes a packed weight, 2 a bias; an upper bound, since choices
# repeat). Torch counts the same FLOPs, however the tokens are distributed.

# %%
from torch.utils.flop_counter import FlopCounterMode

N, E, K, D, width = 40, 8, 4, 64, 32
case = draw(torch.float32, 0, N, E, K, D, width)
for form in (experts_gather, experts_grouped):
    with FlopCounterMode(display=False) as counter:
        form(*case)
    assert counter.get_total_flops() == 6 * N * K * width * D
print("counted:", counter.get_total_flops())
token = 4 * part
print(f"one token reads {token:,} bytes of experts a layer for "
      f"{6 * 4 * 2880 * 2880:,} FLOPs")

# %% [markdown]
# That is under 4 FLOPs a byte: with one token the layer waits
# for memory ([many rows](../kernels/many_rows.ipynb)). An expert with M tokens
# does M times as much work on the same bytes, which is what the sort is for.
#
# ## Takeaways
#
# - An expert is two matrices with biases around
#   $(u+1)\,g\,\sigma(1.702\,g)$; gate and up alternate in the rows; up is
#   clamped to ±7, the gate from above only.
# - Sorting the NK choices by expert turns NK matrix-vector products into at
#   most E matrix products, without copying a weight.
# - Packed experts are decoded one at a time and only if hit; the K results
#   are summed in fp32.
#
# ## Exercises
#
# ### Exercise 1
#
# `chunk` would be right if the rows were sorted: gates first,
# ups after. Sort the rows of a *packed* `gate_up` so, once, and show that no
# value is re-encoded.

# %% tags=["hide-cell"]
dense = torch.randn(2, 8, 64)
weight = PackedMXFP4(*encode(dense))
order = torch.arange(8).view(4, 2).T.flatten()  # 0 2 4 6 1 3 5 7
sorted_rows = PackedMXFP4(weight.blocks[:, order], weight.scales[:, order])
x = torch.randn(3, 64)
for e in range(2):
    z = F.linear(x, weight[e].decode(torch.float32))
    gate, up = F.linear(x, sorted_rows[e].decode(torch.float32)).chunk(2, -1)
    gap = (clamped_swiglu(z) - clamped_swiglu(
        torch.stack([gate, up], -1).flatten(-2))).abs().max()
    print(f"expert {e}: same activations to 1e-5, largest "
          f"{clamped_swiglu(z).abs().max():.0f}" if gap < 1e-5 else gap)
print("blocks of 32 run along a row, so moving rows moves whole blocks")

# %% [markdown]
# ### Exercise 2
#
# Cut an expert into two of fewer units whose outputs add up to
# its own. Which of its four tensors is not to be cut, and what becomes of
# it? Where may a *packed* expert be cut?

# %% tags=["hide-cell"]
x, up, up_bias, down, down_bias = (torch.randn(*shape) for shape in (
    (3, 64), (64, 64), (64,), (64, 32), (64,)))
cut = 10  # units in the first part: rows 0 to 19 of up, columns 0 to 9 of down
parts = (one_expert(x, up[:2 * cut], up_bias[:2 * cut],
                    down[:, :cut], down_bias)
         + one_expert(x, up[2 * cut:], up_bias[2 * cut:],
                      down[:, cut:], 0 * down_bias))
whole = one_expert(x, up, up_bias, down, down_bias)
assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-3)
print(f"largest value {whole.abs().max():.0f}; the two parts add up to it "
      "within 1e-3")
print("the bias of down has no units: one part keeps it, or it is added "
      "twice; packed, cut down's columns at multiples of 32")

# %% [markdown]
# ### Exercise 3
#
# In fp16 the largest number is 65504. Use
# {eq}`experts-range` to say how large the entries of `down_proj` may be
# in the worst case before one expert's output, without its bias, can
# overflow (F = 2880), and compare with the clamps left out.

# %% tags=["hide-cell"]
worst = 65504 / (2880 * 56)
print(f"entries up to {worst:.3f} are safe")
z = torch.tensor([300.0, 300.0], dtype=torch.float16)
print("gate = up = 300, without clamps:",
      ((z[1] + 1) * z[0] * torch.sigmoid(1.702 * z[0])).item(),
      "with them:", clamped_swiglu(z).item())

# %% [markdown]
# ### Exercise 4
#
# Training code often gives every expert a fixed *capacity*
# and drops what does not fit {cite}`switch2021`. Write the padded form, one
# `bmm` over all experts, with the capacity as an argument. Which capacity
# makes it equal to `experts_grouped`, and how much of its work is padding?

# %% tags=["hide-cell"]
def experts_bmm(x, ids, weights, up, up_bias, down, down_bias, capacity):
    E, K = len(up), ids.shape[1]
    one_hot = F.one_hot(ids.flatten(), E)
    place = (one_hot.cumsum(0) - 1).gather(1, ids.flatten()[:, None])[:, 0]
    picks = (place < capacity).nonzero()[:, 0]  # the others are dropped
    e, place, n = ids.flatten()[picks], place[picks], picks // K
    rows = x.new_zeros(E, capacity, x.shape[1])
    rows[e, place] = x[n]
    hidden = clamped_swiglu(rows @ up.mT + up_bias[:, None])
    out = (hidden @ down.mT + down_bias[:, None])[e, place]
    return torch.zeros_like(x).index_add_(
        0, n, out * weights.flatten()[picks, None])


case = draw(torch.float32, 3, N=64)
load = torch.bincount(case[1].flatten(), minlength=8)
enough = int(load.max())
full = experts_bmm(*case, enough)
assert torch.allclose(full, experts_grouped(*case), atol=1e-5)
lost = (experts_bmm(*case, enough - 1) - full).abs().max()
print(f"loads {load.tolist()}: capacity {enough} is enough, padding is "
      f"{1 - load.sum() / (8 * enough):.0%}; with {enough - 1} a result is "
      f"off by {lost:.1f}")

# %% [markdown]
# ## Sources
#
# - {cite}`moe2017` for sparsely gated experts, {cite}`switch2021` for their
#   capacity, {cite}`glu2020` for gated units, {cite}`gptoss2025` for the
#   model, {cite}`ocpmx2023` for its number format.
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `swiglu`, `MLPBlock` (gather).
# - huggingface/transformers, `models/gpt_oss/modeling_gpt_oss.py`:
#   `GptOssExperts` (a loop over the experts hit).
# - mistralai/mistral-inference, `moe.py`: the shortest loop over experts.
# - vllm-project/vllm#29273, microsoft/onnxruntime#27220 and #27221.
