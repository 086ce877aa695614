// Exponential and logarithm of whole vectors. float: to 1 and 4 units in the last place; double: lane
// by lane with the standard library, whose last bits float64 calls are promised.
#if defined(HEED_KERNELS_FUNCTIONS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_FUNCTIONS_INL_H_
#undef HEED_KERNELS_FUNCTIONS_INL_H_
#else
#define HEED_KERNELS_FUNCTIONS_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>

#include <cmath>
#include <limits>

#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Any argument: overflow is inf, NaN stays NaN.
template <class T>
HWY_INLINE hn::Vec<Full<T>> exp_of(hn::Vec<Full<T>> x) {
  const Full<T> d;
  if constexpr (sizeof(T) == 4) {
    const auto y = hn::Exp(d, hn::Min(x, hn::Set(d, 104.0f)));  // beyond, Exp is not defined
    return hn::IfThenElse(hn::IsNaN(x), x, y);
  } else {
    HWY_ALIGN T buffer[hn::MaxLanes(d)];
    hn::Store(x, d, buffer);
    for (T& lane : buffer) lane = std::exp(lane);
    return hn::Load(d, buffer);
  }
}

// Positive normal arguments and inf; NaN stays NaN.
template <class T>
HWY_INLINE hn::Vec<Full<T>> log_of(hn::Vec<Full<T>> x) {
  const Full<T> d;
  if constexpr (sizeof(T) == 4) {
    const auto finite = hn::Le(x, hn::Set(d, std::numeric_limits<T>::max()));
    return hn::IfThenElse(finite, hn::Log(d, x), x);
  } else {
    HWY_ALIGN T buffer[hn::MaxLanes(d)];
    hn::Store(x, d, buffer);
    for (T& lane : buffer) lane = std::log(lane);
    return hn::Load(d, buffer);
  }
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
