// What a comparison with the cascade cannot show: bits across schedules, streaming, long sequences,
// identities of the papers, NaN that must and must not arrive, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "engine/operands.h"
#include "heed/heed.h"
#include "mechanisms/chunked_test.h"

namespace heed {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Inputs {
  Inputs(DType type, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t values)
      : q(random_array(type, {1, heads, tokens, dim}, 1)),
        k(random_array(type, {1, kv_heads, tokens, dim}, 2)),
        v(random_array(type, {1, kv_heads, tokens, values}, 3)),
        gradient(random_array(type, {1, heads, tokens, values}, 4)),
        state(random_array(wide_type(type), {1, heads, dim, values}, 5)),
        state_gradient(random_array(state.dtype(), {1, heads, dim, values}, 6)) {}
  Array q, k, v, gradient, state, state_gradient;
};

TEST(Lightning, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (Isa isa : available_isas()) {
      for (const auto& [heads, kv] : {std::pair<int64_t, int64_t>{1, 1}, {6, 3}}) {
        const Inputs in(type, heads, kv, 1100, 24, 40);
        const Array slopes = lightning_slopes(heads);
        const LightningOptions options{slopes, in.state};
        RunOptions run{.threads = 1, .isa = isa};
        const LightningResult one = lightning_attention(in.q, in.k, in.v, options, run);
        const auto backward = [&] {
          return lightning_attention_backward(in.q, in.k, in.v, in.gradient, in.state_gradient,
                                              options, run);
        };
        const LightningGradients first = backward();
        for (int threads : {2, 3, 7}) {
          run.threads = threads;
          const LightningResult more = lightning_attention(in.q, in.k, in.v, options, run);
          EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
          EXPECT_TRUE(same_bits(one.state, more.state)) << name_of(type) << " " << name_of(isa);
          const LightningGradients again = backward(), twice = backward();
          EXPECT_TRUE(same_bits(again.q, twice.q) && same_bits(again.k, twice.k) &&
                      same_bits(again.v, twice.v) && same_bits(again.slopes, twice.slopes) &&
                      same_bits(again.initial_state, twice.initial_state));
          EXPECT_LT(relative_error(again.k, first.k), 1e-6);
          EXPECT_LT(relative_error(again.slopes, first.slopes), 1e-6);
        }
      }
    }
  }
}

// States of this size fill a block of chunks three thousand tokens long: the last of three is ragged.
TEST(Lightning, SameBitsForAnyThreadCountOverBlocks) {
  for (DType type : {DType::f32, DType::bf16}) {
    for (const auto& [heads, kv] : {std::pair<int64_t, int64_t>{1, 1}, {3, 1}}) {
      const Inputs in(type, heads, kv, 7001, 64, 72);
      const Array slopes = heads == 1 ? numbers({0.001}) : numbers({0.001, 0, 0.2});
      const LightningOptions options{slopes, in.state};
      const auto forward = [&](int threads) {
        return lightning_attention(in.q, in.k, in.v, options, {.threads = threads});
      };
      const auto backward = [&](int threads) {
        return lightning_attention_backward(in.q, in.k, in.v, in.gradient, in.state_gradient,
                                            options, {.threads = threads});
      };
      const LightningResult one = forward(1);
      const LightningGradients first = backward(1);
      for (int threads : {2, 5}) {
        const LightningResult more = forward(threads);
        EXPECT_TRUE(same_bits(one.out, more.out) && same_bits(one.state, more.state))
            << name_of(type) << " " << threads;
        const LightningGradients again = backward(threads);
        EXPECT_TRUE(same_bits(first.q, again.q) && same_bits(first.k, again.k) &&
                    same_bits(first.v, again.v) && same_bits(first.slopes, again.slopes) &&
                    same_bits(first.initial_state, again.initial_state))
            << name_of(type) << " " << threads;
      }
    }
  }
}

