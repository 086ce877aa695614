#include "hardware/tile_points.h"

#include <algorithm>
#include <limits>

#include "cascade/kernels.h"

namespace heed::hardware {
namespace {

using cascade::bit;
using cascade::LoweredEquation;
using cascade::LoweredTerm;
using cascade::Node;
using cascade::Op;

constexpr double kInf = std::numeric_limits<double>::infinity();

double identity(cascade::Reduce reduce) {
  return reduce == cascade::Reduce::max ? -kInf : reduce == cascade::Reduce::min ? kInf : 0;
}

Operation kind(Op op) {
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

}  // namespace

TilePoints::TilePoints(const cascade::Lowered& lowered, const cascade::Bindings& bindings,
                       const std::vector<int64_t>& sizes, const Family& family,
                       cascade::RankSet fibre, Memory& memory)
    : lowered_(lowered),
      bindings_(bindings),
      sizes_(sizes),
      family_(family),
      fibre_(fibre),
      memory_(memory),
      index_(lowered.ranks.size(), 0) {}

void TilePoints::walk(int rank, const std::function<void()>& body) {
  if (static_cast<size_t>(rank) == index_.size()) return body();
  if ((fibre_ & bit(rank)) == 0) return walk(rank + 1, body);
  for (int64_t i = 0; i < sizes_[static_cast<size_t>(rank)]; ++i) {
    at(rank) = i;
    walk(rank + 1, body);
  }
}

// Of a rank inside the tile at hand.
std::pair<int64_t, int64_t> TilePoints::range(int rank) const {
  if (rank == family_.outer) return {tile_, tile_ + 1};
  if (rank == family_.rank) {
    return {tile_ * family_.tile, std::min(family_.size, (tile_ + 1) * family_.tile)};
  }
  if (rank == family_.inner)
    return {0, std::min(family_.tile, family_.size - tile_ * family_.tile)};
  return {0, sizes_[static_cast<size_t>(rank)]};
}

template <class Body>
void TilePoints::loop(const std::vector<int>& ranks, const Body& body, size_t depth) {
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

std::vector<int> TilePoints::free_ranks(const std::vector<int>& ranks) const {
  std::vector<int> free;
  for (int rank : ranks) {
    if ((fibre_ & bit(rank)) == 0) free.push_back(rank);
  }
  return free;
}

void TilePoints::evaluate(const LoweredEquation& equation, int64_t tile) {
  if (family_.outer >= 0) at(family_.outer) = tile;
  tile_ = tile;
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

double TilePoints::combine(cascade::Reduce reduce, double a, double b) {
  add(reduce == cascade::Reduce::sum ? Operation::addition : Operation::maximum);
  if (reduce == cascade::Reduce::max) return cascade::maximum(a, b);
  if (reduce == cascade::Reduce::min) return cascade::minimum(a, b);
  return a + b;
}

double TilePoints::reduced(const LoweredTerm& term, const std::string& own) {
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

int64_t TilePoints::index_value(const cascade::Affine& affine) {
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

const cascade::Affine& TilePoints::affine_at(int node) {
  const auto found = affines_.find(node);
  if (found != affines_.end()) return found->second;
  return affines_.emplace(node, cascade::affine_of(lowered_, node, sizes_)).first->second;
}

// False where an index lies outside its tensor: the point is absent.
bool TilePoints::address(int tensor, const std::vector<int>& index, size_t& place) {
  const std::vector<int64_t>& shape = memory_.tensor(tensor).shape;
  place = 0;
  for (size_t a = 0; a < index.size(); ++a) {
    const int64_t i = index_value(affine_at(index[a]));
    if (i < 0 || i >= shape[a]) return false;
    place = place * static_cast<size_t>(shape[a]) + static_cast<size_t>(i);
  }
  return true;
}

bool TilePoints::at_point(const LoweredTerm& term, const std::string& own, double& result) {
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
      value = cascade::compare(node.compare, argument(0), argument(1)) ? argument(2) : argument(3);
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

}  // namespace heed::hardware
