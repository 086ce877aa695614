// Sums over tokens as Toeplitz products by FFT (arXiv 2106.12566, Algorithm 1): features and sums in float64,
// transforms in Real, which is long double for float64 calls (the error of a transform is relative to its
// largest input). One value channel at a time, so that [L,M,Dv] never exists: with x = phi_k[r] v[f] the sums of a head are
//   N[f] = sum_r phi_q[r] (T x),   (T x)[p] = sum_m c[m - p] x[m]
// and a channel of ones beside the values makes the denominators. Two channels share a complex transform
// as its real and imaginary part. Tokens lie along rows here: [channel][token].
//
// A transform's rounding is spread over all tokens, in proportion to the norms of what it multiplies. So sums
// that are small beside these drown in it: fft_error.h has the bound that every call is held to.
#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <memory>
#include <vector>

#include "base/parallel.h"
#include "mechanisms/kernelized_rpe/features.h"
#include "mechanisms/kernelized_rpe/fft_error.h"
#include "mechanisms/kernelized_rpe/spectral_flight.h"
#include "mechanisms/kernelized_rpe/toeplitz.h"
#include "mechanisms/row_blocks.h"

namespace heed::rpe {

namespace {

template <class Real>
class Spectral {
  using Complex = std::complex<Real>;
  using Flight = SpectralFlight<Real>;

 public:
  Spectral(const Call& call, const RunOptions& run)
      : call_(call),
        run_(run),
        kernels_(kernels::matrix_kernels<double>(chosen_isa(run))),
        features_(call, kernels_, chosen_isa(run)),
        weights_(offset_weights<double>(call)),
        toeplitz_(call),
        unit_(static_cast<double>(std::numeric_limits<Real>::epsilon()) / 2 *
              std::max(1.0, std::log2(static_cast<double>(toeplitz_.fft().length())))),
        limit_(fft_error_limit(call.q.dtype())),
        l_(call.tokens),
        e_(call.sizes.value_dim),
        channels_(e_ + 1),
        group_(call.sizes.group()),
        tiles_(ceil_div(l_, kTile)),
        stride_(kernels::row_stride(kernels_, l_)),
        key_heads_(call.sizes.batch * call.sizes.kv_heads) {}

  // Both return a bound of the error; above the limit there is no result.
  double forward(const Tensor& out) {
    for_flights(false, [&](Flight& flight) {
      add_sums(flight);
      check_sums(flight);
      if (error_ > limit_) return;
      for_tiles(flight, [&](int64_t head, const RowBlock& at, Work& work) {
        results(flight, head, at, work);
        scale_rows(work.sums, at.count, 1 / flight.scales[static_cast<size_t>(head / group_)]);
        kernels_.store_rows({work.sums.data, work.sums.stride}, out_rows(out, at));
      });
    });
    return error_;
  }

  double backward(const Tensor& grad_out, const KernelizedRpeGradientViews& gradients) {
    std::vector<double> drpb(static_cast<size_t>(call_.sizes.heads * call_.offsets()));
    for_flights(true, [&](Flight& flight) {
      add_sums(flight);
      check_sums(flight);
      if (error_ > limit_) return;
      sum_gradients(flight, grad_out);
      check_gradients(flight, grad_out);
      if (error_ > limit_) return;
      feature_gradients(flight, drpb);
      value_gradients(flight);
      store_gradients(flight, gradients);
    });
    if (error_ <= limit_) store_rpb_gradient(call_, drpb, gradients.rpb);
    return error_;
  }

