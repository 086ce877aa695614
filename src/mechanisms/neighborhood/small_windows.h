// Small windows on planes: neighbouring queries of a line in the lanes of vectors meet the keys they see and
// few others, where tiles would compute several times as many pairs.
#pragma once
#include "mechanisms/neighborhood/grid_call.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::na {

/// Whether the forward of the call is estimated to take less time here than in tiles of these shapes.
bool takes_small_windows(const GridCall& call, const TileShapes& shapes, const RunOptions& run);

/// Writes out and lse of any call on a line or plane without bias and additional keys, whose windows have at
/// most 32 lines. False where an input or a sum of weights is not finite: then what was written means
/// nothing, and tiles say what is right.
bool small_windows_forward(const GridCall& call, const RunOptions& run);

}  // namespace heed::na
