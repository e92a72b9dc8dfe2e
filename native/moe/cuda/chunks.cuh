// SPDX-License-Identifier: Apache-2.0
//
// chunks.cuh: messages that may be longer than their region, and so go in chunks (wire.h, GENERATIONS): out, chunk by
// chunk as the reader grants them, and in.
//
// A call is two launches a phase. The first sends the first two chunks of each message, which wait for nobody. The
// second has warps that send the rest, and warps that receive: from its beginning to its end all blocks of all ranks of
// a GPU are on it, which is what the host has seen to for every kernel that waits (lanes.cc, choose_blocks).
//
// INVARIANTS
//  - Chunk c of a message is packed, and posted, in position c mod 2. Below 2 the slot is free (protocol.cuh, settle);
//    from 2 on the reader has granted c - 2, so all of c - 2 was packed, posted and read: who packs c waits for the
//    grant, then until the network no longer reads c - 2 from there.
//  - A chunk is posted by the warp whose rows complete it (packed, with acquire and release): it has seen all of them,
//    and writes the header.
//  - A source has one warp of one block that looks at its signals, its leader. It shows what it has found (begun,
//  ready)
//    with release; who reads a row has seen it with acquire. What stands of a chunk in ChunkState is changed only when
//    the next chunk of its position is in, so after its grant, so after the last reader of the chunk is through.
//  - A chunk is granted once, and read by then: `used` counts with acquire and release. Grants are a count, and don't
//  say
//    which chunk is granted: so they go in the order of chunks, though the later of two that are in may be read first
//    (in_order). The last chunk is not granted; what comes next to its position is another generation's.
//  - Grants and counts of position 1 go on over generations: the last block of the second launch keeps in `offsets`
//  what
//    this one has had of them.
//
// NO DEADLOCK. Every first chunk goes without a wait, so every header comes. From then on each source's rows have their
// places by themselves, and readers of a dispatch wait for nobody: every chunk that is in is read and granted. Senders
// take tokens in order; the lowest token that is not yet sent waits for grants alone, of chunks all of whose rows are
// of earlier tokens, which are packed. Readers of a combine sum tokens in order, each warp its own: the lowest token
// that is not yet summed waits for rows before which every row of that rank belongs to an earlier token, and so was
// read and granted; and a combine's senders pass over a rank whose grant is missing. Leaders go on leading while they
// wait.
#pragma once

#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

EPT_DEVICE void lend(uint64_t *word, uint64_t value) { Hardware::release_device(word, value); }
EPT_DEVICE uint64_t lent(const uint64_t *word) { return Hardware::acquire_device(word); }

// ---- out ----

// Kind: uint32_t set() of MemberSet; rows_to(r), header_bytes(r), Region staging(r) from the start of the lane's
// staging, Region target(r) from the start of the reader's lane; header(r, ept_moe_header &) what is its own, one lane;
// beside(r, char *) what stands behind it, the whole warp.
template <class Kind>
class ChunksOut {
 public:
  EPT_DEVICE ChunksOut(const LaneTable &lane, const ObjectTable &what, const Kind &of, uint32_t the_half,
                       uint32_t the_phase, uint64_t number, uint64_t bytes_of_row, const OutShared &shared,
                       const ChunkState &state)
      : t(lane),
        object(what),
        kind(of),
        half(the_half),
        phase(the_phase),
        generation(number),
        row_bytes(bytes_of_row),
        s(shared),
        w(state) {}

