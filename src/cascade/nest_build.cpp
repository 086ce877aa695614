// The compilation of a term to its loop nest.
#include <fmt/format.h>

#include <algorithm>

#include "cascade/nest.h"
#include "heed/error.h"

namespace heed::cascade {

Nest::Nest(const Frame& frame, const LoweredEquation& equation, const LoweredTerm& term,
           int running_rank, const std::vector<bool>& in_step)
    : frame_(frame), lowered_(*frame.lowered), term_(term) {
  choose_loops(equation, running_rank);
  const size_t depths = loops_.size() + 1;
  checks_at_.resize(depths);
  calls_at_.resize(depths);
  called_checks_at_.resize(depths);
  left_set_ = equation.left_set;
  left_slot_ = address_slot(frame_.tensors[static_cast<size_t>(equation.tensor)], equation.index);
  build_checks(equation.left_set);
  build_loads(equation, in_step);
  build_registers();
  levels_.assign(depths, std::vector<uint64_t>(slots_.size()));
  at_.resize(slots_.size());
  block_.resize(slots_.size());
  for (size_t s = 0; s < slots_.size(); ++s) levels_[0][s] = slots_[s].base;
  absent_.resize(kLanes);
}

/// Ranks that index functions are called with; their loops stay outside the lanes.
RankSet Nest::call_ranks(const LoweredEquation& equation) const {
  RankSet set = 0;
  std::vector<int> stack = equation.index;
  for (const Node& n : term_.nodes) stack.insert(stack.end(), n.index.begin(), n.index.end());
  for (const Condition& c : term_.conditions) {
    stack.insert(stack.end(), c.args.begin(), c.args.end());
  }
  while (!stack.empty()) {
    const IndexNode& n = lowered_.node(stack.back());
    stack.pop_back();
    if (n.kind == IndexNode::Kind::call) {
      set |= n.ranks;
    } else {
      stack.insert(stack.end(), n.args.begin(), n.args.end());
    }
  }
  return set;
}

/// Lower is better: few operands that jump in memory, many lanes.
int Nest::score(int rank, const LoweredEquation& equation) const {
  const auto stride = [&](int tensor, const std::vector<int>& index) {
    int64_t total = 0;
    for (size_t a = 0; a < index.size(); ++a) {
      for (const auto& [r, c] : affine_of(lowered_, index[a], frame_.sizes).ranks) {
        if (r == rank) total += c != 0 ? frame_.tensors[static_cast<size_t>(tensor)].strides[a] : 0;
      }
    }
    return total;
  };
  int result = 0;
  for (const Node& n : term_.nodes) {
    if (n.op == Op::load && std::abs(stride(n.tensor, n.index)) > 1) result += 2;
  }
  if (stride(equation.tensor, equation.index) > 1) result += 1;
  const int64_t size = frame_.sizes[static_cast<size_t>(rank)];
  if (size < 16) result += 4;
  if (size < 4) result += 8;
  return result;
}

void Nest::choose_loops(const LoweredEquation& equation, int running_rank) {
  std::vector<int> candidates = equation.left;
  if (term_.reduce == Reduce::sum) {
    candidates.insert(candidates.end(), term_.reduced.begin(), term_.reduced.end());
  } else if (!term_.reduced.empty()) {
    candidates.push_back(term_.reduced.back());  // the first winner counts in the order of the text
  }
  const RankSet calls = call_ranks(equation);
  int best = 0;
  for (int r : candidates) {
    if (r == running_rank || (calls & bit(r)) != 0) continue;
    const int s = score(r, equation);
    const int64_t size = frame_.sizes[static_cast<size_t>(r)];
    if (vector_rank_ < 0 || s < best || (s == best && size > vector_size_)) {
      vector_rank_ = r;
      best = s;
      vector_size_ = size;
    }
  }
  vector_left_ = vector_rank_ < 0 || (equation.left_set & bit(vector_rank_)) != 0;
  const auto add = [&](int r) {
    if (r == vector_rank_) return;
    if (r == running_rank) running_loop_ = static_cast<int>(loops_.size());
    loops_.push_back({r, 0, frame_.sizes[static_cast<size_t>(r)]});
  };
  for (int r : equation.left) add(r);
  left_loops_ = static_cast<int>(loops_.size());
  for (int r : term_.reduced) add(r);
}

void Nest::check_range(const Affine& affine) const {
  const auto [low, high] = range_of(affine, frame_.sizes);
  constexpr int64_t kLimit = int64_t{1} << 50;
  if (low < -kLimit || high > kLimit) {
    throw Error(fmt::format("cascade {}: an index leaves the range of +-2^50", lowered_.name));
  }
}

int Nest::add_slot(const Affine& affine) {
  slots_.push_back({0, std::vector<uint64_t>(loops_.size()), 0});
  const int slot = static_cast<int>(slots_.size()) - 1;
  check_range(affine);
  add_to_slot(slot, affine, 1);
  return slot;
}

void Nest::add_to_slot(int slot, const Affine& affine, uint64_t factor) {
  std::vector<std::pair<int, uint64_t>> targets;
  for (const auto& [node, c] : affine.calls) {
    targets.emplace_back(call_of(node), static_cast<uint64_t>(c) * factor);
  }
  Slot& s = slots_[static_cast<size_t>(slot)];
  s.base += static_cast<uint64_t>(affine.constant) * factor;
  for (const auto& [rank, c] : affine.ranks) {
    const uint64_t step = static_cast<uint64_t>(c) * factor;
    if (rank == vector_rank_) s.lane += static_cast<int64_t>(step);
    for (size_t l = 0; l < loops_.size(); ++l) {
      if (loops_[l].rank == rank) s.strides[l] += step;
    }
  }
  for (const auto& [call, c] : targets) {
    calls_[static_cast<size_t>(call)].targets.emplace_back(slot, static_cast<int64_t>(c));
  }
}

int Nest::depth_of(RankSet ranks) const {
  int depth = 0;
  for (size_t l = 0; l < loops_.size(); ++l) {
    if ((ranks & bit(loops_[l].rank)) != 0) depth = static_cast<int>(l) + 1;
  }
  return depth;
}

int Nest::call_of(int node) {
  for (const auto& [other, call] : call_ids_) {
    if (other == node) return call;
  }
  const IndexNode& n = lowered_.node(node);
  Call call;
  call.function = n.id;
  call.depth = depth_of(n.ranks);
  for (int arg : n.args) call.args.push_back(add_slot(affine_of(lowered_, arg, frame_.sizes)));
  calls_.push_back(std::move(call));
  const int id = static_cast<int>(calls_.size()) - 1;
  call_ids_.emplace_back(node, id);
  calls_at_[static_cast<size_t>(calls_.back().depth)].push_back(id);
  return id;
}

int Nest::address_slot(const TensorData& data, const std::vector<int>& index) {
  const int slot = add_slot({});
  for (size_t a = 0; a < index.size(); ++a) {
    const Affine affine = affine_of(lowered_, index[a], frame_.sizes);
    check_range(affine);
    add_to_slot(slot, affine, static_cast<uint64_t>(data.strides[a]));
  }
  return slot;
}

void Nest::build_checks(RankSet left_set) {
  for (const Condition& c : term_.conditions) {
    Check check;
    check.predicate = c.predicate;
    check.compare = c.compare;
    check.lanes = vector_rank_ >= 0 && (c.ranks & bit(vector_rank_)) != 0;
    check.element = (c.ranks & ~left_set) == 0;
    check.depth = depth_of(c.ranks);
    bool called = false;
    if (c.predicate >= 0) {
      for (int arg : c.args) {
        const Affine affine = affine_of(lowered_, arg, frame_.sizes);
        called |= !affine.calls.empty();
        check.args.push_back(add_slot(affine));
      }
    } else {
      const Affine left = affine_of(lowered_, c.args[0], frame_.sizes);
      const Affine right = affine_of(lowered_, c.args[1], frame_.sizes);
      const int slot = add_slot(left);
      add_to_slot(slot, right, ~uint64_t{0});  // times -1
      check.args.push_back(slot);
      called = !left.calls.empty() || !right.calls.empty();
      if (!called && c.compare == Compare::less && right.ranks.empty() &&
          range_of(left, frame_.sizes).second < right.constant) {
        continue;  // always true: a split that divides
      }
    }
    may_be_absent_ |= check.element;
    checks_.push_back(std::move(check));
    const int id = static_cast<int>(checks_.size()) - 1;
    const Check& added = checks_.back();
    if (!added.lanes) {
      (called ? called_checks_at_ : checks_at_)[static_cast<size_t>(added.depth)].push_back(id);
    } else {
      (added.element ? block_checks_ : lane_checks_).push_back(id);
    }
  }
}

void Nest::build_loads(const LoweredEquation& equation, const std::vector<bool>& in_step) {
  loads_.resize(term_.nodes.size());
  for (size_t i = 0; i < term_.nodes.size(); ++i) {
    if (term_.nodes[i].op == Op::load) build_load(i, equation.left_set, in_step);
    if (term_.nodes[i].op == Op::index) {
      loads_[i].slot = add_slot(affine_of(lowered_, term_.nodes[i].index[0], frame_.sizes));
    }
  }
}

/// Is an axis that is declared as an index function read through that function?
bool Nest::is_declared(const Axis& axis, int index) const {
  if (axis.declared < 0) return false;
  const IndexNode& declared = lowered_.node(axis.declared);
  const IndexNode& read = lowered_.node(index);
  return declared.kind == IndexNode::Kind::call && read.kind == IndexNode::Kind::call &&
         declared.id == read.id;
}

void Nest::build_load(size_t node, RankSet left_set, const std::vector<bool>& in_step) {
  const Node& n = term_.nodes[node];
  const TensorInfo& info = lowered_.tensor(n.tensor);
  const TensorData& data = frame_.tensors[static_cast<size_t>(n.tensor)];
  Load load;
  load.slot = address_slot(data, n.index);
  for (size_t a = 0; a < n.index.size(); ++a) {
    const Affine affine = affine_of(lowered_, n.index[a], frame_.sizes);
    const auto [low, high] = range_of(affine, frame_.sizes);
    const bool called = !affine.calls.empty();
    if (!called && low >= 0 && high < data.shape[a]) continue;
    load.checks.push_back({add_slot(affine), data.shape[a], is_declared(info.axes[a], n.index[a])});
  }
  load.in_step = in_step[static_cast<size_t>(n.tensor)];
  load.masked = !load.checks.empty() || !data.present.empty() || load.in_step;
  if ((n.ranks & ~left_set) == 0) load.absence |= kAbsentElement;
  loads_[node] = std::move(load);
}

/// Nodes whose absence is the absence of the point: all but the branches of a select.
void Nest::mark_strict() {
  const std::vector<Node>& nodes = term_.nodes;
  registers_[static_cast<size_t>(term_.root)].strict = true;
  for (size_t i = nodes.size(); i-- > 0;) {
    if (!registers_[i].strict) continue;
    const size_t always = nodes[i].op == Op::select ? 2 : nodes[i].args.size();
    for (size_t a = 0; a < always; ++a) {
      registers_[static_cast<size_t>(nodes[i].args[a])].strict = true;
    }
  }
}

void Nest::build_registers() {
  const std::vector<Node>& nodes = term_.nodes;
  registers_.resize(nodes.size());
  mark_strict();
  for (size_t i = 0; i < nodes.size(); ++i) {
    Register& r = registers_[i];
    r.uniform = vector_rank_ < 0 || (nodes[i].ranks & bit(vector_rank_)) == 0;
    if (nodes[i].op == Op::load && loads_[i].masked) {
      Load& load = loads_[i];
      const TensorData& data = frame_.tensors[static_cast<size_t>(nodes[i].tensor)];
      const bool same = std::all_of(load.checks.begin(), load.checks.end(),
                                    [&](const Load::Check& c) { return lane_stride(c.slot) == 0; });
      load.whole = r.strict && (r.uniform || (same && data.present.empty() && !load.in_step));
      r.masked = !load.whole;
      const bool element = (load.absence & kAbsentElement) != 0;
      may_be_absent_ |= element;
      if (element && r.strict) element_loads_.push_back(i);
    }
    for (int arg : nodes[i].args) r.masked |= registers_[static_cast<size_t>(arg)].masked;
    r.values.resize(r.uniform ? 1 : kLanes);
    if (r.masked) r.absent.resize(r.uniform ? 1 : kLanes);
    if (nodes[i].op == Op::constant) r.values[0] = nodes[i].value;
    r.data = r.values.data();
  }
}

}  // namespace heed::cascade
