// How does a processor multiply bf16 that cannot?
// Generated from book/kernels/dense.py; edit the chapter, not this file.

namespace {

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
  in_groups<WIDE>(count, [&](auto T, int64_t t) {
    multiply_some<T.value>(w, stride, n, {x.at + t * x.stride, x.stride},
                           {out.at + t * out.stride, out.stride});
  });
}

// to (count) = v + bias, rounded
void finish(const float* v, const Number* bias, int64_t count, Number* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    narrow(bias ? load<Floats>(v + i) + widen(bias + i)
                : load<Floats>(v + i), to + i);
  for (; i < count; ++i) to[i] = bias ? v[i] + float(bias[i]) : v[i];
}

// tokens from which torch's product is taken, as measured; not for few rows:
// processes that share a model must all compute the router alike
std::atomic<int64_t> from_torch{std::numeric_limits<int64_t>::max()};
constexpr int64_t TALL_ENOUGH = 512;  // rows

#ifdef GPTOSS_AMX
constexpr int64_t DENSE_SQUARED = 4, SOON = 384;  // tokens; numbers ahead

// N tokens, sixteen beside each other
Tensor put_beside(const Number* x, int64_t N, int64_t n) {
  Tensor all = scratch({(N + SQUARE - 1) / SQUARE, SQUARE, n},
                       at::kBFloat16);
  auto first = static_cast<Number*>(all.data_ptr());
  at::parallel_for(0, all.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = SQUARE * begin; t < SQUARE * end; t += SQUARE)
      beside(x + t * n, std::min(SQUARE, N - t), n, first + t * n);
  });
  return all;
}

// 32 rows times T squares of tokens; fresh: from memory, asked for ahead
template <int T>
void multiply_squares(const Number* w, int64_t n, bool fresh,
                      const Number* x, FourSums& sums) {
  sums.clear();
  written();
  for (int64_t k = 0; k < n; k += BLOCK, x += AREA) {
    const int64_t soon = k + SOON + (k + SOON < n ? 0 : (BOTH - 1) * n);
    for (int64_t r = 0; fresh && r < BOTH; ++r) ask(w + r * n + soon);
    _tile_loadd(4, w + k, 2 * n);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + SQUARE * n + k, 2 * n);
    _tile_dpbf16ps(1, 5, 6);
    if (T > 1) {
      _tile_loadd(7, x + SQUARE * n, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  sums.keep();
}

// as `strips`, up to 32 tokens as `put_beside` leaves them
void dense_squares(const Number* w, int64_t rows, const Number* x, int64_t N,
                   int64_t n, bool fresh, float* out, int64_t width) {
  std::vector<Number> copy;
  FourSums sums;
  const Registers registers;
  for (int64_t r = 0; r < rows; r += BOTH) {
    const Number* from = w + r * n;
    if (rows - r < BOTH) {  // nothing is read beyond the weight
      copy.resize(BOTH * n);
      std::copy_n(from, (rows - r) * n, copy.data());
      from = copy.data();
    }
    (N > SQUARE ? multiply_squares<2> : multiply_squares<1>)(
        from, n, fresh, x, sums);
    sums.put(rows - r, N, 1, out + r, width);
  }
}
#endif

constexpr int64_t PIECE = 128, LOT = 96;  // rows; tokens

// y (N, m) = x (N, n) times w (m, n) transposed, plus a bias; weight.rows(r,
// count): where these lie, until the thread asks again; FRESH: from memory
template <class Weight>
void dense_rows(const Number* x, int64_t N, const Weight& weight, int64_t m,
                int64_t n, const Number* bias, Number* y) {
#ifdef GPTOSS_AMX
  const bool squared = N >= DENSE_SQUARED && lent();
  const Tensor squares = squared ? put_beside(x, N, n) : Tensor();
  const int64_t lot = squared ? BOTH : LOT;
#else
  constexpr bool squared = false;
  constexpr int64_t lot = LOT;
#endif
  const auto from = ready(x, squared ? 0 : N * n);
  share((m + PIECE - 1) / PIECE, 1, [&](int64_t item) {
    const int64_t row0 = item * PIECE, rows = std::min(PIECE, m - row0);
    const Number* w = weight.rows(row0, rows);
    float out[LOT * PIECE];
    for (int64_t t0 = 0; t0 < N; t0 += lot) {
      const int64_t some = std::min(lot, N - t0);
#ifdef GPTOSS_AMX
      if (squared)
        dense_squares(w, rows, numbers(squares) + t0 * n, some, n,
                      Weight::FRESH && !t0, out, PIECE);
      else
#endif
      quickest_strips(w, rows, &from[t0 * n], some, n, out, PIECE);
      for (int64_t t = 0; t < some; ++t)
        finish(out + t * PIECE, bias ? bias + row0 : nullptr, rows,
               y + (t0 + t) * m + row0);
    }
  });
}

// the same for many: 64 rows by 256 columns of w stay in the L2 cache
template <class Weight>
void dense_tiles(const Buffer& x, int64_t N, const Weight& weight, int64_t m,
                 int64_t n, const Number* bias, Number* y) {
  constexpr int64_t HEIGHT = 4 * ROWS, DEPTH = 256;
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    const Number* w = weight.rows(row0, rows);
    Buffer tile(HEIGHT * DEPTH), out(N * HEIGHT);
    for (int64_t k = 0; k < n; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, n - k);
      for (int64_t r = 0; r < rows; r += ROWS)
        widen_tile(w + r * n + k, n, std::min(ROWS, rows - r), depth,
                   &tile[r * DEPTH]);
      for (int64_t t = 0; t < N; t += WIDE)
        for (int64_t r = 0; r < rows; r += ROWS)
          multiply(&tile[r * DEPTH], ROWS, depth, {&x[t * n + k], n},
                   std::min(WIDE, N - t), {&out[t * HEIGHT + r], HEIGHT});
    }
    for (int64_t t = 0; t < N; ++t)
      finish(&out[t * HEIGHT], bias ? bias + row0 : nullptr, rows,
             y + t * m + row0);
  });
}

