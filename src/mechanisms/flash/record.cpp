#include <cmath>
#include <memory>

#include "base/philox.h"
#include "engine/tiled/problem.h"
#include "heed/flash_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

FlashOptions flash_options(const NamedTensors& in, const Spec& options) {
  require_attention_keys(options, {"softcap", "block_rows", "block_keys", "dropout", "seed"});
  FlashOptions chosen{masks_of(in, options), options.number("scale")};
  chosen.softcap = options.number("softcap").value_or(0);
  chosen.alibi_slopes = input_or_none(in, "alibi_slopes");
  chosen.mask = input_or_none(in, "mask");
  chosen.bias = input_or_none(in, "bias");
  chosen.sink = input_or_none(in, "sink");
  chosen.block_mask = input_or_none(in, "block_mask");
  chosen.block_size = {options.integer("block_rows").value_or(64),
                       options.integer("block_keys").value_or(64)};
  chosen.dropout_p = options.number("dropout").value_or(0);
  chosen.seed = static_cast<uint64_t>(options.integer("seed").value_or(0));
  return chosen;
}

NamedArrays named(AttentionResult result) {
  return named_arrays({"out", "lse"}, std::move(result.out), std::move(result.lse));
}

void add_gradient(NamedArrays& to, const char* name, Array& gradient) {
  if (gradient.count() > 0 || gradient.shape().rank() > 0) to.emplace(name, std::move(gradient));
}

NamedArrays named(FlashGradients gradients) {
  NamedArrays arrays;
  add_gradient(arrays, "q", gradients.q);
  add_gradient(arrays, "k", gradients.k);
  add_gradient(arrays, "v", gradients.v);
  add_gradient(arrays, "bias", gradients.bias);
  gradients.alibi_slopes = slopes_gradient(std::move(gradients.alibi_slopes));
  add_gradient(arrays, "alibi_slopes", gradients.alibi_slopes);
  add_gradient(arrays, "sink", gradients.sink);
  return arrays;
}

std::vector<CascadeText> softmax_cascades() {
  std::vector<CascadeText> texts;
  for (const char* name : {"softmax", "two_pass", "flash", "with_options"}) {
    texts.push_back({name, std::string(embedded(std::string("flash/") + name + ".cascade"))});
  }
  return texts;
}

bool truth(const Tensor& t, std::initializer_list<int64_t> index) {
  return *reinterpret_cast<const uint8_t*>(t.at(index)) != 0;
}

// Index along an axis that may be broadcast.
int64_t along(const Dims& shape, int axis, int64_t i) {
  return shape.rank() + axis < 0 || shape[shape.rank() + axis] == 1 ? 0 : i;
}

void bind_masks(const NamedTensors& in, const FlashOptions& options, cascade::Bindings& bindings) {
  const Tensor mask = options.mask, blocks = options.block_mask;
  const auto size = options.block_size;
  (void)in;
  bindings.predicates["seen"] = [mask, blocks, size](std::span<const int64_t> i) {
    if (mask.defined()) {
      const Dims& s = mask.shape();
      if (!truth(mask, {along(s, -4, i[0]), along(s, -3, i[1]), along(s, -2, i[2]),
                        along(s, -1, i[3])})) {
        return false;
      }
    }
    return !blocks.defined() ||
           truth(blocks, {along(blocks.shape(), -3, i[1]), i[2] / size[0], i[3] / size[1]});
  };
}

