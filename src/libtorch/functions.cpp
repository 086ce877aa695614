// The entry of the library that holds libtorch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "libtorch/library.h"
#include "torch/types.h"

namespace heed {

namespace {

at::Tensor wrap(const Tensor& x) {
  return at::from_blob(x.data(), {x.size(0), x.size(1)}, {x.stride(0), x.stride(1)},
                       torch_type(x.dtype()));
}

void product(const Tensor& x, const Tensor& w, const Tensor& y, int threads) {
  const c10::InferenceMode inference;
  if (at::get_num_threads() != threads) at::set_num_threads(threads);
  at::Tensor out = wrap(y);
  at::mm_out(out, wrap(x), wrap(w).t());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const TorchLibrary* heed_torch_functions() {
  static const TorchLibrary functions{HEED_TORCH_VERSION, product, make_peer};
  return &functions;
}

}  // namespace heed
