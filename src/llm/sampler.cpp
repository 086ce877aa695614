#include "llm/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <utility>

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
      throw Error("sampler: the logits hold NaN or infinity, first for token " + std::to_string(i) +
                  ", needed finite ones or -inf; the model or its --attention overflowed");
    if (logits[i] > logits[best]) best = i;
  }
  if (std::isinf(logits[best])) throw Error("sampler: every logit is -inf, needed a finite one");
  return static_cast<int32_t>(best);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Mostly all that top_k or top_p keeps has logits this near to the best.
constexpr double kNear = 8.0;
// Beyond 64, where weights at temperature 1 are less than 1e-27, it is not worth looking more often.
double farther(double distance) { return distance < 64.0 ? 2 * distance : kInfinity; }

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
  best_ = logits[static_cast<size_t>(best_id)];

  if (!options_.top_k && options_.top_p == 1.0 && options_.min_p == 0.0) {
    return static_cast<int32_t>(draw(logits.size(), [&](size_t i) { return logits[i]; }));
  }
  candidates_.clear();
  if (options_.top_k) keep_top_k(logits, static_cast<size_t>(*options_.top_k));
  if (options_.top_p < 1.0) keep_top_p(logits);
  if (options_.min_p > 0.0) keep_min_p(logits);
  // Selection leaves an order that differs between standard libraries; a draw must not depend on it.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  return candidates_[draw(candidates_.size(), [&](size_t i) { return candidates_[i].logit; })].id;
}

bool Sampler::better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Adds the tokens whose logits are at least `from` and less than `to` below the best.
void Sampler::add(std::span<const float> logits, double from, double to) {
  for (size_t i = 0; i < logits.size(); ++i) {
    const double below = best_ - logits[i];
    if (below >= from && below < to) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
  }
}

void Sampler::keep_top_k(std::span<const float> logits, size_t count) {
  for (double from = 0, to = kNear; candidates_.size() < count && from < kInfinity;
       from = std::exchange(to, farther(to))) {
    add(logits, from, to);
  }
  if (count >= candidates_.size()) return;
  const auto middle = candidates_.begin() + static_cast<std::ptrdiff_t>(count);
  std::nth_element(candidates_.begin(), middle, candidates_.end(), better);
  candidates_.erase(middle, candidates_.end());
}

void Sampler::keep_top_p(std::span<const float> logits) {
  double total = 0.0;
  if (options_.top_k) {
    for (const Candidate& c : candidates_) total += std::exp(c.logit - best_);
  } else {
    for (const float logit : logits) total += std::exp(logit - best_);
  }
  // A heap gives the most probable ones one by one: mostly few are needed, and of few it is made.
  const auto worse = [](const Candidate& a, const Candidate& b) { return better(b, a); };
  double sum = 0.0;
  const auto enough = [&] { return sum >= options_.top_p * total; };
  size_t kept = 0;
  for (double from = 0, to = kNear; !enough() && from < kInfinity;
       from = std::exchange(to, farther(to))) {
    if (!options_.top_k) add(logits, from, to);
    const auto first = candidates_.begin() + static_cast<std::ptrdiff_t>(kept);
    auto end = candidates_.end();
    std::make_heap(first, end, worse);
    while (end != first && !enough()) {
      std::pop_heap(first, end--, worse);
      sum += std::exp(end->logit - best_);
    }
    candidates_.erase(first, end);
    kept = candidates_.size();
  }
}

void Sampler::keep_min_p(std::span<const float> logits) {
  // One more than the least logit's distance: what rounding there does, the exponential decides.
  if (!options_.top_k && options_.top_p == 1.0) add(logits, 0, 1.0 - std::log(options_.min_p));
  std::erase_if(candidates_,
                [&](const Candidate& c) { return std::exp(c.logit - best_) < options_.min_p; });
}

// One of `count` logits: its index.
template <class LogitOf>
size_t Sampler::draw(size_t count, const LogitOf& logit_of) {
  weights_.resize(count);
  double total = 0.0;
  for (size_t i = 0; i < count; ++i)
    total += weights_[i] = std::exp((logit_of(i) - best_) / options_.temperature);
  double fraction = static_cast<double>(random_() >> 11) * 0x1p-53;
  double target = fraction * total, sum = 0.0;
  size_t chosen = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] == 0.0) continue;
    chosen = i;  // also the answer when rounding leaves the target at the very end
    sum += weights_[i];
    if (target < sum) break;
  }
  return chosen;
}

}  // namespace heed
