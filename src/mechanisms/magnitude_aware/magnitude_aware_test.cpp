// What a comparison with the cascade cannot show: identities of the paper, streaming, bits across
// schedules, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/chunked_test.h"

namespace heed {
namespace {

struct Inputs {
  Inputs(DType type, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t values)
      : q(random_array(type, {1, heads, tokens, dim}, 1)),
        k(random_array(type, {1, kv_heads, tokens, dim}, 2)),
        v(random_array(type, {1, kv_heads, tokens, values}, 3)) {}
  Array q, k, v;
};

MagnitudeAwareOptions with(bool causal, MagnitudeAwareForm form) {
  MagnitudeAwareOptions options;
  options.causal = causal;
  options.form = form;
  return options;
}

constexpr auto kCode = MagnitudeAwareForm::code, kPaper = MagnitudeAwareForm::paper;

TEST(MagnitudeAware, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (const auto& [causal, turned] : {std::pair{false, false}, {false, true}, {true, true}}) {
      const Inputs in(type, 3, 1, 900, 36, 20);
      RunOptions run{.threads = 1, .isa = {}};
      MagnitudeAwareOptions options = with(causal, kCode);
      if (turned) options.rope = Grid{30, 30};
      const Array one = magnitude_aware_linear_attention(in.q, in.k, in.v, options, run).out;
      for (int threads : {2, 7}) {
        run.threads = threads;
        const Array more = magnitude_aware_linear_attention(in.q, in.k, in.v, options, run).out;
        EXPECT_TRUE(same_bits(one, more)) << name_of(type);
      }
    }
  }
}

// Where what counts is small beside what is the same for all keys: features near 1 or near 0, values far
// from 0. Errors of the rounded tensors themselves are 2e-3.
TEST(MagnitudeAware, BfloatOperandsKeepWhatDiffersFromTheMean) {
  struct Case {
    double size, key_mean, value_mean, first_key = 1;
  };
  for (Isa isa : available_isas()) {
    for (const Case& c : {Case{1, 0, 0}, {0.02, 0, 0}, {1, -8, 0}, {1, 0, 5}, {100, 0, 0},
                          {1, 0, 0, 1000}}) {
      for (MagnitudeAwareForm form : {kCode, kPaper}) {
        const auto rounded = [](DType type, const Dims& shape, uint32_t seed, double size,
                                double mean) {
          Array x = random_array(DType::f64, shape, seed, size);
          for (int64_t i = 0; i < x.count(); ++i) x.as<double>()[i] += mean;
          return convert(convert(x, DType::bf16), type);
        };
        const auto gradients = [&](DType type) {
          const Array q = rounded(type, {1, 4, 300, 24}, 1, c.size, 0);
          Array k = rounded(DType::f64, {1, 2, 333, 24}, 2, c.size, c.key_mean);
          for (int64_t i = 0; i < k.count() && c.first_key != 1; ++i) {
            if (i / 24 % 333 == 0) k.as<double>()[i] = std::abs(k.as<double>()[i]) * c.first_key;
          }
          k = convert(convert(k, DType::bf16), type);
          const Array v = rounded(type, {1, 2, 333, 20}, 3, c.size, c.value_mean);
          const Array g = rounded(type, {1, 4, 300, 20}, 4, 1, 0);
          const MagnitudeAwareOptions options = with(false, form);
          const RunOptions run{.threads = {}, .isa = isa};
          MagnitudeAwareGradients d =
              magnitude_aware_linear_attention_backward(q, k, v, g, {}, options, run);
          Array out = magnitude_aware_linear_attention(q, k, v, options, run).out;
          std::vector<Array> all;
          for (const Array* x : {&out, &d.q, &d.k, &d.v}) {
            all.push_back(convert(x->view().slice(2, 1, x->shape()[2]), DType::f64));
          }
          return all;
        };
        const std::vector<Array> want = gradients(DType::f64), found = gradients(DType::bf16);
        for (size_t i = 0; i < want.size(); ++i) {
          EXPECT_LT(relative_error(found[i], want[i]), 0.01)
              << name_of(isa) << " result " << i << " size " << c.size << " means " << c.key_mean
              << " " << c.value_mean << " first key " << c.first_key;
        }
      }
    }
  }
}

// Sheet 09, 9(a).
TEST(MagnitudeAware, IdentitiesOfThePaper) {
  Inputs in(DType::f64, 2, 2, 130, 8, 9);
  for (MagnitudeAwareForm form : {kCode, kPaper}) {
    for (bool causal : {false, true}) {
      MagnitudeAwareOptions options = with(causal, form);
      options.eps = 0;
      const auto call = [&](const Inputs& x, const MagnitudeAwareOptions& o) {
        return magnitude_aware_linear_attention(x.q, x.k, x.v, o).out;
      };
      // Rows sum to 1: a constant value comes back.
      Inputs constant(DType::f64, 2, 2, 130, 8, 9);
      std::fill_n(constant.v.as<double>(), constant.v.count(), 2.5);
      const Array same = call(constant, options);
      for (int64_t i = 0; i < same.count(); ++i) EXPECT_NEAR(same.as<double>()[i], 2.5, 1e-9);
      // Identical keys give the mean of the values, whatever z is.
      Inputs identical(DType::f64, 2, 2, 130, 8, 9);
      for (int64_t i = 0; i < identical.k.count(); ++i) {
        identical.k.as<double>()[i] = 0.1 * static_cast<double>(i % 8);
      }
      const Array means = call(identical, options);
      double sum = 0;
      for (int64_t t = 0; t < 130; ++t) sum += identical.v.as<double>()[t * 9];
      EXPECT_NEAR(means.as<double>()[129 * 9], sum / 130, 1e-9);
    }
  }
  // A grid of one token turns nothing.
  const Inputs one(DType::f64, 2, 2, 1, 8, 9);
  MagnitudeAwareOptions grid = with(false, kCode);
  grid.rope = Grid{1, 1};
  EXPECT_LT(relative_error(magnitude_aware_linear_attention(one.q, one.k, one.v, grid).out,
                           magnitude_aware_linear_attention(one.q, one.k, one.v).out),
            1e-15);
}

// out = LA + z (LA - mean of v), with linear attention on the same features.
TEST(MagnitudeAware, IsLinearAttentionMovedAwayFromTheMean) {
  const Inputs in(DType::f64, 1, 1, 60, 8, 5);
  const Array fq = feature_map(in.q, FeatureKind::elu1), fk = feature_map(in.k, FeatureKind::elu1);
  MagnitudeAwareOptions options = with(false, kCode);
  options.eps = 0;
  const Array out = magnitude_aware_linear_attention(in.q, in.k, in.v, options).out;
  LinearOptions linear;
  linear.eps = 0;
  const Array plain = linear_attention(fq, fk, in.v, linear).out;
  for (int64_t p = 0; p < 60; ++p) {
    double z = 0;
    for (int64_t m = 0; m < 60; ++m) {
      for (int64_t e = 0; e < 8; ++e) z += fq.as<double>()[p * 8 + e] * fk.as<double>()[m * 8 + e];
    }
    z *= 1 / std::sqrt(8.0) / 60;
    for (int64_t f = 0; f < 5; ++f) {
      double mean = 0;
      for (int64_t m = 0; m < 60; ++m) mean += in.v.as<double>()[m * 5 + f] / 60;
      const double la = plain.as<double>()[p * 5 + f];
      EXPECT_NEAR(out.as<double>()[p * 5 + f], la + z * (la - mean), 1e-12);
    }
  }
}

TEST(MagnitudeAware, CausalIsTheWholeOperatorOnEveryPrefix) {
  const Inputs in(DType::f64, 2, 1, 70, 8, 5);
  for (MagnitudeAwareForm form : {kCode, kPaper}) {
    const Array causal = magnitude_aware_linear_attention(in.q, in.k, in.v, with(true, form)).out;
    for (int64_t t : {0, 1, 33, 69}) {
      const auto prefix = [&](const Array& x) { return x.view().slice(2, 0, t + 1); };
      const Array whole = magnitude_aware_linear_attention(prefix(in.q), prefix(in.k), prefix(in.v),
                                                           with(false, form))
                              .out;
      EXPECT_LT(relative_error(whole.view().slice(2, t, t + 1), causal.view().slice(2, t, t + 1)),
                1e-11);
    }
  }
}

TEST(MagnitudeAware, AnyCutGivesTheNumbersOfOneCall) {
  for (bool rope : {false, true}) {
    const Inputs in(DType::f64, 4, 2, 120, 12, 9);
    MagnitudeAwareOptions options = with(true, kCode);
    if (rope) options.rope = Grid{10, 12};
    const MagnitudeAwareResult whole = magnitude_aware_linear_attention(in.q, in.k, in.v, options);
    for (int64_t step : {1, 7, 50}) {
      Array out(DType::f64, {1, 4, 120, 9});
      Array s = Array::zeros(DType::f64, whole.s.shape());
      Array k_sum = Array::zeros(DType::f64, whole.k_sum.shape());
      Array v_sum = Array::zeros(DType::f64, whole.v_sum.shape());
      Array count = Array::zeros(DType::f64, {1});
      options.initial_state = {s, k_sum, v_sum, count};
      for (int64_t t = 0; t < 120; t += step) {
        const auto part = [&](const Array& x) {
          return x.view().slice(2, t, std::min<int64_t>(120, t + step));
        };
        magnitude_aware_linear_attention(part(in.q), part(in.k), part(in.v), part(out),
                                         {s, k_sum, v_sum, count}, options);
      }
      EXPECT_LT(relative_error(out, whole.out), 1e-11) << step;
      EXPECT_LT(relative_error(s, whole.s), 1e-13) << step;
      EXPECT_EQ(*count.as<double>(), 120);
    }
  }
}

TEST(MagnitudeAware, BackwardReadsTheStateOfTheForward) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      for (bool turned : {false, true}) {
        const Inputs in(type, 4, 2, 1500, 24, 40);
        const RunOptions run{.threads = {}, .isa = isa};
        MagnitudeAwareOptions options = with(false, kCode);
        if (turned) options.rope = Grid{30, 50};
        const DType wide = wide_type(type);
        Array s(wide, {1, 4, 24, 40}), k_sum(wide, {1, 4, 24}), v_sum(wide, {1, 4, 40});
        const MagnitudeAwareState state{s, k_sum, v_sum, {}};
        Array out(type, {1, 4, 1500, 40});
        const Array gradient = random_array(type, {1, 4, 1500, 40}, 4);
        magnitude_aware_linear_attention(in.q, in.k, in.v, out, state, options, run);
        const auto backward = [&] {
          return magnitude_aware_linear_attention_backward(in.q, in.k, in.v, gradient, {}, options,
                                                           run);
        };
        const MagnitudeAwareGradients alone = backward();
        options.forward_state = state;
        const MagnitudeAwareGradients given = backward();
        EXPECT_TRUE(same_bits(alone.q, given.q) && same_bits(alone.k, given.k) &&
                    same_bits(alone.v, given.v))
            << name_of(type) << " " << name_of(isa) << " " << turned;
        std::memset(v_sum.view().data(), 0,
                    static_cast<size_t>(v_sum.count()) * size_of(v_sum.dtype()));
        EXPECT_FALSE(same_bits(backward().q, given.q));
      }
    }
  }
}

