// heed list: what there is.
#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "mechanisms/nearest.h"
#include "mechanisms/registry.h"

namespace heed::cli {
namespace {

// Passes over the keys of the form with the fewest, which is what the kernels do.
int fewest_passes(const Mechanism& mechanism) {
  std::optional<int> fewest;
  for (const CascadeText& text : mechanism.cascades) {
    const auto report = passes_of(mechanism, text);
    if (report && (!fewest || report->passes < *fewest)) fewest = report->passes;
  }
  return fewest.value_or(0);
}

void print_list_json() {
  Json list = Json::array();
  for (const Mechanism& m : mechanisms()) {
    list.push_back({{"name", m.name},
                    {"title", m.title},
                    {"sheet", m.sheets},
                    {"arxiv", m.arxiv},
                    {"engine", m.engine},
                    {"passes", fewest_passes(m)},
                    {"differentiable", static_cast<bool>(m.backward)}});
  }
  print_json(list);
}

void print_list_table() {
  Table table(
      {{"name"}, {"passes", Table::Align::right}, {"engine"}, {"gradient"}, {"arXiv"}, {"title"}});
  for (const Mechanism& m : mechanisms()) {
    table.add({m.name, std::to_string(fewest_passes(m)), m.engine, m.backward ? "yes" : "no",
               joined(m.arxiv), m.title});
  }
  table.print();
}

}  // namespace

void add_list(CLI::App& app, Outcome&) {
  CLI::App* command = app.add_subcommand("list", "The mechanisms: JSON, or a table on a terminal");
  auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "JSON on a terminal too");
  command->callback([json] {
    if (*json || !is_terminal(stdout)) {
      print_list_json();
    } else {
      print_list_table();
    }
  });
}

}  // namespace heed::cli
