// Asking for rows ahead of their use, while products of other rows are computed.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace heed::kernels {

struct Rows;

/// Rows that are read later, asked for little by little between products: asked for at once, they would
/// be waited for at once. They need not exist. Nothing is inline: files compiled for more than the
/// processor may have call it.
class ReadAhead {
 public:
  ReadAhead() = default;
  ReadAhead(std::initializer_list<Rows> list);
  void add(const Rows& rows);
  /// Cache lines not asked for so far.
  int64_t lines() const;
  void ask(int64_t lines);
  /// From now on `advance` asks for what is left, evenly in the course of so many multiply-adds.
  void spread(int64_t multiply_adds);
  void advance(int64_t multiply_adds);

 private:
  struct Lines {
    const std::byte* data = nullptr;
    int64_t stride = 0, rows = 0, row_bytes = 0;  // bytes from row to row, rows left
    const int64_t* offsets = nullptr;             // of the next row; null: evenly spaced
    int64_t element = 0;                          // bytes
  };
  std::array<Lines, 4> list_;
  int64_t count_ = 0, at_ = 0, done_ = 0, lines_ = 0;  // done_: bytes of the row at hand
  double rate_ = 0, due_ = 0;                          // lines per multiply-add, lines
};

}  // namespace heed::kernels
