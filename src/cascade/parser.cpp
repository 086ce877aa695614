// Tokens to an Ast. Grammar: docs/cascade-language.md.
#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <set>

#include "cascade/ast.h"
#include "cascade/cascade.h"
#include "cascade/functions.h"
#include "cascade/lexer.h"
#include "cascade/lowered.h"

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

class Parser {
 public:
  Parser(Tokens tokens, std::string_view file) : tokens_(std::move(tokens)), file_(file) {
    ast_.file = std::string(file);
  }

  Ast run() {
    const int first_line = token().place.line;
    take_comments_above(first_line, ast_.header);
    expect_word("cascade");
    if (!is_name()) fail_here("the name of the cascade");
    ast_.name = next().text;
    end_line(first_line, ast_.header_after);
    while (token().kind != Token::Kind::end) line();
    take_comments_above(std::numeric_limits<int>::max(), ast_.footer);
    if (ast_.statements.empty()) fail_here("a statement such as 'out O[p] = sum X[p,m]'");
    return std::move(ast_);
  }

 private:
  // ---- tokens
  const Token& token(size_t ahead = 0) const {
    return tokens_.tokens[std::min(at_ + ahead, tokens_.tokens.size() - 1)];
  }
  bool is_symbol(std::string_view text, size_t ahead = 0) const {
    return token(ahead).kind == Token::Kind::symbol && token(ahead).text == text;
  }
  bool is_name() const { return token().kind == Token::Kind::name; }
  bool is_word(std::string_view word) const { return is_name() && token().text == word; }
  Token next() { return tokens_.tokens[at_ + 1 < tokens_.tokens.size() ? at_++ : at_]; }
  bool accept(std::string_view symbol) {
    if (!is_symbol(symbol)) return false;
    next();
    return true;
  }
  [[noreturn]] void fail_here(std::string_view expected) const {
    fail(file_, token().place,
         fmt::format("found {}, expected {}", describe(token()), expected));
  }
  void expect(std::string_view symbol) {
    if (!accept(symbol)) fail_here(fmt::format("'{}'", symbol));
  }
  void expect_word(std::string_view word) {
    if (!is_word(word)) fail_here(fmt::format("'{}'", word));
    next();
  }
  static bool reserved(std::string_view word) {
    return among(kKeywords, word) || among(kReductions, word) || find_function(word) != nullptr;
  }
  std::string new_name(std::string_view what) {
    if (!is_name()) fail_here(what);
    if (reserved(token().text)) {
      fail(file_, token().place,
           fmt::format("found '{}', a word of the language, expected {}", token().text, what));
    }
    return next().text;
  }

  // ---- lines and comments
  void take_comments_above(int line, std::vector<std::string>& into) {
    while (comment_ < tokens_.comments.size() && tokens_.comments[comment_].line < line) {
      into.push_back(tokens_.comments[comment_++].text);
    }
  }
  void end_line(int first_line, std::string& after) {
    if (token().kind != Token::Kind::newline) {
      fail_here("the end of the line");
    }
    const int last_line = std::max(first_line, token().place.line);
    next();
    while (comment_ < tokens_.comments.size() && tokens_.comments[comment_].line <= last_line) {
      const std::string& comment = tokens_.comments[comment_++].text;
      if (!after.empty() && !comment.empty()) after += "  ";
      after += comment;
    }
  }

  template <class T>
  void fill(Line& line, Line::Kind kind, const std::vector<T>& list, size_t before) {
    line.kind = kind;
    line.first = static_cast<int>(before);
    line.count = static_cast<int>(list.size() - before);
  }

