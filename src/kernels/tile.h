// The vector code of one tile: a few query rows against a few hundred keys. Everything here works on
// tiles handed in by an engine; which tiles exist and what a mechanism means is decided above.
//
//   pack_queries, pack_keys, pack_values   operands in the layout the products want
//   scores       S[r,m]  = sum_e Q[r,e] K[m,e]
//   weights      P[r,m]  = softmax or sigmoid of the shaped score, with running row statistics
//   accumulate   O[r,f]  = carry[r] O[r,f] + sum_m P[r,m] V[m,f]
//   finish       out[r]  = factor[r] O[r], converted
//   dot_rows, add_rows                     `scores` and `accumulate` for few rows, straight from unpacked memory
//
// Backward, from the scores S and dP[r,m] = sum_f dO[r,f] V[m,f] (both by `scores`) of a tile:
//   gradients           S becomes the weights W, dP becomes dS, the gradient of the shaped score
//   accumulate_columns  C[f,m] += sum_r X[r,f] W[r,m]   (dV^T from dO and W, dK^T from Q and dS)
//   accumulate          dQ[r,e] += sum_m dS[r,m] K[m,e], with keys packed by pack_values
//   finish_columns      out[m,f] = factor C[f,m], converted
//   spread_rows         out[m,f] = factor sum_r W[r,m] X[r,f], converted: both in one where all rows are there
//
// T is float (float32, bfloat16 and float16 calls) or double (float64 calls).
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/read_ahead.h"

namespace heed::kernels {

/// Rows of one tensor: row r starts at data + offset(r) elements, `width` elements are contiguous.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t width = 0;
  const int64_t* offsets = nullptr;  // of each row; null: evenly spaced. Kernels of few rows and
                                     // of chunks do not take them
  int64_t offset(int64_t r) const { return offsets == nullptr ? r * stride : offsets[r]; }
};

/// Where rows of a result go: row r at data + r * stride elements.
struct RowsOut {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t width = 0;
};

/// The offset of a row that does not exist, in memory that is written.
inline constexpr int64_t kNoRow = std::numeric_limits<int64_t>::min();

/// Keys [begin, end) of the tile that a row sees.
struct KeyRange {
  int32_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

/// What a call does to its scaled scores before bias and masks, in natural units.
template <class T>
struct ScoreCaps {
  T softcap = 0;                                // > 0: x becomes softcap tanh(x / softcap)
  T most = std::numeric_limits<T>::infinity();  // then min(x, most)
};

/// A matrix in scratch memory.
template <class T>
struct Block {
  T* data = nullptr;
  int64_t stride = 0;
  T* row(int64_t r) const { return data + r * stride; }
  operator Block<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, stride};
  }
};

/// Weights of half operands may be written over scores this many rows before their own: first-level caches
/// do not hold both.
inline constexpr int64_t kWeightRowsBefore = 16;

enum class WeightKind { softmax, sigmoid, polynomial };
inline constexpr int kWeightKinds = 3;

/// How the scores of a tile become weights. Scores are used as t = s * scale + bias - slope *
/// |distance|: softmax 2^(t - pivot), sigmoid 1 / (1 + 2^-t), polynomial sum over n <= order of t^n / n!
template <class T>
struct WeightShape {
  T scale = 1;    // never negative: the engine negates the queries instead
  int order = 0;  // polynomial only
  T bias = 0;     // sigmoid only: a constant moves no softmax
  T slope = 0;    // ALiBi
  int64_t distance =
      0;  // position of row 0 minus position of key 0; row r, key m: distance + r - m
};

/// Row statistics of a running softmax, in units of log2: the row's pivot (its largest score so far, with
/// half operands about that), the sum of its weights relative to the pivot, and the factor that the last
/// tile put on earlier sums. Sigmoid touches none of them, polynomial adds its weights to the sum and
/// carries all of it.
template <class T>
struct RowState {
  T* pivot = nullptr;  // -inf until the row has seen a key
  T* sum = nullptr;
  T* carry = nullptr;
};

/// Pivots of a backward were log-sum-exps of T, rounded twice: they are wrong by a few units in the last
/// place, and so is every weight. No weight is more than 1. From `kLarge` on, where a unit is an eighth of
/// a power of two, all that lies within the error of a pivot has weight 1: one key far above the others,
/// as it mostly is there, is met exactly.
template <class T>
struct RoundedPivot {
  static constexpr T kLarge = sizeof(T) == 8 ? T{0x1p49} : T{0x1p20};
  static constexpr T kError = 4 * std::numeric_limits<T>::epsilon();  // relative
};

/// Which weights are dropped: those of query `row` + r of a head and key `key` + m whose word, of Philox with
/// this seed and counter ((key + m) / 4, row + r, head, batch), is below the limit.
struct Dropout {
  uint64_t seed = 0;
  uint32_t limit = 0;  // the probability times 2^32
  uint32_t head = 0, batch = 0;
  int64_t row = 0, key = 0;  // of element (0, 0) of a tile
};

/// Packed operands of a tile.
struct TileOperands {
  const void *queries = nullptr, *keys = nullptr, *values = nullptr;
  int64_t rows = 0, key_count = 0, width = 0, value_width = 0;
  const KeyRange* ranges = nullptr;  // null: all keys
};

