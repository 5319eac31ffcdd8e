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
# # How does a weight meet a hundred tokens?
#
# ## Question
#
# A prompt of 512 tokens brings 64 of them to each expert of the 20b. The
# strips of [pairs](pairs.ipynb) take at most twelve of them and two rows of a
# weight; then the next two rows, and the same twelve pass again. When all rows
# are through, the next twelve tokens come, and every code is looked up anew.
# A core's L1 cache, where all should lie that it needs at once, holds 32 or
# 48 KiB. How much do twelve tokens need, and how fast would the next cache,
# L2, have to bring them?

# %%
tokens, columns, bf16 = 12, 2880, 2
print(f"{tokens} tokens of {columns} numbers: "
      f"{tokens * columns * bf16 / 1024:.0f} KiB")
loaded, served, a_cycle = 64, 2, 2  # bytes; rows that share them; products
print(f"a token's 64 bytes serve {served} rows: {loaded / served:.0f} bytes "
      f"for each product of 32 pairs,\n{loaded / served * a_cycle:.0f} a cycle"
      f" if the units begin {a_cycle} in a cycle")

# %% [markdown]
# That is the most that the L2 cache of a Zen 5 can deliver, and twice that of
# a Zen 4. Caches seldom reach their most, so the units wait. Could what is in
# L1 serve more products before it has to leave?
#
# ## Picture
#
# Two ways to walk through the same product. A piece of the weights, 64 rows,
# stands above 64 tokens; all are 2880 numbers long (rows and columns are to
# scale, each for itself). What is coloured is needed together: on the left the
# tokens alone are more than L1 holds.

# %% tags=["hide-input", "picture"]
# Figure: two columns. Left, "strips": above, 64 thin rows of weights with the
# first two coloured over their whole length, and an arrow down along all rows;
# below, 64 tokens with the first twelve coloured over their whole length.
# Right, "panels": above, 32 of 64 rows coloured, but only a tenth of their
# length; below, the first twelve tokens, the same tenth of their length, and
# an arrow down along all tokens.
import matplotlib.pyplot as plt
import numpy as np

plt.style.use("../_static/book.mplstyle")
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
for ax, title, rows, group, length in (
        (axes[0], "strips: 2 rows, 12 tokens", 2, 12, 2880),
        (axes[1], "panels: 32 rows, 12 tokens", 32, 12, 256)):
    for top, color, some, name in ((140, "C0", rows, "weights"),
                                   (64, "C1", group, "tokens")):
        ax.add_patch(plt.Rectangle((0, top - 64), 2880, 64, fc="0.93",
                                   ec="0.6", lw=0.8))
        ax.add_patch(plt.Rectangle((0, top - some), length, some, fc=color))
        ax.text(2830, top - 58, name, ha="right", fontsize=8, color="0.3")
    moves = 140 if length == 2880 else 64  # what passes by
    x = 1440 if length == 2880 else length + 120
    ax.annotate("", (x, moves - 58), (x, moves - 16),
                arrowprops={"arrowstyle": "->", "color": "0.4"})
    kib = (rows * (length < 2880) + group) * length * bf16 / 1024
    ax.set_title(f"{title}\n{kib:.0f} KiB in bf16", fontsize=9)
    ax.set(xlim=(-60, 2940), ylim=(-4, 144), xticks=[0, 256, 2880],
           yticks=[])
    ax.spines[:].set_visible(False)
axes[0].set_xlabel("numbers of a row")
axes[1].set_xlabel("numbers of a row")
plt.show()

# %% [markdown]
# What to see: a strip is long and flat. Its codes become bf16 in registers and
# are gone; twelve tokens wait for each two rows in turn. A panel is short and
# high. A token passes it with only the piece that is as long as the panel.
# Twelve panels lie side by side, so it comes in twelve pieces, and each number
# that comes serves 32 rows. All tokens pass, so a code is looked up once.
#
# ## The naive version
#
# [Dense](dense.ipynb) cut its strips in two, and that was enough for L1. To
# serve more rows as well, pieces must be shorter. But a strip's sums are
# spread over the sixteen lanes of a register: lane 0 has the pairs of columns
# 0, 16, 32 and so on. At the end of a strip 13 instructions make numbers of
# the registers of a token. At the end of each *piece* of a strip that has to
# happen again:

# %%
for length in (2880, 256):
    products = 2 * 12 * length // 32
    adding = 12 * 13  # for each token
    print(f"2 rows, 12 tokens, {length:4} columns: {products:4} products, "
          f"{adding} to add up lanes, {adding / products:.0%}")

