// Which kernels and chunk size a call gets.
#pragma once
#include <string>
#include <vector>

#include "engine/candidates.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed::chunked {

/// What the choice depends on.
struct CallKind {
  DType dtype = DType::f32;
  int64_t tokens = 0;   // keys of a sequence
  bool mapped = false;  // rows become features of T on the way: products are in T
  bool causal = true;
  int64_t features = 64, value_dim = 64;
  int64_t score_width = 64;  // of what scores inside a chunk multiply: F, or D of a polynomial
  bool starts_with_state = false;  // given by the caller
};

struct Path {
  Isa isa = Isa::portable;
  bool half_operands = false;  // bfloat16 products
  int64_t chunk = 0;           // tokens
};
Path choose_path(const CallKind& call, const RunOptions& run);

/// The list that choose_path takes the first possible entry of, with reasons.
std::vector<PathAnswer> explain(const CallKind& call, const RunOptions& run);

}  // namespace heed::chunked
