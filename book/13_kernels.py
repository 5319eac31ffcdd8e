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
#     module: kernels
# ---

# %% [markdown]
# # Four bits at full speed

# %% [markdown]
# ## Question
#
# How fast can a processor turn four-bit weights into tokens, and what stands
# between plain PyTorch and that speed?
#
# A token of the 20b reads 3.7 GB of weights and does 7.2 billion operations
# with them. At 30 GB/s, about what two cores of a server get from memory, the
# bytes take 124 ms. In that time the same two cores, with 32 operations a
# cycle each, could do three times the arithmetic. So decoding costs what
# reading costs, and the plain implementation of chapter 2 reads and writes
# too much: what it has decoded goes back to memory.
#
# This chapter puts kernels in C++ that read each packed byte once under the
# operators of chapters 2, 4, 7, 8 and 10. Nothing in the model changes, and a
# reader without a compiler keeps the torch path, with one line that says so.
#
# Speeds are one machine's and no cell can compute them for all. Those in this
# chapter were measured in November 2026 on two cores of an AMD EPYC, Zen 3
# where AVX2 is meant and Zen 4 where AVX-512 is; tables show what `bench/`
# saved, and the text says where a number is in no table.

# %%
import json
import logging
import os

import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import (
    bytes_read_per_token,
    expert_size,
    flops_per_token,
)

plt.style.use("_static/book.mplstyle")
logging.disable(logging.WARNING)  # with or without a compiler: same output
with open("_static/kernels_bench.json") as file:
    MEASURED = json.load(file)  # by bench/, on the machine that it names
with open("_static/kernels_bench_avx512.json") as file:
    ON_AVX512 = json.load(file)  # the same on another one, an older version
big = GptOssConfig.gpt_oss_20b()
READ, OPERATE = 30e9, 2 * 32 * 3e9  # a second: two cores of 3 GHz, AVX2
reading = bytes_read_per_token(big) / READ
arithmetic = flops_per_token(big, 0) / OPERATE
print(f"{bytes_read_per_token(big) / 1e9:.2f} GB and "
      f"{flops_per_token(big, 0) / 1e9:.1f} GFLOP a token: "
      f"{1e3 * reading:.0f} ms of reading, {1e3 * arithmetic:.0f} of work")
assert 3 < reading / arithmetic < 4

# %% [markdown]
# ## Picture
#
# A roofline {cite}`roofline2009` says how fast a computation can be that does
# so many operations with each byte that it reads: as fast as memory delivers,
# until arithmetic is the limit. Left, the roof of the two cores above and
# where the model meets it; right, what a token reads.

