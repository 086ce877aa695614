#include "engine/chunked/path.h"

namespace heed::chunked {

namespace {

// Below this many tokens a state is read for few products, and rounding it to bfloat16 does not pay.
constexpr int64_t kFewTokens = 32;

// Why bfloat16 products are not for a call.
std::string no_half_operands(const CallKind& call) {
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
  const Candidate chosen = choose_candidate(call.dtype, no_half_operands(call), run);
  return {chosen.isa, chosen.half_operands, chunk_tokens(chosen, call)};
}

std::vector<PathAnswer> explain(const CallKind& call, const RunOptions& run) {
  return explain_candidates(call.dtype, no_half_operands(call), "", run);
}

}  // namespace heed::chunked
