// The backward of the tile kernels, and what changes scores on their way to weights, against plain
// loops in double, on every instruction set this machine has and on the emulated tile unit.
#include <gtest/gtest.h>

#include "kernels/tile_test.h"

namespace heed::kernels {
namespace {

double slope_of(WeightKind kind, int order, double t, double weight) {
  return kind == WeightKind::softmax   ? weight
         : kind == WeightKind::sigmoid ? weight * (1 / (1 + std::exp2(t)))
         : order == 0                  ? 0
                                       : taylor(t, order - 1);
}

// Pivots of a backward are log-sum-exps: a weight above 1 is their rounding.
double backward_weight(WeightKind kind, int order, double t, double pivot) {
  const double weight = weight_of(kind, order, t, pivot);
  return kind == WeightKind::softmax && weight > 1 ? 1 : weight;
}

template <class T>
void check_gradients(const TileKernels<T>& k, WeightKind kind, const WeightShape<T>& shape,
                     int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
  const Buffer<T> scores = random_block<T>(rows, keys, ranges, true, 3);
  Buffer<T> s = scores, dp = random_block<T>(rows, keys, ranges, false, 4);
  // A key that a mask hides may have any value.
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < keys; ++m) {
      if (is_masked(r, m)) dp.block().row(r)[m] = static_cast<T>(kNaN);
    }
  }
  Buffer<T> given = dp, start = scores;
  std::vector<T> pivot = random_row<T>(rows, 5), shift = random_row<T>(rows, 6);
  if (rows > 4) pivot[4] = static_cast<T>(-kInf);
  if (rows > 6) pivot[6] = static_cast<T>(kInf);
  const bool softmax = kind == WeightKind::softmax, sigmoid = kind == WeightKind::sigmoid;
  k.gradients[static_cast<int>(kind)](s.block(), dp.block(), rows, keys, data_of(ranges), shape,
                                      softmax ? pivot.data() : nullptr,
                                      sigmoid ? nullptr : shift.data());
  const double unit = sizeof(T) == 8 ? 1e-14 : 4e-7;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = static_cast<size_t>(r);
    for (int64_t m = 0; m < (k.half_operands ? keys : round_up(keys, k.key_multiple)); ++m) {
      const T w = s.block().row(r)[m], ds = dp.block().row(r)[m];
      const double t =
          m < keys && sees(ranges, r, m) ? shaped(shape, start.block().row(r), r, m) : -kInf;
      if (t == -kInf || (softmax && std::isinf(pivot[row]))) {
        ASSERT_EQ(w, 0) << k.name << " row " << r << " key " << m;
        ASSERT_EQ(ds, 0) << k.name << " row " << r << " key " << m;
        continue;
      }
      const double want = backward_weight(kind, shape.order, t, softmax ? double{pivot[row]} : 0);
      const double factor = given.block().row(r)[m] + (sigmoid ? 0 : double{shift[row]});
      const double bound = unit * weight_magnitude(kind, shape, start.block().row(r), r, m, want,
                                                   softmax ? double{pivot[row]} : 0);
      ASSERT_NEAR(w, want, bound) << k.name << " row " << r << " key " << m;
      const double size =
          std::abs(double{given.block().row(r)[m]}) + (sigmoid ? 0 : std::abs(double{shift[row]}));
      ASSERT_NEAR(ds, slope_of(kind, shape.order, t, want) * factor, 3 * bound * size)
          << k.name << " row " << r << " key " << m;
    }
  }
}

template <class T>
void check_all_gradients(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    for (T slope : {T(0), T(0.1)}) {
      for (T scale : {T(1.3), T(0)}) {
        check_gradients<T>(k, WeightKind::softmax, {.scale = scale, .slope = slope, .distance = 4},
                           rows, keys, ranges);
        check_gradients<T>(k, WeightKind::sigmoid,
                           {.scale = scale, .bias = -3, .slope = slope, .distance = -6}, rows, keys,
                           ranges);
        for (int order : {0, 1, 2, 5}) {
          check_gradients<T>(k, WeightKind::polynomial,
                             {.scale = scale, .order = order, .slope = slope}, rows, keys, ranges);
        }
      }
    }
  });
}

