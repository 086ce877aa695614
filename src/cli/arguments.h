// Arguments that several commands read the same way.
#pragma once
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heed/error.h"
#include "mechanisms/registry.h"

namespace CLI {
class App;
class Validator;
}  // namespace CLI

namespace heed::cli {

/// What `read` gives; its Error under the option's name.
template <class Read>
auto reading(std::string_view option, const Read& read) {
  try {
    return read();
  } catch (const Error& error) {
    throw Error(std::string(option) + ": " + error.what());
  }
}

/// "B,H,L,D", or as many positive numbers as a mechanism's inputs have; throws Error naming `option`.
Dims parse_shape(std::string_view option, std::string_view text);
/// Long and short names: float32 or f32; throws Error naming --dtype and the nearest.
DType parse_dtype(std::string_view text);
/// The transform of options that count: refuses what is no whole number, in decimal, from `least` to
/// `most`, which the option's type has to hold.
CLI::Validator whole_number(uint64_t least, uint64_t most = std::numeric_limits<int64_t>::max());
/// For none those of HEED_ISA, or all; throws Error where this machine cannot run the one asked for.
std::vector<Isa> isas_to_use(const std::string& text);
/// --threads, which use_threads applies where it was given.
void add_threads(CLI::App& command, std::optional<int>& threads, const char* help);
void use_threads(const std::optional<int>& threads);

/// The mechanisms a command works on: the named one, or all for an empty name.
std::vector<const Mechanism*> chosen_mechanisms(const std::string& name);

/// Shapes given on the command line; what is missing follows from q.
struct ShapeArguments {
  std::optional<Dims> q, k, v;
};
/// A case like `like` for other shapes: q, k and v as given, every other input resized with them. Throws
/// Error where its queries have another number of axes.
ExampleCase with_shapes(const ExampleCase& like, const ShapeArguments& shapes);

/// Views of the shapes and types of a case, for questions that read no element.
NamedTensors shapes_only(const ExampleCase& example, DType dtype);

/// "causal=1" added to options that lack it.
std::string with_option(const std::string& options, const std::string& key,
                        const std::string& value);

}  // namespace heed::cli
