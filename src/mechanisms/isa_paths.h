// `explain` of mechanisms whose only choice is the instruction set.
#pragma once
#include <algorithm>
#include <vector>

#include "mechanisms/registry.h"

namespace heed {

inline std::vector<PathAnswer> explain_isas(const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  const auto& available = available_isas();
  std::vector<PathAnswer> answers;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    const bool there = std::find(available.begin(), available.end(), isa) != available.end();
    std::string reason;
    if (!there) {
      reason = "this machine does not have it";
    } else if (isa > strongest) {
      reason = std::string(name_of(strongest)) + " is forced";
    }
    answers.push_back({name_of(isa), reason.empty(), reason});
  }
  return answers;
}

}  // namespace heed
