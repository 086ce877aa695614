// Rotation of neighbouring pairs of a row: (x_2t, x_2t+1) by an angle of their own.
#pragma once
#include <cstdint>

#include "heed/run.h"

namespace heed::kernels {

template <class T>
struct RotationKernels {
  /// x = x cosine + swapped(x) sine over `width` (even) elements, where swapped exchanges the two of a
  /// pair, cosine holds each pair's cosine twice and sine its sine as -sin, +sin. `back`: the inverse.
  void (*rotate)(T* x, const T* cosine, const T* sine, int64_t width, bool back) = nullptr;
};

template <class T>
const RotationKernels<T>& rotation_kernels(Isa isa);

}  // namespace heed::kernels
