// SPDX-License-Identifier: Apache-2.0
//
// dispatch_plan.cuh: the routing scan of a dispatch: which rank each token of a block goes to, and as which of its
// rows. Each block scans all ids for itself (they are few, and no block then waits for another), and owns a run of
// tokens.
//
// A token's row number at rank r is the count of earlier tokens that go to r: by tiles of 32 tokens, a tile a warp, the
// tokens of a tile that go to r are one ballot. So numbers are the same in every block and on every run; and who packs
// a row counts them itself, since one more phase of all warps costs more than counting twice.
//
// An ordinal (wire.h) is counted in the same way: how many pairs of an expert stand before this block's tokens needs no
// order, so all warps count them, by atomics in shared memory; one warp goes through the block's own pairs.
#pragma once

#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

// Where an expert of a rank is that takes no part: no rank has this number.
constexpr uint32_t kNowhere = 0xffffffffu;

class DispatchPlan {
 public:
  EPT_DEVICE DispatchPlan(const DispatchSend &args, const SendShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        generation(args.lane.state->sent[EPT_PHASE_DISPATCH]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16),
        parts(args.deal.parts.by),
        units(args.deal.units),
        first(blockIdx.x * args.deal.each + (blockIdx.x < args.deal.more ? blockIdx.x : args.deal.more)),
        end(first + args.deal.each + (blockIdx.x < args.deal.more ? 1 : 0)) {}

 protected:
  EPT_DEVICE void tell_bad_ids() const {
    if (blockIdx.x == 0 && threadIdx.x == 0 && s.bad[0])
      raise_fault(t, uint32_t(-EPT_E_INVALID), kDispatchSend, -1, kIds, generation, a.object.experts, s.bad[1]);
  }

  EPT_DEVICE const char *ids_of(uint32_t token) const {
    return static_cast<const char *>(a.ids) + token * a.ids_strides[0] * (a.ids_64 ? 8 : 4);
  }
  EPT_DEVICE const char *id_of(uint32_t token, uint32_t k) const {
    return ids_of(token) + k * a.ids_strides[1] * (a.ids_64 ? 8 : 4);
  }
  EPT_DEVICE int64_t id_at(const char *at) const {
    return a.ids_64 ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
  }
  EPT_DEVICE bool valid(int64_t id) const { return id >= 0 && id < int64_t(a.object.experts); }
  // Of an expert that is there, its number in tables of all experts.
  EPT_DEVICE uint32_t slot_of(uint32_t where) const { return s.first[where >> 16] + (where & 0xffff); }
  // take(k, id) for all of a token's, -1 where there is no such token. Loads of eight are under way together.
  template <class Take>
  EPT_DEVICE void each_id(uint32_t token, Take take) const {
    constexpr uint32_t kTogether = 8;
    const char *at = ids_of(token);
    const int64_t step = a.ids_strides[1] * (a.ids_64 ? 8 : 4);
    EPT_ROLLED
    for (uint32_t base = 0; base < top_k; base += kTogether) {
      int64_t ids[kTogether];
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++, at += step)
        ids[i] = base + i < top_k && token < a.tokens ? id_at(at) : -1;
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++)
        if (base + i < top_k) take(base + i, ids[i]);
    }
  }
  // Of ranks [from, from + 64) those that a token goes to.
  EPT_DEVICE uint64_t ranks(uint32_t token, uint32_t from) const {
    uint64_t mask = 0;
    each_id(token, [&](uint32_t, int64_t expert) {
      const uint32_t rank = valid(expert) ? s.where[expert] >> 16 : 0xffffffffu;
      if (rank - from < 64) mask |= 1ull << (rank - from);
    });
    return mask;
  }
  EPT_DEVICE uint32_t tiles() const { return (a.tokens + kWarp - 1) / kWarp; }
  EPT_DEVICE uint64_t header_bytes(uint32_t rank) const {
    return ept_dispatch_header_bytes(s.first[rank + 1] - s.first[rank]);
  }
  EPT_DEVICE uint32_t slot() const { return uint32_t(generation & 1); }
  EPT_DEVICE uint64_t received() const {
    return t.map.recv(EPT_PHASE_DISPATCH, slot()) + a.object.shape.dispatch_region(t.rank).offset;
  }

  // Tables; the last warps take the short ones. The caller's barrier ends it.
  EPT_DEVICE void begin(uint32_t set = kNext) {
    const Taking members = taking(t, set);
    for (uint32_t e = threadIdx.x; e < a.object.experts; e += blockDim.x) {
      const uint32_t where = a.object.where[e];
      s.where[e] = members.has(where >> 16) ? where : kNowhere;
      s.counts[e] = s.before[e] = 0;
    }
    if (set == kNext && blockIdx.x == 0 && threadIdx.x == 0) a.routing.membership[0] = t.state->membership[kNext];
    const uint32_t back = blockDim.x - 1 - threadIdx.x;
    for (uint32_t r = back; r < world; r += blockDim.x) {
      s.rows_at[r] = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
      const bool listed = t.lists && (r == t.rank || (s.rows_at[r] && t.paths[r].memory));
      s.lists[r] = listed ? a.routing.own : nullptr;
    }
    for (uint32_t r = back < kWarp ? world + 1 : back - kWarp; r <= world; r += blockDim.x - kWarp)
      s.first[r] = a.object.first[r];
    if (threadIdx.x < 2) s.bad[threadIdx.x] = 0;
    if (threadIdx.x == 0) *s.ordered = 0;
  }

  // Which tokens of each tile go to each rank, and how many all in all; rows of each expert, where `all`, and of those
  // before this block's. A barrier ends it, which sums_up comes before.
  template <class SumUp>
  EPT_DEVICE void count(bool all, SumUp sums_up) {
    EPT_ROLLED
    for (uint32_t tile = warp_id(); tile < tiles(); tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      uint64_t mask = 0;
      each_id(token, [&](uint32_t, int64_t expert) {
        if (valid(expert)) {
          const uint32_t where = s.where[expert], rank = where >> 16;
          if (where == kNowhere) return;
          if (all) atomicAdd(&s.counts[slot_of(where)], 1u);
          if (token < first) atomicAdd(&s.before[slot_of(where)], 1u);
          if (rank < 64) mask |= 1ull << rank;
        } else if (expert != -1) {  // nobody can be told before the messages go: it counts as none, and faults the lane
          s.bad[1] = uint32_t(expert);
          s.bad[0] = 1;
        }
      });
      for (uint32_t from = 0; from < world; from += 64) {
        if (from) mask = ranks(token, from);
        EPT_ROLLED
        for (uint32_t r = from; r < world && r < from + 64; r++) {
          const uint32_t those = __ballot_sync(kAll, int(mask >> (r - from) & 1));
          if (lane_id() == 0) s.tiles[tile * world + r] = those;
        }
      }
    }
    __syncthreads();
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows_to[r] = rows_before(tiles(), r);
      sums_up(r);
    }
    __syncthreads();
  }
  // Ordinals of this block's pairs, by one warp: those of a round that are for one expert find each other by a match,
  // and the first of them moves the expert's count on.
  EPT_DEVICE void order() const {
    const PairLanes lanes(top_k);
    const uint32_t k = lanes.k();
    EPT_ROLLED
    for (uint32_t base = first; base < end; base += lanes.rows()) {
      const uint32_t token = base + lanes.row();
      const bool here = token < end && k < top_k;
      const int64_t expert = here ? id_at(id_of(token, k)) : -1;
      const uint32_t where = valid(expert) ? s.where[expert] : kNowhere;
      const uint32_t slot = where == kNowhere ? kNowhere : slot_of(where), same = __match_any_sync(kAll, slot);
      const uint32_t before = slot == kNowhere ? 0 : s.before[slot];
      __syncwarp();
      if (slot != kNowhere && !(same & below())) s.before[slot] = before + uint32_t(__popc(same));
      __syncwarp();
      if (here) a.routing.ordinals[uint64_t(token) * top_k + k] = before + uint32_t(__popc(same & below()));
    }
    show(s.ordered, 1);
  }
  // To that rank, of tokens of the tiles before that one.
  EPT_DEVICE uint32_t rows_before(uint32_t tile, uint32_t rank) const {
    uint32_t rows = 0;
    EPT_ROLLED
    for (uint32_t i = 0; i < tile; i++) rows += uint32_t(__popc(s.tiles[i * world + rank]));
    return rows;
  }
  // Of this block's tokens, those that go to that rank.
  EPT_DEVICE uint32_t own_rows(uint32_t rank) const {
    uint32_t rows = 0;
    EPT_ROLLED
    for (uint32_t token = first; token < end;) {
      const uint32_t tile = token / kWarp, last = (tile + 1) * kWarp, until = end < last ? end : last;
      const uint32_t bits = until - token == kWarp ? kAll : (1u << (until - token)) - 1;
      rows += uint32_t(__popc(s.tiles[tile * world + rank] >> (token % kWarp) & bits));
      token = until;
    }
    return rows;
  }
  // The ranks that a token goes to, by rank, in the first lanes, and its row there; returns how many there are, and
  // leaves `rank` as it is in the other lanes.
  EPT_DEVICE uint32_t ranks_of(uint32_t token, int32_t &rank, uint32_t &row) const {
    const uint32_t tile = token / kWarp, at = token % kWarp;
    uint32_t n = 0;
    EPT_ROLLED
    for (uint32_t base = 0; base < world; base += kWarp) {
      const uint32_t r = base + lane_id(), those = r < world ? s.tiles[tile * world + r] : 0;
      const uint32_t goes = those >> at & 1;
      const uint32_t before = goes ? rows_before(tile, r) + uint32_t(__popc(those & ((1u << at) - 1))) : 0;
      __syncwarp();
      EPT_ROLLED
      for (uint32_t left = __ballot_sync(kAll, int(goes)); left; left &= left - 1, n++) {
        const uint32_t lane = uint32_t(__ffs(int(left)) - 1), its = from_lane(before, lane);
        if (lane_id() == n) rank = int32_t(base + lane), row = its;
      }
    }
    return n;
  }

  // What is kept of the first n lanes' ranks and rows of a token.
  EPT_DEVICE void keep(uint32_t token, uint32_t n, int32_t rank, uint32_t row) const {
    if (lane_id() >= fan) return;
    int32_t *to = a.routing.parts + (uint64_t(token) * fan + lane_id()) * 2;
    to[0] = lane_id() < n ? rank : -1;
    to[1] = int32_t(row);
  }

  // The last blocks have a token less, or none: they do what one block does for all.
  EPT_DEVICE uint32_t from_last() const { return gridDim.x - 1 - blockIdx.x; }

  // Where the rows for a rank go: a place that follows from its window, or that place() will find; and where its list
  // does. Of the message to this rank itself the list stands apart, since the rows that all lists name stand there.
  EPT_DEVICE void find(uint32_t r) const {
    if (!s.rows_at[r]) return;
    s.rows_at[r] += received() + before_rows(r);
    if (s.lists[r] && r != t.rank) s.lists[r] = reinterpret_cast<uint32_t *>(s.rows_at[r]);
  }
  // Bytes of a message before that place.
  EPT_DEVICE uint64_t before_rows(uint32_t r) const {
    return t.lists && r == t.rank ? a.object.shape.dispatch_header() : header_bytes(r);
  }
  EPT_DEVICE char *message_to(uint32_t r) const { return s.rows_at[r] - before_rows(r); }

  // Whether this rank packs messages in memory of its own, one behind another.
  EPT_DEVICE bool stages() const { return t.proxied || t.initiates; }
  // Where each message is packed that is not at the rank itself, and where each rank's sums go: the last warp.
  EPT_DEVICE void place() {
    if (warp_id() != warps() - 1) return;
    uint64_t begin = t.map.send(EPT_PHASE_DISPATCH, slot()), combine = 0;
    for (uint32_t base = 0; base < world; base += kWarp) {
      const uint32_t r = base + lane_id();
      uint64_t message = 0, sums = 0, header = 0;
      if (r < world) {
        header = header_bytes(r);
        message = r == t.rank ? 0 : align_up(header + uint64_t(s.rows_to[r]) * row_bytes, kAlign);
        sums = align_up(a.object.shape.combine_header() + s.rows_to[r] * a.object.shape.combine_row, kAlign);
      }
      const uint64_t messages = warp_prefix(message), all = warp_prefix(sums);
      if (r < world) {
        if (!s.rows_at[r]) s.rows_at[r] = staged(t, r, begin + messages - message) + header;
        s.combine_at[r] = combine + all - sums;
        if (from_last() == 0) {
          a.routing.combine_at[r] = s.combine_at[r];
          a.routing.rows_to[r] = s.rows_to[r];
        }
      }
      begin += from_lane(messages, kWarp - 1);
      combine += from_lane(all, kWarp - 1);
    }
    __syncwarp();
    if (from_last() == 0)
      tally(
          t, a.object, EPT_PHASE_DISPATCH, [&](uint32_t r) { return s.rows_to[r]; },
          [&](uint32_t r) { return header_bytes(r) + uint64_t(s.rows_to[r]) * row_bytes; });
  }

  const DispatchSend &a;
  const LaneTable &t;
  const SendShared &s;
  const uint64_t generation;
  const uint32_t world, top_k, fan;
  const uint32_t row_bytes, vectors;
  const uint32_t parts, units;  // Deal
  const uint32_t first, end;    // this block's tokens
};

}  // namespace ept::moe::cuda