cascade::Bindings bind_flash(const NamedTensors& in, const Spec& options) {
  cascade::Bindings bindings = bind_attention(in, options);
  const FlashOptions chosen = flash_options(in, options);
  bind_masks(in, chosen, bindings);
  Dims bias{1, 1, 1, 1};
  bindings.tensors["Bias"] = {{1, 1, 1, 1}, {0}};
  if (chosen.bias.defined()) {
    bias = chosen.bias.shape();
    bindings.tensors["Bias"] = to_nd(chosen.bias);
  }
  int axis = -4;
  for (const char* name : {"bb", "bh", "bp", "bm"}) {
    bindings.indices[name] = [bias, axis](std::span<const int64_t> i) {
      return along(bias, axis, i[0]);
    };
    ++axis;
  }
  if (chosen.softcap > 0) bindings.scalars["softcap"] = chosen.softcap;
  bind_slopes(in, bindings);
  if (chosen.sink.defined()) bindings.tensors["Sink"] = to_nd(chosen.sink);
  if (chosen.dropout_p > 0) {
    const Tensor &q = in.at("q"), &k = in.at("k");
    tiled::Policy policy;
    policy.dropout = chosen.dropout_p;
    policy.seed = chosen.seed;
    cascade::NdArray kept{{q.size(0), q.size(1), q.size(2), k.size(2)}, {}};
    for (int64_t b = 0; b < q.size(0); ++b) {
      for (int64_t h = 0; h < q.size(1); ++h) {
        for (int64_t i = 0; i < q.size(2); ++i) {
          for (int64_t j = 0; j < k.size(2); ++j) {
            kept.values.push_back(tiled::dropout_factor(policy, b, h, i, j));
          }
        }
      }
    }
    bindings.tensors["Kept"] = std::move(kept);
  }
  return bindings;
}

void fill_flash(const ExampleCase& example, const std::string& input, uint64_t seed,
                const Tensor& to_fill) {
  fill_lengths(example, input, seed, to_fill);
  if (input == "alibi_slopes") {  // slopes below 0 would let distant keys win by hundreds
    const Array positive = convert(to_fill, DType::f64);
    for (int64_t i = 0; i < positive.count(); ++i) {
      positive.as<double>()[i] = std::abs(positive.as<double>()[i]);
    }
    copy(positive, to_fill);
  }
  if (input == "mask" || input == "block_mask") {
    for (int64_t i = 0; i < to_fill.count(); ++i) {
      to_fill.as<uint8_t>()[i] = philox_word(seed, static_cast<uint64_t>(i)) % 3 == 0;
    }
  }
}

// A case of the full definition with further inputs [name, shape, type]; f32 ones are f64 in f64 calls.
struct More {
  const char* name;
  Dims shape;
  DType type = DType::f32;
};
ExampleCase with_options(ExampleCase example, const std::vector<More>& inputs) {
  example.definition = "with_options";
  for (const More& input : inputs) {
    example.inputs.emplace_back(input.name, input.shape);
    example.types[input.name] = input.type;
  }
  return example;
}
ExampleCase option_case(const char* name, const AttentionShape& shape, const char* options,
                        const std::vector<More>& inputs = {}) {
  return with_options(attention_case(name, shape, options), inputs);
}

