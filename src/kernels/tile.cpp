#include "kernels/tile.h"

#include "kernels/by_isa.h"
#include "kernels/parts.h"

namespace heed::kernels {

bool has_full_rate_bf16() { return cpu_info().has("full_rate_bf16"); }

namespace {

using TileTables = Tables<TileKernels>;

TileTables make_plain(Isa isa) {
  TileTables tables;
  tables.f.name = tables.d.name = name_of(isa);
  add_pack_parts(isa, tables.f, tables.d);
  add_product_parts(isa, tables.f, tables.d);
  add_weight_parts(isa, tables.f, tables.d);
  add_gradient_parts(isa, tables.f, tables.d);
  add_cap_parts(isa, tables.f, tables.d);
  add_dropout_parts(isa, tables.f, tables.d);
  add_few_row_parts(isa, tables.f, tables.d);
  return tables;
}

const TileTables& plain_avx512() {
  static const TileTables tables = make_plain(Isa::avx512);
  return tables;
}

void dot_rows(Block<const float> queries, int64_t rows, const Rows& k, Block<float> s) {
  if (!half_dot_rows(queries, rows, k, s)) plain_avx512().f.dot_rows(queries, rows, k, s);
}

TileTables make_tables(Isa isa) {
  TileTables tables = make_plain(isa);
  if (isa == Isa::avx512 && has_full_rate_bf16()) tables.f.dot_rows = dot_rows;
  return tables;
}

TileKernels<float> make_half_table(Isa isa, void (*add_products)(TileKernels<float>&)) {
  TileKernels<float> table = plain_avx512().f;
  table.name = name_of(isa);
  add_half_pack_parts(isa, table);
  add_half_weight_parts(isa, table);
  add_half_dropout_parts(isa, table);
  add_avx512_half_sigmoid(table);
  add_products(table);
  return table;
}

}  // namespace

template <>
const TileKernels<float>& tile_kernels<float>(Isa isa) {
  if (isa == Isa::amx) {
    static const TileKernels<float> amx = [] {
      TileKernels<float> table = by_isa(Isa::avx512, make_tables).f;
      table.name = name_of(Isa::amx);
      add_amx_few_rows(table);
      return table;
    }();
    return amx;
  }
  return by_isa(isa, make_tables).f;
}

template <>
const TileKernels<double>& tile_kernels<double>(Isa isa) {
  return by_isa(isa, make_tables).d;
}

const TileKernels<float>* half_tile_kernels(Isa isa) {
  if (isa == Isa::amx) {
    static const TileKernels<float> amx = make_half_table(Isa::amx, [](TileKernels<float>& table) {
      add_tile_value_parts(Isa::amx, table);
      add_avx512_half_softmax(table);
      add_amx_products(table);
    });
    return &amx;
  }
  if (isa == Isa::avx512 && has_full_rate_bf16()) {
    static const TileKernels<float> avx512 = make_half_table(Isa::avx512, add_avx512_half_products);
    return &avx512;
  }
  return nullptr;
}

}  // namespace heed::kernels
