#include <functional>

#include "kernels/amx_attention.h"
#include "kernels/amx_few_rows.h"
#include "kernels/amx_products.h"
#include "kernels/amx_tiles.h"

namespace heed::kernels {

namespace {

#if defined(__x86_64__)
void run_with_tiles(const std::function<void()>& body) {
  const HardwareTiles unit;
  body();
}
#endif

}  // namespace

void add_amx_products(TileKernels<float>& f) {
#if defined(__x86_64__)
  use_tile_unit<HardwareTiles>(f);
  use_tile_attention<HardwareTiles>(f);
  f.run_ready = run_with_tiles;
#else
  (void)f;
#endif
}

void add_amx_few_rows(TileKernels<float>& f) {
#if defined(__x86_64__)
  use_tile_few_rows<HardwareTiles>(f);
  f.run_ready = run_with_tiles;
#else
  (void)f;
#endif
}

}  // namespace heed::kernels
