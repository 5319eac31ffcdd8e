// Four bits at full speed
// Generated from book/13_kernels.py; edit the chapter, not this file.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
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
using Buffer = std::vector<float>;
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

Buffer floats(const Tensor& x) {
  const Tensor flat = x.contiguous();
  Buffer to(flat.numel());
  convert(numbers(flat), flat.numel(), to.data());
  return to;
}

constexpr int64_t BLOCK = 32;
#ifdef GPTOSS_AVX512
constexpr int64_t SIDE = 4;  // blocks in a register
#elif defined(GPTOSS_AVX2)
constexpr int64_t SIDE = 2;
#else
constexpr int64_t SIDE = 1;
#endif
constexpr int64_t LANES = 4 * SIDE;  // 32-bit numbers in a register

struct Line {
  int16_t values[2][BLOCK / 2];  // a block's even elements, its odd ones
};

struct alignas(64) Group {
  int8_t digits[2][2][SIDE][16];  // the high ones, the low ones; even, odd
  int32_t offset[SIDE][4];        // -12 times the sum over four bytes
};

// rows of 16-bit integers, and for each block half the step between them
struct Quantised {
  int64_t blocks, per_row;  // groups: blocks / SIDE, rounded up
  std::vector<Line> lines;
  std::vector<Group> groups;
  Buffer halves;  // a row of them is filled up to whole registers

  Quantised(int64_t rows, int64_t blocks)
      : blocks(blocks), per_row((blocks + SIDE - 1) / SIDE),
        lines(rows * blocks), groups(SIDE > 1 ? rows * per_row : 0),
        halves(rows * per_row * SIDE + LANES) {}

  Line* line(int64_t n) { return &lines[n * blocks]; }
  float* half(int64_t n) { return &halves[n * per_row * SIDE]; }
  const Line* line(int64_t n) const { return &lines[n * blocks]; }
  const float* half(int64_t n) const {
    return &halves[n * per_row * SIDE];
  }
};

inline float largest(const Floats (&part)[4]) {
  Floats top = {};
  for (Floats x : part) {
    Floats size = (Floats)((Ints)x & 0x7fffffff);
    top = size > top ? size : top;
  }
  float found = 0;
  for (int i = 0; i < 8; ++i) found = std::max(found, top[i]);
  return found;
}

constexpr float MOST = 127 * 256 + 127;

// the step between integers: a power of two for what was stored in bf16,
// whose largest is then at most 255 * 2**6; otherwise the finest
inline float step(float largest, bool stored) {
  if (!stored) return largest / MOST;
  const uint32_t exponent = load<uint32_t>(&largest) & 0x7f800000;
  return load<float>(&exponent) / 8192;
}

using Reals = float __attribute__((vector_size(128)));  // of a block
using Whole = int32_t __attribute__((vector_size(128)));
using Shorts = int16_t __attribute__((vector_size(64)));
using Digits = int8_t __attribute__((vector_size(32)));

// q = 256 * high + low, both in -128 ... 127, for the block in that place
inline void split(Shorts q, int64_t place, Group& to) {
  const Digits digits[] = {__builtin_convertvector((q + 128) >> 8, Digits),
                           __builtin_convertvector(q, Digits)};
  for (int d = 0; d < 2; ++d)
    for (int odd = 0; odd < 2; ++odd)
      std::memcpy(to.digits[d][odd][place],
                  reinterpret_cast<const char*>(&digits[d]) + 16 * odd, 16);
  for (int i = 0; i < 16; ++i)
    to.offset[place][i / 4] -= 12 * (q[i] + q[16 + i]);
}

void quantise(const float* x, bool stored, int64_t n, Quantised& to) {
  for (int64_t b = 0; b < to.blocks; ++b, x += BLOCK) {
    Floats part[4], odd = {};
    for (int i = 0; i < 4; ++i) {
      part[i] = load<Floats>(x + 8 * i);
      odd += 0 * part[i];  // NaN if one of them is NaN or infinite
    }
    const float scale = step(largest(part), stored);
    const float up = scale > 1e-37f ? 1 / scale : 0;
    // adding 1.5 * 2**23 leaves the nearest integer in the low bits
    const auto all = (Whole)(load<Reals>(x) * up + 12582912.0f);
    const Shorts near = __builtin_convertvector(all - 0x4b400000, Shorts);
    const Shorts q = __builtin_shufflevector(
        near, near,
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    std::memcpy(to.line(n)[b].values, &q, sizeof q);
    to.half(n)[b] = scale / 2 + sum(odd);
    if (SIDE > 1) split(q, b % SIDE, to.groups[n * to.per_row + b / SIDE]);
  }
}

Quantised quantised(const Buffer& x, bool stored, int64_t rows,
                    int64_t blocks) {
  Quantised q(rows, blocks);
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      quantise(&x[n * blocks * BLOCK], stored, n, q);
  });
  return q;
}

inline float power(uint8_t scale) {  // 2 ** (scale - 127); NaN for 255
  // a scale byte is a float's exponent field; that of 0 is subnormal
  const uint32_t bits = std::max(uint32_t(scale) << 23, 1u << 22);
  const float value = load<float>(&bits);
  return value + 0 * value;  // infinity becomes NaN
}

constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12,
                              0, -1, -2, -3, -4, -6, -8, -12};

#if !defined(GPTOSS_AVX2) && !defined(GPTOSS_NEON)
// out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
template <int R>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, int64_t n, float* out) {
  for (int r = 0; r < R; ++r, out += step) {
    *out = 0;
    for (int64_t b = 0; b < x.blocks; ++b) {
      const int64_t at = r * step * x.blocks + b;
      const auto& [even, odd] = x.line(n)[b].values;
      int32_t s = 0;
      for (int i = 0; i < 16; ++i)
        s += TWICE[w[16 * at + i] & 15] * even[i]
             + TWICE[w[16 * at + i] >> 4] * odd[i];
      *out += s * (power(scales[at]) * x.half(n)[b]);
    }
  }
}
#endif

#ifdef GPTOSS_AVX2
constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // TWICE + 12
                               12, 11, 10, 9, 8, 6, 4, 0};
using Sums = float __attribute__((vector_size(16 * SIDE)));
using Words = int32_t __attribute__((vector_size(16 * SIDE)));
using Pairs = uint16_t __attribute__((vector_size(16 * SIDE)));
using Digit = int8_t[2][SIDE][16];  // of even elements, of odd ones

#ifdef GPTOSS_AVX512
using Bytes = __m512i;

inline Bytes table() {
  return _mm512_broadcast_i32x4(load<__m128i>(ABOVE));
}

inline Bytes look_up(Bytes values, Bytes nibbles) {
#ifdef __AVX512VBMI__
  return _mm512_permutexvar_epi8(nibbles, values);
#else
  return _mm512_shuffle_epi8(
      values, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
#endif
}

inline Bytes add_bytes(Bytes sums, Bytes a, const int8_t (&x)[SIDE][16]) {
  return _mm512_dpbusd_epi32(sums, a, load<Bytes>(x));
}
#else
using Bytes = __m256i;

inline Bytes table() {
  return _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
}

inline Bytes look_up(Bytes values, Bytes nibbles) {
  return _mm256_shuffle_epi8(
      values, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}

#ifdef GPTOSS_VNNI
inline Bytes add_bytes(Bytes sums, Bytes a, const int8_t (&x)[SIDE][16]) {
  return _mm256_dpbusd_avx_epi32(sums, a, load<Bytes>(x));
}
#endif
#endif

// sums + UNIT * (a times digits of even elements, b times those of odd
// ones, of four neighbours each); UNIT: 1 or 256
template <int UNIT>
inline Words products(Words sums, Bytes a, Bytes b, const Digit& x) {
#if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
  if (UNIT == 1)
    return (Words)add_bytes(add_bytes((Bytes)sums, a, x[0]), b, x[1]);
  return sums + ((Words)add_bytes(add_bytes(Bytes{}, a, x[0]), b, x[1])
                 << 8);
#else
  const Bytes two = _mm256_add_epi16(
      _mm256_maddubs_epi16(a, load<Bytes>(x[0])),
      _mm256_maddubs_epi16(b, load<Bytes>(x[1])));
  return sums + (Words)_mm256_madd_epi16(two, _mm256_set1_epi16(UNIT));
#endif
}

// SIDE blocks of weights times a group: a lane sums what four bytes give
inline Sums dots(Bytes bytes, const Group& x, Bytes values) {
  const Bytes a = look_up(values, bytes);
  const Bytes b = look_up(values, (Bytes)((Pairs)bytes >> 4));
  const Words low = products<1>(load<Words>(x.offset), a, b, x.digits[1]);
  return __builtin_convertvector(products<256>(low, a, b, x.digits[0]),
                                 Sums);
}

#ifdef GPTOSS_AVX512
inline __mmask16 first(int64_t count) { return (1u << count) - 1; }

inline Words load_scales(const uint8_t* from, int64_t count, bool) {
  return (Words)_mm512_cvtepu8_epi32(
      _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count), from));
}

