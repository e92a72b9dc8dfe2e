// SPDX-License-Identifier: Apache-2.0
//
// suspend.cc: gives the lanes' memory back for a while, and takes it again. Both collective.
//
// Suspending starts when no rank has a step under way (until_idle): then every message has been read by the rank it was
// for and every transfer has ended, so nobody writes into the memory of any rank, and each lets go of its own and of
// its peers' regions by itself. Signals, generations and what was acknowledged stay as they are: signals only count,
// and the memory holds nothing that outlives a step. So resuming is growing by nothing (grow.cc), and the next step
// gives the bits that it would have given.
#include "moe/arena.h"

namespace ept::moe {

void Arena::refuse_suspended() const {
  if (suspended_) fail(EPT_E_SUSPENDED, -1, "rank %u's group is suspended: call resume on every rank first", rank);
}

void Arena::suspend(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (suspended_) return;
  if (driver_ == Driver::kernels)
    fail(EPT_E_UNSUPPORTED, -1, "rank %u's lanes are used by its GPU, which can't give them up: close the group", rank);
  const Deadline deadline(timeout == UINT64_MAX ? timeout_ns : timeout);
  const std::shared_ptr<const Members> with = members_of_step();
  begin_attempt(*with);
  const Holds holds = until_idle(*with, deadline, "to suspend the group");
  suspended_ = true;
  set(metrics.page()->suspended, 1);
  for (auto &lane : lanes) {
    for (Link &link : lane->links) {
      Error error;
      if (link.region) check(ept_region_drop(engine, link.region, &error), error);
      link.region = 0;
    }
    lane->memory_id = 0;
    lane->base = nullptr;
  }
  for (auto &memory : memories_) memory.reset();
}

void Arena::resume(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (!suspended_) return;
  const Deadline deadline(timeout == UINT64_MAX ? timeout_ns : timeout);
  const std::shared_ptr<const Members> with = members_of_step();
  begin_attempt(*with);
  grow(map, uint32_t(lanes.size()), *with, deadline, "to resume the group", nullptr);
  suspended_ = false;
  set(metrics.page()->suspended, 0);
}

}  // namespace ept::moe
