// A whole tile in one: 32 rows at a time meet the keys panel by panel, so that scores and weights stay in the
// need AVX512-BF16.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "kernels/amx_products.h"

namespace heed::kernels {

/// Up to 32 rows of a tile. Weights of a few panels wait for their product with the values: each reads and
/// writes all sums.
template <class Unit, WeightKind kKind>
class RowAttention {
 public:
  static constexpr int64_t kRows = 32;

  RowAttention(Unit& unit, const TileOperands& x, int64_t first, const WeightShape<float>& shape,
               const RowState<float>& state, Block<float> o, ReadAhead* ahead)
      : unit_(unit),
        x_(x),
        first_(first),
        rows_(std::min(kRows, x.rows - first)),
        depth_(round_up(x.width, kHalfDepth)),
        v_stride_(round_up(x.value_width, kHalfColumns)),
        most_waiting_(v_stride_ <= 64 ? 2 * kHalfPanel : kMostWaiting),
        shape_(shape),
        state_{state.pivot + first, state.sum + first, state.carry + first},
        o_{o.row(first), o.stride},
        ahead_(ahead),
        common_(common_range()) {}

  void run() {
    const KeyRange* ranges = x_.ranges != nullptr ? x_.ranges + first_ : nullptr;
    const KeyRange seen = joint_range(ranges, 0, rows_, x_.key_count);
    if (seen.empty()) return;
    if constexpr (kKind == WeightKind::softmax) find_settled();
    const int64_t end = std::min(round_up(seen.end, kHalfDepth), x_.key_count);
    waiting_ = from_ = seen.begin / kHalfPanel * kHalfPanel;
    for (int64_t key = waiting_; key < seen.end; key += kHalfPanel) {
      const int64_t keys = std::min(kHalfPanel, end - key);
      add_scores(key, keys);
      weigh(key, keys, key + 2 * kHalfPanel <= seen.end);
      if (key + kHalfPanel - from_ >= most_waiting_ || key + kHalfPanel >= seen.end) {
        add_values(key + keys);
        from_ = waiting_;
      }
    }
    if constexpr (kKind == WeightKind::softmax) take_lane_sums(lane_sums_, rows_, state_.sum);
  }

 private:
  static constexpr int64_t kMostWaiting = 4 * kHalfPanel;

  KeyRange common_range() const {
    KeyRange common{0, static_cast<int32_t>(x_.key_count)};
    for (int64_t r = 0; x_.ranges != nullptr && r < rows_; ++r) {
      common.begin = std::max(common.begin, x_.ranges[first_ + r].begin);
      common.end = std::min(common.end, x_.ranges[first_ + r].end);
    }
    return common;
  }

  const uint32_t* panel(int64_t key) const {
    return static_cast<const uint32_t*>(x_.keys) + key * depth_ / 2;
  }

  void add_scores(int64_t key, int64_t keys) {
    const int64_t columns = round_up(keys, kHalfDepth),
                  width = std::min(kHalfPanel, round_up(x_.key_count, kHalfDepth) - key);
    advance(ahead_, kRows, columns, depth_);
    panel_scores(unit_, static_cast<const uint16_t*>(x_.queries) + first_ * depth_, depth_,
                 panel(key), width, columns, scores_, kHalfPanel);
  }

  // `more`: another whole panel follows.
  void weigh(int64_t key, int64_t keys, bool more) {
    WeightChunk chunk{.scores = {scores_, kHalfPanel},
                      .weights = {weights_ + key - from_, most_waiting_},
                      .rows = rows_,
                      .keys = keys,
                      .ranges = ranges_of(key, keys)};
    if constexpr (kKind != WeightKind::softmax) {
      weigh_rows(chunk, 0, rows_);
      return;
    }
    if ((seeing_ & ~settled_) != 0) {
      find_first_pivots(chunk, seeing_, shape_.scale, state_.pivot);
      find_settled();
    }
    if ((seeing_ & ~settled_) != 0) {
      move_pivots(chunk, key, 0, rows_);
    } else {
      chunk.next = panel(key + kHalfPanel);
      if (more && rows_ == kRows) chunk.next_bytes = kHalfPanel * depth_ * 2;
      uint32_t misfits = softmax_chunk(chunk, shape_.scale, state_.pivot, lane_sums_);
      for (; misfits != 0; misfits &= misfits - 1) {
        move_pivots(chunk, key, std::countr_zero(misfits), 1);
      }
    }
  }