inline Bytes load_blocks(const uint8_t* from, int64_t count) {
  return count < SIDE ? _mm512_maskz_loadu_epi32(first(4 * count), from)
                      : load<Bytes>(from);
}

inline Sums arrange(Sums v) { return v; }

// the factors of group g, each in four lanes
inline Sums spread(Sums factors, int g) {
  const Words place = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (Sums)_mm512_permutexvar_ps((Bytes)(place + 4 * g),
                                     (__m512)factors);
}

inline float sum(Sums v) {
  const __m512d both = _mm512_castps_pd((__m512)v);
  return sum((Floats)_mm512_castpd512_pd256(both)
             + (Floats)_mm512_extractf64x4_pd(both, 1));
}
#else
// blocks 0, 2, 4, 6 and then 1, 3, 5, 7; more: others stand before them
inline Words load_scales(const uint8_t* from, int64_t count, bool more) {
  uint64_t eight = 0x7f7f7f7f7f7f7f7f;
  if (count == LANES)
    eight = load<uint64_t>(from);
  else if (more)
    eight = eight << 8 * count
            | load<uint64_t>(from + count - LANES) >> 8 * (LANES - count);
  else
    for (int64_t i = count; i--;) eight = eight << 8 | from[i];
  return (Words)_mm256_cvtepu8_epi32(_mm_shuffle_epi8(
      _mm_cvtsi64_si128(eight), _mm_cvtsi64_si128(0x0705030106040200)));
}

inline Sums arrange(Sums v) {  // in the same order
  return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
}

inline Bytes load_blocks(const uint8_t* from, int64_t count) {
  return count < SIDE ? _mm256_zextsi128_si256(load<__m128i>(from))
                      : load<Bytes>(from);
}

// number g of either half, in four lanes
inline Sums spread(Sums factors, int g) {
  return (Sums)_mm256_permutevar_ps((__m256)factors, _mm256_set1_epi32(g));
}
#endif

// 2 ** (scale - 127) times half the step; infinity for 255
inline Sums factors(Words scales, Sums halves) {
  const Words bits = scales << 23;
  const Words least = Words{} + (1 << 22);
  return (Sums)(bits > least ? bits : least) * halves;
}

// out[0], out[step] ...: R rows of a weight, `step` rows apart, times row n
template <int R>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, int64_t n, float* out) {
  const Bytes values = table();
  const int64_t blocks = x.blocks, row = step * blocks;
  const Group* group = &x.groups[n * x.per_row];
  const float* halves = x.half(n);
  Sums total[R] = {}, factor[R];
  auto make_factors = [&](int64_t b, int64_t count) {
    const Sums half = arrange(load<Sums>(halves + b));
    for (int r = 0; r < R; ++r)
      factor[r] = factors(load_scales(scales + r * row + b, count, b > 0),
                          half);
  };
  auto add = [&](int64_t b, int g, int64_t count) {  // group g from b on
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = w + 16 * (r * row + b + g * SIDE);
      __builtin_prefetch(at + 256);
      Bytes bytes = load_blocks(at, count - g * SIDE);
      hold(bytes);
      total[r] += dots(bytes, group[g], values) * spread(factor[r], g);
    }
  };
  int64_t b = 0;
  for (; b + LANES <= blocks; b += LANES, group += 4) {
    make_factors(b, LANES);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) add(b, g, LANES);
  }
  if (b < blocks) make_factors(b, blocks - b);
  for (int g = 0; b + g * SIDE < blocks; ++g) add(b, g, blocks - b);
  for (int r = 0; r < R; ++r) {
    const float y = sum(total[r]);
    out[r * step] = y + 0 * y;  // infinity becomes NaN
  }
}
#endif

#ifdef GPTOSS_NEON
inline int32x4_t dots(uint8x16_t bytes, const Line& x, int8x16_t values) {
  int32x4_t s = {}, t = {};
  auto add = [&](uint8x16_t nibbles, const int16_t* q) {
    const int8x16_t w = vqtbl1q_s8(values, nibbles);
    const int16x8_t half[] = {vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w)};
    for (int i = 0; i < 2; ++i) {
      const int16x8_t eight = vld1q_s16(q + 8 * i);
      s = vmlal_s16(s, vget_low_s16(half[i]), vget_low_s16(eight));
      t = vmlal_high_s16(t, half[i], eight);
    }
  };
  add(vandq_u8(bytes, vdupq_n_u8(15)), x.values[0]);
  add(vshrq_n_u8(bytes, 4), x.values[1]);
  return vaddq_s32(s, t);
}

template <int R>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, int64_t n, float* out) {
  const int8x16_t values = vld1q_s8(TWICE);
  float32x4_t total[R] = {};
  for (int64_t b = 0; b < x.blocks; ++b)
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * step * x.blocks + b;
      __builtin_prefetch(w + 16 * at + 512);
      const int32x4_t part = dots(vld1q_u8(w + 16 * at), x.line(n)[b],
                                  values);
      total[r] = vfmaq_n_f32(total[r], vcvtq_f32_s32(part),
                             power(scales[at]) * x.half(n)[b]);
    }
  for (int r = 0; r < R; ++r) out[r * step] = vaddvq_f32(total[r]);
}
#endif

#ifdef GPTOSS_AVX2
constexpr int64_t CHUNK = 10;  // blocks: 10 KiB of integers, a third of L1

struct Tile {  // 16 rows of a weight, pairs of columns side by side
  alignas(64) int16_t values[CHUNK][2][8][16][2];
  alignas(64) float factors[CHUNK][16];
};

// sixteen rows of sixteen bytes become sixteen columns
inline void transpose(__m128i (&v)[16]) {
  for (int step = 0; step < 4; ++step) {
    __m128i t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
      t[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
    }
    std::copy(t, t + 16, v);
  }
}

void decode_tile(const uint8_t* w, const uint8_t* scales, int64_t blocks,
                 int64_t count, Tile& tile) {
  const __m128i values = load<__m128i>(TWICE), low = _mm_set1_epi8(15);
  for (int64_t b = 0; b < count; ++b) {
    __m128i v[16];
    for (int64_t r = 0; r < 16; ++r) {
      v[r] = load<__m128i>(w + (r * blocks + b) * 16);
      tile.factors[b][r] = power(scales[r * blocks + b]);
    }
    transpose(v);
    for (int u = 0; u < 2; ++u)  // low nibbles, high nibbles
      for (int m = 0; m < 8; ++m) {
        __m128i two[2];
        for (int i = 0; i < 2; ++i) {
          __m128i bytes = v[2 * m + i];
          bytes = u ? _mm_srli_epi16(bytes, 4) : bytes;
          two[i] = _mm_shuffle_epi8(values, _mm_and_si128(bytes, low));
        }
        auto to = reinterpret_cast<__m256i*>(tile.values[b][u][m]);
        to[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(two[0], two[1]));
        to[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(two[0], two[1]));
      }
  }
}

constexpr int TOKENS = 5;  // ten sums, two weights, one activation

struct Few {  // tokens that are multiplied with a tile together
  const Line* lines[TOKENS];
  const float* halves[TOKENS];
  float* out[TOKENS];  // 16 sums each
};

// sums, plus sixteen products added in pairs
inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
#ifdef GPTOSS_AVX512
  return _mm256_dpwssd_epi32(sums, a, b);
#elif defined(GPTOSS_VNNI)
  return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

// adds blocks first ... first + count - 1 of 16 rows to the tokens' sums
void multiply_tile(const Tile& tile, const Few& few, int64_t first,
                   int64_t count) {
  for (int64_t b = 0; b < count; ++b) {
    __m256i s[TOKENS][2] = {};
    for (int u = 0; u < 2; ++u)
      for (int m = 0; m < 8; ++m) {
        auto w = reinterpret_cast<const __m256i*>(tile.values[b][u][m]);
        const __m256i w0 = w[0], w1 = w[1];
        for (int t = 0; t < TOKENS; ++t) {
          const __m256i x = _mm256_set1_epi32(load<int32_t>(
              &few.lines[t][first + b].values[u][2 * m]));
          s[t][0] = add_products(s[t][0], w0, x);
          s[t][1] = add_products(s[t][1], w1, x);
          hold(s[t][0]), hold(s[t][1]);
        }
      }
    for (int t = 0; t < TOKENS; ++t)
      for (int half = 0; half < 2; ++half) {
        float* to = few.out[t] + 8 * half;
        const Floats f = load<Floats>(&tile.factors[b][8 * half])
                         * few.halves[t][first + b];
        store(to, load<Floats>(to)
                  + (Floats)_mm256_cvtepi32_ps(s[t][half]) * f);
      }
  }
}
#endif

