#include "heed/depthwise_conv.h"

#include <algorithm>
#include <string>

#include "base/parallel.h"
#include "base/round_up.h"
#include "kernels/depthwise.h"
#include "mechanisms/parameter.h"

namespace heed {

namespace {

constexpr const char* kOp = "depthwise_causal_conv";
constexpr int64_t kItemTokens = 512;  // of one work item of the forward
constexpr int64_t kSumTokens = 128;   // summed in float32 before a double takes them
// Partial sums of the parameters' gradients: about so many, and no more elements than this together.
// Fixed, so that results do not depend on the threads.
constexpr int64_t kSumItems = 64;
constexpr int64_t kSumElements = 1 << 22;

void check_x(const char* name, const Tensor& x) {
  if (x.rank() == 4 && is_floating(x.dtype())) return;
  fail(kOp, describe(name, x), "[B,H,L,D] of float64, float32, bfloat16 or float16 is needed");
}

void check_inputs(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_x("x", x);
  const int64_t heads = x.size(1), dim = x.size(3);
  const int rank = weight.rank();
  const int64_t taps = rank == 0 ? 0 : weight.shape().back();
  const Dims shared{dim, taps}, own{heads, dim, taps};
  if (taps < 1 || (weight.shape() != shared && weight.shape() != own)) {
    fail(kOp, describe("weight", weight) + " but " + describe("x", x),
         "[D,W] or [H,D,W] with W >= 1 is needed, as " +
             to_string(Dims{dim, std::max<int64_t>(taps, 1)}) + " or " +
             to_string(Dims{heads, dim, std::max<int64_t>(taps, 1)}));
  }
  check_parameter(kOp, "weight", weight, weight.shape(), x.dtype());
  if (!bias.defined()) return;
  check_parameter(kOp, "bias", bias, bias.rank() == 2 ? Dims{heads, dim} : Dims{dim}, x.dtype());
}

void check_like_x(const char* name, const Tensor& t, const Tensor& x) {
  if (t.shape() == x.shape() && t.dtype() == x.dtype() && t.defined()) return;
  fail(kOp, describe(name, t) + " but " + describe("x", x), "give both the same shape and type");
}

kernels::Rows rows_of(const Tensor& t, int64_t b, int64_t h) {
  return {t.at({b, h}), t.dtype(), t.stride(2), t.size(2), t.size(3)};
}

kernels::Rows backwards(const kernels::Rows& rows) {
  kernels::Rows reversed = rows;
  reversed.data = static_cast<const std::byte*>(rows.data) +
                  (rows.count - 1) * rows.stride * static_cast<int64_t>(size_of(rows.dtype));
  reversed.stride = -rows.stride;
  return reversed;
}

template <class T>
class Convolution {
 public:
  Convolution(const Tensor& x, const Tensor& weight, const Tensor& bias, const RunOptions& run)
      : x_(with_unit_stride(x, storage_)),
        run_(run),
        kernels_(kernels::depthwise_kernels<T>(chosen_isa(run))),
        heads_(x.size(1)),
        tokens_(x.size(2)),
        dim_(x.size(3)),
        taps_(weight.shape().back()),
        padded_(round_up(dim_, kernels::kDepthwisePad)),
        weight_step_(weight.rank() == 2 ? 0 : taps_ * padded_),
        bias_step_(bias.rank() == 1 ? 0 : padded_),
        weight_(transposed(weight, taps_)),
        bias_(bias.defined() ? transposed(bias, 1) : std::vector<T>()) {}

  void forward(const Tensor& out) const {
    for_chunks([&](int64_t b, int64_t h, int64_t begin, int64_t end) {
      const T* bias = bias_.empty() ? nullptr : bias_.data() + h * bias_step_;
      convolve(rows_of(x_, b, h), h, bias, begin, end, rows_of(out, b, h));
    });
  }

  /// The same convolution backwards in time.
  void input_gradient(const Tensor& grad_out, const Tensor& grad_x) const {
    for_chunks([&](int64_t b, int64_t h, int64_t begin, int64_t end) {
      convolve(backwards(rows_of(grad_out, b, h)), h, nullptr, begin, end,
               backwards(rows_of(grad_x, b, h)));
    });
  }

  /// Gradients of weight and, where defined, bias in their shapes and types.
  void parameter_gradients(const Tensor& grad_out, const Tensor& weight, const Tensor& bias,
                           DepthwiseConvGradients& to) const {
    const bool shared = weight_step_ == 0 && (bias_.empty() || bias_step_ == 0);
    const std::vector<double> sums = sums_of(grad_out, shared ? 1 : heads_);
    to.weight = taken(sums, shared ? 1 : heads_, weight, 0, taps_);
    if (bias.defined()) to.bias = taken(sums, shared ? 1 : heads_, bias, taps_, 1);
  }

 private:
  /// [sets, D, count] as [sets, count, padded D].
  std::vector<T> transposed(const Tensor& parameter, int64_t count) const {
    if (dim_ == 0) return {};
    const Array plain = convert(parameter, dtype_of<T>);
    const int64_t rows = plain.count() / count;
    std::vector<T> values(static_cast<size_t>(rows / dim_ * count * padded_));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t set = row / dim_, e = row % dim_;
      for (int64_t a = 0; a < count; ++a) {
        values[static_cast<size_t>((set * count + a) * padded_ + e)] =
            plain.as<T>()[row * count + a];
      }
    }
    return values;
  }

