// The two products for few query rows, straight from unpacked keys and values: memory is the bound, so
// each key and value row is read once, in order, for all query rows of the group.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/few_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <type_traits>

#include "kernels/parts.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows that are asked for ahead of their use: enough to cover the latency of memory at full bandwidth.
constexpr int64_t kAheadBytes = 4096;

// Asks for row m + (rows worth kAheadBytes) of `rows`; past the last row nothing is asked for.
template <class From>
struct Prefetcher {
  explicit Prefetcher(const Rows& r)
      : data(static_cast<const From*>(r.data)),
        stride(r.stride),
        count(r.count),
        bytes(r.width * static_cast<int64_t>(sizeof(From))),
        ahead(kAheadBytes / bytes + 1) {}
  HWY_INLINE void operator()(int64_t m) const {
    if (m + ahead >= count) return;
    const auto* line = reinterpret_cast<const std::byte*>(data + (m + ahead) * stride);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
  }
  const From* data;
  int64_t stride, count, bytes, ahead;
};

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
                          T* s, int64_t s_stride, int64_t count) {
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

template <class T, class From, int R>
HWY_NOINLINE void dot_rows_block(const T* q, int64_t q_stride, const Rows& k, T* s,
                                 int64_t s_stride) {
  const auto* data = static_cast<const From*>(k.data);
  const Prefetcher<From> prefetch(k);
  for (int64_t m = 0; m < k.count; m += 4) {
    for (int64_t j = 0; j < 4; ++j) prefetch(m + j);
    const From* keys[4];
    for (int64_t j = 0; j < 4; ++j) keys[j] = data + HWY_MIN(m + j, k.count - 1) * k.stride;
    dot_block<T, From, R>(q, q_stride, keys, k.width, s + m, s_stride,
                          HWY_MIN(int64_t{4}, k.count - m));
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
  with_element_type<T>(k.dtype, [&](auto from) {
    for_row_groups<kGroup>(rows, [&](int64_t r, auto count) {
      dot_rows_block<T, decltype(from), count>(queries.row(r), queries.stride, k, s.row(r),
                                               s.stride);
    });
  });
}

// One block of R rows and NV vectors of columns; `last` < lanes loads only that many elements of the
// single vector.
template <class T, class From, int R, int NV>
HWY_NOINLINE void add_block(const T* p, int64_t p_stride, const Rows& v, int64_t first_column,
                            size_t last, const T* carry, T* o, int64_t o_stride) {
  const Prefetcher<From> prefetch(v);
  const Full<T> d;
  hn::Vec<Full<T>> acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const auto c = hn::Set(d, carry == nullptr ? T{1} : carry[r]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = hn::Mul(c, hn::LoadU(d, o + r * o_stride + j * lanes<T>()));
    }
  }
  const auto* data = static_cast<const From*>(v.data) + first_column;
  for (int64_t m = 0; m < v.count; ++m) {
    hn::Vec<Full<T>> column[NV];
    const From* row = data + m * v.stride;
    if (first_column == 0) prefetch(m);
    if (NV == 1 && last > 0) {
      column[0] = Load<T, From>::first(d, row, last);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) column[j] = Load<T, From>::full(d, row + j * lanes<T>());
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto x = hn::Set(d, p[r * p_stride + m]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = hn::MulAdd(x, column[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) hn::StoreU(acc[r][j], d, o + r * o_stride + j * lanes<T>());
  }
}

template <class T, class From, int R>
void add_row_group(const T* p, int64_t p_stride, const Rows& v, const T* carry, T* o,
                   int64_t o_stride) {
  constexpr int kMost = kPanelVectors;
  int64_t column = 0;
  for (; column + kMost * lanes<T>() <= v.width; column += kMost * lanes<T>()) {
    add_block<T, From, R, kMost>(p, p_stride, v, column, 0, carry, o + column, o_stride);
  }
  for (; column < v.width; column += lanes<T>()) {
    const int64_t rest = v.width - column;
    add_block<T, From, R, 1>(p, p_stride, v, column,
                             rest < lanes<T>() ? static_cast<size_t>(rest) : 0, carry, o + column,
                             o_stride);
  }
}

template <class T>
void add_rows(Block<const T> weights, int64_t rows, const Rows& v, const T* carry, Block<T> o) {
  with_element_type<T>(v.dtype, [&](auto from) {
    for_row_groups<4>(rows, [&](int64_t r, auto count) {
      add_row_group<T, decltype(from), count>(weights.row(r), weights.stride, v,
                                              carry == nullptr ? nullptr : carry + r, o.row(r),
                                              o.stride);
    });
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
