#include <cmath>

#include "heed/sigmoid_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

SigmoidOptions sigmoid_options(const NamedTensors& in, const Spec& options) {
  require_attention_keys(options, {"bias"});
  SigmoidOptions chosen{masks_of(in, options), options.number("scale")};
  if (const auto bias = options.number("bias")) chosen.bias = *bias;
  if (const auto bias = in.find("bias"); bias != in.end()) chosen.bias = bias->second;
  chosen.alibi_slopes = input_or_none(in, "alibi_slopes");
  return chosen;
}

cascade::Bindings bind_sigmoid(const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = bind_attention(in, options);
  const int64_t heads = in.at("q").size(1), keys = in.at("k").size(2);
  const double bias = options.number("bias").value_or(-std::log(static_cast<double>(keys)));
  const auto per_head = [&](const char* input, double fallback) {
    if (const auto found = in.find(input); found != in.end()) return to_nd(found->second);
    return cascade::NdArray{{heads}, std::vector<double>(static_cast<size_t>(heads), fallback)};
  };
  bindings.tensors["Bias"] = per_head("bias", bias);
  bind_slopes(in, bindings);
  return bindings;
}

ExampleCase with_head_input(ExampleCase example, const char* input, int64_t heads) {
  example.inputs.emplace_back(input, Dims{heads});
  example.types[input] = DType::f32;
  return example;
}

ExampleCase random_sigmoid_case(uint64_t seed) {
  CaseRandom random(seed);
  ExampleCase example = random_attention_case(random);
  const int64_t heads = example.inputs[0].second[1];
  if (random.chance(0.4)) {
    example = with_head_input(std::move(example), "bias", heads);
  } else if (random.chance(0.5)) {
    example.options +=
        (example.options.empty() ? "bias=" : ",bias=") + std::to_string(random.number(-6, 2));
  }
  if (random.chance(0.3)) example = with_head_input(std::move(example), "alibi_slopes", heads);
  return example;
}

Mechanism sigmoid_record() {
  Mechanism m;
  m.name = "sigmoid_attention";
  m.title = "Sigmoid attention: each score is a weight of its own";
  m.sheets = {2};
  m.arxiv = {"2409.04431"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("sigmoid/card.md");
  m.cascades = {{"sigmoid", std::string(embedded("sigmoid/sigmoid.cascade"))}};
  m.outputs = {{"out", "O"}};
  m.cases = common_attention_cases();
  m.cases.push_back(attention_case("bias", {1, 2, 2, 33, 40, 16, 16}, "bias=-1.5,causal=1"));
  m.cases.push_back(
      with_head_input(attention_case("bias_per_head", {1, 4, 2, 33, 40, 16, 16}, ""), "bias", 4));
  m.cases.push_back(with_head_input(
      attention_case("alibi", {1, 4, 2, 60, 75, 16, 16}, "causal=1,bias=0"), "alibi_slopes", 4));
  m.cases.push_back(with_head_input(
      attention_case("alibi_few_rows", {1, 4, 2, 3, 75, 16, 16}, "bias=0"), "alibi_slopes", 4));
  m.bench_cases = attention_bench_cases();
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays({"out"}, sigmoid_attention(in.at("q"), in.at("k"), in.at("v"),
                                                   sigmoid_options(in, options), run));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& gradients, const Spec& options,
                  const RunOptions& run) {
    SigmoidGradients to = sigmoid_attention_backward(gradients.at("out"), in.at("q"), in.at("k"),
                                                     in.at("v"), sigmoid_options(in, options), run);
    NamedArrays arrays =
        named_arrays({"q", "k", "v"}, std::move(to.q), std::move(to.k), std::move(to.v));
    if (in.contains("bias")) arrays.emplace("bias", std::move(to.bias));
    if (in.contains("alibi_slopes")) {
      arrays.emplace("alibi_slopes", slopes_gradient(std::move(to.alibi_slopes)));
    }
    return arrays;
  };
  m.bind = bind_sigmoid;
  m.explain = explain_attention;
  m.fill = fill_lengths;
  m.random_case = random_sigmoid_case;
  m.model_attention = [](const Spec& options, const ModelLayer& at) {
    options.require_known({"causal", "bias", "window", "scale"});
    SigmoidOptions chosen = sigmoid_options({}, options);
    chosen.masks.causal = true;
    // The number of keys of a call is not a property of the model: it depends on how a prompt is cut.
    if (!options.has("bias")) chosen.bias = -std::log(static_cast<double>(at.context));
    return ModelAttention{.over_cache = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const RunOptions& run) {
      sigmoid_attention(q, k, v, out, chosen, run);
    }};
  };
  return m;
}

}  // namespace

std::vector<Mechanism> sigmoid_records() { return {sigmoid_record()}; }

}  // namespace heed
