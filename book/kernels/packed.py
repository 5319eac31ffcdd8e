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
# ---
# %% [markdown]
# # How are four bits multiplied without unpacking?
#
# ## Question
#
# How can weights of four bits be multiplied before anybody has made numbers of
# them? A token of the 20b meets 96 experts, 1.27 GB of packed bytes. If their
# weights went back to memory as bf16, 8.5 times as many bytes would pass
# ([the speed limit](roofline.ipynb)). They need not: one instruction looks up
# 32 of these four-bit codes at once, in a table that fits into a register, and
# the next one multiplies what was found.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import expert_size

plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
visits = big.num_hidden_layers * big.num_experts_per_tok
size = visits * expert_size(big) * 17 / 32
print(f"{visits} experts a token, {size / 1e9:.2f} GB packed, moved "
      f"{(17 / 32 + 4) / (17 / 32):.1f} times if decoded to memory")

# %% [markdown]
# ## Picture
#
# Here is the whole idea on eight weights, four bytes of the shipped model. A
# *nibble* is half a byte, a four-bit code. Under it stands $w$, twice the
# code's value, which is a whole number, and $w + 12$, which is never negative.
# Below are the activations they meet, as whole numbers $q$ of 16 bits, each
# written with two digits to the base 256.

# %% tags=["hide-input", "picture"]
# Figure: a table of eight columns. Rows: four bytes in hex, each over two
# columns; their nibbles; w; w + 12; q; its high and its low digit; the
# products of w + 12 with each digit. To the right of the products their sums,
# and below how they make the sum of w times q.
from pathlib import Path

import gptoss
from gptoss.weights.checkpoint import Checkpoint

with Checkpoint.open(Path(gptoss.__file__).parent / "pocket") as file:
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    weight_bytes = file.read(name)[0, 0, 0].numpy()  # 16 bytes: a block
    scale = int(file.read(name.replace("blocks", "scales"))[0, 0, 0])
TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
code = np.stack([weight_bytes & 15, weight_bytes >> 4], 1).reshape(32)
q = np.random.default_rng(0).integers(-9000, 9000, 32)
w, high = TWICE[code], (q + 128) >> 8
low = q - 256 * high
rows = [("nibble", [f"{c:X}" for c in code[:8]], "C4"),
        ("w", w[:8], "0.93"), ("w + 12", w[:8] + 12, "C4"),
        ("q", q[:8], "0.93"), ("high digit h", high[:8], "C1"),
        ("low digit l", low[:8], "C1"),
        ("(w + 12) h", (w[:8] + 12) * high[:8], "0.93"),
        ("(w + 12) l", (w[:8] + 12) * low[:8], "0.93")]
fig, ax = plt.subplots(figsize=(7.4, 3.6))
for n in range(4):
    ax.add_patch(plt.Rectangle((2 * n, 9), 2, 0.85, fc="C4", ec="white"))
    ax.text(2 * n + 1, 9.42, f"{weight_bytes[n]:02X}", ha="center",
            va="center", fontsize=9)
ax.text(-0.2, 9.42, "bytes", ha="right", va="center", fontsize=8)
for y, (name, values, color) in zip(range(8, 0, -1), rows, strict=True):
    ax.text(-0.2, y + 0.42, name, ha="right", va="center", fontsize=8)
    for n, value in enumerate(values):
        ax.add_patch(plt.Rectangle((n, y), 1, 0.85, fc=color, ec="white"))
        ax.text(n + 0.5, y + 0.42, str(value), ha="center", va="center",
                fontsize=8)
sums = [((w[:8] + 12) * digit[:8]).sum() for digit in (high, low)]
for y, total in zip((2, 1), sums, strict=True):
    ax.text(8.15, y + 0.42, f"sum {total}", va="center", fontsize=8)
ax.text(4, 0.3, f"256 × ({sums[0]}) + ({sums[1]}) - 12 × ({q[:8].sum()}) = "
        f"{(w[:8] * q[:8]).sum()} = the sum of w q", ha="center", fontsize=9)
ax.set(xlim=(-1.6, 9.8), ylim=(0, 10))
ax.axis("off")
plt.show()
assert 256 * sums[0] + sums[1] - 12 * q[:8].sum() == (w[:8] * q[:8]).sum()

# %% [markdown]
# What to see: the two rows of products are bytes times bytes, small enough for
# the fastest multiplication that the processor has. They are added up with
# nothing rounded, and one line at the end makes of their sums what we wanted.
# The low nibble of a byte comes first: it is the even element.

# %% [markdown]
# ## The naive version
#
# Decode in registers, to fp32, and multiply at once. Then arithmetic has to
# keep up with memory, and fp32 makes 8 products an instruction. The obvious
# remedy is to round the activations to 8 bits, as llama.cpp does, and multiply
# whole numbers: 32 products an instruction. It is fast. What does it cost?
# Rows of 2880 weights times activations in bf16, each block of 32 activations
# scaled to its largest, in 8 and in 16 bits, beside the one rounding to bf16
# that every result gets anyway:

