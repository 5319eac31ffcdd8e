// Bytes times bytes, if you ask
// Generated from book/kernels/coarse.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX2
constexpr float COARSE = 127;
constexpr int64_t DEEP = 16;  // blocks: 8 KiB of bytes, a quarter of L1
constexpr int A_TILE = 5;    // tokens

struct ByteTile {  // 16 rows of a weight, four columns side by side
  alignas(64) uint8_t values[DEEP][2][4][16][4];
  alignas(64) float factors[DEEP][16];
};

// eight rows of four words become four registers: word j of all rows
inline void transpose_words(const uint8_t* w, int64_t stride,
                            __m256i (&v)[4]) {
  __m256i t[4];
  for (int i = 0; i < 4; ++i)
    t[i] = _mm256_inserti128_si256(
        _mm256_castsi128_si256(load<__m128i>(w + i * stride)),
        load<__m128i>(w + (i + 4) * stride), 1);
  const __m256i a = _mm256_unpacklo_epi32(t[0], t[1]);
  const __m256i b = _mm256_unpackhi_epi32(t[0], t[1]);
  const __m256i c = _mm256_unpacklo_epi32(t[2], t[3]);
  const __m256i d = _mm256_unpackhi_epi32(t[2], t[3]);
  v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
}

// powers of two of eight rows' scales
inline Floats powers(const uint8_t* eight) {
  const Ints bits = (Ints)_mm256_cvtepu8_epi32(
      _mm_cvtsi64_si128(load<int64_t>(eight))) << 23;
  const Ints least = Ints{} + (1 << 22);
  const Floats f = (Floats)(bits > least ? bits : least);
  return f + 0 * f;  // infinity becomes NaN
}

void decode_bytes(const uint8_t* w, const uint8_t* scales, int64_t blocks,
                  int64_t count, ByteTile& tile) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i values = _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < ROWS; r += 8) {
      uint8_t column[8];
      for (int64_t i = 0; i < 8; ++i) {
        column[i] = scales[(r + i) * blocks + b];
        if (b % 4 == 0)  // another 64 bytes of the row
          __builtin_prefetch(w + ((r + i) * blocks + b + DEEP) * 16);
      }
      store(&tile.factors[b][r], powers(column));
      __m256i v[4];
      transpose_words(w + (r * blocks + b) * 16, 16 * blocks, v);
      for (int u = 0; u < 2; ++u)  // low nibbles, high nibbles
        for (int j = 0; j < 4; ++j) {
          const __m256i nibbles = u ? _mm256_srli_epi16(v[j], 4) : v[j];
          const __m256i found = _mm256_shuffle_epi8(
              values, _mm256_and_si256(nibbles, low));
          std::memcpy(tile.values[b][u][j][r], &found, sizeof found);
        }
    }
}

struct FewBytes {  // tokens that are multiplied with a tile together
  const int8_t* bytes[A_TILE];
  const int32_t* offsets[A_TILE];
  const float* halves[A_TILE];
  float* out[A_TILE];  // 16 sums each
};

// 8 rows: the sum of four columns in each lane, over half a block
#if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
inline __m256i add_four(__m256i sums, __m256i w, __m256i x) {  // in 32 bits
#ifdef GPTOSS_AVX512
  return _mm256_dpbusd_epi32(sums, w, x);
#else
  return _mm256_dpbusd_avx_epi32(sums, w, x);
#endif
}

inline Ints added(__m256i sums) { return (Ints)sums; }
#else
// in 16 bits, four times at most
inline __m256i add_four(__m256i sums, __m256i w, __m256i x) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
}

inline Ints added(__m256i sums) {
  return (Ints)_mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}
#endif

