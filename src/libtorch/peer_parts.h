// What compositions are made of. Each family is a file; a composition computes only from the tensors it
// is given, so that autograd can follow it.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heed/tensor.h"
#include "mechanisms/spec.h"

namespace heed::peers {

using Tensors = std::map<std::string, at::Tensor>;

struct Composition {
  std::string title;
  std::function<at::Tensor(const Tensors& in)> call;
};

/// One family: none where it does not know the mechanism, one of the inputs or one of the options.
std::optional<Composition> softmax_family(std::string_view mechanism, const Tensors& in,
                                          const Spec& options);
std::optional<Composition> local_family(std::string_view mechanism, const Tensors& in,
                                        const Spec& options);
std::optional<Composition> linear_family(std::string_view mechanism, const Tensors& in,
                                         const Spec& options);
std::optional<Composition> feature_family(std::string_view mechanism, const Tensors& in,
                                          const Spec& options);
std::optional<Composition> pairs_family(std::string_view mechanism, const Tensors& in,
                                        const Spec& options);

/// The same memory.
at::Tensor wrap(const Tensor& tensor);

/// Whether all inputs and options are among these.
bool knows(const Tensors& in, const std::vector<std::string>& inputs, const Spec& options,
           const std::vector<std::string>& keys);

/// Keys or values [B,Hkv,L,D] for each of `heads` query heads.
at::Tensor for_heads(const at::Tensor& kv, int64_t heads);

/// The option, or 1 / sqrt(D).
double scale_of(const Tensors& in, const Spec& options);

/// [...,1 + D + D^2]: products with those of another row are 1 + s + s^2 / 2, s the product of the rows.
at::Tensor taylor_features(const at::Tensor& y);

/// [...,D] with a column of ones: sums of it are those of weights.
at::Tensor with_ones(const at::Tensor& x);

/// sum over s <= t of exp(-slopes[h] (t - s)) (q_t . k_s) v_s; no decay where slopes is undefined.
at::Tensor causal_sums(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& slopes);

/// [...,Lq,Lq+Lk-1] by distance, Lq - 1 being that of the last query to the first key after it, as
/// [...,Lq,Lk]: element (p, m) is that of distance m + Lq - 1 - p.
at::Tensor by_key(const at::Tensor& by_distance, int64_t keys);

}  // namespace heed::peers
