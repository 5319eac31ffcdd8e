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
# two weights each went back to memory as bf16, 8.5 times as many bytes would
# pass ([the speed limit](roofline.ipynb)). They need not: sixteen codes fit
# into a register, where one instruction looks up 32 nibbles at once, and what
# it finds can be multiplied as it is.

# %% [markdown]
# ## The naive version
#
# So decode in registers and multiply at once. But then the arithmetic has to
# keep up with memory, and fp32 makes only 8 products an instruction. The
# obvious remedy is to round the activations to 8 bits, as llama.cpp does, and
# multiply integers: 32 products an instruction. It is fast. What does it
# cost? Rows of 2880 weights times activations in bf16, each block of 32
# activations scaled to its largest, in 8 and in 16 bits, beside the one
# rounding to bf16 that every result gets anyway:

# %%
import torch

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
assert errors["8 bits"] > 3 * errors["result in bf16"]
assert errors["16 bits"] < errors["result in bf16"] / 50

# %% [markdown]
# Eight bits lose three times as much as the rounding that nobody can avoid;
# sixteen lose about an eightieth of it. So the kernels use sixteen bits, and
# still multiply bytes: two for each activation.

# %% [markdown]
# ## Derivation
#
# **One block.** Let a block hold 32 FP4 values $v_i$ and the scale
# $2^{s-127}$. Twice a value is an integer: $v_i = w_i / 2$, $|w_i| \le 12$.
# Write the block's activations as $x_i = a\, q_i + \epsilon_i$ with integers
# $|q_i| \le Q = 32639$ and a step $a$. Then
#
# $$ \sum_i 2^{s-127} v_i x_i
#    = 2^{s-127}\, \frac a2 \sum_i w_i q_i
#      + 2^{s-127} \sum_i v_i \epsilon_i . $$ (kernels-block)
#
# The integer sum is exact: a term is at most $12\, Q$, so all 32 stay
# below $1.3 \cdot 10^7$, far inside 32 bits and even inside the 24 bits that
# a float holds exactly. Weights lose nothing; the only error is
# $|\epsilon_i| \le a/2$, so a block is off by at most
#
# $$ \frac a2 \; 2^{s-127} \sum_i |v_i| . $$ (kernels-error)
#
# **Which step?** The finest is $a = \max_i |x_i| / Q$; what stands
# between the two layers of an expert, in fp32, gets that. But what enters the
# first was stored in bf16, eight significant bits a number. With
# $2^e \le \max_i |x_i| < 2^{e+1}$ take
#
# $$ a = 2^{e-13} : \quad |x_i| \ge 2^{e-6} \;\Rightarrow\; \epsilon_i = 0,
# $$ (kernels-step)
#
# since a bf16 number of size $2^{e-6}$ or more is a multiple of $2^{e-13}$.
# Every activation of at least 1/64 of the block's largest is kept exactly,
# and the few others are off by at most $2^{-14}$ of it. With either step an
# outlier costs its 31 neighbours precision: the step follows the largest.
#
# **Why bytes.** AVX2, a set of vector instructions of x86 processors, works on
# registers of 32 bytes. A multiply-add for fp32 makes 8
# products in 32 bytes, one for 16-bit integers 16, one for bytes 32. A table
# of 16 bytes fits in a register, where `pshufb` looks up 32 nibbles at once:
# decoding touches no memory, and its results are bytes. Widened to 16 bits
# they would cost as many instructions again as the lookups. So split the
# activations instead, once for all rows, into two digits to the base 256:
# $q_i = 256\, h_i + l_i$, both in $-128 \dots 127$, which is why $Q = 127
# \cdot 256 + 127$. The instruction for bytes wants one factor without a sign.
# The table can hold $w_i + 12$ as well as $w_i$; then
#
# $$ \sum_i w_i q_i = 256 \sum_i (w_i + 12)\, h_i + \sum_i (w_i + 12)\, l_i
#    - 12 \sum_i q_i , $$ (kernels-digits)
#
# where the last term does not depend on the weights: it is computed once a
# block and is what the sum begins with.

