// The names of a cascade: declarations checked and numbered, index expressions and references
// resolved.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cascade/lexer.h"
#include "cascade/lowered.h"

namespace heed::cascade {

class Names {
 public:
  /// Declares everything but the tensors that statements define.
  Names(const Ast& ast, Lowered& lowered);

  [[noreturn]] void error(Place place, std::string_view message) const;

  int rank(std::string_view name) const;  // -1 if it is none
  int tensor(std::string_view name) const;
  /// Adds a defined tensor; its axes may still change.
  int add_tensor(TensorInfo info);

  /// Ranks in `visible` are loops of the statement: a rank outside it whose two parts are inside is
  /// replaced by them.
  int index(int ast_index, RankSet visible) const;
  int rank_node(int rank, RankSet visible) const;
  /// The node of a rank or a size, or -1.
  int value_node(std::string_view name, RankSet visible) const;

  struct Match {
    std::vector<int> index;  // one node per axis
    bool left_out = false;   // batch indices were filled in
    RankSet ranks = 0;
  };
  /// Nothing if the number of indices fits the tensor in neither form.
  std::optional<Match> match(const TensorInfo& tensor, const std::vector<int>& written,
                             RankSet visible) const;
  std::string axes_text(const TensorInfo& tensor) const;  // "[b,h,p]"
  std::string index_text(int node) const;
  std::string rank_list() const;

  int node(IndexNode node) const;

 private:
  void declare(const std::string& name, Place place, const char* what);
  void ranks();
  void sizes_and_splits();
  int split_rank(const std::string& name, Place place, const Rank& parent);
  void inputs();
  void predicates();
  int size(std::string_view name) const;
  int constant(const std::string& name);
  void functions();
  int function(const Index& call) const;
  bool made_of_sizes(int node) const;
  bool match_axes(const TensorInfo& tensor, const std::vector<int>& written, bool leave_out,
                  RankSet visible, Match& match) const;
  int plain_rank(int ast_index) const;

  const Ast& ast_;
  Lowered& lowered_;
  std::map<std::string, std::string> kinds_;  // name -> "rank", "tensor", ...
  std::map<std::string, int, std::less<>> rank_ids_, tensor_ids_, constant_ids_;
};

}  // namespace heed::cascade
