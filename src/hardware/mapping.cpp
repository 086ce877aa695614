#include "hardware/mapping.h"

#include <algorithm>

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::hardware {
namespace {

const std::vector<std::string> kCascades = {"three_pass", "two_pass", "one_pass"};

Memory parse_memory(Fields& fields) {
  const std::string text = fields.text("memory", "what goes through DRAM");
  if (text == "streamed") return Memory::streamed;
  if (text == "between_phases") return Memory::between_phases;
  if (text == "score_rows") return Memory::score_rows;
  fields.fail("memory",
              "found '" + text + "', one of streamed, between_phases, score_rows is needed");
}

Phase parse_phase(const Json& json, const std::string& where) {
  Fields fields(json, where);
  Phase phase{fields.texts("array_2d"), fields.texts("array_1d"), fields.text_or("drain", "")};
  fields.finish();
  if (!phase.drain.empty() && !(phase.matrix.empty() && phase.vector.empty())) {
    throw Error(where + ": a drain is a phase of its own");
  }
  return phase;
}

void require_tensor(const EinsumCascade& cascade, const std::string& name,
                    const std::string& file) {
  if (cascade.tensors.contains(name)) return;
  std::vector<std::string> names;
  for (const auto& [tensor, facts] : cascade.tensors) names.push_back(tensor);
  throw Error(file + ": cascade " + cascade.name + " has no tensor '" + name + "'" +
              did_you_mean(name, names) + "; it has " + joined(names));
}

void check_names(const Mapping& mapping, const std::string& file) {
  const EinsumCascade& cascade = builtin_cascade(mapping.cascade);
  std::map<std::string, int> bound;
  for (const std::string& name : mapping.resident) require_tensor(cascade, name, file);
  for (const auto& [name, readers] : mapping.forwarded) {
    require_tensor(cascade, name, file);
    for (const std::string& reader : readers) require_tensor(cascade, reader, file);
  }
  for (const Phase& phase : mapping.phases) {
    if (!phase.drain.empty()) require_tensor(cascade, phase.drain, file);
    for (const auto* list : {&phase.matrix, &phase.vector}) {
      for (const std::string& name : *list) {
        require_tensor(cascade, name, file);
        ++bound[name];
      }
    }
  }
  for (const Einsum& einsum : cascade.einsums) {
    if (bound[einsum.tensor] == 1) continue;
    throw Error(file + ": Einsum " + einsum.tensor + " of cascade " + cascade.name + " is bound " +
                std::to_string(bound[einsum.tensor]) + " times, one array in one phase is needed");
  }
  for (const auto& [name, times] : bound) cascade.einsum(name);  // throws for an input
}

}  // namespace

bool Mapping::is_resident(const std::string& tensor) const {
  return std::find(resident.begin(), resident.end(), tensor) != resident.end();
}

bool Mapping::is_forwarded(const std::string& tensor, const std::string& reader) const {
  const auto readers = forwarded.find(tensor);
  return readers != forwarded.end() &&
         std::find(readers->second.begin(), readers->second.end(), reader) != readers->second.end();
}

Mapping parse_mapping(std::string_view text, const std::string& file) {
  const Json json = parse_json(text, file);
  Fields fields(json, file);
  Mapping mapping;
  mapping.name = fields.text("name", "a short name");
  mapping.title = fields.text_or("title", "");
  mapping.machine = fields.text("machine", "the built-in machine it is meant for");
  mapping.cascade = fields.text("cascade", "three_pass, two_pass or one_pass");
  mapping.memory = parse_memory(fields);
  const std::string kinds = fields.text_or("operations_of_one_einsum", "in_turn");
  if (kinds != "in_turn" && kinds != "overlapped") {
    fields.fail("operations_of_one_einsum",
                "found '" + kinds + "', one of in_turn, overlapped is needed");
  }
  mapping.overlapped_operations = kinds == "overlapped";
  fields.allow("tiling_buffer_bytes");
  if (fields.has("tiling_buffer_bytes")) {
    mapping.tiling_buffer_bytes = fields.positive("tiling_buffer_bytes", "bytes");
  }
  mapping.resident = fields.texts("resident");
  fields.allow("forwarded");
  if (fields.has("forwarded")) {
    Fields forwarded = fields.object("forwarded", "tensor: its readers");
    for (const std::string& name : forwarded.names()) {
      mapping.forwarded[name] = forwarded.texts(name);
    }
  }
  int number = 0;
  for (const Json& phase : fields.array("phases", "the steps of one tile")) {
    mapping.phases.push_back(
        parse_phase(phase, file + ": phases[" + std::to_string(number++) + "]"));
  }
  fields.finish();
  check_names(mapping, file);
  return mapping;
}

const std::vector<std::string>& builtin_mappings() {
  static const std::vector<std::string> names = {"unfused", "flat", "cascade", "architecture",
                                                 "binding"};
  return names;
}

const Mapping& builtin_mapping(const std::string& name) {
  static const std::map<std::string, Mapping> all = [] {
    std::map<std::string, Mapping> mappings;
    for (const std::string& known : builtin_mappings()) {
      const std::string file = "data/" + known + ".mapping.json";
      mappings.emplace(known, parse_mapping(data_file(file), file));
    }
    return mappings;
  }();
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  throw Error("unknown configuration '" + name + "'" + did_you_mean(name, builtin_mappings()) +
              "; known: " + joined(builtin_mappings()));
}

const EinsumCascade& builtin_cascade(const std::string& name) {
  static const std::map<std::string, EinsumCascade> all = [] {
    std::map<std::string, EinsumCascade> cascades;
    for (const std::string& known : kCascades) {
      const std::string file = "cascades/" + known + ".cascade";
      cascades.emplace(known, to_einsums(cascade::parse(data_file(file), file)));
    }
    return cascades;
  }();
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  throw Error("unknown cascade '" + name + "'" + did_you_mean(name, kCascades) +
              "; known: " + joined(kCascades));
}

}  // namespace heed::hardware
