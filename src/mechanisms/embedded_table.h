// What the generated file of embedded texts defines: a table that ends with an empty name.
#pragma once
#include <string_view>

namespace heed {

struct EmbeddedFile {
  std::string_view name;
  std::string_view text;
};
extern const EmbeddedFile kEmbeddedFiles[];

}  // namespace heed
