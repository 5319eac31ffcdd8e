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
# What changes when not one token meets a weight but 2, 8 or 512? A prompt of
# 512 tokens brings 64 to each expert of the 20b. Decoding the weight once
# serves them all, and is soon next to nothing; the arithmetic, a product for
# each token, becomes the limit ([roofline](roofline.ipynb)). So the same four
# bits want another loop, one that gets ten products out of each seven loads.

# %% [markdown]
# ## Derivation
#
# A tile of decoded weights must stay in the cache while the tokens pass, and
# may be as wide as the activations, since widening it is done once: 16 rows by
# 320 columns of 16-bit integers are 10 KiB, a third of an L1 cache of 32 KiB.
# `pmaddwd` multiplies sixteen pairs of them and adds neighbours. Two columns
# of the tile are 2 registers, 8 rows each. For five tokens at a time, a step
# loads these 2 and 5 pairs of activations, and does 10 `pmaddwd`; ten sums,
# the two weights and one pair of activations take 13 of the 16 registers.

# %%
print(16 * 320 * 2, "bytes of a decoded tile,", 2 * 5 + 2 + 1, "registers,",
      f"{2 * 5 / (2 + 5):.1f} products a load")

# %% [markdown]
# ## Code
#
# ### Sixteen rows, many tokens
#
# For a tile, pairs of columns must lie side by side, row after row, so that
# one activation pair, broadcast, meets eight rows in one instruction:
# `values[b][u][m]` holds, for 16 rows, the two columns of block b that meet
# `values[u][2 * m]` of a line and the number behind it. Rows become columns by
# four rounds of interleaving, like riffling a deck.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX2
# constexpr int64_t CHUNK = 10;  // blocks: 10 KiB of integers, a third of L1
#
# struct Tile {  // 16 rows of a weight, pairs of columns side by side
#   alignas(64) int16_t values[CHUNK][2][8][16][2];
#   alignas(64) float factors[CHUNK][16];
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
#         auto to = reinterpret_cast<__m256i*>(tile.values[b][u][m]);
#         to[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(two[0], two[1]));
#         to[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(two[0], two[1]));
#       }
#   }
# }
# ```

# %% [markdown]
# Interleaving the two halves of a list four times transposes 16 by 16; here
# with Python's lists:

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
# The inner loop is all loads, `pmaddwd` and additions, with every sum in a
# register. Factors are applied once a block.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# constexpr int TOKENS = 5;  // ten sums, two weights, one activation
#
# struct Few {  // tokens that are multiplied with a tile together
#   const Line* lines[TOKENS];
#   const float* halves[TOKENS];
#   float* out[TOKENS];  // 16 sums each
# };
#
# // sums, plus sixteen products added in pairs
# inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
# #ifdef GPTOSS_AVX512
#   return _mm256_dpwssd_epi32(sums, a, b);
# #elif defined(GPTOSS_VNNI)
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
#     for (int u = 0; u < 2; ++u)
#       for (int m = 0; m < 8; ++m) {
#         auto w = reinterpret_cast<const __m256i*>(tile.values[b][u][m]);
#         const __m256i w0 = w[0], w1 = w[1];
#         for (int t = 0; t < TOKENS; ++t) {
#           const __m256i x = _mm256_set1_epi32(load<int32_t>(
#               &few.lines[t][first + b].values[u][2 * m]));
#           s[t][0] = add_products(s[t][0], w0, x);
#           s[t][1] = add_products(s[t][1], w1, x);
#           hold(s[t][0]), hold(s[t][1]);
#         }
#       }
#     for (int t = 0; t < TOKENS; ++t)
#       for (int half = 0; half < 2; ++half) {
#         float* to = few.out[t] + 8 * half;
#         const Floats f = load<Floats>(&tile.factors[b][8 * half])
#                          * few.halves[t][first + b];
#         store(to, load<Floats>(to)
#                   + (Floats)_mm256_cvtepi32_ps(s[t][half]) * f);
#       }
#   }
# }
# #endif
# ```

