// The sizes and constants of a model, from the metadata of its file.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace heed {

class GgufFile;

struct ModelConfig {
  std::string architecture;  // "llama", "qwen2", "qwen3"
  int64_t layers = 0;
  int64_t width = 0;  // of the residual stream
  int64_t heads = 0;
  int64_t kv_heads = 0;  // heads % kv_heads == 0
  int64_t head_dim = 0;  // 1..256
  int64_t hidden = 0;    // of the feed-forward network
  int64_t vocab = 0;
  int64_t context = 0;  // tokens it was trained for
  float norm_eps = 0;
  // Rotary positions: pair i of a token at position p turns by p * rotary_frequencies[i] and grows by
  // rotary_magnitude.
  bool rotary_interleaved = false;         // pairs (2i, 2i+1), else (i, i + pairs)
  std::vector<double> rotary_frequencies;  // [pairs], scaling included
  double rotary_magnitude = 1;
  bool qkv_bias = false;  // required (qwen2); other files may have biases too
  bool qk_norm = false;   // RMS norm of every query and key head (qwen3)

  int64_t qkv_rows() const { return (heads + 2 * kv_heads) * head_dim; }
};

/// Throws Error for another architecture, and for missing or impossible values, naming the key.
ModelConfig read_model_config(const GgufFile& file);

}  // namespace heed
