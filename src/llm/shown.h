// Strings from files, made safe to show in messages.
#pragma once
#include <string>
#include <string_view>

namespace heed {

/// The text in double quotes; bytes outside printable ASCII as \xNN; shortened to 80 bytes.
inline std::string shown(std::string_view text) {
  constexpr size_t kLongest = 80;
  constexpr const char* kHex = "0123456789abcdef";
  std::string out = "\"";
  for (char c : text.substr(0, kLongest)) {
    auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f && c != '"') {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kLongest ? "...\"" : "\"");
}

}  // namespace heed
