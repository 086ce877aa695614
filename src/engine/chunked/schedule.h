// The two ways to run a state along a sequence. Both do the same arithmetic in the same order, so that
// the choice, which depends on the number of threads, changes no bit:
//
//   serial   one thread per group of states: for every chunk, use the state, then update it
//   shared   block by block of chunks: every thread runs some rows of the states along the block and
//            keeps what they were before each chunk, then chunks use what was kept in parallel
//
// In both an update adds what the chunk alone sums up, from zero, to the decayed state.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/tensor.h"

namespace heed::chunked {

/// Rows of a state: features.
struct FeatureRange {
  int64_t first = 0, last = 0;
  int64_t count() const { return last - first; }
};

/// Chunk `chunk` is added to the given rows of the state of a lane.
struct Update {
  int64_t lane = 0, chunk = 0;
  FeatureRange rows;
  bool fresh = false;     // the rows become what the chunk adds
  bool followed = false;  // at once by the update with the next chunk
};

/// What happens to states of [size] elements. A lane is a (batch, query head) with a state of its own, a
/// group is some lanes that follow each other and are used together. `memory` is scratch.
template <class T>
class Sweep {
 public:
  virtual ~Sweep() = default;
  virtual void load(int64_t lane, T* state) const = 0;
  /// `states`: those of the group's lanes, one after the other.
  virtual void use(int64_t group, int64_t chunk, T* states, std::byte* memory) const = 0;
  /// The same bits for any cut into rows.
  virtual void update(const Update& at, T* state, std::byte* memory) const = 0;
  virtual void copy(const FeatureRange& rows, const T* from, T* to) const = 0;
  /// Not running: to += from.
  virtual void add(const FeatureRange& rows, const T* from, T* to) const = 0;
  /// Not running: a state that is complete, before its uses.
  virtual void complete(T* /*state*/) const {}
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

/// Parts that a sum over all chunks is cut into, so that few states use many threads.
inline int64_t total_part(int64_t chunks) { return std::max<int64_t>(8, (chunks + 15) / 16); }
inline int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

template <class T>
class Schedule {
 public:
  Schedule(const SweepShape& shape, const Sweep<T>& sweep) : shape_(shape), sweep_(sweep) {}

