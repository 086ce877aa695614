// The checks of a program and its lowering: which axes each tensor has, what may be read where, and
// which statements run together along a running rank.
#include <fmt/format.h>

#include <algorithm>

#include "cascade/batch.h"
#include "cascade/names.h"
#include "cascade/terms.h"

namespace heed::cascade {
namespace {

class Checker {
 public:
  explicit Checker(const Ast& ast) : ast_(ast), names_(ast, out_) { out_.name = ast.name; }

  std::shared_ptr<const Lowered> run() {
    first_statement_ = static_cast<int>(out_.tensors.size());
    for (size_t s = 0; s < ast_.statements.size(); ++s) declare(static_cast<int>(s));
    if (std::none_of(ast_.statements.begin(), ast_.statements.end(),
                     [](const Statement& s) { return s.output; })) {
      names_.error(
          ast_.statements.back().main.place,
          "found no output, expected 'out' before the statements whose tensors are results");
    }
    spread_batch_ranks(ast_, names_, out_, first_statement_);
    groups_.resize(ast_.statements.size());
    for (size_t s = 0; s < ast_.statements.size(); ++s) statement(static_cast<int>(s));
    form_groups();
    check_groups();
    return std::make_shared<const Lowered>(std::move(out_));
  }

 private:
  const Statement& written(int s) const { return ast_.statements[static_cast<size_t>(s)]; }
  TensorInfo& tensor_of(int s) { return out_.tensors[static_cast<size_t>(first_statement_ + s)]; }
  Place index_place(int ast_index) const {
    return ast_.indices[static_cast<size_t>(ast_index)].place;
  }

  // ---- left sides
  void declare(int s) {
    const Equation& e = written(s).main;
    TensorInfo info;
    info.name = e.name;
    info.output = written(s).output;
    info.statement = s;
    info.place = e.place;
    RankSet used = 0;
    for (int i : e.indices) {
      Axis axis = left_axis(i);
      RankSet ranks = axis.rank >= 0 ? bit(axis.rank) : 0;
      if (const Split* split = merged_split(out_, left_node(i))) {
        ranks = bit(split->outer) | bit(split->inner);
      }
      if ((used & ranks) != 0) {
        names_.error(index_place(i), "found a rank twice on the left side, expected each once");
      }
      used |= ranks;
      if (axis.running) {
        if (info.running >= 0) {
          names_.error(index_place(i), "found a second running rank, expected one");
        }
        info.running = axis.rank;
      }
      if (axis.rank >= 0 && out_.rank(axis.rank).batch) axis.batch = bit(axis.rank);
      info.axes.push_back(axis);
    }
    if (info.running >= 0 && !written(s).has_initial) {
      names_.error(e.place, fmt::format("found the running tensor '{}' without a start, expected "
                                        "'; {}[0,...] = ...' at the end of the line",
                                        e.name, e.name));
    }
    if (info.running < 0 && written(s).has_initial) {
      names_.error(written(s).initial.place,
                   fmt::format("found a start of '{}', expected '{}[rank+1,...]' on its left side",
                               e.name, e.name));
    }
    names_.add_tensor(std::move(info));
  }

  int left_node(int ast_index) { return names_.index(ast_index, ~RankSet{0}); }

  Axis left_axis(int ast_index) {
    const int id = left_node(ast_index);
    const IndexNode n = out_.node(id);
    Axis axis;
    if (const Split* split = merged_split(out_, id)) {
      axis.rank = split->parent;
      return axis;
    }
    if (n.kind == IndexNode::Kind::rank) {
      axis.rank = n.id;
      return axis;
    }
    if (n.kind == IndexNode::Kind::add && out_.node(n.args[0]).kind == IndexNode::Kind::rank) {
      axis.rank = out_.node(n.args[0]).id;
      axis.running = true;
      if (offset_from(out_, id, axis.rank) == 1) return axis;
    }
    names_.error(index_place(ast_index),
                 "found an expression on the left side, expected a rank, 'rank+1' of a running "
                 "rank, or the two parts of a split joined as in its declaration");
  }

