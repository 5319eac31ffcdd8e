// Wider registers: AVX-512, VNNI and NEON
// Generated from book/cli/wide.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
template <int T>
void multiply_tokens(const Tile& tile, const Few& few, int64_t first,
                   int64_t count) {
  __m512 total[T];
  for (int t = 0; t < T; ++t) total[t] = load<__m512>(few.out[t]);
  for (int64_t b = 0; b < count; ++b) {
    Bytes s[T] = {};
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) {
      const Bytes w = load<Bytes>(tile.values[b][m / 8][m % 8]);
      for (int t = 0; t < T; ++t)
        s[t] = _mm512_dpwssd_epi32(s[t], w, _mm512_set1_epi32(load<int32_t>(
            &few.lines[t][first + b].values[m / 8][m % 8 * 2])));
    }
    const __m512 factors = load<__m512>(tile.factors[b]);
    for (int t = 0; t < T; ++t)
      total[t] += _mm512_cvtepi32_ps(s[t])
                  * (factors * few.halves[t][first + b]);
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(few.out[t], total[t]);
}

void multiply_tile(const Tile& tile, const Few& few, int64_t first,
                   int64_t count) {
  with_count<TOKENS>(few.count, [&](auto T) {
    multiply_tokens<T.value>(tile, few, first, count);
  });
}
#endif

#ifdef GPTOSS_BF16
// of 64 weights, the halves of a register interleaved give 0 ... 15 and
// 32 ... 47, then the others
Array<Number> compact_ready(const Buffer& x) {
  Array<Number> to(x.size());
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
#endif

#ifdef GPTOSS_BF16
using Query = Number;
using Key = int32_t;  // a pair of columns
using Value = Number;

// to[c / 2][r]: two numbers of key r < 16, zero from `rows` on
void key_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
              Key* to) {
  for (int64_t c = 0; c < C; c += 32, to += 16 * ROWS) {
    const bool half = C - c < 32;
    Bytes v[16];
    Number copy[16 * 32];
    const bool whole = !half && rows >= 16;
    if (!whole) {
      std::memset(copy, 0, sizeof copy);
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(k + r * stride + c, half ? 16 : 32, copy + r * 32);
    }
    const Number* from = whole ? k + c : copy;
    for (int64_t r = 0, step = whole ? stride : 32; r < 16; ++r)
      v[r] = load<Bytes>(from + r * step);
    turn(v);
    for (int64_t pair = 0; pair < (half ? 8 : 16); ++pair)
      _mm512_storeu_si512(to + pair * ROWS, v[pair]);
  }
}

// run(8, r) for rows r ... r + 7, then for four, two, one at a time
template <class Run>
void by_eights(int64_t rows, const Run& run) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) run(std::integral_constant<int, 8>(), r);
  if (rows & 4) run(std::integral_constant<int, 4>(), r), r += 4;
  if (rows & 2) run(std::integral_constant<int, 2>(), r), r += 2;
  if (rows & 1) run(std::integral_constant<int, 1>(), r);
}

// out[r][0 ... 15] = q[r] times sixteen keys, as `key_tile` leaves them
template <int R>
void score_rows(const Key* keys, const Number* next, int64_t C,
                const Number* q, Target out) {
  __m512 s[R] = {};
  for (int64_t c = 0; c < C; c += 2, keys += ROWS, next += 32) {
    __builtin_prefetch(next);  // where the keys of a head lie together
    const __m512bh pairs = load<__m512bh>(keys);
    for (int r = 0; r < R; ++r)
      s[r] = _mm512_dpbf16_ps(s[r], pairs, (__m512bh)_mm512_set1_epi32(
          load<int32_t>(q + r * C + c)));
  }
  for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out.at + r * out.stride, s[r]);
}

void score(const Key* keys, const Number* next, int64_t C, const Query* q,
           int64_t rows, Target out) {
  by_eights(rows, [&](auto some, int64_t r) {
    score_rows<some>(keys, next, C, q + r * C,
                     {out.at + r * out.stride, out.stride});
  });
}

// out[r][0 ... 16 W - 1] += sum over keys of weight[r] times v
template <int R, int W>
void mix_rows(const Number* v, int64_t stride, int64_t count,
              Source weights, int64_t C, float* out) {
  const int64_t ahead = 64 * stride;
  __m512 s[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w)
      s[r][w] = _mm512_loadu_ps(out + r * C + 16 * w);
  for (int64_t k = 0; k < count; ++k, v += stride) {
    __builtin_prefetch(v + ahead);
    __m512 x[W];
    for (int w = 0; w < W; ++w)
      x[w] = _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(load<__m256i>(v + 16 * w)), 16));
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w)
        s[r][w] = _mm512_fmadd_ps(x[w], _mm512_set1_ps(
            weights.at[r * weights.stride + k]), s[r][w]);
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w)
      _mm512_storeu_ps(out + r * C + 16 * w, s[r][w]);
}

// the same for all C
void mix(const Value* v, int64_t stride, int64_t count, Source weights,
         int64_t rows, int64_t C, float* out) {
  by_eights(rows, [&](auto some, int64_t r) {
    const Source from = {weights.at + r * weights.stride, weights.stride};
    for (int64_t c = 0; c < C; c += 32)
      (C - c < 32 ? mix_rows<some, 1> : mix_rows<some, 2>)(
          v + c, stride, count, from, C, out + r * C + c);
  });
}
#endif

}  // namespace
