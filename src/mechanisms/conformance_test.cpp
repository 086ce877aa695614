// Every kernel against its cascade: each mechanism, case, type, instruction set and memory layout.
#include <gtest/gtest.h>

#include <cctype>

#include "mechanisms/check.h"

namespace heed {
namespace {

constexpr uint64_t kSeed = 1;

// Under sanitizers everything is slow: one layout, the one with gaps, and the two types whose kernels
// differ most.
#ifdef HEED_SANITIZED
constexpr DType kTypes[] = {DType::f32, DType::bf16};
constexpr Layout kTriedLayouts[] = {Layout::padded};
#else
constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
constexpr auto& kTriedLayouts = kLayouts;
#endif

struct Point {
  const Mechanism* mechanism;
  const ExampleCase* example;
  DType dtype;
};

std::vector<Point> all_points() {
  std::vector<Point> points;
  for (const Mechanism& mechanism : mechanisms()) {
    for (const ExampleCase& example : mechanism.cases) {
      for (DType dtype : kTypes) {
        points.push_back({&mechanism, &example, dtype});
      }
    }
  }
  return points;
}

std::string point_name(const testing::TestParamInfo<Point>& info) {
  std::string name =
      info.param.mechanism->name + "_" + info.param.example->name + "_" + name_of(info.param.dtype);
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name;
}

void expect_ok(const CheckRow& row) {
  EXPECT_TRUE(row.ok()) << row.result << " " << row.failure << " " << row.difference.where
                        << "\n  error " << row.difference.error << " over bound "
                        << row.difference.bound << " = " << row.difference.ratio
                        << "\n  replay: " << row.replay;
}

class Conformance : public testing::TestWithParam<Point> {};

TEST_P(Conformance, KernelsAgreeWithTheDefinition) {
  const auto [mechanism, example, dtype] = GetParam();
  const Reference reference = make_reference(*mechanism, *example, dtype, kSeed);
  for (Isa isa : available_isas()) {
    for (Layout layout : kTriedLayouts) {
      const auto rows = check_kernel(reference, isa, layout);
      EXPECT_GE(rows.size(), mechanism->outputs.size());
      for (const CheckRow& row : rows) expect_ok(row);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Mechanisms, Conformance, testing::ValuesIn(all_points()), point_name);

TEST(Cascades, AgreeWithTheDefinition) {
  for (const Mechanism& mechanism : mechanisms()) {
    for (const ExampleCase& example : mechanism.cases) {
      const auto rows = check_cascades(mechanism, example, kSeed);
      const auto texts = cascades_for(mechanism, Spec::parse_options(example.options));
      const size_t others = example.definition.empty() ? texts.size() - 1 : 0;
      EXPECT_EQ(rows.size(), others * mechanism.outputs.size());
      for (const CheckRow& row : rows) expect_ok(row);
    }
  }
}

}  // namespace
}  // namespace heed
