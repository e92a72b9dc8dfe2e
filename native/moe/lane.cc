// SPDX-License-Identifier: Apache-2.0
//
// lane.cc: holding a lane, its generations, what it owes, and its waits. out.cc and in.cc have the messages.
#include "moe/lane.h"

#include <sys/mman.h>

#include <algorithm>

#include "moe/arena.h"

namespace ept::moe {

const char *kind_name(Kind kind) {
  return kind == Kind::dispatch ? "dispatch" : kind == Kind::combine ? "combine" : "late weights";
}

Words::Words(uint32_t world) : bytes_(align_up(uint64_t(world) * kEach * sizeof(uint64_t), page_bytes())) {
  void *at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) fail(EPT_E_NOMEM, -1, "the machine has no %llu bytes left", (unsigned long long)bytes_);
  words_ = static_cast<uint64_t *>(at);
}

Words::~Words() { munmap(words_, bytes_); }

Lane::Lane(Arena &of, uint32_t number) : arena(of), index(number), words(of.world), links(of.world), fault(Error()) {}

Lane::Held::Held(Lane &lane, const Deadline &deadline, const char *operation) : lane_(lane) {
  std::unique_lock<std::mutex> lock(lane.mutex_);
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(deadline.remaining());
  if (!lane.free_.wait_until(lock, until, [&] { return !lane.busy_; }))
    fail(EPT_E_TIMEOUT, -1, "%s waited %.1f s for lane %u, which another thread's call holds", operation,
         deadline.waited_s(), lane.index);
  lane.busy_ = true;
}

std::unique_ptr<Lane::Held> Lane::Held::attempt(Lane &lane) {
  const std::lock_guard<std::mutex> lock(lane.mutex_);
  if (lane.busy_) return nullptr;
  lane.busy_ = true;
  return std::unique_ptr<Held>(new Held(lane));
}

Lane::Held::~Held() {
  std::lock_guard<std::mutex> lock(lane_.mutex_);
  lane_.busy_ = false;
  lane_.free_.notify_one();
}

// ---- generations ----

Exchange &Lane::begin(Kind kind, const std::shared_ptr<Object> &object, const std::shared_ptr<const Members> &members,
                      Wait &wait) {
  const uint32_t phase = kind == Kind::combine ? EPT_PHASE_COMBINE : EPT_PHASE_DISPATCH;
  const uint64_t generation = next[phase];
  const auto slot = uint32_t(generation % 2);
  Exchange &exchange = exchanges[phase][slot];
  if (exchange.state == Exchange::open)  // two exchanges open in one phase: only a late-weights one can come between
    fail(EPT_E_INVALID, -1, "lane %u has dispatch %llu still to be received: call dispatch_recv before this combine",
         index, (unsigned long long)exchange.generation);
  committed = true;
  take_acks();
  if (exchange.state == Exchange::dropped) drain(exchange, wait);

  exchange.state = Exchange::open;
  exchange.kind = kind;
  exchange.whole = false;
  exchange.phase = phase;
  exchange.slot = slot;
  exchange.generation = generation;
  exchange.owner = std::this_thread::get_id();
  exchange.since = now_ns();
  exchange.object = object;
  exchange.members = members;
  exchange.source.reset();
  exchange.pack = nullptr;
  exchange.out.assign(arena.world, Outgoing());
  exchange.in.assign(arena.world, Incoming());
  exchange.counts.assign(kind == Kind::dispatch ? size_t(arena.world) * object->local() : 0, 0);
  exchange.unsent = exchange.unread = members->count();
  for (uint32_t r = 0; r < arena.world; r++)
    if (!members->has(r)) exchange.out[r].finished = exchange.in[r].begun = exchange.in[r].finished = true;
  exchange.head = ept_moe_header{};
  exchange.head.magic = EPT_MOE_MAGIC;
  exchange.head.version = EPT_WIRE_VERSION;
  exchange.head.phase = uint16_t(phase);
  exchange.head.source = arena.rank;
  exchange.head.lane = index;
  exchange.head.generation = generation;
  exchange.head.top_k = object->config.top_k;
  exchange.head.epoch = arena.epoch;
  exchange.head.object = object->number;
  exchange.head.membership = members->epoch;
  next[phase] = generation + 1;
  object->counters.generations[phase].fetch_add(1, std::memory_order_relaxed);

  tell(exchange, wait);
  for (uint32_t r = 0; r < arena.world; r++)
    for (uint32_t where = 0; where < 2 && members->has(r); where++)
      while (!settle(links[r], phase, slot, where, 0)) wait.for_transfer(r, phase, slot, where);
  return exchange;
}

Exchange *Lane::pending(uint32_t phase) {
  const Kind kind = phase == EPT_PHASE_COMBINE ? Kind::combine : Kind::dispatch;
  for (Exchange &exchange : exchanges[phase])
    if (exchange.state == Exchange::open && exchange.kind == kind) return &exchange;
  return nullptr;
}

void Lane::drop(uint32_t phase) {
  for (uint32_t p = 0; p < EPT_PHASES; p++)
    if (Exchange *exchange = pending(p); exchange && (p == phase || exchange->whole))
      exchange->state = Exchange::dropped;
}

uint64_t Lane::consumed(uint32_t phase) const {
  uint64_t first_open = next[phase];
  for (const Exchange &exchange : exchanges[phase])
    if (exchange.state != Exchange::idle) first_open = std::min(first_open, exchange.generation);
  return first_open;
}

