// heed hardware tiles: how many key tiles a neighborhood visits and what that bounds.
#include <fmt/format.h>

#include <memory>

#include "cli/arguments.h"
#include "cli/hardware.h"
#include "cli/terminal.h"
#include "hardware/tiles.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

using hardware::EndToEnd;
using hardware::TilePlanCase;
using hardware::TileStatistic;

struct Arguments {
  std::string grid, kernel, stride = "1", dilation = "1", causal = "0", query_tile, key_tile;
  std::string tiling = "static";
  std::optional<double> share;
  int64_t steps = 1, dense_steps = 0;
  bool search = false, paper = false, json = false;
};

TilePlanCase plan_of(const Arguments& a) {
  for (const auto& [option, text] : {std::pair<const char*, const std::string&>("--grid", a.grid),
                                     {"--kernel", a.kernel},
                                     {"--q-tile", a.query_tile},
                                     {"--kv-tile", a.key_tile}}) {
    if (text.empty()) throw Error(std::string("tiles: ") + option + " is needed (or --paper)");
  }
  TilePlanCase plan;
  plan.tiling = hardware::parse_tiling(a.tiling);
  const std::vector<int64_t> grid = parse_numbers("--grid", a.grid);
  const auto kernel = per_axis("--kernel", parse_numbers("--kernel", a.kernel), grid.size());
  const auto stride = per_axis("--stride", parse_numbers("--stride", a.stride), grid.size());
  const auto dilation =
      per_axis("--dilation", parse_numbers("--dilation", a.dilation), grid.size());
  const auto causal = per_axis("--causal", parse_numbers("--causal", a.causal), grid.size());
  for (size_t i = 0; i < grid.size(); ++i) {
    if (causal[i] != 0 && causal[i] != 1) {
      throw Error(fmt::format("--causal: found {}, 0 or 1 is needed", causal[i]));
    }
    plan.axes.push_back({grid[i], kernel[i], stride[i], dilation[i], causal[i] == 1});
  }
  plan.query_tile = parse_numbers("--q-tile", a.query_tile);
  plan.key_tile = parse_numbers("--kv-tile", a.key_tile);
  return plan;
}

std::optional<EndToEnd> program_of(const Arguments& a) {
  if (!a.share) {
    if (a.steps != 1 || a.dense_steps != 0) {
      throw Error("--steps, --dense-steps: --e2e-share is needed with them");
    }
    return std::nullopt;
  }
  const EndToEnd program{*a.share, a.steps, a.dense_steps};
  hardware::check(program);
  return program;
}

Json statistic_json(const TileStatistic& s, const std::optional<EndToEnd>& program) {
  Json json = {{"visited_max", s.visited_max},
               {"visited_mean", s.visited_mean},
               {"dense", s.dense},
               {"analytical_speedup", s.analytical_speedup},
               {"flop_speedup", s.flop_speedup},
               {"block_sparse", s.block_sparse}};
  if (program) {
    json["e2e_flop"] = hardware::end_to_end(s.flop_speedup, *program);
    json["e2e_sim"] = hardware::end_to_end(s.analytical_speedup, *program);
  }
  return json;
}

std::string joined_numbers(const std::vector<int64_t>& numbers) {
  return fmt::format("{}", fmt::join(numbers, "x"));
}

void print_statistic(const TileStatistic& s, const std::optional<EndToEnd>& program) {
  const double mean = static_cast<double>(s.dense) / s.visited_mean;
  fmt::print(
      "key tiles         {} of the grid; a query tile visits {} at most, {:.2f} on average\n",
      s.dense, s.visited_max, s.visited_mean);
  fmt::print("speed-up          {:.2f}x by the slowest tile, {:.2f}x by the mean\n",
             s.analytical_speedup, mean);
  fmt::print("bound             {:.2f}x by operations\n", s.flop_speedup);
  fmt::print("element masks     {}\n", s.block_sparse ? "not needed: every visited tile is whole"
                                                      : "needed at the borders of windows");
  if (!program) return;
  fmt::print("end to end        {:.2f}x by tiles, {:.2f}x by operations\n",
             hardware::end_to_end(s.analytical_speedup, *program),
             hardware::end_to_end(s.flop_speedup, *program));
}

void search(const TilePlanCase& plan, const std::optional<EndToEnd>& program, bool json) {
  constexpr auto kRight = Table::Align::right;
  std::vector<Table::Column> columns = {
      {"stride"}, {"visited", kRight}, {"mean", kRight}, {"speed-up", kRight}, {"masks"}};
  if (program) columns.push_back({"end to end", kRight});
  Table table(columns);
  Json list = Json::array();
  for (const hardware::StrideRow& row : hardware::search_strides(plan)) {
    Json entry = statistic_json(row.statistic, program);
    entry["stride"] = row.stride;
    list.push_back(std::move(entry));
    std::vector<std::string> cells = {joined_numbers(row.stride),
                                      std::to_string(row.statistic.visited_max),
                                      fmt::format("{:.2f}", row.statistic.visited_mean),
                                      fmt::format("{:.2f}x", row.statistic.analytical_speedup),
                                      row.statistic.block_sparse ? "none" : "borders"};
    if (program) {
      cells.push_back(
          fmt::format("{:.2f}x", hardware::end_to_end(row.statistic.analytical_speedup, *program)));
    }
    table.add(std::move(cells));
  }
  if (json) return print_json(list);
  table.print();
}

