// The tile unit as eight numbered registers of 16 rows x 64 bytes, in two versions with one interface:
// AMX itself (amx.cpp), and plain memory that does the same, so that the loops around it run on any machine.
#pragma once
#include <cstdint>
#include <cstring>

#include "heed/tensor.h"

namespace heed::kernels {

class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(tiles_[kTile][r], static_cast<const std::byte*>(from) + r * stride_bytes, 64);
    }
  }
  template <int kTile>
  void store(void* to, int64_t stride_bytes) {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(static_cast<std::byte*>(to) + r * stride_bytes, tiles_[kTile][r], 64);
    }
  }
  template <int kC, int kA, int kB>
  void multiply() {
    for (int i = 0; i < 16; ++i) {
      for (int pair = 0; pair < 16; ++pair) {
        for (int j = 0; j < 16; ++j) {
          float c = read<float>(kC, i, j, 4);
          c += half(kA, i, 2 * pair) * half(kB, pair, 2 * j);
          c += half(kA, i, 2 * pair + 1) * half(kB, pair, 2 * j + 1);
          std::memcpy(&tiles_[kC][i][j * 4], &c, 4);
        }
      }
    }
  }

 private:
  template <class T>
  T read(int tile, int row, int column, int size) const {
    T value;
    std::memcpy(&value, &tiles_[tile][row][column * size], sizeof(T));
    return value;
  }
  float half(int tile, int row, int column) const {
    return to_float(bfloat16{read<uint16_t>(tile, row, column, 2)});
  }
  std::byte tiles_[8][16][64];
};

}  // namespace heed::kernels
