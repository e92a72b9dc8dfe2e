// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv.cuh: rows that came, into a layout.
//
// Places are the CPU executor's: by source rank, then row, then k. So `rows` and `masked` begin with a source when the
// headers of those before it are in, `by_rank` at once, `contiguous` when all are.
//
// Places in groups of experts: a block owns a run of each source's rows. How many rows of each expert stand before that
// run needs no order, so all warps count them, a row a lane, by atomics in shared memory. The run itself one warp goes
// through, 32 (row, k) at a time: those of one expert find each other by a match, and the first of them moves the
// expert's cursor on. No place leaves its expert's group: the cursor of a source never passes the count that its header
// gave, nor the end of a group that doesn't grow (MASKED), and the block that owns a source's last rows sees that it
// ends there.
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/counts.h"
#include "moe/cuda/formats.cuh"
#include "moe/cuda/shared.h"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

constexpr int32_t kRows = 0, kByRank = 1, kContiguous = 2, kMasked = 3;  // ept_layout

// Reads the header and the counts of a source that has come. The whole warp. False: the lane is faulted.
EPT_DEVICE bool read_dispatch_header(const LaneTable &t, const ObjectTable &object, uint32_t half, uint64_t generation,
                                     uint32_t membership, uint32_t source, uint32_t scale_bytes, int32_t payload_format,
                                     int32_t scale_format, const RecvShared &s, bool tells = blockIdx.x == 0) {
  const char *at = s.sources.in[source] + t.map.recv(EPT_PHASE_DISPATCH, uint32_t(generation & 1)) +
                   object.shape.dispatch_region(source).offset;
  uint32_t sum = 0;
  __syncwarp();
  const uint32_t word = header_word(at);  // under way with the counts
  constexpr uint32_t kTogether = 8;       // loads under way
  for (uint32_t base = 0; base < object.local; base += kTogether * kWarp) {
    uint32_t n[kTogether];
    EPT_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      const uint32_t e = base + i * kWarp + lane_id();
      n[i] = e < object.local ? reinterpret_cast<const uint32_t *>(at + EPT_MOE_HEADER_BYTES)[e] : 0;
    }
    EPT_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      const uint32_t e = base + i * kWarp + lane_id();
      if (e < object.local) s.counts[source * object.local + e] = n[i];
      sum += n[i] < (1u << 30) ? n[i] : 1u << 30;  // so that no sum of a peer's making wraps round
    }
  }
  sum = warp_sum(sum >> 5) * 32 + warp_sum(sum & 31);
  const ept_moe_header h = header_of(word);
  uint32_t wrong = 0;
  if (lane_id() == 0) {
    const uint64_t row = ept_row_bytes(object.payload, scale_bytes, object.top_k);
    wrong = check_header(t, object, EPT_PHASE_DISPATCH, generation, membership, source, h, row, object.max_tokens);
    if (!wrong && h.rows &&
        (h.scale_bytes != scale_bytes || h.payload_format != uint32_t(payload_format) ||
         (scale_bytes && h.scale_format != uint32_t(scale_format))))
      wrong = 9;
    if (!wrong && sum > uint64_t(h.total_rows) * object.top_k) wrong = 10;
    if (!wrong && (h.combine_offset % kAlign || h.combine_capacity < EPT_MOE_HEADER_BYTES ||
                   h.combine_offset > object.shape.combine_recv() ||
                   h.combine_capacity > object.shape.combine_recv() - h.combine_offset))
      wrong = 11;
    if (wrong) refuse_header(t, half, source, generation, 0, wrong);
    if (!wrong) hear(t, source, h, tells);
    s.rows[source] = h.total_rows;
    s.return_at[source] = h.combine_offset;
    s.flags[source] = h.flags;
  }
  return from_lane(wrong, 0) == 0;
}

