// What changes when many tokens meet one weight?
// Generated from book/kernels/many_rows.py; edit the chapter, not this file.

namespace {

// a pick is one choice of one token; those of expert e are
// order[begin[e]] ... order[begin[e + 1] - 1]
struct Groups {
  std::vector<int64_t> order, begin, hit;

  Groups(const int64_t* ids, int64_t picks, int64_t experts)
      : order(picks), begin(experts + 1) {
    for (int64_t i = 0; i < picks; ++i) {
      TORCH_CHECK_INDEX(0 <= ids[i] && ids[i] < experts, "expert: expected "
                        "0 to ", experts - 1, ", found ", ids[i]);
      ++begin[ids[i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      if (begin[e + 1]) hit.push_back(e);
      begin[e + 1] += begin[e];
    }
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < picks; ++i) order[next[ids[i]]++] = i;
  }
};

#ifndef GPTOSS_AVX2
constexpr int64_t FEW = 4;
#endif
constexpr int64_t TALL = 256;  // rows of a piece of work for few tokens
constexpr int64_t BROAD = 64;  // of one for many, by panels
constexpr int64_t READING = 64;  // tokens; fewer: a prompt is at its end

struct Piece {
  int64_t expert, row, rows;
};

// few tokens: tall pieces; many: lower ones
std::vector<Piece> pieces(const Packed& weight, const Groups& groups,
                          int64_t few, int64_t low) {
  std::vector<Piece> all;
  for (int64_t e : groups.hit) {
    const int64_t count = groups.begin[e + 1] - groups.begin[e];
    for (int64_t r = 0, height; r < weight.rows; r += height) {
      height = std::min(count < few ? TALL : low, weight.rows - r);
      all.push_back({e, r, height});
    }
  }
  return all;
}

// does any expert have fewer places than that?
bool any_below(const Groups& groups, int64_t count) {
  for (int64_t e : groups.hit)
    if (groups.begin[e + 1] - groups.begin[e] < count) return true;
  return false;
}

// what stands at each place: row from[place] of x
struct Inputs {
  static constexpr char OPERATOR[] = "packed_experts";
  static constexpr int64_t TILED = FEW;  // from so many places on
  static constexpr int64_t PAIR = 2;     // fewer go by their digits
  std::vector<int64_t> from;
  Quantised digits;                // of the rows of x
  int64_t few = FEW, low = ROWS;  // fewer places: TALL pieces; else low ones
#ifdef GPTOSS_AVX512
  Interleaved<WholePanel<InWords>> words;
#endif
#ifdef GPTOSS_BF16
  Interleaved<PairPanel> pairs;
#endif
#ifdef GPTOSS_AMX
  Squares squares;
#endif

  Inputs(const float* x, int64_t rows, const Packed& weight, float most,
         std::vector<int64_t> place, const Groups& groups,
         bool in_words = true)
      : from(std::move(place)), digits(0, weight.blocks) {
    const int64_t blocks = weight.blocks;
#ifdef GPTOSS_AMX
    if (lent()) {
      squares = {x, from, blocks, most == STORED, groups.begin};
      low = TALL;
      if (!any_below(groups, SQUARED)) return;
    } else
#endif
#ifdef GPTOSS_BF16
    if (PAIRED && most == STORED) {  // hidden numbers keep sixteen bits
      pairs = paired(x, from, blocks, groups.begin, PAIR);
      few = TOGETHER + 1, low = BROAD;
      if (any_below(groups, PAIR)) digits = quantised(x, most, rows, blocks);
      return;
    }
#endif
    digits = quantised(x, most, rows, blocks, any_below(groups, FEW)
                       || weight.rows % ROWS);  // what is below a tile
#ifdef GPTOSS_AVX512
    if (lent() || !in_words) return;
    words = interleaved<InWords>(digits, from, groups.begin, FEW);
    low = BROAD;
#endif
  }

