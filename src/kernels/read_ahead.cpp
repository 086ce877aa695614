#include "kernels/read_ahead.h"

#include <algorithm>
#include <cassert>

#include "kernels/prefetch.h"

namespace heed::kernels {

namespace {
constexpr int64_t kLine = 64;  // bytes
}

ReadAhead::ReadAhead(std::initializer_list<Rows> list) {
  for (const Rows& rows : list) add(rows);
}

void ReadAhead::add(const Rows& rows) {
  if (rows.data == nullptr || rows.count <= 0 || rows.width <= 0) return;
  const auto element = static_cast<int64_t>(size_of(rows.dtype));
  const bool together = rows.offsets == nullptr && rows.stride == rows.width;
  const Lines lines{row_at(rows, 0),
                    rows.stride * element,
                    together ? 1 : rows.count,
                    rows.width * element * (together ? rows.count : 1),
                    rows.offsets == nullptr ? nullptr : rows.offsets + 1,
                    element};
  assert(count_ < static_cast<int64_t>(list_.size()));
  lines_ += lines.rows * ((lines.row_bytes + kLine - 1) / kLine);
  list_[static_cast<size_t>(count_++)] = lines;
}

int64_t ReadAhead::lines() const { return lines_; }

void ReadAhead::ask(int64_t lines) {
  lines = std::min(lines, lines_);
  lines_ -= lines;
  while (lines > 0) {
    Lines& x = list_[static_cast<size_t>(at_)];
    const int64_t here = std::min(lines, (x.row_bytes - done_ + kLine - 1) / kLine);
    for (int64_t i = 0; i < here; ++i) prefetch_far(x.data, done_ + i * kLine);
    lines -= here;
    done_ += here * kLine;
    if (done_ < x.row_bytes) continue;
    done_ = 0;
    if (--x.rows == 0) {
      ++at_;
    } else if (x.offsets == nullptr) {
      x.data += x.stride;
    } else {
      x.data += (x.offsets[0] - x.offsets[-1]) * x.element;
      ++x.offsets;
    }
  }
}

void ReadAhead::spread(int64_t multiply_adds) {
  rate_ = static_cast<double>(lines_) / static_cast<double>(std::max<int64_t>(1, multiply_adds));
  due_ = 0;
}

void ReadAhead::advance(int64_t multiply_adds) {
  due_ += rate_ * static_cast<double>(multiply_adds);
  const auto whole = static_cast<int64_t>(due_);
  ask(whole);
  due_ -= static_cast<double>(whole);
}

}  // namespace heed::kernels
