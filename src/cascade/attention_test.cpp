// The attention cascades of the repository against each other and against plain loops.
#include <limits>

#include "cascade/test_support.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const char* const kSoftmax = "src/mechanisms/flash/softmax.cascade";
const char* const kTwoPass = "src/mechanisms/flash/two_pass.cascade";
const char* const kFlash = "src/mechanisms/flash/flash.cascade";

struct Plain {
  NdArray out, lse;
};

/// One row: weights of the visible keys by `weight(score, m)`, normalised or not.
template <class Row>
void for_each_row(const AttentionCase& c, const Bindings& bindings, Row row) {
  const auto& q = bindings.tensors.at("Q").values;
  const auto& k = bindings.tensors.at("K").values;
  const double scale = bindings.scalars.at("scale");
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.H; ++h) {
      const int64_t g = h / (c.H / c.Hkv);
      for (int64_t p = 0; p < c.Lq; ++p) {
        std::vector<double> scores(static_cast<size_t>(c.Lk));
        for (int64_t m = 0; m < c.Lk; ++m) {
          double s = 0;
          for (int64_t e = 0; e < c.D; ++e) {
            s += q[static_cast<size_t>(((b * c.H + h) * c.Lq + p) * c.D + e)] *
                 k[static_cast<size_t>(((b * c.Hkv + g) * c.Lk + m) * c.D + e)];
          }
          scores[static_cast<size_t>(m)] = s * scale;
        }
        row(b, h, g, p, scores);
      }
    }
  }
}

Plain plain_softmax(const AttentionCase& c, const Bindings& bindings) {
  const auto& v = bindings.tensors.at("V").values;
  Plain result{{{c.B, c.H, c.Lq, c.Dv}, {}}, {{c.B, c.H, c.Lq}, {}}};
  for_each_row(c, bindings,
               [&](int64_t b, int64_t, int64_t g, int64_t p, const std::vector<double>& scores) {
                 double sum = 0;
                 std::vector<double> out(static_cast<size_t>(c.Dv));
                 for (int64_t m = 0; m < c.Lk; ++m) {
                   if (!sees(c, b, p, m)) continue;
                   const double w = std::exp(scores[static_cast<size_t>(m)]);
                   sum += w;
                   for (int64_t f = 0; f < c.Dv; ++f) {
                     out[static_cast<size_t>(f)] +=
                         w * v[static_cast<size_t>(((b * c.Hkv + g) * c.Lk + m) * c.Dv + f)];
                   }
                 }
                 for (double& x : out) result.out.values.push_back(sum == 0 ? 0.0 : x / sum);
                 result.lse.values.push_back(sum == 0 ? -kInf : std::log(sum));
               });
  return result;
}

std::vector<AttentionCase> cases() {
  return {
      {},
      {.causal = true},
      {.Lq = 11, .Lk = 7, .causal = true},  // the first rows see nothing
      {.causal = true, .left = 2},
      {.left = 1, .right = 2},
      {.H = 6, .Hkv = 1, .Lq = 1, .tile = 3},
      {.lengths = {0, 5}},
      {.causal = true, .lengths = {3, 11}},
      {.Lk = 12, .tile = 12},  // one tile
      {.Lk = 12, .tile = 1},   // the element-wise online softmax
      {.Lk = 300, .D = 300, .Dv = 2, .tile = 128, .causal = true},  // more than one chunk
      {.B = 1, .H = 1, .Hkv = 1, .Lq = 300, .Lk = 3, .D = 1, .Dv = 1},
  };
}

TEST(Attention, AllCascadesEqualPlainLoops) {
  for (const char* path : {kSoftmax, kTwoPass, kFlash}) {
    const Program program = parse_file(path);
    int number = 0;
    for (const AttentionCase& c : cases()) {
      SCOPED_TRACE(std::string(path) + " case " + std::to_string(number++));
      const Bindings bindings = bind_attention(c);
      const Plain expected = plain_softmax(c, bindings);
      const Values found = evaluate(program, bindings);
      EXPECT_TRUE(near(found.at("O"), expected.out, 1e-12));
      EXPECT_TRUE(near(found.at("LSE"), expected.lse, 1e-12));
    }
  }
}

TEST(Attention, LargeCaseIsFeasible) {
  const AttentionCase c{.H = 4, .Hkv = 4, .Lq = 130, .Lk = 130, .D = 64, .Dv = 64, .tile = 32};
  const Bindings bindings = bind_attention(c);
  const Plain expected = plain_softmax(c, bindings);
  for (const char* path : {kSoftmax, kTwoPass, kFlash}) {
    SCOPED_TRACE(path);
    EXPECT_TRUE(near(evaluate(parse_file(path), bindings).at("O"), expected.out, 1e-12));
  }
}

TEST(Attention, AddingAConstantToAllScoresChangesNothing) {
  const AttentionCase c;
  Bindings bindings = bind_attention(c);
  // A key dimension of ones with a large query component adds a constant to every score.
  for (size_t i = 0; i < bindings.tensors["K"].values.size(); i += 5) {
    bindings.tensors["K"].values[i] = 1;
  }
  const Program flash = parse_file(kFlash);
  const NdArray before = evaluate(flash, bindings).at("O");
  for (size_t i = 0; i < bindings.tensors["Q"].values.size(); i += 5) {
    bindings.tensors["Q"].values[i] += 1000;
  }
  EXPECT_TRUE(near(evaluate(flash, bindings).at("O"), before, 1e-11));
}

