// FLAT (arXiv 2107.06419) as FuseMax models it: rows of scores wait in the buffer for their softmax.
#pragma once
#include "hardware/accelerator.h"

namespace heed::hardware {

/// Where tensors lie and in which order the products run.
struct FlatChoice {
  int64_t query_rows = 1;  // queries whose scores are in the buffer together
  bool scores = true, q = false, k = false, v = false, out = false;  // in the buffer?
  bool weight_stationary = false;  // keys and values stay in the array while queries stream
  double spilled_share = 0;        // of what lies in the buffer and does not fit
  double score_rereads = 0;        // further buffer reads of each score
  bool published = false;
};

/// The published search's choice for its shapes, else the one that moves least through DRAM.
FlatChoice choose_flat(const Machine& machine, const Workload& layer);
/// The search alone.
FlatChoice search_flat(const Machine& machine, const Workload& layer);
Movement flat_movement(const Machine& machine, const Workload& layer, const FlatChoice& choice);

}  // namespace heed::hardware
