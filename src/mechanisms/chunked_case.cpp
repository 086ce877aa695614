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
  return chunked::explain(
      {.dtype = in.at("q").dtype(), .tokens = in.at("k").size(2), .mapped = mapped}, run);
}

AttentionShape random_chunked_shape(CaseRandom& random) {
  AttentionShape s;
  s.batch = random.between(1, 2);
  s.kv_heads = random.between(1, 3);
  s.heads = s.kv_heads * random.between(1, 3);
  s.keys = random.chance(0.15)  ? 1
           : random.chance(0.2) ? random.between(150, 420)
                                : random.between(2, 130);
  s.queries = random.chance(0.5) ? s.keys : random.between(1, s.keys);
  s.dim = random.chance(0.15) ? random.between(33, 150) : random.between(1, 33);
  s.value_dim = random.chance(0.15) ? random.between(33, 150) : random.between(1, 33);
  return s;
}

}  // namespace heed
