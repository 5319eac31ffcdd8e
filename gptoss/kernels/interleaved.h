// How does a weight meet a hundred tokens?
// Generated from book/kernels/panels.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
// does any expert have so many places?
bool any_from(const std::vector<int64_t>& begin, int64_t least) {
  for (size_t e = 1; e < begin.size(); ++e)
    if (begin[e] - begin[e - 1] >= least) return true;
  return false;
}

// 32-bit words of what stands at each place, `size` of them. Experts with
// `least` places or more have them in groups of up to MANY, word i of all of
// a group beside each other; the others' places have theirs alone
template <class Panel>
struct Interleaved {
  Tensor all;
  int64_t size = 0;

  Interleaved() = default;

  // put(place, to, step): its word i to to[i * step]
  template <class Put>
  Interleaved(const std::vector<int64_t>& begin, int64_t least,
              int64_t blocks, const Put& put)
      : all(scratch({begin.back(), Panel::words(blocks)}, at::kInt)),
        size(Panel::words(blocks)) {
    std::vector<int64_t> first;  // place, of groups
    for (size_t e = 1; e < begin.size(); ++e) {
      const int64_t count = begin[e] - begin[e - 1];
      const auto add = [&](auto, int64_t t) {
        first.push_back(begin[e - 1] + t);
      };
      if (count < least) in_groups<1>(count, add);
      else in_groups<Panel::MANY>(count, add);
    }
    first.push_back(begin.back());
    const int64_t some = begin.back() < 16 ? 16 : 1;
    at::parallel_for(0, first.size() - 1, some, [&](int64_t i, int64_t to) {
      for (; i < to; ++i)
        for (int64_t place = first[i]; place < first[i + 1]; ++place)
          put(place, all.data_ptr<int32_t>() + first[i] * size + place
                     - first[i], first[i + 1] - first[i]);
    });
  }

  const int32_t* at(int64_t place) const {
    return all.const_data_ptr<int32_t>() + place * size;
  }
};

#ifdef GPTOSS_BF16
Interleaved<PairPanel> paired(const float* x,
                              const std::vector<int64_t>& from,
                              int64_t blocks,
                              const std::vector<int64_t>& begin,
                              int64_t least) {
  if (!any_from(begin, least)) return {};  // nobody would read them
  return {begin, FEW, blocks, [&](int64_t place, int32_t* to, int64_t step) {
    const float* token = x + from[place] * blocks * BLOCK;
    if (step == 1)
      return pair_row(token, blocks, reinterpret_cast<Number*>(to));
    thread_local Array<Number> row;
    row.resize(padded(blocks));
    pair_row(token, blocks, row.data());
    for (int64_t i = 0; i < padded(blocks) / 2; ++i)
      to[i * step] = load<int32_t>(&row[2 * i]);
  }};
}
#endif

template <class Kind>
Interleaved<WholePanel<Kind>> interleaved(
    const Quantised& digits, const std::vector<int64_t>& from,
    const std::vector<int64_t>& begin, int64_t least) {
  if (!any_from(begin, least)) return {};
  return {begin, least, digits.blocks,
          [&](int64_t place, int32_t* to, int64_t step) {
    const Line* line = digits.line(from[place]);
    for (int64_t b = 0; b < digits.blocks; ++b) {
      int32_t word[Kind::LANES + 2];
      Kind::split(line[b], word);
      std::memcpy(word + Kind::LANES, digits.half(from[place]) + b, 4);
      word[Kind::LANES + 1] = Kind::offset(line[b]);
      for (int32_t w : word) *to = w, to += step;
    }
  }};
}

#ifdef GPTOSS_BF16
// as `panels`, for scales that bf16 has no room for
void unusual_panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
                    int64_t blocks, const int32_t* x, int64_t N,
                    float* out) {
  const int64_t size = PairPanel::words(blocks);
  std::vector<int32_t> row(size);
  in_groups<PairPanel::MANY>(N, [&](auto T, int64_t t) {
    for (int64_t i = 0; i < T; ++i) {
      for (int64_t k = 0; k < size; ++k) row[k] = x[t * size + k * T + i];
      unusual_rows(w, scales, rows, blocks,
                   reinterpret_cast<const Number*>(row.data()), 1,
                   out + (t + i) * rows, rows);
    }
  });
}

// as `panels`, whatever the scales
void paired_panels(const uint8_t* w, const uint8_t* scales, int64_t rows,
                   int64_t blocks, const int32_t* x, int64_t N, float* out) {
  (usual(scales, rows * blocks) ? panels<PairPanel> : unusual_panels)(
      w, scales, rows, blocks, x, N, out);
}
#endif
#endif

}  // namespace
