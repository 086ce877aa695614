#include "kernels/tile.h"

#include <algorithm>

#include "kernels/parts.h"

namespace heed::kernels {

namespace {

struct Tables {
  TileKernels<float> f;
  TileKernels<double> d;
};

Tables make_tables(Isa isa) {
  Tables tables;
  tables.f.name = tables.d.name = name_of(isa);
  add_pack_parts(isa, tables.f, tables.d);
  add_product_parts(isa, tables.f, tables.d);
  add_weight_parts(isa, tables.f, tables.d);
  add_gradient_parts(isa, tables.f, tables.d);
  add_cap_parts(isa, tables.f, tables.d);
  add_few_row_parts(isa, tables.f, tables.d);
  return tables;
}

bool has_full_rate_bf16() {
  const auto& features = cpu_info().features;
  return std::find(features.begin(), features.end(), "full_rate_bf16") != features.end();
}

const Tables& plain_avx512() {
  static const Tables tables = make_tables(Isa::avx512);
  return tables;
}

void dot_rows(Block<const float> queries, int64_t rows, const Rows& k, Block<float> s) {
  if (!half_dot_rows(queries, rows, k, s)) plain_avx512().f.dot_rows(queries, rows, k, s);
}

Tables make_avx512_tables() {
  Tables tables = plain_avx512();
  if (has_full_rate_bf16()) tables.f.dot_rows = dot_rows;
  return tables;
}

TileKernels<float> make_half_table(Isa isa, void (*add_products)(TileKernels<float>&)) {
  TileKernels<float> table = plain_avx512().f;
  table.name = name_of(isa);
  add_half_pack_parts(isa, table);
  add_half_weight_parts(isa, table);
  add_products(table);
  return table;
}

// AMX adds products of bfloat16 only: everything else on such a machine is AVX-512.
const Tables& tables_of(Isa isa) {
  static const Tables portable = make_tables(Isa::portable);
  if (isa == Isa::portable) return portable;
  static const Tables avx2 = make_tables(Isa::avx2);
  if (isa == Isa::avx2) return avx2;
  static const Tables avx512 = make_avx512_tables();
  return avx512;
}

}  // namespace

template <>
const TileKernels<float>& tile_kernels<float>(Isa isa) {
  return tables_of(isa).f;
}

template <>
const TileKernels<double>& tile_kernels<double>(Isa isa) {
  return tables_of(isa).d;
}

const TileKernels<float>* half_tile_kernels(Isa isa) {
  if (isa == Isa::amx) {
    static const TileKernels<float> amx = make_half_table(Isa::amx, add_amx_products);
    return &amx;
  }
  if (isa == Isa::avx512 && has_full_rate_bf16()) {
    static const TileKernels<float> avx512 = make_half_table(Isa::avx512, add_avx512_half_products);
    return &avx512;
  }
  return nullptr;
}

}  // namespace heed::kernels
