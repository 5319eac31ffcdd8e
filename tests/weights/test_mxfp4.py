"""MXFP4: every byte, every scale, every rounding case."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.model.ops import mxfp4_linear
from gptoss.weights.encoding import audit, encode
from gptoss.weights.mxfp4 import (
    BLOCK,
    FP4_VALUES,
    MXFP4Error,
    PackedMXFP4,
    decode,
    decode_reference,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# the E2M1 grid written from the definition, not from the package
GRID = [(-1) ** (c >> 3) * (Fraction(c & 1, 2) if c >> 1 & 3 == 0 else
                            (1 + Fraction(c & 1, 2)) * 2 ** ((c >> 1 & 3) - 1))
        for c in range(16)]


def every_byte_and_scale():
    """(256, 256): row = scale; the 16 blocks of a row hold all bytes."""
    byte = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1)
    return byte.expand(256, 16, 16), scale.expand(256, 16)


def expected_doubles():
    """(256, 512) float64 by numpy's ldexp; exact, since 2**-128 is normal."""
    code = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).ravel()
    grid = np.array([float(x) for x in GRID])
    grid[8] = -0.0
    with np.errstate(invalid="ignore"):
        out = np.ldexp(grid[code][None], np.arange(256)[:, None] - 127)
    out[255] = np.nan
    return out


def same_bits(a, b):
    """Equal bit for bit, except that one NaN is as good as another."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    equal = a.view(integer) == b.view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def random_packed(*shape, low=0, high=255, seed=0):
    """blocks (*shape, 16), scales (*shape) with scale bytes in [low, high)."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8,
                           generator=g)
    scales = torch.randint(low, high, shape, dtype=torch.uint8, generator=g)
    return blocks, scales


def test_grid_is_e2m1():
    assert [Fraction(x) for x in FP4_VALUES] == GRID
    assert str(FP4_VALUES[8]) == "-0.0"


@pytest.mark.parametrize("function", [decode, decode_reference])
def test_every_byte_every_scale_float64(function):
    got = function(*every_byte_and_scale(), torch.float64)
    assert same_bits(got, torch.from_numpy(expected_doubles()))


@pytest.mark.parametrize("function", [decode, decode_reference])
@pytest.mark.parametrize("dtype,kind", [(torch.float32, np.float32),
                                        (torch.float16, np.float16)])
def test_every_byte_every_scale_by_numpy(function, dtype, kind):
    with np.errstate(over="ignore"):
        want = torch.from_numpy(expected_doubles().astype(kind))
    assert same_bits(function(*every_byte_and_scale(), dtype), want)


