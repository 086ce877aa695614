// What a comparison with the cascade cannot show: identities, bits across thread counts, strides that are
// no unit, and messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

Array tokens(const Tensor& x, int64_t begin, int64_t end) {
  return convert(x.slice(2, begin, end), x.dtype());
}

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

TEST(DepthwiseConv, TheLastTapAloneGivesTheInput) {
  for (DType type : kTypes) {
    const Array x = random_array(type, {2, 3, 20, 9}, 1);
    Array weight = Array::zeros(DType::f64, {9, 4});
    for (int64_t e = 0; e < 9; ++e) weight.as<double>()[e * 4 + 3] = 1;
    EXPECT_TRUE(same_bits(depthwise_causal_conv(x, convert(weight, type)), x)) << name_of(type);
  }
}

TEST(DepthwiseConv, ATokenChangesNothingBeforeItNorMoreThanTheTapsReach) {
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    const Array x = random_array(DType::f32, {1, 1, 30, 21}, 1),
                weight = random_array(DType::f32, {21, 4}, 2);
    const Array before = depthwise_causal_conv(x, weight, {}, run);
    Array changed = convert(x, DType::f32);
    for (int64_t e = 0; e < 21; ++e) {
      changed.as<float>()[11 * 21 + e] = std::numeric_limits<float>::quiet_NaN();
    }
    const Array after = depthwise_causal_conv(changed, weight, {}, run);
    EXPECT_TRUE(same_bits(tokens(before, 0, 11), tokens(after, 0, 11)));
    EXPECT_TRUE(same_bits(tokens(before, 15, 30), tokens(after, 15, 30)));
    for (int64_t i = 11 * 21; i < 15 * 21; ++i) EXPECT_TRUE(std::isnan(after.as<float>()[i]));
  }
}

TEST(DepthwiseConv, AnyCuttingWithTheLastTokensKeptIsTheWhole) {
  const Array x = random_array(DType::f32, {2, 2, 40, 12}, 1),
              weight = random_array(DType::f32, {12, 3}, 2);
  const Array whole = depthwise_causal_conv(x, weight);
  for (int64_t cut : {2, 13, 39}) {
    const Array rest = depthwise_causal_conv(x.view().slice(2, cut - 2, 40), weight);
    EXPECT_TRUE(same_bits(tokens(rest, 2, 42 - cut), tokens(whole, cut, 40)));
  }
}

TEST(DepthwiseConv, SameBitsForAnyThreadCountAndStrides) {
  for (DType type : kTypes) {
    const Array x = random_array(type, {2, 3, 700, 20}, 1), weight = random_array(type, {20, 3}, 2);
    const Array bias = random_array(type, {20}, 3),
                gradient = random_array(type, {2, 3, 700, 20}, 4);
    RunOptions run;
    run.threads = 1;
    const Array out = depthwise_causal_conv(x, weight, bias, run);
    const auto gradients = depthwise_causal_conv_backward(gradient, x, weight, bias, run);
    for (int threads : {2, 5}) {
      run.threads = threads;
      EXPECT_TRUE(same_bits(out, depthwise_causal_conv(x, weight, bias, run)));
      const auto more = depthwise_causal_conv_backward(gradient, x, weight, bias, run);
      EXPECT_TRUE(same_bits(gradients.x, more.x));
      EXPECT_TRUE(same_bits(gradients.weight, more.weight));
      EXPECT_TRUE(same_bits(gradients.bias, more.bias));
    }
    // Channels before tokens in memory: the last axis has no unit stride.
    const Tensor turned(x.view().data(), type, {2, 3, 20, 700}, {42000, 14000, 1, 20});
    const Array other = random_array(type, {700, 2}, 5);
    EXPECT_TRUE(same_bits(depthwise_causal_conv(turned, other),
                          depthwise_causal_conv(convert(turned, type), other)));
  }
}

