#include "engine/chunked/decay_table.h"

#include <cmath>
#include <limits>

namespace heed::chunked {

template <class T>
DecayTable<T>::DecayTable(double slope, int64_t chunk) : chunk_(chunk), pad_(chunk + kBlockPad) {
  const auto size = static_cast<size_t>(chunk + 1 + 2 * pad_);
  rising_.resize(size);
  falling_.resize(size);
  falling_slope_.resize(size);
  for (int64_t i = 0; i <= chunk; ++i) {
    double power = std::exp(-slope * static_cast<double>(i));
    // Subnormal factors would stall products.
    if (power < static_cast<double>(std::numeric_limits<T>::min())) power = 0;
    rising_[static_cast<size_t>(pad_ + i)] = static_cast<T>(power);
    falling_[static_cast<size_t>(pad_ + chunk - i)] = static_cast<T>(power);
    falling_slope_[static_cast<size_t>(pad_ + chunk - i)] =
        static_cast<T>(static_cast<double>(i) * power);
  }
}

template class DecayTable<float>;
template class DecayTable<double>;

}  // namespace heed::chunked
