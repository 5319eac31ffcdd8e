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
# How does a token pass through 4 experts of 32 without anybody touching, or
# copying, the other 28?
#
# The experts are the model: of the 20.9 billion parameters of gpt-oss-20b,
# 19.1 billion, 91 %, are experts. A token uses an eighth of them. The
# shortest correct program copies each token's four experts to that token and
# multiplies. For a prompt of 512 tokens these copies take 102 GB in every
# layer, for a model whose file has 13.8 GB.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
D, width = small.hidden_size, small.intermediate_size
one = 3 * D * width + 2 * width + D  # parameters of one expert
experts = small.num_hidden_layers * small.num_local_experts * one
print(f"one expert: {one:,} parameters; all: {experts:,}")
print(f"512 tokens x 4 experts, bf16: {512 * 4 * one * 2 / 1e9:.0f} GB")
assert experts / 20_914_757_184 > 0.91

# %% [markdown]
# ## Picture
#
# Inside an expert stands an activation with two inputs. One matrix makes 2F
# numbers, F pairs of a *gate* and an *up*; the activation makes one number of
# each pair. On the left its value over the plane; on the right a cut along
# the gate, beside the two functions it descends from. What to see: the value
# stops changing to the right of gate 7 and beyond up ±7 (dashed), but to the
# left nothing is clamped, the function dies out by itself; and at up = -1 the
# unit is off, whatever the gate.

# %% tags=["hide-input"]
# Figure: left, the activation over gate and up, constant to the right of
# gate 7 and beyond up 7 and -7, zero along up = -1; right, a cut at up = 0
# beside GELU and SiLU, which it follows until it stops rising at gate 7.
axis = torch.linspace(-11, 11, 221)
gate, up = axis.clamp(max=7)[None, :], axis.clamp(-7, 7)[:, None]
surface = (up + 1) * (gate * torch.sigmoid(1.702 * gate))
figure, (left, right) = plt.subplots(
    1, 2, figsize=(7, 3), gridspec_kw={"width_ratios": [1.15, 1]})
levels = [-45, -30, -15, -5, -1, 1, 5, 15, 30, 45, 60]
filled = left.contourf(axis, axis, surface, levels, cmap="viridis")
left.axvline(7, color="white", ls="--", lw=1)
left.hlines([-7, 7], -11, 11, color="white", ls="--", lw=1)
left.axhline(-1, color="black", lw=1)
left.text(-10.5, -0.4, "up = -1: off", fontsize=8)
left.set(xlabel="gate", ylabel="up", title="The clamped SwiGLU")
left.grid(False)
figure.colorbar(filled, ax=left, ticks=levels[::2])
cut = torch.linspace(-6, 10, 161)
right.plot(cut, F.gelu(cut), label="GELU", lw=3.5, color="#56B4E9")
right.plot(cut, F.silu(cut), label="SiLU", ls="--", color="#D55E00")
clamped = cut.clamp(max=7)
right.plot(cut, clamped * torch.sigmoid(1.702 * clamped), color="black",
           label="gpt-oss at up = 0")
right.set(xlabel="gate", ylabel="value", title="Cut at up = 0")
right.legend()
plt.show()

# %% [markdown]
# ## The naive version
#
# Most models with gated units store all gates first and all ups after them,
# so the reflex is `chunk`, then the textbook SwiGLU {cite}`glu2020`. Nothing
# complains: every shape is right.

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
print("same shape:", guess.shape == truth.shape)
print("correlated:", bool(torch.corrcoef(pair)[0, 1].abs() > 0.05))

# %% [markdown]
# The guess has nothing to do with the truth. The trap is not hypothetical:
# vLLM's CPU path assumed gates first and wrote garbage until vllm#29273.
#
# The second naive thing is the loop over N tokens and their K choices. It is
# correct, and we keep it as the reference, but it fetches an expert for each
# of the NK choices, where at most E fetches are needed.

# %%
N, K = 512, small.num_experts_per_tok
chosen = torch.rand(N, small.num_local_experts).topk(K).indices
print("experts fetched by the loop:", chosen.numel())
print("different experts among them:", len(chosen.unique()))

