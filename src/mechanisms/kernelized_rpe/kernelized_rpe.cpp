// Arguments, and the choice between the two ways.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "heed/kernelized_rpe_attention.h"
#include "kernels/fft.h"
#include "kernels/matrix.h"
#include "mechanisms/kernelized_rpe/call.h"
#include "mechanisms/nearest.h"
#include "mechanisms/parameter.h"

namespace heed {

namespace {

using rpe::Call;

constexpr const char* kOp = "kernelized_rpe_attention";
constexpr double kFftSpread = 13.815510557964274;  // log 1e6: see the header
// Weights of offsets that differ by more do not fit side by side into float32.
constexpr double kFloatSpread = 60;

constexpr RpeFeatures kFeatures[] = {RpeFeatures::nprf, RpeFeatures::prf, RpeFeatures::trf,
                                     RpeFeatures::elu1};
constexpr RpePath kPaths[] = {RpePath::automatic, RpePath::fft, RpePath::direct};

template <class Value, size_t N>
Value parse(const char* what, std::string_view name, const Value (&values)[N]) {
  std::vector<std::string> names;
  for (Value value : values) {
    if (name == name_of(value)) return value;
    names.emplace_back(name_of(value));
  }
  fail(kOp,
       std::string("unknown ") + what + " '" + std::string(name) + "'" + did_you_mean(name, names),
       "known: " + joined(names));
}

void check_grid(const std::array<int64_t, 2>& grid, int64_t tokens) {
  const std::string text = "(" + std::to_string(grid[0]) + "," + std::to_string(grid[1]) + ")";
  int64_t product = 0;
  if (grid[0] < 0 || grid[1] < 0 || __builtin_mul_overflow(grid[0], grid[1], &product) ||
      product != tokens || (product > 0 && grid[0] > std::numeric_limits<int32_t>::max())) {
    fail(kOp, "grid is " + text,
         "rows and columns whose product is the number of tokens, " + std::to_string(tokens) +
             ", are needed");
  }
}

void place_tokens(Call& call) {
  const int64_t heads = call.sizes.heads;
  if (call.options.grid) {
    check_grid(*call.options.grid, call.tokens);
    const int64_t rows = (*call.options.grid)[0], columns = (*call.options.grid)[1];
    const Dims shape{heads, 2 * rows - 1, 2 * columns - 1};
    if (call.tokens > 0) check_parameter(kOp, "rpb", call.rpb, shape, call.q.dtype());
    call.columns = std::max<int64_t>(1, columns);
    call.pitch = 2 * columns - 1;
    call.span = (rows - 1) * call.pitch + columns - 1;
    call.entries = call.rpb.defined() && heads > 0 ? call.rpb.count() / heads : 0;
    return;
  }
  const Tensor& rpb = call.rpb;
  if (!rpb.defined() || rpb.rank() != 2 || rpb.size(1) % 2 == 0 ||
      rpb.size(1) < 2 * call.tokens - 1) {
    fail(kOp, describe("rpb", rpb) + " beside " + std::to_string(call.tokens) + " tokens",
         "[" + std::to_string(heads) + ",2R-1] with R >= " + std::to_string(call.tokens) +
             " is needed");
  }
  check_parameter(kOp, "rpb", rpb, {heads, rpb.size(1)}, call.q.dtype());
  call.columns = std::max<int64_t>(1, call.tokens);
  call.pitch = call.columns;
  call.span = call.tokens - 1;
  call.entries = rpb.size(1);
  call.first_entry = (rpb.size(1) - 1) / 2 - call.span;
}

void check_projection(Call& call) {
  const Tensor& w = call.projection;
  const std::string shape =
      "[" + std::to_string(call.sizes.heads) + ",M," + std::to_string(call.sizes.dim) + "]";
  if (call.options.features == RpeFeatures::elu1) {
    if (w.defined()) fail(kOp, describe("projection", w), "features elu1 take none");
    call.features = call.sizes.dim;
    return;
  }
  if (!w.defined() || w.rank() != 3 || w.size(1) < 1) {
    fail(kOp, describe("projection", w) + " with features " + name_of(call.options.features),
         shape + " is needed, M >= 1");
  }
  check_parameter(kOp, "projection", w, {call.sizes.heads, w.size(1), call.sizes.dim},
                  call.q.dtype());
  call.random = w.size(1);
  call.features = call.options.features == RpeFeatures::trf ? 2 * call.random : call.random;
}

Call checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
             const Tensor& projection, const KernelizedRpeOptions& options) {
  Call call{.q = q,
            .k = k,
            .v = v,
            .rpb = rpb,
            .projection = projection,
            .sizes = check_attention(kOp, q, k, v),
            .options = options};
  if (q.size(2) != k.size(2)) {
    fail(kOp, describe("q", q) + " but " + describe("k", k),
         "as many keys as queries are needed: positions are relative");
  }
  call.tokens = q.size(2);
  place_tokens(call);
  check_projection(call);
  return call;
}

bool empty(const Call& call) {
  return call.tokens == 0 || call.sizes.batch == 0 || call.sizes.heads == 0;
}

// Whether all elements of t [B,H,L,D] are finite.
bool all_finite(const Tensor& t, const RunOptions& run) {
  const auto& kernels = kernels::matrix_kernels<double>(chosen_isa(run));
  const int64_t heads = t.size(1), items = t.size(0) * heads, width = t.size(3);
  std::vector<char> finite(static_cast<size_t>(items), 1);
  parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
    constexpr int64_t kRows = 64;
    const int64_t stride = kernels::row_stride(kernels, width);
    std::vector<double> rows(static_cast<size_t>(kRows * stride));
    double sum = 0;
    for (int64_t begin = 0; begin < t.size(2); begin += kRows) {
      const int64_t count = std::min(kRows, t.size(2) - begin);
      kernels.load_rows(
          {t.at({item / heads, item % heads, begin}), t.dtype(), t.stride(2), count, width},
          {rows.data(), stride});
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < width; ++i) sum += 0 * rows[static_cast<size_t>(r * stride + i)];
      }
    }
    finite[static_cast<size_t>(item)] = sum == 0;
  });
  return std::find(finite.begin(), finite.end(), 0) == finite.end();
}

