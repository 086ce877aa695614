// What the processor can do at most: loops that keep everything in registers, and loops that only read.
// For measuring roofs; nothing else calls them.
#pragma once
#include <cstdint>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed::kernels {

/// `rounds` rounds of independent fused multiply-adds of float32 or float64; returns how many
/// multiply-adds they were. `sink` receives a value that depends on all of them.
int64_t run_multiply_adds(Isa isa, DType dtype, int64_t rounds, double& sink);

/// The same with products of bfloat16 that are summed in float32: AMX tiles or AVX512-BF16 pairs.
/// 0 where this instruction set has none, or one that is no faster than float32.
int64_t run_half_multiply_adds(Isa isa, int64_t rounds, double& sink);

/// The sum of `count` floats, read once from first to last.
double read_floats(Isa isa, const float* data, int64_t count);

// Of files for x86 alone.
int64_t run_amx(int64_t rounds, double& sink);
int64_t run_avx512_pairs(int64_t rounds, double& sink);

}  // namespace heed::kernels
