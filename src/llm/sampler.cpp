#include "llm/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "heed/error.h"

namespace heed {
namespace {

[[noreturn]] void bad(const char* name, double found, const char* needed) {
  std::ostringstream text;
  text << "sampler: " << name << " is " << found << ", needed " << needed;
  throw Error(text.str());
}

// The largest logit that is not -inf and its lowest id; every logit is checked.
int32_t best_of(std::span<const float> logits) {
  if (logits.empty()) throw Error("sampler: logits is empty, needed one value per token");
  if (logits.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    throw Error("sampler: logits has " + std::to_string(logits.size()) +
                " values, needed fewer than 2^31");
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity())
      throw Error("sampler: logits[" + std::to_string(i) + "] is " + std::to_string(logits[i]) +
                  ", needed a finite value or -inf");
    if (logits[i] > logits[best]) best = i;
  }
  if (std::isinf(logits[best])) throw Error("sampler: every logit is -inf, needed a finite one");
  return static_cast<int32_t>(best);
}

}  // namespace

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
  // Written so that NaN fails each test.
  if (!(options.temperature >= 0.0 && std::isfinite(options.temperature)))
    bad("temperature", options.temperature, "a finite value of at least 0");
  if (options.top_k && *options.top_k < 1) bad("top_k", *options.top_k, "at least 1");
  if (!(options.top_p > 0.0 && options.top_p <= 1.0))
    bad("top_p", options.top_p, "a value in (0, 1]");
  if (!(options.min_p >= 0.0 && options.min_p <= 1.0))
    bad("min_p", options.min_p, "a value in [0, 1]");
}

int32_t Sampler::sample(std::span<const float> logits) {
  int32_t best_id = best_of(logits);
  if (options_.temperature == 0.0) return best_id;
  double best = logits[static_cast<size_t>(best_id)];

  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (!std::isinf(logits[i])) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
  auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  size_t kept = candidates_.size();

  if (options_.top_k && static_cast<size_t>(*options_.top_k) < kept) {
    kept = static_cast<size_t>(*options_.top_k);
    auto middle = candidates_.begin() + static_cast<std::ptrdiff_t>(kept);
    std::nth_element(candidates_.begin(), middle, candidates_.end(), better);
  }
  candidates_.resize(kept);

  if (options_.top_p < 1.0) {
    double total = 0.0;
    for (const Candidate& c : candidates_) total += std::exp(c.logit - best);
    // A heap gives the most probable tokens one by one: usually few are needed, so no full sort.
    auto worse = [&](const Candidate& a, const Candidate& b) { return better(b, a); };
    std::make_heap(candidates_.begin(), candidates_.end(), worse);
    auto end = candidates_.end();
    for (double sum = 0.0; end != candidates_.begin() && sum < options_.top_p * total;) {
      std::pop_heap(candidates_.begin(), end, worse);
      --end;
      sum += std::exp(end->logit - best);
    }
    candidates_.erase(candidates_.begin(), end);
  }

  if (options_.min_p > 0.0)
    std::erase_if(candidates_,
                  [&](const Candidate& c) { return std::exp(c.logit - best) < options_.min_p; });

  // Selection leaves an order that differs between standard libraries; a draw must not depend on it.
  if (options_.top_k || options_.top_p < 1.0)
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  return draw(candidates_, best);
}

int32_t Sampler::draw(std::span<const Candidate> kept, double best) {
  auto weight = [&](const Candidate& c) {
    return std::exp((c.logit - best) / options_.temperature);
  };
  double total = 0.0;
  for (const Candidate& c : kept) total += weight(c);
  double fraction = static_cast<double>(random_() >> 11) * 0x1p-53;
  double target = fraction * total, sum = 0.0;
  int32_t chosen = -1;
  for (const Candidate& c : kept) {
    double w = weight(c);
    if (w == 0.0) continue;
    chosen = c.id;  // also the answer when rounding leaves the target at the very end
    sum += w;
    if (target < sum) break;
  }
  return chosen;
}

}  // namespace heed