# %% [markdown]
# ## Derivation
#
# ### What an expert computes
#
# The [router](routing.ipynb) gives a token $x_n$ of D numbers K experts
# $e_{nk}$, $k = 0, …, K - 1$, and as many positive weights $w_{nk}$ with sum
# 1. The layer answers
#
# $$ y_n = \sum_{k=0}^{K-1} w_{nk}\, f_{e_{nk}}(x_n), \qquad
#    f_e(x) = W^\mathrm{down}_e\, a(W^\mathrm{up}_e x + b^\mathrm{up}_e)
#             + b^\mathrm{down}_e $$ (eq-experts-sum)
#
# with $W^\mathrm{up}_e$ of 2F rows and D columns, $W^\mathrm{down}_e$ of D
# rows and F columns. The bias of `down` is inside $f_e$, so it is weighted by
# the router like the rest. The activation $a$ turns $z \in \mathbb{R}^{2F}$
# into F numbers: with $\ell = 7$ and $\alpha = 1.702$,
#
# $$ g_i = \min(z_{2i}, \ell), \quad
#    u_i = \max(-\ell, \min(z_{2i+1}, \ell)), \quad
#    a_i(z) = (u_i + 1)\; g_i\, \sigma(\alpha g_i) $$ (eq-experts-swiglu)
#
# where $\sigma$ is the logistic function. What each piece does:
#
# *Interleaved* rows keep a gate beside its up. Cut the rows of
# $W^\mathrm{up}_e$ before any even row and both parts are complete experts of
# fewer units (exercise 2): so [shards](../parallel/shards.ipynb) splits an
# expert over devices, with slices and without a permutation.
#
# *1.702* makes $g\,\sigma(1.702 g)$ the GELU, to within 0.021.
#
# *The 1*: at $u = 0$ a unit is this near-GELU of its gate. In the textbook's
# $u\,g\,\sigma(g)$ it would be off there, and so would its gate's gradient.
#
# *The clamps* bound the unit. The factor $g\,\sigma(\alpha g)$ lies between
# -0.164 and 7, the factor $u + 1$ between -6 and 8, so
#
# $$ -42 \le a_i \le 56 . $$ (eq-experts-range)
#
# *Only from above for the gate*: to the left the factor fades by itself, and
# at -7 it is $-4.7 \cdot 10^{-5}$. A clamp there would change $a$ by at most
# $8 \cdot 4.7 \cdot 10^{-5}$, too little to see in a text and enough to fail
# a comparison in fp32.

# %%
z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
unit = z * torch.sigmoid(1.702 * z)
assert (unit - F.gelu(z)).abs().max() < 0.021
assert -0.164 < unit.min() < -0.163
grid = torch.cartesian_prod(torch.arange(-9, 9.01, 0.25),
                            torch.arange(-9, 9.01, 0.25)).double()
g, u = grid[:, 0].clamp(max=7), grid[:, 1].clamp(-7, 7)
value = (u + 1) * g * torch.sigmoid(1.702 * g)
print(f"range: {value.min():.2f} to {value.max():.2f}")
symmetric = grid[:, 0].clamp(-7, 7)
change = (u + 1) * symmetric * torch.sigmoid(1.702 * symmetric) - value
print(f"a lower clamp of the gate changes at most {change.abs().max():.1e}")

# %% [markdown]
# ### From tokens to experts
#
# Nothing in {eq}`eq-experts-sum` says in which order the NK terms are added.
# Number the choices (n, k) as *picks* $s = nK + k$ and collect those of one
# expert:
#
# $$ y_n = \sum_{e=0}^{E-1} \; \sum_{s \in P_e,\ \lfloor s/K \rfloor = n}
#    w_s\, f_e(x_n), \qquad P_e = \{ s : e_s = e \} $$ (eq-experts-swap)
#
# Each $f_e$ is now called once, with the rows of all its tokens: one matrix
# product of $|P_e|$ rows instead of $|P_e|$ products of one row. A stable
# sort of the NK ids yields all the sets $P_e$ at once, one behind the other;
# experts with an empty set are skipped.
#
# The sum is taken in fp32 and rounded once at the end. A bf16 accumulator
# would round K times.

# %% [markdown]
# ## Code
#
# ### The clamped SwiGLU

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
a = clamped_swiglu(gate_up)
print(tuple(gate_up.shape), "->", tuple(a.shape))
assert torch.allclose(a, truth, atol=1e-6)
edges = torch.tensor([[9.0, 0], [-9.0, 0], [2.0, 9.0], [2.0, -9.0], [5, -1]])
print([round(v, 1) for v in clamped_swiglu(edges)[:, 0].tolist()])

# %% [markdown]
# ### One expert

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
# ### The loop

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
# A small case: 7 tokens, 5 experts of which each token takes 2, D = 64, F =
# 32. The up weights are large enough to bring both clamps to work.

