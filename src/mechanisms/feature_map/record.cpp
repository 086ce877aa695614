#include <cmath>
#include <memory>

#include "engine/candidates.h"
#include "heed/feature_map.h"
#include "mechanisms/embedded.h"
#include "mechanisms/feature_map/layer.h"
#include "mechanisms/registry.h"

namespace heed {

namespace {

FeatureKind kind_of(const Spec& options) {
  options.require_known({"kind"});
  return parse_feature_kind(options.text("kind").value_or("elu1"));
}

FeatureMapOptions parameters(const NamedTensors& in) {
  return {input_or_none(in, "weight"), input_or_none(in, "bias")};
}

cascade::NdArray identity(int64_t heads, int64_t dim) {
  const auto n = static_cast<size_t>(dim);
  cascade::NdArray weight{{heads, dim, dim}, {}};
  weight.values.assign(static_cast<size_t>(heads) * n * n, 0);
  for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
    for (size_t i = 0; i < n; ++i) weight.values[(h * n + i) * n + i] = 1;
  }
  return weight;
}

// Factors of feature f of taylor2 among 1, y_1, .., y_D.
int64_t taylor_factor(int64_t f, int64_t width, bool left) {
  if (f <= width) return left ? f : 0;
  const int64_t pair = f - width - 1;
  return 1 + (left ? pair / width : pair % width);
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  const FeatureKind kind = kind_of(options);
  const Tensor& x = in.at("x");
  const Tensor weight = input_or_none(in, "weight"), bias = input_or_none(in, "bias");
  cascade::Bindings bindings;
  bindings.tensors["X"] = to_nd(x);
  bindings.tensors["Weight"] = weight.defined() ? to_nd(weight) : identity(x.size(1), x.size(3));
  if (kind == FeatureKind::performer) return bindings;
  const int64_t width = weight.defined() ? weight.size(2) : x.size(3);
  bindings.tensors["Bias"] =
      bias.defined()
          ? to_nd(bias)
          : cascade::NdArray{{x.size(1), width},
                             std::vector<double>(static_cast<size_t>(x.size(1) * width))};
  if (kind == FeatureKind::taylor2) {
    bindings.sizes["f"] = feature_count(kind, width);
    bindings.indices["left"] = [width](std::span<const int64_t> f) {
      return taylor_factor(f[0], width, true);
    };
    bindings.indices["right"] = [width](std::span<const int64_t> f) {
      return taylor_factor(f[0], width, false);
    };
  } else if (feature_count(kind, width) == 2 * width) {
    bindings.sizes = {{"f", 2 * width}, {"D0", width}};
    bindings.scalars["floor"] = x.dtype() == DType::f16 ? 6e-8 : 1e-12;
  }
  return bindings;
}

// Weights of size 1/sqrt(D), so that their outputs are as large as x; projections stay normal.
void fill(const ExampleCase& example, const std::string& input, uint64_t /*seed*/,
          const Tensor& to_fill) {
  if (input != "weight" || example.options.find("performer") != std::string::npos) return;
  Array wide = convert(to_fill, DType::f64);
  const double size = 1 / std::sqrt(static_cast<double>(to_fill.size(1)));
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] *= size;
  copy(wide, to_fill);
}

struct Shape {
  int64_t batch, heads, tokens, dim;
  int64_t width = 0;                // D' of a weight, for performer M; 0: no weight
  bool bias = false, wide = false;  // wide: parameters are float32
};

ExampleCase feature_case(const std::string& name, FeatureKind kind, const Shape& s) {
  ExampleCase example{
      name, {{"x", {s.batch, s.heads, s.tokens, s.dim}}}, std::string("kind=") + name_of(kind)};
  if (s.width > 0) {
    const bool performer = kind == FeatureKind::performer;
    example.inputs.emplace_back(
        "weight", performer ? Dims{s.heads, s.width, s.dim} : Dims{s.heads, s.dim, s.width});
  }
  if (s.bias) example.inputs.emplace_back("bias", Dims{s.heads, s.width > 0 ? s.width : s.dim});
  if (s.wide) example.types = {{"weight", DType::f32}, {"bias", DType::f32}};
  return example;
}

