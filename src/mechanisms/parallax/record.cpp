#include <algorithm>
#include <memory>

#include "heed/parallax_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

ParallaxOptions parallax_options(const NamedTensors& in, const Spec& options) {
  require_attention_keys(options);
  return {masks_of(in, options), options.number("scale")};
}

ParallaxResult run_forward(const NamedTensors& in, const Spec& options, const RunOptions& run) {
  return parallax_attention(in.at("q"), in.at("r"), in.at("k"), in.at("v"),
                            parallax_options(in, options), run);
}

ExampleCase with_probe(ExampleCase example) {
  auto& inputs = example.inputs;
  inputs.emplace_back("r", Dims(inputs.front().second));
  std::rotate(inputs.begin() + 1, inputs.end() - 1, inputs.end());
  return example;
}

std::vector<ExampleCase> with_probes(std::vector<ExampleCase> cases) {
  for (ExampleCase& example : cases) example = with_probe(std::move(example));
  return cases;
}

std::vector<ExampleCase> parallax_cases() {
  std::vector<ExampleCase> cases = common_attention_cases();
  cases.push_back(attention_case("dead_rows_few", {1, 2, 2, 9, 4, 8, 8}, "causal=1"));
  cases.push_back(attention_case("few_rows_group", {1, 8, 1, 2, 90, 64, 64}, "causal=1"));
  cases.push_back(attention_case("few_rows_split", {1, 4, 2, 2, 2300, 16, 16}, "causal=1"));
  cases.push_back(
      attention_case("few_rows_split_window", {1, 2, 1, 3, 2900, 9, 9}, "causal=1,window=1500"));
  cases.push_back(attention_case("negative_scale_few_rows", {1, 2, 1, 2, 60, 8, 8}, "scale=-0.4"));
  cases.push_back(attention_case("zero_scale_few_rows", {1, 2, 1, 2, 60, 8, 8}, "scale=0"));
  return with_probes(std::move(cases));
}

// Where no query sees two keys all gradients of r cancel exactly, which leaves no error to compare with.
ExampleCase random_parallax_case(uint64_t seed) {
  CaseRandom random(seed);
  ExampleCase example = random_attention_case(random);
  const Spec options = Spec::parse_options(example.options);
  const int64_t left = options.integer("left").value_or(1);
  const int64_t right = options.flag("causal") ? 0 : options.integer("right").value_or(1);
  if (left + right == 0) example.options = "causal=1";
  std::erase_if(example.inputs, [](const auto& input) {
    return input.first == "lengths" &&
           input.second[0] == 2;  // of which one is 0, the other anything
  });
  for (auto& [name, shape] : example.inputs) {
    if (name == "k" || name == "v") shape[2] = std::max<int64_t>(shape[2], 2);
  }
  return with_probe(std::move(example));
}

std::vector<ExampleCase> parallax_bench_cases() {
  std::vector<ExampleCase> cases = attention_bench_cases();
  for (int64_t keys : {512, 4096, 16384}) {
    cases.push_back(
        attention_case("decode_kv" + std::to_string(keys), {1, 32, 8, 1, keys, 128, 128}, ""));
  }
  return with_probes(std::move(cases));
}

Mechanism parallax_record() {
  Mechanism m;
  m.name = "parallax_attention";
  m.title = "Softmax attention minus the covariance of values and keys times a learned probe";
  m.sheets = {4};
  m.arxiv = {"2605.29157"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("parallax/card.md");
  for (const char* name : {"parallax", "one_pass"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("parallax/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"v_mean", "VM"}, {"t_mean", "TM"}, {"lse", "LSE"}};
  m.without_gradient = {"v_mean", "t_mean"};
  m.cases = parallax_cases();
  m.random_case = random_parallax_case;
  m.bench_cases = parallax_bench_cases();
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    ParallaxResult result = run_forward(in, options, run);
    return named_arrays({"out", "v_mean", "t_mean", "lse"}, std::move(result.out),
                        std::move(result.v_mean), std::move(result.t_mean), std::move(result.lse));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec& options,
                              const RunOptions& run) -> BackwardCall {
    const auto result = std::make_shared<const ParallaxResult>(run_forward(in, options, run));
    return [in, options, run, result](const NamedTensors& gradients) {
      ParallaxGradients to = parallax_attention_backward(
          gradients.at("out"), gradients.at("lse"), in.at("q"), in.at("r"), in.at("k"), in.at("v"),
          result->out, result->statistics(), parallax_options(in, options), run);
      return named_arrays({"q", "r", "k", "v"}, std::move(to.q), std::move(to.r), std::move(to.k),
                          std::move(to.v));
    };
  };
  m.bind = [](const NamedTensors& in, const Spec& options) {
    cascade::Bindings bindings = bind_attention(in, options);
    bindings.tensors["R"] = to_nd(in.at("r"));
    return bindings;
  };
  m.explain = explain_attention;
  m.fill = fill_lengths;
  return m;
}

}  // namespace

std::vector<Mechanism> parallax_records() { return {parallax_record()}; }

}  // namespace heed
