// Bounds on scores before they become weights: c tanh(x / c) (arXiv 2408.00118) and min(x, most).
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cap_scores.cpp"
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

// e^x - 1 for x in [0, 30] (double: [0, 60]), small x to full relative accuracy.
template <class T, class V>
HWY_INLINE V exp_minus_one(Full<T> d, V x) {
  const V t = hn::Mul(x, hn::Set(d, static_cast<T>(1.4426950408889634074)));
  V power;
  const V whole = round_power(d, t, power);
  // The rest of x behind whole ln 2, in two steps; |rest| <= ln 2 / 2.
  constexpr T kHigh = static_cast<T>(sizeof(T) == 8 ? 0x1.62e42feep-1 : 0x1.62e4p-1);
  constexpr T kLow = static_cast<T>(0.693147180559945309417 - static_cast<double>(kHigh));
  V rest = hn::NegMulAdd(whole, hn::Set(d, kHigh), x);
  rest = hn::NegMulAdd(whole, hn::Set(d, kLow), rest);
  // (e^rest - 1) / rest by its Taylor series.
  V p = hn::Zero(d);
  for (int n = sizeof(T) == 8 ? 15 : 8; n > 0; --n) {
    p = hn::MulAdd(hn::Mul(p, rest), hn::Set(d, T{1} / (n + 1)), hn::Set(d, T{1}));
  }
  return hn::MulAdd(power, hn::Mul(p, rest), hn::Sub(power, hn::Set(d, T{1})));
}

template <class T>
struct Caps {
  using V = hn::Vec<Full<T>>;
  ScoreCaps<T> caps;

  // The capped x; `slope` is multiplied by its derivative.
  HWY_INLINE V apply(V x, V& slope) const {
    const Full<T> d;
    if (caps.softcap > 0) {
      const V one = hn::Set(d, T{1}), two = hn::Set(d, T{2});
      const V y = hn::Div(x, hn::Set(d, caps.softcap));
      // tanh |y| = e / (e + 2) with e = exp(2 |y|) - 1; 1 at the bound to the last bit.
      const V twice = at_most(d, sizeof(T) == 8 ? 60 : 30, hn::Mul(two, hn::Abs(y)));
      const V e = exp_minus_one<T>(d, twice), rest = hn::Div(two, hn::Add(e, two));
      const V size = hn::Div(e, hn::Add(e, two));
      slope = hn::Mul(slope, hn::Mul(rest, hn::Add(one, size)));  // 1 - tanh^2
      x = hn::Mul(hn::Set(d, caps.softcap), hn::CopySign(size, x));
    }
    const V most = hn::Set(d, caps.most);
    slope = hn::IfThenZeroElse(hn::Gt(x, most), slope);
    return at_most(d, caps.most, x);
  }
};

template <class T>
void cap_scores(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
                const ScoreCaps<T>& caps, Block<T> slope) {
  const Full<T> d;
  const Caps<T> cap{caps};
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    if (range.empty()) continue;
    T* x = s.row(r);
    T* derivative = slope.data == nullptr ? nullptr : slope.row(r);
    const auto step = [&](int64_t m) HWY_ATTR {
      auto factor = hn::Set(d, T{1});
      const auto capped = cap.apply(hn::Mul(hn::LoadU(d, x + m), hn::Set(d, scale)), factor);
      hn::StoreU(capped, d, x + m);
      if (derivative != nullptr) hn::StoreU(factor, d, derivative + m);
    };
    // What else an edge vector holds is outside the range: free to change.
    for_visible<T>(
        range, [&](int64_t m, auto) HWY_ATTR { step(m); },
        [&](int64_t m, auto) HWY_ATTR { step(m); });
  }
}

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
