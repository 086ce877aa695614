// What the statements of the language mean: reductions, absent points, splits, running ranks,
// indices, batch ranks, functions, sizes. Each case has its values written out or computed by plain
// loops.
#include <limits>

#include "cascade/test_support.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

NdArray vec(std::vector<double> values) {
  const auto n = static_cast<int64_t>(values.size());
  return {{n}, std::move(values)};
}

NdArray run(const std::string& text, const Bindings& bindings, const std::string& output) {
  return evaluate(parse(text), bindings).at(output);
}

Bindings with(std::map<std::string, NdArray> tensors) {
  Bindings bindings;
  bindings.tensors = std::move(tensors);
  return bindings;
}

TEST(Language, EachTermReducesOverTheRanksThatTheLeftSideLacks) {
  const Bindings b = with({{"A", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"B", vec({10, 20})}});
  const char* head = "cascade t\nrank p m\nin A[p,m] B[p]\n";
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = A[p,m] - B[p]", b, "X"), vec({-4, -5}), 0));
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = -B[p] + max A[p,m] * A[p,m]", b, "X"),
                   vec({-1, 16}), 0));
  EXPECT_TRUE(near(run(std::string(head) + "out X[m] = min A[p,m]", b, "X"), vec({1, 2, 3}), 0));
  EXPECT_TRUE(near(run(std::string(head) + "out X = A[p,m] * B[p]", b, "X"), scalar(360), 0));
  EXPECT_TRUE(
      near(run(std::string(head) + "out X[p] = 2 * B[p]^2 / 4", b, "X"), vec({50, 200}), 0));
}

TEST(Language, EmptyReductionsAreTheIdentity) {
  const Bindings b = with({{"A", {{2, 0}, {}}}});
  const char* head = "cascade t\nrank p m\nin A[p,m]\n";
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = sum A[p,m]", b, "X"), vec({0, 0}), 0));
  EXPECT_TRUE(
      near(run(std::string(head) + "out X[p] = max A[p,m]", b, "X"), vec({-kInf, -kInf}), 0));
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = min A[p,m]", b, "X"), vec({kInf, kInf}), 0));
}

TEST(Language, RulesOfEmptyRows) {
  const Bindings b =
      with({{"A", vec({-kInf, -kInf, 0, 3, -kInf})}, {"B", vec({-kInf, 1, 0, 0, kInf})}});
  const char* head = "cascade t\nrank p\nin A[p] B[p]\n";
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = exp(A[p] - B[p])", b, "X"),
                   vec({0, 0, 1, std::exp(3.0), 0}), 0));
  EXPECT_TRUE(near(run(std::string(head) + "out X[p] = A[p] - B[p]", b, "X"),
                   vec({-kInf, -kInf, 0, 3, -kInf}), 0));
  const NdArray quotient = run(std::string(head) + "out X[p] = A[p] / B[p]", b, "X");
  EXPECT_TRUE(std::isnan(quotient.values[0]));  // -inf / -inf is no empty row
  EXPECT_EQ(quotient.values[2], 0);             // 0 / 0 is
  EXPECT_EQ(quotient.values[3], kInf);
}

TEST(Language, NanIsNotHiddenByMaxMinOrZero) {
  const double nan = std::nan("");
  const Bindings b = with({{"A", {{3, 2}, {nan, 1, 1, nan, 2, 1}}}, {"Z", vec({0, 0})}});
  const char* head = "cascade t\nrank p m\nin A[p,m] Z[m]\n";
  for (const char* line :
       {"out X[p] = max A[p,m]", "out X[p] = min A[p,m]", "out X[p] = A[p,m] * Z[m]",
        "out X[p] = sum relu(A[p,m])", "out X[p] = sum max(A[p,m], Z[m])",
        "out X[p] = sum min(Z[m], A[p,m])", "out X[p] = sum Z[m] / A[p,m]"}) {
    SCOPED_TRACE(line);
    const NdArray x = run(std::string(head) + line, b, "X");
    EXPECT_TRUE(std::isnan(x.values[0]));
    EXPECT_TRUE(std::isnan(x.values[1]));
    EXPECT_FALSE(std::isnan(x.values[2]));
  }
}

