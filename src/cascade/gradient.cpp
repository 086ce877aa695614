// Reverse mode over the statements of a program: last line first, running ranks backwards. Each
// term is walked again as in the forward, its values computed anew chunk by chunk, and the adjoint
// of an element handed down to what the element read. Points that the forward left out get nothing.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "cascade/kernels.h"
#include "cascade/run.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

/// The reverse of one term.
class TermReverse {
 public:
  TermReverse(const Run& run, const LoweredEquation& equation, const LoweredTerm& term, int running,
              const std::vector<bool>& in_step, std::vector<std::vector<double>>& adjoints)
      : equation_(equation),
        term_(term),
        nest_(run.frame(), equation, term, running, in_step),
        left_(run.frame().tensors[static_cast<size_t>(equation.tensor)]),
        adjoints_(adjoints),
        nodes_(term.nodes.size()),
        active_(term.nodes.size()) {
    for (size_t i = 0; i < term.nodes.size(); ++i) {
      const Node& n = term.nodes[i];
      active_[i] = n.op == Op::load;
      for (int arg : n.args) active_[i] = active_[i] || active_[static_cast<size_t>(arg)];
      nodes_[i].resize(nest_.registers()[i].uniform ? 1 : kLanes);
    }
  }

  void set_step(int64_t i) { nest_.set_step(i); }

  void run() {
    if (!active_[static_cast<size_t>(term_.root)]) return;
    nest_.elements([&](const Nest::Block& block) {
      if (!take_adjoint(block)) return;
      if (term_.reduce == Reduce::sum) {
        nest_.points([&](int lanes, int64_t) { reverse(lanes, [](int) { return true; }); });
        return;
      }
      find_winners(block.lanes);
      nest_.points([&](int lanes, int64_t ordinal) {
        reverse(lanes, [&](int l) { return winners_[place(l)] == ordinal_of(ordinal, l); });
      });
    });
  }

 private:
  size_t place(int lane) const { return nest_.vector_left() ? static_cast<size_t>(lane) : 0; }
  int64_t ordinal_of(int64_t first, int lane) const {
    return nest_.vector_left() ? first : first + lane;
  }

  /// The adjoints of the block's elements; false if all are 0.
  bool take_adjoint(const Nest::Block& block) {
    const std::vector<double>& adjoint = adjoints_[static_cast<size_t>(equation_.tensor)];
    bool any = false;
    for (int l = 0; l < block.lanes; ++l) {
      const uint64_t at =
          block.offset + static_cast<uint64_t>(l) * static_cast<uint64_t>(block.stride);
      // First of all the block's own absence: what it leaves out may lie behind the tensor's end.
      const bool gone =
          (!nest_.block_absent().empty() && nest_.block_absent()[static_cast<size_t>(l)] != 0) ||
          (!left_.present.empty() && left_.present[at] == 0) ||
          (!left_.carried.empty() && left_.carried[at] != 0);
      const double g = gone ? 0.0 : adjoint[at];
      element_[l] = term_.minus ? -g : g;
      any |= g != 0;
    }
    return any;
  }

  void find_winners(int lanes) {
    std::fill(winners_, winners_ + lanes, int64_t{-1});
    nest_.points([&](int count, int64_t ordinal) {
      if (!nest_.compute(count)) return;
      for (int l = 0; l < count; ++l) {
        if (!nest_.absent().empty() && nest_.absent()[static_cast<size_t>(l)] != 0) continue;
        const size_t to = place(l);
        const double value = nest_.value(l);
        if (value == identity(term_.reduce)) continue;  // an empty row has no winner
        if (winners_[to] < 0 || beats(value, best_[to])) {
          winners_[to] = ordinal_of(ordinal, l);
          best_[to] = value;
        }
      }
    });
  }

  bool beats(double value, double best) const {
    if (std::isnan(best)) return false;
    return std::isnan(value) || (term_.reduce == Reduce::max ? value > best : value < best);
  }

