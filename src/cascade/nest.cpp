#include "cascade/nest.h"

#include <fmt/format.h>

#include <algorithm>

#include "cascade/kernels.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

/// Far outside every tensor, and far from overflow when a few are added.
constexpr int64_t kFar = int64_t{1} << 55;

int64_t bounded_product(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) return (a < 0) == (b < 0) ? kFar : -kFar;
  return std::clamp(result, -kFar, kFar);
}

}  // namespace

void Nest::set_step(int64_t i) {
  if (running_loop_ < 0) return;
  loops_[static_cast<size_t>(running_loop_)].begin = i;
  loops_[static_cast<size_t>(running_loop_)].end = i + 1;
}

/// Index functions whose arguments are known at this depth.
void Nest::enter(int depth) {
  for (int id : calls_at_[static_cast<size_t>(depth)]) {
    const Call& call = calls_[static_cast<size_t>(id)];
    std::vector<uint64_t>& level = levels_[static_cast<size_t>(depth)];
    args_.clear();
    for (int slot : call.args)
      args_.push_back(static_cast<int64_t>(level[static_cast<size_t>(slot)]));
    const int64_t value =
        std::clamp((*frame_.functions[static_cast<size_t>(call.function)])(args_), -kFar, kFar);
    for (const auto& [slot, c] : call.targets) {
      level[static_cast<size_t>(slot)] += static_cast<uint64_t>(bounded_product(value, c));
    }
  }
}

bool Nest::holds(const Check& check, int lane) {
  if (check.predicate < 0) {
    return compare(check.compare, static_cast<double>(slot_value(check.args[0], lane)), 0);
  }
  args_.clear();
  for (int slot : check.args) args_.push_back(slot_value(slot, lane));
  return (*frame_.predicates[static_cast<size_t>(check.predicate)])(args_);
}

bool Nest::all_hold(const std::vector<int>& checks) {
  return std::all_of(checks.begin(), checks.end(),
                     [&](int id) { return holds(checks_[static_cast<size_t>(id)], 0); });
}

/// Index functions are called only where the conditions that do not need them hold.
bool Nest::enter_if_kept(int depth) {
  const size_t d = static_cast<size_t>(depth);
  now_ = levels_[d].data();
  if (!all_hold(checks_at_[d])) return false;
  enter(depth);
  return all_hold(called_checks_at_[d]);
}

void Nest::visit(int depth, int last, const std::function<void()>& inside) {
  if (depth == last) return inside();
  const Loop loop = loops_[static_cast<size_t>(depth)];
  const std::vector<uint64_t>& outer = levels_[static_cast<size_t>(depth)];
  std::vector<uint64_t>& inner = levels_[static_cast<size_t>(depth) + 1];
  for (int64_t i = loop.begin; i < loop.end; ++i) {
    for (size_t s = 0; s < slots_.size(); ++s) {
      inner[s] =
          outer[s] + static_cast<uint64_t>(i) * slots_[s].strides[static_cast<size_t>(depth)];
    }
    if (enter_if_kept(depth + 1)) visit(depth + 1, last, inside);
  }
}

void Nest::move(const std::vector<uint64_t>& from, int64_t lane, std::vector<uint64_t>& to) const {
  for (size_t s = 0; s < slots_.size(); ++s) {
    to[s] = from[s] + static_cast<uint64_t>(lane) * static_cast<uint64_t>(slots_[s].lane);
  }
}

void Nest::check_block(int lanes) {
  block_absent_.clear();
  if (block_checks_.empty() && element_loads_.empty()) return;
  block_absent_.resize(static_cast<size_t>(lanes));
  now_ = levels_[static_cast<size_t>(left_loops_)].data();
  for (int id : block_checks_) {
    for (int l = 0; l < lanes; ++l) {
      uint8_t& absent = block_absent_[static_cast<size_t>(l)];
      if (absent == 0 && !holds(checks_[static_cast<size_t>(id)], l)) absent = 1;
    }
  }
  for (size_t node : element_loads_) {
    const TensorData& tensor = frame_.tensors[static_cast<size_t>(term_.nodes[node].tensor)];
    for (int l = 0; l < lanes; ++l) {
      uint8_t& absent = block_absent_[static_cast<size_t>(l)];
      if (absent == 0 && load_absence(loads_[node], tensor, node, l) != 0) absent = 1;
    }
  }
}

