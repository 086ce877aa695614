// Text to tokens.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "cascade/ast.h"

namespace heed::cascade {

struct Token {
  enum class Kind { name, integer, real, symbol, newline, end };
  Kind kind = Kind::end;
  std::string text;
  Place place;
};

struct Comment {
  std::string text;  // without '#', trimmed on the right and by one leading space
  int line = 0;
};

struct Tokens {
  std::vector<Token> tokens;      // ends with Kind::end
  std::vector<Comment> comments;  // in the order of the text
};

/// Throws heed::Error with file, line and column at a character that starts no token.
Tokens tokenize(std::string_view text, std::string_view file);

/// "'x'", "the end of the line", for messages.
std::string describe(const Token& token);

/// Throws heed::Error "file:line:column: message".
[[noreturn]] void fail(std::string_view file, Place place, std::string_view message);

}  // namespace heed::cascade
