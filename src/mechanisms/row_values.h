// One row of a tensor in the type of a computation, and back.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "heed/tensor.h"

namespace heed {

/// The last axis at the leading indices, which has a unit stride; T is float, or double for float64.
template <class T>
void load_row(const Tensor& from, std::initializer_list<int64_t> index, T* to) {
  const std::byte* row = from.at(index);
  const auto each = [&](const auto* typed, const auto& value) {
    for (int64_t i = 0; i < from.shape().back(); ++i) to[i] = static_cast<T>(value(typed[i]));
  };
  switch (from.dtype()) {
    case DType::bf16:
      return each(reinterpret_cast<const bfloat16*>(row), [](bfloat16 x) { return to_float(x); });
    case DType::f16:
      return each(reinterpret_cast<const float16*>(row), [](float16 x) { return to_float(x); });
    case DType::f64:
      return each(reinterpret_cast<const double*>(row), [](double x) { return x; });
    default:
      return each(reinterpret_cast<const float*>(row), [](float x) { return x; });
  }
}

/// to = factor * from, rounded.
template <class T>
void store_row(const T* from, T factor, const Tensor& to, std::initializer_list<int64_t> index) {
  std::byte* row = to.at(index);
  const auto each = [&](auto* typed, const auto& rounded) {
    for (int64_t i = 0; i < to.shape().back(); ++i) typed[i] = rounded(factor * from[i]);
  };
  switch (to.dtype()) {
    case DType::bf16:
      return each(reinterpret_cast<bfloat16*>(row),
                  [](T x) { return to_bfloat16(static_cast<float>(x)); });
    case DType::f16:
      return each(reinterpret_cast<float16*>(row),
                  [](T x) { return to_float16(static_cast<float>(x)); });
    case DType::f64:
      return each(reinterpret_cast<double*>(row), [](T x) { return static_cast<double>(x); });
    default:
      return each(reinterpret_cast<float*>(row), [](T x) { return static_cast<float>(x); });
  }
}

}  // namespace heed