# One product by hand: a block whose weights are all 1.5, and one activation of
# 97/128 among zeros.

# %%
a = 2.0 ** -1 / 2 ** 13  # the step: 97/128 lies between 2**-1 and 1
w, q = int(2 * 1.5), round(97 / 128 / a)
high, low = (q + 128) >> 8, (q + 128) % 256 - 128
sums = 256 * (w + 12) * high + (w + 12) * low - 12 * q
print(f"q = {q} = 256 * {high} + {low}, integer sum {sums}, "
      f"times a / 2: {sums * a / 2}")
assert sums * a / 2 == 1.5 * 97 / 128 and 32 * 12 * 32639 < 2 ** 24

# %% [markdown]
# ## Code
#
# ### Sixteen bits for an activation
#
# {eq}`kernels-block` in code. A byte of weights holds an even element in its
# low nibble and the odd one behind it in the high nibble, so of each block the
# even activations are stored first, then the odd ones. So much for one block
# at a time (`lines`).
#
# The product for x86 takes as many blocks as a register of bytes holds: `SIDE`
# says how many, two in 256 bits, four in the 512 of the
# [appendix](../cli/wide.ipynb). A `Group` is what it needs for
# them: the two digits of {eq}`kernels-digits`, byte beside byte as the weights
# lie, and the offset, a number for each four bytes. A register of 64 bytes
# that lies across two cache lines is loaded in two turns, so a group begins on
# one.

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
#   std::vector<Line> lines;
#   std::vector<Group> groups;
#   Buffer halves;  // a row of them is filled up to whole registers
#
#   Quantised(int64_t rows, int64_t blocks)
#       : blocks(blocks), per_row((blocks + SIDE - 1) / SIDE),
#         lines(rows * blocks), groups(SIDE > 1 ? rows * per_row : 0),
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
# An infinite or NaN activation makes the factor NaN, so the result is NaN too.
# A block whose largest activation is below about $3 \cdot 10^{-33}$ counts as
# zeros, since one over its step comes near the largest float.

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
# constexpr float MOST = 127 * 256 + 127;
#
# // the step between integers: a power of two for what was stored in bf16,
# // whose largest is then at most 255 * 2**6; otherwise the finest
# inline float step(float largest, bool stored) {
#   if (!stored) return largest / MOST;
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
# void quantise(const float* x, bool stored, int64_t n, Quantised& to) {
#   for (int64_t b = 0; b < to.blocks; ++b, x += BLOCK) {
#     Floats part[4], odd = {};
#     for (int i = 0; i < 4; ++i) {
#       part[i] = load<Floats>(x + 8 * i);
#       odd += 0 * part[i];  // NaN if one of them is NaN or infinite
#     }
#     const float scale = step(largest(part), stored);
#     const float up = scale > 1e-37f ? 1 / scale : 0;
#     // adding 1.5 * 2**23 leaves the nearest integer in the low bits
#     const auto all = (Whole)(load<Reals>(x) * up + 12582912.0f);
#     const Shorts near = __builtin_convertvector(all - 0x4b400000, Shorts);
#     const Shorts q = __builtin_shufflevector(
#         near, near,
#         0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
#         1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#     std::memcpy(to.line(n)[b].values, &q, sizeof q);
#     to.half(n)[b] = scale / 2 + sum(odd);
#     if (SIDE > 1) split(q, b % SIDE, to.groups[n * to.per_row + b / SIDE]);
#   }
# }
#
# Quantised quantised(const Buffer& x, bool stored, int64_t rows,
#                     int64_t blocks) {
#   Quantised q(rows, blocks);
#   at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
#     for (int64_t n = begin; n < end; ++n)
#       quantise(&x[n * blocks * BLOCK], stored, n, q);
#   });
#   return q;
# }
# ```

