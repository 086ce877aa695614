// Products of up to three elements of a row, each unordered choice once: the symmetric storage of its
// Kronecker powers.
#pragma once
#include <cstdint>
#include <vector>

#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Monomials x_a x_b x_c with c in [begin, begin + count), which lie together from `first` on; a and b
/// are -1 where the degree is lower. Degree 0 is one monomial with begin = -1.
struct MonomialRun {
  int64_t first = 0;
  int32_t a = -1, b = -1, begin = -1, count = 1;
  int64_t end() const { return first + count; }
};

/// The monomials of `width` elements up to a degree of 3, by degree, then in lexical order of a <= b <= c.
/// Runs do not cross multiples of `tile`.
class MonomialList {
 public:
  MonomialList(int64_t width, int order, int64_t tile);
  int64_t size() const { return size_; }
  int64_t width() const { return width_; }
  /// Runs of [first, first + count), which begins and ends with a tile or with the list.
  const MonomialRun* begin(int64_t first) const;
  const MonomialRun* end() const { return runs_.data() + runs_.size(); }
  /// Of monomial i: its degree and elements.
  struct Factors {
    int degree = 0;
    int64_t element[3] = {};
  };
  std::vector<Factors> factors() const;
  /// degree n: factor^n / (product of factorials of how often each element occurs), so that the sum of
  /// coefficient * monomial(x) * monomial(y) is the sum over n of (factor x . y)^n / n!
  std::vector<double> coefficients(double factor) const;

 private:
  void add(int64_t tile, int32_t a, int32_t b, int32_t begin, int64_t count);
  int64_t width_, size_ = 0;
  std::vector<MonomialRun> runs_;
};

template <class T>
struct MonomialKernels {
  /// to[r] = coefficient * monomial of row r (coefficients by monomial, null: 1) for those of
  /// [first, first + count), and zeros up to to.stride.
  void (*map)(const MonomialList& list, const Rows& x, const T* coefficients, int64_t first,
              int64_t count, Block<T> to) = nullptr;
  /// into[r] += their derivatives with respect to row r, times gradient[r] coefficient.
  void (*pull)(const MonomialList& list, const Rows& x, const T* coefficients, int64_t first,
               int64_t count, Block<const T> gradient, Block<T> into) = nullptr;
};

template <class T>
const MonomialKernels<T>& monomial_kernels(Isa isa);

}  // namespace heed::kernels
