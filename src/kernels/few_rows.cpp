// The products for few query rows, straight from and to unpacked rows of keys: memory is the bound, so
// each of them is read or written once, in order, for all query rows of the group.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/few_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/parts.h"
#include "kernels/prefetch.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Elements of a cache line.
template <class From>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(From));

// Blocks of 16 bytes in a vector, and elements of a block.
template <class T>
inline constexpr int kBlockElements = 16 / sizeof(T);
template <class T>
inline constexpr int kBlocks = static_cast<int>(lanes<T>()) / kBlockElements<T>;

// From as many vectors as a block has elements: in each block the sums of their lanes in that block.
template <class T, class V>
HWY_INLINE V block_sums(const V* v) {
  const Full<T> d;
  const auto ab = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
  if constexpr (sizeof(T) == 8) {
    return ab;
  } else {
    const hn::Repartition<double, decltype(d)> wide;
    const auto cd = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
    const auto ab2 = hn::BitCast(wide, ab), cd2 = hn::BitCast(wide, cd);
    return hn::Add(hn::BitCast(d, hn::InterleaveLower(wide, ab2, cd2)),
                   hn::BitCast(d, hn::InterleaveUpper(wide, ab2, cd2)));
  }
}

// From as many vectors as a vector has blocks: the sums of the blocks of each, one after the other.
template <class T, class V>
HWY_INLINE V sums_of_blocks(const V* v) {
  if constexpr (kBlocks<T> == 1) {
    return v[0];
  } else {
    const Full<T> d;
    const auto halves = [d](V a, V b) HWY_ATTR {
      return hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a));
    };
    if constexpr (kBlocks<T> == 2) {
      return halves(v[0], v[1]);
    } else {
      const V even = halves(v[0], v[2]), odd = halves(v[1], v[3]);
      return hn::Add(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even),
                     hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even)));
    }
  }
}

// Keys that are read side by side. Fewer are nearer to the order of memory, which streams best; more share
// the loads of query rows, where there are registers for their sums.
template <class T>
inline constexpr int kKeysAtOnce = kPanelVectors == 4 ? kBlockElements<T> : 2;

// Products of R query rows with K keys, lane by lane. Sums of few are taken in S parts: they would wait for
// each other.
template <class T, class From, int R, int K, int S>
HWY_INLINE void dot_side_by_side(const T* q, int64_t q_stride, const From* const* keys,
                                 int64_t width, int64_t ahead, hn::Vec<Full<T>> (&sum)[R][K]) {
  const Full<T> d;
  hn::Vec<Full<T>> part[S][R][K];
#pragma GCC unroll 2
  for (int i = 0; i < S; ++i) {
    for_block<R, K>([&](int r, int j) HWY_ATTR { part[i][r][j] = hn::Zero(d); });
  }
  const auto add = [&](int64_t e, auto&& load, hn::Vec<Full<T>>(&to)[R][K]) HWY_ATTR {
    hn::Vec<Full<T>> query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) query[r] = hn::LoadU(d, q + r * q_stride + e);
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      const auto k = load(keys[j] + e);
      if (e % kLine<From> == 0) prefetch_far(keys[j] + e, ahead);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) to[r][j] = hn::MulAdd(query[r], k, to[r][j]);
    }
  };
  const auto whole = [&](const From* p) HWY_ATTR { return Load<T, From>::full(d, p); };
  int64_t e = 0;
  for (; e + S * lanes<T>() <= width; e += S * lanes<T>()) {
#pragma GCC unroll 2
    for (int i = 0; i < S; ++i) add(e + i * lanes<T>(), whole, part[i]);
  }
  for (; e < width; e += lanes<T>()) {
    const auto some = [&](const From* p) HWY_ATTR { return load_elements<T>(p, width - e); };
    add(e, some, part[0]);
  }
  for_block<R, K>([&](int r, int j) HWY_ATTR {
    sum[r][j] = S == 1 ? part[0][r][j] : hn::Add(part[0][r][j], part[S - 1][r][j]);
  });
}

