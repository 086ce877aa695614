#include "engine/tiled/tile_call.h"

#include "base/philox.h"

namespace heed::tiled {

namespace {

uint32_t drop_limit(double p) { return static_cast<uint32_t>(std::ldexp(p, 32)); }

std::array<uint32_t, 4> words(uint64_t seed, int64_t batch, int64_t head, int64_t row,
                              int64_t key_group) {
  return philox(seed, {static_cast<uint32_t>(key_group), static_cast<uint32_t>(row),
                       static_cast<uint32_t>(head), static_cast<uint32_t>(batch)});
}

template <class From>
double element(const kernels::Rows& rows, int64_t row, int64_t i) {
  const From x = static_cast<const From*>(rows.data)[rows.offset(row) + i];
  if constexpr (std::is_same_v<From, bfloat16> || std::is_same_v<From, float16>) {
    return to_float(x);
  } else {
    return x;
  }
}

double element(const kernels::Rows& rows, int64_t row, int64_t i) {
  switch (rows.dtype) {
    case DType::f64:
      return element<double>(rows, row, i);
    case DType::bf16:
      return element<bfloat16>(rows, row, i);
    case DType::f16:
      return element<float16>(rows, row, i);
    default:
      return element<float>(rows, row, i);
  }
}

}  // namespace

double dropout_factor(const Policy& policy, int64_t batch, int64_t head, int64_t row, int64_t key) {
  const auto four = words(policy.seed, batch, head, row, key / 4);
  return four[static_cast<size_t>(key % 4)] < drop_limit(policy.dropout) ? 0
                                                                         : 1 / (1 - policy.dropout);
}

template <class T>
void drop_out(const Policy& policy, int64_t batch, const TileAt& at, kernels::Block<T> block) {
  const uint32_t limit = drop_limit(policy.dropout);
  const T kept = static_cast<T>(1 / (1 - policy.dropout));
  for (int64_t r = 0; r < at.rows; ++r) {
    T* row = block.row(r);
    for (int64_t m = 0; m < at.keys;) {
      const int64_t key = at.key + m;
      const auto four = words(policy.seed, batch, at.head, at.row + r, key / 4);
      for (int64_t i = key % 4; i < 4 && m < at.keys; ++i, ++m) {
        row[m] = four[static_cast<size_t>(i)] < limit ? T{0} : row[m] * kept;
      }
    }
  }
}
template void drop_out(const Policy&, int64_t, const TileAt&, kernels::Block<float>);
template void drop_out(const Policy&, int64_t, const TileAt&, kernels::Block<double>);

FiniteRows finite_rows(const kernels::Rows& rows) {
  FiniteRows finite;
  Array wide(DType::f64, {rows.count, rows.width});
  for (int64_t r = 0; r < rows.count; ++r) {
    bool all = true;
    for (int64_t i = 0; i < rows.width; ++i) {
      const double x = element(rows, r, i);
      wide.as<double>()[r * rows.width + i] = std::isfinite(x) ? x : 0;
      all = all && std::isfinite(x);
    }
    if (!all) finite.rows.push_back(r);
  }
  finite.copy = convert(wide, rows.dtype);
  return finite;
}

template <class T>
void add_row(const kernels::Rows& rows, int64_t row, T factor, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows.width; ++i) {
    const T x = static_cast<T>(element(rows, row, i));
    if (!std::isfinite(x)) to[i * to_stride] += factor * x;
  }
}
template void add_row(const kernels::Rows&, int64_t, float, float*, int64_t);
template void add_row(const kernels::Rows&, int64_t, double, double*, int64_t);

}  // namespace heed::tiled