class DispatchReceiver {
 public:
  EPT_DEVICE DispatchReceiver(const DispatchRecv &args, const RecvShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        generation(args.lane.state->received[EPT_PHASE_DISPATCH]),
        membership(args.lane.state->membership[EPT_PHASE_DISPATCH]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        local(fixed_or(EPT_FIXED_LOCAL, args.object.local)),
        leading(uint32_t(args.leading)),
        per_expert(args.layout == kContiguous || args.layout == kMasked),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16) {}

  EPT_DEVICE void run() {
    note(t, kDispatchRecv, 0);
    const uint32_t fault = fault_of(t);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows[r] = s.begin[r] = 0;
      s.runs[r] = {0, 0, 1};
      s.next[r] = s.to_count[r] = s.counted[r] = 0;
    }
    look_up(t, EPT_PHASE_DISPATCH, generation, s.sources);
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
    const bool all = !taking(t, EPT_PHASE_DISPATCH).out;
    for (uint32_t i = threadIdx.x; i < world * local; i += blockDim.x) {
      s.cursor[i] = 0;
      if (!all) s.counts[i] = 0;  // of a rank that takes no part nobody else writes them
    }
    for (uint32_t r = threadIdx.x; r < world && !all; r += blockDim.x) s.return_at[r] = 0;
    if (!is_faulted(fault)) receive();
    note(t, kDispatchRecv, 3);
    const bool last = last_block(t, kDispatchRecv, s.word);
    if (last) {
      const uint32_t met = fault_of(t);
      if (met) blank_all();
      if (a.mirror && warp_id() == 0) mirror(met);
      end_half(t, kDispatchRecv, &t.state->received[EPT_PHASE_DISPATCH], generation);
    }
    note(t, kDispatchRecv, 5);
  }

