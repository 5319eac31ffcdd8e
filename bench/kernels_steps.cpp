// The packed matrix-vector product, step by step, outside of torch.
// Built and run by bench/kernels.py; prints JSON. Needs AVX2.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

constexpr int64_t BLOCKS = 90, ROWS = 8640 * 16;  // 211 MB: no cache holds it
constexpr int64_t STEP = 64;
constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12,
                              0, -1, -2, -3, -4, -6, -8, -12};

struct Input {
  std::vector<float> x, scale;   // (2880,), one a block
  std::vector<int16_t> natural;  // x in 16 bits, in order
  std::vector<int16_t> paired;   // two blocks interleaved, for AVX2
  std::vector<int16_t> fours;    // four blocks, for AVX-512
  // for four blocks: high digits of their 64 even elements, of the odd ones,
  // then the low digits; and -12 times the sum of every eight of x in 16 bits
  std::vector<int8_t> digits;
  std::vector<int32_t> offsets;
};

float sum(__m256 v) {
  float a[8];
  _mm256_storeu_ps(a, v);
  return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

float power(uint8_t scale) {
  uint32_t bits = uint32_t(scale) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

__m256i both(__m128i half) { return _mm256_broadcastsi128_si256(half); }
__m128i load16(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
__m256i load32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// 1: one weight at a time, as the portable loop of the chapter
float portable(const uint8_t* w, const uint8_t* s, const Input& in) {
  float total = 0;
  for (int64_t b = 0; b < BLOCKS; ++b) {
    int32_t part = 0;
    for (int i = 0; i < 16; ++i)
      part += TWICE[w[16 * b + i] & 15] * in.natural[32 * b + 2 * i]
              + TWICE[w[16 * b + i] >> 4] * in.natural[32 * b + 2 * i + 1];
    total += part * (power(s[b]) * in.scale[b]);
  }
  return total;
}

// 2: sixteen nibbles looked up at once, then fp32
float in_fp32(const uint8_t* w, const uint8_t* s, const Input& in) {
  const __m128i table = load16(TWICE), low = _mm_set1_epi8(15);
  __m256 total = _mm256_setzero_ps();
  for (int64_t b = 0; b < BLOCKS; ++b) {
    const __m128i bytes = load16(w + 16 * b);
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low));
    const __m128i odd = _mm_shuffle_epi8(
        table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    const __m128i halves[2] = {_mm_unpacklo_epi8(even, odd),
                               _mm_unpackhi_epi8(even, odd)};
    __m256 part = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const __m128i eight = i % 2 ? _mm_srli_si128(halves[i / 2], 8)
                                  : halves[i / 2];
      part = _mm256_fmadd_ps(
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)),
          _mm256_loadu_ps(&in.x[32 * b + 8 * i]), part);
    }
    total = _mm256_fmadd_ps(part, _mm256_set1_ps(power(s[b]) / 2), total);
  }
  return sum(total);
}

// 3: 16-bit activations, thirty-two products in two instructions
float in_integers(const uint8_t* w, const uint8_t* s, const Input& in) {
  const __m128i table = load16(TWICE), low = _mm_set1_epi8(15);
  __m256 total = _mm256_setzero_ps();
  for (int64_t b = 0; b < BLOCKS; ++b) {
    const __m128i bytes = load16(w + 16 * b);
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low));
    const __m128i odd = _mm_shuffle_epi8(
        table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    const __m256i first = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(even, odd));
    const __m256i second = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(even, odd));
    const __m256i part = _mm256_add_epi32(
        _mm256_madd_epi16(first, load32(&in.natural[32 * b])),
        _mm256_madd_epi16(second, load32(&in.natural[32 * b + 16])));
    total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part),
                            _mm256_set1_ps(power(s[b]) * in.scale[b]), total);
  }
  return sum(total);
}

// the factors of a row, eight at a time, and four zeros behind them
void factors(const uint8_t* s, const Input& in, float* to) {
  int64_t b = 0;
  for (; b + 8 <= BLOCKS; b += 8) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(s + b))), 23);
    _mm256_storeu_ps(to + b, _mm256_mul_ps(_mm256_castsi256_ps(bits),
                                           _mm256_loadu_ps(&in.scale[b])));
  }
  for (; b < BLOCKS; ++b) to[b] = power(s[b]) * in.scale[b];
  std::fill_n(to + BLOCKS, 4, 0.0f);
}

