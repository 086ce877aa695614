// Memory of large arrays. Fresh pages cost about as much as a pass of computing on them, and malloc
// may return a large block to the system at every free; so a bounded amount of what is freed is kept.
#pragma once
#include <cstddef>

namespace heed {

/// Freed blocks hold at most this much memory together.
inline constexpr size_t kKeptBytes = size_t{128} << 20;

/// Contents are undefined. From kHugePage on, aligned to it and preferring huge pages, else to 64 bytes.
/// Errors: std::bad_alloc.
void* allocate_block(size_t bytes);
/// `bytes` as it was allocated with.
void free_block(void* memory, size_t bytes) noexcept;

}  // namespace heed
