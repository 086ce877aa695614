// heed bench: how fast the kernels are on this machine, alone or side by side with PyTorch.
#include "cli/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <memory>
#include <set>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/text_files.h"
#include "heed/error.h"
#include "libtorch/library.h"

namespace heed::cli {

RunOptions BenchArguments::run() const {
  RunOptions run_options;
  if (!isa.empty()) run_options.isa = isas_to_use(isa).front();
  return run_options;
}

const char* name_of(Pass pass) { return pass == Pass::forward ? "forward" : "backward"; }

int64_t BenchRow::tokens() const {
  const Dims* shape = input_shape(example, {"q", "out_a", "x"});
  if (shape != nullptr && shape->rank() >= 3) return (*shape)[0] * (*shape)[shape->rank() - 2];
  const Dims* grid = input_shape(example, {"query"});
  if (grid == nullptr) return 0;
  int64_t tokens = 1;
  for (int a = 0; a + 2 < grid->rank(); ++a) tokens *= (*grid)[a];
  return tokens;
}

std::vector<ExampleCase> cases_of(const Mechanism& mechanism, const BenchArguments& arguments) {
  std::vector<ExampleCase> cases = mechanism.bench_cases;
  if (arguments.options) {
    cases.resize(1);
    cases[0].options = Spec::parse_options(*arguments.options).str();
  }
  if (arguments.q.empty() && arguments.k.empty()) return cases;
  std::vector<ExampleCase> resized;
  std::set<std::pair<std::string, std::string>> modes;
  for (const ExampleCase& like : cases) {
    if (!modes.insert({like.options, like.data}).second) continue;
    ShapeArguments shapes;
    if (!arguments.k.empty()) shapes.k = parse_shape("--k", arguments.k);
    if (arguments.q.empty()) resized.push_back(with_shapes(like, shapes));
    for (const std::string& q : arguments.q) {
      shapes.q = parse_shape("--q", q);
      resized.push_back(with_shapes(like, shapes));
    }
  }
  return resized;
}

void leave_out(const Mechanism& mechanism, const BenchArguments& arguments, const Error& error) {
  if (!arguments.names.empty()) throw error;
  static std::set<std::string> said;  // types and passes are refused alike
  const std::string line = fmt::format("heed: {} is left out: {}\n", mechanism.name, error.what());
  if (said.insert(line).second) say("{}", line);
}

std::vector<BenchRow> planned_rows(const BenchArguments& arguments) {
  std::vector<const Mechanism*> chosen;
  chosen.reserve(arguments.names.size());
  for (const std::string& name : arguments.names) chosen.push_back(&find_mechanism(name));
  if (chosen.empty()) chosen = chosen_mechanisms("");
  for (const std::string& q : arguments.q) (void)parse_shape("--q", q);
  if (!arguments.k.empty()) (void)parse_shape("--k", arguments.k);
  if (arguments.options) {
    reading("--options", [&] { return Spec::parse_options(*arguments.options); });
  }
  std::vector<DType> types;
  for (const std::string& dtype : arguments.dtypes) types.push_back(parse_dtype(dtype));
  std::vector<BenchRow> rows;
  for (const Mechanism* mechanism : chosen) {
    try {
      const std::vector<ExampleCase> cases = cases_of(*mechanism, arguments);
      for (DType type : types) {
        for (const ExampleCase& example : cases) {
          BenchRow row;
          row.mechanism = mechanism;
          row.example = example;
          row.dtype = type;
          rows.push_back(row);
          if (!arguments.backward || !mechanism->backward) continue;
          row.pass = Pass::backward;
          rows.push_back(row);
        }
      }
    } catch (const Error& error) {
      leave_out(*mechanism, arguments, error);
    }
  }
  return rows;
}

namespace {

// Of `--q 1,8,512,64 1,8,1024,64 flash`, the option takes all three: a name begins with a letter.
void move_names_from_shapes(BenchArguments& a) {
  if (a.q.empty()) return;
  const auto names = std::stable_partition(a.q.begin() + 1, a.q.end(), [](const std::string& text) {
    return std::isalpha(static_cast<unsigned char>(text.c_str()[0])) == 0;
  });
  a.names.insert(a.names.end(), names, a.q.end());
  a.q.erase(names, a.q.end());
}

void require_one_kind(const BenchArguments& a) {
  if (a.sweep.empty() && !a.lengths.empty()) {
    throw Error("--lengths: --sweep length is needed with it");
  }
  if (!a.sweep.empty() && a.against_plan) {
    throw Error("--against-plan: found --sweep besides, one of the two is needed");
  }
  const auto refuse = [](const char* option, bool given, const char* with) {
    if (given) throw Error(std::string(option) + ": it does not go with " + with);
  };
  if (a.against_plan) {
    refuse("--vs", !a.versus.empty(), "--against-plan");
    refuse("--backward", a.backward, "--against-plan");
    refuse("--plot", !a.plot.empty(), "--against-plan");
    refuse("--q", !a.q.empty() || !a.k.empty(), "--against-plan");
  }
  if (!a.sweep.empty()) refuse("--k", !a.k.empty(), "--sweep");
}

int bench(const BenchArguments& arguments) {
  require_one_kind(arguments);
  if (!arguments.versus.empty() && torch_library() == nullptr) {
    throw Error(
        "--vs torch needs PyTorch's library, and this program was built without it "
        "(HEED_TORCH=OFF)");
  }
  use_threads(arguments.threads);
  if (!arguments.plot.empty()) require_writable("--plot", arguments.plot);
  if (arguments.against_plan) return against_plan(arguments);
  if (!arguments.sweep.empty()) return sweep_lengths(arguments);
  std::vector<BenchRow> rows = planned_rows(arguments);
  Rooflines rooflines(arguments.run());
  const int wrong = measure(rows, arguments, rooflines);
  if (rows.empty()) throw Error("no mechanism takes these arguments");
  print_rows(rows, arguments);
  if (!arguments.plot.empty()) {
    write_text("--plot", arguments.plot, bench_roofline(rows, rooflines));
  }
  return wrong == 0 ? kOk : kFailureFound;
}

}  // namespace

void add_bench(CLI::App& app, Outcome& outcome) {
  CLI::App* command = app.add_subcommand(
      "bench",
      "Time the kernels; GFLOP/s are 2 x the multiply-adds on visible pairs of the cascade with "
      "fewest");
  auto a = std::make_shared<BenchArguments>();
  command->add_option("NAME", a->names, "Mechanisms; without it all of them");
  command
      ->add_option("--vs", a->versus, "Alternate with the same mathematics in PyTorch: --vs torch")
      ->check(CLI::IsMember({"torch"}));
  command->add_flag("--backward", a->backward, "Also time the backward of every call");
  command->add_option("--q", a->q,
                      "Shapes of the queries: B,H,L,D ..., or as the mechanism has its axes, "
                      "B,X,Y,H,D for na2d");
  command->add_option("--k", a->k, "Shape of the keys; without it as the queries");
  command->add_option("--options", a->options, "Options of the call: causal=1,window=256");
  command->add_option("--dtype", a->dtypes, "f64, f32, bf16, f16")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("TYPE[,TYPE...]=float32");
  add_threads(*command, a->threads, "Threads of a call");
  command->add_option("--isa", a->isa, "Force this path: portable, avx2, avx512, amx");
  command->add_option("--seconds", a->seconds, "Time to measure each kernel")
      ->check(CLI::Range(0.001, 3600.0))
      ->capture_default_str();
  command
      ->add_option("--sweep", a->sweep,
                   "length: time against length, of flash and lightning without NAME")
      ->check(CLI::IsMember({"length"}));
  command->add_option("--lengths", a->lengths,
                      "Of --sweep length: 512,1024,...; without it 256 to 8192");
  command->add_flag("--against-plan", a->against_plan,
                    "na2d, na3d: the speed-up over dense attention beside what tile plans predict");
  command->add_option("--plot", a->plot,
                      "Also write a figure to this SVG file: the roofline with every row as a "
                      "point, or the sweep");
  command->add_flag("--json", a->json, "JSON");
  command->callback([a, &outcome] {
    move_names_from_shapes(*a);
    outcome.exit_code = bench(*a);
  });
}

}  // namespace heed::cli
