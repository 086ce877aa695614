// From scores to weights, row by row: the running softmax (arXiv 2307.08691, Algorithm 1) and the
// sigmoid (arXiv 2409.04431). Exponents are in units of log2.
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
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// One row of weights in the type that the second product reads.
template <class T>
struct WideWeights {
  using Element = T;
  static HWY_INLINE void store(hn::Vec<Full<T>> p, T* to) { hn::StoreU(p, Full<T>(), to); }
};

struct HalfWeights {
  using Element = uint16_t;
  static HWY_INLINE void store(hn::Vec<Full<float>> p, uint16_t* to) {
#if HWY_TARGET == HWY_AVX3
    // Only reached on processors with AVX512-BF16: they are the ones with products for half operands.
    __m256i rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(p.raw));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
#else
    store_bfloat16(Full<float>(), p, to);
#endif
  }
};

// The scores of one row, shaped: s * scale + bias - slope * |distance|.
template <class T, bool kAlibi>
struct ShapedRow {
  const T* s;
  T scale, bias, slope, distance;  // distance: from key 0 to the query

  HWY_INLINE hn::Vec<Full<T>> at(int64_t m) const {
    const Full<T> d;
    const auto t = hn::MulAdd(hn::LoadU(d, s + m), hn::Set(d, scale), hn::Set(d, bias));
    if constexpr (kAlibi) {
      const auto steps = hn::Abs(hn::Sub(hn::Set(d, distance), hn::Iota(d, static_cast<T>(m))));
      return hn::NegMulAdd(hn::Set(d, slope), steps, t);
    } else {
      return t;
    }
  }
};

template <class T>
HWY_INLINE hn::Mask<Full<T>> visible_lanes(int64_t m, KeyRange range) {
  const Full<T> d;
  const auto from = hn::FirstN(d, static_cast<size_t>(HWY_MAX(range.begin - m, int64_t{0})));
  const auto to = hn::FirstN(d, static_cast<size_t>(HWY_MIN(range.end - m, lanes<T>())));
  return hn::AndNot(from, to);
}

// Calls whole(m, parity) for vectors of columns inside the range and edge(m, mask) for those that
// straddle its ends. `parity` alternates, for two independent accumulators.
template <class T, class Whole, class Edge>
HWY_INLINE void for_visible(KeyRange range, Whole&& whole, Edge&& edge) {
  constexpr int64_t kLanes = lanes<T>();
  int64_t m = range.begin / kLanes * kLanes;
  if (m < range.begin) {
    edge(m, visible_lanes<T>(m, range));
    m += kLanes;
  }
  for (; m + 2 * kLanes <= range.end; m += 2 * kLanes) {
    whole(m, std::integral_constant<int, 0>());
    whole(m + kLanes, std::integral_constant<int, 1>());
  }
  if (m + kLanes <= range.end) {
    whole(m, std::integral_constant<int, 0>());
    m += kLanes;
  }
  if (m < range.end) edge(m, visible_lanes<T>(m, range));
}

template <class T, bool kAlibi>
HWY_INLINE T row_maximum(const ShapedRow<T, kAlibi>& row, KeyRange range) {
  const Full<T> d;
  const auto nothing = hn::Set(d, -std::numeric_limits<T>::infinity());
  hn::Vec<Full<T>> most[2] = {nothing, nothing};
  // Without position terms shaping is monotone (scale >= 0), so it can wait until after the maximum.
  const auto value = [&](int64_t m) HWY_ATTR {
    if constexpr (kAlibi) return row.at(m);
    return hn::LoadU(d, row.s + m);
  };
  for_visible<T>(
      range,
      [&](int64_t m, auto parity) HWY_ATTR { most[parity] = hn::Max(most[parity], value(m)); },
      [&](int64_t m, hn::Mask<Full<T>> seen)
          HWY_ATTR { most[0] = hn::Max(most[0], hn::IfThenElse(seen, value(m), nothing)); });
  const T found = hn::GetLane(hn::MaxOfLanes(d, hn::Max(most[0], most[1])));
  return kAlibi ? found : found * row.scale;
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void softmax_row(const ShapedRow<T, kAlibi>& row, KeyRange range, T& pivot, T& sum,
                            T& carry, typename Weights::Element* out) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  const Full<T> d;
  const T before = pivot, most = row_maximum<T, kAlibi>(row, range);
  if (most > before) pivot = most;
  carry = before == kNothing ? T{1} : before == pivot ? T{1} : std::exp2(before - pivot);
  ShapedRow<T, kAlibi> shifted = row;
  shifted.bias -= pivot == kNothing ? T{0} : pivot;

  hn::Vec<Full<T>> total[2] = {hn::Zero(d), hn::Zero(d)};
  for_visible<T>(
      range,
      [&](int64_t m, auto parity) HWY_ATTR {
        const auto p = exp2(d, shifted.at(m));
        total[parity] = hn::Add(total[parity], p);
        Weights::store(p, out + m);
      },
      [&](int64_t m, hn::Mask<Full<T>> seen) HWY_ATTR {
        const auto p = hn::IfThenElseZero(seen, exp2(d, shifted.at(m)));
        total[0] = hn::Add(total[0], p);
        Weights::store(p, out + m);
      });
  sum = sum * carry + hn::GetLane(hn::SumOfLanes(d, hn::Add(total[0], total[1])));
}

