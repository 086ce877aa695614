// Identities of sheet 04, bits across thread counts, NaN that must and must not arrive, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/heed.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Inputs {
  Array q, k, v;
};
Inputs inputs(DType type, int64_t queries, int64_t keys, int64_t dim, int64_t value_dim) {
  return {random_array(type, {1, 2, queries, dim}, 1), random_array(type, {1, 2, keys, dim}, 2),
          random_array(type, {1, 2, keys, value_dim}, 3)};
}

TEST(LocalLinear, AffineValuesAreReproduced) {
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    const Inputs in = inputs(DType::f64, 7, 60, 5, 3);
    const Array map = random_array(DType::f64, {5, 3}, 4), shift = random_array(DType::f64, {3}, 5);
    const auto affine = [&](const Array& x) {
      Array y(DType::f64, {1, 2, x.shape()[2], 3});
      for (int64_t i = 0; i < y.count(); ++i) {
        double sum = shift.as<double>()[i % 3];
        for (int64_t e = 0; e < 5; ++e) {
          sum += x.as<double>()[i / 3 * 5 + e] * map.as<double>()[e * 3 + i % 3];
        }
        y.as<double>()[i] = sum;
      }
      return y;
    };
    const Array out = local_linear_attention(in.q, in.k, affine(in.k), {1e-9, false, {}}, run);
    EXPECT_LT(largest_difference(out, affine(in.q)), 1e-6) << name_of(isa);
  }
}

TEST(LocalLinear, ALargeRidgeIsSoftmaxAttention) {
  const Inputs in = inputs(DType::f64, 40, 70, 9, 6);
  LocalLinearOptions options;
  options.causal = true;
  options.ridge = 1e13;
  FlashOptions flash;
  flash.masks.causal = true;
  EXPECT_LT(largest_difference(local_linear_attention(in.q, in.k, in.v, options),
                               flash_attention(in.q, in.k, in.v, flash).out),
            1e-11);
}

TEST(LocalLinear, ConstantValuesPassThroughAndOneKeyGivesItsValue) {
  const Inputs in = inputs(DType::f64, 12, 30, 6, 4);
  Array constant(DType::f64, {1, 2, 30, 4});
  for (int64_t i = 0; i < constant.count(); ++i) constant.as<double>()[i] = 1 + i % 4;
  const Array out = local_linear_attention(in.q, in.k, constant);
  for (int64_t i = 0; i < out.count(); ++i) EXPECT_NEAR(out.as<double>()[i], 1 + i % 4, 1e-11);
  const Array one =
      local_linear_attention(in.q, in.k.view().slice(2, 4, 5), in.v.view().slice(2, 4, 5));
  for (int64_t i = 0; i < one.count(); ++i) {
    const double want = in.v.as<double>()[(i / 48 * 30 + 4) * 4 + i % 4];
    EXPECT_NEAR(one.as<double>()[i], want, 1e-13);
  }
}

// The weights see the shift of all keys as a factor of the row, the fit only through k - q.
TEST(LocalLinear, ShiftingKeysAndQueriesTogetherChangesNothingAtScaleZero) {
  const Inputs in = inputs(DType::f64, 12, 30, 6, 4);
  const auto shifted = [](const Array& x) {
    Array y = convert(x, DType::f64);
    for (int64_t i = 0; i < y.count(); ++i) y.as<double>()[i] += 3 + i % 6;
    return y;
  };
  const LocalLinearOptions options{0.1, false, 0.0};
  EXPECT_LT(largest_difference(local_linear_attention(shifted(in.q), shifted(in.k), in.v, options),
                               local_linear_attention(in.q, in.k, in.v, options)),
            1e-11);
}

TEST(LocalLinear, DecodingIsTheLastRowOfTheWhole) {
  const Inputs in = inputs(DType::f32, 90, 90, 20, 7);
  LocalLinearOptions options;
  options.causal = true;
  const Array whole = local_linear_attention(in.q, in.k, in.v, options);
  for (int64_t i : {0, 47, 63, 64, 89}) {
    const Array one =
        local_linear_attention(in.q.view().slice(2, i, i + 1), in.k.view().slice(2, 0, i + 1),
                               in.v.view().slice(2, 0, i + 1), options);
    EXPECT_LT(largest_difference(one, whole.view().slice(2, i, i + 1)), 1e-6) << i;
  }
}

TEST(LocalLinear, GradientsOfAConstantShiftOfTheValuesSumToThoseOfTheResult) {
  const Inputs in = inputs(DType::f64, 25, 40, 6, 4);
  const Array gradient = random_array(DType::f64, {1, 2, 25, 4}, 4);
  const auto back = local_linear_attention_backward(gradient, in.q, in.k, in.v);
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t f = 0; f < 4; ++f) {
      double values = 0, results = 0;
      for (int64_t m = 0; m < 40; ++m) values += back.v.as<double>()[(h * 40 + m) * 4 + f];
      for (int64_t p = 0; p < 25; ++p) results += gradient.as<double>()[(h * 25 + p) * 4 + f];
      EXPECT_NEAR(values, results, 1e-11);
    }
  }
}

