#include "mechanisms/kernelized_rpe/features.h"

#include <algorithm>

namespace heed::rpe {

namespace {

// Shorter vectors have no direction: they count as zero, and get no gradient.
constexpr double kShortest = 1e-12;

// Of a vector whose squares overflow.
template <class T>
T scaled_length(const T* x, int64_t n) {
  T most = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  for (int64_t i = 0; i < n; ++i) sum += x[i] / most * (x[i] / most);
  return most * std::sqrt(sum);
}

}  // namespace

template <class T>
Features<T>::Features(const Call& call, const kernels::MatrixKernels<T>& kernels, Isa isa)
    : call_(call), kernels_(kernels), rows_(kernels::feature_kernels<T>(isa)), factor_(1) {
  if (!random()) return;
  const int64_t dim = call.sizes.dim, features = call.random;
  if (call.options.features != RpeFeatures::nprf) {
    factor_ = static_cast<T>(1 / std::sqrt(std::sqrt(static_cast<double>(dim))));
  }
  const std::vector<T> w = contiguous_values<T>(call.projection);
  right_stride_ = kernels::row_stride(kernels, features);
  left_stride_ = kernels::row_stride(kernels, dim);
  right_.assign(static_cast<size_t>(call.sizes.heads * dim * right_stride_), T{0});
  left_.assign(static_cast<size_t>(call.sizes.heads * features * left_stride_), T{0});
  for (int64_t h = 0; h < call.sizes.heads; ++h) {
    for (int64_t r = 0; r < features; ++r) {
      for (int64_t i = 0; i < dim; ++i) {
        const T value = factor_ * w[static_cast<size_t>((h * features + r) * dim + i)];
        right_[static_cast<size_t>((h * dim + i) * right_stride_ + r)] = value;
        left_[static_cast<size_t>((h * features + r) * left_stride_ + i)] = value;
      }
    }
  }
}

template <class T>
Features<T>::Work::Work(const Features& owner, int64_t rows) {
  const int64_t x_stride = kernels::row_stride(owner.kernels_, owner.call_.sizes.dim);
  const int64_t z_stride = kernels::row_stride(owner.kernels_, owner.call_.features);
  x_values.resize(static_cast<size_t>(rows * x_stride));
  dx_values.resize(x_values.size());
  dz_values.resize(static_cast<size_t>(rows * z_stride));
  row_values.resize(static_cast<size_t>(rows));
  x = {x_values.data(), x_stride};
  dx = {dx_values.data(), x_stride};
  dz = {dz_values.data(), z_stride};
  row = row_values.data();
}

// Tokens as they enter the projection; nprf: directions, with work.row = 1/|x| (0 for none).
template <class T>
void Features<T>::load(const Tensor& from, int64_t b, int64_t h, int64_t begin, int64_t rows,
                       Work& work, bool normalise) const {
  const int64_t dim = call_.sizes.dim;
  kernels_.load_rows({from.at({b, h, begin}), from.dtype(), from.stride(2), rows, dim}, work.x);
  if (!normalise) return;
  for (int64_t r = 0; r < rows; ++r) {
    T* x = work.x.row(r);
    T length = std::sqrt(kernels_.dot(x, x, dim));
    if (std::isinf(length)) length = scaled_length(x, dim);
    const T inverse = length <= static_cast<T>(kShortest) ? T{0} : 1 / length;
    work.row[r] = inverse;
    for (int64_t i = 0; i < dim; ++i) x[i] *= inverse;
  }
}

template <class T>
void Features<T>::exponents(int64_t h, int64_t rows, const Work& work, Block<T> z) const {
  kernels_.multiply({work.x.data, work.x.stride, 1}, right(h), call_.sizes.dim, z, rows,
                    call_.random, false);
}

namespace {

template <class T>
T largest_of(const T* z, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i) most = z[i] > most ? z[i] : most;
  return most;  // a NaN shows when it is subtracted from itself
}

// [sin z, cos z] times e, in place of z.
template <class T>
void waves(T* z, int64_t n, T e) {
  for (int64_t r = 0; r < n; ++r) {
    const T angle = z[r];
    z[r] = e * std::sin(angle);
    z[n + r] = e * std::cos(angle);
  }
}

}  // namespace