  void line() {
    Line line;
    const int first_line = token().place.line;
    take_comments_above(first_line, line.before);
    if (!is_name()) fail_here("a declaration or a statement");
    const std::string word = token().text;
    if (word == "batch" || word == "rank") {
      const size_t n = ast_.ranks.size();
      ranks(word == "batch");
      fill(line, word == "batch" ? Line::Kind::batch : Line::Kind::rank, ast_.ranks, n);
    } else if (word == "size") {
      const size_t n = ast_.sizes.size();
      sizes();
      fill(line, Line::Kind::size, ast_.sizes, n);
    } else if (word == "split") {
      const size_t n = ast_.splits.size();
      split();
      fill(line, Line::Kind::split, ast_.splits, n);
    } else if (word == "in") {
      const size_t n = ast_.inputs.size();
      inputs();
      fill(line, Line::Kind::input, ast_.inputs, n);
    } else if (word == "where") {
      const size_t n = ast_.predicates.size();
      predicates();
      fill(line, Line::Kind::predicate, ast_.predicates, n);
    } else if (word == "let") {
      const size_t n = ast_.functions.size();
      function();
      fill(line, Line::Kind::function, ast_.functions, n);
    } else {
      const size_t n = ast_.statements.size();
      statement();
      fill(line, Line::Kind::statement, ast_.statements, n);
    }
    end_line(first_line, line.after);
    ast_.lines.push_back(std::move(line));
  }

  // ---- declarations
  bool more(bool need_one) {
    accept(",");
    if (is_name()) return true;
    if (need_one) fail_here("a name");
    return false;
  }

  void ranks(bool batch) {
    next();
    for (bool first = true; more(first); first = false) {
      RankDeclaration rank;
      rank.place = token().place;
      rank.batch = batch;
      rank.name = new_name("the name of a rank");
      if (accept("=")) rank.size = index_sum();
      ast_.ranks.push_back(std::move(rank));
    }
  }

  void sizes() {
    next();
    for (bool first = true; more(first); first = false) {
      const Place place = token().place;
      ast_.sizes.push_back({new_name("the name of a size"), place});
    }
  }

  void split() {
    next();
    SplitDeclaration s;
    s.place = token().place;
    s.parent = new_name("the rank to split");
    expect("=");
    s.outer_place = token().place;
    s.outer = new_name("the name of the outer rank");
    expect("*");
    s.block_place = token().place;
    if (token().kind == Token::Kind::integer) {
      s.block_number = integer();
    } else {
      s.block = new_name("the size of a block, a name or a whole number");
    }
    expect("+");
    s.inner_place = token().place;
    s.inner = new_name("the name of the inner rank");
    ast_.splits.push_back(std::move(s));
  }

  void inputs() {
    next();
    for (bool first = true; more(first); first = false) {
      InputDeclaration input;
      input.place = token().place;
      input.name = new_name("the name of an input");
      if (is_symbol("[")) {
        input.bracketed = true;
        input.indices = index_list("[", "]");
      }
      if (accept("=")) {
        const bool minus = accept("-");
        input.has_default = true;
        input.fallback = is_word("inf") ? (next(), std::numeric_limits<double>::infinity())
                                        : number();
        if (minus) input.fallback = -input.fallback;
      }
      ast_.inputs.push_back(std::move(input));
    }
  }

  void predicates() {
    next();
    for (bool first = true; more(first); first = false) {
      PredicateDeclaration predicate;
      predicate.place = token().place;
      predicate.name = new_name("the name of a predicate");
      expect("(");
      do {
        predicate.rank_places.push_back(token().place);
        predicate.ranks.push_back(new_name("a rank"));
      } while (accept(","));
      expect(")");
      ast_.predicates.push_back(std::move(predicate));
    }
  }

  void function() {
    next();
    FunctionDeclaration f;
    f.place = token().place;
    f.name = new_name("the name of a function");
    expect("(");
    do {
      f.parameters.push_back(new_name("the name of a parameter"));
    } while (accept(","));
    expect(")");
    expect("=");
    f.body = sum();
    ast_.functions.push_back(std::move(f));
  }

  // ---- statements
  void statement() {
    if (ast_.statements.size() >= static_cast<size_t>(kMaxStatements)) {
      fail(file_, token().place,
           fmt::format("found statement {}, expected at most {}", kMaxStatements + 1,
                       kMaxStatements));
    }
    Statement s;
    if (is_word("out")) {
      next();
      s.output = true;
    }
    s.main = equation();
    if (accept(";")) {
      s.has_initial = true;
      s.initial = equation();
    }
    ast_.statements.push_back(std::move(s));
  }

