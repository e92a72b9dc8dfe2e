// SPDX-License-Identifier: Apache-2.0
//
// dispatch_places.cuh: where rows that came go.
//
// Places are the CPU executor's: by source rank, then row, then k. So `rows` and `masked` begin with a source when the
// headers of those before it are in, `by_rank` at once, `contiguous` when all are.
//
// Places in groups of experts: a block owns a run of each source's rows. How many rows of each expert stand before that
// run needs no order, so all warps count them, a (row, k) a lane, by atomics in shared memory. The run itself one warp
// goes through, 32 (row, k) at a time: those of one expert find each other by a match, and the first of them moves the
// expert's cursor on. No place leaves its expert's group: the cursor of a source never passes the count that its header
// gave, nor the end of a group that doesn't grow (MASKED), and the block that owns a source's last rows sees that it
// ends there.
#pragma once

#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

constexpr int32_t kRows = 0, kByRank = 1, kContiguous = 2, kMasked = 3;  // ept_layout

class DispatchPlaces {
 public:
  EPT_DEVICE DispatchPlaces(const DispatchRecv &args, const RecvShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        generation(args.lane.state->received[EPT_PHASE_DISPATCH]),
        membership(args.lane.state->membership[EPT_PHASE_DISPATCH]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        local(fixed_or(EPT_FIXED_LOCAL, args.object.local)),
        leading(args.leading.by),
        wide(args.object.top_k > 16  ? 5
             : args.object.top_k > 8 ? 4
             : args.object.top_k > 4 ? 3
                                     : 2),
        per_expert(args.layout == kContiguous || args.layout == kMasked),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16) {}

 protected:
  // A source's rows are dealt to the blocks by runs. Some are longer by one, of each source at other blocks. A row is
  // copied in so many pieces, as if all sources had as many rows as this one. Divisions are slow: one warp makes them,
  // once.
  EPT_DEVICE void share(uint32_t source) const {
    if (lane_id() != 0) return;
    const uint32_t turned = source * a.turn, turn = turned - a.blocks.of(turned) * gridDim.x;
    const uint32_t number = blockIdx.x >= turn ? blockIdx.x - turn : blockIdx.x + gridDim.x - turn;
    const uint32_t each = a.blocks.of(s.rows[source]), more = s.rows[source] - each * gridDim.x;
    const uint32_t first = number * each + (number < more ? number : more);
    s.runs[source] = {
        first, first + each + (number < more ? 1 : 0),
        divisor(parts_of(a.blocks.of(s.rows[source] * world + gridDim.x - 1), warps(), vectors, 4, kPair))};
  }
  EPT_DEVICE BlockRun run_of(uint32_t source) const { return s.runs[source]; }
  EPT_DEVICE uint32_t units(uint32_t source) const {
    const BlockRun run = run_of(source);
    return (run.end - run.first) * run.parts.by;
  }
  // A row's (row, k) pairs have 2^wide lanes, so that those of several rows are read together, and in order.
  EPT_DEVICE uint32_t rows_together() const { return kWarp >> wide; }
  EPT_DEVICE uint32_t row_of_lane() const { return lane_id() >> wide; }
  EPT_DEVICE uint32_t k_of_lane() const { return lane_id() & ((1u << wide) - 1); }
  // Rows before this block's run are counted in groups of kCounted reads of a warp, so that several warps have some.
  static constexpr uint32_t kCounted = 8;
  EPT_DEVICE uint32_t groups_before(uint32_t source) const {
    const uint32_t of_group = kCounted * rows_together();  // a power of two
    return (run_of(source).first + of_group - 1) >> (8 - wide);
  }

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
      count_rows(source, group * kCounted * rows_together(), until);
      __syncwarp();
      __threadfence_block();
      if (lane_id() == 0) atomicAdd(&s.counted[source], 1u);
    }
  }
  // A group of rows from `first` on, those below `until`.
  EPT_DEVICE void count_rows(uint32_t source, uint32_t first, uint32_t until) const {
    uint32_t j = first + row_of_lane();
    const char *at =
        rows_of(source) + uint64_t(j) * row_bytes + ept_row_experts(object.payload, a.scale_bytes) + k_of_lane() * 4;
    const uint64_t step = uint64_t(rows_together()) * row_bytes;
    uint32_t *cursor = s.cursor + source * local;
    int32_t expert[kCounted];
    EPT_UNROLL
    for (uint32_t i = 0; i < kCounted; i++, j += rows_together(), at += step)
      expert[i] = j < until && k_of_lane() < top_k ? *reinterpret_cast<const int32_t *>(at) : -1;
    EPT_UNROLL
    for (uint32_t i = 0; i < kCounted; i++)  // what is no expert of ours, the block whose row it is will tell
      if (uint32_t(expert[i]) < local) atomicAdd(&cursor[uint32_t(expert[i])], 1u);
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
    const bool bounded = a.layout == kMasked;
    uint32_t wrong = 0, needed = 0;
    // One round after another says who comes first in a group; what the next ones read is asked for before.
    constexpr uint32_t kAsked = 8;
    const uint64_t row_step = uint64_t(rows_together()) * row_bytes;
    uint32_t j = run.first + row_of_lane();
    const char *row = rows + uint64_t(j) * row_bytes;
    int32_t expert = -1;
    float weight = 1.0f;
    const auto ask = [&] {
      const bool here = j < run.end && k_of_lane() < top_k;
      expert = here ? reinterpret_cast<const int32_t *>(row + experts_at)[k_of_lane()] : -1;
      weight = here && weighed ? reinterpret_cast<const float *>(row + weights_at)[k_of_lane()] : 1.0f;
      if (j + kAsked * rows_together() < run.end && k_of_lane() < 2)
        prefetch(row + kAsked * row_step + (k_of_lane() ? weights_at : experts_at));
    };
    ask();
    EPT_ROLLED
    for (uint32_t base = run.first; base < run.end; base += rows_together()) {
      int32_t its = expert;
      const float its_weight = weight;
      const uint32_t number = j;
      j += rows_together(), row += row_step;
      ask();
      if (its != -1 && uint32_t(its) >= local) wrong = 1, its = -1;
      const uint32_t same = __match_any_sync(kAll, uint32_t(its));
      const uint32_t before = its >= 0 ? cursor[its] : 0;
      __syncwarp();
      if (its >= 0 && !(same & below())) cursor[its] = before + uint32_t(__popc(same));
      __syncwarp();
      if (number >= run.end || k_of_lane() >= top_k) continue;
      int32_t place = -1;
      if (its >= 0) {
        const uint32_t own = before + uint32_t(__popc(same & below()));
        const uint32_t count = s.counts[source * local + uint32_t(its)];
        const Group group = group_of(source, uint32_t(its));
        place = int32_t(group.begin + own);
        if (own >= count) wrong = 1;
        if (bounded && group.before + own >= leading) needed = group.before + count;
      }
      const uint32_t nth = number - run.first;
      if (nth < s.kept) s.places[(source * s.kept + nth) * top_k + k_of_lane()] = place;
      const uint64_t kept = (uint64_t(s.begin[source]) + number) * top_k + k_of_lane();
      a.routing.place[kept] = place;
      a.routing.row_weights[kept] = place < 0 ? 0.0f : its_weight;
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

  const DispatchRecv &a;
  const LaneTable &t;
  const RecvShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t membership, world, top_k, local;
  const uint32_t leading;  // rows of all outputs fit 32 bits: the host has seen to it
  const uint32_t wide;     // log2 of a row's lanes, where a (row, k) has one
  const bool per_expert;
  const uint32_t row_bytes, vectors;
};

}  // namespace ept::moe::cuda
