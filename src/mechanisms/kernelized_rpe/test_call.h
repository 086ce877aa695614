// A call with random inputs that the tests of kernelized RPE attention share.
#pragma once
#include "heed/feature_map.h"
#include "heed/kernelized_rpe_attention.h"
#include "mechanisms/test_arrays.h"

namespace heed {

inline constexpr RpePath kPaths[] = {RpePath::direct, RpePath::fft};

/// Two batches with head dim 8, value dim 6 and 12 features; a bias of just the needed length.
struct RpeTestCall {
  Array q, k, v, rpb, projection;
  KernelizedRpeOptions options;
  explicit RpeTestCall(DType type, int64_t tokens = 70, int64_t heads = 2, int64_t kv_heads = 1)
      : q(random_array(type, {2, heads, tokens, 8}, 1)),
        k(random_array(type, {2, kv_heads, tokens, 8}, 2)),
        v(random_array(type, {2, kv_heads, tokens, 6}, 3)),
        rpb(random_array(type, {heads, 2 * tokens - 1}, 4)),
        projection(convert(performer_projection(heads, 12, 8, 5), type)) {}
  Array run(RpePath path, const RunOptions& how = {}) const {
    KernelizedRpeOptions chosen = options;
    chosen.path = path;
    return kernelized_rpe_attention(q, k, v, rpb, projection_in_use(), chosen, how);
  }
  KernelizedRpeGradients backward(const Array& gradient, RpePath path,
                                  const RunOptions& how = {}) const {
    KernelizedRpeOptions chosen = options;
    chosen.path = path;
    return kernelized_rpe_attention_backward(gradient, q, k, v, rpb, projection_in_use(), chosen,
                                             how);
  }
  Tensor projection_in_use() const {
    return options.features == RpeFeatures::elu1 ? Tensor() : projection.view();
  }
};

}  // namespace heed