// adds blocks first ... first + count - 1 of 16 rows to the tokens' sums
template <int T>
void multiply_bytes(const ByteTile& tile, const FewBytes& few,
                    int64_t first, int64_t count) {
  const int8_t* from[T];
  for (int t = 0; t < T; ++t) from[t] = few.bytes[t] + BLOCK * first;
  for (int64_t b = 0; b < count; ++b) {
    Ints s[T][2];
    for (int t = 0; t < T; ++t)
      s[t][0] = s[t][1] = Ints{} + few.offsets[t][first + b];
    for (int u = 0; u < 2; ++u) {
      __m256i half[T][2] = {};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        auto w = reinterpret_cast<const __m256i*>(tile.values[b][u][j]);
        const __m256i w0 = w[0], w1 = w[1];
        for (int t = 0; t < T; ++t) {
          const __m256i x = _mm256_set1_epi32(load<int32_t>(
              from[t] + BLOCK * b + 16 * u + 4 * j));
          half[t][0] = add_four(half[t][0], w0, x);
          half[t][1] = add_four(half[t][1], w1, x);
          hold(half[t][0]), hold(half[t][1]);
        }
      }
      for (int t = 0; t < T; ++t)
        for (int h = 0; h < 2; ++h) s[t][h] += added(half[t][h]);
    }
    for (int t = 0; t < T; ++t)
      for (int h = 0; h < 2; ++h) {
        float* to = few.out[t] + 8 * h;
        const Floats f = load<Floats>(&tile.factors[b][8 * h])
                         * few.halves[t][first + b];
        store(to, load<Floats>(to)
                  + (Floats)_mm256_cvtepi32_ps((__m256i)s[t][h]) * f);
      }
  }
}

struct Coarse : Inputs {
  static constexpr char OPERATOR[] = "packed_experts_eight";
  static constexpr int64_t TILED = SIDE == 4 ? 8 : 9;
  static constexpr int64_t PAIR = 1;

#ifdef GPTOSS_AVX512
  Interleaved<WholePanel<InBytes>> four;

  static float most() { return lent() ? STORED : COARSE; }

  Coarse(const float* x, int64_t rows, const Packed& weight, float stored,
         std::vector<int64_t> place, const Groups& groups)
      : Inputs(x, rows, weight, most(), std::move(place), groups, false) {
    if (lent()) return;
    four = interleaved<InBytes>(digits, from, groups.begin, TILED);
    few = TILED, low = BROAD;
#ifdef GPTOSS_BF16  // few tokens go by strips, which need no rounding
    if (!PAIRED || stored != STORED || !any_below(groups, TILED)) return;
    pairs = paired(x, from, weight.blocks, groups.begin, PAIR);
    few = TOGETHER + 1;
#endif
  }

  void by_tile(const uint8_t* w, const uint8_t* scales, int64_t rows,
               int64_t first, int64_t count, float* out) const {
    panels<WholePanel<InBytes>>(w, scales, rows, digits.blocks,
                                four.at(first), count, out);
  }
#else
  std::vector<int8_t> bytes;     // (rows, blocks, 32), even elements first
  std::vector<int32_t> offsets;  // -12 times the sum of a block

  Coarse(const float* x, int64_t rows, const Packed& weight, float,
         std::vector<int64_t> place, const Groups& groups)
      : Inputs(x, rows, weight, COARSE, std::move(place), groups) {
    few = TILED;
    bytes.resize(rows * weight.blocks * BLOCK);
    offsets.resize(rows * weight.blocks);
    at::parallel_for(0, offsets.size(), 512, [&](int64_t b, int64_t end) {
      for (; b < end; ++b) {
        const int16_t* q = digits.lines[b].values[0];
        std::copy(q, q + BLOCK, &bytes[b * BLOCK]);
        for (int64_t i = 0; i < BLOCK; ++i) offsets[b] -= 12 * q[i];
      }
    });
  }

  void by_tile(const uint8_t* w, const uint8_t* scales, int64_t,
               int64_t first, int64_t count, float* out) const {
    const int64_t blocks = digits.blocks;
    ByteTile tile;
    std::fill_n(out, count * ROWS, 0.0f);
    for (int64_t b = 0; b < blocks; b += DEEP) {
      const int64_t deep = std::min(DEEP, blocks - b);
      decode_bytes(w + 16 * b, scales + b, blocks, deep, tile);
      in_groups<A_TILE>(count, [&](auto T, int64_t i) {
        FewBytes few;
        for (int64_t t = 0; t < T.value; ++t) {
          const int64_t n = from[first + i + t];
          few.bytes[t] = &bytes[n * blocks * BLOCK];
          few.offsets[t] = &offsets[n * blocks];
          few.halves[t] = digits.half(n);
          few.out[t] = out + (i + t) * ROWS;
        }
        multiply_bytes<T.value>(tile, few, b, deep);
      });
    }
  }
#endif
};

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("packed_experts_eight", packed_experts<Coarse>);
}
#endif

}  // namespace
