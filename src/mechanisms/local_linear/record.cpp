#include "engine/candidates.h"
#include "heed/local_linear_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

LocalLinearOptions local_linear_options(const Spec& options) {
  options.require_known({"causal", "scale", "ridge"});
  return {options.number("ridge").value_or(LocalLinearOptions().ridge), options.flag("causal"),
          options.number("scale")};
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = bind_attention(in, options);
  bindings.scalars["ridge"] = local_linear_options(options).ridge;
  return bindings;
}

ExampleCase random_local_linear_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape s;
  s.batch = random.between(1, 2);
  s.kv_heads = random.between(1, 2);
  s.heads = s.kv_heads * random.between(1, 3);
  s.queries = random.between(1, 30);
  s.keys = random.chance(0.1) ? random.between(60, 140) : random.between(1, 40);
  s.dim = random.chance(0.1) ? random.between(10, 20) : random.between(1, 9);
  s.value_dim = random.between(1, 20);
  std::string options = "ridge=" + std::to_string(random.number(0.05, 3));
  if (random.chance(0.5)) options += ",causal=1";
  if (random.chance(0.3)) options += ",scale=" + std::to_string(random.number(-0.6, 0.6));
  return attention_case("", s, options);
}

Mechanism local_linear_record() {
  Mechanism m;
  m.name = "local_linear_attention";
  m.title = "Local linear attention: a weighted linear fit for every query";
  m.sheets = {4};
  m.arxiv = {"2510.01450", "2605.29157"};
  m.engine = "none";
  m.pass_rank = "m";
  m.card = embedded("local_linear/card.md");
  m.cascades = {{"regression", std::string(embedded("local_linear/regression.cascade"))},
                {"centred", std::string(embedded("local_linear/centred.cascade"))}};
  m.outputs = {{"out", "O"}};
  m.cases = {
      attention_case("one_key", {1, 1, 1, 1, 1, 1, 1}, ""),
      attention_case("fewer_keys_than_dims", {1, 2, 2, 5, 3, 6, 4}, ""),
      attention_case("odd", {2, 3, 3, 17, 23, 7, 5}, ""),
      attention_case("causal", {1, 2, 2, 30, 30, 8, 8}, "causal=1"),
      attention_case("causal_gqa", {2, 4, 2, 19, 33, 5, 9}, "causal=1"),
      attention_case("more_queries_than_keys", {1, 2, 1, 30, 11, 4, 4}, "causal=1"),
      attention_case("one_query", {2, 4, 1, 1, 40, 6, 6}, "causal=1"),
      attention_case("several_tiles", {1, 1, 1, 130, 150, 3, 2}, "causal=1"),
      attention_case("wide_heads", {1, 1, 1, 9, 40, 18, 20}, ""),
      attention_case("ridge", {1, 2, 2, 15, 20, 6, 6}, "ridge=10"),
      attention_case("scale", {1, 2, 2, 15, 20, 6, 6}, "scale=0.7,ridge=1"),
      attention_case("negative_scale", {1, 2, 2, 15, 20, 6, 6}, "scale=-0.3,causal=1"),
      attention_case("zero_scale", {1, 1, 1, 15, 20, 6, 6}, "scale=0"),
  };
  m.bench_cases = {attention_case("d64_n512_causal", {1, 4, 4, 512, 512, 64, 64}, "causal=1"),
                   attention_case("d128_n512", {1, 2, 2, 512, 512, 128, 128}, "")};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays({"out"}, local_linear_attention(in.at("q"), in.at("k"), in.at("v"),
                                                        local_linear_options(options), run));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec& options,
                  const RunOptions& run) {
    LocalLinearGradients gradients =
        local_linear_attention_backward(out_gradients.at("out"), in.at("q"), in.at("k"), in.at("v"),
                                        local_linear_options(options), run);
    return named_arrays({"q", "k", "v"}, std::move(gradients.q), std::move(gradients.k),
                        std::move(gradients.v));
  };
  m.bind = bind;
  m.random_case = random_local_linear_case;
  m.explain = [](const NamedTensors&, const Spec&, const RunOptions& run) {
    return explain_isas(run);
  };
  m.model_attention = [](const Spec& options, const ModelLayer&) {
    LocalLinearOptions chosen = local_linear_options(options);
    chosen.causal = true;
    return ModelAttention{.over_cache = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const RunOptions& run) {
      local_linear_attention(q, k, v, out, chosen, run);
    }};
  };
  return m;
}

}  // namespace

std::vector<Mechanism> local_linear_records() { return {local_linear_record()}; }

}  // namespace heed
