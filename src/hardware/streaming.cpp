#include "hardware/streaming.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <set>

#include "cascade/kernels.h"
#include "cascade/lowered.h"
#include "cascade/sizes.h"
#include "hardware/traced_memory.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

using cascade::bit;
using cascade::Lowered;
using cascade::LoweredEquation;
using cascade::LoweredTerm;
using cascade::Node;
using cascade::Op;
using cascade::RankSet;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kMostPoints = 1 << 27;

double identity(cascade::Reduce reduce) {
  return reduce == cascade::Reduce::max ? -kInf : reduce == cascade::Reduce::min ? kInf : 0;
}

/// The rank that passes go over, and its parts.
struct Family {
  int rank = -1, outer = -1, inner = -1;  // parts: -1 where the cascade does not split it
  RankSet all = 0, whole = 0;             // whole: a loop over it visits single elements
  int64_t tile = 1, tiles = 1, size = 0;
};

class Stream {
 public:
  Stream(const cascade::Program& program, std::string_view rank, const cascade::Bindings& bindings)
      : lowered_(*program.ast().lowered),
        bindings_(bindings),
        sizes_(cascade::bind_sizes(lowered_, bindings)),
        memory_(lowered_.tensors.size()),
        report_(cascade::count_passes(program, rank)),
        index_(lowered_.ranks.size(), 0) {
    find_family(lowered_.find_rank(rank));
    find_fibres();
    check_size();
    allocate();
  }

  StreamedRun run() {
    for_each(fibre_ranks_, [&] { fibre(); });
    StreamedRun result;
    result.passes = passes_;
    result.peak_live_words = peak_;
    result.operations = operations_;
    for (size_t t = 0; t < lowered_.tensors.size(); ++t) {
      if (lowered_.tensors[t].scalar) continue;
      const Memory::Tensor& tensor = memory_.tensor(static_cast<int>(t));
      result.tensors.push_back(tensor.touches);
      if (lowered_.tensors[t].output) {
        result.outputs[lowered_.tensors[t].name] = {tensor.shape, tensor.values};
      }
    }
    return result;
  }

 private:
  int64_t size(int rank) const { return sizes_[static_cast<size_t>(rank)]; }
  int64_t& at(int rank) { return index_[static_cast<size_t>(rank)]; }

  // --- set-up --------------------------------------------------------------------------------------

  void find_family(int rank) {
    family_.rank = rank;
    family_.all = family_.whole = bit(rank);
    family_.size = family_.tiles = size(rank);
    for (const cascade::Split& split : lowered_.splits) {
      if (split.parent != rank) continue;
      if (family_.outer >= 0) {
        throw Error("streaming: a rank that is split once is needed, " + lowered_.rank(rank).name +
                    " is split more often");
      }
      family_.outer = split.outer;
      family_.inner = split.inner;
      family_.all |= bit(split.outer) | bit(split.inner);
      family_.whole |= bit(split.inner);
      family_.tile = size(split.inner);
      family_.tiles = size(split.outer);
    }
  }

  RankSet tensor_ranks(const cascade::TensorInfo& info) const {
    RankSet ranks = 0;
    for (const cascade::Axis& axis : info.axes) {
      if (axis.rank >= 0) ranks |= bit(axis.rank);
    }
    return ranks;
  }