# %% [markdown]
# The same in torch, to look at: how many of a block's activations
# {eq}`kernels-step` keeps exactly, and the digits of every integer.

# %%
some = torch.randn(1000, 32).bfloat16().double()
top = some.abs().amax(-1, keepdim=True)
step = 2.0 ** (top.frexp().exponent - 14).double()
kept = (some / step).round() * step == some
assert kept[some.abs() >= top / 64].all() and (top / step <= 16320).all()
finest = rounded(some, 32639) == some
print(f"kept: {kept.double().mean():.0%} with a power of two, "
      f"{finest.double().mean():.0%} with the finest step")
q = torch.arange(-32639, 32640)
high, low = (q + 128) >> 8, (q + 128) % 256 - 128
assert torch.equal(256 * high + low, q)
assert max(high.abs().max(), low.max(), -1 - low.min()) <= 127
q = torch.tensor([5, -300, 32639])
print([(h, low) for h, low in zip(((q + 128) >> 8).tolist(),
                                  ((q + 128) % 256 - 128).tolist(),
                                  strict=True)])

# %% [markdown]
# ### One row of four-bit weights
#
# First the portable loop. A scale byte is the exponent field of a float: put
# in its place it *is* $2^{s-127}$. Byte 0 means $2^{-127}$, a subnormal number
# with one bit set, and byte 255, infinity in a float, must become NaN.

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
# // out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
# template <int R>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, int64_t n, float* out) {
#   for (int r = 0; r < R; ++r, out += step) {
#     *out = 0;
#     for (int64_t b = 0; b < x.blocks; ++b) {
#       const int64_t at = r * step * x.blocks + b;
#       const auto& [even, odd] = x.line(n)[b].values;
#       int32_t s = 0;
#       for (int i = 0; i < 16; ++i)
#         s += TWICE[w[16 * at + i] & 15] * even[i]
#              + TWICE[w[16 * at + i] >> 4] * odd[i];
#       *out += s * (power(scales[at]) * x.half(n)[b]);
#     }
#   }
# }
# #endif
# ```

# %% [markdown]
# The same two lines in torch, for all 256 bytes, against the decoder of
# [MXFP4](../weights/mxfp4.ipynb):

# %%
byte = torch.arange(256, dtype=torch.int32)
bits = (byte << 23).clamp_min(1 << 22).view(torch.float32)
power = bits + 0 * bits
ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # the code of 1.0
by_decoder = decode(ones, byte[:, None].to(torch.uint8), torch.float32)[:, 0]
assert torch.equal(power.nan_to_num(), by_decoder.nan_to_num())
print(power[0].item() == 2.0 ** -127, power[255].isnan().item())

# %% [markdown]
# The centre of the chapter: the digits of {eq}`kernels-digits`. A shift by 4
# brings the high nibbles down, and two lookups make of the bytes the numbers
# $w_i + 12$ of the even elements and those of the odd ones. `pshufb` needs a
# mask before it, as it looks at more than four bits of an index.
#
# Then come the products. AVX2 multiplies unsigned bytes by signed ones and
# adds two neighbours in 16 bits; the odd elements are added to the even ones,
# at most $4 \cdot 24 \cdot 128 = 12288$, and then `pmaddwd` widens, by ones
# for the low digits, by 256 for the high ones. (Processors with VNNI have one
# instruction for all this, `add_bytes` in the appendix.)

