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
#     module: coarse
#     public: [CoarseExperts, hold_activations]
# ---
# %% [markdown]
# # Bytes times bytes, if you ask
#
# ## Question
#
# What does a prompt gain if activations have eight bits as well? The fastest
# engines for a CPU round them so, and multiply bytes by bytes.
# [Packed](packed.ipynb) refused: the product is then off by more than three
# times what storing it in bf16 does to it. But a byte passes through the
# processor twice as fast as sixteen bits do. Whoever reads long prompts may
# want that bargain, and should see its price first. As with
# [eight-bit weights](eight_bits.ipynb), nobody gets it who does not ask.

# %%
import logging
import os

import matplotlib.pyplot as plt
import torch

from gptoss.kernels.build import load_kernels

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
load_kernels()

words = 16 + 15  # 16 products of pairs in 16 bits, 15 additions
bytes_ = 8 + 6 + 2 + 2  # 8 products, additions in 16 bits, then in 32
print(f"256 weights and one token: {words} instructions with sixteen bits, "
      f"{bytes_} with eight; {words / bytes_:.1f} times fewer")

# %% [markdown]
# ## Picture
#
# An expert of the 20b's shapes: two matrices, and between them the gate. How
# far from the exact result does it end, if its matrices are exact, and what
# enters each of them is rounded?

# %% tags=["hide-input", "picture"]
# Figure: horizontal bars on a logarithmic axis, the error of an expert's
# output in percent: sixteen bits 0.004, one rounding to bf16 0.17, plain
# torch in bf16 0.4, eight bits 1.1.
from gptoss.moe.experts import clamped_swiglu, one_expert
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """How far apart, as a share of the length of `right`."""
    right = right.double()
    return ((found.double() - right).norm() / right.norm()).item()


def rounded(x: torch.Tensor, largest: int, size: int = 32) -> torch.Tensor:
    """Each `size` numbers in whole steps, of which their largest is so many"""
    parts = x.unflatten(-1, (-1, size))
    step = parts.abs().amax(-1, keepdim=True) / largest
    return ((parts / step).nan_to_num().round() * step).flatten(-2)


torch.manual_seed(0)
up, down = (encode(0.02 * torch.randn(rows, columns))
            for rows, columns in ((1472, 2880), (736, 736)))
W1, W2 = (decode(*packed, torch.float64) for packed in (up, down))
b1, b2 = torch.zeros(1472).double(), torch.zeros(736).double()
x = torch.randn(64, 2880).bfloat16().double()
right = one_expert(x, W1, b1, W2, b2)


def expert(largest: int) -> torch.Tensor:
    """The same, what enters either matrix rounded."""
    hidden = clamped_swiglu(rounded(x, largest) @ W1.T)
    return rounded(hidden, largest) @ W2.T


errors = {
    "sixteen bits": off(expert(32639), right),
    "exact, stored in bf16": off(right.bfloat16(), right),
    "plain torch in bf16": off(one_expert(*(
        t.bfloat16() for t in (x, W1, b1, W2, b2))), right),
    "eight bits": off(expert(127), right)}
fig, ax = plt.subplots(figsize=(6.4, 1.9))
ax.barh(list(errors), [100 * e for e in errors.values()],
        color=["C0", "0.7", "0.7", "C1"], height=0.6)
for y, error in enumerate(errors.values()):
    ax.text(100 * error * 1.1, y, f"{error:.2%}" if error > 1e-3
            else f"{error:.3%}", va="center", fontsize=8)
ax.set(xscale="log", xlabel="error of an expert's output, %",
       xlim=(2e-3, 3))
ax.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
ax.invert_yaxis()
plt.show()
for name, error in errors.items():
    print(f"{name:22} {error:.{2 if error > 1e-3 else 3}%}")
assert errors["eight bits"] > 2 * errors["plain torch in bf16"]

# %% [markdown]
# What to see: sixteen bits cost nothing that anybody could notice beside the
# rounding of the result. Eight bits cost more than everything else together:
# twice and a half what plain torch loses, which rounds to bf16 at every step.
#
# ## The naive version
#
# One step for a token's whole vector would do with fewer numbers. Normal
# numbers hardly mind, and what enters the experts of the shipped model hardly
# minds either. But large models are known for channels that are many times
# larger than the rest, in every token. What does one of them do to the others?

# %%
from pathlib import Path

import gptoss
from gptoss.model.layers import Experts
from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer

POCKET = Path(gptoss.__file__).parent / "pocket"
tokenizer = Tokenizer.from_pretrained(POCKET)
texts = [torch.tensor([tokenizer.encode(text)]) for text in (
    "Once upon a time there was a small fox named Mira. Mira lived in the "
    "forest. The best thing she had was a red kite. One day the wind took "
    "the kite, and Mira was sad. Then a bear came along the path.",
    "Once upon a time, a little cat called Lily woke up early. It was warm in "
    "the old barn, where Lily lived. Her father gave Lily a blue box. One "
    "morning she went to the lake with the box. There she played all day.",
    "Tom was a young dog. He had a green ball, and he was proud of it. In the "
    "garden he met a bird. The bird wanted to play with the ball. Tom gave "
    "the ball to the bird, and they were friends.")]
model = GptOss.from_pretrained(POCKET, torch.float64, packed=False)
entered: list[torch.Tensor] = []
hooks = [layer.register_forward_pre_hook(
    lambda module, given: entered.append(given[0]))
    for layer in model.modules() if isinstance(layer, Experts)]
with torch.inference_mode():
    for text in texts:
        model(text)
for hook in hooks:
    hook.remove()
real = torch.cat(entered)
spoilt = x.clone()
spoilt[:, 17] = 60  # one channel of 2880
for name, some in (("the shipped model", real), ("normal numbers", x),
                   ("with a large channel", spoilt)):
    small = some.abs() < 60
    each = {size: off(rounded(some, 127, size)[small], some[small])
            for size in (some.shape[1], 32)}
    print(f"{name:20}", ", ".join(f"{error:5.2%} with a step for {size}"
                                  for size, error in each.items()))
assert each[32] < each[2880] / 5

# %% [markdown]
# With one step for all, the large channel leaves the others two steps to
# either side. With a step for 32 it harms its 31 neighbours.
#
# So 32 activations share a step, as 32 weights share a scale.
#
# ## Derivation
#
# **The error** is that of [eight bits](eight_bits.ipynb), formula
# {eq}`eight-error`: a number is off by a step over $\sqrt{12}$, a step is the
# largest of 32 over 127, and for normal numbers that makes half a percent of
# each product. An expert has two products. Their errors have nothing to do
# with each other, so their squares add up. But the gate stands between them,
# and what is half a percent of its input is more of its output, since it is
# steep where it matters. And what it lets pass is not normal: of 32 hidden
# numbers a few are far larger than the rest, and so is the step for all.

# %%
first = off(clamped_swiglu(rounded(x, 127) @ W1.T) @ W2.T, right)
second = off(rounded(clamped_swiglu(x @ W1.T), 127) @ W2.T, right)
print(f"a number in 8 bits {off(rounded(x, 127), x):.2%}; after the first "
      f"product {off(rounded(x, 127) @ W1.T, x @ W1.T):.2%}, after the gate "
      f"and the second {first:.2%}")
print(f"rounded before the second only {second:.2%}; both by squares "
      f"{(first ** 2 + second ** 2) ** 0.5:.2%}, as found "
      f"{errors['eight bits']:.2%}")

# %% [markdown]
# **What is won?** AVX2 has no instruction that multiplies bytes and adds in 32
# bits. It has the one of [packed](packed.ipynb), 32 products of bytes without
# a sign and bytes with one, two neighbours added in 16 bits. The weights'
# table holds $w + 12$, from 0 to 24, so that
#
# $$ \sum_i w_i q_i = \sum_i (w_i + 12)\, q_i - 12 \sum_i q_i , \qquad
#    |q_i| \le 127 , $$ (coarse-sum)
#
# and one such pair is at most $2 \cdot 24 \cdot 127 = 6096$. How many pairs
# may be added before they outgrow 16 bits?

# %%
pair = 2 * 24 * 127
print(f"a pair {pair}; {2 ** 15 // pair} of them are at most "
      f"{2 ** 15 // pair * pair} of {2 ** 15 - 1}")
assert 4 * pair < 2 ** 15 < 8 * pair

# %% [markdown]
# A block of a row is 16 pairs. Its lane of 32 bits holds two sums of 16 bits,
# so each gets eight, which is too many. So half a block is added in 16 bits,
# and `pmaddwd` with ones takes two neighbours into 32 bits. That is 8 products
# and 6 additions, 2 `pmaddwd` and 2 additions for 256 weights: the 18
# instructions from above. Processors with VNNI do it all in 8.
#
# **And the tile?** [Many rows](many_rows.ipynb) makes 16-bit numbers of the
# weights, in pairs of columns. A byte is half of that, and *four* columns side
# by side are one word of 32 bits. In memory a row's four neighbouring bytes
# are such a word already: the low halves of it are elements 0, 2, 4, 6 of the
# row, the high halves 1, 3, 5, 7. So rows become columns by words, not by
# bytes, in three rounds instead of four, and for a quarter as many registers.
# In numpy the whole product is this:

# %%
import numpy as np


def byte_tile(w: np.ndarray) -> np.ndarray:
    """w (16, 32 b), integers -> (b, 2, 4, 16, 4): for each block, low or
    high halves, and word: four columns of 16 rows, plus 12."""
    words = w.reshape(16, -1, 4, 4, 2) + 12  # rows, blocks, words, byte, half
    return words.transpose(1, 4, 2, 0, 3)


def by_bytes(w, factors, q, steps):
    """Weights w (16, 32 b) times tokens q (n, 32 b); a factor for each block
    of both: factors (16, b), steps (n, b). -> (n, 16)"""
    lines = q.reshape(len(q), -1, 4, 4, 2).transpose(0, 1, 4, 2, 3)
    whole = np.einsum("bujrk,tbujk->tbr", byte_tile(w), lines)
    offset = -12 * lines.sum((2, 3, 4))  # one number for a token's block
    return np.einsum("tbr,rb,tb->tr", whole + offset[..., None], factors,
                     steps)


draw = np.random.default_rng(0)
w, q = draw.integers(-12, 13, (16, 64)), draw.integers(-127, 128, (3, 64))
factors, steps = 2.0 ** draw.integers(-9, 0, (16, 2)), draw.random((3, 2))
plain = (w * factors.repeat(32, 1)) @ (q * steps.repeat(32, 1)).T
print("first row, three tokens:",
      [round(y, 1) for y in by_bytes(w, factors, q, steps)[:, 0].tolist()])
print("by the plain product:   ", [round(y, 1) for y in plain[0].tolist()])
assert np.allclose(by_bytes(w, factors, q, steps), plain.T)

# %% [markdown]
# ## Code
#
# ### What is the operator, in plain torch?
#
# A page to read, and what runs wherever there is no kernel: in any type, on
# any device. It rounds, decodes and multiplies.

# %% tags=["export"]
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss.model.answers import find_answer
from gptoss.model.layers import Experts
from gptoss.model.ops import OPERATORS, Operator, define_operator, has_kernel
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import by_expert, clamped_swiglu
from gptoss.weights.mxfp4 import decode


def in_steps(x: Tensor) -> Tensor:
    """x (…, 32 n), each 32 numbers in whole steps of their largest over 127.

    A block whose step is at most 1e-37 is zeros; NaN and infinity make NaN.
    """
    parts = x.unflatten(-1, (-1, 32))
    step = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts / step).round().where(~(step <= 1e-37), 0.0)
    return (whole * step).flatten(-2)