// x times a weight (m, n) transposed, plus a bias
template <class Weight>
Tensor multiplied(const Tensor& x, const Weight& weight, int64_t m,
                  int64_t n, const std::optional<Tensor>& bias) {
  const Tensor from = x.contiguous();
  const Tensor b = bias ? bias->contiguous() : Tensor();
  auto shape = x.sizes().vec();
  shape.back() = m;
  Tensor y = at::empty(shape, x.options());
  const Number* add = bias ? numbers(b) : nullptr;
  auto to = static_cast<Number*>(y.data_ptr());
  const int64_t N = x.numel() / n;
  if (N <= BY_STRIPS) dense_rows(numbers(from), N, weight, m, n, add, to);
  else dense_tiles(floats(from), N, weight, m, n, add, to);
  return y;
}

struct AsStored {
  static constexpr bool FRESH = true;
  const Number* w;
  int64_t n;
  const Number* rows(int64_t r, int64_t) const { return w + r * n; }
};

Tensor linear(const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias) {
  if (!ours({x, weight, bias.value_or(x)}) || weight.dim() != 2)
    return plain<decltype(linear)>("linear", x, weight, bias);
  const int64_t m = weight.size(0), n = weight.size(1);
  check_linear("linear", x, m, n, bias);
  if (!weight.is_contiguous() || n % BLOCK || !x.numel() || !m
      || (bias && !has(*bias, {m}))
      || (m >= TALL_ENOUGH && x.numel() / n >= from_torch))
    return plain<decltype(linear)>("linear", x, weight, bias);
  return multiplied(x, AsStored{numbers(weight), n}, m, n, bias);
}

TORCH_LIBRARY_FRAGMENT(gptoss, m) {
  m.def("torch_from(int tokens) -> int",
        [](int64_t tokens) { return from_torch.exchange(tokens); });
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) { m.impl("linear", linear); }

}  // namespace
