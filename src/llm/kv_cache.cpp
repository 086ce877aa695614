#include "llm/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/huge_pages.h"
#include "base/parallel.h"
#include "heed/error.h"

namespace heed {

KvCache::KvCache(int64_t layers, int64_t kv_heads, int64_t head_dim, DType dtype, int64_t context)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), dtype_(dtype), context_(context) {
  if (dtype != DType::f32 && dtype != DType::bf16) {
    throw Error(std::string("cache: dtype is ") + name_of(dtype) +
                ", float32 or bfloat16 is needed");
  }
  if (context < 1) {
    throw Error("context is " + std::to_string(context) + ", at least 1 token is needed");
  }
}

size_t KvCache::stripe_bytes(int64_t capacity) const {
  return static_cast<size_t>(capacity * head_dim_) * size_of(dtype_);
}

void KvCache::reserve(int64_t tokens) {
  if (tokens > context_) {
    throw Error("context: " + std::to_string(tokens) + " tokens are needed, it holds " +
                std::to_string(context_));
  }
  if (tokens <= capacity_) return;
  int64_t capacity = std::max<int64_t>({tokens, capacity_ + capacity_ / 2, 512});
  capacity = std::min(context_, (capacity + 255) / 256 * 256);
  const size_t stripes = static_cast<size_t>(layers_ * 2 * kv_heads_);
  Pages grown(stripes * stripe_bytes(capacity));
  if (length_ > 0) {
    for (size_t s = 0; s < stripes; ++s) {
      std::memcpy(grown.data() + s * stripe_bytes(capacity),
                  pages_.data() + s * stripe_bytes(capacity_), stripe_bytes(length_));
    }
  }
  pages_ = std::move(grown);
  capacity_ = capacity;
}

void KvCache::populate(int64_t tokens, const RunOptions& run) const {
  const int64_t stripes = layers_ * 2 * kv_heads_;
  const size_t from = stripe_bytes(length_), to = stripe_bytes(std::min(tokens, capacity_));
  if (to <= from) return;
  parallel_for(stripes, threads_for(run, stripes), [&](int64_t s, int) {
    heed::populate(pages_.data() + static_cast<size_t>(s) * stripe_bytes(capacity_) + from,
                   to - from);
  });
}

Tensor KvCache::part(int64_t layer, int64_t which, int64_t length) const {
  std::byte* start = pages_.data() +
                     static_cast<size_t>((layer * 2 + which) * kv_heads_) * stripe_bytes(capacity_);
  const int64_t head = capacity_ * head_dim_;
  return Tensor(start, dtype_, {1, kv_heads_, length, head_dim_},
                {kv_heads_ * head, head, head_dim_, 1});
}

void KvCache::advance(int64_t tokens) {
  reserve(length_ + tokens);
  length_ += tokens;
}

void KvCache::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    throw Error("cache: length is " + std::to_string(length) + ", 0 to " + std::to_string(length_) +
                " is needed");
  }
  length_ = length;
}

}  // namespace heed
