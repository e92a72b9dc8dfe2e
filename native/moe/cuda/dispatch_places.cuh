// SPDX-License-Identifier: Apache-2.0
//
// dispatch_places.cuh: where rows that came go.
//
// Places are the CPU executor's: by source rank, then row, then k. So `rows` and `masked` begin with a source when the
// headers of those before it are in, `by_rank` at once, `contiguous` when all are.
//
// Places in groups of experts. Where a source's rows of an expert begin follows from the headers; how many of them
// stand before a row, it says itself (its ordinals, wire.h). So any warp finds the places of any row, whatever others
// do. No place leaves its expert's group: an ordinal is below the count that the header gave, and a place is below the
// end of a group that doesn't grow (MASKED). A source that says an ordinal twice spoils rows of its own.
#pragma once

#include "moe/cuda/dispatch_headers.cuh"
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
        at_first(args.lane, EPT_PHASE_DISPATCH),
        generation(at_first.state.received(EPT_PHASE_DISPATCH)),
        membership(at_first.state.membership(EPT_PHASE_DISPATCH)),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        local(fixed_or(EPT_FIXED_LOCAL, args.object.local)),
        leading(args.leading.by),
        per_expert(args.layout == kContiguous || args.layout == kMasked),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16) {}

 protected:
  // A source's rows are dealt to the blocks in turn, of each source from another block on: so which are a block's is
  // known before the header says how many there are. A row is copied in so many pieces, as if all sources had as many
  // rows as this one: in as few as keep all warps at work where the copy engine has the work of bytes (8 ranks x 16:
  // 45.5 us for 47.9 in halves). Divisions are slow: a lane each makes those of a number of rows, while the header
  // comes.
  EPT_DEVICE uint32_t first_of(uint32_t source) const {
    const uint32_t turned = source * a.turn, turn = turned - a.blocks.of(turned) * gridDim.x;
    return blockIdx.x >= turn ? blockIdx.x - turn : blockIdx.x + gridDim.x - turn;
  }
  // The pieces of a row, of sources that have so many for a block.
  EPT_DEVICE Divisor cut_for(uint32_t rows) const {
    return divisor(parts_of(rows, warps(), vectors, has_copies() ? 1 : 4, kPair));
  }
  // `cut`: a lane's, for one row more than there are lanes before it.
  EPT_DEVICE void share(uint32_t source, const char *there, Divisor cut) const {
    const uint32_t rows = at_least(a.blocks.of(s.rows[source] * world + gridDim.x - 1), 1);
    cut = {from_lane(cut.by, (rows - 1) % kWarp), from_lane(cut.inverse, (rows - 1) % kWarp)};
    if (rows > kWarp) cut = cut_for(rows);
    if (lane_id() != 0) return;
    const uint32_t first = first_of(source);
    const uint32_t each = a.blocks.of(s.rows[source]), more = s.rows[source] - each * gridDim.x;
    SourceRun &run = s.runs[source];
    run.first = first;
    run.step = gridDim.x;
    run.rows = each + (first < more ? 1 : 0);
    run.parts = cut;
    find_rows(source, there);
  }
  EPT_DEVICE void find_rows(uint32_t source, const char *there) const {
    s.runs[source].from = is_listed(source) ? there + message_of(source) + object.shape.dispatch_header()
                                            : s.sources.message[source] + ept_dispatch_header_bytes(local);
  }
  EPT_DEVICE uint64_t message_of(uint32_t source) const {
    return dispatch_place(t, object.shape, uint32_t(generation & 1), source).offset;
  }
  EPT_DEVICE bool is_listed(uint32_t source) const { return s.runs[source].flags & EPT_MOE_LISTED; }
  EPT_DEVICE const uint32_t *list_of(uint32_t source) const {
    if (source == t.rank) return a.routing.own;
    return reinterpret_cast<const uint32_t *>(s.sources.message[source] + ept_dispatch_header_bytes(local));
  }
  // What would be the first kListed of this block's numbers: anything where there are fewer, or rows and no list.
  EPT_DEVICE uint32_t first_listed(uint32_t source) const {
    const uint32_t j = first_of(source) + lane_id() * gridDim.x;
    return lane_id() < kListed && j < object.max_tokens ? list_of(source)[j] : 0;
  }
  // Of the nth row of this block's run. A rank whose own messages aren't listed may still be sent lists: by those that
  // came to map it later.
  EPT_DEVICE uint32_t number_of(uint32_t source, uint32_t nth) const {
    const SourceRun &run = s.runs[source];
    return t.lists && nth < kListed ? run.numbers[nth] : list_of(source)[run.first + nth * run.step];
  }
  EPT_DEVICE bool is_weighed(uint32_t source) const { return !(s.runs[source].flags & EPT_MOE_NO_WEIGHTS); }
  EPT_DEVICE uint32_t units(uint32_t source) const { return s.runs[source].rows * s.runs[source].parts.by; }

  // Where the source's rows of each expert begin, where the headers are in that this needs; returns the rows of all
  // groups (CONTIGUOUS).
  EPT_DEVICE uint64_t groups(uint32_t source) const {
    const bool packed = a.layout == kContiguous;
    if (!packed && source == 0) return 0;  // place_of knows
    uint32_t base = 0;
    EPT_ROLLED
    for (uint32_t first = 0; first < local; first += kWarp) {
      const uint32_t e = first + lane_id();
      uint32_t before = 0, all = 0;
      EPT_ROLLED
      for (uint32_t r = 0; r < (packed ? world : source) && e < local; r++) {
        const uint32_t n = s.counts[r * local + e];
        if (r < source) before += n;
        all += n;
      }
      uint32_t begin = e * leading;
      if (packed) {
        const uint32_t padded = aligned(all), upto = warp_prefix(padded);
        begin = base + upto - padded;
        base += from_lane(upto, kWarp - 1);
      }
      if (e < local) s.groups[source * local + e] = begin + before;
    }
    __syncwarp();
    return base;
  }
  // Rows of an expert, with what pads them in the layout `contiguous`.
  EPT_DEVICE uint32_t aligned(uint32_t rows) const {
    return a.layout == kContiguous ? (rows + object.alignment - 1) / object.alignment * object.alignment : rows;
  }

  // Of a pair without a row in the output.
  static constexpr int32_t kNoPlace = -1, kRefused = -2;
  // One of a row's pairs.
  struct Pair {
    int32_t expert = -1;
    uint32_t ordinal = 0;
    float weight = 1.0f;
  };
  EPT_DEVICE Pair pair_of(uint32_t source, const char *row, uint32_t k) const {
    Pair its;
    its.expert = reinterpret_cast<const int32_t *>(row + ept_row_experts(object.payload, a.scale_bytes))[k];
    its.ordinal = reinterpret_cast<const uint32_t *>(row + ept_row_ordinals(object.payload, a.scale_bytes, top_k))[k];
    if (is_weighed(source))
      its.weight = reinterpret_cast<const float *>(row + ept_row_weights(object.payload, a.scale_bytes, top_k))[k];
    if (!is_listed(source)) return its;
    // For all ranks: of the pairs only this rank's are its business.
    const auto where = uint32_t(its.expert);
    if (where >> 16 != t.rank) return {-1, 0, is_weighed(source) ? 0.0f : 1.0f};
    its.expert = int32_t(where & 0xffff);
    return its;
  }
  // Its row in the output; negative: it has none, or says what can't be, which faults the lane.
  EPT_DEVICE int32_t place_of(uint32_t source, const Pair &pair) const {
    if (pair.expert == -1) return kNoPlace;
    const auto expert = uint32_t(pair.expert), group = source * local + expert;
    if (expert >= local) return refuse(source, kRow, local, expert);
    if (pair.ordinal >= s.counts[group]) return refuse(source, kRow, s.counts[group], pair.ordinal);
    const bool bounded = a.layout == kMasked;
    const uint32_t own = expert * leading, begin = bounded && source == 0 ? own : s.groups[group];
    const uint32_t place = begin + pair.ordinal;
    if (bounded && place - own >= leading) return refuse(source, kRoom, begin - own + s.counts[group], leading);
    return int32_t(place);
  }
  EPT_DEVICE int32_t refuse(uint32_t source, uint32_t what, uint32_t expected, uint32_t seen) const {
    raise_fault(t, uint32_t(what == kRoom ? -EPT_E_CAPACITY : -EPT_E_MISMATCH), kDispatchRecv, int32_t(source), what,
                generation, expected, seen);
    return kRefused;
  }
  // What combine must know of pair k of the source's row j.
  EPT_DEVICE void keep_place(uint32_t source, uint32_t j, uint32_t k, int32_t place, const Pair &pair) const {
    const uint64_t at = (uint64_t(s.runs[source].begin) + j) * top_k + k;
    a.routing.place[at] = place;
    a.routing.row_weights[at] = place < 0 ? 0.0f : pair.weight;
  }

  const DispatchRecv &a;
  const LaneTable &t;
  const RecvShared &s;
  const ObjectTable &object;
  const AtFirst at_first;
  const uint64_t generation;
  const uint32_t membership, world, top_k, local;
  const uint32_t leading;  // rows of all outputs fit 32 bits: the host has seen to it
  const bool per_expert;
  const uint32_t row_bytes, vectors;
};

}  // namespace ept::moe::cuda