std::vector<ExampleCase> option_cases() {
  constexpr DType kBool = DType::boolean, kF32 = DType::f32;
  return {
      option_case("softcap", {1, 2, 1, 40, 70, 16, 12}, "softcap=1.5,causal=1"),
      option_case("softcap_negative_scale", {1, 1, 1, 20, 30, 8, 8}, "softcap=0.7,scale=-0.9"),
      option_case("softcap_few_rows", {1, 4, 2, 2, 70, 16, 12}, "softcap=1.5,causal=1"),
      option_case("alibi", {2, 4, 2, 60, 75, 16, 16}, "causal=1", {{"alibi_slopes", {4}}}),
      option_case("alibi_per_sequence", {3, 4, 2, 40, 55, 16, 16}, "", {{"alibi_slopes", {3, 4}}}),
      option_case("alibi_few_rows", {1, 4, 2, 3, 75, 16, 16}, "", {{"alibi_slopes", {4}}}),
      option_case("sink", {2, 4, 2, 53, 61, 16, 16}, "window=7,causal=1", {{"sink", {4}}}),
      option_case("sink_dead_rows", {1, 2, 2, 40, 21, 9, 9}, "causal=1", {{"sink", {2}}}),
      option_case("sink_split", {1, 2, 1, 2, 1500, 8, 8}, "", {{"sink", {2}}}),
      option_case("sink_cut", {1, 14, 1, 2, 2100, 8, 8}, "", {{"sink", {14}}}),
      option_case("mask_and_bias_cut", {1, 2, 1, 26, 2100, 8, 8}, "causal=1",
                  {{"mask", {1, 2, 26, 2100}, kBool}, {"bias", {1, 2, 26, 2100}}}),
      option_case("dropout_cut", {1, 2, 1, 27, 2100, 8, 8}, "dropout=0.3,seed=5"),
      option_case("bias", {2, 4, 2, 50, 70, 16, 16}, "", {{"bias", {2, 4, 50, 70}}}),
      option_case("bias_per_head", {2, 4, 2, 50, 70, 16, 16}, "causal=1",
                  {{"bias", {1, 4, 50, 70}, kF32}}),
      option_case("bias_per_key", {2, 2, 2, 55, 70, 16, 16}, "", {{"bias", {2, 1, 1, 70}}}),
      option_case("bias_per_row", {1, 2, 2, 55, 90, 16, 16}, "", {{"bias", {1, 1, 55, 1}}}),
      option_case("bias_few_rows", {1, 4, 1, 3, 70, 16, 16}, "", {{"bias", {1, 4, 3, 70}}}),
      option_case("mask", {2, 3, 1, 50, 300, 24, 16}, "", {{"mask", {2, 1, 50, 300}, kBool}}),
      option_case("mask_causal", {1, 2, 2, 90, 90, 24, 16}, "causal=1",
                  {{"mask", {1, 1, 90, 90}, kBool}}),
      option_case("mask_few_rows", {2, 4, 2, 3, 90, 24, 16}, "", {{"mask", {2, 1, 1, 90}, kBool}}),
      option_case("mask_and_bias", {1, 2, 2, 45, 90, 24, 16}, "softcap=2",
                  {{"mask", {1, 2, 45, 90}, kBool}, {"bias", {1, 1, 45, 90}}, {"sink", {2}}}),
      option_case("blocks", {1, 2, 2, 150, 200, 24, 16}, "", {{"block_mask", {2, 3, 4}, kBool}}),
      option_case("small_blocks", {2, 2, 1, 70, 90, 24, 16}, "causal=1,block_rows=7,block_keys=13",
                  {{"block_mask", {1, 10, 7}, kBool}}),
      option_case("dropout", {2, 2, 1, 50, 90, 24, 16}, "causal=1,dropout=0.3,seed=7"),
      option_case("dropout_few_rows", {1, 4, 2, 2, 90, 24, 16}, "dropout=0.5,seed=1"),
  };
}

// Any mix of options over any shape.
ExampleCase random_flash_case(uint64_t seed) {
  CaseRandom random(seed);
  ExampleCase example = random_attention_case(random);
  const auto size = [&](size_t input, int axis) { return example.inputs[input].second[axis]; };
  const int64_t batch = size(0, 0), heads = size(0, 1), queries = size(0, 2), keys = size(1, 2);
  const auto add = [&](const char* name, const Dims& shape, DType type) {
    example.inputs.emplace_back(name, shape);
    example.types[name] = type;
  };
  const auto option = [&](const std::string& text) {
    example.options += (example.options.empty() ? "" : ",") + text;
  };
  const auto some = [&](int64_t extent) { return random.chance(0.5) ? extent : 1; };
  example.definition = "with_options";
  if (random.chance(0.25)) option("softcap=" + std::to_string(random.number(0.5, 3)));
  if (random.chance(0.25)) add("alibi_slopes", {heads}, DType::f32);
  if (random.chance(0.25)) add("sink", {heads}, DType::f32);
  if (random.chance(0.3)) {
    // One number for all keys has a gradient of 0, of which only rounding would be left to compare.
    add("bias", {some(batch), some(heads), some(queries), keys}, DType::f32);
  }
  if (random.chance(0.3)) {
    add("mask", {some(batch), some(heads), some(queries), some(keys)}, DType::boolean);
  }
  if (random.chance(0.2)) {
    const int64_t rows = random.between(1, 70), columns = random.between(1, 130);
    option("block_rows=" + std::to_string(rows) + ",block_keys=" + std::to_string(columns));
    add("block_mask", {some(heads), (queries + rows - 1) / rows, (keys + columns - 1) / columns},
        DType::boolean);
  }
  if (random.chance(0.2)) {
    option("dropout=" + std::to_string(random.number(0, 0.9)) +
           ",seed=" + std::to_string(random.between(0, 1000)));
  }
  return example;
}

