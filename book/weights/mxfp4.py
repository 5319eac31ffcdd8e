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
# How does gpt-oss-20b, with 20.9 billion parameters, fit into 13.8 GB? Nine
# parameters of ten are weights of experts, and each of those is one of only
# **fifteen different numbers**, times a power of two that it shares with 31
# neighbours. That makes 4.25 bits a weight. What does the file hold for one
# weight, and is anything lost when it is turned into a bf16 number?
#
# Nothing is, we shall see. This chapter reads the format, called MXFP4;
# [the next](encoding.ipynb) writes it.

# %%
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import checkpoint_bytes, total_parameters

small = GptOssConfig.gpt_oss_20b()
print(f"{total_parameters(small) / 1e9:.1f} billion parameters,",
      f"{checkpoint_bytes(small) / 1e9:.1f} GB,",
      f"{(32 * 4 + 8) / 32} bits for an expert's weight")

# %% [markdown]
# ## Picture
#
# One block of the file: 17 bytes in hexadecimal notation, 16 with two codes
# each and one with the scale. Below, the first four bytes are taken apart.
#
# What to see: each byte is two hexadecimal digits, and each digit is the code
# of one weight. The *right* digit, the low half, comes first, so the arrows
# cross. A code stands for one of sixteen values. The scale byte `78` is 120,
# which says "times $2^{120-127}$", and it is the same for all 32.

# %% tags=["hide-input"]
# Figure: a strip of 16 hexadecimal bytes and one scale byte; below, the
# digits of the first four in the order low, high, under each the value of
# its code, such as 1 for 2 and -6 for f, and that value divided by 128.
import matplotlib.pyplot as plt
import torch

plt.style.use("../_static/book.mplstyle")
BYTES = bytes.fromhex("f20a7135c4009d482be6135c87a00f6e")
SCALE = 0x78
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
figure, axis = plt.subplots(figsize=(7, 3.3))
for n, byte in enumerate([*BYTES, SCALE]):
    x = n * 0.9 + (0.5 if n == 16 else 0)
    axis.add_patch(plt.Rectangle((x, 6.4), 0.9, 0.9, ec="black", lw=0.8,
                                 fc="C1" if n == 16 else "C0", alpha=0.35))
    axis.text(x + 0.45, 6.85, f"{byte:02x}", ha="center", va="center",
              family="monospace", fontsize=11)
axis.text(0, 7.5, "16 bytes of codes", fontsize=8)
axis.text(14.9, 7.5, "scale", fontsize=8)
for n, byte in enumerate(BYTES[:4]):
    for half, code in enumerate((byte & 15, byte >> 4)):
        x, element = 1.6 + 1.75 * (2 * n + half), 2 * n + half
        value = -VALUES[code & 7] if code & 8 else VALUES[code]
        start = n * 0.9 + (0.62 if half == 0 else 0.28)
        axis.annotate("", (x, 5.15), (start, 6.45), arrowprops={
            "arrowstyle": "-|>", "lw": 0.8, "shrinkA": 0, "shrinkB": 2,
            "color": "C2" if half == 0 else "C5"})
        axis.text(x, 4.8, f"{code:x}", ha="center", va="center",
                  family="monospace", fontsize=11)
        axis.text(x, 3.6, f"{value:g}", ha="center", va="center")
        axis.text(x, 2.2, f"{value:g}/128", ha="center", va="center",
                  fontsize=8)
        axis.text(x, 1.0, str(element), ha="center", va="center",
                  fontsize=8)
for y, word in ((4.8, "code"), (3.6, "value"), (2.2, "weight"),
                (1.0, "input")):
    axis.text(0, y, word, va="center", fontsize=8)
    axis.axhline(y + 0.6, color="0.9", lw=0.8)
axis.text(15.4, 4.8, "…", ha="center", va="center")
axis.text(15.7, 5.7, "low half", color="C2", fontsize=8, ha="right")
axis.text(15.7, 5.25, "high half", color="C5", fontsize=8, ha="right")
axis.set(xlim=(-0.1, 16), ylim=(0.5, 8.1))
axis.set_axis_off()
plt.show()

# %% [markdown]
# ## One block by hand
#
# Let us decode this block in plain Python. A code has four bits. The three
# low ones choose one of eight magnitudes, the fourth is the sign:

