// Permutations of a call, and moving rows along them.
#pragma once
#include <cstdint>
#include <vector>

#include "heed/tensor.h"

namespace heed {

class SlotOrder {
 public:
  /// Throws Error unless `permutation` is int64 [L], [H,L] or [B,H,L] and a permutation along its last
  /// axis.
  SlotOrder(const char* op, const Tensor& permutation, int64_t batch, int64_t heads,
            int64_t tokens);

  /// False: all heads of a batch entry have the same order.
  bool per_head() const { return heads_ > 1; }
  /// The slot of every token, and the token in every slot.
  const int32_t* slots(int64_t batch, int64_t head) const {
    return slots_.data() + offset(batch, head);
  }
  const int32_t* tokens(int64_t batch, int64_t head) const {
    return tokens_.data() + offset(batch, head);
  }

 private:
  int64_t offset(int64_t batch, int64_t head) const {
    return ((batches_ > 1 ? batch : 0) * heads_ + (heads_ > 1 ? head : 0)) * length_;
  }

  int64_t batches_ = 1, heads_ = 1, length_ = 0;
  std::vector<int32_t> slots_, tokens_;
};

/// to[i] = from[index[i]] for rows i in [begin, end) of [L,width], of one type and a unit stride.
void gather_rows(const Tensor& from, const int32_t* index, const Tensor& to, int64_t begin,
                 int64_t end);

}  // namespace heed
