// Identities of sheet 03, bits across thread counts, NaN that must and must not arrive, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

struct Inputs {
  Array q, k, v, alpha, alpha_mean;
};
Inputs inputs(DType type, int64_t queries, int64_t keys) {
  return {random_array(type, {2, 4, queries, 16}, 1), random_array(type, {2, 2, keys, 16}, 2),
          random_array(type, {2, 2, keys, 12}, 3), random_array(type, {2, 4, queries}, 4),
          random_array(type, {4}, 5)};
}
Array filled(const Dims& shape, double value) {
  Array x(DType::f64, shape);
  std::fill_n(x.as<double>(), x.count(), value);
  return x;
}
AffineScaledOptions causal() {
  AffineScaledOptions options;
  options.masks.causal = true;
  return options;
}
FlashOptions causal_flash() {
  FlashOptions options;
  options.masks.causal = true;
  return options;
}

TEST(AffineScaled, OneAndOneIsSoftmaxAttention) {
  const Inputs in = inputs(DType::f64, 50, 70);
  const Array softmax = flash_attention(in.q, in.k, in.v, causal_flash()).out;
  const Array out =
      affine_scaled_attention(in.q, in.k, in.v, filled({2, 4, 50}, 1), filled({4}, 1), causal());
  EXPECT_LT(largest_difference(out, softmax), 1e-13);
  // alpha = alpha_mean scales it.
  const Array half = affine_scaled_attention(in.q, in.k, in.v, filled({2, 4, 50}, 0.5),
                                             filled({4}, 0.5), causal());
  for (int64_t i = 0; i < half.count(); ++i) {
    EXPECT_NEAR(half.as<double>()[i], softmax.as<double>()[i] / 2, 1e-13);
  }
}

TEST(AffineScaled, AlphaZeroScaleZeroAndEqualKeysGiveTheMean) {
  const Inputs in = inputs(DType::f64, 20, 30);
  const Array zero = filled({2, 4, 20}, 0), same = filled({2, 2, 30, 16}, 0.25);
  const Array mean = affine_scaled_attention(in.q, in.k, in.v, zero, in.alpha_mean, causal());
  const Array equal = affine_scaled_attention(in.q, same, in.v, in.alpha, in.alpha_mean, causal());
  EXPECT_LT(largest_difference(mean, equal), 1e-12);
  AffineScaledOptions no_scale = causal();
  no_scale.scale = 0;
  const Array flat = affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, no_scale);
  EXPECT_LT(largest_difference(mean, flat), 1e-12);
  for (int64_t i = 0; i < mean.count(); ++i) {
    const int64_t f = i % 12, p = i / 12 % 20, h = i / 240 % 4, b = i / 960;
    double sum = 0;
    for (int64_t m = 0; m <= p + 10; ++m) {
      sum += in.v.as<double>()[((b * 2 + h / 2) * 30 + m) * 12 + f];
    }
    const double want = in.alpha_mean.as<double>()[h] * sum / static_cast<double>(p + 11);
    EXPECT_NEAR(mean.as<double>()[i], want, 1e-13);
  }
}

TEST(AffineScaled, ConstantValuesComeOutAsTheMeanOfAlpha) {
  const Inputs in = inputs(DType::f64, 40, 40);
  AffineScaledOptions options = causal();
  options.masks.window.left = 9;
  const Array out = affine_scaled_attention(in.q, in.k, filled({2, 2, 40, 12}, 3), in.alpha,
                                            in.alpha_mean, options);
  for (int64_t i = 0; i < out.count(); ++i) {
    EXPECT_NEAR(out.as<double>()[i], 3 * in.alpha_mean.as<double>()[i / 480 % 4], 1e-12);
  }
}

TEST(AffineScaled, OneTokenAtATimeIsTheWhole) {
  const Inputs in = inputs(DType::f64, 40, 40);
  const Array whole = affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, causal());
  for (int64_t t = 0; t < 40; ++t) {
    const auto token = [&](const Array& x) { return x.view().slice(2, t, t + 1); };
    const auto so_far = [&](const Array& x) { return x.view().slice(2, 0, t + 1); };
    const Array step = affine_scaled_attention(token(in.q), so_far(in.k), so_far(in.v),
                                               token(in.alpha), in.alpha_mean, causal());
    EXPECT_LT(largest_difference(step, token(whole)), 1e-13) << t;
  }
}

TEST(AffineScaled, KeysBehindLengthsChangeNothingWhateverTheyHold) {
  for (DType type : kTypes) {
    const Inputs in = inputs(type, 30, 50);
    int64_t lengths[] = {31, 0};
    AffineScaledOptions options = causal();
    options.masks.lengths = Tensor(lengths, DType::i64, {2});
    const Array clean = affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, options);
    Array stale = convert(in.v, DType::f64);
    for (int64_t i = 0; i < stale.count(); ++i) {
      const bool exists = i / 1200 == 0 && i / 12 % 50 < 31;
      if (!exists) stale.as<double>()[i] = std::numeric_limits<double>::quiet_NaN();
    }
    const Array out =
        affine_scaled_attention(in.q, in.k, convert(stale, type), in.alpha, in.alpha_mean, options);
    EXPECT_TRUE(same_bits(out, clean)) << name_of(type);
    const Array wide = convert(out, DType::f64);
    for (int64_t i = out.count() / 2; i < out.count(); ++i) EXPECT_EQ(wide.as<double>()[i], 0);
  }
}

