// Identities of the paper, the two paths against each other, bits across thread counts, rows that see
// nothing, empty tensors, messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "heed/feature_map.h"
#include "heed/flash_attention.h"
#include "mechanisms/kernelized_rpe/test_call.h"

namespace heed {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
using Call = RpeTestCall;

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

// Sheet 11, 9(a): random features of M directions are softmax attention of the normalised rows up to an
// error that falls as 1 / sqrt(M).
TEST(KernelizedRpe, ManyRandomFeaturesAreSoftmaxAttention) {
  constexpr int64_t kTokens = 24, kHeads = 8, kDim = 8;
  const auto unit_rows = [](uint32_t seed) {
    Array x = random_array(DType::f64, {1, kHeads, kTokens, kDim}, seed);
    for (int64_t row = 0; row < kHeads * kTokens; ++row) {
      double* at = x.as<double>() + row * kDim;
      double square = 0;
      for (int64_t e = 0; e < kDim; ++e) square += at[e] * at[e];
      for (int64_t e = 0; e < kDim; ++e) at[e] /= std::sqrt(square);
    }
    return x;
  };
  const Array q = unit_rows(1), k = unit_rows(2);
  const Array v = random_array(DType::f64, {1, kHeads, kTokens, 6}, 3);
  const Array rpb = random_array(DType::f64, {kHeads, 2 * kTokens - 1}, 4);
  Array bias(DType::f64, {1, kHeads, kTokens, kTokens});
  for (int64_t i = 0; i < bias.count(); ++i) {
    const int64_t m = i % kTokens, p = i / kTokens % kTokens, h = i / (kTokens * kTokens);
    bias.as<double>()[i] = rpb.as<double>()[h * (2 * kTokens - 1) + kTokens - 1 + m - p];
  }
  FlashOptions exact;
  exact.scale = 1;
  exact.bias = bias;
  const Array want = flash_attention(q, k, v, exact).out;
  const auto error = [&](int64_t features) {
    double square = 0;
    for (uint64_t seed : {5U, 6U, 7U, 8U}) {
      const Array projection = performer_projection(kHeads, features, kDim, seed);
      const Array found = kernelized_rpe_attention(q, k, v, rpb, convert(projection, DType::f64));
      for (int64_t i = 0; i < want.count(); ++i) {
        const double d = found.as<double>()[i] - want.as<double>()[i];
        square += d * d / static_cast<double>(4 * want.count());
      }
    }
    return std::sqrt(square);
  };
  const double few = error(64), more = error(1024), many = error(16384);
  EXPECT_LT(many, 0.02);
  for (double ratio : {few / more, more / many}) {  // sqrt(16)
    EXPECT_GT(ratio, 3);
    EXPECT_LT(ratio, 5.5);
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

TEST(KernelizedRpe, TheCheaperPathIsChosen) {
  const auto cost = [](int64_t tokens, int64_t width) {
    return kernelized_rpe_cost(tokens, tokens, width, width, false, DType::f32, Isa::avx512);
  };
  EXPECT_LT(cost(1024, 64).direct, cost(1024, 64).fft);
  EXPECT_GT(cost(1 << 20, 64).direct, cost(1 << 20, 64).fft);
  EXPECT_GT(cost(65536, 4).direct, cost(65536, 4).fft);
  EXPECT_LT(kernelized_rpe_cost(600, 600, 12, 6, false, DType::f32, Isa::avx512).direct,
            kernelized_rpe_cost(600, 600, 12, 6, false, DType::f32, Isa::avx512).fft);
  // Without wide vectors transforms pay early. The bits of a result show which way it was made.
  Call call(DType::f32, 600, 1, 1);
  for (Isa isa : available_isas()) {
    const RunOptions run{.isa = isa};
    const RpeCost here = kernelized_rpe_cost(600, 600, 12, 6, false, DType::f32, isa);
    EXPECT_TRUE(same_bits(call.run(RpePath::automatic, run),
                          call.run(here.fft < here.direct ? RpePath::fft : RpePath::direct, run)))
        << name_of(isa);
  }
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