def coarse_by_decoding(x: Tensor, ids: Tensor, weights: Tensor,
                       gate_up_blocks: Tensor, gate_up_scales: Tensor,
                       gate_up_bias: Tensor, down_blocks: Tensor,
                       down_scales: Tensor, down_bias: Tensor, limit: float
                       ) -> Tensor:
    """`packed_experts`, what enters each product in eight bits.

    fp32 between the layers, or float64 if x is.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def apply(e: int, rows: Tensor) -> Tensor:
        gate_up = F.linear(in_steps(rows), decode(
            gate_up_blocks[e], gate_up_scales[e], wide),
            gate_up_bias[e].to(wide))
        return F.linear(
            in_steps(clamped_swiglu(gate_up, limit)),
            decode(down_blocks[e], down_scales[e], wide),
            down_bias[e].to(wide))
    y = by_expert(x.to(wide), ids, weights.to(wide), len(gate_up_scales),
                  apply)
    return y.to(x.dtype)


define_operator("packed_experts_eight", Operator(
    OPERATORS["packed_experts"].schema, coarse_by_decoding,
    lambda x, *_: torch.empty_like(x)))

# %% [markdown]
# ### How does a tile of bytes come about?
#
# `transpose_words` takes eight rows of a block, sixteen bytes each, and gives
# four registers: word 0 of all eight rows, word 1, and so on. Each is looked
# up twice, its low halves and its high ones. The scales of 16 rows are
# gathered and become powers of two together; 255 becomes NaN. Sixteen rows
# are sixteen streams of memory, more than a processor follows by itself, so
# each row's next piece is asked for.

# %% [markdown] tags=["export:coarse.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX2
# constexpr float COARSE = 127;
# constexpr int64_t DEEP = 16;  // blocks: 8 KiB of bytes, a quarter of L1
# constexpr int A_TILE = 5;    // tokens
#
# struct ByteTile {  // 16 rows of a weight, four columns side by side
#   alignas(64) uint8_t values[DEEP][2][4][16][4];
#   alignas(64) float factors[DEEP][16];
# };
#
# // eight rows of four words become four registers: word j of all rows
# inline void transpose_words(const uint8_t* w, int64_t stride,
#                             __m256i (&v)[4]) {
#   __m256i t[4];
#   for (int i = 0; i < 4; ++i)
#     t[i] = _mm256_inserti128_si256(
#         _mm256_castsi128_si256(load<__m128i>(w + i * stride)),
#         load<__m128i>(w + (i + 4) * stride), 1);
#   const __m256i a = _mm256_unpacklo_epi32(t[0], t[1]);
#   const __m256i b = _mm256_unpackhi_epi32(t[0], t[1]);
#   const __m256i c = _mm256_unpacklo_epi32(t[2], t[3]);
#   const __m256i d = _mm256_unpackhi_epi32(t[2], t[3]);
#   v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
#   v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
# }
#
# // powers of two of eight rows' scales
# inline Floats powers(const uint8_t* eight) {
#   const Ints bits = (Ints)_mm256_cvtepu8_epi32(
#       _mm_cvtsi64_si128(load<int64_t>(eight))) << 23;
#   const Ints least = Ints{} + (1 << 22);
#   const Floats f = (Floats)(bits > least ? bits : least);
#   return f + 0 * f;  // infinity becomes NaN
# }
#
# void decode_bytes(const uint8_t* w, const uint8_t* scales, int64_t blocks,
#                   int64_t count, ByteTile& tile) {
#   const __m256i low = _mm256_set1_epi8(15);
#   const __m256i values = _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
#   for (int64_t b = 0; b < count; ++b)
#     for (int64_t r = 0; r < ROWS; r += 8) {
#       uint8_t column[8];
#       for (int64_t i = 0; i < 8; ++i) {
#         column[i] = scales[(r + i) * blocks + b];
#         if (b % 4 == 0)  // another 64 bytes of the row
#           __builtin_prefetch(w + ((r + i) * blocks + b + DEEP) * 16);
#       }
#       store(&tile.factors[b][r], powers(column));
#       __m256i v[4];
#       transpose_words(w + (r * blocks + b) * 16, 16 * blocks, v);
#       for (int u = 0; u < 2; ++u)  // low nibbles, high nibbles
#         for (int j = 0; j < 4; ++j) {
#           const __m256i nibbles = u ? _mm256_srli_epi16(v[j], 4) : v[j];
#           const __m256i found = _mm256_shuffle_epi8(
#               values, _mm256_and_si256(nibbles, low));
#           std::memcpy(tile.values[b][u][j][r], &found, sizeof found);
#         }
#     }
# }
# ```

# %% [markdown]
# ### How do bytes meet bytes?
#
# As derived: half a block is summed in 16 bits, where there is no VNNI. The
# sums begin with the offset of {eq}`coarse-sum`. Five tokens at a time take
# ten sums, two weights and one activation: 13 of 16 registers. (With AVX-512
# all this is left to the [panels](panels.ipynb), which know bytes.)

# %% [markdown] tags=["export:coarse.h"]
# ```cpp
# struct FewBytes {  // tokens that are multiplied with a tile together
#   const int8_t* bytes[A_TILE];
#   const int32_t* offsets[A_TILE];
#   const float* halves[A_TILE];
#   float* out[A_TILE];  // 16 sums each
# };
#
# // 8 rows: the sum of four columns in each lane, over half a block
# #if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
# inline __m256i add_four(__m256i sums, __m256i w, __m256i x) {  // in 32 bits
# #ifdef GPTOSS_AVX512
#   return _mm256_dpbusd_epi32(sums, w, x);
# #else
#   return _mm256_dpbusd_avx_epi32(sums, w, x);
# #endif
# }
#
# inline Ints added(__m256i sums) { return (Ints)sums; }
# #else
# // in 16 bits, four times at most
# inline __m256i add_four(__m256i sums, __m256i w, __m256i x) {
#   return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
# }
#
# inline Ints added(__m256i sums) {
#   return (Ints)_mm256_madd_epi16(sums, _mm256_set1_epi16(1));
# }
# #endif
#
# // adds blocks first ... first + count - 1 of 16 rows to the tokens' sums
# template <int T>
# void multiply_bytes(const ByteTile& tile, const FewBytes& few,
#                     int64_t first, int64_t count) {
#   const int8_t* from[T];
#   for (int t = 0; t < T; ++t) from[t] = few.bytes[t] + BLOCK * first;
#   for (int64_t b = 0; b < count; ++b) {
#     Ints s[T][2];
#     for (int t = 0; t < T; ++t)
#       s[t][0] = s[t][1] = Ints{} + few.offsets[t][first + b];
#     for (int u = 0; u < 2; ++u) {
#       __m256i half[T][2] = {};
# #pragma GCC unroll 4
#       for (int j = 0; j < 4; ++j) {
#         auto w = reinterpret_cast<const __m256i*>(tile.values[b][u][j]);
#         const __m256i w0 = w[0], w1 = w[1];
#         for (int t = 0; t < T; ++t) {
#           const __m256i x = _mm256_set1_epi32(load<int32_t>(
#               from[t] + BLOCK * b + 16 * u + 4 * j));
#           half[t][0] = add_four(half[t][0], w0, x);
#           half[t][1] = add_four(half[t][1], w1, x);
#           hold(half[t][0]), hold(half[t][1]);
#         }
#       }
#       for (int t = 0; t < T; ++t)
#         for (int h = 0; h < 2; ++h) s[t][h] += added(half[t][h]);
#     }
#     for (int t = 0; t < T; ++t)
#       for (int h = 0; h < 2; ++h) {
#         float* to = few.out[t] + 8 * h;
#         const Floats f = load<Floats>(&tile.factors[b][8 * h])
#                          * few.halves[t][first + b];
#         store(to, load<Floats>(to)
#                   + (Floats)_mm256_cvtepi32_ps((__m256i)s[t][h]) * f);
#       }
#   }
# }
# ```

# %% [markdown]
# ### What is left to write?
#
# Nearly nothing. [Many rows](many_rows.ipynb) sorts the picks, cuts the work
# into pieces and asks its `Inputs` for what stands at each place. `Coarse` is
# such inputs with 127 steps instead of 32639. A piece of few tokens is
# computed as there: it is limited by reading, and eight bits would gain
# little. Only the tile is another one, and it is worth its decoding from nine
# tokens on. With AVX-512 it is a panel, from eight tokens on; and where there
# are bf16 units, up to seven tokens go by the [strips](pairs.ipynb) in the
# first layer, which round nothing, and are quicker from two tokens on. (One
# would be quicker by its digits; but here those have eight bits.) So how much
# of a token is rounded depends on how many share its expert.
#
# **With AMX** bytes would be the worse bargain. Its [squares](amx.ipynb) take
# bf16 numbers, which have eight leading bits, each with an exponent of its own
# instead of one for 32. What enters the first layer is bf16 already, so
# nothing is rounded there. Hidden numbers become one column instead of two:
# half the products of the second layer, for an error of 0.17 %. That is what
# `Inputs` does with `STORED`, which `most` asks for.

# %% [markdown] tags=["export:coarse.h"]
# ```cpp
# struct Coarse : Inputs {
#   static constexpr char OPERATOR[] = "packed_experts_eight";
#   static constexpr int64_t TILED = SIDE == 4 ? 8 : 9;
#   static constexpr int64_t PAIR = 1;
#
# #ifdef GPTOSS_AVX512
#   Interleaved<WholePanel<InBytes>> four;
#
#   static float most() { return lent() ? STORED : COARSE; }
#
#   Coarse(const float* x, int64_t rows, const Packed& weight, float stored,
#          std::vector<int64_t> place, const Groups& groups)
#       : Inputs(x, rows, weight, most(), std::move(place), groups, false) {
#     if (lent()) return;
#     four = interleaved<InBytes>(digits, from, groups.begin, TILED);
#     few = TILED, low = BROAD;
# #ifdef GPTOSS_BF16  // few tokens go by strips, which need no rounding
#     if (!PAIRED || stored != STORED || !any_below(groups, TILED)) return;
#     pairs = paired(x, from, weight.blocks, groups.begin, PAIR);
#     few = TOGETHER + 1;
# #endif
#   }
#
#   void by_tile(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                int64_t first, int64_t count, float* out) const {
#     panels<WholePanel<InBytes>>(w, scales, rows, digits.blocks,
#                                 four.at(first), count, out);
#   }
# #else
#   std::vector<int8_t> bytes;     // (rows, blocks, 32), even elements first
#   std::vector<int32_t> offsets;  // -12 times the sum of a block
#
#   Coarse(const float* x, int64_t rows, const Packed& weight, float,
#          std::vector<int64_t> place, const Groups& groups)
#       : Inputs(x, rows, weight, COARSE, std::move(place), groups) {
#     few = TILED;
#     bytes.resize(rows * weight.blocks * BLOCK);
#     offsets.resize(rows * weight.blocks);
#     at::parallel_for(0, offsets.size(), 512, [&](int64_t b, int64_t end) {
#       for (; b < end; ++b) {
#         const int16_t* q = digits.lines[b].values[0];
#         std::copy(q, q + BLOCK, &bytes[b * BLOCK]);
#         for (int64_t i = 0; i < BLOCK; ++i) offsets[b] -= 12 * q[i];
#       }
#     });
#   }
#
#   void by_tile(const uint8_t* w, const uint8_t* scales, int64_t,
#                int64_t first, int64_t count, float* out) const {
#     const int64_t blocks = digits.blocks;
#     ByteTile tile;
#     std::fill_n(out, count * ROWS, 0.0f);
#     for (int64_t b = 0; b < blocks; b += DEEP) {
#       const int64_t deep = std::min(DEEP, blocks - b);
#       decode_bytes(w + 16 * b, scales + b, blocks, deep, tile);
#       in_groups<A_TILE>(count, [&](auto T, int64_t i) {
#         FewBytes few;
#         for (int64_t t = 0; t < T.value; ++t) {
#           const int64_t n = from[first + i + t];
#           few.bytes[t] = &bytes[n * blocks * BLOCK];
#           few.offsets[t] = &offsets[n * blocks];
#           few.halves[t] = digits.half(n);
#           few.out[t] = out + (i + t) * ROWS;
#         }
#         multiply_bytes<T.value>(tile, few, b, deep);
#       });
#     }
#   }
# #endif
# };
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("packed_experts_eight", packed_experts<Coarse>);
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# ### Who asks for it?
#
# `hold_activations(model, 8)` does, for every layer's experts that are packed.
# They stay the objects that they are, with the weights that they have, and
# get another `forward`; 16 gives them back their own. A model that learns
# computes as before: rounding has no slope.

# %% tags=["export"]
_log = logging.getLogger("gptoss")


class CoarseExperts(Experts):
    """`Experts` that are packed and round what enters them to eight bits
    (with AMX only what enters the second layer, to bf16)."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (
                x.requires_grad or self.down_proj_bias.requires_grad):
            return super().forward(x, ids, weights)
        up, down = self._packed("gate_up_proj"), self._packed("down_proj")
        return torch.ops.gptoss.packed_experts_eight(
            x, ids, weights, up.blocks, up.scales, self.gate_up_proj_bias,
            down.blocks, down.scales, self.down_proj_bias, self.limit)


