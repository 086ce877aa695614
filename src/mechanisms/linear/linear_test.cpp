// What a comparison with the cascade cannot show: bits across schedules, streaming, identities of the
// paper, what lies behind lengths, messages.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "heed/heed.h"
#include "mechanisms/chunked_test.h"

namespace heed {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Features that are not negative.
Array features(DType type, const Dims& shape, uint32_t seed) {
  Array wide = random_array(DType::f64, shape, seed);
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = std::abs(wide.as<double>()[i]);
  return convert(wide, type);
}

struct Inputs {
  Inputs(DType type, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t values)
      : q(features(type, {1, heads, tokens, dim}, 1)),
        k(features(type, {1, kv_heads, tokens, dim}, 2)),
        v(random_array(type, {1, kv_heads, tokens, values}, 3)),
        gradient(random_array(type, {1, heads, tokens, values}, 4)) {}
  Array q, k, v, gradient;
};

LinearOptions causal() {
  LinearOptions options;
  options.causal = true;
  return options;
}

// num and den give gradients of queries that nearly cancel there. Rounding alone is 2e-3.
TEST(Linear, BfloatGradientsOfValuesFarFromZero) {
  for (Isa isa : available_isas()) {
    for (const auto& [is_causal, given] : {std::pair{false, false}, {true, false}, {true, true}}) {
      const auto values = [](DType type, const Dims& shape, uint32_t seed, double mean,
                             double size = 1) {
        Array x = random_array(DType::f64, shape, seed, size);
        for (int64_t i = 0; i < x.count(); ++i) x.as<double>()[i] += mean;
        return convert(convert(x, DType::bf16), type);
      };
      const auto gradients = [&](DType type) {
        const DType wide = type == DType::f64 ? DType::f64 : DType::f32;
        const Array q = convert(features(DType::bf16, {2, 4, 300, 24}, 1), type);
        const Array k = convert(features(DType::bf16, {2, 2, 333, 24}, 2), type);
        const Array v = values(type, {2, 2, 333, 20}, 3, 5),
                    g = values(type, {2, 4, 300, 20}, 4, 0);
        const Array s = values(wide, {2, 4, 24, 20}, 5, 70 * 5, 9),
                    z = filled(wide, {2, 4, 24}, 70);
        const Array ds = random_array(wide, {2, 4, 24, 20}, 6),
                    dz = random_array(wide, {2, 4, 24}, 7);
        LinearOptions options;
        options.causal = is_causal;
        if (given) options.initial_state = {s, z};
        LinearGradients d =
            linear_attention_backward(q, k, v, g, given ? LinearState{ds, dz} : LinearState{},
                                      options, {.threads = {}, .isa = isa});
        std::vector<Array> all;
        for (Array* x : {&d.q, &d.k, &d.v}) all.push_back(std::move(*x));
        if (given) all.push_back(std::move(d.s));
        if (given) all.push_back(std::move(d.z));
        return all;
      };
      const std::vector<Array> want = gradients(DType::f64), found = gradients(DType::bf16);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_LT(relative_error(found[i], want[i]), 0.006)
            << name_of(isa) << " gradient " << i << " " << is_causal << " " << given;
      }
    }
  }
}

