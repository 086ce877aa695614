// Sums over tokens as Toeplitz products by FFT (arXiv 2106.12566, Algorithm 1): features and sums in float64,
// transforms in Real, which is long double for float64 calls (the error of a transform is relative to its
// largest input). One value channel at a time, so that [L,M,Dv] never exists: with x = phi_k[r] v[f] the sums of a head are
//   N[f] = sum_r phi_q[r] (T x),   (T x)[p] = sum_m c[m - p] x[m]
// and a channel of ones beside the values makes the denominators. Two channels share a complex transform
// as its real and imaginary part. Tokens lie along rows here: [channel][token].
#include "kernels/fft.h"

#include <algorithm>
#include <complex>
#include <memory>
#include <vector>

#include "base/parallel.h"
#include "mechanisms/kernelized_rpe/features.h"

namespace heed::rpe {

namespace {

using Row = const double*;

constexpr int64_t kTile = 64;  // tokens whose features are computed together

template <class Real>
std::complex<Real> times(std::complex<Real> a,
                         std::complex<Real> b) {  // without the operator's care for infinities
  return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

/// Rows of numbers for every token: [matrix][channel][token].
struct Channels {
  int64_t count = 0, stride = 0;
  std::vector<double> values;
  Channels() = default;
  Channels(int64_t matrices, int64_t channels, int64_t row_stride)
      : count(channels),
        stride(row_stride),
        values(static_cast<size_t>(matrices * channels * row_stride)) {}
  double* row(int64_t matrix, int64_t channel) {
    return values.data() + (matrix * count + channel) * stride;
  }
  Block<double> from_token(int64_t matrix, int64_t token) {
    return {row(matrix, 0) + token, stride};
  }
};

template <class Real>
class Spectral {
  using Complex = std::complex<Real>;

 public:
  Spectral(const Call& call, const RunOptions& run)
      : call_(call),
        run_(run),
        kernels_(kernels::matrix_kernels<double>(chosen_isa(run))),
        features_(call, kernels_, chosen_isa(run)),
        weights_(offset_weights<double>(call)),
        // Sums reach over offsets -span .. span of positions 0 .. span: no wrap meets them.
        fft_(2 * call.span + 1),
        l_(call.tokens),
        e_(call.sizes.value_dim),
        channels_(e_ + 1),
        group_(call.sizes.group()),
        tiles_(ceil_div(l_, kTile)),
        stride_(kernels::row_stride(kernels_, l_)),
        key_heads_(call.sizes.batch * call.sizes.kv_heads) {}

  void forward(const Tensor& out) {
    for_flights(false, [&](Flight& flight) {
      add_sums(flight);
      parallel(flight.heads * tiles_, [&](int64_t item, Work& work) {
        const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
        const auto [b, h] = place(flight, head);
        const int64_t rows = std::min(kTile, l_ - begin);
        results(flight, head, begin, rows, work);
        kernels_.store_rows({work.sums.data, work.sums.stride},
                            {out.at({b, h, begin}), out.dtype(), out.stride(2), rows, e_});
      });
    });
  }

  void backward(const Tensor& grad_out, const KernelizedRpeGradientViews& gradients) {
    std::vector<double> drpb(static_cast<size_t>(call_.sizes.heads * call_.offsets()));
    for_flights(true, [&](Flight& flight) {
      add_sums(flight);
      sum_gradients(flight, grad_out);
      feature_gradients(flight, drpb);
      value_gradients(flight);
      store_gradients(flight, gradients);
    });
    store_rpb_gradient(call_, drpb, gradients.rpb);
  }

 private:
  /// Some key heads with the query heads that read them; see direct.cpp.
  struct Flight {
    int64_t first, count, heads;
    Channels queries, keys, values, sums;      // features; values and 1; N and D
    Channels dsums, dqueries, dkeys, dvalues;  // their gradients
    std::vector<double> largest;               // exponents of keys, by query head and tile
    std::vector<Complex> spectra;              // of the weights, over the length, by query head
    std::vector<std::vector<char>> visible;    // by query head and token; empty: all see something
  };

  /// Scratch of one thread.
  struct Work {
    Features<double>::Work features;
    std::vector<double> phi_values, dphi_values, sum_values, gradient_values;
    Block<double> phi, dphi, sums, gradients;
    std::vector<Complex> input, other;  // 0 between tokens
    std::vector<Complex> first, second, third, correlation;
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
      for (auto* buffer : {&input, &other, &first, &second, &third, &correlation}) {
        buffer->resize(static_cast<size_t>(owner.fft_.length()));
      }
    }
  };

  struct Place {
    int64_t b, h;
  };
  Place place(const Flight& flight, int64_t head) const {
    const int64_t key_head = flight.first + head / group_;
    return {key_head / call_.sizes.kv_heads,
            key_head % call_.sizes.kv_heads * group_ + head % group_};
  }

  template <class Body>
  void parallel(int64_t items, Body&& body) {
    const int threads = threads_for(run_, items);
    works_.resize(std::max(works_.size(), static_cast<size_t>(threads)));
    parallel_for(items, threads, [&](int64_t item, int worker) {
      auto& work = works_[static_cast<size_t>(worker)];
      if (!work) work = std::make_unique<Work>(*this);
      body(item, *work);
    });
  }

  // Calls body(token, position) for all tokens.
  template <class Body>
  void for_tokens(Body&& body) const {
    for (int64_t token = 0, row = 0; token < l_; row += call_.pitch) {
      for (int64_t x = 0; x < call_.columns; ++x, ++token) body(token, row + x);
    }
  }

  // As many heads at a time as keep all threads busy.
  template <class Body>
  void for_flights(bool backward, Body&& body) {
    const int64_t threads = threads_for(run_, 1 << 20);
    const int64_t step =
        std::clamp<int64_t>(ceil_div(4 * threads, ceil_div(channels_, 2) * group_), 1, key_heads_);
    for (int64_t first = 0; first < key_heads_; first += step) {
      Flight flight;
      flight.first = first;
      flight.count = std::min(step, key_heads_ - first);
      flight.heads = flight.count * group_;
      allocate(flight, backward);
      load(flight);
      body(flight);
    }
  }

  void allocate(Flight& flight, bool backward) const {
    const int64_t f = call_.features;
    flight.queries = {flight.heads, f, stride_};
    flight.keys = {flight.heads, f, stride_};
    flight.values = {flight.count, channels_, stride_};
    flight.sums = {flight.heads, channels_, stride_};
    flight.largest.resize(static_cast<size_t>(flight.heads * tiles_));
    flight.spectra.resize(static_cast<size_t>(flight.heads * fft_.length()));
    flight.visible.resize(static_cast<size_t>(flight.heads));
    if (!backward) return;
    flight.dqueries = {flight.heads, f, stride_};
    flight.dkeys = {flight.heads, f, stride_};
    flight.dvalues = {flight.count, channels_, stride_};
    flight.dsums = {flight.heads, channels_, stride_};
  }

  void load(Flight& flight) {
    parallel(flight.heads * tiles_, [&](int64_t item, Work& work) {
      const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
      const auto [b, h] = place(flight, head);
      flight.largest[static_cast<size_t>(item)] = features_.key_exponents(
          b, h, begin, std::min(kTile, l_ - begin), work.features, work.phi);
    });
    parallel(flight.heads * tiles_, [&](int64_t item, Work& work) {
      const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin), f = call_.features;
      const auto [b, h] = place(flight, head);
      const double* first = flight.largest.data() + head * tiles_;
      features_.key_exponents(b, h, begin, rows, work.features, work.phi);
      features_.finish_keys(rows, *std::max_element(first, first + tiles_), work.phi);
      to_channels(work.phi, rows, f, flight.keys.from_token(head, begin));
      features_.queries(b, h, begin, rows, work.features, work.phi);
      to_channels(work.phi, rows, f, flight.queries.from_token(head, begin));
      if (head % group_ == 0) load_values(flight, head / group_, b, h / group_, begin, rows, work);
    });
    parallel(flight.heads, [&](int64_t head, Work& work) { load_weights(flight, head, work); });
  }