  Equation equation() {
    Equation e;
    e.place = token().place;
    e.name = new_name("a declaration or the name of a tensor");
    if (is_symbol("[")) {
      e.bracketed = true;
      e.indices = index_list("[", "]");
    }
    expect("=");
    bool minus = accept("-");
    if (!minus) accept("+");
    while (true) {
      if (e.terms.size() >= static_cast<size_t>(kMaxTerms)) {
        fail_here(fmt::format("at most {} terms", kMaxTerms));
      }
      e.terms.push_back(term(minus));
      if (accept("+")) {
        minus = false;
      } else if (accept("-")) {
        minus = true;
      } else {
        break;
      }
    }
    if (accept(":")) {
      do {
        e.filters.push_back(filter());
      } while (accept(","));
    }
    return e;
  }

  /// True at `max(` ... `,` ... `)`, the function of two values; false at a reduction.
  bool is_call_of_two() const {
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

  Term term(bool minus) {
    Term t;
    t.minus = minus;
    t.place = token().place;
    if (is_name() && among(kReductions, token().text) && !is_call_of_two()) {
      t.reduce = is_word("sum") ? Reduce::sum : is_word("max") ? Reduce::max : Reduce::min;
      next();
    }
    t.body = product();
    return t;
  }

  Filter filter() {
    Filter f;
    f.place = token().place;
    const bool call = is_name() && is_symbol("(", 1);
    const bool bare = is_name() && (is_symbol(",", 1) || is_symbol(";", 1) ||
                                    token(1).kind == Token::Kind::newline);
    if (bare) {
      f.name = new_name("a predicate");
      return f;
    }
    if (call) {
      const size_t start = at_;
      const size_t nodes = ast_.indices.size();
      f.name = new_name("a predicate");
      f.has_args = true;
      f.args = index_list("(", ")");
      if (!comparison_here()) return f;
      at_ = start;  // an index function on the left of a comparison
      ast_.indices.resize(nodes);
      f = Filter{};
      f.place = token().place;
    }
    f.is_compare = true;
    f.args.push_back(index_sum());
    f.compare = comparison();
    f.args.push_back(index_sum());
    return f;
  }

  bool comparison_here() const {
    static constexpr std::array<std::string_view, 9> kSigns = {"<", "<=", ">", ">=", "==", "!=",
                                                               "+", "-",  "*"};
    return token().kind == Token::Kind::symbol && among(kSigns, token().text);
  }

  Compare comparison() {
    static constexpr std::array<std::string_view, 6> kSigns = {"<", "<=", ">", ">=", "==", "!="};
    for (size_t i = 0; i < kSigns.size(); ++i) {
      if (accept(kSigns[i])) return static_cast<Compare>(i);
    }
    fail_here("one of < <= > >= == !=");
  }

  // ---- value expressions
  int add(Expr e) {
    for (int arg : e.args) e.depth = std::max(e.depth, ast_.exprs[size_t(arg)].depth + 1);
    check_depth(e.depth, e.place);
    ast_.exprs.push_back(std::move(e));
    return static_cast<int>(ast_.exprs.size()) - 1;
  }
  int add(Expr::Kind kind, Place place, std::vector<int> args) {
    Expr e;
    e.kind = kind;
    e.place = place;
    e.args = std::move(args);
    return add(std::move(e));
  }
  void check_depth(int depth, Place place) const {
    if (depth > kMaxDepth) {
      fail(file_, place,
           fmt::format("found an expression nested deeper than {}, expected a flatter one: write "
                       "parts of it as statements of their own", kMaxDepth));
    }
  }
  /// Counts recursion, which brackets and signs drive without making nodes.
  struct Nested {
    explicit Nested(Parser& p) : parser(p) {
      // The printed form of an expression may nest its brackets deeper than the text it came from.
      parser.check_depth(++parser.depth_ / 4, parser.token().place);
    }
    ~Nested() { --parser.depth_; }
    Parser& parser;
  };

  int sum() {
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
      left = add(sign.text == "+" ? Expr::Kind::add : Expr::Kind::subtract, sign.place,
                 {left, right});
    }
    return left;
  }

