#include "hardware/einsum.h"

#include <fmt/format.h>

#include <algorithm>

#include "cascade/ast.h"
#include "cascade/lowered.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

using cascade::bit;
using cascade::Lowered;
using cascade::RankSet;

RankSet joined_parts(const Lowered& lowered, RankSet ranks) {
  for (bool changed = true; changed;) {
    changed = false;
    for (const cascade::Split& s : lowered.splits) {
      const RankSet parts = bit(s.outer) | bit(s.inner);
      if ((ranks & parts) != parts || (ranks & bit(s.parent)) != 0) continue;
      ranks = (ranks & ~parts) | bit(s.parent);
      changed = true;
    }
  }
  return ranks;
}

Ranks names(const Lowered& lowered, RankSet ranks) {
  Ranks result;
  ranks = joined_parts(lowered, ranks);
  for (size_t r = 0; r < lowered.ranks.size(); ++r) {
    if ((ranks & bit(static_cast<int>(r))) != 0) result.push_back(lowered.ranks[r].name);
  }
  std::sort(result.begin(), result.end());
  return result;
}

TensorFacts facts(const Lowered& lowered, const cascade::TensorInfo& info) {
  TensorFacts tensor;
  RankSet ranks = 0;
  for (const cascade::Axis& axis : info.axes) {
    ranks |= axis.rank < 0 ? lowered.node(axis.declared).ranks : bit(axis.rank);
  }
  tensor.ranks = names(lowered, ranks);
  tensor.input = info.input;
  tensor.output = info.output;
  tensor.running = info.running >= 0;
  return tensor;
}

void add_reads(const Lowered& lowered, const cascade::LoweredTerm& term, Einsum& einsum) {
  for (const cascade::Node& node : term.nodes) {
    if (node.op != cascade::Op::load || lowered.tensor(node.tensor).scalar) continue;
    RankSet ranks = 0;
    for (int index : node.index) ranks |= lowered.node(index).ranks;
    Operand operand{lowered.tensor(node.tensor).name, names(lowered, ranks)};
    const bool again = std::any_of(einsum.reads.begin(), einsum.reads.end(), [&](const Operand& o) {
      return o.tensor == operand.tensor && o.ranks == operand.ranks;
    });
    if (!again) einsum.reads.push_back(std::move(operand));
  }
}

std::map<std::string, Ranks> families(const Lowered& lowered) {
  std::map<std::string, Ranks> families;
  for (const cascade::Rank& rank : lowered.ranks) families[rank.name] = {rank.name};
  for (const cascade::Split& s : lowered.splits) {
    for (int part : {s.outer, s.inner}) {
      families[lowered.rank(s.parent).name].push_back(lowered.rank(part).name);
    }
  }
  return families;
}

}  // namespace

bool contains(const Ranks& ranks, const std::string& rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

double product(const Ranks& ranks, const Sizes& sizes) {
  double result = 1;
  for (const std::string& rank : ranks) {
    const auto size = sizes.find(rank);
    if (size == sizes.end()) throw Error("the size of rank " + rank + " is missing");
    result *= static_cast<double>(size->second);
  }
  return result;
}

bool EinsumCascade::holds(const Ranks& ranks, const std::string& rank) const {
  const auto family = families.find(rank);
  if (family == families.end()) return false;
  return std::any_of(family->second.begin(), family->second.end(),
                     [&](const std::string& part) { return contains(ranks, part); });
}

const Einsum& EinsumCascade::einsum(const std::string& tensor) const {
  for (const Einsum& e : einsums) {
    if (e.tensor == tensor) return e;
  }
  throw Error("cascade " + name + ": no statement defines '" + tensor + "'");
}

EinsumCascade to_einsums(const cascade::Program& program) {
  const Lowered& lowered = *program.ast().lowered;
  const auto counts = cascade::count(program);
  EinsumCascade result;
  result.name = program.name();
  result.families = families(lowered);
  for (const cascade::TensorInfo& info : lowered.tensors) {
    if (!info.scalar) result.tensors[info.name] = facts(lowered, info);
  }
  for (size_t s = 0; s < lowered.statements.size(); ++s) {
    const cascade::LoweredEquation& equation = lowered.statements[s].main;
    Einsum einsum;
    einsum.tensor = lowered.tensor(equation.tensor).name;
    einsum.count = counts[s];
    RankSet ranks = equation.left_set;
    for (const cascade::LoweredTerm& term : equation.terms) {
      ranks |= term.ranks;
      add_reads(lowered, term, einsum);
    }
    einsum.ranks = names(lowered, ranks);
    result.einsums.push_back(std::move(einsum));
  }
  return result;
}

PerOperation operations(const EinsumCascade& cascade, const Einsum& einsum, const Sizes& sizes,
                        double visited_share, const std::string& query, const std::string& key) {
  const auto at = [&](const cascade::Polynomial& polynomial) {
    double total = 0;
    for (const auto& [ranks, coefficient] : polynomial.terms) {
      const bool masked = cascade.holds(ranks, query) && cascade.holds(ranks, key);
      total += coefficient * product(ranks, sizes) * (masked ? visited_share : 1);
    }
    return total;
  };
  const double additions = at(einsum.count.additions);
  return {at(einsum.count.multiply_adds) - additions,
          additions,
          at(einsum.count.maxima),
          at(einsum.count.exponentials),
          at(einsum.count.divisions),
          at(einsum.count.other)};
}

bool can_run(const ProcessingArray& array, const PerOperation& operations) {
  for (size_t i = 0; i < operations.size(); ++i) {
    if (operations[i] > 0 && !(array.cycles[i] > 0)) return false;
  }
  return true;
}

double element_cycles(const ProcessingArray& array, const PerOperation& operations, bool overlapped,
                      const std::string& what) {
  double sum = 0, most = 0;
  for (size_t i = 0; i < operations.size(); ++i) {
    if (operations[i] == 0) continue;
    if (!(array.cycles[i] > 0)) {
      throw Error(fmt::format("{}: the array it is bound to has no '{}' in cycles_per_operation",
                              what, name_of(static_cast<Operation>(i))));
    }
    const double cycles = operations[i] * array.cycles[i];
    sum += cycles;
    most = std::max(most, cycles);
  }
  return overlapped ? most : sum;
}

}  // namespace heed::hardware
