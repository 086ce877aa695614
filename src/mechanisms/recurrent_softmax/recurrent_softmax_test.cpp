// Identities of sheet 12, what happens at the floors, bits across thread counts, NaN, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/recurrent_softmax/row_result.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

struct Inputs {
  Array q, k, v;
};
Inputs inputs(DType type, int64_t queries, int64_t keys, double size = 1) {
  return {random_array(type, {2, 4, queries, 16}, 1, size), random_array(type, {2, 2, keys, 16}, 2),
          random_array(type, {2, 2, keys, 12}, 3)};
}
RecurrentSoftmaxOptions with(Normalizer normalizer, std::optional<int64_t> order = {}) {
  RecurrentSoftmaxOptions options;
  options.normalizer = normalizer;
  options.order = order;
  return options;
}
FlashOptions causal_flash() {
  FlashOptions options;
  options.masks.causal = true;
  return options;
}
double norm(const double* row) {
  double square = 0;
  for (int64_t f = 0; f < 12; ++f) square += row[f] * row[f];
  return std::sqrt(square);
}

TEST(RecurrentSoftmax, SoftmaxIsFlashAttention) {
  for (DType type : kTypes) {
    const Inputs in = inputs(type, 50, 70);
    const AttentionResult flash = flash_attention(in.q, in.k, in.v, causal_flash());
    EXPECT_TRUE(same_bits(flash.out, recurrent_softmax_attention(in.q, in.k, in.v)));
    // Whether or not the backward's inputs are kept.
    const DType wide = wide_type(type);
    Array out(type, flash.out.shape()), core(wide, flash.out.shape());
    Array statistic(wide, flash.lse.shape());
    recurrent_softmax_attention(in.q, in.k, in.v, out, core, statistic);
    EXPECT_TRUE(same_bits(flash.out, out)) << name_of(type);
    EXPECT_TRUE(same_bits(flash.lse, statistic));
  }
}

TEST(RecurrentSoftmax, TheL2VariantIsTheNormalisedSoftmaxResult) {
  const Inputs in = inputs(DType::f64, 50, 70);
  const Array flash = flash_attention(in.q, in.k, in.v, causal_flash()).out;
  const Array out = recurrent_softmax_attention(in.q, in.k, in.v, with(Normalizer::l2));
  for (int64_t row = 0; row < 2 * 4 * 50; ++row) {
    const double* got = out.as<double>() + row * 12;
    const double* softmax = flash.as<double>() + row * 12;
    EXPECT_NEAR(norm(got), 1, 1e-12);
    for (int64_t f = 0; f < 12; ++f) EXPECT_NEAR(got[f], softmax[f] / norm(softmax), 1e-12);
  }
}

TEST(RecurrentSoftmax, NormsForgetPositiveFactorsOfTheValues) {
  const Inputs in = inputs(DType::f64, 30, 40);
  Array larger = convert(in.v, DType::f64);
  for (int64_t i = 0; i < larger.count(); ++i) larger.as<double>()[i] *= 1000;
  for (Normalizer normalizer : {Normalizer::l2, Normalizer::rms, Normalizer::layer}) {
    RecurrentSoftmaxOptions options = with(normalizer);
    options.eps = 0;
    EXPECT_LT(largest_difference(recurrent_softmax_attention(in.q, in.k, in.v, options),
                                 recurrent_softmax_attention(in.q, in.k, larger, options)),
              1e-11);
  }
}

TEST(RecurrentSoftmax, TheFirstTokenOfTheL2VariantIsItsDirection) {
  const Inputs in = inputs(DType::f64, 1, 1);
  const Array out = recurrent_softmax_attention(in.q, in.k, in.v, with(Normalizer::l2));
  for (int64_t i = 0; i < out.count(); ++i) {
    const double* value = in.v.as<double>() + i / 24 * 12;
    EXPECT_NEAR(out.as<double>()[i], value[i % 12] / norm(value), 1e-15);
  }
}

