#include "cascade/lexer.h"

#include <fmt/format.h>

#include "heed/error.h"

namespace heed::cascade {
namespace {

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  Lexer(std::string_view text, std::string_view file) : text_(text), file_(file) {}

  Tokens run() {
    while (at_ < text_.size()) step();
    if (!result_.tokens.empty() && result_.tokens.back().kind != Token::Kind::newline) {
      add(Token::Kind::newline, "");
    }
    add(Token::Kind::end, "");
    return std::move(result_);
  }

 private:
  Place place() const { return {line_, static_cast<int>(at_ - line_start_) + 1}; }
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }

  void add(Token::Kind kind, std::string_view text) {
    result_.tokens.push_back({kind, std::string(text), place()});
    at_ += text.size();
  }

  void step() {
    const char c = peek();
    if (c == '\n') return newline();
    if (c == ' ' || c == '\t' || c == '\r') {
      ++at_;
    } else if (c == '#') {
      comment();
    } else if (is_letter(c)) {
      name();
    } else if (is_digit(c) || (c == '.' && is_digit(peek(1)))) {
      number();
    } else {
      symbol();
    }
  }

  void newline() {
    // A line goes on inside brackets and behind an operator or a comma.
    const Token* last = result_.tokens.empty() ? nullptr : &result_.tokens.back();
    const bool open = last && last->kind == Token::Kind::symbol &&
                      std::string_view("+-*/^=,").find(last->text) != std::string_view::npos;
    if (depth_ <= 0 && !open && last && last->kind != Token::Kind::newline) {
      add(Token::Kind::newline, "");
    }
    ++at_;
    ++line_;
    line_start_ = at_;
  }

  void comment() {
    size_t end = text_.find('\n', at_);
    if (end == std::string_view::npos) end = text_.size();
    std::string_view body = text_.substr(at_ + 1, end - at_ - 1);
    while (!body.empty() && (body.back() == ' ' || body.back() == '\t' || body.back() == '\r')) {
      body.remove_suffix(1);
    }
    if (!body.empty() && body.front() == ' ') body.remove_prefix(1);
    result_.comments.push_back({std::string(body), line_});
    at_ = end;
  }

  void name() {
    size_t n = 0;
    while (is_letter(peek(n)) || is_digit(peek(n))) ++n;
    if (n > static_cast<size_t>(kMaxNameLength)) {
      fail(file_, place(),
           fmt::format("found a name of {} letters, expected at most {}", n, kMaxNameLength));
    }
    add(Token::Kind::name, text_.substr(at_, n));
  }

  void number() {
    size_t n = 0;
    bool real = false;
    while (is_digit(peek(n))) ++n;
    if (peek(n) == '.') {
      real = true;
      ++n;
      while (is_digit(peek(n))) ++n;
    }
    if (peek(n) == 'e' || peek(n) == 'E') {
      const size_t sign = peek(n + 1) == '+' || peek(n + 1) == '-' ? 1 : 0;
      if (is_digit(peek(n + 1 + sign))) {
        real = true;
        n += 1 + sign;
        while (is_digit(peek(n))) ++n;
      }
    }
    if (is_letter(peek(n))) {
      fail(file_, place(),
           fmt::format("found '{}', expected a number or a name, not both in one",
                       text_.substr(at_, n + 1)));
    }
    add(real ? Token::Kind::real : Token::Kind::integer, text_.substr(at_, n));
  }

  void symbol() {
    const std::string_view two = text_.substr(at_, 2);
    if (two == "<=" || two == ">=" || two == "==" || two == "!=") {
      return add(Token::Kind::symbol, two);
    }
    const char c = peek();
    if (std::string_view("()[],;:=+-*/^<>").find(c) == std::string_view::npos) {
      const auto byte = static_cast<unsigned char>(c);
      const std::string shown =
          byte >= 0x20 && byte < 0x7f ? std::string(1, c) : fmt::format("\\x{:02x}", byte);
      fail(file_, place(),
           fmt::format("found '{}', expected a name, a number or one of "
                       "( ) [ ] , ; : = + - * / ^ < >",
                       shown));
    }
    if (c == '(' || c == '[') ++depth_;
    if (c == ')' || c == ']') --depth_;
    add(Token::Kind::symbol, text_.substr(at_, 1));
  }

  std::string_view text_;
  std::string_view file_;
  size_t at_ = 0;
  size_t line_start_ = 0;
  int line_ = 1;
  int depth_ = 0;
  Tokens result_;
};

}  // namespace

Tokens tokenize(std::string_view text, std::string_view file) {
  if (text.size() > static_cast<size_t>(kMaxTextBytes)) {
    fail(file, {1, 1},
         fmt::format("found a text of {} bytes, expected at most {}", text.size(), kMaxTextBytes));
  }
  return Lexer(text, file).run();
}

std::string describe(const Token& token) {
  switch (token.kind) {
    case Token::Kind::newline:
      return "the end of the line";
    case Token::Kind::end:
      return "the end of the text";
    default:
      return fmt::format("'{}'", token.text);
  }
}

void fail(std::string_view file, Place place, std::string_view message) {
  throw Error(fmt::format("{}:{}:{}: {}", file, place.line, place.column, message));
}

}  // namespace heed::cascade
