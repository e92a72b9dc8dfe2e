// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>

#include <cstring>

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
  library->path = plugin::file_of(handle);
  return "";
}

}  // namespace

std::shared_ptr<const Library> open_library(const std::string &wanted, plugin::Refusal *refusal) {
  refusal->mend =
      "pip install nvidia-nvshmem-cu13 (or -cu12, by the CUDA release that the kernels are linked with) beside this "
      "package, or give EPT_NVSHMEM_LIBRARY=/path/to/libnvshmem_host.so.3";
  std::vector<std::string> places = {wanted};
  if (wanted.empty()) places = {kFile, plugin::beside_the_package(std::string("nvidia/nvshmem/lib/") + kFile)};
  auto library = std::make_shared<Library>();
  if (plugin::open_first(places, &refusal->why, [&](void *handle) { return bind(handle, library.get()); }))
    return library;
  return nullptr;
}

}  // namespace nvshmem
