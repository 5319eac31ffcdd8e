// Sixteen bits in twelve
// Generated from book/kernels/twelve_bits.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX2
constexpr int64_t WEIGHTS = 64, SIZE = WEIGHTS * 3 / 2;  // of a block, bytes

struct Compact {  // (rows, blocks, SIZE) bytes
  const uint8_t *bytes, *upper;
  const int32_t *first, *others;  // row r: others[first[r] ... first[r + 1]]
  int64_t rows, blocks, count;    // count: of all others

  const uint8_t* row(int64_t r) const { return bytes + r * blocks * SIZE; }
};
#endif

}  // namespace
