// How are eight bits multiplied at memory's speed?
// Generated from book/kernels/eight_rows.py; edit the chapter, not this file.

namespace {

#if defined(GPTOSS_AVX2) && !defined(GPTOSS_BF16)
constexpr int64_t FEW_TOKENS = 12;  // more: tiles

static_assert(CHUNK % 2 == 0);  // whole groups

// blocks first ... first + count - 1 of rows row ... row + 15
void decode_eight(const Eight& w, int64_t row, int64_t first, int64_t count,
                  Tile& tile) {
  const int8_t* rows[ROWS];
  for (int64_t r = 0; r < ROWS; ++r) {
    const int64_t at = std::min(row + r, w.rows - 1) * w.n + first * BLOCK;
    rows[r] = w.values + at;
    for (int64_t b = 0; b < count; ++b)
      tile.factors[b][r] = 2 * wide_scale(w.scales[at / BLOCK + b]);
  }
  for (int64_t b = 0; b < count; ++b)
    for (int half = 0; half < 2; ++half) {
      __m128i v[ROWS];
      for (int64_t r = 0; r < ROWS; ++r)
        v[r] = load<__m128i>(rows[r] + place(b) + 2 * half * HALF);
      transpose(v);
      for (int i = 0; i < 16; i += 4)
        for (int u = 0; u < 2; ++u)
          put_pair(v[i + u], v[i + u + 2],
                   tile.values[b][u][4 * half + i / 4]);
    }
}

// as eight_few, for many tokens
Tensor eight_many(const Eight& w, const Tensor& x,
                  const std::optional<Tensor>& bias) {
  const int64_t N = x.numel() / w.n;
  const Quantised tokens = quantised(floats(x).data(), STORED, N,
                                     w.n / BLOCK, false);
  std::vector<int64_t> all(N);
  for (int64_t i = 0; i < N; ++i) all[i] = i;
  auto shape = x.sizes().vec();
  shape.back() = w.rows;
  Tensor y = at::empty(shape, x.options());
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const Number* add = bias ? numbers(b) : nullptr;
  auto to = static_cast<Number*>(y.data_ptr());
  share((w.rows + ROWS - 1) / ROWS, 2, [&](int64_t item) {
    const int64_t row = item * ROWS, rows = std::min(ROWS, w.rows - row);
    Buffer out(N * ROWS);
    rows_for_many([&](int64_t first, int64_t count, Tile& tile) {
      decode_eight(w, row, first, count, tile);
    }, tokens, all, out.data());
    for (int64_t i = 0; i < N; ++i)
      finish(&out[i * ROWS], add ? add + row : nullptr, rows,
             to + i * w.rows + row);
  });
  return y;
}

#else
constexpr int64_t FEW_TOKENS = 8;  // more: in bf16

// a group of two blocks in bf16
inline void unpack(const int8_t* from, const uint16_t* scales, Number* to) {
#ifdef GPTOSS_BF16
  const Bytes two = _mm512_set1_epi32(load<int32_t>(scales));
  const __m512 scale[] = {
      (__m512)_mm512_slli_epi32(two, 16),
      (__m512)_mm512_and_si512(two, _mm512_set1_epi32(0xffff0000))};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i, from += HALF, to += BLOCK) {
    auto half = [&](int h) INLINE {
      return scale[i] * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                            load<__m128i>(from + 2 * HALF * h)));
    };
    _mm512_storeu_si512(to, (Bytes)_mm512_cvtne2ps_pbh(half(1), half(0)));
  }
#else
  using Few = int8_t __attribute__((vector_size(8)));
  for (int64_t k = 0; k < GROUP; k += 8) {
    const int64_t at = place(k / BLOCK) + k % BLOCK / HALF * 2 * HALF;
    narrow(__builtin_convertvector(load<Few>(from + at + k % HALF), Floats)
               * wide_scale(scales[k / BLOCK]),
           to + k);
  }
#endif
}

// rows first ... first + count - 1 in bf16
void unpack_rows(const Eight& w, int64_t first, int64_t count, Number* to) {
  const int8_t* from = w.values + first * w.n;
  const uint16_t* scales = w.scales + first * w.n / BLOCK;
  for (int64_t i = count * w.n / GROUP; i--;
       from += GROUP, scales += 2, to += GROUP) {
    ask_ahead(from);
    unpack(from, scales, to);
  }
}

#ifdef GPTOSS_BF16
struct Unpacked {  // by the thread that asks
  static constexpr bool FRESH = false;
  const Eight& w;
  const Number* rows(int64_t first, int64_t count) const {
    thread_local Array<Number> to;
    if (int64_t(to.size()) < count * w.n) to.resize(count * w.n);
    unpack_rows(w, first, count, to.data());
    return to.data();
  }
};

// as eight_few, for many tokens
Tensor eight_many(const Eight& w, const Tensor& x,
                  const std::optional<Tensor>& bias) {
  return multiplied(x, Unpacked{w}, w.rows, w.n, bias);
}
#else
// the same: strips pass through `linear`
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
    auto to = static_cast<Number*>(strip.data_ptr());
    at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      unpack_rows(w, first + begin, end - begin, to + begin * w.n);
    });
    std::optional<Tensor> part;
    if (bias) part = bias->narrow(0, first, rows);
    y.narrow(-1, first, rows).copy_(linear(x, strip, part));
  }
  return y;
}
#endif
#endif

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
