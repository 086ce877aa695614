// From scores to weights, row by row: the running softmax (arXiv 2307.08691, Algorithm 1), the sigmoid
// (arXiv 2409.04431), Taylor polynomials of the exponential, and the second stream of Parallax.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weights.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/exp-inl.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/transpose-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// One row of weights in the type that the second product reads.
template <class T>
struct WideWeights {
  using Element = T;
  static constexpr Exactness kSoftmax = Exactness::full, kSigmoid = Exactness::full;
  static HWY_INLINE hn::Vec<Full<T>> load(const T* from) { return hn::LoadU(Full<T>(), from); }
  static HWY_INLINE void store(hn::Vec<Full<T>> p, T* to) { hn::StoreU(p, Full<T>(), to); }
};

struct HalfWeights {
  using Element = uint16_t;
  static constexpr Exactness kSoftmax = Exactness::half, kSigmoid = Exactness::coarse;
  static HWY_INLINE hn::Vec<Full<float>> load(const uint16_t* from) {
    return Load<float, bfloat16>::full(Full<float>(), reinterpret_cast<const bfloat16*>(from));
  }
  static HWY_INLINE void store(hn::Vec<Full<float>> p, uint16_t* to) {
    hn::StoreU(half_operands(p), hn::Rebind<uint16_t, Full<float>>(), to);
  }
};

// Keys that rows of weights are padded to: half operands come in pairs of up to 32 keys.
template <class T, class Weights>
inline constexpr int64_t kWeightMultiple =
    std::is_same_v<Weights, HalfWeights> ? kHalfDepth : lanes<T>();

// Sums and maxima of rows are kept in two vectors: more would take registers from the exponentials.
template <class T>
using Pair = hn::Vec<Full<T>>[2];

template <class T>
HWY_INLINE T sum_of(const Pair<T>& total) {
  return hn::GetLane(hn::SumOfLanes(Full<T>(), hn::Add(total[0], total[1])));
}

// The largest shaped score of a row of whole vectors, lane by lane; -inf if there is none. A NaN may be
// passed over: it reaches the row's sum. Without position terms shaping is monotone (scale >= 0), so it
// can wait until after the maximum.
template <class T, bool kAlibi, int N>
HWY_INLINE void add_maximum(const ShapedRow<T, kAlibi>& row, int64_t m,
                            std::integral_constant<int, N> /*vectors*/, Pair<T>& most) {
  hn::Vec<Full<T>> x[N];
  if constexpr (kAlibi) row.load(m, x);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    if constexpr (!kAlibi) x[j] = hn::LoadU(Full<T>(), row.s + m + j * lanes<T>());
    most[j % 2] = hn::Max(most[j % 2], x[j]);
  }
}

template <class T, bool kAlibi>
HWY_INLINE void row_maximum(const ShapedRow<T, kAlibi>& row, KeyRange range, T* maximum) {
  const auto nothing = hn::Set(Full<T>(), kMinusInfinity<T>);
  Pair<T> most = {nothing, nothing};
  for_whole_vectors<T, kRowGroup>(range.begin, range.end, [&](int64_t m, auto count) HWY_ATTR {
    add_maximum(row, m, count, most);
  });
  hn::StoreU(hn::Max(most[0], most[1]), Full<T>(), maximum);
}

