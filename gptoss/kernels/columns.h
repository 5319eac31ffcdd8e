// How does a processor multiply bf16 that cannot?
// Generated from book/kernels/dense.py; edit the chapter, not this file.

namespace {

// eight rows of eight numbers become eight columns
inline void transpose(Ints (&v)[8]) {
  for (int step = 0; step < 3; ++step) {
    Ints t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10,
                                         3, 11);
      t[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13,
                                             6, 14, 7, 15);
    }
    std::copy(t, t + 8, v);
  }
}

// pairs of sixteen columns of eight rows, zero from `rows` on, as columns
inline void pair_columns(const Number* w, int64_t stride, int64_t rows,
                         Ints (&v)[8]) {
  for (int64_t r = 0; r < 8; ++r)
    v[r] = r < rows ? load<Ints>(w + r * stride) : Ints{};
  transpose(v);
}

template <class Pointer>
struct Matrix {  // row-major
  Pointer at;
  int64_t stride;
};
using Source = Matrix<const float*>;
using Target = Matrix<float*>;

}  // namespace