ExampleCase decode_case(const std::string& name, const AttentionShape& s,
                        const std::string& options) {
  ExampleCase example{name,
                      {{"q", {s.batch, s.heads, s.queries, s.dim}},
                       {"k_cache", {s.batch, s.kv_heads, s.keys, s.dim}},
                       {"v_cache", {s.batch, s.kv_heads, s.keys, s.value_dim}},
                       {"lengths", {s.batch}}},
                      options};
  example.types["lengths"] = DType::i32;
  return example;
}

ExampleCase random_decode_case(uint64_t seed) {
  CaseRandom random(seed);
  AttentionShape s;
  s.batch = random.between(1, 3);
  s.kv_heads = random.between(1, 3);
  s.heads = s.kv_heads * random.between(1, 5);
  s.queries = random.chance(0.5) ? 1 : random.between(1, 16);
  s.keys = random.chance(0.1) ? random.between(1000, 2300) : random.between(1, 300);
  s.dim = random.between(1, 100);
  s.value_dim = random.chance(0.5) ? s.dim : random.between(1, 100);
  std::string options;
  if (random.chance(0.3)) options = "window=" + std::to_string(random.between(0, 200));
  if (random.chance(0.2)) {
    options += (options.empty() ? "splits=" : ",splits=") + std::to_string(random.between(1, 5));
  }
  std::vector<More> more;
  if (random.chance(0.2)) more.push_back({"sink", {s.heads}});
  if (random.chance(0.2)) more.push_back({"alibi_slopes", {s.heads}});
  const bool capped = random.chance(0.2);
  if (capped) {
    options += (options.empty() ? "softcap=" : ",softcap=") + std::to_string(random.number(0.5, 3));
  }
  ExampleCase example = decode_case("", s, options);
  return capped || !more.empty() ? with_options(std::move(example), more) : example;
}

Mechanism flash_record() {
  Mechanism m;
  m.name = "flash_attention";
  m.title = "Exact softmax attention in one pass over the keys";
  m.sheets = {1};
  m.arxiv = {"2205.14135", "2307.08691"};
  m.engine = "tiled";
  m.any_head_dim = true;
  m.pass_rank = "m";
  m.card = embedded("flash/card.md");
  m.cascades = softmax_cascades();
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = common_attention_cases();
  for (ExampleCase& example : option_cases()) m.cases.push_back(std::move(example));
  m.bench_cases = attention_bench_cases();
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named(
        flash_attention(in.at("q"), in.at("k"), in.at("v"), flash_options(in, options), run));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec& options,
                              const RunOptions& run) -> BackwardCall {
    const FlashOptions chosen = flash_options(in, options);
    const auto result = std::make_shared<const AttentionResult>(
        flash_attention(in.at("q"), in.at("k"), in.at("v"), chosen, run));
    return [in, chosen, run, result](const NamedTensors& gradients) {
      return named(flash_attention_backward(gradients.at("out"), gradients.at("lse"), in.at("q"),
                                            in.at("k"), in.at("v"), result->out, result->lse,
                                            chosen, run));
    };
  };
  m.bind = bind_flash;
  m.explain = explain_attention;
  m.fill = fill_flash;
  m.random_case = random_flash_case;
  m.model_attention = [](const Spec& options, const ModelLayer&) {
    options.require_known({"causal", "window", "softcap", "scale"});
    FlashOptions chosen = flash_options({}, options);
    chosen.masks.causal = true;
    return ModelAttention{.over_cache = [chosen](const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const RunOptions& run) {
      flash_attention(q, k, v, out, {}, chosen, run);
    }};
  };
  return m;
}

