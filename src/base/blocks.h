// Memory of large arrays. Fresh pages cost about as much as a pass of computing on them, and malloc
// may return a large block to the system at every free; so a bounded amount of what is freed is kept.
#pragma once
#include <array>
#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define HEED_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HEED_ADDRESS_SANITIZER
#endif
#endif

namespace heed {

/// Says how much was needed.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) noexcept;
  const char* what() const noexcept override { return text_.data(); }

 private:
  std::array<char, 96> text_{};  // a string would need memory
};

/// Not beside an address sanitizer, which shall see what is used after it was freed.
#ifdef HEED_ADDRESS_SANITIZER
inline constexpr bool kKeepsBlocks = false;
#else
inline constexpr bool kKeepsBlocks = true;
#endif

/// Freed blocks hold at most kKeptBytes together. Where more has been in use at once, they and those in
/// use hold at most as much as that, and freed ones at most kKeptLimit.
inline constexpr size_t kKeptBytes = size_t{128} << 20, kKeptLimit = size_t{1} << 30;

/// Contents are undefined. From kHugePage on, aligned to it and preferring huge pages, else to 64 bytes.
/// Errors: OutOfMemory.
void* allocate_block(size_t bytes);
/// `bytes` as it was allocated with.
void free_block(void* memory, size_t bytes) noexcept;
/// What freed blocks hold now, and what has been in use at most.
struct BlockBytes {
  size_t kept = 0, peak = 0;
};
BlockBytes block_bytes();

}  // namespace heed
