// What attention returns that can be merged with attention over other keys.
#pragma once
#include "heed/tensor.h"

namespace heed {

struct AttentionResult {
  Array out;
  Array lse;  // log of the sum of exp of a row's scores; -inf for a row that saw no key
};

}  // namespace heed
