// Powers of a head's decay.
#pragma once
#include <cstdint>
#include <vector>

namespace heed::chunked {

/// Columns behind a block: whole panels, and rows that do not fall on the same cache sets.
inline constexpr int64_t kBlockPad = 64 + 16;

/// Powers of exp(-slope) for distances up to a chunk, in both directions, with zeros around them so that
/// kernels may read whole vectors.
template <class T>
class DecayTable {
 public:
  DecayTable(double slope, int64_t chunk);
  /// p[x] = decay^(distance + x)
  const T* rising(int64_t distance) const { return rising_.data() + pad_ + distance; }
  /// p[x] = decay^(distance - x)
  const T* falling(int64_t distance) const { return falling_.data() + pad_ + chunk_ - distance; }
  /// p[x] = (distance - x) decay^(distance - x)
  const T* falling_slope(int64_t distance) const {
    return falling_slope_.data() + pad_ + chunk_ - distance;
  }

 private:
  int64_t chunk_, pad_;
  std::vector<T> rising_, falling_, falling_slope_;
};

}  // namespace heed::chunked
