#include <algorithm>
#include <memory>

#include "heed/relative_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

RelativeOptions relative_options(const Spec& options) {
  options.require_known({"causal", "scale"});
  return {options.flag("causal"), options.number("scale")};
}

RelativeResult run_forward(const NamedTensors& in, const Spec& options, const RunOptions& run) {
  return relative_attention(in.at("q"), in.at("k"), in.at("v"), in.at("rel_key"), in.at("rel_bias"),
                            in.at("content_bias"), relative_options(options), run);
}

// Tables of `more` distances beyond the fewest that the call needs.
ExampleCase relative_case(const std::string& name, const AttentionShape& s,
                          const std::string& options, int64_t more = 0) {
  ExampleCase example = attention_case(name, s, options);
  const bool causal = Spec::parse_options(options).flag("causal");
  const int64_t distances = std::max(s.keys - 1, causal ? 1 : s.queries) + more;
  example.inputs.emplace_back("rel_key", Dims{2 * distances, s.heads, s.dim});
  example.inputs.emplace_back("rel_bias", Dims{2 * distances, s.heads});
  example.inputs.emplace_back("content_bias", Dims{s.heads, s.dim});
  return example;
}

ExampleCase with_float_tables(ExampleCase example) {
  for (const char* name : {"rel_key", "rel_bias", "content_bias"}) {
    example.types[name] = DType::f32;
  }
  return example;
}

std::vector<ExampleCase> relative_cases() {
  return {
      relative_case("one_key", {1, 1, 1, 1, 1, 1, 1}, "causal=1"),
      relative_case("one_key_full", {1, 1, 1, 1, 1, 3, 2}, ""),
      relative_case("odd", {2, 3, 3, 37, 53, 7, 5}, "", 4),
      relative_case("causal", {1, 2, 2, 70, 70, 16, 16}, "causal=1"),
      relative_case("memory", {2, 2, 2, 33, 95, 20, 24}, "causal=1", 17),
      relative_case("groups", {2, 6, 2, 33, 65, 20, 24}, "causal=1"),
      relative_case("groups_full", {2, 4, 1, 41, 30, 12, 9}, ""),
      relative_case("more_queries_than_keys", {1, 2, 1, 50, 21, 8, 8}, "causal=1"),
      relative_case("more_queries_than_keys_full", {1, 2, 1, 90, 21, 8, 8}, "", 5),
      relative_case("head_dim_80", {1, 2, 1, 50, 61, 80, 80}, ""),
      relative_case("head_dim_256", {1, 1, 1, 26, 40, 256, 256}, "causal=1"),
      relative_case("several_tiles", {1, 1, 1, 201, 530, 24, 40}, "causal=1"),
      relative_case("several_tiles_full", {1, 1, 1, 300, 290, 33, 17}, ""),
      relative_case("long_table", {1, 2, 2, 60, 60, 8, 8}, "causal=1", 500),
      relative_case("few_rows", {2, 4, 2, 3, 75, 40, 40}, "causal=1"),
      relative_case("few_rows_full", {1, 4, 2, 2, 75, 40, 40}, ""),
      relative_case("few_rows_split", {1, 2, 1, 1, 2300, 10, 10}, "causal=1", 3),
      relative_case("nine_rows", {1, 1, 1, 9, 70, 12, 12}, "causal=1"),
      relative_case("scale", {1, 2, 2, 30, 30, 8, 8}, "scale=0.7"),
      relative_case("negative_scale", {1, 2, 2, 30, 45, 8, 8}, "scale=-0.4,causal=1"),
      relative_case("zero_scale", {1, 1, 1, 30, 30, 8, 8}, "scale=0"),
      with_float_tables(relative_case("float_tables", {2, 4, 2, 100, 130, 32, 32}, "causal=1")),
      with_float_tables(relative_case("float_tables_full", {1, 2, 2, 70, 65, 33, 16}, "")),
  };
}

