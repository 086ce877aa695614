// What the tests of mechanisms with a running state share.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "mechanisms/test_arrays.h"

namespace heed {

inline Array numbers(std::initializer_list<double> values) {
  Array result(DType::f64, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), result.as<double>());
  return result;
}

inline double inner(const Tensor& a, const Tensor& b) {
  const Array x = convert(a, DType::f64), y = convert(b, DType::f64);
  double sum = 0;
  for (int64_t i = 0; i < x.count(); ++i) sum += x.as<double>()[i] * y.as<double>()[i];
  return sum;
}

inline void expect_says(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
  }
}

}  // namespace heed
