// What does a first kernel look like?
// Generated from book/kernels/first_three.py; edit the chapter, not this file.

namespace {

// y like x, row by row of n numbers: work(row, numbers, to) sees fp32, which
// never leaves a cache
template <class Work>
Tensor by_rows(const Tensor& x, int64_t n, const Work& work) {
  const Tensor from = x.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  auto to = static_cast<Number*>(y.data_ptr());
  at::parallel_for(0, x.numel() / n, 8, [&](int64_t begin, int64_t end) {
    Buffer row(n), done(n);
    for (int64_t r = begin; r < end; ++r) {
      convert(numbers(from) + r * n, n, row.data());
      work(r, row.data(), done.data());
      convert(done.data(), n, to + r * n);
    }
  });
  return y;
}

// eight sums at a time, or each addition waits for the one before
double sum_of_squares(const float* x, int64_t n) {
  using Doubles = double __attribute__((vector_size(64)));
  Doubles sums = {};
  double all = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const Floats v = load<Floats>(x + i);
    sums += __builtin_convertvector(v * v, Doubles);
  }
  for (; i < n; ++i) all += x[i] * x[i];
  for (int j = 0; j < 8; ++j) all += sums[j];
  return all;
}

// heads (H, C) of a token turned by its angles (C / 2,), half-split
void rope_heads(const float* x, const float* c, const float* s, int64_t H,
                int64_t half, float* to) {
  for (int64_t h = 0; h < H; ++h, x += 2 * half, to += 2 * half)
    for (int64_t i = 0; i < half; ++i) {
      to[i] = x[i] * c[i] - x[half + i] * s[i];
      to[half + i] = x[half + i] * c[i] + x[i] * s[i];
    }
}

// ids (k,) of the largest logits, and the softmax over these as weights
void choose(const float* logits, int64_t E, int64_t k, int64_t* ids,
            float* weights) {
  std::vector<int64_t> order(E);
  for (int64_t e = 0; e < E; ++e) order[e] = e;
  auto before = [logits](int64_t a, int64_t b) {
    const bool x = std::isnan(logits[a]), y = std::isnan(logits[b]);
    if (x || y || logits[a] == logits[b]) return x == y ? a < b : x;
    return logits[a] > logits[b];
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
  float total = 0;
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = order[i];
    total += weights[i] = std::exp(logits[order[i]] - logits[order[0]]);
  }
  for (int64_t i = 0; i < k; ++i) weights[i] /= total;
}

// e ** x for -87 <= x <= 0, relative error below 1e-6; less gives e ** -87
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;  // x / log 2, rounded
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + factor;
  const Ints power = ((Ints)shifted - 0x4b400000) << 23;
  return (Floats)((Ints)p + power);  // times 2 ** n
}

constexpr float MAX = std::numeric_limits<float>::max();

inline Floats clamped_swiglu(Floats gate, Floats up, float limit) {
  const Floats most = Floats{} + limit, least = Floats{} - 1e4f;
  gate = gate > most ? most : gate;  // written so that NaN stays NaN
  gate = (gate < least) & (gate >= -MAX) ? least : gate;  // as good as zero
  up = up > most ? most : up < -most ? -most : up;
  const Floats t = 1.702f * gate, e = exponential(t > 0 ? -t : t);
  return (up + 1) * gate * (t > 0 ? Floats{} + 1.0f : e) / (1 + e);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (!ours({x, weight}) || !x.dim() || weight.dim() != 1)
    return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
  const int64_t n = weight.size(0);
  TORCH_CHECK(x.size(-1) == n || x.size(-1) == 1 || n == 1, "rms_norm: "
              "weight: expected (", x.size(-1), ") beside x ", x.sizes(),
              ", found ", weight.sizes());
  if (x.size(-1) != n || !x.numel())
    return plain<decltype(rms_norm)>("rms_norm", x, weight, eps);
  const Buffer w = floats(weight);
  return by_rows(x, n, [&](int64_t, const float* row, float* to) {
    const float scale = 1 / std::sqrt(sum_of_squares(row, n) / n + eps);
    for (int64_t i = 0; i < n; ++i) to[i] = w[i] * (row[i] * scale);
  });
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  if (!ours({x, cos, sin}) || x.dim() != 4 || cos.dim() != 3)
    return plain<decltype(rope)>("rope", x, cos, sin);
  const int64_t B = x.size(0), T = x.size(1), half = x.size(3) / 2;
  auto stretched = [](int64_t size, int64_t to) {
    return size == to || size == 1;
  };
  TORCH_CHECK(half < 2 || x.size(3) % 2 || stretched(cos.size(2), half),
              "rope: cos: expected (B, T, ", half, ") beside x ", x.sizes(),
              ", found ", cos.sizes());
  if (!x.numel() || 2 * cos.size(2) != x.size(3)
      || cos.sizes() != sin.sizes() || !stretched(cos.size(0), B)
      || !stretched(cos.size(1), T))
    return plain<decltype(rope)>("rope", x, cos, sin);
  const std::vector<int64_t> shape = {B, T, half};
  const Buffer c = floats(cos.expand(shape)), s = floats(sin.expand(shape));
  const int64_t H = x.size(2);
  return by_rows(x, 2 * H * half, [&](int64_t token, const float* row,
                                      float* to) {
    rope_heads(row, &c[token * half], &s[token * half], H, half, to);
  });
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k) {
  if (!ours({logits}) || logits.dim() != 2 || k < 1 || k > logits.size(1))
    return plain<decltype(route)>("route", logits, k);
  const Buffer from = floats(logits);
  const int64_t N = logits.size(0), E = logits.size(1);
  Tensor ids = at::empty({N, k}, logits.options().dtype(at::kLong));
  int64_t* id = ids.data_ptr<int64_t>();
  Buffer weights(N * k);
  at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      choose(&from[n * E], E, k, id + n * k, &weights[n * k]);
  });
  return {result(logits, k, weights), ids};
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rope", rope);
  m.impl("route", route);
}

}  // namespace
