// What a comparison with the cascade cannot show: streaming, bits across schedules, identities of the
// paper, messages.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "heed/heed.h"
#include "mechanisms/chunked_test.h"
#include "mechanisms/taylor_state/path.h"

namespace heed {
namespace {

struct Inputs {
  Inputs(DType type, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t values)
      : q(random_array(type, {1, heads, tokens, dim}, 1)),
        k(random_array(type, {1, kv_heads, tokens, dim}, 2)),
        v(random_array(type, {1, kv_heads, tokens, values}, 3)) {}
  Array q, k, v;
};

TaylorOptions of_order(int64_t order, double scale) {
  TaylorOptions options;
  options.order = order;
  options.scale = scale;
  return options;
}

TEST(Taylor, SizesOfTheState) {
  EXPECT_EQ(taylor_state_size(64, 1), 65);
  EXPECT_EQ(taylor_state_size(64, 2), 65 + 2080);
  EXPECT_EQ(taylor_state_size(64, 3), 65 + 2080 + 45760);
  EXPECT_EQ(taylor_state_size(8, 3), 9 + 36 + 120);
  EXPECT_EQ(taylor_state_size(5, 0), 1);
}

TEST(Taylor, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      const Inputs in(type, 3, 1, 400, 12, 20);
      RunOptions run{.threads = 1, .isa = isa};
      const TaylorResult one = taylor_state_attention(in.q, in.k, in.v, {}, run);
      for (int threads : {2, 7}) {
        run.threads = threads;
        const TaylorResult more = taylor_state_attention(in.q, in.k, in.v, {}, run);
        EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
        EXPECT_TRUE(same_bits(one.s, more.s) && same_bits(one.z, more.z)) << name_of(isa);
      }
    }
  }
}

TEST(Taylor, AnyCutGivesTheNumbersOfOneCall) {
  for (int64_t order : {1, 2, 3}) {
    const Inputs in(DType::f64, 4, 2, 150, 7, 70);
    const TaylorOptions whole_options = of_order(order, order % 2 == 0 ? 0.4 : 0.02);
    const TaylorResult whole = taylor_state_attention(in.q, in.k, in.v, whole_options);
    for (int64_t step : {1, 13, 80}) {
      Array out(DType::f64, {1, 4, 150, 70});
      Array s = Array::zeros(DType::f64, whole.s.shape()),
            z = Array::zeros(DType::f64, whole.z.shape());
      TaylorOptions options = whole_options;
      options.initial_state = {s, z};
      for (int64_t t = 0; t < 150; t += step) {
        const auto part = [&](const Array& x) {
          return x.view().slice(2, t, std::min<int64_t>(150, t + step));
        };
        taylor_state_attention(part(in.q), part(in.k), part(in.v), part(out), {s, z}, options);
      }
      EXPECT_LT(relative_error(out, whole.out), 1e-12) << order << " " << step;
      EXPECT_LT(relative_error(s, whole.s), 1e-13) << order << " " << step;
      EXPECT_LT(relative_error(z, whole.z), 1e-13) << order << " " << step;
    }
  }
}

// Sheet 12, 9(a): the first orders are a mean and linear attention, and high orders approach softmax.
TEST(Taylor, IdentitiesOfThePaper) {
  const Inputs in(DType::f64, 1, 1, 90, 5, 6);
  const TaylorResult mean = taylor_state_attention(in.q, in.k, in.v, of_order(0, 1));
  double sum = 0;
  for (int64_t t = 0; t < 90; ++t) {
    sum += in.v.as<double>()[t * 6];
    EXPECT_NEAR(mean.out.as<double>()[t * 6], sum / static_cast<double>(t + 1), 1e-12);
  }
  // The state of degree one is that of linear attention with the rows themselves as features.
  LinearOptions linear;
  linear.causal = true;
  linear.normalize = false;
  const LinearResult first = linear_attention(in.q, in.k, in.v, linear);
  const TaylorResult order2 = taylor_state_attention(in.q, in.k, in.v, of_order(2, 1));
  EXPECT_LT(relative_error(order2.s.view().slice(2, 1, 6), first.s), 1e-14);
  // The symmetric storage is the upper triangle of sum k_a k_b v.
  double pair = 0;
  for (int64_t t = 0; t < 90; ++t) {
    pair += in.k.as<double>()[t * 5 + 1] * in.k.as<double>()[t * 5 + 3] * in.v.as<double>()[t * 6];
  }
  EXPECT_NEAR(order2.s.as<double>()[(6 + 5 + 2) * 6], pair,
              1e-12);  // (1,3) behind (0,*), (1,1), (1,2)

  FlashOptions softmax;
  softmax.masks.causal = true;
  softmax.scale = 0.1;
  const AttentionResult exact = flash_attention(in.q, in.k, in.v, softmax);
  double before = 1;
  for (int64_t order : {0, 1, 2, 3}) {
    const double error = relative_error(
        taylor_state_attention(in.q, in.k, in.v, of_order(order, 0.1)).out, exact.out);
    EXPECT_LT(error, before) << order;
    before = 0.5 * error;
  }
  EXPECT_LT(before, 1e-2);
}