__m256 spread(const float* two) {  // each over four places
  const __m256i place = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  double both;
  std::memcpy(&both, two, 8);
  return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), place);
}

// 4: two blocks at a time; shifts and masks instead of sign extension
float in_pairs(const uint8_t* w, const uint8_t* s, const Input& in) {
  const __m256i table = both(load16(TWICE)), low = _mm256_set1_epi8(15);
  const __m256i high = _mm256_set1_epi16(short(0xff00));
  __m256 total = _mm256_setzero_ps();
  float f[BLOCKS + 4];
  factors(s, in, f);
  for (int64_t b = 0; b < BLOCKS; b += 2) {
    const __m256i bytes = load32(w + 16 * b);
    const int16_t* q = &in.paired[32 * b];
    const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
    const __m256i c = _mm256_shuffle_epi8(
        table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
    const __m256i part = _mm256_add_epi32(
        _mm256_add_epi32(
            _mm256_madd_epi16(_mm256_slli_epi16(a, 8), load32(q)),
            _mm256_madd_epi16(_mm256_and_si256(a, high), load32(q + 16))),
        _mm256_add_epi32(
            _mm256_madd_epi16(_mm256_slli_epi16(c, 8), load32(q + 32)),
            _mm256_madd_epi16(_mm256_and_si256(c, high), load32(q + 48))));
    total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), spread(f + b), total);
  }
  return sum(total) / 256;
}

// 5: four rows at a time, STEP rows apart, asking memory half a KiB ahead
void in_streams(const uint8_t* w, const uint8_t* s, const Input& in,
                float* y) {
  const __m256i table = both(load16(TWICE)), low = _mm256_set1_epi8(15);
  const __m256i high = _mm256_set1_epi16(short(0xff00));
  __m256 total[4] = {};
  float f[4][BLOCKS + 4];
  for (int r = 0; r < 4; ++r) factors(s + r * STEP * BLOCKS, in, f[r]);
  for (int64_t b = 0; b < BLOCKS; b += 2)
    for (int r = 0; r < 4; ++r) {
      const uint8_t* from = w + (r * STEP * BLOCKS + b) * 16;
      __builtin_prefetch(from + 512);
      const __m256i bytes = load32(from);
      const int16_t* q = &in.paired[32 * b];
      const __m256i a =
          _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
      const __m256i c = _mm256_shuffle_epi8(
          table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
      const __m256i part = _mm256_add_epi32(
          _mm256_add_epi32(
              _mm256_madd_epi16(_mm256_slli_epi16(a, 8), load32(q)),
              _mm256_madd_epi16(_mm256_and_si256(a, high), load32(q + 16))),
          _mm256_add_epi32(
              _mm256_madd_epi16(_mm256_slli_epi16(c, 8), load32(q + 32)),
              _mm256_madd_epi16(_mm256_and_si256(c, high),
                                load32(q + 48))));
      total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), spread(f[r] + b),
                                 total[r]);
    }
  for (int r = 0; r < 4; ++r) y[r * STEP] = sum(total[r]) / 256;
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
// 6: four blocks at a time, 16-bit numbers looked up by 16-bit indices
void in_wide_streams(const uint8_t* w, const uint8_t* s, const Input& in,
                     float* y) {
  const __m512i table = _mm512_broadcast_i64x4(
      _mm256_cvtepi8_epi16(load16(TWICE)));
  const __m512i place = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2,
                                         1, 1, 1, 1, 0, 0, 0, 0);
  __m512 total[4] = {};
  float f[4][BLOCKS + 4];
  for (int r = 0; r < 4; ++r) factors(s + r * STEP * BLOCKS, in, f[r]);
  for (int64_t b = 0; b < BLOCKS; b += 4)
    for (int r = 0; r < 4; ++r) {
      const uint8_t* from = w + (r * STEP * BLOCKS + b) * 16;
      __builtin_prefetch(from + 512);
      const __m512i bytes = _mm512_maskz_loadu_epi64(
          b + 4 <= BLOCKS ? 255 : 15, from);
      auto add = [&](__m512i sums, int shift, int group) {
        const __m512i values = _mm512_permutexvar_epi16(
            _mm512_srli_epi16(bytes, shift), table);
        return _mm512_dpwssd_epi32(sums, values, _mm512_loadu_si512(
            &in.fours[32 * b + 32 * group]));
      };
      const __m512i part = _mm512_add_epi32(
          add(add(__m512i{}, 0, 0), 4, 2), add(add(__m512i{}, 8, 1), 12, 3));
      const __m512 four = _mm512_permutevar_ps(
          _mm512_broadcast_f32x4(_mm_loadu_ps(f[r] + b)), place);
      total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), four, total[r]);
    }
  for (int r = 0; r < 4; ++r) y[r * STEP] = _mm512_reduce_add_ps(total[r]);
}

