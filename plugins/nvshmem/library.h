// SPDX-License-Identifier: Apache-2.0
//
// library.h: libnvshmem_host.so.3 as this plugin uses it: opened at run time, its structs declared here by ourselves
// (they carry their own version and size), so that no header of NVSHMEM's is needed to build the plugin. Only the
// kernels that are linked with its device library need those (link.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "../opening.h"

namespace nvshmem {

// nvshmemx_uniqueid_v1 and so on: version is 1 << 16 | size.
struct UniqueId {
  int version;
  char internal[124];
};
struct UniqueIdArgs {
  int version;
  UniqueId *id;
  int rank, ranks;
};
struct InitAttr {
  int version;
  void *mpi;
  struct {
    int version;
    UniqueIdArgs uid;
    char content[96];
  } args;
};
static_assert(sizeof(UniqueId) == 128 && sizeof(UniqueIdArgs) == 24 && sizeof(InitAttr) == 144, "NVSHMEM 3's structs");
template <class T>
constexpr int versioned() {
  return (1 << 16) + static_cast<int>(sizeof(T));
}
constexpr unsigned kInitWithUniqueId = 1 << 3;

struct Library {
  int (*get_uniqueid)(UniqueId *);
  int (*set_attr_uniqueid_args)(int rank, int ranks, const UniqueId *, InitAttr *);
  int (*hostlib_init_attr)(unsigned flags, InitAttr *);
  int (*cumodule_init)(void *cuda_module);
  void *(*malloc)(size_t);
  void *(*ptr)(const void *, int pe);
  int (*my_pe)();
  int (*n_pes)();
  std::string path;
  int major = 0, minor = 0, patch = 0;

  std::string release() const {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  }
};

// `wanted`: a path; empty: one that this process has already (torch brings one) or that the system has, then the wheel
// beside this package. NULL, and why.
std::shared_ptr<const Library> open_library(const std::string &wanted, plugin::Refusal *refusal);

}  // namespace nvshmem