  void to_channels(Block<double> rows, int64_t count, int64_t width, Block<double> channels) {
    kernels_.transpose({rows.data, rows.stride}, count, width, channels);
  }
  void to_rows(Block<double> channels, int64_t count, int64_t width, Block<double> rows) {
    kernels_.transpose({channels.data, channels.stride}, width, count, rows);
  }

  void load_values(Flight& flight, int64_t key_head, int64_t b, int64_t kv, int64_t begin,
                   int64_t rows, Work& work) {
    const Tensor& v = call_.v;
    kernels_.load_rows({v.at({b, kv, begin}), v.dtype(), v.stride(2), rows, e_}, work.sums);
    for (int64_t r = 0; r < rows; ++r) work.sums.row(r)[e_] = 1;
    to_channels(work.sums, rows, channels_, flight.values.from_token(key_head, begin));
  }

  // The spectrum of the weights as a kernel: entry -o of a circle holds c[o]; 1 / length goes with it.
  void weight_spectrum(const double* weights, bool only_where, Work& work, Complex* spectrum) {
    const int64_t n = fft_.length(), span = call_.span;
    std::vector<Complex> circle(static_cast<size_t>(n));
    for (int64_t o = -span; o <= span; ++o) {
      const double c = weights[span + o];
      circle[static_cast<size_t>(o <= 0 ? -o : n - o)] =
          only_where ? (c == 0 ? Real{0} : Real{1}) : Real{c};
    }
    fft_.forward(circle.data(), work.first.data());
    const Real factor = 1 / static_cast<Real>(n);
    for (int64_t i = 0; i < n; ++i) spectrum[i] = factor * work.first[static_cast<size_t>(i)];
  }

