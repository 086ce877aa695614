#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "heed/error.h"
#include "heed/magnitude_aware_linear_attention.h"
#include "mechanisms/magnitude_aware/features.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

using Options = MagnitudeAwareOptions;
using State = MagnitudeAwareState;

constexpr const char* kOp = "magnitude_aware_linear_attention";
constexpr const char* kBackward = "magnitude_aware_linear_attention_backward";

Dims s_shape(const Tensor& q, const Tensor& v) { return chunked::sums_shape(q, v, q.size(3)); }
Dims k_sum_shape(const Tensor& q) { return chunked::key_sums_shape(q, q.size(3)); }
Dims v_sum_shape(const Tensor& q, const Tensor& v) { return {q.size(0), q.size(1), v.size(3)}; }

bool any_of(const State& state) {
  return state.s.defined() || state.k_sum.defined() || state.v_sum.defined() ||
         state.count.defined();
}

void check_sums(const char* op, const std::string& of, const State& state, const Tensor& q,
                const Tensor& v) {
  const DType type = wide_type(q.dtype());
  check_result(op, (of + " s").c_str(), state.s, s_shape(q, v), type);
  check_result(op, (of + " k_sum").c_str(), state.k_sum, k_sum_shape(q), type);
  check_result(op, (of + " v_sum").c_str(), state.v_sum, v_sum_shape(q, v), type);
}

/// Tokens before this call, per batch entry.
std::vector<int64_t> counts(const Tensor& count, int64_t batch) {
  if (!count.defined()) return std::vector<int64_t>(static_cast<size_t>(batch), 0);
  if (count.rank() != 1 || count.size(0) != batch || count.dtype() == DType::boolean) {
    fail(kOp, describe("initial_state count", count),
         "[B] = [" + std::to_string(batch) + "] of numbers is needed");
  }
  std::vector<int64_t> values;
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor one = count.slice(0, b, b + 1);
    double number = 0;
    if (is_floating(count.dtype())) {
      number = *convert(one, DType::f64).as<double>();
    } else {
      number = count.dtype() == DType::i32 ? static_cast<double>(*one.as<int32_t>())
                                           : static_cast<double>(*one.as<int64_t>());
    }
    if (!(number >= 0 && number <= 0x1p53) || number != std::floor(number)) {
      fail(kOp, "initial_state count[" + std::to_string(b) + "] is " + std::to_string(number),
           "a whole number that is not negative is needed");
    }
    values.push_back(static_cast<int64_t>(number));
  }
  return values;
}

void check_rope(const Tensor& q, const Tensor& k, const Options& options) {
  const Grid& grid = *options.rope;
  if (grid.height < 1 || grid.width < 1 || grid.height > (int64_t{1} << 31) / grid.width) {
    fail(kOp, "rope is (" + std::to_string(grid.height) + ", " + std::to_string(grid.width) + ")",
         "the height and width of a grid of at most 2^31 tokens are needed");
  }
  if (q.size(3) % 4 != 0) {
    fail(kOp, "rope with head dim " + std::to_string(q.size(3)),
         "a multiple of 4 is needed: pairs of channels for rows and for columns");
  }
  const int64_t tokens = grid.height * grid.width;
  if (!options.causal && (q.size(2) != tokens || k.size(2) != tokens)) {
    fail(kOp,
         "rope is (" + std::to_string(grid.height) + ", " + std::to_string(grid.width) +
             ") but q has " + std::to_string(q.size(2)) + " tokens and k " +
             std::to_string(k.size(2)),
         "without causal both need height * width tokens");
  }
}

void check_numbers(const Options& options) {
  if (options.scale && options.form == MagnitudeAwareForm::paper) {
    fail(kOp, "scale is given with form paper", "the paper's form has none; leave it out");
  }
  if (options.scale && !std::isfinite(*options.scale)) {
    fail(kOp, "scale is " + std::to_string(*options.scale), "a finite number is needed");
  }
  if (!std::isfinite(options.eps) || options.eps < 0) {
    fail(kOp, "eps is " + std::to_string(options.eps),
         "a finite number that is not negative is needed");
  }
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  check_attention(kOp, q, k, v, {}, kAnyHeadDim);
  check_head_dim(kOp, "q", q);
  check_numbers(options);
  if (options.rope) check_rope(q, k, options);
  const State& state = options.initial_state;
  check_sums(kOp, "initial_state", state, q, v);
  check_sums(kOp, "forward_state", options.forward_state, q, v);
  const bool given = any_of(state);
  if (given && !options.causal)
    fail(kOp, "an initial state without causal", "only causal calls have one");
  if (given && !(state.s.defined() && state.k_sum.defined() && state.v_sum.defined() &&
                 state.count.defined())) {
    fail(kOp, "initial_state is not complete", "s, k_sum, v_sum and count are needed");
  }
  chunked::check_alignment(kOp, options.causal, given, q.size(2), k.size(2));
}