  // How each message is cut. All threads; the caller's barrier ends it. True: some has a chunk that needs a grant.
  EPT_DEVICE bool plan() const {
    const Taking members = taking(t, kind.set());
    bool rest = false;
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) {
      s.rows[r] = s.chunks[r] = 0;
      s.per[r] = 1;
      if (!members.has(r)) continue;
      char *window = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
      const Region target = kind.target(r), staging = window ? target : kind.staging(r);
      const Cut how = cut(kind.rows_to(r), kind.header_bytes(r), row_bytes, staging, target);
      s.rows[r] = kind.rows_to(r);
      s.per[r] = uint32_t(how.per_chunk ? how.per_chunk : 1);
      s.chunks[r] = uint32_t(how.chunks);
      if (!how.chunks)
        raise_fault(t, uint32_t(-EPT_E_MISMATCH), half, int32_t(r), kHeader, generation, target.bytes, 11);
      s.at[r] = window ? window + staging.offset : staged(t, r, staging.offset);
      s.half[r] = uint32_t(position(staging, 1).offset - staging.offset);
      s.there[r] = target.offset;
      s.half_there[r] = uint32_t(position(target, 1).offset - target.offset);
      rest = rest || how.chunks > 2;
    }
    return rest;
  }
  EPT_DEVICE uint32_t chunk_of(uint32_t r, uint32_t row) const { return row / s.per[r]; }
  EPT_DEVICE char *row_at(uint32_t r, uint32_t row) const {
    const uint32_t chunk = chunk_of(r, row);
    return chunk_at(r, chunk) + kind.header_bytes(r) + (row - chunk * s.per[r]) * row_bytes;
  }

  // Rows of chunks below this one may be packed, as far as is known now. Grants of the generation before, which it
  // needed no more, may still be on their way: then none of this one has come.
  EPT_DEVICE uint64_t open(uint32_t r) const {
    const uint64_t granted = Hardware::acquire_system(t.words[r] + grant_index(phase));
    const uint64_t before = t.offsets[r * kSignals + grant_index(phase)];
    return device::reached(granted, before) ? granted - before + 2 : 2;
  }
  // Waits for it. One lane; false: the lane is faulted.
  EPT_DEVICE bool await(uint32_t r, uint32_t chunk) const {
    const uint64_t deadline = device::deadline_in(t.timeout_ns);
    while (open(r) <= chunk) {
      const uint64_t target = t.offsets[r * kSignals + grant_index(phase)] + chunk - 1;
      if (!may_wait(t, half, generation, r, t.words[r] + grant_index(phase), target, deadline)) return false;
    }
    return reuse(r, chunk);
  }
  // It is open, and the network no longer reads what was packed there. Who posted that is about to say so.
  EPT_DEVICE bool reuse(uint32_t r, uint32_t chunk) const {
    if (r == t.rank || t.paths[r].kind != EPT_DEVICE_PROXY) return true;
    while (lent(&w.posted[r * 2 + chunk % 2]) + 1 < chunk) {
      if (fault_of(t)) return false;
      EPT_REST();
    }
    const uint64_t ticket = t.tickets[r * kSignals + signal_of(chunk)];
    const device::Seen seen = device::flush(t.paths[r], ticket - 1, device::deadline_in(t.timeout_ns));
    if (!seen.came()) raise_fault(t, uint32_t(-seen.code), half, int32_t(r), kPost, generation, ticket, seen.count);
    return seen.came();
  }

  // The warp has packed a row for each lane's rank, or none (-1): chunks that are complete by that go.
  EPT_DEVICE void packed(int32_t rank, uint32_t row) const {
    __syncwarp();
    uint32_t chunk = 0;
    bool full = false;
    if (rank >= 0) {
      chunk = chunk_of(uint32_t(rank), row);
      const uint32_t all = rows_in(uint32_t(rank), chunk);
      full = device::count_in(&w.packed[uint32_t(rank) * 2 + chunk % 2]) + 1 == all;
    }
    for (uint32_t left = __ballot_sync(kAll, int(full)); left; left &= left - 1) {
      const auto who = uint32_t(__ffs(int(left)) - 1);
      finish(from_lane(uint32_t(rank), who), from_lane(chunk, who));
    }
  }
  // Messages without rows: a header each.
  EPT_DEVICE void empty() const {
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < t.world; r += gridDim.x * warps())
      if (s.chunks[r] && !s.rows[r]) finish(r, 0);
  }
  EPT_DEVICE void count() const {
    tally(
        t, object, phase, [&](uint32_t r) { return s.rows[r]; },
        [&](uint32_t r) { return s.chunks[r] * kind.header_bytes(r) + s.rows[r] * row_bytes; },
        [&](uint32_t r) { return s.chunks[r]; });
  }
  // The grants of this generation are had. One thread a rank, in the last block.
  EPT_DEVICE void settle_grants(uint32_t r) const {
    if (s.chunks[r]) t.offsets[r * kSignals + grant_index(phase)] += s.chunks[r] - 1;
  }

 private:
  EPT_DEVICE uint32_t signal_of(uint32_t chunk) const {
    return signal_index(phase, uint32_t(generation & 1), chunk % 2);
  }
  EPT_DEVICE char *chunk_at(uint32_t r, uint32_t chunk) const { return s.at[r] + (chunk % 2 ? s.half[r] : 0); }
  EPT_DEVICE uint32_t rows_in(uint32_t r, uint32_t chunk) const {
    const uint32_t left = s.rows[r] - chunk * s.per[r];
    return left < s.per[r] ? left : s.per[r];
  }

  // The whole warp, which has seen all rows of the chunk.
  EPT_DEVICE void finish(uint32_t r, uint32_t chunk) const {
    __syncwarp();
    char *at = chunk_at(r, chunk);
    if (lane_id() == 0) {
      ept_moe_header h = header_of(t, object, phase, generation, s.rows[r]);
      h.membership = t.state->membership[kind.set()];
      h.chunk = chunk;
      h.rows = rows_in(r, chunk);
      if (chunk + 1 < s.chunks[r]) h.flags &= ~uint32_t(EPT_MOE_LAST);
      h.row_bytes = uint32_t(row_bytes);
      kind.header(r, h);
      put_header(at, h);
    }
    kind.beside(r, at + EPT_MOE_HEADER_BYTES);
    __syncwarp();
    if (lane_id() == 0) post_chunk(r, chunk, at);
    __syncwarp();
  }
  EPT_DEVICE void post_chunk(uint32_t r, uint32_t chunk, const char *at) const {
    const uint32_t slot = r * 2 + chunk % 2, signal = signal_of(chunk);
    w.packed[slot] = 0;
    if (r == t.rank) {
      Hardware::add_release_system(t.words[r] + signal, 1);
      return;
    }
    const ept_path &path = t.paths[r];
    const bool direct = device::window(path, 0) != nullptr;
    const uint64_t bytes = kind.header_bytes(r) + rows_in(r, chunk) * row_bytes;
    const device::Put put =
        device::put(device::Thread(), path, direct ? nullptr : at, s.there[r] + (chunk % 2 ? s.half_there[r] : 0),
                    direct ? 0 : bytes, signal, device::deadline_in(t.timeout_ns));
    if (put.code != EPT_OK)
      raise_fault(t, uint32_t(-put.code), half, int32_t(r), kPost, generation, bytes, uint64_t(-put.code));
    else if (!direct)
      t.tickets[r * kSignals + signal] = put.ticket + 1;
    lend(&w.posted[slot], chunk + 1);
  }

  const LaneTable &t;
  const ObjectTable &object;
  const Kind &kind;
  const uint32_t half, phase;
  const uint64_t generation, row_bytes;
  const OutShared &s;
  const ChunkState &w;
};

