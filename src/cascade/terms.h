// The right side of an equation: value expressions to nodes, filters to conditions.
#pragma once
#include <functional>
#include <map>
#include <vector>

#include "cascade/names.h"

namespace heed::cascade {

/// Called for each reference with its tensor, the node of each axis and its place; throws if the
/// reference comes before the definition.
using CheckReference = std::function<void(int tensor, const std::vector<int>& index, Place place)>;

class TermLowering {
 public:
  /// `visible`: the ranks that the statement iterates over.
  TermLowering(const Ast& ast, const Names& names, Lowered& lowered, RankSet visible,
               const CheckReference& check)
      : ast_(ast), names_(names), lowered_(lowered), visible_(visible), check_(check) {}

  LoweredTerm term(const Term& written, const std::vector<int>& left, RankSet left_set);
  Condition filter(const Filter& written);

 private:
  using Parameters = std::map<std::string, int>;
  struct Nested {
    Nested(TermLowering& t, Place place);
    ~Nested() { --terms.depth_; }
    TermLowering& terms;
  };
  [[noreturn]] void too_large(Place place) const;
  int expr(int ast_expr, const Parameters* parameters);
  int name(const Expr& e, const Parameters* parameters);
  int call(const Expr& e, const Parameters* parameters);
  int function(const Expr& e, const FunctionDeclaration& f, const std::vector<int>& args);
  int push(Node node, Place place);
  int push(Op op, std::vector<int> args, Place place);
  void note_node(int index);

  const Ast& ast_;
  const Names& names_;
  Lowered& lowered_;
  RankSet visible_;
  const CheckReference& check_;
  LoweredTerm term_;
  std::vector<int> order_;  // ranks by first appearance
  RankSet seen_ = 0;
  int calls_ = 0;
  int depth_ = 0;
};

}  // namespace heed::cascade
