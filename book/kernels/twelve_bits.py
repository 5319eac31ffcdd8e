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
#     module: compact
#     public: [CompactLinear, CompactWeight, make_compact, pack, unpack]
# ---
# %% [markdown]
# # Sixteen bits in twelve
#
# ## Question
#
# Do sixteen bits hold sixteen bits of information? A token of the 20b reads
# 3.71 GB, and two thirds of them are dense matrices in bf16. Rounding them to
# four bits, as the experts are, would make another model. But of the eight
# bits that each of these numbers spends on its exponent, it needs less than
# three. Can a quarter of the bytes be left away, and not a number change?

# %%
import logging
import os

import matplotlib.pyplot as plt
import torch

from gptoss.kernels.build import load_kernels
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, expert_size

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
path = load_kernels()
big = GptOssConfig.gpt_oss_20b()
token = bytes_read_per_token(big)
experts = (big.num_hidden_layers * big.num_experts_per_tok
           * 17 / 32 * expert_size(big))
print(f"{token / 1e9:.2f} GB a token, {experts / 1e9:.2f} of them experts: "
      f"{1 - experts / token:.0%} are stored in bf16")

# %% [markdown]
# ## Picture
#
# A bf16 number is a sign $s$, eight bits $e$ of exponent and seven, $m$, of
# mantissa: $\pm 1.m \cdot 2^{e - 127}$. Signs and mantissas look like coin
# tosses. Exponents do not. How often does each occur in a matrix of normal
# numbers, and in the head of the shipped model?

# %% tags=["hide-input", "picture"]
# Figure: bars over exponents from minus 24 to minus 4, on a logarithmic axis.
# The two highest, near the right end, are a quarter and three tenths of all
# numbers; to the left each bar is half as high as its neighbour. Fourteen on
# the right are blue, seven on the left grey. Dots for the shipped head beside.
from pathlib import Path

import gptoss
from gptoss.weights.checkpoint import Checkpoint

torch.manual_seed(0)
matrix = (0.02 * torch.randn(512, 2880)).bfloat16()
POCKET = Path(gptoss.__file__).parent / "pocket"
with Checkpoint.open(POCKET) as file:
    head = file.read("lm_head.weight").clone()


def shares(weight: torch.Tensor) -> torch.Tensor:
    """How much of a bf16 matrix has each exponent: (256,)."""
    exponent = (weight.view(torch.int16).long() >> 7 & 255).flatten()
    return exponent.bincount(minlength=256) / exponent.numel()


def information(share: torch.Tensor) -> float:
    known = share[share > 0]
    return -(known * known.log2()).sum().item()


