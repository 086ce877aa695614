// PyTorch's version of a call, where the program was built with libtorch.
#pragma once
#include <optional>
#include <string>

#include "torch/peers.h"

namespace heed::cli {

/// Throws Error where the program was built without libtorch.
void require_peers();
std::string peer_version();
std::optional<Peer> find_peer(const Mechanism& mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run);

}  // namespace heed::cli