// Counts become numbers of the state's type, which float32 holds exactly up to 2^24.
void check_last_counts(const std::vector<int64_t>& before, int64_t keys, bool in_float) {
  constexpr int64_t kMost = int64_t{1} << 24;
  for (const int64_t count : before) {
    if (!in_float || count + keys <= kMost) continue;
    fail(kOp, "the state's count would be " + std::to_string(count + keys),
         "at most " + std::to_string(kMost) + " tokens fit into a float32 state");
  }
}

// How a row ends, over n keys: see the formulas of the header.
chunked::ReadOut code_row(double scale, double eps, double n, double denominator) {
  const double per_key = 1 / n, share = scale * per_key, z = share * denominator;
  const double inverse = 1 / (z + eps);
  chunked::ReadOut row;
  row.num_scale = (1 + inverse) * share;
  row.num_slope = -share * inverse * share * inverse;
  row.sum_scale = z * per_key;
  row.sum_slope = share * per_key;
  return row;
}
chunked::ReadOut paper_row(double eps, double n, double denominator) {
  chunked::ReadOut row;
  row.num_scale = 1 + 1 / (denominator + eps);
  row.num_slope = -1 / ((denominator + eps) * (denominator + eps));
  row.sum_scale = denominator / n;
  row.sum_slope = 1 / n;
  return row;
}

/// A checked call with what its policy points to.
template <class T>
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
       const RunOptions& run)
      : before(counts(options.initial_state.count, q.size(0))),
        plain(FeatureKind::elu1, chosen_isa(run)) {
    problem.q = q;
    problem.k = k;
    problem.v = v;
    problem.causal = options.causal;
    const State& state = options.initial_state;
    problem.initial = {state.s, state.k_sum, state.v_sum};
    problem.total = {options.forward_state.s, options.forward_state.k_sum,
                     options.forward_state.v_sum};
    chunked::Policy<T>& policy = problem.policy;
    policy.maps = {&plain, &plain};
    if (q.dtype() == DType::bf16 && !options.causal && !options.rope) {
      const Isa isa = chosen_isa(run);
      rounded_queries = std::make_unique<ElementMap<T>>(FeatureKind::elu1, isa, true);
      centred_keys = std::make_unique<CentredElementMap<T>>(FeatureKind::elu1, isa, k);
      policy.maps = {rounded_queries.get(), centred_keys.get()};
    }
    if (options.rope) {
      if (options.form != MagnitudeAwareForm::consistent) policy.sums = policy.maps;
      angles = std::make_unique<GridAngles<T>>(*options.rope, q.size(3), before, k.size(2));
      std::vector<int64_t> queries = before;
      if (options.causal) {
        for (int64_t& first : queries) first += k.size(2) - q.size(2);
      }
      turned_queries = std::make_unique<TurnedElu<T>>(chosen_isa(run), *angles, queries);
      turned_keys = std::make_unique<TurnedElu<T>>(chosen_isa(run), *angles, before);
      policy.maps = {turned_queries.get(), turned_keys.get()};
    }
    policy.features = q.size(3);
    policy.key_sum = policy.value_sum = true;
    const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
    policy.read_out = chunked::each_row<T>([this, scale, eps = options.eps, form = options.form](
                                               int64_t b, int64_t tokens, double denominator) {
      const int64_t seen = before[static_cast<size_t>(b)] + tokens;
      if (seen == 0) return chunked::ReadOut{0, 0, 0, 0};
      const auto n = static_cast<double>(seen);
      return form == MagnitudeAwareForm::paper ? paper_row(eps, n, denominator)
                                               : code_row(scale, eps, n, denominator);
    });
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  std::vector<int64_t> before;
  ElementMap<T> plain;
  std::unique_ptr<GridAngles<T>> angles;
  std::unique_ptr<ElementMap<T>> rounded_queries, centred_keys;
  std::unique_ptr<TurnedElu<T>> turned_queries, turned_keys;
  chunked::Problem<T> problem;
};

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const State& state, const Options& options, const RunOptions& run) {
  const Call<T> call(q, k, v, options, run);
  if (state.count.defined()) check_last_counts(call.before, k.size(2), std::is_same_v<T, float>);
  chunked::forward(call.problem, out, {state.s, state.k_sum, state.v_sum}, run);
  if (!state.count.defined()) return;
  for (int64_t b = 0; b < q.size(0); ++b) {
    *reinterpret_cast<T*>(state.count.at({b})) =
        static_cast<T>(call.before[static_cast<size_t>(b)] + k.size(2));
  }
}

