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
# # Wider registers: AVX-512, VNNI and NEON
#
# ## Question
#
# The kernels of the book are written for AVX2. What do a processor's other
# instructions change? A few lines each of [packed](../kernels/packed.ipynb),
# [dense](../kernels/dense.ipynb), [twelve
# bits](../kernels/twelve_bits.ipynb) and
# [attention](../kernels/attending.ipynb). Those lines stand here; everything
# else is the same text.
#
# | | AVX2 | AVX-512 | NEON (ARM) |
# |---|---|---|---|
# | bytes in a register | 32 | 64 | 16 |
# | registers | 16 | 32 | 32 |
# | blocks of weights in one | 2 | 4 | 1 |
# | looking up nibbles | mask, `pshufb` | `vpermb` | `tbl` |
# | bytes times bytes | 3 instructions | `vpdpbusd` | 16 bits: `smlal` |
# | products of bf16 | shift, mask, fp32 | `vdpbf16ps` | shift, mask, fp32 |
#
# `base.h` defines `GPTOSS_AVX512`, `GPTOSS_BF16`, `GPTOSS_VNNI` or
# `GPTOSS_NEON` by what the compiler says of the processor at hand; where none
# is defined, this appendix compiles to nothing.

# %% [markdown]
# ## Bytes: what do VNNI and AVX-512 save?
#
# `pshufb` needs a mask before it, as it looks at more than four bits of an
# index. `vpermb` looks at six: with the table in the register four times over,
# the two bits of the neighbour do not matter, and no mask is needed.
# `vpdpbusd` multiplies unsigned bytes by signed ones and adds four neighbours
# to a 32-bit sum, which takes AVX2 three instructions. In numpy:

# %%
import numpy as np

ABOVE = np.array([12, 13, 14, 15, 16, 18, 20, 24,  # twice the value of a code,
                  12, 11, 10, 9, 8, 6, 4, 0])      # plus 12


def vpermb(values, indices):
    return values[indices & 63]


def vpdpbusd(sums, a, b):
    """a: unsigned bytes, b: signed ones; four products a sum."""
    return sums + (a.astype(int) * b).reshape(-1, 4).sum(1)


draw = np.random.default_rng(0)
packed, digits = draw.integers(256, size=64), draw.integers(-128, 128, 64)
four = np.tile(ABOVE, 4)
assert (vpermb(four, packed) == ABOVE[packed & 15]).all()
sums = vpdpbusd(np.zeros(16, int), vpermb(four, packed), digits)
print(sums[:4].tolist(), (ABOVE[packed & 15] * digits)[:4].sum())

# %% [markdown] tags=["measured"]
# With both, the product of four blocks takes 13 instructions, their factors
# included, loads not. Weights widened to 16 bits by `vpermw`, which looks up
# 16-bit numbers, would take 18: in the L2 cache of a Zen 4, 22 instead of 28
# GB/s a thread.

# %% [markdown] tags=["export:/kernels/wide.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# using Bytes = __m512i;
#
# inline Bytes table() {
#   return _mm512_broadcast_i32x4(load<__m128i>(ABOVE));
# }
#
# inline Bytes look_up(Bytes values, Bytes nibbles) {
# #ifdef __AVX512VBMI__
#   return _mm512_permutexvar_epi8(nibbles, values);
# #else
#   return _mm512_shuffle_epi8(
#       values, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
# #endif
# }
#
# inline Bytes add_bytes(Bytes sums, Bytes a, Bytes x) {
#   return _mm512_dpbusd_epi32(sums, a, x);
# }
# #endif
#
# #ifdef GPTOSS_VNNI
# inline __m256i add_bytes(__m256i sums, __m256i a, __m256i x) {
#   return _mm256_dpbusd_avx_epi32(sums, a, x);
# }
# #endif
# ```

# %% [markdown]
# Loading under a mask makes the end of a row simple: what is missing of the
# scales is filled up with 127, the scale 1, and what is missing of the weights
# with zeros. One permutation moves numbers anywhere in a register, so that the
# factors need no other order (`arrange`).

