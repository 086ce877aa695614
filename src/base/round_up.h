#pragma once
#include <cstdint>

namespace heed {

/// The smallest multiple that is not below n >= 0.
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// The smallest integer that is not below a / b, with b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

}  // namespace heed
