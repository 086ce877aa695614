// Finding the texts of special tokens inside a text.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace heed {

/// Hash with which maps of std::string take std::string_view keys.
struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using TextIds = std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>>;

class SpecialTokens {
 public:
  /// Empty texts are ignored; of equal texts the first one stays.
  void add(std::string_view text, int32_t id);
  std::optional<int32_t> find(std::string_view text) const;

  /// Cuts a text at its special tokens, leftmost first, longest of those that start at one place.
  /// Calls plain(part) for the parts between them that are not empty, and special(id).
  void split(std::string_view text, const std::function<void(std::string_view)>& plain,
             const std::function<void(int32_t)>& special) const;

 private:
  TextIds ids_;
  // By first byte: the lengths that occur, longest first.
  std::array<std::vector<size_t>, 256> lengths_;
};

}  // namespace heed
