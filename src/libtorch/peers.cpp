#include "libtorch/peers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "heed/error.h"
#include "libtorch/peer_parts.h"
#include "torch/types.h"

namespace heed {

namespace peers {

at::Tensor wrap(const Tensor& tensor) {
  const auto shape = tensor.shape().span();
  const auto strides = tensor.strides().span();
  return at::from_blob(tensor.data(), {shape.data(), shape.size()},
                       {strides.data(), strides.size()}, at::dtype(torch_type(tensor.dtype())));
}

bool knows(const Tensors& in, const std::vector<std::string>& inputs, const Spec& options,
           const std::vector<std::string>& keys) {
  for (const auto& [name, tensor] : in) {
    if (std::find(inputs.begin(), inputs.end(), name) == inputs.end()) return false;
  }
  try {
    options.require_known(keys);
  } catch (const Error&) {
    return false;
  }
  return true;
}

at::Tensor for_heads(const at::Tensor& kv, int64_t heads) {
  const int64_t group = kv.size(1) == 0 ? 1 : heads / kv.size(1);
  return group == 1 ? kv : kv.repeat_interleave(group, 1);
}

double scale_of(const Tensors& in, const Spec& options) {
  return options.number("scale").value_or(1 / std::sqrt(static_cast<double>(in.at("q").size(3))));
}

}  // namespace peers

namespace {

Array unwrap(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.detach().contiguous();
  const Dims shape({plain.sizes().data(), plain.sizes().size()});
  const std::optional<DType> dtype = heed_type(plain.scalar_type());
  if (!dtype) throw Error("Peer: a result has a type unknown to heed");
  Array result(*dtype, shape);
  copy(Tensor(plain.const_data_ptr(), *dtype, shape), result);
  return result;
}

/// A composition with its inputs and what it last computed.
class Run {
 public:
  Run(peers::Composition composition, peers::Tensors in, at::ScalarType type, int threads)
      : composition_(std::move(composition)), in_(std::move(in)), type_(type), threads_(threads) {}

  void compute() {
    const c10::InferenceMode inference;
    at::set_num_threads(threads_);
    out_ = composition_.call(in_);
  }
  Array result() const {
    if (!out_.defined()) throw Error("Peer::result: compute has not run yet");
    return unwrap(out_.to(type_));
  }

  void prepare_backward(const Tensor& out_gradient) {
    at::set_num_threads(threads_);
    peers::Tensors recorded = in_;
    names_.clear();
    leaves_.clear();
    for (auto& [name, tensor] : recorded) {
      if (!tensor.is_floating_point()) continue;
      tensor = tensor.detach().requires_grad_(true);
      names_.push_back(name);
      leaves_.push_back(tensor);
    }
    recorded_ = composition_.call(recorded);
    out_gradient_ = peers::wrap(out_gradient).to(recorded_.scalar_type());
    gradients_.clear();
  }
  void backward() {
    if (!recorded_.defined()) throw Error("Peer::backward: prepare_backward has not run yet");
    at::set_num_threads(threads_);
    gradients_ = torch::autograd::grad({recorded_}, leaves_, {out_gradient_},
                                       /*retain_graph=*/true, /*create_graph=*/false,
                                       /*allow_unused=*/true);
  }
  Array gradient(const std::string& input) const {
    const auto found = std::find(names_.begin(), names_.end(), input);
    const auto at = static_cast<size_t>(found - names_.begin());
    if (at >= gradients_.size()) {
      throw Error("Peer::gradient: there is none of '" + input + "'");
    }
    const at::Tensor& gradient =
        gradients_[at];  // undefined where the result does not depend on it
    return unwrap(gradient.defined() ? gradient : at::zeros_like(leaves_[at]));
  }

 private:
  peers::Composition composition_;
  peers::Tensors in_;
  at::ScalarType type_;
  int threads_;
  at::Tensor out_, recorded_, out_gradient_;
  std::vector<std::string> names_;
  std::vector<at::Tensor> leaves_, gradients_;
};

}  // namespace

std::optional<Peer> make_peer(std::string_view mechanism, const NamedTensors& in,
                              const Spec& options, int threads) {
  peers::Tensors tensors;
  for (const auto& [name, tensor] : in) tensors.emplace(name, peers::wrap(tensor));
  std::optional<peers::Composition> composition;
  for (const auto family : {peers::softmax_family, peers::local_family, peers::linear_family,
                            peers::feature_family, peers::pairs_family}) {
    composition = family(mechanism, tensors, options);
    if (composition) break;
  }
  if (!composition) return std::nullopt;
  const char* first = in.contains("q")       ? "q"
                      : in.contains("query") ? "query"
                      : in.contains("x")     ? "x"
                                             : "out_a";
  const at::ScalarType type = tensors.at(first).scalar_type();
  std::string title = composition->title;
  const auto call =
      std::make_shared<Run>(*std::move(composition), std::move(tensors), type, threads);
  return Peer{.title = std::move(title),
              .compute = [call] { call->compute(); },
              .result = [call] { return call->result(); },
              .prepare_backward = [call](const Tensor& g) { call->prepare_backward(g); },
              .backward = [call] { call->backward(); },
              .gradient = [call](const std::string& name) { return call->gradient(name); }};
}

}  // namespace heed
