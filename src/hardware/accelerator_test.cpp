#include "hardware/accelerator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <sstream>

#include "hardware/flat.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

using CsvRow = std::map<std::string, std::string>;

// Published results; a clone of the repository does not have them.
std::vector<CsvRow> published(const std::string& name) {
  std::ifstream file("../shared/data/fusemax/" + name);
  std::vector<CsvRow> rows;
  std::string line;
  std::vector<std::string> header;
  while (std::getline(file, line)) {
    std::stringstream cells(line);
    std::vector<std::string> values;
    for (std::string cell; std::getline(cells, cell, ',');) values.push_back(cell);
    if (header.empty()) {
      header = values;
      continue;
    }
    CsvRow& row = rows.emplace_back();
    for (size_t i = 0; i < header.size() && i < values.size(); ++i) row[header[i]] = values[i];
  }
  return rows;
}

const Row& find(const std::vector<Row>& rows, const CsvRow& want) {
  for (const Row& row : rows) {
    if (row.config == want.at("config") && row.model == want.at("model") &&
        row.length == std::stoll(want.at("length"))) {
      return row;
    }
  }
  throw std::runtime_error("no row");
}

void expect_close(const char* what, double found, const std::string& want, double share) {
  const double expected = std::stod(want);
  EXPECT_NEAR(found / expected, 1, share) << what << " " << found << ", published " << expected;
}

TEST(Accelerator, All120PublishedRows) {
  const std::vector<CsvRow> wanted = published("attention_and_encoder.csv");
  if (wanted.empty()) GTEST_SKIP() << "no published results at ../shared/data/fusemax";
  ASSERT_EQ(wanted.size(), 120u);
  const std::vector<Row> rows = paper_rows();
  ASSERT_EQ(rows.size(), 120u);
  for (const CsvRow& want : wanted) {
    SCOPED_TRACE(want.at("config") + " " + want.at("model") + " " + want.at("length"));
    const Row& row = find(rows, want);
    expect_close("latency", row.attention.latency_s, want.at("latency_s"), 0.005);
    expect_close("2D utilisation", row.attention.util_2d, want.at("util_2d"), 0.005);
    expect_close("1D utilisation", row.attention.util_1d, want.at("util_1d"), 0.005);
    expect_close("traffic", row.attention.traffic_bytes, want.at("traffic_bytes"), 0.005);
    expect_close("linear latency", row.linear.latency_s, want.at("linear_latency_s"), 1e-9);
    expect_close("latency end to end", row.e2e_latency_s(), want.at("e2e_latency_s"), 0.005);
    const bool exact = row.config == "binding" || row.config == "architecture";
    const double energy = exact ? 0.01 : 0.05;
    expect_close("energy", row.attention.energy.total_pj(), want.at("energy_pj"), energy);
    expect_close("linear energy", row.linear.energy.total_pj(), want.at("linear_energy_pj"), 0.01);
    expect_close("energy end to end", row.e2e_energy_pj(), want.at("e2e_energy_pj"), energy);
  }
}

TEST(Accelerator, TheFourHeadlineMeans) {
  const Means means = compare(paper_rows(), "flat", "binding");
  EXPECT_EQ(means.rows, 24);
  EXPECT_NEAR(means.speedup, 6.72, 0.005);
  EXPECT_NEAR(means.energy, 0.79, 0.005);
  EXPECT_NEAR(means.e2e_speedup, 5.30, 0.005);
  EXPECT_NEAR(means.e2e_energy, 0.83, 0.005);
}

