#include <cmath>
#include <string>
#include <vector>

#include "engine/chunked/problem.h"
#include "heed/recurrent_softmax_attention.h"
#include "heed/taylor_state_attention.h"
#include "kernels/monomials.h"
#include "mechanisms/results.h"
#include "mechanisms/taylor_state/path.h"

namespace heed {

namespace {

constexpr const char* kOp = "taylor_state_attention";
constexpr const char* kBackward = "taylor_state_attention_backward";
constexpr double kSmallestDenominator = 1e-12;

Dims s_shape(const Tensor& q, const Tensor& v, const TaylorOptions& options) {
  return chunked::sums_shape(q, v, taylor_state_size(q.size(3), options.order));
}
Dims z_shape(const Tensor& q, const TaylorOptions& options) {
  return chunked::key_sums_shape(q, taylor_state_size(q.size(3), options.order));
}

void check_state(const char* op, const std::string& of, const TaylorState& state, const Tensor& q,
                 const Tensor& v, const TaylorOptions& options) {
  chunked::check_sums(op, of, state.s, state.z, q, v, taylor_state_size(q.size(3), options.order));
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const TaylorOptions& options) {
  check_attention(kOp, q, k, v, {}, kAnyHeadDim);
  check_head_dim(kOp, "q", q);
  (void)taylor_state_size(q.size(3), options.order);  // checks the order
  if (options.scale && !std::isfinite(*options.scale)) {
    fail(kOp, "scale is " + std::to_string(*options.scale), "a finite number is needed");
  }
  const TaylorState& state = options.initial_state;
  check_state(kOp, "initial_state", state, q, v, options);
  if (state.s.defined() != state.z.defined()) {
    fail(kOp, std::string("initial_state has ") + (state.s.defined() ? "s" : "z") + " alone",
         "both s and z are needed");
  }
  chunked::check_alignment(kOp, true, state.s.defined(), q.size(2), k.size(2));
}

/// Monomials of a row as its features, with coefficients on the side of the queries.
template <class T>
class MonomialMap : public chunked::RowMap<T> {
 public:
  MonomialMap(const kernels::MonomialList& list, std::vector<double> coefficients, Isa isa)
      : list_(list),
        coefficients_(coefficients.begin(), coefficients.end()),
        kernels_(kernels::monomial_kernels<T>(isa)) {
    if (!coefficients_.empty()) coefficients_.resize(coefficients_.size() + 16);  // whole vectors
  }
  void map(const chunked::RowsAt&, const kernels::Rows& x, int64_t first, int64_t count,
           kernels::Block<T> to) const override {
    kernels_.map(list_, x, coefficients(), first, count, to);
  }
  void pull(const chunked::RowsAt&, const kernels::Rows& x, int64_t first, int64_t count,
            kernels::Block<const T> gradient, const kernels::RowEnds<T>&, bool,
            const kernels::RowsOut& into) const override {
    kernels_.pull(list_, x, coefficients(), first, count, gradient,
                  {static_cast<T*>(into.data), into.stride});
  }

 private:
  const T* coefficients() const { return coefficients_.empty() ? nullptr : coefficients_.data(); }
  const kernels::MonomialList& list_;
  std::vector<T> coefficients_;
  const kernels::MonomialKernels<T>& kernels_;
};

chunked::ReadOut divide(int64_t, int64_t, double denominator) {
  chunked::ReadOut row;
  if (std::abs(denominator) < kSmallestDenominator) {
    row.num_scale = 1 / std::copysign(kSmallestDenominator, denominator);
    return row;
  }
  row.num_scale = 1 / denominator;
  row.num_slope = -row.num_scale * row.num_scale;
  return row;
}

/// A checked call with what its policy points to.
template <class T>
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const TaylorOptions& options,
       const RunOptions& run)
      : scale(options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))))),
        list(q.size(3), static_cast<int>(options.order), chunked::kFeatureTile),
        query_map(list, list.coefficients(scale), chosen_isa(run)),
        key_map(list, {}, chosen_isa(run)) {
    problem.q = q;
    problem.k = k;
    problem.v = v;
    problem.initial = {.sums = options.initial_state.s, .keys = options.initial_state.z};
    problem.policy.maps = {&query_map, &key_map};
    problem.policy.features = list.size();
    problem.policy.key_sum = true;
    problem.policy.read_out = chunked::each_row<T>(divide);
    problem.policy.polynomial = {static_cast<int>(options.order), scale};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  double scale;
  kernels::MonomialList list;
  MonomialMap<T> query_map, key_map;
  chunked::Problem<T> problem;
};

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const TaylorState& state, const TaylorOptions& options, const RunOptions& run) {
  const Call<T> call(q, k, v, options, run);
  chunked::forward(call.problem, out, {.sums = state.s, .keys = state.z}, run);
}

template <class T>
void run_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
                  const TaylorState& state_gradient, const TaylorGradientViews& into,
                  const TaylorOptions& options, const RunOptions& run) {
  const Call<T> call(q, k, v, options, run);
  chunked::backward(call.problem, out_gradient,
                    {.sums = state_gradient.s, .keys = state_gradient.z},
                    {into.q, into.k, into.v, {.sums = into.s, .keys = into.z}, nullptr}, run);
}

