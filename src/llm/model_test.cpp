#include "llm/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <span>

#include "heed/error.h"
#include "llm/gguf_builder.h"
#include "llm/model_config.h"
#include "llm/test_models.h"
#include "llm/tokenizer.h"

namespace heed {
namespace {

std::vector<int32_t> story_tokens(const GgufFile& file, size_t count) {
  const Tokenizer tokenizer(file);
  std::vector<int32_t> tokens = tokenizer.encode(
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
      "park. "
      "One day, she saw a big, red ball. She wanted to play with it, but it was too high. Lily's "
      "mom "
      "said, \"Let's find a stick.\" They looked and looked, and then they found one near a tree.");
  tokens.resize(count, 400);
  return tokens;
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (std::isnan(difference)) return difference;
    largest = std::max(largest, difference);
  }
  return largest;
}

TEST(Model, ChunksOfAnySizeGiveTheSameLogits) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = story_tokens(file, 120);
  Model whole(file, plain_options());
  EXPECT_EQ(whole.dtype(), ModelDtype::f32);
  const auto expected = all_logits(whole, tokens);
  ASSERT_EQ(expected.size(), tokens.size());
  for (size_t step : {1, 2, 7, 13, 64}) {
    Model cut(file, plain_options());
    for (size_t begin = 0; begin < tokens.size(); begin += step) {
      const size_t end = std::min(tokens.size(), begin + step);
      cut.append(std::span(tokens).subspan(begin, end - begin));
      EXPECT_LT(largest_difference(cut.logits(), expected[end - 1]), 1e-4) << step << " at " << end;
    }
    EXPECT_EQ(cut.length(), static_cast<int64_t>(tokens.size()));
  }
}

TEST(Model, LongPromptsPassInSeveralChunks) {
  const GgufFile file = stories_file();
  const int64_t count = 2 * Model::kChunk + 3;
  ModelOptions options = plain_options();
  options.context = count;
  const std::vector<int32_t> tokens = story_tokens(file, static_cast<size_t>(count));
  std::vector<int64_t> rows_seen;
  options.attention[0].over_cache = [&](const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, const RunOptions& run) {
    EXPECT_LE(q.size(2), Model::kChunk);
    rows_seen.push_back(q.size(2));
    plain_attention(q, k, v, out, run);
  };
  Model model(file, options);
  std::vector<int64_t> order;
  model.append(tokens, count - 70, [&](int64_t i, std::span<const float> logits) {
    EXPECT_EQ(static_cast<int64_t>(logits.size()), model.config().vocab);
    order.push_back(i);
  });
  ASSERT_EQ(order.size(), 70u);
  for (size_t i = 0; i < order.size(); ++i)
    EXPECT_EQ(order[i], count - 70 + static_cast<int64_t>(i));
  // The last layer runs for the rows whose logits are wanted, all of them in the last chunk.
  const size_t layers = static_cast<size_t>(model.config().layers);
  EXPECT_EQ(rows_seen.size(), 3 * layers - 2);
  EXPECT_EQ(rows_seen.back(), 70);
}

TEST(Model, TruncateForgets) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = story_tokens(file, 40);
  Model model(file, plain_options());
  model.append(std::span(tokens).first(30));
  model.append(std::vector<int32_t>{5, 6, 7, 8});
  EXPECT_EQ(model.truncate(30), 30);
  EXPECT_THROW(model.logits(), Error);
  model.append(std::span(tokens).subspan(30));
  Model fresh(file, plain_options());
  fresh.append(std::span(tokens).first(30));
  fresh.append(std::span(tokens).subspan(30));
  const std::vector<float> expected(fresh.logits().begin(), fresh.logits().end());
  EXPECT_EQ(largest_difference(model.logits(), expected), 0);
}

TEST(Model, EveryLayerHasAnAttentionOfItsOwn) {
  const GgufFile file = stories_file();
  std::vector<int> calls(5);
  ModelOptions options = plain_options();
  options.attention.clear();
  for (size_t layer = 0; layer < calls.size(); ++layer) {
    options.attention.emplace_back().over_cache =
        [&calls, layer](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const RunOptions& run) {
          ++calls[layer];
          EXPECT_EQ(q.dtype(), DType::bf16);
          EXPECT_EQ(k.size(1), 4);
          EXPECT_EQ(k.size(2), 3);
          plain_attention(q, k, v, out, run);
        };
  }
  options.dtype = ModelDtype::bf16;
  Model model(file, options);
  model.append(std::vector<int32_t>{1, 2, 3});
  EXPECT_EQ(calls, std::vector<int>(5, 1));
  EXPECT_GT(model.attention_seconds(), 0);
  EXPECT_LT(model.attention_seconds(), model.total_seconds());
}

