// Blocks of GGUF weights read into vectors: one struct per format, included once per
// instruction set. Layouts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the
// block structs of ggml-common.h.
//
// Format::decode(block, scales, to) calls to.add(w0, k0, w1, k1) with vectors of weights that begin
// at columns k0 and k1 of the block, until every column was given once. `scales` is the pair of
// float16 values at the start of the block as float32 where kPairs says that there is one.
#if defined(HEED_BLOCK_FORMATS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_BLOCK_FORMATS_INL_H_
#undef HEED_BLOCK_FORMATS_INL_H_
#else
#define HEED_BLOCK_FORMATS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D = Full<float>;
using DI = hn::RebindToSigned<D>;
using DU = hn::RebindToUnsigned<D>;
using V = hn::Vec<D>;
using VI = hn::Vec<DI>;
constexpr int kLanes = static_cast<int>(lanes<float>());
// Blocks whose scales are converted together, a multiple of the lanes.
constexpr int64_t kScaledBlocks = 32;

HWY_INLINE float load_f16(const uint8_t* p) {
  return hn::GetLane(
      Load<float, float16>::full(hn::CappedTag<float, 1>(), reinterpret_cast<const float16*>(p)));
}

// The float16 pairs (scale, minimum) at the start of `count` blocks, `stride` bytes apart, as float32.
// Converted for many blocks at once: one by one they would cost as much as the weights.
HWY_INLINE void load_pairs(const uint8_t* blocks, int64_t stride, int64_t count, float* to) {
  HWY_ALIGN uint16_t raw[2 * kScaledBlocks];
  for (int64_t b = 0; b < count; ++b) std::memcpy(raw + 2 * b, blocks + b * stride, 4);
  for (int64_t i = 0; i < 2 * count; i += kLanes) {
    hn::StoreU(Load<float, float16>::full(D(), reinterpret_cast<const float16*>(raw + i)), D(),
               to + i);
  }
}

HWY_INLINE VI load_u8(const uint8_t* p) {
  return hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<uint8_t, D>(), p));
}

HWY_INLINE VI load_i8(const uint8_t* p) {
  return hn::PromoteTo(DI(),
                       hn::LoadU(hn::Rebind<int8_t, D>(), reinterpret_cast<const int8_t*>(p)));
}

HWY_INLINE VI low_nibble(VI bytes) { return hn::And(bytes, hn::Set(DI(), 15)); }
HWY_INLINE VI high_nibble(VI bytes) { return hn::ShiftRight<4>(bytes); }

// The float32 weights scale * q + offset.
struct WideMap {
  V scale, offset;
  HWY_INLINE WideMap(float s, float o) : scale(hn::Set(D(), s)), offset(hn::Set(D(), o)) {}
  HWY_INLINE V operator()(VI q) const { return hn::MulAdd(hn::ConvertTo(D(), q), scale, offset); }
};

#if HWY_MAX_BYTES >= 64
// For q in 0..15 all values are one register.
struct NibbleMap {
  V table;
  HWY_INLINE NibbleMap(float scale, float offset)
      : table(hn::MulAdd(hn::Iota(D(), 0.0f), hn::Set(D(), scale), hn::Set(D(), offset))) {}
  HWY_INLINE V operator()(VI q) const {
    return hn::TableLookupLanes(table, hn::IndicesFromVec(D(), q));
  }
};
#else
using NibbleMap = WideMap;
#endif

template <int kBits>
using WeightMap = std::conditional_t<(kBits == 4), NibbleMap, WideMap>;

// Plain values, 32 at a time.
struct F32 {
  static constexpr bool kPlain = true;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 128;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
    const float* w = reinterpret_cast<const float*>(block);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += kLanes) {
      to.add(hn::LoadU(D(), w + i), i, hn::LoadU(D(), w + i + 16), i + 16);
    }
  }
};

struct F16 {
  static constexpr bool kPlain = true;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 64;
  static HWY_INLINE V load(const uint8_t* p) {
    return Load<float, float16>::full(D(), reinterpret_cast<const float16*>(p));
  }
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += kLanes) {
      to.add(load(block + 2 * i), i, load(block + 2 * i + 32), i + 16);
    }
  }
};

