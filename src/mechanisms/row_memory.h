// Memory for the copies that one part of a call needs, used again for the next part.
#pragma once
#include <cassert>
#include <cstdint>

#include "heed/tensor.h"

namespace heed {

class RowMemory {
 public:
  explicit RowMemory(int64_t bytes) : bytes_(DType::boolean, {bytes}) {}
  /// What `take` uses of it.
  static int64_t bytes_of(DType dtype, int64_t elements) {
    return (elements * static_cast<int64_t>(size_of(dtype)) + 63) / 64 * 64;
  }
  Tensor take(DType dtype, const Dims& shape) {
    const int64_t bytes = bytes_of(dtype, element_count(shape));
    assert(used_ + bytes <= bytes_.count());
    std::byte* begin = bytes_.view().at({used_});
    used_ += bytes;
    return {begin, dtype, shape};
  }
  void reset() { used_ = 0; }

 private:
  Array bytes_;
  int64_t used_ = 0;
};

}  // namespace heed
