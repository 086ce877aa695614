// Complex discrete Fourier transforms.
#pragma once
#include <complex>
#include <cstdint>
#include <memory>

namespace heed::kernels {

/// The least length from `at_least` on that has the prime factors 2, 3 and 5 only.
int64_t good_fft_length(int64_t at_least);

/// Transforms of one length, both directions, out of place and without scaling: inverse(forward(x)) is
/// length times x. May be used by many threads at once. Real is double or long double.
template <class Real>
class Fft {
 public:
  /// The length becomes the next good one, at least 2.
  explicit Fft(int64_t length);
  ~Fft();
  Fft(const Fft&) = delete;
  Fft& operator=(const Fft&) = delete;
  int64_t length() const { return length_; }
  void forward(const std::complex<Real>* in, std::complex<Real>* out) const;
  void inverse(const std::complex<Real>* in, std::complex<Real>* out) const;

 private:
  struct Plans;
  int64_t length_;
  std::unique_ptr<const Plans> plans_;
};

}  // namespace heed::kernels
