// In small pages, the first touch of a large array costs as much as a pass of computing on it.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "base/round_up.h"
#include "heed/tensor.h"

namespace heed {

inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr int64_t kPage = 4096;  // what the system counts advice in

/// A wish for memory that nobody has touched yet, and that holds one at least; without huge pages
/// everything works, a few percent slower.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kHugePage) return;
  const auto begin = reinterpret_cast<int64_t>(memory), first = round_up(begin, kPage);
  const int64_t last = (begin + static_cast<int64_t>(bytes)) / kPage * kPage;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): whole pages of the same memory
  (void)madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

/// Fetches pages, which else happens at the first touch of each. Changes no contents.
void populate(void* memory, size_t bytes);
/// The same of a large contiguous result by all threads: for loops whose threads wait for each other
/// often.
void populate(const Tensor& result, int threads);

}  // namespace heed
