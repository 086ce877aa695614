// What both ways of kernelized attention with relative positions share: a checked call, where tokens and
// offsets lie, and the weights of offsets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/operands.h"
#include "heed/kernelized_rpe_attention.h"

namespace heed::rpe {

struct Place {
  int64_t b, h;  // batch and query head
};

/// Tokens lie on a line of positions on which every offset between two tokens has one number, also on a
/// grid: there a row takes 2 Gx - 1 positions, of which Gx are used. An offset o from -span to span then
/// has the entry first_entry + span + o of a head's rpb, and causal means o <= 0.
struct Call {
  Tensor q, k, v, rpb, projection;
  AttentionSizes sizes;
  KernelizedRpeOptions options;
  int64_t tokens = 0, columns = 0;  // columns of the grid; without one all tokens
  int64_t pitch = 0;                // positions from one row of the grid to the next
  int64_t span = 0;                 // the largest offset
  int64_t entries = 0;              // of one head's rpb
  int64_t first_entry = 0;
  int64_t random = 0;    // M
  int64_t features = 0;  // F

  int64_t position(int64_t token) const { return token / columns * pitch + token % columns; }
  int64_t offsets() const { return 2 * span + 1; }
  /// Features may be below 0.
  bool signed_features() const { return options.features == RpeFeatures::trf; }
  bool masked(int64_t offset) const { return options.causal && offset > 0; }
  /// Of a flight, some key heads with the query heads that read them, all in memory together. A query head
  /// of it is numbered member of key head * group + member; `first`: its first key head, over all batches.
  Place place(int64_t first, int64_t head) const {
    const int64_t group = sizes.group(), key_head = first + head / group;
    return {key_head / sizes.kv_heads, key_head % sizes.kv_heads * group + head % group};
  }
};

/// exp(rpb) of the offsets of all heads over its largest, and 0 where masked.
template <class T>
struct OffsetWeights {
  int64_t span = 0;
  std::vector<T> values;        // [H, offsets]: entry span + o
  std::vector<char> some_zero;  // [H]: an offset that is not masked has weight 0

  const T* of(int64_t h) const { return values.data() + h * (2 * span + 1); }
};
template <class T>
OffsetWeights<T> offset_weights(const Call& call);

/// The largest logarithm of a ratio of two weights of one head; infinite or NaN entries: see `finite`.
struct Spread {
  double largest = 0;
  bool finite = true;  // all entries are finite or -inf
};
Spread offset_spread(const Call& call);

/// Calls body(first, count, entry) for the parts of tokens [begin, end) whose offsets from `token` are
/// neighbours; `entry` is that of `first` in OffsetWeights.
template <class Body>
void for_runs(const Call& call, int64_t token, int64_t begin, int64_t end, Body&& body) {
  const int64_t zero = call.span - call.position(token);
  while (begin < end) {
    const int64_t count = std::min(call.columns - begin % call.columns, end - begin);
    body(begin, count, zero + call.position(begin));
    begin += count;
  }
}

void forward_direct(const Call& call, bool in_double, const Tensor& out, const RunOptions& run);
void backward_direct(const Call& call, bool in_double, const Tensor& grad_out,
                     const KernelizedRpeGradientViews& gradients, const RunOptions& run);
/// Both return a bound of their error relative to the values, or gradients, that a token sees. Above the
/// limit they stop, and what they wrote is of no use.
double forward_fft(const Call& call, const Tensor& out, const RunOptions& run);
double backward_fft(const Call& call, const Tensor& grad_out,
                    const KernelizedRpeGradientViews& gradients, const RunOptions& run);
inline double fft_error_limit(DType dtype) { return dtype == DType::f64 ? 1e-10 : 1e-6; }

/// Rounds the sums [H, offsets] into the gradient of rpb, 0 where there is no offset.
void store_rpb_gradient(const Call& call, const std::vector<double>& sums, const Tensor& to);

}  // namespace heed::rpe
