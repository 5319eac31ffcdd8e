"""Four bits a weight

Generated from book/02_mxfp4.py; edit the chapter, not this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from threading import RLock

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, shape_wrapper

from gptoss.errors import Error, mismatch

# --- Names and errors --------------------------------------------------------

BLOCK = 32  # values that share one scale
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
              -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS = 127  # scale byte s means 2 ** (s - 127)
SCALE_NAN = 255

# dtype: exponent bits, fraction bits, integer as wide as one, as two values
_FORMATS = {
    torch.float16: (5, 10, torch.int16, torch.int32),
    torch.bfloat16: (8, 7, torch.int16, torch.int32),
    torch.float32: (8, 23, torch.int32, torch.int64),
    torch.float64: (11, 52, torch.int64, torch.complex128),  # 128-bit moves
}


class MXFP4Error(Error):
    """Blocks, scales or values that are not MXFP4 or cannot become it."""


def _check(blocks: torch.Tensor, scales: torch.Tensor) -> None:
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


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FORMATS:
        names = ", ".join(str(known) for known in _FORMATS)
        raise mismatch(MXFP4Error, "dtype", f"one of {names}", dtype)


# --- The obvious decoder -----------------------------------------------------

def decode_reference(blocks: torch.Tensor, scales: torch.Tensor,
                     dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The slow twin of `decode`: look up, multiply in float64, cast once.

    blocks (…, N, 16) and scales (…, N), both uint8 -> (…, 32 N) in dtype.
    """
    _check(blocks, scales)
    _check_dtype(dtype)
    grid = torch.tensor(FP4_VALUES, dtype=torch.float64)
    power = torch.tensor([2.0 ** (s - SCALE_BIAS) for s in range(SCALE_NAN)]
                         + [float("nan")], dtype=torch.float64)
    low, high = grid[(blocks & 15).long()], grid[(blocks >> 4).long()]
    values = torch.stack([low, high], dim=-1).flatten(-2)  # low nibble first
    return (values * power[scales.long()][..., None]).flatten(-2).to(dtype)


# --- One rounding, by integers -----------------------------------------------

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


# --- A table of pairs --------------------------------------------------------