// Products of R query rows with the keys of one block, still to be summed over the blocks of a vector:
// those of row r to partial[r * step].
template <class T, class From, int R>
HWY_INLINE void dot_keys(const T* q, int64_t q_stride, const From* const* keys, int64_t width,
                         int64_t ahead, hn::Vec<Full<T>>* partial, int step) {
  constexpr int kKeys = kBlockElements<T>, kAtOnce = kKeysAtOnce<T>;
  constexpr int kParts = kAtOnce == 2 && R <= 2 ? 2 : 1;
  hn::Vec<Full<T>> acc[R][kKeys];
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; j += kAtOnce) {
    hn::Vec<Full<T>> sum[R][kAtOnce];
    dot_side_by_side<T, From, R, kAtOnce, kParts>(q, q_stride, keys + j, width, ahead, sum);
    for_block<R, kAtOnce>([&](int r, int i) HWY_ATTR { acc[r][j + i] = sum[r][i]; });
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) partial[r * step] = block_sums<T>(acc[r]);
}

// Scores of R query rows against a block of keys.
template <class T, class From, int R>
HWY_NOINLINE void dot_key_block(const T* q, int64_t q_stride, const Rows& k, int64_t ahead,
                                int64_t first, T* s, int64_t s_stride) {
  // Vectors of partial sums: of R rows, a power of two, and as many keys as fill vectors of scores.
  constexpr int kRows = R == 3 ? 4 : R, kPartial = HWY_MAX(kRows, kBlocks<T>);
  constexpr int kGroups = kPartial / kRows, kKeys = kGroups * kBlockElements<T>;
  const Full<T> d;
  const auto* data = static_cast<const From*>(k.data);
  const int64_t end = HWY_MIN(first + kKeyBlock, k.count);
  for (int64_t m = first; m < end; m += kKeys) {
    hn::Vec<Full<T>> partial[kPartial];
#pragma GCC unroll 4
    for (int i = R * kGroups; i < kPartial; ++i) partial[i] = hn::Zero(d);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const From* keys[kBlockElements<T>];  // past the end the last one
      for (int64_t j = 0; j < kBlockElements<T>; ++j) {
        keys[j] = data + HWY_MIN(m + g * kBlockElements<T> + j, end - 1) * k.stride;
      }
      dot_keys<T, From, R>(q, q_stride, keys, k.width, ahead, partial + g, kGroups);
    }
    HWY_ALIGN T sums[kRows * kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kPartial; i += kBlocks<T>) {
      hn::Store(sums_of_blocks<T>(partial + i), d, sums + i * kBlockElements<T>);
    }
    for (int64_t r = 0; r < R; ++r) {
      T* to = s + r * s_stride + m;
      if (m + kKeys <= end) {
        std::memcpy(to, sums + r * kKeys, kKeys * sizeof(T));
      } else {
        std::copy_n(sums + r * kKeys, end - m, to);
      }
    }
  }
}

// Calls body(first row, number of rows as a constant) for groups of at most four rows.
template <class Body>
HWY_INLINE void for_row_groups(int64_t rows, Body&& body) {
  constexpr int64_t kMost = 4;
  for (int64_t r = 0; r < rows; r += kMost) {
    const int64_t count = HWY_MIN(rows - r, kMost);
    if (count == 1) body(r, std::integral_constant<int, 1>());
    if (count == 2) body(r, std::integral_constant<int, 2>());
    if (count == 3) body(r, std::integral_constant<int, 3>());
    if (count == 4) body(r, std::integral_constant<int, 4>());
  }
}

