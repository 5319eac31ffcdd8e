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
# # What if a processor multiplies whole tiles?
#
# ## Question
#
# An instruction of [pairs](pairs.ipynb) multiplies two registers of 32 bf16
# numbers: 32 products. Since Sapphire Rapids (2023) Intel's server processors
# have AMX, *Advanced Matrix Extensions*: eight registers more, each of 16 rows
# of 64 bytes. One instruction multiplies two of them as matrices and adds the
# product to a third. How many products is that, and how many a cycle, if such
# an instruction can begin every 16 cycles?

# %%
from math import ceil, comb

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel, mxfp4_linear, packed_experts
from gptoss.moe.routing import expected_hits
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import PackedMXFP4, decode

plt.style.use("../_static/book.mplstyle")
products = 16 * 16 * 32  # rows, columns, numbers in each
print(f"{products} products an instruction, {products // 32} times as many;")
print(f"{products // 16} a cycle; {8 * 16 * 64 // 1024} KiB of registers")

# %% [markdown]
# Intel calls these registers *tiles*. This book has used that word for a piece
# of a matrix, so we say **square** for what one holds, although only the sums
# are square, 16 x 16 of fp32; the others hold 16 x 32 of bf16. How is such a
# unit kept busy with weights of four bits, of which it knows nothing?
#
# ## Picture

# %% tags=["hide-input"]
# Figure: three rectangles, placed as in a product by hand. Bottom left the
# weights, 16 rows of 32 cells, one row coloured, pairs of cells blue and
# orange in turns. Top right the tokens, 16 rows of 32 cells, in each row the
# same two neighbours coloured, blue and orange in turns. Bottom right 16 by 16
# sums, each as wide as two cells; one is black, where row and column meet.
row, column = 5, 9
weights, tokens, added = (np.zeros(shape) for shape in (
    (16, 32), (16, 32), (16, 16)))
weights[row] = 1 + np.arange(32) // 2 % 2  # pairs in turns
tokens[:, 2 * column:2 * column + 2] = 1 + np.arange(16)[:, None] % 2
added[row, column] = 3
paint = ListedColormap(["0.9", "C0", "C1", "0"])
fig, ax = plt.subplots(figsize=(7.2, 4.1))
for cells, x, y, wide in (
        (weights, 0, 19, 1), (tokens, 35, 0, 1), (added, 35, 19, 2)):
    ax.pcolormesh(x + wide * np.arange(cells.shape[1] + 1),
                  y + np.arange(17), cells, cmap=paint, vmin=0, vmax=3,
                  edgecolors="white", linewidth=0.5)
for x, y, words in (
        (16, 36.6, "weights: 16 rows, 32 numbers (16 pairs) each"),
        (51, -1, "tokens: 16 rows, a pair of each of 16 columns"),
        (51, 36.6, "sums: 16 rows, 16 columns, fp32")):
    ax.text(x, y, words, ha="center", va="center", fontsize=8)
ax.text(16, 8, "pair by pair, a row of weights\nmeets a column of tokens;\n"
        "all three: 16 rows of 64 bytes", ha="center", va="center")
x, y = 36 + 2 * column, 19.5 + row
for to, start in (((x, 18.7), (x, 16.2)), ((34.8, y), (32.2, y))):
    ax.annotate("", to, start, arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.5, 67.5), ylim=(37.6, -2), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: the black sum gets 32 products, two from each row of the upper
# square. The left one is an ordinary piece of a matrix. The upper one is not:
# two numbers that follow each other *down* a column lie beside each other.
#
# ## The naive version
#
# The unit wants bf16, the weights are FP4. So take 32 rows of a matrix of the
# 20b, decode them as in pairs, and multiply what comes out by all tokens. No
# weight is decoded twice. What is wrong with it?

