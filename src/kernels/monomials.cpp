#include "kernels/monomials.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/monomials.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>

#include "kernels/by_isa.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kWidest = 256;

// One row in T, with whole vectors readable behind it.
template <class T>
struct WideRow {
  HWY_ALIGN T x[kWidest + hn::MaxLanes(Full<T>())];
  void load(const Rows& rows, int64_t r) {
    with_element_type<T>(rows.dtype, [&](auto from) {
      using From = decltype(from);
      load_row<From, T>(static_cast<const From*>(rows.data) + r * rows.stride, rows.width, x);
    });
    std::fill(x + rows.width, x + rows.width + lanes<T>(), T{0});
  }
  HWY_INLINE T prefix(const MonomialRun& run) const {
    return (run.a < 0 ? T{1} : x[run.a]) * (run.b < 0 ? T{1} : x[run.b]);
  }
};

// prefix x, with coefficients, for one run. Vectors may reach behind it where more of the row follows.
template <class T>
HWY_INLINE void map_run(const T* x, int64_t count, T prefix, const T* coefficients, int64_t room,
                        T* to) {
  const Full<T> d;
  const auto p = hn::Set(d, prefix);
  for (int64_t i = 0; i < count; i += lanes<T>()) {
    auto y = hn::Mul(p, hn::LoadU(d, x + i));
    if (room - i >= lanes<T>()) {
      if (coefficients != nullptr) y = hn::Mul(y, hn::LoadU(d, coefficients + i));
      hn::StoreU(y, d, to + i);
      continue;
    }
    for (int64_t j = i; j < count; ++j) {
      to[j] = prefix * x[j] * (coefficients == nullptr ? T{1} : coefficients[j]);
    }
  }
}

template <class T>
void map(const MonomialList& list, const Rows& x, const T* coefficients, int64_t first,
         int64_t count, Block<T> to) {
  WideRow<T> row;
  for (int64_t r = 0; r < x.count; ++r) {
    row.load(x, r);
    T* out = to.row(r);
    for (const MonomialRun* run = list.begin(first);
         run != list.end() && run->first < first + count; ++run) {
      const int64_t at = run->first - first;
      const T* factor = coefficients == nullptr ? nullptr : coefficients + run->first;
      if (run->begin < 0) {
        out[at] = factor == nullptr ? T{1} : *factor;
      } else {
        map_run<T>(row.x + run->begin, run->count, row.prefix(*run), factor, count - at, out + at);
      }
    }
    std::fill(out + count, out + to.stride, T{0});
  }
}

template <class T>
void pull(const MonomialList& list, const Rows& x, const T* coefficients, int64_t first,
          int64_t count, Block<const T> gradient, Block<T> into) {
  const Full<T> d;
  WideRow<T> row;
  HWY_ALIGN T sum[kWidest + hn::MaxLanes(d)];
  for (int64_t r = 0; r < x.count; ++r) {
    row.load(x, r);
    std::fill(sum, sum + x.width + lanes<T>(), T{0});
    for (const MonomialRun* run = list.begin(first);
         run != list.end() && run->first < first + count; ++run) {
      if (run->begin < 0) continue;
      const T* g = gradient.row(r) + (run->first - first);
      const auto prefix = hn::Set(d, row.prefix(*run));
      auto dot = hn::Zero(d);
      for_each_vector<T>(run->count, [&](int64_t i, auto all) HWY_ATTR {
        auto y = load_some<T>(all, g + i);
        if (coefficients != nullptr)
          y = hn::Mul(y, load_some<T>(all, coefficients + run->first + i));
        dot = hn::MulAdd(y, hn::LoadU(d, row.x + run->begin + i), dot);
        T* s = sum + run->begin + i;
        hn::StoreU(hn::MulAdd(prefix, y, hn::LoadU(d, s)), d, s);
      });
      if (run->a < 0) continue;
      const T others = hn::GetLane(hn::SumOfLanes(d, dot));
      sum[run->a] += others * (run->b < 0 ? T{1} : row.x[run->b]);
      if (run->b >= 0) sum[run->b] += others * row.x[run->a];
    }
    for (int64_t i = 0; i < x.width; ++i) into.row(r)[i] += sum[i];
  }
}

}  // namespace

void add_monomials(MonomialKernels<float>& f, MonomialKernels<double>& d) {
  f = {map<float>, pull<float>};
  d = {map<double>, pull<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(MonomialKernels, monomial_kernels, add_monomials)

MonomialList::MonomialList(int64_t width, int order, int64_t tile) : width_(width) {
  add(tile, -1, -1, -1, 1);
  const auto n = static_cast<int32_t>(width);
  if (order >= 1) add(tile, -1, -1, 0, n);
  for (int32_t a = 0; order >= 2 && a < n; ++a) add(tile, a, -1, a, n - a);
  for (int32_t a = 0; order >= 3 && a < n; ++a) {
    for (int32_t b = a; b < n; ++b) add(tile, a, b, b, n - b);
  }
}

void MonomialList::add(int64_t tile, int32_t a, int32_t b, int32_t begin, int64_t count) {
  while (count > 0) {
    const int64_t room = tile - size_ % tile, take = std::min(room, count);
    runs_.push_back({size_, a, b, begin, static_cast<int32_t>(take)});
    size_ += take;
    count -= take;
    begin += static_cast<int32_t>(take);
  }
}

const MonomialRun* MonomialList::begin(int64_t first) const {
  const auto found =
      std::lower_bound(runs_.begin(), runs_.end(), first,
                       [](const MonomialRun& run, int64_t i) { return run.first < i; });
  return runs_.data() + (found - runs_.begin());
}

std::vector<MonomialList::Factors> MonomialList::factors() const {
  std::vector<Factors> all;
  all.reserve(static_cast<size_t>(size_));
  for (const MonomialRun& run : runs_) {
    for (int32_t i = 0; i < run.count; ++i) {
      Factors f;
      for (int32_t element : {run.a, run.b, run.begin < 0 ? -1 : run.begin + i}) {
        if (element >= 0) f.element[f.degree++] = element;
      }
      all.push_back(f);
    }
  }
  return all;
}

std::vector<double> MonomialList::coefficients(double factor) const {
  std::vector<double> all;
  all.reserve(static_cast<size_t>(size_));
  for (const Factors& f : factors()) {
    const bool first = f.degree > 1 && f.element[0] == f.element[1];
    const bool second = f.degree > 2 && f.element[1] == f.element[2];
    double c = first && second ? 1.0 / 6 : first || second ? 0.5 : 1;
    for (int n = 0; n < f.degree; ++n) c *= factor;
    all.push_back(c);
  }
  return all;
}

}  // namespace heed::kernels
#endif
