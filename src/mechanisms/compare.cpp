#include "mechanisms/compare.h"

#include <cmath>
#include <cstdio>
#include <limits>

namespace heed {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t extent : shape) {
    if (text.size() > 1) text += ',';
    text += std::to_string(extent);
  }
  return text += ']';
}

std::vector<int64_t> index_of(size_t flat, const std::vector<int64_t>& shape) {
  std::vector<int64_t> index(shape.size());
  auto rest = static_cast<int64_t>(flat);
  for (size_t axis = shape.size(); axis-- > 0;) {
    index[axis] = rest % shape[axis];
    rest /= shape[axis];
  }
  return index;
}

double error_of(double got, double want, const Bound& bound) {
  if (std::isnan(got) && std::isnan(want)) return 0;
  if (got == want) return 0;  // equal infinities too
  const bool overflows = std::isfinite(want) && std::isfinite(bound.largest) &&
                         std::abs(want) + bound.at(want) >= bound.largest;
  if (overflows && std::isinf(got) && std::signbit(got) == std::signbit(want)) return 0;
  const double error = std::abs(got - want);
  return std::isnan(error) ? kInfinity : error;
}

}  // namespace

double Bound::at(double want) const {
  return std::isfinite(want) ? relative * std::abs(want) + absolute : 0;
}

Difference compare(const cascade::NdArray& got, const cascade::NdArray& want, const Bound& bound) {
  Difference worst;
  if (got.shape != want.shape || got.values.size() != want.values.size()) {
    worst.ratio = worst.error = kInfinity;
    worst.where = "shape " + shape_text(got.shape) + ", needed " + shape_text(want.shape);
    return worst;
  }
  size_t at = 0;
  for (size_t i = 0; i < want.values.size(); ++i) {
    const double error = error_of(got.values[i], want.values[i], bound);
    const double allowed = bound.at(want.values[i]);
    // Written so that a NaN bound counts as a failure.
    const double ratio = error == 0 ? 0 : (allowed > 0 ? error / allowed : kInfinity);
    if (i == 0 || ratio > worst.ratio || (ratio == worst.ratio && error > worst.error)) {
      worst.ratio = ratio;
      worst.error = error;
      worst.bound = allowed;
      at = i;
    }
  }
  if (!want.values.empty()) {
    char numbers[80];
    std::snprintf(numbers, sizeof numbers, " got %.9g want %.9g", got.values[at], want.values[at]);
    worst.where = shape_text(index_of(at, want.shape)) + numbers;
  }
  return worst;
}

}  // namespace heed
