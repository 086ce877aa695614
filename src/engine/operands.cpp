#include "engine/operands.h"

namespace heed {

void fail(const char* op, const std::string& found, const std::string& needed) {
  throw Error(std::string(op) + ": " + found + "; " + needed);
}

void check_equal(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                 const Tensor& b, int axis, const char* what) {
  if (a.size(axis) == b.size(axis)) return;
  fail(op,
       std::string(b_name) + " has " + what + " " + std::to_string(b.size(axis)) + " but " +
           a_name + " has " + std::to_string(a.size(axis)) + " (" + describe(a_name, a) + ", " +
           describe(b_name, b) + ")",
       std::string("give ") + a_name + " and " + b_name + " the same " + what);
}

void check_rows(const char* op, const char* name, const Tensor& t) {
  if (!t.defined()) fail(op, std::string(name) + " is missing", "a tensor [B,H,L,D] is needed");
  if (t.rank() != 4) {
    fail(op, describe(name, t) + " has " + std::to_string(t.rank()) + " dimensions",
         "4 are needed: [batch, heads, tokens, head dim]");
  }
  if (!is_floating(t.dtype())) {
    fail(op, describe(name, t), "float64, float32, bfloat16 or float16 is needed");
  }
  if (t.size(3) > 1 && t.stride(3) != 1) {
    fail(
        op,
        std::string(name) + " has stride " + std::to_string(t.stride(3)) + " in its last dimension",
        "a unit stride is needed there (other dimensions may have any)");
  }
}

void check_head_rows(const char* op, const char* name, const Tensor& t, int64_t most) {
  check_rows(op, name, t);
  if (t.size(3) >= 1 && t.size(3) <= most) return;
  fail(op, describe(name, t) + " has head dim " + std::to_string(t.size(3)),
       most == kAnyHeadDim ? "at least 1 is needed"
                           : "1 to " + std::to_string(most) + " is supported");
}

void check_rows_like(const char* op, const char* name, const Tensor& t, const Dims& shape,
                     DType dtype) {
  check_rows(op, name, t);
  if (!(t.shape() == shape) || t.dtype() != dtype) {
    fail(op, describe(name, t), to_string(shape) + " " + name_of(dtype) + " is needed");
  }
}

void check_parameter_gradient(const char* op, const char* name, const Tensor& gradient,
                              const Tensor& parameter) {
  if (!parameter.defined()) fail(op, describe(name, gradient), "there is nothing it belongs to");
  const int last = gradient.rank() - 1;
  if (!(gradient.shape() == parameter.shape()) || gradient.dtype() != parameter.dtype() ||
      (gradient.size(last) > 1 && gradient.stride(last) != 1)) {
    fail(op, describe(name, gradient),
         to_string(parameter.shape()) + " " + name_of(parameter.dtype()) +
             " with a unit stride in the last dimension is needed");
  }
}

void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  const int64_t heads = q.size(1), kv_heads = t.size(1);
  if (kv_heads == 0 ? heads == 0 : heads % kv_heads == 0) return;
  fail(op,
       "q has " + std::to_string(heads) + " heads, " + name + " has " + std::to_string(kv_heads),
       std::string("the heads of q must be a multiple of those of ") + name);
}

AttentionSizes check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               OperandNames names, int64_t most_dim) {
  check_head_rows(op, "q", q, most_dim);
  for (const auto& [name, t] : {std::pair{names.k, &k}, std::pair{names.v, &v}}) {
    check_head_rows(op, name, *t, most_dim);
    if (t->dtype() == q.dtype()) continue;
    fail(op, describe(name, *t) + " but q is " + name_of(q.dtype()), "give all of them one type");
  }
  check_equal(op, "q", q, names.k, k, 0, "batch size");
  check_equal(op, "q", q, names.k, k, 3, "head dim");
  check_equal(op, names.k, k, names.v, v, 0, "batch size");
  check_equal(op, names.k, k, names.v, v, 1, "number of heads");
  check_equal(op, names.k, k, names.v, v, 2, "number of keys");
  check_heads(op, names.k, k, q);
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
}

}  // namespace heed
