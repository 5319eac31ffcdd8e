// How is each key read only once?
// Generated from book/kernels/attending.py; edit the chapter, not this file.

namespace {

struct Seen {  // where the keys stand, whole chunks, -1 = empty
  int64_t slots;  // of a batch row
  std::vector<int32_t> at;   // (B, slots)
  std::vector<Span> spans;   // (B, slots / 16)

  explicit Seen(const Tensor& k_pos) {  // (B, S)
    const int64_t B = k_pos.size(0), S = k_pos.size(1);
    const int64_t* from = k_pos.const_data_ptr<int64_t>();
    slots = (S + KEYS - 1) / KEYS * KEYS;
    at.resize(B * slots), spans.resize(B * slots / ROWS);
    at::parallel_for(0, spans.size(), 1024, [&](int64_t t, int64_t end) {
      for (; t < end; ++t) {
        const int64_t b = t * ROWS / slots, s = t * ROWS % slots;
        Span span{std::numeric_limits<int32_t>::max(), -1};
        for (int64_t i = 0; i < ROWS; ++i) {
          const int64_t p = s + i < S ? from[b * S + s + i] : -1;
          const int32_t place = p < 0 ? -1 : int32_t(p);
          at[b * slots + s + i] = place;
          span.low = std::min(span.low, place);
          span.high = std::max(span.high, place);
        }
        spans[t] = span;
      }
    });
  }
};

struct Result {  // for each row (B, T, H): y, or what each range gives
  Number* y;
  Buffer out, top, total;  // (ranges, rows, C) and (ranges, rows)

  // row r of a, as row `at` of all
  void take(const Attention& a, int64_t r, int64_t at) {
    const float* from = &a.out[r * a.C];
    float sum = 0;
    for (int64_t i = 0; i < ABREAST; ++i) sum += a.total[r * ABREAST + i];
    if (top.empty()) {
      for (int64_t c = 0; c < a.C; c += 8)
        narrow(load<Floats>(from + c) / sum, y + at * a.C + c);
    } else {
      std::copy_n(from, a.C, &out[at * a.C]);
      top[at] = a.top[r], total[at] = sum;
    }
  }

  void merge(int64_t ranges, int64_t rows, int64_t C) {
    at::parallel_for(0, rows, 16, [&](int64_t r, int64_t end) {
      for (; r < end; ++r) {
        float most = top[r], sum = 0;
        for (int64_t i = 1; i < ranges; ++i)
          most = std::max(most, top[i * rows + r]);
        float mixed[WIDEST] = {};
        for (int64_t at = r; at < ranges * rows; at += rows) {
          const float weight = std::exp2(top[at] - most);
          sum += weight * total[at];
          for (int64_t c = 0; c < C; ++c)
            mixed[c] += weight * out[at * C + c];
        }
        for (int64_t c = 0; c < C; ++c) y[r * C + c] = mixed[c] / sum;
      }
    });
  }
};

struct Heads {  // the operator's arguments, read from inside the threads
  Tensor q, k, v, sinks, q_pos;
  Seen seen;
  int64_t window;
  float scale;

  // keys s0 ... s1 - 1 for tokens t0 ... t1 - 1 of batch row b, key head g;
  // row 0 of the batch is row `base` of the result
  void run(Attention& a, int64_t b, int64_t g, int64_t t0, int64_t t1,
           int64_t s0, int64_t s1, int64_t base, Result& to) const {
    constexpr float LOG2E = 1.44269504f, MOST =
        std::numeric_limits<float>::max();
    const int64_t T = q.size(1), H = q.size(2), J = H / k.size(2);
    const int64_t* position = q_pos.const_data_ptr<int64_t>() + b * T;
    a.resize(q.size(3), (t1 - t0) * J);
    a.scale = scale * LOG2E;
    auto place = [&](int64_t r) {  // of row r among (B, T, H)
      return (b * T + t0 + r / J) * H + g * J + r % J;
    };
    for (int64_t r = 0; r < a.rows; ++r) {
      const Number* from = numbers(q) + place(r) * a.C;
      std::copy_n(from, a.C, &a.q[r * a.C]);
      const int64_t last = a.last[r] = int32_t(position[t0 + r / J]);
      a.first[r] = window ? std::max<int64_t>(0, last - window + 1) : 0;
      const float sink = numbers(sinks)[g * J + r % J];
      a.top[r] = s0 ? -MOST : std::clamp(LOG2E * sink, -MOST, MOST);
      a.total[r * ABREAST] =  // the sink, before any key; infinite: NaN
          s0 ? 0 : sink > MOST ? sink - sink : 1;
    }
    a.group();
    attend(a, b, g, s0, s1);
    for (int64_t r = 0; r < a.rows; ++r) to.take(a, r, base + place(r));
  }

  void attend(Attention& a, int64_t b, int64_t g, int64_t s0,
              int64_t s1) const {
    Sight rows = a.groups[0];
    for (const Sight& group : a.groups) {
      rows.oldest = std::min(rows.oldest, group.oldest);
      rows.newest = std::max(rows.newest, group.newest);
    }
    const int64_t row = k.stride(1);
    for (; s0 < s1; s0 += KEYS) {
      const int64_t slot = b * seen.slots + s0;
      const Span* spans = &seen.spans[slot / ROWS];
      bool any = false;
      for (int64_t t = 0; t < KEYS / ROWS; ++t) any |= rows.sees(spans[t]);
      const int64_t at = b * k.stride(0) + s0 * row + g * k.stride(2);
      if (any)
        a.chunk(numbers(k) + at, numbers(v) + at, row,
                std::min(KEYS, s1 - s0), &seen.at[slot], spans);
    }
  }
};

Tensor run_attention(const Heads& heads) {
  const Tensor& q = heads.q;
  const int64_t T = q.size(1), H = q.size(2), C = q.size(3);
  const int64_t S = heads.k.size(1), G = heads.k.size(2);
  const int64_t some = std::max<int64_t>(1, 2 * KEYS * G / H);
  const int64_t tiles = (T + some - 1) / some, rows = q.size(0) * T * H;
  int64_t width = 512;  // keys of a range; no matter how many threads
  while (32 * width < S) width *= 2;
  if (tiles > 1) width = std::max<int64_t>(S, 1);
  const int64_t ranges = std::max<int64_t>(1, (S + width - 1) / width);
  Tensor y = at::empty(q.sizes(), q.options());
  Result result{static_cast<Number*>(y.data_ptr()), {}, {}, {}};
  const int64_t kept = ranges > 1 ? ranges * rows : 0;
  result.out.resize(kept * C);
  result.top.resize(kept), result.total.resize(kept);
  const int64_t pieces = q.size(0) * G * tiles;
  share(ranges * pieces, 1, [&](int64_t item) {
    thread_local Attention a;
    const int64_t range = item % ranges, piece = item / ranges;
    const int64_t t0 = (tiles - 1 - piece % tiles) * some;  // longest first
    heads.run(a, piece / tiles / G, piece / tiles % G, t0,
              std::min(t0 + some, T), range * width,
              std::min((range + 1) * width, S), range * rows, result);
  });
  if (ranges > 1) result.merge(ranges, rows, C);
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
                        Seen(k_pos.expand({B, -1}).contiguous()), window,
                        float(scale)});
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("sink_attention", sink_attention);
}

}  // namespace
