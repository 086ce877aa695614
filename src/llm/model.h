// A Llama-family language model: token ids in, logits out, attention by any mechanism of the registry.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "heed/run.h"
#include "heed/tensor.h"
#include "llm/kv_cache.h"
#include "llm/layer_states.h"
#include "llm/model_config.h"
#include "llm/weights.h"
#include "mechanisms/registry.h"

namespace heed {

class GgufFile;

struct ModelOptions {
  std::optional<ModelDtype> dtype = {};        // none: default_model_dtype(file)
  std::optional<int64_t> context = {};         // tokens it may hold; none: what the file says
  std::vector<ModelAttention> attention = {};  // one for all layers, or one per layer
  RunOptions run = {};
};

/// Architectures llama, qwen2 and qwen3 (arXiv 2302.13971, 2407.10671, 2505.09388): RMSNorm, rotary
/// positions, grouped queries, gated feed-forward. What it knows of the tokens appended so far: keys and
/// values of layers whose attention wants them, and the states of the others, whose size is fixed.
class Model {
 public:
  /// The file must outlive the model. Throws Error for an architecture, metadata, tensors or options
  /// that do not fit.
  Model(const GgufFile& file, ModelOptions options);

  const ModelConfig& config() const { return config_; }
  ModelDtype dtype() const { return dtype_; }
  int64_t context() const { return cache_.context(); }
  /// Tokens appended and not forgotten.
  int64_t length() const { return cache_.length(); }
  /// Memory of keys and values: grows with the tokens. 0 where every layer has a state.
  size_t cache_bytes() const { return cache_.bytes(); }
  /// Memory of states, without what mark() keeps.
  size_t state_bytes() const { return states_.bytes(); }

  /// Runs the model over the next tokens. Throws Error, before any work, for an id outside the
  /// vocabulary and for more tokens than the context has room for. An error from a layer's attention
  /// leaves the tokens before the chunk it happened in, or with states those that truncate leaves.
  void append(std::span<const int32_t> tokens);
  /// Logits [vocab] of what follows the last token appended; valid until the next call. Throws Error
  /// when nothing was appended since the model was made or truncated.
  std::span<const float> logits();
  /// As append, and calls row(i, logits [vocab]) for the tokens i >= first of `tokens`, in order. The
  /// logits are those of the token after token i.
  void append(std::span<const int32_t> tokens, int64_t first,
              const std::function<void(int64_t i, std::span<const float> logits)>& row);

  /// Gets ready for appends of so many tokens in all: fetches memory for their keys and values, and where they,
  /// with what was read before, are many, unpacks weights that products of many rows need so. append does it
  /// too, in its own time.
  void prepare(int64_t tokens);
  /// Room for tokens in all; saves the cache from growing step by step.
  void reserve(int64_t tokens) { cache_.reserve(tokens); }
  /// Forgets the tokens after the first `length` and returns how many are left. Layers with a state
  /// cannot go back to any length: there, unless nothing is to be forgotten, it is the length that was
  /// marked last or 0, and the caller appends the tokens between again.
  [[nodiscard]] int64_t truncate(int64_t length);
  /// Grows with every append and truncate: what somebody knows of the tokens holds while it is the same.
  uint64_t changes() const { return changes_; }
  /// Copies the states of this length, for truncate to come back to.
  void mark() { states_.mark(length()); }

  /// Seconds spent in attention, and in all of append and logits, since the model was made.
  double attention_seconds() const { return attention_seconds_; }
  double total_seconds() const { return total_seconds_; }

  static constexpr int64_t kChunk = 512;
  /// Rows that pass through the layers at once, which bounds the memory of activations: kChunk, or the
  /// whole context where a layer's attention wants whole prompts.
  int64_t chunk() const { return chunk_; }

 private:
  void check_tokens(std::span<const int32_t> tokens) const;
  void append_chunk(std::span<const int32_t> tokens, int64_t wanted);
  void make_room(int64_t rows);
  void make_rotation_table(int64_t first, int64_t rows);
  DType activation_type(int64_t rows) const;
  void attention_block(int64_t layer, const Tensor& stream, int64_t wanted);
  void feed_forward_block(const LayerWeights& w, const Tensor& stream);
  void prepare_heads(const LayerWeights& w, const Tensor& qkv);
  void store(int64_t layer, const Tensor& qkv);
  Tensor attend(int64_t layer, const Tensor& qkv, int64_t wanted);
  void run_layers(std::span<const int32_t> tokens, int64_t wanted);
  template <class Make>
  void multiply(const WeightMatrix& w, const Make& make, const Tensor& y, bool add);
  void make_logits(int64_t first, int64_t rows);
  Tensor buffer(Array& memory, DType type, int64_t rows, int64_t columns) const;

  ModelConfig config_;
  ModelDtype dtype_;
  ModelWeights weights_;
  std::vector<ModelAttention> attention_;
  KvCache cache_;
  std::vector<int64_t> cache_layer_;  // of each layer, its place in the cache; -1: it has a state
  LayerStates states_;
  int64_t chunk_;
  RunOptions run_;
  double attention_seconds_ = 0, total_seconds_ = 0;
  int64_t read_tokens_ = 0;  // in parts of more than few_rows: prompts, not answers
  uint64_t changes_ = 0;

  // Activations of up to capacity_rows_ tokens. The stream is float32 [rows, width].
  int64_t capacity_rows_ = 0;
  int64_t last_row_ = -1;  // of the stream: the last token appended; -1 = none
  Array stream_, input_, qkv_, heads_, attended_, gate_up_,
      sum_;          // input_: of products
  Array cos_, sin_;  // [rows, rotation_stride(pairs)]
  Array logits_;     // [some rows, vocab]
};

}  // namespace heed
