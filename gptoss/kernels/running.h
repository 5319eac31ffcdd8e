// How is each key read only once?
// Generated from book/kernels/attending.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_AVX512
using Lanes = float __attribute__((vector_size(64)));
using Places = int32_t __attribute__((vector_size(64)));
#else
using Lanes = Floats;
using Places = Ints;
#endif

#ifndef GPTOSS_BF16
using Query = float;
using Key = float;
using Value = float;
#endif

constexpr int64_t ABREAST = sizeof(Lanes) / sizeof(float);
constexpr int64_t KEYS = 64, WIDEST = 256;  // keys at a time; largest head
constexpr int64_t AT_ONCE = 8;  // rows of a group

// a function of its own: where `this` is one of each thread, the compiler
// would ask for its address again in every loop
#define APART __attribute__((noinline))

struct Span {  // of the positions of sixteen keys, -1 if one is empty
  int32_t low, high;
};

struct Sight {  // of a group
  int32_t oldest, newest, from, to;
  bool sees(Span s) const { return s.high >= oldest && s.low <= newest; }
  bool sees_all(Span s) const { return s.low >= from && s.high <= to; }
};

struct Attention {  // one key head, the query heads and tokens it serves
  int64_t C, rows;
  float scale;
  std::vector<Query> q;              // (rows, C)
  Buffer out, top, total;            // (rows, C), (rows,), (rows, ABREAST)
  std::vector<int32_t> first, last;  // positions that each row sees
  std::vector<Sight> groups;
  alignas(64) float scores[AT_ONCE * KEYS];
  alignas(64) Key keys[KEYS * WIDEST];  // sixteen after sixteen, as columns
#ifndef GPTOSS_BF16
  alignas(64) Value values[KEYS * WIDEST];
#endif

  void resize(int64_t size, int64_t count) {
    C = size, rows = count;
    q.resize(rows * C);
    out.assign(rows * C, 0);
    top.resize(rows);
    total.assign(rows * ABREAST, 0);
    first.resize(rows), last.resize(rows);
  }

  void group();
  void prepare(const Number* k, const Number* v, int64_t stride, int64_t s,
               int64_t some);
  void chunk(const Number* k, const Number* v, int64_t stride,
             int64_t count, const int32_t* at, const Span* spans);
  void weigh(int64_t r, const int32_t* at, int64_t begin, int64_t end);
};

void Attention::group() {
  groups.clear();
  for (int64_t r = 0; r < rows; ++r) {
    if (r % AT_ONCE == 0) groups.push_back({first[r], last[r], 0, last[r]});
    Sight& to = groups.back();
    to.oldest = std::min(to.oldest, first[r]);
    to.newest = std::max(to.newest, last[r]);
    to.from = std::max(to.from, first[r]);
    to.to = std::min(to.to, last[r]);
  }
}

// 2 ** x for x <= 126, relative error below 1e-6; 0 for x < -126
inline Lanes power_of_two(Lanes x) {
  const Lanes shifted = x + 12582912.0f;
  const Lanes r = x - (shifted - 12582912.0f);  // x less the nearest whole
  Lanes p = r * 1.540353e-4f + 1.3333558e-3f;   // log(2) ** n / n!
  for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                       6.9314718e-1f, 1.0f})
    p = p * r + factor;
  const Places power = ((Places)shifted - 0x4b400000) << 23;
  return x < -126.0f ? Lanes{} : (Lanes)((Places)p + power);
}

inline float largest(Floats v) {
  Floats other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = v > other ? v : other;
  other = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v = v > other ? v : other;
  return std::max(v[0], v[1]);
}

#ifdef GPTOSS_AVX512
inline float largest(Lanes v) {
  Floats half[2];
  std::memcpy(half, &v, sizeof v);
  return largest(half[0] > half[1] ? half[0] : half[1]);
}
#endif