 private:
  /// Scratch of one thread.
  struct Work : Toeplitz<Real>::Scratch {
    Features<double>::Work features;
    std::vector<double> phi_values, dphi_values, sum_values, gradient_values;
    Block<double> phi, dphi, sums, gradients;
    std::vector<Complex> other;  // 0 between tokens
    std::vector<Complex> third, correlation;
    explicit Work(const Spectral& owner) : features(owner.features_, kTile) {
      const auto block = [&](std::vector<double>& values, int64_t width) {
        const int64_t stride = kernels::row_stride(owner.kernels_, width);
        values.resize(static_cast<size_t>(kTile * stride));
        return Block<double>{values.data(), stride};
      };
      phi = block(phi_values, owner.call_.features);
      dphi = block(dphi_values, owner.call_.features);
      sums = block(sum_values, owner.channels_);
      gradients = block(gradient_values, owner.channels_);
      for (auto* buffer :
           {&this->input, &other, &this->first, &this->second, &third, &correlation}) {
        buffer->resize(static_cast<size_t>(owner.toeplitz_.fft().length()));
      }
    }
  };

  template <class Body>
  void parallel(int64_t items, const Body& body) {
    const auto make = [this] { return std::make_unique<Work>(*this); };
    parallel_for_with(works_, items, threads_for(run_, items), make, body);
  }

  // Calls body(number of a query head in the flight, a tile of its tokens, work) for all of them.
  template <class Body>
  void for_tiles(const Flight& flight, const Body& body) {
    parallel(flight.heads * tiles_, [&](int64_t item, Work& work) {
      const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
      const auto [b, h] = call_.place(flight.first, head);
      body(head, RowBlock{b, h, begin, std::min(kTile, l_ - begin)}, work);
    });
  }

  // As many heads at a time as keep all threads busy.
  template <class Body>
  void for_flights(bool backward, Body&& body) {
    const int64_t threads = threads_for(run_, 1 << 20);
    const int64_t step =
        std::clamp<int64_t>(ceil_div(4 * threads, ceil_div(channels_, 2) * group_), 1, key_heads_);
    for (int64_t first = 0; first < key_heads_ && error_ <= limit_; first += step) {
      Flight flight(call_, first, std::min(step, key_heads_ - first), stride_,
                    toeplitz_.fft().length(), backward);
      load(flight);
      body(flight);
    }
  }

  void load(Flight& flight) {
    value_sizes(flight);
    for_tiles(flight, [&](int64_t head, const RowBlock& at, Work& work) {
      flight.largest[static_cast<size_t>(head * tiles_ + at.begin / kTile)] =
          features_.key_exponents(at.batch, at.head, at.begin, at.count, work.features, work.phi);
    });
    for_tiles(flight, [&](int64_t head, const RowBlock& at, Work& work) {
      const auto& [b, h, begin, rows] = at;
      const int64_t f = call_.features;
      const double* first = flight.largest.data() + head * tiles_;
      features_.key_exponents(b, h, begin, rows, work.features, work.phi);
      features_.finish_keys(rows, *std::max_element(first, first + tiles_), work.phi);
      to_channels(work.phi, rows, f, flight.keys.from_token(head, begin));
      features_.queries(b, h, begin, rows, work.features, work.phi);
      to_channels(work.phi, rows, f, flight.queries.from_token(head, begin));
      if (head % group_ == 0) {
        load_values(flight, head / group_, {b, h / group_, begin, rows}, work);
      }
    });
    parallel(flight.heads, [&](int64_t head, Work& work) { load_weights(flight, head, work); });
  }

  void to_channels(Block<double> rows, int64_t count, int64_t width, Block<double> channels) {
    kernels_.transpose({rows.data, rows.stride}, count, width, channels);
  }
  void to_rows(Block<double> channels, int64_t count, int64_t width, Block<double> rows) {
    kernels_.transpose({channels.data, channels.stride}, width, count, rows);
  }

  void load_values(Flight& flight, int64_t key_head, const RowBlock& at, Work& work) {
    kernels_.load_rows(rows_of(call_.v, at), work.sums);
    scale_rows(work.sums, at.count, flight.scales[static_cast<size_t>(key_head)]);
    for (int64_t r = 0; r < at.count; ++r) work.sums.row(r)[e_] = 1;
    to_channels(work.sums, at.count, channels_, flight.values.from_token(key_head, at.begin));
  }

