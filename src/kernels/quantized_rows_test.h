// Random matrices in every format of a GGUF file, for tests.
#pragma once
#include <cstring>
#include <random>
#include <vector>

#include "heed/tensor.h"
#include "kernels/quantized_rows.h"
#include "llm/ggml_types.h"

namespace heed {

struct Format {
  BlockFormat format;
  GgmlType type;
  std::vector<int> f16_at;  // bytes of a block that hold float16 scales
};

inline const std::vector<Format> kFormats{
    {BlockFormat::f32, GgmlType::kF32, {}},       {BlockFormat::f16, GgmlType::kF16, {0}},
    {BlockFormat::bf16, GgmlType::kBF16, {}},     {BlockFormat::q8_0, GgmlType::kQ8_0, {0}},
    {BlockFormat::q4_0, GgmlType::kQ4_0, {0}},    {BlockFormat::q4_1, GgmlType::kQ4_1, {0, 2}},
    {BlockFormat::q5_0, GgmlType::kQ5_0, {0}},    {BlockFormat::q5_1, GgmlType::kQ5_1, {0, 2}},
    {BlockFormat::q4_k, GgmlType::kQ4_K, {0, 2}}, {BlockFormat::q5_k, GgmlType::kQ5_K, {0, 2}},
    {BlockFormat::q6_k, GgmlType::kQ6_K, {208}}};

// A matrix of random bits, with scales of ordinary size, zero and subnormal now and then.
struct Matrix {
  Format format;
  std::vector<std::byte> bytes;
  BlockMatrix view;
  std::vector<float> values;  // [rows, columns]

  Matrix(const Format& f, int64_t rows, int64_t columns, uint32_t seed) : format(f) {
    std::mt19937 random(seed);
    view = {f.format, nullptr, rows, columns};
    bytes.resize(static_cast<size_t>(rows * view.row_bytes()));
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    std::normal_distribution<float> normal;
    const int64_t block = bytes_per_block(f.format);
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(block)) {
      for (int offset : f.f16_at) {
        const uint32_t kind = random() % 16;
        const float16 scale = kind == 0   ? float16{0}
                              : kind == 1 ? float16{0x8123}
                                          : to_float16(normal(random));
        std::memcpy(&bytes[at + static_cast<size_t>(offset)], &scale, 2);
      }
      if (f.format == BlockFormat::f32) {
        const float value = normal(random);
        std::memcpy(&bytes[at], &value, 4);
      } else if (f.format == BlockFormat::bf16) {
        const bfloat16 value = to_bfloat16(normal(random));
        std::memcpy(&bytes[at], &value, 2);
      }
    }
    values.resize(static_cast<size_t>(rows * columns));
    dequantize(f.type, bytes, values.data(), rows * columns);
    view.data = bytes.data();
  }
};

inline std::vector<float> normals(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(random);
  return values;
}

}  // namespace heed
