// Sizes of ranks and constants for one case, and index expressions with numbers in place of sizes.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "cascade/cascade.h"
#include "cascade/lowered.h"

namespace heed::cascade {

/// By size number: ranks, then constants. Taken from Bindings::sizes and the shapes of the inputs;
/// throws heed::Error where they are missing, negative or disagree.
std::vector<int64_t> bind_sizes(const Lowered& lowered, const Bindings& bindings);

/// constant + sum of coefficient*rank + sum of coefficient*call
struct Affine {
  int64_t constant = 0;
  std::vector<std::pair<int, int64_t>> ranks;  // rank, coefficient; each rank once
  std::vector<std::pair<int, int64_t>> calls;  // node of kind call, coefficient
};

/// Throws heed::Error if a number leaves the range +-2^40.
Affine affine_of(const Lowered& lowered, int node, const std::vector<int64_t>& sizes);

/// Smallest and largest value over the whole range of the ranks, without the calls.
std::pair<int64_t, int64_t> range_of(const Affine& affine, const std::vector<int64_t>& sizes);

}  // namespace heed::cascade
