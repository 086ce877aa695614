// Batch ranks that a text leaves out: which of them each defined tensor has.
#pragma once
#include "cascade/names.h"

namespace heed::cascade {

/// Gives each left side without batch ranks those that its right side brings in. The tensors of the
/// statements start at number `first`. Throws heed::Error where a line mixes both forms.
void spread_batch_ranks(const Ast& ast, const Names& names, Lowered& lowered, int first);

}  // namespace heed::cascade
