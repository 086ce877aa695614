#include "hardware/plot.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "hardware/figures.h"

namespace heed::hardware {
namespace {

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

void expect_well_formed(const std::string& svg) {
  EXPECT_EQ(svg.rfind("<svg ", 0), 0u);
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  EXPECT_EQ(count(svg, "<g "), count(svg, "</g>"));
  EXPECT_EQ(count(svg, "<text"), count(svg, "</text>"));
  EXPECT_EQ(count(svg, "nan"), 0u);
  EXPECT_EQ(count(svg, "inf"), 0u);
  EXPECT_NE(svg.find("prefers-color-scheme: dark"), std::string::npos);
}

TEST(Plot, LinesAndBars) {
  const LineChart lines{"a < b & c",
                        {"x", Scale::log2},
                        {"y", Scale::log10},
                        {{"one", {{1024, 1}, {4096, 10}}}, {"two", {{1024, 2}}, false}}};
  const BarChart bars{"bars", "J", {"p", "q"}, {{"g1", {1, 2}}, {"g2", {3, 0}}}};
  const std::string svg = to_svg({lines, bars}, 2);
  expect_well_formed(svg);
  EXPECT_NE(svg.find("a &lt; b &amp; c"), std::string::npos);
  EXPECT_NE(svg.find(">1K<"), std::string::npos);
  EXPECT_EQ(count(svg, "<g "), 2u);
}

TEST(Plot, ValuesThatCannotBeDrawnAreLeftOut) {
  const double inf = std::numeric_limits<double>::infinity();
  const LineChart chart{
      "t",
      {"x", Scale::log10},
      {"y", Scale::log10},
      {{"s", {{0, 1}, {-1, 1}, {1, std::nan("")}, {2, inf}, {3, 5}}}, {"none", {}}}};
  expect_well_formed(to_svg({chart, BarChart{"b", "y", {"p"}, {{"g", {std::nan(""), -1}}}}}, 2));
  expect_well_formed(to_svg({LineChart{}, BarChart{}}, 5));
  expect_well_formed(to_svg({}, 2));
}

TEST(Plot, PanelsOfOtherSizesHoldLongerLegends) {
  LineChart chart{"t", {"x"}, {"y"}, {}};
  for (int i = 0; i < 25; ++i) {
    chart.series.push_back({"series " + std::to_string(i), {{1, 1.0 + i}}});
  }
  const std::string small = to_svg({chart}, 1);
  const std::string large = to_svg({chart}, 1, {.width = 860, .height = 620, .legend = 250});
  expect_well_formed(small);
  expect_well_formed(large);
  EXPECT_EQ(small.find(">series 24<"), std::string::npos);
  EXPECT_NE(small.find(" more<"), std::string::npos);
  EXPECT_NE(large.find(">series 24<"), std::string::npos);
  EXPECT_EQ(large.find(" more<"), std::string::npos);
  EXPECT_NE(large.find("viewBox=\"0 0 860 620\""), std::string::npos);
}

TEST(Figures, PointsOfOneNameAreOneSeries) {
  const std::string svg = roofline_figure({{"float32", DType::f32, Isa::portable, 1e11}},
                                          {{"L2", 1e6, 1e11}}, {{"a", 10, 1e9}, {"a", 20, 1e9}});
  EXPECT_EQ(count(svg, ">a<"), 1u);
}

TEST(Figures, HaveOnePanelForEachQuestion) {
  const std::string costs = cost_figure(paper_rows());
  expect_well_formed(costs);
  EXPECT_EQ(count(costs, "<g "), 16u);  // 4 models x (2D, 1D, latency, energy)
  const std::string roofline =
      roofline_figure({{"float32", DType::f32, Isa::portable, 1e11}},
                      {{"L2", 1e6, 1e11}, {"DRAM", std::numeric_limits<double>::infinity(), 1e10}},
                      {{"flash", 100, 1e11}, {"empty", 0, 0}});
  expect_well_formed(roofline);
  EXPECT_NE(roofline.find(">flash<"), std::string::npos);
  expect_well_formed(area_figure({{"bert", 1e9, 100}, {"bert", 2e9, 50}}));
}

}  // namespace
}  // namespace heed::hardware
