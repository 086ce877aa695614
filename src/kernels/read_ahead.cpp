#include "kernels/read_ahead.h"

#include <algorithm>
#include <cassert>

#include "kernels/prefetch.h"

namespace heed::kernels {

namespace {
constexpr int64_t kLine = 64;  // bytes
constexpr int64_t kLinesAtOnce = 8;
}  // namespace

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

template <class Body>
void ReadAhead::for_lines(int64_t lines, const Body& body) {
  lines = std::min(lines, lines_);
  lines_ -= lines;
  while (lines > 0) {
    Lines& x = list_[static_cast<size_t>(at_)];
    const int64_t here = std::min(lines, (x.row_bytes - done_ + kLine - 1) / kLine);
    for (int64_t i = 0; i < here; ++i) body(x.data + done_ + i * kLine);
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

void ReadAhead::ask(int64_t lines) {
  for_lines(lines, [](const std::byte* line) { prefetch_far(line, 0); });
}

void ReadAhead::spread(int64_t multiply_adds) {
  if (lines_ == 0) return;
  wait_ = step_ = std::max<int64_t>(1, multiply_adds / ceil_div(lines_, kLinesAtOnce));
}

int64_t ReadAhead::count_due(int64_t most) {
  const int64_t times = std::min(1 - wait_ / step_, most / kLinesAtOnce);
  const int64_t lines = std::min(times * kLinesAtOnce, lines_);
  wait_ = lines == lines_ ? kNever : wait_ + times * step_;
  return lines;
}

void ReadAhead::ask_due() { ask(count_due(lines_ + kLinesAtOnce)); }

LinesDue ReadAhead::take_due() {
  const LinesDue due{due_.data(), count_due(static_cast<int64_t>(due_.size()))};
  auto next = due_.begin();
  for_lines(due.count, [&](const std::byte* line) { *next++ = line; });
  return due;
}

}  // namespace heed::kernels
