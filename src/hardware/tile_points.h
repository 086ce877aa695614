// One equation of a cascade on one tile of a rank, point by point: operands from a watched memory, operations
// counted.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cascade/lowered.h"
#include "cascade/sizes.h"
#include "hardware/traced_memory.h"

namespace heed::hardware {

/// The rank that passes go over, and its parts.
struct Family {
  int rank = -1, outer = -1, inner = -1;  // parts: -1 where the cascade does not split it
  cascade::RankSet all = 0, whole = 0;    // whole: a loop over it visits single elements
  int64_t tile = 1, tiles = 1, size = 0;
};

class TilePoints {
 public:
  /// All must outlive this. `sizes`: of ranks; `fibre`: ranks that only for_each_fibre() moves along.
  TilePoints(const cascade::Lowered& lowered, const cascade::Bindings& bindings,
             const std::vector<int64_t>& sizes, const Family& family, cascade::RankSet fibre,
             Memory& memory);

  /// Calls body() at every place of the ranks of fibres.
  void for_each_fibre(const std::function<void()>& body) { walk(0, body); }
  /// Sums over the rank go on from the tiles before.
  void evaluate(const cascade::LoweredEquation& equation, int64_t tile);
  const PerOperation& operations() const { return operations_; }

 private:
  int64_t& at(int rank) { return index_[static_cast<size_t>(rank)]; }
  void walk(int rank, const std::function<void()>& body);
  std::pair<int64_t, int64_t> range(int rank) const;
  std::vector<int> free_ranks(const std::vector<int>& ranks) const;
  template <class Body>
  void loop(const std::vector<int>& ranks, const Body& body, size_t depth = 0);
  double combine(cascade::Reduce reduce, double a, double b);
  double reduced(const cascade::LoweredTerm& term, const std::string& own);
  bool at_point(const cascade::LoweredTerm& term, const std::string& own, double& result);
  int64_t index_value(const cascade::Affine& affine);
  const cascade::Affine& affine_at(int node);
  bool address(int tensor, const std::vector<int>& index, size_t& place);
  void add(Operation operation) { ++operations_[static_cast<size_t>(operation)]; }

  const cascade::Lowered& lowered_;
  const cascade::Bindings& bindings_;
  const std::vector<int64_t>& sizes_;
  const Family& family_;
  const cascade::RankSet fibre_;
  Memory& memory_;
  std::vector<int64_t> index_;  // by rank: where the loops stand
  int64_t tile_ = 0;
  std::map<int, cascade::Affine> affines_;
  std::vector<double> registers_;
  PerOperation operations_{};
};

}  // namespace heed::hardware
