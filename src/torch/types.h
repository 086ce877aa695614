// Types of elements, heed's and PyTorch's.
#pragma once
#include <c10/core/ScalarType.h>

#include <optional>
#include <utility>

#include "heed/tensor.h"

namespace heed {

inline constexpr std::pair<DType, at::ScalarType> kTorchTypes[] = {
    {DType::f64, at::kDouble},  {DType::f32, at::kFloat}, {DType::bf16, at::kBFloat16},
    {DType::f16, at::kHalf},    {DType::i64, at::kLong},  {DType::i32, at::kInt},
    {DType::boolean, at::kBool}};

inline at::ScalarType torch_type(DType dtype) {
  for (const auto& [type, torch] : kTorchTypes) {
    if (type == dtype) return torch;
  }
  return at::ScalarType::Undefined;
}

inline std::optional<DType> heed_type(at::ScalarType torch_type) {
  for (const auto& [type, torch] : kTorchTypes) {
    if (torch == torch_type) return type;
  }
  return std::nullopt;
}

}  // namespace heed
