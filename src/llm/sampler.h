// Choice of the next token from logits.
#pragma once
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

namespace heed {

struct SamplerOptions {
  double temperature = 0.0;  // >= 0; 0 is greedy: the largest logit, the lowest id of equals
  std::optional<int> top_k = std::nullopt;  // >= 1: keep the k most probable tokens
  double top_p = 1.0;  // in (0, 1]: keep the fewest tokens that reach this probability
  double min_p = 0.0;  // in [0, 1]: keep tokens with at least min_p times the best's probability
  uint64_t seed = 0;
};

/// Draws tokens. The filters work in the order top_k, top_p, min_p, each on the probabilities at
/// temperature 1 renormalised over what the filter before it kept; then the rest is drawn from at the
/// given temperature. Of equal logits the lower id counts as the more probable. At least one token stays.
/// top_p: Holtzman et al., arXiv:1904.09751; min_p: Nguyen et al., arXiv:2407.01082.
/// Random numbers: std::mt19937_64, one draw per sampled token (none when greedy), its top 53 bits as a
/// fraction, so that a seed means the same sequence everywhere.
class Sampler {
 public:
  /// Throws Error for values outside the ranges above.
  explicit Sampler(const SamplerOptions& options);
  /// logits [vocab]: finite, or -inf for tokens that must not come. Throws Error for NaN, +inf, an empty
  /// span or all -inf.
  int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  static bool better(const Candidate& a, const Candidate& b);
  void add(std::span<const float> logits, double from, double to);
  void keep_top_k(std::span<const float> logits, size_t count);
  void keep_top_p(std::span<const float> logits);
  void keep_min_p(std::span<const float> logits);
  template <class LogitOf>
  size_t draw(size_t count, const LogitOf& logit_of);

  SamplerOptions options_;
  std::mt19937_64 random_;
  double best_ = 0.0;  // largest logit
  // Reused between calls.
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

}  // namespace heed
