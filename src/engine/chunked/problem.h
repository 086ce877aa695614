// What a mechanism hands to the chunked engine. Per batch entry and query head a state runs along the
// tokens:
//
//   S_t  = decay S_{t-1} + phi(k_t)^T v_t        [F, Dv]
//   z_t  = z_{t-1} + psi(k_t)                    [F]      if key_sum
//   vs_t = vs_{t-1} + v_t                        [Dv]     if value_sum
//   num_t = phi(q_t) S_t,  den_t = psi(q_t) . z_t
//   out_t = scale (num_scale(den_t) num_t - sum_scale(den_t) vs_t)      scale: of the head
//
// causal: a query reads the state after its own token; else the state after all of them. Everything is
// float32 beside 16-bit tensors, float64 in float64 calls (T). phi and psi are what a RowMap makes of a
// row; without one they are the row itself.
//
// Where den is the product of phi(q) with a sum, differences hide in which the rounding of bfloat16 operands
// would show: between the two terms of a result with a value_sum, and between what num and den give to the
// gradients of queries and keys, if values are far from 0. Both are gone in the centred form, with any row m
//
//   C = S - z m^T
//   out = scale (num_scale (phi(q) C + den m) - sum_scale vs)
//
// Bfloat16 products work on C. With a value_sum over all N keys m is vs / N; then out has one row vs, and C
// stays as it is whatever row is subtracted from all phi(k_t). Else only gradients are made in this form, with
// the m that leaves the least of S, S^T z / |z|^2: each chunk of a causal call has that of the state before it.
// It stands in for m inside of a chunk too, where G . v_j - G . m is made in T before it is rounded.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/operands.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::chunked {

/// Where rows of q or k stand: `head` of their own tensor, `token` is row 0's index in it.
struct RowsAt {
  int64_t batch = 0, head = 0, token = 0;
};

/// Rows of q or k as features of the state. Const: chunks are visited in parallel.
template <class T>
class RowMap {
 public:
  virtual ~RowMap() = default;
  /// Whether products may read the features of bfloat16 rows as bfloat16 numbers: because they are such
  /// numbers, or because the states are centred.
  virtual bool has_halves() const { return false; }
  /// Then: all features of such rows, to.width of them, less their offsets.
  virtual void map_half(const RowsAt& /*at*/, const kernels::Rows& /*x*/,
                        const kernels::RowsOut& /*to*/) const {}
  /// Keys of centred states: numbers [F] near the features of a head, so that little is lost by rounding what
  /// the features differ from them. Null: 0.
  virtual const T* offsets(const RowsAt& /*at*/) const { return nullptr; }
  /// to[r] = features [first, first + count) of row r, and zeros behind them up to to.stride. `first` is a
  /// multiple of 16 (of kFeatureTile with a polynomial).
  virtual void map(const RowsAt& at, const kernels::Rows& x, int64_t first, int64_t count,
                   kernels::Block<T> to) const = 0;
  /// Given what the map of the sums makes of the rows, in x: turns it into these features if that is
  /// shorter than `map`, else returns false.
  virtual bool from_sums(const RowsAt& /*at*/, int64_t /*rows*/, int64_t /*first*/,
                         int64_t /*count*/, kernels::Block<T> /*x*/) const {
    return false;
  }
  /// into[r] = what gradient[r] (of those features) becomes by `ends`, times their derivative with respect to
  /// row r; `add`: added to what is there. `into` is of T, or of x's type. With a polynomial it is of T,
  /// always added to, and rows end as they are.
  virtual void pull(const RowsAt& at, const kernels::Rows& x, int64_t first, int64_t count,
                    kernels::Block<const T> gradient, const kernels::RowEnds<T>& ends, bool add,
                    const kernels::RowsOut& into) const = 0;
};

/// Maps of q and k; null: the rows as they are.
template <class T>
struct RowMaps {
  const RowMap<T>* q = nullptr;
  const RowMap<T>* k = nullptr;
};

/// With a polynomial, where features may be very many, maps are asked for this many together.
inline constexpr int64_t kFeatureTile = 512;

/// How a row ends, as a function of its denominator, with the derivatives.
struct ReadOut {
  double num_scale = 1, sum_scale = 0;
  double num_slope = 0, sum_slope = 0;
};

