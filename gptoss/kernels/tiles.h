// What changes when many tokens meet one weight?
// Generated from book/kernels/many_rows.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX2
#ifdef GPTOSS_AVX512
constexpr int64_t CHUNK = 18;  // blocks
constexpr int TOKENS = 12;     // 24 sums, one weight
#else
constexpr int64_t CHUNK = 10;  // blocks: 10 KiB of integers, a third of L1
constexpr int TOKENS = 5;      // ten sums, two weights, one activation
#endif
constexpr int64_t FEW = SIDE == 4 ? 11 : 13;  // fewer tokens: no tile

struct Tile {  // 16 rows of a weight, pairs of columns side by side
  alignas(64) int16_t values[CHUNK][2][8][16][2];
  alignas(64) float factors[CHUNK][16];
};

struct Few {  // tokens that are multiplied with a tile together
  int64_t count;
  const Line* lines[TOKENS];
  const float* halves[TOKENS];
  float* out[TOKENS];  // 16 sums each
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

// two columns, side by side, in 16 bits
inline void put_pair(__m128i a, __m128i b, int16_t (*to)[2]) {
  auto at = reinterpret_cast<__m256i*>(to);
  at[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
  at[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
}

#ifndef GPTOSS_AVX512
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
        put_pair(two[0], two[1], tile.values[b][u][m]);
      }
  }
}

// sums, plus sixteen products added in pairs
inline __m256i add_products(__m256i sums, __m256i a, __m256i b) {
#ifdef GPTOSS_VNNI
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
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) {
      const auto& pairs = tile.values[b][m / 8][m % 8];
      const __m256i w0 = load<__m256i>(pairs), w1 = load<__m256i>(pairs[8]);
      for (int t = 0; t < TOKENS; ++t) {
        const __m256i x = _mm256_set1_epi32(load<int32_t>(
            &few.lines[t][first + b].values[m / 8][m % 8 * 2]));
        s[t][0] = add_products(s[t][0], w0, x);
        s[t][1] = add_products(s[t][1], w1, x);
        hold(s[t][0]), hold(s[t][1]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      const float half = few.halves[t][first + b];
      float* to = few.out[t];
      for (int i = 0; i < 2; ++i, to += 8)
        store(to, load<Floats>(to) + (Floats)_mm256_cvtepi32_ps(s[t][i])
                  * (load<Floats>(&tile.factors[b][8 * i]) * half));
    }
  }
}
#else
void multiply_tile(const Tile& tile, const Few& few, int64_t first,
                   int64_t count);
#endif
#endif

constexpr int64_t ROWS = 16;  // of a tile

#ifdef GPTOSS_AVX2
// sixteen rows, many tokens; decode(b, count, tile) fills a tile from b on
template <class Decode>
void rows_for_many(const Decode& decode, const Quantised& x,
                   std::span<const int64_t> inputs, float* out) {
  const int64_t count = inputs.size(), blocks = x.blocks;
  Tile tile;
  std::fill_n(out, count * ROWS, 0.0f);
  for (int64_t b = 0; b < blocks; b += CHUNK) {
    const int64_t deep = std::min(CHUNK, blocks - b);
    decode(b, deep, tile);
    in_groups<TOKENS>(count, [&](auto T, int64_t i) {
      float spare[ROWS] = {};  // a group may have empty places
      Few few{T.value};
      for (int64_t t = 0; t < TOKENS; ++t) {
        const bool real = t < T.value;
        const int64_t n = inputs[real ? i + t : i];
        few.lines[t] = x.line(n);
        few.halves[t] = x.half(n);
        few.out[t] = real ? out + (i + t) * ROWS : spare;
      }
      multiply_tile(tile, few, b, deep);
    });
  }
}
#endif

}  // namespace
