// Helpers of this folder's tests: files, arrays from a seed, attention cases, comparisons.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>

#include "cascade/cascade.h"

namespace heed::cascade {

/// Tests run in the root of the repository.
inline Program parse_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot open " + path);
  std::stringstream text;
  text << file.rdbuf();
  return parse(text.str(), path);
}

inline int64_t count_of(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t extent : shape) n *= extent;
  return n;
}

inline NdArray normal(std::vector<int64_t> shape, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution;
  NdArray a{std::move(shape), {}};
  a.values.resize(static_cast<size_t>(count_of(a.shape)));
  for (double& x : a.values) x = distribution(generator);
  return a;
}

struct AttentionCase {
  int64_t B = 2, H = 4, Hkv = 2, Lq = 7, Lk = 11, D = 5, Dv = 3, tile = 4;
  bool causal = false;
  int64_t left = -1, right = -1;
  std::vector<int64_t> lengths = {};
};

inline bool sees(const AttentionCase& c, int64_t b, int64_t p, int64_t m) {
  const int64_t offset = c.Lk - c.Lq;
  if (c.causal && m > p + offset) return false;
  if (c.left >= 0 && m < p + offset - c.left) return false;
  if (c.right >= 0 && m > p + offset + c.right) return false;
  return c.lengths.empty() || m < c.lengths[static_cast<size_t>(b)];
}

inline Bindings bind_attention(const AttentionCase& c) {
  Bindings bindings;
  bindings.tensors["Q"] = normal({c.B, c.H, c.Lq, c.D}, 1);
  bindings.tensors["K"] = normal({c.B, c.Hkv, c.Lk, c.D}, 2);
  bindings.tensors["V"] = normal({c.B, c.Hkv, c.Lk, c.Dv}, 3);
  bindings.scalars["scale"] = 1 / std::sqrt(static_cast<double>(c.D));
  bindings.sizes["M0"] = c.tile;
  bindings.predicates["keep"] = [c](std::span<const int64_t> i) {
    return sees(c, i[0], i[1], i[2]);
  };
  bindings.indices["g"] = [c](std::span<const int64_t> i) { return i[0] / (c.H / c.Hkv); };
  return bindings;
}

/// Equal within `bound`, relative to 1; equal infinities are equal, NaN never is.
inline ::testing::AssertionResult near(const NdArray& found, const NdArray& expected,
                                       double bound) {
  if (found.shape != expected.shape) return ::testing::AssertionFailure() << "shapes differ";
  if (found.values.size() != expected.values.size()) {
    return ::testing::AssertionFailure() << "sizes differ";
  }
  for (size_t i = 0; i < found.values.size(); ++i) {
    const double f = found.values[i], e = expected.values[i];
    const bool good = f == e || std::abs(f - e) <= bound * std::max(1.0, std::abs(e));
    if (!good) {
      return ::testing::AssertionFailure() << "element " << i << " is " << f << ", expected " << e;
    }
  }
  return ::testing::AssertionSuccess();
}

inline NdArray scalar(double value) { return {{}, {value}}; }

}  // namespace heed::cascade
