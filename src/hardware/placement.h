// Any cascade on the machine: which array its operations run on, what stays on chip, and what it
// would gain from a machine like FuseMax. A bound by the closed forms of arXiv 2406.10491, without a
// mapping written by hand:
//
// - Operations over whole tiles of scores (the pass rank and another rank) and products over three
//   ranks go to the matrix array if it can do them, all others to the vector array.
// - A rank that does not fill the array's side leaves elements idle; batch ranks may stand together
//   on one side (decoding: one query, many heads).
// - Tensors that live across passes hold whole rows for each query. The buffer decides how many
//   queries wait there together; what does not fit goes through DRAM.
#pragma once
#include <functional>
#include <set>

#include "hardware/accelerator.h"
#include "mechanisms/registry.h"

namespace heed::hardware {

/// A cascade with the sizes of one call.
struct PlacedCall {
  EinsumCascade cascade;
  std::string pass_rank;
  int passes = 0;
  std::map<std::string, int> pass_of;              // tensor -> pass that defines it
  std::set<std::string> batch_ranks, outer_ranks;  // outer: tiles of a split rank
  Sizes sizes;
  std::map<std::string, double> input_share;  // words of an input over the product of its ranks
  struct Mask {
    std::string a, b;  // ranks
    double share = 1;  // of its tiles that hold a visible pair
  };
  std::vector<Mask> masks;
};

/// What a case binds; large, so made once for all cascades and machines.
cascade::Bindings bind_case(const Mechanism& mechanism, const ExampleCase& example);
/// `sizes` replaces sizes of the case, by rank name; split ranks are cut to the array's rows.
PlacedCall place(const Machine& machine, const CascadeText& text, const std::string& rank,
                 const cascade::Bindings& bindings, const Sizes& sizes);
/// A cascade file, which needs the sizes of all its ranks.
PlacedCall place(const Machine& machine, const cascade::Program& program, const std::string& rank,
                 const Sizes& sizes);

/// Seconds of one call under four ways to run it.
struct PlacementCost {
  double matrix_s = 0, vector_s = 0, memory_s = 0;  // on chip: what each would need alone
  double unfused_s = 0;                             // each Einsum alone, all tensors through DRAM
  double in_turn_s = 0;                             // on chip, the arrays one after the other
  double overlapped_s = 0;          // on chip, both arrays busy: the slower one or DRAM bounds
  double util_2d = 0, util_1d = 0;  // of the overlapped form
  double traffic_bytes = 0, unfused_bytes = 0;
  double energy_pj = 0;  // operations and DRAM of the overlapped form
};
PlacementCost placement_cost(const Machine& machine, const PlacedCall& call);

}  // namespace heed::hardware
