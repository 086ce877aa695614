// An instrumented memory: runs a cascade as hardware would stream it and counts every touch of every
// element, so that passes and footprint are measured and not derived.
//
// One fibre at a time (a query with its batch and head), and inside it pass after pass over the rank:
// each pass takes the rank tile by tile, and for a tile runs the statements of that pass in order,
// each only on its part. A word is live from its first write to its last touch. Masks are left open.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cascade/cascade.h"
#include "hardware/machine.h"

namespace heed::hardware {

struct TensorTouches {
  std::string tensor;
  bool input = false;
  int64_t elements = 0;  // of all fibres
  int64_t reads = 0, writes = 0;
};

struct StreamedRun {
  /// Times that some coordinate of the rank was visited with all others visited between.
  int passes = 0;
  /// Most words of intermediate tensors live at once, in the worst fibre.
  int64_t peak_live_words = 0;
  std::vector<TensorTouches> tensors;  // inputs first, then in the order of the statements
  PerOperation operations{};           // executed
  cascade::Values outputs;
};

/// `bindings` as for cascade::evaluate. Throws heed::Error where the cascade cannot be streamed over
/// the rank (a statement needs elements of a tile that is still to come) or is too large for a trace.
StreamedRun run_streamed(const cascade::Program& program, std::string_view rank,
                         const cascade::Bindings& bindings);

}  // namespace heed::hardware
