#include <memory>

#include "heed/lightning_attention.h"
#include "mechanisms/chunked_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

LightningOptions lightning_options(const NamedTensors& in, const Spec& options) {
  options.require_known({});
  LightningOptions chosen;
  chosen.slopes = input_or_none(in, "slopes");
  chosen.initial_state = input_or_none(in, "initial_state");
  return chosen;
}

// Decays from one that forgets at once to one that never does.
void fill_slopes(const ExampleCase&, const std::string& input, uint64_t, const Tensor& to_fill) {
  if (input != "slopes") return;
  constexpr double kSlopes[] = {0.05, 8, 0, 0.7, 1e-6, 0.01};
  Array values(DType::f64, to_fill.shape());
  for (int64_t h = 0; h < values.count(); ++h) values.as<double>()[h] = kSlopes[h % 6];
  copy(values, to_fill);
}

cascade::Bindings bind_lightning(const NamedTensors& in, const Spec&) {
  cascade::Bindings bindings = bind_chunked(in);
  bindings.sizes["C"] = 5;  // does not divide most lengths, on purpose
  if (const auto slopes = in.find("slopes"); slopes != in.end()) {
    bindings.tensors["Slopes"] = to_nd(slopes->second);
  }
  if (const auto state = in.find("initial_state"); state != in.end()) {
    bindings.tensors["Initial_state"] = to_nd(state->second);
  }
  return bindings;
}

ExampleCase lightning_case(const std::string& name, const AttentionShape& s, bool slopes,
                           bool state) {
  ExampleCase example = attention_case(name, s, "");
  if (slopes) {
    example.inputs.emplace_back("slopes", Dims{s.heads});
    example.types["slopes"] = DType::f32;
  }
  if (state) {
    example.inputs.emplace_back("initial_state", Dims{s.batch, s.heads, s.dim, s.value_dim});
    example.types["initial_state"] = DType::f32;
  }
  return example;
}

std::vector<ExampleCase> lightning_cases() {
  return {lightning_case("one_token", {1, 2, 2, 1, 1, 5, 3}, true, true),
          lightning_case("one_number", {1, 1, 1, 1, 1, 1, 1}, false, false),
          lightning_case("odd", {2, 6, 2, 37, 37, 7, 5}, true, true),
          lightning_case("no_decay", {1, 2, 2, 70, 70, 16, 16}, false, false),
          lightning_case("no_decay_state", {2, 2, 1, 70, 70, 16, 24}, false, true),
          lightning_case("several_chunks", {1, 6, 3, 300, 300, 20, 24}, true, false),
          lightning_case("last_queries", {1, 3, 1, 33, 165, 20, 24}, true, true),
          lightning_case("last_query", {1, 3, 3, 1, 140, 16, 16}, true, false),
          lightning_case("more_queries_than_keys", {1, 2, 1, 50, 21, 8, 8}, true, false),
          lightning_case("head_dim_80", {1, 2, 1, 130, 130, 80, 80}, true, true),
          lightning_case("head_dim_256", {1, 1, 1, 70, 70, 256, 200}, true, false),
          lightning_case("wide_heads", {1, 1, 1, 40, 40, 300, 5}, true, true)};
}

ExampleCase random_lightning_case(uint64_t seed) {
  CaseRandom random(seed);
  const AttentionShape shape = random_chunked_shape(random);
  const bool slopes = random.chance(0.7);
  return lightning_case("", shape, slopes, random.chance(0.5));
}

// Slopes of the layer's own, and none for decay=0.
ModelAttention lightning_in_model(const Spec& options, const ModelLayer& at) {
  options.require_known({"decay", "form"});
  const LightningSlopes form = parse_lightning_slopes(options.text("form").value_or("code"));
  auto slopes = std::make_shared<Array>();
  if (options.flag("decay", true)) {
    const int64_t first = form == LightningSlopes::paper ? 1 : 0;
    *slopes = form == LightningSlopes::code && at.layers == 1  // its factor needs two layers
                  ? lightning_slopes(at.heads)
                  : lightning_slopes(at.heads, at.layer + first, at.layers, form);
  }
  ModelAttention attention;
  attention.state_shapes = {{1, at.heads, at.head_dim, at.head_dim}};
  attention.over_state = [slopes](const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, std::span<const Tensor> state,
                                  const RunOptions& run) {
    lightning_attention(q, k, v, out, state[0], {*slopes, state[0]}, run);
  };
  return attention;
}

Mechanism lightning_record() {
  Mechanism m;
  m.name = "lightning_attention";
  m.title = "Linear attention with exponential decay, in chunks";
  m.sheets = {5, 6, 7};
  m.arxiv = {"2401.04658", "2405.17381", "2307.14995"};
  m.engine = "chunked";
  m.pass_rank = "m";
  m.card = embedded("lightning/card.md");
  for (const char* name : {"lightning", "recurrent", "chunked"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("lightning/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"state", "S"}};
  m.cases = lightning_cases();
  for (int64_t dim : {64, 128}) {
    for (int64_t tokens : {1024, 4096}) {
      m.bench_cases.push_back(
          lightning_case("d" + std::to_string(dim) + "_n" + std::to_string(tokens),
                         {1, 16, 16, tokens, tokens, dim, dim}, true, false));
    }
  }
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    LightningResult result = lightning_attention(in.at("q"), in.at("k"), in.at("v"),
                                                 lightning_options(in, options), run);
    return named_arrays({"out", "state"}, std::move(result.out), std::move(result.state));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec& options,
                  const RunOptions& run) {
    LightningGradients result = lightning_attention_backward(
        in.at("q"), in.at("k"), in.at("v"), out_gradients.at("out"), out_gradients.at("state"),
        lightning_options(in, options), run);
    NamedArrays arrays = named_arrays({"q", "k", "v"}, std::move(result.q), std::move(result.k),
                                      std::move(result.v));
    if (in.contains("slopes")) arrays.emplace("slopes", std::move(result.slopes));
    if (in.contains("initial_state")) {
      arrays.emplace("initial_state", std::move(result.initial_state));
    }
    return arrays;
  };
  m.bind = bind_lightning;
  m.explain = [](const NamedTensors& in, const Spec&, const RunOptions& run) {
    return explain_chunked(in, false, run);
  };
  m.fill = fill_slopes;
  m.random_case = random_lightning_case;
  m.model_attention = lightning_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> lightning_records() { return {lightning_record()}; }

}  // namespace heed
