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
# # What do bf16 units make of four bits?
#
# ## Question
#
# Some processors multiply bf16 as it is, 32 pairs in one instruction. The
# experts are stored in four bits with a scale for each 32. Does it need any
# rounding to make bf16 of them? An FP4 value has two significant bits, a scale
# is a power of two, bf16 has eight significant bits and exponents from -126 to
# 127. So there is room, for all but a few scales. How many of the 256?

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from gptoss.weights.mxfp4 import decode

plt.style.use("../_static/book.mplstyle")
codes = torch.arange(16, dtype=torch.uint8)
block = (codes | codes.flip(0) << 4).view(1, 1, 16)  # every code, twice


def as_stored(scale: int, dtype: torch.dtype) -> torch.Tensor:
    """The 32 weights of `block` under a scale byte."""
    return decode(block, torch.tensor([[scale]], dtype=torch.uint8), dtype)[0]


smallest = torch.finfo(torch.bfloat16).smallest_normal
held = [scale for scale in range(255) if all(
    x == y and (y == 0 or abs(y) >= smallest) for x, y in zip(
        as_stored(scale, torch.float64).tolist(),
        as_stored(scale, torch.bfloat16).tolist(), strict=True))]
print(f"{len(held)} scales, from {held[0]} to {held[-1]}, lose nothing")

# %% [markdown]
# ## Picture
#
# The exponent of a bf16 number stands in bits 7 to 14. Multiplying by a power
# of two adds to these bits and leaves all others alone. So the product of a
# value and a scale is *one integer addition*, on the bits.

# %% tags=["hide-input"]
# Figure: three rows of sixteen cells each, sign, eight bits of exponent, seven
# of mantissa: 1.5 times 2 to the 125, bits 0 11111100 1000000; then a number
# of sixteen bits that is subtracted, 128 in the place of the exponent; and the
# difference, 0.1875, whose mantissa is the same.
def bits_of(x: float) -> int:
    return torch.tensor([x]).bfloat16().view(torch.int16).item() & 0xFFFF


lower = 252 - 124 << 7  # for the scale byte 124, which means 1/8
rows = (("1.5 from the table, times 2**125", bits_of(1.5) + (125 << 7)),
        ("the block's scale, 124: 252 - 124 = 128", lower),
        ("the weight, 1.5 / 8 = 0.1875", bits_of(1.5 / 8)))
fig, ax = plt.subplots(figsize=(7.4, 2.2))
for y, (words, bits) in zip((2.4, 1.2, 0), rows, strict=True):
    for n, bit in enumerate(f"{bits:016b}"):
        color = "C1" if n == 0 else "C0" if n < 9 else "C4"
        ax.add_patch(plt.Rectangle((n, y), 0.94, 0.8, fc=color, ec="white"))
        ax.text(n + 0.47, y + 0.38, bit, ha="center", va="center", fontsize=8,
                color="white" if 0 < n < 9 else "black")
    ax.text(16.4, y + 0.4, words, va="center", fontsize=8)
ax.text(-0.4, 1.6, "minus", ha="right", va="center", fontsize=8)
ax.text(-0.4, 0.4, "is", ha="right", va="center", fontsize=8)
for x, words in ((0.47, "sign"), (5, "exponent"), (12.5, "mantissa")):
    ax.text(x, 3.35, words, ha="center", fontsize=8, color="0.3")
ax.set(xlim=(-2.4, 27), ylim=(-0.1, 3.7))
ax.axis("off")
plt.show()
assert rows[0][1] - lower == rows[2][1]

# %% [markdown]
# What to see: only the middle part changes. The table holds each value with
# the largest exponent that fits, and each block takes away what its scale lies
# below that.
#
# ## The naive version
#
# Why not add the scale, as one would first think? Because of zero. Its bits
# are all zero, and an exponent added to them makes a number of it:

# %%
def number_of(bits: int) -> float:
    return torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(
        torch.bfloat16).item()


added = bits_of(0.0) + (124 << 7)  # the exponent field of 1/8
taken = max(bits_of(0.0) - lower, 0)
print(f"zero plus the scale's bits: {number_of(added)}, "
      f"zero minus, but not below zero: {number_of(taken)}")

# %% [markdown]
# Processors have a subtraction that stops at zero (*saturating*, for numbers
# without a sign). With it zero stays zero and no weight needs a second look.
# Minus zero would not survive it, so the table has plain zeros in both places.
#
# ## Derivation
#
# **All 16 codes under all scales that bf16 holds**, by the table and one
# subtraction, against the decoding of [mxfp4](../weights/mxfp4.ipynb):

