#include <cmath>
#include <memory>

#include "engine/operands.h"
#include "heed/error.h"
#include "heed/magnitude_aware_linear_attention.h"
#include "mechanisms/chunked_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

MagnitudeAwareOptions mala_options(const NamedTensors& in, const Spec& options) {
  options.require_known({"causal", "form", "height", "width", "scale", "eps"});
  MagnitudeAwareOptions chosen;
  chosen.causal = options.flag("causal");
  chosen.form = parse_magnitude_aware_form(options.text("form").value_or("code"));
  if (options.has("width")) {
    chosen.rope = Grid{options.integer("height").value_or(1), *options.integer("width")};
    if (chosen.rope->height < 1 || chosen.rope->width < 1) {
      throw Error("height=" + std::to_string(chosen.rope->height) +
                  ",width=" + std::to_string(chosen.rope->width) + ": 1 or more is needed of both");
    }
  }
  chosen.scale = options.number("scale");
  chosen.eps = options.number("eps").value_or(chosen.eps);
  chosen.initial_state = {input_or_none(in, "initial_s"), input_or_none(in, "initial_k_sum"),
                          input_or_none(in, "initial_v_sum"), input_or_none(in, "initial_count")};
  return chosen;
}

using cascade::NdArray;

// Rows and columns of tokens on the grid, and radians a step, from the text of the sheet.
void bind_grid(const MagnitudeAwareOptions& chosen, const std::vector<double>& before,
               int64_t queries, int64_t keys, int64_t dim, cascade::Bindings& bindings) {
  const auto batch = static_cast<int64_t>(before.size());
  const int64_t width = chosen.rope ? chosen.rope->width : 1;
  const auto places = [&](int64_t tokens, int64_t offset, bool row) {
    NdArray array{{batch, tokens}, {}};
    for (double count : before) {
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t place = std::max<int64_t>(0, static_cast<int64_t>(count) + i + offset);
        array.values.push_back(static_cast<double>(row ? place / width : place % width));
      }
    }
    return array;
  };
  const int64_t offset = keys - queries;
  bindings.tensors["RowQ"] = places(queries, offset, true);
  bindings.tensors["ColumnQ"] = places(queries, offset, false);
  bindings.tensors["RowK"] = places(keys, 0, true);
  bindings.tensors["ColumnK"] = places(keys, 0, false);
  NdArray row{{dim}, {}}, column{{dim}, {}}, sign{{dim}, {}};
  for (int64_t e = 0; e < dim; ++e) {
    const int64_t half = dim / 2, pairs = std::max<int64_t>(1, dim / 4),
                  t = e % std::max<int64_t>(1, half) / 2;
    const double turn =
        pairs == 1 ? 1
                   : std::pow(10000.0, -static_cast<double>(t) / static_cast<double>(pairs - 1));
    row.values.push_back(chosen.rope && e < half ? turn : 0);
    column.values.push_back(chosen.rope && e >= half ? turn : 0);
    sign.values.push_back(e % 2 == 0 ? -1 : 1);
  }
  bindings.tensors["TurnRow"] = std::move(row);
  bindings.tensors["TurnColumn"] = std::move(column);
  bindings.tensors["Sign"] = std::move(sign);
}