TEST(Language, FiltersLeaveOutPointsAndElements) {
  Bindings b = with({{"A", {{3, 3}, {1, 2, 3, 4, 5, 6, 7, 8, 9}}}});
  b.predicates["keep"] = [](auto i) { return i[1] < i[0]; };
  const std::string head = "cascade t\nrank p m\nin A[p,m]\nwhere keep(p,m)\n";
  EXPECT_TRUE(near(run(head + "out X[p] = sum A[p,m] : keep", b, "X"), vec({0, 4, 15}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = max A[p,m] : keep", b, "X"), vec({-kInf, 4, 8}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = max A[p,m] : keep(m,p)", b, "X"), vec({3, 6, -kInf}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = sum A[p,m] : keep, m > 0", b, "X"), vec({0, 0, 8}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = sum A[p,m] : p - m == 1", b, "X"), vec({0, 4, 8}), 0));
  EXPECT_TRUE(
      near(run(head + "out X[p] = sum A[p,m] : m != 1, 2*p >= m + 1", b, "X"), vec({0, 4, 16}), 0));
  // An absent element is absent wherever it is read, also in sums with what is there.
  const std::string chain = head + "S[p,m] = A[p,m] : keep\nT[p,m] = S[p,m] + 100\n";
  EXPECT_TRUE(near(run(chain + "out X[p] = max T[p,m]", b, "X"), vec({-kInf, 104, 108}), 0));
  EXPECT_TRUE(near(run(chain + "out X[p] = T[p,m]", b, "X"), vec({0, 104, 215}), 0));
  // What the left side alone decides makes the element absent, whatever the reduction finds.
  const std::string alone = head + "rank a = 2\nS[p] = 2 * A[p,p] : p != 1\n";
  EXPECT_TRUE(
      near(run(alone + "Y[p] = max S[p] * A[p+5+a,0]\nout X = sum select(Y[p] < 0, 1, 1)", b, "X"),
           scalar(2), 0));
  EXPECT_TRUE(near(run(chain + "out X[p,m] = T[p,m] + A[p,m]", b, "X"),
                   {{3, 3}, {0, 0, 0, 108, 0, 0, 114, 116, 0}}, 0));
}

TEST(Language, AFilterActsOnTheTermsThatHaveItsRanks) {
  const Bindings b = with({{"A", vec({1, 2, 3, 4})}, {"B", vec({100, 200})}});
  EXPECT_TRUE(near(run("cascade t\nrank p m\nin A[m] B[p]\nout X[p] = B[p] + A[m] : m > p", b, "X"),
                   vec({109, 207}), 0));
}

TEST(Language, ReadsOutsideATensorAreAbsent) {
  const Bindings b = with({{"A", vec({1, 2, 3, 4})}, {"C", vec({1, 10, 100})}});
  const std::string head = "cascade t\nrank p a\nin A[p] C[a]\n";
  // A causal convolution pads with nothing, which a sum reads as zero.
  EXPECT_TRUE(near(run(head + "out X[p] = C[a] * A[p-2+a]", b, "X"), vec({100, 210, 321, 432}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = max A[p-2+a]", b, "X"), vec({1, 2, 3, 4}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = A[p] - A[p-1]", b, "X"), vec({0, 1, 1, 1}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = A[2*p+1]", b, "X"), vec({2, 4, 0, 0}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = A[P-1-p]", b, "X"), vec({4, 3, 2, 1}), 0));
  EXPECT_TRUE(near(run(head + "out X = A[P-1] + 0 * A[9]", b, "X"), scalar(0), 0));
}

TEST(Language, SelectLooksOnlyAtWhatItChooses) {
  const Bindings b = with({{"A", vec({1, 2, 3})}});
  const std::string head = "cascade t\nrank p q = P\nin A[p]\n";
  EXPECT_TRUE(near(run(head + "out X[p] = select(p < 1, 7, A[p-1])", b, "X"), vec({7, 1, 2}), 0));
  EXPECT_TRUE(
      near(run(head + "out X[p] = 1 + select(p, A[p-1], A[p+5])", b, "X"), vec({0, 2, 3}), 0));
  EXPECT_TRUE(
      near(run(head + "out X[p] = sum select(A[q] > A[p], 1, 0)", b, "X"), vec({2, 1, 0}), 0));
}

