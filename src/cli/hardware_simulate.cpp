// heed hardware simulate, heed hardware touches: schedules and passes shown by running them.
#include <fmt/format.h>

#include <memory>
#include <random>

#include "cascade/ast.h"
#include "cascade/lowered.h"
#include "cli/arguments.h"
#include "cli/hardware.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "hardware/column.h"
#include "hardware/machine.h"
#include "hardware/streaming.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

using namespace hardware;  // NOLINT: these commands show that room

std::vector<double> normal(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = distribution(random);
  return values;
}

// --- the column ------------------------------------------------------------------------------------

struct SimulateArguments {
  std::string elements = "8,16,32";
  int64_t head_dim = 64, query_tiles = 4, key_tiles = 40;
  std::optional<int64_t> value_dim, lead, lag;
  bool json = false;
};

struct Simulated {
  ColumnCase column;
  ColumnRun run;
};

Simulated simulate_one(ColumnCase column, const SimulateArguments& a) {
  constexpr int64_t kMostInputs = int64_t{1} << 26;
  const int64_t width = std::max(column.head_dim, column.value_dim);
  const int64_t queries = std::min<int64_t>(column.query_tiles, 1 << 16);
  // Divisions: products of the numbers given may not fit.
  if (column.elements > 0 && width > 0 && column.key_tiles > 0 && queries > 0 &&
      (width > kMostInputs / column.key_tiles / column.elements || width > kMostInputs / queries)) {
    throw Error("simulate: more than 2^26 inputs; smaller sizes are needed");
  }
  const auto some = [](int64_t a_count, int64_t b_count, uint32_t seed) {
    return normal(std::max<int64_t>(a_count, 0) * std::max<int64_t>(b_count, 0), seed);
  };
  const auto q = some(queries, column.head_dim, 1);
  const auto k = some(column.key_tiles * column.elements, column.head_dim, 2);
  const auto v = some(column.key_tiles * column.elements, column.value_dim, 3);
  if (column.schedule == Schedule::interleaved && !a.lead && !a.lag) {
    column = with_best_lead(column, q, k, v);
  }
  return {column, run_column(column, q, k, v)};
}

double expected_util_2d(const Simulated& s) {
  const auto work = static_cast<double>(s.column.head_dim + s.column.value_dim + 9);
  return work / s.run.expected_interval;
}

void print_simulated(const std::vector<Simulated>& rows) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"N", kRight},
               {"schedule"},
               {"lead", kRight},
               {"lag", kRight},
               {"cycles/tile", kRight},
               {"closed form", kRight},
               {"2D", kRight},
               {"closed form", kRight},
               {"1D", kRight},
               {"scores held", kRight},
               {"link", kRight},
               {"exit", kRight}});
  for (const Simulated& s : rows) {
    const bool one = s.column.schedule == Schedule::one_tile;
    table.add(
        {std::to_string(s.column.elements), one ? "one tile (+Arch)" : "interleaved (+Binding)",
         one ? "-" : std::to_string(s.column.lead), one ? "-" : std::to_string(s.column.lag),
         fmt::format("{:.2f}", s.run.interval), fmt::format("{:.0f}", s.run.expected_interval),
         fmt::format("{:.4f}", s.run.util_2d), fmt::format("{:.4f}", expected_util_2d(s)),
         fmt::format("{:.4f}", s.run.util_1d), std::to_string(s.run.scores_held),
         std::to_string(s.run.link_depth), std::to_string(s.run.exit_depth)});
  }
  table.print();
  fmt::print(
      "\nlead: tiles whose scores the matrix array makes ahead; lag: tiles that RD and RNV stay\n"
      "behind; the smallest that reach the closed form. scores held: registers of an element for\n"
      "scores; link, exit: values waiting between two elements, and below the column.\n");
}

