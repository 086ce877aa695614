// Identities and limits of sheet 02, 9(a), in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

double largest(const Array& x) { return largest_difference(x, Array::zeros(x.dtype(), x.shape())); }

/// The Jacobian [n d, n d] of sigmoid attention with q, k and v the same x, row by row.
std::vector<double> jacobian(const Array& x, const SigmoidOptions& options) {
  RunOptions run;
  run.threads = 1;
  std::vector<double> rows;
  for (int64_t i = 0; i < x.count(); ++i) {
    Array one = Array::zeros(DType::f64, x.shape());
    one.as<double>()[i] = 1;
    const SigmoidGradients to = sigmoid_attention_backward(one, x, x, x, options, run);
    for (int64_t j = 0; j < x.count(); ++j) {
      rows.push_back(to.q.as<double>()[j] + to.k.as<double>()[j] + to.v.as<double>()[j]);
    }
  }
  return rows;
}

// By power iteration, so from below.
double spectral_norm(const std::vector<double>& matrix, size_t n) {
  std::vector<double> x(n, 1), y(n);
  double norm = 0;
  for (int round = 0; round < 200; ++round) {
    for (size_t i = 0; i < n; ++i) {
      y[i] = 0;
      for (size_t j = 0; j < n; ++j) y[i] += matrix[i * n + j] * x[j];
    }
    double square = 0, length = 0;
    for (double value : y) square += value * value;
    for (size_t j = 0; j < n; ++j) {
      x[j] = 0;
      for (size_t i = 0; i < n; ++i) x[j] += matrix[i * n + j] * y[i];
      length += x[j] * x[j];
    }
    norm = std::sqrt(square);
    for (double& value : x) value /= std::sqrt(length);
  }
  return norm;
}

// Sheet 02, 3: |J| <= s + 2 s' mean |x|^2 with s = n sup sigma, s' = n sup sigma' over all scores.
TEST(SigmoidIdentities, TheJacobianStaysBelowItsBound) {
  constexpr int64_t kTokens = 16, kDim = 8;
  SigmoidOptions options;
  options.scale = 1;
  for (double size : {0.1, 0.5, 1.0}) {
    for (uint32_t seed : {1U, 2U}) {
      const Array x = random_array(DType::f64, {1, 1, kTokens, kDim}, seed, size);
      double sigma = 0, slope = 0, squares = 0;
      for (int64_t i = 0; i < kTokens; ++i) {
        for (int64_t j = 0; j < kTokens; ++j) {
          double score = -std::log(static_cast<double>(kTokens));
          for (int64_t e = 0; e < kDim; ++e) {
            score += x.as<double>()[i * kDim + e] * x.as<double>()[j * kDim + e];
          }
          const double weight = 1 / (1 + std::exp(-score));
          sigma = std::max(sigma, weight);
          slope = std::max(slope, weight * (1 - weight));
        }
      }
      for (int64_t i = 0; i < x.count(); ++i) squares += x.as<double>()[i] * x.as<double>()[i];
      const double bound = kTokens * (sigma + 2 * slope * squares / kTokens);
      const double norm = spectral_norm(jacobian(x, options), kTokens * kDim);
      EXPECT_LT(norm, bound) << size;
      EXPECT_GT(norm, bound / 1000) << size;
    }
  }
}

// n sigma(s - log n) = e^s (1 - e^s / (n + e^s)).
TEST(SigmoidIdentities, ManyKeysMakeSoftmaxAttention) {
  for (int64_t keys : {16, 256, 4096}) {
    const Array q = random_array(DType::f64, {1, 2, 5, 8}, 1);
    const Array k = random_array(DType::f64, {1, 2, keys, 8}, 2, 0.5);
    const Array v = random_array(DType::f64, {1, 2, keys, 6}, 3);
    const AttentionResult softmax = flash_attention(q, k, v);
    Array ratio = sigmoid_attention(q, k, v);
    for (int64_t i = 0; i < ratio.count(); ++i) {
      ratio.as<double>()[i] *=
          static_cast<double>(keys) / std::exp(softmax.lse.as<double>()[i / 6]);
    }
    double most = 0;  // e^s
    for (int64_t i = 0; i < 10; ++i) {
      for (int64_t m = 0; m < keys; ++m) {
        double score = 0;
        for (int64_t e = 0; e < 8; ++e) {
          score += q.as<double>()[i * 8 + e] * k.as<double>()[(i / 5 * keys + m) * 8 + e];
        }
        most = std::max(most, std::exp(score / std::sqrt(8.0)));
      }
    }
    const double bound = most / static_cast<double>(keys) * largest(v);
    EXPECT_LT(largest_difference(ratio, softmax.out), bound) << keys;
  }
}

// With the identity as values a result is its row of weights.
TEST(SigmoidIdentities, AKeyChangesItsOwnWeightsOnly) {
  constexpr int64_t kKeys = 12, kChanged = 7;
  const Array q = random_array(DType::f64, {1, 1, 9, 8}, 1);
  const Array k = random_array(DType::f64, {1, 1, kKeys, 8}, 2);
  Array v = Array::zeros(DType::f64, {1, 1, kKeys, kKeys}), other = convert(k, DType::f64);
  for (int64_t m = 0; m < kKeys; ++m) v.as<double>()[m * kKeys + m] = 1;
  for (int64_t e = 0; e < 8; ++e) other.as<double>()[kChanged * 8 + e] += 1;
  const Array before = sigmoid_attention(q, k, v), after = sigmoid_attention(q, other, v);
  for (int64_t i = 0; i < before.count(); ++i) {
    EXPECT_EQ(before.as<double>()[i] == after.as<double>()[i], i % kKeys != kChanged) << i;
  }
}

TEST(SigmoidIdentities, TheScaleMayLieInQueriesAndKeys) {
  const Array q = random_array(DType::f64, {1, 2, 9, 20}, 1);
  const Array k = random_array(DType::f64, {1, 2, 30, 20}, 2);
  const Array v = random_array(DType::f64, {1, 2, 30, 6}, 3);
  Array scaled_q = convert(q, DType::f64), scaled_k = convert(k, DType::f64);
  for (Array* x : {&scaled_q, &scaled_k}) {
    for (int64_t i = 0; i < x->count(); ++i) x->as<double>()[i] *= std::pow(20.0, -0.25);
  }
  SigmoidOptions unscaled;
  unscaled.scale = 1;
  EXPECT_LT(largest_difference(sigmoid_attention(scaled_q, scaled_k, v, unscaled),
                               sigmoid_attention(q, k, v)),
            1e-14);
}

}  // namespace
}  // namespace heed
