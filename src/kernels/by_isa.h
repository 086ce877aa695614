// One table of functions per compiled instruction set, made at its first use.
#pragma once
#include "heed/run.h"
#include "kernels/parts.h"

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

/// Defines GET(isa), which returns the TABLE that MAKE() of the compiled targets returns.
#define HEED_TABLE(TABLE, GET, MAKE)                                                   \
  const TABLE& GET(Isa isa) {                                                          \
    return by_isa<TABLE>(isa, [](Isa compiled) { return HEED_CALL(compiled, MAKE); }); \
  }

/// The functions for both types of a computation.
template <template <class> class Kernels>
struct Tables {
  Kernels<float> f;
  Kernels<double> d;
};

/// Defines GET<float> and GET<double>: the tables that FILL(KERNELS<float>&, KERNELS<double>&) of the
/// compiled targets makes.
// NOLINTBEGIN(bugprone-macro-parentheses): names of templates
#define HEED_TABLES(KERNELS, GET, FILL)            \
  static Tables<KERNELS> make_##KERNELS(Isa isa) { \
    Tables<KERNELS> tables;                        \
    HEED_SELECT(FILL, tables.f, tables.d)          \
    return tables;                                 \
  }                                                \
  template <>                                      \
  const KERNELS<float>& GET<float>(Isa isa) {      \
    return by_isa(isa, make_##KERNELS).f;          \
  }                                                \
  template <>                                      \
  const KERNELS<double>& GET<double>(Isa isa) {    \
    return by_isa(isa, make_##KERNELS).d;          \
  }
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace heed::kernels
