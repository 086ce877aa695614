// Reading JSON files of quantities: every key must be known, every number in range, and an error
// says file, path of the key, what was found and what is needed. Units stand in the keys.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace heed::hardware {

using Json = nlohmann::ordered_json;

/// Throws heed::Error where the text is no JSON or a key stands twice in one object.
Json parse_json(std::string_view text, const std::string& file);

/// The members of one JSON object.
class Fields {
 public:
  /// `where`: "machine.json" or "machine.json: array_2d"; throws unless the value is an object.
  Fields(const Json& value, std::string where);

  bool has(const std::string& key) const { return object_->contains(key); }
  /// What `meaning` is for: "cycles per second", shown where the key is missing.
  double positive(const std::string& key, const char* meaning);
  double number(const std::string& key, double least, double most, const char* meaning);
  int64_t whole(const std::string& key, int64_t least, int64_t most, const char* meaning);
  bool flag(const std::string& key, bool fallback);
  std::string text(const std::string& key, const char* meaning);
  std::string text_or(const std::string& key, std::string fallback);
  std::vector<std::string> texts(const std::string& key);  // none if the key is missing
  Fields object(const std::string& key, const char* meaning);
  const Json& array(const std::string& key, const char* meaning);
  /// Names of all members; reading this marks them as known.
  std::vector<std::string> names();
  /// A key that may stand there and is not read.
  void allow(const std::string& key) { known_.push_back(key); }

  /// Throws if a key was there that nobody asked for.
  void finish() const;
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;
  const std::string& where() const { return where_; }

 private:
  const Json& member(const std::string& key, const char* meaning);

  const Json* object_;
  std::string where_;
  std::vector<std::string> known_;
};

}  // namespace heed::hardware
