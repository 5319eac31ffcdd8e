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
#     module: ops
#     public: [load_answers, define_operator, mxfp4_linear, packed_experts]
# ---

# %% [markdown]
# # What does the model ask for, and who answers?
#
# ## Question
#
# The parts that compute are there: weights in four bits, rotated heads, sinks,
# masks, a router, experts. A model calls them 24 times a token, and on a
# processor with the right instructions a kernel in C++ answers the same call
# many times faster. How does the model ask, so that it need not know who
# answers? With **nine names**, one table, and one rounding that everybody must
# get right.
#
# Two things are still missing, and this chapter writes them: the norm, and an
# attention that fits into memory.

# %%
import torch

# %% [markdown]
# ## The naive version
#
# **The norm**, written from memory as in Llama, rounds the normalised vector
# to bf16
# and then multiplies by the weight, which rounds a second time. It runs, the
# values look right, and a quarter of them are not the nearest bf16.

# %%
def naive_norm(x: torch.Tensor, weight: torch.Tensor,
               eps: float = 1e-5) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


torch.manual_seed(0)
x = torch.randn(1000, 2880).bfloat16()
weight = (1 + 0.3 * torch.randn(2880)).bfloat16()
exact = x.double()
exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
exact = (exact * weight.double()).bfloat16()
wrong = (naive_norm(x, weight) != exact).float().mean().item()
print(f"not the nearest bf16: {wrong:.0%}")

# %% [markdown]
# **The scores**: one matrix of queries by keys for every head. At the length
# that the model is made for, one layer's would take, in fp32,

# %%
length = 131_072
print(f"{64 * length * length * 4 / 1e12:.1f} TB")

# %% [markdown]
# ## Derivation
#
# Let $x_l$ be the residual stream before layer $l$, one vector of $D$
# numbers a token, with $x_0$ the token's row of the embedding.
#
# **The norm** divides by the root mean square and multiplies by a learned
# weight $w$ {cite}`rmsnorm2019`. Nothing is subtracted and there is no bias:
#
# $$
# N(x) = \mathrm{round}\Big(\frac{x}{\sqrt{\frac1D\sum_i x_i^2 +
# \varepsilon}} \odot w\Big), \qquad \varepsilon = 10^{-5},
# $$ (model-norm)
#
# with everything inside the bracket in fp32 and one rounding to the dtype of
# $x$. But for $\varepsilon$, $N(ax) = N(x)$ for every $a > 0$: a block reads
# the direction of the stream, never its length.
#
# **The scores** of one query are a row that depends on no other row. So $n$
# rows can be computed, used and dropped before the next $n$. With room for $Z$
# scores instead of $B H T S$,
#
# $$
# B \cdot H \cdot n \cdot S \le Z
# \quad\Rightarrow\quad n = \max\Big(1, \Big\lfloor \frac{Z}{B H S}
# \Big\rfloor\Big) .
# $$ (model-tile)
#
# $Z = 2^{23}$ takes 34 MB in fp32: one row for each of 64 heads and 131,072
# keys, the longest context. [Each key once](../kernels/attending.ipynb) cuts
# the keys as well, with the running maximum of
# [sinks](../attention/sinks.ipynb); the result is the same sum.
#

# %% [markdown]
# ## Code
#
# ### RMSNorm

# %% tags=["export:norm"]
import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension: (…, D) -> (…, D).

    Computed in fp32 (float64 for float64) and rounded ONCE, at the end, to
    x.dtype: the weight is multiplied before the rounding. The order is that
    of transformers' GptOssRMSNorm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * wide).to(x.dtype)

# %% [markdown]
# Against the exact value from the naive version it misses the nearest bf16
# only where fp32 itself lands on the other side of a midpoint.

# %%
wrong = (rms_norm(x, weight) != exact).float().mean().item()
assert wrong < 1e-3
print("nearest bf16 in more than 999 of 1000:", wrong < 1e-3)