  /// Ranks that every tensor of the cascade's own has: their values do not meet.
  void find_fibres() {
    RankSet common = ~RankSet{0};
    for (const cascade::TensorInfo& info : lowered_.tensors) {
      if (!info.input) common &= tensor_ranks(info);
    }
    fibre_set_ = common & ~family_.all;
    for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
      if ((fibre_set_ & bit(static_cast<int>(r))) != 0) fibre_ranks_.push_back(static_cast<int>(r));
    }
  }

  void allocate() {
    for (size_t i = 0; i < lowered_.tensors.size(); ++i) {
      const cascade::TensorInfo& info = lowered_.tensors[i];
      Memory::Tensor& tensor = memory_.tensor(static_cast<int>(i));
      tensor.touches.tensor = info.name;
      tensor.touches.input = info.input;
      if (info.scalar) {
        const auto found = bindings_.scalars.find(info.name);
        if (found == bindings_.scalars.end() && !info.has_default) {
          throw Error("streaming: scalar " + info.name + " has no value");
        }
        tensor.values = {found == bindings_.scalars.end() ? info.fallback : found->second};
        continue;
      }
      const auto found = bindings_.tensors.find(info.name);
      if (info.input && found != bindings_.tensors.end()) {
        tensor.shape = found->second.shape;
        tensor.values = found->second.values;
      } else {
        for (const cascade::Axis& axis : info.axes) {
          if (axis.rank < 0) throw Error("streaming: input " + info.name + " is needed");
          tensor.shape.push_back(size(axis.rank) + (axis.running ? 1 : 0));
        }
        if (info.input && !info.has_default) {
          throw Error("streaming: input " + info.name + " is needed");
        }
        tensor.values.assign(static_cast<size_t>(count(tensor.shape)), info.fallback);
      }
      tensor.touches.elements = count(tensor.shape);
      if (info.input) continue;
      tensor.first.assign(tensor.values.size(), -1);
      tensor.last.assign(tensor.values.size(), -1);
    }
  }

  static int64_t count(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }

  void check_size() const {
    double points = 0;
    for (const auto& statement : lowered_.statements) {
      for (const LoweredTerm& term : statement.main.terms) {
        double of_term = 1;
        for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
          const bool inner_of_family =
              static_cast<int>(r) == family_.rank &&
              (term.ranks & bit(family_.outer < 0 ? 63 : family_.outer)) != 0;
          if ((term.ranks & bit(static_cast<int>(r))) != 0 && !inner_of_family) {
            of_term *= static_cast<double>(sizes_[r]);
          }
        }
        points += of_term;
      }
    }
    if (points > kMostPoints) {
      throw Error(
          fmt::format("streaming: {:.3g} points are too many for a trace, at most 2^27 are "
                      "taken; smaller sizes are needed",
                      points));
    }
  }

  // --- the order -----------------------------------------------------------------------------------

  void for_each(const std::vector<int>& ranks, const std::function<void()>& body,
                size_t depth = 0) {
    if (depth == ranks.size()) return body();
    for (int64_t i = 0; i < size(ranks[depth]); ++i) {
      at(ranks[depth]) = i;
      for_each(ranks, body, depth + 1);
    }
  }

  void fibre() {
    done_.assign(lowered_.statements.size(), false);
    Visits visits(std::max<int64_t>(family_.tiles, 1));
    visits_ = &visits;
    run_plain();
    for (int pass = 1; pass <= report_.passes; ++pass) {
      std::vector<int> pending;
      for (size_t s = 0; s < lowered_.statements.size(); ++s) {
        if (report_.rows[s].pass == pass) pending.push_back(static_cast<int>(s));
      }
      while (!pending.empty()) pending = sweep(pending);
      run_plain();
    }
    if (!std::all_of(done_.begin(), done_.end(), [](bool d) { return d; })) {
      throw Error("streaming: a statement waits for what never comes");
    }
    peak_ = std::max(peak_, memory_.end_fibre());
    passes_ = std::max(passes_, visits.most());
  }

  /// One loop over the tiles with all statements that can run in it; returns the others.
  std::vector<int> sweep(const std::vector<int>& pending) {
    std::vector<int> now = pending, later;
    for (bool changed = true; changed;) {
      changed = false;
      for (int s : now) {
        if (can_run(s, now)) continue;
        later.push_back(s);
        std::erase(now, s);
        changed = true;
        break;
      }
    }
    std::sort(later.begin(), later.end());
    if (now.empty()) {
      throw Error("streaming: " + name(pending[0]) + " cannot run tile by tile");
    }
    for (int s : now) start(s);
    for (int64_t tile = 0; tile < family_.tiles; ++tile) {
      for (int s : now) run_tile(s, tile);
    }
    for (int s : now) done_[static_cast<size_t>(s)] = true;
    return later;
  }

  /// Statements that run in one loop read each other tile by tile, running tensors also from before;
  /// what is summed over all tiles is there only behind the loop.
  bool can_run(int s, const std::vector<int>& together) const {
    bool good = true;
    for_each_operand(s, [&](int tensor) {
      const int maker = lowered_.tensor(tensor).statement;
      if (maker < 0 || maker == s || done_[static_cast<size_t>(maker)]) return;
      const bool beside = std::find(together.begin(), together.end(), maker) != together.end();
      const bool by_tile = (tensor_ranks(lowered_.tensor(tensor)) & family_.all) != 0;
      good &= beside && by_tile;
    });
    return good;
  }

  template <class Body>
  void for_each_operand(int s, const Body& body) const {
    const cascade::LoweredStatement& statement = lowered_.statements[static_cast<size_t>(s)];
    const auto visit = [&](const LoweredEquation& equation) {
      for (const LoweredTerm& term : equation.terms) {
        for (const Node& node : term.nodes) {
          if (node.op == Op::load && !lowered_.tensor(node.tensor).input) body(node.tensor);
        }
      }
    };
    visit(statement.main);
    if (statement.initial) visit(*statement.initial);
  }

  /// Statements that do not touch the rank, as soon as all they read is complete.
  void run_plain() {
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t s = 0; s < lowered_.statements.size(); ++s) {
        if (done_[s] || report_.rows[s].pass != 0 || !can_run(static_cast<int>(s), {})) continue;
        start(static_cast<int>(s));
        evaluate(lowered_.statements[s].main, 0);
        done_[s] = changed = true;
      }
    }
  }

  const std::string& name(int s) const {
    return lowered_.tensor(lowered_.statements[static_cast<size_t>(s)].main.tensor).name;
  }

  void start(int s) {
    const auto& statement = lowered_.statements[static_cast<size_t>(s)];
    if (statement.initial) evaluate(*statement.initial, 0);
  }

  void run_tile(int s, int64_t tile) {
    const LoweredEquation& equation = lowered_.statements[static_cast<size_t>(s)].main;
    RankSet ranks = equation.left_set;
    for (const LoweredTerm& term : equation.terms) ranks |= term.ranks;
    if ((ranks & family_.whole) != 0) visits_->visit(tile);
    if (family_.outer >= 0) at(family_.outer) = tile;
    tile_ = tile;
    evaluate(equation, tile);
  }

  // --- one statement on one tile -------------------------------------------------------------------

  /// The range of a rank inside the tile at hand.
  std::pair<int64_t, int64_t> range(int rank) const {
    if (rank == family_.outer) return {tile_, tile_ + 1};
    if (rank == family_.rank) {
      return {tile_ * family_.tile, std::min(family_.size, (tile_ + 1) * family_.tile)};
    }
    if (rank == family_.inner)
      return {0, std::min(family_.tile, family_.size - tile_ * family_.tile)};
    return {0, size(rank)};
  }

  template <class Body>
  void loop(const std::vector<int>& ranks, const Body& body, size_t depth = 0) {
    if (depth == ranks.size()) {
      body();
      return;
    }
    const auto [begin, end] = range(ranks[depth]);
    for (int64_t i = begin; i < end; ++i) {
      at(ranks[depth]) = i;
      loop(ranks, body, depth + 1);
    }
  }

  std::vector<int> free_ranks(const std::vector<int>& ranks) const {
    std::vector<int> free;
    for (int rank : ranks) {
      if ((fibre_set_ & bit(rank)) == 0) free.push_back(rank);
    }
    return free;
  }

  void evaluate(const LoweredEquation& equation, int64_t tile) {
    const bool sums_tiles =
        (equation.left_set & family_.all) == 0 &&
        std::any_of(equation.terms.begin(), equation.terms.end(),
                    [&](const LoweredTerm& t) { return (t.ranks & family_.all) != 0; });
    if (sums_tiles && equation.terms.size() > 1) {
      throw Error("streaming: " + lowered_.tensor(equation.tensor).name +
                  " sums over the rank in a line of several terms");
    }
    const std::string& own = lowered_.tensor(equation.tensor).name;
    loop(free_ranks(equation.left), [&] {
      size_t place = 0;
      if (!address(equation.tensor, equation.index, place)) return;
      double total = 0;
      for (const LoweredTerm& term : equation.terms) {
        const double value = reduced(term, own);
        total += term.minus ? -value : value;
        if (&term != &equation.terms.front()) add(Operation::addition);
      }
      if (sums_tiles && tile > 0 && memory_.is_written(equation.tensor, place)) {
        const LoweredTerm& term = equation.terms.front();
        const double before = memory_.read(equation.tensor, place, own);
        total = term.minus ? before + total : combine(term.reduce, before, total);
      }
      memory_.write(equation.tensor, place, total);
    });
  }

  double combine(cascade::Reduce reduce, double a, double b) {
    add(reduce == cascade::Reduce::sum ? Operation::addition : Operation::maximum);
    if (reduce == cascade::Reduce::max) return cascade::maximum(a, b);
    if (reduce == cascade::Reduce::min) return cascade::minimum(a, b);
    return a + b;
  }

  double reduced(const LoweredTerm& term, const std::string& own) {
    const double start = term.reduced.empty() ? 0 : identity(term.reduce);
    double value = start;
    bool first = true;
    loop(free_ranks(term.reduced), [&] {
      double point = 0;
      if (!at_point(term, own, point)) return;
      value = first ? point : combine(term.reduce, value, point);
      first = false;
    });
    return first ? start : value;
  }

  int64_t index_value(const cascade::Affine& affine) {
    int64_t value = affine.constant;
    for (const auto& [rank, coefficient] : affine.ranks) value += coefficient * at(rank);
    for (const auto& [node, coefficient] : affine.calls) {
      const cascade::IndexNode& call = lowered_.node(node);
      std::vector<int64_t> arguments;
      for (int argument : call.args) arguments.push_back(index_value(affine_at(argument)));
      const std::string& function = lowered_.functions[static_cast<size_t>(call.id)].name;
      const auto bound = bindings_.indices.find(function);
      if (bound == bindings_.indices.end()) {
        throw Error("streaming: index function " + function + " is not bound");
      }
      value += coefficient * bound->second(arguments);
    }
    return value;
  }

  const cascade::Affine& affine_at(int node) {
    const auto found = affines_.find(node);
    if (found != affines_.end()) return found->second;
    return affines_.emplace(node, cascade::affine_of(lowered_, node, sizes_)).first->second;
  }

  /// False where an index lies outside its tensor: the point is absent.
  bool address(int tensor, const std::vector<int>& index, size_t& place) {
    const std::vector<int64_t>& shape = memory_.tensor(tensor).shape;
    place = 0;
    for (size_t a = 0; a < index.size(); ++a) {
      const int64_t i = index_value(affine_at(index[a]));
      if (i < 0 || i >= shape[a]) return false;
      place = place * static_cast<size_t>(shape[a]) + static_cast<size_t>(i);
    }
    return true;
  }

  bool at_point(const LoweredTerm& term, const std::string& own, double& result) {
    registers_.assign(term.nodes.size(), 0);
    for (size_t n = 0; n < term.nodes.size(); ++n) {
      const Node& node = term.nodes[n];
      const auto argument = [&](size_t i) { return registers_[static_cast<size_t>(node.args[i])]; };
      double& value = registers_[n];
      if (node.op == Op::constant) {
        value = node.value;
      } else if (node.op == Op::index) {
        value = static_cast<double>(index_value(affine_at(node.index[0])));
      } else if (node.op == Op::load) {
        if (lowered_.tensor(node.tensor).scalar) {
          value = memory_.tensor(node.tensor).values[0];
          continue;
        }
        size_t place = 0;
        if (!address(node.tensor, node.index, place)) return false;
        value = memory_.read(node.tensor, place, own);
      } else if (node.op == Op::select) {
        value =
            cascade::compare(node.compare, argument(0), argument(1)) ? argument(2) : argument(3);
        add(Operation::other);
      } else if (node.args.size() == 2) {
        const double a = argument(0), b = argument(1);
        cascade::binary(node.op, &a, true, &b, true, &value, 1);
        add(kind(node.op));
      } else {
        const double a = argument(0);
        cascade::unary(node.op, &a, &value, 1);
        if (node.op != Op::negate) add(kind(node.op));
      }
    }
    result = registers_[static_cast<size_t>(term.root)];
    return true;
  }

  static Operation kind(Op op) {
    switch (op) {
      case Op::add:
      case Op::subtract:
        return Operation::addition;
      case Op::multiply:
        return Operation::multiply_add;
      case Op::divide:
        return Operation::division;
      case Op::max:
      case Op::min:
      case Op::relu:
      case Op::abs:
        return Operation::maximum;
      case Op::exp:
      case Op::tanh:
      case Op::sigmoid:
      case Op::gelu:
        return Operation::exponential;
      default:
        return Operation::other;
    }
  }

  void add(Operation operation) { ++operations_[static_cast<size_t>(operation)]; }

  const Lowered& lowered_;
  const cascade::Bindings& bindings_;
  std::vector<int64_t> sizes_;
  Memory memory_;
  cascade::PassReport report_;
  std::vector<int64_t> index_;  // by rank: where the loops stand
  Visits* visits_ = nullptr;    // of this fibre
  Family family_;
  RankSet fibre_set_ = 0;
  std::vector<int> fibre_ranks_;
  std::vector<bool> done_;
  std::map<int, cascade::Affine> affines_;
  std::vector<double> registers_;
  int64_t tile_ = 0, peak_ = 0;
  int passes_ = 0;
  PerOperation operations_{};
};

}  // namespace

StreamedRun run_streamed(const cascade::Program& program, std::string_view rank,
                         const cascade::Bindings& bindings) {
  return Stream(program, rank, bindings).run();
}

}  // namespace heed::hardware
