#include "hardware/machine.h"

#include <fmt/format.h>

#include <map>
#include <stdexcept>

#include "heed/error.h"
#include "mechanisms/embedded_table.h"
#include "mechanisms/nearest.h"

namespace heed {
extern const EmbeddedFile kHardwareFiles[];  // generated
}

namespace heed::hardware {
namespace {

constexpr int64_t kMostElements = 1 << 16;         // of one side of an array
constexpr int64_t kMostTokens = int64_t{1} << 40;  // and of every other size of a layer

constexpr Operation kAll[] = {Operation::multiply_add, Operation::addition, Operation::maximum,
                              Operation::exponential,  Operation::division, Operation::other};

PerOperation parse_cycles(Fields fields) {
  PerOperation cycles{};
  for (Operation operation : kAll) {
    const std::string key = name_of(operation);
    if (!fields.has(key)) {
      fields.allow(key);
      continue;
    }
    cycles[static_cast<size_t>(operation)] =
        fields.number(key, 1e-3, 1e6, "cycles of one processing element");
  }
  fields.finish();
  return cycles;
}

ProcessingArray parse_array(Fields fields, bool matrix) {
  ProcessingArray array;
  if (matrix)
    array.rows = fields.whole("rows", 1, kMostElements, "processing elements in a column");
  array.columns = fields.whole("columns", 1, kMostElements, "processing elements in a row");
  array.cycles = parse_cycles(fields.object("cycles_per_operation", "cycles of each operation"));
  fields.finish();
  return array;
}

EnergyTable parse_energy(Fields fields) {
  constexpr double kMost = 1e9;
  EnergyTable table;
  for (Operation operation : kAll) {
    const std::string key = name_of(operation);
    fields.allow(key);
    if (!fields.has(key)) continue;
    table.operation_pj[static_cast<size_t>(operation)] =
        fields.number(key, 0, kMost, "picojoules of one operation");
  }
  table.dram_word_pj = fields.number("dram_word", 0, kMost, "picojoules of moving one word");
  table.buffer_word_read_pj = fields.number("buffer_word_read", 0, kMost, "picojoules");
  table.buffer_word_write_pj = fields.number("buffer_word_write", 0, kMost, "picojoules");
  fields.finish();
  return table;
}

AreaTable parse_area(Fields fields) {
  constexpr double kMost = 1e12;
  const char* kUnit = "square micrometres";
  AreaTable area{fields.number("pe_2d", 0, kMost, kUnit), fields.number("pe_1d", 0, kMost, kUnit),
                 fields.number("buffer_byte", 0, kMost, kUnit)};
  fields.finish();
  return area;
}

std::string builtin_file(const std::string& name, const char* kind) {
  return "data/" + name + "." + kind + ".json";
}

}  // namespace

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::multiply_add:
      return "multiply_add";
    case Operation::addition:
      return "addition";
    case Operation::maximum:
      return "maximum";
    case Operation::exponential:
      return "exponential";
    case Operation::division:
      return "division";
    case Operation::other:
      return "other";
  }
  return "?";
}

std::string_view data_file(std::string_view name) {
  for (const EmbeddedFile* file = kHardwareFiles; !file->name.empty(); ++file) {
    if (file->name == name) return file->text;
  }
  throw std::logic_error("no embedded file '" + std::string(name) + "'");
}

std::vector<std::string_view> data_files() {
  std::vector<std::string_view> names;
  for (const EmbeddedFile* file = kHardwareFiles; !file->name.empty(); ++file) {
    names.push_back(file->name);
  }
  return names;
}

Machine parse_machine(std::string_view text, const std::string& file) {
  const Json json = parse_json(text, file);
  Fields fields(json, file);
  Machine machine;
  machine.name = fields.text("name", "a short name");
  machine.title = fields.text_or("title", "");
  fields.text_or("source", "");
  machine.clock_hz = fields.positive("clock_hz", "cycles per second");
  machine.word_bytes = fields.whole("word_bytes", 1, 16, "bytes of one element");
  machine.matrix = parse_array(fields.object("array_2d", "the matrix array"), true);
  machine.vector = parse_array(fields.object("array_1d", "the vector array"), false);
  machine.buffer_bytes = fields.positive("buffer_bytes", "bytes of the on-chip buffer");
  machine.dram_bytes_per_second = fields.positive("dram_bytes_per_second", "bandwidth of DRAM");
  machine.energy = parse_energy(fields.object("energy_pj", "picojoules of each action"));
  fields.allow("area_um2");
  if (fields.has("area_um2")) machine.area = parse_area(fields.object("area_um2", "areas"));
  fields.allow("inferred");  // key -> where the number comes from, for people
  fields.finish();
  return machine;
}