BY_BITS: dict[int, type[Experts]] = {16: Experts, 8: CoarseExperts}


def hold_activations(model: GptOss, bits: int) -> GptOss:
    """The model, what enters its experts in 16 or 8 bits, in place.

    16: as always; 8: each 32 numbers in steps of their largest over 127,
    which is quicker for many tokens and changes the results, an expert's by
    one percent (with AMX what stands between its layers in bf16, and by a
    fifth of one). Experts that are not packed stay as they are, and without
    a kernel (AVX2 or more) so do all; one line on the logger "gptoss" says
    so.
    ValueError for another number.
    """
    if bits not in BY_BITS:
        raise ValueError(f"bits: expected {', '.join(map(str, BY_BITS))}, "
                         f"found {bits}")
    if bits != 16:
        path = find_answer("kernels")()
        if not has_kernel("packed_experts_eight"):
            _log.warning("gptoss: activations stay in sixteen bits: no "
                         "kernel for eight here (%s)", path)
            bits = 16
    for layer in model.modules():
        if type(layer) in BY_BITS.values() and layer.packed:
            layer.__class__ = BY_BITS[bits]
    return model

# %%
model = GptOss.from_pretrained(POCKET)
kernel = has_kernel("packed_experts_eight")
for bits in (8, 16):
    hold_activations(model, bits)
    print(bits, {type(layer).__name__ for layer in model.modules()
                 if isinstance(layer, Experts)} if kernel else "no kernel")

