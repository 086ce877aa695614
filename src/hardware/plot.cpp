#include "hardware/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace heed::hardware {
namespace {

// Pixels.
constexpr double kLeft = 70, kTop = 44, kBottom = 56;
constexpr double kLegendGap = 12, kLegendSign = 26, kLegendRow = 16;
constexpr double kLetter = 6.4;  // of the 12-pixel font, on average

/// What the sizes of a panel leave for its parts.
struct Layout {
  explicit Layout(const PanelSize& size)
      : width(size.width),
        height(size.height),
        legend_left(size.width - size.legend),
        plot_width(legend_left - kLegendGap - kLeft),
        plot_height(size.height - kTop - kBottom),
        legend_rows(static_cast<size_t>((size.height - kTop - kLegendRow) / kLegendRow) - 1),
        legend_letters(static_cast<size_t>((size.legend - kLegendSign) / kLetter)) {}

  double width, height, legend_left, plot_width, plot_height;
  size_t legend_rows, legend_letters;
};

// Okabe and Ito's colours, told apart with every kind of colour vision and readable on white and on
// near-black; markers and dashes repeat what they say.
constexpr const char* kColours[] = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                    "#E69F00", "#56B4E9", "#8A6D3B"};
constexpr size_t kColourCount = std::size(kColours);

constexpr const char* kStyle =
    "<style>\n"
    "text{font-family:system-ui,Helvetica,Arial,sans-serif;font-size:12px;fill:#24292f}\n"
    ".title{font-size:14px;font-weight:600}\n"
    ".paper{fill:#ffffff}\n"
    ".axis{stroke:#57606a;stroke-width:1;fill:none}\n"
    ".grid{stroke:#d0d7de;stroke-width:1;fill:none}\n"
    "@media (prefers-color-scheme: dark){\n"
    "text{fill:#e6edf3}.paper{fill:#0d1117}.axis{stroke:#9198a1}.grid{stroke:#30363d}\n"
    "}\n</style>\n";

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

struct Tick {
  double value;
  std::string label;  // may be empty: a line without a word
};

/// In steps of 1,024 or 1,000: "1K", "16M"; small numbers as "1e-06".
std::string short_label(double value, double step) {
  const char* suffixes[] = {"", "K", "M", "G", "T"};
  size_t suffix = 0;
  while (value >= step * (1 - 1e-9) && suffix + 1 < std::size(suffixes)) {
    value /= step;
    ++suffix;
  }
  return fmt::format("{:g}{}", value, suffixes[suffix]);
}

std::vector<Tick> linear_ticks(double low, double high) {
  const double rough = (high - low) / 6;
  const double magnitude = std::pow(10, std::floor(std::log10(rough)));
  double step = magnitude;
  for (double factor : {1.0, 2.0, 5.0, 10.0}) {
    step = factor * magnitude;
    if (step >= rough) break;
  }
  std::vector<Tick> ticks;
  const auto first = static_cast<int64_t>(std::ceil(low / step - 1e-9));
  const auto last = static_cast<int64_t>(std::floor(high / step + 1e-9));
  for (int64_t i = first; i <= last; ++i) {
    const double value = static_cast<double>(i) * step;
    ticks.push_back({value, fmt::format("{:g}", value)});
  }
  return ticks;
}

std::vector<Tick> log_ticks(double low, double high, Scale scale) {
  const double base = scale == Scale::log2 ? 2 : 10;
  const auto exponent = [&](double v) { return std::log(v) / std::log(base); };
  const int first = static_cast<int>(std::ceil(exponent(low) - 1e-9));
  const int last = static_cast<int>(std::floor(exponent(high) + 1e-9));
  const int every = std::max(1, (last - first + 6) / 7);
  std::vector<Tick> ticks;
  for (int e = first; e <= last; ++e) {
    const double value = std::pow(base, e);
    const bool named = (e - first) % every == 0;
    ticks.push_back({value, named ? short_label(value, scale == Scale::log2 ? 1024 : 1000) : ""});
  }
  return ticks;
}

/// Values along one side of the plot.
class Ruler {
 public:
  Ruler(const PlotAxis& axis, std::vector<double> values, double from, double to)
      : scale_(axis.scale), from_(from), to_(to) {
    low_ = axis.low;
    high_ = axis.high;
    std::erase_if(values, [&](double v) { return !shows_kind(v); });
    if (low_ == high_ && !values.empty()) {
      low_ = *std::min_element(values.begin(), values.end());
      high_ = *std::max_element(values.begin(), values.end());
      widen();
    }
    if (!(high_ > low_)) {
      low_ = scale_ == Scale::linear ? 0 : 1;
      high_ = scale_ == Scale::linear ? 1 : 10;
    }
  }

