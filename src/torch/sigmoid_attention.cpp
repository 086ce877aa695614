// sigmoid_attention for PyTorch, real and fake.
#include "heed/sigmoid_attention.h"

#include <torch/library.h>

#include <array>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kSigmoid = "sigmoid_attention";

#define HEED_SIGMOID_ARGS                                                                      \
  std::optional<double> bias_value, const MaybeTensor &bias, bool causal, int64_t window_left, \
      int64_t window_right, const MaybeTensor &lengths, std::optional<double> scale,           \
      const MaybeTensor &alibi_slopes
#define HEED_SIGMOID_NAMES \
  bias_value, bias, causal, window_left, window_right, lengths, scale, alibi_slopes

// Options and what their views point to.
struct HeldSigmoid {
  HeldSigmoid(const at::Tensor& q, HEED_SIGMOID_ARGS)
      : masks(kSigmoid, causal, window_left, window_right, lengths, q.device()),
        head_bias(held_per_head(kSigmoid, "bias", bias, q)),
        slopes(held_slopes(kSigmoid, alibi_slopes, q)) {
    TORCH_CHECK_VALUE(!(bias_value && head_bias), kSigmoid,
                      ": bias is given both as a number and as a tensor, needed is one of them");
    options.masks = masks.masks;
    options.scale = scale;
    if (bias_value) options.bias = *bias_value;
    if (head_bias) options.bias = view(head_bias);
    options.alibi_slopes = view(slopes);
  }
  HeldMasks masks;
  MaybeTensor head_bias, slopes;
  SigmoidOptions options;
};

at::Tensor sigmoid_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       HEED_SIGMOID_ARGS) {
  check_qkv({kSigmoid, "q", q}, {kSigmoid, "k", k}, {kSigmoid, "v", v});
  const HeldSigmoid held(q, HEED_SIGMOID_NAMES);
  const at::Tensor out = empty_out(q, v);
  guarded([&] {
    sigmoid_attention(view(q), view(k), view(v), view(out), held.options, run_options());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    HEED_SIGMOID_ARGS, std::array<bool, 5> output_mask) {
  check_qkv({kSigmoid, "q", q}, {kSigmoid, "k", k}, {kSigmoid, "v", v});
  const HeldSigmoid held(q, HEED_SIGMOID_NAMES);
  const at::Tensor g = gradient_input(grad_out);
  SigmoidGradients to;
  guarded([&] {
    to = sigmoid_attention_backward(view(g), view(q), view(k), view(v), held.options, run_options(),
                                    {.bias = output_mask[3], .alibi_slopes = output_mask[4]});
  });
  return {take_wanted(std::move(to.q), output_mask[0], q),
          take_wanted(std::move(to.k), output_mask[1], k),
          take_wanted(std::move(to.v), output_mask[2], v),
          take_gradient(std::move(to.bias), bias, q),
          take_gradient(std::move(to.alibi_slopes), alibi_slopes, q)};
}

// NOLINTBEGIN(performance-unnecessary-value-param): the dispatcher passes SymInt by value
at::Tensor sigmoid_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        std::optional<double>, const MaybeTensor& bias, bool, c10::SymInt,
                        c10::SymInt, const MaybeTensor& lengths, std::optional<double>,
                        const MaybeTensor& alibi_slopes) {
  const Arg args[] = {{kSigmoid, "q", q}, {kSigmoid, "k", k}, {kSigmoid, "v", v}};
  check_qkv(args[0], args[1], args[2]);
  check_qkv_shapes(args[0], args[1], args[2]);
  check_optional(kSigmoid, "bias", bias, 1, q.device());
  check_optional(kSigmoid, "lengths", lengths, 1, q.device());
  check_slopes(kSigmoid, alibi_slopes, q.device());
  return empty_out(q, v);
}
// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("sigmoid_attention", &heed::ops::sigmoid_cpu);
  m.impl("sigmoid_attention_backward", &heed::ops::sigmoid_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) { m.impl("sigmoid_attention", &heed::ops::sigmoid_meta); }
