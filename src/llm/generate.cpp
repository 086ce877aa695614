#include "llm/generate.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <string>

#include "heed/error.h"
#include "llm/model.h"

namespace heed {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double ratio(double a, double b) { return b > 0 ? a / b : 0; }

}  // namespace

const char* name_of(StopReason reason) {
  constexpr std::array kNames{"stop token", "max tokens", "context full", "cancelled"};
  return kNames[static_cast<size_t>(reason)];
}

double GenerateResult::prefill_tokens_per_s() const {
  return ratio(static_cast<double>(read_tokens), prefill_seconds);
}
double GenerateResult::decode_tokens_per_s() const {
  return ratio(static_cast<double>(decoded_tokens), decode_seconds);
}
double GenerateResult::attention_share() const {
  return ratio(attention_seconds, prefill_seconds + decode_seconds);
}

void Generator::append(std::span<const int32_t> tokens) {
  model_.append(tokens);
  cached_.insert(cached_.end(), tokens.begin(), tokens.end());
  changes_ = model_.changes();
}

// Forgets what the prompt does not begin with; returns how many tokens are left.
size_t Generator::keep_common(std::span<const int32_t> prompt) {
  // Someone else may have used the model in between: then only an empty cache is known.
  if (changes_ != model_.changes()) cached_.clear();
  const size_t most =
      std::min(prompt.size() - 1, cached_.size());  // the last token gives the logits
  const auto differs =
      std::mismatch(prompt.begin(), prompt.begin() + static_cast<int64_t>(most), cached_.begin());
  const size_t common = static_cast<size_t>(model_.truncate(differs.first - prompt.begin()));
  cached_.resize(common);
  changes_ = model_.changes();
  return common;
}

// Runs the prompt after its `common` tokens; false when it was cancelled.
bool Generator::read_prompt(std::span<const int32_t> prompt, size_t common,
                            const GenerateOptions& options, GenerateResult& result) {
  const int64_t total = static_cast<int64_t>(prompt.size());
  const size_t rest = prompt.size() - common;
  const size_t chunk_tokens = static_cast<size_t>(model_.chunk());
  const size_t chunks = 1 + (rest - 1) / chunk_tokens;  // rest >= 1: the last token
  for (size_t c = 0; c < chunks; ++c) {
    const size_t begin = common + rest * c / chunks, end = common + rest * (c + 1) / chunks;
    const auto chunk = prompt.subspan(begin, end - begin);
    append(chunk);
    result.read_tokens += static_cast<int64_t>(chunk.size());
    if (options.on_prompt && !options.on_prompt(static_cast<int64_t>(end), total)) return false;
  }
  model_.mark();  // the next prompt may part from this one within the answer
  return true;
}

void Generator::write_answer(const GenerateOptions& options, Sampler& sampler,
                             GenerateResult& result) {
  while (static_cast<int64_t>(result.tokens.size()) < options.max_tokens) {
    const std::span<const float> logits = model_.logits();
    const auto rows = static_cast<int64_t>(logits.size());
    const int64_t vocab = std::min(options.vocab.value_or(rows), rows);
    const int32_t token = sampler.sample(logits.first(static_cast<size_t>(vocab)));
    if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) !=
        options.stop_tokens.end()) {
      result.stop = StopReason::stop_token;
      return;
    }
    result.tokens.push_back(token);
    if (options.on_token && !options.on_token(token)) {
      result.stop = StopReason::cancelled;
      return;
    }
    if (static_cast<int64_t>(result.tokens.size()) == options.max_tokens) return;
    if (model_.length() == model_.context()) {
      result.stop = StopReason::context;
      return;
    }
    append(std::span(&token, 1));
    ++result.decoded_tokens;
  }
}

GenerateResult Generator::generate(std::span<const int32_t> prompt,
                                   const GenerateOptions& options) {
  if (prompt.empty()) throw Error("prompt: it has no tokens, at least one is needed");
  if (static_cast<int64_t>(prompt.size()) > model_.context()) {
    throw Error("prompt: it has " + std::to_string(prompt.size()) + " tokens, the context holds " +
                std::to_string(model_.context()));
  }
  if (options.vocab && *options.vocab < 1) {
    throw Error("vocab is " + std::to_string(*options.vocab) + ", at least 1 is needed");
  }
  if (options.max_tokens < 0) {
    throw Error("max_tokens is " + std::to_string(options.max_tokens) + ", at least 0 is needed");
  }
  Sampler sampler(options.sampler);
  GenerateResult result;
  result.prompt_tokens = static_cast<int64_t>(prompt.size());
  const double attention_before = model_.attention_seconds();
  const size_t common = keep_common(prompt);
  result.reused_tokens = static_cast<int64_t>(common);
  model_.reserve(std::min(model_.context(),
                          result.prompt_tokens + std::min<int64_t>(options.max_tokens, 512)));
  model_.prepare(static_cast<int64_t>(prompt.size() - common));
  auto start = std::chrono::steady_clock::now();
  const bool complete = read_prompt(prompt, common, options, result);
  if (complete) (void)model_.logits();
  result.prefill_seconds = seconds_since(start);
  start = std::chrono::steady_clock::now();
  if (complete) {
    write_answer(options, sampler, result);
  } else {
    result.stop = StopReason::cancelled;
  }
  result.decode_seconds = seconds_since(start);
  result.attention_seconds = model_.attention_seconds() - attention_before;
  return result;
}

}  // namespace heed
