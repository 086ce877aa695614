#include "mechanisms/registry.h"

#include <algorithm>
#include <charconv>

#include "cascade/ast.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed {

std::vector<Mechanism> all_records();  // generated from the folders

std::span<const Mechanism> mechanisms() {
  static const std::vector<Mechanism> all = [] {
    std::vector<Mechanism> records = all_records();
    for (Mechanism& m : records) {
      if (!m.forward_for_backward) continue;
      m.backward = [prepare = m.forward_for_backward](const NamedTensors& in,
                                                      const NamedTensors& out_gradients,
                                                      const Spec& options, const RunOptions& run) {
        return prepare(in, options, run)(out_gradients);
      };
    }
    return records;
  }();
  return all;
}

BackwardCall prepare_backward(const Mechanism& mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run) {
  if (mechanism.forward_for_backward) return mechanism.forward_for_backward(in, options, run);
  return [&mechanism, in, options, run](const NamedTensors& out_gradients) {
    return mechanism.backward(in, out_gradients, options, run);
  };
}

namespace {

// The definition that cases name which have one of these options, where no case without has it; or none.
std::string definition_of_options(const Mechanism& mechanism, const Spec& options) {
  const auto has = [](const ExampleCase& example, const std::string& key) {
    return Spec::parse_options(example.options).has(key);
  };
  for (const std::string& key : options.keys()) {
    std::string definition;
    bool plain = false;
    for (const ExampleCase& example : mechanism.cases) {
      if (!has(example, key)) continue;
      plain |= example.definition.empty();
      definition = example.definition;
    }
    if (!plain && !definition.empty()) return definition;
  }
  return "";
}

}  // namespace

const CascadeText& definition_of(const Mechanism& mechanism, const ExampleCase& example) {
  const Spec options = Spec::parse_options(example.options);
  const std::string name =
      example.definition.empty() ? definition_of_options(mechanism, options) : example.definition;
  for (const CascadeText& text : mechanism.cascades) {
    if (text.name == name) return text;
  }
  return *cascades_for(mechanism, options).front();
}

bool defines_further_options(const Mechanism& mechanism, const CascadeText& text) {
  return text.when.empty() && text.name != mechanism.cascades.front().name &&
         std::any_of(mechanism.cases.begin(), mechanism.cases.end(),
                     [&](const ExampleCase& example) { return example.definition == text.name; });
}

std::optional<cascade::PassReport> passes_of(const Mechanism& mechanism, const CascadeText& text) {
  const cascade::Program program = cascade::parse(text.text, text.name);
  const auto& ranks = program.ast().ranks;
  const bool has_rank = std::any_of(ranks.begin(), ranks.end(), [&](const auto& rank) {
    return rank.name == mechanism.pass_rank;
  });
  if (!has_rank) return std::nullopt;
  return cascade::count_passes(program, mechanism.pass_rank);
}

ExampleCase random_case(const Mechanism& mechanism, uint64_t seed) {
  ExampleCase example = mechanism.random_case ? mechanism.random_case(seed)
                                              : mechanism.cases.at(seed % mechanism.cases.size());
  example.name = "random:" + std::to_string(seed);
  return example;
}

ExampleCase find_case(const Mechanism& mechanism, const std::string& name) {
  constexpr std::string_view kRandom = "random:";
  if (name.starts_with(kRandom)) {
    uint64_t seed = 0;
    const char *begin = name.data() + kRandom.size(), *end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(begin, end, seed);
    if (error == std::errc() && stop == end) return random_case(mechanism, seed);
  }
  std::vector<std::string> names;
  for (const ExampleCase& example : mechanism.cases) {
    if (name == example.name) return example;
    names.push_back(example.name);
  }
  throw Error(mechanism.name + ": unknown case '" + name + "'" + did_you_mean(name, names) +
              "; known: " + joined(names) + " and random:SEED");
}

std::string_view brief_name(const Mechanism& mechanism) {
  constexpr std::string_view kSuffix = "_attention";
  std::string_view name = mechanism.name;
  if (name.ends_with(kSuffix)) name.remove_suffix(kSuffix.size());
  return name;
}

const Mechanism& find_mechanism(std::string_view name) {
  std::vector<std::string> names, spellings;
  for (const Mechanism& mechanism : mechanisms()) {
    const std::string_view full = mechanism.name, brief = brief_name(mechanism);
    if (name == full || name == brief) return mechanism;
    names.emplace_back(full);
    spellings.emplace_back(full);
    spellings.emplace_back(brief);
  }
  throw Error("unknown mechanism '" + std::string(name) + "'" + did_you_mean(name, spellings) +
              "; known: " + joined(names));
}

std::vector<const CascadeText*> cascades_for(const Mechanism& mechanism, const Spec& options) {
  std::vector<const CascadeText*> texts;
  for (const CascadeText& text : mechanism.cascades) {
    const size_t equals = text.when.find('=');
    if (text.when.empty() ||
        options.text(text.when.substr(0, equals)) == text.when.substr(equals + 1)) {
      texts.push_back(&text);
    }
  }
  if (texts.empty()) {
    throw Error(mechanism.name + ": no cascade defines the options '" + options.str() + "'");
  }
  return texts;
}

}  // namespace heed