  bool shows(double value) const {
    constexpr double kSlack = 1e-9;
    return shows_kind(value) && place(value) >= -kSlack && place(value) <= 1 + kSlack;
  }
  double at(double value) const { return from_ + place(value) * (to_ - from_); }
  std::vector<Tick> ticks() const {
    return scale_ == Scale::linear ? linear_ticks(low_, high_) : log_ticks(low_, high_, scale_);
  }

 private:
  bool shows_kind(double value) const {
    return std::isfinite(value) && (scale_ == Scale::linear || value > 0);
  }
  double place(double value) const {
    if (scale_ == Scale::linear) return (value - low_) / (high_ - low_);
    return std::log(value / low_) / std::log(high_ / low_);
  }
  void widen() {
    if (scale_ == Scale::linear) {
      if (low_ > 0) low_ = 0;
      high_ += (high_ - low_) * 0.05;
    } else if (scale_ == Scale::log10) {
      low_ = std::pow(10, std::floor(std::log10(low_)));
      high_ = std::pow(10, std::ceil(std::log10(high_) + 1e-9));
    } else {
      low_ /= std::sqrt(2.0);
      high_ *= std::sqrt(2.0);
    }
  }

  Scale scale_;
  double from_, to_, low_ = 0, high_ = 0;
};

std::string text_at(double x, double y, const std::string& text, const char* anchor,
                    const char* more = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\"{}>{}</text>\n", x, y,
                     anchor, more, escaped(text));
}

std::string line_at(double x0, double y0, double x1, double y1, const char* kind) {
  return fmt::format("<path class=\"{}\" d=\"M{:.1f} {:.1f}L{:.1f} {:.1f}\"/>\n", kind, x0, y0, x1,
                     y1);
}

const char* colour(size_t i) { return kColours[i % kColourCount]; }

/// Shapes change once all colours were used, so that 28 series differ.
std::string marker(double x, double y, size_t i) {
  const char* fill = colour(i);
  constexpr double r = 4.2;
  switch ((i % kColourCount + i / kColourCount) % 4) {
    case 0:
      return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\" fill=\"{}\"/>\n", x, y, r,
                         fill);
    case 1:
      return fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>\n", x - r + 0.5,
          y - r + 0.5, 2 * r - 1, 2 * r - 1, fill);
    case 2:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l{} {}l{} {}l{} {}z\" fill=\"{}\"/>\n", x,
                         y - r - 0.8, r + 0.8, r + 0.8, -r - 0.8, r + 0.8, -r - 0.8, -r - 0.8,
                         fill);
    default:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l{} {}h{}z\" fill=\"{}\"/>\n", x, y - r - 0.5,
                         r + 0.8, 2 * r, -2 * r - 1.6, fill);
  }
}

std::string frame(const Layout& at, const std::string& title, const Ruler* x, const Ruler& y,
                  const std::string& x_label, const std::string& y_label) {
  std::string svg = text_at(kLeft, 24, title, "start", " class=\"title\"");
  for (const Tick& tick : y.ticks()) {
    svg += line_at(kLeft, y.at(tick.value), kLeft + at.plot_width, y.at(tick.value), "grid");
    svg += text_at(kLeft - 8, y.at(tick.value) + 4, tick.label, "end");
  }
  if (x != nullptr) {
    for (const Tick& tick : x->ticks()) {
      svg += line_at(x->at(tick.value), kTop, x->at(tick.value), kTop + at.plot_height, "grid");
      svg += text_at(x->at(tick.value), kTop + at.plot_height + 18, tick.label, "middle");
    }
  }
  svg += fmt::format("<path class=\"axis\" d=\"M{} {}V{}H{}\"/>\n", kLeft, kTop,
                     kTop + at.plot_height, kLeft + at.plot_width);
  svg += text_at(kLeft + at.plot_width / 2, at.height - 14, x_label, "middle");
  svg += fmt::format(
      "<text transform=\"translate(16 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
      kTop + at.plot_height / 2, escaped(y_label));
  return svg;
}

std::string legend_text(const Layout& at, size_t i, const std::string& name) {
  const std::string shown =
      name.size() > at.legend_letters ? name.substr(0, at.legend_letters - 2) + ".." : name;
  const double baseline = kTop + 12 + static_cast<double>(i) * kLegendRow;
  return text_at(at.legend_left + kLegendSign, baseline, shown, "start");
}

double legend_y(size_t i) { return kTop + 8 + static_cast<double>(i) * kLegendRow; }

