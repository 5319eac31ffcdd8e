// What if a processor multiplies whole tiles?
// Generated from book/kernels/amx.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AMX
// sums of 32 rows and 32 columns
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
  void put(int64_t rows, int64_t count, int64_t columns, float* out,
           int64_t width) const {
    for (int i = 0; i < 4; ++i) {
      const int64_t r = i % 2 * SQUARE, c = i / 2 * SQUARE;
      if (r >= rows || c >= count) continue;
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

constexpr int64_t BOTH = 2 * SQUARE;  // rows, and columns, at a time

struct Work {  // out[t * width + r]: rows of a packed weight, times columns
  const uint8_t *w, *scales;
  int64_t rows, blocks;
  const Number* x;
  int64_t count, columns;  // in all, of a place
  float* out;
  int64_t width;
  int64_t below = 0;  // bytes from here to what is read next, if anything

  // up to 32 rows from r on, `wide` columns from c on
  Work from(int64_t r, int64_t c, int64_t wide) const {
    Work part = *this;
    part.w += 16 * r * blocks, part.scales += r * blocks;
    part.x += c * padded(blocks), part.out += c / columns * width + r;
    part.rows = std::min(BOTH, rows - r);
    part.count = std::min(wide, count - c);
    part.below = r + BOTH < rows ? 16 * BOTH * blocks : 0;
    return part;
  }
};

// four blocks, or `count` of them, of row after row, as two squares each
struct Decoder {
  const uint8_t *w, *scales;
  int64_t blocks, below;
  Number* to;

  // from block b on
  Decoder(const Work& part, int64_t b, Number* to)
      : w(part.w + 16 * b), scales(part.scales + b), blocks(part.blocks),
        below(part.below), to(to) {}

  INLINE void rows(int64_t some, int64_t count = HELD) {
    for (int64_t r = 0; r < some; ++r, to += BLOCK) {
      __builtin_prefetch(w + 2 * 16 * HELD);  // two rounds
      ask(w + below);
      const Fours four(w, scales, count);
#pragma GCC unroll 4
      for (int j = 0; j < HELD; ++j)
        _mm512_store_si512(to + j * 2 * AREA, four.decoded(j));
      w += 16 * blocks, scales += blocks;
    }
  }
};

void decode_squares(const Work& part, int64_t b, Number* to) {
  Decoder decoder(part, b, to);
  part.blocks - b < HELD ? decoder.rows(BOTH, part.blocks - b)
                         : decoder.rows(BOTH);  // inlined, without masks
}

// adds four squares of each of two rows of them, times x; meanwhile, eight
// times, something else
template <class Else>
INLINE inline void add_few(const Number* w, const Number* x,
                           const Else& meanwhile) {
  written();
  for (int64_t k = 0; k < HELD; ++k, w += 2 * AREA, x += AREA) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    meanwhile();
    _tile_loadd(5, w + AREA, 64);
    _tile_dpbf16ps(1, 5, 6);
    meanwhile();
  }
  written();
}

// up to 16 columns; blocks are decoded while others are multiplied
void few_squares(const Work& part) {
  alignas(64) Number decoded[2][HELD * 2 * AREA];
  FourSums sums;
  sums.clear();
  decode_squares(part, 0, decoded[0]);
  Number *now = decoded[0], *next = decoded[1];
  for (int64_t b = 0; b < part.blocks; b += HELD, std::swap(now, next)) {
    const Number* x = part.x + b * AREA;
    if (b + 2 * HELD <= part.blocks) {
      Decoder decoder(part, b + HELD, next);
      add_few(now, x, [&]() INLINE { decoder.rows(BOTH / 8); });
    } else {
      if (b + HELD < part.blocks) decode_squares(part, b + HELD, next);
      add_few(now, x, [] {});
    }
  }
  sums.keep();
  sums.put(part.rows, part.count, part.columns, part.out, part.width);
}

// adds `deep` squares of two rows of them, times those of x and beyond
inline void add_many(const Number* w, int64_t deep, const Number* x,
                     const Number* beyond) {
  written();
  for (int64_t k = 0; k < deep; ++k, w += 2 * AREA) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, x + k * AREA, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + AREA, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, beyond + k * AREA, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

constexpr int64_t MANY_COLUMNS = 192;  // half of L2, if n is 2880

// more columns: blocks that are decoded once meet all of them
void many_squares(const Work& part) {
  constexpr int64_t DEEPEST = 2 * HELD;  // blocks: 16 KiB, a third of L1
  const int64_t n = padded(part.blocks), blocks = n / BLOCK;
  alignas(64) Number decoded[DEEPEST * 2 * AREA];
  thread_local std::vector<FourSums> sums;
  sums.resize((part.count + BOTH - 1) / BOTH);
  for (int64_t b = 0; b < blocks; b += DEEPEST) {
    const int64_t deep = std::min(DEEPEST, blocks - b);
    for (int64_t k = 0; k < deep; k += HELD)
      decode_squares(part, b + k, decoded + k * 2 * AREA);
    const Number* x = part.x + b * AREA;
    int64_t left = part.count;
    for (FourSums& four : sums) {
      b ? four.fetch() : four.clear();
      add_many(decoded, deep, x, left > SQUARE ? x + SQUARE * n : x);
      four.keep();
      x += BOTH * n, left -= BOTH;
    }
  }
  for (int64_t c = 0; c < part.count; c += BOTH)
    sums[c / BOTH].put(part.rows, part.count - c, part.columns,
                       part.out + c / part.columns * part.width, part.width);
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
  const int64_t n = all.blocks, whole = all.rows / BOTH * BOTH;
  const int64_t lots = (all.count + MANY_COLUMNS - 1) / MANY_COLUMNS;
  const int64_t wide = (all.count + lots * BOTH - 1) / (lots * BOTH) * BOTH;
  std::vector<uint8_t> w, scales;  // of the last rows, and zeros
  if (const int64_t left = (all.rows - whole) * n) {
    w.resize(16 * BOTH * n), scales.resize(BOTH * n);
    std::copy_n(all.w + 16 * whole * n, 16 * left, w.data());
    std::copy_n(all.scales + whole * n, left, scales.data());
  }
  const Registers registers;
  for (int64_t c = 0; c < all.count; c += wide)
    for (int64_t r = 0; r < all.rows; r += BOTH) {
      Work part = all.from(r, c, wide);
      if (r == whole) part.w = w.data(), part.scales = scales.data();
      (part.count > SQUARE ? many_squares : few_squares)(part);
    }
}
#endif

}  // namespace