# %% [markdown]
# ## It holds
#
# **The kernel and the page of torch**, on experts with few picks and with
# many, of widths that fill a tile's depth and do not. Beside them stands the
# exact product of decoded weights, to which the kernel of AMX has to be near,
# and the others no further from it than the page is.

# %%
from gptoss.moe.experts import packed_by_decoding

for E, tokens, hidden, width in ((3, 1, 64, 32), (4, 6, 160, 96),
                                 (2, 40, 544, 64), (8, 100, 96, 544)):
    torch.manual_seed(tokens)
    packed_up = encode(0.1 * torch.randn(E, 2 * width, hidden))
    packed_down = encode(0.1 * torch.randn(E, hidden, width))
    biases = torch.randn(E, 2 * width), torch.randn(E, hidden)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(tokens)])
    given = [t.bfloat16() if t.is_floating_point() else t for t in (
        torch.randn(tokens, hidden), ids, torch.rand(tokens, 2), *packed_up,
        biases[0], *packed_down, biases[1])]
    wide = [t.double() if t.is_floating_point() else t for t in given]
    with torch.inference_mode():
        fast = torch.ops.gptoss.packed_experts_eight(*given, 7.0)
    twin = coarse_by_decoding(*wide, 7.0)
    exact = packed_by_decoding(*wide, 7.0)
    error = off(twin, exact)
    print(f"{tokens:3} tokens: the twin is {error:.2%} from the exact result")
    assert off(fast, exact) < error + 1e-3 < 2e-2
    assert off(fast, twin) < 8e-3 or off(fast, exact) < 4e-3

