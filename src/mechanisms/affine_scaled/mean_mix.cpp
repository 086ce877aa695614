#include "mechanisms/affine_scaled/mean_mix.h"

#include <algorithm>

#include "kernels/matrix.h"
#include "mechanisms/parameter.h"

namespace heed::affine_scaled {

template <class T>
MeanMix<T>::MeanMix(const Inputs& in)
    : in_(in),
      heads_(in.q.size(1)),
      kv_heads_(in.k.size(1)),
      group_(kv_heads_ == 0 ? 0 : heads_ / kv_heads_),
      queries_(in.q.size(2)),
      keys_(in.k.size(2)),
      width_(in.v.size(3)),
      padded_(round_up(width_, 16)),
      alpha_stride_(round_up(queries_, 16)),
      maps_(kernels::row_map_kernels<T>(chosen_isa(in.run))),
      alpha_(kType, {in.q.size(0) * heads_, alpha_stride_}) {
  const auto& matrix = kernels::matrix_kernels<T>(chosen_isa(in.run));
  Array held;
  const Tensor alpha = with_unit_stride(in.alpha, held);
  for (int64_t b = 0; b < in.q.size(0); ++b) {
    matrix.load_rows({alpha.at({b}), alpha.dtype(), alpha.stride(1), heads_, queries_},
                     {alpha_.as<T>() + b * heads_ * alpha_stride_, alpha_stride_});
  }
  const Array mean = convert(in.alpha_mean, DType::f64);
  alpha_mean_.assign(mean.as<double>(), mean.as<double>() + heads_);
}

template <class T>
template <class Body>
void MeanMix<T>::for_items(int64_t length, const Body& body) const {
  const int64_t per_head = (length + kItemRows - 1) / kItemRows;
  const int64_t items = in_.q.size(0) * kv_heads_ * per_head;
  const int64_t mixed = in_.q.size(0) * heads_ * length * padded_;
  parallel_for(items, threads_for_rows(in_.run, items, mixed), [&](int64_t item, int) {
    const int64_t elements = kBlockRows * padded_;
    Scratch scratch(static_cast<size_t>(elements) * sizeof(T) +
                    static_cast<size_t>(3 * padded_) * sizeof(double) +
                    kBlockRows * (sizeof(T) + sizeof(kernels::RowWindow)) + 4 * 64);
    Means means{};
    means.rows = {scratch.take<T>(elements), padded_};
    means.sums = scratch.take<double>(3 * padded_);
    means.windows = scratch.take<kernels::RowWindow>(kBlockRows);
    means.factors = scratch.take<T>(kBlockRows);
    std::fill_n(static_cast<double*>(means.sums), 3 * padded_, 0.0);
    const int64_t pair = item / per_head, begin = item % per_head * kItemRows;
    const int64_t end = std::min(begin + kItemRows, length);
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int64_t count = std::min(kBlockRows, end - row);
      body(Rows{pair / kv_heads_, pair % kv_heads_, row, count}, item, means);
    }
  });
}

// Windows of visible keys and the reciprocals of their sizes.
template <class T>
void MeanMix<T>::set_windows(const Rows& rows, const Means& means) const {
  const tiled::TilePlan& plan = in_.plans[static_cast<size_t>(rows.batch)];
  for (int64_t r = 0; r < rows.count; ++r) {
    const tiled::Interval seen = plan.row(rows.begin + r);
    means.windows[r] = {seen.begin, seen.end};
    means.factors[r] =
        seen.empty() ? T{0} : static_cast<T>(1) / static_cast<T>(seen.end - seen.begin);
  }
}

template <class T>
void MeanMix<T>::sum_rows(const kernels::Rows& from, int64_t count, Means& means) const {
  maps_.window_sums(from, means.at, means.windows, count, means.factors, means.sums, means.rows);
}

template <class T>
void MeanMix<T>::mix(const Tensor& softmax_out, const Tensor& out) const {
  const bool in_place = softmax_out.data() == out.data();
  for_items(queries_, [&](const Rows& rows, int64_t, Means& means) {
    set_windows(rows, means);
    const Rows values{rows.batch, rows.kv_head, 0, keys_};
    sum_rows(rows_of(in_.v, values, rows.kv_head), rows.count, means);
    T own[kBlockRows], rest[kBlockRows];
    for (int64_t g = 0; g < group_; ++g) {
      const T* alpha = alpha_of(rows.batch, head(rows, g)) + rows.begin;
      const T mean = static_cast<T>(alpha_mean_[static_cast<size_t>(head(rows, g))]);
      for (int64_t r = 0; r < rows.count; ++r) {
        const bool sees = means.factors[r] != 0;
        own[r] = sees ? alpha[r] : T{0};
        rest[r] = sees ? mean - alpha[r] : T{0};
      }
      const int64_t h = head(rows, g);
      if (in_place) {
        maps_.mix(out_rows(out, rows, h), own, {means.rows.data, means.rows.stride}, rest);
        continue;
      }
      const kernels::Rows mean_rows{means.rows.data, kType, means.rows.stride, rows.count, width_};
      maps_.combine(rows_of(softmax_out, rows, h), own, &mean_rows, rest, nullptr,
                    out_rows(out, rows, h));
    }
  });
}

