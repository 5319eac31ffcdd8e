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
#     module: rounding
#     public: [CONTRACTS, Contract, ParityError, Rounding]
# ---

# %% [markdown]
# # What can rounding explain?

# %% [markdown]
# ## Question
#
# Two correct implementations of one model give different numbers, because
# they round in different places. How far apart may they be before one of
# them is wrong?
#
# The safe answer is of no use: in one sum of 2,880 terms, as every projection
# of the 20b has them, rounding may do eleven times as much as it does with a
# probability of all but $10^{-16}$. This chapter derives the second bound,
# which is small enough that a single wrong key in an attention window stands
# out, and writes down what three implementations and our own kernels round,
# and where.

# %% tags=["export"]
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.attention.masks import visible
from gptoss.model.layers import Experts, Router
from gptoss.moe.experts import clamped_swiglu
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import BLOCK, decode

# %% [markdown]
# ## Picture
#
# Above, one number: an entry of a projection, computed in bf16 (eight
# significant bits), beside what exact arithmetic gives. The bars are what two
# kinds of rounding may have done to it. Below, drawn by the finished package,
# what such bounds are good for: the smallest fault that they expose, at each
# point of layer 1 of the shipped model, whose every operation is made wrong
# by a little more until its result leaves the bound.

# %% tags=["hide-input", "picture", "nbval-ignore-output"]
# Figure: above, a number line with the exact value 45.87 and the stored 45.75
# inside the bar that storing explains; the likely bar of the sum is short,
# that of its worst case the longest. Below, sixteen points with the
# smallest fault seen: most at a ten-thousandth, the rotation and the experts'
# hidden vectors only at some hundredths.
import os
from importlib.resources import files

import matplotlib.pyplot as plt

from gptoss.model.transformer import GptOss
from gptoss.parity.judge import Judge, excess
from gptoss.parity.walk import LAYER_POINTS, trace_ours
from gptoss.weights.checkpoint import Checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET)
tokens = torch.randint(model.config.vocab_size, (1, 80),
                       generator=torch.Generator().manual_seed(0))
trace = trace_ours(model, tokens)
trace[None, "tokens"] = tokens[0]
POWER = {}  # point -> smallest fault seen: of the whole, of one number
with Checkpoint.open(POCKET) as checkpoint, torch.inference_mode():
    judge = Judge(checkpoint, torch.bfloat16, inner=False)
    for point in (p for p in LAYER_POINTS if p != "chosen"):
        value, bound = judge.expected(trace, (1, point))
        whole = next(2.0 ** k for k in range(-24, 3) if excess(
            (value * (1 + 2.0 ** k)).bfloat16(), (value, bound)) > 1)
        one = bound / value[value != 0].square().mean().sqrt()
        POWER[point] = whole, one[value != 0].median().item()
fig, (line, ax) = plt.subplots(2, 1, figsize=(7, 4.6), height_ratios=(2, 5))
exact, stored = 45.8652, 45.75  # the next section computes them
for y, (reach, text, colour) in enumerate((
        (0.315, "summing, at worst", "0.75"),
        (0.029, "summing, likely", "C2"), (0.179, "storing", "C0"))):
    line.barh(y, 2 * reach, 0.5, left=exact - reach, color=colour, alpha=0.8)
    line.text(exact + reach + 0.01, y, f"{text}: {reach:.3f}", va="center",
              fontsize=8)
line.plot([exact, exact], [-0.5, 2.9], color="0.3", lw=1)
line.plot([stored, stored], [-0.5, 2.9], color="C1", lw=1.6)
line.text(exact, 3.0, "exact 45.865", ha="center", fontsize=8)
line.text(stored, 3.0, "stored 45.75", ha="center", fontsize=8,
          color="#a85f00")
line.set(xlim=(45.5, 46.4), ylim=(-0.5, 3.4), yticks=())
line.grid(visible=False)
for x, (whole, one) in enumerate(POWER.values()):
    ax.plot(x, whole, "C0o", ms=5)
    ax.plot(x, one, "C1s", ms=4)
ax.text(0.3, 7e-5, "all numbers wrong by this factor", color="C0",
        fontsize=8, va="top")
ax.text(0.3, 1.1e-3, "one number wrong, in typical sizes", color="#a85f00",
        fontsize=8)
ax.set(yscale="log", ylabel="smallest fault seen", ylim=(2e-5, 0.1))
ax.set_xticks(range(len(POWER)), POWER, rotation=45, ha="right", fontsize=8)
plt.show()