struct Packed {  // (E, rows, blocks, 16) bytes and (E, rows, blocks) scales
  const uint8_t *bytes, *scales;
  int64_t rows, blocks;

  Packed(const Tensor& b, const Tensor& s)
      : bytes(b.const_data_ptr<uint8_t>()),
        scales(s.const_data_ptr<uint8_t>()), rows(s.size(-2)),
        blocks(s.size(-1)) {}
};

// a pick is one choice of one token; those of expert e are
// order[begin[e]] ... order[begin[e + 1] - 1]
struct Groups {
  std::vector<int64_t> order, begin, hit;

  Groups(const int64_t* ids, int64_t picks, int64_t experts)
      : order(picks), begin(experts + 1) {
    for (int64_t i = 0; i < picks; ++i) {
      TORCH_CHECK_INDEX(0 <= ids[i] && ids[i] < experts, "expert: expected "
                        "0 to ", experts - 1, ", found ", ids[i]);
      ++begin[ids[i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      if (begin[e + 1]) hit.push_back(e);
      begin[e + 1] += begin[e];
    }
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < picks; ++i) order[next[ids[i]]++] = i;
  }
};

constexpr int64_t ROWS = 16, FEW = 4;  // fewer tokens than FEW: no tile
constexpr int64_t TALL = 256;          // rows of a piece of work for those

// out[i][0 ... rows - 1]: those rows times the token in inputs[i], by rows
void rows_for_few(const uint8_t* w, const uint8_t* scales, int64_t rows,
                  const Quantised& x, const std::vector<int64_t>& inputs,
                  float* out) {
  const int64_t blocks = x.blocks, step = rows / 4;
  auto run = [&](auto dots, int64_t r) {
    for (size_t i = 0; i < inputs.size(); ++i)
      dots(w + 16 * r * blocks, scales + r * blocks, step, x, inputs[i],
           out + i * rows + r);
  };
  for (int64_t r = 0; r < step; ++r) run(packed_dots<4>, r);
  for (int64_t r = 4 * step; r < rows; ++r) run(packed_dots<1>, r);
}

#ifdef GPTOSS_AVX2
// the same for sixteen rows and many tokens, by a tile
void rows_for_many(const uint8_t* w, const uint8_t* scales,
                   const Quantised& x, const std::vector<int64_t>& inputs,
                   float* out) {
  const int64_t count = inputs.size(), blocks = x.blocks;
  Tile tile;
  std::fill_n(out, count * ROWS, 0.0f);
  for (int64_t b = 0; b < blocks; b += CHUNK) {
    const int64_t some = std::min(CHUNK, blocks - b);
    decode_tile(w + 16 * b, scales + b, blocks, some, tile);
    for (int64_t i = 0; i < count; i += TOKENS) {
      float spare[ROWS] = {};  // the last group may have empty places
      Few few;
      for (int64_t t = 0; t < TOKENS; ++t) {
        const bool real = i + t < count;
        const int64_t n = inputs[real ? i + t : i];
        few.lines[t] = x.line(n);
        few.halves[t] = x.half(n);
        few.out[t] = real ? out + (i + t) * ROWS : spare;
      }
      multiply_tile(tile, few, b, some);
    }
  }
}
#endif

struct Piece {
  int64_t expert, row, rows;
};

// few tokens: tall pieces; many: tiles, and what is left below the last
std::vector<Piece> pieces(const Packed& weight, const Groups& groups) {
  std::vector<Piece> all;
  for (int64_t e : groups.hit) {
    const bool few = groups.begin[e + 1] - groups.begin[e] < FEW;
    for (int64_t r = 0, height; r < weight.rows; r += height) {
      height = std::min(few ? TALL : ROWS, weight.rows - r);
      all.push_back({e, r, height});
    }
  }
  return all;
}

// emit(pick, expert, first row, rows, sums) for every pick and piece;
// K picks in a row share one row of x
template <class Emit>
void grouped_linear(const Packed& weight, const Groups& groups,
                    const Quantised& x, int64_t K, const Emit& emit) {
  const std::vector<Piece> all = pieces(weight, groups);
  share(all.size(), 1, [&](int64_t item) {
    const auto [e, row0, rows] = all[item];
    const int64_t* picks = &groups.order[groups.begin[e]];
    const int64_t count = groups.begin[e + 1] - groups.begin[e];
    thread_local std::vector<int64_t> inputs;
    thread_local Buffer out;
    inputs.resize(count);
    for (int64_t i = 0; i < count; ++i) inputs[i] = picks[i] / K;
    out.resize(count * rows);
    const int64_t at = (e * weight.rows + row0) * weight.blocks;
    const uint8_t *w = weight.bytes + 16 * at, *s = weight.scales + at;
#ifdef GPTOSS_AVX2
    if (count >= FEW && rows == ROWS)
      rows_for_many(w, s, x, inputs, out.data());
    else
#endif
      rows_for_few(w, s, rows, x, inputs, out.data());
    for (int64_t i = 0; i < count; ++i)
      emit(picks[i], e, row0, rows, &out[i * rows]);
  });
}

// e ** x for -87 <= x <= 0, relative error below 1e-6; less gives e ** -87
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;  // x / log 2, rounded
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + factor;
  const Ints power = ((Ints)shifted - 0x4b400000) << 23;
  return (Floats)((Ints)p + power);  // times 2 ** n
}

constexpr float MAX = std::numeric_limits<float>::max();

inline Floats clamped_swiglu(Floats gate, Floats up, float limit) {
  const Floats most = Floats{} + limit, least = Floats{} - 1e4f;
  gate = gate > most ? most : gate;  // written so that NaN stays NaN
  gate = (gate < least) & (gate >= -MAX) ? least : gate;  // as good as zero
  up = up > most ? most : up < -most ? -most : up;
  const Floats t = 1.702f * gate, e = exponential(t > 0 ? -t : t);
  return (up + 1) * gate * (t > 0 ? Floats{} + 1.0f : e) / (1 + e);
}

// hidden (picks, F) of the experts' first layer
Buffer run_gate_up(const Packed& weight, const Number* bias, float limit,
                   const Groups& groups, const Quantised& x, int64_t K) {
  const int64_t F = weight.rows / 2;
  Buffer hidden(groups.order.size() * F);
  grouped_linear(weight, groups, x, K, [&](int64_t pick, int64_t e,
      int64_t row0, int64_t rows, const float* v) {
    const Number* b = bias + e * weight.rows + row0;
    float* to = &hidden[pick * F + row0 / 2];
    for (int64_t r = 0; r < rows; r += 16) {  // 2 F is a multiple of 64
      const Floats one = load<Floats>(v + r) + widen(b + r);
      const Floats two = load<Floats>(v + r + 8) + widen(b + r + 8);
      store(to + r / 2, clamped_swiglu(
          __builtin_shufflevector(one, two, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(one, two, 1, 3, 5, 7, 9, 11, 13, 15),
          limit));
    }
  });
  return hidden;
}

// y (tokens, D) of the second layer, the K results weighted and summed
Buffer run_down(const Packed& weight, const Number* bias,
                const Number* shares, const Groups& groups,
                const Quantised& hidden, int64_t K) {
  const int64_t D = weight.rows, tokens = groups.order.size() / K;
  Buffer out(tokens * K * D), y(tokens * D);
  grouped_linear(weight, groups, hidden, 1, [&](int64_t pick, int64_t e,
      int64_t row0, int64_t rows, const float* v) {
    const Number* b = bias + e * D + row0;
    float* to = &out[pick * D + row0];
    for (int64_t r = 0; r < rows; ++r) to[r] = shares[pick] * (v[r] + b[r]);
  });
  at::parallel_for(0, tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t pick = begin * K; pick < end * K; ++pick)
      for (int64_t d = 0; d < D; ++d)
        y[pick / K * D + d] += out[pick * D + d];
  });
  return y;
}

inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Ints pairs) {
  return (Floats)(pairs & int32_t(0xffff0000));
}

constexpr int64_t STREAMS = 4, AHEAD = 768;  // rows; bytes

#ifdef GPTOSS_BF16
std::vector<Number> ready(const Buffer& x) {
  std::vector<Number> to(x.size());
  convert(x.data(), x.size(), to.data());
  return to;
}

template <int R>
void dense_dots(const Number* w, int64_t step, const Number* x, int64_t n,
                float* out) {
  __m512 s[R] = {};
  for (int64_t k = 0; k < n; k += BLOCK)
    for (int r = 0; r < R; ++r)
      s[r] = _mm512_dpbf16_ps(s[r], load<__m512bh>(w + r * step * n + k),
                              load<__m512bh>(x + k));
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r]);
}
#else
// sixteen at a time, first the eight even ones, then the eight odd ones
Buffer ready(const Buffer& x) {
  Buffer to(x.size());
  for (size_t k = 0; k < x.size(); k += 16) {
    const Floats a = load<Floats>(&x[k]), b = load<Floats>(&x[k + 8]);
    store(&to[k], __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store(&to[k + 8], __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13,
                                              15));
  }
  return to;
}

// out[0], out[step] ...: R rows of w (…, n), `step` rows apart, times x
template <int R>
void dense_dots(const Number* w, int64_t step, const float* x, int64_t n,
                float* out) {
  Floats s[R][2] = {};
  for (int64_t k = 0; k < n; k += 16)
    for (int r = 0; r < R; ++r) {
      const Number* from = w + r * step * n + k;
      __builtin_prefetch(from + AHEAD / 2);
      const Ints pairs = load<Ints>(from);
      s[r][0] += even(pairs) * load<Floats>(x + k);
      s[r][1] += odd(pairs) * load<Floats>(x + k + 8);
    }
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
}
#endif

// eight rows of eight numbers become eight columns
inline void transpose(Ints (&v)[8]) {
  for (int step = 0; step < 3; ++step) {
    Ints t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10,
                                         3, 11);
      t[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13,
                                             6, 14, 7, 15);
    }
    std::copy(t, t + 8, v);
  }
}

// pairs of sixteen columns of eight rows, zero from `rows` on, as columns
inline void pair_columns(const Number* w, int64_t stride, int64_t rows,
                         Ints (&v)[8]) {
  for (int64_t r = 0; r < 8; ++r)
    v[r] = r < rows ? load<Ints>(w + r * stride) : Ints{};
  transpose(v);
}

// to[k][r] = w[r * stride + k], r < 16, zero from `rows` on; 16 divides n
void widen_tile(const Number* w, int64_t stride, int64_t rows, int64_t n,
                float* to) {
  for (int64_t half = 0; half < ROWS; half += 8)
    for (int64_t k = 0; k < n; k += 16) {
      Ints v[8];
      pair_columns(w + half * stride + k, stride, rows - half, v);
      for (int64_t j = 0; j < 8; ++j) {
        store(to + (k + 2 * j) * ROWS + half, even(v[j]));
        store(to + (k + 2 * j + 1) * ROWS + half, odd(v[j]));
      }
    }
}

template <class Pointer>
struct Matrix {  // row-major
  Pointer at;
  int64_t stride;
};
using Source = Matrix<const float*>;
using Target = Matrix<float*>;

// out[t][0 ... 15] += sum over k < n of x[t][k] * w[k][0 ... 15]
template <int COUNT>
void multiply_some(const float* w, int64_t stride, int64_t n, Source x,
                   Target out) {
  Floats s[COUNT][2];
  for (int t = 0; t < COUNT; ++t)
    for (int h = 0; h < 2; ++h)
      s[t][h] = load<Floats>(out.at + t * out.stride + 8 * h);
  for (int64_t k = 0; k < n; ++k, w += stride) {
    Floats w0 = load<Floats>(w), w1 = load<Floats>(w + 8);
    hold(w0), hold(w1);
    for (int t = 0; t < COUNT; ++t) {
      const float value = x.at[t * x.stride + k];
      s[t][0] += w0 * value;
      s[t][1] += w1 * value;
    }
  }
  for (int t = 0; t < COUNT; ++t)
    for (int h = 0; h < 2; ++h)
      store(out.at + t * out.stride + 8 * h, s[t][h]);
}

constexpr int64_t WIDE = 6;  // twelve sums, two weights, one activation

void multiply(const float* w, int64_t stride, int64_t n, Source x,
              int64_t count, Target out) {
  while (count) {
    const int64_t some = count == WIDE || count > 8 ? WIDE
                         : count >= 4 ? 4 : count >= 2 ? 2 : 1;
    const auto run = some == WIDE ? multiply_some<WIDE>
                     : some == 4  ? multiply_some<4>
                     : some == 2  ? multiply_some<2> : multiply_some<1>;
    run(w, stride, n, x, out);
    count -= some;
    x.at += some * x.stride;
    out.at += some * out.stride;
  }
}

// y (N, m) = x (N, n) times w (m, n) transposed, for a few tokens
void dense_few(const Buffer& x, int64_t N, const Number* w, int64_t m,
               int64_t n, Buffer& y) {
  constexpr int64_t HEIGHT = 128;
  const auto from = ready(x);
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    const int64_t step = rows / STREAMS;
    auto run = [&](auto dots, int64_t r) {
      for (int64_t t = 0; t < N; ++t)
        dots(w + (row0 + r) * n, step, &from[t * n], n,
             &y[t * m + row0 + r]);
    };
    for (int64_t r = 0; r < step; ++r) run(dense_dots<STREAMS>, r);
    for (int64_t r = STREAMS * step; r < rows; ++r) run(dense_dots<1>, r);
  });
}

// the same for many: 64 rows by 256 columns of w stay in the L2 cache
void dense_many(const Buffer& x, int64_t N, const Number* w, int64_t m,
                int64_t n, Buffer& y) {
  constexpr int64_t HEIGHT = 4 * ROWS, DEPTH = 256;
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    Buffer tile(HEIGHT * DEPTH), out(N * HEIGHT);
    for (int64_t k = 0; k < n; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, n - k);
      for (int64_t r = 0; r < rows; r += ROWS)
        widen_tile(w + (row0 + r) * n + k, n, std::min(ROWS, rows - r),
                   depth, &tile[r * DEPTH]);
      for (int64_t t = 0; t < N; t += WIDE)
        for (int64_t r = 0; r < rows; r += ROWS)
          multiply(&tile[r * DEPTH], ROWS, depth, {&x[t * n + k], n},
                   std::min(WIDE, N - t), {&out[t * HEIGHT + r], HEIGHT});
    }
    for (int64_t t = 0; t < N; ++t)
      std::copy_n(&out[t * HEIGHT], rows, &y[t * m + row0]);
  });
}

#ifdef GPTOSS_AVX2
constexpr int64_t WEIGHTS = 64, SIZE = WEIGHTS * 3 / 2;  // of a block, bytes

struct Compact {  // (rows, blocks, SIZE) bytes
  const uint8_t *bytes, *upper;
  const int32_t *first, *others;  // row r: others[first[r] ... first[r + 1]]
  int64_t rows, blocks, count;    // count: of all others

  const uint8_t* row(int64_t r) const { return bytes + r * blocks * SIZE; }
};

// weight i of 32 stands at byte i with bits 3 and 4 changed for each other,
// so that the halves of a register, interleaved, give sixteen neighbours
inline int64_t swapped(int64_t i) {
  return (i & 7) | (i & 8) << 1 | (i & 16) >> 1;
}

#ifdef GPTOSS_BF16
// of 64 weights, the halves of a register interleaved give 0 ... 15 and
// 32 ... 47, then the others
std::vector<Number> compact_ready(const Buffer& x) {
  std::vector<Number> to(x.size());
  for (size_t k = 0; k < x.size(); k += 8)
    narrow(load<Floats>(&x[k]), &to[k / 64 * 64 + k % 32 / 16 * 32
                                    + k % 64 / 32 * 16 + k % 16]);
  return to;
}

