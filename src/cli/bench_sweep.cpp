// heed bench --sweep length: where a mechanism that is linear in tokens overtakes one that is not.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "cli/arguments.h"
#include "cli/bench.h"
#include "cli/commands.h"
#include "cli/hardware.h"
#include "cli/text_files.h"
#include "hardware/plot.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

/// One curve: a mechanism (and type, and pass) over all lengths.
struct Curve {
  std::string name;
  std::vector<const BenchRow*> rows;
};

struct Crossing {
  std::string faster, slower;
  double from_tokens = 0;  // 0: at every length measured
};

// B,H,L,D, which rows_of has made sure of.
const Dims& shape_of(const BenchRow& row) { return *input_shape(row.example, {"q", "x"}); }

int64_t length_of(const BenchRow& row) { return shape_of(row)[2]; }

std::vector<int64_t> lengths_of(const BenchArguments& a) {
  std::vector<int64_t> lengths =
      parse_numbers("--lengths", a.lengths.empty() ? "256,512,1024,2048,4096,8192" : a.lengths);
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  return lengths;
}

/// Causal where the mechanism knows it, since a running state is: the same question to all.
ExampleCase case_for(const Mechanism& mechanism, const BenchArguments& a) {
  const std::vector<ExampleCase> cases = cases_of(mechanism, a);
  for (const ExampleCase& example : cases) {
    if (Spec::parse_options(example.options).flag("causal")) return example;
  }
  return cases.front();
}

std::vector<BenchRow> rows_of(const BenchArguments& arguments) {
  BenchArguments a = arguments;
  if (a.names.empty()) a.names = {"flash_attention", "lightning_attention"};
  const Dims shape = a.q.empty() ? Dims{1, 8, 1, 64} : parse_shape("--q", a.q[0]);
  if (a.q.size() > 1 || shape.rank() != 4) {
    throw Error("--q: --sweep length takes one shape B,H,L,D and sets its length");
  }
  a.q.clear();
  std::vector<BenchRow> rows;
  for (const std::string& name : a.names) {
    const Mechanism& mechanism = find_mechanism(name);
    const ExampleCase like = case_for(mechanism, a);
    const Dims* queries = input_shape(like, {"q", "x"});
    if (queries == nullptr || queries->rank() != 4) {
      throw Error(mechanism.name + ": --sweep length needs queries B,H,L,D");
    }
    for (const std::string& dtype : a.dtypes) {
      for (Pass pass : {Pass::forward, Pass::backward}) {
        if (pass == Pass::backward && (!a.backward || !mechanism.backward)) continue;
        for (int64_t length : lengths_of(a)) {
          BenchRow& row = rows.emplace_back();
          row.mechanism = &mechanism;
          ShapeArguments sized;
          sized.q = parse_shape("--lengths",
                                fmt::format("{},{},{},{}", shape[0], shape[1], length, shape[3]));
          row.example = with_shapes(like, sized);
          row.dtype = parse_dtype(dtype);
          row.pass = pass;
        }
      }
    }
  }
  return rows;
}

std::string curve_name(const BenchRow& row) {
  std::string name = row.mechanism->name;
  if (row.pass == Pass::backward) name += " backward";
  if (row.dtype != DType::f32) name += std::string(" ") + heed::name_of(row.dtype);
  return name;
}

std::vector<Curve> curves_of(const std::vector<BenchRow>& rows) {
  std::vector<Curve> curves;
  for (const BenchRow& row : rows) {
    if (!row.wrong.empty()) continue;
    const std::string name = curve_name(row);
    if (curves.empty() || curves.back().name != name) curves.push_back({name, {}});
    curves.back().rows.push_back(&row);
  }
  return curves;
}

/// Who is faster at the longest length, and from where on: between two lengths, times are powers of the
/// length.
std::optional<Crossing> crossing_of(const Curve& a, const Curve& b) {
  const size_t n = std::min(a.rows.size(), b.rows.size());
  if (n == 0 || a.rows[0]->pass != b.rows[0]->pass || a.rows[0]->dtype != b.rows[0]->dtype) {
    return std::nullopt;
  }
  const auto gain = [&](size_t i) {  // above 0: b is faster
    return std::log(a.rows[i]->median_ms() / b.rows[i]->median_ms());
  };
  const bool b_wins = gain(n - 1) > 0;
  Crossing crossing = b_wins ? Crossing{b.name, a.name} : Crossing{a.name, b.name};
  for (size_t i = n - 1; i > 0; --i) {
    if ((gain(i - 1) > 0) == b_wins) continue;
    const double left = std::log(static_cast<double>(length_of(*a.rows[i - 1])));
    const double right = std::log(static_cast<double>(length_of(*a.rows[i])));
    const double part = gain(i - 1) / (gain(i - 1) - gain(i));
    crossing.from_tokens = std::exp(left + part * (right - left));
    break;
  }
  return crossing;
}

