// Identities of the paper, the two paths against each other, bits across thread counts, NaN, extreme
// weights, rows that see nothing, empty tensors, messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "heed/feature_map.h"
#include "heed/kernelized_rpe_attention.h"
#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr RpePath kPaths[] = {RpePath::direct, RpePath::fft};

struct Call {
  Array q, k, v, rpb, projection;
  KernelizedRpeOptions options;
  explicit Call(DType type, int64_t tokens = 70, int64_t heads = 2, int64_t kv_heads = 1)
      : q(random_array(type, {2, heads, tokens, 8}, 1)),
        k(random_array(type, {2, kv_heads, tokens, 8}, 2)),
        v(random_array(type, {2, kv_heads, tokens, 6}, 3)),
        rpb(random_array(type, {heads, 2 * tokens - 1}, 4)),
        projection(convert(performer_projection(heads, 12, 8, 5), type)) {}
  Array run(RpePath path, const RunOptions& how = {}) const {
    KernelizedRpeOptions chosen = options;
    chosen.path = path;
    return kernelized_rpe_attention(q, k, v, rpb, projection_in_use(), chosen, how);
  }
  KernelizedRpeGradients backward(const Array& gradient, RpePath path,
                                  const RunOptions& how = {}) const {
    KernelizedRpeOptions chosen = options;
    chosen.path = path;
    return kernelized_rpe_attention_backward(gradient, q, k, v, rpb, projection_in_use(), chosen,
                                             how);
  }
  Tensor projection_in_use() const {
    return options.features == RpeFeatures::elu1 ? Tensor() : projection.view();
  }
};

void set_all(Array& array, double value) {
  for (int64_t i = 0; i < array.count(); ++i) {
    array.dtype() == DType::f64 ? array.as<double>()[i] = value
                                : array.as<float>()[i] = static_cast<float>(value);
  }
}

TEST(KernelizedRpe, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const auto& [heads, tokens] : {std::pair<int64_t, int64_t>{1, 150}, {6, 70}}) {
      Call call(type, tokens, heads, heads > 1 ? 2 : 1);
      call.options.causal = heads > 1;
      const Array gradient = random_array(type, {2, heads, tokens, 6}, 9);
      for (RpePath path : kPaths) {
        const Array one = call.run(path, {.threads = 1});
        for (int threads : {2, 5}) {
          const RunOptions run{.threads = threads};
          EXPECT_TRUE(same_bits(one, call.run(path, run))) << name_of(path);
          const KernelizedRpeGradients a = call.backward(gradient, path, run);
          const KernelizedRpeGradients b = call.backward(gradient, path, run);
          EXPECT_TRUE(same_bits(a.q, b.q) && same_bits(a.k, b.k));
          EXPECT_TRUE(same_bits(a.v, b.v) && same_bits(a.rpb, b.rpb));
        }
      }
    }
  }
}

TEST(KernelizedRpe, BothPathsGiveTheSameNumbers) {
  for (RpeFeatures features : {RpeFeatures::nprf, RpeFeatures::prf, RpeFeatures::elu1}) {
    for (bool causal : {false, true}) {
      Call call(DType::f64, 60, 4, 2);
      call.options.features = features;
      call.options.causal = causal;
      const Array direct = call.run(RpePath::direct);
      EXPECT_LT(largest_difference(direct, call.run(RpePath::fft)), 1e-12);
      const KernelizedRpeGradients a = call.backward(direct, RpePath::direct);
      const KernelizedRpeGradients b = call.backward(direct, RpePath::fft);
      EXPECT_LT(largest_difference(a.q, b.q), 1e-11);
      EXPECT_LT(largest_difference(a.k, b.k), 1e-11);
      EXPECT_LT(largest_difference(a.v, b.v), 1e-11);
      EXPECT_LT(largest_difference(a.rpb, b.rpb), 1e-11);
    }
  }
}

