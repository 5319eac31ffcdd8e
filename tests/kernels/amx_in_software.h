// The instructions of AMX that the kernels use, in software, for a compiler
// that is not told of them: included before all parts by test_amx.py, so that
// a processor with 64-byte bf16 instructions alone runs that path too.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1
#define syscall(...) 0L  // these registers are always lent

namespace software {

struct alignas(64) Register {
  uint8_t bytes[16][64];
};
thread_local Register registers[8];
thread_local bool configured = false;

inline float number(const uint8_t* from) {
  uint32_t bits = uint32_t(from[1]) << 24 | uint32_t(from[0]) << 16;
  if (!(bits & 0x7f800000)) bits &= 0x80000000;  // subnormals are zeros
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void configure(const void* shapes) {
  const auto at = static_cast<const uint8_t*>(shapes);
  if (at[0] != 1 || at[1] != 0) std::abort();
  for (int i = 0; i < 8; ++i)
    if (at[16 + 2 * i] != 64 || at[48 + i] != 16) std::abort();
  configured = true;
}

inline Register& used(int n) {
  if (!configured) std::abort();  // as a processor would
  return registers[n];
}

inline void load(int n, const void* from, long stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(used(n).bytes[r],
                static_cast<const uint8_t*>(from) + r * stride, 64);
}

inline void store(int n, void* to, long stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, used(n).bytes[r], 64);
}

// the first numbers of all pairs in order, the second ones, then both
inline void dot(int sums, int a, int b) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      float s, part[2] = {};
      for (int pair = 0; pair < 16; ++pair)
        for (int odd = 0; odd < 2; ++odd)
          part[odd] += number(used(a).bytes[r] + 4 * pair + 2 * odd)
                       * number(used(b).bytes[pair] + 4 * c + 2 * odd);
      uint8_t* to = used(sums).bytes[r] + 4 * c;
      std::memcpy(&s, to, 4);
      s += part[0] + part[1];
      std::memcpy(to, &s, 4);
    }
}

}  // namespace software

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) software::configure(shapes)
#define _tile_release() (software::configured = false)
#define _tile_zero(n) \
  std::memset(&software::used(n), 0, sizeof(software::Register))
#define _tile_loadd(n, from, stride) software::load(n, from, stride)
#define _tile_stored(n, to, stride) software::store(n, to, stride)
#define _tile_dpbf16ps(c, a, b) software::dot(c, a, b)