# %% [markdown]
# Kernel and twin may differ by more than storing the result in bf16 costs:
# activations can stand exactly between two whole numbers, such as half of the
# largest, since 127 is odd. Either neighbour is right.
#
# **Ends.** The largest sums that there are: all weights 6, all activations
# 127 steps, both signs. And a NaN stays in its own token.

# %%
E, hidden, width = 1, 544, 32
six = torch.full((E, 2 * width, hidden // 32, 16), 0x77, dtype=torch.uint8)
ones = torch.full((E, 2 * width, hidden // 32), 127, dtype=torch.uint8)
back = torch.full((E, hidden, width // 32, 16), 0x22, dtype=torch.uint8)
tiny = torch.full((E, hidden, width // 32), 100, dtype=torch.uint8)
flat = torch.zeros(E, 2 * width), torch.zeros(E, hidden)
given = torch.full((8, hidden), 0.01)
given[1::2] *= -1
given[5, 3] = float("nan")
ids, shares = torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
arguments = [t.bfloat16() if t.is_floating_point() else t for t in (
    given, ids, shares, six, ones, flat[0], back, tiny, flat[1])]
with torch.inference_mode():
    fast = torch.ops.gptoss.packed_experts_eight(*arguments, 1e4)
twin = coarse_by_decoding(*arguments, 1e4)
others = torch.arange(8) != 5
assert fast[5].isnan().all() and off(fast[others], twin[others]) < 4e-3
print("token 5 is NaN, of the others the first is", f"{fast[0, 0].item():.2g}",
      f"and in the twin {twin[0, 0].item():.2g}")

# %% [markdown]
# ### Does the model notice?
#
# As in [eight bits](eight_bits.ipynb) we ask how many nats the probabilities
# lose on those of the model as it is, in float64, where nothing else is
# rounded.

# %%
@torch.inference_mode()
def reads(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and experts (L, N, K) of a model in float64."""
    model = GptOss.from_pretrained(POCKET, torch.float64)
    ids: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, Experts):
            layer.__class__ = BY_BITS[bits]
            layer.register_forward_pre_hook(
                lambda module, given: ids.append(given[1].sort().values))
    logits = torch.cat([model(text)[0] for text in texts])
    L = model.config.num_hidden_layers
    return logits, torch.stack([torch.cat(ids[i::L]) for i in range(L)])


(stored, stored_ids), (coarse, coarse_ids) = reads(16), reads(8)
p, q = stored.log_softmax(-1), coarse.log_softmax(-1)
lost = (p.exp() * (p - q)).sum(-1)
moved = (coarse_ids != stored_ids).any(-1).any(0)
print(f"{moved.sum()} of {len(moved)} tokens go to other experts"
      + (f" and lose {lost[moved].mean():.2f} nats each" if moved.any()
         else "") + f"; all others lose {lost[~moved].mean():.1e}")
same = (stored.argmax(-1) == coarse.argmax(-1)).double().mean()
print(f"the likeliest next token is the same after {same:.0%} of them")

# %% [markdown]
# A small error costs next to nothing. A token that stood between two experts
# pays more, as it does with [eight-bit weights](eight_bits.ipynb).
#
# ## In the 20b and the 120b

# %% [markdown] tags=["measured"]
# On two cores of a Zen 3 with AVX2, random weights in the 20b's shapes, one
# round on 2026-11-29 (`bench/compare.py`); tokens a second:
#
# | | reads 512 | writes | four texts together |
# |---|---|---|---|
# | activations in 16 bits, dense matrices in bf16 | 18.8 | 4.8 | 9.1 |
# | activations in 8 bits, `--dense 8` | 21.9 | 7.1 | 10.0 |
# | ik_llama.cpp, repacked, bf16 and 8-bit activations | 19.4 | 3.9 | |
#
# So the prompt is read 1.16 times as fast, and 1.13 times as fast as
# ik_llama.cpp does. What is written gains by the dense matrices, not by the
# activations. The experts of a layer alone, on one core that was shared with
# others, took 0.65 to 0.8 of the time with 512 tokens, 0.7 to 0.8 with 128.
#
# With AMX on two cores of a Xeon (Granite Rapids), by the same program: 145
# tokens a second of a prompt of 512 instead of 125, and 111 instead of 101 of
# one of 4096; ik_llama.cpp 42 and 33. A layer's experts alone took 0.82 of the
# time with 512 tokens, 0.94 with 128, and with fewer no less.
#
# On two cores of a Zen 5 the experts alone took 0.65 of the time with 512
# tokens, 0.71 with 128, 0.89 with 64 and as long with fewer; on a Zen 4 0.62
# with 512, 0.73 with 128 and 0.95 to 1.1 with fewer.

# %% [markdown]
# ## Takeaways
#
# - Bytes times bytes take 18 instructions for 256 weights where sixteen bits
#   take 31, and a tile of bytes is made in three rounds instead of four.
# - The price is an error of one percent in what an expert says,
#   twice and a half that of plain torch in bf16. So one asks for it:
#   `--activations 8`.
# - A step for 32 activations keeps a large channel from spoiling the others.
# - One token gains nothing: it waits for memory, not for arithmetic.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# With the table $w + 12$ four pairs fit into 16 bits, and eight do not. With
# how many bits of activations would all eight fit, and what would the error
# be?

# %% tags=["hide-cell"]
largest = (2 ** 15 - 1) // (8 * 2 * 24)
print(f"steps up to {largest}: 7 bits with the sign, 63 on either side; a "
      f"number is then off by {off(rounded(x, 63), x):.2%} instead of "
      f"{off(rounded(x, 127), x):.2%}")
assert 63 <= largest < 127

# %% [markdown]
# ### Exercise 2
#
# Round only what enters the first product, and keep sixteen bits for the
# second. What does the expert's error become, and how much of the arithmetic
# gains by it?

# %% tags=["hide-cell"]
print(f"{first:.2%} instead of {errors['eight bits']:.2%}; two thirds of the "
      f"weights are in the first, so {2 / 3:.0%} of the products gain")
assert first < errors["eight bits"]

# %% [markdown]
# ### Exercise 3
#
# Weights of eight bits (`--dense 8`) times activations of eight bits: why does
# AVX2 gain nothing there over sixteen? Think of the largest pair.

# %% tags=["hide-cell"]
print(f"a pair of 255 and 127 twice is {2 * 255 * 127}: it does not fit into "
      f"{2 ** 15 - 1}; with signs |w| and ±q, {2 * 127 * 127} does, once: "
      "each product then needs a change of signs, a widening and an addition, "
      "4 instructions for 32 weights, as sixteen bits do")

# %% [markdown]
# ## Sources
#
# - Activations in eight bits with a step for 32, multiplied with MXFP4:
#   ggml-org/llama.cpp, `ggml/src/ggml-cpu/`; with repacked weights:
#   ikawrakow/ik_llama.cpp, `ggml/src/iqk/`.
# - Channels that are much larger than the rest: T. Dettmers and others,
#   *LLM.int8()*, 2022, https://arxiv.org/abs/2208.07339
# - Instructions of x86:
#   https://www.intel.com/content/www/us/en/docs/intrinsics-guide
