// How a state meets tokens: the sum of outer products of a chunk, what time does to it, what rows read of
// it, one token's step.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/chunk_products.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/chunk_parts.h"
#include "kernels/prefetch.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// decay(s) + added
template <class T, class V>
HWY_INLINE V decayed_sum(Full<T> d, const Decay<T>& decay, V s, V added) {
  const V sum = hn::MulAdd(hn::Set(d, decay.factor), s, added);
  return decay.keep ? hn::Add(sum, s) : sum;
}

template <int MR, int NV, class T>
HWY_NOINLINE void outer_block(const T* x, int64_t x_stride, const T* y, int64_t y_stride,
                              int64_t depth, const Decay<T>* decay, T* s, int64_t s_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> sum[MR][NV];
  for_block<MR, NV>([&](int r, int j) HWY_ATTR { sum[r][j] = hn::Zero(d); });
  add_product<MR, NV, T>(x, 1, x_stride, y, y_stride, depth, sum);
  for_block<MR, NV>([&](int r, int j) HWY_ATTR {
    T* to = s + r * s_stride + j * lanes<T>();
    hn::StoreU(
        decay == nullptr ? sum[r][j] : decayed_sum<T>(d, *decay, hn::LoadU(d, to), sum[r][j]), d,
        to);
  });
}

// For every register block of a product its share of what lies ahead.
template <class T>
struct AskAhead {
  AskAhead(const Ahead& ahead, int64_t rows, int64_t columns)
      : first(ahead.first, blocks(rows, columns)),
        second(ahead.second, blocks(rows, columns)),
        third(ahead.third, blocks(rows, columns)) {}
  void ask() {
    first.ask();
    second.ask();
    third.ask();
  }
  static int64_t blocks(int64_t rows, int64_t columns) {
    const int64_t panel = kPanelVectors * lanes<T>();
    const auto vectors = static_cast<int>(HWY_MIN(columns, panel) / lanes<T>());
    return HWY_MAX(int64_t{1}, rows / block_rows(vectors)) * ((columns + panel - 1) / panel);
  }
  RowsAhead first, second, third;
};

template <class T>
void outer(Block<const T> x, Block<const T> y, int64_t depth, int64_t rows, int64_t columns,
           const Decay<T>* decay, Block<T> s, const Ahead& ahead) {
  AskAhead<T> asker(ahead, rows, columns);
  for_even_shares(columns / lanes<T>(), kPanelVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * lanes<T>();
    with_vectors(count, [&](auto vectors) {
      for_row_blocks<vectors>(rows, [&](int64_t r, auto height) {
        asker.ask();
        outer_block<height, vectors, T>(x.data + r, x.stride, y.data + column, y.stride, depth,
                                        decay, s.row(r) + column, s.stride);
      });
    });
  });
}

template <int MR, int NV, class T>
HWY_NOINLINE void read_block(const T* x, int64_t x_stride, const T* s, int64_t s_stride,
                             int64_t depth, const T* factor, const T* added, const T* added_factor,
                             T* o, int64_t o_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> sum[MR][NV];
  for_block<MR, NV>([&](int r, int j) HWY_ATTR { sum[r][j] = hn::Zero(d); });
  add_product<MR, NV, T>(x, x_stride, 1, s, s_stride, depth, sum);
  for_block<MR, NV>([&](int r, int j) HWY_ATTR {
    auto result = sum[r][j];
    if (factor != nullptr) result = hn::Mul(result, hn::Set(d, factor[r]));
    if (added != nullptr) {
      result =
          hn::MulAdd(hn::Set(d, added_factor[r]), hn::LoadU(d, added + j * lanes<T>()), result);
    }
    hn::StoreU(result, d, o + r * o_stride + j * lanes<T>());
  });
}

template <class T>
void read(Block<const T> x, Block<const T> s, int64_t rows, int64_t depth, int64_t columns,
          const RowEnds<T>& ends, Block<T> o, const Ahead& ahead) {
  AskAhead<T> asker(ahead, rows, columns);
  const auto at = [](const T* p, int64_t i) { return p == nullptr ? nullptr : p + i; };
  for_even_shares(columns / lanes<T>(), kPanelVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * lanes<T>();
    with_vectors(count, [&](auto vectors) {
      for_row_blocks<vectors>(rows, [&](int64_t r, auto height) {
        asker.ask();
        read_block<height, vectors, T>(x.row(r), x.stride, s.data + column, s.stride, depth,
                                       at(ends.factor, r), at(ends.added, column),
                                       at(ends.added_factor, r), o.row(r) + column, o.stride);
      });
    });
  });
}