# %%
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode


def rounded(x: torch.Tensor, largest: int) -> torch.Tensor:
    """x (…, 32 N), each block rounded to integers of that size and back."""
    parts = x.view(*x.shape[:-1], -1, 32)
    step = parts.abs().amax(-1, keepdim=True) / largest
    return ((parts / step).round() * step).view(x.shape)


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
blocks, scales = encode(0.02 * torch.randn(256, 2880))
weight = decode(blocks, scales, torch.float64)
x = torch.randn(64, 2880).bfloat16().double()
exact = x @ weight.T
errors = {"8 bits": off(rounded(x, 127) @ weight.T, exact),
          "result in bf16": off(exact.bfloat16().double(), exact),
          "16 bits": off(rounded(x, 32639) @ weight.T, exact)}
for name, error in errors.items():
    print(f"{name:15} {error:.1e}")
print(f"bf16 over 16 bits: {errors['result in bf16'] / errors['16 bits']:.0f}")
assert errors["8 bits"] > 3 * errors["result in bf16"]
assert errors["16 bits"] < errors["result in bf16"] / 50

# %% [markdown]
# Eight bits lose more than three times as much as the rounding that nobody can
# avoid; sixteen lose about an eightieth of it. So the kernels use sixteen bits
# and still multiply bytes: two for each activation.

# %% [markdown]
# ## Derivation
#
# ### One block by hand
#
# A block is 32 weights under one scale byte $s$; the picture showed eight.
# Take all 32, and activations as a layer gives them, in bf16. Four lines:

# %%
x_block = np.random.default_rng(1).standard_normal(32)
x_block = torch.tensor(x_block).bfloat16().double().numpy()
w = TWICE[np.stack([weight_bytes & 15, weight_bytes >> 4], 1).reshape(32)]
largest = np.abs(x_block).max()
step = 2.0 ** (np.floor(np.log2(largest)) - 13)  # a power of two
q = np.round(x_block / step).astype(int)  # whole numbers, at most 16320
high = (q + 128) >> 8  # digits to the base 256,
low = q - 256 * high  # both in -128 ... 127
whole = 256 * ((w + 12) * high).sum() + ((w + 12) * low).sum() - 12 * q.sum()
y = whole * 2.0 ** (scale - 127) * step / 2
print("w:", w[:6], " q:", q[:6])
print("digits:", high[:6], low[:6])
print(f"256 * {((w + 12) * high).sum()} + {((w + 12) * low).sum()} "
      f"- 12 * {q.sum()} = {whole}, the plain sum {(w * q).sum()}")
plain = (w / 2 * 2.0 ** (scale - 127) * x_block).sum()
print(f"times the scale and half the step: {y:.6f}, decoded first: "
      f"{plain:.6f}")
assert whole == (w * q).sum() and abs(y - plain) < 1e-4

# %% [markdown]
# ### Why it is right
#
# Let a block hold the values $v_i$ with scale $2^{s-127}$. Twice a value is a
# whole number: $v_i = w_i / 2$, $|w_i| \le 12$. Write its activations as $x_i
# = a\, q_i + \epsilon_i$, with whole numbers $|q_i| \le 32639$, a step $a$ and
# what rounding leaves, $|\epsilon_i| \le a/2$. Then
#
# $$ \sum_i 2^{s-127} v_i x_i
#    = 2^{s-127}\, \frac a2 \sum_i w_i q_i
#      + 2^{s-127} \sum_i v_i \epsilon_i . $$ (kernels-block)
#
# The sum of whole numbers is exact. The other one is the error, at most
#
# $$ \frac a2 \; 2^{s-127} \sum_i |v_i| . $$ (kernels-error)
#
# **Which step?** The finest is $a = \max_i |x_i| / 32639$, and what stands
# between the two layers of an expert, in fp32, gets that. But what enters the
# first was stored in bf16, eight significant bits a number. With
# $2^e \le \max_i |x_i| < 2^{e+1}$ take
#
# $$ a = 2^{e-13} : \quad |x_i| \ge 2^{e-6} \;\Rightarrow\; \epsilon_i = 0,
# $$ (kernels-step)
#
# since a bf16 number of size $2^{e-6}$ or more is a multiple of $2^{e-13}$.
# So every activation of at least 1/64 of the block's largest is kept exactly.
#
# **Why two digits?** An AVX2 instruction multiplies 8 pairs of fp32, 16 pairs
# of 16 bits, or 32 pairs of bytes. So $q_i = 256\, h_i + l_i$, both in $-128
# \dots 127$: $h_i$ is $q_i / 256$ rounded to the nearest, a half upwards, and
# $l_i$ is what that leaves, with its sign. The largest such number is
# $127 \cdot 256 + 127 = 32639$.
#
# **Why plus 12?** The instruction for bytes wants one factor without a sign.
# The table can hold $w_i + 12$ as well as $w_i$, and
#
# $$ \sum_i w_i q_i = 256 \sum_i (w_i + 12)\, h_i + \sum_i (w_i + 12)\, l_i
#    - 12 \sum_i q_i . $$ (kernels-digits)
#
# The last term does not depend on the weights: it is computed once a block of
# activations, and is what the sum of every row begins with.
#
# ### The whole product
#
# That is enough to multiply a packed matrix. This *twin* of the kernel, in
# numpy, is its definition for activations that are finite: tokens `x` (N, n),
# bytes (m, n/32, 16) and scales (m, n/32) give (N, m).

