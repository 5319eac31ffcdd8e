"""Bytes times bytes, if you ask

Generated from book/kernels/coarse.py; edit the chapter, not this file.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.model.answers import find_answer
from gptoss.model.layers import Experts
from gptoss.model.ops import OPERATORS, Operator, define_operator, has_kernel
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import by_expert, clamped_swiglu
from gptoss.weights.mxfp4 import decode

# --- What is the operator, in plain torch? -----------------------------------

def in_steps(x: Tensor) -> Tensor:
    """x (…, 32 n), each 32 numbers in whole steps of their largest over 127.

    A block whose step is at most 1e-37 is zeros; NaN and infinity make NaN.
    """
    parts = x.unflatten(-1, (-1, 32))
    step = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts / step).round().where(~(step <= 1e-37), 0.0)
    return (whole * step).flatten(-2)


def coarse_by_decoding(x: Tensor, ids: Tensor, weights: Tensor,
                       gate_up_blocks: Tensor, gate_up_scales: Tensor,
                       gate_up_bias: Tensor, down_blocks: Tensor,
                       down_scales: Tensor, down_bias: Tensor, limit: float
                       ) -> Tensor:
    """`packed_experts`, what enters each product in eight bits.

    fp32 between the layers, or float64 if x is.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def apply(e: int, rows: Tensor) -> Tensor:
        gate_up = F.linear(in_steps(rows), decode(
            gate_up_blocks[e], gate_up_scales[e], wide),
            gate_up_bias[e].to(wide))
        return F.linear(
            in_steps(clamped_swiglu(gate_up, limit)),
            decode(down_blocks[e], down_scales[e], wide),
            down_bias[e].to(wide))
    y = by_expert(x.to(wide), ids, weights.to(wide), len(gate_up_scales),
                  apply)
    return y.to(x.dtype)


define_operator("packed_experts_eight", Operator(
    OPERATORS["packed_experts"].schema, coarse_by_decoding,
    lambda x, *_: torch.empty_like(x)))


# --- Who asks for it? --------------------------------------------------------

_log = logging.getLogger("gptoss")


class CoarseExperts(Experts):
    """`Experts` that are packed and round what enters them to eight bits
    (with AMX only what enters the second layer, to bf16)."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (
                x.requires_grad or self.down_proj_bias.requires_grad):
            return super().forward(x, ids, weights)
        up, down = self._packed("gate_up_proj"), self._packed("down_proj")
        return torch.ops.gptoss.packed_experts_eight(
            x, ids, weights, up.blocks, up.scales, self.gate_up_proj_bias,
            down.blocks, down.scales, self.down_proj_bias, self.limit)


BY_BITS: dict[int, type[Experts]] = {16: Experts, 8: CoarseExperts}


def hold_activations(model: GptOss, bits: int) -> GptOss:
    """The model, what enters its experts in 16 or 8 bits, in place.

    16: as always; 8: each 32 numbers in steps of their largest over 127,
    which is quicker for many tokens and changes the results, an expert's by
    one percent (with AMX what stands between its layers in bf16, and by a
    fifth of one). Experts that are not packed stay as they are, and without
    a kernel (AVX2 or more) so do all; one line on the logger "gptoss" says
    so.
    ValueError for another number.
    """
    if bits not in BY_BITS:
        raise ValueError(f"bits: expected {', '.join(map(str, BY_BITS))}, "
                         f"found {bits}")
    if bits != 16:
        path = find_answer("kernels")()
        if not has_kernel("packed_experts_eight"):
            _log.warning("gptoss: activations stay in sixteen bits: no "
                         "kernel for eight here (%s)", path)
            bits = 16
    for layer in model.modules():
        if type(layer) in BY_BITS.values() and layer.packed:
            layer.__class__ = BY_BITS[bits]
    return model


__all__ = [
    "BY_BITS",
    "CoarseExperts",
    "coarse_by_decoding",
    "hold_activations",
    "in_steps",
]
