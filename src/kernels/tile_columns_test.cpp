// Gradients of keys and values as columns: X^T W and its finish, against plain loops in double, on every
// instruction set this machine has and on the emulated tile unit.
#include <gtest/gtest.h>

#include "kernels/tile_test.h"

namespace heed::kernels {
namespace {

// X^T W with both operands as the kernels want them.
template <class T>
struct Columns {
  Columns(const TileKernels<T>& kernels, const Sizes& n, DType type,
          const std::vector<KeyRange>* ranges)
      : k(kernels),
        x(type, n.rows, n.width, n.width + 3, 1),
        weights(random_block<T>(n.rows, n.keys, ranges, false, 2)),
        paired(static_cast<size_t>((round_up(n.rows, k.row_multiple) / 2 + 1) * weights.stride)),
        packed(static_cast<size_t>(k.column_bytes(round_up(n.rows, k.row_multiple), n.width)) +
               64) {
    for (T& w : weights.memory) {
      if (std::isnan(w)) w = 0;
      if (k.half_operands) w = to_float(to_bfloat16(static_cast<float>(w)));
    }
  }
  void pack(bool negate) {
    k.pack_columns(x.rows(), negate, packed.data());
    // Rows that do not exist are never used, whatever they hold.
    std::fill(paired.begin(), paired.end(), 0xffffffffu);
  }
  void multiply(const Sizes& n, const std::vector<KeyRange>* ranges, Block<T> c) {
    const void* operand = weights.memory.data();
    if (k.pair_weights != nullptr) {
      k.pair_weights({weights.memory.data(), weights.stride}, n.rows, n.keys, paired.data(),
                     weights.stride);
      operand = paired.data();
    }
    k.accumulate_columns(packed.data(), n.rows, n.width, operand, weights.stride, n.keys,
                         data_of(ranges), c);
  }
  const TileKernels<T>& k;
  Matrix x;
  Buffer<T> weights;
  std::vector<uint32_t> paired;
  std::vector<std::byte> packed;
};

template <class T>
void check_columns(const TileKernels<T>& k, const Sizes& n, DType type,
                   const std::vector<KeyRange>* ranges) {
  Columns<T> columns(k, n, type, ranges);
  const int64_t padded = round_up(n.width, k.column_multiple), stride = round_up(n.keys, 64) + 16;
  const Matrix start(dtype_of<T>, padded, n.keys, stride, 5);
  const double unit = sizeof(T) == 8 ? 1e-14 : 1e-6;
  for (bool negate : {false, true}) {
    Array c = convert(start.storage, start.storage.dtype());
    columns.pack(negate);
    columns.multiply(n, ranges, {c.as<T>(), stride});
    for (int64_t f = 0; f < n.width; ++f) {
      for (int64_t m = 0; m < n.keys; ++m) {
        double want = start.at(f, m), magnitude = 1 + std::abs(want);
        for (int64_t r = 0; r < n.rows; ++r) {
          const double term = columns.x.at(r, f) * columns.weights.block().row(r)[m];
          want += negate ? -term : term;
          magnitude += std::abs(term);
        }
        ASSERT_NEAR(c.as<T>()[f * stride + m], want, unit * magnitude)
            << k.name << " column " << f << " key " << m << " of " << n.rows << "x" << n.keys << "x"
            << n.width;
      }
    }
  }
}

template <class T>
void check_all_columns(const TileKernels<T>& k) {
  for (const Sizes& n : kSizes) {
    const auto ranges = slanted_ranges(n.rows, n.keys);
    for (DType type : input_types(k)) {
      check_columns<T>(k, n, type, nullptr);
      check_columns<T>(k, n, type, &ranges);
    }
  }
}

TEST(TileColumns, EveryTable) {
  for_all_tables([](const auto& k) { check_all_columns(k); });
}

template <class T>
void check_finish_columns(const TileKernels<T>& k, DType type, int64_t keys, int64_t width) {
  const int64_t stride = round_up(keys, 64) + 16, out_stride = width + 3;
  const Matrix c(dtype_of<T>, round_up(width, k.column_multiple), keys, stride, 5);
  Array out = Array::zeros(type, {keys, out_stride});
  k.finish_columns({c.storage.as<T>(), stride}, keys, width, T(-0.5), out.view().data(), type,
                   out_stride, nullptr);
  Array want = Array::zeros(DType::f64, {keys, out_stride});
  for (int64_t m = 0; m < keys; ++m) {
    for (int64_t f = 0; f < width; ++f) want.as<double>()[m * out_stride + f] = -0.5 * c.at(f, m);
  }
  const Array got = convert(out, DType::f64);
  const Array exact = convert(convert(want, type), DType::f64);
  for (int64_t i = 0; i < got.count(); ++i) {
    ASSERT_EQ(got.as<double>()[i], exact.as<double>()[i])
        << k.name << " " << name_of(type) << " " << keys << "x" << width << " at " << i;
  }
}

template <class T>
void check_all_finish_columns(const TileKernels<T>& k) {
  const std::vector<DType> types = sizeof(T) == 8
                                       ? std::vector<DType>{DType::f64}
                                       : std::vector<DType>{DType::f32, DType::bf16, DType::f16};
  for (DType type : types) {
    for (int64_t keys : {1, 7, 64, 100}) {
      for (int64_t width : {1, 3, 16, 37, 64, 65, 200}) {
        check_finish_columns<T>(k, type, keys, width);
      }
    }
  }
}

template <class T>
void check_scattered_columns(const TileKernels<T>& k) {
  constexpr int64_t kKeys = 21, kWidth = 19;
  const Matrix c(dtype_of<T>, round_up(kWidth, k.column_multiple), kKeys, 80, 5);
  std::vector<int64_t> offsets;
  for (int64_t m = 0; m < kKeys; ++m) offsets.push_back((kKeys - 1 - m) * kWidth);
  offsets[3] = kNoRow;
  Array out = Array::zeros(dtype_of<T>, {kKeys, kWidth});
  k.finish_columns({c.storage.as<T>(), 80}, kKeys, kWidth, T{1}, out.view().data(), out.dtype(), 0,
                   offsets.data());
  for (int64_t m = 0; m < kKeys; ++m) {
    for (int64_t f = 0; f < kWidth; ++f) {
      ASSERT_EQ(out.as<T>()[(kKeys - 1 - m) * kWidth + f], m == 3 ? 0 : static_cast<T>(c.at(f, m)))
          << k.name;
    }
  }
}

TEST(TileColumns, FinishWritesScatteredRows) {
  for_all_tables([](const auto& k) { check_scattered_columns(k); });
}

TEST(TileColumns, FinishTurnsScalesAndRounds) {
  for_all_tables([](const auto& k) { check_all_finish_columns(k); });
}

}  // namespace
}  // namespace heed::kernels
