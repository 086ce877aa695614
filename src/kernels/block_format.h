// The ways in which the weights of a row are stored in a GGUF file.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace heed {

/// Rows follow each other without gaps. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
enum class BlockFormat : uint8_t {
  f32,
  f16,
  bf16,  // plain values, little-endian
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,  // blocks of 32 weights with a float16 scale (and minimum)
  q4_k,
  q5_k,
  q6_k,  // blocks of 256 weights with 8 or 16 groups of their own scale
};
inline constexpr int kBlockFormats = 11;

struct BlockLayout {
  const char* name;  // "Q4_1"
  int64_t weights, bytes;
};
inline constexpr std::array<BlockLayout, kBlockFormats> kBlockLayouts{{{"F32", 1, 4},
                                                                       {"F16", 1, 2},
                                                                       {"BF16", 1, 2},
                                                                       {"Q8_0", 32, 34},
                                                                       {"Q4_0", 32, 18},
                                                                       {"Q4_1", 32, 20},
                                                                       {"Q5_0", 32, 22},
                                                                       {"Q5_1", 32, 24},
                                                                       {"Q4_K", 256, 144},
                                                                       {"Q5_K", 256, 176},
                                                                       {"Q6_K", 256, 210}}};

constexpr const BlockLayout& layout_of(BlockFormat format) {
  return kBlockLayouts[static_cast<size_t>(format)];
}
constexpr const char* name_of(BlockFormat format) { return layout_of(format).name; }
constexpr int64_t weights_per_block(BlockFormat format) { return layout_of(format).weights; }
constexpr int64_t bytes_per_block(BlockFormat format) { return layout_of(format).bytes; }
/// Whether the format has codes of at most 8 bits.
constexpr bool has_codes(BlockFormat format) { return weights_per_block(format) > 1; }

}  // namespace heed
