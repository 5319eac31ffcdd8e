"""Four bits a weight

Generated from book/weights/mxfp4.py; edit the chapter, not this file.
"""

from functools import lru_cache

import torch

from gptoss.weights.errors import Error, mismatch

# --- Those equations in code -------------------------------------------------

BLOCK = 32  # values that share one scale
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
              -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS = 127  # scale byte s means 2 ** (s - 127)
SCALE_NAN = 255

# dtype: exponent bits, fraction bits, integer as wide as one, as two values
FORMATS = {
    torch.float16: (5, 10, torch.int16, torch.int32),
    torch.bfloat16: (8, 7, torch.int16, torch.int32),
    torch.float32: (8, 23, torch.int32, torch.int64),
    torch.float64: (11, 52, torch.int64, torch.complex128),  # 128-bit moves
}


class MXFP4Error(Error):
    """Blocks, scales or values that are not MXFP4 or cannot become it."""


def decode_reference(blocks: torch.Tensor, scales: torch.Tensor,
                     dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The slow twin of `decode`: look up, multiply in float64, cast once.

    blocks (…, N, 16) and scales (…, N), both uint8 -> (…, 32 N) in dtype.
    """
    grid = torch.tensor(FP4_VALUES, dtype=torch.float64)
    power = torch.tensor([2.0 ** (s - SCALE_BIAS) for s in range(SCALE_NAN)]
                         + [float("nan")], dtype=torch.float64)
    low, high = grid[(blocks & 15).long()], grid[(blocks >> 4).long()]
    values = torch.stack([low, high], dim=-1).flatten(-2)  # low nibble first
    return (values * power[scales.long()][..., None]).flatten(-2).to(dtype)


# --- How is a number rounded without arithmetic on floats? -------------------

def _round_bits(m: int, e: int, exponent: int, fraction: int) -> int:
    """Bit pattern of m * 2**e (m >= 0) rounded once to nearest, ties to even.

    exponent and fraction are the widths of the format's two fields. Integers
    only: no processor mode (flush to zero) can change the result.
    """
    lowest = 2 - 2 ** (exponent - 1) - fraction  # log2 of the least subnormal
    if m == 0:
        return 0
    unit = max(e + m.bit_length() - 1 - fraction, lowest)
    if e >= unit:
        count = m << (e - unit)
    else:
        count, rest = divmod(m, 1 << (unit - e))
        half = 1 << (unit - e - 1)
        count += rest > half or (rest == half and count % 2 == 1)
    infinity = (2 ** exponent - 1) << fraction
    return min(count + ((unit - lowest) << fraction), infinity)


# --- What is refused ---------------------------------------------------------

def check_packed(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise MXFP4Error unless blocks (…, N, 16) fit scales (…, N)."""
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise mismatch(MXFP4Error, name, "uint8", tensor.dtype)
    if blocks.ndim < 2 or blocks.shape[-1] != BLOCK // 2:
        raise mismatch(MXFP4Error, "blocks", "shape (..., N, 16)",
                       tuple(blocks.shape))
    if scales.shape != blocks.shape[:-1]:
        raise mismatch(MXFP4Error, "scales",
                       f"shape {tuple(blocks.shape[:-1])} beside blocks "
                       f"{tuple(blocks.shape)}", tuple(scales.shape))


def check_dtype(dtype: torch.dtype) -> None:
    """Raise MXFP4Error unless it is one of the four float types."""
    if dtype not in FORMATS:
        names = ", ".join(str(known) for known in FORMATS)
        raise mismatch(MXFP4Error, "dtype", f"one of {names}", dtype)


# --- How is a byte decoded in one step? --------------------------------------

@lru_cache(maxsize=32)
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(65536,): entry 256 * scale + byte holds the byte's two values.

    A pair of 16-bit floats travels as one int32, of 32-bit floats as one
    int64, of doubles as one complex128: the decoder moves bits and never
    calculates with them.
    """
    exponent, fraction, integer, pair = FORMATS[dtype]
    nan = (2 ** (exponent + 1) - 1) << (fraction - 1)  # a quiet NaN
    bits = [[_round_bits(int(2 * x), s - SCALE_BIAS - 1, exponent, fraction)
             for x in FP4_VALUES[:8]] for s in range(SCALE_NAN)]
    positive = torch.tensor(bits + [[nan] * 8]).to(integer)
    codes = torch.cat([positive, positive | torch.iinfo(integer).min], dim=1)
    byte = torch.arange(256)
    table = torch.stack([codes[:, byte & 15], codes[:, byte >> 4]], dim=-1)
    return table.view(pair).flatten().to(device)


# --- How is a whole tensor decoded in little memory? -------------------------

def decode_by_table(blocks: torch.Tensor, scales: torch.Tensor,
                    dtype: torch.dtype) -> torch.Tensor:
    """`decode` in plain torch, a slice of blocks at a time.

    The index takes 4 bytes for every byte of blocks, so it is made for at
    most 2**15 blocks (2 MiB, inside a cache) on a CPU, 2**22 elsewhere.
    """
    with torch._C._DisableFuncTorch():  # the table belongs to no transform
        table = _pairs(dtype, blocks.device)
        pairs = table.view(dtype).view(-1, 2)
    if torch._C._are_functorch_transforms_active():  # they lose what `out=`
        index = (scales.int() << 8)[..., None] + blocks  # writes
        return pairs[index].flatten(-3)
    out = torch.empty(*scales.shape, BLOCK, dtype=dtype, device=blocks.device)
    target = out.view(table.dtype).view(-1, BLOCK // 2)
    blocks, scales = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    step = 2 ** 15 if blocks.device.type == "cpu" else 2 ** 22
    for start in range(0, len(scales), step):
        part = slice(start, start + step)
        index = (scales[part].int() << 8)[:, None] + blocks[part]
        torch.index_select(table, 0, index.view(-1),
                           out=target[part].view(-1))
    return out.flatten(-2)


def decode(blocks: torch.Tensor, scales: torch.Tensor,
           dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """MXFP4 -> floats: the exact value, rounded once to dtype.

    blocks (…, N, 16) uint8, low nibble first; scales (…, N) uint8, a byte s
    meaning 2**(s - 127), 255 meaning NaN. Returns (…, 32 N) in dtype, one of
    float16, bfloat16, float32, float64. What dtype cannot hold becomes inf
    (beyond its range) or is rounded (float16 below 2**-24). Raises
    MXFP4Error for another dtype or shape. Source: OCP MX v1.0, 5.3.3 (E2M1),
    5.4.1 (E8M0).
    """
    check_packed(blocks, scales)
    check_dtype(dtype)
    return decode_by_table(blocks, scales, dtype)


# --- How does a tensor stay packed? ------------------------------------------

class PackedMXFP4:
    """blocks and scales of one weight, held as the file holds them.

    blocks (…, N, 16) and scales (…, N), uint8, on one device. `shape` is the
    logical (…, 32 N). Indexing the leading dimensions gives views.
    """

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        check_packed(blocks, scales)
        self.blocks, self.scales = blocks, scales

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.scales.shape[:-1],
                           BLOCK * self.scales.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def nbytes(self) -> int:
        """Bytes of blocks and scales together."""
        return self.blocks.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> "PackedMXFP4":
        """Integers and slices on the leading dimensions: views, no copy."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) >= self.scales.ndim or not all(
                isinstance(part, (int, slice)) for part in parts):
            raise MXFP4Error(f"expected at most {self.scales.ndim - 1} "
                             f"integers or slices for shape "
                             f"{tuple(self.shape)} (the last dimension is "
                             f"packed), found {index}")
        return PackedMXFP4(self.blocks[index], self.scales[index])

    def __repr__(self) -> str:
        return f"PackedMXFP4(shape={tuple(self.shape)}, {self.device})"

    def decode(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return decode(self.blocks, self.scales, dtype)

    def to(self, device) -> "PackedMXFP4":
        return PackedMXFP4(self.blocks.to(device), self.scales.to(device))


# --- How is a packed weight multiplied with? ---------------------------------

def linear_by_decoding(x: torch.Tensor, blocks: torch.Tensor,
                       scales: torch.Tensor, bias: torch.Tensor | None
                       ) -> torch.Tensor:
    """`mxfp4_linear` in plain torch: decode the weight to x.dtype, multiply.

    The decoded weight lives only inside this call.
    """
    weight = decode(blocks, scales, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


__all__ = [
    "BLOCK",
    "FORMATS",
    "FP4_VALUES",
    "MXFP4Error",
    "PackedMXFP4",
    "SCALE_BIAS",
    "SCALE_NAN",
    "check_dtype",
    "check_packed",
    "decode",
    "decode_by_table",
    "decode_reference",
    "linear_by_decoding",
]
