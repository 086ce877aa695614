#include "cli/text_files.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "heed/error.h"

namespace heed::cli {

std::string read_text(std::string_view option, const std::string& path, size_t most) {
  const auto fail = [&](const std::string& why) {
    throw Error(std::string(option) + ": cannot read '" + path + "': " + why);
  };
  const bool standard = path == "-";
  std::error_code unknown;
  if (!standard && std::filesystem::is_directory(path, unknown)) {
    fail("a file is needed, found a folder");
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> opened(
      standard ? nullptr : std::fopen(path.c_str(), "rb"),
      [](std::FILE* file) { return file == nullptr ? 0 : std::fclose(file); });
  if (!standard && !opened) fail(std::strerror(errno));
  std::FILE* file = standard ? stdin : opened.get();
  std::string text;
  char part[1 << 16];
  size_t got = sizeof part;
  while (got == sizeof part && text.size() <= most) {
    got = std::fread(part, 1, sizeof part, file);
    text.append(part, got);
  }
  if (std::ferror(file) != 0) fail(std::strerror(errno));
  if (text.size() > most) fail("it has more than " + std::to_string(most >> 20) + " MiB");
  return text;
}

void write_text(std::string_view option, const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (!file) {
    throw Error(std::string(option) + " " + path + ": cannot write it: " + std::strerror(errno));
  }
}

void require_writable(std::string_view option, const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const bool there = fs::exists(path, error);
  // To open a pipe and close it again would end it.
  if (there && !fs::is_regular_file(path, error) && !fs::is_directory(path, error)) return;
  const bool open = std::ofstream(path, std::ios::binary | std::ios::app).is_open();
  if (!open) {
    throw Error(std::string(option) + " " + path + ": cannot write it: " + std::strerror(errno));
  }
  if (!there) fs::remove(path, error);
}

}  // namespace heed::cli
