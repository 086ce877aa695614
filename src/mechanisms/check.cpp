#include "mechanisms/check.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>

#include "base/philox.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed {
namespace {

using cascade::NdArray;
using cascade::Values;

constexpr int kPerturbations = 3;

double unit_roundoff(DType type) {
  switch (type) {
    case DType::f64:
      return 0x1p-53;
    case DType::f32:
      return 0x1p-24;
    case DType::bf16:
      return 0x1p-8;
    case DType::f16:
      return 0x1p-11;
    default:
      return 0;
  }
}

double perturbation_step(DType dtype) {
  if (is_half(dtype)) return unit_roundoff(dtype);
  return (dtype == DType::f64 ? 64 : 16) * unit_roundoff(dtype);
}

// Half the distance between the smallest numbers of a type.
double least_error(DType type) { return type == DType::f16 ? 0x1p-24 : 0; }

double largest_finite(DType type) {
  switch (type) {
    case DType::f16:
      return 65504;
    case DType::bf16:
      return 0x1.fep127;
    case DType::f32:
      return std::numeric_limits<float>::max();
    default:
      return std::numeric_limits<double>::max();
  }
}

double largest(const NdArray& array) {
  double most = 0;
  for (double x : array.values) {
    if (std::isfinite(x)) most = std::max(most, std::abs(x));
  }
  return most;
}

double largest_change(const NdArray& a, const NdArray& b) {
  double most = 0;
  for (size_t i = 0; i < a.values.size(); ++i) {
    const double change = std::abs(a.values[i] - b.values[i]);
    if (std::isfinite(change)) most = std::max(most, change);
  }
  return most;
}

// Float64 copies of the floating inputs, each element times 1 + step or 1 - step.
NamedArrays perturbed(const NamedArrays& inputs, double step, uint64_t seed) {
  NamedArrays out;
  for (const auto& [name, array] : inputs) {
    if (!is_floating(array.dtype())) continue;
    Array wide = convert(array, DType::f64);
    for (int64_t i = 0; i < wide.count(); ++i) {
      const bool up = (philox_word(seed, static_cast<uint64_t>(i)) & 1) != 0;
      wide.as<double>()[i] *= up ? 1 + step : 1 - step;
    }
    out.emplace(name, std::move(wide));
    ++seed;
  }
  return out;
}

NamedTensors overlaid(const NamedArrays& inputs, const NamedArrays& replaced) {
  NamedTensors tensors = views(inputs);
  for (const auto& [name, array] : replaced) tensors[name] = array.view();
  return tensors;
}

bool same_letters(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char x, unsigned char y) {
    return std::tolower(x) == std::tolower(y);
  });
}

// Gradients of random projections of the outputs, rounded to the type the results have.
NamedArrays make_output_gradients(const Reference& reference) {
  ExampleCase gradients{.name = "output gradients", .inputs = {}, .options = ""};
  for (const auto& [result, output] : reference.mechanism->outputs) {
    const auto& shape = reference.outputs.at(output).shape;
    gradients.inputs.emplace_back(result, Dims(std::span<const int64_t>(shape)));
    if (result != "out") gradients.types[result] = DType::f32;  // statistics are float32
  }
  constexpr uint64_t kOtherNumbers = 0x9E3779B97F4A7C15;
  NamedArrays arrays =
      make_inputs(Mechanism{}, gradients, reference.dtype, reference.seed ^ kOtherNumbers);
  for (const std::string& result : reference.mechanism->without_gradient) {
    Array& array = arrays.at(result);
    array = Array::zeros(array.dtype(), array.shape());
  }
  return arrays;
}

struct Evaluated {
  Values outputs, gradients;
};

Evaluated evaluate_definition(const Reference& reference, const cascade::Program& program,
                              const NamedTensors& in) {
  const Spec options = Spec::parse_options(reference.example->options);
  const cascade::Bindings bindings = reference.mechanism->bind(in, options);
  Evaluated values{cascade::evaluate(program, bindings), {}};
  if (!reference.output_gradients.empty()) {
    Values seeds;
    for (const auto& [result, output] : reference.mechanism->outputs) {
      seeds[output] = to_nd(reference.output_gradients.at(result));
    }
    values.gradients = cascade::gradient(program, bindings, seeds);
  }
  return values;
}

std::string replay_command(const Reference& reference, Isa isa, Layout layout) {
  return "heed check " + reference.mechanism->name + " --case " + reference.example->name +
         " --dtype " + name_of(reference.dtype) + " --isa " + name_of(isa) + " --layout " +
         name_of(layout) + " --seed " + std::to_string(reference.seed);
}

