#include <cmath>
#include <memory>

#include "engine/operands.h"
#include "heed/error.h"
#include "heed/feature_map.h"
#include "heed/linear_attention.h"
#include "mechanisms/chunked_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

LinearOptions linear_options(const NamedTensors& in, const Spec& options) {
  options.require_known({"causal", "normalize", "eps"});
  LinearOptions chosen;
  chosen.causal = options.flag("causal");
  chosen.normalize = options.flag("normalize", true);
  chosen.eps = options.number("eps").value_or(chosen.eps);
  chosen.lengths = input_or_none(in, "lengths");
  chosen.initial_state = {input_or_none(in, "initial_s"), input_or_none(in, "initial_z")};
  return chosen;
}

// Features are not negative, as those of most maps; then no denominator is close to 0.
void fill_linear(const ExampleCase& example, const std::string& input, uint64_t seed,
                 const Tensor& to_fill) {
  fill_lengths(example, input, seed, to_fill);
  if (input != "q" && input != "k" && input != "initial_z") return;
  Array values = convert(to_fill, DType::f64);
  for (int64_t i = 0; i < values.count(); ++i) {
    values.as<double>()[i] = std::abs(values.as<double>()[i]);
  }
  copy(values, to_fill);
}

cascade::Bindings bind_linear(const NamedTensors& in, const Spec& options) {
  const LinearOptions chosen = linear_options(in, options);
  cascade::Bindings bindings = bind_chunked(in);
  bindings.scalars = {{"eps", chosen.eps}, {"normalize", chosen.normalize ? 1 : 0}};
  if (chosen.initial_state.s.defined()) {
    bindings.tensors["Initial_s"] = to_nd(chosen.initial_state.s);
  }
  if (chosen.initial_state.z.defined()) {
    bindings.tensors["Initial_z"] = to_nd(chosen.initial_state.z);
  }
  const int64_t keys = in.at("k").size(2), offset = keys - in.at("q").size(2);
  std::vector<double> lengths(static_cast<size_t>(in.at("q").size(0)), static_cast<double>(keys));
  if (chosen.lengths.defined()) lengths = to_nd(chosen.lengths).values;
  const auto exists = [lengths](int64_t b, int64_t m) {
    return static_cast<double>(m) < lengths[static_cast<size_t>(b)];
  };
  bindings.predicates["exists"] = [exists](auto i) { return exists(i[0], i[1]); };
  bindings.predicates["keep"] = [exists, offset, causal = chosen.causal](auto i) {
    return exists(i[0], i[2]) && (!causal || i[2] <= i[1] + offset);
  };
  bindings.indices["seen"] = [keys, offset, causal = chosen.causal](auto i) {
    return causal ? std::max<int64_t>(0, i[0] + offset + 1) : keys;
  };
  return bindings;
}

ExampleCase with_state(ExampleCase example, bool normalize) {
  const Dims q = example.inputs[0].second, v = example.inputs[2].second;
  example.inputs.emplace_back("initial_s", Dims{q[0], q[1], q[3], v[3]});
  example.types["initial_s"] = DType::f32;
  if (!normalize) return example;
  example.inputs.emplace_back("initial_z", Dims{q[0], q[1], q[3]});
  example.types["initial_z"] = DType::f32;
  return example;
}

std::vector<ExampleCase> linear_cases() {
  return {
      attention_case("one_number", {1, 1, 1, 1, 1, 1, 1}, "eps=0.5"),
      attention_case("odd", {2, 6, 2, 37, 53, 7, 5}, ""),
      attention_case("causal", {2, 4, 2, 150, 150, 16, 24}, "causal=1"),
      attention_case("plain_sums", {1, 4, 2, 70, 90, 16, 24}, "normalize=0"),
      attention_case("causal_plain_sums", {1, 4, 2, 150, 150, 16, 24}, "causal=1,normalize=0"),
      attention_case("many_features", {1, 2, 1, 70, 70, 700, 12}, "causal=1"),
      attention_case("one_feature", {1, 2, 1, 70, 70, 1, 130}, "causal=1,eps=0.5"),
      attention_case("last_queries", {1, 2, 1, 33, 165, 20, 24}, "causal=1"),
      attention_case("more_queries_than_keys", {1, 2, 1, 50, 21, 8, 8}, "causal=1"),
      attention_case("eps", {1, 2, 2, 40, 40, 5, 9}, "causal=1,eps=3"),
      padded_case("lengths", {4, 4, 2, 60, 145, 16, 16}, ""),
      padded_case("lengths_causal", {4, 4, 2, 100, 145, 16, 16}, "causal=1"),
      padded_case("lengths_one_token", {3, 2, 2, 1, 1, 5, 5}, "causal=1,eps=0.5"),
      with_state(attention_case("state", {2, 4, 2, 33, 75, 12, 17}, ""), true),
      with_state(attention_case("state_causal", {2, 4, 2, 130, 175, 12, 17}, "causal=1"), true),
      with_state(attention_case("state_one_token", {2, 4, 2, 1, 1, 12, 17}, "causal=1"), true),
      with_state(padded_case("state_lengths", {4, 2, 2, 70, 70, 12, 17}, "causal=1"), true),
      with_state(
          attention_case("state_plain_sums", {1, 3, 1, 70, 70, 12, 17}, "normalize=0,causal=1"),
          false),
  };
}

