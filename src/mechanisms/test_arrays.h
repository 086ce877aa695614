// Arrays and comparisons that the tests of the mechanisms share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "heed/error.h"
#include "heed/tensor.h"

namespace heed {

inline Array random_array(DType type, const Dims& shape, uint32_t seed, double size = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, size);
  Array wide(DType::f64, shape);
  for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = normal(generator);
  return convert(wide, type);
}

inline Array filled(DType type, const Dims& shape, double value) {
  Array wide(DType::f64, shape);
  std::fill_n(wide.as<double>(), wide.count(), value);
  return convert(wide, type);
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() && a.is_contiguous() &&
         b.is_contiguous() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.count()) * size_of(a.dtype())) == 0;
}

/// A gradient that only some calls want: as in a call that wants all, or left out.
inline bool same_bits_if(bool wanted, const Array& some, const Array& all) {
  if (!wanted || !some.view().defined()) return wanted == some.view().defined();
  return same_bits(some, all);
}

/// NaN where either has one, infinite where the shapes differ.
inline double largest_difference(const Tensor& a, const Tensor& b) {
  if (!(a.shape() == b.shape())) return INFINITY;
  const Array x = convert(a, DType::f64), y = convert(b, DType::f64);
  double most = 0;
  for (int64_t i = 0; i < x.count(); ++i) {
    const double d = std::abs(x.as<double>()[i] - y.as<double>()[i]);
    if (std::isnan(d)) return d;
    most = std::max(most, d);
  }
  return most;
}

/// Root mean square of a - b over that of b; NaN if any is.
inline double relative_error(const Tensor& a, const Tensor& b) {
  const Array x = convert(a, DType::f64), y = convert(b, DType::f64);
  double error = 0, size = 0;
  for (int64_t i = 0; i < x.count(); ++i) {
    const double d = x.as<double>()[i] - y.as<double>()[i];
    error += d * d;
    size += y.as<double>()[i] * y.as<double>()[i];
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

/// What the error says; empty when there is none.
template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace heed
