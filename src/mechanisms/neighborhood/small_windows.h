// Small windows on planes: neighbouring queries of a line in the lanes of vectors meet the keys they see and
// few others, where tiles would compute several times as many pairs.
#pragma once
#include <optional>

#include "mechanisms/neighborhood/passes.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::na {

/// Whether a pass of the call is estimated to take less time here than in tiles of these shapes.
bool takes_small_windows(const GridCall& call, const TileShapes& shapes, const RunOptions& run);
bool takes_small_windows_backward(const GridCall& call, const TileShapes& shapes,
                                  const RunOptions& run);

/// What costs are estimated from, of one residue group.
struct SmallWindowWork {
  double pairs = 0;  // in lanes
  double tokens = 0, widths = 0;
  bool many_registers = false;
};
/// Nothing where tiles are needed.
std::optional<SmallWindowWork> small_window_work(const GridCall& call, const RunOptions& run);

/// Writes out and lse of any call on a line or plane without bias and additional keys, whose windows have at
/// most 32 lines. False where an input or a sum of weights is not finite: then what was written means
/// nothing, and tiles say what is right.
bool small_windows_forward(const GridCall& call, const RunOptions& run);

/// Writes the gradients of query, key and value of such a call. False where an input is not finite or
/// a log-sum-exp is far from ordinary: then what was written means nothing, and tiles say what is right.
bool small_windows_backward(const GridCall& call, const CallGradients& gradients,
                            const RunOptions& run);

}  // namespace heed::na