cascade::Bindings bind_mala(const NamedTensors& in, const Spec& options) {
  const MagnitudeAwareOptions chosen = mala_options(in, options);
  const Tensor& q = in.at("q");
  const int64_t batch = q.size(0), queries = q.size(2), keys = in.at("k").size(2), dim = q.size(3);
  cascade::Bindings bindings = bind_chunked(in);
  const bool paper = chosen.form == MagnitudeAwareForm::paper;
  bindings.scalars = {{"scale", chosen.scale.value_or(1 / std::sqrt(static_cast<double>(dim)))},
                      {"eps", chosen.eps},
                      {"paper", paper ? 1 : 0},
                      {"consistent", chosen.form == MagnitudeAwareForm::consistent ? 1 : 0},
                      {"State", chosen.causal ? 1 : 0}};
  std::vector<double> before(static_cast<size_t>(batch), 0);
  const MagnitudeAwareState& state = chosen.initial_state;
  if (state.s.defined()) {
    before = to_nd(state.count).values;
    bindings.tensors["Initial_s"] = to_nd(state.s);
    bindings.tensors["Initial_k_sum"] = to_nd(state.k_sum);
    bindings.tensors["Initial_v_sum"] = to_nd(state.v_sum);
  }
  bindings.tensors["Count"] = NdArray{{batch}, before};
  bind_grid(chosen, before, queries, keys, dim, bindings);
  const int64_t offset = keys - queries;
  const bool causal = chosen.causal;
  const auto seen = [=](int64_t p) { return causal ? std::max<int64_t>(0, p + offset + 1) : keys; };
  NdArray n{{batch, queries}, {}};
  for (double count : before) {
    for (int64_t p = 0; p < queries; ++p) {
      n.values.push_back(std::max(1.0, count + static_cast<double>(seen(p))));
    }
  }
  bindings.tensors["N"] = std::move(n);
  bindings.indices["seen"] = [seen](auto i) { return seen(i[0]); };
  bindings.indices["pair"] = [dim](auto i) { return std::min(i[0] ^ 1, dim - 1); };
  bindings.predicates["keep"] = [seen](auto i) { return i[2] < seen(i[1]); };
  return bindings;
}

ExampleCase with_state(ExampleCase example) {
  const Dims q = example.inputs[0].second, v = example.inputs[2].second;
  example.inputs.emplace_back("initial_s", Dims{q[0], q[1], q[3], v[3]});
  example.inputs.emplace_back("initial_k_sum", Dims{q[0], q[1], q[3]});
  example.inputs.emplace_back("initial_v_sum", Dims{q[0], q[1], v[3]});
  example.inputs.emplace_back("initial_count", Dims{q[0]});
  for (const char* name : {"initial_s", "initial_k_sum", "initial_v_sum"}) {
    example.types[name] = DType::f32;
  }
  example.types["initial_count"] = DType::i64;
  return example;
}

// A state as if of some tens of tokens, whose features are positive.
void fill_mala(const ExampleCase&, const std::string& input, uint64_t seed, const Tensor& to_fill) {
  if (input == "initial_count") {
    for (int64_t b = 0; b < to_fill.count(); ++b) {
      to_fill.as<int64_t>()[b] = 20 + (static_cast<int64_t>(seed % 5) + 1) * b;
    }
  }
  if (input != "initial_k_sum") return;
  Array values = convert(to_fill, DType::f64);
  for (int64_t i = 0; i < values.count(); ++i) {
    values.as<double>()[i] = 20 + 5 * std::abs(values.as<double>()[i]);
  }
  copy(values, to_fill);
}

std::vector<ExampleCase> mala_cases() {
  return {
      attention_case("whole", {2, 4, 2, 70, 70, 16, 16}, ""),
      attention_case("odd", {2, 3, 1, 37, 53, 7, 5}, ""),
      attention_case("paper", {1, 4, 2, 70, 70, 16, 24}, "form=paper"),
      attention_case("scale", {1, 2, 2, 30, 90, 8, 8}, "scale=0.9,eps=0.01"),
      attention_case("causal", {2, 4, 2, 130, 130, 16, 24}, "causal=1"),
      attention_case("causal_paper", {1, 2, 1, 130, 130, 9, 5}, "causal=1,form=paper"),
      attention_case("last_queries", {1, 2, 1, 33, 120, 12, 8}, "causal=1"),
      attention_case("more_queries_than_keys", {1, 2, 1, 40, 21, 8, 8}, "causal=1"),
      attention_case("rope", {1, 2, 1, 70, 70, 16, 12}, "height=7,width=10"),
      attention_case("rope_paper", {1, 2, 2, 66, 66, 8, 5}, "height=6,width=11,form=paper"),
      attention_case("rope_consistent", {1, 4, 2, 70, 70, 16, 12},
                     "height=1,width=70,form=consistent"),
      attention_case("rope_smallest", {1, 1, 1, 12, 12, 4, 3}, "height=3,width=4"),
      attention_case("rope_causal", {2, 4, 2, 100, 100, 20, 12}, "height=10,width=10,causal=1"),
      attention_case("rope_causal_consistent", {2, 2, 1, 40, 110, 20, 12},
                     "height=2,width=110,causal=1,form=consistent"),
      with_state(attention_case("state", {3, 4, 2, 70, 70, 12, 17}, "causal=1")),
      with_state(attention_case("state_paper", {2, 2, 1, 20, 90, 12, 17}, "causal=1,form=paper")),
      with_state(attention_case("state_one_token", {3, 4, 2, 1, 1, 12, 17}, "causal=1")),
      with_state(
          attention_case("state_rope", {3, 2, 1, 20, 60, 12, 7}, "causal=1,height=9,width=13")),
      with_state(attention_case("state_rope_consistent", {2, 2, 1, 20, 60, 12, 7},
                                "causal=1,height=2,width=100,form=consistent")),
      with_state(attention_case("state_rope_one_token", {2, 2, 1, 1, 1, 12, 7},
                                "causal=1,height=9,width=13")),
  };
}