@lru_cache(maxsize=32)
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(65536,): entry 256 * scale + byte holds the byte's two values.

    A pair of 16-bit floats travels as one int32, of 32-bit floats as one
    int64, of doubles as one complex128: the decoder moves bits and never
    calculates with them.
    """
    exponent, fraction, integer, pair = _FORMATS[dtype]
    nan = (2 ** (exponent + 1) - 1) << (fraction - 1)  # a quiet NaN
    bits = [[_round_bits(int(2 * x), s - SCALE_BIAS - 1, exponent, fraction)
             for x in FP4_VALUES[:8]] for s in range(SCALE_NAN)]
    positive = torch.tensor(bits + [[nan] * 8]).to(integer)
    codes = torch.cat([positive, positive | torch.iinfo(integer).min], dim=1)
    byte = torch.arange(256)
    table = torch.stack([codes[:, byte & 15], codes[:, byte >> 4]], dim=-1)
    return table.view(pair).flatten().to(device)


# --- An operator that may get faster later -----------------------------------

_FIRST = ["gptoss.kernels:load_kernels"]
_LOCK = RLock()  # the thread that loads may call operators itself
_loading = False


def before_first_call(action: str | Callable) -> None:
    """Call action(), or "module:function", before the next operator that
    computes: that is how kernels get in from below, as late as needed."""
    _FIRST.append(action)


def prepare() -> bool:
    """Do, once, what comes before the first call. True: nothing was left."""
    global _loading
    if not _FIRST:
        return True
    with _LOCK:
        if _loading:
            return True
        _loading = True
        try:
            while _FIRST:
                action = _FIRST[0]
                if isinstance(action, str):
                    module, _, name = action.partition(":")
                    action = getattr(import_module(module), name)
                action()
                _FIRST.pop(0)
        finally:
            _loading = False
    return False


def _gate(name: str, implementation: Callable,
          formula: Callable | None) -> Callable:
    """What stands at the autograd key of an operator."""
    def gate(keys, *args):
        if ((torch.autograd.forward_ad._current_level >= 0
                or torch._C._are_functorch_transforms_active())
                and any(map(_is_real, args))):
            return implementation(*args)
        if formula is not None:
            return formula(keys, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(name).redispatch(
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


def _operator(name: str):
    namespace, _, operator = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operator).default


def define_operator(schema: str, implementation: Callable, fake=None,
                    backward=None, setup_context=None, flops=None) -> None:
    """Declare the torch.library operator `schema`, or declare it anew.

    implementation computes it with plain torch on every device; a kernel
    registered for "CPU" or "CUDA" takes precedence. fake returns an empty
    tensor of the right shape (meta device, torch.compile); None: what
    implementation gives there. backward and setup_context: as in
    torch.library.register_autograd; without them torch differentiates
    implementation. flops: as in torch.utils.flop_counter's formulas.
    """
    name = schema.partition("(")[0]
    namespace, _, operator = name.partition("::")
    held = vars(getattr(torch.ops, namespace)).setdefault("_held", {})
    if operator in held:
        held.pop(operator)._destroy()
    library = held[operator] = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema.partition("::")[2],
                   tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        if not prepare():
            return _operator(name)(*args)  # there may be a kernel now
        try:
            return tree_map(_compact, implementation(*args))
        except Exception as error:
            error.add_note(f"in {name}({', '.join(map(_words, args))})")
            raise

    def shape(*args):
        return tree_map(_compact, (fake or implementation)(*args))

    library.impl(operator, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, shape, lib=library)
    formula = None if backward is None else make_autograd_impl(
        _operator(name), Info(backward, setup_context))
    library.impl(operator, _gate(name, implementation, formula), "Autograd",
                 with_keyset=True)
    if flops is not None:
        flop_registry[_operator(name).overloadpacket] = shape_wrapper(flops)


# --- The decoder -------------------------------------------------------------

def decode_by_table(blocks: torch.Tensor, scales: torch.Tensor,
                    dtype: torch.dtype) -> torch.Tensor:
    """`decode` in plain torch, a slice of blocks at a time.

    The index takes 4 bytes for every byte of blocks, so it is made for at
    most 2**15 blocks (2 MiB, inside a cache) on a CPU, 2**22 elsewhere.
    """
    table = _pairs(dtype, blocks.device)
    if torch._C._are_functorch_transforms_active():  # they lose what `out=`
        index = (scales.int() << 8)[..., None] + blocks  # writes
        return table[index].view(dtype).flatten(-2)
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


def _decode_fake(blocks, scales, dtype):
    shape = (*scales.shape[:-1], BLOCK * scales.shape[-1])
    return torch.empty(shape, dtype=dtype, device=blocks.device)


define_operator(
    "gptoss::mxfp4_decode(Tensor blocks, Tensor scales, ScalarType dtype)"
    " -> Tensor", decode_by_table, _decode_fake)


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
    _check(blocks, scales)
    _check_dtype(dtype)
    return torch.ops.gptoss.mxfp4_decode(blocks, scales, dtype)


# --- Rounding to the grid ----------------------------------------------------

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


# --- Choosing the scale ------------------------------------------------------

def _choose_scales(largest: torch.Tensor) -> torch.Tensor:
    """OCP rule: floor(log2(largest)) - 2, as a byte; a zero block gets 0.

    largest (M,) float64, not negative. `frexp` reads the exponent field, so
    no logarithm can land on the wrong side of an integer.
    """
    _, exponent = torch.frexp(largest)  # largest = f * 2**exponent, f < 1
    scales = (exponent - 1 - 2 + SCALE_BIAS).clamp(0, SCALE_NAN - 1)
    return torch.where(largest > 0, scales, 0).to(torch.uint8)


# --- The encoder -------------------------------------------------------------

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
    scales = scales if kept else torch.empty(
        shape, dtype=torch.uint8, device=values.device)
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


def _encode_rows(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """rows (M, 32) float64, scales (M,) uint8 -> blocks (M, 16) uint8."""
    inverse = torch.tensor([2.0 ** (SCALE_BIAS - s)
                            for s in range(SCALE_NAN)], dtype=torch.float64)
    inverse = inverse.to(rows.device)[scales.int()]
    codes = _round_to_grid(rows.abs() * inverse[:, None])
    codes |= torch.signbit(rows).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _check_values(values, scales) -> torch.Size:
    """Shape of the scales of values, or MXFP4Error."""
    if values.dtype not in _FORMATS:
        raise mismatch(MXFP4Error, "values", "floats", values.dtype)
    if values.ndim == 0 or values.shape[-1] % BLOCK:
        raise mismatch(MXFP4Error, "values",
                       f"a last dimension divisible by {BLOCK}",
                       f"shape {tuple(values.shape)}")
    shape = torch.Size((*values.shape[:-1], values.shape[-1] // BLOCK))
    if scales is not None:
        _check(torch.empty(*shape, BLOCK // 2, dtype=torch.uint8,
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


# --- An audit of a file ------------------------------------------------------

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
    _check(blocks, scales)
    largest = torch.maximum(blocks & 7, blocks >> 4 & 7).amax(-1)
    nan = scales == SCALE_NAN
    canonical = ((largest >= 6) | (scales == 0)) & ~nan
    zero = (largest == 0) & ~nan
    return Audit(scales.numel(), int(canonical.sum()), int(zero.sum()),
                 int(nan.sum()))


# --- A tensor that stays packed ----------------------------------------------

class PackedMXFP4:
    """blocks and scales of one weight, held as the file holds them.

    blocks (…, N, 16) and scales (…, N), uint8, on one device. `shape` is the
    logical (…, 32 N). Indexing the leading dimensions gives views.
    """

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        _check(blocks, scales)
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


# --- A linear layer with a packed weight -------------------------------------

def linear_by_decoding(x: torch.Tensor, blocks: torch.Tensor,
                       scales: torch.Tensor, bias: torch.Tensor | None
                       ) -> torch.Tensor:
    """`mxfp4_linear` in plain torch: decode the weight to x.dtype, multiply.

    The decoded weight lives only inside this call.
    """
    weight = decode(blocks, scales, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _linear_fake(x, blocks, scales, bias):
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


def _linear_setup(ctx, inputs, output) -> None:
    _, blocks, scales, bias = inputs
    ctx.save_for_backward(blocks, scales)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):
    """Gradients of x and bias; packed weights are constants."""
    blocks, scales = ctx.saved_tensors
    grad_x = grad @ decode(blocks, scales, grad.dtype)
    grad_bias = grad.reshape(-1, len(blocks)).sum(0) if ctx.has_bias else None
    return grad_x, None, None, grad_bias


define_operator(
    "gptoss::mxfp4_linear(Tensor x, Tensor blocks, Tensor scales,"
    " Tensor? bias) -> Tensor", linear_by_decoding, _linear_fake,
    _linear_backward, _linear_setup)


def mxfp4_linear(x: torch.Tensor, blocks: torch.Tensor,
                 scales: torch.Tensor, bias: torch.Tensor | None = None
                 ) -> torch.Tensor:
    """x @ W.T + bias with a packed weight W (m, n), in x.dtype.

    x (…, n) float16, bfloat16, float32 or float64; blocks (m, n/32, 16) and
    scales (m, n/32) uint8; bias (m,) in x.dtype or None. Returns (…, m).
    Differentiable in x and bias. Raises MXFP4Error on a mismatch.
    """
    _check(blocks, scales)
    _check_dtype(x.dtype)
    n = BLOCK * scales.shape[-1]
    if scales.ndim != 2 or x.ndim == 0 or x.shape[-1] != n:
        raise mismatch(MXFP4Error, "x",
                       f"(..., {n}) beside blocks (m, {n // BLOCK}, 16)",
                       f"x {tuple(x.shape)} and blocks {tuple(blocks.shape)}")
    if bias is not None and bias.shape != blocks.shape[:1]:
        raise mismatch(MXFP4Error, "bias", tuple(blocks.shape[:1]),
                       tuple(bias.shape))
    return torch.ops.gptoss.mxfp4_linear(x, blocks, scales, bias)


__all__ = [
    "Audit",
    "BLOCK",
    "FP4_VALUES",
    "MXFP4Error",
    "PackedMXFP4",
    "SCALE_BIAS",
    "SCALE_NAN",
    "audit",
    "before_first_call",
    "decode",
    "decode_by_table",
    "decode_reference",
    "define_operator",
    "encode",
    "linear_by_decoding",
    "mxfp4_linear",
    "prepare",
]