TEST(Language, IndexFunctions) {
  Bindings b = with({{"A", {{2, 4}, {1, 2, 3, 4, 5, 6, 7, 8}}}});
  b.indices["start"] = [](auto i) { return std::max<int64_t>(0, i[0] - 1); };
  b.indices["inv"] = [](auto i) { return 3 - i[0]; };
  b.indices["far"] = [](auto) { return std::numeric_limits<int64_t>::max(); };
  b.sizes["t"] = 2;
  const std::string head = "cascade t\nrank h p t\nin A[h,p]\n";
  EXPECT_TRUE(
      near(run(head + "out X[h,p] = A[h,inv[p]]", b, "X"), {{2, 4}, {4, 3, 2, 1, 8, 7, 6, 5}}, 0));
  EXPECT_TRUE(near(run(head + "out X[h,p] = sum A[h,start(p)+t]", b, "X"),
                   {{2, 4}, {3, 3, 5, 7, 11, 11, 13, 15}}, 0));
  EXPECT_TRUE(near(run(head + "out X[h,p] = A[h,start(inv(p))]", b, "X"),
                   {{2, 4}, {3, 2, 1, 1, 7, 6, 5, 5}}, 0));
  EXPECT_TRUE(
      near(run(head + "out X[p] = sum A[h,p] : inv(p) >= p", b, "X"), vec({6, 8, 0, 0}), 0));
  EXPECT_TRUE(near(run(head + "out X[p] = A[0,2*far(p)+p]", b, "X"), vec({0, 0, 0, 0}), 0));
}

TEST(Language, SplitsWithARaggedLastTile) {
  for (int64_t tile : {1, 2, 3, 4, 5, 7, 9}) {
    SCOPED_TRACE(tile);
    Bindings b = with({{"A", vec({1, 2, 3, 4, 5, 6, 7})}});
    b.sizes["T"] = tile;
    const std::string head =
        "cascade t\nrank n\nsplit n = t * T + i\nsplit n = t * T + j\nin A[n]\n";
    EXPECT_TRUE(near(run(head + "S[t] = sum A[t,i]\nout X = sum S[t]", b, "X"), scalar(28), 0));
    EXPECT_TRUE(near(run(head + "S[t,i] = -A[t,i]\nout X = max S[t,i]", b, "X"), scalar(-1), 0));
    // Two ranks inside one tile, and a left side that joins the parts again.
    NdArray expected{{7}, {}};
    for (int64_t n = 0; n < 7; ++n) {
      double sum = 0;
      for (int64_t m = n / tile * tile; m <= n; ++m) sum += static_cast<double>(m + 1);
      expected.values.push_back(sum);
    }
    EXPECT_TRUE(near(run(head + "out X[t*T+i] = sum A[t,j] : j <= i", b, "X"), expected, 0));
  }
}

TEST(Language, NothingIsAskedAboutPointsBehindTheEndOfASplit) {
  // The case answers from arrays of the sizes of the ranks.
  const std::vector<bool> kept = {true, false, true, true, false};
  const std::vector<int64_t> order = {4, 2, 0, 1, 3};
  Bindings b = with({{"A", vec({1, 2, 3, 4, 5})}, {"B", {{2, 5}, std::vector<double>(10, 1.0)}}});
  b.predicates["keep"] = [&](auto i) { return kept.at(static_cast<size_t>(i[1])); };
  b.indices["inv"] = [&](auto i) { return order.at(static_cast<size_t>(i[0])); };
  b.sizes["T"] = 3;
  const std::string head =
      "cascade t\nrank p m\nsplit m = t * T + i\nin A[m] B[p,m]\nwhere keep(p,m)\n";
  EXPECT_TRUE(
      near(run(head + "out X[t*T+i] = sum B[p,t,i] : keep", b, "X"), vec({2, 0, 2, 2, 0}), 0));
  EXPECT_TRUE(near(run(head + "X[t,i] = max B[p,t,i] : keep\nout Y[p] = sum B[p,t,i] : keep\nout Z "
                              "= sum X[t,i] : t > 0",
                       b, "Y"),
                   vec({3, 3}), 0));
  EXPECT_TRUE(near(run(head + "out X[t*T+i] = A[inv(t*T+i)]", b, "X"), vec({5, 3, 1, 2, 4}), 0));
  EXPECT_TRUE(near(run(head + "out X[t] = sum A[t,i] : inv(t*T+i) > 1", b, "X"), vec({3, 5}), 0));
  EXPECT_TRUE(near(run(head + "out X = sum A[inv(m+1)] : m < M - 1", b, "X"), scalar(10), 0));
}

