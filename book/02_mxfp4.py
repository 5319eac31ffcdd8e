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
# MXFP4, writes it, and proves both.

# %% [markdown]
# ## Picture
#
# Left, each row is the whole set of values that a weight can take, for three
# neighbouring scale bytes. The points crowd towards zero, and a larger scale
# moves them all apart. Right, what becomes of 32 weights that share scale
# byte 120: each dot, a normal random number, falls to the nearest mark. Small
# weights move least; one lies beyond the last mark and is clipped.

# %% tags=["hide-input"]
# Figure: left, three rows of 16 marks, the values at scale bytes 119, 120
# and 121. The marks crowd towards zero, and each row is twice as wide as the
# one below it. Right, 32 dots joined to the nearest of 15 vertical lines,
# close together near zero; one dot lies outside the last line.
import matplotlib.pyplot as plt
import torch

plt.style.use("_static/book.mplstyle")
torch.manual_seed(0)
grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
figure, (axis, right) = plt.subplots(1, 2, figsize=(7.4, 3))
for height, byte in enumerate((119, 120, 121)):
    points = torch.cat([-grid, grid]) * 2.0 ** (byte - 127)
    axis.plot(points, [height] * 16, "|", markersize=17, markeredgewidth=1.8)
axis.set_yticks(range(3), ["scale 119", "scale 120", "scale 121"])
axis.set_ylim(-0.7, 2.7)
axis.set_xticks((-0.08, -0.04, 0, 0.04, 0.08))
axis.set_xlabel("weight")
axis.grid(axis="y", visible=False)
block = 0.02 * torch.randn(32, generator=torch.Generator().manual_seed(4))
points = torch.cat([-grid, grid]) * 2.0 ** (120 - 127)
nearest = points[(block[:, None] - points).abs().argmin(1)]
right.vlines(points, -1, 32, color="0.8", lw=0.8)
right.hlines(range(32), block, nearest, color="C1")
right.plot(block, range(32), "o", color="C1", ms=3.5, label="weight")
right.plot(nearest, range(32), "|", color="C0", ms=6, markeredgewidth=1.8,
           label="what is stored")
right.set(xlabel="weight", ylabel="place in the block", yticks=(0, 15, 31),
          ylim=(-1, 32))
right.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
right.grid(False)
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
# Who writes a block chooses its scale, and pays on one side or the other:
# under a small scale the largest weights are clipped to 6 steps, under a
# large one the smallest become zero.
#
# <div class="live" data-live="mxfp4">In the web book, a slider moves the
# scale of a block of 32 weights here.</div>
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
# **Choosing a scale.** To encode, let $a = \max |w|$ over a block and take
#
# $$
# e = \lfloor \log_2 a \rfloor - 2, \qquad s = e + 127
# \text{ kept within } 0 \ldots 254,
# $$ (mxfp4-scale)
#
# the rule of the specification (section 6.3): the 2 is the exponent of the
# largest code, $6 = 1.5 \cdot 2^2$. Then $4 \le a / 2^e < 8$, and each
# $|w| / 2^e$ goes to the nearest of the eight magnitudes; a tie goes to the
# even code, and what lies above 6 becomes 6.
#
# **The error.** Let $v = |w| / 2^e$ and $\hat v$ its rounding, which is off
# by at most half a gap of the grid. The gaps are 1/2 below 2, 1 from there
# to 4, and 2 from 4 to 6. With $a / 2^e \ge 4$ and $a / 2^e \ge v$,
#
# $$
# \frac{|v - \hat v|}{a / 2^e} \le
# \begin{cases}
# \frac{1}{2} / 4 = \frac{1}{8} & v \le 4 \\[2pt]
# \frac{|v - \hat v|}{v} \le \frac{1}{5} & 4 < v \le 6
#   \;\text{ (worst at } v = 5) \\[2pt]
# \frac{v - 6}{v} < \frac{1}{4} & 6 < v < 8 \;\text{ (clipped)}
# \end{cases}
# $$ (mxfp4-error)
#
# No weight moves by a quarter of its block's largest magnitude, as long as
# $a \ge 2^{-125}$ (below that the scale has hit 0) and $a < 2^{130}$.
#
# **What comes back equal.** Decode a block of scale exponent $e$ in which the
# largest code stands for the magnitude $q$, and encode it. If $q$ is 4 or 6,
# {eq}`mxfp4-scale` finds the same $e$: the same bytes. If $q < 4$, it finds
# a smaller $e' = e - d$, and on that grid the magnitudes up to $q$ have the
# codes of $2^d$ times as much:
#
# * $q \in \{2, 3\}$, $d = 1$: 0.5, 1, 1.5, 2, 3 become 1, 2, 3, 4, 6;
# * $q \in \{1, 1.5\}$, $d = 2$: 0.5, 1, 1.5 become 2, 4, 6;
# * $q = 0.5$, $d = 3$: 0.5 becomes 4.
#
# All are on the grid, so the *values* return exactly, in other bytes. (Where
# $e'$ would fall below -127 it stops there; a smaller $d$ stays on the grid
# too.) A block of zeros gets scale 0, the limit of the rule. So a block is
# **canonical**, its bytes return, when its largest magnitude is 4 or 6 or
# its scale is 0. Whoever needs other blocks back byte for byte keeps their
# scales and hands them in.

