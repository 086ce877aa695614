#include "mechanisms/flash/policy.h"

#include <cmath>
#include <string>

namespace heed {

tiled::Policy softmax_policy(const char* op, int64_t batch, int64_t heads, double softcap,
                             const Tensor& alibi_slopes, const Tensor& sink, double dropout_p,
                             uint64_t seed) {
  if (!(softcap >= 0) || !std::isfinite(softcap)) {
    fail(op, "softcap is " + std::to_string(softcap),
         "0 (none) or a positive finite number is needed");
  }
  if (!(dropout_p >= 0 && dropout_p < 1)) {
    fail(op, "dropout_p is " + std::to_string(dropout_p),
         "a probability from 0 up to, not including, 1 is needed");
  }
  tiled::Policy policy;
  policy.softcap = softcap;
  policy.dropout = dropout_p;
  policy.seed = seed;
  tiled::set_alibi_slopes(policy, op, alibi_slopes, batch, heads);
  if (sink.defined()) policy.sink = tiled::per_head(op, "sink", sink, heads);
  return policy;
}

}  // namespace heed