void simulate(const SimulateArguments& a) {
  std::vector<Simulated> rows;
  for (int64_t n : parse_numbers("--elements", a.elements)) {
    for (Schedule schedule : {Schedule::one_tile, Schedule::interleaved}) {
      ColumnCase column{n,
                        a.head_dim,
                        a.value_dim.value_or(a.head_dim),
                        a.query_tiles,
                        a.key_tiles,
                        schedule,
                        a.lead.value_or(1),
                        a.lag.value_or(0)};
      if (schedule == Schedule::one_tile) column.lag = 0;
      rows.push_back(simulate_one(column, a));
    }
  }
  if (!a.json) return print_simulated(rows);
  Json list = Json::array();
  for (const Simulated& s : rows) {
    list.push_back(
        {{"elements", s.column.elements},
         {"head_dim", s.column.head_dim},
         {"value_dim", s.column.value_dim},
         {"schedule", s.column.schedule == Schedule::one_tile ? "one_tile" : "interleaved"},
         {"lead", s.column.lead},
         {"lag", s.column.lag},
         {"cycles", s.run.cycles},
         {"interval", s.run.interval},
         {"expected_interval", s.run.expected_interval},
         {"util_2d", s.run.util_2d},
         {"expected_util_2d", expected_util_2d(s)},
         {"util_1d", s.run.util_1d},
         {"scores_held", s.run.scores_held},
         {"products_held", s.run.products_held},
         {"link_depth", s.run.link_depth},
         {"exit_depth", s.run.exit_depth}});
  }
  print_json(list);
}

// --- the instrumented memory -----------------------------------------------------------------------

struct TouchArguments {
  std::string what, rank, sizes;
  bool json = false;
};

struct Streamed {
  std::string cascade, sizes;
  int counted = 0;
  StreamedRun run;
};

// Random inputs of these sizes; index functions are the identity.
cascade::Bindings random_bindings(const cascade::Program& program, const Sizes& sizes) {
  cascade::Bindings bindings;
  for (const auto& [name, size] : sizes) bindings.sizes[name] = size;
  const auto bound = cascade::sizes(program, bindings);
  const cascade::Lowered& lowered = *program.ast().lowered;
  uint32_t seed = 1;
  for (const cascade::TensorInfo& info : lowered.tensors) {
    if (!info.input) continue;
    if (info.scalar) {
      if (!info.has_default) bindings.scalars[info.name] = 1;
      continue;
    }
    cascade::NdArray array;
    int64_t count = 1;
    for (const cascade::Axis& axis : info.axes) {
      if (axis.rank < 0) {
        throw Error("touches: input " + info.name +
                    " has an axis that only a function reads; a "
                    "cascade with plain axes is needed");
      }
      array.shape.push_back(bound.at(lowered.rank(axis.rank).name));
      constexpr int64_t kMost = int64_t{1} << 26;
      if (array.shape.back() > kMost / std::max<int64_t>(count, 1)) {
        throw Error("touches: input " + info.name + " has more than 2^26 elements");
      }
      count *= array.shape.back();
    }
    array.values = normal(count, seed++);
    bindings.tensors[info.name] = std::move(array);
  }
  for (const cascade::Callable& function : lowered.functions) {
    bindings.indices[function.name] = [](std::span<const int64_t> i) { return i[0]; };
  }
  return bindings;
}

Streamed stream(const cascade::Program& program, const std::string& rank, const Sizes& sizes,
                const std::string& shown) {
  const cascade::Bindings bindings = random_bindings(program, sizes);
  return {program.name(), shown, cascade::count_passes(program, rank).passes,
          run_streamed(program, rank, bindings)};
}

std::vector<Streamed> streamed_rows(const TouchArguments& a) {
  if (!a.what.empty()) {
    const std::string rank = a.rank.empty() ? "m" : a.rank;
    const auto program = cascade::parse(read_description("touches", a.what), a.what);
    const Sizes given = parse_sizes(a.sizes);
    const std::vector<std::string> ranks = sized_ranks(program);
    require_known_ranks(given, ranks);
    require_sizes(given, ranks);
    return {stream(program, rank, given, a.sizes)};
  }
  if (!a.rank.empty()) throw Error("--rank: a cascade file is needed with it");
  Sizes sizes = {{"b", 1}, {"h", 1}, {"p", 4}, {"m", 256}, {"e", 32}, {"f", 32}};
  const Sizes given = parse_sizes(a.sizes);
  require_known_ranks(given, {"b", "h", "p", "m", "e", "f", "M0"});
  for (const auto& [name, size] : given) sizes[name] = size;
  std::vector<Streamed> rows;
  for (const char* name : {"three_pass", "two_pass", "one_pass"}) {
    const std::string file = std::string("cascades/") + name + ".cascade";
    const auto program = cascade::parse(data_file(file), file);
    const bool tiled = !program.ast().splits.empty();
    const bool chosen = sizes.contains("M0");
    for (int64_t tile : {int64_t{16}, int64_t{64}, sizes.at("m")}) {
      Sizes with_tile = sizes;
      if (!chosen) with_tile["M0"] = tile;
      const std::string shown = tiled ? fmt::format("M={} M0={}", sizes.at("m"), with_tile.at("M0"))
                                      : fmt::format("M={}", sizes.at("m"));
      if (!tiled) with_tile.erase("M0");
      rows.push_back(stream(program, "m", with_tile, shown));
      if (!tiled || chosen) break;
    }
  }
  return rows;
}

