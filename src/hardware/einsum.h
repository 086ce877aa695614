// A cascade as the machine sees it: statements with the ranks they run over, the operations they do
// there and the tensors they touch. Everything comes from src/cascade; no number is typed in here.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cascade/cascade.h"
#include "hardware/machine.h"

namespace heed::hardware {

/// Names of ranks, sorted. Both parts of a split rank together are their parent.
using Ranks = std::vector<std::string>;
using Sizes = std::map<std::string, int64_t>;

bool contains(const Ranks& ranks, const std::string& rank);
/// The product of the sizes; throws heed::Error naming a rank without one.
double product(const Ranks& ranks, const Sizes& sizes);

struct TensorFacts {
  Ranks ranks;
  bool input = false, output = false;
  bool running = false;  // one element longer along its running rank
};

/// A read of a tensor with the ranks that its indices name.
struct Operand {
  std::string tensor;
  Ranks ranks;
};

struct Einsum {
  std::string tensor;  // what it defines
  Ranks ranks;         // what it runs over
  std::vector<Operand> reads;
  cascade::StatementCount count;
};

struct EinsumCascade {
  std::string name;
  std::vector<Einsum> einsums;
  std::map<std::string, TensorFacts> tensors;
  std::map<std::string, Ranks> families;  // rank -> itself and its parts
  /// Does a set of ranks hold the rank or a part of it?
  bool holds(const Ranks& ranks, const std::string& rank) const;
  const Einsum& einsum(const std::string& tensor) const;
};

EinsumCascade to_einsums(const cascade::Program& program);

/// Operations by kind at these sizes; terms that run over both parts of `mask` only in the share
/// that the mask leaves.
PerOperation operations(const EinsumCascade& cascade, const Einsum& einsum, const Sizes& sizes,
                        double visited_share = 1, const std::string& query = "p",
                        const std::string& key = "m");

/// Cycles of one processing element doing all of these, one kind after the other or, where the kinds
/// overlap in a pipeline, as many as the slowest kind needs. Throws heed::Error naming the operation
/// that the array lacks.
double element_cycles(const ProcessingArray& array, const PerOperation& operations, bool overlapped,
                      const std::string& what);
bool can_run(const ProcessingArray& array, const PerOperation& operations);

}  // namespace heed::hardware