  EPT_DEVICE void receive() {
    note(t, kDispatchRecv, 1);
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, *this);
    note(t, kDispatchRecv, 2);
    const bool whole = work_as_they_come(
        t, s.sources.standing, s.next, [&](uint32_t source) { help(source); }, [&] { add_up(); },
        [&](uint32_t source) { return units(source); },
        [&](uint32_t source, uint32_t unit) {
          copy(source, unit);
          note_source(t, EPT_PHASE_DISPATCH, source, true);
        });
    note(t, kDispatchRecv, 4);
    if (whole) blanks();
  }

  // Outputs as if nothing had come: what a faulted lane gives. One block.
  EPT_DEVICE void blank_all() const {
    const uint64_t first = threadIdx.x, step = blockDim.x;
    const uint64_t rows = uint64_t(leading) * a.outer, per_row = vectors;
    for (uint64_t i = first; i < rows * per_row && a.x.data; i += step)
      store16(a.x.at(i / per_row) + i % per_row * 16, Vector{});
    for (uint64_t row = first; row < rows; row += step) {
      blank(row);
      for (uint32_t i = 0; a.scales.data && i * a.scale_size < a.scale_bytes; i++)
        for (uint32_t b = 0; b < a.scale_size; b++) a.scales.at(row)[i * a.scales.column + b] = 0;
    }
    for (uint64_t e = first; e <= local; e += step) {
      if (a.counts && e < local) a.counts[e] = 0;
      if (a.offsets) a.offsets[e] = 0;
    }
    if (first == 0) *a.num_rows = 0;
    for (uint64_t r = first; r <= world; r += step) a.routing.begin[r] = 0;
  }

  // By one warp of the last block, whose own sums are there where the lane has no fault.
  EPT_DEVICE void mirror(uint32_t met) const {
    const uint64_t epoch = object.mirrored[t.lane] + 1;
    Counts *to = a.mirror->slot(epoch, local);
    auto *counts = reinterpret_cast<int32_t *>(to + 1);
    for (uint32_t e = lane_id(); e < local; e += kWarp) counts[e] = met ? 0 : int32_t(s.sums[e]);
    __syncwarp();
    if (lane_id() != 0) return;
    to->ticket = a.ticket;
    to->rows = met ? 0 : int32_t(a.layout == kContiguous ? s.starts[local] : s.begin[world]);
    to->fault = int32_t(met);
    object.mirrored[t.lane] = epoch;
    Hardware::release_system(&a.mirror->epoch, epoch);
  }

  // ---- what the scouts ask ----

  EPT_DEVICE bool header(uint32_t source) {
    if (blockIdx.x == 0) note_source(t, EPT_PHASE_DISPATCH, source, false);
    if (!read_dispatch_header(t, object, kDispatchRecv, generation, membership, source, a.scale_bytes, a.payload_format,
                              a.scale_format, s))
      return false;
    __syncwarp();
    share(source);
    __syncwarp();
    foresee(source);
    return true;
  }

  EPT_DEVICE bool may_begin(uint32_t source) const {
    if (a.layout == kByRank) return true;
    if (per_expert) {
      help(source);
      const uint32_t counted = from_lane(peek(&s.counted[source]), 0);
      __threadfence_block();
      if (counted != groups_before(source)) return false;
    }
    const uint32_t until = a.layout == kContiguous ? world : source;
    uint32_t lacks = 0;
    for (uint32_t r = lane_id(); r < until; r += kWarp)
      if (r != source && peek(&s.sources.standing[r]) == kAway) lacks = 1;
    const bool may = __ballot_sync(kAll, int(lacks)) == 0;
    __threadfence_block();  // their headers were written before they were shown
    return may;
  }

  EPT_DEVICE bool begin(uint32_t source) {
    uint64_t needed = s.rows[source];
    if (a.layout != kByRank) {
      uint32_t before = 0;
      for (uint32_t r = lane_id(); r < source; r += kWarp) before += s.rows[r];
      before = warp_sum(before);
      if (lane_id() == 0) s.begin[source] = before;
      if (a.layout == kRows) needed += before;
    }
    __syncwarp();
    if (a.layout == kContiguous) needed = groups(source);
    if (a.layout == kMasked) needed = 0;  // place by place, in index()
    if (needed > leading) {
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(source), kRoom, generation, needed, leading);
      return false;
    }
    return !per_expert || index(source);
  }

 protected:
  // A source's rows are dealt to the blocks by runs. Some are longer by one, of each source at other blocks. A row is
  // copied in so many pieces, as if all sources had as many rows as this one. Divisions are slow: one warp makes them,
  // once.
  EPT_DEVICE void share(uint32_t source) const {
    if (lane_id() != 0) return;
    const uint32_t turn = source * (gridDim.x / world + 1) % gridDim.x;
    const uint32_t number = blockIdx.x >= turn ? blockIdx.x - turn : blockIdx.x + gridDim.x - turn;
    const uint32_t each = s.rows[source] / gridDim.x, more = s.rows[source] - each * gridDim.x;
    const uint32_t first = number * each + (number < more ? number : more);
    s.runs[source] = {first, first + each + (number < more ? 1 : 0),
                      parts_of((s.rows[source] * world + gridDim.x - 1) / gridDim.x, warps(), vectors, 4)};
  }
  EPT_DEVICE BlockRun run_of(uint32_t source) const { return s.runs[source]; }
  EPT_DEVICE uint32_t units(uint32_t source) const {
    const BlockRun run = run_of(source);
    return (run.end - run.first) * run.parts;
  }
  // Rows before this block's run are counted in groups of a row a lane, so that several warps have some.
  static constexpr uint32_t kCounted = kWarp;
  EPT_DEVICE uint32_t groups_before(uint32_t source) const { return (run_of(source).first + kCounted - 1) / kCounted; }

  // What index() will read first comes while rows before it are counted.
  EPT_DEVICE void foresee(uint32_t source) const {
    if (!per_expert) return;
    const BlockRun run = run_of(source);
    const uint32_t j = run.first + lane_id();
    if (j >= run.end) return;
    const char *row = rows_of(source) + uint64_t(j) * row_bytes;
    prefetch(row + ept_row_experts(object.payload, a.scale_bytes));
    prefetch(row + ept_row_weights(object.payload, a.scale_bytes, top_k));
  }
  // Counts what is left to count of a source whose header is in. Any warp.
  EPT_DEVICE void help(uint32_t source) const {
    if (!per_expert) return;
    const uint32_t until = run_of(source).first, n = groups_before(source);
    for (;;) {
      uint32_t group = n;
      if (lane_id() == 0 && peek(&s.to_count[source]) < n) group = atomicAdd(&s.to_count[source], 1u);
      group = from_lane(group, 0);
      if (group >= n) break;
      count_rows(source, group * kCounted + lane_id(), until);
      __syncwarp();
      __threadfence_block();
      if (lane_id() == 0) atomicAdd(&s.counted[source], 1u);
    }
  }
  // Row j, if it is below `until`.
  EPT_DEVICE void count_rows(uint32_t source, uint32_t j, uint32_t until) const {
    constexpr uint32_t kTogether = 8;
    const auto *experts = reinterpret_cast<const int32_t *>(rows_of(source) + uint64_t(j) * row_bytes +
                                                            ept_row_experts(object.payload, a.scale_bytes));
    for (uint32_t base = 0; base < top_k; base += kTogether) {
      int32_t expert[kTogether];
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++) expert[i] = base + i < top_k && j < until ? experts[base + i] : -1;
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++)  // what is no expert of ours, the block whose row it is will tell
        if (uint32_t(expert[i]) < local) atomicAdd(&s.cursor[source * local + uint32_t(expert[i])], 1u);
    }
  }
  EPT_DEVICE const char *rows_of(uint32_t source) const {
    return s.sources.in[source] + t.map.recv(EPT_PHASE_DISPATCH, uint32_t(generation & 1)) +
           object.shape.dispatch_region(source).offset + ept_dispatch_header_bytes(local);
  }

  // CONTIGUOUS, where all headers are in: where the source's rows of each expert begin; returns the rows of all groups.
  EPT_DEVICE uint64_t groups(uint32_t source) const {
    uint32_t base = 0;
    for (uint32_t first = 0; first < local; first += kWarp) {
      const uint32_t e = first + lane_id();
      uint32_t before = 0, all = 0;
      for (uint32_t r = 0; r < world && e < local; r++) {
        const uint32_t n = s.counts[r * local + e];
        if (r < source) before += n;
        all += n;
      }
      const uint32_t padded = aligned(all), upto = warp_prefix(padded);
      if (e < local) s.groups[source * local + e] = base + upto - padded + before;
      base += from_lane(upto, kWarp - 1);
    }
    __syncwarp();
    return base;
  }
  // Where the source's rows of an expert begin, and how many of that expert stand before them in its group (MASKED; in
  // CONTIGUOUS groups() has seen that there is room).
  struct Group {
    uint32_t begin, before;
  };
  EPT_DEVICE Group group_of(uint32_t source, uint32_t expert) const {
    if (a.layout == kContiguous) return {s.groups[source * local + expert], 0};
    uint32_t before = 0;
    for (uint32_t r = 0; r < source; r++) before += s.counts[r * local + expert];
    return {expert * leading + before, before};
  }

  // Rows of an expert, with what pads them in the layout `contiguous`.
  EPT_DEVICE uint32_t aligned(uint32_t rows) const {
    return a.layout == kContiguous ? (rows + object.alignment - 1) / object.alignment * object.alignment : rows;
  }

  // Places of this block's run.
  EPT_DEVICE bool index(uint32_t source) const {
    const BlockRun run = run_of(source);
    return index(source, rows_of(source), run);
  }
  // Of those of the source's rows; `rows`: where its first one would be, were all in one piece.
  EPT_DEVICE bool index(uint32_t source, const char *rows, const BlockRun &run) const {
    const uint64_t experts_at = ept_row_experts(object.payload, a.scale_bytes);
    const uint64_t weights_at = ept_row_weights(object.payload, a.scale_bytes, top_k);
    const bool weighed = !(s.flags[source] & EPT_MOE_NO_WEIGHTS);
    uint32_t *cursor = s.cursor + source * local;
    const uint64_t kept = uint64_t(s.begin[source]) * top_k;
    const bool bounded = a.layout == kMasked;
    uint32_t wrong = 0, needed = 0;
    // One after another is only who comes first in a group: loads of kTogether rounds are under way together.
    constexpr uint32_t kTogether = 4;
    for (uint32_t base = run.first * top_k; base < run.end * top_k; base += kTogether * kWarp) {
      int32_t expert[kTogether];
      float weight[kTogether];
      EPT_UNROLL
      for (uint32_t n = 0; n < kTogether; n++) {
        const uint32_t i = base + n * kWarp + lane_id();
        const char *row = rows + uint64_t(i / top_k) * row_bytes;
        const bool here = i < run.end * top_k;
        expert[n] = here ? reinterpret_cast<const int32_t *>(row + experts_at)[i % top_k] : -1;
        weight[n] = here && weighed ? reinterpret_cast<const float *>(row + weights_at)[i % top_k] : 1.0f;
      }
      EPT_UNROLL
      for (uint32_t n = 0; n < kTogether; n++) {
        const uint32_t i = base + n * kWarp + lane_id();
        if (i - lane_id() >= run.end * top_k) break;
        if (expert[n] != -1 && uint32_t(expert[n]) >= local) wrong = 1, expert[n] = -1;
        const uint32_t same = __match_any_sync(kAll, uint32_t(expert[n]));
        const uint32_t before = expert[n] >= 0 ? cursor[expert[n]] : 0;
        __syncwarp();
        if (expert[n] >= 0 && !(same & below())) cursor[expert[n]] = before + uint32_t(__popc(same));
        __syncwarp();
        if (i >= run.end * top_k) continue;
        int32_t place = -1;
        if (expert[n] >= 0) {
          const uint32_t own = before + uint32_t(__popc(same & below()));
          const uint32_t count = s.counts[source * local + uint32_t(expert[n])];
          const Group group = group_of(source, uint32_t(expert[n]));
          place = int32_t(group.begin + own);
          if (own >= count) wrong = 1;
          if (bounded && group.before + own >= leading) needed = group.before + count;
        }
        a.routing.place[kept + i] = place;
        if (i / top_k - run.first < s.kept) s.places[(source * s.kept - run.first) * top_k + i] = place;
        a.routing.row_weights[kept + i] = place < 0 ? 0.0f : weight[n];
      }
    }
    // At the source's end each cursor is at its limit: else a place would have no row.
    for (uint32_t e = lane_id(); e < local && run.end == s.rows[source]; e += kWarp)
      if (cursor[e] != s.counts[source * local + e]) wrong = 1;
    const uint32_t full = __ballot_sync(kAll, int(needed));
    if (full) {
      needed = from_lane(needed, uint32_t(__ffs(int(full)) - 1));
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(source), kRoom, generation, needed, leading);
      return false;
    }
    const uint32_t any = __ballot_sync(kAll, int(wrong));
    if (any && lane_id() == 0)
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, s.rows[source], any);
    return !any;
  }
  EPT_DEVICE void copy(uint32_t source, uint32_t unit) const {
    const BlockRun run = run_of(source);
    const uint32_t cut = run.parts, nth = unit / cut, part = unit - nth * cut, j = run.first + nth;
    const char *row = rows_of(source) + uint64_t(j) * row_bytes;
    const uint64_t number = uint64_t(s.begin[source]) + j;
    int32_t place = -1;
    if (per_expert) {
      const int32_t *places =
          nth < s.kept ? s.places + (source * s.kept + nth) * top_k : &a.routing.place[number * top_k];
      if (lane_id() < top_k) place = places[lane_id()];
    } else if (lane_id() == 0) {
      place = int32_t(a.layout == kByRank ? source * a.leading + j : number);
    }
    const uint32_t places = __ballot_sync(kAll, int(place >= 0));
    payload(row, place, places, part, cut);
    if (part == 0) rest(source, row, place, places);
  }

  EPT_DEVICE void payload(const char *row, int32_t place, uint32_t places, uint32_t part, uint32_t cut) const {
    if (!a.x.data) return;
    char *to = place >= 0 ? a.x.at(uint64_t(place)) : nullptr;
    const Span16 span = span_of(vectors, part, cut);
    uint32_t asked = span.from + lane_id(), v = asked;
    stream<1, false>(
        s.ring, places ? span.rounds() : 0,
        [&] {
          const char *here = asked < span.to ? row + asked * 16 : nullptr;
          asked += kWarp;
          return here;
        },
        [&](const Vector(&held)[1]) {
          for (uint32_t left = places; left; left &= left - 1) {
            char *there = from_lane(to, uint32_t(__ffs(int(left)) - 1));
            if (v < span.to) store16(there + v * 16, held[0]);
          }
          v += kWarp;
        });
  }

  // Scales, and who the row is of and for.
  EPT_DEVICE void rest(uint32_t source, const char *row, int32_t place, uint32_t places) const {
    const uint32_t token = *reinterpret_cast<const uint32_t *>(row + ept_row_token(object.payload, a.scale_bytes));
    const char *scales = row + ept_row_scales(object.payload);
    const auto *experts = reinterpret_cast<const int32_t *>(row + ept_row_experts(object.payload, a.scale_bytes));
    const auto *weights = reinterpret_cast<const float *>(row + ept_row_weights(object.payload, a.scale_bytes, top_k));
    const bool weighed = !(s.flags[source] & EPT_MOE_NO_WEIGHTS);
    int32_t expert = -1;
    float weight = 1.0f;
    if (lane_id() < top_k) {
      if (!per_expert) expert = experts[lane_id()];
      if (weighed) weight = weights[lane_id()];
    }
    if (token >= object.max_tokens && lane_id() == 0)
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, object.max_tokens,
                  token);
    if (a.scales.data) {
      if (a.scale_size == 4)
        scatter<uint32_t>(scales, place, places);
      else
        scatter<uint8_t>(scales, place, places);
    }
    // A place a lane.
    if (place >= 0 && a.source.data) {
      char *to = a.source.at(uint64_t(place));
      *reinterpret_cast<uint32_t *>(to) = source;
      *reinterpret_cast<uint32_t *>(to + a.source.column) = token;
    }
    if (per_expert) {
      if (place >= 0 && a.weights.data) *reinterpret_cast<float *>(a.weights.at(uint64_t(place))) = weight;
      return;
    }
    const auto at = uint64_t(uint32_t(from_lane(place, 0)));
    if (lane_id() >= top_k) return;
    if (expert < -1 || expert >= int32_t(local))
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, local,
                  uint32_t(expert));
    if (a.ids.data) *reinterpret_cast<int32_t *>(a.ids.at(at) + lane_id() * a.ids.column) = expert;
    if (a.weights.data)
      *reinterpret_cast<float *>(a.weights.at(at) + lane_id() * a.weights.column) =
          !weighed && expert < 0 ? 0.0f : weight;
  }
  // A row's scales to its places, by whole scales or by bytes of them.
  template <class T>
  EPT_DEVICE void scatter(const char *from, int32_t place, uint32_t places) const {
    const uint32_t count = a.scale_bytes / uint32_t(sizeof(T)), each = a.scale_size / uint32_t(sizeof(T));
    char *to = place >= 0 ? a.scales.at(uint64_t(place)) : nullptr;
    for (uint32_t base = 0; base < count; base += kWarp) {
      const uint32_t i = base + lane_id();
      const T value = i < count ? reinterpret_cast<const T *>(from)[i] : T(0);
      const int64_t offset = int64_t(i / each) * a.scales.column + i % each * uint32_t(sizeof(T));
      for (uint32_t left = places; left; left &= left - 1) {
        char *there = from_lane(to, uint32_t(__ffs(int(left)) - 1));
        if (i < count) *reinterpret_cast<T *>(there + offset) = value;
      }
    }
  }

  EPT_DEVICE void blank(uint64_t row) const {
    for (uint32_t i = 0; i < 2 && a.source.data; i++)
      *reinterpret_cast<int32_t *>(a.source.at(row) + i * a.source.column) = -1;
    for (uint32_t k = 0; k < (per_expert ? 1 : top_k); k++) {
      if (a.weights.data) *reinterpret_cast<float *>(a.weights.at(row) + k * a.weights.column) = 0.0f;
      if (a.ids.data && !per_expert) *reinterpret_cast<int32_t *>(a.ids.at(row) + k * a.ids.column) = -1;
    }
  }

  // All headers are in: counts, offsets, and what combine must know. One warp does it, while others have rows to copy.
  EPT_DEVICE void add_up() const {
    uint32_t mine = 0;
    if (lane_id() == 0 && peek(s.totals) == 0) mine = atomicCAS(s.totals, 0u, 1u) == 0;
    if (!from_lane(mine, 0)) return;
    __threadfence_block();  // headers were written before they were shown
    const bool tells = blockIdx.x == 0;
    for (uint32_t e = lane_id(); e < local; e += kWarp) {
      uint32_t n = 0;
      for (uint32_t r = 0; r < world; r++) n += s.counts[r * local + e];
      s.sums[e] = n;
      if (tells && a.counts) a.counts[e] = int32_t(n);
    }
    __syncwarp();
    const uint32_t rows = prefix(s.begin, world, [&](uint32_t r) { return s.rows[r]; });
    const uint32_t ends = prefix(s.starts, local, [&](uint32_t e) { return aligned(s.sums[e]); });
    if (lane_id() == 0) {
      s.begin[world] = rows;
      s.starts[local] = ends;
      if (tells) *a.num_rows = int32_t(a.layout == kContiguous ? ends : rows);
    }
    show(s.totals, 2);
    if (!tells) return;
    for (uint32_t r = lane_id(); r <= world; r += kWarp) a.routing.begin[r] = s.begin[r];
    for (uint32_t r = lane_id(); r < world; r += kWarp) a.routing.return_at[r] = s.return_at[r];
    for (uint32_t e = lane_id(); e <= local && a.offsets; e += kWarp) a.offsets[e] = int32_t(s.starts[e]);
  }
  // What stands where no row does. All warps, each when it has no row left to copy.
  EPT_DEVICE void blanks() const {
    while (from_lane(peek(s.totals), 0) != 2) EPT_REST();
    __threadfence_block();
    const uint32_t rows = leading * a.outer, step = gridDim.x * kWarp;
    for (;;) {
      uint32_t unit = 0;
      if (lane_id() == 0) unit = atomicAdd(s.next_blank, 1u);
      unit = from_lane(unit, 0);
      const uint64_t first = uint64_t(unit) * step + blockIdx.x * kWarp;
      if (first >= rows) return;
      const uint32_t row = uint32_t(first) + lane_id();
      if (row < rows && !filled(row)) blank(row);
      __syncwarp();
    }
  }
  // to[i]: what stands before i, of n. One warp; returns the sum of all.
  template <class Of>
  EPT_DEVICE uint32_t prefix(uint32_t *to, uint32_t n, Of of) const {
    uint32_t before = 0;
    for (uint32_t base = 0; base < n; base += kWarp) {
      const uint32_t i = base + lane_id(), value = i < n ? of(i) : 0, upto = warp_prefix(value);
      if (i < n) to[i] = before + upto - value;
      before += from_lane(upto, kWarp - 1);
    }
    return before;
  }
  EPT_DEVICE bool filled(uint32_t row) const {
    if (a.layout == kRows) return row < s.begin[world];
    if (a.layout == kByRank) return row % leading < s.rows[row / leading];
    if (a.layout == kMasked) return row % leading < s.sums[row / leading];
    if (row >= s.starts[local]) return false;
    uint32_t low = 0, high = local;  // the last group that begins at or before the row
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (s.starts[middle] <= row ? low : high) = middle;
    }
    return row - s.starts[low] < s.sums[low];
  }

  const DispatchRecv &a;
  const LaneTable &t;
  const RecvShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t membership, world, top_k, local;
  const uint32_t leading;  // rows of all outputs fit 32 bits: the host has seen to it
  const bool per_expert;
  const uint32_t row_bytes, vectors;
};