ExampleCase random_mala_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape shape = random_chunked_shape(random);
  const bool causal = random.chance(0.6), rope = random.chance(0.4);
  std::string options = causal ? "causal=1" : "causal=0";
  if (random.chance(0.3)) {
    options += ",form=paper";
  } else if (random.chance(0.4)) {
    options += ",scale=" + std::to_string(random.number(0.05, 1));
  }
  if (rope) {
    const int64_t width = random.between(1, 12), height = random.between(1, 12);
    options += ",height=" + std::to_string(height) + ",width=" + std::to_string(width);
    shape.dim = (shape.dim + 3) / 4 * 4;
    if (!causal) shape.queries = shape.keys = height * width;
  }
  // Where one key alone is seen, gradients of queries and keys are nothing but rounding.
  const bool state = causal && (shape.keys < 4 || random.chance(0.5));
  if (!causal && shape.keys < 4 && !rope) shape.keys += 4;
  ExampleCase example = attention_case("", shape, options);
  return state ? with_state(std::move(example)) : example;
}

// A call that is not causal has no state: zeros stand in for it here, as in the cascades.
NamedArrays forward_mala(const NamedTensors& in, const Spec& options, const RunOptions& run) {
  const Tensor &q = in.at("q"), &v = in.at("v");
  MagnitudeAwareResult result =
      magnitude_aware_linear_attention(q, in.at("k"), v, mala_options(in, options), run);
  const DType type = wide_type(q.dtype());
  NamedArrays arrays;
  const auto add = [&](const char* name, Array& array, const Dims& shape) {
    arrays.emplace(name, array.view().defined() ? std::move(array) : Array::zeros(type, shape));
  };
  add("out", result.out, {});
  add("s", result.s, {q.size(0), q.size(1), q.size(3), v.size(3)});
  add("k_sum", result.k_sum, {q.size(0), q.size(1), q.size(3)});
  add("v_sum", result.v_sum, {q.size(0), q.size(1), v.size(3)});
  add("count", result.count, {q.size(0)});
  return arrays;
}

NamedArrays backward_mala(const NamedTensors& in, const NamedTensors& out_gradients,
                          const MagnitudeAwareOptions& chosen, const RunOptions& run) {
  MagnitudeAwareState state;
  if (chosen.causal) {
    state = {out_gradients.at("s"), out_gradients.at("k_sum"), out_gradients.at("v_sum"), {}};
  }
  MagnitudeAwareGradients result = magnitude_aware_linear_attention_backward(
      in.at("q"), in.at("k"), in.at("v"), out_gradients.at("out"), state, chosen, run);
  NamedArrays arrays =
      named_arrays({"q", "k", "v"}, std::move(result.q), std::move(result.k), std::move(result.v));
  if (in.contains("initial_s")) {
    arrays.emplace("initial_s", std::move(result.s));
    arrays.emplace("initial_k_sum", std::move(result.k_sum));
    arrays.emplace("initial_v_sum", std::move(result.v_sum));
  }
  return arrays;
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& spec, const RunOptions& run) {
  struct Saved {
    Array s, k_sum, v_sum;
  };
  const MagnitudeAwareOptions options = mala_options(in, spec);
  const auto saved = std::make_shared<Saved>();
  if (!options.causal) {
    const Tensor &q = in.at("q"), &v = in.at("v");
    const DType type = wide_type(q.dtype());
    saved->s = Array(type, {q.size(0), q.size(1), q.size(3), v.size(3)});
    saved->k_sum = Array(type, {q.size(0), q.size(1), q.size(3)});
    saved->v_sum = Array(type, {q.size(0), q.size(1), v.size(3)});
    Array out(q.dtype(), {q.size(0), q.size(1), q.size(2), v.size(3)});
    magnitude_aware_linear_attention(q, in.at("k"), v, out,
                                     {saved->s, saved->k_sum, saved->v_sum, {}}, options, run);
  }
  return [=](const NamedTensors& out_gradients) {
    MagnitudeAwareOptions backward = options;
    backward.forward_state = {saved->s, saved->k_sum, saved->v_sum, {}};
    return backward_mala(in, out_gradients, backward, run);
  };
}