# %% [markdown]
# What to see above: the stored number is off by more than half of what storing
# explains, and the sum's own rounding is small beside it. Below: a result
# that is wrong by one ten-thousandth everywhere is seen at most points, far
# less than one bf16 rounding, because among thousands of numbers some are
# rounded just to the edge. Where several roundings follow each other, in the
# rotation (`turned`), in an expert (`hidden`, `experts`), much more can hide.
# The table, as shares of the result:

# %% tags=["nbval-ignore-output"]
print(f"{'point':10} {'factor on all':>14} {'one number':>11}")
for point, (whole, one) in POWER.items():
    print(f"{point:10} {whole:14.0e} {one:11.0e}")

# %% [markdown]
# The points' names are those of [the walk](walk.ipynb), the bounds that this
# chapter does not derive those of [the judge](judge.ipynb). What is below
# these numbers a walk cannot see: it is no proof that a model is right to the
# last bit.

# %%
import tempfile
from pathlib import Path

from gptoss.weights.config import GptOssConfig
from gptoss.weights.write import random_tensors, write_checkpoint

# %% [markdown]
# ## One number, worked through
#
# One entry of a projection: 2,880 products of a weight and an input, summed in
# fp32, stored in bf16. In float64, with sixteen digits, we get what exact
# arithmetic would give; then each kind of rounding in turn.

# %%
g = torch.Generator().manual_seed(0)
weight, x = (torch.randn(2880, generator=g).bfloat16() for _ in range(2))
terms = weight.double() * x.double()
exact, size = terms.sum().item(), terms.abs().sum().item()
stored = (weight.float() @ x.float()).bfloat16().item()
u, w = 2.0 ** -8, 2.0 ** -24  # half a unit in the last place: bf16, fp32
print(f"exact {exact:.3f}, stored {stored:.3f}, "
      f"off by {abs(stored - exact):.3f}")
print(f"storing: at most 1/256 of {exact:.1f} is {u * abs(exact):.3f}")
print(f"summing: the terms' sizes add up to {size:.0f}; 2,880 roundings of "
      f"1/2^24 of that at worst: {2880 * w * size:.3f}")
likely = 5 * 2880 ** 0.5 * w * size
print(f"summing, as good as never more than {likely:.3f}")
bound = u * abs(exact) + likely
print(f"bound {bound:.3f}, ratio {abs(stored - exact) / bound:.2f}")
assert abs(stored - exact) <= bound

# %% [markdown]
# The ratio is below 1: rounding explains the number. Had one of the 2,880
# products been left out, of which a typical one has the size 0.64, the ratio
# would be about 3.6, and rounding would be no explanation. The
# rest of the chapter is this cell for every operation of the model, and the
# reason for the 5.

# %%
print(f"typical product {size / 2880:.2f}; left out, the ratio is about "
      f"{(abs(stored - exact) + size / 2880) / bound:.1f}")

# %% [markdown]
# ## Derivation
#
# **Excess.** That ratio is what we judge by. A network is a chain of
# operations, each with a named point after it. Let $f$ be one of them. An
# implementation computed $\hat y$ from what it had before, $\hat x$; both are
# recorded. Define the *excess* of the point
#
# $$
# \rho = \max_i \frac{|\hat y - f(\hat x)|_i}{b(\hat x)_i}
# $$ (parity-excess)
#
# with $f$ evaluated in float64 and $b$ a bound on what rounding can do inside
# the operation. (Where both are 0 the quotient counts as 0; the code keeps
# every bound above $2^{-120}$ for that.) If $\rho \le 1$, rounding explains
# the point. The first point with $\rho > 1$ is where the implementation
# leaves the model. No second implementation is needed: $f$ and the weights are
# enough. Nothing adds up along the network, and a token that rounding sent to
# another expert is judged on the way that it went. What is left is to find
# $b$: here for sums and linear layers, which the others are made of; those of
# softmax and the experts stand [where they are judged](judge.ipynb).
#
# **One rounding.** A format of $m$ significant bits has the unit roundoff
# $u = 2^{-m}$: bf16 has 8 bits, fp32 24. Between 32 and 64 bf16 has steps of
# $1/4$, so 45.865 becomes 45.75, off by at most half a step, $1/8$; that is
# below $45.9 / 256$. In general
#
# $$
# \mathrm{fl}(y) = y\,(1 + \delta), \qquad |\delta| \le u .
# $$ (parity-round)
#
# **A sum of $n$ terms** $t_i$, kept in fp32 with unit $w = 2^{-24}$, is
# rounded after each addition, and errors have both signs. At worst all point
# the same way: $n w \sum|t_i|$. How far off are sums really? We add 2,880
# terms one after the other, two thousand times:

