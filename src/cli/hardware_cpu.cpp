// heed hardware cpu: what this machine can do at most.
#include <fmt/format.h>

#include <cmath>
#include <memory>

#include "cli/arguments.h"
#include "cli/hardware.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "hardware/figures.h"
#include "hardware/processor.h"

namespace heed::cli {
namespace {

using hardware::MemoryLevel;
using hardware::ProcessorRates;
using hardware::UnitRate;

struct Arguments {
  std::optional<int> threads;
  std::string isa, plot;
  bool json = false;
};

void print_rates(const ProcessorRates& rates) {
  constexpr auto kRight = Table::Align::right;
  fmt::print("{}, {} thread{}, measured in {:.1f} s\n", bold(cpu_info().model), rates.threads,
             rates.threads == 1 ? "" : "s", rates.seconds);
  Table units({{"multiply-adds"}, {"GFLOP/s", kRight}});
  for (const UnitRate& unit : rates.units) {
    units.add({unit.unit, fmt::format("{:.1f}", 2e-9 * unit.multiply_adds_per_second)});
  }
  units.print();
  fmt::print("\n");
  // Where a float32 call turns from bandwidth to arithmetic.
  double fastest = 0;
  for (const UnitRate& unit : rates.units) {
    if (unit.dtype == DType::f32) fastest = std::max(fastest, 2 * unit.multiply_adds_per_second);
  }
  Table levels({{"reading"}, {"holds", kRight}, {"GB/s", kRight}, {"float32 FLOP/byte", kRight}});
  for (const MemoryLevel& level : rates.levels) {
    levels.add({level.name,
                std::isfinite(level.bytes) ? bytes_text(static_cast<int64_t>(level.bytes)) : "-",
                fmt::format("{:.1f}", 1e-9 * level.bytes_per_second),
                fmt::format("{:.1f}", fastest / level.bytes_per_second)});
  }
  levels.print();
  fmt::print(
      "\nFLOP/byte: operations that a call must do with each byte to be bound by arithmetic.\n");
}

Json rates_json(const ProcessorRates& rates) {
  Json units = Json::array(), levels = Json::array();
  for (const UnitRate& unit : rates.units) {
    units.push_back({{"unit", unit.unit},
                     {"type", name_of(unit.dtype)},
                     {"instruction_set", name_of(unit.isa)},
                     {"multiply_adds_per_second", unit.multiply_adds_per_second}});
  }
  for (const MemoryLevel& level : rates.levels) {
    levels.push_back({{"level", level.name},
                      {"bytes", finite_or_null(level.bytes)},
                      {"bytes_per_second", level.bytes_per_second}});
  }
  return {{"model", cpu_info().model},
          {"threads", rates.threads},
          {"seconds", rates.seconds},
          {"units", units},
          {"memory", levels}};
}

void cpu(const Arguments& a) {
  use_threads(a.threads);
  RunOptions run;
  if (!a.isa.empty()) run.isa = isas_to_use(a.isa).front();
  if (!a.plot.empty()) require_writable("--plot", a.plot);
  const ProcessorRates rates = hardware::measure_processor(run);
  if (a.json) {
    print_json(rates_json(rates));
  } else {
    print_rates(rates);
  }
  if (!a.plot.empty()) {
    write_text("--plot", a.plot, hardware::roofline_figure(rates.units, rates.levels, {}));
  }
}

}  // namespace

void add_hardware_cpu(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "cpu", "This machine's limits, measured: multiply-adds, cache and memory bandwidth");
  auto a = std::make_shared<Arguments>();
  add_threads(*command, a->threads, "Threads that measure together");
  command->add_option("--isa", a->isa, "Strongest instruction set: portable, avx2, avx512, amx");
  command->add_option("--plot", a->plot, "Also write the roofline to this SVG file");
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { cpu(*a); });
}

}  // namespace heed::cli
