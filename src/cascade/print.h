// What the printers share: the order and the brackets of an expression.
#pragma once
#include <string>

#include "cascade/ast.h"

namespace heed::cascade {

/// How one notation writes the parts of a program.
class Notation {
 public:
  virtual ~Notation() = default;
  virtual std::string name(const std::string& name) const = 0;
  virtual std::string number(double value) const = 0;
  virtual std::string function(const std::string& name) const = 0;
  virtual std::string indexed(const std::string& name, const std::string& indices) const = 0;
  virtual std::string index_call(const std::string& name, const std::string& args) const = 0;
  virtual std::string comma() const = 0;
  virtual std::string sign(char op) const = 0;  // + - * and = with their spaces
  virtual std::string index_sign(char op) const = 0;
  virtual std::string compare(Compare how) const = 0;
  virtual std::string brackets(const std::string& inside) const = 0;
  virtual std::string fraction(const std::string& above, const std::string& below) const = 0;
  virtual bool fraction_brackets() const = 0;  // does a fraction need brackets around its parts?
  virtual std::string power(const std::string& base, const std::string& exponent) const = 0;
  virtual bool power_brackets() const = 0;  // does an exponent need them?
  /// The symbol of a reduction; `ranks` are those it runs over.
  virtual std::string reduction(Reduce reduce, const std::string& ranks) const = 0;
};

class Writer {
 public:
  Writer(const Ast& ast, const Notation& notation) : ast_(ast), notation_(notation) {}

  std::string index(int node) const;
  std::string indices(const std::vector<int>& nodes) const;
  std::string left_side(const Equation& e) const;
  std::string right_side(const Equation& e, const std::vector<std::string>& reduced) const;
  std::string filter(const Filter& f) const;
  std::string input(const InputDeclaration& input) const;
  std::string product(int node) const;  // as a term
  std::string sum(int node) const;      // as inside brackets

 private:
  std::string unary(int node) const;
  std::string primary(int node) const;
  std::string call(const Expr& e) const;
  std::string name(const Expr& e) const;
  std::string index_product(int node) const;
  std::string index_primary(int node) const;

  const Expr& expr(int node) const { return ast_.exprs[static_cast<size_t>(node)]; }

  const Ast& ast_;
  const Notation& notation_;
};

/// Per term of the statement's equation: the names of the ranks it reduces over, "m0,e", or "".
std::vector<std::string> reduced_ranks(const Ast& ast, int statement, bool initial);

/// One line in the form of to_text, without its comments.
std::string line_text(const Ast& ast, const Line& line);

/// The shortest text that reads back as the same number.
std::string number_text(double value);

}  // namespace heed::cascade
