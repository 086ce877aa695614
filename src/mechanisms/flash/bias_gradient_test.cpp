// Gradients of biases that are broadcast, with any number of threads.
#include <gtest/gtest.h>

#include <cmath>
#include <tuple>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

// x [B,H,Lq,Lk] summed to a shape that broadcasts to it.
Array summed_to(const Array& x, const Dims& shape) {
  Array sum = Array::zeros(DType::f64, shape);
  const Dims& all = x.shape();
  const int missing = all.rank() - shape.rank();
  for (int64_t n = 0; n < x.count(); ++n) {
    int64_t rest = n, at = 0, step = 1;
    for (int axis = all.rank(); axis-- > 0; rest /= all[axis]) {
      const int64_t size = axis < missing ? 1 : shape[axis - missing];
      if (size > 1) at += rest % all[axis] * step;
      step *= size;
    }
    sum.as<double>()[at] += x.as<double>()[n];
  }
  return sum;
}

TEST(Flash, GradientsOfBroadcastBiasesAreSumsWithAnyThreads) {
  constexpr int64_t kBatch = 3, kHeads = 4, kQueries = 150, kKeys = 600;
  const auto gradient = [](DType type, const Tensor& bias, int threads) {
    const Array q = convert(random_array(DType::f64, {kBatch, kHeads, kQueries, 8}, 1), type),
                k = convert(random_array(DType::f64, {kBatch, 2, kKeys, 8}, 2), type),
                v = convert(random_array(DType::f64, {kBatch, 2, kKeys, 8}, 3), type),
                g = convert(random_array(DType::f64, {kBatch, kHeads, kQueries, 8}, 4), type);
    FlashOptions options;
    options.masks.window = {500, 90};
    options.bias = bias;
    const RunOptions run{.threads = threads};
    const AttentionResult out = flash_attention(q, k, v, options, run);
    FlashGradients to = flash_attention_backward(g, {}, q, k, v, out.out, out.lse, options, run,
                                                 {.bias = true, .alibi_slopes = false});
    EXPECT_EQ(to.bias.dtype(), bias.dtype());
    return convert(to.bias, DType::f64);
  };
  const Array none = Array::zeros(DType::f64, {kBatch, kHeads, kQueries, kKeys});
  const Array whole = gradient(DType::f64, none, 1);
  Array sizes = gradient(DType::f64, none, 1);
  for (int64_t i = 0; i < sizes.count(); ++i) {
    sizes.as<double>()[i] = std::abs(sizes.as<double>()[i]);
  }
  const Dims shapes[] = {{kBatch, kHeads, kQueries, kKeys},
                         {1, kHeads, kQueries, kKeys},
                         {kBatch, 1, kQueries, kKeys},
                         {kQueries, kKeys},
                         {kBatch, kHeads, 1, kKeys},
                         {kBatch, kHeads, kQueries, 1},
                         {1, kHeads, 1, 1},
                         {kKeys}};
  for (const auto& [type, bias_type, unit] : {std::tuple{DType::f64, DType::f64, 1e-12},
                                              {DType::f64, DType::bf16, 8e-3},
                                              {DType::f32, DType::f32, 2e-5},
                                              {DType::f32, DType::f16, 1e-3},
                                              {DType::f32, DType::f64, 2e-5}}) {
    for (const Dims& shape : shapes) {
      const Array want = summed_to(whole, shape), size = summed_to(sizes, shape);
      for (int threads : {1, 2, 5, 16}) {
        const Array found = gradient(type, Array::zeros(bias_type, shape), threads);
        for (int64_t i = 0; i < want.count(); ++i) {
          ASSERT_NEAR(found.as<double>()[i], want.as<double>()[i],
                      unit * (0.01 + size.as<double>()[i]))
              << name_of(type) << " " << name_of(bias_type) << " " << to_string(shape) << " "
              << threads << " threads";
        }
      }
    }
  }
}

TEST(Flash, ABiasThatMeetsNoQueryHasAGradientOfZeros) {
  for (const Dims& shape : {Dims{0, 2, 4, 8}, Dims{2, 0, 4, 8}}) {
    const Array x = Array::zeros(DType::f32, shape), bias = filled(DType::bf16, {4, 4}, 1);
    FlashOptions options;
    options.bias = bias;
    const AttentionResult out = flash_attention(x, x, x, options);
    const FlashGradients to = flash_attention_backward(x, {}, x, x, x, out.out, out.lse, options);
    EXPECT_TRUE(same_bits(to.bias, filled(DType::bf16, {4, 4}, 0))) << to_string(shape);
  }
}

}  // namespace
}  // namespace heed
