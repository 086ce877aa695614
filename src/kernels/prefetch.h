// Asking for rows of keys and values ahead of their use, one cache line for each that is used, so that
// requests come as evenly as their lines.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/round_up.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Keys that all query rows pass over before the next ones: few enough for the first-level cache.
inline constexpr int64_t kKeyBlock = 16;

/// The way in bytes to the row that is asked for: far enough to cover the latency of memory at full
/// bandwidth.
inline int64_t bytes_ahead(const Rows& rows) {
  constexpr int64_t kAheadBytes = 8192;
  const auto element = static_cast<int64_t>(size_of(rows.dtype));
  const int64_t row = rows.width * element;
  return row == 0 ? 0 : round_up(kAheadBytes, row) / row * rows.stride * element;
}

/// Into the second-level cache: the first level has too few requests under way for full bandwidth. May
/// lie behind the last row, as the next call goes on there; asking for memory that does not exist does
/// nothing.
inline void prefetch_far(const void* p, int64_t ahead) {
  __builtin_prefetch(  // NOLINTNEXTLINE(performance-no-int-to-ptr): no pointer into an object
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead)),
      0, 2);
}

/// Rows that are read later, asked for little by little between products: asked for at once, they would
/// be waited for at once.
class ReadAhead {
 public:
  void add(const Rows& rows) {
    if (rows.count > 0 && rows.width > 0) list_[static_cast<size_t>(count_++)] = rows;
  }
  void ask(int64_t lines) {
    while (lines > 0 && at_ < count_) {
      const Rows& x = list_[static_cast<size_t>(at_)];
      const auto element = static_cast<int64_t>(size_of(x.dtype));
      const auto* row = static_cast<const std::byte*>(x.data) + row_ * x.stride * element;
      for (; lines > 0 && done_ < x.width * element; done_ += kLine, --lines) {
        prefetch_far(row + done_, 0);
      }
      if (done_ < x.width * element) return;
      done_ = 0;
      if (++row_ < x.count) continue;
      row_ = 0;
      ++at_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  std::array<Rows, 4> list_;
  int64_t count_ = 0, at_ = 0;
  int64_t row_ = 0, done_ = 0;  // of list_[at_]: a row, and bytes of it
};

}  // namespace heed::kernels