TEST(AffineScaled, WhatIsNotFiniteLeavesTheWindowAgain) {
  for (DType type : kTypes) {
    for (Isa isa : available_isas()) {
      RunOptions run;
      run.isa = isa;
      Inputs in = inputs(type, 80, 80);
      AffineScaledOptions options = causal();
      options.masks.window.left = 5;
      const Array clean =
          affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, options, run);
      Array values = convert(in.v, DType::f64);
      values.as<double>()[40 * 12 + 3] = INFINITY;
      values.as<double>()[42 * 12 + 3] = -INFINITY;
      const Array out = affine_scaled_attention(in.q, in.k, convert(values, type), in.alpha,
                                                in.alpha_mean, options, run);
      const Array got = convert(out, DType::f64), want = convert(clean, DType::f64);
      for (int64_t i = 0; i < got.count(); ++i) {
        const int64_t p = i / 12 % 80, pair = i / 960;
        const bool seen = pair < 2 && i % 12 == 3 && p >= 40 && p <= 47;
        if (seen) {
          EXPECT_FALSE(std::isfinite(got.as<double>()[i])) << name_of(type) << " row " << p;
        } else {
          EXPECT_NEAR(got.as<double>()[i], want.as<double>()[i], 3e-2) << name_of(type);
        }
      }
    }
  }
}

// What a running sum subtracts again must not take the bits of the others with it. Rows 40 to 43 hold
// large values, rows up to 48 and keys from 35 to 43 meet them.
TEST(AffineScaled, LargeValuesLeaveTheWindowAgain) {
  for (DType type : kTypes) {
    const double large = type == DType::f16 ? 6e4 : 1e20;
    const double bound = type == DType::f64 ? 1e-12 : type == DType::f32 ? 1e-5 : 3e-2;
    const Inputs in = inputs(type, 80, 80);
    AffineScaledOptions options = causal();
    options.masks.window.left = 5;
    const auto with_large = [&](const Array& x) {
      Array wide = convert(x, DType::f64);
      for (int64_t i = 0; i < 4; ++i)
        wide.as<double>()[(40 + i) * 12 + 3] = large / std::pow(90, i);
      return convert(wide, type);
    };
    const auto expect_same_but = [&](const Array& got, const Array& want, int64_t begin,
                                     int64_t end) {
      const Array a = convert(got, DType::f64), b = convert(want, DType::f64);
      for (int64_t i = 0; i < a.count(); ++i) {
        const int64_t row = i / 12 % 80;
        if (i / 960 < 2 && i % 12 == 3 && row >= begin && row < end) continue;
        ASSERT_NEAR(a.as<double>()[i], b.as<double>()[i], bound) << name_of(type) << " row " << row;
      }
    };
    const Array grads = random_array(type, {2, 4, 80, 12}, 6);
    for (Isa isa : available_isas()) {
      const RunOptions run{.isa = isa};
      const Array out(type, {2, 4, 80, 12}), softmax(wide_type(type), {2, 4, 80, 12});
      const Array lse(wide_type(type), {2, 4, 80});
      affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, out, softmax, lse, options,
                              run);
      expect_same_but(affine_scaled_attention(in.q, in.k, with_large(in.v), in.alpha, in.alpha_mean,
                                              options, run),
                      out, 40, 49);
      const auto value_gradient = [&](const Array& grad_out) {
        return affine_scaled_attention_backward(grad_out, in.q, in.k, in.v, in.alpha, in.alpha_mean,
                                                softmax, lse, options, run)
            .v;
      };
      expect_same_but(value_gradient(with_large(grads)), value_gradient(grads), 35, 44);
    }
  }
}

TEST(AffineScaled, SeparateSoftmaxOutGivesTheSameResult) {
  for (DType type : kTypes) {
    const Inputs in = inputs(type, 70, 90);
    const Array together =
        affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, causal());
    Array out(type, together.shape());
    Array softmax_out(type == DType::f64 ? type : DType::f32, together.shape());
    affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, out, softmax_out, {},
                            causal());
    EXPECT_TRUE(same_bits(together, out)) << name_of(type);
    EXPECT_TRUE(same_bits(convert(softmax_out, type),
                          flash_attention(in.q, in.k, in.v, causal_flash()).out));
  }
}

