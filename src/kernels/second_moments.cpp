#include "kernels/second_moments.h"

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/second_moments.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/by_isa.h"
#include "kernels/parts.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using D = Full<double>;
using V = hn::Vec<D>;
constexpr int64_t kLanes = lanes<double>();
static_assert(kMomentPad % kLanes == 0);

constexpr int64_t whole_vectors_before(int64_t column) { return column / kLanes * kLanes; }

// Columns [0, NV vectors) of row `a` of MR matrices; `keys` and `moments` point at the first column.
template <int MR, int NV>
HWY_NOINLINE void moment_block(Block<const double> weights, const double* factors,
                               Block<const double> keys, int64_t key_count, const double* carry,
                               Block<double> moments) {
  const D d;
  V sum[MR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
    const V c = hn::Set(d, carry == nullptr ? 1.0 : carry[r]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      sum[r][j] = hn::Mul(c, hn::LoadU(d, moments.row(r) + j * kLanes));
    }
  }
  for (int64_t m = 0; m < key_count; ++m) {
    const V factor = hn::Set(d, factors[m * keys.stride]);
    V column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      column[j] = hn::Mul(factor, hn::LoadU(d, keys.row(m) + j * kLanes));
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
      const V w = hn::Set(d, weights.row(r)[m]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = hn::MulAdd(w, column[j], sum[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) hn::StoreU(sum[r][j], d, moments.row(r) + j * kLanes);
  }
}

template <int MR>
void moments_of_rows(Block<const double> weights, Block<const double> keys, int64_t key_count,
                     int64_t width, const double* carry, double* moments) {
  const int64_t matrix = width * keys.stride;
  for (int64_t a = 0; a < width; ++a) {
    const double* factors = keys.data + a;
    for (int64_t column = whole_vectors_before(a); column < width;) {
      const int64_t vectors = (width - column + kLanes - 1) / kLanes;
      const Block<const double> right{keys.data + column, keys.stride};
      const Block<double> to{moments + a * keys.stride + column, matrix};
      const auto run = [&](auto count) {
        moment_block<MR, count>(weights, factors, right, key_count, carry, to);
        column += count * kLanes;
      };
      if constexpr (kPanelVectors == 4) {
        if (vectors >= 4) {
          run(std::integral_constant<int, 4>());
          continue;
        }
      }
      if (vectors >= 2) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
    }
  }
}

void add_moments(Block<const double> weights, int64_t rows, Block<const double> keys,
                 int64_t key_count, int64_t width, const double* carry, double* moments) {
  const auto blocks = [&](auto height, int64_t r) {
    for (; r + height <= rows; r += height) {
      moments_of_rows<height>({weights.row(r), weights.stride}, keys, key_count, width,
                              carry == nullptr ? nullptr : carry + r,
                              moments + r * width * keys.stride);
    }
    return r;
  };
  int64_t done = blocks(std::integral_constant<int, 6>(), 0);
  done = blocks(std::integral_constant<int, 3>(), done);
  blocks(std::integral_constant<int, 1>(), done);
}

// Row i of the factor: a row of the matrix less what earlier rows explain of it.
void factorize(Block<double> a, int64_t n, double least) {
  constexpr int64_t kStep = 4;
  const D d;
  for (int64_t i = 0; i < n; ++i) {
    double* row = a.row(i);
    const int64_t begin = whole_vectors_before(i), end = round_up(n, kLanes);
    for (int64_t c = begin; c < end; c += kStep * kLanes) {
      const int64_t vectors = HWY_MIN(kStep, (end - c) / kLanes);
      V rest[kStep];
      for (int64_t j = 0; j < vectors; ++j) rest[j] = hn::LoadU(d, row + c + j * kLanes);
      for (int64_t k = 0; k < i; ++k) {
        const V factor = hn::Set(d, a.row(k)[i]);
        for (int64_t j = 0; j < vectors; ++j) {
          rest[j] = hn::NegMulAdd(factor, hn::LoadU(d, a.row(k) + c + j * kLanes), rest[j]);
        }
      }
      for (int64_t j = 0; j < vectors; ++j) hn::StoreU(rest[j], d, row + c + j * kLanes);
    }
    const double pivot = std::sqrt(row[i] < least ? least : row[i]);  // NaN stays NaN
    const V inverse = hn::Set(d, 1 / pivot);
    for (int64_t c = begin; c < end; c += kLanes) {
      hn::StoreU(hn::Mul(inverse, hn::LoadU(d, row + c)), d, row + c);
    }
    row[i] = pivot;
  }
}

// Lanes of the vector at column c that lie at columns up to i.
HWY_INLINE hn::Mask<D> up_to(int64_t i, int64_t c) {
  return hn::FirstN(D(), static_cast<size_t>(HWY_MAX(i + 1 - c, int64_t{0})));
}

void solve(Block<const double> factor, int64_t n, double* x) {
  const D d;
  const int64_t end = round_up(n, kLanes);
  for (int64_t i = 0; i < n; ++i) {  // U^T y = x
    const double* row = factor.row(i);
    x[i] /= row[i];
    const V y = hn::Set(d, x[i]);
    for (int64_t c = whole_vectors_before(i); c < end; c += kLanes) {
      const V product = hn::Mul(y, hn::LoadU(d, row + c));
      const V change = hn::IfThenZeroElse(up_to(i, c), product);
      hn::StoreU(hn::Sub(hn::LoadU(d, x + c), change), d, x + c);
    }
  }
  for (int64_t i = n - 1; i >= 0; --i) {  // U z = y
    const double* row = factor.row(i);
    V sum = hn::Zero(d);
    for (int64_t c = whole_vectors_before(i); c < end; c += kLanes) {
      const V product = hn::Mul(hn::LoadU(d, row + c), hn::LoadU(d, x + c));
      sum = hn::Add(sum, hn::IfThenZeroElse(up_to(i, c), product));
    }
    x[i] = (x[i] - hn::GetLane(hn::SumOfLanes(d, sum))) / row[i];
  }
}

}  // namespace

SecondMomentKernels make_second_moments() { return {&add_moments, &factorize, &solve}; }

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {

HEED_TABLE(SecondMomentKernels, second_moment_kernels, make_second_moments)

}  // namespace heed::kernels
#endif  // HWY_ONCE
