#include "hardware/placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cascade/ast.h"
#include "cascade/lowered.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

double as_double(int64_t x) { return static_cast<double>(x); }

/// Share of the elements along one side that a loop of this extent keeps busy.
double fill(double extent, int64_t side) {
  extent = std::max(extent, 1.0);
  return extent / (std::ceil(extent / as_double(side)) * as_double(side));
}

// --- sizes and masks of a call ---------------------------------------------------------------------

Sizes bound_sizes(const Machine& machine, const cascade::Program& program, Sizes base,
                  const Sizes& given) {
  const cascade::Ast& ast = program.ast();
  for (const auto& [name, size] : given) base[name] = size;
  cascade::Bindings bindings;
  std::set<std::string> derived;
  for (const auto& split : ast.splits) {
    derived.insert({split.outer, split.inner});
    if (!split.block.empty()) bindings.sizes[split.block] = machine.matrix.rows;
  }
  for (const auto& rank : ast.ranks) {
    if (rank.size >= 0) derived.insert(rank.name);
  }
  for (const auto& [name, size] : base) {
    if (!derived.contains(name)) bindings.sizes.emplace(name, size);
  }
  return cascade::sizes(program, bindings);
}

/// Rank names that a mask tells apart, batch ranks left out, with their places in its arguments.
std::vector<std::pair<std::string, size_t>> mask_ranks(const cascade::PredicateDeclaration& mask,
                                                       const std::set<std::string>& batch) {
  std::vector<std::pair<std::string, size_t>> ranks;
  for (size_t i = 0; i < mask.ranks.size(); ++i) {
    if (!batch.contains(mask.ranks[i])) ranks.emplace_back(mask.ranks[i], i);
  }
  return ranks;
}

/// Share of tiles with a visible pair, for the first entry of the batch ranks. Of large tiles the
/// border is looked at: masks made of intervals show there.
double visible_tiles(const std::function<bool(std::span<const int64_t>)>& predicate, size_t arity,
                     size_t first, size_t second, int64_t a, int64_t b, int64_t a_tile,
                     int64_t b_tile) {
  std::vector<int64_t> index(arity, 0);
  const auto sees = [&](int64_t i, int64_t j) {
    index[first] = i;
    index[second] = j;
    return predicate(index);
  };
  const auto visible = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      const bool edge = i == i0 || i == i1 - 1;
      for (int64_t j = j0; j < j1; j += edge ? 1 : std::max<int64_t>(1, j1 - 1 - j0)) {
        if (sees(i, j)) return true;
      }
    }
    return false;
  };
  double seen = 0, all = 0;
  for (int64_t i = 0; i < a; i += a_tile) {
    for (int64_t j = 0; j < b; j += b_tile) {
      all += 1;
      seen += visible(i, std::min(a, i + a_tile), j, std::min(b, j + b_tile)) ? 1 : 0;
    }
  }
  return all > 0 ? seen / all : 1;
}

std::vector<PlacedCall::Mask> masks_of(const Machine& machine, const cascade::Program& program,
                                       const cascade::Bindings& bindings, const Sizes& sizes,
                                       const PlacedCall& call) {
  std::vector<PlacedCall::Mask> masks;
  for (const auto& declared : program.ast().predicates) {
    const auto predicate = bindings.predicates.find(declared.name);
    const auto ranks = mask_ranks(declared, call.batch_ranks);
    if (predicate == bindings.predicates.end() || ranks.size() != 2) continue;
    const auto side = [&](const std::string& rank) {
      return rank == call.pass_rank ? machine.matrix.rows : machine.matrix.columns;
    };
    const auto& [a, first] = ranks[0];
    const auto& [b, second] = ranks[1];
    masks.push_back({a, b,
                     visible_tiles(predicate->second, declared.ranks.size(), first, second,
                                   sizes.at(a), sizes.at(b), side(a), side(b))});
  }
  return masks;
}

