// States that all rows of a call see, in the forms that products read them in.
#include <cmath>

#include "engine/chunked/chunk_call.h"
#include "kernels/matrix.h"

namespace heed::chunked {

template <class T>
int64_t ChunkCall<T>::total_values_size(TotalUse use) const {
  if (!half_ || !use.values) return 0;
  return ceil_div(products_.value_bytes(features_, value_dim_), static_cast<int64_t>(sizeof(T)));
}

template <class T>
int64_t ChunkCall<T>::total_size(TotalUse use) const {
  if (!makes_total()) return state_size_;
  int64_t size = state_size_ + total_values_size(use);
  if (!use.keys) return size;
  if (!half_) return size + value_dim_ * padded_features_;
  return size +
         ceil_div(products_.key_bytes(features_, value_dim_), static_cast<int64_t>(sizeof(T)));
}

template <class T>
StateView<T> ChunkCall<T>::total(T* state, TotalUse use) const {
  StateView<T> v = view(state);
  if (!makes_total()) return v;
  if (half_ && use.values) v.as_values = state + state_size_;
  T* keys = state + state_size_ + total_values_size(use);
  if (half_ && use.keys) v.as_keys = keys;
  if (!half_ && use.keys) v.transposed = {keys, padded_features_};
  return v;
}

template <class T>
void ChunkCall<T>::complete_total(T* state, TotalUse use, Block sums) const {
  const StateView<T> v = total(state, use);
  if (v.transposed.data != nullptr) {
    kernels::matrix_kernels<T>(path_.isa).transpose({sums.data, sums.stride}, features_, value_dim_,
                                                    v.transposed);
  }
  if (v.as_values == nullptr && v.as_keys == nullptr) return;
  Scratch scratch(static_cast<size_t>(features_ * padded_values_) * sizeof(uint16_t));
  auto* rounded = scratch.take<uint16_t>(features_ * padded_values_);
  if (v.as_values != nullptr) state_values(sums, features_, {rounded, v.as_values});
  if (v.as_keys != nullptr) state_keys(sums, features_, {rounded, v.as_keys});
}

template <class T>
void ChunkCall<T>::centre_values() {
  const Policy<T>& policy = problem_.policy;
  centred_ = half_ && policy.key_sum && decays_.empty();
  if (!centred_ || policy.value_sum) return;
  constexpr int64_t kMostRows = 128;
  const int64_t key_heads = problem_.k.size(1);
  centres_.assign(static_cast<size_t>(batch_ * key_heads * padded_values_), T{0});
  std::vector<T> odd(static_cast<size_t>(padded_values_));
  for (int64_t i = 0; i < batch_ * key_heads; ++i) {
    const int64_t tokens = existing(i / key_heads), step = ceil_div(tokens, kMostRows) * 2;
    if (tokens < 2) continue;
    T* even = centres_.data() + i * padded_values_;
    const auto sum = [&](int64_t first, T* to) {
      Rows some =
          rows(problem_.v, i / key_heads, i % key_heads, first, ceil_div(tokens - first, step));
      some.stride *= step;
      rows_.sum_rows(some, nullptr, to);
      for (int64_t c = 0; c < value_dim_; ++c) to[c] /= static_cast<T>(some.count);
    };
    sum(0, even);
    sum(step / 2, odd.data());
    // Few values that are far from the others are not what all are near to.
    for (int64_t c = 0; c < value_dim_; ++c) {
      const T both = even[c] + odd[static_cast<size_t>(c)],
              apart = even[c] - odd[static_cast<size_t>(c)];
      even[c] = std::isfinite(both) && std::abs(apart) < std::abs(both) / 2 ? both / 2 : T{0};
    }
  }
}

template <class T>
void ChunkCall<T>::centre_sums(int64_t lane, const StateView<T>& keys, Block to) const {
  const T* row = centre(lane, keys);
  const auto share = static_cast<T>(centre_share());
  for (int64_t f = 0; f < features_; ++f) {
    std::copy_n(keys.sums.row(f), padded_values_, to.row(f));
    rows_.add_scaled(-keys.keys[f] * share, row, padded_values_, to.row(f));
  }
}

template void ChunkCall<float>::centre_values();
template void ChunkCall<double>::centre_values();
template void ChunkCall<float>::centre_sums(int64_t, const StateView<float>&, Block) const;
template void ChunkCall<double>::centre_sums(int64_t, const StateView<double>&, Block) const;
template int64_t ChunkCall<float>::total_size(TotalUse use) const;
template int64_t ChunkCall<double>::total_size(TotalUse use) const;
template StateView<float> ChunkCall<float>::total(float* state, TotalUse use) const;
template StateView<double> ChunkCall<double>::total(double* state, TotalUse use) const;
template void ChunkCall<float>::complete_total(float*, TotalUse, Block) const;
template void ChunkCall<double>::complete_total(double*, TotalUse, Block) const;

}  // namespace heed::chunked