# %% [markdown]
# So the lanes should not be columns.
#
# ## Derivation
#
# **Lanes are rows.** A register holds the same two columns of *sixteen rows*.
# A token's two numbers are copied into all lanes (`vpbroadcastd`), and one
# `vdpbf16ps` adds their products to the sums of sixteen rows, each in its own
# lane. Nothing is added up at the end, and one may stop after any pair of
# columns: sums are stored, and loaded when their turn comes again.
#
# **How many rows and tokens at once?** With $h$ registers of weights and $t$
# tokens, $h t$ sums stay in registers, $h t$ products need $h + t$ loads, and
# a Zen 5 begins two of either in a cycle. There are 32 registers.

# %%
for h, t in ((1, 12), (1, 28), (2, 12), (3, 8)):
    print(f"{16 * h:2} rows, {t:2} tokens: {h * t + h + 1:2} registers, "
          f"{h + t:2} loads for {h * t} products, {(h + t) / (h * t):.2f} for "
          "each")

# %% [markdown]
# With one register of rows there is a load for each product, and the loads are
# as many as the processor can do. Two registers, 32 rows, and twelve tokens
# need little more than half of them, so the products are the limit. Three
# would save loads that nobody waits for, and with fourteen tokens the compiler
# would have one register left.
#
# **How do sixteen rows get beside each other?** In memory a row's 64 bytes are
# four blocks: sixteen words of 32 bits, in each of them eight codes. Sixteen
# such rows are a square of sixteen by sixteen words, and *turning* it makes a
# register of every column. After that each lane of a register has a word of
# its row, two halves of 16 bits with four codes in each. That is what
# [pairs](pairs.ipynb) looks up: a shift by $4 j$ bits, a table of 32 words,
# and both halves become bf16 numbers, elements $8 c + j$ and $8 c + 4 + j$ of
# the row, where $c$ counts its words. So no code is moved by itself. In numpy:

# %%
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import FP4_VALUES, decode


def panel(blocks: np.ndarray) -> np.ndarray:
    """Four blocks of sixteen rows, (16, 4, 16) bytes -> (4, 16, 16, 2):
    code j of each half, word c of a row, row, half."""
    words = blocks.reshape(16, 64).view("<u4").T  # turned: word, row
    halves = np.stack([words & 0xFFFF, words >> 16], -1)
    codes = np.stack([halves >> 4 * j & 15 for j in range(4)])
    return np.array(FP4_VALUES)[codes]


def by_words(x: np.ndarray) -> np.ndarray:
    """128 numbers of a token -> (4, 16, 2), in the same order."""
    return x.reshape(16, 2, 4).transpose(2, 0, 1)


draw = np.random.default_rng(0)
bytes_ = draw.integers(0, 256, (16, 4, 16), dtype=np.uint8)
x = draw.standard_normal(128)
w = np.array(FP4_VALUES)[np.stack([bytes_ & 15, bytes_ >> 4], -1)]
w = w.reshape(16, 128)
print("first two rows, by lanes:",
      np.einsum("jcrh,jch->r", panel(bytes_), by_words(x))[:2].round(6))
print("by the plain product:    ", (w @ x)[:2].round(6))
assert np.allclose(np.einsum("jcrh,jch->r", panel(bytes_), by_words(x)), w @ x)

# %% [markdown]
# `by_words` is the order of `pair_row` in [pairs](pairs.ipynb): a token that
# is by itself is laid out as for strips. In a group of up to twelve
# (`in_groups` cuts an expert's tokens into groups of nearly the same size)
# word 0 of all of them comes first, then word 1 of all. That is done once for
# an expert, and the loop has one pointer instead of twelve.
#
# **Whole numbers** go the same way. What enters the second layer of an expert
# was never stored in bf16 and keeps sixteen bits as whole numbers with a step
# for each block ([pairs](pairs.ipynb) tells why). The table holds twice each
# value, so that all are whole, and for that a token's step is halved;
# `vpdpwssd` takes the place of `vdpbf16ps`. The price: at the end of each
# block sums become fp32, times the row's scale, times half the token's step.
# A later chapter, [bytes](coarse.ipynb), rounds activations to eight bits for
# whoever asks. Then four numbers fit into a lane instead of two, and
# `vpdpbusd` multiplies them.
#
# ## Code
#
# `turn` takes four rounds: two interleave words and pairs of words within
# quarters of a register (`unpack`), two move whole quarters.

