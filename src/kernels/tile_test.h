// What the tests of the tile kernels share: random operands with their exact values, the tables of this
// machine, ranges of keys.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/amx_products.h"
#include "kernels/parts.h"
#include "kernels/tile.h"

namespace heed::kernels {

// A tile unit in plain memory, with the interface of HardwareTiles (amx.cpp), so that the loops around it run
// on any machine.
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

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

// Rows of random numbers of any type at a stride, with their exact values.
struct Matrix {
  Matrix(DType type, int64_t rows, int64_t columns, int64_t row_stride, uint32_t seed)
      : storage(type, {std::max<int64_t>(rows, 1), row_stride}),
        stride(row_stride),
        width(columns) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    Array wide(DType::f64, storage.shape());
    for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = normal(generator);
    copy(wide, storage);
    copy(storage, wide);
    exact.assign(wide.as<double>(), wide.as<double>() + wide.count());
    count = rows;
  }
  Rows rows() const { return {storage.view().data(), storage.dtype(), stride, count, width}; }
  double at(int64_t r, int64_t c) const { return exact[static_cast<size_t>(r * stride + c)]; }

  Array storage;
  int64_t stride, width, count = 0;
  std::vector<double> exact;
};

template <class T>
struct Buffer {
  Buffer(int64_t rows, int64_t stride_elements, T fill = T{})
      : memory(static_cast<size_t>(rows * stride_elements), fill), stride(stride_elements) {}
  Block<T> block() { return {memory.data(), stride}; }
  std::vector<T> memory;
  int64_t stride;
};

struct Sizes {
  int64_t rows, keys, width, value_width;
};
inline const Sizes kSizes[] = {{1, 1, 1, 1},      {5, 7, 3, 2},      {24, 64, 64, 64},
                               {23, 63, 65, 33},  {48, 129, 80, 80}, {7, 200, 31, 100},
                               {32, 96, 17, 128}, {13, 40, 256, 255}};

template <class T>
std::vector<const TileKernels<T>*> tables() {
  std::vector<const TileKernels<T>*> all;
  for (Isa isa : available_isas()) {
    if (isa != Isa::amx) all.push_back(&tile_kernels<T>(isa));
    if constexpr (sizeof(T) == 4) {
      if (const auto* half = half_tile_kernels(isa)) all.push_back(half);
    }
  }
  return all;
}

// bfloat16 packing and weights with products on the emulated tile unit.
inline TileKernels<float> emulated_tile_table() {
  TileKernels<float> table = tile_kernels<float>(Isa::portable);
  table.name = "emulated tiles";
  add_half_pack_parts(Isa::portable, table);
  add_tile_value_parts(Isa::portable, table);
  add_half_weight_parts(Isa::portable, table);
  add_half_dropout_parts(Isa::portable, table);
  use_tile_unit<EmulatedTiles>(table);
  return table;
}

// The same with the weights that go with a tile unit, where the processor can run them.
inline std::vector<TileKernels<float>> emulated_tile_tables() {
  std::vector<TileKernels<float>> all = {emulated_tile_table()};
  if (cpu_info().has("avx512_bf16")) {
    all.push_back(emulated_tile_table());
    all.back().name = "emulated tiles, AVX512-BF16";
    add_avx512_half_softmax(all.back());
    add_avx512_half_sigmoid(all.back());
  }
  return all;
}

template <class Check>
void for_all_tables(Check&& check) {
  for (const auto* k : tables<float>()) check(*k);
  for (const auto* k : tables<double>()) check(*k);
  for (const auto& k : emulated_tile_tables()) check(k);
}

inline std::vector<KeyRange> slanted_ranges(int64_t rows, int64_t keys) {
  std::vector<KeyRange> ranges;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = std::min(keys, r / 2), end = std::min(keys, 3 + 2 * r);
    ranges.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    if (r % 7 == 5) ranges.back() = {0, 0};
  }
  return ranges;
}

