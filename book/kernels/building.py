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
#     module: build
#     public: [KernelError, kernel_path, load_kernels, plain_torch]
# ---

# %% [markdown]
# # How does C++ come under an operator?
#
# ## Question
#
# How can a model that was written without it compute with C++, and not know?
# RMSNorm in plain torch is ten calls of operators, RoPE twelve; for a token of
# the 20b, which passes 49 norms and 48 rotations, the calls cost more than the
# arithmetic. Here one function each takes their place, below the
# [operators](../model/operators.ipynb) that the model asks for by name. The
# functions are a page; the rest is what must be true before a machine may run
# them: a compiler called once, a file that nobody can slip in, a switch.

# %% [markdown]
# ## The naive version
#
# The three smallest operators of the model in plain torch, for one token of
# the 20b. torch can be asked which of its own operators they call:

# %%
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.attention.rope import apply_rope
from gptoss.model.norm import rms_norm
from gptoss.moe.routing import route


class Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


torch.manual_seed(0)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


small = {"rms_norm": (rms_norm, some(1, 1, 2880), some(2880), 1e-5),
         "rope": (apply_rope, some(1, 1, 64, 64), some(1, 1, 32),
                  some(1, 1, 32)),
         "route": (route, some(1, 32), 4)}
for name, (function, *arguments) in small.items():
    with torch.inference_mode(), Count() as count:
        function(*arguments)
    print(f"{name:8} {count.number:2} calls")

# %% [markdown]
# ## Code
#
# ### Vectors
#
# The C++ of this part stands in its chapters as the Python does: the fenced
# blocks are the files `gptoss/kernels/*.h`, the *parts* of one program. The
# compiler reads them one after the other, in the order of the list `PARTS`
# (below), and each uses only what stands before it: so the first few are a
# program as well, and each chapter compiles those up to its own and tries its
# own kernel. In two places that order is not the order of reading. What is
# written for AVX-512, VNNI or NEON stands in parts of its own, `wide.h` and
# `wide16.h`, which are an [appendix](../cli/wide.ipynb); others use them, so
# they are compiled before they are read. And the struct `Compact` in
# `experts.h` is there for `wide16.h`; it is explained
# [where it is used](twelve_bits.ipynb).
#
# A *register* is where a processor keeps what it computes with. One for
# vectors holds 16, 32 or 64 bytes, and an instruction does the same to all
# numbers in it at once. Where no special instruction is needed, a part uses
# the vector types of GCC and Clang: `Floats` behaves like eight floats, and
# the compiler finds the instructions of the processor at hand. Where those of
# AVX2, AVX-512 or NEON are needed, it says so, and a portable loop stands
# beside them.

# %% [markdown] tags=["export:base.h"]
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
# ### The operators
#
# A kernel serves bf16 on the CPU, the type of the released weights. Anything
# else goes to the same operator in plain torch, which the Python side declares
# as `gptoss::plain_…`: whoever asks for float32 gets float32. The switch that
# turns the kernels off is a thread's own. All this is needed by every operator
# and so stands in the first part, `base.h`; each operator is registered at the
# end of the part that computes it.

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

# %% [markdown]
# A kernel reads memory by the sizes that it was told, so it looks at all of
# them first; that takes no time that could be measured. What cannot be right
# in any form is refused by name. Everything else that the kernel is not made
# for (a size of zero, a bias that torch would stretch) is left to plain
# torch, which computes it or refuses it: either way both paths do the same,
# and a test throws wrong shapes at both.

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
# Training goes on as before: where a gradient is asked for, the operators
# never come to a kernel, or have a formula of their own. What is left of the
# first part is the name of what was compiled, and the switch.

# %% [markdown] tags=["export:base.h"]
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
# ### Three small ones
#
# Now the three of the beginning, each a loop over rows, in fp32 between one
# conversion on entry and one on exit. Half-split pairs are those of
# [RoPE](../attention/rope.ipynb).

# %% [markdown] tags=["export:small.h"]
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
# // x (..., H, C) turned by tables (..., C/2), half-split
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
# The choice, of equal logits the first as in
# [routing](../moe/routing.ipynb), and NaN before everything, as torch has it:

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
# What torch calls looks at what it was given, and computes or leaves it to
# plain torch. The last block is what the chapter's title asks for: it puts the
# functions under the operators' names, for tensors on the CPU.

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

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
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
# ### Which path is in use
#
# Loading the library registers the kernels. When? The table of what answers in
# `model/answers` names `load_kernels`, so whoever makes a model or computes
# first loads them, by whatever import he came, and every thread that comes
# meanwhile waits. `GPTOSS_KERNELS=torch` in the environment declines; the
# book's chapters are run so, or the earlier ones would show something else
# than they say.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% [markdown]
# ## It holds
#
# This process declines, and loads a smaller library by itself: `base` and
# `small`, three kernels, built or found without a word. **Beside each kernel
# stands a twin**: the definition in numpy and float64, on the same inputs. One
# rounding to bf16 moves a number by 1/256 of its size at most. (Without a
# compiler plain torch answers; it has to be as near.)

# %%
import numpy as np

import gptoss.model.ops  # noqa: F401  declares the operators

os.environ["GPTOSS_KERNELS"] = "torch"
print(load_kernels(), "|", kernel_path())
_log.setLevel(logging.ERROR)
with suppress(KernelError):
    torch.ops.load_library(str(build(parts=PARTS[:2])))
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
odd = torch.tensor([[1.0, 2.0, 2.0, float("nan")]]).bfloat16()
print(OPS.route(odd, 3)[1].tolist(), route(odd, 3)[1].tolist())

# %% [markdown]
# **Gradients** are those of plain torch: the same bits, since where one is
# asked for the kernel steps aside.

# %%
x, weight = some(7, 96).requires_grad_(), some(96).requires_grad_()
grads = [torch.autograd.grad(norm(x, weight, 1e-5).float().square().sum(),
                             (x, weight)) for norm in (OPS.rms_norm, rms_norm)]
assert all(map(torch.equal, *grads))
print(*(f"{grad.float().norm():.1f} {plain.float().norm():.1f}"
        for grad, plain in zip(*grads, strict=True)), sep=" and ")

# %% [markdown]
# ## Takeaways
#
# - Kernels belong below operators: the model names what it wants, the device
#   decides how, and plain torch serves whatever a kernel was not made for.
# - A compiled file is named by a hash of all that it depends on, and loaded
#   only from a folder that is the user's own, if it is whole.
# - Beside each kernel stands a slow twin that a reader can check.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A power cut shortens the library by a byte. What do `_sound` and `build` make
# of it? Try the first on a file of zeros with its seal.

# %% tags=["hide-cell"]
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "kernels-x.so"
    file.write_bytes(bytes(1000))
    file.chmod(0o700)
    file.with_suffix(".sha256").write_text(_seal(file))
    whole = _sound(file)
    file.write_bytes(bytes(999))
    print("whole:", whole, "| cut:", _sound(file), "| build compiles anew")
    assert whole and not _sound(file)

# %% [markdown]
# ## Sources
#
# - pytorch/pytorch, `aten/src/ATen/core/dispatch/` and `torch/library.h`: how
#   a kernel is put under an operator.
# - Where a user's cache lies: https://specifications.freedesktop.org/basedir
# - GCC's vector types:
#   https://gcc.gnu.org/onlinedocs/gcc/Vector-Extensions.html