@pytest.mark.parametrize("function", [decode, decode_reference])
def test_every_byte_every_scale_bfloat16(function):
    """bf16 has the range of fp32 and its subnormals reach 2**-133: exact."""
    got = function(*every_byte_and_scale(), torch.bfloat16)[:255]
    for row, exponent in zip(got.double().tolist(), range(-127, 128),
                             strict=True):
        for byte in range(256):
            for value, code in ((row[2 * byte], byte & 15),
                                (row[2 * byte + 1], byte >> 4)):
                want = GRID[code] * Fraction(2) ** exponent
                if abs(want) < Fraction(2) ** 128:
                    assert Fraction(value) == want
                else:
                    assert value == (float("inf") if want > 0
                                     else float("-inf"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_255_is_nan_and_the_signs_of_zero_survive(dtype):
    got = decode(*every_byte_and_scale(), dtype)
    assert got[255].isnan().all() and not got[:255].isnan().any()
    codes = torch.arange(256)
    codes = torch.stack([codes & 15, codes >> 4], 1).flatten()
    assert torch.equal(torch.signbit(got[:255]),
                       (codes >= 8).expand(255, 512))


def test_scale_bytes_agree_with_torch_e8m0():
    scales = torch.arange(256, dtype=torch.uint8)
    ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)
    want = scales.view(torch.float8_e8m0fnu).to(torch.float32)
    assert same_bits(decode(ones, scales[:, None], torch.float32)[:, 0], want)


def test_float16_is_exact_from_scale_104_to_140():
    blocks, scales = every_byte_and_scale()
    exact = decode(blocks, scales, torch.float64)
    half = decode(blocks, scales, torch.float16).double()
    rows = (half == exact).all(-1).nonzero().flatten().tolist()
    assert rows == list(range(104, 141))


def test_flush_to_zero_does_not_reach_the_decoder():
    """In a process of its own: the mode and the table cache are global."""
    code = """
import torch
if not torch.set_flush_denormal(True):
    raise SystemExit(77)
from gptoss.weights.mxfp4 import decode
blocks = torch.full((1, 1, 16), 0x91, dtype=torch.uint8)  # +0.5, -0.5
scales = torch.zeros(1, 1, dtype=torch.uint8)
f = decode(blocks, scales, torch.float32).view(torch.int32)
b = decode(blocks, scales, torch.bfloat16).view(torch.int16)
assert f[0, :2].tolist() == [1 << 21, (1 << 21) - 2**31], f
assert b[0, :2].tolist() == [1 << 5, (1 << 5) - 2**15], b
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True)
    if done.returncode == 77:
        pytest.skip("this processor cannot flush denormals")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4), (0, 2), (70000,)])
def test_decode_equals_the_slow_twin(shape, dtype):
    blocks, scales = random_packed(*shape, high=256)
    got, want = (f(blocks, scales, dtype) for f in (decode, decode_reference))
    assert got.shape == (*shape[:-1], 32 * shape[-1]) and got.dtype == dtype
    assert same_bits(got, want)


def test_decode_takes_views_that_are_not_contiguous():
    blocks, scales = random_packed(6, 4, 5, low=100, high=150)
    for pick in (lambda t: t[::2], lambda t: t[:, 1:3],
                 lambda t: t.transpose(0, 1)):
        assert same_bits(decode(pick(blocks), pick(scales)),
                         decode(pick(blocks).contiguous(),
                                pick(scales).contiguous()))


def test_decoding_allocates_little_beyond_its_output():
    code = """
import torch
from gptoss.weights.mxfp4 import decode
blocks = torch.zeros(4_000_000, 16, dtype=torch.uint8)
scales = torch.zeros(4_000_000, dtype=torch.uint8)
decode(blocks[:1], scales[:1])
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
out = decode(blocks, scales)
print((peak() - before) / out.nbytes)
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          text=True, check=True)
    assert float(done.stdout) < 1.2


# ---- encode ----

def nearest_by_hand(x: Fraction) -> int:
    """Code of the nearest grid value, ties to the even code, saturating."""
    best = min(range(8), key=lambda c: (abs(GRID[c] - abs(x)), c & 1))
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_on_a_dense_line(dtype):
    """All multiples of 1/64 in [-8, 8] and their neighbours, scale 127."""
    x = torch.arange(-512, 513, dtype=torch.float32) / 64
    x = torch.cat([x, torch.nextafter(x, torch.tensor(9.0)),
                   torch.nextafter(x, torch.tensor(-9.0))]).to(dtype)
    rows = torch.zeros(len(x), 32, dtype=dtype)
    rows[:, 0] = x
    one = torch.full((len(x), 1), 127, dtype=torch.uint8)
    blocks, _ = encode(rows, one)
    for value, byte in zip(x.tolist(), blocks[:, 0, 0].tolist(), strict=True):
        assert byte & 7 == nearest_by_hand(Fraction(value))
        sign = np.signbit(value)
        assert byte >> 3 == sign


def test_scale_rule_by_exact_arithmetic():
    """floor(log2(amax)) - 2, with amax on, below and above powers of two."""
    powers = 2.0 ** torch.arange(-140, 140, dtype=torch.float64)
    inf = torch.tensor(float("inf"), dtype=torch.float64)
    amax = torch.cat([powers, torch.nextafter(powers, inf),
                      torch.nextafter(powers, -inf), 1.7 * powers])
    rows = torch.zeros(len(amax), 32, dtype=torch.float64)
    rows[:, 31] = -amax
    _, scales = encode(rows)
    for value, byte in zip(amax.tolist(), scales[:, 0].tolist(), strict=True):
        f = Fraction(value)
        exponent = f.numerator.bit_length() - f.denominator.bit_length()
        while Fraction(2) ** exponent > f:
            exponent -= 1
        while Fraction(2) ** (exponent + 1) <= f:
            exponent += 1
        assert byte == min(max(exponent - 2 + 127, 0), 254)


packed_blocks = st.tuples(
    st.lists(st.integers(0, 255), min_size=16, max_size=16),
    st.integers(0, 254), st.integers(0, 7))