TEST(KernelizedRpe, ConstantValuesComeBack) {
  for (RpePath path : kPaths) {
    Call call(DType::f64);
    set_all(call.v, 3);
    const Array out = call.run(path);
    for (int64_t i = 0; i < out.count(); ++i) EXPECT_NEAR(out.as<double>()[i], 3, 1e-12);
  }
}

TEST(KernelizedRpe, AddingAConstantToTheBiasChangesNothing) {
  for (RpePath path : kPaths) {
    Call call(DType::f64);
    const Array before = call.run(path);
    for (int64_t i = 0; i < call.rpb.count(); ++i) call.rpb.as<double>()[i] += 900;
    EXPECT_LT(largest_difference(before, call.run(path)), 1e-12);
    const KernelizedRpeGradients g = call.backward(before, path);
    for (int64_t h = 0; h < 2; ++h) {
      double sum = 0;
      for (int64_t i = 0; i < 139; ++i) sum += g.rpb.as<double>()[h * 139 + i];
      EXPECT_NEAR(sum, 0, 1e-11);
    }
  }
}

TEST(KernelizedRpe, OnlyTheOwnOffsetGivesTheOwnValue) {
  for (RpePath path : kPaths) {
    Call call(DType::f64, 40, 1, 1);
    set_all(call.rpb, -kInf);
    call.rpb.as<double>()[39] = 0.5;
    EXPECT_LT(largest_difference(call.run(path), call.v), 1e-13);
  }
}

TEST(KernelizedRpe, OnlyTheCentreOfALongBiasIsUsed) {
  for (RpePath path : kPaths) {
    Call call(DType::f64, 40, 1, 1);
    const Array before = call.run(path);
    Array longer = random_array(DType::f64, {1, 99}, 8, 100);
    for (int64_t i = 0; i < 79; ++i) longer.as<double>()[10 + i] = call.rpb.as<double>()[i];
    call.rpb = std::move(longer);
    EXPECT_LT(largest_difference(call.run(path), before), 1e-14);
    const KernelizedRpeGradients g = call.backward(before, path);
    for (int64_t i = 0; i < 10; ++i) {
      EXPECT_EQ(g.rpb.as<double>()[i], 0);
      EXPECT_EQ(g.rpb.as<double>()[98 - i], 0);
    }
  }
}

TEST(KernelizedRpe, AGridOfOneRowIsALine) {
  for (RpePath path : kPaths) {
    Call call(DType::f64, 30, 2, 1);
    const Array line = call.run(path);
    call.options.grid = {1, 30};
    Array grid_rpb(DType::f64, {2, 1, 59});
    std::copy_n(call.rpb.as<double>(), 2 * 59, grid_rpb.as<double>());
    call.rpb = std::move(grid_rpb);
    EXPECT_TRUE(same_bits(call.run(path), line));
  }
}

TEST(KernelizedRpe, CausalDecayIsARecurrence) {
  // b[-n] = n log(lambda): y_t = phi_q S_t / phi_q z_t with S_t = lambda S_(t-1) + phi_k v.
  const double lambda = 0.9;
  Call call(DType::f64, 50, 1, 1);
  call.options.features = RpeFeatures::elu1;
  call.options.causal = true;
  for (int64_t o = -49; o < 50; ++o) {
    call.rpb.as<double>()[49 + o] = static_cast<double>(-o) * std::log(lambda);
  }
  const Array fq = feature_map(call.q, FeatureKind::elu1),
              fk = feature_map(call.k, FeatureKind::elu1);
  for (RpePath path : kPaths) {
    const Array out = call.run(path);
    for (int64_t b = 0; b < 2; ++b) {
      std::vector<double> state(8 * 7);
      for (int64_t t = 0; t < 50; ++t) {
        const int64_t at = b * 50 + t;
        double sums[7] = {};
        for (int64_t e = 0; e < 8; ++e) {
          for (int64_t f = 0; f < 7; ++f) {
            double& s = state[static_cast<size_t>(e * 7 + f)];
            const double v = f == 6 ? 1 : call.v.as<double>()[at * 6 + f];
            s = lambda * s + fk.as<double>()[at * 8 + e] * v;
            sums[f] += fq.as<double>()[at * 8 + e] * s;
          }
        }
        for (int64_t f = 0; f < 6; ++f) {
          EXPECT_NEAR(out.as<double>()[at * 6 + f], sums[f] / sums[6], 1e-11);
        }
      }
    }
  }
}