  // ---- statements
  void statement(int s) {
    LoweredStatement result;
    result.running = tensor_of(s).running;
    result.main = equation(s, written(s).main, false);
    if (written(s).has_initial) result.initial = equation(s, written(s).initial, true);
    out_.statements.push_back(std::move(result));
  }

  void left_side(int s, const Equation& e, bool initial, LoweredEquation& result) {
    const TensorInfo& info = tensor_of(s);
    if (e.name != info.name) {
      names_.error(e.place,
                   fmt::format("found '{}', expected the start of '{}'", e.name, info.name));
    }
    const size_t left_out = info.axes.size() - written(s).main.indices.size();
    if (e.indices.size() + left_out != info.axes.size()) {
      names_.error(e.place, fmt::format("found {} indices, expected {} as in the running line",
                                        e.indices.size(), info.axes.size() - left_out));
    }
    for (size_t a = 0; a < info.axes.size(); ++a) {
      int id = -1;
      if (a < left_out) {
        id = names_.node({IndexNode::Kind::rank, 0, info.axes[a].rank, {}, bit(info.axes[a].rank)});
      } else {
        id = left_node(e.indices[a - left_out]);
        if (initial) check_initial_index(s, info.axes[a], id, e.indices[a - left_out]);
      }
      result.index.push_back(id);
      if (const Split* split = merged_split(out_, id)) {
        result.left.push_back(split->outer);
        result.left.push_back(split->inner);
      } else if (!(initial && info.axes[a].running)) {
        result.left.push_back(info.axes[a].rank);
      }
    }
    for (int r : result.left) result.left_set |= bit(r);
  }

  void check_initial_index(int s, const Axis& axis, int id, int ast_index) {
    const IndexNode& n = out_.node(id);
    const Split* split = merged_split(out_, id);
    const bool fits = axis.running       ? n.kind == IndexNode::Kind::number && n.number == 0
                      : split != nullptr ? split->parent == axis.rank
                                         : n.kind == IndexNode::Kind::rank && n.id == axis.rank;
    if (!fits) {
      names_.error(index_place(ast_index),
                   fmt::format("found another index, expected {} in the start of '{}'",
                               axis.running ? "0" : out_.rank(axis.rank).name, tensor_of(s).name));
    }
  }

  /// Ranks that references and the left side bring in; values and filters may only use them.
  RankSet visible_ranks(const Equation& e, const LoweredEquation& lowered) {
    RankSet set = lowered.left_set;
    for (const Term& t : e.terms) {
      for_each_expr(ast_, t.body, [&](const Expr& x) {
        const int tensor = x.kind == Expr::Kind::name ? names_.tensor(x.name) : -1;
        if (tensor < 0) return;
        const size_t nodes = out_.indices.size();
        const auto m = names_.match(out_.tensor(tensor), x.indices, ~RankSet{0});
        if (m) set |= m->ranks;
        out_.indices.resize(nodes);
      });
    }
    return set;
  }

  LoweredEquation equation(int s, const Equation& e, bool initial) {
    LoweredEquation result;
    result.tensor = first_statement_ + s;
    result.place = e.place;
    left_side(s, e, initial, result);
    const RankSet visible = visible_ranks(e, result);
    const CheckReference check = [&](int tensor, const std::vector<int>& index, Place place) {
      check_reference(s, initial, tensor, index, place);
    };
    TermLowering terms(ast_, names_, out_, visible, check);
    RankSet bound = 0;
    for (const Term& t : e.terms) {
      LoweredTerm term = terms.term(t, result.left, result.left_set);
      for (const Node& n : term.nodes) bound |= n.ranks;
      add_split_conditions(term);
      result.terms.push_back(std::move(term));
    }
    for (const Filter& f : e.filters) {
      const Condition c = terms.filter(f);
      bound |= c.ranks;
      bool used = false;
      for (LoweredTerm& term : result.terms) {
        if ((c.ranks & ~term.ranks) != 0) continue;
        term.conditions.push_back(c);
        used = true;
      }
      if (!used) {
        names_.error(f.place, fmt::format("found a filter on '{}', which no term of this line "
                                          "iterates over, expected ranks of the line",
                                          first_rank_name(c.ranks & ~visible)));
      }
    }
    for (const LoweredTerm& term : result.terms) {
      operations_ += term.nodes.size() + term.conditions.size();
      if (operations_ <= static_cast<size_t>(kMaxAllNodes)) continue;
      names_.error(term.place, fmt::format("found more than {} operations and filters in all once "
                                           "the functions are written out, expected fewer",
                                           kMaxAllNodes));
    }
    if (!initial) check_bound(s, e, result, bound);
    return result;
  }

