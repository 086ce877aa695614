// heed hardware fusemax: attention on spatial accelerators, five configurations side by side.
#include <fmt/format.h>

#include <memory>

#include "cli/arguments.h"
#include "cli/hardware.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "hardware/accelerator.h"
#include "hardware/figures.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

using namespace hardware;  // NOLINT: this command shows that room

struct Arguments {
  std::string config, model, arch, workload, mapping, plot;
  std::optional<int64_t> length;
  bool sweep = false, means = false, json = false;
};

struct Plan {
  std::vector<Mapping> mappings;
  std::vector<Workload> layers;
  std::optional<Machine> machine;  // instead of each mapping's own
};

std::string named_workload(const std::string& model) {
  return reading("--model", [&] { return builtin_workload(model).name; });
}

std::vector<Workload> layers_of(const Arguments& a) {
  std::vector<Workload> layers;
  if (!a.workload.empty()) {
    if (!a.model.empty()) throw Error("--model: --workload already names the layer");
    Workload layer = parse_workload(read_description("--workload", a.workload), a.workload);
    layers.push_back(a.length ? with_length(layer, *a.length) : layer);
    return layers;
  }
  std::vector<std::string> models = builtin_workloads();
  if (!a.model.empty()) models = {named_workload(a.model)};
  const std::vector<int64_t> lengths = a.length ? std::vector<int64_t>{*a.length} : paper_lengths();
  for (const std::string& model : models) {
    for (int64_t length : lengths) layers.push_back(with_length(builtin_workload(model), length));
  }
  return layers;
}

Plan plan_of(const Arguments& a) {
  Plan plan;
  plan.layers = layers_of(a);
  if (!a.arch.empty()) plan.machine = parse_machine(read_description("--arch", a.arch), a.arch);
  if (!a.mapping.empty()) {
    if (!a.config.empty()) throw Error("--config: --mapping already names the configuration");
    plan.mappings.push_back(parse_mapping(read_description("--mapping", a.mapping), a.mapping));
  } else if (!a.config.empty()) {
    plan.mappings.push_back(reading("--config", [&] { return builtin_mapping(a.config); }));
  } else {
    for (const std::string& name : builtin_mappings())
      plan.mappings.push_back(builtin_mapping(name));
  }
  return plan;
}

std::vector<Row> rows_of(const Plan& plan) {
  std::vector<Row> rows;
  std::string refused;
  for (const Mapping& mapping : plan.mappings) {
    const Machine& machine = plan.machine ? *plan.machine : builtin_machine(mapping.machine);
    try {
      for (const Workload& layer : plan.layers) rows.push_back(cost_row(machine, mapping, layer));
    } catch (const Error& error) {
      // A machine of the user's may lack what some of the five configurations need.
      if (plan.mappings.size() == 1) throw;
      std::erase_if(rows, [&](const Row& row) { return row.config == mapping.name; });
      refused += fmt::format("heed: left out: {}\n", error.what());
    }
  }
  if (rows.empty()) throw Error("no configuration runs on this machine: " + refused);
  say("{}", refused);
  return rows;
}

constexpr double kJoules = 1e-12;  // of a picojoule

Json row_json(const Row& row) {
  const Energy& energy = row.attention.energy;
  Json json = {{"config", row.config},
               {"model", row.model},
               {"length", row.length},
               {"latency_s", row.attention.latency_s},
               {"util_2d", row.attention.util_2d},
               {"util_1d", row.attention.util_1d},
               {"traffic_bytes", row.attention.traffic_bytes},
               {"energy_j", energy.total_pj() * kJoules},
               {"e2e_latency_s", nullptr},
               {"e2e_energy_j", nullptr},
               {"energy_by_component_j",
                {{"array_2d", energy.matrix_pj * kJoules},
                 {"array_1d", energy.vector_pj * kJoules},
                 {"buffer", energy.buffer_pj * kJoules},
                 {"dram", energy.dram_pj * kJoules}}}};
  if (row.linear.latency_s > 0) {
    json["e2e_latency_s"] = row.e2e_latency_s();
    json["e2e_energy_j"] = row.e2e_energy_pj() * kJoules;
  }
  return json;
}

void print_rows(const std::vector<Row>& rows) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"config"},
               {"model"},
               {"length", kRight},
               {"latency s", kRight},
               {"2D", kRight},
               {"1D", kRight},
               {"traffic GB", kRight},
               {"energy J", kRight},
               {"2D/1D/buffer/DRAM %", kRight},
               {"end to end s", kRight},
               {"J", kRight}});
  for (const Row& row : rows) {
    const Energy& e = row.attention.energy;
    const auto share = [&](double pj) { return fmt::format("{:.0f}", 100 * pj / e.total_pj()); };
    const bool whole = row.linear.latency_s > 0;
    table.add({row.config, row.model, std::to_string(row.length),
               short_number(row.attention.latency_s, 6),
               fmt::format("{:.3f}", row.attention.util_2d),
               fmt::format("{:.3f}", row.attention.util_1d),
               short_number(row.attention.traffic_bytes * 1e-9, 5),
               short_number(e.total_pj() * kJoules, 5),
               share(e.matrix_pj) + "/" + share(e.vector_pj) + "/" + share(e.buffer_pj) + "/" +
                   share(e.dram_pj),
               whole ? short_number(row.e2e_latency_s(), 6) : "-",
               whole ? short_number(row.e2e_energy_pj() * kJoules, 5) : "-"});
  }
  table.print();
}

