#include "llm/utf8.h"

#include <algorithm>

namespace heed {
namespace {

// What may follow a lead byte: how many bytes in all, and the range of the second one (the others are
// 80..BF). Source: Unicode standard, table 3-7.
struct Lead {
  size_t bytes;
  unsigned char low, high;
};

Lead lead_of(unsigned char c) {
  if (c < 0x80) return {1, 0, 0};
  if (c < 0xc2) return {0, 0, 0};
  if (c < 0xe0) return {2, 0x80, 0xbf};
  if (c == 0xe0) return {3, 0xa0, 0xbf};
  if (c == 0xed) return {3, 0x80, 0x9f};
  if (c < 0xf0) return {3, 0x80, 0xbf};
  if (c == 0xf0) return {4, 0x90, 0xbf};
  if (c < 0xf4) return {4, 0x80, 0xbf};
  if (c == 0xf4) return {4, 0x80, 0x8f};
  return {0, 0, 0};
}

}  // namespace

Utf8Step utf8_step(std::string_view text) {
  Lead lead = lead_of(static_cast<unsigned char>(text[0]));
  if (lead.bytes == 0) return {1, false, false};
  size_t end = std::min(lead.bytes, text.size());
  for (size_t i = 1; i < end; ++i) {
    auto c = static_cast<unsigned char>(text[i]);
    unsigned char low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xbf;
    if (c < low || c > high) return {i, false, false};
  }
  bool complete = end == lead.bytes;
  return {end, complete, !complete};
}

std::optional<size_t> first_ill_formed(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text.substr(at));
    if (!step.valid) return at;
    at += step.bytes;
  }
  return std::nullopt;
}

std::string to_valid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    Utf8Step step = utf8_step(text);
    if (step.valid) {
      out += text.substr(0, step.bytes);
    } else {
      out += kReplacementCharacter;
    }
    text.remove_prefix(step.bytes);
  }
  return out;
}

}  // namespace heed
