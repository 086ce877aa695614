// Strings from files, made safe to show in messages.
#pragma once
#include <string>
#include <string_view>

namespace heed {

/// The text in double quotes; bytes outside printable ASCII as \xNN; of more than 80 bytes the first and
/// last 40, since a path ends with what tells it from others.
inline std::string shown(std::string_view text) {
  constexpr size_t kHalf = 40;
  constexpr const char* kHex = "0123456789abcdef";
  std::string out = "\"";
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.size() > 2 * kHalf && i == kHalf) {
      out += "...";
      i = text.size() - kHalf;
    }
    auto byte = static_cast<unsigned char>(text[i]);
    if (byte >= 0x20 && byte < 0x7f && text[i] != '"') {
      out += text[i];
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + '"';
}

}  // namespace heed
