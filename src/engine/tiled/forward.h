// The forward pass of every mechanism that looks at scores tile by tile: one pass over the keys,
// scratch of O(threads x tile). A mechanism is a Policy; a call is a Problem.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "engine/tiled/plan.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::tiled {

/// What a mechanism says about its scores and weights.
struct Policy {
  kernels::WeightKind weight = kernels::WeightKind::softmax;
  std::vector<double> head_bias;    // added to the scaled score, one per query head; empty: none
  std::vector<double> alibi_slope;  // per query head; empty: none
  bool divide_by_sum() const { return weight == kernels::WeightKind::softmax; }
};

/// One checked call. q [B,H,Lq,D], k [B,Hkv,Lk,D], v [B,Hkv,Lk,Dv], out [B,H,Lq,Dv], lse [B,H,Lq] or
/// undefined.
struct Problem {
  const char* op = "";
  Tensor q, k, v, out, lse;
  TilePlan plan;
  double scale = 1;
  Policy policy;
  std::optional<int64_t>
      splits;  // parts the keys are cut into when there are few rows; none: chosen
};

void forward(const Problem& problem, const RunOptions& run);

/// What a caller calls the keys and values.
struct OperandNames {
  const char* k = "k";
  const char* v = "v";
};
/// Throws Error unless q, k, v, out and (if defined) lse fit together.
void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, OperandNames names = {});
/// scale, or 1/sqrt(D). Throws Error if it is not finite.
double resolve_scale(const char* op, const std::optional<double>& scale, int64_t head_dim);
/// Type of statistics and states beside tensors of `dtype`.
inline DType statistics_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// What the choice of a path depends on.
struct CallKind {
  int64_t rows_per_key_head = 1;  // query rows that read the same keys: (H/Hkv) * Lq
  DType dtype = DType::f32;
};

/// The path a call takes: kernels and tile sizes.
struct Path {
  Isa isa = Isa::portable;
  bool half_operands = false;  // bfloat16 products
  bool few_rows = false;       // products straight from unpacked keys and values
  int64_t query_tile = 0, key_tile = 0;
  int64_t group_rows = 0;  // query rows of a head that share one packed key tile
};
Path choose_path(const Problem& problem, const RunOptions& run);

/// The list that choose_path takes the first possible entry of, with reasons.
struct PathChoice {
  std::string path;
  bool can_run = false;
  std::string reason;  // empty when it can
};
std::vector<PathChoice> explain(const CallKind& call, const RunOptions& run);

}  // namespace heed::tiled
