// The weights of a Llama-family model, as its products need them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/int8_rows.h"
#include "kernels/quantized_rows.h"
#include "llm/model_config.h"
#include "llm/pages.h"

namespace heed {

class GgufFile;

/// How a model is computed.
///   f32   exact: weights of the file widened to float32, float32 activations and cache
///   bf16  weights rounded to bfloat16, bfloat16 cache; many rows: activations rounded too, where the processor
///         multiplies bfloat16 faster than float32 and there is libtorch; elsewhere weights in float16 stay so
///   int4  few rows: the quantised blocks of the file with activations of 16 bits (RowActivations), float32
///         where bytes are not multiplied; many rows: the same blocks with activations rounded to int8
///         (kernels/int8_rows.h) where the processor multiplies bytes fastest, else both rounded to bfloat16
///         or widened to float32, as above; bfloat16 cache
enum class ModelDtype { f32, bf16, int4 };

const char* name_of(ModelDtype dtype);
ModelDtype parse_model_dtype(std::string_view name);  // throws Error listing the names

/// How many rows are multiplied: by int8_product, by float_product, or by bf16_product, which takes weights in
/// bfloat16 as they lie: unpacking them at each call would take as long as products of 500 rows.
enum class ManyRows { int8, f32, bf16 };

/// y = W x, W [rows, columns] stacked from at most three parts.
struct WeightMatrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<BlockMatrix> parts;
  RowActivations activations = RowActivations::f32;  // of few rows
  ManyRows many = ManyRows::f32;
  Tensor copy;  // in bfloat16 [rows, columns], for many rows; undefined where there is none

  /// For few rows: x [M,columns], y [M,rows], float32, contiguous.
  void multiply(const Tensor& x, const Tensor& y, const RunOptions& run) const;
  /// For many in bfloat16: x and y bfloat16. The copy has to be there, unless the parts are bfloat16.
  void multiply_bf16(const Tensor& x, const Tensor& y, const RunOptions& run) const;
};

struct LayerWeights {
  Array attention_norm;  // [width]
  WeightMatrix qkv;      // queries, keys, values stacked
  Array qkv_bias;        // [qkv rows] or undefined
  Array q_norm, k_norm;  // [head_dim] or undefined
  WeightMatrix out;
  Array out_bias;        // [width] or undefined
  Array hidden_norm;     // [width]
  WeightMatrix gate_up;  // gate and up stacked
  WeightMatrix down;
};

struct ModelWeights {
  BlockMatrix embedding;  // [vocab, width]
  WeightMatrix head;      // [vocab, width], as it lies in the file
  Array output_norm;      // [width]
  std::vector<LayerWeights> layers;
  ModelDtype dtype = ModelDtype::f32;
  DType many_type = DType::f32;  // of activations of many rows between products
  Pages unpacked_memory;         // of copies
  bool unpacked = true;          // all copies that products of many rows read are there
  int64_t few_rows = 0;          // up to so many are multiplied as few are

  /// Those of the layers.
  std::vector<WeightMatrix*> matrices();
  /// Makes the copies that products of many rows read, unless they are there.
  void unpack(const RunOptions& run);
  /// Whether so many rows are multiplied as many are.
  bool are_many(int64_t rows) const { return unpacked && rows > few_rows; }

  /// The token's row of the embedding, [width].
  void embed(int32_t token, float* out, const RunOptions& run) const;
};

/// int4 where the file has quantised layers, bf16 where it has 16-bit ones, else f32.
ModelDtype default_model_dtype(const GgufFile& file);

/// Reads every tensor of the file, which must outlive the result; weights for int4 are not unpacked yet.
/// Throws Error for a missing tensor, a shape other than the config says, a tensor that the architecture has
/// no place for, and for int4 when the file has no quantised layers.
ModelWeights load_weights(const GgufFile& file, const ModelConfig& config, ModelDtype dtype,
                          const RunOptions& run);

}  // namespace heed