# %% [markdown] tags=["export:/kernels/wide.h"]
# ```cpp
# #ifdef GPTOSS_AVX512
# inline __mmask16 first(int64_t count) { return (1u << count) - 1; }
#
# inline Words load_scales(const uint8_t* from, int64_t count, bool) {
#   return (Words)_mm512_cvtepu8_epi32(
#       _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count), from));
# }
#
# inline Bytes load_blocks(const uint8_t* from, int64_t count) {
#   return count < SIDE ? _mm512_maskz_loadu_epi32(first(4 * count), from)
#                       : load<Bytes>(from);
# }
#
# inline Sums arrange(Sums v) { return v; }
#
# // the factors of group g, each in four lanes
# inline Sums spread(Sums factors, int g) {
#   const Words place = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
#   return (Sums)_mm512_permutexvar_ps((Bytes)(place + 4 * g),
#                                      (__m512)factors);
# }
#
# inline float sum(Sums v) {
#   const __m512d both = _mm512_castps_pd((__m512)v);
#   return sum((Floats)_mm512_castpd512_pd256(both)
#              + (Floats)_mm512_extractf64x4_pd(both, 1));
# }
# #endif
# ```

# %% [markdown]
# ## ARM: what is other there?
#
# The registers of NEON hold 16 bytes: one block at a time, `tbl` for the
# lookup, and `smlal`, which multiplies 16-bit numbers and adds to 32-bit sums.
# So activations stay whole, as in the portable loop, and there are no digits.
# The factor of a block is made where it is used. There are rows only, no
# tiles, however many tokens share an expert. **How fast it is on an ARM
# processor nobody has seen**; in an emulator (QEMU) it agrees with float64 as
# the others do.

# %% [markdown] tags=["export:/kernels/wide.h"]
# ```cpp
# #ifdef GPTOSS_NEON
# inline int32x4_t dots(uint8x16_t bytes, const Line& x, int8x16_t values) {
#   int32x4_t s = {}, t = {};
#   auto add = [&](uint8x16_t nibbles, const int16_t* q) {
#     const int8x16_t w = vqtbl1q_s8(values, nibbles);
#     const int16x8_t half[] = {vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w)};
#     for (int i = 0; i < 2; ++i) {
#       const int16x8_t eight = vld1q_s16(q + 8 * i);
#       s = vmlal_s16(s, vget_low_s16(half[i]), vget_low_s16(eight));
#       t = vmlal_high_s16(t, half[i], eight);
#     }
#   };
#   add(vandq_u8(bytes, vdupq_n_u8(15)), x.values[0]);
#   add(vshrq_n_u8(bytes, 4), x.values[1]);
#   return vaddq_s32(s, t);
# }
#
# template <int R, int T>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, const int64_t* n, float* out,
#                  int64_t width) {
#   const int8x16_t values = vld1q_s8(TWICE);
#   float32x4_t total[R][T] = {};
#   for (int64_t b = 0; b < x.blocks; ++b)
#     for (int r = 0; r < R; ++r) {
#       const int64_t at = r * step * x.blocks + b;
#       __builtin_prefetch(w + 16 * at + 512);
#       const uint8x16_t bytes = vld1q_u8(w + 16 * at);
#       for (int t = 0; t < T; ++t) {
#         const int32x4_t part = dots(bytes, x.line(n[t])[b], values);
#         total[r][t] = vfmaq_n_f32(total[r][t], vcvtq_f32_s32(part),
#                                   power(scales[at]) * x.half(n[t])[b]);
#       }
#     }
#   for (int t = 0; t < T; ++t)
#     for (int r = 0; r < R; ++r)
#       out[t * width + r * step] = vaddvq_f32(total[r][t]);
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ## Tiles: what do 32 registers of 64 bytes change?
#
# A tile of [many rows](../kernels/many_rows.ipynb) has 16 rows, and 16 sums of
# 32 bits are one register now. So twelve tokens take 12 sums in whole numbers
# and 12 in fp32, and there are 32 registers: the sums in fp32 need not go to
# memory after each block. `vpdpwssd` multiplies pairs of 16-bit numbers and
# adds them to a sum, in one instruction.
#
# This serves [eight-bit weights](../kernels/eight_rows.ipynb) that many tokens
# meet; those in four bits have [panels](../kernels/panels.ipynb).

