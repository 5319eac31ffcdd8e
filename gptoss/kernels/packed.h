// How are four bits multiplied without unpacking?
// Generated from book/kernels/packed.py; edit the chapter, not this file.

namespace {

#if !defined(GPTOSS_AVX2) && !defined(GPTOSS_NEON)
// out[t * width + r * step]: R rows of a weight, `step` rows apart, times T
// rows of x, n[0] ... n[T - 1]
template <int R, int T>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, const int64_t* n, float* out,
                 int64_t width) {
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      float& y = out[t * width + r * step] = 0;
      for (int64_t b = 0; b < x.blocks; ++b) {
        const int64_t at = r * step * x.blocks + b;
        const auto& [even, odd] = x.line(n[t])[b].values;
        int32_t s = 0;
        for (int i = 0; i < 16; ++i)
          s += TWICE[w[16 * at + i] & 15] * even[i]
               + TWICE[w[16 * at + i] >> 4] * odd[i];
        y += s * (power(scales[at]) * x.half(n[t])[b]);
      }
    }
}
#endif

#ifdef GPTOSS_AVX2
#ifndef GPTOSS_AVX512
using Bytes = __m256i;

inline Bytes table() {
  return _mm256_broadcastsi128_si256(load<__m128i>(ABOVE));
}

inline Bytes look_up(Bytes values, Bytes nibbles) {
  return _mm256_shuffle_epi8(
      values, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}
#endif

struct Held {  // a group in registers, for all the rows that meet it
  Bytes digits[2][2];
  Words offset;
  explicit Held(const Group& x) {
    hold(offset = load<Words>(x.offset));
    for (int i = 0; i < 4; ++i)
      hold(digits[i / 2][i % 2] = load<Bytes>(x.digits[i / 2][i % 2]));
  }
};

// sums + UNIT * (a times digits of even elements + b times those of odd)
template <int UNIT>
inline Words products(Words sums, Bytes a, Bytes b, const Bytes (&x)[2]) {
#if defined(GPTOSS_AVX512) || defined(GPTOSS_VNNI)
  if (UNIT == 1)
    return (Words)add_bytes(add_bytes((Bytes)sums, a, x[0]), b, x[1]);
  return sums + ((Words)add_bytes(add_bytes(Bytes{}, a, x[0]), b, x[1])
                 << 8);
#else
  const Bytes two = _mm256_add_epi16(_mm256_maddubs_epi16(a, x[0]),
                                     _mm256_maddubs_epi16(b, x[1]));
  return sums + (Words)_mm256_madd_epi16(two, _mm256_set1_epi16(UNIT));
#endif
}

// even, odd elements of SIDE blocks times a group; a lane: of four bytes
inline Sums dots(Bytes a, Bytes b, const Held& x) {
  const Words low = products<1>(x.offset, a, b, x.digits[1]);
  return __builtin_convertvector(products<256>(low, a, b, x.digits[0]),
                                 Sums);
}

#ifndef GPTOSS_AVX512
// blocks 0, 2, 4, 6 and then 1, 3, 5, 7; more: others stand before them
inline Words load_scales(const uint8_t* from, int64_t count, bool more) {
  uint64_t eight = 0x7f7f7f7f7f7f7f7f;
  if (count == LANES)
    eight = load<uint64_t>(from);
  else if (more)
    eight = eight << 8 * count
            | load<uint64_t>(from + count - LANES) >> 8 * (LANES - count);
  else
    for (int64_t i = count; i--;) eight = eight << 8 | from[i];
  return (Words)_mm256_cvtepu8_epi32(_mm_shuffle_epi8(
      _mm_cvtsi64_si128(eight), _mm_cvtsi64_si128(0x0705030106040200)));
}

inline Sums arrange(Sums v) {  // in the same order
  return __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
}

inline Bytes load_blocks(const uint8_t* from, int64_t count) {
  return count < SIDE ? _mm256_zextsi128_si256(load<__m128i>(from))
                      : load<Bytes>(from);
}

// number g of either half, in four lanes
inline Sums spread(Sums factors, int g) {
  return (Sums)_mm256_permutevar_ps((__m256)factors, _mm256_set1_epi32(g));
}
#endif

// 2 ** (scale - 127) times half the step; infinity for 255
inline Sums factors(Words scales, Sums halves) {
  const Words bits = scales << 23;
  const Words least = Words{} + (1 << 22);
  return (Sums)(bits > least ? bits : least) * halves;
}

// as above: a weight is looked up once for all T rows of x
template <int R, int T>
void packed_dots(const uint8_t* w, const uint8_t* scales, int64_t step,
                 const Quantised& x, const int64_t* n, float* out,
                 int64_t width) {
  const Bytes values = table();
  const int64_t blocks = x.blocks, row = step * blocks;
  const Group* group[T];
  for (int t = 0; t < T; ++t) group[t] = &x.groups[n[t] * x.per_row];
  Sums total[R][T] = {}, factor[R][T];
  auto make_factors = [&](int64_t b, int64_t count) INLINE {
    for (int r = 0; r < R; ++r) {
      ask(scales + r * row + b + NEAR / 16);
      const Words scale = load_scales(scales + r * row + b, count, b > 0);
      for (int t = 0; t < T; ++t)
        factor[r][t] = factors(scale, arrange(load<Sums>(x.half(n[t]) + b)));
    }
  };
  // group g from b on
  auto add = [&](int64_t b, int g, int64_t count) INLINE {
    Bytes even[R], odd[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = w + 16 * (r * row + b + g * SIDE);
      ask_ahead(at, NEAR);
      Bytes bytes = load_blocks(at, count - g * SIDE);
      hold(bytes);
      even[r] = look_up(values, bytes);
      odd[r] = look_up(values, (Bytes)((Pairs)bytes >> 4));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Held x(group[t][g]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        total[r][t] += dots(even[r], odd[r], x) * spread(factor[r][t], g);
    }
  };
  int64_t b = 0;
  for (; b + LANES <= blocks; b += LANES) {
    make_factors(b, LANES);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) add(b, g, LANES);
    for (int t = 0; t < T; ++t) group[t] += 4;
  }
  if (b < blocks) make_factors(b, blocks - b);
  for (int g = 0; b + g * SIDE < blocks; ++g) add(b, g, blocks - b);
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      const float y = sum(total[r][t]);
      out[t * width + r * step] = y + 0 * y;  // infinity becomes NaN
    }
}
#endif