// scores of row r, keys begin ... end - 1 of the chunk -> weights
APART void Attention::weigh(int64_t r, const int32_t* at, int64_t begin,
                            int64_t end) {
  const float none = -std::numeric_limits<float>::infinity();
  const float scale = this->scale;  // locals: no store below can change them
  const int32_t first = this->first[r], last = this->last[r];
  float* const e = scores + r % AT_ONCE * KEYS;
  Lanes high = Lanes{} + top[r], sums = load<Lanes>(&total[r * ABREAST]);
  for (int64_t s = begin; s < end; s += ABREAST) {
    Lanes value = scale * load<Lanes>(e + s);
    if (at) {
      const Places p = load<Places>(at + s);
      value = (p >= first) & (p <= last) ? value : Lanes{} + none;
    }
    high = value > high ? value : high;
    std::memcpy(e + s, &value, sizeof value);
  }
  const float higher = largest(high);
  if (higher > top[r]) {
    const float shrink = std::exp2(top[r] - higher);
    for (int64_t c = 0; c < C; ++c) out[r * C + c] *= shrink;
    sums *= shrink;
    top[r] = higher;
  }
  for (int64_t s = begin; s < end; s += ABREAST) {
    const Lanes value = power_of_two(load<Lanes>(e + s) - higher);
    std::memcpy(e + s, &value, sizeof value);
    sums += value;
  }
  std::memcpy(&total[r * ABREAST], &sums, sizeof sums);
}

#ifndef GPTOSS_BF16
void key_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
              Key* to) {
  widen_tile(k, stride, rows, C, to);
}

void score(const Key* keys, const Number*, int64_t C, const Query* q,
           int64_t rows, Target out) {
  for (int64_t r = 0; r < rows; ++r)
    std::fill_n(out.at + r * out.stride, ROWS, 0.0f);
  multiply(keys, ROWS, C, {q, C}, rows, out);
}

void mix(const Value* v, int64_t stride, int64_t count, Source weights,
         int64_t rows, int64_t C, float* out) {
  for (int64_t c = 0; c < C; c += ROWS)
    multiply(v + c, stride, count, weights, rows, {out + c, C});
}
#endif

// makes keys s ... s + some - 1 of a chunk ready, at most sixteen
void Attention::prepare(const Number* k, const Number* v, int64_t stride,
                        int64_t s, int64_t some) {
  key_tile(k + s * stride, stride, some, C, keys + s * C);
#ifndef GPTOSS_BF16
  const int64_t C = this->C;  // a local: no store below can change it
  for (const int64_t end = s + some; s < end; ++s)
    for (int64_t c = 0; c < C; c += 8) {
      if (c % 32 == 0) {
        __builtin_prefetch(k + (s + KEYS) * stride + c);
        __builtin_prefetch(v + (s + KEYS) * stride + c);
      }
      store(values + s * C + c, widen(v + s * stride + c));
    }
#endif
}

APART void Attention::chunk(const Number* k, const Number* v, int64_t stride,
                            int64_t count, const int32_t* at,
                            const Span* spans) {
  bool ready[KEYS / ROWS] = {};
  for (int64_t r = 0; r < rows; r += AT_ONCE) {
    const Sight& group = groups[r / AT_ONCE];
    int64_t begin = KEYS / ROWS, end = 0;  // tiles that this group sees
    for (int64_t t = 0; t < KEYS / ROWS; ++t)
      if (group.sees(spans[t])) begin = std::min(begin, t), end = t + 1;
    if (begin >= end) continue;
    const int64_t some = std::min(AT_ONCE, rows - r);
    bool all = true;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t s = t * ROWS;
      all &= group.sees_all(spans[t]);
      if (!ready[t]) prepare(k, v, stride, s, std::min(ROWS, count - s));
      ready[t] = true;
      score(keys + s * C, k + (s + KEYS) * stride, C, &q[r * C], some,
            {scores + s, KEYS});
    }
    begin *= ROWS, end *= ROWS;
    for (int64_t i = r; i < r + some; ++i)
      weigh(i, all ? nullptr : at, begin, end);
    const int64_t used = std::min(end, count) - begin;
    const Source weights = {scores + begin, KEYS};
#ifdef GPTOSS_BF16
    mix(v + begin * stride, stride, used, weights, some, C, &out[r * C]);
#else
    mix(values + begin * C, C, used, weights, some, C, &out[r * C]);
#endif
  }
}

}  // namespace
