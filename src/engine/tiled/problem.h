// What a mechanism hands to the tiled engine: sequences with their plans, a policy, and score terms.
//
// Forward and backward visit tiles of query rows x keys. In each tile
//   S = caps(scale * q k^T), bias and ALiBi of the policy, terms.shape(S)
//   W = weights(S), dropped out
//   out = W v, divided by the row's sum (softmax)
// The second stream (Parallax) adds T = r k^T and sums W T beside W.
#pragma once
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "engine/operands.h"
#include "engine/tiled/plan.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::tiled {

/// Finite terms of scores beyond this count as this: weights are powers of two, and a score times
/// log2(e) has to stay finite, with room for what lies beside the term.
template <class T>
inline constexpr T kMostTerm = std::numeric_limits<T>::max() * static_cast<T>(0.675);

/// A tile of one query head: rows [row, row + rows) against keys [key, key + keys).
struct TileAt {
  int64_t sequence = 0;  // index into Problem::sequences
  int64_t head = 0;      // query head
  int64_t row = 0, rows = 0;
  int64_t key = 0, keys = 0;
};

/// How much of a tile inside the plan's intervals is seen: nothing (it costs nothing), everything, a
/// range of keys per row, or what `shape` leaves.
enum class Visit { none, whole, ranged, masked };

/// Which tiles of a backward add to the same elements of a term's gradient: those of other sequences, of other
/// key heads, of other keys.
struct GradientOverlap {
  bool sequences = true, heads = true, keys = true;
};

/// Masks that are no intervals and terms that scores get beyond scale, bias and ALiBi: additive
/// tensors, boolean masks, relative positions. Everything is const: tiles are visited in parallel.
class ScoreTerms {
 public:
  virtual ~ScoreTerms() = default;

  virtual Visit visit(const TileAt& /*at*/) const { return Visit::whole; }
  /// False if `shape` only hides: it is then called for masked tiles alone, with scores that are not
  /// scaled yet.
  virtual bool adds() const { return true; }
  /// Writes the keys that each row sees of a ranged tile. Of a masked tile: keys outside of which a row
  /// sees nothing, which saves work; elements outside are undefined in `shape`; false: not known. Asked
  /// where the plan hides nothing.
  virtual bool ranges(const TileAt& /*at*/, kernels::KeyRange* /*ranges*/) const { return false; }

  /// Changes the scaled scores of a tile in place: adds terms, writes -inf where a key is hidden
  /// (whatever the score is there). Elements outside the plan's intervals are undefined and ignored.
  /// One of the two is called: double for float64 calls.
  virtual void shape(const TileAt& at, kernels::Block<float> s) const = 0;
  virtual void shape(const TileAt& at, kernels::Block<double> s) const = 0;

  /// Backward: receives dS (0 where hidden) of each tile and may add to the gradient of the query rows,
  /// dq [rows, D], in units of 1/scale like the engine's own (it is multiplied by scale at the end).
  /// Calls with the same `lane` in [0, lanes) that overlap come one after the other in a fixed order.
  virtual bool has_gradient() const { return false; }
  virtual GradientOverlap gradient_overlap() const { return {}; }
  virtual void begin_gradient(int /*lanes*/) {}
  virtual void add_gradient(int /*lane*/, const TileAt& /*at*/, kernels::Block<const float> /*ds*/,
                            kernels::Block<float> /*dq*/) const {}
  virtual void add_gradient(int /*lane*/, const TileAt& /*at*/, kernels::Block<const double> /*ds*/,
                            kernels::Block<double> /*dq*/) const {}
};

/// What a mechanism says about its scores and weights.
struct Policy {
  kernels::WeightKind weight = kernels::WeightKind::softmax;
  int order = 0;                    // degree of polynomial weights, in the scaled score
  std::vector<double> head_bias;    // added to the scaled score, one per query head; empty: none
  std::vector<double> alibi_slope;  // per query head: adds -slope * |distance|; empty: none
  /// From the slopes of a batch entry to those of the next; 0: all have the same.
  int64_t slopes_apart = 0;
  std::vector<double> sink;    // softmax: per query head, a logit in the row's sum; empty: none
  double softcap = 0;          // > 0: scaled scores become softcap * tanh(score / softcap)
  std::optional<double> most;  // then scaled scores above it become it
  double dropout = 0;          // probability that a weight is dropped, the rest scaled up
  uint64_t seed = 0;           // of the dropout
  size_t slope_index(int64_t batch, int64_t head) const {
    return static_cast<size_t>(batch * slopes_apart + head);
  }
  bool divide_by_sum() const { return weight == kernels::WeightKind::softmax; }
};

/// Rows [heads, rows, width], or numbers [heads, rows]: evenly spaced, or each at an offset of its own.
struct HeadRows : Tensor {
  HeadRows() = default;
  HeadRows(const Tensor& t) : Tensor(t) {}  // NOLINT(google-explicit-constructor)
  /// Elements from where the head begins, of each row; null: evenly spaced. kernels::kNoRow, in results
  /// and lse: the row does not exist. It is not written and, as one that sees no key, has no gradient.
  std::shared_ptr<const int64_t> offsets;