  std::string first_rank_name(RankSet set) const {
    for (size_t r = 0; r < out_.ranks.size(); ++r) {
      if ((set & bit(static_cast<int>(r))) != 0) return out_.ranks[r].name;
    }
    return "these ranks together";
  }

  /// The last tile of a split may be ragged: points behind the end of the parent do not exist.
  void add_split_conditions(LoweredTerm& term) const {
    using Kind = IndexNode::Kind;
    RankSet there = term.ranks;  // a part that is split again is there as its own parts
    for (size_t s = out_.splits.size(); s-- > 0;) {
      const RankSet parts = bit(out_.splits[s].outer) | bit(out_.splits[s].inner);
      if ((there & parts) == parts) there |= bit(out_.splits[s].parent);
    }
    for (const Split& s : out_.splits) {
      if ((there & bit(s.outer)) == 0 || (there & bit(s.inner)) == 0) continue;
      const int outer = names_.rank_node(s.outer, term.ranks);
      const int inner = names_.rank_node(s.inner, term.ranks);
      const RankSet both = out_.node(outer).ranks | out_.node(inner).ranks;
      const int product = names_.node({Kind::multiply, 0, -1, {outer, s.block}, 0});
      Condition c;
      c.args = {names_.node({Kind::add, 0, -1, {product, inner}, 0}),
                names_.node({Kind::size, 0, s.parent, {}, 0})};
      c.compare = Compare::less;
      c.ranks = both;
      term.conditions.push_back(c);
    }
  }

  void check_bound(int s, const Equation& e, const LoweredEquation& lowered, RankSet bound) {
    const size_t left_out = lowered.index.size() - e.indices.size();
    for (size_t a = left_out; a < lowered.index.size(); ++a) {
      const RankSet free = out_.node(lowered.index[a]).ranks & ~bound;
      if (free == 0 || tensor_of(s).axes[a].running) continue;
      names_.error(index_place(e.indices[a - left_out]),
                   fmt::format("found rank '{}' on the left, which nothing on the right binds, "
                               "expected a term or a filter with it",
                               first_rank_name(free)));
    }
  }

  // ---- order
  void check_reference(int s, bool initial, int tensor, const std::vector<int>& index,
                       Place place) {
    const TensorInfo& info = out_.tensor(tensor);
    if (info.input || info.statement < s) return;
    if (info.running >= 0 && !initial) {
      for (size_t a = 0; a < info.axes.size(); ++a) {
        if (!info.axes[a].running) continue;
        const auto offset = offset_from(out_, index[a], info.running);
        if (!offset || *offset > 0) {
          names_.error(place, fmt::format("found '{}' ahead of its running rank, expected '{}[{}]' "
                                          "or an earlier element",
                                          info.name, info.name, out_.rank(info.running).name));
        }
      }
      Group& g = groups_[static_cast<size_t>(s)];
      g.last = std::max(g.last, info.statement);
      return;
    }
    if (info.statement == s) {
      names_.error(place,
                   fmt::format("found '{}' in its own definition, a cycle, expected a running "
                               "rank ('{}[rank+1]') or another tensor",
                               info.name, info.name));
    }
    names_.error(place, fmt::format("found '{}' before its definition in line {}{}, expected it "
                                    "after that line",
                                    info.name, info.place.line,
                                    reaches(info.statement, s) ? ", a cycle" : ""));
  }