TEST(Accelerator, TheClosedFormsOfThePaper) {
  for (const std::string& model : builtin_workloads()) {
    for (int64_t length : paper_lengths()) {
      const Workload w = with_length(builtin_workload(model), length);
      const auto e = static_cast<double>(w.head_dim), m = static_cast<double>(length);
      const double u = static_cast<double>(w.batch * w.heads) * m * m / 65536 / 940e6;
      const auto cost = [&](const char* config) {
        const Mapping& mapping = builtin_mapping(config);
        return attention_cost(builtin_machine(mapping.machine), mapping, w);
      };
      const double binding = 2 * e + 10 + 256 * e / m;
      EXPECT_NEAR(cost("binding").compute_s / u, binding, 1e-9 * binding);
      EXPECT_NEAR(cost("binding").util_2d, (2 * e + 9) / binding, 1e-12);
      const double architecture = 3 * e + 266;
      EXPECT_NEAR(cost("architecture").compute_s / u, architecture, 1e-9 * architecture);
      EXPECT_NEAR(cost("architecture").util_2d, (2 * e + 9) / architecture, 1e-12);
      EXPECT_NEAR(cost("flat").compute_s / u, 1024, 1e-6);
    }
  }
}

TEST(Accelerator, PublishedAreaSweep) {
  const std::vector<CsvRow> wanted = published("area_sweep.csv");
  if (wanted.empty()) GTEST_SKIP() << "no published results at ../shared/data/fusemax";
  for (const CsvRow& want : wanted) {
    SCOPED_TRACE(want.at("model") + " " + want.at("pe_dim"));
    const Workload w =
        with_length(builtin_workload(want.at("model")), std::stoll(want.at("length")));
    const Machine machine = swept_machine(std::stoll(want.at("pe_dim")), w.head_dim);
    const Cost cost = attention_cost(machine, builtin_mapping("binding"), w);
    expect_close("latency", cost.latency_s, want.at("latency_s"), 1e-6);
    expect_close("traffic", cost.traffic_bytes, want.at("traffic_bytes"), 1e-6);
    expect_close("area", area_um2(machine), want.at("area_um2"), 0.01);
  }
}

TEST(Accelerator, FlatSearchMovesNoMoreThanThePublishedChoice) {
  const Machine& machine = builtin_machine("baseline");
  for (const std::string& model : builtin_workloads()) {
    for (int64_t length : paper_lengths()) {
      const Workload w = with_length(builtin_workload(model), length);
      const FlatChoice chosen = choose_flat(machine, w);
      EXPECT_TRUE(chosen.published);
      EXPECT_LE(flat_movement(machine, w, search_flat(machine, w)).dram_words,
                flat_movement(machine, w, chosen).dram_words);
    }
  }
  EXPECT_FALSE(choose_flat(machine, with_length(builtin_workload("bert"), 2000)).published);
}

TEST(Accelerator, RaggedTilesCostTimeAndNoEnergy) {
  const Mapping& mapping = builtin_mapping("binding");
  const Machine& machine = builtin_machine("fusemax");
  const Cost whole = attention_cost(machine, mapping, with_length(builtin_workload("bert"), 1024));
  const Cost ragged = attention_cost(machine, mapping, with_length(builtin_workload("bert"), 1000));
  EXPECT_DOUBLE_EQ(ragged.compute_s, whole.compute_s);
  EXPECT_LT(ragged.energy.total_pj(), whole.energy.total_pj());
  EXPECT_LT(ragged.util_2d, whole.util_2d);
  EXPECT_GT(ragged.util_2d, 0.9 * whole.util_2d);
}

TEST(Accelerator, CausalTilesAreSkipped) {
  Workload w = with_length(builtin_workload("bert"), 1024);
  const Machine& machine = builtin_machine("fusemax");
  const double full = attention_cost(machine, builtin_mapping("binding"), w).compute_s;
  w.causal = true;
  EXPECT_DOUBLE_EQ(visited_share(w, 256, 256), 10.0 / 16);
  EXPECT_DOUBLE_EQ(visited_share(w, 1, 1), 1025.0 / 2048);
  const double causal = attention_cost(machine, builtin_mapping("binding"), w).compute_s;
  EXPECT_LT(causal, 0.7 * full);
  EXPECT_GT(causal, 0.6 * full);
  w.queries = 1;  // the last token sees everything
  EXPECT_DOUBLE_EQ(visited_share(w, 256, 256), 1);
}

}  // namespace
}  // namespace heed::hardware