# %%
E, K, N, D, width = 5, 2, 7, 64, 32
x = torch.randn(N, D)
ids = torch.rand(N, E).topk(K).indices
weights = torch.randn(N, K).softmax(-1)
dense = (torch.randn(E, 2 * width, D) / 2, torch.randn(E, 2 * width),
         torch.randn(E, D, width) / 6, torch.randn(E, D))
slow = experts_loop(x, ids, weights, *dense)
raw = F.linear(x, dense[0][0], dense[1][0])
print(tuple(slow.shape), "clamps at work:", bool((raw.abs() > 7).any()))

# %% [markdown]
# ### The gather
#
# The same sum as two `einsum`s, the form of OpenAI's reference
# implementation. Short, and fine for one token; this is the one that needs
# 102 GB for 512.

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

# %%
gathered = experts_gather(x, ids, weights, *dense)
print("gather = loop:", torch.allclose(gathered, slow, atol=2e-5))

# %% [markdown]
# ### Sorting the tokens by expert
#
# `by_expert` is {eq}`eq-experts-swap` with the function left open: it sorts,
# splits, calls, weighs and adds. Rows are gathered and split once, because a
# slice taken inside the loop would give autograd one full-size gradient for
# every expert.

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
# With an expert for the function it is the form to train with. `unbind`
# gives views, so weights that lie transposed in memory (dequantised Hugging
# Face files hold [E, in, out]) are used where they lie.

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

# %%
grouped = experts_grouped(x, ids, weights, *dense)
print("grouped = loop:", torch.allclose(grouped, slow, atol=2e-5))

# %% [markdown]
# ### Packed experts
#
# The released weights are [MXFP4](../weights/mxfp4.ipynb). Decoding a whole
# layer of the 20b to bf16 takes 1.59 GB; decoding one expert when its turn
# comes, and dropping it after, 50 MB. [The next
# part](../model/operators.ipynb) makes an operator of it, so that [a
# kernel](../kernels/many_rows.ipynb) can stand behind its name.

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
# ### Its gradient
#
# An operator is opaque to autograd, so we say what its gradient is. The
# packed weights are constants; the tokens, the router's weights and the
# biases are not: fine-tuning adapters around frozen experts needs exactly
# these. Differentiate {eq}`eq-experts-swiglu`, with $\sigma$ short for
# $\sigma(\alpha g_i)$:
#
# $$ \frac{\partial a_i}{\partial z_{2i}} = (u_i + 1)
#    \bigl(\sigma + \alpha g_i \sigma (1 - \sigma)\bigr)
#    [z_{2i} \le \ell], \qquad
#    \frac{\partial a_i}{\partial z_{2i+1}} = g_i \sigma
#    [\,|z_{2i+1}| \le \ell\,] $$ (eq-experts-gradient)
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
print("entries without gradient:", int((wanted == 0).sum()), "of", z.numel())

# %% [markdown]
# The rest is the chain rule. Write $\bar v$ for the gradient of the loss by
# $v$. A choice (n, k) of expert e gives
#
# $$ \bar w_{nk} = \bar y_n \cdot f_e(x_n), \qquad
#    \bar z_{2i}, \bar z_{2i+1} = \bar a_i
#    \Bigl(\frac{\partial a_i}{\partial z_{2i}},
#    \frac{\partial a_i}{\partial z_{2i+1}}\Bigr), \qquad
#    \bar a = (W^\mathrm{down}_e)^\top (w_{nk} \bar y_n)
# $$ (eq-experts-chain)
#
# and adds $(W^\mathrm{up}_e)^\top \bar z$ to $\bar x_n$, $\bar z$ to the
# gradient of $b^\mathrm{up}_e$ and $w_{nk} \bar y_n$ to that of
# $b^\mathrm{down}_e$. Again one decoded expert is in memory at a time: to keep
# what the forward decoded would be faster, and hold up to 1.59 GB a layer
# until the backward pass.

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
from gptoss.weights.mxfp4 import PackedMXFP4

packed = [PackedMXFP4(*encode(t)) for t in (dense[0], dense[2])]
same = (packed[0].decode(torch.float32), dense[1],
        packed[1].decode(torch.float32), dense[3])
case = (x, ids, weights, packed[0].blocks, packed[0].scales, dense[1],
        packed[1].blocks, packed[1].scales, dense[3], 7.0)
out = packed_by_decoding(*case)
got, *_ = packed_backward(torch.ones_like(out), *case)
x.requires_grad_()
wanted, = torch.autograd.grad(
    experts_grouped(x, ids, weights, *same).sum(), x)
