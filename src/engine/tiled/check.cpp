#include <cmath>
#include <string>

#include "engine/tiled/problem.h"
#include "heed/error.h"

namespace heed::tiled {

void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, int64_t most_dim, OperandNames names) {
  const AttentionSizes sizes = check_attention(op, q, k, v, names, most_dim);
  check_rows_like(op, "out", out, sizes.out_shape(), q.dtype());
  check_result(op, "lse", lse, {sizes.batch, sizes.heads, sizes.queries}, wide_type(q.dtype()));
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

void set_alibi_slopes(Policy& policy, const char* op, const Tensor& slopes, int64_t batch,
                      int64_t heads) {
  if (!slopes.defined()) return;
  const bool shared = slopes.shape() == Dims{heads}, each = slopes.shape() == Dims{batch, heads};
  if (!(shared || each) || !is_floating(slopes.dtype())) {
    fail(
        op, describe("alibi_slopes", slopes),
        to_string(Dims{heads}) + " or " + to_string(Dims{batch, heads}) +
            " of a floating type is needed, one per query head or one per sequence and query head");
  }
  const Array exact = convert(slopes, DType::f64);
  policy.alibi_slope = {exact.as<double>(), exact.as<double>() + exact.count()};
  policy.slopes_apart = each ? heads : 0;
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
