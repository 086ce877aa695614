#include "llm/special_tokens.h"

#include <algorithm>

namespace heed {

void SpecialTokens::add(std::string_view text, int32_t id) {
  if (text.empty() || !ids_.emplace(std::string(text), id).second) return;
  std::vector<size_t>& lengths = lengths_[static_cast<unsigned char>(text[0])];
  auto place = std::lower_bound(lengths.begin(), lengths.end(), text.size(), std::greater<>());
  if (place == lengths.end() || *place != text.size()) lengths.insert(place, text.size());
}

std::optional<int32_t> SpecialTokens::find(std::string_view text) const {
  auto found = ids_.find(text);
  return found == ids_.end() ? std::nullopt : std::optional(found->second);
}

void SpecialTokens::split(std::string_view text, const std::function<void(std::string_view)>& plain,
                          const std::function<void(int32_t)>& special) const {
  size_t begin = 0, at = 0;
  auto token_at = [&]() -> std::optional<std::pair<int32_t, size_t>> {
    for (size_t length : lengths_[static_cast<unsigned char>(text[at])])
      if (length <= text.size() - at)
        if (std::optional<int32_t> id = find(text.substr(at, length)))
          return std::pair(*id, length);
    return std::nullopt;
  };
  while (at < text.size()) {
    auto token = token_at();
    if (!token) {
      ++at;
      continue;
    }
    if (at > begin) plain(text.substr(begin, at - begin));
    special(token->first);
    begin = at += token->second;
  }
  if (at > begin) plain(text.substr(begin));
}

}  // namespace heed