# %%
def packed_product(x, blocks, scales):
    """x (N, n) times the packed weight (m, n) transposed, float64."""
    code = np.stack([blocks & 15, blocks >> 4], -1)  # low nibble first
    above = (TWICE[code] + 12).reshape(len(blocks), -1, 32)
    parts = x.reshape(len(x), -1, 32)
    largest = np.abs(parts).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1)))
    step = 2.0 ** (exponent - 13)
    q = np.round(parts / step).astype(int)  # (N, blocks, 32)
    high = (q + 128) >> 8
    low = q - 256 * high
    whole = (256 * np.einsum("mbi,nbi->nmb", above, high)
             + np.einsum("mbi,nbi->nmb", above, low)
             - 12 * q.sum(-1)[:, None])
    power = np.where(scales == 255, np.nan, 2.0 ** (scales - 127.0))
    return (whole * power * step[:, None, :, 0] / 2).sum(-1)


few, some_x = weight[:8], x[:2]
y = packed_product(some_x.numpy(), blocks[:8].numpy(), scales[:8].numpy())
print(f"{y[0, 0]:.6f} and {y[1, 7]:.6f}, by the decoded weight "
      f"{(some_x @ few.T)[0, 0]:.6f} and {(some_x @ few.T)[1, 7]:.6f}")
assert off(torch.from_numpy(y), some_x @ few.T) < 1e-4

# %% [markdown]
# ## Code
#
# ### Which instructions does it take?
#
# Three, and each is a line of numpy. `pshufb` looks 32 indices up in a table
# of 16 bytes. `pmaddubsw` multiplies unsigned bytes by signed ones and adds
# two neighbours in 16 bits. `pmaddwd` does the same from 16 to 32 bits; times
# ones it only widens and adds, times 256 it puts the high digits where they
# belong. (In C++ they are called `_mm256_shuffle_epi8`, `_mm256_maddubs_epi16`
# and `_mm256_madd_epi16`.)

# %%
def pshufb(table, index):
    return table[index & 15]


def pmaddubsw(a, b):
    assert a.min() >= 0 and np.abs(b).max() <= 128
    pairs = (a * b).reshape(-1, 2).sum(1)
    assert np.abs(pairs).max() < 2 ** 15  # fits into 16 bits
    return pairs


def pmaddwd(a, b):
    return (a * b).reshape(-1, 2).sum(1)


ABOVE = TWICE + 12
even, odd = pshufb(ABOVE, weight_bytes), pshufb(ABOVE, weight_bytes >> 4)
q, digits = np.round(x_block / step).astype(int), {}
for unit, digit in ((256, (q + 128) >> 8),
                    (1, q - 256 * ((q + 128) >> 8))):
    digits[unit] = digit[0::2], digit[1::2]  # of even and of odd elements
sums = -12 * q.reshape(4, 8).sum(1)  # the offset: one for four bytes
for unit, (of_even, of_odd) in digits.items():
    two = pmaddubsw(even, of_even) + pmaddubsw(odd, of_odd)
    sums = sums + pmaddwd(two, np.full(8, unit))
print("four sums of eight weights:", sums, "together", sums.sum())
print("in 16 bits at most", 4 * 24 * 128, "of", 2 ** 15 - 1)
assert sums.sum() == whole

# %% [markdown]
# Each of the four sums is of four bytes, eight weights. No lane overflows: two
# products in 16 bits, even and odd added, are at most $4 \cdot 24 \cdot 128$.
#
# ### How do activations lie?
#
# As the sums want them: for each block the digits of its even elements and of
# its odd ones, and the offset for each four bytes. A register of AVX2 holds
# two blocks (`SIDE`), so a `Group` has the digits of two, side by side. It
# begins where one of the 64-byte lines of a cache begins (`alignas`), so that
# a register is loaded in one go. A `Line` holds a block's numbers of 16 bits,
# the even ones first, for where there is no AVX2 and for tiles.

