#include "cascade/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <set>

namespace heed::cascade {
namespace {

std::string upper(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return result;
}

template <class Map>
int find(const Map& map, std::string_view name) {
  const auto it = map.find(name);
  return it == map.end() ? -1 : it->second;
}

}  // namespace

int Lowered::find_tensor(std::string_view tensor_name) const {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].name == tensor_name) return static_cast<int>(i);
  }
  return -1;
}

int Lowered::find_rank(std::string_view rank_name) const {
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i].name == rank_name) return static_cast<int>(i);
  }
  return -1;
}

std::optional<int64_t> offset_from(const Lowered& lowered, int id, int rank) {
  const IndexNode& n = lowered.node(id);
  using Kind = IndexNode::Kind;
  if (n.kind == Kind::rank && n.id == rank) return 0;
  if (n.kind != Kind::add && n.kind != Kind::subtract) return std::nullopt;
  const IndexNode& right = lowered.node(n.args[1]);
  if (right.kind != Kind::number) return std::nullopt;
  const auto left = offset_from(lowered, n.args[0], rank);
  if (!left) return std::nullopt;
  return n.kind == Kind::add ? *left + right.number : *left - right.number;
}

const Split* merged_split(const Lowered& lowered, int id) {
  using Kind = IndexNode::Kind;
  const IndexNode& sum = lowered.node(id);
  if (sum.kind != Kind::add) return nullptr;
  const IndexNode& product = lowered.node(sum.args[0]);
  const IndexNode& inner = lowered.node(sum.args[1]);
  if (product.kind != Kind::multiply || inner.kind != Kind::rank) return nullptr;
  const IndexNode& outer = lowered.node(product.args[0]);
  const IndexNode& block = lowered.node(product.args[1]);
  for (const Split& s : lowered.splits) {
    const IndexNode& expected = lowered.node(s.block);
    if (outer.kind == Kind::rank && outer.id == s.outer && inner.id == s.inner &&
        block.kind == expected.kind && block.id == expected.id && block.number == expected.number) {
      return &s;
    }
  }
  return nullptr;
}

Names::Names(const Ast& ast, Lowered& lowered) : ast_(ast), lowered_(lowered) {
  ranks();
  sizes_and_splits();
  for (size_t i = 0; i < ast_.ranks.size(); ++i) {
    if (ast_.ranks[i].size < 0) continue;
    const int size_node = index(ast_.ranks[i].size, 0);
    const IndexNode& n = lowered_.node(size_node);
    const Index& written = ast_.indices[static_cast<size_t>(ast_.ranks[i].size)];
    if (n.ranks != 0) error(written.place, "found a rank in the size of a rank, expected sizes");
    lowered_.ranks[i].size = size_node;
  }
  inputs();
  predicates();
  functions();
}

void Names::error(Place place, std::string_view message) const { fail(ast_.file, place, message); }

void Names::declare(const std::string& name, Place place, const char* what) {
  const auto [it, added] = kinds_.emplace(name, what);
  if (!added) {
    error(place, fmt::format("found '{}', already the name of a {}, expected a new name", name,
                             it->second));
  }
}

void Names::ranks() {
  for (const RankDeclaration& r : ast_.ranks) {
    declare(r.name, r.place, "rank");
    if (lowered_.ranks.size() >= static_cast<size_t>(kMaxRanks)) {
      error(r.place,
            fmt::format("found rank {}, expected at most {} ranks", kMaxRanks + 1, kMaxRanks));
    }
    rank_ids_[r.name] = static_cast<int>(lowered_.ranks.size());
    lowered_.ranks.push_back({r.name, r.batch, -1, r.place});
  }
}

int Names::split_rank(const std::string& name, Place place, const Rank& parent) {
  declare(name, place, "rank");
  if (lowered_.ranks.size() >= static_cast<size_t>(kMaxRanks)) {
    error(place, fmt::format("found rank {}, expected at most {} ranks", kMaxRanks + 1, kMaxRanks));
  }
  const int id = static_cast<int>(lowered_.ranks.size());
  rank_ids_[name] = id;
  const bool batch = parent.batch;
  lowered_.ranks.push_back({name, batch, -1, place});
  return id;
}

