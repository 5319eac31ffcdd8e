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
#     module: mxfp4
#     public: [MXFP4Error, PackedMXFP4, decode]
# ---

# %% [markdown]
# # Four bits a weight
#
# ## Question
#
# How does gpt-oss-20b, with 20.9 billion parameters, fit into 13.8 GB?
#
# Nine parameters of ten are expert weights, and each of those is one of only
# **fifteen different numbers**, times a power of two that it shares with 31
# neighbours. That makes 4.25 bits a weight. Yet turning the file's bytes into
# bfloat16 loses nothing: of the 64,768 combinations of a byte and a scale
# below $2^{126}$, not one is rounded. This chapter reads the format, called
# MXFP4, and proves that; [the next](encoding.ipynb) writes it.

# %% [markdown]
# ## Picture
#
# Each row is the whole set of values that a weight can take, for three
# neighbouring scale bytes. The points crowd towards zero, and a larger scale
# moves them all apart.

# %% tags=["hide-input"]
# Figure: three rows of 16 marks, the values at scale bytes 119, 120 and 121.
# The marks crowd towards zero, and each row is twice as wide as the one below
# it.
import matplotlib.pyplot as plt
import torch

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
figure, axis = plt.subplots(figsize=(7, 2.2))
for height, byte in enumerate((119, 120, 121)):
    points = torch.cat([-grid, grid]) * 2.0 ** (byte - 127)
    axis.plot(points, [height] * 16, "|", markersize=17, markeredgewidth=1.8)
axis.set_yticks(range(3), ["scale 119", "scale 120", "scale 121"])
axis.set_ylim(-0.7, 2.7)
axis.set_xticks((-0.08, -0.04, 0, 0.04, 0.08))
axis.set_xlabel("weight")
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# In the file, 32 consecutive inputs of one output row make a block: 16 bytes
# of two codes each, and one scale byte that lies in a tensor of its own. The
# code of an even input sits in the low half of its byte.

# %% tags=["hide-input"]
# Figure: a block as a row of boxes. Byte 0 holds element 1 in its high and
# element 0 in its low half, byte 15 elements 31 and 30; the scale is a box
# of its own.
names = ["byte 0", "byte 1", "byte 2", "", "byte 15", "scale"]
inside = [("1", "0"), ("3", "2"), ("5", "4"), None, ("31", "30"), None]
figure, axis = plt.subplots(figsize=(7, 1.5))
for place, (name, pair) in enumerate(zip(names, inside, strict=True)):
    axis.text(place + 0.45, 1.06, name, ha="center", fontsize=9)
    if name == "":
        axis.text(place + 0.45, 0.45, "…", ha="center", fontsize=14)
        continue
    colour = "C1" if name == "scale" else "C0"
    axis.add_patch(plt.Rectangle((place, 0), 0.9, 0.9, fc=colour,
                                 ec="black", alpha=0.35))
    if pair is None:
        axis.text(place + 0.45, 0.45, "s", ha="center", va="center")
        continue
    axis.plot([place + 0.45] * 2, [0, 0.9], color="black", linewidth=0.8)
    for x, word, element in ((0.22, "high", pair[0]), (0.67, "low", pair[1])):
        axis.text(place + x, 0.58, element, ha="center", va="center")
        axis.text(place + x, 0.18, word, ha="center", fontsize=7)
axis.set(xlim=(-0.1, 6), ylim=(-0.05, 1.35))
axis.set_axis_off()
plt.show()

# %% [markdown]
#
# ## The naive version
#
# **One scale a row.** The oldest recipe for 4 bits: divide a row by its
# largest magnitude, round to the integers -7 to 7, keep one scale. One
# outlier in a row is enough to break it.

# %%
row = 0.02 * torch.randn(2880)
row[7] = 1.0  # one weight at 50 standard deviations
step = row.abs().max() / 7
uniform = (row / step).round() * step
print("weights that became zero:", int((uniform == 0).sum()), "of 2880")