ExampleCase random_linear_case(uint64_t seed) {
  CaseRandom random(seed);
  const AttentionShape shape = random_chunked_shape(random);
  const bool normalize = random.chance(0.8), causal = random.chance(0.6);
  std::string options = causal ? "causal=1" : "causal=0";
  // Without it, the gradient of a row that sees one key is nothing but rounding.
  if (normalize) options += ",eps=" + std::to_string(random.number(0.3, 3));
  if (!normalize) options += ",normalize=0";
  ExampleCase example =
      random.chance(0.3) ? padded_case("", shape, options) : attention_case("", shape, options);
  return random.chance(0.5) ? with_state(std::move(example), normalize) : example;
}

// Without normalize the state has no z: zeros stand in for it here, as in the cascades.
void add_z(NamedArrays& arrays, Array z, const Tensor& q) {
  if (z.view().defined()) {
    arrays.emplace("z", std::move(z));
  } else {
    arrays.emplace("z", Array::zeros(wide_type(q.dtype()), {q.size(0), q.size(1), q.size(3)}));
  }
}

NamedArrays forward_linear(const NamedTensors& in, const Spec& options, const RunOptions& run) {
  LinearResult result =
      linear_attention(in.at("q"), in.at("k"), in.at("v"), linear_options(in, options), run);
  NamedArrays arrays = named_arrays({"out", "s"}, std::move(result.out), std::move(result.s));
  add_z(arrays, std::move(result.z), in.at("q"));
  return arrays;
}

NamedArrays backward_linear(const NamedTensors& in, const NamedTensors& out_gradients,
                            const LinearOptions& chosen, const RunOptions& run) {
  const Tensor z = chosen.normalize ? out_gradients.at("z") : Tensor();
  LinearGradients result =
      linear_attention_backward(in.at("q"), in.at("k"), in.at("v"), out_gradients.at("out"),
                                {out_gradients.at("s"), z}, chosen, run);
  NamedArrays arrays =
      named_arrays({"q", "k", "v"}, std::move(result.q), std::move(result.k), std::move(result.v));
  if (in.contains("initial_s")) arrays.emplace("initial_s", std::move(result.s));
  if (in.contains("initial_z")) arrays.emplace("initial_z", std::move(result.z));
  return arrays;
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& spec, const RunOptions& run) {
  const LinearOptions options = linear_options(in, spec);
  const auto result = std::make_shared<LinearResult>();
  if (!options.causal) *result = linear_attention(in.at("q"), in.at("k"), in.at("v"), options, run);
  return [=](const NamedTensors& out_gradients) {
    LinearOptions backward = options;
    backward.forward_state = {result->s, result->z};
    return backward_linear(in, out_gradients, backward, run);
  };
}

FeatureKind kind_without_weights(const Spec& options) {
  const FeatureKind kind = parse_feature_kind(options.text("map").value_or("elu1"));
  if (kind == FeatureKind::performer) {
    throw Error(
        "linear_attention: map is 'performer', which needs a projection; in a model a map "
        "without weights is needed, such as 'elu1', 'relu' or 'hedgehog_softmax'");
  }
  return kind;
}

// Features of the model's own queries and keys.
ModelAttention linear_in_model(const Spec& options, const ModelLayer& at) {
  options.require_known({"map", "normalize", "eps"});
  const FeatureKind kind = kind_without_weights(options);
  LinearOptions chosen;
  chosen.causal = true;
  chosen.normalize = options.flag("normalize", true);
  chosen.eps = options.number("eps").value_or(chosen.eps);
  const int64_t features = feature_count(kind, at.head_dim);
  ModelAttention attention;
  attention.state_shapes = {{1, at.heads, features, at.head_dim}};
  if (chosen.normalize) attention.state_shapes.push_back({1, at.heads, features});
  attention.over_state = [kind, chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, std::span<const Tensor> state,
                                        const RunOptions& run) {
    LinearOptions going_on = chosen;
    going_on.initial_state.s = state[0];
    if (chosen.normalize) going_on.initial_state.z = state[1];
    const Array phi_q = feature_map(q, kind, {}, run), phi_k = feature_map(k, kind, {}, run);
    linear_attention(phi_q, phi_k, v, out, going_on.initial_state, going_on, run);
  };
  return attention;
}

Mechanism linear_record() {
  Mechanism m;
  m.name = "linear_attention";
  m.title = "Linear attention over features, with a running state";
  m.sheets = {8, 12};
  m.arxiv = {"2402.04347", "2006.16236"};
  m.engine = "chunked";
  m.pass_rank = "m";
  m.card = embedded("linear/card.md");
  for (const char* name : {"linear", "running"}) {
    m.cascades.push_back({name, std::string(embedded(std::string("linear/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"s", "S"}, {"z", "Z"}};
  m.cases = linear_cases();
  for (int64_t features : {64, 128}) {
    for (bool causal : {false, true}) {
      m.bench_cases.push_back(
          attention_case("f" + std::to_string(features) + "_n4096" + (causal ? "_causal" : ""),
                         {1, 16, 16, 4096, 4096, features, 64}, causal ? "causal=1" : ""));
    }
  }
  m.forward = forward_linear;
  m.forward_for_backward = forward_for_backward;
  m.bind = bind_linear;
  m.explain = [](const NamedTensors& in, const Spec&, const RunOptions& run) {
    return explain_chunked(in, false, run);
  };
  m.fill = fill_linear;
  m.random_case = random_linear_case;
  m.model_attention = linear_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> linear_records() { return {linear_record()}; }

}  // namespace heed
