// The number formats of GGUF tensors: sizes, and exact conversion to float32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "kernels/block_format.h"

namespace heed {

/// Storage of a tensor; the values are the ids in the file. Quantised types store blocks of values
/// along a row. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,   // 32 values: f16 scale d, 4-bit q;            d * (q - 8)
  kQ4_1 = 3,   // 32 values: f16 d, f16 minimum m, 4-bit q;   d * q + m
  kQ5_0 = 6,   // 32 values: f16 d, 5-bit q;                  d * (q - 16)
  kQ5_1 = 7,   // 32 values: f16 d, f16 m, 5-bit q;           d * q + m
  kQ8_0 = 8,   // 32 values: f16 d, int8 q;                   d * q
  kQ4_K = 12,  // 256 values in 8 groups, 6-bit scales s, m;  (d * s) * q - (dmin * m)
  kQ5_K = 13,  // as kQ4_K with 5-bit q
  kQ6_K = 14,  // 256 values in 16 groups, int8 scales s;     (d * s) * (q - 32)
  kBF16 = 30,
};

/// Blocks of a type id from a file; nullopt when heed does not read it.
std::optional<BlockFormat> block_format(uint32_t type_id);
/// Blocks of a known type.
BlockFormat block_format(GgmlType type);
/// "Q4_1"; for ids that heed does not read "type 10 (Q2_K)" or "type 99".
std::string ggml_type_name(uint32_t type_id);

/// Converts `count` values to float32, bit for bit as the format defines (products and sums rounded to
/// float32 one at a time, no fused multiply-add). `bytes` needs no alignment.
/// Throws Error unless count is a whole number of blocks and `bytes` is exactly their size.
void dequantize(GgmlType type, std::span<const std::byte> bytes, float* out, int64_t count);

}  // namespace heed
