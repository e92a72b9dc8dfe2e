// SPDX-License-Identifier: Apache-2.0
//
// moe.cc: the C API of dispatch and combine. Every call checks its handles, holds its lane, and turns what is thrown
// into a code and an ept_error; a lane whose call failed midway is faulted with it.
#include "moe/moe.h"

#include <stdio.h>
#include <string.h>

using namespace ept::moe;

namespace {

Lane &lane_of(Moe &moe, uint32_t index) {
  if (moe.arena->closed()) fail(EPT_E_CLOSED, -1, "the arena was closed");
  if (index >= moe.lanes.size()) fail(EPT_E_INVALID, -1, "lane %u; this AllToAll has %zu", index, moe.lanes.size());
  return *moe.lanes[index];
}

[[noreturn]] void throw_fault(const Lane &lane) {
  fail(EPT_E_FAULT, lane.fault.peer, "lane %u is faulted, reset it; the first cause was %s in %s: %.700s", lane.index,
       ept_code_name(lane.fault.code), lane.fault.operation, lane.fault.text);
}

template <class Body>
int32_t on_lane(ept_moe *moe, uint32_t index, const char *operation, ept_error *error, Body &&body) {
  return guarded(operation, error, [&] {
    Lane &lane = lane_of(moe->moe, index);
    Wait wait(lane, operation);
    const Lane::Held held(lane, wait.deadline(), operation);
    if (moe->moe.arena->closed()) fail(EPT_E_CLOSED, -1, "the arena was closed");
    moe->moe.arena->refuse_suspended();
    if (lane.faulted) throw_fault(lane);
    lane.committed = false;
    // moe_check is none of what takes time.
    ept::Spans *spans = operation[0] == 'm' ? nullptr : moe->moe.arena->spans;
    const ept::Span span(spans, operation, operation[0] == 'd' ? EPT_METRICS_DISPATCH : EPT_METRICS_COMBINE,
                         lane.index);
    try {
      body(lane, wait);
    } catch (...) {
      if (!lane.committed) throw;
      const Failure failure = current();
      lane.faulted = true;
      lane.fault = failure.error;
      snprintf(lane.fault.operation, sizeof lane.fault.operation, "%s", operation);
      throw failure;
    }
  });
}

template <class T>
void check_size(const char *name, const T *given) {
  if (!given) fail(EPT_E_INVALID, -1, "%s is NULL", name);
  if (given->size != sizeof(T))
    fail(EPT_E_INVALID, -1, "%s.size is %u; this library's is %zu", name, given->size, sizeof(T));
}

}  // namespace

int32_t ept_moe_plan_get(const ept_moe_config *config, ept_moe_plan *plan, ept_error *error) {
  return guarded("moe_plan", error, [&] {
    check_size("ept_moe_config", config);
    *plan = plan_of(Object(*config));
  });
}

int32_t ept_arena_create(ept_engine *engine, ept_arena **arena, ept_error *error) {
  return guarded("arena_create", error, [&] { *arena = new ept_arena{std::make_shared<Arena>(engine)}; });
}

int32_t ept_arena_close(ept_arena *arena, uint64_t timeout_ns, ept_error *error) {
  return guarded("arena_close", error, [&] {
    arena->arena->close(timeout_ns == UINT64_MAX ? arena->arena->timeout_ns : timeout_ns);
    delete arena;
  });
}

int32_t ept_arena_members(ept_arena *arena, uint32_t epoch, const uint8_t *active, uint64_t step, ept_error *error) {
  return guarded("arena_members", error, [&] { arena->arena->set_members(epoch, active, step); });
}

int32_t ept_arena_expect(ept_arena *arena, uint32_t objects, const void *places, size_t length, ept_error *error) {
  return guarded("arena_expect", error, [&] {
    arena->arena->expect(objects, std::string(static_cast<const char *>(places), places ? length : 0));
  });
}

int32_t ept_arena_places(ept_arena *arena, void *places, size_t *length, ept_error *error) {
  return guarded("arena_places", error, [&] {
    const std::string all = arena->arena->all_places();
    const size_t room = *length;
    *length = all.size();
    if (!places) return;
    if (room < all.size())
      fail(EPT_E_CAPACITY, -1, "the places of all ranks take %zu bytes, not %zu", all.size(), room);
    memcpy(places, all.data(), all.size());
  });
}

int32_t ept_arena_step(ept_arena *arena, uint64_t *step, ept_error *error) {
  return guarded("arena_step", error, [&] { *step = arena->arena->step(); });
}