# %%
def block_by_hand(block, scale):
    """16 bytes and a scale byte -> 32 numbers."""
    weights = []
    for byte in block:
        for code in (byte & 15, byte >> 4):          # the low half first
            value = VALUES[code & 7]
            if code & 8:
                value = -value
            weights.append(value * 2.0 ** (scale - 127))
    return weights


print("byte  codes    values         weights")
for byte in BYTES[:4]:
    low, high = byte & 15, byte >> 4
    weights = block_by_hand([byte], SCALE)
    print(f"  {byte:02x}   {low:x}, {high:x}",
          "{:6.1f}, {:4.1f}".format(*block_by_hand([byte], 127)),
          "{:11.6f}, {:9.6f}".format(*weights))
print(len(block_by_hand(BYTES, SCALE)), "numbers from",
      len(BYTES) + 1, "bytes")

# %% [markdown]
# Take the first byte, `f2`. Its low half 2 is the code of 1, its high half
# `f` is 15: sign bit set, and 7 is the code of 6, so -6. Divided by 128 these
# are 0.0078125 and -0.046875. That is the whole format. What is left of the
# chapter asks why it is so, why nothing is lost, and how to do it to 19
# billion weights.
#
# In the file the 16-byte parts of all blocks lie in one tensor, `blocks`, and
# the scale bytes in another, `scales`. A block is 32 consecutive inputs of
# one output: a matrix of $F$ rows and $D$ columns is `blocks` of shape
# ($F$, $D/32$, 16) and `scales` of shape ($F$, $D/32$).
#
# ## The naive version
#
# **One scale a row.** The oldest recipe for 4 bits: divide a row by its
# largest magnitude, round to the integers -7 to 7, keep one scale. One
# outlier in a row is enough to break it.

# %%
torch.manual_seed(0)
row = 0.02 * torch.randn(2880)
row[7] = 1.0  # one weight at 50 standard deviations
step = row.abs().max() / 7
uniform = (row / step).round() * step
print("weights that became zero:", int((uniform == 0).sum()), "of 2880")

# %% [markdown]
# There are two repairs, and MXFP4 makes both. Every 32 weights get a scale of
# their own, so that an outlier spoils only its block. And the values are
# spaced like those of floats, fine near zero, because most weights are small:

# %% tags=["hide-input"]
# Figure: three rows of 15 marks, the values at scale bytes 119, 120 and 121.
# The marks crowd towards zero, and each row is twice as wide as the one below
# it.
grid = torch.tensor(VALUES)
figure, axis = plt.subplots(figsize=(7, 1.7))
for height, byte in enumerate((119, 120, 121)):
    points = torch.cat([-grid, grid]) * 2.0 ** (byte - 127)
    axis.plot(points, [height] * 16, "|", markersize=15, markeredgewidth=1.8)