# %%
t = (torch.randn(2000, 2880, generator=g).bfloat16().double()
     * torch.randn(2000, 2880, generator=g).bfloat16().double())
chain = torch.zeros(2000)
for column in t.unbind(1):
    chain = chain + column.float()
off = (chain.double() - t.sum(1)).abs() / (w * t.abs().sum(1))
print(f"in units of w sum|t|: the worst of 2,000 sums is off by "
      f"{off.max().item():.1f}; 5 sqrt(n) allows {5 * 2880 ** 0.5:.0f}, "
      "the worst case 2,880")

# %% [markdown]
# So signs cancel. To have a bound and not a habit, take the errors as
# independent, with $\delta$ spread evenly over $\pm w$. A uniform variable
# is no wilder than a normal one of the same variance, $w^2/3$, so for
# constants $a_i$
#
# $$
# P\Big(\big|\textstyle\sum_i a_i \delta_i\big| > \lambda\, w
# \sqrt{\textstyle\sum_i a_i^2}\Big) \le 2\, e^{-3\lambda^2/2} .
# $$ (parity-hoeffding)
#
# With $\lambda = 5$ this is $10^{-16}$: a walk of $10^9$ sums raises a false
# alarm once in ten million times. (Without the uniform spread it is
# Hoeffding's inequality, with $e^{-\lambda^2/2}$. Higham and Mary, 2019, make
# the same argument for chains of operations.) Here the $a_i$ are the $n$
# partial sums, each at most $\sum|t_i|$, so the root is at most
# $\sqrt n \sum|t_i|$. Hence
#
# $$
# b_{\text{sum}} = \gamma_n \sum_i |t_i|, \qquad
# \gamma_n = \min(n, \lambda\sqrt n)\, w .
# $$ (parity-sum)
#
# It is generous, as the cell above says, and must be: the order of the
# additions is not ours to know, and partial sums need not cancel.
#
# **A linear layer** $y = Ax + c$ whose input carries errors up to $e$ (zero
# if $x$ was recorded) and whose output is stored in the activations' format:
#
# $$
# b_{\text{linear}} = \min\big(|A|\,e,\ \lambda\sqrt{A^{2} e^{2}}\big)
# + \gamma_{n+1} \big(|A||x| + |c|\big) + u\,|y| ,
# $$ (parity-linear)
#
# absolute values and squares taken entry by entry. Its three terms are those
# of the worked number: what the input brings along (at worst, or by
# {eq}`parity-hoeffding`), the sum, the storing.
#
# Implementations differ in what they keep *inside* an operation. Let $u'$ be
# the unit of that: $u' = w$ where it stays in fp32, as in our attention;
# $u' = u$ where each step is stored, as in transformers'. The experts add the
# bias in a step of its own, which costs $u'|Ax|$ more.

# %% [markdown]
# **The [kernels](../kernels/packed.ipynb)** store no step inside an expert,
# nor what it gives before it is weighted, nor the two products of a
# rotation: there $u$ becomes $w$. They round twice to something else. What
# enters a packed product is held in integers, with a step $a$ for each block
# of 32. Before the first matrix $a$ is that of {eq}`kernels-step`, and what
# is not small beside the block's largest is kept exactly; before the second
# it is $\max_i |x_i| / Q$. So an entry is off by at most
#
# $$
# e_i = \begin{cases}
#   a/2 & \text{if } |x_i| < 2^7 a \\ 0 & \text{else}
# \end{cases} \;\text{(first)}, \qquad
# e_i = \frac{\max_j |x_j|}{2Q} \;\text{(second)},
# $$ (parity-half)
#
# and {eq}`parity-linear` with this $e$ is the bound: at worst its first term
# is {eq}`kernels-error`, summed over the blocks. Products of matrices in bf16,
# with whatever instruction, are sums of $n$ terms in fp32, and
# [twelve bits](../kernels/twelve_bits.ipynb) hold the same numbers as
# sixteen: their bound is plain torch's.

# %% [markdown]
# ## Code
#
# ### What can rounding explain?
#
# {eq}`parity-round`, {eq}`parity-sum` and {eq}`parity-linear`; `unit`, `wide`
# and `inner` are $u$, $w$ and $u'$. A pair is a value and a bound on its
# error, both float64. In `linear` each line is a term of the equation.

