#include "mechanisms/flash/terms.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "base/parallel.h"
#include "base/round_up.h"
#include "kernels/row_maps.h"

namespace heed {

namespace {

using kernels::Block;
using tiled::TileAt;
using tiled::Visit;

constexpr const char* kOp = "flash_attention";

// Strides over `shape` of a tensor with axes of one element where it is broadcast: 0 there. Axes are
// matched from the last.
Dims broadcast_strides(const char* name, const Tensor& t, const Dims& given, const Dims& shape) {
  const int missing = shape.rank() - t.rank();
  Dims strides = shape;
  bool fits = missing >= 0;
  for (int axis = 0; fits && axis < shape.rank(); ++axis) {
    const int64_t size = axis < missing ? 1 : t.size(axis - missing);
    fits = size == shape[axis] || size == 1;
    strides[axis] = size == 1 ? 0 : given[axis - missing];
  }
  if (!fits) {
    fail(kOp, describe(name, t), "a shape that broadcasts to " + to_string(shape) + " is needed");
  }
  return strides;
}

Tensor broadcast(const char* name, const Tensor& t, const Dims& shape) {
  return Tensor(t.data(), t.dtype(), shape, broadcast_strides(name, t, t.strides(), shape));
}

template <class T, class Wide>
T bounded(Wide bias) {
  using Common = std::common_type_t<T, Wide>;
  constexpr auto most = static_cast<Common>(tiled::kMostTerm<T>);
  const Common x = bias;
  // What is infinite or NaN passes.
  const bool finite = std::abs(bias) <= std::numeric_limits<Wide>::max();
  return static_cast<T>(finite && x > most ? most : finite && x < -most ? -most : x);
}

// Loops over the usual stride of 1 become vector code.
template <class Body>
void for_stride(int64_t stride, const Body& body) {
  if (stride == 1) {
    body(std::integral_constant<int64_t, 1>());
  } else {
    body(stride);
  }
}

template <class From, class T>
void add_strided(const Tensor& bias, const TileAt& at, Block<T> s) {
  for (int64_t r = 0; r < at.rows; ++r) {
    const auto* row =
        reinterpret_cast<const From*>(bias.at({at.sequence, at.head, at.row + r, at.key}));
    for (int64_t m = 0; m < at.keys; ++m) {
      const From& x = row[m * bias.stride(3)];
      if constexpr (std::is_floating_point_v<From>) {
        s.row(r)[m] += bounded<T>(x);
      } else {
        s.row(r)[m] += bounded<T>(to_float(x));
      }
    }
  }
}

}  // namespace

FlashTerms::FlashTerms(const FlashOptions& options, const Dims& scores, DType type,
                       const RunOptions& run)
    : run_(run), isa_(chosen_isa(run)) {
  if (options.mask.defined()) {
    if (options.mask.dtype() != DType::boolean) {
      fail(kOp, describe("mask", options.mask),
           "booleans are needed (true = attend); additive masks are `bias`");
    }
    mask_ = broadcast("mask", options.mask, scores);
  }
  if (options.bias.defined()) {
    if (!is_floating(options.bias.dtype())) {
      fail(kOp, describe("bias", options.bias),
           "a floating type is needed; boolean masks are `mask`");
    }
    bias_ = broadcast("bias", options.bias, scores);
    bias_shape_ = options.bias.shape();
    bias_strides_ =
        broadcast_strides("bias", options.bias, contiguous_strides(bias_shape_), scores);
    stores_ = options.bias.count() == bias_.count() && scores[3] > 1 &&
              wide_type(options.bias.dtype()) == wide_type(type);
  }
  if (!options.block_mask.defined()) return;
  const Tensor& blocks = options.block_mask;
  block_rows_ = options.block_size[0];
  block_keys_ = options.block_size[1];
  if (block_rows_ < 1 || block_keys_ < 1) {
    fail(kOp,
         "block_size is (" + std::to_string(block_rows_) + ", " + std::to_string(block_keys_) + ")",
         "positive numbers are needed");
  }
  const Dims wanted{scores[1], ceil_div(scores[2], block_rows_), ceil_div(scores[3], block_keys_)};
  const bool fits = blocks.rank() == 3 && blocks.dtype() == DType::boolean &&
                    (blocks.size(0) == 1 || blocks.size(0) == wanted[0]) &&
                    blocks.size(1) == wanted[1] && blocks.size(2) == wanted[2];
  if (!fits) {
    fail(kOp, describe("block_mask", blocks),
         "booleans " + to_string(wanted) + " (or 1 for the heads) are needed for blocks of " +
             std::to_string(block_rows_) + " x " + std::to_string(block_keys_));
  }
  block_mask_ = broadcast("block_mask", blocks, wanted);
}

bool FlashTerms::needed() const {
  return mask_.defined() || bias_.defined() || block_mask_.defined();
}

bool FlashTerms::block_alive(int64_t head, int64_t row_block, int64_t key_block) const {
  return *reinterpret_cast<const bool*>(block_mask_.at({head, row_block, key_block}));
}

Visit FlashTerms::visit_blocks(const TileAt& at) const {
  bool any = false, all = true;
  for (int64_t i = at.row / block_rows_; i * block_rows_ < at.row + at.rows; ++i) {
    for (int64_t j = at.key / block_keys_; j * block_keys_ < at.key + at.keys; ++j) {
      const bool alive = block_alive(at.head, i, j);
      any = any || alive;
      all = all && alive;
    }
  }
  return !any ? Visit::none : all ? Visit::whole : Visit::masked;
}

Visit FlashTerms::visit_mask(const TileAt& at) const {
  bool any = false, all = true;
  const bool alike = mask_.stride(2) == 0;
  for (int64_t r = 0; r < (alike ? 1 : at.rows) && (all || !any); ++r) {
    const auto* row =
        reinterpret_cast<const uint8_t*>(mask_.at({at.sequence, at.head, at.row + r, at.key}));
    const auto look = [&](auto stride) {
      uint8_t seen = 0, hidden = 0;
      for (int64_t m = 0; m < at.keys; ++m) {
        seen |= row[m * stride];
        hidden |= row[m * stride] == 0;
      }
      any = any || seen != 0;
      all = all && hidden == 0;
    };
    for_stride(mask_.stride(3), look);
  }
  return !any ? Visit::none : all ? Visit::whole : Visit::masked;
}

Visit FlashTerms::visit(const TileAt& at) const {
  Visit most = Visit::whole;
  if (block_mask_.defined()) most = visit_blocks(at);
  if (most == Visit::none || !mask_.defined()) return most;
  const Visit mask = visit_mask(at);
  return mask == Visit::whole ? most : mask;
}

template <class T>
void FlashTerms::add_bias(const TileAt& at, Block<T> s) const {
  constexpr DType kType = dtype_of<T>;
  const DType type = bias_.dtype();
  if (bias_.stride(3) == 1 && (type == kType || (kType == DType::f32 && is_half(type)))) {
    const kernels::Rows rows{bias_.at({at.sequence, at.head, at.row, at.key}), type,
                             bias_.stride(2), at.rows, at.keys};
    kernels::row_map_kernels<T>(isa_).add_bounded(rows, tiled::kMostTerm<T>, s);
    return;
  }
  switch (type) {
    case DType::f64:
      return add_strided<double>(bias_, at, s);
    case DType::bf16:
      return add_strided<bfloat16>(bias_, at, s);
    case DType::f16:
      return add_strided<float16>(bias_, at, s);
    default:
      return add_strided<float>(bias_, at, s);
  }
}

template <class T>
void FlashTerms::shape_tile(const TileAt& at, Block<T> s) const {
  constexpr T kHidden = -std::numeric_limits<T>::infinity();
  if (bias_.defined()) add_bias(at, s);
  if (mask_.defined()) {
    for (int64_t r = 0; r < at.rows; ++r) {
      const auto* seen =
          reinterpret_cast<const uint8_t*>(mask_.at({at.sequence, at.head, at.row + r, at.key}));
      T* row = s.row(r);
      for_stride(mask_.stride(3), [&](auto stride) {
        for (int64_t m = 0; m < at.keys; ++m) row[m] = seen[m * stride] != 0 ? row[m] : kHidden;
      });
    }
  }
  if (!block_mask_.defined()) return;
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t m = 0; m < at.keys;) {
      const int64_t block = (at.key + m) / block_keys_;
      const int64_t end = std::min((block + 1) * block_keys_ - at.key, at.keys);
      if (!block_alive(at.head, (at.row + r) / block_rows_, block)) {
        std::fill(s.row(r) + m, s.row(r) + end, kHidden);
      }
      m = end;
    }
  }
}