// Where the level of values changes along the tokens, early queries know nothing of the late one.
TEST(Linear, BfloatGradientsOfValuesThatMoveAway) {
  constexpr int64_t kTokens = 700, kEarly = 300;
  const Array q = features(DType::bf16, {1, 4, kTokens, 24}, 1),
              k = features(DType::bf16, {1, 2, kTokens, 24}, 2),
              g = random_array(DType::bf16, {1, 4, kTokens, 20}, 4);
  const std::pair<const char*, double (*)(int64_t)> levels[] = {
      {"level", [](int64_t) { return 0.0; }},
      {"step", [](int64_t t) { return t < kEarly ? 0.0 : 100.0; }},
      {"early step", [](int64_t t) { return t < 40 ? 0.0 : 30.0; }},
      {"trend", [](int64_t t) { return 0.1 * static_cast<double>(t); }},
      {"outlier", [](int64_t t) { return t == kEarly ? 1000.0 : 0.0; }}};
  const auto early = [](const Array& x) { return x.view().slice(2, 0, kEarly); };
  for (Isa isa : available_isas()) {
    Array of_level;
    for (const auto& [name, level] : levels) {
      Array wide = random_array(DType::f64, {1, 2, kTokens, 20}, 3);
      for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] += level(i / 20 % kTokens);
      const Array v = convert(wide, DType::bf16);
      const auto gradients = [&](DType type) {
        return linear_attention_backward(convert(q, type), convert(k, type), convert(v, type),
                                         convert(g, type), {}, causal(),
                                         {.threads = {}, .isa = isa});
      };
      const LinearGradients found = gradients(DType::bf16), want = gradients(DType::f64);
      SCOPED_TRACE(std::string(name) + " " + name_of(isa));
      EXPECT_LT(relative_error(found.q, want.q), 0.006);
      EXPECT_LT(relative_error(found.k, want.k), 0.006);
      EXPECT_LT(relative_error(found.v, want.v), 0.006);
      EXPECT_LT(relative_error(early(found.q), early(want.q)), 0.006);
      EXPECT_LT(relative_error(early(found.k), early(want.k)), 0.006);
      const Array before = convert(early(found.q), DType::bf16);
      if (!of_level.view().defined()) of_level = convert(before, DType::bf16);
      const bool changes_late = level(kEarly - 1) == 0;
      EXPECT_TRUE(!changes_late || same_bits(before, of_level));
    }
  }
}

TEST(Linear, BfloatGradientsOfAnInitialStateThatIsZero) {
  constexpr int64_t kTokens = 150;
  const Array q = features(DType::bf16, {1, 2, kTokens, 24}, 1),
              k = features(DType::bf16, {1, 2, kTokens, 24}, 2),
              g = random_array(DType::bf16, {1, 2, kTokens, 20}, 4);
  Array wide = random_array(DType::f64, {1, 2, kTokens, 20}, 3);
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] += 5;
  const Array v = convert(wide, DType::bf16);
  for (Isa isa : available_isas()) {
    for (bool is_causal : {false, true}) {
      LinearOptions options;
      options.causal = is_causal;
      const auto gradients = [&](DType type) {
        const DType state = type == DType::f64 ? DType::f64 : DType::f32;
        LinearGradients to{Array(type, q.shape()), Array(type, k.shape()), Array(type, v.shape()),
                           Array(state, {1, 2, 24, 20}), Array(state, {1, 2, 24})};
        linear_attention_backward(convert(q, type), convert(k, type), convert(v, type),
                                  convert(g, type), {}, {to.q, to.k, to.v, to.s, to.z}, options,
                                  {.threads = {}, .isa = isa});
        return to;
      };
      const LinearGradients found = gradients(DType::bf16), want = gradients(DType::f64);
      SCOPED_TRACE(name_of(isa));
      EXPECT_LT(relative_error(found.q, want.q), 0.01);
      EXPECT_LT(relative_error(found.s, want.s), 0.006);
      EXPECT_LT(relative_error(found.z, want.z), 0.006);
    }
  }
}

TEST(Linear, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      for (int64_t heads : {1, 3}) {
        for (bool is_causal : {false, true}) {
          const Inputs in(type, heads, 1, 1500, 24, 40);
          LinearOptions options;
          options.causal = is_causal;
          RunOptions run{.threads = 1, .isa = isa};
          const LinearResult one = linear_attention(in.q, in.k, in.v, options, run);
          for (int threads : {2, 7}) {
            run.threads = threads;
            const LinearResult more = linear_attention(in.q, in.k, in.v, options, run);
            EXPECT_TRUE(same_bits(one.out, more.out)) << name_of(type) << " " << name_of(isa);
            EXPECT_TRUE(same_bits(one.s, more.s) && same_bits(one.z, more.z)) << name_of(isa);
          }
        }
      }
    }
  }
}

