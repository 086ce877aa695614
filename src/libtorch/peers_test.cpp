// The compositions compute what heed computes, forward and backward, so that a benchmark compares like
// with like. Cases and gradients come from the registry.
#include "libtorch/peers.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "heed/heed.h"

namespace heed {
namespace {

void expect_close(const Array& found, const Array& expected, const std::string& what) {
  ASSERT_EQ(to_string(found.shape()), to_string(expected.shape())) << what;
  ASSERT_EQ(found.dtype(), DType::f64) << what;
  for (int64_t i = 0; i < found.count(); ++i) {
    const double want = expected.as<double>()[i];
    ASSERT_NEAR(found.as<double>()[i], want, 1e-10 * (1 + std::abs(want)))
        << what << ", element " << i;
  }
}

/// A call of a mechanism on float64 inputs, by heed and by PyTorch.
void expect_same(const std::string& name, const ExampleCase& example) {
  const std::string what = name + " " + example.name + " " + example.options;
  const Mechanism& mechanism = find_mechanism(name);
  const NamedArrays inputs = make_inputs(mechanism, example, DType::f64, 5);
  const NamedTensors in = views(inputs);
  const Spec options = Spec::parse_options(example.options);
  const auto peer = make_peer(name, in, options);
  ASSERT_TRUE(peer) << what;
  const NamedArrays results = mechanism.forward(in, options, {});
  peer->compute();
  const std::string& first = composed_result(mechanism);
  const Array& out = results.at(first);
  expect_close(peer->result(), out, what);
  if (!mechanism.backward) return;
  const ExampleCase like{.name = "", .inputs = {{first, out.shape()}}, .options = ""};
  const NamedArrays out_gradients = make_inputs(Mechanism{}, like, DType::f64, 6);
  NamedTensors given = views(out_gradients);
  for (const auto& [result, array] : results) given.emplace(result, Tensor());
  const NamedArrays want = mechanism.backward(in, given, options, {});
  peer->prepare_backward(out_gradients.at(first));
  peer->backward();
  for (const auto& [input, gradient] : want) {
    // heed leaves out what a gate of 0 multiplies, and gives that gate the gradient 0.
    if (!in.contains(input) || (name == "head_gated_attention" && input == "gates")) continue;
    expect_close(peer->gradient(input), gradient, what + ", gradient of " + input);
  }
}

/// Cases of the registry that PyTorch has a composition for.
std::vector<ExampleCase> known_cases(const Mechanism& mechanism) {
  std::vector<ExampleCase> known;
  for (const ExampleCase& example : mechanism.cases) {
    const NamedArrays inputs = make_inputs(mechanism, example, DType::f64, 5);
    if (make_peer(mechanism.name, views(inputs), Spec::parse_options(example.options))) {
      known.push_back(example);
    }
  }
  return known;
}

class Peers : public testing::TestWithParam<const char*> {};

TEST_P(Peers, ComputesWhatHeedComputes) {
  const Mechanism& mechanism = find_mechanism(GetParam());
  const std::vector<ExampleCase> cases = known_cases(mechanism);
  ASSERT_FALSE(cases.empty());
  for (const ExampleCase& example : cases) {
    // Rows that see no key are NaN in PyTorch, and 0 in heed.
    const bool dead = example.name.find("more_queries") != std::string::npos ||
                      example.name.find("dead") != std::string::npos;
    if (!dead) expect_same(mechanism.name, example);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Mechanisms, Peers,
    testing::Values("flash_attention", "decode_attention", "merge_attention", "sigmoid_attention",
                    "parallax_attention", "affine_scaled_attention", "head_gated_attention", "na1d",
                    "na2d", "na3d", "stochastic_attention", "lightning_attention",
                    "linear_attention", "magnitude_aware_linear_attention", "relu_linear_attention",
                    "depthwise_causal_conv", "feature_map", "kernelized_rpe_attention",
                    "relative_attention", "recurrent_softmax_attention", "taylor_state_attention",
                    "attention_distillation_loss"),
    [](const auto& point) { return std::string(point.param); });

NamedArrays small_inputs() {
  const ExampleCase example{
      .name = "",
      .inputs = {{"q", {1, 2, 3, 4}}, {"k", {1, 2, 3, 4}}, {"v", {1, 2, 3, 4}}},
      .options = ""};
  return make_inputs(Mechanism{}, example, DType::f64, 1);
}

TEST(PeersRefuse, WhatPyTorchDoesNotOffer) {
  const NamedArrays inputs = small_inputs();
  const NamedTensors in = views(inputs);
  EXPECT_FALSE(make_peer("flash_attention", in, Spec::parse_options("window=2")));
  EXPECT_FALSE(make_peer("local_linear_attention", in, {}));
  NamedTensors with_lengths = in;
  with_lengths["lengths"] = in.at("q");
  EXPECT_FALSE(make_peer("flash_attention", with_lengths, {}));
}

TEST(PeersRefuse, SequencesOfDifferentLength) {
  const NamedArrays inputs = small_inputs();
  Array lengths(DType::i32, {2});
  lengths.as<int32_t>()[0] = 3;
  lengths.as<int32_t>()[1] = 2;
  const NamedTensors in = {{"q", inputs.at("q")},
                           {"k_cache", inputs.at("k")},
                           {"v_cache", inputs.at("v")},
                           {"lengths", lengths}};
  EXPECT_FALSE(make_peer("decode_attention", in, {}));
}

TEST(Peers, EveryRunSetsTheThreads) {
  const NamedArrays inputs = small_inputs();
  for (const int threads : {1, 2, 1}) {
    const auto peer = make_peer("flash_attention", views(inputs), {}, threads);
    ASSERT_TRUE(peer);
    peer->compute();
    EXPECT_EQ(at::get_num_threads(), threads);
  }
}

TEST(PeersRefuse, ResultsBeforeARun) {
  const NamedArrays inputs = small_inputs();
  const auto peer = make_peer("flash_attention", views(inputs), {});
  ASSERT_TRUE(peer);
  EXPECT_THROW(peer->result(), Error);
  EXPECT_THROW(peer->backward(), Error);
  EXPECT_THROW(peer->gradient("q"), Error);
}

}  // namespace
}  // namespace heed
