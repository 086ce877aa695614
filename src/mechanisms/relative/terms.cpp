#include "mechanisms/relative/terms.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "engine/tiled/tile_call.h"

namespace heed {

using kernels::KeyRange;
using kernels::Rows;
using tiled::TileAt;

namespace {

constexpr int64_t kPanel = 64;      // columns that products may write at once
constexpr int64_t kDotRows = 8;     // up to this many query rows the table is read in place
constexpr int64_t kChunkRows = 64;  // rows widened at once

template <class T>
const kernels::TileKernels<T>& product_kernels(const RelativeInputs& inputs, Isa isa) {
  const bool operands = inputs.q.dtype() == DType::bf16 && inputs.rel_key.dtype() == DType::bf16;
  return kernels::tile_kernels<T>(isa, operands && kernels::half_tile_kernels(isa) != nullptr);
}

/// Calls body(begin, end, widened rows, their stride) for chunks of rows [begin, end) of a matrix.
template <class T, class Body>
void for_each_chunk(const kernels::TileKernels<T>& wide, const Tensor& matrix, Body&& body) {
  const int64_t stride = round_up(matrix.size(1), wide.dim_multiple);
  Scratch scratch(static_cast<size_t>(round_up(kChunkRows, wide.row_multiple) * stride) *
                  sizeof(T));
  T* rows = scratch.take<T>(round_up(kChunkRows, wide.row_multiple) * stride);
  for (int64_t begin = 0; begin < matrix.size(0); begin += kChunkRows) {
    const int64_t end = std::min(begin + kChunkRows, matrix.size(0));
    wide.pack_queries(
        {matrix.at({begin}), matrix.dtype(), matrix.stride(0), end - begin, matrix.size(1)}, false,
        rows);
    body(begin, end, rows, stride);
  }
}

}  // namespace

template <class T>
RelativeTerms<T>::RelativeTerms(const RelativeInputs& inputs, const RunOptions& run)
    : inputs_(inputs),
      run_(run),
      wide_(kernels::tile_kernels<T>(chosen_isa(run))),
      products_(product_kernels<T>(inputs, chosen_isa(run))),
      skew_(kernels::skew_kernels<T>(chosen_isa(run))),
      heads_(inputs.q.size(1)),
      head_dim_(inputs.q.size(3)),
      table_(inputs.rel_key) {
  if (table_.size(2) > 1 && table_.stride(2) != 1) {
    table_copy_ = convert(table_, table_.dtype());
    table_ = table_copy_;
  }
  bias_ = Array(dtype_of<T>, {heads_, table_.size(0)});
  content_ = Array(dtype_of<T>, {inputs_.k.size(0), heads_, inputs_.k.size(2)});
  if (heads_ == 0) return;
  set_bias();
  set_content();
}

template <class T>
void RelativeTerms<T>::set_bias() {
  Array copy;
  Tensor bias = inputs_.rel_bias;
  if (bias.size(1) > 1 && bias.stride(1) != 1) {
    copy = convert(bias, bias.dtype());
    bias = copy;
  }
  const int64_t rows = bias.size(0);
  const T scale = static_cast<T>(inputs_.scale);
  for_each_chunk<T>(wide_, bias, [&](int64_t begin, int64_t end, const T* from, int64_t stride) {
    for (int64_t h = 0; h < heads_; ++h) {
      T* to = bias_.as<T>() + h * rows;
      for (int64_t n = begin; n < end; ++n) to[n] = scale * from[(n - begin) * stride + h];
    }
  });
}

template <class T>
void RelativeTerms<T>::set_content() {
  const int64_t keys = inputs_.k.size(2), kv_heads = inputs_.k.size(1), group = heads_ / kv_heads;
  const int64_t stride = round_up(head_dim_, wide_.dim_multiple);
  const Array u = convert(inputs_.content_bias, dtype_of<T>);
  const int64_t items = keys == 0 ? 0 : inputs_.k.size(0) * kv_heads;
  parallel_for(items, threads_for(run_, items), [&](int64_t i, int) {
    Scratch scratch(static_cast<size_t>(group * stride) * sizeof(T));
    const Block rows{scratch.take<T>(group * stride), stride};
    std::fill_n(rows.data, group * stride, T{0});
    for (int64_t g = 0; g < group; ++g) {
      std::copy_n(u.as<T>() + (i % kv_heads * group + g) * head_dim_, head_dim_, rows.row(g));
    }
    T* to = content_.as<T>() + i * group * keys;
    wide_.dot_rows({rows.data, stride}, group,
                   tiled::rows_of(inputs_.k.select(0, i / kv_heads), i % kv_heads, 0, keys),
                   {to, keys});
    for (int64_t m = 0; m < group * keys; ++m) to[m] *= static_cast<T>(inputs_.scale);
  });
}

template <class T>
typename RelativeTerms<T>::Window RelativeTerms<T>::window_of(const TileAt& at) const {
  const int64_t centre = inputs_.centre(), rows = inputs_.causal ? centre + 1 : 2 * centre;
  const int64_t first = centre + at.key - (at.row + inputs_.offset());  // of row 0 and key 0
  Window window;
  window.begin = std::max<int64_t>(0, first - (at.rows - 1));
  window.skew.first = first - window.begin;
  window.skew.columns = std::max<int64_t>(0, std::min(rows, first + at.keys) - window.begin);
  window.stride = round_up(window.skew.columns, kPanel) + kPanel + 16;
  return window;
}

template <class T>
Rows RelativeTerms<T>::query_rows(const TileAt& at) const {
  return tiled::rows_of(inputs_.q.select(0, at.sequence), at.head, at.row, at.row + at.rows);
}

template <class T>
Rows RelativeTerms<T>::table_rows(const TileAt& at, const Window& window) const {
  return {table_.at({window.begin, at.head}), table_.dtype(), table_.stride(0), window.skew.columns,
          head_dim_};
}

template <class T>
void RelativeTerms<T>::set_ranges(const TileAt& at, const Window& window, KeyRange* ranges) const {
  for (int64_t r = 0; r < at.rows; ++r) {
    const auto inside = [&](int64_t column) {
      return static_cast<int32_t>(std::clamp<int64_t>(column, 0, window.skew.columns));
    };
    const int64_t first = window.skew.first - r;
    ranges[r] = {inside(first), inside(first + at.keys)};
  }
}

template <class T>
void RelativeTerms<T>::add_terms(const TileAt& at, Block s) const {
  const Window window = window_of(at);
  const int64_t rows = round_up(at.rows, products_.row_multiple), columns = window.skew.columns;
  if (columns == 0) return;
  const bool in_place = at.rows <= kDotRows;
  const int64_t q_bytes = products_.query_bytes(rows, head_dim_);
  const int64_t key_bytes = in_place ? 0 : products_.key_bytes(columns, head_dim_);
  Scratch scratch(static_cast<size_t>(rows * window.stride) * sizeof(T) +
                  static_cast<size_t>(q_bytes + key_bytes) +
                  static_cast<size_t>(rows) * sizeof(KeyRange) + 4 * 64);
  const Block products{scratch.take<T>(rows * window.stride), window.stride};
  if (in_place) {
    dot_rows(at, window, products);
  } else {
    auto* queries = scratch.take<std::byte>(q_bytes);
    auto* keys = scratch.take<std::byte>(key_bytes);
    auto* ranges = scratch.take<KeyRange>(rows);
    std::memset(queries, 0, static_cast<size_t>(q_bytes));
    products_.pack_queries(query_rows(at), false, queries);
    products_.pack_keys(table_rows(at, window), keys);
    set_ranges(at, window, ranges);
    products_.scores(queries, at.rows, keys, columns, head_dim_, ranges, products, nullptr);
  }
  skew_.add(s, at.rows, at.keys, window.skew, {products.data, products.stride},
            static_cast<T>(inputs_.scale), bias_.as<T>() + at.head * table_.size(0) + window.begin,
            content(at.sequence, at.head) + at.key);
}

template <class T>
void RelativeTerms<T>::dot_rows(const TileAt& at, const Window& window, Block products) const {
  const int64_t stride = round_up(head_dim_, wide_.dim_multiple);
  const int64_t count = round_up(at.rows, wide_.row_multiple) * stride;
  Scratch scratch(static_cast<size_t>(count) * sizeof(T));
  T* queries = scratch.take<T>(count);
  wide_.pack_queries(query_rows(at), false, queries);
  wide_.dot_rows({queries, stride}, at.rows, table_rows(at, window), products);
}

template <class T>
void RelativeTerms<T>::shape(const TileAt& at, kernels::Block<float> s) const {
  if constexpr (sizeof(T) == 4) add_terms(at, s);
}
template <class T>
void RelativeTerms<T>::shape(const TileAt& at, kernels::Block<double> s) const {
  if constexpr (sizeof(T) == 8) add_terms(at, s);
}

template <class T>
void RelativeTerms<T>::begin_gradient(int lanes) {
  const int64_t centre = inputs_.centre(), queries = inputs_.q.size(2), keys = inputs_.k.size(2);
  band_begin_ = std::max<int64_t>(0, centre - (keys - 1));
  const int64_t end = inputs_.causal ? centre + 1 : centre + queries;
  band_ = round_up(std::min(end, 2 * centre) - band_begin_, kPanel) + 2 * kPanel;
  sums_ = std::vector<HeadSums>(static_cast<size_t>(lanes * heads_));
  key_sums_.assign(static_cast<size_t>(content_.count()), 0);
  finite_queries_ = true;
  const int64_t bytes = wide_.value_bytes(kChunkRows, head_dim_);
  Scratch scratch(static_cast<size_t>(bytes));
  auto* packed = scratch.take<std::byte>(bytes);
  for (int64_t i = 0; i < inputs_.q.size(0) * heads_; ++i) {
    const Tensor q = inputs_.q.select(0, i / heads_);
    for (int64_t row = 0; row < queries; row += kChunkRows) {
      const Rows rows = tiled::rows_of(q, i % heads_, row, std::min(row + kChunkRows, queries));
      finite_queries_ = wide_.pack_values(rows, packed) && finite_queries_;
    }
  }
}

template <class T>
typename RelativeTerms<T>::HeadSums& RelativeTerms<T>::sums_of(int lane, int64_t head) const {
  HeadSums& sums = sums_[static_cast<size_t>(lane * heads_ + head)];
  if (sums.bias.empty()) {
    const int64_t depth =
        round_up(head_dim_, std::max(products_.column_multiple, wide_.column_multiple));
    sums.table = Array::zeros(dtype_of<T>, {depth, band_});
    sums.bias.assign(static_cast<size_t>(band_), 0);
  }
  return sums;
}

template <class T>
void RelativeTerms<T>::add_tile(int lane, const TileAt& at, kernels::Block<const T> ds,
                                Block dq) const {
  const Window window = window_of(at);
  const int64_t rows = round_up(at.rows, products_.row_multiple), columns = window.skew.columns;
  const int64_t padded = round_up(columns, kPanel), keys = round_up(at.keys, kPanel);
  if (columns == 0) return;
  Scratch scratch(static_cast<size_t>(rows * window.stride + padded + keys) * sizeof(T) +
                  static_cast<size_t>(rows) * sizeof(KeyRange) + 4 * 64);
  const Block skewed{scratch.take<T>(rows * window.stride), window.stride};
  T* column_sums = scratch.take<T>(padded);
  T* key_sums = scratch.take<T>(keys);
  auto* ranges = scratch.take<KeyRange>(rows);
  std::fill_n(column_sums, padded, T{0});
  std::fill_n(key_sums, keys, T{0});
  set_ranges(at, window, ranges);
  skew_.gather(ds, at.rows, at.keys, window.skew, padded, skewed, column_sums, key_sums);
  HeadSums& sums = sums_of(lane, at.head);
  double* bias = sums.bias.data() + window.begin - band_begin_;
  for (int64_t c = 0; c < columns; ++c) bias[c] += static_cast<double>(column_sums[c]);
  // Only this lane visits these keys of this head.
  double* of_keys =
      key_sums_.data() + (at.sequence * heads_ + at.head) * inputs_.k.size(2) + at.key;
  for (int64_t m = 0; m < at.keys; ++m) of_keys[m] += static_cast<double>(key_sums[m]);
  add_to_queries(at, window, skewed, ranges, dq);
  add_to_table(sums.table, at, window, skewed, ranges);
}

// dq[r] += sum over columns of the skewed dS and the rows of the table.
template <class T>
void RelativeTerms<T>::add_to_queries(const TileAt& at, const Window& window, Block skewed,
                                      const KeyRange* ranges, Block dq) const {
  const int64_t rows = round_up(at.rows, products_.row_multiple), columns = window.skew.columns;
  const int64_t stride = round_up(head_dim_, products_.dim_multiple);
  const int64_t value_bytes = products_.value_bytes(columns, head_dim_);
  const int64_t weight_bytes = products_.half_operands ? rows * window.stride * 2 : 0;
  Scratch scratch(static_cast<size_t>(rows * stride) * sizeof(T) +
                  static_cast<size_t>(value_bytes + weight_bytes) + 3 * 64);
  // The engine's rows are padded for its own products, which may be others.
  const Block sum{scratch.take<T>(rows * stride), stride};
  std::fill_n(sum.data, rows * stride, T{0});
  auto* values = scratch.take<std::byte>(value_bytes);
  const Rows table = table_rows(at, window);
  // A row that sees a table row with NaN has NaN in dS; all others must not meet it.
  if (!products_.pack_values(table, values)) {
    products_.pack_values(tiled::finite_rows(table).view(), values);
  }
  const void* weights = skewed.data;
  if (products_.half_operands) {
    auto* rounded = scratch.take<std::byte>(weight_bytes);
    products_.round_weights({skewed.data, skewed.stride}, at.rows, columns, rounded, skewed.stride);
    weights = rounded;
  }
  products_.accumulate(weights, skewed.stride, at.rows, values, columns, head_dim_, ranges, nullptr,
                       sum, nullptr);
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t e = 0; e < head_dim_; ++e) dq.row(r)[e] += sum.row(r)[e];
  }
}