// A further column, of ones in the keys, adds its entry of the query to all scores of a row.
TEST(RecurrentSoftmax, NormsForgetShiftsOfARowOfScores) {
  const Inputs in = inputs(DType::f64, 30, 40);
  const auto with_column = [](const Array& x, const Array& column) {
    const Dims shape = x.shape();
    Array wider(DType::f64, {shape[0], shape[1], shape[2], 17});
    copy(x, wider.view().slice(3, 0, 16));
    copy(column, wider.view().slice(3, 16, 17));
    return wider;
  };
  const Array q = with_column(in.q, random_array(DType::f64, {2, 4, 30, 1}, 4, 10));
  const Array k = with_column(in.k, filled(DType::f64, {2, 2, 40, 1}, 1));
  for (Normalizer normalizer :
       {Normalizer::softmax, Normalizer::l2, Normalizer::rms, Normalizer::layer}) {
    RecurrentSoftmaxOptions options = with(normalizer);
    options.eps = 0;
    options.scale = 0.25;
    EXPECT_LT(largest_difference(recurrent_softmax_attention(q, k, in.v, options),
                                 recurrent_softmax_attention(in.q, in.k, in.v, options)),
              1e-12)
        << name_of(normalizer);
  }
}

TEST(RecurrentSoftmax, NormalizersThatDivideByPositiveNumbersAreMultiplesOfOneAnother) {
  const Inputs in = inputs(DType::f64, 1, 9);
  const auto call = [&](Normalizer n) {
    return recurrent_softmax_attention(in.q, in.k, in.v, with(n));
  };
  const Array none = call(Normalizer::none), count = call(Normalizer::divide_by_count);
  for (int64_t i = 0; i < none.count(); ++i) {
    EXPECT_NEAR(count.as<double>()[i] * 9, none.as<double>()[i], 1e-12);
  }
  const Array softmax = call(Normalizer::softmax), clamped = call(Normalizer::clamped);
  EXPECT_LT(largest_difference(softmax, clamped), 1e-12);  // 9 keys: the denominator is above 1
}

TEST(RecurrentSoftmax, ALargeOrderIsTheExponential) {
  const Inputs in = inputs(DType::f64, 40, 50, 0.3);
  for (Normalizer normalizer : kNormalizers) {
    EXPECT_LT(
        largest_difference(recurrent_softmax_attention(in.q, in.k, in.v, with(normalizer, 20)),
                           recurrent_softmax_attention(in.q, in.k, in.v, with(normalizer))),
        1e-10);
  }
}

TEST(RecurrentSoftmax, OrderZeroIsTheMeanAndOrderOneLinearAttention) {
  const Inputs in = inputs(DType::f64, 20, 20);
  const Array zero = recurrent_softmax_attention(in.q, in.k, in.v, with(Normalizer::none, 0));
  const Array one = recurrent_softmax_attention(in.q, in.k, in.v, with(Normalizer::none, 1));
  for (int64_t i = 0; i < zero.count(); ++i) {
    const int64_t f = i % 12, p = i / 12 % 20, kv = i / 240 / 2;
    double sum = 0, linear = 0;
    for (int64_t m = 0; m <= p; ++m) {
      const double value = in.v.as<double>()[(kv * 20 + m) * 12 + f];
      double score = 0;
      for (int64_t e = 0; e < 16; ++e) {
        score += in.q.as<double>()[i / 12 * 16 + e] * in.k.as<double>()[(kv * 20 + m) * 16 + e];
      }
      sum += value;
      linear += score / 4 * value;
    }
    EXPECT_NEAR(zero.as<double>()[i], sum, 1e-12);
    EXPECT_NEAR(one.as<double>()[i], sum + linear, 1e-12);
  }
}

TEST(RecurrentSoftmax, AGateScalesTheResult) {
  for (Normalizer normalizer : kNormalizers) {
    const Inputs in = inputs(DType::f64, 20, 30);
    const Array gate = random_array(DType::f64, {2, 4, 20}, 4);
    RecurrentSoftmaxOptions options = with(normalizer);
    const Array plain = recurrent_softmax_attention(in.q, in.k, in.v, options);
    options.gate = gate;
    const Array gated = recurrent_softmax_attention(in.q, in.k, in.v, options);
    for (int64_t i = 0; i < plain.count(); ++i) {
      EXPECT_NEAR(gated.as<double>()[i], gate.as<double>()[i / 12] * plain.as<double>()[i], 1e-9);
    }
  }
}

