// Errors a caller can act on.
#pragma once
#include <stdexcept>
#include <string>

namespace heed {

/// Thrown for every mistake in a caller's input. The message names the operation, the argument,
/// what was found and what was needed. Broken invariants of heed itself are assertions instead.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace heed
