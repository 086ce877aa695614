// Asking for rows ahead of their use, while products of other rows are computed.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace heed::kernels {

struct Rows;

/// Cache lines for a product to ask for in its course.
struct LinesDue {
  const std::byte* const* lines = nullptr;
  int64_t count = 0;
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
  /// Leaves them to the product instead, 64 at most: the others come with the next one. The lines stay
  /// known until the next call.
  __attribute__((always_inline)) LinesDue due(int64_t multiply_adds) {
    wait_ -= multiply_adds;
    if (wait_ > 0) return {};
    return take_due();
  }

 private:
  void ask_due();
  LinesDue take_due();
  int64_t count_due(int64_t most);
  template <class Body>
  void for_lines(int64_t lines, const Body& body);
  struct Lines {
    const std::byte* data = nullptr;
    int64_t stride = 0, rows = 0, row_bytes = 0;  // bytes from row to row, rows left
    const int64_t* offsets = nullptr;             // of the next row; null: evenly spaced
    int64_t element = 0;                          // bytes
  };
  std::array<Lines, 4> list_;
  int64_t count_ = 0, at_ = 0, done_ = 0, lines_ = 0;  // done_: bytes of the row at hand
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  int64_t step_ = 0, wait_ = kNever;  // multiply-adds between two requests, until the next
  std::array<const std::byte*, 64> due_{};
};

}  // namespace heed::kernels
