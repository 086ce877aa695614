#include <cmath>
#include <string>

#include "engine/chunked/problem.h"
#include "heed/error.h"

namespace heed::chunked {

namespace {

[[noreturn]] void fail(const char* op, const std::string& found, const std::string& needed) {
  throw Error(std::string(op) + ": " + found + "; " + needed);
}

void check_rows(const char* op, const char* name, const Tensor& t, DType dtype) {
  if (!t.defined()) fail(op, std::string(name) + " is missing", "a tensor [B,H,L,D] is needed");
  if (t.rank() != 4) {
    fail(op, describe(name, t) + " has " + std::to_string(t.rank()) + " dimensions",
         "4 are needed: [batch, heads, tokens, head dim]");
  }
  if (!is_floating(t.dtype())) {
    fail(op, describe(name, t), "float64, float32, bfloat16 or float16 is needed");
  }
  if (t.dtype() != dtype) {
    fail(op, describe(name, t) + " but q is " + name_of(dtype), "give all of them one type");
  }
  if (t.size(3) > 1 && t.stride(3) != 1) {
    fail(
        op,
        std::string(name) + " has stride " + std::to_string(t.stride(3)) + " in its last dimension",
        "a unit stride is needed there (other dimensions may have any)");
  }
  if (t.size(3) < 1) fail(op, describe(name, t) + " has head dim 0", "at least 1 is needed");
}

void check_equal(const char* op, const Tensor& a, const char* a_name, const Tensor& b,
                 const char* b_name, int axis, const char* what) {
  if (a.size(axis) == b.size(axis)) return;
  fail(op,
       std::string(b_name) + " has " + what + " " + std::to_string(b.size(axis)) + " but " +
           a_name + " has " + std::to_string(a.size(axis)) + " (" + describe(a_name, a) + ", " +
           describe(b_name, b) + ")",
       std::string("give ") + a_name + " and " + b_name + " the same " + what);
}

std::string in_brackets(const char* axis, int64_t size) {
  return std::string("[") + axis + "] = [" + std::to_string(size) + "]";
}

int64_t whole_number(const Tensor& t, int64_t i) {
  const std::byte* p = t.at({i});
  return t.dtype() == DType::i32 ? *reinterpret_cast<const int32_t*>(p)
                                 : *reinterpret_cast<const int64_t*>(p);
}

}  // namespace

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows(op, "q", q, q.dtype());
  check_rows(op, "k", k, q.dtype());
  check_rows(op, "v", v, q.dtype());
  check_equal(op, q, "q", k, "k", 0, "batch size");
  check_equal(op, q, "q", k, "k", 3, "head dim");
  check_equal(op, k, "k", v, "v", 0, "batch size");
  check_equal(op, k, "k", v, "v", 1, "number of heads");
  check_equal(op, k, "k", v, "v", 2, "number of keys");
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0) {
    fail(op, "q has " + std::to_string(heads) + " heads, k and v have " + std::to_string(kv_heads),
         "the heads of q must be a multiple of those of k and v");
  }
}

void check_result(const char* op, const char* name, const Tensor& given, const Dims& shape,
                  DType type) {
  if (!given.defined()) return;
  if (!(given.shape() == shape) || given.dtype() != type) {
    fail(op, describe(name, given), to_string(shape) + " " + name_of(type) + " is needed");
  }
}

void check_out(const char* op, const char* name, const Tensor& given, const Dims& shape,
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

std::vector<double> check_slopes(const char* op, const Tensor& slopes, int64_t heads) {
  if (slopes.rank() != 1 || slopes.size(0) != heads || !is_floating(slopes.dtype())) {
    fail(op, describe("slopes", slopes),
         in_brackets("H", heads) + " of a floating type is needed, one per query head");
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

std::vector<int64_t> check_lengths(const char* op, const Tensor& lengths, int64_t batch,
                                   int64_t tokens) {
  if (!lengths.defined()) return {};
  const bool whole = lengths.dtype() == DType::i32 || lengths.dtype() == DType::i64;
  if (lengths.rank() != 1 || lengths.size(0) != batch || !whole) {
    fail(op, describe("lengths", lengths),
         in_brackets("B", batch) + " of int32 or int64 is needed");
  }
  std::vector<int64_t> values;
  for (int64_t b = 0; b < batch; ++b) {
    values.push_back(whole_number(lengths, b));
    if (values.back() < 0 || values.back() > tokens) {
      fail(op, "lengths[" + std::to_string(b) + "] is " + std::to_string(values.back()),
           "0 to " + std::to_string(tokens) + " is needed, the number of keys");
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
