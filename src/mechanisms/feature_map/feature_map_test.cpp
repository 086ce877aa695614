// What a comparison with the cascades cannot show: identities of the papers, the parameters training
// starts from, bits across thread counts, NaN, extreme values, empty tensors and messages.
#include "heed/feature_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "mechanisms/test_arrays.h"

namespace heed {
namespace {

FeatureMapOptions options_for(FeatureKind kind, const Array& square, const Array& bias) {
  if (kind == FeatureKind::performer) return {square, {}};
  return {square, bias};
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

TEST(FeatureMap, SameBitsForAnyThreadCount) {
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Array x = random_array(type, {2, 3, 501, 24}, 1);
    const Array w = random_array(type, {3, 24, 24}, 2, 0.2), b = random_array(type, {3, 24}, 3);
    for (FeatureKind kind : kFeatureKinds) {
      const FeatureMapOptions options = options_for(kind, w, b);
      const Array one = feature_map(x, kind, options, {.threads = 1});
      const Array gradient = random_array(type, one.shape(), 4);
      for (int threads : {2, 5}) {
        const RunOptions run{.threads = threads};
        EXPECT_TRUE(same_bits(one, feature_map(x, kind, options, run))) << name_of(kind);
        const auto first = feature_map_backward(gradient, x, kind, options, run);
        const auto second = feature_map_backward(gradient, x, kind, options, run);
        EXPECT_TRUE(same_bits(first.x, second.x) && same_bits(first.weight, second.weight));
      }
    }
  }
}

TEST(FeatureMap, GradientsAreTheSameWithTheFeaturesOfTheForward) {
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    const Array x = random_array(type, {2, 3, 101, 24}, 1, 9);  // many features below the floor
    const Array w = random_array(type, {3, 24, 24}, 2, 0.2), b = random_array(type, {3, 24}, 3);
    const double bound = type == DType::f64 ? 0 : type == DType::f32 ? 2e-6 : 0.02;
    for (FeatureKind kind : kFeatureKinds) {
      FeatureMapOptions options = options_for(kind, w, b);
      const Array features = feature_map(x, kind, options);
      const Array gradient = random_array(type, features.shape(), 4);
      const auto again = feature_map_backward(gradient, x, kind, options);
      options.forward_features = features;
      const auto given = feature_map_backward(gradient, x, kind, options);
      const auto agree = [&](const Array& some, const Array& other) {
        const double size = largest_difference(other, filled(type, other.shape(), 0));
        const double difference = largest_difference(some, other);
        return difference <= bound * size;  // false for NaN
      };
      EXPECT_TRUE(agree(given.x, again.x)) << name_of(kind);
      EXPECT_TRUE(agree(given.weight, again.weight)) << name_of(kind);
      if (!options.bias.defined()) continue;
      EXPECT_TRUE(agree(given.bias, again.bias)) << name_of(kind);
    }
  }
}

TEST(FeatureMap, TaylorFeaturesMultiplyToThePolynomial) {
  const int64_t d = 11;
  const Array q = random_array(DType::f64, {1, 1, 6, d}, 1),
              k = random_array(DType::f64, {1, 1, 6, d}, 2);
  const Array fq = feature_map(q, FeatureKind::taylor2), fk = feature_map(k, FeatureKind::taylor2);
  ASSERT_EQ(fq.shape().back(), 1 + d + d * d);
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t j = 0; j < 6; ++j) {
      const double s = dot(q.as<double>() + i * d, k.as<double>() + j * d, d) / std::sqrt(d);
      const int64_t n = fq.shape().back();
      EXPECT_NEAR(dot(fq.as<double>() + i * n, fk.as<double>() + j * n, n), 1 + s + s * s / 2,
                  1e-12);
    }
  }
}