TEST(DepthwiseConv, ASharedParameterIsTheSameForEveryHead) {
  const Array x = random_array(DType::f64, {2, 3, 25, 6}, 1),
              weight = random_array(DType::f64, {6, 3}, 2);
  const Array bias = random_array(DType::f64, {6}, 3),
              gradient = random_array(DType::f64, {2, 3, 25, 6}, 4);
  // Strides of 0 repeat a parameter over the heads.
  const Tensor weights(weight.view().data(), DType::f64, {3, 6, 3}, {0, 3, 1});
  const Tensor biases(bias.view().data(), DType::f64, {3, 6}, {0, 1});
  const Array out = depthwise_causal_conv(x, weight, bias);
  const auto shared = depthwise_causal_conv_backward(gradient, x, weight, bias);
  for (const auto& [w, b] :
       {std::pair<Tensor, Tensor>{weights, biases}, {weights, bias}, {weight, biases}}) {
    EXPECT_TRUE(same_bits(depthwise_causal_conv(x, w, b), out));
    const auto split = depthwise_causal_conv_backward(gradient, x, w, b);
    EXPECT_TRUE(same_bits(split.x, shared.x));
    EXPECT_EQ(split.weight.shape(), w.shape());
    EXPECT_EQ(split.bias.shape(), b.shape());
    const int64_t heads = w.rank() == 3 ? 3 : 1;
    for (int64_t i = 0; i < 18; ++i) {
      double sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += split.weight.as<double>()[h * 18 + i];
      EXPECT_NEAR(sum, shared.weight.as<double>()[i], 1e-12);
    }
  }
}

TEST(DepthwiseConv, TensorsWithoutElements) {
  for (const Dims& shape :
       {Dims{0, 2, 5, 4}, Dims{2, 0, 5, 4}, Dims{2, 2, 0, 4}, Dims{2, 2, 5, 0}}) {
    const Array x(DType::f32, shape), weight = Array::zeros(DType::f32, {shape[3], 3});
    EXPECT_EQ(depthwise_causal_conv(x, weight).shape(), shape);
    const auto gradients = depthwise_causal_conv_backward(x, x, weight);
    EXPECT_EQ(gradients.x.shape(), shape);
    for (int64_t i = 0; i < gradients.weight.count(); ++i) {
      EXPECT_EQ(gradients.weight.as<float>()[i], 0);
    }
  }
}

TEST(DepthwiseConv, ErrorsNameTheArgument) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Array x = random_array(DType::bf16, {1, 2, 5, 4}, 1),
              w = random_array(DType::f32, {4, 3}, 2);
  const auto call = [&](const Tensor& weight, const Tensor& bias = {}) {
    return error_of([&] { depthwise_causal_conv(x, weight, bias); });
  };
  says(call({}), {"depthwise_causal_conv", "weight is missing", "[D,W] or [H,D,W]"});
  says(call(random_array(DType::f32, {5, 3}, 2)), {"weight [5,3]", "[4,3]"});
  says(call(random_array(DType::f32, {4, 0}, 2)), {"weight [4,0]", "W >= 1"});
  says(call(random_array(DType::f32, {3, 4, 3}, 2)), {"weight [3,4,3]", "[2,4,3]"});
  says(call(random_array(DType::f16, {4, 3}, 2)), {"float16", "bfloat16 or float32"});
  says(call(w, random_array(DType::f32, {3}, 2)), {"bias [3]", "[4]"});
  says(call(w, random_array(DType::f32, {3, 4}, 2)), {"bias [3,4]", "[2,4]"});
  says(error_of([&] { depthwise_causal_conv(x.view().select(0, 0), w); }),
       {"x [2,5,4]", "[B,H,L,D]"});
  says(error_of([&] { depthwise_causal_conv_backward(w, x, w); }),
       {"grad_out [4,3]", "x [1,2,5,4]"});
  says(error_of([&] { depthwise_causal_conv(x, w, {}, Tensor()); }), {"out is missing"});
}

}  // namespace
}  // namespace heed
