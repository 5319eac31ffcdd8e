// What do bf16 units make of four bits?
// Generated from book/kernels/pairs.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
constexpr int64_t HELD = 4;  // blocks are decoded four at a time

// words >> k
inline Bytes shifted(Bytes words, int k) {
#ifdef GPTOSS_AMX  // Intel
  return k ? _mm512_mulhi_epu16(words, _mm512_set1_epi16(1 << (16 - k)))
           : words;
#else
  return _mm512_srli_epi16(words, k);
#endif
}

// code j of each word, looked up in a table of 32
inline Bytes found(Bytes words, int j, const void* table) {
  return _mm512_permutexvar_epi16(shifted(words, 4 * j), load<Bytes>(table));
}
#endif

#ifdef GPTOSS_BF16
// the codes' values times 2**125 as bf16, zeros without a sign; twice, so
// that one more bit of an index does not matter
constexpr uint16_t LARGE[32] = {
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40};
constexpr int ONCE = 12;  // tokens, with two rows: weights are decoded once
#ifdef GPTOSS_AMX  // Intel: without its squares whole numbers are quicker
constexpr bool PAIRED = false;
#else
constexpr bool PAIRED = true;
#endif
constexpr int64_t FOUR = HELD * BLOCK;

inline int64_t padded(int64_t blocks) {
  return (blocks + HELD - 1) / HELD * FOUR;
}

// floats as bf16: of four blocks the elements 0, 4, 8 ..., then 1, 5, 9 ...
void pair_row(const float* x, int64_t blocks, Number* to) {
  alignas(64) uint16_t place[BLOCK];
  for (int i = 0; i < BLOCK; ++i) place[i] = i % 8 * 4 + i / 8;
  std::fill(to + blocks / HELD * FOUR, to + padded(blocks), Number(0));
  for (int64_t b = 0; b < blocks; ++b, x += BLOCK) {
    alignas(64) Number part[BLOCK];
    _mm512_store_si512(part, _mm512_permutexvar_epi16(
        load<Bytes>(place), (Bytes)_mm512_cvtne2ps_pbh(
            load<__m512>(x + 16), load<__m512>(x))));
    for (int j = 0; j < 4; ++j)
      std::copy_n(part + 8 * j, 8, to + b / HELD * FOUR + BLOCK * j
                                   + 8 * (b % HELD));
  }
}

// bits - lower, but not below zero
inline Bytes lowered(Bytes bits, Bytes lower) {
#ifdef GPTOSS_AMX
  return _mm512_subs_epu16(bits, lower);
#else
  return _mm512_sub_epi16(_mm512_max_epu16(bits, lower), lower);
#endif
}

// four scale bytes, or `count` < 4 and 127, in every lane of 32 bits
inline Bytes four_scales(const uint8_t* from, int64_t count) {
  return _mm512_broadcastd_epi32(
      count < HELD ? _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count),
                                         from)
                   : _mm_cvtsi32_si128(load<int32_t>(from)));
}

// for a shuffle: a byte for each quarter of a register, in the upper half of
// its words (80: zero)
alignas(64) constexpr uint64_t QUARTERS[8] = {
    0x0080008000800080, 0x0080008000800080, 0x0180018001800180,
    0x0180018001800180, 0x0280028002800280, 0x0280028002800280,
    0x0380038003800380, 0x0380038003800380};

// four blocks, or `count` < 4 of them and zeros
struct Fours {
  Bytes words, lower;  // how far exponents lie below those of LARGE

  Fours() = default;

  Fours(const uint8_t* w, const uint8_t* scales, int64_t count) {
    words = load_blocks(w, count);
    lower = shifted(_mm512_sub_epi16(
        _mm512_set1_epi16(252 << 8), _mm512_shuffle_epi8(
            four_scales(scales, count), load<Bytes>(QUARTERS))), 1);
  }

  // as bf16, the elements j, j + 4, j + 8 ...
  Bytes decoded(int j) const {
    return lowered(found(words, j, LARGE), lower);
  }
};

// does bf16 hold the weights of these scales? 2**-125 ... 2**125
bool usual(const uint8_t* scales, int64_t count) {
  uint8_t bad = 0;
  for (int64_t i = 0; i < count; ++i)
    bad |= uint8_t(scales[i] - 2) > 250;
  return !bad;
}

// run(b, count) for each four of the blocks, inlined: for whole ones, and
// for what is left
template <class Run>
inline void by_fours(int64_t blocks, const Run& run) {
  int64_t b = 0;
  for (; b + HELD <= blocks; b += HELD) run(b, HELD);
  if (b < blocks) run(b, blocks - b);
}

template <int T>
inline void clear(__m512 (&s)[T][4]) {
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) s[t][r] = __m512{};
}

// out[t * width + r * step] = s[t][r]
template <int R, int T>
inline void put(const __m512 (&s)[T][4], int64_t step, float* out,
                int64_t width) {
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    const __m128 four = sums(s[t][0], s[t][1], s[t][2], s[t][3]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[t * width + r * step] = four[r];
  }
}

