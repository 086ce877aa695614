#include "llm/model_config.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "heed/error.h"
#include "llm/gguf.h"
#include "llm/shown.h"

namespace heed {

namespace {

// Metadata under "<architecture>.", with ranges checked.
class Keys {
 public:
  Keys(const GgufFile& file, std::string architecture)
      : file_(file), prefix_(std::move(architecture) + ".") {}

  std::string name(const char* key) const { return prefix_ + key; }

  int64_t integer(const char* key, int64_t least, int64_t most,
                  std::optional<int64_t> fallback = {}) const {
    const auto found = file_.integer(name(key));
    const int64_t value = found ? *found : fallback ? *fallback : file_.require_integer(name(key));
    if (value < least || value > most) {
      fail(key, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
    }
    return value;
  }

  double positive(const char* key, std::optional<double> fallback = {}) const {
    const auto found = file_.number(name(key));
    const double value = found ? *found : fallback ? *fallback : file_.require_number(name(key));
    if (!(value > 0) || std::isinf(value)) fail(key, std::to_string(value), "a positive number");
    return value;
  }

  [[noreturn]] void fail(const char* key, const std::string& found,
                         const std::string& needed) const {
    file_.fail(name(key) + " is " + found + ", " + needed + " is needed");
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

enum class RopeScaling { none, linear, yarn };

RopeScaling rope_scaling(const GgufFile& file, const Keys& keys) {
  const auto type = file.string(keys.name("rope.scaling.type"));
  if (!type || *type == "linear") return RopeScaling::linear;
  if (*type == "none") return RopeScaling::none;
  if (*type != "yarn") keys.fail("rope.scaling.type", shown(*type), "none, linear or yarn");
  return RopeScaling::yarn;
}

double scaling_factor(const GgufFile& file, const Keys& keys) {
  if (file.string(keys.name("rope.scaling.type"))) return keys.positive("rope.scaling.factor");
  // Files that name the factor only mean linear; those from before 2023-10 use another key.
  return keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0));
}

// YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times in the original context keep their
// frequency, those that turn less than beta_slow times are slowed by the factor, with a ramp between them.
void slow_by_parts(const Keys& keys, double base, double factor, int64_t dims,
                   std::vector<double>& frequencies) {
  const auto original =
      static_cast<double>(keys.integer("rope.scaling.original_context_length", 1, int64_t{1} << 32,
                                       keys.integer("context_length", 1, int64_t{1} << 32)));
  const auto pair_of_turns = [&](double turns) {
    const double pi = std::acos(-1.0);
    return static_cast<double>(dims) * std::log(original / (turns * 2 * pi)) / (2 * std::log(base));
  };
  const double fast = keys.positive("rope.scaling.yarn_beta_fast", 32.0);
  const double slow = keys.positive("rope.scaling.yarn_beta_slow", 1.0);
  const double first = std::max(std::floor(pair_of_turns(fast)), 0.0);
  const double last = std::min(std::ceil(pair_of_turns(slow)), static_cast<double>(dims - 1));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double slowed =
        std::clamp((static_cast<double>(i) - first) / std::max(last - first, 0.001), 0.0, 1.0);
    frequencies[i] *= 1 - slowed + slowed / factor;
  }
}

// Frequency of pair i: base^(-2i/dims), scaled, and divided by rope_freqs.weight[i] where the file has that
// (Llama 3.1 and later).
void read_rotation(const GgufFile& file, const Keys& keys, int64_t dims, ModelConfig& config) {
  const double base = keys.positive("rope.freq_base", 10000.0);
  std::vector<double> frequencies(static_cast<size_t>(dims / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(dims));
  }
  config.rotary_magnitude = keys.positive("rope.scaling.attn_factor", 1.0);
  const RopeScaling scaling = rope_scaling(file, keys);
  const double factor = scaling == RopeScaling::none ? 1 : scaling_factor(file, keys);
  if (scaling == RopeScaling::yarn) {
    slow_by_parts(keys, base, factor, dims, frequencies);
    config.rotary_magnitude *= keys.positive("rope.scaling.yarn_attn_factor", 1.0) *
                               (1 + 0.1 * std::log(std::max(factor, 1.0)));
  } else {
    for (double& f : frequencies) f /= factor;
  }
  if (const GgufTensor* factors = file.find("rope_freqs.weight")) {
    if (factors->count() != dims / 2) {
      file.fail("rope_freqs.weight has " + std::to_string(factors->count()) + " values, " +
                std::to_string(dims / 2) + " are needed");
    }
    const std::vector<float> values = factors->to_float();
    for (size_t i = 0; i < frequencies.size(); ++i) {
      if (!(values[i] > 0)) {
        file.fail("rope_freqs.weight holds " + std::to_string(values[i]) +
                  ", positive numbers are needed");
      }
      frequencies[i] /= static_cast<double>(values[i]);
    }
  }
  config.rotary_frequencies = std::move(frequencies);
}

}  // namespace

ModelConfig read_model_config(const GgufFile& file) {
  constexpr int64_t kMost = int64_t{1} << 24;  // no size of a real model is near it
  ModelConfig config;
  if (const int64_t parts = file.integer("split.count").value_or(1); parts > 1) {
    file.fail("it is part " + std::to_string(file.integer("split.no").value_or(0) + 1) + " of " +
              std::to_string(parts) +
              ", needed one file of all parts: llama-gguf-split --merge joins them");
  }
  config.architecture = file.require_string("general.architecture");
  if (config.architecture != "llama" && config.architecture != "qwen2" &&
      config.architecture != "qwen3") {
    file.fail("general.architecture is " + shown(config.architecture) +
              ", llama, qwen2 or qwen3 is needed");
  }
  const Keys keys(file, config.architecture);
  if (keys.integer("expert_count", 0, kMost, 0) > 0) {
    keys.fail("expert_count", "above 0", "a model without experts");
  }
  config.layers = keys.integer("block_count", 1, 4096);
  config.width = keys.integer("embedding_length", 1, kMost);
  config.heads = keys.integer("attention.head_count", 1, 4096);
  config.kv_heads = keys.integer("attention.head_count_kv", 1, config.heads, config.heads);
  if (config.heads % config.kv_heads != 0) {
    keys.fail("attention.head_count_kv", std::to_string(config.kv_heads),
              "a divisor of the " + std::to_string(config.heads) + " heads");
  }
  config.head_dim = keys.integer("attention.key_length", 1, 256,
                                 std::max<int64_t>(1, config.width / config.heads));
  if (keys.integer("attention.value_length", 1, 256, config.head_dim) != config.head_dim) {
    keys.fail("attention.value_length", "another number than attention.key_length",
              std::to_string(config.head_dim));
  }
  config.hidden = keys.integer("feed_forward_length", 1, kMost);
  config.context = keys.integer("context_length", 1, int64_t{1} << 32);
  config.norm_eps = static_cast<float>(keys.positive("attention.layer_norm_rms_epsilon"));
  config.rotary_interleaved = config.architecture == "llama";
  const int64_t dims = keys.integer("rope.dimension_count", 2, config.head_dim, config.head_dim);
  if (dims % 2 != 0) keys.fail("rope.dimension_count", std::to_string(dims), "an even number");
  read_rotation(file, keys, dims, config);
  config.qkv_bias = config.architecture == "qwen2";
  config.qk_norm = config.architecture == "qwen3";
  const GgufTensor& embedding = file.require("token_embd.weight");
  if (embedding.shape.size() != 2 || embedding.shape[1] != config.width) {
    file.fail("token_embd.weight has no " + std::to_string(config.width) + " columns, which " +
              keys.name("embedding_length") + " needs");
  }
  config.vocab = embedding.shape[0];
  return config;
}

}  // namespace heed
