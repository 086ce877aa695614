#include <cmath>
#include <memory>

#include "engine/candidates.h"
#include "engine/tiled/path.h"
#include "engine/tiled/problem.h"
#include "heed/neighborhood_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"
#include "mechanisms/neighborhood/grid_rows.h"
#include "mechanisms/neighborhood/options.h"
#include "mechanisms/neighborhood/small_windows.h"
#include "mechanisms/registry.h"

namespace heed {

namespace {

NeighborhoodOptions options_of(const NamedTensors& in, const Spec& spec) {
  spec.require_known({"kernel_size", "stride", "dilation", "is_causal", "scale"});
  NeighborhoodOptions options;
  options.kernel_size = na::numbers_of(spec, "kernel_size", "3");
  options.stride = na::numbers_of(spec, "stride", "1");
  options.dilation = na::numbers_of(spec, "dilation", "1");
  const std::vector<int64_t> causal = na::numbers_of(spec, "is_causal", "0", 0);
  options.is_causal.assign(causal.begin(), causal.end());
  options.scale = spec.number("scale");
  options.additional_keys = input_or_none(in, "additional_keys");
  options.additional_values = input_or_none(in, "additional_values");
  options.rpb = input_or_none(in, "rpb");
  return options;
}

/// One axis as the papers define it, token by token.
struct Axis {
  int64_t length, kernel, stride, dilation;
  bool causal;

