// SPDX-License-Identifier: Apache-2.0
//
// mask.cc: who takes part, and what a lane's calls owe to the answer.
//
// INVARIANTS
//  - The membership is agreed above (through the store) and numbered; the number names the set. set_members only moves
//    on. The engine has masked a rank before it is left out here, so no message of it can come any more.
//  - A step takes its members once, at dispatch_send (Exchange::members, SourceSide::members), and all its calls use
//    those: the rows it packs, the counts it reads and the ranks it waits for are of one set, whatever happens
//    meanwhile. A wait for a member that was masked since ends with PEER_LOST, since the engine says so.
//  - Every header names the membership of its step. Ranks that began a step under two memberships both see it, both
//    fault, and come together in a reset: so no rank ever sums what another one has left out.
//  - A rank that has come back takes part from the reset on that has made its links anew (reset.cc): before it no step
//    begins under the new membership.
#include <algorithm>

#include "moe/arena.h"

namespace ept::moe {

void Arena::set_members(uint32_t number, const uint8_t *active, uint64_t step) {
  Error error;
  ept_engine_info info{};
  info.size = sizeof info;
  check(ept_engine_info_get(engine, &info, &error), error);
  std::unique_lock<std::mutex> lock(members_mutex_);
  const bool another_life = info.epoch != epoch.exchange(info.epoch);
  if (another_life) {
    std::fill(returned_.begin(), returned_.end(), 1);
    reports_.begin(world);
  }
  if (number <= members_->epoch && !another_life) return;
  auto now = std::make_shared<Members>();
  now->epoch = number;
  now->active.assign(active, active + world);
  for (uint32_t r = 0; r < world; r++) {
    if (!now->has(r)) returned_[r] = 0;
    if (now->has(r) && !members_->has(r)) returned_[r] = 1;
  }
  returned_[rank] = 0;
  step_ = std::max<uint64_t>(step_, step);
  members_ = std::move(now);
  lock.unlock();
  const std::lock_guard<std::mutex> listed(followers_mutex_);
  for (Follower *follower : followers_) follower->follow();
}

void Arena::list(Follower *follower) {
  const std::lock_guard<std::mutex> lock(followers_mutex_);
  followers_.push_back(follower);
}

void Arena::unlist(Follower *follower) {
  const std::lock_guard<std::mutex> lock(followers_mutex_);
  std::erase(followers_, follower);
}

std::vector<Follower *> Arena::followers() {
  const std::lock_guard<std::mutex> lock(followers_mutex_);
  return followers_;
}

void Arena::watch() {
  const std::unique_lock<std::mutex> lock(collective_, std::try_to_lock);
  if (!lock || closed_) return;  // whoever has it hears for itself
  if (!reports_.hear(engine, epoch)) return;
  const std::lock_guard<std::mutex> listed(followers_mutex_);
  for (Follower *follower : followers_) follower->follow();
}

std::shared_ptr<const Members> Arena::members() const {
  const std::lock_guard<std::mutex> lock(members_mutex_);
  return members_;
}

std::shared_ptr<const Members> Arena::members_of_step() const {
  const std::lock_guard<std::mutex> lock(members_mutex_);
  if (!members_->has(rank)) fail(EPT_E_PEER_LOST, int32_t(rank), "rank %u is masked itself", rank);
  for (uint32_t r = 0; r < world; r++)
    if (returned_[r])
      fail(EPT_E_FAULT, int32_t(r), "rank %u is back since membership %u: reset on every rank, and go on with it", r,
           members_->epoch);
  return members_;
}

// INVARIANT. Which pairs of ranks talk through the engine is decided by every rank for itself, from the places of all,
// and alike, since all have the same places. A rank that makes an AllToAll alone, as those that others have had before
// its process began, has them from one of these; only its own is new. So its lanes are as the others' are, and the
// reset that takes it in finds links to make anew, and memory to map, where the others look for them.
std::string Arena::all_places() const {
  const std::lock_guard<std::mutex> lock(members_mutex_);
  Bytes bytes;
  bytes.put(uint32_t(sizeof(Place))).put(world);
  for (const Place &place : places_) bytes.put(place);
  return bytes.all();
}

void Arena::learn_place(uint32_t other, const Place &place) {
  const std::lock_guard<std::mutex> lock(members_mutex_);
  places_[other] = place;
}

void Arena::expect(uint32_t objects, const std::string &places) {
  const std::lock_guard<std::mutex> lock(members_mutex_);
  if (objects && !places.empty()) {
    Bytes bytes(places);
    if (places.size() != 2 * sizeof(uint32_t) + world * sizeof(Place) || bytes.get<uint32_t>() != sizeof(Place) ||
        bytes.get<uint32_t>() != world)
      fail(EPT_E_VERSION, -1, "where the other ranks compute comes in %zu bytes, which this version doesn't read",
           places.size());
    for (uint32_t r = 0; r < world; r++) {
      auto place = bytes.get<Place>();
      if (r == rank || !place.known) continue;
      place.known = 2;
      place.lanes = Driver::none;  // asked of ranks that take part
      places_[r] = place;
    }
  }
  expected_ = objects;
  if (!objects) return;
  for (uint32_t r = 0; r < world; r++) returned_[r] = r != rank && members_->has(r);
}

void Arena::refuse_reset(uint32_t other) const {
  if (reports_.resets(other))
    fail(EPT_E_FAULT, int32_t(other), "rank %u has called reset, which abandons this step: reset here too", other);
}

void Lane::refuse_old(const Members &members) {
  const std::shared_ptr<const Members> now = arena.members();
  if (now->epoch == members.epoch) return;
  committed = true;  // other ranks may learn of it in another call: only a reset brings all to one place
  for (uint32_t r = 0; r < arena.world; r++)
    if (members.has(r) && !now->has(r))
      fail(EPT_E_PEER_LOST, int32_t(r),
           "rank %u was masked since the dispatch (membership %u, now %u): what it had of these tokens is lost; reset, "
           "and dispatch again",
           r, members.epoch, now->epoch);
  fail(EPT_E_FAULT, -1,
       "the dispatch was under membership %u, which is %u now: reset on every rank, and dispatch again", members.epoch,
       now->epoch);
}

uint64_t Arena::step() {
  uint64_t most = 0;
  const std::lock_guard<std::mutex> lock(collective_);
  for (auto &lane : lanes)
    for (const std::atomic<uint64_t> &next : lane->next) most = std::max<uint64_t>(most, next);
  const std::lock_guard<std::mutex> listed(followers_mutex_);
  for (Follower *follower : followers_) most = std::max(most, follower->step());
  return most;
}

}  // namespace ept::moe

using namespace ept::moe;

int32_t ept_routing_lost(const ept_routing *routing, uint32_t *membership, uint8_t *ranks, uint8_t *lost) {
  const SourceSide &source = *routing->source;
  const Members &members = *source.members;
  const Placement &placement = routing->made_by->placement;
  if (membership) *membership = members.epoch;
  for (size_t r = 0; ranks && r < members.active.size(); r++) ranks[r] = !members.has(uint32_t(r));
  for (size_t i = 0; lost && i < source.ids.size(); i++)
    lost[i] = source.ids[i] >= 0 && !members.has(placement.rank[size_t(source.ids[i])]);
  return EPT_OK;
}
