#include <algorithm>
#include <memory>

#include "base/philox.h"
#include "heed/head_gated_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

HeadGatedOptions options_of(const NamedTensors& in, const Spec& spec) {
  require_attention_keys(spec);
  return {masks_of(in, spec), spec.number("scale")};
}

ExampleCase with_gates(ExampleCase example, DType type = DType::f64) {
  const Dims& q = example.inputs[0].second;
  example.inputs.emplace_back("gates", Dims{q[0], q[1], q[2]});
  if (type == DType::f32) example.types["gates"] = type;
  return example;
}

constexpr const char kAllOpen[] = "all gates open", kNoneOpen[] = "no gate open";
constexpr const char kHalfOfHeads[] = "half of the heads open",
                     kHalfOpen[] = "half of the gates open";

ExampleCase gated_case(const char* name, const AttentionShape& shape, const char* options,
                       const char* gates) {
  ExampleCase example = with_gates(attention_case(name, shape, options));
  example.data = gates;
  return example;
}

/// Gates about as large as those of a router, half of them zero where the case does not say.
void fill(const ExampleCase& example, const std::string& input, uint64_t seed,
          const Tensor& to_fill) {
  fill_lengths(example, input, seed, to_fill);
  if (input != "gates") return;
  const bool all = example.data == kAllOpen, none = example.data == kNoneOpen;
  const bool whole_heads = example.data == kHalfOfHeads;
  Array gates = convert(to_fill, DType::f64);
  for (int64_t n = 0; n < gates.count(); ++n) {
    const bool half = whole_heads ? n / to_fill.size(2) % 2 == 1
                                  : (philox_word(seed, static_cast<uint64_t>(n)) & 1) != 0;
    gates.as<double>()[n] *= none || (half && !all) ? 0 : 0.25;
  }
  copy(gates, to_fill);
}

/// Queries with an open gate, a head of a sequence on average.
std::map<std::string, int64_t> open_queries(const NamedTensors& in) {
  const Array gates = convert(in.at("gates"), DType::f64);
  const double* values = gates.as<double>();
  const int64_t open = gates.count() - std::count(values, values + gates.count(), 0.0);
  const int64_t heads = std::max<int64_t>(1, in.at("gates").size(0) * in.at("gates").size(1));
  return {{"p", (open + heads - 1) / heads}};
}

std::vector<ExampleCase> cases() {
  std::vector<ExampleCase> all;
  for (const ExampleCase& example : common_attention_cases()) all.push_back(with_gates(example));
  all.push_back(gated_case("all_active", {2, 4, 2, 60, 70, 16, 16}, "causal=1", kAllOpen));
  all.push_back(gated_case("none_active", {1, 2, 1, 20, 30, 8, 8}, "", kNoneOpen));
  all.push_back(gated_case("half_of_the_heads", {1, 6, 2, 40, 50, 12, 12}, "", kHalfOfHeads));
  all.push_back(with_gates(attention_case("gates_in_float32", {1, 4, 4, 33, 33, 8, 8}, "causal=1"),
                           DType::f32));
  return all;
}

ExampleCase random_gated_case(uint64_t seed) {
  CaseRandom random(seed);
  return with_gates(random_attention_case(random), random.chance(0.3) ? DType::f32 : DType::f64);
}

Mechanism record() {
  Mechanism m;
  m.name = "head_gated_attention";
  m.title = "Softmax attention with a gate per head and token; zero gates cost nothing";
  m.sheets = {17};
  m.arxiv = {"2410.11842"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("head_gated/card.md");
  m.cascades = {{"head_gated", std::string(embedded("head_gated/head_gated.cascade"))}};
  m.outputs = {{"out", "O"}};
  m.cases = cases();
  const AttentionShape large{1, 8, 8, 4096, 4096, 64, 64};
  m.bench_cases = {gated_case("n4096_all_active", large, "", kAllOpen),
                   gated_case("n4096_half_of_the_heads", large, "", kHalfOfHeads),
                   gated_case("n4096_half_of_the_rows", large, "", kHalfOpen),
                   gated_case("n4096_causal_all_active", large, "causal=1", kAllOpen),
                   gated_case("n4096_causal_half_of_the_rows", large, "causal=1", kHalfOpen)};
  m.forward = [](const NamedTensors& in, const Spec& spec, const RunOptions& run) {
    const Tensor &q = in.at("q"), &k = in.at("k"), &v = in.at("v");
    Array out(q.dtype(), {q.size(0), q.size(1), q.size(2), v.size(3)});
    head_gated_attention(q, k, v, in.at("gates"), out, {}, {}, options_of(in, spec), run);
    return named_arrays({"out"}, std::move(out));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec& spec,
                              const RunOptions& run) -> BackwardCall {
    const Tensor q = in.at("q"), k = in.at("k"), v = in.at("v"), gates = in.at("gates");
    const HeadGatedOptions options = options_of(in, spec);
    const auto result =
        std::make_shared<const HeadGatedResult>(head_gated_attention(q, k, v, gates, options, run));
    return [=](const NamedTensors& out_gradients) {
      HeadGatedGradients gradients = head_gated_attention_backward(
          out_gradients.at("out"), q, k, v, gates, result->attention, result->lse, options, run);
      return named_arrays({"q", "k", "v", "gates"}, std::move(gradients.q), std::move(gradients.k),
                          std::move(gradients.v), std::move(gradients.gates));
    };
  };
  m.bind = [](const NamedTensors& in, const Spec& spec) {
    cascade::Bindings bindings = bind_attention(in, spec);
    bindings.tensors["Gates"] = to_nd(in.at("gates"));
    return bindings;
  };
  m.needed_sizes = open_queries;
  m.explain = explain_attention;
  m.fill = fill;
  m.random_case = random_gated_case;
  return m;
}

}  // namespace

std::vector<Mechanism> head_gated_records() { return {record()}; }

}  // namespace heed