TEST(Model, SameBitsForAnyThreadCount) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = story_tokens(file, 9);
  std::vector<std::vector<float>> logits;
  for (int threads : {1, 2, 3}) {
    ModelOptions options = plain_options();
    options.run.threads = threads;
    Model model(file, options);
    for (int32_t token : tokens) model.append(std::span(&token, 1));
    logits.emplace_back(model.logits().begin(), model.logits().end());
  }
  EXPECT_EQ(largest_difference(logits[0], logits[1]), 0);
  EXPECT_EQ(largest_difference(logits[0], logits[2]), 0);
}

TEST(Model, Bfloat16IsCloseToFloat32) {
  const GgufFile file = stories_file();
  const std::vector<int32_t> tokens = story_tokens(file, 100);
  Model exact(file, plain_options()), half(file, plain_options(ModelDtype::bf16));
  const auto a = all_logits(exact, tokens), b = all_logits(half, tokens);
  double squares = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[i].size(); ++j) {
      squares += std::pow(static_cast<double>(a[i][j]), 2);
      difference += std::pow(static_cast<double>(a[i][j]) - static_cast<double>(b[i][j]), 2);
    }
  }
  EXPECT_GT(difference, 0);
  EXPECT_LT(std::sqrt(difference / squares), 0.03);
}

TEST(Model, RefusesBadTokensAndAFullContext) {
  const GgufFile file = stories_file();
  ModelOptions options = plain_options();
  options.context = 8;
  Model model(file, options);
  EXPECT_THROW(model.logits(), Error);
  EXPECT_THROW(model.append(std::vector<int32_t>{1, 512}), Error);
  EXPECT_THROW(model.append(std::vector<int32_t>{-1}), Error);
  EXPECT_EQ(model.length(), 0);
  model.append(std::vector<int32_t>{1, 2, 3, 4, 5, 6});
  EXPECT_THROW(model.append(std::vector<int32_t>{1, 2, 3}), Error);
  EXPECT_EQ(model.length(), 6);
  model.append(std::vector<int32_t>{7, 8});
  EXPECT_THROW(model.append(std::vector<int32_t>{9}), Error);
  EXPECT_EQ(model.logits().size(), 512u);
}

TEST(Model, RefusesBadOptions) {
  const GgufFile file = stories_file();
  ModelOptions options = plain_options(ModelDtype::int4);
  EXPECT_THROW(Model(file, options), Error);  // nothing in it is quantised
  options = plain_options();
  options.attention.clear();
  EXPECT_THROW(Model(file, options), Error);
  options.attention.resize(2, ModelAttention{.over_cache = plain_attention});
  EXPECT_THROW(Model(file, options), Error);
  options = plain_options();
  options.context = 0;
  EXPECT_THROW(Model(file, options), Error);
  EXPECT_EQ(parse_model_dtype("bf16"), ModelDtype::bf16);
  EXPECT_THROW(parse_model_dtype("int8"), Error);
}

// One layer, width 4, one head of 4, 3 tokens; each change must be refused.
struct TinyFile {
  std::string architecture = "llama";
  std::vector<std::pair<std::string, uint32_t>> integers = {{"block_count", 1},
                                                            {"embedding_length", 4},
                                                            {"attention.head_count", 1},
                                                            {"feed_forward_length", 2},
                                                            {"context_length", 16}};
  float eps = 1e-5f;
  std::vector<std::pair<std::string, std::vector<uint64_t>>> tensors = {
      {"token_embd.weight", {4, 3}},        {"output_norm.weight", {4}},
      {"blk.0.attn_norm.weight", {4}},      {"blk.0.attn_q.weight", {4, 4}},
      {"blk.0.attn_k.weight", {4, 4}},      {"blk.0.attn_v.weight", {4, 4}},
      {"blk.0.attn_output.weight", {4, 4}}, {"blk.0.ffn_norm.weight", {4}},
      {"blk.0.ffn_gate.weight", {4, 2}},    {"blk.0.ffn_up.weight", {4, 2}},
      {"blk.0.ffn_down.weight", {2, 4}}};
  std::function<void(GgufBuilder&)> more = [](GgufBuilder&) {};

