// How a state meets tokens: the sum of outer products of a chunk, what time does to it, what rows read of
// it, one token's step.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/chunk_products.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/chunk_parts.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// decay(s) + added
template <class T, class V>
HWY_INLINE V decayed_sum(Full<T> d, const Decay<T>& decay, V s, V added) {
  const V sum = hn::MulAdd(hn::Set(d, decay.factor), s, added);
  return decay.keep ? hn::Add(sum, s) : sum;
}

template <int MR, int NV, class T>
HWY_NOINLINE void outer_block(const T* x, int64_t x_stride, const T* y, int64_t y_stride,
                              int64_t depth, const Decay<T>& decay, const T* from,
                              int64_t from_stride, T* to, int64_t to_stride, LinesDue* due) {
  const Full<T> d;
  hn::Vec<Full<T>> sum[MR][NV];
  for_block<MR, NV>([&](int r, int j) HWY_ATTR { sum[r][j] = hn::Zero(d); });
  add_product<MR, NV, T>(x, 1, x_stride, y, y_stride, depth, sum, due);
  if (from != nullptr) {
    const Decay<T> by = decay;
    for_block<MR, NV>([&](int r, int j) HWY_ATTR {
      const auto before = hn::LoadU(d, from + r * from_stride + j * lanes<T>());
      sum[r][j] = decayed_sum<T>(d, by, before, sum[r][j]);
    });
  }
  for_block<MR, NV>([&](int r, int j) HWY_ATTR {
    hn::StoreU(sum[r][j], d, to + r * to_stride + j * lanes<T>());
  });
}

template <class T>
void outer(Block<const T> x, Block<const T> y, int64_t depth, int64_t rows, int64_t columns,
           const Decay<T>& decay, Block<const T> from, Block<T> to, ReadAhead* ahead) {
  for_even_shares(columns / lanes<T>(), kPanelVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * lanes<T>();
    with_vectors(count, [&](auto vectors) {
      for_row_blocks<vectors>(rows, [&](int64_t r, auto height) {
        outer_block<height, vectors, T>(
            x.data + r, x.stride, y.data + column, y.stride, depth, decay,
            from.data == nullptr ? nullptr : from.row(r) + column, from.stride, to.row(r) + column,
            to.stride, lines_due(ahead, height, vectors * lanes<T>(), depth));
      });
    });
  });
}

template <int MR, int NV, class T>
HWY_NOINLINE void read_block(const T* x, int64_t x_stride, const T* s, int64_t s_stride,
                             int64_t depth, const T* factor, const T* added, const T* added_factor,
                             T* o, int64_t o_stride, LinesDue* due) {
  const Full<T> d;
  hn::Vec<Full<T>> sum[MR][NV];
  for_block<MR, NV>([&](int r, int j) HWY_ATTR { sum[r][j] = hn::Zero(d); });
  add_product<MR, NV, T>(x, x_stride, 1, s, s_stride, depth, sum, due);
  if (factor != nullptr) {
    for_block<MR, NV>([&](int r, int j)
                          HWY_ATTR { sum[r][j] = hn::Mul(sum[r][j], hn::Set(d, factor[r])); });
  }
  if (added != nullptr) {
    for_block<MR, NV>([&](int r, int j) HWY_ATTR {
      const auto row = hn::LoadU(d, added + j * lanes<T>());
      sum[r][j] = hn::MulAdd(hn::Set(d, added_factor[r]), row, sum[r][j]);
    });
  }
  for_block<MR, NV>([&](int r, int j)
                        HWY_ATTR { hn::StoreU(sum[r][j], d, o + r * o_stride + j * lanes<T>()); });
}

template <class T>
void read(Block<const T> x, Block<const T> s, int64_t rows, int64_t depth, int64_t columns,
          const RowEnds<T>& ends, Block<T> o, ReadAhead* ahead) {
  const auto at = [](const T* p, int64_t i) { return p == nullptr ? nullptr : p + i; };
  for_even_shares(columns / lanes<T>(), kPanelVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * lanes<T>();
    with_vectors(count, [&](auto vectors) {
      for_row_blocks<vectors>(rows, [&](int64_t r, auto height) {
        read_block<height, vectors, T>(x.row(r), x.stride, s.data + column, s.stride, depth,
                                       at(ends.factor, r), at(ends.added, column),
                                       at(ends.added_factor, r), o.row(r) + column, o.stride,
                                       lines_due(ahead, height, vectors * lanes<T>(), depth));
      });
    });
  });
}