TEST(Lightning, AnyCutGivesTheNumbersOfOneCall) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Inputs in(type, 4, 2, 300, 20, 33);
    const Array slopes = numbers({0.05, 0, 1e-6, 3});
    const double bound = type == DType::f64 ? 1e-14 : type == DType::f32 ? 1e-6 : 6e-3;
    const LightningResult whole = lightning_attention(in.q, in.k, in.v, {slopes, in.state});
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{0, 1, 300}, {0, 64, 65, 191, 300}, {0, 297, 298, 299, 300}}) {
      Array out(type, in.q.shape().rank() == 4 ? Dims{1, 4, 300, 33} : Dims{});
      Array state(in.state.dtype(), in.state.shape());
      copy(in.state, state);
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const auto part = [&](const Array& t) { return t.view().slice(2, cuts[i], cuts[i + 1]); };
        // In place: the state is both what the call starts from and where it ends.
        lightning_attention(part(in.q), part(in.k), part(in.v), part(out), state, {slopes, state});
      }
      EXPECT_LT(relative_error(out, whole.out), bound) << name_of(type);
      EXPECT_LT(relative_error(state, whole.state), bound) << name_of(type);
    }
  }
}

TEST(Lightning, OneTokenAtATimeIsTheRecurrence) {
  const Inputs in(DType::f32, 2, 1, 200, 24, 17);
  const Array slopes = numbers({0.02, 0});
  const LightningResult whole = lightning_attention(in.q, in.k, in.v, {slopes, in.state});
  Array out(DType::f32, {1, 2, 200, 17}), state(DType::f32, in.state.shape());
  copy(in.state, state);
  for (int64_t t = 0; t < 200; ++t) {
    const auto token = [&](const Array& x) { return x.view().slice(2, t, t + 1); };
    lightning_attention(token(in.q), token(in.k), token(in.v), token(out), state, {slopes, state});
  }
  EXPECT_LT(relative_error(out, whole.out), 1e-6);
  EXPECT_LT(relative_error(state, whole.state), 1e-6);
}

// Sheet 05, 9(a) 3 and 9(b): from a decay that leaves the token itself to one that forgets nothing.
TEST(Lightning, SlopesFromTinyToLargeAtFullLength) {
  constexpr int64_t kTokens = 131072;
  const Inputs in(DType::f32, 3, 1, kTokens, 4, 4);
  const Array slopes = numbers({8, 1e-6, 0.5});
  const Array q = convert(in.q, DType::f64), k = convert(in.k, DType::f64),
              v = convert(in.v, DType::f64), gradient = convert(in.gradient, DType::f64);
  const LightningResult exact = lightning_attention(q, k, v, {slopes, {}});
  const LightningResult found = lightning_attention(in.q, in.k, in.v, {slopes, {}});
  const LightningGradients exact_gradient =
      lightning_attention_backward(q, k, v, gradient, {}, LightningOptions{slopes, {}});
  const LightningGradients found_gradient =
      lightning_attention_backward(in.q, in.k, in.v, in.gradient, {}, LightningOptions{slopes, {}});
  for (int64_t h = 0; h < 3; ++h) {
    const auto head = [&](const Tensor& t) { return t.slice(1, h, h + 1); };
    EXPECT_LT(relative_error(head(found.out), head(exact.out)), 1e-5) << h;
    EXPECT_LT(relative_error(head(found.state), head(exact.state)), 1e-5) << h;
    EXPECT_LT(relative_error(head(found_gradient.q), head(exact_gradient.q)), 1e-5) << h;
    const double slope = exact_gradient.slopes.as<double>()[h];
    EXPECT_NEAR(found_gradient.slopes.as<float>()[h], slope, 1e-4 * std::abs(slope)) << h;
  }
  EXPECT_LT(relative_error(found_gradient.k, exact_gradient.k), 1e-5);
  EXPECT_LT(relative_error(found_gradient.v, exact_gradient.v), 1e-5);
}