axis.set_yticks(range(3), ["scale 119", "scale 120", "scale 121"])
axis.set_ylim(-0.6, 2.6)
axis.set_xticks((-0.08, -0.04, 0, 0.04, 0.08))
axis.set_xlabel("weight")
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# **The wrong half first.** Now decode whole tensors, with the two halves of
# each byte in the order in which they are written, the high one first. It
# runs, and the shape, the mean and the standard deviation are right.

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
print(f"standard deviation {wrong.std():.4f} and {right.std():.4f}")
print(f"cosine between the outputs {cosine.abs():.1f}, where 1 is equal")
print("bytes of index for a byte of blocks:",
      2 * (blocks & 15).long().nbytes // blocks.nbytes)
print(f"blocks of one gate_up of the 120b: {128 * 5760 * 1440 / 1e9:.2f} GB,",
      f"their index {16 * 128 * 5760 * 1440 / 1e9:.0f} GB")

# %% [markdown]
# Nothing fails, and every output is noise, because each weight multiplies its
# neighbour's input. No shape check can see it, only a comparison of values.
# Nor is the low half first everywhere: in llama.cpp's GGUF files the low
# halves of a block hold its inputs 0 to 15 and the high halves 16 to 31, and
# its converter moves them (`transform_nibble_layout`).
#
# The second fault is `.long()`, an 8-byte index for each 4-bit code. For one
# matrix of the 120b the indices take 17 GB.
#
# ## What a code means
#
# The four bits are a tiny float: a sign $\sigma$, two exponent bits $\eta$,
# one fraction bit $\mu$. Take code 5, `0 10 1`: the exponent bits say 2, the
# fraction bit adds a half, so it is $2^{2-1} \cdot (1 + 1/2) = 3$. The
# smallest exponent is special, as in every float format: there is no 1 in
# front of the fraction, which leaves room for zero.
#
# $$
# \mathrm{fp4}(8 \sigma + 2 \eta + \mu) = (-1)^\sigma \cdot
# \begin{cases}
# \mu / 2 & \eta = 0 \\
# 2^{\eta - 1} (1 + \mu / 2) & \eta > 0
# \end{cases}
# $$ (mxfp4-code)
#
# It is called E2M1, and stands in the specification of the Open Compute
# Project {cite}`ocpmx2023`. There is no infinity and no NaN. There is a -0,
# code 8: it counts as zero, but we keep its sign, so that a file that is
# decoded and encoded again has the same bytes.

# %%
table = [(-1) ** sign * (mu / 2 if eta == 0 else 2 ** (eta - 1) * (1 + mu / 2))
         for sign in range(2) for eta in range(4) for mu in range(2)]
for half in (range(8), range(8, 16)):
    print(*(f"{code:x}: {table[code]:g}" for code in half), sep="  ")

# %% [markdown]
# **A block.** Write $b_{n,j}$ for byte $j$ of block $n$ and $s_n$ for its
# scale byte. The weight at input $32 n + 2 j + h$ is
#
# $$
# w_{32 n + 2 j + h} =
# \mathrm{fp4}\!\left(\lfloor b_{n,j} / 16^h \rfloor \bmod 16\right)
# \cdot 2^{s_n - 127}, \qquad h \in \{0, 1\}, \; 0 \le j < 16.
# $$ (mxfp4-value)
#
# The scale byte $s_n = 255$ means that the whole block is NaN.
#
# ### Those equations in code
#
# Both equations in float64, where nothing can go wrong, since its smallest
# normal number is $2^{-1022}$. One cast at the end. This is the slow twin
# against which everything faster is held. `FORMATS` says of each float type
# how many exponent and fraction bits it has, which integer is as wide as one
# of its numbers, and which type is as wide as two.

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

# %%
blocks_1 = torch.tensor([list(BYTES)], dtype=torch.uint8)
scales_1 = torch.tensor([SCALE], dtype=torch.uint8)
one = decode_reference(blocks_1, scales_1, torch.float32)
print(one[:4].tolist())
assert one.tolist() == block_by_hand(BYTES, SCALE)
assert torch.equal(decode_reference(blocks, scales, torch.float32), right)

# %% [markdown]
# The same four numbers as by hand.
#
# ## Why nothing is lost
#
# By {eq}`mxfp4-value` a weight is an integer
# $m \in \{0, 1, 2, 3, 4, 6, 8, 12\}$ times $2^{s - 128}$. Apart from powers
# of two, $m$ is 1 or 3: two significant bits. A float format holds the weight
# exactly if it has two bits and the exponent.
#
# * bfloat16 and float32 reach down to $2^{-133}$ and $2^{-149}$, below the
#   least possible weight, $2^{-128}$. At the other end they hold what is
#   below $2^{128}$: all codes of the scales 0 to 252, whose 6 is
#   $1.5 \cdot 2^{127}$. The 4 of scale 253 becomes infinity.
# * float16 reaches from $2^{-24}$ to 65504. All codes of a scale survive when
#   $s - 128 \ge -24$ and $6 \cdot 2^{s - 127} \le 65504$: scales 104 to 140.
#
# So of the 253 · 256 pairs of a byte and a scale up to 252 not one is rounded
# in bf16. We count them below.
#
# There is one trap. Weights near $2^{-128}$ are *subnormal* in float32 and
# bfloat16, below the smallest number with a full fraction. A processor may be
# set to *flush to zero*: then the result of a multiplication that is
# subnormal becomes 0. So the fast decoder does not multiply. It looks up
# finished bit patterns, which are made from integers, once.
#
# ### How is a number rounded without arithmetic on floats?
#
# (You may skip this section; it makes the entries of the table.) Take a float
# format with three exponent bits and two fraction bits, small enough to draw.
# Its smallest step is 1/16. The marks below are its first values, with the
# bit patterns read as integers under them.

# %% tags=["hide-input"]
# Figure: a number line of a small float format with marks at 0 to 8 in
# sixteenths, then every second sixteenth to one; below, bit patterns 0 to 12
# count the marks. 1.5/16 lies between patterns 1 and 2 and goes to 2; 0.75
# is at pattern 10.
marks = [n / 16 for n in range(8)] + [n / 8 for n in range(4, 9)]
figure, axis = plt.subplots(figsize=(7, 1.9))
axis.axhline(0, color="black", lw=0.8)
axis.plot(marks, [0] * len(marks), "|", color="C0", ms=16, mew=1.8)
for pattern, mark in enumerate(marks):
    axis.text(mark, -0.75, str(pattern), ha="center", color="C0")
for x, to, word in ((1.5 / 16, 2 / 16, "3 · 2$^{-5}$, a tie"),
                    (0.75, 0.75, "3 · 2$^{-2}$, exact")):
    axis.plot([x], [0], "o", color="C5", ms=5)
    axis.annotate("", (to, 0.25), (x, 0.9), arrowprops={
        "arrowstyle": "-|>", "color": "C5"})
    axis.text(x, 1.0, word, ha="center", va="bottom", color="C5")
axis.text(0.25, 1.05, "step 1/16", ha="center", fontsize=8)
axis.text(0.55, 1.05, "step 1/8", ha="center", fontsize=8)
axis.axvline(0.5, 0.3, 0.75, color="0.6", ls=":", lw=1)
axis.set(xlim=(-0.02, 1.02), ylim=(-1.1, 1.8), yticks=[],
         xlabel="value (blue numbers: bit pattern as an integer)")
axis.spines["left"].set_visible(False)
axis.grid(False)
plt.show()

# %% [markdown]
# Two numbers are rounded to it. The first is $3 \cdot 2^{-5}$, or 1.5 steps
# of 1/16: halfway between patterns 1 and 2. A tie goes to the even one, 2.
# The second, $3 \cdot 2^{-2} = 0.75$, lies where steps are 1/8: it is 6 such
# steps. Its pattern is not 6 but 10, because on the way the step has doubled
# once, and each doubling adds $2^2 = 4$ patterns. That is the recipe:
#
# 1. Find the step in force at the number's size, `unit` (its logarithm).
# 2. Count steps, and round the count: nearest, ties to even.
# 3. The bit pattern is the count plus $2^f$ for each doubling of the step.
#
# For $x$ exponent and $f$ fraction bits the smallest step is
# $2^{2 - 2^{x - 1} - f}$. If rounding carries the count up to the next power
# of two, the sum still comes out right: the carry lands in the exponent. What
# is too large gets the pattern of infinity.

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
for m, e in ((3, -5), (3, -2)):
    print(f"{m} * 2**{e}, 3 exponent and 2 fraction bits: pattern",
          _round_bits(m, e, 3, 2))
for m, e in ((3, -129), (12, 126), (12, 127), (1, -127)):
    as_float = torch.tensor(m * 2.0 ** e, dtype=torch.float64)
    pattern = as_float.to(torch.float32).view(torch.int32).item()
    print(f"{m} * 2**{e} in float32: {_round_bits(m, e, 8, 23):#x},",
          f"by torch {pattern:#x}")
    assert _round_bits(m, e, 8, 23) == pattern

# %% [markdown]
# ## Code
#
# ### What is refused
#
# The fast code below looks at what it is given first. Refused are `blocks` and
# `scales` that are not uint8; blocks of fewer than two
# dimensions, or whose last is not 16; scales that do not have the blocks'
# shape without that 16; and a type that is none of float16, bfloat16, float32
# and float64. Each is an `MXFP4Error` that begins with `blocks`, `scales` or
# `dtype` and says which type (`uint8`) or shape was expected and what was
# found instead.

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
    """Raise MXFP4Error unless it is one of the four float types."""
    if dtype not in FORMATS:
        names = ", ".join(str(known) for known in FORMATS)
        raise mismatch(MXFP4Error, "dtype", f"one of {names}", dtype)

# %%
for call in (lambda: check_packed(blocks, scales[:, :3]),
             lambda: check_packed(blocks.int(), scales),
             lambda: check_dtype(torch.int8)):
    try:
        call()
    except MXFP4Error as error:
        print(error)

# %% [markdown]
# ### How is a byte decoded in one step?
#
# By a table of pairs. There are 256 scales and 256 bytes, so 65,536 pairs of
# values: 256 KiB in bfloat16, of which a real tensor touches only the few
# scales that it uses. A pair is stored as one integer of twice the width, so
# that the decoder only moves it. For a pair of doubles that must be 16 bytes
# wide, and the only such type that torch has is complex128. Each float type
# and device has a table of its own, made when it is first asked for and then
# kept.

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
pair_table = _pairs(torch.bfloat16, torch.device("cpu"))
print(tuple(pair_table.shape), pair_table.dtype, pair_table.nbytes // 1024,
      "KiB")
entry = pair_table[256 * 120 + 0xF2].view(1).view(torch.bfloat16)
print("scale 120, byte f2:", entry.tolist())

# %% [markdown]
# ### How is a whole tensor decoded in little memory?
#
# The place in the table is `256 * scale + byte`, a four-byte index for every
# two weights. It is made for at most $2^{15}$ blocks at a time, so that the
# work stays inside the processor's cache, and the memory beyond the output
# stays at 2 MiB, whatever the tensor's size. Tensors that are not contiguous
# are welcome, and so are those without rows. (Two lines are for torch's
# function transforms such as `vmap`. They lose what is written by `out=`;
# under one of them we index at once.)

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
print(decode(blocks_1, scales_1)[:4].tolist())
on_meta = decode(blocks.to("meta"), scales.to("meta"))
print(tuple(blocks.shape), tuple(scales.shape), "->", tuple(on_meta.shape),
      on_meta.device)

# %% [markdown]
# ### How does a tensor stay packed?
#
# `blocks` and `scales` belong together, and stand for a shape that neither
# has. `PackedMXFP4` holds both. Taking one expert out of a layer must not
# copy, so indexing gives views. The last dimension is packed and cannot be
# indexed: at most as many integers or slices as there are dimensions before
# it, and nothing else; the error says how many that is. `to` moves both
# parts, `nbytes` counts both.

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
try:
    layer[0, 0, 0]
except MXFP4Error as error:
    print(error)

# %% [markdown]
# ### How is a packed weight multiplied with?
#
# $y = x W^T + b$, where $W$ is decoded to the type of $x$ inside the call.
# That is the definition. It saves memory; the section on cost says what it
# does not save. [The table of operators](../model/operators.ipynb) makes an
# operator of it, so that a kernel can take its place and gradients pass
# through.

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
    print(f"{str(dtype):15} exact for scales", unrounded.min().item(), "to",
          f"{unrounded.max().item()}: {256 * len(unrounded):,} pairs")
powers = every_scale[:, 0].contiguous().view(torch.float8_e8m0fnu)
ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)
assert same_bits(decode(ones, every_scale[:, :1], torch.float32)[:, 0],
                 powers.to(torch.float32))