# %% [markdown] tags=["export:panels.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# constexpr int64_t PANEL = 32;  // rows
# constexpr int64_t SLICE = 8;   // blocks: 16 KiB of sixteen-bit numbers
#
# // sixteen rows of sixteen 32-bit words become sixteen columns
# inline void turn(Bytes (&v)[16]) {
#   Bytes t[16];
#   for (int i = 0; i < 16; i += 2) {
#     t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
#     t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#   }
#   for (int i = 0; i < 16; i += 4)
#     for (int j = 0; j < 2; ++j) {
#       v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
#       v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
#     }  // quarter q of v[i + k]: column 4 q + k of rows i ... i + 3
#   for (int j = 0; j < 4; ++j)
#     for (int odd = 0; odd < 2; ++odd) {  // quarters 0 and 2, or 1 and 3
#       auto halves = [&](Bytes a, Bytes b) {
#         return odd ? _mm512_shuffle_i32x4(a, b, 0xdd)
#                    : _mm512_shuffle_i32x4(a, b, 0x88);
#       };
#       const Bytes a = halves(v[j], v[4 + j]);
#       const Bytes b = halves(v[8 + j], v[12 + j]);
#       t[4 * odd + j] = _mm512_shuffle_i32x4(a, b, 0x88);
#       t[8 + 4 * odd + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
#     }
#   std::copy(t, t + 16, v);
# }
#
# // put(b, half, v) for each HELD of `count` blocks, from b on, and for rows 0
# // to 15 (half 0), 16 to 31 (half 1): word c of all their 64 bytes in v[c],
# // zeros for blocks that are not there
# template <class Put>
# void by_quads(const uint8_t* w, int64_t blocks, int64_t count,
#               const Put& put) {
#   for (int64_t b = 0; b < count; b += HELD)
#     for (int half = 0; half < 2; ++half) {
#       const __mmask64 real = count - b < HELD
#                                  ? (1ll << 16 * (count - b)) - 1 : -1;
#       const uint8_t* from = w + 16 * (16 * half * blocks + b);
#       Bytes v[16];
#       for (int r = 0; r < 16; ++r, from += 16 * blocks)
#         v[r] = _mm512_maskz_loadu_epi8(real, from);
#       turn(v);
#       put(b, half, v);
#     }
# }
#
# // asks for the next slice, three lines of each row, part by part
# struct Ahead {
#   const uint8_t* w;
#   int64_t stride;
#
#   void ask(int64_t part, int64_t parts) const {
#     constexpr int64_t LINES = 3 * PANEL;
#     if (!w) return;
#     const int64_t end = LINES * (part + 1) / parts;
#     for (int64_t i = LINES * part / parts; i < end; ++i)
#       __builtin_prefetch(w + i % PANEL * stride + i / PANEL * 64);
#   }
# };
#
# // the scales of 32 rows as columns, four blocks' in a lane
# struct ScaleColumns {
#   alignas(64) uint32_t four[SLICE / HELD][PANEL] = {};
#
#   ScaleColumns(const uint8_t* scales, int64_t blocks, int64_t count) {
#     for (int64_t b = 0; b < count; b += HELD)
#       for (int64_t r = 0; r < PANEL; ++r)
#         if (count - b < HELD)
#           std::memcpy(&four[b / HELD][r], scales + r * blocks + b,
#                       count - b);
#         else
#           four[b / HELD][r] = load<uint32_t>(scales + r * blocks + b);
#   }
#
#   Bytes of(int64_t b, int half) const {  // of sixteen rows
#     return _mm512_srl_epi32(load<Bytes>(&four[b / HELD][16 * half]),
#                             _mm_cvtsi32_si128(8 * (b % HELD)))
#            & _mm512_set1_epi32(255);
#   }
#
#   __m512 powers(int64_t b, int half) const {
#     const auto f = (__m512)_mm512_max_epi32(
#         _mm512_slli_epi32(of(b, half), 23), _mm512_set1_epi32(1 << 22));
#     return f + 0 * f;  // infinity becomes NaN
#   }
# };
# ```

# %% [markdown]
# A row of ninety blocks ends with two: then the load is masked, and the
# missing blocks are zeros. Scales are turned with ordinary loads, four blocks'
# bytes in a word, and shifted into place when their block comes.
#
# A processor guesses where a stream of memory goes on. Two lines of a row, two
# of the next, 1440 bytes on, 32 times, and later two more of the first: that
# it does not guess. So the next slice is asked for while this one is
# multiplied, three lines of each row, 96 requests spread over the blocks.
# Asking only when a panel is made would be too late: the requests would stand
# in line, and nothing would be multiplied meanwhile.
#
# **A panel of pairs** is 32 rows and up to eight blocks as bf16: 16 KiB. It
# stands on the stack and serves all tokens of its expert. `hold` keeps a
# token's word in a register. Without it the compiler loads it anew for each of
# the two products, and loads become the limit again.