  void scale_rows(Block<double> x, int64_t rows, double factor) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < e_; ++i) x.row(r)[i] *= factor;
    }
  }

  void value_sizes(Flight& flight) {
    parallel(flight.count, [&](int64_t item, Work&) {
      const auto [b, h] = call_.place(flight.first, item * group_);
      Sizes& all = flight.sizes[static_cast<size_t>(item)];
      for (const Sizes& block : block_sizes(call_.v, b, h / group_, kernels_)) all.add(block);
      flight.scales[static_cast<size_t>(item)] = all.scale();
    });
  }

  void load_masses(Flight& flight, int64_t head, Work& work) {
    const std::vector<double> ones(static_cast<size_t>(call_.features), 1);
    toeplitz_.convolve_row(sizes_of_tokens(flight.keys, head, ones.data(), l_).data(),
                           flight.spectrum(head), false, work, flight.masses.row(head, 0));
  }

  void raise_error(const std::vector<double>& errors) {
    for (double error : errors) error_ = std::max(error_, error);
  }

  // How far sums over values that some row sees may lie below those of the largest: at most as far as the
  // values do, and as the weights.
  double value_spread(const Flight& flight, int64_t head) const {
    return std::min(flight.sizes[static_cast<size_t>(head / group_)].spread(),
                    weight_spread(call_, weights_.of(call_.place(flight.first, head).h)));
  }

  void check_sums(Flight& flight) {
    std::vector<double> errors(static_cast<size_t>(flight.heads));
    parallel(flight.heads, [&](int64_t head, Work&) {
      const double* weights = weights_.of(call_.place(flight.first, head).h);
      const double* norms = flight.key_norms.data() + head * call_.features;
      std::vector<double> noise = sizes_of_tokens(flight.queries, head, norms, l_), sums;
      if (call_.signed_features()) {
        const std::vector<double> even(static_cast<size_t>(call_.features),
                                       1 / static_cast<double>(call_.features));
        sums = sizes_of_tokens(flight.queries, head, even.data(), l_);
        kernels_.scale(sums.data(), flight.masses.row(head, 0), l_);
      } else {
        sums.assign(flight.sums.row(head, e_), flight.sums.row(head, e_) + l_);
      }
      double worst = 0;
      for (int64_t i = 0; i < l_; ++i) {
        if (!flight.sees_something(head, i)) continue;
        worst = std::max(worst,
                         error_ratio(noise[static_cast<size_t>(i)], sums[static_cast<size_t>(i)]));
      }
      errors[static_cast<size_t>(head)] =
          unit_ * weight_norm(call_, weights) * worst * value_spread(flight, head);
    });
    raise_error(errors);
  }

  // Of the sums over queries. What a query adds is about as large as its neighbours' largest.
  void check_gradients(Flight& flight, const Tensor& grad_out) {
    std::vector<double> errors(static_cast<size_t>(flight.heads));
    parallel(flight.heads, [&](int64_t head, Work& work) {
      const auto [b, h] = call_.place(flight.first, head);
      std::vector<double> sizes = query_sizes(flight.queries, flight.dsums, head, l_);
      const double norm = std::sqrt(kernels_.dot(sizes.data(), sizes.data(), l_));
      widen(sizes);
      std::vector<double> sums(sizes.size());
      double spread = 1;  // of the channels of grad_out
      for (const Sizes& block : block_sizes(grad_out, b, h, kernels_)) {
        spread = std::max(spread, block.spread());
      }
      const std::vector<char> reached = reached_keys(h, sizes, work);
      toeplitz_.convolve_row(sizes.data(), flight.spectrum(head), true, work, sums.data());
      const double noise = unit_ * weight_norm(call_, weights_.of(h)) * norm;
      double worst = 0;
      for (size_t i = 0; i < sums.size(); ++i) {
        if (!reached.empty() && reached[i] == 0) continue;
        worst = std::max(worst, error_ratio(noise, sums[i]));
      }
      errors[static_cast<size_t>(head)] =
          worst * spread * value_spread(flight, head) / kGradientSlack;
    });
    raise_error(errors);
  }

  // Keys that a query with a gradient sees; empty: all.
  std::vector<char> reached_keys(int64_t h, const std::vector<double>& sizes, Work& work) {
    const bool all = std::find(sizes.begin(), sizes.end(), 0.0) == sizes.end();
    if (all && weights_.some_zero[static_cast<size_t>(h)] == 0) return {};
    std::vector<double> some(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) some[i] = sizes[i] == 0 ? 0 : 1;
    return toeplitz_.meet(weights_.of(h), std::move(some), true, work);
  }

  void load_weights(Flight& flight, int64_t head, Work& work) {
    const int64_t h = call_.place(flight.first, head).h;
    Complex* spectrum = flight.spectrum(head);
    if (weights_.some_zero[static_cast<size_t>(h)] != 0) {
      const std::vector<double> ones(static_cast<size_t>(l_), 1);
      flight.visible[static_cast<size_t>(head)] = toeplitz_.meet(weights_.of(h), ones, false, work);
    }
    toeplitz_.weight_spectrum(weights_.of(h), false, spectrum);
    for (int64_t r = 0; r < call_.features; ++r) {
      Row k = flight.keys.row(head, r);
      flight.key_norms[static_cast<size_t>(head * call_.features + r)] =
          std::sqrt(kernels_.dot(k, k, l_));
    }
    if (call_.signed_features()) load_masses(flight, head, work);
  }

  int64_t channel_pairs() const { return ceil_div(channels_, 2); }
  // The second channel of a pair, or none behind the last.
  double* second_row(Channels& of, int64_t matrix, int64_t channel) const {
    return channel + 1 < channels_ ? of.row(matrix, channel + 1) : nullptr;
  }

  void add_sums(Flight& flight) {
    parallel(flight.heads * channel_pairs(), [&](int64_t item, Work& work) {
      const int64_t head = item / channel_pairs(), f = item % channel_pairs() * 2;
      const int64_t key_head = head / group_;
      Row v0 = flight.values.row(key_head, f), v1 = second_row(flight.values, key_head, f);
      double *n0 = flight.sums.row(head, f), *n1 = second_row(flight.sums, head, f);
      for (int64_t r = 0; r < call_.features; ++r) {
        toeplitz_.fill(flight.keys.row(head, r), v0, v1, work.input);
        toeplitz_.fft().forward(work.input.data(), work.first.data());
        toeplitz_.convolve(flight.spectrum(head), false, work.first, work.second);
        Row q = flight.queries.row(head, r);
        toeplitz_.for_tokens([&](int64_t token, int64_t at) {
          const Complex u = work.second[static_cast<size_t>(at)];
          n0[token] += static_cast<double>(q[token] * u.real());
          if (n1 != nullptr) n1[token] += static_cast<double>(q[token] * u.imag());
        });
      }
    });
  }

  // work.sums = rows of results with 1 / D behind them, 0 where nothing is visible.
  void results(Flight& flight, int64_t head, const RowBlock& at, Work& work) {
    to_rows(flight.sums.from_token(head, at.begin), at.count, channels_, work.sums);
    for (int64_t r = 0; r < at.count; ++r) {
      double* row = work.sums.row(r);
      const bool dead = row[e_] == 0 || !flight.sees_something(head, at.begin + r);
      row[e_] = dead ? 0 : 1 / row[e_];
      for (int64_t i = 0; i < e_; ++i) row[i] *= row[e_];
    }
  }

  void sum_gradients(Flight& flight, const Tensor& grad_out) {
    for_tiles(flight, [&](int64_t head, const RowBlock& at, Work& work) {
      results(flight, head, at, work);
      kernels_.load_rows(rows_of(grad_out, at), work.gradients);
      scale_rows(work.gradients, at.count, 1 / flight.scales[static_cast<size_t>(head / group_)]);
      for (int64_t r = 0; r < at.count; ++r) {
        double* g = work.gradients.row(r);
        const double inverse = work.sums.row(r)[e_];
        g[e_] = -inverse * kernels_.dot(g, work.sums.row(r), e_);
        for (int64_t i = 0; i < e_; ++i) g[i] *= inverse;
      }
      to_channels(work.gradients, at.count, channels_, flight.dsums.from_token(head, at.begin));
    });
  }

  // Gradients of query and key features, and of the weights of offsets.
  void feature_gradients(Flight& flight, std::vector<double>& drpb) {
    const int64_t n = call_.offsets(), threads = threads_for(run_, 1 << 20);
    const int64_t shares =
        std::clamp<int64_t>(ceil_div(4 * threads, flight.heads), 1, call_.features);
    std::vector<double> parts(static_cast<size_t>(flight.heads * shares * n));
    parallel(flight.heads * shares, [&](int64_t item, Work& work) {
      const int64_t head = item / shares, share = item % shares;
      std::fill(work.correlation.begin(), work.correlation.end(), Complex());
      const int64_t end = share_begin(call_.features, share + 1, shares);
      for (int64_t r = share_begin(call_.features, share, shares); r < end; ++r)
        feature_gradient(flight, head, r, work);
      toeplitz_.fft().inverse(work.correlation.data(), work.first.data());
      const Real factor = 1 / static_cast<Real>(toeplitz_.fft().length());
      for (int64_t o = -call_.span; o <= call_.span; ++o) {
        const auto at = static_cast<size_t>(o < 0 ? toeplitz_.fft().length() + o : o);
        parts[static_cast<size_t>(item * n + call_.span + o)] =
            static_cast<double>(factor * work.first[at].real());
      }
    });
    for (int64_t item = 0; item < flight.heads * shares; ++item) {
      const int64_t h = call_.place(flight.first, item / shares).h;
      for (int64_t i = 0; i < n; ++i) {  // of b from that of c = exp b
        drpb[static_cast<size_t>(h * n + i)] +=
            weights_.of(h)[i] * parts[static_cast<size_t>(item * n + i)];
      }
    }
  }

  void feature_gradient(Flight& flight, int64_t head, int64_t r, Work& work) {
    const int64_t key_head = head / group_;
    const Complex* spectrum = flight.spectrum(head);
    Row q = flight.queries.row(head, r), k = flight.keys.row(head, r);
    double *dq = flight.dqueries.row(head, r), *dk = flight.dkeys.row(head, r);
    for (int64_t f = 0; f < channels_; f += 2) {
      Row v0 = flight.values.row(key_head, f), v1 = second_row(flight.values, key_head, f);
      Row g0 = flight.dsums.row(head, f), g1 = second_row(flight.dsums, head, f);
      toeplitz_.fill(k, v0, v1, work.input);
      toeplitz_.fill(q, g0, g1, work.other);
      toeplitz_.fft().forward(work.input.data(), work.first.data());
      toeplitz_.fft().forward(work.other.data(), work.second.data());
      for (size_t i = 0; i < work.correlation.size(); ++i) {
        work.correlation[i] += times(std::conj(work.second[i]), work.first[i]);
      }
      add_products(spectrum, false, work.first, g0, g1, work, dq);
      add_products(spectrum, true, work.second, v0, v1, work, dk);
    }
  }

  // to += Re(T x) a + Im(T x) b from the transform of x
  void add_products(const Complex* spectrum, bool transposed, std::vector<Complex>& transform,
                    Row a, Row b, Work& work, double* to) const {
    toeplitz_.convolve(spectrum, transposed, transform, work.third);
    toeplitz_.for_tokens([&](int64_t token, int64_t at) {
      const Complex u = work.third[static_cast<size_t>(at)];
      to[token] +=
          static_cast<double>(u.real() * a[token] + (b == nullptr ? Real{0} : u.imag() * b[token]));
    });
  }

  void value_gradients(Flight& flight) {
    parallel(flight.count * channel_pairs(), [&](int64_t item, Work& work) {
      const int64_t key_head = item / channel_pairs(), f = item % channel_pairs() * 2;
      double *d0 = flight.dvalues.row(key_head, f), *d1 = second_row(flight.dvalues, key_head, f);
      for (int64_t head = key_head * group_; head < (key_head + 1) * group_; ++head) {
        Row g0 = flight.dsums.row(head, f), g1 = second_row(flight.dsums, head, f);
        for (int64_t r = 0; r < call_.features; ++r) {
          toeplitz_.fill(flight.queries.row(head, r), g0, g1, work.input);
          toeplitz_.fft().forward(work.input.data(), work.first.data());
          toeplitz_.convolve(flight.spectrum(head), true, work.first, work.second);
          Row k = flight.keys.row(head, r);
          toeplitz_.for_tokens([&](int64_t token, int64_t at) {
            const Complex u = work.second[static_cast<size_t>(at)];
            d0[token] += static_cast<double>(k[token] * u.real());
            if (d1 != nullptr) d1[token] += static_cast<double>(k[token] * u.imag());
          });
        }
      }
    });
  }

  void store_gradients(Flight& flight, const KernelizedRpeGradientViews& gradients) {
    const int64_t f = call_.features, dim = call_.sizes.dim;
    const auto gradient = [&](bool is_key, int64_t head, int64_t begin, int64_t rows, Work& work) {
      const auto [b, h] = call_.place(flight.first, head);
      Channels& of = is_key ? flight.keys : flight.queries;
      Channels& dof = is_key ? flight.dkeys : flight.dqueries;
      to_rows(of.from_token(head, begin), rows, f, work.phi);
      to_rows(dof.from_token(head, begin), rows, f, work.dphi);
      features_.gradient(is_key, b, h, begin, rows, {work.phi.data, work.phi.stride},
                         {work.dphi.data, work.dphi.stride}, work.features);
    };
    const auto store = [&](Block<double> from, const Tensor& to, const RowBlock& at) {
      kernels_.store_rows({from.data, from.stride}, out_rows(to, at));
    };
    parallel(flight.count * tiles_, [&](int64_t item, Work& work) {
      const int64_t key_head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin);
      std::vector<double> dk(static_cast<size_t>(kTile * work.features.dx.stride));
      const Block<double> sum{dk.data(), work.features.dx.stride};
      for (int64_t head = key_head * group_; head < (key_head + 1) * group_; ++head) {
        const auto [b, h] = call_.place(flight.first, head);
        gradient(false, head, begin, rows, work);
        store(work.features.dx, gradients.q, {b, h, begin, rows});
        gradient(true, head, begin, rows, work);
        for (int64_t r = 0; r < rows; ++r) kernels_.add(sum.row(r), work.features.dx.row(r), dim);
      }
      const auto [b, h] = call_.place(flight.first, key_head * group_);
      store(sum, gradients.k, {b, h / group_, begin, rows});
      to_rows(flight.dvalues.from_token(key_head, begin), rows, channels_, work.sums);
      scale_rows(work.sums, rows, flight.scales[static_cast<size_t>(key_head)]);
      store(work.sums, gradients.v, {b, h / group_, begin, rows});
    });
  }

  const Call& call_;
  const RunOptions& run_;
  const kernels::MatrixKernels<double>& kernels_;
  Features<double> features_;
  OffsetWeights<double> weights_;
  Toeplitz<Real> toeplitz_;
  double unit_, limit_;  // rounding of a product by FFT, relative to the norms; of a result
  double error_ = 0;
  int64_t l_, e_, channels_, group_, tiles_, stride_, key_heads_;
  std::vector<std::unique_ptr<Work>> works_;
};

}  // namespace

double forward_fft(const Call& call, const Tensor& out, const RunOptions& run) {
  if (call.q.dtype() == DType::f64) return Spectral<long double>(call, run).forward(out);
  return Spectral<double>(call, run).forward(out);
}

double backward_fft(const Call& call, const Tensor& grad_out,
                    const KernelizedRpeGradientViews& gradients, const RunOptions& run) {
  if (call.q.dtype() == DType::f64) {
    return Spectral<long double>(call, run).backward(grad_out, gradients);
  }
  return Spectral<double>(call, run).backward(grad_out, gradients);
}

}  // namespace heed::rpe
