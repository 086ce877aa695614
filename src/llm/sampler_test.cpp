#include "llm/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>

#include "heed/error.h"

namespace heed {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Logits of the probabilities 0.5, 0.25, 0.15, 0.1 at temperature 1, not in order.
const std::vector<float> kLogits = {std::log(0.15f), std::log(0.5f), std::log(0.1f),
                                    std::log(0.25f)};

std::vector<double> frequencies(SamplerOptions options, const std::vector<float>& logits) {
  constexpr int kDraws = 40000;
  Sampler sampler(options);
  std::vector<double> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(sampler.sample(logits))];
  for (double& count : counts) count /= kDraws;
  return counts;
}

void expect_frequencies(const SamplerOptions& options, const std::vector<double>& expected) {
  std::vector<double> found = frequencies(options, kLogits);
  for (size_t i = 0; i < expected.size(); ++i) {
    // 6 standard deviations of 40,000 draws; impossible is exact.
    EXPECT_NEAR(found[i], expected[i], expected[i] == 0.0 ? 0.0 : 0.015) << i;
  }
}

TEST(Sampler, Greedy) {
  Sampler sampler({});
  EXPECT_EQ(sampler.sample(kLogits), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0f, 3.0f, 3.0f}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-kInfinity, -5.0f}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{2.0f}), 0);
}

TEST(Sampler, TemperatureShapesTheDistribution) {
  expect_frequencies({.temperature = 1.0}, {0.15, 0.5, 0.1, 0.25});
  // Probabilities squared and normalised: 0.0225, 0.25, 0.01, 0.0625 over 0.345.
  expect_frequencies({.temperature = 0.5}, {0.0652, 0.7246, 0.0290, 0.1812});
  expect_frequencies({.temperature = 1e-300}, {0, 1, 0, 0});
  expect_frequencies({.temperature = 1e300}, {0.25, 0.25, 0.25, 0.25});
}

TEST(Sampler, TopK) {
  expect_frequencies({.temperature = 1.0, .top_k = 2}, {0, 2.0 / 3, 0, 1.0 / 3});
  expect_frequencies({.temperature = 1.0, .top_k = 1}, {0, 1, 0, 0});
  expect_frequencies({.temperature = 1.0, .top_k = 100}, {0.15, 0.5, 0.1, 0.25});
}

TEST(Sampler, TopP) {
  expect_frequencies({.temperature = 1.0, .top_p = 0.45}, {0, 1, 0, 0});
  expect_frequencies({.temperature = 1.0, .top_p = 0.7}, {0, 2.0 / 3, 0, 1.0 / 3});
  expect_frequencies({.temperature = 1.0, .top_p = 0.76}, {0.1667, 0.5556, 0, 0.2778});
  expect_frequencies({.temperature = 1.0, .top_p = 1e-9}, {0, 1, 0, 0});
}

TEST(Sampler, MinP) {
  expect_frequencies({.temperature = 1.0, .min_p = 0.4}, {0, 2.0 / 3, 0, 1.0 / 3});
  expect_frequencies({.temperature = 1.0, .min_p = 1.0}, {0, 1, 0, 0});
}

TEST(Sampler, OrderOfFilters) {
  // top_k first: of 0.5 and 0.25 renormalised, the first has 2/3, enough for top_p 0.6.
  expect_frequencies({.temperature = 1.0, .top_k = 2, .top_p = 0.6}, {0, 1, 0, 0});
  // Temperature last: at temperature 4 alone top_p 0.7 would keep three tokens, not two.
  expect_frequencies({.temperature = 4.0, .top_p = 0.7}, {0, 0.5432, 0, 0.4568});
}

TEST(Sampler, EqualLogitsKeepTheLowerId) {
  std::vector<float> equal(50, 1.0f);
  Sampler sampler({.temperature = 1.0, .top_k = 3});
  std::set<int32_t> seen;
  for (int i = 0; i < 200; ++i) seen.insert(sampler.sample(equal));
  EXPECT_EQ(seen, (std::set<int32_t>{0, 1, 2}));
}

TEST(Sampler, ImpossibleTokensNeverCome) {
  std::vector<float> logits = {-kInfinity, 0.0f, -kInfinity, 0.0f};
  std::vector<double> found = frequencies({.temperature = 2.0}, logits);
  EXPECT_EQ(found[0] + found[2], 0.0);
  EXPECT_NEAR(found[1], 0.5, 0.015);
}