# %% tags=["export"]
DEVIATIONS = 5  # in Hoeffding's inequality; see the derivation
FLOOR = 2.0 ** -120  # what underflow may leave
EXPONENTIAL = 1e-6  # the kernels' own (kernels/experts.h)
KEYS_AT_ONCE = 64  # keys that their attention takes at a time
LARGEST = 32639  # of their integers, 127 * 256 + 127
LOST = 2.0 ** -107  # a block below this may become zeros
Pair = tuple[Tensor, Tensor]  # float64: a value, and a bound on its error


@dataclass(frozen=True)
class Rounding:
    """The unit roundoffs of a run, and how errors grow through sums."""

    unit: float  # of the activations' dtype
    wide: float  # of what sums are kept in
    inner: float  # of intermediate results inside attention and experts
    step: float  # of the steps of a rotation and of an expert
    power: float = 0.0  # what an exponential is off by, beyond `wide`
    kernels: bool = False  # {eq}`parity-half`, and attention by chunks

    @classmethod
    def of(cls, dtype: torch.dtype, inner: bool, kernels: bool = False
           ) -> "Rounding":
        """For activations in dtype; inner and kernels as in `Contract`."""
        def unit(kind: torch.dtype) -> float:
            return torch.finfo(kind).eps / 2
        wide = unit(torch.promote_types(dtype, torch.float32))
        more = (wide, EXPONENTIAL, True) if kernels else (unit(dtype),)
        return cls(unit(dtype), wide, unit(dtype) if inner else wide, *more)

    def sums(self, n: int) -> float:
        """Relative error of a sum of n rounded terms."""
        return min(n, DEVIATIONS * math.sqrt(n)) * self.wide

    def stored(self, value: Tensor, error: Tensor, step: bool = False
               ) -> Pair:
        """Rounded once more: as activations are, or as a step is."""
        unit = self.step if step else self.unit
        return value, error + unit * (value.abs() + error) + FLOOR

    def linear(self, x: Pair, weight: Tensor, bias: Tensor, inner: bool
               ) -> Pair:
        """x @ weight.T + bias, stored; inner: a step in an expert, its bias
        added apart."""
        value, error = x
        size = value.abs() @ weight.abs().T + bias.abs()
        carried = torch.minimum(
            error @ weight.abs().T,
            DEVIATIONS * (error.square() @ weight.square().T).sqrt())
        y = value @ weight.T
        apart = self.inner * y.abs() if inner else 0.0
        return self.stored(y + bias, carried + apart + size * self.sums(
            weight.shape[1] + 1), inner)

# %%
torch.manual_seed(0)
weight, bias = torch.randn(64, 512), torch.randn(64)
x = torch.randn(100, 512)
r = Rounding.of(torch.bfloat16, False)
w, b, x = (t.bfloat16() for t in (weight, bias, x))
value, bound = r.linear((x.double(), torch.zeros(100, 512).double()),
                        w.double(), b.double(), False)
ratio = ((F.linear(x, w, b).double() - value).abs() / bound).max().item()
assert 0.5 < ratio <= 1
print(f"of 6,400 bf16 products the worst uses {ratio:.1f} of its bound")

# %% [markdown]
# And {eq}`parity-half`, which the kernels need: by how much an input of a
# packed product may be off. It enters `linear` as the error of $x$. What comes
# in bf16 has a power of two as its step, $2^{-13}$ of the power of two below
# the block's largest, and from a 64th of that largest on it is exact. A block
# whose numbers all are below $2^{-107}$ may become zeros.

# %% tags=["export"]
def half_step(x: Pair, stored: bool) -> Tensor:
    """How far from x (…, 32 N) the kernels' integers may be, entry by entry.

    stored: x comes in bf16, its step is a power of two and nothing from
    1/64 of the block's largest on is changed; else the finest step.
    """
    parts = (x[0].abs() + x[1].abs()).unflatten(-1, (-1, BLOCK))
    top = parts.amax(-1, keepdim=True)
    if stored:
        whole = torch.ldexp(torch.ones_like(top), top.frexp()[1] - 1)
        half = torch.where(parts < whole / 64, whole * 2.0 ** -14, 0.0)
    else:  # a hundredth for the rounding of the step itself
        half = (1.01 / 2 / LARGEST * top).expand_as(parts)
    return half.flatten(-2) + LOST


class EightRounding(Rounding):
    """Of products with matrices in eight bits."""

    def linear(self, x: Pair, weight: Tensor, bias: Tensor, inner: bool
               ) -> Pair:
        """x meets them in integers, or they are rounded to bf16 again: as if
        x were off as far."""
        more = half_step(x, True) + x[0].abs() * 2.0 ** -9
        return super().linear((x[0], x[1] + more), weight, bias, inner)