# %% [markdown] tags=["export:digits.h"]
# ```cpp
# namespace {
#
# constexpr int64_t BLOCK = 32;
# #ifdef GPTOSS_AVX512
# constexpr int64_t SIDE = 4;  // blocks in a register
# #elif defined(GPTOSS_AVX2)
# constexpr int64_t SIDE = 2;
# #else
# constexpr int64_t SIDE = 1;
# #endif
# constexpr int64_t LANES = 4 * SIDE;  // 32-bit numbers in a register
#
# struct Line {
#   int16_t values[2][BLOCK / 2];  // a block's even elements, its odd ones
# };
#
# struct alignas(64) Group {
#   int8_t digits[2][2][SIDE][16];  // the high ones, the low ones; even, odd
#   int32_t offset[SIDE][4];        // -12 times the sum over four bytes
# };
#
# // rows of 16-bit integers, and for each block half the step between them
# struct Quantised {
#   int64_t blocks, per_row;  // groups: blocks / SIDE, rounded up
#   Array<Line> lines;
#   Array<Group> groups;
#   Buffer halves;  // a row of them is filled up to whole registers
#
#   // grouped: for products row by row, too
#   Quantised(int64_t rows, int64_t blocks, bool grouped = true)
#       : blocks(blocks), per_row((blocks + SIDE - 1) / SIDE),
#         lines(rows * blocks),
#         groups(SIDE > 1 && grouped ? rows * per_row : 0),
#         halves(rows * per_row * SIDE + LANES) {}
#
#   Line* line(int64_t n) { return &lines[n * blocks]; }
#   float* half(int64_t n) { return &halves[n * per_row * SIDE]; }
#   const Line* line(int64_t n) const { return &lines[n * blocks]; }
#   const float* half(int64_t n) const {
#     return &halves[n * per_row * SIDE];
#   }
# };
# ```

# %% [markdown]
# Now $q$ from $x$: the largest, the step, and rounding by adding 12582912,
# which is $1.5 \cdot 2^{23}$: a float of that size has no bits for a fraction,
# so the sum is rounded (a half to the even number, as `np.round` does), and
# its low bits are the whole number. An infinite or NaN activation makes the
# factor NaN (`odd`), so the result is NaN too. A block whose step is at most
# $10^{-37}$ counts as zeros, since one over that comes near the largest float.

# %% [markdown] tags=["export:digits.h"]
# ```cpp
# inline float largest(const Floats (&part)[4]) {
#   Floats top = {};
#   for (Floats x : part) {
#     Floats size = (Floats)((Ints)x & 0x7fffffff);
#     top = size > top ? size : top;
#   }
#   float found = 0;
#   for (int i = 0; i < 8; ++i) found = std::max(found, top[i]);
#   return found;
# }
#
# constexpr float STORED = 0, FINEST = 127 * 256 + 127;
#
# // the step between integers of which the largest is `most`; for what was
# // stored in bf16 a power of two: its largest is at most 255 * 2**6
# inline float step(float largest, float most) {
#   if (most != STORED) return largest / most;
#   const uint32_t exponent = load<uint32_t>(&largest) & 0x7f800000;
#   return load<float>(&exponent) / 8192;
# }
#
# using Reals = float __attribute__((vector_size(128)));  // of a block
# using Whole = int32_t __attribute__((vector_size(128)));
# using Shorts = int16_t __attribute__((vector_size(64)));
# using Digits = int8_t __attribute__((vector_size(32)));
#
# // q = 256 * high + low, both in -128 ... 127, for the block in that place
# inline void split(Shorts q, int64_t place, Group& to) {
#   const Digits digits[] = {__builtin_convertvector((q + 128) >> 8, Digits),
#                            __builtin_convertvector(q, Digits)};
#   for (int d = 0; d < 2; ++d)
#     for (int odd = 0; odd < 2; ++odd)
#       std::memcpy(to.digits[d][odd][place],
#                   reinterpret_cast<const char*>(&digits[d]) + 16 * odd, 16);
#   for (int i = 0; i < 16; ++i)
#     to.offset[place][i / 4] -= 12 * (q[i] + q[16 + i]);
# }
#
# // integers nearest to a block, and the step `size` between them
# inline Shorts nearest(const float* x, float most, float& size) {
#   Floats part[4], odd = {};
#   std::memcpy(part, x, sizeof part);
#   for (Floats v : part) odd += 0 * v;  // NaN if v is NaN or infinite
#   const float exact = step(largest(part), most);
#   const float up = exact > 1e-37f ? 1 / exact : 0;
#   size = exact + sum(odd);
#   // adding 1.5 * 2**23 leaves the nearest integer in the low bits
#   const auto all = (Whole)(load<Reals>(x) * up + 12582912.0f);
#   return __builtin_convertvector(all - 0x4b400000, Shorts);
# }
#
# void quantise(const float* x, float most, int64_t n, Quantised& to) {
#   for (int64_t b = 0; b < to.blocks; ++b, x += BLOCK) {
#     float size;
#     const Shorts near = nearest(x, most, size);
#     const Shorts q = __builtin_shufflevector(
#         near, near,
#         0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
#         1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#     std::memcpy(to.line(n)[b].values, &q, sizeof q);
#     to.half(n)[b] = size / 2;
#     if (!to.groups.empty())
#       split(q, b % SIDE, to.groups[n * to.per_row + b / SIDE]);
#   }
# }
#
# Quantised quantised(const float* x, float most, int64_t rows,
#                     int64_t blocks, bool grouped = true) {
#   Quantised q(rows, blocks, grouped);
#   at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
#     for (int64_t n = begin; n < end; ++n)
#       quantise(x + n * blocks * BLOCK, most, n, q);
#   });
#   return q;
# }
# ```

