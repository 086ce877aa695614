// Exponential and logarithm of whole vectors. float: to 1.3 and 4 units in the last place, exponentials
// below 2^-125.5 are 0; double: lane by lane with the standard library, whose last bits float64 calls are
// promised.
#if defined(HEED_KERNELS_FUNCTIONS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_FUNCTIONS_INL_H_
#undef HEED_KERNELS_FUNCTIONS_INL_H_
#else
#define HEED_KERNELS_FUNCTIONS_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>

#include <cmath>
#include <limits>

#include "kernels/exp-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Any argument: overflow is inf, NaN stays NaN.
template <class T>
HWY_INLINE hn::Vec<Full<T>> exp_of(hn::Vec<Full<T>> x) {
  const Full<T> d;
  if constexpr (sizeof(T) == 4) {
    const Full<uint32_t> du;
    // Within these limits the results are 0 and inf at the ends. The low bits of `sum` are n + 126 with n
    // the whole number next to x log2(e), so that shifted into place they are 2^(n-1).
    x = at_most(d, 89.0f, at_least(d, -87.5f, x));
    const auto magic = hn::Set(d, 12582912.0f + 126);
    const auto sum = hn::MulAdd(x, hn::Set(d, 1.44269504f), magic);
    const auto half_power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, sum)));
    const auto whole = hn::Sub(sum, magic);
    auto r = hn::NegMulAdd(whole, hn::Set(d, 0.693145752f), x);  // ln 2 in two parts
    r = hn::NegMulAdd(whole, hn::Set(d, 1.42860677e-6f), r);
    // e^r = 1 + r + r^2 q(r) to 2^-28 on [-ln(2)/2, ln(2)/2]
    auto q = hn::MulAdd(r, hn::Set(d, 1.3814598e-3f), hn::Set(d, 8.3687175e-3f));
    q = hn::MulAdd(q, r, hn::Set(d, 4.166839e-2f));
    q = hn::MulAdd(q, r, hn::Set(d, 0.16666521f));
    q = hn::MulAdd(q, r, hn::Set(d, 0.49999994f));
    const auto above = hn::MulAdd(q, hn::Mul(r, r), r);
    const auto half = hn::MulAdd(half_power, above, half_power);
    return hn::Add(half, half);
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
