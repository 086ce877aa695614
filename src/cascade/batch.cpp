#include "cascade/batch.h"

#include <fmt/format.h>

#include <algorithm>

namespace heed::cascade {
namespace {

class BatchRanks {
 public:
  BatchRanks(const Ast& ast, const Names& names, Lowered& lowered, int first)
      : ast_(ast), names_(names), out_(lowered), first_(first) {}

  /// Gives each left side without batch ranks those that its right side brings in, until nothing
  /// changes: a running tensor reads itself.
  void spread() {
    std::vector<RankSet> given(ast_.statements.size());
    const std::vector<std::vector<size_t>> readers = find_readers();
    std::vector<bool> stale(given.size(), true);  // something that it reads has changed
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t s = 0; s < given.size(); ++s) {
        if (!stale[s]) continue;
        stale[s] = false;
        TensorInfo& info = tensor_of(static_cast<int>(s));
        const RankSet written_batch = left_ranks(info) & batch_ranks() & ~given[s];
        const Batch found = batch_of(static_cast<int>(s));
        const RankSet wanted = written_batch != 0 ? 0 : found.completed & ~found.explicitly;
        if ((wanted & ~given[s]) == 0) continue;
        given[s] |= wanted;
        changed = true;
        for (size_t reader : readers[s]) stale[reader] = true;
        give_axes(info, given[s]);
      }
    }
    for (size_t s = 0; s < given.size(); ++s) check_batch(static_cast<int>(s), given[s]);
  }

 private:
  const Statement& statement(int s) const { return ast_.statements[static_cast<size_t>(s)]; }
  TensorInfo& tensor_of(int s) { return out_.tensors[static_cast<size_t>(first_ + s)]; }

  /// Of each statement: those that read its tensor.
  std::vector<std::vector<size_t>> find_readers() const {
    std::vector<std::vector<size_t>> readers(ast_.statements.size());
    for (size_t s = 0; s < readers.size(); ++s) {
      const auto note = [&](const Expr& e) {
        const int tensor = e.kind == Expr::Kind::name ? names_.tensor(e.name) : -1;
        if (tensor < first_) return;
        std::vector<size_t>& list = readers[static_cast<size_t>(tensor - first_)];
        if (list.empty() || list.back() != s) list.push_back(s);
      };
      for (const Equation* e : {&ast_.statements[s].main, &ast_.statements[s].initial}) {
        for (const Term& t : e->terms) for_each_expr(ast_, t.body, note);
      }
    }
    return readers;
  }

  struct Batch {
    RankSet completed = 0;  // brought in by indices that were left out
    RankSet explicitly = 0;
  };

  RankSet batch_ranks() const {
    RankSet set = 0;
    for (size_t r = 0; r < out_.ranks.size(); ++r) {
      if (out_.ranks[r].batch) set |= bit(static_cast<int>(r));
    }
    return set;
  }

  void find_batch(int ast_expr, Batch& found) const {
    const Expr& e = ast_.exprs[static_cast<size_t>(ast_expr)];
    for (int arg : e.args) find_batch(arg, found);
    if (e.kind != Expr::Kind::name) return;
    const int tensor = names_.tensor(e.name);
    if (tensor < 0) {
      const int r = names_.rank(e.name);
      if (r >= 0) found.completed |= bit(r) & batch_ranks();
      return;
    }
    const size_t nodes = out_.indices.size();
    const auto match = names_.match(out_.tensor(tensor), e.indices, ~RankSet{0});
    out_.indices.resize(nodes);
    if (!match) return;
    const bool batched =
        std::any_of(out_.tensor(tensor).axes.begin(), out_.tensor(tensor).axes.end(),
                    [](const Axis& a) { return a.batch != 0; });
    (batched && !match->left_out ? found.explicitly : found.completed) |=
        match->ranks & batch_ranks();
  }

  void find_batch(const Equation& e, Batch& found) const {
    for (const Term& t : e.terms) find_batch(t.body, found);
    for (const Filter& f : e.filters) {
      if (f.is_compare || f.has_args) {
        const size_t nodes = out_.indices.size();
        for (int arg : f.args) {
          found.completed |= out_.node(names_.index(arg, ~RankSet{0})).ranks & batch_ranks();
        }
        out_.indices.resize(nodes);
        continue;
      }
      for (const PredicateDeclaration& p : ast_.predicates) {
        if (p.name != f.name) continue;
        for (const std::string& r : p.ranks) found.completed |= bit(names_.rank(r)) & batch_ranks();
      }
    }
  }

  Batch batch_of(int s) const {
    Batch found;
    find_batch(statement(s).main, found);
    if (statement(s).has_initial) find_batch(statement(s).initial, found);
    return found;
  }

  RankSet left_ranks(const TensorInfo& info) const {
    RankSet set = 0;
    for (const Axis& axis : info.axes) {
      if (axis.rank >= 0) set |= bit(axis.rank);
    }
    return set;
  }

  void give_axes(TensorInfo& info, RankSet ranks) const {
    std::vector<Axis> axes;
    for (size_t r = 0; r < out_.ranks.size(); ++r) {
      const RankSet one = bit(static_cast<int>(r));
      if ((ranks & one) == 0) continue;
      Axis axis;
      axis.rank = static_cast<int>(r);
      axis.batch = one;
      axes.push_back(axis);
    }
    for (const Axis& axis : info.axes) {
      if ((axis.batch & ranks) == 0) axes.push_back(axis);
    }
    info.axes = std::move(axes);
  }

  void check_batch(int s, RankSet given) {
    const Batch found = batch_of(s);
    const TensorInfo& info = tensor_of(s);
    const RankSet own = left_ranks(info) & batch_ranks() & ~given;
    const RankSet bad =
        own != 0 ? found.completed & ~own & ~found.explicitly : found.completed & found.explicitly;
    for (size_t r = 0; r < out_.ranks.size(); ++r) {
      if ((bad & bit(static_cast<int>(r))) == 0) continue;
      const std::string& name = out_.ranks[r].name;
      names_.error(info.place,
                   own != 0 ? fmt::format("found '{}' without the batch rank '{}' that its right "
                                          "side depends on, expected all batch ranks or none on "
                                          "the left",
                                          info.name, name)
                            : fmt::format("found the batch rank '{}' written in one place and left "
                                          "out in another, expected '{}' on the left side of '{}' "
                                          "or no batch ranks in this line",
                                          name, name, info.name));
    }
    if (info.axes.size() > static_cast<size_t>(kMaxAxes)) {
      names_.error(info.place,
                   fmt::format("found {} axes, expected at most {}", info.axes.size(), kMaxAxes));
    }
  }

  const Ast& ast_;
  const Names& names_;
  Lowered& out_;
  int first_;
};

}  // namespace

void spread_batch_ranks(const Ast& ast, const Names& names, Lowered& lowered, int first) {
  BatchRanks(ast, names, lowered, first).spread();
}

}  // namespace heed::cascade
