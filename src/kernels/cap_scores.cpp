// Bounds on scores before they become weights: c tanh(x / c) (arXiv 2408.00118) and min(x, most).
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cap_scores.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <cmath>

#include "kernels/exp-inl.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// (e^x - 1) / x by its Taylor series, highest power first: 1 / (n + 1)!
template <class T>
inline constexpr int kExpTerms = sizeof(T) == 8 ? 15 : 8;
template <class T, int N>
HWY_INLINE void exp_quotient(const hn::Vec<Full<T>> (&x)[N], hn::Vec<Full<T>> (&p)[N]) {
  constexpr double kInverseFactorials[] = {1.0 / 1307674368000,
                                           1.0 / 87178291200,
                                           1.0 / 6227020800,
                                           1.0 / 479001600,
                                           1.0 / 39916800,
                                           1.0 / 3628800,
                                           1.0 / 362880,
                                           1.0 / 40320,
                                           1.0 / 5040,
                                           1.0 / 720,
                                           1.0 / 120,
                                           1.0 / 24,
                                           1.0 / 6,
                                           0.5,
                                           1.0};
  constexpr int kFirst = 15 - kExpTerms<T>;
  const Full<T> d;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) p[j] = hn::Set(d, static_cast<T>(kInverseFactorials[kFirst]));
#pragma GCC unroll 15
  for (int i = kFirst + 1; i < 15; ++i) {
    const auto c = hn::Set(d, static_cast<T>(kInverseFactorials[i]));
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) p[j] = hn::MulAdd(p[j], x[j], c);
  }
}

// e^x - 1 in place, small x to full relative accuracy, for x in [0, 30] (double: [0, 60]).
template <class T, int N>
HWY_INLINE void exp_minus_one(hn::Vec<Full<T>> (&x)[N]) {
  const Full<T> d;
  using V = hn::Vec<Full<T>>;
  // x = whole ln 2 + rest in two steps, |rest| <= ln 2 / 2
  constexpr T kHigh = static_cast<T>(sizeof(T) == 8 ? 0x1.62e42feep-1 : 0x1.62e4p-1);
  constexpr T kLow = static_cast<T>(0.693147180559945309417 - static_cast<double>(kHigh));
  V fraction[N], power[N], p[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    fraction[j] = hn::Mul(x[j], hn::Set(d, static_cast<T>(1.4426950408889634074)));
  }
  V t[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) t[j] = fraction[j];
  split_power<false>(d, fraction, power);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const V whole = hn::Sub(t[j], fraction[j]);
    x[j] = hn::NegMulAdd(whole, hn::Set(d, kHigh), x[j]);
    x[j] = hn::NegMulAdd(whole, hn::Set(d, kLow), x[j]);
  }
  exp_quotient<T>(x, p);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    x[j] = hn::MulAdd(power[j], hn::Mul(p[j], x[j]), hn::Sub(power[j], hn::Set(d, T{1})));
  }
}

// softcap tanh(x / softcap) in place; `slope` receives its derivative.
template <class T, int N>
HWY_INLINE void soft_cap(T softcap, hn::Vec<Full<T>> (&x)[N], hn::Vec<Full<T>> (&slope)[N]) {
  using V = hn::Vec<Full<T>>;
  const Full<T> d;
  const V one = hn::Set(d, T{1}), two = hn::Set(d, T{2});
  V e[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    // Where tanh is 1 to the last bit.
    e[j] = at_most(d, sizeof(T) == 8 ? 60 : 30, hn::Mul(hn::Abs(x[j]), hn::Set(d, 2 / softcap)));
  }
  // tanh |y| = e / (e + 2) with e = exp(2 |y|) - 1
  exp_minus_one<T>(e);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const V inverse = hn::Div(one, hn::Add(e[j], two)), size = hn::Mul(e[j], inverse);
    slope[j] = hn::Mul(hn::Mul(two, inverse), hn::Add(one, size));  // 1 - tanh^2
    x[j] = hn::CopySign(hn::Mul(hn::Set(d, softcap), size), x[j]);
  }
}

template <class T>
void cap_scores(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
                const ScoreCaps<T>& caps, Block<T> slope) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    if (range.empty()) continue;
    T* scores = s.row(r);
    T* slopes = slope.data == nullptr ? nullptr : slope.row(r);
    // What else an edge vector holds is outside the range: free to change.
    for_visible<T>(range, [&](int64_t m, auto count, auto) HWY_ATTR {
      constexpr int kCount = decltype(count)::value;
      hn::Vec<Full<T>> x[kCount], derivative[kCount];
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        x[j] = hn::Mul(hn::LoadU(d, scores + m + j * lanes<T>()), hn::Set(d, scale));
        derivative[j] = hn::Set(d, T{1});
      }
      if (caps.softcap > 0) soft_cap<T>(caps.softcap, x, derivative);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        const int64_t at = m + j * lanes<T>();
        const auto above = hn::Gt(x[j], hn::Set(d, caps.most));
        hn::StoreU(at_most(d, caps.most, x[j]), d, scores + at);
        if (slopes != nullptr) hn::StoreU(hn::IfThenZeroElse(above, derivative[j]), d, slopes + at);
      }
    });
  }
}

void add_cap_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.cap_scores = cap_scores<float>;
  d.cap_scores = cap_scores<double>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_cap_parts)
}  // namespace heed::kernels
#endif