struct BF16 {
  static constexpr bool kPlain = true;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 64;
  static HWY_INLINE V load(const uint8_t* p) {
    return Load<float, bfloat16>::full(D(), reinterpret_cast<const bfloat16*>(p));
  }
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += kLanes) {
      to.add(load(block + 2 * i), i, load(block + 2 * i + 32), i + 16);
    }
  }
};

// f16 d, int8 q[32]:  d * q
struct Q8_0 {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 34;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
    const auto map = WeightMap<8>(load_f16(block), 0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += kLanes) {
      to.add(map(load_i8(block + 2 + i)), i, map(load_i8(block + 18 + i)), i + 16);
    }
  }
};

// 16 bytes whose low nibbles are columns 0..15 and high nibbles columns 16..31.
template <class To>
HWY_INLINE void decode_nibbles(const uint8_t* q, float scale, float offset, To& to) {
  const auto map = WeightMap<4>(scale, offset);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += kLanes) {
    const VI bytes = load_u8(q + i);
    to.add(map(low_nibble(bytes)), i, map(high_nibble(bytes)), i + 16);
  }
}

// f16 d, 4-bit q[32]:  d * (q - 8)
struct Q4_0 {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 18;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
    const float d = load_f16(block);
    decode_nibbles(block + 2, d, -8.0f * d, to);
  }
};

// f16 d, f16 m, 4-bit q[32]:  d * q + m
struct Q4_1 {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = true;
  static constexpr int64_t kWeights = 32, kBytes = 20;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* scales, To& to) {
    decode_nibbles(block + 4, scales[0], scales[1], to);
  }
};

// As decode_nibbles with a fifth bit: bit k of `bits` belongs to column k.
template <class To>
HWY_INLINE void decode_five_bits(const uint8_t* bits, const uint8_t* q, float scale, float offset,
                                 To& to) {
  uint32_t word;
  std::memcpy(&word, bits, sizeof word);
  const auto map = WeightMap<5>(scale, offset);
  const auto with_fifth = [&](VI nibble, int k) HWY_ATTR {
    const auto lane_bit = hn::Shl(hn::Set(DU(), 1u), hn::Iota(DU(), static_cast<uint32_t>(k)));
    const auto is_set = hn::Ne(hn::And(hn::Set(DU(), word), lane_bit), hn::Zero(DU()));
    return hn::Or(nibble, hn::IfThenElseZero(hn::RebindMask(DI(), is_set), hn::Set(DI(), 16)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += kLanes) {
    const VI bytes = load_u8(q + i);
    to.add(map(with_fifth(low_nibble(bytes), i)), i, map(with_fifth(high_nibble(bytes), i + 16)),
           i + 16);
  }
}

// f16 d, fifth bits[4], 4-bit q[32]:  d * (q - 16)
struct Q5_0 {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 32, kBytes = 22;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
    const float d = load_f16(block);
    decode_five_bits(block + 2, block + 6, d, -16.0f * d, to);
  }
};

// f16 d, f16 m, fifth bits[4], 4-bit q[32]:  d * q + m
struct Q5_1 {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = true;
  static constexpr int64_t kWeights = 32, kBytes = 24;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* scales, To& to) {
    decode_five_bits(block + 4, block + 8, scales[0], scales[1], to);
  }
};

// The 6-bit scales and minima of the 8 groups of Q4_K and Q5_K, packed into 12 bytes.
struct GroupScales {
  float scale[8], offset[8];

  HWY_INLINE GroupScales(const uint8_t* p, float d, float dmin) {  // packed[12]
    for (int g = 0; g < 4; ++g) {
      scale[g] = d * static_cast<float>(p[g] & 63);
      offset[g] = -dmin * static_cast<float>(p[g + 4] & 63);
      scale[g + 4] = d * static_cast<float>((p[g + 8] & 15) | ((p[g] >> 6) << 4));
      offset[g + 4] = -dmin * static_cast<float>((p[g + 8] >> 4) | ((p[g + 4] >> 6) << 4));
    }
  }
};

