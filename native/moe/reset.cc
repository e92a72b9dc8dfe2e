// SPDX-License-Identifier: Apache-2.0
//
// reset.cc: brings every lane of every rank that is up to one generation, empty, after a fault.
//
//   report   each rank tells each other what it has posted to it (chunks of each signal, grants), and its generations
//   drain    a rank waits until all that was posted to it has landed: then nobody writes into its memory any more
//   clean    it says so to each, naming the report it has drained
//
// A rank may write again when all have said clean to its own report. Signals only count up, so nothing is set back: the
// receiver's `taken` moves to the sender's `posted`, the sender's `grants_before` to what the receiver has given. All
// take the largest generation of all reports.
//
// Calls that did not all get through are repeated: each rank numbers its own calls, a report carries its number and a
// clean message the number it answers; a newer report of a rank replaces the one before, one at or below the number
// that ended well is old. A report's contents don't change between calls, since a faulted lane posts nothing.
#include <algorithm>

#include "moe/arena.h"

namespace ept::moe {

namespace {

struct Report {
  uint64_t number;
  uint32_t lane, lanes;
  uint64_t next[2];
  uint64_t posted[2][2][2];
  uint64_t grants[2];
};

struct Clean {
  uint64_t number;
};

struct Peer {
  bool up = true;
  uint64_t number = 0;          // of its newest report
  std::vector<Report> reports;  // [lanes]
  size_t have = 0;
  bool drained = false, answered = false, clean = false;

  bool complete() const { return number != 0 && have == reports.size(); }
};

}  // namespace

struct Arena::Reset {
  Arena &arena;
  const Deadline deadline;
  const uint64_t number;
  std::vector<Peer> peers;

  Reset(Arena &of, uint64_t timeout_ns, uint64_t which)
      : arena(of), deadline(timeout_ns), number(which), peers(of.world) {}