TEST(TileGradients, EveryKind) {
  for_all_tables([](const auto& k) { check_all_gradients(k); });
}

// Where weights vanish or overflow, gradients are 0 or infinite, not junk; NaN stays.
template <class T>
void check_extreme_gradients(const TileKernels<T>& k) {
  for (WeightKind kind : {WeightKind::softmax, WeightKind::sigmoid, WeightKind::polynomial}) {
    for (double extreme : {1e4, -1e4, 150.0, -150.0, double{kInf}, -double{kInf}, double{kNaN}}) {
      Buffer<T> s(1, 64, static_cast<T>(extreme)), dp(1, 64, T(1));
      const T pivot = 0, shift = 0;
      k.gradients[static_cast<int>(kind)](s.block(), dp.block(), 1, 40, nullptr, {.order = 2},
                                          &pivot, &shift);
      for (int64_t m = 0; m < 40; ++m) {
        const double w = s.block().row(0)[m], ds = dp.block().row(0)[m];
        if (std::isnan(extreme)) {
          ASSERT_TRUE(std::isnan(w) && std::isnan(ds)) << k.name;
          continue;
        }
        const double want =
            extreme == -kInf ? 0 : double{static_cast<T>(backward_weight(kind, 2, extreme, 0))};
        ASSERT_EQ(std::isinf(w), std::isinf(want)) << k.name << " " << extreme;
        if (!std::isinf(want)) {
          ASSERT_NEAR(w, want, 1e-5 * want + 1e-37) << k.name << " " << extreme;
        }
        if (kind == WeightKind::sigmoid) {
          ASSERT_NEAR(ds, 0, 1e-37 + (std::abs(extreme) == 150 ? 1e-30 : 0)) << k.name;
        }
      }
    }
  }
}

TEST(TileGradients, ExtremesStayDefined) {
  for_all_tables([](const auto& k) { check_extreme_gradients(k); });
}

template <class T>
void check_parallax(const TileKernels<T>& k, const WeightShape<T>& shape, int64_t rows,
                    int64_t keys, const std::vector<KeyRange>* ranges) {
  Buffer<T> s = random_block<T>(rows, keys, ranges, true, 3),
            t = random_block<T>(rows, keys, ranges, false, 4),
            a = random_block<T>(rows, keys, ranges, false, 5);
  Buffer<T> scores = s, probes = t, dots = a;
  std::vector<T> pivot = random_row<T>(rows, 6), mean = random_row<T>(rows, 7),
                 dot_out = random_row<T>(rows, 8), dot_mean = random_row<T>(rows, 9);
  if (rows > 4) pivot[4] = static_cast<T>(-kInf);
  k.parallax_gradients(s.block(), t.block(), a.block(), rows, keys, data_of(ranges), shape,
                       pivot.data(), mean.data(), dot_out.data(), dot_mean.data());
  const double unit = sizeof(T) == 8 ? 1e-13 : 2e-6;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = static_cast<size_t>(r);
    for (int64_t m = 0; m < keys; ++m) {
      const double score = sees(ranges, r, m) ? shaped(shape, scores.block().row(r), r, m) : -kInf;
      const double got[] = {s.block().row(r)[m], a.block().row(r)[m], t.block().row(r)[m]};
      double want[3] = {}, p = 0, size = 0;
      if (score != -kInf && !std::isinf(pivot[row])) {
        p = backward_weight(WeightKind::softmax, 0, score, pivot[row]);
        const double lag = double{mean[row]} - probes.block().row(r)[m];
        const double dot = dots.block().row(r)[m], above = dot - dot_mean[row];
        want[0] = p * (1 + lag);
        want[1] = p * (dot - dot_out[row] + lag * above);
        want[2] = -p * above;
        size = (4 + std::abs(score) + std::abs(double{pivot[row]})) * (2 + std::abs(lag)) *
               (2 + std::abs(dot) + std::abs(above) + std::abs(double{dot_out[row]}));
      }
      for (int i = 0; i < 3; ++i) {
        ASSERT_NEAR(got[i], want[i], unit * p * size) << k.name << " " << i << " row " << r;
      }
    }
  }
}

