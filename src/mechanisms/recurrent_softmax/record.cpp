#include <array>
#include <memory>

#include "engine/tiled/problem.h"
#include "heed/recurrent_softmax_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

RecurrentSoftmaxOptions recurrent_options(const NamedTensors& in, const Spec& options) {
  options.require_known({"normalizer", "order", "causal", "scale", "score_clamp", "eps"});
  RecurrentSoftmaxOptions chosen;
  chosen.normalizer = parse_normalizer(options.text("normalizer").value_or("softmax"));
  chosen.order = options.integer("order");
  chosen.causal = options.flag("causal", true);
  chosen.scale = options.number("scale");
  chosen.score_clamp = options.number("score_clamp");
  chosen.eps = options.number("eps").value_or(chosen.eps);
  chosen.gate = input_or_none(in, "gate");
  return chosen;
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  const RecurrentSoftmaxOptions chosen = recurrent_options(in, options);
  const std::string masks =
      std::string("causal=") + (chosen.causal ? "1" : "0") +
      (options.has("scale") ? ",scale=" + options.text("scale").value() : std::string());
  cascade::Bindings bindings = bind_attention(in, Spec::parse_options(masks));
  bindings.sizes["ORDER"] = chosen.order.value_or(0);
  bindings.scalars["taylor"] = chosen.order ? 1 : 0;
  bindings.scalars["eps"] = chosen.eps;
  if (chosen.score_clamp) bindings.scalars["most"] = *chosen.score_clamp;
  if (chosen.gate.defined()) bindings.tensors["Gate"] = to_nd(chosen.gate);
  return bindings;
}

ExampleCase with_gate(ExampleCase example, bool float32) {
  const Dims q = example.inputs[0].second;
  example.inputs.emplace_back("gate", Dims{q[0], q[1], q[2]});
  if (float32) example.types["gate"] = DType::f32;
  return example;
}

std::vector<ExampleCase> recurrent_cases() {
  std::vector<ExampleCase> cases;
  for (Normalizer normalizer : kNormalizers) {
    const std::string name = name_of(normalizer);
    const auto make = [&](const char* what, const AttentionShape& shape, const std::string& more) {
      return attention_case(name + "_" + what, shape, "normalizer=" + name + "," + more);
    };
    cases.push_back(make("causal_gqa", {2, 4, 2, 33, 65, 20, 24}, "causal=1"));
    cases.push_back(make("full", {1, 2, 2, 70, 70, 16, 17}, "causal=0"));
    cases.push_back(make("more_queries_than_keys", {1, 2, 1, 30, 21, 8, 8}, "causal=1"));
    cases.push_back(make("few_rows", {2, 4, 2, 3, 75, 40, 40}, "causal=1"));
    cases.push_back(with_gate(
        make("gate_clamp", {1, 2, 2, 40, 40, 12, 9}, "causal=1,score_clamp=0.5,eps=0.1"), false));
    cases.push_back(make("order2", {1, 2, 2, 50, 60, 16, 12}, "causal=1,order=2"));
    cases.push_back(with_gate(
        make("order3_gate", {1, 4, 2, 25, 30, 10, 8}, "causal=0,order=3,scale=0.2"), true));
  }
  const auto add = [&](const char* name, const AttentionShape& shape, const char* options) {
    cases.push_back(attention_case(name, shape, options));
  };
  add("one_key", {1, 1, 1, 1, 1, 1, 1}, "normalizer=none,causal=1");
  add("one_value_dim", {1, 2, 2, 20, 20, 6, 1}, "normalizer=rms,causal=1");
  add("several_tiles", {1, 1, 1, 201, 530, 24, 40}, "normalizer=l2,causal=1");
  add("head_dim_256", {1, 1, 1, 26, 40, 256, 256}, "normalizer=layer,causal=1");
  add("few_rows_many_keys", {1, 3, 1, 1, 2300, 10, 10}, "normalizer=rms,causal=1,order=2");
  add("order0", {1, 2, 2, 20, 25, 6, 5}, "normalizer=softmax,causal=1,order=0");
  add("order1_clamp", {1, 2, 2, 20, 25, 6, 5}, "normalizer=none,causal=1,order=1,score_clamp=0.3");
  add("order8", {1, 2, 2, 40, 45, 16, 16}, "normalizer=softmax,causal=1,order=8");
  add("negative_scale", {1, 2, 2, 30, 30, 8, 8}, "normalizer=clamped,causal=1,scale=-0.4");
  add("zero_scale", {1, 1, 1, 30, 30, 8, 8}, "normalizer=l2,causal=1,scale=0");
  return cases;
}

