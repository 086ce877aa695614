// What processors other than x86 have in place of the files for AVX-512 and AMX. Nothing comes here: callers
// ask what the processor has first.
#include "heed/error.h"
#include "kernels/parts.h"
#include "kernels/peak.h"

namespace heed::kernels {

namespace {
[[noreturn]] void absent() { throw Error("this processor is no x86"); }
}  // namespace

void add_avx512_half_products(TileKernels<float>&) { absent(); }
void add_avx512_half_softmax(TileKernels<float>&) { absent(); }
void add_avx512_half_sigmoid(TileKernels<float>&) { absent(); }
bool half_dot_rows(Block<const float>, int64_t, const Rows&, Block<float>) { absent(); }
void add_amx_products(TileKernels<float>&) { absent(); }
void add_amx_few_rows(TileKernels<float>&) { absent(); }

uint32_t softmax_chunk(const WeightChunk&, float, const float*, float*) { absent(); }
void find_first_pivots(const WeightChunk&, uint32_t, float, float*) { absent(); }
void take_lane_sums(float*, int64_t, float*) { absent(); }
bool pack_query_tiles(Block<const float>, int64_t, int64_t, uint32_t*) { absent(); }
void turn_scores(const float*, int64_t, float*, int64_t) { absent(); }
void split_weights(const float*, int64_t, int64_t, uint16_t*) { absent(); }
void pair_values(const uint16_t*, int64_t, int64_t, uint32_t*, LinesDue&) { absent(); }
void add_split_sums(const float*, int64_t, int64_t, const float*, Block<float>) { absent(); }

int64_t run_amx(int64_t, double&) { absent(); }
int64_t run_avx512_pairs(int64_t, double&) { absent(); }

}  // namespace heed::kernels
