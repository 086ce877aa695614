// Attention over all keys.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <limits>

#include "libtorch/peer_parts.h"

namespace heed::peers {
namespace {

using at::Tensor;

struct Shape {
  explicit Shape(const Tensors& in, const Spec& options)
      : dim(in.at("q").size(3)),
        heads(in.at("q").size(1)),
        queries(in.at("q").size(2)),
        keys(in.at("k").size(2)),
        causal(options.flag("causal")),
        scale(options.number("scale")) {
    // [Lq,Lk], true where the causal mask, aligned to the end of the keys, lets a query see.
    if (causal) visible = at::ones({queries, keys}, at::kBool).tril(keys - queries);
  }
  double scale_or_default() const {
    return scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
  }
  int64_t dim, heads, queries, keys;
  bool causal;
  std::optional<double> scale;
  Tensor visible;
};

Tensor softmax_attention(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v) {
  // PyTorch's own causal flag is aligned to the start of the keys.
  const bool square = s.queries == s.keys;
  std::optional<Tensor> mask;
  if (s.causal && !square) mask = s.visible;
  // A negative scale turns its -inf of hidden keys into NaN.
  const bool negative = s.scale_or_default() < 0;
  return at::scaled_dot_product_attention(negative ? -q : q, k, v, mask, 0.0, s.causal && square,
                                          std::abs(s.scale_or_default()), q.size(1) != k.size(1));
}

/// q k^T times the scale, -inf where the causal mask hides a key.
Tensor scores(const Shape& s, const Tensor& q, const Tensor& k) {
  Tensor scores = at::matmul(q, k.transpose(-1, -2)).mul_(s.scale_or_default());
  if (s.causal) {
    scores = scores.masked_fill_(~s.visible, -std::numeric_limits<double>::infinity());
  }
  return scores;
}

/// The length of all sequences, none where they differ.
std::optional<int64_t> common_length(const Tensor& lengths) {
  if (lengths.numel() == 0) return std::nullopt;
  const auto length = lengths[0].item<int64_t>();
  return lengths.eq(length).all().item<bool>() ? std::optional(length) : std::nullopt;
}

std::optional<Composition> decode(const Tensors& in, const Spec& options) {
  if (!knows(in, {"q", "k_cache", "v_cache", "lengths"}, options, {"scale"})) return std::nullopt;
  const auto length = common_length(in.at("lengths"));
  if (!length) return std::nullopt;
  const auto existing = [length = *length](const Tensors& t, const char* name) {
    return t.at(name).narrow(2, 0, length);
  };
  Spec causal = options;
  if (in.at("q").size(2) > 1) {
    const std::string text = options.str();
    causal = Spec::parse_options(text + (text.empty() ? "" : ",") + "causal=1");
  }
  const Shape s({{"q", in.at("q")}, {"k", existing(in, "k_cache")}}, causal);
  return Composition{"scaled_dot_product_attention", [=](const Tensors& t) {
                       return softmax_attention(s, t.at("q"), existing(t, "k_cache"),
                                                existing(t, "v_cache"));
                     }};
}

Composition sigmoid(const Tensors& in, const Spec& options) {
  const Shape s(in, options);
  const double bias = options.number("bias").value_or(-std::log(static_cast<double>(s.keys)));
  return {"sigmoid(q k^T * scale + bias) v", [=](const Tensors& t) {
            Tensor x = scores(s, t.at("q"), for_heads(t.at("k"), s.heads));
            if (const auto given = t.find("bias"); given != t.end()) {
              x = x.add_(given->second.to(x.scalar_type()).view({-1, 1, 1}));
            } else {
              x = x.add_(bias);
            }
            return at::matmul(x.sigmoid(), for_heads(t.at("v"), s.heads));
          }};
}

Composition parallax(const Tensors& in, const Spec& options) {
  const Shape s(in, options);
  return {"softmax(q k^T) v (1 + t) - (softmax(q k^T) * r k^T) v", [=](const Tensors& t) {
            const Tensor k = for_heads(t.at("k"), s.heads), v = for_heads(t.at("v"), s.heads);
            const Tensor weights = scores(s, t.at("q"), k).softmax(-1);
            const Tensor probed = weights * at::matmul(t.at("r"), k.transpose(-1, -2));
            return at::matmul(weights, v) * (probed.sum(-1, true) + 1) - at::matmul(probed, v);
          }};
}

Composition affine_scaled(const Tensors& in, const Spec& options) {
  const Shape s(in, options);
  return {"alpha sdpa(q, k, v) + (alpha_mean - alpha) mean(v)", [=](const Tensors& t) {
            const Tensor& v = t.at("v");
            const Tensor out = softmax_attention(s, t.at("q"), t.at("k"), v);
            Tensor mean = v.mean(2, true);
            if (s.causal) {
              const Tensor seen = at::ones({s.keys}, v.options()).cumsum(0).view({-1, 1});
              mean = (v.cumsum(2) / seen).narrow(2, s.keys - s.queries, s.queries);
            }
            const Tensor alpha = t.at("alpha").unsqueeze(-1).to(v.scalar_type());
            const Tensor alpha_mean = t.at("alpha_mean").view({-1, 1, 1}).to(v.scalar_type());
            return alpha * out + (alpha_mean - alpha) * for_heads(mean, s.heads);
          }};
}

Composition head_gated(const Tensors& in, const Spec& options) {
  const Shape s(in, options);
  return {"scaled_dot_product_attention * gates", [=](const Tensors& t) {
            const Tensor out = softmax_attention(s, t.at("q"), t.at("k"), t.at("v"));
            return out * t.at("gates").unsqueeze(-1).to(out.scalar_type());
          }};
}

Tensor merge(const Tensors& t) {
  const Tensor &a = t.at("lse_a"), &b = t.at("lse_b");
  const Tensor lse = at::logaddexp(a, b);
  const auto part = [&](const char* out, const Tensor& own) {
    return t.at(out) * (own - lse).exp().unsqueeze(-1).to(t.at(out).scalar_type());
  };
  return part("out_a", a) + part("out_b", b);
}

/// x [B,H,L,D]; one weight [D,W] for all heads or [H,D,W].
Tensor depthwise_conv(const Tensors& t) {
  const Tensor &x = t.at("x"), &weight = t.at("weight");
  const int64_t heads = weight.dim() == 3 ? x.size(1) : 1, taps = weight.size(-1);
  const Tensor channels = x.transpose(-1, -2).reshape({-1, heads * x.size(3), x.size(2)});
  std::optional<Tensor> bias;
  if (const auto given = t.find("bias"); given != t.end()) {
    bias = given->second.reshape({-1}).to(x.scalar_type());
  }
  const Tensor out = at::conv1d(at::constant_pad_nd(channels, {taps - 1, 0}),
                                weight.reshape({-1, 1, taps}).to(x.scalar_type()), bias, 1,
                                at::IntArrayRef{0}, 1, heads * x.size(3));
  return out.reshape({x.size(0), x.size(1), x.size(3), x.size(2)}).transpose(-1, -2);
}

}  // namespace

std::optional<Composition> softmax_family(std::string_view mechanism, const Tensors& in,
                                          const Spec& options) {
  const std::vector<std::string> masked = {"causal", "scale"};
  if (mechanism == "flash_attention" && knows(in, {"q", "k", "v"}, options, masked)) {
    const Shape s(in, options);
    return Composition{"scaled_dot_product_attention", [s](const Tensors& t) {
                         return softmax_attention(s, t.at("q"), t.at("k"), t.at("v"));
                       }};
  }
  if (mechanism == "decode_attention") return decode(in, options);
  if (mechanism == "sigmoid_attention" &&
      knows(in, {"q", "k", "v", "bias"}, options, {"causal", "scale", "bias"})) {
    return sigmoid(in, options);
  }
  if (mechanism == "parallax_attention" && knows(in, {"q", "r", "k", "v"}, options, masked)) {
    return parallax(in, options);
  }
  if (mechanism == "affine_scaled_attention" &&
      knows(in, {"q", "k", "v", "alpha", "alpha_mean"}, options, masked) &&
      in.at("q").size(2) <= in.at("k").size(2)) {
    return affine_scaled(in, options);
  }
  if (mechanism == "head_gated_attention" && knows(in, {"q", "k", "v", "gates"}, options, masked)) {
    return head_gated(in, options);
  }
  if (mechanism == "merge_attention") return Composition{"sums weighted by exp(lse)", merge};
  if (mechanism == "depthwise_causal_conv") return Composition{"conv1d in groups", depthwise_conv};
  return std::nullopt;
}

}  // namespace heed::peers