# %% [markdown] tags=["export:panels.h"]
# ```cpp
# #ifdef GPTOSS_BF16
# struct PairPanel {
#   static constexpr int MANY = 12;  // tokens: 24 sums, 2 weights, 1 token
#   static constexpr int64_t PAIRS = HELD * BLOCK / 2;  // of numbers in a row
#   alignas(64) Number values[SLICE / HELD][PAIRS][2][BLOCK];
#
#   static int64_t words(int64_t count) { return padded(count) / 2; }
#
#   PairPanel(const uint8_t* w, const uint8_t* scales, int64_t blocks,
#             int64_t count) {
#     const ScaleColumns columns(scales, blocks, count);
#     by_quads(w, blocks, count, [&](int64_t b, int half, const Bytes* v) {
#       for (int64_t i = 0; i < HELD; ++i) {
#         const Bytes s = columns.of(b + i, half);
#         const Bytes lower = _mm512_slli_epi16(_mm512_sub_epi16(
#             _mm512_set1_epi16(252), s | _mm512_slli_epi32(s, 16)), 7);
# #pragma GCC unroll 4
#         for (int j = 0; j < 4; ++j)
# #pragma GCC unroll 4
#           for (int c = 0; c < 4; ++c)
#             _mm512_store_si512(
#                 values[b / HELD][16 * j + 4 * i + c][half],
#                 lowered(found(v[4 * i + c], j, LARGE), lower));
#       }
#     });
#   }
# };
#
# // out[t * width + r] += 32 rows of `count` blocks, times T tokens
# template <int T>
# void multiply(const PairPanel& panel, const int32_t* x, int64_t count,
#               const Ahead& next, float* out, int64_t width) {
#   __m512 s[T][2];
#   for (int t = 0; t < T; ++t)
#     for (int h = 0; h < 2; ++h)
#       s[t][h] = _mm512_loadu_ps(out + t * width + 16 * h);
#   const Number* w = panel.values[0][0][0];
#   for (int64_t i = 0; i < PairPanel::words(count); ++i, w += 2 * BLOCK) {
#     if (i % 16 == 0) next.ask(i / 16, PairPanel::words(count) / 16);
#     const auto a = load<__m512bh>(w), b = load<__m512bh>(w + BLOCK);
#     for (int t = 0; t < T; ++t) {
#       Bytes token = _mm512_set1_epi32(*x++);
#       hold(token);  // or it would be loaded twice
#       s[t][0] = _mm512_dpbf16_ps(s[t][0], a, (__m512bh)token);
#       s[t][1] = _mm512_dpbf16_ps(s[t][1], b, (__m512bh)token);
#     }
#   }
#   for (int t = 0; t < T; ++t)
#     for (int h = 0; h < 2; ++h)
#       _mm512_storeu_ps(out + t * width + 16 * h, s[t][h]);
# }
# #endif
# ```

# %% [markdown]
# **Whole numbers**, of sixteen bits or eight, differ in what a lane holds and
# in the instruction. The loop around is the same. A token's block is its
# words, half its step, and a number at which the sums begin: with bytes the
# table is 12 too large, as in [packed](packed.ipynb). Twelve sums and twelve
# totals fill the registers, so six tokens make a group.

