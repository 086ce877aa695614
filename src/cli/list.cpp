// heed list: what there is.
#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "mechanisms/nearest.h"
#include "mechanisms/registry.h"

namespace heed::cli {
namespace {

// Passes over the keys of the fast form, which is what the kernels do.
int passes_of(const Mechanism& mechanism) {
  const CascadeText& fast = mechanism.cascades.back();
  return cascade::count_passes(cascade::parse(fast.text, fast.name), mechanism.pass_rank).passes;
}

void print_list_json() {
  Json list = Json::array();
  for (const Mechanism& m : mechanisms()) {
    list.push_back({{"name", m.name},
                    {"title", m.title},
                    {"sheet", m.sheets},
                    {"arxiv", m.arxiv},
                    {"engine", m.engine},
                    {"passes", passes_of(m)},
                    {"differentiable", static_cast<bool>(m.backward)}});
  }
  print_json(list);
}

void print_list_table() {
  Table table(
      {{"name"}, {"passes", Table::Align::right}, {"engine"}, {"gradient"}, {"arXiv"}, {"title"}});
  for (const Mechanism& m : mechanisms()) {
    table.add({m.name, std::to_string(passes_of(m)), m.engine, m.backward ? "yes" : "no",
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