TEST(MagnitudeAware, PositionsFarOut) {
  // A count of a billion tokens: tables are made for the positions at hand only.
  const Inputs in(DType::f64, 1, 1, 3, 8, 5);
  MagnitudeAwareOptions options = with(true, kCode);
  options.rope = Grid{1, int64_t{1} << 30};
  const Array s = random_array(DType::f64, {1, 1, 8, 5}, 4),
              k_sum = numbers({9, 9, 9, 9, 9, 9, 9, 9});
  const Array v_sum = numbers({1, 2, 3, 4, 5}), count = numbers({1e9});
  options.initial_state = {s, Tensor(k_sum.view().data(), DType::f64, {1, 1, 8}),
                           Tensor(v_sum.view().data(), DType::f64, {1, 1, 5}), count};
  const MagnitudeAwareResult result = magnitude_aware_linear_attention(in.q, in.k, in.v, options);
  EXPECT_EQ(*result.count.as<double>(), 1e9 + 3);
  EXPECT_TRUE(std::isfinite(inner(result.out, result.out)));
}

TEST(MagnitudeAware, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs in(DType::f32, 4, 2, 9, 6, 6);
  const auto call = [&](const MagnitudeAwareOptions& options) {
    return error_of([&] { magnitude_aware_linear_attention(in.q, in.k, in.v, options); });
  };
  MagnitudeAwareOptions options = with(false, kPaper);
  options.scale = 0.5;
  expect_says(call(options), {"magnitude_aware_linear_attention", "scale", "paper"});
  options = {};
  options.eps = -1;
  expect_says(call(options), {"eps is -1", "not negative"});
  options = {};
  options.rope = Grid{3, 3};
  expect_says(call(options), {"head dim 6", "multiple of 4"});
  const Inputs four(DType::f32, 4, 2, 9, 4, 6);
  options.rope = Grid{2, 3};
  expect_says(error_of([&] { magnitude_aware_linear_attention(four.q, four.k, four.v, options); }),
              {"rope is (2, 3)", "9 tokens", "height * width"});
  options.rope = Grid{0, 3};
  expect_says(error_of([&] { magnitude_aware_linear_attention(four.q, four.k, four.v, options); }),
              {"rope is (0, 3)", "height and width"});
  const Array s = random_array(DType::f32, {1, 4, 6, 6}, 1),
              sum = random_array(DType::f32, {1, 4, 6}, 2);
  const Array count = numbers({-1}), fraction = numbers({1.5}), fine = numbers({3});
  options = with(false, kCode);
  options.initial_state = {s, sum, sum, fine};
  expect_says(call(options), {"initial state without causal"});
  options.causal = true;
  EXPECT_EQ(call(options), "");
  options.initial_state.count = count;
  expect_says(call(options), {"count[0] is -1", "whole number"});
  options.initial_state.count = fraction;
  expect_says(call(options), {"count[0] is 1.5", "whole number"});
  options.initial_state = {s, sum, {}, fine};
  expect_says(call(options), {"not complete", "v_sum"});
  options.initial_state = {s, s, sum, fine};
  expect_says(call(options), {"initial_state k_sum", "[1,4,6] float32 is needed"});
  expect_says(error_of([&] { parse_magnitude_aware_form("both"); }), {"'both'", "'paper'"});
}

TEST(MagnitudeAware, TensorsWithoutElements) {
  for (bool causal : {false, true}) {
    const Array none = random_array(DType::f32, {1, 2, 0, 4}, 1),
                some = random_array(DType::f32, {1, 2, 5, 4}, 2);
    EXPECT_EQ(magnitude_aware_linear_attention(none, none, none, with(causal, kCode)).out.count(),
              0);
    const Array out = magnitude_aware_linear_attention(some, none, none, with(causal, kCode)).out;
    for (int64_t i = 0; i < out.count(); ++i) EXPECT_EQ(out.as<float>()[i], 0);
  }
}

}  // namespace
}  // namespace heed
