// Names and sizes of feature kinds, and the parameters that training starts from.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "base/philox.h"
#include "engine/operands.h"
#include "heed/error.h"
#include "heed/feature_map.h"
#include "mechanisms/nearest.h"

namespace heed {

namespace {

void require_sizes(const char* function,
                   std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, value] : sizes) {
    if (value < 0) {
      fail(function, std::string(name) + " is " + std::to_string(value), "0 or more is needed");
    }
  }
}

// Standard normal numbers by Box-Muller from a counter: number i of a stream never depends on others.
class Normal {
 public:
  Normal(uint64_t seed, uint32_t stream) : seed_(seed), stream_(stream) {}
  double next() {
    if (have_second_) {
      have_second_ = false;
      return second_;
    }
    const auto words = philox(
        seed_, {static_cast<uint32_t>(block_), static_cast<uint32_t>(block_ >> 32), stream_, 0});
    ++block_;
    const double uniform = (words[0] + 0.5) * 0x1p-32;  // never 0
    const double angle = 2 * std::numbers::pi * (words[1] * 0x1p-32);
    const double radius = std::sqrt(-2 * std::log(uniform));
    second_ = radius * std::sin(angle);
    have_second_ = true;
    return radius * std::cos(angle);
  }

 private:
  uint64_t seed_, block_ = 0;
  uint32_t stream_;
  double second_ = 0;
  bool have_second_ = false;
};

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// A unit vector orthogonal to the `done` rows before it: modified Gram-Schmidt, twice for rounding.
void orthogonal_direction(double* rows, int64_t done, int64_t dim, Normal& normal) {
  double* row = rows + done * dim;
  for (;;) {
    for (int64_t i = 0; i < dim; ++i) row[i] = normal.next();
    const double before = std::sqrt(dot(row, row, dim));
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t r = 0; r < done; ++r) {
        const double part = dot(row, rows + r * dim, dim);
        for (int64_t i = 0; i < dim; ++i) row[i] -= part * rows[r * dim + i];
      }
    }
    const double length = std::sqrt(dot(row, row, dim));
    if (length < 1e-8 * before) continue;  // drawn inside the span of the others
    for (int64_t i = 0; i < dim; ++i) row[i] /= length;
    return;
  }
}

void orthogonal_block(double* rows, int64_t count, int64_t dim, Normal& normal) {
  for (int64_t r = 0; r < count; ++r) orthogonal_direction(rows, r, dim, normal);
  for (int64_t r = 0; r < count; ++r) {  // lengths as independent normal vectors have them: chi(D)
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const double x = normal.next();
      squares += x * x;
    }
    const double length = std::sqrt(squares);
    for (int64_t i = 0; i < dim; ++i) rows[r * dim + i] *= length;
  }
}

}  // namespace

const char* name_of(FeatureKind kind) {
  switch (kind) {
    case FeatureKind::elu1:
      return "elu1";
    case FeatureKind::relu:
      return "relu";
    case FeatureKind::exp:
      return "exp";
    case FeatureKind::hedgehog_exp:
      return "hedgehog_exp";
    case FeatureKind::hedgehog_softmax:
      return "hedgehog_softmax";
    case FeatureKind::hedgehog_exp_max:
      return "hedgehog_exp_max";
    case FeatureKind::hedgehog_joint:
      return "hedgehog_joint";
    case FeatureKind::taylor2:
      return "taylor2";
    case FeatureKind::performer:
      return "performer";
  }
  return "?";
}

FeatureKind parse_feature_kind(std::string_view name) {
  std::vector<std::string> names;
  for (FeatureKind kind : kFeatureKinds) {
    if (name == name_of(kind)) return kind;
    names.emplace_back(name_of(kind));
  }
  fail("feature_map", "unknown kind '" + std::string(name) + "'" + did_you_mean(name, names),
       "known: " + joined(names));
}

int64_t feature_count(FeatureKind kind, int64_t width) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require_sizes("feature_count", {{"width", width}});
  if (width > kMost || (kind == FeatureKind::taylor2 && width > 46340)) {
    throw Error(std::string("feature_map: ") + name_of(kind) + " of width " +
                std::to_string(width) + " has more than 2^31 features");
  }
  switch (kind) {
    case FeatureKind::hedgehog_exp:
    case FeatureKind::hedgehog_softmax:
    case FeatureKind::hedgehog_exp_max:
    case FeatureKind::hedgehog_joint:
      return 2 * width;
    case FeatureKind::taylor2:
      return 1 + width + width * width;
    default:
      return width;
  }
}

Array hedgehog_identity(int64_t heads, int64_t dim, int64_t width) {
  require_sizes("hedgehog_identity", {{"heads", heads}, {"dim", dim}, {"width", width}});
  Array weight = Array::zeros(DType::f32, {heads, dim, width});
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < std::min(dim, width); ++i) {
      weight.as<float>()[(h * dim + i) * width + i] = 1;
    }
  }
  return weight;
}

Array performer_projection(int64_t heads, int64_t features, int64_t dim, uint64_t seed,
                           bool orthogonal) {
  require_sizes("performer_projection", {{"heads", heads}, {"features", features}, {"dim", dim}});
  Array projection(DType::f32, {heads, features, dim});
  if (projection.count() == 0) return projection;
  std::vector<double> rows(static_cast<size_t>(features * dim));
  for (int64_t h = 0; h < heads; ++h) {
    Normal normal(seed, static_cast<uint32_t>(h));
    if (orthogonal) {
      for (int64_t r = 0; r < features; r += dim) {
        orthogonal_block(rows.data() + r * dim, std::min(dim, features - r), dim, normal);
      }
    } else {
      for (double& x : rows) x = normal.next();
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      projection.as<float>()[h * features * dim + static_cast<int64_t>(i)] =
          static_cast<float>(rows[i]);
    }
  }
  return projection;
}

}  // namespace heed
