#include "mechanisms/spec.h"

#include <charconv>
#include <cmath>

#include "base/text.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed {
namespace {

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

[[noreturn]] void wrong_value(std::string_view key, const std::string& found, const char* needed) {
  throw Error("option " + quoted(key) + ": found " + quoted(found) + ", needed " + needed);
}

template <class T>
std::optional<T> whole(const std::string& text) {
  const char* begin = text.data();
  const char* const end = begin + text.size();
  if (text.size() > 1 && *begin == '+' && begin[1] != '-') ++begin;
  T value{};
  const auto [stop, error] = std::from_chars(begin, end, value);
  if (error != std::errc{} || stop != end) return std::nullopt;
  return value;
}

}  // namespace

Spec Spec::parse(std::string_view text) {
  const auto colon = text.find(':');
  const std::string_view name = trimmed(text.substr(0, colon));
  if (name.empty()) {
    throw Error("specification " + quoted(text) + ": no name; needed NAME or NAME:key=value,...");
  }
  if (name.find_first_of("=,") != std::string_view::npos) {
    throw Error("specification " + quoted(text) + ": found options before a name; " +
                "needed NAME:key=value,...");
  }
  Spec spec = colon == std::string_view::npos ? Spec() : parse_options(text.substr(colon + 1));
  spec.name_ = name;
  return spec;
}

Spec Spec::parse_options(std::string_view text) {
  Spec spec;
  if (trimmed(text).empty()) return spec;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string_view item = trimmed(text.substr(begin, comma - begin));
    const auto equals = item.find('=');
    if (equals == std::string_view::npos) {
      throw Error("options " + quoted(text) + ": found " + quoted(item) + ", needed key=value");
    }
    const std::string_view key = trimmed(item.substr(0, equals));
    const std::string_view value = trimmed(item.substr(equals + 1));
    if (key.empty() || value.empty()) {
      throw Error("options " + quoted(text) + ": found " + quoted(item) +
                  ", needed a key and a value around '='");
    }
    if (!spec.values_.emplace(key, value).second) {
      throw Error("options " + quoted(text) + ": key " + quoted(key) + " is given twice");
    }
    begin = comma + 1;
  }
  return spec;
}

bool Spec::has(std::string_view key) const { return values_.find(key) != values_.end(); }

std::vector<std::string> Spec::keys() const {
  std::vector<std::string> names;
  for (const auto& [key, value] : values_) names.push_back(key);
  return names;
}

std::optional<std::string> Spec::text(std::string_view key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) return std::nullopt;
  return found->second;
}

bool Spec::flag(std::string_view key, bool fallback) const {
  const auto value = text(key);
  if (!value) return fallback;
  if (*value == "1" || *value == "true" || *value == "yes" || *value == "on") return true;
  if (*value == "0" || *value == "false" || *value == "no" || *value == "off") return false;
  wrong_value(key, *value, "1, true, yes, on, 0, false, no or off");
}

std::optional<int64_t> Spec::integer(std::string_view key) const {
  const auto value = text(key);
  if (!value) return std::nullopt;
  const auto number = whole<int64_t>(*value);
  if (!number) wrong_value(key, *value, "an integer from -2^63 to 2^63 - 1");
  return number;
}

std::optional<double> Spec::number(std::string_view key) const {
  const auto value = text(key);
  if (!value) return std::nullopt;
  const auto number = whole<double>(*value);
  if (!number || std::isnan(*number)) wrong_value(key, *value, "a number");
  return number;
}

void Spec::require_known(const std::vector<std::string>& known) const {
  for (const auto& [key, value] : values_) {
    bool found = false;
    for (const std::string& name : known) found = found || name == key;
    if (found) continue;
    const std::string owner = name_.empty() ? "" : name_ + ": ";
    if (known.empty()) throw Error(owner + "unknown option " + quoted(key) + "; it takes none");
    throw Error(owner + "unknown option " + quoted(key) + did_you_mean(key, known) + "; it takes " +
                joined(known));
  }
}

std::string Spec::str() const {
  std::string options;
  for (const auto& [key, value] : values_) {
    if (!options.empty()) options += ',';
    options.append(key).append("=").append(value);
  }
  if (name_.empty() || options.empty()) return name_ + options;
  return name_ + ":" + options;
}

}  // namespace heed