template <class T>
void Features<T>::queries(int64_t b, int64_t h, int64_t begin, int64_t rows, Work& work,
                          Block<T> phi) const {
  load(call_.q, b, h, begin, rows, work, call_.options.features == RpeFeatures::nprf);
  kernels::FeatureRows<T> in{FeatureKind::elu1, {work.x.data, work.x.stride}, rows, call_.features};
  if (!random()) return rows_.forward(in, phi);
  exponents(h, rows, work, phi);
  if (call_.options.features == RpeFeatures::trf) {
    for (int64_t r = 0; r < rows; ++r) waves(phi.row(r), call_.random, T{1});
    return;
  }
  for (int64_t r = 0; r < rows; ++r) work.row[r] = largest_of(phi.row(r), call_.random);
  in.kind = FeatureKind::performer;
  in.z = {phi.data, phi.stride};
  in.shift = work.row;
  rows_.forward(in, phi);
}

template <class T>
T Features<T>::key_exponents(int64_t b, int64_t h, int64_t begin, int64_t rows, Work& work,
                             Block<T> phi) const {
  const RpeFeatures features = call_.options.features;
  load(call_.k, b, key_head(h), begin, rows, work, features == RpeFeatures::nprf);
  if (!random()) {
    rows_.forward({FeatureKind::elu1, {work.x.data, work.x.stride}, rows, call_.features}, phi);
    return 0;
  }
  exponents(h, rows, work, phi);
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    T* z = phi.row(r);
    const T half =
        factor_ * factor_ / 2 * kernels_.dot(work.x.row(r), work.x.row(r), call_.sizes.dim);
    if (features == RpeFeatures::trf) {
      z[call_.random] = half;  // the place of the first cosine
      most = std::max(most, half);
    } else {
      if (features == RpeFeatures::prf) {
        for (int64_t i = 0; i < call_.random; ++i) z[i] -= half;
      }
      most = std::max(most, largest_of(z, call_.random));
    }
  }
  return most;
}

template <class T>
void Features<T>::finish_keys(int64_t rows, T largest, Block<T> phi) const {
  if (!random()) return;
  if (!std::isfinite(largest)) largest = 0;
  if (call_.options.features == RpeFeatures::trf) {
    for (int64_t r = 0; r < rows; ++r) {
      waves(phi.row(r), call_.random, std::exp(phi.row(r)[call_.random] - largest));
    }
    return;
  }
  const std::vector<T> shift(static_cast<size_t>(rows), largest);
  kernels::FeatureRows<T> in{FeatureKind::performer, {phi.data, phi.stride}, rows, call_.features};
  in.shift = shift.data();
  rows_.forward(in, phi);
}

template <class T>
void Features<T>::gradient(bool is_key, int64_t b, int64_t h, int64_t begin, int64_t rows,
                           Block<const T> phi, Block<const T> dphi, Work& work) const {
  const RpeFeatures features = call_.options.features;
  const int64_t dim = call_.sizes.dim, m = call_.random;
  load(is_key ? call_.k : call_.q, b, is_key ? key_head(h) : h, begin, rows, work,
       features == RpeFeatures::nprf);
  if (!random()) {  // the slope of elu + 1 is 1 above 1 and elu + 1 itself below
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < dim; ++i) {
        work.dx.row(r)[i] = dphi.row(r)[i] * std::min(phi.row(r)[i], T{1});
      }
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T *g = dphi.row(r), *f = phi.row(r);
    T* dz = work.dz.row(r);
    for (int64_t i = 0; i < m; ++i) {
      dz[i] = features == RpeFeatures::trf ? g[i] * f[m + i] - g[m + i] * f[i] : g[i] * f[i];
    }
  }
  kernels_.multiply({work.dz.data, work.dz.stride, 1}, left(h), m, work.dx, rows, dim, false);
  for (int64_t r = 0; r < rows; ++r) {
    T *dx = work.dx.row(r), *x = work.x.row(r);
    T along = 0;  // what goes along x, times x
    if (features == RpeFeatures::nprf) {
      along = -kernels_.dot(dx, x, dim);
    } else if (is_key) {  // |y|^2 / 2 in the exponent; that of a query cancels
      const T sum = kernels_.dot(dphi.row(r), phi.row(r), call_.features);
      along = (features == RpeFeatures::trf ? sum : -sum) * factor_ * factor_;
    }
    for (int64_t i = 0; i < dim; ++i) dx[i] += along * x[i];
    if (features == RpeFeatures::nprf) {
      for (int64_t i = 0; i < dim; ++i) dx[i] *= work.row[r];
    }
  }
}

template class Features<float>;
template class Features<double>;

}  // namespace heed::rpe
