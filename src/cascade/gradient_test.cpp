// Gradients against central differences of the interpreter, and the rules at ties and absent
// points.
#include <limits>

#include "cascade/test_support.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

Values seeds(const Values& outputs) {
  Values result;
  uint32_t seed = 100;
  for (const auto& [name, value] : outputs) result[name] = normal(value.shape, seed++);
  return result;
}

double loss(const Program& program, const Bindings& bindings, const Values& weights) {
  double total = 0;
  const Values outputs = evaluate(program, bindings);
  for (const auto& [name, weight] : weights) {
    const auto& values = outputs.at(name).values;
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) total += values[i] * weight.values[i];  // -inf of empty rows
    }
  }
  return total;
}

/// Every input element against (loss(x+h) - loss(x-h)) / 2h.
void expect_gradients(const Program& program, const Bindings& bindings, double bound = 1e-7) {
  const Values weights = seeds(evaluate(program, bindings));
  const Values found = gradient(program, bindings, weights);
  const double h = 1e-5;
  double largest = 0;
  for (const std::string& input : program.inputs()) {
    const NdArray& g = found.at(input);
    for (size_t i = 0; i < g.values.size(); ++i) {
      Bindings plus = bindings, minus = bindings;
      if (bindings.tensors.count(input) != 0) {
        plus.tensors[input].values[i] += h;
        minus.tensors[input].values[i] -= h;
      } else {
        plus.scalars[input] += h;
        minus.scalars[input] -= h;
      }
      const double expected =
          (loss(program, plus, weights) - loss(program, minus, weights)) / (2 * h);
      EXPECT_TRUE(std::abs(g.values[i] - expected) <= bound * std::max(1.0, std::abs(expected)))
          << input << " element " << i << " is " << g.values[i] << ", expected " << expected;
      largest = std::max(largest, std::abs(g.values[i]));
    }
  }
  EXPECT_GT(largest, 0);
}

TEST(Gradient, AttentionCascades) {
  const std::vector<AttentionCase> cases = {
      {.B = 1, .Lq = 3, .Lk = 5, .D = 2, .Dv = 2, .tile = 2},
      {.B = 1, .Lq = 4, .Lk = 4, .D = 2, .Dv = 2, .tile = 3, .causal = true},
      {.B = 1, .Lq = 5, .Lk = 3, .D = 2, .Dv = 2, .tile = 2, .causal = true},  // empty rows
      {.B = 2,
       .H = 2,
       .Hkv = 1,
       .Lq = 2,
       .Lk = 5,
       .D = 2,
       .Dv = 2,
       .tile = 2,
       .left = 1,
       .lengths = {0, 4}},
  };
  for (const char* name : {"softmax", "two_pass", "flash"}) {
    const Program program = parse_file(std::string("src/mechanisms/flash/") + name + ".cascade");
    for (const AttentionCase& c : cases) {
      SCOPED_TRACE(name);
      expect_gradients(program, bind_attention(c));
    }
  }
}

TEST(Gradient, AllAttentionCascadesAgree) {
  const AttentionCase c{
      .Lq = 20, .Lk = 40, .D = 8, .Dv = 6, .tile = 16, .causal = true, .lengths = {7, 40}};
  const Bindings bindings = bind_attention(c);
  const Program softmax = parse_file("src/mechanisms/flash/softmax.cascade");
  const Values weights = seeds(evaluate(softmax, bindings));
  const Values expected = gradient(softmax, bindings, weights);
  for (const char* name : {"two_pass", "flash"}) {
    SCOPED_TRACE(name);
    const Program program = parse_file(std::string("src/mechanisms/flash/") + name + ".cascade");
    const Values found = gradient(program, bindings, weights);
    for (const char* input : {"Q", "K", "V", "scale"}) {
      EXPECT_TRUE(near(found.at(input), expected.at(input), 1e-11)) << input;
    }
  }
}

TEST(Gradient, Sigmoid) {
  Bindings bindings = bind_attention({.B = 1, .Lq = 3, .Lk = 4, .D = 2, .Dv = 2, .causal = true});
  bindings.tensors["Bias"] = normal({4}, 8);
  bindings.indices["sb"] = [](std::span<const int64_t>) { return 0; };
  bindings.tensors["Alibi_Slopes"] = normal({1, 4}, 9);
  expect_gradients(parse_file("src/mechanisms/sigmoid/sigmoid.cascade"), bindings);
}