void FlashTerms::shape(const TileAt& at, Block<float> s) const { shape_tile(at, s); }
void FlashTerms::shape(const TileAt& at, Block<double> s) const { shape_tile(at, s); }

tiled::GradientOverlap FlashTerms::gradient_overlap() const {
  return {.sequences = bias_strides_[0] == 0,
          .heads = bias_strides_[1] == 0,
          .keys = bias_strides_[3] == 0};
}

void FlashTerms::begin_gradient(int lanes) {
  const DType type = stores_ ? bias_.dtype() : wide_type(bias_.dtype());
  for (int i = 0; i < lanes; ++i) sums_.push_back(Array::zeros(type, bias_shape_));
}

template <class T>
void FlashTerms::add_tile(int lane, const TileAt& at, Block<const T> ds) const {
  const Array& sums = sums_[static_cast<size_t>(lane)];
  const Dims& stride = bias_strides_;
  const int64_t first =
      at.sequence * stride[0] + at.head * stride[1] + at.row * stride[2] + at.key * stride[3];
  if (stores_) {
    auto* to = static_cast<std::byte*>(sums.view().data()) +
               first * static_cast<int64_t>(size_of(sums.dtype()));
    return kernels::tile_kernels<T>(isa_).finish(ds, at.rows, at.keys, nullptr, to, sums.dtype(),
                                                 stride[2]);
  }
  const auto add = [&](auto* to) {
    using To = std::remove_pointer_t<decltype(to)>;
    for (int64_t r = 0; r < at.rows; ++r, to += stride[2]) {
      const T* row = ds.row(r);
      if (stride[3] == 1) {
        for (int64_t m = 0; m < at.keys; ++m) to[m] += static_cast<To>(row[m]);
      } else {
        To sum = 0;
        for (int64_t m = 0; m < at.keys; ++m) sum += static_cast<To>(row[m]);
        *to += sum;
      }
    }
  };
  with_wide_type(sums.dtype(), [&]<class To>(To) { add(sums.as<To>() + first); });
}

