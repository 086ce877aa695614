// heed bench: the table, the JSON and the roofline of measured rows.
#include <fmt/format.h>

#include <set>
#include <utility>

#include "base/parallel.h"
#include "cli/bench.h"
#include "heed/version.h"
#include "libtorch/library.h"

namespace heed::cli {
namespace {

constexpr auto kRight = Table::Align::right;

/// A number of the shape [B,H,L,D], of [B,L,D] without heads, or of a grid [B,*grid,H,D] "64x64" in the
/// place of L.
std::string extent(const ExampleCase& example, std::initializer_list<const char*> inputs,
                   int axis) {
  if (const Dims* shape = input_shape(example, inputs); shape != nullptr) {
    if (shape->rank() == 3) return axis == 1 ? "-" : std::to_string((*shape)[axis - (axis > 1)]);
    return shape->rank() > axis ? std::to_string((*shape)[axis]) : "-";
  }
  const Dims* grid = input_shape(example, {inputs.size() == 2 ? "key" : "query"});
  if (grid == nullptr) return "-";
  const int rank = grid->rank();
  if (axis != 2) return std::to_string((*grid)[axis == 0 ? 0 : rank - (axis == 1 ? 2 : 1)]);
  std::string sides;
  for (int a = 1; a + 2 < rank; ++a) sides += (a == 1 ? "" : "x") + std::to_string((*grid)[a]);
  return sides;
}

std::string query_extent(const ExampleCase& example, int axis) {
  return extent(example, {"q", "out_a", "x"}, axis);
}

std::vector<Table::Column> columns(bool versus) {
  std::vector<Table::Column> list = {{"op"},
                                     {"pass"},
                                     {"mode"},
                                     {"type"},
                                     {"path"},
                                     {"B", kRight},
                                     {"H", kRight},
                                     {"Lq", kRight},
                                     {"Lk", kRight},
                                     {"D", kRight},
                                     {"median ms", kRight},
                                     {"p20-p80", kRight},
                                     {"GFLOP/s", kRight},
                                     {"bound ms", kRight},
                                     {"reached", kRight},
                                     {"bound by"},
                                     {"max err/bound", kRight}};
  if (versus) {
    for (const char* name : {"torch ms", "p20-p80", "speed-up", "p20-p80"}) {
      list.push_back({name, kRight});
    }
  }
  return list;
}

std::vector<std::string> cells_of(const BenchRow& row, bool versus) {
  std::vector<std::string> cells = {row.mechanism->name, name_of(row.pass), mode_of(row.example),
                                    heed::name_of(row.dtype), row.path};
  for (int axis : {0, 1, 2}) cells.push_back(query_extent(row.example, axis));
  cells.push_back(extent(row.example, {"k", "k_cache"}, 2));
  cells.push_back(query_extent(row.example, 3));
  cells.push_back(short_number(row.median_ms()));
  cells.push_back(spread(row.heed));
  cells.push_back(short_number(row.gigaflops()));
  cells.push_back(short_number(row.roof.bound_s() * 1e3));
  cells.push_back(fmt::format("{:.0f} %", 100 * row.roof_share()));
  cells.push_back(limit_of(row.roof));
  cells.push_back(fmt::format("{:.2f}", row.error_over_bound));
  if (versus && row.peer.empty()) cells.resize(cells.size() + 4, "-");
  if (versus && !row.peer.empty()) {
    cells.push_back(short_number(quantile(row.peer, 0.5)));
    cells.push_back(spread(row.peer));
    cells.push_back(fmt::format("{:.2f}x", quantile(row.ratio, 0.5)));
    cells.push_back(spread(row.ratio));
  }
  return cells;
}

/// What stands for PyTorch: each composition of a mechanism once.
void print_peers(const std::vector<BenchRow>& rows) {
  std::set<std::pair<std::string, std::string>> titles;
  for (const BenchRow& row : rows) {
    if (!row.peer.empty()) titles.emplace(row.mechanism->name, row.peer_title);
  }
  if (titles.empty()) return;
  fmt::print("\nPyTorch computes\n");
  for (const auto& [name, title] : titles) fmt::print("  {}: {}\n", name, title);
}

/// "flash backward"
std::string call_name(const BenchRow& row) {
  const std::string name(brief_name(*row.mechanism));
  return row.pass == Pass::backward ? name + " backward" : name;
}

/// "flash 512x64 causal=1"
std::string row_title(const BenchRow& row) {
  std::string title = call_name(row);
  const std::string tokens = query_extent(row.example, 2);
  if (tokens != "-") title += " " + tokens + "x" + query_extent(row.example, 3);
  if (row.dtype != DType::f32) title += std::string(" ") + heed::name_of(row.dtype);
  if (!row.example.options.empty()) title += " " + row.example.options;
  if (!row.example.data.empty()) title += " " + row.example.data;
  return title;
}

}  // namespace

std::string mode_of(const ExampleCase& example) {
  const std::string options = example.options.empty() ? "full" : example.options;
  return example.data.empty() ? options : options + ", " + example.data;
}

std::string spread(const Samples& samples) {
  return short_number(quantile(samples, 0.2)) + "-" + short_number(quantile(samples, 0.8));
}

std::string bench_header(const BenchArguments& arguments) {
  return fmt::format(
      "{}, {} thread{}, {}, {}, heed {}{}", cpu_info().model, default_threads(),
      default_threads() == 1 ? "" : "s", heed::name_of(chosen_isa(arguments.run())),
      compiler_name(), kVersion,
      arguments.versus.empty() ? "" : ", side by side with PyTorch " + torch_library()->version);
}

Json bench_header_json(const BenchArguments& arguments) {
  Json json = {{"cpu", cpu_info().model},
               {"threads", default_threads()},
               {"isa", heed::name_of(chosen_isa(arguments.run()))},
               {"compiler", compiler_name()},
               {"heed", kVersion}};
  if (!arguments.versus.empty()) json["versus"] = "PyTorch " + torch_library()->version;
  return json;
}

Json samples_json(const Samples& samples) {
  return {{"median", quantile(samples, 0.5)},
          {"p20", quantile(samples, 0.2)},
          {"p80", quantile(samples, 0.8)},
          {"runs", samples.size()}};
}

Json row_json(const BenchRow& row) {
  Json shapes = Json::object();
  for (const auto& [name, shape] : row.example.inputs) {
    shapes[name] = std::vector<int64_t>(shape.span().begin(), shape.span().end());
  }
  Json json = {{"op", row.mechanism->name},
               {"pass", name_of(row.pass)},
               {"options", row.example.options},
               {"type", heed::name_of(row.dtype)},
               {"path", row.path},
               {"shapes", shapes},
               {"ms", samples_json(row.heed)},
               {"gflops", row.gigaflops()},
               {"max_error_over_bound", finite_or_null(row.error_over_bound)},
               {"roofline",
                {{"bound_ms", row.roof.bound_s() * 1e3},
                 {"reached", row.roof_share()},
                 {"bound_by", limit_of(row.roof)},
                 {"bytes", row.bytes},
                 {"operations", row.operations}}}};
  if (!row.example.data.empty()) json["data"] = row.example.data;
  if (row.tokens() > 0) {
    json["tokens_per_s"] = static_cast<double>(row.tokens()) * 1e3 / row.median_ms();
  }
  if (!row.peer.empty()) {
    json["torch"] = {{"title", row.peer_title},
                     {"ms", samples_json(row.peer)},
                     {"speed_up", samples_json(row.ratio)}};
  }
  return json;
}

void print_rows(const std::vector<BenchRow>& rows, const BenchArguments& arguments) {
  if (arguments.json) {
    Json json = bench_header_json(arguments);
    json["rows"] = Json::array();
    for (const BenchRow& row : rows) {
      if (row.wrong.empty()) json["rows"].push_back(row_json(row));
    }
    return print_json(json);
  }
  const bool versus = !arguments.versus.empty();
  fmt::print("{}\n", bench_header(arguments));
  Table table(columns(versus));
  for (const BenchRow& row : rows) {
    if (row.wrong.empty()) table.add(cells_of(row, versus));
  }
  table.print();
  if (versus) print_peers(rows);
}

std::string bench_roofline(const std::vector<BenchRow>& rows, Rooflines& rooflines) {
  // Points of many calls are told apart by mechanism alone.
  constexpr size_t kMostNames = 20;
  std::vector<hardware::RooflinePoint> points;
  for (const BenchRow& row : rows) {
    if (!row.wrong.empty()) continue;
    const std::string name = rows.size() <= kMostNames ? row_title(row) : call_name(row);
    points.push_back({name, row.operations / row.bytes, row.gigaflops() * 1e9});
  }
  return hardware::roofline_figure(rooflines.units(), rooflines.levels(), points);
}

}  // namespace heed::cli
