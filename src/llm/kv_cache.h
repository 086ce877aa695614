// Keys and values of the tokens so far, per layer.
#pragma once
#include <cstdint>

#include "heed/run.h"
#include "heed/tensor.h"
#include "llm/pages.h"

namespace heed {

/// Memory [layers, 2, kv_heads, capacity, head_dim] in one block. The capacity starts small and grows
/// by half when it is used up, to at most the context, so memory follows the tokens there are.
class KvCache {
 public:
  /// layers: those that need it, also none. dtype: float32 or bfloat16. context: tokens that may ever
  /// be held.
  KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, DType dtype, int64_t context);

  DType dtype() const { return dtype_; }
  int64_t context() const { return context_; }
  int64_t length() const { return length_; }
  int64_t capacity() const { return capacity_; }
  size_t bytes() const { return pages_.size(); }

  /// Room for `tokens` in all. Throws Error when that is more than the context. Moves the memory.
  void reserve(int64_t tokens);
  /// Fetches, by all threads, the memory of positions [length(), tokens) of that room.
  void populate(int64_t tokens, const RunOptions& run) const;
  /// Keys and values for positions [0, length): [1, kv_heads, length, head_dim], length <= capacity.
  Tensor keys(int64_t layer, int64_t length) const { return part(layer, 0, length); }
  Tensor values(int64_t layer, int64_t length) const { return part(layer, 1, length); }
  /// Declares that the next `tokens` positions of every layer are filled.
  void advance(int64_t tokens);
  /// Forgets what comes after the first `length` tokens.
  void truncate(int64_t length);

 private:
  Tensor part(int64_t layer, int64_t which, int64_t length) const;
  size_t stripe_bytes(int64_t capacity) const;  // of one head's keys

  int64_t layers_, kv_heads_, head_dim_;
  DType dtype_;
  int64_t context_;
  int64_t length_ = 0;
  int64_t capacity_ = 0;
  Pages pages_;
};

}  // namespace heed
