// One term of an equation as a loop nest over numbers: strides instead of names, conditions at the
// depth where they are decided, the innermost loop in chunks so that each operation runs over an
// array.
//
// The loops of the left side stand outside, those of the reduction inside; one of them is chosen as
// the vector loop ("lanes"). Points are absent where a filter, the end of a split, a read outside
// its tensor or an absent element says so. What depends on the left side alone makes the element
// absent.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cascade/cascade.h"
#include "cascade/lowered.h"
#include "cascade/sizes.h"

namespace heed::cascade {

struct TensorData {
  std::vector<int64_t> shape, strides;
  std::vector<double> values;
  std::vector<uint8_t> present;  // empty: every element is
  std::vector<uint8_t>
      carried;  // running tensor: the element kept the state before it; may be empty
};

/// Everything that the nests of one run share.
struct Frame {
  const Lowered* lowered = nullptr;
  std::vector<int64_t> sizes;
  std::vector<TensorData> tensors;
  std::vector<const std::function<bool(std::span<const int64_t>)>*> predicates;
  std::vector<const std::function<int64_t(std::span<const int64_t>)>*> functions;
};

inline constexpr int kLanes = 256;

/// Bits of the absence of a lane.
inline constexpr uint8_t kAbsentPoint = 1;
inline constexpr uint8_t kAbsentElement = 2;

class Nest {
 public:
  struct Load {
    int slot = -1;  // address in elements
    struct Check {
      int slot;
      int64_t size;
      bool strict;  // leaving the tensor is an error: an index function of a declaration
    };
    std::vector<Check> checks;  // axes that may leave the tensor
    bool masked = false;
    bool in_step = false;  // of a tensor that runs together with the term
    bool whole = false;    // all lanes are absent together, which leaves out the points
    uint8_t absence = kAbsentPoint;
  };

  /// Results of one operation over a chunk; one lane if it is uniform.
  struct Register {
    std::vector<double> values;
    const double* data = nullptr;  // own values, or the tensor itself
    std::vector<uint8_t> absent;   // only if masked
    bool uniform = false;
    bool masked = false;
    bool strict = false;  // an absent lane makes the point absent; else a select decides
  };

  /// A block of elements of the left side: `lanes` of them, `stride` apart.
  struct Block {
    uint64_t offset = 0;
    int64_t stride = 0;
    int lanes = 1;
  };

  /// `in_step`: tensors whose absent elements are not known yet, because they run with this one.
  Nest(const Frame& frame, const LoweredEquation& equation, const LoweredTerm& term,
       int running_rank, const std::vector<bool>& in_step);

  /// Runs only step `i` of the running rank.
  void set_step(int64_t i);

  /// True if elements of the left side may be absent.
  bool may_be_absent() const { return may_be_absent_; }

  /// Calls element(block) for the blocks of the left side that some point may reach.
  void elements(const std::function<void(const Block&)>& element);
  /// Inside `element`: calls point(lanes, ordinal) for each chunk of points. Ordinals count the
  /// points of the reduction in its own order; with vector_left() all lanes share one.
  void points(const std::function<void(int lanes, int64_t ordinal)>& point);

  bool vector_left() const { return vector_left_; }
  /// Inside `element`: absence of lane `l` of the block, found by its own conditions.
  std::span<const uint8_t> block_absent() const { return block_absent_; }
  /// Inside `point`: evaluates the term; false if all lanes are absent.
  bool compute(int lanes);
  /// After compute: absence of each lane; empty if all are present.
  std::span<const uint8_t> absent() const { return {absent_.data(), absent_count_}; }
  /// After compute returned false for all lanes at once: kAbsentPoint, with kAbsentElement or not.
  uint8_t all_absent() const { return all_absent_; }
  double value(int lane) const {
    const Register& r = registers_[static_cast<size_t>(term_.root)];
    return r.data[r.uniform ? 0 : lane];
  }

  const Register& root() const { return registers_[static_cast<size_t>(term_.root)]; }
  const LoweredTerm& term() const { return term_; }
  std::span<const Register> registers() const { return registers_; }
  uint64_t address(int node, int lane) const {
    const int slot = loads_[static_cast<size_t>(node)].slot;
    return static_cast<uint64_t>(at_[static_cast<size_t>(slot)]) +
           static_cast<uint64_t>(lane) * static_cast<uint64_t>(lane_stride(slot));
  }

