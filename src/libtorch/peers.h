// The same mathematics composed from PyTorch's own operators, for benchmarks side by side.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "heed/tensor.h"
#include "mechanisms/registry.h"
#include "mechanisms/spec.h"

namespace heed {

/// One call, made ready once and then run (and timed) as often as wanted. Inputs are views: whoever
/// made them keeps the memory alive.
struct Peer {
  std::string title;              // "scaled_dot_product_attention"
  std::function<void()> compute;  // replaces the previous result
  std::function<Array()> result;  // a copy of the last result, in the type of the first input
  /// The forward once more, recorded by autograd, for this gradient of the result (in its shape).
  std::function<void(const Tensor& out_gradient)> prepare_backward;
  /// Autograd's backward of that forward, for every floating input.
  std::function<void()> backward;
  std::function<Array(const std::string& input)> gradient;  // a copy, in the input's type
};

/// The result of a mechanism that a composition makes: "out", or the only one.
inline const std::string& composed_result(const Mechanism& mechanism) {
  const auto out = mechanism.outputs.find("out");
  return (out == mechanism.outputs.end() ? mechanism.outputs.begin() : out)->first;
}

/// What PyTorch offers for this call; none where it has no composition for the mechanism, one of
/// the inputs or one of the options. Every run sets PyTorch's thread count. Known:
///   scaled_dot_product_attention     flash_attention (causal, scale), decode_attention of equally long
///                                    sequences, affine_scaled_, head_gated_attention (causal, scale)
///   the same on slices of keys       na1d, na2d, na3d, stochastic_attention (all options)
///   products of all pairs            sigmoid_attention (causal, scale, bias), parallax_, relative_,
///                                    recurrent_softmax_, taylor_state_, kernelized_rpe_attention (one axis),
///                                    attention_distillation_loss
///   chunks of tokens with a state    lightning_, linear_, magnitude_aware_linear_attention without state
///   sums over the keys               relu_linear_attention, the above where they are not causal
///   others                           merge_attention, depthwise_causal_conv, feature_map
std::optional<Peer> make_peer(std::string_view mechanism, const NamedTensors& in,
                              const Spec& options, int threads = 1);

}  // namespace heed
