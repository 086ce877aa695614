// The cascades of arXiv 2406.10491: equal results, their passes, and the identities of the softmax.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cascade/cascade.h"
#include "hardware/machine.h"

namespace heed::hardware {
namespace {

using cascade::Bindings;
using cascade::NdArray;
using cascade::Program;
using cascade::Values;

constexpr int64_t kQueries = 7, kKeys = 24, kDim = 5;

Program builtin(const std::string& name) {
  return cascade::parse(data_file("cascades/" + name + ".cascade"), name);
}

NdArray normal(std::vector<int64_t> shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  NdArray array{shape, {}};
  array.values.resize(static_cast<size_t>(
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())));
  for (double& x : array.values) x = 2 * distribution(random);
  return array;
}

Bindings inputs(int64_t tile) {
  Bindings b;
  b.tensors = {{"Q", normal({1, 2, kQueries, kDim}, 1)},
               {"K", normal({1, 2, kKeys, kDim}, 2)},
               {"V", normal({1, 2, kKeys, kDim}, 3)}};
  b.sizes["M0"] = tile;
  return b;
}

Values run(const std::string& name, const Bindings& bindings, std::vector<std::string> also = {}) {
  return cascade::evaluate(builtin(name), bindings, also);
}

void expect_near(const NdArray& found, const NdArray& want, double bound) {
  ASSERT_EQ(found.shape, want.shape);
  for (size_t i = 0; i < want.values.size(); ++i) {
    ASSERT_NEAR(found.values[i], want.values[i], bound) << i;
  }
}

TEST(PaperCascades, ThreeTwoAndOnePassAreEqual) {
  const NdArray want = run("three_pass", inputs(8)).at("AV");
  for (int64_t tile : {1, 5, 8, 24, 100}) {
    SCOPED_TRACE(tile);
    expect_near(run("two_pass", inputs(tile)).at("AV"), want, 1e-12);
    expect_near(run("one_pass", inputs(tile)).at("AV"), want, 1e-12);
  }
}

TEST(PaperCascades, Passes) {
  const auto passes = [](const std::string& name) {
    return cascade::count_passes(builtin(name), "m").passes;
  };
  EXPECT_EQ(passes("three_pass"), 3);
  EXPECT_EQ(passes("two_pass"), 2);
  EXPECT_EQ(passes("one_pass"), 1);
}

TEST(PaperCascades, AConstantAddedToTheScoresOfAQueryChangesNothing) {
  // A further element of the head dim: 1 in every key, the constant in the query.
  Bindings plain = inputs(8), shifted = inputs(8);
  for (auto& [name, constant] : {std::pair<const char*, double>{"Q", 37.0}, {"K", 1.0}}) {
    NdArray& array = shifted.tensors.at(name);
    NdArray wide = normal({1, 2, array.shape[2], kDim + 1}, 9);
    for (size_t row = 0; row < array.values.size() / kDim; ++row) {
      std::copy_n(array.values.begin() + static_cast<int64_t>(row * kDim), kDim,
                  wide.values.begin() + static_cast<int64_t>(row * (kDim + 1)));
      wide.values[row * (kDim + 1) + kDim] = constant;
    }
    array = wide;
  }
  expect_near(run("one_pass", shifted).at("AV"), run("one_pass", plain).at("AV"), 1e-12);
}

TEST(PaperCascades, PermutedKeysWithTheirValuesChangeNothing) {
  Bindings plain = inputs(8), permuted = inputs(8);
  std::vector<int64_t> order(kKeys);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(4));
  for (const char* name : {"K", "V"}) {
    const NdArray& from = plain.tensors.at(name);
    NdArray& to = permuted.tensors.at(name);
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t m = 0; m < kKeys; ++m) {
        const int64_t source = (h * kKeys + order[static_cast<size_t>(m)]) * kDim;
        std::copy_n(from.values.begin() + source, kDim, to.values.begin() + (h * kKeys + m) * kDim);
      }
    }
  }
  expect_near(run("one_pass", permuted).at("AV"), run("one_pass", plain).at("AV"), 1e-12);
}

TEST(PaperCascades, TheRunningMaximumGrowsAndTheRunningSumIsTheSum) {
  constexpr int64_t kTile = 4, kTiles = kKeys / kTile;
  const Values v = run("one_pass", inputs(kTile), {"RM", "RD"});
  const NdArray scores = run("three_pass", inputs(kTile), {"QK"}).at("QK");
  const auto state = [&](const char* name, int64_t h, int64_t t, int64_t p) {
    // Running ranks stand first among the axes that the text writes, behind the batch ranks.
    return v.at(name).values[static_cast<size_t>((h * (kTiles + 1) + t) * kQueries + p)];
  };
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t p = 0; p < kQueries; ++p) {
      for (int64_t t = 0; t < kTiles; ++t)
        EXPECT_LE(state("RM", h, t, p), state("RM", h, t + 1, p));
      double sum = 0;
      for (int64_t m = 0; m < kKeys; ++m) {
        sum += std::exp(scores.values[static_cast<size_t>((h * kQueries + p) * kKeys + m)]);
      }
      const double running = state("RD", h, kTiles, p) * std::exp(state("RM", h, kTiles, p));
      EXPECT_NEAR(running / sum, 1, 1e-12);
    }
  }
}

}  // namespace
}  // namespace heed::hardware