// Scores of +-1e4: the exponentials themselves are far outside the type.
TEST(RecurrentSoftmax, HugeScoresLeaveTheNormalisedVariantsFinite) {
  for (DType type : {DType::f64, DType::f32}) {
    const Inputs in = inputs(type, 30, 40, 1e4);
    for (Normalizer normalizer : {Normalizer::softmax, Normalizer::l2, Normalizer::rms,
                                  Normalizer::layer, Normalizer::clamped}) {
      const DType wide = type;
      Array out(type, {2, 4, 30, 12}), core(wide, {2, 4, 30, 12}), statistic(wide, {2, 4, 30});
      recurrent_softmax_attention(in.q, in.k, in.v, out, core, statistic, with(normalizer));
      const Array gradient = random_array(type, {2, 4, 30, 12}, 4);
      const auto back = recurrent_softmax_attention_backward(gradient, in.q, in.k, in.v, core,
                                                             statistic, with(normalizer));
      for (const Tensor& array : {out.view(), back.q.view(), back.k.view(), back.v.view()}) {
        const Array values = convert(array, DType::f64);
        for (int64_t i = 0; i < values.count(); ++i) {
          ASSERT_TRUE(std::isfinite(values.as<double>()[i])) << static_cast<int>(normalizer);
        }
      }
    }
  }
}

TEST(RecurrentSoftmax, ZeroValuesGiveZero) {
  Inputs in = inputs(DType::f32, 10, 10);
  in.v = Array::zeros(DType::f32, {2, 2, 10, 12});
  for (Normalizer normalizer : kNormalizers) {
    for (std::optional<int64_t> order : {std::optional<int64_t>(), std::optional<int64_t>(3)}) {
      RecurrentSoftmaxOptions options = with(normalizer, order);
      options.eps = 0;
      const Array out = recurrent_softmax_attention(in.q, in.k, in.v, options);
      for (int64_t i = 0; i < out.count(); ++i) EXPECT_EQ(out.as<float>()[i], 0);
    }
  }
}

// At the floors the numerator counts as it is.
TEST(RecurrentSoftmax, FloorsOfOneRow) {
  using recurrent::Row;
  using recurrent::RowKind;
  const double log_den = std::log(4.0);
  // |num| = 4 |o| = 2e-13 is below 1e-12, 4e-12 is not.
  RowKind l2{Normalizer::l2, false, 0, 1};
  Row row{log_den, 3, 2.5e-27, 0};
  EXPECT_NEAR(recurrent::row_result(l2, row).scale, 4e12, 1);
  EXPECT_EQ(recurrent::row_gradient(l2, row, 1, 1).of_row, 0);
  row.square = 1e-24;
  EXPECT_NEAR(recurrent::row_result(l2, row).scale, 1e12, 1);
  EXPECT_NE(recurrent::row_gradient(l2, row, 1, 1).of_row, 0);
  // A denominator of -1e-20 becomes -1e-12.
  const RowKind softmax{Normalizer::softmax, true, 0, 1};
  EXPECT_NEAR(recurrent::row_result(softmax, {-1e-20, 3, 0, 0}).scale, -1e12, 1);
  EXPECT_EQ(recurrent::row_gradient(softmax, {-1e-20, 3, 0, 0}, 1, 1).den, 0);
  EXPECT_EQ(recurrent::row_result(softmax, {-2, 3, 0, 0}).scale, -0.5);
  EXPECT_EQ(recurrent::row_gradient(softmax, {-2, 3, 0, 0}, 1, 1).den, -0.25);
  // Clamped: den = 1/4 counts as 1.
  const RowKind clamped{Normalizer::clamped, false, 0, 1};
  EXPECT_NEAR(recurrent::row_result(clamped, {-log_den, 3, 0, 0}).scale, 0.25, 1e-15);
  EXPECT_TRUE(recurrent::row_gradient(clamped, {-log_den, 3, 0, 0}, 1, 1).of_num_alone);
  EXPECT_FALSE(recurrent::row_gradient(clamped, {log_den, 3, 0, 0}, 1, 1).of_num_alone);
  // A vanishing numerator: eps alone is under the root.
  const RowKind rms{Normalizer::rms, false, 1e-6, 12};
  EXPECT_EQ(recurrent::row_result(rms, {-800, 3, 1, 0}).scale, 0);
  EXPECT_EQ(recurrent::row_gradient(rms, {-800, 3, 1, 0}, 1, 1).of_gradient, 0);
}

RecurrentSoftmaxGradients gradients_of(const Inputs& in, const Array& grad_out,
                                       const RecurrentSoftmaxOptions& options) {
  const DType wide = wide_type(in.q.dtype());
  const Dims shape = grad_out.shape();
  Array out(in.q.dtype(), shape), core(wide, shape),
      statistic(wide, {shape[0], shape[1], shape[2]});
  recurrent_softmax_attention(in.q, in.k, in.v, out, core, statistic, options);
  return recurrent_softmax_attention_backward(grad_out, in.q, in.k, in.v, core, statistic, options);
}

