// Feature maps of linear attention, and attention by random features with relative positions.
#include <ATen/ops/cat.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>

#include <cmath>

#include "heed/feature_map.h"
#include "libtorch/peer_parts.h"

namespace heed::peers {
namespace {

using at::Tensor;

double fourth_root(int64_t width) { return std::sqrt(std::sqrt(static_cast<double>(width))); }

Tensor random_exponents(const Tensor& x, const Tensor& projection) {
  return at::matmul(x, projection.to(x.scalar_type()).transpose(-1, -2));
}
Tensor half_square(const Tensor& x) { return (x * x).sum(-1, true) / 2; }

Tensor features_of(FeatureKind kind, const Tensor& z, double floor) {
  const auto halves = [&](const Tensor& first, const Tensor& second) {
    return at::cat({first, second}, -1);
  };
  switch (kind) {
    case FeatureKind::elu1:
      return at::elu(z) + 1;
    case FeatureKind::relu:
      return z.relu();
    case FeatureKind::exp:
      return z.exp();
    case FeatureKind::hedgehog_exp:
      return halves(z.exp(), (-z).exp());
    case FeatureKind::hedgehog_softmax:
      return halves(at::softmax(z, -1), at::softmax(-z, -1)).clamp_min(floor);
    case FeatureKind::hedgehog_exp_max:
      return halves((z - z.amax(-1, true)).exp(), (z.amin(-1, true) - z).exp()).clamp_min(floor);
    case FeatureKind::hedgehog_joint:
      return at::softmax(halves(2 * z, -2 * z), -1).clamp_min(floor);
    default:  // taylor2
      return taylor_features(z / fourth_root(z.size(3)));
  }
}

Composition feature_map(const Spec& options) {
  const FeatureKind kind = parse_feature_kind(options.text("kind").value_or("elu1"));
  return {"a product and its features", [kind](const Tensors& t) {
            const Tensor& x = t.at("x");
            const auto weight = t.find("weight"), bias = t.find("bias");
            if (kind == FeatureKind::performer) {
              const Tensor y = x / fourth_root(x.size(3));
              return (random_exponents(y, weight->second) - half_square(y)).exp() /
                     std::sqrt(static_cast<double>(weight->second.size(1)));
            }
            const auto type = x.scalar_type();
            Tensor z = weight == t.end() ? x : at::matmul(x, weight->second.to(type));
            if (bias != t.end()) z = z + bias->second.to(type).unsqueeze(1);
            return features_of(kind, z, type == at::kHalf ? 6e-8 : 1e-12);
          }};
}

Tensor rpe_features(const std::string& kind, const Tensor& x, const Tensor& projection) {
  if (kind == "elu1") return at::elu(x) + 1;
  if (kind == "nprf") return random_exponents(x / x.norm(2, -1, true), projection).exp();
  const Tensor y = x / fourth_root(x.size(3));
  const Tensor exponents = random_exponents(y, projection);
  if (kind == "prf") return (exponents - half_square(y)).exp();
  return half_square(y).exp() * at::cat({exponents.sin(), exponents.cos()}, -1);
}

Composition kernelized_rpe(const Spec& options) {
  const std::string kind = options.text("features").value_or("nprf");
  const bool causal = options.flag("causal");
  return {"products of all pairs of features", [=](const Tensors& t) {
            const Tensor& q = t.at("q");
            const int64_t heads = q.size(1), tokens = q.size(2);
            const auto projection = t.find("projection");
            const Tensor drawn = projection == t.end() ? Tensor() : projection->second.detach();
            const auto group_of = [&](const Tensor& x) {
              return rpe_features(kind, for_heads(x, heads), drawn);
            };
            const Tensor products = at::matmul(group_of(q), group_of(t.at("k")).transpose(-1, -2));
            const Tensor& rpb = t.at("rpb");
            const Tensor factors = rpb.narrow(1, rpb.size(1) / 2 - (tokens - 1), 2 * tokens - 1)
                                       .to(q.scalar_type())
                                       .exp()
                                       .unsqueeze(1)
                                       .expand({heads, tokens, 2 * tokens - 1});
            Tensor w = products * by_key(factors, tokens);
            if (causal) w = w.tril();
            return at::matmul(w, for_heads(t.at("v"), heads)) / w.sum(-1, true);
          }};
}

}  // namespace

Tensor taylor_features(const Tensor& y) {
  const Tensor pairs = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2) * std::sqrt(0.5);
  return at::cat({at::ones_like(y.narrow(-1, 0, 1)), y, pairs}, -1);
}

std::optional<Composition> feature_family(std::string_view mechanism, const Tensors& in,
                                          const Spec& options) {
  if (mechanism == "feature_map" && knows(in, {"x", "weight", "bias"}, options, {"kind"})) {
    return feature_map(options);
  }
  if (mechanism == "kernelized_rpe_attention" &&
      knows(in, {"q", "k", "v", "rpb", "projection"}, options, {"features", "causal", "path"}) &&
      in.at("rpb").dim() == 2) {
    return kernelized_rpe(options);
  }
  return std::nullopt;
}

}  // namespace heed::peers
