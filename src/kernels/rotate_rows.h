// Rotation of neighbouring pairs of a row: (x_2t, x_2t+1) by an angle of their own.
#pragma once
#include <cstdint>

#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

template <class T>
struct RotationKernels {
  /// Rows x = x cosine + swapped(x) sine over `width` (even) elements, where swapped exchanges the two of
  /// a pair, cosine holds each pair's cosine twice and sine its sine as -sin, +sin; those of row r begin
  /// at r * stride. `back`: the inverse.
  void (*rotate)(Block<T> x, int64_t rows, const T* cosine, const T* sine, int64_t stride,
                 int64_t width, bool back) = nullptr;
};

template <class T>
const RotationKernels<T>& rotation_kernels(Isa isa);

}  // namespace heed::kernels
