// SPDX-License-Identifier: Apache-2.0
//
// reset.cc: brings every lane of every rank that is up to one generation, empty, after a fault, and takes in the ranks
// that have come back.
//
//   offer    to a rank to which a link was made anew: the link's signals and region (links.h). It offers ours the same.
//   report   each rank tells each other what it has posted to it (chunks of each signal, grants), and its generations
//   drain    a rank waits until all that was posted to it has landed: then nobody writes into its memory any more
//   clean    it says so to each, naming the report it has drained
//
// A rank may write again when all have said clean to its own report. Signals only count up, so nothing is set back: the
// receiver's `taken` moves to the sender's `posted`, the sender's `grants_before` to what the receiver has given. All
// take the largest generation of all reports, and none below the step that the membership was agreed at.
//
// Calls that did not all get through are repeated: each rank numbers its own calls, a report carries its number and a
// clean message the number it answers; a newer report of a rank replaces the one before, one at or below the number
// that ended well is old. A report's contents don't change between calls, since a faulted lane posts nothing. What was
// heard is kept from call to call (reports.h), since it is said once; a clean message counts with a report that is at
// least as new as itself, so that none is believed beside the report of an earlier reset.
//
// All that end well had one membership: a report under an older one is waited out, for its rank will learn and come
// again; a newer one, or one that the engine has heard of, ends the call with LATER. A rank that is masked meanwhile is
// no longer waited for, by the engine's word.
#include <stdio.h>

#include <algorithm>

#include "moe/arena.h"
#include "moe/links.h"

namespace ept::moe {

struct Resetting {
  Arena &arena;
  const Deadline deadline;
  const uint64_t number;
  const std::shared_ptr<const Members> members;
  const uint32_t life;
  std::vector<uint8_t> up;
  std::vector<uint32_t> lives;  // of the peers

  Resetting(Arena &of, uint64_t timeout_ns)
      : arena(of),
        deadline(timeout_ns),
        number(++of.resets_),
        members(of.members()),
        life(of.epoch),
        up(of.world, 0),
        lives(of.world, 0) {}

  int32_t run();

