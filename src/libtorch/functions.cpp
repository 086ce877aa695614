// The entry of the library that holds libtorch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "libtorch/library.h"
#include "libtorch/peer_parts.h"

namespace heed {

namespace {

void product(const Tensor& x, const Tensor& w, const Tensor& y, int threads) {
  const c10::InferenceMode inference;
  if (at::get_num_threads() != threads) at::set_num_threads(threads);
  at::Tensor out = peers::wrap(y);
  at::mm_out(out, peers::wrap(x), peers::wrap(w).t());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const TorchLibrary* heed_torch_functions() {
  static const TorchLibrary functions{HEED_TORCH_VERSION, product, make_peer};
  return &functions;
}

}  // namespace heed