# %% [markdown]
# These are the ranges that we derived: in bfloat16 all 64,768 pairs, in
# float16 the scales 104 to 140.
#
# **Flush to zero.** In that mode a product that is subnormal becomes zero;
# bits that are only moved do not.

# %%
half_codes = torch.full((1, 16), 0x11, dtype=torch.uint8)  # 0.5, 0.5, …
lowest = torch.zeros(1, dtype=torch.uint8)  # scale 2 ** -127
moved = decode(half_codes, lowest)[0].double().item()
if torch.set_flush_denormal(True):
    product = torch.tensor(0.5) * torch.tensor(2.0 ** -126) * 0.5
    bits = decode(half_codes, lowest, torch.float32).view(torch.int32)
    torch.set_flush_denormal(False)
    assert product == 0 and bool((bits == 1 << 21).all())
assert moved == 2.0 ** -128
print(f"decoded: {moved:.4g}")

# %% [markdown]
# **The sentence again.** [The whole model on one page](../one_page.ipynb)
# decodes its experts with `ldexp`. We put our table in its place, and the
# story goes on as it did:

# %%
from gptoss.one_page import SENTENCE, sentence

retold = sentence(12, decode=lambda *packed: decode(*packed, torch.float32))
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Against the others
#
# OpenAI's reader and transformers take the same two steps: look up each
# nibble in the target type, then `torch.ldexp` by `scale - 127`. We compare
# with transformers itself, on every byte at every scale, bit for bit. (Its
# result is transposed.)

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
# it for $2^{128}$ and returns zeros and infinities, so a corrupt scale passes
# for data. Ours is NaN, and [the audit of a file](encoding.ipynb) counts it.

