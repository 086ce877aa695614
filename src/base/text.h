#pragma once
#include <algorithm>
#include <string_view>

namespace heed {

/// Without spaces, tabs and carriage returns at both ends.
inline std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kSpaces = " \t\r";
  text.remove_prefix(std::min(text.find_first_not_of(kSpaces), text.size()));
  return text.substr(0, text.find_last_not_of(kSpaces) + 1);
}

}  // namespace heed
