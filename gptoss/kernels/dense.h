// How does a processor multiply bf16 that cannot?
// Generated from book/kernels/dense.py; edit the chapter, not this file.

namespace {

inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Ints pairs) {
  return (Floats)(pairs & int32_t(0xffff0000));
}

#ifndef GPTOSS_BF16
// sixteen at a time, first the eight even ones, then the eight odd ones
Buffer ready(const Buffer& x) {
  Buffer to(x.size());
  for (size_t k = 0; k < x.size(); k += 16) {
    const Floats a = load<Floats>(&x[k]), b = load<Floats>(&x[k + 8]);
    store(&to[k], __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store(&to[k + 8], __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13,
                                              15));
  }
  return to;
}

// out[0], out[step] ...: R rows of w (…, n), `step` rows apart, times x
template <int R>
void dense_dots(const Number* w, int64_t step, const float* x, int64_t n,
                float* out) {
  Floats s[R][2] = {};
  for (int64_t k = 0; k < n; k += 16)
    for (int r = 0; r < R; ++r) {
      const Number* from = w + r * step * n + k;
      __builtin_prefetch(from + AHEAD / 2);
      const Ints pairs = load<Ints>(from);
      s[r][0] += even(pairs) * load<Floats>(x + k);
      s[r][1] += odd(pairs) * load<Floats>(x + k + 8);
    }
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
}
#endif

// to[k][r] = w[r * stride + k], r < 16, zero from `rows` on; 16 divides n
void widen_tile(const Number* w, int64_t stride, int64_t rows, int64_t n,
                float* to) {
  for (int64_t half = 0; half < ROWS; half += 8)
    for (int64_t k = 0; k < n; k += 16) {
      Ints v[8];
      pair_columns(w + half * stride + k, stride, rows - half, v);
      for (int64_t j = 0; j < 8; ++j) {
        store(to + (k + 2 * j) * ROWS + half, even(v[j]));
        store(to + (k + 2 * j + 1) * ROWS + half, odd(v[j]));
      }
    }
}

// out[t][0 ... 15] += sum over k < n of x[t][k] * w[k][0 ... 15]
template <int COUNT>
void multiply_some(const float* w, int64_t stride, int64_t n, Source x,
                   Target out) {
  Floats s[COUNT][2];
  for (int t = 0; t < COUNT; ++t)
    for (int h = 0; h < 2; ++h)
      s[t][h] = load<Floats>(out.at + t * out.stride + 8 * h);
  for (int64_t k = 0; k < n; ++k, w += stride) {
    Floats w0 = load<Floats>(w), w1 = load<Floats>(w + 8);
    hold(w0), hold(w1);
    for (int t = 0; t < COUNT; ++t) {
      const float value = x.at[t * x.stride + k];
      s[t][0] += w0 * value;
      s[t][1] += w1 * value;
    }
  }
  for (int t = 0; t < COUNT; ++t)
    for (int h = 0; h < 2; ++h)
      store(out.at + t * out.stride + 8 * h, s[t][h]);
}

constexpr int64_t WIDE = 6;  // twelve sums, two weights, one activation

void multiply(const float* w, int64_t stride, int64_t n, Source x,
              int64_t count, Target out) {
  while (count) {
    const int64_t some = count == WIDE || count > 8 ? WIDE
                         : count >= 4 ? 4 : count >= 2 ? 2 : 1;
    const auto run = some == WIDE ? multiply_some<WIDE>
                     : some == 4  ? multiply_some<4>
                     : some == 2  ? multiply_some<2> : multiply_some<1>;
    run(w, stride, n, x, out);
    count -= some;
    x.at += some * x.stride;
    out.at += some * out.stride;
  }
}

// y (N, m) = x (N, n) times w (m, n) transposed, for a few tokens
void dense_few(const Buffer& x, int64_t N, const Number* w, int64_t m,
               int64_t n, Buffer& y) {
  constexpr int64_t HEIGHT = 128;
  const auto from = ready(x);
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    const int64_t step = rows / STREAMS;
    auto run = [&](auto dots, int64_t r) {
      for (int64_t t = 0; t < N; ++t)
        dots(w + (row0 + r) * n, step, &from[t * n], n,
             &y[t * m + row0 + r]);
    };
    for (int64_t r = 0; r < step; ++r) run(dense_dots<STREAMS>, r);
    for (int64_t r = STREAMS * step; r < rows; ++r) run(dense_dots<1>, r);
  });
}

// the same for many: 64 rows by 256 columns of w stay in the L2 cache
void dense_many(const Buffer& x, int64_t N, const Number* w, int64_t m,
                int64_t n, Buffer& y) {
  constexpr int64_t HEIGHT = 4 * ROWS, DEPTH = 256;
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    Buffer tile(HEIGHT * DEPTH), out(N * HEIGHT);
    for (int64_t k = 0; k < n; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, n - k);
      for (int64_t r = 0; r < rows; r += ROWS)
        widen_tile(w + (row0 + r) * n + k, n, std::min(ROWS, rows - r),
                   depth, &tile[r * DEPTH]);
      for (int64_t t = 0; t < N; t += WIDE)
        for (int64_t r = 0; r < rows; r += ROWS)
          multiply(&tile[r * DEPTH], ROWS, depth, {&x[t * n + k], n},
                   std::min(WIDE, N - t), {&out[t * HEIGHT + r], HEIGHT});
    }
    for (int64_t t = 0; t < N; ++t)
      std::copy_n(&out[t * HEIGHT], rows, &y[t * m + row0]);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias) {
  if (!ours({x, weight, bias.value_or(x)}) || weight.dim() != 2)
    return plain<decltype(linear)>("linear", x, weight, bias);
  const int64_t m = weight.size(0), n = weight.size(1);
  check_linear("linear", x, m, n, bias);
  if (!weight.is_contiguous() || n % BLOCK || !x.numel() || !m
      || (bias && !has(*bias, {m})))
    return plain<decltype(linear)>("linear", x, weight, bias);
  const Buffer from = floats(x);
  const int64_t N = from.size() / n;
  Buffer y(N * m);
  (N <= FEW ? dense_few : dense_many)(from, N, numbers(weight), m, n, y);
  add_bias(y, bias);
  return result(x, m, y);
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("linear", linear);
}

}  // namespace