template <int R>
void compact_dots(const Compact& w, int64_t row, int64_t step,
                  const Number* x, float* out) {
  const Bytes upper = _mm512_broadcast_i32x4(load<__m128i>(w.upper));
  const Bytes low = _mm512_set1_epi8(15);
  __m512 s[R][2] = {};
  for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = w.row(row + r * step) + b * SIZE;
      const Bytes lower = load<Bytes>(from);
      const __m256i codes = load<__m256i>(from + WEIGHTS);
      const Bytes code = _mm512_and_si512(low, _mm512_inserti64x4(
          _mm512_castsi256_si512(codes), _mm256_srli_epi16(codes, 4), 1));
      const Bytes high = _mm512_shuffle_epi8(upper, code);
      s[r][0] = _mm512_dpbf16_ps(
          s[r][0], (__m512bh)_mm512_unpacklo_epi8(lower, high),
          load<__m512bh>(x));
      s[r][1] = _mm512_dpbf16_ps(
          s[r][1], (__m512bh)_mm512_unpackhi_epi8(lower, high),
          load<__m512bh>(x + BLOCK));
    }
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
}
#else
Buffer compact_ready(const Buffer& x) { return ready(x); }

// out[0], out[step] ...: R rows, `step` rows apart, times x
template <int R>
void compact_dots(const Compact& w, int64_t row, int64_t step,
                  const float* x, float* out) {
  const __m256i upper = _mm256_broadcastsi128_si256(
      load<__m128i>(w.upper));
  const __m256i low = _mm256_set1_epi8(15);
  Floats s[R][2] = {};
  for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = w.row(row + r * step) + b * SIZE;
      __builtin_prefetch(from + AHEAD);
      __builtin_prefetch(from + AHEAD + SIZE / 2);
      const __m256i codes = load<__m256i>(from + WEIGHTS);
      for (int half = 0; half < 2; ++half) {
        const __m256i lower = load<__m256i>(from + 32 * half);
        const __m256i code = _mm256_and_si256(
            half ? _mm256_srli_epi16(codes, 4) : codes, low);
        const __m256i high = _mm256_shuffle_epi8(upper, code);
        const Ints pairs[] = {(Ints)_mm256_unpacklo_epi8(lower, high),
                              (Ints)_mm256_unpackhi_epi8(lower, high)};
        for (int i = 0; i < 2; ++i) {
          const float* at = x + 32 * half + 16 * i;
          s[r][0] += even(pairs[i]) * load<Floats>(at);
          s[r][1] += odd(pairs[i]) * load<Floats>(at + 8);
        }
      }
    }
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
}
#endif

// y (N, rows) = x (N, n) times the weight transposed, for a few tokens
void compact_few(const Compact& w, const Buffer& x, int64_t N, Buffer& y) {
  constexpr int64_t HEIGHT = 128;
  const int64_t n = w.blocks * WEIGHTS, m = w.rows;
  const auto from = compact_ready(x);
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    const int64_t step = rows / STREAMS;
    for (int64_t t = 0; t < N; ++t) {
      float* to = &y[t * m + row0];
      for (int64_t r = 0; r < step; ++r)
        compact_dots<STREAMS>(w, row0 + r, step, &from[t * n], to + r);
      for (int64_t r = STREAMS * step; r < rows; ++r)
        compact_dots<1>(w, row0 + r, 0, &from[t * n], to + r);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* from = w.first + row0 + r;
        const int64_t end = std::min<int64_t>(from[1], w.count);
        for (int64_t i = std::max(from[0], 0); i < end; ++i) {
          const uint32_t other = w.others[i], bits = other << 16;
          if (other >> 16 < n)
            to[r] += load<float>(&bits) * x[t * n + (other >> 16)];
        }
      }
    }
  });
}

struct Codes {
  uint8_t upper[16], code[256];  // of a code; of an upper byte, or NONE
  static constexpr uint8_t NONE = 16;

  explicit Codes(const std::vector<int64_t>& count) {
    std::vector<uint8_t> order(128);
    for (int half = 0; half < 128; ++half) order[half] = half;
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return count[a] > count[b]; });
    order[7] = 0;  // that of zero
    std::fill_n(code, 256, NONE);
    for (int c = 0; c < 16; ++c)
      code[upper[c] = (c & 8) << 4 | order[c % 8]] = c;
  }
};

// how often each half of an exponent occurs, in every eighth row
std::vector<int64_t> count_halves(const uint16_t* w, int64_t rows,
                                  int64_t n) {
  std::vector<int64_t> total(128);
  std::mutex mutex;
  at::parallel_for(0, (rows + 7) / 8, 16, [&](int64_t begin, int64_t end) {
    int64_t found[128] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = 0; k < n; ++k) ++found[w[8 * r * n + k] >> 8 & 127];
    const std::lock_guard<std::mutex> alone(mutex);
    for (int half = 0; half < 128; ++half) total[half] += found[half];
  });
  return total;
}

// 64 numbers from `column` on; those without a code are added to `apart`
void pack_block(const uint16_t* w, const Codes& codes, int64_t column,
                uint8_t* to, std::vector<int32_t>& apart) {
  uint8_t lower[WEIGHTS], code[WEIGHTS], all = 0;
  for (int64_t i = 0; i < WEIGHTS; ++i) lower[i] = uint8_t(w[i]);
  for (int64_t i = 0; i < WEIGHTS; ++i)
    all |= code[i] = codes.code[w[i] >> 8];
  for (int64_t i = 0; all & Codes::NONE && i < WEIGHTS; ++i)
    if (code[i] == Codes::NONE) {
      lower[i] = 0, code[i] = 7;
      apart.push_back(int32_t((column + i) << 16 | w[i]));
    }
  for (int64_t i = 0; i < 32; i += 8) {  // eight bytes at a time
    uint8_t* at = to + swapped(i);
    std::memcpy(at, lower + i, 8);
    std::memcpy(at + 32, lower + 32 + i, 8);
    const uint64_t both = load<uint64_t>(code + i)
                          | load<uint64_t>(code + 32 + i) << 4;
    std::memcpy(at + WEIGHTS, &both, 8);
  }
}

// weight (rows, n) bf16 -> blocks, upper, first, others
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_compact(
    const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2
                  && weight.is_contiguous() && weight.size(1) % WEIGHTS == 0
                  && weight.size(1) <= 1 << 16,
              "pack_compact: weight: expected contiguous bfloat16 (m, n), "
              "64 dividing n up to 65536, found ", weight.scalar_type(),
              " ", weight.sizes());
  const int64_t rows = weight.size(0), n = weight.size(1);
  auto w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const Codes codes(count_halves(w, rows, n));
  Tensor blocks = at::empty({rows, n / WEIGHTS, SIZE}, at::kByte);
  Tensor upper = at::empty({16}, at::kByte);
  Tensor first = at::zeros({rows + 1}, at::kInt);
  std::copy_n(codes.upper, 16, upper.data_ptr<uint8_t>());
  uint8_t* to = blocks.data_ptr<uint8_t>();
  int32_t* begin = first.data_ptr<int32_t>();
  std::vector<std::vector<int32_t>> apart(rows);
  share(rows, 16, [&](int64_t r) {
    for (int64_t k = 0; k < n; k += WEIGHTS)
      pack_block(w + r * n + k, codes, k, to + (r * n + k) / WEIGHTS * SIZE,
                 apart[r]);
  });
  for (int64_t r = 0; r < rows; ++r)
    begin[r + 1] = begin[r] + int32_t(apart[r].size());
  Tensor others = at::empty({begin[rows]}, at::kInt);
  for (int64_t r = 0; r < rows; ++r)
    std::copy(apart[r].begin(), apart[r].end(),
              others.data_ptr<int32_t>() + begin[r]);
  return {blocks, upper, first, others};
}
#endif

#ifdef GPTOSS_BF16
using Query = Number;
using Key = int32_t;  // a pair of columns

// to[c / 2][r]: two numbers of key r, zero from `rows` on
void pair_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
               Key* to) {
  for (int64_t half = 0; half < ROWS; half += 8)
    for (int64_t c = 0; c < C; c += 16) {
      Ints v[8];
      pair_columns(k + half * stride + c, stride, rows - half, v);
      for (int64_t j = 0; j < 8; ++j)
        std::memcpy(to + (c / 2 + j) * ROWS + half, &v[j], sizeof v[j]);
    }
}

// out[r][0 ... 15] = sum over pairs p < n of q[r] and w[p][0 ... 15]
template <int R>
void multiply_rows(const Key* w, int64_t n, const Number* q, Target out) {
  __m512 s[R] = {};
  for (int64_t p = 0; p < n; ++p, q += 2) {
    const __m512bh pairs = load<__m512bh>(w + p * ROWS);
    for (int r = 0; r < R; ++r)
      s[r] = _mm512_dpbf16_ps(s[r], pairs, (__m512bh)_mm512_set1_epi32(
          load<int32_t>(q + r * 2 * n)));
  }
  for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out.at + r * out.stride, s[r]);
}