# %%
whole, part = (32 * n * 2 // 1024 for n in (2880, 8 * 32))
times = ceil(2880 / (8 * 32))
print(f"32 rows: {whole} KiB, {whole / 48:.1f} times 48 KiB; or {part} KiB")
print(f"32 columns: {whole} KiB of weights from the second cache, or sums,",
      f"in and out {times} times: {32 * 32 * 4 * 2 * times // 1024} KiB")

# %% [markdown]
# The decoded rows go out to the second cache, and every 32 tokens bring them
# in again, while the unit waits. Better is to decode **eight blocks** of the
# 32 rows, which fit into a first cache of 48 KiB, multiply these by all
# tokens, and go on. Then it is the sums that come and go, half as many bytes.
# With at most 16 columns sums do not even move: 32 rows of them are two
# registers, and stay there from the first block to the last.
#
# ## Derivation
#
# **What exactly is one instruction**, `tdpbf16ps`? Intel's reference writes it
# as a loop. For each sum the products of the first numbers of the 16 pairs are
# added in order, from zero, and those of the second numbers likewise; then
# both to each other, and the result to what was there. Every addition rounds
# to fp32. In numpy, for any number of squares:

# %%
def dot_squares(C: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """C (…, 16, 16) plus A (…, 16, 32) times B (…, 16 pairs, 16, 2).

    All fp32; a product of two values of bf16 has 16 bits and is exact.
    """
    first, second = np.zeros_like(C), np.zeros_like(C)
    for p in range(16):
        first = first + A[..., :, 2 * p, None] * B[..., p, None, :, 0]
        second = second + A[..., :, 2 * p + 1, None] * B[..., p, None, :, 1]
    return C + (first + second)


print(f"5760 by 2880 weights: {5760 * 2880 // 512:,} squares, 16 tokens: "
      f"{16 * 2880 // 512}")
draw = np.random.default_rng(0)
A, columns = (draw.integers(-9, 10, shape).astype(np.float32)
              for shape in ((16, 32), (32, 16)))
zero = np.zeros((16, 16), np.float32)
beside = columns.reshape(16, 2, 16).swapaxes(1, 2)  # pairs of rows
wrong = dot_squares(zero, A, columns.reshape(16, 16, 2))
print("sum 5, 9:", dot_squares(zero, A, beside)[5, 9], "; a plain product:",
      (A @ columns)[5, 9], "; without pairs:", wrong[5, 9])
assert np.array_equal(dot_squares(zero, A, beside), A @ columns)

# %% [markdown]
# Why pairs? The unit works in lanes of 32 bits, and a lane of a row of weights
# is a pair. The pair that belongs to it must be in one lane, too.
#
# **Which operand are the weights?** One of the two has to be rearranged. Row
# by row, as `Fours` of pairs leaves them, weights fit the *first* one. A
# matrix has 32,400 squares, 16 tokens have 90. So tokens are the second
# operand, turned once for all rows.
#
# **How is a square turned?** Sixteen tokens with 32 numbers each are 16 rows
# of 16 words, a word being a pair. In the picture's upper square word $p$ of
# token $t$ is in row $p$ at place $t$: words are transposed, and what is
# inside a word stays. The numbers of row and place, 0 to 15, have four bits
# each. Transposing exchanges the two numbers, one bit in each of four rounds:

# %%
def turned(square: np.ndarray) -> np.ndarray:
    """16 rows of 16 words -> 16 columns, in four rounds."""
    for size in (1, 2, 4, 8):
        square = square.reshape(8 // size, 2, size, 8 // size, 2, size)
        square = square.swapaxes(1, 4).reshape(16, 16)
    return square


words = columns.T.copy().view(np.uint64)  # a pair of fp32 each
assert np.array_equal(turned(words).view(np.float32), beside.reshape(16, 32))
print("turned by four rounds")

# %% [markdown]
# **A whole product** fills rows and tokens up to multiples of 16. Each step
# along the columns is a square of either side.

# %%
def filled(x: torch.Tensor) -> np.ndarray:
    """x (rows, 32 n) -> (n, squares, 16, 32), with zeros for missing rows."""
    full = np.zeros((-(-len(x) // 16) * 16, x.shape[1]), np.float32)
    full[:len(x)] = x.float()
    return full.reshape(-1, 16, x.shape[1] // 32, 32).transpose(2, 0, 1, 3)


def by_squares(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """w (rows, 32 n), x (tokens, 32 n), values of bf16 -> (tokens, rows)."""
    A, tokens = filled(w), filled(x)
    B = tokens.reshape(*tokens.shape[:3], 16, 2).swapaxes(2, 3)  # turned
    C = np.zeros((A.shape[1], B.shape[1], 16, 16), np.float32)
    for a, b in zip(A, B, strict=True):  # steps along the columns
        C = dot_squares(C, a[:, None], b[None])
    sums = C.transpose(1, 3, 0, 2).reshape(B.shape[1] * 16, -1)
    return torch.from_numpy(sums[:len(x), :len(w)].copy())


w, x = (torch.from_numpy(draw.integers(-9, 10, (n, 64))) for n in (20, 17))
fourths = torch.arange(64).view(16, 4).T.flatten()
y, z = by_squares(w, x), by_squares(w[:, fourths], x[:, fourths])
print(f"one sum as stored: {y[16, 19]}; by every fourth: {z[16, 19]}")
assert torch.equal(y.long(), x @ w.T) and torch.equal(y, z)

# %% [markdown]
# **The order of the columns** does not matter, as the second number shows.
# Weights come as in pairs, every fourth element of four blocks, and a sum does
# not mind if both sides do so: tokens pass through `pair_row` before they are
# turned.
#
# **What do eight registers do best?** If $a$ squares of weights meet $b$
# squares of tokens, there are $ab$ sums. Each step along the columns loads
# $a + b$ squares for $ab$ products. The smaller side has to be held while the
# other passes, one square at a time: $ab + \min(a, b) + 1$ registers. (Does a
# product wait for the one before, if both add to the same sums? Intel names 52
# cycles until a result is there. But the unit goes row by row, and the first
# row of sums has long been there when the next product wants it. A loop of
# products into one square took as long as one into four in turns.)

# %%
for a in range(1, 9):
    for b in range(1, a + 1):
        if (registers := a * b + min(a, b) + 1) <= 8:
            print(f"{a} x {b}: {registers} registers, {(a + b) / (a * b):.2f} "
                  "loads a product")

# %% [markdown]
# Two by two wins, because each loaded square serves two products. It needs
# more than 16 columns. With fewer there is one square of tokens, and the more
# squares of weights meet it, the fewer loads. We take two by one: loads matter
# little there, since decoding decides. ([Dense](dense.ipynb) matrices, which
# need none, do the same; with so few tokens they wait for memory.)
#
# **How long does decoding take?** Four blocks of a row are 18 operations for
# two units, by the table in [pairs](pairs.ipynb), so 9 cycles. A square of
# weights is a quarter of that for 16 rows, 36 cycles, and serves a product of
# 16 cycles for each 16 columns of tokens: with up to 32 columns it is decoding
# that decides. **The cost** of $R$ rows of $n$ numbers and $c$ columns is
# $\frac{R}{16} \frac{n}{32} \lceil \frac{c}{16} \rceil$ products and
# $36 \frac{R}{16} \frac{n}{32}$ cycles of decoding.
#
# **Must products wait for decoding?** They have a unit of their own, but they
# begin with squares that have just been written, and a square has to reach the
# cache before a register can be filled from it. So with few columns we decode
# four blocks *while* the four before them are multiplied: a product, then four
# rows, and so on, eight times. That takes two buffers, which have to stay in
# the first cache together with the tokens and the bytes that come in. Two of
# 32 rows are 16 KiB, and do; two of 64 rows did not (measured below).
#
# ## One number in two columns
#
# What enters the first layer of an expert was stored in bf16. The hidden
# vector between its layers is fp32, and pairs has shown that rounding it to
# bf16 is a rounding too many. Whole numbers of 16 bits, as used there, are
# nothing for this unit. But what bf16 leaves of a number is a number again,
# and can be rounded to bf16 itself. $\pi$ is nearly 3.140625, and what is left
# is nearly 0.000968933. How near do two such numbers come?
#
# For $x$ from 1 to 2, bf16 numbers are $2^{-7}$ apart, so at most $2^{-8}$ is
# left. Below $2^{-8}$ they are at most $2^{-16}$ apart, so at most $2^{-17}$
# is lost. Times a power of two this holds for every $x$:
#
# $$ |x - (\mathrm{high} + \mathrm{low})| \le 2^{-17} |x| . $$ (two-columns)
#
# That is sixteen leading bits. (What is below $2^{-126}$ this unit takes for
# zero; so little changes no output.) Both parts are multiplied by the same
# weights, so a token becomes **two columns**, and its two sums are added at
# the end. What does it bring?

# %%
def in_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp32 as a sum of two bf16 numbers, nearly."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


pi = torch.tensor(torch.pi)
high, low = (part.item() for part in in_two(pi))
print(f"{pi:.7f} is nearly {high:.6f} + {low:.9f} = {high + low:.7f}")
torch.manual_seed(0)
x = torch.randn(64, 2880)
w = decode(*encode(0.02 * torch.randn(256, 2880)), torch.float64)
high, low = (part.double() for part in in_two(x))
lost = ((x - high - low) / x).abs().max()
print(f"lost of a number: at most {lost * 2 ** 17:.2f} times 2**-17")
exact = x.double() @ w.T
for name, y in (("one column", high @ w.T),
                ("two columns", high @ w.T + low @ w.T),
                ("the result, stored in bf16", exact.bfloat16())):
    print(f"{name:26} {off(y, exact):.1e}")
assert lost <= 2 ** -17 and off((high + low) @ w.T, exact) < 1e-5

# %% [markdown]
# One column loses as much as storing the result does; two, at twice the
# products, lose nothing beside it.
#
# ## Code
#
# The registers' shapes are told to the processor in 64 bytes: *palette* 1, the
# only one there is, and for each of the eight how long a row is and how many
# there are. Ours are always as large as can be. Tokens that a group lacks and
# rows that a matrix lacks are zeros, whose sums are computed and not stored.
# `turn`, of [panels](panels.ipynb), is `turned`.

# %% [markdown] tags=["export:amx.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AMX
# constexpr int64_t SQUARE = 16;  // rows of a register, 64 bytes each
# constexpr int64_t AREA = SQUARE * BLOCK;  // bf16 numbers in it
# constexpr int64_t SQUARED = 4;  // places of an expert, at least
# static_assert(SQUARED <= FEW);  // with fewer, digits are there
#
# struct alignas(64) Shapes {  // eight registers, each as large as can be
#   uint8_t palette = 1, start = 0, reserved[14] = {};
#   uint16_t bytes[16];
#   uint8_t rows[16];
#
#   constexpr Shapes() : bytes(), rows() {
#     for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SQUARE;
#   }
# };
# constexpr Shapes SHAPES;
#
# struct Registers {  // have these shapes while this lives
#   Registers() { _tile_loadconfig(&SHAPES); }
#   ~Registers() { _tile_release(); }
# };
#
# // before and after registers are filled from memory, since the compiler is
# // not told that they read it
# inline void written() { asm volatile("" ::: "memory"); }
# ```

# %% [markdown]
# `Squares` is what the tokens become: for each expert groups of 16 columns, 16
# places or 8 of two columns. (A *place* is where a chosen token stands among
# those of its expert, see [many rows](many_rows.ipynb).) `beside` fills the
# last group up with zeros and turns each square.

# %% [markdown] tags=["export:amx.h"]
# ```cpp
# // x less what bf16 holds of it
# void remainder(const float* x, int64_t count, float* to) {
#   for (int64_t k = 0; k < count; k += 8) {
#     Number near[8];
#     narrow(load<Floats>(x + k), near);
#     store(to + k, load<Floats>(x + k) - widen(near));
#   }
# }
#
# // `count` columns of n numbers as squares, one after the other
# void beside(const Number* rows, int64_t count, int64_t n, Number* to) {
#   for (int64_t k = 0; k < n; k += BLOCK) {
#     Bytes v[SQUARE];
#     for (int64_t t = 0; t < SQUARE; ++t)
#       v[t] = t < count ? load<Bytes>(rows + t * n + k) : Bytes{};
#     turn(v);
#     for (int64_t p = 0; p < SQUARE; ++p, to += BLOCK)
#       _mm512_store_si512(to, v[p]);
#   }
# }
#
# // What stands at each expert's places, sixteen columns beside each other:
# // squares of 16 pairs by 16 columns. What was stored in bf16 is one column;
# // anything else is two, its sixteen leading bits, which are added later
# struct Squares {
#   int64_t columns = 0, n = 0;  // of a place; numbers in a column
#   std::vector<int64_t> start;  // each expert's first square
#   Tensor all;
#
#   Squares() = default;
#
#   // expert e has places begin[e] ... begin[e + 1] - 1: rows `from` of x
#   Squares(const float* x, const std::vector<int64_t>& from, int64_t blocks,
#           bool stored, const std::vector<int64_t>& begin)
#       : columns(stored ? 1 : 2), n(padded(blocks)), start(begin.size()) {
#     std::vector<std::pair<int64_t, int64_t>> items;  // first place, places
#     const int64_t most = SQUARE / columns;
#     for (size_t e = 0; e + 1 < begin.size(); ++e) {
#       start[e] = items.size();
#       if (begin[e + 1] - begin[e] >= SQUARED)
#         for (int64_t i = begin[e]; i < begin[e + 1]; i += most)
#           items.push_back({i, std::min(most, begin[e + 1] - i)});
#     }
#     all = scratch({int64_t(items.size()), SQUARE, n}, at::kBFloat16);
#     auto to = static_cast<Number*>(all.data_ptr());
#     at::parallel_for(0, items.size(), 1, [&](int64_t first, int64_t last) {
#       std::vector<Number> rows(SQUARE * n);
#       Buffer rest(blocks * BLOCK);
#       for (int64_t i = first; i < last; ++i) {
#         const auto [place, count] = items[i];
#         for (int64_t t = 0; t < count; ++t) {
#           const float* row = x + from[place + t] * blocks * BLOCK;
#           pair_row(row, blocks, &rows[t * columns * n]);
#           if (columns == 1) continue;
#           remainder(row, blocks * BLOCK, rest.data());
#           pair_row(rest.data(), blocks, &rows[(2 * t + 1) * n]);
#         }
#         beside(rows.data(), count * columns, n, to + i * SQUARE * n);
#       }
#     });
#   }
#
#   const Number* of(int64_t expert) const {
#     return numbers(all) + start[expert] * SQUARE * n;
#   }
# };
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# The second part multiplies. A register's number is fixed when the program is
# compiled, so the four sums are written out. `put` turns them, because those
# of one *token* are wanted beside each other, and adds a token's two columns.

# %% [markdown] tags=["export:squares.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AMX
# // sums of 32 rows and 32 columns
# struct alignas(64) FourSums {
#   float at[4][SQUARE][SQUARE];
#
#   static void clear() {
#     _tile_zero(0); _tile_zero(1);
#     _tile_zero(2); _tile_zero(3);
#   }
#
#   void fetch() const {
#     _tile_loadd(0, at[0], 64); _tile_loadd(1, at[1], 64);
#     _tile_loadd(2, at[2], 64); _tile_loadd(3, at[3], 64);
#   }
#
#   void keep() {
#     _tile_stored(0, at[0], 64); _tile_stored(1, at[1], 64);
#     _tile_stored(2, at[2], 64); _tile_stored(3, at[3], 64);
#   }
#
#   // out[t * width + r], for `count` columns
#   void put(int64_t rows, int64_t count, int64_t columns, float* out,
#            int64_t width) const {
#     for (int i = 0; i < 4; ++i) {
#       const int64_t r = i % 2 * SQUARE, c = i / 2 * SQUARE;
#       if (r >= rows || c >= count) continue;
#       Bytes v[SQUARE];
#       std::memcpy(v, at[i], sizeof v);
#       turn(v);
#       const __mmask16 real = rows - r < SQUARE ? (1 << (rows - r)) - 1 : -1;
#       for (int64_t j = 0; j < std::min(SQUARE, count - c); j += columns)
#         _mm512_mask_storeu_ps(
#             out + (c + j) / columns * width + r, real,
#             columns == 1 ? (__m512)v[j] : (__m512)v[j] + (__m512)v[j + 1]);
#     }
#   }
# };
# ```

# %% [markdown]
# Decoding is that of pairs, with another place to go. Four blocks of a row are
# 64 bytes, and then comes another row: no stream that a processor could follow
# by itself. So with each row two things are asked for: what it needs in two
# rounds, for the first cache; and for the second cache the same bytes of the
# row 32 rows below, which comes next. Registers 4 and 5 hold weights, 6 and 7
# tokens. With up to 16 columns sums stay (`few_squares`); with more they are
# fetched and kept (`many_squares`). Rows at the end of a matrix are copied and
# filled up to 32, blocks at the end of a row to four.

# %% [markdown] tags=["export:squares.h"]
# ```cpp
# constexpr int64_t BOTH = 2 * SQUARE;  // rows, and columns, at a time
#
# struct Work {  // out[t * width + r]: rows of a packed weight, times columns
#   const uint8_t *w, *scales;
#   int64_t rows, blocks;
#   const Number* x;
#   int64_t count, columns;  // in all, of a place
#   float* out;
#   int64_t width;
#   int64_t below = 0;  // bytes from here to what is read next, if anything
#
#   // up to 32 rows from r on, `wide` columns from c on
#   Work from(int64_t r, int64_t c, int64_t wide) const {
#     Work part = *this;
#     part.w += 16 * r * blocks, part.scales += r * blocks;
#     part.x += c * padded(blocks), part.out += c / columns * width + r;
#     part.rows = std::min(BOTH, rows - r);
#     part.count = std::min(wide, count - c);
#     part.below = r + BOTH < rows ? 16 * BOTH * blocks : 0;
#     return part;
#   }
# };
#
# // four blocks, or `count` of them, of row after row, as two squares each
# struct Decoder {
#   const uint8_t *w, *scales;
#   int64_t blocks, below;
#   Number* to;
#
#   // from block b on
#   Decoder(const Work& part, int64_t b, Number* to)
#       : w(part.w + 16 * b), scales(part.scales + b), blocks(part.blocks),
#         below(part.below), to(to) {}
#
#   INLINE void rows(int64_t some, int64_t count = HELD) {
#     for (int64_t r = 0; r < some; ++r, to += BLOCK) {
#       __builtin_prefetch(w + 2 * 16 * HELD);  // two rounds
#       ask(w + below);
#       const Fours four(w, scales, count);
# #pragma GCC unroll 4
#       for (int j = 0; j < HELD; ++j)
#         _mm512_store_si512(to + j * 2 * AREA, four.decoded(j));
#       w += 16 * blocks, scales += blocks;
#     }
#   }
# };
#
# void decode_squares(const Work& part, int64_t b, Number* to) {
#   Decoder decoder(part, b, to);
#   part.blocks - b < HELD ? decoder.rows(BOTH, part.blocks - b)
#                          : decoder.rows(BOTH);  // inlined, without masks
# }
#
# // adds four squares of each of two rows of them, times x; meanwhile, eight
# // times, something else
# template <class Else>
# INLINE inline void add_few(const Number* w, const Number* x,
#                            const Else& meanwhile) {
#   written();
#   for (int64_t k = 0; k < HELD; ++k, w += 2 * AREA, x += AREA) {
#     _tile_loadd(6, x, 64);
#     _tile_loadd(4, w, 64);
#     _tile_dpbf16ps(0, 4, 6);
#     meanwhile();
#     _tile_loadd(5, w + AREA, 64);
#     _tile_dpbf16ps(1, 5, 6);
#     meanwhile();
#   }
#   written();
# }
#
# // up to 16 columns; blocks are decoded while others are multiplied
# void few_squares(const Work& part) {
#   alignas(64) Number decoded[2][HELD * 2 * AREA];
#   FourSums sums;
#   sums.clear();
#   decode_squares(part, 0, decoded[0]);
#   Number *now = decoded[0], *next = decoded[1];
#   for (int64_t b = 0; b < part.blocks; b += HELD, std::swap(now, next)) {
#     const Number* x = part.x + b * AREA;
#     if (b + 2 * HELD <= part.blocks) {
#       Decoder decoder(part, b + HELD, next);
#       add_few(now, x, [&]() INLINE { decoder.rows(BOTH / 8); });
#     } else {
#       if (b + HELD < part.blocks) decode_squares(part, b + HELD, next);
#       add_few(now, x, [] {});
#     }
#   }
#   sums.keep();
#   sums.put(part.rows, part.count, part.columns, part.out, part.width);
# }
#
# // adds `deep` squares of two rows of them, times those of x and beyond
# inline void add_many(const Number* w, int64_t deep, const Number* x,
#                      const Number* beyond) {
#   written();
#   for (int64_t k = 0; k < deep; ++k, w += 2 * AREA) {
#     _tile_loadd(4, w, 64);
#     _tile_loadd(6, x + k * AREA, 64);
#     _tile_dpbf16ps(0, 4, 6);
#     _tile_loadd(5, w + AREA, 64);
#     _tile_dpbf16ps(1, 5, 6);
#     _tile_loadd(7, beyond + k * AREA, 64);
#     _tile_dpbf16ps(2, 4, 7);
#     _tile_dpbf16ps(3, 5, 7);
#   }
# }
#
# constexpr int64_t MANY_COLUMNS = 192;  // half of L2, if n is 2880
#
# // more columns: blocks that are decoded once meet all of them
# void many_squares(const Work& part) {
#   constexpr int64_t DEEPEST = 2 * HELD;  // blocks: 16 KiB, a third of L1
#   const int64_t n = padded(part.blocks), blocks = n / BLOCK;
#   alignas(64) Number decoded[DEEPEST * 2 * AREA];
#   thread_local std::vector<FourSums> sums;
#   sums.resize((part.count + BOTH - 1) / BOTH);
#   for (int64_t b = 0; b < blocks; b += DEEPEST) {
#     const int64_t deep = std::min(DEEPEST, blocks - b);
#     for (int64_t k = 0; k < deep; k += HELD)
#       decode_squares(part, b + k, decoded + k * 2 * AREA);
#     const Number* x = part.x + b * AREA;
#     int64_t left = part.count;
#     for (FourSums& four : sums) {
#       b ? four.fetch() : four.clear();
#       add_many(decoded, deep, x, left > SQUARE ? x + SQUARE * n : x);
#       four.keep();
#       x += BOTH * n, left -= BOTH;
#     }
#   }
#   for (int64_t c = 0; c < part.count; c += BOTH)
#     sums[c / BOTH].put(part.rows, part.count - c, part.columns,
#                        part.out + c / part.columns * part.width, part.width);
# }
# ```

# %% [markdown]
# ## What is refused
#
# **Scales that bf16 has no room for** (0, 1 and 253 to 255) go a weight at a
# time, slowly and right, by `unusual_rows` as in pairs.
#
# **Registers that are not lent.** They hold 8 KiB, to be saved whenever others
# get the processor. Linux does that only for a process that asks, and ends one
# that touches them without asking. So `lent`, of [the first
# three](first_three.ipynb), asks once (`arch_prctl`, request 0x1023, state
# 18). Where the answer is no, in a sandbox or under an older Linux, experts go
# by whole numbers, and `kernel_path()` does not name AMX. And oneDNN, by which
# torch multiplies bf16, sets shapes of its own, so ours are loaded before each
# piece of work and released after it.
#
# **Fewer than four places** of an expert go row by row: that was quicker.

# %% [markdown] tags=["export:squares.h"]
# ```cpp
# // scales that bf16 has no room for
# void unusual_squares(const Work& part) {
#   const int64_t n = padded(part.blocks);
#   std::vector<Number> column(n);
#   Buffer sums(part.rows);
#   for (int64_t c = 0; c < part.count; ++c) {
#     const Number* from = part.x + c / SQUARE * SQUARE * n + c % SQUARE * 2;
#     for (int64_t k = 0; k < n; ++k)
#       column[k] = from[k / 2 * BLOCK + k % 2];
#     unusual_rows(part.w, part.scales, part.rows, part.blocks, column.data(),
#                  1, sums.data(), 0);
#     float* to = part.out + c / part.columns * part.width;
#     for (int64_t r = 0; r < part.rows; ++r)
#       to[r] = c % part.columns ? to[r] + sums[r] : sums[r];
#   }
# }
#
# // as `packed_strips`
# void packed_squares(const Work& all) {
#   if (!usual(all.scales, all.rows * all.blocks)) return unusual_squares(all);
#   const int64_t n = all.blocks, whole = all.rows / BOTH * BOTH;
#   const int64_t lots = (all.count + MANY_COLUMNS - 1) / MANY_COLUMNS;
#   const int64_t wide = (all.count + lots * BOTH - 1) / (lots * BOTH) * BOTH;
#   std::vector<uint8_t> w, scales;  // of the last rows, and zeros
#   if (const int64_t left = (all.rows - whole) * n) {
#     w.resize(16 * BOTH * n), scales.resize(BOTH * n);
#     std::copy_n(all.w + 16 * whole * n, 16 * left, w.data());
#     std::copy_n(all.scales + whole * n, left, scales.data());
#   }
#   const Registers registers;
#   for (int64_t c = 0; c < all.count; c += wide)
#     for (int64_t r = 0; r < all.rows; r += BOTH) {
#       Work part = all.from(r, c, wide);
#       if (r == whole) part.w = w.data(), part.scales = scales.data();
#       (part.count > SQUARE ? many_squares : few_squares)(part);
#     }
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# **Every code under every usual scale**, in the emulation, against float64.
# Each weight alone has to come out to the last bit, and so do its sums with
# small whole numbers, which fp32 holds exactly, where they do not overflow it.

# %%
codes = torch.arange(16, dtype=torch.uint8)
every = (codes | codes.flip(0) << 4).view(1, 1, 16)  # every code, twice
scales = torch.arange(2, 253, dtype=torch.uint8).view(-1, 1)
w = decode(every.expand(len(scales), 1, 16), scales, torch.float64)
assert torch.equal(by_squares(w, torch.eye(32)).double(), w.T)
some, whole = w[25:226], torch.from_numpy(draw.integers(-9, 10, (17, 32)))
assert torch.equal(by_squares(some, whole).double(), whole.double() @ some.T)
print(f"{w.numel()} weights, {len(scales)} scales, {17 * len(some)} sums")

# %% [markdown]
# **The same bits, whoever else is there.** A sum is made step by step along
# the columns, whatever the square's other columns hold, and whether it stays
# in a register or goes to the cache and back. So from four places on a token's
# result does not depend on who shares the expert. To see it, take a row twice,
# side by side, and a token whose second half is minus its first. The exact sum
# is zero: what is left is rounding, and that tells the order.

# %%
def drawn(rows: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.from_numpy(draw.integers(0, 256, (rows, blocks, 16), "u1")),
            torch.from_numpy(draw.integers(120, 135, (rows, blocks), "u1")))


def numbers(tokens: int, n: int) -> torch.Tensor:
    return torch.from_numpy(draw.integers(-255, 256, (tokens, n)) * 2.0 ** (
        draw.integers(-9, 0, (tokens, n)))).bfloat16()


for tokens in (1, 2, 3, 4, 5, 16, 17, 33):
    w, x = decode(*drawn(40, 11), torch.float64), numbers(tokens, 352)
    error = off(by_squares(w, x), x.double() @ w.T)
    assert error < 4e-7
    print(f"{tokens:2} tokens: {error:.0e}")

packed = tuple(torch.cat([part, part], 1) for part in drawn(48, 32))
x = numbers(33, 1024)
x = torch.cat([x, -x], 1)
w = decode(*packed, torch.float32)
left = {tokens: by_squares(w, x[:tokens]) for tokens in (4, 5, 16, 17, 33)}
for tokens, y in left.items():
    print(f"{tokens:2} tokens; token 0, three rows: {y[0, :3].tolist()}")
    assert torch.equal(y[:4], left[33][:4])
other = by_squares(w.flip(1), x[:4].flip(1))
print("in another order:", other[0, :3].tolist())
assert not torch.equal(other, left[4])

# %% [markdown]
# **The kernel**, beside float64 and plain torch, as in [pairs](pairs.ipynb).
# Where the path's name is AMX, the rounding that is left of zero must be the
# same for any number of tokens. At the end two scales out of reach for bf16,
# and one that is not.

# %%
load_upto("dense")

for tokens in (1, 2, 3, 4, 5, 16, 17, 33):
    for rows, blocks in ((150, 1), (33, 7), (321, 33)):
        some = encode(0.02 * torch.randn(rows, 32 * blocks))
        given = torch.randn(tokens, 32 * blocks).bfloat16()
        exact = given.double() @ decode(*some, torch.float64).T
        with torch.inference_mode():
            fast = (mxfp4_linear(given, *some) if has_kernel("mxfp4_linear")
                    else exact.float().bfloat16())
            with plain_torch():
                slow = mxfp4_linear(given, *some)
        assert off(fast, exact) < 1.002 * off(slow, exact) < 3e-3
    print(f"{tokens:2} tokens: kernel {off(fast, exact):.4f}, "
          f"plain torch {off(slow, exact):.4f}")

blocks, scales = encode(torch.ones(3, 32))
scales[:, 0] = torch.tensor([0, 255, 127])
with torch.inference_mode():
    y = mxfp4_linear(torch.ones(5, 32).bfloat16(), blocks, scales)[4]
print([f"{value:.0e}" for value in y.float().tolist()])
if (has_kernel("mxfp4_linear")
        and "AMX" in torch.ops.gptoss.kernels_name()):
    with torch.inference_mode():
        y = mxfp4_linear(x, *packed)
        for n in left:
            assert torch.equal(mxfp4_linear(x[:n], *packed), y[:n])

# %% [markdown]
# **Both layers of experts**, with 5 and 33 places each: hidden numbers in two
# columns keep the result nearer to float64 than plain torch is.

# %%
E, K, width, hidden = 4, 2, 160, 128
gate_up = PackedMXFP4(*encode(0.1 * torch.randn(E, 2 * width, hidden)))
down = PackedMXFP4(*encode(0.1 * torch.randn(E, hidden, width)))
for tokens in (10, 66):
    first = torch.arange(tokens)
    ids = torch.stack([first % E, (first + 1) % E], 1)
    given = [torch.randn(shape).bfloat16() for shape in (
        (tokens, hidden), (tokens, K), (E, 2 * width), (E, hidden))]

    def run(dtype, given=given, ids=ids) -> torch.Tensor:
        x, shares, *biases = (t.to(dtype) for t in given)
        return packed_experts(x, ids, shares, gate_up, biases[0], down,
                              biases[1])

    with torch.inference_mode():
        fast = run(torch.bfloat16 if has_kernel() else torch.float32)
        with plain_torch():
            slow, exact = run(torch.bfloat16), run(torch.float64)
    error, plain = off(fast.bfloat16(), exact), off(slow, exact)
    assert error < plain / 2
    print(f"{tokens * K // E:2} places: {error:.3f}, plain torch {plain:.3f}")

# %% [markdown]
# ## In the 20b and the 120b
#
# How full are the squares, and what cannot be undercut? If tokens choose at
# random, a chosen expert has some places, as many columns in its first layer,
# twice as many in its second. Its weights pass through memory once, at 36 GB/s
# here, and a core does its products at 2950 GFLOP/s at most (measured below),
# those of missing columns included. With the average number of places:

# %%
each = 3 * 2880 * 2880  # weights of an expert, two thirds in its first layer
for n in (8, 64, 512):
    for name, E in (("20b", 32), ("120b", 128)):
        hit = expected_hits(E, 4, n)
        places = round(4 * n / hit, 1)
        groups = 2 * ceil(places / 16) + ceil(2 * places / 16)  # thirds
        products = 16 * hit * each * groups / 3
        print(f"{n:3} tokens, {name:4}: {places:4.1f} places; memory "
              f"{hit * each * 4.25 / 8 / 36e6:4.1f} ms, products, two cores, "
              f"{products / 2950e6:4.1f} ms")
for n in (8, 16):
    few = sum(comb(n, k) * 7 ** (n - k) for k in range(4)) / 8 ** n
    print(f"{n} tokens: {few:.0%} of the 20b's experts get fewer than 4")

# %% [markdown] tags=["measured"]
# Measured on two cores of a Xeon (Emerald Rapids), memory at 36 GB/s, in ms: a
# packed matrix of 5760 by 2880, and the 32 experts of a layer of the 20b, four
# for each token at random; *pairs* is the same machine by kernels compiled
# without AMX.
#
# | tokens | matrix, pairs | AMX | experts, pairs | AMX |
# |---|---|---|---|---|
# | 8 | 2.2 | 0.61 | 13.1 | 8.8 |
# | 16 | 4.5 | 0.77 | 25 | 15.4 |
# | 32 | 7.5 | 1.1 | 50 | 21 |
# | 128 | 28 | 2.9 | 154 | 40 |
# | 512 | 107 | 11.3 | 591 | 106 |
#
# A 20b of random weights read a prompt of 512 at 135 tokens a second;
# ik_llama.cpp (8337e4c), which repacks weights while loading, at 34, on the
# same machine in the same run. 51,200 sums of random squares had the bits of
# `dot_squares`, all of them (on a Granite Rapids).
#
# **What is lost.** One core in a loop of nothing but `tdpbf16ps` does 2950
# GFLOP/s. For 64 bytes of weights in the second cache and 16 columns that is 4
# cycles. Loading the squares makes it 6.0, decoding takes 10.0 alone, and all
# together 18.5, one beside the other, and no less one after the other (27 with
# two buffers of 64 rows). What is gained by the former, 3 percent with four
# places and 10 with eight, is gained where weights come from memory. With 64
# columns it is 46 cycles instead of 16: 20 for decoding, twice what it takes
# alone, 6 for sums that come and go, 4 for loading squares. Why is decoding
# slower between products? In a quiet minute it took 9.3 cycles alone and 12.3
# with products in between that load nothing, as if each of these kept one of
# the two units for 12 of its 16 cycles. That is a part of the answer.

# %% [markdown]
# ## Takeaways
#
# - One instruction multiplies 16 x 32 by 32 x 16 numbers; the second operand
#   has pairs of its rows beside each other.
# - Weights, which are many, stay as they are decoded; tokens are turned.
# - Two squares by two load the least; with few columns decoding decides.
# - Decode what the first cache holds, and let all tokens meet it.
# - From four places on what an expert says of a token does not depend on its
#   company, to the last bit.
#
# ## Exercises
#
# ### Exercise 1
#
# A second instruction, `tdpbssd`, takes bytes: a lane of 32 bits holds four of
# them. How many products is that? How do bytes lie in the second operand?

# %% tags=["hide-cell"]
a, b = draw.integers(-99, 100, (16, 64)), draw.integers(-99, 100, (64, 16))
fours = b.reshape(16, 4, 16).swapaxes(1, 2)  # fours of rows, columns, byte
found = np.einsum("rgk,gck->rc", a.reshape(16, 16, 4), fours)
assert np.array_equal(found, a @ b)
print(f"{16 * 16 * 64} products; four rows beside each other")

# %% [markdown]
# ### Exercise 2
#
# Would a third column, what is left after two, bring anything?

# %% tags=["hide-cell"]
x = torch.randn(64, 2880)
high, low = (part.float() for part in in_two(x))
third = (x - high - low).bfloat16().float()
two, three = (((x - high - low - more) / x).abs().max()
              for more in (0, third))
print(f"lost with two: {two:.0e}, with three: {three:.0f}. No: storing the "
      f"result in bf16 loses up to {2 ** -8:.0e}")

# %% [markdown]
# ### Exercise 3
#
# An expert has 17 places instead of 16. How many cycles of products does a
# square of weights take, and how many for each place? And with 31, 32, 33?

# %% tags=["hide-cell"]
for places in (16, 17, 31, 32, 33):
    cycles = 16 * -(-places // 16)
    print(f"{places} places: {cycles} cycles, {cycles / places:.2f} each")

# %% [markdown]
# ## Sources
#
# - Intel, *Architecture Instruction Set Extensions Programming Reference*, ch.
#   3 (AMX), and *Optimization Reference Manual* (cycles);
#   https://www.intel.com/content/www/us/en/docs/intrinsics-guide
# - torvalds/linux, `Documentation/arch/x86/xstate.rst`: asking for registers.