# %% [markdown] tags=["export:panels.h"]
# ```cpp
# alignas(64) constexpr int16_t WORDS[32] = {
#     0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
#     0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // as LARGE
#
# struct InWords {  // sixteen bits times sixteen, two in a lane
#   static constexpr int LANES = 16;  // of a block
#
#   static Bytes weights(const Bytes* v, int i) {
#     return found(v[i / 4], i % 4, WORDS);
#   }
#
#   static Bytes add(Bytes sums, Bytes w, Bytes x) {
#     return _mm512_dpwssd_epi32(sums, w, x);
#   }
#
#   // word 4 c + j: elements 8 c + j and 8 c + 4 + j of a block
#   static void split(const Line& line, int32_t* to) {
#     alignas(64) uint16_t from[BLOCK];
#     for (int k = 0; k < BLOCK; ++k)  // 8 (k / 8) + k / 2 % 4 + 4 (k % 2)
#       from[k] = k / 8 * 4 + k / 4 % 2 + k % 2 * 2 + k / 2 % 2 * 16;
#     _mm512_storeu_si512(to, _mm512_permutexvar_epi16(
#         load<Bytes>(from), load<Bytes>(&line)));
#   }
#
#   static int32_t offset(const Line&) { return 0; }
# };
#
# struct InBytes {  // eight bits times eight, four in a lane
#   static constexpr int LANES = 8;
#
#   static Bytes weights(const Bytes* v, int i) {
#     const Bytes word = v[i % 4];
#     return _mm512_shuffle_epi8(
#         table(), (i < 4 ? word : _mm512_srli_epi16(word, 4))
#                  & _mm512_set1_epi8(15));
#   }
#
#   static Bytes add(Bytes sums, Bytes w, Bytes x) {
#     return _mm512_dpbusd_epi32(sums, w, x);
#   }
#
#   static void split(const Line& line, int32_t* to) {
#     const __m256i bytes = _mm512_cvtepi16_epi8(load<Bytes>(&line));
#     std::memcpy(to, &bytes, sizeof bytes);
#   }
#
#   static int32_t offset(const Line& line) {  // weights are 12 too large
#     int32_t sum = 0;
#     for (int i = 0; i < BLOCK / 2; ++i)
#       sum += line.values[0][i] + line.values[1][i];
#     return -12 * sum;
#   }
# };
#
# template <class Kind>
# struct WholePanel {
#   static constexpr int MANY = 6;  // tokens: 12 sums, 12 totals
#   static constexpr int64_t LANES = Kind::LANES, SIZE = LANES + 2;
#   Bytes values[SLICE][LANES][2];
#   __m512 factors[SLICE][2];
#
#   static int64_t words(int64_t count) { return SIZE * count; }
#
#   WholePanel(const uint8_t* w, const uint8_t* scales, int64_t blocks,
#              int64_t count) {
#     const ScaleColumns columns(scales, blocks, count);
#     by_quads(w, blocks, count, [&](int64_t b, int half, const Bytes* v) {
#       for (int64_t i = 0; i < HELD; ++i, ++b, v += 4) {
#         factors[b][half] = columns.powers(b, half);
# #pragma GCC unroll 16
#         for (int c = 0; c < LANES; ++c)
#           values[b][c][half] = Kind::weights(v, c);
#       }
#     });
#   }
# };
#
# template <int T, class Kind>
# void multiply(const WholePanel<Kind>& panel, const int32_t* x, int64_t count,
#               const Ahead& next, float* out, int64_t width) {
#   constexpr int LANES = Kind::LANES;
#   __m512 total[T][2];
#   for (int t = 0; t < T; ++t)
#     for (int h = 0; h < 2; ++h)
#       total[t][h] = _mm512_loadu_ps(out + t * width + 16 * h);
#   for (int64_t b = 0; b < count; ++b, x += T * (LANES + 2)) {
#     next.ask(b, count);
#     Bytes s[T][2];
#     for (int t = 0; t < T; ++t)
#       s[t][0] = s[t][1] = _mm512_set1_epi32(x[T * (LANES + 1) + t]);
# #pragma GCC unroll 16
#     for (int c = 0; c < LANES; ++c)
#       for (int t = 0; t < T; ++t) {
#         Bytes token = _mm512_set1_epi32(x[T * c + t]);
#         hold(token);
#         for (int h = 0; h < 2; ++h)
#           s[t][h] = Kind::add(s[t][h], panel.values[b][c][h], token);
#       }
#     for (int t = 0; t < T; ++t) {
#       const __m512 half = _mm512_set1_ps(load<float>(x + T * LANES + t));
#       for (int h = 0; h < 2; ++h)
#         total[t][h] += _mm512_cvtepi32_ps(s[t][h])
#                        * (panel.factors[b][h] * half);
#     }
#   }
#   for (int t = 0; t < T; ++t)
#     for (int h = 0; h < 2; ++h)
#       _mm512_storeu_ps(out + t * width + 16 * h, total[t][h]);
# }
# ```

# %% [markdown]
# `panels` walks: 32 rows, slice by slice; in each slice, group by group. Rows
# that fill no panel are copied into one with zeros below.

# %% [markdown] tags=["export:panels.h"]
# ```cpp
# // out[t * rows + r]: `rows` rows times N tokens, whose words lie beside each
# // other in groups of up to MANY
# template <class Panel>
# void panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
#             int64_t blocks, const int32_t* x, int64_t N, float* out) {
#   std::fill_n(out, N * rows, 0.0f);
#   for (int64_t r = 0; r + PANEL <= rows; r += PANEL)
#     for (int64_t b = 0; b < blocks; b += SLICE) {
#       const int64_t deep = std::min(SLICE, blocks - b), at = r * blocks + b;
#       const Panel panel(w + 16 * at, scales + at, blocks, deep);
#       const int64_t next = b + SLICE < blocks ? at + SLICE
#                                               : (r + PANEL) * blocks;
#       in_groups<Panel::MANY>(N, [&](auto T, int64_t t) {
#         multiply<T.value>(panel, x + t * Panel::words(blocks)
#                                      + T * Panel::words(b), deep,
#                           {t ? nullptr : w + 16 * next, 16 * blocks},
#                           out + t * rows + r, rows);
#       });
#     }
#   const int64_t left = rows % PANEL, done = rows - left;
#   if (!left) return;
#   std::vector<uint8_t> weights(16 * PANEL * blocks), powers(PANEL * blocks);
#   std::copy_n(w + 16 * done * blocks, 16 * left * blocks, weights.data());
#   std::copy_n(scales + done * blocks, left * blocks, powers.data());
#   Buffer spare(N * PANEL);
#   panels<Panel>(weights.data(), powers.data(), PANEL, blocks, x, N,
#                 spare.data());
#   for (int64_t t = 0; t < N; ++t)
#     std::copy_n(&spare[t * PANEL], left, out + t * rows + done);
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ### Who lays the tokens out?
#
# `Interleaved`, for all experts in one buffer. From 11 tokens on (`FEW`; with
# bytes from 8) an expert goes by panels. With fewer its tokens lie one after
# the other, for strips (one alone goes by its digits). Weights under scales
# that bf16 has no room for go one at a time, as with strips of four tokens and
# more.

