// Kept blocks are used again by their size, and no more than a bounded amount is kept.
#include "base/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "base/huge_pages.h"
#include "heed/tensor.h"

namespace heed {
namespace {

TEST(Blocks, AlignedByTheirSize) {
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{65}, kHugePage - 1, kHugePage, kHugePage + 3}) {
    void* block = allocate_block(bytes);
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block) % alignment, 0u) << bytes;
    std::memset(block, 1, bytes);
    free_block(block, bytes);
  }
}

TEST(Blocks, NoTwoOwnersOfOneBlock) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 300; ++i) {
        const size_t bytes = kHugePage + static_cast<size_t>(i % 3) * 4096;
        auto* block = static_cast<int*>(allocate_block(bytes));
        const int mark = t * 1000 + i;
        block[0] = block[bytes / sizeof(int) - 1] = mark;
        std::this_thread::yield();
        EXPECT_EQ(block[0], mark);
        EXPECT_EQ(block[bytes / sizeof(int) - 1], mark);
        free_block(block, bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// More than may be kept at once, and one block that alone is more.
TEST(Blocks, ManyAndLargeOnes) {
  std::vector<void*> blocks;
  const size_t bytes = kKeptBytes / 3;
  blocks.reserve(5);
  for (int i = 0; i < 5; ++i) blocks.push_back(allocate_block(bytes));
  for (void* block : blocks) {
    std::memset(block, 2, 1);
    free_block(block, bytes);
  }
  void* large = allocate_block(kKeptBytes + 1);
  std::memset(large, 3, 1);
  free_block(large, kKeptBytes + 1);
  for (void*& block : blocks) block = allocate_block(bytes);
  for (void* block : blocks) std::memset(block, 4, 1);
  for (void* block : blocks) free_block(block, bytes);
}

// More than kKeptBytes was in use at once: it is kept, and makes room for other sizes.
TEST(Blocks, KeptAndUsedAreAtMostThePeak) {
  if (!kKeepsBlocks) GTEST_SKIP() << "an address sanitizer watches freed memory";
  const size_t bytes = kKeptBytes / 2;
  std::vector<void*> blocks(6);
  for (void*& block : blocks) block = allocate_block(bytes);
  for (void* block : blocks) free_block(block, bytes);
  EXPECT_GE(block_bytes().kept, 6 * bytes);
  EXPECT_GE(block_bytes().peak, 6 * bytes);
  std::vector<void*> others;
  for (size_t used = bytes + kHugePage; used <= 5 * bytes; used += bytes + kHugePage) {
    others.push_back(allocate_block(bytes + kHugePage));
    const BlockBytes now = block_bytes();
    EXPECT_LE(now.kept, std::max(kKeptBytes, now.peak - used));
  }
  for (void* block : others) free_block(block, bytes + kHugePage);
  EXPECT_LE(block_bytes().kept, std::min(kKeptLimit, block_bytes().peak));
}

TEST(Blocks, AFreedOneIsUsedAgainByItsSize) {
  if (!kKeepsBlocks) GTEST_SKIP() << "an address sanitizer watches freed memory";
  const size_t bytes = 3 * kHugePage;
  void* block = allocate_block(bytes);
  free_block(block, bytes);
  void* other = allocate_block(bytes + 64);
  EXPECT_NE(other, block);
  void* again = allocate_block(bytes);
  EXPECT_EQ(again, block);
  free_block(other, bytes + 64);
  free_block(again, bytes);
  // The same through arrays.
  const Dims shape{static_cast<int64_t>(bytes / sizeof(float))};
  const void* memory = nullptr;
  {
    const Array array(DType::f32, shape);
    memory = array.view().data();
    Array moved(DType::f32, {4});
    moved = Array(DType::f32, shape);
    EXPECT_NE(moved.view().data(), memory);
  }
  const Array first(DType::f32, shape), second(DType::f32, shape);
  EXPECT_TRUE(first.view().data() == memory || second.view().data() == memory);
}

}  // namespace
}  // namespace heed