// ---- in ----

// Of a source, by its leader.
enum Leading : uint32_t { kNextAway = 0, kNextIn = 1, kAllIn = 2 };
enum class Led : uint32_t { kNothing, kMoved, kFaulted };

// Kind, all of whose calls are made by the whole warp: Region region(source) from the start of where its messages come;
// header_bytes(); bool first(source): the header of its first chunk is in, sets w.total; bool may_place(source): what
// must be known of other sources is, asked until it is true, once; bool place(source, rows, from, to): of rows of a
// chunk, the first of which stands at `rows`. False of first and place: the lane is faulted.
template <class Kind>
class ChunksIn {
 public:
  EPT_DEVICE ChunksIn(const LaneTable &lane, Kind &of, uint32_t the_half, uint32_t the_phase, uint64_t number,
                      const InShared &shared, const ChunkState &state, bool reads_nothing)
      : t(lane),
        kind(of),
        half(the_half),
        phase(the_phase),
        generation(number),
        s(shared),
        w(state),
        discards(reads_nothing),
        deadline(device::deadline_in(lane.timeout_ns)) {}

  // All threads; the caller's barrier ends it. A rank that takes no part is through, with nothing.
  EPT_DEVICE void begin() const {
    const Taking members = taking(t, phase);
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) {
      s.chunk[r] = 0;
      s.leading[r] = members.has(r) ? kNextAway : kAllIn;
    }
  }

  // Of `readers` warps of the grid the `me`th leads some sources: what has come of them.
  EPT_DEVICE Led lead(uint32_t me, uint32_t readers) {
    bool moved = false;
    uint32_t missing = t.world;
    for (uint32_t r = me; r < t.world; r += readers) {
      const Led led = lead_one(r);
      if (led == Led::kFaulted) return led;
      moved = moved || led == Led::kMoved;
      if (from_lane(peek(&s.leading[r]), 0) != kAllIn && missing == t.world) missing = r;
    }
    if (moved) deadline = device::deadline_in(t.timeout_ns);
    if (moved) return Led::kMoved;
    uint32_t go_on = 1;
    if (lane_id() == 0) {
      if (missing < t.world && peek(&s.leading[missing]) == kNextAway) {
        go_on = may_wait(t, half, generation, missing, word(missing, peek(&s.chunk[missing])),
                         target(missing, peek(&s.chunk[missing])), deadline);
      } else {
        go_on = fault_of(t) == 0;
        EPT_REST();
      }
    }
    return from_lane(go_on, 0) ? Led::kNothing : Led::kFaulted;
  }
  EPT_DEVICE bool all_in(uint32_t me, uint32_t readers) const {
    uint32_t lacks = 0;
    for (uint32_t r = me + readers * lane_id(); r < t.world; r += readers * kWarp)
      if (peek(&s.leading[r]) != kAllIn) lacks = 1;
    return __ballot_sync(kAll, int(lacks)) == 0;
  }

  // Of rows that are ready, one lane.
  EPT_DEVICE const char *row_at(uint32_t r, uint32_t row, uint64_t row_bytes) const {
    const uint32_t slot = slot_of(r, row);
    return chunk_at(r, slot % 2) + kind.header_bytes() + (row + 1 - peek(&w.first[slot])) * row_bytes;
  }
  // The warp has read it; each lane one of a rank, or none (-1).
  EPT_DEVICE void read(int32_t rank, uint32_t row) const {
    __syncwarp();
    if (rank >= 0) {
      const uint32_t slot = slot_of(uint32_t(rank), row);
      if (device::count_in(&w.used[slot]) + 1 == w.count[slot]) end_chunk(uint32_t(rank), slot);
    }
    __syncwarp();
  }
  // One thread a rank, in the last block: what this generation has had of each count. The grants that went to others.
  EPT_DEVICE uint32_t settle_counts(uint32_t r) const {
    const uint32_t n = w.chunks[r];
    if (!n) return 0;
    const auto slot = uint32_t(generation & 1);
    t.offsets[r * kSignals + signal_index(phase, slot, 0)] += (n + 1) / 2 - 1;
    t.offsets[r * kSignals + signal_index(phase, slot, 1)] += n / 2;
    return r == t.rank ? 0 : n - 1;
  }

 private:
  EPT_DEVICE const uint64_t *word(uint32_t r, uint32_t chunk) const {
    return t.words[r] + signal_index(phase, uint32_t(generation & 1), chunk % 2);
  }
  EPT_DEVICE uint64_t target(uint32_t r, uint32_t chunk) const {
    const uint64_t had = t.offsets[r * kSignals + signal_index(phase, uint32_t(generation & 1), chunk % 2)];
    return had + chunk / 2 + 1 + (chunk % 2 ? 0 : generation / 2);
  }
  EPT_DEVICE const char *chunk_at(uint32_t r, uint32_t chunk) const {
    const Region region = kind.region(r);
    return t.in[r] + region.offset + (chunk % 2 ? position(region, 1).offset - region.offset : 0);
  }
  // The later of the two positions whose chunk begins at or before the row: the other holds an earlier chunk, or one
  // that comes after the row's.
  EPT_DEVICE uint32_t slot_of(uint32_t r, uint32_t row) const {
    const uint32_t a = peek(&w.first[r * 2]), b = peek(&w.first[r * 2 + 1]);
    const bool has_a = a && a <= row + 1, has_b = b && b <= row + 1;
    return r * 2 + (has_b && (!has_a || b > a) ? 1 : 0);
  }
  // One lane, which knows that all of it is read.
  EPT_DEVICE void end_chunk(uint32_t r, uint32_t slot) const {
    w.used[slot] = 0;
    if (w.last[slot]) return;
    for (uint32_t n = in_order(r, w.number[slot]); n > 0; n--) grant(r);
  }
  // How many chunks may be granted now that this one is read: none where the one before it isn't yet; then it is
  // granted with that one.
  EPT_DEVICE uint32_t in_order(uint32_t r, uint32_t chunk) const {
    uint32_t *word = &w.granted[r];  // the chunk that is granted next, and whether the one after it is read
    __threadfence();
    for (uint32_t seen = peek(word);;) {
      const uint32_t next = seen / 2, waits = seen % 2;
      const uint32_t n = chunk == next ? 1 + waits : 0;
      const uint32_t before = atomicCAS(word, seen, n ? (next + n) * 2 : seen + 1);
      if (before == seen) {
        __threadfence();
        return n;
      }
      seen = before;
    }
  }
  EPT_DEVICE void grant(uint32_t r) const {
    if (r == t.rank) {
      Hardware::add_release_system(t.words[r] + grant_index(phase), 1);
      return;
    }
    const device::Put put =
        device::put(device::Thread(), t.paths[r], nullptr, 0, 0, grant_index(phase), device::deadline_in(t.timeout_ns));
    if (put.code != EPT_OK)
      raise_fault(t, uint32_t(-put.code), half, int32_t(r), kPost, generation, 0, uint64_t(-put.code));
  }

  EPT_DEVICE Led lead_one(uint32_t r) {
    uint32_t leading = from_lane(peek(&s.leading[r]), 0);
    if (leading == kAllIn) return Led::kNothing;
    const uint32_t chunk = from_lane(peek(&s.chunk[r]), 0);
    bool moved = false;
    if (leading == kNextAway) {
      const uint32_t here =
          lane_id() == 0 ? device::reached(Hardware::acquire_system(word(r, chunk)), target(r, chunk)) : 0;
      if (!from_lane(here, 0)) return Led::kNothing;
      if (chunk == 0 && !kind.first(r)) return Led::kFaulted;
      if (!look(r, chunk)) return Led::kFaulted;
      __syncwarp();
      if (lane_id() == 0 && chunk == 0) lend(&w.begun[r], 1);
      show(&s.leading[r], kNextIn);
      moved = true;
    }
    if (chunk == 0 && !discards && !kind.may_place(r)) return moved ? Led::kMoved : Led::kNothing;
    const uint32_t slot = r * 2 + chunk % 2;
    const uint32_t from = peek(&w.first[slot]) - 1, to = from + peek(&w.count[slot]);
    if (!discards && !kind.place(r, chunk_at(r, chunk) + kind.header_bytes(), from, to)) return Led::kFaulted;
    __syncwarp();
    const uint32_t last = from_lane(peek(&w.last[slot]), 0);
    if (lane_id() == 0) {
      w.chunks[r] = chunk + 1;
      lend(&w.ready[r], to);
      if (discards) end_chunk(r, slot);
    }
    __syncwarp();
    if (lane_id() == 0) s.chunk[r] = chunk + 1;
    show(&s.leading[r], last ? kAllIn : kNextAway);
    return Led::kMoved;
  }

  // May that chunk be believed? The whole warp.
  EPT_DEVICE bool look(uint32_t r, uint32_t chunk) {
    uint32_t good = 1;
    if (lane_id() == 0) {
      const ept_moe_header h = get_header(chunk_at(r, chunk));
      const Region region = kind.region(r);
      const uint32_t last = h.flags & EPT_MOE_LAST;
      const uint64_t first = chunk == 0 ? 0 : lent(&w.ready[r]), after = first + h.rows;
      const uint64_t room = chunk == 0 && last ? region.bytes : position(region, 0).bytes;
      uint32_t wrong = 0;
      if (h.magic != EPT_MOE_MAGIC || h.version != EPT_WIRE_VERSION) wrong = 1;
      if (!wrong && (h.phase != phase || h.source != r || h.lane != t.lane || h.chunk != chunk)) wrong = 3;
      if (!wrong && h.generation != generation) wrong = 4;
      if (!wrong && chunk && h.row_bytes != s.row_bytes[r]) wrong = 7;
      if (!wrong && (h.total_rows != w.total[r] || after > h.total_rows || (!last && h.rows == 0))) wrong = 8;
      if (!wrong && (h.rows ? kind.header_bytes() + uint64_t(h.rows) * h.row_bytes : 0) > room) wrong = 8;
      if (wrong)
        refuse_header(t, half, r, generation, 0, wrong);
      else if (last && after < h.total_rows)
        raise_fault(t, uint32_t(-EPT_E_CLOSED), half, int32_t(r), kCut, generation, h.total_rows, after);
      else if (!last && after == h.total_rows)
        refuse_header(t, half, r, generation, 0, 8);
      s.row_bytes[r] = h.row_bytes;
      const uint32_t slot = r * 2 + chunk % 2;
      w.count[slot] = h.rows;
      w.last[slot] = last;
      w.number[slot] = chunk;
      *const_cast<volatile uint32_t *>(&w.first[slot]) = uint32_t(first) + 1;
      good = fault_of(t) == 0;
    }
    return from_lane(good, 0) != 0;
  }

  const LaneTable &t;
  Kind &kind;
  const uint32_t half, phase;
  const uint64_t generation;
  const InShared &s;
  const ChunkState &w;
  const bool discards;
  uint64_t deadline;
};

}  // namespace ept::moe::cuda