std::vector<Crossing> crossings_of(const std::vector<Curve>& curves) {
  std::vector<Crossing> crossings;
  for (size_t a = 0; a < curves.size(); ++a) {
    for (size_t b = a + 1; b < curves.size(); ++b) {
      if (auto crossing = crossing_of(curves[a], curves[b])) crossings.push_back(*crossing);
    }
  }
  return crossings;
}

double tokens_per_second(const BenchRow& row) {
  return static_cast<double>(row.tokens()) * 1e3 / row.median_ms();
}

std::string figure(const std::vector<Curve>& curves) {
  using hardware::LineChart;
  using hardware::Scale;
  LineChart time{"Time of a call", {"tokens", Scale::log2}, {"milliseconds", Scale::log10}, {}};
  LineChart rate{"Tokens a second", {"tokens", Scale::log2}, {"tokens/s", Scale::log10}, {}};
  for (const Curve& curve : curves) {
    hardware::Series ms{curve.name}, tokens{curve.name};
    for (const BenchRow* row : curve.rows) {
      const auto length = static_cast<double>(length_of(*row));
      ms.points.emplace_back(length, row->median_ms());
      tokens.points.emplace_back(length, tokens_per_second(*row));
    }
    time.series.push_back(std::move(ms));
    rate.series.push_back(std::move(tokens));
  }
  return hardware::to_svg({time, rate}, 2);
}

void print(const std::vector<Curve>& curves, const std::vector<Crossing>& crossings,
           const BenchArguments& arguments) {
  fmt::print("{}\n", bench_header(arguments));
  constexpr auto kRight = Table::Align::right;
  std::vector<Table::Column> columns = {{"op"},
                                        {"mode"},
                                        {"B", kRight},
                                        {"H", kRight},
                                        {"tokens", kRight},
                                        {"D", kRight},
                                        {"median ms", kRight},
                                        {"p20-p80", kRight},
                                        {"tokens/s", kRight}};
  const bool versus = !arguments.versus.empty();
  if (versus) columns.insert(columns.end(), {{"torch ms", kRight}, {"speed-up", kRight}});
  Table table(columns);
  for (const Curve& curve : curves) {
    for (const BenchRow* row : curve.rows) {
      const Dims& q = shape_of(*row);
      std::vector<std::string> cells = {curve.name, mode_of(row->example)};
      for (int axis = 0; axis < 4; ++axis) cells.push_back(std::to_string(q[axis]));
      cells.push_back(short_number(row->median_ms()));
      cells.push_back(spread(row->heed));
      cells.push_back(fmt::format("{:.0f}", tokens_per_second(*row)));
      if (versus) {
        const bool none = row->peer.empty();
        cells.push_back(none ? "-" : short_number(quantile(row->peer, 0.5)));
        cells.push_back(none ? "-" : fmt::format("{:.2f}x", quantile(row->ratio, 0.5)));
      }
      table.add(std::move(cells));
    }
  }
  table.print();
  for (const Crossing& c : crossings) {
    const std::string where = c.from_tokens > 0
                                  ? fmt::format("from about {:.0f} tokens on", c.from_tokens)
                                  : "at every length measured";
    fmt::print("{} is faster than {} {}\n", c.faster, c.slower, bold(where));
  }
}

}  // namespace

int sweep_lengths(const BenchArguments& arguments) {
  std::vector<BenchRow> rows = rows_of(arguments);
  Rooflines rooflines(arguments.run());
  const int wrong = measure(rows, arguments, rooflines);
  const std::vector<Curve> curves = curves_of(rows);
  const std::vector<Crossing> crossings = crossings_of(curves);
  if (arguments.json) {
    Json json = bench_header_json(arguments);
    json["rows"] = Json::array();
    json["crossings"] = Json::array();
    for (const Curve& curve : curves) {
      for (const BenchRow* row : curve.rows) json["rows"].push_back(row_json(*row));
    }
    for (const Crossing& c : crossings) {
      json["crossings"].push_back(
          {{"faster", c.faster},
           {"slower", c.slower},
           {"from_tokens", c.from_tokens > 0 ? Json(c.from_tokens) : Json(nullptr)}});
    }
    print_json(json);
  } else {
    print(curves, crossings, arguments);
  }
  if (!arguments.plot.empty()) write_text("--plot", arguments.plot, figure(curves));
  return wrong == 0 ? kOk : kFailureFound;
}

}  // namespace heed::cli