  // rows of a weight times `count` places from `first` on
#ifdef GPTOSS_AVX512
  void by_tile(const uint8_t* w, const uint8_t* scales, int64_t rows,
               int64_t first, int64_t count, float* out) const {
    const int64_t blocks = digits.blocks;
#ifdef GPTOSS_BF16
    if (pairs.size)
      return paired_panels(w, scales, rows, blocks, pairs.at(first), count,
                           out);
#endif
    panels<WholePanel<InWords>>(w, scales, rows, blocks, words.at(first),
                                count, out);
  }
#elif defined(GPTOSS_AVX2)
  void by_tile(const uint8_t* w, const uint8_t* scales, int64_t,
               int64_t first, int64_t count, float* out) const {
    rows_for_many([&](int64_t b, int64_t deep, Tile& tile) {
      decode_tile(w + 16 * b, scales + b, digits.blocks, deep, tile);
    }, digits, {&from[first], size_t(count)}, out);
  }
#endif
};

// emit(place, expert, first row, rows, sums) for every place and piece
template <class X, class Emit>
void grouped_linear(const Packed& weight, const Groups& groups, const X& x,
                    const Emit& emit) {
  const std::vector<Piece> all = pieces(weight, groups, x.few, x.low);
  share(all.size(), 1, [&](int64_t item) {
    const auto [e, row0, rows] = all[item];
    const int64_t first = groups.begin[e];
    const int64_t count = groups.begin[e + 1] - first;
    thread_local Buffer out;
    out.resize(count * rows);
    const int64_t at = (e * weight.rows + row0) * weight.blocks;
    const uint8_t *w = weight.bytes + 16 * at, *s = weight.scales + at;
#ifdef GPTOSS_AMX
    if (x.squares.columns && count >= SQUARED)
      packed_squares({w, s, rows, weight.blocks, x.squares.of(e),
                      count * x.squares.columns, x.squares.columns,
                      out.data(), rows});
    else
#endif
#ifdef GPTOSS_BF16
    if (x.pairs.size && X::PAIR <= count && count < X::TILED)
      packed_strips(w, s, rows, weight.blocks, reinterpret_cast<
                        const Number*>(x.pairs.at(first)), count,
                    out.data(), rows);
    else
#endif
#ifdef GPTOSS_AVX2  // a panel takes any rows, a tile sixteen
    if (count >= X::TILED && (SIDE == 4 || rows == ROWS))
      x.by_tile(w, s, rows, first, count, out.data());
    else
#endif
      rows_for_few(w, s, rows, x.digits, {&x.from[first], size_t(count)},
                   out.data());
    for (int64_t i = 0; i < count; ++i)
      emit(first + i, e, row0, rows, &out[i * rows]);
  });
}

// hidden (places, F) of the experts' first layer
template <class X>
Tensor run_gate_up(const Packed& weight, const Number* bias, float limit,
                   const Groups& groups, const X& x) {
  const int64_t F = weight.rows / 2;
  const Tensor all = scratch({int64_t(groups.order.size()), F}, at::kFloat);
  float* hidden = all.data_ptr<float>();
  grouped_linear(weight, groups, x, [&](int64_t place, int64_t e,
      int64_t row0, int64_t rows, const float* v) {
    const Number* b = bias + e * weight.rows + row0;
    float* to = hidden + place * F + row0 / 2;
    for (int64_t r = 0; r < rows; r += 16) {  // 2 F is a multiple of 64
      const Floats one = load<Floats>(v + r) + widen(b + r);
      const Floats two = load<Floats>(v + r + 8) + widen(b + r + 8);
      store(to + r / 2, clamped_swiglu(
          __builtin_shufflevector(one, two, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(one, two, 1, 3, 5, 7, 9, 11, 13, 15),
          limit));
    }
  });
  return all;
}

// y (tokens, D) of the second layer, the K results weighted and summed
template <class X>
Buffer run_down(const Packed& weight, const Number* bias,
                const Number* shares, const Groups& groups,
                const X& hidden, int64_t K) {
  const int64_t D = weight.rows, tokens = groups.order.size() / K;
  const Tensor all = scratch({tokens * K, D}, at::kFloat);
  float* out = all.data_ptr<float>();
  Buffer y(tokens * D);
  grouped_linear(weight, groups, hidden, [&](int64_t place, int64_t e,
      int64_t row0, int64_t rows, const float* v) {
    const int64_t pick = groups.order[place];
    const Number* b = bias + e * D + row0;
    float* to = out + pick * D + row0;
    for (int64_t r = 0; r < rows; ++r) to[r] = shares[pick] * (v[r] + b[r]);
  });
  at::parallel_for(0, tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t pick = begin * K; pick < end * K; ++pick)
      for (int64_t d = 0; d < D; ++d)
        y[pick / K * D + d] += out[pick * D + d];
  });
  return y;
}

Tensor mxfp4_linear(const Tensor& x, const Tensor& blocks,
                    const Tensor& scales,
                    const std::optional<Tensor>& bias) {
  if (!ours({x, bias.value_or(x)}) || !packed({blocks, scales})
      || scales.dim() != 2)
    return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
                                         bias);
  TORCH_CHECK(has(blocks, {scales.size(0), scales.size(1), 16}),
              "mxfp4_linear: blocks: expected (m, n / 32, 16) beside "
              "scales ", scales.sizes(), ", found ", blocks.sizes());
  const Packed weight(blocks, scales);
  const int64_t m = weight.rows, n = weight.blocks * BLOCK;
  check_linear("mxfp4_linear", x, m, n, bias);
  if (!x.numel() || !m || (bias && !has(*bias, {m})))
    return plain<decltype(mxfp4_linear)>("mxfp4_linear", x, blocks, scales,
                                         bias);
  const int64_t N = x.numel() / n;
  Buffer y(N * m);
  const std::vector<int64_t> ids(N, 0);
  const Groups one(ids.data(), N, 1);
  const Buffer from = floats(x);
  const Inputs inputs(from.data(), N, weight, STORED, one.order, one);
  grouped_linear(weight, one, inputs, [&](
      int64_t place, int64_t, int64_t row0, int64_t rows, const float* v) {
    std::copy_n(v, rows, &y[place * m + row0]);
  });
  add_bias(y, bias);
  return result(x, m, y);
}

