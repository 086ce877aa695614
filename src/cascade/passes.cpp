// The pass counter (FuseMax, arXiv 2406.10491, section III; formalised as below).
//
// The family of a rank is the rank with all parts it is split into. A statement that iterates over
// a whole member (the rank itself or an inner part) is full; one that iterates over outer parts
// only is a summary of tiles; the others are plain. Each tensor has a time stamp: 2p = known before
// pass p starts, 2p+1 = produced tile by tile during pass p. Inputs have 0.
//   full:      runs in pass p = max over operands of stamp/2; its result has 2p+1
//   summary:   the latest of its operands
//   a reduction over the whole family, and any use of a whole running or tiled tensor: round up to
//   even
#include <fmt/format.h>

#include <algorithm>

#include "cascade/cascade.h"
#include "cascade/lowered.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

int round_up(int stamp) { return stamp + stamp % 2; }

class PassCounter {
 public:
  PassCounter(const Lowered& lowered, int rank) : lowered_(lowered), rank_(rank) {
    family_ = bit(rank);
    for (bool changed = true; changed;) {
      changed = false;
      for (const Split& s : lowered.splits) {
        const RankSet parts = bit(s.outer) | bit(s.inner);
        if ((family_ & bit(s.parent)) == 0 || (family_ & parts) == parts) continue;
        family_ |= parts;
        changed = true;
      }
    }
    // Outer parts count tiles, and so do the parts that they are split into.
    RankSet tiles = 0;
    for (bool changed = true; changed;) {
      const RankSet before = tiles;
      for (const Split& s : lowered.splits) {
        if ((family_ & bit(s.parent)) != 0) tiles |= bit(s.outer);
        if ((tiles & bit(s.parent)) != 0) tiles |= bit(s.outer) | bit(s.inner);
      }
      changed = tiles != before;
    }
    full_ = family_ & ~tiles;
    stamps_.resize(lowered.tensors.size());
  }

  PassReport run(const Ast& ast) {
    PassReport report;
    for (const Group& g : lowered_.groups) settle(g);
    for (size_t s = 0; s < lowered_.statements.size(); ++s) {
      const Result r = statement(static_cast<int>(s));
      const Equation& written = ast.statements[s].main;
      report.rows.push_back({written.name, r.pass, written.place.line});
      report.passes = std::max(report.passes, r.pass);
    }
    return report;
  }

 private:
  struct Result {
    int stamp = 0;
    int pass = 0;
  };

  /// Statements that run together read each other, so their stamps are repeated until they stay.
  /// A circle of lines settles in two rounds, or each step of the running rank needs a new pass.
  void settle(const Group& g) {
    int rounds = 2 * (g.last - g.first + 2);
    for (bool changed = true; changed;) {
      changed = false;
      if (rounds-- == 0) {
        throw Error(
            fmt::format("cascade {}: found a new pass over {} at each step of {}, expected "
                        "a number of passes that does not depend on sizes",
                        lowered_.name, lowered_.rank(rank_).name, lowered_.rank(g.rank).name));
      }
      for (int s = g.first; s <= g.last; ++s) {
        int& stamp = stamps_[static_cast<size_t>(tensor_of(s))];
        const int found = statement(s).stamp;
        changed |= found > stamp;
        stamp = std::max(stamp, found);
      }
    }
  }

  int tensor_of(int s) const { return lowered_.statements[static_cast<size_t>(s)].main.tensor; }

  RankSet carried_by(const TensorInfo& info) const {
    RankSet set = 0;
    for (const Axis& axis : info.axes) {
      if (axis.rank >= 0) set |= bit(axis.rank) & family_;
    }
    return set;
  }

  /// When an operand is there: at once with its tile, or only when the tensor is complete.
  int stamp_of(const Node& load, RankSet iterated) const {
    const TensorInfo& info = lowered_.tensor(load.tensor);
    const int stamp = stamps_[static_cast<size_t>(load.tensor)];
    for (size_t a = 0; a < info.axes.size(); ++a) {
      if (info.axes[a].rank < 0 || (bit(info.axes[a].rank) & family_) == 0) continue;
      if (!follows(load.index[a], info.axes[a].rank, iterated)) return round_up(stamp);
    }
    return stamp;
  }

  /// Does the index move along the axis with the loop over its rank, up to a constant?
  bool follows(int index, int rank, RankSet iterated) const {
    if (offset_from(lowered_, index, rank)) return (iterated & bit(rank)) != 0;
    if (const Split* s = merged_split(lowered_, index)) return s->parent == rank;
    return false;
  }

  /// The latest operand of a term; a tensor does not wait for itself.
  int latest(const LoweredTerm& term, int own) const {
    int stamp = 0;
    for (const Node& n : term.nodes) {
      if (n.op == Op::load && n.tensor != own) stamp = std::max(stamp, stamp_of(n, term.ranks));
    }
    return stamp;
  }

  Result statement(int s) const {
    const LoweredStatement& st = lowered_.statements[static_cast<size_t>(s)];
    const LoweredEquation& e = st.main;
    Result result;
    const RankSet left = e.left_set & family_;
    if ((left & full_) != 0) {  // the left side is full: all terms meet at each of its points
      int stamp = start(st).stamp;
      for (const LoweredTerm& t : e.terms) stamp = std::max(stamp, latest(t, e.tensor));
      result.pass = stamp / 2 + 1;
      result.stamp = stamp / 2 * 2 + 1;
      return result;
    }
    result = latest_of(e);
    const Result first = start(st);
    result.stamp = std::max(result.stamp, first.stamp);
    result.pass = std::max(result.pass, first.pass);
    if (st.running >= 0 && left != 0) result.pass = std::max(result.pass, 1);
    return result;
  }

  /// The start of a running tensor is an operand of the first step.
  Result start(const LoweredStatement& st) const {
    return st.initial ? latest_of(*st.initial) : Result{};
  }

  Result latest_of(const LoweredEquation& e) const {
    Result result;
    for (const LoweredTerm& t : e.terms) {
      const Result r = term(t, e.tensor, e.left_set & family_);
      result.stamp = std::max(result.stamp, r.stamp);
      result.pass = std::max(result.pass, r.pass);
    }
    return result;
  }

  Result term(const LoweredTerm& t, int own, RankSet left) const {
    const int stamp = latest(t, own);
    const RankSet iterated = t.ranks & family_;
    if ((iterated & full_) != 0) {
      const int produced = stamp / 2 * 2 + 1;
      return {left == 0 ? round_up(produced) : produced, stamp / 2 + 1};
    }
    if (iterated != 0) {
      const int pass = std::max(1, round_up(stamp) / 2);
      return {left == 0 ? round_up(stamp) : stamp, pass};
    }
    return {stamp, 0};
  }

  const Lowered& lowered_;
  int rank_;
  RankSet family_ = 0;
  RankSet full_ = 0;  // members whose loop visits single elements
  std::vector<int> stamps_;
};

}  // namespace

PassReport count_passes(const Program& program, std::string_view rank) {
  const Lowered& lowered = *program.ast().lowered;
  const int id = lowered.find_rank(rank);
  if (id < 0) {
    std::string names;
    for (const Rank& r : lowered.ranks) names += (names.empty() ? "" : ", ") + r.name;
    throw Error(
        fmt::format("cascade {}: found no rank {}, expected one of {}", lowered.name, rank, names));
  }
  return PassCounter(lowered, id).run(program.ast());
}

}  // namespace heed::cascade