TEST(Language, SplitsOfSplitsAndSplitsByANumber) {
  Bindings b = with({{"A", vec({1, 2, 3, 4, 5, 6, 7})}});
  b.sizes["M0"] = 2;
  const std::string text =
      "cascade t\nrank m\nsplit m = m1 * M0 + m0\nsplit m1 = m3 * 3 + m2\n"
      "in A[m]\nS[m3,m2] = sum A[(m3*3+m2)*M0+m0]\nout X[m3] = max S[m3,m2]";
  EXPECT_TRUE(near(run(text, b, "X"), vec({11, 7}), 0));
  // Points behind the end of the rank that was split first, which none of their parts show alone.
  const std::string ones =
      "cascade t\nrank m\nsplit m = m1 * M0 + m0\nsplit m1 = m3 * 3 + m2\nin A[m]\n"
      "ONE[m3,m2,m0] = select(m3 + m2 + m0 < 0, 0, 1)\nout X[m3] = sum ONE[m3,m2,m0]";
  EXPECT_TRUE(near(run(ones, b, "X"), vec({6, 1}), 0));
}

TEST(Language, RunningRanks) {
  const Bindings b = with({{"A", vec({1, 2, 3})}});
  const std::string head = "cascade t\nrank i\nin A[i] S\n";
  Bindings bs = b;
  bs.scalars["S"] = 10;
  EXPECT_TRUE(near(run(head + "out X[i+1] = 2 * X[i] + A[i] ; X[0] = S", bs, "X"),
                   vec({10, 21, 44, 91}), 0));
  EXPECT_TRUE(
      near(run(head + "R[i+1] = max(R[i], A[i]) ; R[0] = -inf\nout X[i] = R[i+1] - R[i]", bs, "X"),
           vec({kInf, 1, 1}), 0));
  EXPECT_TRUE(near(run(head + "F[i+1] = F[i] + F[i-1] ; F[0] = 1\nout X = F[I]", bs, "X"),
                   scalar(3),
                   0));  // F[-1] is absent, so the first step keeps the state
}

TEST(Language, ARunningStateStaysWhereItsLineIsAbsent) {
  const Bindings b = with({{"A", vec({1, 2, 3, 4})}});
  const std::string head = "cascade t\nrank i\nin A[i]\n";
  EXPECT_TRUE(near(run(head + "out X[i+1] = X[i] / 2 + A[i] : i != 1, i != 2 ; X[0] = 8", b, "X"),
                   vec({8, 5, 5, 5, 6.5}), 0));
  EXPECT_TRUE(
      near(run(head + "S[i] = A[i] : i >= 2\nout X[i+1] = max(X[i], S[i]) ; X[0] = -inf", b, "X"),
           vec({-kInf, -kInf, -kInf, 3, 4}), 0));
}

TEST(Language, StatementsThatReadEachOtherRunTogether) {
  // The delta rule: what the state predicts is corrected before the state moves on.
  const Bindings b = with({{"K", normal({5, 2}, 1)}, {"V", normal({5, 3}, 2)}});
  const NdArray found =
      run("cascade delta\nrank t a f\nin K[t,a] V[t,f]\n"
          "U[t,f] = V[t,f] - sum K[t,a] * S[t,a,f]\n"
          "S[t+1,a,f] = S[t,a,f] + K[t,a] * U[t,f] ; S[0,a,f] = 0\nout X[a,f] = S[T,a,f]",
          b, "X");
  const auto& k = b.tensors.at("K").values;
  const auto& v = b.tensors.at("V").values;
  NdArray expected{{2, 3}, std::vector<double>(6)};
  for (size_t t = 0; t < 5; ++t) {
    for (size_t f = 0; f < 3; ++f) {
      double u = v[t * 3 + f];
      for (size_t a = 0; a < 2; ++a) u -= k[t * 2 + a] * expected.values[a * 3 + f];
      for (size_t a = 0; a < 2; ++a) expected.values[a * 3 + f] += k[t * 2 + a] * u;
    }
  }
  EXPECT_TRUE(near(found, expected, 1e-14));
}