template <class X>
Tensor packed_experts(const Tensor& x, const Tensor& ids,
                      const Tensor& weights, const Tensor& gate_up_blocks,
                      const Tensor& gate_up_scales,
                      const Tensor& gate_up_bias, const Tensor& down_blocks,
                      const Tensor& down_scales, const Tensor& down_bias,
                      double limit) {
  auto fits = [&] {  // x (N, D), ids (N, K), gate_up (E, 2 F, D), down ...
    if (x.dim() != 2 || ids.dim() != 2 || gate_up_scales.dim() != 3)
      return false;
    const int64_t N = x.size(0), D = x.size(1), K = ids.size(1);
    const int64_t E = gate_up_scales.size(0), F = gate_up_scales.size(1) / 2;
    return N && D && K && E && F && D % BLOCK == 0 && F % BLOCK == 0
        && has(ids, {N, K}) && has(weights, {N, K})
        && has(gate_up_scales, {E, 2 * F, D / BLOCK})
        && has(gate_up_blocks, {E, 2 * F, D / BLOCK, 16})
        && has(down_scales, {E, D, F / BLOCK})
        && has(down_blocks, {E, D, F / BLOCK, 16})
        && has(gate_up_bias, {E, 2 * F}) && has(down_bias, {E, D});
  };
  if (!ours({x, weights, gate_up_bias, down_bias}) || !whole({ids})
      || !packed({gate_up_blocks, gate_up_scales, down_blocks, down_scales})
      || !gate_up_bias.is_contiguous() || !down_bias.is_contiguous()
      || !fits())
    return plain<decltype(packed_experts<X>)>(
        X::OPERATOR, x, ids, weights, gate_up_blocks, gate_up_scales,
        gate_up_bias, down_blocks, down_scales, down_bias, limit);
  const Packed gate_up(gate_up_blocks, gate_up_scales);
  const Packed down(down_blocks, down_scales);
  const Tensor chosen = ids.contiguous(), shares = weights.contiguous();
  const int64_t K = ids.size(1), picks = ids.numel();
  if (x.size(0) < READING) pool().clear();
  const Groups groups(chosen.const_data_ptr<int64_t>(), picks,
                      gate_up_scales.size(0));
  std::vector<int64_t> token(picks), place(picks);
  for (int64_t i = 0; i < picks; ++i) {
    token[i] = groups.order[i] / K;
    place[i] = i;
  }
  const Buffer from = floats(x);
  const Tensor hidden = run_gate_up<X>(
      gate_up, numbers(gate_up_bias), limit, groups,
      {from.data(), picks / K, gate_up, STORED, token, groups});
  const Buffer y = run_down<X>(
      down, numbers(down_bias), numbers(shares), groups,
      {hidden.data_ptr<float>(), picks, down, FINEST, place, groups}, K);
  return result(x, down.rows, y);
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("mxfp4_linear", mxfp4_linear);
  m.impl("packed_experts", packed_experts<Inputs>);
}

}  // namespace
