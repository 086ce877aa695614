// Which attention each layer of a language model gets, as people write it.
#pragma once
#include <string_view>
#include <vector>

#include "llm/model_config.h"
#include "mechanisms/registry.h"

namespace heed {

/// "flash:window=256"                      every layer
/// "flash/stochastic:window=256"           by turns
/// "15xflash/15xstochastic:window=256"     fifteen layers, then fifteen
/// Parts NAME or NAME:key=value,... between slashes, each after COUNTx (1 where it is left out). The
/// counts together have to divide the number of layers: the pattern is repeated until they are used up.
/// Returns one for each layer. Throws Error for another text, for an unknown mechanism, one that cannot
/// stand in for causal attention over q, k and v alone, and for options that do not fit.
std::vector<ModelAttention> parse_attention(std::string_view pattern, const ModelConfig& config);

}  // namespace heed
