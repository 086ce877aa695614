// Inputs that lie far apart, long and zero vectors, NaN: what stays exact, where it goes, and what the
// transform refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "mechanisms/kernelized_rpe/test_call.h"

namespace heed {
namespace {

using Call = RpeTestCall;

TEST(KernelizedRpeExtremes, WeightsFarApartStayExactDirectlyAndAreRefusedByTheTransform) {
  Call call(DType::f32, 60, 1, 1);
  for (int64_t i = 0; i < 119; ++i) {
    call.rpb.as<float>()[i] =
        static_cast<float>(i > 58 ? 300 : -2 * i);  // causal rows see the small ones
  }
  call.options.causal = true;
  call.rpb.as<float>()[59] = -400;
  Call exact(DType::f64, 60, 1, 1);
  for (const auto& [to, from] : {std::pair{&exact.q, &call.q},
                                 {&exact.k, &call.k},
                                 {&exact.v, &call.v},
                                 {&exact.rpb, &call.rpb},
                                 {&exact.projection, &call.projection}}) {
    *to = convert(*from, DType::f64);
  }
  exact.options = call.options;
  const Array want = exact.run(RpePath::direct);
  EXPECT_LT(largest_difference(call.run(RpePath::direct), want), 1e-5);
  EXPECT_LT(largest_difference(call.run(RpePath::automatic), want), 1e-5);
  const std::string message = error_of([&] { call.run(RpePath::fft); });
  EXPECT_NE(message.find("path is fft"), std::string::npos) << message;
  EXPECT_NE(message.find("1e6"), std::string::npos) << message;
}

// A transform's rounding is as large for a row that sees small sums as for the others. These are computed
// directly (auto) or refused (fft), the gradients too.
TEST(KernelizedRpeExtremes, WhatWouldDrownInTheTransformIsComputedDirectly) {
  constexpr int64_t kTokens = 1200;
  const RunOptions portable{.isa = Isa::portable};
  const auto scale = [](Array& a, int64_t first, int64_t count, float factor, float shift) {
    for (int64_t i = first; i < first + count; ++i) {
      a.as<float>()[i] = a.as<float>()[i] * factor + shift;
    }
  };
  struct Case {
    const char* name;
    RpeFeatures features;
    bool causal, forward;  // forward: the result would suffer too, not only gradients
    std::function<void(Call&, Array&)> change;
  };
  const Case cases[] = {
      {"small first keys", RpeFeatures::elu1, true, true,
       [&](Call& call, Array&) { scale(call.k, 0, 100 * 8, 1, -40); }},
      {"small keys in a window", RpeFeatures::elu1, false, true,
       [&](Call& call, Array&) {
         scale(call.k, 0, 100 * 8, 1, -40);
         for (int64_t i = 0; i < call.rpb.count(); ++i) {
           if (std::abs(i - (kTokens - 1)) > 8) call.rpb.as<float>()[i] = -HUGE_VALF;
         }
       }},
      {"wide features", RpeFeatures::prf, true, true,
       [&](Call& call, Array&) {
         for (Array* a : {&call.q, &call.k}) scale(*a, 0, a->count(), 10, 0);
       }},
      {"one large value", RpeFeatures::nprf, true, true,
       [&](Call& call, Array&) { scale(call.v, 900 * 6, 1, 0, 1e15F); }},
      {"one large channel", RpeFeatures::nprf, true, true,
       [&](Call& call, Array&) {
         for (int64_t i = 0; i < 2 * kTokens; ++i) scale(call.v, i * 6, 1, 1e15F, 0);
       }},
      {"large first gradients", RpeFeatures::nprf, true, false,
       [&](Call&, Array& gradient) { scale(gradient, 0, 64 * 6, 1e15F, 0); }},
  };
  for (const Case& c : cases) {
    Call call(DType::f32, kTokens, 1, 1);
    call.options.features = c.features;
    call.options.causal = c.causal;
    Array gradient = random_array(DType::f32, {2, 1, kTokens, 6}, 9);
    const RpeCost cost =
        kernelized_rpe_cost(kTokens, kTokens, 12, 6, true, DType::f32, Isa::portable);
    ASSERT_LT(cost.fft, cost.direct);
    EXPECT_EQ(error_of([&] { call.run(RpePath::fft); }), "") << c.name;
    EXPECT_EQ(error_of([&] { call.backward(gradient, RpePath::fft); }), "") << c.name;

    c.change(call, gradient);
    EXPECT_EQ(error_of([&] { call.run(RpePath::fft); }).empty(), !c.forward) << c.name;
    const std::string message = error_of([&] { call.backward(gradient, RpePath::fft); });
    EXPECT_NE(message.find("path is fft but key features, values or gradients"), std::string::npos)
        << c.name << message;
    EXPECT_NE(message.find("at most 1e-06"), std::string::npos) << message;
    if (c.forward) {
      EXPECT_TRUE(
          same_bits(call.run(RpePath::automatic, portable), call.run(RpePath::direct, portable)))
          << c.name;
    }
    const KernelizedRpeGradients a = call.backward(gradient, RpePath::automatic, portable);
    const KernelizedRpeGradients b = call.backward(gradient, RpePath::direct, portable);
    EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.k, b.k)) << c.name;
    EXPECT_TRUE(same_bits(a.v, b.v) && same_bits(a.rpb, b.rpb)) << c.name;
  }
}

