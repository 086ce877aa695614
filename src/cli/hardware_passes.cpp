// heed hardware passes: how often a cascade must go over a rank.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "cascade/ast.h"
#include "cascade/lowered.h"
#include "cli/hardware.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "heed/error.h"
#include "mechanisms/registry.h"

namespace heed::cli {
namespace {

using cascade::PassReport;
using cascade::Program;

struct Arguments {
  std::string what, rank;
  bool json = false;
};

// "m" where the cascade has it, else its only rank.
std::string default_rank(const Program& program) {
  std::vector<std::string> own;
  for (const auto& rank : program.ast().ranks) {
    if (rank.name == "m") return "m";
    if (!rank.batch) own.push_back(rank.name);
  }
  if (own.size() == 1) return own[0];
  cascade::count_passes(program, "m");  // throws, listing the ranks
  return "m";
}

Json report_json(const PassReport& report) {
  Json statements = Json::array();
  for (const auto& row : report.rows) {
    statements.push_back({{"tensor", row.tensor}, {"pass", row.pass}, {"line", row.line}});
  }
  return {{"passes", report.passes}, {"statements", statements}};
}

void print_report(const std::string& name, const std::string& rank, const PassReport& report) {
  Table table({{"line", Table::Align::right}, {"tensor"}, {"pass", Table::Align::right}});
  for (const auto& row : report.rows) {
    table.add(
        {std::to_string(row.line), row.tensor, row.pass == 0 ? "-" : std::to_string(row.pass)});
  }
  fmt::print("{}\n", bold(fmt::format("{}: passes over {}: {}", name, rank, report.passes)));
  table.print(2);
}

void one_program(const Program& program, const Arguments& arguments) {
  const std::string rank = arguments.rank.empty() ? default_rank(program) : arguments.rank;
  const PassReport report = cascade::count_passes(program, rank);
  if (arguments.json) {
    print_json(report_json(report));
  } else {
    print_report(program.name(), rank, report);
  }
}

bool has_rank(const Program& program, const std::string& rank) {
  return program.ast().lowered->find_rank(rank) >= 0;
}

void one_mechanism(const Mechanism& mechanism, const Arguments& arguments) {
  const std::string rank = arguments.rank.empty() ? mechanism.pass_rank : arguments.rank;
  Json cascades = Json::array();
  for (const CascadeText& text : mechanism.cascades) {
    const Program program = cascade::parse(text.text, text.name);
    if (!has_rank(program, rank)) continue;
    const PassReport report = cascade::count_passes(program, rank);
    if (!arguments.json) print_report(text.name, rank, report);
    Json json = report_json(report);
    json["cascade"] = text.name;
    cascades.push_back(std::move(json));
  }
  if (cascades.empty() && !arguments.rank.empty()) {
    throw Error("--rank: no cascade of " + mechanism.name + " has a rank '" + rank + "'");
  }
  if (arguments.json)
    print_json({{"name", mechanism.name}, {"rank", rank}, {"cascades", cascades}});
}

struct Counted {
  std::string cascade, when;
  std::optional<int> passes;  // none where the cascade lacks the rank
};

std::string shown(const std::optional<int>& passes) {
  return passes ? std::to_string(*passes) : "-";
}

std::vector<Counted> counted(const Mechanism& mechanism) {
  std::vector<Counted> list;
  for (const CascadeText& text : mechanism.cascades) {
    const Program program = cascade::parse(text.text, text.name);
    const bool further = defines_further_options(mechanism, text);
    Counted& row = list.emplace_back(
        Counted{text.name, further ? "further options" : text.when, std::nullopt});
    if (has_rank(program, mechanism.pass_rank)) {
      row.passes = cascade::count_passes(program, mechanism.pass_rank).passes;
    }
  }
  return list;
}

// The cascades of the same calls: the definition, then the forms it is computed in.
std::vector<std::vector<Counted>> by_call(const std::vector<Counted>& cascades) {
  std::vector<std::vector<Counted>> groups;
  for (const Counted& cascade : cascades) {
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return group[0].when == cascade.when;
    });
    (same == groups.end() ? groups.emplace_back() : *same).push_back(cascade);
  }
  return groups;
}

// Every mechanism, its definition beside the forms it is computed in.
void all_mechanisms(const Arguments& arguments) {
  if (!arguments.rank.empty()) {
    throw Error("--rank: a cascade file or a mechanism is needed with it");
  }
  Json list = Json::array();
  constexpr auto kRight = Table::Align::right;
  Table table({{"mechanism"},
               {"rank"},
               {"calls"},
               {"definition"},
               {"passes", kRight},
               {"computed as"},
               {"passes", kRight}});
  for (const Mechanism& mechanism : mechanisms()) {
    const std::vector<Counted> cascades = counted(mechanism);
    Json json = Json::array();
    for (const Counted& c : cascades) {
      json.push_back({{"cascade", c.cascade},
                      {"when", c.when},
                      {"passes", c.passes ? Json(*c.passes) : Json(nullptr)}});
    }
    list.push_back({{"name", mechanism.name}, {"rank", mechanism.pass_rank}, {"cascades", json}});
    bool first = true;
    for (const std::vector<Counted>& group : by_call(cascades)) {
      for (size_t i = std::min<size_t>(1, group.size() - 1); i < group.size(); ++i) {
        const bool opens = i <= 1;
        const bool fast = i > 0;
        table.add({first ? mechanism.name : "", first ? mechanism.pass_rank : "",
                   opens ? (group[0].when.empty() ? "all" : group[0].when) : "",
                   opens ? group[0].cascade : "", opens ? shown(group[0].passes) : "",
                   fast ? group[i].cascade : "", fast ? shown(group[i].passes) : ""});
        first = false;
      }
    }
  }
  if (arguments.json) return print_json(list);
  table.print();
  fmt::print("\n-: a cascade that is written without the rank.\n");
}

void passes(const Arguments& arguments) {
  if (arguments.what.empty()) return all_mechanisms(arguments);
  if (!is_cascade_file(arguments.what))
    return one_mechanism(mechanism_instead_of_file(arguments.what), arguments);
  one_program(cascade::parse(read_description("passes", arguments.what), arguments.what),
              arguments);
}

}  // namespace

void add_hardware_passes(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "passes", "How often a cascade must go over a rank: a file, a mechanism, or all of them");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("FILE", arguments->what, "Cascade file, or the name of a mechanism");
  command->add_option("--rank", arguments->rank,
                      "The rank; without it m, or what the mechanism's record says");
  command->add_flag("--json", arguments->json, "JSON");
  command->callback([arguments] { passes(*arguments); });
}

}  // namespace heed::cli
