#include "llm/ggml_types.h"

#include <array>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "heed/error.h"
#include "heed/tensor.h"

namespace heed {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are little-endian");

using Bytes = const std::byte*;

float f16_at(Bytes p) {
  float16 half;
  std::memcpy(&half.bits, p, sizeof half.bits);
  return to_float(half);
}

int u8_at(Bytes p, int i) { return std::to_integer<int>(p[i]); }
int i8_at(Bytes p, int i) { return static_cast<int8_t>(std::to_integer<uint8_t>(p[i])); }
int low4(Bytes p, int i) { return u8_at(p, i) & 15; }
int high4(Bytes p, int i) { return u8_at(p, i) >> 4; }

// Values 0..15 of a 32-value block are the low halves of its bytes, 16..31 the high halves.
int q4(Bytes qs, int i) { return i < 16 ? low4(qs, i) : high4(qs, i - 16); }

int q5(Bytes qh, Bytes qs, int i) {
  uint32_t fifth;
  std::memcpy(&fifth, qh, sizeof fifth);
  return q4(qs, i) | static_cast<int>((fifth >> i) & 1) << 4;
}

// One function per format: the block at `p` to its values at `out`.

void block_f32(Bytes p, float* out) { std::memcpy(out, p, sizeof *out); }

void block_f16(Bytes p, float* out) { *out = f16_at(p); }

void block_bf16(Bytes p, float* out) {
  uint16_t high;
  std::memcpy(&high, p, sizeof high);
  *out = std::bit_cast<float>(static_cast<uint32_t>(high) << 16);
}

void block_q4_0(Bytes p, float* out) {
  float d = f16_at(p);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q4(p + 2, i) - 8);
}

void block_q4_1(Bytes p, float* out) {
  float d = f16_at(p), m = f16_at(p + 2);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q4(p + 4, i)) + m;
}

void block_q5_0(Bytes p, float* out) {
  float d = f16_at(p);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q5(p + 2, p + 6, i) - 16);
}

void block_q5_1(Bytes p, float* out) {
  float d = f16_at(p), m = f16_at(p + 2);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q5(p + 4, p + 8, i)) + m;
}

void block_q8_0(Bytes p, float* out) {
  float d = f16_at(p);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(i8_at(p + 2, i));
}

// Scale and minimum of group g (0..7): 12 bytes hold sixteen 6-bit numbers. Those of groups 0..3 lie in
// the low bits of bytes g and g + 4; of groups 4..7 the low 4 bits are in byte g + 4, the high 2 bits are
// the top bits of bytes g - 4 and g.
std::pair<float, float> scale_min_k(Bytes s, int g) {
  int scale, minimum;
  if (g < 4) {
    scale = u8_at(s, g) & 63;
    minimum = u8_at(s, g + 4) & 63;
  } else {
    scale = low4(s, g + 4) | (u8_at(s, g - 4) >> 6) << 4;
    minimum = high4(s, g + 4) | (u8_at(s, g) >> 6) << 4;
  }
  return {static_cast<float>(scale), static_cast<float>(minimum)};
}

// Groups 2j and 2j + 1 are the low and the high halves of the 32 bytes from qs + 32 j.
int q4_k(Bytes qs, int group, int i) {
  Bytes row = qs + 32 * (group / 2);
  return group % 2 == 0 ? low4(row, i) : high4(row, i);
}

void block_q4_k(Bytes p, float* out) {
  float d = f16_at(p), dmin = f16_at(p + 2);
  for (int g = 0; g < 8; ++g) {
    auto [scale, minimum] = scale_min_k(p + 4, g);
    float step = d * scale, base = dmin * minimum;
    for (int i = 0; i < 32; ++i)
      out[32 * g + i] = step * static_cast<float>(q4_k(p + 16, g, i)) - base;
  }
}

void block_q5_k(Bytes p, float* out) {
  float d = f16_at(p), dmin = f16_at(p + 2);
  Bytes qh = p + 16, qs = p + 48;
  for (int g = 0; g < 8; ++g) {
    auto [scale, minimum] = scale_min_k(p + 4, g);
    float step = d * scale, base = dmin * minimum;
    for (int i = 0; i < 32; ++i) {
      int q = q4_k(qs, g, i) | ((u8_at(qh, i) >> g) & 1) << 4;
      out[32 * g + i] = step * static_cast<float>(q) - base;
    }
  }
}

