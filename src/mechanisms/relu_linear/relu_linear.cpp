#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "heed/relu_linear_attention.h"
#include "kernels/matrix.h"
#include "mechanisms/operands.h"

namespace heed {

namespace {

using kernels::Block;
using kernels::MatrixKernels;

constexpr const char* kOp = "relu_linear_attention";
constexpr int64_t kTile = 64;  // tokens that are computed together

// Tokens of a head are cut into shares of their own sums, which are added in order. How many depends
// on the shape alone, so that results do not depend on the number of threads.
int64_t shares_of(int64_t tokens, int64_t most) {
  return std::clamp<int64_t>(ceil_div(tokens, 4 * kTile), 1, most);
}

struct Range {
  int64_t begin, end;
};
Range share_range(int64_t tokens, int64_t shares, int64_t share) {
  return {tokens * share / shares, tokens * (share + 1) / shares};
}

template <class T>
void rectify(Block<T> x, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) x.row(r)[i] = x.row(r)[i] < 0 ? 0 : x.row(r)[i];
  }
}

// A gradient passes where the input was positive; NaN inputs show.
template <class T>
void rectify_gradient(Block<const T> x, Block<T> dx, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      if (x.row(r)[i] <= 0) dx.row(r)[i] = 0;
    }
  }
}

template <class T>
Block<const T> readable(Block<T> x) {
  return {x.data, x.stride};
}

// Equal matrices one behind the other.
template <class T>
struct Matrices {
  std::vector<T> values;
  int64_t rows = 0, stride = 0;
  Matrices(int64_t count, int64_t rows_of_one, int64_t stride_of_one)
      : values(static_cast<size_t>(count * rows_of_one * stride_of_one)),
        rows(rows_of_one),
        stride(stride_of_one) {}
  Block<T> operator[](int64_t i) { return {values.data() + i * rows * stride, stride}; }
};

/// One checked call, forward or backward. Heads of k and v are taken some at a time, so that their
/// sums stay small. A head's sums are M = [sum_m K v | sum_m K], [D,Dv+1].
template <class T>
class ReluLinear {
 public:
  ReluLinear(const AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& temperature, double clamp, const RunOptions& run)
      : s_(sizes),
        q_(q),
        k_(k),
        v_(v),
        kernels_(kernels::matrix_kernels<T>(chosen_isa(run))),
        temperature_(contiguous_values<T>(temperature)),
        clamp_(std::max(static_cast<T>(clamp), std::numeric_limits<T>::min())),
        run_(run),
        d_stride_(kernels::row_stride(kernels_, s_.dim)),
        v_stride_(kernels::row_stride(kernels_, s_.value_dim + 1)),
        key_shares_(shares_of(s_.keys, kMostShares)),
        query_shares_(shares_of(
            s_.queries, std::max<int64_t>(1, kMostShares / std::max<int64_t>(1, s_.group())))),
        key_heads_(s_.batch * s_.kv_heads),
        heads_at_once_(heads_at_once(run)) {}

  void forward(const Tensor& out) {
    for (int64_t first = 0; first < key_heads_; first += heads_at_once_) {
      const int64_t count = std::min(heads_at_once_, key_heads_ - first);
      Matrices<T> m = key_sums(first, count);
      const int64_t tiles = ceil_div(s_.queries, kTile);
      parallel(count * s_.group() * tiles, [&](int64_t item) {
        const int64_t tile = item % tiles, member = item / tiles % s_.group();
        const int64_t head = item / tiles / s_.group();
        forward_tile(place(first + head, member), m[head], tile * kTile, out);
      });
    }
  }

  void backward(const Tensor& dout, const ReluLinearGradientViews& gradients) {
    std::vector<double> dtemperature(static_cast<size_t>(s_.heads));
    for (int64_t first = 0; first < key_heads_; first += heads_at_once_) {
      const int64_t count = std::min(heads_at_once_, key_heads_ - first);
      Matrices<T> m = key_sums(first, count);
      Matrices<T> dm = query_gradients(first, count, m, dout, gradients.q, dtemperature);
      key_gradients(first, count, dm, gradients);
    }
    copy_values(dtemperature.data(), gradients.temperature);
  }

 private:
  static constexpr int64_t kMostShares = 32;

  // Key heads whose sums are in memory together: those that fit into kBytes, but enough for all threads.
  int64_t heads_at_once(const RunOptions& run) const {
    constexpr int64_t kBytes = 8 << 20;
    const int64_t threads = threads_for(run, 1 << 20);
    const int64_t bytes_of_head =
        key_shares_ * s_.dim * v_stride_ * static_cast<int64_t>(sizeof(T));
    const int64_t heads = std::max(kBytes / bytes_of_head, ceil_div(4 * threads, key_shares_));
    return std::clamp<int64_t>(heads, 1, std::max<int64_t>(1, key_heads_));
  }

