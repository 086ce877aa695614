#include "cascade/kernels.h"

#include <cmath>
#include <limits>
#include <numbers>

namespace heed::cascade {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class F>
void map2(F f, const double* a, bool uniform_a, const double* b, bool uniform_b, double* out,
          int lanes) {
  if (uniform_a && uniform_b) {
    for (int l = 0; l < lanes; ++l) out[l] = f(a[0], b[0]);
  } else if (uniform_a) {
    const double x = a[0];
    for (int l = 0; l < lanes; ++l) out[l] = f(x, b[l]);
  } else if (uniform_b) {
    const double y = b[0];
    for (int l = 0; l < lanes; ++l) out[l] = f(a[l], y);
  } else {
    for (int l = 0; l < lanes; ++l) out[l] = f(a[l], b[l]);
  }
}

template <class F>
void map1(F f, const double* a, double* out, int lanes) {
  for (int l = 0; l < lanes; ++l) out[l] = f(a[l]);
}

inline double difference(double a, double b) { return a == -kInf && b == -kInf ? -kInf : a - b; }
inline double quotient(double a, double b) { return a == 0 && b == 0 ? 0.0 : a / b; }
inline double larger(double a, double b) { return a >= b || std::isnan(a) ? a : b; }
inline double smaller(double a, double b) { return a <= b || std::isnan(a) ? a : b; }

/// A product in which a vanishing derivative stops an infinite adjoint.
double times(double adjoint, double derivative) {
  if (adjoint == 0 && std::isinf(derivative)) return 0;
  if (derivative == 0 && std::isinf(adjoint)) return 0;
  return adjoint * derivative;
}

double power_slope(int which, double a, double b, double y) {
  if (which == 0) return b == 0 ? 0.0 : b * std::pow(a, b - 1);
  return a == 0 && b > 0 ? 0.0 : y * std::log(a);
}

double gelu_slope(double x) {
  const double density = std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
  return 0.5 * std::erfc(-x / std::numbers::sqrt2) + (density == 0 ? 0.0 : x * density);
}

}  // namespace

double subtract(double a, double b) { return difference(a, b); }
double divide(double a, double b) { return quotient(a, b); }
double maximum(double a, double b) { return larger(a, b); }
double minimum(double a, double b) { return smaller(a, b); }

double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const double e = std::exp(x);
  return e / (1 + e);
}

double gelu(double x) { return x == -kInf ? 0.0 : 0.5 * x * std::erfc(-x / std::numbers::sqrt2); }

bool compare(Compare how, double a, double b) {
  switch (how) {
    case Compare::less:
      return a < b;
    case Compare::less_equal:
      return a <= b;
    case Compare::greater:
      return a > b;
    case Compare::greater_equal:
      return a >= b;
    case Compare::equal:
      return a == b;
    case Compare::not_equal:
      return a != b;
  }
  return false;
}

void binary(Op op, const double* a, bool uniform_a, const double* b, bool uniform_b, double* out,
            int lanes) {
  const auto run = [&](auto f) { map2(f, a, uniform_a, b, uniform_b, out, lanes); };
  switch (op) {
    case Op::add:
      return run([](double x, double y) { return x + y; });
    case Op::subtract:
      return run(difference);
    case Op::multiply:
      return run([](double x, double y) { return x * y; });
    case Op::divide:
      return run(quotient);
    case Op::power:
      return run([](double x, double y) { return std::pow(x, y); });
    case Op::max:
      return run(larger);
    default:
      return run(smaller);
  }
}

void unary(Op op, const double* a, double* out, int lanes) {
  const auto run = [&](auto f) { map1(f, a, out, lanes); };
  switch (op) {
    case Op::negate:
      return run([](double x) { return -x; });
    case Op::exp:
      return run([](double x) { return std::exp(x); });
    case Op::log:
      return run([](double x) { return std::log(x); });
    case Op::tanh:
      return run([](double x) { return std::tanh(x); });
    case Op::sigmoid:
      return run(sigmoid);
    case Op::sqrt:
      return run([](double x) { return std::sqrt(x); });
    case Op::cos:
      return run([](double x) { return std::cos(x); });
    case Op::sin:
      return run([](double x) { return std::sin(x); });
    case Op::relu:
      return run([](double x) { return x < 0 ? 0.0 : x; });
    case Op::gelu:
      return run(gelu);
    default:
      return run([](double x) { return std::abs(x); });
  }
}

double pull_back(Op op, int which, double a, double b, double y, double adjoint) {
  switch (op) {
    case Op::negate:
      return -adjoint;
    case Op::add:
      return adjoint;
    case Op::subtract:
      return which == 0 ? adjoint : -adjoint;
    case Op::multiply:
      return times(adjoint, which == 0 ? b : a);
    case Op::divide:
      if (a == 0 && b == 0) return 0;
      return which == 0 ? times(adjoint, 1 / b) : times(adjoint, -y / b);
    case Op::power:
      return times(adjoint, power_slope(which, a, b, y));
    case Op::max:
      if (y == -kInf) return 0;
      return (a >= b || std::isnan(a)) == (which == 0) ? adjoint : 0;
    case Op::min:
      if (y == kInf) return 0;
      return (a <= b || std::isnan(a)) == (which == 0) ? adjoint : 0;
    case Op::exp:
      return times(adjoint, y);
    case Op::log:
      return a == 0 ? 0 : times(adjoint, 1 / a);
    case Op::tanh:
      return times(adjoint, 1 - y * y);
    case Op::sigmoid:
      return times(adjoint, y * (1 - y));
    case Op::sqrt:
      return times(adjoint, 0.5 / y);
    case Op::cos:
      return times(adjoint, -std::sin(a));
    case Op::sin:
      return times(adjoint, std::cos(a));
    case Op::relu:
      return std::isnan(a) ? times(adjoint, a) : a > 0 ? adjoint : 0;
    case Op::gelu:
      return times(adjoint, gelu_slope(a));
    case Op::abs:
      return std::isnan(a) ? times(adjoint, a) : a > 0 ? adjoint : a < 0 ? -adjoint : 0;
    default:
      return 0;
  }
}

}  // namespace heed::cascade