// Values share transforms with the ones of the denominators.
TEST(KernelizedRpeExtremes, TheScaleOfValuesDoesNotMatter) {
  for (double scale : {1e-20, 1e15}) {
    Call call(DType::f64, 90, 2, 1);
    call.options.causal = true;
    call.v = random_array(DType::f64, {2, 1, 90, 5}, 3, scale);
    const Array gradient = random_array(DType::f64, {2, 2, 90, 5}, 9);
    EXPECT_LT(largest_difference(call.run(RpePath::fft), call.run(RpePath::direct)), 1e-12 * scale);
    const KernelizedRpeGradients a = call.backward(gradient, RpePath::fft);
    const KernelizedRpeGradients b = call.backward(gradient, RpePath::direct);
    EXPECT_LT(largest_difference(a.q, b.q), 1e-11 * scale);
    EXPECT_LT(largest_difference(a.k, b.k), 1e-11 * scale);
    EXPECT_LT(largest_difference(a.v, b.v), 1e-11);
    EXPECT_LT(largest_difference(a.rpb, b.rpb), 1e-11 * scale);
  }
}

// A loss that reads a few rows or channels: keys that get no gradient are not small sums.
TEST(KernelizedRpeExtremes, TheTransformTakesGradientsThatAreZero) {
  for (bool causal : {false, true}) {
    Call call(DType::f64, 300, 1, 1);
    call.options.causal = causal;
    for (int which = 0; which < 3; ++which) {
      Array gradient = random_array(DType::f64, {2, 1, 300, 6}, 9);
      for (int64_t i = 0; i < gradient.count(); ++i) {
        const int64_t row = i / 6 % 300;
        if (which == 0 ? row >= 100 : which == 1 ? row < 299 : i % 6 != 0) {
          gradient.as<double>()[i] = 0;
        }
      }
      const KernelizedRpeGradients a = call.backward(gradient, RpePath::fft);
      const KernelizedRpeGradients b = call.backward(gradient, RpePath::direct);
      EXPECT_LT(largest_difference(a.q, b.q), 1e-11) << which;
      EXPECT_LT(largest_difference(a.k, b.k), 1e-11) << which;
      EXPECT_LT(largest_difference(a.v, b.v), 1e-11) << which;
    }
  }
}

TEST(KernelizedRpeExtremes, LongVectorsDoNotOverflow) {
  for (RpeFeatures features :
       {RpeFeatures::nprf, RpeFeatures::prf, RpeFeatures::trf, RpeFeatures::elu1}) {
    Call call(DType::f32, 20, 1, 1);
    call.options.features = features;
    for (int64_t i = 0; i < call.q.count(); ++i) call.q.as<float>()[i] *= 30;
    for (int64_t i = 0; i < call.k.count(); ++i) call.k.as<float>()[i] *= 30;
    const Array out = call.run(RpePath::direct);
    for (int64_t i = 0; i < out.count(); ++i)
      EXPECT_TRUE(std::isfinite(out.as<float>()[i])) << name_of(features);
  }
  Call call(DType::f32, 20, 1, 1);  // squares beyond float32
  const Array before = call.run(RpePath::direct);
  for (int64_t i = 0; i < call.q.count(); ++i) call.q.as<float>()[i] *= 1e25f;
  EXPECT_LT(largest_difference(call.run(RpePath::direct), before), 1e-5);
}

TEST(KernelizedRpeExtremes, ZeroVectorsHaveNoDirectionAndNoGradient) {
  for (RpePath path : kPaths) {
    Call call(DType::f64, 30, 1, 1);
    for (int64_t i = 0; i < 8; ++i) call.q.as<double>()[i] = call.k.as<double>()[i] = 0;
    const Array out = call.run(path);
    const KernelizedRpeGradients g = call.backward(out, path);
    for (const Array* a : {&out, &g.q, &g.k, &g.v, &g.rpb}) {
      for (int64_t i = 0; i < a->count(); ++i) ASSERT_TRUE(std::isfinite(a->as<double>()[i]));
    }
    for (int64_t i = 0; i < 8; ++i) {
      EXPECT_EQ(g.q.as<double>()[i], 0);
      EXPECT_EQ(g.k.as<double>()[i], 0);
    }
  }
}

