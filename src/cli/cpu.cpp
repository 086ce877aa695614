// heed cpu: what was found on this machine and what the kernels use of it.
#include <fmt/format.h>

#include <memory>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "mechanisms/nearest.h"
#include "mechanisms/registry.h"

namespace heed::cli {
namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

// The path that the mechanism's first large case takes in this type.
std::string path_of(const Mechanism& mechanism, DType dtype) {
  const NamedTensors in = shapes_only(mechanism.bench_cases.at(0), dtype);
  for (const PathAnswer& answer : mechanism.explain(in, {}, {})) {
    if (answer.can_run) return answer.path;
  }
  return "none";
}

void print_cpu_json() {
  const CpuInfo& cpu = cpu_info();
  std::vector<std::string> isas;
  for (Isa isa : available_isas()) isas.emplace_back(name_of(isa));
  Json kernels = Json::object();
  for (const Mechanism& mechanism : mechanisms()) {
    Json paths = Json::object();
    for (DType dtype : kTypes) paths[name_of(dtype)] = path_of(mechanism, dtype);
    kernels[mechanism.name] = paths;
  }
  print_json({{"model", cpu.model},
              {"cores", cpu.cores},
              {"threads", default_threads()},
              {"l1d_bytes", cpu.l1d_bytes},
              {"l2_bytes", cpu.l2_bytes},
              {"l3_bytes", cpu.l3_bytes},
              {"features", cpu.features},
              {"instruction_sets", isas},
              {"default", name_of(default_isa())},
              {"kernels", kernels}});
}

void print_cpu() {
  const CpuInfo& cpu = cpu_info();
  const char* used =
      name_of(default_isa());  // throws for a wrong HEED_ISA, before anything is printed
  std::vector<std::string> isas;
  for (Isa isa : available_isas()) isas.emplace_back(name_of(isa));
  fmt::print("{}\n", bold(cpu.model));
  fmt::print("cores             {}, threads of a call {}\n", cpu.cores, default_threads());
  fmt::print("caches            L1d {}, L2 {} per core, L3 {}\n", bytes_text(cpu.l1d_bytes),
             bytes_text(cpu.l2_bytes), bytes_text(cpu.l3_bytes));
  fmt::print("features          {}\n",
             cpu.features.empty() ? "none of those heed looks at" : joined(cpu.features));
  fmt::print("instruction sets  {}; used: {} (HEED_ISA forces another)\n\n", joined(isas), used);
  std::vector<Table::Column> columns = {{"kernel"}};
  for (DType dtype : kTypes) columns.push_back({name_of(dtype)});
  Table table(columns);
  for (const Mechanism& mechanism : mechanisms()) {
    std::vector<std::string> cells = {mechanism.name};
    for (DType dtype : kTypes) cells.push_back(path_of(mechanism, dtype));
    table.add(std::move(cells));
  }
  table.print();
}

}  // namespace

void add_cpu(CLI::App& app, Outcome&) {
  CLI::App* command =
      app.add_subcommand("cpu", "What was found on this machine and what each kernel uses of it");
  auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "JSON");
  command->callback([json] { *json ? print_cpu_json() : print_cpu(); });
}

}  // namespace heed::cli
