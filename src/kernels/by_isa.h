// One table of functions per compiled instruction set, made at its first use.
#pragma once
#include "heed/run.h"

namespace heed::kernels {

/// `make` is called with portable, avx2 or avx512; AMX adds nothing here and gets the last of them.
template <class Tables>
const Tables& by_isa(Isa isa, Tables (*make)(Isa)) {
  static const Tables portable = make(Isa::portable);
  if (isa == Isa::portable) return portable;
  static const Tables avx2 = make(Isa::avx2);
  if (isa == Isa::avx2) return avx2;
  static const Tables avx512 = make(Isa::avx512);
  return avx512;
}

}  // namespace heed::kernels
