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
# # What changes when many tokens meet one weight?
#
# ## Question
#
# A prompt of 512 tokens brings 64 of them to each expert of the 20b. Should
# they go through the expert's rows four at a time, as [a few
# tokens](packed.ipynb) do? Then every weight would be looked up 16 times. A
# *tile* decodes it once for all. From how many tokens on is that worth it? By
# counting instructions you can find out that the answer is about 13.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

plt.style.use("../_static/book.mplstyle")
# what GCC 12 makes for AVX2; of `packed_dots` for 64 weights, each of T tokens
counted = {1: 22.6, 2: 19.3, 3: 20.9, 4: 19.6}
decode = 380 / 512  # `decode_tile`: 16 rows of a block
product = 617 / 512  # `multiply_tile`: the same, for five tokens


def by_row(tokens: int) -> float:
    """Instructions a weight and token: in groups of at most four."""
    groups = np.array_split(np.arange(tokens), -(-tokens // 4))
    return sum(len(g) * counted[len(g)] for g in groups) / 64 / tokens


def by_tile(tokens: int) -> float:
    """The same, five tokens at a time, or fewer."""
    return (decode + product * -(-tokens // 5)) / tokens


for tokens in (1, 4, 5, 10, 12, 13, 14, 64):
    print(f"{tokens:2} tokens: {by_row(tokens):.3f} instructions a weight and "
          f"token by rows, {by_tile(tokens):.3f} by tiles")

# %% [markdown]
# ## Picture
#
# Left, a weight with 16 of its rows cut into tiles of 320 columns. One tile is
# decoded and lies in the cache while all tokens pass it, five at a time; then
# the next. Right, what that costs: instructions for each weight and token.

# %% tags=["hide-input"]
# Figure: left, a matrix with a band of 16 rows in nine tiles, one of them
# dark; beside it tokens in groups of five. Right, instructions over the
# number of tokens: by rows a line at about 0.31, by tiles a saw-tooth from 1.9
# down to 0.28 that meets it at about 13 tokens.
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.9),
                                  width_ratios=(5, 4))
left.add_patch(plt.Rectangle((0, 0), 9, 5, fc="0.93", ec="0.7"))
for n in range(9):
    left.add_patch(plt.Rectangle((n, 3), 1, 1, ec="white",
                                 fc="C0" if n == 2 else "C4"))
left.text(4.5, 4.35, "the other rows", ha="center", fontsize=8, color="0.4")
left.annotate("a tile: 16 rows, 320 columns,\ndecoded once", (2.5, 3),
              (0.3, 1.2), fontsize=8, arrowprops={"arrowstyle": "-"})
for n in range(13):
    left.add_patch(plt.Rectangle((10.2 + n % 5 * 0.55, 3.6 - n // 5 * 0.8),
                                 0.45, 0.6, fc="C1", ec="white"))
left.text(10.2, 4.55, "tokens,\nfive at a time", fontsize=8)
left.annotate("", (9.1, 3.5), (10.1, 3.5),
              arrowprops={"arrowstyle": "->", "color": "C1"})
left.set(xlim=(-0.2, 13.6), ylim=(-0.2, 5.6))
left.axis("off")
count = range(1, 21)
right.plot(count, [by_row(n) for n in count], "o-", color="C1", ms=3)
right.plot(count, [by_tile(n) for n in count], "o-", color="C0", ms=3)
right.text(1, 0.23, "by rows", color="C1", fontsize=8)
right.text(20, 0.18, "by tiles", color="C0", ha="right", fontsize=8)
right.axvline(13, color="0.5", lw=0.8, ls="--")
right.text(13.3, 0.75, "13 tokens", fontsize=8, color="0.3")
right.set(xlabel="tokens that meet the weight", ylim=(0, 1),
          ylabel="instructions a weight and token", xticks=[1, 5, 10, 15, 20])
plt.show()

# %% [markdown] tags=["measured"]
# What to see: by rows the cost hardly falls, since every four tokens look up
# anew. A tile is dearer to decode, because rows have to become columns, but
# all tokens share that; what is left is the product. The teeth are groups that
# are not full: a sixth token begins a second group of five. A clock agrees: on
# a core of a Zen 3 a matrix of 5760 by 2880 took 2.1 ms by rows for four
# tokens, 6.1 for twelve, 6.8 for thirteen; by tiles 5.3 up to ten and 6.8 up
# to fifteen. So with AVX2 the kernels take tiles from 13 tokens on.

# %% [markdown]
# ## The naive version
#
# For many tokens one could decode the whole matrix to bf16 first. Then it goes
# out to memory and comes back, several times the bytes of the packed weight
# ([roofline](roofline.ipynb)). A tile does it with as much as stays near the
# processor. Its weights are 16 bits wide: widening them is done once.

# %%
rows, columns = 16, 320
print(f"a tile: {rows} rows by {columns} columns of 16 bits = "
      f"{2 * rows * columns / 1024:.0f} KiB")
print(f"a matrix of the 20b's experts: {2 * 5760 * 2880 / 2 ** 20:.0f} MiB")

# %% [markdown]
# The fastest cache of a core, called L1, holds 32 KiB or more. A third of it
# for the tile leaves room for the activations that pass.
#
# ## Derivation
#
# **How many tokens at a time?** The instruction is `pmaddwd`: it takes two
# registers of sixteen 16-bit numbers, multiplies them pair by pair, and adds
# neighbours, which gives eight 32-bit sums.

# %%
def pmaddwd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sixteen products of 16-bit numbers, added in pairs: eight sums."""
    return (a.astype(np.int32) * b.astype(np.int32)).reshape(8, 2).sum(1)


a, b = np.arange(16, dtype=np.int16), np.full(16, 10, dtype=np.int16)
print(pmaddwd(a, b).tolist())

# %% [markdown]
# Let the eight sums be eight *rows* of the weight. Then one register holds two
# columns of eight rows, and the other the two activations of one token that
# they meet, eight times over. For 16 rows and $n$ tokens that takes 2
# registers of weights, $2n$ of sums, and 1 for the activations at hand; each
# step loads $2 + n$ registers and makes $2n$ products. There are 16 registers.

# %%
for n in (1, 2, 5, 6, 7):
    print(f"{n} tokens: {2 * n + 2 + 1:2} registers, {2 * n} products for "
          f"{2 + n} loads: {2 * n / (2 + n):.1f} a load")

# %% [markdown]
# Five tokens take 13 registers, and the compiler wants some for itself; with
# seven there are none left, and sums would go to memory and back.
#
# ## Code
#
# ### What does a tile look like?
#
# A block is 32 elements of a row in 16 bytes: byte $i$ holds element $2i$ in
# its low half and $2i + 1$ in its high half. The activations of a token lie as
# [packed](packed.ipynb) left them: the even elements of a block, then the odd
# ones. So two columns that lie side by side in a tile are the low halves of
# two neighbouring bytes, or the high halves of them. In numpy that is a
# reshape and a change of axes; with it, a product by tiles is six lines.

# %%
def tile_of(w: np.ndarray) -> np.ndarray:
    """w (16, 32 b), integers -> (b, 2, 8, 16, 2): for each block, low or
    high halves, and pair of bytes: two columns of 16 rows."""
    pairs = w.reshape(16, -1, 8, 2, 2)  # rows, blocks, pairs, byte, half
    return pairs.transpose(1, 4, 2, 0, 3)


def by_tiles(w, factors, q, halves):
    """Weights w (16, 32 b) times tokens q (n, 32 b), integers; a factor for
    each block of both: factors (16, b), halves (n, b). -> (n, 16)"""
    tile = tile_of(w)
    lines = q.reshape(len(q), -1, 8, 2, 2).transpose(0, 1, 4, 2, 3)
    sums = np.einsum("bumri,tbumi->tbr", tile, lines)  # whole numbers
    return np.einsum("tbr,rb,tb->tr", sums, factors, halves)


draw = np.random.default_rng(0)
w, q = draw.integers(-12, 13, (16, 64)), draw.integers(-32639, 32640, (3, 64))
factors, halves = 2.0 ** draw.integers(-9, 0, (16, 2)), draw.random((3, 2))
found = by_tiles(w, factors, q, halves)
wide = ((w * factors.repeat(32, 1))
        @ (q * halves.repeat(32, 1)).T).T
print("first row, three tokens:", [round(y) for y in found[:, 0].tolist()])
print("by the plain product:   ", [round(y) for y in wide[:, 0].tolist()])
assert np.allclose(found, wide)

# %% [markdown]
# In C++ rows must become columns. `transpose` interleaves the two halves of
# sixteen registers, one byte of this and one of that, like riffling a deck of
# cards; four rounds transpose 16 by 16. With Python's lists:

# %%
deck = [[(r, c) for c in range(16)] for r in range(16)]
for _ in range(4):
    halves = zip(deck[:8], deck[8:], strict=True)
    mixed = [[cell for pair in zip(a, b, strict=True) for cell in pair]
             for a, b in halves]
    deck = [part for row in mixed for part in (row[:16], row[16:])]
assert deck == [[(r, c) for r in range(16)] for c in range(16)]
print(deck[3][:3])

# %% [markdown]
# `decode_tile` then looks up sixteen nibbles at once: `_mm_shuffle_epi8` takes
# a table of 16 bytes and 16 indices. `_mm256_cvtepi8_epi16` widens bytes to 16
# bits.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX2
# #ifdef GPTOSS_AVX512
# constexpr int64_t CHUNK = 18;  // blocks
# constexpr int TOKENS = 12;     // 24 sums, one weight
# #else
# constexpr int64_t CHUNK = 10;  // blocks: 10 KiB of integers, a third of L1
# constexpr int TOKENS = 5;      // ten sums, two weights, one activation
# #endif
# constexpr int64_t FEW = SIDE == 4 ? 11 : 13;  // fewer tokens: no tile
#
# struct Tile {  // 16 rows of a weight, pairs of columns side by side
#   alignas(64) int16_t values[CHUNK][2][8][16][2];
#   alignas(64) float factors[CHUNK][16];
# };
#
# struct Few {  // tokens that are multiplied with a tile together
#   int64_t count;
#   const Line* lines[TOKENS];
#   const float* halves[TOKENS];
#   float* out[TOKENS];  // 16 sums each
# };
#
# // sixteen rows of sixteen bytes become sixteen columns
# inline void transpose(__m128i (&v)[16]) {
#   for (int step = 0; step < 4; ++step) {
#     __m128i t[16];
#     for (int i = 0; i < 8; ++i) {
#       t[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
#       t[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
#     }
#     std::copy(t, t + 16, v);
#   }
# }
#
# // two columns, side by side, in 16 bits
# inline void put_pair(__m128i a, __m128i b, int16_t (*to)[2]) {
#   auto at = reinterpret_cast<__m256i*>(to);
#   at[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
#   at[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
# }
#
# #ifndef GPTOSS_AVX512
# void decode_tile(const uint8_t* w, const uint8_t* scales, int64_t blocks,
#                  int64_t count, Tile& tile) {
#   const __m128i values = load<__m128i>(TWICE), low = _mm_set1_epi8(15);
#   for (int64_t b = 0; b < count; ++b) {
#     __m128i v[16];
#     for (int64_t r = 0; r < 16; ++r) {
#       v[r] = load<__m128i>(w + (r * blocks + b) * 16);
#       tile.factors[b][r] = power(scales[r * blocks + b]);
#     }
#     transpose(v);
#     for (int u = 0; u < 2; ++u)  // low nibbles, high nibbles
#       for (int m = 0; m < 8; ++m) {
#         __m128i two[2];
#         for (int i = 0; i < 2; ++i) {
#           __m128i bytes = v[2 * m + i];
#           bytes = u ? _mm_srli_epi16(bytes, 4) : bytes;
#           two[i] = _mm_shuffle_epi8(values, _mm_and_si128(bytes, low));
#         }
#         put_pair(two[0], two[1], tile.values[b][u][m]);
#       }
#   }
# }
# ```

# %% [markdown]
# ### How is it multiplied?
#
# The inner loop is what was derived: 2 registers of weights, 5 tokens, 10
# sums. `_mm256_set1_epi32` fills a register with one pair of activations. The
# sixteen steps of a block are written out (`unroll`): counting them took a
# tenth of the instructions. Then the sums become floats and are multiplied by
# the two factors of the block. With AVX-512 twelve tokens take a tile
# ([appendix](../cli/wide.ipynb)).

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# // sums, plus sixteen products added in pairs
# inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
# #ifdef GPTOSS_VNNI
#   return _mm256_dpwssd_avx_epi32(sums, a, b);
# #else
#   return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
# #endif
# }
#
# // adds blocks first ... first + count - 1 of 16 rows to the tokens' sums
# void multiply_tile(const Tile& tile, const Few& few, int64_t first,
#                    int64_t count) {
#   for (int64_t b = 0; b < count; ++b) {
#     __m256i s[TOKENS][2] = {};
# #pragma GCC unroll 16
#     for (int m = 0; m < 16; ++m) {
#       const auto& pairs = tile.values[b][m / 8][m % 8];
#       const __m256i w0 = load<__m256i>(pairs), w1 = load<__m256i>(pairs[8]);
#       for (int t = 0; t < TOKENS; ++t) {
#         const __m256i x = _mm256_set1_epi32(load<int32_t>(
#             &few.lines[t][first + b].values[m / 8][m % 8 * 2]));
#         s[t][0] = add_products(s[t][0], w0, x);
#         s[t][1] = add_products(s[t][1], w1, x);
#         hold(s[t][0]), hold(s[t][1]);
#       }
#     }
#     for (int t = 0; t < TOKENS; ++t) {
#       const float half = few.halves[t][first + b];
#       float* to = few.out[t];
#       for (int i = 0; i < 2; ++i, to += 8)
#         store(to, load<Floats>(to) + (Floats)_mm256_cvtepi32_ps(s[t][i])
#                   * (load<Floats>(&tile.factors[b][8 * i]) * half));
#     }
#   }
# }
# #else
# void multiply_tile(const Tile& tile, const Few& few, int64_t first,
#                    int64_t count);
# #endif
# #endif
# ```

# %% [markdown]
# For all tokens of one piece: a tile, all tokens in groups (`in_groups` of
# [packed](packed.ipynb)), the next tile. Who fills it is told by `decode`, so
# that other weights come the same way ([eight bits](eight_rows.ipynb)). A
# group that is not full computes into `spare`, and nobody looks at it.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# constexpr int64_t ROWS = 16;  // of a tile
#
# #ifdef GPTOSS_AVX2
# // sixteen rows, many tokens; decode(b, count, tile) fills a tile from b on
# template <class Decode>
# void rows_for_many(const Decode& decode, const Quantised& x,
#                    std::span<const int64_t> inputs, float* out) {
#   const int64_t count = inputs.size(), blocks = x.blocks;
#   Tile tile;
#   std::fill_n(out, count * ROWS, 0.0f);
#   for (int64_t b = 0; b < blocks; b += CHUNK) {
#     const int64_t deep = std::min(CHUNK, blocks - b);
#     decode(b, deep, tile);
#     in_groups<TOKENS>(count, [&](auto T, int64_t i) {
#       float spare[ROWS] = {};  // a group may have empty places
#       Few few{T.value};
#       for (int64_t t = 0; t < TOKENS; ++t) {
#         const bool real = t < T.value;
#         const int64_t n = inputs[real ? i + t : i];
#         few.lines[t] = x.line(n);
#         few.halves[t] = x.half(n);
#         few.out[t] = real ? out + (i + t) * ROWS : spare;
#       }
#       multiply_tile(tile, few, b, deep);
#     });
#   }
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ### Which tokens meet which expert?
#
# A *pick* is one choice of one token: token $n$, choice $k$ is pick $nK + k$.
# The kernel needs the picks sorted by expert, and there are only E different
# keys. So it need not compare: it counts. One pass counts the picks of each
# expert; the running sum of the counts says where each expert's places begin;
# a second pass puts every pick into the next free place of its expert. That is
# a *counting sort*.

# %%
ids = np.array([[0, 2], [2, 1], [2, 0], [2, 4], [2, 1], [0, 2]])  # six tokens
flat = ids.reshape(-1)
order = np.argsort(flat, kind="stable")
print("experts of the picks:", flat.tolist())


def groups(ids: list[int], experts: int) -> tuple[list[int], list[int]]:
    """Picks in the order of their experts, and where each expert begins."""
    begin = [0] * (experts + 1)
    for e in ids:
        begin[e + 1] += 1  # count
    for e in range(experts):
        begin[e + 1] += begin[e]  # running sum
    order, free = [0] * len(ids), begin[:-1]
    for pick, e in enumerate(ids):
        order[free[e]] = pick  # the next free place of its expert
        free[e] += 1
    return order, begin


found, begin = groups(flat.tolist(), 5)
print("picks in order:", found)
print("experts begin at", begin)
assert found == order.tolist()

# %% [markdown]
# The same in C++; `hit` lists the experts that got any pick. An id that is no
# expert's is refused (an IndexError).

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# namespace {
#
# // a pick is one choice of one token; those of expert e are
# // order[begin[e]] ... order[begin[e + 1] - 1]
# struct Groups {
#   std::vector<int64_t> order, begin, hit;
#
#   Groups(const int64_t* ids, int64_t picks, int64_t experts)
#       : order(picks), begin(experts + 1) {
#     for (int64_t i = 0; i < picks; ++i) {
#       TORCH_CHECK_INDEX(0 <= ids[i] && ids[i] < experts, "expert: expected "
#                         "0 to ", experts - 1, ", found ", ids[i]);
#       ++begin[ids[i] + 1];
#     }
#     for (int64_t e = 0; e < experts; ++e) {
#       if (begin[e + 1]) hit.push_back(e);
#       begin[e + 1] += begin[e];
#     }
#     std::vector<int64_t> next(begin.begin(), begin.end() - 1);
#     for (int64_t i = 0; i < picks; ++i) order[next[ids[i]]++] = i;
#   }
# };
# ```

# %% [markdown]
# ### Who does what?
#
# A piece of work is some rows of one expert, for all its picks: 256 rows if
# the picks are fewer than `FEW`, which go through them by rows ([packed](
# packed.ipynb)); else 16, one tile high. `emit` gets what each computed.
#
# What a pick reads is a row of `Inputs`: for the first layer a token, the same
# for all $K$ picks of it, for the second the pick's own hidden vector. Later
# chapters have ways of their own, each with a height: with bf16 units two
# picks of an expert and more go through the first layer by the strips of
# [pairs](pairs.ipynb); with AMX four and more go by [squares](amx.ipynb); and
# with AVX-512 tiles become [panels](panels.ipynb).

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# #ifndef GPTOSS_AVX2
# constexpr int64_t FEW = 4;
# #endif
# constexpr int64_t TALL = 256;  // rows of a piece of work for few tokens
# constexpr int64_t BROAD = 64;  // of one for many, by panels
# constexpr int64_t READING = 64;  // tokens; fewer: a prompt is at its end
#
# struct Piece {
#   int64_t expert, row, rows;
# };
#
# // few tokens: tall pieces; many: lower ones
# std::vector<Piece> pieces(const Packed& weight, const Groups& groups,
#                           int64_t few, int64_t low) {
#   std::vector<Piece> all;
#   for (int64_t e : groups.hit) {
#     const int64_t count = groups.begin[e + 1] - groups.begin[e];
#     for (int64_t r = 0, height; r < weight.rows; r += height) {
#       height = std::min(count < few ? TALL : low, weight.rows - r);
#       all.push_back({e, r, height});
#     }
#   }
#   return all;
# }
#
# // does any expert have fewer places than that?
# bool any_below(const Groups& groups, int64_t count) {
#   for (int64_t e : groups.hit)
#     if (groups.begin[e + 1] - groups.begin[e] < count) return true;
#   return false;
# }
#
# // what stands at each place: row from[place] of x
# struct Inputs {
#   static constexpr char OPERATOR[] = "packed_experts";
#   static constexpr int64_t TILED = FEW;  // from so many places on
#   static constexpr int64_t PAIR = 2;     // fewer go by their digits
#   std::vector<int64_t> from;
#   Quantised digits;                // of the rows of x
#   int64_t few = FEW, low = ROWS;  // fewer places: TALL pieces; else low ones
# #ifdef GPTOSS_AVX512
#   Interleaved<WholePanel<InWords>> words;
# #endif
# #ifdef GPTOSS_BF16
#   Interleaved<PairPanel> pairs;
# #endif
# #ifdef GPTOSS_AMX
#   Squares squares;
# #endif
#
#   Inputs(const float* x, int64_t rows, const Packed& weight, float most,
#          std::vector<int64_t> place, const Groups& groups,
#          bool in_words = true)
#       : from(std::move(place)), digits(0, weight.blocks) {
#     const int64_t blocks = weight.blocks;
# #ifdef GPTOSS_AMX
#     if (lent()) {
#       squares = {x, from, blocks, most == STORED, groups.begin};
#       low = TALL;
#       if (!any_below(groups, SQUARED)) return;
#     } else
# #endif
# #ifdef GPTOSS_BF16
#     if (PAIRED && most == STORED) {  // hidden numbers keep sixteen bits
#       pairs = paired(x, from, blocks, groups.begin, PAIR);
#       few = TOGETHER + 1, low = BROAD;
#       if (any_below(groups, PAIR)) digits = quantised(x, most, rows, blocks);
#       return;
#     }
# #endif
#     digits = quantised(x, most, rows, blocks, any_below(groups, FEW)
#                        || weight.rows % ROWS);  // what is below a tile
# #ifdef GPTOSS_AVX512
#     if (lent() || !in_words) return;
#     words = interleaved<InWords>(digits, from, groups.begin, FEW);
#     low = BROAD;
# #endif
#   }
#
#   // rows of a weight times `count` places from `first` on
# #ifdef GPTOSS_AVX512
#   void by_tile(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                int64_t first, int64_t count, float* out) const {
#     const int64_t blocks = digits.blocks;
# #ifdef GPTOSS_BF16
#     if (pairs.size)
#       return paired_panels(w, scales, rows, blocks, pairs.at(first), count,
#                            out);
# #endif
#     panels<WholePanel<InWords>>(w, scales, rows, blocks, words.at(first),
#                                 count, out);
#   }
# #elif defined(GPTOSS_AVX2)
#   void by_tile(const uint8_t* w, const uint8_t* scales, int64_t,
#                int64_t first, int64_t count, float* out) const {
#     rows_for_many([&](int64_t b, int64_t deep, Tile& tile) {
#       decode_tile(w + 16 * b, scales + b, digits.blocks, deep, tile);
#     }, digits, {&from[first], size_t(count)}, out);
#   }
# #endif
# };
#
# // emit(place, expert, first row, rows, sums) for every place and piece
# template <class X, class Emit>
# void grouped_linear(const Packed& weight, const Groups& groups, const X& x,
#                     const Emit& emit) {
#   const std::vector<Piece> all = pieces(weight, groups, x.few, x.low);
#   share(all.size(), 1, [&](int64_t item) {
#     const auto [e, row0, rows] = all[item];
#     const int64_t first = groups.begin[e];
#     const int64_t count = groups.begin[e + 1] - first;
#     thread_local Buffer out;
#     out.resize(count * rows);
#     const int64_t at = (e * weight.rows + row0) * weight.blocks;
#     const uint8_t *w = weight.bytes + 16 * at, *s = weight.scales + at;
# #ifdef GPTOSS_AMX
#     if (x.squares.columns && count >= SQUARED)
#       packed_squares({w, s, rows, weight.blocks, x.squares.of(e),
#                       count * x.squares.columns, x.squares.columns,
#                       out.data(), rows});
#     else
# #endif
# #ifdef GPTOSS_BF16
#     if (x.pairs.size && X::PAIR <= count && count < X::TILED)
#       packed_strips(w, s, rows, weight.blocks, reinterpret_cast<
#                         const Number*>(x.pairs.at(first)), count,
#                     out.data(), rows);
#     else
# #endif
# #ifdef GPTOSS_AVX2  // a panel takes any rows, a tile sixteen
#     if (count >= X::TILED && (SIDE == 4 || rows == ROWS))
#       x.by_tile(w, s, rows, first, count, out.data());
#     else
# #endif
#       rows_for_few(w, s, rows, x.digits, {&x.from[first], size_t(count)},
#                    out.data());
#     for (int64_t i = 0; i < count; ++i)
#       emit(first + i, e, row0, rows, &out[i * rows]);
#   });
# }
# ```

# %% [markdown]
# ### And between the two layers of an expert?
#
# Both layers of all chosen experts are one call. Between them the hidden
# vector stays in fp32, where plain torch rounds to bf16 before the SwiGLU and
# several times inside it. Each pick writes a row of its own, so threads never
# add to the same number, and the sum over the $K$ picks of a token has one
# fixed order: the same bits whatever the number of threads.
#
# The SwiGLU of [experts](../moe/experts.ipynb) is that of [the first three](
# first_three.ipynb), for eight at a time. Gate and up lie in neighbouring
# rows, which `shufflevector` takes apart. A bias is added, and in the second
# layer each pick is multiplied with its share, before the sum.

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# // hidden (places, F) of the experts' first layer
# template <class X>
# Tensor run_gate_up(const Packed& weight, const Number* bias, float limit,
#                    const Groups& groups, const X& x) {
#   const int64_t F = weight.rows / 2;
#   const Tensor all = scratch({int64_t(groups.order.size()), F}, at::kFloat);
#   float* hidden = all.data_ptr<float>();
#   grouped_linear(weight, groups, x, [&](int64_t place, int64_t e,
#       int64_t row0, int64_t rows, const float* v) {
#     const Number* b = bias + e * weight.rows + row0;
#     float* to = hidden + place * F + row0 / 2;
#     for (int64_t r = 0; r < rows; r += 16) {  // 2 F is a multiple of 64
#       const Floats one = load<Floats>(v + r) + widen(b + r);
#       const Floats two = load<Floats>(v + r + 8) + widen(b + r + 8);
#       store(to + r / 2, clamped_swiglu(
#           __builtin_shufflevector(one, two, 0, 2, 4, 6, 8, 10, 12, 14),
#           __builtin_shufflevector(one, two, 1, 3, 5, 7, 9, 11, 13, 15),
#           limit));
#     }
#   });
#   return all;
# }
#
# // y (tokens, D) of the second layer, the K results weighted and summed
# template <class X>
# Buffer run_down(const Packed& weight, const Number* bias,
#                 const Number* shares, const Groups& groups,
#                 const X& hidden, int64_t K) {
#   const int64_t D = weight.rows, tokens = groups.order.size() / K;
#   const Tensor all = scratch({tokens * K, D}, at::kFloat);
#   float* out = all.data_ptr<float>();
#   Buffer y(tokens * D);
#   grouped_linear(weight, groups, hidden, [&](int64_t place, int64_t e,
#       int64_t row0, int64_t rows, const float* v) {
#     const int64_t pick = groups.order[place];
#     const Number* b = bias + e * D + row0;
#     float* to = out + pick * D + row0;
#     for (int64_t r = 0; r < rows; ++r) to[r] = shares[pick] * (v[r] + b[r]);
#   });
#   at::parallel_for(0, tokens, 8, [&](int64_t begin, int64_t end) {
#     for (int64_t pick = begin * K; pick < end * K; ++pick)
#       for (int64_t d = 0; d < D; ++d)
#         y[pick / K * D + d] += out[pick * D + d];
#   });
#   return y;
# }
# ```

# %% [markdown]
# ### The two operators
#
# A packed weight alone is one with a single expert, to which every token goes.

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# Tensor mxfp4_linear(const Tensor& x, const Tensor& blocks,
#                     const Tensor& scales,
#                     const std::optional<Tensor>& bias) {
#   if (!ours({x, bias.value_or(x)}) || !packed({blocks, scales})
#       || scales.dim() != 2)
#     return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
#                                          bias);
#   TORCH_CHECK(has(blocks, {scales.size(0), scales.size(1), 16}),
#               "mxfp4_linear: blocks: expected (m, n / 32, 16) beside "
#               "scales ", scales.sizes(), ", found ", blocks.sizes());
#   const Packed weight(blocks, scales);
#   const int64_t m = weight.rows, n = weight.blocks * BLOCK;
#   check_linear("mxfp4_linear", x, m, n, bias);
#   if (!x.numel() || !m || (bias && !has(*bias, {m})))
#     return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
#                                          bias);
#   const int64_t N = x.numel() / n;
#   Buffer y(N * m);
#   const std::vector<int64_t> ids(N, 0);
#   const Groups one(ids.data(), N, 1);
#   const Buffer from = floats(x);
#   const Inputs inputs(from.data(), N, weight, STORED, one.order, one);
#   grouped_linear(weight, one, inputs, [&](
#       int64_t place, int64_t, int64_t row0, int64_t rows, const float* v) {
#     std::copy_n(v, rows, &y[place * m + row0]);
#   });
#   add_bias(y, bias);
#   return result(x, m, y);
# }
#
# template <class X>
# Tensor packed_experts(const Tensor& x, const Tensor& ids,
#                       const Tensor& weights, const Tensor& gate_up_blocks,
#                       const Tensor& gate_up_scales,
#                       const Tensor& gate_up_bias, const Tensor& down_blocks,
#                       const Tensor& down_scales, const Tensor& down_bias,
#                       double limit) {
#   auto fits = [&] {  // x (N, D), ids (N, K), gate_up (E, 2 F, D), down ...
#     if (x.dim() != 2 || ids.dim() != 2 || gate_up_scales.dim() != 3)
#       return false;
#     const int64_t N = x.size(0), D = x.size(1), K = ids.size(1);
#     const int64_t E = gate_up_scales.size(0), F = gate_up_scales.size(1) / 2;
#     return N && D && K && E && F && D % BLOCK == 0 && F % BLOCK == 0
#         && has(ids, {N, K}) && has(weights, {N, K})
#         && has(gate_up_scales, {E, 2 * F, D / BLOCK})
#         && has(gate_up_blocks, {E, 2 * F, D / BLOCK, 16})
#         && has(down_scales, {E, D, F / BLOCK})
#         && has(down_blocks, {E, D, F / BLOCK, 16})
#         && has(gate_up_bias, {E, 2 * F}) && has(down_bias, {E, D});
#   };
#   if (!ours({x, weights, gate_up_bias, down_bias}) || !whole({ids})
#       || !packed({gate_up_blocks, gate_up_scales, down_blocks, down_scales})
#       || !gate_up_bias.is_contiguous() || !down_bias.is_contiguous()
#       || !fits())
#     return plain<decltype(packed_experts<X>)>(
#         X::OPERATOR, x, ids, weights, gate_up_blocks, gate_up_scales,
#         gate_up_bias, down_blocks, down_scales, down_bias, limit);
#   const Packed gate_up(gate_up_blocks, gate_up_scales);
#   const Packed down(down_blocks, down_scales);
#   const Tensor chosen = ids.contiguous(), shares = weights.contiguous();
#   const int64_t K = ids.size(1), picks = ids.numel();
#   if (x.size(0) < READING) pool().clear();
#   const Groups groups(chosen.const_data_ptr<int64_t>(), picks,
#                       gate_up_scales.size(0));
#   std::vector<int64_t> token(picks), place(picks);
#   for (int64_t i = 0; i < picks; ++i) {
#     token[i] = groups.order[i] / K;
#     place[i] = i;
#   }
#   const Buffer from = floats(x);
#   const Tensor hidden = run_gate_up<X>(
#       gate_up, numbers(gate_up_bias), limit, groups,
#       {from.data(), picks / K, gate_up, STORED, token, groups});
#   const Buffer y = run_down<X>(
#       down, numbers(down_bias), numbers(shares), groups,
#       {hidden.data_ptr<float>(), picks, down, FINEST, place, groups}, K);
#   return result(x, down.rows, y);
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("mxfp4_linear", mxfp4_linear);
#   m.impl("packed_experts", packed_experts<Inputs>);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## What is refused
#
# As in [the first three](first_three.ipynb), what cannot be right is refused
# by name: blocks that do not fit the scales, columns that do not fit x, an
# expert's number outside 0 … E - 1. Everything else that is not bf16 with
# bytes in one piece, or has no rows, or whose widths are no multiples of 32,
# is left to plain torch.
#
# ## It holds
#
# **Kernel and plain torch against float64**, on the same inputs in bf16. The
# packed product ends in one rounding to bf16, and so does the torch path:
# their distances from the exact result must agree to one part in a thousand.
# (Without a compiler a twin stands in: float32, and one rounding.)

# %%
from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel, mxfp4_linear, packed_experts
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import PackedMXFP4

load_upto("dense")


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def errors_of(run, *tensors) -> tuple[float, float]:
    """Distance from float64 of the kernel's and of plain torch's result."""
    def as_type(dtype):
        return [x.to(dtype) if x.is_floating_point() else x for x in tensors]

    with torch.inference_mode():
        fast = (run(*tensors) if has_kernel()
                else run(*as_type(torch.float32)).bfloat16())
        with plain_torch():
            slow, exact = run(*tensors), run(*as_type(torch.float64))
    return off(fast.double(), exact), off(slow.double(), exact)


torch.manual_seed(0)
for tokens in (1, 3, 13, 23):
    for rows, columns in ((50, 96), (33, 128), (64, 2880)):
        blocks, scales = encode(0.02 * torch.randn(rows, columns))
        ours, torchs = errors_of(
            mxfp4_linear, torch.randn(tokens, columns).bfloat16(), blocks,
            scales, torch.randn(rows).bfloat16())
        assert ours < 1.001 * torchs < 3e-3
    print(f"{tokens:2} tokens: kernel {ours:.4f}, plain torch {torchs:.4f}")

# %% [markdown]
# **The experts** keep fp32 between their layers and must be nearer:

# %%
E, K, width, hidden = 8, 2, 160, 128
gate_up = encode(0.1 * torch.randn(E, 2 * width, hidden))
down = encode(0.1 * torch.randn(E, hidden, width))
biases = (torch.randn(E, 2 * width).bfloat16(),
          torch.randn(E, hidden).bfloat16())
for tokens in (1, 2, 100):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])

    def run(x, weights, up_bias, down_bias, ids=ids):
        return packed_experts(x, ids, weights, PackedMXFP4(*gate_up), up_bias,
                              PackedMXFP4(*down), down_bias)

    ours, torchs = errors_of(run, torch.randn(tokens, hidden).bfloat16(),
                             torch.rand(tokens, K).bfloat16(), *biases)
    assert ours < torchs / 2
    print(f"{tokens:3} tokens: kernel {ours:.3f}, plain torch {torchs:.3f}")

# %% [markdown]
# ## In the 20b and the 120b
#
# How many tokens does an expert get, if a prompt of some length is spread
# evenly? The 120b has four times as many experts, so a prompt must be four
# times as long to fill its tiles.

# %%
for tokens in (1, 32, 128, 512, 2048):
    print(f"{tokens:4} tokens: {tokens * 4 / 32:5.1f} an expert in the 20b, "
          f"{tokens * 4 / 128:4.1f} in the 120b")

# %% [markdown]
# ## Takeaways
#
# - One token is limited by reading, many by arithmetic: below 13 tokens every
#   four look a weight up, from 13 on tiles are decoded for all of them.
# - A tile stays in the L1 cache while tokens pass, five at a time: as many as
#   the registers hold sums for.
# - Sorting picks by expert costs a count and a pass; no matrix is gathered.
# - fp32 between two layers is nearer to the exact result.
#
# ## Exercises
#
# ### Exercise 1
#
# With 32 experts of which 4 are chosen, how many tokens does an expert get
# when 512 are fed? Does any get too few for a tile? Simulate uniform routing.

# %% tags=["hide-cell"]
torch.manual_seed(0)
chosen = torch.rand(512, 32).topk(4).indices
counts = torch.bincount(chosen.flatten(), minlength=32)
assert counts.sum() == 2048 and counts.min() >= 13
print(f"{counts.float().mean():.0f} on average, at least "
      f"{counts.min()}: every expert is worth a tile")

# %% [markdown]
# ### Exercise 2
#
# AVX-512 has 32 registers of 64 bytes. How many tokens at a time could a tile
# of 32 rows take there, with three registers kept free, and how many products
# would each load serve?

# %% tags=["hide-cell"]
for registers, words in ((16, "AVX2"), (32, "AVX-512")):
    n = (registers - 3 - 3) // 2
    print(f"{words}: {n} tokens, {2 * n / (2 + n):.2f} products a load")

# %% [markdown]
# ### Exercise 3
#
# Change `groups` so that experts come in the order of their number of picks,
# the most popular first. Why could that help when pieces are shared among
# threads as they come?

# %% tags=["hide-cell"]
begin = groups(flat.tolist(), 5)[1]
popular = sorted(range(5), key=lambda e: begin[e] - begin[e + 1])
ranks = {e: rank for rank, e in enumerate(popular)}
sorted_picks, _ = groups([ranks[e] for e in flat.tolist()], 5)
print("experts:", [flat[pick].item() for pick in sorted_picks])
print("the longest pieces are begun first, and short ones fill what is left")

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/triton/moe.py`: such tiles on a GPU.