// Sheet 05, 9(a) 4, 5, 7.
TEST(Lightning, IdentitiesOfThePaper) {
  const Inputs in(DType::f64, 3, 3, 130, 12, 9);
  const Array slopes = numbers({0.1, 0.01, 0});
  const LightningOptions options{slopes, {}};
  const LightningResult whole = lightning_attention(in.q, in.k, in.v, options);

  Array sum = Array::zeros(DType::f64, whole.out.shape());
  for (int64_t e = 0; e < 12; e += 4) {
    const LightningResult part = lightning_attention(in.q.view().slice(3, e, e + 4),
                                                     in.k.view().slice(3, e, e + 4), in.v, options);
    for (int64_t i = 0; i < sum.count(); ++i) sum.as<double>()[i] += part.out.as<double>()[i];
  }
  EXPECT_LT(relative_error(sum, whole.out), 1e-14);

  const LightningGradients gradients =
      lightning_attention_backward(in.q, in.k, in.v, in.gradient, {}, options);
  const double degree_one = inner(whole.out, in.gradient);
  EXPECT_NEAR(inner(in.q, gradients.q), degree_one, 1e-9);
  EXPECT_NEAR(inner(in.k, gradients.k), degree_one, 1e-9);
  EXPECT_NEAR(inner(in.v, gradients.v), degree_one, 1e-9);

  for (int64_t h = 0; h < 3; ++h) {
    double sum_over_time = 0;
    for (int64_t t = 0; t < 130; ++t) {
      const auto row = [&](const Array& x) {
        return x.view().slice(1, h, h + 1).slice(2, t, t + 1);
      };
      sum_over_time += static_cast<double>(t) *
                       (inner(row(in.q), row(gradients.q)) - inner(row(in.k), row(gradients.k)));
    }
    EXPECT_NEAR(gradients.slopes.as<double>()[h], -sum_over_time, 1e-9);
  }
}

// Sheet 05, 9(a) 8: what comes back through the state is the forward's recurrence on the reversed sequence
// with (q, dout) in the place of (k, v).
TEST(Lightning, TheBackwardIsTheForwardOfTheReversedSequence) {
  const Inputs in(DType::f64, 2, 2, 150, 12, 9);
  const double slope[] = {0.05, 0};
  const Array slopes = numbers({slope[0], slope[1]});
  const auto reversed = [](const Array& x) {
    Array back(x.dtype(), x.shape());
    for (int64_t t = 0; t < 150; ++t) {
      copy(x.view().slice(2, t, t + 1), back.view().slice(2, 149 - t, 150 - t));
    }
    return back;
  };
  const Array q = reversed(in.q), k = reversed(in.k), v = reversed(in.v), g = reversed(in.gradient);
  const LightningOptions options{slopes, in.state};
  const LightningGradients gradients =
      lightning_attention_backward(in.q, in.k, in.v, in.gradient, {}, options);
  LightningResult of_v = lightning_attention(k, q, g, {slopes, {}});
  EXPECT_LT(relative_error(reversed(of_v.out), gradients.v), 1e-14);
  const LightningResult of_k = lightning_attention(v, g, q, {slopes, {}});
  EXPECT_LT(relative_error(reversed(of_k.out), gradients.k), 1e-14);
  // The state before the first token is one decay further away.
  for (int64_t i = 0; i < of_v.state.count(); ++i) {
    of_v.state.as<double>()[i] *= std::exp(-slope[i / (12 * 9)]);
  }
  EXPECT_LT(relative_error(of_v.state, gradients.initial_state), 1e-14);
}

constexpr std::pair<DType, int64_t> kTypesAndWidths[] = {
    {DType::f32, 20}, {DType::f32, 32}, {DType::bf16, 20}, {DType::bf16, 32}};

// Sheet 05, 9(a) 6, with the sharpest of perturbations.
// Heads 32 wide are multiplied where they lie.
TEST(Lightning, WhatIsNotFiniteReachesLaterTokensOnly) {
  for (const auto& [type, width] : kTypesAndWidths) {
    for (Isa isa : available_isas()) {
      for (int64_t bad : {40, 77, 149}) {
        for (int which : {0, 1}) {
          Inputs in(type, 1, 1, 150, width, width);
          const Array one = convert(numbers({kNaN}), type);
          const Tensor row = (which == 0 ? in.k : in.v).view().select(0, 0).select(0, 0);
          for (int64_t e = 0; e < width; ++e) copy(one, row.select(0, bad).slice(0, e, e + 1));
          const Array slopes = numbers({0.1});
          const RunOptions run{.threads = 1, .isa = isa};
          const Array out =
              convert(lightning_attention(in.q, in.k, in.v, {slopes, {}}, run).out, DType::f64);
          for (int64_t t = 0; t < 150; ++t) {
            EXPECT_EQ(std::isnan(out.as<double>()[t * width]), t >= bad)
                << name_of(type) << " " << name_of(isa) << " token " << t << " of " << bad;
          }
          const LightningGradients g =
              lightning_attention_backward(in.q, in.k, in.v, in.gradient, {}, {slopes, {}}, run);
          const Array dq = convert(g.q, DType::f64);
          for (int64_t t = 0; t < 150; ++t) {
            EXPECT_EQ(std::isnan(dq.as<double>()[t * width]), t >= bad) << name_of(isa) << " " << t;
          }
        }
      }
    }
  }
}