const Machine& builtin_machine(const std::string& name) {
  static const std::map<std::string, Machine> all = [] {
    std::map<std::string, Machine> machines;
    for (const char* known : {"baseline", "fusemax"}) {
      const std::string file = builtin_file(known, "machine");
      machines.emplace(known, parse_machine(data_file(file), file));
    }
    return machines;
  }();
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  const std::vector<std::string> names = {"baseline", "fusemax"};
  throw Error("unknown machine '" + name + "'" + did_you_mean(name, names) +
              "; built in: " + joined(names));
}

Workload parse_workload(std::string_view text, const std::string& file) {
  const Json json = parse_json(text, file);
  Fields fields(json, file);
  Workload layer;
  layer.name = fields.text("name", "a short name");
  layer.title = fields.text_or("title", "");
  layer.batch = fields.whole("batch", 1, kMostTokens, "sequences");
  layer.heads = fields.whole("heads", 1, kMostTokens, "attention heads");
  layer.head_dim = fields.whole("head_dim", 1, kMostTokens, "elements of a query and a key");
  layer.value_dim = layer.head_dim;
  const auto optional = [&](const char* key, const char* meaning, auto& value) {
    fields.allow(key);
    if (fields.has(key)) value = fields.whole(key, 1, kMostTokens, meaning);
  };
  optional("value_dim", "elements of a value", layer.value_dim);
  if (fields.has("length") || !(fields.has("queries") && fields.has("keys"))) {
    layer.queries = fields.whole("length", 1, kMostTokens, "tokens; or give queries and keys");
    layer.keys = layer.queries;
  }
  optional("queries", "tokens that ask", layer.queries);
  optional("keys", "tokens that are asked", layer.keys);
  optional("model_dim", "elements of a token", layer.model_dim);
  optional("ffn_dim", "elements inside the feed-forward network", layer.ffn_dim);
  layer.causal = fields.flag("causal", false);
  fields.finish();
  if (layer.model_dim.has_value() != layer.ffn_dim.has_value()) {
    throw Error(file + ": model_dim and ffn_dim are needed together, or neither");
  }
  check_size(layer);
  return layer;
}

const std::vector<std::string>& builtin_workloads() {
  static const std::vector<std::string> names = {"bert", "trxl", "t5", "xlm"};
  return names;
}

const Workload& builtin_workload(const std::string& name) {
  static const std::map<std::string, Workload> all = [] {
    std::map<std::string, Workload> workloads;
    for (const std::string& known : builtin_workloads()) {
      const std::string file = builtin_file(known, "workload");
      workloads.emplace(known, parse_workload(data_file(file), file));
    }
    return workloads;
  }();
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  throw Error("unknown model '" + name + "'" + did_you_mean(name, builtin_workloads()) +
              "; built in: " + joined(builtin_workloads()));
}

Workload with_length(Workload workload, int64_t length) {
  if (length < 1 || length > kMostTokens) {
    throw Error(fmt::format("length: found {}, a number of tokens from 1 to {} is needed", length,
                            kMostTokens));
  }
  workload.queries = workload.keys = length;
  check_size(workload);
  return workload;
}

void check_size(const Workload& w) {
  const int64_t width = w.head_dim > w.value_dim ? w.head_dim : w.value_dim;
  const auto fits = [&](std::initializer_list<int64_t> factors) {
    int64_t product = 4;  // room for sums of a few of them
    for (int64_t factor : factors) {
      if (__builtin_mul_overflow(product, factor, &product)) return false;
    }
    return true;
  };
  const bool good = fits({w.batch, w.heads, w.queries, w.keys, width}) &&
                    fits({w.batch, w.queries, w.model_dim.value_or(1), w.ffn_dim.value_or(1)}) &&
                    fits({w.batch, w.queries, w.model_dim.value_or(1), w.heads, width});
  if (!good) {
    throw Error(
        fmt::format("workload {}: its operations do not fit 63 bits: batch {}, heads {}, "
                    "queries {}, keys {}, head dim {}; smaller sizes are needed",
                    w.name, w.batch, w.heads, w.queries, w.keys, width));
  }
}

}  // namespace heed::hardware
