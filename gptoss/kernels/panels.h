// How does a weight meet a hundred tokens?
// Generated from book/kernels/panels.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
constexpr int64_t PANEL = 32;  // rows
constexpr int64_t SLICE = 8;   // blocks: 16 KiB of sixteen-bit numbers

// sixteen rows of sixteen 32-bit words become sixteen columns
inline void turn(Bytes (&v)[16]) {
  Bytes t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }  // quarter q of v[i + k]: column 4 q + k of rows i ... i + 3
  for (int j = 0; j < 4; ++j)
    for (int odd = 0; odd < 2; ++odd) {  // quarters 0 and 2, or 1 and 3
      auto halves = [&](Bytes a, Bytes b) {
        return odd ? _mm512_shuffle_i32x4(a, b, 0xdd)
                   : _mm512_shuffle_i32x4(a, b, 0x88);
      };
      const Bytes a = halves(v[j], v[4 + j]);
      const Bytes b = halves(v[8 + j], v[12 + j]);
      t[4 * odd + j] = _mm512_shuffle_i32x4(a, b, 0x88);
      t[8 + 4 * odd + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
  std::copy(t, t + 16, v);
}

// put(b, half, v) for each HELD of `count` blocks, from b on, and for rows 0
// to 15 (half 0), 16 to 31 (half 1): word c of all their 64 bytes in v[c],
// zeros for blocks that are not there
template <class Put>
void by_quads(const uint8_t* w, int64_t blocks, int64_t count,
              const Put& put) {
  for (int64_t b = 0; b < count; b += HELD)
    for (int half = 0; half < 2; ++half) {
      const __mmask64 real = count - b < HELD
                                 ? (1ll << 16 * (count - b)) - 1 : -1;
      const uint8_t* from = w + 16 * (16 * half * blocks + b);
      Bytes v[16];
      for (int r = 0; r < 16; ++r, from += 16 * blocks)
        v[r] = _mm512_maskz_loadu_epi8(real, from);
      turn(v);
      put(b, half, v);
    }
}

// asks for the next slice, three lines of each row, part by part
struct Ahead {
  const uint8_t* w;
  int64_t stride;

  void ask(int64_t part, int64_t parts) const {
    constexpr int64_t LINES = 3 * PANEL;
    if (!w) return;
    const int64_t end = LINES * (part + 1) / parts;
    for (int64_t i = LINES * part / parts; i < end; ++i)
      __builtin_prefetch(w + i % PANEL * stride + i / PANEL * 64);
  }
};

// the scales of 32 rows as columns, four blocks' in a lane
struct ScaleColumns {
  alignas(64) uint32_t four[SLICE / HELD][PANEL] = {};

  ScaleColumns(const uint8_t* scales, int64_t blocks, int64_t count) {
    for (int64_t b = 0; b < count; b += HELD)
      for (int64_t r = 0; r < PANEL; ++r)
        if (count - b < HELD)
          std::memcpy(&four[b / HELD][r], scales + r * blocks + b,
                      count - b);
        else
          four[b / HELD][r] = load<uint32_t>(scales + r * blocks + b);
  }

  Bytes of(int64_t b, int half) const {  // of sixteen rows
    return _mm512_srl_epi32(load<Bytes>(&four[b / HELD][16 * half]),
                            _mm_cvtsi32_si128(8 * (b % HELD)))
           & _mm512_set1_epi32(255);
  }

  __m512 powers(int64_t b, int half) const {
    const auto f = (__m512)_mm512_max_epi32(
        _mm512_slli_epi32(of(b, half), 23), _mm512_set1_epi32(1 << 22));
    return f + 0 * f;  // infinity becomes NaN
  }
};

#ifdef GPTOSS_BF16
struct PairPanel {
  static constexpr int MANY = 12;  // tokens: 24 sums, 2 weights, 1 token
  static constexpr int64_t PAIRS = HELD * BLOCK / 2;  // of numbers in a row
  alignas(64) Number values[SLICE / HELD][PAIRS][2][BLOCK];

  static int64_t words(int64_t count) { return padded(count) / 2; }

  PairPanel(const uint8_t* w, const uint8_t* scales, int64_t blocks,
            int64_t count) {
    const ScaleColumns columns(scales, blocks, count);
    by_quads(w, blocks, count, [&](int64_t b, int half, const Bytes* v) {
      for (int64_t i = 0; i < HELD; ++i) {
        const Bytes s = columns.of(b + i, half);
        const Bytes lower = _mm512_slli_epi16(_mm512_sub_epi16(
            _mm512_set1_epi16(252), s | _mm512_slli_epi32(s, 16)), 7);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c)
            _mm512_store_si512(
                values[b / HELD][16 * j + 4 * i + c][half],
                lowered(found(v[4 * i + c], j, LARGE), lower));
      }
    });
  }
};

