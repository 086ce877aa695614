// The vector code of one chunk of a sequence that carries a running state, beside the products of tile.h.
// A state is a matrix S [features, value dim] with a few row vectors; a chunk is some tens of tokens.
//
//   pack_rows        a block of T from rows of any type, with a factor per row
//   weigh            W[r,m] = (S[r,m] - less[r or m]) decay[m-r] column[m], exactly 0 outside the ranges
//   outer            S' = decay(S) + X^T Y                       the update of a state by a chunk
//   read             O = factor (X S) + added                    what the rows of a chunk read of a state
//   step             S = decay(S) + k^T v, o = q S               one token; reads and writes S once
//   run_dots, run_add                                            sums that run along the rows
//
// T is float (float32, bfloat16 and float16 calls) or double (float64 calls).
#pragma once
#include <cstdint>

#include "kernels/tile.h"

namespace heed::kernels {

/// What time does to a state: S becomes S * factor, plus S again if `keep`. A decay near 1 is kept as
/// factor = decay - 1, exact to T: rounded decays near 1 would compound over the chunks.
template <class T>
struct Decay {
  T factor = 1;
  bool keep = false;
};

/// Factors of a weight beside its score, and what is taken off the score before; null: 1, and 0. All but
/// less_of_row is readable wherever whole vectors reach.
template <class T>
struct WeightFactors {
  const T* decay = nullptr;  // row r, column m: decay[m - r]
  const T* column = nullptr;
  const T *less_of_row = nullptr, *less_of_column = nullptr;
};

/// Tokens [first, last) of a chunk that have a row; row r of a block is token first + r.
struct TokenRange {
  int64_t first = 0, last = 0;
};

template <class T>
struct ChunkKernels {
  /// Rows times factor (null: 1), padded with zeros to `stride` columns (a multiple of dim_multiple).
  void (*pack_rows)(const Rows& x, const T* factor, Block<T> to) = nullptr;
  /// Weights to `weights`: T, or bfloat16 in pairs of up to 32 columns (weigh_half).
  void (*weigh)(Block<T> s, int64_t rows, int64_t columns, const KeyRange* ranges,
                const WeightFactors<T>& factors, void* weights, int64_t stride) = nullptr;
  void (*weigh_half)(Block<T> s, int64_t rows, int64_t columns, const KeyRange* ranges,
                     const WeightFactors<T>& factors, void* weights, int64_t stride) = nullptr;

  /// `ahead` (or null) of this product and the next advances with the work.
  /// to [rows, columns] = decay(from) + X^T Y with X [depth, rows], Y [depth, columns]. `to` may be
  /// `from`; `from` without data is zero. columns is a multiple of dim_multiple.
  void (*outer)(Block<const T> x, Block<const T> y, int64_t depth, int64_t rows, int64_t columns,
                const Decay<T>& decay, Block<const T> from, Block<T> to,
                ReadAhead* ahead) = nullptr;
  /// O [rows, columns] = X S as its rows end, with X [rows, depth], S [depth, columns]; columns as above.
  void (*read)(Block<const T> x, Block<const T> s, int64_t rows, int64_t depth, int64_t columns,
               const RowEnds<T>& ends, Block<T> o, ReadAhead* ahead) = nullptr;
  /// to = decay(from) + added, elementwise; `to` may be `from`.
  void (*advance)(const T* from, const T* added, int64_t count, const Decay<T>& decay,
                  T* to) = nullptr;
  /// to[c] = decay(from[c]) + k v^T and o[c] = q . to[., c] over `features` rows and the given columns
  /// (any number). `to` may be `from`; without data it is not written.
  void (*step)(const T* q, const T* k, const T* v, int64_t features, int64_t columns,
               const Decay<T>& decay, Block<const T> from, Block<T> to, T* o) = nullptr;

  /// sum += x_factor x_t at every token of x, then dots[r] = y_r . sum at every token of y, for tokens
  /// 0, 1, ... (x before y at the same token). Null factors are 1; widths are multiples of dim_multiple.
  void (*run_dots)(Block<const T> x, TokenRange x_tokens, Block<const T> y, TokenRange y_tokens,
                   int64_t width, T* sum, T* dots) = nullptr;
  /// The same with y_r += y_factor[r] sum; backwards from the last token to 0 if `reverse`.
  void (*run_add)(Block<const T> x, const T* x_factor, TokenRange x_tokens, Block<T> y,
                  const T* y_factor, TokenRange y_tokens, int64_t width, bool reverse,
                  T* sum) = nullptr;
  /// dots[r] += a_r . b_r, and a row of b for all when its stride is 0. Rows of a as they lie, those of b
  /// readable in whole vectors.
  void (*row_dots)(const Rows& a, Block<const T> b, T* dots) = nullptr;
  /// sum = sum_r factor[r] x_r in whole vectors, of rows as they lie; a null factor is 1.
  void (*sum_rows)(const Rows& x, const T* factor, T* sum) = nullptr;
  /// x_r *= factor[r].
  void (*scale_rows)(Block<T> x, int64_t rows, int64_t width, const T* factor) = nullptr;
  /// y += factor x
  void (*add_scaled)(T factor, const T* x, int64_t width, T* y) = nullptr;

  /// Scores x = scale * s become the Taylor polynomial of exp, of degree `order`, in `p` and its
  /// derivative with respect to s in `s` itself; exactly 0 outside the ranges.
  void (*polynomial)(Block<T> s, Block<T> p, int64_t rows, int64_t columns, const KeyRange* ranges,
                     T scale, int order) = nullptr;
  /// In the ranges s = s (factor g + added), where factor and added belong to rows, or to columns.
  void (*chain)(Block<T> s, Block<const T> g, int64_t rows, int64_t columns, const KeyRange* ranges,
                const T* factor, const T* added, bool by_column) = nullptr;
  /// sums[r] += sum over the range of a b (b without data: of a).
  void (*range_sums)(Block<const T> a, Block<const T> b, int64_t rows, const KeyRange* ranges,
                     T* sums) = nullptr;
  /// Sum over the ranges of (distance + r - m) decay[m - r] a[r,m] b[r,m].
  double (*distance_sum)(Block<const T> a, Block<const T> b, int64_t rows, const KeyRange* ranges,
                         int64_t distance, const T* decay) = nullptr;

  /// bfloat16 operands from T and from each other (float tables on AVX-512 only):
  /// rows of a block, rounded; columns [width, stride) are zero.
  void (*round_rows)(Block<const T> from, int64_t rows, int64_t width, uint16_t* to,
                     int64_t stride) = nullptr;
  /// X^T as rows [width][stride] of bfloat16, zero behind x.count; x is bfloat16, with a factor per row.
  void (*pack_transposed)(const Rows& x, const T* factor, uint16_t* to, int64_t stride) = nullptr;
};

template <class T>
const ChunkKernels<T>& chunk_kernels(Isa isa);

}  // namespace heed::kernels