  struct Place {
    int64_t b, h, kv;
  };
  Place place(int64_t key_head, int64_t member) const {
    const int64_t kv = key_head % s_.kv_heads;
    return {key_head / s_.kv_heads, kv * s_.group() + member, kv};
  }

  template <class Body>
  void parallel(int64_t items, Body&& body) {
    parallel_for(items, threads_for(run_, items), [&](int64_t item, int) { body(item); });
  }

  int64_t bytes(int64_t rows, int64_t stride) const {
    return static_cast<int64_t>(Scratch::rounded(static_cast<size_t>(rows * stride) * sizeof(T)));
  }

  void load(const Tensor& from, int64_t b, int64_t h, Range tokens, int64_t width, Block<T> to) {
    kernels_.load_rows({from.at({b, h, tokens.begin}), from.dtype(), from.stride(2),
                        tokens.end - tokens.begin, width},
                       to);
  }
  void store(Block<T> from, const Tensor& to, int64_t b, int64_t h, Range tokens, int64_t width) {
    kernels_.store_rows(readable(from), {to.at({b, h, tokens.begin}), to.dtype(), to.stride(2),
                                         tokens.end - tokens.begin, width});
  }

  // v with a column of ones, which makes the last column of M the sum of keys.
  void load_values(int64_t b, int64_t kv, Range tokens, Block<T> to) {
    load(v_, b, kv, tokens, s_.value_dim, to);
    for (int64_t r = 0; r < tokens.end - tokens.begin; ++r) {
      std::fill(to.row(r) + s_.value_dim, to.row(r) + v_stride_, T{0});
      to.row(r)[s_.value_dim] = 1;
    }
  }

  // Adds share matrices up into the first of each head, which moves to the front.
  Matrices<T> total(Matrices<T> parts, int64_t count, int64_t shares) {
    Matrices<T> sums(count, parts.rows, parts.stride);
    parallel(count, [&](int64_t head) {
      for (int64_t share = 0; share < shares; ++share) {
        kernels_.add(sums[head].data, parts[head * shares + share].data, parts.rows * parts.stride);
      }
    });
    return sums;
  }

  Matrices<T> key_sums(int64_t first, int64_t count) {
    Matrices<T> parts(count * key_shares_, s_.dim, v_stride_);
    parallel(count * key_shares_, [&](int64_t item) {
      Scratch scratch(static_cast<size_t>(bytes(kTile, d_stride_) + bytes(kTile, v_stride_)));
      const Block<T> k{scratch.take<T>(kTile * d_stride_), d_stride_};
      const Block<T> v{scratch.take<T>(kTile * v_stride_), v_stride_};
      const Place at = place(first + item / key_shares_, 0);
      const Range share = share_range(s_.keys, key_shares_, item % key_shares_);
      for (int64_t begin = share.begin; begin < share.end; begin += kTile) {
        const Range tokens{begin, std::min(begin + kTile, share.end)};
        const int64_t rows = tokens.end - tokens.begin;
        load(k_, at.b, at.kv, tokens, s_.dim, k);
        rectify(k, rows, s_.dim);
        load_values(at.b, at.kv, tokens, v);
        kernels_.multiply({k.data, 1, k.stride}, readable(v), rows, parts[item], s_.dim,
                          s_.value_dim + 1, true);
      }
    });
    return total(std::move(parts), count, key_shares_);
  }

  T denominator(T sum) const { return sum < clamp_ ? clamp_ : sum; }  // NaN stays NaN

  void forward_tile(const Place& at, Block<T> m, int64_t begin, const Tensor& out) {
    Scratch scratch(static_cast<size_t>(bytes(kTile, d_stride_) + bytes(kTile, v_stride_)));
    const Block<T> q{scratch.take<T>(kTile * d_stride_), d_stride_};
    const Block<T> u{scratch.take<T>(kTile * v_stride_), v_stride_};
    const Range tokens{begin, std::min(begin + kTile, s_.queries)};
    const int64_t rows = tokens.end - tokens.begin;
    load(q_, at.b, at.h, tokens, s_.dim, q);
    rectify(q, rows, s_.dim);
    kernels_.multiply({q.data, q.stride, 1}, readable(m), s_.dim, u, rows, s_.value_dim + 1, false);
    for (int64_t r = 0; r < rows; ++r) {
      const T factor =
          temperature_[static_cast<size_t>(at.h)] / denominator(u.row(r)[s_.value_dim]);
      for (int64_t f = 0; f < s_.value_dim; ++f) u.row(r)[f] *= factor;
    }
    store(u, out, at.b, at.h, tokens, s_.value_dim);
  }

