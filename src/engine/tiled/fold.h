// One query of each head: the heads of a group as rows of one head.
#pragma once
#include <optional>

#include "engine/tiled/problem.h"

namespace heed::tiled {

/// The same call with the query heads of each group as the rows of one head, so that they share tiles:
/// H heads of one query become Hkv heads of H/Hkv queries that see the same keys. None where there are
/// more queries, no groups, or something tells the heads apart.
std::optional<Problem> heads_as_rows(const Problem& problem);

}  // namespace heed::tiled
