// Neighborhood attention on grids of one to three axes: each token attends to the kernel_size nearest
// tokens along every axis.  arXiv 2403.04690 (windows, dilation, causal axes), 2504.16922 (stride)
//
//   S[b,p,h,m] = scale * sum_e query[b,p,h,e] key[b,m,g(h),e] + rpb[h,...]      g(h) = h / (H/Hkv)
//   out        = softmax of S over the window of p and the additional keys, times their values
//   lse[b,p,h] = log sum of exp S over the same                                 natural logarithm
//
// query [B,*grid,H,D]  key [B,*grid,Hkv,D]  value [B,*grid,Hkv,Dv]  out [B,*grid,H,Dv]  lse [B,*grid,H]
// with one (na1d), two (na2d) or three (na3d) grid axes. H % Hkv == 0; D and Dv from 1 to 256; any
// strides with a unit stride in the last dimension. Types as in flash_attention.h.
//
// The window is a product of one interval per axis. An axis of length L falls into `dilation` residue
// groups of tokens d apart, which see only each other; in coordinates of a group of n tokens, with
// kernel size k and stride s (queries [g s, (g + 1) s) share a window), query i sees keys j:
//   not causal  lead = min(i / s * s + s / 2, n - 1), start = clamp(lead - k / 2, 0, n - k),
//               start <= j < start + k: always k keys, the window is pushed back inside at the borders
//   causal      lead = min(i / s * s + s - 1, n - 1), max(lead - k + 1, 0) <= j <= i
// 1 <= stride <= kernel_size and kernel_size * dilation <= L on every axis. Several causal axes: every
// coordinate of the key is <= the query's.
//
// Memory beyond the results: O(threads x tile), and an offset for each token of a tensor with two or three
// axes; in the backward O(threads x tokens). With additional keys also two results in float32 (float64 for
// float64) with their lse, in the backward two gradients of query.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "heed/attention_result.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct NeighborhoodOptions {
  /// One number per grid axis, or one for all.
  std::vector<int64_t> kernel_size = {};
  std::vector<int64_t> stride = {1};
  std::vector<int64_t> dilation = {1};
  std::vector<bool> is_causal = {false};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
  /// Seen by every query: [B,n,Hkv,D] and [B,n,Hkv,Dv]. Both or neither.
  Tensor additional_keys = {}, additional_values = {};
  /// [H, 2 k - 1 per axis], added at key - query + k - 1 in group coordinates; only where every stride
  /// is 1 and no axis causal.
  Tensor rpb = {};
};

/// Gradients of the inputs in their types; those of absent options are empty.
struct NeighborhoodGradients {
  Array query, key, value, additional_keys, additional_values, rpb;
};

AttentionResult na1d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run = {});
AttentionResult na2d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run = {});
AttentionResult na3d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run = {});

/// The same into caller memory. `lse` may be an undefined Tensor: it is then not written.
void na1d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run = {});
void na2d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run = {});
void na3d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run = {});

/// out and lse are what the forward returned for the same options; grad_lse may be undefined (zero).
NeighborhoodGradients na1d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run = {});
NeighborhoodGradients na2d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run = {});
NeighborhoodGradients na3d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run = {});

}  // namespace heed