void multiply_pairs(const Key* w, int64_t n, const Number* q, int64_t rows,
                    Target out) {
  for (int64_t r = 0, some; r < rows; r += some) {
    some = rows - r < 8 ? 1 : 8;
    (some == 8 ? multiply_rows<8> : multiply_rows<1>)(
        w, n, q + r * 2 * n, {out.at + r * out.stride, out.stride});
  }
}
#else
using Query = float;
using Key = float;
#endif

constexpr int64_t KEYS = 64, WIDEST = 256;  // keys at a time; largest head

struct Attention {  // one key head, the query heads and tokens it serves
  int64_t C, rows, window;
  float scale;
  std::vector<Query> q;            // (rows, C)
  Buffer scores, out, top, total;  // (rows, KEYS), (rows, C) and (rows,)
  std::vector<int32_t> position;   // of each row
  int32_t seen[KEYS];              // positions of the keys at hand
  alignas(64) Key keys[WIDEST * ROWS];  // sixteen of them, as columns
  alignas(64) float values[KEYS * WIDEST];

  void resize(int64_t size, int64_t count, int64_t visible) {
    C = size, rows = count, window = visible;
    q.resize(rows * C);
    out.assign(rows * C, 0);
    top.resize(rows);
    total.assign(rows, 1);  // the sink, before any key
    position.resize(rows);
  }

  void score(const Number* k, int64_t stride, int64_t some, int64_t s);
  void chunk(const Number* k, const Number* v, int64_t stride,
             int64_t count);
  void weigh(int64_t r);
};

// scores of row r -> weights, with the running maximum and sum of chapter 5
void Attention::weigh(int64_t r) {
  const float none = -std::numeric_limits<float>::infinity();
  const int32_t last = position[r];
  const int32_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
  Floats high = Floats{} + top[r], weights = {};
  for (int64_t s = 0; s < KEYS; s += 8) {
    const Ints p = load<Ints>(seen + s);
    Floats value = scale * load<Floats>(&scores[r * KEYS + s]);
    value = (p >= first) & (p <= last) ? value : Floats{} + none;
    high = value > high ? value : high;
    store(&scores[r * KEYS + s], value);
  }
  float higher = top[r];
  for (int i = 0; i < 8; ++i) higher = std::max(higher, high[i]);
  for (int64_t s = 0; s < KEYS; s += 8) {
    const Floats value = load<Floats>(&scores[r * KEYS + s]);
    const Floats e = value == none ? Floats{} : exponential(value - higher);
    store(&scores[r * KEYS + s], e);
    weights += e;
  }
  const float shrink = std::exp(top[r] - higher);
  total[r] = total[r] * shrink + sum(weights);
  top[r] = higher;
  for (int64_t c = 0; c < C && shrink != 1; ++c) out[r * C + c] *= shrink;
}

// scores of `some` keys, at most sixteen, from column s on
void Attention::score(const Number* k, int64_t stride, int64_t some,
                      int64_t s) {
#ifdef GPTOSS_BF16
  pair_tile(k, stride, some, C, keys);
  multiply_pairs(keys, C / 2, q.data(), rows, {&scores[s], KEYS});
#else
  widen_tile(k, stride, some, C, keys);
  multiply(keys, ROWS, C, {q.data(), C}, rows, {&scores[s], KEYS});
#endif
}

void Attention::chunk(const Number* k, const Number* v, int64_t stride,
                      int64_t count) {
  const int64_t C = this->C;  // a local: no store below can change it
  for (int64_t s = 0; s < count; ++s)
    for (int64_t c = 0; c < C; c += 8)
      store(values + s * C + c, widen(v + s * stride + c));
  scores.assign(rows * KEYS, 0);
  for (int64_t s = 0; s < count; s += ROWS)
    score(k + s * stride, stride, std::min(ROWS, count - s), s);
  for (int64_t r = 0; r < rows; ++r) weigh(r);
  for (int64_t c = 0; c < C; c += ROWS)
    multiply(values + c, C, count, {scores.data(), KEYS}, rows,
             {&out[c], C});
}

constexpr int64_t RANGE = 512;  // keys of one piece of work in decode

struct Partial {  // what each range of keys gives for each row (B, T, H)
  Buffer out, top, total;
};

struct Heads {  // the operator's arguments, read from inside the threads
  Tensor q, k, v, sinks, q_pos, k_pos;
  int64_t window;
  float scale;

  // keys s0 ... s1 - 1 for tokens t0 ... t1 - 1 of batch row b, key head g;
  // row 0 of the batch begins at `base` in `to`
  void run(Attention& a, int64_t b, int64_t g, int64_t t0, int64_t t1,
           int64_t s0, int64_t s1, int64_t base, Partial& to) const {
    const int64_t T = q.size(1), H = q.size(2), J = H / k.size(2);
    const int64_t* position = q_pos.const_data_ptr<int64_t>() + b * T;
    a.resize(q.size(3), (t1 - t0) * J, window);
    a.scale = scale;
    auto place = [&](int64_t r) {  // of row r among (B, T, H)
      return (b * T + t0 + r / J) * H + g * J + r % J;
    };
    for (int64_t r = 0; r < a.rows; ++r) {
      const Number* from = numbers(q) + place(r) * a.C;
      std::copy_n(from, a.C, &a.q[r * a.C]);
      a.position[r] = int32_t(position[t0 + r / J]);
      const float none = std::numeric_limits<float>::lowest();
      const float sink = numbers(sinks)[g * J + r % J];
      a.top[r] = s0 ? none : std::max(sink, none);
      a.total[r] = s0 ? 0 : 1;  // the sink counts once, before any key
    }
    attend(a, b, g, s0, s1);
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t at = base + place(r);
      std::copy_n(&a.out[r * a.C], a.C, &to.out[at * a.C]);
      to.top[at] = a.top[r], to.total[at] = a.total[r];
    }
  }

  void attend(Attention& a, int64_t b, int64_t g, int64_t s0,
              int64_t s1) const;
};

// keys s0 ... s1 - 1, a chunk at a time; those that no row sees are left out
void Heads::attend(Attention& a, int64_t b, int64_t g, int64_t s0,
                   int64_t s1) const {
  const int64_t row = k.stride(1);
  const int64_t* position = k_pos.const_data_ptr<int64_t>()
                            + b * k.size(1);
  const auto [low, high] =
      std::minmax_element(a.position.begin(), a.position.end());
  const int64_t oldest = window ? int64_t(*low) - window : -1;
  for (; s0 < s1; s0 += KEYS) {
    const int64_t count = std::min(KEYS, s1 - s0);
    bool any = false;
    for (int64_t s = 0; s < KEYS; ++s) {
      const int64_t p = s < count ? position[s0 + s] : -1;
      a.seen[s] = p < 0 ? -1 : int32_t(p);
      any |= p >= 0 && p > oldest && p <= *high;
    }
    const int64_t at = b * k.stride(0) + s0 * row + g * k.stride(2);
    const Number *key = numbers(k) + at, *value = numbers(v) + at;
    if (any) a.chunk(key, value, row, count);
  }
}

// (ranges, rows) partial results -> y (rows, C)
void merge(const Partial& from, int64_t ranges, int64_t rows, int64_t C,
           Number* y) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float top = from.top[r], total = 0;
      for (int64_t i = 1; i < ranges; ++i)
        top = std::max(top, from.top[i * rows + r]);
      float out[WIDEST] = {};
      for (int64_t at = r; at < ranges * rows; at += rows) {
        const float weight = std::exp(from.top[at] - top);
        total += weight * from.total[at];
        for (int64_t c = 0; c < C; ++c)
          out[c] += weight * from.out[at * C + c];
      }
      for (int64_t c = 0; c < C; ++c) y[r * C + c] = out[c] / total;
    }
  });
}

Tensor run_attention(const Heads& heads) {
  const Tensor& q = heads.q;
  const int64_t T = q.size(1), H = q.size(2), C = q.size(3);
  const int64_t S = heads.k.size(1), G = heads.k.size(2);
  const int64_t some = std::max<int64_t>(1, KEYS * G / H);
  const int64_t tiles = (T + some - 1) / some, rows = q.size(0) * T * H;
  const int64_t width = tiles > 1 ? std::max<int64_t>(S, 1) : RANGE;
  const int64_t ranges = std::max<int64_t>(1, (S + width - 1) / width);
  Partial partial{Buffer(ranges * rows * C), Buffer(ranges * rows),
                  Buffer(ranges * rows)};
  const int64_t pieces = q.size(0) * G * tiles;
  share(ranges * pieces, 1, [&](int64_t item) {
    thread_local Attention a;
    const int64_t range = item / pieces, piece = item % pieces;
    const int64_t t0 = (tiles - 1 - piece % tiles) * some;  // longest first
    heads.run(a, piece / tiles / G, piece / tiles % G, t0,
              std::min(t0 + some, T), range * width,
              std::min((range + 1) * width, S), range * rows, partial);
  });
  Tensor y = at::empty(q.sizes(), q.options());
  merge(partial, ranges, rows, C, static_cast<Number*>(y.data_ptr()));
  return y;
}

