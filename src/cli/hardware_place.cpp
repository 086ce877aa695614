// heed hardware place: what each mechanism would gain from an accelerator.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>

#include "cli/hardware.h"
#include "cli/terminal.h"
#include "cli/text_files.h"
#include "hardware/placement.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

using namespace hardware;  // NOLINT: this command shows that room

struct Arguments {
  std::vector<std::string> names;
  std::string rank, sizes, arch;
  bool json = false;
};

struct Line {
  std::string mechanism, example, cascade;
  std::string options = {};
  int passes = 0;
  PlacementCost baseline = {}, machine = {};
  double gain = 0;  // over the definition, unfused, on the baseline
};

// The largest case of each set of options.
std::vector<const ExampleCase*> cases_of(const Mechanism& mechanism) {
  std::vector<const ExampleCase*> cases;
  for (const ExampleCase& example : mechanism.bench_cases) {
    const auto same = std::find_if(cases.begin(), cases.end(), [&](const ExampleCase* other) {
      return other->options == example.options;
    });
    const auto elements = [](const ExampleCase& e) {
      int64_t count = 0;
      for (const auto& [name, shape] : e.inputs) count += element_count(shape);
      return count;
    };
    if (same == cases.end()) {
      cases.push_back(&example);
    } else if (elements(example) >= elements(**same)) {
      *same = &example;
    }
  }
  return cases;
}

std::vector<const CascadeText*> cascades_of(const Mechanism& mechanism,
                                            const ExampleCase& example) {
  if (!example.definition.empty()) return {&definition_of(mechanism, example)};
  std::vector<const CascadeText*> texts =
      cascades_for(mechanism, Spec::parse_options(example.options));
  std::erase_if(texts,
                [&](const CascadeText* text) { return defines_further_options(mechanism, *text); });
  return texts;
}

using LeftOut = std::map<std::string, std::set<std::string>>;  // cascades by reason

void say_left_out(const LeftOut& left_out) {
  for (const auto& [reason, cascades] : left_out) {
    say("heed: left out: {}: {}\n", fmt::join(cascades, ", "), reason);
  }
}

// A cascade that says nothing about the machine (a rank of other name, a missing operation) is left out.
void add_mechanism(const Mechanism& mechanism, const Machine& machine, const Sizes& sizes,
                   std::vector<Line>& lines, LeftOut& left_out) {
  const Machine& baseline = builtin_machine("baseline");
  for (const ExampleCase* example : cases_of(mechanism)) {
    double definition = 0;
    const cascade::Bindings bindings = bind_case(mechanism, *example);
    for (const CascadeText* text : cascades_of(mechanism, *example)) {
      Line line{mechanism.name, example->name, text->name};
      line.options = example->options;
      try {
        const PlacedCall call = place(machine, *text, mechanism.pass_rank, bindings, sizes);
        line.passes = call.passes;
        line.machine = placement_cost(machine, call);
        line.baseline =
            placement_cost(baseline, place(baseline, *text, mechanism.pass_rank, bindings, sizes));
      } catch (const Error& error) {
        const bool counted = passes_of(mechanism, *text).has_value();
        left_out[counted ? error.what() : "written without the rank whose passes are counted"]
            .insert(text->name + " of " + mechanism.name);
        continue;
      }
      if (definition == 0) definition = line.baseline.unfused_s;
      line.gain = definition / line.machine.overlapped_s;
      lines.push_back(line);
    }
  }
}

// The ranks that sizes can be given for: of one of the cascades that are placed.
std::vector<std::string> sized_ranks_of(const std::vector<std::string>& names) {
  std::vector<std::string> ranks;
  const auto add = [&](const cascade::Program& program) {
    for (const std::string& rank : sized_ranks(program)) {
      if (std::find(ranks.begin(), ranks.end(), rank) == ranks.end()) ranks.push_back(rank);
    }
  };
  for (const std::string& name : names) {
    if (is_cascade_file(name)) {
      add(cascade::parse(read_description("place", name), name));
      continue;
    }
    for (const CascadeText& text : mechanism_instead_of_file(name).cascades) {
      add(cascade::parse(text.text, text.name));
    }
  }
  return ranks;
}

Line line_of_file(const std::string& file, const Arguments& a, const Machine& machine,
                  const Sizes& sizes) {
  const auto program = cascade::parse(read_description("place", file), file);
  const std::string rank = a.rank.empty() ? "m" : a.rank;
  const Machine& baseline = builtin_machine("baseline");
  Line line{"-", "-", program.name()};
  const PlacedCall call = place(machine, program, rank, sizes);
  line.passes = call.passes;
  line.machine = placement_cost(machine, call);
  line.baseline = placement_cost(baseline, place(baseline, program, rank, sizes));
  line.gain = line.baseline.unfused_s / line.machine.overlapped_s;
  return line;
}

