// heed bench --against-plan: neighborhood attention against dense attention, beside what tile plans
// predict: that of the paper's simulator with boxes of 64 tokens, and that of the kernel's own boxes.
#include <fmt/format.h>

#include "base/parallel.h"
#include "cli/arguments.h"
#include "cli/bench.h"
#include "cli/commands.h"
#include "hardware/kernel_tiles.h"
#include "hardware/tiles.h"
#include "heed/error.h"
#include "heed/flash_attention.h"
#include "mechanisms/neighborhood/options.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::cli {
namespace {

using hardware::KernelTiles;
using hardware::TilePlanCase;
using hardware::TileStatistic;

struct PlanRow {
  BenchRow call;
  TilePlanCase plan;
  TileStatistic simulated;  // with boxes of 64 tokens on a fixed grid
  KernelTiles kernel;
  Samples dense, speedup;  // milliseconds; dense / neighborhood of neighbouring runs
};

TilePlanCase plan_of(const ExampleCase& example) {
  const Dims& query = *input_shape(example, {"query"});
  std::vector<int64_t> lengths;  // [B,*grid,H,D]
  for (int a = 1; a < query.rank() - 2; ++a) lengths.push_back(query[a]);
  TilePlanCase plan;
  plan.axes = na::axes_of(Spec::parse_options(example.options), lengths);
  plan.query_tile = plan.key_tile =
      lengths.size() == 2 ? std::vector<int64_t>{8, 8} : std::vector<int64_t>{2, 4, 8};
  return plan;
}

std::vector<PlanRow> rows_of(const BenchArguments& arguments) {
  BenchArguments a = arguments;
  if (a.names.empty()) a.names = {"na2d", "na3d"};
  std::vector<PlanRow> rows;
  for (BenchRow& call : planned_rows(a)) {
    const std::string& name = call.mechanism->name;
    if (name != "na2d" && name != "na3d") {
      throw Error("--against-plan: found " + name + ", na2d or na3d is needed");
    }
    PlanRow& row = rows.emplace_back();
    row.call = std::move(call);
    row.plan = plan_of(row.call.example);
    row.simulated = hardware::tile_statistic(row.plan);
    const Dims &query = *input_shape(row.call.example, {"query"}),
               &value = *input_shape(row.call.example, {"value"});
    row.kernel =
        hardware::kernel_tiles(row.plan.axes, query.back(), value.back(), row.call.dtype, a.run());
  }
  return rows;
}

/// The same tokens of all heads as one sequence, [B,H,L,D].
Array as_sequence(const Tensor& grid) {
  const int rank = grid.rank();
  const int64_t batch = grid.size(0), heads = grid.size(rank - 2), width = grid.size(rank - 1);
  const int64_t tokens = grid.count() / std::max<int64_t>(1, batch * heads * width);
  Array sequence(grid.dtype(), {batch, heads, tokens, width});
  const Tensor rows(grid.data(), grid.dtype(), Dims{batch, heads, tokens, width},
                    {tokens * heads * width, width, heads * width, 1});
  copy(rows, sequence);
  return sequence;
}

void time_row(PlanRow& row, const RunOptions& run, double seconds) {
  const BenchRow& call = row.call;
  const NamedArrays inputs = make_inputs(*call.mechanism, call.example, call.dtype, 1);
  const NamedTensors in = views(inputs);
  const Spec options = Spec::parse_options(call.example.options);
  const Array q = as_sequence(in.at("query")), k = as_sequence(in.at("key")),
              v = as_sequence(in.at("value"));
  const auto samples = time_calls({[&] { call.mechanism->forward(in, options, run); },
                                   [&] { flash_attention(q, k, v, FlashOptions(), run); }},
                                  2 * seconds);
  row.call.heed = samples[0];
  row.dense = samples[1];
  for (size_t i = 0; i < row.dense.size(); ++i) {
    row.speedup.push_back(row.dense[i] / row.call.heed[i]);
  }
}

double mean_speedup(const TileStatistic& s) {
  return static_cast<double>(s.dense) / s.visited_mean;
}

std::string sides(const std::vector<int64_t>& numbers) {
  return fmt::format("{}", fmt::join(numbers, "x"));
}

void print(const std::vector<PlanRow>& rows, const BenchArguments& arguments) {
  constexpr auto kRight = Table::Align::right;
  fmt::print("{}\n", bench_header(arguments));
  Table table({{"op"},
               {"mode"},
               {"type"},
               {"grid"},
               {"operations", kRight},
               {"slowest tile", kRight},
               {"mean tile", kRight},
               {"kernel's boxes"},
               {"pairs", kRight},
               {"predicted", kRight},
               {"dense ms", kRight},
               {"ms", kRight},
               {"measured", kRight},
               {"p20-p80", kRight},
               {"of predicted", kRight}});
  for (const PlanRow& row : rows) {
    if (!row.call.wrong.empty()) continue;
    std::vector<int64_t> grid;
    grid.reserve(row.plan.axes.size());
    for (const auto& axis : row.plan.axes) grid.push_back(axis.length);
    const double measured = quantile(row.speedup, 0.5);
    table.add({row.call.mechanism->name, row.call.example.options, heed::name_of(row.call.dtype),
               sides(grid), fmt::format("{:.2f}x", row.simulated.flop_speedup),
               fmt::format("{:.2f}x", row.simulated.analytical_speedup),
               fmt::format("{:.2f}x", mean_speedup(row.simulated)),
               sides(row.kernel.query_tile) + " / " + sides(row.kernel.key_tile),
               fmt::format("{:.2f}x", row.kernel.speedup),
               fmt::format("{:.2f}x", row.kernel.predicted), short_number(quantile(row.dense, 0.5)),
               short_number(row.call.median_ms()), fmt::format("{:.2f}x", measured),
               spread(row.speedup),
               fmt::format("{:.0f} %", 100 * measured / row.kernel.predicted)});
  }
  table.print();
  fmt::print(
      "\nSpeed-ups over dense attention by heed on the same tokens. operations: length / kernel.\n"
      "slowest, mean tile: boxes of 64 tokens (8x8, 2x4x8) on a fixed grid, as the paper counts;\n"
      "a processor follows the mean. pairs: those that the kernel computes with the boxes that it\n"
      "chooses (queries / keys), in blocks of {} rows and {} keys from the first key that is seen "
      "to\n"
      "the last. predicted: with what rows, tiles, masks and copies of tokens cost besides.\n",
      na::kRowBlock, na::kKeyStep);
}

Json plan_json(const PlanRow& row) {
  return {{"op", row.call.mechanism->name},
          {"options", row.call.example.options},
          {"type", heed::name_of(row.call.dtype)},
          {"flop_speedup", row.simulated.flop_speedup},
          {"analytical_speedup", row.simulated.analytical_speedup},
          {"mean_speedup", mean_speedup(row.simulated)},
          {"kernel",
           {{"query_tile", row.kernel.query_tile},
            {"key_tile", row.kernel.key_tile},
            {"visited_mean", row.kernel.visited_mean},
            {"dense", row.kernel.dense},
            {"speedup", row.kernel.speedup},
            {"predicted", row.kernel.predicted}}},
          {"ms", samples_json(row.call.heed)},
          {"dense_ms", samples_json(row.dense)},
          {"measured_speedup", samples_json(row.speedup)},
          {"max_error_over_bound", finite_or_null(row.call.error_over_bound)}};
}

}  // namespace

int against_plan(const BenchArguments& arguments) {
  const RunOptions run = arguments.run();
  std::vector<PlanRow> rows = rows_of(arguments);
  QuickChecks checks(chosen_isa(run), false);
  Progress progress("measuring");
  int wrong = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    progress.show(static_cast<int64_t>(i), static_cast<int64_t>(rows.size()),
                  rows[i].call.mechanism->name + " " + rows[i].call.example.options);
    checks.check(rows[i].call);
    if (rows[i].call.wrong.empty()) {
      time_row(rows[i], run, arguments.seconds);
      continue;
    }
    ++wrong;
    progress.clear();
    report_wrong(rows[i].call);
  }
  progress.clear();
  if (arguments.json) {
    Json json = bench_header_json(arguments);
    json["rows"] = Json::array();
    for (const PlanRow& row : rows) {
      if (row.call.wrong.empty()) json["rows"].push_back(plan_json(row));
    }
    print_json(json);
  } else {
    print(rows, arguments);
  }
  return wrong == 0 ? kOk : kFailureFound;
}

}  // namespace heed::cli