Buffer norm_rows(const Buffer& x, const Buffer& weight, double eps) {
  const int64_t n = weight.size();
  Buffer y(x.size());
  at::parallel_for(0, x.size() / n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * n; at < end * n; at += n) {
      double squares = 0;
      for (int64_t i = 0; i < n; ++i) squares += x[at + i] * x[at + i];
      const float scale = 1 / std::sqrt(squares / n + eps);
      for (int64_t i = 0; i < n; ++i)
        y[at + i] = weight[i] * (x[at + i] * scale);
    }
  });
  return y;
}

// x (..., H, C) turned by tables (..., C/2), half-split as in chapter 4
Buffer rope_rows(const Buffer& x, const Buffer& cos, const Buffer& sin,
                 int64_t H, int64_t half) {
  Buffer y(x.size());
  const int64_t rows = x.size() / (2 * half);
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *from = &x[row * 2 * half], *c = &cos[row / H * half];
      const float* s = &sin[row / H * half];
      float* to = &y[row * 2 * half];
      for (int64_t i = 0; i < half; ++i) {
        to[i] = from[i] * c[i] - from[half + i] * s[i];
        to[half + i] = from[half + i] * c[i] + from[i] * s[i];
      }
    }
  });
  return y;
}

// ids (k,) of the largest logits, and the softmax over these as weights
void choose(const float* logits, int64_t E, int64_t k, int64_t* ids,
            float* weights) {
  std::vector<int64_t> order(E);
  for (int64_t e = 0; e < E; ++e) order[e] = e;
  auto before = [logits](int64_t a, int64_t b) {
    const bool x = std::isnan(logits[a]), y = std::isnan(logits[b]);
    if (x || y || logits[a] == logits[b]) return x == y ? a < b : x;
    return logits[a] > logits[b];
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
  float total = 0;
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = order[i];
    total += weights[i] = std::exp(logits[order[i]] - logits[order[0]]);
  }
  for (int64_t i = 0; i < k; ++i) weights[i] /= total;
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

Tensor mxfp4_linear(const Tensor& x, const Tensor& blocks,
                    const Tensor& scales,
                    const std::optional<Tensor>& bias) {
  if (!ours({x, bias.value_or(x)}) || !packed({blocks, scales})
      || scales.dim() != 2)
    return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
                                         bias);
  TORCH_CHECK(has(blocks, {scales.size(0), scales.size(1), 16}),
              "mxfp4_linear: blocks: expected (m, n / 32, 16) beside "
              "scales ", scales.sizes(), ", found ", blocks.sizes());
  const Packed weight(blocks, scales);
  const int64_t m = weight.rows, n = weight.blocks * BLOCK;
  check_linear("mxfp4_linear", x, m, n, bias);
  if (!x.numel() || !m || (bias && !has(*bias, {m})))
    return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
                                         bias);
  const int64_t N = x.numel() / n;
  Buffer y(N * m);
  const std::vector<int64_t> ids(N, 0);
  grouped_linear(weight, Groups(ids.data(), N, 1),
                 quantised(floats(x), true, N, weight.blocks), 1,
                 [&](int64_t pick, int64_t, int64_t row0, int64_t rows,
                     const float* v) {
    std::copy_n(v, rows, &y[pick * m + row0]);
  });
  add_bias(y, bias);
  return result(x, m, y);
}

Tensor linear(const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias) {
  if (!ours({x, weight, bias.value_or(x)}) || weight.dim() != 2)
    return plain<decltype(linear)>("linear", x, weight, bias);
  const int64_t m = weight.size(0), n = weight.size(1);
  check_linear("linear", x, m, n, bias);
  if (!weight.is_contiguous() || n % BLOCK || !x.numel() || !m
      || (bias && !has(*bias, {m})))
    return plain<decltype(linear)>("linear", x, weight, bias);
  const Buffer from = floats(x);
  const int64_t N = from.size() / n;
  Buffer y(N * m);
  (N <= FEW ? dense_few : dense_many)(from, N, numbers(weight), m, n, y);
  add_bias(y, bias);
  return result(x, m, y);
}

// as `linear`; blocks ... others: the weight again, by `pack_compact`
Tensor compact_linear(const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias,
                      const Tensor& blocks, const Tensor& upper,
                      const Tensor& first, const Tensor& others) {
#ifdef GPTOSS_AVX2
  const auto integers = [](const Tensor& t) {
    return t.scalar_type() == at::kInt && t.is_contiguous() && t.dim() == 1;
  };
  if (ours({x, weight, bias.value_or(x)}) && weight.dim() == 2) {
    const int64_t m = weight.size(0), n = weight.size(1);
    check_linear("compact_linear", x, m, n, bias);
    if (x.numel() && x.numel() <= FEW * n && m && !(bias && !has(*bias, {m}))
        && packed({blocks, upper}) && n % WEIGHTS == 0
        && has(blocks, {m, n / WEIGHTS, SIZE}) && has(upper, {16})
        && integers(first) && integers(others) && has(first, {m + 1})) {
      const int64_t N = x.numel() / n;
      Buffer y(N * m);
      compact_few({blocks.const_data_ptr<uint8_t>(),
                   upper.const_data_ptr<uint8_t>(),
                   first.const_data_ptr<int32_t>(),
                   others.const_data_ptr<int32_t>(), m, blocks.size(1),
                   others.size(0)},
                  floats(x), N, y);
      add_bias(y, bias);
      return result(x, m, y);
    }
  }
#endif
  return linear(x, weight, bias);
}

Tensor packed_experts(const Tensor& x, const Tensor& ids,
                      const Tensor& weights, const Tensor& gate_up_blocks,
                      const Tensor& gate_up_scales,
                      const Tensor& gate_up_bias, const Tensor& down_blocks,
                      const Tensor& down_scales, const Tensor& down_bias,
                      double limit) {
  auto fits = [&] {  // x (N, D), ids (N, K), gate_up (E, 2 F, D), down ...
    if (x.dim() != 2 || ids.dim() != 2 || gate_up_scales.dim() != 3)
      return false;
    const int64_t N = x.size(0), D = x.size(1), K = ids.size(1);
    const int64_t E = gate_up_scales.size(0), F = gate_up_scales.size(1) / 2;
    return N && D && K && E && F && D % BLOCK == 0 && F % BLOCK == 0
        && has(ids, {N, K}) && has(weights, {N, K})
        && has(gate_up_scales, {E, 2 * F, D / BLOCK})
        && has(gate_up_blocks, {E, 2 * F, D / BLOCK, 16})
        && has(down_scales, {E, D, F / BLOCK})
        && has(down_blocks, {E, D, F / BLOCK, 16})
        && has(gate_up_bias, {E, 2 * F}) && has(down_bias, {E, D});
  };
  if (!ours({x, weights, gate_up_bias, down_bias}) || !whole({ids})
      || !packed({gate_up_blocks, gate_up_scales, down_blocks, down_scales})
      || !gate_up_bias.is_contiguous() || !down_bias.is_contiguous()
      || !fits())
    return plain<decltype(packed_experts)>(
        "packed_experts", x, ids, weights, gate_up_blocks, gate_up_scales,
        gate_up_bias, down_blocks, down_scales, down_bias, limit);
  const Packed gate_up(gate_up_blocks, gate_up_scales);
  const Packed down(down_blocks, down_scales);
  const Tensor chosen = ids.contiguous(), shares = weights.contiguous();
  const int64_t K = ids.size(1), picks = ids.numel();
  const Groups groups(chosen.const_data_ptr<int64_t>(), picks,
                      gate_up_scales.size(0));
  const Buffer hidden = run_gate_up(
      gate_up, numbers(gate_up_bias), limit, groups,
      quantised(floats(x), true, picks / K, gate_up.blocks), K);
  const Buffer y = run_down(
      down, numbers(down_bias), numbers(shares), groups,
      quantised(hidden, false, picks, down.blocks), K);
  return result(x, down.rows, y);
}