PlacedCall described(const cascade::Program& program, const std::string& rank) {
  PlacedCall call;
  call.cascade = to_einsums(program);
  call.pass_rank = rank;
  const cascade::PassReport report = cascade::count_passes(program, rank);
  call.passes = report.passes;
  for (const auto& row : report.rows) call.pass_of[row.tensor] = row.pass;
  for (const auto& declared : program.ast().ranks) {
    if (declared.batch) call.batch_ranks.insert(declared.name);
  }
  for (const auto& split : program.ast().splits) call.outer_ranks.insert(split.outer);
  return call;
}

// --- costs -----------------------------------------------------------------------------------------

/// Operations of one statement that run over the same ranks.
struct Group {
  Ranks ranks;
  PerOperation work{};
};

class Placement {
 public:
  Placement(const Machine& machine, const PlacedCall& call) : machine_(machine), call_(call) {}

  PlacementCost run() {
    for (const Einsum& einsum : call_.cascade.einsums) add(einsum);
    const double word = as_double(machine_.word_bytes);
    cost_.traffic_bytes = dram_words() * word;
    const double memory = cost_.traffic_bytes / machine_.dram_bytes_per_second;
    cost_.memory_s = memory;
    cost_.overlapped_s = std::max({cost_.matrix_s, cost_.vector_s, memory});
    cost_.in_turn_s = std::max(cost_.matrix_s + cost_.vector_s + drain_s_, memory);
    cost_.energy_pj = operation_pj_ + cost_.traffic_bytes / word * machine_.energy.dram_word_pj;
    if (cost_.overlapped_s > 0) {
      cost_.util_2d = matrix_useful_s_ / cost_.overlapped_s;
      cost_.util_1d = vector_useful_s_ / cost_.overlapped_s;
    }
    return cost_;
  }

 private:
  double share(const Ranks& ranks) const {
    double kept = 1;
    for (const PlacedCall::Mask& mask : call_.masks) {
      if (call_.cascade.holds(ranks, mask.a) && call_.cascade.holds(ranks, mask.b)) {
        kept *= mask.share;
      }
    }
    return kept;
  }

  std::vector<Group> groups(const Einsum& einsum) const {
    std::map<Ranks, PerOperation> found;
    const auto add = [&](const cascade::Polynomial& polynomial, Operation operation, double sign) {
      for (const auto& [ranks, coefficient] : polynomial.terms) {
        found[ranks][static_cast<size_t>(operation)] +=
            sign * coefficient * product(ranks, call_.sizes) * share(ranks);
      }
    };
    add(einsum.count.multiply_adds, Operation::multiply_add, 1);
    add(einsum.count.additions, Operation::multiply_add, -1);
    add(einsum.count.additions, Operation::addition, 1);
    add(einsum.count.maxima, Operation::maximum, 1);
    add(einsum.count.exponentials, Operation::exponential, 1);
    add(einsum.count.divisions, Operation::division, 1);
    add(einsum.count.other, Operation::other, 1);
    std::vector<Group> groups;
    for (auto& [ranks, work] : found) groups.push_back({ranks, work});
    return groups;
  }

  bool is_whole(const Ranks& ranks) const { return contains(ranks, call_.pass_rank); }

  /// Ranks that can lie along a side of an array: no batches, no tile numbers.
  Ranks space(const Ranks& ranks) const {
    Ranks result;
    for (const std::string& rank : ranks) {
      if (!call_.batch_ranks.contains(rank) && !call_.outer_ranks.contains(rank)) {
        result.push_back(rank);
      }
    }
    return result;
  }

  bool wants_matrix(const Ranks& ranks) const {
    const Ranks own = space(ranks);
    const bool batches = std::any_of(ranks.begin(), ranks.end(), [&](const std::string& rank) {
      return call_.batch_ranks.contains(rank);
    });
    return own.size() >= 3 || (is_whole(ranks) && (own.size() >= 2 || batches));
  }

  double extent(const std::string& rank) const { return as_double(call_.sizes.at(rank)); }

  double batch_extent(const Ranks& ranks) const {
    double batches = 1;
    for (const std::string& rank : ranks) {
      if (call_.batch_ranks.contains(rank)) batches *= extent(rank);
    }
    return batches;
  }

