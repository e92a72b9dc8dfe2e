// SPDX-License-Identifier: Apache-2.0
//
// in.cc: a lane's messages on their way in: what has landed, whether it may be believed, and taking it.
#include <string.h>

#include <algorithm>

#include "moe/arena.h"
#include "moe/lane.h"

namespace ept::moe {

// Where the message of `source` lies in our memory.
Region Lane::region_of(const Exchange &exchange, uint32_t source) const {
  const Region in_slot = exchange.kind == Kind::combine ? exchange.source->combine[source]
                                                        : exchange.object->shape.dispatch_region(source);
  return received(exchange.phase, exchange.slot, in_slot);
}

bool Lane::look(Exchange &exchange, uint32_t source, uint32_t ahead, Chunk *chunk) {
  Incoming &in = exchange.in[source];
  if (in.finished) return false;
  const uint32_t number = in.chunk + ahead, where = number % 2;
  const Link &link = links[source];
  uint64_t value = 0;
  Error error;
  check(ept_signal_value(arena.engine, link.arrived[exchange.phase][exchange.slot][where], &value, &error), error);
  if (value <= link.taken[exchange.phase][exchange.slot][where]) return false;

  const Region region = region_of(exchange, source);
  chunk->first = in.got + (ahead ? in.shown[in.chunk % 2] : 0);
  const char *at = base + (number == 0 ? region.offset : position(region, where).offset);
  memcpy(&chunk->header, at, sizeof chunk->header);
  check_header(exchange, source, chunk->header, number);
  chunk->rows = at + exchange.header_bytes(arena.rank);
  chunk->count = chunk->header.rows;
  chunk->last = chunk->header.flags & EPT_MOE_LAST;
  if (!in.begun) {
    in.begun = true;
    if (source != arena.rank)
      record(arena.metrics.phase(source, seen_phase(exchange.kind)).arrivals, now_ns() - exchange.since);
    in.first = chunk->header;
    in.rows = chunk->header.total_rows;
    if (exchange.kind == Kind::dispatch) {
      const uint32_t local = exchange.object->local();
      if (local) memcpy(exchange.counts.data() + size_t(source) * local, at + sizeof(ept_moe_header), 4ull * local);
    }
  }
  check_extent(exchange, source, *chunk, number);
  check_counts(exchange, source);
  in.shown[number % 2] = chunk->count;
  in.cut_short = chunk->last && chunk->first + chunk->count < in.rows;
  for (uint32_t p = 0; p < EPT_PHASES; p++)
    links[source].consumed[p] = std::max(links[source].consumed[p], chunk->header.consumed[p]);
  return true;
}

void Lane::take(Exchange &exchange, uint32_t source, const Chunk &chunk) {
  Incoming &in = exchange.in[source];
  Link &link = links[source];
  link.taken[exchange.phase][exchange.slot][in.chunk % 2]++;
  in.got += chunk.count;
  in.chunk++;
  if (source != arena.rank) {
    ept_metrics_phase &seen = arena.metrics.phase(source, seen_phase(exchange.kind));
    add(seen.rx_messages, 1);
    add(seen.rx_bytes, exchange.header_bytes(arena.rank) + chunk.count * chunk.header.row_bytes);
    add(seen.rx_rows, chunk.count);
  }
  if (chunk.last) {
    in.finished = true;
    exchange.unread--;
    return;
  }
  link.grants_owed[exchange.phase]++;
  exchange.object->counters.grants.fetch_add(source == arena.rank ? 0 : 1, std::memory_order_relaxed);
  pay_grants(source, exchange.phase);
}

void Lane::refuse_cut(const Exchange &exchange) const {
  for (uint32_t s = 0; s < arena.world; s++)
    if (exchange.in[s].cut_short)
      fail(EPT_E_CLOSED, int32_t(s),
           "rank %u abandoned %s %llu of lane %u when %llu of its %llu rows for rank %u were sent: an exception there "
           "ended its call",
           s, kind_name(exchange.kind), (unsigned long long)exchange.generation, index,
           (unsigned long long)exchange.in[s].got, (unsigned long long)exchange.in[s].rows, arena.rank);
}

void Lane::read_headers(Exchange &exchange, Wait &wait) {
  Chunk chunk;
  for (uint32_t i = 0; i < arena.world; i++) {
    const uint32_t source = (arena.rank + arena.world - i) % arena.world;  // as peers send: the one before us first
    while (!exchange.in[source].begun && !look(exchange, source, 0, &chunk)) {
      const bool pushed = exchange.unsent && push(exchange);
      if (serve() || pushed)
        wait.moved();
      else
        wait.for_chunk(exchange);
    }
  }
}

// ---- may it be believed? A peer that is out of step, or of another version, is told so by name ----

void Lane::check_header(const Exchange &exchange, uint32_t source, const ept_moe_header &h, uint32_t chunk) const {
  const auto ull = [](uint64_t v) { return (unsigned long long)v; };
  if (h.magic != EPT_MOE_MAGIC || h.version != EPT_WIRE_VERSION)
    fail(EPT_E_VERSION, int32_t(source), "rank %u sent no header of version %d (magic %08x, version %u)", source,
         EPT_WIRE_VERSION, h.magic, h.version);
  const bool late = h.flags & EPT_MOE_LATE_WEIGHTS;
  if (h.membership != exchange.members->epoch)
    fail(EPT_E_FAULT, int32_t(source),
         "rank %u takes its step under membership %u, rank %u under %u: a rank was masked or readmitted between them. "
         "Reset on every rank",
         source, h.membership, arena.rank, exchange.members->epoch);
  if (h.phase != exchange.phase || h.source != source || h.lane != index || h.generation != exchange.generation ||
      h.object != exchange.object->number || late != (exchange.kind == Kind::late_weights) || h.chunk != chunk)
    fail(EPT_E_MISMATCH, int32_t(source),
         "rank %u and rank %u are out of step: from rank %u came %s %llu of AllToAll %u in lane %u, chunk %u; rank %u "
         "is at %s %llu of AllToAll %u in lane %u, chunk %u. Every rank must make the same calls in a lane (late "
         "weights: all ranks or none)",
         source, arena.rank, h.source,
         late                           ? "late weights"
         : h.phase == EPT_PHASE_COMBINE ? "combine"
                                        : "dispatch",
         ull(h.generation), h.object, h.lane, h.chunk, arena.rank, kind_name(exchange.kind), ull(exchange.generation),
         exchange.object->number, index, chunk);

  const Object &object = *exchange.object;
  uint64_t row = 0;
  if (exchange.kind == Kind::combine)
    row = ept_combine_row_bytes(object.returned(), object.config.top_k, (h.flags & EPT_MOE_ROW_WEIGHTS) != 0);
  else if (late)
    row = ept_late_weights_row_bytes(object.config.top_k);
  else
    row = ept_row_bytes(object.payload(), h.scale_bytes, object.config.top_k);
  if (h.top_k != object.config.top_k || h.row_bytes != row ||
      row > at_least(object.shape.dispatch_row, object.shape.combine_row))
    fail(EPT_E_MISMATCH, int32_t(source),
         "rank %u sent rows of %u bytes (%u of scales, top_k %u); rank %u expects %llu (top_k %u)", source, h.row_bytes,
         h.scale_bytes, h.top_k, arena.rank, ull(row), object.config.top_k);
  // What reads the rows goes by the first header alone.
  const Incoming &in = exchange.in[source];
  if (in.begun && (h.row_bytes != in.first.row_bytes || h.scale_bytes != in.first.scale_bytes ||
                   ((h.flags ^ in.first.flags) & ~uint32_t(EPT_MOE_LAST)) != 0))
    fail(EPT_E_MISMATCH, int32_t(source),
         "chunk %u of rank %u has rows of %u bytes (%u of scales, flags %x); its message began with %u (%u, %x)", chunk,
         source, h.row_bytes, h.scale_bytes, h.flags, in.first.row_bytes, in.first.scale_bytes, in.first.flags);
}

// Places in the outputs are sums of counts, so no source may claim more than its rows can name.
void Lane::check_counts(const Exchange &exchange, uint32_t source) const {
  if (exchange.kind != Kind::dispatch) return;
  const uint32_t local = exchange.object->local();
  const uint64_t most = exchange.in[source].rows * exchange.object->config.top_k;
  uint64_t sum = 0;
  for (uint32_t e = 0; e < local; e++) sum += exchange.counts[size_t(source) * local + e];
  if (sum > most)
    fail(EPT_E_MISMATCH, int32_t(source),
         "rank %u counts %llu rows for the experts of rank %u; its %llu rows name at "
         "most %llu",
         source, (unsigned long long)sum, arena.rank, (unsigned long long)exchange.in[source].rows,
         (unsigned long long)most);
}

void Lane::check_extent(const Exchange &exchange, uint32_t source, const Chunk &chunk, uint32_t number) const {
  const Incoming &in = exchange.in[source];
  const ept_moe_header &h = chunk.header;
  const Region region = region_of(exchange, source);
  const bool single = number == 0 && chunk.last;
  const uint64_t room = single ? region.bytes : position(region, 0).bytes;
  const uint64_t needed = exchange.header_bytes(arena.rank) + chunk.count * h.row_bytes;
  const uint64_t after = chunk.first + chunk.count;
  if (needed <= room && h.total_rows == in.rows && in.rows <= exchange.object->config.max_tokens && after <= in.rows &&
      (chunk.last || (chunk.count > 0 && after < in.rows)))
    return;
  fail(EPT_E_MISMATCH, int32_t(source),
       "rank %u sent chunk %u of %s with rows %llu to %llu of %u (said %llu at first, max_tokens is %u), %llu bytes "
       "where "
       "%llu fit",
       source, number, kind_name(exchange.kind), (unsigned long long)chunk.first, (unsigned long long)after,
       h.total_rows, (unsigned long long)in.rows, exchange.object->config.max_tokens, (unsigned long long)needed,
       (unsigned long long)room);
}

}  // namespace ept::moe
