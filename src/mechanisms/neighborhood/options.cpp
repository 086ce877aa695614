#include "mechanisms/neighborhood/options.h"

#include <charconv>
#include <string>

#include "heed/error.h"

namespace heed::na {

std::vector<int64_t> numbers_of(const Spec& options, const char* key, const char* fallback,
                                int64_t least) {
  const std::string text = options.text(key).value_or(fallback);
  const auto fail = [&](const std::string& needed) {
    throw Error(std::string(key) + "=" + text + ": " + needed);
  };
  std::vector<int64_t> values;
  const char *at = text.data(), *const end = at + text.size();
  for (;;) {
    int64_t value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc() || (next != end && *next != 'x')) {
      fail("one number or one per axis is needed, as 3x5");
    }
    if (value < least) fail(std::to_string(least) + " or more is needed on every axis");
    values.push_back(value);
    if (next == end) return values;
    at = next + 1;
  }
}

std::vector<tiled::NeighborhoodAxis> axes_of(const Spec& options,
                                             std::span<const int64_t> lengths) {
  const auto per_axis = [&](const char* key, const char* fallback, int64_t least = 1) {
    auto values = numbers_of(options, key, fallback, least);
    if (values.size() == 1) values.resize(lengths.size(), values[0]);
    if (values.size() != lengths.size()) {
      throw Error(std::string(key) + ": found " + std::to_string(values.size()) +
                  " numbers, 1 or one for each of the " + std::to_string(lengths.size()) +
                  " axes is needed");
    }
    return values;
  };
  const auto kernel = per_axis("kernel_size", "3"), stride = per_axis("stride", "1"),
             dilation = per_axis("dilation", "1"), causal = per_axis("is_causal", "0", 0);
  std::vector<tiled::NeighborhoodAxis> axes;
  for (size_t a = 0; a < lengths.size(); ++a) {
    axes.push_back({lengths[a], kernel[a], stride[a], dilation[a], causal[a] != 0});
  }
  return axes;
}

}  // namespace heed::na