# %% [markdown] tags=["given"]
# Known elsewhere: memory. OpenAI's reader makes two int64 indices for chunks
# of 8 million blocks: a peak of 11.4 GB in
# [gpt-oss#149](https://github.com/openai/gpt-oss/pull/149). transformers
# makes one int32 index at a time for 33 million: out of memory on an A100
# when the 120b was merged,
# [unsloth-zoo#266](https://github.com/unslothai/unsloth-zoo/pull/266).

# %% [markdown]
# ## In the 20b and the 120b
#
# The experts of both models, on torch's meta device: exact shapes and bytes,
# and no memory.

# %%
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
    print(f"{name}: {count:,} weights, {total:,} bytes, in bf16 "
          f"{2 * count:,}: {8 * total / count} bits")

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
print(f"{packed.nbytes:,} bytes for {F * D:,} weights")
print(f"memory: {2 / (17 / 32):.2f} times less than bf16;",
      f"traffic of decoding first: {(17 / 32 + 4) / 2:.2f} times more")

# %% [markdown]
# A test holds the memory of decoding itself: 128 million weights must not
# raise a process's peak by more than the output and a fifth of it.
#
# ## Takeaways
#
# * A weight is one of 15 values times a power of two that 32 weights share:
#   17 bytes for 32 weights, 4.25 bits each.
# * Decoding is exact in bfloat16, so whatever was lost was lost when the file
#   was written.
# * The low half of a byte is the even input. No shape tells when this is
#   wrong, only values do.
# * To decode first and multiply then saves memory, not time.
#
# ## Exercises
#
# ### Exercise 1
#
# Decode by hand: the scale byte is `81` in hexadecimal notation, and the
# first two bytes of the block are `3c` and `80`. Which four weights are
# these, and which of them is the odd one out?