template <class T>
void MeanMix<T>::scale_gradients(const Tensor& grad_out, const Tensor& softmax_out,
                                 const Tensor& scaled) {
  grad_alpha_ = Array(kType, {in_.q.size(0) * heads_, alpha_stride_});
  means_gradient_ = Array(kType, {in_.q.size(0) * kv_heads_, queries_, padded_});
  const int64_t per_head = (queries_ + kItemRows - 1) / kItemRows;
  const int64_t items = in_.q.size(0) * kv_heads_ * per_head;
  std::vector<double> sums(static_cast<size_t>(items * group_));  // per item and head of the group
  for_items(queries_, [&](const Rows& rows, int64_t item, Means& means) {
    set_windows(rows, means);
    const Rows values{rows.batch, rows.kv_head, 0, keys_};
    sum_rows(rows_of(in_.v, values, rows.kv_head), rows.count, means);
    gradients_of_block(rows, grad_out, softmax_out, scaled, means, sums.data() + item * group_);
  });
  grad_mean_.assign(static_cast<size_t>(heads_), 0);
  for (int64_t item = 0; item < items; ++item) {
    const int64_t kv_head = item / per_head % kv_heads_;
    for (int64_t g = 0; g < group_; ++g) {
      grad_mean_[static_cast<size_t>(kv_head * group_ + g)] +=
          sums[static_cast<size_t>(item * group_ + g)];
    }
  }
}

template <class T>
void MeanMix<T>::gradients_of_block(const Rows& rows, const Tensor& grad_out,
                                    const Tensor& softmax_out, const Tensor& scaled,
                                    const Means& means, double* mean_sums) {
  const kernels::Rows mean_rows{means.rows.data, kType, means.rows.stride, rows.count, width_};
  T* by_means = means_gradient_.as<T>() +
                ((rows.batch * kv_heads_ + rows.kv_head) * queries_ + rows.begin) * padded_;
  std::fill_n(by_means, rows.count * padded_, T{0});
  double with_softmax[kBlockRows], with_mean[kBlockRows];
  T own[kBlockRows], rest[kBlockRows];
  T ones[kBlockRows];
  std::fill_n(ones, kBlockRows, T{1});
  for (int64_t g = 0; g < group_; ++g) {
    const int64_t h = head(rows, g);
    const kernels::Rows gradient = rows_of(grad_out, rows, h);
    maps_.dots(gradient, rows_of(softmax_out, rows, h), with_softmax);
    maps_.dots(gradient, mean_rows, with_mean);
    const T* alpha = alpha_of(rows.batch, h) + rows.begin;
    T* to = grad_alpha_.as<T>() + (rows.batch * heads_ + h) * alpha_stride_ + rows.begin;
    for (int64_t r = 0; r < rows.count; ++r) {
      const bool sees = means.factors[r] != 0;
      to[r] = sees ? static_cast<T>(with_softmax[r] - with_mean[r]) : T{0};
      if (sees) mean_sums[g] += with_mean[r];
      own[r] = sees ? alpha[r] : T{0};
      rest[r] =
          sees ? (static_cast<T>(alpha_mean_[static_cast<size_t>(h)]) - alpha[r]) * means.factors[r]
               : T{0};
    }
    maps_.combine(gradient, own, nullptr, nullptr, nullptr, out_rows(scaled, rows, h));
    const kernels::Rows sums{by_means, kType, padded_, rows.count, width_};
    maps_.combine(gradient, rest, &sums, ones, nullptr,
                  {by_means, kType, padded_, rows.count, width_});
  }
}

template <class T>
void MeanMix<T>::add_mean_gradients(const Tensor& through_softmax, const Tensor& grad_v) const {
  // Row i sees key j where begin_i <= j < end_i; neither end decreases with i, so the rows that see a key
  // are neighbours.
  for_items(keys_, [&](const Rows& keys, int64_t, Means& means) {
    const tiled::TilePlan& plan = in_.plans[static_cast<size_t>(keys.batch)];
    const auto first_row = [&](int64_t from, auto&& reaches) {
      int64_t least = from, most = queries_;
      while (least < most) {
        const int64_t middle = (least + most) / 2;
        if (reaches(plan.row(middle))) {
          most = middle;
        } else {
          least = middle + 1;
        }
      }
      return least;
    };
    for (int64_t r = 0; r < keys.count; ++r) {
      const int64_t key = keys.begin + r;
      const int64_t begin = first_row(0, [&](tiled::Interval seen) { return seen.end > key; });
      means.windows[r] = {begin,
                          first_row(begin, [&](tiled::Interval seen) { return seen.begin > key; })};
      means.factors[r] = 1;
    }
    const T* from =
        means_gradient_.as<T>() + (keys.batch * kv_heads_ + keys.kv_head) * queries_ * padded_;
    sum_rows({from, kType, padded_, queries_, width_}, keys.count, means);
    T ones[kBlockRows];
    std::fill_n(ones, kBlockRows, T{1});
    const kernels::Rows sums{means.rows.data, kType, means.rows.stride, keys.count, width_};
    maps_.combine(rows_of(through_softmax, keys, keys.kv_head), ones, &sums, ones, nullptr,
                  out_rows(grad_v, keys, keys.kv_head));
  });
}

template <class T>
Array MeanMix<T>::alpha_gradient() const {
  const Dims shape{in_.q.size(0), heads_, queries_};
  return convert(
      Tensor(grad_alpha_.as<T>(), kType, shape, {heads_ * alpha_stride_, alpha_stride_, 1}),
      in_.alpha.dtype());
}

template <class T>
Array MeanMix<T>::alpha_mean_gradient() const {
  return convert(Tensor(grad_mean_.data(), DType::f64, {heads_}), in_.alpha_mean.dtype());
}

template class MeanMix<float>;
template class MeanMix<double>;

}  // namespace heed::affine_scaled
