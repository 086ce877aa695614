#include <cmath>
#include <string>

#include "engine/tiled/problem.h"
#include "heed/error.h"

namespace heed::tiled {

namespace {

constexpr int64_t kMaxHeadDim = 256;

[[noreturn]] void fail(const char* op, const std::string& found, const std::string& needed) {
  throw Error(std::string(op) + ": " + found + "; " + needed);
}

void check_operand(const char* op, const char* name, const Tensor& t, DType dtype) {
  if (!t.defined()) fail(op, std::string(name) + " is missing", "a tensor [B,H,L,D] is needed");
  if (t.rank() != 4) {
    fail(op, describe(name, t) + " has " + std::to_string(t.rank()) + " dimensions",
         "4 are needed: [batch, heads, tokens, head dim]");
  }
  if (!is_floating(t.dtype())) {
    fail(op, describe(name, t), "float64, float32, bfloat16 or float16 is needed");
  }
  if (t.dtype() != dtype) {
    fail(op, describe(name, t) + " but q is " + name_of(dtype), "give all of them one type");
  }
  if (t.size(3) > 1 && t.stride(3) != 1) {
    fail(
        op,
        std::string(name) + " has stride " + std::to_string(t.stride(3)) + " in its last dimension",
        "a unit stride is needed there (other dimensions may have any)");
  }
  if (t.size(3) > kMaxHeadDim || (t.size(3) < 1)) {
    fail(op, describe(name, t) + " has head dim " + std::to_string(t.size(3)),
         "1 to " + std::to_string(kMaxHeadDim) + " is supported");
  }
}

void check_equal(const char* op, const Tensor& a, const char* a_name, int a_axis, const Tensor& b,
                 const char* b_name, int b_axis, const char* what) {
  if (a.size(a_axis) == b.size(b_axis)) return;
  fail(op,
       std::string(b_name) + " has " + what + " " + std::to_string(b.size(b_axis)) + " but " +
           a_name + " has " + std::to_string(a.size(a_axis)) + " (" + describe(a_name, a) + ", " +
           describe(b_name, b) + ")",
       std::string("give ") + a_name + " and " + b_name + " the same " + what);
}

}  // namespace

void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, OperandNames names) {
  check_operand(op, "q", q, q.dtype());
  check_operand(op, names.k, k, q.dtype());
  check_operand(op, names.v, v, q.dtype());
  check_operand(op, "out", out, q.dtype());
  check_equal(op, q, "q", 0, k, names.k, 0, "batch size");
  check_equal(op, q, "q", 3, k, names.k, 3, "head dim");
  check_equal(op, k, names.k, 0, v, names.v, 0, "batch size");
  check_equal(op, k, names.k, 1, v, names.v, 1, "number of heads");
  check_equal(op, k, names.k, 2, v, names.v, 2, "number of keys");
  for (int axis = 0; axis < 3; ++axis) {
    constexpr const char* kNames[] = {"batch size", "number of heads", "number of queries"};
    check_equal(op, q, "q", axis, out, "out", axis, kNames[axis]);
  }
  check_equal(op, v, names.v, 3, out, "out", 3, "head dim");
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0) {
    fail(op,
         "q has " + std::to_string(heads) + " heads, " + names.k + " and " + names.v + " have " +
             std::to_string(kv_heads),
         std::string("the heads of q must be a multiple of those of ") + names.k + " and " +
             names.v);
  }
  if (!lse.defined()) return;
  if (!(lse.shape() == Dims({q.size(0), heads, q.size(2)})) ||
      lse.dtype() != statistics_type(q.dtype())) {
    fail(op, describe("lse", lse),
         to_string(Dims({q.size(0), heads, q.size(2)})) + " " +
             name_of(statistics_type(q.dtype())) + " is needed");
  }
}

void check_backward(const char* op, const Tensor& grad_out, const Tensor& grad_lse,
                    const Tensor& out, const Tensor& lse) {
  if (!lse.defined()) fail(op, "lse is missing", "the backward needs what the forward returned");
  const auto same = [&](const char* name, const Tensor& gradient, const Tensor& like) {
    if (gradient.shape() == like.shape() && gradient.dtype() == like.dtype() &&
        (gradient.rank() == 0 || gradient.shape().back() <= 1 ||
         gradient.stride(gradient.rank() - 1) == 1 || gradient.rank() == 3)) {
      return;
    }
    fail(op, describe(name, gradient),
         to_string(like.shape()) + " " + name_of(like.dtype()) +
             " with a unit stride in the last dimension is needed");
  };
  same("grad_out", grad_out, out);
  if (grad_lse.defined()) same("grad_lse", grad_lse, lse);
}

double resolve_scale(const char* op, const std::optional<double>& scale, int64_t head_dim) {
  if (!scale) return 1.0 / std::sqrt(static_cast<double>(head_dim));
  if (!std::isfinite(*scale)) {
    fail(op, "scale is " + std::to_string(*scale), "a finite number is needed");
  }
  return *scale;
}

std::vector<double> per_head(const char* op, const char* name, const Tensor& values,
                             int64_t heads) {
  if (values.rank() != 1 || values.size(0) != heads || !is_floating(values.dtype())) {
    fail(op, describe(name, values),
         "[" + std::to_string(heads) + "] of a floating type is needed, one per query head");
  }
  const Array exact = convert(values, DType::f64);
  return {exact.as<double>(), exact.as<double>() + heads};
}

std::vector<Sequence> batch_sequences(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out, const Tensor& lse,
                                      const std::vector<TilePlan>& plans) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < q.size(0); ++b) {
    Sequence s;
    s.q = q.select(0, b);
    s.k = k.select(0, b);
    s.v = v.select(0, b);
    s.out = out.select(0, b);
    if (lse.defined()) s.lse = lse.select(0, b);
    s.plan = plans[static_cast<size_t>(b)];
    s.batch = b;
    sequences.push_back(std::move(s));
  }
  return sequences;
}

std::vector<SequenceGradient> batch_gradients(const Tensor& out, const Tensor& lse, const Tensor& q,
                                              const Tensor& k, const Tensor& v) {
  std::vector<SequenceGradient> gradients;
  for (int64_t b = 0; b < q.size(0); ++b) {
    gradients.push_back({out.select(0, b), lse.defined() ? lse.select(0, b) : Tensor(),
                         q.select(0, b), k.select(0, b), v.select(0, b), Tensor()});
  }
  return gradients;
}

}  // namespace heed::tiled
