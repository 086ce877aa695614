// What the records of mechanisms with a running state share.
#pragma once
#include "mechanisms/attention_case.h"

namespace heed {

/// Q, K, V in float64 and g(h) = h / (H/Hkv).
cascade::Bindings bind_chunked(const NamedTensors& in);

/// The chunked engine's answer for inputs q, k; `mapped`: rows become features on the way.
std::vector<PathAnswer> explain_chunked(const NamedTensors& in, bool mapped, const RunOptions& run);

/// Random shapes for a call of the chunked engine: one token now and then, several chunks, and as many
/// queries as keys half of the time.
AttentionShape random_chunked_shape(CaseRandom& random);

}  // namespace heed
