// SPDX-License-Identifier: Apache-2.0
//
// null.h: a network inside the process, as a `Library`. Two uses:
//
//   costs nothing   a write is accepted and completes at the next read of its queue; nothing is moved. What an
//                   operation costs over it is our own code's: `eptransport bench` takes its figure from this.
//   lands           the writes of the first use land too, in order, with their 64-bit data: the plainest provider
//                   there can be, for tests of what stands above (strict.h) where no libfabric.so is installed.
//
// Messages are delivered in both, since connections are made with them. Addresses are known inside this process only.
#pragma once

#include <memory>

#include "library.h"

namespace libfabric {

struct NullOptions {
  bool writes_land = false;
  int mr_mode = 0;  // what it asks of registrations: FI_MR_VIRT_ADDR, FI_MR_PROV_KEY; 0: offsets and your own keys
  size_t tx_size = 4096;          // operations in flight before a post is told EAGAIN; a power of two
  uint32_t busy = 0;              // every so many-th post is told EAGAIN for no reason; 0: none
  const char *provider = "null";  // whose name it bears, so that a plugin treats it as that one
};

std::shared_ptr<Library> make_null(const NullOptions &options = {});

}  // namespace libfabric
