// Asking for rows ahead of their use, while products of other rows are computed.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace heed::kernels {

struct Rows;

/// Cache lines for a product to ask for in its course: `count` of evenly spaced rows, line after line.
struct LinesDue {
  static constexpr int64_t kLine = 64;  // bytes
  const std::byte* row = nullptr;
  int64_t stride = 0, row_lines = 1;  // bytes from row to row; lines of each
  int64_t at = 0, count = 0;          // the first line, in `row`, and how many from there
  int64_t behind = 0;                 // as many more lie behind this one: for the product's end
};

/// Rows that are read later, asked for little by little in the course of products: asked for at once, they
/// would be waited for at once. They need not exist. Files compiled for more than the processor may have
/// call it: what is not inlined in all places must not be inline.
class ReadAhead {
 public:
  ReadAhead() = default;
  ReadAhead(std::initializer_list<Rows> list);
  void add(const Rows& rows);
  /// Cache lines not asked for so far.
  int64_t lines() const;
  void ask(int64_t lines);
  /// From now on what is left is due evenly in the course of so many multiply-adds.
  void spread(int64_t multiply_adds);
  /// Asks for what is due with these multiply-adds.
  __attribute__((always_inline)) void advance(int64_t multiply_adds) {
    wait_ -= multiply_adds;
    if (wait_ <= 0) ask_due();
  }
  /// Leaves them to the product instead: those of one group of rows, and once all are due those of the
  /// others behind them. Null if there are none. Valid until the next call.
  __attribute__((always_inline)) LinesDue* due(int64_t multiply_adds) {
    wait_ -= multiply_adds;
    return wait_ > 0 ? nullptr : take_due();
  }

 private:
  struct Lines {
    const std::byte* row = nullptr;  // the next, of which `done` lines are not left
    int64_t stride = 0, rows = 0, row_lines = 1, done = 0;
    const int64_t* offsets = nullptr;  // of the row behind it; null: evenly spaced
    int64_t element = 0;               // bytes
  };
  void ask_due();
  LinesDue* take_due();
  void take(int64_t most, LinesDue& due);
  std::array<Lines, 4> list_;
  int64_t count_ = 0, at_ = 0, lines_ = 0;
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  int64_t step_ = 0, wait_ = kNever;  // multiply-adds between two requests, until the next
  std::array<LinesDue, 4> due_;
};

}  // namespace heed::kernels
