// What the two kinds of tokenizers have in common.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llm/tokenizer.h"

namespace heed {

/// The tokens of a file, indexed by id.
struct Vocabulary {
  std::vector<std::string> texts;
  std::vector<TokenType> types;  // as many as texts

  int32_t size() const { return static_cast<int32_t>(texts.size()); }
};

/// Turns plain text into tokens and single tokens into bytes; knows nothing of special tokens.
class TextEncoder {
 public:
  virtual ~TextEncoder() = default;
  /// Appends the tokens of a text: valid UTF-8, not empty, shorter than 2^31 bytes. `begins`: it does not
  /// go on from text before it, so add_space_prefix puts its space there.
  virtual void encode(std::string_view text, bool begins, std::vector<int32_t>& out) const = 0;
  /// The bytes of one token, control tokens included.
  virtual std::string token_bytes(int32_t id) const = 0;
  /// True when encode puts a space before the text that decoding must drop.
  virtual bool adds_space() const = 0;
};

}  // namespace heed
