// Attention whose weights are products of features: sums over the keys, or chunks of tokens with a state
// between them.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "libtorch/peer_parts.h"

namespace heed::peers {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 128;  // tokens

bool square(const Tensors& in) { return in.at("q").size(2) == in.at("k").size(2); }

/// [B,H,L,D] as [B,H,chunks,kChunk,D], the last chunk padded with zeros.
Tensor chunked(const Tensor& x) {
  const int64_t padding = (kChunk - x.size(2) % kChunk) % kChunk;
  return at::constant_pad_nd(x, {0, 0, 0, padding}).unflatten(2, {-1, kChunk});
}

/// The sums of all keys, or of those up to the query.
Tensor sums(bool causal, const Tensor& q, const Tensor& k, const Tensor& v) {
  if (causal) return causal_sums(q, k, v, {});
  return at::matmul(q, for_heads(at::matmul(k.transpose(-1, -2), v), q.size(1)));
}

Composition linear(const Spec& options) {
  const bool causal = options.flag("causal"), normalize = options.flag("normalize", true);
  const double eps = options.number("eps").value_or(1e-12);
  return {causal ? "chunks of products" : "q (k^T v) / q sum(k)", [=](const Tensors& t) {
            if (!normalize) return sums(causal, t.at("q"), t.at("k"), t.at("v"));
            const Tensor both = sums(causal, t.at("q"), t.at("k"), with_ones(t.at("v")));
            const int64_t width = t.at("v").size(3);
            return both.narrow(3, 0, width) / (both.narrow(3, width, 1) + eps);
          }};
}

/// Cosines and sines of the turns of MALA's features on a grid, each [tokens, dim].
std::pair<Tensor, Tensor> grid_turns(int64_t tokens, int64_t dim, const Spec& options,
                                     const at::TensorOptions& type) {
  const int64_t width = *options.integer("width"), pairs = dim / 4;
  const auto most = static_cast<double>(std::max<int64_t>(1, pairs - 1));
  const Tensor exponents = at::arange(pairs, at::kDouble) / most;
  const Tensor angles = (exponents * -std::log(10000.0)).exp().repeat_interleave(2);
  const Tensor place = at::arange(tokens, at::kLong).unsqueeze(1);
  const Tensor row = place.div(width, "floor"), column = place.remainder(width);
  const Tensor turns = at::cat({row * angles, column * angles}, -1);
  return {turns.cos().to(type), turns.sin().to(type)};
}
/// Pairs of features rotated.
Tensor turned(const Tensor& x, const std::pair<Tensor, Tensor>& turns) {
  const Tensor pairs = x.unflatten(-1, {-1, 2});
  const Tensor crossed = at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
  return x * turns.first + crossed * turns.second;
}

Composition magnitude_aware(const Tensors& in, const Spec& options) {
  const bool causal = options.flag("causal");
  const std::string form = options.text("form").value_or("code");
  const bool paper = form == "paper", consistent = form == "consistent";
  const Tensor& q = in.at("q");
  const double scale = scale_of(in, options);
  const double eps = options.number("eps").value_or(1e-6);
  std::optional<std::pair<Tensor, Tensor>> turns;
  if (options.has("width")) turns = grid_turns(q.size(2), q.size(3), options, q.options());
  return {causal ? "chunks of products" : "q (k^T v), sums of k and v", [=](const Tensors& t) {
            const Tensor& v = t.at("v");
            const int64_t width = v.size(3), keys = v.size(2), heads = t.at("q").size(1);
            Tensor fq = at::elu(t.at("q")) + 1, fk = at::elu(t.at("k")) + 1;
            if (turns && consistent) {
              fq = turned(fq, *turns);
              fk = turned(fk, *turns);
            }
            Tensor read, total;
            if (turns && !consistent) {  // which totals do not know
              read = sums(causal, turned(fq, *turns), turned(fk, *turns), v);
              total = sums(causal, fq, fk, at::ones_like(v.narrow(3, 0, 1)));
            } else {
              const Tensor both = sums(causal, fq, fk, with_ones(v));
              read = both.narrow(3, 0, width);
              total = both.narrow(3, width, 1);
            }
            Tensor seen = at::ones({1}, v.options()) * static_cast<double>(keys);
            Tensor v_sum = v.sum(2, true);
            if (causal) {
              seen = at::arange(1, keys + 1, v.options()).view({-1, 1});
              v_sum = v.cumsum(2);
            }
            const Tensor c = paper ? at::ones_like(seen) : scale / seen;
            const Tensor z = c * total;
            return ((z + eps).reciprocal() + 1) * c * read - z * for_heads(v_sum, heads) / seen;
          }};
}

Composition relu_linear(const Spec& options) {
  const double clamp = options.number("clamp").value_or(100);
  return {
      "relu(q) (relu(k)^T v) / clamp(relu(q) sum(relu(k)))", [=](const Tensors& t) {
        const int64_t width = t.at("v").size(3);
        const Tensor both = sums(false, t.at("q").relu(), t.at("k").relu(), with_ones(t.at("v")));
        const Tensor temperature = t.at("temperature").to(both.scalar_type()).view({-1, 1, 1});
        return temperature * both.narrow(3, 0, width) / both.narrow(3, width, 1).clamp_min(clamp);
      }};
}

}  // namespace

