"""Eight bits, if you ask

Generated from book/kernels/eight_bits.py; edit the chapter, not this file.
"""

import logging
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.kernels.compact import CompactLinear, make_compact
from gptoss.model.answers import find_answer
from gptoss.model.layers import Linear
from gptoss.model.ops import Operator, define_operator, has_kernel
from gptoss.model.transformer import GptOss

# --- How is a matrix rounded? ------------------------------------------------

class EightWeight(NamedTuple):
    """A matrix (m, n) in whole steps, a step for each 32 of a row."""

    values: Tensor  # (m, n) int8, -127 ... 127; in the order of `_placed`
    scales: Tensor  # (m, n / 32) int16: the bits of bf16 numbers

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def _placed(values: Tensor) -> Tensor:
    """(m, n), each 64 in the other order; twice is as before."""
    return values.unflatten(1, (-1, 2, 2, 16)).transpose(2, 3).flatten(1)


def pack_by_steps(weight: Tensor) -> EightWeight:
    """`pack_eight` in plain torch, a page to read."""
    blocks = weight.float().unflatten(1, (-1, 32))
    finest = blocks.abs().amax(-1) / 127
    bits = finest.view(torch.int32) + 0xFFFF >> 16  # up to the next bf16
    step = (bits << 16).view(torch.float32)
    values = blocks / step.where(step > 0, 1.0)[..., None]
    return EightWeight(_placed(values.round().to(torch.int8).flatten(1)),
                       bits.to(torch.int16))


def unpack_eight(weight: EightWeight, dtype: torch.dtype = torch.float32
                 ) -> Tensor:
    """The matrix (m, n) that the products use; fp32 holds it exactly."""
    blocks = _placed(weight.values).unflatten(1, (-1, 32)).float()
    step = weight.scales.view(torch.bfloat16).float()
    return (blocks * step[..., None]).flatten(1).to(dtype)


# --- Who gets it, and what is saved? -----------------------------------------

def linear_from_eight(x: Tensor, values: Tensor, scales: Tensor,
                      bias: Tensor | None) -> Tensor:
    """The product in plain torch: unpacked, to the type of x."""
    return F.linear(x, unpack_eight(EightWeight(values, scales), x.dtype),
                    bias)


define_operator("eight_linear", Operator(
    "(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor",
    linear_from_eight, lambda x, values, scales, bias:
        x.new_empty((*x.shape[:-1], values.shape[0]))))
define_operator("pack_eight", Operator(
    "(Tensor weight) -> (Tensor, Tensor)", pack_by_steps))


class EightLinear(Linear):
    """A frozen `Linear` that computes with its weight in eight bits.

    The weight itself is kept for whoever saves or trains the model: one that
    learns is read itself.
    """

    values: Tensor  # the two parts of an EightWeight
    scales: Tensor

    def __init__(self, linear: Linear, rounded: EightWeight) -> None:
        super().__init__(linear.in_features, linear.out_features,
                         linear.bias is not None, device="meta",
                         dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        for name, tensor in rounded._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        return torch.ops.gptoss.eight_linear(x, self.values, self.scales,
                                             self.bias)

    @property
    def saved(self) -> int:
        """How many bytes fewer a token reads."""
        return self.weight.nbytes - EightWeight(self.values,
                                                self.scales).nbytes


# --- What is refused? --------------------------------------------------------

def eight_fits(weight: Tensor) -> bool:
    """Is it a bf16 matrix with whole groups of 64 in a row?"""
    return (weight.dtype == torch.bfloat16 and weight.ndim == 2
            and weight.shape[1] % 64 == 0 and weight.numel() > 0)


def _finite(weight: Tensor) -> bool:
    """Without a copy of the matrix."""
    return bool(torch.stack(weight.aminmax()).isfinite().all())


def _can_be(layer: nn.Module) -> TypeGuard[Linear]:
    return (type(layer) is Linear and eight_fits(layer.weight)
            and layer.weight.device.type == "cpu"
            and layer.weight.is_contiguous()
            and not layer.weight.requires_grad and _finite(layer.weight))


def pack_eight(weight: Tensor) -> EightWeight:
    """A bf16 matrix (m, n), 64 dividing n, in eight bits and a half.

    A weight is off by half a step at most, a step being the largest of 32
    over 127, rounded up to bf16. ValueError for another type or shape, NaN
    or infinity.
    """
    if not eight_fits(weight):
        raise ValueError("weight: expected bfloat16 (m, n), 64 dividing n, "
                         f"found {weight.dtype} of {tuple(weight.shape)}")
    if not _finite(weight):
        raise ValueError("weight: expected finite numbers, found NaN or "
                         "infinity")
    return EightWeight(*torch.ops.gptoss.pack_eight(weight.contiguous()))


def eight_layers(model: GptOss) -> None:
    """Replace every frozen bf16 `Linear` on the CPU, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if _can_be(layer):
                setattr(parent, name,
                        EightLinear(layer, pack_eight(layer.weight)))


# --- One table ---------------------------------------------------------------

_log = logging.getLogger("gptoss")


def as_stored(model: GptOss) -> GptOss:
    """The model, its dense matrices in bf16 again, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, CompactLinear | EightLinear):
                plain = Linear(layer.in_features, layer.out_features,
                               layer.bias is not None, device="meta",
                               dtype=layer.weight.dtype)
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(parent, name, plain.train(layer.training))
    return model


def make_eight(model: GptOss) -> GptOss:
    """The model, its dense matrices in eight bits, in place; other numbers.

    Without kernels it stays as it is, and one line on the logger "gptoss"
    says so.
    """
    path = find_answer("kernels")()
    if has_kernel("eight_linear"):
        eight_layers(model)
    else:
        _log.warning("gptoss: matrices stay in sixteen bits: no kernel for "
                     "eight here (%s)", path)
    return model


FORMS = {16: as_stored, 12: make_compact, 8: make_eight}


def hold_dense(model: GptOss, bits: int) -> GptOss:
    """The model, its dense matrices in 16, 12 or 8 bits, in place.

    16: as stored; 12: a copy, nothing lost (`make_compact`); 8: rounded, each
    off by half a percent (`EightLinear`). Another form is taken back first.
    Routers and the embedding stay. ValueError for another number.
    """
    if bits not in FORMS:
        raise ValueError(f"bits: expected {', '.join(map(str, FORMS))}, "
                         f"found {bits}")
    return FORMS[bits](as_stored(model))


__all__ = [
    "EightLinear",
    "EightWeight",
    "FORMS",
    "as_stored",
    "eight_fits",
    "eight_layers",
    "hold_dense",
    "linear_from_eight",
    "make_eight",
    "pack_by_steps",
    "pack_eight",
    "unpack_eight",
]
