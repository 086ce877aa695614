#include "engine/tiled/tile_call.h"

#include "base/philox.h"

namespace heed::tiled {

namespace {

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
  const std::array<uint32_t, 4> words =
      philox(policy.seed, {static_cast<uint32_t>(key / 4), static_cast<uint32_t>(row),
                           static_cast<uint32_t>(head), static_cast<uint32_t>(batch)});
  const bool dropped = words[static_cast<size_t>(key % 4)] < drop_limit(policy.dropout);
  return dropped ? 0 : 1 / (1 - policy.dropout);
}

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
