// One visible list of paths; `explain` reads it back.
#include "engine/tiled/path.h"

#include <algorithm>

#include "base/round_up.h"
#include "kernels/tile.h"

namespace heed::tiled {

namespace {

// Up to this many query rows per key head, reading keys and values once matters more than products.
constexpr int64_t kFewRows = 16;

bool few_rows(const CallKind& call) {
  return !call.backward && !call.scattered && call.rows_per_key_head <= kFewRows;
}

struct TileSizes {
  int64_t query_tile, key_tile;
};

// The score block and one panel of keys share the first-level cache; a packed key tile with its values
// stays in a part of the second-level one beside the accumulators. Long tiles have fewer statistics, but
// rows that see little of one do not fill it, and backwards keep more blocks of a tile's length.
TileSizes tile_sizes(const Path& path, bool backward, const Sequence& sequence, size_t element) {
  if (path.isa == Isa::amx) return {64, 256};
  constexpr int64_t kLong = 512, kShort = 256;
  const TilePlan& plan = sequence.plan;
  const Interval seen = plan.queries() > 0 ? plan.row(plan.queries() / 2) : Interval();
  const bool long_tiles = !backward && !path.few_rows && seen.end - seen.begin >= kLong;
  if (path.half_operands && !long_tiles) return {48, kShort};
  const int64_t most = long_tiles ? kLong : kShort, budget = 512 * most;
  const int64_t key_bytes =
      (sequence.q.size(2) + sequence.v.size(2)) * static_cast<int64_t>(element);
  return {48, std::clamp<int64_t>(budget / key_bytes / 64 * 64, 64, most)};
}

// A way to run a call, best first.
struct Candidate {
  Isa isa;
  bool half_operands;
};
constexpr Candidate kCandidates[] = {{Isa::amx, true},
                                     {Isa::avx512, true},
                                     {Isa::avx512, false},
                                     {Isa::avx2, false},
                                     {Isa::portable, false}};

// Why a candidate cannot run a call; empty if it can.
std::string refusal(const Candidate& candidate, const CallKind& call, Isa strongest) {
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), candidate.isa) == available.end()) {
    return "this machine does not have it";
  }
  if (candidate.isa > strongest) return std::string(name_of(strongest)) + " is forced";
  if (!candidate.half_operands) return "";
  if (kernels::half_tile_kernels(candidate.isa) == nullptr) {
    return "this processor multiplies bfloat16 no faster than float32";
  }
  if (call.dtype != DType::bf16) {
    return std::string("it multiplies bfloat16, the call is ") + name_of(call.dtype);
  }
  if (few_rows(call)) {
    return std::to_string(call.rows_per_key_head) +
           " query rows per key head: reading the keys is the bound, not products";
  }
  return "";
}

std::string name_of_candidate(const Candidate& candidate, const CallKind& call) {
  std::string text = name_of(candidate.isa);
  if (candidate.half_operands && candidate.isa != Isa::amx) text += ", bfloat16 products";
  if (!candidate.half_operands && few_rows(call)) text += ", few rows";
  return text;
}

// The longest sequence stands for all.
const Sequence& longest(const Problem& problem) {
  return *std::max_element(
      problem.sequences.begin(), problem.sequences.end(),
      [](const Sequence& a, const Sequence& b) { return a.plan.queries() < b.plan.queries(); });
}

int64_t group_of(const Sequence& s) {
  return std::max<int64_t>(1, s.q.size(0) / std::max<int64_t>(1, s.k.size(0)));
}

int64_t most_keys(const Problem& problem) {
  int64_t most = 1;
  for (const Sequence& s : problem.sequences) most = std::max(most, s.plan.keys());
  return most;
}

// Rows that share a packed key tile: as many as keep packing cheap, few enough for all threads to have
// several items. Results do not depend on it.
int64_t rows_per_item(const Problem& problem, int64_t query_tile, const RunOptions& run) {
  const Sequence& sequence = longest(problem);
  const int64_t most = std::max<int64_t>(1, 2048 / group_of(sequence) / query_tile);
  const int64_t tiles = ceil_div(sequence.plan.queries(), query_tile);
  const int64_t threads = run.threads.value_or(default_threads());
  const int64_t wanted_items = threads == 1 ? 1 : 6 * threads;
  const int64_t heads =
      std::max<int64_t>(1, static_cast<int64_t>(problem.sequences.size()) * sequence.k.size(0));
  const int64_t parts = std::clamp<int64_t>(ceil_div(wanted_items, heads), ceil_div(tiles, most),
                                            std::max<int64_t>(1, tiles));
  return ceil_div(tiles, parts) * query_tile;
}

}  // namespace

Path choose_path(const Problem& problem, const RunOptions& run, bool backward) {
  const Sequence& sequence = longest(problem);
  const CallKind call{group_of(sequence) * sequence.plan.queries(), sequence.q.dtype(), backward,
                      sequence.q.offsets != nullptr};
  const Isa strongest = chosen_isa(run);
  const auto* chosen = std::find_if(
      std::begin(kCandidates), std::end(kCandidates),
      [&](const Candidate& candidate) { return refusal(candidate, call, strongest).empty(); });
  const int64_t queries = std::max<int64_t>(1, sequence.plan.queries());
  Path path;
  path.isa = chosen->isa;  // the portable candidate refuses nothing
  path.half_operands = chosen->half_operands;
  path.few_rows = few_rows(call);
  const size_t element = path.half_operands ? 2 : call.dtype == DType::f64 ? 8 : 4;
  const TileSizes sizes = tile_sizes(path, backward, sequence, element);
  // Tiles beyond what there is would only be cleared and skipped over.
  path.key_tile = std::min(problem.key_tile > 0 ? problem.key_tile : sizes.key_tile,
                           round_up(most_keys(problem), 64));
  path.query_tile = path.few_rows            ? call.rows_per_key_head
                    : problem.query_tile > 0 ? problem.query_tile
                                             : std::min(sizes.query_tile, round_up(queries, 8));
  path.group_rows =
      path.few_rows ? call.rows_per_key_head : rows_per_item(problem, path.query_tile, run);
  return path;
}

std::vector<PathChoice> explain(const CallKind& call, const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  std::vector<PathChoice> choices;
  for (const Candidate& candidate : kCandidates) {
    const std::string reason = refusal(candidate, call, strongest);
    choices.push_back({name_of_candidate(candidate, call), reason.empty(), reason});
  }
  return choices;
}

}  // namespace heed::tiled
