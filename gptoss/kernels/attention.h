// How is each key read only once?
// Generated from book/kernels/attending.py; edit the chapter, not this file.

namespace {

#ifndef GPTOSS_BF16
using Query = float;
using Key = float;
#endif

constexpr int64_t KEYS = 64, WIDEST = 256;  // keys at a time; largest head

struct Attention {  // one key head, the query heads and tokens it serves
  int64_t C, rows, window;
  float scale;
  std::vector<Query> q;            // (rows, C)
  Buffer scores, out, top, total;  // (rows, KEYS), (rows, C) and (rows,)
  std::vector<int32_t> position;   // of each row
  int32_t seen[KEYS];              // positions of the keys at hand
  alignas(64) Key keys[WIDEST * ROWS];  // sixteen of them, as columns
  alignas(64) float values[KEYS * WIDEST];

  void resize(int64_t size, int64_t count, int64_t visible) {
    C = size, rows = count, window = visible;
    q.resize(rows * C);
    out.assign(rows * C, 0);
    top.resize(rows);
    total.assign(rows, 1);  // the sink, before any key
    position.resize(rows);
  }

  void score(const Number* k, int64_t stride, int64_t some, int64_t s);
  void chunk(const Number* k, const Number* v, int64_t stride,
             int64_t count);
  void weigh(int64_t r);
};

// scores of row r -> weights, with a running maximum and sum, as in
// attention/sinks
void Attention::weigh(int64_t r) {
  const float none = -std::numeric_limits<float>::infinity();
  const int32_t last = position[r];
  const int32_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
  Floats high = Floats{} + top[r], weights = {};
  for (int64_t s = 0; s < KEYS; s += 8) {
    const Ints p = load<Ints>(seen + s);
    Floats value = scale * load<Floats>(&scores[r * KEYS + s]);
    value = (p >= first) & (p <= last) ? value : Floats{} + none;
    high = value > high ? value : high;
    store(&scores[r * KEYS + s], value);
  }
  float higher = top[r];
  for (int i = 0; i < 8; ++i) higher = std::max(higher, high[i]);
  for (int64_t s = 0; s < KEYS; s += 8) {
    const Floats value = load<Floats>(&scores[r * KEYS + s]);
    const Floats e = value == none ? Floats{} : exponential(value - higher);
    store(&scores[r * KEYS + s], e);
    weights += e;
  }
  const float shrink = std::exp(top[r] - higher);
  total[r] = total[r] * shrink + sum(weights);
  top[r] = higher;
  for (int64_t c = 0; c < C && shrink != 1; ++c) out[r * C + c] *= shrink;
}

// scores of `some` keys, at most sixteen, from column s on
void Attention::score(const Number* k, int64_t stride, int64_t some,
                      int64_t s) {
#ifdef GPTOSS_BF16
  pair_tile(k, stride, some, C, keys);
  multiply_pairs(keys, C / 2, q.data(), rows, {&scores[s], KEYS});
#else
  widen_tile(k, stride, some, C, keys);
  multiply(keys, ROWS, C, {q.data(), C}, rows, {&scores[s], KEYS});
#endif
}

void Attention::chunk(const Number* k, const Number* v, int64_t stride,
                      int64_t count) {
  const int64_t C = this->C;  // a local: no store below can change it
  for (int64_t s = 0; s < count; ++s)
    for (int64_t c = 0; c < C; c += 8)
      store(values + s * C + c, widen(v + s * stride + c));
  scores.assign(rows * KEYS, 0);
  for (int64_t s = 0; s < count; s += ROWS)
    score(k + s * stride, stride, std::min(ROWS, count - s), s);
  for (int64_t r = 0; r < rows; ++r) weigh(r);
  for (int64_t c = 0; c < C; c += ROWS)
    multiply(values + c, C, count, {scores.data(), KEYS}, rows,
             {&out[c], C});
}

constexpr int64_t RANGE = 512;  // keys of one piece of work in decode

struct Partial {  // what each range of keys gives for each row (B, T, H)
  Buffer out, top, total;
};

struct Heads {  // the operator's arguments, read from inside the threads
  Tensor q, k, v, sinks, q_pos, k_pos;
  int64_t window;
  float scale;

  // keys s0 ... s1 - 1 for tokens t0 ... t1 - 1 of batch row b, key head g;
  // row 0 of the batch begins at `base` in `to`
  void run(Attention& a, int64_t b, int64_t g, int64_t t0, int64_t t1,
           int64_t s0, int64_t s1, int64_t base, Partial& to) const {
    const int64_t T = q.size(1), H = q.size(2), J = H / k.size(2);
    const int64_t* position = q_pos.const_data_ptr<int64_t>() + b * T;
    a.resize(q.size(3), (t1 - t0) * J, window);
    a.scale = scale;
    auto place = [&](int64_t r) {  // of row r among (B, T, H)
      return (b * T + t0 + r / J) * H + g * J + r % J;
    };
    for (int64_t r = 0; r < a.rows; ++r) {
      const Number* from = numbers(q) + place(r) * a.C;
      std::copy_n(from, a.C, &a.q[r * a.C]);
      a.position[r] = int32_t(position[t0 + r / J]);
      const float none = std::numeric_limits<float>::lowest();
      const float sink = numbers(sinks)[g * J + r % J];
      a.top[r] = s0 ? none : std::max(sink, none);
      a.total[r] = s0 ? 0 : 1;  // the sink counts once, before any key
    }
    attend(a, b, g, s0, s1);
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t at = base + place(r);
      std::copy_n(&a.out[r * a.C], a.C, &to.out[at * a.C]);
      to.top[at] = a.top[r], to.total[at] = a.total[r];
    }
  }

