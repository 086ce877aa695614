#include "engine/candidates.h"
#include "heed/depthwise_conv.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

cascade::Bindings bind(const NamedTensors& in, const Spec&) {
  cascade::Bindings bindings;
  bindings.tensors = {{"X", to_nd(in.at("x"))}, {"Weight", to_nd(in.at("weight"))}};
  if (input_or_none(in, "bias").defined())
    bindings.tensors["Bias"] = to_nd(input_or_none(in, "bias"));
  return bindings;
}

// The option only says which cascade defines the case; the call reads it from the shapes.
enum class Bias { none, given };

ExampleCase shared_case(const char* name, const Dims& x, int64_t taps, Bias bias) {
  ExampleCase example{name, {{"x", x}, {"weight", {x[3], taps}}}, "per_head=0"};
  if (bias == Bias::given) example.inputs.emplace_back("bias", Dims{x[3]});
  return example;
}

ExampleCase per_head_case(const char* name, const Dims& x, int64_t taps, Bias bias) {
  ExampleCase example{name, {{"x", x}, {"weight", {x[1], x[3], taps}}}, "per_head=1"};
  if (bias == Bias::given) example.inputs.emplace_back("bias", Dims{x[1], x[3]});
  return example;
}

ExampleCase float32_parameters(ExampleCase example) {
  example.types = {{"weight", DType::f32}, {"bias", DType::f32}};
  return example;
}

ExampleCase random_conv_case(uint64_t seed) {
  CaseRandom random(seed);
  const Dims x{random.between(1, 3), random.between(1, 4),
               random.chance(0.1) ? random.between(120, 700) : random.between(1, 60),
               random.between(1, 70)};
  const int64_t taps = random.between(1, 7);
  const Bias bias = random.chance(0.5) ? Bias::given : Bias::none;
  ExampleCase example =
      random.chance(0.5) ? shared_case("", x, taps, bias) : per_head_case("", x, taps, bias);
  return random.chance(0.3) ? float32_parameters(std::move(example)) : example;
}

Mechanism conv_record() {
  Mechanism m;
  m.name = "depthwise_causal_conv";
  m.title = "Depthwise causal convolution along the tokens";
  m.sheets = {19};
  m.arxiv = {"2308.03429", "2109.08668"};
  m.engine = "none";
  m.pass_rank = "t";
  m.card = embedded("depthwise_conv/card.md");
  m.cascades = {
      {"shared", std::string(embedded("depthwise_conv/shared.cascade")), "per_head=0"},
      {"per_head", std::string(embedded("depthwise_conv/per_head.cascade")), "per_head=1"}};
  m.outputs = {{"out", "O"}};
  m.cases = {
      shared_case("rcmha", {2, 3, 40, 16}, 3, Bias::given),
      shared_case("one_tap", {1, 2, 9, 5}, 1, Bias::none),
      shared_case("odd", {2, 3, 37, 19}, 4, Bias::none),
      shared_case("more_taps_than_tokens", {1, 2, 3, 7}, 6, Bias::given),
      shared_case("several_blocks", {1, 1, 300, 33}, 2, Bias::given),
      shared_case("one_token", {3, 2, 1, 1}, 3, Bias::given),
      per_head_case("primer", {2, 4, 33, 24}, 3, Bias::given),
      per_head_case("per_head_odd", {1, 3, 21, 70}, 5, Bias::none),
      float32_parameters(shared_case("float32_parameters", {1, 2, 20, 12}, 3, Bias::given)),
      float32_parameters(per_head_case("float32_per_head", {1, 2, 20, 12}, 3, Bias::given)),
  };
  m.bench_cases = {shared_case("d64_n1024", {1, 8, 1024, 64}, 3, Bias::given),
                   per_head_case("d128_n4096", {1, 8, 4096, 128}, 4, Bias::given)};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    options.require_known({"per_head"});
    return named_arrays({"out"}, depthwise_causal_conv(in.at("x"), in.at("weight"),
                                                       input_or_none(in, "bias"), run));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec&,
                  const RunOptions& run) {
    DepthwiseConvGradients gradients = depthwise_causal_conv_backward(
        out_gradients.at("out"), in.at("x"), in.at("weight"), input_or_none(in, "bias"), run);
    NamedArrays arrays =
        named_arrays({"x", "weight"}, std::move(gradients.x), std::move(gradients.weight));
    if (input_or_none(in, "bias").defined()) arrays.emplace("bias", std::move(gradients.bias));
    return arrays;
  };
  m.bind = bind;
  m.random_case = random_conv_case;
  m.explain = [](const NamedTensors&, const Spec&, const RunOptions& run) {
    return explain_isas(run);
  };
  return m;
}

}  // namespace

std::vector<Mechanism> depthwise_conv_records() { return {conv_record()}; }

}  // namespace heed