// f16 d, f16 dmin, packed scales[12], q[128]: 32 bytes hold two groups of 32 columns, low nibbles first.
struct Q4_K {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = true;
  static constexpr int64_t kWeights = 256, kBytes = 144;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* scales, To& to) {
    const GroupScales groups(block + 4, scales[0], scales[1]);
    for (int j = 0; j < 4; ++j) {
      const auto low = WeightMap<4>(groups.scale[2 * j], groups.offset[2 * j]);
      const auto high = WeightMap<4>(groups.scale[2 * j + 1], groups.offset[2 * j + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += kLanes) {
        const VI bytes = load_u8(block + 16 + 32 * j + i);
        to.add(low(low_nibble(bytes)), 64 * j + i, high(high_nibble(bytes)), 64 * j + 32 + i);
      }
    }
  }
};

// As Q4_K with fifth[32] before q: bit g of byte i is the fifth bit of column i of group g.
struct Q5_K {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = true;
  static constexpr int64_t kWeights = 256, kBytes = 176;
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* scales, To& to) {
    const GroupScales groups(block + 4, scales[0], scales[1]);
    for (int j = 0; j < 4; ++j) {
      const auto low = WeightMap<5>(groups.scale[2 * j], groups.offset[2 * j]);
      const auto high = WeightMap<5>(groups.scale[2 * j + 1], groups.offset[2 * j + 1]);
      const VI bit0 = hn::Set(DI(), 1 << (2 * j)), bit1 = hn::Set(DI(), 2 << (2 * j));
      const auto with_fifth = [](VI nibble, VI fifth, VI bit) HWY_ATTR {
        const auto is_set = hn::TestBit(fifth, bit);
        return hn::Or(nibble, hn::IfThenElseZero(is_set, hn::Set(DI(), 16)));
      };
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += kLanes) {
        const VI bytes = load_u8(block + 48 + 32 * j + i), fifth = load_u8(block + 16 + i);
        to.add(low(with_fifth(low_nibble(bytes), fifth, bit0)), 64 * j + i,
               high(with_fifth(high_nibble(bytes), fifth, bit1)), 64 * j + 32 + i);
      }
    }
  }
};

// low[128], high[64], int8 scales[16], f16 d (the last 2 of 210 bytes): each half of 128 columns has 64 bytes of low nibbles, 32
// bytes of high bit pairs and 8 scales, one per 16 columns;  d * scale * (q - 32)
struct Q6_K {
  static constexpr bool kPlain = false;
  static constexpr bool kPairs = false;
  static constexpr int64_t kWeights = 256, kBytes = 210;

  static HWY_INLINE VI joined(VI low, VI high) {
    return hn::Or(low, hn::ShiftLeft<4>(hn::And(high, hn::Set(DI(), 3))));
  }
  template <class To>
  static HWY_INLINE void decode(const uint8_t* block, const float* /*scales*/, To& to) {
    const float d = load_f16(block + 208);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* low = block + 64 * half;
      const uint8_t* high = block + 128 + 32 * half;
      const int8_t* group = reinterpret_cast<const int8_t*>(block + 192 + 8 * half);
      for (int part = 0; part < 2; ++part) {
        const auto map = [&](int g) HWY_ATTR {
          const float scale = d * static_cast<float>(group[2 * g + part]);
          return WeightMap<6>(scale, -32.0f * scale);
        };
        const auto map0 = map(0), map1 = map(1), map2 = map(2), map3 = map(3);
#pragma GCC unroll 4
        for (int i = 16 * part; i < 16 * part + 16; i += kLanes) {
          const VI a = load_u8(low + i), b = load_u8(low + 32 + i), h = load_u8(high + i);
          const int k = 128 * half + i;
          to.add(map0(joined(low_nibble(a), h)), k,
                 map1(joined(low_nibble(b), hn::ShiftRight<2>(h))), k + 32);
          to.add(map2(joined(high_nibble(a), hn::ShiftRight<4>(h))), k + 64,
                 map3(joined(high_nibble(b), hn::ShiftRight<6>(h))), k + 96);
        }
      }
    }
  }
};

}  // namespace
}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_BLOCK_FORMATS_INL_H_