# %% [markdown] tags=["export:digits.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // TWICE + 12
#                                12, 11, 10, 9, 8, 6, 4, 0};
# using Sums = float __attribute__((vector_size(16 * SIDE)));
# using Words = int32_t __attribute__((vector_size(16 * SIDE)));
# using Pairs = uint16_t __attribute__((vector_size(16 * SIDE)));
# using Digit = int8_t[2][SIDE][16];  // of even elements, of odd ones
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
# // sums + UNIT * (a times digits of even elements, b times those of odd
# // ones, of four neighbours each); UNIT: 1 or 256
# template <int UNIT>
# inline Words products(Words sums, Bytes a, Bytes b, const Digit& x) {
# #if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
#   if (UNIT == 1)
#     return (Words)add_bytes(add_bytes((Bytes)sums, a, x[0]), b, x[1]);
#   return sums + ((Words)add_bytes(add_bytes(Bytes{}, a, x[0]), b, x[1])
#                  << 8);
# #else
#   const Bytes two = _mm256_add_epi16(
#       _mm256_maddubs_epi16(a, load<Bytes>(x[0])),
#       _mm256_maddubs_epi16(b, load<Bytes>(x[1])));
#   return sums + (Words)_mm256_madd_epi16(two, _mm256_set1_epi16(UNIT));
# #endif
# }
#
# // SIDE blocks of weights times a group: a lane sums what four bytes give
# inline Sums dots(Bytes bytes, const Group& x, Bytes values) {
#   const Bytes a = look_up(values, bytes);
#   const Bytes b = look_up(values, (Bytes)((Pairs)bytes >> 4));
#   const Words low = products<1>(load<Words>(x.offset), a, b, x.digits[1]);
#   return __builtin_convertvector(products<256>(low, a, b, x.digits[0]),
#                                  Sums);
# }
# ```

# %% [markdown]
# One conversion and one multiply-add serve `SIDE` blocks, and want the blocks'
# factors, each in four lanes. They are made in registers, `LANES` blocks at a
# time: the scale bytes become exponents by a shift, are multiplied by half the
# steps, and one permutation for each group puts them where they are needed. An
# AVX2 instruction that moves numbers between the two halves of a register is
# slow (on a Zen 3, 2.5 times as slow as one that does not), so the factors
# stand in such an order (`arrange`) that a group's two are already in the
# right halves. Byte 255 gives infinity, which the row's end turns into NaN: $y
# + 0 y$.
#
# 90 blocks are no whole number of registers. What is missing of the scales is
# filled up with 127, the scale 1, and what is missing of the weights with
# zeros; both meet activations that are zero. AVX2 has no loads under a mask
# for bytes: it reads the row's last eight scales and shifts away those it has
# had already; only a row of fewer than eight blocks is gathered scale by
# scale. Filled up with zeros the scales would be $2^{-127}$, and a processor
# takes its time with a subnormal number: so written, the whole product took
# 7 % longer (one thread, weights in the L1 cache).

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
# Of the rows, four are read at the same time, and not neighbours but rows far
# apart. Processors fetch ahead along a stream of addresses, each stream for
# itself and only to the end of a 4 KiB page: with one stream everything waits
# at every page, with four the others go on. The prefetch asks for the bytes
# that the same row needs a quarter of a KiB later. `hold` keeps the compiler
# from reading a row's bytes again for their second use. The four groups of
# `LANES` blocks are written out one after the other: there `count` is known,
# whole registers are loaded without a question, and each permutation is a
# constant.

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# // out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
# template <int R>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, int64_t n, float* out) {
#   const Bytes values = table();
#   const int64_t blocks = x.blocks, row = step * blocks;
#   const Group* group = &x.groups[n * x.per_row];
#   const float* halves = x.half(n);
#   Sums total[R] = {}, factor[R];
#   auto make_factors = [&](int64_t b, int64_t count) {
#     const Sums half = arrange(load<Sums>(halves + b));
#     for (int r = 0; r < R; ++r)
#       factor[r] = factors(load_scales(scales + r * row + b, count, b > 0),
#                           half);
#   };
#   auto add = [&](int64_t b, int g, int64_t count) {  // group g from b on
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* at = w + 16 * (r * row + b + g * SIDE);
#       __builtin_prefetch(at + 256);
#       Bytes bytes = load_blocks(at, count - g * SIDE);
#       hold(bytes);
#       total[r] += dots(bytes, group[g], values) * spread(factor[r], g);
#     }
#   };
#   int64_t b = 0;
#   for (; b + LANES <= blocks; b += LANES, group += 4) {
#     make_factors(b, LANES);
# #pragma GCC unroll 4
#     for (int g = 0; g < 4; ++g) add(b, g, LANES);
#   }
#   if (b < blocks) make_factors(b, blocks - b);
#   for (int g = 0; b + g * SIDE < blocks; ++g) add(b, g, blocks - b);
#   for (int r = 0; r < R; ++r) {
#     const float y = sum(total[r]);
#     out[r * step] = y + 0 * y;  // infinity becomes NaN
#   }
# }
# #endif
# ```

