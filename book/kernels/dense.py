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
#     module: quicker
#     public: [choose_product]
# ---
# %% [markdown]
# # How does a processor multiply bf16 that cannot?
#
# ## Question
#
# Attention and the head are stored in bf16, 2.4 GB of the 3.7 that a token of
# the 20b reads. AVX2 has no instruction that multiplies bf16. How are these
# matrices multiplied as fast as they arrive? And if five tokens come at once,
# must each of them read the matrix again?

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, expert_bytes

plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
token = bytes_read_per_token(big)
in_bf16 = token - 4 * big.num_hidden_layers * expert_bytes(big)
print(f"{in_bf16 / 1e9:.1f} of {token / 1e9:.1f} GB are in bf16")

# %% [markdown]
# ## Picture
#
# A bf16 number is the upper half of a float of 32 bits: the same sign and
# exponent, and seven bits of mantissa instead of 23. So two neighbours in
# memory are two floats already, one of them a little off:

# %% tags=["hide-input"]
# Figure: a 32-bit word made of two bf16 numbers, -3.25 in the upper half and
# 1.5 in the lower. A shift by 16 leaves 1.5 as a float, a mask of the upper 16
# bits leaves -3.25 as a float; zeros fill the other half.
fig, ax = plt.subplots(figsize=(7.0, 2.4))


def word(x: float, y: float, upper: str, lower: str, *colors: str) -> None:
    for n, (text, color) in enumerate(zip((upper, lower), colors,
                                          strict=True)):
        ax.add_patch(plt.Rectangle((x + 4 * n, y), 4, 0.8, fc=color,
                                   ec="white"))
        ax.text(x + 4 * n + 2, y + 0.4, text, ha="center", va="center",
                fontsize=8)


word(0, 1.2, "-3.25", "1.5", "C1", "C4")
ax.text(4, 2.2, "two neighbours in memory: 32 bits", ha="center", fontsize=8)
word(14, 2.2, "1.5", "zeros", "C4", "0.88")
word(14, 0.2, "-3.25", "zeros", "C1", "0.88")
for y, words in ((2.6, "shift left by 16"), (0.6, "mask the upper 16")):
    ax.annotate("", (13.8, y), (8.2, 1.6),
                arrowprops={"arrowstyle": "->", "color": "0.4"})
    ax.text(10.9, 2.55 if y > 1 else 0.45, words, ha="center", fontsize=8)
ax.text(22.3, 2.6, "the even one\nas a float", va="center", fontsize=8)
ax.text(22.3, 0.6, "the odd one\nas a float", va="center", fontsize=8)
ax.set(xlim=(-0.2, 26.5), ylim=(0, 3.3))
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: no table and no rounding. Of eight such pairs in a register, one
# shift makes eight floats of the even numbers and one mask eight of the odd
# ones: two instructions for sixteen weights.

# %% [markdown]
# ## The naive version
#
# In torch the two instructions are these, and a row times a vector is two sums
# of products, as long as the activations are split in the same way. That is
# the kernel for one token, and the only price is that the even and the odd
# activations have to lie apart.

