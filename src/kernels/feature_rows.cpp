#include "kernels/feature_rows.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/feature_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/by_isa.h"
#include "kernels/element_maps-inl.h"
#include "kernels/functions-inl.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

bool is_hedgehog(FeatureKind kind) {
  return kind == FeatureKind::hedgehog_exp || kind == FeatureKind::hedgehog_softmax ||
         kind == FeatureKind::hedgehog_exp_max || kind == FeatureKind::hedgehog_joint;
}

// to[i] = f(from[i])
template <class T, class F>
HWY_INLINE void map_row(const T* from, int64_t n, T* to, F&& f) {
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    store_some<T>(all, f(load_some<T>(all, from + i)), to + i);
  });
}

// Numbers of the two halves of a row, whose exponents are z and -z.
template <class T>
struct Halves {
  T first = 0, second = 0;
};

// max z and max -z; NaN if an element is.
template <class T>
HWY_INLINE Halves<T> largest(const T* z, int64_t n) {
  const Full<T> d;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  auto most = hn::Set(d, -kInfinity), least = hn::Set(d, kInfinity), bad = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto x = load_some<T>(all, z + i);
    bad = hn::IfThenElse(hn::IsNaN(x), x, bad);
    most = hn::Max(most, covered_or<T>(all, x, -kInfinity));
    least = hn::Min(least, covered_or<T>(all, x, kInfinity));
  });
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  if (!hn::AllFalse(d, hn::IsNaN(bad))) return {kNan, kNan};
  return {hn::GetLane(hn::MaxOfLanes(d, most)), -hn::GetLane(hn::MinOfLanes(d, least))};
}

// exp(slope z - shift) and, behind them, exp(-slope z - shift), each with its own shift; returns sums.
template <class T>
HWY_INLINE Halves<T> exponentials(const T* z, int64_t n, T slope, Halves<T> shift, T* e) {
  const Full<T> d;
  const auto s = hn::Set(d, slope), m = hn::Set(d, shift.first), k = hn::Set(d, shift.second);
  auto first = hn::Zero(d), second = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto x = load_some<T>(all, z + i);
    const auto up = exp_of<T>(hn::MulSub(s, x, m)), down = exp_of<T>(hn::NegMulSub(s, x, k));
    first = hn::Add(first, covered_or<T>(all, up, T{0}));
    second = hn::Add(second, covered_or<T>(all, down, T{0}));
    store_some<T>(all, up, e + i);
    store_some<T>(all, down, e + n + i);
  });
  return {hn::GetLane(hn::SumOfLanes(d, first)), hn::GetLane(hn::SumOfLanes(d, second))};
}

// max(x * factor, floor), NaN stays NaN.
template <class T>
HWY_INLINE void scale_to_floor(T* x, int64_t n, T factor, T floor) {
  const Full<T> d;
  const auto f = hn::Set(d, factor);
  map_row<T>(x, n, x, [&](V<T> v) HWY_ATTR { return at_least(d, floor, hn::Mul(v, f)); });
}

template <class T>
HWY_INLINE T exponent_slope(FeatureKind kind) {
  return kind == FeatureKind::hedgehog_joint ? 2 : 1;
}

// What is subtracted from the exponents slope z and -slope z.
template <class T>
HWY_INLINE Halves<T> shifts(FeatureKind kind, const T* z, int64_t n) {
  if (kind == FeatureKind::hedgehog_exp) return {};
  const Halves<T> most = largest(z, n);
  if (kind != FeatureKind::hedgehog_joint) return most;
  const T both = 2 * std::max(most.first, most.second);
  return {both, both};
}

// Factors that normalise exponentials with these sums.
template <class T>
HWY_INLINE Halves<T> normalisers(FeatureKind kind, Halves<T> sums) {
  if (kind == FeatureKind::hedgehog_joint) sums.first = sums.second = sums.first + sums.second;
  if (kind == FeatureKind::hedgehog_exp || kind == FeatureKind::hedgehog_exp_max) return {1, 1};
  return {1 / sums.first, 1 / sums.second};
}

// Calls body(first row, rows) for steps of rows that are made together: the parts of one row wait for each
// other.
inline constexpr int64_t kTogether = 8;
template <class Body>
HWY_INLINE void for_rows_together(int64_t rows, Body&& body) {
  for (int64_t begin = 0; begin < rows; begin += kTogether) {
    body(begin, HWY_MIN(kTogether, rows - begin));
  }
}

