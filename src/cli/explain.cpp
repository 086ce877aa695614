// heed explain NAME: which path a call takes and why not another.
#include <fmt/format.h>

#include <memory>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/measure.h"
#include "cli/terminal.h"
#include "engine/operands.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

struct Arguments {
  std::string name, q, k, v, dtype = "float32", isa;
  std::optional<std::string> options;
  bool causal = false, json = false;
};

ExampleCase example_of(const Mechanism& mechanism, const Arguments& arguments) {
  ShapeArguments shapes;
  shapes.q = parse_shape("--q", arguments.q);
  if (!arguments.k.empty()) shapes.k = parse_shape("--k", arguments.k);
  if (!arguments.v.empty()) shapes.v = parse_shape("--v", arguments.v);
  ExampleCase example = with_shapes(mechanism.bench_cases.at(0), shapes);
  if (arguments.options) {
    example.options =
        reading("--options", [&] { return Spec::parse_options(*arguments.options); }).str();
  }
  if (arguments.causal) example.options = with_option(example.options, "causal", "1");
  return example;
}

// What operators refuse before any kernel is asked. Only mechanisms of tiles have a largest head dim.
void check_operands(const Mechanism& mechanism, const NamedTensors& in) {
  const bool cache = in.contains("k_cache");
  const OperandNames names = cache ? OperandNames{"k_cache", "v_cache"} : OperandNames();
  if (!in.contains("q") || !in.contains(names.k)) return;
  const Tensor& k = in.at(names.k);
  const Tensor& v = in.contains(names.v) ? in.at(names.v) : k;
  const Tensor& q = in.at("q");
  check_attention(
      mechanism.name.c_str(), q, k, v, names,
      mechanism.engine == "tiled" && !mechanism.any_head_dim ? kMaxHeadDim : kAnyHeadDim);
  if (cache) check_decode_queries(mechanism.name.c_str(), q);
}

// The paths for a call; its errors say where options come from that nobody gave.
std::vector<PathAnswer> answers_of(const Mechanism& mechanism, const ExampleCase& example,
                                   const Arguments& arguments, DType dtype, const RunOptions& run) {
  const Spec options = Spec::parse_options(example.options);
  const NamedTensors tensors = shapes_only(example, dtype);
  check_operands(mechanism, tensors);
  try {
    return mechanism.explain(tensors, options, run);
  } catch (const Error& error) {
    const std::string& own = mechanism.bench_cases.at(0).options;
    if (arguments.options || own.empty()) throw;
    throw Error(fmt::format("{}; the options are those of an example, {}: --options sets others",
                            error.what(), own));
  }
}

void explain(const Arguments& arguments) {
  const Mechanism& mechanism = find_mechanism(arguments.name);
  const ExampleCase example = example_of(mechanism, arguments);
  RunOptions run;
  if (!arguments.isa.empty()) run.isa = isas_to_use(arguments.isa).front();
  const DType dtype = parse_dtype(arguments.dtype);
  const auto answers = answers_of(mechanism, example, arguments, dtype, run);
  // What is wrong with an option that no path depends on shows in a call.
  if (arguments.options) {
    const ExampleCase twin = twin_of(mechanism, example);
    (void)mechanism.forward(views(make_inputs(mechanism, twin, dtype, 1)),
                            Spec::parse_options(twin.options), run);
  }
  bool chosen = false;
  Json list = Json::array();
  Table table({{"path"}, {"can run"}, {""}});
  for (const PathAnswer& answer : answers) {
    const bool first = answer.can_run && !chosen;
    chosen = chosen || first;
    list.push_back({{"path", answer.path},
                    {"can_run", answer.can_run},
                    {"chosen", first},
                    {"reason", answer.reason}});
    table.add({answer.path, answer.can_run ? "yes" : "no", first ? "chosen" : answer.reason});
  }
  if (arguments.json) return print_json(list);
  table.print();
}

}  // namespace

void add_explain(CLI::App& app, Outcome&) {
  CLI::App* command = app.add_subcommand("explain", "Which kernel runs a call, and why");
  auto arguments = std::make_shared<Arguments>();
  command->add_option("NAME", arguments->name, "Mechanism")->required();
  command
      ->add_option("--q", arguments->q,
                   "Shape of the queries: B,H,L,D, or as the mechanism has its axes, B,X,Y,H,D for "
                   "na2d")
      ->required();
  command->add_option("--k", arguments->k, "Shape of the keys; without it as the queries");
  command->add_option("--v", arguments->v, "Shape of the values; without it as the keys");
  CLI::Option* options =
      command->add_option("--options", arguments->options,
                          "Options of the call: causal=1,window=256; without it those of an "
                          "example of the mechanism");
  command->add_option("--dtype", arguments->dtype, "f64, f32, bf16 or f16")->capture_default_str();
  command->add_option("--isa", arguments->isa, "Force this path: portable, avx2, avx512, amx");
  command->add_flag("--causal", arguments->causal, "Causal mask; every path has it")
      ->excludes(options);
  command->add_flag("--json", arguments->json, "JSON");
  command->callback([arguments] { explain(*arguments); });
}

}  // namespace heed::cli
