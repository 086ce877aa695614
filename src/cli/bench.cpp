// heed bench: how fast the kernels are on this machine, alone or side by side with PyTorch.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>

#include "cli/arguments.h"
#include "cli/bench_roofline.h"
#include "cli/commands.h"
#include "cli/hardware.h"
#include "cli/measure.h"
#include "cli/peers.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "heed/version.h"
#include "mechanisms/check.h"

namespace heed::cli {
namespace {

struct Arguments {
  std::string name, versus, k, isa, plot;
  std::optional<std::string> options;
  std::vector<std::string> q, dtypes = {"float32"};
  std::optional<int> threads;
  double seconds = 1;
  bool json = false;
};

struct Row {
  const Mechanism* mechanism;
  ExampleCase example;
  DType dtype;
  std::string path;
  Samples heed, peer, ratio;         // milliseconds; ratio = peer / heed of neighbouring runs
  double operations = 0, bytes = 0;  // bytes: inputs and results, each once
  hardware::Roof roof;
  std::string peer_title;
  double error_over_bound = 0;
  std::string wrong;  // what the quick check found
};

// The cases of a mechanism, in the shapes and with the options that were asked for.
std::vector<ExampleCase> cases_of(const Mechanism& mechanism, const Arguments& arguments) {
  std::vector<ExampleCase> cases = mechanism.bench_cases;
  if (arguments.options) {
    cases.resize(1);
    cases[0].options = Spec::parse_options(*arguments.options).str();
  }
  if (arguments.q.empty() && arguments.k.empty()) return cases;
  std::vector<ExampleCase> resized;
  std::set<std::string> options;
  for (const ExampleCase& like : cases) {
    if (!options.insert(like.options).second) continue;
    ShapeArguments shapes;
    if (!arguments.k.empty()) shapes.k = parse_shape("--k", arguments.k);
    if (arguments.q.empty()) resized.push_back(with_shapes(like, shapes));
    for (const std::string& q : arguments.q) {
      shapes.q = parse_shape("--q", q);
      resized.push_back(with_shapes(like, shapes));
    }
  }
  return resized;
}

std::string chosen_path(const Mechanism& mechanism, const NamedTensors& in, const RunOptions& run) {
  for (const PathAnswer& answer : mechanism.explain(in, run)) {
    if (answer.can_run) return answer.path;
  }
  return "none";
}

// The kernel against its cascade, with the same head dims and options but few enough tokens for
// float64.
void quick_check(Row& row, Isa isa) {
  const ExampleCase small =
      row.mechanism->shrink ? row.mechanism->shrink(row.example) : shrunk(row.example);
  const Reference reference = make_reference(*row.mechanism, small, row.dtype, 1);
  for (const CheckRow& checked : check_kernel(reference, isa, Layout::contiguous)) {
    row.error_over_bound = std::max(row.error_over_bound, checked.difference.ratio);
    if (!checked.ok() && row.wrong.empty()) {
      row.wrong = checked.result + ": " +
                  (checked.failure.empty() ? checked.difference.where : checked.failure);
    }
  }
}

void time_row(Row& row, const Arguments& arguments, const RunOptions& run, Rooflines& rooflines) {
  const NamedArrays inputs = make_inputs(*row.mechanism, row.example, row.dtype, 1);
  const NamedTensors in = views(inputs);
  const Spec options = Spec::parse_options(row.example.options);
  row.path = chosen_path(*row.mechanism, in, run);
  row.operations = visible_operations(*row.mechanism, in, options);
  row.bytes = bytes_of(in) + bytes_of(row.mechanism->forward(in, options, run));
  row.roof = rooflines.roof(row.dtype, row.operations, row.bytes);
  const auto heed_call = [&] { row.mechanism->forward(in, options, run); };
  std::optional<Peer> peer;
  if (!arguments.versus.empty()) peer = find_peer(*row.mechanism, in, options, run);
  if (!peer) {
    row.heed = time_calls({heed_call}, arguments.seconds)[0];
    return;
  }
  row.peer_title = peer->title;
  const auto samples = time_calls({heed_call, peer->compute}, 2 * arguments.seconds);
  row.heed = samples[0];
  row.peer = samples[1];
  for (size_t i = 0; i < row.heed.size(); ++i) row.ratio.push_back(row.peer[i] / row.heed[i]);
}

std::string spread(const Samples& samples) {
  return short_number(quantile(samples, 0.2)) + "-" + short_number(quantile(samples, 0.8));
}

/// Of the least time that this machine's limits allow: 1 would be the roof itself.
double roof_share(const Row& row) { return row.roof.bound_s() * 1e3 / quantile(row.heed, 0.5); }

double gigaflops(const Row& row) { return row.operations / (quantile(row.heed, 0.5) * 1e6); }

std::string extent(const ExampleCase& example, std::initializer_list<const char*> inputs,
                   int axis) {
  const Dims* shape = input_shape(example, inputs);
  return shape == nullptr || shape->rank() <= axis ? "-" : std::to_string((*shape)[axis]);
}

std::string header(const Arguments& arguments, const RunOptions& run) {
  return fmt::format("{}, {} thread{}, {}, {}, heed {}{}", cpu_info().model, default_threads(),
                     default_threads() == 1 ? "" : "s", name_of(chosen_isa(run)), compiler_name(),
                     kVersion,
                     arguments.versus.empty() ? "" : ", side by side with " + peer_version());
}

void print_table(const std::vector<Row>& rows, bool versus) {
  constexpr auto kRight = Table::Align::right;
  std::vector<Table::Column> columns = {{"op"},
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
      columns.push_back({name, kRight});
    }
  }
  Table table(columns);
  for (const Row& row : rows) {
    if (!row.wrong.empty()) continue;
    std::vector<std::string> cells = {row.mechanism->name,
                                      row.example.options.empty() ? "full" : row.example.options,
                                      name_of(row.dtype), row.path};
    for (int axis : {0, 1, 2}) cells.push_back(extent(row.example, {"q", "out_a", "x"}, axis));
    cells.push_back(extent(row.example, {"k", "k_cache"}, 2));
    cells.push_back(extent(row.example, {"q", "out_a", "x"}, 3));
    cells.push_back(short_number(quantile(row.heed, 0.5)));
    cells.push_back(spread(row.heed));
    cells.push_back(short_number(gigaflops(row)));
    cells.push_back(short_number(row.roof.bound_s() * 1e3));
    cells.push_back(fmt::format("{:.0f} %", 100 * roof_share(row)));
    cells.push_back(limit_of(row.roof));
    cells.push_back(fmt::format("{:.2f}", row.error_over_bound));
    if (versus && row.peer.empty()) cells.resize(cells.size() + 4, "-");
    if (versus && !row.peer.empty()) {
      cells.push_back(short_number(quantile(row.peer, 0.5)));
      cells.push_back(spread(row.peer));
      cells.push_back(fmt::format("{:.2f}x", quantile(row.ratio, 0.5)));
      cells.push_back(spread(row.ratio));
    }
    table.add(std::move(cells));
  }
  table.print();
}

Json samples_json(const Samples& samples) {
  return {{"median", quantile(samples, 0.5)},
          {"p20", quantile(samples, 0.2)},
          {"p80", quantile(samples, 0.8)},
          {"runs", samples.size()}};
}

Json row_json(const Row& row) {
  Json shapes = Json::object();
  for (const auto& [name, shape] : row.example.inputs) {
    shapes[name] = std::vector<int64_t>(shape.span().begin(), shape.span().end());
  }
  Json json = {{"op", row.mechanism->name},
               {"options", row.example.options},
               {"type", name_of(row.dtype)},
               {"path", row.path},
               {"shapes", shapes},
               {"ms", samples_json(row.heed)},
               {"gflops", gigaflops(row)},
               {"max_error_over_bound", finite_or_null(row.error_over_bound)},
               {"roofline",
                {{"bound_ms", row.roof.bound_s() * 1e3},
                 {"reached", roof_share(row)},
                 {"bound_by", limit_of(row.roof)},
                 {"bytes", row.bytes},
                 {"operations", row.operations}}}};
  if (!row.peer.empty()) {
    json["torch"] = {{"title", row.peer_title},
                     {"ms", samples_json(row.peer)},
                     {"speed_up", samples_json(row.ratio)}};
  }
  return json;
}

void print_bench_json(const std::vector<Row>& rows, const Arguments& arguments,
                      const RunOptions& run) {
  Json list = Json::array();
  for (const Row& row : rows) {
    if (row.wrong.empty()) list.push_back(row_json(row));
  }
  Json json = {{"cpu", cpu_info().model},
               {"threads", default_threads()},
               {"isa", name_of(chosen_isa(run))},
               {"compiler", compiler_name()},
               {"heed", kVersion},
               {"rows", list}};
  if (!arguments.versus.empty()) json["versus"] = peer_version();
  print_json(json);
}

/// "flash 512x64 causal=1"
std::string row_title(const Row& row) {
  constexpr std::string_view kSuffix = "_attention";
  std::string title = row.mechanism->name;
  if (title.ends_with(kSuffix)) title.resize(title.size() - kSuffix.size());
  const std::string tokens = extent(row.example, {"q", "out_a", "x"}, 2);
  if (tokens != "-") title += " " + tokens + "x" + extent(row.example, {"q", "out_a", "x"}, 3);
  if (row.dtype != DType::f32) title += std::string(" ") + name_of(row.dtype);
  if (!row.example.options.empty()) title += " " + row.example.options;
  return title;
}

std::string roofline(const std::vector<Row>& rows, Rooflines& rooflines) {
  std::vector<hardware::RooflinePoint> points;
  for (const Row& row : rows) {
    if (!row.wrong.empty()) continue;
    points.push_back({row_title(row), row.operations / row.bytes, gigaflops(row) * 1e9});
  }
  return hardware::roofline_figure(rooflines.units(), rooflines.levels(), points);
}

// Every call that will be measured; mistakes in the arguments show before the first one runs.
std::vector<Row> planned_rows(const Arguments& arguments) {
  std::vector<Row> rows;
  for (const Mechanism* mechanism : chosen_mechanisms(arguments.name)) {
    for (const std::string& dtype : arguments.dtypes) {
      for (const ExampleCase& example : cases_of(*mechanism, arguments)) {
        Row& row = rows.emplace_back();
        row.mechanism = mechanism;
        row.example = example;
        row.dtype = parse_dtype(dtype);
      }
    }
  }
  return rows;
}

int bench(const Arguments& arguments) {
  if (!arguments.versus.empty()) require_peers();
  use_threads(arguments.threads);
  RunOptions run;
  if (!arguments.isa.empty()) run.isa = isas_to_use(arguments.isa).front();
  std::vector<Row> rows = planned_rows(arguments);
  Rooflines rooflines(run);
  Progress progress("measuring");
  int wrong = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    progress.show(static_cast<int64_t>(i), static_cast<int64_t>(rows.size()),
                  row.mechanism->name + " " + row.example.options);
    quick_check(row, chosen_isa(run));
    if (row.wrong.empty()) {
      time_row(row, arguments, run, rooflines);
      continue;
    }
    ++wrong;
    progress.clear();
    fmt::print(stderr, "heed: {} {} {}: not measured, it disagrees with its cascade: {}\n",
               row.mechanism->name, row.example.options, name_of(row.dtype), row.wrong);
  }
  progress.clear();
  if (!arguments.plot.empty()) write_text("--plot", arguments.plot, roofline(rows, rooflines));
  if (arguments.json) {
    print_bench_json(rows, arguments, run);
  } else {
    fmt::print("{}\n", header(arguments, run));
    print_table(rows, !arguments.versus.empty());
  }
  return wrong == 0 ? kOk : kFailureFound;
}

}  // namespace

