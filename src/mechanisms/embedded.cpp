#include "mechanisms/embedded.h"

#include <stdexcept>
#include <string>

#include "mechanisms/embedded_table.h"

namespace heed {

std::string_view embedded(std::string_view name) {
  for (const EmbeddedFile* file = kEmbeddedFiles; !file->name.empty(); ++file) {
    if (file->name == name) return file->text;
  }
  throw std::logic_error("no embedded file '" + std::string(name) + "'");
}

std::vector<std::string_view> embedded_names() {
  std::vector<std::string_view> names;
  for (const EmbeddedFile* file = kEmbeddedFiles; !file->name.empty(); ++file) {
    names.push_back(file->name);
  }
  return names;
}

}  // namespace heed
