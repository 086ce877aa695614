#include "hardware/placement.h"

#include <gtest/gtest.h>

#include "heed/error.h"

namespace heed::hardware {
namespace {

cascade::Program builtin(const std::string& name) {
  const std::string file = "cascades/" + name + ".cascade";
  return cascade::parse(data_file(file), file);
}

Sizes sizes_of(const Workload& w) {
  return {{"b", w.batch}, {"h", w.heads},    {"p", w.queries},
          {"m", w.keys},  {"e", w.head_dim}, {"f", w.value_dim}};
}

// Without a mapping written by hand the one-pass cascade costs what FuseMax's binding does.
TEST(Placement, FindsTheCostOfFuseMax) {
  const Machine& machine = builtin_machine("fusemax");
  for (const std::string& model : builtin_workloads()) {
    for (int64_t length : {1024, 4096, 65536}) {
      const Workload w = with_length(builtin_workload(model), length);
      const PlacementCost placed =
          placement_cost(machine, place(machine, builtin("one_pass"), "m", sizes_of(w)));
      const Cost bound = attention_cost(machine, builtin_mapping("binding"), w);
      EXPECT_NEAR(placed.overlapped_s / bound.latency_s, 1, 1e-9) << model << length;
      EXPECT_NEAR(placed.util_2d, bound.util_2d, 1e-9);
      EXPECT_NEAR(placed.util_1d, bound.util_1d, 1e-9);
      EXPECT_LE(placed.traffic_bytes, bound.traffic_bytes * (1 + 1e-9));
      if (length < 65536) {
        EXPECT_NEAR(placed.traffic_bytes / bound.traffic_bytes, 1, 1e-9);
      }
      const double in_turn = placed.in_turn_s;
      EXPECT_GT(in_turn, attention_cost(machine, builtin_mapping("architecture"), w).latency_s);
    }
  }
}

TEST(Placement, PassesDecideWhatWaitsInTheBuffer) {
  const Machine& machine = builtin_machine("fusemax");
  const auto traffic = [&](const std::string& name, int64_t length) {
    const Workload w = with_length(builtin_workload("bert"), length);
    return placement_cost(machine, place(machine, builtin(name), "m", sizes_of(w))).traffic_bytes;
  };
  // Rows of scores of 256 queries fit 16 MiB up to 4,096 keys or so, then they go through DRAM.
  EXPECT_DOUBLE_EQ(traffic("one_pass", 4096), 4.0 * 2 * 64 * 12 * 4096 * 64);
  EXPECT_GT(traffic("three_pass", 4096), traffic("one_pass", 4096));
  EXPECT_GT(traffic("three_pass", 65536), 100 * traffic("one_pass", 65536));
  EXPECT_GT(traffic("three_pass", 65536), traffic("two_pass", 65536));
}

TEST(Placement, OneQueryLeavesColumnsIdleUnlessHeadsFillThem) {
  const Machine& machine = builtin_machine("fusemax");
  Sizes sizes{{"b", 1}, {"h", 1}, {"p", 1}, {"m", 65536}, {"e", 64}, {"f", 64}};
  const auto cost = [&] {
    return placement_cost(machine, place(machine, builtin("one_pass"), "m", sizes));
  };
  const PlacementCost lone = cost();
  sizes["h"] = 256;
  const PlacementCost many = cost();
  // 256 times the work; alone only the products find a second rank, their head dim, for the columns.
  EXPECT_LT(many.matrix_s, 16 * lone.matrix_s);
  EXPECT_DOUBLE_EQ(many.traffic_bytes / lone.traffic_bytes, 256);
}

TEST(Placement, MasksAndGroupedHeadsComeFromTheCase) {
  const Machine& machine = builtin_machine("fusemax");
  const Mechanism& flash = find_mechanism("flash");
  const auto example = [](const char* options) {
    return ExampleCase{
        "t", {{"q", {1, 4, 1024, 64}}, {"k", {1, 2, 1024, 64}}, {"v", {1, 2, 1024, 64}}}, options};
  };
  const auto placed = [&](const char* options) {
    return place(machine, flash.cascades.at(0), "m", bind_case(flash, example(options)), {});
  };
  const PlacedCall causal = placed("causal=1");
  ASSERT_EQ(causal.masks.size(), 1u);
  EXPECT_DOUBLE_EQ(causal.masks[0].share, 10.0 / 16);
  EXPECT_DOUBLE_EQ(placed("").masks[0].share, 1);
  EXPECT_DOUBLE_EQ(causal.input_share.at("K"), 0.5);
  EXPECT_DOUBLE_EQ(causal.input_share.at("Q"), 1);
  EXPECT_LT(placement_cost(machine, causal).matrix_s,
            0.65 * placement_cost(machine, placed("")).matrix_s);
}

TEST(Placement, MissingSizesAndOperationsAreNamed) {
  const Machine& machine = builtin_machine("fusemax");
  EXPECT_THROW(place(machine, builtin("one_pass"), "m", {{"p", 4}}), Error);
  EXPECT_THROW(place(machine, builtin("one_pass"), "x", {}), Error);
  Machine poor = machine;
  poor.vector.cycles[static_cast<size_t>(Operation::division)] = 0;
  const PlacedCall call =
      place(machine, builtin("one_pass"), "m", sizes_of(builtin_workload("bert")));
  EXPECT_THROW(placement_cost(poor, call), Error);
}

}  // namespace
}  // namespace heed::hardware
