#include "base/huge_pages.h"

#include "base/parallel.h"

namespace heed {

void populate(void* memory, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<int64_t>(memory), first = begin / kPage * kPage;
  const int64_t last = round_up(begin + static_cast<int64_t>(bytes), kPage);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): whole pages with that memory
  (void)madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first),
                MADV_POPULATE_WRITE);
#else
  (void)memory, (void)bytes;
#endif
}

void populate(const Tensor& result, int threads) {
  if (!result.is_contiguous()) return;
  const auto bytes = static_cast<size_t>(result.count()) * size_of(result.dtype());
  if (bytes < kHugePage) return;
  parallel_for(static_cast<int64_t>(bytes / kHugePage), threads, [&](int64_t i, int) {
    populate(static_cast<std::byte*>(result.data()) + static_cast<size_t>(i) * kHugePage,
             kHugePage);
  });
}

}  // namespace heed
