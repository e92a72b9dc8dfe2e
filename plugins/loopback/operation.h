// SPDX-License-Identifier: Apache-2.0
//
// operation.h: what happens at the initiator: an operation is admitted, counted, and given its LOCAL_DONE or ERROR.
// What every operation takes is inline; operation.cc has what is said of those that go wrong.
#pragma once

#include <string>

#include "land.h"

namespace loopback {

// Of those that go wrong: the word for its kind, the code and the sentence of its ERROR, INVALID from post, the event.
const char *verb(int32_t kind);
int32_t code_of(Verdict verdict);
std::string sentence(Verdict verdict, const ept_op &op, const Peer &peer);
int32_t refuse(const ept_op &op, const char *why, uint64_t value);
void failed(ept_worker &worker, const ept_op &op, uint32_t epoch, int32_t code, const std::string &text);

// What the initiator can see by itself; everything about the target's memory is checked there.
inline int32_t admit(ept_worker &worker, const ept_op &op) {
  ept_instance &instance = *worker.instance;
  if (op.size != sizeof op) return refuse(op, "the operation's size is not that of ABI 1:", op.size);
  if (op.peer >= instance.world || !instance.peers[op.peer].link) return refuse(op, "no such peer is open:", op.peer);
  if (op.rail >= instance.settings.rails) return refuse(op, "there is no rail", op.rail);
  if (op.kind == EPT_OP_SEND) {
    if (op.length > instance.settings.max_send) return refuse(op, "longer than max_send:", op.length);
  } else if (op.kind == EPT_OP_WRITE || op.kind == EPT_OP_SIGNAL) {
    if (!op.region || op.region->rank != op.peer) return refuse(op, "the region is not one of rank", op.peer);
    if (op.kind == EPT_OP_WRITE && op.length) {
      if (op.length > instance.settings.max_message) return refuse(op, "longer than max_message:", op.length);
      if (!op.source_mem) return refuse(op, "the source is not registered; bytes:", op.length);
      const ept_memory &memory = op.source_mem->memory;
      const uint64_t start = reinterpret_cast<uint64_t>(op.source) - reinterpret_cast<uint64_t>(memory.address);
      if (start > memory.length || op.length > memory.length - start) {
        return refuse(op, "the source is not all inside its registration; bytes:", op.length);
      }
      if (!(memory.access & EPT_ACCESS_LOCAL)) return refuse(op, "the source may not be read; access", memory.access);
    }
  } else {
    return refuse(op, "unknown kind", static_cast<uint64_t>(op.kind));
  }
  return worker.in_flight[op.rail] < instance.settings.tx_depth ? EPT_OK : EPT_LATER;
}

inline void accepted(ept_worker &worker, const ept_op &op) {
  ept_rail_counters &counters = worker.counters[op.rail];
  ++worker.in_flight[op.rail];
  if (op.kind == EPT_OP_SEND) {
    ++counters.tx_sends;
  } else {
    ++counters.tx_operations;
    counters.tx_bytes += op.kind == EPT_OP_WRITE ? op.length : 0;
  }
}

// The event of its end, LOCAL_DONE or ERROR, which the next poll hands out.
inline Item &done(ept_worker &worker, const ept_op &op, int32_t kind, uint32_t epoch) {
  Item &item = worker.own.push();
  item.event = {};
  item.event.size = sizeof(ept_event);
  item.event.kind = kind;
  item.event.peer = op.peer;
  item.event.epoch = epoch;
  item.event.rail = op.rail;
  item.event.cookie = op.cookie;
  item.event.length = op.length;
  return item;
}

// What became of an operation that was carried at once.
inline void conclude(ept_worker &worker, const ept_op &op, const Peer &peer, Verdict verdict) {
  if (verdict == Verdict::kLanded) {
    done(worker, op, EPT_EVENT_LOCAL_DONE, peer.epoch);
  } else {
    failed(worker, op, peer.epoch, code_of(verdict), sentence(verdict, op, peer));
  }
}

}  // namespace loopback
