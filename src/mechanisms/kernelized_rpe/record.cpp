#include <cmath>
#include <limits>

#include "base/philox.h"
#include "engine/candidates.h"
#include "heed/kernelized_rpe_attention.h"
#include "mechanisms/embedded.h"
#include "mechanisms/registry.h"

namespace heed {

namespace {

// Options of a case: features, causal, path, and rows of the grid (its columns follow).
KernelizedRpeOptions rpe_options(const NamedTensors& in, const Spec& options) {
  options.require_known({"features", "causal", "grid_rows", "path"});
  KernelizedRpeOptions chosen;
  chosen.features = parse_rpe_features(options.text("features").value_or("nprf"));
  chosen.causal = options.flag("causal");
  chosen.path = parse_rpe_path(options.text("path").value_or("auto"));
  if (const auto rows = options.integer("grid_rows"); rows && *rows > 0) {
    chosen.grid = {*rows, in.at("q").size(2) / *rows};
  }
  return chosen;
}

cascade::Bindings bind(const NamedTensors& in, const Spec& options) {
  using Index = std::span<const int64_t>;
  const KernelizedRpeOptions chosen = rpe_options(in, options);
  const Tensor& q = in.at("q");
  const int64_t group = q.size(1) / in.at("k").size(1), tokens = q.size(2);
  cascade::Bindings bindings;
  bindings.tensors = {{"Q", to_nd(q)},
                      {"K", to_nd(in.at("k"))},
                      {"V", to_nd(in.at("v"))},
                      {"Rpb", to_nd(in.at("rpb"))}};
  if (input_or_none(in, "projection").defined())
    bindings.tensors["W"] = to_nd(input_or_none(in, "projection"));
  bindings.indices["g"] = [group](Index i) { return i[0] / group; };
  const bool causal = chosen.causal;
  bindings.predicates["keep"] = [causal](Index i) { return !causal || i[1] <= i[0]; };
  if (chosen.grid) {
    const int64_t rows = (*chosen.grid)[0], columns = (*chosen.grid)[1];
    bindings.indices["at_y"] = [=](Index i) { return i[1] / columns - i[0] / columns + rows - 1; };
    bindings.indices["at_x"] = [=](Index i) {
      return i[1] % columns - i[0] % columns + columns - 1;
    };
    return bindings;
  }
  const int64_t middle = in.at("rpb").size(1) / 2;
  bindings.indices["at"] = [middle](Index i) { return middle + i[1] - i[0]; };
  bindings.indices["entry"] = [middle, tokens](Index d) { return middle + d[0] - (tokens - 1); };
  bindings.predicates["used"] = [causal, tokens](Index d) { return !causal || d[0] <= tokens - 1; };
  bindings.sizes["t"] = 2 * tokens;
  return bindings;
}

// "masked" in a case's name: some offsets are masked by -inf, never that of a token from itself. Tokens of
// trf are short: the sums of its signed weights stay away from 0.
void fill(const ExampleCase& example, const std::string& input, uint64_t seed,
          const Tensor& to_fill) {
  const auto named = [&](const char* part) { return example.name.find(part) != std::string::npos; };
  const bool shorten = named("trf") && (input == "q" || input == "k");
  const bool mask = named("masked") && input == "rpb";
  if (!shorten && !mask) return;
  Array wide = convert(to_fill, DType::f64);
  const int64_t entries = to_fill.size(1);
  for (int64_t i = 0; i < wide.count(); ++i) {
    double& x = wide.as<double>()[i];
    if (shorten) x *= 0.3;
    const bool itself = i % entries == entries / 2;
    if (mask && !itself && philox_word(seed, static_cast<uint64_t>(i)) % 3 == 0) {
      x = -std::numeric_limits<double>::infinity();
    }
  }
  copy(wide, to_fill);
}

struct Shape {
  int64_t batch, heads, kv_heads, tokens, dim, value_dim, random;
  int64_t reach = 0;      // R of rpb; 0: the number of tokens
  int64_t grid_rows = 0;  // 0: no grid
};

ExampleCase rpe_case(std::string name, const Shape& s, const std::string& options,
                     bool float32_parameters = true) {
  ExampleCase example{std::move(name),
                      {{"q", {s.batch, s.heads, s.tokens, s.dim}},
                       {"k", {s.batch, s.kv_heads, s.tokens, s.dim}},
                       {"v", {s.batch, s.kv_heads, s.tokens, s.value_dim}}},
                      options};
  if (s.grid_rows > 0) {
    example.inputs.emplace_back(
        "rpb", Dims{s.heads, 2 * s.grid_rows - 1, 2 * (s.tokens / s.grid_rows) - 1});
    example.options += ",grid_rows=" + std::to_string(s.grid_rows);
    example.definition = "nprf_grid";
  } else {
    const int64_t reach = s.reach > 0 ? s.reach : s.tokens;
    example.inputs.emplace_back("rpb", Dims{s.heads, 2 * reach - 1});
  }
  if (s.random > 0) example.inputs.emplace_back("projection", Dims{s.heads, s.random, s.dim});
  if (float32_parameters) example.types = {{"rpb", DType::f32}, {"projection", DType::f32}};
  return example;
}

std::vector<ExampleCase> rpe_cases() {
  std::vector<ExampleCase> cases;
  for (const char* path : {"direct", "fft"}) {
    const std::string on = std::string(",path=") + path, name = std::string("_") + path;
    const auto add = [&](const char* prefix, const Shape& shape, const std::string& options,
                         bool float32_parameters = true) {
      cases.push_back(rpe_case(prefix + name, shape, options + on, float32_parameters));
    };
    add("one_token", {1, 1, 1, 1, 1, 1, 1}, "features=nprf");
    add("nprf", {2, 3, 3, 21, 7, 5, 6, 30}, "features=nprf");
    add("nprf_causal", {1, 2, 2, 26, 8, 4, 8}, "features=nprf,causal=1");
    add("nprf_grouped", {2, 4, 2, 19, 6, 3, 5}, "features=nprf,causal=1");
    add("nprf_same_type", {1, 2, 2, 15, 6, 4, 4}, "features=nprf", false);
    add("nprf_masked", {1, 2, 2, 24, 6, 4, 4}, "features=nprf,causal=1");
    add("prf", {1, 2, 2, 37, 16, 9, 12}, "features=prf");
    add("prf_causal", {1, 2, 1, 40, 8, 8, 16}, "features=prf,causal=1");
    add("trf", {1, 2, 1, 30, 4, 6, 40}, "features=trf");
    add("trf_causal", {1, 2, 2, 20, 4, 3, 40}, "features=trf,causal=1");
    add("elu1", {2, 2, 1, 45, 12, 10, 0, 50}, "features=elu1");
    add("elu1_causal", {1, 2, 2, 70, 9, 8, 0}, "features=elu1,causal=1");
    add("grid", {2, 2, 2, 20, 6, 5, 7, 0, 4}, "features=nprf");
    add("grid_causal", {1, 4, 2, 35, 6, 5, 7, 0, 5}, "features=nprf,causal=1");
    add("grid_of_one_column", {1, 1, 1, 9, 4, 4, 4, 0, 9}, "features=nprf");
  }
  // Several pieces and tiles; the fast forms would take long there.
  for (ExampleCase example :
       {rpe_case("several_pieces", {1, 2, 1, 300, 8, 12, 16}, "features=nprf,path=direct"),
        rpe_case("several_pieces_causal", {1, 1, 1, 330, 8, 12, 16}, "features=nprf,causal=1"),
        rpe_case("long_transform", {1, 1, 1, 280, 4, 3, 4}, "features=nprf,path=fft")}) {
    example.definition = "nprf";
    cases.push_back(std::move(example));
  }
  return cases;
}

std::vector<CascadeText> rpe_cascades() {
  std::vector<CascadeText> texts;
  const auto add = [&](const char* name, const char* features) {
    texts.push_back({name,
                     std::string(embedded(std::string("kernelized_rpe/") + name + ".cascade")),
                     std::string("features=") + features});
  };
  for (const char* features : {"nprf", "prf", "trf", "elu1"}) add(features, features);
  add("toeplitz", "nprf");
  add("fourier", "nprf");
  add("nprf_grid", "grid");  // taken by name
  return texts;
}

std::vector<PathAnswer> explain(const NamedTensors& in, const Spec& options,
                                const RunOptions& run) {
  const Tensor &q = in.at("q"), &v = in.at("v"), &rpb = in.at("rpb");
  const Tensor w = input_or_none(in, "projection");
  const int64_t padded = rpb.rank() == 3 ? (rpb.size(1) + 1) / 2 * rpb.size(2) : q.size(2);
  const RpeCost cost = kernelized_rpe_cost(q.size(2), padded, w.defined() ? w.size(1) : q.size(3),
                                           v.size(3), false, q.dtype(), chosen_isa(run));
  const std::string asked = options.text("path").value_or("auto");
  const bool fft = asked == "fft" || (asked == "auto" && cost.fft < cost.direct);
  const std::string other =
      asked == "auto"
          ? "direct is estimated to be " + std::to_string(cost.fft / cost.direct) + " times as fast"
          : "path=" + asked + " is asked for";
  std::vector<PathAnswer> answers = {{"fft", fft, fft ? "" : other}};
  for (const PathAnswer& answer : explain_isas(run)) {
    const bool can_run = answer.can_run && asked != "fft";
    answers.push_back({"direct, " + answer.path, can_run, asked == "fft" ? other : answer.reason});
  }
  return answers;
}

Mechanism kernelized_rpe_record() {
  Mechanism m;
  m.name = "kernelized_rpe_attention";
  m.title = "Kernelized attention with relative positions, by FFT or directly";
  m.sheets = {11};
  m.arxiv = {"2106.12566"};
  m.engine = "none";
  m.pass_rank = "m";
  m.card = embedded("kernelized_rpe/card.md");
  m.cascades = rpe_cascades();
  m.outputs = {{"out", "O"}};
  m.cases = rpe_cases();
  m.bench_cases = {
      rpe_case("n1024_d64_m64", {1, 1, 1, 1024, 64, 64, 64}, "features=nprf"),
      rpe_case("n4096_d64_m64_causal", {1, 1, 1, 4096, 64, 64, 64}, "features=nprf,causal=1"),
      rpe_case("n4096_d16_m16_direct", {1, 1, 1, 4096, 16, 16, 16}, "features=nprf,path=direct"),
      rpe_case("n4096_d16_m16_fft", {1, 1, 1, 4096, 16, 16, 16}, "features=nprf,path=fft")};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named_arrays(
        {"out"},
        kernelized_rpe_attention(in.at("q"), in.at("k"), in.at("v"), in.at("rpb"),
                                 input_or_none(in, "projection"), rpe_options(in, options), run));
  };
  m.backward = [](const NamedTensors& in, const NamedTensors& out_gradients, const Spec& options,
                  const RunOptions& run) {
    KernelizedRpeGradients gradients = kernelized_rpe_attention_backward(
        out_gradients.at("out"), in.at("q"), in.at("k"), in.at("v"), in.at("rpb"),
        input_or_none(in, "projection"), rpe_options(in, options), run);
    return named_arrays({"q", "k", "v", "rpb"}, std::move(gradients.q), std::move(gradients.k),
                        std::move(gradients.v), std::move(gradients.rpb));
  };
  m.bind = bind;
  m.explain = explain;
  m.fill = fill;
  return m;
}

}  // namespace

std::vector<Mechanism> kernelized_rpe_records() { return {kernelized_rpe_record()}; }

}  // namespace heed
