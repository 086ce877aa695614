// How the tables of chunk.h are put together: every vector file fills in its functions for one
// instruction set.
#pragma once
#include "kernels/chunk.h"
#include "kernels/parts.h"

namespace heed::kernels {

void add_chunk_product_parts(Isa isa, ChunkKernels<float>& f, ChunkKernels<double>& d);
void add_chunk_row_parts(Isa isa, ChunkKernels<float>& f, ChunkKernels<double>& d);
void add_chunk_weight_parts(Isa isa, ChunkKernels<float>& f, ChunkKernels<double>& d);

#define HEED_SELECT_CHUNK_PART(FUNCTION)                                  \
  void FUNCTION(Isa isa, ChunkKernels<float>& f, ChunkKernels<double>& d) \
      HEED_SELECT(FUNCTION, f, d)

}  // namespace heed::kernels
