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
# masks, a router, experts. Each is a plain function of torch. On a processor
# with the right instructions, C++ answers the same calls many times faster
# ([measured](../kernels/measured.ipynb)). How does the model ask, so that it
# need not know who answers? With **nine names** and one table.
#
# Two parts are still missing, and this chapter writes them: the norm, which
# rounds once where Llama's rounds twice and so misses a quarter of its
# numbers, and an attention whose scores fit into memory.
#
# ## Picture
#
# What happens to one call, `torch.ops.gptoss.rms_norm(x, weight, eps)`:

# %% tags=["hide-input"]
# Figure: a call enters a column of four questions. Are gradients asked for?
# Then the plain function or a formula answers. Does x have no numbers? Then
# the shape alone. Is there a kernel for the device? Then the kernel. If none
# holds, the plain function.
import matplotlib.pyplot as plt
import torch

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
questions = (
    ("is a gradient asked for?", "plain function, or a formula",
     "training", "C0"),
    ("has x a shape only?", "an empty result of the right shape",
     "meta device, torch.compile", "C1"),
    ("is there a kernel for the device?", "the kernel",
     "C++ or a GPU's", "C2"),
    ("otherwise", "plain function", "anywhere", "C0"))
fig, ax = plt.subplots(figsize=(7.2, 2.9))
ax.text(1.6, 4.35, "the model calls a name", ha="center", fontsize=9)
for row, (question, answer, where, color) in enumerate(questions):
    y = 3.4 - row
    for x, words, edge in ((1.6, question, "0.4"), (5.6, answer, color)):
        ax.text(x, y, words, ha="center", va="center", bbox={
            "boxstyle": "round,pad=0.4", "fc": "white", "ec": edge,
            "lw": 1.6})
    ax.annotate("", (4.0, y), (3.15, y), arrowprops={
        "arrowstyle": "-|>", "color": color})
    if row < 3:
        ax.text(3.55, y + 0.1, "yes", fontsize=8, ha="center")
        ax.text(1.7, y - 0.55, "no", fontsize=8)
    ax.annotate("", (1.6, y + 0.25), (1.6, y + 0.72), arrowprops={
        "arrowstyle": "-|>", "color": "0.4"})
    ax.text(7.35, y, where, va="center", fontsize=8, color="0.35")
ax.set(xlim=(0, 9.3), ylim=(-0.1, 4.6))
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: one name, four answers. The caller writes the same line in all
# four cases. Who adds a kernel changes the third answer and no line of the
# model.
#
# ## The naive version
#
# The obvious way is a table of functions, or an `if` in each layer: take the
# kernel if there is one, else plain torch. Two things go wrong. First, who
# imported early keeps the old function:

# %%
def plain_double(x):
    return 2 * x


def kernel_double(x):  # stands for C++: it reads x's memory by its own means
    return torch.from_numpy(2 * x.detach().numpy())


table = {"double": plain_double}
double = table["double"]  # what a layer imports when it is loaded
table["double"] = kernel_double  # the kernels are compiled later
print("the layer uses", double.__name__, "- the table says",
      table["double"].__name__)

# %% [markdown]
# Second, a kernel computes and nothing else. Torch asks more of a function:
# a gradient, and the shape of the result for a tensor that has no numbers (on
# the *meta device* a tensor has a shape and a dtype, and no memory; that is
# how 65 GB are planned on a laptop, and how `torch.compile` looks ahead).

# %%
x = torch.ones(3, requires_grad=True)
print("has a gradient:", plain_double(x).requires_grad,
      "- with the kernel:", kernel_double(x).requires_grad)
for function in (plain_double, kernel_double):
    try:
        print(function.__name__, "on meta:",
              tuple(function(torch.ones(3, device="meta")).shape))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        print(function.__name__, "on meta:", type(error).__name__)

# %% [markdown]
# ## What is an operator?
#
# A name that PyTorch knows, with a *schema* (what goes in, what comes out)
# and several answers. The *dispatcher*, the part of PyTorch that every call
# of torch goes through, picks the answer by what it is given. `torch.add` is
# one; we can make our own, and add answers at any time, by anyone:

# %%
library = torch.library.Library("lesson", "FRAGMENT")
library.define("double(Tensor x) -> Tensor")
library.impl("double", plain_double, "CompositeExplicitAutograd")  # any device
torch.library.register_fake("lesson::double", torch.empty_like, lib=library)
ask = torch.ops.lesson.double  # what a layer imports when it is loaded
x = torch.ones(3)
print("plain:", ask(x).tolist())
library.impl("double", lambda x: kernel_double(x) + 0.5, "CPU")  # later
print("a kernel, told apart by its ½:", ask(x).tolist())
print("on meta:", tuple(ask(x.to("meta")).shape))