// Without rope: the model has turned queries and keys already.
ModelAttention mala_in_model(const Spec& options, const ModelLayer& at) {
  options.require_known({"form", "scale", "eps"});
  MagnitudeAwareOptions chosen = mala_options({}, options);
  chosen.causal = true;
  const int64_t heads = at.heads, dim = at.head_dim;
  ModelAttention attention;
  attention.state_shapes = {{1, heads, dim, dim}, {1, heads, dim}, {1, heads, dim}, {1}};
  attention.over_state = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, std::span<const Tensor> state,
                                  const RunOptions& run) {
    MagnitudeAwareOptions going_on = chosen;
    going_on.initial_state = {state[0], state[1], state[2], state[3]};
    magnitude_aware_linear_attention(q, k, v, out, going_on.initial_state, going_on, run);
  };
  return attention;
}

/// 64 tokens of one sequence and group of heads; a grid of 8 x 8 where the case has one.
ExampleCase shrunk(const ExampleCase& example) {
  constexpr int64_t kSide = 8;
  const Spec spec = Spec::parse_options(example.options);
  const Dims &q = example.inputs[0].second, &k = example.inputs[1].second,
             &v = example.inputs[2].second;
  std::string options;
  const auto add = [&](const char* key, const std::string& value) {
    options += (options.empty() ? "" : ",") + std::string(key) + "=" + value;
  };
  for (const std::string& key : spec.keys()) {
    if (key != "height" && key != "width") add(key.c_str(), *spec.text(key));
  }
  if (spec.has("width")) {
    add("height", std::to_string(kSide));
    add("width", std::to_string(kSide));
  }
  constexpr int64_t kTokens = kSide * kSide;
  return attention_case(example.name, {1, q[1] / k[1], 1, kTokens, kTokens, q[3], v[3]}, options);
}

Mechanism mala_record() {
  Mechanism m;
  m.name = "magnitude_aware_linear_attention";
  m.title = "Linear attention whose weights follow the magnitude of the query";
  m.sheets = {9};
  m.arxiv = {"2507.00698"};
  m.engine = "chunked";
  m.pass_rank = "m";
  m.card = embedded("magnitude_aware/card.md");
  for (const char* name : {"mala", "running"}) {
    m.cascades.push_back(
        {name, std::string(embedded(std::string("magnitude_aware/") + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"s", "S"}, {"k_sum", "KS"}, {"v_sum", "VSUM"}, {"count", "COUNT"}};
  m.without_gradient = {"count"};
  m.cases = mala_cases();
  m.bench_cases = {
      attention_case("d64_n4096", {1, 8, 8, 4096, 4096, 64, 64}, ""),
      attention_case("d64_n4096_rope", {1, 8, 8, 4096, 4096, 64, 64}, "height=64,width=64"),
      attention_case("d64_n4096_causal", {1, 8, 8, 4096, 4096, 64, 64}, "causal=1")};
  m.forward = forward_mala;
  m.forward_for_backward = forward_for_backward;
  m.bind = bind_mala;
  m.explain = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    const MagnitudeAwareOptions chosen = mala_options({}, options);
    return explain_chunked(in, chosen.causal || chosen.rope, run);
  };
  m.fill = fill_mala;
  m.random_case = random_mala_case;
  m.model_attention = mala_in_model;
  m.shrink = shrunk;
  return m;
}

}  // namespace

std::vector<Mechanism> magnitude_aware_records() { return {mala_record()}; }

}  // namespace heed
