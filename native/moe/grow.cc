// SPDX-License-Identifier: Apache-2.0
//
// grow.cc: more lanes, or larger ones. Collective. The new memory is made and known to all before the old one goes, so
// that a rank which has none leaves every rank as it was.
#include <time.h>

#include <algorithm>

#include "moe/arena.h"

namespace ept::moe {

// What a growth has made so far; undone unless `kept`.
struct Arena::Growth {
  Arena &arena;
  bool kept = false;
  std::vector<std::unique_ptr<LaneMemory>> memories;  // [lanes]; NULL: the lane keeps its own
  std::vector<std::unique_ptr<Lane>> fresh;           // lanes that are new
  std::vector<std::vector<ept_region_id>> regions;    // [lanes][world]

  explicit Growth(Arena &of) : arena(of) {}
  ~Growth();

  Lane &lane(uint32_t index) {
    const size_t old = arena.lanes.size();
    return index < old ? *arena.lanes[index] : *fresh[index - old];
  }
  void make(const LaneMap &map, uint32_t lanes);
  std::string offer(uint32_t to, const LaneMap &map);
  void accept(uint32_t from, Bytes &bytes);
};

namespace {

enum Vote : uint8_t { kBusy, kIdle, kFaulted };

void make_signals(ept_engine *engine, Lane &lane, uint32_t source) {
  Link &link = lane.links[source];
  Error error;
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    const std::string phase = p == EPT_PHASE_DISPATCH ? "dispatch" : "combine";
    const std::string data = phase + " of lane " + std::to_string(lane.index);
    const std::string grants = "grants of " + data;
    for (uint32_t i = 0; i < 4; i++)
      check(ept_signal_create(engine, source, data.c_str(), nullptr, &link.arrived[p][i / 2][i % 2], &error), error);
    check(ept_signal_create(engine, source, grants.c_str(), nullptr, &link.granted[p], &error), error);
  }
}

void put_signal(ept_engine *engine, ept_signal_id id, Bytes &bytes) {
  char blob[4096];
  size_t length = sizeof blob;
  Error error;
  check(ept_signal_export(engine, id, blob, &length, &error), error);
  bytes.put_text(blob, length);
}

ept_remote_signal_id get_signal(ept_engine *engine, uint32_t rank, Bytes &bytes) {
  const std::string blob = bytes.get_text();
  ept_remote_signal_id id = 0;
  Error error;
  check(ept_signal_import(engine, rank, blob.data(), blob.size(), &id, &error), error);
  return id;
}

void throw_theirs(const std::vector<std::string> &said, uint32_t rank, std::vector<Bytes> &bytes) {
  for (uint32_t r = 0; r < said.size(); r++) {
    bytes.emplace_back(said[r]);
    if (r == rank) continue;
    const auto code = bytes[r].get<int32_t>();
    const std::string text = bytes[r].get_text();
    if (code != EPT_OK) fail(code, int32_t(r), "rank %u could not take part: %s", r, text.c_str());
  }
}

Bytes status(const Failure &failure) {
  Bytes bytes;
  bytes.put(failure.error.code).put_text(failure.error.text, strlen(failure.error.text));
  return bytes;
}

}  // namespace

Arena::Growth::~Growth() {
  if (kept) return;
  Error error;
  for (auto &of_lane : regions)
    for (ept_region_id region : of_lane)
      if (region) ept_region_drop(arena.engine, region, &error);
  for (auto &lane : fresh)
    for (Link &link : lane->links)
      for (uint32_t p = 0; p < EPT_PHASES; p++) {
        if (link.grant[p]) ept_signal_drop(arena.engine, link.grant[p], &error);
        if (link.granted[p]) ept_signal_destroy(arena.engine, link.granted[p], &error);
        for (uint32_t i = 0; i < 4; i++) {
          if (link.raise[p][i / 2][i % 2]) ept_signal_drop(arena.engine, link.raise[p][i / 2][i % 2], &error);
          if (link.arrived[p][i / 2][i % 2]) ept_signal_destroy(arena.engine, link.arrived[p][i / 2][i % 2], &error);
        }
      }
}

void Arena::Growth::make(const LaneMap &map, uint32_t lanes) {
  const bool larger = map.bytes(1) != arena.map.bytes(1);
  for (uint32_t i = 0; i < lanes; i++) {
    regions.emplace_back(arena.world, 0);
    const bool is_new = i >= arena.lanes.size();
    memories.push_back(is_new || larger ? std::make_unique<LaneMemory>(arena.engine, map.bytes(page_bytes()))
                                        : nullptr);
    if (!is_new) continue;
    fresh.push_back(std::make_unique<Lane>(arena, i));
    for (uint32_t r = 0; r < arena.world; r++) make_signals(arena.engine, *fresh.back(), r);
  }
}

// What `to` needs to write to our lanes and to raise our signals.
std::string Arena::Growth::offer(uint32_t to, const LaneMap &map) {
  Bytes bytes;
  for (uint32_t i = 0; i < memories.size(); i++) {
    if (memories[i]) {
      char blob[4096];
      size_t length = sizeof blob;
      Error error;
      check(ept_region_export(arena.engine, memories[i]->id(), to, 0, map.exported(), blob, &length, &error), error);
      bytes.put_text(blob, length);
    }
    if (i < arena.lanes.size()) continue;
    const Link &link = lane(i).links[to];
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      for (uint32_t at = 0; at < 4; at++) put_signal(arena.engine, link.arrived[p][at / 2][at % 2], bytes);
      put_signal(arena.engine, link.granted[p], bytes);
    }
  }
  return bytes.all();
}

