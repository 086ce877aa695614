#include "cascade/expressions.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>

#include "cascade/functions.h"

namespace heed::cascade {
namespace {

constexpr std::array<std::string_view, 9> kKeywords = {"cascade", "batch", "rank", "size", "split",
                                                       "in",      "where", "let",  "out"};
constexpr std::array<std::string_view, 3> kReductions = {"sum", "max", "min"};

template <size_t N>
bool among(const std::array<std::string_view, N>& words, std::string_view word) {
  for (std::string_view w : words) {
    if (w == word) return true;
  }
  return false;
}

}  // namespace

bool is_reduction(std::string_view word) { return among(kReductions, word); }

ExpressionParser::Nested::Nested(ExpressionParser& p) : parser(p) {
  // The printed form of an expression may nest its brackets deeper than the text it came from.
  parser.check_depth(++parser.depth_ / 4, parser.token().place);
}

bool ExpressionParser::accept(std::string_view symbol) {
  if (!is_symbol(symbol)) return false;
  next();
  return true;
}

void ExpressionParser::fail_here(std::string_view expected) const {
  fail(file_, token().place, fmt::format("found {}, expected {}", describe(token()), expected));
}

void ExpressionParser::expect(std::string_view symbol) {
  if (!accept(symbol)) fail_here(fmt::format("'{}'", symbol));
}

void ExpressionParser::expect_word(std::string_view word) {
  if (!is_word(word)) fail_here(fmt::format("'{}'", word));
  next();
}

bool ExpressionParser::reserved(std::string_view word) {
  return among(kKeywords, word) || among(kReductions, word) || find_function(word) != nullptr;
}

std::string ExpressionParser::new_name(std::string_view what) {
  if (!is_name()) fail_here(what);
  if (reserved(token().text)) {
    fail(file_, token().place,
         fmt::format("found '{}', a word of the language, expected {}", token().text, what));
  }
  return next().text;
}

bool ExpressionParser::is_call_of_two() const {
  if (!is_symbol("(", 1)) return false;
  int depth = 0;
  for (size_t ahead = 1; token(ahead).kind != Token::Kind::end; ++ahead) {
    if (is_symbol("(", ahead) || is_symbol("[", ahead)) ++depth;
    if (is_symbol(")", ahead) || is_symbol("]", ahead)) --depth;
    if (depth == 1 && is_symbol(",", ahead)) return true;
    if (depth == 0) return false;
  }
  return false;
}

bool ExpressionParser::comparison_here() const {
  static constexpr std::array<std::string_view, 9> kSigns = {
      "<", "<=", ">", ">=", "==", "!=", "+", "-", "*"};
  return token().kind == Token::Kind::symbol && among(kSigns, token().text);
}

Compare ExpressionParser::comparison() {
  static constexpr std::array<std::string_view, 6> kSigns = {"<", "<=", ">", ">=", "==", "!="};
  for (size_t i = 0; i < kSigns.size(); ++i) {
    if (accept(kSigns[i])) return static_cast<Compare>(i);
  }
  fail_here("one of < <= > >= == !=");
}

int ExpressionParser::add(Expr e) {
  for (int arg : e.args) e.depth = std::max(e.depth, ast_.exprs[size_t(arg)].depth + 1);
  check_depth(e.depth, e.place);
  ast_.exprs.push_back(std::move(e));
  return static_cast<int>(ast_.exprs.size()) - 1;
}

int ExpressionParser::add(Expr::Kind kind, Place place, std::vector<int> args) {
  Expr e;
  e.kind = kind;
  e.place = place;
  e.args = std::move(args);
  return add(std::move(e));
}

void ExpressionParser::check_depth(int depth, Place place) const {
  if (depth > kMaxDepth) {
    fail(file_, place,
         fmt::format("found an expression nested deeper than {}, expected a flatter one: write "
                     "parts of it as statements of their own",
                     kMaxDepth));
  }
}

int ExpressionParser::sum() {
  int left = -1;
  const Place start = token().place;
  if (accept("-")) {
    left = add(Expr::Kind::negate, start, {product()});
  } else {
    accept("+");
    left = product();
  }
  while (is_symbol("+") || is_symbol("-")) {
    const Token sign = next();
    const int right = product();
    left =
        add(sign.text == "+" ? Expr::Kind::add : Expr::Kind::subtract, sign.place, {left, right});
  }
  return left;
}

int ExpressionParser::product() {
  int left = unary();
  while (is_symbol("*") || is_symbol("/")) {
    const Token sign = next();
    const int right = unary();
    left = add(sign.text == "*" ? Expr::Kind::multiply : Expr::Kind::divide, sign.place,
               {left, right});
  }
  return left;
}

int ExpressionParser::unary() {
  const Nested nested(*this);
  const Place place = token().place;
  if (accept("-")) return add(Expr::Kind::negate, place, {unary()});
  const int base = primary();
  const Place sign = token().place;
  if (accept("^")) return add(Expr::Kind::power, sign, {base, unary()});
  return base;
}

int ExpressionParser::primary() {
  const Place place = token().place;
  if (token().kind == Token::Kind::integer || token().kind == Token::Kind::real) {
    Expr e;
    e.place = place;
    e.number = number();
    return add(std::move(e));
  }
  if (accept("(")) {
    const int inside = sum();
    expect(")");
    return inside;
  }
  if (!is_name()) fail_here("a value");
  const std::string name = token().text;
  if (among(kReductions, name) && !is_call_of_two()) {
    fail(file_, place,
         fmt::format("found the reduction '{}' inside an expression, expected it at the head of "
                     "a term: write it as a statement of its own",
                     name));
  }
  if (among(kKeywords, name)) fail_here("a value");
  next();
  if (is_symbol("(")) return call(name, place);
  if (find_function(name) != nullptr) {  // log RD[p]
    Expr e;
    e.kind = Expr::Kind::call;
    e.name = name;
    e.place = place;
    const Nested nested(*this);
    e.args.push_back(primary());
    return add(std::move(e));
  }
  Expr e;
  e.kind = Expr::Kind::name;
  e.name = name;
  e.place = place;
  if (is_symbol("[")) {
    e.bracketed = true;
    e.indices = index_list("[", "]");
  }
  return add(std::move(e));
}

int ExpressionParser::call(const std::string& name, Place place) {
  const Nested nested(*this);
  Expr e;
  e.kind = Expr::Kind::call;
  e.name = name;
  e.place = place;
  expect("(");
  do {
    const int left = sum();
    if (e.args.empty() && name == "select" && !is_symbol(",")) {
      Expr c;
      c.kind = Expr::Kind::compare;
      c.place = token().place;
      c.compare = comparison();
      c.args = {left, sum()};
      e.args.push_back(add(std::move(c)));
    } else {
      e.args.push_back(left);
    }
  } while (accept(","));
  expect(")");
  return add(std::move(e));
}

double ExpressionParser::number() {
  const Token t = token();
  double value = 0;
  const auto [end, error] = std::from_chars(t.text.data(), t.text.data() + t.text.size(), value);
  if (t.kind != Token::Kind::integer && t.kind != Token::Kind::real) fail_here("a number");
  if (error != std::errc() || end != t.text.data() + t.text.size() || !std::isfinite(value)) {
    fail_here("a number that float64 can hold");
  }
  next();
  return value;
}

int64_t ExpressionParser::integer() {
  const Token t = token();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(t.text.data(), t.text.data() + t.text.size(), value);
  if (error != std::errc() || end != t.text.data() + t.text.size() || value > 1'000'000'000) {
    fail_here("a whole number up to 1000000000");
  }
  next();
  return value;
}

int ExpressionParser::add(Index i) {
  for (int arg : i.args) i.depth = std::max(i.depth, ast_.indices[size_t(arg)].depth + 1);
  check_depth(i.depth, i.place);
  ast_.indices.push_back(std::move(i));
  return static_cast<int>(ast_.indices.size()) - 1;
}

int ExpressionParser::add(Index::Kind kind, Place place, std::vector<int> args) {
  Index i;
  i.kind = kind;
  i.place = place;
  i.args = std::move(args);
  return add(std::move(i));
}

std::vector<int> ExpressionParser::index_list(std::string_view open, std::string_view close) {
  std::vector<int> list;
  expect(open);
  do {
    if (list.size() >= static_cast<size_t>(kMaxAxes)) {
      fail_here(fmt::format("at most {} indices", kMaxAxes));
    }
    list.push_back(index_sum());
  } while (accept(","));
  if (!is_symbol(close)) fail_here(fmt::format("',' or '{}'", close));
  next();
  return list;
}

int ExpressionParser::index_sum() {
  const Nested nested(*this);
  const Place start = token().place;
  int left = accept("-") ? add(Index::Kind::negate, start, {index_product()}) : index_product();
  while (is_symbol("+") || is_symbol("-")) {
    const Token sign = next();
    const int right = index_product();
    left =
        add(sign.text == "+" ? Index::Kind::add : Index::Kind::subtract, sign.place, {left, right});
  }
  return left;
}

int ExpressionParser::index_product() {
  int left = index_primary();
  while (is_symbol("*")) {
    const Place sign = next().place;
    const int right = index_primary();
    left = add(Index::Kind::multiply, sign, {left, right});
  }
  return left;
}

int ExpressionParser::index_primary() {
  Index i;
  i.place = token().place;
  if (token().kind == Token::Kind::integer) {
    i.number = integer();
    return add(std::move(i));
  }
  if (accept("(")) {
    const int inside = index_sum();
    expect(")");
    return inside;
  }
  if (!is_name() || reserved(token().text)) fail_here("an index: a rank, a size or a number");
  i.kind = Index::Kind::name;
  i.name = next().text;
  if (is_symbol("(") || is_symbol("[")) {
    const bool round = is_symbol("(");
    i.kind = Index::Kind::call;
    i.args = round ? index_list("(", ")") : index_list("[", "]");
  }
  return add(std::move(i));
}

}  // namespace heed::cascade