# %% [markdown] tags=["export:interleaved.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# // does any expert have so many places?
# bool any_from(const std::vector<int64_t>& begin, int64_t least) {
#   for (size_t e = 1; e < begin.size(); ++e)
#     if (begin[e] - begin[e - 1] >= least) return true;
#   return false;
# }
#
# // 32-bit words of what stands at each place, `size` of them. Experts with
# // `least` places or more have them in groups of up to MANY, word i of all of
# // a group beside each other; the others' places have theirs alone
# template <class Panel>
# struct Interleaved {
#   Tensor all;
#   int64_t size = 0;
#
#   Interleaved() = default;
#
#   // put(place, to, step): its word i to to[i * step]
#   template <class Put>
#   Interleaved(const std::vector<int64_t>& begin, int64_t least,
#               int64_t blocks, const Put& put)
#       : all(scratch({begin.back(), Panel::words(blocks)}, at::kInt)),
#         size(Panel::words(blocks)) {
#     std::vector<int64_t> first;  // place, of groups
#     for (size_t e = 1; e < begin.size(); ++e) {
#       const int64_t count = begin[e] - begin[e - 1];
#       const auto add = [&](auto, int64_t t) {
#         first.push_back(begin[e - 1] + t);
#       };
#       if (count < least) in_groups<1>(count, add);
#       else in_groups<Panel::MANY>(count, add);
#     }
#     first.push_back(begin.back());
#     const int64_t some = begin.back() < 16 ? 16 : 1;
#     at::parallel_for(0, first.size() - 1, some, [&](int64_t i, int64_t to) {
#       for (; i < to; ++i)
#         for (int64_t place = first[i]; place < first[i + 1]; ++place)
#           put(place, all.data_ptr<int32_t>() + first[i] * size + place
#                      - first[i], first[i + 1] - first[i]);
#     });
#   }
#
#   const int32_t* at(int64_t place) const {
#     return all.const_data_ptr<int32_t>() + place * size;
#   }
# };
#
# #ifdef GPTOSS_BF16
# Interleaved<PairPanel> paired(const float* x,
#                               const std::vector<int64_t>& from,
#                               int64_t blocks,
#                               const std::vector<int64_t>& begin,
#                               int64_t least) {
#   if (!any_from(begin, least)) return {};  // nobody would read them
#   return {begin, FEW, blocks, [&](int64_t place, int32_t* to, int64_t step) {
#     const float* token = x + from[place] * blocks * BLOCK;
#     if (step == 1)
#       return pair_row(token, blocks, reinterpret_cast<Number*>(to));
#     thread_local Array<Number> row;
#     row.resize(padded(blocks));
#     pair_row(token, blocks, row.data());
#     for (int64_t i = 0; i < padded(blocks) / 2; ++i)
#       to[i * step] = load<int32_t>(&row[2 * i]);
#   }};
# }
# #endif
#
# template <class Kind>
# Interleaved<WholePanel<Kind>> interleaved(
#     const Quantised& digits, const std::vector<int64_t>& from,
#     const std::vector<int64_t>& begin, int64_t least) {
#   if (!any_from(begin, least)) return {};
#   return {begin, least, digits.blocks,
#           [&](int64_t place, int32_t* to, int64_t step) {
#     const Line* line = digits.line(from[place]);
#     for (int64_t b = 0; b < digits.blocks; ++b) {
#       int32_t word[Kind::LANES + 2];
#       Kind::split(line[b], word);
#       std::memcpy(word + Kind::LANES, digits.half(from[place]) + b, 4);
#       word[Kind::LANES + 1] = Kind::offset(line[b]);
#       for (int32_t w : word) *to = w, to += step;
#     }
#   }};
# }
#
# #ifdef GPTOSS_BF16
# // as `panels`, for scales that bf16 has no room for
# void unusual_panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                     int64_t blocks, const int32_t* x, int64_t N,
#                     float* out) {
#   const int64_t size = PairPanel::words(blocks);
#   std::vector<int32_t> row(size);
#   in_groups<PairPanel::MANY>(N, [&](auto T, int64_t t) {
#     for (int64_t i = 0; i < T; ++i) {
#       for (int64_t k = 0; k < size; ++k) row[k] = x[t * size + k * T + i];
#       unusual_rows(w, scales, rows, blocks,
#                    reinterpret_cast<const Number*>(row.data()), 1,
#                    out + (t + i) * rows, rows);
#     }
#   });
# }
#
# // as `panels`, whatever the scales
# void paired_panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                    int64_t blocks, const int32_t* x, int64_t N, float* out) {
#   (usual(scales, rows * blocks) ? panels<PairPanel> : unusual_panels)(
#       w, scales, rows, blocks, x, N, out);
# }
# #endif
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# [Many rows](many_rows.ipynb) asks for these in its `Inputs`.
#
# ## It holds
#
# **Packed products** of 10 tokens (by strips), 13 (by panels, groups of 7 and
# 6), 64 and 100, beside float64. Some of the rows fill panels and some do not,
# and the same goes for blocks and slices. What is left is the rounding of the
# result. (Without bf16 units, or with AMX, other kernels answer; without a
# compiler nothing is compared.)

