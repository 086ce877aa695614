// Bounds on scores before they become weights: c tanh(x / c) (arXiv 2408.00118) and min(x, most).
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cap_scores.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <limits>

#include "kernels/exp-inl.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// (2^f - 1) / f on [-1/2, 1/2], highest power first: minimax of relative error 2^-26 (float), Taylor as
// that of 2^f (double).
template <class T>
struct QuotientSeries;
template <>
struct QuotientSeries<float> {
  static constexpr int kTerms = 6;
  static constexpr float kValues[] = {1.54035124e-4f, 1.33907355e-3f, 9.61823749e-3f,
                                      5.55035743e-2f, 2.40226498e-1f, 6.93147188e-1f};
};
template <>
struct QuotientSeries<double> : Exp2Series<double, Exactness::full> {
  static constexpr int kTerms = Exp2Series<double, Exactness::full>::kTerms - 1;
};

// 2^t - 1 in place for t in [0, 100], small t to full relative accuracy.
template <class T, int N>
HWY_INLINE void exp2_minus_one(hn::Vec<Full<T>> (&t)[N]) {
  using Series = QuotientSeries<T>;
  const Full<T> d;
  hn::Vec<Full<T>> power[N], p[N];
  split_power<false>(d, t, power);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) p[j] = hn::Set(d, Series::kValues[0]);
#pragma GCC unroll 12
  for (int i = 1; i < Series::kTerms; ++i) {
    const auto c = hn::Set(d, Series::kValues[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) p[j] = hn::MulAdd(p[j], t[j], c);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    t[j] = hn::MulAdd(power[j], hn::Mul(p[j], t[j]), hn::Sub(power[j], hn::Set(d, T{1})));
  }
}

// softcap tanh(x / softcap) in place, factor = 2 log2(e) / softcap; `slope` receives its derivative if
// kSlope.
template <bool kSlope, class T, int N>
HWY_INLINE void soft_cap(T softcap, T factor, hn::Vec<Full<T>> (&x)[N],
                         hn::Vec<Full<T>> (&slope)[N]) {
  using V = hn::Vec<Full<T>>;
  const Full<T> d;
  const V one = hn::Set(d, T{1}), two = hn::Set(d, T{2});
  // tanh |y| = e / (e + 2) with e = exp(2 |y|) - 1; from the bound on it is 1 to the last bit.
  V e[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    e[j] = at_most(d, sizeof(T) == 8 ? 80 : 40, hn::Mul(hn::Abs(x[j]), hn::Set(d, factor)));
  }
  exp2_minus_one<T>(e);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const V inverse = hn::Div(one, hn::Add(e[j], two)), size = hn::Mul(e[j], inverse);
    if constexpr (kSlope) {
      slope[j] = hn::Mul(hn::Mul(two, inverse), hn::Add(one, size));  // 1 - tanh^2
    }
    x[j] = hn::CopySign(hn::Mul(hn::Set(d, softcap), size), x[j]);
  }
}

template <bool kSoft, bool kSlope, class T>
void cap_row(T* scores, T* slopes, KeyRange range, T scale, ScoreCaps<T> caps) {
  const Full<T> d;
  const T factor = HWY_MIN(static_cast<T>(2 * 1.4426950408889634074 / caps.softcap),
                           std::numeric_limits<T>::max());
  // What else an edge vector holds is outside the range: free to change.
  for_visible<T>(range, [&](int64_t m, auto count, auto) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> x[kCount], slope[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      x[j] = hn::Mul(hn::LoadU(d, scores + m + j * lanes<T>()), hn::Set(d, scale));
      slope[j] = hn::Set(d, T{1});
    }
    if constexpr (kSoft) soft_cap<kSlope, T>(caps.softcap, factor, x, slope);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = m + j * lanes<T>();
      hn::StoreU(at_most(d, caps.most, x[j]), d, scores + at);
      if constexpr (kSlope) {
        const auto above = hn::Gt(x[j], hn::Set(d, caps.most));
        hn::StoreU(hn::IfThenZeroElse(above, slope[j]), d, slopes + at);
      }
    }
  });
}

template <class T>
void cap_scores(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
                const ScoreCaps<T>& caps, Block<T> slope) {
  const bool soft = caps.softcap > 0;
  const auto plain = soft ? cap_row<true, false, T> : cap_row<false, false, T>;
  const auto sloped = soft ? cap_row<true, true, T> : cap_row<false, true, T>;
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    if (range.empty()) continue;
    if (slope.data == nullptr) {
      plain(s.row(r), nullptr, range, scale, caps);
    } else {
      sloped(s.row(r), slope.row(r), range, scale, caps);
    }
  }
}

}  // namespace

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
