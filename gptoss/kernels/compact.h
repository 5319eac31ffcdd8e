// Sixteen bits in twelve
// Generated from book/kernels/twelve_bits.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX2
// weight i of 32 stands at byte i with bits 3 and 4 changed for each other,
// so that the halves of a register, interleaved, give sixteen neighbours
inline int64_t swapped(int64_t i) {
  return (i & 7) | (i & 8) << 1 | (i & 16) >> 1;
}

#ifndef GPTOSS_BF16
Buffer compact_ready(const Buffer& x) {
  Array<Number> from(x.size());
  convert(x.data(), x.size(), from.data());
  return ready(from.data(), from.size());
}

// out[0], out[step] ...: R rows, `step` rows apart, times x
template <int R>
void compact_dots(const Compact& w, int64_t row, int64_t step,
                  const float* x, float* out) {
  const __m256i upper = _mm256_broadcastsi128_si256(
      load<__m128i>(w.upper));
  const __m256i low = _mm256_set1_epi8(15);
  Floats s[R][2] = {};
  for (int64_t b = 0; b < w.blocks; ++b, x += WEIGHTS)
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = w.row(row + r * step) + b * SIZE;
      ask_ahead(from);
      ask_ahead(from + SIZE / 2);
      const __m256i codes = load<__m256i>(from + WEIGHTS);
      for (int half = 0; half < 2; ++half) {
        const __m256i lower = load<__m256i>(from + 32 * half);
        const __m256i code = _mm256_and_si256(
            half ? _mm256_srli_epi16(codes, 4) : codes, low);
        const __m256i high = _mm256_shuffle_epi8(upper, code);
        const Ints pairs[] = {(Ints)_mm256_unpacklo_epi8(lower, high),
                              (Ints)_mm256_unpackhi_epi8(lower, high)};
        for (int i = 0; i < 2; ++i) {
          const float* at = x + 32 * half + 16 * i;
          s[r][0] += even(pairs[i]) * load<Floats>(at);
          s[r][1] += odd(pairs[i]) * load<Floats>(at + 8);
        }
      }
    }
  for (int r = 0; r < R; ++r) out[r * step] = sum(s[r][0] + s[r][1]);
}
#endif

// y (N, rows) = x (N, n) times the weight transposed, for a few tokens
void compact_few(const Compact& w, const Buffer& x, int64_t N, Buffer& y) {
  constexpr int64_t HEIGHT = 128;
  const int64_t n = w.blocks * WEIGHTS, m = w.rows;
  const auto from = compact_ready(x);
  share((m + HEIGHT - 1) / HEIGHT, 1, [&](int64_t item) {
    const int64_t row0 = item * HEIGHT, rows = std::min(HEIGHT, m - row0);
    const int64_t step = rows / STREAMS;
    for (int64_t t = 0; t < N; ++t) {
      float* to = &y[t * m + row0];
      for (int64_t r = 0; r < step; ++r)
        compact_dots<STREAMS>(w, row0 + r, step, &from[t * n], to + r);
      for (int64_t r = STREAMS * step; r < rows; ++r)
        compact_dots<1>(w, row0 + r, 0, &from[t * n], to + r);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* from = w.first + row0 + r;
        const int64_t end = std::min<int64_t>(from[1], w.count);
        for (int64_t i = std::max(from[0], 0); i < end; ++i) {
          const uint32_t other = w.others[i], bits = other << 16;
          if (other >> 16 < n)
            to[r] += load<float>(&bits) * x[t * n + (other >> 16)];
        }
      }
    }
  });
}

struct Codes {
  uint8_t upper[16], code[256];  // of a code; of an upper byte, or NONE
  static constexpr uint8_t NONE = 16;

  explicit Codes(const std::vector<int64_t>& count) {
    std::vector<uint8_t> order(128);
    for (int half = 0; half < 128; ++half) order[half] = half;
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return count[a] > count[b]; });
    order[7] = 0;  // that of zero
    std::fill_n(code, 256, NONE);
    for (int c = 0; c < 16; ++c)
      code[upper[c] = (c & 8) << 4 | order[c % 8]] = c;
  }
};

// how often each half of an exponent occurs, in every eighth row
std::vector<int64_t> count_halves(const uint16_t* w, int64_t rows,
                                  int64_t n) {
  std::vector<int64_t> total(128);
  std::mutex mutex;
  at::parallel_for(0, (rows + 7) / 8, 16, [&](int64_t begin, int64_t end) {
    int64_t found[128] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = 0; k < n; ++k) ++found[w[8 * r * n + k] >> 8 & 127];
    const std::lock_guard<std::mutex> alone(mutex);
    for (int half = 0; half < 128; ++half) total[half] += found[half];
  });
  return total;
}