template <class T>
void check_all_parallax(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    for (T slope : {T(0), T(0.1)}) {
      for (T scale : {T(0.7), T(0)}) {
        check_parallax<T>(k, {.scale = scale, .slope = slope}, rows, keys, ranges);
      }
    }
  });
}

TEST(TileGradients, Parallax) {
  for_all_tables([](const auto& k) { check_all_parallax(k); });
}

template <class T>
void check_caps(const TileKernels<T>& k, const ScoreCaps<T>& caps, bool with_slope, int64_t rows,
                int64_t keys, const std::vector<KeyRange>* ranges) {
  Buffer<T> s = random_block<T>(rows, keys, ranges, false, 3);
  // From far below the softcap to far above it.
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < keys; ++m) {
      s.block().row(r)[m] *= static_cast<T>(std::pow(10.0, double((r + m) % 8) - 4));
    }
  }
  Buffer<T> given = s, slope(rows, s.stride, T(7));
  const T scale = T(1.25);
  k.cap_scores(s.block(), rows, keys, data_of(ranges), scale, caps,
               with_slope ? slope.block() : Block<T>{});
  const double unit = 8 * (sizeof(T) == 8 ? 0x1p-53 : 0x1p-24);  // eight roundings
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < keys; ++m) {
      if (!sees(ranges, r, m)) continue;
      double want = given.block().row(r)[m] * double{scale}, derivative = 1;
      if (caps.softcap > 0) {
        const double size = std::exp(-2 * std::abs(want / caps.softcap));
        derivative = 4 * size / ((1 + size) * (1 + size));
        want = caps.softcap * std::tanh(want / caps.softcap);
      }
      if (want > caps.most) {
        derivative = 0;
        want = caps.most;
      }
      ASSERT_NEAR(s.block().row(r)[m], want, unit * std::abs(want)) << k.name;
      if (!with_slope) continue;
      const double x = std::abs(given.block().row(r)[m]) * double{scale};
      const double steepness = caps.softcap > 0 ? 2 + 2 * x / caps.softcap : 2;
      // Zero may stand for what is below the last bit of the tanh.
      ASSERT_NEAR(slope.block().row(r)[m], derivative, unit * steepness * derivative + unit * 1e-4)
          << k.name << " at " << want;
    }
  }
}

template <class T>
void check_all_caps(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    for (const ScoreCaps<T>& caps :
         {ScoreCaps<T>{}, ScoreCaps<T>{.softcap = T(1.5)}, ScoreCaps<T>{.most = T(0.5)},
          ScoreCaps<T>{.softcap = 20, .most = 5}}) {
      check_caps<T>(k, caps, true, rows, keys, ranges);
      check_caps<T>(k, caps, false, rows, keys, ranges);
    }
  });
  Buffer<T> s(1, 64, static_cast<T>(kNaN)), slope(1, 64);
  s.memory[1] = static_cast<T>(kInf);
  s.memory[2] = static_cast<T>(-kInf);
  k.cap_scores(s.block(), 1, 3, nullptr, 1, {.softcap = 3, .most = 2}, slope.block());
  EXPECT_TRUE(std::isnan(s.memory[0]) && std::isnan(slope.memory[0])) << k.name;
  EXPECT_EQ(s.memory[1], 2) << k.name;
  EXPECT_EQ(s.memory[2], -3) << k.name;
  EXPECT_EQ(slope.memory[1], 0) << k.name;
}

TEST(TileCaps, ValuesAndSlopes) {
  for_all_tables([](const auto& k) { check_all_caps(k); });
}