// The exponentials of `count` rows, to e; returns what normalises each.
template <class T>
HWY_INLINE void exponentials_of_rows(const FeatureRows<T>& in, int64_t begin, int64_t count,
                                     Block<T> e, Halves<T>* factors) {
  const int64_t n = in.width;
  for (int64_t i = 0; i < count; ++i) factors[i] = shifts(in.kind, in.z.row(begin + i), n);
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = normalisers(
        in.kind,
        exponentials(in.z.row(begin + i), n, exponent_slope<T>(in.kind), factors[i], e.row(i)));
  }
}

template <class T>
void hedgehog_forward(const FeatureRows<T>& in, Block<T> phi) {
  const int64_t n = in.width;
  for_rows_together(in.rows, [&](int64_t begin, int64_t count) HWY_ATTR {
    Halves<T> factors[kTogether];
    exponentials_of_rows<T>(in, begin, count, {phi.row(begin), phi.stride}, factors);
    if (in.kind == FeatureKind::hedgehog_exp) return;
    for (int64_t i = 0; i < count; ++i) {
      T* row = phi.row(begin + i);
      scale_to_floor(row, n, factors[i].first, in.floor);
      scale_to_floor(row + n, n, factors[i].second, in.floor);
    }
  });
}

template <class T>
void taylor_forward(const FeatureRows<T>& in, const T* z, T* phi) {
  const Full<T> d;
  const int64_t n = in.width;
  const auto factor = hn::Set(d, in.factor);
  phi[0] = 1;
  T* y = phi + 1;
  map_row<T>(z, n, y, [&](V<T> v) HWY_ATTR { return hn::Mul(v, factor); });
  const T half = std::sqrt(T{0.5});
  for (int64_t i = 0; i < n; ++i) {
    const auto left = hn::Set(d, y[i] * half);
    map_row<T>(y, n, y + n + i * n, [&](V<T> v) HWY_ATTR { return hn::Mul(left, v); });
  }
}

template <class T>
void forward_row(const FeatureRows<T>& in, int64_t row, T* phi) {
  const Full<T> d;
  const T* z = in.z.row(row);
  if (in.kind == FeatureKind::taylor2) return taylor_forward(in, z, phi);
  const auto shift = hn::Set(d, in.shift[row]), factor = hn::Set(d, in.factor);
  map_row<T>(z, in.width, phi, [&](V<T> x) HWY_ATTR {  // performer
    return hn::Mul(factor, exp_of<T>(hn::Sub(x, shift)));
  });
}

// The gradients of features phi: 0 where they are not above the floor.
template <class T>
struct AboveFloor {
  V<T> floor;
  explicit AboveFloor(T least) : floor(hn::Set(Full<T>(), least)) {}
  template <class Part>
  HWY_INLINE V<T> load(Part all, V<T> phi, const T* dphi) const {
    return hn::IfThenZeroElse(hn::Le(phi, floor), load_some<T>(all, dphi));
  }
};

// Sums over half a row: of phi, and of phi dphi.
template <class T>
struct FeatureSums {
  T phi = 0, pulled = 0;
};

template <class T>
HWY_INLINE FeatureSums<T> feature_sums(const T* phi, int64_t n, T floor, const T* dphi) {
  const Full<T> d;
  const AboveFloor<T> above(floor);
  auto all_phi = hn::Zero(d), pulled = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto x = load_some<T>(all, phi + i);
    all_phi = hn::Add(all_phi, x);
    pulled = hn::MulAdd(x, above.load(all, x, dphi + i), pulled);
  });
  return {hn::GetLane(hn::SumOfLanes(d, all_phi)), hn::GetLane(hn::SumOfLanes(d, pulled))};
}

// dz = slope (phi (dphi - mean) of the first half - that of the second)
template <class T>
HWY_INLINE void pull_exponentials(const T* phi, int64_t n, T slope, T floor, Halves<T> means,
                                  const T* dphi, T* dz) {
  const Full<T> d;
  const AboveFloor<T> above(floor);
  const auto s = hn::Set(d, slope), c = hn::Set(d, means.first), k = hn::Set(d, means.second);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto up = load_some<T>(all, phi + i), down = load_some<T>(all, phi + n + i);
    const auto x = hn::Mul(up, hn::Sub(above.load(all, up, dphi + i), c));
    const auto y = hn::Sub(above.load(all, down, dphi + n + i), k);
    store_some<T>(all, hn::Mul(s, hn::NegMulAdd(down, y, x)), dz + i);
  });
}