  void attend(Attention& a, int64_t b, int64_t g, int64_t s0,
              int64_t s1) const;
};

// keys s0 ... s1 - 1, a chunk at a time; those that no row sees are left out
void Heads::attend(Attention& a, int64_t b, int64_t g, int64_t s0,
                   int64_t s1) const {
  const int64_t row = k.stride(1);
  const int64_t* position = k_pos.const_data_ptr<int64_t>()
                            + b * k.size(1);
  const auto [low, high] =
      std::minmax_element(a.position.begin(), a.position.end());
  const int64_t oldest = window ? int64_t(*low) - window : -1;
  for (; s0 < s1; s0 += KEYS) {
    const int64_t count = std::min(KEYS, s1 - s0);
    bool any = false;
    for (int64_t s = 0; s < KEYS; ++s) {
      const int64_t p = s < count ? position[s0 + s] : -1;
      a.seen[s] = p < 0 ? -1 : int32_t(p);
      any |= p >= 0 && p > oldest && p <= *high;
    }
    const int64_t at = b * k.stride(0) + s0 * row + g * k.stride(2);
    const Number *key = numbers(k) + at, *value = numbers(v) + at;
    if (any) a.chunk(key, value, row, count);
  }
}

// (ranges, rows) partial results -> y (rows, C)
void merge(const Partial& from, int64_t ranges, int64_t rows, int64_t C,
           Number* y) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float top = from.top[r], total = 0;
      for (int64_t i = 1; i < ranges; ++i)
        top = std::max(top, from.top[i * rows + r]);
      float out[WIDEST] = {};
      for (int64_t at = r; at < ranges * rows; at += rows) {
        const float weight = std::exp(from.top[at] - top);
        total += weight * from.total[at];
        for (int64_t c = 0; c < C; ++c)
          out[c] += weight * from.out[at * C + c];
      }
      for (int64_t c = 0; c < C; ++c) y[r * C + c] = out[c] / total;
    }
  });
}

Tensor run_attention(const Heads& heads) {
  const Tensor& q = heads.q;
  const int64_t T = q.size(1), H = q.size(2), C = q.size(3);
  const int64_t S = heads.k.size(1), G = heads.k.size(2);
  const int64_t some = std::max<int64_t>(1, KEYS * G / H);
  const int64_t tiles = (T + some - 1) / some, rows = q.size(0) * T * H;
  const int64_t width = tiles > 1 ? std::max<int64_t>(S, 1) : RANGE;
  const int64_t ranges = std::max<int64_t>(1, (S + width - 1) / width);
  Partial partial{Buffer(ranges * rows * C), Buffer(ranges * rows),
                  Buffer(ranges * rows)};
  const int64_t pieces = q.size(0) * G * tiles;
  share(ranges * pieces, 1, [&](int64_t item) {
    thread_local Attention a;
    const int64_t range = item / pieces, piece = item % pieces;
    const int64_t t0 = (tiles - 1 - piece % tiles) * some;  // longest first
    heads.run(a, piece / tiles / G, piece / tiles % G, t0,
              std::min(t0 + some, T), range * width,
              std::min((range + 1) * width, S), range * rows, partial);
  });
  Tensor y = at::empty(q.sizes(), q.options());
  merge(partial, ranges, rows, C, static_cast<Number*>(y.data_ptr()));
  return y;
}

Tensor sink_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& sinks, const Tensor& q_pos,
                      const Tensor& k_pos, int64_t window, double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4
                  && k.size(3) == q.size(3) && window >= 0,
              "sink_attention: expected q (B, T, H, C), k and v "
              "(B, S, G, C), window >= 0, found q ", q.sizes(), ", k ",
              k.sizes(), ", v ", v.sizes(), ", window ", window);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), C = q.size(3);
  const int64_t S = k.size(1), G = k.size(2);
  auto fits = [](const Tensor& pos, int64_t rows, int64_t columns) {
    return pos.dim() == 2 && (pos.size(0) == rows || pos.size(0) == 1)
        && pos.size(1) == columns;
  };
  if (!ours({q, k, v, sinks}) || !whole({q_pos, k_pos}) || !q.numel() || !G
      || C % ROWS || C > WIDEST || H % G || k.size(0) != B
      || k.sizes() != v.sizes() || !has(sinks, {H}) || !fits(q_pos, B, T)
      || !fits(k_pos, B, S) || k.stride(3) != 1
      || k.strides() != v.strides())
    return plain<decltype(sink_attention)>("sink_attention", q, k, v, sinks,
                                           q_pos, k_pos, window, scale);
  return run_attention({q.contiguous(), k, v, sinks.contiguous(),
                        q_pos.expand({B, -1}).contiguous(),
                        k_pos.expand({B, -1}).contiguous(), window,
                        float(scale)});
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("sink_attention", sink_attention);
}

}  // namespace