  void forget_steps();
  void report();
  bool hear();
  bool drain(uint32_t rank);
  bool answer(uint32_t rank);
  bool done();
  void wait();
  void agree();
};

// Our own transfers end first, one way or the other: one that failed never raises its signal and is not reported.
void Arena::Reset::forget_steps() {
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

void Arena::Reset::report() {
  for (uint32_t r = 0; r < arena.world; r++) {
    ept_peer_info info{};
    info.size = sizeof info;
    Error error;
    check(ept_engine_peer(arena.engine, r, &info, &error), error);
    peers[r].up = r != arena.rank && info.status != EPT_PEER_LOST && info.status != EPT_PEER_LEFT;
    if (!peers[r].up) continue;
    for (auto &lane : arena.lanes) {
      const Link &link = lane->links[r];
      Report report{};
      report.number = number;
      report.lane = lane->index;
      report.lanes = uint32_t(arena.lanes.size());
      memcpy(report.next, lane->next, sizeof report.next);
      memcpy(report.posted, link.posted, sizeof report.posted);
      memcpy(report.grants, link.grants_given, sizeof report.grants);
      check(ept_engine_send(arena.engine, r, kTagReset, &report, sizeof report, deadline.remaining(), &error), error);
    }
  }
}

// Takes what has come; true where something has.
bool Arena::Reset::hear() {
  bool heard = false;
  for (;;) {
    Report report;
    size_t length = sizeof report;
    uint32_t from = 0;
    Error error;
    const int32_t code = ept_engine_recv(arena.engine, UINT32_MAX, kTagReset, &report, &length, &from, 0, &error);
    if (code == EPT_E_TIMEOUT || code == EPT_LATER) break;
    check(code, error);
    Peer &peer = peers[from];
    if (length != sizeof report || report.number <= arena.reset_seen_[from] || report.number < peer.number) continue;
    if (report.lanes != arena.lanes.size() || report.lane >= report.lanes)
      fail(EPT_E_MISMATCH, int32_t(from), "rank %u has %u lanes, rank %u has %zu", from, report.lanes, arena.rank,
           arena.lanes.size());
    if (report.number > peer.number) {
      peer.number = report.number;
      peer.reports.assign(report.lanes, Report{});
      peer.have = 0;
      peer.drained = peer.answered = false;
    }
    peer.have += peer.reports[report.lane].number == 0;
    peer.reports[report.lane] = report;
    heard = true;
  }
  for (;;) {
    Clean clean;
    size_t length = sizeof clean;
    uint32_t from = 0;
    Error error;
    const int32_t code = ept_engine_recv(arena.engine, UINT32_MAX, kTagClean, &clean, &length, &from, 0, &error);
    if (code == EPT_E_TIMEOUT || code == EPT_LATER) return heard;
    check(code, error);
    if (length == sizeof clean && clean.number == number) peers[from].clean = heard = true;
  }
}

// Whether all that `rank` has posted to us has landed.
bool Arena::Reset::drain(uint32_t rank) {
  for (auto &lane : arena.lanes) {
    const Link &link = lane->links[rank];
    const Report &report = peers[rank].reports[lane->index];
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

bool Arena::Reset::answer(uint32_t rank) {
  Peer &peer = peers[rank];
  if (!peer.up || !peer.complete() || peer.answered) return false;
  if (!peer.drained && !(peer.drained = drain(rank))) return false;
  const Clean clean = {peer.number};
  Error error;
  check(ept_engine_send(arena.engine, rank, kTagClean, &clean, sizeof clean, deadline.remaining(), &error), error);
  return peer.answered = true;
}

// All that are still up have answered and were answered. A rank that is lost meanwhile is no longer waited for.
bool Arena::Reset::done() {
  bool all = true;
  for (uint32_t r = 0; r < arena.world; r++) {
    Peer &peer = peers[r];
    if (!peer.up || (peer.answered && peer.clean)) continue;
    ept_peer_info info{};
    info.size = sizeof info;
    Error error;
    check(ept_engine_peer(arena.engine, r, &info, &error), error);
    peer.up = info.status != EPT_PEER_LOST && info.status != EPT_PEER_LEFT;
    all = all && !peer.up;
  }
  return all;
}

// Sleeps a little, on a message where one is due.
void Arena::Reset::wait() {
  uint32_t missing = arena.rank;
  for (uint32_t r = 0; r < arena.world; r++)
    if (peers[r].up && !(peers[r].answered && peers[r].clean)) missing = r;
  if (deadline.remaining() == 0)
    fail(EPT_E_TIMEOUT, int32_t(missing),
         "reset: rank %u waited %.3f s for rank %u, %s: every rank that is up must call reset", arena.rank,
         deadline.waited_s(), missing,
         !peers[missing].complete() ? "which has not called it"
         : !peers[missing].drained  ? "some of whose writes have not landed"
                                    : "which has not drained ours");
  Error error;
  ept_signal_wait(arena.engine, arena.lanes[0]->links[missing].arrived[0][0][0], UINT64_MAX,
                  std::min<uint64_t>(deadline.remaining(), 500'000), &error);
}

void Arena::Reset::agree() {
  for (auto &lane : arena.lanes) {
    uint64_t next[2] = {lane->next[0], lane->next[1]};
    for (const Peer &peer : peers)
      for (uint32_t p = 0; p < EPT_PHASES && peer.complete(); p++)
        next[p] = std::max(next[p], peer.reports[lane->index].next[p]);
    for (uint32_t r = 0; r < arena.world; r++) {
      Link &link = lane->links[r];
      const Report *report = peers[r].complete() ? &peers[r].reports[lane->index] : nullptr;
      if (report) memcpy(link.taken, report->posted, sizeof link.taken);
      if (r == arena.rank) memcpy(link.taken, link.posted, sizeof link.taken);
      for (uint32_t p = 0; p < EPT_PHASES; p++) {
        if (report) link.grants_before[p] = report->grants[p];
        if (r == arena.rank) link.grants_before[p] = link.grants_given[p];
        link.consumed[p] = link.told[p] = next[p];
      }
    }
    memcpy(lane->next, next, sizeof next);
    lane->take_acks();
    lane->faulted = lane->committed = false;
    lane->fault = Error();
  }
  for (uint32_t r = 0; r < arena.world; r++) arena.reset_seen_[r] = std::max(arena.reset_seen_[r], peers[r].number);
}

void Arena::reset(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (lanes.empty()) return;
  Reset reset(*this, timeout == UINT64_MAX ? timeout_ns : timeout, ++resets_);
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
  reset.forget_steps();
  reset.report();
  while (!reset.done()) {
    bool moved = reset.hear();
    for (uint32_t r = 0; r < world; r++) moved |= reset.answer(r);
    if (!moved && !reset.done()) reset.wait();
  }
  reset.agree();
}

}  // namespace ept::moe