# %% [markdown]
# That is the whole idea: the model calls names, and whoever can do it faster
# registers an answer. What the rest of the chapter adds is a table of our
# names, gradients, and a rule for when the kernels are loaded.
#
# ## Derivation
#
# First the two parts that are missing.
#
# ### The norm
#
# A layer reads a vector through a norm: divide by the root mean square (rms),
# multiply by a learned weight $w$ {cite}`rmsnorm2019`. For $x = (3, 4)$ the
# mean square is 12.5, the rms 3.54, and $x / 3.54 = (0.85, 1.13)$. Nothing is
# subtracted and there is no bias:
#
# $$
# N(x) = \mathrm{round}\Big(\frac{x}{\sqrt{\frac1D\sum_i x_i^2 +
# \varepsilon}} \odot w\Big), \qquad \varepsilon = 10^{-5},
# $$ (model-norm)
#
# with everything inside the bracket in fp32 and one rounding to the dtype of
# $x$. But for $\varepsilon$, which keeps a vector of zeros from dividing by
# zero, $N(ax) = N(x)$ for every $a > 0$: a layer reads the direction of a
# vector, never its length.
#
# Written from memory as in Llama, it rounds twice, the normalised vector to
# bf16 and then the product. It runs, and the values look right:

# %%
def naive_norm(x: torch.Tensor, weight: torch.Tensor,
               eps: float = 1e-5) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


x = torch.randn(1000, 2880).bfloat16()
weight = (1 + 0.3 * torch.randn(2880)).bfloat16()
exact = x.double()
exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
exact = (exact * weight.double()).bfloat16()
wrong = (naive_norm(x, weight) != exact).float().mean().item()
print(f"not the nearest bf16: {wrong:.0%}")

# %% [markdown]
# ### Attention in tiles
#
# Attention makes a matrix of scores, queries by keys, for every head. At the
# length that the model is made for, 131,072 tokens, that is too much for one
# layer in fp32:

# %%
length = 131_072
print(f"all scores: {64 * length * length * 4 / 1e12:.1f} TB; one query's: "
      f"{64 * length * 4 / 1e6:.0f} MB")

# %% [markdown]
# But the scores of one query are a row that depends on no other row. So $n$
# rows can be computed, used and dropped before the next $n$. With room for
# $Z$ scores instead of $B H T S$,
#
# $$
# B \cdot H \cdot n \cdot S \le Z
# \quad\Rightarrow\quad n = \max\Big(1, \Big\lfloor \frac{Z}{B H S}
# \Big\rfloor\Big) .
# $$ (model-tile)
#
# With $Z = 2^{23}$ one row for each of 64 heads and 131,072 keys just fits.
# [Each key once](../kernels/attending.ipynb) cuts the keys as well, with the
# running maximum of [sinks](../attention/sinks.ipynb); the result is the same
# sum.
#
# ## Code
#
# ### How is the norm rounded once?
#
# The weight is multiplied in fp32, before the rounding.

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
# Against the exact value it misses the nearest bf16 only where fp32 itself
# lands on the other side of a midpoint.

# %%
wrong = (rms_norm(x, weight) != exact).float().mean().item()
assert wrong < 1e-3
print(f"not the nearest bf16: {wrong:.1%}")
pair = torch.tensor([3.0, 4.0])
square = pair.square().mean()
print(f"(3, 4): mean square {square:.1f}, rms {square.sqrt():.2f}, normed",
      [f"{y:.2f}" for y in rms_norm(pair, torch.ones(2)).tolist()])

# %% [markdown]
# ### How do some queries at a time make the whole?
#
# {eq}`model-tile` in code: `visible` ([masks](../attention/masks.ipynb)) and
# `attention_concat` ([sinks](../attention/sinks.ipynb)) on a slice of the
# queries at a time.

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
print(tuple(tiled.shape), "the same to 1e-14")

# %% [markdown]
# ### What does an operator promise?
#
# A row of our table. Beside the schema and the plain function it may say what
# shape the result has (`fake`; without it the plain function is run on the
# meta device), a gradient formula with what it saves for it (`setup`), and
# how many FLOPs it takes, as torch cannot look inside.

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
# ### Which nine names?
#
# The large matrices are multiplied behind one name; the packed linear layer,
# the experts, the rotation, the choice of the router, attention and the norm
# get one each; and two serve gradients.
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

# %%
print(f"{'name':24}{'plain function':22}{'gradient':10}shape by")
for name, operator in OPERATORS.items():
    print(f"{name:24}{operator.plain.__name__:22}"
          f"{'formula' if operator.backward else 'torch':10}"
          f"{'fake' if operator.fake else 'plain'}")

# %% [markdown]
# ### When are the kernels loaded?
#
# Kernels have to be compiled, and nobody should wait for that before it is
# needed: they are loaded when a model is made, or when an operator computes
# for somebody who has none. It must not matter who asks first, by which
# import, or from which thread. Hence one table of what answers, a lock around
# the loading, and a rule: it counts as loaded when it *is* loaded. A second
# thread that comes meanwhile waits and then computes with what was loaded, as
# the first does. The thread that loads may itself call operators; it does not
# wait for itself. If loading fails, the next who asks tries again. The table
# names the kernels by strings, so that nothing of it is imported here, and
# torch is not, either.

# %% tags=["export:answers"]
from collections.abc import Callable
from importlib import import_module
from threading import RLock

