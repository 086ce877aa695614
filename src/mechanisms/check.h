// Kernels against cascades: what the conformance tests and `heed check` run.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "mechanisms/compare.h"
#include "mechanisms/registry.h"

namespace heed {

/// How the inputs of a call lie in memory.
enum class Layout {
  contiguous,
  tokens_first,  // rank-4 inputs are [B,L,H,D] in memory
  padded,        // rows of inputs are 3 elements apart, NaN between them
};
inline constexpr Layout kLayouts[] = {Layout::contiguous, Layout::tokens_first, Layout::padded};
const char* name_of(Layout layout);
Layout parse_layout(std::string_view name);  // throws Error listing the names

/// Inputs rearranged in memory; the views have the shapes of the originals.
struct Arranged {
  NamedArrays storage;
  NamedTensors tensors;
};
Arranged arrange(const NamedArrays& inputs, Layout layout);

/// A case in one type with what the definition (the first cascade) says about it in float64.
struct Reference {
  const Mechanism* mechanism = nullptr;
  const ExampleCase* example = nullptr;
  DType dtype = DType::f32;
  uint64_t seed = 0;
  NamedArrays inputs;
  NamedArrays output_gradients;               // empty where no gradients are checked
  cascade::Values outputs, gradients;         // by cascade name
  std::map<std::string, double> sensitivity;  // by cascade name; see allowed_error
};
/// Gradients are left out where the mechanism has none and, in a fraction of the time, where they are
/// not wanted.
Reference make_reference(const Mechanism& mechanism, const ExampleCase& example, DType dtype,
                         uint64_t seed, bool gradients = true);

/// The bound of all checks, for a result of type `result` of a call whose inputs have type `dtype`:
///
///   |got - want| <= u(result) |want| + 3 R + s max|want| + e      u: unit roundoff of a type
///
/// The first term is the rounding of the result itself. R is the largest change of the result, over
/// all its elements, when the definition's floating inputs are multiplied by 1 + s or 1 - s at
/// random: what rounding the weights once more (s = u for 16-bit types) or summing in another order
/// (s = 16 u for float32; 64 u for float64, where the definition is rounded like the kernel) may do
/// to it. The third term lets values that cancelled keep the error of what they were made of. e is
/// the step of float16 near 0; gradients add s times the largest gradient that comes in.
Bound allowed_error(DType dtype, DType result, double sensitivity, const cascade::NdArray& want);

/// One line of the table: a result of a kernel, or a further cascade against the definition.
struct CheckRow {
  std::string mechanism, example, result;  // "flash_attention", "causal_gqa", "out" or "grad q"
  std::string type, path, layout;          // "bfloat16", "amx", "padded"
  Difference difference;
  std::string failure;  // the exception, if there was one
  std::string replay;   // the command that repeats this line
  bool ok() const { return failure.empty() && difference.ok(); }
};

/// Forward, and backward where the reference has gradients, on one instruction set and layout.
std::vector<CheckRow> check_kernel(const Reference& reference, Isa isa, Layout layout);

/// Every further cascade of the record against the definition, in float64, to 1e-12 of the largest
/// value; every output they share, and no output of the record may be missing.
std::vector<CheckRow> check_cascades(const Mechanism& mechanism, const ExampleCase& example,
                                     uint64_t seed);

}  // namespace heed