  void load_weights(Flight& flight, int64_t head, Work& work) {
    const int64_t h = place(flight, head).h;
    Complex* spectrum = flight.spectra.data() + head * fft_.length();
    if (weights_.some_zero[static_cast<size_t>(h)] != 0) {  // count the keys that a query sees
      weight_spectrum(weights_.of(h), true, work, spectrum);
      const std::vector<double> ones(static_cast<size_t>(l_), 1);
      fill(ones.data(), ones.data(), nullptr, work.input);
      fft_.forward(work.input.data(), work.first.data());
      convolve(spectrum, false, work.first, work.second);
      auto& visible = flight.visible[static_cast<size_t>(head)];
      visible.resize(static_cast<size_t>(l_));
      for_tokens([&](int64_t token, int64_t at) {
        visible[static_cast<size_t>(token)] = work.second[static_cast<size_t>(at)].real() > 0.5;
      });
    }
    weight_spectrum(weights_.of(h), false, work, spectrum);
  }

  // to[position] = a (b + i c) of every token; c may be null.
  void fill(Row a, Row b, Row c, std::vector<Complex>& to) const {
    for_tokens([&](int64_t token, int64_t at) {
      to[static_cast<size_t>(at)] = {Real{a[token]} * b[token],
                                     c == nullptr ? Real{0} : Real{a[token]} * c[token]};
    });
  }

