// The two ways to run a state along a sequence. Both do the same arithmetic in the same order, so that
// the choice, which depends on the number of threads, changes no bit:
//
//   serial   one thread per group of states: for every chunk, use the state, then update it
//   scan     chunks in parallel: what each adds to a state, then a scan over chunks, then uses
//
// In both an update adds what the chunk alone sums up, from zero, to the decayed state.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/tensor.h"

namespace heed::chunked {

/// What happens to states of [size] elements. A lane is a (batch, query head) with a state of its own, a
/// group is some lanes that follow each other and are used together. `memory` is scratch.
template <class T>
class Sweep {
 public:
  virtual ~Sweep() = default;
  virtual void load(int64_t lane, T* state) const = 0;
  /// `states`: those of the group's lanes, one after the other.
  virtual void use(int64_t group, int64_t chunk, T* states, std::byte* memory) const = 0;
  /// Adds chunk to state; `fresh`: the state becomes what the chunk adds.
  virtual void update(int64_t lane, int64_t chunk, bool fresh, T* state,
                      std::byte* memory) const = 0;
  /// For elements [begin, end) of scan_size, and what follows them: slot receives running, which becomes
  /// what `update` would have made of it.
  virtual void scan(int64_t lane, int64_t chunk, T* running, T* slot, int64_t begin,
                    int64_t end) const = 0;
  /// Not running: a state that is complete, before its uses.
  virtual void complete(T* /*state*/) const {}
  virtual void store(int64_t lane, const T* state) const = 0;
};

struct SweepShape {
  int64_t lanes = 0, lanes_per_group = 1;
  int64_t chunks = 0;       // that update the state
  int64_t uses = 0;         // chunks that use it: the same if `running`
  int64_t size = 0;         // elements of a state
  int64_t scan_size = 0;    // of those, the ones that a scan may cut anywhere
  size_t memory = 0;        // bytes
  bool running = true;      // chunks see the state of those before them; else of all
  bool reverse = false;     // last chunk first
  bool last_wanted = true;  // whether the state behind the last chunk is stored
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
    for (int64_t item = items * share / shares; item < items * (share + 1) / shares; ++item) {
      body(item, memory);
    }
  });
}

/// Parts that a sum over all chunks is cut into, so that few states use many threads.
inline int64_t total_part(int64_t chunks) { return std::max<int64_t>(8, (chunks + 15) / 16); }

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
      scanned();
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
        sweep_.update(first + i, chunk_at(c), false, states + i * shape_.size, memory);
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
      sweep_.update(lane, c, c == part * step, sum, memory);
    }
  }
  int64_t parts() const {
    const int64_t step = total_part(shape_.chunks);
    return (shape_.chunks + step - 1) / step;
  }

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
        sweep_.scan(first + i, 0, state, sum, 0, shape_.scan_size);
      }
      sweep_.complete(state);
    }
    for (int64_t u = 0; u < shape_.uses; ++u) sweep_.use(group, u, states, memory);
    store(first, states);
  }

  void with_memory(int64_t items, const std::function<void(int64_t, std::byte*)>& body) const {
    for_neighbours(items, shape_.threads, shape_.memory, body);
  }

  // Elements of a state that one item of a scan takes.
  int64_t scan_elements() const {
    return std::max<int64_t>(512, round_up(shape_.scan_size / (4 * shape_.threads), 64));
  }

  void parallel_total() const {
    const int64_t lanes = shape_.lanes, size = shape_.size;
    Array memory(sizeof(T) == 8 ? DType::f64 : DType::f32, {parts() + 1, lanes, size});
    T* states = memory.as<T>();
    T* sums = states + lanes * size;
    with_memory(lanes * parts(), [&](int64_t item, std::byte* scratch) {
      sum_part(item % lanes, item / lanes, sums + item * size, scratch);
    });
    const int64_t elements = scan_elements(), ranges = (shape_.scan_size + elements - 1) / elements;
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.load(lane, states + lane * size);
    parallel_for(lanes * ranges, shape_.threads, [&](int64_t item, int) {
      const int64_t lane = item / ranges, begin = item % ranges * elements;
      for (int64_t part = 0; part < parts(); ++part) {
        sweep_.scan(lane, 0, states + lane * size, sums + (part * lanes + lane) * size, begin,
                    std::min(begin + elements, shape_.scan_size));
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

  // Chunks that are scanned together: few enough for their states to stay in caches, enough for all
  // threads.
  int64_t block_chunks() const {
    constexpr int64_t kBytes = int64_t{2} << 20;
    const int64_t fit = kBytes / static_cast<int64_t>(state_bytes(shape_.lanes));
    const int64_t wanted = (4 * shape_.threads + shape_.lanes - 1) / shape_.lanes;
    return std::min(shape_.chunks, std::max(fit, wanted));
  }

  void scanned() const {
    const int64_t lanes = shape_.lanes, size = shape_.size, block = block_chunks();
    Array memory(sizeof(T) == 8 ? DType::f64 : DType::f32, {block + 1, lanes, size});
    T* running = memory.as<T>();
    T* slots = running + lanes * size;
    for (int64_t lane = 0; lane < lanes; ++lane) sweep_.load(lane, running + lane * size);
    for (int64_t first = 0; first < shape_.chunks; first += block) {
      const int64_t count = std::min(block, shape_.chunks - first);
      run_block(first, count, running, slots);
    }
    for (int64_t group = 0; group < shape_.groups(); ++group) {
      store(group * shape_.lanes_per_group, running + group * shape_.lanes_per_group * size);
    }
  }

  void run_block(int64_t first, int64_t count, T* running, T* slots) const {
    const int64_t lanes = shape_.lanes, size = shape_.size;
    with_memory(lanes * count, [&](int64_t item, std::byte* scratch) {
      const int64_t c = first + item / lanes;
      if (updates(c)) {
        sweep_.update(item % lanes, chunk_at(c), true, slots + item * size, scratch);
      } else {
        std::fill_n(slots + item * size, size, T{0});
      }
    });
    const int64_t elements = scan_elements(), ranges = (shape_.scan_size + elements - 1) / elements;
    parallel_for(lanes * ranges, shape_.threads, [&](int64_t item, int) {
      const int64_t lane = item / ranges, begin = item % ranges * elements;
      for (int64_t c = 0; c < count; ++c) {
        sweep_.scan(lane, chunk_at(first + c), running + lane * size,
                    slots + (c * lanes + lane) * size, begin,
                    std::min(begin + elements, shape_.scan_size));
      }
    });
    const int64_t groups = shape_.groups(), per_group = shape_.lanes_per_group;
    with_memory(groups * count, [&](int64_t item, std::byte* scratch) {
      const int64_t c = item / groups, group = item % groups;
      sweep_.use(group, chunk_at(first + c), slots + (c * lanes + group * per_group) * size,
                 scratch);
    });
  }

  const SweepShape& shape_;
  const Sweep<T>& sweep_;
};

}  // namespace heed::chunked