/// Row r of a product becomes factor[r] times itself plus added_factor[r] times the row `added`.
/// Without a factor it is 1, without a row nothing is added.
template <class T>
struct RowEnds {
  const T* factor = nullptr;
  const T* added = nullptr;
  const T* added_factor = nullptr;
};

template <class T>
struct TileKernels {
  const char* name = "";
  /// Weights and packed operands are bfloat16 (pairs) instead of T.
  bool half_operands = false;  // "half" means bfloat16 wherever it stands in this room
  /// Query tiles hold a multiple of this many rows; rows of scratch blocks beyond the tile are padding.
  int64_t row_multiple = 1;
  /// Keys per tile are padded to this many columns, head dims (Dv) of accumulators to dim_multiple.
  int64_t key_multiple = 1;
  int64_t dim_multiple = 1;

  /// Runs `body`, in which calls from this thread find the unit for products ready; null where there is
  /// nothing to be done. Products work without it, more slowly.
  void (*run_ready)(const std::function<void()>& body) = nullptr;

  /// Of a multiple of row_multiple rows.
  int64_t (*query_bytes)(int64_t rows, int64_t width) = nullptr;
  int64_t (*key_bytes)(int64_t keys, int64_t width) = nullptr;
  int64_t (*value_bytes)(int64_t keys, int64_t width) = nullptr;
  void (*pack_queries)(const Rows& q, bool negate, void* packed) = nullptr;
  void (*pack_keys)(const Rows& k, void* packed) = nullptr;
  /// Returns false if an element is infinite or NaN.
  bool (*pack_values)(const Rows& v, void* packed) = nullptr;

  /// `ranges` (one per padded row, or null: all keys) limits the work; what lies outside is undefined.
  /// `ahead` (or null) advances with the work.
  void (*scores)(const void* queries, int64_t rows, const void* keys, int64_t key_count,
                 int64_t width, const KeyRange* ranges, Block<T> s, ReadAhead* ahead) = nullptr;
  /// Weights go to `weights` (T, may be `s` itself; or bfloat16 with half_operands, as softmax weights
  /// at most 2^20 in sum relative to a pivot that may be below the largest score), exactly 0 outside
  /// a row's range, in the padding columns and where a score is -inf (a mask, at any scale). A NaN score
  /// has weight NaN (not in a polynomial of order 0, which looks at no score). Scores outside the range
  /// may be overwritten.
  void (*weights[kWeightKinds])(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                                const WeightShape<T>& shape, const RowState<T>& state,
                                void* weights, int64_t weight_stride) = {};
  void (*accumulate)(const void* weights, int64_t weight_stride, int64_t rows, const void* values,
                     int64_t key_count, int64_t width, const KeyRange* ranges, const T* carry,
                     Block<T> o, ReadAhead* ahead) = nullptr;
  /// `scores`, `weights` and `accumulate` in one, by chunks of keys that stay in the first-level cache; null
  /// where nothing is won by it. For shapes without a slope whose scale is finite and above 0.
  void (*attend[kWeightKinds])(const TileOperands& x, const WeightShape<T>& shape,
                               const RowState<T>& state, Block<T> o, ReadAhead* ahead) = {};

  /// s = caps(s * scale) in place, within the ranges. If `slope` has data it receives the derivative of
  /// the result with respect to s * scale.
  void (*cap_scores)(Block<T> s, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
                     const ScoreCaps<T>& caps, Block<T> slope) = nullptr;
  /// Parallax: second = weights * (t - shift), both as `weights` writes them with one stride, and
  /// sum = carry * sum + the row sum of second; exactly 0 outside the ranges. `second` may be `t` or
  /// `weights` itself where it has their type. A row's shift is -inf until a tile has a weight, whose
  /// mean of t it then becomes: the result of a row does not depend on it, what cancels in it does.
  void (*second_weights)(const void* weights, int64_t weight_stride, Block<T> t, int64_t rows,
                         int64_t key_count, const KeyRange* ranges, const T* carry, T* shift,
                         T* sum, void* second) = nullptr;
  /// Dropped weights, as `weights` wrote them, become 0; the factor of the others is left to the caller.
  void (*drop_out)(const Dropout& which, int64_t rows, int64_t key_count, const KeyRange* ranges,
                   void* weights, int64_t weight_stride) = nullptr;
  /// A block of T as the operand of `accumulate`: bfloat16 with half_operands, else null (used as it is).
  void (*round_weights)(Block<const T> from, int64_t rows, int64_t key_count, void* to,
                        int64_t to_stride) = nullptr;

  /// out[r] = factor[r] o[r], rounded to out's type; a null factor is 1.
  void (*finish)(Block<const T> o, int64_t rows, int64_t width, const T* factor, void* out,
                 DType out_dtype, int64_t out_stride) = nullptr;

  /// `accumulate` to zero and rows of bfloat16 as they end in one; null where nothing is won by it. An
  /// added row is padded to dim_multiple.
  void (*product)(const void* weights, int64_t weight_stride, const void* values, int64_t key_count,
                  const RowEnds<T>& ends, const RowsOut& out, ReadAhead* ahead) = nullptr;