 private:
  void forget_steps();
  void find_up();
  bool stale(const Link &link, uint32_t rank) const { return link.mine != life || link.theirs != lives[rank]; }
  void offer(uint32_t rank);
  bool accept(uint32_t rank);
  void report(uint32_t rank);
  bool moved_on();
  bool usable(uint32_t rank);
  void compare(uint32_t rank, const Report &report) const;
  bool drain(uint32_t rank);
  bool answer(uint32_t rank);
  bool through(uint32_t rank);
  bool done();
  void wait();
  void agree();
  bool send(uint32_t rank, uint64_t tag, const void *data, size_t length);
};

// False: it is gone meanwhile.
bool Resetting::send(uint32_t rank, uint64_t tag, const void *data, size_t length) {
  Error error;
  const int32_t code = ept_engine_send(arena.engine, rank, tag, data, length, deadline.remaining(), &error);
  if (code == EPT_E_PEER_LOST) {
    up[rank] = 0;
    return false;
  }
  check(code, error);
  return true;
}

// Our own transfers end first, one way or the other: one that failed never raises its signal and is not reported.
void Resetting::forget_steps() {
  for (auto &lane : arena.lanes) {
    for (Link &link : lane->links)
      for (uint32_t i = 0; i < 8; i++) try {
          if (!lane->settle(link, i / 4, i / 2 % 2, i % 2, deadline.remaining()))
            fail(EPT_E_TIMEOUT, -1, "reset: rank %u waited %.3f s for a write of lane %u to be done", arena.rank,
                 deadline.waited_s(), lane->index);
        } catch (const Failure &failure) {
          if (failure.error.code == EPT_E_TIMEOUT) throw;
        }
    for (auto &phase : lane->exchanges)
      for (Exchange &exchange : phase) exchange = Exchange();
    for (Link &link : lane->links) link.grants_owed[0] = link.grants_owed[1] = 0;
  }
}

void Resetting::find_up() {
  for (uint32_t r = 0; r < arena.world; r++) {
    if (r == arena.rank || !members->has(r)) continue;
    if (const int32_t status = info_of(arena.engine, r).status;
        status == EPT_PEER_NEW || status == EPT_PEER_CONNECTING) {
      Error error;
      const int32_t code = ept_engine_wait_peer(arena.engine, r, deadline.remaining(), &error);
      if (code != EPT_E_PEER_LOST) check(code, error);
    }
    const ept_peer_info found = info_of(arena.engine, r);
    up[r] = !ended(found.status);
    lives[r] = found.epoch;
  }
}

// ---- links ----

void Resetting::offer(uint32_t rank) {
  for (auto &lane : arena.lanes) {
    Link &link = lane->links[rank];
    release(arena.engine, link);
    link.mine = life;
    link.theirs = lives[rank];
    make_signals(arena.engine, *lane, rank);
  }
  for (auto &lane : arena.lanes) {
    Bytes bytes;
    bytes.put(Offer{{life, lives[rank]}, lane->index, uint32_t(arena.lanes.size())});
    give_region(arena.engine, lane->memory_id, rank, arena.map.exported(), bytes);
    give_signals(arena.engine, lane->links[rank], bytes);
    if (!send(rank, kTagOffer, bytes.all().data(), bytes.all().size())) return;
  }
}

bool Resetting::accept(uint32_t rank) {
  Heard &heard = arena.reports_.of(rank);
  if (arena.lanes[0]->links[rank].region || heard.offers.empty() || heard.offered < heard.offers.size()) return false;
  if (heard.offers.size() != arena.lanes.size())
    fail(EPT_E_MISMATCH, int32_t(rank), "rank %u has %zu lanes, rank %u has %zu", rank, heard.offers.size(), arena.rank,
         arena.lanes.size());
  for (auto &lane : arena.lanes) {
    Bytes bytes(heard.offers[lane->index]);
    Link &link = lane->links[rank];
    link.region = take_region(arena.engine, rank, bytes);
    take_signals(arena.engine, rank, link, bytes);
  }
  heard.offers.clear();
  heard.offered = 0;
  return true;
}

// ---- reports ----

void Resetting::report(uint32_t rank) {
  for (auto &lane : arena.lanes) {
    const Link &link = lane->links[rank];
    Report report{};
    report.lives = {life, lives[rank]};
    report.number = number;
    report.membership = members->epoch;
    report.objects = arena.objects_;
    report.lane = lane->index;
    report.lanes = uint32_t(arena.lanes.size());
    report.attempts = arena.attempts_under_ == members->epoch ? arena.attempts_ : 0;
    report.step = arena.step_;
    for (uint32_t p = 0; p < EPT_PHASES; p++) report.next[p] = lane->next[p];
    memcpy(report.posted, link.posted, sizeof report.posted);
    memcpy(report.grants, link.grants_given, sizeof report.grants);
    memcpy(report.map, &arena.map, sizeof report.map);
    if (!send(rank, kTagReset, &report, sizeof report)) return;
  }
}

// Whether the membership is another one by now, here or by what others say.
bool Resetting::moved_on() {
  uint32_t heard = 0;
  Error error;
  check(ept_engine_membership(arena.engine, &heard, &error), error);
  bool newer = heard > members->epoch || arena.members()->epoch != members->epoch;
  for (uint32_t r = 0; r < arena.world; r++) {
    const Heard &from = arena.reports_.of(r);
    newer = newer || (up[r] && from.reported() && from.reports[0].membership > members->epoch);
  }
  return newer;
}

void Resetting::compare(uint32_t rank, const Report &report) const {
  if (report.lanes == arena.lanes.size() && report.objects == arena.objects_ &&
      memcmp(report.map, &arena.map, sizeof report.map) == 0)
    return;
  fail(EPT_E_MISMATCH, int32_t(rank),
       "rank %u has %u lanes and has made %u AllToAlls, rank %u has %zu and has made %u, of %s: a rank that comes back "
       "makes those that the others have, in their order, before its first reset",
       rank, report.lanes, report.objects, arena.rank, arena.lanes.size(), arena.objects_,
       memcmp(report.map, &arena.map, sizeof report.map) ? "other sizes" : "the same sizes");
}

// Its newest report is whole, of our membership, and not one that an earlier reset ended well with.
bool Resetting::usable(uint32_t rank) {
  const Heard &heard = arena.reports_.of(rank);
  return heard.life == lives[rank] && heard.reported() && heard.reports[0].membership == members->epoch;
}

// Whether all that `rank` has posted to us has landed.
bool Resetting::drain(uint32_t rank) {
  for (auto &lane : arena.lanes) {
    const Link &link = lane->links[rank];
    const Report &report = arena.reports_.of(rank).reports[lane->index];
    Error error;
    uint64_t value = 0;
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      for (uint32_t i = 0; i < 4; i++) {
        check(ept_signal_value(arena.engine, link.arrived[p][i / 2][i % 2], &value, &error), error);
        if (value < report.posted[p][i / 2][i % 2]) return false;
      }
      check(ept_signal_value(arena.engine, link.granted[p], &value, &error), error);
      if (value < report.grants[p]) return false;
    }
  }
  return true;
}