const TensorTouches* scores_of(const StreamedRun& run) {
  const TensorTouches* most = nullptr;
  for (const TensorTouches& t : run.tensors) {
    if (!t.input && (most == nullptr || t.reads + t.writes > most->reads + most->writes)) most = &t;
  }
  return most;
}

void print_streamed(const std::vector<Streamed>& rows) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"cascade"},
               {"sizes"},
               {"passes counted", kRight},
               {"measured", kRight},
               {"peak live words", kRight},
               {"divisions", kRight},
               {"exponentials", kRight},
               {"input reads", kRight},
               {"most touched"},
               {"touches", kRight}});
  for (const Streamed& row : rows) {
    int64_t reads = 0;
    for (const TensorTouches& t : row.run.tensors) reads += t.input ? t.reads : 0;
    const TensorTouches* most = scores_of(row.run);
    const auto done = [&](Operation operation) {
      return fmt::format("{:.0f}", row.run.operations[static_cast<size_t>(operation)]);
    };
    table.add({row.cascade, row.sizes, std::to_string(row.counted), std::to_string(row.run.passes),
               std::to_string(row.run.peak_live_words), done(Operation::division),
               done(Operation::exponential), std::to_string(reads), most ? most->tensor : "-",
               most ? std::to_string(most->reads + most->writes) : "-"});
  }
  table.print();
}

void touches(const TouchArguments& a) {
  const std::vector<Streamed> rows = streamed_rows(a);
  if (!a.json) return print_streamed(rows);
  Json list = Json::array();
  for (const Streamed& row : rows) {
    Json tensors = Json::array(), operations = Json::object();
    for (const TensorTouches& t : row.run.tensors) {
      tensors.push_back({{"tensor", t.tensor},
                         {"input", t.input},
                         {"elements", t.elements},
                         {"reads", t.reads},
                         {"writes", t.writes}});
    }
    for (int i = 0; i < kOperations; ++i) {
      operations[name_of(static_cast<Operation>(i))] = row.run.operations[static_cast<size_t>(i)];
    }
    list.push_back({{"cascade", row.cascade},
                    {"sizes", row.sizes},
                    {"passes_counted", row.counted},
                    {"passes_measured", row.run.passes},
                    {"peak_live_words", row.run.peak_live_words},
                    {"operations", operations},
                    {"tensors", tensors}});
  }
  print_json(list);
}

}  // namespace

void add_hardware_simulate(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "simulate", "One column of the FuseMax machine, cycle by cycle, under both schedules");
  auto a = std::make_shared<SimulateArguments>();
  command->add_option("--elements", a->elements, "Rows of the array, several with commas")
      ->capture_default_str();
  command->add_option("--head-dim", a->head_dim, "Elements of a query")
      ->transform(whole_number(1))
      ->capture_default_str();
  command->add_option("--value-dim", a->value_dim, "Elements of a value; as the query without it")
      ->transform(whole_number(1));
  command->add_option("--query-tiles", a->query_tiles, "Query tiles that take turns")
      ->transform(whole_number(1))
      ->capture_default_str();
  command->add_option("--key-tiles", a->key_tiles, "Key tiles")
      ->transform(whole_number(1))
      ->capture_default_str();
  command->add_option("--lead", a->lead, "Tiles of scores ahead; the best one without it")
      ->transform(whole_number(0));
  command->add_option("--lag", a->lag, "Tiles that RD and RNV stay behind")
      ->transform(whole_number(0));
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { simulate(*a); });
}

void add_hardware_touches(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "touches", "Cascades streamed through an instrumented memory: passes, live words, touches");
  auto a = std::make_shared<TouchArguments>();
  command->add_option("FILE", a->what,
                      "Cascade file; without it the three softmax cascades of FuseMax");
  command->add_option("--rank", a->rank, "Of a file: the rank that is streamed; m without it");
  command->add_option("--sizes", a->sizes, "Rank sizes: p=4,m=256,e=32,f=32,M0=16");
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { touches(*a); });
}

}  // namespace heed::cli