# %% [markdown]
# Two repairs, and MXFP4 makes both: give every 32 weights a scale of their
# own, so that an outlier spoils only its block; and space the values like
# floats, fine near zero.
#
# **The wrong half first.** With the format settled, decoding looks like five
# lines. Here they are, with the two halves of each byte in the order of a
# hexadecimal dump, the high one first. They run, and the shape, the mean and
# the standard deviation are right.

# %%
def naive_decode(blocks, scales, first="high"):
    codes = torch.cat([grid, -grid])
    low, high = codes[(blocks & 15).long()], codes[(blocks >> 4).long()]
    pair = [high, low] if first == "high" else [low, high]
    values = torch.stack(pair, -1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)


blocks = torch.randint(0, 256, (512, 4, 16), dtype=torch.uint8)
scales = torch.randint(118, 122, (512, 4), dtype=torch.uint8)
wrong = naive_decode(blocks, scales)
right = naive_decode(blocks, scales, first="low")
x = torch.randn(128)
cosine = torch.cosine_similarity(wrong @ x, right @ x, dim=0)
print("same mean and deviation:",
      torch.allclose(wrong.mean(), right.mean(), atol=1e-6)
      and torch.allclose(wrong.std(), right.std()))
print("outputs agree in direction:", bool(cosine.abs() > 0.2))
print("bytes of index for a byte of blocks:",
      2 * (blocks & 15).long().nbytes // blocks.nbytes)

# %% [markdown]
# Nothing fails, and every output is noise, because each weight multiplies its
# neighbour's input. No shape check can see it, only a comparison of values.
# Nor is the low half first everywhere: in llama.cpp's GGUF the low halves of
# a block hold its inputs 0 to 15 and the high halves 16 to 31, and its
# converter moves them (`transform_nibble_layout`).
#
# The second fault is `.long()`, an 8-byte index for each 4-bit code, sixteen
# times the file. The gate and up weights of one layer of the 120b are
# 128 · 5760 · 1440 bytes, or 1.06 GB; their indices take 17 GB.

# %% [markdown]
# ## Derivation
#
# **A code.** Four bits: a sign $\sigma$, two exponent bits $\eta$, one
# fraction bit $\mu$. This is the float type E2M1 of the OCP specification
# {cite}`ocpmx2023`, without infinities or NaN:
#
# $$
# \mathrm{fp4}(8 \sigma + 2 \eta + \mu) = (-1)^\sigma \cdot
# \begin{cases}
# \mu / 2 & \eta = 0 \\
# 2^{\eta - 1} (1 + \mu / 2) & \eta > 0
# \end{cases}
# $$ (mxfp4-code)
#
# which gives 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code 8 is -0.
#
# **A block.** Write $b_{n,j}$ for byte $j$ of block $n$ and $s_n$ for the
# block's scale byte. The weight at input $32 n + 2 j + h$ is
#
# $$
# w_{32 n + 2 j + h} =
# \mathrm{fp4}\!\left(\lfloor b_{n,j} / 16^h \rfloor \bmod 16\right)
# \cdot 2^{s_n - 127}, \qquad h \in \{0, 1\}, \; 0 \le j < 16.
# $$ (mxfp4-value)
#
# $s_n = 255$ means that the whole block is NaN. The cost is
# $(32 \cdot 4 + 8) / 32 = 4.25$ bits a weight.
#
# **Why decoding is exact.** By {eq}`mxfp4-value` a weight is an integer
# $m \in \{0, 1, 2, 3, 4, 6, 8, 12\}$ times $2^{s - 128}$. Apart from powers
# of two, $m$ is 1 or 3: two significant bits. A float format holds it if it
# has two bits and the exponent:
#
# * float32 and bfloat16 reach down to $2^{-149}$ and $2^{-133}$, below the
#   least possible weight $2^{-128}$. They hold everything below $2^{128}$,
#   that is all codes of the scales 0 to 252 (whose 6 is $1.5 \cdot 2^{127}$),
#   and round the 4 of scale 253 to infinity.
# * float16 has $2^{-24} \le |w| \le 65504$. All codes of a scale survive when
#   $s - 128 \ge -24$ and $6 \cdot 2^{s - 127} \le 65504$: scales 104 to 140.
#
# Weights near $2^{-128}$ are *subnormal* in float32 and bfloat16, and a
# processor in flush-to-zero mode would make them zero. So the decoder below
# does not multiply. It looks up finished bit patterns, made by integers.
#

# %% [markdown]
# ## Code
#
# ### Names and errors
#
# Everything about the format that is not arithmetic: sixteen values, the
# block, the four float types, and checks that name what they refuse.

# %% tags=["export"]
from functools import lru_cache

import torch

from gptoss.weights.errors import Error, mismatch

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

# %% tags=["export"]
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
    if dtype not in FORMATS:
        names = ", ".join(str(known) for known in FORMATS)
        raise mismatch(MXFP4Error, "dtype", f"one of {names}", dtype)

# %%
from itertools import product

assert [(-1) ** sign * (mu / 2 if eta == 0 else 2 ** (eta - 1) * (1 + mu / 2))
        for sign, eta, mu in product(range(2), range(4), range(2))
        ] == list(FP4_VALUES)
try:
    check_packed(blocks, scales[:, :3])
except MXFP4Error as error:
    print(error)

# %% [markdown]
# ### The obvious decoder
#
# Equation {eq}`mxfp4-value` in float64, where nothing can go wrong: its
# smallest normal number is $2^{-1022}$. One cast at the end. This is the slow
# twin against which the rest is held.

# %% tags=["export"]
def decode_reference(blocks: torch.Tensor, scales: torch.Tensor,
                     dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The slow twin of `decode`: look up, multiply in float64, cast once.

    blocks (…, N, 16) and scales (…, N), both uint8 -> (…, 32 N) in dtype.
    """
    check_packed(blocks, scales)
    check_dtype(dtype)
    grid = torch.tensor(FP4_VALUES, dtype=torch.float64)
    power = torch.tensor([2.0 ** (s - SCALE_BIAS) for s in range(SCALE_NAN)]
                         + [float("nan")], dtype=torch.float64)
    low, high = grid[(blocks & 15).long()], grid[(blocks >> 4).long()]
    values = torch.stack([low, high], dim=-1).flatten(-2)  # low nibble first
    return (values * power[scales.long()][..., None]).flatten(-2).to(dtype)

# %%
assert torch.equal(decode_reference(blocks, scales, torch.float32), right)
print(decode_reference(torch.full((1, 16), 0x2F, dtype=torch.uint8),
                       torch.tensor([128], dtype=torch.uint8))[:4])

# %% [markdown]
# Byte `0x2F` holds code 15 (-6) in its low half and code 2 (1) in its high
# half; scale 128 doubles them.
#
# ### One rounding, by integers
#
# A float format with $x$ exponent and $f$ fraction bits has a smallest step
# $2^{2 - 2^{x - 1} - f}$. To round $m \cdot 2^e$: find the step in force at
# that size, count steps, round the count. A useful accident of IEEE 754 makes
# the last line short: read as integers, the bit patterns of the positive
# floats number them in order, so the pattern is the count plus one full
# binade for every doubling of the step, and a carry out of the fraction lands
# in the exponent, where it belongs.

# %% tags=["export"]
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

# %%
for m, e in ((3, -129), (12, 126), (12, 127), (1, -127)):
    as_float = torch.tensor(m * 2.0 ** e, dtype=torch.float64)
    want = as_float.to(torch.float32).view(torch.int32)
    assert _round_bits(m, e, 8, 23) == want
print(hex(_round_bits(1, -128, 8, 23)), hex(_round_bits(1, -25, 5, 10)))

# %% [markdown]
# $2^{-128}$ is bit 21 of a float32; half of float16's smallest number is a
# tie, which goes to the even 0.
#
# ### A table of pairs
#
# There are 256 scales and 256 bytes, so 65,536 pairs of values: 256 KiB in
# bfloat16, of which a real tensor touches the few scales that it uses. The
# table stores a pair as one integer of twice the width.

# %% tags=["export"]
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

# %%
table = _pairs(torch.bfloat16, torch.device("cpu"))
print(table.shape, table.dtype, table.nbytes // 1024, "KiB")
print(table[256 * 128 + 0x2F].view(1).view(torch.bfloat16))

# %% [markdown]
# ### The decoder
#
# The index for {eq}`mxfp4-value` is `256 * scale + byte`, four bytes for
# every two weights. It is made for at most $2^{15}$ blocks at a time, so the
# work stays inside the processor's cache and the memory beyond the output
# stays at 2 MiB, whatever the tensor's size.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
for dtype in FORMATS:
    assert torch.equal(decode(blocks, scales, dtype), right.to(dtype))
on_meta = decode(blocks.to("meta"), scales.to("meta"))
print(tuple(blocks.shape), tuple(scales.shape), "->", tuple(on_meta.shape),
      on_meta.device)

# %% [markdown]
#
# ### A tensor that stays packed
#
# Two tensors that belong together, with the shape they stand for. Taking one
# expert out of a layer must not copy, so indexing gives views.

# %% tags=["export"]
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

# %%
layer = PackedMXFP4(blocks.view(8, 64, 4, 16), scales.view(8, 64, 4))
print(layer, layer.nbytes, "bytes")
print(layer[3], layer[3].decode(torch.float16).dtype)
assert layer[3].blocks.data_ptr() == blocks[192].data_ptr()

# %% [markdown]
# ### A linear layer with a packed weight
#
# $y = x W^T + b$, decoding $W$ to the type of $x$ inside the call. That is
# the definition; it saves memory, and the section on cost says what it does
# not save.

# %% tags=["export"]
def linear_by_decoding(x: torch.Tensor, blocks: torch.Tensor,
                       scales: torch.Tensor, bias: torch.Tensor | None
                       ) -> torch.Tensor:
    """`mxfp4_linear` in plain torch: decode the weight to x.dtype, multiply.

    The decoded weight lives only inside this call.
    """
    weight = decode(blocks, scales, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)

# %%
x = torch.randn(3, 128)
y = linear_by_decoding(x, blocks, scales, None)
assert torch.equal(y, x @ right.T)
print(tuple(x.shape), "->", tuple(y.shape))

# %% [markdown]
# [The table of operators](../model/operators.ipynb) makes one of it, so that
# a kernel can take its place and gradients pass through it.

# %% [markdown]
# ## It holds
#
# **Every byte at every scale**, in all four types: the fast decoder and its
# twin agree bit for bit, signs of zero included. `torch.float8_e8m0fnu`,
# torch's own type for scale bytes, is a third opinion.

# %%
def same_bits(a, b):
    """Equal bit for bit; any NaN equals any other."""
    whole = FORMATS[a.dtype][2]
    return bool(((a.view(whole) == b.view(whole))
                 | (a.isnan() & b.isnan())).all())


every_byte = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
every_byte = every_byte.expand(256, 16, 16)
every_scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
exact = decode_reference(every_byte, every_scale, torch.float64)
for dtype in FORMATS:
    found = decode(every_byte, every_scale, dtype)
    assert same_bits(found, decode_reference(every_byte, every_scale, dtype))
    unrounded = (found.double() == exact).all(-1).nonzero().flatten()
    assert len(unrounded) == unrounded.max() - unrounded.min() + 1
    assert dtype != torch.bfloat16 or 256 * len(unrounded) == 64_768
    print(f"{str(dtype):15} exact for scales", unrounded.min().item(), "to",
          unrounded.max().item())
powers = every_scale[:, 0].contiguous().view(torch.float8_e8m0fnu)
ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)
assert same_bits(decode(ones, every_scale[:, :1], torch.float32)[:, 0],
                 powers.to(torch.float32))

# %% [markdown]
# In bfloat16 and float32 the last scale without an infinity is 252, whose 6
# is $1.5 \cdot 2^{127}$; float16 has the range that the derivation found.
#
# **Flush to zero.** In that mode a product that is subnormal becomes zero;
# bits that are only moved do not.

# %%
half_codes = torch.full((1, 16), 0x11, dtype=torch.uint8)  # 0.5, 0.5, …
lowest = torch.zeros(1, dtype=torch.uint8)  # scale 2 ** -127
if torch.set_flush_denormal(True):
    product = torch.tensor(0.5) * torch.tensor(2.0 ** -126) * 0.5
    bits = decode(half_codes, lowest, torch.float32).view(torch.int32)
    torch.set_flush_denormal(False)
    assert product == 0 and bool((bits == 1 << 21).all())
assert decode(half_codes, lowest)[0].double() == 2.0 ** -128

# %% [markdown]
# ## Against the others
#
# The formulas of OpenAI's reader and of transformers are the same two steps:
# look up each nibble in the target type, then `torch.ldexp` by
# `scale - 127`. We compare with transformers itself, on every byte at every
# scale, bit for bit. (Its result is transposed.)

# %%
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

theirs = convert_moe_packed_tensors(every_byte[None].contiguous(),
                                    every_scale[None].contiguous())[0].T
ours = decode(every_byte, every_scale)
equal = (ours.view(torch.int16) == theirs.contiguous().view(torch.int16))
print("scales where all 512 values agree:",
      int(equal.all(-1).sum()), "of 256; the other:",
      (~equal.all(-1)).nonzero().flatten().tolist())
lookup = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
low, high = lookup[(blocks & 15).long()], lookup[(blocks >> 4).long()]
openai = torch.ldexp(torch.stack([low, high], -1).flatten(-2),
                     scales.int()[..., None] - 127).flatten(-2)
assert same_bits(decode(blocks, scales), openai)
print("scale 255 elsewhere:", theirs[255, 0:2].tolist(),
      theirs[255, 14].item(), " here:", ours[255, 0].item())

# %% [markdown]
# The one difference is scale 255. The specification says NaN; `ldexp` takes
# it for $2^{128}$ and returns zeros and infinities (in float32 even the finite
# $2^{127}$ for 0.5), so a corrupt scale passes for data. Ours is NaN, and
# [the audit of a file](encoding.ipynb) counts it.
#
# Known elsewhere: memory. OpenAI's reader makes two int64 indices for chunks
# of 8 million blocks: a peak of 11.4 GB in
# [gpt-oss#149](https://github.com/openai/gpt-oss/pull/149). transformers
# makes one int32 index at a time for 33 million: out of memory on an A100
# when the 120b was merged,
# [unsloth-zoo#266](https://github.com/unslothai/unsloth-zoo/pull/266).

# %% [markdown]
# ## In the 20b and the 120b
#
# The experts of both models, on the meta device: exact shapes and bytes, no
# memory.

# %%
from gptoss.weights.config import GptOssConfig


def packed_experts(config):
    """(weights, packed bytes) of all experts of a model."""
    E, F, D = (config.num_local_experts, config.intermediate_size,
               config.hidden_size)
    count = total = 0
    for out, inner in ((2 * F, D), (D, F)):  # gate_up, down
        shape = (E, out, inner // BLOCK)
        packed = PackedMXFP4(
            torch.empty(*shape, 16, dtype=torch.uint8, device="meta"),
            torch.empty(shape, dtype=torch.uint8, device="meta"))
        count += packed.shape.numel() * config.num_hidden_layers
        total += packed.nbytes * config.num_hidden_layers
    return count, total


for name, config in (("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    count, total = packed_experts(config)
    assert total * 32 == count * 17  # 4.25 bits
    print(f"{name:4}: {count:,} expert weights, {total:,} bytes "
          f"instead of {2 * count:,}")

# %% [markdown]
# ## Cost
#
# Decoding reads 17 bytes for 32 weights and writes $32 \cdot p$, with $p$ the
# bytes of the target type. Multiplying $T$ tokens by a weight of $F$ rows and
# $D$ columns takes $2 T F D$ FLOPs. So with one token the three ways to hold
# a weight move, in bytes a weight:
#
# $$
# \text{bf16: } 2, \qquad
# \text{decode, then multiply: } \tfrac{17}{32} + 2 + 2, \qquad
# \text{fused: } \tfrac{17}{32}.
# $$ (mxfp4-cost)
#
# The middle one, which reads the packed bytes, writes bfloat16 and reads it
# again, is `linear_by_decoding`: it needs 3.8 times less memory than bfloat16
# and moves 2.3 times more. One token wants the third, and
# [a kernel](../kernels/packed.ipynb) does it.

# %%
from torch.utils.flop_counter import FlopCounterMode

T, F, D = 5, 512, 128
counter = FlopCounterMode(display=False)
with counter:
    linear_by_decoding(torch.randn(T, D), blocks, scales, None)
assert counter.get_total_flops() == 2 * T * F * D
packed = PackedMXFP4(blocks, scales)
assert packed.nbytes * 32 == F * D * 17
print(f"memory: {2 / (17 / 32):.2f} times less than bf16;",
      f"traffic of decoding first: {(17 / 32 + 4) / 2:.2f} times more")

# %% [markdown]
# The claim on memory is tested rather than shown here: decoding 128 million
# weights raises a process's peak by less than 1.2 times the output
# (`tests/weights/test_mxfp4.py`).
#
# ## Takeaways
#
# * A weight is one of 15 values times a power of two shared by 32; decoding
#   is exact in bfloat16, so all loss happened when the file was written.
# * The low half of a byte is the even input. No shape tells when this is
#   wrong, only values do.
# * To decode first and multiply then saves memory and not time: the bytes are
#   written and read again.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many different finite numbers can MXFP4 represent, over all scales?
# Predict it from {eq}`mxfp4-value`, then count.

# %% tags=["hide-cell"]
# m is 1 or 3 times a power of two. 1 * 2**k: k from -128 (code 0.5, scale
# 0) to 129 (code 4, scale 254). 3 * 2**k: k from -128 to 128. Both signs,
# and one zero.
count = decode(every_byte[:255], every_scale[:255], torch.float64).unique()
assert len(count) == 2 * ((129 + 128 + 1) + (128 + 128 + 1)) + 1
print(len(count))

# %% [markdown]
# ### Exercise 2
#
# Move the three low bits of a code to bits 6 to 8 of a 16-bit integer and its
# sign to bit 15, and read that as bfloat16. What is the value, and which
# single multiplication decodes a block from it? Where does it fail?

# %% tags=["hide-cell"]
# Bits 7 and 8 become the low exponent bits, bit 6 the top fraction bit: the
# value is fp4 * 2**(1 - 127), with code 1 a bf16 subnormal, as it is an fp4
# subnormal. Multiply by 2**(126 + s - 127) = 2**(s - 1).
def decode_by_shift(blocks, scales):
    wide = blocks.to(torch.int16)
    wide = torch.stack([wide & 15, wide >> 4], -1).flatten(-2)
    bits = (wide & 7) << 6 | (wide & 8) << 12
    power = torch.ldexp(torch.ones(scales.shape), scales.int() - 1)
    values = bits.view(torch.bfloat16) * power[..., None]
    return values.to(torch.bfloat16).flatten(-2)


assert same_bits(decode_by_shift(blocks, scales), decode(blocks, scales))
# It fails from s = 129 on, where 2**(s - 1) no longer fits into a float32,
# and in flush-to-zero mode, where code 1 reads as 0.
works = [s for s in range(255) if same_bits(
    decode_by_shift(every_byte[s], every_scale[s]),
    decode(every_byte[s], every_scale[s]))]
print("right for scales", works[0], "to", works[-1])

# %% [markdown]
# ## Sources
#
# * Format and conversion rule: {cite}`ocpmx2023`, sections 5.3.3 (E2M1),
#   5.4.1 (E8M0) and 6.3 (conversion); use in gpt-oss: {cite}`gptoss2025`.
# * Reader with the nibble order: `openai/gpt-oss`,
#   `gpt_oss/torch/weights.py`, `Checkpoint._get_mxfp4_tensor`.
# * `huggingface/transformers` 5.23, `integrations/mxfp4.py`,
#   `convert_moe_packed_tensors`.
# * The GGUF layout: `ggml-org/llama.cpp`, `dequantize_row_mxfp4` and
#   `GptOssModel.transform_nibble_layout` of the converter.
