#include <memory>

#include "engine/operands.h"
#include "heed/relu_linear_attention.h"
#include "mechanisms/chunked_case.h"
#include "mechanisms/embedded.h"
#include "mechanisms/registry.h"

namespace heed {

namespace {

ReluLinearOptions relu_options(const Spec& options) {
  options.require_known({"clamp"});
  return {.clamp = options.number("clamp").value_or(100)};
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  const int64_t group = in.at("q").size(1) / in.at("k").size(1);
  cascade::Bindings bindings;
  bindings.tensors = {{"Q", to_nd(in.at("q"))},
                      {"K", to_nd(in.at("k"))},
                      {"V", to_nd(in.at("v"))},
                      {"Temperature", to_nd(in.at("temperature"))}};
  bindings.scalars["clamp"] = relu_options(options).clamp;
  bindings.indices["g"] = [group](std::span<const int64_t> i) { return i[0] / group; };
  return bindings;
}

struct Shape {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
};

ExampleCase relu_case(std::string name, const Shape& s, std::string options = "",
                      bool float32_temperature = true) {
  ExampleCase example{std::move(name),
                      {{"q", {s.batch, s.heads, s.queries, s.dim}},
                       {"k", {s.batch, s.kv_heads, s.keys, s.dim}},
                       {"v", {s.batch, s.kv_heads, s.keys, s.value_dim}},
                       {"temperature", {s.heads}}},
                      std::move(options)};
  if (float32_temperature) example.types["temperature"] = DType::f32;
  return example;
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& spec, const RunOptions& run) {
  struct Saved {
    Array s, z;
  };
  const Tensor q = in.at("q"), k = in.at("k"), v = in.at("v"), temperature = in.at("temperature");
  const DType type = wide_type(q.dtype());
  const auto saved = std::make_shared<Saved>();
  saved->s = Array(type, {q.size(0), q.size(1), q.size(3), v.size(3)});
  saved->z = Array(type, {q.size(0), q.size(1), q.size(3)});
  const ReluLinearOptions options = relu_options(spec);
  Array out(q.dtype(), {q.size(0), q.size(1), q.size(2), v.size(3)});
  relu_linear_attention(q, k, v, temperature, out, {saved->s, saved->z}, options, run);
  return [=](const NamedTensors& out_gradients) {
    ReluLinearOptions backward = options;
    backward.forward_state = {saved->s, saved->z};
    ReluLinearGradients gradients = relu_linear_attention_backward(out_gradients.at("out"), q, k, v,
                                                                   temperature, backward, run);
    return named_arrays({"q", "k", "v", "temperature"}, std::move(gradients.q),
                        std::move(gradients.k), std::move(gradients.v),
                        std::move(gradients.temperature));
  };
}

Mechanism relu_linear_record() {
  Mechanism m;
  m.name = "relu_linear_attention";
  m.title = "Linear attention with rectified features and a clamped denominator";
  m.sheets = {10};
  m.arxiv = {"2501.16182"};
  m.engine = "chunked";
  m.pass_rank = "m";
  m.card = embedded("relu_linear/card.md");
  m.cascades = {{"relu_linear", std::string(embedded("relu_linear/relu_linear.cascade"))},
                {"linear", std::string(embedded("relu_linear/linear.cascade"))}};
  m.outputs = {{"out", "O"}};
  m.cases = {relu_case("one_token", {1, 1, 1, 1, 1, 1, 1}),
             relu_case("odd", {2, 3, 3, 37, 37, 7, 5}),
             relu_case("half_clamped", {1, 2, 2, 70, 70, 16, 16}, "clamp=220"),  // of about 6 * 35
             relu_case("all_clamped", {1, 2, 2, 40, 40, 16, 16}, "clamp=1e5"),
             relu_case("none_clamped", {1, 2, 2, 40, 40, 16, 16}, "clamp=1e-3"),
             relu_case("same_type_temperature", {1, 2, 2, 30, 30, 8, 12}, "clamp=20", false),
             relu_case("grouped", {2, 6, 2, 33, 65, 20, 24}, "clamp=50"),
             relu_case("more_queries_than_keys", {1, 2, 1, 90, 21, 8, 8}, "clamp=10"),
             relu_case("head_dim_256", {1, 1, 1, 26, 40, 256, 256}),
             relu_case("many_shares", {1, 1, 1, 300, 700, 12, 20}, "clamp=1300")};
  for (const auto& [name, tokens] : {std::pair{"stage_1_of_224", 3136}, {"stage_3_of_224", 196}}) {
    m.bench_cases.push_back(relu_case(name, {4, 12, 12, tokens, tokens, 32, 32}));
  }
  m.bench_cases.push_back(relu_case("n65536_d64", {1, 1, 1, 65536, 65536, 64, 64}));
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays(
        {"out"}, relu_linear_attention(in.at("q"), in.at("k"), in.at("v"), in.at("temperature"),
                                       relu_options(options), run));
  };
  m.forward_for_backward = forward_for_backward;
  m.bind = bind;
  m.explain = [](const NamedTensors& in, const Spec&, const RunOptions& run) {
    return explain_chunked(in, false, run);
  };
  return m;
}

}  // namespace

std::vector<Mechanism> relu_linear_records() { return {relu_linear_record()}; }

}  // namespace heed