# %%
def halves_of(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd numbers of a bf16 row, as fp32."""
    pairs = row.view(torch.int32)
    return (pairs << 16).view(torch.float32), (pairs & -65536).view(
        torch.float32)


torch.manual_seed(0)
even, odd = halves_of(torch.tensor([1.5, -3.25]).bfloat16())
print(even.item(), odd.item())
row, x = torch.randn(2880).bfloat16(), torch.randn(2880)
even, odd = halves_of(row)
y = even @ x[0::2] + odd @ x[1::2]
print(f"{y.item():.3f} by halves, {(row.float() @ x).item():.3f} at once")
assert abs(y - row.float() @ x) < 1e-3

# %% [markdown]
# Now five tokens. One after the other, each would load every weight again, and
# widen it again. How bad is that? Count what the processor does for a register
# of 16 weights: a load of the weights, two instructions that widen them, and
# for each token two loads of activations and two products.

# %%
def per_product(rows: int, tokens: int) -> float:
    """Instructions a product, if nothing is loaded or widened twice."""
    return (rows * 3 + tokens * 2 + rows * tokens * 2) / (rows * tokens * 2)


for rows, tokens in ((1, 1), (4, 1), (4, 2)):
    print(f"{rows} rows, {tokens} tokens at a time: "
          f"{per_product(rows, tokens):.2f} instructions a product")

# %% [markdown]
# ## Derivation
#
# **A strip.** Some rows of the weight and some tokens make a small rectangle
# of sums. If all of these sums stay in registers while the columns pass, a
# register of weights is loaded and widened once for all tokens, and one of
# activations once for all rows. How large can the rectangle be? AVX2 has 16
# registers. For four rows and $T$ tokens there are $4T$ sums, two for the
# weights at hand (the even and the odd ones), two for each token's
# activations. Processors with **bf16 units** (AVX512-BF16) multiply bf16 as
# it is: `vdpbf16ps` takes 32 numbers of a weight and 32 of a token, and adds
# to each of 16 sums two products. They have 32 registers: $4T$ sums, four
# registers of weights, one of activations.

# %%
for tokens in (1, 2, 3, 6, 7):
    print(f"{tokens} tokens: AVX2 {4 * tokens + 2 + 2 * tokens:2} of 16 "
          f"registers, bf16 units {4 * tokens + 4 + 1:2} of 32")

# %% [markdown]
# So two tokens at a time on AVX2, six with bf16 units. What the instruction
# does, in numpy, and a strip made of it:

# %%
def vdpbf16ps(s: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """s (16,) + two neighbouring products of w and x (32,) for each."""
    return s + (w * x).reshape(16, 2).sum(1)


def strip(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """R rows w (R, n) times T tokens x (T, n) -> (T, R)."""
    sums = np.zeros((len(x), len(w), 16))
    for k in range(0, w.shape[1], 32):  # the columns pass once
        for t, r in np.ndindex(sums.shape[:2]):
            sums[t, r] = vdpbf16ps(sums[t, r], w[r, k:k + 32],
                                   x[t, k:k + 32])
    return sums.sum(-1)  # sixteen lanes become one number


draw = np.random.default_rng(0)
some, six = draw.standard_normal((4, 96)), draw.standard_normal((6, 96))
print(f"a strip's {strip(some, six)[5, 3]:.3f} is {six[5] @ some[3]:.3f}")
assert np.allclose(strip(some, six), six @ some.T)

# %% [markdown]
# ## Code
#
# ### What is a strip on AVX2?
#
# `ready` lays the activations out, eight even ones and then eight odd ones.
# The rows of a strip lie `step` rows apart, so that four streams of memory
# arrive ([packed](packed.ipynb) tells why), and `ask` asks for bytes that will
# be needed soon. A single token has two sums a row, since a product takes four
# cycles and eight sums keep the units busy.

# %% [markdown] tags=["export:strips.h"]
# ```cpp
# namespace {
#
# inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
# inline Floats odd(Ints pairs) {
#   return (Floats)(pairs & int32_t(0xffff0000));
# }
#
# #ifdef GPTOSS_BF16
# using Ready = Number;  // what activations are made before the products
# constexpr int TOGETHER = 6;  // tokens: 24 sums, 4 weights, 1 activation
# constexpr int64_t BY_STRIPS = std::numeric_limits<int64_t>::max();
# #else
# using Ready = float;
# constexpr int TOGETHER = 2;  // tokens: 8 sums, 2 weights, 4 activations
# constexpr int64_t BY_STRIPS = 8;  // more tokens: tiles
# #endif
# constexpr int64_t HALF_ROW = 1440;  // numbers
#
# #ifndef GPTOSS_BF16
# // sixteen at a time, first the eight even ones, then the eight odd ones
# Array<Ready> ready(const Number* x, int64_t count) {
#   Array<Ready> to(count);
#   for (int64_t k = 0; k < count; k += 16) {
#     const Ints pairs = load<Ints>(x + k);
#     store(&to[k], even(pairs)), store(&to[k + 8], odd(pairs));
#   }
#   return to;
# }
#
# // out[t * width + r * step] += R rows of w, `step` apart, times T tokens
# template <int R, int T>
# void strip(const Number* w, int64_t step, const Ready* x, int64_t n,
#            int64_t deep, int64_t ahead, float* out, int64_t width) {
#   constexpr int HALVES = T == 1 ? 2 : 1;  // more sums than a product takes
#   Floats s[T][R][HALVES] = {};
#   for (int64_t k = 0; k < deep; k += 16)
#     for (int r = 0; r < R; ++r) {
#       const Number* from = w + r * step * n + k;
#       ask(from + ahead);
#       const Ints pairs = load<Ints>(from);
#       const Floats a = even(pairs), b = odd(pairs);
#       for (int t = 0; t < T; ++t) {
#         s[t][r][0] += a * load<Floats>(x + t * n + k);
#         s[t][r][HALVES - 1] += b * load<Floats>(x + t * n + k + 8);
#       }
#     }
#   for (int t = 0; t < T; ++t)
#     for (int r = 0; r < R; ++r)
#       out[t * width + r * step] +=
#           sum(HALVES == 2 ? s[t][r][0] + s[t][r][1] : s[t][r][0]);
# }
# ```

# %% [markdown]
# ### And with bf16 units?
#
# The loop is the one in numpy above. At its end each sum is spread over 16
# lanes, and adding them up one register at a time would take a tenth of the
# whole time. Four registers at once: interleave two of them and add, which
# leaves half as many numbers of each, twice; then add the four quarters.

# %% [markdown] tags=["export:strips.h"]
# ```cpp
# #else
# Array<Ready> ready(const Number* x, int64_t count) {
#   return {x, x + count};
# }
#
# inline __m512 add_pairs(__m512 a, __m512 b) {
#   return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
# }
#
# // the sums of four registers
# inline __m128 sums(__m512 s, __m512 t, __m512 u, __m512 v) {
#   const auto a = (__m512d)add_pairs(s, t), b = (__m512d)add_pairs(u, v);
#   const __m512 all = (__m512)_mm512_unpacklo_pd(a, b)
#                      + (__m512)_mm512_unpackhi_pd(a, b);
#   const __m256 half = _mm512_castps512_ps256(all)
#                       + _mm512_extractf32x8_ps(all, 1);
#   return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
# }
#
# // s[t][r] += row r, `apart` numbers after the one before, times token t
# template <int R, int T>
# INLINE inline void add_strip(const Number* w, int64_t apart, const Ready* x,
#                              int64_t n, int64_t deep, int64_t ahead,
#                              __m512 (&s)[T][4]) {
#   for (int64_t k = 0; k < deep; k += BLOCK) {
#     __m512bh rows[R];
# #pragma GCC unroll 4
#     for (int r = 0; r < R; ++r) {
#       const Number* from = w + r * apart + k;
#       ask(from + ahead);
#       rows[r] = load<__m512bh>(from);
#     }
# #pragma GCC unroll 6
#     for (int t = 0; t < T; ++t) {
#       const auto token = load<__m512bh>(x + t * n + k);
# #pragma GCC unroll 4
#       for (int r = 0; r < R; ++r)
#         s[t][r] = _mm512_dpbf16_ps(s[t][r], rows[r], token);
#     }
#   }
# }
#
# template <int R, int T>
# INLINE inline void strip(const Number* w, int64_t step, const Ready* x,
#                          int64_t n, int64_t deep, int64_t ahead,
#                          float* out, int64_t width) {
#   __m512 s[T][4];
#   for (int t = 0; t < T; ++t)
#     for (int r = 0; r < 4; ++r) s[t][r] = __m512{};
#   add_strip<R>(w, step * n, x, n, deep, ahead, s);
#   for (int t = 0; t < T; ++t) {
#     const __m128 four = sums(s[t][0], s[t][1], s[t][2], s[t][3]);
#     for (int r = 0; r < R; ++r) out[t * width + r * step] += four[r];
#   }
# }
# #endif
# ```

# %% [markdown]
# ### Who decides how many tokens a strip takes?
#
# `in_groups` of [packed](packed.ipynb) cuts the tokens into groups of a `T`
# that is known when the code is compiled, `in_strips` the rows into strips.
# One group goes along whole rows. Several would bring all their tokens from
# the L2 cache for each four rows; half as long, rows and tokens fit into L1,
# and what is asked for ahead are the next four rows. (With bf16 units three to
# twelve tokens, but six, go by slabs; [pairs](pairs.ipynb) derives them.)

# %% [markdown] tags=["export:strips.h"]
# ```cpp
# // run(R, first row, how far apart R rows lie): strips of R rows, then what
# // is left one by one. Few tokens wait for memory, which likes rows that lie
# // apart; many get neighbours, whose sums can be stored four at a time
# template <int R, bool FEW, class Run>
# void in_strips(int64_t rows, const Run& run) {
#   const int64_t whole = rows / R;
#   for (int64_t i = 0; i < whole; ++i)
#     if constexpr (FEW) run(Count<R>(), i, whole);
#     else run(Count<R>(), R * i, Count<1>());
#   for (int64_t r = R * whole; r < rows; ++r)
#     run(Count<1>(), r, Count<1>());
# }
#
# // out[t * width + r]: `rows` rows of w (…, n) times N tokens of x (N, n)
# void strips(const Number* w, int64_t rows, const Ready* x, int64_t N,
#             int64_t n, float* out, int64_t width) {
#   for (int64_t t = 0; t < N; ++t) std::fill_n(out + t * width, rows, 0.0f);
#   auto run = [&](auto few, int64_t part, int64_t ahead) {
#     for (int64_t k = 0; k < n; k += part)
#       in_strips<STREAMS, few>(rows, [&](auto R, auto r, auto step) INLINE {
#         in_groups<TOGETHER>(N, [&](auto T, int64_t t) INLINE {
#           strip<R.value, T.value>(
#               w + r * n + k, step, x + t * n + k, n,
#               std::min(part, n - k), ahead, out + t * width + r, width);
#         });
#       });
#   };
#   const int64_t ahead = (N <= LEAN ? NEAR : AHEAD) / 2;  // numbers
#   if (N <= TOGETHER) run(std::true_type(), n, ahead);
#   else run(std::false_type(), HALF_ROW, STREAMS * n);
# }
#
# }  // namespace
# ```

# %% [markdown] tags=["measured"]
# On two cores of a Zen 4 with memory at 60 GB/s the dense matrices of the 20b
# took 45 ms for one token, 55 for six, 120 for sixteen; for 96 a tenth more
# without `INLINE`. On a Zen 5 sixteen took a fifth less by halves of rows.
#
# ### How does a tile of rows become columns?
#
# For a whole prompt AVX2 does better: it multiplies fp32, so sixteen rows are
# widened *once* into a tile, which stays in a cache while all tokens pass. The
# product wants sixteen rows as columns, so that one activation meets sixteen
# weights in two registers. Eight rows of eight pairs are transposed by three
# rounds, each of which interleaves the upper four registers with the lower
# four ([many rows](many_rows.ipynb) shows why that transposes). [The widest
# registers](../cli/wide.ipynb) need this part, too. A `Matrix` is an address
# and the distance from row to row.

# %% [markdown] tags=["export:columns.h"]
# ```cpp
# namespace {
#
# // eight rows of eight numbers become eight columns
# inline void transpose(Ints (&v)[8]) {
#   for (int step = 0; step < 3; ++step) {
#     Ints t[8];
#     for (int i = 0; i < 4; ++i) {
#       t[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10,
#                                          3, 11);
#       t[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13,
#                                              6, 14, 7, 15);
#     }
#     std::copy(t, t + 8, v);
#   }
# }
#
# // pairs of sixteen columns of eight rows, zero from `rows` on, as columns
# inline void pair_columns(const Number* w, int64_t stride, int64_t rows,
#                          Ints (&v)[8]) {
#   for (int64_t r = 0; r < 8; ++r)
#     v[r] = r < rows ? load<Ints>(w + r * stride) : Ints{};
#   transpose(v);
# }
#
# template <class Pointer>
# struct Matrix {  // row-major
#   Pointer at;
#   int64_t stride;
# };
# using Source = Matrix<const float*>;
# using Target = Matrix<float*>;
#
# }  // namespace
# ```

# %% [markdown]
# `widen_tile` takes each pair apart, and the tile is sixteen floats a column:

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# namespace {
#
# // to[k][r] = w[r * stride + k], r < 16, zero from `rows` on; 16 divides n
# void widen_tile(const Number* w, int64_t stride, int64_t rows, int64_t n,
#                 float* to) {
#   for (int64_t half = 0; half < ROWS; half += 8)
#     for (int64_t k = 0; k < n; k += 16) {
#       Ints v[8];
#       pair_columns(w + half * stride + k, stride, rows - half, v);
#       for (int64_t j = 0; j < 8; ++j) {
#         store(to + (k + 2 * j) * ROWS + half, even(v[j]));
#         store(to + (k + 2 * j + 1) * ROWS + half, odd(v[j]));
#       }
#     }
# }
# ```

# %% [markdown]
# In numpy the tile is a transpose, the product the textbook's. What the C++
# adds is that no sum leaves its register while the columns pass: six tokens
# have 12 sums, 2 registers of weights and 1 for the activation.

# %%
def multiply(tile: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out (t, 16) += x (t, n) times the tile (n, 16), column by column."""
    for k in range(len(tile)):  # these sums stay in registers
        out += x[:, k, None] * tile[k]


weight, some = draw.standard_normal((16, 40)), draw.standard_normal((6, 40))
out = np.zeros((6, 16))
multiply(weight.T, some, out)
print(f"{out[5, 15]:.4f} by columns, {some[5] @ weight[15]:.4f} by rows; "
      f"{2 * 6 + 2 + 1} registers")
assert np.allclose(out, some @ weight.T)

# %% [markdown]
# `multiply` takes up to six tokens at a time, in groups that are nearly alike.
# [Attention](attending.ipynb) uses it as well.

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# // out[t][0 ... 15] += sum over k < n of x[t][k] * w[k][0 ... 15]
# template <int COUNT>
# void multiply_some(const float* w, int64_t stride, int64_t n, Source x,
#                    Target out) {
#   Floats s[COUNT][2];
#   for (int t = 0; t < COUNT; ++t)
#     for (int h = 0; h < 2; ++h)
#       s[t][h] = load<Floats>(out.at + t * out.stride + 8 * h);
#   for (int64_t k = 0; k < n; ++k, w += stride) {
#     Floats w0 = load<Floats>(w), w1 = load<Floats>(w + 8);
#     hold(w0), hold(w1);
#     for (int t = 0; t < COUNT; ++t) {
#       const float value = x.at[t * x.stride + k];
#       s[t][0] += w0 * value;
#       s[t][1] += w1 * value;
#     }
#   }
#   for (int t = 0; t < COUNT; ++t)
#     for (int h = 0; h < 2; ++h)
#       store(out.at + t * out.stride + 8 * h, s[t][h]);
# }
#
# constexpr int64_t WIDE = 6;  // twelve sums, two weights, one activation
#
# void multiply(const float* w, int64_t stride, int64_t n, Source x,
#               int64_t count, Target out) {
#   in_groups<WIDE>(count, [&](auto T, int64_t t) {
#     multiply_some<T.value>(w, stride, n, {x.at + t * x.stride, x.stride},
#                            {out.at + t * out.stride, out.stride});
#   });
# }
# ```

# %% [markdown]
# ### Which of them is taken?
#
# With bf16 units strips serve any number of tokens, 96 of them at a time, so
# that they stay in the second cache of a core while 128 rows pass. Without
# them, up to eight tokens go by strips and more by tiles: 64 rows by 256
# columns in fp32 are 64 KiB, which that cache holds as well. With AMX squares
# are quicker from four tokens on: two of rows meet two of tokens, and 128 rows
# stay in the second cache while the tokens pass, 32 at a time. Pass over
# `GPTOSS_AMX` until [AMX](amx.ipynb) derives squares.

# %%
print(64 * 256 * 4 // 1024, "KiB of a widened tile,",
      96 * 2880 * 2 // 1024, "KiB of 96 tokens in bf16,",
      128 * 2880 * 2 // 1024, "of 128 rows")

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# // to (count) = v + bias, rounded
# void finish(const float* v, const Number* bias, int64_t count, Number* to) {
#   int64_t i = 0;
#   for (; i + 8 <= count; i += 8)
#     narrow(bias ? load<Floats>(v + i) + widen(bias + i)
#                 : load<Floats>(v + i), to + i);
#   for (; i < count; ++i) to[i] = bias ? v[i] + float(bias[i]) : v[i];
# }
#
# // tokens from which torch's product is taken, as measured; not for few rows:
# // processes that share a model must all compute the router alike
# std::atomic<int64_t> from_torch{std::numeric_limits<int64_t>::max()};
# constexpr int64_t TALL_ENOUGH = 512;  // rows
#
# #ifdef GPTOSS_AMX
# constexpr int64_t DENSE_SQUARED = 4, SOON = 384;  // tokens; numbers ahead
#
# // N tokens, sixteen beside each other
# Tensor put_beside(const Number* x, int64_t N, int64_t n) {
#   Tensor all = scratch({(N + SQUARE - 1) / SQUARE, SQUARE, n},
#                        at::kBFloat16);
#   auto first = static_cast<Number*>(all.data_ptr());
#   at::parallel_for(0, all.size(0), 1, [&](int64_t begin, int64_t end) {
#     for (int64_t t = SQUARE * begin; t < SQUARE * end; t += SQUARE)
#       beside(x + t * n, std::min(SQUARE, N - t), n, first + t * n);
#   });
#   return all;
# }
#
# // 32 rows times T squares of tokens; fresh: from memory, asked for ahead
# template <int T>
# void multiply_squares(const Number* w, int64_t n, bool fresh,
#                       const Number* x, FourSums& sums) {
#   sums.clear();
#   written();
#   for (int64_t k = 0; k < n; k += BLOCK, x += AREA) {
#     const int64_t soon = k + SOON + (k + SOON < n ? 0 : (BOTH - 1) * n);
#     for (int64_t r = 0; fresh && r < BOTH; ++r) ask(w + r * n + soon);
#     _tile_loadd(4, w + k, 2 * n);
#     _tile_loadd(6, x, 64);
#     _tile_dpbf16ps(0, 4, 6);
#     _tile_loadd(5, w + SQUARE * n + k, 2 * n);
#     _tile_dpbf16ps(1, 5, 6);
#     if (T > 1) {
#       _tile_loadd(7, x + SQUARE * n, 64);
#       _tile_dpbf16ps(2, 4, 7);
#       _tile_dpbf16ps(3, 5, 7);
#     }
#   }
#   sums.keep();
# }
#
# // as `strips`, up to 32 tokens as `put_beside` leaves them
# void dense_squares(const Number* w, int64_t rows, const Number* x, int64_t N,
#                    int64_t n, bool fresh, float* out, int64_t width) {
#   std::vector<Number> copy;
#   FourSums sums;
#   const Registers registers;
#   for (int64_t r = 0; r < rows; r += BOTH) {
#     const Number* from = w + r * n;
#     if (rows - r < BOTH) {  // nothing is read beyond the weight
#       copy.resize(BOTH * n);
#       std::copy_n(from, (rows - r) * n, copy.data());
#       from = copy.data();
#     }
#     (N > SQUARE ? multiply_squares<2> : multiply_squares<1>)(
#         from, n, fresh, x, sums);
#     sums.put(rows - r, N, 1, out + r, width);
#   }
# }
# #endif
#
# constexpr int64_t PIECE = 128, LOT = 96;  // rows; tokens
#
# // y (N, m) = x (N, n) times w (m, n) transposed, plus a bias; weight.rows(r,
# // count): where these lie, until the thread asks again; FRESH: from memory
# template <class Weight>
# void dense_rows(const Number* x, int64_t N, const Weight& weight, int64_t m,
#                 int64_t n, const Number* bias, Number* y) {
# #ifdef GPTOSS_AMX
#   const bool squared = N >= DENSE_SQUARED && lent();
#   const Tensor squares = squared ? put_beside(x, N, n) : Tensor();
#   const int64_t lot = squared ? BOTH : LOT;
# #else
#   constexpr bool squared = false;
#   constexpr int64_t lot = LOT;
# #endif
#   const auto from = ready(x, squared ? 0 : N * n);
#   share((m + PIECE - 1) / PIECE, 1, [&](int64_t item) {
#     const int64_t row0 = item * PIECE, rows = std::min(PIECE, m - row0);
#     const Number* w = weight.rows(row0, rows);
#     float out[LOT * PIECE];
#     for (int64_t t0 = 0; t0 < N; t0 += lot) {
#       const int64_t some = std::min(lot, N - t0);
# #ifdef GPTOSS_AMX
#       if (squared)
#         dense_squares(w, rows, numbers(squares) + t0 * n, some, n,
#                       Weight::FRESH && !t0, out, PIECE);
#       else
# #endif
#       quickest_strips(w, rows, &from[t0 * n], some, n, out, PIECE);
#       for (int64_t t = 0; t < some; ++t)
#         finish(out + t * PIECE, bias ? bias + row0 : nullptr, rows,
#                y + (t0 + t) * m + row0);
#     }
#   });
# }
#
# // the same for many: 64 rows by 256 columns of w stay in the L2 cache
# template <class Weight>
# void dense_tiles(const Buffer& x, int64_t N, const Weight& weight, int64_t m,
#                  int64_t n, const Number* bias, Number* y) {
#   constexpr int64_t HEIGHT = 4 * ROWS, DEPTH = 256;
#   share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
#     const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
#     const Number* w = weight.rows(row0, rows);
#     Buffer tile(HEIGHT * DEPTH), out(N * HEIGHT);
#     for (int64_t k = 0; k < n; k += DEPTH) {
#       const int64_t depth = std::min(DEPTH, n - k);
#       for (int64_t r = 0; r < rows; r += ROWS)
#         widen_tile(w + r * n + k, n, std::min(ROWS, rows - r), depth,
#                    &tile[r * DEPTH]);
#       for (int64_t t = 0; t < N; t += WIDE)
#         for (int64_t r = 0; r < rows; r += ROWS)
#           multiply(&tile[r * DEPTH], ROWS, depth, {&x[t * n + k], n},
#                    std::min(WIDE, N - t), {&out[t * HEIGHT + r], HEIGHT});
#     }
#     for (int64_t t = 0; t < N; ++t)
#       finish(&out[t * HEIGHT], bias ? bias + row0 : nullptr, rows,
#              y + t * m + row0);
#   });
# }
# ```

# %% [markdown]
# ### The operator
#
# What is refused by name is a weight whose columns do not fit x, and a bias of
# another length. A weight that is not in one piece, columns that are no
# multiple of 32, nothing to compute: these are left to plain torch, and so are
# as many tokens as `torch_from` was told.

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# // x times a weight (m, n) transposed, plus a bias
# template <class Weight>
# Tensor multiplied(const Tensor& x, const Weight& weight, int64_t m,
#                   int64_t n, const std::optional<Tensor>& bias) {
#   const Tensor from = x.contiguous();
#   const Tensor b = bias ? bias->contiguous() : Tensor();
#   auto shape = x.sizes().vec();
#   shape.back() = m;
#   Tensor y = at::empty(shape, x.options());
#   const Number* add = bias ? numbers(b) : nullptr;
#   auto to = static_cast<Number*>(y.data_ptr());
#   const int64_t N = x.numel() / n;
#   if (N <= BY_STRIPS) dense_rows(numbers(from), N, weight, m, n, add, to);
#   else dense_tiles(floats(from), N, weight, m, n, add, to);
#   return y;
# }
#
# struct AsStored {
#   static constexpr bool FRESH = true;
#   const Number* w;
#   int64_t n;
#   const Number* rows(int64_t r, int64_t) const { return w + r * n; }
# };
#
# Tensor linear(const Tensor& x, const Tensor& weight,
#               const std::optional<Tensor>& bias) {
#   if (!ours({x, weight, bias.value_or(x)}) || weight.dim() != 2)
#     return plain<decltype(linear)>("linear", x, weight, bias);
#   const int64_t m = weight.size(0), n = weight.size(1);
#   check_linear("linear", x, m, n, bias);
#   if (!weight.is_contiguous() || n % BLOCK || !x.numel() || !m
#       || (bias && !has(*bias, {m}))
#       || (m >= TALL_ENOUGH && x.numel() / n >= from_torch))
#     return plain<decltype(linear)>("linear", x, weight, bias);
#   return multiplied(x, AsStored{numbers(weight), n}, m, n, bias);
# }
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.def("torch_from(int tokens) -> int",
#         [](int64_t tokens) { return from_torch.exchange(tokens); });
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) { m.impl("linear", linear); }
#
# }  // namespace
# ```

# %% [markdown]
# ### When is torch's own product quicker?
#
# torch brings a product of its own, made by people who know every processor.
# Whether it is quicker depends on the processor and the number of tokens. We
# do not guess: after the kernels are loaded both are timed, in turns, on
# matrices that come from memory. The answer is kept beside the compiled
# kernels, since another answer in the next process could change the last digit
# of a text. `torch_from` then says from how many tokens on torch is asked. Not
# for matrices of fewer than 512 rows: the router is one, and where processes
# share a model, each computes all of it and must choose the same experts.

# %% tags=["export:quicker"]
import json
import os
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from timeit import timeit

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from gptoss.kernels.build import library_path
from gptoss.model.ops import has_kernel
from gptoss.weights.disk import drafted

TOKENS = (8, 16, 32, 128, 512)
NEVER = 2 ** 62


def torch_is_quicker(ours: Sequence[float], torchs: Sequence[float]) -> int:
    """From how many tokens on, by the seconds for each of TOKENS.

    For that many and all more, by a twentieth at least; NEVER if for none.
    """
    found = NEVER
    for count, mine, other in zip(reversed(TOKENS), reversed(ours),
                                  reversed(torchs), strict=True):
        if other > 0.95 * mine:
            break
        found = count
    return found


# %% tags=["export:quicker"]
@torch.inference_mode()
def measure_products(repeats: int = 4) -> tuple[list[float], list[float]]:
    """Seconds of our product and of torch's for each of TOKENS, in turns.

    1024 x 2880, the best of `repeats`; a few tenths of a second in all.
    """
    # 142 MB in turns: a model's weights come from memory, not from a cache
    weights = torch.full((24, 1024, 2880), 0.5, dtype=torch.bfloat16,
                         device="cpu")  # whatever the caller's default is
    turn = cycle(weights.unbind())
    ours, torchs = [], []
    for count in TOKENS:
        x = weights[0, :count].clone()
        pairs = [(timeit(partial(torch.ops.gptoss.linear, x, next(turn),
                                 None), number=1),
                  timeit(partial(F.linear, x, next(turn)), number=1))
                 for _ in range(repeats)]
        ours.append(min(pair[0] for pair in pairs))
        torchs.append(min(pair[1] for pair in pairs))
    return ours, torchs


def choose_product() -> int:
    """From how many tokens on `linear` asks torch, by measuring once.

    Kept beside the compiled kernels, for each number of threads; NEVER
    without kernels. A file that cannot be read or written is measured again.
    """
    choice = os.environ.get("GPTOSS_KERNELS", "auto")
    if not has_kernel("linear") or choice == "torch":
        return NEVER
    with _disable_current_modes():  # nobody else counts or fakes these calls
        return _choose(library_path(choice).with_suffix(".json"))


def _choose(path: Path) -> int:
    """`choose_product` with the file that keeps the answers."""
    torch.ops.gptoss.torch_from(NEVER)
    threads = str(torch.get_num_threads())
    try:
        known = {str(key): int(value) for key, value
                 in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        known = {}
    if threads not in known:
        known[threads] = torch_is_quicker(*measure_products())
        try:
            with drafted(path) as draft:
                draft.write_text(json.dumps(known), "utf-8")
        except OSError:
            pass  # a folder that is read only: the next process measures
    torch.ops.gptoss.torch_from(known[threads])
    return known[threads]


# %% [markdown]
# On made-up times: torch wins from 128 tokens on, or for 16 alone.

# %%
ours = [1.0, 2.0, 4.0, 16.0, 64.0]
for torchs in ([2.0, 3.0, 5.0, 12.0, 40.0], [2.0, 1.0, 5.0, 17.0, 70.0]):
    found = torch_is_quicker(ours, torchs)
    print("from", "no number of" if found == NEVER else found, "tokens on")

# %% [markdown]
# ## It holds
#
# **Few tokens and many**, with 150 rows that fill no tile, beside plain torch
# and float64. Kernel and torch both end in one rounding to bf16. (Without a
# compiler a twin stands in: the same in float32, and one rounding.)

# %%
from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel

load_upto("dense")


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


for tokens in (1, 2, 5, 7, 20, 100):
    given = [torch.randn(shape).bfloat16() for shape in (
        (tokens, 320), (150, 320), (150,))]
    exact = F.linear(*(tensor.double() for tensor in given))
    with torch.inference_mode():
        fast = torch.ops.gptoss.linear(*given)
        with plain_torch():
            slow = torch.ops.gptoss.linear(*given)
    if not has_kernel("linear"):
        fast = exact.float().bfloat16()
    ours, torchs = off(fast, exact), off(slow, exact)
    print(f"{tokens:3} tokens: kernel {ours:.4f}, plain torch {torchs:.4f}")
    assert ours < 1.01 * torchs < 3e-3

# %% [markdown]
# ## In the 20b and the 120b
#
# What do the dense matrices cost a step of several tokens? Their bytes do not
# change, their products do. With memory at 45 GB/s and bf16 units at 400
# GFLOP/s, from how many tokens on is arithmetic the limit?

# %%
for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    bytes_ = bytes_read_per_token(config) - 4 * (
        config.num_hidden_layers * expert_bytes(config))
    for tokens in (1, 8, 32):
        read, compute = bytes_ / 45e9, bytes_ * tokens / 400e9
        print(f"{name}, {tokens:2} tokens: {1e3 * read:3.0f} ms to read, "
              f"{1e3 * compute:3.0f} ms to multiply")
print(f"as long as each other at {400 / 45:.0f} tokens")

# %% [markdown]
# ## Takeaways
#
# - A bf16 number is half a float: a shift and a mask widen two, exactly.
# - A strip of four rows and some tokens keeps all its sums in registers: each
#   weight is loaded once for two tokens on AVX2, for six with bf16 units.
# - Which product is quickest is measured once, and kept.
#
# ## Exercises
#
# ### Exercise 1
#
# fp8 (E5M2) is the upper half of fp16. How do four of them become fp16?

# %% tags=["hide-cell"]
values = torch.tensor([1.5, -3.0, 0.25, 0.0]).to(torch.float8_e5m2)
pairs = values.view(torch.uint8).numpy().view(np.uint16)
low = (pairs << 8).astype(np.uint16).view(np.float16)
high = (pairs & 0xFF00).astype(np.uint16).view(np.float16)
print([x.item() for pair in zip(low, high, strict=True) for x in pair],
      "and torch:", values.float().tolist())

# %% [markdown]
# ### Exercise 2
#
# `multiply` takes 20 tokens. In which groups, and how often is the tile read?

# %% tags=["hide-cell"]
count, taken = 20, []
for groups in range(-(-20 // 6), 0, -1):
    taken.append(-(-count // groups))
    count -= taken[-1]
print("groups:", taken, "- the tile is read", len(taken), "times")

# %% [markdown]
# ### Exercise 3
#
# Why four rows *far apart*? Processors fetch ahead along a stream of bytes, to
# the end of a 4 KiB page at most. How often does a stream meet a page's end in
# 4096 by 2880 numbers, and how many of four streams are running on then?

# %% tags=["hide-cell"]
print(f"{2880 * 2:,} page ends; of one stream none runs on, of four three do; "
      f"a row of 2880 numbers is {2880 * 2 / 4096:.1f} pages")

# %% [markdown]
# ## Sources
#
# - pytorch/pytorch, `c10/util/BFloat16.h`: bf16 as the upper half of a float.
# - flame/blis, `docs/KernelsHowTo.md`: tiles in registers and caches.
