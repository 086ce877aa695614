// Inputs beside q, k, v: parameters and gates, which may be float32 beside 16-bit inputs.
#pragma once
#include <string>

#include "engine/operands.h"
#include "heed/tensor.h"

namespace heed {

/// The types that such an input may have beside inputs of `dtype`.
inline std::string parameter_types(DType dtype) {
  std::string types = name_of(dtype);
  if (dtype != wide_type(dtype)) types += std::string(" or ") + name_of(wide_type(dtype));
  return types;
}

/// Throws Error unless `t` has the shape and the type `dtype` or wide_type(dtype).
inline void check_parameter(const char* op, const char* name, const Tensor& t, const Dims& shape,
                            DType dtype) {
  const bool typed = t.dtype() == dtype || t.dtype() == wide_type(dtype);
  if (t.defined() && t.shape() == shape && typed) return;
  fail(op, describe(name, t),
       to_string(shape) + " of type " + parameter_types(dtype) + " is needed");
}

/// The tensor itself if its last axis has a unit stride, else a copy that `storage` holds.
inline Tensor with_unit_stride(const Tensor& t, Array& storage) {
  if (t.rank() == 0 || t.shape().back() <= 1 || t.strides().back() == 1) return t;
  storage = convert(t, t.dtype());
  return storage;
}

}  // namespace heed