@settings(deadline=None, max_examples=300)
@given(packed_blocks)
def test_what_mxfp4_can_represent_comes_back(case):
    """Values always; bytes exactly when the audit calls them canonical."""
    codes, scale, cap = case
    keep = torch.tensor(codes, dtype=torch.uint8)
    small = [[min(c & 7, cap) | c & 8 for c in (b & 15, b >> 4)]
             for b in keep.tolist()]
    blocks = torch.tensor([[low | high << 4 for low, high in small]],
                          dtype=torch.uint8).view(1, 1, 16)
    scales = torch.tensor([[scale]], dtype=torch.uint8)
    values = decode(blocks, scales, torch.float64)
    again_blocks, again_scales = encode(values)
    assert same_bits(decode(again_blocks, again_scales, torch.float64),
                     values)
    byte_exact = (torch.equal(again_blocks, blocks)
                  and torch.equal(again_scales, scales))
    largest = values.abs().max().item() / 2.0 ** (scale - 127)
    assert byte_exact == (largest in (4, 6) or scale == 0)
    assert audit(blocks, scales).canonical == byte_exact
    kept = encode(values, scales)
    assert torch.equal(kept[0], blocks) and torch.equal(kept[1], scales)


def test_every_largest_code_at_every_scale_comes_back():
    """Exhaustive over (largest code, scale): 8 x 255 kinds of block."""
    codes = torch.arange(8, dtype=torch.uint8)
    index = torch.arange(32)
    block = torch.minimum(index % 8, codes[:, None]).to(torch.uint8)
    block = block | ((index // 8 % 2) << 3).to(torch.uint8)
    blocks = (block[:, 0::2] | block[:, 1::2] << 4)[:, None]
    blocks = blocks.expand(8, 255, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).expand(8, 255).contiguous()
    values = decode(blocks, scales, torch.float64)
    again = encode(values)
    assert same_bits(decode(*again, torch.float64), values)
    exact = (again[0] == blocks).all(-1) & (again[1] == scales)
    expected = (codes[:, None] >= 6) | (scales == 0)
    assert torch.equal(exact, expected)
    found = audit(blocks, scales)
    assert (found.blocks, found.canonical, found.zero, found.nan) == (
        8 * 255, int(expected.sum()), 255, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_scales_is_byte_exact_for_all_bytes(dtype):
    low, high = (104, 141) if dtype == torch.float16 else (0, 253)
    blocks, scales = (t[low:high].contiguous()
                      for t in every_byte_and_scale())
    again, same = encode(decode(blocks, scales, dtype), scales)
    assert torch.equal(again, blocks) and torch.equal(same, scales)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2 ** 31), st.floats(-30, 30), st.sampled_from(DTYPES))
def test_error_bound_of_the_ocp_rule(seed, log_sigma, dtype):
    """|error| < amax / 4; at most amax / 5 if nothing was clipped."""
    sigma = 2.0 ** (log_sigma / 4 if dtype == torch.float16 else log_sigma)
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(64, 32, dtype=torch.float64, generator=g)
         * sigma).to(dtype)
    blocks, scales = encode(x)
    x = x.double()
    amax = x.abs().amax(-1)
    error = (decode(blocks, scales, torch.float64) - x).abs().amax(-1)
    in_scale = torch.ldexp(amax, 127 - scales[:, 0].int())
    assert ((4 <= in_scale) & (in_scale < 8)).all()
    assert (error < amax / 4).all()
    assert (error <= amax / 5)[in_scale <= 6].all()


def test_encoding_twice_changes_nothing():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    once = decode(*encode(x), torch.float32)
    assert same_bits(decode(*encode(once), torch.float32), once)


def test_saturation_and_the_ends_of_the_range():
    x = torch.zeros(3, 32, dtype=torch.float64)
    x[0, 0], x[1, 0] = -1e300, 7.9
    x[2, 0], x[2, 1] = 2.0 ** -200, -(2.0 ** -200)
    assert x[2, 0] > 0
    blocks, scales = encode(x)
    assert scales[:, 0].tolist() == [254, 127, 0]
    back = decode(blocks, scales, torch.float64)
    assert back[0, 0] == -6 * 2.0 ** 127 and back[1, 0] == 6
    assert (back[2] == 0).all()
    assert torch.signbit(back[2]).tolist() == [False, True] + [False] * 30


def test_zero_blocks_take_scale_0_and_keep_signs():
    x = torch.zeros(1, 64)
    x[0, 1::2] = -0.0
    blocks, scales = encode(x)
    assert scales.tolist() == [[0, 0]] and (blocks == 0x80).all()
    assert same_bits(decode(blocks, scales, torch.float32), x)