# %% [markdown]
# ## Code
#
# ### Names and errors
#
# Everything about the format that is not arithmetic: sixteen values, the
# block, the four float types, and checks that name what they refuse.

# %% tags=["export:weights/mxfp4"]
from dataclasses import dataclass
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

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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
# ### Rounding to the grid
#
# The code of a magnitude is the number of midpoints it has passed. Seven
# comparisons, exact in any float type, because the midpoints 0.25, 0.75,
# 1.25, 1.75, 2.5, 3.5 and 5 are.

# %% tags=["export:weights/encoding"]
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

# %%
ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0])
print([FP4_VALUES[code] for code in _round_to_grid(ties)])

# %% [markdown]
# Each tie went to a code whose last bit is 0 (the values 0, 1, 2, 4), and 99
# to 6.
#
# ### Choosing the scale
#
# $\lfloor \log_2 a \rfloor$ is the exponent field of a float. `log2` itself
# may round $\log_2(8 - \varepsilon)$ up to 3; `frexp` cannot.

# %% tags=["export:weights/encoding"]
def _choose_scales(largest: torch.Tensor) -> torch.Tensor:
    """OCP rule: floor(log2(largest)) - 2, as a byte; a zero block gets 0.

    largest (M,) float64, not negative. `frexp` reads the exponent field, so
    no logarithm can land on the wrong side of an integer.
    """
    _, exponent = torch.frexp(largest)  # largest = f * 2**exponent, f < 1
    scales = (exponent - 1 - 2 + SCALE_BIAS).clamp(0, SCALE_NAN - 1)
    return torch.where(largest > 0, scales, 0).to(torch.uint8)

# %%
below = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
print("by log2:", int(torch.log2(below).floor()),
      " by frexp:", int(torch.frexp(below)[1]) - 1)
print(_choose_scales(torch.tensor([0, 1e-60, 1, 7.9, 8, 1e60],
                                  dtype=torch.float64)))

# %% [markdown]
# ### The encoder
#
# Float64 inside, in slices of $2^{15}$ blocks: dividing by a power of two is
# then exact, and memory stays bounded. A NaN or an infinity has no code, so it
# is refused by its position instead of turning into a 6.

# %% tags=["export:weights/encoding"]
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