RecurrentSoftmaxOptions over_pairs(const TaylorOptions& options) {
  return {.order = options.order, .scale = options.scale};
}

template <class T>
void run_forward_by_pairs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                          const TaylorState& state, const TaylorOptions& options,
                          const RunOptions& run) {
  recurrent_softmax_attention(q, k, v, out, {}, {}, over_pairs(options), run);
  if (!state.s.defined() && !state.z.defined()) return;
  run_forward<T>(q.slice(2, 0, 0), k, v, out.slice(2, 0, 0), state, options, run);
}

void run_backward_by_pairs(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& out_gradient, const TaylorGradientViews& into,
                           const TaylorOptions& options, const RunOptions& run) {
  const RecurrentSoftmaxOptions pairs = over_pairs(options);
  const DType type = wide_type(q.dtype());
  const Array out(q.dtype(), out_gradient.shape()), core(type, out_gradient.shape());
  const Array sums(type, {q.size(0), q.size(1), q.size(2)});
  recurrent_softmax_attention(q, k, v, out, core, sums, pairs, run);
  const RecurrentSoftmaxGradients gradients =
      recurrent_softmax_attention_backward(out_gradient, q, k, v, core, sums, pairs, run);
  const auto give = [](const Array& from, const Tensor& to) {
    if (to.defined()) copy(from, to);
  };
  give(gradients.q, into.q);
  give(gradients.k, into.k);
  give(gradients.v, into.v);
}

}  // namespace

int64_t taylor_state_size(int64_t head_dim, int64_t order) {
  if (order < 0 || order > 3) {
    fail(kOp, "order is " + std::to_string(order), "0 to 3 is needed");
  }
  int64_t size = 1;
  for (int64_t i = 1; i <= order; ++i) size = size * (head_dim + i) / i;
  return size;
}

// In short sequences products of all pairs are fewer than those with states. Even orders alone: their
// weights are positive, so no rounding of a weight grows in a quotient.
bool taylor_by_pairs(const Tensor& q, const Tensor& k, const Tensor& v,
                     const TaylorOptions& options) {
  constexpr int64_t kMostWidth = 256;  // of the tiled engine
  const int64_t queries = q.size(2), keys = k.size(2), dim = q.size(3), width = v.size(3);
  if (options.initial_state.s.defined() || options.order % 2 != 0 || queries > keys) return false;
  if (dim > kMostWidth || width > kMostWidth) return false;
  const double seen = static_cast<double>(queries) * (static_cast<double>(2 * keys - queries) / 2);
  const double pairs = seen * static_cast<double>(dim + width);
  constexpr int64_t kMonomial = 12;  // columns that making a monomial costs as much as, measured
  const double state =
      static_cast<double>(taylor_state_size(dim, options.order) * (width + kMonomial));
  return pairs < state * static_cast<double>(queries + keys);
}

void taylor_state_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const TaylorState& state, const TaylorOptions& options,
                            const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_out(kOp, out, q, v);
  check_state(kOp, "state", state, q, v, options);
  const bool pairs = taylor_by_pairs(q, k, v, options);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    const auto way = pairs ? run_forward_by_pairs<T> : run_forward<T>;
    way(q, k, v, out, state, options, run);
  });
}

TaylorResult taylor_state_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const TaylorOptions& options, const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  TaylorResult result{Array(q.dtype(), out_shape(q, v)), Array(type, s_shape(q, v, options)),
                      Array(type, z_shape(q, options))};
  taylor_state_attention(q, k, v, result.out, {result.s, result.z}, options, run);
  return result;
}

void taylor_state_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& out_gradient, const TaylorState& state_gradient,
                                     const TaylorGradientViews& gradients,
                                     const TaylorOptions& options, const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_gradients(kBackward, q, k, v, out_gradient,
                           {gradients.q, gradients.k, gradients.v});
  check_state(kBackward, "state_gradient", state_gradient, q, v, options);
  check_state(kBackward, "gradient of initial_state", {gradients.s, gradients.z}, q, v, options);
  const bool state_used = state_gradient.s.defined() || state_gradient.z.defined();
  if (!state_used && taylor_by_pairs(q, k, v, options)) {
    return run_backward_by_pairs(q, k, v, out_gradient, gradients, options, run);
  }
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_backward<T>(q, k, v, out_gradient, state_gradient, gradients, options, run);
  });
}

TaylorGradients taylor_state_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out_gradient,
                                                const TaylorState& state_gradient,
                                                const TaylorOptions& options,
                                                const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  TaylorGradients result{empty_like(q), empty_like(k), empty_like(v), {}, {}};
  if (options.initial_state.s.defined()) {
    result.s = Array(type, s_shape(q, v, options));
    result.z = Array(type, z_shape(q, options));
  }
  taylor_state_attention_backward(q, k, v, out_gradient, state_gradient,
                                  {result.q, result.k, result.v, result.s, result.z}, options, run);
  return result;
}

}  // namespace heed
