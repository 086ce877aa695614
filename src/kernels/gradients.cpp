// Backward of the weights, row by row: from raw scores and the gradient of the weights to the weights
// and the gradient of the shaped scores. Formulas: arXiv 2307.08691 (Algorithm 2, softmax), 2409.04431
// (sigmoid); Parallax: tile.h.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gradients.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <cmath>

#include "kernels/exp-inl.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// 2^t in place for scores relative to a row's log-sum-exp.
template <class T, int N>
HWY_INLINE void softmax_weights(hn::Vec<Full<T>> (&t)[N]) {
  const Full<T> d;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) t[j] = at_most(d, T{0}, t[j]);
  exp2<Exactness::full>(d, t);
}

template <class T, bool kAlibi>
HWY_INLINE ShapedRow<T, kAlibi> relative_to_pivot(ShapedRow<T, kAlibi> row, T pivot, KeyRange range,
                                                  T* s) {
  row.bias -= pivot;
  return settled(row, range, RoundedPivot<T>::kLarge, RoundedPivot<T>::kError, s);
}

// t becomes the weight W, dp the gradient of the shaped score; the caller zeroes that where a mask set
// the score to -inf. Softmax: t is relative to the pivot.
template <class T>
struct Gradient {
  using V = hn::Vec<Full<T>>;
  int order = 0;
  T shift = 0;

  template <int N>
  HWY_INLINE void softmax(V (&t)[N], V (&dp)[N]) const {
    const Full<T> d;
    softmax_weights<T>(t);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) dp[j] = hn::Mul(t[j], hn::Add(dp[j], hn::Set(d, shift)));
  }

  // W = 2^whole r, 1 - W = 2^-fraction r, r = 1 / (2^whole + 2^-fraction): as in weights.cpp.
  template <int N>
  HWY_INLINE void sigmoid(V (&t)[N], V (&dp)[N]) const {
    const Full<T> d;
    const V one = hn::Set(d, T{1});
    V power[N], p[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      t[j] = at_most(d, sizeof(T) == 8 ? 1020 : 125, at_least(d, kLeastExponent<T>, t[j]));
    }
    split_power<true>(d, t, power);
    exp2_fraction<Exactness::full>(d, t, p);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const V r = hn::Div(one, hn::Add(power[j], p[j]));
      t[j] = hn::Mul(power[j], r);
      dp[j] = hn::Mul(hn::Mul(t[j], hn::Mul(p[j], r)), dp[j]);
    }
  }

  template <int N>
  HWY_INLINE void polynomial(V (&t)[N], V (&dp)[N]) const {
    const Full<T> d;
    V w[N], slope[N];
    taylor<T>(t, order, w);
    taylor<T>(t, order - 1, slope);
    const V exists = hn::Set(d, order > 0 ? T{1} : T{0});
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      t[j] = w[j];
      dp[j] = hn::Mul(hn::Mul(slope[j], exists), hn::Add(dp[j], hn::Set(d, shift)));
    }
  }
};

template <class T, WeightKind kKind, bool kAlibi>
HWY_INLINE void gradient_row(const ShapedRow<T, kAlibi>& row, const Gradient<T>& gradient,
                             KeyRange range, T* weights, T* ds) {
  const Full<T> d;
  // A call would keep the constants of an exponential from staying in registers.
  for_visible<T>(range,
                 [&](int64_t m, auto count, auto seen) __attribute__((always_inline)) HWY_ATTR {
                   constexpr int kCount = decltype(count)::value;
                   hn::Vec<Full<T>> w[kCount], g[kCount];
                   row.load(m, w);
#pragma GCC unroll 4
                   for (int j = 0; j < kCount; ++j) g[j] = hn::LoadU(d, ds + m + j * lanes<T>());
                   if constexpr (kKind == WeightKind::softmax) gradient.softmax(w, g);
                   if constexpr (kKind == WeightKind::sigmoid) gradient.sigmoid(w, g);
                   if constexpr (kKind == WeightKind::polynomial) gradient.polynomial(w, g);
#pragma GCC unroll 4
                   for (int j = 0; j < kCount; ++j) {
                     const int64_t at = m + j * lanes<T>();
                     const auto absent = masked<T>(row.s + at);
                     // Of polynomials it would not be 0, nor where the pivot is NaN.
                     w[j] = hn::IfThenZeroElse(absent, w[j]);
                     hn::StoreU(seen_or_zero(seen, w[j]), d, weights + at);
                     hn::StoreU(seen_or_zero(seen, hn::IfThenZeroElse(absent, g[j])), d, ds + at);
                   }
                 });
}