  // dq, the gradient of M summed over the queries that read it, and that of the temperature.
  Matrices<T> query_gradients(int64_t first, int64_t count, Matrices<T>& m, const Tensor& dout,
                              const Tensor& dq, std::vector<double>& dtemperature) {
    Matrices<T> transposed = transposes(m, count);
    const int64_t parts_of_head = s_.group() * query_shares_;
    Matrices<T> parts(count * parts_of_head, s_.dim, v_stride_);
    std::vector<double> dtau(static_cast<size_t>(count * parts_of_head));
    parallel(count * parts_of_head, [&](int64_t item) {
      const int64_t head = item / parts_of_head, member = item % parts_of_head / query_shares_;
      const Place at = place(first + head, member);
      const Range share = share_range(s_.queries, query_shares_, item % query_shares_);
      for (int64_t begin = share.begin; begin < share.end; begin += kTile) {
        const Range tokens{begin, std::min(begin + kTile, share.end)};
        dtau[static_cast<size_t>(item)] +=
            query_tile(at, m[head], transposed[head], tokens, dout, dq, parts[item]);
      }
    });
    for (int64_t item = 0; item < count * parts_of_head; ++item) {
      const Place at = place(first + item / parts_of_head, item % parts_of_head / query_shares_);
      dtemperature[static_cast<size_t>(at.h)] += dtau[static_cast<size_t>(item)];
    }
    return total(std::move(parts), count, parts_of_head);
  }

  // One tile of queries; returns its part of the temperature's gradient.
  double query_tile(const Place& at, Block<T> m, Block<T> m_transposed, Range tokens,
                    const Tensor& dout, const Tensor& dq, Block<T> dm) {
    Scratch scratch(static_cast<size_t>(2 * bytes(kTile, d_stride_) + 2 * bytes(kTile, v_stride_)));
    const Block<T> q{scratch.take<T>(kTile * d_stride_), d_stride_};
    const Block<T> grad_q{scratch.take<T>(kTile * d_stride_), d_stride_};
    const Block<T> u{scratch.take<T>(kTile * v_stride_), v_stride_};
    const Block<T> du{scratch.take<T>(kTile * v_stride_), v_stride_};
    const int64_t rows = tokens.end - tokens.begin, last = s_.value_dim;
    load(q_, at.b, at.h, tokens, s_.dim, q);
    rectify(q, rows, s_.dim);
    kernels_.multiply({q.data, q.stride, 1}, readable(m), s_.dim, u, rows, last + 1, false);
    load(dout, at.b, at.h, tokens, last, du);
    const T tau = temperature_[static_cast<size_t>(at.h)];
    double dtau = 0;
    for (int64_t r = 0; r < rows; ++r) {  // du becomes the gradient of [u | sum of weights]
      const T sum = u.row(r)[last], factor = 1 / denominator(sum);
      const T along = factor * kernels_.dot(du.row(r), u.row(r), last);
      dtau += static_cast<double>(along);
      for (int64_t f = 0; f < last; ++f) du.row(r)[f] *= tau * factor;
      std::fill(du.row(r) + last, du.row(r) + v_stride_, T{0});
      if (!(sum < clamp_)) du.row(r)[last] = -tau * factor * along;
    }
    kernels_.multiply({q.data, 1, q.stride}, readable(du), rows, dm, s_.dim, last + 1, true);
    kernels_.multiply({du.data, du.stride, 1}, readable(m_transposed), last + 1, grad_q, rows,
                      s_.dim, false);
    rectify_gradient(readable(q), grad_q, rows, s_.dim);
    store(grad_q, dq, at.b, at.h, tokens, s_.dim);
    return dtau;
  }

  Matrices<T> transposes(Matrices<T>& m, int64_t count) {
    Matrices<T> transposed(count, s_.value_dim + 1, d_stride_);
    parallel(count, [&](int64_t i) {
      kernels_.transpose(readable(m[i]), s_.dim, s_.value_dim + 1, transposed[i]);
    });
    return transposed;
  }

