// What layers whose attention runs over a state know of the tokens so far.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "heed/tensor.h"
#include "mechanisms/registry.h"

namespace heed {

/// One set of arrays for each layer with ModelAttention::over_state, zero before the first token. A state
/// cannot forget its last tokens, so one earlier copy is kept to come back to.
class LayerStates {
 public:
  explicit LayerStates(const std::vector<ModelAttention>& layers);

  /// The arrays of a layer, none where it has no state.
  std::span<const Tensor> of(int64_t layer) const { return views_[static_cast<size_t>(layer)]; }
  size_t bytes() const;

  /// Copies the states, which are those after `length` tokens.
  void mark(int64_t length);
  /// From `length` tokens back to at most `wanted` of them: to the mark, else to none; without states to
  /// `wanted`. Returns where it is. The mark is dropped where its tokens are among those forgotten.
  int64_t go_back(int64_t length, int64_t wanted);

 private:
  std::vector<Array> arrays_, marked_;
  std::vector<std::vector<Tensor>> views_;
  std::optional<int64_t> marked_length_;
};

}  // namespace heed
