// The known name that a mistyped one most likely meant.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace heed {

/// The element of `names` with the smallest edit distance (insert, delete, replace, swap of
/// neighbours; case ignored), or "" when none is close enough to be what was meant.
std::string nearest(std::string_view typed, const std::vector<std::string>& names);

/// " (did you mean 'flash_attention'?)" or "".
std::string did_you_mean(std::string_view typed, const std::vector<std::string>& names);

/// "a, b, c"
std::string joined(const std::vector<std::string>& names);

}  // namespace heed
