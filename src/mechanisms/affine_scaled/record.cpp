#include <array>
#include <cmath>
#include <memory>

#include "engine/tiled/problem.h"
#include "heed/affine_scaled_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

AffineScaledOptions affine_options(const NamedTensors& in, const Spec& options) {
  require_attention_keys(options);
  return {masks_of(in, options), options.number("scale")};
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = bind_attention(in, options);
  bindings.tensors["Alpha"] = to_nd(in.at("alpha"));
  bindings.tensors["Alpha_Mean"] = to_nd(in.at("alpha_mean"));
  return bindings;
}

ExampleCase with_alpha(ExampleCase example, bool float32 = false) {
  const Dims q = example.inputs[0].second;
  example.inputs.emplace_back("alpha", Dims{q[0], q[1], q[2]});
  example.inputs.emplace_back("alpha_mean", Dims{q[1]});
  if (float32) example.types["alpha"] = example.types["alpha_mean"] = DType::f32;
  return example;
}

ExampleCase random_affine_case(uint64_t seed) {
  CaseRandom random(seed);
  // Where every row sees one key at most, gradients of scores are nothing but rounding. (Of three lengths
  // one is all keys, of two none.)
  const auto lone_keys = [](const ExampleCase& example) {
    return example.inputs[1].second[2] == 1 ||
           example.options.find("left=0") != std::string::npos ||
           (example.types.count("lengths") > 0 && example.inputs[0].second[0] == 2);
  };
  ExampleCase example = random_attention_case(random);
  while (lone_keys(example)) example = random_attention_case(random);
  // A scale near 0 makes the weights the mean's, and the gradient of alpha nothing but rounding.
  if (const size_t scale = example.options.find("scale="); scale != std::string::npos) {
    example.options =
        example.options.substr(0, scale) + "scale=" + std::to_string(random.number(0.15, 0.6));
  }
  return with_alpha(std::move(example), random.chance(0.5));
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& spec, const RunOptions& run) {
  struct Saved {
    Array softmax_out, lse;
  };
  const AffineScaledOptions options = affine_options(in, spec);
  const Tensor q = in.at("q"), k = in.at("k"), v = in.at("v");
  const Tensor alpha = in.at("alpha"), alpha_mean = in.at("alpha_mean");
  const Dims shape{q.size(0), q.size(1), q.size(2), v.size(3)};
  Array out(q.dtype(), shape);
  const auto saved = std::make_shared<Saved>();
  const DType type = wide_type(q.dtype());
  saved->softmax_out = Array(type, shape);
  saved->lse = Array(type, {q.size(0), q.size(1), q.size(2)});
  affine_scaled_attention(q, k, v, alpha, alpha_mean, out, saved->softmax_out, saved->lse, options,
                          run);
  return [=](const NamedTensors& out_gradients) {
    AffineScaledGradients gradients =
        affine_scaled_attention_backward(out_gradients.at("out"), q, k, v, alpha, alpha_mean,
                                         saved->softmax_out, saved->lse, options, run);
    return named_arrays({"q", "k", "v", "alpha", "alpha_mean"}, std::move(gradients.q),
                        std::move(gradients.k), std::move(gradients.v), std::move(gradients.alpha),
                        std::move(gradients.alpha_mean));
  };
}

float finite_or(const Spec& options, const char* key, double fallback) {
  const auto value = static_cast<float>(options.number(key).value_or(fallback));
  if (!std::isfinite(value)) {
    fail("affine_scaled_attention", std::string(key) + " is " + *options.text(key),
         "a finite number is needed");
  }
  return value;
}

// The model has no weights for alpha: the same number everywhere, at first that of a layer whose
// projection is still zero.
ModelAttention affine_in_model(const Spec& options, const ModelLayer& at) {
  require_attention_keys(options, {"alpha", "alpha_mean"});
  AffineScaledOptions chosen{masks_of({}, options), options.number("scale")};
  chosen.masks.causal = true;
  const auto constants = std::make_shared<std::array<float, 2>>();
  (*constants)[0] = finite_or(options, "alpha", 0.5);
  (*constants)[1] = finite_or(options, "alpha_mean", 0.5);
  const int64_t heads = at.heads;
  ModelAttention attention;
  attention.over_cache = [=](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const RunOptions& run) {
    const Tensor alpha(&(*constants)[0], DType::f32, {1, heads, q.size(2)}, {0, 0, 0});
    const Tensor mean(&(*constants)[1], DType::f32, {heads}, {0});
    affine_scaled_attention(q, k, v, alpha, mean, out, {}, {}, chosen, run);
  };
  return attention;
}

Mechanism affine_record() {
  Mechanism m;
  m.name = "affine_scaled_attention";
  m.title = "Affine-scaled attention: softmax weights scaled and shifted for each query";
  m.sheets = {3};
  m.arxiv = {"2602.23057"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("affine_scaled/card.md");
  m.cascades = {{"affine_scaled", std::string(embedded("affine_scaled/affine_scaled.cascade"))},
                {"one_pass", std::string(embedded("affine_scaled/one_pass.cascade"))}};
  m.outputs = {{"out", "O"}};
  for (ExampleCase& example : common_attention_cases()) {
    // There the weights are the mean's, and the gradient of alpha is nothing but rounding.
    if (example.name != "zero_scale") m.cases.push_back(with_alpha(example));
  }
  m.cases.push_back(
      with_alpha(attention_case("float32_alpha", {1, 4, 2, 33, 40, 16, 16}, "causal=1"), true));
  m.cases.push_back(with_alpha(attention_case("many_rows", {1, 2, 1, 300, 310, 8, 20}, "left=70")));
  for (ExampleCase& example : attention_bench_cases()) {
    m.bench_cases.push_back(with_alpha(example, true));
  }
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays(
        {"out"}, affine_scaled_attention(in.at("q"), in.at("k"), in.at("v"), in.at("alpha"),
                                         in.at("alpha_mean"), affine_options(in, options), run));
  };
  m.forward_for_backward = forward_for_backward;
  m.bind = bind;
  m.explain = explain_attention;
  m.fill = fill_lengths;
  m.random_case = random_affine_case;
  m.model_attention = affine_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> affine_scaled_records() { return {affine_record()}; }

}  // namespace heed
