// What does a first kernel look like?
// Generated from book/kernels/first_three.py; edit the chapter, not this file.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <span>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && !defined(GPTOSS_PORTABLE)
#include <immintrin.h>
#define GPTOSS_AVX2 1
#if !defined(GPTOSS_NARROW) && defined(__AVX512VNNI__) \
    && defined(__AVX512BW__) && defined(__AVX512VL__)
#define GPTOSS_AVX512 1
#ifdef __AVX512BF16__
#define GPTOSS_BF16 1
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define GPTOSS_AMX 1
#endif
#endif
#elif !defined(GPTOSS_NARROW) && defined(__AVXVNNI__)
#define GPTOSS_VNNI 1
#endif
#elif defined(__aarch64__) && !defined(GPTOSS_PORTABLE)
#include <arm_neon.h>
#define GPTOSS_NEON 1
#endif

namespace {

using at::Tensor;
using Number = at::BFloat16;  // what weights and activations are stored in
// memory at a multiple of 64 bytes, since a register of 64 bytes that
// straddles two lines of a cache costs two loads; large pieces are kept
template <class T>
struct Aligned {
  using value_type = T;

  T* allocate(size_t n) {
    return static_cast<T*>(pool().take(n * sizeof(T)));
  }
  void deallocate(T* p, size_t n) { pool().give(n * sizeof(T), p); }
  template <class U>
  bool operator==(const Aligned<U>&) const { return true; }
};
template <class T>
using Array = std::vector<T, Aligned<T>>;
using Buffer = Array<float>;
using Floats = float __attribute__((vector_size(32)));  // eight at a time
using Ints = int32_t __attribute__((vector_size(32)));

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats widen(const Number* eight) {
#ifdef GPTOSS_AVX2  // GCC makes six instructions of what stands below
  return (Floats)((Ints)_mm256_cvtepu16_epi32(load<__m128i>(eight)) << 16);
#else
  using Halves = uint16_t __attribute__((vector_size(16)));
  return (Floats)(__builtin_convertvector(load<Halves>(eight), Ints) << 16);
#endif
}

// where the compiler's own judgement was measured to be slower
#define INLINE __attribute__((always_inline))

// v stands in a register here: the compiler may not read it again from
// memory later, nor compute ahead what follows
template <class Vector>
inline void hold(Vector& v) {
#ifdef __AVX512VL__
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#endif
}

inline float sum(Floats v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  return v[0] + v[2];
}

// work(0) ... work(count - 1) on all threads, `grain` at a time to whoever
// is free
template <class Work>
void share(int64_t count, int64_t grain, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(grain)) < count;)
      for (int64_t j = i; j < std::min(i + grain, count); ++j) work(j);
  });
}

const Number* numbers(const Tensor& x) {
  return static_cast<const Number*>(x.const_data_ptr());
}

// the nearest bf16 numbers, of two equally near the even one; NaN: 0x7fc0
inline void narrow(Floats x, Number* eight) {
  using Halves = uint16_t __attribute__((vector_size(16)));
  const Ints bits = (Ints)x;
  const Ints up = bits + 0x7fff + (bits >> 16 & 1);
  const Ints near = x == x ? up >> 16 : Ints{} + 0x7fc0;
  const Halves halves = __builtin_convertvector(near, Halves);
  std::memcpy(eight, &halves, sizeof halves);
}

template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Number>)
      for (; begin + 8 <= end; begin += 8)
        narrow(load<Floats>(from + begin), to + begin);
    std::copy(from + begin, from + end, to + begin);
  });
}

// an empty tensor for this call alone, whose memory the next one takes again
Tensor scratch(at::IntArrayRef sizes, at::ScalarType type) {
  const size_t bytes = c10::multiply_integers(sizes)
                       * c10::elementSize(type);
  return at::from_blob(pool().take(bytes), sizes, [bytes](void* at) {
    pool().give(bytes, at);
  }, type);
}

Buffer floats(const Tensor& x) {
  const Tensor flat = x.contiguous();
  Buffer to(flat.numel());
  convert(numbers(flat), flat.numel(), to.data());
  return to;
}

