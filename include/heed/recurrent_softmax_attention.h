// Softmax attention read as a recurrent network: the exponential or its Taylor polynomial as weights, and
// what may stand in the place of the softmax denominator.  arXiv 2507.23632
//
//   x[p,m]   = min(scale * q[p] . k[m], score_clamp)              over the visible keys m, S of them
//   num[p,f] = sum_m w(x[p,m]) v[m,f]      den[p] = sum_m w(x[p,m])
//   w(x)     = exp x, or with an order n the polynomial sum_{i <= n} x^i / i!
//
//   normalizer        result before the gate
//   softmax           num / den            (polynomial: a den below 1e-12 in size becomes +-1e-12)
//   l2                num / max(|num|, 1e-12)                     |.|, means and variances over f
//   rms               num / sqrt(mean(num^2) + eps)
//   layer             (num - mean(num)) / sqrt(variance(num) + eps)
//   divide_by_count   num / S
//   clamped           num / max(den, 1)
//   none              num
//
//   out = gate[p] * result
//
// gate [B,H,Lq] of q's type or float32 (float64 beside float64), any strides; q, k, v, out and their types
// as in flash_attention.h. The exponential never overflows on the way to softmax, l2, rms, layer and
// clamped: num and den are kept as num / den and log den. A row that sees no key: out = 0. Memory beyond
// the results: O(threads x tile), and but for plain softmax one array like out in float32.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

enum class Normalizer { softmax, l2, rms, layer, divide_by_count, clamped, none };
inline constexpr Normalizer kNormalizers[] = {
    Normalizer::softmax,         Normalizer::l2,      Normalizer::rms, Normalizer::layer,
    Normalizer::divide_by_count, Normalizer::clamped, Normalizer::none};
const char* name_of(Normalizer normalizer);
Normalizer parse_normalizer(std::string_view name);  // throws Error listing the names

struct RecurrentSoftmaxOptions {
  Normalizer normalizer = Normalizer::softmax;
  std::optional<int64_t> order = {};       // 0 to 100; none: the exponential
  bool causal = true;                      // aligned to the end of the keys
  std::optional<double> scale = {};        // none: 1/sqrt(D)
  Tensor gate = {};                        // undefined: 1
  std::optional<double> score_clamp = {};  // the paper: 5, not with softmax and the headline's l2
  double eps = 1e-6;                       // >= 0, of rms and layer
};

Array recurrent_softmax_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const RecurrentSoftmaxOptions& options = {},
                                  const RunOptions& run = {});
/// The same into caller memory. core [B,H,Lq,Dv] and statistic [B,H,Lq], float32 (float64 for float64),
/// receive what the backward needs: num / den and log den, with an order num and den. Both or neither
/// may be undefined.
void recurrent_softmax_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& out, const Tensor& core, const Tensor& statistic,
                                 const RecurrentSoftmaxOptions& options = {},
                                 const RunOptions& run = {});

/// In the shapes and types of the inputs; gate is empty where there is none.
struct RecurrentSoftmaxGradients {
  Array q, k, v, gate;
};
/// core and statistic are what the forward wrote. Scores that score_clamp changed, denominators that
/// `clamped` replaced and norms below 1e-12 send nothing on. The same bits for the same number of threads.
RecurrentSoftmaxGradients recurrent_softmax_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& core,
    const Tensor& statistic, const RecurrentSoftmaxOptions& options = {},
    const RunOptions& run = {});

}  // namespace heed
