// The row operations of a transformer besides its products: normalisation, rotary positions, gating.
//
// Matrices are Tensors [rows, columns] of float32 or bfloat16 with a unit stride in the columns.
// Arithmetic is float32; bfloat16 results are rounded to nearest even, those for int8 products as
// int8_rows.h says. A row of a result depends on
// the same row of the inputs only. Throws Error for other types or shapes that do not fit.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/int8_rows.h"

namespace heed {

/// out[m,c] = x[m,c] * weight[c] / sqrt(mean_c x[m,c]^2 + eps).  arXiv 1910.07467
/// weight [C] float32. out may be x.
void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out,
              const RunOptions& run = {});
void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Int8Rows& out,
              const RunOptions& run = {});

/// So many heads, one beside the other, with one weight [D] float32.
struct NormedHeads {
  int64_t heads = 0;
  Tensor weight;
};
/// The same for every head of every row, in place: x [M, all heads * D].
void rms_norm_heads(const Tensor& x, std::initializer_list<NormedHeads> parts, float eps,
                    const RunOptions& run = {});

/// out[m,f] = silu(g) * u, g = gate_up[m,f], u = gate_up[m,F+f], silu(g) = g / (1 + exp -g).
/// arXiv 2002.05202. gate_up [M,2F], out [M,F].
void swiglu(const Tensor& gate_up, const Tensor& out, const RunOptions& run = {});
void swiglu(const Tensor& gate_up, const Int8Rows& out, const RunOptions& run = {});

/// Rotary position embedding, arXiv 2104.09864: each head of D columns has `pairs` pairs (a, b) that
/// become (a cos - b sin, a sin + b cos); columns from 2 * pairs on stay.
struct Rotation {
  int64_t head_dim = 0;
  int64_t pairs = 0;           // at most head_dim / 2
  bool interleaved = false;    // pair i is columns (2i, 2i+1), else (i, i + pairs)
  const float* cos = nullptr;  // [M, table_stride], pairs used of each row
  const float* sin = nullptr;
  int64_t table_stride = 0;  // at least rotation_stride(pairs); the rest of a row may be anything
};
constexpr int64_t rotation_stride(int64_t pairs) { return (pairs + 15) / 16 * 16; }

/// Rotates x [M, heads * head_dim] in place.
void rotate(const Tensor& x, const Rotation& rotation, const RunOptions& run = {});

/// to[m,c] = from[m,c], converted.
void convert_rows(const Tensor& from, const Tensor& to, const RunOptions& run = {});
void convert_rows(const Tensor& from, const Int8Rows& to, const RunOptions& run = {});
/// to[m,c] += from[m,c].
void add_rows(const Tensor& from, const Tensor& to, const RunOptions& run = {});
/// x[m,c] += bias[c], bias [C] float32.
void add_bias(const Tensor& bias, const Tensor& x, const RunOptions& run = {});

/// log sum exp x, natural; -inf for n = 0, NaN if any x is NaN.
double log_sum_exp(const float* x, int64_t n, const RunOptions& run = {});

}  // namespace heed