# %% [markdown]
# ### Rows for a few tokens
#
# A weight is a matrix, or one for each expert.

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
# ```

# %% [markdown]
# When a few tokens meet the same rows, row by row is the way, since the rows
# just read are still in the L1 cache when the next token wants them. `step`
# rows apart are a quarter of them all. `packed_rows` is this alone: an
# operator that no model calls, by which the chapter can try its kernel.
# [Many tokens](many_rows.ipynb) and the operators of the model come next.

# %% [markdown] tags=["export:packed.h"]
# ```cpp
# // out[i][0 ... rows - 1]: those rows times the token in inputs[i], by rows
# void rows_for_few(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                   const Quantised& x, const std::vector<int64_t>& inputs,
#                   float* out) {
#   const int64_t blocks = x.blocks, step = rows / 4;
#   auto run = [&](auto dots, int64_t r) {
#     for (size_t i = 0; i < inputs.size(); ++i)
#       dots(w + 16 * r * blocks, scales + r * blocks, step, x, inputs[i],
#            out + i * rows + r);
#   };
#   for (int64_t r = 0; r < step; ++r) run(packed_dots<4>, r);
#   for (int64_t r = 4 * step; r < rows; ++r) run(packed_dots<1>, r);
# }
#
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
#                quantised(floats(x), true, N, weight.blocks), inputs,
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
# The twin in torch computes the same integers by {eq}`kernels-digits`, exactly
# in float64. Both are compared with the plain product of decoded weights: they
# are off by the same rounding of the activations and by nothing else that
# shows. (Without a compiler the twin stands in for the kernel.)

# %%
import logging
import os

from gptoss.kernels.build import PARTS, KernelError, build

TABLE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12,
                      0, -1, -2, -3, -4, -6, -8, -12])


def by_integers(x, blocks, scales):
    """x (N, n) times the packed weight (m, n) transposed, float64."""
    code = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    w = (TABLE[code] + 12).double()  # (m, blocks, 32)
    parts = x.double().view(len(x), -1, 32)
    top = parts.abs().amax(-1, keepdim=True)
    step = 2.0 ** (top.frexp().exponent - 14).double()
    q = (parts / step).round().long()  # (N, blocks, 32)
    high, low = (q + 128) >> 8, (q + 128) % 256 - 128
    sums = [torch.einsum("mbi,nbi->nmb", w, digit.double())
            for digit in (high, low)]
    whole = 256 * sums[0] + sums[1] - 12 * q.sum(-1)[:, None]
    power = 2.0 ** (scales.double() - 127)
    return (whole * power * step[..., 0][:, None] / 2).sum(-1)


os.environ["GPTOSS_KERNELS"] = "torch"  # one library a process: this one
logging.getLogger("gptoss").setLevel(logging.ERROR)  # built without a word
try:
    upto = PARTS[:PARTS.index("packed") + 1]
    torch.ops.load_library(str(build(parts=upto)))
    packed_rows = torch.ops.gptoss.packed_rows
except KernelError:
    packed_rows = by_integers