/// Rows of one query head that end together: row r sees tokens + r * step positions, counted from the
/// first of this call.
struct EndingRows {
  int64_t batch = 0, tokens = 0, step = 0, count = 0;
};
/// ReadOut of many rows.
struct ReadOuts {
  double *num_scale = nullptr, *sum_scale = nullptr, *num_slope = nullptr, *sum_slope = nullptr;
};
/// How they end, given their denominators.
template <class T>
using ReadOutRows =
    std::function<void(const EndingRows& at, const T* denominators, const ReadOuts& rows)>;

/// Rows that each end as row(batch, tokens, denominator) says.
template <class T, class Row>
ReadOutRows<T> each_row(Row row) {
  return [row](const EndingRows& at, const T* denominators, const ReadOuts& rows) {
    const ReadOuts to = rows;  // not known to the compiler: stores leave it as it is
    for (int64_t r = 0; r < at.count; ++r) {
      const ReadOut end =
          row(at.batch, at.tokens + r * at.step, static_cast<double>(denominators[r]));
      to.num_scale[r] = end.num_scale;
      to.sum_scale[r] = end.sum_scale;
      to.num_slope[r] = end.num_slope;
      to.sum_slope[r] = end.sum_slope;
    }
  };
}

template <class T>
struct Policy {
  RowMaps<T> maps;                 // phi
  std::optional<RowMaps<T>> sums;  // psi; none: phi
  int64_t features = 0;            // F
  std::vector<double> slopes;      // per query head: decay exp(-slope) a token; empty: none
  bool key_sum = false;
  bool value_sum = false;
  ReadOutRows<T> read_out;     // only with key_sum
  std::vector<double> scales;  // per query head: of the result, with read_out; empty: 1
  /// phi(q) . phi(k) is this Taylor polynomial of exp of scale * q . k, psi is phi, and there are key_sum
  /// and read_out.
  struct Polynomial {
    int order = 0;
    double scale = 1;
  };
  std::optional<Polynomial> polynomial;
};

/// The tensors of a state, or of its gradient. [B,H,F,Dv], [B,H,F], [B,H,Dv] of the statistics type, any
/// strides. Undefined: zero where it is read, not wanted where it is written.
struct State {
  Tensor sums = {}, keys = {}, values = {};
  bool defined() const { return sums.defined() || keys.defined() || values.defined(); }
};

/// A checked call: q [B,H,Lq,D], k [B,Hkv,Lk,D], v [B,Hkv,Lk,Dv]; query head h reads head h/(H/Hkv).
template <class T>
struct Problem {
  Tensor q, k, v;
  bool causal = true;            // aligned to the end of the keys; queries before all keys give 0
  std::vector<int64_t> lengths;  // keys that exist, per batch entry; empty: all
  State initial;
  State total;  // what the forward of a call that is not causal gave: spares its backward a sum
  Policy<T> policy;
};

/// Writes out [B,H,Lq,Dv] and the state after all tokens.
template <class T>
void forward(const Problem<T>& problem, const Tensor& out, const State& last,
             const RunOptions& run);

struct Gradients {
  Tensor q, k, v;  // of the inputs' type
  State initial;
  std::vector<double>*slopes = nullptr, *scales = nullptr;  // summed over the batch
};

/// Writes the gradients that are wanted, given those of out and of the last state.
template <class T>
void backward(const Problem<T>& problem, const Tensor& out_gradient, const State& last_gradient,
              const Gradients& gradients, const RunOptions& run);

/// Results of inputs q, k and v: of their types, with a unit stride in the last dimension. out [B,H,Lq,Dv] and
/// its gradient have to be there.
void check_out(const char* op, const Tensor& out, const Tensor& q, const Tensor& v);
struct InputGradients {
  const Tensor &q, &k, &v;
};
void check_gradients(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& out_gradient, const InputGradients& to);
/// Of the sums over keys and values, [B,H,F,Dv], and over keys alone, [B,H,F].
Dims sums_shape(const Tensor& q, const Tensor& v, int64_t features);
Dims key_sums_shape(const Tensor& q, int64_t features);
/// Both, as far as they are given, as `s` and `z` of what messages call `of`.
void check_sums(const char* op, const std::string& of, const Tensor& s, const Tensor& z,
                const Tensor& q, const Tensor& v, int64_t features);
/// A tensor [H] of finite numbers that are not negative.
std::vector<double> check_slopes(const char* op, const Tensor& slopes, int64_t heads);
/// Throws Error where a state is given to a causal call with more queries than keys: what the first
/// queries see of it is unknown.
void check_alignment(const char* op, bool causal, bool has_state, int64_t queries, int64_t keys);

}  // namespace heed::chunked