  /// The best share of busy elements over all ways to lay two of the ranks along the sides; the
  /// batch ranks together count as one, or share a side with a rank.
  double matrix_fill(const Ranks& ranks) const {
    const Ranks own = space(ranks);
    const double batches = batch_extent(ranks);
    const int64_t rows = machine_.matrix.rows, columns = machine_.matrix.columns;
    double best = fill(1, rows) * fill(batches, columns);
    for (const std::string& r : own) {
      best = std::max(best, fill(extent(r), rows) * fill(batches, columns));
      for (const std::string& c : own) {
        if (c == r) continue;
        best = std::max(best, fill(extent(r), rows) * fill(extent(c), columns));
        best = std::max(best, fill(extent(r), rows) * fill(extent(c) * batches, columns));
      }
    }
    return best;
  }

  double vector_fill(const Ranks& ranks) const {
    const double batches = batch_extent(ranks);
    double best = fill(batches, machine_.vector.columns);
    for (const std::string& r : space(ranks)) {
      best = std::max({best, fill(extent(r), machine_.vector.columns),
                       fill(extent(r) * batches, machine_.vector.columns)});
    }
    return best;
  }

  void add(const Einsum& einsum) {
    double compute = 0;
    for (const Group& group : groups(einsum)) {
      const bool matrix = wants_matrix(group.ranks) && can_run(machine_.matrix, group.work);
      const ProcessingArray& array = matrix ? machine_.matrix : machine_.vector;
      const std::string what = fmt::format("cascade {}, machine {}: Einsum {}", call_.cascade.name,
                                           machine_.name, einsum.tensor);
      const double useful =
          element_cycles(array, group.work, false, what) / array.elements() / machine_.clock_hz;
      const double seconds =
          useful / (matrix ? matrix_fill(group.ranks) : vector_fill(group.ranks));
      (matrix ? matrix_useful_s_ : vector_useful_s_) += useful;
      (matrix ? cost_.matrix_s : cost_.vector_s) += seconds;
      compute += seconds;
      for (size_t i = 0; i < group.work.size(); ++i) {
        operation_pj_ += group.work[i] * machine_.energy.operation_pj[i];
      }
      // A maximum over a tile goes down its rows before the tile can go on.
      const bool reduces = group.work[static_cast<size_t>(Operation::maximum)] > 0 && matrix &&
                           is_whole(group.ranks) && !is_whole(written(einsum));
      if (reduces) drain_s_ += seconds * as_double(machine_.matrix.rows);
    }
    double moved = words(einsum.tensor) * share(written(einsum));
    for (const Operand& read : einsum.reads) moved += read_words(read);
    const double memory = moved * as_double(machine_.word_bytes) / machine_.dram_bytes_per_second;
    cost_.unfused_s += std::max(compute, memory);
    cost_.unfused_bytes += moved * as_double(machine_.word_bytes);
  }

  const Ranks& written(const Einsum& einsum) const {
    return call_.cascade.tensors.at(einsum.tensor).ranks;
  }
  double words(const std::string& tensor) const {
    const auto scale = call_.input_share.find(tensor);
    return product(call_.cascade.tensors.at(tensor).ranks, call_.sizes) *
           (scale == call_.input_share.end() ? 1 : scale->second);
  }
  double read_words(const Operand& read) const {
    const auto scale = call_.input_share.find(read.tensor);
    return product(read.ranks, call_.sizes) * share(read.ranks) *
           (scale == call_.input_share.end() ? 1 : scale->second);
  }

  /// The rank that has a row of its own in every whole tensor: the queries of attention.
  std::string query_rank() const {
    for (const auto& [name, facts] : call_.cascade.tensors) {
      if (facts.input || !is_whole(facts.ranks)) continue;
      for (const std::string& rank : space(facts.ranks)) {
        if (rank == call_.pass_rank) continue;
        for (const auto& [other, output] : call_.cascade.tensors) {
          if (output.output && contains(output.ranks, rank)) return rank;
        }
      }
    }
    return "";
  }

  /// Passes, after the one that makes it, in which a tensor is read.
  int later_passes(const std::string& tensor) const {
    std::set<int> passes;
    const auto made = call_.pass_of.find(tensor);
    for (const Einsum& einsum : call_.cascade.einsums) {
      for (const Operand& read : einsum.reads) {
        if (read.tensor == tensor) passes.insert(std::max(1, call_.pass_of.at(einsum.tensor)));
      }
    }
    if (made != call_.pass_of.end()) passes.erase(std::max(1, made->second));
    return static_cast<int>(passes.size());
  }

