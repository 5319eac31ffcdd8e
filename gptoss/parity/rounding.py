"""What can rounding explain?

Generated from book/parity/rounding.py; edit the chapter, not this file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss.weights.mxfp4 import BLOCK

# --- What can rounding explain? ----------------------------------------------

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


__all__ = [
    "DEVIATIONS",
    "EXPONENTIAL",
    "EightRounding",
    "FLOOR",
    "KEYS_AT_ONCE",
    "LARGEST",
    "LOST",
    "Pair",
    "Rounding",
    "half_step",
]
