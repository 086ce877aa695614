#include "base/blocks.h"

#include <algorithm>
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
  KeptBlocks() { blocks_.reserve(kKeptBytes / kHugePage); }

  // The youngest of this size, whose memory may still be in a cache; null where there is none.
  void* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found == blocks_.rend()) return nullptr;
    void* memory = found->memory;
    blocks_.erase(std::next(found).base());
    total_ -= bytes;
    return memory;
  }

  // The oldest ones make room.
  bool keep(void* memory, size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || bytes > kKeptBytes) return false;
    auto dropped = blocks_.begin();
    for (; total_ + bytes > kKeptBytes; ++dropped) {
      std::free(dropped->memory);
      total_ -= dropped->bytes;
    }
    blocks_.erase(blocks_.begin(), dropped);
    blocks_.push_back({memory, bytes});
    total_ += bytes;
    return true;
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;  // the youngest last
  size_t total_ = 0;
};

// Never destroyed: arrays may be freed after static objects are.
KeptBlocks& kept_blocks() {
  static auto& blocks = *new KeptBlocks;
  return blocks;
}

bool is_kept(size_t bytes) { return kKeepsBlocks && bytes >= kHugePage; }

}  // namespace

void* allocate_block(size_t bytes) {
  if (is_kept(bytes)) {
    if (void* memory = kept_blocks().take(bytes)) return memory;
  }
  constexpr size_t kLine = 64;
  const size_t rounded = std::max(Scratch::rounded(bytes), kLine);
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= kHugePage ? kHugePage : kLine, rounded) != 0) {
    throw std::bad_alloc();
  }
  prefer_huge_pages(memory, rounded);
  return memory;
}

void free_block(void* memory, size_t bytes) noexcept {
  if (!is_kept(bytes) || !kept_blocks().keep(memory, bytes)) std::free(memory);
}

}  // namespace heed
