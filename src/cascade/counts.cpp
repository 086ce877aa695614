// Operations and traffic per statement. Each operation counts once for every combination of the
// ranks beneath it, so a factor that does not depend on a rank is not counted along it. An addition
// or subtraction of a product is one multiply-add with it, a sum over products too; other
// additions, subtractions and multiplications count as one multiply-add each.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cascade/cascade.h"
#include "cascade/lowered.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

using Product = std::vector<std::string>;

void add(Polynomial& to, const Polynomial& other) {
  for (const auto& [names, c] : other.terms) to.terms[names] += c;
}

class Counter {
 public:
  explicit Counter(const Lowered& lowered) : lowered_(lowered) {}

  std::vector<StatementCount> run(const Ast& ast) {
    find_lifetimes();
    std::vector<StatementCount> rows;
    for (size_t s = 0; s < lowered_.statements.size(); ++s) {
      const LoweredStatement& statement = lowered_.statements[s];
      StatementCount row;
      row.tensor = ast.statements[s].main.name;
      row.line = ast.statements[s].main.place.line;
      equation(statement.main, row);
      if (statement.initial) equation(*statement.initial, row);
      for (size_t t = 0; t < lowered_.tensors.size(); ++t) {
        const int at = static_cast<int>(s);
        if (lowered_.tensors[t].statement <= at && last_use_[t] > at) {
          add(row.live_after, tensor_size(lowered_.tensors[t]));
        }
      }
      rows.push_back(std::move(row));
    }
    return rows;
  }

 private:
  void find_lifetimes() {
    last_use_.assign(lowered_.tensors.size(), -1);
    for (size_t s = 0; s < lowered_.statements.size(); ++s) {
      const auto visit = [&](const LoweredEquation& e) {
        for (const LoweredTerm& t : e.terms) {
          for (const Node& n : t.nodes) {
            if (n.op == Op::load) last_use_[static_cast<size_t>(n.tensor)] = static_cast<int>(s);
          }
        }
      };
      visit(lowered_.statements[s].main);
      if (lowered_.statements[s].initial) visit(*lowered_.statements[s].initial);
    }
  }

  /// The two parts of a split together are their parent: points behind its end do not exist.
  RankSet joined(RankSet ranks) const {
    for (bool changed = true; changed;) {
      changed = false;
      for (const Split& s : lowered_.splits) {
        const RankSet parts = bit(s.outer) | bit(s.inner);
        if ((ranks & parts) != parts || (ranks & bit(s.parent)) != 0) continue;
        ranks = (ranks & ~parts) | bit(s.parent);
        changed = true;
      }
    }
    return ranks;
  }