CheckRow row_for(const Mechanism& mechanism, const ExampleCase& example) {
  CheckRow row;
  row.mechanism = mechanism.name;
  row.example = example.name;
  return row;
}

void check_forward(const Reference& reference, const NamedTensors& in, const RunOptions& run,
                   const CheckRow& base, std::vector<CheckRow>& rows) {
  const Mechanism& mechanism = *reference.mechanism;
  NamedArrays results;
  std::string failure;
  try {
    results = mechanism.forward(in, Spec::parse_options(reference.example->options), run);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  for (const auto& [result, output] : mechanism.outputs) {
    CheckRow& row = rows.emplace_back(base);
    row.result = result;
    row.failure = failure;
    const auto found = results.find(result);
    if (found == results.end()) {
      if (failure.empty()) row.failure = "the kernel returned no '" + result + "'";
      continue;
    }
    const NdArray& want = reference.outputs.at(output);
    row.difference = compare(to_nd(found->second), want,
                             allowed_error(reference.dtype, found->second.dtype(),
                                           reference.sensitivity.at(output), want));
  }
}

// What is left of a gradient that vanishes: the rounding of the terms that cancel, which are as large as
// the gradients that come in.
double rounding_of_gradients(const Reference& reference) {
  double most = 0;
  for (const auto& [name, gradient] : reference.output_gradients) {
    most = std::max(most, largest(to_nd(gradient)));
  }
  return perturbation_step(reference.dtype == DType::f64 ? DType::f64 : DType::f32) * most;
}

void check_backward(const Reference& reference, const NamedTensors& in, const RunOptions& run,
                    const CheckRow& base, std::vector<CheckRow>& rows) {
  const Mechanism& mechanism = *reference.mechanism;
  NamedArrays results;
  std::string failure;
  try {
    results = mechanism.backward(in, views(reference.output_gradients),
                                 Spec::parse_options(reference.example->options), run);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  for (const auto& [name, input] : in) {
    if (!is_floating(input.dtype())) continue;
    const auto want =
        std::find_if(reference.gradients.begin(), reference.gradients.end(),
                     [&name = name](const auto& entry) { return same_letters(entry.first, name); });
    if (want == reference.gradients.end()) continue;  // an input the definition does not read
    CheckRow& row = rows.emplace_back(base);
    row.result = "grad " + name;
    row.failure = failure;
    const auto found = results.find(name);
    if (found == results.end()) {
      if (failure.empty()) row.failure = "the kernel returned no gradient of '" + name + "'";
      continue;
    }
    Bound bound = allowed_error(reference.dtype, found->second.dtype(),
                                reference.sensitivity.at("grad " + want->first), want->second);
    bound.absolute += rounding_of_gradients(reference);
    row.difference = compare(to_nd(found->second), want->second, bound);
  }
}

// A view of `shape` into wider storage, or into storage with its axes in another order.
void arrange_input(const std::string& name, const Array& array, Layout layout, Arranged& out) {
  const Dims& shape = array.shape();
  const int rank = shape.rank();
  if (layout == Layout::tokens_first && rank == 4) {
    Array storage(array.dtype(), {shape[0], shape[2], shape[1], shape[3]});
    const Dims s = storage.view().strides();
    const Tensor view(storage.view().data(), array.dtype(), shape, {s[0], s[2], s[1], s[3]});
    copy(array, view);
    out.tensors.emplace(name, view);
    out.storage.emplace(name, std::move(storage));
    return;
  }
  constexpr int64_t kGap = 3;  // elements: rows lose every alignment
  Dims wider = shape;
  if (layout == Layout::padded && rank >= 2) wider[rank - 1] += kGap;
  Array nan(DType::f64, wider);
  std::fill_n(nan.as<double>(), nan.count(), std::numeric_limits<double>::quiet_NaN());
  Array storage = convert(nan, array.dtype());
  const Tensor view = rank == 0 ? storage.view() : storage.view().slice(rank - 1, 0, shape.back());
  copy(array, view);
  out.tensors.emplace(name, view);
  out.storage.emplace(name, std::move(storage));
}

}  // namespace

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::contiguous:
      return "contiguous";
    case Layout::tokens_first:
      return "tokens_first";
    case Layout::padded:
      return "padded";
  }
  return "?";
}

Layout parse_layout(std::string_view name) {
  std::vector<std::string> names;
  for (Layout layout : kLayouts) {
    if (name == name_of(layout)) return layout;
    names.emplace_back(name_of(layout));
  }
  throw Error("unknown layout '" + std::string(name) + "'" + did_you_mean(name, names) +
              "; known: " + joined(names));
}

