#include "kernels/chunk.h"

#include "kernels/by_isa.h"
#include "kernels/chunk_parts.h"

namespace heed::kernels {

namespace {

Tables<ChunkKernels> make_tables(Isa isa) {
  Tables<ChunkKernels> tables;
  add_chunk_product_parts(isa, tables.f, tables.d);
  add_chunk_row_parts(isa, tables.f, tables.d);
  add_chunk_weight_parts(isa, tables.f, tables.d);
  return tables;
}

}  // namespace

template <>
const ChunkKernels<float>& chunk_kernels<float>(Isa isa) {
  return by_isa(isa, make_tables).f;
}

template <>
const ChunkKernels<double>& chunk_kernels<double>(Isa isa) {
  return by_isa(isa, make_tables).d;
}

}  // namespace heed::kernels