TEST(Language, BatchRanksMayBeLeftOut) {
  Bindings b = with({{"A", normal({2, 3, 4}, 1)}, {"W", normal({3}, 2)}});
  b.predicates["keep"] = [](auto i) { return i[1] <= i[0]; };
  const std::string head = "cascade t\nbatch b h\nrank p\nin A[b,h,p] W[h]\nwhere keep(b,p)\n";
  const std::string whole = head + "out X[b,h,p] = A[b,h,p] * W[h] : keep";
  const NdArray expected = run(whole, b, "X");
  EXPECT_EQ(expected.shape, (std::vector<int64_t>{2, 3, 4}));
  EXPECT_TRUE(near(run(head + "out X[p] = A[p] * W : keep", b, "X"), expected, 0));
  EXPECT_TRUE(near(run(head + "out X[b,h,p] = A[p] * W : keep", b, "X"), expected, 0));
  // A tensor has only the batch ranks that it depends on.
  EXPECT_EQ(run(head + "out X = exp(W)", b, "X").shape, (std::vector<int64_t>{3}));
  // Written out, a batch rank is a rank like any other.
  EXPECT_EQ(run(head + "out X[h] = A[b,h,p]", b, "X").shape, (std::vector<int64_t>{3}));
  EXPECT_EQ(run(head + "out X = sum A[b,h,p]", b, "X").shape, (std::vector<int64_t>{}));
  EXPECT_EQ(run(head + "R[p+1] = R[p] + A[p] ; R[0] = 0\nout X = R[P]", b, "X").shape,
            (std::vector<int64_t>{2, 3}));
}

TEST(Language, FunctionsAndConstants) {
  const Bindings b = with({{"A", vec({-2, -0.5, 0, 0.5, 2})}});
  const std::string head =
      "cascade t\nrank p\nin A[p]\nlet elu1(x) = select(x > 0, x + 1, exp(x))\n"
      "let twice(x) = 2 * x\n";
  const std::vector<std::pair<std::string, double (*)(double)>> table = {
      {"exp(A[p])", [](double x) { return std::exp(x); }},
      {"log(A[p]^2 + 1)", [](double x) { return std::log(x * x + 1); }},
      {"tanh A[p]", [](double x) { return std::tanh(x); }},
      {"sigmoid(A[p])", [](double x) { return 1 / (1 + std::exp(-x)); }},
      {"sqrt(abs(A[p]))", [](double x) { return std::sqrt(std::abs(x)); }},
      {"cos(pi * A[p])", [](double x) { return std::cos(M_PI * x); }},
      {"sin A[p]", [](double x) { return std::sin(x); }},
      {"relu(A[p])", [](double x) { return x > 0 ? x : 0; }},
      {"gelu(A[p])", [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }},
      {"pow(2, A[p])", [](double x) { return std::pow(2, x); }},
      {"-A[p]^2", [](double x) { return -x * x; }},
      {"2^3^2 + A[p]", [](double x) { return 512 + x; }},
      {"1 - (2 - A[p]) - 1", [](double x) { return x - 2; }},
      {"min(A[p], 0.25) / max(A[p], 0.5)",
       [](double x) { return std::min(x, 0.25) / std::max(x, 0.5); }},
      {"elu1(twice(A[p]))", [](double x) { return x > 0 ? 2 * x + 1 : std::exp(2 * x); }},
      {"A[p] / P + 1e-3", [](double x) { return x / 5 + 1e-3; }},
  };
  for (const auto& [line, expected] : table) {
    SCOPED_TRACE(line);
    NdArray want{{5}, {}};
    for (double x : b.tensors.at("A").values) want.values.push_back(expected(x));
    EXPECT_TRUE(near(run(head + "out X[p] = " + line, b, "X"), want, 1e-14));
  }
  EXPECT_TRUE(near(run(head + "out X[p] = A[p] * 0 + p", b, "X"), vec({0, 1, 2, 3, 4}), 0));
}

TEST(Language, DefaultsOfInputsAndSizesOfRanks) {
  Bindings b = with({{"A", vec({1, 2})}});
  const std::string text =
      "cascade t\nsize W\nrank p k = 2*P + W\nin A[p] B[p] = 5 c = -inf\n"
      "out X[k] = A[k] + B[k] + 0 * k\nout Y[p] = max(A[p], c)";
  b.sizes["W"] = 1;
  EXPECT_TRUE(near(run(text, b, "X"), vec({6, 7, 0, 0, 0}), 0));
  EXPECT_TRUE(near(run(text, b, "Y"), vec({1, 2}), 0));
  EXPECT_EQ(sizes(parse(text), b), (std::map<std::string, int64_t>{{"p", 2}, {"k", 5}, {"W", 1}}));
  b.scalars["c"] = 1.5;
  EXPECT_TRUE(near(run(text, b, "Y"), vec({1.5, 2}), 0));
}

