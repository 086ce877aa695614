// Timing, and what a call costs by its cascade.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "mechanisms/registry.h"

namespace heed::cli {

using Samples = std::vector<double>;  // milliseconds

/// Runs the calls in turn, once for warming up and then at least five times and until `seconds`
/// have gone by; the i-th samples of two calls are neighbours in time.
std::vector<Samples> time_calls(const std::vector<std::function<void()>>& calls, double seconds);

/// Linear interpolation between the samples; NaN for none.
double quantile(Samples samples, double fraction);

/// "g++ 12.2.0"
std::string compiler_name();

/// 2 x the multiply-adds of this call by its definition or, where that does fewer, by a form it is
/// computed in (running sums); terms over the ranks of a mask only for the pairs that the mask keeps, of
/// closed gates and absent layers nothing.
double visible_operations(const Mechanism& mechanism, const NamedTensors& in, const Spec& options);

/// The shape of the first of these inputs that the case has; nullptr for none.
const Dims* input_shape(const ExampleCase& example, std::initializer_list<const char*> names);

/// A call like the case, small enough for float64: the record's own, else with one sequence, one group of
/// heads and at most 64 queries and 96 keys.
ExampleCase twin_of(const Mechanism& mechanism, const ExampleCase& example);

}  // namespace heed::cli
