"""Sixteen bits in twelve

Generated from book/kernels/twelve_bits.py; edit the chapter, not this file.
"""

import logging
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.model.answers import find_answer
from gptoss.model.layers import Linear
from gptoss.model.ops import Operator, define_operator, has_kernel
from gptoss.model.transformer import GptOss

# --- How is a matrix packed? -------------------------------------------------

class CompactWeight(NamedTuple):
    """A bf16 matrix (m, n) in twelve bits a number, nothing lost."""

    blocks: Tensor  # (m, n / 64, 96) uint8: 64 lower bytes, then their codes
    upper: Tensor  # (16,) uint8: the upper byte that a code stands for
    first: Tensor  # (m + 1,) int32: where the others of each row begin
    others: Tensor  # (X,) int32: column << 16 | the number's sixteen bits

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


# a block's bytes: weight i of 32 stands where bits 3 and 4 of i change places
_PLACE = torch.arange(32).view(2, 2, 8).transpose(0, 1).reshape(32)


def pack_by_torch(weight: Tensor) -> CompactWeight:
    """`pack` in plain torch, a page to read; it needs 40 bytes a number."""
    m, n = weight.shape
    bits = weight.view(torch.int16).long() & 0xFFFF
    half = bits >> 8 & 127  # of an exponent; counted in every eighth row
    count = half[::8].flatten().bincount(minlength=128)
    frequent = count.argsort(descending=True, stable=True)[:7]
    upper = F.pad(frequent, (0, 1))
    number = torch.full((128,), 8).scatter(0, frequent, torch.arange(7))
    number[0] = 7
    code = number[half]
    rare = code == 8
    lower = (bits & 255).where(~rare, 0)
    code = (bits >> 15 << 3 | code).where(~rare, 7)
    codes = code.view(m, n // 64, 2, 32)[..., _PLACE]
    blocks = torch.cat([lower.view(m, n // 64, 2, 32)[..., _PLACE].flatten(2),
                        codes[:, :, 0] | codes[:, :, 1] << 4], -1)
    row, column = rare.nonzero(as_tuple=True)
    return CompactWeight(
        blocks.to(torch.uint8),
        torch.cat([upper, upper + 128]).to(torch.uint8),
        F.pad(rare.sum(1).cumsum(0), (1, 0)).int(),
        (column << 16 | bits[row, column]).int())


def unpack(weight: CompactWeight) -> Tensor:
    """The matrix (m, n) in bf16, bit for bit as `pack` took it."""
    m, blocks, _ = weight.blocks.shape
    lower, codes = weight.blocks.long().split([64, 32], -1)
    code = torch.stack([codes & 15, codes >> 4], 2)[..., _PLACE].flatten(2)
    lower = lower.view(m, blocks, 2, 32)[..., _PLACE].flatten(2)
    bits = (weight.upper.long()[code] << 8 | lower).flatten(1)
    row = torch.repeat_interleave(weight.first.diff())
    others = weight.others.long() & 0xFFFFFFFF
    bits[row, others >> 16] = others & 0xFFFF
    return bits.to(torch.int16).view(torch.bfloat16)


# --- Who reads the matrix, who the copy? -------------------------------------

def linear_beside_compact(x: Tensor, weight: Tensor, bias: Tensor | None,
                          *compact: Tensor) -> Tensor:
    """The product in plain torch: with the matrix, not with its copy."""
    return F.linear(x, weight, bias)


define_operator("compact_linear", Operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor blocks, Tensor upper,"
    " Tensor first, Tensor others) -> Tensor", linear_beside_compact))


def _pack_fake(weight: Tensor) -> CompactWeight:
    """Nobody knows without looking how many numbers stand apart."""
    m, n = weight.shape
    apart = torch.library.get_ctx().new_dynamic_size()
    return CompactWeight(weight.new_empty((m, n // 64, 96), dtype=torch.uint8),
                         weight.new_empty(16, dtype=torch.uint8),
                         weight.new_empty(m + 1, dtype=torch.int32),
                         weight.new_empty(apart, dtype=torch.int32))


define_operator("pack_compact", Operator(
    "(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)", pack_by_torch,
    _pack_fake))


class CompactLinear(Linear):
    """A frozen `Linear` with a copy of its weight in twelve bits.

    Few tokens read the copy, many the weight; both are the same numbers,
    until the weight is changed: one that learns is read itself.
    """

    blocks: Tensor  # the four parts of the copy
    upper: Tensor
    first: Tensor
    others: Tensor

    def __init__(self, linear: Linear, copy: CompactWeight) -> None:
        super().__init__(linear.in_features, linear.out_features,
                         linear.bias is not None, device="meta",
                         dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        for name, tensor in copy._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        return torch.ops.gptoss.compact_linear(
            x, self.weight, self.bias, self.blocks, self.upper,
            self.first, self.others)

    @property
    def saved(self) -> int:
        """How many bytes fewer a token reads."""
        return self.weight.nbytes - CompactWeight(
            self.blocks, self.upper, self.first, self.others).nbytes


def saved_bytes(model: nn.Module) -> int:
    """How many bytes fewer a token reads than of the weights as stored: what
    every layer that reads fewer says of itself as `saved`."""
    return sum(getattr(layer, "saved", 0) for layer in model.modules())


# --- What is refused? --------------------------------------------------------

def _fits(weight: Tensor) -> bool:
    return (weight.dtype == torch.bfloat16 and weight.ndim == 2
            and weight.shape[1] % 64 == 0 and weight.shape[1] <= 2 ** 16)


def _can_be(layer: nn.Module) -> TypeGuard[Linear]:
    return (type(layer) is Linear and _fits(layer.weight)
            and layer.weight.device.type == "cpu"
            and layer.weight.is_contiguous()
            and not layer.weight.requires_grad)


def pack(weight: Tensor) -> CompactWeight:
    """A bf16 matrix (m, n), 64 dividing n, in twelve bits a number.

    ValueError for another type or shape, or more than 65,536 columns.
    """
    if not _fits(weight):
        raise ValueError("weight: expected bfloat16 (m, n), 64 dividing n up "
                         f"to 65536, found {weight.dtype} of "
                         f"{tuple(weight.shape)}")
    return CompactWeight(*torch.ops.gptoss.pack_compact(weight.contiguous()))


def compact_layers(model: GptOss) -> None:
    """Replace every frozen bf16 `Linear` on the CPU, in place, where the
    copy is smaller than the weight by a tenth or more."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if _can_be(layer):
                copy = pack(layer.weight)
                if copy.nbytes <= 0.9 * layer.weight.nbytes:
                    setattr(parent, name, CompactLinear(layer, copy))


_log = logging.getLogger("gptoss")


def make_compact(model: GptOss) -> GptOss:
    """The model, its dense matrices also in twelve bits; same numbers.

    Decoding then reads a quarter less of them (`CompactLinear`); the copies
    take three quarters of the matrices' memory, and some seconds to make.
    Without kernels that read them the model stays as it is, and one line on
    the logger "gptoss" says so.
    """
    path = find_answer("kernels")()
    if has_kernel("pack_compact"):
        compact_layers(model)
    else:
        _log.warning("gptoss: matrices stay in sixteen bits: no kernel for "
                     "twelve here (%s)", path)
    return model


__all__ = [
    "CompactLinear",
    "CompactWeight",
    "compact_layers",
    "linear_beside_compact",
    "make_compact",
    "pack",
    "pack_by_torch",
    "saved_bytes",
    "unpack",
]