# %% [markdown]
# ### Who answers
#
# The model must not care how a norm or a packed weight is computed. So it
# calls *operators*, names that PyTorch dispatches by device, with plain torch
# behind them; [kernels](../kernels/building.ipynb) are registered on the same
# names.
#
# Kernels have to be compiled, and nobody should wait for that before it is
# needed: they are loaded when a model is made, or when an operator computes
# for somebody who has none. It must not matter who asks first, by which
# import, or from which thread. Hence one table of what answers, a lock around
# the loading, and a rule: it counts as loaded when it *is* loaded. A second
# thread that comes meanwhile waits and then computes with what was loaded, as
# the first does. The table names the kernels by strings, so that nothing of it
# is imported here, and torch is not, either.

# %% tags=["export:answers"]
from collections.abc import Callable
from importlib import import_module
from threading import RLock

ANSWERS = {"kernels": "gptoss.kernels.build:load_kernels",
           "step": "gptoss.kernels.step:quick_step"}
LOADING = RLock()  # the thread that loads may call operators itself
_state = ""  # then "loading", then "loaded": changed behind LOADING alone


def find_answer(what: str) -> Callable:
    """The function that ANSWERS names; imports its module."""
    module, _, name = ANSWERS[what].partition(":")
    return getattr(import_module(module), name)


def load_answers() -> bool:
    """Load, once, the kernels and the step. True: there was nothing to wait
    for. Whoever comes while another thread loads waits, and gets False; what
    fails is tried again by the next."""
    global _state
    if _state == "loaded":
        return True
    with LOADING:
        if _state == "loading":
            return True
        if _state == "loaded":
            return False
        _state = "loading"
        try:
            find_answer("kernels")()
            find_answer("step")
            _state = "loaded"
        finally:
            _state = _state if _state == "loaded" else ""
    return False

# %%
print(load_answers(), load_answers(), find_answer("step").__name__)

# %% [markdown]
# ### What an operator is
#
# An operator is opaque to `torch.compile`, to the meta device and to fake
# tensors, so it also says what it returns (`fake`). And it stands between
# torch and what torch would differentiate. Behind each stands a composition of
# torch's own functions, which torch can differentiate in every way it knows;
# some bring a gradient formula, too. What torch cannot know of an operator
# that it does not look into is how many FLOPs it takes, so some say it.

# %% tags=["export"]
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, shape_wrapper




@dataclass(frozen=True)
class Operator:
    """What an operator promises, whoever computes it."""

    schema: str  # arguments and results, as torch.library writes them
    plain: Callable  # computes it with plain torch, on every device
    fake: Callable | None = None  # empty results; None: those of `plain`
    backward: Callable | None = None  # as in torch.library.register_autograd;
    setup: Callable | None = None  # None: torch differentiates `plain`
    flops: Callable | None = None  # as in torch.utils.flop_counter

# %% [markdown]
# A gate stands at the autograd key. Where a gradient is asked for, the
# composition itself runs, or the formula; elsewhere the dispatcher goes on
# below its autograd keys, to a kernel, a fake tensor or whoever listens there.
# (Calling the kernel at once instead would pass by the listeners, and a fake
# tensor has no memory to read.) A formula speaks of gradients backwards only,
# so for forward derivatives and for `torch.func` the composition runs.

