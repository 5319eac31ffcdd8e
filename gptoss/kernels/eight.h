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
  std::vector<int16_t> values;
  Buffer steps;

  explicit Integers(const Buffer& x)
      : values(x.size()), steps(x.size() / BLOCK) {
    for (size_t b = 0; b < steps.size(); ++b) {
      Floats part[4], odd = {};
      for (int i = 0; i < 4; ++i) {
        part[i] = load<Floats>(&x[b * BLOCK + 8 * i]);
        odd += 0 * part[i];  // NaN if one of them is NaN or infinite
      }
      const float size = step(largest(part), STORED);
      const float up = size > 1e-37f ? 1 / size : 0;
      // adding 1.5 * 2**23 leaves the nearest integer in the low bits
      const auto all = (Whole)(load<Reals>(part) * up + 12582912.0f);
      const Shorts near = __builtin_convertvector(all - 0x4b400000, Shorts);
      for (int half = 0; half < 2; ++half)
        std::memcpy(&values[place(b) + 2 * half * HALF],
                    reinterpret_cast<const char*>(&near) + 32 * half, 32);
      steps[b] = size + sum(odd);
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
      if (b % 2 == 0) __builtin_prefetch(from + AHEAD);
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
      const auto run = some == 4   ? eight_rows<4>
                       : some == 3 ? eight_rows<3>
                       : some == 2 ? eight_rows<2> : eight_rows<1>;
      run(w, row0, rows, x, t, &y[t * w.rows + row0]);
    }
  });
}

inline Floats eight_floats(const int8_t* from) {
#ifdef GPTOSS_AVX2
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
      _mm_cvtsi64_si128(load<int64_t>(from))));
#else
  using Few = int8_t __attribute__((vector_size(8)));
  return __builtin_convertvector(load<Few>(from), Floats);
#endif
}

// rows first ... first + count - 1 in bf16
void unpack_strip(const Eight& w, int64_t first, int64_t count, Number* to) {
  const int64_t blocks = w.n / BLOCK;
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * blocks; i < end * blocks; ++i) {
      const int64_t r = i / blocks, b = i % blocks;
      const int8_t* from = w.values + (first + r) * w.n + place(b);
      const float scale = wide_scale(w.scales[first * blocks + i]);
      for (int64_t k = 0; k < BLOCK; k += 8)
        narrow(eight_floats(from + k + (k < HALF ? 0 : HALF)) * scale,
               to + i * BLOCK + k);
    }
  });
}

// the same for many, in strips that pass through `linear`
Tensor eight_many(const Eight& w, const Tensor& x,
                  const std::optional<Tensor>& bias) {
  auto shape = x.sizes().vec();
  shape.back() = w.rows;
  Tensor y = at::empty(shape, x.options());
  const int64_t HEIGHT = std::max<int64_t>(64, (1 << 23) / w.n / 64 * 64);
  Tensor scratch = at::empty({std::min(HEIGHT, w.rows), w.n}, x.options());
  for (int64_t first = 0; first < w.rows; first += HEIGHT) {
    const int64_t rows = std::min(HEIGHT, w.rows - first);
    const Tensor strip = scratch.narrow(0, 0, rows);
    unpack_strip(w, first, rows, static_cast<Number*>(strip.data_ptr()));
    std::optional<Tensor> part;
    if (bias) part = bias->narrow(0, first, rows);
    y.narrow(-1, first, rows).copy_(linear(x, strip, part));
  }
  return y;
}

void pack_eight_row(const Number* w, int64_t n, int8_t* to,
                    uint16_t* scales) {
  for (int64_t b = 0; b < n / BLOCK; ++b, w += BLOCK) {
    Floats part[4];
    for (int i = 0; i < 4; ++i) part[i] = widen(w + 8 * i);
    const float finest = largest(part) / 127;
    scales[b] = (load<uint32_t>(&finest) + 0xffff) >> 16;
    const float step = scales[b] ? wide_scale(scales[b]) : 1;
    const auto all = (Whole)(load<Reals>(part) / step + 12582912.0f);
    const Digits near = __builtin_convertvector(all - 0x4b400000, Digits);
    for (int half = 0; half < 2; ++half)
      std::memcpy(to + place(b) + 2 * half * HALF,
                  reinterpret_cast<const char*>(&near) + HALF * half, HALF);
  }
}

// weight (rows, n) bf16, finite -> values, scales
std::tuple<Tensor, Tensor> pack_eight(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2
                  && weight.is_contiguous() && weight.size(1) % GROUP == 0,
              "pack_eight: weight: expected contiguous bfloat16 (m, n), 64 "
              "dividing n, found ", weight.scalar_type(), " ",
              weight.sizes());
  const int64_t rows = weight.size(0), n = weight.size(1);
  Tensor values = at::empty({rows, n}, at::kChar);
  Tensor scales = at::empty({rows, n / BLOCK}, at::kShort);
  int8_t* to = values.data_ptr<int8_t>();
  auto steps = reinterpret_cast<uint16_t*>(scales.data_ptr<int16_t>());
  share(rows, 16, [&](int64_t r) {
    pack_eight_row(numbers(weight) + r * n, n, to + r * n,
                   steps + r * (n / BLOCK));
  });
  return {values, scales};
}

Tensor eight_linear(const Tensor& x, const Tensor& values,
                    const Tensor& scales,
                    const std::optional<Tensor>& bias) {
  constexpr int64_t FEW_TOKENS = 8;
  const int64_t m = values.dim() == 2 ? values.size(0) : 0;
  const int64_t n = m ? values.size(1) : 0;
  const bool fits = m && n && ours({x, bias.value_or(x)})
                    && values.scalar_type() == at::kChar
                    && scales.scalar_type() == at::kShort
                    && values.is_contiguous() && scales.is_contiguous()
                    && n % GROUP == 0 && has(scales, {m, n / BLOCK})
                    && !(bias && !has(*bias, {m})) && x.numel() && x.dim()
                    && x.size(-1) == n;
  if (!fits)
    return plain<decltype(eight_linear)>("eight_linear", x, values, scales,
                                         bias);
  const Eight w{values.const_data_ptr<int8_t>(),
                reinterpret_cast<const uint16_t*>(
                    scales.const_data_ptr<int16_t>()), m, n};
  const int64_t N = x.numel() / n;
  if (N > FEW_TOKENS) return eight_many(w, x, bias);
  Buffer y(N * m);
  eight_few(w, floats(x), N, y);
  add_bias(y, bias);
  return result(x, m, y);
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("eight_linear", eight_linear);
  m.impl("pack_eight", pack_eight);
}

}  // namespace
