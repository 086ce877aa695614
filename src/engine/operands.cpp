#include "engine/operands.h"

#include <array>
#include <cstdlib>
#include <span>
#include <utility>

namespace heed {

void fail(const char* op, const std::string& found, const std::string& needed) {
  throw Error(std::string(op) + ": " + found + "; " + needed);
}

void check_equal(const char* op, const char* a_name, const Tensor& a, int a_axis,
                 const char* b_name, const Tensor& b, int b_axis, std::string_view what) {
  if (a.size(a_axis) == b.size(b_axis)) return;
  const std::string kind(what);
  fail(op,
       std::string(b_name) + " has " + kind + " " + std::to_string(b.size(b_axis)) + " but " +
           a_name + " has " + std::to_string(a.size(a_axis)) + " (" + describe(a_name, a) + ", " +
           describe(b_name, b) + ")",
       std::string("give ") + a_name + " and " + b_name + " the same " + kind);
}

void check_operand(const char* op, const char* name, const Tensor& t, int rank,
                   std::string_view axes, std::string_view axes_in_words) {
  if (!t.defined()) {
    fail(op, std::string(name) + " is missing", "a tensor " + std::string(axes) + " is needed");
  }
  if (t.rank() != rank) {
    fail(op, describe(name, t) + " has " + std::to_string(t.rank()) + " dimensions",
         std::to_string(rank) + " are needed: " + std::string(axes_in_words));
  }
  if (!is_floating(t.dtype())) {
    fail(op, describe(name, t), "float64, float32, bfloat16 or float16 is needed");
  }
  const int64_t stride = t.strides().back();
  if (t.shape().back() > 1 && stride != 1) {
    fail(op, std::string(name) + " has stride " + std::to_string(stride) + " in its last dimension",
         "a unit stride is needed there (other dimensions may have any)");
  }
}

void check_rows(const char* op, const char* name, const Tensor& t) {
  check_operand(op, name, t, 4, "[B,H,L,D]", "[batch, heads, tokens, head dim]");
}

void check_head_dim(const char* op, const char* name, const Tensor& t, int64_t most) {
  const int64_t dim = t.shape().back();
  if (dim >= 1 && dim <= most) return;
  fail(op, describe(name, t) + " has head dim " + std::to_string(dim),
       most == kAnyHeadDim ? "at least 1 is needed"
                           : "1 to " + std::to_string(most) + " is supported");
}

void check_head_rows(const char* op, const char* name, const Tensor& t, int64_t most) {
  check_rows(op, name, t);
  check_head_dim(op, name, t, most);
}

void check_same_type(const char* op, const char* name, const Tensor& t, const char* like,
                     DType dtype) {
  if (t.dtype() == dtype) return;
  fail(op, describe(name, t) + " but " + like + " is " + name_of(dtype),
       "give all of them one type");
}

void check_result(const char* op, const char* name, const Tensor& given, const Dims& shape,
                  DType dtype) {
  if (!given.defined() || (given.shape() == shape && given.dtype() == dtype)) return;
  fail(op, describe(name, given), to_string(shape) + " " + name_of(dtype) + " is needed");
}

void check_apart(const char* op, const char* name, const Tensor& result) {
  if (!result.defined() || result.count() == 0) return;
  // By stride, each axis has to step over all that those before it reach.
  std::array<std::pair<int64_t, int64_t>, kMaxRank> axes;
  size_t count = 0;
  for (int axis = 0; axis < result.rank(); ++axis) {
    if (result.size(axis) == 1) continue;
    const std::pair next{std::abs(result.stride(axis)), result.size(axis)};
    size_t at = count++;
    for (; at > 0 && axes[at - 1] > next; --at) axes[at] = axes[at - 1];
    axes[at] = next;
  }
  int64_t reach = 0;
  for (const auto& [stride, size] : std::span(axes.data(), count)) {
    if (stride <= reach) {
      fail(op,
           std::string(name) + " " + to_string(result.shape()) + " has strides " +
               to_string(result.strides()) + ", so that elements overlap",
           "each in memory of its own is needed");
    }
    reach += stride * (size - 1);
  }
}

void check_rows_like(const char* op, const char* name, const Tensor& t, const Dims& shape,
                     DType dtype) {
  check_rows(op, name, t);
  check_result(op, name, t, shape, dtype);
}

void check_parameter_gradient(const char* op, const char* name, const Tensor& gradient,
                              const Tensor& parameter) {
  if (!parameter.defined()) fail(op, describe(name, gradient), "there is nothing it belongs to");
  const int last = gradient.rank() - 1;
  if (!(gradient.shape() == parameter.shape()) || gradient.dtype() != parameter.dtype() ||
      (gradient.size(last) > 1 && gradient.stride(last) != 1)) {
    fail(op, describe(name, gradient),
         to_string(parameter.shape()) + " " + name_of(parameter.dtype()) +
             " with a unit stride in the last dimension is needed");
  }
}

void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  const int64_t heads = q.size(1), kv_heads = t.size(1);
  if (kv_heads == 0 ? heads == 0 : heads % kv_heads == 0) return;
  fail(op,
       "q has " + std::to_string(heads) + " heads, " + name + " has " + std::to_string(kv_heads),
       std::string("the heads of q must be a multiple of those of ") + name);
}

void check_decode_queries(const char* op, const Tensor& q) {
  constexpr int64_t kMost = 16;
  if (q.size(2) <= kMost) return;
  fail(op, describe("q", q) + " has " + std::to_string(q.size(2)) + " queries",
       "at most " + std::to_string(kMost) +
           " are supported; flash_attention_varlen takes more, causal to the end of each "
           "sequence as here (flash_attention with lengths stays aligned to all keys of k)");
}

AttentionSizes check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               OperandNames names, int64_t most_dim) {
  check_head_rows(op, "q", q, most_dim);
  for (const auto& [name, t] : {std::pair{names.k, &k}, std::pair{names.v, &v}}) {
    check_head_rows(op, name, *t, most_dim);
    check_same_type(op, name, *t, "q", q.dtype());
  }
  check_equal(op, "q", q, 0, names.k, k, 0, "batch size");
  check_equal(op, "q", q, 3, names.k, k, 3, "head dim");
  check_equal(op, names.k, k, 0, names.v, v, 0, "batch size");
  check_equal(op, names.k, k, 1, names.v, v, 1, "number of heads");
  check_equal(op, names.k, k, 2, names.v, v, 2, "number of keys");
  check_heads(op, names.k, k, q);
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
}

std::vector<int64_t> read_lengths(const char* op, const Tensor& lengths, int64_t batch,
                                  int64_t tokens) {
  const bool short_numbers = lengths.dtype() == DType::i32;
  if (lengths.rank() != 1 || lengths.size(0) != batch ||
      !(short_numbers || lengths.dtype() == DType::i64)) {
    fail(op, describe("lengths", lengths),
         "[B] = [" + std::to_string(batch) + "] of int32 or int64 is needed");
  }
  std::vector<int64_t> values;
  for (int64_t b = 0; b < batch; ++b) {
    const std::byte* p = lengths.at({b});
    values.push_back(short_numbers ? *reinterpret_cast<const int32_t*>(p)
                                   : *reinterpret_cast<const int64_t*>(p));
    if (values.back() < 0 || values.back() > tokens) {
      fail(op, "lengths[" + std::to_string(b) + "] is " + std::to_string(values.back()),
           "0 to " + std::to_string(tokens) + " is needed, the number of keys");
    }
  }
  return values;
}

}  // namespace heed