  // to = T x (or T^T x) from the transform of x, which is overwritten.
  void convolve(const Complex* spectrum, bool transposed, std::vector<Complex>& transform,
                std::vector<Complex>& to) const {
    for (int64_t i = 0; i < fft_.length(); ++i) {
      Complex& x = transform[static_cast<size_t>(i)];
      x = times(x, transposed ? std::conj(spectrum[i]) : spectrum[i]);
    }
    fft_.inverse(transform.data(), to.data());
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
        fill(flight.keys.row(head, r), v0, v1, work.input);
        fft_.forward(work.input.data(), work.first.data());
        convolve(flight.spectra.data() + head * fft_.length(), false, work.first, work.second);
        Row q = flight.queries.row(head, r);
        for_tokens([&](int64_t token, int64_t at) {
          const Complex u = work.second[static_cast<size_t>(at)];
          n0[token] += static_cast<double>(q[token] * u.real());
          if (n1 != nullptr) n1[token] += static_cast<double>(q[token] * u.imag());
        });
      }
    });
  }

  // work.sums = rows of results with 1 / D behind them, 0 where nothing is visible.
  void results(Flight& flight, int64_t head, int64_t begin, int64_t rows, Work& work) {
    to_rows(flight.sums.from_token(head, begin), rows, channels_, work.sums);
    const auto& visible = flight.visible[static_cast<size_t>(head)];
    for (int64_t r = 0; r < rows; ++r) {
      double* row = work.sums.row(r);
      const bool dead =
          row[e_] == 0 || (!visible.empty() && visible[static_cast<size_t>(begin + r)] == 0);
      row[e_] = dead ? 0 : 1 / row[e_];
      for (int64_t i = 0; i < e_; ++i) row[i] *= row[e_];
    }
  }

  void sum_gradients(Flight& flight, const Tensor& grad_out) {
    parallel(flight.heads * tiles_, [&](int64_t item, Work& work) {
      const int64_t head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin);
      const auto [b, h] = place(flight, head);
      results(flight, head, begin, rows, work);
      kernels_.load_rows(
          {grad_out.at({b, h, begin}), grad_out.dtype(), grad_out.stride(2), rows, e_},
          work.gradients);
      for (int64_t r = 0; r < rows; ++r) {
        double* g = work.gradients.row(r);
        const double inverse = work.sums.row(r)[e_];
        g[e_] = -inverse * kernels_.dot(g, work.sums.row(r), e_);
        for (int64_t i = 0; i < e_; ++i) g[i] *= inverse;
      }
      to_channels(work.gradients, rows, channels_, flight.dsums.from_token(head, begin));
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
      fft_.inverse(work.correlation.data(), work.first.data());
      const Real factor = 1 / static_cast<Real>(fft_.length());
      for (int64_t o = -call_.span; o <= call_.span; ++o) {
        const auto at = static_cast<size_t>(o < 0 ? fft_.length() + o : o);
        parts[static_cast<size_t>(item * n + call_.span + o)] =
            static_cast<double>(factor * work.first[at].real());
      }
    });
    for (int64_t item = 0; item < flight.heads * shares; ++item) {
      const int64_t h = place(flight, item / shares).h;
      for (int64_t i = 0; i < n; ++i) {  // of b from that of c = exp b
        drpb[static_cast<size_t>(h * n + i)] +=
            weights_.of(h)[i] * parts[static_cast<size_t>(item * n + i)];
      }
    }
  }

  void feature_gradient(Flight& flight, int64_t head, int64_t r, Work& work) {
    const int64_t key_head = head / group_;
    const Complex* spectrum = flight.spectra.data() + head * fft_.length();
    Row q = flight.queries.row(head, r), k = flight.keys.row(head, r);
    double *dq = flight.dqueries.row(head, r), *dk = flight.dkeys.row(head, r);
    for (int64_t f = 0; f < channels_; f += 2) {
      Row v0 = flight.values.row(key_head, f), v1 = second_row(flight.values, key_head, f);
      Row g0 = flight.dsums.row(head, f), g1 = second_row(flight.dsums, head, f);
      fill(k, v0, v1, work.input);
      fill(q, g0, g1, work.other);
      fft_.forward(work.input.data(), work.first.data());
      fft_.forward(work.other.data(), work.second.data());
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
    convolve(spectrum, transposed, transform, work.third);
    for_tokens([&](int64_t token, int64_t at) {
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
          fill(flight.queries.row(head, r), g0, g1, work.input);
          fft_.forward(work.input.data(), work.first.data());
          convolve(flight.spectra.data() + head * fft_.length(), true, work.first, work.second);
          Row k = flight.keys.row(head, r);
          for_tokens([&](int64_t token, int64_t at) {
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
      const auto [b, h] = place(flight, head);
      Channels& of = is_key ? flight.keys : flight.queries;
      Channels& dof = is_key ? flight.dkeys : flight.dqueries;
      to_rows(of.from_token(head, begin), rows, f, work.phi);
      to_rows(dof.from_token(head, begin), rows, f, work.dphi);
      features_.gradient(is_key, b, h, begin, rows, {work.phi.data, work.phi.stride},
                         {work.dphi.data, work.dphi.stride}, work.features);
    };
    const auto store = [&](Block<double> from, const Tensor& to, int64_t b, int64_t h,
                           int64_t begin, int64_t rows, int64_t width) {
      kernels_.store_rows({from.data, from.stride},
                          {to.at({b, h, begin}), to.dtype(), to.stride(2), rows, width});
    };
    parallel(flight.count * tiles_, [&](int64_t item, Work& work) {
      const int64_t key_head = item / tiles_, begin = item % tiles_ * kTile;
      const int64_t rows = std::min(kTile, l_ - begin);
      std::vector<double> dk(static_cast<size_t>(kTile * work.features.dx.stride));
      const Block<double> sum{dk.data(), work.features.dx.stride};
      for (int64_t head = key_head * group_; head < (key_head + 1) * group_; ++head) {
        const auto [b, h] = place(flight, head);
        gradient(false, head, begin, rows, work);
        store(work.features.dx, gradients.q, b, h, begin, rows, dim);
        gradient(true, head, begin, rows, work);
        for (int64_t r = 0; r < rows; ++r) kernels_.add(sum.row(r), work.features.dx.row(r), dim);
      }
      const auto [b, h] = place(flight, key_head * group_);
      store(sum, gradients.k, b, h / group_, begin, rows, dim);
      to_rows(flight.dvalues.from_token(key_head, begin), rows, channels_, work.sums);
      store(work.sums, gradients.v, b, h / group_, begin, rows, e_);
    });
  }

  const Call& call_;
  const RunOptions& run_;
  const kernels::MatrixKernels<double>& kernels_;
  Features<double> features_;
  OffsetWeights<double> weights_;
  kernels::Fft<Real> fft_;
  int64_t l_, e_, channels_, group_, tiles_, stride_, key_heads_;
  std::vector<std::unique_ptr<Work>> works_;
};

}  // namespace

void forward_fft(const Call& call, const Tensor& out, const RunOptions& run) {
  if (call.q.dtype() == DType::f64) {
    Spectral<long double>(call, run).forward(out);
  } else {
    Spectral<double>(call, run).forward(out);
  }
}

void backward_fft(const Call& call, const Tensor& grad_out,
                  const KernelizedRpeGradientViews& gradients, const RunOptions& run) {
  if (call.q.dtype() == DType::f64) {
    Spectral<long double>(call, run).backward(grad_out, gradients);
  } else {
    Spectral<double>(call, run).backward(grad_out, gradients);
  }
}

}  // namespace heed::rpe