# %%
import torch

from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import OPERATORS, has_kernel, mxfp4_linear

load_upto("dense")


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
for tokens in (10, 13, 64, 100):
    worst = 0.0
    for rows, blocks in ((32, 1), (33, 7), (64, 8), (150, 90)):
        packed = encode(0.02 * torch.randn(rows, 32 * blocks))
        x = torch.randn(tokens, 32 * blocks).bfloat16()
        exact = x.double() @ decode(*packed, torch.float64).T
        with torch.inference_mode():
            y = mxfp4_linear(x, *packed)
            with plain_torch():
                plain = off(mxfp4_linear(x, *packed), exact)
        if has_kernel("mxfp4_linear"):
            assert off(y, exact) < 1.002 * plain < 3e-3
        worst = max(worst, plain)
    print(f"{tokens:3} tokens: plain torch is off by up to {worst:.4f}, "
          "the kernel by no more")

# %% [markdown]
# **Experts with both layers**: 60 tokens, of which each chooses two of three
# experts, so that the second layer goes by panels of whole numbers. Then one
# row gets a scale of $2^{-127}$, below the smallest normal bf16 number, and
# its panels' tokens must be found by the other way, too. (Bytes are tested
# where they are [used](coarse.ipynb).)

# %%
E, N, D, F = 3, 60, 320, 160
up, down = encode(0.1 * torch.randn(E, 2 * F, D)), encode(
    0.1 * torch.randn(E, D, F))
ids = torch.rand(N, E).topk(2).indices
given = [t.bfloat16() if t.is_floating_point() else t for t in (
    torch.randn(N, D), ids, torch.rand(N, 2), *up, torch.randn(E, 2 * F),
    *down, torch.randn(E, D))]
experts = OPERATORS["packed_experts"]
for strange in (False, True):
    given[4][1, 7, 3] = 0 if strange else 120
    wide = [t.double() if t.is_floating_point() else t for t in given]
    exact = experts.plain(*wide, 7.0)
    with torch.inference_mode():
        y = torch.ops.gptoss.packed_experts(*given, 7.0)
    rounding = off(exact.bfloat16(), exact)
    if has_kernel("packed_experts"):
        assert off(y, exact) < 1.05 * rounding
    print(f"strange scale: {strange}, rounding alone {rounding:.4f}")

# %% [markdown]
# ## What else takes time?
#
# With panels, a tenth of a prompt's time was spent outside all kernels, in the
# operating system. A layer's experts write 73 MB for 512 tokens that nobody
# needs after them: hidden vectors, results of every pick, words laid out for
# panels. Memory that is returned comes back as pages that must be found and
# cleared anew, 4 KiB at a time:

# %% tags=["nbval-ignore-output"]
import resource
from mmap import mmap

SIZE = 24_000_000