void FlashTerms::add_gradient(int lane, const TileAt& at, Block<const float> ds,
                              Block<float> /*dq*/) const {
  add_tile(lane, at, ds);
}
void FlashTerms::add_gradient(int lane, const TileAt& at, Block<const double> ds,
                              Block<double> /*dq*/) const {
  add_tile(lane, at, ds);
}

Array FlashTerms::bias_gradient() {
  if (sums_.empty()) return Array::zeros(bias_.dtype(), bias_shape_);  // there was nothing to sum
  if (sums_.size() == 1 && sums_[0].dtype() == bias_.dtype()) return std::move(sums_[0]);
  return with_wide_type(sums_[0].dtype(), [&]<class T>(T) { return sum_of_lanes<T>(); });
}

// Each element is summed in float64, in the order of the lanes.
template <class T>
Array FlashTerms::sum_of_lanes() const {
  Array total(bias_.dtype(), bias_shape_);
  constexpr int64_t kAtOnce = 4096;
  const int64_t items = ceil_div(total.count(), kAtOnce);
  parallel_for(items, threads_for(run_, items), [&](int64_t item, int) {
    const int64_t begin = item * kAtOnce, count = std::min(kAtOnce, total.count() - begin);
    double wide[kAtOnce] = {};
    for (const Array& sums : sums_) {
      const T* from = sums.template as<T>() + begin;
      for (int64_t i = 0; i < count; ++i) wide[i] += from[i];
    }
    T narrow[kAtOnce];
    std::copy_n(wide, count, narrow);
    auto* to = static_cast<std::byte*>(total.view().data()) +
               begin * static_cast<int64_t>(size_of(total.dtype()));
    kernels::tile_kernels<T>(isa_).finish({narrow, kAtOnce}, 1, count, nullptr, to, total.dtype(),
                                          kAtOnce);
  });
  return total;
}

}  // namespace heed