TEST(Gradient, Merge) {
  Bindings bindings;
  bindings.tensors = {{"OUT_A", normal({1, 2, 3, 2}, 1)},
                      {"LSE_A", normal({1, 2, 3}, 2)},
                      {"OUT_B", normal({1, 2, 3, 2}, 3)},
                      {"LSE_B", normal({1, 2, 3}, 4)}};
  const Program merge = parse_file("src/mechanisms/flash/merge.cascade");
  expect_gradients(merge, bindings);
  bindings.tensors["LSE_A"].values.assign(6, -kInf);
  bindings.tensors["LSE_B"].values.assign(6, -kInf);
  const Values found = gradient(merge, bindings, seeds(evaluate(merge, bindings)));
  for (const auto& [name, g] : found) {
    for (double x : g.values) EXPECT_EQ(x, 0) << name;
  }
}

TEST(Gradient, Operations) {
  Bindings bindings;
  bindings.tensors = {{"A", {{5}, {-1.3, -0.4, 0.3, 0.8, 2.1}}},
                      {"B", {{5}, {0.7, 1.4, 0.2, 2.2, 0.9}}}};
  bindings.scalars["s"] = 0.7;
  for (const char* line :
       {"A[p] + B[p] * s - A[p] / B[p]", "exp(A[p]) * log B[p]", "tanh(A[p]) + sigmoid(A[p] * s)",
        "sqrt(B[p]) - cos(A[p]) * sin(B[p])", "relu(A[p]) + gelu(A[p]) + abs(A[p])",
        "B[p]^A[p] + pow(B[p], 3)", "A[p]^2", "max(A[p], B[p]) * min(A[p], s)",
        "select(A[p] > 0, A[p] * B[p], B[p] - A[p])", "-A[p] * -(B[p])", "half(A[p] * B[p])",
        "A[p] * A[p-1] * A[P-1-p]", "A[p] * p + P * s"}) {
    SCOPED_TRACE(line);
    const std::string text =
        "cascade t\nrank p\nin A[p] B[p] s\nlet half(x) = x * x / 2\n"
        "out X[p] = ";
    expect_gradients(parse(text + line), bindings);
  }
}

TEST(Gradient, ReductionsRunningRanksAndSplits) {
  Bindings bindings;
  bindings.tensors = {{"A", normal({7}, 1)}, {"B", normal({7, 3}, 2)}, {"W", normal({3, 3}, 3)}};
  bindings.sizes["T"] = 3;
  bindings.indices["swap"] = [](auto i) { return i[0] ^ 1; };
  const std::string head =
      "cascade t\nrank n f g = F\nsplit n = t * T + i\nsplit n = t * T + j\nin A[n] B[n,f] "
      "W[f,g]\n";
  for (const char* body : {
           "out X[f] = A[n] * B[n,f] : n != 3",
           "out X[f] = max A[n] * B[n,f]",
           "out X[n] = min B[n,f]",
           "out X[t*T+i,f] = A[t*T+i] * sum_j[t,i,f]",
           "S[t] = max A[t,i]\nout X = sum S[t] * S[t]",
           "R[n+1,f] = R[n,f] * A[n] + B[n,f] ; R[0,f] = B[2,f]\nout X[f] = R[N,f]\nout Y[n] = max "
           "R[n,f]",
           "R[n+1,f] = R[n,f] * A[n] + B[n,f] : n != 2, n != 5 ; R[0,f] = 1\nout X[f] = R[N,f]",
           "M[n+1] = max(M[n], A[n]) ; M[0] = -inf\nout X[n] = exp(A[n] - M[n+1])",
           "U[n,f] = B[n,f] - sum W[f,g] * R[n,g]\nR[n+1,g] = R[n,g] + A[n] * U[n,g] ; R[0,g] = "
           "A[0] + 0*g\n"
           "out X[g] = R[N,g] * R[N-1,g]",
           "out X[n,f] = B[swap(n),f] * A[n-1]",
           "out X[f] = W[f,g] * B[0,g] - max B[n,f] + min A[n] * B[n,f]",
       }) {
    SCOPED_TRACE(body);
    std::string text = body;
    const std::string inner = "sum_j[t,i,f]";
    const size_t at = text.find(inner);
    if (at != std::string::npos) {  // linear attention inside a tile
      text = "L[t,i,f] = sum A[t,j] * B[t,j,f] : j <= i\n" +
             text.replace(at, inner.size(), "L[t,i,f]");
    }
    expect_gradients(parse(head + text), bindings);
  }
}

