#include "engine/candidates.h"

#include <algorithm>

#include "kernels/tile.h"

namespace heed {

namespace {

constexpr Candidate kCandidates[] = {{Isa::amx, true},
                                     {Isa::avx512, true},
                                     {Isa::avx512, false},
                                     {Isa::avx2, false},
                                     {Isa::portable, false}};

std::string refusal_of_isa(Isa isa, Isa strongest) {
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end()) {
    return "this machine does not have it";
  }
  return isa > strongest ? std::string(name_of(strongest)) + " is forced" : "";
}

std::string refusal(const Candidate& candidate, DType dtype, const NoHalf& no_half, Isa strongest) {
  if (std::string reason = refusal_of_isa(candidate.isa, strongest); !reason.empty()) return reason;
  if (!candidate.half_operands) return "";
  if (dtype != DType::bf16) {
    return std::string("it multiplies bfloat16, the call is ") + name_of(dtype);
  }
  if (kernels::half_tile_kernels(candidate.isa) == nullptr) {
    return "this processor multiplies bfloat16 no faster than float32";
  }
  return candidate.isa == Isa::amx ? no_half.tile_unit : no_half.vectors;
}

}  // namespace

Candidate choose_candidate(DType dtype, const NoHalf& no_half, const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  // The portable candidate refuses nothing.
  return *std::find_if(std::begin(kCandidates), std::end(kCandidates), [&](const Candidate& c) {
    return refusal(c, dtype, no_half, strongest).empty();
  });
}

std::vector<PathAnswer> explain_candidates(DType dtype, const NoHalf& no_half,
                                           std::string_view wide_name, const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  std::vector<PathAnswer> answers;
  for (const Candidate& candidate : kCandidates) {
    std::string name = name_of(candidate.isa);
    if (candidate.half_operands && candidate.isa != Isa::amx) name += ", bfloat16 products";
    if (!candidate.half_operands) name += wide_name;
    const std::string reason = refusal(candidate, dtype, no_half, strongest);
    answers.push_back({name, reason.empty(), reason});
  }
  return answers;
}

std::vector<PathAnswer> explain_isas(const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  std::vector<PathAnswer> answers;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    const std::string reason = refusal_of_isa(isa, strongest);
    answers.push_back({name_of(isa), reason.empty(), reason});
  }
  return answers;
}

}  // namespace heed