# %% [markdown]
# ### Tokens by expert
#
# [Experts](../moe/experts.ipynb) sorts tokens by expert with `argsort`. Here a
# counting sort does it. A *pick* is one choice of one token: token $n$, choice
# $k$ is pick $nK + k$.

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
# All tokens of one expert: for fewer than four, row by row as in
# [packed](packed.ipynb); from four on, sixteen rows at a time by tiles.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# constexpr int64_t ROWS = 16;  // of a tile
#
# #ifdef GPTOSS_AVX2
# // the same for sixteen rows and many tokens, by a tile
# void rows_for_many(const uint8_t* w, const uint8_t* scales,
#                    const Quantised& x, const std::vector<int64_t>& inputs,
#                    float* out) {
#   const int64_t count = inputs.size(), blocks = x.blocks;
#   Tile tile;
#   std::fill_n(out, count * ROWS, 0.0f);
#   for (int64_t b = 0; b < blocks; b += CHUNK) {
#     const int64_t some = std::min(CHUNK, blocks - b);
#     decode_tile(w + 16 * b, scales + b, blocks, some, tile);
#     for (int64_t i = 0; i < count; i += TOKENS) {
#       float spare[ROWS] = {};  // the last group may have empty places
#       Few few;
#       for (int64_t t = 0; t < TOKENS; ++t) {
#         const bool real = i + t < count;
#         const int64_t n = inputs[real ? i + t : i];
#         few.lines[t] = x.line(n);
#         few.halves[t] = x.half(n);
#         few.out[t] = real ? out + (i + t) * ROWS : spare;
#       }
#       multiply_tile(tile, few, b, some);
#     }
#   }
# }
# #endif
# ```

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# constexpr int64_t FEW = 4;     // fewer tokens: no tile
# constexpr int64_t TALL = 256;  // rows of a piece of work for those
# ```

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# struct Piece {
#   int64_t expert, row, rows;
# };
#
# // few tokens: tall pieces; many: tiles, and what is left below the last
# std::vector<Piece> pieces(const Packed& weight, const Groups& groups) {
#   std::vector<Piece> all;
#   for (int64_t e : groups.hit) {
#     const bool few = groups.begin[e + 1] - groups.begin[e] < FEW;
#     for (int64_t r = 0, height; r < weight.rows; r += height) {
#       height = std::min(few ? TALL : ROWS, weight.rows - r);
#       all.push_back({e, r, height});
#     }
#   }
#   return all;
# }
#
# // emit(pick, expert, first row, rows, sums) for every pick and piece;
# // K picks in a row share one row of x
# template <class Emit>
# void grouped_linear(const Packed& weight, const Groups& groups,
#                     const Quantised& x, int64_t K, const Emit& emit) {
#   const std::vector<Piece> all = pieces(weight, groups);
#   share(all.size(), 1, [&](int64_t item) {
#     const auto [e, row0, rows] = all[item];
#     const int64_t* picks = &groups.order[groups.begin[e]];
#     const int64_t count = groups.begin[e + 1] - groups.begin[e];
#     thread_local std::vector<int64_t> inputs;
#     thread_local Buffer out;
#     inputs.resize(count);
#     for (int64_t i = 0; i < count; ++i) inputs[i] = picks[i] / K;
#     out.resize(count * rows);
#     const int64_t at = (e * weight.rows + row0) * weight.blocks;
#     const uint8_t *w = weight.bytes + 16 * at, *s = weight.scales + at;
# #ifdef GPTOSS_AVX2
#     if (count >= FEW && rows == ROWS)
#       rows_for_many(w, s, x, inputs, out.data());
#     else
# #endif
#       rows_for_few(w, s, rows, x, inputs, out.data());
#     for (int64_t i = 0; i < count; ++i)
#       emit(picks[i], e, row0, rows, &out[i * rows]);
#   });
# }
# ```

