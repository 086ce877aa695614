// What the program says where it was built without libtorch.
#include "cli/commands.h"
#include "cli/peers.h"
#include "heed/error.h"

namespace heed::cli {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw Error(what +
              " needs PyTorch's library, and this program was built without it "
              "(HEED_TORCH=OFF)");
}

void add_refusal(CLI::App& app, const std::string& name, const std::string& text) {
  CLI::App* command = app.add_subcommand(name, text + " (not in this build: HEED_TORCH=OFF)");
  command->allow_extras();
  command->callback([name] { refuse("heed " + name); });
}

}  // namespace

void add_run(CLI::App& app, Outcome&) { add_refusal(app, "run", "Let a language model answer"); }
void add_eval(CLI::App& app, Outcome&) { add_refusal(app, "eval", "Perplexity of a text"); }

void require_peers() { refuse("--vs torch"); }
std::string peer_version() { return ""; }
std::optional<Peer> find_peer(const Mechanism&, const NamedTensors&, const Spec&,
                              const RunOptions&) {
  return std::nullopt;
}

}  // namespace heed::cli