template <class T>
void advance(T* s, const T* added, int64_t count, const Decay<T>& decay) {
  const Full<T> d;
  int64_t i = 0;
  for (; i + lanes<T>() <= count; i += lanes<T>()) {
    hn::StoreU(decayed_sum<T>(d, decay, hn::LoadU(d, s + i), hn::LoadU(d, added + i)), d, s + i);
  }
  const hn::CappedTag<T, 1> one;
  for (; i < count; ++i) {
    const auto sum =
        hn::MulAdd(hn::Set(one, decay.factor), hn::LoadU(one, s + i), hn::LoadU(one, added + i));
    hn::StoreU(decay.keep ? hn::Add(sum, hn::LoadU(one, s + i)) : sum, one, s + i);
  }
}

template <class T>
void scan(T* running, T* slot, int64_t count, const Decay<T>& decay) {
  const Full<T> d;
  for (int64_t i = 0; i < count; i += lanes<T>()) {
    const auto before = hn::LoadU(d, running + i), added = hn::LoadU(d, slot + i);
    hn::StoreU(before, d, slot + i);
    hn::StoreU(decayed_sum<T>(d, decay, before, added), d, running + i);
  }
}

// NV vectors of columns, or `tail` columns of one vector. Two sums a column, for the latency.
template <int NV, bool kStore, class T>
HWY_NOINLINE void step_columns(const T* q, const T* k, const T* v, int64_t features, size_t tail,
                               const Decay<T>& decay, const T* from, int64_t from_stride, T* to,
                               int64_t to_stride, T* o) {
  const Full<T> d;
  hn::Vec<Full<T>> value[NV], sum[NV];
  const auto load = [&](const T* p, int j) HWY_ATTR {
    return tail > 0 ? Load<T, T>::first(d, p, tail) : hn::LoadU(d, p + j * lanes<T>());
  };
  const auto store = [&](hn::Vec<Full<T>> x, T* p, int j) HWY_ATTR {
    if (tail > 0) {
      HWY_ALIGN T buffer[hn::MaxLanes(d)];
      hn::Store(x, d, buffer);
      for (size_t i = 0; i < tail; ++i) p[i] = buffer[i];
    } else {
      hn::StoreU(x, d, p + j * lanes<T>());
    }
  };
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    value[j] = load(v, j);
    sum[j] = hn::Zero(d);
  }
  for (int64_t f = 0; f < features; ++f) {
    const auto query = hn::Set(d, q[f]), key = hn::Set(d, k[f]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const auto s =
          decayed_sum<T>(d, decay, load(from + f * from_stride, j), hn::Mul(key, value[j]));
      if constexpr (kStore) store(s, to + f * to_stride, j);
      sum[j] = hn::MulAdd(query, s, sum[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) store(sum[j], o, j);
}

template <bool kStore, class T>
void step_any(const T* q, const T* k, const T* v, int64_t features, int64_t columns,
              const Decay<T>& decay, Block<const T> from, Block<T> to, T* o) {
  constexpr int kMost = kPanelVectors == 4 ? 8 : 4;
  int64_t c = 0;
  for (; c + kMost * lanes<T>() <= columns; c += kMost * lanes<T>()) {
    step_columns<kMost, kStore, T>(q, k, v + c, features, 0, decay, from.data + c, from.stride,
                                   to.data + c, to.stride, o + c);
  }
  for (; c + lanes<T>() <= columns; c += lanes<T>()) {
    step_columns<1, kStore, T>(q, k, v + c, features, 0, decay, from.data + c, from.stride,
                               to.data + c, to.stride, o + c);
  }
  if (c < columns) {
    step_columns<1, kStore, T>(q, k, v + c, features, static_cast<size_t>(columns - c), decay,
                               from.data + c, from.stride, to.data + c, to.stride, o + c);
  }
}

template <class T>
void step(const T* q, const T* k, const T* v, int64_t features, int64_t columns,
          const Decay<T>& decay, Block<const T> from, Block<T> to, T* o) {
  if (to.data == nullptr) {
    step_any<false, T>(q, k, v, features, columns, decay, from, to, o);
  } else {
    step_any<true, T>(q, k, v, features, columns, decay, from, to, o);
  }
}

template <class T>
void add_parts(ChunkKernels<T>& table) {
  table.outer = outer<T>;
  table.read = read<T>;
  table.advance = advance<T>;
  table.scan = scan<T>;
  table.step = step<T>;
}

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
