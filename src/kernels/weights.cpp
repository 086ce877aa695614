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
  const T found = lane_maximum<T>(hn::Max(most[0], most[1]));
  return kAlibi ? found : found * row.scale;
}

template <class T, class Weights, bool kAlibi>
HWY_INLINE void softmax_row(const ShapedRow<T, kAlibi>& row, KeyRange range, T& pivot, T& sum,
                            T& carry, typename Weights::Element* out) {
  constexpr T kNothing = kMinusInfinity<T>;
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
  const V one = hn::Set(d, T{1});
  const V w = hn::Div(one, hn::Add(one, exp2_any(d, hn::Neg(t))));
  return hn::IfThenZeroElse(hn::Lt(t, hn::Set(d, kLowest)), w);
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

template <class T, class Weights, bool kAlibi>
HWY_INLINE void polynomial_row(const ShapedRow<T, kAlibi>& row, KeyRange range, int order, T& sum,
                               typename Weights::Element* out) {
  const Full<T> d;
  auto total = hn::Zero(d);
  const auto weights = [&](int64_t m) HWY_ATTR {
    const auto score = hn::LoadU(d, row.s + m);
    const auto masked = hn::Eq(score, hn::Set(d, kMinusInfinity<T>));
    return hn::IfThenZeroElse(masked, taylor<T>(d, row.shape(score, m), order));
  };
  const auto add = [&](hn::Vec<Full<T>> p, int64_t m) HWY_ATTR {
    total = hn::Add(total, p);
    Weights::store(p, out + m);
  };
  for_visible<T>(
      range, [&](int64_t m, auto) HWY_ATTR { add(weights(m), m); },
      [&](int64_t m, hn::Mask<Full<T>> seen)
          HWY_ATTR { add(hn::IfThenElseZero(seen, weights(m)), m); });
  sum += hn::GetLane(hn::SumOfLanes(d, total));
}

template <class T, class Weights, WeightKind kKind, bool kAlibi>
HWY_INLINE void weight_rows(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                            const WeightShape<T>& shape, const RowState<T>& state,
                            typename Weights::Element* weights, int64_t stride,
                            int64_t key_multiple) {
  const int64_t columns = round_up(key_count, key_multiple);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    auto* out = weights + r * stride;
    if constexpr (kKind != WeightKind::sigmoid) state.carry[r] = 1;
    if (!range.empty()) {
      const ShapedRow<T, kAlibi> row(s, r, shape);
      if constexpr (kKind == WeightKind::softmax) {
        softmax_row<T, Weights, kAlibi>(row, range, state.pivot[r], state.sum[r], state.carry[r],
                                        out);
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
  // Half operands come in pairs of up to 32 keys.
  constexpr int64_t kMultiple = std::is_same_v<Weights, HalfWeights> ? kHalfDepth : lanes<T>();
  auto* out = static_cast<typename Weights::Element*>(weights);
  const WeightShape<T> shape = without_zero_scale(s, rows, key_count, ranges, given);
  if (shape.slope != 0) {
    weight_rows<T, Weights, kKind, true>(s, rows, key_count, ranges, shape, state, out, stride,
                                         kMultiple);
  } else {
    weight_rows<T, Weights, kKind, false>(s, rows, key_count, ranges, shape, state, out, stride,
                                          kMultiple);
  }
}

template <class T>
void second_weights(Block<const T> weights, Block<T> t, int64_t rows, int64_t key_count,
                    const KeyRange* ranges, const T* carry, T* sum) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    const T* w = weights.row(r);
    T* out = t.row(r);
    hn::Vec<Full<T>> total[2] = {hn::Zero(d), hn::Zero(d)};
    // A masked key has weight 0, whatever it makes of t.
    const auto product = [&](int64_t m) HWY_ATTR {
      const auto p = hn::LoadU(d, w + m);
      return hn::IfThenZeroElse(hn::Eq(p, hn::Zero(d)), hn::Mul(p, hn::LoadU(d, out + m)));
    };
    if (!range.empty()) {
      for_visible<T>(
          range,
          [&](int64_t m, auto parity) HWY_ATTR {
            const auto x = product(m);
            total[parity] = hn::Add(total[parity], x);
            hn::StoreU(x, d, out + m);
          },
          [&](int64_t m, hn::Mask<Full<T>> seen) HWY_ATTR {
            const auto x = hn::IfThenElseZero(seen, product(m));
            total[0] = hn::Add(total[0], x);
            hn::StoreU(x, d, out + m);
          });
    }
    clear_outside<T>(out, range, round_up(key_count, lanes<T>()));
    sum[r] = carry[r] * sum[r] + hn::GetLane(hn::SumOfLanes(d, hn::Add(total[0], total[1])));
  }
}

template <class T, class Weights>
void add_weights(TileKernels<T>& k) {
  k.weights[0] = weight_tile<T, Weights, WeightKind::softmax>;
  k.weights[1] = weight_tile<T, Weights, WeightKind::sigmoid>;
  k.weights[2] = weight_tile<T, Weights, WeightKind::polynomial>;
}

void add_weight_parts(TileKernels<float>& f, TileKernels<double>& d) {
  add_weights<float, WideWeights<float>>(f);
  add_weights<double, WideWeights<double>>(d);
  f.second_weights = second_weights<float>;
  d.second_weights = second_weights<double>;
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