  std::string build() const {
    GgufBuilder file;
    file.string("general.architecture", architecture);
    for (const auto& [key, number] : integers) file.integer(architecture + "." + key, number);
    file.value(architecture + ".attention.layer_norm_rms_epsilon", gguf_value::kFloat32, eps);
    more(file);
    uint64_t offset = 0;
    for (const auto& [name, dims] : tensors) {
      uint64_t count = 1;
      for (uint64_t extent : dims) count *= extent;
      file.tensor(name, dims, 0, offset);
      offset += (count * 4 + 31) / 32 * 32;
    }
    return file.data(std::string(offset, '\0')).build();
  }
  void set(const std::string& key, uint32_t number) {
    for (auto& [name, value] : integers) {
      if (name == key) {
        value = number;
        return;
      }
    }
    integers.emplace_back(key, number);
  }
  void reshape(const std::string& name, const std::vector<uint64_t>& dims) {
    for (auto& tensor : tensors) {
      if (tensor.first == name) tensor.second = dims;
    }
  }
};

// The message of the Error that making the model gives; empty when it works.
std::string refusal(const std::function<void(TinyFile&)>& change) {
  TinyFile tiny;
  change(tiny);
  const std::string bytes = tiny.build();
  try {
    const GgufFile file = parse_gguf(bytes);
    Model model(file, plain_options());
    model.append(std::vector<int32_t>{0, 1, 2});
    EXPECT_EQ(model.logits().size(), 3u);
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(Model, TinyFileWorks) {
  EXPECT_EQ(refusal([](TinyFile&) {}), "");
  EXPECT_EQ(refusal([](TinyFile& f) {
              f.more = [](GgufBuilder& b) {
                b.value("split.count", gguf_value::kUint16, uint16_t{1});
              };
            }),
            "");
}

// A tensor type: its id in a file, the bytes of 32 weights, and of those that are float16 scales.
struct NarrowType {
  uint32_t id;
  size_t bytes;
  std::vector<size_t> scales_at;
};
const NarrowType kF32{0, 128, {}}, kF16{1, 64, {}}, kBf16{30, 64, {}}, kQ4_0{2, 18, {0}},
    kQ4_1{3, 20, {0, 2}}, kQ8_0{8, 34, {0}};

// A model whose matrices have 32 columns and these types by turns, with random weights of 0.1 or so.
std::string narrow_model(const std::vector<NarrowType>& types) {
  GgufBuilder file;
  file.string("general.architecture", "llama");
  for (const auto& [key, number] :
       std::vector<std::pair<std::string, uint32_t>>{{"block_count", 1},
                                                     {"embedding_length", 32},
                                                     {"attention.head_count", 1},
                                                     {"feed_forward_length", 64},
                                                     {"context_length", 128}}) {
    file.integer("llama." + key, number);
  }
  file.value("llama.attention.layer_norm_rms_epsilon", gguf_value::kFloat32, 1e-5f);
  std::string data;
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 0.1f);
  const auto put = [&](const auto& value) {
    data.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const auto add = [&](const std::string& name, const std::vector<uint64_t>& dims,
                       const NarrowType& type) {
    data.resize((data.size() + 31) / 32 * 32);
    file.tensor(name, dims, type.id, data.size());
    const uint64_t blocks = dims.size() == 1 ? 1 : dims[0] / 32 * dims[1];
    for (uint64_t block = 0; block < blocks; ++block) {
      const size_t first = data.size();
      for (int i = 0; type.scales_at.empty() && i < 32; ++i) {
        const float value = dims.size() == 1 ? 1 : normal(random);
        if (type.id == kF32.id) put(value);
        if (type.id == kF16.id) put(to_float16(value));
        if (type.id == kBf16.id) put(to_bfloat16(value));
      }
      while (data.size() < first + type.bytes) data.push_back(static_cast<char>(random()));
      for (size_t at : type.scales_at) {
        const float16 scale = to_float16(at != 0 ? -0.1f : type.id == kQ8_0.id ? 0.001f : 0.013f);
        std::memcpy(&data[first + at], &scale, sizeof scale);
      }
    }
  };
  size_t next = 0;
  const auto matrix = [&](const std::string& name, uint64_t columns, uint64_t rows) {
    add(name, {columns, rows}, types[next++ % types.size()]);
  };
  matrix("token_embd.weight", 32, 40);
  for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"}) {
    add(std::string(name) + ".weight", {32}, kF32);
  }
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output"}) {
    matrix(std::string("blk.0.") + name + ".weight", 32, 32);
  }
  for (const char* name : {"ffn_gate", "ffn_up"}) {
    matrix(std::string("blk.0.") + name + ".weight", 32, 64);
  }
  matrix("blk.0.ffn_down.weight", 64, 32);
  data.resize((data.size() + 31) / 32 * 32);
  return file.data(data).build();
}

