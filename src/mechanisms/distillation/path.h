// Which products the distillation loss takes.
#pragma once
#include <cstdint>
#include <string>

#include "heed/tensor.h"

namespace heed {

/// Why bfloat16 products are not for features of this type beside bfloat16 queries; empty if they are.
/// Gradients of a row's products with features cancel: sum R dloss/dR = 0. Those of many keys round little
/// beside what is left.
inline std::string no_half_operands(DType features, int64_t keys) {
  constexpr int64_t kManyKeys = 64;
  if (features != DType::bf16)
    return std::string("it would round features of ") + name_of(features);
  if (keys < kManyKeys) return std::to_string(keys) + " keys: gradients of few cancel";
  return "";
}

}  // namespace heed