// table[e][column] += sum over rows of q and the skewed dS.
template <class T>
void RelativeTerms<T>::add_to_table(const Array& sums, const TileAt& at, const Window& window,
                                    Block skewed, const KeyRange* ranges) const {
  const int64_t column_bytes =
      products_.column_bytes(round_up(at.rows, products_.row_multiple), head_dim_);
  const int64_t pair_bytes = products_.half_operands ? (at.rows + 1) / 2 * skewed.stride * 4 : 0;
  Scratch scratch(static_cast<size_t>(column_bytes + pair_bytes) + 2 * 64);
  auto* columns = scratch.take<std::byte>(column_bytes);
  const Rows q = query_rows(at);
  if (finite_queries_) {
    products_.pack_columns(q, false, columns);
  } else {  // rows with NaN have it in dS too
    products_.pack_columns(tiled::finite_rows(q).view(), false, columns);
  }
  const void* weights = skewed.data;
  if (products_.half_operands) {
    auto* pairs = scratch.take<std::byte>(pair_bytes);
    products_.pair_weights({skewed.data, skewed.stride}, at.rows, window.skew.columns, pairs,
                           skewed.stride);
    weights = pairs;
  }
  products_.accumulate_columns(columns, at.rows, head_dim_, weights, skewed.stride,
                               window.skew.columns, ranges,
                               {sums.as<T>() + window.begin - band_begin_, band_});
}

