// Slopes of published models and papers: sheets 05 (section 3) and 06 (section 3.5).
#include <cmath>
#include <string>
#include <vector>

#include "engine/operands.h"
#include "heed/lightning_attention.h"

namespace heed {

namespace {

constexpr const char* kOp = "lightning_slopes";

// 2^(-8 i / m), i = 1..m, for a power of two m; other head counts take every second slope of twice the
// power below them for the rest (ALiBi, arXiv 2108.12409).
std::vector<double> alibi(int64_t heads) {
  int64_t power = 1;
  while (2 * power <= heads) power *= 2;
  std::vector<double> slopes;
  for (int64_t i = 1; i <= power; ++i) {
    slopes.push_back(std::exp2(-8.0 * static_cast<double>(i) / static_cast<double>(power)));
  }
  for (int64_t i = 1; static_cast<int64_t>(slopes.size()) < heads; i += 2) {
    slopes.push_back(std::exp2(-8.0 * static_cast<double>(i) / static_cast<double>(2 * power)));
  }
  return slopes;
}

double layer_factor(LightningSlopes form, int64_t layer, int64_t layers) {
  const bool from_one = form == LightningSlopes::paper;
  const int64_t first = from_one ? 1 : 0, last = from_one ? layers : layers - 1;
  const int64_t fewest = form == LightningSlopes::code ? 2 : 1;
  if (layers < fewest) {
    fail(kOp, "num_layers is " + std::to_string(layers),
         "at least " + std::to_string(fewest) + " is needed in this form");
  }
  if (layer < first || layer > last) {
    fail(kOp, "layer is " + std::to_string(layer),
         std::to_string(first) + " to " + std::to_string(last) +
             " is needed in this form with num_layers " + std::to_string(layers));
  }
  const auto l = static_cast<double>(layer);
  if (form != LightningSlopes::code) return 1 - l / static_cast<double>(layers);
  // The last layer is left almost without decay, but not at 0.
  return 1 - l / static_cast<double>(layers - 1) + 1e-5;
}

}  // namespace

LightningSlopes parse_lightning_slopes(std::string_view name) {
  if (name == "code") return LightningSlopes::code;
  if (name == "paper") return LightningSlopes::paper;
  if (name == "fla") return LightningSlopes::fla;
  fail(kOp, "form is '" + std::string(name) + "'", "'code', 'paper' or 'fla' is needed");
}

Array lightning_slopes(int64_t heads, std::optional<int64_t> layer,
                       std::optional<int64_t> num_layers, LightningSlopes form) {
  if (heads < 1 || heads > (int64_t{1} << 20)) {
    fail(kOp, "num_heads is " + std::to_string(heads), "1 to 1048576 is needed");
  }
  if (layer.has_value() != num_layers.has_value()) {
    fail(kOp, layer ? "layer is given without num_layers" : "num_layers is given without layer",
         "give both or neither");
  }
  const double factor = layer ? layer_factor(form, *layer, *num_layers) : 1;
  std::vector<double> slopes;
  if (form == LightningSlopes::code) {
    slopes = alibi(heads);
  } else {
    const int64_t first = form == LightningSlopes::paper ? 1 : 0;
    for (int64_t h = 0; h < heads; ++h) {
      slopes.push_back(8.0 * static_cast<double>(h + first) / static_cast<double>(heads));
    }
  }
  Array result(DType::f32, {heads});
  for (int64_t h = 0; h < heads; ++h) {
    result.as<float>()[h] = static_cast<float>(slopes[static_cast<size_t>(h)] * factor);
  }
  return result;
}

}  // namespace heed