  bool mentions(int ast_expr, const std::string& name) const {
    bool found = false;
    for_each_expr(ast_, ast_expr, [&](const Expr& e) {
      found = found || (e.kind == Expr::Kind::name && e.name == name);
    });
    return found;
  }

  /// Does statement `from` read what statement `to` defines, directly or through others?
  bool reaches(int from, int to) const {
    std::vector<bool> seen(ast_.statements.size());
    std::vector<int> stack = {from};
    while (!stack.empty()) {
      const int at = stack.back();
      stack.pop_back();
      if (at == to) return true;
      if (seen[static_cast<size_t>(at)]) continue;
      seen[static_cast<size_t>(at)] = true;
      for (size_t other = 0; other < seen.size(); ++other) {
        for (const Term& t : written(at).main.terms) {
          if (!seen[other] && mentions(t.body, written(static_cast<int>(other)).main.name)) {
            stack.push_back(static_cast<int>(other));
          }
        }
      }
    }
    return false;
  }

  void form_groups() {
    const int n = static_cast<int>(ast_.statements.size());
    for (int s = 0; s < n;) {
      Group g;
      g.first = s;
      g.last = s;
      for (int t = s; t <= g.last; ++t) {
        g.last = std::max(g.last, groups_[static_cast<size_t>(t)].last);
      }
      for (int t = s; t <= g.last; ++t) {
        if (tensor_of(t).running >= 0) g.rank = tensor_of(t).running;
      }
      out_.groups.push_back(g);
      s = g.last + 1;
    }
  }

  void check_groups() {
    for (const Group& g : out_.groups) {
      if (g.first == g.last) continue;
      for (int s = g.first; s <= g.last; ++s) check_group_member(g, s);
    }
  }

  void check_group_member(const Group& g, int s) {
    const TensorInfo& info = tensor_of(s);
    const bool runs = std::any_of(info.axes.begin(), info.axes.end(),
                                  [&](const Axis& a) { return a.rank == g.rank; });
    if (!runs || (info.running >= 0 && info.running != g.rank)) {
      names_.error(info.place,
                   fmt::format("found '{}' between lines that run together along '{}', expected "
                               "that rank on its left side or the line elsewhere",
                               info.name, out_.rank(g.rank).name));
    }
    const LoweredStatement& statement = out_.statements[static_cast<size_t>(s)];
    for (const LoweredTerm& term : statement.main.terms) {
      for (const Node& n : term.nodes) {
        if (n.op == Op::load) check_group_load(g, s, n, term.place);
      }
    }
    if (!statement.initial) return;
    for (const LoweredTerm& term : statement.initial->terms) {
      for (const Node& n : term.nodes) {
        if (n.op == Op::load && !out_.tensor(n.tensor).input &&
            out_.tensor(n.tensor).statement >= g.first) {
          names_.error(term.place, fmt::format("found '{}' in a start, before the lines that run "
                                               "together, expected a tensor defined above them",
                                               out_.tensor(n.tensor).name));
        }
      }
    }
  }

  void check_group_load(const Group& g, int s, const Node& load, Place place) {
    const TensorInfo& info = out_.tensor(load.tensor);
    if (info.input || info.statement < g.first || info.statement > g.last) return;
    for (size_t a = 0; a < info.axes.size(); ++a) {
      if (info.axes[a].rank != g.rank) continue;
      const auto offset = offset_from(out_, load.index[a], g.rank);
      const int64_t limit = info.running >= 0 && info.statement < s ? 1 : 0;
      if (!offset || *offset > limit) {
        names_.error(place, fmt::format("found '{}' read at another place of '{}' than the lines "
                                        "that run together have reached, expected '{}' or earlier",
                                        info.name, out_.rank(g.rank).name, out_.rank(g.rank).name));
      }
    }
  }

  const Ast& ast_;
  Lowered out_;
  Names names_;
  int first_statement_ = 0;
  size_t operations_ = 0;      // of the equations so far
  std::vector<Group> groups_;  // of each statement: the last one it reads ahead of
};

}  // namespace

std::shared_ptr<const Lowered> lower(const Ast& ast) { return Checker(ast).run(); }

}  // namespace heed::cascade
