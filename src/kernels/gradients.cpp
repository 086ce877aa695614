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
namespace hn = hwy::HWY_NAMESPACE;

// Weight W and gradient of the shaped score t, which the caller zeroes where a mask set the score to
// -inf. Softmax: t is relative to the pivot.
template <class T, WeightKind kKind>
struct Gradient {
  using V = hn::Vec<Full<T>>;
  int order = 0;
  T shift = 0;

  HWY_INLINE V apply(V t, V dp, V& w) const {
    const Full<T> d;
    if constexpr (kKind == WeightKind::softmax) {
      w = exp2_any(d, t);
      return hn::Mul(w, hn::Add(dp, hn::Set(d, shift)));
    } else if constexpr (kKind == WeightKind::sigmoid) {
      // 1 - W as 2^-t W, which does not cancel.
      const V one = hn::Set(d, T{1}), u = exp2(d, hn::Neg(at_least(d, kLowest, t)));
      const auto vanishes = hn::Lt(t, hn::Set(d, kLowest));
      const V weight = hn::IfThenZeroElse(vanishes, hn::Div(one, hn::Add(one, u)));
      w = weight;
      return hn::Mul(hn::Mul(weight, hn::Mul(u, weight)), dp);
    } else {
      w = taylor<T>(d, t, order);
      const V slope = order > 0 ? taylor<T>(d, t, order - 1) : hn::Zero(d);
      return hn::Mul(slope, hn::Add(dp, hn::Set(d, shift)));
    }
  }
  static constexpr T kLowest = sizeof(T) == 8 ? -1000 : -125;
};

// Calls body(m, mask) for every vector of the range, with the lanes that the row sees and no mask set
// to -inf.
template <class T, class Body>
HWY_INLINE void for_unmasked(const T* s, KeyRange range, Body&& body) {
  const Full<T> d;
  // Not Ne: Highway's is false for NaN on x86.
  const auto masked = [&](int64_t m) HWY_ATTR {
    return hn::Eq(hn::LoadU(d, s + m), hn::Set(d, kMinusInfinity<T>));
  };
  for_visible<T>(
      range, [&](int64_t m, auto) HWY_ATTR { body(m, hn::Not(masked(m))); },
      [&](int64_t m, hn::Mask<Full<T>> seen) HWY_ATTR { body(m, hn::AndNot(masked(m), seen)); });
}

template <class T, WeightKind kKind, bool kAlibi>
HWY_INLINE void gradient_rows(Block<T> s, Block<T> dp, int64_t rows, int64_t key_count,
                              const KeyRange* ranges, const WeightShape<T>& shape, const T* pivot,
                              const T* shift) {
  const Full<T> d;
  const int64_t columns = round_up(key_count, lanes<T>());
  for (int64_t r = 0; r < rows; ++r) {
    KeyRange range = range_of(ranges, r, key_count);
    ShapedRow<T, kAlibi> row(s, r, shape);
    Gradient<T, kKind> gradient{shape.order, 0};
    if constexpr (kKind == WeightKind::softmax) {
      if (std::isinf(pivot[r])) range = {};
      row.bias -= pivot[r];
    }
    if constexpr (kKind != WeightKind::sigmoid) gradient.shift = shift[r];
    T *weights = s.row(r), *ds = dp.row(r);
    if (!range.empty()) {
      for_unmasked<T>(weights, range, [&](int64_t m, auto seen) HWY_ATTR {
        hn::Vec<Full<T>> w;
        const auto g = gradient.apply(row.at(m), hn::LoadU(d, ds + m), w);
        hn::StoreU(hn::IfThenElseZero(seen, w), d, weights + m);
        hn::StoreU(hn::IfThenElseZero(seen, g), d, ds + m);
      });
    }
    clear_outside<T>(weights, range, columns);
    clear_outside<T>(ds, range, columns);
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

template <class T, bool kAlibi>
HWY_INLINE void parallax_rows(Block<T> s, Block<T> t, Block<T> a, int64_t rows, int64_t key_count,
                              const KeyRange* ranges, const WeightShape<T>& shape, const T* pivot,
                              const T* t_mean, const T* dot_out, const T* dot_mean) {
  const Full<T> d;
  const auto one = hn::Set(d, T{1});
  const int64_t columns = round_up(key_count, lanes<T>());
  for (int64_t r = 0; r < rows; ++r) {
    KeyRange range = range_of(ranges, r, key_count);
    if (std::isinf(pivot[r])) range = {};
    T *scores = s.row(r), *probes = t.row(r), *dots = a.row(r);
    if (!range.empty()) {
      ShapedRow<T, kAlibi> row(s, r, shape);
      row.bias -= pivot[r];
      const auto mean = hn::Set(d, t_mean[r]), out = hn::Set(d, dot_out[r]),
                 value_mean = hn::Set(d, dot_mean[r]);
      for_unmasked<T>(scores, range, [&](int64_t m, auto seen) HWY_ATTR {
        const auto p = exp2_any(d, row.at(m)), dot = hn::LoadU(d, dots + m);
        const auto lag = hn::Sub(mean, hn::LoadU(d, probes + m)), above = hn::Sub(dot, value_mean);
        const auto ds = hn::Mul(p, hn::MulAdd(lag, above, hn::Sub(dot, out)));
        hn::StoreU(hn::IfThenElseZero(seen, hn::Mul(p, hn::Add(one, lag))), d, scores + m);
        hn::StoreU(hn::IfThenElseZero(seen, ds), d, dots + m);
        hn::StoreU(hn::IfThenElseZero(seen, hn::Neg(hn::Mul(p, above))), d, probes + m);
      });
    }
    for (T* out : {scores, probes, dots}) clear_outside<T>(out, range, columns);
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
void add_gradients(TileKernels<T>& k) {
  k.gradients[0] = gradients<T, WeightKind::softmax>;
  k.gradients[1] = gradients<T, WeightKind::sigmoid>;
  k.gradients[2] = gradients<T, WeightKind::polynomial>;
  k.parallax_gradients = parallax_gradients<T>;
}

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