  // What each row sees of a panel, null if that is all of it. `seeing_`: the rows that see something.
  const KeyRange* ranges_of(int64_t key, int64_t keys) {
    seeing_ = ~uint32_t{0} >> (kRows - rows_);
    if (common_.begin <= key && key + keys <= common_.end) return nullptr;
    const auto in_panel = [&](int32_t at) {
      return static_cast<int32_t>(std::clamp<int64_t>(at - key, 0, keys));
    };
    for (int64_t r = 0; r < rows_; ++r) {
      const KeyRange all = x_.ranges[first_ + r];
      KeyRange& here = ranges_[static_cast<size_t>(r)];
      here = {in_panel(all.begin), in_panel(all.end)};
      if (here.empty()) seeing_ &= ~(uint32_t{1} << r);
    }
    return ranges_.data();
  }

  // Weights of rows [r, r + count) that may move their pivots: sums and values so far move along.
  void move_pivots(const WeightChunk& chunk, int64_t key, int64_t r, int64_t count) {
    take_lane_sums(lane_sums_, rows_, state_.sum);
    weigh_rows(chunk, r, count);
    const float* carry = state_.carry + r;
    if (std::any_of(carry, carry + count, [](float c) { return c != 1; })) {
      add_values(key);
      scale_rows(carry, count, v_stride_, o_.row(r), o_.stride);
    }
    find_settled();
  }

  void weigh_rows(const WeightChunk& chunk, int64_t r, int64_t count) {
    static const TileKernels<float> kernels = [] {
      TileKernels<float> table;
      add_avx512_half_softmax(table);
      add_avx512_half_sigmoid(table);
      return table;
    }();
    kernels.weights[static_cast<int>(kKind)](
        {chunk.scores.row(r), chunk.scores.stride}, count, chunk.keys,
        chunk.ranges != nullptr ? chunk.ranges + r : nullptr, shape_,
        {state_.pivot + r, state_.sum + r, state_.carry + r}, chunk.weights.row(r),
        chunk.weights.stride);
  }

  void find_settled() {
    settled_ = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      if (std::abs(state_.pivot[r]) < kLargePivot<float>) settled_ |= uint32_t{1} << r;
    }
  }

  // Multiplies the weights that wait, of keys before `end`, with their values.
  void add_values(int64_t end) {
    const int64_t steps = ceil_div(end - waiting_, kHalfDepth);
    const auto* v = static_cast<const uint32_t*>(x_.values) + waiting_ / 2 * v_stride_;
    for (int64_t f = 0; steps > 0 && f < v_stride_; f += 32) {
      const bool wide = f + 32 <= v_stride_;
      advance(ahead_, kRows, wide ? 32 : 16, end - waiting_);
      const auto sum = wide ? sum_tiles<true, Unit> : sum_tiles<false, Unit>;
      sum(unit_, weights_ + waiting_ - from_, most_waiting_, value_tiles(v + 16 * f, v_stride_),
          steps, o_.data + f, o_.stride);
    }
    waiting_ = round_up(end, kHalfPanel);
  }

  Unit& unit_;
  const TileOperands& x_;
  const int64_t first_, rows_, depth_, v_stride_, most_waiting_;
  const WeightShape<float>& shape_;
  const RowState<float> state_;
  const Block<float> o_;
  ReadAhead* ahead_;
  const KeyRange common_;                    // what every row sees
  int64_t from_ = 0, waiting_ = 0;           // keys: of the first weights, the first that wait
  uint32_t settled_ = 0, seeing_ = 0;        // rows with a usual pivot; that see some of a panel
  std::array<KeyRange, kRows> ranges_ = {};  // in a panel
  alignas(64) float lane_sums_[kRows * 16] = {};
  alignas(64) float scores_[kRows * kHalfPanel];
  alignas(64) uint16_t weights_[kRows * kMostWaiting];
};

template <class Unit, WeightKind kKind>
void attend_tile(const TileOperands& x, const WeightShape<float>& shape,
                 const RowState<float>& state, Block<float> o, ReadAhead* ahead) {
  using Attention = RowAttention<Unit, kKind>;
  Unit unit;
  for (int64_t r = 0; r < x.rows; r += Attention::kRows) {
    Attention(unit, x, r, shape, state, o, ahead).run();
  }
}

template <class Unit>
void use_tile_attention(TileKernels<float>& f) {
  f.attend[static_cast<int>(WeightKind::softmax)] = attend_tile<Unit, WeightKind::softmax>;
  f.attend[static_cast<int>(WeightKind::sigmoid)] = attend_tile<Unit, WeightKind::sigmoid>;
}

}  // namespace heed::kernels
