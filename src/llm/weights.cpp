#include "llm/weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <set>
#include <span>
#include <utility>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/transformer_rows.h"
#include "llm/dense.h"
#include "llm/gguf.h"
#include "llm/shown.h"
#include "mechanisms/nearest.h"

namespace heed {

namespace {

constexpr std::array kDtypeNames{"f32", "bf16", "int4"};

constexpr std::array<std::pair<GgmlType, BlockFormat>, kBlockFormats> kFormats{
    {{GgmlType::kF32, BlockFormat::f32},
     {GgmlType::kF16, BlockFormat::f16},
     {GgmlType::kBF16, BlockFormat::bf16},
     {GgmlType::kQ8_0, BlockFormat::q8_0},
     {GgmlType::kQ4_0, BlockFormat::q4_0},
     {GgmlType::kQ4_1, BlockFormat::q4_1},
     {GgmlType::kQ5_0, BlockFormat::q5_0},
     {GgmlType::kQ5_1, BlockFormat::q5_1},
     {GgmlType::kQ4_K, BlockFormat::q4_k},
     {GgmlType::kQ5_K, BlockFormat::q5_k},
     {GgmlType::kQ6_K, BlockFormat::q6_k}}};

BlockFormat format_of(GgmlType type) {
  for (const auto& [ggml, format] : kFormats) {
    if (ggml == type) return format;
  }
  throw Error("tensor type " + ggml_type_name(static_cast<uint32_t>(type)) + " has no row product");
}

bool is_quantized(GgmlType type) { return has_codes(format_of(type)); }

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
      throw Error(file_.name() + ": " + name + " has shape " + to_string(Dims(tensor->shape)) +
                  ", " + to_string(Dims(shape)) + " is needed");
    }
    return tensor;
  }

  BlockMatrix matrix(const std::string& name, int64_t rows, int64_t columns) {
    const GgufTensor* tensor = find(name, {rows, columns});
    if (tensor == nullptr) tensor = &file_.require(name);
    return {format_of(tensor->type), tensor->bytes.data(), rows, columns};
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
        throw Error(file_.name() + ": the tensor " + shown(tensor.name) +
                    " has no place in this architecture");
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

// The values of a part, to be read, where they lie as numbers of this type, else undefined.
Tensor numbers_of(const BlockMatrix& part, DType type) {
  const BlockFormat format = type == DType::f32 ? BlockFormat::f32 : BlockFormat::bf16;
  if (part.format != format || reinterpret_cast<uintptr_t>(part.data) % size_of(type) != 0) {
    return {};
  }
  return Tensor(const_cast<std::byte*>(part.data), type, {part.rows, part.columns});
}

bool lies_as(const WeightMatrix& w, DType type) {
  return std::all_of(w.parts.begin(), w.parts.end(),
                     [&](const BlockMatrix& part) { return numbers_of(part, type).defined(); });
}

ManyRows many_rows(const WeightMatrix& w, ModelDtype dtype, DType dense_type,
                   const RunOptions& run) {
  const bool codes = std::all_of(w.parts.begin(), w.parts.end(),
                                 [](const BlockMatrix& part) { return has_codes(part.format); });
  if (codes && dtype == ModelDtype::int4 && has_int8_products(run)) return ManyRows::int8;
  return dense_type == DType::f32 || lies_as(w, dense_type) ? ManyRows::slices : ManyRows::copy;
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
  std::erase_if(wanted, [](const WeightMatrix* w) { return w->many != ManyRows::copy; });
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
    w->dense = Tensor(next, DType::bf16, {w->rows, w->columns});
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

void WeightMatrix::multiply_many(const Tensor& x, const Tensor& y, const RunOptions& run) const {
  if (dense.defined()) return dense_product(x, dense, y, run);
  constexpr int64_t kSliceBytes = 4 << 20;
  int64_t first = 0;
  for (const BlockMatrix& part : parts) {
    const Tensor to = y.slice(1, first, first + part.rows), numbers = numbers_of(part, x.dtype());
    first += part.rows;
    if (numbers.defined()) {
      dense_product(x, numbers, to, run);
      continue;
    }
    const int64_t row_bytes = columns * static_cast<int64_t>(size_of(x.dtype()));
    const int64_t step = std::max<int64_t>(64, kSliceBytes / row_bytes);
    for (int64_t begin = 0; begin < part.rows; begin += step) {
      const int64_t count = std::min(step, part.rows - begin);
      Scratch scratch(static_cast<size_t>(count * row_bytes));
      const Tensor slice(scratch.take<std::byte>(count * row_bytes), x.dtype(), {count, columns});
      read_rows({part.format, part.data + begin * part.row_bytes(), count, columns}, slice, run);
      dense_product(x, slice, to.slice(1, begin, begin + count), run);
    }
  }
}

void ModelWeights::embed(int32_t token, float* out) const {
  const auto bytes = static_cast<size_t>(embedding.row_bytes());
  dequantize(embedding_type, {embedding.data + static_cast<size_t>(token) * bytes, bytes}, out,
             embedding.columns);
}

ModelDtype default_model_dtype(const GgufFile& file) {
  bool half = false;
  for (const GgufTensor& tensor : file.tensors()) {
    if (!tensor.name.starts_with("blk.")) continue;
    if (is_quantized(tensor.type)) return ModelDtype::int4;
    half |= tensor.type != GgmlType::kF32;
  }
  return half ? ModelDtype::bf16 : ModelDtype::f32;
}

ModelWeights load_weights(const GgufFile& file, const ModelConfig& config, ModelDtype dtype,
                          const RunOptions& run) {
  if (dtype == ModelDtype::int4 && default_model_dtype(file) != ModelDtype::int4) {
    throw Error("dtype is int4, which reads quantised layers, and " + file.name() +
                " has none; f32 or bf16 is needed");
  }
  Loader loader(file, dtype);
  ModelWeights weights;
  weights.dtype = dtype;
  weights.embedding = loader.matrix("token_embd.weight", config.vocab, config.width);
  weights.embedding_type = file.require("token_embd.weight").type;
  const bool tied = file.find("output.weight") == nullptr;
  weights.head =
      loader.stacked({{tied ? "token_embd.weight" : "output.weight", config.vocab}}, config.width);
  weights.output_norm = loader.vector("output_norm.weight", config.width);
  loader.use("rope_freqs.weight");
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    weights.layers.push_back(load_layer(loader, config, layer));
  }
  loader.require_all_used();
  const bool bf16 =
      dtype == ModelDtype::bf16 || (dtype == ModelDtype::int4 && bf16_products_are_fast());
  weights.dense_type = bf16 ? DType::bf16 : DType::f32;
  // Up to so many rows at once, reading the blocks of the file is as fast.
  weights.few_rows = bf16 ? 4 : 16;
  bool dense = false;
  for (WeightMatrix* w : weights.matrices()) {
    w->many = many_rows(*w, dtype, weights.dense_type, run);
    dense |= w->many != ManyRows::int8;
    if (w->many == ManyRows::int8) weights.few_rows = 7;
    if (w->many == ManyRows::copy) weights.unpacked = false;
  }
  weights.head.many = many_rows(weights.head, dtype, weights.dense_type, run);
  if (weights.head.many != ManyRows::int8) {
    if (bf16) weights.head.many = ManyRows::blocks;
    dense |= !bf16;
  }
  if (dense && !has_dense_products()) weights.few_rows = std::numeric_limits<int64_t>::max();
  if (dtype != ModelDtype::int4) weights.unpack(run);
  return weights;
}

}  // namespace heed