# %% tags=["export"]
def _gate(name: str, plain: Callable, formula: Callable | None) -> Callable:
    """What stands at the autograd key of an operator."""
    def gate(keys, *args):
        if ((torch.autograd.forward_ad._current_level >= 0
                or torch._C._are_functorch_transforms_active())
                and any(map(_is_real, args))):
            return plain(*args)
        if formula is not None:
            return formula(keys, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return plain(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return _overload(name).redispatch(
                keys & torch._C._after_autograd_keyset, *args)
    return gate


def _is_real(argument) -> bool:
    return (isinstance(argument, torch.Tensor)
            and argument.is_floating_point())


def _words(argument) -> str:
    """An argument in an error's note: type and sizes of a tensor."""
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    return f"{argument.dtype} {tuple(argument.shape)}"


def _compact(result: torch.Tensor) -> torch.Tensor:
    """In one piece: torch.compile relies on the strides that `fake` says."""
    return result.contiguous()


def _overload(name: str):
    return getattr(torch.ops.gptoss, name).default

# %% [markdown]
# Whoever edits the cell of an operator and runs it again wants the new one. So
# a definition replaces the one before; the kernels registered on the name
# stay. What is defined is held by the namespace `torch.ops.gptoss` itself,
# which a notebook and the package share.
#
# Beside each operator NAME stands a twin, `plain_NAME`, on which nothing
# faster is ever registered: a kernel that cannot do what it is asked for hands
# it on to that.

# %% tags=["export"]
def _declare(name: str, operator: Operator) -> None:
    held = vars(torch.ops.gptoss).setdefault("_held", {})
    if name in held:
        held.pop(name)._destroy()
    library = held[name] = torch.library.Library("gptoss", "FRAGMENT")
    library.define(name + operator.schema,
                   tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        if not load_answers():
            return _overload(name)(*args)  # there may be a kernel now
        try:
            return tree_map(_compact, operator.plain(*args))
        except Exception as error:
            error.add_note(
                f"in gptoss::{name}({', '.join(map(_words, args))})")
            raise

    def shape(*args):
        return tree_map(_compact, (operator.fake or operator.plain)(*args))

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptoss::{name}", shape, lib=library)
    formula = None if operator.backward is None else make_autograd_impl(
        _overload(name), Info(operator.backward, operator.setup))
    library.impl(name, _gate(name, operator.plain, formula), "Autograd",
                 with_keyset=True)
    if operator.flops is not None:
        flop_registry[_overload(name).overloadpacket] = shape_wrapper(
            operator.flops)


def define_operator(name: str, operator: Operator) -> None:
    """Enter it into OPERATORS and define torch.ops.gptoss.NAME, or define it
    anew, and its twin plain_NAME. A kernel registered for "CPU" or "CUDA"
    takes precedence over operator.plain."""
    OPERATORS[name] = operator
    _declare(name, operator)
    _declare(f"plain_{name}", Operator(operator.schema, operator.plain))


def has_kernel(name: str = "packed_experts", device: str = "CPU") -> bool:
    """Is there a kernel for the operator, on "CPU" or "CUDA"?"""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"gptoss::{name}", device)

# %% [markdown]
# ### Attention as an operator
#
# {eq}`model-tile` in code: `visible` and `attention_concat` on a slice of
# the queries at a time.

# %% tags=["export"]
from gptoss.attention.masks import visible
from gptoss.attention.sinks import attention_concat, attention_flash

SCORES_AT_ONCE = 2 ** 23  # entries of (B, H, T, S) that exist at a time


def attention_in_tiles(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                       q_pos: Tensor, k_pos: Tensor, window: int,
                       scale: float) -> Tensor:
    """`attention_concat` over the visible keys, some queries at a time.

    q (B, T, H, C); k, v (B, S, G, C); sinks (H,); q_pos (B, T) and
    k_pos (B, S) int64, -1 for padding; window 0 means none. Returns
    (B, T, H, C). A query's row of scores depends on no other query, so the
    tiles change the memory, not the result.
    """
    B, T, H, _ = q.shape
    rows = max(1, SCORES_AT_ONCE // max(1, B * H * k.shape[1]))
    # training on a CPU: torch's kernel keeps no scores for the way back
    trains = q.requires_grad and q.device.type == "cpu"
    form = attention_flash if trains else attention_concat
    tiles = [
        form(
            q[:, t:t + rows], k, v, sinks,
            visible(q_pos[:, t:t + rows], k_pos, window or None), scale)
        for t in range(0, max(T, 1), rows)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)

# %% [markdown]
# Seven queries at a time or all 50 at once: the same numbers.

# %%
q, k, v = (torch.randn(1, 50, heads, 16, dtype=torch.float64)
           for heads in (4, 2, 2))
sinks, pos = torch.randn(4, dtype=torch.float64), torch.arange(50)[None]
whole = attention_in_tiles(q, k, v, sinks, pos, pos, 8, 0.25)
usual, SCORES_AT_ONCE = SCORES_AT_ONCE, 7 * 4 * 50
tiled = attention_in_tiles(q, k, v, sinks, pos, pos, 8, 0.25)
SCORES_AT_ONCE = usual
assert torch.allclose(whole, tiled, rtol=0, atol=1e-14)
print(tuple(tiled.shape))

# %% [markdown]
# ### The table of operators
#
# The model calls nine operators: the large matrices are multiplied behind one,
# the packed linear layer, the experts, the rotation, the choice of the router,
# attention and the norm get one each, and two serve gradients.
# [Kernels](../kernels/building.ipynb) register faster ones for the same names;
# nothing here has to know.
#
# Most are made of torch's own operations, whose gradients torch knows. Two
# bring a formula, because torch's way would keep the decoded weights until the
# backward pass. Packed weights are constants, but gradients must pass through
# them to what lies below (an adapter, an embedding):
# $\partial x = \partial y\, W$ for the linear layer, and for the experts what
# [experts](../moe/experts.ipynb) derived.

# %% tags=["export"]
import math


def _mxfp4_linear_setup(ctx, inputs, output) -> None:
    _, blocks, scales, bias = inputs
    ctx.save_for_backward(blocks, scales)
    ctx.has_bias = bias is not None


def _mxfp4_linear_backward(ctx, grad):
    """Gradients of x and bias; packed weights are constants."""
    blocks, scales = ctx.saved_tensors
    # the operator: torch.compile traces this, but not mxfp4's table
    grad_x = grad @ torch.ops.gptoss.mxfp4_decode(blocks, scales, grad.dtype)
    grad_bias = grad.reshape(-1, len(blocks)).sum(0) if ctx.has_bias else None
    return grad_x, None, None, grad_bias


def _experts_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.limit = inputs[-1]


def _experts_backward(ctx, grad):
    d_x, d_weights, d_up, d_down = torch.ops.gptoss.packed_experts_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.limit)
    return (d_x, None, d_weights, None, None, d_up, None, None, d_down,
            None)


def _decode_fake(blocks, scales, dtype):
    shape = (*scales.shape[:-1], BLOCK * scales.shape[-1])
    return torch.empty(shape, dtype=dtype, device=blocks.device)


def _attention_flops(q, k, *_, out_shape=None, **__) -> int:
    B, T, H, C = q  # shapes
    return 4 * B * T * k[1] * H * C


def _linear_flops(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x) * weight[0]

# %% tags=["export"]
import torch.nn.functional as F

from gptoss.moe.experts import packed_backward, packed_by_decoding
from gptoss.weights.mxfp4 import BLOCK, decode_by_table, linear_by_decoding

from gptoss.attention.rope import apply_rope
from gptoss.moe.routing import route

_EXPERTS = ("Tensor x, Tensor ids, Tensor weights, Tensor gate_up_blocks,"
            " Tensor gate_up_scales, Tensor gate_up_bias, Tensor down_blocks,"
            " Tensor down_scales, Tensor down_bias, float limit")
OPERATORS: dict[str, Operator] = {
    "rms_norm": Operator(
        "(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm),
    "linear": Operator(
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", F.linear,
        flops=_linear_flops),
    "rope": Operator("(Tensor x, Tensor cos, Tensor sin) -> Tensor",
                     apply_rope),
    "sink_attention": Operator(
        "(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor q_pos,"
        " Tensor k_pos, int window, float scale) -> Tensor",
        attention_in_tiles, lambda q, *_: torch.empty_like(q),
        flops=_attention_flops),
    "route": Operator("(Tensor logits, int k) -> (Tensor, Tensor)", route),
    "packed_experts": Operator(
        f"({_EXPERTS}) -> Tensor", packed_by_decoding,
        lambda x, *_: torch.empty_like(x), _experts_backward, _experts_setup),
    "packed_experts_backward": Operator(
        f"(Tensor grad, {_EXPERTS}) -> (Tensor, Tensor, Tensor, Tensor)",
        packed_backward,
        lambda grad, x, ids, weights, a, b, up_bias, c, d, down_bias, limit:
            tuple(map(torch.empty_like, (x, weights, up_bias, down_bias)))),
    "mxfp4_linear": Operator(
        "(Tensor x, Tensor blocks, Tensor scales, Tensor? bias) -> Tensor",
        linear_by_decoding, lambda x, blocks, scales, bias:
            x.new_empty((*x.shape[:-1], blocks.shape[0])),
        _mxfp4_linear_backward, _mxfp4_linear_setup),
    "mxfp4_decode": Operator(
        "(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
        decode_by_table, _decode_fake),
}
for _name, _operator in OPERATORS.items():
    define_operator(_name, _operator)

# %% [markdown]
# The operator and the plain function behind it, and what a second definition
# does:

# %%
sinks.requires_grad_()
out = torch.ops.gptoss.sink_attention(q, k, v, sinks, pos, pos, 8, 0.25)
out.square().sum().backward()
print(torch.equal(out.detach(), whole), tuple(sinks.grad.shape),
      OPERATORS["sink_attention"].plain.__name__)
for factor in (2, 3):  # a cell that was edited and run again
    define_operator("example", Operator(
        "(Tensor x) -> Tensor", lambda x, factor=factor: factor * x,
        torch.empty_like))
    one = torch.ones(1, requires_grad=True)
    torch.ops.gptoss.example(one).backward()
    print(torch.ops.gptoss.example(one).item(), one.grad.item(),
          tuple(torch.ops.gptoss.example(one.to("meta")).shape))

# %% [markdown]
# An operator takes tensors alone. Two have a function in front of them that
# takes what people hold, and says what is wrong with it.

# %% tags=["export"]
from gptoss.weights.mxfp4 import (
    MXFP4Error,
    PackedMXFP4,
    check_dtype,
    check_packed,
)


def mxfp4_linear(x: Tensor, blocks: Tensor,
                 scales: Tensor, bias: Tensor | None = None
                 ) -> Tensor:
    """x @ W.T + bias with a packed weight W (m, n), in x.dtype.

    x (…, n) float16, bfloat16, float32 or float64; blocks (m, n/32, 16) and
    scales (m, n/32) uint8; bias (m,) in x.dtype or None. Returns (…, m).
    Differentiable in x and bias. Raises MXFP4Error on a mismatch.
    """
    check_packed(blocks, scales)
    check_dtype(x.dtype)
    n = BLOCK * scales.shape[-1]
    if scales.ndim != 2 or x.ndim == 0 or x.shape[-1] != n:
        raise MXFP4Error(f"x: expected (..., {n}) beside blocks (m, "
                         f"{n // BLOCK}, 16), found x {tuple(x.shape)} and "
                         f"blocks {tuple(blocks.shape)}")
    if bias is not None and bias.shape != blocks.shape[:1]:
        raise MXFP4Error(f"bias: expected {tuple(blocks.shape[:1])}, found "
                         f"{tuple(bias.shape)}")
    return torch.ops.gptoss.mxfp4_linear(x, blocks, scales, bias)


def packed_experts(x: Tensor, ids: Tensor, weights: Tensor,
                   gate_up: PackedMXFP4, gate_up_bias: Tensor,
                   down: PackedMXFP4, down_bias: Tensor, limit: float = 7.0
                   ) -> Tensor:
    """`experts_grouped` on weights that stay in four bits.

    gate_up (E, 2F, D) and down (E, D, F) packed; the rest as in
    `experts_loop`. Decodes the experts hit, one at a time. Differentiable
    in x, weights and the biases; the packed weights are constants.
    """
    return torch.ops.gptoss.packed_experts(
        x, ids, weights, gate_up.blocks, gate_up.scales, gate_up_bias,
        down.blocks, down.scales, down_bias, limit)

# %%
from gptoss.weights.encoding import encode

packed = PackedMXFP4(*encode(torch.randn(8, 64)))
x = torch.randn(3, 64, requires_grad=True)
y = mxfp4_linear(x, packed.blocks, packed.scales)
y.sum().backward()
right = packed.decode(torch.float32).sum(0).expand(3, 64)
assert torch.allclose(x.grad, right, atol=1e-5)
print(tuple(y.shape), "and the gradient reaches x")

# %% [markdown]
# ## Cost
#
# **Memory of the scores**, {eq}`model-tile`: at most `SCORES_AT_ONCE`
# entries, 34 MB in fp32 (and a few copies of it inside `attention_concat`),
# instead of 4.4 TB.

# %% [markdown]
# ## Takeaways
#
# - The model calls names; a table says for each the plain function, the shape
#   of its result, its gradient, and what it costs. Kernels plug in from below.
# - It counts as loaded when it is loaded: whoever asks first, from whichever
#   thread, computes with the same kernels as everybody after.
# - One rounding, at the end: a norm that rounds twice misses the nearest bf16
#   in a quarter of its numbers.
#
# ## Exercises
#
# ### Exercise 1
#
# The naive norm rounds twice. Predict how much
# larger its rms error is than that of `rms_norm`, then measure it.

# %% tags=["hide-cell"]
# Two independent roundings of equal size: variances add, so sqrt(2).
x = torch.randn(1000, 2880).bfloat16()
truth = rms_norm(x.double(), weight.double())
ratio = ((naive_norm(x, weight) - truth).square().mean()
         / (rms_norm(x, weight) - truth).square().mean()).sqrt().item()
print(f"{ratio:.1f}")
assert abs(ratio - 2 ** 0.5) < 0.03

# %% [markdown]
# ### Exercise 2
#
# In a sliding layer a tile of $n$ queries sees fewer
# than $n + W$ keys, yet `attention_in_tiles` gives it all $S$. Give each
# tile only the keys that some query of it sees. Which share of the scores is
# left for $T = 512$, $W = 16$, $n = 32$?

# %% tags=["hide-cell"]
def attention_in_narrow_tiles(q, k, v, sinks, q_pos, k_pos, window, scale,
                              rows):
    tiles, computed = [], 0
    for t in range(0, q.shape[1], rows):
        part = q_pos[:, t:t + rows]
        mask = visible(part, k_pos, window or None)
        keep = mask.any(1).any(0)  # seen by some query in some row
        tiles.append(attention_concat(
            q[:, t:t + rows], k[:, keep], v[:, keep], sinks,
            mask[..., keep], scale))
        computed += mask[..., keep].numel()
    return torch.cat(tiles, 1), computed


torch.manual_seed(0)
q, k, v = (torch.randn(1, 512, heads, 16, dtype=torch.float64)
           for heads in (4, 2, 2))
sinks, pos = torch.randn(4, dtype=torch.float64), torch.arange(512)[None]
whole = attention_in_tiles(q, k, v, sinks, pos, pos, 16, 0.25)
narrow, computed = attention_in_narrow_tiles(
    q, k, v, sinks, pos, pos, 16, 0.25, 32)
assert torch.allclose(whole, narrow, rtol=0, atol=1e-14)
print(f"{computed / 512 ** 2:.1%} of the scores")

# %% [markdown]
# ### Exercise 3
#
# Give the operator `gptoss::rms_norm` another plain function, one that rounds
# twice, ask it for a norm, and put the first one back.

# %% tags=["hide-cell"]
from dataclasses import replace

row = torch.randn(1, 64).bfloat16()
one = torch.ones(64).bfloat16() * 1.3
before = torch.ops.gptoss.rms_norm(row, one, 1e-5)
define_operator("rms_norm", replace(OPERATORS["rms_norm"], plain=naive_norm))
other = torch.ops.gptoss.rms_norm(row, one, 1e-5)
define_operator("rms_norm", OPERATORS["rms_norm"])
again = torch.ops.gptoss.rms_norm(row, one, 1e-5)
print((before != other).sum().item() > 0, (before != again).sum().item())

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`: the model card, architecture and sizes.
# - {cite}`rmsnorm2019` (RMSNorm), {cite}`gqa2023` (grouped queries),
#   {cite}`attention2017` (the block and its residual stream).
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `Transformer`,
#   `AttentionBlock`, `MLPBlock`, `RMSNorm`.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `GptOssModel`, `GptOssDecoderLayer`, `GptOssRMSNorm`.