ExampleCase random_recurrent_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape s;
  s.batch = random.between(1, 2);
  s.kv_heads = random.between(1, 2);
  s.heads = s.kv_heads * random.between(1, 3);
  s.queries = random.chance(0.3) ? random.between(1, 6) : random.between(1, 80);
  s.keys = random.chance(0.15) ? random.between(150, 400) : random.between(2, 90);
  s.dim = random.between(1, 48);
  s.value_dim = random.between(2, 48);
  const auto normalizer = random.between(0, static_cast<int64_t>(std::size(kNormalizers)) - 1);
  std::string options =
      std::string("normalizer=") + name_of(kNormalizers[static_cast<size_t>(normalizer)]);
  options += random.chance(0.5) ? ",causal=1" : ",causal=0";
  // An odd order may have a denominator near 0, where every digit counts.
  if (random.chance(0.4)) options += ",order=" + std::to_string(2 * random.between(0, 3));
  if (random.chance(0.3)) options += ",score_clamp=" + std::to_string(random.number(-0.5, 2));
  if (random.chance(0.3)) options += ",scale=" + std::to_string(random.number(-0.4, 0.4));
  if (random.chance(0.3)) options += ",eps=" + std::to_string(random.number(0, 0.1));
  ExampleCase example = attention_case("", s, options);
  return random.chance(0.5) ? with_gate(std::move(example), random.chance(0.5)) : example;
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& spec, const RunOptions& run) {
  struct Saved {
    Array core, statistic;
  };
  const RecurrentSoftmaxOptions options = recurrent_options(in, spec);
  const Tensor q = in.at("q"), k = in.at("k"), v = in.at("v");
  const Dims shape{q.size(0), q.size(1), q.size(2), v.size(3)};
  const DType type = wide_type(q.dtype());
  Array out(q.dtype(), shape);
  const auto saved = std::make_shared<Saved>();
  saved->core = Array(type, shape);
  saved->statistic = Array(type, {q.size(0), q.size(1), q.size(2)});
  recurrent_softmax_attention(q, k, v, out, saved->core, saved->statistic, options, run);
  return [=](const NamedTensors& out_gradients) {
    RecurrentSoftmaxGradients gradients = recurrent_softmax_attention_backward(
        out_gradients.at("out"), q, k, v, saved->core, saved->statistic, options, run);
    NamedArrays arrays;
    arrays.emplace("q", std::move(gradients.q));
    arrays.emplace("k", std::move(gradients.k));
    arrays.emplace("v", std::move(gradients.v));
    if (options.gate.defined()) arrays.emplace("gate", std::move(gradients.gate));
    return arrays;
  };
}

Mechanism recurrent_record() {
  Mechanism m;
  m.name = "recurrent_softmax_attention";
  m.title = "Softmax attention as a recurrent network: other denominators, Taylor orders";
  m.sheets = {12};
  m.arxiv = {"2507.23632"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("recurrent_softmax/card.md");
  for (Normalizer normalizer : kNormalizers) {
    const std::string name = name_of(normalizer);
    m.cascades.push_back({name, std::string(embedded("recurrent_softmax/" + name + ".cascade")),
                          "normalizer=" + name});
  }
  m.outputs = {{"out", "O"}};
  m.cases = recurrent_cases();
  m.bench_cases = {
      attention_case("l2_d64_n1024", {1, 8, 8, 1024, 1024, 64, 64}, "normalizer=l2,causal=1"),
      attention_case("order2_d64_n1024", {1, 8, 8, 1024, 1024, 64, 64},
                     "normalizer=softmax,causal=1,order=2"),
      attention_case("rms_d128_n4096", {1, 1, 1, 4096, 4096, 128, 128}, "normalizer=rms,causal=1")};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    NamedArrays arrays;
    arrays.emplace("out", recurrent_softmax_attention(in.at("q"), in.at("k"), in.at("v"),
                                                      recurrent_options(in, options), run));
    return arrays;
  };
  m.forward_for_backward = forward_for_backward;
  m.bind = bind;
  m.explain = explain_attention;
  m.random_case = random_recurrent_case;
  m.model_attention = [](const Spec& options, const ModelLayer&) {
    RecurrentSoftmaxOptions chosen = recurrent_options({}, options);
    chosen.causal = true;
    return ModelAttention{.over_cache = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const RunOptions& run) {
      recurrent_softmax_attention(q, k, v, out, {}, {}, chosen, run);
    }};
  };
  return m;
}

}  // namespace

std::vector<Mechanism> recurrent_softmax_records() { return {recurrent_record()}; }

}  // namespace heed