for rows, columns in ((1, 32), (7, 96), (40, 64), (6, 544), (64, 2880)):
    packed = encode(0.02 * torch.randn(rows, columns))
    x = torch.randn(3, columns).bfloat16()
    exact = x.double() @ decode(*packed, torch.float64).T
    kernel, twin = packed_rows(x, *packed).double(), by_integers(x, *packed)
    print(f"({rows}, {columns})".ljust(10), f"kernel {off(kernel, exact):.1e}"
          f" from the plain product, twin {off(twin, exact):.1e}")
    assert off(kernel, twin) < 2e-6 and off(twin, exact) < 1e-4

# %% [markdown]
# **Scales at both ends** and numbers that are none go the way of the decoder:

# %%
ends = torch.full((3, 1, 16), 0x22, dtype=torch.uint8)  # ones
scale = torch.tensor([[0], [127], [255]], dtype=torch.uint8)
one = torch.ones(1, 32).bfloat16()
print(packed_rows(one, ends, scale)[0].tolist(), 32 * 2.0 ** -127)
endless = packed_rows(one / 0, ends, scale)
assert packed_rows(one, ends, scale)[0, 2].isnan() and endless.isnan().all()

# %% [markdown]
# ## Takeaways
#
# - Sixteen codes are a table in a register: decoding is a lookup that touches
#   no memory, and four-bit weights are as cheap to use as to read.
# - Activations in sixteen bits lose about an eightieth of what rounding the
#   result to bf16 loses; in eight bits, three times as much as it.
# - Two digits to the base 256 let the instruction for bytes multiply sixteen
#   bits; an offset of 12 gives it the factor without a sign.
# - Four rows far apart are four streams of memory, so that no page's end makes
#   everything wait.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# An activation of 1000 stands among 31 of size 1, and its weight is zero.
# How wrong can the block's product be in units of the others' own size, with
# the finest step? Check the bound {eq}`kernels-error` numerically.

# %% tags=["hide-cell"]
block = torch.randn(32, dtype=torch.float64)
block[7] = 1000.0
weights = torch.full((32,), 1.0, dtype=torch.float64)
weights[7] = 0
error = (rounded(block[None], 32639)[0] - block) @ weights
bound = 1000 / 65278 * weights.abs().sum()
assert error.abs() <= bound
print(f"bound {bound.item():.2f}, so up to half of one activation")

# %% [markdown]
# ### Exercise 2
#
# In `dots` a lane sums four bytes' products, of numbers up to 24 and digits up
# to 128 in size. Why does no sum overflow 32 bits, and why does its conversion
# to fp32 lose nothing? In the tiles of [many rows](many_rows.ipynb) one lane
# sums a whole block. From which width of activations on would that conversion
# round?

# %% tags=["hide-cell"]
digits = 8 * 24 * 128  # four bytes are eight weights
assert 256 * digits + digits + 12 * 8 * 32639 < 2 ** 31  # no overflow
lane = 8 * 12 * 32639  # what remains at the end: weights times activations
assert lane < 2 ** 24  # every whole number up to it is a float


def exact_in_a_tile(bits: int) -> bool:
    return 32 * 12 * (2 ** (bits - 1) - 1) <= 2 ** 24


assert exact_in_a_tile(16) and not exact_in_a_tile(17)
print("from 17 bits on")

# %% [markdown]
# ### Exercise 3
#
# Why not write the table's instruction for signed factors and save the offset?
# Suppose that both factors had a sign, $w_i$ in $-12 \dots 12$ and digits in
# $-128 \dots 127$. How large can the sum of four products in 16 bits become,
# with and without the offset?

# %% tags=["hide-cell"]
print("without", 4 * 12 * 128, "with", 4 * 24 * 128, "of", 2 ** 15 - 1)
assert 4 * 24 * 128 < 2 ** 15  # there is room for it: the offset is free

# %% [markdown]
# ## Sources
#
# - MXFP4: {cite}`ocpmx2023`.
# - llama.cpp, `ggml/src/ggml-cpu/`: MXFP4 times 8-bit activations with the
#   same lookup instruction.
# - Instructions of x86:
#   https://www.intel.com/content/www/us/en/docs/intrinsics-guide
