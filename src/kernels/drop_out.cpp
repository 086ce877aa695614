// Dropout of weights: which ones a tile keeps, by one Philox 4x32-10 word (base/philox.h) for each.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/drop_out.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "base/philox.h"
#include "kernels/parts.h"
#include "kernels/row_scores-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using Wide = Full<uint64_t>;
using Words = hn::Repartition<uint32_t, Wide>;

// Keys whose words are drawn at a time.
constexpr int64_t kDrawn = 256;
// Each lane draws the words of four keys.
constexpr int64_t kKeysAtOnce = 4 * lanes<uint64_t>();
// Keys of the first four that lie before the row's, and what the last ones are drawn beyond them.
using DrawnWords = uint32_t[kDrawn + 4 + kKeysAtOnce];

// Lanes of 64 bits with a word in their lower half. What products leave in the upper half is not read.
struct Counter {
  hn::Vec<Words> words[4];
};

HWY_INLINE void philox_round(Counter& c, uint32_t key0, uint32_t key1) {
  const Words d;
  const auto high = [](hn::Vec<Wide> x)
                        HWY_ATTR { return hn::BitCast(Words(), hn::ShiftRight<32>(x)); };
  const auto product0 = hn::MulEven(c.words[0], hn::Set(d, kPhiloxMultipliers[0]));
  const auto product1 = hn::MulEven(c.words[2], hn::Set(d, kPhiloxMultipliers[1]));
  c.words[0] = hn::Xor3(high(product1), c.words[1], hn::Set(d, key0));
  c.words[1] = hn::BitCast(d, product1);
  c.words[2] = hn::Xor3(high(product0), c.words[3], hn::Set(d, key1));
  c.words[3] = hn::BitCast(d, product0);
}

// The words of kKeysAtOnce keys from 4 * group on.
HWY_INLINE void draw(const Dropout& which, uint32_t row, uint32_t group, uint32_t* to) {
  const Words d;
  const Wide wide;
  // Even lanes draw for the first half of the keys, odd ones for the second: that is how lanes of two
  // vectors are interleaved within blocks of 128 bits.
  constexpr auto kHalf = static_cast<uint32_t>(lanes<uint64_t>() / 2);
  const auto lane = hn::Iota(wide, 0);
  const auto odd = hn::And(lane, hn::Set(wide, 1));
  const auto place = hn::Add(hn::ShiftRight<1>(lane), hn::Mul(odd, hn::Set(wide, kHalf)));
  const auto groups = hn::Add(hn::BitCast(d, place), hn::Set(d, group));
  Counter c{{groups, hn::Set(d, row), hn::Set(d, which.head), hn::Set(d, which.batch)}};
  auto key0 = static_cast<uint32_t>(which.seed), key1 = static_cast<uint32_t>(which.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c, key0, key1);
    key0 += kPhiloxWeyl[0];
    key1 += kPhiloxWeyl[1];
  }
  const auto pair = [&](const auto& lower, const auto& upper) HWY_ATTR {
    const auto low = hn::And(hn::BitCast(wide, lower), hn::Set(wide, 0xffffffff));
    return hn::Or(low, hn::ShiftLeft<32>(hn::BitCast(wide, upper)));
  };
  const auto first = pair(c.words[0], c.words[1]), second = pair(c.words[2], c.words[3]);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(wide, first, second)), d, to);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(wide, first, second)), d, to + 2 * 2 * kHalf);
}

// Calls body(m, dropped lanes) for all vectors of columns that a row sees some of.
template <class T, class Body>
HWY_INLINE void for_dropped(const Dropout& which, int64_t r, KeyRange range, Body&& body) {
  const Full<T> d;
  const hn::Rebind<uint32_t, Full<T>> d_words;
  const KeyRange whole = whole_vectors<T>(range);
  HWY_ALIGN DrawnWords words;
  for (int64_t begin = whole.begin; begin < whole.end; begin += kDrawn) {
    const int64_t end = HWY_MIN(begin + kDrawn, int64_t{whole.end}), key = which.key + begin;
    for (int64_t i = 0; i < key % 4 + end - begin; i += kKeysAtOnce) {
      draw(which, static_cast<uint32_t>(which.row + r), static_cast<uint32_t>((key + i) / 4),
           words + i);
    }
    for (int64_t m = begin; m < end; m += lanes<T>()) {
      const auto word = hn::LoadU(d_words, words + key % 4 + m - begin);
      const auto limit = hn::Set(d_words, which.limit);
      if constexpr (sizeof(T) == 4) {
        body(m, hn::RebindMask(d, hn::Lt(word, limit)));
      } else {
        const hn::RebindToUnsigned<Full<T>> d_bits;
        const auto bits = hn::PromoteTo(d_bits, word);
        body(m, hn::RebindMask(d, hn::Lt(bits, hn::PromoteTo(d_bits, limit))));
      }
    }
  }
}

template <class T>
void drop_out(const Dropout& which, int64_t rows, int64_t key_count, const KeyRange* ranges,
              void* weights, int64_t stride) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = static_cast<T*>(weights) + r * stride;
    for_dropped<T>(which, r, range_of(ranges, r, key_count), [&](int64_t m, auto dropped) HWY_ATTR {
      hn::StoreU(hn::IfThenZeroElse(dropped, hn::LoadU(d, row + m)), d, row + m);
    });
  }
}

void drop_half(const Dropout& which, int64_t rows, int64_t key_count, const KeyRange* ranges,
               void* weights, int64_t stride) {
  const hn::RebindToUnsigned<Full<float>> d;
  const HalfBits d16;
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* row = static_cast<uint16_t*>(weights) + r * stride;
    const KeyRange range = range_of(ranges, r, key_count);
    for_dropped<float>(which, r, range, [&](int64_t m, auto dropped) HWY_ATTR {
      const auto bits = hn::PromoteTo(d, hn::LoadU(d16, row + m));
      const auto kept = hn::IfThenZeroElse(hn::RebindMask(d, dropped), bits);
      hn::StoreU(hn::TruncateTo(d16, kept), d16, row + m);
    });
  }
}

template <class T>
void dropout_factors(const Dropout& which, int64_t rows, int64_t key_count, const KeyRange* ranges,
                     T kept, Block<T> factors) {
  const Full<T> d;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = factors.row(r);
    for_dropped<T>(which, r, range_of(ranges, r, key_count), [&](int64_t m, auto dropped) HWY_ATTR {
      hn::StoreU(hn::IfThenZeroElse(dropped, hn::Set(d, kept)), d, row + m);
    });
  }
}

}  // namespace

void add_dropout_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.drop_out = drop_out<float>;
  f.dropout_factors = dropout_factors<float>;
  d.drop_out = drop_out<double>;
  d.dropout_factors = dropout_factors<double>;
}

void add_half_dropout_parts(TileKernels<float>& f) { f.drop_out = drop_half; }

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_dropout_parts)
HEED_SELECT_HALF_PART(add_half_dropout_parts)
}  // namespace heed::kernels
#endif
