#include "libtorch/library.h"

#include "heed/error.h"

#ifdef HEED_TORCH_LIBRARY
#include <dlfcn.h>
#endif

namespace heed {

#ifdef HEED_TORCH_LIBRARY

namespace {

const TorchLibrary* load() {
  // Found by the RUNPATH of this executable: beside it, or where it was built.
  void* library = dlopen(HEED_TORCH_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  using Functions = const TorchLibrary* (*)();
  const auto functions = library == nullptr
                             ? nullptr
                             : reinterpret_cast<Functions>(dlsym(library, "heed_torch_functions"));
  if (functions == nullptr) {
    throw Error("PyTorch's library is needed and cannot be loaded: " + std::string(dlerror()));
  }
  return functions();
}

}  // namespace

const TorchLibrary* torch_library() {
  static const TorchLibrary* library = load();
  return library;
}

#else

const TorchLibrary* torch_library() { return nullptr; }

#endif

}  // namespace heed