TEST(KernelizedRpe, RowsThatSeeNothingAreZero) {
  for (RpePath path : kPaths) {
    for (DType type : {DType::f64, DType::f32}) {
      Call call(type, 40, 1, 1);
      call.options.causal = true;
      Array rpb(DType::f64, {1, 79});
      for (int64_t i = 0; i < 79; ++i)
        rpb.as<double>()[i] = i > 36 ? -kInf : 0.1;  // offsets from -2 on
      call.rpb = convert(rpb, type);
      const Array out = convert(call.run(path), DType::f64);
      const KernelizedRpeGradients g = call.backward(call.run(path), path);
      const Array dq = convert(g.q, DType::f64), dv = convert(g.v, DType::f64);
      for (int64_t i = 0; i < 3 * 6; ++i) EXPECT_EQ(out.as<double>()[i], 0);
      for (int64_t i = 0; i < 3 * 8; ++i) EXPECT_EQ(dq.as<double>()[i], 0);
      EXPECT_NE(out.as<double>()[3 * 6], 0);
      for (int64_t i = 37 * 6; i < 40 * 6; ++i) EXPECT_NEAR(dv.as<double>()[i], 0, 1e-12);
    }
  }
}

TEST(KernelizedRpe, WeightsFarApartStayExactDirectlyAndAreRefusedByTheTransform) {
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
TEST(KernelizedRpe, WhatWouldDrownInTheTransformIsComputedDirectly) {
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
TEST(KernelizedRpe, TheScaleOfValuesDoesNotMatter) {
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
TEST(KernelizedRpe, TheTransformTakesGradientsThatAreZero) {
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

TEST(KernelizedRpe, LongVectorsDoNotOverflow) {
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

TEST(KernelizedRpe, ZeroVectorsHaveNoDirectionAndNoGradient) {
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

TEST(KernelizedRpe, NanStaysWithTheRowsThatSeeIt) {
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
TEST(KernelizedRpe, NanStaysWithTheGradientsThatSeeIt) {
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

TEST(KernelizedRpe, TheCheaperPathIsChosen) {
  const auto cost = [](int64_t tokens, int64_t width) {
    return kernelized_rpe_cost(tokens, tokens, width, width, false, DType::f32, Isa::avx512);
  };
  EXPECT_LT(cost(1024, 64).direct, cost(1024, 64).fft);
  EXPECT_GT(cost(1 << 20, 64).direct, cost(1 << 20, 64).fft);
  EXPECT_GT(cost(65536, 4).direct, cost(65536, 4).fft);
  // On a portable build transforms pay early: automatic takes them here, and its bits show it.
  Call call(DType::f32, 600, 1, 1);
  const RunOptions portable{.isa = Isa::portable};
  EXPECT_TRUE(same_bits(call.run(RpePath::automatic), call.run(RpePath::direct)));
  const RpeCost here = kernelized_rpe_cost(600, 600, 12, 6, false, DType::f32, Isa::portable);
  EXPECT_TRUE(
      same_bits(call.run(RpePath::automatic, portable),
                call.run(here.fft < here.direct ? RpePath::fft : RpePath::direct, portable)));
}

TEST(KernelizedRpe, EmptyTensors) {
  for (const auto& [b, h, kv, tokens] :
       {std::array<int64_t, 4>{0, 2, 2, 3}, {1, 0, 0, 3}, {1, 0, 2, 3}, {1, 2, 1, 0}}) {
    const Array q = Array::zeros(DType::f32, {b, h, tokens, 4}),
                k = Array::zeros(DType::f32, {b, kv, tokens, 4});
    const Array rpb = Array::zeros(DType::f32, {h, 9}), w = Array::zeros(DType::f32, {h, 3, 4});
    for (RpePath path : {RpePath::automatic, RpePath::direct, RpePath::fft}) {
      const Array out = kernelized_rpe_attention(q, k, k, rpb, w, {.path = path});
      EXPECT_EQ(out.shape(), (Dims{b, h, tokens, 4}));
      const KernelizedRpeGradients g =
          kernelized_rpe_attention_backward(out, q, k, k, rpb, w, {.path = path});
      for (const Array* a : {&g.q, &g.k, &g.v, &g.rpb}) {
        for (int64_t i = 0; i < a->count(); ++i) EXPECT_EQ(a->as<float>()[i], 0);
      }
    }
  }
}

TEST(KernelizedRpe, ErrorsNameTheArgument) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Call c(DType::f32, 12);
  const auto call = [&](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
                        const Tensor& w, const KernelizedRpeOptions& options = {}) {
    return error_of([&] { kernelized_rpe_attention(q, k, v, rpb, w, options); });
  };
  EXPECT_EQ(call(c.q, c.k, c.v, c.rpb, c.projection), "");
  says(call({}, c.k, c.v, c.rpb, c.projection), {"kernelized_rpe_attention", "q is missing"});
  says(call(c.q, c.k.view().slice(2, 0, 5), c.v.view().slice(2, 0, 5), c.rpb, c.projection),
       {"as many keys as queries"});
  says(call(c.q, c.k, c.v, {}, c.projection), {"rpb is missing", "[2,2R-1] with R >= 12"});
  says(call(c.q, c.k, c.v, c.rpb.view().slice(1, 0, 21), c.projection), {"rpb [2,21]", "R >= 12"});
  says(call(c.q, c.k, c.v, c.rpb.view().slice(1, 0, 22), c.projection), {"rpb [2,22]", "2R-1"});
  says(call(c.q, c.k, c.v, c.rpb.view().slice(0, 0, 1), c.projection), {"rpb [1,23]", "[2,23]"});
  says(call(c.q, c.k, c.v, c.rpb, {}), {"projection is missing", "nprf", "[2,M,8]"});
  says(call(c.q, c.k, c.v, c.rpb, c.projection.view().slice(2, 0, 7)),
       {"projection [2,12,7]", "[2,12,8]"});
  says(call(c.q, c.k, c.v, c.rpb, c.projection, {.features = RpeFeatures::elu1}),
       {"projection", "elu1", "none"});
  const Array half = convert(c.rpb, DType::bf16);
  says(call(c.q, c.k, c.v, half, c.projection), {"rpb", "bfloat16", "float32"});
  KernelizedRpeOptions grid;
  grid.grid = {3, 5};
  says(call(c.q, c.k, c.v, c.rpb, c.projection, grid), {"grid is (3,5)", "12"});
  grid.grid = {-3, -4};
  says(call(c.q, c.k, c.v, c.rpb, c.projection, grid), {"grid is (-3,-4)", "12"});
  grid.grid = {3, 4};
  says(call(c.q, c.k, c.v, c.rpb, c.projection, grid), {"rpb [2,23]", "[2,5,7]"});
  says(error_of([&] { kernelized_rpe_attention(c.q, c.k, c.v, c.rpb, c.projection, c.q); }),
       {"out", "[2,2,12,6]"});
  says(
      error_of([&] { kernelized_rpe_attention_backward(c.q, c.q, c.k, c.v, c.rpb, c.projection); }),
      {"grad_out", "[2,2,12,6]"});
  says(error_of([] { parse_rpe_features("npf"); }), {"'npf'", "nprf", "elu1"});
  says(error_of([] { parse_rpe_path("ftt"); }), {"'ftt'", "auto", "direct"});
}

}  // namespace
}  // namespace heed