constexpr int64_t STREAMS = 4;     // rows that are read at the same time
constexpr int64_t AHEAD = 2048;  // bytes
#ifdef GPTOSS_BF16  // for few tokens that is far enough, and quicker
constexpr int64_t NEAR = 1024;
#else
constexpr int64_t NEAR = AHEAD;
#endif
constexpr int64_t LEAN = 2;  // tokens, at most, whose dense rows ask so

// asks memory for what will be needed, into the second cache: there more may
// be under way than into the first, and nothing in use is driven out
inline void ask(const void* address) { __builtin_prefetch(address, 0, 2); }

inline void ask_ahead(const void* from, int64_t bytes = AHEAD) {
  ask(static_cast<const char*>(from) + bytes);
}

thread_local bool enabled = true;

bool ours(std::initializer_list<Tensor> numbers) {  // bf16, on by default
  bool all = enabled;
  for (const Tensor& x : numbers) all &= x.scalar_type() == at::kBFloat16;
  return all;
}

bool packed(std::initializer_list<Tensor> bytes) {
  bool all = true;
  for (const Tensor& x : bytes)
    all &= x.scalar_type() == at::kByte && x.is_contiguous();
  return all;
}

bool whole(std::initializer_list<Tensor> ids) {
  bool all = true;
  for (const Tensor& x : ids) all &= x.scalar_type() == at::kLong;
  return all;
}

// the same operator in plain torch: gptoss::plain_NAME
template <class Signature, class... Arguments>
auto plain(const char* name, const Arguments&... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("gptoss::plain_") + name).c_str(), "")
      .typed<Signature>()
      .call(arguments...);
}

Tensor result(const Tensor& x, int64_t width, const Buffer& values) {
  auto shape = x.sizes().vec();
  shape.back() = width;
  Tensor y = at::empty(shape, x.options());
  TORCH_INTERNAL_ASSERT(y.numel() == int64_t(values.size()));
  convert(values.data(), values.size(), static_cast<Number*>(y.data_ptr()));
  return y;
}

void add_bias(Buffer& y, const std::optional<Tensor>& bias) {
  if (!bias) return;
  const Buffer b = floats(*bias);
  const int64_t m = b.size();
  at::parallel_for(0, y.size() / m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < m; ++i) y[row * m + i] += b[i];
  });
}

bool has(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return x.sizes() == at::IntArrayRef(sizes);
}

// x (..., n) beside a weight (m, n), a bias (m,) or one to be stretched
void check_linear(const char* name, const Tensor& x, int64_t m, int64_t n,
                  const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.dim() && x.size(-1) == n, name, ": x: expected (..., ", n,
              ") beside a weight (", m, ", ", n, "), found ", x.sizes());
  TORCH_CHECK(!bias || bias->dim() != 1 || m < 2 || bias->size(0) == m
                  || bias->size(0) == 1,
              name, ": bias: expected (", m, "), found ", bias->sizes());
}

#if defined(GPTOSS_BF16)
constexpr char NAME[] = "C++ with AVX-512 and bf16";
#elif defined(GPTOSS_AVX512)
constexpr char NAME[] = "C++ with AVX-512 and VNNI";
#elif defined(GPTOSS_VNNI)
constexpr char NAME[] = "C++ with AVX2 and VNNI";
#elif defined(GPTOSS_AVX2)
constexpr char NAME[] = "C++ with AVX2";
#elif defined(GPTOSS_NEON)
constexpr char NAME[] = "C++ with NEON";
#else
constexpr char NAME[] = "portable C++";
#endif

bool lent() {  // AMX's registers, to this process
#ifdef GPTOSS_AMX
  constexpr long ASK = 0x1023, REGISTERS = 18;
  static const bool answer = !syscall(SYS_arch_prctl, ASK, REGISTERS);
  return answer;
#else
  return false;
#endif
}

TORCH_LIBRARY_FRAGMENT(gptoss, m) {
  m.def("kernels_name() -> str", [] {
    return std::string(lent() ? "C++ with AVX-512 and AMX" : NAME);
  });
  m.def("enable_kernels(bool on) -> bool", [](bool on) {
    std::swap(on, enabled);
    return on;  // as it was before, in this thread
  });
  m.def("kernels_on() -> bool", [] { return enabled; });
}

}  // namespace