std::vector<ExampleCase> feature_cases() {
  std::vector<ExampleCase> cases;
  for (FeatureKind kind : kFeatureKinds) {
    const std::string name = name_of(kind);
    const bool performer = kind == FeatureKind::performer;
    if (!performer) cases.push_back(feature_case(name, kind, {2, 3, 37, 13}));
    cases.push_back(feature_case(name + "_one", kind, {1, 1, 1, 1, 1}));
    cases.push_back(feature_case(name + "_layer", kind, {2, 2, 70, 16, 21, !performer}));
    cases.push_back(
        feature_case(name + "_float32_layer", kind, {1, 3, 19, 40, 16, !performer, true}));
  }
  cases.push_back(feature_case("bias_alone", FeatureKind::hedgehog_exp, {1, 2, 9, 8, 0, true}));
  cases.push_back(feature_case("head_dim_256", FeatureKind::hedgehog_joint, {1, 1, 10, 256, 256}));
  cases.push_back(
      feature_case("many_tiles", FeatureKind::hedgehog_softmax, {1, 1, 700, 8, 8, true}));
  return cases;
}

std::vector<CascadeText> feature_cascades() {
  std::vector<CascadeText> texts;
  for (FeatureKind kind : kFeatureKinds) {
    const std::string name = name_of(kind);
    texts.push_back(
        {name, std::string(embedded("feature_map/" + name + ".cascade")), "kind=" + name});
  }
  return texts;
}

BackwardCall forward_for_backward(const NamedTensors& in, const Spec& options,
                                  const RunOptions& run) {
  const FeatureKind kind = kind_of(options);
  const auto features =
      std::make_shared<const Array>(feature_map(in.at("x"), kind, parameters(in), run));
  return [in, kind, run, features](const NamedTensors& out_gradients) {
    FeatureMapOptions given = parameters(in);
    given.forward_features = *features;
    FeatureMapGradients gradients =
        feature_map_backward(out_gradients.at("out"), in.at("x"), kind, given, run);
    NamedArrays arrays;
    arrays.emplace("x", std::move(gradients.x));
    if (given.weight.defined()) arrays.emplace("weight", std::move(gradients.weight));
    if (given.bias.defined()) arrays.emplace("bias", std::move(gradients.bias));
    return arrays;
  };
}

Mechanism feature_map_record() {
  Mechanism m;
  m.name = "feature_map";
  m.title = "Feature maps of linear attention: Hedgehog, Taylor, Performer, elu, relu, exp";
  m.sheets = {8, 12};
  m.arxiv = {"2402.04347", "2507.23632"};
  m.engine = "none";
  m.pass_rank = "p";
  m.card = embedded("feature_map/card.md");
  m.cascades = feature_cascades();
  m.outputs = {{"out", "PHI"}};
  m.cases = feature_cases();
  for (FeatureKind kind :
       {FeatureKind::elu1, FeatureKind::hedgehog_exp, FeatureKind::hedgehog_softmax}) {
    m.bench_cases.push_back(feature_case(std::string(name_of(kind)) + "_n4096_d64", kind,
                                         {1, 8, 4096, 64, kind == FeatureKind::elu1 ? 0 : 64}));
  }
  m.bench_cases.push_back(
      feature_case("performer_n4096_d64", FeatureKind::performer, {1, 8, 4096, 64, 128}));
  m.bench_cases.push_back(
      feature_case("taylor2_n4096_d16", FeatureKind::taylor2, {1, 8, 4096, 16}));
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays({"out"}, feature_map(in.at("x"), kind_of(options), parameters(in), run));
  };
  m.forward_for_backward = forward_for_backward;
  m.bind = bind;
  m.needed_sizes = [](const NamedTensors& in) {  // without a layer: one product an element
    return in.contains("weight") ? std::map<std::string, int64_t>()
                                 : std::map<std::string, int64_t>{{"c", 1}};
  };
  m.explain = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    const FeatureMapOptions given = parameters(in);
    return explain_candidates(in.at("x").dtype(),
                              features::no_half_operands(kind_of(options), given.weight), "", run);
  };
  m.fill = fill;
  return m;
}

}  // namespace

std::vector<Mechanism> feature_map_records() { return {feature_map_record()}; }

}  // namespace heed
