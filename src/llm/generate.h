// Text generation: the prompt through the model, then one token after the other.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "llm/sampler.h"

namespace heed {

class Model;

enum class StopReason {
  stop_token,  // the model ended its answer; the stop token is not among the tokens
  max_tokens,
  context,    // the context is full
  cancelled,  // a callback said so
};
const char* name_of(StopReason reason);

struct GenerateOptions {
  int64_t max_tokens = 512;  // at least 0
  SamplerOptions sampler = {};
  std::vector<int32_t> stop_tokens = {};
  /// Tokens that may come: the first so many. A model may have rows of logits that no token has.
  std::optional<int64_t> vocab = {};
  /// Called with every token as it comes; false stops.
  std::function<bool(int32_t token)> on_token = {};
  /// Called while the prompt is read, with the tokens done so far; false stops.
  std::function<bool(int64_t done, int64_t total)> on_prompt = {};
};

struct GenerateResult {
  std::vector<int32_t> tokens;
  StopReason stop = StopReason::max_tokens;
  int64_t prompt_tokens = 0;
  int64_t reused_tokens = 0;   // of the prompt, still known from the call before
  int64_t read_tokens = 0;     // of the prompt, the others; fewer where reading was cancelled
  int64_t decoded_tokens = 0;  // passes of one token through the model
  double prefill_seconds = 0;  // of the tokens read, up to the first logits
  double decode_seconds = 0;   // the decoded tokens and the choice of every token
  double attention_seconds = 0;

  // 0 where there was nothing to measure.
  double prefill_tokens_per_s() const;
  double decode_tokens_per_s() const;
  double attention_share() const;  // of the prefill and decode seconds
};

/// Generates with one model, which nobody else may use meanwhile. What consecutive prompts have in common
/// at their start, as the turns of a chat have, is read once; where layers have a state, it is read again
/// from the end of the last prompt when the prompts part behind that, and from the beginning when before.
class Generator {
 public:
  explicit Generator(Model& model) : model_(model) {}
  /// Throws Error for an empty prompt, one that is longer than the context, ids outside the vocabulary
  /// and bad sampler options.
  GenerateResult generate(std::span<const int32_t> prompt, const GenerateOptions& options);

 private:
  size_t keep_common(std::span<const int32_t> prompt);
  bool read_prompt(std::span<const int32_t> prompt, size_t common, const GenerateOptions& options,
                   GenerateResult& result);
  void append(std::span<const int32_t> tokens);
  void write_answer(const GenerateOptions& options, Sampler& sampler, GenerateResult& result);

  Model& model_;
  std::vector<int32_t> cached_;  // the tokens that the model knows
  uint64_t changes_ = 0;         // Model::changes() when it knew them
};

}  // namespace heed
