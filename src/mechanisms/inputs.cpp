// Inputs of example cases, reproducible on any machine from a seed.
#include <cmath>
#include <cstring>
#include <numbers>

#include "base/philox.h"
#include "heed/error.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

// Two standard normal numbers of one Philox block (Box-Muller).
std::array<double, 2> normal_pair(uint64_t seed, uint32_t stream, uint64_t block) {
  const auto words =
      philox(seed, {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0});
  const double uniform = (words[0] + 0.5) * 0x1p-32;  // never 0
  const double angle = 2 * std::numbers::pi * (words[1] * 0x1p-32);
  const double radius = std::sqrt(-2 * std::log(uniform));
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

Array normal_array(DType dtype, const Dims& shape, uint64_t seed, uint32_t stream) {
  Array wide(DType::f64, shape);
  double* values = wide.as<double>();
  for (int64_t i = 0; i < wide.count(); i += 2) {
    const auto pair = normal_pair(seed, stream, static_cast<uint64_t>(i / 2));
    values[i] = pair[0];
    if (i + 1 < wide.count()) values[i + 1] = pair[1];
  }
  return dtype == DType::f64 ? std::move(wide) : convert(wide, dtype);
}

// A type of its own stays what the record says, except that float32 parameters and statistics
// are float64 in a float64 call, as everywhere in the library.
DType type_of(const ExampleCase& example, const std::string& input, DType dtype) {
  const auto own = example.types.find(input);
  if (own == example.types.end()) return dtype;
  if (own->second == DType::f32 && dtype == DType::f64) return DType::f64;
  return own->second;
}

double element(const Tensor& tensor, int64_t offset) {
  switch (tensor.dtype()) {
    case DType::f64:
      return tensor.as<double>()[offset];
    case DType::f32:
      return tensor.as<float>()[offset];
    case DType::bf16:
      return to_float(tensor.as<bfloat16>()[offset]);
    case DType::f16:
      return to_float(tensor.as<float16>()[offset]);
    case DType::i64:
      return static_cast<double>(tensor.as<int64_t>()[offset]);
    case DType::i32:
      return tensor.as<int32_t>()[offset];
    case DType::boolean:
      return tensor.as<uint8_t>()[offset] != 0 ? 1 : 0;
  }
  return 0;
}

}  // namespace

NamedArrays make_inputs(const Mechanism& mechanism, const ExampleCase& example, DType dtype,
                        uint64_t seed) {
  if (!is_floating(dtype)) {
    throw Error(mechanism.name + ": inputs of type " + name_of(dtype) +
                " were asked for, a floating type is needed");
  }
  NamedArrays arrays;
  uint32_t stream = 0;
  for (const auto& [name, shape] : example.inputs) {
    const DType type = type_of(example, name, dtype);
    Array array =
        is_floating(type) ? normal_array(type, shape, seed, stream) : Array::zeros(type, shape);
    if (mechanism.fill) mechanism.fill(example, name, seed, array);
    arrays.emplace(name, std::move(array));
    ++stream;
  }
  return arrays;
}

NamedTensors views(const NamedArrays& arrays) {
  NamedTensors tensors;
  for (const auto& [name, array] : arrays) tensors.emplace(name, array.view());
  return tensors;
}

Tensor input_or_none(const NamedTensors& in, const std::string& name) {
  const auto found = in.find(name);
  return found == in.end() ? Tensor() : found->second;
}

cascade::NdArray to_nd(const Tensor& tensor) {
  cascade::NdArray out;
  const auto shape = tensor.shape().span();
  out.shape.assign(shape.begin(), shape.end());
  const int64_t count = tensor.count();
  out.values.reserve(static_cast<size_t>(count));
  std::array<int64_t, kMaxRank> index{};
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    out.values.push_back(element(tensor, offset));
    for (int axis = tensor.rank() - 1; axis >= 0; --axis) {
      const auto at = static_cast<size_t>(axis);
      offset += tensor.stride(axis);
      if (++index[at] < tensor.size(axis)) break;
      offset -= index[at] * tensor.stride(axis);
      index[at] = 0;
    }
  }
  return out;
}

}  // namespace heed