template <class T>
void advance(const T* from, const T* added, int64_t count, const Decay<T>& decay, T* to) {
  const Full<T> d;
  int64_t i = 0;
  for (; i + lanes<T>() <= count; i += lanes<T>()) {
    hn::StoreU(decayed_sum<T>(d, decay, hn::LoadU(d, from + i), hn::LoadU(d, added + i)), d,
               to + i);
  }
  const hn::CappedTag<T, 1> one;
  for (; i < count; ++i) {
    const auto before = hn::LoadU(one, from + i);
    const auto sum = hn::MulAdd(hn::Set(one, decay.factor), before, hn::LoadU(one, added + i));
    hn::StoreU(decay.keep ? hn::Add(sum, before) : sum, one, to + i);
  }
}

// NV vectors of columns; without kWhole, `tail` columns of one vector. What is known to the compiler stays
// out of the loop, and the decay in registers: stores might change what is read through a reference.
template <int NV, bool kWhole, bool kStore, bool kKeep, class T>
HWY_NOINLINE void step_columns(const T* q, const T* k, const T* v, int64_t features, size_t tail,
                               T factor, const T* from, int64_t from_stride, T* to,
                               int64_t to_stride, T* o) {
  const Full<T> d;
  const auto decay = hn::Set(d, factor);
  hn::Vec<Full<T>> value[NV], sum[NV];
  const auto load = [&](const T* p, int j) HWY_ATTR {
    return kWhole ? hn::LoadU(d, p + j * lanes<T>()) : load_first(d, p, tail);
  };
  const auto store = [&](hn::Vec<Full<T>> x, T* p, int j) HWY_ATTR {
    if (kWhole) return hn::StoreU(x, d, p + j * lanes<T>());
    store_first(d, x, p, tail);
  };
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    value[j] = load(v, j);
    sum[j] = hn::Zero(d);
  }
  for (int64_t f = 0; f < features; ++f) {
    const auto query = hn::Set(d, q[f]), key = hn::Set(d, k[f]);
    // Loaded once each, before any store: the more loads under way, the faster memory is.
    hn::Vec<Full<T>> before[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) before[j] = load(from + f * from_stride, j);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      auto s = hn::MulAdd(decay, before[j], hn::Mul(key, value[j]));
      if (kKeep) s = hn::Add(s, before[j]);
      if (kStore) store(s, to + f * to_stride, j);
      sum[j] = hn::MulAdd(query, s, sum[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) store(sum[j], o, j);
}

template <bool kStore, bool kKeep, class T>
void step_any(const T* q, const T* k, const T* v, int64_t features, int64_t columns, T factor,
              Block<const T> from, Block<T> to, T* o) {
  constexpr int kMost = kPanelVectors == 4 ? 8 : 4;
  const auto run = [&](auto vectors, auto whole, int64_t c) HWY_ATTR {
    step_columns<vectors, whole, kStore, kKeep, T>(
        q, k, v + c, features, static_cast<size_t>(columns - c), factor, from.data + c, from.stride,
        to.data + c, to.stride, o + c);
  };
  const std::integral_constant<int, kMost> most;
  const std::integral_constant<int, 1> one;
  int64_t c = 0;
  for (; c + kMost * lanes<T>() <= columns; c += kMost * lanes<T>()) run(most, std::true_type(), c);
  for (; c + lanes<T>() <= columns; c += lanes<T>()) run(one, std::true_type(), c);
  if (c < columns) run(one, std::false_type(), c);
}

template <class T>
void step(const T* q, const T* k, const T* v, int64_t features, int64_t columns,
          const Decay<T>& decay, Block<const T> from, Block<T> to, T* o) {
  const auto run = [&](auto store, auto keep) HWY_ATTR {
    step_any<store, keep, T>(q, k, v, features, columns, decay.factor, from, to, o);
  };
  const auto run_storing = [&](auto store) HWY_ATTR {
    return decay.keep ? run(store, std::true_type()) : run(store, std::false_type());
  };
  return to.data != nullptr ? run_storing(std::true_type()) : run_storing(std::false_type());
}

template <class T>
void add_parts(ChunkKernels<T>& table) {
  table.outer = outer<T>;
  table.read = read<T>;
  table.advance = advance<T>;
  table.step = step<T>;
}

}  // namespace

void add_chunk_product_parts(ChunkKernels<float>& f, ChunkKernels<double>& d) {
  add_parts(f);
  add_parts(d);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_CHUNK_PART(add_chunk_product_parts)
}  // namespace heed::kernels
#endif