  template <class Kept>
  void reverse(int lanes, Kept kept) {
    if (!nest_.compute(lanes)) return;
    for (std::vector<double>& a : nodes_) {
      std::fill_n(a.begin(), std::min<size_t>(a.size(), static_cast<size_t>(lanes)), 0.0);
    }
    const size_t root = static_cast<size_t>(term_.root);
    for (int l = 0; l < lanes; ++l) {
      if (!nest_.absent().empty() && nest_.absent()[static_cast<size_t>(l)] != 0) continue;
      if (kept(l)) nodes_[root][at(root, l)] += element_[place(l)];
    }
    for (size_t i = term_.nodes.size(); i-- > 0;) {
      if (!active_[i]) continue;
      const int count = nest_.registers()[i].uniform ? 1 : lanes;
      const Node& n = term_.nodes[i];
      if (n.op == Op::load) {
        scatter(i, count);
      } else if (n.op == Op::select) {
        reverse_select(i, count);
      } else {
        for (size_t a = 0; a < n.args.size(); ++a) {
          if (active_[static_cast<size_t>(n.args[a])]) reverse_operation(i, a, count);
        }
      }
    }
  }

  size_t at(size_t node, int lane) const {
    return nest_.registers()[node].uniform ? 0 : static_cast<size_t>(lane);
  }
  double value(int node, int lane) const {
    const size_t n = static_cast<size_t>(node);
    return nest_.registers()[n].data[at(n, lane)];
  }

  void reverse_operation(size_t node, size_t which, int lanes) {
    const Node& n = term_.nodes[node];
    const int to = n.args[which];
    std::vector<double>& target = nodes_[static_cast<size_t>(to)];
    if (n.op == Op::multiply) return reverse_product(node, to, n.args[1 - which], lanes);
    for (int l = 0; l < lanes; ++l) {
      const double g = nodes_[node][static_cast<size_t>(l)];
      if (g == 0) continue;  // absent lanes hold no values
      const double a = value(n.args[0], l);
      const double b = n.args.size() > 1 ? value(n.args[1], l) : 0.0;
      target[at(static_cast<size_t>(to), l)] +=
          pull_back(n.op, static_cast<int>(which), a, b, value(static_cast<int>(node), l), g);
    }
  }

  void reverse_product(size_t node, int to, int other, int lanes) {
    const double* adjoint = nodes_[node].data();
    const Nest::Register& factor = nest_.registers()[static_cast<size_t>(other)];
    double* target = nodes_[static_cast<size_t>(to)].data();
    const bool one = nest_.registers()[static_cast<size_t>(to)].uniform;
    const double first = factor.data[0];
    double total = 0;
    for (int l = 0; l < lanes; ++l) {
      const double slope = factor.uniform ? first : factor.data[l];
      // An absent lane has the adjoint 0 and may hold anything.
      const double g =
          adjoint[l] == 0 || (slope == 0 && std::isinf(adjoint[l])) ? 0.0 : adjoint[l] * slope;
      if (one) {
        total += g;
      } else {
        target[l] += g;
      }
    }
    if (one) target[0] += total;
  }

  void reverse_select(size_t node, int lanes) {
    const Node& n = term_.nodes[node];
    for (int l = 0; l < lanes; ++l) {
      const double g = nodes_[node][static_cast<size_t>(l)];
      if (g == 0) continue;
      const bool yes = compare(n.compare, value(n.args[0], l), value(n.args[1], l));
      const size_t to = static_cast<size_t>(n.args[yes ? 2 : 3]);
      nodes_[to][at(to, l)] += g;
    }
  }

  void scatter(size_t node, int lanes) {
    std::vector<double>& adjoint = adjoints_[static_cast<size_t>(term_.nodes[node].tensor)];
    if (lanes > 1 && !nest_.registers()[node].masked &&
        nest_.address(static_cast<int>(node), 1) == nest_.address(static_cast<int>(node), 0) + 1) {
      double* to = adjoint.data() + nest_.address(static_cast<int>(node), 0);
      for (int l = 0; l < lanes; ++l) to[l] += nodes_[node][static_cast<size_t>(l)];
      return;
    }
    for (int l = 0; l < lanes; ++l) {
      const double g = nodes_[node][static_cast<size_t>(l)];
      if (g != 0) adjoint[nest_.address(static_cast<int>(node), l)] += g;
    }
  }

  const LoweredEquation& equation_;
  const LoweredTerm& term_;
  Nest nest_;
  const TensorData& left_;
  std::vector<std::vector<double>>& adjoints_;
  std::vector<std::vector<double>> nodes_;
  std::vector<bool> active_;
  double element_[kLanes];
  int64_t winners_[kLanes];
  double best_[kLanes];
};

