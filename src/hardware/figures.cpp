#include "hardware/figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace heed::hardware {
namespace {

template <class T, class Key>
std::vector<std::string> distinct(const std::vector<T>& rows, const Key& key) {
  std::vector<std::string> names;
  for (const T& row : rows) {
    if (std::find(names.begin(), names.end(), key(row)) == names.end()) names.push_back(key(row));
  }
  return names;
}

template <class Value>
LineChart against_length(const std::vector<Row>& rows, const std::string& model,
                         const std::string& title, PlotAxis y, const Value& value) {
  LineChart chart{title, {"tokens", Scale::log2}, std::move(y), {}};
  for (const std::string& config : distinct(rows, [](const Row& r) { return r.config; })) {
    Series series{config};
    for (const Row& row : rows) {
      if (row.model != model || row.config != config) continue;
      series.points.emplace_back(static_cast<double>(row.length), value(row));
    }
    chart.series.push_back(std::move(series));
  }
  return chart;
}

/// At the longest length, relative to the first configuration.
BarChart energy_chart(const std::vector<Row>& rows, const std::string& model) {
  int64_t longest = 0;
  for (const Row& row : rows)
    longest = row.model == model ? std::max(longest, row.length) : longest;
  BarChart chart{"", "", {"2D array", "1D array", "buffer", "DRAM"}, {}};
  double first = 0;
  for (const Row& row : rows) {
    if (row.model != model || row.length != longest) continue;
    const Energy& e = row.attention.energy;
    if (first == 0) {
      first = e.total_pj();
      chart.title = fmt::format("{}: energy at {} tokens", model, longest);
      chart.y_label = "relative to " + row.config;
    }
    chart.groups.push_back(
        {row.config,
         {e.matrix_pj / first, e.vector_pj / first, e.buffer_pj / first, e.dram_pj / first}});
  }
  return chart;
}

/// Latency of the first configuration over each one's; plain seconds where there is only one.
LineChart latency_chart(const std::vector<Row>& rows, const std::string& model) {
  const std::string first = rows.front().config;
  const bool alone =
      std::all_of(rows.begin(), rows.end(), [&](const Row& row) { return row.config == first; });
  if (alone) {
    return against_length(rows, model, model + ": latency of attention", {"seconds", Scale::log10},
                          [](const Row& r) { return r.attention.latency_s; });
  }
  return against_length(rows, model, model + ": speed-up over " + first, {"times faster"},
                        [&](const Row& r) {
                          for (const Row& base : rows) {
                            if (base.config != first || base.model != r.model) continue;
                            if (base.length != r.length) continue;
                            return base.attention.latency_s / r.attention.latency_s;
                          }
                          return 0.0;
                        });
}

}  // namespace

std::string cost_figure(const std::vector<Row>& rows) {
  std::vector<Panel> panels;
  for (const std::string& model : distinct(rows, [](const Row& r) { return r.model; })) {
    const PlotAxis share{"busy elements", Scale::linear, 0, 1.05};
    panels.emplace_back(against_length(rows, model, model + ": utilisation, matrix array", share,
                                       [](const Row& r) { return r.attention.util_2d; }));
    panels.emplace_back(against_length(rows, model, model + ": utilisation, vector array", share,
                                       [](const Row& r) { return r.attention.util_1d; }));
    panels.emplace_back(latency_chart(rows, model));
    panels.emplace_back(energy_chart(rows, model));
  }
  constexpr int kColumns = 2;
  return to_svg(panels, kColumns);
}

std::string area_figure(const std::vector<AreaPoint>& points) {
  LineChart chart{
      "Latency against area", {"area, mm2", Scale::log10}, {"seconds", Scale::log10}, {}};
  for (const std::string& model : distinct(points, [](const AreaPoint& p) { return p.model; })) {
    Series series{model};
    for (const AreaPoint& p : points) {
      if (p.model == model) series.points.emplace_back(p.area_um2 * 1e-6, p.latency_s);
    }
    chart.series.push_back(std::move(series));
  }
  return to_svg({chart}, 1);
}

std::string roofline_figure(const std::vector<UnitRate>& units,
                            const std::vector<MemoryLevel>& levels,
                            const std::vector<RooflinePoint>& points) {
  LineChart chart{"Roofline",
                  {"operations per byte of inputs and results", Scale::log2},
                  {"GFLOP/s", Scale::log10},
                  {}};
  double low = 0.25, high = 64, peak = 0;
  for (const RooflinePoint& p : points) {
    if (!(p.intensity > 0) || !std::isfinite(p.intensity)) continue;
    low = std::min(low, p.intensity / 2);
    high = std::max(high, p.intensity * 2);
  }
  for (const UnitRate& unit : units) peak = std::max(peak, 2 * unit.multiply_adds_per_second);
  for (const MemoryLevel& level : levels) {
    if (level.bytes_per_second > 0) high = std::max(high, 2 * peak / level.bytes_per_second);
  }
  chart.x.low = low;
  chart.x.high = high;
  // Slanted roofs end at the fastest unit; flat ones begin at the nearest memory.
  double nearest = 0;
  for (const MemoryLevel& level : levels) nearest = std::max(nearest, level.bytes_per_second);
  for (const MemoryLevel& level : levels) {
    const double knee = std::min(high, peak / level.bytes_per_second);
    chart.series.push_back(
        {fmt::format("{} {:.0f} GB/s", level.name, level.bytes_per_second * 1e-9),
         {{low, low * level.bytes_per_second * 1e-9}, {knee, knee * level.bytes_per_second * 1e-9}},
         true,
         false,
         true});
  }
  for (const UnitRate& unit : units) {
    const double flops = 2 * unit.multiply_adds_per_second;
    const double from = std::max(low, nearest > 0 ? flops / nearest : low);
    chart.series.push_back({unit.unit, {{from, flops * 1e-9}, {high, flops * 1e-9}}, true, false});
  }
  for (const std::string& name : distinct(points, [](const RooflinePoint& p) { return p.name; })) {
    Series series{name, {}, false};
    for (const RooflinePoint& p : points) {
      if (p.name == name) series.points.emplace_back(p.intensity, p.flops * 1e-9);
    }
    chart.series.push_back(std::move(series));
  }
  return to_svg({chart}, 1, {.width = 860, .height = 620, .legend = 250});
}

}  // namespace heed::hardware
