// feature_map for PyTorch, real and fake, and the parameters that it starts from.
#include "heed/feature_map.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "torch/adapt.h"

namespace heed::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kFeatureMap = "feature_map";

FeatureKind checked_kind(const at::Tensor& x, c10::string_view kind, const MaybeTensor& weight,
                         const MaybeTensor& bias) {
  check_given({kFeatureMap, "x", x});
  check_floating({kFeatureMap, "x", x}, 4, x.device(), x.scalar_type());
  check_optional(kFeatureMap, "weight", weight, 3, x.device());
  check_optional(kFeatureMap, "bias", bias, 2, x.device());
  FeatureKind parsed{};
  guarded([&] { parsed = parse_feature_kind(std::string_view(kind.data(), kind.size())); });
  return parsed;
}

at::Tensor feature_map_cpu(const at::Tensor& x, c10::string_view kind, const MaybeTensor& weight,
                           const MaybeTensor& bias) {
  const FeatureKind parsed = checked_kind(x, kind, weight, bias);
  const MaybeTensor plain[] = {parameter_input(weight, x), parameter_input(bias, x)};
  Array out;
  guarded(
      [&] { out = feature_map(view(x), parsed, {view(plain[0]), view(plain[1])}, run_options()); });
  return take(std::move(out), x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> feature_map_backward_cpu(
    const at::Tensor& grad_out, const MaybeTensor& out, const at::Tensor& x, c10::string_view kind,
    const MaybeTensor& weight, const MaybeTensor& bias) {
  const FeatureKind parsed = checked_kind(x, kind, weight, bias);
  const at::Tensor g = gradient_input(grad_out);
  const MaybeTensor plain[] = {parameter_input(weight, x), parameter_input(bias, x)};
  FeatureMapGradients to;
  guarded([&] {
    to = feature_map_backward(view(g), view(x), parsed, {view(plain[0]), view(plain[1]), view(out)},
                              run_options());
  });
  return {take(std::move(to.x), x), take_gradient(std::move(to.weight), weight, x),
          take_gradient(std::move(to.bias), bias, x)};
}

// feature_count, for symbolic widths too.
c10::SymInt features_of(FeatureKind kind, const c10::SymInt& width) {
  if (kind == FeatureKind::taylor2) return width * width + width + 1;
  return width * feature_count(kind, 1);
}

at::Tensor feature_map_meta(const at::Tensor& x, c10::string_view kind, const MaybeTensor& weight,
                            const MaybeTensor& bias) {
  const FeatureKind parsed = checked_kind(x, kind, weight, bias);
  const bool performer = parsed == FeatureKind::performer, given = weight && weight->defined();
  TORCH_CHECK_VALUE(given || !performer, kFeatureMap,
                    ": weight is missing, performer needs a projection [H,M,D]");
  c10::SymInt width = x.sym_size(3);
  if (given) width = weight->sym_size(performer ? 1 : 2);
  return at::empty_symint({x.sym_size(0), x.sym_size(1), x.sym_size(2), features_of(parsed, width)},
                          x.options());
}

at::Tensor identity_cpu(int64_t heads, int64_t dim, int64_t width,
                        std::optional<c10::Device> device) {
  check_cpu("hedgehog_identity", device);
  Array weight;
  guarded([&] { weight = hedgehog_identity(heads, dim, width); });
  return take(std::move(weight), at::empty({0}, at::kFloat));
}

at::Tensor projection_cpu(int64_t heads, int64_t features, int64_t dim, int64_t seed,
                          bool orthogonal, std::optional<c10::Device> device) {
  check_cpu("performer_projection", device);
  Array directions;
  guarded([&] {
    directions =
        performer_projection(heads, features, dim, static_cast<uint64_t>(seed), orthogonal);
  });
  return take(std::move(directions), at::empty({0}, at::kFloat));
}

at::Tensor identity_meta(c10::SymInt heads, c10::SymInt dim, c10::SymInt width,
                         std::optional<c10::Device> /*device*/) {
  return empty_parameter({std::move(heads), std::move(dim), std::move(width)});
}

at::Tensor projection_meta(c10::SymInt heads, c10::SymInt features, c10::SymInt dim,
                           const c10::SymInt& /*seed*/, bool /*orthogonal*/,
                           std::optional<c10::Device> /*device*/) {
  return empty_parameter({std::move(heads), std::move(features), std::move(dim)});
}

}  // namespace
}  // namespace heed::ops

TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("feature_map", &heed::ops::feature_map_cpu);
  m.impl("feature_map_backward", &heed::ops::feature_map_backward_cpu);
}

TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("feature_map", &heed::ops::feature_map_meta);
  m.impl("hedgehog_identity", &heed::ops::identity_meta);
  m.impl("performer_projection", &heed::ops::projection_meta);
}

// No argument is a tensor, so no device chooses the kernel.
TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  m.impl("hedgehog_identity", &heed::ops::identity_cpu);
  m.impl("performer_projection", &heed::ops::projection_cpu);
}