// Writes the exponentials of a row and their sum lane by lane, and looks for the maximum of another row:
// it needs few of the units that exponentials keep busy.
template <class T, class Weights, bool kAlibi>
HWY_INLINE void softmax_row(const ShapedRow<T, kAlibi>& row, KeyRange range,
                            typename Weights::Element* out, T* sum,
                            const ShapedRow<T, kAlibi>& other, KeyRange other_range, T* maximum) {
  const Full<T> d;
  const auto nothing = hn::Set(d, kMinusInfinity<T>);
  Pair<T> total = {hn::Zero(d), hn::Zero(d)}, most = {nothing, nothing};
  const auto weigh = [&](int64_t m, auto count) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> p[kCount];
    row.load(m, p);
    exp2<Weights::kSoftmax>(d, p);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      total[j % 2] = hn::Add(total[j % 2], p[j]);
      Weights::store(p[j], out + m + j * lanes<T>());
    }
  };
  const auto look = [&](int64_t m, auto count) HWY_ATTR { add_maximum(other, m, count, most); };
  const std::integral_constant<int, kRowGroup> group;
  constexpr int64_t kStep = kRowGroup * lanes<T>();
  int64_t m = range.begin, ahead = other_range.begin;
  for (; m + kStep <= range.end && ahead + kStep <= other_range.end; m += kStep, ahead += kStep) {
    look(ahead, group);
    weigh(m, group);
  }
  for_whole_vectors<T, kRowGroup>(ahead, other_range.end, look);
  for_whole_vectors<T, kRowGroup>(m, range.end, weigh);
  hn::StoreU(hn::Max(most[0], most[1]), d, maximum);
  hn::StoreU(hn::Add(total[0], total[1]), d, sum);
}

// Statistics of as many rows as a vector has lanes, in its lanes.
template <class T>
struct RowVectors {
  static constexpr int64_t kRows = lanes<T>();
  HWY_ALIGN T maxima[kRows * kRows] = {};  // lane by lane, row by row
  HWY_ALIGN T sums[kRows * kRows] = {};
  HWY_ALIGN T bias[kRows];
};

// New pivots and carries of `count` rows from the maxima; what their scores are shifted by to `bias`.
template <class T>
HWY_INLINE void move_pivots(RowVectors<T>& rows, T scale, T bias, int64_t count, T* pivots,
                            T* carries) {
  const Full<T> d;
  const auto nothing = hn::Set(d, kMinusInfinity<T>);
  const auto max = [](auto a, auto b) HWY_ATTR { return hn::Max(a, b); };
  const auto most = hn::Mul(reduce_rows<T>(rows.maxima, max), hn::Set(d, scale));
  const auto before = load_elements<T>(pivots, count);
  const auto pivot = hn::IfThenElse(hn::Gt(most, before), most, before);
  hn::Vec<Full<T>> carry[1] = {hn::Sub(before, pivot)};
  exp2<Exactness::full>(d, carry);
  const auto stays = hn::Or(hn::Eq(before, pivot), hn::Eq(before, nothing));
  store_elements<T>(pivot, pivots, count);
  store_elements<T>(hn::IfThenElse(stays, hn::Set(d, T{1}), carry[0]), carries, count);
  const auto shift = hn::IfThenZeroElse(hn::Eq(pivot, nothing), pivot);
  hn::Store(hn::Sub(hn::Set(d, bias), shift), d, rows.bias);
}

template <class T, class Weights, bool kAlibi>
void softmax_rows(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                  const WeightShape<T>& shape, const RowState<T>& state,
                  typename Weights::Element* weights, int64_t stride) {
  using Row = ShapedRow<T, kAlibi>;
  constexpr int64_t kRows = lanes<T>();
  const auto vectors = [&](int64_t r) {
    return r < rows ? whole_vectors<T>(range_of(ranges, r, key_count)) : KeyRange();
  };
  RowVectors<T> x;
  for (int64_t r = 0; r < HWY_MIN(rows, kRows); ++r) {
    row_maximum(Row(s, r, shape), vectors(r), x.maxima + r * kRows);
  }
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = HWY_MIN(rows - first, kRows);
    move_pivots(x, kAlibi ? T{1} : shape.scale, shape.bias, count, state.pivot + first,
                state.carry + first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + i, later = r + kRows;
      Row row(s, r, shape);
      row.bias = x.bias[i];
      row = settled(row, vectors(r), kLargePivot<T>, T{0}, s.row(r));
      softmax_row<T, Weights>(row, vectors(r), weights + r * stride, x.sums + i * kRows,
                              Row(s, later, shape), vectors(later), x.maxima + i * kRows);
    }
    const auto add = [](auto a, auto b) HWY_ATTR { return hn::Add(a, b); };
    const auto sum =
        hn::MulAdd(load_elements<T>(state.sum + first, count),
                   load_elements<T>(state.carry + first, count), reduce_rows<T>(x.sums, add));
    store_elements<T>(sum, state.sum + first, count);
  }
}

