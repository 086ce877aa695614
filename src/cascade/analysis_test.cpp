// Passes and counts.
#include <set>

#include "cascade/test_support.h"
#include "heed/error.h"

namespace heed::cascade {
namespace {

const std::string kFolder = "src/mechanisms/flash/";
const std::string kTeaching = "src/cascade/testdata/teaching_";

int passes(const std::string& path, const char* rank) {
  return count_passes(parse_file(path), rank).passes;
}

TEST(Passes, AttentionCascades) {
  EXPECT_EQ(passes(kFolder + "softmax.cascade", "m"), 3);
  EXPECT_EQ(passes(kFolder + "two_pass.cascade", "m"), 2);
  EXPECT_EQ(passes(kFolder + "flash.cascade", "m"), 1);
  EXPECT_EQ(passes("src/mechanisms/sigmoid/sigmoid.cascade", "m"), 1);
  EXPECT_EQ(passes(kFolder + "softmax.cascade", "p"), 1);
  EXPECT_EQ(passes(kFolder + "softmax.cascade", "f"), 1);
  EXPECT_EQ(passes(kFolder + "merge.cascade", "p"), 1);
}

TEST(Passes, TeachingExamples) {
  EXPECT_EQ(passes(kTeaching + "two_pass.cascade", "k"), 2);
  EXPECT_EQ(passes(kTeaching + "one_pass.cascade", "k"), 1);
  EXPECT_EQ(passes(kTeaching + "running.cascade", "i"), 1);
}

TEST(Passes, DeferringTheDivisionSavesAPass) {
  const std::string scores =
      "cascade t\nrank p m f\nin S[p,m] V[m,f]\nGM[p] = max S[p,m]\n"
      "SN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = sum SN[p,m]\n";
  EXPECT_EQ(count_passes(parse(scores + "out O[p,f] = SN[p,m] * V[m,f] / SD[p]"), "m").passes, 3);
  EXPECT_EQ(
      count_passes(parse(scores + "N[p,f] = SN[p,m] * V[m,f]\nout O[p,f] = N[p,f] / SD[p]"), "m")
          .passes,
      2);
}

TEST(Passes, RowsSayWhereEachStatementRuns) {
  const PassReport report = count_passes(parse_file(kFolder + "softmax.cascade"), "m");
  std::map<std::string, int> found;
  for (const PassReport::Row& row : report.rows) found[row.tensor] = row.pass;
  EXPECT_EQ(found, (std::map<std::string, int>{
                       {"S", 1}, {"GM", 1}, {"SN", 2}, {"SD", 2}, {"A", 3}, {"O", 3}, {"LSE", 0}}));
  EXPECT_EQ(report.rows[0].line, 9);
}

TEST(Passes, ARunningStateThatIsUsedWholeNeedsAnotherPass) {
  const std::string head = "cascade t\nrank i\nin A[i]\nR[i+1] = R[i] + A[i] ; R[0] = 0\n";
  EXPECT_EQ(count_passes(parse(head + "out X[i] = A[i] * R[i+1]"), "i").passes, 1);
  EXPECT_EQ(count_passes(parse(head + "out X[i] = A[i] / R[I]"), "i").passes, 2);
  EXPECT_EQ(count_passes(parse(head + "out X[i] = A[i] * R[I-1-i]"), "i").passes, 2);
}

TEST(Passes, AStartIsAnOperandOfARunningTensor) {
  const std::string head = "cascade t\nrank i n\nin A[i] S[n]\nG = sum A[i]\n";
  EXPECT_EQ(count_passes(parse(head + "out R[i+1] = R[i] + A[i] ; R[0] = 1"), "i").passes, 1);
  EXPECT_EQ(count_passes(parse(head + "out R[i+1] = R[i] + A[i] ; R[0] = G"), "i").passes, 2);
  EXPECT_EQ(
      count_passes(parse(head + "out R[n+1] = R[n] + S[n] ; R[0] = sum A[i] / G"), "i").passes, 2);
  // A state that runs along another rank is there only after its start.
  EXPECT_EQ(
      count_passes(parse(head + "R[n+1] = R[n] + S[n] ; R[0] = G\nout X = sum A[i] * R[N]"), "i")
          .passes,
      2);
  EXPECT_EQ(passes("src/mechanisms/local_linear/regression.cascade", "m"), 3);
  EXPECT_EQ(passes("src/mechanisms/local_linear/centred.cascade", "m"), 5);
}

TEST(Passes, StatementsThatRunTogetherStayInOnePass) {
  const Program delta = parse(
      "cascade delta\nrank t a f\nin K[t,a] V[t,f] Q[t,a]\n"
      "U[t,f] = V[t,f] - sum K[t,a] * S[t,a,f]\n"
      "S[t+1,a,f] = S[t,a,f] + K[t,a] * U[t,f] ; S[0,a,f] = 0\nout X[t,f] = Q[t,a] * S[t+1,a,f]");
  EXPECT_EQ(count_passes(delta, "t").passes, 1);
}

TEST(Passes, PartsOfAnOuterPartCountTilesToo) {
  const Program program = parse(
      "cascade t\nrank m\nsplit m = a * A0 + m0\nsplit a = c * C0 + d\nin X[m]\n"
      "L[c,d] = sum X[(c*C0+d)*A0+m0]\nG = max L[c,d]\nout P[c,d] = L[c,d] / G");
  EXPECT_EQ(count_passes(program, "m").passes, 1);
  EXPECT_EQ(count_passes(program, "a").passes, 2);
}

TEST(Passes, APassAtEachStepIsAnError) {
  // Every step of the elimination needs the row before it whole.
  EXPECT_THROW(passes("src/mechanisms/local_linear/centred.cascade", "i"), Error);
  EXPECT_EQ(passes("src/mechanisms/local_linear/centred.cascade", "f"), 1);
}

TEST(Passes, UnknownRankIsAnError) { EXPECT_THROW(passes(kFolder + "flash.cascade", "x"), Error); }

const StatementCount& row(const std::vector<StatementCount>& rows, const std::string& tensor) {
  for (const StatementCount& r : rows) {
    if (r.tensor == tensor) return r;
  }
  throw std::runtime_error("no row of " + tensor);
}

TEST(Counts, ClosedFormsOfFlash) {
  const auto rows = count(parse_file(kFolder + "flash.cascade"));
  EXPECT_EQ(row(rows, "BQK").multiply_adds.text(), "b*e*h*m*p + b*e*h*p");
  EXPECT_EQ(row(rows, "BQK").reads.text(), "b*e*h*m + b*e*h*p");
  EXPECT_EQ(row(rows, "BQK").writes.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "LM").maxima.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "LM").writes.text(), "b*h*m1*p");
  EXPECT_EQ(row(rows, "SLN").exponentials.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "SLN").multiply_adds.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "PRM").exponentials.text(), "b*h*m1*p");
  EXPECT_EQ(row(rows, "RD").multiply_adds.text(), "b*h*m*p + b*h*m1*p");
  EXPECT_EQ(row(rows, "RNV").multiply_adds.text(), "b*f*h*m*p + b*f*h*m1*p");
  EXPECT_EQ(row(rows, "RNV").writes.text(), "b*f*h*m1*p + b*f*h*p");
  EXPECT_EQ(row(rows, "O").divisions.text(), "b*f*h*p");
  EXPECT_EQ(row(rows, "O").reads.text(), "b*f*h*p + b*h*p");
  EXPECT_EQ(row(rows, "LSE").other.text(), "b*h*p");
  EXPECT_EQ(row(rows, "LSE").live_after.text(), "0");
}

