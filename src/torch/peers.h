// The same mathematics composed from PyTorch's own operators, for benchmarks side by side.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"
#include "mechanisms/registry.h"
#include "mechanisms/spec.h"

namespace heed {

/// One call, made ready once and then run (and timed) as often as wanted. Inputs are views: whoever
/// made them keeps the memory alive.
struct Peer {
  std::string title;              // "scaled_dot_product_attention"
  std::function<void()> compute;  // replaces the previous result
  std::function<Array()> result;  // a copy of the last result [B,H,Lq,Dv], in q's type
};

/// What PyTorch offers for this call; none where it has no composition for the mechanism, one of
/// the inputs or one of the options. Known: flash_attention (causal, scale), decode_attention of
/// equally long sequences (scale) and sigmoid_attention (causal, scale, bias as a number or as an
/// input [H]). Every run sets PyTorch's thread count.
std::optional<Peer> make_peer(std::string_view mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run = {});

}  // namespace heed