TEST(Language, BindingsThatDoNotFitAreErrors) {
  const Program program = parse(
      "cascade t\nrank p m\nsplit m = m1 * M0 + m0\nin A[p,m] B[m] H[g(p)] s\nwhere keep(p)\n"
      "out X[p] = s * A[p,m1,m0] * B[m1,m0] * H[g(p)] : keep");
  Bindings good = with({{"A", normal({2, 3}, 1)}, {"B", normal({3}, 2)}, {"H", normal({1}, 3)}});
  good.scalars["s"] = 1;
  good.sizes["M0"] = 2;
  good.predicates["keep"] = [](auto) { return true; };
  good.indices["g"] = [](auto) { return 0; };
  EXPECT_EQ(evaluate(program, good).at("X").values.size(), 2u);
  const auto message = [&](auto change) -> std::string {
    Bindings bad = good;
    change(bad);
    try {
      evaluate(program, bad);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const auto says = [&](auto change, const std::string& part) {
    const std::string found = message(change);
    EXPECT_NE(found.find(part), std::string::npos) << found;
  };
  says([](Bindings& b) { b.tensors.erase("B"); }, "tensor B is not bound");
  says([](Bindings& b) { b.scalars.clear(); }, "scalar s is not bound");
  says([](Bindings& b) { b.predicates.clear(); }, "predicate keep is not bound");
  says([](Bindings& b) { b.indices.clear(); }, "index function g is not bound");
  says([](Bindings& b) { b.predicates["keep"] = nullptr; }, "predicate keep is empty");
  says([](Bindings& b) { b.indices["g"] = nullptr; }, "index function g is empty");
  says([](Bindings& b) { b.sizes.clear(); }, "size M0 has no size");
  says([](Bindings& b) { b.sizes["M0"] = 0; }, "expected at least 1");
  says([](Bindings& b) { b.sizes["m0"] = 3; }, "rank m0 is 3 in sizes but 2 in its split");
  says([](Bindings& b) { b.sizes["p"] = -1; }, "rank p is -1 in sizes");
  says([](Bindings& b) { b.tensors["B"] = normal({4}, 1); },
       "rank m is 3 in axis 1 of A but 4 in axis 0 of B");
  says([](Bindings& b) { b.tensors["B"] = normal({3, 1}, 1); }, "tensor B has 2 axes, expected 1");
  says([](Bindings& b) { b.tensors["B"].values.pop_back(); }, "tensor B has 2 values, expected 3");
  says([](Bindings& b) { b.tensors["B"].shape = {-3}; }, "expected 0");
  says([](Bindings& b) { b.indices["g"] = [](auto) { return 1; }; },
       "an index function of H gives 1, expected 0 to 0");
  EXPECT_THROW(run("cascade t\nrank p = 100000*100000\nout X[p] = 0*p", {}, "X"), Error);
  EXPECT_THROW(run("cascade t\nrank p = 2000000000 q = 2000000000\nout X[p,q] = 0*p*q", {}, "X"),
               Error);
}

TEST(Language, MoreLanesThanOneChunk) {
  const int64_t n = 1000;
  const Bindings b = with({{"A", normal({n}, 1)}, {"B", normal({n, 3}, 2)}});
  const auto& a = b.tensors.at("A").values;
  double sum = 0, largest = -kInf;
  for (double x : a) {
    sum += x;
    largest = std::max(largest, x);
  }
  const std::string head = "cascade t\nrank n f\nin A[n] B[n,f]\n";
  EXPECT_TRUE(near(run(head + "out X = sum A[n]", b, "X"), scalar(sum), 1e-12));
  EXPECT_TRUE(near(run(head + "out X = max A[n]", b, "X"), scalar(largest), 0));
  NdArray product{{3}, std::vector<double>(3)};
  for (size_t i = 0; i < 3000; ++i) product.values[i % 3] += a[i / 3] * b.tensors.at("B").values[i];
  EXPECT_TRUE(near(run(head + "out X[f] = A[n] * B[n,f]", b, "X"), product, 1e-12));
  NdArray shifted{{n}, {0}};
  for (size_t i = 1; i < a.size(); ++i) shifted.values.push_back(a[i - 1]);
  EXPECT_TRUE(near(run(head + "out X[n] = A[n-1]", b, "X"), shifted, 0));
}

}  // namespace
}  // namespace heed::cascade
