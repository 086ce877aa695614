// What a call by FFT keeps of a flight of heads (call.h): rows of numbers for every token, and spectra.
#pragma once
#include <complex>
#include <vector>

#include "base/parallel.h"
#include "mechanisms/kernelized_rpe/fft_error.h"

namespace heed::rpe {

template <class Real>
struct SpectralFlight {
  /// `row_stride`: of tokens; `length`: of transforms.
  SpectralFlight(const Call& call, int64_t first_key_head, int64_t key_heads, int64_t row_stride,
                 int64_t length, bool backward)
      : first(first_key_head),
        count(key_heads),
        heads(key_heads * call.sizes.group()),
        spectrum_length(length),
        queries(heads, call.features, row_stride),
        keys(heads, call.features, row_stride),
        values(count, call.sizes.value_dim + 1, row_stride),
        sums(heads, call.sizes.value_dim + 1, row_stride),
        dsums(backward ? heads : 0, call.sizes.value_dim + 1, row_stride),
        dqueries(backward ? heads : 0, call.features, row_stride),
        dkeys(backward ? heads : 0, call.features, row_stride),
        dvalues(backward ? count : 0, call.sizes.value_dim + 1, row_stride),
        largest(static_cast<size_t>(heads * ceil_div(call.tokens, kTile))),
        spectra(static_cast<size_t>(heads * length)),
        visible(static_cast<size_t>(heads)),
        sizes(static_cast<size_t>(count)),
        scales(static_cast<size_t>(count)),
        key_norms(static_cast<size_t>(heads * call.features)),
        masses(call.signed_features() ? heads : 0, 1, row_stride) {}

  std::complex<Real>* spectrum(int64_t head) { return spectra.data() + head * spectrum_length; }
  bool sees_something(int64_t head, int64_t token) const {
    const auto& of_head = visible[static_cast<size_t>(head)];
    return of_head.empty() || of_head[static_cast<size_t>(token)] != 0;
  }

  int64_t first, count, heads;  // key heads; query heads
  int64_t spectrum_length;
  Channels queries, keys, values, sums;      // features; values and 1; N and D
  Channels dsums, dqueries, dkeys, dvalues;  // their gradients
  std::vector<double> largest;               // exponents of keys, by query head and tile
  std::vector<std::complex<Real>> spectra;   // of the weights, over the length, by query head
  std::vector<std::vector<char>> visible;    // by query head and token; empty: all see something
  std::vector<Sizes> sizes;                  // of values, by key head
  std::vector<double> scales;                // powers of 2 that bring values to 1, by key head
  std::vector<double> key_norms;             // over tokens, by query head and feature
  Channels masses;  // signed features, by query head: its sums of weights had all features one sign
};

}  // namespace heed::rpe