  void run() const {
    const int64_t groups = shape_.groups();
    if (groups == 0) return;
    const bool even = groups % shape_.threads == 0 || groups >= 4 * shape_.threads;
    if (shape_.threads == 1 || even || shape_.chunks + shape_.uses < 4) {
      parallel_for(groups, shape_.threads, [&](int64_t group, int) {
        if (shape_.running) {
          serial(group);
        } else {
          serial_total(group);
        }
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
  bool updates(int64_t i) const { return i + 1 < shape_.chunks || shape_.last_wanted; }

  void serial(int64_t group) const {
    Scratch scratch(state_bytes(shape_.lanes_per_group) + shape_.memory);
    T* states = scratch.take<T>(shape_.lanes_per_group * shape_.size);
    auto* memory = scratch.take<std::byte>(static_cast<int64_t>(shape_.memory));
    const int64_t first = group * shape_.lanes_per_group;
    for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
      sweep_.load(first + i, states + i * shape_.size);
    }
    for (int64_t c = 0; c < shape_.chunks; ++c) {
      sweep_.use(group, chunk_at(c), states, memory);
      if (!updates(c)) break;
      for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
        sweep_.update({first + i, chunk_at(c), all_rows()}, states + i * shape_.size, memory);
      }
    }
    store(first, states);
  }

  void store(int64_t first, const T* states) const {
    if (!shape_.last_wanted) return;
    for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
      sweep_.store(first + i, states + i * shape_.size);
    }
  }

  // What the chunks of one part add, from zero.
  void sum_part(int64_t lane, int64_t part, T* sum, std::byte* memory) const {
    const int64_t step = total_part(shape_.chunks);
    for (int64_t c = part * step; c < std::min((part + 1) * step, shape_.chunks); ++c) {
      sweep_.update({lane, c, all_rows(), c == part * step, true}, sum, memory);
    }
  }
  int64_t parts() const { return parts_of(shape_.chunks, total_part(shape_.chunks)); }

  void serial_total(int64_t group) const {
    Scratch scratch(state_bytes(shape_.lanes_per_group + 1) + shape_.memory);
    T* states = scratch.take<T>((shape_.lanes_per_group + 1) * shape_.size);
    auto* memory = scratch.take<std::byte>(static_cast<int64_t>(shape_.memory));
    T* sum = states + shape_.lanes_per_group * shape_.size;
    const int64_t first = group * shape_.lanes_per_group;
    for (int64_t i = 0; i < shape_.lanes_per_group; ++i) {
      T* state = states + i * shape_.size;
      sweep_.load(first + i, state);
      for (int64_t part = 0; part < parts(); ++part) {
        sum_part(first + i, part, sum, memory);
        sweep_.add(all_rows(), sum, state);
      }
      sweep_.complete(state);
    }
    for (int64_t u = 0; u < shape_.uses; ++u) sweep_.use(group, u, states, memory);
    store(first, states);
  }

  void with_memory(int64_t items, const std::function<void(int64_t, std::byte*)>& body) const {
    for_neighbours(items, shape_.threads, shape_.memory, body);
  }

  FeatureRange all_rows() const { return {0, shape_.rows}; }
  // Cuts of each state's rows, as many as even out the lanes over the threads.
  int64_t cuts() const {
    const int64_t even = shape_.threads / std::gcd(shape_.lanes, int64_t{shape_.threads});
    return std::clamp<int64_t>(even, 1, parts_of(shape_.rows, shape_.rows_unit));
  }
  // Calls body(lane, rows, scratch memory) for all rows of all states.
  template <class Body>
  void for_rows(const Body& body) const {
    const int64_t cuts = this->cuts(), unit = shape_.rows_unit;
    const int64_t units = parts_of(shape_.rows, unit);
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
    Array memory(sizeof(T) == 8 ? DType::f64 : DType::f32, {parts() + 1, lanes, size});
    T* states = memory.as<T>();
    T* sums = states + lanes * size;
    with_memory(lanes * parts(), [&](int64_t item, std::byte* scratch) {
      sum_part(item % lanes, item / lanes, sums + item * size, scratch);
    });
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.load(lane, states + lane * size);
    for_rows([&](int64_t lane, const FeatureRange& rows, std::byte*) {
      for (int64_t part = 0; part < parts(); ++part) {
        sweep_.add(rows, sums + (part * lanes + lane) * size, states + lane * size);
      }
    });
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.complete(states + lane * size);
    with_memory(shape_.groups() * shape_.uses, [&](int64_t item, std::byte* scratch) {
      const int64_t group = item / shape_.uses;
      sweep_.use(group, item % shape_.uses, states + group * shape_.lanes_per_group * size,
                 scratch);
    });
    for (int64_t group = 0; group < shape_.groups(); ++group) {
      store(group * shape_.lanes_per_group, states + group * shape_.lanes_per_group * size);
    }
  }

  // Chunks of a block: few enough for their states and rows to stay in caches, enough for all threads.
  int64_t block_chunks() const {
    constexpr int64_t kBytes = int64_t{1} << 20;
    const int64_t fit = kBytes / static_cast<int64_t>(state_bytes(shape_.lanes));
    const int64_t wanted = (4 * shape_.threads + shape_.lanes - 1) / shape_.lanes;
    const int64_t blocks = parts_of(shape_.chunks, std::max(fit, wanted));
    return parts_of(shape_.chunks, blocks);
  }

  void shared() const {
    const int64_t lanes = shape_.lanes, size = shape_.size, block = block_chunks();
    Array memory(sizeof(T) == 8 ? DType::f64 : DType::f32, {block + 1, lanes, size});
    T* running = memory.as<T>();
    T* kept = running + lanes * size;
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.load(lane, running + lane * size);
    for (int64_t first = 0; first < shape_.chunks; first += block) {
      run_block(first, std::min(block, shape_.chunks - first), running, kept);
    }
    for (int64_t group = 0; group < shape_.groups(); ++group) {
      store(group * shape_.lanes_per_group, running + group * shape_.lanes_per_group * size);
    }
  }

  void run_block(int64_t first, int64_t count, T* running, T* kept) const {
    const int64_t lanes = shape_.lanes, size = shape_.size;
    for_rows([&](int64_t lane, const FeatureRange& rows, std::byte* scratch) {
      T* state = running + lane * size;
      for (int64_t c = 0; c < count; ++c) {
        sweep_.copy(rows, state, kept + (c * lanes + lane) * size);
        if (!updates(first + c)) break;
        sweep_.update({lane, chunk_at(first + c), rows, false, true}, state, scratch);
      }
    });
    const int64_t groups = shape_.groups(), per_group = shape_.lanes_per_group;
    with_memory(groups * count, [&](int64_t item, std::byte* scratch) {
      const int64_t c = item / groups, group = item % groups;
      sweep_.use(group, chunk_at(first + c), kept + (c * lanes + group * per_group) * size,
                 scratch);
    });
  }

  const SweepShape& shape_;
  const Sweep<T>& sweep_;
};

}  // namespace heed::chunked
