// The two products for few query rows, straight from unpacked keys and values: memory is the bound, so
// each key and value row is read once, in order, for all query rows of the group.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/few_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <type_traits>

#include "kernels/parts.h"
#include "kernels/prefetch.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Elements of a cache line.
template <class From>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(From));

// Sums of the lanes of four vectors, one after the other.
template <class T, class V>
HWY_INLINE void store_lane_sums(const V* v, T* to) {
  const Full<T> d;
  if constexpr (sizeof(T) == 4 && hn::MaxLanes(d) >= 4) {
    const hn::Repartition<double, decltype(d)> wide;
    const auto ab = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
    const auto cd = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
    const auto ab2 = hn::BitCast(wide, ab), cd2 = hn::BitCast(wide, cd);
    const auto abcd = hn::Add(hn::BitCast(d, hn::InterleaveLower(wide, ab2, cd2)),
                              hn::BitCast(d, hn::InterleaveUpper(wide, ab2, cd2)));
    HWY_ALIGN T buffer[hn::MaxLanes(d)];
    hn::Store(abcd, d, buffer);
    const hn::FixedTag<T, 4> d4;
    auto sum = hn::Load(d4, buffer);
    for (size_t b = 4; b < hn::MaxLanes(d); b += 4) sum = hn::Add(sum, hn::Load(d4, buffer + b));
    hn::StoreU(sum, d4, to);
  } else {
    for (int i = 0; i < 4; ++i) to[i] = hn::GetLane(hn::SumOfLanes(d, v[i]));
  }
}

// Scores of R query rows against four keys. Keys past the end repeat the last one.
template <class T, class From, int R>
HWY_INLINE void dot_block(const T* q, int64_t q_stride, const From* const (&keys)[4], int64_t width,
                          int64_t ahead, T* s, int64_t s_stride, int64_t count) {
  const Full<T> d;
  hn::Vec<Full<T>> acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = hn::Zero(d);
  }
  int64_t e = 0;
  const auto step = [&](auto&& load) HWY_ATTR {
    hn::Vec<Full<T>> query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) query[r] = hn::LoadU(d, q + r * q_stride + e);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto k = load(keys[j] + e);
      if (e % kLine<From> == 0) prefetch_far(keys[j] + e, ahead);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][j] = hn::MulAdd(query[r], k, acc[r][j]);
    }
  };
  for (; e + lanes<T>() <= width; e += lanes<T>()) {
    step([&](const From* p) HWY_ATTR { return Load<T, From>::full(d, p); });
  }
  if (e < width) {
    const auto rest = static_cast<size_t>(width - e);
    step([&](const From* p) HWY_ATTR { return Load<T, From>::first(d, p, rest); });
  }
  HWY_ALIGN T sums[4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    store_lane_sums<T>(acc[r], sums);
    for (int64_t j = 0; j < count; ++j) s[r * s_stride + j] = sums[j];
  }
}

// Scores of R query rows against a block of keys.
template <class T, class From, int R>
HWY_NOINLINE void dot_key_block(const T* q, int64_t q_stride, const Rows& k, int64_t ahead,
                                int64_t first, T* s, int64_t s_stride) {
  const auto* data = static_cast<const From*>(k.data);
  const int64_t end = HWY_MIN(first + kKeyBlock, k.count);
  for (int64_t m = first; m < end; m += 4) {
    const From* keys[4];
    for (int64_t j = 0; j < 4; ++j) keys[j] = data + HWY_MIN(m + j, end - 1) * k.stride;
    dot_block<T, From, R>(q, q_stride, keys, k.width, ahead, s + m, s_stride,
                          HWY_MIN(int64_t{4}, end - m));
  }
}

// Calls body(first row, number of rows as a constant) for groups of at most kMost rows.
template <int kMost, class Body>
HWY_INLINE void for_row_groups(int64_t rows, Body&& body) {
  for (int64_t r = 0; r < rows; r += kMost) {
    const int64_t count = HWY_MIN(rows - r, int64_t{kMost});
    if (count == 1) body(r, std::integral_constant<int, 1>());
    if (count == 2) body(r, std::integral_constant<int, 2>());
    if constexpr (kMost > 2) {
      if (count == 3) body(r, std::integral_constant<int, 3>());
      if (count == 4) body(r, std::integral_constant<int, 4>());
    }
  }
}

template <class T>
void dot_rows(Block<const T> queries, int64_t rows, const Rows& k, Block<T> s) {
  constexpr int kGroup = kPanelVectors == 4 ? 4 : 2;  // four accumulators a row
  const int64_t ahead = bytes_ahead(k);
  with_element_type<T>(k.dtype, [&](auto from) {
    for (int64_t m = 0; m < k.count; m += kKeyBlock) {
      for_row_groups<kGroup>(rows, [&](int64_t r, auto count) {
        dot_key_block<T, decltype(from), count>(queries.row(r), queries.stride, k,
                                                r == 0 ? ahead : 0, m, s.row(r), s.stride);
      });
    }
  });
}

// Two vectors of neighbouring columns. Of bfloat16 the even columns and the odd ones: widening them
// where they lie takes half the instructions.
template <class T, class From>
struct ColumnPair {
  using V = hn::Vec<Full<T>>;
  static constexpr bool kApart = std::is_same_v<From, bfloat16>;
  static HWY_INLINE void load(const From* p, V& a, V& b) {
    const Full<T> d;
    if constexpr (kApart) {
      const hn::RebindToUnsigned<Full<T>> du;
      const auto both = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
      a = hn::BitCast(d, hn::ShiftLeft<16>(both));
      b = hn::BitCast(d, hn::And(both, hn::Set(du, 0xffff0000u)));
    } else {
      a = Load<T, From>::full(d, p);
      b = Load<T, From>::full(d, p + lanes<T>());
    }
  }
};

