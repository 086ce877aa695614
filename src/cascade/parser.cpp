// Tokens to an Ast. Grammar: docs/cascade-language.md.
#include <fmt/format.h>

#include <limits>

#include "cascade/ast.h"
#include "cascade/cascade.h"
#include "cascade/expressions.h"
#include "cascade/lowered.h"

namespace heed::cascade {
namespace {

class Parser : private ExpressionParser {
 public:
  Parser(Tokens tokens, std::string_view file) : ExpressionParser(std::move(tokens), file) {}

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
        input.fallback =
            is_word("inf") ? (next(), std::numeric_limits<double>::infinity()) : number();
        if (minus) input.fallback = -input.fallback;
      }
      ast_.inputs.push_back(std::move(input));
    }
  }

  void predicates() {
    next();
    for (bool first = true; more(first); first = false) {
      check_callables(ast_.predicates.size(), "predicate");
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

  void check_callables(size_t count, std::string_view what) const {
    if (count < static_cast<size_t>(kMaxCallables)) return;
    fail(file_, token().place,
         fmt::format("found {} {}, expected at most {}", what, count + 1, kMaxCallables));
  }

  void function() {
    next();
    check_callables(ast_.functions.size(), "function");
    FunctionDeclaration f;
    f.place = token().place;
    f.name = new_name("the name of a function");
    expect("(");
    do {
      f.parameter_places.push_back(token().place);
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
        if (e.filters.size() >= static_cast<size_t>(kMaxTerms)) {
          fail_here(fmt::format("at most {} filters", kMaxTerms));
        }
        e.filters.push_back(filter());
      } while (accept(","));
    }
    return e;
  }

  Term term(bool minus) {
    Term t;
    t.minus = minus;
    t.place = token().place;
    if (is_name() && is_reduction(token().text) && !is_call_of_two()) {
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

  size_t comment_ = 0;
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
