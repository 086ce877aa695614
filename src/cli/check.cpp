// heed check: every kernel against its cascade, on this machine.
#include "mechanisms/check.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::cli {
namespace {

struct Arguments {
  std::string name, example, isa;
  std::vector<std::string> dtypes, layouts;
  uint64_t seed = 1;
  std::optional<int> threads;
  bool json = false, all = false;
};

using Point = std::pair<const Mechanism*, ExampleCase>;

// Among all mechanisms, those without the case are left out.
std::vector<Point> chosen_points(const Arguments& arguments) {
  const std::string& name = arguments.example;
  const bool drawn = name.starts_with("random:");  // every mechanism draws such cases
  std::vector<Point> points;
  std::vector<std::string> known;
  for (const Mechanism* mechanism : chosen_mechanisms(arguments.name)) {
    if (drawn || (!name.empty() && !arguments.name.empty())) {
      points.emplace_back(mechanism, find_case(*mechanism, name));
      continue;
    }
    for (const ExampleCase& example : mechanism->cases) {
      if (name.empty() || example.name == name) points.emplace_back(mechanism, example);
      known.push_back(example.name);
    }
  }
  if (points.empty()) {
    throw Error("--case: no mechanism has a case '" + name + "'" + did_you_mean(name, known));
  }
  return points;
}

std::vector<DType> chosen_dtypes(const std::vector<std::string>& names) {
  if (names.empty()) return {DType::f64, DType::f32, DType::bf16, DType::f16};
  std::vector<DType> dtypes;
  dtypes.reserve(names.size());
  for (const std::string& name : names) dtypes.push_back(parse_dtype(name));
  return dtypes;
}

std::vector<Layout> chosen_layouts(const std::vector<std::string>& names) {
  if (names.empty()) return {std::begin(kLayouts), std::end(kLayouts)};
  std::vector<Layout> layouts;
  layouts.reserve(names.size());
  for (const std::string& name : names) {
    layouts.push_back(reading("--layout", [&] { return parse_layout(name); }));
  }
  return layouts;
}

// False where the mechanism says that this instruction set has no path of its own for the call.
bool has_path(const Reference& reference, Isa isa) {
  RunOptions run;
  run.isa = isa;
  const auto answers = reference.mechanism->explain(
      views(reference.inputs), Spec::parse_options(reference.example->options), run);
  for (const PathAnswer& answer : answers) {
    if (answer.path == name_of(isa)) return answer.can_run;
  }
  return true;
}

void append(std::vector<CheckRow>& rows, std::vector<CheckRow> more) {
  for (CheckRow& row : more) rows.push_back(std::move(row));
}

std::vector<CheckRow> all_rows(const Arguments& arguments) {
  const auto dtypes = chosen_dtypes(arguments.dtypes);
  const auto layouts = chosen_layouts(arguments.layouts);
  const auto isas = isas_to_use(arguments.isa);
  const std::vector<Point> points = chosen_points(arguments);
  Progress progress("checking");
  int64_t done = 0;
  const bool told = arguments.name.empty() && !arguments.json && !draws_on(stderr);
  std::vector<CheckRow> rows;
  for (const auto& [mechanism, example] : points) {
    if (told && !rows.empty() && rows.back().mechanism != mechanism->name) {
      say("heed: checked {}\n", rows.back().mechanism);
    }
    append(rows, check_cascades(*mechanism, example, arguments.seed));
    for (DType dtype : dtypes) {
      progress.show(done++, static_cast<int64_t>(points.size() * dtypes.size()),
                    mechanism->name + " " + example.name + " " + name_of(dtype));
      const Reference reference = make_reference(*mechanism, example, dtype, arguments.seed);
      for (Isa isa : isas) {
        if (!has_path(reference, isa)) continue;
        for (Layout layout : layouts) append(rows, check_kernel(reference, isa, layout));
      }
    }
  }
  return rows;
}

// The worst of the layouts and results of each case, type and instruction set.
std::vector<CheckRow> summarised(const std::vector<CheckRow>& rows) {
  std::vector<CheckRow> worst;
  std::map<std::vector<std::string>, size_t> place;
  for (const CheckRow& row : rows) {
    const auto [at, fresh] =
        place.try_emplace({row.mechanism, row.example, row.type, row.path}, worst.size());
    if (fresh) {
      worst.push_back(row);
      continue;
    }
    CheckRow& kept = worst[at->second];
    if (kept.ok() && (!row.ok() || row.difference.ratio > kept.difference.ratio)) kept = row;
  }
  return worst;
}

void print_table(const std::vector<CheckRow>& rows) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"mechanism"},
               {"case"},
               {"type"},
               {"path"},
               {"result"},
               {"layout"},
               {"error", kRight},
               {"bound", kRight},
               {"err/bound", kRight},
               {""}});
  for (const CheckRow& row : rows) {
    table.add({row.mechanism, row.example, row.type, row.path, row.result, row.layout,
               short_number(row.difference.error), short_number(row.difference.bound),
               fmt::format("{:.3f}", row.difference.ratio), row.ok() ? "ok" : "WRONG"});
  }
  table.print();
}

