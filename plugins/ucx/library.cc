// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>

#include <cstring>

namespace ucx {
namespace {

// Empty: all is there. Else what is not.
std::string bind(void *handle, Library *library) {
  // libucs comes along with libucp, and a search by handle goes through what it needs too.
#define EPT_UCX_TAKE(name)                                               \
  {                                                                      \
    void *symbol = dlsym(handle, #name);                                 \
    if (symbol == nullptr) return "has no " #name " (UCX before 1.13?)"; \
    memcpy(&library->name, &symbol, sizeof symbol);                      \
  }
  EPT_UCX_FUNCTIONS(EPT_UCX_TAKE)
#undef EPT_UCX_TAKE
  library->ucp_get_version(&library->major, &library->minor, &library->release);
  if (library->major != kApiMajor || library->minor < kApiMinor)
    return "is release " + std::to_string(library->major) + "." + std::to_string(library->minor) +
           "; 1.13 or a later 1.x is needed";
  library->path = plugin::file_of(handle);
  return "";
}

}  // namespace

std::shared_ptr<const Library> open_library(const std::string &wanted, plugin::Refusal *refusal) {
  constexpr const char *kFile = "libucp.so.0";
  std::vector<std::string> places = {wanted};
  if (wanted.empty()) {
    places = plugin::mapped_files(kFile);
    places.push_back(plugin::beside_the_package(std::string("libucx/lib/") + kFile));
    places.push_back(kFile);
  }
  auto library = std::make_shared<Library>();
  if (plugin::open_first(places, &refusal->why, [&](void *handle) { return bind(handle, library.get()); }))
    return library;
  refusal->mend =
      "pip install 'eptransport[ucx]', or install libucx0 (>= 1.13), or give "
      "EPT_UCX_LIBRARY=/path/to/libucp.so.0";
  return nullptr;
}

}  // namespace ucx
