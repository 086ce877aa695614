#include "mechanisms/moh_router/routing.h"

#include <cmath>
#include <limits>

namespace heed::moh {

namespace {

/// Softmax over the elements with keep[i], all of them where keep is null; the others become 0.
void softmax(const double* logits, int64_t n, const char* keep, double* to) {
  double most = -std::numeric_limits<double>::infinity(), sum = 0;
  const auto kept = [&](int64_t i) { return keep == nullptr || keep[i] != 0; };
  for (int64_t i = 0; i < n; ++i) {
    if (kept(i) && logits[i] > most) most = logits[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    to[i] = kept(i) ? std::exp(logits[i] - most) : 0;
    sum += to[i];
  }
  for (int64_t i = 0; i < n; ++i) to[i] /= sum;
}

double dot(const std::vector<double>& a, const double* b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void choose_heads(const double* logits, int64_t heads, int64_t top_k, std::vector<char>& chosen) {
  chosen.assign(static_cast<size_t>(heads), 0);
  const auto above = [&](int64_t a, int64_t b) {
    return logits[a] > logits[b] || (std::isnan(logits[b]) && !std::isnan(logits[a]));
  };
  for (int64_t n = 0; n < top_k; ++n) {
    int64_t best = -1;
    for (int64_t e = 0; e < heads; ++e) {
      if (chosen[static_cast<size_t>(e)] == 0 && (best < 0 || above(e, best))) best = e;
    }
    chosen[static_cast<size_t>(best)] = 1;
  }
}

void route_token(const RouterShape& shape, const double* logits, TokenRouting& to) {
  const auto routed = static_cast<size_t>(shape.routed), shared = static_cast<size_t>(shape.shared);
  to.probabilities.resize(routed);
  to.routed_gates.resize(routed);
  to.shared_gates.assign(shared, 1);
  choose_heads(logits, shape.routed, shape.top_k, to.chosen);
  softmax(logits, shape.routed, nullptr, to.probabilities.data());
  if (shape.code) {
    // top_k p_e / sum_A p is top_k times the softmax over A alone.
    softmax(logits, shape.routed, to.chosen.data(), to.routed_gates.data());
  }
  for (size_t e = 0; e < routed; ++e) {
    const double p = to.probabilities[e];  // NaN in every head as soon as one logit is
    double& gate = to.routed_gates[e];
    if (std::isnan(p)) {
      gate = p;
    } else if (shape.code) {
      gate *= static_cast<double>(shape.top_k);
    } else {
      gate = to.chosen[e] != 0 ? p : 0;
    }
  }
  if (shape.shared_logits) {
    softmax(logits + shape.shared_at(), shape.shared, nullptr, to.shared_gates.data());
    if (shape.code) {
      for (double& gate : to.shared_gates) gate *= static_cast<double>(shape.shared);
    }
  }
  if (shape.grouped) {
    softmax(logits + shape.group_at(), 2, nullptr, to.group);
    for (int c = 0; c < 2; ++c) to.weight[c] = shape.code ? 2 * to.group[c] : to.group[c];
  }
}

void token_gradient(const RouterShape& shape, const TokenRouting& routing, const double* gates,
                    const double* probability_gradient, double* logits) {
  const double* routed = gates + shape.shared;
  const double shared_sum = dot(routing.shared_gates, gates);
  const double routed_sum = dot(routing.routed_gates, routed);
  const double mean = dot(routing.probabilities, probability_gradient);
  for (int64_t e = 0; e < shape.routed; ++e) {
    const auto at = static_cast<size_t>(e);
    const double gate = routing.routed_gates[at], p = routing.probabilities[at];
    const double pulled = shape.code ? gate / static_cast<double>(shape.top_k) : p;
    logits[e] = routing.weight[1] * (gate * routed[e] - pulled * routed_sum) +
                p * (probability_gradient[e] - mean);
  }
  if (shape.shared_logits) {
    const double factor = shape.code ? static_cast<double>(shape.shared) : 1;
    for (int64_t i = 0; i < shape.shared; ++i) {
      logits[shape.shared_at() + i] = routing.weight[0] *
                                      routing.shared_gates[static_cast<size_t>(i)] *
                                      (gates[i] - shared_sum / factor);
    }
  }
  if (shape.grouped) {
    const double sums[2] = {shared_sum, routed_sum};
    const double both = routing.group[0] * shared_sum + routing.group[1] * routed_sum;
    for (int c = 0; c < 2; ++c) {
      logits[shape.group_at() + c] = routing.weight[c] * (sums[c] - both);
    }
  }
}

}  // namespace heed::moh