void add_bench(CLI::App& app, Outcome& outcome) {
  CLI::App* command = app.add_subcommand(
      "bench", "Time the kernels; GFLOP/s are 2 x the cascade's multiply-adds on visible pairs");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("NAME", arguments->name, "Mechanism; without it all of them");
  command
      ->add_option("--vs", arguments->versus,
                   "Alternate with the same mathematics in PyTorch: --vs torch")
      ->check(CLI::IsMember({"torch"}));
  command->add_option("--q", arguments->q, "Shapes of the queries: B,H,L,D ...");
  command->add_option("--k", arguments->k, "Shape of the keys; without it as the queries");
  command->add_option("--options", arguments->options, "Options of the call: causal=1,window=256");
  command->add_option("--dtype", arguments->dtypes, "f64, f32, bf16, f16")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--threads", arguments->threads, "Threads of a call");
  command->add_option("--isa", arguments->isa, "Force this path: portable, avx2, avx512, amx");
  command->add_option("--seconds", arguments->seconds, "Time to measure each kernel")
      ->check(CLI::Range(0.001, 3600.0))
      ->capture_default_str();
  command->add_option("--plot", arguments->plot,
                      "Also write the roofline, with every row as a point, to this SVG file");
  command->add_flag("--json", arguments->json, "JSON");
  command->callback([arguments, &outcome] { outcome.exit_code = bench(*arguments); });
}

}  // namespace heed::cli
