"""What does the model ask for, and who answers?

Generated from book/model/operators.py; edit the chapter, not this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gptoss.attention.masks import visible
from gptoss.attention.rope import apply_rope
from gptoss.attention.sinks import attention_concat, attention_flash
from gptoss.model.answers import load_answers
from gptoss.model.norm import rms_norm
from gptoss.moe.experts import packed_backward, packed_by_decoding
from gptoss.moe.routing import route
from gptoss.weights.mxfp4 import (
    BLOCK,
    MXFP4Error,
    PackedMXFP4,
    check_dtype,
    check_packed,
    decode_by_table,
    linear_by_decoding,
)

# --- How do some queries at a time make the whole? ---------------------------

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


# --- What does an operator promise? ------------------------------------------

@dataclass(frozen=True)
class Operator:
    """What an operator promises, whoever computes it."""

    schema: str  # arguments and results, as torch.library writes them
    plain: Callable  # computes it with plain torch, on every device
    fake: Callable | None = None  # empty results; None: those of `plain`
    backward: Callable | None = None  # as in torch.library.register_autograd;
    setup: Callable | None = None  # None: torch differentiates `plain`
    flops: Callable | None = None  # as in torch.utils.flop_counter


# --- Which nine names? -------------------------------------------------------

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


# --- What if a gradient is asked for? ----------------------------------------

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


# --- How is a name defined, and defined again? -------------------------------

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


for _name, _operator in OPERATORS.items():
    define_operator(_name, _operator)


# --- What is refused? --------------------------------------------------------

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


__all__ = [
    "OPERATORS",
    "Operator",
    "SCORES_AT_ONCE",
    "attention_in_tiles",
    "define_operator",
    "has_kernel",
    "mxfp4_linear",
    "packed_experts",
]
