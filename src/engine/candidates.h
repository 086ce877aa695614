// Ways to run a call, best first, and why one of them cannot.
#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// One line of `heed explain`: can this path run the call, and if not, why.
struct PathAnswer {
  std::string path;  // "amx", "avx512", ...
  bool can_run = false;
  std::string reason;  // empty when it can
};

struct Candidate {
  Isa isa = Isa::portable;
  bool half_operands = false;  // bfloat16 products
};

/// Why bfloat16 products are not for a call; empty where they are.
struct NoHalf {
  // NOLINTNEXTLINE(google-explicit-constructor)
  NoHalf(const std::string& any) : tile_unit(any), vectors(any) {}
  NoHalf(std::string of_tile_unit, std::string of_vectors)
      : tile_unit(std::move(of_tile_unit)), vectors(std::move(of_vectors)) {}
  std::string tile_unit, vectors;
};

/// The first one that can run a call on tensors of this type.
Candidate choose_candidate(DType dtype, const NoHalf& no_half, const RunOptions& run);

/// The list that choose_candidate takes the first possible entry of, with reasons. `wide_name` follows the
/// names of those without bfloat16 products.
std::vector<PathAnswer> explain_candidates(DType dtype, const NoHalf& no_half,
                                           std::string_view wide_name, const RunOptions& run);

/// The list of what runs alike on every instruction set but for its vectors.
std::vector<PathAnswer> explain_isas(const RunOptions& run);

}  // namespace heed