# %%
# how much does the power of two keep?
some = torch.randn(1000, 32).bfloat16().double()
top = some.abs().amax(-1, keepdim=True)
by_two = 2.0 ** (top.frexp().exponent - 14).double()
kept = (some / by_two).round() * by_two == some
finest = (rounded(some, 32639) == some).double().mean()
print(f"kept exactly: {kept.double().mean():.0%} with a power of two, "
      f"{finest:.0%} with the finest step")
assert kept[some.abs() >= top / 64].all() and (top / by_two <= 16320).all()

# %% [markdown]
# ### One row of weights, without vectors
#
# A scale byte is the exponent field of a float: shifted there it *is*
# $2^{s-127}$. Byte 0 means $2^{-127}$, a *subnormal* number with one bit set,
# and byte 255, infinity in a float, must become NaN. The portable loop is
# {eq}`kernels-block` as it stands, for `R` rows and `T` tokens.

# %% [markdown] tags=["export:digits.h"]
# ```cpp
# inline float power(uint8_t scale) {  // 2 ** (scale - 127); NaN for 255
#   // a scale byte is a float's exponent field; that of 0 is subnormal
#   const uint32_t bits = std::max(uint32_t(scale) << 23, 1u << 22);
#   const float value = load<float>(&bits);
#   return value + 0 * value;  // infinity becomes NaN
# }
#
# constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12,
#                               0, -1, -2, -3, -4, -6, -8, -12};
# ```

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# namespace {
#
# #if !defined(GPTOSS_AVX2) && !defined(GPTOSS_NEON)
# // out[t * width + r * step]: R rows of a weight, `step` rows apart, times T
# // rows of x, n[0] ... n[T - 1]
# template <int R, int T>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, const int64_t* n, float* out,
#                  int64_t width) {
#   for (int t = 0; t < T; ++t)
#     for (int r = 0; r < R; ++r) {
#       float& y = out[t * width + r * step] = 0;
#       for (int64_t b = 0; b < x.blocks; ++b) {
#         const int64_t at = r * step * x.blocks + b;
#         const auto& [even, odd] = x.line(n[t])[b].values;
#         int32_t s = 0;
#         for (int i = 0; i < 16; ++i)
#           s += TWICE[w[16 * at + i] & 15] * even[i]
#                + TWICE[w[16 * at + i] >> 4] * odd[i];
#         y += s * (power(scales[at]) * x.half(n[t])[b]);
#       }
#     }
# }
# #endif
# ```

# %% [markdown]
# ### Two blocks in a register
#
# `look_up`, `products` and `dots` are the three instructions in the order in
# which you have seen them. A mask stands before `pshufb`, which looks at more
# than four bits of an index. (With VNNI one instruction does the products:
# `add_bytes` of the [appendix](../cli/wide.ipynb).)

# %% [markdown] tags=["export:digits.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // TWICE + 12
#                                12, 11, 10, 9, 8, 6, 4, 0};
# using Sums = float __attribute__((vector_size(16 * SIDE)));
# using Words = int32_t __attribute__((vector_size(16 * SIDE)));
# using Pairs = uint16_t __attribute__((vector_size(16 * SIDE)));
# #endif
#
# }  // namespace
# ```

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# #ifndef GPTOSS_AVX512
# using Bytes = __m256i;
#
# inline Bytes table() {
#   return _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
# }
#
# inline Bytes look_up(Bytes values, Bytes nibbles) {
#   return _mm256_shuffle_epi8(
#       values, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
# }
# #endif
#
# struct Held {  // a group in registers, for all the rows that meet it
#   Bytes digits[2][2];
#   Words offset;
#   explicit Held(const Group& x) {
#     hold(offset = load<Words>(x.offset));
#     for (int i = 0; i < 4; ++i)
#       hold(digits[i / 2][i % 2] = load<Bytes>(x.digits[i / 2][i % 2]));
#   }
# };
#
# // sums + UNIT * (a times digits of even elements + b times those of odd)
# template <int UNIT>
# inline Words products(Words sums, Bytes a, Bytes b, const Bytes (&x)[2]) {
# #if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
#   if (UNIT == 1)
#     return (Words)add_bytes(add_bytes((Bytes)sums, a, x[0]), b, x[1]);
#   return sums + ((Words)add_bytes(add_bytes(Bytes{}, a, x[0]), b, x[1])
#                  << 8);
# #else
#   const Bytes two = _mm256_add_epi16(_mm256_maddubs_epi16(a, x[0]),
#                                      _mm256_maddubs_epi16(b, x[1]));
#   return sums + (Words)_mm256_madd_epi16(two, _mm256_set1_epi16(UNIT));
# #endif
# }
#
# // even, odd elements of SIDE blocks times a group; a lane: of four bytes
# inline Sums dots(Bytes a, Bytes b, const Held& x) {
#   const Words low = products<1>(x.offset, a, b, x.digits[1]);
#   return __builtin_convertvector(products<256>(low, a, b, x.digits[0]),
#                                  Sums);
# }
# ```

