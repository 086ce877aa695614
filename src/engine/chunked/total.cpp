// States that all rows of a call see, in the forms that products read them in.
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

template int64_t ChunkCall<float>::total_size(TotalUse use) const;
template int64_t ChunkCall<double>::total_size(TotalUse use) const;
template StateView<float> ChunkCall<float>::total(float* state, TotalUse use) const;
template StateView<double> ChunkCall<double>::total(double* state, TotalUse use) const;
template void ChunkCall<float>::complete_total(float*, TotalUse, Block) const;
template void ChunkCall<double>::complete_total(double*, TotalUse, Block) const;

}  // namespace heed::chunked
