// A cascade as it is written: declarations, statements, comments, with their places in the text.
// Names are not resolved here; lowered.h holds the program with every name resolved.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace heed::cascade {

struct Lowered;

struct Place {
  int line = 0;
  int column = 0;
  // Two programs are the same wherever their parts stand in the text.
  friend bool operator==(const Place&, const Place&) { return true; }
};

enum class Compare { less, less_equal, greater, greater_equal, equal, not_equal };

/// An integer expression inside brackets; children are numbers of nodes in Ast::indices.
struct Index {
  enum class Kind { number, name, call, negate, add, subtract, multiply };
  Kind kind = Kind::number;
  int64_t number = 0;
  std::string name;
  std::vector<int> args;
  int depth = 1;
  Place place;
  bool operator==(const Index&) const = default;
};

/// A value expression; children are numbers of nodes in Ast::exprs, indices of nodes in
/// Ast::indices.
struct Expr {
  enum class Kind { number, name, call, compare, negate, add, subtract, multiply, divide, power };
  Kind kind = Kind::number;
  double number = 0;
  std::string name;  // name: tensor, scalar, rank, size; call: function
  std::vector<int> args;
  bool bracketed = false;  // name[...] rather than a bare name
  std::vector<int> indices;
  Compare compare = Compare::less;
  int depth = 1;
  Place place;
  bool operator==(const Expr&) const = default;
};

enum class Reduce { implicit, sum, max, min };

struct Term {
  bool minus = false;
  Reduce reduce = Reduce::implicit;
  int body = 0;
  Place place;
  bool operator==(const Term&) const = default;
};

/// `keep`, `keep(b,p,m)` or `i >= j`.
struct Filter {
  bool is_compare = false;
  std::string name;
  bool has_args = false;
  std::vector<int> args;  // of the predicate, or the two sides
  Compare compare = Compare::less;
  Place place;
  bool operator==(const Filter&) const = default;
};

struct Equation {
  std::string name;
  bool bracketed = false;
  std::vector<int> indices;
  std::vector<Term> terms;
  std::vector<Filter> filters;
  Place place;
  bool operator==(const Equation&) const = default;
};

struct Statement {
  bool output = false;
  Equation main;
  bool has_initial = false;
  Equation initial;
  bool operator==(const Statement&) const = default;
};

struct RankDeclaration {
  std::string name;
  bool batch = false;
  int size = -1;  // index expression after '=', -1 without
  Place place;
  bool operator==(const RankDeclaration&) const = default;
};

struct SizeDeclaration {
  std::string name;
  Place place;
  bool operator==(const SizeDeclaration&) const = default;
};

/// split parent = outer * block + inner; the block is a name or a number.
struct SplitDeclaration {
  std::string parent, outer, inner, block;
  int64_t block_number = 0;
  Place place, outer_place, inner_place, block_place;
  bool operator==(const SplitDeclaration&) const = default;
};

struct InputDeclaration {
  std::string name;
  bool bracketed = false;  // a scalar has no brackets
  std::vector<int> indices;
  bool has_default = false;
  double fallback = 0;
  Place place;
  bool operator==(const InputDeclaration&) const = default;
};

struct PredicateDeclaration {
  std::string name;
  std::vector<std::string> ranks;
  std::vector<Place> rank_places;
  Place place;
  bool operator==(const PredicateDeclaration&) const = default;
};

struct FunctionDeclaration {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<Place> parameter_places;
  int body = 0;
  Place place;
  bool operator==(const FunctionDeclaration&) const = default;
};

/// One line of the text: `count` entries of its kind starting at `first`, and its comments.
struct Line {
  enum class Kind { batch, rank, size, split, input, predicate, function, statement };
  Kind kind = Kind::statement;
  int first = 0;
  int count = 0;
  std::vector<std::string> before;  // comment lines above
  std::string after;                // comment at the end of the line
  bool operator==(const Line&) const = default;
};

struct Ast {
  std::string file;
  std::string name;
  std::vector<std::string> header;  // comments above `cascade`
  std::string header_after;
  std::vector<std::string> footer;  // comments below the last line
  std::vector<Line> lines;
  std::vector<RankDeclaration> ranks;
  std::vector<SizeDeclaration> sizes;
  std::vector<SplitDeclaration> splits;
  std::vector<InputDeclaration> inputs;
  std::vector<PredicateDeclaration> predicates;
  std::vector<FunctionDeclaration> functions;
  std::vector<Statement> statements;
  std::vector<Index> indices;
  std::vector<Expr> exprs;
  std::shared_ptr<const Lowered> lowered;
};

/// Calls body(expression) for expression `root` and all beneath it.
template <class Body>
void for_each_expr(const Ast& ast, int root, const Body& body) {
  const Expr& e = ast.exprs[static_cast<size_t>(root)];
  body(e);
  for (int arg : e.args) for_each_expr(ast, arg, body);
}

/// The same program, wherever its parts stand in their files.
bool same(const Ast& a, const Ast& b);

/// Bounds that keep a hostile text from exhausting the stack, memory or time.
inline constexpr int kMaxTextBytes = 1 << 20;
inline constexpr int kMaxNameLength = 64;
inline constexpr int kMaxDepth = 100;  // of an expression
inline constexpr int kMaxRanks = 64;   // a rank set is one 64-bit word
inline constexpr int kMaxAxes = 16;
inline constexpr int kMaxTerms = 100;  // of an equation; as many filters
inline constexpr int kMaxStatements = 1000;
inline constexpr int kMaxCallables = 1000;   // predicates; functions; index functions
inline constexpr int kMaxNodes = 20000;      // of one term with its functions written out
inline constexpr int kMaxAllNodes = 100000;  // of all terms, their conditions included

}  // namespace heed::cascade
