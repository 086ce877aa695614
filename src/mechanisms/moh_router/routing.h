// Mixture-of-Head routing of one token: from router logits to gates, and back. Float64 throughout.
#pragma once
#include <cstdint>
#include <vector>

namespace heed::moh {

/// The logits of a token lie one behind the other: routed heads, shared heads, groups.
struct RouterShape {
  int64_t shared = 0, routed = 0, top_k = 0;
  bool code = true;            // else the paper's form
  bool shared_logits = false;  // without them one shared head has softmax 1
  bool grouped = false;        // without groups both weights are 1
  int64_t heads() const { return shared + routed; }
  int64_t shared_at() const { return routed; }
  int64_t group_at() const { return routed + (shared_logits ? shared : 0); }
  int64_t logits() const { return group_at() + (grouped ? 2 : 0); }
};

/// A token's gates are weight[0] * shared_gates, then weight[1] * routed_gates.
struct TokenRouting {
  std::vector<double> probabilities;  // softmax over all routed heads
  std::vector<char> chosen;           // of the routed heads
  std::vector<double> shared_gates, routed_gates;
  double group[2] = {1, 1};   // softmax of the groups
  double weight[2] = {1, 1};  // what multiplies the gates of a group
};

/// The top_k largest, ties to the lower index; NaN comes last.
void choose_heads(const double* logits, int64_t heads, int64_t top_k, std::vector<char>& chosen);
void route_token(const RouterShape& shape, const double* logits, TokenRouting& to);

/// Gradient of the logits, from that of the gates [heads] and from that of the mean probabilities:
/// probability_gradient [routed] is the same for every token.
void token_gradient(const RouterShape& shape, const TokenRouting& routing, const double* gates,
                    const double* probability_gradient, double* logits);

}  // namespace heed::moh