TEST(Linear, BackwardWithTheStateOfTheForwardHasTheSameBits) {
  int64_t lengths[] = {1317};
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      for (bool normalize : {false, true}) {
        for (int threads : {1, 3}) {
          const Inputs in(type, 4, 2, 1500, 24, 40);
          const RunOptions run{.threads = threads, .isa = isa};
          LinearOptions options;
          options.normalize = normalize;
          options.lengths = Tensor(lengths, DType::i64, {1});
          const LinearResult result = linear_attention(in.q, in.k, in.v, options, run);
          const auto backward = [&] {
            return linear_attention_backward(in.q, in.k, in.v, in.gradient, {}, options, run);
          };
          const LinearGradients alone = backward();
          options.forward_state = {result.s, result.z};
          const LinearGradients given = backward();
          EXPECT_TRUE(same_bits(alone.q, given.q) && same_bits(alone.k, given.k) &&
                      same_bits(alone.v, given.v))
              << name_of(type) << " " << name_of(isa) << " " << normalize << " " << threads;
        }
      }
    }
  }
}

TEST(Linear, BackwardReadsTheStateOfTheForward) {
  const Inputs in(DType::f64, 2, 2, 40, 6, 5);
  LinearOptions options;
  LinearResult result = linear_attention(in.q, in.k, in.v, options);
  options.forward_state = {result.s, result.z};
  const Array before = linear_attention_backward(in.q, in.k, in.v, in.gradient, {}, options).q;
  for (int64_t i = 0; i < result.s.count(); ++i) result.s.as<double>()[i] *= 2;
  const Array behind = linear_attention_backward(in.q, in.k, in.v, in.gradient, {}, options).q;
  EXPECT_GT(relative_error(behind, before), 0.5);
  options.forward_state = {Array(DType::f64, {1, 2, 6, 4}), result.z};
  EXPECT_THROW(linear_attention(in.q, in.k, in.v, options), Error);
}

TEST(Linear, AnyCutGivesTheNumbersOfOneCall) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Inputs in(type, 4, 2, 200, 20, 33);
    const double bound = type == DType::f64 ? 1e-14 : type == DType::f32 ? 1e-6 : 6e-3;
    const LinearResult whole = linear_attention(in.q, in.k, in.v, causal());
    for (int64_t step : {1, 7, 70}) {
      Array out(type, {1, 4, 200, 33});
      Array s = Array::zeros(whole.s.dtype(), whole.s.shape());
      Array z = Array::zeros(whole.z.dtype(), whole.z.shape());
      LinearOptions options = causal();
      options.initial_state = {s, z};
      for (int64_t t = 0; t < 200; t += step) {
        const auto part = [&](const Array& x) {
          return x.view().slice(2, t, std::min<int64_t>(200, t + step));
        };
        linear_attention(part(in.q), part(in.k), part(in.v), part(out), {s, z}, options);
      }
      EXPECT_LT(relative_error(out, whole.out), bound) << name_of(type) << " " << step;
      EXPECT_LT(relative_error(s, whole.s), bound) << name_of(type) << " " << step;
      EXPECT_LT(relative_error(z, whole.z), bound) << name_of(type) << " " << step;
    }
  }
}

// Sheet 08, 9(a) 2 and 3.
TEST(Linear, IdentitiesOfThePaper) {
  for (bool is_causal : {false, true}) {
    Inputs in(DType::f64, 2, 2, 150, 12, 9);
    LinearOptions options;
    options.causal = is_causal;
    const LinearResult whole = linear_attention(in.q, in.k, in.v, options);
    const auto scaled = [](const Array& x, auto factor) {
      Array y = convert(x, DType::f64);
      const int64_t width = x.shape()[3];
      for (int64_t i = 0; i < y.count(); ++i) y.as<double>()[i] *= factor(i / width);
      return y;
    };
    // A factor per query, or one for all keys, changes nothing.
    const Array q = scaled(in.q, [](int64_t row) { return 0.5 + static_cast<double>(row % 7); });
    const Array k = scaled(in.k, [](int64_t) { return 3.0; });
    EXPECT_LT(relative_error(linear_attention(q, k, in.v, options).out, whole.out), 1e-12);
    // The weights of a row sum to 1.
    std::fill_n(in.v.as<double>(), in.v.count(), 2.5);
    const LinearResult constant = linear_attention(in.q, in.k, in.v, options);
    for (int64_t i = 0; i < constant.out.count(); ++i) {
      EXPECT_NEAR(constant.out.as<double>()[i], 2.5, 1e-11);
    }
  }
}

