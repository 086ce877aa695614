#include "hardware/streaming.h"

#include <fmt/format.h>

#include <algorithm>

#include "cascade/lowered.h"
#include "cascade/sizes.h"
#include "hardware/tile_points.h"
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

constexpr double kMostPoints = 1 << 27;

RankSet tensor_ranks(const cascade::TensorInfo& info) {
  RankSet ranks = 0;
  for (const cascade::Axis& axis : info.axes) {
    if (axis.rank >= 0) ranks |= bit(axis.rank);
  }
  return ranks;
}

Family family_of(const Lowered& lowered, const std::vector<int64_t>& sizes, int rank) {
  const auto size = [&](int of) { return sizes[static_cast<size_t>(of)]; };
  Family family;
  family.rank = rank;
  family.all = family.whole = bit(rank);
  family.size = family.tiles = size(rank);
  for (const cascade::Split& split : lowered.splits) {
    if (split.parent != rank) continue;
    if (family.outer >= 0) {
      throw Error("streaming: a rank that is split once is needed, " + lowered.rank(rank).name +
                  " is split more often");
    }
    family.outer = split.outer;
    family.inner = split.inner;
    family.all |= bit(split.outer) | bit(split.inner);
    family.whole |= bit(split.inner);
    family.tile = size(split.inner);
    family.tiles = size(split.outer);
  }
  return family;
}

/// Ranks that every tensor of the cascade's own has: their values do not meet.
RankSet fibre_ranks(const Lowered& lowered, const Family& family) {
  RankSet common = ~RankSet{0};
  for (const cascade::TensorInfo& info : lowered.tensors) {
    if (!info.input) common &= tensor_ranks(info);
  }
  return common & ~family.all;
}

class Stream {
 public:
  Stream(const cascade::Program& program, std::string_view rank, const cascade::Bindings& bindings)
      : lowered_(*program.ast().lowered),
        bindings_(bindings),
        sizes_(cascade::bind_sizes(lowered_, bindings)),
        report_(cascade::count_passes(program, rank)),
        family_(family_of(lowered_, sizes_, lowered_.find_rank(rank))),
        fibre_set_(fibre_ranks(lowered_, family_)),
        memory_(lowered_.tensors.size()),
        points_(lowered_, bindings, sizes_, family_, fibre_set_, memory_) {
    check_size();
    allocate();
  }

  StreamedRun run() {
    points_.for_each_fibre([&] { fibre(); });
    StreamedRun result;
    result.passes = passes_;
    result.peak_live_words = peak_;
    result.operations = points_.operations();
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

  // --- set-up --------------------------------------------------------------------------------------

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
        points_.evaluate(lowered_.statements[s].main, 0);
        done_[s] = changed = true;
      }
    }
  }

  const std::string& name(int s) const {
    return lowered_.tensor(lowered_.statements[static_cast<size_t>(s)].main.tensor).name;
  }

  void start(int s) {
    const auto& statement = lowered_.statements[static_cast<size_t>(s)];
    if (statement.initial) points_.evaluate(*statement.initial, 0);
  }

  void run_tile(int s, int64_t tile) {
    const LoweredEquation& equation = lowered_.statements[static_cast<size_t>(s)].main;
    RankSet ranks = equation.left_set;
    for (const LoweredTerm& term : equation.terms) ranks |= term.ranks;
    if ((ranks & family_.whole) != 0) visits_->visit(tile);
    points_.evaluate(equation, tile);
  }

  const Lowered& lowered_;
  const cascade::Bindings& bindings_;
  const std::vector<int64_t> sizes_;  // by rank
  const cascade::PassReport report_;  // refuses a rank that is not there
  const Family family_;
  const RankSet fibre_set_;
  Memory memory_;
  TilePoints points_;
  Visits* visits_ = nullptr;  // of this fibre
  std::vector<bool> done_;
  int64_t peak_ = 0;
  int passes_ = 0;
};

}  // namespace

StreamedRun run_streamed(const cascade::Program& program, std::string_view rank,
                         const cascade::Bindings& bindings) {
  return Stream(program, rank, bindings).run();
}

}  // namespace heed::hardware