TEST(Taylor, GradientsAreThoseOfFiniteDifferences) {
  const Inputs in(DType::f64, 2, 1, 60, 4, 3);
  const Array weight = random_array(DType::f64, {1, 2, 60, 3}, 4);
  for (int64_t order : {0, 1, 2, 3}) {
    const TaylorOptions options = of_order(order, order % 2 == 0 ? 0.5 : 0.05);
    const TaylorGradients g =
        taylor_state_attention_backward(in.q, in.k, in.v, weight, TaylorState(), options);
    const auto loss = [&] {
      return inner(taylor_state_attention(in.q, in.k, in.v, options).out, weight);
    };
    for (const auto& [input, gradient] : {std::pair{&in.q, &g.q}, {&in.k, &g.k}, {&in.v, &g.v}}) {
      for (int64_t i : {int64_t{3}, input->count() / 2, input->count() - 2}) {
        double& x = input->as<double>()[i];
        const double kept = x, step = 1e-5;
        x = kept + step;
        const double above = loss();
        x = kept - step;
        const double below = loss();
        x = kept;
        EXPECT_NEAR(gradient->as<double>()[i], (above - below) / (2 * step), 1e-7)
            << order << " " << i;
      }
    }
  }
}

// A state of zeros is the start of a sequence too, but leaves all pairs no choice.
TEST(Taylor, AllPairsGiveTheNumbersOfTheState) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const double bound = type == DType::f64 ? 1e-13 : type == DType::f32 ? 1e-6 : 8e-3;
    for (int64_t queries : {int64_t{90}, int64_t{37}}) {
      const Inputs in(type, 4, 2, 90, 9, 11);
      const Tensor q = in.q.view().slice(2, 90 - queries, 90);
      const Array gradient = random_array(type, {1, 4, queries, 11}, 4);
      TaylorOptions pairs = of_order(2, 0.4), from_state = pairs;
      const DType wide = type == DType::f64 ? type : DType::f32;
      const Array s = Array::zeros(wide, {1, 4, 55, 11}), z = Array::zeros(wide, {1, 4, 55});
      from_state.initial_state = {s, z};
      ASSERT_TRUE(taylor_by_pairs(q, in.k, in.v, pairs));
      ASSERT_FALSE(taylor_by_pairs(q, in.k, in.v, from_state));
      for (Isa isa : available_isas()) {
        const RunOptions run{.threads = 2, .isa = isa};
        const TaylorResult one = taylor_state_attention(q, in.k, in.v, pairs, run);
        const TaylorResult other = taylor_state_attention(q, in.k, in.v, from_state, run);
        EXPECT_LT(relative_error(one.out, other.out), bound) << name_of(type) << name_of(isa);
        EXPECT_LT(relative_error(one.s, other.s), std::min(bound, 1e-6)) << name_of(isa);
        EXPECT_LT(relative_error(one.z, other.z), std::min(bound, 1e-6)) << name_of(isa);
        Array alone(type, gradient.shape());
        taylor_state_attention(q, in.k, in.v, alone, {}, pairs, run);
        EXPECT_TRUE(same_bits(alone, one.out)) << name_of(isa);
        const TaylorGradients g =
            taylor_state_attention_backward(q, in.k, in.v, gradient, {}, pairs, run);
        const TaylorGradients want =
            taylor_state_attention_backward(q, in.k, in.v, gradient, {}, from_state, run);
        EXPECT_LT(relative_error(g.q, want.q), bound) << name_of(type) << name_of(isa);
        EXPECT_LT(relative_error(g.k, want.k), bound) << name_of(type) << name_of(isa);
        EXPECT_LT(relative_error(g.v, want.v), bound) << name_of(type) << name_of(isa);
      }
    }
  }
}

TEST(Taylor, LongSequencesTakeTheState) {
  const auto pairs = [](int64_t tokens, int64_t dim, int64_t order) {
    const Array x = Array::zeros(DType::f32, {1, 1, tokens, dim});
    return taylor_by_pairs(x, x, x, of_order(order, 1));
  };
  EXPECT_TRUE(pairs(500, 16, 2) && pairs(4096, 64, 2));
  EXPECT_FALSE(pairs(700, 16, 2) || pairs(8192, 64, 2) || pairs(100, 16, 3));
}

TEST(Taylor, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs in(DType::f32, 4, 2, 9, 5, 6);
  const auto call = [&](const TaylorOptions& options) {
    return error_of([&] { taylor_state_attention(in.q, in.k, in.v, options); });
  };
  expect_says(call(of_order(4, 1)), {"taylor_state_attention", "order is 4", "0 to 3"});
  expect_says(call(of_order(-1, 1)), {"order is -1", "0 to 3"});
  expect_says(call(of_order(2, INFINITY)), {"scale is inf", "finite"});
  TaylorOptions options;
  const Array s = random_array(DType::f32, {1, 4, 21, 6}, 1),
              z = random_array(DType::f32, {1, 4, 21}, 1);
  options.initial_state = {s, {}};
  expect_says(call(options), {"initial_state has s alone", "both"});
  options.initial_state = {s, z};
  EXPECT_EQ(call(options), "");
  options.order = 3;
  expect_says(call(options), {"initial_state s", "[1,4,56,6] float32 is needed"});
  const Array wide = random_array(DType::f32, {1, 4, 9, 257}, 1);
  expect_says(error_of([&] { taylor_state_attention(wide, wide, in.v); }), {"257"});
}

TEST(Taylor, TensorsWithoutElements) {
  const Array none = random_array(DType::f32, {1, 2, 0, 4}, 1),
              some = random_array(DType::f32, {1, 2, 5, 4}, 2);
  EXPECT_EQ(taylor_state_attention(none, none, none).out.count(), 0);
  const TaylorResult no_keys = taylor_state_attention(some, none, none);
  for (int64_t i = 0; i < no_keys.out.count(); ++i) EXPECT_EQ(no_keys.out.as<float>()[i], 0);
  for (int64_t i = 0; i < no_keys.z.count(); ++i) EXPECT_EQ(no_keys.z.as<float>()[i], 0);
}

}  // namespace
}  // namespace heed
