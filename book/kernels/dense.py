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
# # How does a processor multiply bf16 that cannot?
#
# ## Question
#
# Attention and the head are stored in bf16, 2.4 GB of the 3.7 that a token of
# the 20b reads. AVX2 has no instruction that multiplies bf16. How are these
# matrices multiplied as fast as they arrive, and how for a whole prompt?

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
# For a prompt that would widen each weight once for every token. There a tile
# of weights is widened once, as in [many rows](many_rows.ipynb), and since
# AVX2 multiplies fp32, the tile holds fp32.
#
# ## Code
#
# ### How is a row multiplied with one token?
#
# Four rows are read at the same time, rows a quarter of a piece apart, so that
# four streams of memory arrive ([packed](packed.ipynb) tells why).
# `__builtin_prefetch` asks for bytes that will be needed soon. `ready` lays
# the activations out, eight even ones and then eight odd ones. Processors with
# AVX512-BF16 multiply bf16 as it is, and have a `dense_dots` of their own in
# the [appendix](../cli/wide.ipynb).

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# namespace {
#
# inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
# inline Floats odd(Ints pairs) {
#   return (Floats)(pairs & int32_t(0xffff0000));
# }
#
# #ifndef GPTOSS_BF16
# // sixteen at a time, first the eight even ones, then the eight odd ones
# Buffer ready(const Buffer& x) {
#   Buffer to(x.size());
#   for (size_t k = 0; k < x.size(); k += 16) {
#     const Floats a = load<Floats>(&x[k]), b = load<Floats>(&x[k + 8]);
#     store(&to[k], __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
#     store(&to[k + 8], __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13,
#                                               15));
#   }
#   return to;
# }
#
# // out[0], out[step] ...: R rows of w (…, n), `step` rows apart, times x
# template <int R>
# void dense_dots(const Number* w, int64_t step, const float* x, int64_t n,
#                 float* out) {
#   Floats s[R][2] = {};
#   for (int64_t k = 0; k < n; k += 16)
#     for (int r = 0; r < R; ++r) {
#       const Number* from = w + r * step * n + k;
#       __builtin_prefetch(from + AHEAD / 2);
#       const Ints pairs = load<Ints>(from);
#       s[r][0] += even(pairs) * load<Floats>(x + k);
#       s[r][1] += odd(pairs) * load<Floats>(x + k + 8);
#     }
#   for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
# }
# #endif
# ```

# %% [markdown] tags=["measured"]
# On two cores of a Zen 3 the dense matrices of the 20b, in [twelve
# bits](twelve_bits.ipynb), took 44 to 53 ms a token with four rows and the
# prefetch; with two rows and no prefetch, 52 to 57.

# %% [markdown]
# ### How does a tile of rows become columns?
#
# The product for many tokens wants sixteen rows as columns, so that one
# activation meets sixteen weights in two registers. Eight rows of eight pairs
# are transposed by three rounds of the interleaving that you know. This stands
# in a part of its own, `columns.h`, which the appendix needs, too. A `Matrix`
# is an address and the distance from row to row.

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
# ```

# %% [markdown] tags=["export:columns.h"]
# ```cpp
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
# In numpy the tile is a transpose, and the product of a tile with some tokens
# is the textbook's. What the C++ adds is that no sum leaves its register while
# the columns pass: with six tokens there are 12 sums, 2 registers of weights
# and 1 for the activation.

