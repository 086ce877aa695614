// Forward and backward of a checked call, part by part.
#pragma once
#include "mechanisms/neighborhood/grid_call.h"

namespace heed::na {

void forward(const GridCall& call, const RunOptions& run);

/// Gradients with six axes, those of additional keys and values [B,Hkv,n,width]. lse may be undefined,
/// q to additional_values are written.
struct CallGradients {
  Tensor out, lse;
  Tensor query, key, value, additional_keys, additional_values;
};
/// Returns the gradient of rpb, empty where there is none.
Array backward(const GridCall& call, const CallGradients& gradients, const RunOptions& run);

}  // namespace heed::na
