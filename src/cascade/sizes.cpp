#include "cascade/sizes.h"

#include <fmt/format.h>

#include <algorithm>

#include "heed/error.h"

namespace heed::cascade {
namespace {

constexpr int64_t kLimit = int64_t{1} << 40;
constexpr int64_t kMaxSize = int64_t{1} << 31;

int64_t checked(const Lowered& lowered, __int128 value) {
  if (value > kLimit || value < -kLimit) {
    throw Error(
        fmt::format("cascade {}: an index or size leaves the range of +-2^40", lowered.name));
  }
  return static_cast<int64_t>(value);
}

void add(const Lowered& lowered, std::vector<std::pair<int, int64_t>>& to, int id, int64_t value) {
  for (auto& [other, coefficient] : to) {
    if (other == id) {
      coefficient = checked(lowered, __int128{coefficient} + value);
      return;
    }
  }
  to.emplace_back(id, value);
}

Affine scaled(const Lowered& lowered, Affine a, int64_t factor) {
  a.constant = checked(lowered, __int128{a.constant} * factor);
  for (auto& [id, c] : a.ranks) c = checked(lowered, __int128{c} * factor);
  for (auto& [id, c] : a.calls) c = checked(lowered, __int128{c} * factor);
  return a;
}

Affine sum(const Lowered& lowered, Affine a, const Affine& b) {
  a.constant = checked(lowered, __int128{a.constant} + b.constant);
  for (const auto& [id, c] : b.ranks) add(lowered, a.ranks, id, c);
  for (const auto& [id, c] : b.calls) add(lowered, a.calls, id, c);
  return a;
}

std::string size_name(const Lowered& lowered, int id) {
  const size_t n = lowered.ranks.size();
  const size_t i = static_cast<size_t>(id);
  return i < n ? "rank " + lowered.ranks[i].name : "size " + lowered.constants[i - n];
}

class Binder {
 public:
  Binder(const Lowered& lowered, const Bindings& bindings)
      : lowered_(lowered),
        bindings_(bindings),
        sizes_(lowered.ranks.size() + lowered.constants.size(), -1),
        source_(sizes_.size()) {}

  std::vector<int64_t> run() {
    given();
    shapes();
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t r = 0; r < lowered_.ranks.size(); ++r) {
        if (lowered_.ranks[r].size >= 0)
          changed |= derive(static_cast<int>(r), lowered_.ranks[r].size);
      }
      for (const Split& s : lowered_.splits) changed |= derive_split(s);
    }
    // Constants first: the sizes of split ranks may only be missing because of them.
    const size_t ranks = lowered_.ranks.size();
    for (size_t k = 0; k < sizes_.size(); ++k) {
      const size_t i = (k + ranks) % sizes_.size();
      if (sizes_[i] >= 0) continue;
      throw Error(
          fmt::format("cascade {}: {} has no size: no bound tensor has it; give "
                      "sizes[\"{}\"]",
                      lowered_.name, size_name(lowered_, static_cast<int>(i)), name(i)));
    }
    return sizes_;
  }

 private:
  std::string name(size_t i) const {
    const size_t n = lowered_.ranks.size();
    return i < n ? lowered_.ranks[i].name : lowered_.constants[i - n];
  }

  bool set(size_t i, int64_t value, const std::string& source) {
    if (value < 0 || value > kMaxSize) {
      throw Error(fmt::format("cascade {}: {} is {} in {}, expected 0 to 2^31", lowered_.name,
                              size_name(lowered_, static_cast<int>(i)), value, source));
    }
    if (sizes_[i] >= 0 && sizes_[i] != value) {
      throw Error(fmt::format("cascade {}: {} is {} in {} but {} in {}", lowered_.name,
                              size_name(lowered_, static_cast<int>(i)), sizes_[i], source_[i],
                              value, source));
    }
    if (sizes_[i] >= 0) return false;
    sizes_[i] = value;
    source_[i] = source;
    return true;
  }