# %% [markdown] tags=["export:/kernels/wide16.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# template <int T>
# void multiply_tokens(const Tile& tile, const Few& few, int64_t first,
#                    int64_t count) {
#   __m512 total[T];
#   for (int t = 0; t < T; ++t) total[t] = load<__m512>(few.out[t]);
#   for (int64_t b = 0; b < count; ++b) {
#     Bytes s[T] = {};
# #pragma GCC unroll 16
#     for (int m = 0; m < 16; ++m) {
#       const Bytes w = load<Bytes>(tile.values[b][m / 8][m % 8]);
#       for (int t = 0; t < T; ++t)
#         s[t] = _mm512_dpwssd_epi32(s[t], w, _mm512_set1_epi32(load<int32_t>(
#             &few.lines[t][first + b].values[m / 8][m % 8 * 2])));
#     }
#     const __m512 factors = load<__m512>(tile.factors[b]);
#     for (int t = 0; t < T; ++t)
#       total[t] += _mm512_cvtepi32_ps(s[t])
#                   * (factors * few.halves[t][first + b]);
#   }
#   for (int t = 0; t < T; ++t) _mm512_storeu_ps(few.out[t], total[t]);
# }
#
# void multiply_tile(const Tile& tile, const Few& few, int64_t first,
#                    int64_t count) {
#   with_count<TOKENS>(few.count, [&](auto T) {
#     multiply_tokens<T.value>(tile, few, first, count);
#   });
# }
# #endif
# ```

# %% [markdown]
# ## Sixteen bits: what if a processor multiplies bf16?
#
# `vdpbf16ps` takes 32 pairs of bf16 and adds two products to each of 16 sums
# in fp32. (A number below $2^{-126}$ counts as zero.) In numpy, with the two
# numbers of a pair beside each other:

# %%
def vdpbf16ps(sums, a, b):
    """a, b (32,): two products of neighbours to each of 16 sums."""
    return sums + (a * b).reshape(16, 2).sum(1)


a, b = draw.standard_normal(32), draw.standard_normal(32)
print(f"{vdpbf16ps(np.zeros(16), a, b).sum():.4f} and {a @ b:.4f}")

# %% [markdown]
# [Dense](../kernels/dense.ipynb) has the strips that are made of it, and
# [pairs](../kernels/pairs.ipynb) those of packed weights. Activations stay in
# bf16 there, half as long as in fp32.

# %% [markdown]
# A matrix in [twelve bits](../kernels/twelve_bits.ipynb) has its upper
# bytes looked up, and interleaved with the lower ones. The
# instructions that interleave work within quarters of the register, so the
# numbers come out in another order. The activations are brought into that
# order beforehand, by `compact_ready`. Which order is it?

# %%
i = np.arange(32)
stored = np.empty(64, int)  # which number stands at a byte of a block
place = (i & 7) | (i & 8) << 1 | (i & 16) >> 1
stored[place], stored[32 + place] = i, 32 + i
quarters = stored.reshape(4, 16)
low, high = quarters[:, :8].reshape(-1), quarters[:, 8:].reshape(-1)
print("unpacklo gives", low[[0, 7, 8, 15, 16, 31]].tolist())
print("unpackhi gives", high[[0, 7, 8, 15, 16, 31]].tolist())
k = np.arange(64)  # the place that compact_ready gives to number k
to = k // 64 * 64 + k % 32 // 16 * 32 + k % 64 // 32 * 16 + k % 16
assert (np.concatenate([low, high])[to] == k).all()

