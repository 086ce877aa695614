// A checked call of neighborhood attention: every grid has three axes, the missing ones of one point
// in front.
#pragma once
#include "engine/tiled/neighborhood.h"
#include "heed/neighborhood_attention.h"

namespace heed::na {

/// Axes of grid tensors as they are kept here: [B,Z,Y,X,H,width].
enum GridAxis { kBatch = 0, kGrid = 1, kHeads = 4, kWidth = 5 };

/// [B,*grid,H,width] with `rank` grid axes as [B,Z,Y,X,H,width].
Tensor six_axes(const Tensor& t, int rank);
/// [B,*grid,H] as [B,Z,Y,X,H,1].
Tensor six_axes_of_sums(const Tensor& lse, int rank);
/// [B,n,H,width] with the heads in front: [B,H,n,width].
Tensor heads_first(const Tensor& t);

struct GridCall {
  /// Throws Error naming `op` and the argument unless everything fits. `out` and `lse` may be
  /// undefined.
  GridCall(const char* op, int rank, const Tensor& query, const Tensor& key, const Tensor& value,
           const Tensor& out, const Tensor& lse, const NeighborhoodOptions& options);

  bool empty() const { return query.size(kBatch) == 0 || query.size(kHeads) == 0; }
  bool has_additional() const { return additional_keys.defined() && additional_keys.size(2) > 0; }
  int64_t batch() const { return query.size(kBatch); }
  int64_t heads() const { return query.size(kHeads); }

  int rank;
  tiled::Neighborhood grid;
  Tensor query, key, value, out, lse;         // six axes; the last two undefined if not given
  Tensor additional_keys, additional_values;  // [B,Hkv,n,width]
  Tensor rpb;
  double scale;
};

}  // namespace heed::na