def test_encode_in_slices_equals_encode_by_row():
    x = torch.randn(3, 32 * 12000, generator=torch.Generator().manual_seed(2))
    blocks, scales = encode(x)  # 36,000 blocks: more than one slice
    for i in range(3):
        b, s = encode(x[i])
        assert torch.equal(b, blocks[i]) and torch.equal(s, scales[i])


def test_encode_does_not_write_into_its_arguments():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    scales = torch.full((4, 2), 126, dtype=torch.uint8)
    copies = x.clone(), scales.clone()
    encode(x, scales)
    encode(x)
    assert torch.equal(x, copies[0]) and torch.equal(scales, copies[1])


# ---- bad input ----

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_encode_names_the_value_it_refuses(bad):
    x = torch.zeros(2, 96)
    x[1, 70] = bad
    with pytest.raises(MXFP4Error, match=r"values\[1, 70\] is -?(nan|inf)"):
        encode(x)
    with pytest.raises(MXFP4Error, match=r"values\[1, 70\]"):
        encode(x, torch.full((2, 3), 127, dtype=torch.uint8))


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize("call,message", [
    (lambda: decode(u8(2, 15), u8(2)), r"shape \(\.\.\., N, 16\).*\(2, 15\)"),
    (lambda: decode(u8(16), u8()), r"blocks: expected shape"),
    (lambda: decode(u8(2, 16), u8(3)), r"scales: expected shape \(2,\)"),
    (lambda: decode(u8(2, 16).int(), u8(2)), "blocks: expected uint8.*int32"),
    (lambda: decode(u8(2, 16), u8(2).float()), "scales: .*float32"),
    (lambda: decode(u8(2, 16), u8(2), torch.int8), "dtype: .*int8"),
    (lambda: encode(torch.zeros(33)), r"divisible by 32.*\(33,\)"),
    (lambda: encode(torch.zeros(())), "divisible by 32"),
    (lambda: encode(torch.zeros(32, dtype=torch.int64)), "floats.*int64"),
    (lambda: encode(torch.zeros(64), u8(3)), r"scales: expected shape \(2,\)"),
    (lambda: encode(torch.zeros(64), u8(2) + 255), r"scales\[0\] is 255"),
    (lambda: audit(u8(2, 16), u8(1)), "scales: expected"),
    (lambda: PackedMXFP4(u8(2, 16), u8(1)), "scales: expected"),
    (lambda: PackedMXFP4(u8(4, 2, 16), u8(4, 2))[0, 0], "at most 1"),
    (lambda: PackedMXFP4(u8(4, 2, 16), u8(4, 2))[...], "integers or slices"),
    (lambda: mxfp4_linear(torch.zeros(3, 32), u8(4, 2, 16), u8(4, 2)),
     r"x: expected \(\.\.\., 64\).*\(3, 32\)"),
    (lambda: mxfp4_linear(torch.zeros(3, 64), u8(1, 4, 2, 16), u8(1, 4, 2)),
     "x: expected"),
    (lambda: mxfp4_linear(torch.zeros(3, 64).int(), u8(4, 2, 16), u8(4, 2)),
     "dtype: .*int32"),
    (lambda: mxfp4_linear(torch.zeros(3, 64), u8(4, 2, 16), u8(4, 2),
                          torch.zeros(5)), r"bias: expected \(4,\).*\(5,\)"),
])
def test_errors_say_what_was_expected_and_found(call, message):
    with pytest.raises(MXFP4Error, match=message):
        call()


# ---- PackedMXFP4, audit, the operator ----

def test_packed_indexing_gives_views():
    blocks, scales = random_packed(4, 6, 3)
    packed = PackedMXFP4(blocks, scales)
    assert packed.shape == (4, 6, 96) and len(packed) == 4
    assert packed.nbytes == 4 * 6 * 3 * 17 and packed.device.type == "cpu"
    whole = packed.decode(torch.float32)
    for index in (1, -1, slice(1, 3), (2, slice(0, 5)), (slice(None), 4)):
        part = packed[index]
        assert same_bits(part.decode(torch.float32), whole[index])
        assert part.blocks.untyped_storage().data_ptr() == \
            blocks.untyped_storage().data_ptr()
    with pytest.raises(IndexError):
        packed[4]