TEST(Linear, CausalAtTheLastTokenIsTheWholeSum) {
  const Inputs in(DType::f64, 2, 1, 130, 12, 9);
  const LinearResult all = linear_attention(in.q, in.k, in.v);
  const LinearResult running = linear_attention(in.q, in.k, in.v, causal());
  const auto last = [](const Array& x) { return x.view().slice(2, 129, 130); };
  EXPECT_LT(relative_error(last(running.out), last(all.out)), 1e-13);
  EXPECT_LT(relative_error(running.s, all.s), 1e-13);
  EXPECT_LT(relative_error(running.z, all.z), 1e-13);
}

// The features of a second-order Taylor map at head dim 64.
TEST(Linear, ThousandsOfFeatures) {
  const Inputs in(DType::f32, 1, 1, 130, 4161, 16);
  const Array q = convert(in.q, DType::f64), k = convert(in.k, DType::f64),
              v = convert(in.v, DType::f64), gradient = convert(in.gradient, DType::f64);
  const LinearResult found = linear_attention(in.q, in.k, in.v, causal());
  const LinearResult exact = linear_attention(q, k, v, causal());
  EXPECT_LT(relative_error(found.out, exact.out), 1e-5);
  const LinearGradients g = linear_attention_backward(in.q, in.k, in.v, in.gradient, {}, causal());
  const LinearGradients want = linear_attention_backward(q, k, v, gradient, {}, causal());
  EXPECT_LT(relative_error(g.q, want.q), 1e-4);
  EXPECT_LT(relative_error(g.k, want.k), 1e-4);
  EXPECT_LT(relative_error(g.v, want.v), 1e-5);
}

TEST(Linear, NothingBehindLengthsMatters) {
  for (bool is_causal : {false, true}) {
    Inputs in(DType::f32, 2, 2, 100, 12, 9);
    int64_t lengths[] = {61};
    LinearOptions options;
    options.causal = is_causal;
    options.lengths = Tensor(lengths, DType::i64, {1});
    const LinearResult clean = linear_attention(in.q, in.k, in.v, options);
    const auto backward = [&] {
      return linear_attention_backward(in.q, in.k, in.v, in.gradient, {}, options);
    };
    const LinearGradients clean_gradients = backward();
    for (const Array* x : {&in.k, &in.v}) {
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t width = x->shape()[3];
        std::fill_n(x->as<float>() + (h * 100 + 61) * width, 39 * width, static_cast<float>(kNaN));
      }
    }
    const LinearResult stale = linear_attention(in.q, in.k, in.v, options);
    EXPECT_TRUE(same_bits(clean.out, stale.out) && same_bits(clean.s, stale.s));
    const LinearGradients g = backward();
    EXPECT_TRUE(same_bits(g.q, clean_gradients.q) && same_bits(g.k, clean_gradients.k) &&
                same_bits(g.v, clean_gradients.v));
    for (int64_t i = 61 * 12; i < 100 * 12; ++i) EXPECT_EQ(g.k.as<float>()[i], 0);
  }
}

TEST(Linear, DenominatorsOfExactlyZeroGiveZeroRows) {
  const Array q = numbers({1, 1}), k = numbers({1, -1}), v = numbers({5});
  const auto as = [](const Array& x) {
    return Tensor(x.view().data(), DType::f64, {1, 1, 1, x.count()});
  };
  LinearOptions options;
  options.eps = 0;
  EXPECT_EQ(linear_attention(as(q), as(k), as(v), options).out.as<double>()[0], 0);
  options.causal = true;
  EXPECT_EQ(linear_attention(as(q), as(k), as(v), options).out.as<double>()[0], 0);
  const LinearGradients g = linear_attention_backward(as(q), as(k), as(v), as(v), {}, options);
  for (const Array* x : {&g.q, &g.k, &g.v}) EXPECT_TRUE(std::isfinite(x->as<double>()[0]));
}

