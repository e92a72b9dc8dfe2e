// SPDX-License-Identifier: Apache-2.0
//
// out.cc: a lane's messages on their way out: where each goes, packing, posting, and when a chunk may go.
#include <string.h>

#include <algorithm>

#include "moe/arena.h"
#include "moe/lane.h"

namespace ept::moe {

void Lane::plan(Exchange &exchange, uint32_t peer, uint64_t rows, Region staging, Region target) {
  if (!exchange.members->has(peer)) return;
  Outgoing &out = exchange.out[peer];
  const uint64_t header = exchange.header_bytes(peer), row = exchange.head.row_bytes;
  out.rows = out.total = rows;
  out.staging = staging;
  out.target = target;
  out.single = header + rows * row <= std::min(staging.bytes, target.bytes);
  out.per_chunk = rows;
  if (out.single) return;
  out.per_chunk = std::min(rows_that_fit(position(staging, 0).bytes, header, row),
                           rows_that_fit(position(target, 0).bytes, header, row));
  if (out.per_chunk == 0)
    fail(EPT_E_CAPACITY, int32_t(peer),
         "%llu rows of %llu bytes for rank %u: half of %llu bytes here and of %llu there holds not one of them",
         (unsigned long long)rows, (unsigned long long)row, peer, (unsigned long long)staging.bytes,
         (unsigned long long)target.bytes);
}

bool Lane::lacks_ack(const Exchange &exchange, uint32_t peer) const {
  return peer != arena.rank && links[peer].consumed[exchange.phase] + 1 < exchange.generation;
}

// How many of our chunks of this phase the peer has consumed and granted.
uint64_t Lane::grants(uint32_t peer, uint32_t phase) {
  if (peer == arena.rank) return links[peer].grants_given[phase];
  uint64_t value = 0;
  Error error;
  check(ept_signal_value(arena.engine, links[peer].granted[phase], &value, &error), error);
  return value;
}

// The slot is free at the peer, or chunk c - 2 has been granted; our staging is no longer read.
bool Lane::may_post(const Exchange &exchange, uint32_t peer) {
  const Outgoing &out = exchange.out[peer];
  // Grants are one count for all generations of a phase. So while an abandoned one is still owed grants by this peer,
  // the next one sends it nothing that would be granted: a message in one chunk is not.
  const Exchange &other = exchanges[exchange.phase][1 - exchange.slot];
  const bool owed =
      other.state != Exchange::idle && other.generation < exchange.generation && !other.out[peer].finished;
  if (owed && !(out.chunk == 0 && out.rows <= out.per_chunk)) return false;
  if (out.chunk < 2 ? lacks_ack(exchange, peer)
                    : grants(peer, exchange.phase) < links[peer].grants_before[exchange.phase] + out.chunk - 1)
    return false;
  return settle(links[peer], exchange.phase, exchange.slot, out.chunk % 2, 0);
}

bool Lane::settle(Link &link, uint32_t phase, uint32_t slot, uint32_t where, uint64_t timeout_ns) {
  ept_transfer_id &transfer = link.in_flight[phase][slot][where];
  if (!transfer) return true;
  Error error;
  const int32_t code = ept_transfer_wait(arena.engine, transfer, timeout_ns, &error);
  if (code == EPT_E_TIMEOUT || code == EPT_LATER) return false;
  transfer = 0;
  if (code < 0) link.posted[phase][slot][where]--;  // it never raises its signal
  check(code, error);
  return true;
}

void Lane::pack(Exchange &exchange, uint32_t peer) {
  const Span span(arena.spans, "pack", seen_phase(exchange.kind), index, peer, exchange.generation);
  Outgoing &out = exchange.out[peer];
  const Region region = out.single ? out.staging : position(out.staging, out.chunk % 2);
  char *to = base + region.offset;
  const uint64_t rows = std::min(out.per_chunk, out.rows - out.sent), bytes = exchange.header_bytes(peer);

  ept_moe_header header = exchange.head;
  header.chunk = out.chunk;
  header.rows = uint32_t(rows);
  header.total_rows = uint32_t(out.total);
  out.last = out.sent + rows == out.rows;  // a message without rows is a header with LAST
  if (out.last) header.flags |= EPT_MOE_LAST;
  for (uint32_t p = 0; p < EPT_PHASES; p++) header.consumed[p] = consumed(p);
  if (exchange.kind == Kind::dispatch) {
    header.combine_offset = exchange.source->combine[peer].offset;
    header.combine_capacity = exchange.source->combine[peer].bytes;
    const Placement &placement = exchange.object->placement;
    const uint64_t counts = 4ull * placement.local_experts(peer);
    memcpy(to + sizeof header, exchange.source->counts.data() + placement.first[peer], counts);
    memset(to + sizeof header + counts, 0, bytes - sizeof header - counts);
  }
  memcpy(to, &header, sizeof header);
  if (rows) exchange.pack(peer, out.sent, rows, to + bytes);
  out.packed = bytes + rows * exchange.head.row_bytes;
  out.packed_rows = rows;
}

// False: the engine's queue is full.
bool Lane::write(Exchange &exchange, uint32_t peer, uint32_t where) {
  const Span span(arena.spans, "post", seen_phase(exchange.kind), index, peer, exchange.generation);
  const Outgoing &out = exchange.out[peer];
  Link &link = links[peer];
  Error error;
  if (peer == arena.rank) {  // it was packed where it is read
    check(ept_signal_raise(arena.engine, link.arrived[exchange.phase][exchange.slot][where], &error), error);
    return true;
  }
  const Region from = out.single ? out.staging : position(out.staging, where);
  const Region to = out.single ? out.target : position(out.target, where);
  ept_write write{};
  write.size = sizeof write;
  write.peer = peer;
  write.source = memory_id;
  write.source_offset = from.offset;
  write.destination = link.region;
  write.destination_offset = to.offset;
  write.length = out.packed;
  write.signal = link.raise[exchange.phase][exchange.slot][where];
  const int32_t code =
      ept_engine_write(arena.engine, &write, &link.in_flight[exchange.phase][exchange.slot][where], &error);
  ept_metrics_phase &seen = arena.metrics.phase(peer, seen_phase(exchange.kind));
  if (code == EPT_LATER) {
    add(seen.tx_later, 1);
    link.in_flight[exchange.phase][exchange.slot][where] = 0;
    return false;
  }
  check(code, error);
  ept_moe_header header;
  memcpy(&header, base + from.offset, sizeof header);
  for (uint32_t p = 0; p < EPT_PHASES; p++) link.told[p] = std::max(link.told[p], header.consumed[p]);
  Counters &counters = exchange.object->counters;
  counters.messages[exchange.phase].fetch_add(1, std::memory_order_relaxed);
  counters.bytes[exchange.phase].fetch_add(out.packed, std::memory_order_relaxed);
  counters.rows[exchange.phase].fetch_add(out.packed_rows, std::memory_order_relaxed);
  add(seen.tx_messages, 1);
  add(seen.tx_bytes, out.packed);
  add(seen.tx_rows, out.packed_rows);
  return true;
}

bool Lane::post(Exchange &exchange, uint32_t peer) {
  Outgoing &out = exchange.out[peer];
  Link &link = links[peer];
  const uint32_t where = out.chunk % 2;
  if (!write(exchange, peer, where)) return false;
  link.posted[exchange.phase][exchange.slot][where]++;
  out.sent += out.packed_rows;
  out.chunk++;
  out.packed = out.packed_rows = 0;
  if (out.last) {
    out.finished = true;
    link.grants_before[exchange.phase] += out.chunk - 1;
    exchange.unsent--;
  }
  return true;
}

// Peers in an order of each rank's own, so that not all write to rank 0 first; this rank last, while others' bytes
// travel.
bool Lane::push(Exchange &exchange) {
  bool moved = false;
  for (uint32_t i = 1; i <= arena.world && exchange.unsent; i++) {
    const uint32_t peer = (arena.rank + i) % arena.world;
    Outgoing &out = exchange.out[peer];
    while (!out.finished) {
      if (!out.packed) {
        if (!may_post(exchange, peer)) break;
        pack(exchange, peer);
      }
      if (!post(exchange, peer)) break;
      moved = true;
    }
  }
  return moved;
}

void Lane::send(Exchange &exchange, Wait &wait) {
  const auto only_grants_lack = [&] {
    for (const Outgoing &out : exchange.out)
      if (!out.finished && (out.packed || out.chunk < 2)) return false;
    return true;
  };
  bool counted = false;
  for (;;) {
    if (push(exchange)) wait.moved();
    if (!exchange.unsent || (exchange.whole && only_grants_lack())) return;
    for (uint32_t r = 0; r < arena.world && !counted; r++)
      if (!exchange.out[r].finished && lacks_ack(exchange, r)) {
        exchange.object->counters.ack_waits.fetch_add(1, std::memory_order_relaxed);
        counted = true;
      }
    take_acks();
    peek();
    if (serve() || push(exchange)) {
      wait.moved();
      continue;
    }
    if (exchange.unsent && !(exchange.whole && only_grants_lack())) wait.for_room(exchange);
  }
}

}  // namespace ept::moe