bool all_finite(const Tensor& parameter) {
  const std::vector<double> values = contiguous_values<double>(parameter);
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
}

struct Chosen {
  RpePath path = RpePath::direct;
  bool in_double = false;  // direct: float32 could not hold the weights of all offsets
};

Chosen choose(const Call& call, const Tensor& grad_out, const RunOptions& run) {
  const rpe::Spread spread = rpe::offset_spread(call);
  const Chosen direct{RpePath::direct,
                      call.q.dtype() == DType::f64 || spread.largest > kFloatSpread};
  const bool narrow = spread.largest <= kFftSpread;
  if (call.options.path == RpePath::direct) return direct;
  if (call.options.path == RpePath::automatic) {
    const int64_t positions = call.position(call.tokens - 1) + 1;
    const RpeCost cost =
        kernelized_rpe_cost(call.tokens, positions, call.features, call.sizes.value_dim,
                            call.options.causal, call.q.dtype(), chosen_isa(run));
    if (!narrow || cost.direct <= cost.fft) return direct;
  } else if (!narrow) {
    fail(kOp,
         "path is fft but exp(rpb) of one head differs by a factor of exp " +
             std::to_string(spread.largest),
         "at most 1e6 (exp 13.8) is needed for its accuracy; path direct or auto has no limit");
  }
  const bool finite = spread.finite && all_finite(call.q, run) && all_finite(call.k, run) &&
                      all_finite(call.v, run) &&
                      (!call.projection.defined() || all_finite(call.projection)) &&
                      (!grad_out.defined() || all_finite(grad_out, run));
  return {finite ? RpePath::fft : RpePath::direct, direct.in_double};
}

// Whether results of the transform with this error stand; if not they are to be computed directly.
bool stands(const Call& call, double error) {
  const double limit = rpe::fft_error_limit(call.q.dtype());
  if (error <= limit) return true;
  if (call.options.path == RpePath::automatic) return false;
  char found[32], most[32];
  std::snprintf(found, sizeof found, "%.2g", error);
  std::snprintf(most, sizeof most, "%.2g", limit);
  fail(kOp,
       std::string("path is fft but key features, values or gradients of one head lie so far apart "
                   "that its error may reach ") +
           found,
       std::string("at most ") + most + " is needed; path direct or auto has no limit");
}

}  // namespace

const char* name_of(RpeFeatures features) {
  switch (features) {
    case RpeFeatures::nprf:
      return "nprf";
    case RpeFeatures::prf:
      return "prf";
    case RpeFeatures::trf:
      return "trf";
    case RpeFeatures::elu1:
      return "elu1";
  }
  return "?";
}