  int64_t group_length(int64_t token) const {
    return (length - token % dilation + dilation - 1) / dilation;
  }
  /// First key of the window, and one past the last, in coordinates of the token's residue group.
  std::pair<int64_t, int64_t> window(int64_t token) const {
    const int64_t i = token / dilation, n = group_length(token);
    const int64_t left = kernel / 2, right = kernel / 2 + kernel % 2 - 1;
    if (causal) {
      const int64_t lead = std::min(i / stride * stride + stride - 1, n - 1);
      return {std::max<int64_t>(lead - kernel + 1, 0), i + 1};
    }
    const int64_t lead = std::min(i / stride * stride + stride / 2, n - 1);
    const int64_t pushed = lead + right >= n ? n - right - lead - 1 : 0;
    const int64_t start = std::max<int64_t>(lead - left, 0) + pushed;
    return {start, start + kernel};
  }
  bool sees(int64_t query, int64_t key) const {
    const auto [begin, end] = window(query);
    return query % dilation == key % dilation && key / dilation >= begin && key / dilation < end;
  }
};

void bind_axis(const Axis& axis, char name, cascade::Bindings& bindings) {
  const std::string suffix = std::string("_") + name;
  const char upper = static_cast<char>(name - 'a' + 'A');
  // The definition knows the window as a rank, the masked cascade as a number.
  const char slots = name == 'x' ? 'i' : name == 'y' ? 'j' : 'k';
  const char window = static_cast<char>(slots - 'a' + 'A');
  bindings.sizes[std::string("D") + upper] = axis.dilation;
  bindings.sizes[std::string(1, slots)] = axis.kernel;
  bindings.sizes[std::string(1, window)] = axis.kernel;
  bindings.indices["first" + suffix] = [axis](std::span<const int64_t> i) {
    return axis.window(i[0]).first * axis.dilation + i[0] % axis.dilation;
  };
  bindings.indices["bias" + suffix] = [axis](std::span<const int64_t> i) {
    return axis.window(i[0]).first - i[0] / axis.dilation + axis.kernel - 1;
  };
  bindings.indices["apart" + suffix] = [axis](std::span<const int64_t> i) {
    return i[1] / axis.dilation - i[0] / axis.dilation + axis.kernel - 1;
  };
  bindings.predicates["in" + suffix] = [axis](std::span<const int64_t> i) {
    const auto [begin, end] = axis.window(i[0]);
    return begin + i[1] < end;
  };
  bindings.predicates["near" + suffix] = [axis](std::span<const int64_t> i) {
    return axis.sees(i[0], i[1]);
  };
}

cascade::Bindings bind(int rank, const NamedTensors& in, const Spec& spec) {
  const NeighborhoodOptions options = options_of(in, spec);
  const Tensor &query = in.at("query"), &key = in.at("key"), &value = in.at("value");
  cascade::Bindings bindings;
  bindings.tensors = {{"Query", to_nd(query)}, {"Key", to_nd(key)}, {"Value", to_nd(value)}};
  const auto tensor = [&](const char* name, const Tensor& given, const Tensor& like) {
    const cascade::NdArray none{{query.size(0), 0, key.size(rank + 1), like.size(rank + 2)}, {}};
    bindings.tensors[name] = given.defined() ? to_nd(given) : none;
  };
  tensor("Additional_keys", options.additional_keys, key);
  tensor("Additional_values", options.additional_values, value);
  if (options.rpb.defined()) bindings.tensors["RPB"] = to_nd(options.rpb);
  bindings.scalars["scale"] =
      options.scale.value_or(1 / std::sqrt(static_cast<double>(query.size(rank + 2))));
  const int64_t group = query.size(rank + 1) / key.size(rank + 1);
  bindings.indices["g"] = [group](std::span<const int64_t> i) { return i[0] / group; };
  for (int a = 0; a < rank; ++a) {
    const auto of_axis = [&](const auto& values) {
      return values.size() == 1 ? values[0] : values[static_cast<size_t>(a)];
    };
    const Axis axis{query.size(a + 1), of_axis(options.kernel_size), of_axis(options.stride),
                    of_axis(options.dilation), of_axis(options.is_causal)};
    bind_axis(axis, static_cast<char>('x' + rank - 1 - a), bindings);
  }
  return bindings;
}

/// Shapes of a case: batch, grid, heads, key heads, head dim, value dim.
struct GridShape {
  std::vector<int64_t> grid;
  int64_t batch = 1, heads = 2, kv_heads = 2, dim = 8, value_dim = 8;
  int64_t additional = -1;        // keys; -1: none are given
  std::vector<int64_t> rpb = {};  // kernel sizes of a table; empty: none
};

ExampleCase grid_case(const char* name, const GridShape& s, const std::string& options) {
  const auto shape = [&](int64_t heads, int64_t width) {
    std::vector<int64_t> dims = {s.batch};
    dims.insert(dims.end(), s.grid.begin(), s.grid.end());
    dims.insert(dims.end(), {heads, width});
    return Dims(dims);
  };
  ExampleCase example{name,
                      {{"query", shape(s.heads, s.dim)},
                       {"key", shape(s.kv_heads, s.dim)},
                       {"value", shape(s.kv_heads, s.value_dim)}},
                      options};
  if (s.additional >= 0) {
    example.inputs.emplace_back("additional_keys", Dims{s.batch, s.additional, s.kv_heads, s.dim});
    example.inputs.emplace_back("additional_values",
                                Dims{s.batch, s.additional, s.kv_heads, s.value_dim});
  }
  if (!s.rpb.empty()) {
    std::vector<int64_t> dims = {s.heads};
    for (int64_t kernel : s.rpb) dims.push_back(2 * kernel - 1);
    example.inputs.emplace_back("rpb", Dims(dims));
    example.types["rpb"] = DType::f32;
  }
  return example;
}

std::vector<ExampleCase> line_cases() {
  std::vector<ExampleCase> cases = {
      grid_case("one_token", {{1}, 1, 1, 1, 1, 1}, "kernel_size=1"),
      grid_case("kernel_one", {{9}}, "kernel_size=1"),
      grid_case("window", {{41}, 2, 3, 3, 7, 5}, "kernel_size=7"),
      grid_case("even_window", {{30}, 1, 4, 2, 16, 16}, "kernel_size=6"),
      grid_case("whole_line", {{23}, 1, 2, 1, 8, 12}, "kernel_size=23"),
      grid_case("several_tiles", {{230}, 1, 1, 1, 20, 20}, "kernel_size=75"),
      grid_case("stride", {{47}}, "kernel_size=9,stride=4"),
      grid_case("stride_is_kernel", {{44}}, "kernel_size=8,stride=8"),
      grid_case("dilation", {{48}}, "kernel_size=5,dilation=3"),
      grid_case("dilation_with_rest", {{71}, 2}, "kernel_size=6,dilation=5,stride=2"),
      grid_case("dilation_few_rows", {{30}}, "kernel_size=2,dilation=13"),
      grid_case("causal", {{66}, 1, 4, 1}, "kernel_size=10,is_causal=1"),
      grid_case("causal_stride", {{67}}, "kernel_size=10,stride=4,is_causal=1"),
      grid_case("causal_dilated", {{67}}, "kernel_size=5,stride=3,dilation=4,is_causal=1"),
      grid_case("rpb", {{60}, 1, 4, 2, 8, 8, -1, {7}}, "kernel_size=7"),
      grid_case("rpb_dilated", {{61}, 2, 2, 2, 8, 8, -1, {8}}, "kernel_size=8,dilation=3"),
      grid_case("additional", {{50}, 2, 4, 2, 8, 6, 7}, "kernel_size=5,stride=2"),
      grid_case("additional_dilated", {{50}, 1, 2, 2, 8, 8, 70, {4}}, "kernel_size=4,dilation=3"),
      grid_case("no_additional", {{20}, 1, 2, 2, 8, 8, 0}, "kernel_size=5"),
      grid_case("scale", {{33}}, "kernel_size=5,scale=-0.6"),
  };
  return cases;
}

std::vector<ExampleCase> plane_cases() {
  return {
      grid_case("one_token", {{1, 1}, 1, 1, 1, 1, 1}, "kernel_size=1"),
      grid_case("window", {{11, 14}, 2, 3, 3, 7, 5}, "kernel_size=3x5"),
      grid_case("even_window", {{13, 9}, 1, 4, 2, 16, 16}, "kernel_size=4x6"),
      grid_case("whole_plane", {{6, 7}, 1, 2, 1, 8, 12}, "kernel_size=6x7"),
      grid_case("thin", {{1, 70}}, "kernel_size=1x9"),
      grid_case("long_axis", {{130, 3}}, "kernel_size=17x2"),
      grid_case("several_tiles", {{24, 24}, 1, 1, 1, 20, 20}, "kernel_size=9"),
      grid_case("stride", {{18, 21}}, "kernel_size=6x7,stride=3x2"),
      grid_case("block_sparse", {{32, 32}, 1, 1, 1}, "kernel_size=16,stride=8"),
      grid_case("shifted_boxes", {{40, 40}, 1, 1, 1}, "kernel_size=12,stride=8"),
      grid_case("stride_is_kernel", {{16, 20}}, "kernel_size=4x8,stride=4x8"),
      grid_case("dilation", {{12, 12}}, "kernel_size=3,dilation=2x3"),
      grid_case("dilation_with_rest", {{17, 14}, 2}, "kernel_size=4x3,dilation=3x4,stride=2x1"),
      grid_case("dilation_few_rows", {{8, 10}}, "kernel_size=2,dilation=4x5"),
      grid_case("causal", {{12, 13}, 1, 4, 1}, "kernel_size=5x4,is_causal=1"),
      grid_case("causal_rows", {{14, 11}}, "kernel_size=6x5,stride=4x2,is_causal=1x0"),
      grid_case("causal_dilated", {{15, 17}},
                "kernel_size=3x5,stride=2,dilation=2x3,is_causal=0x1"),
      grid_case("rpb", {{12, 13}, 1, 4, 2, 8, 8, -1, {5, 4}}, "kernel_size=5x4"),
      grid_case("rpb_dilated", {{13, 12}, 2, 2, 2, 8, 8, -1, {3, 3}}, "kernel_size=3,dilation=3x2"),
      grid_case("additional", {{10, 11}, 2, 4, 2, 8, 6, 7}, "kernel_size=5x3,stride=2x1"),
      grid_case("additional_dilated", {{9, 12}, 1, 2, 2, 8, 8, 70, {2, 3}},
                "kernel_size=2x3,dilation=3"),
      grid_case("no_additional", {{6, 6}, 1, 2, 2, 8, 8, 0}, "kernel_size=5"),
      grid_case("scale", {{9, 9}}, "kernel_size=5,scale=-0.6"),
  };
}

std::vector<ExampleCase> space_cases() {
  return {
      grid_case("one_token", {{1, 1, 1}, 1, 1, 1, 1, 1}, "kernel_size=1"),
      grid_case("window", {{5, 6, 7}, 1, 2, 1, 7, 5}, "kernel_size=3x4x5"),
      grid_case("whole_grid", {{3, 4, 5}, 1, 2, 1, 8, 12}, "kernel_size=3x4x5"),
      grid_case("stride", {{6, 5, 8}}, "kernel_size=3x2x4,stride=2x1x4"),
      grid_case("block_sparse", {{8, 8, 8}, 1, 1, 1}, "kernel_size=4x8x4,stride=4x4x4"),
      grid_case("dilation", {{7, 6, 9}}, "kernel_size=2x3x2,dilation=2x2x3"),
      grid_case("causal_time", {{6, 5, 5}, 1, 2, 2}, "kernel_size=4x3x3,is_causal=1x0x0"),
      grid_case("causal", {{5, 6, 4}}, "kernel_size=3x3x2,stride=2x3x1,is_causal=1"),
      grid_case("rpb", {{4, 5, 6}, 1, 2, 1, 8, 8, -1, {3, 2, 3}}, "kernel_size=3x2x3"),
      grid_case("additional", {{4, 6, 5}, 2, 2, 1, 8, 6, 9, {2, 3, 2}},
                "kernel_size=2x3x2,dilation=2x1x2"),
  };
}

std::string joined(const std::vector<int64_t>& values) {
  std::string text;
  for (int64_t value : values) text += (text.empty() ? "" : "x") + std::to_string(value);
  return text;
}

ExampleCase random_grid_case(int rank, uint64_t seed) {
  CaseRandom random(seed);
  GridShape s;
  const int64_t longest = rank == 1 ? 150 : rank == 2 ? 18 : 8;
  std::vector<int64_t> kernel, stride, dilation, causal;
  const bool with_table = random.chance(0.3);
  for (int a = 0; a < rank; ++a) {
    const int64_t length = random.between(1, random.chance(0.1) ? 4 * longest : longest);
    s.grid.push_back(length);
    dilation.push_back(random.chance(0.6) ? 1 : random.between(1, std::min<int64_t>(length, 5)));
    kernel.push_back(random.between(1, length / dilation.back()));
    stride.push_back(with_table || random.chance(0.4) ? 1 : random.between(1, kernel.back()));
    causal.push_back(!with_table && random.chance(0.25) ? 1 : 0);
  }
  s.batch = random.between(1, 2);
  s.kv_heads = random.between(1, 2);
  s.heads = s.kv_heads * random.between(1, 2);
  s.dim = random.between(1, 24);
  s.value_dim = random.between(1, 24);
  if (random.chance(0.25)) s.additional = random.between(0, 40);
  if (with_table) s.rpb = kernel;
  std::string options = "kernel_size=" + joined(kernel) + ",stride=" + joined(stride) +
                        ",dilation=" + joined(dilation) + ",is_causal=" + joined(causal);
  if (random.chance(0.2)) options += ",scale=" + std::to_string(random.number(-0.6, 0.6));
  return grid_case("", s, options);
}

std::vector<ExampleCase> bench_cases(int rank) {
  if (rank == 1) {
    return {grid_case("n16384_k256", {{16384}, 1, 4, 4, 64, 64}, "kernel_size=256"),
            grid_case("n16384_k256_s64", {{16384}, 1, 4, 4, 64, 64}, "kernel_size=256,stride=64"),
            grid_case("n16384_k256_d8", {{16384}, 1, 4, 4, 64, 64}, "kernel_size=256,dilation=8")};
  }
  if (rank == 3) {
    const GridShape video{{16, 32, 32}, 1, 2, 2, 128, 128};
    return {grid_case("video_s1", video, "kernel_size=8x16x16"),
            grid_case("video_s4x8x16", video, "kernel_size=8x16x16,stride=4x8x16")};
  }
  const GridShape image{{64, 64}, 1, 4, 4, 64, 64};
  return {grid_case("image_k7", image, "kernel_size=7"),
          grid_case("image_k24_s1", image, "kernel_size=24"),
          grid_case("image_k24_s4", image, "kernel_size=24,stride=4"),
          grid_case("image_k24_s8", image, "kernel_size=24,stride=8"),
          grid_case("image_k24_s16", image, "kernel_size=24,stride=16"),
          grid_case("image_k24_s24", image, "kernel_size=24,stride=24"),
          grid_case("image_k13_d4", image, "kernel_size=13,dilation=4")};
}

/// Shorter axes and smaller windows, of a few hundred tokens in all.
ExampleCase shrunk(int rank, const ExampleCase& example) {
  const Spec spec = Spec::parse_options(example.options);
  const NeighborhoodOptions options = options_of({}, spec);
  GridShape s;
  std::vector<int64_t> kernel, stride, dilation, causal;
  const Dims &query = example.inputs[0].second, &key = example.inputs[1].second;
  for (int a = 0; a < rank; ++a) {
    const auto of_axis = [&](const std::vector<int64_t>& values) {
      return values.size() == 1 ? values[0] : values[static_cast<size_t>(a)];
    };
    kernel.push_back(std::min<int64_t>(of_axis(options.kernel_size), rank == 3 ? 3 : 5));
    stride.push_back(std::min(of_axis(options.stride), kernel.back()));
    causal.push_back(options.is_causal[options.is_causal.size() == 1 ? 0 : static_cast<size_t>(a)]);
    dilation.push_back(std::min<int64_t>(of_axis(options.dilation), 2));
    s.grid.push_back(std::min(query[a + 1], (kernel.back() + 4) * dilation.back()));
  }
  s.heads = query[rank + 1] / key[rank + 1];
  s.kv_heads = 1;
  s.dim = query[rank + 2];
  s.value_dim = example.inputs[2].second[rank + 2];
  return grid_case(example.name.c_str(), s,
                   "kernel_size=" + joined(kernel) + ",stride=" + joined(stride) +
                       ",dilation=" + joined(dilation) + ",is_causal=" + joined(causal));
}

using Forward = AttentionResult (*)(const Tensor&, const Tensor&, const Tensor&,
                                    const NeighborhoodOptions&, const RunOptions&);
using Backward = NeighborhoodGradients (*)(const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, const NeighborhoodOptions&,
                                           const RunOptions&);

NamedArrays named(NeighborhoodGradients gradients) {
  NamedArrays arrays = named_arrays({"query", "key", "value"}, std::move(gradients.query),
                                    std::move(gradients.key), std::move(gradients.value));
  if (gradients.additional_keys.view().defined()) {
    arrays.emplace("additional_keys", std::move(gradients.additional_keys));
    arrays.emplace("additional_values", std::move(gradients.additional_values));
  }
  if (gradients.rpb.view().defined()) arrays.emplace("rpb", std::move(gradients.rpb));
  return arrays;
}

std::vector<PathAnswer> explain(int rank, const NamedTensors& in, const Spec& spec,
                                const RunOptions& run) {
  const Tensor &query = in.at("query"), &key = in.at("key");
  const na::GridCall call("explain", rank, query, key, in.at("value"), {}, {},
                          options_of(in, spec));
  if (na::takes_small_windows(call, na::shapes_for(call, run), run)) {
    std::vector<PathAnswer> answers = explain_isas(run);
    for (PathAnswer& answer : answers) answer.path = "small windows, " + answer.path;
    return answers;
  }
  int64_t rows = query.size(rank + 1) / std::max<int64_t>(1, key.size(rank + 1));
  for (int a = 1; a <= rank; ++a) rows *= query.size(a);
  return tiled::explain({rows, query.dtype(), false, rank > 1}, run);
}

int64_t at_least_one(const Spec& spec, const char* key, int64_t fallback) {
  const int64_t value = spec.integer(key).value_or(fallback);
  if (value < 1) {
    fail("na1d", std::string(key) + " is " + std::to_string(value), "at least 1 is needed");
  }
  return value;
}

// Tokens 'dilation' apart see each other in a causal window: one sequence of views for each remainder.
// Without stride, whose last group of a line depends on where the line ends.
ModelAttention line_in_model(const Spec& spec, const ModelLayer&) {
  spec.require_known({"kernel_size", "dilation", "scale"});
  Masks masks;
  masks.causal = true;
  masks.window.left = at_least_one(spec, "kernel_size", 3) - 1;
  const int64_t dilation = at_least_one(spec, "dilation", 1);
  const std::optional<double> scale = spec.number("scale");
  ModelAttention attention;
  attention.over_cache = [=](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const RunOptions& run) {
    const int64_t rows = q.size(2), past = k.size(2) - rows;
    const auto every = [dilation](const Tensor& x, int64_t first) {
      const int64_t count = (x.size(2) - first + dilation - 1) / dilation;
      return Tensor(x.at({0, 0, first}), x.dtype(), {1, x.size(1), count, x.size(3)},
                    {x.stride(0), x.stride(1), x.stride(2) * dilation, 1});
    };
    tiled::Problem problem;
    problem.scale = tiled::resolve_scale("na1d", scale, q.size(3));
    for (int64_t row = 0; row < std::min(rows, dilation); ++row) {
      const int64_t remainder = (past + row) % dilation;
      const Tensor queries = every(q, row), keys = every(k, remainder);
      for (tiled::Sequence& sequence : tiled::batch_sequences(
               queries, keys, every(v, remainder), every(out, row), {},
               tiled::TilePlan::from_masks("na1d", masks, 1, queries.size(2), keys.size(2)))) {
        problem.sequences.push_back(std::move(sequence));
      }
    }
    tiled::forward(problem, run);
  };
  return attention;
}

Mechanism record(int rank, Forward forward, Backward backward, std::vector<ExampleCase> cases) {
  constexpr const char* kGrids[] = {"a line", "a plane", "a grid of three axes"};
  Mechanism m;
  m.name = "na" + std::to_string(rank) + "d";
  m.title = std::string("Neighborhood attention on ") + kGrids[rank - 1];
  m.sheets = {13, 14};
  m.arxiv = {"2403.04690", "2504.16922"};
  m.engine = "tiled";
  m.pass_rank = "i";
  m.card = embedded("neighborhood/card.md");
  for (const std::string& name : {m.name, m.name + "_masked"}) {
    m.cascades.push_back({name, std::string(embedded("neighborhood/" + name + ".cascade"))});
  }
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = std::move(cases);
  m.bench_cases = bench_cases(rank);
  m.forward = [forward](const NamedTensors& in, const Spec& spec, const RunOptions& run) {
    AttentionResult result =
        forward(in.at("query"), in.at("key"), in.at("value"), options_of(in, spec), run);
    return named_arrays({"out", "lse"}, std::move(result.out), std::move(result.lse));
  };
  m.forward_for_backward = [forward, backward](const NamedTensors& in, const Spec& spec,
                                               const RunOptions& run) -> BackwardCall {
    const NeighborhoodOptions options = options_of(in, spec);
    const Tensor query = in.at("query"), key = in.at("key"), value = in.at("value");
    const auto result =
        std::make_shared<const AttentionResult>(forward(query, key, value, options, run));
    return [=](const NamedTensors& gradients) {
      return named(backward(gradients.at("out"), gradients.at("lse"), query, key, value,
                            result->out, result->lse, options, run));
    };
  };
  m.bind = [rank](const NamedTensors& in, const Spec& spec) { return bind(rank, in, spec); };
  m.random_case = [rank](uint64_t seed) { return random_grid_case(rank, seed); };
  m.shrink = [rank](const ExampleCase& example) { return shrunk(rank, example); };
  m.explain = [rank](const NamedTensors& in, const Spec& spec, const RunOptions& run) {
    return explain(rank, in, spec, run);
  };
  if (rank == 1) m.model_attention = line_in_model;
  return m;
}

}  // namespace

std::vector<Mechanism> neighborhood_records() {
  return {record(1, na1d, na1d_backward, line_cases()),
          record(2, na2d, na2d_backward, plane_cases()),
          record(3, na3d, na3d_backward, space_cases())};
}

}  // namespace heed