  /// Backward. s holds raw scores and becomes W (softmax: 2^(t - pivot[r]), at most 1, see RoundedPivot;
  /// an infinite pivot: all 0), dp becomes dS in natural units of the shaped score: softmax
  /// W (dp + shift[r]); sigmoid W (1 - W) dp; polynomial W' (dp + shift[r]) with the derivative W'. Both
  /// exactly 0 outside the ranges, where s is -inf whatever dp is, and in the padding columns
  /// (half_operands: those of the rounded operands).
  void (*gradients[kWeightKinds])(Block<T> s, Block<T> dp, int64_t rows, int64_t key_count,
                                  const KeyRange* ranges, const WeightShape<T>& shape,
                                  const T* pivot, const T* shift) = {};
  /// Parallax, softmax weights p: from raw scores s, t = r . k and a = dO . V of a tile to
  ///   s = p (1 + t_mean - t)                                     what multiplies dO in dV
  ///   a = p (a - dot_out + (t_mean - t) (a - dot_mean))          dS
  ///   t = -p (a - dot_mean)                                      dT
  /// with row vectors t_mean, dot_out = dO . out, dot_mean = dO . v_mean; zeros as above.
  void (*parallax_gradients)(Block<T> s, Block<T> t, Block<T> a, int64_t rows, int64_t key_count,
                             const KeyRange* ranges, const WeightShape<T>& shape, const T* pivot,
                             const T* t_mean, const T* dot_out, const T* dot_mean) = nullptr;
  /// Within the ranges, `kept` or 0 where a weight is dropped.
  void (*dropout_factors)(const Dropout& which, int64_t rows, int64_t key_count,
                          const KeyRange* ranges, T kept, Block<T> factors) = nullptr;
  /// x = scale x factors within the ranges (null: scale x), 0 where either is 0 whatever the other.
  void (*multiply)(Block<T> x, int64_t rows, int64_t key_count, const KeyRange* ranges, T scale,
                   Block<const T> factors) = nullptr;
  /// Sums over a tile, in float64, within the ranges: sum += ds, weighted += ds |distance + r - m|.
  void (*sum_tile)(Block<const T> ds, int64_t rows, int64_t key_count, const KeyRange* ranges,
                   int64_t distance, double& sum, double& weighted) = nullptr;
  /// X of accumulate_columns: rows of Q or dO.
  int64_t (*column_bytes)(int64_t rows, int64_t width) = nullptr;
  void (*pack_columns)(const Rows& x, bool negate, void* packed) = nullptr;
  /// A block of T as the second operand of accumulate_columns: with half_operands pairs of bfloat16,
  /// [row / 2][key], an odd last row paired with zeros. `to_stride` counts pairs. Null: used as it is.
  void (*pair_weights)(Block<const T> from, int64_t rows, int64_t key_count, void* to,
                       int64_t to_stride) = nullptr;
  /// C [width padded to column_multiple, keys padded to key_multiple]; `weights` are exactly 0 outside the ranges, which only
  /// save work. Rows beyond `rows` up to row_multiple are not read or count as zero.
  void (*accumulate_columns)(const void* packed, int64_t rows, int64_t width, const void* weights,
                             int64_t weight_stride, int64_t key_count, const KeyRange* ranges,
                             Block<T> c) = nullptr;
  int64_t column_multiple = 1;
  /// `out_offsets` as those of Rows, kNoRow: not written.
  void (*finish_columns)(Block<T> c, int64_t keys, int64_t width, T factor, void* out,
                         DType out_dtype, int64_t out_stride, const int64_t* out_offsets) = nullptr;

  /// Few rows: queries are T [rows, width padded to dim_multiple].
  void (*dot_rows)(Block<const T> queries, int64_t rows, const Rows& k, Block<T> s) = nullptr;
  void (*add_rows)(Block<const T> weights, int64_t rows, const Rows& v, const T* carry,
                   Block<T> o) = nullptr;
  /// out[m] = factor sum over rows of weights[r][m] x[r], converted. Rows of x are padded to dim_multiple.
  void (*spread_rows)(Block<const T> weights, Block<const T> x, int64_t rows, T factor,
                      const RowsOut& out) = nullptr;
};

/// Body with the unit for the products of `kernels` ready.
template <class T, class Body>
void with_unit(const TileKernels<T>& kernels, Body&& body) {
  if (kernels.run_ready == nullptr) return body();
  kernels.run_ready(body);
}

/// The kernels of one instruction set; those of a weaker one where it adds nothing for T.
template <class T>
const TileKernels<T>& tile_kernels(Isa isa);
/// With operands of bfloat16; null where the instruction set has no products of them.
const TileKernels<float>* half_tile_kernels(Isa isa);
/// Either, as a path that was chosen says.
template <class T>
const TileKernels<T>& tile_kernels(Isa isa, bool half_operands) {
  if constexpr (sizeof(T) == 4) {
    if (half_operands) return *half_tile_kernels(isa);
  }
  return tile_kernels<T>(isa);
}

}  // namespace heed::kernels