// 1 / (1 + 2^-t), and 0 where that is below 2^-125 (double: 2^-1000).
template <class T, class V>
HWY_INLINE V sigmoid(Full<T> d, V t) {
  constexpr T kLowest = sizeof(T) == 8 ? -1000 : -125;
  const auto vanishing = hn::Lt(t, hn::Set(d, kLowest));
  const auto bounded = hn::IfThenZeroElse(vanishing, t);
  const auto one = hn::Set(d, T{1});
  return hn::IfThenZeroElse(vanishing, hn::Div(one, hn::Add(one, exp2(d, hn::Neg(bounded)))));
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void sigmoid_row(const ShapedRow<T, kAlibi>& row, KeyRange range,
                            typename Weights::Element* out) {
  const Full<T> d;
  for_visible<T>(
      range, [&](int64_t m, auto) HWY_ATTR { Weights::store(sigmoid<T>(d, row.at(m)), out + m); },
      [&](int64_t m, hn::Mask<Full<T>> seen) HWY_ATTR {
        Weights::store(hn::IfThenElseZero(seen, sigmoid<T>(d, row.at(m))), out + m);
      });
}

// Zero columns [from, to) in whole vectors; a vector that also holds weights was written before.
template <class Element>
HWY_INLINE void clear_columns(Element* out, int64_t from, int64_t to) {
  for (int64_t m = from; m < to; ++m) out[m] = Element{0};
}

template <class T, class Weights, WeightKind kKind, bool kAlibi>
HWY_INLINE void weight_rows(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                            const WeightShape<T>& shape, const RowState<T>& state,
                            typename Weights::Element* weights, int64_t stride,
                            int64_t key_multiple) {
  const int64_t columns = round_up(key_count, key_multiple);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range =
        ranges == nullptr ? KeyRange{0, static_cast<int32_t>(key_count)} : ranges[r];
    auto* out = weights + r * stride;
    if (range.empty()) {
      clear_columns(out, 0, columns);
      if constexpr (kKind == WeightKind::softmax) state.carry[r] = 1;
      continue;
    }
    const ShapedRow<T, kAlibi> row{s.row(r), shape.scale, shape.bias, shape.slope,
                                   static_cast<T>(shape.distance + r)};
    if constexpr (kKind == WeightKind::softmax) {
      softmax_row<T, Weights, kAlibi>(row, range, state.pivot[r], state.sum[r], state.carry[r],
                                      out);
    } else {
      sigmoid_row<T, Weights, kAlibi>(row, range, out);
    }
    clear_columns(out, 0, range.begin / lanes<T>() * lanes<T>());
    clear_columns(out, round_up(range.end, lanes<T>()), columns);
  }
}

template <class T, class Weights, WeightKind kKind>
void weight_tile(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                 const WeightShape<T>& shape, const RowState<T>& state, void* weights,
                 int64_t stride) {
  // Half operands come in pairs of up to 32 keys.
  constexpr int64_t kMultiple = std::is_same_v<Weights, HalfWeights> ? 32 : lanes<T>();
  auto* out = static_cast<typename Weights::Element*>(weights);
  if (shape.slope != 0) {
    weight_rows<T, Weights, kKind, true>(s, rows, key_count, ranges, shape, state, out, stride,
                                         kMultiple);
  } else {
    weight_rows<T, Weights, kKind, false>(s, rows, key_count, ranges, shape, state, out, stride,
                                          kMultiple);
  }
}

void add_weight_parts(TileKernels<float>& f, TileKernels<double>& d) {
  constexpr auto kSoftmax = WeightKind::softmax, kSigmoid = WeightKind::sigmoid;
  f.weights[0] = weight_tile<float, WideWeights<float>, kSoftmax>;
  f.weights[1] = weight_tile<float, WideWeights<float>, kSigmoid>;
  d.weights[0] = weight_tile<double, WideWeights<double>, kSoftmax>;
  d.weights[1] = weight_tile<double, WideWeights<double>, kSigmoid>;
}

void add_half_weight_parts(TileKernels<float>& f) {
  f.weights[0] = weight_tile<float, HalfWeights, WeightKind::softmax>;
  f.weights[1] = weight_tile<float, HalfWeights, WeightKind::sigmoid>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_weight_parts)
HEED_SELECT_HALF_PART(add_half_weight_parts)
}  // namespace heed::kernels
#endif
