// "name" or "name:key=value,key=value": how the command line and example cases write options.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace heed {

class Spec {
 public:
  Spec() = default;
  /// "flash:window=256,causal=1". Throws Error on an empty name, a missing '=' or a repeated key.
  static Spec parse(std::string_view text);
  /// Only the part behind the colon: "window=256,causal=1" (may be empty).
  static Spec parse_options(std::string_view text);

  const std::string& name() const { return name_; }
  bool has(std::string_view key) const;
  std::vector<std::string> keys() const;
  /// Values by key; the fallback when absent; Error naming the key when the text is no such value.
  bool flag(std::string_view key, bool fallback = false) const;
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;
  /// Throws Error if a key is not among `known`, naming the known ones.
  void require_known(const std::vector<std::string>& known) const;
  std::string str() const;

 private:
  std::string name_;
  std::map<std::string, std::string, std::less<>> values_;
};

}  // namespace heed
