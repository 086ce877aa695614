// Packing of operands into scratch and rounding of results out of it.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/pack.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/parts.h"
#include "kernels/prefetch.h"
#include "kernels/transpose-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
int64_t padded(int64_t width) {
  return round_up(width, lanes<T>());
}

// Elements [0, width) of one row, widened, padded with zeros to whole vectors.
template <class T, class From, class Store>
HWY_INLINE void for_each_vector(const From* row, int64_t width, Store&& store) {
  for (int64_t i = 0; i < width; i += lanes<T>()) store(i, load_elements<T>(row + i, width - i));
}

template <class T>
void pack_queries(const Rows& q, bool negate, void* packed) {
  const Full<T> d;
  auto* out = static_cast<T*>(packed);
  const int64_t stride = padded<T>(q.width);
  const auto sign = hn::Set(d, static_cast<T>(negate ? -1 : 1));
  with_element_type<T>(q.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t r = 0; r < q.count; ++r) {
      T* to = out + r * stride;
      for_each_vector<T>(static_cast<const From*>(q.data) + q.offset(r), q.width,
                         [&](int64_t i, auto v)
                             HWY_ATTR { hn::StoreU(hn::Mul(v, sign), d, to + i); });
    }
  });
}

// Panels of kPanelVectors vectors of keys: element (e, key) at panel[e * panel width + key].
template <class T>
void pack_keys(const Rows& k, void* packed) {
  const Full<T> d;
  const int64_t panel = kPanelVectors * lanes<T>(), keys = padded<T>(k.count);
  with_element_type<T>(k.dtype, [&](auto from) HWY_ATTR {
    for (int64_t start = 0; start < keys; start += panel) {
      const int64_t width = HWY_MIN(panel, keys - start);
      T* to = static_cast<T*>(packed) + start * k.width;
      for (int64_t key = 0; key < width; key += lanes<T>()) {
        for (int64_t e = 0; e < k.width; e += lanes<T>()) {
          hn::Vec<Full<T>> rows[hn::MaxLanes(Full<T>())];
          prefetch_share(k, start + key + lanes<T>(), lanes<T>(), e, lanes<T>());
          load_square<T, decltype(from)>(k, start + key, e, rows);
          transpose_square<T>(rows, [&](int64_t c, auto column) HWY_ATTR {
            if (e + c < k.width) hn::StoreU(column, d, to + (e + c) * width + key);
          });
        }
      }
    }
  });
}

template <class T>
bool pack_values(const Rows& v, void* packed) {
  const Full<T> d;
  const int64_t stride = padded<T>(v.width);
  auto bad = hn::Zero(d);
  with_element_type<T>(v.dtype, [&](auto from) HWY_ATTR {
    using From = decltype(from);
    for (int64_t m = 0; m < v.count; ++m) {
      T* to = static_cast<T*>(packed) + m * stride;
      for_each_vector<T>(static_cast<const From*>(v.data) + v.offset(m), v.width,
                         [&](int64_t i, auto x) HWY_ATTR {
                           hn::StoreU(x, d, to + i);
                           bad = hn::Or(bad, hn::Sub(x, x));  // 0 if finite, else NaN
                         });
    }
  });
  return hn::AllTrue(d, hn::Eq(bad, bad));
}

template <class T, class To>
HWY_INLINE void store_scaled(const T* o, int64_t width, T factor, To* to) {
  const auto scale = hn::Set(Full<T>(), factor);
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    store_elements<T>(hn::Mul(load_elements<T>(o + i, width - i), scale), to + i, width - i);
  }
}

template <class T>
HWY_INLINE void store_row(const T* o, int64_t width, T factor, void* out, DType dtype) {
  with_element_type<T>(dtype, [&](auto to) HWY_ATTR {
    store_scaled(o, width, factor, static_cast<decltype(to)*>(out));
  });
}

template <class T>
void finish(Block<const T> o, int64_t rows, int64_t width, const T* factor, void* out, DType dtype,
            int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    store_row<T>(
        o.row(r), width, factor == nullptr ? T{1} : factor[r],
        static_cast<std::byte*>(out) + r * out_stride * static_cast<int64_t>(size_of(dtype)),
        dtype);
  }
}

// Blocks of C [width, keys] turned into rows of keys, converted.
template <class T>
void finish_columns(Block<T> c, int64_t keys, int64_t width, T factor, void* out, DType dtype,
                    int64_t out_stride, const int64_t* out_offsets) {
  const Full<T> d;
  constexpr int64_t kDepth = 64;
  const auto element = static_cast<int64_t>(size_of(dtype));
  HWY_ALIGN T block[hn::MaxLanes(d)][kDepth];
  for (int64_t m = 0; m < keys; m += lanes<T>()) {
    const int64_t count = HWY_MIN(lanes<T>(), keys - m);
    for (int64_t start = 0; start < width; start += kDepth) {
      const int64_t depth = HWY_MIN(kDepth, width - start);
      for (int64_t f = 0; f < depth; f += lanes<T>()) {
        hn::Vec<Full<T>> rows[hn::MaxLanes(Full<T>())];
        for (int64_t i = 0; i < lanes<T>(); ++i) {
          rows[i] = f + i < depth ? hn::LoadU(d, c.row(start + f + i) + m) : hn::Zero(d);
        }
        transpose_square<T>(
            rows, [&](int64_t key, auto column) HWY_ATTR { hn::Store(column, d, &block[key][f]); });
      }
      for (int64_t key = 0; key < count; ++key) {
        const int64_t offset =
            out_offsets == nullptr ? (m + key) * out_stride : out_offsets[m + key];
        if (offset == kNoRow) continue;
        store_row<T>(block[key], depth, factor,
                     static_cast<std::byte*>(out) + (offset + start) * element, dtype);
      }
    }
  }
}

template <class T>
void add_pack(TileKernels<T>& k) {
  k.row_multiple = kRowMultiple;
  k.key_multiple = lanes<T>();
  k.dim_multiple = lanes<T>();
  k.query_bytes = [](int64_t rows, int64_t width) {
    return round_up(rows, kRowMultiple) * padded<T>(width) * static_cast<int64_t>(sizeof(T));
  };
  k.key_bytes = [](int64_t keys, int64_t width) {
    return padded<T>(keys) * width * static_cast<int64_t>(sizeof(T));
  };
  k.value_bytes = [](int64_t keys, int64_t width) {
    return keys * padded<T>(width) * static_cast<int64_t>(sizeof(T));
  };
  k.pack_queries = pack_queries<T>;
  k.pack_keys = pack_keys<T>;
  k.pack_values = pack_values<T>;
  k.finish = finish<T>;
  k.column_bytes = k.query_bytes;
  k.pack_columns = pack_queries<T>;
  k.finish_columns = finish_columns<T>;
}

}  // namespace

void add_pack_parts(TileKernels<float>& f, TileKernels<double>& d) {
  add_pack(f);
  add_pack(d);
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_pack_parts)
}  // namespace heed::kernels
#endif
