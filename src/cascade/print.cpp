#include "cascade/print.h"

#include <array>
#include <charconv>

#include "cascade/functions.h"
#include "cascade/lowered.h"

namespace heed::cascade {

std::string number_text(double value) {
  std::array<char, 64> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), result.ptr};
}

std::vector<std::string> reduced_ranks(const Ast& ast, int statement, bool initial) {
  const Lowered& lowered = *ast.lowered;
  const LoweredStatement& s = lowered.statements[static_cast<size_t>(statement)];
  std::vector<std::string> result;
  for (const LoweredTerm& term : (initial ? *s.initial : s.main).terms) {
    std::string names;
    for (int r : term.reduced) names += (names.empty() ? "" : ",") + lowered.rank(r).name;
    result.push_back(std::move(names));
  }
  return result;
}

std::string Writer::index(int node) const {
  const Index& i = ast_.indices[static_cast<size_t>(node)];
  switch (i.kind) {
    case Index::Kind::negate:
      return notation_.index_sign('-') + index_product(i.args[0]);
    case Index::Kind::add:
      return index(i.args[0]) + notation_.index_sign('+') + index_product(i.args[1]);
    case Index::Kind::subtract:
      return index(i.args[0]) + notation_.index_sign('-') + index_product(i.args[1]);
    default:
      return index_product(node);
  }
}

std::string Writer::index_product(int node) const {
  const Index& i = ast_.indices[static_cast<size_t>(node)];
  if (i.kind != Index::Kind::multiply) return index_primary(node);
  return index_product(i.args[0]) + notation_.index_sign('*') + index_primary(i.args[1]);
}

std::string Writer::index_primary(int node) const {
  const Index& i = ast_.indices[static_cast<size_t>(node)];
  switch (i.kind) {
    case Index::Kind::number:
      return std::to_string(i.number);
    case Index::Kind::name:
      return notation_.name(i.name);
    case Index::Kind::call:
      return notation_.index_call(i.name, indices(i.args));
    default:
      return notation_.brackets(index(node));
  }
}

std::string Writer::indices(const std::vector<int>& nodes) const {
  std::string text;
  for (size_t i = 0; i < nodes.size(); ++i)
    text += (i > 0 ? notation_.comma() : "") + index(nodes[i]);
  return text;
}

std::string Writer::left_side(const Equation& e) const {
  return e.bracketed ? notation_.indexed(e.name, indices(e.indices)) : notation_.name(e.name);
}

std::string Writer::right_side(const Equation& e, const std::vector<std::string>& reduced) const {
  std::string text;
  for (size_t t = 0; t < e.terms.size(); ++t) {
    const Term& term = e.terms[t];
    const std::string reduction = notation_.reduction(term.reduce, reduced[t]);
    const std::string body = reduction + product(term.body);
    if (t == 0) {
      if (term.minus) text += "-";
    } else {
      text += notation_.sign(term.minus ? '-' : '+');
    }
    text += body;
  }
  return text;
}

std::string Writer::filter(const Filter& f) const {
  if (f.is_compare) return index(f.args[0]) + notation_.compare(f.compare) + index(f.args[1]);
  return f.has_args ? notation_.index_call(f.name, indices(f.args)) : notation_.name(f.name);
}

std::string Writer::input(const InputDeclaration& input) const {
  return input.bracketed ? notation_.indexed(input.name, indices(input.indices))
                         : notation_.name(input.name);
}

std::string Writer::sum(int node) const {
  const Expr& e = expr(node);
  switch (e.kind) {
    case Expr::Kind::negate:
      return "-" + product(e.args[0]);
    case Expr::Kind::add:
      return sum(e.args[0]) + notation_.sign('+') + product(e.args[1]);
    case Expr::Kind::subtract:
      return sum(e.args[0]) + notation_.sign('-') + product(e.args[1]);
    default:
      return product(node);
  }
}

std::string Writer::product(int node) const {
  const Expr& e = expr(node);
  if (e.kind == Expr::Kind::multiply) {
    return product(e.args[0]) + notation_.sign('*') + unary(e.args[1]);
  }
  if (e.kind == Expr::Kind::divide) {
    return notation_.fraction_brackets() ? notation_.fraction(product(e.args[0]), unary(e.args[1]))
                                         : notation_.fraction(sum(e.args[0]), sum(e.args[1]));
  }
  return unary(node);
}

std::string Writer::unary(int node) const {
  const Expr& e = expr(node);
  if (e.kind != Expr::Kind::power) return primary(node);
  return notation_.power(primary(e.args[0]),
                         notation_.power_brackets() ? unary(e.args[1]) : sum(e.args[1]));
}

std::string Writer::primary(int node) const {
  const Expr& e = expr(node);
  switch (e.kind) {
    case Expr::Kind::number:
      return notation_.number(e.number);
    case Expr::Kind::name:
      return name(e);
    case Expr::Kind::call:
      return call(e);
    default:
      return notation_.brackets(sum(node));
  }
}

std::string Writer::name(const Expr& e) const {
  return e.bracketed ? notation_.indexed(e.name, indices(e.indices)) : notation_.name(e.name);
}

std::string Writer::call(const Expr& e) const {
  const bool bare = e.args.size() == 1 && find_function(e.name) != nullptr &&
                    expr(e.args[0]).kind == Expr::Kind::name;
  if (bare && expr(e.args[0]).bracketed) {
    return notation_.function(e.name) + notation_.sign(' ') + name(expr(e.args[0]));
  }
  std::string args;
  for (size_t i = 0; i < e.args.size(); ++i) {
    const Expr& arg = expr(e.args[i]);
    if (i > 0) args += notation_.comma() + notation_.sign(' ');
    args += arg.kind == Expr::Kind::compare
                ? sum(arg.args[0]) + notation_.compare(arg.compare) + sum(arg.args[1])
                : sum(e.args[i]);
  }
  return notation_.function(e.name) + notation_.brackets(args);
}

}  // namespace heed::cascade