// 1 / (1 + 2^-t) in place, 0 from about 2^-126 (double: 2^-1022) on: with t = whole + fraction
// 2^whole / (2^whole + 2^-fraction), which neither overflows nor needs a test for what vanishes.
template <Exactness kExactness, class T, int N>
HWY_INLINE void sigmoid(hn::Vec<Full<T>> (&t)[N]) {
  const Full<T> d;
  hn::Vec<Full<T>> power[N], p[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    t[j] = at_most(d, sizeof(T) == 8 ? 1020 : 125, at_least(d, kLeastExponent<T>, t[j]));
  }
  split_power<true>(d, t, power);
  exp2_fraction<kExactness>(d, t, p);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const auto sum = hn::Add(power[j], p[j]);
    if constexpr (kExactness == Exactness::coarse) {
      t[j] = hn::Mul(power[j], hn::ApproximateReciprocal(sum));  // to 12 bits or more
    } else {
      t[j] = hn::Div(power[j], sum);
    }
  }
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void sigmoid_row(const ShapedRow<T, kAlibi>& row, KeyRange range,
                            typename Weights::Element* out) {
  // Inlined, constants stay in registers.
  const auto weigh = [&](int64_t m, auto count) HWY_ATTR __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> w[kCount];
    row.load(m, w);
    sigmoid<Weights::kSigmoid, T>(w);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) Weights::store(w[j], out + m + j * lanes<T>());
  };
  for_whole_vectors<T, kRowGroup>(range.begin, range.end, weigh);
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void polynomial_row(const ShapedRow<T, kAlibi>& row, KeyRange range, int order, T& sum,
                               typename Weights::Element* out) {
  const Full<T> d;
  const auto zero = hn::Zero(d);
  Pair<T> total = {zero, zero};
  for_whole_vectors<T, kRowGroup>(range.begin, range.end, [&](int64_t m, auto count) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> t[kCount], p[kCount];
    row.load(m, t);
    taylor<T>(t, order, p);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = m + j * lanes<T>();
      p[j] = hn::IfThenZeroElse(masked<T>(row.s + at), p[j]);
      total[j % 2] = hn::Add(total[j % 2], p[j]);
      Weights::store(p[j], out + at);
    }
  });
  sum += sum_of<T>(total);
}

template <class T, class Weights, WeightKind kKind, bool kAlibi>
void weight_rows(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                 const WeightShape<T>& shape, const RowState<T>& state,
                 typename Weights::Element* weights, int64_t stride) {
  const int64_t columns = round_up(key_count, kWeightMultiple<T, Weights>);
  const bool whole = ranges == nullptr && key_count == columns;
  for (int64_t r = 0; r < rows && !whole; ++r) {
    hide_edges(s.row(r), range_of(ranges, r, key_count));
  }
  if constexpr (kKind == WeightKind::softmax) {
    softmax_rows<T, Weights, kAlibi>(s, rows, key_count, ranges, shape, state, weights, stride);
    if (whole) return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = whole_vectors<T>(range_of(ranges, r, key_count));
    auto* out = weights + r * stride;
    if constexpr (kKind == WeightKind::polynomial) state.carry[r] = 1;
    const ShapedRow<T, kAlibi> row(s, r, shape);
    if constexpr (kKind == WeightKind::sigmoid) {
      sigmoid_row<T, Weights, kAlibi>(row, range, out);
    } else if constexpr (kKind == WeightKind::polynomial) {
      polynomial_row<T, Weights, kAlibi>(row, range, shape.order, state.sum[r], out);
    }
    clear_outside<T>(out, range, columns);
  }
}