# %% tags=["hide-input"]
# Figure: left, a roof that rises with the operations for each byte up to
# 6.4 and is flat beyond. Decoding lies on the slope, experts in bf16 lowest,
# a whole token next, experts in four bits highest; both prefills lie on the
# flat. Right, bytes a token: attention, experts and lm_head, a third each.
def measured(*keys, default=None, found=MEASURED):
    """An entry of the saved measurements, or None: not measured."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return default if found is None else found


D, L, V = big.hidden_size, big.num_hidden_layers, big.vocab_size
H, G, C = (big.num_attention_heads, big.num_key_value_heads, big.head_dim)
expert = 3 * big.intermediate_size * D * 17 / 32
parts = {"attention": L * 2 * (2 * D * H * C + 2 * D * G * C),
         "4 experts a layer": L * 4 * expert, "lm_head": 2 * V * D}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.3),
                                  width_ratios=(3, 2))
knee = OPERATE / READ  # operations a byte
left.plot([0.5, knee, 600], [0.5 * READ / 1e9, *[OPERATE / 1e9] * 2], "k")
left.text(0.55, 70, "memory:\n30 GB/s", fontsize=8)
left.text(600, 215, "arithmetic: 192 GFLOP/s", ha="right", fontsize=8)
rows = {"decode": 1,  # tokens that meet an expert's weights in one pass
        "prefill of 512": 512 * big.num_experts_per_tok
        / big.num_local_experts}
for kind, size, look in (("experts in four bits", 17 / 32, "C1o"),
                         ("experts in bf16", 2, "C0s")):
    ratio = {name: 2 * n / size for name, n in rows.items()}
    reached = {name: min(OPERATE, x * READ) for name, x in ratio.items()}
    left.plot(list(ratio.values()), [y / 1e9 for y in reached.values()],
              look, ms=7, label=kind)
    left.annotate("decode", (ratio["decode"], reached["decode"] / 1e9),
                  (8, -4), textcoords="offset points", fontsize=8)
left.text(120, 150, "prefill of 512", ha="center", fontsize=8)
whole = flops_per_token(big, 0) / bytes_read_per_token(big)
left.plot(whole, whole * READ / 1e9, "C2^", ms=7, label="a token of the 20b")
left.set(xscale="log", yscale="log", xlim=(0.5, 700), ylim=(12, 300),
         xlabel="operations for each byte read", ylabel="GFLOP/s, at best")
left.set_xticks([1, 10, 100], ["1", "10", "100"])
left.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
left.minorticks_off()
left.legend(loc="lower right")
right.barh(list(parts), [size / 1e9 for size in parts.values()],
           color=["C0", "C1", "C5"])
for y, size in enumerate(parts.values()):
    right.text(size / 1e9 + 0.03, y, f"{size / 1e9:.2f}", va="center",
               fontsize=8)
right.set(xlabel="GB read for a token of the 20b", xlim=(0, 1.6))
right.invert_yaxis()
plt.show()

# %% [markdown]
# What to see on the left: decoding stands on the slope. A weight is used once,
# two operations, so that fewer bytes a weight are more speed: four bits do
# 3.8 times as much as bf16. A prefill of 512 tokens brings 64 to an expert,
# stands on the flat part in either format, and gains nothing from few bits.
# A token of the 20b lies between the two formats of decoding, because, on the
# right, two thirds of what it reads are not packed at all: attention and the
# head are stored in bf16. A fast kernel for four bits alone would leave most
# of a token's time where it was, so both kinds of matrix get one.

# %%
share = (parts["attention"] + parts["lm_head"]) / sum(parts.values())
assert abs(sum(parts.values()) / bytes_read_per_token(big) - 1) < 2e-3
assert rows["prefill of 512"] == 64 and 3.7 < 2 / (17 / 32) < 3.8
print(f"stored in bf16: {share:.0%} of the bytes of a token")

# %% [markdown]
# ## The naive version
#
# The plain operator decodes the weight to bf16 and multiplies. Count the bytes
# that pass between processor and memory for one number of a matrix that no
# cache holds: the packed half byte in, two bytes out, two bytes in again.

# %%
packed, decoded = 17 / 32, 2
traffic = packed + 2 * decoded
print(f"{packed:.2f} bytes in the file, {traffic:.2f} moved: "
      f"{traffic / packed:.1f} times as many")

# %% [markdown]
# So decode in registers and multiply at once. But then the arithmetic has to
# keep up with memory, and fp32 makes only 8 products an instruction. The
# obvious remedy is to round the activations to 8 bits, as llama.cpp does, and
# multiply integers: 32 products an instruction. It is fast. What does it
# cost? Rows of 2880 weights times activations in bf16, each block of 32
# activations scaled to its largest, in 8 and in 16 bits, beside the one
# rounding to bf16 that every result gets anyway:

# %%
import torch

from gptoss.weights.mxfp4 import decode
from gptoss.weights.encoding import encode


def rounded(x: torch.Tensor, largest: int) -> torch.Tensor:
    """x (…, 32 N), each block rounded to integers of that size and back."""
    parts = x.view(*x.shape[:-1], -1, 32)
    step = parts.abs().amax(-1, keepdim=True) / largest
    return ((parts / step).round() * step).view(x.shape)


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
blocks, scales = encode(0.02 * torch.randn(256, 2880))
weight = decode(blocks, scales, torch.float64)
x = torch.randn(64, 2880).bfloat16().double()
exact = x @ weight.T
errors = {"8 bits": off(rounded(x, 127) @ weight.T, exact),
          "result in bf16": off(exact.bfloat16().double(), exact),
          "16 bits": off(rounded(x, 32639) @ weight.T, exact)}
for name, error in errors.items():
    print(f"{name:15} {error:.1e}")
assert errors["8 bits"] > 3 * errors["result in bf16"]
assert errors["16 bits"] < errors["result in bf16"] / 50

# %% [markdown]
# Eight bits lose three times as much as the rounding that nobody can avoid;
# sixteen lose about an eightieth of it. So the kernels below use sixteen bits,
# and still multiply bytes: two for each activation.

# %% [markdown]
# ## Derivation
#
# **The floor.** If a token reads $b$ bytes and memory delivers $\beta$ bytes
# a second, then whatever the processor does,
#
# $$ t_{\text{token}} \ge b / \beta . $$ (kernels-floor)
#
# The share $b / (\beta\, t_{\text{token}})$ says how much of the possible a
# program reaches; it is what `bench` prints, with $\beta$ measured on the
# same machine.
#
# **One block.** Let a block hold 32 FP4 values $v_i$ and the scale
# $2^{s-127}$. Twice a value is an integer: $v_i = w_i / 2$, $|w_i| \le 12$.
# Write the block's activations as $x_i = a\, q_i + \epsilon_i$ with integers
# $|q_i| \le Q = 32639$ and a step $a$. Then
#
# $$ \sum_i 2^{s-127} v_i x_i
#    = 2^{s-127}\, \frac a2 \sum_i w_i q_i
#      + 2^{s-127} \sum_i v_i \epsilon_i . $$ (kernels-block)
#
# The integer sum is exact: a term is at most $12\, Q$, so all 32 stay
# below $1.3 \cdot 10^7$, far inside 32 bits and even inside the 24 bits that
# a float holds exactly. Weights lose nothing; the only error is
# $|\epsilon_i| \le a/2$, so a block is off by at most
#
# $$ \frac a2 \; 2^{s-127} \sum_i |v_i| . $$ (kernels-error)
#
# **Which step?** The finest is $a = \max_i |x_i| / Q$; what stands
# between the two layers of an expert, in fp32, gets that. But what enters the
# first was stored in bf16, eight significant bits a number. With
# $2^e \le \max_i |x_i| < 2^{e+1}$ take
#
# $$ a = 2^{e-13} : \quad |x_i| \ge 2^{e-6} \;\Rightarrow\; \epsilon_i = 0,
# $$ (kernels-step)
#
# since a bf16 number of size $2^{e-6}$ or more is a multiple of $2^{e-13}$.
# Every activation of at least 1/64 of the block's largest is kept exactly,
# and the few others are off by at most $2^{-14}$ of it. With either step an
# outlier costs its 31 neighbours precision: the step follows the largest.
#
# **Why bytes.** AVX2, a set of vector instructions of x86 processors, works on
# registers of 32 bytes, AVX-512 on 64. A multiply-add for fp32 makes 8
# products in 32 bytes, one for 16-bit integers 16, one for bytes 32. A table
# of 16 bytes fits in a register, where `pshufb` looks up 32 nibbles at once:
# decoding touches no memory, and its results are bytes. Widened to 16 bits
# they would cost as many instructions again as the lookups. So split the
# activations instead, once for all rows, into two digits to the base 256:
# $q_i = 256\, h_i + l_i$, both in $-128 \dots 127$, which is why $Q = 127
# \cdot 256 + 127$. The instruction for bytes wants one factor without a sign.
# The table can hold $w_i + 12$ as well as $w_i$; then
#
# $$ \sum_i w_i q_i = 256 \sum_i (w_i + 12)\, h_i + \sum_i (w_i + 12)\, l_i
#    - 12 \sum_i q_i , $$ (kernels-digits)
#
# where the last term does not depend on the weights: it is computed once a
# block and is what the sum begins with.
#
# **Many tokens.** When several tokens meet the same weight, decoding once
# serves all of them, and the arithmetic, a product a token, becomes the
# limit. A tile of decoded weights must then stay in the cache while the
# tokens pass, and may be as wide as the activations, since widening it is
# done once: 16 rows by 320 columns of 16-bit integers are 10 KiB, a third of
# an L1 cache of 32 KiB. `pmaddwd` multiplies sixteen pairs of them and adds
# neighbours. Two columns of the tile are 2 registers, 8 rows
# each. For five tokens at a time, a step loads these 2 and 5 pairs of
# activations, and does 10 `pmaddwd`; ten sums, the two weights and one pair
# of activations take 13 of the 16 registers.
#
# **Attention** reads each key and value once for all $H/G$ query heads that
# share it. The running maximum and sum of chapter 5 make it possible to take
# 64 keys at a time, so scores never leave the cache. The sink is the state
# that a row starts from: maximum = sink, sum = 1, output = 0.

# %%
assert 32 * 12 * 32639 < 2 ** 24
print(16 * 320 * 2, "bytes of a decoded tile")

# %% [markdown]
# ## Code
#
# ### Vectors
#
# The C++ stands in this chapter as the Python does: the fenced blocks are the
# files `gptoss/*.h`, the *parts* of one program. The compiler reads them one
# after the other, in the order of the list `PARTS` (below), and each uses only
# what stands before it: so the first few are a program as well, and can be
# tried alone. What is written for AVX-512, VNNI or NEON stands in parts of its
# own, `wide.h` and `wide16.h`. Where no special instruction is needed, a part
# uses
# the vector types of GCC and Clang: `Floats` behaves like eight floats, and
# the compiler finds the instructions of the processor at hand. Where those of
# AVX2, AVX-512 or NEON are needed, it says so, and a portable loop stands
# beside them.

# %% [markdown] tags=["export:kernels/base.h"]
# ```cpp
# #include <ATen/Parallel.h>
# #include <ATen/core/Tensor.h>
# #include <ATen/core/dispatch/Dispatcher.h>
# #include <ATen/ops/empty.h>
# #include <ATen/ops/zeros.h>
# #include <ATen/record_function.h>
# #include <torch/custom_class.h>
# #include <torch/library.h>
#
# #include <algorithm>
# #include <atomic>
# #include <cmath>
# #include <cstdint>
# #include <cstring>
# #include <limits>
# #include <mutex>
# #include <tuple>
# #include <type_traits>
# #include <unordered_map>
# #include <vector>
#
# #if defined(__AVX2__) && defined(__FMA__) && !defined(GPTOSS_PORTABLE)
# #include <immintrin.h>
# #define GPTOSS_AVX2 1
# #if !defined(GPTOSS_NARROW) && defined(__AVX512VNNI__) \
#     && defined(__AVX512BW__) && defined(__AVX512VL__)
# #define GPTOSS_AVX512 1
# #ifdef __AVX512BF16__
# #define GPTOSS_BF16 1
# #endif
# #elif !defined(GPTOSS_NARROW) && defined(__AVXVNNI__)
# #define GPTOSS_VNNI 1
# #endif
# #elif defined(__aarch64__) && !defined(GPTOSS_PORTABLE)
# #include <arm_neon.h>
# #define GPTOSS_NEON 1
# #endif
#
# namespace {
#
# using at::Tensor;
# using Number = at::BFloat16;  // what weights and activations are stored in
# using Buffer = std::vector<float>;
# using Floats = float __attribute__((vector_size(32)));  // eight at a time
# using Ints = int32_t __attribute__((vector_size(32)));
#
# template <class Vector>
# inline Vector load(const void* from) {
#   Vector v;
#   std::memcpy(&v, from, sizeof v);
#   return v;
# }
#
# inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
#
# inline Floats widen(const Number* eight) {
# #ifdef GPTOSS_AVX2  // GCC makes six instructions of what stands below
#   return (Floats)((Ints)_mm256_cvtepu16_epi32(load<__m128i>(eight)) << 16);
# #else
#   using Halves = uint16_t __attribute__((vector_size(16)));
#   return (Floats)(__builtin_convertvector(load<Halves>(eight), Ints) << 16);
# #endif
# }
#
# // v stands in a register here: the compiler may not read it again from
# // memory later, nor compute ahead what follows
# template <class Vector>
# inline void hold(Vector& v) {
# #ifdef __AVX512VL__
#   asm("" : "+v"(v));
# #elif defined(__AVX__)
#   asm("" : "+x"(v));
# #endif
# }
#
# inline float sum(Floats v) {
#   v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
#   v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#   return v[0] + v[2];
# }
# ```

# %% [markdown]
# ### Threads
#
# Work is cut into more pieces than there are threads, and whoever is free
# takes the next: on a busy machine, or with experts of unequal popularity, an
# equal split would wait for the slowest. The threads are PyTorch's own.
#
# Activations become fp32 on entry and are rounded once on exit: a vector of
# 2880 numbers is small beside the 8 million weights of a matrix. Converted
# weights never go back to memory.

# %% [markdown] tags=["export:kernels/base.h"]
# ```cpp
# // work(0) ... work(count - 1) on all threads, `grain` at a time to whoever
# // is free
# template <class Work>
# void share(int64_t count, int64_t grain, const Work& work) {
#   std::atomic<int64_t> next{0};
#   at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
#     for (int64_t i; (i = next.fetch_add(grain)) < count;)
#       for (int64_t j = i; j < std::min(i + grain, count); ++j) work(j);
#   });
# }
#
# const Number* numbers(const Tensor& x) {
#   return static_cast<const Number*>(x.const_data_ptr());
# }
#
# // the nearest bf16 numbers, of two equally near the even one; NaN: 0x7fc0
# inline void narrow(Floats x, Number* eight) {
#   using Halves = uint16_t __attribute__((vector_size(16)));
#   const Ints bits = (Ints)x;
#   const Ints up = bits + 0x7fff + (bits >> 16 & 1);
#   const Ints near = x == x ? up >> 16 : Ints{} + 0x7fc0;
#   const Halves halves = __builtin_convertvector(near, Halves);
#   std::memcpy(eight, &halves, sizeof halves);
# }
#
# template <class From, class To>
# void convert(const From* from, int64_t count, To* to) {
#   at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
#     if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Number>)
#       for (; begin + 8 <= end; begin += 8)
#         narrow(load<Floats>(from + begin), to + begin);
#     std::copy(from + begin, from + end, to + begin);
#   });
# }
#
# Buffer floats(const Tensor& x) {
#   const Tensor flat = x.contiguous();
#   Buffer to(flat.numel());
#   convert(numbers(flat), flat.numel(), to.data());
#   return to;
# }
#
# // rows that are read at the same time; bytes asked for ahead
# constexpr int64_t STREAMS = 4, AHEAD = 768;
# ```

# %% [markdown]
# ### Sixteen bits for an activation
#
# {eq}`kernels-block` in code. A byte of weights holds an even element in its
# low nibble and the odd one behind it in the high nibble, so of each block the
# even activations are stored first, then the odd ones. So much for one block
# at a time (`lines`).
#
# The product for x86 takes as many blocks as a register of bytes holds: `SIDE`
# says how many, two in 256 bits, four in 512. A `Group` is what it needs for
# them: the two digits of {eq}`kernels-digits`, byte beside byte as the weights
# lie, and the offset, a number for each four bytes. A register of 64 bytes
# that lies across two cache lines is loaded in two turns, so a group begins on
# one.

# %% [markdown] tags=["export:kernels/digits.h"]
# ```cpp
# namespace {
#
# constexpr int64_t BLOCK = 32;
# #ifdef GPTOSS_AVX512
# constexpr int64_t SIDE = 4;  // blocks in a register
# #elif defined(GPTOSS_AVX2)
# constexpr int64_t SIDE = 2;
# #else
# constexpr int64_t SIDE = 1;
# #endif
# constexpr int64_t LANES = 4 * SIDE;  // 32-bit numbers in a register
#
# struct Line {
#   int16_t values[2][BLOCK / 2];  // a block's even elements, its odd ones
# };
#
# struct alignas(64) Group {
#   int8_t digits[2][2][SIDE][16];  // the high ones, the low ones; even, odd
#   int32_t offset[SIDE][4];        // -12 times the sum over four bytes
# };
#
# // rows of 16-bit integers, and for each block half the step between them
# struct Quantised {
#   int64_t blocks, per_row;  // groups: blocks / SIDE, rounded up
#   std::vector<Line> lines;
#   std::vector<Group> groups;
#   Buffer halves;  // a row of them is filled up to whole registers
#
#   Quantised(int64_t rows, int64_t blocks)
#       : blocks(blocks), per_row((blocks + SIDE - 1) / SIDE),
#         lines(rows * blocks), groups(SIDE > 1 ? rows * per_row : 0),
#         halves(rows * per_row * SIDE + LANES) {}
#
#   Line* line(int64_t n) { return &lines[n * blocks]; }
#   float* half(int64_t n) { return &halves[n * per_row * SIDE]; }
#   const Line* line(int64_t n) const { return &lines[n * blocks]; }
#   const float* half(int64_t n) const {
#     return &halves[n * per_row * SIDE];
#   }
# };
# ```

# %% [markdown]
# An infinite or NaN activation makes the factor NaN, so the result is NaN too.
# A block whose largest activation is below about $3 \cdot 10^{-33}$ counts as
# zeros, since one over its step comes near the largest float.

# %% [markdown] tags=["export:kernels/digits.h"]
# ```cpp
# inline float largest(const Floats (&part)[4]) {
#   Floats top = {};
#   for (Floats x : part) {
#     Floats size = (Floats)((Ints)x & 0x7fffffff);
#     top = size > top ? size : top;
#   }
#   float found = 0;
#   for (int i = 0; i < 8; ++i) found = std::max(found, top[i]);
#   return found;
# }
#
# constexpr float MOST = 127 * 256 + 127;
#
# // the step between integers: a power of two for what was stored in bf16,
# // whose largest is then at most 255 * 2**6; otherwise the finest
# inline float step(float largest, bool stored) {
#   if (!stored) return largest / MOST;
#   const uint32_t exponent = load<uint32_t>(&largest) & 0x7f800000;
#   return load<float>(&exponent) / 8192;
# }
#
# using Reals = float __attribute__((vector_size(128)));  // of a block
# using Whole = int32_t __attribute__((vector_size(128)));
# using Shorts = int16_t __attribute__((vector_size(64)));
# using Digits = int8_t __attribute__((vector_size(32)));
#
# // q = 256 * high + low, both in -128 ... 127, for the block in that place
# inline void split(Shorts q, int64_t place, Group& to) {
#   const Digits digits[] = {__builtin_convertvector((q + 128) >> 8, Digits),
#                            __builtin_convertvector(q, Digits)};
#   for (int d = 0; d < 2; ++d)
#     for (int odd = 0; odd < 2; ++odd)
#       std::memcpy(to.digits[d][odd][place],
#                   reinterpret_cast<const char*>(&digits[d]) + 16 * odd, 16);
#   for (int i = 0; i < 16; ++i)
#     to.offset[place][i / 4] -= 12 * (q[i] + q[16 + i]);
# }
#
# void quantise(const float* x, bool stored, int64_t n, Quantised& to) {
#   for (int64_t b = 0; b < to.blocks; ++b, x += BLOCK) {
#     Floats part[4], odd = {};
#     for (int i = 0; i < 4; ++i) {
#       part[i] = load<Floats>(x + 8 * i);
#       odd += 0 * part[i];  // NaN if one of them is NaN or infinite
#     }
#     const float scale = step(largest(part), stored);
#     const float up = scale > 1e-37f ? 1 / scale : 0;
#     // adding 1.5 * 2**23 leaves the nearest integer in the low bits
#     const auto all = (Whole)(load<Reals>(x) * up + 12582912.0f);
#     const Shorts near = __builtin_convertvector(all - 0x4b400000, Shorts);
#     const Shorts q = __builtin_shufflevector(
#         near, near,
#         0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
#         1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#     std::memcpy(to.line(n)[b].values, &q, sizeof q);
#     to.half(n)[b] = scale / 2 + sum(odd);
#     if (SIDE > 1) split(q, b % SIDE, to.groups[n * to.per_row + b / SIDE]);
#   }
# }
#
# Quantised quantised(const Buffer& x, bool stored, int64_t rows,
#                     int64_t blocks) {
#   Quantised q(rows, blocks);
#   at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
#     for (int64_t n = begin; n < end; ++n)
#       quantise(&x[n * blocks * BLOCK], stored, n, q);
#   });
#   return q;
# }
# ```

# %% [markdown]
# The same in torch, to look at: how many of a block's activations
# {eq}`kernels-step` keeps exactly, and the digits of every integer.

# %%
some = torch.randn(1000, 32).bfloat16().double()
top = some.abs().amax(-1, keepdim=True)
step = 2.0 ** (top.frexp().exponent - 14).double()
kept = (some / step).round() * step == some
assert kept[some.abs() >= top / 64].all() and (top / step <= 16320).all()
finest = rounded(some, 32639) == some
print(f"kept: {kept.double().mean():.0%} with a power of two, "
      f"{finest.double().mean():.0%} with the finest step")
q = torch.arange(-32639, 32640)
high, low = (q + 128) >> 8, (q + 128) % 256 - 128
assert torch.equal(256 * high + low, q)
assert max(high.abs().max(), low.max(), -1 - low.min()) <= 127
q = torch.tensor([5, -300, 32639])
print([(h, low) for h, low in zip(((q + 128) >> 8).tolist(),
                                  ((q + 128) % 256 - 128).tolist(),
                                  strict=True)])

# %% [markdown]
# ### One row of four-bit weights
#
# First the portable loop. A scale byte is the exponent field of a float: put
# in its place it *is* $2^{s-127}$. Byte 0 means $2^{-127}$, a subnormal number
# with one bit set, and byte 255, infinity in a float, must become NaN.

# %% [markdown] tags=["export:kernels/digits.h"]
# ```cpp
# inline float power(uint8_t scale) {  // 2 ** (scale - 127); NaN for 255
#   // a scale byte is a float's exponent field; that of 0 is subnormal
#   const uint32_t bits = std::max(uint32_t(scale) << 23, 1u << 22);
#   const float value = load<float>(&bits);
#   return value + 0 * value;  // infinity becomes NaN
# }
#
# constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12,
#                               0, -1, -2, -3, -4, -6, -8, -12};
# ```

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# namespace {
#
# #if !defined(GPTOSS_AVX2) && !defined(GPTOSS_NEON)
# // out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
# template <int R>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, int64_t n, float* out) {
#   for (int r = 0; r < R; ++r, out += step) {
#     *out = 0;
#     for (int64_t b = 0; b < x.blocks; ++b) {
#       const int64_t at = r * step * x.blocks + b;
#       const auto& [even, odd] = x.line(n)[b].values;
#       int32_t s = 0;
#       for (int i = 0; i < 16; ++i)
#         s += TWICE[w[16 * at + i] & 15] * even[i]
#              + TWICE[w[16 * at + i] >> 4] * odd[i];
#       *out += s * (power(scales[at]) * x.half(n)[b]);
#     }
#   }
# }
# #endif
# ```

# %% [markdown]
# The same two lines in torch, for all 256 bytes, against chapter 2:

# %%
byte = torch.arange(256, dtype=torch.int32)
bits = (byte << 23).clamp_min(1 << 22).view(torch.float32)
power = bits + 0 * bits
ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # the code of 1.0
by_decoder = decode(ones, byte[:, None].to(torch.uint8), torch.float32)[:, 0]
assert torch.equal(power.nan_to_num(), by_decoder.nan_to_num())
print(power[0].item() == 2.0 ** -127, power[255].isnan().item())

# %% [markdown]
# The centre of the chapter: the digits of {eq}`kernels-digits`. A shift by 4
# brings the high nibbles down, and two lookups make of the bytes the numbers
# $w_i + 12$ of the even elements and those of the odd ones. `pshufb` needs a
# mask before it, as it looks at more than four bits of an index. AVX-512 has
# `vpermb`, which looks at six: with the table in it four times over, no mask
# is needed.
#
# Then come the products. `vpdpbusd`, of AVX-512 VNNI or AVX-VNNI, multiplies
# unsigned bytes by signed ones and adds four neighbours to a 32-bit sum.
# Without it, AVX2 multiplies and adds two neighbours in 16 bits, adds the odd
# elements to the even ones, at most $4 \cdot 24 \cdot 128 = 12288$, and then
# widens with `pmaddwd`, by ones for the low digits, by 256 for the high ones.
#
# An earlier version widened the weights to 16 bits (AVX2 by shifts and masks,
# AVX-512 by `vpermw`, which looks up 16-bit numbers) and multiplied those: 18
# instructions for four blocks with AVX-512, their factors included, loads not,
# where the bytes take 13. In the L2 cache that is 28 instead of 22 GB/s a
# thread.

# %% [markdown] tags=["export:kernels/digits.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // TWICE + 12
#                                12, 11, 10, 9, 8, 6, 4, 0};
# using Sums = float __attribute__((vector_size(16 * SIDE)));
# using Words = int32_t __attribute__((vector_size(16 * SIDE)));
# using Pairs = uint16_t __attribute__((vector_size(16 * SIDE)));
# using Digit = int8_t[2][SIDE][16];  // of even elements, of odd ones
# #endif
#
# }  // namespace
# ```

# %% [markdown] tags=["export:kernels/wide.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# using Bytes = __m512i;
#
# inline Bytes table() {
#   return _mm512_broadcast_i32x4(load<__m128i>(ABOVE));
# }
#
# inline Bytes look_up(Bytes values, Bytes nibbles) {
# #ifdef __AVX512VBMI__
#   return _mm512_permutexvar_epi8(nibbles, values);
# #else
#   return _mm512_shuffle_epi8(
#       values, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
# #endif
# }
#
# inline Bytes add_bytes(Bytes sums, Bytes a, const int8_t (&x)[SIDE][16]) {
#   return _mm512_dpbusd_epi32(sums, a, load<Bytes>(x));
# }
# #endif
#
# #ifdef GPTOSS_VNNI
# inline __m256i add_bytes(__m256i sums, __m256i a,
#                          const int8_t (&x)[SIDE][16]) {
#   return _mm256_dpbusd_avx_epi32(sums, a, load<__m256i>(x));
# }
# #endif
# ```

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# #ifdef GPTOSS_AVX2
# #ifndef GPTOSS_AVX512
# using Bytes = __m256i;
#
# inline Bytes table() {
#   return _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
# }
#
# inline Bytes look_up(Bytes values, Bytes nibbles) {
#   return _mm256_shuffle_epi8(
#       values, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
# }
# #endif
#
# // sums + UNIT * (a times digits of even elements, b times those of odd
# // ones, of four neighbours each); UNIT: 1 or 256
# template <int UNIT>
# inline Words products(Words sums, Bytes a, Bytes b, const Digit& x) {
# #if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
#   if (UNIT == 1)
#     return (Words)add_bytes(add_bytes((Bytes)sums, a, x[0]), b, x[1]);
#   return sums + ((Words)add_bytes(add_bytes(Bytes{}, a, x[0]), b, x[1])
#                  << 8);
# #else
#   const Bytes two = _mm256_add_epi16(
#       _mm256_maddubs_epi16(a, load<Bytes>(x[0])),
#       _mm256_maddubs_epi16(b, load<Bytes>(x[1])));
#   return sums + (Words)_mm256_madd_epi16(two, _mm256_set1_epi16(UNIT));
# #endif
# }
#
# // SIDE blocks of weights times a group: a lane sums what four bytes give
# inline Sums dots(Bytes bytes, const Group& x, Bytes values) {
#   const Bytes a = look_up(values, bytes);
#   const Bytes b = look_up(values, (Bytes)((Pairs)bytes >> 4));
#   const Words low = products<1>(load<Words>(x.offset), a, b, x.digits[1]);
#   return __builtin_convertvector(products<256>(low, a, b, x.digits[0]),
#                                  Sums);
# }
# ```

# %% [markdown]
# One conversion and one multiply-add serve `SIDE` blocks, and want the blocks'
# factors, each in four lanes. They are made in registers, `LANES` blocks at a
# time: the scale bytes become exponents by a shift, are multiplied by half the
# steps, and one permutation for each group puts them where they are needed. An
# AVX2 instruction that moves numbers between the two halves of a register is
# slow (on a Zen 3, 2.5 times as slow as one that does not), so the factors
# stand in such an order (`arrange`) that a group's two are already in the
# right halves. Byte 255 gives infinity, which the row's end turns into NaN: $y
# + 0 y$.
#
# 90 blocks are no whole number of registers. What is missing of the scales is
# filled up with 127, the scale 1, and what is missing of the weights with
# zeros; both meet activations that are zero. AVX-512 loads under a mask. AVX2,
# which has none for bytes, reads the row's last eight scales and shifts away
# those it has had already; only a row of fewer than eight blocks is gathered
# scale by scale.
#
# Filled up with zeros the scales would be $2^{-127}$, and a processor takes
# its time with a subnormal number: so written, the whole product took 7 %
# longer (one thread, weights in the L1 cache).

# %% [markdown] tags=["export:kernels/wide.h"]
# ```cpp
# #ifdef GPTOSS_AVX512
# inline __mmask16 first(int64_t count) { return (1u << count) - 1; }
#
# inline Words load_scales(const uint8_t* from, int64_t count, bool) {
#   return (Words)_mm512_cvtepu8_epi32(
#       _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count), from));
# }
#
# inline Bytes load_blocks(const uint8_t* from, int64_t count) {
#   return count < SIDE ? _mm512_maskz_loadu_epi32(first(4 * count), from)
#                       : load<Bytes>(from);
# }
#
# inline Sums arrange(Sums v) { return v; }
#
# // the factors of group g, each in four lanes
# inline Sums spread(Sums factors, int g) {
#   const Words place = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
#   return (Sums)_mm512_permutexvar_ps((Bytes)(place + 4 * g),
#                                      (__m512)factors);
# }
#
# inline float sum(Sums v) {
#   const __m512d both = _mm512_castps_pd((__m512)v);
#   return sum((Floats)_mm512_castpd512_pd256(both)
#              + (Floats)_mm512_extractf64x4_pd(both, 1));
# }
# #endif
# ```

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# #ifndef GPTOSS_AVX512
# // blocks 0, 2, 4, 6 and then 1, 3, 5, 7; more: others stand before them
# inline Words load_scales(const uint8_t* from, int64_t count, bool more) {
#   uint64_t eight = 0x7f7f7f7f7f7f7f7f;
#   if (count == LANES)
#     eight = load<uint64_t>(from);
#   else if (more)
#     eight = eight << 8 * count
#             | load<uint64_t>(from + count - LANES) >> 8 * (LANES - count);
#   else
#     for (int64_t i = count; i--;) eight = eight << 8 | from[i];
#   return (Words)_mm256_cvtepu8_epi32(_mm_shuffle_epi8(
#       _mm_cvtsi64_si128(eight), _mm_cvtsi64_si128(0x0705030106040200)));
# }
#
# inline Sums arrange(Sums v) {  // in the same order
#   return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
# }
#
# inline Bytes load_blocks(const uint8_t* from, int64_t count) {
#   return count < SIDE ? _mm256_zextsi128_si256(load<__m128i>(from))
#                       : load<Bytes>(from);
# }
#
# // number g of either half, in four lanes
# inline Sums spread(Sums factors, int g) {
#   return (Sums)_mm256_permutevar_ps((__m256)factors, _mm256_set1_epi32(g));
# }
# #endif
#
# // 2 ** (scale - 127) times half the step; infinity for 255
# inline Sums factors(Words scales, Sums halves) {
#   const Words bits = scales << 23;
#   const Words least = Words{} + (1 << 22);
#   return (Sums)(bits > least ? bits : least) * halves;
# }
# ```

# %% [markdown]
# Of the rows, four are read at the same time, and not neighbours but rows far
# apart. Processors fetch ahead along a stream of addresses, each stream for
# itself and only to the end of a 4 KiB page: with one stream everything waits
# at every page, with four the others go on. The prefetch asks for the bytes
# that the same row needs a quarter of a KiB later. `hold` keeps the compiler
# from reading a row's bytes again for their second use. The four groups of
# `LANES` blocks are written out one after the other: there `count` is known,
# whole registers are loaded without a question, and each permutation is a
# constant.

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# // out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
# template <int R>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, int64_t n, float* out) {
#   const Bytes values = table();
#   const int64_t blocks = x.blocks, row = step * blocks;
#   const Group* group = &x.groups[n * x.per_row];
#   const float* halves = x.half(n);
#   Sums total[R] = {}, factor[R];
#   auto make_factors = [&](int64_t b, int64_t count) {
#     const Sums half = arrange(load<Sums>(halves + b));
#     for (int r = 0; r < R; ++r)
#       factor[r] = factors(load_scales(scales + r * row + b, count, b > 0),
#                           half);
#   };
#   auto add = [&](int64_t b, int g, int64_t count) {  // group g from b on
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* at = w + 16 * (r * row + b + g * SIDE);
#       __builtin_prefetch(at + 256);
#       Bytes bytes = load_blocks(at, count - g * SIDE);
#       hold(bytes);
#       total[r] += dots(bytes, group[g], values) * spread(factor[r], g);
#     }
#   };
#   int64_t b = 0;
#   for (; b + LANES <= blocks; b += LANES, group += 4) {
#     make_factors(b, LANES);
# #pragma GCC unroll 4
#     for (int g = 0; g < 4; ++g) add(b, g, LANES);
#   }
#   if (b < blocks) make_factors(b, blocks - b);
#   for (int g = 0; b + g * SIDE < blocks; ++g) add(b, g, blocks - b);
#   for (int r = 0; r < R; ++r) {
#     const float y = sum(total[r]);
#     out[r * step] = y + 0 * y;  // infinity becomes NaN
#   }
# }
# #endif
# ```

# %% [markdown]
# The same for ARM, whose registers hold 16 bytes: one block at a time, `tbl`
# for the lookup, and `smlal`, which multiplies 16-bit numbers and adds to
# 32-bit sums. The factor of a block is made where it is used. Tokens that
# share an expert go through it one by one; the tiles below are x86 only.

# %% [markdown] tags=["export:kernels/wide.h"]
# ```cpp
# #ifdef GPTOSS_NEON
# inline int32x4_t dots(uint8x16_t bytes, const Line& x, int8x16_t values) {
#   int32x4_t s = {}, t = {};
#   auto add = [&](uint8x16_t nibbles, const int16_t* q) {
#     const int8x16_t w = vqtbl1q_s8(values, nibbles);
#     const int16x8_t half[] = {vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w)};
#     for (int i = 0; i < 2; ++i) {
#       const int16x8_t eight = vld1q_s16(q + 8 * i);
#       s = vmlal_s16(s, vget_low_s16(half[i]), vget_low_s16(eight));
#       t = vmlal_high_s16(t, half[i], eight);
#     }
#   };
#   add(vandq_u8(bytes, vdupq_n_u8(15)), x.values[0]);
#   add(vshrq_n_u8(bytes, 4), x.values[1]);
#   return vaddq_s32(s, t);
# }
#
# template <int R>
# void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
#                  const Quantised& x, int64_t n, float* out) {
#   const int8x16_t values = vld1q_s8(TWICE);
#   float32x4_t total[R] = {};
#   for (int64_t b = 0; b < x.blocks; ++b)
#     for (int r = 0; r < R; ++r) {
#       const int64_t at = r * step * x.blocks + b;
#       __builtin_prefetch(w + 16 * at + 512);
#       const int32x4_t part = dots(vld1q_u8(w + 16 * at), x.line(n)[b],
#                                   values);
#       total[r] = vfmaq_n_f32(total[r], vcvtq_f32_s32(part),
#                              power(scales[at]) * x.half(n)[b]);
#     }
#   for (int r = 0; r < R; ++r) out[r * step] = vaddvq_f32(total[r]);
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown]
# What each step brought, on a matrix that no cache holds. The steps stand in
# `bench/kernels_steps.cpp`; GB/s count the packed bytes. Moving 8.5 times the
# bytes explains only part of plain torch's distance from reading; the rest is
# its table, looked up in memory a byte at a time. (Plain torch was run once,
# and its run on one thread is left out: it took five times as long as the one
# on two, which two threads do not explain; something else was running.)

# %% tags=["hide-input"]
steps = measured("steps", default=[])
names = list(dict.fromkeys(step["name"] for step in steps))
threads = sorted({step["threads"] for step in steps})
found = {(step["name"], step["threads"]): step["gb_per_s"] for step in steps}
if names:
    print("GB/s with threads:".ljust(30),
          *(f"{count:>6}" for count in threads))
else:
    print("not measured yet")
for name in names:
    row = (found.get((name, count)) for count in threads)
    print(name.ljust(30),
          *("     -" if speed is None else f"{speed:6.2f}" for speed in row))
if {"plain torch", "the chapter's kernel", "only reading"} <= set(names):
    torchs, ours, most = (found[name, threads[-1]] for name in (
        "plain torch", "the chapter's kernel", "only reading"))
    print(f"of reading: torch {torchs / most:.0%}, kernel {ours / most:.0%}")

# %% [markdown]
# The last line is the operator as the model calls it: it also makes the
# integers and rounds the result. The bytes were chosen for `vpdpbusd`; with
# AVX2 alone they gain nothing over the 16-bit numbers of the line before.

# %% [markdown]
# ### Sixteen rows, many tokens
#
# For a tile, pairs of columns must lie side by side, row after row, so that
# one activation pair, broadcast, meets eight rows in one instruction:
# `values[b][u][m]` holds, for 16 rows, the two columns of block b that meet
# `values[u][2 * m]` of a line and the number behind it. Rows become columns by
# four rounds of interleaving, like riffling a deck.

# %% [markdown] tags=["export:kernels/tiles.h"]
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

# %% [markdown] tags=["export:kernels/tiles.h"]
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
# Chapter 8 sorts tokens by expert with `argsort`. Here a counting sort does
# it. A *pick* is one choice of one token: token $n$, choice $k$ is pick
# $nK + k$.

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# struct Packed {  // (E, rows, blocks, 16) bytes and (E, rows, blocks) scales
#   const uint8_t *bytes, *scales;
#   int64_t rows, blocks;
#
#   Packed(const Tensor& b, const Tensor& s)
#       : bytes(b.const_data_ptr<uint8_t>()),
#         scales(s.const_data_ptr<uint8_t>()), rows(s.size(-2)),
#         blocks(s.size(-1)) {}
# };
# ```

# %% [markdown] tags=["export:kernels/experts.h"]
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
# All tokens of one expert: for fewer than four, row by row, since the rows
# just read are still in the L1 cache when the next token wants them; from four
# on, sixteen rows at a time by tiles. `packed_rows` is the first way alone, an
# operator that no model calls: by it this part is tested without the tiles.

# %% [markdown] tags=["export:kernels/packed.h"]
# ```cpp
# // out[i][0 ... rows - 1]: those rows times the token in inputs[i], by rows
# void rows_for_few(const uint8_t* w, const uint8_t* scales, int64_t rows,
#                   const Quantised& x, const std::vector<int64_t>& inputs,
#                   float* out) {
#   const int64_t blocks = x.blocks, step = rows / 4;
#   auto run = [&](auto dots, int64_t r) {
#     for (size_t i = 0; i < inputs.size(); ++i)
#       dots(w + 16 * r * blocks, scales + r * blocks, step, x, inputs[i],
#            out + i * rows + r);
#   };
#   for (int64_t r = 0; r < step; ++r) run(packed_dots<4>, r);
#   for (int64_t r = 4 * step; r < rows; ++r) run(packed_dots<1>, r);
# }
#
#
# // y (N, m) fp32 = x (N, n) bf16 times the weight transposed, row by row
# Tensor packed_rows(const Tensor& x, const Tensor& blocks,
#                    const Tensor& scales) {
#   TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed({blocks, scales})
#                   && x.dim() == 2 && scales.dim() == 2
#                   && x.size(1) == scales.size(1) * BLOCK
#                   && has(blocks, {scales.size(0), scales.size(1), 16}),
#               "packed_rows: expected bfloat16 x (N, n), bytes (m, n / 32, "
#               "16) and (m, n / 32), found ", x.sizes(), ", ",
#               blocks.sizes(), ", ", scales.sizes());
#   const Packed weight(blocks, scales);
#   const int64_t N = x.size(0);
#   std::vector<int64_t> inputs(N);
#   for (int64_t i = 0; i < N; ++i) inputs[i] = i;
#   Tensor y = at::empty({N, weight.rows}, at::kFloat);
#   rows_for_few(weight.bytes, weight.scales, weight.rows,
#                quantised(floats(x), true, N, weight.blocks), inputs,
#                y.data_ptr<float>());
#   return y;
# }
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.def("packed_rows(Tensor x, Tensor blocks, Tensor scales) -> Tensor");
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) { m.impl("packed_rows", packed_rows); }
#
# }  // namespace
# ```

# %% [markdown] tags=["export:kernels/tiles.h"]
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

# %% [markdown] tags=["export:kernels/experts.h"]
# ```cpp
# constexpr int64_t FEW = 4;     // fewer tokens: no tile
# constexpr int64_t TALL = 256;  // rows of a piece of work for those
# ```

# %% [markdown] tags=["export:kernels/experts.h"]
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

# %% [markdown] tags=["export:kernels/experts.h"]
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
print("relative error below 1e-6:", worst < 1e-6)

# %% [markdown] tags=["export:kernels/experts.h"]
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
# ### Dense matrices
#
# A bf16 number is the upper half of a float. Of eight pairs in a register,
# a shift gives the even ones and a mask the odd ones, two instructions for
# sixteen weights; the activations are split the same way beforehand.
#
# Processors with AVX512-BF16 multiply bf16 as it is: `vdpbf16ps` takes 32
# pairs and adds two products to each of 16 sums in fp32 (a number below
# $2^{-126}$ counts as zero). Half the instructions are one gain. The other:
# activations stay in bf16, half as long. For the 4096 columns of `o_proj` fp32
# takes 16 KiB, half of an L1 cache of 32, and the rows stream through the
# other half; bf16 takes a quarter of it. Twelve such products took 5.4 ms
# instead of 7.4.
#
# In either case four rows are read at the same time, as above. With AVX2 a row
# is also asked for three quarters of a KiB ahead of its use: on two cores the
# dense matrices of the 20b (in twelve bits, below) then took 44 to 53 ms a
# token, by memory's mood, where two rows and no prefetch took 52 to 57.

# %% [markdown] tags=["export:kernels/wide16.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_BF16
# std::vector<Number> ready(const Buffer& x) {
#   std::vector<Number> to(x.size());
#   convert(x.data(), x.size(), to.data());
#   return to;
# }
#
# template <int R>
# void dense_dots(const Number* w, int64_t step, const Number* x, int64_t n,
#                 float* out) {
#   __m512 s[R] = {};
#   for (int64_t k = 0; k < n; k += BLOCK)
#     for (int r = 0; r < R; ++r)
#       s[r] = _mm512_dpbf16_ps(s[r], load<__m512bh>(w + r * step * n + k),
#                               load<__m512bh>(x + k));
#   for (int r = 0; r < R; ++r) out[r * step] = sum(s[r]);
# }
# #endif
# ```

# %% [markdown] tags=["export:kernels/dense.h"]
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

# %% [markdown] tags=["export:kernels/tiles.h"]
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

# %% [markdown] tags=["export:kernels/dense.h"]
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
# and one activation in fifteen registers. Attention will use it as well.

# %% [markdown] tags=["export:kernels/tiles.h"]
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

# %% [markdown] tags=["export:kernels/dense.h"]
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

# %% [markdown] tags=["export:kernels/dense.h"]
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
# ### Sixteen bits in twelve
#
# Of the bytes that a token reads, two thirds are now dense: 1.27 of 3.70 GB
# are experts. Four bits would be another model. But do sixteen bits hold
# sixteen bits of information? A bf16 number is a sign $s$, eight bits $e$ of
# exponent and seven, $m$, of mantissa. Signs and mantissas look like coin
# tosses. Exponents do not: the weights of a matrix have about one size, more
# than half of them lie within a factor of four, and below that each halving of
# the size is half as frequent as the one before. {cite}`dfloat2025` gives the
# exponents a Huffman code and ends at eleven bits a number, with no bit lost;
# decoding a code of unequal lengths is work for a GPU.
#
# Codes of equal length do nearly as well, cut where they are cheap to read. In
# memory a bf16 number is two bytes,
#
# $$ \text{upper} = 128\, s + \lfloor e / 2 \rfloor, \qquad
#    \text{lower} = 128\, (e \bmod 2) + m .
# $$ (kernels-bytes)
#
# The lower one is kept. Of the upper one there are few: the seven most
# frequent values of $\lfloor e / 2 \rfloor$ cover fourteen neighbouring
# exponents, and with the eighth, 0, that of zero, and the sign they make
# sixteen, a code of four bits. A number that has none (of normal ones about
# one in three thousand) is zero in its place, and stands with its column in a
# list of its own. A matrix that does not shrink by a tenth is left as it is.
#
# Sixty-four numbers take 64 lower bytes and 32 of codes.

# %% tags=["export:kernels/compact"]
from typing import NamedTuple

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

# %% tags=["export:kernels/compact"]
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
matrix = (0.02 * torch.randn(512, 2880)).bfloat16()
matrix[0, :4] = torch.tensor([0.0, -0.0, 1e-30, float("inf")])
compact_matrix = pack_by_torch(matrix)
assert torch.equal(unpack(compact_matrix).view(torch.int16),
                   matrix.view(torch.int16))
print(f"{8 * compact_matrix.nbytes / matrix.numel():.2f} bits a number, "
      f"{len(compact_matrix.others)} of {matrix.numel():,} stored apart")

# %% [markdown]
# How often each exponent occurs in these normal numbers, and which have a
# code. The information in an exponent is $-\sum_e p_e \log_2 p_e$:

# %% tags=["hide-input"]
# Figure: bars over exponents from minus 24 to minus 4, on a logarithmic axis.
# The two highest, near the right end, are a quarter and three tenths of all
# numbers; to the left of them each bar is half as high as its neighbour. The
# fourteen on the right are coloured, seven low ones on the left grey.
exponent = (matrix.view(torch.int16).long() >> 7 & 255).flatten()
share = exponent.bincount(minlength=256)[101:125] / exponent.numel()
at = torch.arange(101, 125) - 127
coded = torch.isin((at + 127) // 2, compact_matrix.upper[:7].long())
fig, ax = plt.subplots(figsize=(6.4, 2.6))
for which, color, label in ((coded, "C0", "has a code"),
                            (~coded, "0.6", "stored apart")):
    ax.bar(at[which], share[which], color=color, label=label)
ax.set(yscale="log", xlabel="exponent $e$ of a weight $\\pm 1.m \\cdot 2^e$",
       ylabel="share of all weights", xlim=(-24.9, -3.1),
       xticks=range(-24, -3, 4))
ax.legend(frameon=False)
plt.show()
known = share[share > 0]
print(f"information in an exponent: {-(known * known.log2()).sum():.1f} bits")

# %% [markdown]
# To read it, a table in a register turns 32 codes at once into upper bytes;
# interleaved with the lower ones they are bf16. An earlier version gave each
# of fifteen exponents a code and kept sign and mantissa in a byte: the same
# twelve bits, but two lookups and four masks where this takes one lookup, and
# in the L3 cache 28 instead of 25 GB/s a thread.
#
# Interleaving works within halves (quarters, with 64 bytes) of a register, so
# the bytes are stored in the order that makes neighbours of neighbours.

# %% [markdown] tags=["export:kernels/experts.h"]
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

# %% [markdown] tags=["export:kernels/wide16.h"]
# ```cpp
# #ifdef GPTOSS_BF16
# // of 64 weights, the halves of a register interleaved give 0 ... 15 and
# // 32 ... 47, then the others
# std::vector<Number> compact_ready(const Buffer& x) {
#   std::vector<Number> to(x.size());
#   for (size_t k = 0; k < x.size(); k += 8)
#     narrow(load<Floats>(&x[k]), &to[k / 64 * 64 + k % 32 / 16 * 32
#                                     + k % 64 / 32 * 16 + k % 16]);
#   return to;
# }
#
# template <int R>
# void compact_dots(const Compact& w, int64_t row, int64_t step,
#                   const Number* x, float* out) {
#   const Bytes upper = _mm512_broadcast_i32x4(load<__m128i>(w.upper));
#   const Bytes low = _mm512_set1_epi8(15);
#   __m512 s[R][2] = {};
#   for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
#     for (int r = 0; r < R; ++r) {
#       const uint8_t* from = w.row(row + r * step) + b * SIZE;
#       const Bytes lower = load<Bytes>(from);
#       const __m256i codes = load<__m256i>(from + WEIGHTS);
#       const Bytes code = _mm512_and_si512(low, _mm512_inserti64x4(
#           _mm512_castsi256_si512(codes), _mm256_srli_epi16(codes, 4), 1));
#       const Bytes high = _mm512_shuffle_epi8(upper, code);
#       s[r][0] = _mm512_dpbf16_ps(
#           s[r][0], (__m512bh)_mm512_unpacklo_epi8(lower, high),
#           load<__m512bh>(x));
#       s[r][1] = _mm512_dpbf16_ps(
#           s[r][1], (__m512bh)_mm512_unpackhi_epi8(lower, high),
#           load<__m512bh>(x + BLOCK));
#     }
#   for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
# }
# #endif
# ```

# %% [markdown] tags=["export:kernels/compact.h"]
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
# Buffer compact_ready(const Buffer& x) { return ready(x); }
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
#       __builtin_prefetch(from + AHEAD);
#       __builtin_prefetch(from + AHEAD + SIZE / 2);
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
# Packing reads a matrix once, after every eighth row has been counted. What
# stands apart is noted row by row, and then brought together.

# %% [markdown] tags=["export:kernels/compact.h"]
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
# ### Attention
#
# A piece of work is one key head, its $H/G$ query heads and as many tokens as
# make 64 rows, 8 in the 20b. With no more tokens than that, as in decode,
# there would be only $G$ pieces, however long the context. So then the keys
# are cut into ranges of 512, and the results of the ranges are merged.
#
# Scores are a matrix product with sixteen keys at a time as columns. With
# AVX512-BF16 their numbers stay in pairs, half as long, and `vdpbf16ps` adds
# two products at once; else they are widened. Weights times values stays in
# fp32: rounded to bf16, the weights would lose what the sum keeps.

# %% [markdown] tags=["export:kernels/wide16.h"]
# ```cpp
# #ifdef GPTOSS_BF16
# using Query = Number;
# using Key = int32_t;  // a pair of columns
#
# // to[c / 2][r]: two numbers of key r, zero from `rows` on
# void pair_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
#                Key* to) {
#   for (int64_t half = 0; half < ROWS; half += 8)
#     for (int64_t c = 0; c < C; c += 16) {
#       Ints v[8];
#       pair_columns(k + half * stride + c, stride, rows - half, v);
#       for (int64_t j = 0; j < 8; ++j)
#         std::memcpy(to + (c / 2 + j) * ROWS + half, &v[j], sizeof v[j]);
#     }
# }
#
# // out[r][0 ... 15] = sum over pairs p < n of q[r] and w[p][0 ... 15]
# template <int R>
# void multiply_rows(const Key* w, int64_t n, const Number* q, Target out) {
#   __m512 s[R] = {};
#   for (int64_t p = 0; p < n; ++p, q += 2) {
#     const __m512bh pairs = load<__m512bh>(w + p * ROWS);
#     for (int r = 0; r < R; ++r)
#       s[r] = _mm512_dpbf16_ps(s[r], pairs, (__m512bh)_mm512_set1_epi32(
#           load<int32_t>(q + r * 2 * n)));
#   }
#   for (int r = 0; r < R; ++r)
#     _mm512_storeu_ps(out.at + r * out.stride, s[r]);
# }
#
# void multiply_pairs(const Key* w, int64_t n, const Number* q, int64_t rows,
#                     Target out) {
#   for (int64_t r = 0, some; r < rows; r += some) {
#     some = rows - r < 8 ? 1 : 8;
#     (some == 8 ? multiply_rows<8> : multiply_rows<1>)(
#         w, n, q + r * 2 * n, {out.at + r * out.stride, out.stride});
#   }
# }
# #endif
#
# }  // namespace
# ```

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# namespace {
#
# #ifndef GPTOSS_BF16
# using Query = float;
# using Key = float;
# #endif
#
# constexpr int64_t KEYS = 64, WIDEST = 256;  // keys at a time; largest head
#
# struct Attention {  // one key head, the query heads and tokens it serves
#   int64_t C, rows, window;
#   float scale;
#   std::vector<Query> q;            // (rows, C)
#   Buffer scores, out, top, total;  // (rows, KEYS), (rows, C) and (rows,)
#   std::vector<int32_t> position;   // of each row
#   int32_t seen[KEYS];              // positions of the keys at hand
#   alignas(64) Key keys[WIDEST * ROWS];  // sixteen of them, as columns
#   alignas(64) float values[KEYS * WIDEST];
#
#   void resize(int64_t size, int64_t count, int64_t visible) {
#     C = size, rows = count, window = visible;
#     q.resize(rows * C);
#     out.assign(rows * C, 0);
#     top.resize(rows);
#     total.assign(rows, 1);  // the sink, before any key
#     position.resize(rows);
#   }
#
#   void score(const Number* k, int64_t stride, int64_t some, int64_t s);
#   void chunk(const Number* k, const Number* v, int64_t stride,
#              int64_t count);
#   void weigh(int64_t r);
# };
#
# // scores of row r -> weights, with the running maximum and sum of chapter 5
# void Attention::weigh(int64_t r) {
#   const float none = -std::numeric_limits<float>::infinity();
#   const int32_t last = position[r];
#   const int32_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
#   Floats high = Floats{} + top[r], weights = {};
#   for (int64_t s = 0; s < KEYS; s += 8) {
#     const Ints p = load<Ints>(seen + s);
#     Floats value = scale * load<Floats>(&scores[r * KEYS + s]);
#     value = (p >= first) & (p <= last) ? value : Floats{} + none;
#     high = value > high ? value : high;
#     store(&scores[r * KEYS + s], value);
#   }
#   float higher = top[r];
#   for (int i = 0; i < 8; ++i) higher = std::max(higher, high[i]);
#   for (int64_t s = 0; s < KEYS; s += 8) {
#     const Floats value = load<Floats>(&scores[r * KEYS + s]);
#     const Floats e = value == none ? Floats{} : exponential(value - higher);
#     store(&scores[r * KEYS + s], e);
#     weights += e;
#   }
#   const float shrink = std::exp(top[r] - higher);
#   total[r] = total[r] * shrink + sum(weights);
#   top[r] = higher;
#   for (int64_t c = 0; c < C && shrink != 1; ++c) out[r * C + c] *= shrink;
# }
# ```

# %% [markdown]
# Scores and outputs are the product of the dense tiles above. Keys have to be
# transposed for it; values already lie as it wants them.

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# // scores of `some` keys, at most sixteen, from column s on
# void Attention::score(const Number* k, int64_t stride, int64_t some,
#                       int64_t s) {
# #ifdef GPTOSS_BF16
#   pair_tile(k, stride, some, C, keys);
#   multiply_pairs(keys, C / 2, q.data(), rows, {&scores[s], KEYS});
# #else
#   widen_tile(k, stride, some, C, keys);
#   multiply(keys, ROWS, C, {q.data(), C}, rows, {&scores[s], KEYS});
# #endif
# }
#
# void Attention::chunk(const Number* k, const Number* v, int64_t stride,
#                       int64_t count) {
#   const int64_t C = this->C;  // a local: no store below can change it
#   for (int64_t s = 0; s < count; ++s)
#     for (int64_t c = 0; c < C; c += 8)
#       store(values + s * C + c, widen(v + s * stride + c));
#   scores.assign(rows * KEYS, 0);
#   for (int64_t s = 0; s < count; s += ROWS)
#     score(k + s * stride, stride, std::min(ROWS, count - s), s);
#   for (int64_t r = 0; r < rows; ++r) weigh(r);
#   for (int64_t c = 0; c < C; c += ROWS)
#     multiply(values + c, C, count, {scores.data(), KEYS}, rows,
#              {&out[c], C});
# }
# ```

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# constexpr int64_t RANGE = 512;  // keys of one piece of work in decode
#
# struct Partial {  // what each range of keys gives for each row (B, T, H)
#   Buffer out, top, total;
# };
#
# struct Heads {  // the operator's arguments, read from inside the threads
#   Tensor q, k, v, sinks, q_pos, k_pos;
#   int64_t window;
#   float scale;
#
#   // keys s0 ... s1 - 1 for tokens t0 ... t1 - 1 of batch row b, key head g;
#   // row 0 of the batch begins at `base` in `to`
#   void run(Attention& a, int64_t b, int64_t g, int64_t t0, int64_t t1,
#            int64_t s0, int64_t s1, int64_t base, Partial& to) const {
#     const int64_t T = q.size(1), H = q.size(2), J = H / k.size(2);
#     const int64_t* position = q_pos.const_data_ptr<int64_t>() + b * T;
#     a.resize(q.size(3), (t1 - t0) * J, window);
#     a.scale = scale;
#     auto place = [&](int64_t r) {  // of row r among (B, T, H)
#       return (b * T + t0 + r / J) * H + g * J + r % J;
#     };
#     for (int64_t r = 0; r < a.rows; ++r) {
#       const Number* from = numbers(q) + place(r) * a.C;
#       std::copy_n(from, a.C, &a.q[r * a.C]);
#       a.position[r] = int32_t(position[t0 + r / J]);
#       const float none = std::numeric_limits<float>::lowest();
#       const float sink = numbers(sinks)[g * J + r % J];
#       a.top[r] = s0 ? none : std::max(sink, none);
#       a.total[r] = s0 ? 0 : 1;  // the sink counts once, before any key
#     }
#     attend(a, b, g, s0, s1);
#     for (int64_t r = 0; r < a.rows; ++r) {
#       const int64_t at = base + place(r);
#       std::copy_n(&a.out[r * a.C], a.C, &to.out[at * a.C]);
#       to.top[at] = a.top[r], to.total[at] = a.total[r];
#     }
#   }
#
#   void attend(Attention& a, int64_t b, int64_t g, int64_t s0,
#               int64_t s1) const;
# };
# ```

# %% [markdown]
# Keys may lie in any order, as a ring leaves them: visibility is decided by
# positions alone. A chunk that no row may see is skipped, so prefill does half
# the work in full layers and a window's worth in sliding ones.

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# // keys s0 ... s1 - 1, a chunk at a time; those that no row sees are left out
# void Heads::attend(Attention& a, int64_t b, int64_t g, int64_t s0,
#                    int64_t s1) const {
#   const int64_t row = k.stride(1);
#   const int64_t* position = k_pos.const_data_ptr<int64_t>()
#                             + b * k.size(1);
#   const auto [low, high] =
#       std::minmax_element(a.position.begin(), a.position.end());
#   const int64_t oldest = window ? int64_t(*low) - window : -1;
#   for (; s0 < s1; s0 += KEYS) {
#     const int64_t count = std::min(KEYS, s1 - s0);
#     bool any = false;
#     for (int64_t s = 0; s < KEYS; ++s) {
#       const int64_t p = s < count ? position[s0 + s] : -1;
#       a.seen[s] = p < 0 ? -1 : int32_t(p);
#       any |= p >= 0 && p > oldest && p <= *high;
#     }
#     const int64_t at = b * k.stride(0) + s0 * row + g * k.stride(2);
#     const Number *key = numbers(k) + at, *value = numbers(v) + at;
#     if (any) a.chunk(key, value, row, count);
#   }
# }
#
# // (ranges, rows) partial results -> y (rows, C)
# void merge(const Partial& from, int64_t ranges, int64_t rows, int64_t C,
#            Number* y) {
#   at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
#     for (int64_t r = begin; r < end; ++r) {
#       float top = from.top[r], total = 0;
#       for (int64_t i = 1; i < ranges; ++i)
#         top = std::max(top, from.top[i * rows + r]);
#       float out[WIDEST] = {};
#       for (int64_t at = r; at < ranges * rows; at += rows) {
#         const float weight = std::exp(from.top[at] - top);
#         total += weight * from.total[at];
#         for (int64_t c = 0; c < C; ++c)
#           out[c] += weight * from.out[at * C + c];
#       }
#       for (int64_t c = 0; c < C; ++c) y[r * C + c] = out[c] / total;
#     }
#   });
# }
# ```

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# Tensor run_attention(const Heads& heads) {
#   const Tensor& q = heads.q;
#   const int64_t T = q.size(1), H = q.size(2), C = q.size(3);
#   const int64_t S = heads.k.size(1), G = heads.k.size(2);
#   const int64_t some = std::max<int64_t>(1, KEYS * G / H);
#   const int64_t tiles = (T + some - 1) / some, rows = q.size(0) * T * H;
#   const int64_t width = tiles > 1 ? std::max<int64_t>(S, 1) : RANGE;
#   const int64_t ranges = std::max<int64_t>(1, (S + width - 1) / width);
#   Partial partial{Buffer(ranges * rows * C), Buffer(ranges * rows),
#                   Buffer(ranges * rows)};
#   const int64_t pieces = q.size(0) * G * tiles;
#   share(ranges * pieces, 1, [&](int64_t item) {
#     thread_local Attention a;
#     const int64_t range = item / pieces, piece = item % pieces;
#     const int64_t t0 = (tiles - 1 - piece % tiles) * some;  // longest first
#     heads.run(a, piece / tiles / G, piece / tiles % G, t0,
#               std::min(t0 + some, T), range * width,
#               std::min((range + 1) * width, S), range * rows, partial);
#   });
#   Tensor y = at::empty(q.sizes(), q.options());
#   merge(partial, ranges, rows, C, static_cast<Number*>(y.data_ptr()));
#   return y;
# }
# ```

# %% [markdown]
# ### Three small ones
#
# RMSNorm, RoPE and the choice of experts are little work, but in plain torch
# they are nine, seven and six operations; for one token the calls cost more
# than the arithmetic. Probably they cost more than in a loop of their own,
# since between two of them a matrix passes through the caches.

# %% [markdown] tags=["export:kernels/small.h"]
# ```cpp
# namespace {
#
# Buffer norm_rows(const Buffer& x, const Buffer& weight, double eps) {
#   const int64_t n = weight.size();
#   Buffer y(x.size());
#   at::parallel_for(0, x.size() / n, 16, [&](int64_t begin, int64_t end) {
#     for (int64_t at = begin * n; at < end * n; at += n) {
#       double squares = 0;
#       for (int64_t i = 0; i < n; ++i) squares += x[at + i] * x[at + i];
#       const float scale = 1 / std::sqrt(squares / n + eps);
#       for (int64_t i = 0; i < n; ++i)
#         y[at + i] = weight[i] * (x[at + i] * scale);
#     }
#   });
#   return y;
# }
#
# // x (..., H, C) turned by tables (..., C/2), half-split as in chapter 4
# Buffer rope_rows(const Buffer& x, const Buffer& cos, const Buffer& sin,
#                  int64_t H, int64_t half) {
#   Buffer y(x.size());
#   const int64_t rows = x.size() / (2 * half);
#   at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
#     for (int64_t row = begin; row < end; ++row) {
#       const float *from = &x[row * 2 * half], *c = &cos[row / H * half];
#       const float* s = &sin[row / H * half];
#       float* to = &y[row * 2 * half];
#       for (int64_t i = 0; i < half; ++i) {
#         to[i] = from[i] * c[i] - from[half + i] * s[i];
#         to[half + i] = from[half + i] * c[i] + from[i] * s[i];
#       }
#     }
#   });
#   return y;
# }
# ```

# %% [markdown]
# The choice, with chapter 7's rule for equal logits, and torch's for NaN,
# which it sorts before everything:

# %% [markdown] tags=["export:kernels/small.h"]
# ```cpp
# // ids (k,) of the largest logits, and the softmax over these as weights
# void choose(const float* logits, int64_t E, int64_t k, int64_t* ids,
#             float* weights) {
#   std::vector<int64_t> order(E);
#   for (int64_t e = 0; e < E; ++e) order[e] = e;
#   auto before = [logits](int64_t a, int64_t b) {
#     const bool x = std::isnan(logits[a]), y = std::isnan(logits[b]);
#     if (x || y || logits[a] == logits[b]) return x == y ? a < b : x;
#     return logits[a] > logits[b];
#   };
#   std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
#   float total = 0;
#   for (int64_t i = 0; i < k; ++i) {
#     ids[i] = order[i];
#     total += weights[i] = std::exp(logits[order[i]] - logits[order[0]]);
#   }
#   for (int64_t i = 0; i < k; ++i) weights[i] /= total;
# }
# ```

# %% [markdown]
# ### The operators
#
# A kernel serves bf16 on the CPU, the type of the released weights. Anything
# else goes to the same operator in plain torch, which the Python side declares
# as `gptoss::plain_…`: whoever asks for float32 gets float32. The switch that
# turns the kernels off is a thread's own. All this is needed by every operator
# and so stands in the first part, `base.h`; each operator is registered at the
# end of the part that computes it.

# %% [markdown] tags=["export:kernels/base.h"]
# ```cpp
# thread_local bool enabled = true;
#
# bool ours(std::initializer_list<Tensor> numbers) {  // bf16, on by default
#   bool all = enabled;
#   for (const Tensor& x : numbers) all &= x.scalar_type() == at::kBFloat16;
#   return all;
# }
#
# bool packed(std::initializer_list<Tensor> bytes) {
#   bool all = true;
#   for (const Tensor& x : bytes)
#     all &= x.scalar_type() == at::kByte && x.is_contiguous();
#   return all;
# }
#
# bool whole(std::initializer_list<Tensor> ids) {
#   bool all = true;
#   for (const Tensor& x : ids) all &= x.scalar_type() == at::kLong;
#   return all;
# }
#
# // the same operator in plain torch: gptoss::plain_NAME
# template <class Signature, class... Arguments>
# auto plain(const char* name, const Arguments&... arguments) {
#   return c10::Dispatcher::singleton()
#       .findSchemaOrThrow((std::string("gptoss::plain_") + name).c_str(), "")
#       .typed<Signature>()
#       .call(arguments...);
# }
#
# Tensor result(const Tensor& x, int64_t width, const Buffer& values) {
#   auto shape = x.sizes().vec();
#   shape.back() = width;
#   Tensor y = at::empty(shape, x.options());
#   TORCH_INTERNAL_ASSERT(y.numel() == int64_t(values.size()));
#   convert(values.data(), values.size(), static_cast<Number*>(y.data_ptr()));
#   return y;
# }
#
# void add_bias(Buffer& y, const std::optional<Tensor>& bias) {
#   if (!bias) return;
#   const Buffer b = floats(*bias);
#   const int64_t m = b.size();
#   at::parallel_for(0, y.size() / m, 16, [&](int64_t begin, int64_t end) {
#     for (int64_t row = begin; row < end; ++row)
#       for (int64_t i = 0; i < m; ++i) y[row * m + i] += b[i];
#   });
# }
# ```

# %% [markdown]
# A kernel reads memory by the sizes that it was told, so it looks at all of
# them first; that takes no time that could be measured. What cannot be right
# in any form is refused by name. Everything else that the kernel is not made
# for (a size of zero, a bias that torch would stretch) is left to plain
# torch, which computes it or refuses it: either way both paths do the same,
# and a test throws wrong shapes at both.

# %% [markdown] tags=["export:kernels/base.h"]
# ```cpp
# bool has(const Tensor& x, std::initializer_list<int64_t> sizes) {
#   return x.sizes() == at::IntArrayRef(sizes);
# }
#
# // x (..., n) beside a weight (m, n), a bias (m,) or one to be stretched
# void check_linear(const char* name, const Tensor& x, int64_t m, int64_t n,
#                   const std::optional<Tensor>& bias) {
#   TORCH_CHECK(x.dim() && x.size(-1) == n, name, ": x: expected (..., ", n,
#               ") beside a weight (", m, ", ", n, "), found ", x.sizes());
#   TORCH_CHECK(!bias || bias->dim() != 1 || m < 2 || bias->size(0) == m
#                   || bias->size(0) == 1,
#               name, ": bias: expected (", m, "), found ", bias->sizes());
# }
# ```

# %% [markdown] tags=["export:kernels/experts.h"]
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

# %% [markdown] tags=["export:kernels/dense.h"]
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

# %% [markdown] tags=["export:kernels/compact.h"]
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
#     if (x.numel() && x.numel() <= FEW * n && m && !(bias && !has(*bias, {m}))
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

# %% [markdown] tags=["export:kernels/experts.h"]
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

# %% [markdown] tags=["export:kernels/attention.h"]
# ```cpp
# Tensor sink_attention(const Tensor& q, const Tensor& k, const Tensor& v,
#                       const Tensor& sinks, const Tensor& q_pos,
#                       const Tensor& k_pos, int64_t window, double scale) {
#   TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4
#                   && k.size(3) == q.size(3) && window >= 0,
#               "sink_attention: expected q (B, T, H, C), k and v "
#               "(B, S, G, C), window >= 0, found q ", q.sizes(), ", k ",
#               k.sizes(), ", v ", v.sizes(), ", window ", window);
#   const int64_t B = q.size(0), T = q.size(1), H = q.size(2), C = q.size(3);
#   const int64_t S = k.size(1), G = k.size(2);
#   auto fits = [](const Tensor& pos, int64_t rows, int64_t columns) {
#     return pos.dim() == 2 && (pos.size(0) == rows || pos.size(0) == 1)
#         && pos.size(1) == columns;
#   };
#   if (!ours({q, k, v, sinks}) || !whole({q_pos, k_pos}) || !q.numel() || !G
#       || C % ROWS || C > WIDEST || H % G || k.size(0) != B
#       || k.sizes() != v.sizes() || !has(sinks, {H}) || !fits(q_pos, B, T)
#       || !fits(k_pos, B, S) || k.stride(3) != 1
#       || k.strides() != v.strides())
#     return plain<decltype(sink_attention)>("sink_attention", q, k, v, sinks,
#                                            q_pos, k_pos, window, scale);
#   return run_attention({q.contiguous(), k, v, sinks.contiguous(),
#                         q_pos.expand({B, -1}).contiguous(),
#                         k_pos.expand({B, -1}).contiguous(), window,
#                         float(scale)});
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("sink_attention", sink_attention);
# }
#
# }  // namespace
# ```

# %% [markdown] tags=["export:kernels/small.h"]
# ```cpp
# Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
#   if (!ours({x, weight}) || !x.dim() || weight.dim() != 1)
#     return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
#   const int64_t n = weight.size(0);
#   TORCH_CHECK(x.size(-1) == n || x.size(-1) == 1 || n == 1, "rms_norm: "
#               "weight: expected (", x.size(-1), ") beside x ", x.sizes(),
#               ", found ", weight.sizes());
#   if (x.size(-1) != n || !x.numel())
#     return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
#   return result(x, n, norm_rows(floats(x), floats(weight), eps));
# }
#
# Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
#   if (!ours({x, cos, sin}) || x.dim() != 4 || cos.dim() != 3)
#     return plain<decltype(rope)>("rope", x, cos, sin);
#   const int64_t B = x.size(0), T = x.size(1), half = x.size(3) / 2;
#   auto stretched = [](int64_t size, int64_t to) {
#     return size == to || size == 1;
#   };
#   TORCH_CHECK(half < 2 || x.size(3) % 2 || stretched(cos.size(2), half),
#               "rope: cos: expected (B, T, ", half, ") beside x ", x.sizes(),
#               ", found ", cos.sizes());
#   if (!x.numel() || 2 * cos.size(2) != x.size(3)
#       || cos.sizes() != sin.sizes() || !stretched(cos.size(0), B)
#       || !stretched(cos.size(1), T))
#     return plain<decltype(rope)>("rope", x, cos, sin);
#   const std::vector<int64_t> shape = {B, T, half};
#   return result(x, x.size(-1),
#                 rope_rows(floats(x), floats(cos.expand(shape)),
#                           floats(sin.expand(shape)), x.size(2), half));
# }
#
# std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k) {
#   if (!ours({logits}) || logits.dim() != 2 || k < 1 || k > logits.size(1))
#     return plain<decltype(route)>("route", logits, k);
#   const Buffer from = floats(logits);
#   const int64_t N = logits.size(0), E = logits.size(1);
#   Tensor ids = at::empty({N, k}, logits.options().dtype(at::kLong));
#   int64_t* id = ids.data_ptr<int64_t>();
#   Buffer weights(N * k);
#   at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
#     for (int64_t n = begin; n < end; ++n)
#       choose(&from[n * E], E, k, id + n * k, &weights[n * k]);
#   });
#   return {result(logits, k, weights), ids};
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("rms_norm", rms_norm);
#   m.impl("rope", rope);
#   m.impl("route", route);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ### Called again
#
# One token of the 20b is some 700 calls of operators, and every one comes out
# of Python: a module's `forward`, its attributes, arguments taken from Python
# objects. That costs about ten microseconds a call, as long as a small
# operator takes to compute. A CUDA device has a remedy, a graph of what is
# launched; a CPU has none, but the idea works: **the calls of one step are
# those of the next**, if every tensor has the same shape (a step for which
# that is so comes below, where the GPU needs it too). So they are written down
# once, while they happen, and made again without Python.
#
# torch lets a callback look at every operator that is called, at its
# arguments and its results; its profiler is made of that. Of an argument we
# need to know where it came from. A result of a recorded call gets a *place*;
# a tensor that no recorded call made (a weight, the cache, the step's own
# tensors) stays the tensor it is. Operators that an operator calls are not
# ours to call, so only the outermost count.
#
# Everything else is constant, and must be. A number read out of a tensor
# (`x.item()`) would be frozen in every later step, so a call that makes of a
# tensor something else is refused, as is a list of tensors, whose places are
# not followed.

# %% [markdown] tags=["export:kernels/recording.h"]
# ```cpp
# namespace {
#
# struct Use {
#   size_t argument, place;
#   bool last;
# };
#
# struct Call {
#   c10::OperatorHandle op;
#   std::vector<c10::IValue> arguments;
#   std::vector<Use> made;         // arguments that earlier calls make
#   std::vector<int64_t> results;  // their places; -1: a tensor known before
# };
#
# // calls of operators, noted while they happen; replay() makes them again
# struct Recording : torch::CustomClassHolder {
#   std::vector<Call> calls;
#   std::vector<Tensor> places;
#   std::unordered_map<const void*, int64_t> known;  // tensor: place, or -1
#   std::string refused;  // which call cannot be made again, and why
#   at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
#   int depth = 0;  // of calls within calls
#
#   static thread_local Recording* current;
#
#   void begin() {
#     TORCH_CHECK(!current && calls.empty(), "recording: begun twice");
#     current = this;
#     handle = at::addThreadLocalCallback(
#         at::RecordFunctionCallback(entered, left)
#             .needsInputs(true).needsOutputs(true)
#             .scopes({at::RecordScope::FUNCTION}));
#   }
#
#   std::string end() {
#     TORCH_CHECK(current == this, "recording: ended, not begun");
#     at::removeCallback(handle);
#     current = nullptr;
#     known.clear();
#     std::vector<bool> later(places.size());
#     for (auto call = calls.rbegin(); call != calls.rend(); ++call)
#       for (auto use = call->made.rbegin(); use != call->made.rend(); ++use) {
#         use->last = !later[use->place];
#         later[use->place] = true;
#       }
#     places.assign(places.size(), Tensor());
#     return refused;
#   }
#
#   static std::unique_ptr<at::ObserverContext> entered(
#       const at::RecordFunction& function) {
#     if (current->depth++ == 0) current->add(function);
#     return nullptr;
#   }
#
#   static void left(const at::RecordFunction& function,
#                    at::ObserverContext*) {
#     if (--current->depth == 0) current->finish(function);
#   }
#
#   void refuse(const at::RecordFunction& function, const char* why) {
#     if (refused.empty()) refused = std::string(function.name()) + why;
#   }
#
#   void add(const at::RecordFunction& function) {
#     const auto name = function.operator_name();
#     if (!name) refuse(function, " is no operator");
#     if (!refused.empty()) return;  // nothing here will be called again
#     const auto inputs = function.inputs();
#     calls.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(
#                          name->name.c_str(), name->overload_name.c_str()),
#                      std::vector<c10::IValue>(inputs.begin(), inputs.end()),
#                      {}, {}});
#     Call& call = calls.back();
#     for (size_t i = 0; i < inputs.size(); ++i)
#       if (inputs[i].isTensor()) {
#         const int64_t place = known.emplace(
#             inputs[i].unsafeToTensorImpl(), -1).first->second;
#         if (place < 0) continue;
#         call.made.push_back({i, size_t(place), false});
#         call.arguments[i] = {};
#       } else if (inputs[i].isList()) {
#         for (const c10::IValue& one : inputs[i].toListRef())
#           if (one.isTensor()) refuse(function, " takes a list of tensors");
#       }
#   }
#
#   void finish(const at::RecordFunction& function) {
#     if (!refused.empty()) return;
#     const auto& from = calls.back().arguments;
#     const bool constant = calls.back().made.empty() && std::none_of(
#         from.begin(), from.end(), [](auto& x) { return x.isTensor(); });
#     for (const c10::IValue& result : function.outputs()) {
#       if (!result.isTensor() && constant) return calls.pop_back();
#       if (!result.isTensor()) return refuse(function, " gives no tensor");
#       const auto [at, fresh] = known.emplace(
#           result.unsafeToTensorImpl(), int64_t(places.size()));
#       calls.back().results.push_back(fresh ? at->second : -1);
#       if (fresh) places.push_back(result.toTensor());  // keeps its address
#     }
#   }
#
#   void replay() {
#     std::vector<c10::IValue> stack;
#     for (const Call& call : calls) {
#       stack.assign(call.arguments.begin(), call.arguments.end());
#       for (const Use& use : call.made)
#         if (use.last) stack[use.argument] = std::move(places[use.place]);
#         else stack[use.argument] = places[use.place];
#       call.op.callBoxed(stack);
#       for (size_t i = 0; i < call.results.size(); ++i)
#         if (call.results[i] >= 0)
#           places[call.results[i]] = std::move(stack[i]).toTensor();
#     }
#   }
# };
#
# thread_local Recording* Recording::current = nullptr;
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.class_<Recording>("Recording")
#       .def(torch::init<>())
#       .def("begin", &Recording::begin)
#       .def("end", &Recording::end)
#       .def("replay", &Recording::replay);
# }
#
# }  // namespace
# ```

# %% [markdown]
# A callback must not throw (torch would print the error and go on), so what is
# refused is told at the end. A place is emptied when it is used for the last
# time: intermediate results are as short-lived as they were.

# %% [markdown]
# Training goes on as before: where a gradient is asked for, chapter 2's
# operators never come to a kernel, or have a formula of their own. What is
# left is the name of what was compiled, and the switch.

# %% [markdown] tags=["export:kernels/base.h"]
# ```cpp
# #if defined(GPTOSS_AVX512)
# constexpr char NAME[] = "C++ with AVX-512 and VNNI";
# #elif defined(GPTOSS_VNNI)
# constexpr char NAME[] = "C++ with AVX2 and VNNI";
# #elif defined(GPTOSS_AVX2)
# constexpr char NAME[] = "C++ with AVX2";
# #elif defined(GPTOSS_NEON)
# constexpr char NAME[] = "C++ with NEON";
# #else
# constexpr char NAME[] = "portable C++";
# #endif
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.def("kernels_name() -> str", [] { return std::string(NAME); });
#   m.def("enable_kernels(bool on) -> bool", [](bool on) {
#     std::swap(on, enabled);
#     return on;  // as it was before, in this thread
#   });
#   m.def("kernels_on() -> bool", [] { return enabled; });
# }
#
# }  // namespace
# ```

# %% [markdown]
# ### Built on first use
#
# One call of the compiler makes the library. An empty file is compiled, and
# the parts are included before it: one program, so that what one part defines
# can be inlined in another. The first few of them make a library too, with the
# operators that they register; a process loads one library.
#
# The library's name carries a hash of all that it depends on: the parts'
# texts, options, PyTorch's version and the processor's abilities, for
# `-march=native` makes code for this processor only. It is written under a
# temporary name and renamed, so a process that is killed leaves nothing that
# looks whole. When several start at once, as the ranks of `torchrun` do, one
# compiles and the others wait for its file: the folder is locked, with a lock
# that the system drops when its holder ends, however it ends.
# (`torch.utils.cpp_extension.load` would need `ninja`, and its lock is a file
# that outlives a killed process.)
#
# What is loaded runs with all rights of the user, and its name can be guessed.
# So the folder must be the user's own, for nobody else to write, or it is not
# used; a relative `$XDG_CACHE_HOME`, which would be another folder in every
# directory, is ignored, as its specification asks. And a file may be cut short
# by a full disk or a power cut, and would then crash every later process. So
# the library's SHA-256 is kept beside it, both are on the disk before they get
# their names, and what does not agree is compiled again.

# %% tags=["export:kernels/build"]
import logging
import os
import shlex
from pathlib import Path

import torch

import gptoss
from gptoss.weights.errors import Error

_log = logging.getLogger("gptoss")
SOURCE = Path(gptoss.__file__).parent / "kernels"  # where the parts are
PARTS = ("base", "small", "digits", "wide", "packed", "tiles", "experts",
         "wide16", "dense", "attention", "compact", "recording")
OPTIONS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast",
           "-DNDEBUG",  # as torch is compiled, or its structs differ
           "-fopenmp", "-fPIC", "-shared", "-w")


VARIANTS = {"auto": (), "avx2": ("-DGPTOSS_NARROW",),
            "portable": ("-DGPTOSS_PORTABLE",)}


class KernelError(Error, RuntimeError):
    """The kernels cannot be compiled or loaded here."""


def _compiler() -> list[str]:
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise KernelError(f"$CXX: {error}") from error


def compile_command(target: Path, variant: str = "auto",
                    parts: tuple[str, ...] = PARTS) -> list[str]:
    """The compiler's command line that makes `target` from the parts.

    The compiler is $CXX or c++. variant: one of VARIANTS; "avx2" leaves out
    AVX-512 and VNNI, "portable" every instruction named in the source.
    parts: PARTS or the first few of them.
    """
    home = Path(torch.__file__).parent
    included = [word for part in parts
                for word in ("-include", str(SOURCE / f"{part}.h"))]
    return [*_compiler(), *OPTIONS,
            *VARIANTS[variant],
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{home / 'include'}",
            f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
            *included, "-x", "c++", os.devnull,
            "-o", str(target), f"-L{home / 'lib'}",
            "-ltorch_cpu", "-lc10"]

# %% tags=["export:kernels/build"]
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows: two processes may both compile
    fcntl = None


def library_path(variant: str = "auto",
                 parts: tuple[str, ...] = PARTS) -> Path:
    """Where the compiled parts lie: $XDG_CACHE_HOME or ~/.cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    able = [line for line in lines if line.startswith(("flags", "Features"))]
    texts = [(part, (SOURCE / f"{part}.h").read_text("utf-8"))
             for part in parts]
    known = (texts, OPTIONS, VARIANTS[variant], torch.__version__,
             platform.machine(), able[:1], os.environ.get("CXX"))
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"
    return cache / "gptoss" / f"kernels-{name}.so"


