// The two ways to run a state along a sequence. Both do the same arithmetic in the same order, so that
// the choice, which depends on the number of threads, changes no bit:
//
//   serial   one thread per group of states: for every chunk, use the state, then update it
//   shared   block by block of chunks, cut into parts that threads take: the first part runs the state
//            along its chunks, the others sum up what each of theirs adds; then each part uses states,
//            adding on the way what it has summed up
//
// In both an update adds what the chunk alone sums up, from zero, to the decayed state. In `shared`, rows
// and states stay with one thread: what passes between threads is a state per part and block.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "base/huge_pages.h"
#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::chunked {

/// Rows of a state: features.
struct FeatureRange {
  int64_t first = 0, last = 0;
  int64_t count() const { return last - first; }
};

/// The turn of a chunk, and the chunk whose rows the same thread reads after it; -1: none, or not yet.
struct Turn {
  int64_t chunk = 0, next = -1;
};

/// What happens to states of [size] elements. A lane is a (batch, query head) with a state of its own, a
/// group is some lanes that follow each other and are used together. `memory` is scratch.
template <class T>
class Sweep {
 public:
  virtual ~Sweep() = default;
  virtual void load(int64_t lane, T* state) const = 0;
  /// `states`: those of the group's lanes, one after the other.
  virtual void use(int64_t group, const Turn& at, T* states, std::byte* memory) const = 0;
  /// `to`, which may be `from`, becomes the state behind the chunk, `from` being the one before it. Without
  /// `from`, what the chunk adds.
  virtual void update(int64_t lane, const Turn& at, const T* from, T* to,
                      std::byte* memory) const = 0;
  /// The same from what the chunk adds, for some rows. The same bits for any cut into rows.
  virtual void advance(int64_t lane, int64_t chunk, const FeatureRange& rows, const T* from,
                       const T* added, T* to) const = 0;
  /// Not running: a state that is complete, before its uses.
  virtual void complete(int64_t /*lane*/, T* /*state*/) const {}
  virtual void store(int64_t lane, const T* state) const = 0;
};

struct SweepShape {
  int64_t lanes = 0, lanes_per_group = 1;
  int64_t chunks = 0;               // that update the state
  int64_t uses = 0;                 // chunks that use it: the same if `running`
  int64_t size = 0;                 // elements of a state
  int64_t rows = 0, rows_unit = 1;  // of a state, and what cuts between them are multiples of
  size_t memory = 0;                // bytes
  bool running = true;              // chunks see the state of those before them; else of all
  bool reverse = false;             // last chunk first
  bool last_wanted = true;          // whether the state behind the last chunk is stored
  int threads = 1;
  std::vector<const Tensor*> results;  // that uses write
  int64_t groups() const { return lanes / lanes_per_group; }
};

/// Calls body(item, scratch memory) for all items. Neighbours go to one thread: it streams through their
/// states and rows, has asked for those that come next, and finds in its caches what it made before.
inline void for_neighbours(int64_t items, int threads, size_t memory_bytes,
                           const std::function<void(int64_t item, std::byte* memory)>& body) {
  const int64_t shares = std::min<int64_t>(threads, items);
  parallel_for(shares, threads, [&](int64_t share, int) {
    Scratch scratch(Scratch::rounded(memory_bytes));
    auto* memory = scratch.take<std::byte>(static_cast<int64_t>(memory_bytes));
    const int64_t end = share_begin(items, share + 1, shares);
    for (int64_t item = share_begin(items, share, shares); item < end; ++item) body(item, memory);
  });
}

/// Even parts that a sum over all chunks is cut into, so that few states use many threads.
inline int64_t total_parts(int64_t chunks) { return std::min<int64_t>(16, ceil_div(chunks, 4)); }

template <class T>
class Schedule {
 public:
  /// `products`: those of the sweep.
  Schedule(const SweepShape& shape, const Sweep<T>& sweep, const kernels::TileKernels<T>& products)
      : shape_(shape), sweep_(sweep), products_(products) {}

