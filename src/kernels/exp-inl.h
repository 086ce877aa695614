// Exponentials for weights, exact where it matters: 0 for what lies below the normal numbers, so that
// hardly ever a subnormal result stalls later products, and NaN for NaN.
//
// Functions take groups of vectors and do each step for the whole group: one vector alone is a chain of
// fifteen dependent instructions.
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

// How exactly 2^f is computed: relative error 2^-23.7 for weights of the compute type (double: 2^-50),
// 2^-18.6 and 2^-13.7 where they are rounded to bfloat16.
enum class Exactness { full, half, coarse };

// Minimax polynomials of 2^f on [-1/2, 1/2], highest power first.
template <class T, Exactness kExactness>
struct Exp2Series;
template <>
struct Exp2Series<float, Exactness::full> {
  static constexpr int kTerms = 6;
  static constexpr float kValues[] = {1.32764722e-3f, 9.67554133e-3f, 5.55071327e-2f,
                                      2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
};
template <>
struct Exp2Series<float, Exactness::half> {
  static constexpr int kTerms = 5;
  static constexpr float kValues[] = {9.57010201e-3f, 5.59178603e-2f, 2.40247448e-1f,
                                      6.93121815e-1f, 9.99999261e-1f};
};
template <>
struct Exp2Series<float, Exactness::coarse> {
  static constexpr int kTerms = 4;
  static constexpr float kValues[] = {5.51716691e-2f, 2.42611122e-1f, 6.93260985e-1f,
                                      9.99928074e-1f};
};
// Taylor: ln(2)^n / n!
template <>
struct Exp2Series<double, Exactness::full> {
  static constexpr int kTerms = 14;
  static constexpr double kValues[] = {1.3691488853904128881e-12, 2.5678435993488205142e-11,
                                       4.4455382718708114976e-10, 7.0549116208011233299e-9,
                                       1.0178086009239699728e-7,  1.3215486790144309489e-6,
                                       1.5252733804059840280e-5,  1.5403530393381609954e-4,
                                       1.3333558146428443423e-3,  9.6181291076284771620e-3,
                                       5.5504108664821579953e-2,  2.4022650695910071233e-1,
                                       6.9314718055994530942e-1,  1.0};
};

template <Exactness kExactness, int N, class D, class V>
HWY_INLINE void exp2_fraction(D d, const V (&f)[N], V (&p)[N]) {
  using Series = Exp2Series<hn::TFromD<D>, kExactness>;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) p[j] = hn::Set(d, Series::kValues[0]);
#pragma GCC unroll 13
  for (int i = 1; i < Series::kTerms; ++i) {
    const V c = hn::Set(d, Series::kValues[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) p[j] = hn::MulAdd(p[j], f[j], c);
  }
}

// t = whole + fraction with a whole number and a fraction in [-1/2, 1/2], and 2^whole, for t in
// [-127, 128] (double: [-1023, 1024]): 0 at the lower end, infinite at the upper one. `t` becomes the
// fraction or its negative.
template <bool kNegative, int N, class D, class V>
HWY_INLINE void split_power(D d, V (&t)[N], V (&power)[N]) {
  constexpr bool kDouble = sizeof(hn::TFromD<D>) == 8;
  const hn::RebindToUnsigned<D> du;
  // Adding 1.5 * 2^mantissa_bits + exponent_bias leaves whole + bias in the low bits of the sum:
  // shifted into place they are 2^whole.
  const V magic = hn::Set(
      d, static_cast<hn::TFromD<D>>(kDouble ? 6755399441055744.0 + 1023 : 12582912.0 + 127));
  V sum[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) sum[j] = hn::Add(t[j], magic);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    power[j] = hn::BitCast(d, hn::ShiftLeft<kDouble ? 52 : 23>(hn::BitCast(du, sum[j])));
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const V whole = hn::Sub(sum[j], magic);
    t[j] = kNegative ? hn::Sub(whole, t[j]) : hn::Sub(t[j], whole);
  }
}

template <class T>
inline constexpr T kLeastExponent = sizeof(T) == 8 ? -1023 : -127;

// 2^t in place, for t below 128 (double: 1024).
template <Exactness kExactness, int N, class D, class V>
HWY_INLINE void exp2(D d, V (&t)[N]) {
  V power[N], p[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) t[j] = at_least(d, kLeastExponent<hn::TFromD<D>>, t[j]);
  split_power<false>(d, t, power);
  exp2_fraction<kExactness>(d, t, p);
  // A product, so that a NaN in t survives.
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) t[j] = hn::Mul(p[j], power[j]);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
