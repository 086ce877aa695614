#include "kernels/cross_entropy_rows.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cross_entropy_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/by_isa.h"
#include "kernels/functions-inl.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// factor * s - pivot, rounded before the subtraction as the pivot was: of large scores one rounding would
// leave what exponents cannot hold. (A plain product would be joined with it again by the compiler.)
template <class V>
HWY_INLINE V relative(V factor, V s, V pivot) {
  return hn::Sub(hn::MulAdd(factor, s, hn::Zero(hn::DFromV<V>())), pivot);
}

template <class T>
void statistics(const T* s, const T* r, int64_t n, T scale, EntropyRow<T>& row) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  const Full<T> d;
  const auto factor = hn::Set(d, scale);
  auto most = hn::Set(d, row.maximum);
  auto total = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto t = hn::Mul(factor, load_some<T>(all, s + i));
    most = hn::Max(most, covered_or<T>(all, t, kNothing));
    total = hn::Add(total, load_some<T>(all, r + i));
  });
  const T maximum = hn::GetLane(hn::MaxOfLanes(d, most));
  // Where all scores are -inf the row has no weights; a NaN shows in the sum.
  const auto pivot = hn::Set(d, maximum == kNothing ? T{0} : maximum);
  auto sum = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto e = exp_of<T>(relative(factor, load_some<T>(all, s + i), pivot));
    sum = hn::Add(sum, covered_or<T>(all, e, T{0}));
  });
  const T carry = row.maximum == kNothing ? T{0} : std::exp(row.maximum - maximum);
  row.sum = row.sum * carry + hn::GetLane(hn::SumOfLanes(d, sum));
  row.maximum = maximum;
  row.total += hn::GetLane(hn::SumOfLanes(d, total));
}

template <class T>
T loss(const T* s, const T* r, int64_t n, T scale, T floor, EntropyFactors<T>& row) {
  const Full<T> d;
  const auto factor = hn::Set(d, scale), pivot = hn::Set(d, row.maximum);
  const auto inverse_sum = hn::Set(d, row.inverse_sum);
  const auto total = hn::Set(d, row.total), least = hn::Set(d, floor);
  auto entropy = hn::Zero(d), kept = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto e = exp_of<T>(relative(factor, load_some<T>(all, s + i), pivot));
    const auto p = covered_or<T>(all, hn::Mul(e, inverse_sum), T{0});
    const auto a = hn::Div(load_some<T>(all, r + i), total);  // exactly 1 where it is alone
    const auto below = hn::Lt(a, least);                      // false for NaN
    entropy = hn::MulAdd(p, log_of<T>(hn::IfThenElse(below, least, a)), entropy);
    kept = hn::Add(kept, hn::IfThenZeroElse(below, p));
  });
  row.active += hn::GetLane(hn::SumOfLanes(d, kept));
  return hn::GetLane(hn::SumOfLanes(d, entropy));
}

template <class T>
void gradient(const T* s, T* r, int64_t n, T scale, T floor, T weight,
              const EntropyFactors<T>& row) {
  const Full<T> d;
  const auto factor = hn::Set(d, scale), pivot = hn::Set(d, row.maximum);
  const auto inverse_sum = hn::Set(d, row.inverse_sum), total = hn::Set(d, row.total);
  const auto common = hn::Set(d, row.active / row.total);
  const auto least = hn::Set(d, floor), w = hn::Set(d, weight);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto e = exp_of<T>(relative(factor, load_some<T>(all, s + i), pivot));
    const auto p = hn::Mul(e, inverse_sum);
    const auto x = load_some<T>(all, r + i);
    const auto below = hn::Lt(hn::Div(x, total), least);
    const auto own = hn::IfThenZeroElse(below, hn::Div(p, x));
    store_some<T>(all, hn::Mul(w, hn::Sub(common, own)), r + i);
  });
}

}  // namespace

void fill_entropy_kernels(EntropyKernels<float>& f, EntropyKernels<double>& d) {
  f = {statistics<float>, loss<float>, gradient<float>};
  d = {statistics<double>, loss<double>, gradient<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(EntropyKernels, entropy_kernels, fill_entropy_kernels)

}  // namespace heed::kernels
#endif
