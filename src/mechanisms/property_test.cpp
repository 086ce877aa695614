// Random calls of every mechanism against its cascade: shapes, options, type, instruction set and layout
// from a seed. A failing case is printed as the command that repeats it.
#include <gtest/gtest.h>

#include "mechanisms/attention_case.h"
#include "mechanisms/check.h"

namespace heed {
namespace {

#ifndef HEED_PROPERTY_CASES
#define HEED_PROPERTY_CASES 3000  // over all mechanisms together, at least
#endif

class Properties : public testing::TestWithParam<const Mechanism*> {};

void check_one(const Mechanism& mechanism, uint64_t seed) {
  CaseRandom random(~seed);
  constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
  const DType dtype = kTypes[random.between(0, 3)];
  const auto& isas = available_isas();
  const Isa isa =
      isas[static_cast<size_t>(random.between(0, static_cast<int64_t>(isas.size()) - 1))];
  const Layout layout = kLayouts[random.between(0, 2)];
  const ExampleCase example = random_case(mechanism, seed);
  const Reference reference = make_reference(mechanism, example, dtype, seed);
  for (const CheckRow& row : check_kernel(reference, isa, layout)) {
    EXPECT_TRUE(row.ok()) << example.options << "\n  " << row.result << " " << row.failure << " "
                          << row.difference.where << "\n  error " << row.difference.error
                          << " over bound " << row.difference.bound << " = " << row.difference.ratio
                          << "\n  replay: " << row.replay;
  }
}

TEST_P(Properties, RandomCallsAgreeWithTheDefinition) {
  const auto all = static_cast<uint64_t>(mechanisms().size());
  const uint64_t count = (HEED_PROPERTY_CASES + all - 1) / all;
  for (uint64_t seed = 0; seed < count; ++seed) check_one(*GetParam(), seed);
}

std::vector<const Mechanism*> pointers() {
  std::vector<const Mechanism*> all;
  for (const Mechanism& mechanism : mechanisms()) all.push_back(&mechanism);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Mechanisms, Properties, testing::ValuesIn(pointers()),
                         [](const auto& point) { return point.param->name; });

}  // namespace
}  // namespace heed