ANSWERS = {"kernels": "gptoss.kernels.build:load_kernels",
           "product": "gptoss.kernels.quicker:choose_product",
           "step": "gptoss.kernels.step:quick_step",
           "drafts": "gptoss.kernels.drafts:with_drafts"}
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
            find_answer("product")()  # ours or torch's, by the clock
            find_answer("step")
            _state = "loaded"
        finally:
            _state = _state if _state == "loaded" else ""
    return False

# %%
print("loaded before I asked:", load_answers(), "and now:", load_answers())
print("a step is run by", find_answer("step").__name__)

# %% [markdown]
# ### What if a gradient is asked for?
#
# PyTorch looks first for an answer at the key "Autograd". There we put a
# gate. Where a gradient is asked for, the plain function itself runs, or the
# formula; elsewhere the dispatcher goes on below its autograd keys, to a
# kernel, a fake tensor or whoever listens there. (Calling the kernel at once
# instead would pass by the listeners, and a fake tensor has no memory to
# read.) A formula speaks of gradients backwards only, so for forward
# derivatives and for `torch.func` the plain function runs.

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
# ### How is a name defined, and defined again?
#
# Whoever edits the cell of an operator and runs it again wants the new one. So
# a definition replaces the one before, with another schema if need be; the
# kernels registered on the name stay. What is defined is held by the namespace
# `torch.ops.gptoss` itself, which a notebook and the package share.
#
# Beside each operator NAME stands a twin, `plain_NAME`, on which nothing
# faster is ever registered: a kernel that cannot do what it is asked for hands
# it on to that. And an error of the plain function gets a note that names the
# operator and, for each argument, its dtype and shape.

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

# %% tags=["export"]
for _name, _operator in OPERATORS.items():
    define_operator(_name, _operator)

# %% [markdown]
# The operator and the plain function behind it, then what a second definition
# does, and what an error says:

# %%
sinks.requires_grad_()
out = torch.ops.gptoss.sink_attention(q, k, v, sinks, pos, pos, 8, 0.25)
out.square().sum().backward()
print(f"operator - plain: {(out - whole).abs().max().item():.0f}; the sinks' "
      f"gradient has shape {tuple(sinks.grad.shape)}")
for factor in (2, 3):  # a cell that was edited and run again
    define_operator("example", Operator(
        "(Tensor x) -> Tensor", lambda x, factor=factor: factor * x,
        torch.empty_like))
    one = torch.ones(1, requires_grad=True)
    torch.ops.gptoss.example(one).backward()
    print("value", torch.ops.gptoss.example(one).item(), "gradient",
          one.grad.item(), "on meta",
          tuple(torch.ops.gptoss.example(one.to("meta")).shape))
define_operator("example", Operator("(Tensor x, int n) -> Tensor",
                                    lambda x, n: x.view(n)))
try:
    torch.ops.gptoss.example(torch.zeros(3, 2), 5)
except RuntimeError as error:
    print(error.__notes__[0])

# %% [markdown]
# ### What is refused?
#
# An operator takes tensors alone, and trusts them. Two have a function in
# front of them that takes what people hold. `mxfp4_linear` says what is wrong
# with it, by an MXFP4Error: blocks and scales that do not fit each other, a
# dtype of `x` that is no float, an `x` whose last size is not that of the
# weight, a bias of another length. `packed_experts` takes two packed weights
# where the operator takes their four tensors.

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
print(tuple(y.shape), "and the gradient that reaches x", tuple(x.grad.shape))
try:
    mxfp4_linear(x[:, :32], packed.blocks, packed.scales)
except MXFP4Error as error:
    print(error)

# %% [markdown]
# ## Cost
#
# **Memory of the scores**, {eq}`model-tile`: at most `SCORES_AT_ONCE`
# entries (and a few copies of it inside `attention_concat`). **A call** goes
# through the dispatcher, which costs some microseconds; [the
# step](../kernels/step.ipynb) avoids them.

# %%
print(f"{4 * SCORES_AT_ONCE / 1e6:.0f} MB instead of "
      f"{64 * length * length * 4 / 1e12:.1f} TB")

# %% [markdown]
# ## Takeaways
#
# - The model calls names; a table says for each the plain function, the shape
#   of its result, its gradient, and what it costs. Kernels plug in from below.
# - It counts as loaded when it is loaded: whoever asks first, from whichever
#   thread, computes with the same kernels as everybody after.
# - One rounding, at the end: a norm that rounds twice misses the nearest bf16
#   in a quarter of its numbers.
# - A query's scores depend on no other query, so they are made some at a time.
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
print(f"{ratio:.1f} times as large")
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
usual = OPERATORS["rms_norm"]
define_operator("rms_norm", replace(usual, plain=naive_norm))
other = torch.ops.gptoss.rms_norm(row, one, 1e-5)
define_operator("rms_norm", usual)
again = torch.ops.gptoss.rms_norm(row, one, 1e-5)
print("numbers that changed:", (before != other).sum().item(),
      "and after putting it back:", (before != again).sum().item())

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
