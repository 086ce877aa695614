// Identities of sheet 01, 9(a), in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr int64_t kHeads = 3, kQueries = 20, kKeys = 70, kDim = 8, kValues = 6;

struct Inputs {
  Array q = random_array(DType::f64, {1, kHeads, kQueries, kDim}, 1);
  Array k = random_array(DType::f64, {1, kHeads, kKeys, kDim}, 2);
  Array v = random_array(DType::f64, {1, kHeads, kKeys, kValues}, 3);
};

TEST(FlashIdentities, AConstantAddedToARowOfScoresMovesOnlyItsLse) {
  const Inputs in;
  const Array row_bias = random_array(DType::f64, {1, kHeads, kQueries, 1}, 4, 20);
  FlashOptions options;
  options.bias = row_bias;
  const AttentionResult plain = flash_attention(in.q, in.k, in.v);
  const AttentionResult moved = flash_attention(in.q, in.k, in.v, options);
  EXPECT_LT(largest_difference(moved.out, plain.out), 1e-13);
  for (int64_t i = 0; i < plain.lse.count(); ++i) {
    EXPECT_NEAR(moved.lse.as<double>()[i], plain.lse.as<double>()[i] + row_bias.as<double>()[i],
                1e-12);
  }
}

// The gradient of a bias is dS: a row's shift changes lse alone.
TEST(FlashIdentities, GradientsOfARowOfScoresSumToThatOfItsLse) {
  const Inputs in;
  const Array bias = random_array(DType::f64, {1, kHeads, kQueries, kKeys}, 4);
  const Array grad_out = random_array(DType::f64, {1, kHeads, kQueries, kValues}, 5);
  const Array grad_lse = random_array(DType::f64, {1, kHeads, kQueries}, 6);
  FlashOptions options;
  options.bias = bias;
  options.masks.causal = true;
  const AttentionResult r = flash_attention(in.q, in.k, in.v, options);
  for (const Tensor& from_lse : {Tensor(), grad_lse.view()}) {
    const FlashGradients to =
        flash_attention_backward(grad_out, from_lse, in.q, in.k, in.v, r.out, r.lse, options);
    for (int64_t row = 0; row < kHeads * kQueries; ++row) {
      double sum = 0;
      for (int64_t m = 0; m < kKeys; ++m) sum += to.bias.as<double>()[row * kKeys + m];
      EXPECT_NEAR(sum, from_lse.defined() ? grad_lse.as<double>()[row] : 0, 1e-13) << row;
    }
  }
}

TEST(FlashIdentities, GradientsOfValuesSumToThatOfTheResult) {
  const Inputs in;
  const Array one = random_array(DType::f64, {kValues}, 5);
  const Tensor grad_out(one.view().data(), DType::f64, {1, kHeads, kQueries, kValues},
                        {0, 0, 0, 1});
  const AttentionResult r = flash_attention(in.q, in.k, in.v);
  const FlashGradients to = flash_attention_backward(grad_out, {}, in.q, in.k, in.v, r.out, r.lse);
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t f = 0; f < kValues; ++f) {
      double sum = 0;
      for (int64_t m = 0; m < kKeys; ++m) {
        sum += to.v.as<double>()[(h * kKeys + m) * kValues + f];
      }
      EXPECT_NEAR(sum, kQueries * one.as<double>()[f], 1e-12);
    }
  }
}

TEST(FlashIdentities, ABlockMaskWithoutALiveBlockGivesZero) {
  const Inputs in;
  const Array dead = Array::zeros(DType::boolean, {1, 2, 5});
  FlashOptions options;
  options.block_mask = dead;
  options.block_size = {16, 16};
  const AttentionResult r = flash_attention(in.q, in.k, in.v, options);
  const FlashGradients to =
      flash_attention_backward(r.out, {}, in.q, in.k, in.v, r.out, r.lse, options);
  for (const Array* x : {&r.out, &to.q, &to.k, &to.v}) {
    for (int64_t i = 0; i < x->count(); ++i) EXPECT_EQ(x->as<double>()[i], 0);
  }
  for (int64_t i = 0; i < r.lse.count(); ++i) {
    EXPECT_EQ(r.lse.as<double>()[i], -std::numeric_limits<double>::infinity());
  }
}

}  // namespace
}  // namespace heed
