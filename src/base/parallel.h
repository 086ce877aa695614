// Parallel loops over a fixed set of work items. What an item computes never depends on which thread
// runs it or on how many there are, so forwards give the same bits for any thread count.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "heed/run.h"

namespace heed {

/// Threads to use for `items` items.
int threads_for(const RunOptions& run, int64_t items);

/// Threads that get enough of a work which takes one thread about so long: others are woken and waited for in
/// microseconds, on a busy machine in milliseconds.
int threads_for(const RunOptions& run, int64_t items, double nanoseconds);
/// `run` with no more threads than that.
RunOptions worth_waking(const RunOptions& run, double nanoseconds);

/// About how long one thread takes, with vectors of 512 bits: for an element in a loop that reads rows and
/// writes others, for a multiply-add of float32 matrices and for a byte that these read.
inline constexpr double kElementNanoseconds = 0.5;
inline constexpr double kMultiplyAddNanoseconds = 1.0 / 40, kByteNanoseconds = 1.0 / 40;
/// Threads for `items` items of a loop that reads rows and writes others, `elements` in all.
int threads_for_rows(const RunOptions& run, int64_t items, int64_t elements);

/// Calls body(item, worker) for every item in [0, items), worker in [0, threads). Items are handed out
/// in order, one at a time, so put the long ones first; no more of them than threads go each to the thread
/// of its number, which finds in its caches what it left there. The first exception is rethrown after the
/// loop.
void parallel_for(int64_t items, int threads,
                  const std::function<void(int64_t item, int worker)>& body);

/// The same for loops that follow each other over the same rows: every thread begins with its share of
/// neighbours, so that it finds in its caches what it left there, and ends with what others have not begun.
void parallel_for_shares(int64_t items, int threads,
                         const std::function<void(int64_t item, int worker)>& body);

/// parallel_for whose items get memory of their thread: body(item, *works[worker]), made by make() when a
/// thread first needs it and kept in `works` for later loops.
template <class Work, class Make, class Body>
void parallel_for_with(std::vector<std::unique_ptr<Work>>& works, int64_t items, int threads,
                       const Make& make, const Body& body) {
  works.resize(std::max(works.size(), static_cast<size_t>(threads)));
  parallel_for(items, threads, [&](int64_t item, int worker) {
    std::unique_ptr<Work>& work = works[static_cast<size_t>(worker)];
    if (!work) work = make();
    body(item, *work);
  });
}

/// Where share number `share` begins when `count` items are cut into even shares of neighbours; it ends
/// where the next one begins.
constexpr int64_t share_begin(int64_t count, int64_t share, int64_t shares) {
  return count * share / shares;
}

/// Bounded scratch memory of one worker: a 64-byte aligned block that is reused between calls.
/// Never holds more than what one tile needs; contents are undefined (NaN in debug builds).
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  /// The next `count` elements, 64-byte aligned; asserts that the block is large enough.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  static size_t rounded(size_t bytes) { return (bytes + 63) & ~size_t{63}; }

 private:
  void* take_bytes(size_t bytes);
  std::byte* next_ = nullptr;
  std::byte* end_ = nullptr;
  std::byte* owned_ = nullptr;  // set when the thread's block is taken by an outer Scratch
};

/// Hands out parts of one block of memory, 64-byte aligned; without a block it only counts. One function that
/// takes what it needs from a Cutter says so how much that is, and lays it out.
class Cutter {
 public:
  explicit Cutter(std::byte* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    std::byte* start = base_ == nullptr ? nullptr : base_ + used_;
    used_ += Scratch::rounded(static_cast<size_t>(count) * sizeof(T));
    return reinterpret_cast<T*>(start);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

/// Scratch memory as make(cutter) lays it out.
template <class Make>
class LaidOut {
 public:
  explicit LaidOut(const Make& make) : scratch_(counted(make)), memory(cut(make)) {}

 private:
  static size_t counted(const Make& make) {
    Cutter counting;
    make(counting);
    return counting.used();
  }
  auto cut(const Make& make) {
    Cutter cutter(scratch_.take<std::byte>(0));
    return make(cutter);
  }
  Scratch scratch_;

 public:
  std::invoke_result_t<const Make&, Cutter&> memory;
};

}  // namespace heed