template <class T, WeightKind kKind, bool kAlibi>
void gradient_rows(Block<T> s, Block<T> dp, int64_t rows, int64_t key_count, const KeyRange* ranges,
                   const WeightShape<T>& shape, const T* pivot, const T* shift) {
  const int64_t columns = round_up(key_count, lanes<T>());
  for (int64_t r = 0; r < rows; ++r) {
    KeyRange range = range_of(ranges, r, key_count);
    ShapedRow<T, kAlibi> row(s, r, shape);
    Gradient<T> gradient{shape.order, 0};
    if constexpr (kKind == WeightKind::softmax) {
      if (std::isinf(pivot[r])) range = {};
      row = relative_to_pivot(row, pivot[r], range, s.row(r));
    }
    if constexpr (kKind != WeightKind::sigmoid) gradient.shift = shift[r];
    if (!range.empty()) {
      gradient_row<T, kKind, kAlibi>(row, gradient, range, s.row(r), dp.row(r));
    }
    clear_outside<T>(s.row(r), range, columns);
    clear_outside<T>(dp.row(r), range, columns);
  }
}

template <class T, WeightKind kKind>
void gradients(Block<T> s, Block<T> dp, int64_t rows, int64_t key_count, const KeyRange* ranges,
               const WeightShape<T>& given, const T* pivot, const T* shift) {
  const WeightShape<T> shape = without_zero_scale(s, rows, key_count, ranges, given);
  if (shape.slope != 0) {
    gradient_rows<T, kKind, true>(s, dp, rows, key_count, ranges, shape, pivot, shift);
  } else {
    gradient_rows<T, kKind, false>(s, dp, rows, key_count, ranges, shape, pivot, shift);
  }
}

template <class T>
struct ParallaxRow {
  T *s, *t, *a;
  T t_mean, dot_out, dot_mean;
};

template <class T, bool kAlibi>
HWY_INLINE void parallax_row(const ShapedRow<T, kAlibi>& row, const ParallaxRow<T>& x,
                             KeyRange range) {
  const Full<T> d;
  const auto one = hn::Set(d, T{1}), mean = hn::Set(d, x.t_mean), out = hn::Set(d, x.dot_out),
             value_mean = hn::Set(d, x.dot_mean);
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> p[kCount];
    row.load(m, p);
    softmax_weights<T>(p);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = m + j * lanes<T>();
      const auto absent = masked<T>(row.s + at);
      const auto dot = hn::LoadU(d, x.a + at), above = hn::Sub(dot, value_mean);
      const auto lag = hn::Sub(mean, hn::LoadU(d, x.t + at));
      const auto ds = hn::Mul(p[j], hn::MulAdd(lag, above, hn::Sub(dot, out)));
      const auto store = [&](auto value, T* to) HWY_ATTR {
        hn::StoreU(seen_or_zero(seen, hn::IfThenZeroElse(absent, value)), d, to + at);
      };
      store(hn::Mul(p[j], hn::Add(one, lag)), x.s);
      store(ds, x.a);
      store(hn::Neg(hn::Mul(p[j], above)), x.t);
    }
  });
}

template <class T, bool kAlibi>
void parallax_rows(Block<T> s, Block<T> t, Block<T> a, int64_t rows, int64_t key_count,
                   const KeyRange* ranges, const WeightShape<T>& shape, const T* pivot,
                   const T* t_mean, const T* dot_out, const T* dot_mean) {
  const int64_t columns = round_up(key_count, lanes<T>());
  for (int64_t r = 0; r < rows; ++r) {
    KeyRange range = range_of(ranges, r, key_count);
    if (std::isinf(pivot[r])) range = {};
    const ParallaxRow<T> x{s.row(r), t.row(r), a.row(r), t_mean[r], dot_out[r], dot_mean[r]};
    if (!range.empty()) {
      const ShapedRow<T, kAlibi> row(s, r, shape);
      parallax_row<T, kAlibi>(relative_to_pivot(row, pivot[r], range, s.row(r)), x, range);
    }
    for (T* out : {x.s, x.t, x.a}) clear_outside<T>(out, range, columns);
  }
}

