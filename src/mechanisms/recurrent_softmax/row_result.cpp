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

/// 1 / sqrt(m + eps / unit^2) for a mean of squares m of o, and the share that eps has of the root.
struct Root {
  double inverse = 0, eps_share = 0;
};
Root root_of(const RowKind& kind, const Row& row) {
  const double mean = row.square / kind.width;
  const double eps = kind.polynomial ? kind.eps : kind.eps * std::exp(-2 * row.statistic);
  if (mean + eps == 0) return {};
  return {1 / std::sqrt(mean + eps), std::isinf(eps) ? 1 : eps / (mean + eps)};
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
      if (norm == 0) return {};
      return {norm_counts(kind, row, norm) ? 1 / norm : unit_of(kind, row) / kLeastNorm, 0};
    }
    case Normalizer::rms:
      return {root_of(kind, row).inverse, 0};
    case Normalizer::layer: {
      const double inverse = root_of(kind, row).inverse;
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
  switch (kind.normalizer) {
    case Normalizer::softmax:
      if (!kind.polynomial) return {1, 0, 0, 0};
      return {scale, 0, 0, std::abs(t) >= kLeastDenominator ? -scale * scale * dot : 0};
    case Normalizer::l2: {
      const double norm = std::sqrt(row.square);
      if (norm_counts(kind, row, norm)) return {scale, -scale * (scale * dot), 0, 0};
      const double least = unit_of(kind, row) / kLeastNorm;
      return {least, 0, 0, kind.polynomial ? 0 : least * dot};
    }
    case Normalizer::rms: {
      const Root root = root_of(kind, row);
      const double pull = scale * (scale * dot) / kind.width;
      return {scale, -pull, 0, kind.polynomial ? 0 : scale * root.eps_share * dot};
    }
    case Normalizer::layer: {
      const Root root = root_of(kind, row);
      const double centred = dot - row.mean * gradient_sum;
      const double pull = scale * (scale * centred) / kind.width;
      return {scale, -pull, pull * (scale * row.mean) - scale * gradient_sum / kind.width,
              kind.polynomial ? 0 : scale * root.eps_share * centred};
    }
    case Normalizer::divide_by_count:
    case Normalizer::none:
      return {scale, 0, 0, kind.polynomial ? 0 : scale * dot};
    case Normalizer::clamped:
      break;
  }
  if (kind.polynomial) return {scale, 0, 0, t >= 1 ? -scale * scale * dot : 0};
  return {scale, 0, 0, t < 0 ? scale * dot : 0};
}

}  // namespace heed::recurrent