  Product names(RankSet ranks) const {
    Product result;
    ranks = joined(ranks);
    for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
      if ((ranks & bit(static_cast<int>(r))) != 0) result.push_back(lowered_.ranks[r].name);
    }
    std::sort(result.begin(), result.end());
    return result;
  }

  void count(Polynomial& to, RankSet ranks) const { to.terms[names(ranks)] += 1; }

  void addition(StatementCount& row, RankSet ranks) const {
    count(row.multiply_adds, ranks);
    count(row.additions, ranks);
  }

  Polynomial tensor_size(const TensorInfo& info) const {
    Polynomial size;
    if (info.scalar) return size;
    RankSet ranks = 0;
    RankSet steps = 0;
    for (const Axis& axis : info.axes) {
      if (axis.rank < 0) {
        ranks |= lowered_.node(axis.declared).ranks;
      } else {
        ranks |= bit(axis.rank);
        if (axis.running) steps |= bit(axis.rank);
      }
    }
    count(size, ranks);
    if (steps != 0) count(size, ranks & ~steps);  // (M1 + 1) * rest
    return size;
  }

  void equation(const LoweredEquation& e, StatementCount& row) const {
    count(row.writes, e.left_set);
    std::vector<const Node*> seen;
    int products = 0;  // terms that an addition can be fused with
    for (size_t t = 0; t < e.terms.size(); ++t) {
      const LoweredTerm& term = e.terms[t];
      const bool product = operations(term, e.left_set, row);
      products += product && term.reduced.empty() &&
                  term.nodes[static_cast<size_t>(term.root)].ranks == e.left_set;
      if (t > 0 && products > 0) {
        --products;
      } else if (t > 0) {
        addition(row, e.left_set);
      }
      reads(term, seen, row);
    }
  }

  /// Counts the operations of a term and its reduction; true if its root is a product.
  bool operations(const LoweredTerm& term, RankSet left, StatementCount& row) const {
    const std::vector<bool> varies = varying(term);
    std::vector<bool> open(term.nodes.size());  // products without an addition so far
    for (size_t i = 0; i < term.nodes.size(); ++i) {
      const Node& n = term.nodes[i];
      if (!varies[i] || n.args.empty()) continue;
      open[i] = n.op == Op::multiply;
      const bool sum = n.op == Op::add || n.op == Op::subtract;
      if (sum && fuse(term, n, open)) continue;
      count(counter(n.op, row), n.ranks);
      if (sum) count(row.additions, n.ranks);
    }
    const size_t root = static_cast<size_t>(term.root);
    if (term.reduced.empty()) return open[root];
    // A filter that chooses points by more ranks than the term has leaves a reduction for each.
    RankSet reduced = term.nodes[root].ranks;
    for (const Condition& c : term.conditions) {
      if ((c.ranks & ~left) != 0) reduced |= c.ranks;
    }
    if (term.reduce != Reduce::sum) {
      count(row.maxima, reduced);
    } else if (!open[root] || reduced != term.nodes[root].ranks) {
      addition(row, reduced);
    }
    return false;
  }

  /// Nodes that the root needs and that are no constants.
  static std::vector<bool> varying(const LoweredTerm& term) {
    std::vector<bool> used(term.nodes.size()), varies(term.nodes.size());
    used[static_cast<size_t>(term.root)] = true;
    for (size_t i = term.nodes.size(); i-- > 0;) {
      for (int arg : term.nodes[i].args) {
        if (used[i]) used[static_cast<size_t>(arg)] = true;
      }
    }
    for (size_t i = 0; i < term.nodes.size(); ++i) {
      const Node& n = term.nodes[i];
      bool any = n.op == Op::load || n.op == Op::index;
      for (int arg : n.args) any = any || varies[static_cast<size_t>(arg)];
      varies[i] = any && used[i];
    }
    return varies;
  }

  static bool fuse(const LoweredTerm& term, const Node& sum, std::vector<bool>& open) {
    for (int arg : sum.args) {
      const size_t a = static_cast<size_t>(arg);
      if (!open[a] || term.nodes[a].ranks != sum.ranks) continue;
      open[a] = false;
      return true;
    }
    return false;
  }

  static Polynomial& counter(Op op, StatementCount& row) {
    switch (op) {
      case Op::add:
      case Op::subtract:
      case Op::multiply:
        return row.multiply_adds;
      case Op::divide:
        return row.divisions;
      case Op::max:
      case Op::min:
      case Op::relu:
      case Op::abs:
        return row.maxima;
      case Op::exp:
      case Op::tanh:
      case Op::sigmoid:
      case Op::gelu:
        return row.exponentials;
      default:
        return row.other;
    }
  }

  void reads(const LoweredTerm& term, std::vector<const Node*>& seen, StatementCount& row) const {
    for (const Node& n : term.nodes) {
      if (n.op != Op::load || lowered_.tensor(n.tensor).scalar) continue;
      const bool again = std::any_of(seen.begin(), seen.end(),
                                     [&](const Node* other) { return same_load(*other, n); });
      if (again) continue;
      seen.push_back(&n);
      RankSet ranks = 0;
      const TensorInfo& info = lowered_.tensor(n.tensor);
      for (size_t a = 0; a < info.axes.size(); ++a) ranks |= axis_ranks(info.axes[a], n.index[a]);
      count(row.reads, ranks);
    }
  }

  /// The ranks whose sizes say how many places of an axis are read.
  RankSet axis_ranks(const Axis& axis, int index) const {
    const RankSet ranks = lowered_.node(index).ranks;
    const bool several = (ranks & (ranks - 1)) != 0;
    if (ranks == 0 || (!several && !calls(index))) return ranks;
    const bool plain = axis.rank < 0 || merged_split(lowered_, index) != nullptr;
    return plain ? ranks : bit(axis.rank);
  }

  bool calls(int index) const {
    const IndexNode& node = lowered_.node(index);
    return node.kind == IndexNode::Kind::call ||
           std::any_of(node.args.begin(), node.args.end(), [&](int arg) { return calls(arg); });
  }

  bool same_index(int a, int b) const {
    const IndexNode& x = lowered_.node(a);
    const IndexNode& y = lowered_.node(b);
    if (x.kind != y.kind || x.number != y.number || x.id != y.id ||
        x.args.size() != y.args.size()) {
      return false;
    }
    for (size_t i = 0; i < x.args.size(); ++i) {
      if (!same_index(x.args[i], y.args[i])) return false;
    }
    return true;
  }

  bool same_load(const Node& a, const Node& b) const {
    if (a.tensor != b.tensor) return false;
    for (size_t i = 0; i < a.index.size(); ++i) {
      if (!same_index(a.index[i], b.index[i])) return false;
    }
    return true;
  }

  const Lowered& lowered_;
  std::vector<int> last_use_;  // per tensor: statement
};

}  // namespace

std::vector<StatementCount> count(const Program& program) {
  return Counter(*program.ast().lowered).run(program.ast());
}

double Polynomial::at(const std::map<std::string, int64_t>& sizes) const {
  double total = 0;
  for (const auto& [names, coefficient] : terms) {
    double product = coefficient;
    for (const std::string& name : names) {
      const auto it = sizes.find(name);
      if (it == sizes.end()) {
        throw Error(fmt::format("counts: the size of rank {} is missing", name));
      }
      product *= static_cast<double>(it->second);
    }
    total += product;
  }
  return total;
}

std::string Polynomial::text() const {
  std::string result;
  for (const auto& [names, coefficient] : terms) {
    if (coefficient == 0) continue;
    std::string term;
    if (coefficient != 1 || names.empty()) term = fmt::format("{}", coefficient);
    for (const std::string& name : names) term += (term.empty() ? "" : "*") + name;
    result += (result.empty() ? "" : " + ") + term;
  }
  return result.empty() ? "0" : result;
}

}  // namespace heed::cascade