TEST(FeatureMap, IdentityHedgehogIsASumOfHyperbolicCosines) {
  const int64_t d = 8;
  const Array q = random_array(DType::f64, {1, 2, 5, d}, 1),
              k = random_array(DType::f64, {1, 2, 5, d}, 2);
  const Array identity = convert(hedgehog_identity(2, d, d), DType::f64);
  const Array fq = feature_map(q, FeatureKind::hedgehog_exp, {identity, {}});
  const Array fk = feature_map(k, FeatureKind::hedgehog_exp, {identity, {}});
  EXPECT_TRUE(same_bits(fq, feature_map(q, FeatureKind::hedgehog_exp)));
  for (int64_t i = 0; i < 10; ++i) {
    double sum = 0;
    for (int64_t f = 0; f < d; ++f) {
      sum += 2 * std::cosh(q.as<double>()[i * d + f] + k.as<double>()[i * d + f]);
    }
    EXPECT_NEAR(dot(fq.as<double>() + i * 2 * d, fk.as<double>() + i * 2 * d, 2 * d), sum,
                1e-12 * sum);
  }
}

TEST(FeatureMap, JointSoftmaxIsTheExponentialAtTwiceTheLayerOverItsSum) {
  const Array x = random_array(DType::f64, {1, 1, 7, 9}, 1);
  Array twice = convert(x, DType::f64);
  for (int64_t i = 0; i < twice.count(); ++i) twice.as<double>()[i] *= 2;
  const Array joint = feature_map(x, FeatureKind::hedgehog_joint);
  const Array e = feature_map(twice, FeatureKind::hedgehog_exp);
  for (int64_t row = 0; row < 7; ++row) {
    double sum = 0;
    for (int64_t f = 0; f < 18; ++f) sum += e.as<double>()[row * 18 + f];
    for (int64_t f = 0; f < 18; ++f) {
      EXPECT_NEAR(joint.as<double>()[row * 18 + f], e.as<double>()[row * 18 + f] / sum, 1e-14);
    }
  }
}

TEST(FeatureMap, PerformerEstimatesTheExponential) {
  // 40,000 directions: the estimate of exp(s) has a relative deviation of about
  // sqrt((exp |x + y|^2 - 1) / 40000) (sheet 11, 3.2); five of them are allowed.
  const int64_t d = 16, m = 40000;
  const Array q = random_array(DType::f64, {1, 1, 4, d}, 1, 0.5),
              k = random_array(DType::f64, {1, 1, 4, d}, 2, 0.5);
  for (bool orthogonal : {false, true}) {
    const Array w = convert(performer_projection(1, m, d, 7, orthogonal), DType::f64);
    const Array fq = feature_map(q, FeatureKind::performer, {w, {}});
    const Array fk = feature_map(k, FeatureKind::performer, {w, {}});
    for (int64_t i = 0; i < 4; ++i) {
      double s = 0, squares = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double a = q.as<double>()[i * d + c], b = k.as<double>()[i * d + c];
        s += a * b / std::sqrt(d);
        squares += (a + b) * (a + b) / std::sqrt(d);
      }
      const double estimate = dot(fq.as<double>() + i * m, fk.as<double>() + i * m, m);
      EXPECT_NEAR(estimate / std::exp(s), 1, 5 * std::sqrt(std::expm1(squares) / m)) << orthogonal;
    }
  }
}

TEST(Projection, IsReproducibleNormalAndOrthogonalInBlocks) {
  const Array a = performer_projection(3, 40, 16, 5), b = performer_projection(3, 40, 16, 5);
  EXPECT_TRUE(same_bits(a, b));
  EXPECT_FALSE(same_bits(a, performer_projection(3, 40, 16, 6)));
  // The first heads do not depend on how many follow.
  EXPECT_TRUE(same_bits(performer_projection(1, 40, 16, 5), a.view().slice(0, 0, 1)));
  for (int64_t h = 0; h < 3; ++h) {
    for (int64_t r = 0; r < 40; ++r) {
      for (int64_t s = r / 16 * 16; s < r; ++s) {
        double sum = 0;
        for (int64_t i = 0; i < 16; ++i) {
          sum += static_cast<double>(a.as<float>()[(h * 40 + r) * 16 + i]) *
                 static_cast<double>(a.as<float>()[(h * 40 + s) * 16 + i]);
        }
        EXPECT_NEAR(sum, 0, 1e-5);
      }
    }
  }
  for (bool orthogonal : {false, true}) {  // five standard errors of mean and variance
    const Array many = performer_projection(2, 4096, 8, 1, orthogonal);
    double sum = 0, squares = 0;
    const auto n = static_cast<double>(many.count());
    for (int64_t i = 0; i < many.count(); ++i) {
      const double x = static_cast<double>(many.as<float>()[i]);
      sum += x;
      squares += x * x;
    }
    EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
    EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
  }
  EXPECT_EQ(performer_projection(0, 3, 4, 1).count(), 0);
  EXPECT_EQ(performer_projection(2, 0, 4, 1).count(), 0);
  EXPECT_NE(error_of([] { performer_projection(1, -3, 4, 1); }).find("features is -3"),
            std::string::npos);
}

