#include "mechanisms/chunked_case.h"

#include "engine/chunked/path.h"

namespace heed {

cascade::Bindings bind_chunked(const NamedTensors& in) {
  const int64_t group = in.at("q").size(1) / in.at("k").size(1);
  cascade::Bindings bindings;
  bindings.tensors = {{"Q", to_nd(in.at("q"))}, {"K", to_nd(in.at("k"))}, {"V", to_nd(in.at("v"))}};
  bindings.indices["g"] = [group](std::span<const int64_t> i) { return i[0] / group; };
  return bindings;
}

std::vector<PathAnswer> explain_chunked(const NamedTensors& in, bool mapped,
                                        const RunOptions& run) {
  std::vector<PathAnswer> answers;
  for (const auto& choice : chunked::explain(
           {.dtype = in.at("q").dtype(), .tokens = in.at("k").size(2), .mapped = mapped}, run)) {
    answers.push_back({choice.path, choice.can_run, choice.reason});
  }
  return answers;
}

}  // namespace heed