bool Resetting::answer(uint32_t rank) {
  if (!up[rank] || !usable(rank) || !arena.lanes[0]->links[rank].region) return false;
  Heard &heard = arena.reports_.of(rank);
  if (heard.answered == heard.number) return false;
  for (const Report &report : heard.reports) compare(rank, report);
  if (!drain(rank)) return false;
  const Clean clean = {{life, lives[rank]}, heard.number, number};
  if (send(rank, kTagClean, &clean, sizeof clean)) heard.answered = heard.number;
  return true;
}

bool Resetting::through(uint32_t rank) {
  const Heard &heard = arena.reports_.of(rank);
  return usable(rank) && heard.answered == heard.number && heard.clean.answers == number &&
         heard.clean.number <= heard.number;
}

// All that are still up have answered and were answered. A rank that is lost meanwhile is no longer waited for.
bool Resetting::done() {
  bool all = true;
  for (uint32_t r = 0; r < arena.world; r++) {
    if (!up[r] || through(r)) continue;
    up[r] = !ended(info_of(arena.engine, r).status);
    all = all && !up[r];
  }
  return all;
}

// Sleeps a little, on a message where one is due.
void Resetting::wait() {
  uint32_t missing = arena.rank;
  for (uint32_t r = 0; r < arena.world; r++)
    if (up[r] && !through(r)) missing = r;
  if (deadline.remaining() == 0)
    fail(EPT_E_TIMEOUT, int32_t(missing),
         "reset: rank %u waited %.3f s for rank %u, %s: every rank that is up must call reset", arena.rank,
         deadline.waited_s(), missing,
         !arena.reports_.of(missing).reported()   ? "which has not called it"
         : !usable(missing)                       ? "which has not heard of the present membership"
         : !arena.lanes[0]->links[missing].region ? "which has not offered its memory"
         : !drain(missing)                        ? "some of whose writes have not landed"
                                                  : "which has not drained ours");
  Error error;
  ept_signal_wait(arena.engine, arena.lanes[0]->links[missing].arrived[0][0][0], UINT64_MAX,
                  std::min<uint64_t>(deadline.remaining(), 500'000), &error);
}

void Resetting::agree() {
  if (arena.attempts_under_ != members->epoch) arena.attempts_ = 0, arena.attempts_under_ = members->epoch;
  for (uint32_t r = 0; r < arena.world; r++) {
    if (!up[r]) continue;
    const Report &report = arena.reports_.of(r).reports[0];
    arena.attempts_ = std::max(arena.attempts_, report.attempts);
    arena.step_ = std::max<uint64_t>(arena.step_, report.step);
  }
  for (auto &lane : arena.lanes) {
    uint64_t next[2] = {lane->next[0], lane->next[1]};
    for (uint32_t p = 0; p < EPT_PHASES; p++) next[p] = std::max<uint64_t>(next[p], arena.step_);
    for (uint32_t r = 0; r < arena.world; r++)
      for (uint32_t p = 0; p < EPT_PHASES && up[r]; p++)
        next[p] = std::max(next[p], arena.reports_.of(r).reports[lane->index].next[p]);
    for (uint32_t r = 0; r < arena.world; r++) {
      Link &link = lane->links[r];
      const Report *report = up[r] ? &arena.reports_.of(r).reports[lane->index] : nullptr;
      if (report) memcpy(link.taken, report->posted, sizeof link.taken);
      if (r == arena.rank) memcpy(link.taken, link.posted, sizeof link.taken);
      for (uint32_t p = 0; p < EPT_PHASES; p++) {
        if (report) link.grants_before[p] = report->grants[p];
        if (r == arena.rank) link.grants_before[p] = link.grants_given[p];
        link.consumed[p] = link.told[p] = next[p];
      }
    }
    for (uint32_t p = 0; p < EPT_PHASES; p++) lane->next[p] = next[p];
    lane->take_acks();
    lane->faulted = lane->committed = false;
    lane->fault = Error();
  }
  const std::lock_guard<std::mutex> lock(arena.members_mutex_);
  for (uint32_t r = 0; r < arena.world; r++) {
    if (!up[r]) continue;
    Heard &heard = arena.reports_.of(r);
    heard.ended_well = heard.number;
    if (arena.members_->epoch == members->epoch) arena.returned_[r] = 0;
  }
}

int32_t Resetting::run() {
  if (!members->has(arena.rank)) fail(EPT_E_PEER_LOST, int32_t(arena.rank), "rank %u is masked itself", arena.rank);
  forget_steps();
  find_up();
  for (uint32_t r = 0; r < arena.world; r++) {
    if (up[r] && stale(arena.lanes[0]->links[r], r)) offer(r);
    if (up[r]) report(r);
  }
  while (!done()) {
    bool moved = arena.reports_.hear(arena.engine, life);
    if (moved_on()) return EPT_LATER;
    for (uint32_t r = 0; r < arena.world; r++) {
      if (up[r]) moved |= accept(r);
      moved |= answer(r);
    }
    if (!moved && !done()) wait();
  }
  if (moved_on()) return EPT_LATER;
  agree();
  return EPT_OK;
}

int32_t Arena::reset(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  refuse_suspended();
  if (expected_)
    fail(EPT_E_INVALID, -1,
         "reset: the other ranks have %u AllToAlls more than this one, which is back: make them first",
         expected_.load());
  if (lanes.empty()) return EPT_OK;
  Resetting reset(*this, timeout == UINT64_MAX ? timeout_ns : timeout);
  Holds holds;
  for (auto &lane : lanes) holds.push_back(std::make_unique<Lane::Held>(*lane, reset.deadline, "reset"));
  // Until it ends well no lane may be used: what the peers believe of it would be wrong.
  for (auto &lane : lanes) {
    if (lane->faulted) continue;
    lane->faulted = true;
    lane->fault = Error();
    lane->fault.code = EPT_E_FAULT;
    snprintf(lane->fault.text, sizeof lane->fault.text, "a reset has begun and not ended well");
  }
  const std::vector<Follower *> listed = followers();
  std::vector<std::shared_ptr<void>> kept;
  for (Follower *follower : listed) kept.push_back(follower->before_reset(reset.deadline));
  // Two resets never have the same number, also where no step was between them: followers' messages go by it.
  for (auto &next : lanes[0]->next) next += listed.empty() ? 0 : 2;
  if (const int32_t code = reset.run(); code != EPT_OK) return code;
  for (uint32_t i = 0; i < listed.size(); i++) listed[i]->after_reset(lanes[0]->next[0], i, reset.deadline);
  return EPT_OK;
}

}  // namespace ept::moe
