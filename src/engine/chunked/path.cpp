#include "engine/chunked/path.h"

#include <algorithm>

#include "base/round_up.h"

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
int64_t tokens_of_many(const Candidate& candidate, const CallKind& call) {
  const int64_t state_width = std::min(call.features, call.value_dim);
  const bool wide_state = state_width >= 96;
  if (!candidate.half_operands) return !call.causal && state_width >= 64 ? 96 : 48;
  if (!call.causal) return 192;
  if (candidate.isa == Isa::amx) return wide_state ? 192 : 128;
  return wide_state ? 96 : 64;
}

// About `many` tokens, a multiple of the products' rows, and the last chunk nearly as long as the others: a
// few tokens would cost as much with a state as many.
int64_t even_chunk(int64_t tokens, int64_t many, int64_t rows) {
  const int64_t most = many + many / 4;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(tokens, most));
  return std::min(most / rows * rows,
                  round_up(std::max<int64_t>(1, ceil_div(tokens, chunks)), rows));
}

int64_t chunk_tokens(const Candidate& candidate, const CallKind& call) {
  const int64_t many = tokens_of_many(candidate, call);
  if (!call.causal) return even_chunk(call.tokens, many, candidate.isa == Isa::amx ? 32 : 12);
  // The first chunk reads no state and the last one adds to none, so in short sequences products of all
  // rows are fewer than those with states: half the length for each row against a sum and a read. A
  // quarter is left for calls that want the last state, on which results must not depend, nor on others
  // in the batch.
  const int64_t own = call.tokens * (call.score_width + call.value_dim) / 2;
  const int64_t state = 2 * call.features * call.value_dim;
  if (call.starts_with_state || 4 * own >= 3 * state) return many;
  constexpr int64_t kMostTokens = 480;  // whose scores stay in the second-level cache
  const int64_t chunks = std::max<int64_t>(1, ceil_div(call.tokens, kMostTokens));
  return std::max(many, round_up(ceil_div(call.tokens, chunks), 48));
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
