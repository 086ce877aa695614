// How the operands of int8_rows.h lie in memory, and the kernel that multiplies them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/round_up.h"
#include "kernels/int8_rows.h"

namespace heed::kernels {

inline constexpr int64_t kInt8Group = 64;  // columns; those past the last are zeros
inline constexpr int64_t kInt8Rows = 4;    // rows of activations side by side
inline constexpr int64_t kInt8Panel = 32;  // rows of weights side by side

inline constexpr int64_t int8_groups(int64_t columns) { return ceil_div(columns, kInt8Group); }

/// One group of columns of kInt8Rows rows. Rows past the last are zeros.
struct Int8Group {
  uint8_t codes[kInt8Group / 4][kInt8Rows]
               [4];  // q + 128: the instruction takes one factor unsigned
  float steps[kInt8Rows];
};

/// The largest activations of kInt8Rows rows, in no order.
struct Int8Outliers {
  static constexpr int64_t kCount = 4;
  int32_t columns[kCount][kInt8Rows];
  float values[kCount][kInt8Rows];
};

/// kInt8Rows rows of activations: their outliers, then the groups along the columns.
inline constexpr int64_t int8_block_bytes(int64_t columns) {
  return static_cast<int64_t>(sizeof(Int8Outliers)) +
         int8_groups(columns) * static_cast<int64_t>(sizeof(Int8Group));
}

/// One group of columns of kInt8Panel rows of weights. Groups follow each other along the columns, then
/// along the rows. Rows past the last are zeros.
struct alignas(64) WeightGroup {
  int32_t
      starts[kInt8Panel];  // -128 times the sum of the codes: takes the 128 of q + 128 out again
  float scales[kInt8Panel];
  int8_t codes[kInt8Group / 4][kInt8Panel][4];
};

/// Rows [first, end) of y for one panel of w; first is a multiple of kInt8Rows. AVX512-VNNI.
void int8_panel_avx512(const Int8Rows& x, const Int8Matrix& w, const Tensor& y, bool add,
                       int64_t panel, int64_t first, int64_t end);

}  // namespace heed::kernels
