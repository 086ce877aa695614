// Products with Toeplitz matrices by FFT: (T x)[p] = sum_m c[m - p] x[m] over tokens, c the weights of offsets.
#pragma once
#include <complex>
#include <vector>

#include "kernels/fft.h"
#include "mechanisms/kernelized_rpe/call.h"

namespace heed::rpe {

using Row = const double*;  // a number for every token

template <class Real>
inline std::complex<Real> times(
    std::complex<Real> a,
    std::complex<Real> b) {  // without the operator's care for infinities
  return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

template <class Real>
class Toeplitz {
 public:
  using Complex = std::complex<Real>;

  // Sums reach over offsets -span .. span of positions 0 .. span: no wrap meets them.
  explicit Toeplitz(const Call& call) : call_(call), fft_(2 * call.span + 1) {}

  const kernels::Fft<Real>& fft() const { return fft_; }

  /// Scratch of one thread.
  struct Scratch {
    std::vector<Complex> input;  // 0 between tokens
    std::vector<Complex> first, second;
  };

  // Calls body(token, position) for all tokens.
  template <class Body>
  void for_tokens(Body&& body) const {
    for (int64_t token = 0, row = 0; token < call_.tokens; row += call_.pitch) {
      for (int64_t x = 0; x < call_.columns; ++x, ++token) body(token, row + x);
    }
  }

  // The spectrum of the weights as a kernel: entry -o of a circle holds c[o]; 1 / length goes with it.
  void weight_spectrum(const double* weights, bool only_where, Complex* spectrum) const {
    const int64_t n = fft_.length(), span = call_.span;
    std::vector<Complex> circle(static_cast<size_t>(n));
    for (int64_t o = -span; o <= span; ++o) {
      const double c = weights[span + o];
      circle[static_cast<size_t>(o <= 0 ? -o : n - o)] =
          only_where ? (c == 0 ? Real{0} : Real{1}) : Real{c};
    }
    fft_.forward(circle.data(), spectrum);
    const Real factor = 1 / static_cast<Real>(n);
    for (int64_t i = 0; i < n; ++i) spectrum[i] *= factor;
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

  // to = sums over tokens of the weights times x.
  void convolve_row(Row x, const Complex* spectrum, bool transposed, Scratch& work,
                    double* to) const {
    const std::vector<double> ones(static_cast<size_t>(call_.tokens), 1);
    fill(x, ones.data(), nullptr, work.input);
    fft_.forward(work.input.data(), work.first.data());
    convolve(spectrum, transposed, work.first, work.second);
    for_tokens([&](int64_t token, int64_t at) {
      to[token] = static_cast<double>(work.second[static_cast<size_t>(at)].real());
    });
  }

  // Tokens with a weight to or, transposed, from some of those that are 1 and not 0: their number is a sum.
  std::vector<char> meet(const double* weights, std::vector<double> some, bool transposed,
                         Scratch& work) const {
    std::vector<Complex> spectrum(static_cast<size_t>(fft_.length()));
    weight_spectrum(weights, true, spectrum.data());
    convolve_row(some.data(), spectrum.data(), transposed, work, some.data());
    std::vector<char> met(some.size());
    for (size_t i = 0; i < some.size(); ++i) met[i] = some[i] > 0.5;
    return met;
  }

 private:
  const Call& call_;
  kernels::Fft<Real> fft_;
};

}  // namespace heed::rpe