at = torch.arange(101, 127)
share = shares(matrix)
pairs = share.view(128, 2).sum(1)  # of e // 2
coded = torch.isin(at // 2, pairs.argsort(descending=True)[:7])
fig, ax = plt.subplots(figsize=(6.4, 2.8))
for which, color in ((coded, "C4"), (~coded, "0.7")):
    ax.bar(at[which] - 127, share[at[which]], color=color)
ax.plot(at - 127, shares(head)[at], "C5o", ms=4)
ax.text(-11, 0.06, "14 exponents that have a code", color="C0", fontsize=8,
        ha="right")
ax.text(-21.4, 1.2e-4, "stored apart", color="0.4", fontsize=8, ha="center")
ax.text(-3.4, 0.3, "the shipped head", color="C5", fontsize=8)
ax.set(yscale="log", xlabel="exponent of a weight $\\pm 1.m \\cdot 2^x$",
       ylabel="share of all weights", xlim=(-24.9, 0.6),
       xticks=range(-24, 1, 4))
plt.show()
two = share.sort(descending=True).values[:2].sum().item()
apart = 1 - pairs.sort(descending=True).values[:7].sum().item()
print(f"two neighbouring exponents hold {two:.0%}, fourteen all but one in "
      f"{1 / apart:,.0f}")
print(f"information in an exponent: {information(share):.1f} bits in normal "
      f"numbers, {information(shares(head)):.1f} in the shipped head")
assert information(share) < 3 and information(shares(head)) < 3

# %% [markdown]
# What to see: the weights of a matrix have about one size. More than half of
# them lie within a factor of four, and below that each halving of the size is
# half as frequent as the one before. Fourteen neighbouring exponents, the
# blue bars, hold all but one number in some thousands. The *information*
# in an exponent, $-\sum_e p_e \log_2 p_e$ for shares $p_e$, is what the best
# code needs for it in the mean: not even three of its eight bits.
#
# ## The naive version
#
# Leave it to a general compressor. `zlib` finds some of it, in the bytes of
# the shipped head; but a matrix would have to be unpacked to memory before it
# is used, and then all its bytes pass again.

# %%
import zlib

raw = head.view(torch.uint8).numpy().tobytes()
print(f"zlib: {16 * len(zlib.compress(raw, 6)) / len(raw):.1f} bits a number; "
      f"possible: {8 + information(shares(head)):.1f}")

# %% [markdown]
# ## Derivation
#
# Eight bits of sign and mantissa and some three of exponent make eleven.
# {cite}`dfloat2025` gives the exponents a Huffman code, short words for the
# frequent ones, and ends there. But where does the thousandth number begin, if
# words have unequal lengths? That is work for a GPU. Words of equal length do
# nearly as well, cut where they are cheap to read. A bf16 number is two bytes
# in memory,
#
# $$ \text{upper} = 128\, s + \lfloor e / 2 \rfloor, \qquad
#    \text{lower} = 128\, (e \bmod 2) + m .
# $$ (kernels-bytes)
#
# Some numbers, in bits:

# %%
def places(number: float) -> tuple[int, int]:
    """The upper and the lower byte of a bf16 number."""
    bits = torch.tensor(number).bfloat16().view(torch.int16).item() & 0xFFFF
    return bits >> 8, bits & 255


for number in (0.02, -0.02, 0.03, 0.005):
    upper, lower = places(number)
    bits = f"{upper << 8 | lower:016b}"
    print(f"{number:6} = {bits[0]} {bits[1:9]} {bits[9:]}: upper {upper:3}, "
          f"lower {lower:3}")
assert places(0.02)[0] + 128 == places(-0.02)[0]

# %% [markdown]
# Of the upper bytes there are few. The seven most frequent values of $\lfloor
# e / 2 \rfloor$ are fourteen exponents; with an eighth value, 0, that of zero,
# and with the sign they make sixteen: a code of four bits, and a table of
# sixteen bytes says what each stands for. The lower byte is kept as it is.
# Twelve bits. A number whose exponent has no code stands apart: it is zero in
# its place, and is listed with its column. A matrix that does not shrink by a
# tenth is left as it is.
#
# ## Code
#
# ### How is a matrix packed?
#
# Sixty-four numbers are a block of 96 bytes: 64 lower bytes, then 32 bytes of
# codes, two in each, that of number $i$ in the low half and of number $i + 32$
# in the high half. (Within 32 the bytes stand in an order, `_PLACE`, that is
# for the kernel's convenience.) In torch every step can be looked at:

# %% tags=["export"]
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor


class CompactWeight(NamedTuple):
    """A bf16 matrix (m, n) in twelve bits a number, nothing lost."""

    blocks: Tensor  # (m, n / 64, 96) uint8: 64 lower bytes, then their codes
    upper: Tensor  # (16,) uint8: the upper byte that a code stands for
    first: Tensor  # (m + 1,) int32: where the others of each row begin
    others: Tensor  # (X,) int32: column << 16 | the number's sixteen bits

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


# a block's bytes: weight i of 32 stands where bits 3 and 4 of i change places
_PLACE = torch.arange(32).view(2, 2, 8).transpose(0, 1).reshape(32)


def pack_by_torch(weight: Tensor) -> CompactWeight:
    """`pack` in plain torch, a page to read; it needs 40 bytes a number."""
    m, n = weight.shape
    bits = weight.view(torch.int16).long() & 0xFFFF
    half = bits >> 8 & 127  # of an exponent; counted in every eighth row
    count = half[::8].flatten().bincount(minlength=128)
    frequent = count.argsort(descending=True, stable=True)[:7]
    upper = F.pad(frequent, (0, 1))
    number = torch.full((128,), 8).scatter(0, frequent, torch.arange(7))
    number[0] = 7
    code = number[half]
    rare = code == 8
    lower = (bits & 255).where(~rare, 0)
    code = (bits >> 15 << 3 | code).where(~rare, 7)
    codes = code.view(m, n // 64, 2, 32)[..., _PLACE]
    blocks = torch.cat([lower.view(m, n // 64, 2, 32)[..., _PLACE].flatten(2),
                        codes[:, :, 0] | codes[:, :, 1] << 4], -1)
    row, column = rare.nonzero(as_tuple=True)
    return CompactWeight(
        blocks.to(torch.uint8),
        torch.cat([upper, upper + 128]).to(torch.uint8),
        F.pad(rare.sum(1).cumsum(0), (1, 0)).int(),
        (column << 16 | bits[row, column]).int())

# %% tags=["export"]
def unpack(weight: CompactWeight) -> Tensor:
    """The matrix (m, n) in bf16, bit for bit as `pack` took it."""
    m, blocks, _ = weight.blocks.shape
    lower, codes = weight.blocks.long().split([64, 32], -1)
    code = torch.stack([codes & 15, codes >> 4], 2)[..., _PLACE].flatten(2)
    lower = lower.view(m, blocks, 2, 32)[..., _PLACE].flatten(2)
    bits = (weight.upper.long()[code] << 8 | lower).flatten(1)
    row = torch.repeat_interleave(weight.first.diff())
    others = weight.others.long() & 0xFFFFFFFF
    bits[row, others >> 16] = others & 0xFFFF
    return bits.to(torch.int16).view(torch.bfloat16)

# %%
matrix[0, :4] = torch.tensor([0.0, -0.0, 1e-30, float("inf")])
compact_matrix = pack_by_torch(matrix)
assert torch.equal(unpack(compact_matrix).view(torch.int16),
                   matrix.view(torch.int16))
print(f"{8 * compact_matrix.nbytes / matrix.numel():.2f} bits a number, "
      f"{len(compact_matrix.others)} of {matrix.numel():,} stored apart")

# %% [markdown]
# Not a number is lost, four odd ones included (0, -0, a tiny one, infinity).
#
# ### How is it multiplied?
#
# As in [packed](packed.ipynb), a table in a register turns 32 codes at once
# into upper bytes. *Interleaved* with the lower bytes (one of these, one of
# those) they are bf16, and shift and mask of [dense](dense.ipynb) make floats
# of them. Ten lines of numpy for one block:

# %%
import numpy as np

blocks, upper = (part.numpy() for part in compact_matrix[:2])
block = blocks[5, 0]  # a row's first 64 numbers
place = np.arange(32).reshape(2, 2, 8).swapaxes(0, 1).reshape(32)
lower, codes = block[:64].reshape(2, 32)[:, place], block[64:][place]
high = upper[np.stack([codes & 15, codes >> 4])]  # two lookups
pairs = np.stack([lower, high], -1).reshape(64, 2)  # lower, upper, lower …
numbers = np.ascontiguousarray(pairs).view(np.uint16)[:, 0]
floats = (numbers.astype(np.uint32) << 16).view(np.float32)
print([round(float(x), 4) for x in floats[:4]], "and the matrix:",
      [round(x, 4) for x in matrix[5, :4].tolist()])
assert (floats == matrix[5, :64].float().numpy()).all()

# %% [markdown]
# The instruction that interleaves works within each half of a register, so the
# bytes are stored with bits 3 and 4 of their place exchanged: then its two
# results are sixteen neighbours each. `Compact` points to a packed matrix. It
# stands in a part of its own, as the kernel for AVX-512 in the
# [appendix](../cli/wide.ipynb) reads the same matrix.

# %% [markdown] tags=["export:twelve.h"]
# ```cpp
# namespace {
#
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
#
# }  // namespace
# ```

# %% [markdown]
# Four rows are read at a time, as everywhere, and what stands apart is added
# at the end of each row.

# %% [markdown] tags=["export:compact.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX2
# // weight i of 32 stands at byte i with bits 3 and 4 changed for each other,
# // so that the halves of a register, interleaved, give sixteen neighbours
# inline int64_t swapped(int64_t i) {
#   return (i & 7) | (i & 8) << 1 | (i & 16) >> 1;
# }
#
# #ifndef GPTOSS_BF16
# Buffer compact_ready(const Buffer& x) {
#   Array<Number> from(x.size());
#   convert(x.data(), x.size(), from.data());
#   return ready(from.data(), from.size());
# }
#
# // out[0], out[step] ...: R rows, `step` rows apart, times x
# template <int R>
# void compact_dots(const Compact& w, int64_t row, int64_t step,
#                   const float* x, float* out) {
#   const __m256i upper = _mm256_broadcastsi128_si256(
#       load<__m128i>(w.upper));
#   const __m256i low = _mm256_set1_epi8(15);
#   Floats s[R][2] = {};
#   for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* from = w.row(row + r * step) + b * SIZE;
#       ask_ahead(from);
#       ask_ahead(from + SIZE / 2);
#       const __m256i codes = load<__m256i>(from + WEIGHTS);
#       for (int half = 0; half < 2; ++half) {
#         const __m256i lower = load<__m256i>(from + 32 * half);
#         const __m256i code = _mm256_and_si256(
#             half ? _mm256_srli_epi16(codes, 4) : codes, low);
#         const __m256i high = _mm256_shuffle_epi8(upper, code);
#         const Ints pairs[] = {(Ints)_mm256_unpacklo_epi8(lower, high),
#                               (Ints)_mm256_unpackhi_epi8(lower, high)};
#         for (int i = 0; i < 2; ++i) {
#           const float* at = x + 32 * half + 16 * i;
#           s[r][0] += even(pairs[i]) * load<Floats>(at);
#           s[r][1] += odd(pairs[i]) * load<Floats>(at + 8);
#         }
#       }
#     }
#   for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
# }
# #endif
#
# // y (N, rows) = x (N, n) times the weight transposed, for a few tokens
# void compact_few(const Compact& w, const Buffer& x, int64_t N, Buffer& y) {
#   constexpr int64_t HEIGHT = 128;
#   const int64_t n = w.blocks * WEIGHTS, m = w.rows;
#   const auto from = compact_ready(x);
#   share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
#     const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
#     const int64_t step = rows / STREAMS;
#     for (int64_t t = 0; t < N; ++t) {
#       float* to = &y[t * m + row0];
#       for (int64_t r = 0; r < step; ++r)
#         compact_dots<STREAMS>(w, row0 + r, step, &from[t * n], to + r);
#       for (int64_t r = STREAMS * step; r < rows; ++r)
#         compact_dots<1>(w, row0 + r, 0, &from[t * n], to + r);
#       for (int64_t r = 0; r < rows; ++r) {
#         const int32_t* from = w.first + row0 + r;
#         const int64_t end = std::min<int64_t>(from[1], w.count);
#         for (int64_t i = std::max(from[0], 0); i < end; ++i) {
#           const uint32_t other = w.others[i], bits = other << 16;
#           if (other >> 16 < n)
#             to[r] += load<float>(&bits) * x[t * n + (other >> 16)];
#         }
#       }
#     }
#   });
# }
# ```

# %% [markdown]
# ### Packing in C++
#
# `pack_by_torch` needs 40 bytes for each number. The C++ reads the matrix
# once, after every eighth row has been counted. What stands apart is noted row
# by row, and then brought together; it makes the very same four tensors.

# %% [markdown] tags=["export:compact.h"]
# ```cpp
# struct Codes {
#   uint8_t upper[16], code[256];  // of a code; of an upper byte, or NONE
#   static constexpr uint8_t NONE = 16;
#
#   explicit Codes(const std::vector<int64_t>& count) {
#     std::vector<uint8_t> order(128);
#     for (int half = 0; half < 128; ++half) order[half] = half;
#     std::stable_sort(order.begin(), order.end(),
#                      [&](int a, int b) { return count[a] > count[b]; });
#     order[7] = 0;  // that of zero
#     std::fill_n(code, 256, NONE);
#     for (int c = 0; c < 16; ++c)
#       code[upper[c] = (c & 8) << 4 | order[c % 8]] = c;
#   }
# };
#
# // how often each half of an exponent occurs, in every eighth row
# std::vector<int64_t> count_halves(const uint16_t* w, int64_t rows,
#                                   int64_t n) {
#   std::vector<int64_t> total(128);
#   std::mutex mutex;
#   at::parallel_for(0, (rows + 7) / 8, 16, [&](int64_t begin, int64_t end) {
#     int64_t found[128] = {};
#     for (int64_t r = begin; r < end; ++r)
#       for (int64_t k = 0; k < n; ++k) ++found[w[8 * r * n + k] >> 8 & 127];
#     const std::lock_guard<std::mutex> alone(mutex);
#     for (int half = 0; half < 128; ++half) total[half] += found[half];
#   });
#   return total;
# }
#
# // 64 numbers from `column` on; those without a code are added to `apart`
# void pack_block(const uint16_t* w, const Codes& codes, int64_t column,
#                 uint8_t* to, std::vector<int32_t>& apart) {
#   uint8_t lower[WEIGHTS], code[WEIGHTS], all = 0;
#   for (int64_t i = 0; i < WEIGHTS; ++i) lower[i] = uint8_t(w[i]);
#   for (int64_t i = 0; i < WEIGHTS; ++i)
#     all |= code[i] = codes.code[w[i] >> 8];
#   for (int64_t i = 0; all & Codes::NONE && i < WEIGHTS; ++i)
#     if (code[i] == Codes::NONE) {
#       lower[i] = 0, code[i] = 7;
#       apart.push_back(int32_t((column + i) << 16 | w[i]));
#     }
#   for (int64_t i = 0; i < 32; i += 8) {  // eight bytes at a time
#     uint8_t* at = to + swapped(i);
#     std::memcpy(at, lower + i, 8);
#     std::memcpy(at + 32, lower + 32 + i, 8);
#     const uint64_t both = load<uint64_t>(code + i)
#                           | load<uint64_t>(code + 32 + i) << 4;
#     std::memcpy(at + WEIGHTS, &both, 8);
#   }
# }
#
# // weight (rows, n) bf16 -> blocks, upper, first, others
# std::tuple<Tensor, Tensor, Tensor, Tensor> pack_compact(
#     const Tensor& weight) {
#   TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2
#                   && weight.is_contiguous() && weight.size(1) % WEIGHTS == 0
#                   && weight.size(1) <= 1 << 16,
#               "pack_compact: weight: expected contiguous bfloat16 (m, n), "
#               "64 dividing n up to 65536, found ", weight.scalar_type(),
#               " ", weight.sizes());
#   const int64_t rows = weight.size(0), n = weight.size(1);
#   auto w = static_cast<const uint16_t*>(weight.const_data_ptr());
#   const Codes codes(count_halves(w, rows, n));
#   Tensor blocks = at::empty({rows, n / WEIGHTS, SIZE}, at::kByte);
#   Tensor upper = at::empty({16}, at::kByte);
#   Tensor first = at::zeros({rows + 1}, at::kInt);
#   std::copy_n(codes.upper, 16, upper.data_ptr<uint8_t>());
#   uint8_t* to = blocks.data_ptr<uint8_t>();
#   int32_t* begin = first.data_ptr<int32_t>();
#   std::vector<std::vector<int32_t>> apart(rows);
#   share(rows, 16, [&](int64_t r) {
#     for (int64_t k = 0; k < n; k += WEIGHTS)
#       pack_block(w + r * n + k, codes, k, to + (r * n + k) / WEIGHTS * SIZE,
#                  apart[r]);
#   });
#   for (int64_t r = 0; r < rows; ++r)
#     begin[r + 1] = begin[r] + int32_t(apart[r].size());
#   Tensor others = at::empty({begin[rows]}, at::kInt);
#   for (int64_t r = 0; r < rows; ++r)
#     std::copy(apart[r].begin(), apart[r].end(),
#               others.data_ptr<int32_t>() + begin[r]);
#   return {blocks, upper, first, others};
# }
# #endif
# ```

# %% [markdown]
# ### Who reads the matrix, who the copy?
#
# The operator gets both. It reads the copy for few tokens, and only where the
# copy fits the matrix in every size; for many, where arithmetic is the limit,
# and for any other type it multiplies with the matrix itself.

# %% [markdown] tags=["export:compact.h"]
# ```cpp
# // as `linear`; blocks ... others: the weight again, by `pack_compact`
# Tensor compact_linear(const Tensor& x, const Tensor& weight,
#                       const std::optional<Tensor>& bias,
#                       const Tensor& blocks, const Tensor& upper,
#                       const Tensor& first, const Tensor& others) {
# #ifdef GPTOSS_AVX2
#   const auto integers = [](const Tensor& t) {
#     return t.scalar_type() == at::kInt && t.is_contiguous() && t.dim() == 1;
#   };
#   if (ours({x, weight, bias.value_or(x)}) && weight.dim() == 2) {
#     const int64_t m = weight.size(0), n = weight.size(1);
#     check_linear("compact_linear", x, m, n, bias);
#     if (x.numel() && x.numel() <= 2 * n && m && !(bias && !has(*bias, {m}))
#         && packed({blocks, upper}) && n % WEIGHTS == 0
#         && has(blocks, {m, n / WEIGHTS, SIZE}) && has(upper, {16})
#         && integers(first) && integers(others) && has(first, {m + 1})) {
#       const int64_t N = x.numel() / n;
#       Buffer y(N * m);
#       compact_few({blocks.const_data_ptr<uint8_t>(),
#                    upper.const_data_ptr<uint8_t>(),
#                    first.const_data_ptr<int32_t>(),
#                    others.const_data_ptr<int32_t>(), m, blocks.size(1),
#                    others.size(0)},
#                   floats(x), N, y);
#       add_bias(y, bias);
#       return result(x, m, y);
#     }
#   }
# #endif
#   return linear(x, weight, bias);
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("compact_linear", compact_linear);
# #ifdef GPTOSS_AVX2
#   m.impl("pack_compact", pack_compact);
# #endif
# }
#
# }  // namespace
# ```

# %% [markdown] tags=["measured"]
# A copy costs time (1.4 s for the 20b on two cores of a Zen 3) and three
# quarters of the matrices' memory. That pays after some hundred tokens, on a
# machine that has the memory and is limited by it. So one asks for it:
# `make_compact(model)`, or `--compact` on the command line. The weights
# themselves stay where they are, mapped from the file; prompts, gradients and
# other devices use those. The four parts of a copy are buffers that are not
# saved, so a checkpoint of the model stays as it was.

# %% tags=["export"]
from torch import nn

from gptoss.model.layers import Linear
from gptoss.model.transformer import GptOss
from gptoss.model.ops import Operator, define_operator


def linear_beside_compact(x: Tensor, weight: Tensor, bias: Tensor | None,
                          *compact: Tensor) -> Tensor:
    """The product in plain torch: with the matrix, not with its copy."""
    return F.linear(x, weight, bias)


define_operator("compact_linear", Operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor blocks, Tensor upper,"
    " Tensor first, Tensor others) -> Tensor", linear_beside_compact))


def _pack_fake(weight: Tensor) -> CompactWeight:
    """Nobody knows without looking how many numbers stand apart."""
    m, n = weight.shape
    apart = torch.library.get_ctx().new_dynamic_size()
    return CompactWeight(weight.new_empty((m, n // 64, 96), dtype=torch.uint8),
                         weight.new_empty(16, dtype=torch.uint8),
                         weight.new_empty(m + 1, dtype=torch.int32),
                         weight.new_empty(apart, dtype=torch.int32))


define_operator("pack_compact", Operator(
    "(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)", pack_by_torch,
    _pack_fake))


class CompactLinear(Linear):
    """A frozen `Linear` with a copy of its weight in twelve bits.

    Few tokens read the copy, many the weight; both are the same numbers,
    until the weight is changed: one that learns is read itself.
    """

    blocks: Tensor  # the four parts of the copy
    upper: Tensor
    first: Tensor
    others: Tensor

    def __init__(self, linear: Linear, copy: CompactWeight) -> None:
        super().__init__(linear.in_features, linear.out_features,
                         linear.bias is not None, device="meta",
                         dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        for name, tensor in copy._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        return torch.ops.gptoss.compact_linear(
            x, self.weight, self.bias, self.blocks, self.upper,
            self.first, self.others)

    @property
    def saved(self) -> int:
        """How many bytes fewer a token reads."""
        return self.weight.nbytes - CompactWeight(
            self.blocks, self.upper, self.first, self.others).nbytes


def saved_bytes(model: nn.Module) -> int:
    """How many bytes fewer a token reads than of the weights as stored: what
    every layer that reads fewer says of itself as `saved`."""
    return sum(getattr(layer, "saved", 0) for layer in model.modules())

# %% [markdown]
# ### What is refused?
#
# `pack` takes bf16 matrices whose number of columns is a multiple of 64, up to
# 65,536 (a column must fit into 16 bits), and raises a ValueError for others.
# `compact_layers` takes every plain `Linear` on the CPU that it fits, unless
# its weight learns or would not shrink by a tenth. Without a kernel that reads
# them the copies would only take memory: then `make_compact` leaves the model
# as it is and says so in the log.

# %% tags=["export"]
def _fits(weight: Tensor) -> bool:
    return (weight.dtype == torch.bfloat16 and weight.ndim == 2
            and weight.shape[1] % 64 == 0 and weight.shape[1] <= 2 ** 16)


def _can_be(layer: nn.Module) -> TypeGuard[Linear]:
    return (type(layer) is Linear and _fits(layer.weight)
            and layer.weight.device.type == "cpu"
            and layer.weight.is_contiguous()
            and not layer.weight.requires_grad)


def pack(weight: Tensor) -> CompactWeight:
    """A bf16 matrix (m, n), 64 dividing n, in twelve bits a number.

    ValueError for another type or shape, or more than 65,536 columns.
    """
    if not _fits(weight):
        raise ValueError("weight: expected bfloat16 (m, n), 64 dividing n up "
                         f"to 65536, found {weight.dtype} of "
                         f"{tuple(weight.shape)}")
    return CompactWeight(*torch.ops.gptoss.pack_compact(weight.contiguous()))


def compact_layers(model: GptOss) -> None:
    """Replace every frozen bf16 `Linear` on the CPU, in place, where the
    copy is smaller than the weight by a tenth or more."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if _can_be(layer):
                copy = pack(layer.weight)
                if copy.nbytes <= 0.9 * layer.weight.nbytes:
                    setattr(parent, name, CompactLinear(layer, copy))

# %% tags=["export"]
import logging

from gptoss.model.answers import find_answer
from gptoss.model.ops import has_kernel

_log = logging.getLogger("gptoss")


def make_compact(model: GptOss) -> GptOss:
    """The model, its dense matrices also in twelve bits; same numbers.

    Decoding then reads a quarter less of them (`CompactLinear`); the copies
    take three quarters of the matrices' memory, and some seconds to make.
    Without kernels that read them the model stays as it is, and one line on
    the logger "gptoss" says so.
    """
    path = find_answer("kernels")()
    if has_kernel("pack_compact"):
        compact_layers(model)
    else:
        _log.warning("gptoss: matrices stay in sixteen bits: no kernel for "
                     "twelve here (%s)", path)
    return model

# %%
layer = Linear(2880, 512, bias=False, dtype=torch.bfloat16)
layer.requires_grad_(False)
double = CompactLinear(layer, pack(layer.weight))
print(f"{double.saved / layer.weight.nbytes:.1%} of its bytes saved")

# %% [markdown]
# ## It holds
#
# **The packing** in C++ makes the very same four tensors as the page of torch,
# from matrices in which much stands apart, too, and both can be taken back:

# %%
rough = matrix.clone()
rough[torch.rand(rough.shape) < 0.02] *= 1e-9
noise = torch.randint(-2 ** 15, 2 ** 15, (40, 128)).short()
for name, weight in (("normal", matrix), ("2 % tiny", rough),
                     ("the shipped head", head),
                     ("random bits", noise.view(torch.bfloat16))):
    by_kernel, by_torch = pack(weight), pack_by_torch(weight)
    assert all(map(torch.equal, by_kernel, by_torch))
    assert torch.equal(unpack(by_kernel).view(torch.int16),
                       weight.view(torch.int16))
    print(f"{name:17} {8 * by_kernel.nbytes / weight.numel():5.2f} bits a "
          f"number, {len(by_kernel.others) / weight.numel():7.3%} apart")

# %% [markdown]
# **The product.** Its twin is in numpy and float64 and reads the same four
# tensors, with a loop where the kernel has a register. Of the two results the
# kernel's is rounded to bf16, once:

# %%
def twin(x: torch.Tensor, copy: CompactWeight) -> np.ndarray:
    """x times the packed matrix, transposed, in float64."""
    blocks, upper, first, others = (part.numpy() for part in copy)
    i = np.arange(32)
    place = (i & 7) | (i & 8) << 1 | (i & 16) >> 1
    lower, codes = blocks[..., :64], blocks[..., 64:]
    lower = np.concatenate([lower[..., place], lower[..., 32 + place]], -1)
    codes = np.concatenate([codes[..., place] & 15, codes[..., place] >> 4],
                           -1)
    bits = upper[codes].astype(np.uint32) << 8 | lower
    bits = bits.reshape(len(bits), -1)
    for row, (begin, end) in enumerate(zip(first, first[1:], strict=False)):
        for other in others[begin:end].view(np.uint32):
            bits[row, other >> 16] = other & 0xFFFF
    wide = (bits << 16).view(np.float32).astype(np.float64)
    return x.double().numpy() @ wide.T


def off(y: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(y.double().numpy() - exact)
                 / np.linalg.norm(exact))


rough = rough[1:141, :192].contiguous()  # finite; no multiple of 128 rows
learnt = Linear(192, 140, bias=False, dtype=torch.bfloat16)
learnt.weight = torch.nn.Parameter(rough, requires_grad=False)
copied = CompactLinear(learnt, pack(rough))
for tokens in (1, 3):
    x = torch.randn(tokens, 192).bfloat16()
    with torch.inference_mode():
        error, matrix_error = (off(layer(x), twin(x, pack(rough)))
                               for layer in (copied, learnt))
    print(f"{tokens} tokens: off by {error:.0e} with the copy, "
          f"{matrix_error:.0e} with the matrix")
    assert error < 3e-3 and matrix_error < 3e-3

# %% [markdown]
# **The shipped model**: every matrix but the routers, which are no plain
# `Linear`, shrinks by a tenth or more. A text fed token by token, once from
# the matrices and once from their copies, gets the same choices wherever the
# best token leads by more than what bf16 can blur:

# %%
from gptoss.text.tokenizer import Tokenizer

tokens = Tokenizer.from_pretrained(POCKET).encode(
    "Once upon a time there was a small fox named Mira. Mira lived in the "
    "forest. The best thing she had was a red kite.")
model = GptOss.from_pretrained(POCKET).requires_grad_(False)


def one_by_one() -> torch.Tensor:
    """The logits (T, V), each from a forward of one token."""
    cache = model.new_cache()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([[token]]), cache=cache)[0]
                          for token in tokens]).float()


from_matrices = one_by_one()
compact_layers(model)
from_copies = one_by_one()
count = sum(isinstance(layer, CompactLinear) for layer in model.modules())
print(f"{count} matrices packed, {saved_bytes(model):,} bytes fewer a token")
best, second = from_matrices.topk(2).values.unbind(-1)
clear = best - second > 0.25
same = from_matrices.argmax(-1) == from_copies.argmax(-1)
assert same[clear].all() and clear.float().mean() > 0.5
assert ((from_copies - from_matrices).norm()
        < 0.03 * from_matrices.norm())
print("the same choice wherever the best token leads by 0.25")

# %% [markdown]
# ## In the 20b and the 120b
#
# Attention and the head are the dense matrices; a quarter of what they take is
# no longer read. What was stored in bf16 and is no matrix (the router, norms,
# biases) is too small to show:

# %%
for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    token = bytes_read_per_token(config)
    picks = config.num_hidden_layers * config.num_experts_per_tok
    bf16 = token - picks * 17 / 32 * expert_size(config)
    print(f"{name:4} {token / 1e9:.2f} GB a token, in twelve bits "
          f"{(token - 0.249 * bf16) / 1e9:.2f}: "
          f"{0.249 * bf16 / token:.0%} fewer")

# %% [markdown]
# ## Takeaways
#
# - Sixteen bits can hold less than sixteen bits: the exponent of a weight says
#   less than three bits, in normal numbers and in a trained matrix.
# - With the upper byte coded in four bits, dense weights take twelve, and no
#   number changes: what has no code stands in a list of its own.
# - A code of equal length is decoded by one lookup in a register; the bit that
#   a Huffman code would save costs more than it brings here.
# - Reading less is faster only where reading is the limit: few tokens take the
#   copy, many the matrix.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# One could give each of the fifteen most frequent exponents a code, and keep
# sign and mantissa in the byte: twelve bits as well. How many numbers would
# stand apart, and how many do with seven pairs of neighbours?

# %% tags=["hide-cell"]
share = shares((0.02 * torch.randn(2048, 2880)).bfloat16())
single = share.sort(descending=True).values[:15].sum()
paired = share.view(128, 2).sum(1).sort(descending=True).values[:7].sum()
print(f"apart: one in {1 / (1 - single.item()):,.0f} with fifteen exponents, "
      f"one in {1 / (1 - paired.item()):,.0f} with seven pairs")
assert single > paired

# %% [markdown]
# ### Exercise 2
#
# A number that stands apart costs 32 bits more. How many may there be until
# the matrix does not shrink by a tenth, and is left alone?

# %% tags=["hide-cell"]
most = (0.9 * 16 - 12) / 32
print(f"{most:.1%} of all numbers")
bits = torch.randint(-2 ** 15, 2 ** 15, matrix.shape).short()
few, many = (bits.view(torch.bfloat16).where(torch.rand(bits.shape) < part,
                                             matrix)
             for part in (0.9 * most, 1.15 * most))  # of any exponent
assert pack(few).nbytes < 0.9 * few.nbytes < pack(many).nbytes

# %% [markdown]
# ### Exercise 3
#
# What would it bring to code the mantissas, too? Take the information of the
# lower byte of the shipped head, and of its upper byte. What is the least that
# any code for bytes, one by one, could need?

# %% tags=["hide-cell"]
for name, byte in (("upper", head.view(torch.int16).long() >> 8 & 255),
                   ("lower", head.view(torch.int16).long() & 255)):
    share = byte.flatten().bincount(minlength=256) / byte.numel()
    print(f"{name} byte: {information(share):.1f} of 8 bits")
print("the lower byte is noise: all that can be saved is in the upper one")

# %% [markdown]
# ## Sources
#
# - bf16 weights without loss in about eleven bits: {cite}`dfloat2025`.
# - A lookup of sixteen bytes in one instruction, as llama.cpp uses it for four
#   bits: ggml-org/llama.cpp, `ggml/src/ggml-cpu/arch/x86/quants.c`.
