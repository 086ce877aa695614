#include "hardware/processor.h"

#include <gtest/gtest.h>

#include <limits>

namespace heed::hardware {
namespace {

TEST(Processor, TheNearestLevelThatHoldsTheBytesAndTheSlowerRoofCount) {
  const UnitRate unit{"u", DType::f32, Isa::portable, 1e9};
  const double inf = std::numeric_limits<double>::infinity();
  const std::vector<MemoryLevel> levels = {
      {"L1", 1e4, 1e11}, {"L2", 1e6, 1e10}, {"DRAM", inf, 1e9}};
  Roof roof = roof_of(1e6, 1e4, unit, levels);
  EXPECT_EQ(roof.level, "L1");
  EXPECT_DOUBLE_EQ(roof.compute_s, 1e-3);
  EXPECT_DOUBLE_EQ(roof.bound_s(), 1e-3);
  roof = roof_of(1e6, 1e7, unit, levels);
  EXPECT_EQ(roof.level, "DRAM");
  EXPECT_DOUBLE_EQ(roof.bound_s(), 1e-2);
  EXPECT_EQ(roof_of(1, 5e5, unit, levels).level, "L2");
}

TEST(Processor, UnitsAreMeasured) {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const UnitRate rate = measure_unit(dtype, available_isas().back(), 1);
    EXPECT_GT(rate.multiply_adds_per_second, 1e6);
    EXPECT_FALSE(rate.unit.empty());
  }
}

}  // namespace
}  // namespace heed::hardware
