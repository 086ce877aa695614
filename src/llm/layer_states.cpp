#include "llm/layer_states.h"

#include <cstring>

namespace heed {

namespace {

size_t bytes_of(const Array& array) {
  return static_cast<size_t>(array.count()) * size_of(array.dtype());
}

}  // namespace

LayerStates::LayerStates(const std::vector<ModelAttention>& layers) {
  for (const ModelAttention& layer : layers) {
    std::vector<Tensor>& views = views_.emplace_back();
    for (const Dims& shape : layer.state_shapes) {
      views.push_back(arrays_.emplace_back(Array::zeros(DType::f32, shape)));
    }
  }
}

size_t LayerStates::bytes() const {
  size_t sum = 0;
  for (const Array& array : arrays_) sum += bytes_of(array);
  return sum;
}

void LayerStates::mark(int64_t length) {
  if (arrays_.empty()) return;
  if (marked_.empty()) {
    for (const Array& array : arrays_) marked_.emplace_back(array.dtype(), array.shape());
  }
  for (size_t i = 0; i < arrays_.size(); ++i) {
    std::memcpy(marked_[i].as<void>(), arrays_[i].as<void>(), bytes_of(arrays_[i]));
  }
  marked_length_ = length;
}

int64_t LayerStates::go_back(int64_t length, int64_t wanted) {
  if (arrays_.empty() || wanted == length) return wanted;
  const bool to_mark = marked_length_ && *marked_length_ <= wanted;
  if (!to_mark) marked_length_.reset();
  for (size_t i = 0; i < arrays_.size(); ++i) {
    if (to_mark) {
      std::memcpy(arrays_[i].as<void>(), marked_[i].as<void>(), bytes_of(arrays_[i]));
    } else {
      std::memset(arrays_[i].as<void>(), 0, bytes_of(arrays_[i]));
    }
  }
  return to_mark ? *marked_length_ : 0;
}

}  // namespace heed