# %% [markdown] tags=["export:/kernels/wide16.h"]
# ```cpp
# #ifdef GPTOSS_BF16
# // of 64 weights, the halves of a register interleaved give 0 ... 15 and
# // 32 ... 47, then the others
# Array<Number> compact_ready(const Buffer& x) {
#   Array<Number> to(x.size());
#   for (size_t k = 0; k < x.size(); k += 8)
#     narrow(load<Floats>(&x[k]), &to[k / 64 * 64 + k % 32 / 16 * 32
#                                     + k % 64 / 32 * 16 + k % 16]);
#   return to;
# }
#
# template <int R>
# void compact_dots(const Compact& w, int64_t row, int64_t step,
#                   const Number* x, float* out) {
#   const Bytes upper = _mm512_broadcast_i32x4(load<__m128i>(w.upper));
#   const Bytes low = _mm512_set1_epi8(15);
#   __m512 s[R][2] = {};
#   for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* from = w.row(row + r * step) + b * SIZE;
#       const Bytes lower = load<Bytes>(from);
#       const __m256i codes = load<__m256i>(from + WEIGHTS);
#       const Bytes code = _mm512_and_si512(low, _mm512_inserti64x4(
#           _mm512_castsi256_si512(codes), _mm256_srli_epi16(codes, 4), 1));
#       const Bytes high = _mm512_shuffle_epi8(upper, code);
#       s[r][0] = _mm512_dpbf16_ps(
#           s[r][0], (__m512bh)_mm512_unpacklo_epi8(lower, high),
#           load<__m512bh>(x));
#       s[r][1] = _mm512_dpbf16_ps(
#           s[r][1], (__m512bh)_mm512_unpackhi_epi8(lower, high),
#           load<__m512bh>(x + BLOCK));
#     }
#   for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
# }
# #endif
# ```

# %% [markdown]
# And for attention: the numbers of keys stay in pairs, half as long, and
# `vdpbf16ps` adds two products at once. Sixteen keys become columns by `turn`
# of [AMX](../kernels/amx.ipynb), which needs no more than these registers: a
# pair is a word of 32 bits. A last tile may hold fewer than sixteen keys, and
# a head's last columns be sixteen: those are copied to where there are zeros
# around them.
#
# Weights times values stays in fp32: rounded to bf16, the weights would lose
# what the sum keeps. Eight rows by 32 columns are sixteen registers of sums,
# and each value is widened on its way, which is cheap for eight rows. Both
# products ask memory for the next chunk as they go, `score` for its keys, a
# line for each pair of columns, `mix` for its values. Asked for all at once
# they would wait for each other: a core has some two dozen lines under way.