void Nest::elements(const std::function<void(const Block&)>& element) {
  std::vector<uint64_t>& level = levels_[static_cast<size_t>(left_loops_)];
  for (size_t s = 0; s < slots_.size(); ++s) levels_[0][s] = slots_[s].base;
  if (!enter_if_kept(0)) return;
  visit(0, left_loops_, [&] {
    const int64_t size = vector_left_ ? vector_size_ : 1;
    block_ = level;
    for (int64_t from = 0; from < size; from += kLanes) {
      Block block;
      block.lanes = static_cast<int>(std::min<int64_t>(kLanes, size - from));
      if (vector_left_) move(block_, from, level);
      block.offset = level[static_cast<size_t>(left_slot_)];
      block.stride = lane_stride(left_slot_);
      block_lanes_ = block.lanes;
      check_block(block.lanes);
      const bool any =
          block_absent_.empty() ||
          std::any_of(block_absent_.begin(), block_absent_.end(), [](uint8_t a) { return a == 0; });
      if (any) element(block);
    }
  });
}

void Nest::points(const std::function<void(int lanes, int64_t ordinal)>& point) {
  int64_t ordinal = 0;
  const int last = static_cast<int>(loops_.size());
  const std::vector<uint64_t>& level = levels_[static_cast<size_t>(last)];
  visit(left_loops_, last, [&] {
    if (vector_left_) {
      at_ = level;
      point(block_lanes_, ordinal++);
      return;
    }
    for (int64_t from = 0; from < vector_size_; from += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, vector_size_ - from));
      move(level, from, at_);
      point(lanes, ordinal);
      ordinal += lanes;
    }
  });
}

bool Nest::check_lanes(int lanes) {
  absent_count_ = 0;
  if (lane_checks_.empty()) return true;
  absent_count_ = static_cast<size_t>(lanes);
  bool any = false;
  const bool blocked = vector_left_ && !block_absent_.empty();
  for (int l = 0; l < lanes; ++l) {
    // A predicate is not asked about an element that does not exist.
    const bool kept = !(blocked && block_absent_[static_cast<size_t>(l)] != 0) &&
                      std::all_of(lane_checks_.begin(), lane_checks_.end(), [&](int id) {
                        return holds(checks_[static_cast<size_t>(id)], l);
                      });
    absent_[static_cast<size_t>(l)] = kept ? 0 : kAbsentPoint;
    any |= kept;
  }
  return any;
}

bool Nest::compute(int lanes) {
  now_ = at_.data();
  all_absent_ = kAbsentPoint;
  if (!check_lanes(lanes)) return false;
  for (size_t i = 0; i < term_.nodes.size(); ++i) {
    const Node& n = term_.nodes[i];
    Register& r = registers_[i];
    const int count = r.uniform ? 1 : lanes;
    if (n.op == Op::constant) continue;
    if (n.op == Op::load) {
      if (!compute_load(i, count)) return false;
      continue;
    }
    if (n.op == Op::index) {
      compute_index(i, count);
      continue;
    }
    if (n.op == Op::select) {
      compute_select(i, count);
    } else if (n.args.size() == 1) {
      unary(n.op, registers_[static_cast<size_t>(n.args[0])].data, r.values.data(), count);
    } else {
      const Register& a = registers_[static_cast<size_t>(n.args[0])];
      const Register& b = registers_[static_cast<size_t>(n.args[1])];
      binary(n.op, a.data, a.uniform, b.data, b.uniform, r.values.data(), count);
    }
    if (r.masked) compute_absent(i, count);
  }
  gather_absent(lanes);
  return true;
}

uint8_t Nest::load_absence(const Load& load, const TensorData& tensor, size_t node,
                           int lane) const {
  for (const Load::Check& check : load.checks) {
    const int64_t index = slot_value(check.slot, lane);
    if (index >= 0 && index < check.size) continue;
    if (check.strict) {
      const Node& n = term_.nodes[node];
      throw Error(fmt::format("cascade {}: an index function of {} gives {}, expected 0 to {}",
                              lowered_.name, lowered_.tensor(n.tensor).name, index,
                              check.size - 1));
    }
    return load.absence;
  }
  if (tensor.present.empty()) return 0;
  return tensor.present[static_cast<size_t>(slot_value(load.slot, lane))] != 0 ? 0 : load.absence;
}