 private:
  /// A number that is linear in the loops: an address, an axis index, an argument. Address
  /// arithmetic wraps; an address outside its tensor is never used.
  struct Slot {
    uint64_t base = 0;
    std::vector<uint64_t> strides;  // per loop
    int64_t lane = 0;
  };
  struct Loop {
    int rank = -1;
    int64_t begin = 0, end = 0;
  };
  struct Call {
    int function = 0;
    std::vector<int> args;                         // slots
    std::vector<std::pair<int, int64_t>> targets;  // slot, coefficient
    int depth = 0;
  };
  struct Check {
    int predicate = -1;
    std::vector<int> args;  // slots; a comparison has one: left minus right
    Compare compare = Compare::less;
    int depth = 0;
    bool lanes = false;    // depends on the vector loop
    bool element = false;  // depends on the left side alone
  };

  void choose_loops(const LoweredEquation& equation, int running_rank);
  int score(int rank, const LoweredEquation& equation) const;
  RankSet call_ranks(const LoweredEquation& equation) const;
  int add_slot(const Affine& affine);
  void add_to_slot(int slot, const Affine& affine, uint64_t factor);
  void check_range(const Affine& affine) const;
  int address_slot(const TensorData& data, const std::vector<int>& index);
  int depth_of(RankSet ranks) const;
  int call_of(int node);
  void build_loads(const LoweredEquation& equation, const std::vector<bool>& in_step);
  bool is_declared(const Axis& axis, int index) const;
  void build_load(size_t node, RankSet left_set, const std::vector<bool>& in_step);
  void mark_strict();
  void build_registers();
  void build_checks(RankSet left_set);

  void enter(int depth);
  bool all_hold(const std::vector<int>& checks);
  bool enter_if_kept(int depth);
  bool holds(const Check& check, int lane);
  void visit(int depth, int last, const std::function<void()>& inside);
  void move(const std::vector<uint64_t>& from, int64_t lane, std::vector<uint64_t>& to) const;
  void check_block(int lanes);
  bool check_lanes(int lanes);
  bool compute_load(size_t node, int lanes);
  uint8_t load_absence(const Load& load, const TensorData& tensor, size_t node, int lane) const;
  void compute_index(size_t node, int lanes);
  void compute_select(size_t node, int lanes);
  void compute_absent(size_t node, int lanes);
  void gather_absent(int lanes);
  int64_t lane_stride(int slot) const { return slots_[static_cast<size_t>(slot)].lane; }
  int64_t slot_value(int slot, int lane) const {
    return static_cast<int64_t>(now_[slot]) + lane * lane_stride(slot);
  }

  const Frame& frame_;
  const Lowered& lowered_;
  const LoweredTerm& term_;
  std::vector<Loop> loops_;  // outer loops: left ones, then reduced ones
  int left_loops_ = 0;
  RankSet left_set_ = 0;
  int block_lanes_ = 1;
  int vector_rank_ = -1;
  int64_t vector_size_ = 1;
  bool vector_left_ = true;
  int running_loop_ = -1;
  int left_slot_ = -1;
  std::vector<Slot> slots_;
  std::vector<Call> calls_;
  std::vector<std::pair<int, int>> call_ids_;  // index node, call
  std::vector<Check> checks_;
  std::vector<Load> loads_;            // per node
  std::vector<size_t> element_loads_;  // strict ones that depend on the left side alone
  std::vector<Register> registers_;
  bool may_be_absent_ = false;
  std::vector<std::vector<int>> checks_at_, calls_at_;  // by depth
  std::vector<std::vector<int>> called_checks_at_;      // those that need an index function
  std::vector<int> block_checks_, lane_checks_;

  std::vector<std::vector<uint64_t>> levels_;  // slot values per depth
  std::vector<uint64_t> at_;                   // slot values of the current chunk
  std::vector<uint64_t> block_;                // slot values of the left side's loops
  const uint64_t* now_ = nullptr;              // the slot values that conditions are decided at
  std::vector<uint8_t> block_absent_, absent_;
  size_t absent_count_ = 0;
  uint8_t all_absent_ = 0;
  std::vector<int64_t> args_;
};

}  // namespace heed::cascade
