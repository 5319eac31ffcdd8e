// Wider registers: AVX-512, VNNI and NEON
// Generated from book/cli/wide.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
// columns of 16-bit words, 2 p and 2 p + 1, of eight rows: those of the
// first column, then of the second, then both again
struct Columns {
  alignas(64) uint16_t word[4][32];

  constexpr Columns() : word() {
    for (int p = 0; p < 4; ++p)
      for (int i = 0; i < 32; ++i)
        word[p][i] = i % 8 * 8 + 2 * p + i / 8 % 2;
  }
};
constexpr Columns COLUMNS;
constexpr int16_t WORDS[32] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4,
                               -6, -8, -12, 0, 1, 2, 3, 4, 6, 8, 12, 0, -1,
                               -2, -3, -4, -6, -8, -12};  // TWICE, twice

inline Bytes four_rows(const uint8_t* w, int64_t stride) {
  Bytes v = _mm512_castsi128_si512(load<__m128i>(w));
  v = _mm512_inserti32x4(v, load<__m128i>(w + stride), 1);
  v = _mm512_inserti32x4(v, load<__m128i>(w + 2 * stride), 2);
  return _mm512_inserti32x4(v, load<__m128i>(w + 3 * stride), 3);
}

void decode_tile(const uint8_t* w, const uint8_t* scales, int64_t blocks,
                 int64_t count, Tile& tile) {
  const int64_t stride = 16 * blocks;
  const Bytes values = load<Bytes>(WORDS);
  for (int64_t b = 0; b < count; ++b, w += 16) {
    Bytes v[4];
    for (int i = 0; i < 4; ++i) v[i] = four_rows(w + 4 * i * stride, stride);
    for (int p = 0; p < 4; ++p) {
      const Bytes word = load<Bytes>(COLUMNS.word[p]);
      const Bytes upper = _mm512_permutex2var_epi16(v[0], word, v[1]);
      const Bytes lower = _mm512_permutex2var_epi16(v[2], word, v[3]);
      for (int i = 0; i < 2; ++i) {  // eight words of each, for one column
        const __m256i a = _mm512_castsi512_si256(upper);
        const __m256i c = _mm512_castsi512_si256(lower);
        const Bytes words = _mm512_cvtepu8_epi16(
            i ? _mm256_permute2x128_si256(a, c, 0x31)
              : _mm256_permute2x128_si256(a, c, 0x20));
        _mm512_store_si512(tile.values[b][0][2 * p + i],
                           _mm512_permutexvar_epi16(words, values));
        _mm512_store_si512(tile.values[b][1][2 * p + i],
                           _mm512_permutexvar_epi16(
                               _mm512_srli_epi16(words, 4), values));
      }
    }
    for (int64_t r = 0; r < 16; ++r)
      tile.factors[b][r] = power(scales[r * blocks + b]);
  }
}

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
#endif

}  // namespace