TEST(Lightning, GradientsThatAreNotFiniteReachEarlierTokensOnly) {
  for (const auto& [type, width] : kTypesAndWidths) {
    for (Isa isa : available_isas()) {
      Inputs in(type, 1, 1, 150, width, width);
      const Array one = convert(numbers({kNaN}), type);
      const Tensor row = in.gradient.view().select(0, 0).select(0, 0).select(0, 77);
      for (int64_t e = 0; e < width; ++e) copy(one, row.slice(0, e, e + 1));
      const LightningGradients g = lightning_attention_backward(in.q, in.k, in.v, in.gradient, {},
                                                                {}, {.threads = 1, .isa = isa});
      const Array dk = convert(g.k, DType::f64), dv = convert(g.v, DType::f64),
                  dq = convert(g.q, DType::f64);
      for (int64_t t = 0; t < 150; ++t) {
        EXPECT_EQ(std::isnan(dk.as<double>()[t * width]), t <= 77) << name_of(isa) << " " << t;
        EXPECT_EQ(std::isnan(dv.as<double>()[t * width]), t <= 77) << name_of(isa) << " " << t;
        EXPECT_EQ(std::isnan(dq.as<double>()[t * width]), t == 77) << name_of(isa) << " " << t;
      }
    }
  }
}

TEST(Lightning, TensorsWithoutElements) {
  const auto run = [](const Dims& q, const Dims& k) {
    return lightning_attention(random_array(DType::f32, q, 1), random_array(DType::f32, k, 2),
                               random_array(DType::f32, k, 3));
  };
  EXPECT_EQ(run({0, 2, 5, 8}, {0, 2, 5, 8}).out.count(), 0);
  EXPECT_EQ(run({2, 0, 5, 8}, {2, 0, 5, 8}).out.count(), 0);
  EXPECT_EQ(run({1, 2, 0, 8}, {1, 2, 5, 8}).out.count(), 0);
  const LightningResult nothing = run({1, 2, 5, 8}, {1, 2, 0, 8});
  for (int64_t i = 0; i < nothing.out.count(); ++i) EXPECT_EQ(nothing.out.as<float>()[i], 0);
  for (int64_t i = 0; i < nothing.state.count(); ++i) EXPECT_EQ(nothing.state.as<float>()[i], 0);
  // No token leaves the state as it is.
  const Array state = random_array(DType::f32, {1, 2, 8, 8}, 4),
              none = random_array(DType::f32, {1, 2, 0, 8}, 1);
  EXPECT_TRUE(same_bits(lightning_attention(none, none, none, {{}, state}).state, state));
  const LightningGradients g =
      lightning_attention_backward(none, none, none, none, state, LightningOptions{{}, state});
  EXPECT_TRUE(same_bits(g.initial_state, state));
}