x = x.detach()
print("packed = grouped on the decoded weights:",
      torch.equal(out, experts_grouped(x, ids, weights, *same)))
print("gradients agree:", torch.allclose(got, wanted, atol=1e-4))

# %% [markdown]
# ## It holds
#
# The four forms agree for E up to 6, every K, and 0, 1, 2 and 5 tokens;
# `tests/moe/test_experts.py` draws D and F as well.

# %%
def by_decoding(x, ids, weights, up, up_bias, down, down_bias):
    return packed_by_decoding(x, ids, weights, up.blocks, up.scales, up_bias,
                              down.blocks, down.scales, down_bias, 7.0)


cases = 0
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
            for form in (experts_gather, experts_grouped):
                fast = form(x, ids, weights, *dense)
                assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-3)
            fast = by_decoding(x, ids, weights, up, dense[1], down, dense[3])
            assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-3)
            cases += 1
print(cases, "cases")

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
print("poisoned:", int(unhit.sum()), "of", E, "experts; result unchanged:",
      torch.equal(before, after))
assert torch.equal(before, after)

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
    print(f"{name:13} max |Δ| below 1e-5: {bool(gap < 1e-5)}")
    assert gap < 1e-5

# %% [markdown]
# In bf16 each rounds in other places, and comparing them with each other
# decides nothing. Compare each with float64 on the same bf16 inputs (root
# mean square error, median of 20 draws), in units of what rounding the exact
# answer to bf16 costs. All three round $z$, the steps of the activation and
# $f_e(x)$; ours rounds nothing else: 2.4. OpenAI's formula rounds between
# products and biases, too: 2.7. So does transformers, and it adds the K
# results into a bf16 accumulator: 3.1.

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
print("ours < openai < hf eager:", ours < openai < hf)
assert least < ours < openai < hf
assert 2 < ours / least < 2.6 < openai / least < 2.9 < hf / least < 3.4

# %% [markdown]
# Known to have been wrong elsewhere: gates first instead of interleaved
# (vllm#29273, above); in onnxruntime's WebGPU kernel, a missing
# `swiglu_limit` read as 0, which clamps everything to nothing
# (onnxruntime#27220, fixed in #27221).
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

# %% [markdown] How many of them must be decoded for N tokens was found in
# [routing](routing.ipynb) ({eq}`routing-load`): one token needs 4, and from 2E
# tokens on hardly any can be skipped.

# %%
from gptoss.moe.routing import expected_hits

for E in (32, 128):
    print(f"E = {E:3}:", *(f"{N} tokens hit {expected_hits(E, 4, N):.1f}"
                           for N in (1, 8, 2 * E)), sep="  ")

# %% [markdown]
# ## Cost
#
# Three matrices of FD numbers, a multiplication and an addition each, K
# times a token:
#
# $$ \text{FLOPs} = 6\,N K F D, \qquad
#    \text{bytes} = \min(NK, E)\,\bigl(3FD \cdot \tfrac{17}{32}
#    + 2(2F + D)\bigr) $$ (eq-experts-cost)
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

# %% [markdown] That is under 4 FLOPs a byte: with one token the layer waits
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
    assert torch.allclose(clamped_swiglu(z), clamped_swiglu(
        torch.stack([gate, up], -1).flatten(-2)), atol=1e-5)
# blocks of 32 run along a row, so moving rows moves whole blocks

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
assert torch.allclose(parts, one_expert(x, up, up_bias, down, down_bias),
                      rtol=1e-4, atol=1e-3)
# the bias of down has no units: one part keeps it, or it is added twice.
# Packed, the columns of down come in blocks of 32: cut at multiples of 32

# %% [markdown]
# ### Exercise 3
#
# In fp16 the largest number is 65504. Use
# {eq}`eq-experts-range` to say how large the entries of `down_proj` may be
# in the worst case before one expert's output, without its bias, can
# overflow (F = 2880), and compare with the clamps left out.

# %% tags=["hide-cell"]
worst = 65504 / (2880 * 56)
assert 0.40 < worst < 0.41  # every |entry| below 0.406 is safe
# without clamps no bound exists: gate = up = 300 overflows a single unit
z = torch.tensor([300.0, 300.0], dtype=torch.float16)
assert torch.isinf((z[1] + 1) * z[0] * torch.sigmoid(1.702 * z[0]))
assert clamped_swiglu(z).item() == 56

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
assert not torch.allclose(experts_bmm(*case, enough - 1), full, atol=1e-5)
padding = 1 - load.sum() / (8 * enough)
assert 0 < padding < 0.5

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