  /// What offsets count from, or where row `begin` is.
  std::byte* origin(int64_t head, int64_t begin) const {
    return offsets == nullptr ? at({head, begin}) : at({head});
  }
  /// Null for a row that does not exist.
  std::byte* row(int64_t head, int64_t r) const {
    if (offsets == nullptr) return at({head, r});
    const int64_t offset = offsets.get()[r];
    if (offset == kernels::kNoRow) return nullptr;
    return at({head}) + offset * static_cast<int64_t>(size_of(dtype()));
  }
};

/// One set of queries against one set of keys, all heads: query head h reads key head h / (H/Hkv).
struct Sequence {
  HeadRows q, k, v;  // [H,Lq,D] [Hkv,Lk,D] [Hkv,Lk,Dv]
  HeadRows r;        // [H,Lq,D], second stream; undefined: none
  HeadRows out;      // [H,Lq,Dv]; polynomial: not divided
  HeadRows lse;      // [H,Lq] or undefined; polynomial: the sum of weights
  Tensor v_mean;     // [H,Lq,Dv] or undefined; second stream: the plain softmax result
  Tensor t_mean;     // [H,Lq] or undefined; second stream: the mean of r k^T under the weights
  TilePlan plan;
  int64_t batch = 0;  // counts in the dropout's random numbers
};

/// Gradients of one sequence; undefined ones are not wanted (those of q, k, v are always written).
struct SequenceGradient {
  HeadRows out,
      lse;  // given; lse may be undefined (zero). Polynomial: of the undivided result and sum
  HeadRows q, k, v, r;  // written
  /// Softmax: what stands for out . d(out) - d(lse) of each row [H,Lq], where the caller knows it better
  /// than the rounded factors do; undefined: they are taken.
  HeadRows delta = {};
};

/// A checked call. All sequences have the same types, numbers of heads and head dims.
struct Problem {
  std::vector<Sequence> sequences;
  double scale = 1;
  Policy policy;
  const ScoreTerms* terms = nullptr;
  /// Rows and keys per tile that the terms' structure wants (blocks, boxes of a grid); 0: chosen.
  int64_t query_tile = 0, key_tile = 0;
  /// Parts the keys are cut into when there are few rows; none: chosen.
  std::optional<int64_t> splits;
  /// The backward also sums the gradients of head_bias and alibi_slope.
  bool head_gradients = false;
};

/// Writes out and, where defined, lse, v_mean, t_mean of every sequence.
void forward(const Problem& problem, const RunOptions& run);

/// Sums over a call that are gradients of per-head numbers.
struct HeadGradients {
  std::vector<double> bias, alibi_slope, sink;  // one per query head, slopes as in the policy
};

/// Writes the gradients; `sequences` of the problem hold what forward wrote (softmax: out and lse,
/// second stream also v_mean and t_mean). `terms` receive dS, and begin_gradient before; null where
/// nobody wants what they would make of it.
HeadGradients backward(const Problem& problem, const std::vector<SequenceGradient>& gradients,
                       ScoreTerms* terms, const RunOptions& run);

/// Sequences of a batch [B,H,L,D]: views of batch entry b with plan b.
std::vector<Sequence> batch_sequences(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out, const Tensor& lse,
                                      const std::vector<TilePlan>& plans);

/// The same for gradients [B,H,L,D]; `lse` may be undefined.
std::vector<SequenceGradient> batch_gradients(const Tensor& out, const Tensor& lse, const Tensor& q,
                                              const Tensor& k, const Tensor& v);

/// 1 / (1 - p) where the weight of (batch entry, head, query, key) is kept, 0 where it is dropped.
double dropout_factor(const Policy& policy, int64_t batch, int64_t head, int64_t row, int64_t key);

/// Throws Error unless q [B,H,Lq,D], k, v, out and (if defined) lse fit together.
void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, int64_t most_dim = kMaxHeadDim,
                    OperandNames names = {});
/// Throws Error unless the gradients of out and lse look like them; lse must be there.
void check_backward(const char* op, const Tensor& grad_out, const Tensor& grad_lse,
                    const Tensor& out, const Tensor& lse);
/// scale, or 1/sqrt(D). Throws Error if it is not finite.
double resolve_scale(const char* op, const std::optional<double>& scale, int64_t head_dim);
/// A tensor [H] of a floating type as numbers; throws Error naming it otherwise.
std::vector<double> per_head(const char* op, const char* name, const Tensor& values, int64_t heads);
/// Slopes [H] or [B,H] of a floating type, undefined: none; throws Error naming them otherwise.
void set_alibi_slopes(Policy& policy, const char* op, const Tensor& slopes, int64_t batch,
                      int64_t heads);

}  // namespace heed::tiled
