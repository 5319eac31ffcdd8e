// How are eight bits multiplied at memory's speed?
// Generated from book/kernels/eight_rows.py; edit the chapter, not this file.

namespace {

// 64 weights, two blocks: of each the first half, then the second halves
constexpr int64_t GROUP = 64, HALF = 16;

// where the first half of block b begins, in a row
inline int64_t place(int64_t b) { return b / 2 * GROUP + b % 2 * HALF; }

inline float wide_scale(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  return load<float>(&wide);
}

struct Eight {
  const int8_t* values;    // (rows, n)
  const uint16_t* scales;  // (rows, n / 32): bf16
  int64_t rows, n;
};

struct Integers {  // tokens in 16 bits, and the steps of their blocks
  Array<int16_t> values;
  Buffer steps;

  explicit Integers(const Buffer& x)
      : values(x.size()), steps(x.size() / BLOCK) {
    for (size_t b = 0; b < steps.size(); ++b) {
      const Shorts near = nearest(&x[b * BLOCK], STORED, steps[b]);
      for (int half = 0; half < 2; ++half)
        std::memcpy(&values[place(b) + 2 * half * HALF],
                    reinterpret_cast<const char*>(&near) + 32 * half, 32);
    }
  }
};

#ifdef GPTOSS_AVX512
inline Bytes widen(const int8_t* from) {
  return _mm512_cvtepi8_epi16(load<__m256i>(from));
}

inline Words add_pairs(Words sums, Bytes a, Bytes b) {
  return (Words)_mm512_dpwssd_epi32((Bytes)sums, a, b);
}

inline Sums spread(const float* two) {  // each in eight lanes
  const Words lane = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  return (Sums)_mm512_permutevar_ps(
      (__m512)_mm512_set1_pd(load<double>(two)), (Bytes)lane);
}

inline Sums spread(const uint16_t* two) {
  constexpr int ONE = 0x01008080, TWO = 0x03028080;  // 80: a zero byte
  const Words bytes = {ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE,
                       TWO, TWO, TWO, TWO, TWO, TWO, TWO, TWO};
  return (Sums)_mm512_shuffle_epi8(_mm512_set1_epi32(load<int32_t>(two)),
                                   (Bytes)bytes);
}
#elif defined(GPTOSS_AVX2)
inline Bytes widen(const int8_t* from) {
  return _mm256_cvtepi8_epi16(load<__m128i>(from));
}

inline Words add_pairs(Words sums, Bytes a, Bytes b) {
#ifdef GPTOSS_VNNI
  return (Words)_mm256_dpwssd_avx_epi32((Bytes)sums, a, b);
#else
  return sums + (Words)_mm256_madd_epi16(a, b);
#endif
}

inline Sums spread(const float* one) { return Sums{} + *one; }
inline Sums spread(const uint16_t* one) { return Sums{} + wide_scale(*one); }
#endif

// out[t][0], out[t][step] ...: R rows, `step` rows apart, times T tokens
#ifdef GPTOSS_AVX2
template <int R, int T>
void eight_dots(const Eight& w, int64_t row, int64_t step,
                const Integers& x, int64_t token, float* out) {
  const int64_t n = w.n, blocks = n / BLOCK;
  const int8_t* weights = w.values + row * n;
  const uint16_t* scales = w.scales + row * blocks;
  const int16_t* values = &x.values[token * n];
  const float* steps = &x.steps[token * blocks];
  Sums total[R][T] = {};
  for (int64_t b = 0; b < blocks; b += SIDE / 2) {
    Bytes q[T][2];
    Sums size[T];
    for (int t = 0; t < T; ++t) {
      for (int half = 0; half < 2; ++half)
        q[t][half] = load<Bytes>(values + t * n + place(b)
                                 + 2 * half * HALF);
      size[t] = spread(steps + t * blocks + b);
    }
    for (int r = 0; r < R; ++r) {
      const int8_t* from = weights + r * step * n + place(b);
      if (b % 2 == 0) ask_ahead(from);
      const Bytes w0 = widen(from), w1 = widen(from + 2 * HALF);
      const Sums scale = spread(scales + r * step * blocks + b);
      for (int t = 0; t < T; ++t) {
        const Words dot = add_pairs(add_pairs(Words{}, w0, q[t][0]), w1,
                                    q[t][1]);
        total[r][t] += __builtin_convertvector(dot, Sums) * size[t] * scale;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      out[t * w.rows + r * step] = sum(total[r][t]);
}
#else
template <int R, int T>
void eight_dots(const Eight& w, int64_t row, int64_t step,
                const Integers& x, int64_t token, float* out) {
  const int64_t n = w.n, blocks = n / BLOCK;
  for (int64_t i = 0; i < R * T; ++i) {
    const int64_t r = row + i / T * step, t = token + i % T;
    float total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      int32_t dot = 0;
      for (int64_t k = place(b); k < place(b) + 3 * HALF;
           k += 2 * HALF)
        for (int j = 0; j < HALF; ++j)
          dot += w.values[r * n + k + j] * x.values[t * n + k + j];
      total += dot * (x.steps[t * blocks + b]
                      * wide_scale(w.scales[r * blocks + b]));
    }
    out[i % T * w.rows + i / T * step] = total;
  }
}
#endif

template <int T>
void eight_rows(const Eight& w, int64_t row0, int64_t rows,
                const Integers& x, int64_t token, float* out) {
  const int64_t step = rows / STREAMS;
  for (int64_t r = 0; r < step; ++r)
    eight_dots<STREAMS, T>(w, row0 + r, step, x, token, out + r);
  for (int64_t r = STREAMS * step; r < rows; ++r)
    eight_dots<1, T>(w, row0 + r, 0, x, token, out + r);
}

// y (N, rows) = x (N, n) times the weight transposed, for a few tokens
void eight_few(const Eight& w, const Buffer& tokens, int64_t N, Buffer& y) {
  constexpr int64_t HEIGHT = 128;  // stays in L2 for the next four tokens
  const Integers x(tokens);
  share((w.rows + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT;
    const int64_t rows = std::min(HEIGHT, w.rows - row0);
    for (int64_t t = 0, some; t < N; t += some) {
      some = std::min<int64_t>(N - t, 4);
      with_count<4>(some, [&](auto T) {
        eight_rows<T.value>(w, row0, rows, x, t, &y[t * w.rows + row0]);
      });
    }
  });
}

}  // namespace