  void given() {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const auto it = bindings_.sizes.find(name(i));
      if (it != bindings_.sizes.end()) set(i, it->second, "sizes");
    }
  }

  void shapes() {
    for (const TensorInfo& t : lowered_.tensors) {
      if (!t.input || t.scalar) continue;
      const auto it = bindings_.tensors.find(t.name);
      if (it == bindings_.tensors.end()) continue;
      const std::vector<int64_t>& shape = it->second.shape;
      if (shape.size() != t.axes.size()) {
        throw Error(fmt::format("cascade {}: tensor {} has {} axes, expected {}", lowered_.name,
                                t.name, shape.size(), t.axes.size()));
      }
      for (size_t a = 0; a < shape.size(); ++a) {
        if (t.axes[a].rank < 0) continue;
        set(static_cast<size_t>(t.axes[a].rank), shape[a], fmt::format("axis {} of {}", a, t.name));
      }
    }
  }

  bool known(int id) const {
    const IndexNode& n = lowered_.node(id);
    if (n.kind == IndexNode::Kind::call) {
      throw Error(fmt::format("cascade {}: a size uses an index function", lowered_.name));
    }
    if (n.kind == IndexNode::Kind::size && sizes_[static_cast<size_t>(n.id)] < 0) return false;
    return std::all_of(n.args.begin(), n.args.end(), [&](int arg) { return known(arg); });
  }

  bool derive(int rank, int id) {
    if (!known(id)) return false;
    return set(static_cast<size_t>(rank), affine_of(lowered_, id, sizes_).constant,
               "its declaration");
  }

  bool derive_split(const Split& s) {
    if (!known(s.block)) {
      // The size of the inner rank is another way to give the block.
      const int64_t inner = sizes_[static_cast<size_t>(s.inner)];
      return inner >= 0 && set(static_cast<size_t>(lowered_.node(s.block).id), inner,
                               "rank " + lowered_.rank(s.inner).name);
    }
    const int64_t block = affine_of(lowered_, s.block, sizes_).constant;
    if (block < 1) {
      throw Error(
          fmt::format("cascade {}: the block of the split of rank {} is {}, expected at "
                      "least 1",
                      lowered_.name, lowered_.rank(s.parent).name, block));
    }
    bool changed = set(static_cast<size_t>(s.inner), block, "its split");
    const int64_t parent = sizes_[static_cast<size_t>(s.parent)];
    if (parent >= 0) {
      changed |= set(static_cast<size_t>(s.outer), (parent + block - 1) / block, "its split");
    }
    return changed;
  }

  const Lowered& lowered_;
  const Bindings& bindings_;
  std::vector<int64_t> sizes_;
  std::vector<std::string> source_;
};

}  // namespace

std::vector<int64_t> bind_sizes(const Lowered& lowered, const Bindings& bindings) {
  return Binder(lowered, bindings).run();
}

Affine affine_of(const Lowered& lowered, int id, const std::vector<int64_t>& sizes) {
  using Kind = IndexNode::Kind;
  const IndexNode& n = lowered.node(id);
  Affine result;
  switch (n.kind) {
    case Kind::number:
      result.constant = n.number;
      return result;
    case Kind::rank:
      result.ranks.emplace_back(n.id, 1);
      return result;
    case Kind::size:
      result.constant = sizes[static_cast<size_t>(n.id)];
      return result;
    case Kind::call:
      result.calls.emplace_back(id, 1);
      return result;
    case Kind::negate:
      return scaled(lowered, affine_of(lowered, n.args[0], sizes), -1);
    default:
      break;
  }
  Affine left = affine_of(lowered, n.args[0], sizes);
  Affine right = affine_of(lowered, n.args[1], sizes);
  if (n.kind == Kind::add) return sum(lowered, std::move(left), right);
  if (n.kind == Kind::subtract) {
    return sum(lowered, std::move(left), scaled(lowered, std::move(right), -1));
  }
  const bool left_is_size = left.ranks.empty() && left.calls.empty();
  return left_is_size ? scaled(lowered, std::move(right), left.constant)
                      : scaled(lowered, std::move(left), right.constant);
}

std::pair<int64_t, int64_t> range_of(const Affine& affine, const std::vector<int64_t>& sizes) {
  int64_t low = affine.constant, high = affine.constant;
  for (const auto& [rank, c] : affine.ranks) {
    const __int128 reach = __int128{c} * std::max<int64_t>(sizes[static_cast<size_t>(rank)] - 1, 0);
    const auto bounded =
        static_cast<int64_t>(std::clamp<__int128>(reach, -(__int128{1} << 55), __int128{1} << 55));
    (bounded < 0 ? low : high) += bounded;
  }
  return {low, high};
}

}  // namespace heed::cascade