template <class T>
void dot_rows(Block<const T> queries, int64_t rows, const Rows& k, Block<T> s) {
  const int64_t ahead = bytes_ahead(k);
  with_element_type<T>(k.dtype, [&](auto from) {
    for (int64_t m = 0; m < k.count; m += kKeyBlock) {
      for_row_groups(rows, [&](int64_t r, auto count) {
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

// The same for one vector of columns: all of them, or the first `width`.
template <int K, class T, class From>
HWY_INLINE void add_vector(const T* p, int64_t p_stride, int64_t rows, const From* v,
                           int64_t v_stride, int64_t width, T* o, int64_t o_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> a[K];
  const auto part = static_cast<size_t>(width);
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    a[i] = width >= lanes<T>() ? Load<T, From>::full(d, v + i * v_stride)
                               : Load<T, From>::first(d, v + i * v_stride, part);
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* to = o + r * o_stride;
    auto x = hn::LoadU(d, to);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) x = hn::MulAdd(hn::Set(d, p[r * p_stride + i]), a[i], x);
    hn::StoreU(x, d, to);
  }
}

template <int K, class T, class From>
HWY_NOINLINE void add_keys(const T* p, int64_t p_stride, int64_t rows, const From* v,
                           int64_t v_stride, int64_t width, int64_t ahead, T* o, int64_t o_stride) {
  constexpr int64_t kPair = 2 * lanes<T>();
  // Between the products, but in the order of memory, unlike the columns: that keeps the stream going.
  const int64_t pairs = HWY_MAX(width / kPair, 1), share = (K + pairs - 1) / pairs;
  int64_t asked = 0;
  const auto ask = [&](int64_t keys) HWY_ATTR {
    for (const int64_t end = HWY_MIN(asked + keys, K); asked < end; ++asked) {
      for (int64_t e = 0; e < width; e += kLine<From>) {
        prefetch_far(v + asked * v_stride + e, ahead);
      }
    }
  };
  int64_t f = 0;
  for (; f + kPair <= width; f += kPair) {
    ask(share);
    add_pair<K, T, From>(p, p_stride, rows, v + f, v_stride, o + f, o_stride);
  }
  ask(K);
  for (; f < width; f += lanes<T>()) {
    add_vector<K, T, From>(p, p_stride, rows, v + f, v_stride, width - f, o + f, o_stride);
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
      add_keys<kKeys, T, From>(weights.data + m, weights.stride, rows, data + m * v.stride,
                               v.stride, v.width, ahead, o.data, o.stride);
    }
    for (; m < v.count; ++m) {
      add_keys<1, T, From>(weights.data + m, weights.stride, rows, data + m * v.stride, v.stride,
                           v.width, ahead, o.data, o.stride);
    }
    join_sums<T, From>(rows, v.width, o);
  });
}

// out[m][columns] = factor sum over rows of W[r][m] X[r][columns], for MR keys m.
template <int MR, int NV, class T, class To>
HWY_NOINLINE void spread_block(const T* w, int64_t w_stride, const T* x, int64_t x_stride,
                               int64_t rows, T factor, int64_t width, To* out, int64_t out_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> acc[MR][NV];
  for_block<MR, NV>([&](int m, int j) HWY_ATTR { acc[m][j] = hn::Zero(d); });
  add_product<MR, NV, T>(w, 1, w_stride, x, x_stride, rows, acc);
  const auto scale = hn::Set(d, factor);
  for_block<MR, NV>([&](int m, int j) HWY_ATTR {
    const int64_t f = j * lanes<T>();
    if (f < width) {
      store_elements<T>(hn::Mul(scale, acc[m][j]), out + m * out_stride + f, width - f);
    }
  });
}

template <class T>
void spread_rows(Block<const T> weights, Block<const T> x, int64_t rows, T factor,
                 const RowsOut& out) {
  with_element_type<T>(out.dtype, [&](auto element) {
    using To = decltype(element);
    auto* data = static_cast<To*>(out.data);
    const int64_t vectors = (out.width + lanes<T>() - 1) / lanes<T>();
    for_even_shares(vectors, kPanelVectors, [&](int64_t vector, int64_t count) {
      const int64_t column = vector * lanes<T>();
      with_vectors(count, [&](auto nv) {
        for_row_blocks<nv>(out.count, [&](int64_t m, auto height) {
          spread_block<height, nv, T, To>(weights.data + m, weights.stride, x.data + column,
                                          x.stride, rows, factor, out.width - column,
                                          data + m * out.stride + column, out.stride);
        });
      });
    });
  });
}

}  // namespace

void add_few_row_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.dot_rows = dot_rows<float>;
  f.add_rows = add_rows<float>;
  f.spread_rows = spread_rows<float>;
  d.dot_rows = dot_rows<double>;
  d.add_rows = add_rows<double>;
  d.spread_rows = spread_rows<double>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_few_row_parts)
}  // namespace heed::kernels
#endif