constexpr const char* kSlower[] = {"flat", "unfused"};

Json means_json(const std::vector<Row>& rows) {
  Json list = Json::array();
  for (const char* slow : kSlower) {
    const Means means = compare(rows, slow, "binding");
    if (means.rows == 0) continue;
    const bool whole = rows.front().linear.latency_s > 0;
    list.push_back({{"over", slow},
                    {"pairs", means.rows},
                    {"speedup", means.speedup},
                    {"energy", means.energy},
                    {"e2e_speedup", whole ? Json(means.e2e_speedup) : Json(nullptr)},
                    {"e2e_energy", whole ? Json(means.e2e_energy) : Json(nullptr)}});
  }
  return list;
}

void print_means(const std::vector<Row>& rows) {
  int pairs = 0;
  for (const char* slow : kSlower) {
    const Means means = compare(rows, slow, "binding");
    if (means.rows == 0) continue;
    fmt::print("FuseMax (binding) over {:<8} attention {} faster at {} of the energy",
               std::string(slow) + ":", bold(fmt::format("{:.2f}x", means.speedup)),
               bold(fmt::format("{:.2f}", means.energy)));
    if (rows.front().linear.latency_s > 0) {
      fmt::print(", end to end {} at {}", bold(fmt::format("{:.2f}x", means.e2e_speedup)),
                 bold(fmt::format("{:.2f}", means.e2e_energy)));
    }
    fmt::print("\n");
    pairs = means.rows;
  }
  if (pairs == 0) return;
  fmt::print(
      "Arithmetic means over the {} pairs of model and length shown: latency of the other over\n"
      "FuseMax's, energy of FuseMax over the other's; end to end adds the layer's six linear "
      "products.\n"
      "Some energies and areas are inferred: `heed hardware files fusemax` says which.\n",
      pairs);
}

void sweep(const Arguments& a) {
  for (const std::string* other : {&a.config, &a.arch, &a.workload, &a.mapping}) {
    if (!other->empty()) {
      throw Error("--area-sweep: it takes --model and --length; found '" + *other + "' besides");
    }
  }
  constexpr auto kRight = Table::Align::right;
  constexpr int64_t kPaperLength = 262144;
  Table table({{"model"},
               {"elements", kRight},
               {"latency s", kRight},
               {"area mm2", kRight},
               {"s x mm2", kRight}});
  Json list = Json::array();
  std::vector<AreaPoint> points;
  std::vector<std::string> models = builtin_workloads();
  if (!a.model.empty()) models = {named_workload(a.model)};
  for (const std::string& model : models) {
    for (int64_t elements : {16, 32, 64, 128, 256, 512}) {
      const Workload layer = with_length(builtin_workload(model), a.length.value_or(kPaperLength));
      const Machine machine = swept_machine(elements, layer.head_dim);
      const Cost cost = attention_cost(machine, builtin_mapping("binding"), layer);
      const double area = area_um2(machine);
      points.push_back({model, area, cost.latency_s});
      list.push_back({{"model", model},
                      {"pe_dim", elements},
                      {"latency_s", cost.latency_s},
                      {"area_um2", area}});
      table.add({model, fmt::format("{0}x{0}", elements), short_number(cost.latency_s, 6),
                 short_number(area * 1e-6, 5), short_number(cost.latency_s * area * 1e-6, 4)});
    }
  }
  if (!a.plot.empty()) write_text("--plot", a.plot, area_figure(points));
  if (a.json) return print_json(list);
  table.print();
}

void fusemax(const Arguments& arguments) {
  if (arguments.sweep) return sweep(arguments);
  const std::vector<Row> rows = rows_of(plan_of(arguments));
  if (!arguments.plot.empty()) write_text("--plot", arguments.plot, cost_figure(rows));
  if (arguments.means) {
    if (means_json(rows).empty()) {
      throw Error("--means: the configurations binding and flat or unfused are needed");
    }
    if (arguments.json) return print_json(means_json(rows));
    return print_means(rows);
  }
  if (arguments.json) {
    Json list = Json::array();
    for (const Row& row : rows) list.push_back(row_json(row));
    return print_json(list);
  }
  print_rows(rows);
  fmt::print("\n");
  print_means(rows);
}

}  // namespace

void add_hardware_fusemax(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "fusemax", "Attention on spatial accelerators: latency, utilisation, traffic, energy");
  auto a = std::make_shared<Arguments>();
  command->add_option("--config", a->config, "unfused, flat, cascade, architecture or binding");
  command->add_option("--model", a->model, "bert, trxl, t5 or xlm");
  command->add_option("--length", a->length, "Tokens; without it six lengths from 1024 to 1048576")
      ->transform(whole_number(1));
  command->add_option("--arch", a->arch, "Machine from a JSON file (heed hardware files fusemax)");
  command->add_option("--workload", a->workload,
                      "Layer from a JSON file (heed hardware files bert)");
  command->add_option("--mapping", a->mapping,
                      "Mapping and binding from a JSON file (heed hardware files binding)");
  CLI::Option* sweep =
      command->add_flag("--area-sweep", a->sweep, "Arrays from 16x16 to 512x512: latency and area");
  command->add_flag("--means", a->means, "Only the means of FuseMax over flat and unfused")
      ->excludes(sweep);
  command->add_option("--plot", a->plot, "Also write the figures to this SVG file");
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { fusemax(*a); });
}

}  // namespace heed::cli