bool Nest::compute_load(size_t node, int lanes) {
  const Load& load = loads_[node];
  Register& r = registers_[node];
  const TensorData& tensor = frame_.tensors[static_cast<size_t>(term_.nodes[node].tensor)];
  const int64_t stride = lane_stride(load.slot);
  const uint64_t first = at_[static_cast<size_t>(load.slot)];
  if (load.whole) {
    const uint8_t absent = load_absence(load, tensor, node, 0);
    if (absent != 0) {
      all_absent_ = absent;
      return false;
    }
  }
  if (!load.masked || load.whole) {
    if (lanes == 1 || stride == 1) {
      r.data = tensor.values.data() + first;
    } else {
      r.data = r.values.data();
      for (int l = 0; l < lanes; ++l) {
        r.values[static_cast<size_t>(l)] =
            tensor.values[first + static_cast<uint64_t>(l) * static_cast<uint64_t>(stride)];
      }
    }
    return true;
  }
  for (int l = 0; l < lanes; ++l) {
    const uint8_t absent = load_absence(load, tensor, node, l);
    r.absent[static_cast<size_t>(l)] = absent;
    r.values[static_cast<size_t>(l)] =
        absent != 0 ? 0.0 : tensor.values[address(static_cast<int>(node), l)];
  }
  return true;
}

void Nest::compute_index(size_t node, int lanes) {
  const int slot = loads_[node].slot;
  for (int l = 0; l < lanes; ++l) {
    registers_[node].values[static_cast<size_t>(l)] = static_cast<double>(slot_value(slot, l));
  }
}

void Nest::compute_select(size_t node, int lanes) {
  const Node& n = term_.nodes[node];
  const auto value = [&](size_t arg, int lane) {
    const Register& r = registers_[static_cast<size_t>(n.args[arg])];
    return r.data[r.uniform ? 0 : lane];
  };
  for (int l = 0; l < lanes; ++l) {
    const bool yes = compare(n.compare, value(0, l), value(1, l));
    registers_[node].values[static_cast<size_t>(l)] = value(yes ? 2 : 3, l);
  }
}

void Nest::compute_absent(size_t node, int lanes) {
  const Node& n = term_.nodes[node];
  Register& r = registers_[node];
  const auto absent = [&](size_t arg, int lane) -> uint8_t {
    const Register& a = registers_[static_cast<size_t>(n.args[arg])];
    return a.masked ? a.absent[a.uniform ? 0 : static_cast<size_t>(lane)] : uint8_t{0};
  };
  const bool select = n.op == Op::select;
  for (int l = 0; l < lanes; ++l) {
    uint8_t bits = 0;
    for (size_t a = 0; a < (select ? 2 : n.args.size()); ++a) bits |= absent(a, l);
    if (select && bits == 0) {
      const Register& left = registers_[static_cast<size_t>(n.args[0])];
      const Register& right = registers_[static_cast<size_t>(n.args[1])];
      const bool yes =
          compare(n.compare, left.data[left.uniform ? 0 : l], right.data[right.uniform ? 0 : l]);
      bits |= absent(yes ? 2 : 3, l);
      // A choice that differs between the points of an element decides about points only.
      if (bits != 0 && (n.ranks & ~left_set_) != 0) bits = kAbsentPoint;
    }
    r.absent[static_cast<size_t>(l)] = bits;
  }
}

void Nest::gather_absent(int lanes) {
  const Register& root = registers_[static_cast<size_t>(term_.root)];
  if (!root.masked) return;
  if (absent_count_ == 0) std::fill(absent_.begin(), absent_.begin() + lanes, uint8_t{0});
  absent_count_ = static_cast<size_t>(lanes);
  for (int l = 0; l < lanes; ++l) {
    absent_[static_cast<size_t>(l)] |= root.absent[root.uniform ? 0 : static_cast<size_t>(l)];
  }
}

}  // namespace heed::cascade