TEST(Identity, IsRectangular) {
  const Array wide = hedgehog_identity(2, 3, 5), tall = hedgehog_identity(1, 5, 3);
  for (int64_t i = 0; i < 15; ++i) {
    EXPECT_EQ(wide.as<float>()[15 + i], i / 5 == i % 5 ? 1 : 0);
    EXPECT_EQ(tall.as<float>()[i], i / 3 == i % 3 ? 1 : 0);
  }
}

TEST(FeatureMap, ExtremeInputsOverflowOnlyWhereTheFormulaDoes) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (DType type : {DType::f64, DType::f32, DType::bf16}) {
    for (Isa isa : available_isas()) {
      Array wide(DType::f64, {1, 1, 1, 3});
      double* x = wide.as<double>();
      x[0] = 5000, x[1] = -5000, x[2] = 1;
      const Array in = convert(wide, type);
      const auto values = [&](FeatureKind kind) {
        const Array out = convert(feature_map(in, kind, {}, {.isa = isa}), DType::f64);
        return std::vector<double>(out.as<double>(), out.as<double>() + out.count());
      };
      EXPECT_EQ(values(FeatureKind::exp)[0], kInf);
      EXPECT_EQ(values(FeatureKind::exp)[1], 0);
      EXPECT_EQ(values(FeatureKind::elu1)[1], 0);
      for (FeatureKind kind : {FeatureKind::hedgehog_softmax, FeatureKind::hedgehog_exp_max}) {
        const auto phi = values(kind);
        EXPECT_EQ(phi[0], 1);
        EXPECT_EQ(phi[4], 1);
        EXPECT_NEAR(phi[1], 1e-12, 1e-14);
      }
      EXPECT_EQ(values(FeatureKind::hedgehog_joint)[0], 0.5);
    }
  }
  // The floor of float16 is its smallest positive number.
  Array row(DType::f32, {1, 1, 1, 2});
  row.as<float>()[0] = 60, row.as<float>()[1] = -60;
  const Array half = feature_map(convert(row, DType::f16), FeatureKind::hedgehog_softmax);
  EXPECT_EQ(half.as<uint16_t>()[1], 1);
}

TEST(FeatureMap, NanStaysInItsRow) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (FeatureKind kind : kFeatureKinds) {
    for (Isa isa : available_isas()) {
      Array x = random_array(DType::f32, {1, 1, 40, 20}, 1);
      const Array w = random_array(DType::f32, {1, 20, 20}, 2, 0.2),
                  b = random_array(DType::f32, {1, 20}, 3);
      const FeatureMapOptions options = options_for(kind, w, b);
      const Array clean = feature_map(x, kind, options, {.isa = isa});
      x.as<float>()[13 * 20 + 17] = nan;
      const Array found = feature_map(x, kind, options, {.isa = isa});
      const int64_t n = found.shape().back();
      for (int64_t i = 0; i < found.count(); ++i) {
        if (i / n != 13) {
          ASSERT_EQ(found.as<float>()[i], clean.as<float>()[i]) << name_of(kind);
        } else if (kind != FeatureKind::taylor2 || i % n != 0) {
          ASSERT_TRUE(std::isnan(found.as<float>()[i])) << name_of(kind) << " " << i % n;
        }
      }
    }
  }
}