Tensor sink_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& sinks, const Tensor& q_pos,
                      const Tensor& k_pos, int64_t window, double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4
                  && k.size(3) == q.size(3) && window >= 0,
              "sink_attention: expected q (B, T, H, C), k and v "
              "(B, S, G, C), window >= 0, found q ", q.sizes(), ", k ",
              k.sizes(), ", v ", v.sizes(), ", window ", window);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), C = q.size(3);
  const int64_t S = k.size(1), G = k.size(2);
  auto fits = [](const Tensor& pos, int64_t rows, int64_t columns) {
    return pos.dim() == 2 && (pos.size(0) == rows || pos.size(0) == 1)
        && pos.size(1) == columns;
  };
  if (!ours({q, k, v, sinks}) || !whole({q_pos, k_pos}) || !q.numel() || !G
      || C % ROWS || C > WIDEST || H % G || k.size(0) != B
      || k.sizes() != v.sizes() || !has(sinks, {H}) || !fits(q_pos, B, T)
      || !fits(k_pos, B, S) || k.stride(3) != 1
      || k.strides() != v.strides())
    return plain<decltype(sink_attention)>("sink_attention", q, k, v, sinks,
                                           q_pos, k_pos, window, scale);
  return run_attention({q.contiguous(), k, v, sinks.contiguous(),
                        q_pos.expand({B, -1}).contiguous(),
                        k_pos.expand({B, -1}).contiguous(), window,
                        float(scale)});
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (!ours({x, weight}) || !x.dim() || weight.dim() != 1)
    return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
  const int64_t n = weight.size(0);
  TORCH_CHECK(x.size(-1) == n || x.size(-1) == 1 || n == 1, "rms_norm: "
              "weight: expected (", x.size(-1), ") beside x ", x.sizes(),
              ", found ", weight.sizes());
  if (x.size(-1) != n || !x.numel())
    return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
  return result(x, n, norm_rows(floats(x), floats(weight), eps));
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  if (!ours({x, cos, sin}) || x.dim() != 4 || cos.dim() != 3)
    return plain<decltype(rope)>("rope", x, cos, sin);
  const int64_t B = x.size(0), T = x.size(1), half = x.size(3) / 2;
  auto stretched = [](int64_t size, int64_t to) {
    return size == to || size == 1;
  };
  TORCH_CHECK(half < 2 || x.size(3) % 2 || stretched(cos.size(2), half),
              "rope: cos: expected (B, T, ", half, ") beside x ", x.sizes(),
              ", found ", cos.sizes());
  if (!x.numel() || 2 * cos.size(2) != x.size(3)
      || cos.sizes() != sin.sizes() || !stretched(cos.size(0), B)
      || !stretched(cos.size(1), T))
    return plain<decltype(rope)>("rope", x, cos, sin);
  const std::vector<int64_t> shape = {B, T, half};
  return result(x, x.size(-1),
                rope_rows(floats(x), floats(cos.expand(shape)),
                          floats(sin.expand(shape)), x.size(2), half));
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k) {
  if (!ours({logits}) || logits.dim() != 2 || k < 1 || k > logits.size(1))
    return plain<decltype(route)>("route", logits, k);
  const Buffer from = floats(logits);
  const int64_t N = logits.size(0), E = logits.size(1);
  Tensor ids = at::empty({N, k}, logits.options().dtype(at::kLong));
  int64_t* id = ids.data_ptr<int64_t>();
  Buffer weights(N * k);
  at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      choose(&from[n * E], E, k, id + n * k, &weights[n * k]);
  });
  return {result(logits, k, weights), ids};
}

struct Use {
  size_t argument, place;
  bool last;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  std::vector<Use> made;         // arguments that earlier calls make
  std::vector<int64_t> results;  // their places; -1: a tensor known before
};

// calls of operators, noted while they happen; replay() makes them again
struct Recording : torch::CustomClassHolder {
  std::vector<Call> calls;
  std::vector<Tensor> places;
  std::unordered_map<const void*, int64_t> known;  // tensor: place, or -1
  std::string refused;  // which call cannot be made again, and why
  at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
  int depth = 0;  // of calls within calls

  static thread_local Recording* current;

  void begin() {
    TORCH_CHECK(!current && calls.empty(), "recording: begun twice");
    current = this;
    handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(entered, left)
            .needsInputs(true).needsOutputs(true)
            .scopes({at::RecordScope::FUNCTION}));
  }

  std::string end() {
    TORCH_CHECK(current == this, "recording: ended, not begun");
    at::removeCallback(handle);
    current = nullptr;
    known.clear();
    std::vector<bool> later(places.size());
    for (auto call = calls.rbegin(); call != calls.rend(); ++call)
      for (auto use = call->made.rbegin(); use != call->made.rend(); ++use) {
        use->last = !later[use->place];
        later[use->place] = true;
      }
    places.assign(places.size(), Tensor());
    return refused;
  }

  static std::unique_ptr<at::ObserverContext> entered(
      const at::RecordFunction& function) {
    if (current->depth++ == 0) current->add(function);
    return nullptr;
  }

  static void left(const at::RecordFunction& function,
                   at::ObserverContext*) {
    if (--current->depth == 0) current->finish(function);
  }

  void refuse(const at::RecordFunction& function, const char* why) {
    if (refused.empty()) refused = std::string(function.name()) + why;
  }

  void add(const at::RecordFunction& function) {
    const auto name = function.operator_name();
    if (!name) refuse(function, " is no operator");
    if (!refused.empty()) return;  // nothing here will be called again
    const auto inputs = function.inputs();
    calls.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(
                         name->name.c_str(), name->overload_name.c_str()),
                     std::vector<c10::IValue>(inputs.begin(), inputs.end()),
                     {}, {}});
    Call& call = calls.back();
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i].isTensor()) {
        const int64_t place = known.emplace(
            inputs[i].unsafeToTensorImpl(), -1).first->second;
        if (place < 0) continue;
        call.made.push_back({i, size_t(place), false});
        call.arguments[i] = {};
      } else if (inputs[i].isList()) {
        for (const c10::IValue& one : inputs[i].toListRef())
          if (one.isTensor()) refuse(function, " takes a list of tensors");
      }
  }

  void finish(const at::RecordFunction& function) {
    if (!refused.empty()) return;
    const auto& from = calls.back().arguments;
    const bool constant = calls.back().made.empty() && std::none_of(
        from.begin(), from.end(), [](auto& x) { return x.isTensor(); });
    for (const c10::IValue& result : function.outputs()) {
      if (!result.isTensor() && constant) return calls.pop_back();
      if (!result.isTensor()) return refuse(function, " gives no tensor");
      const auto [at, fresh] = known.emplace(
          result.unsafeToTensorImpl(), int64_t(places.size()));
      calls.back().results.push_back(fresh ? at->second : -1);
      if (fresh) places.push_back(result.toTensor());  // keeps its address
    }
  }

  void replay() {
    std::vector<c10::IValue> stack;
    for (const Call& call : calls) {
      stack.assign(call.arguments.begin(), call.arguments.end());
      for (const Use& use : call.made)
        if (use.last) stack[use.argument] = std::move(places[use.place]);
        else stack[use.argument] = places[use.place];
      call.op.callBoxed(stack);
      for (size_t i = 0; i < call.results.size(); ++i)
        if (call.results[i] >= 0)
          places[call.results[i]] = std::move(stack[i]).toTensor();
    }
  }
};

thread_local Recording* Recording::current = nullptr;

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("linear", linear);
  m.impl("compact_linear", compact_linear);
  m.impl("rms_norm", rms_norm);
  m.impl("rope", rope);
  m.impl("route", route);
  m.impl("sink_attention", sink_attention);
  m.impl("mxfp4_linear", mxfp4_linear);
  m.impl("packed_experts", packed_experts);
#ifdef GPTOSS_AVX2
  m.impl("pack_compact", pack_compact);
#endif
}

#if defined(GPTOSS_AVX512)
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

TORCH_LIBRARY_FRAGMENT(gptoss, m) {
  m.def("kernels_name() -> str", [] { return std::string(NAME); });
  m.class_<Recording>("Recording")
      .def(torch::init<>())
      .def("begin", &Recording::begin)
      .def("end", &Recording::end)
      .def("replay", &Recording::replay);
  m.def("enable_kernels(bool on) -> bool", [](bool on) {
    std::swap(on, enabled);
    return on;  // as it was before, in this thread
  });
  m.def("kernels_on() -> bool", [] { return enabled; });
}

}  // namespace