# %% [markdown]
# ### The experts
#
# Both layers of all chosen experts in one call. Between them the hidden
# vector stays in fp32; the plain path rounds to bf16 before the SwiGLU and
# five times inside it. Each pick writes a row of its own, so threads never
# add to the same number and the sum over $K$ has one fixed order: the same
# bits whatever the number of threads.

# %% [markdown]
# Their activation needs an exponential, eight at a time: $e^x = 2^n e^r$ with
# integer $n$ and $|r| \le \tfrac12 \log 2$, where the Taylor series to $r^7$
# suffices. $\log 2$ is subtracted in two parts so that $r$ keeps its last
# bits.

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# // e ** x for -87 <= x <= 0, relative error below 1e-6; less gives e ** -87
# inline Floats exponential(Floats x) {
#   x = x < -87.0f ? Floats{} - 87.0f : x;
#   const Floats shifted = x * 1.44269504f + 12582912.0f;
#   const Floats n = shifted - 12582912.0f;  // x / log 2, rounded
#   const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
#   Floats p = r * (1.0f / 5040) + 1.0f / 720;
#   for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
#     p = p * r + factor;
#   const Ints power = ((Ints)shifted - 0x4b400000) << 23;
#   return (Floats)((Ints)p + power);  // times 2 ** n
# }
# ```

# %%
import torch


def exponential(x: torch.Tensor) -> torch.Tensor:
    """`exponential` of experts.h in torch, fp32."""
    n = (x * 1.44269504).round()
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = r / 5040 + 1 / 720
    for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + factor
    return p * 2 ** n


line = torch.linspace(-87, 0, 100_001)
worst = (exponential(line) / line.double().exp() - 1).abs().max().item()
assert worst < 1e-6
print(f"relative error at most {worst:.0e}")

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# constexpr float MAX = std::numeric_limits<float>::max();
#
# inline Floats clamped_swiglu(Floats gate, Floats up, float limit) {
#   const Floats most = Floats{} + limit, least = Floats{} - 1e4f;
#   gate = gate > most ? most : gate;  // written so that NaN stays NaN
#   gate = (gate < least) & (gate >= -MAX) ? least : gate;  // as good as zero
#   up = up > most ? most : up < -most ? -most : up;
#   const Floats t = 1.702f * gate, e = exponential(t > 0 ? -t : t);
#   return (up + 1) * gate * (t > 0 ? Floats{} + 1.0f : e) / (1 + e);
# }
#
# // hidden (picks, F) of the experts' first layer
# Buffer run_gate_up(const Packed& weight, const Number* bias, float limit,
#                    const Groups& groups, const Quantised& x, int64_t K) {
#   const int64_t F = weight.rows / 2;
#   Buffer hidden(groups.order.size() * F);
#   grouped_linear(weight, groups, x, K, [&](int64_t pick, int64_t e,
#       int64_t row0, int64_t rows, const float* v) {
#     const Number* b = bias + e * weight.rows + row0;
#     float* to = &hidden[pick * F + row0 / 2];
#     for (int64_t r = 0; r < rows; r += 16) {  // 2 F is a multiple of 64
#       const Floats one = load<Floats>(v + r) + widen(b + r);
#       const Floats two = load<Floats>(v + r + 8) + widen(b + r + 8);
#       store(to + r / 2, clamped_swiglu(
#           __builtin_shufflevector(one, two, 0, 2, 4, 6, 8, 10, 12, 14),
#           __builtin_shufflevector(one, two, 1, 3, 5, 7, 9, 11, 13, 15),
#           limit));
#     }
#   });
#   return hidden;
# }
#
# // y (tokens, D) of the second layer, the K results weighted and summed
# Buffer run_down(const Packed& weight, const Number* bias,
#                 const Number* shares, const Groups& groups,
#                 const Quantised& hidden, int64_t K) {
#   const int64_t D = weight.rows, tokens = groups.order.size() / K;
#   Buffer out(tokens * K * D), y(tokens * D);
#   grouped_linear(weight, groups, hidden, 1, [&](int64_t pick, int64_t e,
#       int64_t row0, int64_t rows, const float* v) {
#     const Number* b = bias + e * D + row0;
#     float* to = &out[pick * D + row0];
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
# One struct stands here for a part that is compiled before its own chapter:
# a matrix of [twelve bits](twelve_bits.ipynb), not used in this one.