template <class T>
void parallax_gradients(Block<T> s, Block<T> t, Block<T> a, int64_t rows, int64_t key_count,
                        const KeyRange* ranges, const WeightShape<T>& given, const T* pivot,
                        const T* t_mean, const T* dot_out, const T* dot_mean) {
  const WeightShape<T> shape = without_zero_scale(s, rows, key_count, ranges, given);
  if (shape.slope != 0) {
    parallax_rows<T, true>(s, t, a, rows, key_count, ranges, shape, pivot, t_mean, dot_out,
                           dot_mean);
  } else {
    parallax_rows<T, false>(s, t, a, rows, key_count, ranges, shape, pivot, t_mean, dot_out,
                            dot_mean);
  }
}

template <class T>
void multiply(Block<T> x, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
              Block<const T> factors) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange whole = whole_vectors<T>(range_of(ranges, r, key_count));
    for (int64_t m = whole.begin; m < whole.end; m += lanes<T>()) {
      const auto zero = hn::Zero(d), value = hn::LoadU(d, x.row(r) + m);
      auto factor = hn::Set(d, scale);
      if (factors.data != nullptr) factor = hn::Mul(factor, hn::LoadU(d, factors.row(r) + m));
      const auto none = hn::Or(hn::Eq(value, zero), hn::Eq(factor, zero));
      hn::StoreU(hn::IfThenZeroElse(none, hn::Mul(value, factor)), d, x.row(r) + m);
    }
  }
}

// The first n elements at p in float64, then zeros.
HWY_INLINE hn::Vec<Full<double>> wide_elements(const double* p, int64_t n) {
  return load_elements<double>(p, n);
}
HWY_INLINE hn::Vec<Full<double>> wide_elements(const float* p, int64_t n) {
  const hn::Rebind<float, Full<double>> d;
  const auto x = n >= lanes<double>()
                     ? hn::LoadU(d, p)
                     : load_first(d, p, static_cast<size_t>(HWY_MAX(n, int64_t{0})));
  return hn::PromoteTo(Full<double>(), x);
}

template <class T>
void sum_tile(Block<const T> ds, int64_t rows, int64_t key_count, const KeyRange* ranges,
              int64_t distance, double& sum, double& weighted) {
  const Full<double> d;
  constexpr int64_t kTogether = 4, kLanes = lanes<double>();
  hn::Vec<Full<double>> sums[kTogether], products[kTogether];
  for (int64_t j = 0; j < kTogether; ++j) sums[j] = products[j] = hn::Zero(d);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    for (int64_t m = range.begin; m < range.end; m += kTogether * kLanes) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTogether; ++j) {
        const int64_t at = m + j * kLanes;
        const auto x = wide_elements(ds.row(r) + at, range.end - at);
        const auto first = hn::Set(d, static_cast<double>(distance + r - at));
        sums[j] = hn::Add(sums[j], x);
        products[j] = hn::MulAdd(x, hn::Abs(hn::Sub(first, hn::Iota(d, 0))), products[j]);
      }
    }
  }
  for (int64_t j = 0; j < kTogether; ++j) {
    sum += hn::GetLane(hn::SumOfLanes(d, sums[j]));
    weighted += hn::GetLane(hn::SumOfLanes(d, products[j]));
  }
}

template <class T>
void add_gradients(TileKernels<T>& k) {
  k.gradients[0] = gradients<T, WeightKind::softmax>;
  k.gradients[1] = gradients<T, WeightKind::sigmoid>;
  k.gradients[2] = gradients<T, WeightKind::polynomial>;
  k.parallax_gradients = parallax_gradients<T>;
  k.multiply = multiply<T>;
  k.sum_tile = sum_tile<T>;
}

}  // namespace

void add_gradient_parts(TileKernels<float>& f, TileKernels<double>& d) {
  add_gradients(f);
  add_gradients(d);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_gradient_parts)
}  // namespace heed::kernels
#endif
