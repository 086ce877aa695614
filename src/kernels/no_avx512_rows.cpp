// As no_avx512.cpp, for rows of bytes.
#include "heed/error.h"
#include "kernels/byte_rows.h"
#include "kernels/int8_layout.h"

namespace heed::kernels {

namespace {
[[noreturn]] void absent() { throw Error("this processor is no x86"); }
}  // namespace

void unpack_panel_avx512(const BlockMatrix&, int64_t, int, Panel&) { absent(); }
void int8_panel_avx512(const Int8Rows&, const Panel&, const Tensor&, bool, int64_t, int64_t) {
  absent();
}
void split_columns_avx512(const float*, int64_t, int64_t, int, SplitColumns*) { absent(); }
void byte_rows_avx512(const BlockMatrix&, const SplitRows&, float*, int64_t) { absent(); }
void split_columns_avx2(const float*, int64_t, int64_t, int, SplitColumns*) { absent(); }
void byte_rows_avx2(const BlockMatrix&, const SplitRows&, float*, int64_t) { absent(); }

}  // namespace heed::kernels