# %% tags=["hide-cell"]
print("scale 2 **", 0x81 - 127)
print(block_by_hand([0x3C, 0x80], 0x81))
print("codes c, 3, 0, 8: -2, 1.5, 0 and -0 times 4; the last is a minus zero")

# %% [markdown]
# ### Exercise 2
#
# How many different finite numbers can MXFP4 represent, over all scales?
# Predict it from {eq}`mxfp4-value`, then count.

# %% tags=["hide-cell"]
# m is 1 or 3 times a power of two. 1 * 2**k: k from -128 (code 0.5, scale
# 0) to 129 (code 4, scale 254). 3 * 2**k: k from -128 to 128. Both signs,
# and one zero.
predicted = 2 * ((129 + 128 + 1) + (128 + 128 + 1)) + 1
count = decode(every_byte[:255], every_scale[:255], torch.float64).unique()
print(f"predicted {predicted:,}, counted {len(count):,}")

# %% [markdown]
# ### Exercise 3
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
print("value: fp4 / 2**126; multiply by 2**(s - 1)")
print("right for scales", works[0], "to", works[-1])

# %% [markdown]
# ### Exercise 4
#
# llama.cpp keeps inputs 0 to 15 of a block in the low halves of its 16 bytes
# and 16 to 31 in the high halves. Rearrange the bytes of the block on this
# page so, and decode them in that order: the weights must be the same.

# %% tags=["hide-cell"]
codes = [code for byte in BYTES for code in (byte & 15, byte >> 4)]
gguf = bytes(codes[n] | codes[n + 16] << 4 for n in range(16))
again = ([VALUES[byte & 7] * (-1) ** (byte >> 3 & 1) for byte in gguf]
         + [VALUES[byte >> 4 & 7] * (-1) ** (byte >> 7) for byte in gguf])
print(BYTES.hex(" "), gguf.hex(" "), sep="\n")
same = [a * 2.0 ** (SCALE - 127) for a in again]
print("weights that differ:",
      sum(a != b for a, b in zip(same, one.tolist(), strict=True)), "of 32")

# %% [markdown]
# ## Sources
#
# * Format and conversion rule: {cite}`ocpmx2023`, sections 5.3.3 (E2M1),
#   5.4.1 (E8M0) and 6.3 (conversion); use in gpt-oss: {cite}`gptoss2025`.
# * The nibble order: `openai/gpt-oss`, `Checkpoint._get_mxfp4_tensor`;
#   `huggingface/transformers` 5.23, `convert_moe_packed_tensors`.
# * The GGUF layout: `ggml-org/llama.cpp`, `dequantize_row_mxfp4`.
