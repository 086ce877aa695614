#include "cli/peers.h"

namespace heed::cli {

void require_peers() {}

std::string peer_version() { return std::string("PyTorch ") + HEED_TORCH_VERSION; }

std::optional<Peer> find_peer(const Mechanism& mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run) {
  return make_peer(mechanism.name, in, options, run);
}

}  // namespace heed::cli
