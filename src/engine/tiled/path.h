// Which kernels and tile sizes a call gets.
#pragma once
#include <string>
#include <vector>

#include "engine/candidates.h"
#include "engine/tiled/problem.h"

namespace heed::tiled {

/// What the choice of a path depends on.
struct CallKind {
  int64_t rows_per_key_head = 1;  // query rows that read the same keys: (H/Hkv) * Lq
  DType dtype = DType::f32;
  bool backward = false;
  bool scattered = false;  // rows lie at offsets of their own
  bool second = false;     // there is a second stream
};

/// Where key tiles that slide along begin: whole panels of every instruction set.
inline constexpr int64_t kSlideStep = 64;

/// The path a call takes: kernels and tile sizes.
struct Path {
  Isa isa = Isa::portable;
  bool half_operands = false;  // bfloat16 products
  bool few_rows = false;       // products straight from unpacked keys and values
  bool fused = false;          // tiles by `attend`, where the kernels have one
  bool sliding = false;        // a query tile meets all keys that it sees at once, as one key tile
  int64_t query_tile = 0, key_tile = 0;
  int64_t group_rows = 0;  // query rows of a head that share one packed key tile
  int64_t part_keys = 0;   // where a call is cut along the keys: keys of a part; 0: along its rows
};
/// Of which sequences of a call so few query rows share the keys that a forward reads these unpacked.
std::vector<bool> have_few_rows(const std::vector<Sequence>& sequences, const RunOptions& run);
/// About how long one thread takes for a forward, in nanoseconds.
double forward_nanoseconds(const Problem& problem);
Path choose_path(const Problem& problem, const RunOptions& run, bool backward);

/// The list that choose_path takes the first possible entry of, with reasons.
std::vector<PathAnswer> explain(const CallKind& call, const RunOptions& run);

}  // namespace heed::tiled
