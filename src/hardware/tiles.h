// How many key tiles a neighborhood makes a query tile visit, and what speed-up that bounds: the
// simulator of Generalized Neighborhood Attention (arXiv 2504.16922, appendix B.1), on the same
// geometry that the kernels use (engine/tiled/neighborhood.h).
//
// Each residue group of a dilated grid is a problem of its own; largest and mean count run over the
// query tiles of all groups. A visited key tile holds a key that a query of the tile sees.
#pragma once
#include <string>
#include <vector>

#include "engine/tiled/neighborhood.h"

namespace heed::hardware {

enum class Tiling {
  fixed,         // "static": boxes at multiples of their sides
  at_first_key,  // "dynamic": boxes from the first key that the query tile sees
  flat,          // runs of the row-major index, of queries and of keys
};
Tiling parse_tiling(const std::string& name);  // "static", "dynamic", "flat"; throws heed::Error
const char* name_of(Tiling tiling);

struct TilePlanCase {
  std::vector<tiled::NeighborhoodAxis> axes;
  std::vector<int64_t> query_tile, key_tile;  // one number each for flat
  Tiling tiling = Tiling::fixed;
};

struct TileStatistic {
  int64_t visited_max = 0;
  double visited_mean = 0;
  int64_t dense = 0;              // key tiles of the whole grid, not dilated
  double analytical_speedup = 0;  // dense / visited_max: the slowest tile decides
  double flop_speedup = 0;        // product of length / kernel
  bool block_sparse = false;      // no visited tile needs an element mask
};

/// Throws heed::Error for impossible windows and where counts leave 64 bits or minutes of work.
TileStatistic tile_statistic(const TilePlanCase& plan);

/// What the whole program gains when its attention, `share` of the time in all but `dense_steps` of
/// `steps`, gains `speedup`, taken with one decimal as the paper does.
struct EndToEnd {
  double share = 1;
  int64_t steps = 1, dense_steps = 0;
};
void check(const EndToEnd& program);  // throws heed::Error
double end_to_end(double speedup, const EndToEnd& program);

/// The strides that are worth having: every larger one on an axis visits fewer tiles.
struct StrideRow {
  std::vector<int64_t> stride;
  TileStatistic statistic;
};
std::vector<StrideRow> search_strides(TilePlanCase plan);

/// The published tables: cases by model.
struct PaperCase {
  std::string model;
  TilePlanCase plan;
  EndToEnd all_steps, kept_steps;  // without and with dense first steps
};
std::vector<PaperCase> paper_tile_cases();

}  // namespace heed::hardware
