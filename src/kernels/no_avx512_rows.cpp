// As no_avx512.cpp, for rows of bytes.
#include "heed/error.h"
#include "kernels/int8_layout.h"

namespace heed::kernels {

void int8_panel_avx512(const Int8Rows&, const Int8Matrix&, const Tensor&, bool, int64_t, int64_t,
                       int64_t) {
  throw Error("this processor has no AVX512-VNNI");
}

}  // namespace heed::kernels