void block_q6_k(Bytes p, float* out) {
  Bytes ql = p, qh = p + 128, scales = p + 192;
  float d = f16_at(p + 208);
  for (int i = 0; i < 256; ++i) {
    // Halves of 128 values: 64 bytes of low bits, 32 bytes that hold the high bits of four runs of 32.
    int half = i / 128, run = i / 32 % 4, low = i % 64;
    Bytes row = ql + 64 * half;
    int q = (run < 2 ? low4(row, low) : high4(row, low)) |
            ((u8_at(qh, 32 * half + i % 32) >> (2 * run)) & 3) << 4;
    out[i] = d * static_cast<float>(i8_at(scales, i / 16)) * static_cast<float>(q - 32);
  }
}

struct Format {
  GgmlType type;
  BlockFormat blocks;
  void (*convert)(Bytes block, float* out);
};

constexpr std::array kFormats = {
    Format{GgmlType::kF32, BlockFormat::f32, block_f32},
    Format{GgmlType::kF16, BlockFormat::f16, block_f16},
    Format{GgmlType::kQ4_0, BlockFormat::q4_0, block_q4_0},
    Format{GgmlType::kQ4_1, BlockFormat::q4_1, block_q4_1},
    Format{GgmlType::kQ5_0, BlockFormat::q5_0, block_q5_0},
    Format{GgmlType::kQ5_1, BlockFormat::q5_1, block_q5_1},
    Format{GgmlType::kQ8_0, BlockFormat::q8_0, block_q8_0},
    Format{GgmlType::kQ4_K, BlockFormat::q4_k, block_q4_k},
    Format{GgmlType::kQ5_K, BlockFormat::q5_k, block_q5_k},
    Format{GgmlType::kQ6_K, BlockFormat::q6_k, block_q6_k},
    Format{GgmlType::kBF16, BlockFormat::bf16, block_bf16},
};

// Names of formats that files use and heed does not read, for messages.
constexpr std::array<std::pair<uint32_t, std::string_view>, 15> kOtherNames = {{
    {9, "Q8_1"},
    {10, "Q2_K"},
    {11, "Q3_K"},
    {15, "Q8_K"},
    {16, "IQ2_XXS"},
    {17, "IQ2_XS"},
    {18, "IQ3_XXS"},
    {19, "IQ1_S"},
    {20, "IQ4_NL"},
    {21, "IQ3_S"},
    {22, "IQ2_S"},
    {23, "IQ4_XS"},
    {28, "F64"},
    {29, "IQ1_M"},
    {39, "MXFP4"},
}};

const Format* find_format(uint32_t type_id) {
  for (const Format& format : kFormats)
    if (static_cast<uint32_t>(format.type) == type_id) return &format;
  return nullptr;
}

const Format& format_of(GgmlType type) {
  const Format* format = find_format(static_cast<uint32_t>(type));
  if (format == nullptr)
    throw Error("tensor type is " + ggml_type_name(static_cast<uint32_t>(type)) +
                ", which heed does not read");
  return *format;
}

}  // namespace

std::optional<BlockFormat> block_format(uint32_t type_id) {
  const Format* format = find_format(type_id);
  return format == nullptr ? std::nullopt : std::optional(format->blocks);
}

BlockFormat block_format(GgmlType type) { return format_of(type).blocks; }

std::string ggml_type_name(uint32_t type_id) {
  if (const Format* format = find_format(type_id)) return name_of(format->blocks);
  std::string name = "type " + std::to_string(type_id);
  for (auto [id, other] : kOtherNames)
    if (id == type_id) name += " (" + std::string(other) + ")";
  return name;
}

void dequantize(GgmlType type, std::span<const std::byte> bytes, float* out, int64_t count) {
  const Format& format = format_of(type);
  const BlockLayout& block = layout_of(format.blocks);
  if (count < 0 || count % block.weights != 0)
    throw Error("dequantize: count is " + std::to_string(count) + ", needed a multiple of " +
                std::to_string(block.weights) + " for " + block.name);
  // Compared in blocks: a product of an unchecked count could overflow.
  auto needed = static_cast<uint64_t>(count / block.weights);
  auto block_bytes = static_cast<uint64_t>(block.bytes);
  if (bytes.size() % block_bytes != 0 || bytes.size() / block_bytes != needed)
    throw Error("dequantize: bytes has " + std::to_string(bytes.size()) + " bytes, needed " +
                std::to_string(needed) + " blocks of " + std::to_string(block_bytes) + " for " +
                std::to_string(count) + " values of " + block.name);
  Bytes in = bytes.data();
  for (uint64_t b = 0; b < needed; ++b, in += block_bytes, out += block.weights)
    format.convert(in, out);
}

}  // namespace heed
