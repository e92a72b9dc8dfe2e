// SPDX-License-Identifier: Apache-2.0
//
// grow.cc: more lanes, or larger ones. Collective. The new memory is made and known to all before the old one goes, so
// that a rank which has none leaves every rank as it was.
#include <time.h>

#include <algorithm>

#include "moe/arena.h"
#include "moe/links.h"

namespace ept::moe {

// What a growth has made so far; undone unless `kept`.
struct Arena::Growth {
  Arena &arena;
  const Members &members;
  bool kept = false;
  std::vector<std::unique_ptr<LaneMemory>> memories;  // [lanes]; NULL: the lane keeps its own
  std::vector<std::unique_ptr<Lane>> fresh;           // lanes that are new
  std::vector<std::vector<ept_region_id>> regions;    // [lanes][world]

  Growth(Arena &of, const Members &with) : arena(of), members(with) {}
  ~Growth();

  Lane &lane(uint32_t index) {
    const size_t old = arena.lanes.size();
    return index < old ? *arena.lanes[index] : *fresh[index - old];
  }
  void make(const LaneMap &map, uint32_t lanes, const MakeMemory &elsewhere);
  std::string offer(uint32_t to, const LaneMap &map);
  void accept(uint32_t from, Bytes &bytes);
};

Arena::Growth::~Growth() {
  if (kept) return;
  Error error;
  for (auto &of_lane : regions)
    for (ept_region_id region : of_lane)
      if (region) ept_region_drop(arena.engine, region, &error);
  for (auto &lane : fresh)
    for (Link &link : lane->links) release(arena.engine, link);
}

void Arena::Growth::make(const LaneMap &map, uint32_t lanes, const MakeMemory &elsewhere) {
  const bool larger = map.bytes(1) != arena.map.bytes(1);
  for (uint32_t i = 0; i < lanes; i++) {
    regions.emplace_back(arena.world, 0);
    const bool is_new = i >= arena.lanes.size();
    const bool needs = is_new || larger || !arena.memories_[i];
    memories.push_back(nullptr);
    if (needs && elsewhere) memories.back() = elsewhere(map.bytes(page_bytes()));
    if (needs && !memories.back())
      memories.back() = std::make_unique<LaneMemory>(arena.engine, map.bytes(page_bytes()));
    if (!is_new) continue;
    fresh.push_back(std::make_unique<Lane>(arena, i));
    for (uint32_t r = 0; r < arena.world; r++) {
      if (!members.has(r)) continue;  // a reset makes its links when it is back
      make_signals(arena.engine, *fresh.back(), r);
      Link &link = fresh.back()->links[r];
      link.mine = arena.epoch;
      link.theirs = r == arena.rank ? link.mine : info_of(arena.engine, r).epoch;
    }
  }
}

// What `to` needs to write to our lanes and to raise our signals.
std::string Arena::Growth::offer(uint32_t to, const LaneMap &map) {
  Bytes bytes;
  for (uint32_t i = 0; i < memories.size(); i++) {
    if (memories[i]) give_region(arena.engine, memories[i]->id(), to, map.exported(), bytes);
    if (i < arena.lanes.size()) continue;
    give_signals(arena.engine, lane(i).links[to], bytes);
  }
  return bytes.all();
}

void Arena::Growth::accept(uint32_t from, Bytes &bytes) {
  for (uint32_t i = 0; i < memories.size(); i++) {
    if (memories[i]) regions[i][from] = take_region(arena.engine, from, bytes);
    if (i < arena.lanes.size()) continue;
    take_signals(arena.engine, from, lane(i).links[from], bytes);
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
Arena::Holds Arena::until_idle(const Members &with, const Deadline &deadline, const char *what) {
  for (uint64_t round = 0;; round++) {
    Holds holds;
    bool idle = true, faulted = false;
    Bytes vote;
    // Followers first: the lanes that they drive have their generations then. Asleep they have no steps.
    for (Follower *follower : suspended_ ? std::vector<Follower *>() : followers()) {
      const Rest rest = follower->rest();
      idle = idle && rest == Rest::idle;
      faulted = faulted || rest == Rest::faulted;
    }
    for (auto &lane : lanes) {
      holds.push_back(Lane::Held::attempt(*lane));
      if (!holds.back()) {
        idle = false;
        continue;
      }
      for (const auto &generation : lane->next) vote.put(uint64_t(generation));
      faulted = faulted || lane->faulted;
      if (faulted || driver_ == Driver::kernels) continue;
      for (uint32_t phase = 0; phase < EPT_PHASES; phase++)
        if (Exchange *open = lane->pending(phase); open && abandoned(*open)) lane->drop(phase);
      lane->take_acks();
      lane->serve();
      idle = idle && lane->quiet();
    }
    Bytes mine;
    mine.put(faulted ? Rest::faulted : idle ? Rest::idle : Rest::busy);
    mine.put_text(vote.all().data(), vote.all().size());
    const auto said = exchange(
        engine, rank, with, kTagIdle | attempt() | (round & 0xffff), [&](uint32_t) { return mine.all(); }, deadline,
        what);
    for (uint32_t r = 0; r < world; r++) {
      if (r == rank || !with.has(r)) continue;
      Bytes theirs(said[r]);
      const auto state = theirs.get<Rest>();
      if (state == Rest::faulted) fail(EPT_E_FAULT, int32_t(r), "a lane of rank %u is faulted: reset first", r);
      idle = idle && state == Rest::idle && theirs.get_text() == vote.all();
    }
    if (faulted) fail(EPT_E_FAULT, int32_t(rank), "a lane of rank %u is faulted: reset first", rank);
    if (idle) return holds;
    if (deadline.remaining() == 0)
      fail(EPT_E_TIMEOUT, -1, "rank %u waited %.1f s %s: a step is under way on some rank", rank, deadline.waited_s(),
           what);
    holds.clear();
    const timespec pause = {0, 500'000};
    nanosleep(&pause, nullptr);
  }
}

void Arena::grow(const LaneMap &larger, uint32_t count, const Members &with, const Deadline &deadline, const char *what,
                 const MakeMemory &elsewhere) {
  const Holds holds = until_idle(with, deadline, what);
  Growth growth(*this, with);
  Failure failed{Error()};
  std::vector<std::string> offers(world);
  try {
    growth.make(larger, count, elsewhere);
    for (uint32_t r = 0; r < world; r++)
      if (r != rank && with.has(r)) offers[r] = growth.offer(r, larger);
  } catch (const Failure &failure) {
    failed = failure;
  }
  const auto offered = exchange(
      engine, rank, with, kTagMemory | attempt(), [&](uint32_t to) { return status(failed).all() + offers[to]; },
      deadline, what);
  if (failed.error.code) throw failed;
  std::vector<Bytes> bytes;
  throw_theirs(offered, rank, with, &bytes);
  try {
    for (uint32_t r = 0; r < world; r++)
      if (r != rank && with.has(r)) growth.accept(r, bytes[r]);
  } catch (const Failure &failure) {
    failed = failure;
  }
  const auto ready = exchange(
      engine, rank, with, kTagReady | attempt(), [&](uint32_t) { return status(failed).all(); }, deadline, what);
  if (failed.error.code) throw failed;
  bytes.clear();
  throw_theirs(ready, rank, with, &bytes);

  growth.kept = true;
  for (auto &lane : growth.fresh) lanes.push_back(std::move(lane));
  memories_.resize(count);
  for (uint32_t i = 0; i < count; i++) {
    if (!growth.memories[i]) continue;
    lanes[i]->memory_id = growth.memories[i]->id();
    lanes[i]->base = growth.memories[i]->base();
    lanes[i]->on_gpu = growth.memories[i]->on_gpu();
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