void Arena::Growth::accept(uint32_t from, Bytes &bytes) {
  for (uint32_t i = 0; i < memories.size(); i++) {
    if (memories[i]) {
      const std::string blob = bytes.get_text();
      Error error;
      check(ept_region_import(arena.engine, from, blob.data(), blob.size(), &regions[i][from], &error), error);
    }
    if (i < arena.lanes.size()) continue;
    Link &link = lane(i).links[from];
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      for (uint32_t at = 0; at < 4; at++) link.raise[p][at / 2][at % 2] = get_signal(arena.engine, from, bytes);
      link.grant[p] = get_signal(arena.engine, from, bytes);
    }
  }
}

namespace {

// A step that this very thread has begun can't be received while it is here; one whose other half has not come for so
// long was abandoned by an exception. Both are dropped (a dispatch_recv that comes after all says so).
constexpr uint64_t kAbandoned = 2'000'000'000;

bool abandoned(const Exchange &exchange) {
  return exchange.owner == std::this_thread::get_id() || now_ns() - exchange.since > kAbandoned;
}

}  // namespace

// Holds every lane when no rank has a step under way in any. Nobody waits for a lane, since its holder may wait for a
// rank whose lanes are held for the vote: the ranks vote on what they could get, and if the vote is against it, let go
// and try again.
Arena::Holds Arena::until_idle(const Deadline &deadline) {
  for (uint64_t round = 0;; round++) {
    Holds holds;
    bool idle = true, faulted = false;
    Bytes vote;
    for (auto &lane : lanes) {
      holds.push_back(Lane::Held::attempt(*lane));
      if (!holds.back()) {
        idle = false;
        continue;
      }
      for (uint64_t generation : lane->next) vote.put(generation);
      faulted = faulted || lane->faulted;
      if (faulted) continue;
      for (uint32_t phase = 0; phase < EPT_PHASES; phase++)
        if (Exchange *open = lane->pending(phase); open && abandoned(*open)) lane->drop(phase);
      lane->take_acks();
      lane->serve();
      idle = idle && lane->quiet();
    }
    Bytes mine;
    mine.put(uint8_t(faulted ? kFaulted : idle ? kIdle : kBusy)).put_text(vote.all().data(), vote.all().size());
    const auto said = exchange(
        engine, rank, world, kTagIdle | attempts_ << 16 | (round & 0xffff), [&](uint32_t) { return mine.all(); },
        deadline, "to enlarge the arena");
    for (uint32_t r = 0; r < world; r++) {
      if (r == rank) continue;
      Bytes theirs(said[r]);
      const auto state = theirs.get<uint8_t>();
      if (state == kFaulted) fail(EPT_E_FAULT, int32_t(r), "a lane of rank %u is faulted: reset first", r);
      idle = idle && state == kIdle && theirs.get_text() == vote.all();
    }
    if (faulted) fail(EPT_E_FAULT, int32_t(rank), "a lane of rank %u is faulted: reset first", rank);
    if (idle) return holds;
    if (deadline.remaining() == 0)
      fail(EPT_E_TIMEOUT, -1, "rank %u waited %.1f s to enlarge the arena: a step is under way on some rank", rank,
           deadline.waited_s());
    holds.clear();
    const timespec pause = {0, 500'000};
    nanosleep(&pause, nullptr);
  }
}

void Arena::grow(const LaneMap &larger, uint32_t count, const Deadline &deadline) {
  const Holds holds = until_idle(deadline);
  Growth growth(*this);
  Failure failed{Error()};
  std::vector<std::string> offers(world);
  try {
    growth.make(larger, count);
    for (uint32_t r = 0; r < world; r++)
      if (r != rank) offers[r] = growth.offer(r, larger);
  } catch (const Failure &failure) {
    failed = failure;
  }
  const auto offered = exchange(
      engine, rank, world, kTagMemory | attempts_ << 16, [&](uint32_t to) { return status(failed).all() + offers[to]; },
      deadline, "to enlarge the arena");
  if (failed.error.code) throw failed;
  std::vector<Bytes> bytes;
  throw_theirs(offered, rank, bytes);
  try {
    for (uint32_t r = 0; r < world; r++)
      if (r != rank) growth.accept(r, bytes[r]);
  } catch (const Failure &failure) {
    failed = failure;
  }
  const auto ready = exchange(
      engine, rank, world, kTagReady | attempts_ << 16, [&](uint32_t) { return status(failed).all(); }, deadline,
      "to enlarge the arena");
  if (failed.error.code) throw failed;
  bytes.clear();
  throw_theirs(ready, rank, bytes);

  growth.kept = true;
  for (auto &lane : growth.fresh) lanes.push_back(std::move(lane));
  memories_.resize(count);
  for (uint32_t i = 0; i < count; i++) {
    if (!growth.memories[i]) continue;
    lanes[i]->memory_id = growth.memories[i]->id();
    lanes[i]->base = growth.memories[i]->base();
    for (uint32_t r = 0; r < world; r++) {
      Error error;
      if (lanes[i]->links[r].region) ept_region_drop(engine, lanes[i]->links[r].region, &error);
      lanes[i]->links[r].region = growth.regions[i][r];
    }
    memories_[i] = std::move(growth.memories[i]);
  }
  map = larger;
}

}  // namespace ept::moe
