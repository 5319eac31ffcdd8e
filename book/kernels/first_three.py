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
# # What does a first kernel look like?
#
# ## Question
#
# RMSNorm in plain torch is ten calls of operators, RoPE twelve, the choice of
# experts four. A token of the 20b passes 49 norms, 48 rotations and 24
# choices, and each time the calls cost more than the arithmetic. What do the
# three look like as one function each, in C++?

# %%
import matplotlib.pyplot as plt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.attention.rope import apply_rope
from gptoss.model.norm import rms_norm
from gptoss.moe.routing import route

plt.style.use("../_static/book.mplstyle")


class Count(TorchDispatchMode):
    """Counts torch's own operators while it is in use."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


torch.manual_seed(0)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


small = {"rms_norm": (49, rms_norm, some(1, 1, 2880), some(2880), 1e-5),
         "rope": (48, apply_rope, some(1, 1, 64, 64), some(1, 1, 32),
                  some(1, 1, 32)),
         "route": (24, route, some(1, 32), 4)}
calls = {}
for name, (times, function, *arguments) in small.items():
    with torch.inference_mode(), Count() as count:
        function(*arguments)
    calls[name] = count.number
    print(f"{name:8} {count.number:2} calls, {times} times a token: "
          f"{times * count.number}")

# %% [markdown]
# ## Picture
#
# How many calls is that for one token of the 20b, and how many are left if
# each of the three is one operator?

# %% tags=["hide-input"]
# Figure: three pairs of horizontal bars, calls a token. In plain torch
# rms_norm and rope need some 500 and 600, route near 100; as one operator
# each they need 49, 48 and 24.
fig, ax = plt.subplots(figsize=(6.4, 2.3))
for y, (name, (times, *_)) in enumerate(small.items()):
    for shift, number, color in ((-0.2, times * calls[name], "C0"),
                                 (0.2, times, "C1")):
        ax.barh(y + shift, number, 0.36, color=color)
        ax.text(number + 6, y + shift, str(number), va="center", fontsize=8)
ax.text(380, 1.98, "plain torch", color="C0", fontsize=8, va="center")
ax.text(380, 2.28, "one operator", color="C1", fontsize=8, va="center")
ax.set(yticks=range(3), yticklabels=list(small), xlim=(0, 650),
       xlabel="calls for one token of the 20b")
ax.invert_yaxis()
plt.show()
before = sum(times * calls[name] for name, (times, *_) in small.items())
print(f"{before} calls in plain torch, {49 + 48 + 24} with kernels")

# %% [markdown]
# What to see: more than a thousand calls become 121. A call out of Python
# costs a few microseconds whatever it computes, so for vectors of 2880 numbers
# the number of calls is what counts.

# %% [markdown]
# ## Code
#
# ### How is this C++ read?
#
# You need no more of C++ than this table. Everything else reads like Python
# with types in front of the names.
#
# | C++ | meaning |
# |---|---|
# | `const float* x` | where the first number of `x` lies; `x[i]` is the i-th |
# | `const Buffer& x` | the argument itself, not a copy; nobody changes it |
# | `int64_t`, `uint8_t` | a whole number of 64 bits; one of 8 without a sign |
# | `[&](int64_t r) { … }` | a `lambda` that sees the names around it |
# | `template <int R>` | the function is compiled anew for each R |
# | `constexpr int64_t N = 4` | a number that is known when compiling |
# | `struct Line { … }` | a class, mostly of fields |
# | `a ? b : c` | `b if a else c` |
# | `bits >> 16`, `& 15` | shift right by 16 bits; keep the lowest four |
# | `#ifdef X … #endif` | these lines only if X was defined |
#
# And three names of ours, defined further down: a `Buffer` is a list of fp32
# numbers in one piece, `Number` is bf16, and `Floats` are eight fp32 numbers
# in a register, as in [the first kernel](building.ipynb).
#
# ### What are the three functions?
#
# Each is a loop over rows, and each row is the formula that you know.
# `at::parallel_for(0, rows, 8, …)` is torch's own: it splits the rows among
# its threads, in ranges of at least 8. RMSNorm sums in double precision,
# which costs nothing beside the rest; RoPE turns pairs half a head apart
# ([RoPE](../attention/rope.ipynb)). A row is widened, worked on and rounded
# before the next one comes: whole tensors in fp32 would go out to memory.

# %%
def norm_row(x, weight, eps):  # one row, five lines
    squares = sum(value * value for value in x)
    scale = 1 / (squares / len(x) + eps) ** 0.5
    return [w * (value * scale) for w, value in zip(weight, x, strict=True)]


def rope_row(x, c, s):  # one head of one token
    half = len(x) // 2
    return ([x[i] * c[i] - x[half + i] * s[i] for i in range(half)]
            + [x[half + i] * c[i] + x[i] * s[i] for i in range(half)])


print([round(y, 3) for y in norm_row([3.0, 4.0], [1.0, 1.0], 0.0)],
      rope_row([1.0, 2.0], [0.0], [1.0]))

# %% [markdown] tags=["export:small.h"]
# ```cpp
# namespace {
#
# // y like x, row by row of n numbers: work(row, numbers, to) sees fp32, which
# // never leaves a cache
# template <class Work>
# Tensor by_rows(const Tensor& x, int64_t n, const Work& work) {
#   const Tensor from = x.contiguous();
#   Tensor y = at::empty(x.sizes(), x.options());
#   auto to = static_cast<Number*>(y.data_ptr());
#   at::parallel_for(0, x.numel() / n, 8, [&](int64_t begin, int64_t end) {
#     Buffer row(n), done(n);
#     for (int64_t r = begin; r < end; ++r) {
#       convert(numbers(from) + r * n, n, row.data());
#       work(r, row.data(), done.data());
#       convert(done.data(), n, to + r * n);
#     }
#   });
#   return y;
# }
#
# // eight sums at a time, or each addition waits for the one before
# double sum_of_squares(const float* x, int64_t n) {
#   using Doubles = double __attribute__((vector_size(64)));
#   Doubles sums = {};
#   double all = 0;
#   int64_t i = 0;
#   for (; i + 8 <= n; i += 8) {
#     const Floats v = load<Floats>(x + i);
#     sums += __builtin_convertvector(v * v, Doubles);
#   }
#   for (; i < n; ++i) all += x[i] * x[i];
#   for (int j = 0; j < 8; ++j) all += sums[j];
#   return all;
# }
#
# // heads (H, C) of a token turned by its angles (C / 2,), half-split
# void rope_heads(const float* x, const float* c, const float* s, int64_t H,
#                 int64_t half, float* to) {
#   for (int64_t h = 0; h < H; ++h, x += 2 * half, to += 2 * half)
#     for (int64_t i = 0; i < half; ++i) {
#       to[i] = x[i] * c[i] - x[half + i] * s[i];
#       to[half + i] = x[half + i] * c[i] + x[i] * s[i];
#     }
# }
# ```

# %% [markdown]
# The choice of experts takes the $K$ largest of $E$ logits, and shares them by
# a softmax over the chosen alone. Of equal logits the first wins, as in
# [routing](../moe/routing.ipynb); and NaN, which compares with nothing, goes
# before everything, as torch has it. That rule is the function `before`.

# %% [markdown] tags=["export:small.h"]
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
# ### What will later kernels need?
#
# An exponential: the SwiGLU of the experts has one, and so has attention. C++
# has one for a single number only. Eight at a time it goes like this: with $n
# = x / \log 2$ rounded, $e^x = 2^n e^r$, where $|r| \le \tfrac12 \log 2$ is so
# small that eight terms of the Taylor series suffice. $2^n$ is a shift into
# the exponent's bits. $\log 2$ is subtracted in two parts, so that $r$ keeps
# its last bits. (The SwiGLU stands below it in C++; its clamps are written so
# that NaN stays NaN.) In torch:

# %%
def exponential(x: torch.Tensor) -> torch.Tensor:
    """`exponential` of small.h in torch, fp32."""
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

# %% [markdown]
# To round a float, the C++ adds 12582912, which is $1.5 \cdot 2^{23}$: floats
# of that size have no bits left for fractions, so the sum *is* rounded, and
# its lowest bits hold the whole number. Subtracting it again gives $n$.

# %%
x = torch.tensor([2.6, -2.6, 0.4])
shifted = x + 12582912.0
print((shifted - 12582912.0).tolist(),
      (shifted.view(torch.int32) - 0x4B400000).tolist())

# %% [markdown] tags=["export:small.h"]
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
#
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
# ```

# %% [markdown]
# ### How do they come under the operators?
#
# What torch calls gets tensors. It looks at them, runs the rows in fp32, and
# rounds the result once to bf16. The last block is what
# [dispatch keys](building.ipynb) were explained for: three entries in torch's
# table, name and function, for the key `CPU`.

# %% [markdown] tags=["export:small.h"]
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
#   const Buffer w = floats(weight);
#   return by_rows(x, n, [&](int64_t, const float* row, float* to) {
#     const float scale = 1 / std::sqrt(sum_of_squares(row, n) / n + eps);
#     for (int64_t i = 0; i < n; ++i) to[i] = w[i] * (row[i] * scale);
#   });
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
#   const Buffer c = floats(cos.expand(shape)), s = floats(sin.expand(shape));
#   const int64_t H = x.size(2);
#   return by_rows(x, 2 * H * half, [&](int64_t token, const float* row,
#                                       float* to) {
#     rope_heads(row, &c[token * half], &s[token * half], H, half, to);
#   });
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
# ## What is refused
#
# A kernel serves bf16 on the CPU, the type of the released weights. Everything
# else goes to `plain(…)`, the same operator in plain torch, which the Python
# side declares as `gptoss::plain_NAME`: whoever asks for float32 gets float32,
# and where a gradient is asked for the operator never comes to a kernel.
#
# A kernel reads memory by the sizes that it was told, so it looks at all of
# them first; that takes no time that could be measured. What cannot be right
# in any form is refused by name (`TORCH_CHECK` raises a RuntimeError): a
# weight as long as no row, tables that fit no half of a head. What the kernel
# is not made for but torch may be (a size of zero, a weight that torch would
# stretch) is left to plain torch, which computes it or refuses it. So both
# paths do the same, and a test throws wrong shapes at both.

# %% [markdown]
# ## What they stand on
#
# The part `base.h` is compiled first; every kernel of the book uses it. We
# read it last, since only now you know what it is for. It has five pieces.
#
# **What the processor can do.** torch's headers, and then names for what the
# compiler found: `GPTOSS_AVX2` and so on are defined where those instructions
# may be used. What is written for AVX-512, VNNI or NEON stands in parts of its
# own, in an [appendix](../cli/wide.ipynb).

# %% [markdown] tags=["export:base.h"]
# ```cpp
# #include <ATen/Parallel.h>
# #include <ATen/core/Tensor.h>
# #include <ATen/core/dispatch/Dispatcher.h>
# #include <ATen/ops/empty.h>
# #include <ATen/ops/from_blob.h>
# #include <ATen/ops/zeros.h>
# #include <ATen/record_function.h>
# #include <torch/custom_class.h>
# #include <torch/library.h>
#
# #include <algorithm>
# #include <array>
# #include <atomic>
# #include <cmath>
# #include <cstdint>
# #include <cstring>
# #include <limits>
# #include <mutex>
# #include <span>
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
# #if defined(__AMX_BF16__) && defined(__linux__)
# #include <sys/syscall.h>
# #include <unistd.h>
# #define GPTOSS_AMX 1
# #endif
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
# ```

# %% [markdown]
# **Eight numbers at a time.** A bf16 number is the upper half of a float, so
# `widen` moves sixteen bits up by sixteen and is done. `sum` adds the eight
# numbers of a register: swap its halves and add, swap neighbours and add; two
# numbers are left. (`shufflevector` gives a register whose numbers stand in
# the named order.) `hold` computes nothing. It keeps the compiler from loading
# the same bytes twice, which it likes to do when it runs short of registers.
# An `Array` is a vector that begins where a line of the cache begins; why its
# memory comes from a `Pool` is told when prompts are long enough for that to
# matter, in [panels](panels.ipynb).

# %%
v = torch.arange(8)
v = v + v[[4, 5, 6, 7, 0, 1, 2, 3]]
v = v + v[[1, 0, 3, 2, 5, 4, 7, 6]]
print(v.tolist(), "->", (v[0] + v[2]).item(), "=", sum(range(8)))
pattern = torch.tensor(1.5).bfloat16().view(torch.int16).int()
print((pattern << 16).view(torch.float32).item())

# %% [markdown] tags=["export:base.h"]
# ```cpp
# using at::Tensor;
# using Number = at::BFloat16;  // what weights and activations are stored in
# // memory at a multiple of 64 bytes, since a register of 64 bytes that
# // straddles two lines of a cache costs two loads; large pieces are kept
# template <class T>
# struct Aligned {
#   using value_type = T;
#
#   T* allocate(size_t n) {
#     return static_cast<T*>(pool().take(n * sizeof(T)));
#   }
#   void deallocate(T* p, size_t n) { pool().give(n * sizeof(T), p); }
#   template <class U>
#   bool operator==(const Aligned<U>&) const { return true; }
# };
# template <class T>
# using Array = std::vector<T, Aligned<T>>;
# using Buffer = Array<float>;
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
# // where the compiler's own judgement was measured to be slower
# #define INLINE __attribute__((always_inline))
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
# **Work for all threads.** `share` cuts the work into more pieces than there
# are threads, and whoever is free takes the next. On a busy machine, or with
# experts of unequal popularity, an equal split would wait for the slowest.
#
# **To bf16 and back.** Activations become fp32 on entry and are rounded once
# on exit: 2880 numbers are little beside the 8 million of a matrix. `narrow`
# rounds to the nearest bf16. Adding 0x7fff, just less than half of what the
# lower 16 bits can hold, carries into the upper half exactly if the lower one
# is more than half; adding the lowest kept bit as well sends a tie to the even
# number.

# %%
def narrowed(x: float) -> int:
    bits = torch.tensor(x).view(torch.int32).item()
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


for x in (1.0, 1.00390625, 1.01171875, 1.005):
    by_torch = torch.tensor(x).bfloat16().view(torch.int16).item()
    print(f"{x:<10} {narrowed(x):#06x}, torch {by_torch:#06x}")
    assert narrowed(x) == by_torch

# %% [markdown] tags=["export:base.h"]
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
# // an empty tensor for this call alone, whose memory the next one takes again
# Tensor scratch(at::IntArrayRef sizes, at::ScalarType type) {
#   const size_t bytes = c10::multiply_integers(sizes)
#                        * c10::elementSize(type);
#   return at::from_blob(pool().take(bytes), sizes, [bytes](void* at) {
#     pool().give(bytes, at);
#   }, type);
# }
#
# Buffer floats(const Tensor& x) {
#   const Tensor flat = x.contiguous();
#   Buffer to(flat.numel());
#   convert(numbers(flat), flat.numel(), to.data());
#   return to;
# }
#
# constexpr int64_t STREAMS = 4;     // rows that are read at the same time
# constexpr int64_t AHEAD = 2048;  // bytes
# #ifdef GPTOSS_BF16  // for few tokens that is far enough, and quicker
# constexpr int64_t NEAR = 1024;
# #else
# constexpr int64_t NEAR = AHEAD;
# #endif
# constexpr int64_t LEAN = 2;  // tokens, at most, whose dense rows ask so
#
# // asks memory for what will be needed, into the second cache: there more may
# // be under way than into the first, and nothing in use is driven out
# inline void ask(const void* address) { __builtin_prefetch(address, 0, 2); }
#
# inline void ask_ahead(const void* from, int64_t bytes = AHEAD) {
#   ask(static_cast<const char*>(from) + bytes);
# }
# ```

# %% [markdown]
# **May the kernel serve it?** `ours` asks for bf16 and for the thread's
# switch, `packed` for bytes in one piece, `whole` for whole numbers of 64
# bits. `plain` finds the operator in plain torch by its name. `result` rounds
# a `Buffer` into a new tensor.

# %% [markdown] tags=["export:base.h"]
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

# %% [markdown] tags=["export:base.h"]
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

# %% [markdown]
# **The switch and the name.** What was compiled can say what it is, and each
# thread can turn the kernels off for itself (`plain_torch` of
# [building](building.ipynb)). AMX is the one unit that a processor can have
# and a process not use, because Linux lends its registers to those who ask;
# [amx](amx.ipynb) tells why. So it is asked for here, and the name tells.

# %% [markdown] tags=["export:base.h"]
# ```cpp
# #if defined(GPTOSS_BF16)
# constexpr char NAME[] = "C++ with AVX-512 and bf16";
# #elif defined(GPTOSS_AVX512)
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
# bool lent() {  // AMX's registers, to this process
# #ifdef GPTOSS_AMX
#   constexpr long ASK = 0x1023, REGISTERS = 18;
#   static const bool answer = !syscall(SYS_arch_prctl, ASK, REGISTERS);
#   return answer;
# #else
#   return false;
# #endif
# }
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.def("kernels_name() -> str", [] {
#     return std::string(lent() ? "C++ with AVX-512 and AMX" : NAME);
#   });
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
# ## It holds
#
# Beside each kernel of this book stands a **twin**: the definition in numpy
# and float64, on the same inputs. One rounding to bf16 moves a number by at
# most 1/256 of its size, so no kernel may be further than that from its twin.
# (Without a compiler plain torch answers; it has to be as near.)

# %%
import numpy as np

import gptoss.model.ops  # noqa: F401  declares the operators
from gptoss.kernels.build import load_upto

load_upto("small")
OPS = torch.ops.gptoss


def wide(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


x, weight = some(20, 5, 96), some(96)
scale = np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-5)
twins = {"rms_norm": (OPS.rms_norm(x, weight, 1e-5),
                      wide(x) / scale * wide(weight))}
x, cos, sin = some(2, 30, 4, 64), some(2, 30, 32), some(2, 30, 32)
one, two = np.split(wide(x), 2, -1)
c, s = wide(cos)[:, :, None], wide(sin)[:, :, None]
twins["rope"] = (OPS.rope(x, cos, sin),
                 np.concatenate([one * c - two * s, two * c + one * s], -1))
logits = some(400, 32)
shares, ids = OPS.route(logits, 4)
order = np.argsort(-wide(logits), -1, kind="stable")[:, :4]
largest = np.exp(np.take_along_axis(wide(logits), order, -1))
twins["route"] = shares, largest / largest.sum(-1, keepdims=True)
for name, (y, twin) in twins.items():
    off = np.linalg.norm(wide(y) - twin) / np.linalg.norm(twin)
    print(f"{name:8} {off:.4f} from float64, bound {1 / 256:.4f}")
    assert off < 1 / 256
assert (ids.numpy() == order).all()

# %% [markdown]
# **Ties and NaN** fall as in plain torch, and **gradients** are those of plain
# torch, to the bit, since where one is asked for the kernel steps aside:

# %%
odd = torch.tensor([[1.0, 2.0, 2.0, float("nan")]]).bfloat16()
print("chosen:", OPS.route(odd, 3)[1].tolist(), route(odd, 3)[1].tolist())
x, weight = some(7, 96).requires_grad_(), some(96).requires_grad_()
grads = [torch.autograd.grad(norm(x, weight, 1e-5).float().square().sum(),
                             (x, weight)) for norm in (OPS.rms_norm, rms_norm)]
print("gradients:", *(f"{grad.float().norm():.1f} {plain.float().norm():.1f}"
                      for grad, plain in zip(*grads, strict=True)))
assert all(map(torch.equal, *grads))

# %% [markdown]
# **The sentence again.** The page computes in fp32, and our kernels ask for
# bf16; so we round on the way in. Even with all three in the places of
# [the page's](../one_page.ipynb) functions it is the same story.

# %%
from gptoss.one_page import SENTENCE, sentence


def bf16(*tensors):
    return (tensor.bfloat16() for tensor in tensors)


def routed(logits, k):
    shares, ids = OPS.route(logits.bfloat16(), k)
    return shares.float(), ids


retold = sentence(
    12, route=routed,
    rms_norm=lambda x, w, eps: OPS.rms_norm(*bf16(x, w), eps).float(),
    rope=lambda *given: OPS.rope(*bf16(*(x[None] for x in given)))[0].float())
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Takeaways
#
# - A small kernel is a loop over rows in fp32, between one conversion on entry
#   and one rounding on exit.
# - It saves calls, not arithmetic: more than a thousand a token become 121.
# - It looks at every size before it reads, refuses what cannot be right, and
#   leaves to plain torch what it was not made for.
# - Beside each kernel stands a slow twin that a reader can check.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The kernel of RoPE rounds to bf16 once, at its end. Plain torch computes in
# the type that it is given, so it rounds every product, and their sum, too.
# How far is each from float64?

# %% tags=["hide-cell"]
x, cos, sin = some(2, 30, 4, 64), some(2, 30, 32), some(2, 30, 32)
one, two = x.chunk(2, -1)
c, s = cos[:, :, None], sin[:, :, None]
careless = torch.cat([one * c - two * s, two * c + one * s], -1)
one, two = np.split(wide(x), 2, -1)
exact = np.concatenate([one * wide(c) - two * wide(s),
                        two * wide(c) + one * wide(s)], -1)
for words, y in (("one rounding", OPS.rope(x, cos, sin)),
                 ("every product rounded", careless)):
    off = np.linalg.norm(wide(y) - exact) / np.linalg.norm(exact)
    print(f"{words:21} {off:.4f} from float64")
assert off > 1e-3

# %% [markdown]
# ### Exercise 2
#
# What do the operators make of a weight that is as long as no row, of x in
# float32, and of no rows at all? Predict, then try.

# %% tags=["hide-cell"]
try:
    OPS.rms_norm(some(3, 96), some(95), 1e-5)
except RuntimeError as error:
    print("refused:", type(error).__name__)
y = OPS.rms_norm(some(3, 96).float(), some(96).float(), 1e-5)
print("float32 gives", y.dtype, "from plain torch")
print("no rows give", tuple(OPS.rms_norm(some(0, 96), some(96), 1e-5).shape))

# %% [markdown]
# ### Exercise 3
#
# `share` lets threads take pieces as they come. Ten pieces take 1 ms each but
# for the third, which takes 5. How long do two threads need with an equal
# split in order, and how long if each takes the next piece when it is free?
# What if the long piece comes last?

# %% tags=["hide-cell"]
def time_of(pieces: list[int], threads: int = 2) -> int:
    """Milliseconds until all is done, the next piece to whoever is free."""
    busy = [0] * threads
    for piece in pieces:
        busy[busy.index(min(busy))] += piece
    return max(busy)


pieces = [1, 1, 5, *[1] * 7]
equal = max(sum(pieces[:5]), sum(pieces[5:]))
print(f"equal split {equal} ms, as they come {time_of(pieces)}, with the long "
      f"one last {time_of([1] * 9 + [5])}: so begin with the longest")
assert time_of(pieces) < equal

# %% [markdown]
# ## Sources
#
# - pytorch/pytorch, `aten/src/ATen/Parallel.h` and `torch/library.h`.
# - RMSNorm: {cite}`rmsnorm2019`. RoPE: {cite}`rope2021`.
# - Cephes, `exp`: the two parts of $\log 2$, https://www.netlib.org/cephes