  void run() const {
    const int64_t groups = shape_.groups();
    if (groups == 0) return;
    const bool even = groups % shape_.threads == 0 || groups >= 4 * shape_.threads;
    if (shape_.threads == 1 || even || shape_.chunks + shape_.uses < 4) {
      parallel_for(groups, shape_.threads, [&](int64_t group, int) {
        kernels::with_unit(products_, [&] {
          if (shape_.running) {
            serial(group);
          } else {
            serial_total(group);
          }
        });
      });
    } else if (shape_.running) {
      shared();
    } else {
      parallel_total();
    }
  }

 private:
  size_t state_bytes(int64_t states) const {
    return Scratch::rounded(static_cast<size_t>(states * shape_.size) * sizeof(T));
  }
  int64_t chunk_at(int64_t i) const { return shape_.reverse ? shape_.chunks - 1 - i : i; }
  int64_t next_chunk(int64_t i) const { return i + 1 < shape_.chunks ? chunk_at(i + 1) : -1; }
  int64_t next_use(int64_t u) const { return u + 1 < shape_.uses ? u + 1 : -1; }
  bool updates(int64_t i) const { return i + 1 < shape_.chunks || shape_.last_wanted; }

  void serial(int64_t group) const {
    Scratch scratch(state_bytes(shape_.lanes_per_group) + shape_.memory);
    T* states = scratch.take<T>(shape_.lanes_per_group * shape_.size);
    auto* memory = scratch.take<std::byte>(static_cast<int64_t>(shape_.memory));
    const int64_t first = group * shape_.lanes_per_group;
    load(first, shape_.lanes_per_group, states);
    for (int64_t c = 0; c < shape_.chunks; ++c) {
      sweep_.use(group, {chunk_at(c), next_chunk(c)}, states, memory);
      if (!updates(c)) break;
      for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
        T* state = states + i * shape_.size;
        sweep_.update(first + i, {chunk_at(c)}, state, state, memory);
      }
    }
    store(first, shape_.lanes_per_group, states);
  }

  // States of `count` lanes from the first one on.
  void load(int64_t first, int64_t count, T* states) const {
    for (int64_t i = 0; i < count; ++i) sweep_.load(first + i, states + i * shape_.size);
  }
  void store(int64_t first, int64_t count, const T* states) const {
    if (!shape_.last_wanted) return;
    for (int64_t i = 0; i < count; ++i) sweep_.store(first + i, states + i * shape_.size);
  }

  // What the chunks of one part add, from zero.
  void sum_part(int64_t lane, int64_t part, T* sum, std::byte* memory) const {
    const int64_t end = share_begin(shape_.chunks, part + 1, parts());
    const T* before = nullptr;
    for (int64_t c = share_begin(shape_.chunks, part, parts()); c < end; ++c) {
      sweep_.update(lane, {c, next_chunk(c)}, before, sum, memory);
      before = sum;
    }
  }
  int64_t parts() const { return total_parts(shape_.chunks); }

  void serial_total(int64_t group) const {
    Scratch scratch(state_bytes(shape_.lanes_per_group + 1) + shape_.memory);
    T* states = scratch.take<T>((shape_.lanes_per_group + 1) * shape_.size);
    auto* memory = scratch.take<std::byte>(static_cast<int64_t>(shape_.memory));
    T* sum = states + shape_.lanes_per_group * shape_.size;
    const int64_t first = group * shape_.lanes_per_group;
    load(first, shape_.lanes_per_group, states);
    for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
      T* state = states + i * shape_.size;
      for (int64_t part = 0; part < parts(); ++part) {
        sum_part(first + i, part, sum, memory);
        sweep_.advance(first + i, 0, all_rows(), state, sum, state);
      }
      sweep_.complete(first + i, state);
    }
    for (int64_t u = 0; u < shape_.uses; ++u) sweep_.use(group, {u, next_use(u)}, states, memory);
    store(first, shape_.lanes_per_group, states);
  }

  void with_memory(int64_t items, const std::function<void(int64_t, std::byte*)>& body) const {
    for_neighbours(items, shape_.threads, shape_.memory, [&](int64_t item, std::byte* memory) {
      kernels::with_unit(products_, [&] { body(item, memory); });
    });
  }

  FeatureRange all_rows() const { return {0, shape_.rows}; }
  // Cuts of each state's rows, as many as even out the lanes over the threads.
  int64_t cuts() const {
    const int64_t even = shape_.threads / std::gcd(shape_.lanes, int64_t{shape_.threads});
    return std::clamp<int64_t>(even, 1, ceil_div(shape_.rows, shape_.rows_unit));
  }
  // Calls body(lane, rows, scratch memory) for all rows of all states.
  template <class Body>
  void for_rows(const Body& body) const {
    const int64_t cuts = this->cuts(), unit = shape_.rows_unit;
    const int64_t units = ceil_div(shape_.rows, unit);
    with_memory(shape_.lanes * cuts, [&](int64_t item, std::byte* scratch) {
      const int64_t cut = item % cuts;
      const auto bound = [&](int64_t i) {
        return std::min(share_begin(units, i, cuts) * unit, shape_.rows);
      };
      body(item / cuts, FeatureRange{bound(cut), bound(cut + 1)}, scratch);
    });
  }

  void parallel_total() const {
    const int64_t lanes = shape_.lanes, size = shape_.size;
    Array memory(dtype_of<T>, {parts() + 1, lanes, size});
    T* states = memory.as<T>();
    T* sums = states + lanes * size;
    with_memory(lanes * parts(), [&](int64_t item, std::byte* scratch) {
      sum_part(item / parts(), item % parts(), sums + item * size, scratch);
    });
    load(0, lanes, states);
    for_rows([&](int64_t lane, const FeatureRange& rows, std::byte*) {
      for (int64_t part = 0; part < parts(); ++part) {
        T* state = states + lane * size;
        sweep_.advance(lane, 0, rows, state, sums + (lane * parts() + part) * size, state);
      }
    });
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.complete(lane, states + lane * size);
    with_memory(shape_.groups() * shape_.uses, [&](int64_t item, std::byte* scratch) {
      const int64_t group = item / shape_.uses, u = item % shape_.uses;
      sweep_.use(group, {u, next_use(u)}, states + group * shape_.lanes_per_group * size, scratch);
    });
    store(0, lanes, states);
  }

  // Parts of each group's chunks of a block, as many as even out the groups over the threads.
  int64_t block_parts() const {
    return shape_.threads / std::gcd(shape_.groups(), int64_t{shape_.threads});
  }
  // Chunks of a block: few enough for what they add, and for their rows, to stay in caches.
  int64_t block_chunks() const {
    constexpr int64_t kBytes = int64_t{1} << 20;
    const int64_t fit = kBytes / static_cast<int64_t>(state_bytes(shape_.lanes));
    const int64_t blocks = ceil_div(shape_.chunks, std::max(fit, 4 * block_parts()));
    return ceil_div(shape_.chunks, blocks);
  }

  // A block of chunks, and memory for it.
  struct Block {
    int64_t first = 0, count = 0, parts = 0;
    T* before = nullptr;  // states before the block, [lanes, size]
    T* behind = nullptr;  // those behind it
    T* starts = nullptr;  // states before the parts from the third on, [parts - 2, lanes, size]
    T* kept = nullptr;    // behind the first part's chunks; what others add, [count, lanes, size]
    int64_t begin(int64_t part) const { return share_begin(count, part, parts); }
  };
  int64_t all_states() const { return shape_.lanes * shape_.size; }

  void shared() const {
    const int64_t chunks = block_chunks(), parts = block_parts(), states = all_states();
    const int64_t starts = std::max<int64_t>(parts - 2, 0);
    Array memory(dtype_of<T>, {2 + starts + chunks, states});
    for (const Tensor* result : shape_.results) populate(*result, shape_.threads);
    Block block;
    block.before = memory.as<T>();
    block.behind = block.before + states;
    block.starts = block.behind + states;
    block.kept = block.starts + starts * states;
    load(0, shape_.lanes, block.before);
    for (; block.first < shape_.chunks; block.first += chunks) {
      block.count = std::min(chunks, shape_.chunks - block.first);
      block.parts = std::min(parts, block.count);
      sum_up(block);
      if (block.parts > 2) find_starts(block);
      use_and_advance(block);
      std::swap(block.before, block.behind);
    }
    store(0, shape_.lanes, block.before);
  }

  // Calls body(group, part, scratch memory).
  template <class Body>
  void for_parts(const Block& block, const Body& body) const {
    with_memory(shape_.groups() * block.parts, [&](int64_t item, std::byte* scratch) {
      body(item / block.parts, item % block.parts, scratch);
    });
  }

  void sum_up(const Block& block) const {
    for_parts(block, [&](int64_t group, int64_t part, std::byte* scratch) {
      for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
        const int64_t lane = group * shape_.lanes_per_group + i, at = lane * shape_.size;
        const int64_t end = block.begin(part + 1);
        const T* from = part == 0 ? block.before + at : nullptr;
        for (int64_t c = block.begin(part); c < end && updates(block.first + c); ++c) {
          const bool last = part == 0 && c + 1 == block.count;
          T* to = (last ? block.behind : block.kept + c * all_states()) + at;
          const int64_t next = c + 1 < end ? chunk_at(block.first + c + 1) : -1;
          sweep_.update(lane, {chunk_at(block.first + c), next}, from, to, scratch);
          if (part == 0) from = to;
        }
      }
    });
  }

  // States before a part but the first: each part runs its own along its chunks.
  T* start(const Block& block, int64_t part) const {
    if (part == 1) return block.kept + (block.begin(1) - 1) * all_states();
    return block.starts + (part - 2) * all_states();
  }

  void find_starts(const Block& block) const {
    for_rows([&](int64_t lane, const FeatureRange& rows, std::byte*) {
      const int64_t at = lane * shape_.size;
      for (int64_t part = 1; part + 1 < block.parts; ++part) {
        const T* from = start(block, part) + at;
        T* to = start(block, part + 1) + at;
        for (int64_t c = block.begin(part); c < block.begin(part + 1); ++c) {
          sweep_.advance(lane, chunk_at(block.first + c), rows, from,
                         block.kept + c * all_states() + at, to);
          from = to;
        }
      }
    });
  }

  void use_and_advance(const Block& block) const {
    const int64_t behind = block.first + block.count;
    Block next = block;
    next.first = behind;
    next.count = std::min(block.count, shape_.chunks - behind);
    for_parts(block, [&](int64_t group, int64_t part, std::byte* scratch) {
      const int64_t lane = group * shape_.lanes_per_group, at = lane * shape_.size;
      for (int64_t c = block.begin(part); c < block.begin(part + 1); ++c) {
        const int64_t chunk = block.first + c;
        T* states = part > 0 ? start(block, part)
                    : c == 0 ? block.before
                             : block.kept + (c - 1) * all_states();
        int64_t after = chunk;
        if (c + 1 == block.begin(part + 1)) after = next.first + next.begin(part) - 1;
        sweep_.use(group, {chunk_at(chunk), next_chunk(after)}, states + at, scratch);
        if (part == 0 || !updates(chunk)) continue;
        T* to = c + 1 == block.count ? block.behind : states;
        for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
          const int64_t own = at + i * shape_.size;
          sweep_.advance(lane + i, chunk_at(chunk), all_rows(), states + own,
                         block.kept + c * all_states() + own, to + own);
        }
      }
    });
  }

  const SweepShape& shape_;
  const Sweep<T>& sweep_;
  const kernels::TileKernels<T>& products_;
};

}  // namespace heed::chunked
