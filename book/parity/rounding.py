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
from gptoss.model.layers import Experts
from gptoss.moe.experts import clamped_swiglu
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import BLOCK, decode

# %%
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor

from gptoss.model.transformer import GptOss
from gptoss.weights.config import GptOssConfig
from gptoss.weights.write import random_tensors, write_checkpoint

# %% [markdown]
# ## One number, worked through
#
# One entry of a projection: 2,880 products, summed in fp32, stored in bf16.
# What would exact arithmetic have given, and what may the two kinds of
# rounding have done to it?

# %%
g = torch.Generator().manual_seed(0)
weight, x = (torch.randn(2880, generator=g).bfloat16() for _ in range(2))
terms = weight.double() * x.double()
exact, size = terms.sum().item(), terms.abs().sum().item()
stored = (weight.float() @ x.float()).bfloat16().item()
u, w = 2.0 ** -8, 2.0 ** -24  # half a unit in the last place: bf16, fp32
print(f"exact {exact:.3f}, stored {stored:.3f}, "
      f"off by {abs(stored - exact):.3f}")
print(f"storing explains {u * abs(exact):.3f}")
print(f"summing at worst {2880 * w * size:.3f}, "
      f"as good as never more than {5 * 2880 ** 0.5 * w * size:.3f}")
assert abs(stored - exact) <= u * abs(exact) + 5 * 2880 ** 0.5 * w * size

# %% [markdown]
# The worst case of the sum is larger than what storing it in eight bits can
# do; the probable one is a small part of that. The rest of the chapter is
# this cell for every operation of the model.

# %% [markdown]
# ## Derivation
#
# **One operation at a time.** A network is a chain of operations, each with
# a named point after it. Let $f$ be one of them. An implementation computed
# $\hat y$ from what it had before, $\hat x$; both are recorded. Define the
# *excess* of the point
#
# $$
# \rho = \max_i \frac{|\hat y - f(\hat x)|_i}{b(\hat x)_i}
# \qquad (0/0 := 0),
# $$ (parity-excess)
#
# with $f$ evaluated in float64 and $b$ a bound on what rounding can do
# inside the operation. If $\rho \le 1$, rounding explains the point. The
# first point with $\rho > 1$ is where the implementation leaves the model.
# No second implementation is needed: $f$ and the weights are enough. Nothing
# adds up along the network, and a token that rounding sent to another expert
# is judged on the way that it went. What is left is to find $b$: here for
# sums and linear layers, which the others are made of; those of softmax and
# the experts stand [where they are judged](judge.ipynb).
#
# **One rounding.** A format of $m$ significant bits has the unit roundoff
# $u = 2^{-m}$ ($2^{-8}$ for bf16, $2^{-24}$ for fp32), and
#
# $$
# \mathrm{fl}(y) = y\,(1 + \delta), \qquad |\delta| \le u .
# $$ (parity-round)
#
# **A sum of $n$ terms** $t_i$ kept in fp32, with unit $w$, has rounding
# errors of both signs. The worst case is $n w \sum|t_i|$, which for
# $n = 2880$ is useless: $1.7 \cdot 10^{-4}$ of $\sum|t_i|$, when terms of
# random sign cancel to about $\sum|t_i| / \sqrt{2880}$. Take the errors as
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
# **A linear layer** $y = Wx + c$ whose input carries errors up to $e$ (zero
# if $x$ was recorded) and whose output is stored in the activations' format:
#
# $$
# b_{\text{linear}} = \min\big(|W|\,e,\ \lambda\sqrt{W^{2} e^{2}}\big)
# + \gamma_{n+1} \big(|W||x| + |c|\big) + u\,|y| ,
# $$ (parity-linear)
#
# absolute values and squares taken entry by entry: what the input brings
# along (at worst, or by {eq}`parity-hoeffding`), the sum, the storing.
#
# Implementations differ in what they keep *inside* an operation. Let $u'$ be
# the unit of that: $u' = w$ where it stays in fp32, as in our attention;
# $u' = u$ where each step is stored, as in transformers'. The experts add the
# bias in a step of its own, which costs $u'|Wx|$ more.

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
# ### What rounding explains
#
# {eq}`parity-round`, {eq}`parity-sum` and {eq}`parity-linear`; `unit`, `wide`
# and `inner` are $u$, $w$ and $u'$. A pair is a value and a bound on its
# error.

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
# packed product may be off. It enters `linear` as the error of $x$.