# %% [markdown] tags=["export:/kernels/wide16.h"]
# ```cpp
# #ifdef GPTOSS_BF16
# using Query = Number;
# using Key = int32_t;  // a pair of columns
# using Value = Number;
#
# // to[c / 2][r]: two numbers of key r < 16, zero from `rows` on
# void key_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
#               Key* to) {
#   for (int64_t c = 0; c < C; c += 32, to += 16 * ROWS) {
#     const bool half = C - c < 32;
#     Bytes v[16];
#     Number copy[16 * 32];
#     const bool whole = !half && rows >= 16;
#     if (!whole) {
#       std::memset(copy, 0, sizeof copy);
#       for (int64_t r = 0; r < rows; ++r)
#         std::copy_n(k + r * stride + c, half ? 16 : 32, copy + r * 32);
#     }
#     const Number* from = whole ? k + c : copy;
#     for (int64_t r = 0, step = whole ? stride : 32; r < 16; ++r)
#       v[r] = load<Bytes>(from + r * step);
#     turn(v);
#     for (int64_t pair = 0; pair < (half ? 8 : 16); ++pair)
#       _mm512_storeu_si512(to + pair * ROWS, v[pair]);
#   }
# }
#
# // run(8, r) for rows r ... r + 7, then for four, two, one at a time
# template <class Run>
# void by_eights(int64_t rows, const Run& run) {
#   int64_t r = 0;
#   for (; r + 8 <= rows; r += 8) run(std::integral_constant<int, 8>(), r);
#   if (rows & 4) run(std::integral_constant<int, 4>(), r), r += 4;
#   if (rows & 2) run(std::integral_constant<int, 2>(), r), r += 2;
#   if (rows & 1) run(std::integral_constant<int, 1>(), r);
# }
#
# // out[r][0 ... 15] = q[r] times sixteen keys, as `key_tile` leaves them
# template <int R>
# void score_rows(const Key* keys, const Number* next, int64_t C,
#                 const Number* q, Target out) {
#   __m512 s[R] = {};
#   for (int64_t c = 0; c < C; c += 2, keys += ROWS, next += 32) {
#     __builtin_prefetch(next);  // where the keys of a head lie together
#     const __m512bh pairs = load<__m512bh>(keys);
#     for (int r = 0; r < R; ++r)
#       s[r] = _mm512_dpbf16_ps(s[r], pairs, (__m512bh)_mm512_set1_epi32(
#           load<int32_t>(q + r * C + c)));
#   }
#   for (int r = 0; r < R; ++r)
#     _mm512_storeu_ps(out.at + r * out.stride, s[r]);
# }
#
# void score(const Key* keys, const Number* next, int64_t C, const Query* q,
#            int64_t rows, Target out) {
#   by_eights(rows, [&](auto some, int64_t r) {
#     score_rows<some>(keys, next, C, q + r * C,
#                      {out.at + r * out.stride, out.stride});
#   });
# }
#
# // out[r][0 ... 16 W - 1] += sum over keys of weight[r] times v
# template <int R, int W>
# void mix_rows(const Number* v, int64_t stride, int64_t count,
#               Source weights, int64_t C, float* out) {
#   const int64_t ahead = 64 * stride;
#   __m512 s[R][W];
#   for (int r = 0; r < R; ++r)
#     for (int w = 0; w < W; ++w)
#       s[r][w] = _mm512_loadu_ps(out + r * C + 16 * w);
#   for (int64_t k = 0; k < count; ++k, v += stride) {
#     __builtin_prefetch(v + ahead);
#     __m512 x[W];
#     for (int w = 0; w < W; ++w)
#       x[w] = _mm512_castsi512_ps(_mm512_slli_epi32(
#           _mm512_cvtepu16_epi32(load<__m256i>(v + 16 * w)), 16));
#     for (int r = 0; r < R; ++r)
#       for (int w = 0; w < W; ++w)
#         s[r][w] = _mm512_fmadd_ps(x[w], _mm512_set1_ps(
#             weights.at[r * weights.stride + k]), s[r][w]);
#   }
#   for (int r = 0; r < R; ++r)
#     for (int w = 0; w < W; ++w)
#       _mm512_storeu_ps(out + r * C + 16 * w, s[r][w]);
# }
#
# // the same for all C
# void mix(const Value* v, int64_t stride, int64_t count, Source weights,
#          int64_t rows, int64_t C, float* out) {
#   by_eights(rows, [&](auto some, int64_t r) {
#     const Source from = {weights.at + r * weights.stride, weights.stride};
#     for (int64_t c = 0; c < C; c += 32)
#       (C - c < 32 ? mix_rows<some, 1> : mix_rows<some, 2>)(
#           v + c, stride, count, from, C, out + r * C + c);
#   });
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# Whatever this processor has, `packed_rows` and `linear` are near to float64:
# the first but for activations in sixteen bits, the second but for one
# rounding to bf16. (Without a compiler, twins stand in for them.)

# %%
import torch

import gptoss.model.ops  # noqa: F401  declares the operators
from gptoss.kernels.build import load_upto
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode

if load_upto("dense"):
    packed_rows = torch.ops.gptoss.packed_rows
else:
    def packed_rows(x, *packed):
        return x.float() @ decode(*packed, torch.float32).T

torch.manual_seed(0)
for columns in (32, 96, 2880):  # one block, three, no whole register
    x, bias = torch.randn(3, columns).bfloat16(), torch.zeros(40).bfloat16()
    packed = encode(0.02 * torch.randn(40, columns))
    weight = (0.02 * torch.randn(40, columns)).bfloat16()
    with torch.inference_mode():
        found = {"packed": (packed_rows(x, *packed),
                            decode(*packed, torch.float64)),
                 "dense": (torch.ops.gptoss.linear(x, weight, bias),
                           weight.double())}
    for name, (y, wide) in found.items():
        exact = x.double() @ wide.T
        off = ((y.double() - exact).norm() / exact.norm()).item()
        print(f"{columns:4} {name:6} {off:.0e} from float64")
        assert off < (1e-4 if name == "packed" else 1 / 256)

# %% [markdown]
# ## Sources
#
# - Instructions of x86:
#   https://www.intel.com/content/www/us/en/docs/intrinsics-guide
# - Instructions of ARM:
#   https://developer.arm.com/architectures/instruction-sets/intrinsics
