// How the tables of tile.h are put together: every vector file fills in its functions for one
// instruction set.
#pragma once
#include "base/round_up.h"
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Row blocks of the products are 6, 8 or 12 rows high.
inline constexpr int64_t kRowMultiple = 24;

/// From here on half a unit in the last place of a pivot is more than exponents hold, nearly.
template <class T>
inline constexpr T kLargePivot = sizeof(T) == 8 ? T{0x1p59} : T{0x1p29};

void add_pack_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_product_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_weight_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_gradient_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_cap_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_dropout_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);
void add_few_row_parts(Isa isa, TileKernels<float>& f, TileKernels<double>& d);

// bfloat16 products. Operands are packed in pairs of neighbours along the summed axis:
//   queries, weights  [row][padded depth]          keys    panels of 64: [depth / 2][key][2]
//   values            [key / 2][padded width][2], for a tile unit [key / 32][column / 16][16][16][2]
//   columns           [padded width][padded rows]  paired weights  [row / 2][padded key][2]
// with depth, keys and columns' rows and width padded with zeros to kHalfDepth, one step of a matrix
// tile.
inline constexpr int64_t kHalfDepth = 32;
inline constexpr int64_t kHalfPanel = 64;
inline constexpr int64_t kHalfColumns = 16;
void add_half_pack_parts(Isa isa, TileKernels<float>& f);
void add_tile_value_parts(Isa isa, TileKernels<float>& f);  // after it: values in tiles
void add_half_weight_parts(Isa isa, TileKernels<float>& f);
void add_half_dropout_parts(Isa isa, TileKernels<float>& f);
void add_avx512_half_products(TileKernels<float>& f);  // AVX512-BF16
// AVX512-BF16, after add_half_weight_parts. This softmax keeps a row's first pivot, so that its largest weight
// is rounded too, which that of a running maximum, 1, is not: up to an eighth more error where one key has
// most of the weight. Worth it where exponentials are much of the time, beside a tile unit.
void add_avx512_half_softmax(TileKernels<float>& f);
void add_avx512_half_sigmoid(TileKernels<float>& f);
/// Whether products of bfloat16 are faster than those of float32 on AVX-512.
bool has_full_rate_bf16();
/// dot_rows with AVX512-BF16; false, and nothing done, for operands that are not exact in bfloat16 or too
/// large.
bool half_dot_rows(Block<const float> queries, int64_t rows, const Rows& k, Block<float> s);
void add_amx_products(TileKernels<float>& f);  // and `attend`

/// Scores of up to 32 rows with the keys of one panel, and where their weights go.
struct WeightChunk {
  Block<float> scores;
  Block<uint16_t> weights;
  int64_t rows = 0, keys = 0;
  const KeyRange* ranges = nullptr;  // of each row; null: all keys
  const void* next = nullptr;        // read later: to be brought into the first-level cache
  int64_t next_bytes = 0;            // a multiple of 64 for each row
};
/// AVX512-BF16: softmax weights by the pivots that rows have, zeros for the rest of the panel. Sums are
/// added lane by lane, 16 a row, aligned to 64 bytes. Returns the rows, a bit each, that need another pivot:
/// their weights are undefined, their sums as before.
uint32_t softmax_chunk(const WeightChunk& chunk, float scale, const float* pivots,
                       float* lane_sums);
/// Pivots of those `rows` that have none: the largest of their scores in the chunk.
void find_first_pivots(const WeightChunk& chunk, uint32_t rows, float scale, float* pivots);
/// Moves the sums of up to 32 rows to `sums`. There are lanes for a multiple of 16 rows.
void take_lane_sums(float* lane_sums, int64_t rows, float* sums);

/// Few rows on a tile unit, the part of vectors (AVX512-BF16). A tile has 16 rows of 16 numbers or pairs.
inline constexpr int64_t kQueryTile = 16 * 16;
/// Up to 16 rows of queries, their width a multiple of 32, as pairs [width / 2][16]; false if bfloat16 would
/// change one.
bool pack_query_tiles(Block<const float> queries, int64_t rows, int64_t width, uint32_t* to);
/// Scores of 16 keys, [key][row], to s[row].
void turn_scores(const float* tile, int64_t rows, float* s, int64_t stride);
/// Weights of 32 keys as bfloat16 [16][32], and behind the rows what they were rounded by: from row 8 on, in
/// a second tile for more than 8 rows.
void split_weights(const float* weights, int64_t stride, int64_t rows, uint16_t* to);
/// 32 rows of values as tiles of pairs: lanes of 128 bits of neighbouring tiles take turns in their columns,
/// a multiple of 32. Asks for some of `due` meanwhile.
void pair_values(const uint16_t* v, int64_t stride, int64_t columns, uint32_t* tiles,
                 LinesDue& due);
/// o = carry o + sums [16][width] of products of both.
void add_split_sums(const float* sums, int64_t width, int64_t rows, const float* carry,
                    Block<float> o);
/// A tile unit's dot_rows and add_rows, and its run_ready.
void add_amx_few_rows(TileKernels<float>& f);

// What the compiled target for `isa` returns from FUNCTION(...).
#if defined(__x86_64__)
#define HEED_CALL(isa, FUNCTION, ...)                       \
  ((isa) == Isa::portable ? N_EMU128::FUNCTION(__VA_ARGS__) \
   : (isa) == Isa::avx2   ? N_AVX2::FUNCTION(__VA_ARGS__)   \
                          : N_AVX3::FUNCTION(__VA_ARGS__))
#else
#define HEED_CALL(isa, FUNCTION, ...) ((void)(isa), HWY_STATIC_DISPATCH(FUNCTION)(__VA_ARGS__))
#endif
// Defines FUNCTION(isa, tables...) as a choice among the compiled targets' FUNCTION(tables...).
#define HEED_SELECT(FUNCTION, ...)         \
  {                                        \
    HEED_CALL(isa, FUNCTION, __VA_ARGS__); \
  }
#define HEED_SELECT_PART(FUNCTION) \
  void FUNCTION(Isa isa, TileKernels<float>& f, TileKernels<double>& d) HEED_SELECT(FUNCTION, f, d)
#define HEED_SELECT_HALF_PART(FUNCTION) \
  void FUNCTION(Isa isa, TileKernels<float>& f) HEED_SELECT(FUNCTION, f)

}  // namespace heed::kernels
