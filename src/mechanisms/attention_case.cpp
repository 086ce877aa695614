#include "mechanisms/attention_case.h"

#include <cmath>

#include "base/philox.h"
#include "engine/tiled/path.h"
#include "heed/error.h"

namespace heed {

const std::vector<std::string>& mask_keys() {
  static const std::vector<std::string> keys{"causal", "window", "left", "right", "scale"};
  return keys;
}

void require_attention_keys(const Spec& options, const std::vector<std::string>& more) {
  std::vector<std::string> known = mask_keys();
  known.insert(known.end(), more.begin(), more.end());
  options.require_known(known);
}

Masks masks_of(const NamedTensors& in, const Spec& options) {
  if (options.has("window") && options.has("left")) {
    throw Error("options window=" + *options.text("window") + " and left=" + *options.text("left") +
                ": both say how many keys before its own a query sees, one of them is needed");
  }
  Masks masks;
  masks.causal = options.flag("causal");
  masks.window.left = options.has("left") ? options.integer("left") : options.integer("window");
  masks.window.right = options.integer("right");
  masks.lengths = input_or_none(in, "lengths");
  return masks;
}

cascade::Bindings bind_attention(const NamedTensors& in, const Spec& options) {
  const Tensor &q = in.at("q"), &k = in.at("k"), &v = in.at("v");
  const Masks masks = masks_of(in, options);
  const int64_t offset = k.size(2) - q.size(2), group = q.size(1) / k.size(1);
  std::vector<double> lengths(static_cast<size_t>(q.size(0)), static_cast<double>(k.size(2)));
  if (masks.lengths.defined()) lengths = to_nd(masks.lengths).values;

  cascade::Bindings bindings;
  bindings.tensors = {{"Q", to_nd(q)}, {"K", to_nd(k)}, {"V", to_nd(v)}};
  bindings.sizes = {{"M0", 5}};  // does not divide most lengths, on purpose
  bindings.scalars["scale"] =
      options.number("scale").value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  bindings.indices["g"] = [group](std::span<const int64_t> i) { return i[0] / group; };
  bindings.predicates["keep"] = [masks, offset, lengths](std::span<const int64_t> i) {
    const int64_t position = i[1] + offset, key = i[2];
    if (masks.causal && key > position) return false;
    if (masks.window.left && key < position - *masks.window.left) return false;
    if (masks.window.right && key > position + *masks.window.right) return false;
    return static_cast<double>(key) < lengths[static_cast<size_t>(i[0])];
  };
  return bindings;
}

void bind_slopes(const NamedTensors& in, cascade::Bindings& bindings) {
  const Tensor slopes = input_or_none(in, "alibi_slopes");
  const int64_t heads = in.at("q").size(1);
  const bool each = slopes.rank() == 2;
  bindings.indices["sb"] = [each](std::span<const int64_t> b) { return each ? b[0] : 0; };
  cascade::NdArray& bound = bindings.tensors["Alibi_Slopes"];
  if (slopes.defined()) {
    bound = to_nd(slopes);
  } else {
    bound.values.assign(static_cast<size_t>(heads), 0);
  }
  if (!each) bound.shape = {1, heads};
}

Array slopes_gradient(Array gradient) {
  if (gradient.shape().rank() != 1) return gradient;
  Array row(gradient.dtype(), {1, gradient.count()});
  copy(gradient, row.view().select(0, 0));
  return row;
}

void fill_lengths(const ExampleCase& example, const std::string& input, uint64_t seed,
                  const Tensor& to_fill) {
  if (input != "lengths") return;
  int64_t keys = 0;
  for (const auto& [name, shape] : example.inputs) {
    if (name == "k") keys = shape[2];
  }
  for (int64_t b = 0; b < to_fill.size(0); ++b) {
    const uint64_t word = philox_word(seed, static_cast<uint64_t>(b));
    // A lone entry is full; of several, one stays empty and one full: both ends of the range.
    const bool full = b == 2 || to_fill.size(0) == 1;
    const int64_t value = b == 1 ? 0
                          : full ? keys
                                 : static_cast<int64_t>(word % static_cast<uint64_t>(keys + 1));
    if (to_fill.dtype() == DType::i32) {
      *reinterpret_cast<int32_t*>(to_fill.at({b})) = static_cast<int32_t>(value);
    } else {
      *reinterpret_cast<int64_t*>(to_fill.at({b})) = value;
    }
  }
}

std::vector<PathAnswer> explain_attention(const NamedTensors& in, const Spec&,
                                          const RunOptions& run) {
  const Tensor &q = in.at("q"), &v = in.at("v");
  const int64_t group = q.size(1) / v.size(1);
  return tiled::explain({group * q.size(2), q.dtype()}, run);
}

ExampleCase attention_case(std::string name, const AttentionShape& s, std::string options) {
  return {std::move(name),
          {{"q", {s.batch, s.heads, s.queries, s.dim}},
           {"k", {s.batch, s.kv_heads, s.keys, s.dim}},
           {"v", {s.batch, s.kv_heads, s.keys, s.value_dim}}},
          std::move(options)};
}

ExampleCase padded_case(std::string name, const AttentionShape& shape, std::string options) {
  ExampleCase example = attention_case(std::move(name), shape, std::move(options));
  example.inputs.emplace_back("lengths", Dims{shape.batch});
  example.types["lengths"] = DType::i64;
  return example;
}

std::vector<ExampleCase> common_attention_cases(const std::string& options) {
  const auto with = [&](const std::string& more) {
    return options.empty() || more.empty() ? options + more : options + "," + more;
  };
  return {
      attention_case("one_key", {1, 1, 1, 1, 1, 1, 1}, with("")),
      attention_case("odd", {2, 3, 3, 37, 53, 7, 5}, with("")),
      attention_case("causal", {1, 2, 2, 70, 70, 16, 16}, with("causal=1")),
      attention_case("causal_gqa", {2, 6, 2, 33, 65, 20, 24}, with("causal=1")),
      attention_case("more_queries_than_keys", {1, 2, 1, 50, 21, 8, 8}, with("causal=1")),
      attention_case("window", {1, 2, 2, 90, 90, 12, 12}, with("left=9,right=4")),
      attention_case("causal_window", {1, 2, 2, 67, 131, 33, 17}, with("causal=1,window=13")),
      attention_case("right_window", {1, 1, 1, 40, 60, 9, 9}, with("right=3")),
      attention_case("head_dim_80", {1, 2, 1, 50, 61, 80, 80}, with("")),
      attention_case("head_dim_256", {1, 1, 1, 26, 40, 256, 256}, with("causal=1")),
      attention_case("several_tiles", {1, 1, 1, 201, 530, 24, 40}, with("causal=1")),
      attention_case("few_rows", {2, 4, 2, 3, 75, 40, 40}, with("causal=1")),
      attention_case("few_rows_many_keys", {1, 3, 1, 1, 2300, 10, 10}, with("")),
      attention_case("heads_as_rows", {2, 40, 2, 1, 70, 24, 16}, with("")),
      attention_case("heads_as_rows_cut", {1, 21, 1, 1, 2300, 10, 10}, with("causal=1,left=2100")),
      attention_case("cut_along_keys", {1, 2, 1, 20, 2300, 10, 12}, with("causal=1")),
      attention_case("scale", {1, 2, 2, 30, 30, 8, 8}, with("scale=0.7")),
      attention_case("negative_scale", {1, 2, 2, 30, 30, 8, 8}, with("scale=-0.4,causal=1")),
      attention_case("zero_scale", {1, 1, 1, 30, 30, 8, 8}, with("scale=0")),
      padded_case("lengths", {4, 2, 1, 30, 45, 16, 16}, with("")),
      padded_case("lengths_causal", {4, 2, 2, 30, 45, 16, 16}, with("causal=1")),
      padded_case("lengths_cut", {3, 1, 1, 17, 2060, 8, 8}, with("causal=1,window=1300")),
      padded_case("lengths_few_rows", {4, 2, 1, 2, 45, 16, 16}, with("causal=1,window=20")),
  };
}

int64_t CaseRandom::between(int64_t least, int64_t most) {
  const auto span = static_cast<uint64_t>(most - least + 1);
  return least + static_cast<int64_t>(philox_word(seed_, drawn_++) % span);
}

bool CaseRandom::chance(double probability) {
  return philox_word(seed_, drawn_++) < probability * 0x1p32;
}

double CaseRandom::number(double least, double most) {
  // Few digits, so that the text of the options is the number.
  return least + (most - least) * static_cast<double>(between(0, 1024)) / 1024;
}

ExampleCase random_attention_case(CaseRandom& random, const std::string& extra) {
  AttentionShape s;
  s.batch = random.between(1, 3);
  s.kv_heads = random.between(1, 3);
  s.heads = s.kv_heads * random.between(1, 3);
  s.queries = random.chance(0.3) ? random.between(1, 6) : random.between(1, 90);
  s.keys = random.chance(0.15) ? random.between(150, 420) : random.between(1, 100);
  s.dim = random.chance(0.2) ? random.between(40, 136) : random.between(1, 40);
  s.value_dim = random.chance(0.5) ? s.dim : random.between(1, 70);
  std::string options = extra;
  const auto add = [&](const std::string& option) {
    options += (options.empty() ? "" : ",") + option;
  };
  if (random.chance(0.4)) add("causal=1");
  if (random.chance(0.3)) add("left=" + std::to_string(random.between(0, 60)));
  if (random.chance(0.2)) add("right=" + std::to_string(random.between(0, 60)));
  if (random.chance(0.3)) add("scale=" + std::to_string(random.number(-0.6, 0.6)));
  return random.chance(0.25) ? padded_case("", s, options) : attention_case("", s, options);
}

std::vector<ExampleCase> attention_bench_cases() {
  std::vector<ExampleCase> cases;
  for (int64_t dim : {32, 64, 80, 128}) {
    for (int64_t tokens : {512, 1024, 4096}) {
      for (bool causal : {false, true}) {
        const int64_t heads = tokens < 4096 ? 4 : 1;
        cases.push_back(attention_case(
            "d" + std::to_string(dim) + "_n" + std::to_string(tokens) + (causal ? "_causal" : ""),
            {1, heads, heads, tokens, tokens, dim, dim}, causal ? "causal=1" : ""));
      }
    }
  }
  return cases;
}

}  // namespace heed