// 64 numbers from `column` on; those without a code are added to `apart`
void pack_block(const uint16_t* w, const Codes& codes, int64_t column,
                uint8_t* to, std::vector<int32_t>& apart) {
  uint8_t lower[WEIGHTS], code[WEIGHTS], all = 0;
  for (int64_t i = 0; i < WEIGHTS; ++i) lower[i] = uint8_t(w[i]);
  for (int64_t i = 0; i < WEIGHTS; ++i)
    all |= code[i] = codes.code[w[i] >> 8];
  for (int64_t i = 0; all & Codes::NONE && i < WEIGHTS; ++i)
    if (code[i] == Codes::NONE) {
      lower[i] = 0, code[i] = 7;
      apart.push_back(int32_t((column + i) << 16 | w[i]));
    }
  for (int64_t i = 0; i < 32; i += 8) {  // eight bytes at a time
    uint8_t* at = to + swapped(i);
    std::memcpy(at, lower + i, 8);
    std::memcpy(at + 32, lower + 32 + i, 8);
    const uint64_t both = load<uint64_t>(code + i)
                          | load<uint64_t>(code + 32 + i) << 4;
    std::memcpy(at + WEIGHTS, &both, 8);
  }
}

// weight (rows, n) bf16 -> blocks, upper, first, others
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_compact(
    const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2
                  && weight.is_contiguous() && weight.size(1) % WEIGHTS == 0
                  && weight.size(1) <= 1 << 16,
              "pack_compact: weight: expected contiguous bfloat16 (m, n), "
              "64 dividing n up to 65536, found ", weight.scalar_type(),
              " ", weight.sizes());
  const int64_t rows = weight.size(0), n = weight.size(1);
  auto w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const Codes codes(count_halves(w, rows, n));
  Tensor blocks = at::empty({rows, n / WEIGHTS, SIZE}, at::kByte);
  Tensor upper = at::empty({16}, at::kByte);
  Tensor first = at::zeros({rows + 1}, at::kInt);
  std::copy_n(codes.upper, 16, upper.data_ptr<uint8_t>());
  uint8_t* to = blocks.data_ptr<uint8_t>();
  int32_t* begin = first.data_ptr<int32_t>();
  std::vector<std::vector<int32_t>> apart(rows);
  share(rows, 16, [&](int64_t r) {
    for (int64_t k = 0; k < n; k += WEIGHTS)
      pack_block(w + r * n + k, codes, k, to + (r * n + k) / WEIGHTS * SIZE,
                 apart[r]);
  });
  for (int64_t r = 0; r < rows; ++r)
    begin[r + 1] = begin[r] + int32_t(apart[r].size());
  Tensor others = at::empty({begin[rows]}, at::kInt);
  for (int64_t r = 0; r < rows; ++r)
    std::copy(apart[r].begin(), apart[r].end(),
              others.data_ptr<int32_t>() + begin[r]);
  return {blocks, upper, first, others};
}
#endif

// as `linear`; blocks ... others: the weight again, by `pack_compact`
Tensor compact_linear(const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias,
                      const Tensor& blocks, const Tensor& upper,
                      const Tensor& first, const Tensor& others) {
#ifdef GPTOSS_AVX2
  const auto integers = [](const Tensor& t) {
    return t.scalar_type() == at::kInt && t.is_contiguous() && t.dim() == 1;
  };
  if (ours({x, weight, bias.value_or(x)}) && weight.dim() == 2) {
    const int64_t m = weight.size(0), n = weight.size(1);
    check_linear("compact_linear", x, m, n, bias);
    if (x.numel() && x.numel() <= 2 * n && m && !(bias && !has(*bias, {m}))
        && packed({blocks, upper}) && n % WEIGHTS == 0
        && has(blocks, {m, n / WEIGHTS, SIZE}) && has(upper, {16})
        && integers(first) && integers(others) && has(first, {m + 1})) {
      const int64_t N = x.numel() / n;
      Buffer y(N * m);
      compact_few({blocks.const_data_ptr<uint8_t>(),
                   upper.const_data_ptr<uint8_t>(),
                   first.const_data_ptr<int32_t>(),
                   others.const_data_ptr<int32_t>(), m, blocks.size(1),
                   others.size(0)},
                  floats(x), N, y);
      add_bias(y, bias);
      return result(x, m, y);
    }
  }
#endif
  return linear(x, weight, bias);
}

TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
  m.impl("compact_linear", compact_linear);
#ifdef GPTOSS_AVX2
  m.impl("pack_compact", pack_compact);
#endif
}

}  // namespace
