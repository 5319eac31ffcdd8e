// What do bf16 units make of four bits?
// Generated from book/kernels/pairs.py; edit the chapter, not this file.

namespace {

#ifdef GPTOSS_BF16
constexpr int64_t SLAB = 480;  // numbers of a row
constexpr int64_t KEPT = 12;   // tokens whose sums wait, at most

template <int T>
INLINE inline void move_sums(const __m512 (*from)[4], __m512 (*to)[4]) {
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) to[t][r] = from[t][r];
}

// adds to the sums in `kept`: R rows, T tokens, `deep` columns
template <int R, int T>
void go_on(const Number* w, int64_t apart, const Number* x, int64_t n,
           int64_t deep, __m512 (*kept)[4]) {
  __m512 s[T][4];
  move_sums<T>(kept, s);
  add_strip<R>(w, apart, x, n, deep, AHEAD / 2, s);
  move_sums<T>(s, kept);
}

// as `strips`, tokens in groups of at most MANY
template <int MANY>
void slabs(const Number* w, int64_t rows, const Number* x, int64_t N,
           int64_t n, float* out, int64_t width) {
  __m512 kept[KEPT][4];
  in_strips<STREAMS, true>(rows, [&](auto R, int64_t r, int64_t step) {
    std::memset(kept, 0, N * sizeof kept[0]);
    for (int64_t k = 0; k < n; k += SLAB)
      in_groups<MANY>(N, [&](auto T, int64_t t) {
        go_on<R.value, T.value>(w + r * n + k, step * n, x + t * n + k, n,
                                std::min(SLAB, n - k), &kept[t]);
      });
    for (int64_t t = 0; t < N; ++t) {
      const auto& s = kept[t];
      const __m128 four = sums(s[0], s[1], s[2], s[3]);
      for (int i = 0; i < R.value; ++i)
        out[t * width + r + i * step] = four[i];
    }
  });
}
#endif

// as `strips`, by whichever way is quicker
void quickest_strips(const Number* w, int64_t rows, const Ready* x,
                     int64_t N, int64_t n, float* out, int64_t width) {
#ifdef GPTOSS_BF16
  if (LEAN < N && N <= KEPT && N != TOGETHER)
    return (N < TOGETHER ? slabs<TOGETHER / 2> : slabs<TOGETHER>)(
        w, rows, x, N, n, out, width);
#endif
  strips(w, rows, x, N, n, out, width);
}

}  // namespace