template <class T>
void RelativeTerms<T>::add_gradient(int lane, const TileAt& at, kernels::Block<const float> ds,
                                    kernels::Block<float> dq) const {
  if constexpr (sizeof(T) == 4) add_tile(lane, at, ds, dq);
}
template <class T>
void RelativeTerms<T>::add_gradient(int lane, const TileAt& at, kernels::Block<const double> ds,
                                    kernels::Block<double> dq) const {
  if constexpr (sizeof(T) == 8) add_tile(lane, at, ds, dq);
}

template <class T>
Array RelativeTerms<T>::rel_key_gradient() const {
  Array total = Array::zeros(inputs_.rel_key.dtype(), table_.shape());
  const int64_t rows = std::min(band_, table_.size(0) - band_begin_);
  parallel_for(heads_, threads_for(run_, heads_), [&](int64_t head, int) {
    const HeadSums* first = nullptr;
    for (size_t i = static_cast<size_t>(head); i < sums_.size(); i += static_cast<size_t>(heads_)) {
      if (sums_[i].bias.empty()) continue;
      if (first == nullptr) {
        first = &sums_[i];
        continue;
      }
      T* to = first->table.template as<T>();
      const T* from = sums_[i].table.template as<T>();
      for (int64_t x = 0; x < first->table.count(); ++x) to[x] += from[x];
    }
    if (first == nullptr) return;
    wide_.finish_columns({first->table.template as<T>(), band_}, rows, head_dim_,
                         static_cast<T>(inputs_.scale), total.view().at({band_begin_, head}),
                         total.dtype(), total.view().stride(0), nullptr);
  });
  return total;
}

