// One comparison for all checks: a result against its float64 reference under an elementwise bound.
#pragma once
#include <limits>
#include <string>
#include <vector>

#include "cascade/cascade.h"

namespace heed {

/// Allowed |got - want| of an element: relative * |want| + absolute. Where `want` may round to an infinity
/// of the result's type, whose largest finite value is `largest`, that is right as well.
struct Bound {
  double relative = 0;
  double absolute = 0;
  double largest = std::numeric_limits<double>::infinity();
  double at(double want) const;
};

struct Difference {
  /// Largest error / bound. Infinite where only one side is NaN or the infinities differ, and when
  /// the shapes differ; a bound of 0 asks for equality.
  double ratio = 0;
  double error = 0;   // |got - want| where the ratio is largest
  double bound = 0;   // the bound there
  std::string where;  // "[0,1,2] got 1 want 2", or what else is wrong; empty for empty arrays
  bool ok() const { return ratio <= 1; }
};

Difference compare(const cascade::NdArray& got, const cascade::NdArray& want, const Bound& bound);

}  // namespace heed