/// Counts what a statement does by visiting every combination of ranks that an operation depends
/// on.
double brute(const std::map<std::string, int64_t>& sizes, const std::vector<std::string>& ranks) {
  double n = 0;
  std::vector<int64_t> at(ranks.size());
  while (true) {
    ++n;
    size_t r = 0;
    while (r < ranks.size() && ++at[r] == sizes.at(ranks[r])) at[r++] = 0;
    if (r == ranks.size()) return n;
  }
}

TEST(Counts, NumbersEqualCountingPointByPoint) {
  const Program program = parse_file(kFolder + "softmax.cascade");
  const std::map<std::string, int64_t> sizes = {{"b", 2}, {"h", 3}, {"p", 4},
                                                {"m", 5}, {"e", 6}, {"f", 7}};
  const auto rows = count(program);
  const auto n = [&](const std::vector<std::string>& ranks) { return brute(sizes, ranks); };
  const double bhpm = n({"b", "h", "p", "m"}), bhp = n({"b", "h", "p"});
  EXPECT_EQ(row(rows, "S").multiply_adds.at(sizes),
            n({"b", "h", "p", "m", "e"}) + n({"b", "h", "p", "e"}));
  EXPECT_EQ(row(rows, "GM").maxima.at(sizes), bhpm);
  EXPECT_EQ(row(rows, "SN").exponentials.at(sizes), bhpm);
  EXPECT_EQ(row(rows, "SN").reads.at(sizes), bhpm + bhp);
  EXPECT_EQ(row(rows, "SD").multiply_adds.at(sizes), bhpm);
  EXPECT_EQ(row(rows, "A").divisions.at(sizes), bhpm);
  EXPECT_EQ(row(rows, "O").multiply_adds.at(sizes), n({"b", "h", "p", "m", "f"}));
  EXPECT_EQ(row(rows, "O").writes.at(sizes), n({"b", "h", "p", "f"}));
  // Between SD and A: SN and SD wait for A, V for O, GM for LSE.
  EXPECT_EQ(row(rows, "SD").live_after.at(sizes), bhpm + 2 * bhp + n({"b", "h", "m", "f"}));
  EXPECT_THROW(row(rows, "SD").live_after.at({{"b", 1}}), Error);
}

