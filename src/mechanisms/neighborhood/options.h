// Options of neighborhood attention as text: "kernel_size=3x5,stride=2".
#pragma once
#include <span>
#include <vector>

#include "engine/tiled/neighborhood.h"
#include "mechanisms/spec.h"

namespace heed::na {

/// "3" or "3x5": one number for all axes or one each. Throws Error naming the key for other text and for
/// numbers below `least`.
std::vector<int64_t> numbers_of(const Spec& options, const char* key, const char* fallback,
                                int64_t least = 1);

/// The axes of a grid of these lengths. Throws Error also for other than one number or one per axis.
std::vector<tiled::NeighborhoodAxis> axes_of(const Spec& options, std::span<const int64_t> lengths);

}  // namespace heed::na