TEST(Gradient, TiesGoToTheFirstWinner) {
  Bindings bindings;
  bindings.tensors = {{"A", {{2, 3}, {1, 5, 5, 5, 5, 1}}}};
  const std::string head = "cascade t\nrank p m\nin A[p,m]\n";
  const auto run = [&](const std::string& line, const NdArray& g) {
    return gradient(parse(head + line), bindings, {{"X", g}}).at("A");
  };
  EXPECT_TRUE(near(run("out X[p] = max A[p,m]", {{2}, {1, 1}}), {{2, 3}, {0, 1, 0, 1, 0, 0}}, 0));
  EXPECT_TRUE(
      near(run("out X[m] = max A[p,m]", {{3}, {1, 1, 1}}), {{2, 3}, {0, 1, 1, 1, 0, 0}}, 0));
  EXPECT_TRUE(near(run("out X = max A[p,m]", scalar(1)), {{2, 3}, {0, 1, 0, 0, 0, 0}}, 0));
  EXPECT_TRUE(
      near(run("out X[p] = max(A[p,1], A[p,0])", {{2}, {1, 1}}), {{2, 3}, {0, 1, 0, 0, 1, 0}}, 0));
  // The order is that of the text, also where the last rank is the shorter one.
  bindings.tensors = {{"A", {{300, 2}, std::vector<double>(600, 1.0)}}};
  EXPECT_EQ(run("out X = max A[p,m]", scalar(1)).values[0], 1);
}

TEST(Gradient, AbsentPointsGetNoneEvenWhereTheyHoldNan) {
  Bindings bindings;
  const double nan = std::nan("");
  bindings.tensors = {{"A", {{4}, {1, nan, 2, nan}}}, {"B", {{4}, {3, 4, 5, nan}}}};
  bindings.predicates["keep"] = [](auto i) { return i[0] % 2 == 0; };
  const Program program = parse(
      "cascade t\nrank m\nin A[m] B[m]\nwhere keep(m)\n"
      "S[m] = A[m] : keep\nE[m] = exp(S[m])\nout X = E[m] * B[m]");
  const Values found = gradient(program, bindings, {{"X", scalar(1)}});
  EXPECT_TRUE(near(found.at("A"), {{4}, {3 * std::exp(1.0), 0, 5 * std::exp(2.0), 0}}, 1e-15));
  EXPECT_TRUE(near(found.at("B"), {{4}, {std::exp(1.0), 0, std::exp(2.0), 0}}, 1e-15));
}

TEST(Gradient, ARaggedTileBesideAbsentElements) {
  // The last tile holds one of its 50 tokens; the others stand behind the end of X.
  Bindings bindings;
  bindings.tensors = {{"A", {{51}, std::vector<double>(51, 2.0)}}};
  bindings.sizes["T"] = 50;
  const Program program =
      parse("cascade t\nrank n\nsplit n = t * T + i\nin A[n]\nout X[t*T+i] = A[t,i]^2 : i != 1");
  NdArray expected{{51}, std::vector<double>(51, 4.0)};
  expected.values[1] = 0;
  const Values found = gradient(program, bindings, {{"X", {{51}, std::vector<double>(51, 1.0)}}});
  EXPECT_TRUE(near(found.at("A"), expected, 0));
}

TEST(Gradient, NanOfASeenElementIsNotHidden) {
  Bindings bindings = bind_attention({.B = 1, .H = 1, .Hkv = 1, .Lq = 2, .Lk = 2});
  bindings.tensors["Q"].values[0] = std::nan("");
  const Program flash = parse_file("src/mechanisms/flash/flash.cascade");
  const Values found = gradient(flash, bindings, {{"O", normal({1, 1, 2, 3}, 1)}});
  EXPECT_TRUE(std::isnan(found.at("K").values[0]));
  EXPECT_TRUE(std::isnan(found.at("V").values[0]));
}

TEST(Gradient, InputsThatNothingReadsGetZeros) {
  Bindings bindings;
  bindings.tensors = {{"A", normal({3}, 1)}};
  const Program program = parse(
      "cascade t\nrank p\nin A[p] B[p] = 1 s = 2\nout X[p] = A[p]\n"
      "out Y[p] = B[p] * s");
  const Values found = gradient(program, bindings, {{"X", normal({3}, 2)}});
  EXPECT_TRUE(near(found.at("A"), normal({3}, 2), 0));
  EXPECT_TRUE(near(found.at("B"), {{3}, {0, 0, 0}}, 0));
  EXPECT_TRUE(near(found.at("s"), scalar(0), 0));
}

TEST(Gradient, SeedsMustBeOutputsOfTheRightShape) {
  Bindings bindings;
  bindings.tensors = {{"A", normal({3}, 1)}};
  const Program program = parse("cascade t\nrank p\nin A[p]\nS[p] = A[p]\nout X[p] = S[p]");
  EXPECT_THROW(gradient(program, bindings, {{"S", normal({3}, 2)}}), Error);
  EXPECT_THROW(gradient(program, bindings, {{"nothing", normal({3}, 2)}}), Error);
  EXPECT_THROW(gradient(program, bindings, {{"X", normal({4}, 2)}}), Error);
  EXPECT_THROW(gradient(program, bindings, {{"X", {{3}, {1}}}}), Error);
}

}  // namespace
}  // namespace heed::cascade