def _own(path: Path) -> bool:
    """Is it the user's, and may nobody else write to it?"""
    if not hasattr(os, "geteuid"):  # Windows
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _seal(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sound(path: Path) -> bool:
    """Is the library there, the user's own, and as the compiler left it?"""
    try:
        return (_own(path.parent) and _own(path)
                and path.with_suffix(".sha256").read_text() == _seal(path))
    except (OSError, ValueError):
        return False

# %% tags=["export:kernels/build"]
@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """One process at a time; others wait. A dead process holds nothing.

    Gives whether it is so: not on a network drive that knows no locks."""
    held, locked = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX)
                locked = True
        yield locked
    finally:
        os.close(held)


def _complaint(told: str) -> str:
    """The line in which a compiler says what went wrong, made printable."""
    lines = told.splitlines() or ["no message"]
    bad = [line for line in lines if re.search(
        "error|no space|failed|cannot|not found", line, re.IGNORECASE)]
    causes = [line for line in bad if "ld returned" not in line]
    line = (causes or bad or lines)[0]
    return "".join(c if c.isprintable() else c.encode("unicode_escape")
                   .decode() for c in line)

# %% tags=["export:kernels/build"]
def _compile(path: Path, variant: str, parts: tuple[str, ...]) -> None:
    _log.warning("gptoss: compiling the kernels, once; it takes about half "
                 "a minute")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, seal = Path(folder) / path.name, Path(folder) / "seal"
        done = subprocess.run(compile_command(made, variant, parts),
                              text=True, errors="backslashreplace",
                              capture_output=True)
        if done.returncode:
            raise KernelError("the compiler failed: "
                              + _complaint(done.stderr))
        if not made.is_file():
            raise KernelError(f"{shlex.join(_compiler())} made no library")
        made.chmod(0o700)
        seal.write_text(_seal(made))
        for file in (seal, made):
            _to_disk(file)
        os.replace(seal, path.with_suffix(".sha256"))
        os.replace(made, path)
    with suppress(OSError):  # some file systems do not sync a folder
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Have the system write what it holds of a file or folder."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def _sweep(folder: Path, age: float) -> None:
    """Remove what killed compilers left, if older than `age` seconds."""
    for left in folder.glob("tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > age:
                shutil.rmtree(left, ignore_errors=True)

# %% tags=["export:kernels/build"]
def build(variant: str = "auto", anew: bool = False,
          parts: tuple[str, ...] = PARTS) -> Path:
    """The compiled kernels; compiles them if they are not there yet.

    anew: even if they are. parts: PARTS or the first few of them, for a
    process that needs no more. Compiling is told in one line on the logger
    "gptoss". KernelError, with the compiler's own complaint, if it fails, or
    if the folder is not the user's own.
    """
    path = library_path(variant, parts)
    if not anew and _sound(path):
        return path
    if shutil.which(_compiler()[0]) is None:
        raise KernelError(f"no compiler {_compiler()[0]!r} ($CXX names one)")
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(folder):
            raise KernelError(f"{folder}: expected a folder of yours to which "
                              "nobody else may write, found owner "
                              f"{folder.stat().st_uid}, mode "
                              f"{folder.stat().st_mode & 0o777:o}")
        with _alone_in(folder) as locked:
            _sweep(folder, 0 if locked else 3600)
            if anew or not _sound(path):  # else another process was first
                _compile(path, variant, parts)
    except OSError as error:
        raise KernelError(f"cannot compile: {error}") from error
    return path

# %% [markdown]
# What the hash is for: another option, another file.

# %%
assert len(set(map(library_path, VARIANTS))) == 3
print(library_path().name.startswith("kernels-"), library_path().suffix)

# %% [markdown]
# ### Who gets the twelve bits
#
# A copy costs time (1.4 s for the 20b on two cores) and three quarters of the
# matrices' memory. That pays after some hundred tokens, on a machine that has
# the memory and is limited by it. So one asks for it: `make_compact(model)`,
# or `--compact` on the command line. The weights themselves stay where they
# are, mapped from the file: prompts, gradients and other devices use those,
# and as a copy is read only where the weight would give the same numbers,
# nothing else changes.

# %% tags=["export:kernels/compact"]
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
    """How many bytes fewer a token reads, `make_compact` or not (0)."""
    return sum(layer.saved for layer in model.modules()
               if isinstance(layer, CompactLinear))

# %% tags=["export:kernels/compact"]
def _fits(weight: Tensor) -> bool:
    return (weight.dtype == torch.bfloat16 and weight.ndim == 2
            and weight.shape[1] % 64 == 0 and weight.shape[1] <= 2 ** 16)


def _can_be(layer: nn.Module) -> bool:
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

# %% [markdown]
# Without a kernel that reads them the copies would only take memory.

# %% tags=["export:kernels/compact"]
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
one = torch.randn(1, 2880).bfloat16()
with torch.inference_mode():
    assert off(double(one), one.double() @ layer.weight.double().T) < 3e-3
assert torch.equal(unpack(pack(layer.weight)), layer.weight)
print(f"{double.saved / layer.weight.nbytes:.1%} of its bytes saved")

# %% [markdown]
# ### Which path is in use
#
# Loading the library registers the kernels. When? Chapter 10's table of what
# answers names `load_kernels`, so whoever makes a model or computes first
# loads them, by whatever import he came, and every thread that comes meanwhile
# waits.
# `GPTOSS_KERNELS=torch` in the environment declines; the book's chapters are
# run so, or the earlier ones would show something else than they say.

# %% tags=["export:kernels/build"]
from collections.abc import Callable

from gptoss.model.answers import LOADING
from gptoss.model.ops import has_kernel

_path = ""  # in words, once the kernels are loaded; changed behind LOADING


def _load_library(choice: str) -> None:
    """Load the compiled kernels; what does not load is compiled anew."""
    for anew in (False, True):
        path = build(choice, anew)
        try:
            torch.ops.load_library(str(path))
            torch.ops.gptoss.kernels_name()  # else it is another library
            return
        except (OSError, AttributeError, RuntimeError) as error:
            failed = error.__cause__ or error
    raise KernelError(f"{path}: {failed}")


def _load(choice: str) -> str:
    if choice == "torch":
        return "torch (GPTOSS_KERNELS=torch)"
    try:
        if choice not in VARIANTS:
            raise KernelError(f"GPTOSS_KERNELS: expected {', '.join(VARIANTS)}"
                              f" or torch, found {choice!r}")
        _load_library(choice)
    except (RuntimeError, OSError) as error:
        _log.warning(
            "gptoss: no kernels, plain torch is used (many times slower; "
            "GPTOSS_KERNELS=torch silences this): %s", error)
        return f"torch ({error})"
    return torch.ops.gptoss.kernels_name()

# %% tags=["export:kernels/build"]
def load_kernels() -> str:
    """Register the kernels, compiled if need be; which path is in use.

    $GPTOSS_KERNELS chooses: auto (default) or another of VARIANTS, or torch.
    What fails is told in one line on the logger "gptoss", and plain torch
    goes on computing. Later calls do nothing, one meanwhile waits.
    """
    global _path
    with LOADING:
        _path = _path or _load(os.environ.get("GPTOSS_KERNELS", "auto"))
    return _path


def kernel_path() -> str:
    """Which path the operators take on the CPU, in words; never compiles."""
    choice = os.environ.get("GPTOSS_KERNELS", "auto")
    if not _path and choice in VARIANTS:
        path = library_path(choice)
        if (not _sound(path) and shutil.which(_compiler()[0])
                and (not path.parent.exists() or _own(path.parent))):
            return "C++, to be compiled when first used"
    return load_kernels()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, this thread computes with plain torch, kernels or not."""
    load_kernels()
    if not has_kernel():
        yield
        return
    before = torch.ops.gptoss.enable_kernels(False)
    try:
        yield
    finally:
        torch.ops.gptoss.enable_kernels(before)

# %%
if os.environ.get("GPTOSS_KERNELS") == "torch":
    os.environ["GPTOSS_KERNELS"] = "auto"  # from here on with kernels
path = load_kernels()
print("kernels or a reason:", path.startswith(("C++", "portable", "torch (")))

# %% [markdown]
# ### For a GPU: written, not yet run on one
#
# The same three ideas in Triton: decode in registers, sort tokens by expert,
# walk over keys with a running maximum. Tests hold them to float64 in
# Triton's interpreter, which computes on the CPU, and see that Triton compiles
# them for NVIDIA's architectures 8.0 and 9.0; **no GPU has run them yet**, so
# nothing calls them unless asked: `use_triton()` registers them for CUDA.
# Until somebody has measured them, a GPU takes the plain torch path.
#
# A nibble becomes a float by its bits: codes above 1 have an exponent, code 1
# is the only subnormal.

# %% tags=["export:kernels/triton_kernels"]
import torch
from torch import Tensor
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU software: everything else works without
    triton, tl = None, SimpleNamespace(constexpr=None)


def _jit(function):
    return triton.jit(function) if triton else function


@_jit
def decode_fp4(code, scale):
    """Nibbles and scale bytes (int32) -> fp32 values, by their bits."""
    size = code & 7
    bits = tl.where(size > 1, ((size >> 1) + 126 << 23) | (size & 1) << 22,
                    (size & 1) * 0x3F000000)
    value = (bits | (code & 8) << 28).to(tl.float32, bitcast=True)
    power = tl.maximum(scale << 23, 1 << 22).to(tl.float32, bitcast=True)
    return value * (power + 0.0 * power)

# %% [markdown]
# A program computes 32 rows for one tile of picks. The tile's weights are
# exact in bf16 (three bits and a power of two), so a tensor core may multiply
# them; numbers in fp32 are multiplied as such ("ieee"), not cut to tf32. Low
# and high nibbles meet even and odd activations in two products: nothing needs
# to be interleaved.

# %% tags=["export:kernels/triton_kernels"]
@_jit
def packed_rows(x, w, s, y, order, tile_expert, tile_begin, tile_end, rows,
                blocks, K: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, STEP: tl.constexpr):
    """y[pick] = rows of the pick's expert times x[pick // K], a tile."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    begin, end = tl.load(tile_begin + tile), tl.load(tile_end + tile)
    if begin == end:  # one of the tiles that are there for the worst case
        return
    place = begin + tl.arange(0, N)
    real = place < end
    pick = tl.load(order + place, real, 0)
    width = blocks * 16
    line = expert * rows + row
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < width)[None]
        code = tl.load(w + line[:, None] * width + column[None], inside,
                       0).to(tl.int32)
        scale = tl.load(s + line[:, None] * blocks + column[None] // 16,
                        inside, 0).to(tl.int32)
        at = (pick // K)[None] * width * 2 + column[:, None] * 2
        seen = real[None] & (column < width)[:, None]
        even = tl.load(x + at, seen, 0.0)
        odd = tl.load(x + at + 1, seen, 0.0)
        total = tl.dot(decode_fp4(code & 15, scale).to(even.dtype), even,
                       total, input_precision="ieee")
        total = tl.dot(decode_fp4(code >> 4, scale).to(odd.dtype), odd,
                       total, input_precision="ieee")
    tl.store(y + pick[None] * rows + row[:, None], total,
             (row < rows)[:, None] & real[None])

# %% [markdown]
# Every tile belongs to one expert. Which tiles there are depends on what the
# router chose; how many there can be does not, and only that may be known
# before the launch without asking the device and waiting. With $n$ picks in
# tiles of $M$, an expert with $c \ge 1$ of them has
# $\lceil c/M \rceil = 1 + \lfloor (c-1)/M \rfloor$ tiles. If $h$ experts are
# hit, that makes at most $h + \lfloor (n-h)/M \rfloor$, since the sum of
# floors is at most the floor of the sum. One more $h$ adds 1 and takes away
# at most 1, so the worst case is the largest $h$:
#
# $$ \text{tiles} \le m + \lfloor (n - m) / M \rfloor,
#    \qquad m = \min(E, n). $$ (kernels-tiles)
#
# It is reached, by $m - 1$ experts with one pick and one with the rest. A
# program whose tile is empty returns at once. In decoding with one row, $n$
# is 4, $m$ too, and no tile is empty.

# %% tags=["export:kernels/triton_kernels"]
def token_tiles(ids: Tensor, experts: int, size: int) -> tuple[Tensor, ...]:
    """Slots sorted by expert, cut into tiles of one expert each.

    ids (N, K) -> order (N K,), and for each of as many tiles as there can
    be its expert, and where its picks begin and the expert's end in order;
    int32. An empty tile begins where it ends. No shape depends on ids.
    """
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(experts).scatter_add_(
        0, flat, torch.ones_like(flat))
    tiles = (counts + size - 1) // size
    most = min(experts, len(flat))
    number = torch.arange(most + (len(flat) - most) // size,
                          device=ids.device)
    after = tiles.cumsum(0)  # the first tile that is not this expert's
    expert = torch.searchsorted(after, number, right=True)
    expert = expert.clamp(max=experts - 1)  # beyond the last: empty
    end = counts.cumsum(0)[expert]
    begin = (end - counts[expert]
             + (number - (after - tiles)[expert]) * size).minimum(end)
    return tuple(t.int() for t in (order, expert, begin, end))

# %%
order, *tiles = token_tiles(torch.tensor([[2, 0], [2, 1], [2, 0]]), 4, 2)
print(order.tolist(), *(tile.tolist() for tile in tiles), sep="\n")
assert tiles[0].tolist()[:4] == [0, 1, 2, 2]  # three picks chose expert 2
assert (tiles[1] == tiles[2]).tolist() == 4 * [False] + [True]

# %% tags=["export:kernels/triton_kernels"]
from gptoss.moe.experts import clamped_swiglu


def packed_linear_tiles(x: Tensor, ids: Tensor, blocks: Tensor,
                        scales: Tensor, shared: int = 1) -> Tensor:
    """(picks, rows) fp32: row pick // shared of x times the pick's expert.

    x (…, n); ids (picks,); blocks (E, rows, n/32, 16). Few picks make
    narrow tiles (decode), many wide ones (prefill).
    """
    E, rows, width = scales.shape
    wide = 64 if ids.numel() >= 16 * E else 16
    order, *tiles = token_tiles(ids, E, wide)
    y = torch.empty(ids.numel(), rows, dtype=torch.float32, device=x.device)
    packed_rows[(triton.cdiv(rows, 32), len(tiles[0]))](
        x, blocks, scales, y, order, *tiles, rows, width, K=shared, M=32,
        N=wide, STEP=64)
    return y


def experts_by_triton(x, ids, weights, gate_up_blocks, gate_up_scales,
                      gate_up_bias, down_blocks, down_scales, down_bias,
                      limit):
    """gptoss::packed_experts on a GPU; between the layers in x.dtype."""
    flat, K = ids.flatten(), ids.shape[1]
    up = packed_linear_tiles(x.contiguous(), flat, gate_up_blocks,
                             gate_up_scales, K)
    hidden = clamped_swiglu(up + gate_up_bias[flat].float(), limit)
    out = packed_linear_tiles(hidden.to(x.dtype), flat, down_blocks,
                              down_scales)
    out = (out + down_bias[flat].float()).view(*ids.shape, -1)
    return (out * weights.float()[..., None]).sum(1).to(x.dtype)

# %% [markdown]
# Attention: one key head and sixteen rows of its queries in a program. In
# decoding that is a row of the batch and a key head, 8 programs for one text,
# where a GPU has a hundred processors or more. So the keys are divided, too,
# among P programs {cite}`flashdecoding2023`: part p takes the tiles of keys p,
# p + P, p + 2P, … (in turns, so that the filled slots of a cache are shared
# evenly), and leaves the mean of its values and the log-sum-exp of its scores.
# A part then acts like a single key with that score and that value:
#
# $$ \frac{\sum_j e^{s_j} v_j}{e^{\text{sink}} + \sum_j e^{s_j}}
#    = \frac{\sum_p e^{\ell_p} o_p}{e^{\text{sink}} + \sum_p e^{\ell_p}},
#    \qquad \ell_p = \log \sum_{j \in p} e^{s_j},
#    \quad o_p = \sum_{j \in p} e^{s_j - \ell_p} v_j . $$ (kernels-parts)
#
# So chapter 5's softmax with a sink, over the parts, puts them together and
# counts the sink once. Of a key that no row sees neither k nor v is loaded,
# and of a tile of such keys nothing but their positions: 8 bytes a slot for
# each key head, where k and v have 256.

# %% tags=["export:kernels/triton_kernels"]
@_jit
def attend_tile(q, k, v, q_pos, k_pos, y, lse, T, S, H, G, window, scale,
                kb, ks, kg, C: tl.constexpr, J: tl.constexpr,
                N: tl.constexpr, KEYS: tl.constexpr):
    """N rows (tokens times J query heads of a key head), a part of keys."""
    g, b = tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * N + tl.arange(0, N)
    token, head = row // J, g * J + row % J
    real = token < T
    at = (b * T + token) * H + head
    query = tl.load(q + at[:, None] * C + tl.arange(0, C)[None],
                    real[:, None], 0.0)
    position = tl.load(q_pos + b * T + token, real, -1)
    top = tl.full((N,), -3.0e38, tl.float32)
    total = tl.zeros((N,), tl.float32)
    out = tl.zeros((N, C), tl.float32)
    for start in range(part * KEYS, S, parts * KEYS):
        key = start + tl.arange(0, KEYS)
        there = tl.load(k_pos + b * S + key, key < S, -1)
        seen = (there[None] >= 0) & (there[None] <= position[:, None])
        seen = seen & ((window == 0)
                       | (there[None] > position[:, None] - window))
        wanted = tl.max(seen.to(tl.int32), 0)
        if tl.max(wanted, 0) > 0:
            from_ = b * kb + key[:, None] * ks + g * kg
            from_ += tl.arange(0, C)[None]
            keys = tl.load(k + from_, wanted[:, None] > 0, 0.0)
            values = tl.load(v + from_, wanted[:, None] > 0, 0.0)
            scores = tl.dot(query, tl.trans(keys),
                            input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            out = tl.dot(weights.to(values.dtype), values,
                         out * shrink[:, None], input_precision="ieee")
            top = higher
    some = tl.where(total > 0, total, 1.0)
    at = at * parts + part
    tl.store(y + at[:, None] * C + tl.arange(0, C)[None],
             out / some[:, None], real[:, None])
    tl.store(lse + at, tl.where(total > 0, top + tl.log(some),
                                float("-inf")), real)

# %% tags=["export:kernels/triton_kernels"]
from gptoss.attention.sinks import softmax_with_sink

PROGRAMS = 256  # of attention that a GPU should have to do at a time


def attention_by_triton(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                        q_pos: Tensor, k_pos: Tensor, window: int,
                        scale: float) -> Tensor:
    """gptoss::sink_attention on a GPU; k and v with equal strides."""
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    tiles, keys = triton.cdiv(T * (H // G), 16), 32
    parts = min(triton.cdiv(S, keys),
                max(1, PROGRAMS // (tiles * B * G)))
    y = q.new_empty(B, T, H, parts, C, dtype=torch.float32)
    lse = q.new_empty(B, T, H, parts, dtype=torch.float32)
    attend_tile[(tiles, B * G, parts)](
        q.contiguous(), k, v, q_pos.expand(B, T).contiguous(),
        k_pos.expand(B, S).contiguous(), y, lse, T, S, H, G, window, scale,
        *k.stride()[:3], C=C, J=H // G, N=16, KEYS=keys)
    shares = softmax_with_sink(lse.transpose(1, 2), sinks).transpose(1, 2)
    return (shares[..., None] * y).sum(3).to(q.dtype)


def use_triton() -> None:
    """Register these kernels for CUDA: to generate with, not to train.

    RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("use_triton: expected the package triton")
    torch.library.impl("gptoss::packed_experts", "CUDA", experts_by_triton)
    torch.library.impl("gptoss::sink_attention", "CUDA", attention_by_triton)

# %% [markdown]
# ### A step of decode that can be recorded
#
# On a GPU a step of decode has another floor than memory. How many kernels
# does one token of the 20b launch? Every operator that computes is one at
# least; on the meta device they can be counted without computing any.

# %%
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.model.transformer import GptOss


class Launches(TorchDispatchMode):
    """Counts operators that compute something; a view does not."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


token_zero = torch.zeros(1, 1, dtype=torch.int64, device="meta")
with Launches() as launches:  # weights that learn: what torch is made of runs
    GptOss(big, device="meta").run(token_zero, token_zero)
print(f"{launches.count:,} with plain torch, the experts of a layer taken "
      "for one")
assert launches.count * 5e-6 > 9 * bytes_read_per_token(big) / 3e12

# %% [markdown]
# If the host needs 5 µs for each (an assumption, not measured here), launching
# takes 12 ms, and reading 3.7 GB at 3 TB/s would take 1.2. Fused kernels make
# fewer launches; a *CUDA graph* makes one of all: they are recorded once, with
# their arguments, and replayed by a single call. What is recorded is addresses
# and sizes, so it holds for the next token only if
#
# 1. every tensor has the same shape at every step,
# 2. it lies where it lay, and what changes is written into it,
# 3. nothing waits for the device to choose what comes next.
#
# `model(token, cache=cache)` breaks all three: what full layers see grows
# by a slot a token, the state is a new tensor each time, and its checks ask
# whether ids and positions are right. `Stack.run` (chapter 10) does none of
# this, it computes; what it needs is a cache that answers in one shape. A
# slot that holds nothing has position -1, and no query sees it. So the whole
# ring and the first 256, 512, 1024 ... slots of full layers, empty ones too,
# are as good an answer as the filled part.

# %% tags=["export:kernels/step"]
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gptoss.model.cache import Cache, CacheError, FullCache, Rows

from gptoss.model.layers import (
    MLP,
    Attention,
    Block,
    Embedding,
    Experts,
    Linear,
    RMSNorm,
    Router,
)
from gptoss.model.transformer import GptOss, ModelError, Stack, check_tokens
from gptoss.model.ops import has_kernel


@dataclass
class FixedView:
    """The plan of a forward of one token a row: a `CacheView`, S slots a
    layer."""

    seen: list[tuple[Tensor, Tensor]]  # of each layer: k, v (B, S, G, C)
    lines: list[tuple[Tensor, Tensor]]  # the same memory, (B * G * …, C)
    kinds: list[int]  # of each layer: 0 = sliding, 1 = full
    target: list[Tensor]  # of each kind: (B * G,) lines to write to
    positions: tuple[Tensor, Tensor]  # of each kind: (B, S), -1 = empty

    def update(self, layer: int, k: Tensor, v: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """`Plan.update` for k, v (B, 1, G, C) and no padding."""
        kind = self.kinds[layer]
        for to, new in zip(self.lines[layer], (k, v), strict=True):
            to.index_copy_(0, self.target[kind], new.flatten(0, 2))
        return *self.seen[layer], self.positions[kind]

# %% [markdown]
# The new token's keys go into the lines that its slots have in memory
# (`scatter_` along the slots would need no numbers of lines, but it copies a
# cache whose heads lie apart: 100 to 200 µs a call against 5).
#
# Recording follows torch's notes on CUDA graphs: some runs on another stream
# first, so that what happens once (compiling a kernel, a library's work space)
# is not recorded. Those runs write, so each is undone.

# %% tags=["export:kernels/step"]
Work = Callable[[], None]


def cuda_graph(run: Work, undo: Work) -> Work:
    """Record what run() launches; returns a function that launches it.

    For the current CUDA device. undo() takes back what a run() changed, so
    that nothing has changed on return. RuntimeError from torch if run()
    waits for the device. Source: torch's notes, "CUDA Graphs".
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            undo()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recorded, not run
        run()
    return graph.replay

# %% [markdown]
# On a CPU the first step is recorded while it runs, and nothing is undone. A
# call that cannot be made again is no catastrophe, only slow; it is told.

# %% tags=["export:kernels/step"]
_log = logging.getLogger("gptoss")


def call_again(run: Work, undo: Work | None = None) -> Work:
    """What does run() and notes its calls; from then on it makes these.

    For tensors on the CPU, and kernels loaded. If a call cannot be made
    again, run() goes on being done, and a warning says why.
    """
    work = None

    def launch() -> None:
        nonlocal work
        if work is not None:
            return work()
        recording = torch.classes.gptoss.Recording()
        recording.begin()
        try:
            run()
        finally:
            refused = recording.end()
        work = run if refused else recording.replay
        if refused:
            _log.warning("gptoss: a step of decode is not recorded: %s",
                         refused)
    return launch

# %% [markdown]
# What may be recorded? On CUDA, experts that do not ask the host which of
# them was chosen. On the CPU the kernels ask inside an operator; but a hook or
# a replaced `forward` is Python, and would run once and never again. So every
# module must run a forward of this package, as it was written. What the class
# is called or where it lies says nothing about that; a subclass that adds
# nothing to `forward` has the very same function.

# %% tags=["export:kernels/step"]
_FORWARDS = {kind.forward for kind in (
    Block, Attention, MLP, Router, Experts, RMSNorm, Linear, CompactLinear,
    Embedding, nn.ModuleList)}


def _addition(name: str, module: nn.Module) -> str | None:
    """What a call of the module does beyond a forward of this package."""
    kind = type(module)
    known = kind.forward in _FORWARDS or isinstance(module, GptOss) and (
        kind.forward is GptOss.forward and kind.run is Stack.run)
    if (not known or kind.__call__ is not nn.Module.__call__
            or vars(module).keys() & {"forward", "run"}):
        return f"{name or 'the model'} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name or 'the model'} has a forward hook"
    if module._compiled_call_impl is not None:
        return f"{name or 'the model'} is compiled"
    return None


def additions(model: nn.Module) -> str | None:
    """Why the C++ kernels' calls are not all that a forward does; or None."""
    if nn.modules.module._has_any_global_hook():
        return "there is a global module hook"
    return next(filter(None, (_addition(name, module) for name, module
                              in model.named_modules())), None)

# %% tags=["export:kernels/step"]
def can_record(model: GptOss) -> bool:
    """Does a step of this model make the same calls for every token?

    Yes for packed experts with kernels: `use_triton` on CUDA; the C++ ones
    on the CPU, if no module has hooks or a forward that is not this
    package's. Plain torch splits the tokens by expert with sizes that the
    host reads.
    """
    # every layer: those of another stage (chapter 15) have none
    if not all(getattr(m, "packed", True) for m in model.modules()):
        return False
    if model.embed_tokens.weight.device.type != "cpu":
        return has_kernel(device="CUDA")
    return has_kernel() and additions(model) is None

# %% [markdown]
# Cache and step must not disagree. They cannot if they hold the same tensors:
# the step puts its own, which it changes in place, into the cache as its
# `rows`. Whoever else uses the cache puts other `Rows` there (chapter 9); the
# step notices by their identity, without a look at what is in them, and
# copies. Only then does it wait for the device, to learn the lengths; after
# that the host counts along, and refuses a token that has no room before
# anything is written.
#
# A step that fails may have written the new token's keys into some rings,
# over those of the position that leaves the window. That slot is then marked
# empty: the token can be fed again, and a rollback knows what is missing.

# %% tags=["export:kernels/step"]
class DecodeStep:
    """One token a row: fixed shapes, fixed addresses, no waiting.

    DecodeStep(model, cache, capture=None): step(tokens), int64 (B, 1), gives
    the logits (B, 1, V) of model(tokens, cache=cache), in a tensor that the
    next step overwrites; step() feeds the greedy choice of the step before.
    Every row takes a token: feed a finished one anything. The cache stays
    usable by others. What `can_record` is recorded at the first step and
    whenever the tapes outgrow what is seen of them: as a CUDA graph
    (`use_triton` first), by `call_again` on the CPU, or by another
    capture(run, undo); weights must stay where they are. ids in CUDA
    tensors are not checked.
    CacheError: no room, a replay under way, a cache that does not fit.
    ModelError: tokens of another shape or type, or out of range.
    """

    def __init__(self, model: GptOss, cache: Cache,
                 capture: Callable[[Work, Work], Work] | None = None) -> None:
        weight, B = model.embed_tokens.weight, cache.batch_size
        like = Cache(model.config, B, cache.max_tokens, weight.dtype, "meta",
                     cache.slack)
        if self._kind(like) != self._kind(cache) or (
                cache.lengths.device != weight.device):
            raise CacheError("cache: expected one of model.new_cache(), found "
                             "other layers, shapes, dtype or device")
        if capture is None and can_record(model):
            capture = cuda_graph if weight.is_cuda else call_again
        if capture is None and weight.is_cuda:
            raise ModelError("model: expected packed experts and use_triton()"
                             ", for a CUDA graph of the step")
        self.model, self.cache, self._capture = model, cache, capture
        size, device = cache.rows.ring.shape[1], weight.device
        self._rows: Rows | None = None  # what the step left in the cache
        with torch.inference_mode(False):  # in any mode they can be changed
            self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.lengths = torch.zeros_like(self.tokens[:, 0])
            self.ring = self.tokens.repeat(1, size)
            self.heads = torch.arange(B * cache.layers[0].k.shape[2],
                                      device=device).view(B, -1)
            self.logits = torch.zeros(B, 1, model.config.vocab_size,
                                      dtype=weight.dtype, device=device)
        self._see(1)

    @staticmethod
    def _kind(cache: Cache) -> list[tuple]:
        return [(type(x), x.k.dtype, len(x.k), x.k.shape[2:],
                 isinstance(x, FullCache) or x.k.shape[1])
                for x in cache.layers]

    def _see(self, needed: int) -> None:
        """Have slots for `needed` tokens: 256, 512, 1024 … of full layers."""
        self.cache.reserve(needed)
        layers, ring = self.cache.layers, self.ring.shape[1]
        room = min([self.cache.limit[0], *(
            x.k.shape[1] for x in layers if isinstance(x, FullCache))])
        self._size = min(max(256, 1 << (needed - 1).bit_length()), room)
        self._memory = [x.k for x in layers]
        kinds = [int(isinstance(x, FullCache)) for x in layers]
        self._strides, shown = (ring, room), (ring, self._size)
        with torch.inference_mode(False):
            self.slots = torch.arange(self._size, device=self.ring.device)
            self._view = partial(
                FixedView,
                [(x.k[:, :shown[kind]], x.v[:, :shown[kind]])
                 for x, kind in zip(layers, kinds, strict=True)],
                [tuple(y.transpose(1, 2).view(-1, y.shape[-1])
                       for y in (x.k, x.v)) for x in layers], kinds)
        self._launch: Work | None = None  # other addresses: record again

    def _take_over(self) -> None:
        """Copy the cache's state, if another than the step has changed it."""
        rows = self.cache.rows
        if rows is self._rows:
            return
        lengths, held = rows.lengths.tolist(), rows.held.tolist()
        if lengths != held:
            raise CacheError(f"rows: expected none to replay, found lengths "
                             f"{lengths} after a rollback to {held}: feed "
                             "these tokens to the model first")
        self.lengths.copy_(rows.lengths)
        self.ring.copy_(rows.ring)
        self._rows = Rows(self.lengths, self.lengths, rows.start, self.ring)
        self.cache.rows = self._rows
        self._counts, self._chosen = lengths, False
        if any(x.k is not k for x, k in zip(self.cache.layers, self._memory,
                                            strict=True)):
            self._size = 0  # full layers moved: look at them anew

    def _check(self, tokens: Tensor | None) -> None:
        expected = self.tokens.shape
        if tokens is None:
            if not self._chosen:
                raise ModelError("tokens: expected some, for the cache was "
                                 "not left by this step, found None")
        elif tokens.shape != expected or tokens.dtype not in (torch.int64,
                                                              torch.int32):
            raise ModelError(f"tokens: expected int64 {tuple(expected)}, found"
                             f" {tokens.dtype} {tuple(tokens.shape)}")
        elif tokens.device.type == "cpu":  # elsewhere a look would wait
            check_tokens(tokens, None, self.model.config)
        needed = max(self._counts) + 1
        if needed > self._size:
            self._see(needed)

    def _record(self) -> Work:
        """What launches a step: `_run`, or a recording of it."""
        state = (self.tokens, self.lengths, self.ring)
        before = [x.clone() for x in state]

        def undo() -> None:
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
        return self._capture(self._run, undo) if self._capture else self._run

    @torch.inference_mode()
    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        self._take_over()
        self._check(tokens)
        if tokens is not None:
            self.tokens.copy_(tokens)
        try:
            self._launch = self._launch or self._record()
            self._launch()
        except BaseException:
            slot = self.lengths[:, None] % self.ring.shape[1]
            self.ring.scatter_(1, slot, -1)  # perhaps overwritten
            self._rows = None
            raise
        self._counts = [n + 1 for n in self._counts]
        self._chosen = True
        return self.logits

    def _run(self) -> None:
        """Arithmetic on the step's own tensors: what a graph records."""
        at = self.lengths[:, None]
        place = at % self.ring.shape[1]
        ring = self.ring.scatter(1, place, at)
        full = self.slots.where(self.slots <= at, -1)
        target = [(self.heads * stride + slot).flatten() for stride, slot
                  in zip(self._strides, (place, at), strict=True)]
        logits = self.model.run(
            self.tokens, at, self._view(target, (ring, full)), 1)
        self.logits.copy_(logits)
        self.tokens.copy_(logits.max(-1).indices)
        self.ring.copy_(ring)  # last, so that a failure leaves the state
        self.lengths.add_(1)

# %% [markdown]
# Chapter 12's `choose_step` asks for it, by chapter 10's table of what
# answers, and `generate` runs all tokens after the prompt by it where kernels
# are loaded, for a model in their type on the CPU. Elsewhere it has to be
# asked for, `generate(..., decode=DecodeStep)`, and on CUDA for a reason:
# **no GPU has recorded it yet.** What can be held without one is held below
# and in `tests/test_decode_step.py`, where something else in the place of
# `cuda_graph` warms up, undoes and replays. Sampling still waits for the
# device, once a token instead of at every check.

# %% tags=["export:kernels/step"]
from weakref import WeakKeyDictionary

_told: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _told_why(model: nn.Module, why: str) -> None:
    """One line a model and reason. None for a model that is spread over a
    group of processes: it has a `group`, and is never recorded."""
    if _told.get(model) != why and getattr(model, "group", None) is None:
        _told[model] = why
        _log.warning("gptoss: a step of decode is not recorded, which is "
                     "slower: %s", why)


def quick_step(model: GptOss, cache: Cache
               ) -> tuple["DecodeStep | None", str]:
    """The step for chapter 12's `choose_step` where the C++ kernels compute
    it, or None, and why.

    A recorded `DecodeStep` for a bf16 model on the CPU that `can_record`,
    and a cache without a replay under way. If only hooks or other forwards
    are in the way, one warning says which.
    """
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None, "the kernels compute in bfloat16 on the CPU"
    if not (has_kernel() and torch.ops.gptoss.kernels_on()):
        return None, "plain torch is in use"
    if not torch.equal(cache.rows.lengths, cache.rows.held):
        return None, "the cache waits for tokens that were rolled back"
    why = additions(model)
    if why:
        _told_why(model, why)
        return None, why
    if not can_record(model):
        return None, "dense experts are not recorded"
    return DecodeStep(model, cache, call_again), "the kernels compute it"

# %% [markdown]
# ### Measuring
#
# `bench` runs what a user runs, `generate`, and looks at the clock. The speed
# of memory is measured in the same process: a sum over 1 GiB, which torch
# computes as fast as the numbers arrive.

# %% tags=["export:kernels/roofline"]
import statistics


from gptoss.weights.sizes import bytes_read_per_token
import sys

from gptoss.text.sampling import Sampler
from gptoss.text.generate import generate
from gptoss.model.transformer import GptOss


def read_speed(size: int = 2 ** 30, repeats: int = 5) -> float:
    """Bytes a second that all threads together read from memory, best of."""
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best

# %% tags=["export:kernels/bench"]
def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rates(name: str, seconds: list[float], count: int = 1) -> dict:
    """Rates of `count` things in so many seconds: the median as `name`, and
    those of the slow and the fast tenth as low and high in `name`_spread."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {name: count / statistics.median(ordered),
            f"{name}_spread": {"low": count / ordered[-1 - tenth],
                               "high": count / ordered[tenth]}}

# %% tags=["export:kernels/bench"]
def _timed(model: GptOss, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each of `count` greedy tokens."""
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_new_tokens=count,
                      sampler=Sampler(temperature=0.0)):
        times.append(time.perf_counter() - start)
    return times


def summarise(runs: list[list[float]], prompt_tokens: int, size: int,
              speed: float) -> dict:
    """What runs say, each the seconds from its start to each of its tokens.

    size: the bytes of weights that a token reads; speed: bytes a second
    that memory delivers. The first token ends the reading of the prompt.
    """
    first = [times[0] for times in runs]
    steps = [after - before for times in runs
             for before, after in zip(times, times[1:], strict=False)]
    decode = rates("decode_tokens_per_second", steps)
    share = decode["decode_tokens_per_second"] * size / speed
    return ({"time_to_first_token": statistics.median(first)}
            | rates("prefill_tokens_per_second", first, prompt_tokens)
            | decode | {"bytes_per_token": size,
                        "read_bytes_per_second": speed,
                        "read_bandwidth_share": share})

# %% tags=["export:kernels/bench"]
def measure(path: str | Path, prompt_tokens: int = 512, new_tokens: int = 32,
            repeats: int = 3, seed: int = 0,
            load: Callable[..., GptOss] = GptOss.from_pretrained) -> dict:
    """Load the model in `path` and generate; what it took, as a dict.

    The prompt is random tokens. A short run comes first, so that the file
    is in memory and the kernels are loaded; then `repeats` timed ones.
    Seconds, bytes, tokens a second (medians); read_bandwidth_share is the
    bytes of a token over what memory could deliver in its time. KernelError
    if the tokens do not fit into the model's context.
    """
    start = time.perf_counter()
    model = load(path)
    load_seconds = time.perf_counter() - start
    room = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > room:
        raise KernelError(f"prompt_tokens + new_tokens: expected at most "
                          f"{room} (the model's context), found "
                          f"{prompt_tokens} + {new_tokens}")
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,),
                           generator=draw).tolist()
    _timed(model, prompt[:8], 4)
    runs = [_timed(model, prompt, new_tokens + 1) for _ in range(repeats)]
    peak = peak_rss_bytes()  # now: measuring memory takes a gigabyte
    return {"kernels": kernel_path(), "threads": torch.get_num_threads(),
            "load_seconds": load_seconds, "peak_rss_bytes": peak,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "repeats": repeats} | summarise(
                runs, prompt_tokens,
                bytes_read_per_token(model.config) - saved_bytes(model),
                read_speed())

# %%
told = summarise([[0.5, 0.6, 0.8], [0.25, 0.35, 0.4]], 100, 1000, 50000.0)
for name in ("time_to_first_token", "decode_tokens_per_second",
             "read_bandwidth_share"):
    print(name, round(told[name], 3))
assert told["prefill_tokens_per_second_spread"] == {"low": 200, "high": 400}

# %% [markdown]
# ## It holds
#
# **Kernels against plain torch against float64**, on the same inputs in bf16.
# The packed product ends in one rounding to bf16, and so does the torch path:
# their distances from the exact result must agree to one part in a thousand.
# The experts keep fp32 in between and must be nearer.

# %%
from gptoss.model.ops import mxfp4_linear


def errors_of(run, *tensors) -> tuple[float, float]:
    """Distance from float64 of the kernel's and of plain torch's result."""
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    with torch.inference_mode():
        fast = run(*tensors)
        with plain_torch():
            slow, exact = run(*tensors), run(*wide)
    return off(fast.double(), exact), off(slow.double(), exact)


for tokens in (1, 3, 4, 23):
    for rows, columns in ((50, 96), (33, 128), (64, 2880)):
        blocks, scales = encode(0.02 * torch.randn(rows, columns))
        ours, torchs = errors_of(
            mxfp4_linear, torch.randn(tokens, columns).bfloat16(), blocks,
            scales, torch.randn(rows).bfloat16())
        assert ours < 1.001 * torchs < 3e-3
print("one rounding to bf16, and nothing else that shows")

# %%
from gptoss.model.ops import packed_experts
from gptoss.weights.mxfp4 import PackedMXFP4

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
    assert ours <= torchs
    if path.startswith("C++"):
        assert ours < torchs / 2
print("the experts: at most half of plain torch's error")

# %% [markdown]
# **Attention** over a ring in any order, with padding, with and without a
# window, and rows that see nothing:

# %%
import gptoss.model.ops  # noqa: F401  declares the operators


def attend(q, k, v, sinks, q_pos, k_pos, window):
    return torch.ops.gptoss.sink_attention(q, k, v, sinks, q_pos, k_pos,
                                           window, 0.125)


for window in (0, 9):
    for T, S in ((1, 200), (70, 70)):
        k_pos = torch.arange(S)
        q_pos = k_pos[S - T:].clone()
        q_pos[0] = -1 if T > 1 else S - 1
        mixed = torch.randperm(S)
        k_pos = k_pos[mixed].where(mixed % 7 != 0, -1)

        def run(q, k, v, sinks, q_pos=q_pos, k_pos=k_pos, window=window):
            return attend(q, k, v, sinks, q_pos[None], k_pos[None], window)

        ours, torchs = errors_of(
            run, *(torch.randn(1, n, heads, 64).bfloat16()
                   for n, heads in ((T, 8), (S, 2), (S, 2))),
            torch.randn(8).bfloat16())
        assert ours < 1.02 * torchs < 3e-3
print("attention agrees")

# %% [markdown]
# **Gradients** are those of plain torch.

# %%
from gptoss.model.layers import Linear

layer = Linear(64, 8).bfloat16()
given = torch.randn(3, 64).bfloat16().requires_grad_()
grads = torch.autograd.grad(layer(given).sum(), (given, layer.weight))
assert torch.equal(grads[0], layer.weight.sum(0).expand(3, -1))
print([tuple(grad.shape) for grad in grads])

# %% [markdown]
# **The shipped model**, on a story it did not see. First the experts of each
# layer, on the inputs that they get in it: both paths and float64 are given
# the same numbers, rounded to bf16.

# %%
from pathlib import Path

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss

POCKET = Path(gptoss.__file__).parent / "pocket"
tokens = Tokenizer.from_pretrained(POCKET).encode(
    "Once upon a time there was a small fox named Mira. Mira lived in the "
    "forest. The best thing she had was a red kite. One day Mira took the "
    "red kite to the lake. But a strong wind came, and the red kite was gone."
)
model = GptOss.from_pretrained(POCKET)
wide = GptOss.from_pretrained(POCKET, dtype=torch.float64)
inputs = []
hooks = [layer.mlp.experts.register_forward_pre_hook(
    lambda module, given: inputs.append(given)) for layer in wide.layers]
with torch.inference_mode():
    exact = wide(torch.tensor([tokens]))
for hook in hooks:
    hook.remove()
for n, (x_n, ids, weights) in enumerate(inputs):
    def run(x, weights, n=n, ids=ids):
        which = wide if x.dtype == torch.float64 else model
        return which.layers[n].mlp.experts(x, ids, weights)

    ours, torchs = errors_of(run, x_n.bfloat16(), weights.bfloat16())
    assert ours <= torchs
    if path.startswith("C++"):
        assert ours < 0.8 * torchs
print(len(inputs), "layers, in each at least as near as plain torch")

# %% [markdown]
# Then the whole, the same weights in bf16 on both paths and in float64. Now
# the inputs differ from the first layer on, and both paths round the stream
# between the layers to bf16.

# %%
with torch.inference_mode():
    fast = model(torch.tensor([tokens])).double()
    with plain_torch():
        slow = model(torch.tensor([tokens])).double()
best, second = exact.topk(2).values.unbind(-1)
clear = best - second > 0.25
assert (fast.argmax(-1) == exact.argmax(-1))[clear].all()
assert (slow.argmax(-1) == fast.argmax(-1))[clear].all()
narrow = GptOss.from_pretrained(POCKET, dtype=torch.float32)
with torch.inference_mode():
    single = narrow(torch.tensor([tokens]))
    with plain_torch():
        assert torch.equal(narrow(torch.tensor([tokens])), single)
print("bf16: the same choice wherever the best token leads by 0.25")
print("float32: the same bits")

# %% [markdown]
# So what does *identical* mean for two paths? In float32 it is literal: the
# kernels step aside, and both paths are one. In bf16 it cannot be. Counted
# once, on the Zen 3 and with the small model that was shipped then: over 16
# stories (3,351 positions) the median distance of the logits from float64,
# relative to their size, was 0.0067 with the kernels and 0.0073 with torch,
# and a router chose another expert than in float64 at 100 and 103
# positions. Of 12 greedy texts of 64 tokens, 9 were the same on both paths.
# The other three parted where two words were nearly as good: their exact
# logits differed by less than 0.05, and at that size one step of bf16 is
# 0.06. Both paths are right to within their format; neither is the reference.
# These counts are one processor's. What holds on all is a test,
# `tests/test_kernels.py`: in bf16 two texts part only where the exact logits
# are within 0.25.

# %% [markdown]
# **The step with fixed shapes** gives the logits of the ordinary path, 150
# tokens long, past the window of 64 and with most slots empty at first.
# The sums over keys run over all slots now, and a library may cut a
# longer sum otherwise, hence a tolerance; the greedy tokens are the same.

# %%
from gptoss.kernels.step import DecodeStep
from gptoss.text.sampling import Sampler
from gptoss.text.generate import forward_step, generate

assert narrow.config.sliding_window < 150
greedy = {"sampler": Sampler(0.0), "max_new_tokens": 150}
plain, stepped = (list(generate(narrow, tokens[:8], decode=decode, **greedy))
                  for decode in (forward_step, DecodeStep))
assert plain == stepped
caches = [narrow.new_cache(max_tokens=200) for _ in range(2)]
fixed = DecodeStep(narrow, caches[1])
with torch.inference_mode():
    for given in plain:
        given = torch.tensor([[given]])
        expected = narrow(given, cache=caches[0])
        torch.testing.assert_close(fixed(given), expected, atol=1e-4,
                                   rtol=1e-5)
assert torch.equal(caches[0].rows.ring, caches[1].rows.ring)
print(len(stepped), "greedy tokens are the same, logits to 1e-4")

# %% [markdown]
# In the type of the kernels the step is recorded and called again, and there
# an empty slot adds exactly nothing: the logits are equal to the last bit.
# Then the same 150 tokens, with Python between the calls and without, tell
# what it costs in the shipped model, where the arithmetic is small.

# %% tags=["nbval-ignore-output"]
from gptoss.text.generate import choose_step


def timed_steps(step):
    """Logits of every step, and the median of their seconds."""
    logits, seconds = [], []
    for given in plain:
        start = time.perf_counter()
        logits.append(step(torch.tensor([[given]])).clone())
        seconds.append(time.perf_counter() - start)
    return torch.cat(logits), statistics.median(seconds)


with torch.inference_mode():
    by_forward, by_step = (timed_steps(make(model, model.new_cache()))
                           for make in (forward_step, choose_step))
assert torch.equal(by_forward[0], by_step[0])
print(f"{1e3 * by_forward[1]:.2f} ms a token by the model's forward, "
      f"{1e3 * by_step[1]:.2f} called again")

# %% [markdown]
# And nothing in it depends on the numbers. With *fake* tensors, which have a
# shape and no content, whoever asks for a number or makes a shape of one
# fails. The ordinary path does at its first check; the step runs through.

# %%
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(allow_non_fake_inputs=True):
    seen = fixed()
    try:
        narrow(torch.zeros(1, 1, dtype=torch.int64), cache=caches[0])
    except Exception as error:
        print("the ordinary path:", type(error).__name__)
print("the step: logits", tuple(seen.shape))

# %% [markdown]
# ## Against the others
#
# llama.cpp multiplies MXFP4 by activations in 8 bits
# (`ggml_vec_dot_mxfp4_q8_0`), as the naive version above tried. transformers
# keeps the experts packed on a CPU only with Triton and kernels from the Hub;
# without, it decodes them to bf16 while loading. Then it reads 2 bytes a
# weight instead of 17/32, needs 42 GB for the 20b, and multiplies with torch's
# bf16 product. Both formulas beside ours, on the naive version's input:

# %%
fast = mxfp4_linear(x.bfloat16(), *encode(weight)).double()
formulas = {
    "llama.cpp, 8-bit activations": rounded(x, 127) @ weight.T,
    "transformers, bf16 weights": (x.bfloat16() @ weight.bfloat16().T
                                   ).double(),
    "ours": fast}
exact = x @ weight.T
for name, y in formulas.items():
    print(f"{name:29} relative error {off(y, exact):.1e}")
eight, bf16, ours = (off(y, exact) for y in formulas.values())
assert ours < 1.001 * bf16 and 3 * ours < eight

# %% [markdown]
# A fast path that is not taken leaves the text right, so nobody notices.
# SGLang padded the experts to a width that its CPU kernels do not take, and
# gpt-oss went through the slow path (sgl-project/sglang#31334); transformers
# decodes to bf16 where a package is missing
# (huggingface/transformers#42723). Here the path has a name, `kernel_path()`,
# which `bench` prints, and a missing compiler is one line in the log.

# %% [markdown]
# `bench/compare.py` runs the three on one checkpoint of random weights, one
# after the other on the same machine, and divides. What it found:

# %% tags=["hide-input"]
def number(value, width: int, digits: int = 1) -> str:
    return " " * (width - 1) + "-" if value is None else (
        f"{value:{width}.{digits}f}")


def table(saved: dict) -> None:
    """One line an engine and shape, the speeds beside those of ours."""
    print(measured("machine", "words", found=saved, default="not measured"))
    print("tokens a second".ljust(33), " decode  prefill  GiB   ours is "
          "faster by")
    for shape in ("20b", "4 layers", "4 layers, 16", "2 layers", "shipped"):
        engines = measured(shape, found=saved, default={})
        best, copy = (engines.get(name, {}).get
                      for name in ("ours", "ours-compact"))
        for engine, result in engines.items():
            speeds, mine = ([get(f"{part}_tokens_per_second")
                             for part in ("decode", "prefill")]
                            for get in (result.get, best))
            faster = [f"{a / b:.2f} x"
                      for a, b in zip(mine, speeds, strict=True) if a and b]
            twelve = copy("decode_tokens_per_second")
            if twelve:
                faster.append(f"compact {twelve / speeds[0]:.2f} x")
            share = result.get("read_bandwidth_share", 0)
            remark = (", ".join(faster) if not engine.startswith("ours")
                      else "" if result["prompt_tokens"] < 512 else
                      f"{share:.0%} of memory's speed"
                      + (" (see below)" if share > 1 else ""))
            memory = result.get("peak_rss_bytes")
            print(shape.ljust(12), engine.ljust(20), number(speeds[0], 7),
                  number(speeds[1], 8),
                  number(memory and memory / 2 ** 30, 5), "  ",
                  remark)


table(MEASURED)
dense = parts["attention"] + parts["lm_head"]  # 2 bytes a weight; Q8_0 34/32
print(f"a token of the 20b with Q8_0: "
      f"{(sum(parts.values()) - dense * (1 - 17 / 32)) / 1e9:.1f} GB")

# %% [markdown]
# Each engine ran alone with both cores (the shipped model with one thread),
# with 512 tokens of prompt (16 in the second group, 128 for the shipped one),
# llama.cpp with experts in MXFP4 and dense matrices in bf16 or Q8_0. Engines
# took turns, and of two rounds the one with the faster decode counts (one
# round for 4 and 2 layers). Memory delivers 33 to 45 GB/s here, changing
# within minutes, so that a ratio is good to a tenth or so, and a share of
# memory's speed, which is measured after the runs, to a fifth.
#
# *Decode.* In the two rounds the 20b wrote 9.6 and 9.4 tokens a second,
# llama.cpp with bf16 6.6 and 6.7, with Q8_0 8.7 and 8.3. That is 1.46 and 1.41
# times as many as the first, and 1.10 and 1.12 times as many as the second,
# though Q8_0 rounds the dense matrices and reads 2.6 GB for a token where ours
# keeps every number and reads 3.7. Ours used 83 and 84 % of memory's speed.
# In twelve bits, 3.1 GB, it wrote 9.6 and 9.8: where the experts' product is
# limited by the processor, which with AVX2 does some 14 GB/s a thread, reading
# less brings less.
#
# *The rest.* A prompt is read 1.8 times as fast as by llama.cpp. The 20b loads
# in 0.2 s, because a page of the file is read when it is first touched, and
# peaks at 12 to 13 GiB where llama.cpp takes 21 to 23; with the copies it is
# 1.4 s and 14 GiB. torch has no fast product in bf16 for AVX2, and
# transformers takes 35 times as long for a token and 123 times for a prompt of
# 16; in fp32, at 2 layers, it takes 3.5 times as long for a token and 2.1
# times for a prompt of 512.
#
# *Long texts*, by `bench/lengths.py`: a token of the 20b at position 8192 took
# 1.20 times as long as one at 128 (150 and 126 ms, in a run that still touched
# experts for the first time). The time for a token of a prompt, at 4 layers,
# was 6.5 ms with 512 tokens and 6.4 with 4096.
#
# With AVX-512 llama.cpp's bf16 product comes near the speed of memory as well,
# and two programs that read the same bytes at that speed take the same time.
# These were measured with an older version of the kernels, which made every
# token anew in Python and did not record its steps:

# %% tags=["hide-input"]
table(ON_AVX512)

# %% [markdown]
# There decode was 1.25 times as fast as llama.cpp's with bf16, in both rounds,
# and 1.07 and 1.09 times as with Q8_0. With 4 of the layers, where the head
# weighs most, we lost to Q8_0: ours wrote 0.84 times as many tokens, and in
# twelve bits as many. In three more rounds of the 20b with 128 tokens of
# prompt, which are not in the table, with memory at 30 to 63 GB/s, it was
# 0.98, 1.07 and 1.43 times as fast as llama.cpp with bf16, in twelve bits
# 1.51, 1.31 and 1.23 times. No program reads faster than memory delivers: the
# share above 100 % says that memory, which is measured after the run, was
# slower by then.
#
# **Not run at all**, for want of such machines: the kernels on an ARM
# processor. The file compiles for one, and the product in NEON, run in an
# emulator (QEMU), agrees with float64 as the others do; how fast it is, nobody
# has seen.

# %% [markdown]
# ## In the 20b and the 120b
#
# The kernels take 32 columns and, in tiles, 16 rows at a time. In the released
# models every width is a multiple of 32 and every number of rows one of 16, so
# no matrix leaves a remainder. The floor {eq}`kernels-floor`:

# %%
from gptoss.weights.layout import tensor_table

for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    for spec in tensor_table(config).values():
        if spec.name.endswith("_blocks"):  # (E, rows, blocks of 32, 16)
            assert spec.shape[1] % 16 == 0
        elif spec.name.endswith(("_proj.weight", "router.weight", "lm_head"
                                 ".weight")):
            assert spec.shape[0] % 16 == spec.shape[1] % 32 == 0
    floor = bytes_read_per_token(config) / READ
    print(f"{name:4}  {bytes_read_per_token(config) / 1e9:.2f} GB a token, "
          f"at 30 GB/s at least {1000 * floor:.0f} ms")

# %% [markdown]
# The 120b has four times the experts and reads only a third more for a token:
# 36 layers instead of 24, with four experts each, and the same head. Where its
# 65 GB fit in memory it decodes at three quarters of the 20b's speed. With the
# dense matrices in twelve bits a token of the 20b reads 3.10 GB instead of
# 3.70: that floor is a sixth lower.

# %% [markdown]
# ## Cost
#
# In prefill, $N$ tokens make $NK$ picks; with enough of them every expert is
# hit, and its weights are decoded once whatever $N$ is. Arithmetic per byte
# then grows with $N$, until the processor, not memory, is the limit. With
# $\beta$ bytes and $\pi$ operations a second, the $2NK/E$ operations for a
# weight take as long as its 17/32 bytes when
#
# $$ N = \frac{17}{64}\, \frac{E}{K}\, \frac{\pi}{\beta} .
# $$ (kernels-crossing)
#
# For the two cores of the first section:

# %%
E, K = big.num_local_experts, big.num_experts_per_tok
crossing = 17 / 64 * E / K * OPERATE / READ
in_experts = 2 * K * big.num_hidden_layers * expert_size(big)
dense = flops_per_token(big, 0) - in_experts
assert abs(dense / sum(parts[name] for name in ("attention", "lm_head"))
           - 1) < 0.01  # one addition and product for two bytes of bf16
print(f"experts are limited by arithmetic from about {crossing:.0f} tokens "
      f"on;\nthey take {in_experts / 1e9:.1f} of a token's "
      f"{flops_per_token(big, 0) / 1e9:.1f} GFLOP")

# %% [markdown]
# ## Takeaways
#
# - Decoding is reading: bytes a token over bytes a second is the floor, and a
#   table in a register makes four-bit weights as cheap to use as to read.
# - Activations in sixteen bits lose about an eightieth of what rounding the
#   result to bf16 loses; in eight bits, three times as much as it.
# - Sixteen bits can hold less than sixteen bits: with the upper byte coded in
#   four, dense weights take twelve, and no number changes.
# - Kernels belong below operators: the model names what it wants, the device
#   decides how, and a machine without a compiler still runs.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# An activation of 1000 stands among 31 of size 1, and its weight is zero.
# How wrong can the block's product be in units of the others' own size, with
# the finest step? Check the bound {eq}`kernels-error` numerically.

# %% tags=["hide-cell"]
block = torch.randn(32, dtype=torch.float64)
block[7] = 1000.0
weights = torch.full((32,), 1.0, dtype=torch.float64)
weights[7] = 0
error = (rounded(block[None], 32639)[0] - block) @ weights
bound = 1000 / 65278 * weights.abs().sum()
assert error.abs() <= bound
print(f"bound {bound.item():.2f}, so up to half of one activation")

# %% [markdown]
# ### Exercise 2
#
# In `dots` a lane sums four bytes' products, of numbers up to 24 and digits up
# to 128 in size. Why does no sum overflow 32 bits, and why does its conversion
# to fp32 lose nothing? In a tile one lane sums a whole block. From which width
# of activations on would that conversion round?

# %% tags=["hide-cell"]
digits = 8 * 24 * 128  # four bytes are eight weights
assert 256 * digits + digits + 12 * 8 * 32639 < 2 ** 31  # no overflow
lane = 8 * 12 * 32639  # what remains at the end: weights times activations
assert lane < 2 ** 24  # every whole number up to it is a float


def exact_in_a_tile(bits: int) -> bool:
    return 32 * 12 * (2 ** (bits - 1) - 1) <= 2 ** 24


assert exact_in_a_tile(16) and not exact_in_a_tile(17)
print("from 17 bits on")

# %% [markdown]
# ### Exercise 3
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
# ### Exercise 4
#
# The attention kernel starts a row with maximum = sink, sum = 1, output = 0.
# Show on numbers that this is `softmax_with_sink` of chapter 5.

# %% tags=["hide-cell"]
from gptoss.attention.sinks import softmax_with_sink

scores, sink = torch.randn(5).double(), torch.randn(1).double()
top, total, out = sink, torch.ones(1).double(), torch.zeros(1).double()
value = torch.randn(5).double()
for s, v in zip(scores, value, strict=True):
    higher = torch.maximum(top, s)
    shrink, e = (top - higher).exp(), (s - higher).exp()
    total, out, top = total * shrink + e, out * shrink + e * v, higher
whole = softmax_with_sink(scores[None, None], sink)[0, 0] @ value
assert torch.allclose(out / total, whole)
print("equal")

# %% [markdown]
# ## Sources
#
# - Roofline: {cite}`roofline2009`. MXFP4: {cite}`ocpmx2023`. Tiles of
#   attention with a running maximum: {cite}`flash2022`; sinks:
#   {cite}`sinks2023`; grouped heads: {cite}`gqa2023`.
# - bf16 weights without loss in about eleven bits: {cite}`dfloat2025`.
# - llama.cpp, `ggml/src/ggml-cpu/`: MXFP4 times 8-bit activations with the
#   same lookup instruction.
# - transformers, `quantizers/quantizer_mxfp4.py`: when it decodes to bf16.
# - openai/gpt-oss, `gpt_oss/triton/`: kernels for GPUs that have been run.