// In blocks of int8, rows of 32 columns take more memory than in float32.
TEST(Model, ManyRowsGiveWhatSingleRowsGiveInEveryType) {
  struct Case {
    std::vector<NarrowType> types;
    std::vector<ModelDtype> dtypes;
  };
  const std::vector<Case> cases{
      {{kF32}, {ModelDtype::f32, ModelDtype::bf16}},
      {{kF16}, {ModelDtype::f32, ModelDtype::bf16}},
      {{kBf16}, {ModelDtype::f32, ModelDtype::bf16}},
      {{kQ4_0}, {ModelDtype::f32, ModelDtype::bf16, ModelDtype::int4}},
      {{kQ4_1, kQ8_0}, {ModelDtype::f32, ModelDtype::bf16, ModelDtype::int4}},
      {{kQ4_1, kF16, kQ8_0, kBf16, kF32}, {ModelDtype::f32, ModelDtype::bf16, ModelDtype::int4}}};
  for (size_t c = 0; c < cases.size(); ++c) {
    const std::string bytes = narrow_model(cases[c].types);
    const GgufFile file = parse_gguf(bytes);
    std::vector<int32_t> tokens(97);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * i % 40);
    Model single(file, plain_options(ModelDtype::f32));
    std::vector<std::vector<float>> exact;
    for (const int32_t token : tokens) {
      single.append(std::span(&token, 1));
      exact.emplace_back(single.logits().begin(), single.logits().end());
    }
    for (ModelDtype dtype : cases[c].dtypes) {
      for (size_t rows : {5, 8, 13, 33, 63, 64, 65, 70, 97}) {
        Model model(file, plain_options(dtype));
        model.prepare(Model::kChunk);
        size_t seen = 0;
        model.append(
            std::span(tokens).first(rows), 0, [&](int64_t i, std::span<const float> logits) {
              const std::vector<float>& needed = exact[static_cast<size_t>(i)];
              double squares = 0;
              for (float x : needed) squares += static_cast<double>(x * x);
              const double size = std::sqrt(squares / 40);
              const double bound = dtype == ModelDtype::f32 ? 1e-4 : 0.1;
              EXPECT_LT(largest_difference(logits, needed), bound * size)
                  << "case " << c << " " << name_of(dtype) << " " << rows << " rows, " << i;
              ++seen;
            });
        EXPECT_EQ(seen, rows);
      }
    }
  }
}

TEST(Model, Float16WeightsAreCopiedOnlyForProductsInBfloat16) {
  const std::string bytes = narrow_model({kF16});
  const GgufFile file = parse_gguf(bytes);
  EXPECT_EQ(default_model_dtype(file), ModelDtype::bf16);
  for (Isa isa : available_isas()) {
    const RunOptions run{.isa = isa};
    ModelWeights weights = load_weights(file, read_model_config(file), ModelDtype::bf16, run);
    const bool copied = weights.many_type == DType::bf16;
    EXPECT_FALSE(copied && isa <= Isa::avx2);
    EXPECT_EQ(weights.unpacked_memory.size() > 0, copied) << name_of(isa);
    for (const WeightMatrix* w : weights.matrices()) {
      EXPECT_EQ(w->many, copied ? ManyRows::bf16 : ManyRows::f32);
      EXPECT_EQ(w->copy.defined(), copied);
      for (const BlockMatrix& part : w->parts) {
        EXPECT_EQ(part.format, copied ? BlockFormat::bf16 : BlockFormat::f16);
      }
    }
  }
}

// With attention that is zero nothing sees the cache, which alone is rounded.
TEST(Model, Float16WeightsAreExactWithoutProductsInBfloat16) {
  const std::string bytes = narrow_model({kF16});
  const GgufFile file = parse_gguf(bytes);
  const auto zero = [](const Tensor&, const Tensor&, const Tensor&, const Tensor& out,
                       const RunOptions&) {
    for (int64_t h = 0; h < out.size(1); ++h) {
      for (int64_t n = 0; n < out.size(2); ++n) {
        std::memset(out.at({0, h, n}), 0, static_cast<size_t>(out.size(3)) * size_of(out.dtype()));
      }
    }
  };
  std::vector<int32_t> tokens(70);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * i % 40);
  for (const Isa isa : available_isas()) {
    if (isa > Isa::avx2) continue;
    ModelOptions options = plain_options(ModelDtype::f32);
    options.attention = {ModelAttention{.over_cache = zero}};
    options.run.isa = isa;
    Model exact(file, options);
    options.dtype = ModelDtype::bf16;
    Model half(file, options);
    for (size_t rows : {1, 70}) {
      const auto some = std::span(tokens).first(rows);
      EXPECT_EQ(all_logits(half, some), all_logits(exact, some)) << name_of(isa) << " " << rows;
      ASSERT_EQ(exact.truncate(0) + half.truncate(0), 0);
    }
  }
}