// out[t * width + r] += 32 rows of `count` blocks, times T tokens
template <int T>
void multiply(const PairPanel& panel, const int32_t* x, int64_t count,
              const Ahead& next, float* out, int64_t width) {
  __m512 s[T][2];
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h)
      s[t][h] = _mm512_loadu_ps(out + t * width + 16 * h);
  const Number* w = panel.values[0][0][0];
  for (int64_t i = 0; i < PairPanel::words(count); ++i, w += 2 * BLOCK) {
    if (i % 16 == 0) next.ask(i / 16, PairPanel::words(count) / 16);
    const auto a = load<__m512bh>(w), b = load<__m512bh>(w + BLOCK);
    for (int t = 0; t < T; ++t) {
      Bytes token = _mm512_set1_epi32(*x++);
      hold(token);  // or it would be loaded twice
      s[t][0] = _mm512_dpbf16_ps(s[t][0], a, (__m512bh)token);
      s[t][1] = _mm512_dpbf16_ps(s[t][1], b, (__m512bh)token);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_ps(out + t * width + 16 * h, s[t][h]);
}
#endif

alignas(64) constexpr int16_t WORDS[32] = {
    0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
    0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // as LARGE

struct InWords {  // sixteen bits times sixteen, two in a lane
  static constexpr int LANES = 16;  // of a block

  static Bytes weights(const Bytes* v, int i) {
    return found(v[i / 4], i % 4, WORDS);
  }

  static Bytes add(Bytes sums, Bytes w, Bytes x) {
    return _mm512_dpwssd_epi32(sums, w, x);
  }

  // word 4 c + j: elements 8 c + j and 8 c + 4 + j of a block
  static void split(const Line& line, int32_t* to) {
    alignas(64) uint16_t from[BLOCK];
    for (int k = 0; k < BLOCK; ++k)  // 8 (k / 8) + k / 2 % 4 + 4 (k % 2)
      from[k] = k / 8 * 4 + k / 4 % 2 + k % 2 * 2 + k / 2 % 2 * 16;
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(
        load<Bytes>(from), load<Bytes>(&line)));
  }

  static int32_t offset(const Line&) { return 0; }
};

struct InBytes {  // eight bits times eight, four in a lane
  static constexpr int LANES = 8;

  static Bytes weights(const Bytes* v, int i) {
    const Bytes word = v[i % 4];
    return _mm512_shuffle_epi8(
        table(), (i < 4 ? word : _mm512_srli_epi16(word, 4))
                 & _mm512_set1_epi8(15));
  }

  static Bytes add(Bytes sums, Bytes w, Bytes x) {
    return _mm512_dpbusd_epi32(sums, w, x);
  }

  static void split(const Line& line, int32_t* to) {
    const __m256i bytes = _mm512_cvtepi16_epi8(load<Bytes>(&line));
    std::memcpy(to, &bytes, sizeof bytes);
  }

  static int32_t offset(const Line& line) {  // weights are 12 too large
    int32_t sum = 0;
    for (int i = 0; i < BLOCK / 2; ++i)
      sum += line.values[0][i] + line.values[1][i];
    return -12 * sum;
  }
};

template <class Kind>
struct WholePanel {
  static constexpr int MANY = 6;  // tokens: 12 sums, 12 totals
  static constexpr int64_t LANES = Kind::LANES, SIZE = LANES + 2;
  Bytes values[SLICE][LANES][2];
  __m512 factors[SLICE][2];

  static int64_t words(int64_t count) { return SIZE * count; }

  WholePanel(const uint8_t* w, const uint8_t* scales, int64_t blocks,
             int64_t count) {
    const ScaleColumns columns(scales, blocks, count);
    by_quads(w, blocks, count, [&](int64_t b, int half, const Bytes* v) {
      for (int64_t i = 0; i < HELD; ++i, ++b, v += 4) {
        factors[b][half] = columns.powers(b, half);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c)
          values[b][c][half] = Kind::weights(v, c);
      }
    });
  }
};

