#include <functional>

#include "kernels/amx_attention.h"
#include "kernels/amx_few_rows.h"
#include "kernels/amx_products.h"

namespace heed::kernels {

namespace {

/// The tile unit as eight numbered registers of 16 rows x 64 bytes: AMX-BF16 by its instructions; needs no compiler flag. The configuration is loaded by the
/// constructor and released by the destructor, in the thread that uses it: 190 cycles together, which
/// instances inside others do not need.
class HardwareTiles {
 public:
  HardwareTiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    if (instances()++ > 0) return;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  ~HardwareTiles() {
    if (--instances() > 0) return;
    __asm__ volatile("tilerelease" ::: "memory");
  }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  void store(void* to, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
                     : "memory");
  }
  /// C[i][j] += sum over pairs of A[i][pair] . B[pair][j]
  template <int kC, int kA, int kB>
  void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }

 private:
  static int& instances() {
    static thread_local int count = 0;
    return count;
  }
};

void run_with_tiles(const std::function<void()>& body) {
  const HardwareTiles unit;
  body();
}

}  // namespace

void add_amx_products(TileKernels<float>& f) {
  use_tile_unit<HardwareTiles>(f);
  use_tile_attention<HardwareTiles>(f);
  f.run_ready = run_with_tiles;
}

void add_amx_few_rows(TileKernels<float>& f) {
  use_tile_few_rows<HardwareTiles>(f);
  f.run_ready = run_with_tiles;
}

// Two tiles against two, four sums: 16 x 16 results, 32 products each. Random values: zeros make the
// unit look faster than it is.
int64_t run_amx(int64_t rounds, double& sink) {
  alignas(64) bfloat16 values[512];
  uint32_t state = 1;
  for (bfloat16& value : values) {
    state = state * 1664525u + 1013904223u;
    value = to_bfloat16(static_cast<float>(state >> 8) * 0x1p-24f - 0.5f);
  }
  alignas(64) float result[256];
  HardwareTiles tiles;
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  tiles.load<4>(values, 64);
  tiles.load<5>(values, 64);
  tiles.load<6>(values, 64);
  tiles.load<7>(values, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    tiles.multiply<0, 4, 6>();
    tiles.multiply<1, 4, 7>();
    tiles.multiply<2, 5, 6>();
    tiles.multiply<3, 5, 7>();
  }
  sink = 0;
  const auto add = [&] {
    for (float x : result) sink += static_cast<double>(x);
  };
  tiles.store<0>(result, 64);
  add();
  tiles.store<1>(result, 64);
  add();
  tiles.store<2>(result, 64);
  add();
  tiles.store<3>(result, 64);
  add();
  return rounds * 4 * 16 * 16 * 32;
}

}  // namespace heed::kernels
