#include <cmath>
#include <string>

#include "engine/chunked/problem.h"
#include "heed/error.h"

namespace heed::chunked {

namespace {

void check_like(const char* op, const char* name, const Tensor& given, const Dims& shape,
                DType type) {
  check_result(op, name, given, shape, type);
  const int last = given.rank() - 1;
  if (given.defined() && given.size(last) > 1 && given.stride(last) != 1) {
    fail(op,
         std::string(name) + " has stride " + std::to_string(given.stride(last)) +
             " in its last dimension",
         "a unit stride is needed there");
  }
}

void check_out_like(const char* op, const char* name, const Tensor& out, const Tensor& q,
                    const Tensor& v) {
  if (!out.defined()) throw Error(std::string(op) + ": " + name + " is missing");
  check_like(op, name, out, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.dtype());
}

}  // namespace

void check_out(const char* op, const Tensor& out, const Tensor& q, const Tensor& v) {
  check_out_like(op, "out", out, q, v);
  check_apart(op, "out", out);
}

void check_gradients(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& out_gradient, const InputGradients& to) {
  check_out_like(op, "out_gradient", out_gradient, q, v);
  const auto check = [&](const char* name, const Tensor& gradient, const Tensor& input) {
    check_like(op, name, gradient, input.shape(), input.dtype());
    check_apart(op, name, gradient);
  };
  check("gradient of q", to.q, q);
  check("gradient of k", to.k, k);
  check("gradient of v", to.v, v);
}

Dims sums_shape(const Tensor& q, const Tensor& v, int64_t features) {
  return {q.size(0), q.size(1), features, v.size(3)};
}
Dims key_sums_shape(const Tensor& q, int64_t features) { return {q.size(0), q.size(1), features}; }

void check_sums(const char* op, const std::string& of, const Tensor& s, const Tensor& z,
                const Tensor& q, const Tensor& v, int64_t features) {
  const DType type = wide_type(q.dtype());
  check_result(op, (of + " s").c_str(), s, sums_shape(q, v, features), type);
  check_result(op, (of + " z").c_str(), z, key_sums_shape(q, features), type);
}

std::vector<double> check_slopes(const char* op, const Tensor& slopes, int64_t heads) {
  if (slopes.rank() != 1 || slopes.size(0) != heads || !is_floating(slopes.dtype())) {
    fail(op, describe("slopes", slopes),
         "[H] = [" + std::to_string(heads) + "] of a floating type is needed, one per query head");
  }
  const Array exact = convert(slopes, DType::f64);
  std::vector<double> values(exact.as<double>(), exact.as<double>() + heads);
  for (int64_t h = 0; h < heads; ++h) {
    const double slope = values[static_cast<size_t>(h)];
    if (!std::isfinite(slope) || slope < 0) {
      fail(op, "slopes[" + std::to_string(h) + "] is " + std::to_string(slope),
           "a finite number that is not negative is needed: the decay is exp(-slope) a token");
    }
  }
  return values;
}

void check_alignment(const char* op, bool causal, bool has_state, int64_t queries, int64_t keys) {
  if (!causal || !has_state || queries <= keys) return;
  fail(op,
       "an initial state with " + std::to_string(queries) + " queries and " + std::to_string(keys) +
           " keys",
       "at most as many queries as keys: the first ones would see a part of the state");
}

}  // namespace heed::chunked
