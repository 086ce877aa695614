// The boxes that the kernels cut a call of na2d or na3d into, and how much of the grid they visit.
#pragma once
#include <span>
#include <vector>

#include "engine/tiled/neighborhood.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed::hardware {

struct KernelTiles {
  std::vector<int64_t> query_tile, key_tile;  // sides on the grid's own axes
  double visited_mean =
      0;             // key boxes that a query box visits, over the boxes of all residue groups
  double dense = 0;  // key boxes' worth of keys in the whole grid
  /// Pairs of the whole grid / pairs that the products compute in boxes that meet: rows and keys that
  /// they take at once (na::kRowBlock, na::kKeyStep) see what one of them sees, between the first and the
  /// last key of each.
  double speedup = 0;
  /// The same with what rows, tiles, masks and copies cost besides (na::cost_of): what a call should gain.
  double predicted = 0;
};

/// Two or three axes; a line has no boxes. Throws heed::Error for impossible windows.
KernelTiles kernel_tiles(std::span<const tiled::NeighborhoodAxis> axes, int64_t head_dim,
                         int64_t value_dim, DType dtype, const RunOptions& run);

}  // namespace heed::hardware