# %%
def multiply(tile: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out (t, 16) += x (t, n) times the tile (n, 16), column by column."""
    for k in range(len(tile)):  # these sums stay in registers
        out += x[:, k, None] * tile[k]


draw = np.random.default_rng(0)
weight, some = draw.standard_normal((16, 40)), draw.standard_normal((6, 40))
out = np.zeros((6, 16))
multiply(weight.T, some, out)
print(f"{out[5, 15]:.4f} by columns, {some[5] @ weight[15]:.4f} by rows; "
      f"{2 * 6 + 2 + 1} registers")
assert np.allclose(out, some @ weight.T)

# %% [markdown]
# `COUNT` is known when the function is compiled, so that the sums can be
# registers; `multiply` takes six tokens as long as it can, then 4, 2 or 1.
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
#   while (count) {
#     const int64_t some = count == WIDE || count > 8 ? WIDE
#                          : count >= 4 ? 4 : count >= 2 ? 2 : 1;
#     const auto run = some == WIDE ? multiply_some<WIDE>
#                      : some == 4  ? multiply_some<4>
#                      : some == 2  ? multiply_some<2> : multiply_some<1>;
#     run(w, stride, n, x, out);
#     count -= some;
#     x.at += some * x.stride;
#     out.at += some * out.stride;
#   }
# }
# ```

# %% [markdown]
# ### Which of the two is taken?
#
# Up to `FEW` = 4 tokens go row by row, in pieces of 128 rows. More go by
# tiles: 64 rows by 256 columns in fp32 are 64 KiB, which the second cache of a
# core holds.

# %%
print(64 * 256 * 4 // 1024, "KiB of a widened tile")

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# // y (N, m) = x (N, n) times w (m, n) transposed, for a few tokens
# void dense_few(const Buffer& x, int64_t N, const Number* w, int64_t m,
#                int64_t n, Buffer& y) {
#   constexpr int64_t HEIGHT = 128;
#   const auto from = ready(x);
#   share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
#     const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
#     const int64_t step = rows / STREAMS;
#     auto run = [&](auto dots, int64_t r) {
#       for (int64_t t = 0; t < N; ++t)
#         dots(w + (row0 + r) * n, step, &from[t * n], n,
#              &y[t * m + row0 + r]);
#     };
#     for (int64_t r = 0; r < step; ++r) run(dense_dots<STREAMS>, r);
#     for (int64_t r = STREAMS * step; r < rows; ++r) run(dense_dots<1>, r);
#   });
# }
#
# // the same for many: 64 rows by 256 columns of w stay in the L2 cache
# void dense_many(const Buffer& x, int64_t N, const Number* w, int64_t m,
#                 int64_t n, Buffer& y) {
#   constexpr int64_t HEIGHT = 4 * ROWS, DEPTH = 256;
#   share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
#     const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
#     Buffer tile(HEIGHT * DEPTH), out(N * HEIGHT);
#     for (int64_t k = 0; k < n; k += DEPTH) {
#       const int64_t depth = std::min(DEPTH, n - k);
#       for (int64_t r = 0; r < rows; r += ROWS)
#         widen_tile(w + (row0 + r) * n + k, n, std::min(ROWS, rows - r),
#                    depth, &tile[r * DEPTH]);
#       for (int64_t t = 0; t < N; t += WIDE)
#         for (int64_t r = 0; r < rows; r += ROWS)
#           multiply(&tile[r * DEPTH], ROWS, depth, {&x[t * n + k], n},
#                    std::min(WIDE, N - t), {&out[t * HEIGHT + r], HEIGHT});
#     }
#     for (int64_t t = 0; t < N; ++t)
#       std::copy_n(&out[t * HEIGHT], rows, &y[t * m + row0]);
#   });
# }
# ```

# %% [markdown]
# ### The operator
#
# What is refused by name is a weight whose columns do not fit x, and a bias of
# another length. A weight that is not in one piece, columns that are no
# multiple of 32, nothing to compute: these are left to plain torch.

# %% [markdown] tags=["export:dense.h"]
# ```cpp
# Tensor linear(const Tensor& x, const Tensor& weight,
#               const std::optional<Tensor>& bias) {
#   if (!ours({x, weight, bias.value_or(x)}) || weight.dim() != 2)
#     return plain<decltype(linear)>("linear", x, weight, bias);
#   const int64_t m = weight.size(0), n = weight.size(1);
#   check_linear("linear", x, m, n, bias);
#   if (!weight.is_contiguous() || n % BLOCK || !x.numel() || !m
#       || (bias && !has(*bias, {m})))
#     return plain<decltype(linear)>("linear", x, weight, bias);
#   const Buffer from = floats(x);
#   const int64_t N = from.size() / n;
#   Buffer y(N * m);
#   (N <= FEW ? dense_few : dense_many)(from, N, numbers(weight), m, n, y);
#   add_bias(y, bias);
#   return result(x, m, y);
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("linear", linear);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# **Few tokens and many**, with 150 rows that fill no tile, beside plain torch
# and float64. Kernel and torch both end in one rounding to bf16. (Without a
# compiler a twin stands in: the same in float32, and one rounding.)

# %%
import logging
import os

import gptoss.model.ops  # noqa: F401  declares the operators
from gptoss.kernels.build import PARTS, KernelError, build, plain_torch
from gptoss.model.ops import has_kernel

os.environ["GPTOSS_KERNELS"] = "torch"  # one library a process: this one
logging.getLogger("gptoss").setLevel(logging.ERROR)  # built without a word
try:
    upto = PARTS[:PARTS.index("dense") + 1]
    torch.ops.load_library(str(build(parts=upto)))
except KernelError:
    pass


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def both(x, weight, bias) -> tuple[float, float]:
    """How far kernel and plain torch are from float64."""
    exact = x.double() @ weight.double().T + bias.double()
    with torch.inference_mode():
        fast = torch.ops.gptoss.linear(x, weight, bias)
        with plain_torch():
            slow = torch.ops.gptoss.linear(x, weight, bias)
    if not has_kernel("linear"):
        fast = exact.float().bfloat16()
    return off(fast, exact), off(slow, exact)


for tokens in (1, 4, 5, 20):
    ours, torchs = both(*(torch.randn(shape).bfloat16() for shape in (
        (tokens, 320), (150, 320), (150,))))
    print(f"{tokens:2} tokens: kernel {ours:.4f}, plain torch {torchs:.4f}")
    assert ours < 1.01 * torchs < 3e-3

# %% [markdown]
# ## Takeaways
#
# - A bf16 number is the upper half of a float: a shift and a mask make sixteen
#   floats of a register, and nothing is rounded.
# - For a few tokens rows are widened as they arrive; for many, a tile is
#   widened once and stays in a cache.
# - How many tokens at a time is decided by the number of registers: six, for
#   12 sums, 2 weights and 1 activation.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The same trick for another format: fp8 (E5M2) is the upper half of fp16. How
# would four of them in a 32-bit word become four fp16 numbers? Write it in
# numpy and compare with torch.

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
# `multiply` takes 20 tokens. In which groups does it take them, and how many
# times is the tile read? What would groups of 1 cost?

# %% tags=["hide-cell"]
count, taken = 20, []
while count:
    taken.append(6 if count == 6 or count > 8 else 4 if count >= 4
                 else 2 if count >= 2 else 1)
    count -= taken[-1]
print("groups:", taken, "- the tile is read", len(taken), "times, not 20")
assert sum(taken) == 20

# %% [markdown]
# ### Exercise 3
#
# Why four rows *far apart*, and not four neighbours? Processors fetch ahead
# along a stream of addresses, to the end of a 4 KiB page at most. How often
# does a stream meet a page's end in a matrix of 4096 by 2880 numbers, and how
# many of four streams are still running then?

# %% tags=["hide-cell"]
pages = 4096 * 2880 * 2 // 4096
print(f"{pages:,} page ends; of one stream none runs on, of four three do; "
      f"a row of 2880 numbers is {2880 * 2 / 4096:.1f} pages")

# %% [markdown]
# ## Sources
#
# - pytorch/pytorch, `c10/util/BFloat16.h`: bf16 as the upper half of a float.
# - Tiles of a matrix in registers and caches: flame/blis,
#   `docs/KernelsHowTo.md`.
