// A cascade with every name resolved: split ranks merged, batch ranks filled in, functions written
// out, each term with the ranks it iterates over and the conditions its points must meet.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cascade/ast.h"
#include "cascade/functions.h"

namespace heed::cascade {

using RankSet = uint64_t;
constexpr RankSet bit(int rank) { return RankSet{1} << rank; }

/// An integer expression, linear in ranks and index functions; coefficients are made of sizes.
struct IndexNode {
  enum class Kind { number, rank, size, negate, add, subtract, multiply, call };
  Kind kind = Kind::number;
  int64_t number = 0;
  int id = -1;            // rank, size or index function
  std::vector<int> args;  // nodes of Lowered::indices
  RankSet ranks = 0;
};

struct Rank {
  std::string name;
  bool batch = false;
  int size = -1;  // the node that defines its size; -1: inputs or bindings do
  Place place;
};

struct Split {
  int parent = 0, outer = 0, inner = 0;
  int block = 0;  // node
};

struct Axis {
  int rank = -1;         // -1: an input's axis that only an index function reads
  bool running = false;  // one element longer than its rank
  int declared = -1;     // input: the node written in its declaration
  RankSet batch = 0;     // not empty: the axis may be left out
};

struct TensorInfo {
  std::string name;
  bool input = false;
  bool scalar = false;  // bound from Bindings::scalars
  bool output = false;
  bool has_default = false;
  double fallback = 0;
  int statement = -1;
  int running = -1;  // rank
  std::vector<Axis> axes;
  Place place;
};

struct Node {
  Op op = Op::constant;
  double value = 0;
  int tensor = -1;
  std::vector<int> index;  // load: one node of Lowered::indices per axis; index: one
  std::vector<int> args;   // earlier nodes of the term
  Compare compare = Compare::less;
  RankSet ranks = 0;  // of this node and all beneath it
};

struct Condition {
  int predicate = -1;     // -1: a comparison of two index expressions
  std::vector<int> args;  // nodes of Lowered::indices
  Compare compare = Compare::less;
  RankSet ranks = 0;
};

struct LoweredTerm {
  bool minus = false;
  Reduce reduce = Reduce::sum;  // never implicit
  std::vector<Node> nodes;
  int root = 0;
  RankSet ranks = 0;         // all it iterates over, the left side's included
  std::vector<int> reduced;  // in order of first appearance
  std::vector<Condition> conditions;
  Place place;
};

struct LoweredEquation {
  int tensor = -1;
  std::vector<int> index;  // one node per axis
  std::vector<int> left;   // ranks it writes, in the order of the axes
  RankSet left_set = 0;
  std::vector<LoweredTerm> terms;
  Place place;
};

struct LoweredStatement {
  LoweredEquation main;
  std::optional<LoweredEquation> initial;
  int running = -1;  // rank
};

/// Statements [first, last] run together for each value of `rank`; -1: one statement, all at once.
struct Group {
  int first = 0, last = 0;
  int rank = -1;
};

struct Callable {
  std::string name;
  int arity = 0;
};

struct Lowered {
  std::string name;
  std::vector<Rank> ranks;
  std::vector<std::string> constants;  // size i of IndexNode is rank i or constant i - ranks.size()
  std::vector<Split> splits;
  std::vector<TensorInfo> tensors;  // inputs first
  std::vector<Callable> predicates, functions;
  std::vector<IndexNode> indices;
  std::vector<LoweredStatement> statements;
  std::vector<Group> groups;

  const IndexNode& node(int id) const { return indices[static_cast<size_t>(id)]; }
  const TensorInfo& tensor(int id) const { return tensors[static_cast<size_t>(id)]; }
  const Rank& rank(int id) const { return ranks[static_cast<size_t>(id)]; }
  int find_tensor(std::string_view tensor_name) const;  // -1 if there is none
  int find_rank(std::string_view rank_name) const;
};

/// Checks the program and resolves it. Throws heed::Error with file, line and column.
std::shared_ptr<const Lowered> lower(const Ast& ast);

/// c if the node is `rank + c`, else nothing.
std::optional<int64_t> offset_from(const Lowered& lowered, int node, int rank);
/// The split if the node is `outer*block + inner`, else nullptr.
const Split* merged_split(const Lowered& lowered, int node);

}  // namespace heed::cascade