# %% [markdown]
# ### Where do the factors come from?
#
# Each block's sums are multiplied with its power of two times half its step.
# For eight blocks the factors are made in one register: scale bytes become
# exponents by a shift, as above, and meet half the steps. A group then needs
# its two factors, each in four lanes. Moving numbers between the halves of an
# AVX2 register is slow, so `arrange` puts the factors in such an order, 0 2 4
# 6 and 1 3 5 7, that a group's two are already in the right halves, and
# `spread` only repeats them. 90 blocks are no whole number of registers: what
# is missing of the scales is filled with 127, the scale 1, and what is missing
# of the weights with zeros. A scale byte 255 stays infinity here, to save an
# instruction; once a row, at its end, `y + 0 * y` makes NaN of it, and of a
# sum that outgrew fp32, too.

# %%
factors = np.arange(8)
arranged = factors[[0, 2, 4, 6, 1, 3, 5, 7]]
for g in range(4):  # group g: blocks 2 g and 2 g + 1
    print(g, np.repeat([arranged[g], arranged[4 + g]], 4).tolist())

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# #ifndef GPTOSS_AVX512
# // blocks 0, 2, 4, 6 and then 1, 3, 5, 7; more: others stand before them
# inline Words load_scales(const uint8_t* from, int64_t count, bool more) {
#   uint64_t eight = 0x7f7f7f7f7f7f7f7f;
#   if (count == LANES)
#     eight = load<uint64_t>(from);
#   else if (more)
#     eight = eight << 8 * count
#             | load<uint64_t>(from + count - LANES) >> 8 * (LANES - count);
#   else
#     for (int64_t i = count; i--;) eight = eight << 8 | from[i];
#   return (Words)_mm256_cvtepu8_epi32(_mm_shuffle_epi8(
#       _mm_cvtsi64_si128(eight), _mm_cvtsi64_si128(0x0705030106040200)));
# }
#
# inline Sums arrange(Sums v) {  // in the same order
#   return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
# }
#
# inline Bytes load_blocks(const uint8_t* from, int64_t count) {
#   return count < SIDE ? _mm256_zextsi128_si256(load<__m128i>(from))
#                       : load<Bytes>(from);
# }
#
# // number g of either half, in four lanes
# inline Sums spread(Sums factors, int g) {
#   return (Sums)_mm256_permutevar_ps((__m256)factors, _mm256_set1_epi32(g));
# }
# #endif
#
# // 2 ** (scale - 127) times half the step; infinity for 255
# inline Sums factors(Words scales, Sums halves) {
#   const Words bits = scales << 23;
#   const Words least = Words{} + (1 << 22);
#   return (Sums)(bits > least ? bits : least) * halves;
# }
# ```

# %% [markdown]
# ### Why four rows at once, far apart?
#
# A processor fetches ahead along a *stream* of addresses, to the end of a
# page of 4 KiB at most. With one stream everything waits at every page's end;
# with four the others go on. So four rows are read in turns, a quarter of the
# matrix apart. `ask_ahead` asks for what a row needs 2048 bytes later (1024
# with bf16 units, by measuring), into the second cache, since the first has
# few places for what is under way. `hold` keeps the compiler from reading
# anything twice.

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# // as above: a weight is looked up once for all T rows of x
# template <int R, int T>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, const int64_t* n, float* out,
#                  int64_t width) {
#   const Bytes values = table();
#   const int64_t blocks = x.blocks, row = step * blocks;
#   const Group* group[T];
#   for (int t = 0; t < T; ++t) group[t] = &x.groups[n[t] * x.per_row];
#   Sums total[R][T] = {}, factor[R][T];
#   auto make_factors = [&](int64_t b, int64_t count) INLINE {
#     for (int r = 0; r < R; ++r) {
#       ask(scales + r * row + b + NEAR / 16);
#       const Words scale = load_scales(scales + r * row + b, count, b > 0);
#       for (int t = 0; t < T; ++t)
#         factor[r][t] = factors(scale, arrange(load<Sums>(x.half(n[t]) + b)));
#     }
#   };
#   // group g from b on
#   auto add = [&](int64_t b, int g, int64_t count) INLINE {
#     Bytes even[R], odd[R];
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* at = w + 16 * (r * row + b + g * SIDE);
#       ask_ahead(at, NEAR);
#       Bytes bytes = load_blocks(at, count - g * SIDE);
#       hold(bytes);
#       even[r] = look_up(values, bytes);
#       odd[r] = look_up(values, (Bytes)((Pairs)bytes >> 4));
#     }
# #pragma GCC unroll 4
#     for (int t = 0; t < T; ++t) {
#       const Held x(group[t][g]);
# #pragma GCC unroll 4
#       for (int r = 0; r < R; ++r)
#         total[r][t] += dots(even[r], odd[r], x) * spread(factor[r][t], g);
#     }
#   };
#   int64_t b = 0;
#   for (; b + LANES <= blocks; b += LANES) {
#     make_factors(b, LANES);
# #pragma GCC unroll 4
#     for (int g = 0; g < 4; ++g) add(b, g, LANES);
#     for (int t = 0; t < T; ++t) group[t] += 4;
#   }
#   if (b < blocks) make_factors(b, blocks - b);
#   for (int g = 0; b + g * SIDE < blocks; ++g) add(b, g, blocks - b);
#   for (int t = 0; t < T; ++t)
#     for (int r = 0; r < R; ++r) {
#       const float y = sum(total[r][t]);
#       out[t * width + r * step] = y + 0 * y;  // infinity becomes NaN
#     }
# }
# #endif
# ```

