// How are four bits multiplied without unpacking?
// Generated from book/kernels/packed.py; edit the chapter, not this file.

namespace {

constexpr int64_t BLOCK = 32;
#ifdef GPTOSS_AVX512
constexpr int64_t SIDE = 4;  // blocks in a register
#elif defined(GPTOSS_AVX2)
constexpr int64_t SIDE = 2;
#else
constexpr int64_t SIDE = 1;
#endif
constexpr int64_t LANES = 4 * SIDE;  // 32-bit numbers in a register

struct Line {
  int16_t values[2][BLOCK / 2];  // a block's even elements, its odd ones
};

struct alignas(64) Group {
  int8_t digits[2][2][SIDE][16];  // the high ones, the low ones; even, odd
  int32_t offset[SIDE][4];        // -12 times the sum over four bytes
};

// rows of 16-bit integers, and for each block half the step between them
struct Quantised {
  int64_t blocks, per_row;  // groups: blocks / SIDE, rounded up
  Array<Line> lines;
  Array<Group> groups;
  Buffer halves;  // a row of them is filled up to whole registers

  // grouped: for products row by row, too
  Quantised(int64_t rows, int64_t blocks, bool grouped = true)
      : blocks(blocks), per_row((blocks + SIDE - 1) / SIDE),
        lines(rows * blocks),
        groups(SIDE > 1 && grouped ? rows * per_row : 0),
        halves(rows * per_row * SIDE + LANES) {}

  Line* line(int64_t n) { return &lines[n * blocks]; }
  float* half(int64_t n) { return &halves[n * per_row * SIDE]; }
  const Line* line(int64_t n) const { return &lines[n * blocks]; }
  const float* half(int64_t n) const {
    return &halves[n * per_row * SIDE];
  }
};

inline float largest(const Floats (&part)[4]) {
  Floats top = {};
  for (Floats x : part) {
    Floats size = (Floats)((Ints)x & 0x7fffffff);
    top = size > top ? size : top;
  }
  float found = 0;
  for (int i = 0; i < 8; ++i) found = std::max(found, top[i]);
  return found;
}

constexpr float STORED = 0, FINEST = 127 * 256 + 127;

// the step between integers of which the largest is `most`; for what was
// stored in bf16 a power of two: its largest is at most 255 * 2**6
inline float step(float largest, float most) {
  if (most != STORED) return largest / most;
  const uint32_t exponent = load<uint32_t>(&largest) & 0x7f800000;
  return load<float>(&exponent) / 8192;
}

using Reals = float __attribute__((vector_size(128)));  // of a block
using Whole = int32_t __attribute__((vector_size(128)));
using Shorts = int16_t __attribute__((vector_size(64)));
using Digits = int8_t __attribute__((vector_size(32)));

// q = 256 * high + low, both in -128 ... 127, for the block in that place
inline void split(Shorts q, int64_t place, Group& to) {
  const Digits digits[] = {__builtin_convertvector((q + 128) >> 8, Digits),
                           __builtin_convertvector(q, Digits)};
  for (int d = 0; d < 2; ++d)
    for (int odd = 0; odd < 2; ++odd)
      std::memcpy(to.digits[d][odd][place],
                  reinterpret_cast<const char*>(&digits[d]) + 16 * odd, 16);
  for (int i = 0; i < 16; ++i)
    to.offset[place][i / 4] -= 12 * (q[i] + q[16 + i]);
}

// integers nearest to a block, and the step `size` between them
inline Shorts nearest(const float* x, float most, float& size) {
  Floats part[4], odd = {};
  std::memcpy(part, x, sizeof part);
  for (Floats v : part) odd += 0 * v;  // NaN if v is NaN or infinite
  const float exact = step(largest(part), most);
  const float up = exact > 1e-37f ? 1 / exact : 0;
  size = exact + sum(odd);
  // adding 1.5 * 2**23 leaves the nearest integer in the low bits
  const auto all = (Whole)(load<Reals>(x) * up + 12582912.0f);
  return __builtin_convertvector(all - 0x4b400000, Shorts);
}

void quantise(const float* x, float most, int64_t n, Quantised& to) {
  for (int64_t b = 0; b < to.blocks; ++b, x += BLOCK) {
    float size;
    const Shorts near = nearest(x, most, size);
    const Shorts q = __builtin_shufflevector(
        near, near,
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    std::memcpy(to.line(n)[b].values, &q, sizeof q);
    to.half(n)[b] = size / 2;
    if (!to.groups.empty())
      split(q, b % SIDE, to.groups[n * to.per_row + b / SIDE]);
  }
}

Quantised quantised(const float* x, float most, int64_t rows,
                    int64_t blocks, bool grouped = true) {
  Quantised q(rows, blocks, grouped);
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      quantise(x + n * blocks * BLOCK, most, n, q);
  });
  return q;
}

inline float power(uint8_t scale) {  // 2 ** (scale - 127); NaN for 255
  // a scale byte is a float's exponent field; that of 0 is subnormal
  const uint32_t bits = std::max(uint32_t(scale) << 23, 1u << 22);
  const float value = load<float>(&bits);
  return value + 0 * value;  // infinity becomes NaN
}

constexpr int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12,
                              0, -1, -2, -3, -4, -6, -8, -12};

#ifdef GPTOSS_AVX2
constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // TWICE + 12
                               12, 11, 10, 9, 8, 6, 4, 0};
using Sums = float __attribute__((vector_size(16 * SIDE)));
using Words = int32_t __attribute__((vector_size(16 * SIDE)));
using Pairs = uint16_t __attribute__((vector_size(16 * SIDE)));
#endif

}  // namespace