std::string drawn(const Layout& at, const LineChart& chart) {
  std::vector<double> xs, ys;
  for (const Series& series : chart.series) {
    for (const auto& [x, y] : series.points) {
      xs.push_back(x);
      ys.push_back(y);
    }
  }
  const Ruler x(chart.x, xs, kLeft, kLeft + at.plot_width);
  const Ruler y(chart.y, ys, kTop + at.plot_height, kTop);
  std::string svg = frame(at, chart.title, &x, y, chart.x.label, chart.y.label);
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const Series& series = chart.series[i];
    std::string path, marks;
    for (const auto& [px, py] : series.points) {
      if (!x.shows(px) || !y.shows(py)) continue;
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x.at(px), y.at(py));
      if (series.markers) marks += marker(x.at(px), y.at(py), i);
    }
    const std::string stroke =
        fmt::format(" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{}", colour(i),
                    series.dashed ? " stroke-dasharray=\"6 4\"" : "");
    if (series.line && !path.empty()) svg += fmt::format("<path d=\"{}\"{}/>\n", path, stroke);
    svg += marks;
    if (i >= at.legend_rows) continue;
    const double left = at.legend_left, middle = legend_y(i);
    if (series.line) svg += fmt::format("<path d=\"M{} {}h20\"{}/>\n", left, middle, stroke);
    if (series.markers) svg += marker(left + 10, middle, i);
    svg += legend_text(at, i, series.name);
  }
  if (chart.series.size() > at.legend_rows) {
    svg += legend_text(at, at.legend_rows,
                       fmt::format("and {} more", chart.series.size() - at.legend_rows));
  }
  return svg;
}

std::string drawn(const Layout& at, const BarChart& chart) {
  std::vector<double> tops = {0};
  for (const BarChart::Group& group : chart.groups) {
    double top = 0;
    for (double part : group.parts) top += std::isfinite(part) && part > 0 ? part : 0;
    tops.push_back(top);
  }
  const Ruler y({chart.y_label}, tops, kTop + at.plot_height, kTop);
  std::string svg = frame(at, chart.title, nullptr, y, "", chart.y_label);
  const double step = at.plot_width / static_cast<double>(std::max<size_t>(1, chart.groups.size()));
  for (size_t g = 0; g < chart.groups.size(); ++g) {
    const BarChart::Group& group = chart.groups[g];
    const double left = kLeft + (static_cast<double>(g) + 0.15) * step;
    double below = 0;
    for (size_t i = 0; i < group.parts.size(); ++i) {
      const double part = group.parts[i];
      if (!std::isfinite(part) || !(part > 0)) continue;
      svg += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.2f}\" width=\"{:.1f}\" height=\"{:.2f}\" fill=\"{}\"/>\n",
          left, y.at(below + part), 0.7 * step, y.at(below) - y.at(below + part), colour(i));
      below += part;
    }
    svg += fmt::format(
        "<text transform=\"translate({:.1f} {:.1f}) rotate(-25)\" text-anchor=\"end\">{}</text>\n",
        left + 0.45 * step, kTop + at.plot_height + 16, escaped(group.label));
  }
  for (size_t i = 0; i < chart.parts.size() && i < at.legend_rows; ++i) {
    svg += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{}\"/>\n",
                       at.legend_left + 4, legend_y(i) - 7, colour(i));
    svg += legend_text(at, i, chart.parts[i]);
  }
  return svg;
}

}  // namespace

std::string to_svg(const std::vector<Panel>& panels, int columns, const PanelSize& size) {
  const Layout at(size);
  columns = std::clamp(columns, 1, std::max<int>(1, static_cast<int>(panels.size())));
  const int rows = (static_cast<int>(panels.size()) + columns - 1) / columns;
  const double width = at.width * columns, height = at.height * std::max(1, rows);
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" "
      "viewBox=\"0 0 {0} {1}\">\n{2}<rect class=\"paper\" width=\"{0}\" height=\"{1}\"/>\n",
      width, height, kStyle);
  for (size_t i = 0; i < panels.size(); ++i) {
    const size_t column = i % static_cast<size_t>(columns), row = i / static_cast<size_t>(columns);
    svg +=
        fmt::format("<g transform=\"translate({} {})\">\n", static_cast<double>(column) * at.width,
                    static_cast<double>(row) * at.height);
    svg += std::visit([&at](const auto& chart) { return drawn(at, chart); }, panels[i]);
    svg += "</g>\n";
  }
  return svg + "</svg>\n";
}

}  // namespace heed::hardware