# %%
values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
large = np.array([0 if v == 0 else bits_of(v) + (125 << 7) for v in values],
                 dtype=np.int64)
large = np.concatenate([large, np.where(large, large | 0x8000, 0)])
for scale in range(2, 253):
    made = np.maximum(large - (252 - scale << 7), 0).astype(np.uint16)
    made = torch.from_numpy(made.view(np.int16)).view(torch.bfloat16)
    exact = as_stored(scale, torch.bfloat16).view(16, 2)[:, 0]
    assert torch.equal(made, exact), scale
print("largest bits in the table:", hex(large[7]), "of 0x7f80, infinity;",
      16 * 251, "weights are right")

# %% [markdown]
# **Which numbers lie beside each other?** A register of 64 bytes is four
# blocks as they lie in memory, or 32 words of 16 bits, and a word holds four
# codes. Its lowest four bits are element 0 of the row, those of the next word
# element 4, and so on; shifted by four bits, the words begin with elements 1,
# 5, 9. So nothing has to be moved. One register of weights holds every fourth
# element of four blocks, the next three the others, and a token's activations
# are laid out in the same order, once: `pair_row`.

# %%
def pair_order(blocks: int) -> np.ndarray:
    """Which element of a row stands at each place; -1 for none."""
    order = np.full((-(-blocks // 4) * 4, 32), -1)
    order[:blocks] = np.arange(32 * blocks).reshape(blocks, 32)
    four = order.reshape(-1, 4, 8, 4)  # four blocks, block, word, code
    return four.transpose(0, 3, 1, 2).reshape(-1)


print("of four blocks:", pair_order(4)[[0, 1, 2, 31, 32, 33, 127]].tolist())
print("of one, filled up:", pair_order(1)[[0, 7, 8, 32, 39, 40]].tolist())

# %% [markdown]
# ## Code
#
# `vpermw` (`_mm512_permutexvar_epi16`) looks up 32 words in a table of 32 by
# the lowest five bits of each index. There are 16 codes, so the table holds
# them twice, and the fifth bit, which is the neighbour's, does not matter.

# %% [markdown] tags=["export:pairs.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# constexpr int64_t HELD = 4;  // blocks are decoded four at a time
#
# // words >> k
# inline Bytes shifted(Bytes words, int k) {
# #ifdef GPTOSS_AMX  // Intel
#   return k ? _mm512_mulhi_epu16(words, _mm512_set1_epi16(1 << (16 - k)))
#            : words;
# #else
#   return _mm512_srli_epi16(words, k);
# #endif
# }
#
# // code j of each word, looked up in a table of 32
# inline Bytes found(Bytes words, int j, const void* table) {
#   return _mm512_permutexvar_epi16(shifted(words, 4 * j), load<Bytes>(table));
# }
# #endif
#
# #ifdef GPTOSS_BF16
# // the codes' values times 2**125 as bf16, zeros without a sign; twice, so
# // that one more bit of an index does not matter
# constexpr uint16_t LARGE[32] = {
#     0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
#     0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
#     0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
#     0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40};
# constexpr int ONCE = 12;  // tokens, with two rows: weights are decoded once
# #ifdef GPTOSS_AMX  // Intel: without its squares whole numbers are quicker
# constexpr bool PAIRED = false;
# #else
# constexpr bool PAIRED = true;
# #endif
# constexpr int64_t FOUR = HELD * BLOCK;
#
# inline int64_t padded(int64_t blocks) {
#   return (blocks + HELD - 1) / HELD * FOUR;
# }
#
# // floats as bf16: of four blocks the elements 0, 4, 8 ..., then 1, 5, 9 ...
# void pair_row(const float* x, int64_t blocks, Number* to) {
#   alignas(64) uint16_t place[BLOCK];
#   for (int i = 0; i < BLOCK; ++i) place[i] = i % 8 * 4 + i / 8;
#   std::fill(to + blocks / HELD * FOUR, to + padded(blocks), Number(0));
#   for (int64_t b = 0; b < blocks; ++b, x += BLOCK) {
#     alignas(64) Number part[BLOCK];
#     _mm512_store_si512(part, _mm512_permutexvar_epi16(
#         load<Bytes>(place), (Bytes)_mm512_cvtne2ps_pbh(
#             load<__m512>(x + 16), load<__m512>(x))));
#     for (int j = 0; j < 4; ++j)
#       std::copy_n(part + 8 * j, 8, to + b / HELD * FOUR + BLOCK * j
#                                    + 8 * (b % HELD));
#   }
# }
# ```

# %% [markdown]
# Four scale bytes are loaded into every lane of 32 bits. A shuffle puts the
# byte of their block into the upper half of each eight words; there it is
# subtracted from 252, and moved down by one bit into the exponent's place.
# Then come three shifts, four look-ups and four subtractions for 128 weights.
#
# Which instructions should do that? Each kind has units of its own, and those
# that multiply pairs are busy with the tokens. A loop of one instruction alone
# tells how many begin in a cycle; a loop of two in turns, whether they share a
# unit:

# %% [markdown] tags=["measured"]
# One core each, 64-byte instructions a cycle, by loops in assembler that are
# not kept. *With* another one: they share a unit. The Xeon has two, A and B.
#
# | | Xeon (Emerald Rapids) | Zen 4 |
# |---|---|---|
# | `vpermw`, look up | 1.0, on A and B | 1.0 |
# | `vpermb`, `vpshufb`: the same, bytes | 1.0, on B | |
# | `vpsrlw`, shift | 1.0, on A | 1.0 |
# | `vpmulhuw`, upper half of a product | 2.0 | 1.0, with `vdpbf16ps` |
# | `vpsubusw`, not below 0 | 1.0, on A | 1.0, with `vdpbf16ps` |
# | `vpmaxuw` | 1.0, on A | 2.0, any unit |
# | `vpsubw` | 2.0 | 2.0, any unit |
# | `vdpbf16ps`, 32 products | 0.5 | 1.0 |
#
# On the Xeon looking up 16 bits is two operations, one on each unit. With
# shifts A would have twelve for the 128 weights; so on a Xeon with AMX a shift
# by $k$ is the upper half of a product with $2^{16 - k}$, for which either
# unit will do: 18 operations, nine cycles. On a Zen 4 that, and a
# subtraction that stops at zero, take the place of products. With shifts, and
# without masks for whole fours, two tokens were a quarter faster there.
# $\max(a, b) - b$ is the same subtraction in two instructions, which find a
# free unit on Zen 4; for six tokens it brought another ninth. On the Xeon the
# maximum needs A just as the one subtraction does, so the second instruction
# only costs (experts with four places each: 8 percent).
#
# The last line says more: on the Xeon whole numbers are multiplied four times
# as fast as pairs of bf16 (`vpdpwssd`, 2.0). It has AMX for bf16. But where a
# system does not lend that to a process, it takes whole numbers for the
# experts (`PAIRED`): with 2, 4, 16 and 64 places each they were 1.6, 1.6, 2.0
# and 2.3 times as fast by them as by what this chapter derives.

# %% [markdown] tags=["export:pairs.h"]
# ```cpp
# // bits - lower, but not below zero
# inline Bytes lowered(Bytes bits, Bytes lower) {
# #ifdef GPTOSS_AMX
#   return _mm512_subs_epu16(bits, lower);
# #else
#   return _mm512_sub_epi16(_mm512_max_epu16(bits, lower), lower);
# #endif
# }
#
# // four scale bytes, or `count` < 4 and 127, in every lane of 32 bits
# inline Bytes four_scales(const uint8_t* from, int64_t count) {
#   return _mm512_broadcastd_epi32(
#       count < HELD ? _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count),
#                                          from)
#                    : _mm_cvtsi32_si128(load<int32_t>(from)));
# }
#
# // for a shuffle: a byte for each quarter of a register, in the upper half of
# // its words (80: zero)
# alignas(64) constexpr uint64_t QUARTERS[8] = {
#     0x0080008000800080, 0x0080008000800080, 0x0180018001800180,
#     0x0180018001800180, 0x0280028002800280, 0x0280028002800280,
#     0x0380038003800380, 0x0380038003800380};
#
# // four blocks, or `count` < 4 of them and zeros
# struct Fours {
#   Bytes words, lower;  // how far exponents lie below those of LARGE
#
#   Fours() = default;
#
#   Fours(const uint8_t* w, const uint8_t* scales, int64_t count) {
#     words = load_blocks(w, count);
#     lower = shifted(_mm512_sub_epi16(
#         _mm512_set1_epi16(252 << 8), _mm512_shuffle_epi8(
#             four_scales(scales, count), load<Bytes>(QUARTERS))), 1);
#   }
#
#   // as bf16, the elements j, j + 4, j + 8 ...
#   Bytes decoded(int j) const {
#     return lowered(found(words, j, LARGE), lower);
#   }
# };
#
# // does bf16 hold the weights of these scales? 2**-125 ... 2**125
# bool usual(const uint8_t* scales, int64_t count) {
#   uint8_t bad = 0;
#   for (int64_t i = 0; i < count; ++i)
#     bad |= uint8_t(scales[i] - 2) > 250;
#   return !bad;
# }
#
#
# ```

# %% [markdown]
# A **strip** is that of [dense](dense.ipynb): rows and tokens make a rectangle
# of sums that stay in registers. Here its weights are decoded on the way, and
# each serves all tokens of the group before it is forgotten. Up to twelve
# tokens are one group (with two rows instead of four), so nothing is decoded
# twice. The pragmas tell GCC to unroll the loops over rows and tokens before
# it decides what stands in registers; without them it kept 12 to 24 sums there
# and stored each of them in memory every time round, too. For the same reason
# what is done to four blocks is a function that is inlined twice: for all the
# whole fours, in which no mask is needed, and for the rest.

# %% [markdown] tags=["export:pairs.h"]
# ```cpp
# // run(b, count) for each four of the blocks, inlined: for whole ones, and
# // for what is left
# template <class Run>
# inline void by_fours(int64_t blocks, const Run& run) {
#   int64_t b = 0;
#   for (; b + HELD <= blocks; b += HELD) run(b, HELD);
#   if (b < blocks) run(b, blocks - b);
# }
#
# template <int T>
# inline void clear(__m512 (&s)[T][4]) {
# #pragma GCC unroll 12
#   for (int t = 0; t < T; ++t)
# #pragma GCC unroll 4
#     for (int r = 0; r < 4; ++r) s[t][r] = __m512{};
# }
#
# // out[t * width + r * step] = s[t][r]
# template <int R, int T>
# inline void put(const __m512 (&s)[T][4], int64_t step, float* out,
#                 int64_t width) {
# #pragma GCC unroll 12
#   for (int t = 0; t < T; ++t) {
#     const __m128 four = sums(s[t][0], s[t][1], s[t][2], s[t][3]);
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r) out[t * width + r * step] = four[r];
#   }
# }
#
# // as `strip`, with rows that are decoded in registers
# template <int R, int T>
# void packed_strip(const uint8_t* w, const uint8_t* scales, int64_t step,
#                   int64_t blocks, const Number* x, float* out,
#                   int64_t width) {
#   const int64_t n = padded(blocks), row = step * blocks;
#   __m512 s[T][4];
#   clear(s);
#   by_fours(blocks, [&](int64_t b, int64_t count) INLINE {
#     Fours fours[R];
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r) {
#       const int64_t at = r * row + b;
#       ask_ahead(w + 16 * at);
#       fours[r] = {w + 16 * at, scales + at, count};
#     }
# #pragma GCC unroll 4
#     for (int j = 0; j < HELD; ++j) {
#       Bytes decoded[R];
# #pragma GCC unroll 4
#       for (int r = 0; r < R; ++r) decoded[r] = fours[r].decoded(j);
# #pragma GCC unroll 12
#       for (int t = 0; t < T; ++t) {
#         const auto token = load<__m512bh>(x + t * n + BLOCK * (b + j));
# #pragma GCC unroll 4
#         for (int r = 0; r < R; ++r)
#           s[t][r] = _mm512_dpbf16_ps(s[t][r], (__m512bh)decoded[r], token);
#       }
#     }
#   });
#   put<R>(s, step, out, width);
# }
# ```

# %% [markdown]
# **Two or three tokens** are multiplied with so few instructions that decoding
# takes the longer part. (With `--activations 8` one token, too, goes this
# way.) Then the scales need not go into the weights at all: of four blocks,
# each lane of a sum belongs to one, so what they bring is summed in a register
# of its own, and that is multiplied with the four powers of two. One product a
# token takes the place of eight instructions (on the Xeon of four, but there
# digits serve few tokens). And any scale will do, since a
# float has room for all these powers. (255, which means NaN, is infinity in a
# float; so at the end infinity becomes NaN, and what outgrew fp32 with it.)

# %% [markdown] tags=["export:pairs.h"]
# ```cpp
# constexpr int SCALED_AFTER = 3;  // tokens, at most
#
# // the codes' values themselves, which lie 2**125 below those of LARGE
# alignas(64) constexpr auto SMALL = [] {
#   std::array<uint16_t, 32> to{};
#   for (int i = 0; i < 32; ++i) to[i] = LARGE[i] ? LARGE[i] - (125 << 7) : 0;
#   return to;
# }();
#
# // the powers of two of four blocks, each in four lanes
# inline __m512 four_powers(const uint8_t* scales, int64_t count) {
#   const Bytes first = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2,
#                                        1, 1, 1, 1, 0, 0, 0, 0);
#   const Words byte = (Words)_mm512_maskz_shuffle_epi8(
#       0x1111111111111111, four_scales(scales, count), first);
#   return (__m512)factors(byte, Sums{} + 1);
# }
#
# template <int R, int T>
# void strip_of_few(const uint8_t* w, const uint8_t* scales, int64_t step,
#                   int64_t blocks, const Number* x, float* out,
#                   int64_t width) {
#   const int64_t n = padded(blocks), row = step * blocks;
#   __m512 s[T][4];
#   clear(s);
#   by_fours(blocks, [&](int64_t b, int64_t count) INLINE {
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r) {
#       const int64_t at = r * row + b;
#       ask_ahead(w + 16 * at, NEAR);
#       const Bytes words = load_blocks(w + 16 * at, count);
#       const __m512 powers = four_powers(scales + at, count);
#       Bytes decoded[HELD];
# #pragma GCC unroll 4
#       for (int j = 0; j < HELD; ++j)
#         decoded[j] = found(words, j, SMALL.data());
# #pragma GCC unroll 3
#       for (int t = 0; t < T; ++t) {
#         __m512 y = {};
# #pragma GCC unroll 4
#         for (int j = 0; j < HELD; ++j)
#           y = _mm512_dpbf16_ps(
#               y, (__m512bh)decoded[j],
#               load<__m512bh>(x + t * n + BLOCK * (b + j)));
#         s[t][r] += y * powers;
#       }
#     }
#   });
# #pragma GCC unroll 3
#   for (int t = 0; t < T; ++t)
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r)
#       s[t][r] += 0 * s[t][r];  // infinity becomes NaN
#   put<R>(s, step, out, width);
# }
# ```

# %% [markdown]
# More than twelve tokens take several groups; for so many, the
# [next chapter](panels.ipynb) has a better way. And from four tokens on, the
# scales that bf16 has no room for (0, 1, 253 to 255: no checkpoint that we
# know has them) go one weight at a time, slowly and right.

# %% [markdown] tags=["export:pairs.h"]
# ```cpp
# // the same for scales that bf16 has no room for, one weight at a time
# void unusual_rows(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                   int64_t blocks, const Number* x, int64_t N, float* out,
#                   int64_t width) {
#   for (int64_t t = 0; t < N; ++t, x += padded(blocks), out += width)
#     for (int64_t r = 0; r < rows; ++r) {
#       out[r] = 0;
#       for (int64_t b = 0; b < blocks; ++b) {
#         const uint8_t* from = w + 16 * (r * blocks + b);
#         const Number* at = x + b / HELD * FOUR + b % HELD * 8;
#         float s = 0;
#         for (int i = 0; i < BLOCK; ++i)
#           s += TWICE[from[i / 2] >> i % 2 * 4 & 15]
#                * float(at[i % 4 * BLOCK + i / 4]);
#         out[r] += s * power(scales[r * blocks + b]) / 2;
#       }
#     }
# }
#
# template <int R, int T>  // one of them is compiled
# constexpr auto chosen() {
#   if constexpr (T <= SCALED_AFTER) return strip_of_few<R, T>;
#   else return packed_strip<R, T>;
# }
#
# // out[t * width + r]: `rows` rows of a packed weight times N tokens, each
# // as `pair_row` leaves it
# void packed_strips(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                    int64_t blocks, const Number* x, int64_t N, float* out,
#                    int64_t width) {
#   if (N > SCALED_AFTER && !usual(scales, rows * blocks))
#     return unusual_rows(w, scales, rows, blocks, x, N, out, width);
#   in_groups<ONCE>(N, [&](auto T, int64_t t) {
#     constexpr int SOME = T.value <= TOGETHER ? STREAMS : STREAMS / 2;
#     in_strips<SOME, true>(rows, [&](auto R, int64_t r, int64_t apart) {
#       constexpr auto run = chosen<R.value, T.value>();
#       run(w + 16 * r * blocks, scales + r * blocks, apart, blocks,
#           x + t * padded(blocks), out + t * width + r, width);
#     });
#   });
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ### And dense rows, for a few tokens?
#
# The strips of [dense](dense.ipynb) go along whole rows. How much passes until
# a token's number is needed again, for the next four rows?

# %%
for tokens in (1, 2, 4, 8, 12):
    whole, slab = (2 * columns * (4 + tokens) for columns in (2880, 480))
    print(f"{tokens:2} tokens and four rows: {whole / 1024:2.0f} KiB along "
          f"2880 columns, {slab / 1024:4.1f} KiB along 480")
print("The first cache of a Zen 4 holds 32 KiB.")

# %% [markdown]
# So from two tokens on, that cache has dropped each number just before it is
# needed again. All tokens then come from the second cache for every four rows,
# and they take places of a queue in which the weights from memory wait, too. A
# **slab** is 480 columns wide: four rows of it, all tokens, then the next slab
# of the same rows, so that the four streams from memory never break off.
# Between two slabs the sums wait in memory, as the registers they are; their
# lanes are added up at the end of the row. So a token's result is the same, to
# the bit, whether it comes alone or with eleven others.
#
# In what groups the tokens pass was found by trying (the times are below).
# Four are quicker as two groups than as one, five at least not slower; six,
# which fill the registers, are quicker along whole rows, and we do not know
# why. With more than twelve, halves of rows are quicker again.

# %% [markdown] tags=["export:slabs.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_BF16
# constexpr int64_t SLAB = 480;  // numbers of a row
# constexpr int64_t KEPT = 12;   // tokens whose sums wait, at most
#
# template <int T>
# INLINE inline void move_sums(const __m512 (*from)[4], __m512 (*to)[4]) {
# #pragma GCC unroll 6
#   for (int t = 0; t < T; ++t)
# #pragma GCC unroll 4
#     for (int r = 0; r < 4; ++r) to[t][r] = from[t][r];
# }
#
# // adds to the sums in `kept`: R rows, T tokens, `deep` columns
# template <int R, int T>
# void go_on(const Number* w, int64_t apart, const Number* x, int64_t n,
#            int64_t deep, __m512 (*kept)[4]) {
#   __m512 s[T][4];
#   move_sums<T>(kept, s);
#   add_strip<R>(w, apart, x, n, deep, AHEAD / 2, s);
#   move_sums<T>(s, kept);
# }
#
# // as `strips`, tokens in groups of at most MANY
# template <int MANY>
# void slabs(const Number* w, int64_t rows, const Number* x, int64_t N,
#            int64_t n, float* out, int64_t width) {
#   __m512 kept[KEPT][4];
#   in_strips<STREAMS, true>(rows, [&](auto R, int64_t r, int64_t step) {
#     std::memset(kept, 0, N * sizeof kept[0]);
#     for (int64_t k = 0; k < n; k += SLAB)
#       in_groups<MANY>(N, [&](auto T, int64_t t) {
#         go_on<R.value, T.value>(w + r * n + k, step * n, x + t * n + k, n,
#                                 std::min(SLAB, n - k), &kept[t]);
#       });
#     for (int64_t t = 0; t < N; ++t) {
#       const auto& s = kept[t];
#       const __m128 four = sums(s[0], s[1], s[2], s[3]);
#       for (int i = 0; i < R.value; ++i)
#         out[t * width + r + i * step] = four[i];
#     }
#   });
# }
# #endif
#
# // as `strips`, by whichever way is quicker
# void quickest_strips(const Number* w, int64_t rows, const Ready* x,
#                      int64_t N, int64_t n, float* out, int64_t width) {
# #ifdef GPTOSS_BF16
#   if (LEAN < N && N <= KEPT && N != TOGETHER)
#     return (N < TOGETHER ? slabs<TOGETHER / 2> : slabs<TOGETHER>)(
#         w, rows, x, N, n, out, width);
# #endif
#   strips(w, rows, x, N, n, out, width);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# **Packed products of 1 to 100 tokens** beside float64. One rounding to bf16
# is left, and so its distance from the exact result must be that of plain
# torch, whatever way the tokens take. Odd numbers of blocks and rows that fill
# no strip are among them. (Without bf16 units other kernels answer; without a
# compiler, a twin.)

# %%
from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel, mxfp4_linear
from gptoss.weights.encoding import encode

load_upto("dense")


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def both(x: torch.Tensor, packed) -> tuple[float, float]:
    """How far the kernel and plain torch are from float64."""
    exact = x.double() @ decode(*packed, torch.float64).T
    with torch.inference_mode():
        fast = mxfp4_linear(x, *packed)
        with plain_torch():
            slow = mxfp4_linear(x, *packed)
    if not has_kernel("mxfp4_linear"):
        fast = exact.float().bfloat16()
    return off(fast, exact), off(slow, exact)


torch.manual_seed(0)
for tokens in (1, 2, 3, 6, 7, 12, 13, 100):  # 1: by digits
    for rows, blocks in ((150, 1), (33, 7), (64, 33)):
        packed = encode(0.02 * torch.randn(rows, 32 * blocks))
        ours, torchs = both(torch.randn(tokens, 32 * blocks).bfloat16(),
                            packed)
        assert ours < 1.002 * torchs < 3e-3
    print(f"{tokens:3} tokens: kernel {ours:.4f}, plain torch {torchs:.4f}")

# %% [markdown]
# **Dense rows** of few tokens: all numbers up to 13, with a last slab that is
# not full, and rows that fill no strip. The worst of them:

# %%
worst = 0.0
for tokens in range(1, 14):
    x, weight = (torch.randn(n, 1056).bfloat16() for n in (tokens, 150))
    with torch.inference_mode():
        y = torch.ops.gptoss.linear(x, weight, None)
    worst = max(worst, off(y, x.double() @ weight.double().T))
print(f"off by {worst:.3f} of the result's norm, which is one rounding")
assert worst < 2.5e-3

# %% [markdown]
# **Scales that are out of reach** for bf16: $2^{-127}$ is not nothing, and NaN
# stays NaN.

# %%
blocks, scales = encode(torch.ones(3, 32))
scales[:, 0] = torch.tensor([0, 255, 127])
for tokens in (2, 4):
    with torch.inference_mode():
        y = mxfp4_linear(torch.ones(tokens, 32).bfloat16(), blocks, scales)[1]
    print([f"{value:.0e}" for value in y.float().tolist()])

# %% [markdown]
# ## Why not the second layer, too?
#
# What enters the first layer of an expert was stored in bf16 and is multiplied
# exactly (by a token alone nearly so: [packed](packed.ipynb)). What enters the
# second, the hidden vector, never was. Rounding it would be one rounding more.
# What does it cost, on the experts of the shipped model?

# %%
from gptoss.moe.experts import clamped_swiglu
from gptoss.weights.checkpoint import Checkpoint

with Checkpoint.open("../../gptoss/pocket") as file:
    name = "model.layers.1.mlp.experts.{}_proj_{}"
    gate_up, down = (decode(*(file.read(name.format(part, piece))[0]
                              for piece in ("blocks", "scales")),
                            torch.float64) for part in ("gate_up", "down"))
x = torch.randn(64, gate_up.shape[1]).bfloat16().double()
hidden = clamped_swiglu(x @ gate_up.T)
exact = hidden @ down.T
once = off(exact.bfloat16(), exact)
twice = off((hidden.bfloat16().double() @ down.T).bfloat16(), exact)
print(f"one rounding {once:.4f}, two {twice:.4f}: {twice / once:.1f} times")

# %% [markdown]
# So the second layer keeps its activations in sixteen bits, as whole numbers:
# row by row for a few tokens, by [panels](panels.ipynb) for more.
#
# ## In the 20b and the 120b
#
# How many tokens meet in one expert? If a step brings $n$ tokens and each of
# them chooses $K$ of $E$ experts at random, an expert that is chosen at all
# has $nK / (E (1 - (1 - K/E)^n))$ on average.

# %%
from gptoss.moe.routing import expected_hits


def together(n: int, E: int, K: int = 4) -> tuple[float, float]:
    """Experts that are chosen, and tokens in each of them."""
    chosen = expected_hits(E, K, n)
    return chosen, n * K / chosen


print("tokens   20b: experts,  tokens in each  120b: experts,  tokens in each")
for n in (2, 4, 8, 16, 512):
    print(f"{n:6}" + "".join(f"{chosen:15.1f} {each:16.1f}" for chosen, each
                             in (together(n, E) for E in (32, 128))))

# %% [markdown]
# In the 120b most experts that are chosen have a single token still when eight
# come: there one token is what counts, and a token alone goes row by row, by
# its digits ([packed](packed.ipynb)), since that takes fewer instructions.
#
# **Cost.** For 128 weights of a row: a shift, a look-up and two for the
# difference make 15 instructions (the first code needs no shift), four are for
# the scales (15 in all where a subtraction stops at zero, as on the Xeon), and
# each token takes 4 products. With the scales after the sums
# it is 7 and 4, and 5 for each token. By digits, row by row, one shift and two
# look-ups decode, but a token takes 4 products and then a shift, a sum, a
# conversion, a scale brought to its lanes and a product with it; what belongs
# to the scales is done for sixteen blocks at a time. What part is decoding?

# %%
print("scales        tokens  instructions  of them decoding")
for name, decoding, token, counts in (
        ("in weights", 19, 4, (1, 3, 4, 12)),
        ("after sums", 11, 5, (1, 2, 3)),
        ("by digits", 3 + 3 / 4, 9 + 1 / 4, (1, 2, 3))):
    for T in counts:
        every = decoding + token * T
        print(f"{name:13} {T:6} {every:13.0f} {decoding / every:17.0%}")

# %% [markdown] tags=["measured"]
# Measured on two cores of a Zen 4, packed bytes a second from memory at 36
# GB/s, first with saturating subtractions, products for shifts and a mask at
# every load, then as they are: one token 26 (row by row) and 33 GB/s, two 23
# and 29, three 19 and 23, four 16 and 20, six 12 and 14, eight 9.5 and 10.6,
# twelve 7.1 and 7.4. At 60 GB/s the experts of the 20b took one token 35 ms
# and two 65, and, since up to three tokens ask 1024 bytes ahead instead of
# 2048, 32 and 61. On two cores of a Zen 5, before that change, a first
# layer of 5760 by 2880 at 50 GB/s took 0.17 ms for one token (row by row, the
# bytes' own time), 0.18 for two and for three, 0.23 for four, 0.33 for six,
# 0.44 for eight. On the Xeon strips are limited by `vdpbf16ps`, one in 2.3
# cycles.
#
# Now that both ways ask 1024 bytes ahead, one token is quicker row by row: 8.4
# cycles for 128 weights from the second cache, by strips 9.7; for the experts
# of the 20b, in another run at 60 GB/s, 30 ms, by strips 33. So a token alone
# goes that way. This was measured on the Zen 4 only.
#
# The dense matrices of the 20b on the Zen 4, with memory at 60 GB/s, in
# milliseconds by strips and by slabs: three tokens 57 and 49, four 62 and 51,
# five 66 and 60, eight 77 and 66, twelve 97 and 92; at 35 GB/s four 77 and 71,
# eight 84 and 72. Four tokens in one group took 62 by slabs, too; six in two
# groups of three 73, along whole rows 61, and 55 since the compiler must
# inline that loop. Sixteen, in two lots of eight, took 145 by slabs and 128
# by halves of rows.
#
# ## Takeaways
#
# - An FP4 value times its scale is a bf16 number, exactly, for 251 of the 255
#   scales; the product is one subtraction in the exponent's bits.
# - Saturating subtraction keeps zero zero, so no weight is looked at twice.
# - Decoding costs 11, 15 or 19 instructions for 128 weights, and all tokens of
#   a group share them. Which instructions is up to what else is to be done:
#   they should not wait for the units that multiply.
# - One token alone goes by its digits: 13 instructions instead of 16.
# - What was stored in bf16 is multiplied in bf16, but for a token alone; what
#   never was keeps sixteen bits.
# - Dense rows of three to twelve tokens, but six, go by slabs: the tokens stay
#   in the first cache, and their sums wait in memory.
#
# ## Exercises
#
# ### Exercise 1
#
# How many of the 251 scales would be left if the units took fp16 (five bits of
# exponent, ten of mantissa, nothing below $2^{-14}$) instead of bf16?

# %% tags=["hide-cell"]
info = torch.finfo(torch.float16)
left = [scale for scale in range(255)
        if 0.5 * 2.0 ** (scale - 127) >= info.smallest_normal
        and 6 * 2.0 ** (scale - 127) <= info.max]
print(f"{len(left)}: from {left[0]} to {left[-1]}")

# %% [markdown]
# ### Exercise 2
#
# The table could hold the values as they are and *add* the scale where the
# value is not zero. Count the instructions for 128 weights: with a subtraction
# that stops at zero, with max and difference, and with that test.

# %% tags=["hide-cell"]
others = 3 + 4 + 4  # shift, look up; the scales
for words, each in (("stops at zero", 1), ("max, difference", 2),
                    ("test, add where it holds", 2)):
    print(f"{words}: {others + 4 * each}")
# On a Zen 4 the second is quickest, on the Xeon the first: what counts is the
# units that they need.

# %% [markdown]
# ### Exercise 3
#
# A group of twelve tokens takes strips of two rows, one of six takes four.
# Count loads of activations for each product in both, and for eight tokens as
# two groups of four with four rows.

# %% tags=["hide-cell"]
for R, T, words in ((4, 6, "four rows, six tokens"),
                    (2, 12, "two rows, twelve tokens"),
                    (4, 4, "four rows, four tokens")):
    print(f"{words}: {R * T} sums, {T / (R * T):.2f} such loads a product, "
          f"decoded for {T}")

# %% [markdown]
# ## Sources
#
# - Open Compute Project, *OCP Microscaling Formats (MX) v1.0*, 2023: values,
#   scales, blocks of 32.
# - Instructions `vdpbf16ps`, `vpermw`, `vpsubusw`:
#   https://www.intel.com/content/www/us/en/docs/intrinsics-guide