Arranged arrange(const NamedArrays& inputs, Layout layout) {
  Arranged out;
  for (const auto& [name, array] : inputs) {
    if (is_floating(array.dtype()) && layout != Layout::contiguous) {
      arrange_input(name, array, layout, out);
    } else {
      out.tensors.emplace(name, array.view());
    }
  }
  return out;
}

Bound allowed_error(DType dtype, DType result, double sensitivity, const NdArray& want) {
  return {
      .relative = unit_roundoff(result),
      .absolute = 3 * sensitivity + perturbation_step(dtype) * largest(want) + least_error(result),
      .largest = largest_finite(result)};
}

Reference make_reference(const Mechanism& mechanism, const ExampleCase& example, DType dtype,
                         uint64_t seed, bool gradients) {
  Reference reference{.mechanism = &mechanism,
                      .example = &example,
                      .dtype = dtype,
                      .seed = seed,
                      .inputs = make_inputs(mechanism, example, dtype, seed),
                      .output_gradients = {},
                      .outputs = {},
                      .gradients = {},
                      .sensitivity = {}};
  const CascadeText& definition = definition_of(mechanism, example);
  const cascade::Program program = cascade::parse(definition.text, definition.name);
  reference.outputs = evaluate_definition(reference, program, views(reference.inputs)).outputs;
  if (mechanism.backward && gradients) {
    reference.output_gradients = make_output_gradients(reference);
    reference.gradients =
        evaluate_definition(reference, program, views(reference.inputs)).gradients;
  }
  for (int i = 0; i < kPerturbations; ++i) {
    const NamedArrays moved = perturbed(reference.inputs, perturbation_step(dtype),
                                        seed + 1000 * static_cast<uint64_t>(i + 1));
    const Evaluated values =
        evaluate_definition(reference, program, overlaid(reference.inputs, moved));
    for (const auto& [name, array] : values.outputs) {
      double& most = reference.sensitivity[name];
      most = std::max(most, largest_change(array, reference.outputs.at(name)));
    }
    for (const auto& [name, array] : values.gradients) {
      double& most = reference.sensitivity["grad " + name];
      most = std::max(most, largest_change(array, reference.gradients.at(name)));
    }
  }
  return reference;
}

std::vector<CheckRow> check_kernel(const Reference& reference, Isa isa, Layout layout) {
  CheckRow base = row_for(*reference.mechanism, *reference.example);
  base.type = name_of(reference.dtype);
  base.path = name_of(isa);
  base.layout = name_of(layout);
  base.replay = replay_command(reference, isa, layout);
  const Arranged arranged = arrange(reference.inputs, layout);
  RunOptions run;
  run.isa = isa;
  std::vector<CheckRow> rows;
  check_forward(reference, arranged.tensors, run, base, rows);
  if (!reference.output_gradients.empty())
    check_backward(reference, arranged.tensors, run, base, rows);
  return rows;
}

std::vector<CheckRow> check_cascades(const Mechanism& mechanism, const ExampleCase& example,
                                     uint64_t seed) {
  constexpr double kAgreement = 1e-12;
  if (!example.definition.empty()) return {};  // the others leave out what this case is about
  const NamedArrays inputs = make_inputs(mechanism, example, DType::f64, seed);
  const Spec options = Spec::parse_options(example.options);
  const cascade::Bindings bindings = mechanism.bind(views(inputs), options);
  const std::vector<const CascadeText*> texts = cascades_for(mechanism, options);
  const auto run = [&](const CascadeText& text) {
    return cascade::evaluate(cascade::parse(text.text, text.name), bindings);
  };
  const Values definition = run(*texts.front());
  std::vector<CheckRow> rows;
  for (size_t i = 1; i < texts.size(); ++i) {
    CheckRow base = row_for(mechanism, example);
    base.type = "float64";
    base.path = "cascade " + texts[i]->name;
    base.replay = "heed check " + mechanism.name + " --case " + example.name + " --seed " +
                  std::to_string(seed);
    const Values other = run(*texts[i]);
    for (const auto& [result, output] : mechanism.outputs) {
      CheckRow& row = rows.emplace_back(base);
      row.result = result;
      const auto found = other.find(output);
      if (found == other.end()) {
        row.failure = "the cascade has no output '" + output + "'";
        continue;
      }
      const NdArray& want = definition.at(output);
      row.difference =
          compare(found->second, want, {.relative = 0, .absolute = kAgreement * largest(want)});
    }
  }
  return rows;
}

}  // namespace heed
