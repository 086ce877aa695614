// Figures as SVG text: lines, stacked bars, rooflines; panels of one figure side by side. Colours and
// background follow the viewer's light or dark scheme; without one, dark ink on white.
#pragma once
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace heed::hardware {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points = {};
  bool line = true;  // joined by a line; else markers alone
  bool markers = true;
  bool dashed = false;
};

enum class Scale { linear, log2, log10 };

struct PlotAxis {
  std::string label;
  Scale scale = Scale::linear;
  /// Ends of the axis; from the data where they are equal. Points outside are not drawn.
  double low = 0, high = 0;
};

struct LineChart {
  std::string title;
  PlotAxis x, y;
  std::vector<Series> series = {};
};

/// One bar a group, its parts on top of each other.
struct BarChart {
  struct Group {
    std::string label;
    std::vector<double> parts;
  };
  std::string title, y_label;
  std::vector<std::string> parts;
  std::vector<Group> groups;
};

using Panel = std::variant<LineChart, BarChart>;

/// Pixels of a panel, and of the legend at its right side.
struct PanelSize {
  double width = 560, height = 380, legend = 172;
};

/// The panels in rows of `columns`. Values that are not finite, or not positive on a logarithmic
/// axis, are left out.
std::string to_svg(const std::vector<Panel>& panels, int columns = 2, const PanelSize& size = {});

}  // namespace heed::hardware
