// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <fstream>
#include <vector>

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
  link_map *map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr) library->path = map->l_name;
  return "";
}

std::string mapped_file() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t slash = line.find('/');
    if (slash == std::string::npos) continue;
    const std::string file = line.substr(slash);
    if (file.compare(file.rfind('/') + 1, 11, "libucp.so.0") == 0) return file;
  }
  return "";
}

// A wheel lies in the folder that holds this package: .../libucx/lib beside .../eptransport/plugins.
std::string beside_the_package() {
  Dl_info own{};
  if (dladdr(reinterpret_cast<void *>(&mapped_file), &own) == 0 || own.dli_fname == nullptr) return "";
  std::string folder = own.dli_fname;
  for (int up = 0; up < 3; ++up) {
    const size_t slash = folder.rfind('/');
    if (slash == std::string::npos) return "";
    folder.resize(slash);
  }
  return folder + "/libucx/lib/libucp.so.0";
}

}  // namespace

std::shared_ptr<const Library> open_library(const std::string &wanted, Refusal *refusal) {
  std::vector<std::string> places;
  if (!wanted.empty())
    places = {wanted};
  else
    for (const std::string &place : {mapped_file(), beside_the_package(), std::string("libucp.so.0")})
      if (!place.empty()) places.push_back(place);
  std::string reasons;
  for (const std::string &place : places) {
    void *handle = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    std::string reason;
    if (handle == nullptr) {
      const char *text = dlerror();
      reason = text != nullptr ? text : place + " can't be opened";
    } else {
      auto library = std::make_shared<Library>();
      reason = bind(handle, library.get());
      if (reason.empty()) return library;
      dlclose(handle);
      reason = place + " " + reason;
    }
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  refusal->why = reasons;
  refusal->mend =
      "pip install 'eptransport[ucx]', or install libucx0 (>= 1.13), or give "
      "EPT_UCX_LIBRARY=/path/to/libucp.so.0";
  return nullptr;
}

}  // namespace ucx