def faults(memory) -> int:
    """Pages that had to be found when it was written to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.frombuffer(memory, np.uint8)[:] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


kept = mmap(-1, SIZE)
print(f"{-(-SIZE // 4096):,} pages: {faults(kept):,} faults the first time, "
      f"{faults(kept):,} the second")

# %% [markdown]
# So what one layer leaves, the next one takes. Arrays of the kernels, and
# tensors that one call needs and nobody after it (`scratch`), have their
# memory from a `Pool`. From 1 MiB on it hands out a piece of the same size, in
# whole MiB, that was given back. It keeps 1 GiB at most, and a call with fewer
# than 64 tokens empties it: writing has begun.

# %% [markdown] tags=["export:pool.h"]
# ```cpp
# #include <map>
# #include <mutex>
# #include <new>
#
# namespace {
#
# // large pieces of memory that were given back, by their size in MiB
# class Pool {
#   static constexpr std::align_val_t LINE{64};
#   static constexpr size_t MOST = 1024;
#   std::mutex lock;
#   std::multimap<size_t, void*> pieces;
#   size_t held = 0;
#
#   void drop() {
#     for (const auto& [size, at] : pieces) ::operator delete(at, LINE);
#     pieces.clear(), held = 0;
#   }
#
#  public:
#   void* take(size_t bytes) {  // at a multiple of 64
#     const size_t size = bytes >> 20;
#     if (!size) return ::operator new(bytes, LINE);
#     const std::lock_guard<std::mutex> guard(lock);
#     const auto found = pieces.find(size);
#     if (found == pieces.end()) return ::operator new((size + 1) << 20, LINE);
#     void* at = found->second;
#     pieces.erase(found), held -= size;
#     return at;
#   }
#
#   void give(size_t bytes, void* at) {
#     const size_t size = bytes >> 20;
#     if (!size) return ::operator delete(at, LINE);
#     const std::lock_guard<std::mutex> guard(lock);
#     pieces.emplace(size, at), held += size;
#     if (held > MOST) drop();
#   }
#
#   void clear() {
#     const std::lock_guard<std::mutex> guard(lock);
#     drop();
#   }
# };
#
# Pool& pool() {  // never destroyed: tensors may outlive everything else
#   static Pool& one = *new Pool;
#   return one;
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## In the 20b and the 120b
#
# From how many tokens on does an expert have 11? A prompt of $n$ tokens brings
# $n K / E$ of them to each.

# %%
for name, E in (("20b", 32), ("120b", 128)):
    print(f"{name}: {11 * E // 4} tokens; a prompt of 2048 has "
          f"{2048 * 4 / E:.0f} for each expert")

# %% [markdown]
# **Cost.** Turning and looking up: for four blocks of sixteen rows 64
# instructions of shuffling, 48 shifts, 64 look-ups, 128 for differences that
# stop at zero and 64 stores, 368 for 2048 weights. A token needs 64 products
# for them.

# %%
for tokens in (11, 64, 256):
    print(f"{tokens:3} tokens: {368 / (368 + 64 * tokens):.0%} of these "
          "instructions (loads left aside) make the panel")

# %% [markdown] tags=["measured"]
# Measured on two cores of a Zen 5, sixteen matrices of 5760 by 2880 in turns,
# so that each comes from memory; GFLOP/s by strips and by panels: 12 tokens
# 487 and 583, 64 tokens 574 and 864, 128 tokens 594 and 941, of 985 that the
# units can do. In whole numbers of sixteen bits 64 tokens go at 778, by the
# tiles that were there before at 540; with bytes at 1312, before at 570. For
# eight tokens strips took 0.43 ms and panels 0.60. A layer's experts and 512
# tokens went from 174 ms to 132. Keeping memory took a prompt of 512 from 4.6
# seconds to 4.1. A Zen 4 begins half as many products a cycle, so there a
# panel gains less: 12 tokens went at 346 GFLOP/s by strips and at 288 by
# panels, 48 tokens at 400 by both. One limit, 11 tokens, serves both.
#
# ## Takeaways
#
# - What stays in the first cache should serve as many products as it can: a
#   panel is high and short, not long and flat.
# - With rows in the lanes there is nothing to add up at the end, so a product
#   can be cut along the columns wherever a cache is full.
# - Turning words, not codes, puts sixteen rows beside each other; the shifts
#   that find the codes are needed anyway.
# - A panel has to be made first, and memory prefers four long rows (50 GB/s)
#   to 32 short ones (34): for few tokens strips stay.
#
# ## Exercises
#
# ### Exercise 1
#
# How many blocks may a slice have, if the panel and its twelve tokens shall
# fill no more than three quarters of an L1 cache of 32 KiB, and of 48 KiB? The
# last quarter is for what is asked for ahead, and blocks come by fours.

# %% tags=["hide-cell"]
a_block = (32 + 12) * 32 * 2  # bytes, rows and tokens
for size in (32, 48):
    print(f"{size} KiB: {int(0.75 * size * 1024 / a_block) // 4 * 4} blocks")

# %% [markdown]
# ### Exercise 2
#
# A slice ends after eight blocks, and sums are stored and loaded again. What
# share of instructions is that, beside the products?

# %% tags=["hide-cell"]
moved, products = 2 * 24, 24 * 8 * 16
print(f"{moved} loads and stores, {products} products: "
      f"{moved / products:.1%}")

# %% [markdown]
# ### Exercise 3
#
# Six tokens make a group with whole numbers, and each block ends with a
# conversion, a product and a product with a sum for each of twelve registers
# of sums. How many instructions of arithmetic is that for each `vpdpwssd`, and
# for each `vpdpbusd`?

# %% tags=["hide-cell"]
for name, lanes in (("vpdpwssd", 16), ("vpdpbusd", 8)):
    print(f"{name}: {3 * 12 / (12 * lanes):.2f}")

# %% [markdown]
# ## Sources
#
# - K. Goto, R. van de Geijn, *Anatomy of High-Performance Matrix
#   Multiplication*, ACM TOMS 34, 2008: which part of a product should stay in
#   which cache. https://doi.org/10.1145/1356052.1356053
# - F. Van Zee, R. van de Geijn, *BLIS*, same journal 41, 2015: micro-panels.
#   https://doi.org/10.1145/2764454
