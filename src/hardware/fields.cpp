#include "hardware/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::hardware {
namespace {

constexpr size_t kMostBytes = size_t{1} << 24;

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  constexpr size_t kMost = 60;
  if (text.size() > kMost) text = text.substr(0, kMost) + "...";
  return text;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& file) {
  if (text.size() > kMostBytes) throw Error(file + ": the file has more than 16 MiB");
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key &&
        !keys.back().insert(parsed.get<std::string>()).second) {
      throw Error(file + ": key '" + parsed.get<std::string>() + "' stands twice in one object");
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::exception& error) {
    std::string what =
        error.what();  // "[json.exception.parse_error.101] parse error at line 1 ..."
    if (const size_t end = what.find("] "); end != std::string::npos) what = what.substr(end + 2);
    what = what.substr(0, what.find("; last read: "));  // bytes of the file, whatever they are
    throw Error(file + ": found no valid JSON: " + what);
  }
}

Fields::Fields(const Json& value, std::string where) : object_(&value), where_(std::move(where)) {
  if (!value.is_object()) {
    throw Error(where_ + ": found " + shown(value) + ", a JSON object is needed");
  }
}

void Fields::fail(const std::string& key, const std::string& message) const {
  throw Error(where_ + ": " + key + ": " + message);
}

const Json& Fields::member(const std::string& key, const char* meaning) {
  known_.push_back(key);
  const auto found = object_->find(key);
  if (found != object_->end()) return *found;
  std::vector<std::string> there;
  for (const auto& item : object_->items()) there.push_back(item.key());
  std::string hint;
  if (const std::string close = nearest(key, there); !close.empty()) {
    hint = "; found '" + close + "', which is no such key";
  }
  for (const std::string& other : there) {
    if (key.starts_with(other + "_")) hint = "; found '" + other + "', which says no unit";
  }
  throw Error(fmt::format("{}: '{}' ({}) is missing{}", where_, key, meaning, hint));
}

double Fields::number(const std::string& key, double least, double most, const char* meaning) {
  const Json& value = member(key, meaning);
  const bool good = value.is_number() && std::isfinite(value.get<double>()) &&
                    value.get<double>() >= least && value.get<double>() <= most;
  if (!good) {
    fail(key, fmt::format("found {}, a number from {:g} to {:g} is needed ({})", shown(value),
                          least, most, meaning));
  }
  return value.get<double>();
}

double Fields::positive(const std::string& key, const char* meaning) {
  const Json& value = member(key, meaning);
  constexpr double kMost = 1e30;
  if (!value.is_number() || !(value.get<double>() > 0) || !(value.get<double>() <= kMost)) {
    fail(key, fmt::format("found {}, a number above 0 (at most 1e30) is needed ({})", shown(value),
                          meaning));
  }
  return value.get<double>();
}

int64_t Fields::whole(const std::string& key, int64_t least, int64_t most, const char* meaning) {
  const Json& value = member(key, meaning);
  // 1e6 is a whole number too.
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  const bool good = std::floor(number) == number && number >= static_cast<double>(least) &&
                    number <= static_cast<double>(most);
  if (!good) {
    fail(key, fmt::format("found {}, a whole number from {} to {} is needed ({})", shown(value),
                          least, most, meaning));
  }
  return value.is_number_float() ? static_cast<int64_t>(number) : value.get<int64_t>();
}

bool Fields::flag(const std::string& key, bool fallback) {
  if (!has(key)) return known_.push_back(key), fallback;
  const Json& value = member(key, "");
  if (!value.is_boolean()) fail(key, "found " + shown(value) + ", true or false is needed");
  return value.get<bool>();
}

std::string Fields::text(const std::string& key, const char* meaning) {
  const Json& value = member(key, meaning);
  if (!value.is_string()) {
    fail(key, "found " + shown(value) + ", a text is needed (" + meaning + ")");
  }
  return value.get<std::string>();
}

std::string Fields::text_or(const std::string& key, std::string fallback) {
  if (!has(key)) return known_.push_back(key), fallback;
  return text(key, "text");
}

std::vector<std::string> Fields::texts(const std::string& key) {
  std::vector<std::string> list;
  if (!has(key)) return known_.push_back(key), list;
  for (const Json& value : array(key, "a list of names")) {
    if (!value.is_string()) fail(key, "found " + shown(value) + ", a list of names is needed");
    list.push_back(value.get<std::string>());
  }
  return list;
}

Fields Fields::object(const std::string& key, const char* meaning) {
  return {member(key, meaning), where_ + ": " + key};
}

const Json& Fields::array(const std::string& key, const char* meaning) {
  const Json& value = member(key, meaning);
  if (!value.is_array()) {
    fail(key, "found " + shown(value) + ", a list is needed (" + meaning + ")");
  }
  return value;
}

std::vector<std::string> Fields::names() {
  std::vector<std::string> names;
  for (const auto& item : object_->items()) names.push_back(item.key());
  known_.insert(known_.end(), names.begin(), names.end());
  return names;
}

void Fields::finish() const {
  for (const auto& item : object_->items()) {
    if (std::find(known_.begin(), known_.end(), item.key()) != known_.end()) continue;
    throw Error(where_ + ": unknown key '" + item.key() + "'" + did_you_mean(item.key(), known_) +
                "; known: " + joined(known_));
  }
}

}  // namespace heed::hardware