def test_packed_on_meta_has_the_published_bytes():
    packed = PackedMXFP4(u8(1, 1, 16), u8(1, 1)).to("meta")
    assert packed.decode().device.type == "meta"
    e, f, d = 32, 2880, 2880
    total = 0
    for rows in (2 * f, d):
        packed = PackedMXFP4(
            torch.empty(e, rows, 90, 16, dtype=torch.uint8, device="meta"),
            torch.empty(e, rows, 90, dtype=torch.uint8, device="meta"))
        assert packed.decode().shape == (e, rows, 2880) == packed.shape
        total += packed.nbytes
    assert total == 3 * f * d * e * 17 // 32


def test_audit_counts():
    blocks, scales = u8(5, 16), u8(5) + 120
    blocks[0, 3] = 0x07          # largest 6
    blocks[1, 3] = 0xE0          # largest 4, negative, high nibble
    blocks[2, 3] = 0x05          # largest 3
    scales[4] = 255              # zeros, but NaN by the scale
    blocks[3, 3] = 0x88          # only -0
    found = audit(blocks, scales)
    assert (found.blocks, found.canonical, found.zero, found.nan) == \
        (5, 2, 1, 1)
    assert found.describe() == ("5 blocks: 2 canonical (40.0 %), 1 all zero, "
                                "1 NaN")
    assert "0 blocks" in audit(u8(0, 16), u8(0)).describe()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_decode_then_linear(dtype):
    blocks, scales = random_packed(7, 3, low=118, high=124)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 96, generator=g).to(dtype)
    bias = torch.randn(7, generator=g).to(dtype)
    weight = decode_reference(blocks, scales, dtype)
    assert torch.equal(mxfp4_linear(x, blocks, scales, bias),
                       torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(mxfp4_linear(x[0, 0], blocks, scales),
                       torch.nn.functional.linear(x[0, 0], weight))


def test_linear_gradients():
    blocks, scales = random_packed(5, 2, low=125, high=128)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: mxfp4_linear(x, blocks, scales, b), (x, bias))
    one = torch.randn(64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: mxfp4_linear(x, blocks, scales, b), (one, bias))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_operator_passes_opcheck(bias):
    blocks, scales = random_packed(5, 2, low=118, high=124)
    torch.library.opcheck(torch.ops.gptoss.mxfp4_linear, (
        torch.randn(3, 64, requires_grad=True), blocks, scales,
        torch.randn(5, requires_grad=True) if bias else None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_operator_passes_opcheck(dtype):
    torch.library.opcheck(torch.ops.gptoss.mxfp4_decode,
                          (*random_packed(5, 2), dtype))


def test_linear_on_meta():
    blocks, scales = (t.to("meta") for t in random_packed(6, 2))
    out = mxfp4_linear(torch.empty(3, 64, device="meta"), blocks, scales,
                       torch.empty(6, device="meta"))
    assert out.shape == (3, 6) and out.device.type == "meta"


# ---- other implementations ----

def test_equal_to_transformers_bit_for_bit():
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_packed(3, 8, 5)
    for b, s in ((blocks, scales),
                 tuple(t[None, :255] for t in every_byte_and_scale())):
        theirs = module.convert_moe_packed_tensors(b, s, dtype=torch.bfloat16)
        assert same_bits(decode(b, s), theirs.transpose(1, 2).contiguous())


def openai_formula(blocks, scales, dtype):
    """gpt_oss/torch/weights.py: look up each nibble, then torch.ldexp."""
    lut = torch.tensor(FP4_VALUES, dtype=dtype)
    out = torch.empty(*scales.shape, BLOCK, dtype=dtype)
    out[..., 0::2] = lut[(blocks & 0x0F).long()]
    out[..., 1::2] = lut[(blocks >> 4).long()]
    return torch.ldexp(out, scales[..., None].int() - 127).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_openai_formula_bit_for_bit(dtype):
    blocks, scales = (t[:255] for t in every_byte_and_scale())
    assert same_bits(decode(blocks, scales, dtype),
                     openai_formula(blocks, scales, dtype))


def test_equal_to_openai_package_bit_for_bit():
    weights = pytest.importorskip("gpt_oss.torch.weights")
    blocks, scales = random_packed(3, 8, 5)

    class Memory(weights.Checkpoint):
        def __init__(self):
            self.device_str = "cpu"
            self.tensor_name_to_file = {"b": "", "s": ""}

        def _get_tensor(self, name):
            return (blocks if name == "b" else scales).clone()

    theirs = Memory()._get_mxfp4_tensor("b", "s", dtype=torch.bfloat16)
    assert same_bits(decode(blocks, scales), theirs)


