// Results of calls with q [B,H,Lq,D], v [B,Hkv,Lk,Dv], and gradients: shapes, arrays, checks.
#pragma once
#include <vector>

#include "engine/operands.h"
#include "heed/tensor.h"

namespace heed {

/// [B,H,Lq,Dv]
inline Dims out_shape(const Tensor& q, const Tensor& v) {
  return {q.size(0), q.size(1), q.size(2), v.size(3)};
}

/// What the checks of a call have not seen yet; where it does not fit, they explain it.
inline bool look_like_rows(const Tensor& q, const Tensor& v) {
  return q.rank() == 4 && v.rank() == 4;
}

/// An array for the result of a call that is not checked yet.
inline Array empty_result(const Tensor& q, const Tensor& v, DType type) {
  return look_like_rows(q, v) ? Array(type, out_shape(q, v)) : Array();
}
inline Array empty_result(const Tensor& q, const Tensor& v) {
  return empty_result(q, v, q.dtype());
}

/// The same for a number of each row, [B,H,Lq].
inline Array empty_statistic(const Tensor& q) {
  return q.rank() == 4 ? Array(wide_type(q.dtype()), {q.size(0), q.size(1), q.size(2)}) : Array();
}

/// An array for the gradient of an input that may be undefined.
inline Array empty_like(const Tensor& t) {
  return t.defined() ? Array(t.dtype(), t.shape()) : Array();
}

/// That grad_out looks like the result of a call that is not checked yet.
inline void check_grad_out(const char* op, const Tensor& grad_out, const Tensor& q,
                           const Tensor& v) {
  if (look_like_rows(q, v)) check_rows_like(op, "grad_out", grad_out, out_shape(q, v), q.dtype());
}

/// Gradients of numbers per head in the shape and type of `like`; empty where that is undefined.
inline Array head_gradient(const std::vector<double>& sums, const Tensor& like) {
  if (!like.defined()) return {};
  return convert(Tensor(sums.data(), DType::f64, like.shape()), like.dtype());
}

}  // namespace heed
