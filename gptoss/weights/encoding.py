"""Which four bits?

Generated from book/weights/encoding.py; edit the chapter, not this file.
"""

from dataclasses import dataclass

import torch

from gptoss.weights.errors import mismatch
from gptoss.weights.mxfp4 import (
    BLOCK,
    FORMATS,
    FP4_VALUES,
    SCALE_BIAS,
    SCALE_NAN,
    MXFP4Error,
    check_packed,
)

# --- Which value is the nearest? ---------------------------------------------

def _round_to_grid(magnitude: torch.Tensor) -> torch.Tensor:
    """Codes 0..7 (uint8) of the nearest FP4 value, ties to the even code.

    magnitude is not negative; above 6 it saturates. A code is the number of
    midpoints passed; on the midpoint above an odd code, a tie counts as
    passed, because the code above is even.
    """
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for code in range(7):
        middle = (FP4_VALUES[code] + FP4_VALUES[code + 1]) / 2
        odd = code % 2 == 1
        codes += magnitude >= middle if odd else magnitude > middle
    return codes


# --- How is the exponent found? ----------------------------------------------

def _choose_scales(largest: torch.Tensor) -> torch.Tensor:
    """OCP rule: floor(log2(largest)) - 2, as a byte; a zero block gets 0.

    largest (M,) float64, not negative. `frexp` reads the exponent field, so
    no logarithm can land on the wrong side of an integer.
    """
    _, exponent = torch.frexp(largest)  # largest = f * 2**exponent, f < 1
    scales = (exponent - 1 - 2 + SCALE_BIAS).clamp(0, SCALE_NAN - 1)
    return torch.where(largest > 0, scales, 0).to(torch.uint8)


# --- How is a tensor encoded? ------------------------------------------------

def _encode_rows(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """rows (M, 32) float64, scales (M,) uint8 -> blocks (M, 16) uint8."""
    inverse = torch.tensor([2.0 ** (SCALE_BIAS - s)
                            for s in range(SCALE_NAN)], dtype=torch.float64)
    inverse = inverse.to(rows.device)[scales.int()]
    codes = _round_to_grid(rows.abs() * inverse[:, None])
    codes |= torch.signbit(rows).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4


def encode(values: torch.Tensor, scales: torch.Tensor | None = None
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats -> MXFP4 (blocks (…, N, 16), scales (…, N)), both uint8.

    values (…, 32 N), a float dtype. Without scales each block takes the OCP
    scale; with scales (…, N) those are kept. Each value becomes the nearest
    of the grid at that scale (ties to even, saturating at 6), keeping the
    sign of zero. What MXFP4 can represent comes back equal. Raises
    MXFP4Error for NaN or infinity, naming the position. OCP MX v1.0, 6.3.
    """
    shape = _check_values(values, scales)
    blocks = torch.empty(*shape, BLOCK // 2, dtype=torch.uint8,
                         device=values.device)
    kept = scales is not None
    if scales is None:
        scales = torch.empty(shape, dtype=torch.uint8, device=values.device)
    rows, flat = values.reshape(-1, BLOCK), scales.reshape(-1)
    target = blocks.view(-1, BLOCK // 2)
    for start in range(0, len(rows), 2 ** 15):
        part = slice(start, start + 2 ** 15)
        if not torch.isfinite(rows[part]).all():
            _check_finite("values", values, ~torch.isfinite(values))
        if not kept:
            flat[part] = _choose_scales(rows[part].double().abs().amax(-1))
        target[part] = _encode_rows(rows[part].double(), flat[part])
    return blocks, scales


# --- What is refused ---------------------------------------------------------

def _check_values(values: torch.Tensor, scales: torch.Tensor | None
                  ) -> torch.Size:
    """Shape of the scales of values, or MXFP4Error."""
    if values.dtype not in FORMATS:
        raise mismatch(MXFP4Error, "values", "floats", values.dtype)
    if values.ndim == 0 or values.shape[-1] % BLOCK:
        raise mismatch(MXFP4Error, "values",
                       f"a last dimension divisible by {BLOCK}",
                       f"shape {tuple(values.shape)}")
    shape = torch.Size((*values.shape[:-1], values.shape[-1] // BLOCK))
    if scales is not None:
        check_packed(torch.empty(*shape, BLOCK // 2, dtype=torch.uint8,
                           device="meta"), scales)
        _check_finite("scales", scales, scales == SCALE_NAN)
    return shape


def _check_finite(name: str, tensor: torch.Tensor, bad: torch.Tensor
                  ) -> None:
    """Raise MXFP4Error with the first position where bad is true."""
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise MXFP4Error(f"{name}[{', '.join(map(str, first))}] is "
                         f"{tensor[first].item()}: MXFP4 encodes finite "
                         f"numbers only ({int(bad.sum())} such entries)")


# --- Would a file survive? ---------------------------------------------------

@dataclass(frozen=True)
class Audit:
    """What `audit` counted, in blocks of 32 values."""

    blocks: int  # all of them
    canonical: int  # those that encode(decode(...)) gives back byte for byte
    zero: int  # those whose 32 values are all zero, whatever their scale
    nan: int  # those with scale 255

    def describe(self) -> str:
        """One line for a person."""
        share = 100 * self.canonical / max(self.blocks, 1)
        return (f"{self.blocks:,} blocks: {self.canonical:,} canonical "
                f"({share:.1f} %), {self.zero:,} all zero, "
                f"{self.nan:,} NaN")


def audit(blocks: torch.Tensor, scales: torch.Tensor) -> Audit:
    """Count blocks (…, N, 16) with scales (…, N) by how they re-encode.

    A block is canonical when its largest magnitude is 4 or 6, or when its
    scale is already the lowest, 0. It takes no decoding to see that.
    """
    check_packed(blocks, scales)
    largest = torch.maximum(blocks & 7, blocks >> 4 & 7).amax(-1)
    nan = scales == SCALE_NAN
    canonical = ((largest >= 6) | (scales == 0)) & ~nan
    zero = (largest == 0) & ~nan
    return Audit(scales.numel(), int(canonical.sum()), int(zero.sum()),
                 int(nan.sum()))


__all__ = [
    "Audit",
    "audit",
    "encode",
]
