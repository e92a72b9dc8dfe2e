// SPDX-License-Identifier: Apache-2.0
//
// moe.h: the steps behind the C API (moe.cc), each on a lane that the caller holds.
#pragma once

#include <memory>
#include <vector>

#include "moe/arena.h"

namespace ept::moe {

struct Moe {
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Object> object;
  std::vector<Lane *> lanes;
};

void dispatch_send(Moe &moe, Lane &lane, const ept_dispatch_args &args, Wait &wait);
void dispatch_wait(Moe &moe, Lane &lane, ept_arrival *arrival, Wait &wait);
void dispatch_recv(Moe &moe, Lane &lane, const ept_dispatch_outputs &outputs, ept_routing **routing, Wait &wait);
void combine_send(Moe &moe, Lane &lane, const ept_combine_args &args, Wait &wait);
void combine_recv(Moe &moe, Lane &lane, const ept_tensor &y, const ept_tensor *row_weights, Wait &wait);

// The open exchange of a receiving half. INVALID where there is none, or it is another AllToAll's.
Exchange &open_exchange(Moe &moe, Lane &lane, uint32_t phase, const char *operation);
// A lane's state is not hurt by what `body` throws.
template <class Body>
void harmless(Lane &lane, Body &&body) {
  const bool before = lane.committed;
  lane.committed = false;
  body();
  lane.committed = before;
}

}  // namespace ept::moe

// The C API's objects.
struct ept_arena {
  std::shared_ptr<ept::moe::Arena> arena;
};
struct ept_moe {
  ept::moe::Moe moe;
};
