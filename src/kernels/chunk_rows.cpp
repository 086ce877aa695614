// Rows of a chunk: copies with factors, sums that run along the rows, operands in bfloat16.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/chunk_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/chunk_parts.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"
#include "kernels/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
void pack_rows(const Rows& x, const T* factor, Block<T> to) {
  const Full<T> d;
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t r = 0; r < x.count; ++r) {
      const auto* row = static_cast<const From*>(x.data) + r * x.stride;
      const auto f = hn::Set(d, factor == nullptr ? T{1} : factor[r]);
      int64_t i = 0;
      for (; i < x.width; i += lanes<T>()) {
        hn::StoreU(hn::Mul(f, load_elements<T>(row + i, x.width - i)), d, to.row(r) + i);
      }
      for (; i < to.stride; i += lanes<T>()) hn::StoreU(hn::Zero(d), d, to.row(r) + i);
    }
  });
}

// sum of x_i y_i; both are read in whole vectors
template <class T>
HWY_INLINE T dot(const T* x, const T* y, int64_t width) {
  const Full<T> d;
  auto even = hn::Zero(d), odd = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes<T>() < width; i += 2 * lanes<T>()) {
    even = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), even);
    odd = hn::MulAdd(hn::LoadU(d, x + i + lanes<T>()), hn::LoadU(d, y + i + lanes<T>()), odd);
  }
  if (i < width) even = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), even);
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
}

// y += factor x over whole vectors
template <class T>
HWY_INLINE void add_scaled(T factor, const T* x, int64_t width, T* y) {
  const Full<T> d;
  const auto f = hn::Set(d, factor);
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    hn::StoreU(hn::MulAdd(f, hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
  }
}

HWY_INLINE bool holds(TokenRange tokens, int64_t t) { return t >= tokens.first && t < tokens.last; }

template <class T>
void run_dots(Block<const T> x, TokenRange x_tokens, Block<const T> y, TokenRange y_tokens,
              int64_t width, T* sum, T* dots) {
  const int64_t last = HWY_MAX(x_tokens.last, y_tokens.last);
  for (int64_t t = 0; t < last; ++t) {
    if (holds(x_tokens, t)) add_scaled(T{1}, x.row(t - x_tokens.first), width, sum);
    if (holds(y_tokens, t)) {
      const int64_t r = t - y_tokens.first;
      dots[r] = dot(y.row(r), sum, width);
    }
  }
}

template <class T>
void run_add(Block<const T> x, const T* x_factor, TokenRange x_tokens, Block<T> y,
             const T* y_factor, TokenRange y_tokens, int64_t width, bool reverse, T* sum) {
  const int64_t last = HWY_MAX(x_tokens.last, y_tokens.last);
  for (int64_t i = 0; i < last; ++i) {
    const int64_t t = reverse ? last - 1 - i : i;
    if (holds(x_tokens, t)) {
      const int64_t r = t - x_tokens.first;
      add_scaled(x_factor == nullptr ? T{1} : x_factor[r], x.row(r), width, sum);
    }
    if (holds(y_tokens, t)) {
      const int64_t r = t - y_tokens.first;
      add_scaled(y_factor == nullptr ? T{1} : y_factor[r], sum, width, y.row(r));
    }
  }
}

// N vectors, one after the other, whose lanes add up to a_r . b_r of rows from `first` on; those that do not
// exist repeat the last.
template <int N, class T, class From>
HWY_INLINE void row_products(const From* data, const Rows& a, Block<const T> b, int64_t first,
                             T* to) {
  const Full<T> d;
  const int64_t width = a.width;
  const From* x[N];
  const T* y[N];
  hn::Vec<Full<T>> sum[N][1];
  for_block<N, 1>([&](int i, int) HWY_ATTR {
    const int64_t row = HWY_MIN(first + i, a.count - 1);
    x[i] = data + row * a.stride;
    y[i] = b.row(row);
    sum[i][0] = hn::Zero(d);
  });
  for (int64_t c = 0; c < width; c += lanes<T>()) {
    for_block<N, 1>([&](int i, int) HWY_ATTR {
      sum[i][0] =
          hn::MulAdd(load_elements<T>(x[i] + c, width - c), hn::LoadU(d, y[i] + c), sum[i][0]);
    });
  }
  for_block<N, 1>([&](int i, int) HWY_ATTR { hn::StoreU(sum[i][0], d, to + i * lanes<T>()); });
}

// A vector of rows at a time, whose sums of lanes are then taken together.
template <class T>
void row_dots(const Rows& a, Block<const T> b, T* dots) {
  constexpr int64_t kLanes = lanes<T>();
  constexpr int kTogether = HWY_MIN(kLanes, 4);
  with_element_type<T>(a.dtype, [&](auto from) HWY_ATTR {
    const auto* data = static_cast<const decltype(from)*>(a.data);
    HWY_ALIGN T square[kLanes * kLanes] = {};
    for (int64_t first = 0; first < a.count; first += kLanes) {
      // Of less than a vector of rows, what the rest of the square adds up to is not kept.
      for (int64_t r = 0; r < HWY_MIN(kLanes, a.count - first); r += kTogether) {
        row_products<kTogether, T>(data, a, b, first + r, square + r * kLanes);
      }
      const auto add = [](auto x, auto y) HWY_ATTR { return hn::Add(x, y); };
      const auto old = load_elements<T>(dots + first, a.count - first);
      store_elements<T>(hn::Add(old, reduce_rows<T>(square, add)), dots + first, a.count - first);
    }
  });
}

// NV vectors of columns; `width` of them exist. Rows go to one of few sums, which do not wait for each other.
template <int NV, class T, class From>
HWY_INLINE void sum_columns(const From* x, int64_t stride, const T* factor, int64_t rows,
                            int64_t width, T* sum) {
  const Full<T> d;
  constexpr int kSums = NV > 2 ? 2 : 4;
  hn::Vec<Full<T>> total[kSums][NV];
  for_block<kSums, NV>([&](int r, int j) HWY_ATTR { total[r][j] = hn::Zero(d); });
  const auto add = [&](int64_t i, auto count) HWY_ATTR {
    for_block<count, NV>([&](int r, int j) HWY_ATTR {
      const auto f = hn::Set(d, factor == nullptr ? T{1} : factor[i + r]);
      const int64_t column = j * lanes<T>();
      const auto row = load_elements<T>(x + (i + r) * stride + column, width - column);
      total[r][j] = hn::MulAdd(f, row, total[r][j]);
    });
  };
  int64_t i = 0;
  for (; i + kSums <= rows; i += kSums) add(i, std::integral_constant<int, kSums>());
  for (; i < rows; ++i) add(i, std::integral_constant<int, 1>());
  for_block<1, NV>([&](int, int j) HWY_ATTR {
#pragma GCC unroll 4
    for (int r = 1; r < kSums; ++r) total[0][j] = hn::Add(total[0][j], total[r][j]);
    hn::StoreU(total[0][j], d, sum + j * lanes<T>());
  });
}

template <class T>
void sum_rows(const Rows& x, const T* factor, T* sum) {
  with_element_type<T>(x.dtype, [&](auto from) HWY_ATTR {
    const auto* data = static_cast<const decltype(from)*>(x.data);
    const int64_t all = (x.width + lanes<T>() - 1) / lanes<T>();
    for_even_shares(all, kPanelVectors, [&](int64_t vector, int64_t count) {
      const int64_t column = vector * lanes<T>();
      with_vectors(count, [&](auto vectors) {
        sum_columns<vectors, T>(data + column, x.stride, factor, x.count, x.width - column,
                                sum + column);
      });
    });
  });
}

template <class T>
void scale_rows(Block<T> x, int64_t rows, int64_t width, const T* factor) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    const auto f = hn::Set(d, factor[r]);
    for (int64_t i = 0; i < width; i += lanes<T>()) {
      hn::StoreU(hn::Mul(f, hn::LoadU(d, x.row(r) + i)), d, x.row(r) + i);
    }
  }
}

