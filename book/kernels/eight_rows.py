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
# # How are eight bits multiplied at memory's speed?
#
# ## Question
#
# [Eight bits](eight_bits.ipynb) halve what a token reads of the dense
# matrices. That is worth something only if a processor is done with 64 weights
# before the next 64 arrive: in some five cycles of a core. Making floats of
# them takes longer than that with AVX2. How is it done without?

# %%
import logging
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from gptoss.kernels.build import load_kernels
from gptoss.kernels.eight import pack_eight, unpack_eight

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
load_kernels()
torch.manual_seed(0)
matrix = (0.02 * torch.randn(512, 2880)).bfloat16()
eight = pack_eight(matrix)
back = unpack_eight(eight)


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """How far apart, as a share of the length of `right`."""
    right = right.double()
    return ((found.double() - right).norm() / right.norm()).item()


print(f"{matrix.numel():,} weights, {matrix.nbytes:,} bytes in bf16, "
      f"{eight.nbytes:,} in eight bits")

# %% [markdown]
# ## Picture
#
# Sixty-four weights are two blocks of 32, under a scale each, and 64 bytes.
# Multiplied are numbers of 16 bits, and a register of AVX-512 has 32 of them.
# If the first 32 bytes were the first block, each register of sums would
# belong to one scale, and be multiplied with it. So the blocks are laid in
# halves:

# %% tags=["hide-input"]
# Figure: 64 bytes in a row, four pieces of 16: the first half of block A, the
# first of block B, the second of A, the second of B. Below, two registers of
# 16-bit numbers, each with half of A and half of B, whose products are added
# into one register of sums: eight lanes of A, eight of B.
fig, ax = plt.subplots(figsize=(6.4, 2.6))
pieces = (("A, 0 to 15", "C0"), ("B, 0 to 15", "C1"), ("A, 16 to 31", "C0"),
          ("B, 16 to 31", "C1"))
