#include "base/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/blocks.h"
#include "base/cpu_quota.h"
#include "heed/error.h"

namespace heed {

namespace {
std::atomic<int> requested_threads{0};  // 0: nobody said how many

constexpr int kMostThreads = 1024;

// As many of `wanted` threads as the system lets exist together: OpenMP ends the process where it is refused
// one. Tried once for each larger number, with threads of our own; who comes meanwhile makes do with those
// that there have been.
int threads_to_be_had(int wanted) {
  static std::atomic<int> had{1}, most{kMostThreads};
  static std::mutex trying;
  if (wanted <= had) return wanted;
  const std::unique_lock lock(trying, std::try_to_lock);
  if (!lock) return std::min<int>(wanted, had);
  if (wanted <= most) {
    std::vector<std::thread> threads;
    std::atomic<bool> all_there{false};
    try {
      threads.reserve(static_cast<size_t>(wanted));
      while (static_cast<int>(threads.size()) + 1 < wanted) {
        threads.emplace_back([&] { all_there.wait(false); });
      }
    } catch (const std::exception&) {  // refused, or no memory for it
      most = static_cast<int>(threads.size()) + 1;
    }
    all_there = true;
    all_there.notify_all();
    for (std::thread& thread : threads) thread.join();
    had = std::max<int>(had, static_cast<int>(threads.size()) + 1);
  }
  return std::min<int>(wanted, most);
}

void check_threads(int threads) {
  if (threads < 1 || threads > kMostThreads) {
    throw Error("threads is " + std::to_string(threads) + ", 1 to " + std::to_string(kMostThreads) +
                " are needed");
  }
}

// More threads than the control groups grant would spend each other's time waiting.
int granted_threads() {
  static const int most =
      std::getenv("OMP_NUM_THREADS") != nullptr ? kMostThreads : cpu_quota().value_or(kMostThreads);
  return std::min(omp_get_max_threads(), most);
}

}  // namespace

int default_threads() {
  int requested = requested_threads.load();
  return requested > 0 ? requested : granted_threads();
}

void set_threads(int threads) {
  check_threads(threads);
  requested_threads.store(threads);
}

int threads_for(const RunOptions& run, int64_t items) {
  if (run.threads) check_threads(*run.threads);
  int threads = run.threads.value_or(default_threads());
  if (omp_in_parallel()) threads = 1;
  return threads_to_be_had(
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items))));
}

int threads_for(const RunOptions& run, int64_t items, double nanoseconds) {
  constexpr double kShare = 4000;  // measured with two threads
  const double shares = std::min(nanoseconds / kShare, double{kMostThreads});
  return threads_for(run, std::min(items, static_cast<int64_t>(shares)));
}

int threads_for_rows(const RunOptions& run, int64_t items, int64_t elements) {
  return threads_for(run, items, static_cast<double>(elements) * kElementNanoseconds);
}

RunOptions worth_waking(const RunOptions& run, double nanoseconds) {
  RunOptions fewer = run;
  fewer.threads = threads_for(run, kMostThreads, nanoseconds);
  return fewer;
}

namespace {

// Runs body for items of a parallel loop; the first exception is kept, later items are then left out.
class Guarded {
 public:
  explicit Guarded(const std::function<void(int64_t item, int worker)>& body) : body_(body) {}
  void run(int64_t item) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      body_(item, omp_get_thread_num());
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const std::function<void(int64_t item, int worker)>& body_;
  std::exception_ptr failure_;
  std::atomic<bool> failed_{false};
};

}  // namespace

void parallel_for(int64_t items, int threads,
                  const std::function<void(int64_t item, int worker)>& body) {
  if (threads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) body(item, 0);
    return;
  }
  Guarded guarded(body);
  // NOLINTNEXTLINE(bugprone-branch-clone): the schedules differ
  if (items <= threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t item = 0; item < items; ++item) guarded.run(item);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < items; ++item) guarded.run(item);
  }
  guarded.rethrow();
}

void parallel_for_shares(int64_t items, int threads,
                         const std::function<void(int64_t item, int worker)>& body) {
  if (threads <= 1 || items <= threads) return parallel_for(items, threads, body);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) {
    Share& share = shares[static_cast<size_t>(t)];
    share.next = share_begin(items, t, threads);
    share.end = share_begin(items, t + 1, threads);
  }
  Guarded guarded(body);
#pragma omp parallel num_threads(threads)
  for (int s = 0; s < threads; ++s) {
    Share& share = shares[static_cast<size_t>((omp_get_thread_num() + s) % threads)];
    for (int64_t item = share.next++; item < share.end; item = share.next++) guarded.run(item);
  }
  guarded.rethrow();
}

namespace {

// One block per thread, grown on demand and kept: at most what the largest tile so far needed. It has no
// destructor, as destructors of static objects, which run after those of the main thread's, may still call
// operators.
struct Block {
  std::byte* memory = nullptr;
  size_t bytes = 0;
  bool in_use = false;
};
thread_local Block block;

struct FreesBlock {
  ~FreesBlock() {
    std::free(block.memory);
    block = {};
  }
  void is_used() const {}
};
thread_local const FreesBlock frees_block;

}  // namespace

Scratch::Scratch(size_t bytes) {
  frees_block.is_used();
  bytes = rounded(bytes);
  if (block.in_use) {
    next_ = static_cast<std::byte*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
    owned_ = next_;
  } else {
    if (block.bytes < bytes) {
      std::free(block.memory);
      block.bytes = 0;
      block.memory = static_cast<std::byte*>(std::aligned_alloc(64, bytes));
      if (block.memory != nullptr) block.bytes = bytes;
    }
    next_ = block.memory;
  }
  if (next_ == nullptr && bytes > 0) throw OutOfMemory(bytes);
  block.in_use = true;
  end_ = next_ + bytes;
#ifndef NDEBUG
  std::memset(next_, 0xff, bytes);  // NaN as float and double
#endif
}

Scratch::~Scratch() {
  if (owned_ != nullptr) {
    std::free(owned_);
  } else {
    block.in_use = false;
  }
}

void* Scratch::take_bytes(size_t bytes) {
  std::byte* start = next_;
  next_ += rounded(bytes);
  if (next_ > end_) std::abort();  // a tile's size was computed wrongly: never write past the block
  return start;
}

}  // namespace heed