void Names::sizes_and_splits() {
  // Sizes are numbered behind all ranks, so ranks come first.
  struct Parts {
    int parent, outer, inner;
  };
  std::vector<Parts> parts;
  for (const SplitDeclaration& s : ast_.splits) {
    const int parent = rank(s.parent);
    if (parent < 0) {
      error(s.place,
            fmt::format("found '{}', expected a rank to split: {}", s.parent, rank_list()));
    }
    int outer = rank(s.outer);
    const bool shared = std::any_of(parts.begin(), parts.end(), [&](const Parts& p) {
      return p.parent == parent && p.outer == outer;
    });
    if (!shared) outer = split_rank(s.outer, s.outer_place, lowered_.rank(parent));
    const int inner = split_rank(s.inner, s.inner_place, lowered_.rank(parent));
    parts.push_back({parent, outer, inner});
  }
  for (const SizeDeclaration& s : ast_.sizes) {
    declare(s.name, s.place, "size");
    constant(s.name);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const SplitDeclaration& s = ast_.splits[i];
    IndexNode block;
    if (s.block.empty()) {
      if (s.block_number < 1) error(s.block_place, "found 0, expected a block of at least 1");
      block.number = s.block_number;
    } else {
      if (find(constant_ids_, s.block) < 0) declare(s.block, s.block_place, "size");
      block.kind = IndexNode::Kind::size;
      block.id = static_cast<int>(lowered_.ranks.size()) + constant(s.block);
    }
    const Split split{parts[i].parent, parts[i].outer, parts[i].inner, node(block)};
    for (const Split& other : lowered_.splits) {
      const IndexNode& theirs = lowered_.node(other.block);
      if (other.outer == split.outer && (theirs.id != block.id || theirs.number != block.number)) {
        error(s.block_place, fmt::format("found another block for the outer rank '{}', expected "
                                         "the one of its first split",
                                         s.outer));
      }
    }
    lowered_.splits.push_back(split);
  }
}

int Names::constant(const std::string& name) {
  const auto it = constant_ids_.find(name);
  if (it != constant_ids_.end()) return it->second;
  const int id = static_cast<int>(lowered_.constants.size());
  lowered_.constants.push_back(name);
  constant_ids_[name] = id;
  return id;
}

void Names::inputs() {
  for (const InputDeclaration& in : ast_.inputs) {
    declare(in.name, in.place, in.bracketed ? "tensor" : "scalar");
    TensorInfo info;
    info.name = in.name;
    info.input = true;
    info.scalar = !in.bracketed;
    info.has_default = in.has_default;
    info.fallback = in.fallback;
    info.place = in.place;
    for (int i : in.indices) {
      Axis axis;
      axis.declared = index(i, ~RankSet{0});
      const IndexNode& n = lowered_.node(axis.declared);
      if (n.kind == IndexNode::Kind::rank) axis.rank = n.id;
      if (n.kind != IndexNode::Kind::rank && n.kind != IndexNode::Kind::call) {
        error(ast_.indices[static_cast<size_t>(i)].place,
              fmt::format("found an expression as an axis of '{}', expected a rank or an index "
                          "function of ranks",
                          in.name));
      }
      RankSet batch = 0;
      for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
        if (lowered_.ranks[r].batch) batch |= bit(static_cast<int>(r));
      }
      if (n.ranks != 0 && (n.ranks & ~batch) == 0) axis.batch = n.ranks;
      info.axes.push_back(axis);
    }
    const int id = static_cast<int>(lowered_.tensors.size());
    tensor_ids_[in.name] = id;
    lowered_.tensors.push_back(std::move(info));
  }
}

void Names::predicates() {
  for (const PredicateDeclaration& p : ast_.predicates) {
    declare(p.name, p.place, "predicate");
    for (size_t i = 0; i < p.ranks.size(); ++i) {
      if (rank(p.ranks[i]) < 0) {
        error(p.rank_places[i],
              fmt::format("found '{}', expected a rank: {}", p.ranks[i], rank_list()));
      }
    }
    lowered_.predicates.push_back({p.name, static_cast<int>(p.ranks.size())});
  }
}