// Where a result depends on the numerator alone, nothing is subtracted from the products of values and
// gradients, not even the difference of two roundings, which would be large beside small values.
TEST(RecurrentSoftmax, GradientsOfKeysWithSmallValuesBesideLargeOnes) {
  Inputs exact = inputs(DType::f64, 128, 128);
  for (int64_t i = 0; i < exact.v.count(); ++i) {
    double& value = exact.v.as<double>()[i];
    value = i / 12 % 128 < 64 ? value * 0.01 : value + 4;
  }
  const Array grad_out = random_array(DType::bf16, {2, 4, 128, 12}, 4);
  for (DType type : {DType::f32, DType::bf16}) {
    const auto rounded = [&](const Array& x) { return convert(convert(x, type), DType::f64); };
    const Inputs wide{rounded(exact.q), rounded(exact.k), rounded(exact.v)};
    const Inputs in{convert(wide.q, type), convert(wide.k, type), convert(wide.v, type)};
    for (Normalizer normalizer : kNormalizers) {
      if (normalizer == Normalizer::softmax || normalizer == Normalizer::clamped) continue;
      RecurrentSoftmaxOptions options = with(normalizer);
      options.causal = false;
      const auto of_small_values = [&](const Inputs& given, DType of) {
        const Array k = gradients_of(given, convert(grad_out, of), options).k;
        return convert(k.view().slice(2, 0, 64), DType::f64);
      };
      EXPECT_LT(relative_error(of_small_values(in, type), of_small_values(wide, DType::f64)),
                type == DType::f32 ? 2e-5 : 1e-2)
          << name_of(normalizer) << " " << name_of(type);
    }
  }
}

TEST(RecurrentSoftmax, ARowThatOverflowsAndHasNoGradientLeavesTheOthersAlone) {
  for (Normalizer normalizer : {Normalizer::none, Normalizer::divide_by_count}) {
    Inputs in = inputs(DType::f32, 40, 40);
    Array grad_out = random_array(DType::f32, {2, 4, 40, 12}, 4);
    for (int64_t head = 0; head < 8; ++head) {
      for (int64_t f = 0; f < 16; ++f) in.q.as<float>()[(head * 40 + 20) * 16 + f] *= 400;
      std::fill_n(grad_out.as<float>() + (head * 40 + 20) * 12, 12, 0.0F);
    }
    RecurrentSoftmaxOptions options = with(normalizer);
    const Array gate = filled(DType::f32, {2, 4, 40}, 1);
    options.gate = gate;
    const RecurrentSoftmaxGradients got = gradients_of(in, grad_out, options);
    for (const Array* gradient : {&got.q, &got.k, &got.v, &got.gate}) {
      for (int64_t i = 0; i < gradient->count(); ++i) {
        ASSERT_TRUE(std::isfinite(gradient->as<float>()[i])) << name_of(normalizer);
      }
    }
  }
}

TEST(RecurrentSoftmax, TheL2VariantOfZeroValuesHasTheGradientOfItsFloor) {
  for (DType type : {DType::f64, DType::f32}) {
    Inputs in = inputs(type, 1, 1);
    in.v = Array::zeros(type, {2, 2, 1, 12});
    const Array grad_out = random_array(type, {2, 4, 1, 12}, 4);
    const Array dv = convert(gradients_of(in, grad_out, with(Normalizer::l2)).v, DType::f64);
    const Array q = convert(in.q, DType::f64), k = convert(in.k, DType::f64),
                g = convert(grad_out, DType::f64);
    for (int64_t kv = 0; kv < 4; ++kv) {
      for (int64_t f = 0; f < 12; ++f) {
        double expected = 0;
        for (int64_t h = 2 * kv; h < 2 * kv + 2; ++h) {
          double score = 0;
          for (int64_t e = 0; e < 16; ++e) {
            score += q.as<double>()[h * 16 + e] * k.as<double>()[kv * 16 + e] / 4;
          }
          expected += std::exp(score) * 1e12 * g.as<double>()[h * 12 + f];
        }
        EXPECT_NEAR(dv.as<double>()[kv * 12 + f], expected, 1e-5 * 1e12);
      }
    }
  }
}

