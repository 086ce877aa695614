#include "kernels/rotate_rows.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rotate_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/by_isa.h"
#include "kernels/parts.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
void rotate(T* x, const T* cosine, const T* sine, int64_t width, bool back) {
  const Full<T> d;
  const auto sign = hn::Set(d, static_cast<T>(back ? -1 : 1));
  for_each_vector<T>(width, [&](int64_t i, auto all) HWY_ATTR {
    const auto value = load_some<T>(all, x + i);
    const auto turned = hn::Mul(hn::Mul(sign, load_some<T>(all, sine + i)), hn::Reverse2(d, value));
    store_some<T>(all, hn::MulAdd(value, load_some<T>(all, cosine + i), turned), x + i);
  });
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

namespace {

struct Tables {
  RotationKernels<float> f;
  RotationKernels<double> d;
};

Tables make_tables(Isa isa) {
  Tables t;
  HEED_SELECT(add_rotations, t.f, t.d)
  return t;
}

}  // namespace

template <>
const RotationKernels<float>& rotation_kernels<float>(Isa isa) {
  return by_isa(isa, make_tables).f;
}

template <>
const RotationKernels<double>& rotation_kernels<double>(Isa isa) {
  return by_isa(isa, make_tables).d;
}

}  // namespace heed::kernels
#endif