template <class T>
Array RelativeTerms<T>::rel_bias_gradient() const {
  Array total = Array::zeros(DType::f64, inputs_.rel_bias.shape());
  const int64_t rows = std::min(band_, table_.size(0) - band_begin_);
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (sums_[i].bias.empty()) continue;
    double* to = total.as<double>() + band_begin_ * heads_ + static_cast<int64_t>(i) % heads_;
    for (int64_t n = 0; n < rows; ++n) {
      to[n * heads_] += inputs_.scale * sums_[i].bias[static_cast<size_t>(n)];
    }
  }
  return convert(total, inputs_.rel_bias.dtype());
}

// With s[m] = scale * the sum of dS over rows: d content_bias = sum over keys of s k, dk += s content_bias.
template <class T>
Array RelativeTerms<T>::content_bias_gradient(const Tensor& dk) const {
  const int64_t batch = inputs_.k.size(0), kv_heads = inputs_.k.size(1), keys = inputs_.k.size(2);
  const int64_t group = kv_heads == 0 ? 1 : heads_ / kv_heads;
  const Array u = convert(inputs_.content_bias, DType::f64);
  Array parts = Array::zeros(DType::f64, {batch, heads_, head_dim_});
  parallel_for(batch * kv_heads, threads_for(run_, batch * kv_heads), [&](int64_t i, int) {
    const Tensor k = inputs_.k.select(0, i / kv_heads).select(0, i % kv_heads);
    for_each_chunk<T>(wide_, k, [&](int64_t begin, int64_t end, const T* rows, int64_t stride) {
      for (int64_t h = i * group; h < (i + 1) * group; ++h) {  // heads of all sequences
        double* du = parts.as<double>() + h * head_dim_;
        const double* bias = u.as<double>() + h % heads_ * head_dim_;
        for (int64_t m = begin; m < end; ++m) {
          const double sum = inputs_.scale * key_sums_[static_cast<size_t>(h * keys + m)];
          if (sum == 0) continue;  // a key that nobody sees may be NaN
          const T* row = rows + (m - begin) * stride;
          T* to = dk.as<T>() + (i * keys + m) * head_dim_;
          for (int64_t e = 0; e < head_dim_; ++e) {
            du[e] += sum * static_cast<double>(row[e]);
            to[e] += static_cast<T>(sum * bias[e]);
          }
        }
      }
    });
  });
  Array total = Array::zeros(DType::f64, inputs_.content_bias.shape());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < total.count(); ++i) {
      total.as<double>()[i] += parts.as<double>()[b * total.count() + i];
    }
  }
  return convert(total, inputs_.content_bias.dtype());
}

template class RelativeTerms<float>;
template class RelativeTerms<double>;

}  // namespace heed