template <class T>
void run_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
                  const State& state_gradient, const MagnitudeAwareGradientViews& into,
                  const Options& options, const RunOptions& run) {
  const Call<T> call(q, k, v, options, run);
  chunked::backward(call.problem, out_gradient,
                    {state_gradient.s, state_gradient.k_sum, state_gradient.v_sum},
                    {into.q, into.k, into.v, {into.s, into.k_sum, into.v_sum}, nullptr}, run);
}

void check_last(const State& state, const Tensor& q, const Tensor& v) {
  check_sums(kOp, "state", state, q, v);
  check_result(kOp, "state count", state.count, {q.size(0)}, wide_type(q.dtype()));
}

}  // namespace

MagnitudeAwareForm parse_magnitude_aware_form(std::string_view name) {
  if (name == "code") return MagnitudeAwareForm::code;
  if (name == "paper") return MagnitudeAwareForm::paper;
  if (name == "consistent") return MagnitudeAwareForm::consistent;
  fail(kOp, "form is '" + std::string(name) + "'", "'code', 'paper' or 'consistent' is needed");
}

void magnitude_aware_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out, const State& state, const Options& options,
                                      const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_out(kOp, out, q, v);
  check_last(state, q, v);
  with_wide_type(q.dtype(), [&]<class T>(T) { run_forward<T>(q, k, v, out, state, options, run); });
}

MagnitudeAwareResult magnitude_aware_linear_attention(const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Options& options,
                                                      const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  MagnitudeAwareResult result;
  result.out = Array(q.dtype(), out_shape(q, v));
  if (options.causal) {
    result.s = Array(type, s_shape(q, v));
    result.k_sum = Array(type, k_sum_shape(q));
    result.v_sum = Array(type, v_sum_shape(q, v));
    result.count = Array(type, {q.size(0)});
  }
  magnitude_aware_linear_attention(
      q, k, v, result.out, {result.s, result.k_sum, result.v_sum, result.count}, options, run);
  return result;
}

void magnitude_aware_linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& out_gradient,
                                               const State& state_gradient,
                                               const MagnitudeAwareGradientViews& gradients,
                                               const Options& options, const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_gradients(kBackward, q, k, v, out_gradient,
                           {gradients.q, gradients.k, gradients.v});
  const State sums{state_gradient.s, state_gradient.k_sum, state_gradient.v_sum, {}};
  if (any_of(sums) && !options.causal)
    fail(kBackward, "a gradient of a state without causal", "only causal calls have one");
  check_sums(kBackward, "state_gradient", sums, q, v);
  check_sums(kBackward, "gradient of initial_state",
             {gradients.s, gradients.k_sum, gradients.v_sum, {}}, q, v);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_backward<T>(q, k, v, out_gradient, sums, gradients, options, run);
  });
}

MagnitudeAwareGradients magnitude_aware_linear_attention_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
    const State& state_gradient, const Options& options, const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  MagnitudeAwareGradients result{empty_like(q), empty_like(k), empty_like(v), {}, {}, {}};
  if (options.initial_state.s.defined()) {
    result.s = Array(type, s_shape(q, v));
    result.k_sum = Array(type, k_sum_shape(q));
    result.v_sum = Array(type, v_sum_shape(q, v));
  }
  magnitude_aware_linear_attention_backward(
      q, k, v, out_gradient, state_gradient,
      {result.q, result.k, result.v, result.s, result.k_sum, result.v_sum}, options, run);
  return result;
}

}  // namespace heed
