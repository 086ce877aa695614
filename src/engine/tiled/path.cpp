// Which kernels and tile sizes a call gets. One visible list; `explain` reads it back.
#include <algorithm>

#include "engine/tiled/forward.h"
#include "kernels/tile.h"

namespace heed::tiled {

namespace {

// Up to this many query rows per key head, reading keys and values once matters more than products.
constexpr int64_t kFewRows = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TileSizes {
  int64_t query_tile, key_tile;
};

// The score block and one panel of keys share the first-level cache; a packed key tile with its values
// stays in half of the second-level one beside the accumulators.
TileSizes tile_sizes(Isa isa, bool half_operands, int64_t head_dim, int64_t value_dim,
                     size_t element) {
  if (half_operands) return {isa == Isa::amx ? 64 : 48, 256};
  const int64_t key_bytes = (head_dim + value_dim) * static_cast<int64_t>(element);
  const int64_t budget = 128 * 1024;
  const int64_t key_tile = std::clamp<int64_t>(budget / key_bytes / 64 * 64, 64, 256);
  return {48, key_tile};
}

}  // namespace

std::string Path::name() const {
  std::string text = name_of(isa);
  if (few_rows) text += ", few rows";
  if (half_operands) text += ", bfloat16 products";
  return text;
}

Path choose_path(const Problem& problem, const RunOptions& run) {
  const Tensor &q = problem.q, &v = problem.v;
  Path path;
  path.isa = run.isa.value_or(default_isa());
  const int64_t group = std::max<int64_t>(1, q.size(1) / std::max<int64_t>(1, v.size(1)));
  path.few_rows = group * q.size(2) <= kFewRows;
  path.half_operands =
      !path.few_rows && q.dtype() == DType::bf16 && kernels::half_tile_kernels(path.isa) != nullptr;
  const size_t element = q.dtype() == DType::f64 ? 8 : 4;
  const TileSizes sizes = tile_sizes(path.isa, path.half_operands, q.size(3), v.size(3), element);
  path.query_tile = path.few_rows ? group * q.size(2) : sizes.query_tile;
  path.key_tile = sizes.key_tile;
  if (path.few_rows) {
    path.group_rows = group * q.size(2);
    return path;
  }
  // Rows that share a packed key tile: as many as keep packing cheap, few enough for all threads to
  // have several items. Results do not depend on it.
  const int64_t most = std::max<int64_t>(1, 1024 / group / path.query_tile);
  const int64_t tiles = ceil_div(q.size(2), path.query_tile);
  const int64_t heads = q.size(0) * std::max<int64_t>(1, v.size(1));
  const int64_t threads = run.threads.value_or(default_threads());
  const int64_t wanted_items = threads == 1 ? 1 : 6 * threads;
  const int64_t parts = std::clamp<int64_t>(ceil_div(wanted_items, std::max<int64_t>(1, heads)),
                                            ceil_div(tiles, most), std::max<int64_t>(1, tiles));
  path.group_rows = ceil_div(tiles, parts) * path.query_tile;
  return path;
}

std::vector<PathChoice> explain(int64_t rows_per_group, int64_t head_dim, int64_t value_dim,
                                DType dtype, const RunOptions& run) {
  (void)head_dim;
  (void)value_dim;
  std::vector<PathChoice> choices;
  const bool few = rows_per_group <= kFewRows;
  const auto& available = available_isas();
  const Isa forced = run.isa.value_or(default_isa());
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::portable}) {
    PathChoice choice;
    choice.path = name_of(isa);
    const bool half = kernels::half_tile_kernels(isa) != nullptr;
    if (std::find(available.begin(), available.end(), isa) == available.end()) {
      choice.reason = "this machine does not have it";
    } else if (isa > forced) {
      choice.reason = std::string(name_of(forced)) + " is forced";
    } else if (isa == Isa::amx && dtype != DType::bf16) {
      choice.reason = std::string("tiles multiply bfloat16, the call is ") + name_of(dtype);
    } else if (isa == Isa::amx && few) {
      choice.reason = std::to_string(rows_per_group) +
                      " query rows per key head: reading the keys is the bound, not products";
    } else {
      choice.can_run = true;
      if (few) {
        choice.path += ", few rows";
      } else if (half && dtype == DType::bf16) {
        choice.path += ", bfloat16 products";
      }
    }
    choices.push_back(choice);
  }
  return choices;
}

}  // namespace heed::tiled
