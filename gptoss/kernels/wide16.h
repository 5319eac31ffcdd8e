// Wider registers: AVX-512, VNNI and NEON
// Generated from book/cli/wide.py; edit the chapter, not this file.

namespace {

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
