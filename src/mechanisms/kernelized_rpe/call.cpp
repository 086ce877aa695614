#include "mechanisms/kernelized_rpe/call.h"

#include <cmath>
#include <limits>

namespace heed::rpe {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The entries of one head's rpb that offsets -span .. span have, masked ones left out.
struct Used {
  const double* first;
  int64_t count;
};
Used used(const Call& call, const std::vector<double>& rpb, int64_t h) {
  return {rpb.data() + h * call.entries + call.first_entry,
          call.options.causal ? call.span + 1 : call.offsets()};
}

}  // namespace

template <class T>
OffsetWeights<T> offset_weights(const Call& call) {
  const std::vector<double> rpb = contiguous_values<double>(call.rpb);
  const int64_t n = call.offsets(), heads = call.sizes.heads;
  OffsetWeights<T> weights;
  weights.span = call.span;
  weights.values.assign(static_cast<size_t>(heads * n), T{0});
  weights.some_zero.assign(static_cast<size_t>(heads), 0);
  for (int64_t h = 0; h < heads; ++h) {
    const Used entries = used(call, rpb, h);
    double most = -kInfinity;
    for (int64_t i = 0; i < entries.count; ++i) {
      if (std::isfinite(entries.first[i])) most = std::max(most, entries.first[i]);
    }
    if (most == -kInfinity) most = 0;
    for (int64_t i = 0; i < entries.count; ++i) {
      const double b = entries.first[i];
      const T c = static_cast<T>(b == -kInfinity ? 0 : std::exp(b - most));
      weights.values[static_cast<size_t>(h * n + i)] = c;
      if (c == 0) weights.some_zero[static_cast<size_t>(h)] = 1;
    }
  }
  return weights;
}

template OffsetWeights<float> offset_weights(const Call& call);
template OffsetWeights<double> offset_weights(const Call& call);

Spread offset_spread(const Call& call) {
  const std::vector<double> rpb = contiguous_values<double>(call.rpb);
  Spread spread;
  for (int64_t h = 0; h < call.sizes.heads; ++h) {
    const Used entries = used(call, rpb, h);
    double most = -kInfinity, least = kInfinity;
    for (int64_t i = 0; i < entries.count; ++i) {
      const double b = entries.first[i];
      if (b == -kInfinity) continue;
      if (!std::isfinite(b)) spread.finite = false;
      most = std::max(most, b);
      least = std::min(least, b);
    }
    if (most > least) spread.largest = std::max(spread.largest, most - least);
  }
  return spread;
}

void store_rpb_gradient(const Call& call, const std::vector<double>& sums, const Tensor& to) {
  const int64_t n = call.offsets();
  std::vector<double> all(static_cast<size_t>(call.sizes.heads * call.entries));
  if (call.tokens > 0) {
    for (int64_t h = 0; h < call.sizes.heads; ++h) {
      std::copy_n(sums.data() + h * n, n, all.data() + h * call.entries + call.first_entry);
    }
  }
  copy_values(all.data(), to);
}

}  // namespace heed::rpe