ExampleCase random_relative_case(uint64_t seed) {
  CaseRandom random(seed);
  const ExampleCase drawn = random_attention_case(random);
  const Dims q = drawn.inputs[0].second, k = drawn.inputs[1].second, v = drawn.inputs[2].second;
  std::string options = random.chance(0.6) ? "causal=1" : "";
  if (random.chance(0.3)) {
    options +=
        std::string(options.empty() ? "" : ",") + "scale=" + std::to_string(random.number(-1, 1));
  }
  ExampleCase example = relative_case("random", {q[0], q[1], k[1], q[2], k[2], q[3], v[3]}, options,
                                      random.between(0, 40));
  return random.chance(0.3) ? with_float_tables(std::move(example)) : example;
}

std::vector<ExampleCase> relative_bench_cases() {
  std::vector<ExampleCase> cases;
  for (int64_t dim : {32, 64, 128}) {
    for (int64_t tokens : {512, 1024, 4096}) {
      for (bool causal : {true, false}) {
        const int64_t heads = tokens < 4096 ? 4 : 1;
        cases.push_back(relative_case(
            "d" + std::to_string(dim) + "_n" + std::to_string(tokens) + (causal ? "_causal" : ""),
            {1, heads, heads, tokens, tokens, dim, dim}, causal ? "causal=1" : ""));
      }
    }
  }
  cases.push_back(relative_case("rcmha_segment", {32, 8, 8, 64, 128, 16, 16}, "causal=1"));
  cases.push_back(relative_case("step_kv4096", {1, 8, 8, 1, 4096, 64, 64}, "causal=1"));
  return cases;
}

cascade::Bindings bind_relative(const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = bind_attention(in, options);
  bindings.tensors["Rel_Key"] = to_nd(in.at("rel_key"));
  bindings.tensors["Rel_Bias"] = to_nd(in.at("rel_bias"));
  bindings.tensors["Content_Bias"] = to_nd(in.at("content_bias"));
  bindings.sizes["CENTRE"] = in.at("rel_key").size(0) / 2;
  return bindings;
}

Mechanism relative_record() {
  Mechanism m;
  m.name = "relative_attention";
  m.title = "Softmax attention with scores by relative position from learned tables";
  m.sheets = {19};
  m.arxiv = {"2308.03429", "1901.02860"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("relative/card.md");
  for (const char* name : {"relative", "shifted", "one_pass"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("relative/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = relative_cases();
  m.random_case = random_relative_case;
  m.bench_cases = relative_bench_cases();
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    RelativeResult result = run_forward(in, options, run);
    return named_arrays({"out", "lse"}, std::move(result.out), std::move(result.lse));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec& options,
                              const RunOptions& run) -> BackwardCall {
    const auto result = std::make_shared<const RelativeResult>(run_forward(in, options, run));
    return [in, options, run, result](const NamedTensors& gradients) {
      RelativeGradients to = relative_attention_backward(
          gradients.at("out"), gradients.at("lse"), in.at("q"), in.at("k"), in.at("v"),
          in.at("rel_key"), in.at("rel_bias"), in.at("content_bias"), result->out, result->lse,
          relative_options(options), run);
      return named_arrays({"q", "k", "v", "rel_key", "rel_bias", "content_bias"}, std::move(to.q),
                          std::move(to.k), std::move(to.v), std::move(to.rel_key),
                          std::move(to.rel_bias), std::move(to.content_bias));
    };
  };
  m.bind = bind_relative;
  m.explain = explain_attention;
  m.shrink = [](const ExampleCase& example) {
    const Dims &q = example.inputs[0].second, &k = example.inputs[1].second,
               &v = example.inputs[2].second;
    const int64_t queries = std::min<int64_t>(q[2], 64);
    const int64_t keys = k[2] == q[2] ? queries : std::min<int64_t>(k[2], 96);
    return relative_case(example.name, {1, q[1] / k[1], 1, queries, keys, q[3], v[3]},
                         example.options);
  };
  return m;
}

}  // namespace

std::vector<Mechanism> relative_records() { return {relative_record()}; }

}  // namespace heed