inline bool sees(const std::vector<KeyRange>* ranges, int64_t r, int64_t m) {
  if (ranges == nullptr) return true;
  const KeyRange range = (*ranges)[static_cast<size_t>(r)];
  return m >= range.begin && m < range.end;
}

template <class T>
std::vector<DType> input_types(const TileKernels<T>& k) {
  if (sizeof(T) == 8) return {DType::f64};
  if (k.half_operands) return {DType::bf16};
  return {DType::f32, DType::bf16, DType::f16};
}

// Weights as the second product reads them.
template <class T>
double weight_at(const TileKernels<T>& k, const std::vector<std::byte>& weights, int64_t stride,
                 int64_t r, int64_t m) {
  if (k.half_operands) {
    bfloat16 x;
    std::memcpy(&x, weights.data() + (r * stride + m) * 2, 2);
    return to_float(x);
  }
  T x;
  std::memcpy(&x, weights.data() + (r * stride + m) * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return x;
}

// Scores that tests set to -inf.
inline bool is_masked(int64_t r, int64_t m) { return r == 3 || (31 * r + 7 * m) % 5 == 2; }

// A block of random numbers, some of them -inf, junk where no row sees a key.
template <class T>
Buffer<T> random_block(int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges, bool masked,
                       uint32_t seed) {
  const int64_t stride = round_up(keys, 64) + 16;
  const Matrix x(dtype_of<T>, rows, keys, stride, seed);
  Buffer<T> block(rows, stride, static_cast<T>(kNaN));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < keys; ++m) {
      if (!sees(ranges, r, m)) continue;
      block.block().row(r)[m] = static_cast<T>(masked && is_masked(r, m) ? -kInf : x.at(r, m));
    }
  }
  return block;
}

template <class T>
std::vector<T> random_row(int64_t n, uint32_t seed) {
  const Matrix x(dtype_of<T>, 1, n, n, seed);
  return {x.exact.begin(), x.exact.end()};
}

inline const std::vector<KeyRange>* const kNoRanges = nullptr;

template <class Body>
void for_row_cases(Body&& body) {
  for (int64_t rows : {1, 7, 30}) {
    for (int64_t keys : {1, 5, 16, 31, 64, 200}) {
      const auto ranges = slanted_ranges(rows, keys);
      for (const auto* range : {kNoRanges, &ranges}) body(rows, keys, range);
    }
  }
}

inline const KeyRange* data_of(const std::vector<KeyRange>* ranges) {
  return ranges == nullptr ? nullptr : ranges->data();
}

// The shaped score t of row r and key m; -inf stays -inf.
template <class T>
double shaped(const WeightShape<T>& shape, const T* s, int64_t r, int64_t m) {
  if (s[m] == static_cast<T>(-kInf)) return -kInf;
  return double{s[m]} * shape.scale + shape.bias -
         shape.slope * std::abs(static_cast<double>(shape.distance + r - m));
}

inline double taylor(double t, int order) {
  double sum = 1, term = 1;
  for (int n = 1; n <= order; ++n) sum += term *= t / n;
  return sum;
}

inline double weight_of(WeightKind kind, int order, double t, double pivot) {
  return kind == WeightKind::softmax   ? std::exp2(t - pivot)
         : kind == WeightKind::sigmoid ? 1 / (1 + std::exp2(-t))
                                       : taylor(t, order);
}

// What the rounding error of a weight is relative to: the exponent is rounded where scores, bias,
// distances and pivot meet, terms of a polynomial may cancel.
template <class T>
double weight_magnitude(WeightKind kind, const WeightShape<T>& shape, const T* s, int64_t r,
                        int64_t m, double weight, double pivot) {
  const double t = std::abs(shaped(shape, s, r, m));
  const double terms = t + 2 * std::abs(double{shape.bias}) +
                       2 * shape.slope * std::abs(double(shape.distance + r - m));
  if (kind == WeightKind::polynomial) return 4 * taylor(terms, shape.order) * (1 + terms);
  return weight * (4 + terms + (kind == WeightKind::softmax ? std::abs(pivot) : 0));
}

}  // namespace heed::kernels