TEST(Counts, AdditionsFuseWithProductsAndOperationsStandOutsideTheLoopsTheyDoNotNeed) {
  const std::string head = "cascade t\nrank p m k = P + M\nin A[p,m] B[p] C[k] s\n";
  const auto one = [&](const std::string& line) { return count(parse(head + line)).at(0); };
  EXPECT_EQ(one("out X[p,m] = A[p,m] * B[p] + A[p,m]").multiply_adds.text(), "m*p");
  EXPECT_EQ(one("out X[p,m] = A[p,m] + B[p] * B[p]").multiply_adds.text(), "m*p + p");
  EXPECT_EQ(one("out X[p,m] = exp(A[p,m] * s + B[p])").multiply_adds.text(), "m*p");
  EXPECT_EQ(one("out X[p] = A[p,m] * A[p,m] + B[p]").multiply_adds.text(), "m*p + p");
  EXPECT_EQ(one("out X[p,m] = A[p,m] * exp(B[p])").exponentials.text(), "p");
  EXPECT_EQ(one("out X[p,m] = A[p,m] * (2 * 3)").multiply_adds.text(), "m*p");
  EXPECT_EQ(one("out X[p,m] = A[p,m] * C[p-m+M]").reads.text(), "k + m*p");
  EXPECT_EQ(one("out X[p,m] = A[p,m] * A[p,m]").reads.text(), "m*p");
  EXPECT_EQ(one("out X[p] = A[p,0]").reads.text(), "p");
  EXPECT_EQ(one("out X[p] = C[p+M]").reads.text(), "p");
  EXPECT_EQ(one("out X[p] = C[2*p+M-P]").reads.text(), "p");
  EXPECT_EQ(one("out X[p,m] = abs(A[p,m])").maxima.text(), "m*p");
  // Prefix sums: each element adds up points of its own.
  EXPECT_EQ(one("out X[p] = sum C[k] : k <= p").additions.text(), "k*p");
  EXPECT_EQ(one("out X[p] = max C[k] : k <= p").maxima.text(), "k*p");
  EXPECT_EQ(one("out X[p] = C[k] * C[k] : k <= p").multiply_adds.text(), "k + k*p");
  EXPECT_EQ(one("out X[p] = sum C[k] : p > 0, k > 1").additions.text(), "k");
}

TEST(Counts, AdditionsWithoutAProductAreToldApart) {
  const auto rows = count(parse_file(kFolder + "softmax.cascade"));
  EXPECT_EQ(row(rows, "S").additions.text(), "0");
  EXPECT_EQ(row(rows, "SN").additions.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "SD").additions.text(), "b*h*m*p");
  EXPECT_EQ(row(rows, "O").additions.text(), "0");
  const std::string head = "cascade t\nrank p m\nin A[p,m] B[p]\n";
  const auto one = [&](const std::string& line) { return count(parse(head + line)).at(0); };
  EXPECT_EQ(one("out X[p,m] = A[p,m] * B[p] + A[p,m]").additions.text(), "0");
  EXPECT_EQ(one("out X[p] = B[p] + sum A[p,m]").additions.text(), "m*p + p");
}

}  // namespace
}  // namespace heed::cascade
