#include "hardware/streaming.h"

#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <sstream>

#include "heed/error.h"
#include "mechanisms/registry.h"

namespace heed::hardware {
namespace {

using cascade::Bindings;
using cascade::NdArray;

cascade::Program builtin(const std::string& name) {
  const std::string file = "cascades/" + name + ".cascade";
  return cascade::parse(data_file(file), file);
}

NdArray normal(std::vector<int64_t> shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  NdArray array{shape, {}};
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  array.values.resize(static_cast<size_t>(count));
  for (double& x : array.values) x = distribution(random);
  return array;
}

Bindings attention(int64_t queries, int64_t keys, int64_t dim, int64_t tile) {
  Bindings b;
  b.tensors = {{"Q", normal({1, 1, queries, dim}, 1)},
               {"K", normal({1, 1, keys, dim}, 2)},
               {"V", normal({1, 1, keys, dim}, 3)}};
  b.sizes["M0"] = tile;
  return b;
}

const TensorTouches& touches(const StreamedRun& run, const std::string& tensor) {
  for (const TensorTouches& t : run.tensors) {
    if (t.tensor == tensor) return t;
  }
  throw std::runtime_error("no tensor");
}

double divisions(const StreamedRun& run) {
  return run.operations[static_cast<size_t>(Operation::division)];
}

void expect_equal(const NdArray& found, const NdArray& want) {
  ASSERT_EQ(found.shape, want.shape);
  for (size_t i = 0; i < want.values.size(); ++i) {
    ASSERT_NEAR(found.values[i], want.values[i], 1e-12) << i;
  }
}

TEST(Streaming, PassesFootprintAndDivisionsOfTheThreeCascades) {
  constexpr int64_t kQueries = 3, kDim = 8;
  for (int64_t keys : {64, 128, 256}) {
    const StreamedRun three =
        run_streamed(builtin("three_pass"), "m", attention(kQueries, keys, kDim, 16));
    EXPECT_EQ(three.passes, 3);
    // A row of scores, then of weights, and what is summed.
    EXPECT_GE(three.peak_live_words, keys);
    EXPECT_LE(three.peak_live_words, keys + kDim + 4);
    EXPECT_EQ(divisions(three), static_cast<double>(kQueries * keys));
    for (int64_t tile : {16, 32}) {
      SCOPED_TRACE(testing::Message() << keys << " keys, tiles of " << tile);
      const Bindings in = attention(kQueries, keys, kDim, tile);
      const StreamedRun two = run_streamed(builtin("two_pass"), "m", in);
      const StreamedRun one = run_streamed(builtin("one_pass"), "m", in);
      EXPECT_EQ(two.passes, 2);
      EXPECT_EQ(one.passes, 1);
      EXPECT_GE(two.peak_live_words, keys);
      EXPECT_LE(one.peak_live_words, 2 * tile + 3 * kDim + 8);
      EXPECT_EQ(divisions(one), static_cast<double>(kQueries * kDim));
      expect_equal(two.outputs.at("AV"), three.outputs.at("AV"));
      expect_equal(one.outputs.at("AV"), three.outputs.at("AV"));
      for (const char* input : {"K", "V"}) {
        EXPECT_EQ(touches(one, input).reads, kQueries * keys * kDim);
      }
      EXPECT_EQ(touches(one, "BQK").writes, kQueries * keys);
    }
    EXPECT_EQ(touches(three, "QK").reads, 2 * kQueries * keys);
  }
}

TEST(Streaming, TheFootprintOfOnePassDoesNotGrowWithTheKeys) {
  const auto words = [](int64_t keys) {
    return run_streamed(builtin("one_pass"), "m", attention(2, keys, 8, 16)).peak_live_words;
  };
  EXPECT_EQ(words(64), words(512));
}

TEST(Streaming, TeachingExamples) {
  const auto run = [](const char* name, const char* rank) {
    std::ifstream file(std::string("src/cascade/testdata/teaching_") + name + ".cascade");
    std::stringstream text;
    text << file.rdbuf();
    Bindings b;
    b.tensors = {{"A", normal({20}, 1)}, {"B", normal({20}, 2)}};
    return run_streamed(cascade::parse(text.str(), name), rank, b);
  };
  const StreamedRun two = run("two_pass", "k"), one = run("one_pass", "k"),
                    running = run("running", "i");
  EXPECT_EQ(two.passes, 2);
  EXPECT_EQ(one.passes, 1);
  EXPECT_EQ(running.passes, 1);
  EXPECT_EQ(touches(two, "A").reads, 40);
  EXPECT_EQ(touches(one, "A").reads, 40);  // once for each sum, in the same pass
  EXPECT_NEAR(one.outputs.at("Z").values[0], two.outputs.at("Z").values[0], 1e-12);
  EXPECT_NEAR(running.outputs.at("Z").values[0], two.outputs.at("Z").values[0], 1e-9);
}

// Measured equals counted, and streamed equals interpreted, for the attention of the registry.
TEST(Streaming, AgreesWithTheCounterOnTheCascadesOfFlashAttention) {
  const Mechanism& flash = find_mechanism("flash");
  const ExampleCase example{
      "t", {{"q", {1, 2, 3, 4}}, {"k", {1, 1, 20, 4}}, {"v", {1, 1, 20, 5}}}, ""};
  const NamedArrays inputs = make_inputs(flash, example, DType::f64, 1);
  const Bindings bindings = flash.bind(views(inputs), Spec());
  for (const char* name : {"softmax", "two_pass", "flash"}) {
    for (const CascadeText& text : flash.cascades) {
      if (text.name != name) continue;
      const cascade::Program program = cascade::parse(text.text, text.name);
      const StreamedRun run = run_streamed(program, "m", bindings);
      EXPECT_EQ(run.passes, cascade::count_passes(program, "m").passes) << name;
      expect_equal(run.outputs.at("O"), cascade::evaluate(program, bindings).at("O"));
    }
  }
}

TEST(Streaming, WhatCannotBeStreamedIsSaid) {
  const auto message = [](const std::string& text, const Bindings& b) -> std::string {
    try {
      run_streamed(cascade::parse(text), "m", b);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  Bindings b;
  b.tensors = {{"A", normal({6}, 1)}};
  EXPECT_EQ(message("cascade c\nrank m\nin A[m]\nout X[m] = 2 * A[m]", b), "no error");
  // The counter gives the reversed use a pass of its own.
  EXPECT_EQ(message("cascade c\nrank m\nin A[m]\nX[m] = 2 * A[m]\nout Y[m] = X[M-1-m]", b),
            "no error");
  EXPECT_NE(
      message("cascade c\nrank m\nin A[m]\nout X = sum A[m] + max A[m]", b).find("several terms"),
      std::string::npos);
  EXPECT_NE(message("cascade c\nrank m n\nin A[m] B[n]\nout X[m] = A[m]", b).find("size"),
            std::string::npos);
  Bindings large = attention(1, 4, 4, 4);
  large.tensors = {};
  large.sizes = {{"b", 64}, {"h", 64}, {"p", 65536}, {"m", 65536}, {"e", 64}, {"f", 64}};
  EXPECT_THROW(run_streamed(builtin("three_pass"), "m", large), Error);
}

}  // namespace
}  // namespace heed::hardware