template <class T, class Weights, WeightKind kKind>
void weight_tile(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                 const WeightShape<T>& given, const RowState<T>& state, void* weights,
                 int64_t stride) {
  auto* out = static_cast<typename Weights::Element*>(weights);
  const WeightShape<T> shape = without_zero_scale(s, rows, key_count, ranges, given);
  if (shape.slope != 0) {
    weight_rows<T, Weights, kKind, true>(s, rows, key_count, ranges, shape, state, out, stride);
  } else {
    weight_rows<T, Weights, kKind, false>(s, rows, key_count, ranges, shape, state, out, stride);
  }
}

// The mean of t under the weights of a row, 0 if it is not finite; `unset` where there is no weight.
template <class T, class Weights>
T mean_of(const typename Weights::Element* weights, const T* t, KeyRange range, T unset) {
  const auto zero = hn::Zero(Full<T>());
  Pair<T> sum = {zero, zero}, total = {zero, zero};
  if (range.empty()) return unset;
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
#pragma GCC unroll 4
    for (int j = 0; j < decltype(count)::value; ++j) {
      const int64_t at = m + j * lanes<T>();
      const auto p = seen_or_zero(seen, Weights::load(weights + at));
      const auto x = hn::Mul(p, hn::LoadU(Full<T>(), t + at));
      sum[j % 2] = hn::Add(sum[j % 2], hn::IfThenZeroElse(hn::Eq(p, zero), x));
      total[j % 2] = hn::Add(total[j % 2], p);
    }
  });
  const T weight = sum_of<T>(total), mean = sum_of<T>(sum) / weight;
  return weight == 0 ? unset : std::isfinite(mean) ? mean : T{0};
}

template <class T, class Weights>
void second_weights(const void* weights, int64_t stride, Block<T> t, int64_t rows,
                    int64_t key_count, const KeyRange* ranges, const T* carry, T* shift, T* sum,
                    void* second) {
  using Element = typename Weights::Element;
  const Full<T> d;
  const int64_t columns = round_up(key_count, kWeightMultiple<T, Weights>);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    const Element* w = static_cast<const Element*>(weights) + r * stride;
    Element* out = static_cast<Element*>(second) + r * stride;
    const T* factor = t.row(r);
    if (shift[r] == kMinusInfinity<T>) {
      shift[r] = mean_of<T, Weights>(w, factor, range, kMinusInfinity<T>);
    }
    const auto offset = hn::Set(d, shift[r] == kMinusInfinity<T> ? T{0} : shift[r]);
    const auto zero = hn::Zero(d);
    Pair<T> total = {zero, zero};
    if (!range.empty()) {
      for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
        constexpr int kCount = decltype(count)::value;
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
          const int64_t at = m + j * lanes<T>();
          const auto p = Weights::load(w + at);
          const auto x = hn::Mul(p, hn::Sub(hn::LoadU(d, factor + at), offset));
          // A masked key has weight 0, whatever it makes of t.
          const auto product = seen_or_zero(seen, hn::IfThenZeroElse(hn::Eq(p, zero), x));
          total[j % 2] = hn::Add(total[j % 2], product);
          Weights::store(product, out + at);
        }
      });
    }
    clear_outside<T>(out, range, columns);
    sum[r] = carry[r] * sum[r] + sum_of<T>(total);
  }
}

template <class T, class Weights>
void add_weights(TileKernels<T>& k) {
  k.weights[0] = weight_tile<T, Weights, WeightKind::softmax>;
  k.weights[1] = weight_tile<T, Weights, WeightKind::sigmoid>;
  k.weights[2] = weight_tile<T, Weights, WeightKind::polynomial>;
  k.second_weights = second_weights<T, Weights>;
}

}  // namespace

void add_weight_parts(TileKernels<float>& f, TileKernels<double>& d) {
  add_weights<float, WideWeights<float>>(f);
  add_weights<double, WideWeights<double>>(d);
}

void add_half_weight_parts(TileKernels<float>& f) { add_weights<float, HalfWeights>(f); }

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_weight_parts)
HEED_SELECT_HALF_PART(add_half_weight_parts)
}  // namespace heed::kernels
#endif
