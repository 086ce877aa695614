// Products of operands as they lie in scratch memory: the left one by any strides (it is broadcast), the
// right one and the result by rows.
#include "kernels/matrix.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matrix.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/by_isa.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
void load_rows(const Rows& from, Block<T> to) {
  with_any_element_type(from.dtype, [&](auto element) HWY_ATTR {
    using From = decltype(element);
    for (int64_t r = 0; r < from.count; ++r) {
      load_row(static_cast<const From*>(from.data) + r * from.stride, from.width, to.row(r));
    }
  });
}

template <class T>
void store_rows(Block<const T> from, const RowsOut& to) {
  with_any_element_type(to.dtype, [&](auto element) HWY_ATTR {
    using To = decltype(element);
    for (int64_t r = 0; r < to.count; ++r) {
      store_row(from.row(r), to.width, static_cast<To*>(to.data) + r * to.stride);
    }
  });
}

template <class T>
void transpose(Block<const T> from, int64_t rows, int64_t columns, Block<T> to) {
  const Full<T> d;
  constexpr int64_t kGroup = 16 / sizeof(T);  // rows that become neighbours in one 16-byte store
  const int64_t padded = round_up(rows, lanes<T>());
  for (int64_t r = 0; r < padded; r += kGroup) {
    for (int64_t c = 0; c < columns; c += lanes<T>()) {
      const int64_t n = HWY_MIN(lanes<T>(), columns - c);
      hn::Vec<Full<T>> group[kGroup];
      for (int64_t i = 0; i < kGroup; ++i) {
        const T* p = from.row(r + i) + c;
        group[i] = r + i >= rows ? hn::Zero(d) : load_elements<T>(p, n);
      }
      transpose_group<T>(group, [&](int64_t i, const T* column) HWY_ATTR {
        if (i < n) hwy::CopyBytes<16>(column, to.row(c + i) + r);
      });
    }
  }
}

template <int MR, int NV, class T>
HWY_NOINLINE void multiply_block(Factor<T> a, Block<const T> b, int64_t depth, Block<T> c,
                                 bool add) {
  const Full<T> d;
  hn::Vec<Full<T>> sum[MR][NV];
  if (add) {
    for_block<MR, NV>([&](int r, int j)
                          HWY_ATTR { sum[r][j] = hn::LoadU(d, c.row(r) + j * lanes<T>()); });
  } else {
    for_block<MR, NV>([&](int r, int j) HWY_ATTR { sum[r][j] = hn::Zero(d); });
  }
  add_product<MR, NV, T>(a.data, a.row, a.depth, b.data, b.stride, depth, sum);
  for_block<MR, NV>([&](int r, int j)
                        HWY_ATTR { hn::StoreU(sum[r][j], d, c.row(r) + j * lanes<T>()); });
}

template <class T>
void multiply(Factor<T> a, Block<const T> b, int64_t depth, Block<T> c, int64_t rows,
              int64_t columns, bool add) {
  // Rows of b whose panel stays in the first-level cache while all rows of a pass over them.
  constexpr int64_t kRun =
      16 * 1024 / (kPanelVectors * lanes<T>() * static_cast<int64_t>(sizeof(T)));
  for_even_shares(round_up(columns, lanes<T>()) / lanes<T>(), kPanelVectors,
                  [&](int64_t vector, int64_t count) {
                    const int64_t column = vector * lanes<T>();
                    int64_t k = 0;
                    do {  // once even without depth: c must become 0
                      const int64_t run = HWY_MIN(kRun, depth - k);
                      const Factor<T> left{a.data + k * a.depth, a.row, a.depth};
                      const Block<const T> right{b.data + k * b.stride + column, b.stride};
                      const Block<T> to{c.data + column, c.stride};
                      const bool keep = add || k > 0;
                      with_vectors(count, [&](auto vectors) {
                        for_row_blocks<vectors>(rows, [&](int64_t r, auto height) {
                          multiply_block<height, vectors, T>(
                              {left.data + r * left.row, left.row, left.depth}, right, run,
                              {to.row(r), to.stride}, keep);
                        });
                      });
                      k += run;
                    } while (k < depth);
                  });
}

template <class T>
void scale(T* x, const T* y, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    store_some<T>(all, hn::Mul(load_some<T>(all, x + i), load_some<T>(all, y + i)), x + i);
  });
}

template <class T>
void add(T* x, const T* y, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    store_some<T>(all, hn::Add(load_some<T>(all, x + i), load_some<T>(all, y + i)), x + i);
  });
}

template <class T>
void add_products(T* x, const T* y, const T* z, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    const auto sum =
        hn::MulAdd(load_some<T>(all, y + i), load_some<T>(all, z + i), load_some<T>(all, x + i));
    store_some<T>(all, sum, x + i);
  });
}

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  const Full<T> d;
  auto sum = hn::Zero(d);
  for_each_vector<T>(n, [&](int64_t i, auto all) HWY_ATTR {
    sum = hn::MulAdd(load_some<T>(all, x + i), load_some<T>(all, y + i), sum);
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

template <class T>
MatrixKernels<T> table() {
  return {.lanes = lanes<T>(),
          .load_rows = load_rows<T>,
          .store_rows = store_rows<T>,
          .transpose = transpose<T>,
          .multiply = multiply<T>,
          .scale = scale<T>,
          .add = add<T>,
          .add_products = add_products<T>,
          .dot = dot<T>};
}

}  // namespace

void fill_matrix_kernels(MatrixKernels<float>& f, MatrixKernels<double>& d) {
  f = table<float>();
  d = table<double>();
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(MatrixKernels, matrix_kernels, fill_matrix_kernels)

}  // namespace heed::kernels
#endif