Tensor causal_sums(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slopes) {
  const int64_t tokens = q.size(2);
  const Tensor qc = chunked(q), kc = chunked(for_heads(k, q.size(1))),
               vc = chunked(for_heads(v, q.size(1)));
  const Tensor place = at::arange(kChunk, q.options());
  Tensor scores = at::matmul(qc, kc.transpose(-1, -2)), states_q = qc, states_k = kc, decay;
  if (slopes.defined()) {
    const Tensor slope = slopes.to(q.scalar_type()).view({-1, 1, 1, 1});
    const Tensor apart = (place.view({-1, 1}) - place).clamp_min(0);
    scores = scores * (-slope * apart).exp();
    states_q = qc * (-slope * (place + 1).view({-1, 1})).exp();
    states_k = kc * (-slope * (kChunk - 1 - place).view({-1, 1})).exp();
    decay = (-slope.squeeze(-1) * static_cast<double>(kChunk)).exp();
  }
  const Tensor inside = at::matmul(scores.tril(), vc);
  const std::vector<Tensor> sums = at::matmul(states_k.transpose(-1, -2), vc).unbind(2);
  std::vector<Tensor> before = {at::zeros_like(sums[0])};
  for (size_t t = 0; t + 1 < sums.size(); ++t) {
    before.push_back((decay.defined() ? before[t] * decay : before[t]) + sums[t]);
  }
  const Tensor out = inside + at::matmul(states_q, at::stack(before, 2));
  return out.flatten(2, 3).narrow(2, 0, tokens);
}

Tensor with_ones(const Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = 1;
  return at::cat({x, at::ones(shape, x.options())}, -1);
}

std::optional<Composition> linear_family(std::string_view mechanism, const Tensors& in,
                                         const Spec& options) {
  const std::vector<std::string> qkv = {"q", "k", "v"};
  if (mechanism == "lightning_attention" && knows(in, {"q", "k", "v", "slopes"}, options, {}) &&
      square(in)) {
    return Composition{"chunks of products with decay", [](const Tensors& t) {
                         const auto slopes = t.find("slopes");
                         return causal_sums(t.at("q"), t.at("k"), t.at("v"),
                                            slopes == t.end() ? Tensor() : slopes->second);
                       }};
  }
  if (mechanism == "linear_attention" && knows(in, qkv, options, {"causal", "normalize", "eps"}) &&
      (!options.flag("causal") || square(in))) {
    return linear(options);
  }
  if (mechanism == "magnitude_aware_linear_attention" &&
      knows(in, qkv, options, {"causal", "form", "scale", "eps", "height", "width"}) &&
      (!options.flag("causal") || square(in))) {
    return magnitude_aware(in, options);
  }
  if (mechanism == "relu_linear_attention" &&
      knows(in, {"q", "k", "v", "temperature"}, options, {"clamp"})) {
    return relu_linear(options);
  }
  return std::nullopt;
}

}  // namespace heed::peers