void print_check_json(const std::vector<CheckRow>& rows) {
  Json list = Json::array();
  for (const CheckRow& row : rows) {
    list.push_back({{"mechanism", row.mechanism},
                    {"case", row.example},
                    {"type", row.type},
                    {"path", row.path},
                    {"layout", row.layout},
                    {"result", row.result},
                    {"error", finite_or_null(row.difference.error)},
                    {"bound", finite_or_null(row.difference.bound)},
                    {"ratio", finite_or_null(row.difference.ratio)},
                    {"ok", row.ok()},
                    {"failure", row.failure},
                    {"where", row.difference.where},
                    {"replay", row.replay}});
  }
  print_json(list);
}

int check(const Arguments& arguments) {
  use_threads(arguments.threads);
  const auto rows = all_rows(arguments);
  if (arguments.json) {
    print_check_json(rows);
  } else {
    print_table(arguments.all ? rows : summarised(rows));
  }
  flush_output();
  size_t wrong = 0;
  for (const CheckRow& row : rows) {
    if (row.ok()) continue;
    ++wrong;
    say("heed: {} {} {} {}: {}\n  {}\n", row.mechanism, row.example, row.path, row.result,
        row.failure.empty() ? row.difference.where : row.failure, row.replay);
  }
  if (!arguments.json) {
    fmt::print("{}\n", wrong == 0
                           ? green(fmt::format("all {} comparisons within the bound", rows.size()))
                           : red(fmt::format("{} of {} comparisons wrong", wrong, rows.size())));
  }
  return wrong == 0 ? kOk : kFailureFound;
}

}  // namespace

void add_check(CLI::App& app, Outcome& outcome) {
  CLI::App* command = app.add_subcommand(
      "check", "Compare the kernels with their cascades in float64 on this machine");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("NAME", arguments->name,
                      "Mechanism: takes seconds; without it all of them, which takes minutes");
  command->add_option("--case", arguments->example,
                      "Only this example case, or random:SEED for a random call");
  command->add_option("--dtype", arguments->dtypes, "Only these types: f64, f32, bf16, f16")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("TYPE[,TYPE...]");
  command->add_option("--isa", arguments->isa, "Only this path: portable, avx2, avx512, amx");
  command
      ->add_option("--layout", arguments->layouts, "Only these: contiguous, tokens_first, padded")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("LAYOUT[,LAYOUT...]");
  command->add_option("--seed", arguments->seed, "Seed of the inputs")
      ->transform(whole_number(0, std::numeric_limits<uint64_t>::max()))
      ->capture_default_str();
  add_threads(*command, arguments->threads, "Threads of a call");
  command->add_flag("--all", arguments->all,
                    "Every result and layout instead of the worst of them");
  command->add_flag("--json", arguments->json, "JSON, every result and layout");
  command->callback([arguments, &outcome] { outcome.exit_code = check(*arguments); });
}

}  // namespace heed::cli