// Headers alone, by one block.
class Waiter {
 public:
  EPT_DEVICE Waiter(const DispatchWait &args, const RecvShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        generation(args.lane.state->received[EPT_PHASE_DISPATCH]),
        membership(args.lane.state->membership[EPT_PHASE_DISPATCH]) {}
  EPT_DEVICE bool header(uint32_t source) {
    return read_dispatch_header(t, a.object, kDispatchRecv, generation, membership, source, a.scale_bytes,
                                a.payload_format, a.scale_format, s);
  }
  EPT_DEVICE bool may_begin(uint32_t) const { return true; }
  EPT_DEVICE bool begin(uint32_t) const { return true; }
  EPT_DEVICE void run() {
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) s.rows[r] = 0;
    for (uint32_t i = threadIdx.x; i < t.world * a.object.local; i += blockDim.x) s.counts[i] = 0;
    look_up(t, EPT_PHASE_DISPATCH, generation, s.sources);
    __syncthreads();
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, *this);
    __syncthreads();
    if (threadIdx.x != 0) return;
    uint64_t sums[4] = {};
    const bool failed = fault_of(t) != 0;
    for (uint32_t r = 0; r < t.world && !failed; r++) {
      sums[0] += s.rows[r];
      sums[1] = at_least(sums[1], s.rows[r]);
    }
    for (uint32_t e = 0; e < a.object.local && !failed; e++) {
      uint64_t n = 0;
      for (uint32_t r = 0; r < t.world; r++) n += s.counts[r * a.object.local + e];
      sums[2] += align_up(n, a.object.alignment);
      sums[3] = at_least(sums[3], n);
    }
    for (uint32_t i = 0; i < 4; i++) a.arrival[i] = sums[i];
  }

 private:
  const DispatchWait &a;
  const LaneTable &t;
  const RecvShared &s;
  const uint64_t generation;
  const uint32_t membership;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_recv(EPT_ARGUMENT(ept::moe::cuda::DispatchRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local, args.object.top_k);
  DispatchReceiver(args, shared).run();
}

