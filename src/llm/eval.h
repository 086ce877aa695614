// How well a model predicts a text.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

namespace heed {

class Model;

struct PerplexityOptions {
  std::optional<int64_t> stride = {};  // between windows, 1 to context; none: context / 2
  /// Called after every part of a window that the model reads at once (Model::chunk()), with the tokens
  /// scored so far; false stops, and the result covers those.
  std::function<bool(int64_t scored, int64_t total)> on_progress = {};
};

struct Perplexity {
  int64_t scored = 0;     // tokens: all that a token of a window precedes
  bool complete = false;  // the whole text was read
  double mean_nll = 0;    // natural logarithm, per scored token
  double perplexity = 0;  // exp(mean_nll)
  int64_t passed = 0;     // tokens through the model: more than those scored where windows overlap
  double attention_seconds = 0;
  double total_seconds = 0;
};

/// Windows of the model's context move over the text by `stride`. Every token but the first is scored once,
/// in the first window that holds it, so all but those of the first window see at least context - stride
/// tokens before them. With stride = context windows are apart, and the first token of each is not scored.
/// What the model knew before is forgotten. Throws Error for fewer than two tokens, for options out of
/// range and where logits hold NaN or infinity.
Perplexity perplexity(Model& model, std::span<const int32_t> tokens,
                      const PerplexityOptions& options = {});

}  // namespace heed
