// Mechanisms of other papers in the language: each definition against the form it is computed in.
#include "cascade/test_support.h"

namespace heed::cascade {
namespace {

NdArray run(const std::string& text, const Bindings& bindings, const std::string& output = "O") {
  return evaluate(parse(text), bindings).at(output);
}

Bindings tokens(int64_t length, int64_t dim) {
  Bindings b;
  b.tensors = {{"Q", normal({2, length, dim}, 1)},
               {"K", normal({2, length, dim}, 2)},
               {"V", normal({2, length, dim}, 3)}};
  b.scalars["scale"] = 0.5;
  return b;
}

const std::string kHead = "cascade t\nbatch h\nrank p m e f\nin Q[h,p,e] K[h,m,e] V[h,m,f] scale\n";

TEST(Sheets, LightningAttentionInBlocksIsDecayedAttention) {
  Bindings b = tokens(11, 3);
  b.tensors["Slope"] = {{2}, {0.1, 0.7}};
  b.sizes["T"] = 4;
  const NdArray expected = run(kHead +
                                   "in Slope[h]\nS[p,m] = Q[p,e] * K[m,e] : m <= p\n"
                                   "out O[h,p,f] = S[p,m] * exp(-Slope * (p - m)) * V[m,f]",
                               b);
  const NdArray found = run(
      "cascade lightning                          # arXiv 2401.04658\nbatch h\nrank n e f\n"
      "split n = t * T + i\nsplit n = t * T + j\nin Q[h,n,e] K[h,n,e] V[h,n,f] Slope[h]\n"
      "A[t,i,j]   = Q[t,i,e] * K[t,j,e] : i >= j\nP[t,i,j]   = A[t,i,j] * exp(-Slope * (i - j))\n"
      "OI[t,i,f]  = P[t,i,j] * V[t,j,f]\nKD[t,j,e]  = K[t,j,e] * exp(-Slope * (T - j))\n"
      "U[t,e,f]   = KD[t,j,e] * V[t,j,f]\n"
      "S[t+1,e,f] = S[t,e,f] * exp(-Slope * T) + U[t,e,f] ; S[0,e,f] = 0\n"
      "OX[t,i,f]  = Q[t,i,e] * exp(-Slope * i) * S[t,e,f]\n"
      "out O[h,t*T+i,f] = OI[t,i,f] + OX[t,i,f]\n",
      b);
  EXPECT_TRUE(near(found, expected, 1e-12));
}

TEST(Sheets, SecondOrderStateIsTheTaylorPolynomialOfTheScores) {
  const Bindings b = tokens(6, 3);
  const NdArray expected = run(kHead +
                                   "X[p,m] = Q[p,e] * K[m,e] : m <= p\n"
                                   "out O[h,p,f] = X[p,m]^2 / 2 * V[m,f]",
                               b);
  const NdArray found =
      run("cascade order2                             # arXiv 2507.23632\nbatch h\n"
          "rank t e f a = E c = E\nin Q[h,t,e] K[h,t,e] V[h,t,f]\n"
          "H[t+1,a,c,f] = H[t,a,c,f] + K[t,a] * K[t,c] * V[t,f] ; H[0,a,c,f] = 0\n"
          "out O[h,t,f] = 0.5 * Q[t,a] * Q[t,c] * H[t+1,a,c,f]",
          b);
  EXPECT_TRUE(near(found, expected, 1e-12));
}

TEST(Sheets, NeighborhoodByIndexFunctionIsAMask) {
  Bindings b = tokens(9, 3);
  const auto start = [](int64_t p) { return std::clamp<int64_t>(p - 1, 0, 9 - 3); };
  b.indices["start"] = [&](auto i) { return start(i[0]); };
  b.predicates["keep"] = [&](auto i) { return i[1] >= start(i[0]) && i[1] < start(i[0]) + 3; };
  const std::string rest = "M[p] = max S[p,t]\nN[p,t] = exp(S[p,t] - M[p])\nD[p] = sum N[p,t]\n";
  const NdArray found = run(kHead + "rank t = 3\nS[p,t] = scale * Q[p,e] * K[start(p)+t,e]\n" +
                                rest + "out O[h,p,f] = N[p,t] * V[start(p)+t,f] / D[p]",
                            b);
  const NdArray expected =
      run(kHead + "rank t = M\nwhere keep(p,t)\nS[p,t] = scale * Q[p,e] * K[t,e] : keep\n" + rest +
              "out O[h,p,f] = N[p,t] * V[t,f] / D[p]",
          b);
  EXPECT_TRUE(near(found, expected, 1e-12));
}

TEST(Sheets, KernelizedRelativePositionsAreAConvolution) {
  Bindings b = tokens(5, 3);
  b.tensors["B"] = normal({2, 9}, 4);
  const std::string head = kHead +
                           "rank k = 2*M - 1 w = 2*M - 1 x = 2*M - 1\nin B[h,k]\n"
                           "C[k] = exp(B[k])\nFQ[p,e] = exp(Q[p,e])\nFK[m,e] = exp(K[m,e])\n";
  const NdArray expected = run(head +
                                   "W[p,m] = C[m-p+M-1] * FQ[p,e] * FK[m,e]\nD[p] = sum W[p,m]\n"
                                   "out O[h,p,f] = W[p,m] * V[m,f] / D[p]",
                               b);
  const NdArray direct = run(head +
                                 "G[m,e,f] = FK[m,e] * V[m,f]\n"
                                 "U[p,e,f] = C[m-p+M-1] * G[m,e,f]\nS[p,e] = C[m-p+M-1] * FK[m,e]\n"
                                 "N[p,f] = FQ[p,e] * U[p,e,f]\nD[p] = FQ[p,e] * S[p,e]\n"
                                 "out O[h,p,f] = N[p,f] / D[p]",
                             b);
  EXPECT_TRUE(near(direct, expected, 1e-12));
  // One Fourier transform of length 2M-1, real and imaginary part by hand.
  const NdArray fourier =
      run(head +
              "let angle(x,y) = 2 * pi * x * y / 9\n"
              "GR[w,e] = FK[m,e] * cos(angle(w, m))\nGI[w,e] = FK[m,e] * sin(angle(w, m))\n"
              "CR[w] = C[2*M-2-k] * cos(angle(w, k - M + 1))\n"
              "CI[w] = C[2*M-2-k] * sin(angle(w, k - M + 1))\n"
              "UR[w,e] = GR[w,e] * CR[w] - GI[w,e] * CI[w]\nUI[w,e] = GR[w,e] * CI[w] + GI[w,e] * "
              "CR[w]\n"
              "out O[h,p,e] = UR[w,e] * cos(angle(w, p)) / K2 + UI[w,e] * sin(angle(w, p)) / "
              "K2\nsize K2\n",
          [&] {
            Bindings with = b;
            with.sizes["K2"] = 9;
            return with;
          }());
  EXPECT_TRUE(near(fourier, run(head + "out O[h,p,e] = C[m-p+M-1] * FK[m,e]", b), 1e-11));
}

TEST(Sheets, RelativeScoresWithAConvolutionOfTheQueries) {
  Bindings b = tokens(5, 3);
  b.tensors["CQ"] = normal({3, 3}, 4);
  b.tensors["R"] = normal({12, 2, 3}, 5);
  b.tensors["Bias"] = normal({12, 2}, 6);
  const NdArray found = run(
      "cascade rcmha                              # arXiv 2308.03429\nbatch h\nrank p m e f a r\n"
      "in Q0[h,p,e] K[h,m,e] V[h,m,f] CQ[e,a] R[r,h,e] Bias[r,h]\n"
      "Q[p,e]   = CQ[e,a] * Q0[p-2+a,e]\nAC[p,m]  = Q[p,e] * K[m,e]\n"
      "BD[p,m]  = Q[p,e] * R[6+m-p,e] + Bias[6+m-p]\n"
      "S[p,m]   = (AC[p,m] + BD[p,m]) / sqrt(E) : m <= p\n"
      "GM[p]    = max S[p,m]\nN[p,m]   = exp(S[p,m] - GM[p])\nD[p]     = sum N[p,m]\n"
      "out O[h,p,f] = N[p,m] * V[m,f] / D[p]\n",
      [&] {
        Bindings with = b;
        with.tensors["Q0"] = b.tensors.at("Q");
        return with;
      }());
  const auto at = [&](const char* name, std::initializer_list<int64_t> index) {
    const NdArray& a = b.tensors.at(name);
    int64_t offset = 0;
    size_t axis = 0;
    for (int64_t i : index) offset = offset * a.shape[axis++] + i;
    return a.values[static_cast<size_t>(offset)];
  };
  NdArray expected{{2, 5, 3}, {}};
  for (int64_t h = 0; h < 2; ++h) {
    for (int64_t p = 0; p < 5; ++p) {
      double sum = 0;
      std::vector<double> out(3);
      for (int64_t m = 0; m <= p; ++m) {
        double score = at("Bias", {6 + m - p, h});
        for (int64_t e = 0; e < 3; ++e) {
          double q = 0;
          for (int64_t a = std::max<int64_t>(0, 2 - p); a < 3; ++a) {
            q += at("CQ", {e, a}) * at("Q", {h, p - 2 + a, e});
          }
          score += q * (at("K", {h, m, e}) + at("R", {6 + m - p, h, e}));
        }
        const double weight = std::exp(score / std::sqrt(3.0));
        sum += weight;
        for (int64_t f = 0; f < 3; ++f) out[static_cast<size_t>(f)] += weight * at("V", {h, m, f});
      }
      for (double x : out) expected.values.push_back(x / sum);
    }
  }
  EXPECT_TRUE(near(found, expected, 1e-12));
}

TEST(Sheets, MagnitudeAwareLinearAttentionHasRowsThatSumToOne) {
  Bindings b = tokens(7, 4);
  b.tensors["V"] = {{2, 7, 1}, std::vector<double>(14, 1.0)};
  const NdArray found = run(
      kHead +
          "let phi(x) = select(x > 0, x + 1, exp(x))\nFQ[p,e] = phi(Q[p,e])\n"
          "FK[m,e] = phi(K[m,e])\nKB[e] = FK[m,e] / M\nZ[p] = scale * FQ[p,e] * KB[e]\n"
          "S[e,f] = scale / M * FK[m,e] * V[m,f]\nVB[f] = V[m,f] / M\nU[p,f] = FQ[p,e] * S[e,f]\n"
          "out O[h,p,f] = (1 + 1 / Z[p]) * U[p,f] - Z[p] * VB[f]",
      b);
  EXPECT_TRUE(near(found, {{2, 7, 1}, std::vector<double>(14, 1.0)}, 1e-12));
}

TEST(Sheets, ConjugateGradientsByLinesThatRunTogether) {
  // Solves A x = y in as many steps as there are unknowns, as the exact local estimator needs it.
  Bindings b;
  b.tensors = {{"G", normal({4, 4}, 1)}, {"Y", normal({4}, 2)}};
  const std::string text =
      "cascade cg\nrank i j = I k = I t = I\nin G[i,j] Y[i]\n"
      "A[i,j]    = G[i,k] * G[j,k] + select(i == j, 1, 0) / I\n"
      "AP[t,i]   = A[i,j] * P[t,j]\nRR[t]     = R[t,i] * R[t,i]\nPAP[t]    = P[t,i] * AP[t,i]\n"
      "X[t+1,i]  = X[t,i] + RR[t] / PAP[t] * P[t,i] ; X[0,i] = 0 * Y[i]\n"
      "R[t+1,i]  = R[t,i] - RR[t] / PAP[t] * AP[t,i] ; R[0,i] = Y[i]\n"
      "RN[t]     = R[t+1,i] * R[t+1,i]\n"
      "P[t+1,i]  = R[t+1,i] + RN[t] / RR[t] * P[t,i] ; P[0,i] = Y[i]\n"
      "out O[i]  = A[i,j] * X[T,j]\nout S[i] = X[T,i]\n";
  EXPECT_TRUE(near(run(text, b), b.tensors.at("Y"), 1e-9));
  // The gradient through all steps is that of the solution: dy = A^-1 g, here with g = y.
  const Values gradients = gradient(parse(text), b, {{"S", b.tensors.at("Y")}});
  EXPECT_TRUE(near(gradients.at("Y"), run(text, b, "S"), 1e-6));
}

}  // namespace
}  // namespace heed::cascade