const char* name_of(RpePath path) {
  switch (path) {
    case RpePath::automatic:
      return "auto";
    case RpePath::fft:
      return "fft";
    case RpePath::direct:
      return "direct";
  }
  return "?";
}

RpeFeatures parse_rpe_features(std::string_view name) { return parse("features", name, kFeatures); }
RpePath parse_rpe_path(std::string_view name) { return parse("path", name, kPaths); }

RpeCost kernelized_rpe_cost(int64_t tokens, int64_t positions, int64_t features, int64_t value_dim,
                            bool causal, DType dtype, Isa isa) {
  const bool wide = dtype == DType::f64;
  const double share = wide ? 0.5 : 1;  // of the speed in float32
  const double rate = (isa >= Isa::avx512 ? 97e9 : isa == Isa::avx2 ? 75e9 : 5e9) * share;
  const double l = static_cast<double>(tokens), f = static_cast<double>(features);
  const double pairs = l * l * (causal ? 0.5 : 1.0);
  const double columns = static_cast<double>(round_up(value_dim, 16));
  const auto n = static_cast<double>(kernels::good_fft_length(2 * std::max<int64_t>(1, positions)));
  return {
      .direct = pairs * (2 * (f + columns) / rate + 0.17e-9 / share),
      .fft = f * static_cast<double>(value_dim + 1) * (wide ? 11e-9 : 1.7e-9) * n * std::log2(n)};
}

void kernelized_rpe_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
                              const Tensor& projection, const Tensor& out,
                              const KernelizedRpeOptions& options, const RunOptions& run) {
  const Call call = checked(q, k, v, rpb, projection, options);
  check_rows_like(kOp, "out", out, call.sizes.out_shape(), q.dtype());
  if (empty(call)) return;
  const Chosen chosen = choose(call, {}, run);
  if (chosen.path == RpePath::fft && stands(call, rpe::forward_fft(call, out, run))) return;
  rpe::forward_direct(call, chosen.in_double, out, run);
}

Array kernelized_rpe_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
                               const Tensor& projection, const KernelizedRpeOptions& options,
                               const RunOptions& run) {
  Array out(q.dtype(), checked(q, k, v, rpb, projection, options).sizes.out_shape());
  kernelized_rpe_attention(q, k, v, rpb, projection, out, options, run);
  return out;
}

void kernelized_rpe_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& rpb, const Tensor& projection,
                                       const KernelizedRpeOptions& options,
                                       const KernelizedRpeGradientViews& gradients,
                                       const RunOptions& run) {
  const Call call = checked(q, k, v, rpb, projection, options);
  check_rows_like(kOp, "grad_out", grad_out, call.sizes.out_shape(), q.dtype());
  check_rows_like(kOp, "gradient of q", gradients.q, q.shape(), q.dtype());
  check_rows_like(kOp, "gradient of k", gradients.k, k.shape(), q.dtype());
  check_rows_like(kOp, "gradient of v", gradients.v, v.shape(), q.dtype());
  check_parameter_gradient(kOp, "gradient of rpb", gradients.rpb, rpb);
  if (empty(call)) {
    const std::vector<double> none(static_cast<size_t>(rpb.count()));
    copy_values(none.data(), gradients.rpb);
    for (const Tensor* t : {&gradients.k, &gradients.v}) {  // without queries they get nothing
      const std::vector<double> zeros(static_cast<size_t>(t->count()));
      copy_values(zeros.data(), *t);
    }
    return;
  }
  const Chosen chosen = choose(call, grad_out, run);
  if (chosen.path == RpePath::fft &&
      stands(call, rpe::backward_fft(call, grad_out, gradients, run))) {
    return;
  }
  rpe::backward_direct(call, chosen.in_double, grad_out, gradients, run);
}

KernelizedRpeGradients kernelized_rpe_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
    const Tensor& projection, const KernelizedRpeOptions& options, const RunOptions& run) {
  checked(q, k, v, rpb, projection, options);
  KernelizedRpeGradients result{Array(q.dtype(), q.shape()), Array(k.dtype(), k.shape()),
                                Array(v.dtype(), v.shape()), Array(rpb.dtype(), rpb.shape())};
  kernelized_rpe_attention_backward(grad_out, q, k, v, rpb, projection, options,
                                    {result.q, result.k, result.v, result.rpb}, run);
  return result;
}

}  // namespace heed