# %% tags=["export"]
def half_step(x: Pair, stored: bool) -> Tensor:
    """How far from x (…, 32 N) the kernels' integers may be, entry by entry.

    stored: x comes in bf16, its step is a power of two and nothing from
    1/64 of the block's largest on is changed; else the finest step.
    """
    parts = sum(t.abs() for t in x).unflatten(-1, (-1, BLOCK))
    top = parts.amax(-1, keepdim=True)
    if stored:
        whole = torch.ldexp(torch.ones_like(top), top.frexp()[1] - 1)
        half = torch.where(parts < whole / 64, whole * 2.0 ** -14, 0.0)
    else:  # a hundredth for the rounding of the step itself
        half = (1.01 / 2 / LARGEST * top).expand_as(parts)
    return half.flatten(-2) + LOST

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
# ### Four contracts
#
# Which value an implementation rounds, and where, is its *contract*. Three
# are plain torch, and differ in three places: attention, the experts, and
# which expert they take when two router logits are equal. Everything else
# they round alike. The fourth is that of our kernels.
#
# First attention: ours is one operator; transformers' rounds after every
# step; OpenAI's does too, but subtracts no maximum.

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
print("equal in bf16:", torch.equal(low[0], low[1]),
      torch.equal(low[1], low[2]))

# %% [markdown]
# Equal logits are no corner case: with 8 significant bits they happen.

# %% tags=["export:contracts"]
def choose_stable(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Our router: of equal logits the lower index. x (T, D) -> weights and
    ids (T, K)."""
    return router(x)


def choose_topk(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
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
print(f"second and third equal: {ties:.1%} of tokens;",
      "choices differ only there:",
      not bool((other & (top[:, -2] != top[:, -3])).any()))

# %% [markdown]
# Then the experts.

# %% tags=["export:contracts"]
def expert_weights(module: Experts, e: int, dtype: torch.dtype
                   ) -> tuple[Tensor, Tensor]:
    """Expert e in dtype: gate_up (2F, D) and down (D, F)."""
    if not module.packed:
        return module.gate_up_proj[e], module.down_proj[e]
    return tuple(decode(getattr(module, f"{name}_blocks")[e],
                        getattr(module, f"{name}_scales")[e], dtype)
                 for name in ("gate_up_proj", "down_proj"))


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
        hidden = clamped_swiglu(x[n] @ up + module.gate_up_proj_bias[e],
                                module.limit)
        out = hidden @ down + module.down_proj_bias[e]
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
    hidden = clamped_swiglu(hidden + module.gate_up_proj_bias[ids],
                            module.limit)
    out = torch.einsum("beck,bek->bec", down[place], hidden)
    out = out + module.down_proj_bias[ids]
    return torch.einsum("bec,be->bc", out, weights)

# %%
module = GptOss.from_pretrained(path, torch.float32).layers[0].mlp.experts
ids = torch.stack([torch.randperm(8)[:2] for _ in range(20)])
weights = torch.rand(20, 2)
x = torch.randn(20, 64)
a, b, c = (form(module, x, ids, weights)
           for form in (experts_fp32, experts_hf, experts_openai))
assert max((a - b).abs().max(), (a - c).abs().max()) < 1e-4
print(tuple(a.shape))

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
# A contract that says *kernels* is of no use if plain torch computes, nor the
# other way round. So a walk sees to it.

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
# 1. A sum of $n$ terms is off by about $\sqrt n$ roundings, not by $n$. Five
#    times that is exceeded once in $10^{16}$ sums.
# 2. A bound belongs to one operation and to the inputs that it had: then no
#    error of an earlier operation needs to be explained.
# 3. Three implementations and our kernels round in four ways, all of them
#    right. Which one is a contract, and our weights can be run under each.
# 4. Equal router logits are no corner case in eight bits, so which expert
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
likely = next(n for n in range(1, 10_000)
              if min(n, DEVIATIONS * math.sqrt(n)) * u >= 1)
print(f"from {worst} terms, and from {likely:,} of the 2,880")
assert (worst, likely) == (256, 2622)

# %% [markdown]
# ## Sources
#
# - N. J. Higham and T. Mary, *A new approach to probabilistic rounding error
#   analysis*, SIAM J. Sci. Comput. 41(5), 2019, doi:10.1137/18M1226312.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `eager_attention_forward`, `GptOssExperts.forward`.
# - openai/gpt-oss 0.0.9, `gpt_oss/torch/model.py`: `sdpa`, `swiglu`,
#   `MLPBlock.forward`.