// Decoding is the same mechanism with queries aligned to lengths[b] instead of the end of the cache.
cascade::Bindings bind_decode(const NamedTensors& in, const Spec& options) {
  NamedTensors renamed = {{"q", in.at("q")}, {"k", in.at("k_cache")}, {"v", in.at("v_cache")}};
  for (const char* name : {"sink", "alibi_slopes"}) {
    if (const auto given = in.find(name); given != in.end()) renamed[name] = given->second;
  }
  cascade::Bindings bindings = bind_flash(renamed, Spec::parse_options(""));
  const std::vector<double> lengths = to_nd(in.at("lengths")).values;
  cascade::NdArray behind{{in.at("q").size(0)}, {}};
  for (const double length : lengths) {
    behind.values.push_back(static_cast<double>(in.at("k_cache").size(2)) - length);
  }
  bindings.tensors["Behind"] = std::move(behind);
  const auto window = options.integer("window");
  const int64_t queries = in.at("q").size(2);
  if (options.has("scale")) bindings.scalars["scale"] = *options.number("scale");
  bindings.scalars["softcap"] = options.number("softcap").value_or(0);
  bindings.predicates["keep"] = [lengths, window, queries](std::span<const int64_t> i) {
    const int64_t position =
        static_cast<int64_t>(lengths[static_cast<size_t>(i[0])]) - queries + i[1];
    return i[2] <= position && (!window || i[2] >= position - *window);
  };
  return bindings;
}

void fill_decode(const ExampleCase& example, const std::string& input, uint64_t seed,
                 const Tensor& to_fill) {
  ExampleCase renamed = example;
  for (auto& [name, shape] : renamed.inputs) {
    if (name == "k_cache") name = "k";
  }
  fill_flash(renamed, input, seed, to_fill);
}

DecodeOptions decode_options(const NamedTensors& in, const Spec& options) {
  DecodeOptions chosen;
  chosen.scale = options.number("scale");
  chosen.window = options.integer("window");
  chosen.splits = options.integer("splits").value_or(0);
  chosen.sink = input_or_none(in, "sink");
  chosen.softcap = options.number("softcap").value_or(0);
  chosen.alibi_slopes = input_or_none(in, "alibi_slopes");
  return chosen;
}

