#include "heed/flash_attention.h"
#include "mechanisms/attention_case.h"
#include "mechanisms/embedded.h"

namespace heed {

namespace {

FlashOptions flash_options(const NamedTensors& in, const Spec& options) {
  require_attention_keys(options);
  return {masks_of(in, options), options.number("scale")};
}

NamedArrays named(AttentionResult result) {
  NamedArrays arrays;
  arrays.emplace("out", std::move(result.out));
  arrays.emplace("lse", std::move(result.lse));
  return arrays;
}

std::vector<CascadeText> softmax_cascades() {
  std::vector<CascadeText> texts;
  for (const char* name : {"softmax", "two_pass", "flash"}) {
    texts.push_back({name, std::string(embedded(std::string("flash/") + name + ".cascade"))});
  }
  return texts;
}

Mechanism flash_record() {
  Mechanism m;
  m.name = "flash_attention";
  m.title = "Exact softmax attention in one pass over the keys";
  m.sheets = {1};
  m.arxiv = {"2205.14135", "2307.08691"};
  m.engine = "tiled";
  m.pass_rank = "m";
  m.card = embedded("flash/card.md");
  m.cascades = softmax_cascades();
  m.outputs = {{"out", "O"}, {"lse", "LSE"}};
  m.cases = common_attention_cases();
  m.bench_cases = attention_bench_cases();
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    return named(
        flash_attention(in.at("q"), in.at("k"), in.at("v"), flash_options(in, options), run));
  };
  m.bind = bind_attention;
  m.explain = explain_attention;
  m.fill = fill_lengths;
  m.model_attention = [](const Spec& options) -> ModelAttention {
    FlashOptions chosen = flash_options({}, options);
    chosen.masks.causal = true;
    return [chosen](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                    const RunOptions& run) { flash_attention(q, k, v, out, {}, chosen, run); };
  };
  return m;
}

// Decoding is the same mechanism with queries aligned to lengths[b] instead of the end of the cache.
cascade::Bindings bind_decode(const NamedTensors& in, const Spec& options) {
  NamedTensors renamed = {{"q", in.at("q")}, {"k", in.at("k_cache")}, {"v", in.at("v_cache")}};
  cascade::Bindings bindings = bind_attention(renamed, Spec::parse_options(""));
  const std::vector<double> lengths = to_nd(in.at("lengths")).values;
  const auto window = options.integer("window");
  const int64_t queries = in.at("q").size(2);
  if (options.has("scale")) bindings.scalars["scale"] = *options.number("scale");
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
  fill_lengths(renamed, input, seed, to_fill);
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

Mechanism decode_record() {
  Mechanism m;
  m.name = "decode_attention";
  m.title = "Softmax attention of a sequence's last tokens over its cache";
  m.sheets = {1};
  m.arxiv = {"2307.08691"};
  m.engine = "tiled";
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
  for (int64_t keys : {512, 4096, 16384}) {
    m.bench_cases.push_back(
        decode_case("kv" + std::to_string(keys), {1, 32, 8, 1, keys, 128, 128}, ""));
  }
  m.forward = [](const NamedTensors& in, const Spec& options, const RunOptions& run) {
    options.require_known({"window", "scale", "splits"});
    return named(decode_attention(
        in.at("q"), in.at("k_cache"), in.at("v_cache"), in.at("lengths"),
        {options.number("scale"), options.integer("window"), options.integer("splits").value_or(0)},
        run));
  };
  m.bind = bind_decode;
  m.fill = fill_decode;
  m.explain = [](const NamedTensors& in, const RunOptions& run) {
    return explain_attention({{"q", in.at("q")}, {"v", in.at("v_cache")}}, run);
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
  m.bind = [](const NamedTensors& in, const Spec&) {
    cascade::Bindings bindings;
    bindings.tensors = {{"OA", to_nd(in.at("out_a"))},
                        {"LSEA", to_nd(in.at("lse_a"))},
                        {"OB", to_nd(in.at("out_b"))},
                        {"LSEB", to_nd(in.at("lse_b"))}};
    return bindings;
  };
  m.explain = [](const NamedTensors&, const RunOptions&) {
    return std::vector<PathAnswer>{{"portable", true, ""}};
  };
  return m;
}

}  // namespace

std::vector<Mechanism> flash_records() { return {flash_record(), decode_record(), merge_record()}; }

}  // namespace heed
