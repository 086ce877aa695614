// Which keys a query sees: the masks that all softmax-like mechanisms share.
#pragma once
#include <cstdint>
#include <optional>

#include "heed/tensor.h"

namespace heed {

/// Keys to the left and right of a query that it still sees; none = open on that side.
struct Window {
  std::optional<int64_t> left = {};
  std::optional<int64_t> right = {};
};

/// With the offset o = Lk - Lq (alignment to the end of the keys; 0 from_start) query i sees key j when
///   j <= i + o                                  if causal
///   i + o - left <= j <= i + o + right          if windowed
///   j < lengths[b]                              if lengths is given
/// Lengths only take keys away: o, and with it distances of ALiBi, do not depend on them. A batch that is
/// decoded over caches of several lengths is for decode_attention, whose o is lengths[b] - Lq.
struct Masks {
  bool causal = false;
  Window window = {};
  Tensor lengths = {};  // [B] int32 or int64, 0..Lk; keys at and after lengths[b] do not exist
  bool from_start = false;
};

}  // namespace heed