TEST(Attention, NanIsNeverHiddenWhereItIsSeenAndNeverLeaksWhereNot) {
  const AttentionCase c{.B = 1, .H = 1, .Hkv = 1, .Lq = 4, .Lk = 4, .causal = true};
  for (const char* path : {kSoftmax, kTwoPass, kFlash}) {
    SCOPED_TRACE(path);
    Bindings bindings = bind_attention(c);
    bindings.tensors["K"].values[2 * 5] = std::nan("");
    bindings.tensors["V"].values[3 * 3] = std::nan("");
    const NdArray out = evaluate(parse_file(path), bindings).at("O");
    for (int64_t p = 0; p < 4; ++p) {
      for (int64_t f = 0; f < 3; ++f) {
        EXPECT_EQ(std::isnan(out.values[static_cast<size_t>(p * 3 + f)]), p >= 2) << p << f;
      }
    }
  }
}

TEST(Attention, IntermediatesAreReturnedAndAbsentElementsAreTheIdentity) {
  const AttentionCase c{.B = 1, .H = 1, .Hkv = 1, .Lq = 3, .Lk = 3, .causal = true};
  const std::vector<std::string> also = {"A", "RM"};
  const Values softmax = evaluate(parse_file(kSoftmax), bind_attention(c),
                                  std::span<const std::string>(also).first(1));
  const NdArray& a = softmax.at("A");
  EXPECT_EQ(a.shape, (std::vector<int64_t>{1, 1, 3, 3}));
  EXPECT_DOUBLE_EQ(a.values[0], 1);
  EXPECT_EQ(a.values[1], 0);
  EXPECT_EQ(a.values[2], 0);
  EXPECT_NEAR(a.values[6] + a.values[7] + a.values[8], 1, 1e-15);
  EXPECT_THROW(evaluate(parse_file(kSoftmax), bind_attention(c), also), Error);
}

TEST(Attention, MergeOfTwoHalvesIsTheWhole) {
  const AttentionCase whole{.Lk = 10, .lengths = {7, 10}};
  const Bindings all = bind_attention(whole);
  const Program softmax = parse_file(kSoftmax);
  Bindings a = all, b = all;
  a.predicates["keep"] = [whole](auto i) { return sees(whole, i[0], i[1], i[2]) && i[2] < 8; };
  b.predicates["keep"] = [whole](auto i) { return sees(whole, i[0], i[1], i[2]) && i[2] >= 8; };
  const Values va = evaluate(softmax, a), vb = evaluate(softmax, b),
               expected = evaluate(softmax, all);
  Bindings pair;
  pair.tensors = {{"OUT_A", va.at("O")},
                  {"LSE_A", va.at("LSE")},
                  {"OUT_B", vb.at("O")},
                  {"LSE_B", vb.at("LSE")}};
  const Program merge = parse_file("src/mechanisms/flash/merge.cascade");
  Values found = evaluate(merge, pair);
  EXPECT_TRUE(near(found.at("O"), expected.at("O"), 1e-12));  // the second half of entry 0 is empty
  EXPECT_TRUE(near(found.at("LSE"), expected.at("LSE"), 1e-12));

  for (const char* name : {"OUT_A", "OUT_B"}) pair.tensors[name].values.assign(2 * 4 * 7 * 3, 0.0);
  for (const char* name : {"LSE_A", "LSE_B"}) pair.tensors[name].values.assign(2 * 4 * 7, -kInf);
  found = evaluate(merge, pair);
  for (double x : found.at("O").values) EXPECT_EQ(x, 0);
  for (double x : found.at("LSE").values) EXPECT_EQ(x, -kInf);
}

TEST(Attention, SigmoidEqualsPlainLoops) {
  const Program program = parse_file("src/mechanisms/sigmoid/sigmoid.cascade");
  for (const AttentionCase& c : cases()) {
    for (const bool alibi : {false, true}) {
      Bindings bindings = bind_attention(c);
      const NdArray bias = normal({c.H}, 4), slope = normal({c.H}, 5);
      bindings.tensors["Bias"] = bias;
      bindings.indices["sb"] = [](std::span<const int64_t>) { return 0; };  // one row for all
      const std::vector<double> none(slope.values.size());
      bindings.tensors["Alibi_Slopes"] = {{1, c.H}, alibi ? slope.values : none};
      const auto& v = bindings.tensors.at("V").values;
      NdArray expected{{c.B, c.H, c.Lq, c.Dv}, {}};
      for_each_row(
          c, bindings,
          [&](int64_t b, int64_t h, int64_t g, int64_t p, const std::vector<double>& scores) {
            std::vector<double> out(static_cast<size_t>(c.Dv));
            for (int64_t m = 0; m < c.Lk; ++m) {
              if (!sees(c, b, p, m)) continue;
              const double distance = std::abs(static_cast<double>(p + c.Lk - c.Lq - m));
              double s = scores[static_cast<size_t>(m)] + bias.values[static_cast<size_t>(h)];
              if (alibi) s -= slope.values[static_cast<size_t>(h)] * distance;
              for (int64_t f = 0; f < c.Dv; ++f) {
                out[static_cast<size_t>(f)] +=
                    v[static_cast<size_t>(((b * c.Hkv + g) * c.Lk + m) * c.Dv + f)] /
                    (1 + std::exp(-s));
              }
            }
            expected.values.insert(expected.values.end(), out.begin(), out.end());
          });
      EXPECT_TRUE(near(evaluate(program, bindings).at("O"), expected, 1e-12));
    }
  }
}

}  // namespace
}  // namespace heed::cascade