template <class T>
void hedgehog_backward(const FeatureRows<T>& in, Block<const T> phi, Block<const T> dphi,
                       Block<T> dz) {
  const int64_t n = in.width;
  const bool exponential =
      in.kind == FeatureKind::hedgehog_exp || in.kind == FeatureKind::hedgehog_exp_max;
  const T slope = exponent_slope<T>(in.kind);
  const T floor =
      in.kind == FeatureKind::hedgehog_exp ? -std::numeric_limits<T>::infinity() : in.floor;
  for_rows_together(in.rows, [&](int64_t begin, int64_t count) HWY_ATTR {
    Halves<T> pulled[kTogether], means[kTogether];
    for (int64_t i = 0; i < count && in.kind != FeatureKind::hedgehog_exp; ++i) {
      const T *row = phi.row(begin + i), *g = dphi.row(begin + i);
      auto first = feature_sums(row, n, floor, g), second = feature_sums(row + n, n, floor, g + n);
      pulled[i] = {first.pulled, second.pulled};
      if (exponential) continue;
      if (in.kind == FeatureKind::hedgehog_joint) {
        first = second = {first.phi + second.phi, first.pulled + second.pulled};
      }
      // The sums of phi are 1, but for the rounding of features that were stored.
      means[i] = {first.pulled / first.phi, second.pulled / second.phi};
    }
    for (int64_t i = 0; i < count; ++i) {
      T* to = dz.row(begin + i);
      pull_exponentials(phi.row(begin + i), n, slope, floor, means[i], dphi.row(begin + i), to);
      if (in.kind == FeatureKind::hedgehog_exp_max && n > 0) {
        const T* z = in.z.row(begin + i);
        to[std::max_element(z, z + n) - z] -= pulled[i].first;
        to[std::min_element(z, z + n) - z] += pulled[i].second;
      }
    }
  });
}

template <class T>
void taylor_backward(const FeatureRows<T>& in, const T* y, const T* dphi, T* dz) {
  const Full<T> d;
  const int64_t n = in.width;
  const T half = std::sqrt(T{0.5});
  const auto factor = hn::Set(d, in.factor);
  std::copy_n(dphi + 1, n, dz);
  for (int64_t i = 0; i < n; ++i) {  // y_i y_j: its gradient goes to both
    const T* g = dphi + 1 + n + i * n;
    const auto left = hn::Set(d, y[i] * half);
    auto sum = hn::Zero(d);
    for_each_vector<T>(n, [&](int64_t j, auto all) HWY_ATTR {
      const auto x = load_some<T>(all, g + j);
      sum = hn::MulAdd(x, load_some<T>(all, y + j), sum);
      store_some<T>(all, hn::MulAdd(left, x, load_some<T>(all, dz + j)), dz + j);
    });
    dz[i] += half * hn::GetLane(hn::SumOfLanes(d, sum));
  }
  map_row<T>(dz, n, dz, [&](V<T> v) HWY_ATTR { return hn::Mul(v, factor); });
}

// dz = phi dphi; returns the sum.
template <class T>
T performer_backward(const T* phi, const T* dphi, int64_t n, T* dz) {
  auto sum = hn::Zero(Full<T>());
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto x = hn::Mul(load_some<T>(all, phi + i), load_some<T>(all, dphi + i));
    sum = hn::Add(sum, x);
    store_some<T>(all, x, dz + i);
  });
  return hn::GetLane(hn::SumOfLanes(Full<T>(), sum));
}

template <class T>
void forward(const FeatureRows<T>& in, Block<T> phi) {
  if (is_hedgehog(in.kind)) return hedgehog_forward(in, phi);
  if (element_by_element(in.kind)) {
    return with_element_map<T>(in.kind, [&](auto element_map) HWY_ATTR {
      map_elements<T>(element_map, in.z.data, in.z.stride, in.rows, in.width, phi.data, phi.stride);
    });
  }
  for (int64_t r = 0; r < in.rows; ++r) forward_row(in, r, phi.row(r));
}

template <class T>
void backward(const FeatureRows<T>& in, Block<const T> phi, Block<const T> dphi, Block<T> dz,
              T* row_sums) {
  if (is_hedgehog(in.kind)) return hedgehog_backward(in, phi, dphi, dz);
  for (int64_t r = 0; r < in.rows; ++r) {
    const T *f = phi.row(r), *g = dphi.row(r);
    if (element_by_element(in.kind)) {
      with_element_map<T>(in.kind, [&](auto element_map) HWY_ATTR {
        pull_elements<T>(element_map, f, g, in.width, dz.row(r));
      });
    } else if (in.kind == FeatureKind::performer) {
      row_sums[r] = performer_backward(f, g, in.width, dz.row(r));
    } else {
      taylor_backward(in, f + 1, g, dz.row(r));
    }
  }
}

}  // namespace

void fill_feature_kernels(FeatureKernels<float>& f, FeatureKernels<double>& d) {
  f = {forward<float>, backward<float>};
  d = {forward<double>, backward<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(FeatureKernels, feature_kernels, fill_feature_kernels)

}  // namespace heed::kernels
#endif