Mechanism decode_record() {
  Mechanism m;
  m.name = "decode_attention";
  m.title = "Softmax attention of a sequence's last tokens over its cache";
  m.sheets = {1};
  m.arxiv = {"2307.08691"};
  m.engine = "tiled";
  m.any_head_dim = true;
  m.pass_rank = "m";
  m.card = embedded("flash/card.md");
  m.cascades = softmax_cascades();
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = {decode_case("one_query", {3, 4, 2, 1, 70, 16, 16}, ""),
             decode_case("several_queries", {3, 2, 1, 5, 90, 20, 12}, ""),
             decode_case("sixteen_queries_grouped", {3, 8, 2, 16, 90, 64, 64}, ""),
             decode_case("window", {3, 3, 1, 4, 90, 33, 33}, "window=11"),
             decode_case("splits", {3, 3, 3, 2, 1400, 8, 8}, "splits=3"),
             decode_case("many_keys", {1, 3, 1, 1, 2600, 16, 16}, "")};
  const auto more = [&](const char* name, const AttentionShape& shape, const char* options,
                        const std::vector<More>& inputs) {
    m.cases.push_back(with_options(decode_case(name, shape, options), inputs));
  };
  more("sink", {3, 4, 2, 2, 2100, 16, 16}, "", {{"sink", {4}}});
  more("softcap", {3, 4, 2, 3, 90, 16, 16}, "softcap=1.5", {});
  more("alibi", {3, 4, 2, 3, 90, 16, 12}, "", {{"alibi_slopes", {4}}});
  more("alibi_per_sequence", {3, 4, 2, 1, 90, 16, 12}, "", {{"alibi_slopes", {3, 4}}});
  more("options_cut", {3, 4, 2, 2, 2100, 16, 16}, "softcap=2,window=1500",
       {{"alibi_slopes", {4}}, {"sink", {4}}});
  for (int64_t keys : {512, 4096, 16384}) {
    m.bench_cases.push_back(
        decode_case("kv" + std::to_string(keys), {1, 32, 8, 1, keys, 128, 128}, ""));
  }
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    options.require_known({"window", "scale", "splits", "softcap"});
    return named(decode_attention(in.at("q"), in.at("k_cache"), in.at("v_cache"), in.at("lengths"),
                                  decode_options(in, options), run));
  };
  m.bind = bind_decode;
  m.fill = fill_decode;
  m.random_case = random_decode_case;
  m.explain = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return explain_attention({{"q", in.at("q")}, {"v", in.at("v_cache")}}, options, run);
  };
  return m;
}

Mechanism merge_record() {
  Mechanism m;
  m.name = "merge_attention";
  m.title = "Exact merge of two softmax results over disjoint keys";
  m.sheets = {1, 13, 22};
  m.arxiv = {"2307.08691"};
  m.engine = "none";
  m.pass_rank = "p";
  m.card = embedded("flash/card.md");
  m.cascades = {{"merge", std::string(embedded("flash/merge.cascade"))}};
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  const auto merge_case = [](const char* name, Dims out) {
    const Dims rows{out[0], out[1], out[2]};
    ExampleCase example{
        name, {{"out_a", out}, {"lse_a", rows}, {"out_b", out}, {"lse_b", rows}}, ""};
    example.types = {{"lse_a", DType::f32}, {"lse_b", DType::f32}};
    return example;
  };
  m.cases = {merge_case("rows", {2, 3, 17, 9}), merge_case("one", {1, 1, 1, 1})};
  m.bench_cases = {merge_case("n4096", {1, 8, 4096, 64})};
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    options.require_known({});
    return named(
        merge_attention(in.at("out_a"), in.at("lse_a"), in.at("out_b"), in.at("lse_b"), run));
  };
  m.forward_for_backward = [](const NamedTensors& in, const Spec&,
                              const RunOptions& run) -> BackwardCall {
    const Tensor out_a = in.at("out_a"), lse_a = in.at("lse_a"), out_b = in.at("out_b"),
                 lse_b = in.at("lse_b");
    return [=](const NamedTensors& gradients) {
      MergeGradients to = merge_attention_backward(gradients.at("out"), gradients.at("lse"), out_a,
                                                   lse_a, out_b, lse_b, run);
      return named_arrays({"out_a", "lse_a", "out_b", "lse_b"}, std::move(to.out_a),
                          std::move(to.lse_a), std::move(to.out_b), std::move(to.lse_b));
    };
  };
  m.bind = [](const NamedTensors& in, const Spec&) {
    cascade::Bindings bindings;
    bindings.tensors = {{"OUT_A", to_nd(in.at("out_a"))},
                        {"LSE_A", to_nd(in.at("lse_a"))},
                        {"OUT_B", to_nd(in.at("out_b"))},
                        {"LSE_B", to_nd(in.at("lse_b"))}};
    return bindings;
  };
  m.explain = [](const NamedTensors&, const Spec&, const RunOptions& run) {
    return explain_isas(run);
  };
  return m;
}

}  // namespace

std::vector<Mechanism> flash_records() { return {flash_record(), decode_record(), merge_record()}; }

}  // namespace heed