TEST(Model, PositionsAreScaledByAnyOfTheKeysForIt) {
  const auto frequency = [](std::function<void(GgufBuilder&)> more) {
    TinyFile tiny;
    tiny.more = std::move(more);
    const std::string bytes = tiny.build();
    return read_model_config(parse_gguf(bytes)).rotary_frequencies[0];
  };
  const auto number = [](GgufBuilder& b, const char* key, float value) {
    b.value(std::string("llama.rope.") + key, gguf_value::kFloat32, value);
  };
  EXPECT_EQ(frequency([](GgufBuilder&) {}), 1);
  EXPECT_EQ(frequency([&](GgufBuilder& b) { number(b, "scale_linear", 4); }), 0.25);
  EXPECT_EQ(frequency([&](GgufBuilder& b) { number(b, "scaling.factor", 2); }), 0.5);
  for (const auto& [type, expected] : {std::pair{"linear", 0.5}, {"none", 1.0}}) {
    EXPECT_EQ(frequency([&, name = type](GgufBuilder& b) {
                b.string("llama.rope.scaling.type", name);
                number(b, "scaling.factor", 2);
              }),
              expected);
  }
}

TEST(Model, RefusalsNameWhatIsWrong) {
  const auto expect = [](const char* needed, const std::function<void(TinyFile&)>& change) {
    EXPECT_NE(refusal(change).find(needed), std::string::npos)
        << needed << " is not in: " << refusal(change);
  };
  expect("general.architecture", [](TinyFile& f) { f.architecture = "mamba"; });
  expect("\"\\x1b[31m\"", [](TinyFile& f) { f.architecture = "\x1b[31m"; });
  expect("\"\\x1b[31m\"", [](TinyFile& f) { f.tensors.push_back({"\x1b[31m", {4}}); });
  expect("part 2 of 3, needed one file of all parts: llama-gguf-split --merge", [](TinyFile& f) {
    f.more = [](GgufBuilder& b) {
      b.value("split.no", gguf_value::kUint16, uint16_t{1});
      b.value("split.count", gguf_value::kUint16, uint16_t{3});
    };
  });
  expect("block_count", [](TinyFile& f) { f.set("block_count", 0); });
  expect("blk.1.attn_norm.weight", [](TinyFile& f) { f.set("block_count", 2); });
  expect("head_count_kv", [](TinyFile& f) {
    f.set("attention.head_count", 3);
    f.set("attention.head_count_kv", 2);
  });
  expect("key_length", [](TinyFile& f) { f.set("attention.key_length", 300); });
  expect("value_length", [](TinyFile& f) { f.set("attention.value_length", 2); });
  expect("rope.dimension_count", [](TinyFile& f) { f.set("rope.dimension_count", 3); });
  expect("expert_count", [](TinyFile& f) { f.set("expert_count", 8); });
  expect("layer_norm_rms_epsilon", [](TinyFile& f) { f.eps = -1.0f; });
  expect("token_embd.weight", [](TinyFile& f) { f.reshape("token_embd.weight", {5, 3}); });
  expect("blk.0.ffn_up.weight", [](TinyFile& f) { f.reshape("blk.0.ffn_up.weight", {4, 3}); });
  expect("blk.0.attn_q_norm.weight", [](TinyFile& f) { f.architecture = "qwen3"; });
  expect("blk.0.attn_q.bias", [](TinyFile& f) { f.architecture = "qwen2"; });
  expect("blk.0.surprise.weight",
         [](TinyFile& f) { f.tensors.push_back({"blk.0.surprise.weight", {4}}); });
  expect("rope_freqs.weight", [](TinyFile& f) { f.tensors.push_back({"rope_freqs.weight", {3}}); });
  expect("rope.scaling.type", [](TinyFile& f) {
    f.more = [](GgufBuilder& b) { b.string("llama.rope.scaling.type", "longrope"); };
  });
  expect("rope.scaling.factor", [](TinyFile& f) {
    f.more = [](GgufBuilder& b) { b.string("llama.rope.scaling.type", "linear"); };
  });
  for (const auto& [name, dims] : TinyFile().tensors) {
    expect(name.c_str(), [&](TinyFile& f) {
      std::erase_if(f.tensors, [&](const auto& tensor) { return tensor.first == name; });
    });
  }
}

}  // namespace
}  // namespace heed