# %%
x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
x = (x.exp() * x).bfloat16().double()  # some entries are much larger
zero = torch.zeros_like(x)
top = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
for stored, step in ((True, 2.0 ** (top.log2().floor() - 13)),
                     (False, top / LARGEST)):
    near = ((x.unflatten(-1, (-1, 32)) / step).round() * step).flatten(-2)
    off, half = (near - x).abs(), half_step((x, zero), stored)
    assert (off <= half).all() and (off > 0.9 * half).any()
    print(f"at most half a step off; exact: {(off == 0).double().mean():.0%}")

# %% [markdown]
# ### Who rounds where? Four contracts
#
# Which value an implementation rounds, and where, is its *contract*. Three
# are plain torch, and differ in three places: attention, the experts, and
# which expert they take when two router logits are equal. Everything else
# they round alike. The fourth is that of our kernels.
#
# First attention: ours is one operator; transformers' rounds after every
# step; OpenAI's does too, but subtracts no maximum. In fp32 the three agree;
# in bf16 about half of the numbers have other bits:

# %% tags=["export:contracts"]
def attention_fp32(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                   positions: Tensor, window: int, scale: float) -> Tensor:
    """Our operator: fp32 from q to the one rounding at the end.

    q (1, T, H, C), k and v (1, S, G, C) of positions 0 ... S - 1, positions
    (1, T) of the queries, window 0: none. Returns (1, T, H, C).
    """
    keys = torch.arange(k.shape[1])[None]
    return torch.ops.gptoss.sink_attention(
        q, k, v, sinks, positions, keys, window, scale)


def attention_hf(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                 positions: Tensor, window: int, scale: float) -> Tensor:
    """transformers' eager attention: scores, the difference to the row's
    maximum, and the softmax are each rounded. As `attention_fp32`."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    hidden = ~visible(positions, positions, window or None)[:, None]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    column = sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
    both = torch.cat([scores, column], -1)
    both = both - both.amax(-1, keepdim=True)
    return (both.softmax(-1)[..., :-1] @ v).transpose(1, 2)

# %% tags=["export:contracts"]
def attention_openai(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     positions: Tensor, window: int, scale: float) -> Tensor:
    """OpenAI's sdpa: scores and softmax rounded, no maximum subtracted.
    As `attention_fp32`."""
    groups = k.shape[2]
    q = q[0].unflatten(1, (groups, -1))
    k, v = (x[0].unsqueeze(2).expand_as(q) for x in (k, v))
    scores = torch.einsum("qhmd,khmd->hmqk", q, k) * scale
    hidden = ~visible(positions, positions, window or None)
    scores = scores.masked_fill(hidden, -torch.inf)
    column = sinks.view(groups, -1, 1, 1).expand(*scores.shape[:3], 1)
    probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("hmqk,khmd->qhmd", probs, v).flatten(1, 2)[None]

# %%
q, k, v = (torch.randn(1, 20, heads, 32) for heads in (4, 2, 2))
more = torch.randn(4), torch.arange(20)[None], 6, 32 ** -0.5
forms = (attention_fp32, attention_hf, attention_openai)
a, b, c = (form(q, k, v, *more) for form in forms)
assert max((a - b).abs().max(), (a - c).abs().max()) < 1e-6
low = [form(q.bfloat16(), k.bfloat16(), v.bfloat16(),
            more[0].bfloat16(), *more[1:]) for form in forms]
for name, other in zip(("transformers'", "OpenAI's"), low[1:], strict=True):
    print(f"numbers with other bits than ours in bf16, {name}: "
          f"about {round((other != low[0]).double().mean().item(), 1):.0%}")

# %% [markdown]
# Equal logits are no corner case: with 8 significant bits they happen.

# %% tags=["export:contracts"]
def choose_stable(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Our router: of equal logits the lower index. x (T, D) -> weights and
    ids (T, K)."""
    return router(x)


