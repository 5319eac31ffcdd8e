// How does a processor multiply bf16 that cannot?
// Generated from book/kernels/dense.py; edit the chapter, not this file.

namespace {

inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Ints pairs) {
  return (Floats)(pairs & int32_t(0xffff0000));
}

#ifdef GPTOSS_BF16
using Ready = Number;  // what activations are made before the products
constexpr int TOGETHER = 6;  // tokens: 24 sums, 4 weights, 1 activation
constexpr int64_t BY_STRIPS = std::numeric_limits<int64_t>::max();
#else
using Ready = float;
constexpr int TOGETHER = 2;  // tokens: 8 sums, 2 weights, 4 activations
constexpr int64_t BY_STRIPS = 8;  // more tokens: tiles
#endif
constexpr int64_t HALF_ROW = 1440;  // numbers

#ifndef GPTOSS_BF16
// sixteen at a time, first the eight even ones, then the eight odd ones
Array<Ready> ready(const Number* x, int64_t count) {
  Array<Ready> to(count);
  for (int64_t k = 0; k < count; k += 16) {
    const Ints pairs = load<Ints>(x + k);
    store(&to[k], even(pairs)), store(&to[k + 8], odd(pairs));
  }
  return to;
}

// out[t * width + r * step] += R rows of w, `step` apart, times T tokens
template <int R, int T>
void strip(const Number* w, int64_t step, const Ready* x, int64_t n,
           int64_t deep, int64_t ahead, float* out, int64_t width) {
  constexpr int HALVES = T == 1 ? 2 : 1;  // more sums than a product takes
  Floats s[T][R][HALVES] = {};
  for (int64_t k = 0; k < deep; k += 16)
    for (int r = 0; r < R; ++r) {
      const Number* from = w + r * step * n + k;
      ask(from + ahead);
      const Ints pairs = load<Ints>(from);
      const Floats a = even(pairs), b = odd(pairs);
      for (int t = 0; t < T; ++t) {
        s[t][r][0] += a * load<Floats>(x + t * n + k);
        s[t][r][HALVES - 1] += b * load<Floats>(x + t * n + k + 8);
      }
    }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r)
      out[t * width + r * step] +=
          sum(HALVES == 2 ? s[t][r][0] + s[t][r][1] : s[t][r][0]);
}

#else
Array<Ready> ready(const Number* x, int64_t count) {
  return {x, x + count};
}

inline __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
}

// the sums of four registers
inline __m128 sums(__m512 s, __m512 t, __m512 u, __m512 v) {
  const auto a = (__m512d)add_pairs(s, t), b = (__m512d)add_pairs(u, v);
  const __m512 all = (__m512)_mm512_unpacklo_pd(a, b)
                     + (__m512)_mm512_unpackhi_pd(a, b);
  const __m256 half = _mm512_castps512_ps256(all)
                      + _mm512_extractf32x8_ps(all, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

// s[t][r] += row r, `apart` numbers after the one before, times token t
template <int R, int T>
INLINE inline void add_strip(const Number* w, int64_t apart, const Ready* x,
                             int64_t n, int64_t deep, int64_t ahead,
                             __m512 (&s)[T][4]) {
  for (int64_t k = 0; k < deep; k += BLOCK) {
    __m512bh rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Number* from = w + r * apart + k;
      ask(from + ahead);
      rows[r] = load<__m512bh>(from);
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const auto token = load<__m512bh>(x + t * n + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        s[t][r] = _mm512_dpbf16_ps(s[t][r], rows[r], token);
    }
  }
}

template <int R, int T>
INLINE inline void strip(const Number* w, int64_t step, const Ready* x,
                         int64_t n, int64_t deep, int64_t ahead,
                         float* out, int64_t width) {
  __m512 s[T][4];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < 4; ++r) s[t][r] = __m512{};
  add_strip<R>(w, step * n, x, n, deep, ahead, s);
  for (int t = 0; t < T; ++t) {
    const __m128 four = sums(s[t][0], s[t][1], s[t][2], s[t][3]);
    for (int r = 0; r < R; ++r) out[t * width + r * step] += four[r];
  }
}
#endif

// run(R, first row, how far apart R rows lie): strips of R rows, then what
// is left one by one. Few tokens wait for memory, which likes rows that lie
// apart; many get neighbours, whose sums can be stored four at a time
template <int R, bool FEW, class Run>
void in_strips(int64_t rows, const Run& run) {
  const int64_t whole = rows / R;
  for (int64_t i = 0; i < whole; ++i)
    if constexpr (FEW) run(Count<R>(), i, whole);
    else run(Count<R>(), R * i, Count<1>());
  for (int64_t r = R * whole; r < rows; ++r)
    run(Count<1>(), r, Count<1>());
}

// out[t * width + r]: `rows` rows of w (…, n) times N tokens of x (N, n)
void strips(const Number* w, int64_t rows, const Ready* x, int64_t N,
            int64_t n, float* out, int64_t width) {
  for (int64_t t = 0; t < N; ++t) std::fill_n(out + t * width, rows, 0.0f);
  auto run = [&](auto few, int64_t part, int64_t ahead) {
    for (int64_t k = 0; k < n; k += part)
      in_strips<STREAMS, few>(rows, [&](auto R, auto r, auto step) INLINE {
        in_groups<TOGETHER>(N, [&](auto T, int64_t t) INLINE {
          strip<R.value, T.value>(
              w + r * n + k, step, x + t * n + k, n,
              std::min(part, n - k), ahead, out + t * width + r, width);
        });
      });
  };
  const int64_t ahead = (N <= LEAN ? NEAR : AHEAD) / 2;  // numbers
  if (N <= TOGETHER) run(std::true_type(), n, ahead);
  else run(std::false_type(), HALF_ROW, STREAMS * n);
}

}  // namespace