// O[r] += P[r] V for K keys and two vectors of columns, for all rows.
template <int K, class T, class From>
HWY_INLINE void add_pair(const T* p, int64_t p_stride, int64_t rows, const From* v,
                         int64_t v_stride, T* o, int64_t o_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> a[K], b[K];
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) ColumnPair<T, From>::load(v + i * v_stride, a[i], b[i]);
  for (int64_t r = 0; r < rows; ++r) {
    T* to = o + r * o_stride;
    auto x = hn::LoadU(d, to), y = hn::LoadU(d, to + lanes<T>());
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      const auto weight = hn::Set(d, p[r * p_stride + i]);
      x = hn::MulAdd(weight, a[i], x);
      y = hn::MulAdd(weight, b[i], y);
    }
    hn::StoreU(x, d, to);
    hn::StoreU(y, d, to + lanes<T>());
  }
}

// The columns behind the last pair, at most two vectors.
template <class T, class From>
HWY_INLINE void add_rest(const T* p, int64_t p_stride, int64_t rows, const From* v, int64_t width,
                         T* o, int64_t o_stride) {
  const Full<T> d;
  for (int64_t f = 0; f < width; f += lanes<T>()) {
    const auto x = f + lanes<T>() <= width
                       ? Load<T, From>::full(d, v + f)
                       : Load<T, From>::first(d, v + f, static_cast<size_t>(width - f));
    for (int64_t r = 0; r < rows; ++r) {
      T* to = o + r * o_stride + f;
      hn::StoreU(hn::MulAdd(hn::Set(d, p[r * p_stride]), x, hn::LoadU(d, to)), d, to);
    }
  }
}

template <int K, class T, class From>
HWY_NOINLINE void add_keys(const T* p, int64_t p_stride, int64_t rows, const From* v,
                           int64_t v_stride, int64_t width, T* o, int64_t o_stride) {
  constexpr int64_t kPair = 2 * lanes<T>();
  int64_t f = 0;
  for (; f + kPair <= width; f += kPair) {
    add_pair<K, T, From>(p, p_stride, rows, v + f, v_stride, o + f, o_stride);
  }
  for (int i = 0; f < width && i < K; ++i) {
    add_rest<T, From>(p + i, p_stride, rows, v + i * v_stride + f, width - f, o + f, o_stride);
  }
}

// Rows of O times their carry; pairs of vectors are taken apart as ColumnPair does, or put together.
template <class T, class From>
void prepare_sums(int64_t rows, int64_t width, const T* carry, Block<T> o) {
  const Full<T> d;
  constexpr int64_t kPair = 2 * lanes<T>();
  for (int64_t r = 0; r < rows; ++r) {
    const auto factor = hn::Set(d, carry == nullptr ? T{1} : carry[r]);
    T* to = o.row(r);
    int64_t f = 0;
    for (; f + kPair <= width; f += kPair) {
      hn::Vec<Full<T>> a = hn::LoadU(d, to + f), b = hn::LoadU(d, to + f + lanes<T>());
      if constexpr (ColumnPair<T, From>::kApart) hn::LoadInterleaved2(d, to + f, a, b);
      hn::StoreU(hn::Mul(factor, a), d, to + f);
      hn::StoreU(hn::Mul(factor, b), d, to + f + lanes<T>());
    }
    for (; f < width; f += lanes<T>()) {
      hn::StoreU(hn::Mul(factor, hn::LoadU(d, to + f)), d, to + f);
    }
  }
}

template <class T, class From>
void join_sums(int64_t rows, int64_t width, Block<T> o) {
  if constexpr (ColumnPair<T, From>::kApart) {
    const Full<T> d;
    constexpr int64_t kPair = 2 * lanes<T>();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t f = 0; f + kPair <= width; f += kPair) {
        T* to = o.row(r) + f;
        const auto a = hn::LoadU(d, to), b = hn::LoadU(d, to + lanes<T>());
        hn::StoreInterleaved2(a, b, d, to);
      }
    }
  }
}

template <class T>
void add_rows(Block<const T> weights, int64_t rows, const Rows& v, const T* carry, Block<T> o) {
  constexpr int kKeys = kPanelVectors == 4 ? 8 : 4;  // pairs of vectors that fit the registers
  const int64_t ahead = bytes_ahead(v);
  with_element_type<T>(v.dtype, [&](auto from) {
    using From = decltype(from);
    const auto* data = static_cast<const From*>(v.data);
    prepare_sums<T, From>(rows, v.width, carry, o);
    int64_t m = 0;
    for (; m + kKeys <= v.count; m += kKeys) {
      // In the order of memory, unlike the columns below: that keeps the stream going.
      for (int64_t i = m; i < m + kKeys; ++i) {
        for (int64_t f = 0; f < v.width; f += kLine<From>) {
          prefetch_far(data + i * v.stride + f, ahead);
        }
      }
      add_keys<kKeys, T, From>(weights.data + m, weights.stride, rows, data + m * v.stride,
                               v.stride, v.width, o.data, o.stride);
    }
    for (; m < v.count; ++m) {
      add_keys<1, T, From>(weights.data + m, weights.stride, rows, data + m * v.stride, v.stride,
                           v.width, o.data, o.stride);
    }
    join_sums<T, From>(rows, v.width, o);
  });
}

void add_few_row_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.dot_rows = dot_rows<float>;
  f.add_rows = add_rows<float>;
  d.dot_rows = dot_rows<double>;
  d.add_rows = add_rows<double>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_few_row_parts)
}  // namespace heed::kernels
#endif
