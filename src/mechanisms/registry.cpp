#include "mechanisms/registry.h"

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed {

std::vector<Mechanism> all_records();  // generated from the folders

std::span<const Mechanism> mechanisms() {
  static const std::vector<Mechanism> all = all_records();
  return all;
}

const CascadeText& definition_of(const Mechanism& mechanism, const ExampleCase& example) {
  for (const CascadeText& text : mechanism.cascades) {
    if (text.name == example.definition) return text;
  }
  return *cascades_for(mechanism, Spec::parse_options(example.options)).front();
}

const Mechanism& find_mechanism(std::string_view name) {
  constexpr std::string_view kSuffix = "_attention";
  std::vector<std::string> names, spellings;
  for (const Mechanism& mechanism : mechanisms()) {
    const std::string_view full = mechanism.name;
    const std::string_view brief =
        full.ends_with(kSuffix) ? full.substr(0, full.size() - kSuffix.size()) : full;
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
