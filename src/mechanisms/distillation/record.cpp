#include <cmath>

#include "engine/candidates.h"
#include "heed/attention_distillation_loss.h"
#include "mechanisms/distillation/path.h"
#include "mechanisms/embedded.h"
#include "mechanisms/registry.h"

namespace heed {

namespace {

DistillationOptions distillation_options(const Spec& options) {
  options.require_known({"causal", "scale"});
  return {.causal = options.flag("causal"), .scale = options.number("scale")};
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  const Tensor &q = in.at("q"), &k = in.at("k"), &fk = in.at("feature_k");
  const DistillationOptions chosen = distillation_options(options);
  const int64_t offset = k.size(2) - q.size(2);
  const auto heads_of = [&](const Tensor& t) {
    const int64_t group = q.size(1) / t.size(1);
    return [group](std::span<const int64_t> i) { return i[0] / group; };
  };
  cascade::Bindings bindings;
  bindings.tensors = {{"TQ", to_nd(q)},
                      {"TK", to_nd(k)},
                      {"Feature_q", to_nd(in.at("feature_q"))},
                      {"Feature_k", to_nd(fk)}};
  bindings.scalars["scale"] = chosen.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  bindings.scalars["floor"] = 1e-12;
  bindings.indices["gk"] = heads_of(k);
  bindings.indices["gf"] = heads_of(fk);
  bindings.predicates["keep"] = [causal = chosen.causal, offset](std::span<const int64_t> i) {
    return !causal || i[1] <= i[0] + offset;
  };
  return bindings;
}

// Features are positive, as feature maps make them: e^x. Every seventh is so small that weights of the
// student fall below the floor where `far` is set.
void fill(const ExampleCase& example, const std::string& input, uint64_t /*seed*/,
          const Tensor& to_fill) {
  if (input != "feature_q" && input != "feature_k") return;
  const bool far = example.name.find("floor") != std::string::npos;
  Array wide = convert(to_fill, DType::f64);
  const int64_t width = to_fill.size(3);
  for (int64_t i = 0; i < wide.count(); ++i) {
    const bool small = far && input == "feature_k" && i / width % 7 == 0;
    wide.as<double>()[i] = small ? 1e-16 : std::exp(wide.as<double>()[i]);
  }
  copy(wide, to_fill);
}

struct Shape {
  int64_t batch, heads, k_heads, feature_heads, queries, keys, dim, features;
};

ExampleCase distillation_case(std::string name, const Shape& s, std::string options = "",
                              bool float32_features = false) {
  ExampleCase example{std::move(name),
                      {{"q", {s.batch, s.heads, s.queries, s.dim}},
                       {"k", {s.batch, s.k_heads, s.keys, s.dim}},
                       {"feature_q", {s.batch, s.heads, s.queries, s.features}},
                       {"feature_k", {s.batch, s.feature_heads, s.keys, s.features}}},
                      std::move(options)};
  if (float32_features) example.types = {{"feature_q", DType::f32}, {"feature_k", DType::f32}};
  return example;
}

Mechanism distillation_record() {
  Mechanism m;
  m.name = "attention_distillation_loss";
  m.title = "Cross-entropy of softmax weights against the weights of a linear attention";
  m.sheets = {8};
  m.arxiv = {"2402.04347"};
  m.engine = "none";
  m.pass_rank = "m";
  m.card = embedded("distillation/card.md");
  m.cascades = {{"distillation", std::string(embedded("distillation/distillation.cascade"))}};
  m.outputs = {{"loss", "LOSS"}};
  m.cases = {
      distillation_case("one_token", {1, 1, 1, 1, 1, 1, 1, 1}),
      distillation_case("odd", {2, 3, 3, 3, 37, 53, 7, 11}),
      distillation_case("causal", {1, 2, 2, 2, 70, 70, 16, 32}, "causal=1"),
      distillation_case("grouped", {2, 6, 2, 3, 33, 45, 12, 8}, "causal=1"),
      distillation_case("grouped_many_keys", {2, 6, 2, 3, 133, 145, 17, 9}, "causal=1"),
      distillation_case("feature_heads_of_q", {1, 4, 2, 4, 20, 30, 8, 16}),
      distillation_case("more_queries_than_keys", {1, 2, 1, 1, 90, 21, 8, 8}, "causal=1"),
      distillation_case("more_keys_than_queries", {1, 2, 1, 1, 21, 90, 8, 8}, "causal=1,scale=0.9"),
      distillation_case("scale", {1, 2, 2, 2, 30, 30, 8, 8}, "scale=-0.7"),
      distillation_case("float32_features", {1, 2, 2, 2, 30, 30, 8, 8}, "causal=1", true),
      distillation_case("below_the_floor", {1, 2, 2, 2, 40, 40, 8, 8}, "", true),
      distillation_case("several_pieces", {1, 1, 1, 1, 150, 600, 20, 300}, "causal=1"),
      // Large scores: with 2,500 nearly equal weights every gradient would be the rounding of a sum.
      distillation_case("several_strips", {1, 1, 1, 1, 70, 2500, 4, 6}, "causal=1,scale=3"),
      distillation_case("several_query_strips", {1, 1, 1, 1, 2300, 20, 4, 6}),
  };
  for (bool causal : {false, true}) {
    m.bench_cases.push_back(
        distillation_case(std::string("n1024_d64_f128") + (causal ? "_causal" : ""),
                          {1, 8, 8, 8, 1024, 1024, 64, 128}, causal ? "causal=1" : ""));
  }
  m.bench_cases.push_back(
      distillation_case("n8192_d64_f128_causal", {1, 1, 1, 1, 8192, 8192, 64, 128}, "causal=1"));
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays({"loss"}, attention_distillation_loss(
                                      in.at("q"), in.at("k"), in.at("feature_q"),
                                      in.at("feature_k"), distillation_options(options), run));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec& options,
                  const RunOptions& run) {
    DistillationGradients gradients = attention_distillation_loss_backward(
        out_gradients.at("loss"), in.at("q"), in.at("k"), in.at("feature_q"), in.at("feature_k"),
        distillation_options(options), run);
    return named_arrays({"feature_q", "feature_k"}, std::move(gradients.feature_q),
                        std::move(gradients.feature_k));
  };
  m.bind = bind;
  m.explain = [](const NamedTensors& in, const Spec&, const RunOptions& run) {
    return explain_candidates(in.at("q").dtype(),
                              no_half_operands(in.at("feature_q").dtype(), in.at("k").size(2)), "",
                              run);
  };
  m.fill = fill;
  return m;
}

}  // namespace

std::vector<Mechanism> distillation_records() { return {distillation_record()}; }

}  // namespace heed