TEST(Sampler, SeedDecides) {
  auto sequence = [](uint64_t seed) {
    Sampler sampler({.temperature = 1.0, .seed = seed});
    std::vector<int32_t> ids(64);
    for (int32_t& id : ids) id = sampler.sample(kLogits);
    return ids;
  };
  EXPECT_EQ(sequence(7), sequence(7));
  EXPECT_NE(sequence(7), sequence(8));
  // mt19937_64 with its standard seed 5489 begins with 14514284786278117030 = 0.7868 * 2^64; ids come
  // in order with bounds 0.15, 0.65, 0.75, 1.
  EXPECT_EQ(sequence(5489)[0], 3);
}

// One token as the options say it, with everything in order and nothing left out.
int32_t plainly(const SamplerOptions& options, const std::vector<float>& logits, double fraction) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto logit = [&](int32_t id) {
    return static_cast<double>(logits[static_cast<size_t>(id)]);
  };
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
  const double best = logit(ids[0]);
  const auto total = [&](double temperature) {
    double sum = 0.0;
    for (const int32_t id : ids) sum += std::exp((logit(id) - best) / temperature);
    return sum;
  };
  if (options.top_k) ids.resize(std::min(ids.size(), static_cast<size_t>(*options.top_k)));
  if (options.top_p < 1.0) {
    const double needed = options.top_p * total(1.0);
    size_t kept = 0;
    for (double sum = 0.0; kept < ids.size() && sum < needed;)
      sum += std::exp(logit(ids[kept++]) - best);
    ids.resize(kept);
  }
  std::erase_if(ids, [&](int32_t id) { return std::exp(logit(id) - best) < options.min_p; });
  std::sort(ids.begin(), ids.end());
  double rest = fraction * total(options.temperature);
  for (const int32_t id : ids) {
    rest -= std::exp((logit(id) - best) / options.temperature);
    if (rest < 0.0) return id;
  }
  return ids.back();
}

TEST(Sampler, DrawsWhatOrderingEverythingGives) {
  const std::vector<SamplerOptions> all = {{.temperature = 0.7},
                                           {.temperature = 1.3},
                                           {.temperature = 0.7, .top_p = 0.95},
                                           {.temperature = 40.0, .top_p = 0.999999},
                                           {.temperature = 40.0, .top_p = 1 - 1e-12},
                                           {.temperature = 30.0, .min_p = 1e-9},
                                           {.temperature = 9.0, .top_k = 200},
                                           {.temperature = 9.0, .top_k = 699},
                                           {.temperature = 9.0, .top_k = 5000},
                                           {.temperature = 9.0, .top_k = 200, .top_p = 0.9},
                                           {.temperature = 9.0, .top_p = 0.99, .min_p = 0.01}};
  std::mt19937_64 random(3);
  for (const double spread : {0.01, 1.0, 5.0, 30.0, 200.0}) {
    std::normal_distribution<double> normal(0.0, spread);
    std::vector<float> logits(700);
    for (float& logit : logits) logit = static_cast<float>(normal(random));
    for (size_t i = 0; i < logits.size(); i += 90) logits[i] = -kInfinity;
    logits[500] = logits[20];
    for (SamplerOptions options : all) {
      options.seed = random();
      Sampler sampler(options);
      std::mt19937_64 draws(options.seed);
      for (int i = 0; i < 100; ++i) {
        const double fraction = static_cast<double>(draws() >> 11) * 0x1p-53;
        ASSERT_EQ(sampler.sample(logits), plainly(options, logits, fraction))
            << spread << " " << options.temperature << " " << options.top_p;
      }
    }
  }
}

TEST(Sampler, BadOptions) {
  EXPECT_THROW(Sampler({.temperature = -0.1}), Error);
  EXPECT_THROW(Sampler({.temperature = kNan}), Error);
  EXPECT_THROW(Sampler({.temperature = std::numeric_limits<double>::infinity()}), Error);
  EXPECT_THROW(Sampler({.top_k = 0}), Error);
  EXPECT_THROW(Sampler({.top_p = 0.0}), Error);
  EXPECT_THROW(Sampler({.top_p = 1.1}), Error);
  EXPECT_THROW(Sampler({.top_p = kNan}), Error);
  EXPECT_THROW(Sampler({.min_p = -0.1}), Error);
  EXPECT_THROW(Sampler({.min_p = 1.1}), Error);
  EXPECT_THROW(Sampler({.min_p = kNan}), Error);
}

TEST(Sampler, BadLogits) {
  for (double temperature : {0.0, 1.0}) {
    Sampler sampler({.temperature = temperature});
    EXPECT_THROW(sampler.sample({}), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{1.0f, std::nanf("")}), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{1.0f, kInfinity}), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{-kInfinity, -kInfinity}), Error);
  }
}

}  // namespace
}  // namespace heed
