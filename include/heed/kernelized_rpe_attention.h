// Kernelized attention with relative positions, by FFT or directly.  arXiv 2106.12566
//
//   A[b,h,p,m] = exp(rpb[h, m - p]) phi(q[b,h,p]) . phi(k[b,g(h),m])          g(h) = h / (H/Hkv)
//   out        = sum over the visible m of A v[b,g(h),m,f] / sum over the visible m of A
//
//   features   phi(x), W = projection[h]
//   nprf       exp(W x / |x|)                     positive; a zero vector gives exp(0)
//   prf        exp(W y - |y|^2 / 2)               y = x / D^(1/4); positive
//   trf        exp(|y|^2 / 2) [sin W y, cos W y]  may be negative, the sum of A may vanish
//   elu1       x + 1 where x > 0, else exp(x)     no projection
//
// Factors that all features of a query, or of all keys, share cancel and are left out (1/sqrt(M), the
// largest exponents): nothing overflows. An offset with rpb = -inf is masked; where nothing is visible
// out = 0.
//
// q [B,H,L,D]  k [B,Hkv,L,D]  v [B,Hkv,L,Dv]  projection [H,M,D]  out [B,H,L,Dv]
// rpb [H,2R-1], R >= L: entry R-1 + (m - p), so the centre is used; with grid = (Gy,Gx), L = Gy*Gx and
// tokens row by row, rpb [H,2Gy-1,2Gx-1] by rows and columns. causal: m <= p (on a grid: earlier in that
// order). H % Hkv == 0; D and Dv from 1 to 256, M any; any strides with a unit stride in the last
// dimension. float64, float32, bfloat16, float16; rpb and projection may be float32 beside 16 bits.
// Gradients: q, k, v, rpb; projection has none.
//
// Two ways to the same numbers. direct: all pairs, in tiles. fft: products with Toeplitz matrices,
// O(L log L) a feature and value channel, in float64 (long double for float64). Its error is relative to
// the largest sums of a head, so it is refused (by auto replaced) where the exp(rpb) of a head differ by more
// than 1e6, or a bound of the error exceeds 1e-6 (float64: 1e-10) of what some token sees; inputs that are
// not finite are always computed directly. Memory: O(L (M + Dv)) for the heads in
// flight, never [L,L] and never [L,M,Dv].
#pragma once
#include <array>
#include <optional>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

enum class RpeFeatures { nprf, prf, trf, elu1 };
const char* name_of(RpeFeatures features);
RpeFeatures parse_rpe_features(std::string_view name);  // throws Error listing the names

/// `automatic` ("auto") takes the faster of the two by kernelized_rpe_cost.
enum class RpePath { automatic, fft, direct };
const char* name_of(RpePath path);
RpePath parse_rpe_path(std::string_view name);

struct KernelizedRpeOptions {
  RpeFeatures features = RpeFeatures::nprf;
  bool causal = false;
  std::optional<std::array<int64_t, 2>> grid = {};  // rows and columns; none: one row
  RpePath path = RpePath::automatic;
};

/// The model behind `automatic`: estimated seconds of one head's forward on one core.
///   direct  2 * pairs * (F + Dv in sixteens) operations at 97, 75 or 5 GFLOP/s (AVX-512, AVX2, portable) and
///           0.17 ns a pair, twice that in float64; pairs = L^2, causal half of it
///   fft     F * (Dv + 1) complex transforms of N points, N the next product of 2, 3 and 5 from twice the
///           positions on, at 1.7 ns * N log2 N (float64 calls: 11 ns)
/// F = M, for trf 2M, for elu1 D; positions = L, on a grid those of its padded rows, Gy * (2Gx - 1).
struct RpeCost {
  double direct = 0, fft = 0;
};
RpeCost kernelized_rpe_cost(int64_t tokens, int64_t positions, int64_t features, int64_t value_dim,
                            bool causal, DType dtype, Isa isa);

Array kernelized_rpe_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
                               const Tensor& projection, const KernelizedRpeOptions& options = {},
                               const RunOptions& run = {});
void kernelized_rpe_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
                              const Tensor& projection, const Tensor& out,
                              const KernelizedRpeOptions& options = {}, const RunOptions& run = {});

/// Each in the shape and type of what it belongs to; 0 for entries of rpb that are not used.
struct KernelizedRpeGradients {
  Array q, k, v, rpb;
};
KernelizedRpeGradients kernelized_rpe_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rpb,
    const Tensor& projection, const KernelizedRpeOptions& options = {}, const RunOptions& run = {});
/// Into caller memory. Same bits for the same number of threads.
struct KernelizedRpeGradientViews {
  Tensor q = {}, k = {}, v = {}, rpb = {};
};
void kernelized_rpe_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& rpb, const Tensor& projection,
                                       const KernelizedRpeOptions& options,
                                       const KernelizedRpeGradientViews& gradients,
                                       const RunOptions& run = {});

}  // namespace heed
