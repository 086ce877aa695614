// The figures of `heed hardware` and `heed bench`.
#pragma once
#include <string>
#include <vector>

#include "hardware/accelerator.h"
#include "hardware/plot.h"
#include "hardware/processor.h"

namespace heed::hardware {

/// Utilisation of both arrays, latency and energy by component, one row of panels a model: figures 6
/// to 11 of FuseMax.
std::string cost_figure(const std::vector<Row>& rows);

struct AreaPoint {
  std::string model;
  double area_um2, latency_s;
};
std::string area_figure(const std::vector<AreaPoint>& points);

/// A call on the roofline: operations per byte of its inputs and results, operations per second.
struct RooflinePoint {
  std::string name;
  double intensity, flops;
};
std::string roofline_figure(const std::vector<UnitRate>& units,
                            const std::vector<MemoryLevel>& levels,
                            const std::vector<RooflinePoint>& points);

}  // namespace heed::hardware