void paper(bool json) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"model"},
               {"grid"},
               {"kernel"},
               {"stride"},
               {"visited", kRight},
               {"of", kRight},
               {"tiles", kRight},
               {"operations", kRight},
               {"end to end", kRight},
               {"with dense steps", kRight},
               {"masks"}});
  Json list = Json::array();
  std::string last;
  for (const hardware::PaperCase& c : hardware::paper_tile_cases()) {
    const TileStatistic s = hardware::tile_statistic(c.plan);
    std::vector<int64_t> grid, kernel, stride;
    for (const auto& axis : c.plan.axes) {
      grid.push_back(axis.length);
      kernel.push_back(axis.kernel);
      stride.push_back(axis.stride);
    }
    const auto both = [&](const EndToEnd& program) {
      return fmt::format("{:.2f} / {:.2f}", hardware::end_to_end(s.flop_speedup, program),
                         hardware::end_to_end(s.analytical_speedup, program));
    };
    table.add({c.model == last ? "" : c.model, joined_numbers(grid), joined_numbers(kernel),
               joined_numbers(stride), std::to_string(s.visited_max), std::to_string(s.dense),
               fmt::format("{:.2f}x", s.analytical_speedup), fmt::format("{:.2f}x", s.flop_speedup),
               both(c.all_steps), both(c.kept_steps), s.block_sparse ? "none" : "borders"});
    last = c.model;
    Json entry = statistic_json(s, c.all_steps);
    entry["model"] = c.model;
    entry["grid"] = grid;
    entry["kernel"] = kernel;
    entry["stride"] = stride;
    entry["e2e_flop_with_dense_steps"] = hardware::end_to_end(s.flop_speedup, c.kept_steps);
    entry["e2e_sim_with_dense_steps"] = hardware::end_to_end(s.analytical_speedup, c.kept_steps);
    list.push_back(std::move(entry));
  }
  if (json) return print_json(list);
  table.print();
  fmt::print(
      "\nEnd to end: by operations / by tiles, from the shares of attention in arXiv "
      "2504.16922.\n");
}

void tiles(const Arguments& arguments) {
  if (arguments.paper) return paper(arguments.json);
  const TilePlanCase plan = plan_of(arguments);
  const std::optional<EndToEnd> program = program_of(arguments);
  if (arguments.search) return search(plan, program, arguments.json);
  const TileStatistic statistic = hardware::tile_statistic(plan);
  if (arguments.json) return print_json(statistic_json(statistic, program));
  print_statistic(statistic, program);
}

}  // namespace

void add_hardware_tiles(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "tiles", "Key tiles that neighborhood attention visits, and the speed-up that they bound");
  auto a = std::make_shared<Arguments>();
  command->add_option("--grid", a->grid, "Tokens of each axis: 30,48,80");
  command->add_option("--kernel", a->kernel, "Keys of a window on each axis");
  command->add_option("--stride", a->stride, "Queries that share a window")->capture_default_str();
  command->add_option("--dilation", a->dilation, "Step between keys")->capture_default_str();
  command->add_option("--causal", a->causal, "1 on causal axes")->capture_default_str();
  command->add_option("--q-tile", a->query_tile, "Sides of a query tile");
  command->add_option("--kv-tile", a->key_tile, "Sides of a key tile");
  command
      ->add_option("--kv-tiling", a->tiling,
                   "static, dynamic (from the first seen key), flat (runs of the row-major index; "
                   "one number for each tile)")
      ->capture_default_str();
  command->add_option("--e2e-share", a->share, "Attention's share of the whole program's time");
  command->add_option("--steps", a->steps, "Steps of the program")
      ->transform(whole_number(1))
      ->capture_default_str();
  command->add_option("--dense-steps", a->dense_steps, "Steps that keep dense attention")
      ->transform(whole_number(0))
      ->capture_default_str();
  command->add_flag("--search-stride", a->search,
                    "All strides that visit fewer tiles than every smaller one");
  const std::vector<CLI::Option*> of_a_plan =
      command->get_options([](const CLI::Option* option) { return !option->check_lname("help"); });
  CLI::Option* paper =
      command->add_flag("--paper", a->paper, "The published tables: FLUX, Cosmos, Hunyuan");
  for (CLI::Option* option : of_a_plan) paper->excludes(option);
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { tiles(*a); });
}

}  // namespace heed::cli
