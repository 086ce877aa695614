// What `heed bench` says about a row's distance from this machine's limits.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "hardware/figures.h"
#include "hardware/processor.h"
#include "mechanisms/registry.h"

namespace heed::cli {

/// The least time of a call: the definition's multiply-adds at the rate of the type's unit, or its
/// inputs and results once through the nearest memory that holds them. Rates are measured when they
/// are first asked for.
class Rooflines {
 public:
  explicit Rooflines(const RunOptions& run) : isa_(chosen_isa(run)), threads_(default_threads()) {}

  hardware::Roof roof(DType dtype, double operations, double bytes);
  const std::vector<hardware::MemoryLevel>& levels();
  std::vector<hardware::UnitRate> units() const;  // those that were asked for

 private:
  Isa isa_;
  int threads_;
  std::map<DType, hardware::UnitRate> units_;
  std::vector<hardware::MemoryLevel> levels_;
};

/// "arithmetic", "L2", "DRAM": what bounds the call.
std::string limit_of(const hardware::Roof& roof);

double bytes_of(const NamedTensors& tensors);
double bytes_of(const NamedArrays& arrays);

}  // namespace heed::cli
