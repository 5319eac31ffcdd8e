// What if a processor multiplies whole tiles?
// Generated from book/kernels/amx.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AMX
constexpr int64_t SQUARE = 16;  // rows of a register, 64 bytes each
constexpr int64_t AREA = SQUARE * BLOCK;  // bf16 numbers in it
constexpr int64_t SQUARED = 4;  // places of an expert, at least
static_assert(SQUARED <= FEW);  // with fewer, digits are there

struct alignas(64) Shapes {  // eight registers, each as large as can be
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16];
  uint8_t rows[16];

  constexpr Shapes() : bytes(), rows() {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SQUARE;
  }
};
constexpr Shapes SHAPES;

struct Registers {  // have these shapes while this lives
  Registers() { _tile_loadconfig(&SHAPES); }
  ~Registers() { _tile_release(); }
};

// before and after registers are filled from memory, since the compiler is
// not told that they read it
inline void written() { asm volatile("" ::: "memory"); }

// x less what bf16 holds of it
void remainder(const float* x, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += 8) {
    Number near[8];
    narrow(load<Floats>(x + k), near);
    store(to + k, load<Floats>(x + k) - widen(near));
  }
}

// `count` columns of n numbers as squares, one after the other
void beside(const Number* rows, int64_t count, int64_t n, Number* to) {
  for (int64_t k = 0; k < n; k += BLOCK) {
    Bytes v[SQUARE];
    for (int64_t t = 0; t < SQUARE; ++t)
      v[t] = t < count ? load<Bytes>(rows + t * n + k) : Bytes{};
    turn(v);
    for (int64_t p = 0; p < SQUARE; ++p, to += BLOCK)
      _mm512_store_si512(to, v[p]);
  }
}

// What stands at each expert's places, sixteen columns beside each other:
// squares of 16 pairs by 16 columns. What was stored in bf16 is one column;
// anything else is two, its sixteen leading bits, which are added later
struct Squares {
  int64_t columns = 0, n = 0;  // of a place; numbers in a column
  std::vector<int64_t> start;  // each expert's first square
  Tensor all;

  Squares() = default;

  // expert e has places begin[e] ... begin[e + 1] - 1: rows `from` of x
  Squares(const float* x, const std::vector<int64_t>& from, int64_t blocks,
          bool stored, const std::vector<int64_t>& begin)
      : columns(stored ? 1 : 2), n(padded(blocks)), start(begin.size()) {
    std::vector<std::pair<int64_t, int64_t>> items;  // first place, places
    const int64_t most = SQUARE / columns;
    for (size_t e = 0; e + 1 < begin.size(); ++e) {
      start[e] = items.size();
      if (begin[e + 1] - begin[e] >= SQUARED)
        for (int64_t i = begin[e]; i < begin[e + 1]; i += most)
          items.push_back({i, std::min(most, begin[e + 1] - i)});
    }
    all = scratch({int64_t(items.size()), SQUARE, n}, at::kBFloat16);
    auto to = static_cast<Number*>(all.data_ptr());
    at::parallel_for(0, items.size(), 1, [&](int64_t first, int64_t last) {
      std::vector<Number> rows(SQUARE * n);
      Buffer rest(blocks * BLOCK);
      for (int64_t i = first; i < last; ++i) {
        const auto [place, count] = items[i];
        for (int64_t t = 0; t < count; ++t) {
          const float* row = x + from[place + t] * blocks * BLOCK;
          pair_row(row, blocks, &rows[t * columns * n]);
          if (columns == 1) continue;
          remainder(row, blocks * BLOCK, rest.data());
          pair_row(rest.data(), blocks, &rows[(2 * t + 1) * n]);
        }
        beside(rows.data(), count * columns, n, to + i * SQUARE * n);
      }
    });
  }

  const Number* of(int64_t expert) const {
    return numbers(all) + start[expert] * SQUARE * n;
  }
};
#endif

}  // namespace