  void key_gradients(int64_t first, int64_t count, Matrices<T>& dm,
                     const ReluLinearGradientViews& gradients) {
    Matrices<T> transposed = transposes(dm, count);
    const int64_t tiles = ceil_div(s_.keys, kTile);
    parallel(count * tiles, [&](int64_t item) {
      Scratch scratch(
          static_cast<size_t>(2 * bytes(kTile, d_stride_) + 2 * bytes(kTile, v_stride_)));
      const Block<T> k{scratch.take<T>(kTile * d_stride_), d_stride_};
      const Block<T> dk{scratch.take<T>(kTile * d_stride_), d_stride_};
      const Block<T> v{scratch.take<T>(kTile * v_stride_), v_stride_};
      const Block<T> dv{scratch.take<T>(kTile * v_stride_), v_stride_};
      const int64_t head = item / tiles, begin = item % tiles * kTile;
      const Place at = place(first + head, 0);
      const Range tokens{begin, std::min(begin + kTile, s_.keys)};
      const int64_t rows = tokens.end - tokens.begin;
      load(k_, at.b, at.kv, tokens, s_.dim, k);
      rectify(k, rows, s_.dim);
      load_values(at.b, at.kv, tokens, v);
      kernels_.multiply({v.data, v.stride, 1}, readable(transposed[head]), s_.value_dim + 1, dk,
                        rows, s_.dim, false);
      rectify_gradient(readable(k), dk, rows, s_.dim);
      kernels_.multiply({k.data, k.stride, 1}, readable(dm[head]), s_.dim, dv, rows, s_.value_dim,
                        false);
      store(dk, gradients.k, at.b, at.kv, tokens, s_.dim);
      store(dv, gradients.v, at.b, at.kv, tokens, s_.value_dim);
    });
  }

  AttentionSizes s_;
  const Tensor &q_, &k_, &v_;
  const MatrixKernels<T>& kernels_;
  std::vector<T> temperature_;
  T clamp_;
  const RunOptions& run_;
  int64_t d_stride_, v_stride_, key_shares_, query_shares_, key_heads_, heads_at_once_;
};

AttentionSizes checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                       const ReluLinearOptions& options) {
  const AttentionSizes sizes = check_attention(kOp, q, k, v);
  check_parameter(kOp, "temperature", temperature, {sizes.heads}, q.dtype());
  if (!(options.clamp > 0) || !std::isfinite(options.clamp)) {
    fail(kOp, "clamp is " + std::to_string(options.clamp), "a positive number is needed");
  }
  return sizes;
}

}  // namespace

void relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& temperature, const Tensor& out,
                           const ReluLinearOptions& options, const RunOptions& run) {
  const AttentionSizes sizes = checked(q, k, v, temperature, options);
  check_rows_like(kOp, "out", out, sizes.out_shape(), q.dtype());
  if (q.dtype() == DType::f64) {
    ReluLinear<double>(sizes, q, k, v, temperature, options.clamp, run).forward(out);
  } else {
    ReluLinear<float>(sizes, q, k, v, temperature, options.clamp, run).forward(out);
  }
}

Array relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& temperature, const ReluLinearOptions& options,
                            const RunOptions& run) {
  Array out(q.dtype(), checked(q, k, v, temperature, options).out_shape());
  relu_linear_attention(q, k, v, temperature, out, options, run);
  return out;
}

void relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& temperature,
                                    const ReluLinearOptions& options,
                                    const ReluLinearGradientViews& gradients,
                                    const RunOptions& run) {
  const AttentionSizes sizes = checked(q, k, v, temperature, options);
  check_rows_like(kOp, "grad_out", grad_out, sizes.out_shape(), q.dtype());
  check_rows_like(kOp, "gradient of q", gradients.q, q.shape(), q.dtype());
  check_rows_like(kOp, "gradient of k", gradients.k, k.shape(), q.dtype());
  check_rows_like(kOp, "gradient of v", gradients.v, v.shape(), q.dtype());
  check_parameter_gradient(kOp, "gradient of temperature", gradients.temperature, temperature);
  if (q.dtype() == DType::f64) {
    ReluLinear<double>(sizes, q, k, v, temperature, options.clamp, run)
        .backward(grad_out, gradients);
  } else {
    ReluLinear<float>(sizes, q, k, v, temperature, options.clamp, run)
        .backward(grad_out, gradients);
  }
}

ReluLinearGradients relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                   const Tensor& k, const Tensor& v,
                                                   const Tensor& temperature,
                                                   const ReluLinearOptions& options,
                                                   const RunOptions& run) {
  checked(q, k, v, temperature, options);
  ReluLinearGradients result{Array(q.dtype(), q.shape()), Array(k.dtype(), k.shape()),
                             Array(v.dtype(), v.shape()),
                             Array(temperature.dtype(), temperature.shape())};
  relu_linear_attention_backward(grad_out, q, k, v, temperature, options,
                                 {result.q, result.k, result.v, result.temperature}, run);
  return result;
}

}  // namespace heed
