// Blocks of neighbouring rows of one head of [B,H,L,...], for work that goes row by row.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/tensor.h"
#include "kernels/matrix.h"

namespace heed {

/// Rows [begin, begin + count) of one head.
struct RowBlock {
  int64_t batch = 0, head = 0, begin = 0, count = 0;
};

/// Calls body(block) in parallel for blocks of up to `most` rows that together are those of t [B,H,L,...].
template <class Body>
void for_row_blocks(const Tensor& t, int64_t most, const RunOptions& run, const Body& body) {
  const int64_t heads = t.size(1), rows = t.size(2), per_head = ceil_div(rows, most);
  const int64_t blocks = t.size(0) * heads * per_head;
  parallel_for(blocks, threads_for_rows(run, blocks, t.count()), [&](int64_t i, int) {
    const int64_t begin = i % per_head * most, head = i / per_head;
    body(RowBlock{head / heads, head % heads, begin, std::min(most, rows - begin)});
  });
}

/// Those rows of t [B,H,L,W].
inline kernels::Rows rows_of(const Tensor& t, const RowBlock& block) {
  return {t.at({block.batch, block.head, block.begin}), t.dtype(), t.stride(2), block.count,
          t.size(3)};
}
inline kernels::RowsOut out_rows(const Tensor& t, const RowBlock& block) {
  return {t.at({block.batch, block.head, block.begin}), t.dtype(), t.stride(2), block.count,
          t.size(3)};
}

}  // namespace heed
