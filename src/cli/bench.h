// heed bench in parts: what is measured, how, and what is printed of it.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "cli/bench_roofline.h"
#include "cli/measure.h"
#include "cli/terminal.h"
#include "heed/error.h"
#include "mechanisms/registry.h"

namespace heed::cli {

struct BenchArguments {
  std::vector<std::string> names;
  std::string versus, k, isa, plot, sweep, lengths;
  std::optional<std::string> options;
  std::vector<std::string> q, dtypes = {"float32"};
  std::optional<int> threads;
  double seconds = 1;
  bool backward = false, against_plan = false, json = false;

  RunOptions run() const;
};

enum class Pass { forward, backward };
const char* name_of(Pass pass);

struct BenchRow {
  const Mechanism* mechanism = nullptr;
  ExampleCase example;
  DType dtype = DType::f32;
  Pass pass = Pass::forward;
  std::string path;
  Samples heed, peer, ratio;  // milliseconds; ratio = peer / heed of neighbouring runs
  double operations = 0;      // a backward counts twice those of the forward
  double bytes = 0;           // what the call reads and writes, each once
  hardware::Roof roof;
  std::string peer_title;
  double error_over_bound = 0;
  std::string wrong;  // what the quick check found; such a row is not measured

  double median_ms() const { return quantile(heed, 0.5); }
  double gigaflops() const { return operations / (median_ms() * 1e6); }
  /// Of the least time that this machine's limits allow: 1 would be the roof itself.
  double roof_share() const { return roof.bound_s() * 1e3 / median_ms(); }
  /// Batch entries times queries; 0 where an input is no sequence.
  int64_t tokens() const;
};

/// The cases of a mechanism, in the shapes and with the options that were asked for.
std::vector<ExampleCase> cases_of(const Mechanism& mechanism, const BenchArguments& arguments);
/// Every call that will be measured; mistakes in the arguments show before the first one runs.
std::vector<BenchRow> planned_rows(const BenchArguments& arguments);
/// What refuses the arguments: one of the mechanisms that were named throws the error, where none was named
/// it gets a line on standard error.
void leave_out(const Mechanism& mechanism, const BenchArguments& arguments, const Error& error);

/// Checks and times the rows, and removes those that are left out; returns how many are wrong, each with a
/// line on standard error.
int measure(std::vector<BenchRow>& rows, const BenchArguments& arguments, Rooflines& rooflines);

/// Kernels against their cascades on small twins of the cases; each twin is computed once.
class QuickChecks {
 public:
  QuickChecks(Isa isa, bool gradients) : isa_(isa), gradients_(gradients) {}
  void check(BenchRow& row);

 private:
  struct Found {
    double error_over_bound = 0;
    std::string wrong;
  };
  Isa isa_;
  bool gradients_;
  std::map<std::string, Found> found_;
};

/// A line on standard error.
void report_wrong(const BenchRow& row);

/// "Xeon 8480+, 16 threads, avx512, g++ 12.2.0, heed 1.0": where the numbers come from.
std::string bench_header(const BenchArguments& arguments);
Json bench_header_json(const BenchArguments& arguments);
std::string spread(const Samples& samples);  // "1.2-1.4", the 20th and 80th percentile
/// What tells a row from others of its shape: "causal=1, half of the heads open".
std::string mode_of(const ExampleCase& example);
Json samples_json(const Samples& samples);
Json row_json(const BenchRow& row);
void print_rows(const std::vector<BenchRow>& rows, const BenchArguments& arguments);
/// The rows as points under this machine's limits, as SVG.
std::string bench_roofline(const std::vector<BenchRow>& rows, Rooflines& rooflines);

/// Time against length: one row a mechanism and length, and who is faster from which length on.
int sweep_lengths(const BenchArguments& arguments);
/// Neighborhood attention against dense attention, beside what tile plans predict.
int against_plan(const BenchArguments& arguments);

}  // namespace heed::cli
