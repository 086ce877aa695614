// What the program takes from libtorch: products of dense matrices, and the compositions that a benchmark
// stands beside. They are in a shared library that is loaded when the first of them is asked for: loading
// libtorch takes 0.2 s and 100 MB, which most commands do not need.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "heed/tensor.h"
#include "libtorch/peers.h"

namespace heed {

struct TorchLibrary {
  std::string version;  // of PyTorch, as it was built with
  // Threads are given, as the library does not know what set_threads() said here.
  /// y[m,n] = sum_k x[m,k] w[n,k]; x [M,K], w [N,K], y [M,N] with a unit stride in columns, all bfloat16.
  void (*product)(const Tensor& x, const Tensor& w, const Tensor& y, int threads);
  /// As heed::make_peer.
  std::optional<Peer> (*make_peer)(std::string_view mechanism, const NamedTensors& in,
                                   const Spec& options, int threads);
};

/// Null where heed was built without libtorch (HEED_TORCH=OFF). Throws Error where it was built with it and
/// the library cannot be loaded.
const TorchLibrary* torch_library();

}  // namespace heed