TEST(FeatureMap, EmptyTensors) {
  for (const Dims& shape : {Dims{0, 2, 5, 4}, Dims{1, 0, 5, 4}, Dims{1, 2, 0, 4}}) {
    const Array x(DType::f32, shape);
    const Array w = Array::zeros(DType::f32, {shape[1], 4, 4});
    const Array b = Array::zeros(DType::f32, {shape[1], 4});
    const Array out = feature_map(x, FeatureKind::hedgehog_exp, {w, b});
    EXPECT_EQ(out.shape(), (Dims{shape[0], shape[1], shape[2], 8}));
    const auto gradients = feature_map_backward(out, x, FeatureKind::hedgehog_exp, {w, b});
    for (int64_t i = 0; i < w.count(); ++i) EXPECT_EQ(gradients.weight.as<float>()[i], 0);
    for (int64_t i = 0; i < b.count(); ++i) EXPECT_EQ(gradients.bias.as<float>()[i], 0);
  }
}

TEST(FeatureMap, ErrorsNameTheArgument) {
  const auto says = [](const std::string& message, std::initializer_list<const char*> parts) {
    for (const char* part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
    }
  };
  const Array x = random_array(DType::f32, {1, 2, 5, 8}, 1);
  const Array w = random_array(DType::f32, {2, 8, 6}, 2), b = random_array(DType::f32, {2, 6}, 3);
  const Array half = convert(x, DType::bf16), half_w = convert(w, DType::bf16);
  const auto call = [&](const Tensor& in, FeatureKind kind, const Tensor& weight,
                        const Tensor& bias) {
    return error_of([&] { feature_map(in, kind, {weight, bias}); });
  };
  EXPECT_EQ(call(x, FeatureKind::exp, w, b), "");
  EXPECT_EQ(call(half, FeatureKind::exp, w, b), "");
  says(call({}, FeatureKind::exp, {}, {}), {"feature_map", "x is missing"});
  says(call(x.view().select(0, 0), FeatureKind::exp, {}, {}), {"x [2,5,8]", "4 are needed"});
  says(call(x, FeatureKind::exp, b, {}), {"weight [2,6]", "[2,8,D']"});
  says(call(x, FeatureKind::exp, w.view().slice(0, 0, 1), {}), {"weight [1,8,6]", "[2,8,6]"});
  says(call(x, FeatureKind::exp, w, w), {"bias [2,8,6]", "[2,6]"});
  says(call(x, FeatureKind::exp, {}, b), {"bias [2,6]", "[2,8]"});
  says(call(x, FeatureKind::exp, half_w, {}), {"weight", "bfloat16", "float32 is needed"});
  says(call(x, FeatureKind::performer, {}, {}), {"weight is missing", "[2,M,8]"});
  says(call(x, FeatureKind::performer, w, {}), {"weight [2,8,6]", "[2,8,8]"});
  const Array wp = random_array(DType::f32, {2, 6, 8}, 2);
  says(call(x, FeatureKind::performer, wp, b), {"bias", "performer takes none"});
  const Array wide(DType::f32, {1, 1, 1, 257});
  says(call(wide, FeatureKind::exp, {}, {}), {"257", "1 to 256"});
  const Tensor strided(x.view().data(), DType::f32, {1, 2, 5, 4}, {80, 40, 8, 2});
  says(call(strided, FeatureKind::exp, {}, {}), {"x has stride 2", "unit stride"});
  says(error_of([&] { feature_map(x, FeatureKind::exp, half); }), {"out", "float32 is needed"});
  says(error_of([&] { feature_map_backward(x, x, FeatureKind::hedgehog_exp); }),
       {"grad_out [1,2,5,8]", "[1,2,5,16]"});
  says(error_of([&] { feature_map_backward(x, x, FeatureKind::exp, {{}, {}, w}); }),
       {"forward_features [2,8,6]", "4 are needed"});
  says(error_of([&] { feature_map_backward(x, x, FeatureKind::exp, {}, {{}, w, {}}); }),
       {"gradient of weight", "nothing it belongs to"});
  says(error_of([] { parse_feature_kind("hedgehog"); }),
       {"'hedgehog'", "hedgehog_exp", "performer"});
  says(error_of([] { feature_count(FeatureKind::taylor2, 50000); }), {"taylor2", "2^31"});
}

}  // namespace
}  // namespace heed
