#include "engine/tiled/path.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/round_up.h"

namespace heed::tiled {

namespace {

// Up to this many keys a query tile meets all that it sees at once: the score block of its rows stays in
// the second-level cache beside the keys. The tile unit's is larger, and made faster than it is read.
constexpr int64_t kMostSight = 640, kMostSightOfTileUnit = 384;

// Up to this many queries there are too few tiles of rows to keep many cores busy.
constexpr int64_t kFewQueries = 128;

// Up to how many query rows per key head reading keys and values once, unpacked, is faster than packing
// them. Packed bfloat16 products are twice as fast, a tile unit's need no packing for few rows; a backward
// also writes as much as it reads.
int64_t most_few_rows(const CallKind& call, const RunOptions& run) {
  if (call.scattered || (call.backward && call.second)) return 0;
  if (call.dtype == DType::bf16) {
    const Candidate best = choose_candidate(call.dtype, {""}, run);
    if (best.half_operands) return best.isa == Isa::amx || call.backward ? 16 : 12;
  }
  if (chosen_isa(run) == Isa::portable) return call.backward ? 8 : 16;
  if (call.second) return 16;
  return call.backward ? 32 : 24;
}

// Keys of a part: long enough to stream, and for sums over a part to be small beside it; short enough
// that a cache of a few thousand tokens keeps all cores busy. It depends on nothing else, so neither do
// results.
int64_t part_keys(const CallKind& call, const Problem& problem, bool few_rows, int64_t queries,
                  int64_t most_keys) {
  if (call.backward) return 0;
  const int64_t keys = std::max<int64_t>(1024, 8 * call.rows_per_key_head);
  if (few_rows || problem.splits) return keys;
  const bool cut = !call.scattered && queries <= kFewQueries;
  return cut && most_keys >= 2 * keys ? keys : 0;
}

struct TileSizes {
  int64_t query_tile, key_tile;
};

// The score block and one panel of keys share the first-level cache; a packed key tile with its values
// stays in a part of the second-level one beside the accumulators. Long tiles have fewer statistics, but
// rows that see little of one do not fill it, and backwards keep more blocks of a tile's length.
TileSizes tile_sizes(const Path& path, bool backward, const Sequence& sequence, size_t element) {
  const int64_t key_bytes =
      (sequence.q.size(2) + sequence.v.size(2)) * static_cast<int64_t>(element);
  if (path.isa == Isa::amx) {
    // `attend` needs no score block: the longer a tile, the longer its rows' sums stay in reach.
    constexpr int64_t kPacked = 512 << 10;
    return {128, path.fused ? std::clamp<int64_t>(kPacked / key_bytes / 64 * 64, 256, 2048) : 256};
  }
  constexpr int64_t kLong = 512, kShort = 256;
  const TilePlan& plan = sequence.plan;
  const Interval seen = plan.queries() > 0 ? plan.row(plan.queries() / 2) : Interval();
  const bool long_tiles = !backward && !path.few_rows && seen.end - seen.begin >= kLong;
  if (path.half_operands && !long_tiles) return {48, kShort};
  const int64_t most = long_tiles ? kLong : kShort, budget = 512 * most;
  return {48, std::clamp<int64_t>(budget / key_bytes / 64 * 64, 64, most)};
}

// The longest key tile that holds all keys which a query tile sees; more than `most` may be any of them.
int64_t longest_sight(const Problem& problem, int64_t query_tile, int64_t most) {
  int64_t longest = 0;
  for (const Sequence& s : problem.sequences) {
    const int64_t queries = s.plan.queries();
    for (int64_t end = queries; end > 0 && longest <= most;) {
      const int64_t begin = (end - 1) / query_tile * query_tile;
      const Interval seen = s.plan.rows(begin, end);
      if (!seen.empty()) {
        longest = std::max(longest,
                           round_up(seen.end, kSlideStep) - seen.begin / kSlideStep * kSlideStep);
      }
      end = begin;
    }
  }
  return longest;
}

// From so many on, products of few rows take longer than reading the keys; a tile unit's do not.
constexpr int64_t kTileRows = 4;

NoHalf no_half_operands(const CallKind& call, bool few_rows) {
  if (!few_rows) return {""};
  const std::string reason =
      std::to_string(call.rows_per_key_head) +
      " query rows per key head: reading the keys is the bound, not products";
  return {call.rows_per_key_head < kTileRows ? reason : "", reason};
}

// The longest sequence stands for all.
const Sequence& longest(const Problem& problem) {
  return *std::max_element(
      problem.sequences.begin(), problem.sequences.end(),
      [](const Sequence& a, const Sequence& b) { return a.plan.queries() < b.plan.queries(); });
}

// Whether nothing comes between scores, weights and sums.
bool attends(const Problem& problem) {
  const Policy& policy = problem.policy;
  return policy.weight != kernels::WeightKind::polynomial && policy.softcap == 0 && !policy.most &&
         policy.alibi_slope.empty() && policy.dropout == 0 && !longest(problem).r.defined() &&
         problem.terms == nullptr;
}

int64_t group_of(const Sequence& s) {
  return std::max<int64_t>(1, s.q.size(0) / std::max<int64_t>(1, s.k.size(0)));
}

int64_t rows_per_key_head(const Sequence& s) { return group_of(s) * s.plan.queries(); }

int64_t most_keys(const Problem& problem) {
  int64_t most = 1;
  for (const Sequence& s : problem.sequences) most = std::max(most, s.plan.keys());
  return most;
}

int64_t key_heads(const Problem& problem) {
  const int64_t heads = problem.sequences[0].k.size(0);
  return std::max<int64_t>(1, static_cast<int64_t>(problem.sequences.size()) * heads);
}

// Few tiles of rows get even shares of them: a last one of a row or two costs nearly as much as a whole one.
int64_t even_query_tile(int64_t query_tile, int64_t queries) {
  constexpr int64_t kFewTiles = 8, kBlock = 6;
  const int64_t tiles = std::max<int64_t>(1, (2 * queries + query_tile) / (2 * query_tile));
  return tiles > kFewTiles ? query_tile : round_up(ceil_div(queries, tiles), kBlock);
}

// A backward deals key tiles out to threads: where there are too few, smaller ones.
int64_t tile_for_threads(int64_t key_tile, int64_t keys, int64_t heads, const RunOptions& run) {
  const int64_t threads = run.threads.value_or(default_threads());
  while (key_tile > 64 && heads * ceil_div(keys, key_tile) < threads) {
    key_tile = round_up(key_tile / 2, 64);
  }
  return key_tile;
}

// Rows that share a packed key tile: as many as keep packing cheap, few enough for all threads to have
// several items. Results do not depend on it.
int64_t rows_per_item(const Problem& problem, int64_t query_tile, const RunOptions& run) {
  const Sequence& sequence = longest(problem);
  const int64_t most = std::max<int64_t>(1, 2048 / group_of(sequence) / query_tile);
  const int64_t tiles = ceil_div(sequence.plan.queries(), query_tile);
  const int64_t threads = run.threads.value_or(default_threads());
  const int64_t wanted_items = threads == 1 ? 1 : 6 * threads;
  const int64_t parts = std::clamp<int64_t>(ceil_div(wanted_items, key_heads(problem)),
                                            ceil_div(tiles, most), std::max<int64_t>(1, tiles));
  return ceil_div(tiles, parts) * query_tile;
}

CallKind kind_of(const Sequence& s, bool backward) {
  return {rows_per_key_head(s), s.q.dtype(), backward, s.q.offsets != nullptr, s.r.defined()};
}

}  // namespace

Path choose_path(const Problem& problem, const RunOptions& run, bool backward) {
  const Sequence& sequence = longest(problem);
  const CallKind call = kind_of(sequence, backward);
  const bool few_rows = call.rows_per_key_head <= most_few_rows(call, run);
  const Candidate chosen = choose_candidate(call.dtype, no_half_operands(call, few_rows), run);
  const int64_t queries = std::max<int64_t>(1, sequence.plan.queries()), keys = most_keys(problem);
  Path path;
  path.isa = chosen.isa;
  path.few_rows = few_rows;
  path.half_operands = chosen.half_operands && !path.few_rows;
  const size_t element = path.half_operands ? 2 : call.dtype == DType::f64 ? 8 : 4;
  path.fused = path.half_operands && !backward && attends(problem);
  path.part_keys = part_keys(call, problem, few_rows, queries, keys);
  TileSizes sizes = tile_sizes(path, backward, sequence, element);
  if (path.few_rows && path.isa == Isa::amx && !backward && !problem.splits) {
    // Products of few rows on a tile unit are short beside what is done once a tile. A window would see
    // little of a long one.
    const Interval seen = sequence.plan.rows(0, sequence.plan.queries());
    const bool window = seen.begin > 0 && seen.end - seen.begin < 4 * path.part_keys;
    if (!window) sizes.key_tile = path.part_keys;
  }
  // Tiles beyond what there is would only be cleared and skipped over.
  path.key_tile =
      std::min(problem.key_tile > 0 ? problem.key_tile : sizes.key_tile, round_up(keys, 64));
  if (backward && problem.key_tile == 0) {
    path.key_tile = tile_for_threads(path.key_tile, keys, key_heads(problem), run);
  }
  path.query_tile = path.few_rows            ? (backward ? queries : call.rows_per_key_head)
                    : problem.query_tile > 0 ? problem.query_tile
                    : path.isa == Isa::amx   ? std::min(sizes.query_tile, round_up(queries, 8))
                                             : even_query_tile(sizes.query_tile, queries);
  if (!backward && !path.few_rows && path.part_keys == 0 && problem.key_tile == 0) {
    const int64_t most = path.isa == Isa::amx ? kMostSightOfTileUnit : kMostSight;
    const int64_t sight = longest_sight(problem, path.query_tile, most);
    path.sliding = sight <= most;
    if (path.sliding) path.key_tile = std::max(sight, kSlideStep);
    path.fused = path.fused && !path.sliding;  // which ends of ranges would be most of
  }
  path.group_rows =
      path.few_rows ? call.rows_per_key_head : rows_per_item(problem, path.query_tile, run);
  return path;
}

double forward_nanoseconds(const Problem& problem) {
  constexpr double kHead = 200;  // a key head
  double sum = 0;
  for (const Sequence& s : problem.sequences) {
    const int64_t queries = s.plan.queries();
    if (queries == 0) continue;
    const Interval seen = s.plan.rows(0, queries);
    const auto keys = static_cast<double>(std::max<int64_t>(0, seen.end - seen.begin));
    const auto width = static_cast<double>(s.q.size(2) + s.v.size(2));
    const auto rows = static_cast<double>(s.q.size(0) * queries);
    const auto heads = static_cast<double>(s.k.size(0));
    sum += keys * width *
               (rows * kMultiplyAddNanoseconds +
                heads * static_cast<double>(size_of(s.k.dtype())) * kByteNanoseconds) +
           heads * kHead;
  }
  return sum;
}

std::vector<bool> have_few_rows(const std::vector<Sequence>& sequences, const RunOptions& run) {
  // Of the same types, so alike but for their lengths.
  const int64_t most = most_few_rows(kind_of(sequences[0], false), run);
  std::vector<bool> few;
  for (const Sequence& s : sequences) few.push_back(rows_per_key_head(s) <= most);
  return few;
}

std::vector<PathAnswer> explain(const CallKind& call, const RunOptions& run) {
  const bool few_rows = call.rows_per_key_head <= most_few_rows(call, run);
  return explain_candidates(call.dtype, no_half_operands(call, few_rows),
                            few_rows ? ", few rows" : "", run);
}

}  // namespace heed::tiled