TEST(RecurrentSoftmax, SameBitsForAnyThreadCount) {
  for (DType type : kTypes) {
    const Inputs in = inputs(type, 150, 160);
    for (Normalizer normalizer : {Normalizer::layer, Normalizer::none}) {
      RunOptions run;
      run.threads = 1;
      const Array one = recurrent_softmax_attention(in.q, in.k, in.v, with(normalizer, 2), run);
      for (int threads : {2, 5}) {
        run.threads = threads;
        EXPECT_TRUE(same_bits(
            one, recurrent_softmax_attention(in.q, in.k, in.v, with(normalizer, 2), run)));
      }
    }
  }
}

TEST(RecurrentSoftmax, NaNBehindTheMaskNeverArrivesAndBeforeItAlwaysDoes) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (Normalizer normalizer : kNormalizers) {
    for (std::optional<int64_t> order : {std::optional<int64_t>(), std::optional<int64_t>(2)}) {
      for (bool in_keys : {false, true}) {
        Inputs in = inputs(DType::f64, 40, 40);
        (in_keys ? in.k.as<double>() + 25 * 16 : in.v.as<double>() + 25 * 12)[3] = nan;
        const Array out = recurrent_softmax_attention(in.q, in.k, in.v, with(normalizer, order));
        for (int64_t row = 0; row < 2 * 4 * 40; ++row) {
          const bool sees = row / 80 == 0 && row % 40 >= 25;
          EXPECT_EQ(std::isnan(out.as<double>()[row * 12 + 3]), sees) << row;
        }
      }
    }
  }
}

TEST(RecurrentSoftmax, TensorsWithoutElements) {
  for (Normalizer normalizer : kNormalizers) {
    for (std::optional<int64_t> order : {std::optional<int64_t>(), std::optional<int64_t>(2)}) {
      const RecurrentSoftmaxOptions options = with(normalizer, order);
      const Array none(DType::f32, {1, 2, 0, 8}), some = random_array(DType::f32, {1, 2, 5, 8}, 1);
      EXPECT_EQ(recurrent_softmax_attention(none, some, some, options).count(), 0);
      Array out(DType::f32, some.shape()), core(DType::f32, some.shape());
      Array statistic(DType::f32, {1, 2, 5});
      recurrent_softmax_attention(some, none, none, out, core, statistic, options);
      for (int64_t i = 0; i < out.count(); ++i) EXPECT_EQ(out.as<float>()[i], 0);
      const auto back =
          recurrent_softmax_attention_backward(some, some, none, none, core, statistic, options);
      for (int64_t i = 0; i < back.q.count(); ++i) EXPECT_EQ(back.q.as<float>()[i], 0);
      const Array no_batch(DType::f32, {0, 2, 5, 8});
      EXPECT_EQ(recurrent_softmax_attention(no_batch, no_batch, no_batch, options).count(), 0);
    }
  }
}

TEST(RecurrentSoftmax, ErrorsNameTheArgument) {
  const Inputs in = inputs(DType::f32, 5, 9);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const auto call = [&](auto&& change) {
    RecurrentSoftmaxOptions options;
    change(options);
    return error_of([&] { recurrent_softmax_attention(in.q, in.k, in.v, options); });
  };
  says(call([](auto& o) { o.order = -1; }), {"recurrent_softmax_attention", "order is -1", "100"});
  says(call([](auto& o) { o.order = 101; }), {"order is 101"});
  says(call([](auto& o) { o.eps = -1; }), {"eps is -1", ">= 0"});
  says(call([](auto& o) { o.score_clamp = NAN; }), {"score_clamp is nan"});
  says(call([&](auto& o) { o.gate = in.q; }), {"gate [2,4,5,16]", "[2,4,5]"});
  says(error_of([&] { recurrent_softmax_attention_backward(in.q, in.q, in.k, in.v, in.q, in.q); }),
       {"grad_out [2,4,5,16]", "[2,4,5,12]"});
  for (Normalizer normalizer : kNormalizers) {
    EXPECT_EQ(parse_normalizer(name_of(normalizer)), normalizer);
  }
  says(error_of([] { parse_normalizer("l3"); }), {"normalizer", "'l3'", "l2", "divide_by_count"});
  const Array gradient(DType::f32, {2, 4, 5, 12});
  says(error_of(
           [&] { recurrent_softmax_attention_backward(gradient, in.q, in.k, in.v, gradient, {}); }),
       {"statistic is missing", "[2,4,5] float32"});
}

}  // namespace
}  // namespace heed
