#include "cascade/terms.h"

#include <fmt/format.h>

#include <limits>
#include <numbers>

namespace heed::cascade {

LoweredTerm TermLowering::term(const Term& written, const std::vector<int>& left,
                               RankSet left_set) {
  term_ = {};
  order_.clear();
  seen_ = 0;
  term_.minus = written.minus;
  term_.place = written.place;
  term_.reduce = written.reduce == Reduce::implicit ? Reduce::sum : written.reduce;
  term_.root = expr(written.body, nullptr);
  term_.ranks = seen_ | left_set;
  for (int r : left) seen_ |= bit(r);
  for (int r : order_) {
    if ((left_set & bit(r)) == 0) term_.reduced.push_back(r);
  }
  if (written.reduce != Reduce::implicit && term_.reduced.empty()) {
    names_.error(written.place,
                 "found a reduction over nothing: the left side has every rank of "
                 "the term, expected one that it lacks");
  }
  return std::move(term_);
}

TermLowering::Nested::Nested(TermLowering& t, Place place) : terms(t) {
  if (++terms.depth_ > 4 * kMaxDepth) {
    terms.names_.error(place,
                       "found functions nested too deep (does one call itself?), expected "
                       "fewer");
  }
}

int TermLowering::push(Node n, Place place) {
  for (int arg : n.args) n.ranks |= term_.nodes[static_cast<size_t>(arg)].ranks;
  if (term_.nodes.size() >= static_cast<size_t>(kMaxNodes)) too_large(place);
  term_.nodes.push_back(std::move(n));
  return static_cast<int>(term_.nodes.size()) - 1;
}

int TermLowering::push(Op op, std::vector<int> args, Place place) {
  Node n;
  n.op = op;
  n.args = std::move(args);
  return push(std::move(n), place);
}

void TermLowering::note_node(int id) {
  const IndexNode n = lowered_.node(id);
  if (n.kind == IndexNode::Kind::rank && (seen_ & bit(n.id)) == 0) {
    seen_ |= bit(n.id);
    order_.push_back(n.id);
  }
  for (int arg : n.args) note_node(arg);
}

int TermLowering::expr(int ast_expr, const Parameters* parameters) {
  const Expr& e = ast_.exprs[static_cast<size_t>(ast_expr)];
  const Nested nested(*this, e.place);
  switch (e.kind) {
    case Expr::Kind::number: {
      Node n;
      n.value = e.number;
      return push(std::move(n), e.place);
    }
    case Expr::Kind::name:
      return name(e, parameters);
    case Expr::Kind::call:
      return call(e, parameters);
    case Expr::Kind::compare:
      names_.error(e.place, "found a comparison, expected it only as the first part of select");
    default:
      break;
  }
  std::vector<int> args;
  for (int arg : e.args) args.push_back(expr(arg, parameters));
  switch (e.kind) {
    case Expr::Kind::negate:
      return push(Op::negate, std::move(args), e.place);
    case Expr::Kind::add:
      return push(Op::add, std::move(args), e.place);
    case Expr::Kind::subtract:
      return push(Op::subtract, std::move(args), e.place);
    case Expr::Kind::multiply:
      return push(Op::multiply, std::move(args), e.place);
    case Expr::Kind::divide:
      return push(Op::divide, std::move(args), e.place);
    default:
      return push(Op::power, std::move(args), e.place);
  }
}

int TermLowering::name(const Expr& e, const Parameters* parameters) {
  if (parameters != nullptr && !e.bracketed) {
    const auto it = parameters->find(e.name);
    if (it != parameters->end()) return it->second;
  }
  Node n;
  const int tensor = names_.tensor(e.name);
  if (tensor >= 0) {
    const TensorInfo& info = lowered_.tensor(tensor);
    if (parameters != nullptr && !info.scalar) {
      names_.error(e.place, fmt::format("found the tensor '{}' in a function, expected parameters, "
                                        "numbers and scalars only",
                                        e.name));
    }
    const auto match = names_.match(info, e.indices, ~RankSet{0});
    if (!match) {
      names_.error(e.place,
                   fmt::format("found {} indices of '{}', expected {}{}", e.indices.size(), e.name,
                               names_.axes_text(info), " with all batch ranks or with none"));
    }
    check_(tensor, match->index, e.place);
    n.op = Op::load;
    n.tensor = tensor;
    n.index = match->index;
    n.ranks = match->ranks;
    for (int id : n.index) note_node(id);
    return push(std::move(n), e.place);
  }
  if (e.bracketed) {
    names_.error(e.place, fmt::format("found '{}[', expected a tensor: no line defines '{}'",
                                      e.name, e.name));
  }
  const int value =
      parameters != nullptr && names_.rank(e.name) >= 0 ? -1 : names_.value_node(e.name, visible_);
  if (value >= 0) {
    n.op = Op::index;
    n.index = {value};
    n.ranks = lowered_.node(value).ranks;
    note_node(value);
    return push(std::move(n), e.place);
  }
  if (e.name == "inf" || e.name == "pi") {
    n.value = e.name == "pi" ? std::numbers::pi : std::numeric_limits<double>::infinity();
    return push(std::move(n), e.place);
  }
  names_.error(e.place, fmt::format("found '{}', expected a tensor, a scalar, a rank ({}), a size "
                                    "or a number",
                                    e.name, names_.rank_list()));
}

int TermLowering::call(const Expr& e, const Parameters* parameters) {
  const Function* f = find_function(e.name);
  const FunctionDeclaration* own = nullptr;
  for (const FunctionDeclaration& d : ast_.functions) {
    if (d.name == e.name) own = &d;
  }
  if (f == nullptr && own == nullptr) {
    names_.error(e.place, fmt::format("found '{}(', expected a function: exp, log, tanh, sigmoid, "
                                      "sqrt, cos, sin, relu, gelu, abs, pow, max, min, select or "
                                      "one that 'let' defines",
                                      e.name));
  }
  const size_t arity = f != nullptr ? static_cast<size_t>(f->arity) : own->parameters.size();
  if (e.args.size() != arity) {
    names_.error(e.place, fmt::format("found {} arguments of '{}', expected {}", e.args.size(),
                                      e.name, arity));
  }
  Node n;
  std::vector<int> args;
  for (int arg : e.args) {
    const Expr& a = ast_.exprs[static_cast<size_t>(arg)];
    if (a.kind == Expr::Kind::compare) {
      n.compare = a.compare;
      for (int side : a.args) args.push_back(expr(side, parameters));
    } else {
      args.push_back(expr(arg, parameters));
      if (args.size() == 1 && e.name == "select") {  // select(c, ...) is select(c != 0, ...)
        n.compare = Compare::not_equal;
        args.push_back(push(Node{}, e.place));
      }
    }
  }
  if (own != nullptr) return function(e, *own, args);
  n.op = f->op;
  n.args = std::move(args);
  return push(std::move(n), e.place);
}

void TermLowering::too_large(Place place) const {
  names_.error(place,
               fmt::format("found an expression of more than {} operations once its functions "
                           "are written out, expected fewer",
                           kMaxNodes));
}

int TermLowering::function(const Expr& e, const FunctionDeclaration& f,
                           const std::vector<int>& args) {
  // A function that returns its parameter makes no nodes, so calls are counted on their own.
  if (++calls_ > kMaxNodes) too_large(e.place);
  Parameters parameters;
  for (size_t i = 0; i < args.size(); ++i) parameters[f.parameters[i]] = args[i];
  return expr(f.body, &parameters);
}

Condition TermLowering::filter(const Filter& written) {
  Condition c;
  if (written.is_compare) {
    c.compare = written.compare;
    for (int arg : written.args) c.args.push_back(names_.index(arg, visible_));
  } else {
    const PredicateDeclaration* p = nullptr;
    for (size_t i = 0; i < ast_.predicates.size(); ++i) {
      if (ast_.predicates[i].name == written.name) {
        p = &ast_.predicates[i];
        c.predicate = static_cast<int>(i);
      }
    }
    if (p == nullptr) {
      names_.error(written.place, fmt::format("found '{}', expected a predicate that 'where' "
                                              "declares, or a comparison",
                                              written.name));
    }
    if (written.has_args && written.args.size() != p->ranks.size()) {
      names_.error(written.place, fmt::format("found {} arguments of '{}', expected {}",
                                              written.args.size(), p->name, p->ranks.size()));
    }
    for (size_t i = 0; i < p->ranks.size(); ++i) {
      c.args.push_back(written.has_args ? names_.index(written.args[i], visible_)
                                        : names_.rank_node(names_.rank(p->ranks[i]), visible_));
    }
  }
  for (int arg : c.args) c.ranks |= lowered_.node(arg).ranks;
  return c;
}

}  // namespace heed::cascade