def choose_topk(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' and OpenAI's: torch.topk, which of equal logits takes
    one or the other. As `choose_stable`."""
    logits = F.linear(x, router.weight, router.bias)
    values, ids = logits.topk(router.k, dim=-1)
    return values.softmax(-1), ids

# %%
TINY = GptOssConfig(
    num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, swiglu_limit=2.0,
    eos_token_id=2, pad_token_id=0)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "tiny"
write_checkpoint(path, TINY, random_tensors(TINY))
router = GptOss.from_pretrained(path).layers[0].mlp.router
rows = torch.randn(20_000, 64).bfloat16()
top = F.linear(rows, router.weight, router.bias).sort(-1)[0]
ties = (top[:, -2] == top[:, -3]).float().mean().item()
other = (choose_stable(router, rows)[1].sort(-1)[0]
         != choose_topk(router, rows)[1].sort(-1)[0]).any(-1)
print(f"second and third equal: {ties:.1%} of tokens; other choices where "
      f"they are not: {(other & (top[:, -2] != top[:, -3])).sum()}")

# %% [markdown]
# Then the experts: a loop for each of them, whose weights may be packed.

# %% tags=["export:contracts"]
def held(module: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer of a module by its name."""
    return getattr(module, name)


def expert_weights(module: Experts, e: int, dtype: torch.dtype
                   ) -> tuple[Tensor, Tensor]:
    """Expert e in dtype: gate_up (2F, D) and down (D, F)."""
    def one(name: str) -> Tensor:
        if not module.packed:
            return held(module, name)[e]
        return decode(held(module, f"{name}_blocks")[e],
                      held(module, f"{name}_scales")[e], dtype)
    return one("gate_up_proj"), one("down_proj")


def experts_fp32(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
                 ) -> Tensor:
    """Our experts: weighted and summed in fp32. x (T, D), ids and weights
    (T, K) -> (T, D)."""
    return module(x, ids, weights)


def experts_hf(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
               ) -> Tensor:
    """transformers' eager loop: product, bias, weighting and each addition
    are rounded, experts ascending. As `experts_fp32`."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        k, n = torch.where((ids == e).T)
        up, down = (w.T.contiguous()
                    for w in expert_weights(module, e, x.dtype))
        hidden = clamped_swiglu(
            x[n] @ up + held(module, "gate_up_proj_bias")[e], module.limit)
        out = hidden @ down + held(module, "down_proj_bias")[e]
        y.index_add_(0, n, out * weights[n, k, None])
    return y

# %% tags=["export:contracts"]
def experts_openai(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
                   ) -> Tensor:
    """OpenAI's einsum over copies of the chosen experts; product and bias
    are rounded apart, the sum over K once. As `experts_fp32`."""
    used = ids.unique()
    place = torch.searchsorted(used, ids.contiguous())
    up, down = map(torch.stack, zip(*(
        expert_weights(module, e, x.dtype) for e in used.tolist()),
        strict=True))
    hidden = torch.einsum("beck,bk->bec", up[place], x)
    hidden = clamped_swiglu(
        hidden + held(module, "gate_up_proj_bias")[ids], module.limit)
    out = torch.einsum("beck,bek->bec", down[place], hidden)
    out = out + held(module, "down_proj_bias")[ids]
    return torch.einsum("bec,be->bc", out, weights)

# %%
module = GptOss.from_pretrained(path, torch.float32).layers[0].mlp.experts
ids = torch.stack([torch.randperm(8)[:2] for _ in range(20)])
weights = torch.rand(20, 2)
x = torch.randn(20, 64)
a, b, c = (form(module, x, ids, weights)
           for form in (experts_fp32, experts_hf, experts_openai))
assert max((a - b).abs().max(), (a - c).abs().max()) < 1e-4
print("outputs of shape", tuple(a.shape), "apart by less than 1e-4")

# %% [markdown]
# A contract is these three functions, and a list of what is rounded where.
# The kernels are called through the same modules as plain torch, so theirs
# has the same functions. It differs in the rounding: nothing between q and
# the output of attention, nothing between an expert's two matrices but the
# sixteen-bit integers of {eq}`kernels-step`.

# %% tags=["export:contracts"]
@dataclass(frozen=True)
class Contract:
    """Where an implementation rounds to the dtype of its activations."""

    attention: Callable[..., Tensor]
    choose: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    inner: bool  # rounds inside attention and experts; plain torch only
    rules: Mapping[str, str]  # point -> what is rounded there
    kernels: bool = False  # kernels/build's, which compute in bf16 alone

    def describe(self) -> str:
        """A line a point."""
        return "\n".join(f"{point:10} {rule}"
                         for point, rule in self.rules.items())

# %% tags=["export:contracts"]
_ONCE = {  # what all three do
    "norm": "in fp32, weight included; 1 rounding",
    "q, k, v": "product and bias summed in fp32; 1 rounding",
    "turned": "tables in fp32, rounded; each product and the sum rounded"}
_EACH = {"middle": "1 rounding", "router": "as q, k, v",
         "shares": "softmax of the K chosen in fp32; 1 rounding"}
_TOPK = {"chosen": "torch.topk: of equal logits either"}
CONTRACTS = {
    "fp32": Contract(attention_fp32, choose_stable, experts_fp32, False, {
        **_ONCE, "weights": "never rounded",
        "heads": "in fp32 from q; 1 rounding", **_EACH,
        "chosen": "of equal logits the lower index",
        "experts": "gate_up, SwiGLU's steps and down rounded; "
                   "weighted and summed in fp32; 1 rounding"}),
    "hf-eager": Contract(attention_hf, choose_topk, experts_hf, True, {
        **_ONCE, "weights": "q k, times scale, minus maximum, softmax: "
                            "each rounded",
        "heads": "summed in fp32; 1 rounding", **_EACH, **_TOPK,
        "experts": "as fp32, but bias, weighting and each of the K "
                   "additions rounded"}),
    "openai-torch": Contract(
        attention_openai, choose_topk, experts_openai, True, {
        **_ONCE, "weights": "q k, times scale, softmax: each rounded",
        "heads": "summed in fp32; 1 rounding", **_EACH, **_TOPK,
        "experts": "as fp32, but bias rounded apart"}),
    "kernels": Contract(attention_fp32, choose_stable, experts_fp32, False, {
        **_ONCE, "turned": "tables in fp32, rounded; 1 rounding",
        "weights": "never rounded; each exponential off by 1e-6 at most",
        "heads": "in fp32 from q; 1 rounding", **_EACH,
        "chosen": "of equal logits the lower index",
        "experts": "what enters a packed product in 16-bit integers, a step "
                   "a block; all else in fp32; 1 rounding"}, kernels=True),
}
PLAIN_CONTRACTS = [name for name, use in CONTRACTS.items() if not use.kernels]

# %%
for name in ("fp32", "hf-eager", "kernels"):
    print(f"{name}\n{CONTRACTS[name].describe()}\n")

# %% [markdown]
# ## What is refused
#
# A contract that says *kernels* is of no use if plain torch computes, nor the
# other way round. So a walk sees to it: `computing` switches kernels off for
# the contracts of plain torch, whatever is loaded, and refuses the contract
# *kernels* unless the dtype is bfloat16 and the kernels could be built. Who
# names no contract gets that of what runs unasked: in bf16 the kernels where
# they load, else `fp32`.

# %% tags=["export:contracts"]
class ParityError(Error):
    """A comparison that cannot be made, and what is missing for it."""


def contract_for(contract: str | None, dtype: torch.dtype) -> str:
    """A name of CONTRACTS; for None that of what runs unasked: in bf16 the
    kernels where they load, else plain torch, "fp32"."""
    if contract is None and dtype == torch.bfloat16:
        from gptoss.kernels.build import load_kernels

        plain = load_kernels().startswith("torch")
        return "fp32" if plain else "kernels"
    return contract or "fp32"


@contextmanager
def computing(contract: str, dtype: torch.dtype) -> Iterator[str]:
    """Inside, ours computes as the contract says: with the kernels, or with
    plain torch, whatever is loaded. Yields which, in words.

    ParityError: the kernels cannot be had here, or not for that dtype.
    """
    kernels = sys.modules.get("gptoss.kernels.build")
    if not CONTRACTS[contract].kernels:  # never imported: none can compute
        with kernels.plain_torch() if kernels else nullcontext():
            yield "plain torch"
        return
    from gptoss.kernels.build import load_kernels

    name = load_kernels()
    if name.startswith("torch") or dtype != torch.bfloat16:
        raise ParityError("contract: kernels need bfloat16 and a compiler, "
                          f"found {str(dtype)[6:]} and {name}")
    yield name

# %%
for contract in (None, "hf-eager"):
    name = contract_for(contract, torch.float32)
    with computing(name, torch.float32) as what:
        print(f"{contract}: {name}, by {what}")
try:
    with computing("kernels", torch.float32):
        pass
except ParityError as error:
    print(str(error).partition(" and torch")[0])

# %% [markdown]
# ## It holds
#
# Random linear layers of three widths, in fp32 and in bf16: no entry is
# beyond its bound. In bf16 nearly all of it is used, by the one rounding at
# the end. In fp32 little is: most partial sums are far smaller than
# $\sum|t_i|$, and libraries add in blocks, so that their chains are short.
# The bound must hold for any order of summation.

# %%
for dtype in (torch.float32, torch.bfloat16):
    r, used = Rounding.of(dtype, False), []
    for n in (32, 512, 2880):
        w, b, x = (torch.randn(*shape).to(dtype)
                   for shape in ((64, n), (64,), (100, n)))
        value, bound = r.linear((x.double(), torch.zeros_like(x).double()),
                                w.double(), b.double(), False)
        off = (F.linear(x, w, b).double() - value).abs()
        used.append((off / bound).max().item())
    assert max(used) <= 1
    print(f"{str(dtype)[6:]}: at most", "half the bound" if max(used) < 0.5
          else f"{max(used):.1f} of the bound")

# %% [markdown]
# ## In the 20b and the 120b

# %%
r = Rounding.of(torch.bfloat16, False)
n = GptOssConfig.gpt_oss_20b().hidden_size
assert n == GptOssConfig.gpt_oss_120b().hidden_size
chance = 2 * math.exp(-1.5 * DEVIATIONS ** 2)
print(f"a sum of {n} terms: {r.sums(n):.1e} instead of {n * r.wide:.1e},",
      f"{n * r.wide / r.sums(n):.0f} times less; beyond it: {chance:.0e}")
assert abs(chance / 1e-16 - 1) < 0.05
folder.cleanup()

# %% [markdown]
# ## Takeaways
#
# 1. The ratio of an error to its bound says whether rounding explains a
#    number; the bound belongs to one operation and the inputs that it had.
# 2. A sum of $n$ terms is off by about $\sqrt n$ roundings, not by $n$. Five
#    times that is exceeded once in $10^{16}$ sums.
# 3. Such bounds see a factor of a ten-thousandth at most points; where several
#    roundings follow each other some hundredths can hide.
# 4. Three implementations and our kernels round in four ways, all of them
#    right. Which one is a contract, and our weights can be run under each.
# 5. Equal router logits are no corner case in eight bits, so which expert
#    wins a tie is part of the contract.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A kernel keeps its sums in bf16. From how many terms on does the worst case
# say nothing at all, because $\gamma_n \ge 1$, and from how many on does
# {eq}`parity-sum` say nothing? Is that kernel fit for the 20b's projections?

# %% tags=["hide-cell"]
u = 2.0 ** -8
worst = next(n for n in range(1, 10_000) if n * u >= 1)
probable = next(n for n in range(1, 10_000)
                if min(n, DEVIATIONS * math.sqrt(n)) * u >= 1)
print(f"from {worst} terms, and from {probable:,} of the 2,880")
assert (worst, probable) == (256, 2622)

# %% [markdown]
# ### Exercise 2
#
# The worked number once more, in fp16, which has 11 significant bits, summed
# in fp32. What is the bound, and which of its two terms is larger now?

# %% tags=["hide-cell"]
g = torch.Generator().manual_seed(0)
weight, x = (torch.randn(2880, generator=g).bfloat16() for _ in range(2))
half = 2.0 ** -11 * abs(exact)
found = (weight.float() @ x.float()).half().item()
print(f"storing {half:.3f}, summing {likely:.3f}: the sum's is larger; "
      f"ratio {abs(found - exact) / (half + likely):.1f}")

# %% [markdown]
# ### Exercise 3
#
# A kernel forgets the last of the 2,880 products. Among a thousand entries of
# a projection, how many show it, in bf16 and in fp32?

# %% tags=["hide-cell"]
rows, x = (torch.randn(1000, 2880, generator=g).bfloat16(),
           torch.randn(1, 2880, generator=g).bfloat16())
for dtype in (torch.bfloat16, torch.float32):
    r = Rounding.of(dtype, False)
    value, bound = r.linear((x.double(), torch.zeros(1, 2880).double()),
                            rows.double(), torch.zeros(1).double(), False)
    short = (x[:, :-1].double() @ rows[:, :-1].double().T).to(dtype)
    seen = ((short.double() - value).abs() > bound).double().mean().item()
    print(f"{str(dtype)[6:]}: seen in {seen:.0%} of the entries")

# %% [markdown]
# ## Sources
#
# - N. J. Higham and T. Mary, *A new approach to probabilistic rounding error
#   analysis*, SIAM J. Sci. Comput. 41(5), 2019, doi:10.1137/18M1226312.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `eager_attention_forward`, `GptOssExperts.forward`.
# - openai/gpt-oss 0.0.9, `gpt_oss/torch/model.py`: `sdpa`, `swiglu`,
#   `MLPBlock.forward`.
