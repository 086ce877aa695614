#include "kernels/read_ahead.h"

#include <algorithm>
#include <cassert>

#include "kernels/prefetch.h"

namespace heed::kernels {

namespace {
constexpr int64_t kLinesAtOnce = 8;
}  // namespace

ReadAhead::ReadAhead(std::initializer_list<Rows> list) {
  for (const Rows& rows : list) add(rows);
}

void ReadAhead::add(const Rows& rows) {
  if (rows.data == nullptr || rows.count <= 0 || rows.width <= 0) return;
  const auto element = static_cast<int64_t>(size_of(rows.dtype));
  const bool together = rows.offsets == nullptr && rows.stride == rows.width;
  const int64_t row_bytes = rows.width * element * (together ? rows.count : 1);
  const Lines lines{row_at(rows, 0),
                    rows.stride * element,
                    together ? 1 : rows.count,
                    ceil_div(row_bytes, LinesDue::kLine),
                    0,
                    rows.offsets == nullptr ? nullptr : rows.offsets + 1,
                    element};
  assert(count_ < static_cast<int64_t>(list_.size()));
  lines_ += lines.rows * lines.row_lines;
  list_[static_cast<size_t>(count_++)] = lines;
}

int64_t ReadAhead::lines() const { return lines_; }

// The next lines of evenly spaced rows. There must be some.
void ReadAhead::take(int64_t most, LinesDue& due) {
  Lines& x = list_[static_cast<size_t>(at_)];
  const int64_t even = (x.offsets == nullptr ? x.rows : 1) * x.row_lines;
  const int64_t count = std::min(most, even - x.done);
  // Member by member: the vectors of a copy would wait for the single numbers that were just stored.
  due.row = x.row;
  due.stride = x.stride;
  due.row_lines = x.row_lines;
  due.at = x.done;
  due.count = count;
  due.behind = 0;
  lines_ -= count;
  x.done += count;
  if (x.done < x.row_lines) return;
  const int64_t rows = x.done / x.row_lines;
  x.done -= rows * x.row_lines;
  x.rows -= rows;
  if (x.rows == 0) {
    ++at_;
  } else if (x.offsets == nullptr) {
    x.row += rows * x.stride;
  } else {
    x.row += (x.offsets[0] - x.offsets[-1]) * x.element;
    ++x.offsets;
  }
}

void ReadAhead::ask(int64_t lines) {
  const int64_t rest = lines_ - std::min(lines, lines_);
  while (lines_ > rest) {
    take(lines_ - rest, due_[0]);
    prefetch_rest(due_.data());
  }
}

void ReadAhead::spread(int64_t multiply_adds) {
  if (lines_ == 0) return;
  wait_ = step_ = std::max<int64_t>(1, multiply_adds / ceil_div(lines_, kLinesAtOnce));
}

void ReadAhead::ask_due() {
  while (wait_ <= 0) prefetch_rest(take_due());
}

LinesDue* ReadAhead::take_due() {
  const int64_t most = (1 - wait_ / step_) * kLinesAtOnce;
  LinesDue* due = due_.data();
  take(most, *due);
  int64_t taken = due->count;
  while (lines_ > 0 && lines_ <= most - taken && due + due->behind != &due_.back()) {
    LinesDue& next = due[++due->behind];
    take(lines_, next);
    taken += next.count;
  }
  wait_ = lines_ == 0 ? kNever : wait_ + taken * step_ / kLinesAtOnce;
  return due;
}

}  // namespace heed::kernels
