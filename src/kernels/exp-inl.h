// exp2 for weights: relative error below 2^-23 (float) and 2^-48 (double) on [-125, 125] (double:
// [-1000, 1000]); exactly 0 below; NaN stays NaN. No subnormal results: they would stall later products.
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

template <class D, class V>
HWY_INLINE V exp2(D d, V t) {
  using T = hn::TFromD<D>;
  constexpr bool kDouble = sizeof(T) == 8;
  // Adding 1.5 * 2^mantissa_bits + exponent_bias leaves round(t) + bias in the low bits of the sum:
  // shifted into place they are 2^round(t). A product, so that a NaN in t survives.
  const V magic =
      hn::Set(d, static_cast<T>(kDouble ? 6755399441055744.0 + 1023 : 12582912.0 + 127));
  const V sum = hn::Add(t, magic);
  const V fraction = hn::Sub(t, hn::Sub(sum, magic));
  const hn::RebindToUnsigned<D> du;
  const V power = hn::BitCast(d, hn::ShiftLeft<kDouble ? 52 : 23>(hn::BitCast(du, sum)));
  const V value = hn::Mul(exp2_fraction(d, fraction), power);
  const auto too_small = hn::Lt(t, hn::Set(d, static_cast<T>(kDouble ? -1000 : -125)));
  return hn::IfThenZeroElse(too_small, value);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