# %% tags=["export:weights/encoding"]
def _encode_rows(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """rows (M, 32) float64, scales (M,) uint8 -> blocks (M, 16) uint8."""
    inverse = torch.tensor([2.0 ** (SCALE_BIAS - s)
                            for s in range(SCALE_NAN)], dtype=torch.float64)
    inverse = inverse.to(rows.device)[scales.int()]
    codes = _round_to_grid(rows.abs() * inverse[:, None])
    codes |= torch.signbit(rows).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4

# %% [markdown]
# What it refuses: wrong types and shapes, and with kept scales a 255.

# %% tags=["export:weights/encoding"]
def _check_values(values, scales) -> torch.Size:
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

# %%
packed, kept = encode(row)
ours = decode(packed, kept, torch.float32)
print("scales", kept.min().item(), "to", kept.max().item())
print("zeros: ", int((ours == 0).sum()), "of 2880; in the outlier's block:",
      int((ours[:32] == 0).sum()), "of 32")
try:
    encode(torch.tensor([0.0] * 40 + [float("nan")] + [0.0] * 23))
except MXFP4Error as error:
    print(error)

# %% [markdown]
# This is the row of which a single scale left four weights. Now the outlier
# costs its 31 neighbours and nobody else; the other zeros are weights of at
# most a quarter of their scale.
#
# ### An audit of a file
#
# Whether a file would survive decode and encode byte for byte can be counted
# without decoding it.

# %% tags=["export:weights/encoding"]
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

# %% tags=["export:weights/encoding"]
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

# %%
print(audit(blocks, scales).describe())
few = blocks & 0x33  # codes 0 to 3 only: magnitudes up to 1.5
print(audit(few, scales).describe())

# %% [markdown]
# With random codes, a block without a single 4 or 6 has probability
# $(3/4)^{32} \approx 10^{-4}$.
#
# ### A tensor that stays packed
#
# Two tensors that belong together, with the shape they stand for. Taking one
# expert out of a layer must not copy, so indexing gives views.

# %% tags=["export:weights/mxfp4"]
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

# %% tags=["export:weights/mxfp4"]
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
# Chapter 10 makes an operator of it, so that a kernel can take its place and
# gradients pass through it.

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
# **Every kind of block comes back.** What decides is the largest code and the
# scale: 8 x 255 kinds, all tried, with both signs and all smaller codes
# inside. Values return always, bytes exactly when the audit says so, and with
# the scales kept all bytes return, -0 included.

# %%
largest = torch.arange(8, dtype=torch.uint8)[:, None]
codes = torch.minimum(torch.arange(32, dtype=torch.uint8) % 8, largest)
codes |= (torch.arange(32, dtype=torch.uint8) // 8 % 2) << 3
kinds = (codes[:, 0::2] | codes[:, 1::2] << 4)[:, None].repeat(1, 255, 1)
finite = torch.arange(255, dtype=torch.uint8).repeat(8, 1)
values = decode(kinds, finite, torch.float64)
again = encode(values)
assert same_bits(decode(*again, torch.float64), values)
same = ((again[0] == kinds).all(-1) & (again[1] == finite))
assert int(same.sum()) == audit(kinds, finite).canonical
assert torch.equal(encode(values, finite)[0], kinds)
print(int(same.sum()), "of", same.numel(), "kinds keep their bytes")

# %% [markdown]
# 510 kinds whose largest magnitude is 4 or 6, and the other 6 at scale 0.
#
# **The bound** {eq}`mxfp4-error`, on a million Gaussian weights: nearly
# reached, never passed.

# %%
weights = torch.randn(2 ** 15, 32, dtype=torch.float64)
packed, scale = encode(weights)
error = (decode(packed, scale, torch.float64) - weights)
top = weights.abs().amax(-1)
worst = error.abs().amax(-1) / top
place = torch.ldexp(top, 127 - scale[:, 0].int())  # a / 2**e, in [4, 8)
assert place.min() >= 4 and place.max() < 8
assert (worst < 1 / 4).all() and (worst[place <= 6] <= 1 / 5).all()
print(f"worst {worst.max():.3f} of the block's largest; without clipping "
      f"{worst[place <= 6].max():.3f}")
print(f"clipped blocks: {(place > 6).double().mean():.0%}")

# %% [markdown]
# **Three rules for the scale.** Three blocks in ten are clipped. That is why
# others round the scale up when $a / 2^e > 6$ (torchao calls it RCEIL), so
# that nothing is clipped, and every other weight of the block pays with a
# grid twice as coarse. A third rule switches at 7, where $a$ is as near to 8
# as to 6 (torchao's EVEN). The `scales` argument lets us try all three on the
# same weights.

# %%
def squared_error(switch):
    """Mean squared error of each block, scale doubled if a/2**e > switch."""
    chosen = scale + (place > switch).to(torch.uint8)[:, None]
    found = decode(*encode(weights, chosen), torch.float64)
    return (found - weights).square().mean(-1)


floor, even, up = (squared_error(switch) for switch in (8, 7, 6))
for name, loss in (("OCP (floor)", floor), ("switch at 7", even),
                   ("no clipping", up)):
    print(f"{name:12} {loss.mean():.4f} of the variance")
assert 0.98 < floor.mean() / up.mean() < 1
assert 0.94 < even.mean() / floor.mean() < 0.96

# %% tags=["hide-input"]
# Figure: mean squared error over the largest magnitude of a block in steps of
# its scale. Both rules agree up to 6, with a hump at 5; above, clipping at 6
# costs less than doubling the scale until just after 7, where the curves
# cross.
edges = torch.arange(4, 8.01, 0.25, dtype=torch.float64)
middle = (edges[:-1] + edges[1:]) / 2
bins = torch.bucketize(place, edges, right=True) - 1
counts = torch.bincount(bins, minlength=16)
figure, axis = plt.subplots(figsize=(7, 2.8))
for loss, label, style in ((floor, "keep the scale: clip at 6", "o-"),
                           (up, "double the scale above 6", "s--")):
    mean = torch.bincount(bins, loss, minlength=16) / counts
    axis.plot(middle, mean, style, markersize=4, label=label)
axis.axvline(7, color="black", linewidth=0.8, linestyle=":")
axis.set_xlabel("largest magnitude of the block / scale")
axis.set_ylabel("mean squared error\n(variance = 1)")
axis.set_ylim(0, None)
axis.legend(loc="lower left")
plt.show()

# %% [markdown]
# Left of 6 the rules are one; the hump at 5 is the largest weight itself,
# midway between 4 and 6. Right of 6 clipping a little is cheaper than
# coarsening 31 neighbours, up to just above 7, where the curves cross. So for
# Gaussian weights the specification's rule and the one without clipping are
# within 2 % of each other, and switching at 7 saves about 5 %. We keep the
# specification's rule as the default, because it is the one a reader of the
# specification expects, and leave `scales` for anyone who wants the 5 %.

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
# $2^{127}$ for 0.5), so a corrupt scale passes for data. Ours is NaN, and the
# audit counts it.
#
# Known elsewhere:
#
# * Memory. OpenAI's reader makes two int64 indices for chunks of 8 million
#   blocks: a peak of 11.4 GB in
#   [gpt-oss#149](https://github.com/openai/gpt-oss/pull/149). transformers
#   makes one int32 index at a time for 33 million: out of memory on an A100
#   when the 120b was merged,
#   [unsloth-zoo#266](https://github.com/unslothai/unsloth-zoo/pull/266).
# * The scale. [aiter#3212](https://github.com/ROCm/aiter/pull/3212) went over
#   to the rule without clipping after counting 37 % of groups clipped;
#   [vllm#43557](https://github.com/vllm-project/vllm/pull/43557) switches at
#   $1.75 \cdot 2^k$, our 7;
#   [ao#2035](https://github.com/pytorch/ao/issues/2035) proposes no clipping
#   as torchao's default. Their files decode alike.
# * Going back to MXFP4 after training, for which users asked in transformers
#   [#39969](https://github.com/huggingface/transformers/issues/39969) and
#   vLLM [#22380](https://github.com/vllm-project/vllm/issues/22380). Here
#   `encode` does it on any device, without a kernel package.

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
# and moves 2.3 times more. One token wants the third, and chapter 13 builds
# it.

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
# (`tests/test_mxfp4.py`).
#
# ## Takeaways
#
# * A weight is one of 15 values times a power of two shared by 32; decoding
#   is exact in bfloat16, so all loss happened when the file was written.
# * The low half of a byte is the even input. No shape tells when this is
#   wrong, only values do.
# * Re-encoding returns equal values always, equal bytes for canonical blocks,
#   and with the scales kept always equal bytes.

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
# ### Exercise 3
#
# Show that encoding is a projection: encoding what you decoded changes
# nothing more. Is that also true with the rule that doubles the scale
# above 6?

# %% tags=["hide-cell"]
once = decode(*encode(weights), torch.float64)
assert same_bits(decode(*encode(once), torch.float64), once)
# With the other rule too: after one pass the largest magnitude is a grid
# point. If it is 4 or 6 the scale stays; if rounding left it at 3 (from a
# value between 6 and 7 at half the scale), the OCP exponent is one smaller,
# the ratio is exactly 6, not above it, and all values are on that finer
# grid as well.
doubled = scale + (place > 6).to(torch.uint8)[:, None]
first = decode(*encode(weights, doubled), torch.float64)
assert same_bits(decode(*encode(first), torch.float64), first)
print("projections, both")

# %% [markdown]
# ### Exercise 4
#
# The block is a choice. Measure the error with one scale for 8, 16, 32, 64,
# 128, 256 weights, for Gaussian weights and for some with heavy tails
# (Student's t with 3 degrees of freedom). What are small blocks good for?

# %% tags=["hide-cell"]
def loss_by_block(flat, size):
    """Error of flat (n,) with one scale for `size` weights / variance."""
    chosen = _choose_scales(flat.view(-1, size).abs().amax(-1))
    exponent = chosen.repeat_interleave(size).int() - 127
    codes = _round_to_grid(torch.ldexp(flat.abs(), -exponent)).int()
    found = torch.ldexp(torch.tensor(FP4_VALUES).double()[codes], exponent)
    return ((found - flat.abs()).square().mean() / flat.var()).item()


flat = weights.flatten()
tails = flat / (torch.randn(3, len(flat)).double().square().mean(0)).sqrt()
print("weights a scale, bits, error Gaussian, error heavy tails")
for size in (8, 16, 32, 64, 128, 256):
    print(f"{size:4}  {4 + 8 / size:6.4g}  {loss_by_block(flat, size):.4f}"
          f"  {loss_by_block(tails, size):.4f}")
# Gaussian weights do not need small blocks at all: a larger block has a
# smaller share of weights in the wide gap between 4 and 6. Blocks contain
# outliers, and only heavy tails have those.

# %% [markdown]
# ### Exercise 5
#
# For each block, try the OCP exponent and its two neighbours and keep the
# best. How much does the search gain over the rule that switches at 7?

# %% tags=["hide-cell"]
losses = []
for shift in (-1, 0, 1):
    tried = (scale.int() + shift).to(torch.uint8)
    found = decode(*encode(weights, tried), torch.float64)
    losses.append((found - weights).square().mean(-1))
best = torch.stack(losses).amin(0).mean()
print(f"of the OCP rule's error, searching saves "
      f"{1 - best / floor.mean():.1%}, switching at 7 "
      f"{1 - even.mean() / floor.mean():.1%}")
assert best <= even.mean()

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
# * Scale rules: `pytorch/ao`, FLOOR, RCEIL, CEIL and EVEN of its
#   `ScaleCalculationMode` (`pytorch/ao#516`).
