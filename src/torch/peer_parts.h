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

/// Whether all inputs and options are among these.
bool knows(const Tensors& in, const std::vector<std::string>& inputs, const Spec& options,
           const std::vector<std::string>& keys);

/// Keys or values [B,Hkv,L,D] for each of `heads` query heads.
at::Tensor for_heads(const at::Tensor& kv, int64_t heads);

}  // namespace heed::peers
