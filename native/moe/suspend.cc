// SPDX-License-Identifier: Apache-2.0
//
// suspend.cc: gives the lanes' memory back for a while, and takes it again. Both collective.
//
// Suspending starts when no rank has a step under way (until_idle): then every message has been read by the rank it was
// for and every transfer has ended, so nobody writes into the memory of any rank, and each lets go of its own and of
// its peers' regions by itself. Signals, generations and what was acknowledged stay as they are: signals only count,
// and the memory holds nothing that outlives a step. So resuming is growing by nothing (grow.cc), and the next step
// gives the bits that it would have given.
//
// INVARIANTS of lanes that kernels drive (Follower; on a GPU cuda/sleep.cc)
//  - What a captured graph holds of a lane are addresses of tables that stay. Tables say where the lanes of this rank
//    and of its peers stand, and each launch reads them: so the memory may come again at another address.
//  - Between fall_asleep and awake a launch touches neither: it is one of a faulted lane, whose tables lead nowhere. So
//    a graph that is replayed meanwhile gives blank outputs, and what it did to the lane's books is undone by awake.
//  - A rank gives its memory back when every other has said that it holds it no longer, which CUDA IPC demands.
//  - Memory is whole, signals as they were counted, before any other rank can learn where it is; and no rank launches a
//    step before all have said that they have mapped all.
#include "moe/arena.h"

namespace ept::moe {

namespace {

template <class Body>
Failure attempted(Body &&body) {
  try {
    body();
  } catch (const Failure &failure) {
    return failure;
  }
  return Failure{Error()};
}

}  // namespace

void Arena::refuse_suspended() const {
  if (suspended_) fail(EPT_E_SUSPENDED, -1, "rank %u's group is suspended: call resume on every rank first", rank);
}

std::vector<Bytes> Arena::tell(const Failure &failed, uint64_t tag, const std::string &more, const Members &with,
                               const Deadline &deadline, const char *what) {
  const auto said = exchange(
      engine, rank, with, tag | attempt(), [&](uint32_t) { return status(failed).all() + more; }, deadline, what);
  if (failed.error.code) throw failed;
  std::vector<Bytes> rest;
  throw_theirs(said, rank, with, &rest);
  return rest;
}

void Arena::let_go_of_lanes() {
  for (auto &lane : lanes) {
    for (Link &link : lane->links) {
      Error error;
      if (link.region) (void)ept_region_drop(engine, link.region, &error);
      link.region = 0;
    }
    lane->memory_id = 0;
    lane->base = nullptr;
  }
  for (auto &memory : memories_) memory.reset();
}

void Arena::suspend(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (suspended_) return;
  const Deadline deadline(timeout == UINT64_MAX ? timeout_ns : timeout);
  const std::shared_ptr<const Members> with = members_of_step();
  begin_attempt(*with);
  const char what[] = "to suspend the group";
  const std::vector<Follower *> listed = followers();
  Failure failed = attempted([&] {
    for (const Follower *follower : listed) follower->refuse_sleep();
  });
  (void)tell(failed, kTagSide, {}, *with, deadline, what);
  const Holds holds = until_idle(*with, deadline, what);
  suspended_ = true;
  set(metrics.page()->suspended, 1);
  failed = attempted([&] {
    for (Follower *follower : listed) follower->fall_asleep();
  });
  let_go_of_lanes();
  // Where this fails, some rank may hold memory of ours: it is given back with the next resume that fails, or the
  // close.
  (void)tell(failed, kTagSideReady, {}, *with, deadline, what);
  for (Follower *follower : listed) follower->let_go();
}

void Arena::resume(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (!suspended_) return;
  const Deadline deadline(timeout == UINT64_MAX ? timeout_ns : timeout);
  const std::shared_ptr<const Members> with = members_of_step();
  begin_attempt(*with);
  const char what[] = "to resume the group";
  const std::vector<Follower *> listed = followers();
  grow(map, uint32_t(lanes.size()), *with, deadline, what, [&](uint64_t bytes) -> std::unique_ptr<LaneMemory> {
    for (Follower *follower : listed)
      if (auto memory = follower->lane_memory(bytes)) return memory;
    return nullptr;
  });
  try {
    Bytes mine;
    Failure failed = attempted([&] {
      for (Follower *follower : listed) {
        const std::string offer = follower->wake();
        mine.put_text(offer.data(), offer.size());
      }
    });
    std::vector<Bytes> theirs = tell(failed, kTagSide, mine.all(), *with, deadline, what);
    failed = attempted([&] {
      for (Follower *follower : listed) {
        std::vector<std::string> offers(world);
        for (uint32_t r = 0; r < world; r++)
          if (r != rank && with->has(r) && follower->expects(r)) offers[r] = theirs[r].get_text();
        follower->meet_again(offers, *with);
      }
    });
    (void)tell(failed, kTagSideReady, {}, *with, deadline, what);
  } catch (...) {
    for (Follower *follower : listed) follower->let_go();
    let_go_of_lanes();
    throw;
  }
  for (Follower *follower : listed) follower->awake();
  suspended_ = false;
  set(metrics.page()->suspended, 0);
}

}  // namespace ept::moe
