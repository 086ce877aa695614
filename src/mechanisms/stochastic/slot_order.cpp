#include "mechanisms/stochastic/slot_order.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "base/philox.h"
#include "engine/operands.h"
#include "heed/stochastic_attention.h"

namespace heed {

SlotOrder::SlotOrder(const char* op, const Tensor& permutation, int64_t batch, int64_t heads,
                     int64_t tokens)
    : length_(tokens) {
  const Dims shared{tokens}, of_heads{heads, tokens}, of_batch{batch, heads, tokens};
  const bool fits = permutation.dtype() == DType::i64 &&
                    (permutation.shape() == shared || permutation.shape() == of_heads ||
                     permutation.shape() == of_batch);
  if (!permutation.defined() || !fits) {
    fail(op, describe("permutation", permutation),
         to_string(shared) + ", " + to_string(of_heads) + " or " + to_string(of_batch) +
             " int64 is needed");
  }
  if (tokens > std::numeric_limits<int32_t>::max()) {
    fail(op, "q has " + std::to_string(tokens) + " tokens", "at most 2^31 - 1 are supported");
  }
  if (permutation.rank() >= 2) heads_ = heads;
  if (permutation.rank() == 3) batches_ = batch;
  const auto count = static_cast<size_t>(permutation.count());
  slots_.resize(count);
  tokens_.assign(count, -1);
  for (size_t n = 0; n < count; ++n) {
    const auto at = static_cast<int64_t>(n);
    const int64_t i = at % tokens, row = at / tokens;
    const std::byte* p = permutation.rank() == 1   ? permutation.at({i})
                         : permutation.rank() == 2 ? permutation.at({row, i})
                                                   : permutation.at({row / heads, row % heads, i});
    const int64_t slot = *reinterpret_cast<const int64_t*>(p);
    if (slot < 0 || slot >= tokens) {
      fail(op, "permutation has slot " + std::to_string(slot) + " for token " + std::to_string(i),
           "slots from 0 to " + std::to_string(tokens - 1) + " are needed");
    }
    int32_t& token = tokens_[static_cast<size_t>(row * tokens + slot)];
    if (token >= 0) {
      fail(op,
           "permutation gives tokens " + std::to_string(token) + " and " + std::to_string(i) +
               " slot " + std::to_string(slot),
           "a permutation is needed: every slot once");
    }
    token = static_cast<int32_t>(i);
    slots_[n] = static_cast<int32_t>(slot);
  }
}

void gather_rows(const Tensor& from, const int32_t* index, const Tensor& to, int64_t begin,
                 int64_t end) {
  constexpr int64_t kAhead = 12, kLine = 64;
  const auto element = static_cast<int64_t>(size_of(from.dtype()));
  const int64_t bytes = from.size(1) * element, from_step = from.stride(0) * element;
  const std::byte* source = from.at({});
  std::byte* target = to.at({begin});
  for (int64_t i = begin; i < end; ++i, target += to.stride(0) * element) {
    if (i + kAhead < end) {
      const std::byte* later = source + index[i + kAhead] * from_step;
      for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(later + b);
    }
    std::memcpy(target, source + index[i] * from_step, static_cast<size_t>(bytes));
  }
}

namespace {

/// Numbers of one stream, uniform below a bound (Lemire, "Fast random integer generation in an
/// interval", 2019).
class Uniform {
 public:
  Uniform(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}
  uint32_t below(uint32_t bound) {
    uint64_t product = uint64_t{next()} * bound;
    const uint32_t least = -bound % bound;
    while (static_cast<uint32_t>(product) < least) product = uint64_t{next()} * bound;
    return static_cast<uint32_t>(product >> 32);
  }

 private:
  uint32_t next() {
    if (used_ % 4 == 0) {
      const uint64_t block = used_ / 4;
      words_ =
          philox(seed_, {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                         static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)});
    }
    return words_[used_++ % 4];
  }

  uint64_t seed_, stream_, used_ = 0;
  std::array<uint32_t, 4> words_{};
};

}  // namespace

Array random_permutation(uint64_t seed, const Dims& shape) {
  constexpr const char* kOp = "random_permutation";
  if (shape.rank() == 0) fail(kOp, "shape is []", "at least one axis is needed: [L]");
  for (int axis = 0; axis < shape.rank(); ++axis) {
    if (shape[axis] < 0) fail(kOp, "shape is " + to_string(shape), "no extent may be negative");
  }
  const int64_t length = shape.back(), count = element_count(shape);
  if (length > std::numeric_limits<int32_t>::max()) {
    fail(kOp, "shape is " + to_string(shape), "at most 2^31 - 1 tokens are supported");
  }
  Array result(DType::i64, shape);
  const int64_t rows = length == 0 ? 0 : count / length;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* slots = result.as<int64_t>() + row * length;
    for (int64_t i = 0; i < length; ++i) slots[i] = i;
    Uniform uniform(seed, static_cast<uint64_t>(row));
    for (int64_t i = length - 1; i > 0; --i) {
      std::swap(slots[i], slots[uniform.below(static_cast<uint32_t>(i + 1))]);
    }
  }
  return result;
}

}  // namespace heed
