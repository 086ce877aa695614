#include "kernels/fft.h"

#include <algorithm>
#include <kissfft/kissfft.hh>

namespace heed::kernels {

int64_t good_fft_length(int64_t at_least) {
  int64_t best = 1;
  while (best < at_least) best *= 2;
  for (int64_t fives = 1; fives < best; fives *= 5) {
    for (int64_t threes = fives; threes < best; threes *= 3) {
      int64_t length = threes;
      while (length < at_least) length *= 2;
      best = std::min(best, length);
    }
  }
  return best;
}

// kissfft keeps scratch memory for radices above 5 only: with good lengths transforms change nothing.
template <class Real>
struct Fft<Real>::Plans {
  kissfft<Real> forward, inverse;
  explicit Plans(int64_t length)
      : forward(static_cast<size_t>(length), false), inverse(static_cast<size_t>(length), true) {}
};

template <class Real>
Fft<Real>::Fft(int64_t length)
    // A transform of one number takes kissfft's path of odd radices, into scratch it does not have.
    : length_(good_fft_length(std::max<int64_t>(length, 2))),
      plans_(std::make_unique<const Plans>(length_)) {}
template <class Real>
Fft<Real>::~Fft() = default;

template <class Real>
void Fft<Real>::forward(const std::complex<Real>* in, std::complex<Real>* out) const {
  plans_->forward.transform(in, out);
}

template <class Real>
void Fft<Real>::inverse(const std::complex<Real>* in, std::complex<Real>* out) const {
  plans_->inverse.transform(in, out);
}

template class Fft<double>;
template class Fft<long double>;

}  // namespace heed::kernels
