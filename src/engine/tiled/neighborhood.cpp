#include "engine/tiled/neighborhood.h"

#include <algorithm>
#include <string>

#include "base/round_up.h"
#include "heed/error.h"

namespace heed::tiled {
namespace {

[[noreturn]] void fail(const char* op, const char* argument, int axis, int64_t found,
                       const std::string& needed) {
  throw Error(std::string(op) + ": " + argument + " of axis " + std::to_string(axis) + " is " +
              std::to_string(found) + ", " + needed + " is needed");
}

void check_axis(const char* op, int number, const NeighborhoodAxis& axis) {
  if (axis.length < 1) fail(op, "length", number, axis.length, "a number of tokens >= 1");
  if (axis.dilation < 1 || axis.dilation > axis.length) {
    fail(op, "dilation", number, axis.dilation,
         "a number from 1 to the length " + std::to_string(axis.length));
  }
  if (axis.kernel < 1 || axis.kernel > axis.length / axis.dilation) {
    fail(op, "kernel_size", number, axis.kernel,
         "a number from 1 to length / dilation = " + std::to_string(axis.length / axis.dilation));
  }
  if (axis.stride < 1 || axis.stride > axis.kernel) {
    fail(op, "stride", number, axis.stride,
         "a number from 1 to the kernel size " + std::to_string(axis.kernel));
  }
}

}  // namespace

WindowLine::WindowLine(const NeighborhoodAxis& axis, int64_t residue)
    : length_(ceil_div(axis.length - residue, axis.dilation)),
      kernel_(axis.kernel),
      stride_(axis.stride),
      causal_(axis.causal) {}

// The window of a group of `stride` queries is centred at its leader (right of the centre for even
// strides) with the longer side to the left, and slid back inside the line. On a causal axis the
// leader is the group's last query and the window ends there. The last group may be shorter.
int64_t WindowLine::start(int64_t query) const {
  const int64_t group = query / stride_ * stride_;
  if (causal_) {
    const int64_t leader = std::min(group + stride_ - 1, length_ - 1);
    return std::max<int64_t>(leader - kernel_ + 1, 0);
  }
  const int64_t leader = std::min(group + stride_ / 2, length_ - 1);
  return std::clamp<int64_t>(leader - kernel_ / 2, 0, length_ - kernel_);
}

int64_t WindowLine::end(int64_t query) const {
  return causal_ ? query + 1 : start(query) + kernel_;
}

// Windows of neighbouring groups touch (stride <= kernel), so a union has no holes.
Interval WindowLine::keys_of(Interval queries) const {
  if (queries.empty()) return {};
  return {start(queries.begin), end(queries.end - 1)};
}

Interval WindowLine::shared_keys_of(Interval queries) const {
  if (queries.empty()) return {};
  return {start(queries.end - 1), end(queries.begin)};
}

int64_t point_count(const GridBox& box) {
  int64_t count = 1;
  for (const Interval& side : box) count *= side.empty() ? 0 : side.end - side.begin;
  return count;
}

GridBox GridGroup::points() const {
  GridBox box;
  for (size_t a = 0; a < kGridAxes; ++a) box[a] = {0, lines[a].length()};
  return box;
}

int64_t GridGroup::token(const GridPoint& point) const {
  int64_t index = first_token;
  for (size_t a = 0; a < kGridAxes; ++a) index += point[a] * token_step[a];
  return index;
}

GridBox GridGroup::keys_of(const GridBox& queries) const {
  GridBox keys;
  for (size_t a = 0; a < kGridAxes; ++a) keys[a] = lines[a].keys_of(queries[a]);
  return keys;
}

GridBox GridGroup::shared_keys_of(const GridBox& queries) const {
  GridBox keys;
  for (size_t a = 0; a < kGridAxes; ++a) keys[a] = lines[a].shared_keys_of(queries[a]);
  return keys;
}

bool GridGroup::sees(const GridPoint& query, const GridPoint& key) const {
  for (size_t a = 0; a < kGridAxes; ++a) {
    const Interval keys = lines[a].keys_of(query[a]);
    if (key[a] < keys.begin || key[a] >= keys.end) return false;
  }
  return true;
}

Neighborhood::Neighborhood(const char* op, std::span<const NeighborhoodAxis> axes)
    : rank_(static_cast<int>(axes.size())) {
  if (axes.empty() || axes.size() > kGridAxes) {
    throw Error(std::string(op) + ": the grid has " + std::to_string(axes.size()) +
                " axes, 1 to 3 are needed");
  }
  constexpr int64_t kMostTokens = int64_t{1} << 62;  // twice as many are still an index
  int64_t most = kMostTokens;
  for (size_t a = 0; a < axes.size(); ++a) {
    check_axis(op, static_cast<int>(a), axes[a]);
    most /= axes[a].length;
    if (most == 0) throw Error(std::string(op) + ": the grid has more than 2^62 tokens");
    axes_[kGridAxes - axes.size() + a] = axes[a];
  }
}

int64_t Neighborhood::tokens() const { return axes_[0].length * axes_[1].length * axes_[2].length; }

int64_t Neighborhood::groups() const {
  return axes_[0].dilation * axes_[1].dilation * axes_[2].dilation;
}

GridGroup Neighborhood::group(int64_t n) const {
  GridGroup group;
  int64_t step = 1;
  for (size_t a = kGridAxes; a-- > 0;) {
    const int64_t residue = n % axes_[a].dilation;
    n /= axes_[a].dilation;
    group.lines[a] = WindowLine(axes_[a], residue);
    group.first_token += residue * step;
    group.token_step[a] = axes_[a].dilation * step;
    step *= axes_[a].length;
  }
  return group;
}

GridPoint Neighborhood::tile_shape(const char* op, const char* argument,
                                   std::span<const int64_t> sides) const {
  if (sides.size() != static_cast<size_t>(rank_)) {
    throw Error(std::string(op) + ": " + argument + " has " + std::to_string(sides.size()) +
                " sides, one for each of the " + std::to_string(rank_) + " axes is needed");
  }
  GridPoint shape{1, 1, 1};
  for (size_t a = 0; a < sides.size(); ++a) {
    if (sides[a] < 1) fail(op, argument, static_cast<int>(a), sides[a], "a number of tokens >= 1");
    shape[kGridAxes - sides.size() + a] = sides[a];
  }
  return shape;
}

}  // namespace heed::tiled
