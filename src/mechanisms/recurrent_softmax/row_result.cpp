#include "mechanisms/recurrent_softmax/row_result.h"

#include <algorithm>
#include <cmath>

namespace heed::recurrent {

namespace {

constexpr double kLeastNorm = 1e-12, kLeastDenominator = 1e-12;

/// num = unit * o: e^t of the exponential.
double unit_of(const RowKind& kind, const Row& row) {
  return kind.polynomial ? 1 : std::exp(row.statistic);
}

double safe_denominator(double den) {
  return std::copysign(std::max(std::abs(den), kLeastDenominator), den);
}

/// 1 / sqrt(m + eps / unit^2) for a mean of squares m of o.
double inverse_root(const RowKind& kind, const Row& row) {
  const double mean = row.square / kind.width;
  const double eps = kind.polynomial ? kind.eps : kind.eps * std::exp(-2 * row.statistic);
  return mean + eps == 0 ? 0 : 1 / std::sqrt(mean + eps);
}

/// max(|num|, least) is |num|: else the norm of num is replaced.
bool norm_counts(const RowKind& kind, const Row& row, double norm) {
  return kind.polynomial ? norm >= kLeastNorm : norm >= kLeastNorm * std::exp(-row.statistic);
}

bool sees_nothing(const RowKind& kind, const Row& row) {
  return row.keys == 0 || (!kind.polynomial && row.statistic == -INFINITY);
}

}  // namespace

RowResult row_result(const RowKind& kind, const Row& row) {
  if (sees_nothing(kind, row)) return {};
  const double t = row.statistic;
  switch (kind.normalizer) {
    case Normalizer::softmax:
      return {kind.polynomial ? 1 / safe_denominator(t) : 1, 0};
    case Normalizer::l2: {
      const double norm = std::sqrt(row.square);
      if (norm == 0) return {};  // the other factor may be infinite
      return {norm_counts(kind, row, norm) ? 1 / norm : unit_of(kind, row) / kLeastNorm, 0};
    }
    case Normalizer::rms:
      return {inverse_root(kind, row), 0};
    case Normalizer::layer: {
      const double inverse = inverse_root(kind, row);
      return {inverse, -inverse * row.mean};
    }
    case Normalizer::divide_by_count:
      return {kind.polynomial ? 1 / row.keys : std::exp(t - std::log(row.keys)), 0};
    case Normalizer::clamped:
      if (std::isnan(t)) return {t, 0};
      return {kind.polynomial ? 1 / std::max(t, 1.0) : std::exp(std::min(t, 0.0)), 0};
    case Normalizer::none:
      break;
  }
  return {unit_of(kind, row), 0};
}

RowGradient row_gradient(const RowKind& kind, const Row& row, double gradient_dot_row,
                         double gradient_sum) {
  if (sees_nothing(kind, row)) return {};
  const double scale = row_result(kind, row).scale, t = row.statistic;
  const double dot = gradient_dot_row;
  RowGradient gradient{scale, 0, 0, 0, !kind.polynomial};
  switch (kind.normalizer) {
    case Normalizer::softmax:
      gradient.of_num_alone = false;
      if (kind.polynomial && std::abs(t) >= kLeastDenominator) gradient.den = -scale * scale * dot;
      break;
    case Normalizer::l2:
      if (row.square == 0) {
        gradient.of_gradient = unit_of(kind, row) / kLeastNorm;
      } else if (norm_counts(kind, row, std::sqrt(row.square))) {
        gradient.of_row = -scale * (scale * dot);
      }
      break;
    case Normalizer::rms:
      gradient.of_row = -scale * (scale * dot) / kind.width;
      break;
    case Normalizer::layer: {
      const double pull = scale * (scale * (dot - row.mean * gradient_sum)) / kind.width;
      gradient.of_row = -pull;
      gradient.constant = pull * (scale * row.mean) - scale * gradient_sum / kind.width;
      break;
    }
    case Normalizer::clamped:
      if (kind.polynomial && t >= 1) gradient.den = -scale * scale * dot;
      gradient.of_num_alone = gradient.of_num_alone && t < 0;
      break;
    case Normalizer::divide_by_count:
    case Normalizer::none:
      break;
  }
  return gradient;
}

}  // namespace heed::recurrent