// 1e-40 is a float32 but 1e40, its inverse, is none.
TEST(Linear, DenominatorsWithoutAnInverseGiveZeroRows) {
  for (int64_t tokens : {1, 3, 70}) {
    const Array q = features(DType::f32, {1, 2, tokens, 4}, 1);
    const Array v = random_array(DType::f32, {1, 2, tokens, 4}, 2);
    const Array k(DType::f32, {1, 2, tokens, 4});
    for (int64_t i = 0; i < k.count(); ++i) k.as<float>()[i] = 1e-42F * (1 + i % 3);
    for (Isa isa : available_isas()) {
      RunOptions run;
      run.isa = isa;
      for (bool causal : {false, true}) {
        LinearOptions options;
        options.causal = causal;
        options.eps = 0;
        const LinearResult r = linear_attention(q, k, v, options, run);
        const LinearGradients g = linear_attention_backward(q, k, v, v, {}, options, run);
        for (const Array* x : std::initializer_list<const Array*>{&r.out, &g.q, &g.k, &g.v}) {
          for (int64_t i = 0; i < x->count(); ++i) ASSERT_EQ(x->as<float>()[i], 0);
        }
      }
    }
  }
}

TEST(Linear, TensorsWithoutElements) {
  const auto run = [](const Dims& q, const Dims& k, bool is_causal) {
    LinearOptions options;
    options.causal = is_causal;
    return linear_attention(random_array(DType::f32, q, 1), random_array(DType::f32, k, 2),
                            random_array(DType::f32, k, 3), options);
  };
  for (bool is_causal : {false, true}) {
    EXPECT_EQ(run({0, 2, 5, 8}, {0, 2, 5, 8}, is_causal).out.count(), 0);
    EXPECT_EQ(run({2, 0, 5, 8}, {2, 0, 5, 8}, is_causal).out.count(), 0);
    const LinearResult no_queries = run({1, 2, 0, 8}, {1, 2, 5, 8}, is_causal);
    EXPECT_EQ(no_queries.out.count(), 0);
    EXPECT_NE(inner(no_queries.s, no_queries.s), 0);
    const LinearResult no_keys = run({1, 2, 5, 8}, {1, 2, 0, 8}, is_causal);
    for (int64_t i = 0; i < no_keys.out.count(); ++i) EXPECT_EQ(no_keys.out.as<float>()[i], 0);
    for (int64_t i = 0; i < no_keys.z.count(); ++i) EXPECT_EQ(no_keys.z.as<float>()[i], 0);
  }
}

TEST(Linear, ErrorsNameTheArgumentWhatItWasAndWhatIsNeeded) {
  const Inputs in(DType::f32, 4, 2, 9, 8, 6);
  const auto call = [&](const LinearOptions& options) {
    return error_of([&] { linear_attention(in.q, in.k, in.v, options); });
  };
  const Array s = random_array(DType::f32, {1, 4, 8, 6}, 1),
              z = random_array(DType::f32, {1, 4, 8}, 2);
  LinearOptions options;
  options.eps = -1;
  expect_says(call(options), {"linear_attention", "eps is -1", "not negative"});
  options.eps = kNaN;
  expect_says(call(options), {"eps is nan", "finite"});
  options = {};
  options.initial_state = {s, {}};
  expect_says(call(options), {"initial_state has s alone", "both s and z"});
  options.initial_state = {z, z};
  expect_says(call(options), {"initial_state s", "[1,4,8,6] float32 is needed"});
  options.initial_state = {s, s};
  expect_says(call(options), {"initial_state z", "[1,4,8] float32 is needed"});
  options.initial_state = {s, z};
  options.normalize = false;
  expect_says(call(options), {"initial_state z", "without normalize"});
  options = {};
  int64_t lengths[] = {10};
  options.lengths = Tensor(lengths, DType::i64, {1});
  expect_says(call(options), {"lengths[0] is 10", "0 to 9"});
  options.lengths = z;
  expect_says(call(options), {"lengths", "[B] = [1] of int32 or int64"});
  expect_says(
      error_of([&] { linear_attention(in.q, in.k.view().slice(3, 0, 7), in.v, LinearOptions()); }),
      {"k", "7", "q", "8"});
  options = causal();
  options.initial_state = {s, z};
  expect_says(error_of([&] {
                linear_attention(in.q, in.k.view().slice(2, 0, 5), in.v.view().slice(2, 0, 5),
                                 options);
              }),
              {"initial state", "9 queries", "5 keys"});
}

}  // namespace
}  // namespace heed
