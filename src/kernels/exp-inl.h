// exp2 for weights: relative error below 2^-23 (float) and 2^-48 (double); exactly 0 below 2^-126.5
// (double: 2^-1022.5), so that hardly ever a subnormal result stalls later products; NaN stays NaN.
#if defined(HEED_KERNELS_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_EXP_INL_H_
#undef HEED_KERNELS_EXP_INL_H_
#else
#define HEED_KERNELS_EXP_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 2^f on [-1/2, 1/2]: minimax of relative error 2^-23.7 (float), Taylor in f ln 2 (double).
template <class D, class V>
HWY_INLINE V exp2_fraction(D d, V f) {
  using T = hn::TFromD<D>;
  if constexpr (sizeof(T) == 4) {
    V p = hn::Set(d, 1.32764722e-3f);
    p = hn::MulAdd(p, f, hn::Set(d, 9.67554133e-3f));
    p = hn::MulAdd(p, f, hn::Set(d, 5.55071327e-2f));
    p = hn::MulAdd(p, f, hn::Set(d, 2.40221197e-1f));
    p = hn::MulAdd(p, f, hn::Set(d, 6.93146967e-1f));
    return hn::MulAdd(p, f, hn::Set(d, 1.00000007f));
  } else {
    const V x = hn::Mul(f, hn::Set(d, 0.693147180559945309417));
    V p = hn::Set(d, 1.0 / 6227020800.0);
    for (double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                     1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) {
      p = hn::MulAdd(p, x, hn::Set(d, c));
    }
    return p;
  }
}

// max(limit, x) and min(limit, x) where a NaN in x stays.
template <class D, class V>
HWY_INLINE V at_least(D d, hn::TFromD<D> limit, V x) {
  const V bound = hn::Set(d, limit);
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
  return hn::Max(bound, x);  // the second operand where one is NaN
#else
  return hn::IfThenElse(hn::Lt(x, bound), bound, x);
#endif
}
template <class D, class V>
HWY_INLINE V at_most(D d, hn::TFromD<D> limit, V x) {
  const V bound = hn::Set(d, limit);
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
  return hn::Min(bound, x);
#else
  return hn::IfThenElse(hn::Gt(x, bound), bound, x);
#endif
}

// round(t) and 2^round(t) for t in [-127, 128] (double: [-1023, 1024]): 0 at the lower end, infinite at
// the upper one.
template <class D, class V>
HWY_INLINE V round_power(D d, V t, V& power) {
  constexpr bool kDouble = sizeof(hn::TFromD<D>) == 8;
  // Adding 1.5 * 2^mantissa_bits + exponent_bias leaves round(t) + bias in the low bits of the sum:
  // shifted into place they are 2^round(t).
  const V magic = hn::Set(
      d, static_cast<hn::TFromD<D>>(kDouble ? 6755399441055744.0 + 1023 : 12582912.0 + 127));
  const V sum = hn::Add(t, magic);
  const hn::RebindToUnsigned<D> du;
  power = hn::BitCast(d, hn::ShiftLeft<kDouble ? 52 : 23>(hn::BitCast(du, sum)));
  return hn::Sub(sum, magic);
}

// 2^t for t below 128 (double: 1024).
template <class D, class V>
HWY_INLINE V exp2(D d, V t) {
  const V above = at_least(d, sizeof(hn::TFromD<D>) == 8 ? -1023 : -127, t);
  V power;
  const V whole = round_power(d, above, power);
  // A product, so that a NaN in t survives.
  return hn::Mul(exp2_fraction(d, hn::Sub(above, whole)), power);
}

// 2^t for every t: infinite from 127.5 (double: 1023.5) on.
template <class D, class V>
HWY_INLINE V exp2_any(D d, V t) {
  return exp2(d, at_most(d, sizeof(hn::TFromD<D>) == 8 ? 1024 : 128, t));
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
