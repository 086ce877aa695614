// Text files of the mechanism folders, compiled into the library.
#pragma once
#include <string_view>
#include <vector>

namespace heed {

/// The text of a file under src/mechanisms, by "folder/file": embedded("flash/softmax.cascade"),
/// embedded("flash/card.md"). Throws std::logic_error when the build embedded no such file.
std::string_view embedded(std::string_view name);

/// Names of all embedded files, sorted.
std::vector<std::string_view> embedded_names();

}  // namespace heed
