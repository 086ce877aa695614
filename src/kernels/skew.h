// Scores by relative position. A tile of query rows meets the rows of a table in one product, with a
// column for every distance that occurs in the tile; key m of row r stands in column first - r + m, so
// that each row is shifted by one against the row before.
#pragma once
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

struct Skew {
  int64_t first = 0;    // column of row 0 and key 0; may be negative
  int64_t columns = 0;  // columns [0, columns) exist; keys of others are passed over
};

template <class T>
struct SkewKernels {
  /// s[r][m] += factor * products[r][c] + column_terms[c] + key_terms[m] for the column c of (r, m).
  void (*add)(Block<T> s, int64_t rows, int64_t keys, const Skew& skew, Block<const T> products,
              T factor, const T* column_terms, const T* key_terms) = nullptr;
  /// The transpose: products[r][c] = ds[r][m], 0 in the other columns up to `padded`;
  /// column_sums[c] += sum over r of them, key_sums[m] += sum over r of ds[r][m].
  void (*gather)(Block<const T> ds, int64_t rows, int64_t keys, const Skew& skew, int64_t padded,
                 Block<T> products, T* column_sums, T* key_sums) = nullptr;
};

template <class T>
const SkewKernels<T>& skew_kernels(Isa isa);

}  // namespace heed::kernels