/// A parameter that the body lacks would still bring the ranks of its argument into the term.
void Names::functions() {
  for (const FunctionDeclaration& f : ast_.functions) {
    declare(f.name, f.place, "function");
    std::set<std::string> read, seen;
    for_each_expr(ast_, f.body, [&](const Expr& e) {
      if (e.kind == Expr::Kind::name) read.insert(e.name);
    });
    for (size_t i = 0; i < f.parameters.size(); ++i) {
      const std::string& name = f.parameters[i];
      if (!seen.insert(name).second) {
        error(f.parameter_places[i],
              fmt::format("found the parameter '{}' twice, expected each once", name));
      }
      if (read.count(name) == 0) {
        error(f.parameter_places[i],
              fmt::format("found the parameter '{}', which '{}' does not use, expected it in the "
                          "function or no such parameter",
                          name, f.name));
      }
    }
  }
}

int Names::add_tensor(TensorInfo info) {
  declare(info.name, info.place, "tensor");
  const int id = static_cast<int>(lowered_.tensors.size());
  tensor_ids_[info.name] = id;
  lowered_.tensors.push_back(std::move(info));
  return id;
}

int Names::rank(std::string_view name) const { return find(rank_ids_, name); }
int Names::tensor(std::string_view name) const { return find(tensor_ids_, name); }

int Names::size(std::string_view name) const {
  const int id = find(constant_ids_, name);
  if (id >= 0) return static_cast<int>(lowered_.ranks.size()) + id;
  if (kinds_.count(std::string(name)) != 0) return -1;
  for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
    if (upper(lowered_.ranks[r].name) == name) return static_cast<int>(r);
  }
  return -1;
}

std::string Names::rank_list() const {
  std::string list;
  for (const Rank& r : lowered_.ranks) list += (list.empty() ? "" : ", ") + r.name;
  return list.empty() ? "none is declared" : list;
}

int Names::node(IndexNode n) const {
  for (int arg : n.args) n.ranks |= lowered_.node(arg).ranks;
  lowered_.indices.push_back(std::move(n));
  return static_cast<int>(lowered_.indices.size()) - 1;
}

int Names::rank_node(int rank, RankSet visible) const {
  using Kind = IndexNode::Kind;
  if ((visible & bit(rank)) == 0) {
    for (const Split& s : lowered_.splits) {
      if (s.parent != rank) continue;
      const int outer = rank_node(s.outer, visible);
      const int inner = rank_node(s.inner, visible);
      if (((lowered_.node(outer).ranks | lowered_.node(inner).ranks) & ~visible) != 0) continue;
      return node(
          {Kind::add, 0, -1, {node({Kind::multiply, 0, -1, {outer, s.block}, 0}), inner}, 0});
    }
  }
  return node({Kind::rank, 0, rank, {}, bit(rank)});
}

int Names::value_node(std::string_view name, RankSet visible) const {
  const int r = rank(name);
  if (r >= 0) return rank_node(r, visible);
  const int s = size(name);
  if (s >= 0) return node({IndexNode::Kind::size, 0, s, {}, 0});
  return -1;
}

int Names::function(const Index& call) const {
  for (size_t i = 0; i < lowered_.functions.size(); ++i) {
    Callable& f = lowered_.functions[i];
    if (f.name != call.name) continue;
    if (f.arity != static_cast<int>(call.args.size())) {
      error(call.place, fmt::format("found {} arguments of the index function '{}', expected {} as "
                                    "in its first use",
                                    call.args.size(), call.name, f.arity));
    }
    return static_cast<int>(i);
  }
  if (lowered_.functions.size() >= static_cast<size_t>(kMaxCallables)) {
    error(call.place, fmt::format("found index function {}, expected at most {}", kMaxCallables + 1,
                                  kMaxCallables));
  }
  lowered_.functions.push_back({call.name, static_cast<int>(call.args.size())});
  return static_cast<int>(lowered_.functions.size()) - 1;
}

bool Names::made_of_sizes(int id) const {
  const IndexNode& n = lowered_.node(id);
  return n.ranks == 0 && n.kind != IndexNode::Kind::call &&
         std::all_of(n.args.begin(), n.args.end(), [&](int arg) { return made_of_sizes(arg); });
}