for i, (text, color) in enumerate(pieces):
    for x, y, width in ((4 * i, 3, 4), (8.2 * (i // 2) + 4 * (i % 2), 1.6, 4)):
        ax.add_patch(plt.Rectangle((x, y), width, 0.7, fc=color, ec="white",
                                   alpha=0.5))
        ax.text(x + width / 2, y + 0.35, text, ha="center", va="center",
                fontsize=8)
for i, (text, color) in enumerate((("8 sums of A", "C0"), ("of B", "C1"))):
    ax.add_patch(plt.Rectangle((4.1 + 4 * i, 0.2), 4, 0.7, fc=color,
                               ec="white", alpha=0.5))
    ax.text(6.1 + 4 * i, 0.55, text, ha="center", va="center", fontsize=8)
ax.text(16.6, 3.35, "bytes", va="center", fontsize=8)
ax.text(16.6, 1.95, "in 16 bits", va="center", fontsize=8)
ax.text(16.6, 0.55, "in 32 bits", va="center", fontsize=8)
ax.set(xlim=(-0.2, 20), ylim=(0, 3.9))
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: two registers, and one of sums. Its lower half belongs to one
# block and its upper half to the other, so both scales are multiplied at once.
# A register of AVX2 is half as wide and holds one block.
#
# ## The naive version
#
# A weight becomes a float, gets its scale, is multiplied with the activation
# and added. In a register of eight floats 32 weights need four times: widen to
# 32 bits, make a float, multiply with the scale, multiply and add. With whole
# numbers they need two times: widen to 16 bits, multiply and add pairs; and
# then once: make floats of the sums, multiply with two steps, add.

# %%
by_floats = 4 * len(("widen", "float", "scale", "multiply and add"))
by_integers = 2 * len(("widen", "multiply and add")) + 1 + len(
    ("float", "step of x", "step of w, and add"))
print(f"instructions for 32 weights with AVX2: {by_floats} by floats, "
      f"{by_integers} by integers (one of them adds the two registers)")
assert by_integers < by_floats

# %% [markdown]
# ## Derivation
#
# A weight is a whole number of steps, so let the activations be whole, too:
# [packed](packed.ipynb) does so, with sixteen bits and a step of its own, a
# power of two, for each 32 numbers. What was stored in bf16 fits in without a
# loss unless it is very small beside its neighbours. The products of a block
# are then summed in integers, exactly, and the sum gets both steps once:
#
# $$ y = \sum_{\text{blocks}} s_w \, s_x \sum_{i < 32} w_i \, x_i .
# $$ (kernels-eight)
#
# For one row and one token, in numpy:

# %%
place = torch.arange(64).view(2, 2, 16).transpose(0, 1).flatten()
token = torch.randn(2880).bfloat16()
blocks = token.double().numpy().reshape(-1, 32)
power = np.frexp(np.abs(blocks).max(-1))[1] - 14.0
q = np.round(blocks / np.exp2(power)[:, None]).astype(np.int64)
w = eight.values[0].view(-1, 64)[:, place].numpy().reshape(-1, 32)
whole = (w.astype(np.int64) * q).sum(-1)  # a sum for each block
steps = eight.scales[0].view(torch.bfloat16).double().numpy()
found = float(whole @ (steps * np.exp2(power)))
right = (back[0].double() @ token.double()).item()
print(f"by integers {found:.4f}, in float64 {right:.4f}; the largest integer "
      f"is {np.abs(q).max()}")
assert abs(found - right) < 1e-3 * abs(right)

# %% [markdown]
# ## Code
#
# ### How is a row multiplied with some tokens?
#
# In C++ `Integers` are the tokens, rounded by `nearest` of
# [packed](packed.ipynb). They lie in the order of the weights' bytes.

# %% [markdown] tags=["export:integers.h"]
# ```cpp
# namespace {
#
# // 64 weights, two blocks: of each the first half, then the second halves
# constexpr int64_t GROUP = 64, HALF = 16;
#
# // where the first half of block b begins, in a row
# inline int64_t place(int64_t b) { return b / 2 * GROUP + b % 2 * HALF; }
#
# inline float wide_scale(uint16_t bits) {
#   const uint32_t wide = uint32_t(bits) << 16;
#   return load<float>(&wide);
# }
#
# struct Eight {
#   const int8_t* values;    // (rows, n)
#   const uint16_t* scales;  // (rows, n / 32): bf16
#   int64_t rows, n;
# };
#
# struct Integers {  // tokens in 16 bits, and the steps of their blocks
#   Array<int16_t> values;
#   Buffer steps;
#
#   explicit Integers(const Buffer& x)
#       : values(x.size()), steps(x.size() / BLOCK) {
#     for (size_t b = 0; b < steps.size(); ++b) {
#       const Shorts near = nearest(&x[b * BLOCK], STORED, steps[b]);
#       for (int half = 0; half < 2; ++half)
#         std::memcpy(&values[place(b) + 2 * half * HALF],
#                     reinterpret_cast<const char*>(&near) + 32 * half, 32);
#     }
#   }
# };
# ```

# %% [markdown]
# A processor widens bytes to 16 bits, multiplies pairs and adds them in one
# instruction: 32 weights in two with AVX2, 64 with AVX-512, where each half
# of a register is a block and gets a step of its own (`spread`). These few
# lines are all that the two do not share.

# %% [markdown] tags=["export:integers.h"]
# ```cpp
# #ifdef GPTOSS_AVX512
# inline Bytes widen(const int8_t* from) {
#   return _mm512_cvtepi8_epi16(load<__m256i>(from));
# }
#
# inline Words add_pairs(Words sums, Bytes a, Bytes b) {
#   return (Words)_mm512_dpwssd_epi32((Bytes)sums, a, b);
# }
#
# inline Sums spread(const float* two) {  // each in eight lanes
#   const Words lane = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
#   return (Sums)_mm512_permutevar_ps(
#       (__m512)_mm512_set1_pd(load<double>(two)), (Bytes)lane);
# }
#
# inline Sums spread(const uint16_t* two) {
#   constexpr int ONE = 0x01008080, TWO = 0x03028080;  // 80: a zero byte
#   const Words bytes = {ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE,
#                        TWO, TWO, TWO, TWO, TWO, TWO, TWO, TWO};
#   return (Sums)_mm512_shuffle_epi8(_mm512_set1_epi32(load<int32_t>(two)),
#                                    (Bytes)bytes);
# }
# #elif defined(GPTOSS_AVX2)
# inline Bytes widen(const int8_t* from) {
#   return _mm256_cvtepi8_epi16(load<__m128i>(from));
# }
#
# inline Words add_pairs(Words sums, Bytes a, Bytes b) {
# #ifdef GPTOSS_VNNI
#   return (Words)_mm256_dpwssd_avx_epi32((Bytes)sums, a, b);
# #else
#   return sums + (Words)_mm256_madd_epi16(a, b);
# #endif
# }
#
# inline Sums spread(const float* one) { return Sums{} + *one; }
# inline Sums spread(const uint16_t* one) { return Sums{} + wide_scale(*one); }
# #endif
# ```

# %% [markdown]
# The product of R rows and T tokens. A weight is loaded and widened once for
# all T tokens; a token's integers once for all R rows. So up to four tokens
# cost little more than one, as long as memory is what takes the time.

# %% [markdown] tags=["export:integers.h"]
# ```cpp
# // out[t][0], out[t][step] ...: R rows, `step` rows apart, times T tokens
# #ifdef GPTOSS_AVX2
# template <int R, int T>
# void eight_dots(const Eight& w, int64_t row, int64_t step,
#                 const Integers& x, int64_t token, float* out) {
#   const int64_t n = w.n, blocks = n / BLOCK;
#   const int8_t* weights = w.values + row * n;
#   const uint16_t* scales = w.scales + row * blocks;
#   const int16_t* values = &x.values[token * n];
#   const float* steps = &x.steps[token * blocks];
#   Sums total[R][T] = {};
#   for (int64_t b = 0; b < blocks; b += SIDE / 2) {
#     Bytes q[T][2];
#     Sums size[T];
#     for (int t = 0; t < T; ++t) {
#       for (int half = 0; half < 2; ++half)
#         q[t][half] = load<Bytes>(values + t * n + place(b)
#                                  + 2 * half * HALF);
#       size[t] = spread(steps + t * blocks + b);
#     }
#     for (int r = 0; r < R; ++r) {
#       const int8_t* from = weights + r * step * n + place(b);
#       if (b % 2 == 0) ask_ahead(from);
#       const Bytes w0 = widen(from), w1 = widen(from + 2 * HALF);
#       const Sums scale = spread(scales + r * step * blocks + b);
#       for (int t = 0; t < T; ++t) {
#         const Words dot = add_pairs(add_pairs(Words{}, w0, q[t][0]), w1,
#                                     q[t][1]);
#         total[r][t] += __builtin_convertvector(dot, Sums) * size[t] * scale;
#       }
#     }
#   }
#   for (int r = 0; r < R; ++r)
#     for (int t = 0; t < T; ++t)
#       out[t * w.rows + r * step] = sum(total[r][t]);
# }
# #else
# template <int R, int T>
# void eight_dots(const Eight& w, int64_t row, int64_t step,
#                 const Integers& x, int64_t token, float* out) {
#   const int64_t n = w.n, blocks = n / BLOCK;
#   for (int64_t i = 0; i < R * T; ++i) {
#     const int64_t r = row + i / T * step, t = token + i % T;
#     float total = 0;
#     for (int64_t b = 0; b < blocks; ++b) {
#       int32_t dot = 0;
#       for (int64_t k = place(b); k < place(b) + 3 * HALF;
#            k += 2 * HALF)
#         for (int j = 0; j < HALF; ++j)
#           dot += w.values[r * n + k + j] * x.values[t * n + k + j];
#       total += dot * (x.steps[t * blocks + b]
#                       * wide_scale(w.scales[r * blocks + b]));
#     }
#     out[i % T * w.rows + i / T * step] = total;
#   }
# }
# #endif
#
# template <int T>
# void eight_rows(const Eight& w, int64_t row0, int64_t rows,
#                 const Integers& x, int64_t token, float* out) {
#   const int64_t step = rows / STREAMS;
#   for (int64_t r = 0; r < step; ++r)
#     eight_dots<STREAMS, T>(w, row0 + r, step, x, token, out + r);
#   for (int64_t r = STREAMS * step; r < rows; ++r)
#     eight_dots<1, T>(w, row0 + r, 0, x, token, out + r);
# }
#
# // y (N, rows) = x (N, n) times the weight transposed, for a few tokens
# void eight_few(const Eight& w, const Buffer& tokens, int64_t N, Buffer& y) {
#   constexpr int64_t HEIGHT = 128;  // stays in L2 for the next four tokens
#   const Integers x(tokens);
#   share((w.rows + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
#     const int64_t row0 = item * HEIGHT;
#     const int64_t rows = std::min(HEIGHT, w.rows - row0);
#     for (int64_t t = 0, some; t < N; t += some) {
#       some = std::min<int64_t>(N - t, 4);
#       with_count<4>(some, [&](auto T) {
#         eight_rows<T.value>(w, row0, rows, x, t, &y[t * w.rows + row0]);
#       });
#     }
#   });
# }
#
# }  // namespace
# ```

# %% [markdown]
# ### And many tokens?
#
# Where arithmetic is the limit, bytes do not help; what counts is how many
# instructions a product takes. The obvious way is to make bf16 of a strip of
# the matrix and to pass that through `linear` of [dense](dense.ipynb). But
# without bf16 units `linear` multiplies floats, eight an instruction. Integers
# of sixteen bits are multiplied sixteen at a time, and for them
# [a tile](many_rows.ipynb) exists already: four bits are unpacked into it, and
# eight fit as well. Is it worth that? We count what the loops need:

# %%
def count(loads: int, others: int, products: int) -> float:
    """Instructions a product, of an inner loop."""
    return (loads + others) / products


floats = count(2 + 6, 12, 96)  # `multiply_some`: 16 rows, six tokens
tiled = count(2 + 5, 10 + 10, 160)  # `multiply_tile`: two columns, five
rows = count(8 + 4, 4 * (5 + 4 * 7), 512)  # `eight_dots`: four rows, four
decode = count(2 * 16, 2 * (64 + 3 * 16) + 16 * 4, 512)  # a block of 16 rows
print(f"{floats:.2f} instructions a product by floats, {tiled:.2f} by a tile, "
      f"{rows:.2f} row by row")
for tokens in (4, 8, 10, 16, 128):
    groups = -(-tokens // 5)  # five at a time, the last of them perhaps fewer
    print(f"{tokens:3} tokens: {rows * tokens:5.2f} instructions for a weight "
          f"row by row, {decode + 5 * tiled * groups:5.2f} by tiles")

# %% [markdown]
# By this count a tile repays its decoding from about nine tokens on, and needs
# less than floats do. How is it filled? A token's `Line` has the even numbers
# of a block first, then the odd ones. Two neighbours there must meet two
# columns side by side: 0 and 2, 4 and 6, ..., then 1 and 3 and so on. The
# bytes of a block come in two halves of sixteen, and `transpose` turns sixteen
# rows of sixteen bytes into columns. In numpy:

# %%
some = eight.values[:16].view(16, -1, 64)[:, :, place].numpy()
halves = some.reshape(16, -1, 2, 16).transpose(1, 2, 3, 0)  # their columns
sides = [(i + u, i + u + 2) for u in (0, 1) for i in range(0, 16, 4)]
tile = np.stack([np.stack([halves[:, :, a], halves[:, :, b]], -1)
                 for a, b in sides], 2)  # block, half, pair, row, side
line = np.stack([q.reshape(-1, 2, 16)[:, :, list(pair)] for pair in sides], 2)
sums = np.einsum("bhpri,bhpi->br", tile.astype(np.int64), line)
steps = eight.scales[:16].view(torch.bfloat16).double().numpy()
found = np.einsum("br,rb,b->r", sums, steps, np.exp2(power))
right = (back[:16].double() @ token.double()).numpy()
print("side by side in a half:", *sides)
print(f"the first of sixteen rows: {found[0]:.4f} by a tile, {right[0]:.4f} "
      "in float64")
assert np.allclose(found, right, atol=1e-4)

# %% [markdown]
# Everything else is there: `quantised` makes the lines of the tokens, and
# `rows_for_many` takes the tiles. It multiplies with *half* a token's step,
# since four bits are doubled in a tile; so here the factor of a row is twice
# its scale. Where 16 does not divide the number of rows, the last one is
# repeated.

# %% [markdown] tags=["export:eight.h"]
# ```cpp
# namespace {
#
# #if defined(GPTOSS_AVX2) && !defined(GPTOSS_BF16)
# constexpr int64_t FEW_TOKENS = 12;  // more: tiles
#
# static_assert(CHUNK % 2 == 0);  // whole groups
#
# // blocks first ... first + count - 1 of rows row ... row + 15
# void decode_eight(const Eight& w, int64_t row, int64_t first, int64_t count,
#                   Tile& tile) {
#   const int8_t* rows[ROWS];
#   for (int64_t r = 0; r < ROWS; ++r) {
#     const int64_t at = std::min(row + r, w.rows - 1) * w.n + first * BLOCK;
#     rows[r] = w.values + at;
#     for (int64_t b = 0; b < count; ++b)
#       tile.factors[b][r] = 2 * wide_scale(w.scales[at / BLOCK + b]);
#   }
#   for (int64_t b = 0; b < count; ++b)
#     for (int half = 0; half < 2; ++half) {
#       __m128i v[ROWS];
#       for (int64_t r = 0; r < ROWS; ++r)
#         v[r] = load<__m128i>(rows[r] + place(b) + 2 * half * HALF);
#       transpose(v);
#       for (int i = 0; i < 16; i += 4)
#         for (int u = 0; u < 2; ++u)
#           put_pair(v[i + u], v[i + u + 2],
#                    tile.values[b][u][4 * half + i / 4]);
#     }
# }
#
# // as eight_few, for many tokens
# Tensor eight_many(const Eight& w, const Tensor& x,
#                   const std::optional<Tensor>& bias) {
#   const int64_t N = x.numel() / w.n;
#   const Quantised tokens = quantised(floats(x).data(), STORED, N,
#                                      w.n / BLOCK, false);
#   std::vector<int64_t> all(N);
#   for (int64_t i = 0; i < N; ++i) all[i] = i;
#   auto shape = x.sizes().vec();
#   shape.back() = w.rows;
#   Tensor y = at::empty(shape, x.options());
#   const Tensor b = bias ? bias->contiguous() : Tensor();
#   const Number* add = bias ? numbers(b) : nullptr;
#   auto to = static_cast<Number*>(y.data_ptr());
#   share((w.rows + ROWS - 1) / ROWS, 2, [&](int64_t item) {
#     const int64_t row = item * ROWS, rows = std::min(ROWS, w.rows - row);
#     Buffer out(N * ROWS);
#     rows_for_many([&](int64_t first, int64_t count, Tile& tile) {
#       decode_eight(w, row, first, count, tile);
#     }, tokens, all, out.data());
#     for (int64_t i = 0; i < N; ++i)
#       finish(&out[i * ROWS], add ? add + row : nullptr, rows,
#              to + i * w.rows + row);
#   });
#   return y;
# }
# ```

# %% [markdown]
# ### And where there are bf16 units?
#
# There an instruction multiplies 32 pairs of bf16 and adds them, so bf16 is
# what the arithmetic allows. `multiplied`, of [dense](dense.ipynb), takes 128
# rows at a time and asks where they are. We unpack them first, as bf16, into
# memory of the thread's own, and give that address: 720 KiB for 2880 columns,
# which a second cache of 2 MiB holds until all tokens have passed (and one of
# 1 MiB, as a Zen has, only in part). So memory is read for eight bits alone.
# torch's own product is not asked here, since it would want the whole matrix
# in bf16. Without AVX2 it is: strips of 16 MiB go through `linear` there. The
# matrix in the file must not be read instead: then a text that was read at
# once and one that was read token by token would come from two models.
#
# A step times a whole number has up to fifteen bits; bf16 keeps eight. That is
# a second rounding, on top of the first:

# %%
print(128 * 2880 * 2 // 1024, "KiB of 128 rows in bf16,",
      (1 << 23) * 2 >> 20, "MiB of a strip")
both = unpack_eight(eight, torch.bfloat16)
x = torch.randn(64, 2880, dtype=torch.float64)
product = x @ matrix.double().T
print(f"in eight bits: off by {off(back, matrix):.3f}, in bf16 again: "
      f"{off(both, matrix):.3f}; between the two {off(both, back):.4f}")
for name, found in (("integers", back), ("bf16", both)):
    print(f"{name:8}: a product is off by "
          f"{off(x @ found.double().T, product):.2%}")
assert off(both, matrix) < 1.1 * off(back, matrix)

# %% [markdown]
# The two differ by less than a result changes when it is stored in bf16, and
# either is as far from the original matrix as the other.

# %% [markdown] tags=["export:eight.h"]
# ```cpp
# #else
# constexpr int64_t FEW_TOKENS = 8;  // more: in bf16
#
# // a group of two blocks in bf16
# inline void unpack(const int8_t* from, const uint16_t* scales, Number* to) {
# #ifdef GPTOSS_BF16
#   const Bytes two = _mm512_set1_epi32(load<int32_t>(scales));
#   const __m512 scale[] = {
#       (__m512)_mm512_slli_epi32(two, 16),
#       (__m512)_mm512_and_si512(two, _mm512_set1_epi32(0xffff0000))};
# #pragma GCC unroll 2
#   for (int i = 0; i < 2; ++i, from += HALF, to += BLOCK) {
#     auto half = [&](int h) INLINE {
#       return scale[i] * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
#                             load<__m128i>(from + 2 * HALF * h)));
#     };
#     _mm512_storeu_si512(to, (Bytes)_mm512_cvtne2ps_pbh(half(1), half(0)));
#   }
# #else
#   using Few = int8_t __attribute__((vector_size(8)));
#   for (int64_t k = 0; k < GROUP; k += 8) {
#     const int64_t at = place(k / BLOCK) + k % BLOCK / HALF * 2 * HALF;
#     narrow(__builtin_convertvector(load<Few>(from + at + k % HALF), Floats)
#                * wide_scale(scales[k / BLOCK]),
#            to + k);
#   }
# #endif
# }
#
# // rows first ... first + count - 1 in bf16
# void unpack_rows(const Eight& w, int64_t first, int64_t count, Number* to) {
#   const int8_t* from = w.values + first * w.n;
#   const uint16_t* scales = w.scales + first * w.n / BLOCK;
#   for (int64_t i = count * w.n / GROUP; i--;
#        from += GROUP, scales += 2, to += GROUP) {
#     ask_ahead(from);
#     unpack(from, scales, to);
#   }
# }
#
# #ifdef GPTOSS_BF16
# struct Unpacked {  // by the thread that asks
#   static constexpr bool FRESH = false;
#   const Eight& w;
#   const Number* rows(int64_t first, int64_t count) const {
#     thread_local Array<Number> to;
#     if (int64_t(to.size()) < count * w.n) to.resize(count * w.n);
#     unpack_rows(w, first, count, to.data());
#     return to.data();
#   }
# };
#
# // as eight_few, for many tokens
# Tensor eight_many(const Eight& w, const Tensor& x,
#                   const std::optional<Tensor>& bias) {
#   return multiplied(x, Unpacked{w}, w.rows, w.n, bias);
# }
# #else
# // the same: strips pass through `linear`
# Tensor eight_many(const Eight& w, const Tensor& x,
#                   const std::optional<Tensor>& bias) {
#   auto shape = x.sizes().vec();
#   shape.back() = w.rows;
#   Tensor y = at::empty(shape, x.options());
#   const int64_t HEIGHT = std::max<int64_t>(64, (1 << 23) / w.n / 64 * 64);
#   Tensor scratch = at::empty({std::min(HEIGHT, w.rows), w.n}, x.options());
#   for (int64_t first = 0; first < w.rows; first += HEIGHT) {
#     const int64_t rows = std::min(HEIGHT, w.rows - first);
#     const Tensor strip = scratch.narrow(0, 0, rows);
#     auto to = static_cast<Number*>(strip.data_ptr());
#     at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
#       unpack_rows(w, first + begin, end - begin, to + begin * w.n);
#     });
#     std::optional<Tensor> part;
#     if (bias) part = bias->narrow(0, first, rows);
#     y.narrow(-1, first, rows).copy_(linear(x, strip, part));
#   }
#   return y;
# }
# #endif
# #endif
# ```

# %% [markdown] tags=["measured"]
# How many are few? With AMX integers and unpacked rows take as long as each
# other at six or seven tokens, without it at more. Integers round once, bf16
# twice. So up to eight are few, although with AMX eight of them take longer
# than in bf16. Before tiles it is twelve: up to there neither is quicker by
# more than the measurement wavers, and from 13 on the tile is.
#
# ### Rounding in C++
#
# The page of torch needs 30 bytes for each number. The C++ reads a row at a
# time, and gives the very same bytes.

# %% [markdown] tags=["export:eight.h"]
# ```cpp
# void pack_eight_row(const Number* w, int64_t n, int8_t* to,
#                     uint16_t* scales) {
#   for (int64_t b = 0; b < n / BLOCK; ++b, w += BLOCK) {
#     Floats part[4];
#     for (int i = 0; i < 4; ++i) part[i] = widen(w + 8 * i);
#     const float finest = largest(part) / 127;
#     scales[b] = (load<uint32_t>(&finest) + 0xffff) >> 16;
#     const float step = scales[b] ? wide_scale(scales[b]) : 1;
#     const auto all = (Whole)(load<Reals>(part) / step + 12582912.0f);
#     const Digits near = __builtin_convertvector(all - 0x4b400000, Digits);
#     for (int half = 0; half < 2; ++half)
#       std::memcpy(to + place(b) + 2 * half * HALF,
#                   reinterpret_cast<const char*>(&near) + HALF * half, HALF);
#   }
# }
#
# // weight (rows, n) bf16, finite -> values, scales
# std::tuple<Tensor, Tensor> pack_eight(const Tensor& weight) {
#   TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2
#                   && weight.is_contiguous() && weight.size(1) % GROUP == 0,
#               "pack_eight: weight: expected contiguous bfloat16 (m, n), 64 "
#               "dividing n, found ", weight.scalar_type(), " ",
#               weight.sizes());
#   const int64_t rows = weight.size(0), n = weight.size(1);
#   Tensor values = at::empty({rows, n}, at::kChar);
#   Tensor scales = at::empty({rows, n / BLOCK}, at::kShort);
#   int8_t* to = values.data_ptr<int8_t>();
#   auto steps = reinterpret_cast<uint16_t*>(scales.data_ptr<int16_t>());
#   share(rows, 16, [&](int64_t r) {
#     pack_eight_row(numbers(weight) + r * n, n, to + r * n,
#                    steps + r * (n / BLOCK));
#   });
#   return {values, scales};
# }
#
# Tensor eight_linear(const Tensor& x, const Tensor& values,
#                     const Tensor& scales,
#                     const std::optional<Tensor>& bias) {
#   const int64_t m = values.dim() == 2 ? values.size(0) : 0;
#   const int64_t n = m ? values.size(1) : 0;
#   const bool fits = m && n && ours({x, bias.value_or(x)})
#                     && values.scalar_type() == at::kChar
#                     && scales.scalar_type() == at::kShort
#                     && values.is_contiguous() && scales.is_contiguous()
#                     && n % GROUP == 0 && has(scales, {m, n / BLOCK})
#                     && !(bias && !has(*bias, {m})) && x.numel() && x.dim()
#                     && x.size(-1) == n;
#   if (!fits)
#     return plain<decltype(eight_linear)>("eight_linear", x, values, scales,
#                                          bias);
#   const Eight w{values.const_data_ptr<int8_t>(),
#                 reinterpret_cast<const uint16_t*>(
#                     scales.const_data_ptr<int16_t>()), m, n};
#   const int64_t N = x.numel() / n;
#   if (N > FEW_TOKENS) return eight_many(w, x, bias);
#   Buffer y(N * m);
#   eight_few(w, floats(x), N, y);
#   add_bias(y, bias);
#   return result(x, m, y);
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("eight_linear", eight_linear);
#   m.impl("pack_eight", pack_eight);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# **The product** beside float64 and the rounded matrix. What is left is that
# the result is stored in bf16 and, where many tokens take bf16, the second
# rounding:

# %%
exactly = unpack_eight(eight, torch.float64)
for tokens in (1, 3, 8, 40):
    x = torch.randn(tokens, 2880).bfloat16()
    with torch.inference_mode():
        y = torch.ops.gptoss.eight_linear(x, *eight, None)
    error = off(y, x.double() @ exactly.T)
    print(f"{tokens:2} tokens: off by {error:.3f}")
    assert error < (2.2e-3 if tokens <= 8 else 3.5e-3)

# %% [markdown]
# ## In the 20b and the 120b
#
# What is measured is told by `bench/dense.py`, as ratios within one run.

# %% [markdown] tags=["measured"]
# Two cores of a Zen 4 with AVX-512, shared with others, on 2026-11-29; the
# best of three rounds in turn. How many times as fast as the product with the
# matrix in bf16 (1.88 is what the bytes allow for one token):
#
# | matrix | tokens | AVX-512: 12 bits | 8 bits | AVX2: 12 bits | 8 bits |
# |---|---|---|---|---|---|
# | 4096 x 2880 | 1 | 1.30 | 1.54 | | |
# | | 2 | 1.26 | 1.82 | | |
# | | 4 | 1.00 | 1.59 | | |
# | | 8 | 1.01 | 2.97 | 1.00 | 2.49 |
# | 201,088 x 2880 | 1 | 1.18 | 1.68 | 1.26 | 1.76 |
# | | 2 | 1.03 | 1.94 | 1.10 | 1.84 |
# | | 4 | 0.97 | 1.45 | 1.18 | 2.23 |
# | | 8 | 0.99 | 2.83 | 1.01 | 2.69 |
#
# Where memory is slow, one token takes what its bytes take. Where it is quick
# (50 GB/s, the smaller matrix on AVX-512) the instructions take longer than
# the bytes: the loss against 1.88. From two tokens on eight bits gain more
# than their bytes say, since each weight is read once for all of them.

# %% [markdown] tags=["measured"]
# Many tokens, on two cores of a Zen 3 with AVX2, shared with others, on
# 2026-11-29 (`bench/rows.py --products eight,linear`); milliseconds on one
# core, the best of three rounds in turn:
#
# | matrix | tokens | bf16, `linear` | 8 bits, strips | 8 bits, tiles |
# |---|---|---|---|---|
# | 4096 x 2880 | 9 | 10.1 | 14.5 | 3.8 |
# | | 16 | 10.4 | 16.4 | 5.9 |
# | | 32 | 15.3 | 18.9 | 9.2 |
# | | 128 | 42 | 46 | 31 |
# | | 512 | 155 | 180 | 126 |
# | 2880 x 4096 | 9 | 9.2 | 12.7 | 3.7 |
# | | 16 | 10.0 | 14.0 | 6.2 |
# | | 32 | 15.1 | 19.3 | 9.8 |
# | | 128 | 42 | 47 | 32 |
# | | 512 | 167 | 179 | 145 |
#
# (Nine tokens go row by row beside tiles.) Unpacking the strips costs as much
# as a dozen tokens, so they lose most where tokens are few. For 512 what is
# left is arithmetic, and there the tile takes 13 to 19% less time than
# `linear` in bf16; by the count above it was to be a fifth.
#
# Where bf16 units are, strips of 16 MiB take 2.5 to 4.7 ms more than `linear`,
# 128 rows for each core 1.1 at most. Two cores of a Xeon (Emerald Rapids),
# shared with others, 4096 x 2880, on 2026-12-01; milliseconds, in turns:
#
# | units | tokens | bf16, `linear` | 8 bits, 16 MiB | 8 bits, 128 rows |
# |---|---|---|---|---|
# | AMX | 16 | 0.86 | 3.4 | 1.1 |
# | | 32 | 1.0 | 3.6 | 1.3 |
# | | 128 | 2.1 | 5.0 | 2.3 |
# | | 512 | 10.1 | 14.8 | 10.1 |
# | AVX512-BF16 | 9 | 2.1 | 6.1 | 3.0 |
# | | 16 | 3.6 | 7.5 | 4.4 |
# | | 32 | 6.9 | 11.3 | 8.0 |
# | | 128 | 29.6 | 33.0 | 27.8 |
#
# With AMX the head of the 20b takes 16 tokens in 42 ms in bf16, in 206 by
# strips, in 53 by 128 rows. Few tokens, by integers, 4096 x 2880: four take
# 0.60 ms (bf16 0.83), eight 1.14 (bf16 0.82).

# %% [markdown]
# ## Takeaways
#
# - Widening is what eight bits cost a processor: to 16 bits it is cheap, to
#   floats of 32 it is not.
# - Sums of a block are exact in integers; both steps are multiplied once.
# - A weight that is in a register serves all tokens at hand; so two, three and
#   four tokens cost little more than one.
# - Many tokens read the same eight bits, by tiles of integers or, where a
#   processor multiplies bf16, as bf16 that each core unpacks for itself; the
#   matrix in the file is another model's.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The sums of a block are kept in 32 bits. Can they run over?

# %% tags=["hide-cell"]
most = 32 * 127 * 255 * 2 ** 6  # 32 products of the largest integers
print(f"{most:,} of {2 ** 31 - 1:,}")
assert most < 2 ** 31

# %% [markdown]
# ### Exercise 2
#
# An activation is a whole number of steps of its block, and the step is the
# largest one's power of two over $2^{13}$. From which share of the largest
# downwards are bf16 numbers no longer exact?

# %% tags=["hide-cell"]
block = torch.tensor([1.0] + [0.0] * 31)
for power in range(5, 9):  # seven bits of mantissa below that
    block[1] = 255 / 128 * 2.0 ** -power
    near = (block[1] * 8192).round() / 8192
    print(f"{block[1].item():.5f} of the largest becomes {near.item():.5f}")
assert near != block[1]

# %% [markdown]
# ### Exercise 3
#
# Why do `Integers` have a step of their own for each 32 numbers, and not one
# for a token? Take a token in which one number is a thousand times the others.

# %% tags=["hide-cell"]
token = torch.randn(2880).bfloat16()
token[100] = 1000.0
for size in (2880, 32):
    parts = token.double().view(-1, size)
    step = parts.abs().amax(-1, keepdim=True).log2().floor().exp2() / 8192
    near = ((parts / step).round() * step).flatten()
    rest = torch.arange(2880) != 100
    print(f"a step for {size:4} numbers: the others are off by "
          f"{off(near[rest], token[rest]):.2%}")

# %% [markdown]
# ## Sources
#
# - Pairs of 16-bit numbers multiplied and added, with and without VNNI: Intel,
#   *Intrinsics Guide*, `_mm256_madd_epi16`, `_mm512_dpwssd_epi32`.
# - How llama.cpp multiplies Q8_0, with activations in eight bits:
#   ggml-org/llama.cpp, `ggml/src/ggml-cpu/arch/x86/quants.c`.
