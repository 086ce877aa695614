// Which Highway targets heed compiles: one emulated (any processor), AVX2 and AVX-512 on x86, NEON on
// Arm. Included before foreach_target.h in every file with vector code.
#pragma once
// SVE vectors have no size that the compiler knows: arrays of them, as register blocks are, do not exist.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
// GCC below 12.3 miscompiles some widening products of this target (GCC bug 106322), none of which
// heed uses; the kernel tests run on it like on every other target.
#define HWY_BROKEN_EMU128 0
