#include "base/blocks.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "base/huge_pages.h"
#include "base/parallel.h"

namespace heed {

namespace {

// Nobody waits for the lock: who does not get it asks malloc, also in a child forked while it was held.
class KeptBlocks {
 public:
  KeptBlocks() { blocks_.reserve(kKeptLimit / kHugePage); }

  // The youngest of this size, whose memory may still be in a cache; null where there is none.
  void* take(size_t bytes) {
    const size_t used = used_ += bytes;
    for (size_t peak = peak_; peak < used && !peak_.compare_exchange_weak(peak, used);) {
    }
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found == blocks_.rend()) {
      drop_to(limit());
      return nullptr;
    }
    void* memory = found->memory;
    blocks_.erase(std::next(found).base());
    kept_ -= bytes;
    return memory;
  }

  bool keep(void* memory, size_t bytes) {
    used_ -= bytes;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    const size_t most = limit();  // read once: other threads move it
    if (!lock || bytes > most) return false;
    drop_to(most - bytes);
    blocks_.push_back({memory, bytes});
    kept_ += bytes;
    return true;
  }

  // An allocation that failed after it was not found here.
  void not_used(size_t bytes) { used_ -= bytes; }

  BlockBytes bytes() {
    const std::lock_guard lock(mutex_);
    return {kept_, peak_};
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };

  size_t limit() const {
    const size_t used = used_, peak = peak_;
    return std::clamp(peak - std::min(used, peak), kKeptBytes, kKeptLimit);
  }

  // The oldest ones make room.
  void drop_to(size_t bytes) {
    auto dropped = blocks_.begin();
    for (; kept_ > bytes; ++dropped) {
      std::free(dropped->memory);
      kept_ -= dropped->bytes;
    }
    blocks_.erase(blocks_.begin(), dropped);
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the youngest last
  size_t kept_ = 0;
  std::atomic<size_t> used_ = 0, peak_ = 0;  // of blocks in use
};

// Never destroyed: arrays may be freed after static objects are.
KeptBlocks& kept_blocks() {
  static auto& blocks = *new KeptBlocks;
  return blocks;
}

bool is_kept(size_t bytes) { return kKeepsBlocks && bytes >= kHugePage; }

}  // namespace

OutOfMemory::OutOfMemory(size_t bytes) noexcept {
  std::snprintf(text_.data(), text_.size(), "memory: %zu bytes are needed, the system refuses them",
                bytes);
}

void* allocate_block(size_t bytes) {
  if (is_kept(bytes)) {
    if (void* memory = kept_blocks().take(bytes)) return memory;
  }
  constexpr size_t kLine = 64;
  // An address sanitizer shall see where it ends.
  const size_t size = kKeepsBlocks ? Scratch::rounded(bytes) : bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= kHugePage ? kHugePage : kLine, std::max<size_t>(size, 1)) !=
      0) {
    if (is_kept(bytes)) kept_blocks().not_used(bytes);
    throw OutOfMemory(bytes);
  }
  prefer_huge_pages(memory, size);
  return memory;
}

void free_block(void* memory, size_t bytes) noexcept {
  if (!is_kept(bytes) || !kept_blocks().keep(memory, bytes)) std::free(memory);
}

BlockBytes block_bytes() { return kept_blocks().bytes(); }

}  // namespace heed