std::vector<Line> lines_of(const Arguments& a, const Machine& machine) {
  std::vector<Line> lines;
  LeftOut left_out;
  const Sizes sizes = parse_sizes(a.sizes);
  const bool files = std::any_of(a.names.begin(), a.names.end(), is_cascade_file);
  if (!a.rank.empty() && !files) throw Error("--rank: a cascade file is needed with it");
  if (!sizes.empty() && a.names.empty()) {
    throw Error("--sizes: a mechanism or a cascade file is needed with it");
  }
  if (!sizes.empty()) require_known_ranks(sizes, sized_ranks_of(a.names));
  for (const std::string& name : a.names) {
    const size_t before = lines.size();
    if (is_cascade_file(name)) {
      lines.push_back(line_of_file(name, a, machine, sizes));
    } else {
      add_mechanism(mechanism_instead_of_file(name), machine, sizes, lines, left_out);
    }
    if (lines.size() == before) {
      say_left_out(left_out);
      throw Error("place: no cascade of " + name + " runs on this machine");
    }
  }
  if (!a.names.empty()) {
    say_left_out(left_out);
    return lines;
  }
  Progress progress("placing");
  int64_t done = 0;
  for (const Mechanism& mechanism : mechanisms()) {
    progress.show(done++, static_cast<int64_t>(mechanisms().size()), mechanism.name);
    add_mechanism(mechanism, machine, sizes, lines, left_out);
  }
  progress.clear();
  say_left_out(left_out);
  return lines;
}

const char* bound_of(const PlacementCost& cost) {
  if (cost.overlapped_s <= cost.matrix_s) return "2D array";
  return cost.overlapped_s <= cost.vector_s ? "1D array" : "DRAM";
}

Json line_json(const Line& line) {
  return {{"mechanism", line.mechanism},
          {"case", line.example},
          {"options", line.options},
          {"cascade", line.cascade},
          {"passes", line.passes},
          {"baseline_unfused_s", line.baseline.unfused_s},
          {"baseline_on_chip_s", line.baseline.overlapped_s},
          {"in_turn_s", line.machine.in_turn_s},
          {"overlapped_s", line.machine.overlapped_s},
          {"gain", line.gain},
          {"bound_by", bound_of(line.machine)},
          {"util_2d", line.machine.util_2d},
          {"util_1d", line.machine.util_1d},
          {"traffic_bytes", line.machine.traffic_bytes},
          {"unfused_traffic_bytes", line.machine.unfused_bytes},
          {"energy_j", line.machine.energy_pj * 1e-12}};
}

void print_lines(const std::vector<Line>& lines) {
  constexpr auto kRight = Table::Align::right;
  Table table({{"mechanism"},
               {"case"},
               {"cascade"},
               {"passes", kRight},
               {"unfused us", kRight},
               {"on chip", kRight},
               {"+arch", kRight},
               {"+binding", kRight},
               {"gain", kRight},
               {"2D", kRight},
               {"1D", kRight},
               {"DRAM MB", kRight},
               {"bound by"}});
  const auto us = [](double seconds) { return short_number(seconds * 1e6, 4); };
  std::string last;
  for (const Line& line : lines) {
    const std::string here = line.mechanism + line.example;
    table.add({here == last ? "" : line.mechanism, here == last ? "" : line.example, line.cascade,
               std::to_string(line.passes), us(line.baseline.unfused_s),
               us(line.baseline.overlapped_s), us(line.machine.in_turn_s),
               us(line.machine.overlapped_s), fmt::format("{:.2f}x", line.gain),
               fmt::format("{:.2f}", line.machine.util_2d),
               fmt::format("{:.2f}", line.machine.util_1d),
               short_number(line.machine.traffic_bytes * 1e-6, 4), bound_of(line.machine)});
    last = here;
  }
  table.print();
  fmt::print(
      "\nunfused, on chip: on a matrix array that only multiplies, tensors through DRAM or not.\n"
      "+arch, +binding: on the machine chosen, its arrays in turn or both busy. gain: +binding "
      "over\n"
      "the definition (the first cascade of a mechanism), unfused.\n");
}

void place_command(const Arguments& arguments) {
  const Machine machine =
      arguments.arch.empty()
          ? builtin_machine("fusemax")
          : parse_machine(read_description("--arch", arguments.arch), arguments.arch);
  const std::vector<Line> lines = lines_of(arguments, machine);
  if (!arguments.json) return print_lines(lines);
  Json list = Json::array();
  for (const Line& line : lines) list.push_back(line_json(line));
  print_json(list);
}

}  // namespace

void add_hardware_place(CLI::App& hardware) {
  CLI::App* command = hardware.add_subcommand(
      "place", "Mechanisms on an accelerator: what each would gain, from its cascade alone");
  auto a = std::make_shared<Arguments>();
  command->add_option("NAME", a->names, "Mechanisms or cascade files; without it all mechanisms");
  command->add_option("--sizes", a->sizes,
                      "Rank sizes instead of the case's: p=1,m=65536 (a file needs all of them)");
  command->add_option("--rank", a->rank, "Of a file: the rank whose passes count; m without it");
  command->add_option("--arch", a->arch, "Machine from a JSON file instead of fusemax");
  command->add_flag("--json", a->json, "JSON");
  command->callback([a] { place_command(*a); });
}

}  // namespace heed::cli
