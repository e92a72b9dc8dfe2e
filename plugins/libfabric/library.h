// SPDX-License-Identifier: Apache-2.0
//
// library.h: libfabric.so.1, opened at run time, so that the plugin loads on any machine and says what is missing.
//
// Only these few functions are symbols; all else goes through the tables of functions that their objects carry
// (fid->ops, ep->rma, ep->msg, ...), by the inline functions of <rdma/*.h>. So whoever stands between the plugin and
// libfabric does it here: a decorator implements `Library`, hands out objects with tables of its own, and the plugin
// can't tell. strict.h is one (stricter than EFA), null.h another (a network that costs nothing).
//
// Versions. fi_getinfo, fi_dupinfo and fi_freeinfo are versioned symbols, and a plain dlsym would get the newest, whose
// structs are longer than those of older headers. The headers we are compiled with decide which version is asked for.
#pragma once

#include <rdma/fabric.h>

#include <cstdint>
#include <memory>
#include <string>

#include "../opening.h"

namespace libfabric {

class Library {
 public:
  virtual ~Library() = default;

  // As fi_getinfo and its kin of the same names. `api` is the version of the interface that the caller speaks.
  virtual int getinfo(uint32_t api, const char *node, const char *service, uint64_t flags, const fi_info *hints,
                      fi_info **infos) = 0;
  virtual void freeinfo(fi_info *infos) = 0;
  virtual fi_info *dupinfo(const fi_info *info) = 0;  // nullptr: an empty one, as fi_allocinfo
  virtual int fabric(fi_fabric_attr *attributes, fid_fabric **fabric, void *context) = 0;
  virtual const char *strerror(int number) = 0;
  virtual uint32_t version() = 0;         // FI_VERSION(major, minor) of what was opened
  virtual const std::string &path() = 0;  // the file that the dynamic linker mapped
};

// Opens `wanted` (a file), or where it is empty the first that loads of: one that this process has already mapped (two
// copies in a process see no devices), /opt/amazon/efa/lib*, the dynamic linker's own search. nullptr: `refusal` says
// why.
std::shared_ptr<Library> open_library(const std::string &wanted, plugin::Refusal *refusal);

// Copies of libfabric.so that this process has mapped, by file; more than one is worth a warning.
std::string mapped_libraries();

// The interface that we ask libfabric for: that of our headers.
constexpr uint32_t kApi = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);
static_assert(kApi >= FI_VERSION(1, 17), "libfabric's headers must be 1.17 or later");

}  // namespace libfabric
