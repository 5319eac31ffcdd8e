// What if a processor multiplies whole tiles?
// Generated from book/kernels/amx.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AMX
// four registers of sums: of 64 rows and 16 columns if H is 4, of 32 rows
// and 32 columns if H is 2
struct alignas(64) FourSums {
  float at[4][SQUARE][SQUARE];

  static void clear() {
    _tile_zero(0); _tile_zero(1);
    _tile_zero(2); _tile_zero(3);
  }

  void fetch() const {
    _tile_loadd(0, at[0], 64); _tile_loadd(1, at[1], 64);
    _tile_loadd(2, at[2], 64); _tile_loadd(3, at[3], 64);
  }

  void keep() {
    _tile_stored(0, at[0], 64); _tile_stored(1, at[1], 64);
    _tile_stored(2, at[2], 64); _tile_stored(3, at[3], 64);
  }

  // out[t * width + r], for `count` columns
  template <int H>
  void put(int64_t rows, int64_t count, int64_t columns, float* out,
           int64_t width) const {
    for (int i = 0; i < 4; ++i) {
      const int64_t r = i % H * SQUARE, c = i / H * SQUARE;
      if (r >= rows) continue;
      Bytes v[SQUARE];
      std::memcpy(v, at[i], sizeof v);
      turn(v);
      const __mmask16 real = rows - r < SQUARE ? (1 << (rows - r)) - 1 : -1;
      for (int64_t j = 0; j < std::min(SQUARE, count - c); j += columns)
        _mm512_mask_storeu_ps(
            out + (c + j) / columns * width + r, real,
            columns == 1 ? (__m512)v[j] : (__m512)v[j] + (__m512)v[j + 1]);
    }
  }
};

// adds four squares of each of H rows of them, times those of x and beyond
template <int H>
void add_squares(const Number* w, const Number* x, const Number* beyond) {
  written();
  for (int64_t k = 0; k < HELD; ++k, w += H * AREA) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, x + k * AREA, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + AREA, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (H == 4) {
      _tile_loadd(4, w + 2 * AREA, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, w + 3 * AREA, 64);
      _tile_dpbf16ps(3, 5, 6);
    } else {
      _tile_loadd(7, beyond + k * AREA, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

constexpr int64_t TALLEST = 4 * SQUARE;  // rows that are decoded together

struct Work {  // out[t * width + r]: rows of a packed weight, times columns
  const uint8_t *w, *scales;
  int64_t rows, blocks;
  const Number* x;
  int64_t count, columns;  // in all, of a place
  float* out;
  int64_t width;
  const uint8_t* next = nullptr;  // what will be read after these rows

  // up to 64 rows from r on, `wide` columns from c on
  Work from(int64_t r, int64_t c, int64_t wide) const {
    Work part = *this;
    part.w += 16 * r * blocks, part.scales += r * blocks;
    part.x += c * padded(blocks), part.out += c / columns * width + r;
    part.rows = std::min(TALLEST, rows - r);
    part.count = std::min(wide, count - c);
    part.next = part.w + (r + TALLEST < rows ? 16 * TALLEST * blocks : 0);
    return part;
  }
};

constexpr int64_t MANY_COLUMNS = 192;  // half of L2, if n is 2880

// blocks b ... b + 3 of 16 H rows from `first` on, or what there is of them
template <int H>
void decode_squares(const Work& part, int64_t first, int64_t b, Number* to) {
  const int64_t end = std::min(first + H * SQUARE, part.rows);
  for (int64_t r = first; r < end; ++r, to += BLOCK) {
    const int64_t at = r * part.blocks + b;
    __builtin_prefetch(part.w + 16 * (at + 2 * HELD));
    __builtin_prefetch(part.next + 16 * TALLEST * b + 64 * r, 0, 2);
    const Fours four(part.w + 16 * at, part.scales + at, part.blocks - b);
#pragma GCC unroll 4
    for (int j = 0; j < HELD; ++j)
      _mm512_store_si512(to + j * H * AREA, four.decoded(j));
  }
}

// 64 rows, sixteen columns: the sums stay in their registers
void few_squares(const Work& part) {
  alignas(64) Number decoded[HELD * 4 * AREA];
  FourSums sums;
  sums.clear();
  for (int64_t b = 0; b < part.blocks; b += HELD) {
    decode_squares<4>(part, 0, b, decoded);
    add_squares<4>(decoded, part.x + b * AREA, nullptr);
  }
  sums.keep();
  sums.put<4>(part.rows, part.count, part.columns, part.out, part.width);
}

// 64 rows, more columns: weights that are decoded once meet all of them
void many_squares(const Work& part) {
  constexpr int64_t BOTH = 2 * SQUARE;
  const int64_t n = padded(part.blocks);
  const int64_t groups = (part.count + BOTH - 1) / BOTH;
  alignas(64) Number decoded[2][HELD * 2 * AREA];
  thread_local std::vector<FourSums> sums;
  sums.resize(2 * groups);
  for (int64_t b = 0; b < part.blocks; b += HELD) {
    for (int64_t r = 0; r < part.rows; r += BOTH)
      decode_squares<2>(part, r, b, decoded[r / BOTH]);
    for (int64_t i = 0; i < 2 * groups; ++i) {
      if (i % 2 * BOTH >= part.rows) continue;
      const Number* x = part.x + i / 2 * BOTH * n + b * AREA;
      const bool two = part.count - i / 2 * BOTH > SQUARE;
      b ? sums[i].fetch() : sums[i].clear();
      add_squares<2>(decoded[i % 2], x, two ? x + SQUARE * n : x);
      sums[i].keep();
    }
  }
  for (int64_t i = 0; i < 2 * groups; ++i) {
    const int64_t r = i % 2 * BOTH, c = i / 2 * BOTH;
    if (r < part.rows)
      sums[i].put<2>(std::min(BOTH, part.rows - r), part.count - c,
                     part.columns, part.out + c / part.columns * part.width
                     + r, part.width);
  }
}

// scales that bf16 has no room for
void unusual_squares(const Work& part) {
  const int64_t n = padded(part.blocks);
  std::vector<Number> column(n);
  Buffer sums(part.rows);
  for (int64_t c = 0; c < part.count; ++c) {
    const Number* from = part.x + c / SQUARE * SQUARE * n + c % SQUARE * 2;
    for (int64_t k = 0; k < n; ++k)
      column[k] = from[k / 2 * BLOCK + k % 2];
    unusual_rows(part.w, part.scales, part.rows, part.blocks, column.data(),
                 1, sums.data(), 0);
    float* to = part.out + c / part.columns * part.width;
    for (int64_t r = 0; r < part.rows; ++r)
      to[r] = c % part.columns ? to[r] + sums[r] : sums[r];
  }
}

// as `packed_strips`
void packed_squares(const Work& all) {
  if (!usual(all.scales, all.rows * all.blocks)) return unusual_squares(all);
  const int64_t times = (all.count + MANY_COLUMNS - 1) / MANY_COLUMNS;
  const int64_t wide = (all.count + 32 * times - 1) / (32 * times) * 32;
  const Registers registers;
  for (int64_t c = 0; c < all.count; c += wide)
    for (int64_t r = 0; r < all.rows; r += TALLEST) {
      const Work part = all.from(r, c, wide);
      (part.count > SQUARE ? many_squares : few_squares)(part);
    }
}
#endif

}  // namespace
