// What a comparison with the cascade does not draw.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr int64_t kTokens = 37, kValues = 8;

// Row i is the sum of the values that it gives a weight of 1, the others have one of 0.
template <class Counts>
Array sums_of(const Array& v, Counts&& counts) {
  Array sums = Array::zeros(DType::f32, {1, 1, kTokens, kValues});
  for (int64_t i = 0; i < kTokens; ++i) {
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t f = 0; f < kValues && counts(i, m); ++f) {
        sums.as<float>()[i * kValues + f] += v.as<float>()[m * kValues + f];
      }
    }
  }
  return sums;
}

TEST(Sigmoid, ExtremeBiasesAndSlopesGiveWeightsOfZeroAndOne) {
  const Array q = random_array(DType::f32, {1, 1, kTokens, 12}, 1);
  const Array k = random_array(DType::f32, {1, 1, kTokens, 12}, 2);
  const Array v = random_array(DType::f32, {1, 1, kTokens, kValues}, 3);
  const auto causal = [](int64_t i, int64_t m) { return m <= i; };
  const auto other = [](int64_t i, int64_t m) { return m < i; };
  const auto none = [](int64_t, int64_t) { return false; };
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    const auto expect = [&](const SigmoidOptions& options, const Array& want, const char* what) {
      EXPECT_LT(largest_difference(sigmoid_attention(q, k, v, options, run), want), 1e-5)
          << what << " " << name_of(isa);
      const SigmoidGradients to = sigmoid_attention_backward(v, q, k, v, options, run);
      for (const Array* x : {&to.q, &to.k, &to.bias, &to.alibi_slopes}) {
        if (!x->view().defined()) continue;
        EXPECT_LT(largest_difference(*x, Array::zeros(x->dtype(), x->shape())), 1e-30)
            << what << " " << name_of(isa);
      }
    };
    for (float size : {1e30F, 3e38F, std::numeric_limits<float>::max()}) {
      Array value(DType::f32, {1});
      SigmoidOptions options;
      options.masks.causal = true;
      options.bias = value.view();
      *value.as<float>() = size;
      expect(options, sums_of(v, causal), "bias");
      *value.as<float>() = -size;
      expect(options, sums_of(v, none), "-bias");
      // At a distance of 0 the bias, far below, decides.
      options.bias = -1e6;
      options.alibi_slopes = value.view();
      expect(options, sums_of(v, other), "-slopes");
      *value.as<float>() = size;
      expect(options, sums_of(v, none), "slopes");
      options.bias = 1e6;
      expect(options, sums_of(v, [](int64_t i, int64_t m) { return m == i; }), "slopes, bias");
    }
    SigmoidOptions infinite;
    infinite.masks.causal = true;
    infinite.bias = std::numeric_limits<double>::infinity();
    expect(infinite, sums_of(v, causal), "infinite bias");
    const int64_t before = kTokens - 3;  // few rows take another path
    const Array few = sigmoid_attention(q.view().slice(2, before, kTokens), k, v, infinite, run);
    EXPECT_LT(largest_difference(few, sums_of(v, causal).view().slice(2, before, kTokens)), 1e-5)
        << name_of(isa);
    infinite.bias = -std::numeric_limits<double>::infinity();
    expect(infinite, sums_of(v, none), "-infinite bias");
  }
}

TEST(Sigmoid, ANaNBiasShowsInTheResult) {
  const Array rows = random_array(DType::f32, {1, 1, 5, 8}, 1);
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const Array per_head = filled(DType::f32, {1}, kNaN);
  SigmoidOptions options;
  for (const std::variant<std::monostate, double, Tensor>& bias :
       {decltype(options.bias)(kNaN), decltype(options.bias)(per_head.view())}) {
    options.bias = bias;
    const Array out = sigmoid_attention(rows, rows, rows, options);
    for (int64_t i = 0; i < out.count(); ++i) EXPECT_TRUE(std::isnan(out.as<float>()[i]));
  }
}

TEST(Sigmoid, GradientsThatAreNotWantedAreLeftOut) {
  const Array q = random_array(DType::f32, {1, 2, 60, 16}, 1);
  const Array slopes = random_array(DType::f32, {2}, 2), bias = random_array(DType::f32, {2}, 3);
  const SigmoidOptions options{{}, {}, bias.view(), slopes};
  const auto backward = [&](const SigmoidWanted& wanted) {
    return sigmoid_attention_backward(q, q, q, q, options, {}, wanted);
  };
  const SigmoidGradients all = backward({});
  for (const SigmoidWanted& wanted : {SigmoidWanted{false, true}, {true, false}, {false, false}}) {
    const SigmoidGradients some = backward(wanted);
    EXPECT_TRUE(same_bits(some.q, all.q));
    EXPECT_TRUE(same_bits(some.k, all.k));
    EXPECT_TRUE(same_bits(some.v, all.v));
    EXPECT_TRUE(same_bits_if(wanted.bias, some.bias, all.bias));
    EXPECT_TRUE(same_bits_if(wanted.alibi_slopes, some.alibi_slopes, all.alibi_slopes));
  }
}

}  // namespace
}  // namespace heed
