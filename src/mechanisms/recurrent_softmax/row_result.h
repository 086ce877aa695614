// One row of recurrent_softmax_attention.h: from what the tiled engine returns to the result, and back.
//
// The engine's row is o [Dv] and a statistic t: num / den and log den for the exponential, num and den for
// a polynomial. Every normalizer makes a o + c of it, with a and c functions of t, of the sums of o and
// of the number of keys; float64 throughout.
#pragma once
#include <cstdint>

#include "heed/recurrent_softmax_attention.h"

namespace heed::recurrent {

struct RowKind {
  Normalizer normalizer = Normalizer::softmax;
  bool polynomial = false;
  double eps = 0;
  double width = 1;  // Dv

  bool needs_square() const {
    return normalizer == Normalizer::l2 || normalizer == Normalizer::rms || needs_mean();
  }
  bool needs_mean() const { return normalizer == Normalizer::layer; }
};

struct Row {
  double statistic = 0;
  double keys = 0;    // that the row sees
  double square = 0;  // sum of o^2; layer: of (o - mean)^2
  double mean = 0;    // of o; layer only
};

/// result = scale * o + shift
struct RowResult {
  double scale = 0, shift = 0;
};
RowResult row_result(const RowKind& kind, const Row& row);

/// With g the gradient of the result, g.o and the sum of g:
/// d(loss)/do = of_gradient * g + of_row * (scale * o) + constant. of_row is 0 unless needs_square().
/// (scale * o is of size 1 there: o alone may be so small that its factor overflows.)
struct RowGradient {
  double of_gradient = 0, of_row = 0, constant = 0;
  double den = 0;             // polynomial: d(loss)/d(den)
  bool of_num_alone = false;  // exponential: d(loss)/d(log den) is o . d(loss)/do, else 0
};
RowGradient row_gradient(const RowKind& kind, const Row& row, double gradient_dot_row,
                         double gradient_sum);

}  // namespace heed::recurrent