  double dram_words() {
    const std::string query = query_rank();
    double total = 0, per_query = 0, rows_per_query = 0;
    for (const auto& [name, facts] : call_.cascade.tensors) {
      if (facts.output) total += words(name);
      if (query.empty() || !contains(facts.ranks, query)) continue;
      double own = 1;
      for (const std::string& rank : space(facts.ranks)) own *= rank == query ? 1 : extent(rank);
      const bool waits = !facts.input && later_passes(name) > 0;
      if (is_whole(facts.ranks)) {
        rows_per_query += waits ? own : 0;
      } else if (facts.input || facts.running) {
        per_query += own;
      } else if (waits) {
        per_query += own * tile_count(facts.ranks);
      }
    }
    const double columns = as_double(machine_.matrix.columns);
    const double capacity = machine_.buffer_bytes / as_double(machine_.word_bytes);
    const bool rows_fit = (per_query + rows_per_query) * columns <= capacity;
    const double held = per_query + (rows_fit ? rows_per_query : 0);
    const double tiles = query.empty() ? 1 : std::ceil(extent(query) / columns);
    const double fit = held > 0 ? std::max(1.0, std::floor(capacity / (held * columns))) : tiles;
    const double groups = std::ceil(tiles / fit);
    for (const auto& [name, facts] : call_.cascade.tensors) {
      const bool by_query = query.empty() || contains(facts.ranks, query);
      if (facts.input) {
        // Keys and values come again for each group of queries and each pass that reads them.
        const bool again = !by_query && is_whole(facts.ranks);
        total +=
            words(name) * (again ? groups * std::max(1, later_passes(name)) * mask_of(query) : 1);
      } else if (!rows_fit && is_whole(facts.ranks) && later_passes(name) > 0) {
        total += words(name) * share(facts.ranks) * (1 + later_passes(name));
      }
    }
    return total;
  }

  double tile_count(const Ranks& ranks) const {
    double tiles = 1;
    for (const std::string& rank : ranks) {
      if (call_.outer_ranks.contains(rank)) tiles *= extent(rank);
    }
    return tiles;
  }

  double mask_of(const std::string& query) const {
    return query.empty() ? 1 : share({query, call_.pass_rank});
  }

  const Machine& machine_;
  const PlacedCall& call_;
  PlacementCost cost_;
  double drain_s_ = 0, matrix_useful_s_ = 0, vector_useful_s_ = 0, operation_pj_ = 0;
};

}  // namespace

cascade::Bindings bind_case(const Mechanism& mechanism, const ExampleCase& example) {
  const NamedArrays inputs = make_inputs(mechanism, example, DType::f32, 1);
  return mechanism.bind(views(inputs), Spec::parse_options(example.options));
}

PlacedCall place(const Machine& machine, const CascadeText& text, const std::string& rank,
                 const cascade::Bindings& bindings, const Sizes& sizes) {
  const cascade::Program program = cascade::parse(text.text, text.name);
  PlacedCall call = described(program, rank);
  const Sizes own = cascade::sizes(program, bindings);
  call.sizes = bound_sizes(machine, program, own, sizes);
  call.masks = masks_of(machine, program, bindings, own, call);
  for (const auto& [name, facts] : call.cascade.tensors) {
    const auto bound = bindings.tensors.find(name);
    const double ranks = product(facts.ranks, own);
    if (!facts.input || bound == bindings.tensors.end() || ranks == 0) continue;
    call.input_share[name] = static_cast<double>(bound->second.values.size()) / ranks;
  }
  return call;
}

PlacedCall place(const Machine& machine, const cascade::Program& program, const std::string& rank,
                 const Sizes& sizes) {
  PlacedCall call = described(program, rank);
  call.sizes = bound_sizes(machine, program, {}, sizes);
  return call;
}

PlacementCost placement_cost(const Machine& machine, const PlacedCall& call) {
  return Placement(machine, call).run();
}

}  // namespace heed::hardware
