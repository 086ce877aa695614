// What operands of attention must be, and their values. Each check throws Error that names the operation,
// the argument, what was found and what is needed.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/round_up.h"
#include "heed/error.h"
#include "heed/tensor.h"

namespace heed {

/// The type of scores, statistics, states and parameters beside tensors of `dtype`.
inline DType wide_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// Returns body(T{}) with the T whose dtype_of is wide_type(dtype).
template <class Body>
auto with_wide_type(DType dtype, const Body& body) {
  return dtype == DType::f64 ? body(double{}) : body(float{});
}

[[noreturn]] void fail(const char* op, const std::string& found, const std::string& needed);

/// `rank` dimensions of a floating type, a unit stride in the last one; `axes` say in messages what is
/// needed, `axes_in_words` where another number of them was found.
void check_operand(const char* op, const char* name, const Tensor& t, int rank,
                   std::string_view axes, std::string_view axes_in_words);
/// [B,H,L,D] of a floating type with a unit stride in the last dimension.
void check_rows(const char* op, const char* name, const Tensor& t);
inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kAnyHeadDim = std::numeric_limits<int64_t>::max();
/// 1 to `most` in the last dimension.
void check_head_dim(const char* op, const char* name, const Tensor& t, int64_t most = kMaxHeadDim);
/// check_rows and check_head_dim.
void check_head_rows(const char* op, const char* name, const Tensor& t, int64_t most = kMaxHeadDim);
/// The type of another operand.
void check_same_type(const char* op, const char* name, const Tensor& t, const char* like,
                     DType dtype);
/// The shape and type asked for, if it is given at all.
void check_result(const char* op, const char* name, const Tensor& given, const Dims& shape,
                  DType dtype);
/// That no two elements of a result lie in one place.
void check_apart(const char* op, const char* name, const Tensor& result);
/// check_rows and check_result.
void check_rows_like(const char* op, const char* name, const Tensor& t, const Dims& shape,
                     DType dtype);
/// The gradient of a parameter: its shape and type, unit stride in the last dimension.
void check_parameter_gradient(const char* op, const char* name, const Tensor& gradient,
                              const Tensor& parameter);

/// Sizes of q [B,H,Lq,D], k [B,Hkv,Lk,D], v [B,Hkv,Lk,Dv].
struct AttentionSizes {
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, dim = 0, value_dim = 0;
  int64_t group() const { return kv_heads == 0 ? 1 : heads / kv_heads; }
  Dims out_shape() const { return {batch, heads, queries, value_dim}; }
};
/// What a caller calls the keys and values.
struct OperandNames {
  const char* k = "k";
  const char* v = "v";
};
/// Checks q, k and v for themselves and against each other.
AttentionSizes check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               OperandNames names = {}, int64_t most_dim = kMaxHeadDim);
/// That a sequence has no more queries than decoding takes at once, 16.
void check_decode_queries(const char* op, const Tensor& q);
/// That a and b have one size along an axis of each, the `what` of both.
void check_equal(const char* op, const char* a_name, const Tensor& a, int a_axis,
                 const char* b_name, const Tensor& b, int b_axis, std::string_view what);
/// That the heads of `t` divide those of q.
void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& q);

/// How many of `tokens` keys exist in each sequence, from lengths [B].
std::vector<int64_t> read_lengths(const char* op, const Tensor& lengths, int64_t batch,
                                  int64_t tokens);

/// Row-major values in the type of the computation.
template <class T>
std::vector<T> contiguous_values(const Tensor& t) {
  const Array wide = convert(t, dtype_of<T>);
  return {wide.as<T>(), wide.as<T>() + wide.count()};
}

/// Values of T rounded into a tensor of any strides and floating type.
template <class T>
void copy_values(const T* values, const Tensor& to) {
  copy(Tensor(values, dtype_of<T>, to.shape()), to);
}

}  // namespace heed