bool Lane::quiet() {
  const std::shared_ptr<const Members> members = arena.members();
  for (uint32_t r = 0; r < arena.world; r++) {
    if (!members->has(r)) continue;
    for (uint32_t i = 0; i < 8; i++)
      if (!settle(links[r], i / 4, i / 2 % 2, i % 2, 0)) return false;
    if (links[r].grants_owed[0] || links[r].grants_owed[1]) return false;
  }
  for (const auto &phase : exchanges)
    for (const Exchange &exchange : phase)
      if (exchange.state != Exchange::idle) return false;
  return true;
}

void Lane::finish(Exchange &exchange) {
  if (exchange.unsent || exchange.unread) return;
  exchange.state = Exchange::idle;
  exchange.pack = nullptr;
  exchange.source.reset();
}

Region Lane::received(uint32_t phase, uint32_t slot, Region in_slot) const {
  return {arena.map.recv(phase, slot) + in_slot.offset, in_slot.bytes};
}

Region Lane::staged(uint32_t phase, uint32_t slot, Region in_slot) const {
  return {arena.map.send(phase, slot) + in_slot.offset, in_slot.bytes};
}

// ---- abandoned generations ----

// Cuts short what is unsent, throws away what lands. True where something moved.
bool Lane::drop_more(Exchange &exchange) {
  bool moved = false;
  if (exchange.pack) {
    exchange.pack = nullptr;  // the caller's tensors may be gone
    for (Outgoing &out : exchange.out)
      if (!out.finished) out.rows = out.sent + out.packed_rows;
  }
  if (exchange.unsent) moved = push(exchange);
  Chunk chunk;
  for (uint32_t s = 0; s < arena.world; s++)
    while (!exchange.in[s].finished && look(exchange, s, 0, &chunk)) {
      take(exchange, s, chunk);
      moved = true;
    }
  finish(exchange);
  return moved;
}

void Lane::drain(Exchange &exchange, Wait &wait) {
  while (exchange.state == Exchange::dropped) {
    if (serve()) {
      wait.moved();
    } else if (exchange.state == Exchange::dropped) {
      wait.for_chunk(exchange);
    }
  }
}

// ---- what we owe, and what others said ----

bool Lane::serve() {
  bool moved = false;
  for (uint32_t r = 0; r < arena.world; r++)
    for (uint32_t phase = 0; phase < EPT_PHASES; phase++)
      if (links[r].grants_owed[phase]) moved |= pay_grants(r, phase);
  for (auto &phase : exchanges)
    for (Exchange &exchange : phase)
      if (exchange.state == Exchange::dropped) moved |= drop_more(exchange);
  return moved;
}

bool Lane::pay_grants(uint32_t peer, uint32_t phase) {
  Link &link = links[peer];
  bool moved = false;
  while (link.grants_owed[phase]) {
    if (peer != arena.rank) {
      ept_write grant{};
      grant.size = sizeof grant;
      grant.peer = peer;
      grant.signal = link.grant[phase];
      Error error;
      const int32_t code = ept_engine_write(arena.engine, &grant, nullptr, &error);
      if (code == EPT_LATER) return moved;
      check(code, error);
      add(arena.metrics.phase(peer, phase).tx_grants, 1);
    }
    link.grants_owed[phase]--;
    link.grants_given[phase]++;
    moved = true;
  }
  return moved;
}

// Step 2 of begin: who has not been told by a header is told by a message.
void Lane::tell(Exchange &exchange, Wait &wait) {
  const uint32_t phase = exchange.phase;
  const uint64_t generation = exchange.generation;
  for (uint32_t r = 0; r < arena.world; r++) {
    Link &link = links[r];
    if (r == arena.rank || !exchange.members->has(r) || link.told[phase] + 1 >= generation) continue;
    ept_lane_ack ack{index, 0, {consumed(0), consumed(1)}};
    Error error;
    check(ept_engine_send(arena.engine, r, kTagAck + index, &ack, sizeof ack, wait.remaining(), &error), error);
    for (uint32_t p = 0; p < EPT_PHASES; p++) link.told[p] = ack.consumed[p];
    exchange.object->counters.acks.fetch_add(1, std::memory_order_relaxed);
    add(arena.metrics.phase(r, seen_phase(exchange.kind)).tx_acks, 1);
  }
}

void Lane::take_acks() {
  for (;;) {
    ept_lane_ack ack;
    size_t length = sizeof ack;
    uint32_t from = 0;
    Error error;
    const int32_t code = ept_engine_recv(arena.engine, UINT32_MAX, kTagAck + index, &ack, &length, &from, 0, &error);
    if (code == EPT_E_TIMEOUT || code == EPT_LATER) return;
    if (code == EPT_E_LIMIT) {  // longer than an ack: taken out, else it would stand before all others
      std::vector<char> junk(length);
      check(ept_engine_recv(arena.engine, from, kTagAck + index, junk.data(), &length, &from, 0, &error), error);
      continue;
    }
    check(code, error);
    if (length != sizeof ack || from >= arena.world) continue;
    for (uint32_t p = 0; p < EPT_PHASES; p++)
      links[from].consumed[p] = std::max(links[from].consumed[p], ack.consumed[p]);
  }
}

// Headers that have landed and are not taken yet acknowledge too.
void Lane::peek() {
  Chunk chunk;
  for (auto &phase : exchanges)
    for (Exchange &exchange : phase)
      if (exchange.state == Exchange::open)
        for (uint32_t s = 0; s < arena.world; s++)
          if (!exchange.in[s].begun) look(exchange, s, 0, &chunk);
}

}  // namespace ept::moe
