#include "base/huge_pages.h"

#include "base/parallel.h"

namespace heed {

void populate(const Tensor& result, int threads) {
#ifdef MADV_POPULATE_WRITE
  if (!result.is_contiguous()) return;
  constexpr auto kPage = static_cast<int64_t>(kHugePage);
  const int64_t bytes = result.count() * static_cast<int64_t>(size_of(result.dtype()));
  auto* data = static_cast<std::byte*>(result.data());
  const int64_t before = reinterpret_cast<intptr_t>(data) % kPage, pages = (before + bytes) / kPage;
  if (pages < 2) return;
  parallel_for(pages - 1, threads, [&](int64_t i, int) {
    (void)madvise(data - before + (i + 1) * kPage, kHugePage, MADV_POPULATE_WRITE);
  });
#else
  (void)result, (void)threads;
#endif
}

}  // namespace heed
