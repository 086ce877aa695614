#include "kernels/chunk.h"

#include "kernels/chunk_parts.h"

namespace heed::kernels {

namespace {

struct Tables {
  ChunkKernels<float> f;
  ChunkKernels<double> d;
};

Tables make_tables(Isa isa) {
  Tables tables;
  add_chunk_product_parts(isa, tables.f, tables.d);
  add_chunk_row_parts(isa, tables.f, tables.d);
  add_chunk_weight_parts(isa, tables.f, tables.d);
  return tables;
}

// AMX adds products of bfloat16 only: everything else on such a machine is AVX-512.
const Tables& tables_of(Isa isa) {
  static const Tables portable = make_tables(Isa::portable);
  if (isa == Isa::portable) return portable;
  static const Tables avx2 = make_tables(Isa::avx2);
  if (isa == Isa::avx2) return avx2;
  static const Tables avx512 = make_tables(Isa::avx512);
  return avx512;
}

}  // namespace

template <>
const ChunkKernels<float>& chunk_kernels<float>(Isa isa) {
  return tables_of(isa).f;
}

template <>
const ChunkKernels<double>& chunk_kernels<double>(Isa isa) {
  return tables_of(isa).d;
}

}  // namespace heed::kernels