TEST(LocalLinear, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Inputs in = inputs(type, 150, 170, 17, 9);
    const Array gradient = random_array(type, {1, 2, 150, 9}, 4);
    const LocalLinearOptions options{0.1, true, {}};
    RunOptions run;
    run.threads = 1;
    const Array out = local_linear_attention(in.q, in.k, in.v, options, run);
    const auto back = local_linear_attention_backward(gradient, in.q, in.k, in.v, options, run);
    for (int threads : {2, 5}) {
      run.threads = threads;
      EXPECT_TRUE(same_bits(out, local_linear_attention(in.q, in.k, in.v, options, run)));
      const auto more = local_linear_attention_backward(gradient, in.q, in.k, in.v, options, run);
      EXPECT_TRUE(same_bits(back.q, more.q));
      EXPECT_TRUE(same_bits(back.k, more.k));
      EXPECT_TRUE(same_bits(back.v, more.v));
    }
  }
}

void expect_nan_where(const Tensor& t, int64_t width, const char* what, bool (*bad)(int64_t)) {
  const Array wide = convert(t, DType::f64);
  const int64_t rows = t.size(2);
  for (int64_t i = 0; i < wide.count(); ++i) {
    const bool first_head = i / width / rows == 0;
    EXPECT_EQ(std::isnan(wide.as<double>()[i]), first_head && bad(i / width % rows))
        << what << " row " << i / width;
  }
}

TEST(LocalLinear, WhatIsNotFiniteReachesTheRowsThatSeeItAndNoOther) {
  for (Isa isa : available_isas()) {
    RunOptions run;
    run.isa = isa;
    const LocalLinearOptions options{0.1, true, {}};
    for (const char* which : {"k", "v", "q", "g"}) {
      for (double value : {kNaN, static_cast<double>(INFINITY)}) {
        Inputs in = inputs(DType::f64, 90, 90, 6, 6);
        Array gradient = random_array(DType::f64, {1, 2, 90, 6}, 4);
        Array& target = *which == 'k'   ? in.k
                        : *which == 'v' ? in.v
                        : *which == 'q' ? in.q
                                        : gradient;
        for (int64_t e = 0; e < 6; ++e) target.as<double>()[70 * 6 + e] = value;
        const Array out = local_linear_attention(in.q, in.k, in.v, options, run);
        const auto back = local_linear_attention_backward(gradient, in.q, in.k, in.v, options, run);
        const auto from70 = [](int64_t i) { return i >= 70; };
        const auto only70 = [](int64_t i) { return i == 70; };
        const auto until70 = [](int64_t i) { return i <= 70; };
        const auto never = [](int64_t) { return false; };
        const auto always = [](int64_t) { return true; };
        if (*which == 'k' || *which == 'v') {
          for (int64_t i = 0; i < out.count(); ++i) {
            EXPECT_EQ(!std::isfinite(out.as<double>()[i]), i / 6 < 90 && i / 6 >= 70) << which << i;
          }
          expect_nan_where(back.q, 6, which, from70);
          expect_nan_where(back.k, 6, which, always);
        } else {
          expect_nan_where(out, 6, which, *which == 'q' ? +only70 : +never);
          expect_nan_where(back.q, 6, which, only70);
          expect_nan_where(back.k, 6, which, until70);
          expect_nan_where(back.v, 6, which, until70);
        }
      }
    }
  }
}

TEST(LocalLinear, TensorsWithoutElementsAndRowsThatSeeNothing) {
  const Array none(DType::f32, {1, 2, 0, 8}), some = random_array(DType::f32, {1, 2, 5, 8}, 1);
  EXPECT_EQ(local_linear_attention(none, some, some).count(), 0);
  const Array no_keys = local_linear_attention(some, none, none);
  for (int64_t i = 0; i < no_keys.count(); ++i) EXPECT_EQ(no_keys.as<float>()[i], 0);
  auto back = local_linear_attention_backward(some, some, none, none);
  for (int64_t i = 0; i < back.q.count(); ++i) EXPECT_EQ(back.q.as<float>()[i], 0);
  back = local_linear_attention_backward(none, none, some, some);
  for (int64_t i = 0; i < back.k.count(); ++i) EXPECT_EQ(back.k.as<float>()[i], 0);
  const Array no_batch(DType::f32, {0, 2, 5, 8}), no_heads(DType::f32, {1, 0, 5, 8});
  EXPECT_EQ(local_linear_attention(no_batch, no_batch, no_batch).count(), 0);
  EXPECT_EQ(local_linear_attention(no_heads, no_heads, no_heads).count(), 0);
  EXPECT_EQ(local_linear_attention_backward(no_heads, no_heads, some, some).k.count(), 80);
}

TEST(LocalLinear, ErrorsNameTheArgument) {
  const Inputs in = inputs(DType::f32, 5, 9, 8, 4);
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  for (double ridge : {0.0, -1.0, kNaN, static_cast<double>(INFINITY)}) {
    says(error_of([&] { local_linear_attention(in.q, in.k, in.v, {ridge, false, {}}); }),
         {"local_linear_attention", "ridge is", "> 0"});
  }
  says(error_of([&] { local_linear_attention(in.q, in.k, in.v, {1, false, INFINITY}); }),
       {"scale is inf"});
  says(error_of([&] { local_linear_attention(in.q, in.v, in.v); }),
       {"k has head dim 4", "q has 8"});
  says(error_of([&] { local_linear_attention_backward(in.q, in.q, in.k, in.v); }),
       {"grad_out [1,2,5,8]", "[1,2,5,4] float32"});
  says(error_of([&] { local_linear_attention_backward({}, in.q, in.k, in.v); }),
       {"grad_out is missing"});
}

}  // namespace
}  // namespace heed