  template <class Body>
  void for_chunks(const Body& body) const {
    if (dim_ == 0) return;
    const int64_t chunks = ceil_div(tokens_, kItemTokens), items = x_.size(0) * heads_ * chunks;
    parallel_for(items, threads_for_rows(run_, items, x_.count()), [&](int64_t item, int) {
      const int64_t begin = item % chunks * kItemTokens, head = item / chunks;
      body(head / heads_, head % heads_, begin, std::min(begin + kItemTokens, tokens_));
    });
  }

  void convolve(const kernels::Rows& x, int64_t h, const T* bias, int64_t begin, int64_t end,
                const kernels::Rows& out) const {
    kernels_.convolve(x, weight_.data() + h * weight_step_, bias, taps_, begin, end,
                      const_cast<void*>(out.data), out.stride);
  }

  /// Sums over batch, tokens and the heads of a set: [sets, W + 1, padded D], behind the taps the bias.
  std::vector<double> sums_of(const Tensor& grad_out, int64_t sets) const {
    if (sets == 0 || heads_ == 0) return std::vector<double>();
    const int64_t size = (taps_ + 1) * padded_;
    const int64_t blocks = heads_ / sets * x_.size(0) * ceil_div(tokens_, kSumTokens);  // of a set
    const int64_t most = std::min(ceil_div(kSumItems, sets), kSumElements / (size + 1));
    const int64_t parts = std::clamp<int64_t>(most, 1, std::max<int64_t>(1, blocks));
    const int64_t items = sets * parts;
    std::vector<double> sums(static_cast<size_t>(items * size));
    parallel_for(items, threads_for(run_, items), [&](int64_t item, int) {
      const int64_t set = item / parts, part = item % parts;
      add_blocks(grad_out, set, sets, blocks * part / parts, blocks * (part + 1) / parts,
                 sums.data() + item * size);
    });
    for (int64_t set = 0; set < sets; ++set) {
      double* total = sums.data() + set * size;
      for (int64_t part = 0; part < parts; ++part) {
        const double* from = sums.data() + (set * parts + part) * size;
        for (int64_t i = 0; i < size; ++i) total[i] = part == 0 ? from[i] : total[i] + from[i];
      }
    }
    sums.resize(static_cast<size_t>(sets * size));
    return sums;
  }

  void add_blocks(const Tensor& grad_out, int64_t set, int64_t sets, int64_t first, int64_t last,
                  double* sums) const {
    const int64_t per_head = ceil_div(tokens_, kSumTokens), per_batch = heads_ / sets * per_head;
    std::vector<T> block(static_cast<size_t>((taps_ + 1) * padded_));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / per_batch, h = set + i % per_batch / per_head;
      const int64_t begin = i % per_head * kSumTokens;
      std::fill(block.begin(), block.end(), T{0});
      kernels_.correlate(rows_of(x_, b, h), rows_of(grad_out, b, h), taps_, begin,
                         std::min(begin + kSumTokens, tokens_), block.data());
      for (size_t j = 0; j < block.size(); ++j) sums[j] += static_cast<double>(block[j]);
    }
  }

  /// Rows [first, first + count) of every set as the gradient of `like`; heads it does not tell apart
  /// are added.
  Array taken(const std::vector<double>& sums, int64_t sets, const Tensor& like, int64_t first,
              int64_t count) const {
    Array wide = Array::zeros(DType::f64, like.shape());
    if (sums.empty()) return convert(wide, like.dtype());
    const bool one = wide.count() == dim_ * count;
    for (int64_t set = 0; set < sets; ++set) {
      double* to = wide.as<double>() + (one ? 0 : set * dim_ * count);
      const double* from = sums.data() + (set * (taps_ + 1) + first) * padded_;
      for (int64_t e = 0; e < dim_; ++e) {
        for (int64_t a = 0; a < count; ++a) to[e * count + a] += from[a * padded_ + e];
      }
    }
    return convert(wide, like.dtype());
  }

  Array storage_;  // before x_, which may view it
  const Tensor x_;
  const RunOptions run_;
  const kernels::DepthwiseKernels<T>& kernels_;
  const int64_t heads_, tokens_, dim_, taps_, padded_;
  const int64_t weight_step_, bias_step_;  // from one head to the next; 0: shared
  const std::vector<T> weight_, bias_;     // [H or 1, W, padded D], [H or 1, padded D]
};

template <class T>
DepthwiseConvGradients gradients(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                 const Tensor& bias, const RunOptions& run) {
  const Convolution<T> convolution(x, weight, bias, run);
  Array storage;
  const Tensor given = with_unit_stride(grad_out, storage);
  DepthwiseConvGradients result;
  result.x = Array(x.dtype(), x.shape());
  convolution.input_gradient(given, result.x);
  convolution.parameter_gradients(given, weight, bias, result);
  return result;
}

}  // namespace

void depthwise_causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                           const Tensor& out, const RunOptions& run) {
  check_inputs(x, weight, bias);
  check_like_x("out", out, x);
  if (out.size(3) > 1 && out.stride(3) != 1) {
    fail(kOp, "out has stride " + std::to_string(out.stride(3)) + " in its last dimension",
         "a unit stride is needed there");
  }
  with_wide_type(x.dtype(), [&]<class T>(T) { Convolution<T>(x, weight, bias, run).forward(out); });
}

Array depthwise_causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const RunOptions& run) {
  check_x("x", x);
  Array out(x.dtype(), x.shape());
  depthwise_causal_conv(x, weight, bias, out, run);
  return out;
}

DepthwiseConvGradients depthwise_causal_conv_backward(const Tensor& grad_out, const Tensor& x,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const RunOptions& run) {
  check_inputs(x, weight, bias);
  check_like_x("grad_out", grad_out, x);
  return with_wide_type(x.dtype(),
                        [&]<class T>(T) { return gradients<T>(grad_out, x, weight, bias, run); });
}

}  // namespace heed