  int product() {
    int left = unary();
    while (is_symbol("*") || is_symbol("/")) {
      const Token sign = next();
      const int right = unary();
      left = add(sign.text == "*" ? Expr::Kind::multiply : Expr::Kind::divide, sign.place,
                 {left, right});
    }
    return left;
  }

  int unary() {
    const Nested nested(*this);
    const Place place = token().place;
    if (accept("-")) return add(Expr::Kind::negate, place, {unary()});
    const int base = primary();
    const Place sign = token().place;
    if (accept("^")) return add(Expr::Kind::power, sign, {base, unary()});
    return base;
  }

  int primary() {
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
                       "a term: write it as a statement of its own", name));
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

  int call(const std::string& name, Place place) {
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

  double number() {
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

  int64_t integer() {
    const Token t = token();
    int64_t value = 0;
    const auto [end, error] = std::from_chars(t.text.data(), t.text.data() + t.text.size(), value);
    if (error != std::errc() || end != t.text.data() + t.text.size() || value > 1'000'000'000) {
      fail_here("a whole number up to 1000000000");
    }
    next();
    return value;
  }

  // ---- index expressions
  int add(Index i) {
    for (int arg : i.args) i.depth = std::max(i.depth, ast_.indices[size_t(arg)].depth + 1);
    check_depth(i.depth, i.place);
    ast_.indices.push_back(std::move(i));
    return static_cast<int>(ast_.indices.size()) - 1;
  }
  int add(Index::Kind kind, Place place, std::vector<int> args) {
    Index i;
    i.kind = kind;
    i.place = place;
    i.args = std::move(args);
    return add(std::move(i));
  }

  std::vector<int> index_list(std::string_view open, std::string_view close) {
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

  int index_sum() {
    const Nested nested(*this);
    const Place start = token().place;
    int left = accept("-") ? add(Index::Kind::negate, start, {index_product()}) : index_product();
    while (is_symbol("+") || is_symbol("-")) {
      const Token sign = next();
      const int right = index_product();
      left = add(sign.text == "+" ? Index::Kind::add : Index::Kind::subtract, sign.place,
                 {left, right});
    }
    return left;
  }

  int index_product() {
    int left = index_primary();
    while (is_symbol("*")) {
      const Place sign = next().place;
      const int right = index_primary();
      left = add(Index::Kind::multiply, sign, {left, right});
    }
    return left;
  }

  int index_primary() {
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

  Tokens tokens_;
  std::string_view file_;
  Ast ast_;
  size_t at_ = 0;
  size_t comment_ = 0;
  int depth_ = 0;
};

}  // namespace

Program parse(std::string_view text, std::string_view file) {
  auto ast = std::make_shared<Ast>(Parser(tokenize(text, file), file).run());
  ast->lowered = lower(*ast);
  return Program(std::move(ast));
}

bool same(const Ast& a, const Ast& b) {
  return a.name == b.name && a.ranks == b.ranks && a.sizes == b.sizes && a.splits == b.splits &&
         a.inputs == b.inputs && a.predicates == b.predicates && a.functions == b.functions &&
         a.statements == b.statements && a.indices == b.indices && a.exprs == b.exprs &&
         a.lines == b.lines && a.header == b.header && a.header_after == b.header_after &&
         a.footer == b.footer;
}

const std::string& Program::name() const { return ast_->name; }

std::vector<std::string> Program::inputs() const {
  std::vector<std::string> names;
  for (const InputDeclaration& input : ast_->inputs) names.push_back(input.name);
  return names;
}

std::vector<std::string> Program::outputs() const {
  std::vector<std::string> names;
  for (const Statement& s : ast_->statements) {
    if (s.output) names.push_back(s.main.name);
  }
  return names;
}

}  // namespace heed::cascade
