#include "torch/peers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <limits>
#include <memory>
#include <set>

#include "base/parallel.h"
#include "heed/error.h"

namespace heed {
namespace {

at::ScalarType torch_type(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return at::kDouble;
    case DType::f32:
      return at::kFloat;
    case DType::bf16:
      return at::kBFloat16;
    case DType::f16:
      return at::kHalf;
    case DType::i64:
      return at::kLong;
    case DType::i32:
      return at::kInt;
    case DType::boolean:
      return at::kBool;
  }
  throw Error("make_peer: an input has a type unknown to PyTorch");
}

at::Tensor wrap(const Tensor& tensor) {
  const auto shape = tensor.shape().span();
  const auto strides = tensor.strides().span();
  return at::from_blob(tensor.data(), {shape.data(), shape.size()},
                       {strides.data(), strides.size()}, at::dtype(torch_type(tensor.dtype())));
}

Array unwrap(const at::Tensor& tensor, DType dtype) {
  const at::Tensor plain = tensor.contiguous();
  const Dims shape({plain.sizes().data(), plain.sizes().size()});
  Array result(dtype, shape);
  copy(Tensor(plain.const_data_ptr(), dtype, shape), result);
  return result;
}

bool knows(const NamedTensors& in, const std::set<std::string>& inputs, const Spec& options,
           const std::vector<std::string>& keys) {
  for (const auto& [name, tensor] : in) {
    if (!inputs.contains(name)) return false;
  }
  try {
    options.require_known(keys);
  } catch (const Error&) {
    return false;
  }
  return true;
}

struct Inputs {
  Inputs(const NamedTensors& in, const Spec& options)
      : q(wrap(in.at("q"))),
        k(wrap(in.at("k"))),
        v(wrap(in.at("v"))),
        causal(options.flag("causal")),
        scale(options.number("scale")) {}
  /// The keys that exist in caches of sequences that are all `length` long.
  Inputs(const NamedTensors& in, const Spec& options, int64_t length)
      : q(wrap(in.at("q"))),
        k(wrap(in.at("k_cache")).narrow(2, 0, length)),
        v(wrap(in.at("v_cache")).narrow(2, 0, length)),
        causal(q.size(2) > 1),
        scale(options.number("scale")) {}
  int64_t queries() const { return q.size(2); }
  int64_t keys() const { return k.size(2); }
  int64_t group() const { return k.size(1) == 0 ? 1 : q.size(1) / k.size(1); }
  /// [Lq,Lk], true where the causal mask, aligned to the end of the keys, lets a query see.
  at::Tensor visible() const {
    return at::ones({queries(), keys()}, at::kBool).tril(keys() - queries());
  }

  at::Tensor q, k, v;
  bool causal;
  std::optional<double> scale;
};

std::function<at::Tensor()> softmax(const Inputs& x) {
  // PyTorch's own causal flag is aligned to the start of the keys.
  const bool square = x.queries() == x.keys();
  std::optional<at::Tensor> mask;
  if (x.causal && !square) mask = x.visible();
  return [x, mask, is_causal = x.causal && square] {
    return at::scaled_dot_product_attention(x.q, x.k, x.v, mask, 0.0, is_causal, x.scale,
                                            x.group() != 1);
  };
}

/// The length of all sequences, none where they differ.
std::optional<int64_t> common_length(const Tensor& lengths) {
  const at::Tensor values = wrap(lengths).to(at::kLong);
  if (values.numel() == 0) return std::nullopt;
  const auto length = values[0].item<int64_t>();
  return values.eq(length).all().item<bool>() ? std::optional(length) : std::nullopt;
}

std::function<at::Tensor()> sigmoid(const NamedTensors& in, const Spec& options) {
  const Inputs x(in, options);
  const double scale = x.scale.value_or(1 / std::sqrt(static_cast<double>(x.q.size(3))));
  at::Tensor added;  // what comes onto the scaled scores, broadcastable to [B,H,Lq,Lk]
  if (in.contains("bias")) {
    added = wrap(in.at("bias")).to(x.q.scalar_type()).view({-1, 1, 1});
  } else {
    const double bias = options.number("bias").value_or(-std::log(static_cast<double>(x.keys())));
    added = at::full({1, 1, 1}, bias, x.q.options());
  }
  if (x.causal) added = added.masked_fill(~x.visible(), -std::numeric_limits<double>::infinity());
  return [x, scale, added] {
    const int64_t group = x.group();
    const at::Tensor k = group == 1 ? x.k : x.k.repeat_interleave(group, 1);
    const at::Tensor v = group == 1 ? x.v : x.v.repeat_interleave(group, 1);
    const at::Tensor scores = at::matmul(x.q, k.transpose(-1, -2)).mul_(scale).add_(added);
    return at::matmul(scores.sigmoid_(), v);
  };
}

Peer timed(std::string title, DType dtype, int threads, std::function<at::Tensor()> call) {
  const auto last = std::make_shared<at::Tensor>();
  return Peer{.title = std::move(title),
              .compute =
                  [last, threads, call = std::move(call)] {
                    const c10::InferenceMode inference;
                    at::set_num_threads(threads);
                    *last = call();
                  },
              .result =
                  [last, dtype] {
                    if (!last->defined()) throw Error("Peer::result: compute has not run yet");
                    return unwrap(*last, dtype);
                  }};
}

}  // namespace

std::optional<Peer> make_peer(std::string_view mechanism, const NamedTensors& in,
                              const Spec& options, const RunOptions& run) {
  const int threads = run.threads.value_or(default_threads());
  if (mechanism == "flash_attention" && knows(in, {"q", "k", "v"}, options, {"causal", "scale"})) {
    return timed("scaled_dot_product_attention", in.at("q").dtype(), threads,
                 softmax(Inputs(in, options)));
  }
  if (mechanism == "decode_attention" &&
      knows(in, {"q", "k_cache", "v_cache", "lengths"}, options, {"scale"})) {
    const auto length = common_length(in.at("lengths"));
    if (!length) return std::nullopt;
    return timed("scaled_dot_product_attention", in.at("q").dtype(), threads,
                 softmax(Inputs(in, options, *length)));
  }
  if (mechanism == "sigmoid_attention" &&
      knows(in, {"q", "k", "v", "bias"}, options, {"causal", "scale", "bias"})) {
    return timed("sigmoid(q k^T * scale + bias) v", in.at("q").dtype(), threads,
                 sigmoid(in, options));
  }
  return std::nullopt;
}

}  // namespace heed
