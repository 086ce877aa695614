// From scores to weights, row by row: the running softmax (arXiv 2307.08691, Algorithm 1), the sigmoid
// (arXiv 2409.04431), Taylor polynomials of the exponential, and the second stream of Parallax.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weights.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/exp-inl.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
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

template <class T>
HWY_INLINE T lane_maximum(hn::Vec<Full<T>> v) {
  const Full<T> d;
#if HWY_TARGET == HWY_EMU128
  // MaxOfLanes of this target starts from the lowest finite number.
  HWY_ALIGN T buffer[hn::MaxLanes(d)];
  hn::Store(v, d, buffer);
  T most = buffer[0];
  for (const T x : buffer) most = HWY_MAX(most, x);
  return most;
#else
  return hn::GetLane(hn::MaxOfLanes(d, v));
#endif
}

// The largest shaped score, -inf if there is none. A NaN may be passed over: it reaches the row's sum.
template <class T, bool kAlibi>
HWY_INLINE T row_maximum(const ShapedRow<T, kAlibi>& row, KeyRange range) {
  const Full<T> d;
  const auto nothing = hn::Set(d, kMinusInfinity<T>);
  hn::Vec<Full<T>> most[kRowGroup] = {nothing, nothing, nothing, nothing};
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> x[kCount];
    if constexpr (kAlibi) row.load(m, x);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      // Without position terms shaping is monotone (scale >= 0), so it can wait until after the maximum.
      if constexpr (!kAlibi) x[j] = hn::LoadU(d, row.s + m + j * lanes<T>());
      most[j] = hn::Max(most[j], seen_or(seen, x[j], nothing));
    }
  });
  const T found = lane_maximum<T>(hn::Max(hn::Max(most[0], most[1]), hn::Max(most[2], most[3])));
  return kAlibi ? found : found * row.scale;
}

template <class T>
HWY_INLINE T sum_of(const hn::Vec<Full<T>> (&total)[kRowGroup]) {
  return hn::GetLane(
      hn::SumOfLanes(Full<T>(), hn::Add(hn::Add(total[0], total[1]), hn::Add(total[2], total[3]))));
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void softmax_row(const ShapedRow<T, kAlibi>& row, KeyRange range, T most, T& pivot,
                            T& sum, T& carry, typename Weights::Element* out) {
  constexpr T kNothing = kMinusInfinity<T>;
  const Full<T> d;
  const T before = pivot;
  if (most > before) pivot = most;
  carry = before == kNothing ? T{1} : before == pivot ? T{1} : std::exp2(before - pivot);
  ShapedRow<T, kAlibi> shifted = row;
  shifted.bias -= pivot == kNothing ? T{0} : pivot;

  const auto zero = hn::Zero(d);
  hn::Vec<Full<T>> total[kRowGroup] = {zero, zero, zero, zero};
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> p[kCount];
    shifted.load(m, p);
    exp2<Weights::kSoftmax>(d, p);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      p[j] = seen_or_zero(seen, p[j]);
      total[j] = hn::Add(total[j], p[j]);
      Weights::store(p[j], out + m + j * lanes<T>());
    }
  });
  sum = sum * carry + sum_of<T>(total);
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
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> w[kCount];
    row.load(m, w);
    sigmoid<Weights::kSigmoid, T>(w);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      Weights::store(seen_or_zero(seen, w[j]), out + m + j * lanes<T>());
    }
  });
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void polynomial_row(const ShapedRow<T, kAlibi>& row, KeyRange range, int order, T& sum,
                               typename Weights::Element* out) {
  const Full<T> d;
  const auto zero = hn::Zero(d);
  hn::Vec<Full<T>> total[kRowGroup] = {zero, zero, zero, zero};
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
    constexpr int kCount = decltype(count)::value;
    hn::Vec<Full<T>> t[kCount], p[kCount];
    row.load(m, t);
    taylor<T>(t, order, p);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = m + j * lanes<T>();
      p[j] = seen_or_zero(seen, hn::IfThenZeroElse(masked<T>(row.s + at), p[j]));
      total[j] = hn::Add(total[j], p[j]);
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
  // Maxima of several rows first: the weights of a row wait for its maximum, other maxima do not.
  constexpr int64_t kMaxima = 8;
  T most[kMaxima];
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    auto* out = weights + r * stride;
    if (kKind == WeightKind::softmax && r % kMaxima == 0) {
      for (int64_t i = r; i < HWY_MIN(rows, r + kMaxima); ++i) {
        const KeyRange seen = range_of(ranges, i, key_count);
        if (seen.empty()) continue;
        most[i - r] = row_maximum<T, kAlibi>(ShapedRow<T, kAlibi>(s, i, shape), seen);
      }
    }
    if constexpr (kKind != WeightKind::sigmoid) state.carry[r] = 1;
    if (!range.empty()) {
      const ShapedRow<T, kAlibi> row(s, r, shape);
      if constexpr (kKind == WeightKind::softmax) {
        softmax_row<T, Weights, kAlibi>(row, range, most[r % kMaxima], state.pivot[r], state.sum[r],
                                        state.carry[r], out);
      } else if constexpr (kKind == WeightKind::sigmoid) {
        sigmoid_row<T, Weights, kAlibi>(row, range, out);
      } else {
        polynomial_row<T, Weights, kAlibi>(row, range, shape.order, state.sum[r], out);
      }
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
  hn::Vec<Full<T>> sum[kRowGroup] = {zero, zero, zero, zero}, total[kRowGroup];
  for (auto& x : total) x = zero;
  if (range.empty()) return unset;
  for_visible<T>(range, [&](int64_t m, auto count, auto seen) HWY_ATTR {
#pragma GCC unroll 4
    for (int j = 0; j < decltype(count)::value; ++j) {
      const int64_t at = m + j * lanes<T>();
      const auto p = seen_or_zero(seen, Weights::load(weights + at));
      const auto x = hn::Mul(p, hn::LoadU(Full<T>(), t + at));
      sum[j] = hn::Add(sum[j], hn::IfThenZeroElse(hn::Eq(p, zero), x));
      total[j] = hn::Add(total[j], p);
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
    hn::Vec<Full<T>> total[kRowGroup] = {zero, zero, zero, zero};
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
          total[j] = hn::Add(total[j], product);
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