class Reverse {
 public:
  Reverse(const Run& run, const Values& output_gradients) : run_(run) {
    adjoints_.resize(run.lowered().tensors.size());
    for (size_t i = 0; i < adjoints_.size(); ++i) {
      adjoints_[i].assign(run.frame().tensors[i].values.size(), 0.0);
    }
    for (const auto& [name, gradient] : output_gradients) seed(name, gradient);
  }

  Values run() {
    const std::vector<Group>& groups = run_.lowered().groups;
    for (size_t g = groups.size(); g-- > 0;) group(groups[g]);
    Values values;
    for (size_t i = 0; i < adjoints_.size(); ++i) {
      if (!run_.lowered().tensors[i].input) continue;
      values[run_.lowered().tensors[i].name] = {run_.frame().tensors[i].shape, adjoints_[i]};
    }
    return values;
  }

 private:
  void seed(const std::string& name, const NdArray& gradient) {
    const Lowered& lowered = run_.lowered();
    const int tensor = lowered.find_tensor(name);
    if (tensor < 0 || !lowered.tensor(tensor).output) {
      throw Error(fmt::format("cascade {}: found a gradient of {}, expected one of an output",
                              lowered.name, name));
    }
    const size_t i = static_cast<size_t>(tensor);
    if (gradient.shape != run_.frame().tensors[i].shape ||
        gradient.values.size() != adjoints_[i].size()) {
      throw Error(fmt::format("cascade {}: the gradient of {} has another shape than the output",
                              lowered.name, name));
    }
    adjoints_[i] = gradient.values;
  }

  using Terms = std::vector<std::unique_ptr<TermReverse>>;

  Terms compile(const LoweredEquation& equation, int running, const std::vector<bool>& in_step) {
    Terms terms;
    for (const LoweredTerm& term : equation.terms) {
      terms.push_back(
          std::make_unique<TermReverse>(run_, equation, term, running, in_step, adjoints_));
    }
    return terms;
  }

  void group(const Group& g) {
    const std::vector<bool> together = run_.in_step(g);
    std::vector<Terms> mains;
    const auto statement = [&](int s) -> const LoweredStatement& {
      return run_.lowered().statements[static_cast<size_t>(s)];
    };
    for (int s = g.first; s <= g.last; ++s) {
      mains.push_back(compile(statement(s).main, g.rank, together));
    }
    const int64_t steps = g.rank < 0 ? 1 : run_.size(g.rank);
    for (int64_t i = steps; i-- > 0;) {
      for (size_t m = mains.size(); m-- > 0;) {
        carry(statement(g.first + static_cast<int>(m)), i);
        for (const auto& term : mains[m]) {
          if (g.rank >= 0) term->set_step(i);
          term->run();
        }
      }
    }
    for (int s = g.last; s >= g.first; --s) {
      if (!statement(s).initial) continue;
      for (const auto& term : compile(*statement(s).initial, -1, together)) term->run();
    }
  }

  /// What an absent element kept from the state before it, it hands back to that state.
  void carry(const LoweredStatement& statement, int64_t step) {
    const size_t tensor = static_cast<size_t>(statement.main.tensor);
    const TensorData& data = run_.frame().tensors[tensor];
    if (statement.running < 0 || data.carried.empty()) return;
    const size_t axis = axis_of(run_.lowered().tensors[tensor], statement.running);
    const auto inner = static_cast<size_t>(data.strides[axis]);
    const size_t block = inner * static_cast<size_t>(data.shape[axis]);
    const size_t from = inner * static_cast<size_t>(step + 1);
    std::vector<double>& adjoint = adjoints_[tensor];
    for (size_t outer = 0; outer < adjoint.size(); outer += block) {
      for (size_t i = outer + from; i < outer + from + inner; ++i) {
        if (data.carried[i] != 0) adjoint[i - inner] += adjoint[i];
      }
    }
  }

  const Run& run_;
  std::vector<std::vector<double>> adjoints_;
};

}  // namespace

Values gradient(const Program& program, const Bindings& bindings, const Values& output_gradients) {
  Run run(program, bindings);
  run.forward();
  return Reverse(run, output_gradients).run();
}

}  // namespace heed::cascade