int Names::index(int ast_index, RankSet visible) const {
  using Kind = IndexNode::Kind;
  const Index& i = ast_.indices[static_cast<size_t>(ast_index)];
  IndexNode n;
  switch (i.kind) {
    case Index::Kind::number:
      n.number = i.number;
      return node(n);
    case Index::Kind::name: {
      const int id = value_node(i.name, visible);
      if (id < 0) {
        error(i.place, fmt::format("found '{}', expected a rank ({}), a size or an index function",
                                   i.name, rank_list()));
      }
      return id;
    }
    case Index::Kind::call:
      n.kind = Kind::call;
      n.id = function(i);
      break;
    case Index::Kind::negate:
      n.kind = Kind::negate;
      break;
    case Index::Kind::add:
      n.kind = Kind::add;
      break;
    case Index::Kind::subtract:
      n.kind = Kind::subtract;
      break;
    case Index::Kind::multiply:
      n.kind = Kind::multiply;
      break;
  }
  for (int arg : i.args) n.args.push_back(index(arg, visible));
  if (n.kind == Kind::multiply && !made_of_sizes(n.args[0]) && !made_of_sizes(n.args[1])) {
    error(i.place,
          "found a product of two ranks or index functions in an index, expected one factor made "
          "of sizes");
  }
  return node(std::move(n));
}

int Names::plain_rank(int ast_index) const {
  const Index& i = ast_.indices[static_cast<size_t>(ast_index)];
  return i.kind == Index::Kind::name ? rank(i.name) : -1;
}

bool Names::match_axes(const TensorInfo& tensor, const std::vector<int>& written, bool leave_out,
                       RankSet visible, Match& match) const {
  using Kind = IndexNode::Kind;
  match = {};
  size_t at = 0;
  for (const Axis& axis : tensor.axes) {
    if (leave_out && axis.batch != 0) {
      const int id =
          axis.declared >= 0 ? axis.declared : node({Kind::rank, 0, axis.rank, {}, bit(axis.rank)});
      match.index.push_back(id);
      continue;
    }
    if (at >= written.size()) return false;
    const Split* parts = nullptr;
    for (const Split& s : lowered_.splits) {
      if (at + 1 < written.size() && s.parent == axis.rank && plain_rank(written[at]) == s.outer &&
          plain_rank(written[at + 1]) == s.inner) {
        parts = &s;
      }
    }
    if (parts != nullptr) {
      const int outer = index(written[at], visible);
      const int inner = index(written[at + 1], visible);
      const int product = node({Kind::multiply, 0, -1, {outer, parts->block}, 0});
      match.index.push_back(node({Kind::add, 0, -1, {product, inner}, 0}));
      at += 2;
    } else {
      match.index.push_back(index(written[at++], visible));
    }
  }
  if (at != written.size()) return false;
  match.left_out = leave_out;
  for (int id : match.index) match.ranks |= lowered_.node(id).ranks;
  return true;
}

std::optional<Names::Match> Names::match(const TensorInfo& tensor, const std::vector<int>& written,
                                         RankSet visible) const {
  const bool batched = std::any_of(tensor.axes.begin(), tensor.axes.end(),
                                   [](const Axis& a) { return a.batch != 0; });
  Match result;
  if (batched && match_axes(tensor, written, true, visible, result)) return result;
  if (match_axes(tensor, written, false, visible, result)) return result;
  return std::nullopt;
}

std::string Names::index_text(int id) const {
  const IndexNode& n = lowered_.node(id);
  if (n.kind == IndexNode::Kind::rank) return lowered_.rank(n.id).name;
  if (n.kind != IndexNode::Kind::call) return "...";
  std::string text = lowered_.functions[static_cast<size_t>(n.id)].name + "(";
  for (size_t i = 0; i < n.args.size(); ++i) text += (i ? "," : "") + index_text(n.args[i]);
  return text + ")";
}

std::string Names::axes_text(const TensorInfo& tensor) const {
  std::string text = "[";
  for (const Axis& axis : tensor.axes) {
    if (text.size() > 1) text += ",";
    text += axis.rank >= 0 ? lowered_.rank(axis.rank).name + (axis.running ? "+1" : "")
                           : index_text(axis.declared);
  }
  return text + "]";
}

}  // namespace heed::cascade
