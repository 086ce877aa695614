// Tokens to expressions: the cursor over the tokens and the parts of the grammar that nest.
#pragma once
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "cascade/ast.h"
#include "cascade/lexer.h"

namespace heed::cascade {

class ExpressionParser {
 protected:
  ExpressionParser(Tokens tokens, std::string_view file) : tokens_(std::move(tokens)), file_(file) {
    ast_.file = std::string(file);
  }

  const Token& token(size_t ahead = 0) const {
    return tokens_.tokens[std::min(at_ + ahead, tokens_.tokens.size() - 1)];
  }
  bool is_symbol(std::string_view text, size_t ahead = 0) const {
    return token(ahead).kind == Token::Kind::symbol && token(ahead).text == text;
  }
  bool is_name() const { return token().kind == Token::Kind::name; }
  bool is_word(std::string_view word) const { return is_name() && token().text == word; }
  Token next() { return tokens_.tokens[at_ + 1 < tokens_.tokens.size() ? at_++ : at_]; }
  bool accept(std::string_view symbol);
  [[noreturn]] void fail_here(std::string_view expected) const;
  void expect(std::string_view symbol);
  void expect_word(std::string_view word);
  static bool reserved(std::string_view word);
  std::string new_name(std::string_view what);
  /// True at `max(` ... `,` ... `)`, the function of two values; false at a reduction.
  bool is_call_of_two() const;
  bool comparison_here() const;
  Compare comparison();
  int add(Expr e);
  int add(Expr::Kind kind, Place place, std::vector<int> args);
  void check_depth(int depth, Place place) const;
  int sum();
  int product();
  int unary();
  int primary();
  int call(const std::string& name, Place place);
  double number();
  int64_t integer();
  int add(Index i);
  int add(Index::Kind kind, Place place, std::vector<int> args);
  std::vector<int> index_list(std::string_view open, std::string_view close);
  int index_sum();
  int index_product();
  int index_primary();

  /// Counts recursion, which brackets and signs drive without making nodes.
  struct Nested {
    explicit Nested(ExpressionParser& p);
    ~Nested() { --parser.depth_; }
    ExpressionParser& parser;
  };

  Tokens tokens_;
  std::string_view file_;
  Ast ast_;
  size_t at_ = 0;
  int depth_ = 0;
};

/// "sum", "max" or "min".
bool is_reduction(std::string_view word);

}  // namespace heed::cascade