template <class T>
void check_second_weights(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    Buffer<T> w = random_block<T>(rows, keys, ranges, false, 3),
              t = random_block<T>(rows, keys, ranges, false, 4);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = 0; m < keys; ++m) {
        if (!is_masked(r, m)) continue;
        w.block().row(r)[m] = 0;
        t.block().row(r)[m] = static_cast<T>(kNaN);
      }
    }
    const size_t element = k.half_operands ? 2 : sizeof(T);
    std::vector<std::byte> weights(w.memory.size() * element), second(weights.size());
    if (k.half_operands) {
      k.round_weights({w.memory.data(), w.stride}, rows, keys, weights.data(), w.stride);
    } else {
      std::memcpy(weights.data(), w.memory.data(), weights.size());
    }
    std::vector<T> carry = random_row<T>(rows, 5), sum = random_row<T>(rows, 6), before = sum;
    std::vector<T> shift = random_row<T>(rows, 7);
    for (int64_t r = 0; r < rows; r += 2) shift[static_cast<size_t>(r)] = -kInf;
    const std::vector<T> given = shift;
    k.second_weights(weights.data(), w.stride, t.block(), rows, keys, data_of(ranges), carry.data(),
                     shift.data(), sum.data(), second.data());
    const double unit = sizeof(T) == 8 ? 1e-15 : 2e-7, rounding = k.half_operands ? 0x1p-8 : unit;
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = static_cast<size_t>(r);
      double total = double{carry[row]} * before[row], magnitude = 1 + std::abs(total);
      double mean = 0, weight = 0, spread = 0;
      for (int64_t m = 0; m < keys; ++m) {
        const double p = weight_at(k, weights, w.stride, r, m), x = t.block().row(r)[m];
        if (!sees(ranges, r, m) || p == 0) continue;
        mean += p * x;
        weight += p;
        spread += std::abs(p * x) + std::abs(p);
      }
      if (!std::isinf(given[row]) || weight == 0) {
        ASSERT_EQ(shift[row], given[row]) << k.name << " row " << r;
      } else {
        mean /= weight;
        ASSERT_NEAR(shift[row], mean, 8 * unit * (1 + std::abs(mean)) * spread / std::abs(weight));
      }
      const double offset = std::isinf(shift[row]) ? 0 : double{shift[row]};
      for (int64_t m = 0; m < keys; ++m) {
        double want = 0, size = 0;
        if (sees(ranges, r, m) && !is_masked(r, m)) {
          const double p = weight_at(k, weights, w.stride, r, m), x = t.block().row(r)[m];
          if (p != 0) want = p * (x - offset);
          if (p != 0) size = std::abs(p) * (std::abs(x) + std::abs(offset));
        }
        ASSERT_NEAR(weight_at(k, second, w.stride, r, m), want,
                    rounding * std::abs(want) + unit * size)
            << k.name << " row " << r;
        total += want;
        magnitude += size;
      }
      ASSERT_NEAR(sum[row], total, 4 * unit * magnitude) << k.name << " row " << r;
    }
  });
}

TEST(TileWeights, SecondStream) {
  for_all_tables([](const auto& k) { check_second_weights(k); });
}

// Blocks of T as operands of bfloat16 products: rounded to nearest even, padded with zeros.
template <class T>
void check_rounding(const TileKernels<T>& k) {
  if constexpr (sizeof(T) == 4) {
    if (!k.half_operands) return;
    for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>*) {
      const Buffer<float> from = random_block<float>(rows, keys, kNoRanges, false, 3);
      const int64_t stride = round_up(keys, 32) + 2;
      std::vector<uint16_t> rounded(static_cast<size_t>(rows * stride), 0xffff);
      std::vector<uint16_t> paired(static_cast<size_t>((rows + 1) / 2 * stride * 2), 0xffff);
      k.round_weights({from.memory.data(), from.stride}, rows, keys, rounded.data(), stride);
      k.pair_weights({from.memory.data(), from.stride}, rows, keys, paired.data(), stride);
      for (int64_t r = 0; r < round_up(rows, 2); ++r) {
        for (int64_t m = 0; m < round_up(keys, 32); ++m) {
          const auto at = static_cast<size_t>(r * from.stride + m);
          const uint16_t want = r < rows && m < keys ? to_bfloat16(from.memory[at]).bits : 0;
          if (r < rows) {
            ASSERT_EQ(rounded[static_cast<size_t>(r * stride + m)], want) << k.name;
          }
          ASSERT_EQ(paired[static_cast<size_t>((r / 2 * stride + m) * 2 + r % 2)], want) << k.name;
        }
        ASSERT_EQ(paired[static_cast<size_t>((r / 2 * stride + stride - 1) * 2)], 0xffff);
      }
    });
  }
}

TEST(TileWeights, RoundedToHalfOperands) {
  for_all_tables([](const auto& k) { check_rounding(k); });
}

}  // namespace
}  // namespace heed::kernels
