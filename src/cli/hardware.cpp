#include "cli/hardware.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "cascade/ast.h"
#include "cascade/lowered.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::cli {

bool is_cascade_file(const std::string& name) {
  std::error_code error;
  return name.ends_with(".cascade") || name.find('/') != std::string::npos ||
         std::filesystem::is_regular_file(name, error);
}

const Mechanism& mechanism_instead_of_file(const std::string& name) {
  try {
    return find_mechanism(name);
  } catch (const Error& error) {
    std::error_code unknown;
    const bool folder = std::filesystem::is_directory(name, unknown);
    throw Error((folder ? "'" + name + "' is a folder" : "no file '" + name + "'") + ", " +
                error.what());
  }
}

std::vector<int64_t> parse_numbers(std::string_view option, std::string_view text) {
  std::vector<int64_t> numbers;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    int64_t value = 0;
    const auto [stop, error] = std::from_chars(text.data() + begin, text.data() + comma, value);
    if (error != std::errc{} || stop != text.data() + comma || begin == comma) {
      throw Error(std::string(option) + ": found '" + std::string(text) +
                  "', whole numbers of at most 63 bits with commas between them are needed");
    }
    numbers.push_back(value);
    begin = comma + 1;
  }
  return numbers;
}

std::vector<int64_t> per_axis(std::string_view option, std::vector<int64_t> numbers, size_t axes) {
  if (numbers.size() == 1) numbers.resize(axes, numbers[0]);
  if (numbers.size() != axes) {
    throw Error(fmt::format("{}: found {} numbers, one for each of the {} axes is needed", option,
                            numbers.size(), axes));
  }
  return numbers;
}

hardware::Sizes parse_sizes(const std::string& text) {
  hardware::Sizes sizes;
  for (size_t begin = 0; begin < text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, comma - begin);
    const size_t equals = part.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw Error("--sizes: found '" + part + "', rank=size is needed: p=4096,m=4096");
    }
    const auto value = parse_numbers("--sizes " + part.substr(0, equals), part.substr(equals + 1));
    constexpr int64_t kMost = int64_t{1} << 31;
    if (value.size() != 1 || value[0] < 1 || value[0] > kMost) {
      throw Error("--sizes: found '" + part + "', a size from 1 to 2^31 is needed");
    }
    sizes[part.substr(0, equals)] = value[0];
    begin = comma + 1;
  }
  return sizes;
}

std::vector<std::string> sized_ranks(const cascade::Program& program) {
  const cascade::Lowered& lowered = *program.ast().lowered;
  std::vector<std::string> ranks;
  for (const cascade::Rank& rank : lowered.ranks) {
    const bool of_a_split = std::any_of(
        program.ast().splits.begin(), program.ast().splits.end(),
        [&](const auto& split) { return rank.name == split.outer || rank.name == split.inner; });
    if (rank.size < 0 && !of_a_split) ranks.push_back(rank.name);
  }
  ranks.insert(ranks.end(), lowered.constants.begin(), lowered.constants.end());
  return ranks;
}

void require_known_ranks(const hardware::Sizes& sizes, const std::vector<std::string>& ranks) {
  for (const auto& [rank, size] : sizes) {
    if (std::find(ranks.begin(), ranks.end(), rank) != ranks.end()) continue;
    throw Error("--sizes: found '" + rank + "', which no cascade has; known: " + joined(ranks));
  }
}

void require_sizes(const hardware::Sizes& sizes, const std::vector<std::string>& ranks) {
  for (const std::string& rank : ranks) {
    if (sizes.contains(rank)) continue;
    throw Error("--sizes: no size of rank '" + rank + "': --sizes " + rank + "=...; needed " +
                joined(ranks));
  }
}

void add_hardware(CLI::App& app, Outcome& outcome) {
  CLI::App* hardware = app.add_subcommand(
      "hardware", "Passes, accelerators, tile plans: what attention costs on a machine");
  hardware->require_subcommand(0, 1);
  add_hardware_passes(*hardware);
  add_hardware_fusemax(*hardware);
  add_hardware_place(*hardware);
  add_hardware_tiles(*hardware);
  add_hardware_simulate(*hardware);
  add_hardware_touches(*hardware);
  add_hardware_cpu(*hardware);
  add_hardware_files(*hardware);
  hardware->callback([hardware, &outcome] {
    if (!hardware->get_subcommands().empty()) return;
    say("{}", hardware->help("heed"));
    outcome.exit_code = kUsageError;
  });
}

}  // namespace heed::cli