struct Packed {  // (E, rows, blocks, 16) bytes and (E, rows, blocks) scales
  const uint8_t *bytes, *scales;
  int64_t rows, blocks;

  Packed(const Tensor& b, const Tensor& s)
      : bytes(b.const_data_ptr<uint8_t>()),
        scales(s.const_data_ptr<uint8_t>()), rows(s.size(-2)),
        blocks(s.size(-1)) {}
};

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

// calls run(Count<count>()), 1 <= count <= MANY
template <int MANY, class Run>
inline void with_count(int64_t count, const Run& run) {
  if constexpr (MANY > 1)
    if (count < MANY) return with_count<MANY - 1>(count, run);
  run(Count<MANY>());
}

// run(T, first token): N tokens in groups that are nearly alike, of at most
// MANY tokens
template <int MANY, class Run>
inline void in_groups(int64_t N, const Run& run) {
  for (int64_t t = 0, groups = (N + MANY - 1) / MANY; groups; --groups) {
    const int64_t some = (N - t + groups - 1) / groups;
    with_count<MANY>(some, [&](auto T) { run(T, t); });
    t += some;
  }
}

constexpr int SHARED = 4;  // tokens for which a weight is looked up once

// out[i][0 ... rows - 1]: those rows times the token in inputs[i], by rows
void rows_for_few(const uint8_t* w, const uint8_t* scales, int64_t rows,
                  const Quantised& x, std::span<const int64_t> inputs,
                  float* out) {
  const int64_t blocks = x.blocks, step = rows / 4;
  auto run = [&](auto R, int64_t begin, int64_t end) {
    in_groups<SHARED>(inputs.size(), [&](auto T, int64_t i) {
      for (int64_t r = begin; r < end; ++r)
        packed_dots<R.value, T.value>(
            w + 16 * r * blocks, scales + r * blocks, step, x, &inputs[i],
            out + i * rows + r, rows);
    });
  };
  run(Count<4>(), 0, step);
  run(Count<1>(), 4 * step, rows);
}

// y (N, m) fp32 = x (N, n) bf16 times the weight transposed, row by row
Tensor packed_rows(const Tensor& x, const Tensor& blocks,
                   const Tensor& scales) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed({blocks, scales})
                  && x.dim() == 2 && scales.dim() == 2
                  && x.size(1) == scales.size(1) * BLOCK
                  && has(blocks, {scales.size(0), scales.size(1), 16}),
              "packed_rows: expected bfloat16 x (N, n), bytes (m, n / 32, "
              "16) and (m, n / 32), found ", x.sizes(), ", ",
              blocks.sizes(), ", ", scales.sizes());
  const Packed weight(blocks, scales);
  const int64_t N = x.size(0);
  std::vector<int64_t> inputs(N);
  for (int64_t i = 0; i < N; ++i) inputs[i] = i;
  Tensor y = at::empty({N, weight.rows}, at::kFloat);
  rows_for_few(weight.bytes, weight.scales, weight.rows,
               quantised(floats(x).data(), STORED, N, weight.blocks), inputs,
               y.data_ptr<float>());
  return y;
}

TORCH_LIBRARY_FRAGMENT(gptoss, m) {
  m.def("packed_rows(Tensor x, Tensor blocks, Tensor scales) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) { m.impl("packed_rows", packed_rows); }

}  // namespace
