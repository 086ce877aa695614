// heed hardware files: the built-in machines, layers, mappings and cascades, to read and to copy.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "cli/hardware.h"
#include "cli/terminal.h"
#include "hardware/machine.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::cli {
namespace {

// "data/bert.workload.json" is asked for as bert or bert.workload.
std::string short_name(std::string_view file) {
  const size_t slash = file.rfind('/') + 1;
  const std::string_view name = file.substr(slash);
  return std::string(name.substr(0, name.find('.')));
}

std::string kind(std::string_view file) {
  if (file.ends_with(".cascade")) return "cascade";
  const std::string_view name = file.substr(file.rfind('/') + 1);
  const size_t first = name.find('.') + 1;
  return std::string(name.substr(first, name.find('.', first) - first));
}

void list() {
  Table table({{"name"}, {"kind"}, {"file"}});
  for (std::string_view file : hardware::data_files()) {
    table.add({short_name(file), kind(file), std::string(file)});
  }
  table.print();
}

void show(const std::string& name) {
  std::vector<std::string> names, matches;
  for (std::string_view file : hardware::data_files()) {
    const std::string brief = short_name(file), with_kind = brief + "." + kind(file);
    if (std::find(names.begin(), names.end(), brief) == names.end()) names.push_back(brief);
    if (name == brief || name == with_kind || name == file) {
      matches.emplace_back(file);
    }
  }
  if (matches.empty()) {
    throw Error("hardware files: no file '" + name + "'" + did_you_mean(name, names) +
                "; there are " + joined(names));
  }
  if (matches.size() > 1) {
    throw Error("hardware files: '" + name + "' may be " + joined(matches) +
                "; name and kind are needed, as " + name + "." + kind(matches[0]));
  }
  fmt::print("{}", hardware::data_file(matches[0]));
}

}  // namespace

void add_hardware_files(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "files", "The built-in machines, layers, mappings and cascades, to copy and change");
  auto name = std::make_shared<std::string>();
  command->add_option("NAME", *name, "The file to print; without it a list");
  command->callback([name] { name->empty() ? list() : show(*name); });
}

}  // namespace heed::cli
