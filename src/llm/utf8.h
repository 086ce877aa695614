// UTF-8 as Unicode defines it (no surrogates, nothing above U+10FFFF, shortest form only).
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace heed {

inline constexpr std::string_view kReplacementCharacter = "\xef\xbf\xbd";  // U+FFFD

/// What stands at the start of a text: a well-formed character of `bytes` bytes, or an ill-formed
/// sequence of `bytes` bytes (its maximal subpart, as in the Unicode standard, section 3.9), which is
/// `cut` when it could still become a character with more bytes. `text` must not be empty.
struct Utf8Step {
  size_t bytes;
  bool valid;
  bool cut;
};
Utf8Step utf8_step(std::string_view text);

/// Where the first ill-formed sequence begins.
std::optional<size_t> first_ill_formed(std::string_view text);

/// The text with each ill-formed sequence replaced by U+FFFD, as Python's errors="replace" does.
std::string to_valid_utf8(std::string_view text);

}  // namespace heed