// as `strip`, with rows that are decoded in registers
template <int R, int T>
void packed_strip(const uint8_t* w, const uint8_t* scales, int64_t step,
                  int64_t blocks, const Number* x, float* out,
                  int64_t width) {
  const int64_t n = padded(blocks), row = step * blocks;
  __m512 s[T][4];
  clear(s);
  by_fours(blocks, [&](int64_t b, int64_t count) INLINE {
    Fours fours[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * row + b;
      ask_ahead(w + 16 * at);
      fours[r] = {w + 16 * at, scales + at, count};
    }
#pragma GCC unroll 4
    for (int j = 0; j < HELD; ++j) {
      Bytes decoded[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) decoded[r] = fours[r].decoded(j);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) {
        const auto token = load<__m512bh>(x + t * n + BLOCK * (b + j));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          s[t][r] = _mm512_dpbf16_ps(s[t][r], (__m512bh)decoded[r], token);
      }
    }
  });
  put<R>(s, step, out, width);
}

constexpr int SCALED_AFTER = 3;  // tokens, at most

// the codes' values themselves, which lie 2**125 below those of LARGE
alignas(64) constexpr auto SMALL = [] {
  std::array<uint16_t, 32> to{};
  for (int i = 0; i < 32; ++i) to[i] = LARGE[i] ? LARGE[i] - (125 << 7) : 0;
  return to;
}();

// the powers of two of four blocks, each in four lanes
inline __m512 four_powers(const uint8_t* scales, int64_t count) {
  const Bytes first = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2,
                                       1, 1, 1, 1, 0, 0, 0, 0);
  const Words byte = (Words)_mm512_maskz_shuffle_epi8(
      0x1111111111111111, four_scales(scales, count), first);
  return (__m512)factors(byte, Sums{} + 1);
}

template <int R, int T>
void strip_of_few(const uint8_t* w, const uint8_t* scales, int64_t step,
                  int64_t blocks, const Number* x, float* out,
                  int64_t width) {
  const int64_t n = padded(blocks), row = step * blocks;
  __m512 s[T][4];
  clear(s);
  by_fours(blocks, [&](int64_t b, int64_t count) INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * row + b;
      ask_ahead(w + 16 * at, NEAR);
      const Bytes words = load_blocks(w + 16 * at, count);
      const __m512 powers = four_powers(scales + at, count);
      Bytes decoded[HELD];
#pragma GCC unroll 4
      for (int j = 0; j < HELD; ++j)
        decoded[j] = found(words, j, SMALL.data());
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
        __m512 y = {};
#pragma GCC unroll 4
        for (int j = 0; j < HELD; ++j)
          y = _mm512_dpbf16_ps(
              y, (__m512bh)decoded[j],
              load<__m512bh>(x + t * n + BLOCK * (b + j)));
        s[t][r] += y * powers;
      }
    }
  });
#pragma GCC unroll 3
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      s[t][r] += 0 * s[t][r];  // infinity becomes NaN
  put<R>(s, step, out, width);
}

// the same for scales that bf16 has no room for, one weight at a time
void unusual_rows(const uint8_t* w, const uint8_t* scales, int64_t rows,
                  int64_t blocks, const Number* x, int64_t N, float* out,
                  int64_t width) {
  for (int64_t t = 0; t < N; ++t, x += padded(blocks), out += width)
    for (int64_t r = 0; r < rows; ++r) {
      out[r] = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* from = w + 16 * (r * blocks + b);
        const Number* at = x + b / HELD * FOUR + b % HELD * 8;
        float s = 0;
        for (int i = 0; i < BLOCK; ++i)
          s += TWICE[from[i / 2] >> i % 2 * 4 & 15]
               * float(at[i % 4 * BLOCK + i / 4]);
        out[r] += s * power(scales[r * blocks + b]) / 2;
      }
    }
}

template <int R, int T>  // one of them is compiled
constexpr auto chosen() {
  if constexpr (T <= SCALED_AFTER) return strip_of_few<R, T>;
  else return packed_strip<R, T>;
}

// out[t * width + r]: `rows` rows of a packed weight times N tokens, each
// as `pair_row` leaves it
void packed_strips(const uint8_t* w, const uint8_t* scales, int64_t rows,
                   int64_t blocks, const Number* x, int64_t N, float* out,
                   int64_t width) {
  if (N > SCALED_AFTER && !usual(scales, rows * blocks))
    return unusual_rows(w, scales, rows, blocks, x, N, out, width);
  in_groups<ONCE>(N, [&](auto T, int64_t t) {
    constexpr int SOME = T.value <= TOGETHER ? STREAMS : STREAMS / 2;
    in_strips<SOME, true>(rows, [&](auto R, int64_t r, int64_t apart) {
      constexpr auto run = chosen<R.value, T.value>();
      run(w + 16 * r * blocks, scales + r * blocks, apart, blocks,
          x + t * padded(blocks), out + t * width + r, width);
    });
  });
}
#endif

}  // namespace
