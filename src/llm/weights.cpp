#include "llm/weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <span>
#include <utility>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "llm/bf16_product.h"
#include "llm/ggml_types.h"
#include "llm/gguf.h"
#include "llm/shown.h"
#include "mechanisms/nearest.h"

namespace heed {

namespace {

constexpr std::array kDtypeNames{"f32", "bf16", "int4"};

// Finds tensors, checks their shapes, and remembers which were asked for.
class Loader {
 public:
  Loader(const GgufFile& file, ModelDtype dtype)
      : file_(file),
        activations_(dtype == ModelDtype::int4 ? RowActivations::int16 : RowActivations::f32) {}

  const GgufTensor* find(const std::string& name, const std::vector<int64_t>& shape) {
    const GgufTensor* tensor = file_.find(name);
    if (tensor == nullptr) return nullptr;
    used_.insert(name);
    if (tensor->shape != shape) {
      file_.fail("" + name + " has shape " + to_string(Dims(tensor->shape)) + ", " +
                 to_string(Dims(shape)) + " is needed");
    }
    return tensor;
  }

  BlockMatrix matrix(const std::string& name, int64_t rows, int64_t columns) {
    const GgufTensor* tensor = find(name, {rows, columns});
    if (tensor == nullptr) tensor = &file_.require(name);
    return {block_format(tensor->type), tensor->bytes.data(), rows, columns};
  }

  WeightMatrix stacked(const std::vector<std::pair<std::string, int64_t>>& parts, int64_t columns) {
    WeightMatrix w;
    w.activations = activations_;
    w.columns = columns;
    for (const auto& [name, rows] : parts) {
      w.parts.push_back(matrix(name, rows, columns));
      w.rows += rows;
    }
    return w;
  }

  /// Undefined when absent and not required.
  Array vector(const std::string& name, int64_t count, bool required = true) {
    const GgufTensor* tensor = find(name, {count});
    if (tensor == nullptr) {
      if (required) file_.require(name);
      return {};
    }
    Array values(DType::f32, {count});
    dequantize(tensor->type, tensor->bytes, values.as<float>(), count);
    return values;
  }

  void use(const std::string& name) { used_.insert(name); }

  void require_all_used() const {
    for (const GgufTensor& tensor : file_.tensors()) {
      if (!used_.contains(tensor.name)) {
        file_.fail("the tensor " + shown(tensor.name) + " has no place in this architecture");
      }
    }
  }

