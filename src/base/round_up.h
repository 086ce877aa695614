#pragma once
#include <cstdint>

namespace heed {

/// The smallest multiple that is not below n >= 0.
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace heed
