#include "kernels/skew.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/skew.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>

#include "kernels/by_isa.h"
#include "kernels/row_loops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

namespace {

// Keys [begin, end) of a row that have a column; key m stands in column shift + m.
struct RowOfTile {
  RowOfTile(const Skew& skew, int64_t r, int64_t keys)
      : shift(skew.first - r),
        begin(HWY_MIN(HWY_MAX(-shift, int64_t{0}), keys)),
        end(HWY_MAX(HWY_MIN(skew.columns - shift, keys), begin)) {}
  int64_t shift, begin, end;
};

template <class T>
void add(Block<T> s, int64_t rows, int64_t keys, const Skew& skew, Block<const T> products,
         T factor, const T* column_terms, const T* key_terms) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    const RowOfTile row(skew, r, keys);
    T* to = s.row(r) + row.begin;
    const T* products_of_row = products.row(r) + row.shift + row.begin;
    const T *columns = column_terms + row.shift + row.begin, *of_keys = key_terms + row.begin;
    for_each_vector<T>(row.end - row.begin, [&](int64_t i, auto part) HWY_ATTR {
      const auto terms = hn::Add(load_some<T>(part, columns + i), load_some<T>(part, of_keys + i));
      const auto product = load_some<T>(part, products_of_row + i);
      const auto sum = hn::MulAdd(product, hn::Set(d, factor), load_some<T>(part, to + i));
      store_some<T>(part, hn::Add(sum, terms), to + i);
    });
  }
}

template <class T>
void gather(Block<const T> ds, int64_t rows, int64_t keys, const Skew& skew, int64_t padded,
            Block<T> products, T* column_sums, T* key_sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const RowOfTile row(skew, r, keys);
    const T* from = ds.row(r) + row.begin;
    T* to = products.row(r);
    const int64_t first = HWY_MAX(row.shift + row.begin, int64_t{0});
    const int64_t count = row.end - row.begin;
    std::fill(to, to + HWY_MIN(first, padded), T{0});
    for_each_vector<T>(count, [&](int64_t i, auto part) HWY_ATTR {
      const auto x = load_some<T>(part, from + i);
      store_some<T>(part, x, to + first + i);
      T *column = column_sums + first + i, *key = key_sums + row.begin + i;
      store_some<T>(part, hn::Add(load_some<T>(part, column), x), column);
      store_some<T>(part, hn::Add(load_some<T>(part, key), x), key);
    });
    if (first + count < padded) std::fill(to + first + count, to + padded, T{0});
  }
}

}  // namespace

void make_skew(SkewKernels<float>& f, SkewKernels<double>& d) {
  f = {&add<float>, &gather<float>};
  d = {&add<double>, &gather<double>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLES(SkewKernels, skew_kernels, make_skew)

}  // namespace heed::kernels
#endif  // HWY_ONCE