TEST(Lightning, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs in(DType::f32, 4, 2, 9, 8, 6);
  const auto call = [&](const Tensor& q, const Tensor& k, const Tensor& v,
                        const LightningOptions& options = {}) {
    return error_of([&] { lightning_attention(q, k, v, options); });
  };
  const Array narrow = random_array(DType::f32, {1, 2, 9, 7}, 2), half = convert(in.k, DType::bf16);
  const Array three = random_array(DType::f32, {1, 3, 9, 8}, 2),
              long_q = random_array(DType::f32, {1, 4, 10, 8}, 2);
  expect_says(call(Tensor(), in.k, in.v), {"lightning_attention", "q is missing"});
  std::vector<float> memory(400);
  const Tensor overlapping(memory.data(), DType::f32, {1, 4, 9, 6}, {216, 0, 6, 1});
  expect_says(error_of([&] { lightning_attention(in.q, in.k, in.v, overlapping, {}); }),
              {"out [1,4,9,6]", "strides [216,0,6,1]", "overlap", "memory of its own"});
  expect_says(call(in.q, narrow, in.v), {"k", "7", "q", "8", "head dim"});
  expect_says(call(in.q, three, three), {"q has 4 heads", "3", "multiple"});
  expect_says(call(in.q, half, in.v), {"bfloat16", "float32", "one type"});
  expect_says(call(in.q, in.k, in.v.view().slice(2, 0, 8)), {"v has number of keys 8", "9"});
  expect_says(call(in.q.view().select(0, 0), in.k, in.v), {"q [4,9,8]", "4 are needed"});
  expect_says(call(in.q, in.k, in.v, {numbers({1, 2, 3}), {}}), {"slopes [3]", "[H] = [4]"});
  expect_says(call(in.q, in.k, in.v, {numbers({1, -2, 3, 4}), {}}),
              {"slopes[1] is -2", "not negative"});
  expect_says(call(in.q, in.k, in.v, {numbers({1, 2, kNaN, 4}), {}}),
              {"slopes[2] is nan", "finite"});
  expect_says(call(in.q, in.k, in.v, {{}, in.q}), {"initial_state", "[1,4,8,6] float32 is needed"});
  expect_says(call(long_q, in.k, in.v, {{}, in.state}), {"10 queries", "9 keys"});
  const Tensor strided(in.k.view().data(), DType::f32, {1, 2, 9, 4}, {144, 72, 8, 2});
  expect_says(call(in.q.view().slice(3, 0, 4), strided, in.v), {"k has stride 2", "unit stride"});
  expect_says(error_of([&] {
                lightning_attention_backward(in.q, in.k, in.v, in.q, {}, LightningOptions());
              }),
              {"lightning_attention_backward", "out_gradient", "[1,4,9,6]"});
}

TEST(Slopes, OfPublishedModels) {
  const auto expect = [](const Array& found, std::initializer_list<double> wanted) {
    ASSERT_EQ(found.count(), static_cast<int64_t>(wanted.size()));
    int64_t i = 0;
    for (double w : wanted) EXPECT_NEAR(found.as<float>()[i++], w, 1e-7 + 1e-6 * w);
  };
  expect(lightning_slopes(8), {.5, .25, .125, .0625, .03125, .015625, .0078125, .00390625});
  expect(lightning_slopes(4), {.25, .0625, .015625, .00390625});
  expect(lightning_slopes(1), {.00390625});
  expect(lightning_slopes(12), {.5, .25, .125, .0625, .03125, .015625, .0078125, .00390625,
                                .70710678, .35355339, .17677670, .08838835});
  expect(lightning_slopes(4, 1, 3),
         {.25 * .50001, .0625 * .50001, .015625 * .50001, .00390625 * .50001});
  expect(lightning_slopes(4, 2, 3), {.25e-5, .0625e-5, .015625e-5, .00390625e-5});
  expect(lightning_slopes(4, 1, 4, LightningSlopes::paper), {1.5, 3, 4.5, 6});
  expect(lightning_slopes(4, 4, 4, LightningSlopes::paper), {0, 0, 0, 0});
  expect(lightning_slopes(4, 1, 4, LightningSlopes::fla), {0, 1.5, 3, 4.5});
  expect_says(error_of([] { lightning_slopes(0); }), {"num_heads is 0", "1 to"});
  expect_says(error_of([] { lightning_slopes(4, 0, 1); }), {"num_layers is 1", "at least 2"});
  expect_says(error_of([] { lightning_slopes(4, 3, 3); }), {"layer is 3", "0 to 2"});
  expect_says(error_of([] { lightning_slopes(4, 0, 3, LightningSlopes::paper); }),
              {"layer is 0", "1 to 3"});
  expect_says(error_of([] { lightning_slopes(4, 1); }), {"layer", "num_layers", "both"});
  expect_says(error_of([] { parse_lightning_slopes("alibi"); }), {"'alibi'", "'fla'"});
}

}  // namespace
}  // namespace heed
