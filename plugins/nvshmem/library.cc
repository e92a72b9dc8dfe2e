// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <vector>

namespace nvshmem {
namespace {

constexpr const char *kFile = "libnvshmem_host.so.3";

// Empty: all is there. Else what is not.
std::string bind(void *handle, Library *library) {
  const auto take = [&](const char *name, auto *function) {
    void *symbol = dlsym(handle, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != nullptr;
  };
  void (*version)(int *, int *, int *) = nullptr;
  if (!take("nvshmemx_vendor_get_version_info", &version)) return "has no nvshmemx_vendor_get_version_info";
  version(&library->major, &library->minor, &library->patch);
  if (library->major != 3) return "is NVSHMEM " + library->release() + "; this plugin speaks with 3.x";
  for (const auto &[name, there] : {
           std::pair{"nvshmemx_get_uniqueid", take("nvshmemx_get_uniqueid", &library->get_uniqueid)},
           std::pair{"nvshmemx_set_attr_uniqueid_args",
                     take("nvshmemx_set_attr_uniqueid_args", &library->set_attr_uniqueid_args)},
           std::pair{"nvshmemx_hostlib_init_attr", take("nvshmemx_hostlib_init_attr", &library->hostlib_init_attr)},
           std::pair{"nvshmemx_cumodule_init", take("nvshmemx_cumodule_init", &library->cumodule_init)},
           std::pair{"nvshmem_malloc", take("nvshmem_malloc", &library->malloc)},
           std::pair{"nvshmem_ptr", take("nvshmem_ptr", &library->ptr)},
           std::pair{"nvshmem_my_pe", take("nvshmem_my_pe", &library->my_pe)},
           std::pair{"nvshmem_n_pes", take("nvshmem_n_pes", &library->n_pes)},
       })
    if (!there) return std::string("has no ") + name + " (NVSHMEM " + library->release() + ")";
  link_map *map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr) library->path = map->l_name;
  return "";
}

// A wheel lies in the folder that holds this package: .../nvidia/nvshmem/lib beside .../eptransport/plugins.
std::string beside_the_package() {
  Dl_info own{};
  if (dladdr(reinterpret_cast<void *>(&beside_the_package), &own) == 0 || own.dli_fname == nullptr) return "";
  std::string folder = own.dli_fname;
  for (int up = 0; up < 3; ++up) {
    const size_t slash = folder.rfind('/');
    if (slash == std::string::npos) return "";
    folder.resize(slash);
  }
  return folder + "/nvidia/nvshmem/lib/" + kFile;
}

}  // namespace

std::shared_ptr<const Library> open_library(const std::string &wanted, Refusal *refusal) {
  refusal->mend =
      "pip install nvidia-nvshmem-cu13 (or -cu12, by the CUDA release that the kernels are linked with) beside this "
      "package, or give EPT_NVSHMEM_LIBRARY=/path/to/libnvshmem_host.so.3";
  const std::vector<std::string> places =
      wanted.empty() ? std::vector<std::string>{kFile, beside_the_package()} : std::vector<std::string>{wanted};
  void *handle = nullptr;
  for (const std::string &place : places) {
    // One that the program has loaded already (torch brings one) comes before a second copy.
    if (wanted.empty() && place == kFile) handle = dlopen(kFile, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    if (handle == nullptr && !place.empty()) handle = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle != nullptr) break;
    const char *text = dlerror();
    refusal->why = text != nullptr ? text : place + " can't be opened";
  }
  if (handle == nullptr) return nullptr;
  auto library = std::make_shared<Library>();
  const std::string missing = bind(handle, library.get());
  if (missing.empty()) return library;
  refusal->why = (library->path.empty() ? places.back() : library->path) + " " + missing;
  return nullptr;
}

}  // namespace nvshmem
