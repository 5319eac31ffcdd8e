// What do bf16 units make of four bits?
// Generated from book/kernels/pairs.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_BF16
// the codes' values times 2**125 as bf16, zeros without a sign; twice, so
// that one more bit of an index does not matter
constexpr uint16_t LARGE[32] = {
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
    0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40};
constexpr int ONCE = 12;  // tokens, with two rows: weights are decoded once
constexpr int64_t TWO = 2 * BLOCK;  // blocks are decoded two at a time

inline int64_t padded(int64_t blocks) { return (blocks + 1) / 2 * TWO; }

// even elements of two blocks, their odd ones; of floats or bf16 numbers
void pair_row(const float* x, int64_t blocks, Number* to) {
  alignas(64) uint16_t place[2][BLOCK];
  for (int i = 0; i < 2 * BLOCK; ++i)
    place[i / BLOCK][i % BLOCK] = i % BLOCK * 2 + i / BLOCK;
  auto narrowed = [&](int64_t b) {
    if (b >= blocks) return Bytes{};
    return (Bytes)_mm512_cvtne2ps_pbh(load<__m512>(x + b * BLOCK + 16),
                                      load<__m512>(x + b * BLOCK));
  };
  for (int64_t b = 0; b < blocks; b += 2, to += TWO)
    for (int odd = 0; odd < 2; ++odd)
      _mm512_storeu_si512(to + odd * BLOCK, _mm512_permutex2var_epi16(
          narrowed(b), load<Bytes>(place[odd]), narrowed(b + 1)));
}

// how far the exponents of 32 blocks lie below those of LARGE
inline Bytes lowered(const uint8_t* scales, int64_t count) {
  const __m256i some = count < BLOCK
      ? _mm256_maskz_loadu_epi8((1u << count) - 1, scales)
      : load<__m256i>(scales);
  return _mm512_slli_epi16(_mm512_sub_epi16(
      _mm512_set1_epi16(252), _mm512_cvtepu8_epi16(some)), 7);
}

// a number for each of the first sixteen words, another for the rest
inline Bytes two_of(Bytes words, int64_t b) {
  return _mm512_permutexvar_epi16(_mm512_inserti64x4(
      _mm512_set1_epi16(b), _mm256_set1_epi16(b + 1), 1), words);
}

// two blocks as bf16: weights are LARGE minus what their block is lowered
inline void decode_two(const uint8_t* w, bool both, Bytes lower,
                       Bytes (&to)[2]) {
  const Bytes values = load<Bytes>(LARGE);
  const Bytes bytes = _mm512_cvtepu8_epi16(
      both ? load<__m256i>(w) : _mm256_zextsi128_si256(load<__m128i>(w)));
  to[0] = _mm512_subs_epu16(_mm512_permutexvar_epi16(bytes, values), lower);
  to[1] = _mm512_subs_epu16(_mm512_permutexvar_epi16(
      _mm512_srli_epi16(bytes, 4), values), lower);
}

// does bf16 hold the weights of these scales? 2**-125 ... 2**125
bool usual(const uint8_t* scales, int64_t count) {
  uint8_t bad = 0;
  for (int64_t i = 0; i < count; ++i)
    bad |= uint8_t(scales[i] - 2) > 250;
  return !bad;
}

// R rows as bf16 in `to` (R, padded(blocks))
template <int R>
void decode_rows(const uint8_t* w, const uint8_t* scales, int64_t blocks,
                 Number* to) {
  for (int r = 0; r < R; ++r, w += 16 * blocks, scales += blocks,
           to += padded(blocks))
    for (int64_t b = 0; b < blocks; b += BLOCK) {
      const int64_t count = std::min(BLOCK, blocks - b);
      const Bytes lower = lowered(scales + b, count);
      for (int64_t i = 0; i < count; i += 2) {
        __builtin_prefetch(w + 16 * (b + i) + AHEAD);
        Bytes two[2];
        decode_two(w + 16 * (b + i), i + 1 < count, two_of(lower, i), two);
        for (int odd = 0; odd < 2; ++odd)
          _mm512_storeu_si512(to + BLOCK * (b + i + odd), two[odd]);
      }
    }
}