void round_rows(Block<const float> from, int64_t rows, int64_t width, uint16_t* to,
                int64_t stride) {
  const Full<float> d;
  const hn::Rebind<uint16_t, Full<float>> d16;
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* out = to + r * stride;
    int64_t i = 0;
    for (; i < width; i += lanes<float>()) {
      const int64_t count = width - i;
      auto x = hn::LoadU(d, from.row(r) + i);
      if (count < lanes<float>()) {
        x = hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(count)), x);
      }
      hn::StoreU(half_operands(x), d16, out + i);
    }
    for (; i < stride; i += lanes<float>()) hn::StoreU(hn::Zero(d16), d16, out + i);
  }
}

// Elements [f, f + lanes) of a row of bfloat16 as bits in 32-bit lanes, multiplied and rounded again.
HWY_INLINE hn::Vec<Full<uint32_t>> scaled_bits(const uint16_t* row, int64_t count, float factor) {
  const Full<float> d;
  const Full<uint32_t> du;
  if (row == nullptr) return hn::Zero(du);
  const auto x = load_elements<float>(reinterpret_cast<const bfloat16*>(row), count);
  if (factor == 1) return hn::ShiftRight<16>(hn::BitCast(du, x));
  return bfloat16_bits(d, hn::Mul(hn::Set(d, factor), x));
}

void pack_transposed(const Rows& x, const float* factor, uint16_t* to, int64_t stride) {
  const Full<float> d;
  const auto* data = static_cast<const uint16_t*>(x.data);
  const auto pair = [&](int64_t r, int64_t f) HWY_ATTR {
    const auto row = [&](int64_t i) HWY_ATTR {
      return scaled_bits(i < x.count ? data + i * x.stride + f : nullptr, x.width - f,
                         factor == nullptr || i >= x.count ? 1.0f : factor[i]);
    };
    return hn::BitCast(d, hn::Or(row(r), hn::ShiftLeft<16>(row(r + 1))));
  };
  for (int64_t r = 0; r < stride; r += 8) {
    for (int64_t f = 0; f < x.width; f += lanes<float>()) {
      const hn::Vec<Full<float>> pairs[4] = {pair(r, f), pair(r + 2, f), pair(r + 4, f),
                                             pair(r + 6, f)};
      transpose_group<float>(pairs, [&](int64_t c, const float* group) HWY_ATTR {
        if (f + c < x.width) hwy::CopyBytes<16>(group, to + (f + c) * stride + r);
      });
    }
  }
}

template <class T>
void add_parts(ChunkKernels<T>& table) {
  table.pack_rows = pack_rows<T>;
  table.run_dots = run_dots<T>;
  table.run_add = run_add<T>;
  table.row_dots = row_dots<T>;
  table.sum_rows = sum_rows<T>;
  table.scale_rows = scale_rows<T>;
  table.add_scaled = [](T factor, const T* x, int64_t width, T* y) {
    add_scaled(factor, x, width, y);
  };
}

}  // namespace

void add_chunk_row_parts(ChunkKernels<float>& f, ChunkKernels<double>& d) {
  add_parts(f);
  add_parts(d);
  f.round_rows = round_rows;
  f.pack_transposed = pack_transposed;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_CHUNK_PART(add_chunk_row_parts)
}  // namespace heed::kernels
#endif
