#include "kernels/amx_products.h"
#include "kernels/amx_tiles.h"

namespace heed::kernels {

void add_amx_products(TileKernels<float>& f) {
#if defined(__x86_64__)
  f.row_multiple = 32;
  f.scores = tile_scores<HardwareTiles>;
  f.accumulate = tile_accumulate<HardwareTiles>;
#else
  (void)f;
#endif
}

}  // namespace heed::kernels