template <int T, class Kind>
void multiply(const WholePanel<Kind>& panel, const int32_t* x, int64_t count,
              const Ahead& next, float* out, int64_t width) {
  constexpr int LANES = Kind::LANES;
  __m512 total[T][2];
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h)
      total[t][h] = _mm512_loadu_ps(out + t * width + 16 * h);
  for (int64_t b = 0; b < count; ++b, x += T * (LANES + 2)) {
    next.ask(b, count);
    Bytes s[T][2];
    for (int t = 0; t < T; ++t)
      s[t][0] = s[t][1] = _mm512_set1_epi32(x[T * (LANES + 1) + t]);
#pragma GCC unroll 16
    for (int c = 0; c < LANES; ++c)
      for (int t = 0; t < T; ++t) {
        Bytes token = _mm512_set1_epi32(x[T * c + t]);
        hold(token);
        for (int h = 0; h < 2; ++h)
          s[t][h] = Kind::add(s[t][h], panel.values[b][c][h], token);
      }
    for (int t = 0; t < T; ++t) {
      const __m512 half = _mm512_set1_ps(load<float>(x + T * LANES + t));
      for (int h = 0; h < 2; ++h)
        total[t][h] += _mm512_cvtepi32_ps(s[t][h])
                       * (panel.factors[b][h] * half);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_ps(out + t * width + 16 * h, total[t][h]);
}

// out[t * rows + r]: `rows` rows times N tokens, whose words lie beside each
// other in groups of up to MANY
template <class Panel>
void panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
            int64_t blocks, const int32_t* x, int64_t N, float* out) {
  std::fill_n(out, N * rows, 0.0f);
  for (int64_t r = 0; r + PANEL <= rows; r += PANEL)
    for (int64_t b = 0; b < blocks; b += SLICE) {
      const int64_t deep = std::min(SLICE, blocks - b), at = r * blocks + b;
      const Panel panel(w + 16 * at, scales + at, blocks, deep);
      const int64_t next = b + SLICE < blocks ? at + SLICE
                                              : (r + PANEL) * blocks;
      in_groups<Panel::MANY>(N, [&](auto T, int64_t t) {
        multiply<T.value>(panel, x + t * Panel::words(blocks)
                                     + T * Panel::words(b), deep,
                          {t ? nullptr : w + 16 * next, 16 * blocks},
                          out + t * rows + r, rows);
      });
    }
  const int64_t left = rows % PANEL, done = rows - left;
  if (!left) return;
  std::vector<uint8_t> weights(16 * PANEL * blocks), powers(PANEL * blocks);
  std::copy_n(w + 16 * done * blocks, 16 * left * blocks, weights.data());
  std::copy_n(scales + done * blocks, left * blocks, powers.data());
  Buffer spare(N * PANEL);
  panels<Panel>(weights.data(), powers.data(), PANEL, blocks, x, N,
                spare.data());
  for (int64_t t = 0; t < N; ++t)
    std::copy_n(&spare[t * PANEL], left, out + t * rows + done);
}
#endif

}  // namespace