 private:
  const GgufFile& file_;
  RowActivations activations_;
  std::set<std::string> used_;
};

// One bias for the stacked queries, keys and values; missing ones are zero.
Array stacked_bias(Loader& loader, const std::string& prefix, const ModelConfig& config) {
  const std::array<std::pair<const char*, int64_t>, 3> parts{
      {{"attn_q.bias", config.heads * config.head_dim},
       {"attn_k.bias", config.kv_heads * config.head_dim},
       {"attn_v.bias", config.kv_heads * config.head_dim}}};
  Array bias = Array::zeros(DType::f32, {config.qkv_rows()});
  bool any = false;
  float* next = bias.as<float>();
  for (const auto& [name, count] : parts) {
    const Array part = loader.vector(prefix + name, count, config.qkv_bias);
    if (part.view().defined()) {
      std::memcpy(next, part.as<float>(), static_cast<size_t>(count) * sizeof(float));
      any = true;
    }
    next += count;
  }
  return any ? std::move(bias) : Array{};
}

LayerWeights load_layer(Loader& loader, const ModelConfig& config, int64_t layer) {
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  const int64_t q_rows = config.heads * config.head_dim,
                kv_rows = config.kv_heads * config.head_dim;
  LayerWeights w;
  w.attention_norm = loader.vector(prefix + "attn_norm.weight", config.width);
  w.qkv = loader.stacked({{prefix + "attn_q.weight", q_rows},
                          {prefix + "attn_k.weight", kv_rows},
                          {prefix + "attn_v.weight", kv_rows}},
                         config.width);
  w.qkv_bias = stacked_bias(loader, prefix, config);
  if (config.qk_norm) {
    w.q_norm = loader.vector(prefix + "attn_q_norm.weight", config.head_dim);
    w.k_norm = loader.vector(prefix + "attn_k_norm.weight", config.head_dim);
  }
  w.out = loader.stacked({{prefix + "attn_output.weight", config.width}}, q_rows);
  w.out_bias = loader.vector(prefix + "attn_output.bias", config.width, false);
  w.hidden_norm = loader.vector(prefix + "ffn_norm.weight", config.width);
  w.gate_up = loader.stacked(
      {{prefix + "ffn_gate.weight", config.hidden}, {prefix + "ffn_up.weight", config.hidden}},
      config.width);
  w.down = loader.stacked({{prefix + "ffn_down.weight", config.width}}, config.hidden);
  return w;
}

// The values of a part, to be read, where they lie as bfloat16, else undefined.
Tensor bf16_values(const BlockMatrix& part) {
  if (part.format != BlockFormat::bf16 ||
      reinterpret_cast<uintptr_t>(part.data) % alignof(bfloat16) != 0) {
    return {};
  }
  return Tensor(const_cast<std::byte*>(part.data), DType::bf16, {part.rows, part.columns});
}

bool lies_as_bf16(const WeightMatrix* w) {
  return std::all_of(w->parts.begin(), w->parts.end(),
                     [](const BlockMatrix& part) { return bf16_values(part).defined(); });
}

bool has_only_16_bits(const WeightMatrix* w) {
  return std::all_of(w->parts.begin(), w->parts.end(), [](const BlockMatrix& part) {
    return part.format == BlockFormat::f16 || part.format == BlockFormat::bf16;
  });
}

bool needs_copy(const WeightMatrix* w, ModelDtype dtype) {
  if (w->many == ManyRows::bf16) return !lies_as_bf16(w);
  return dtype == ModelDtype::bf16 && !has_only_16_bits(w);
}

bool has_only_codes(const WeightMatrix* w) {
  return std::all_of(w->parts.begin(), w->parts.end(),
                     [](const BlockMatrix& part) { return has_codes(part.format); });
}

// How many rows are multiplied on this processor.
void choose_products(ModelWeights& weights, const RunOptions& run) {
  const std::vector<WeightMatrix*> matrices = weights.matrices();
  // AMX is faster in bfloat16.
  const bool int8 = weights.dtype == ModelDtype::int4 && has_int8_products(run) &&
                    !(chosen_isa(run) == Isa::amx && has_bf16_products());
  const bool all_int8 = int8 && std::all_of(matrices.begin(), matrices.end(), has_only_codes);
  const bool bf16 = weights.dtype != ModelDtype::f32 && bf16_products_are_fast(run) &&
                    (all_int8 || has_bf16_products());
  weights.many_type = bf16 ? DType::bf16 : DType::f32;
  // Up to so many rows at once, reading the blocks of the file is as fast.
  weights.few_rows = int8 ? 7 : bf16 ? 4 : 16;
  for (WeightMatrix* w : matrices) {
    w->many = int8 && has_only_codes(w) ? ManyRows::int8 : bf16 ? ManyRows::bf16 : ManyRows::f32;
    if (needs_copy(w, weights.dtype)) weights.unpacked = false;
  }
  weights.head.many = int8 && has_only_codes(&weights.head) ? ManyRows::int8 : ManyRows::f32;
}

}  // namespace

std::vector<WeightMatrix*> ModelWeights::matrices() {
  std::vector<WeightMatrix*> all;
  for (LayerWeights& layer : layers) {
    all.insert(all.end(), {&layer.qkv, &layer.out, &layer.gate_up, &layer.down});
  }
  return all;
}

void ModelWeights::unpack(const RunOptions& run) {
  if (unpacked) return;
  std::vector<WeightMatrix*> wanted = matrices();
  std::erase_if(wanted, [this](const WeightMatrix* w) { return !needs_copy(w, dtype); });
  const auto bytes_of = [](const WeightMatrix* w) {
    return Scratch::rounded(static_cast<size_t>(w->rows * w->columns) * sizeof(bfloat16));
  };
  size_t total = 0;
  for (const WeightMatrix* w : wanted) total += bytes_of(w);
  Pages memory(total);
  std::byte* next = memory.data();
  for (const WeightMatrix* w : wanted) {
    const Tensor copy(next, DType::bf16, {w->rows, w->columns});
    int64_t first = 0;
    for (const BlockMatrix& part : w->parts) {
      read_rows(part, copy.slice(0, first, first + part.rows), run);
      first += part.rows;
    }
    next += bytes_of(w);
  }
  // Nothing points into the memory before all of it is written.
  unpacked_memory = std::move(memory);
  unpacked = true;
  next = unpacked_memory.data();
  for (WeightMatrix* w : wanted) {
    w->copy = Tensor(next, DType::bf16, {w->rows, w->columns});
    // The values that are asked for: few rows use them too.
    if (dtype == ModelDtype::bf16) w->parts = {{BlockFormat::bf16, next, w->rows, w->columns}};
    next += bytes_of(w);
  }
}

const char* name_of(ModelDtype dtype) { return kDtypeNames[static_cast<size_t>(dtype)]; }

ModelDtype parse_model_dtype(std::string_view name) {
  for (size_t i = 0; i < kDtypeNames.size(); ++i) {
    if (name == kDtypeNames[i]) return static_cast<ModelDtype>(i);
  }
  throw Error("dtype is " + std::string(name) + ", needed is f32, bf16 or int4" +
              did_you_mean(name, {kDtypeNames.begin(), kDtypeNames.end()}));
}

void WeightMatrix::multiply(const Tensor& x, const Tensor& y, const RunOptions& run) const {
  std::array<RowProduct, 3> products;
  float* next = y.as<float>();
  for (size_t i = 0; i < parts.size(); ++i) {
    products[i] = {parts[i], next, rows};
    next += parts[i].rows;
  }
  quantized_rows(std::span(products).first(parts.size()), x.as<float>(), columns, x.size(0), run,
                 activations);
}

void WeightMatrix::multiply_bf16(const Tensor& x, const Tensor& y, const RunOptions& run) const {
  if (copy.defined()) return bf16_product(x, copy, y, run);
  int64_t first = 0;
  for (const BlockMatrix& part : parts) {
    bf16_product(x, bf16_values(part), y.slice(1, first, first + part.rows), run);
    first += part.rows;
  }
}

void ModelWeights::embed(int32_t token, float* out, const RunOptions& run) const {
  BlockMatrix row = embedding;
  row.data += static_cast<int64_t>(token) * row.row_bytes();
  row.rows = 1;
  read_rows(row, Tensor(out, DType::f32, {1, row.columns}), run);
}

ModelDtype default_model_dtype(const GgufFile& file) {
  bool half = false;
  for (const GgufTensor& tensor : file.tensors()) {
    if (!tensor.name.starts_with("blk.")) continue;
    if (has_codes(block_format(tensor.type))) return ModelDtype::int4;
    half |= tensor.type != GgmlType::kF32;
  }
  return half ? ModelDtype::bf16 : ModelDtype::f32;
}

ModelWeights load_weights(const GgufFile& file, const ModelConfig& config, ModelDtype dtype,
                          const RunOptions& run) {
  if (dtype == ModelDtype::int4 && default_model_dtype(file) != ModelDtype::int4) {
    throw Error("dtype is int4, which reads quantised layers, and model file " +
                shown(file.name()) + " has none; f32 or bf16 is needed");
  }
  Loader loader(file, dtype);
  ModelWeights weights;
  weights.dtype = dtype;
  weights.embedding = loader.matrix("token_embd.weight", config.vocab, config.width);
  const bool tied = file.find("output.weight") == nullptr;
  weights.head =
      loader.stacked({{tied ? "token_embd.weight" : "output.weight", config.vocab}}, config.width);
  weights.output_norm = loader.vector("output_norm.weight", config.width);
  loader.use("rope_freqs.weight");
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    weights.layers.push_back(load_layer(loader, config, layer));
  }
  loader.require_all_used();
  choose_products(weights, run);
  if (dtype != ModelDtype::int4) weights.unpack(run);
  return weights;
}

}  // namespace heed