# %% [markdown] tags=["export:experts.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# constexpr int64_t WEIGHTS = 64, SIZE = WEIGHTS * 3 / 2;  // of a block, bytes
#
# struct Compact {  // (rows, blocks, SIZE) bytes
#   const uint8_t *bytes, *upper;
#   const int32_t *first, *others;  // row r: others[first[r] ... first[r + 1]]
#   int64_t rows, blocks, count;    // count: of all others
#
#   const uint8_t* row(int64_t r) const { return bytes + r * blocks * SIZE; }
# };
# #endif
# ```

# %% [markdown]
# The two operators. A packed weight alone is one with a single expert, to
# which every token goes.

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
#   grouped_linear(weight, Groups(ids.data(), N, 1),
#                  quantised(floats(x), true, N, weight.blocks), 1,
#                  [&](int64_t pick, int64_t, int64_t row0, int64_t rows,
#                      const float* v) {
#     std::copy_n(v, rows, &y[pick * m + row0]);
#   });
#   add_bias(y, bias);
#   return result(x, m, y);
# }
# ```

# %% [markdown] tags=["export:experts.h"]
# ```cpp
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
#     return plain<decltype(packed_experts)>(
#         "packed_experts", x, ids, weights, gate_up_blocks, gate_up_scales,
#         gate_up_bias, down_blocks, down_scales, down_bias, limit);
#   const Packed gate_up(gate_up_blocks, gate_up_scales);
#   const Packed down(down_blocks, down_scales);
#   const Tensor chosen = ids.contiguous(), shares = weights.contiguous();
#   const int64_t K = ids.size(1), picks = ids.numel();
#   const Groups groups(chosen.const_data_ptr<int64_t>(), picks,
#                       gate_up_scales.size(0));
#   const Buffer hidden = run_gate_up(
#       gate_up, numbers(gate_up_bias), limit, groups,
#       quantised(floats(x), true, picks / K, gate_up.blocks), K);
#   const Buffer y = run_down(
#       down, numbers(down_bias), numbers(shares), groups,
#       quantised(hidden, false, picks, down.blocks), K);
#   return result(x, down.rows, y);
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("mxfp4_linear", mxfp4_linear);
#   m.impl("packed_experts", packed_experts);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ### Dense matrices
#
# Attention and the head are stored in bf16, two thirds of what a token reads.
# A bf16 number is the upper half of a float. Of eight pairs in a register, a
# shift gives the even ones and a mask the odd ones, two instructions for
# sixteen weights; the activations are split the same way beforehand.
# (Processors with AVX512-BF16 multiply bf16 as it is, by `dense_dots` of the
# [appendix](../cli/wide.ipynb).)
#
# Four rows are read at the same time, as in [packed](packed.ipynb), and with
# AVX2 a row is asked for three quarters of a KiB ahead of its use: on two
# cores the dense matrices of the 20b, in [twelve bits](twelve_bits.ipynb),
# then took 44 to 53 ms a token, by memory's mood, where two rows and no
# prefetch took 52 to 57.

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

# %%
pair = torch.tensor([1.5, -3.25]).bfloat16().view(torch.int32)
print((pair << 16).view(torch.float32).item(),
      (pair & -65536).view(torch.float32).item())

# %% [markdown]
# For many tokens a tile is widened to fp32 and transposed, since AVX2 cannot
# multiply bf16. Three rounds of the same interleaving.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
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
# The product of a tile with six tokens at a time: twelve sums, two weights
# and one activation in fifteen registers. [Attention](attending.ipynb) uses it
# as well.

