#include "kernels/rotate_rows.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rotate_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/by_isa.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <bool kBack, class T>
void rotate_rows(Block<T> x, int64_t rows, const T* cosine, const T* sine, int64_t stride,
                 int64_t width) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r, cosine += stride, sine += stride) {
    T* row = x.row(r);
    for_each_vector<T>(width, [&](int64_t i, auto all) HWY_ATTR {
      const auto value = load_some<T>(all, row + i), c = load_some<T>(all, cosine + i);
      const auto turned = hn::Mul(load_some<T>(all, sine + i), hn::Reverse2(d, value));
      store_some<T>(all, kBack ? hn::MulSub(value, c, turned) : hn::MulAdd(value, c, turned),
                    row + i);
    });
  }
}

template <class T>
void rotate(Block<T> x, int64_t rows, const T* cosine, const T* sine, int64_t stride, int64_t width,
            bool back) {
  const auto run = back ? rotate_rows<true, T> : rotate_rows<false, T>;
  run(x, rows, cosine, sine, stride, width);
}

}  // namespace

void add_rotations(RotationKernels<float>& f, RotationKernels<double>& d) {
  f.rotate = rotate<float>;
  d.rotate = rotate<double>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(RotationKernels, rotation_kernels, add_rotations)

}  // namespace heed::kernels
#endif
