#include "engine/chunked/path.h"

#include <algorithm>

#include "base/round_up.h"
#include "kernels/tile.h"

namespace heed::chunked {

namespace {

// Below this many tokens a state is read for few products, and rounding it to bfloat16 does not pay.
constexpr int64_t kFewTokens = 32;

// A way to run a call, best first.
struct Candidate {
  Isa isa;
  bool half_operands;
};
constexpr Candidate kCandidates[] = {{Isa::amx, true},
                                     {Isa::avx512, true},
                                     {Isa::avx512, false},
                                     {Isa::avx2, false},
                                     {Isa::portable, false}};

// Why a candidate cannot run a call; empty if it can.
std::string refusal(const Candidate& candidate, const CallKind& call, Isa strongest) {
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), candidate.isa) == available.end()) {
    return "this machine does not have it";
  }
  if (candidate.isa > strongest) return std::string(name_of(strongest)) + " is forced";
  if (!candidate.half_operands) return "";
  if (kernels::half_tile_kernels(candidate.isa) == nullptr) {
    return "this processor multiplies bfloat16 no faster than float32";
  }
  if (call.dtype != DType::bf16) {
    return std::string("it multiplies bfloat16, the call is ") + name_of(call.dtype);
  }
  if (call.mapped) return "features are made and multiplied in float32";
  if (call.tokens < kFewTokens) {
    return std::to_string(call.tokens) + " tokens: reading the state is the bound, not products";
  }
  return "";
}

// Tokens of a chunk: products inside it, which only causal calls have, grow with its length; what is done
// once a chunk with the state shrinks, and is dearer beside fast products. Multiples of the products' row
// blocks.
int64_t chunk_tokens(const Candidate& candidate, const CallKind& call) {
  const bool wide_state = call.state_width >= 96;
  if (!candidate.half_operands) return !call.causal && call.state_width >= 64 ? 96 : 48;
  if (!call.causal) return 192;
  if (candidate.isa == Isa::amx) return wide_state ? 192 : 128;
  return wide_state ? 96 : 64;
}

}  // namespace

Path choose_path(const CallKind& call, const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  const auto* chosen = std::find_if(
      std::begin(kCandidates), std::end(kCandidates),
      [&](const Candidate& candidate) { return refusal(candidate, call, strongest).empty(); });
  // The portable candidate refuses nothing.
  return {chosen->isa, chosen->half_operands, chunk_tokens(*chosen, call)};
}

std::vector<PathChoice> explain(const CallKind& call, const RunOptions& run) {
  const Isa strongest = chosen_isa(run);
  std::vector<PathChoice> choices;
  for (const Candidate& candidate : kCandidates) {
    std::string name = name_of(candidate.isa);
    if (candidate.half_operands && candidate.isa != Isa::amx) name += ", bfloat16 products";
    const std::string reason = refusal(candidate, call, strongest);
    choices.push_back({name, reason.empty(), reason});
  }
  return choices;
}

}  // namespace heed::chunked
