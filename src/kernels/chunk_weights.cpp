// From the scores of a chunk to its weights: decayed, or as Taylor polynomials of the exponential.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/chunk_weights.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/chunk_parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Calls body(m, mask) for the vectors of columns that hold some of the range.
template <class T, class Body>
HWY_INLINE void for_seen(KeyRange range, Body&& body) {
  if (range.empty()) return;
  for (int64_t m = range.begin / lanes<T>() * lanes<T>(); m < range.end; m += lanes<T>()) {
    body(m, visible_lanes<T>(m, range));
  }
}

template <class Element>
HWY_INLINE void clear(Element* out, int64_t from, int64_t to) {
  for (int64_t m = from; m < to; ++m) out[m] = Element{0};
}

template <class T>
struct WideWeights {
  using Element = T;
  static constexpr int64_t kMultiple = lanes<T>();
  static HWY_INLINE void store(hn::Vec<Full<T>> w, T* to) { hn::StoreU(w, Full<T>(), to); }
};

struct HalfWeights {
  using Element = uint16_t;
  static constexpr int64_t kMultiple = kHalfDepth;
  static HWY_INLINE void store(hn::Vec<Full<float>> w, uint16_t* to) {
    hn::StoreU(half_operands(w), hn::Rebind<uint16_t, Full<float>>(), to);
  }
};

template <class T, class Weights>
void weigh(Block<T> s, int64_t rows, int64_t columns, const KeyRange* ranges,
           const WeightFactors<T>& factors, void* weights, int64_t stride) {
  const Full<T> d;
  const int64_t padded = round_up(columns, Weights::kMultiple);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, columns);
    auto* out = static_cast<typename Weights::Element*>(weights) + r * stride;
    const T* row = s.row(r);
    int64_t done = 0;
    for_seen<T>(range, [&](int64_t m, auto seen) HWY_ATTR {
      auto w = hn::LoadU(d, row + m);
      if (factors.less_of_row != nullptr) w = hn::Sub(w, hn::Set(d, factors.less_of_row[r]));
      if (factors.less_of_column != nullptr) {
        w = hn::Sub(w, hn::LoadU(d, factors.less_of_column + m));
      }
      if (factors.decay != nullptr) w = hn::Mul(w, hn::LoadU(d, factors.decay + m - r));
      if (factors.column != nullptr) w = hn::Mul(w, hn::LoadU(d, factors.column + m));
      Weights::store(hn::IfThenElseZero(seen, w), out + m);
      done = m + lanes<T>();
    });
    clear(out, 0, range.empty() ? 0 : range.begin / lanes<T>() * lanes<T>());
    clear(out, done, padded);
  }
}

template <class T>
void polynomial(Block<T> s, Block<T> p, int64_t rows, int64_t columns, const KeyRange* ranges,
                T scale, int order) {
  const Full<T> d;
  const int64_t padded = round_up(columns, lanes<T>());
  const auto one = hn::Set(d, T{1});
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, columns);
    int64_t done = 0;
    for_seen<T>(range, [&](int64_t m, auto seen) HWY_ATTR {
      const auto x = hn::Mul(hn::Set(d, scale), hn::LoadU(d, s.row(r) + m));
      // From the inside out: 1 + x (1 + x/2 (1 + x/3 ...)), of this degree and of one less.
      auto value = one, below = order > 0 ? one : hn::Zero(d);
      for (int n = order; n > 0; --n) {
        value = hn::MulAdd(hn::Mul(x, hn::Set(d, 1 / static_cast<T>(n))), value, one);
        if (n < order) {
          below = hn::MulAdd(hn::Mul(x, hn::Set(d, 1 / static_cast<T>(n))), below, one);
        }
      }
      hn::StoreU(hn::IfThenElseZero(seen, value), d, p.row(r) + m);
      hn::StoreU(hn::IfThenElseZero(seen, hn::Mul(below, hn::Set(d, scale))), d, s.row(r) + m);
      done = m + lanes<T>();
    });
    for (const Block<T>& block : {s, p}) {
      clear(block.row(r), 0, range.empty() ? 0 : range.begin / lanes<T>() * lanes<T>());
      clear(block.row(r), done, padded);
    }
  }
}

template <class T>
void chain(Block<T> s, Block<const T> g, int64_t rows, int64_t columns, const KeyRange* ranges,
           const T* factor, const T* added, bool by_column) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    for_seen<T>(range_of(ranges, r, columns), [&](int64_t m, auto seen) HWY_ATTR {
      const auto f = by_column ? hn::LoadU(d, factor + m) : hn::Set(d, factor[r]);
      const auto a = by_column ? hn::LoadU(d, added + m) : hn::Set(d, added[r]);
      const auto inner = hn::MulAdd(f, hn::LoadU(d, g.row(r) + m), a);
      const auto x = hn::Mul(hn::LoadU(d, s.row(r) + m), inner);
      hn::StoreU(hn::IfThenElseZero(seen, x), d, s.row(r) + m);
    });
  }
}

template <class T>
void range_sums(Block<const T> a, Block<const T> b, int64_t rows, const KeyRange* ranges, T* sums) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    auto sum = hn::Zero(d);
    for_seen<T>(ranges[r], [&](int64_t m, auto seen) HWY_ATTR {
      auto x = hn::LoadU(d, a.row(r) + m);
      if (b.data != nullptr) x = hn::Mul(x, hn::LoadU(d, b.row(r) + m));
      sum = hn::Add(sum, hn::IfThenElseZero(seen, x));
    });
    sums[r] += hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

template <class T>
double distance_sum(Block<const T> a, Block<const T> b, int64_t rows, const KeyRange* ranges,
                    int64_t distance, const T* decay) {
  const Full<T> d;
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    auto sum = hn::Zero(d);
    for_seen<T>(ranges[r], [&](int64_t m, auto seen) HWY_ATTR {
      const auto steps =
          hn::Sub(hn::Set(d, static_cast<T>(distance + r)), hn::Iota(d, static_cast<T>(m)));
      const auto weight = hn::Mul(steps, hn::LoadU(d, decay + m - r));
      const auto x = hn::Mul(hn::LoadU(d, a.row(r) + m), hn::LoadU(d, b.row(r) + m));
      sum = hn::Add(sum, hn::IfThenElseZero(seen, hn::Mul(weight, x)));
    });
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
  }
  return total;
}

template <class T>
void add_parts(ChunkKernels<T>& table) {
  table.weigh = weigh<T, WideWeights<T>>;
  table.polynomial = polynomial<T>;
  table.chain = chain<T>;
  table.range_sums = range_sums<T>;
  table.distance_sum = distance_sum<T>;
}

}  // namespace

void add_chunk_weight_parts(ChunkKernels<float>& f, ChunkKernels<double>& d) {
  add_parts(f);
  add_parts(d);
  f.weigh_half = weigh<float, HalfWeights>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_CHUNK_PART(add_chunk_weight_parts)
}  // namespace heed::kernels
#endif