// as `strip`, with rows that are decoded in registers
template <int R, int T>
void packed_strip(const uint8_t* w, const uint8_t* scales, int64_t step,
                  int64_t blocks, const Number* x, float* out,
                  int64_t width) {
  const int64_t n = padded(blocks), row = step * blocks;
  __m512 s[T][4];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < 4; ++r) s[t][r] = __m512{};
  for (int64_t b = 0; b < blocks; b += BLOCK) {
    const int64_t count = std::min(BLOCK, blocks - b);
    Bytes lower[R];
    for (int r = 0; r < R; ++r)
      lower[r] = lowered(scales + r * row + b, count);
    for (int64_t i = 0; i < count; i += 2) {
      Bytes two[R][2];
      for (int r = 0; r < R; ++r) {
        const uint8_t* from = w + 16 * (r * row + b + i);
        __builtin_prefetch(from + 2 * AHEAD);
        decode_two(from, i + 1 < count, two_of(lower[r], i), two[r]);
      }
      for (int t = 0; t < T; ++t)
        for (int odd = 0; odd < 2; ++odd) {
          const auto token = load<__m512bh>(
              x + t * n + BLOCK * (b + i + odd));
          for (int r = 0; r < R; ++r)
            s[t][r] = _mm512_dpbf16_ps(s[t][r], (__m512bh)two[r][odd],
                                       token);
        }
    }
  }
  for (int t = 0; t < T; ++t) {
    const __m128 four = sums(s[t][0], s[t][1], s[t][2], s[t][3]);
    for (int r = 0; r < R; ++r) out[t * width + r * step] = four[r];
  }
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
        const Number* at = x + b / 2 * TWO + b % 2 * 16;
        float s = 0;
        for (int i = 0; i < 16; ++i)
          s += TWICE[from[i] & 15] * float(at[i])
               + TWICE[from[i] >> 4] * float(at[BLOCK + i]);
        out[r] += s * power(scales[r * blocks + b]) / 2;
      }
    }
}

// out[t * width + r]: `rows` rows of a packed weight times N tokens, each
// as `pair_row` leaves it
void packed_strips(const uint8_t* w, const uint8_t* scales, int64_t rows,
                   int64_t blocks, const Number* x, int64_t N, float* out,
                   int64_t width) {
  if (!usual(scales, rows * blocks))
    return unusual_rows(w, scales, rows, blocks, x, N, out, width);
  const auto in_registers = [&](auto T) {
    return [=](auto R, int64_t r, int64_t apart) {
      packed_strip<R.value, T.value>(
          w + 16 * r * blocks, scales + r * blocks, apart, blocks, x,
          out + r, width);
    };
  };
  if (N <= TOGETHER)
    return with_count<TOGETHER>(N, [&](auto T) {
      in_strips<STREAMS>(rows, true, in_registers(T));
    });
  if (N <= ONCE)
    return with_count<ONCE>(N, [&](auto T) {
      in_strips<STREAMS / 2>(rows, true, in_registers(T));
    });
  thread_local std::vector<Number> decoded;
  const int64_t n = padded(blocks);
  decoded.resize(STREAMS * n);
  in_strips<STREAMS>(rows, false, [&](auto R, int64_t r, int64_t) {
    decode_rows<R.value>(w + 16 * r * blocks, scales + r * blocks, blocks,
                         decoded.data());
    in_groups<TOGETHER>(N, [&](auto T, int64_t t) {
      strip<R.value, T.value>(decoded.data(), 1, x + t * n, n,
                              out + t * width + r, width);
    });
  });
}
#endif

}  // namespace