// 7: bytes times bytes: weights plus 12, activations in two digits; factors
// of sixteen blocks made in a register
void in_digits(const uint8_t* w, const uint8_t* s, const Input& in,
               float* y) {
  const __m128i twice = load16(TWICE), twelve = _mm_set1_epi8(12);
  const __m512i table = _mm512_broadcast_i32x4(_mm_add_epi8(twice, twelve));
  const __m512i low = _mm512_set1_epi8(15), one = _mm512_set1_epi32(1 << 22);
  const __m512i place = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2,
                                         1, 1, 1, 1, 0, 0, 0, 0);
  __m512 total[4] = {};
  auto some = [&](int64_t b, int64_t count) {
    __m512 factor[4];
    for (int r = 0; r < 4; ++r) {
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(
          _mm_mask_loadu_epi8(_mm_set1_epi8(127), (1u << count) - 1,
                              s + r * STEP * BLOCKS + b)), 23);
      factor[r] = _mm512_mul_ps(
          _mm512_castsi512_ps(_mm512_max_epi32(bits, one)),
          _mm512_loadu_ps(&in.scale[b]));
    }
    for (int64_t g = 0; 4 * g < count; ++g)
      for (int r = 0; r < 4; ++r) {
        const uint8_t* from = w + (r * STEP * BLOCKS + b + 4 * g) * 16;
        __builtin_prefetch(from + 256);
        const __m512i bytes = count - 4 * g < 4
            ? _mm512_maskz_loadu_epi32((1u << 4 * (count - 4 * g)) - 1, from)
            : _mm512_loadu_si512(from);
        const __m512i a =
            _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
        const __m512i c = _mm512_shuffle_epi8(
            table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
        const int8_t* x = &in.digits[64 * (b + 4 * g)];
        auto add = [&](__m512i sums, int digit) {
          const int8_t* q = x + 128 * digit;
          sums = _mm512_dpbusd_epi32(sums, a, _mm512_loadu_si512(q));
          return _mm512_dpbusd_epi32(sums, c, _mm512_loadu_si512(q + 64));
        };
        const __m512i part = _mm512_add_epi32(
            _mm512_slli_epi32(add(__m512i{}, 0), 8),
            add(_mm512_loadu_si512(&in.offsets[4 * (b + 4 * g)]), 1));
        total[r] = _mm512_fmadd_ps(
            _mm512_cvtepi32_ps(part),
            _mm512_permutexvar_ps(
                _mm512_add_epi32(place, _mm512_set1_epi32(4 * g)), factor[r]),
            total[r]);
      }
  };
  int64_t b = 0;
  for (; b + 16 <= BLOCKS; b += 16) some(b, 16);
  some(b, BLOCKS - b);
  for (int r = 0; r < 4; ++r) y[r * STEP] = _mm512_reduce_add_ps(total[r]);
}
#endif

using Dot = float (*)(const uint8_t*, const uint8_t*, const Input&);
using Streams = void (*)(const uint8_t*, const uint8_t*, const Input&,
                         float*);

double seconds() {
  return std::chrono::duration<double>(
      std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
double best_of(int threads, const Work& work) {  // work(first, last) of ROWS
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = seconds();
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t)
      all.emplace_back(work, ROWS * t / threads, ROWS * (t + 1) / threads);
    for (auto& thread : all) thread.join();
    best = std::min(best, seconds() - start);
  }
  return best;
}

