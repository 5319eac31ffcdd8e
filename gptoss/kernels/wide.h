// Wider registers: AVX-512, VNNI and NEON
// Generated from book/cli/wide.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
using Bytes = __m512i;

inline Bytes table() {
  return _mm512_broadcast_i32x4(load<__m128i>(ABOVE));
}

inline Bytes look_up(Bytes values, Bytes nibbles) {
#ifdef __AVX512VBMI__
  return _mm512_permutexvar_epi8(nibbles, values);
#else
  return _mm512_shuffle_epi8(
      values, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
#endif
}

inline Bytes add_bytes(Bytes sums, Bytes a, Bytes x) {
  return _mm512_dpbusd_epi32(sums, a, x);
}
#endif

#ifdef GPTOSS_VNNI
inline __m256i add_bytes(__m256i sums, __m256i a, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sums, a, x);
}
#endif

#ifdef GPTOSS_AVX512
inline __mmask16 first(int64_t count) { return (1u << count) - 1; }

inline Words load_scales(const uint8_t* from, int64_t count, bool) {
  return (Words)_mm512_cvtepu8_epi32(
      _mm_mask_loadu_epi8(_mm_set1_epi8(127), first(count), from));
}

inline Bytes load_blocks(const uint8_t* from, int64_t count) {
  return count < SIDE ? _mm512_maskz_loadu_epi32(first(4 * count), from)
                      : load<Bytes>(from);
}

inline Sums arrange(Sums v) { return v; }

// the factors of group g, each in four lanes
inline Sums spread(Sums factors, int g) {
  const Words place = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (Sums)_mm512_permutexvar_ps((Bytes)(place + 4 * g),
                                     (__m512)factors);
}

inline float sum(Sums v) {
  const __m512d both = _mm512_castps_pd((__m512)v);
  return sum((Floats)_mm512_castpd512_pd256(both)
             + (Floats)_mm512_extractf64x4_pd(both, 1));
}
#endif

#ifdef GPTOSS_NEON
inline int32x4_t dots(uint8x16_t bytes, const Line& x, int8x16_t values) {
  int32x4_t s = {}, t = {};
  auto add = [&](uint8x16_t nibbles, const int16_t* q) {
    const int8x16_t w = vqtbl1q_s8(values, nibbles);
    const int16x8_t half[] = {vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w)};
    for (int i = 0; i < 2; ++i) {
      const int16x8_t eight = vld1q_s16(q + 8 * i);
      s = vmlal_s16(s, vget_low_s16(half[i]), vget_low_s16(eight));
      t = vmlal_high_s16(t, half[i], eight);
    }
  };
  add(vandq_u8(bytes, vdupq_n_u8(15)), x.values[0]);
  add(vshrq_n_u8(bytes, 4), x.values[1]);
  return vaddq_s32(s, t);
}

template <int R, int T>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, const int64_t* n, float* out,
                 int64_t width) {
  const int8x16_t values = vld1q_s8(TWICE);
  float32x4_t total[R][T] = {};
  for (int64_t b = 0; b < x.blocks; ++b)
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * step * x.blocks + b;
      __builtin_prefetch(w + 16 * at + 512);
      const uint8x16_t bytes = vld1q_u8(w + 16 * at);
      for (int t = 0; t < T; ++t) {
        const int32x4_t part = dots(bytes, x.line(n[t])[b], values);
        total[r][t] = vfmaq_n_f32(total[r][t], vcvtq_f32_s32(part),
                                  power(scales[at]) * x.half(n[t])[b]);
      }
    }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r)
      out[t * width + r * step] = vaddvq_f32(total[r][t]);
}
#endif

}  // namespace