# %% [markdown] tags=["export:tiles.h"]
# ```cpp
# template <class Pointer>
# struct Matrix {  // row-major
#   Pointer at;
#   int64_t stride;
# };
# using Source = Matrix<const float*>;
# using Target = Matrix<float*>;
#
#
# }  // namespace
# ```

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
# Up to four tokens by rows, more by tiles:

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
# **Kernels against plain torch against float64**, on the same inputs in bf16.
# The packed product ends in one rounding to bf16, and so does the torch path:
# their distances from the exact result must agree to one part in a thousand.
# (Without a compiler a twin stands in for the kernel: the same in float32, and
# one rounding.)

# %%
import logging
import os

from gptoss.kernels.build import PARTS, KernelError, build, plain_torch
from gptoss.model.ops import has_kernel, mxfp4_linear, packed_experts
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import PackedMXFP4

os.environ["GPTOSS_KERNELS"] = "torch"  # one library a process: this one
logging.getLogger("gptoss").setLevel(logging.ERROR)  # built without a word
try:
    upto = PARTS[:PARTS.index("dense") + 1]
    torch.ops.load_library(str(build(parts=upto)))
except KernelError:
    pass


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
for tokens in (1, 3, 4, 23):
    for rows, columns in ((50, 96), (33, 128), (64, 2880)):
        blocks, scales = encode(0.02 * torch.randn(rows, columns))
        ours, torchs = errors_of(
            mxfp4_linear, torch.randn(tokens, columns).bfloat16(), blocks,
            scales, torch.randn(rows).bfloat16())
        assert ours < 1.001 * torchs < 3e-3
    print(f"{tokens:2} tokens: kernel {ours:.4f}, plain torch {torchs:.4f}")

# %% [markdown]
# **Dense matrices**, few tokens and many, with rows that fill no tile:

# %%
for tokens in (1, 4, 5, 20):
    ours, torchs = errors_of(
        torch.ops.gptoss.linear, torch.randn(tokens, 320).bfloat16(),
        torch.randn(150, 320).bfloat16(), torch.randn(150).bfloat16())
    assert ours < 1.01 * torchs < 3e-3
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
# ## Takeaways
#
# - One token is limited by reading, many by arithmetic: below four tokens rows
#   are read one by one, from four on sixteen are decoded once for all.
# - A tile stays in the L1 cache while tokens pass, five at a time: as many as
#   the registers hold sums for.
# - Sorting picks by expert costs a count and a pass; no matrix is gathered.
# - What stays in fp32 between two layers is nearer to the exact result than
#   what is rounded at every step.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# With 32 experts of which 4 are chosen, how many tokens does an expert get
# when 512 are fed? Does any get fewer than the four from which on a tile is
# used? Simulate uniform routing.

# %% tags=["hide-cell"]
torch.manual_seed(0)
chosen = torch.rand(512, 32).topk(4).indices
counts = torch.bincount(chosen.flatten(), minlength=32)
assert counts.sum() == 2048 and counts.min() >= 4
print(f"{counts.float().mean():.0f} on average, at least "
      f"{counts.min()}: every expert is worth a tile")

# %% [markdown]
# ### Exercise 2
#
# With `TOKENS` tokens at a time, how many loads does a product of the tile
# need, and how many registers? Where is the limit with sixteen of them?

# %% tags=["hide-cell"]
for tokens in (1, 2, 5, 6, 7):
    print(f"{tokens} tokens: {(2 + tokens) / (2 * tokens):.2f} loads a "
          f"product, {2 * tokens + 2 + 1:2} registers")

# %% [markdown]
# ## Sources
#
# - Tiles of a matrix that stay in a cache: openai/gpt-oss,
#   `gpt_oss/triton/moe.py`, does the same for a GPU.
# - Cephes, `exp`: the two parts of $\log 2$, https://www.netlib.org/cephes
