// heed show NAME: a mechanism's cascades, passes, counts, papers and card.
#include <fmt/format.h>

#include <memory>

#include "cascade/ast.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"
#include "mechanisms/registry.h"

namespace heed::cli {
namespace {

using cascade::Polynomial;
using cascade::Program;
using cascade::StatementCount;

struct Arguments {
  std::string name, sizes;
  bool json = false, latex = false, html = false;
};

using Sizes = std::map<std::string, int64_t>;

struct CountColumn {
  const char* name;
  Polynomial StatementCount::* counted;
};
constexpr CountColumn kCountColumns[] = {
    {"multiply-adds", &StatementCount::multiply_adds},
    {"exponentials", &StatementCount::exponentials},
    {"divisions", &StatementCount::divisions},
    {"maxima", &StatementCount::maxima},
    {"other", &StatementCount::other},
    {"reads", &StatementCount::reads},
    {"writes", &StatementCount::writes},
    {"live after", &StatementCount::live_after},
};

std::string cell(const Polynomial& polynomial, const std::optional<Sizes>& sizes) {
  if (polynomial.terms.empty()) return "0";
  return sizes ? fmt::format("{:.0f}", polynomial.at(*sizes)) : polynomial.text();
}

// Keys of a tile where no number of tiles is given: the longest of the engine.
constexpr int64_t kTileKeys = 512;

// Splits into tiles of any length, by the rank that counts the tiles: the rank that is cut.
std::map<std::string, std::string> tiled_ranks(const Mechanism& m) {
  std::map<std::string, std::string> tiled;
  for (const CascadeText& text : m.cascades) {
    const Program program = cascade::parse(text.text, text.name);
    for (const auto& split : program.ast().splits) {
      if (split.block == "M0") tiled.emplace(split.outer, split.parent);
    }
  }
  return tiled;
}

// The sizes of all ranks that the counts of the mechanism's cascades have.
std::optional<Sizes> parse_sizes(const std::string& text, const Mechanism& m) {
  if (text.empty()) return std::nullopt;
  const Spec given = reading("--sizes", [&] { return Spec::parse_options(text); });
  Sizes sizes;
  std::vector<std::string> needed;
  for (const CascadeText& cascade : m.cascades) {
    for (const StatementCount& row : cascade::count(cascade::parse(cascade.text, cascade.name))) {
      for (const CountColumn& column : kCountColumns) {
        for (const auto& [ranks, factor] : (row.*column.counted).terms) {
          for (const std::string& rank : ranks) {
            if (sizes.emplace(rank, 0).second) needed.push_back(rank);
          }
        }
      }
    }
  }
  for (const std::string& key : given.keys()) {
    if (sizes.count(key) == 0) {
      throw Error("--sizes: found '" + key + "', which no count of " + m.name + " has; needed " +
                  joined(needed));
    }
  }
  const auto tiled = tiled_ranks(m);
  for (const auto& [outer, parent] : tiled) std::erase(needed, outer);
  const auto size_of = [&](const std::string& rank) {
    return reading("--sizes", [&] { return given.integer(rank); });
  };
  for (auto& [rank, size] : sizes) {
    auto value = size_of(rank);
    if (const auto split = tiled.find(rank); !value && split != tiled.end()) {
      value = 1 + (size_of(split->second).value_or(1) - 1) / kTileKeys;
    }
    if (!value || *value < 1) {
      throw Error("--sizes: no positive size of rank '" + rank + "'; needed " + joined(needed));
    }
    size = *value;
  }
  return sizes;
}

void print_counts(const Program& program, const std::optional<Sizes>& sizes) {
  const auto rows = cascade::count(program);
  std::vector<Table::Column> columns = {{"tensor"}};
  for (const CountColumn& column : kCountColumns)
    columns.push_back({column.name, Table::Align::right});
  Table table(columns);
  for (const StatementCount& row : rows) {
    std::vector<std::string> cells = {row.tensor};
    for (const CountColumn& column : kCountColumns) {
      cells.push_back(cell(row.*column.counted, sizes));
    }
    table.add(std::move(cells));
  }
  table.print(2);
}

void print_passes(const cascade::PassReport& report, const std::string& rank) {
  Table table({{"line", Table::Align::right}, {"tensor"}, {"pass", Table::Align::right}});
  for (const auto& row : report.rows) {
    table.add(
        {std::to_string(row.line), row.tensor, row.pass == 0 ? "-" : std::to_string(row.pass)});
  }
  fmt::print("{}\n", bold(fmt::format("Passes over {}: {}", rank, report.passes)));
  table.print(2);
}

void print_text(const Mechanism& m, const std::optional<Sizes>& sizes) {
  fmt::print("{}\n{}\n", bold(m.name), m.title);
  for (const std::string& paper : m.arxiv)
    fmt::print("arXiv {0}  https://arxiv.org/abs/{0}\n", paper);
  fmt::print("engine {}, {}\n", m.engine, m.backward ? "differentiable" : "forward only");
  for (const CascadeText& text : m.cascades) {
    const Program program = cascade::parse(text.text, text.name);
    const std::string when = text.when.empty() ? "" : " (" + text.when + ")";
    fmt::print("\n{}\n{}", bold("Cascade " + text.name + when), text.text);
    if (!text.text.ends_with('\n')) fmt::print("\n");
    fmt::print("\n");
    if (const auto report = passes_of(m, text)) print_passes(*report, m.pass_rank);
    fmt::print("\n{}\n", bold("Counts"));
    print_counts(program, sizes);
  }
  fmt::print("\n{}", m.card);
  if (!m.card.ends_with('\n')) fmt::print("\n");
}

Json cascade_json(const CascadeText& text, const Mechanism& m, const std::optional<Sizes>& sizes) {
  const Program program = cascade::parse(text.text, text.name);
  Json passes = nullptr, statements = Json::array(), counts = Json::array();
  if (const auto report = passes_of(m, text)) {
    passes = report->passes;
    for (const auto& row : report->rows) {
      statements.push_back({{"tensor", row.tensor}, {"pass", row.pass}, {"line", row.line}});
    }
  }
  const auto rows = cascade::count(program);
  for (const StatementCount& row : rows) {
    Json entry = {{"tensor", row.tensor}, {"line", row.line}};
    for (const CountColumn& column : kCountColumns) {
      const Polynomial& counted = row.*column.counted;
      entry[column.name] = sizes ? Json(counted.at(*sizes)) : Json(cell(counted, sizes));
    }
    counts.push_back(std::move(entry));
  }
  return {{"name", text.name}, {"when", text.when},        {"text", text.text},
          {"passes", passes},  {"statements", statements}, {"counts", counts}};
}

void print_show_json(const Mechanism& m, const std::optional<Sizes>& sizes) {
  Json cascades = Json::array();
  for (const CascadeText& text : m.cascades) {
    cascades.push_back(cascade_json(text, m, sizes));
  }
  print_json({{"name", m.name},
              {"title", m.title},
              {"sheet", m.sheets},
              {"arxiv", m.arxiv},
              {"engine", m.engine},
              {"differentiable", static_cast<bool>(m.backward)},
              {"pass_rank", m.pass_rank},
              {"cascades", cascades},
              {"card", m.card}});
}

void show(const Arguments& arguments) {
  const Mechanism& m = find_mechanism(arguments.name);
  const std::optional<Sizes> sizes = parse_sizes(arguments.sizes, m);
  if (arguments.json) return print_show_json(m, sizes);
  if (!arguments.latex && !arguments.html) return print_text(m, sizes);
  for (const CascadeText& text : m.cascades) {
    const Program program = cascade::parse(text.text, text.name);
    fmt::print("{}\n", arguments.latex ? cascade::to_latex(program) : cascade::to_html(program));
  }
}

}  // namespace

void add_show(CLI::App& app, Outcome&) {
  CLI::App* command =
      app.add_subcommand("show", "A mechanism's cascades, passes, counts, papers and card");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("NAME", arguments->name, "Mechanism, with or without _attention")->required();
  command->add_option("--sizes", arguments->sizes,
                      "Counts as numbers for these rank sizes: b=1,h=8,p=512,m=512,e=64,f=64 for "
                      "flash; an error names a mechanism's ranks; without m1 tiles have 512 keys");
  CLI::Option* json = command->add_flag("--json", arguments->json, "JSON");
  CLI::Option* latex =
      command->add_flag("--latex", arguments->latex, "Only the cascades, as LaTeX");
  CLI::Option* html = command->add_flag("--html", arguments->html, "Only the cascades, as HTML");
  json->excludes(latex)->excludes(html);
  latex->excludes(html);
  command->callback([arguments] { show(*arguments); });
}

}  // namespace heed::cli
