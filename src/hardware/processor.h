// This processor's limits, measured: multiply-adds in registers, bytes from each level of memory; and
// the roofline that they make for a call. Roofline: Williams, Waterman, Patterson 2009.
#pragma once
#include <string>
#include <vector>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed::hardware {

/// What one level of memory gives to all threads together.
struct MemoryLevel {
  std::string name;  // "L1", "L2", "L3", "DRAM"
  double bytes = 0;  // that it holds for these threads; infinite for DRAM
  double bytes_per_second = 0;
};

struct UnitRate {
  std::string unit;  // "float32 avx512", "bfloat16 amx"
  DType dtype = DType::f32;
  Isa isa = Isa::portable;
  double multiply_adds_per_second = 0;
};

struct ProcessorRates {
  int threads = 1;
  std::vector<UnitRate> units;
  std::vector<MemoryLevel> levels;  // nearest first
  double seconds = 0;               // that the measurement took
};

/// A few seconds in all.
ProcessorRates measure_processor(const RunOptions& run);

/// Multiply-adds a second of one type on one instruction set, all threads busy: bfloat16 and float16
/// take the bfloat16 unit where there is one, else that of float32.
UnitRate measure_unit(DType dtype, Isa isa, int threads);
std::vector<MemoryLevel> measure_memory(Isa isa, int threads);

/// The least time a call may take.
struct Roof {
  double compute_s = 0, memory_s = 0;
  std::string level;  // that the bytes come from: the nearest one that holds them all
  double bound_s() const { return compute_s > memory_s ? compute_s : memory_s; }
};
Roof roof_of(double multiply_adds, double bytes, const UnitRate& unit,
             const std::vector<MemoryLevel>& levels);

}  // namespace heed::hardware