TEST(AffineScaled, AlmostUniformAttentionKeepsItsContrast) {
  // alpha_mean = 0, as in a layer's first step: nothing but the difference from the mean is left, and
  // that is a hundredth of the values.
  for (DType type : {DType::bf16, DType::f16}) {
    Inputs in = inputs(type, 64, 64);
    Array values = convert(in.v, DType::f64), queries = convert(in.q, DType::f64);
    for (int64_t i = 0; i < values.count(); ++i) values.as<double>()[i] += 1;
    for (int64_t i = 0; i < queries.count(); ++i) queries.as<double>()[i] *= 0.02;
    in.q = convert(queries, type);
    in.v = convert(values, type);
    in.alpha = convert(filled({2, 4, 64}, 0.5), DType::f32);
    in.alpha_mean = convert(filled({4}, 0), DType::f32);
    const auto exact = [](const Array& x) { return convert(x, DType::f64); };
    const Array q = exact(in.q), k = exact(in.k), v = exact(in.v), alpha = exact(in.alpha);
    const Array mean = exact(in.alpha_mean), g = random_array(type, {2, 4, 64, 12}, 9);
    const auto run = [](const Tensor& grad_out, const Tensor& rows, const Tensor& keys,
                        const Tensor& values_, const Tensor& a, const Tensor& m) {
      const DType wide = wide_type(rows.dtype());
      Array out(rows.dtype(), grad_out.shape()), softmax(wide, grad_out.shape());
      Array lse(wide, {2, 4, 64});
      affine_scaled_attention(rows, keys, values_, a, m, out, softmax, lse, {});
      AffineScaledGradients to =
          affine_scaled_attention_backward(grad_out, rows, keys, values_, a, m, softmax, lse, {});
      return std::pair(std::move(out), convert(to.alpha, DType::f64));
    };
    const auto [out, grad_alpha] = run(g, in.q, in.k, in.v, in.alpha, in.alpha_mean);
    const auto [want, want_alpha] = run(exact(g), q, k, v, alpha, mean);
    const auto distance = [](const Array& got, const Array& needed) {
      const Array x = convert(got, DType::f64);
      double error = 0, size = 0;
      for (int64_t i = 0; i < needed.count(); ++i) {
        const double y = needed.as<double>()[i];
        error += (x.as<double>()[i] - y) * (x.as<double>()[i] - y);
        size += y * y;
      }
      return std::sqrt(error / size);
    };
    // Weights are still multiplied in 16 bits; results rounded there would be 0.5 (0.06) away.
    const double bound = type == DType::bf16 ? 0.15 : 0.02;
    const Array alone = affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean);
    EXPECT_LT(distance(alone, want), bound) << name_of(type);
    EXPECT_LT(distance(out, want), bound) << name_of(type);
    EXPECT_LT(distance(grad_alpha, want_alpha), bound) << name_of(type);
  }
}

TEST(AffineScaled, SameBitsForAnyThreadCount) {
  for (DType type : kTypes) {
    const Inputs in = inputs(type, 600, 620);
    RunOptions run;
    run.threads = 1;
    const Array one =
        affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, causal(), run);
    for (int threads : {2, 5}) {
      run.threads = threads;
      EXPECT_TRUE(same_bits(
          one, affine_scaled_attention(in.q, in.k, in.v, in.alpha, in.alpha_mean, causal(), run)));
    }
  }
}

TEST(AffineScaled, TensorsWithoutElements) {
  const auto call = [](int64_t batch, int64_t queries, int64_t keys) {
    const Array q = filled({batch, 2, queries, 8}, 1), k = filled({batch, 2, keys, 8}, 1);
    const Array alpha = filled({batch, 2, queries}, 1), mean = filled({2}, 1);
    Array out(DType::f64, q.shape()), softmax_out(DType::f64, q.shape());
    Array lse(DType::f64, {batch, 2, queries});
    affine_scaled_attention(q, k, k, alpha, mean, out, softmax_out, lse, {});
    for (int64_t i = 0; i < out.count(); ++i) EXPECT_EQ(out.as<double>()[i], 0);
    const auto back =
        affine_scaled_attention_backward(out, q, k, k, alpha, mean, softmax_out, lse, {});
    for (const Array* gradient : {&back.q, &back.k, &back.v, &back.alpha, &back.alpha_mean}) {
      for (int64_t i = 0; i < gradient->count(); ++i) EXPECT_EQ(gradient->as<double>()[i], 0);
    }
  };
  call(0, 3, 4);
  call(2, 0, 4);
  call(2, 3, 0);
}

TEST(AffineScaled, ErrorsNameTheArgument) {
  const Inputs in = inputs(DType::f32, 5, 9);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](const Tensor& alpha, const Tensor& mean) {
    return error_of([&] { affine_scaled_attention(in.q, in.k, in.v, alpha, mean); });
  };
  says(call(in.alpha_mean, in.alpha_mean), {"affine_scaled_attention", "alpha [4]", "[2,4,5]"});
  says(call(in.alpha, in.alpha), {"alpha_mean [2,4,5]", "[4]"});
  says(call(convert(in.alpha, DType::f64), in.alpha_mean), {"alpha", "float64", "float32"});
  says(call({}, in.alpha_mean), {"alpha is missing"});
  says(error_of([&] {
         affine_scaled_attention_backward(in.q, in.q, in.k, in.v, in.alpha, in.alpha_mean, in.q,
                                          {});
       }),
       {"out"});
}

}  // namespace
}  // namespace heed