int32_t ept_arena_suspend(ept_arena *arena, uint64_t timeout_ns, ept_error *error) {
  return guarded("suspend", error, [&] { arena->arena->suspend(timeout_ns); });
}

int32_t ept_arena_resume(ept_arena *arena, uint64_t timeout_ns, ept_error *error) {
  return guarded("resume", error, [&] { arena->arena->resume(timeout_ns); });
}

int32_t ept_moe_create(ept_arena *arena, const ept_moe_config *config, ept_moe **moe, ept_error *error) {
  return guarded("moe_create", error, [&] {
    if (!config) fail(EPT_E_INVALID, -1, "ept_moe_config is NULL");
    auto made = std::make_unique<ept_moe>();
    made->moe.arena = arena->arena;
    made->moe.object = arena->arena->create(*config, made->moe.lanes);
    *moe = made.release();
  });
}

int32_t ept_moe_close(ept_moe *moe, ept_error *error) {
  return guarded("moe_close", error, [&] { delete moe; });
}

int32_t ept_moe_local_experts(ept_moe *moe, int32_t *ids) {
  const Object &object = *moe->moe.object;
  const auto &held = object.placement.held[object.config.rank];
  if (!held.empty()) memcpy(ids, held.data(), held.size() * sizeof(int32_t));
  return EPT_OK;
}

int32_t ept_moe_dispatch_send(ept_moe *moe, const ept_dispatch_args *args, ept_error *error) {
  return on_lane(moe, args ? args->lane : 0, "dispatch_send", error, [&](Lane &lane, Wait &wait) {
    check_size("ept_dispatch_args", args);
    dispatch_send(moe->moe, lane, *args, wait);
  });
}

int32_t ept_moe_dispatch_wait(ept_moe *moe, uint32_t lane, ept_arrival *arrival, ept_error *error) {
  return on_lane(moe, lane, "dispatch_wait", error, [&](Lane &held, Wait &wait) {
    check_size("ept_arrival", arrival);
    dispatch_wait(moe->moe, held, arrival, wait);
  });
}

int32_t ept_moe_dispatch_recv(ept_moe *moe, uint32_t lane, const ept_dispatch_outputs *outputs, ept_routing **routing,
                              ept_error *error) {
  return on_lane(moe, lane, "dispatch_recv", error, [&](Lane &held, Wait &wait) {
    check_size("ept_dispatch_outputs", outputs);
    dispatch_recv(moe->moe, held, *outputs, routing, wait);
  });
}

int32_t ept_moe_combine_send(ept_moe *moe, const ept_combine_args *args, ept_error *error) {
  return on_lane(moe, args ? args->lane : 0, "combine_send", error, [&](Lane &lane, Wait &wait) {
    check_size("ept_combine_args", args);
    combine_send(moe->moe, lane, *args, wait);
  });
}

int32_t ept_moe_combine_recv(ept_moe *moe, uint32_t lane, const ept_tensor *y, const ept_tensor *row_weights,
                             ept_error *error) {
  return on_lane(moe, lane, "combine_recv", error, [&](Lane &held, Wait &wait) {
    if (!y) fail(EPT_E_INVALID, -1, "y is NULL");
    combine_recv(moe->moe, held, *y, row_weights, wait);
  });
}

int32_t ept_moe_check(ept_moe *moe, uint32_t lane, ept_error *error) {
  return on_lane(moe, lane, "moe_check", error, [](Lane &, Wait &) {});
}

int32_t ept_moe_reset(ept_moe *moe, uint64_t timeout_ns, ept_error *error) {
  int32_t code = EPT_OK;
  const int32_t failed = guarded("moe_reset", error, [&] { code = moe->moe.arena->reset(timeout_ns); });
  return failed ? failed : code;
}

int32_t ept_moe_stats_get(ept_moe *moe, ept_moe_stats *stats) {
  const Counters &counters = moe->moe.object->counters;
  const auto read = [](const std::atomic<uint64_t> &counter) { return counter.load(std::memory_order_relaxed); };
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    stats->generations[p] = read(counters.generations[p]);
    stats->messages[p] = read(counters.messages[p]);
    stats->bytes[p] = read(counters.bytes[p]);
    stats->rows[p] = read(counters.rows[p]);
  }
  stats->grants = read(counters.grants);
  stats->acks = read(counters.acks);
  stats->ack_waits = read(counters.ack_waits);
  return EPT_OK;
}
