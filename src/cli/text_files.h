// Text that commands read and write.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace heed::cli {

/// The whole file, "-" for standard input; throws Error naming `option`, the file and why, also where it
/// has more than `most` bytes.
std::string read_text(std::string_view option, const std::string& path, size_t most = SIZE_MAX);
/// The same for descriptions of machines, mappings and cascades, which have at most 16 MiB.
inline std::string read_description(std::string_view option, const std::string& path) {
  return read_text(option, path, size_t{1} << 24);
}
/// Throws Error naming the option, the file and why.
void write_text(std::string_view option, const std::string& path, const std::string& text);
/// Throws what write_text would throw, before a measurement that would be lost; leaves no new file.
void require_writable(std::string_view option, const std::string& path);

}  // namespace heed::cli