# %% [markdown]
# ### The kernel as an operator
#
# A weight is a matrix, or one for each expert. When a few tokens meet it, up
# to four share each look-up: a weight is found once and multiplied with the
# digits of each. More go through the same rows group by group; of a piece of
# work they are still in the L2 cache. `T` must be known when the code is
# compiled, or the sums would not be registers: `with_count` makes such a
# constant of a number, `in_groups` cuts the tokens into groups. `packed_rows`
# is this alone, an operator that no model calls, by which you can try the
# kernel. It refuses x that is not bf16 and blocks that fit badly.

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# struct Packed {  // (E, rows, blocks, 16) bytes and (E, rows, blocks) scales
#   const uint8_t *bytes, *scales;
#   int64_t rows, blocks;
#
#   Packed(const Tensor& b, const Tensor& s)
#       : bytes(b.const_data_ptr<uint8_t>()),
#         scales(s.const_data_ptr<uint8_t>()), rows(s.size(-2)),
#         blocks(s.size(-1)) {}
# };
#
# template <int COUNT>
# using Count = std::integral_constant<int, COUNT>;
#
# // calls run(Count<count>()), 1 <= count <= MANY
# template <int MANY, class Run>
# inline void with_count(int64_t count, const Run& run) {
#   if constexpr (MANY > 1)
#     if (count < MANY) return with_count<MANY - 1>(count, run);
#   run(Count<MANY>());
# }
#
# // run(T, first token): N tokens in groups that are nearly alike, of at most
# // MANY tokens
# template <int MANY, class Run>
# inline void in_groups(int64_t N, const Run& run) {
#   for (int64_t t = 0, groups = (N + MANY - 1) / MANY; groups; --groups) {
#     const int64_t some = (N - t + groups - 1) / groups;
#     with_count<MANY>(some, [&](auto T) { run(T, t); });
#     t += some;
#   }
# }
#
# constexpr int SHARED = 4;  // tokens for which a weight is looked up once
#
# // out[i][0 ... rows - 1]: those rows times the token in inputs[i], by rows
# void rows_for_few(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                   const Quantised& x, std::span<const int64_t> inputs,
#                   float* out) {
#   const int64_t blocks = x.blocks, step = rows / 4;
#   auto run = [&](auto R, int64_t begin, int64_t end) {
#     in_groups<SHARED>(inputs.size(), [&](auto T, int64_t i) {
#       for (int64_t r = begin; r < end; ++r)
#         packed_dots<R.value, T.value>(
#             w + 16 * r * blocks, scales + r * blocks, step, x, &inputs[i],
#             out + i * rows + r, rows);
#     });
#   };
#   run(Count<4>(), 0, step);
#   run(Count<1>(), 4 * step, rows);
# }
#
# // y (N, m) fp32 = x (N, n) bf16 times the weight transposed, row by row
# Tensor packed_rows(const Tensor& x, const Tensor& blocks,
#                    const Tensor& scales) {
#   TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed({blocks, scales})
#                   && x.dim() == 2 && scales.dim() == 2
#                   && x.size(1) == scales.size(1) * BLOCK
#                   && has(blocks, {scales.size(0), scales.size(1), 16}),
#               "packed_rows: expected bfloat16 x (N, n), bytes (m, n / 32, "
#               "16) and (m, n / 32), found ", x.sizes(), ", ",
#               blocks.sizes(), ", ", scales.sizes());
#   const Packed weight(blocks, scales);
#   const int64_t N = x.size(0);
#   std::vector<int64_t> inputs(N);
#   for (int64_t i = 0; i < N; ++i) inputs[i] = i;
#   Tensor y = at::empty({N, weight.rows}, at::kFloat);
#   rows_for_few(weight.bytes, weight.scales, weight.rows,
#                quantised(floats(x).data(), STORED, N, weight.blocks), inputs,
#                y.data_ptr<float>());
#   return y;
# }
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.def("packed_rows(Tensor x, Tensor blocks, Tensor scales) -> Tensor");
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) { m.impl("packed_rows", packed_rows); }
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# Kernel and twin against the plain product of decoded weights. Both are off by
# the same rounding of the activations, and by nothing else that shows.
# (Without a compiler the twin stands in for the kernel.)

