#include <cmath>

#include "heed/taylor_state_attention.h"
#include "kernels/monomials.h"
#include "mechanisms/chunked_case.h"
#include "mechanisms/embedded.h"
#include "mechanisms/taylor_state/path.h"

namespace heed {

namespace {

TaylorOptions taylor_options(const NamedTensors& in, const Spec& options) {
  options.require_known({"order", "scale"});
  TaylorOptions chosen;
  chosen.order = options.integer("order").value_or(chosen.order);
  chosen.scale = options.number("scale");
  chosen.initial_state = {input_or_none(in, "initial_s"), input_or_none(in, "initial_z")};
  return chosen;
}

cascade::Bindings bind_taylor(const NamedTensors& in, const Spec& options) {
  const TaylorOptions chosen = taylor_options(in, options);
  const int64_t dim = in.at("q").size(3);
  const double scale = chosen.scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
  cascade::Bindings bindings = bind_chunked(in);
  bindings.scalars = {{"scale", scale}, {"order", static_cast<double>(chosen.order)}};
  if (chosen.initial_state.s.defined()) {
    bindings.tensors["Initial_s"] = to_nd(chosen.initial_state.s);
    bindings.tensors["Initial_z"] = to_nd(chosen.initial_state.z);
  }
  const kernels::MonomialList list(dim, static_cast<int>(chosen.order), 512);
  const auto factors = list.factors();
  cascade::NdArray degree{{list.size()}, {}}, coefficient{{list.size()}, list.coefficients(scale)};
  for (const auto& f : factors) degree.values.push_back(f.degree);
  bindings.tensors["Degree"] = std::move(degree);
  bindings.tensors["Coefficient"] = std::move(coefficient);
  const char* names[] = {"ea", "eb", "ec"};
  for (size_t n = 0; n < 3; ++n) {
    bindings.indices[names[n]] = [factors, n](auto i) {
      return factors[static_cast<size_t>(i[0])].element[n];
    };
  }
  return bindings;
}

ExampleCase taylor_case(const std::string& name, const AttentionShape& s, int64_t order,
                        const std::string& more, bool state) {
  ExampleCase example = attention_case(name, s, "order=" + std::to_string(order) + more);
  if (!state) return example;
  const int64_t n = taylor_state_size(s.dim, order);
  example.inputs.emplace_back("initial_s", Dims{s.batch, s.heads, n, s.value_dim});
  example.inputs.emplace_back("initial_z", Dims{s.batch, s.heads, n});
  example.types["initial_s"] = example.types["initial_z"] = DType::f32;
  return example;
}

// An initial state as if of keys before: its denominator is that of many tokens, whatever the query.
void fill_taylor(const ExampleCase&, const std::string& input, uint64_t, const Tensor& to_fill) {
  if (input != "initial_z") return;
  Array values = convert(to_fill, DType::f64);
  const int64_t n = to_fill.size(2);
  for (int64_t i = 0; i < values.count(); ++i) {
    double& z = values.as<double>()[i];
    z = i % n == 0 ? 30 : 0.3 * z;
  }
  copy(values, to_fill);
}

std::vector<ExampleCase> taylor_cases() {
  // Odd orders with small scores, which keep their denominators away from 0.
  return {taylor_case("one_token", {1, 2, 2, 1, 1, 3, 5}, 2, "", true),
          taylor_case("order0", {1, 2, 1, 70, 70, 3, 5}, 0, "", false),
          taylor_case("order1", {1, 4, 2, 70, 70, 5, 9}, 1, ",scale=0.1", true),
          taylor_case("order2", {2, 4, 2, 120, 120, 6, 17}, 2, "", false),
          taylor_case("order3", {1, 2, 1, 70, 70, 6, 9}, 3, ",scale=0.1", true),
          taylor_case("one_number", {1, 1, 1, 1, 1, 1, 1}, 3, ",scale=0.1", true),
          taylor_case("several_tiles", {1, 1, 1, 60, 60, 34, 6}, 2, "", true),
          taylor_case("third_powers", {1, 1, 1, 55, 55, 15, 3}, 3, ",scale=0.05", false),
          taylor_case("last_queries", {1, 3, 1, 20, 110, 5, 7}, 2, "", true),
          taylor_case("more_queries_than_keys", {1, 2, 1, 50, 21, 5, 8}, 2, "", false),
          taylor_case("negative_scale", {1, 2, 2, 40, 40, 5, 8}, 2, ",scale=-0.3", false),
          taylor_case("zero_scale", {1, 2, 2, 40, 40, 5, 8}, 2, ",scale=0", false)};
}

ExampleCase random_taylor_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape shape = random_chunked_shape(random);
  const int64_t order = random.between(0, 3);
  shape.dim = order < 2 ? shape.dim : random.between(1, order == 2 ? 12 : 6);
  const double scale = order % 2 == 1 ? random.number(0, 0.1) : random.number(-0.5, 1);
  // Where a row sees one key alone, its gradient is nothing but rounding.
  const bool state = shape.keys < 4 || random.chance(0.5);
  return taylor_case("", shape, order, ",scale=" + std::to_string(scale), state);
}

NamedArrays forward_taylor(const NamedTensors& in, const Spec& options, const RunOptions& run) {
  TaylorResult result =
      taylor_state_attention(in.at("q"), in.at("k"), in.at("v"), taylor_options(in, options), run);
  return named_arrays({"out", "s", "z"}, std::move(result.out), std::move(result.s),
                      std::move(result.z));
}

NamedArrays backward_taylor(const NamedTensors& in, const NamedTensors& out_gradients,
                            const Spec& options, const RunOptions& run) {
  TaylorGradients result = taylor_state_attention_backward(
      in.at("q"), in.at("k"), in.at("v"), out_gradients.at("out"),
      {out_gradients.at("s"), out_gradients.at("z")}, taylor_options(in, options), run);
  NamedArrays arrays =
      named_arrays({"q", "k", "v"}, std::move(result.q), std::move(result.k), std::move(result.v));
  if (in.contains("initial_s")) {
    arrays.emplace("initial_s", std::move(result.s));
    arrays.emplace("initial_z", std::move(result.z));
  }
  return arrays;
}

std::vector<PathAnswer> explain_taylor(const NamedTensors& in, const Spec& options,
                                       const RunOptions& run) {
  const bool pairs =
      taylor_by_pairs(in.at("q"), in.at("k"), in.at("v"), taylor_options(in, options));
  std::vector<PathAnswer> answers =
      pairs ? explain_attention(in, options, run) : explain_chunked(in, true, run);
  for (PathAnswer& answer : answers) {
    answer.path = (pairs ? "all pairs, " : "state, ") + answer.path;
  }
  return answers;
}

ModelAttention taylor_in_model(const Spec& options, const ModelLayer& at) {
  const TaylorOptions chosen = taylor_options({}, options);
  const int64_t monomials = taylor_state_size(at.head_dim, chosen.order);
  ModelAttention attention;
  attention.state_shapes = {{1, at.heads, monomials, at.head_dim}, {1, at.heads, monomials}};
  attention.over_state = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, std::span<const Tensor> state,
                                  const RunOptions& run) {
    TaylorOptions going_on = chosen;
    going_on.initial_state = {state[0], state[1]};
    taylor_state_attention(q, k, v, out, going_on.initial_state, going_on, run);
  };
  return attention;
}

Mechanism taylor_record() {
  Mechanism m;
  m.name = "taylor_state_attention";
  m.title = "Softmax attention by Taylor polynomials, as a recurrence";
  m.sheets = {12};
  m.arxiv = {"2507.23632"};
  m.engine = "chunked";
  m.pass_rank = "m";
  m.card = embedded("taylor_state/card.md");
  for (const char* name : {"taylor", "recurrent"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("taylor_state/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"s", "S"}, {"z", "Z"}};
  m.cases = taylor_cases();
  for (int64_t dim : {16, 32, 64}) {
    m.bench_cases.push_back(taylor_case("d" + std::to_string(dim) + "_n4096",
                                        {1, 4, 4, 4096, 4096, dim, 64}, 2, "", false));
  }
  m.forward = forward_taylor;
  m.backward = backward_taylor;
  m.bind = bind_taylor;
  m.explain = explain_taylor;
  m.fill = fill_taylor;
  m.random_case = random_taylor_case;
  m.model_attention = taylor_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> taylor_state_records() { return {taylor_record()}; }

}  // namespace heed
