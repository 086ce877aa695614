#include "cli/bench_roofline.h"

#include <algorithm>

namespace heed::cli {
namespace {

double bytes(const Tensor& tensor) {
  if (!tensor.defined()) return 0;
  return static_cast<double>(tensor.count()) * static_cast<double>(size_of(tensor.dtype()));
}

}  // namespace

hardware::Roof Rooflines::roof(DType dtype, double operations, double bytes) {
  const DType kind = is_half(dtype) ? DType::bf16 : dtype;
  if (!units_.contains(kind)) units_[kind] = hardware::measure_unit(kind, isa_, threads_);
  return hardware::roof_of(operations / 2, bytes, units_.at(kind), levels());
}

const std::vector<hardware::MemoryLevel>& Rooflines::levels() {
  if (levels_.empty()) levels_ = hardware::measure_memory(isa_, threads_);
  return levels_;
}

std::vector<hardware::UnitRate> Rooflines::units() const {
  std::vector<hardware::UnitRate> list;
  for (const auto& [dtype, unit] : units_) list.push_back(unit);
  return list;
}

std::string limit_of(const hardware::Roof& roof) {
  return roof.compute_s >= roof.memory_s ? "arithmetic" : roof.level;
}

double bytes_of(const NamedTensors& tensors) {
  double total = 0;
  for (const auto& [name, tensor] : tensors) total += bytes(tensor);
  return total;
}

double bytes_of(const NamedArrays& arrays) {
  double total = 0;
  for (const auto& [name, array] : arrays) total += bytes(array.view());
  return total;
}

}  // namespace heed::cli
