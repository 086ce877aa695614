// Feature maps of linear attention: phi with phi(q) . phi(k) in the place of exp(q . k).
// Hedgehog, arXiv 2402.04347; Taylor features, arXiv 2507.23632; positive random features of the
// Performer, arXiv 2009.14794; elu + 1, arXiv 2006.16236.
//
//   z = x W[h] + b[h]              [D'], z = x without a weight
//   out = phi(z)                   [F]
//
//   kind              phi(z)                                                        F
//   elu1              z + 1 where z > 0, else exp(z)                                D'
//   relu              max(z, 0)                                                     D'
//   exp               exp(z)                                                        D'
//   hedgehog_exp      [exp(z), exp(-z)]                                             2D'
//   hedgehog_softmax  [softmax(z), softmax(-z)]                                     2D'
//   hedgehog_exp_max  [exp(z - max z), exp(-z + min z)]                             2D'
//   hedgehog_joint    softmax([2z, -2z])                                            2D'
//   taylor2           [1, y, y_1 y_1, y_1 y_2, .., y_D' y_D'], y = z / D'^(1/4),
//                     the products over sqrt(2)                                     1 + D' + D'^2
//   performer         exp(w_r . y - |y|^2 / 2) / sqrt(M), y = x / D^(1/4)           M
//
// The four hedgehog kinds are different functions: a model trained with one is wrong with another. exp,
// hedgehog_exp and performer overflow where their exponent does (88 in float32, 11 in float16); the
// other hedgehog kinds never do, and are not below 1e-12 (float16: 6e-8).
//
// x [B,H,L,D]  out [B,H,L,F]  weight [H,D,D'] (performer: [H,M,D])  bias [H,D']
// D from 1 to 256; any strides with a unit stride in the last dimension. float64, float32, bfloat16,
// float16; out has x's type; weight and bias have x's type or float32 (float64 beside float64).
// Computed in float32 (float64 for float64). A NaN in a row of x makes that row NaN.
// Gradients: x, weight, bias; at ties of max z and min z the first one gets it all, below the floor 0.
#pragma once
#include <cstdint>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

enum class FeatureKind {
  elu1,
  relu,
  exp,
  hedgehog_exp,
  hedgehog_softmax,
  hedgehog_exp_max,
  hedgehog_joint,
  taylor2,
  performer,
};
inline constexpr FeatureKind kFeatureKinds[] = {FeatureKind::elu1,
                                                FeatureKind::relu,
                                                FeatureKind::exp,
                                                FeatureKind::hedgehog_exp,
                                                FeatureKind::hedgehog_softmax,
                                                FeatureKind::hedgehog_exp_max,
                                                FeatureKind::hedgehog_joint,
                                                FeatureKind::taylor2,
                                                FeatureKind::performer};

const char* name_of(FeatureKind kind);
FeatureKind parse_feature_kind(std::string_view name);  // throws Error listing the names
/// F of the table: `width` is D', for performer M. Throws Error where F does not fit into 2^31.
int64_t feature_count(FeatureKind kind, int64_t width);

struct FeatureMapOptions {
  Tensor weight = {};  // undefined: the identity; performer needs one
  Tensor bias = {};    // undefined: none; performer takes none
  /// Of the backward: the features that its forward gave. They spare it the map where they have enough
  /// digits: not beside wider parameters, for instance. Undefined: they are made again.
  Tensor forward_features = {};
};

Array feature_map(const Tensor& x, FeatureKind kind, const FeatureMapOptions& options = {},
                  const RunOptions& run = {});
void feature_map(const Tensor& x, FeatureKind kind, const Tensor& out,
                 const FeatureMapOptions& options = {}, const RunOptions& run = {});

/// Each in the shape and type of what it belongs to; undefined where there is no weight or bias.
struct FeatureMapGradients {
  Array x, weight, bias;
};
/// `grad_out` [B,H,L,F] has x's type. Same bits for the same number of threads.
FeatureMapGradients feature_map_backward(const Tensor& grad_out, const Tensor& x, FeatureKind kind,
                                         const FeatureMapOptions& options = {},
                                         const RunOptions& run = {});
/// Into caller memory; what is undefined is not computed.
struct FeatureMapGradientViews {
  Tensor x = {}, weight = {}, bias = {};
};
void feature_map_backward(const Tensor& grad_out, const Tensor& x, FeatureKind kind,
                          const FeatureMapOptions& options,
                          const FeatureMapGradientViews& gradients, const RunOptions& run = {});

/// The initialisation of Hedgehog's maps: the identity for every head, float32 [H,D,D'] (its first
/// columns, or zeros behind it, where D' differs). The bias starts at zero.
Array hedgehog_identity(int64_t heads, int64_t dim, int64_t width);

/// Random directions of the Performer, float32 [H,M,D], standard normal, from a seed: the same numbers
/// on any machine. `orthogonal`: blocks of D directions that are orthogonal to each other, with the
/// lengths of independent normal vectors; it lowers the variance of the estimate.
Array performer_projection(int64_t heads, int64_t features, int64_t dim, uint64_t seed,
                           bool orthogonal = true);

}  // namespace heed