# %%
from gptoss.kernels.build import load_upto


def twin(x, blocks, scales):
    return torch.from_numpy(packed_product(
        x.double().numpy(), blocks.numpy(), scales.numpy()))


packed_rows = (torch.ops.gptoss.packed_rows if load_upto("packed")
               else twin)

for rows, columns in ((1, 32), (7, 96), (40, 64), (6, 544), (64, 2880)):
    packed = encode(0.02 * torch.randn(rows, columns))
    x = torch.randn(3, columns).bfloat16()
    exact = x.double() @ decode(*packed, torch.float64).T
    kernel = packed_rows(x, *packed).double()
    print(f"({rows}, {columns})".ljust(10), f"kernel {off(kernel, exact):.1e}"
          f" from the plain product, twin {off(twin(x, *packed), exact):.1e}")
    assert off(kernel, twin(x, *packed)) < 2e-6
    assert off(twin(x, *packed), exact) < 1e-4

# %% [markdown]
# **Scales at both ends**, and what is no number:

# %%
ends = torch.full((3, 1, 16), 0x22, dtype=torch.uint8)  # ones
ends_scale = torch.tensor([[0], [127], [255]], dtype=torch.uint8)
one = torch.ones(1, 32).bfloat16()
kernel = packed_rows(one, ends, ends_scale)[0]
print([f"{y:.3e}" for y in kernel.tolist()], f"{32 * 2.0 ** -127:.3e}")
assert kernel[2].isnan() and kernel[0] == 32 * 2.0 ** -127
if packed_rows is not twin:
    assert packed_rows(one / 0, ends, ends_scale).isnan().all()

# %% [markdown]
# ## Takeaways
#
# - Sixteen codes are a table in a register: decoding is a lookup that touches
#   no memory, and four-bit weights are as cheap to use as to read.
# - Activations in sixteen bits lose an eightieth of what rounding the result
#   to bf16 loses; in eight bits, more than three times as much as it.
# - Two digits to the base 256 let the instruction for bytes multiply sixteen
#   bits; an offset of 12 gives it the factor without a sign.
# - Four rows far apart are four streams of memory: one waits, three go on.
#
# ## Exercises
#
# ### Exercise 1
#
# An activation of 1000 stands among 31 of size 1, and its weight is zero. How
# wrong can the product be, with the finest step? Check {eq}`kernels-error`.

# %% tags=["hide-cell"]
block, weights = torch.randn(32).double(), torch.ones(32).double()
block[7], weights[7] = 1000, 0
error = (rounded(block[None], 32639)[0] - block) @ weights
bound = 1000 / 65278 * weights.abs().sum()
print(f"off by {error.abs().item():.2f}, bound {bound.item():.2f}: at worst "
      "half of one activation")
assert error.abs() <= bound

# %% [markdown]
# ### Exercise 2
#
# In `dots` a lane sums four bytes' products. Why does no sum overflow 32 bits,
# and fp32, which holds whole numbers up to $2^{24}$, lose nothing? In tiles of
# [many rows](many_rows.ipynb) a lane sums a block: when would that round?

# %% tags=["hide-cell"]
largest_sum = 256 * 8 * 24 * 128 + 8 * 24 * 128 + 12 * 8 * 32639
print(f"on the way at most {largest_sum:,} of {2 ** 31 - 1:,}")
print(f"at the end {8 * 12 * 32639:,} of {2 ** 24:,}")
for bits in (16, 17):
    print(f"a whole block, {bits} bits: {32 * 12 * (2 ** (bits - 1) - 1):,}")
assert 32 * 12 * (2 ** 15 - 1) < 2 ** 24 < 32 * 12 * (2 ** 16 - 1)

# %% [markdown]
# ### Exercise 3
#
# One digit, $-127 \dots 127$, is quicker. Is its error that of the table?

# %% tags=["hide-cell"]
x = torch.randn(64, 2880).bfloat16().double()
print(f"one digit: {off(rounded(x, 127) @ weight.T, x @ weight.T):.1e} from "
      f"the exact product, {errors['8 bits']:.1e} in the table")

# %% [markdown]
# ## Sources
#
# - MXFP4: {cite}`ocpmx2023`.
# - llama.cpp, `ggml/src/ggml-cpu/`: MXFP4 times bytes by the same look-up.
# - https://www.intel.com/content/www/us/en/docs/intrinsics-guide