int main(int argc, char** argv) {
  const int most = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<uint8_t> w(ROWS * BLOCKS * 16 + 4096), s(ROWS * BLOCKS);
  uint32_t state = 1;
  auto random = [&state] { return state = state * 1664525u + 1013904223u; };
  for (auto& byte : w) byte = random() >> 24;
  for (auto& byte : s) byte = 115 + (random() >> 29);
  Input in;
  in.x.resize(32 * BLOCKS), in.scale.assign(BLOCKS + 16, 0);
  in.natural.resize(32 * BLOCKS), in.paired.resize(32 * BLOCKS);
  in.fours.resize(32 * (BLOCKS + 3));
  in.digits.resize(64 * (BLOCKS + 3)), in.offsets.resize(4 * (BLOCKS + 3));
  for (auto& value : in.x) value = int32_t(random()) / 2147483648.0f;
  for (int64_t k = 0; k < 32 * BLOCKS; ++k) {
    float top = 0;
    for (int i = 0; i < 32; ++i)
      top = std::max(top, std::fabs(in.x[k / 32 * 32 + i]));
    in.scale[k / 32] = top / 32639 / 2;
    in.natural[k] = int16_t(std::lrint(in.x[k] * 32639 / top));
    const int group[4] = {0, 2, 1, 3};
    in.paired[k / 64 * 64 + 16 * group[k % 4] + k / 32 % 2 * 8
              + k % 32 / 4] = in.natural[k];
    in.fours[k / 128 * 128 + 32 * group[k % 4] + k / 32 % 4 * 8
             + k % 32 / 4] = in.natural[k];
    const int q = in.natural[k];  // at most 127 * 256 + 127, two digits
    const int64_t at = k / 128 * 256 + k % 2 * 64 + k / 32 % 4 * 16
                       + k % 32 / 2;
    in.digits[at] = (q + 128) >> 8, in.digits[at + 128] = int8_t(q);
    in.offsets[k / 8] -= 12 * q;
  }
  const struct { const char* name; Dot dot; Streams streams; } steps[] = {
      {"portable C++ loop", portable, nullptr},
      {"table in a register, fp32", in_fp32, nullptr},
      {"16-bit integers", in_integers, nullptr},
      {"two blocks at a time", in_pairs, nullptr},
      {"four streams of rows", nullptr, in_streams},
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
      {"AVX-512, four blocks at a time", nullptr, in_wide_streams},
      {"bytes, two digits", nullptr, in_digits},
#endif
  };
  std::vector<float> y(ROWS);
  std::printf("[");
  for (const auto& step : steps)
    for (int threads = 1; threads <= most; threads *= 2) {
      const double time = best_of(threads, [&](int64_t a, int64_t b) {
        for (int64_t r = a; step.dot && r < b; ++r)
          y[r] = step.dot(&w[r * BLOCKS * 16], &s[r * BLOCKS], in);
        for (int64_t r = a; !step.dot && r < b; r += r % 64 == 63 ? 193 : 1)
          step.streams(&w[r * BLOCKS * 16], &s[r * BLOCKS], in, &y[r]);
      });
      std::printf("{\"name\": \"%s\", \"threads\": %d, \"gb_per_s\": %.2f},\n",
                  step.name, threads, 17.0 * ROWS * BLOCKS / time / 1e9);
    }
  for (int threads = 1; threads <= most; threads *= 2) {
    const double time = best_of(threads, [&](int64_t a, int64_t b) {
      __m256i part[4] = {};
      for (int64_t at = a * BLOCKS * 16; at < b * BLOCKS * 16; at += 128)
        for (int i = 0; i < 4; ++i)
          part[i] = _mm256_xor_si256(part[i], load32(&w[at + 32 * i]));
      y[a] = float(_mm256_extract_epi32(_mm256_xor_si256(
          _mm256_xor_si256(part[0], part[1]),
          _mm256_xor_si256(part[2], part[3])), 0));
    });
    std::printf("{\"name\": \"only reading\", \"threads\": %d, "
                "\"gb_per_s\": %.2f}%s\n", threads,
                16.0 * ROWS * BLOCKS / time / 1e9,
                threads * 2 <= most ? "," : "]");
  }
}
