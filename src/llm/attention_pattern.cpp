#include "llm/attention_pattern.h"

#include <algorithm>
#include <charconv>
#include <string>
#include <utility>

#include "heed/error.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "mechanisms/nearest.h"

namespace heed {

namespace {

// As people write them: "flash".
std::vector<std::string> names_for_models() {
  std::vector<std::string> names;
  for (const Mechanism& mechanism : mechanisms()) {
    if (mechanism.model_attention) names.emplace_back(brief_name(mechanism));
  }
  return names;
}

const Mechanism& named(const std::string& name) {
  try {
    return find_mechanism(name);
  } catch (const Error&) {  // it lists all mechanisms
    const auto names = names_for_models();
    throw Error("unknown mechanism '" + name + "'" + did_you_mean(name, names) +
                "; a model takes: " + joined(names));
  }
}

const Mechanism& mechanism_for_models(const Spec& spec) {
  const Mechanism& mechanism = named(spec.name());
  if (!mechanism.model_attention) {
    throw Error(mechanism.name + " cannot stand in for the attention of a model; these can: " +
                joined(names_for_models()));
  }
  if (!spec.flag("causal", true)) {
    throw Error("option 'causal': found '" + spec.text("causal").value_or("") +
                "'; the attention of a language model is causal, 1 is needed");
  }
  return mechanism;
}

// "15xflash": 15 and "flash"; "flash": 1 and "flash".
std::pair<int64_t, std::string_view> count_and_rest(std::string_view part) {
  const size_t digits = std::min(part.find_first_not_of("0123456789"), part.size());
  if (digits == 0 || digits == part.size() || part[digits] != 'x') return {1, part};
  int64_t count = 0;
  const auto [stop, error] = std::from_chars(&part[0], &part[0] + digits, count);
  if (error != std::errc() || count < 1) {
    throw Error("'" + std::string(part) + "': found a count of " +
                std::string(part.substr(0, digits)) +
                " layers, needed at least 1 and no more than there are");
  }
  return {count, part.substr(digits + 1)};
}

struct Part {
  int64_t count;
  Spec spec;
};

std::vector<Part> parts_of(std::string_view pattern) {
  std::vector<Part> parts;
  for (size_t begin = 0; begin <= pattern.size();) {
    const size_t slash = std::min(pattern.find('/', begin), pattern.size());
    std::string_view text = pattern.substr(begin, slash - begin);
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    const auto [count, rest] = count_and_rest(text);
    parts.push_back({count, Spec::parse(rest)});
    begin = slash + 1;
  }
  return parts;
}

// Some options are checked by nothing but a call: one token is enough.
void try_out(const ModelAttention& attention, const ModelConfig& config) {
  const auto zeros = [&](int64_t heads) {
    return Array::zeros(DType::f32, {1, heads, 1, config.head_dim});
  };
  const Array q = zeros(config.heads), kv = zeros(config.kv_heads), out = zeros(config.heads);
  if (attention.over_cache) {
    attention.over_cache(q, kv, kv, out, {});
    return;
  }
  std::vector<Array> arrays;
  std::vector<Tensor> state;
  for (const Dims& shape : attention.state_shapes) {
    state.push_back(arrays.emplace_back(Array::zeros(DType::f32, shape)));
  }
  attention.over_state(q, kv, kv, out, state, {});
}

}  // namespace

std::vector<ModelAttention> parse_attention(std::string_view pattern, const ModelConfig& config) {
  const std::vector<Part> parts = parts_of(pattern);
  int64_t period = 0;  // at least 1: there is a part, and it counts
  for (const Part& part : parts) {
    mechanism_for_models(part.spec);
    // Longer than the model is too long already: no overflow.
    period = std::min(period, config.layers) + std::min(part.count, config.layers + 1);
  }
  if (config.layers % std::max<int64_t>(period, 1) != 0) {
    const std::string layers = std::to_string(config.layers);
    throw Error("'" + std::string(pattern) + "': found a pattern of " +
                (period > config.layers ? "more than " + layers : std::to_string(period)) +
                " layers, needed a number that divides the model's " + layers);
  }
  std::vector<ModelAttention> layers;
  ModelLayer at{0, config.layers, config.heads, config.kv_heads, config.head_dim, config.context};
  while (at.layer < config.layers) {
    for (const Part& part : parts) {
      for (int64_t i = 0; i < part.count; ++i, ++at.layer) {
        layers.push_back(mechanism_for_models(part.spec).model_attention(part.spec, at));
        if (at.layer < period && i == 0) try_out(layers.back(), config);
      }
    }
  }
  return layers;
}

}  // namespace heed