EPT_KERNEL moe_dispatch_wait(EPT_ARGUMENT(ept::moe::cuda::DispatchWait) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local, args.object.top_k);
  Waiter(args, shared).run();
}

// Each source's message of the phase's open generation is read and thrown away. One block.
EPT_KERNEL moe_drain(EPT_ARGUMENT(ept::moe::cuda::Drain) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  const LaneTable &t = args.lane;
  const uint64_t generation = t.state->received[args.phase];
  const uint32_t half = args.phase == EPT_PHASE_DISPATCH ? kDispatchRecv : kCombineRecv;
  const uint64_t deadline = ept::device::deadline_in(t.timeout_ns);
  const Taking members = taking(t, args.phase);
  for (uint32_t source = threadIdx.x; source < t.world; source += blockDim.x)
    while (members.has(source) && !has_arrived(t, source, args.phase, generation) &&
           may_wait(t, half, args.phase, generation, source, deadline)) {}
  for (uint32_t source = threadIdx.x; source < t.world && t.acks; source += blockDim.x)
    if (members.has(source) && has_arrived(t, source, args.phase, generation))
      hear(t, source, landed(t, args.phase, generation, source));
  __syncthreads();
  if (threadIdx.x == 0) t.state->received[args.phase] = generation + 1;
}

// One block, while no other kernel of the lane runs.
EPT_KERNEL moe_take_members(EPT_ARGUMENT(ept::moe::cuda::TakeMembers) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  const LaneTable &t = args.lane;
  for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x)
    t.out[kNext * t.world + r] = uint8_t(args.out[r / 64] >> r % 64 & 1);
  if (threadIdx.x != 0) return;
  const uint32_t before = t.state->membership[kNext];
  t.state->membership[kNext] = args.membership;
  if (args.code)
    raise_fault(t, args.code, kCombineSend, args.peer, kMembers, t.state->sent[EPT_PHASE_COMBINE], before,
                args.membership);
}
