// SPDX-License-Identifier: Apache-2.0
//
// wait.cc: the waits of a lane's calls, and what they say when they end badly.
#include <stdio.h>

#include <algorithm>

#include "engine/news.h"
#include "moe/arena.h"
#include "moe/lane.h"

namespace ept::moe {

namespace {

// Who is waited for may be alive, and itself stuck for want of a rank that this one needs no more.
std::string lost_ranks(ept_engine *engine, uint32_t world, uint32_t own) {
  std::string text;
  for (uint32_t r = 0; r < world; r++) {
    if (r == own) continue;
    const ept_peer_info info = info_of(engine, r);
    if (info.status == EPT_PEER_LOST) text += "; rank " + std::to_string(r) + " is lost: " + info.why;
  }
  return text;
}

std::string name_of(const Exchange &exchange, uint32_t lane) {
  char text[96];
  snprintf(text, sizeof text, "%s %llu of lane %u", kind_name(exchange.kind), (unsigned long long)exchange.generation,
           lane);
  return text;
}

std::string name_of(const Exchange &exchange, uint32_t lane, uint32_t chunk) {
  return name_of(exchange, lane) + ", chunk " + std::to_string(chunk);
}

}  // namespace

Wait::Wait(Lane &lane, const char *operation) : Wait(lane, operation, lane.arena.timeout_ns) {}
Wait::Wait(Lane &lane, const char *operation, uint64_t timeout_ns)
    : lane_(lane), operation_(operation), deadline_(timeout_ns), published_(lane.arena.engine) {}

template <class Sleep>
void Wait::stand(Exchange &exchange, uint32_t peer, Sleep &&sleep) {
  const Standing next = {peer, seen_phase(exchange.kind), 0};
  if (standing_.peer != next.peer || standing_.phase != next.phase) stood(next);
  const Span span(lane_.arena.spans, "wait", next.phase, lane_.index, peer, exchange.generation);
  struct Clock {
    uint64_t &to;
    const uint64_t begin = now_ns();
    ~Clock() { to += now_ns() - begin; }
  } clock{standing_.ns};
  sleep();
}

void Wait::stood(const Standing &next) {
  if (standing_.peer < lane_.arena.world && standing_.ns)
    record(lane_.arena.metrics.phase(standing_.peer, standing_.phase).waits, standing_.ns);
  standing_ = next;
}

// All that are missing, not the chosen one alone: it may itself be waiting for another of them.
void Wait::publish(const Exchange &exchange) {
  const Lane &lane = lane_;
  std::vector<Awaited> awaited;
  for (uint32_t s = 0; s < lane.arena.world; s++) {
    const Incoming &in = exchange.in[s];
    if (s == lane.arena.rank || in.finished) continue;
    const uint32_t where = in.chunk % 2;
    const Link &link = lane.links[s];
    const ept_signal_id id = link.arrived[exchange.phase][exchange.slot][where];
    const uint64_t taken = link.taken[exchange.phase][exchange.slot][where];
    uint64_t value = 0;
    Error error;
    check(ept_signal_value(lane.arena.engine, id, &value, &error), error);
    if (value <= taken) awaited.push_back({s, seen_phase(exchange.kind), id, taken + 1, value});
  }
  published_.say(operation_, name_of(exchange, lane.index), std::move(awaited), deadline_.start);
}

void Wait::publish(const Exchange &exchange, uint32_t peer, uint64_t id, uint64_t expected, uint64_t seen) {
  published_.say(operation_, "room for " + name_of(exchange, lane_.index),
                 {{peer, seen_phase(exchange.kind), id, expected, seen}}, deadline_.start);
}

uint64_t Wait::slice() {
  const uint64_t length = slice_;
  slice_ = std::min(slice_ * 2, kLastSlice);
  return std::min(length, remaining());
}

void Wait::for_chunk(Exchange &exchange) {
  Lane &lane = lane_;
  const uint32_t world = lane.arena.world;
  bool alone = exchange.unsent == 0;  // nothing else can move meanwhile
  for (const auto &phase : lane.exchanges)
    for (const Exchange &other : phase) alone = alone && (&other == &exchange || other.state != Exchange::dropped);
  for (const Link &link : lane.links) alone = alone && !link.grants_owed[0] && !link.grants_owed[1];

  // The peer that was silent longest is likeliest to be the one that fails; at first simply the next.
  uint32_t chosen = UINT32_MAX;
  uint64_t silence = 0;
  for (uint32_t i = 1; i < world; i++) {
    const uint32_t source = (lane.arena.rank + world - i) % world;
    if (exchange.in[source].finished) continue;
    uint64_t value = 0;
    Error error;
    const Incoming &in = exchange.in[source];
    const ept_signal_id id = lane.links[source].arrived[exchange.phase][exchange.slot][in.chunk % 2];
    check(ept_signal_value(lane.arena.engine, id, &value, &error), error);
    if (value > lane.links[source].taken[exchange.phase][exchange.slot][in.chunk % 2]) continue;
    const uint64_t silent = looks_ ? info_of(lane.arena.engine, source).silent_ns : 0;
    if (chosen == UINT32_MAX || silent > silence) chosen = source, silence = silent;
  }
  if (chosen == UINT32_MAX) return for_room(exchange);

  const Incoming &in = exchange.in[chosen];
  const uint32_t where = in.chunk % 2;
  const Link &link = lane.links[chosen];
  uint64_t length = alone ? std::min(remaining(), looks_ ? kLongLook : kLook) : slice();
  // Most waits of a step are over before anybody could ask for them.
  if (!patient_ && remaining() > kUnpublished) {
    length = std::min(length, kUnpublished);
    patient_ = alone || slice_ > kUnpublished;
  } else {
    if (alone) looks_++;
    publish(exchange);
  }
  stand(exchange, chosen, [&] {
    signal(chosen, link.arrived[exchange.phase][exchange.slot][where],
           link.taken[exchange.phase][exchange.slot][where] + 1, length, name_of(exchange, lane.index, in.chunk));
  });
  look_around(exchange, length);
}

void Wait::for_room(Exchange &exchange) {
  Lane &lane = lane_;
  const uint64_t length = slice();
  uint32_t peer = UINT32_MAX;
  for (uint32_t r = 0; r < lane.arena.world && peer == UINT32_MAX; r++)
    if (r != lane.arena.rank && !exchange.out[r].finished) peer = r;
  if (peer != UINT32_MAX && exchange.out[peer].chunk >= 2 && !exchange.out[peer].packed) {
    const Link &link = lane.links[peer];
    const uint64_t target = link.grants_before[exchange.phase] + exchange.out[peer].chunk - 1;
    publish(exchange, peer, link.granted[exchange.phase], target, 0);
    stand(exchange, peer, [&] {
      signal(peer, link.granted[exchange.phase], target, length,
             "room for " + name_of(exchange, lane.index, exchange.out[peer].chunk));
    });
  } else {
    // An ack may come; so may completions and room in the engine's queue, which have no count to wait for.
    if (remaining() == 0 && peer != UINT32_MAX)
      expired(peer, "a free slot for " + name_of(exchange, lane.index, exchange.out[peer].chunk),
              exchange.generation - 1, lane.links[peer].consumed[exchange.phase]);
    if (remaining() == 0)
      fail(EPT_E_TIMEOUT, -1, "%s: rank %u: nothing moved for %.3f s in lane %u", operation_, lane.arena.rank,
           deadline_.waited_s(), lane.index);
    Error error;
    ept_lane_ack ack;
    size_t size = sizeof ack;
    uint32_t from = 0;
    if (peer != UINT32_MAX)
      publish(exchange, peer, 0, exchange.generation ? exchange.generation - 1 : 0,
              lane.links[peer].consumed[exchange.phase]);
    int32_t code = EPT_OK;
    stand(exchange, peer, [&] {
      code = ept_engine_recv(lane.arena.engine, UINT32_MAX, kTagAck + lane.index, &ack, &size, &from,
                             std::max<uint64_t>(length, 1), &error);
    });
    if (code != EPT_E_TIMEOUT && code != EPT_LATER) check(code, error);
    if (code == EPT_OK && size == sizeof ack && from < lane.arena.world)
      for (uint32_t p = 0; p < EPT_PHASES; p++)
        lane.links[from].consumed[p] = std::max(lane.links[from].consumed[p], ack.consumed[p]);
  }
  look_around(exchange, length);
}

void Wait::for_transfer(uint32_t peer, uint32_t phase, uint32_t slot, uint32_t where) {
  const uint64_t left = remaining();
  if (!lane_.settle(lane_.links[peer], phase, slot, where, left) && remaining() == 0)
    expired(peer, "our earlier write to it to be done", 0, 0);
}

// Ends early, too, when the engine has news: a rank that is lost or masked, or a message of a reset.
void Wait::signal(uint32_t peer, ept_signal_id id, uint64_t target, uint64_t length, const std::string &what) {
  Error error;
  const int32_t code =
      wait_signal_or_news(lane_.arena.engine, id, target, std::max<uint64_t>(length, 1), &lane_.news, &error);
  if (code == EPT_OK) return;
  if (code == EPT_E_PEER_LOST) {
    Failure failure{error};
    failure.error.peer = int32_t(peer);
    snprintf(failure.error.text, sizeof failure.error.text,
             "%s: rank %u waited %.3f s for rank %u, which is lost: %s (%.600s)", operation_, lane_.arena.rank,
             deadline_.waited_s(), peer, what.c_str(), error.text);
    throw failure;
  }
  if (code != EPT_E_TIMEOUT && code != EPT_LATER) check(code, error);
  if (remaining() == 0) expired(peer, what, target, error.seen);
}

void Wait::expired(uint32_t peer, const std::string &what, uint64_t expected, uint64_t seen) {
  published_.expired();
  const ept_peer_info info = info_of(lane_.arena.engine, peer);
  Failure failure{Error()};
  ept_error &error = failure.error;
  error.code = EPT_E_TIMEOUT;
  error.peer = int32_t(peer);
  error.expected = expected;
  error.seen = seen;
  error.silent_ns = info.silent_ns;
  snprintf(error.text, sizeof error.text,
           "%s: rank %u waited %.3f s for rank %u: %s (count %llu expected, %llu seen); rank %u last made progress "
           "%.3f s ago%s",
           operation_, lane_.arena.rank, deadline_.waited_s(), peer, what.c_str(), (unsigned long long)expected,
           (unsigned long long)seen, peer, double(info.silent_ns) * 1e-9,
           lost_ranks(lane_.arena.engine, lane_.arena.world, lane_.arena.rank).c_str());
  throw failure;
}

void Wait::look_around(Exchange &exchange, uint64_t slept) {
  if (slept <= kLastSlice / 2 && lane_.news == lane_.looked_at) return;
  lane_.looked_at = lane_.news;
  find_lost(exchange);
  lane_.arena.hear_resets();
  for (uint32_t r = 0; r < lane_.arena.world; r++)
    if (r != lane_.arena.rank && needs(exchange, r)) lane_.arena.refuse_reset(r);
}

bool Wait::needs(Exchange &exchange, uint32_t rank) const {
  Chunk chunk;
  return !exchange.out[rank].finished || (!exchange.in[rank].finished && !lane_.look(exchange, rank, 0, &chunk));
}

// While we wait for one peer, another one that we need as well may have died; the one waited for may be alive and stuck
// because of it. One that left in good order may have left its last message on its way: that is the engine's to judge.
void Wait::find_lost(Exchange &exchange) {
  for (uint32_t s = 0; s < lane_.arena.world; s++) {
    if (s == lane_.arena.rank || !needs(exchange, s)) continue;
    const ept_peer_info info = info_of(lane_.arena.engine, s);
    if (info.status != EPT_PEER_LOST && info.status != EPT_PEER_MASKED) continue;
    Failure failure{Error()};
    failure.error.code = EPT_E_PEER_LOST;
    failure.error.peer = int32_t(s);
    failure.error.provider_errno = info.why_errno;
    failure.error.silent_ns = info.silent_ns;
    snprintf(failure.error.text, sizeof failure.error.text, "%s: rank %u waits for rank %u in %s, which is lost: %s",
             operation_, lane_.arena.rank, s, name_of(exchange, lane_.index, exchange.in[s].chunk).c_str(), info.why);
    throw failure;
  }
}

}  // namespace ept::moe
