// How the operands of int8_rows.h lie in memory, and the kernels that make and multiply them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/round_up.h"
#include "kernels/int8_rows.h"

namespace heed::kernels {

inline constexpr int64_t kInt8Columns = 128;  // of activations with one step
inline constexpr int64_t kInt8Rows = 4;       // rows of activations side by side
inline constexpr int64_t kPanelRows = 32;     // rows of weights side by side
inline constexpr int64_t kPanelColumns = 32;  // of weights with one scale

/// Groups of kPanelColumns columns. Each has a sum, a column of its own behind the others: it meets what the
/// weights of the group have in common beside multiples of their scale.
inline constexpr int64_t panel_groups(int64_t columns) { return ceil_div(columns, kPanelColumns); }

/// Groups of activations of all columns, then those of the sums.
inline constexpr int64_t value_groups(int64_t columns) { return ceil_div(columns, kInt8Columns); }
inline constexpr int64_t int8_groups(int64_t columns) {
  return value_groups(columns) + value_groups(panel_groups(columns));
}

/// kInt8Columns columns of kInt8Rows rows. Columns and rows past the last are zeros.
template <int kBytes>
struct Int8Group {
  // q + 128, or the upper and the lower byte of q + 32768: the instruction takes one factor unsigned.
  uint8_t codes[kBytes][kInt8Columns / 4][kInt8Rows][4];
  float steps[kInt8Rows];
};

/// The largest activations of kInt8Rows rows, count(columns) of each in no order.
struct Int8Outliers {
  static constexpr int64_t kMost = 4;
  int32_t columns[kMost][kInt8Rows];
  float values[kMost][kInt8Rows];

  /// One costs as much as about 20 columns.
  static constexpr int64_t count(int64_t columns) {
    return columns >= 384 * kMost ? kMost : ceil_div(columns, 384);
  }
};

/// kInt8Rows rows of activations: their outliers, then the groups.
inline constexpr int64_t int8_block_bytes(int64_t columns, int bytes) {
  const size_t group = bytes == 1 ? sizeof(Int8Group<1>) : sizeof(Int8Group<2>);
  return static_cast<int64_t>(sizeof(Int8Outliers) +
                              static_cast<size_t>(int8_groups(columns)) * group);
}

/// kPanelColumns columns of kPanelRows rows of weights, scale times code.
struct alignas(64) PanelGroup {
  int8_t codes[kPanelColumns / 4][kPanelRows][4];
  // The second of each where the last 16 columns have a scale of their own. Starts are -128 times the sum of
  // codes: that takes the 128 of q + 128 out again.
  int32_t starts[2][kPanelRows];
  float scales[2][kPanelRows];
};

/// kPanelRows rows of weights: groups of their columns, then groups that sums of activations meet: offsets
/// rounded to 8 bits, and in a second part what that leaves of them.
struct Panel {
  PanelGroup* groups = nullptr;  // room for most_groups()
  int64_t rows = 0;              // that there are; past them are copies of the last
  bool halves = false;           // groups have two scales
  int offset_parts = 0;  // groups for sums: none, or as many as activations have bytes; 2 where
                         // 8 bits would not do

  static constexpr int64_t most_groups(int64_t columns) {
    return panel_groups(columns) + 2 * panel_groups(panel_groups(columns));
  }
};

/// Unpacks rows [first, first + kPanelRows) of w, for activations of so many bytes. AVX512-VNNI.
void unpack_panel_avx512(const BlockMatrix& w, int64_t first, int bytes, Panel& panel);

/// Rows [first, end) of y, which begins at the panel's first column; first is a multiple of kInt8Rows.
/// AVX512-VNNI.
void int8_panel_avx512(const Int8Rows& x, const Panel& panel, const Tensor& y, bool add,
                       int64_t first, int64_t end);

}  // namespace heed::kernels