TEST(KernelizedRpeExtremes, NanStaysWithTheRowsThatSeeIt) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (RpePath path : kPaths) {
    for (Isa isa : available_isas()) {
      Call clean(DType::f32, 300, 1, 1);
      clean.options.causal = true;
      // The transform is not used for inputs with NaN.
      const Array before = clean.run(RpePath::direct, {.isa = isa});
      for (int which = 0; which < 3; ++which) {
        Call call(DType::f32, 300, 1, 1);
        call.options.causal = true;
        Array* inputs[] = {&call.q, &call.k, &call.v};
        const int64_t width = which == 2 ? 6 : 8;
        inputs[which]->as<float>()[290 * width] = nan;
        const Array out = call.run(path, {.isa = isa});
        for (int64_t i = 0; i < 300 * 6; ++i) {
          const int64_t row = i / 6;
          if (row < 290 || (which == 0 && row > 290)) {
            ASSERT_EQ(out.as<float>()[i], before.as<float>()[i]) << which << " " << i;
          } else if (which != 2 || i % 6 == 0) {
            ASSERT_TRUE(std::isnan(out.as<float>()[i])) << which << " " << i;
          }
        }
      }
      Call call(DType::f32, 300, 1, 1);
      call.rpb.as<float>()[0] = nan;  // read by the last query only
      const Array out = call.run(path, {.isa = isa});
      for (int64_t i = 0; i < 300 * 6; ++i) ASSERT_EQ(std::isnan(out.as<float>()[i]), i / 6 == 299);
    }
  }
}

// A causal loss over rows that do not see the NaN: its gradients are those without it.
TEST(KernelizedRpeExtremes, NanStaysWithTheGradientsThatSeeIt) {
  constexpr int64_t kTokens = 300, kBad = 277;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto part_is = [](const Array& found, const Array& want, int64_t width, int64_t begin,
                          int64_t end, bool same) {
    for (int64_t i = begin * width; i < end * width; ++i) {
      const float x = found.as<float>()[i];
      if (same ? x != want.as<float>()[i] : !std::isnan(x)) return false;
    }
    return true;
  };
  for (RpePath path : kPaths) {
    for (Isa isa : available_isas()) {
      const RunOptions run{.isa = isa};
      Call clean(DType::f32, kTokens, 1, 1);
      clean.options.causal = true;
      const Array gradient = random_array(DType::f32, {2, 1, kTokens, 6}, 9);
      const KernelizedRpeGradients want = clean.backward(gradient, RpePath::direct, run);
      const auto with_nan = [&](int which) {
        Call call(DType::f32, kTokens, 1, 1);
        call.options.causal = true;
        Array changed = convert(gradient, DType::f32);
        Array* const places[] = {&call.q, &call.k, &call.v, &changed};
        places[which]->as<float>()[kBad * (which < 2 ? 8 : 6)] = nan;
        return call.backward(changed, path, run);
      };
      for (int which : {1, 2}) {  // k, v: read by the queries from kBad on
        const KernelizedRpeGradients g = with_nan(which);
        EXPECT_TRUE(part_is(g.q, want.q, 8, 0, kBad, true)) << which;
        EXPECT_TRUE(part_is(g.q, want.q, 8, kBad, kTokens, false)) << which;
      }
      for (int which : {0, 3}) {  // q, gradient: read by the keys up to kBad
        const KernelizedRpeGradients g = with_nan(which);
        for (const auto& [at, width] : {std::pair{0, 8}, {1, 8}, {2, 6}}) {
          const Array& found = at == 0 ? g.q : at == 1 ? g.k : g.v;
          const Array& expected = at == 0 ? want.q : at == 1 ? want.k : want.v;
          EXPECT_TRUE(part_is(found, expected, width, kBad + 1, kTokens, true)) << which << at;
          EXPECT_TRUE(std::isnan(found.as<float>()[kBad * width])) << which << at;
        }
        EXPECT_TRUE(part_is(g.q, want.q, 8, 0, kBad, true)) << which;
        EXPECT_TRUE(part_is(g.k, want.k, 8, 0, kBad + 1, false)) << which;
      }
    }
  }
}

}  // namespace
}  // namespace heed
