// SPDX-License-Identifier: Apache-2.0
//
// dispatch_plan.cuh: the routing scan of a dispatch: which rank each token of a block goes to, and as which of its
// rows. Each block scans all ids for itself (they are few, and no block then waits for another), and owns a run of
// tokens.
//
// A token's row number at rank r is the count of earlier tokens that go to r: by tiles of 32 tokens, a lane a token,
// the tokens of a tile that go to r are the ballots of the warps that have looked at its ids, and how many go there
// from the tiles before stands beside them. So numbers are the same in every block and on every run, and a warp finds
// all of a token's at once, a rank a lane.
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
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16),
        parts(args.deal.parts.by),
        units(args.deal.units),
        first(blockIdx.x * args.deal.each + (blockIdx.x < args.deal.more ? blockIdx.x : args.deal.more)),
        end(first + args.deal.each + (blockIdx.x < args.deal.more ? 1 : 0)),
        state(args.lane.state),
        fault(fault_of(args.lane)),
        needed(ask_first()),
        generation(state.sent(EPT_PHASE_DISPATCH)),
        present(state.membership(kNext)) {}

 protected:
  // By the warp that left last: all messages go, since peers wait for them.
  EPT_DEVICE void tell_bad_ids() const {
    if (lane_id() == 0 && s.bad[0])
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
  // The ids of a token from k on, until `to`; -1 where there is none. All are under way together.
  struct Ids {
    static constexpr uint32_t kMost = 2;
    int64_t id[kMost];
  };
  EPT_DEVICE void ask_ids(Ids &ids, uint32_t token, uint32_t k, uint32_t to) const {
    EPT_UNROLL
    for (uint32_t i = 0; i < Ids::kMost; i++)
      ids.id[i] = k + i < to && token < a.tokens ? id_at(id_of(token, k + i)) : -1;
  }
  // A tile's ids are looked at by several warps, where there are more warps than tiles: each has a lane a token, and
  // some of its ids.
  struct Share {
    uint32_t tile, token, from, to;
  };
  EPT_DEVICE Share share_of(uint32_t unit) const {
    const uint32_t nth = a.deal.tiles.of(unit), tile = unit - nth * tiles(), from = nth * a.deal.share;
    return {tile, tile * kWarp + lane_id(), from, smaller(from + a.deal.share, top_k)};
  }
  // Of ranks [first, first + kWarp) those that a token goes to, by some of its ids.
  EPT_DEVICE uint32_t ranks(const Share &its, uint32_t first) const {
    uint32_t mask = 0;
    EPT_ROLLED
    for (uint32_t k = its.from; k < its.to; k++) {
      const int64_t expert = its.token < a.tokens ? id_at(id_of(its.token, k)) : -1;
      const uint32_t rank = valid(expert) ? s.where[expert] >> 16 : kNowhere;
      if (rank - first < kWarp) mask |= 1u << (rank - first);
    }
    return mask;
  }
  EPT_DEVICE Taking members() const { return taking(t, kNext, present); }
  EPT_DEVICE uint32_t tiles() const { return a.deal.tiles.by; }
  EPT_DEVICE uint64_t header_bytes(uint32_t rank) const {
    return ept_dispatch_header_bytes(s.first[rank + 1] - s.first[rank]);
  }
  EPT_DEVICE uint32_t slot() const { return uint32_t(generation & 1); }
  EPT_DEVICE uint64_t received() const { return dispatch_place(t, a.object.shape, slot(), t.rank).offset; }

  // What is known of a rank before the step: its path, and where its experts and those of the next one begin.
  struct Peer {
    uint32_t first = 0, next = 0;
    Way way;
  };
  // What a block needs first, and what follows from nothing else.
  struct Needed {
    uint32_t where;  // of expert threadIdx.x
    Ids ids;         // of this warp's first share
    Peer peer;       // of the rank that is this thread's from the last
  };
  EPT_DEVICE Needed ask_first() const {
    Needed its;
    its.where = threadIdx.x < a.object.experts ? a.object.where[threadIdx.x] : 0;
    its.peer = ask_peer(from_last_thread());
    const Share first = share_of(warp_id());
    ask_ids(its.ids, first.token, first.from, first.to);
    return its;
  }
  EPT_DEVICE uint32_t from_last_thread() const { return blockDim.x - 1 - threadIdx.x; }
  // Tables; the last warps take the short ones. The caller's barrier ends it.
  EPT_DEVICE void begin(const Taking &members) {
    for (uint32_t e = threadIdx.x; e < a.object.experts; e += blockDim.x) {
      const uint32_t where = e == threadIdx.x ? needed.where : a.object.where[e];
      s.where[e] = members.has(where >> 16) ? where : kNowhere;
      s.counts[e] = s.before[e] = 0;
    }
    for (uint32_t i = threadIdx.x; i < tiles() * world; i += blockDim.x) s.tiles[i] = {};
    const uint32_t back = from_last_thread();
    for (uint32_t r = back; r <= world; r += blockDim.x) set(r, r == back ? needed.peer : ask_peer(r));
    if (threadIdx.x < 2) s.bad[threadIdx.x] = 0;
    if (threadIdx.x == 0) *s.ordered = 0;
  }

  // Which tokens of each tile go to each rank; rows of each expert, where `all`, and of those before this block's. A
  // barrier ends it.
  EPT_DEVICE void scan(bool all) {
    EPT_ROLLED
    for (uint32_t unit = warp_id(); unit < tiles() * a.deal.shares; unit += warps()) {
      const Share its = share_of(unit);
      uint32_t mask = 0;
      if (unit != warp_id()) ask_ids(needed.ids, its.token, its.from, its.to);
      EPT_ROLLED
      for (uint32_t k = its.from; k < its.to; k += Ids::kMost) {
        const Ids ids = needed.ids;
        if (k + Ids::kMost < its.to) ask_ids(needed.ids, its.token, k + Ids::kMost, its.to);
        mask |= count(ids, all, its.token < first);
      }
      EPT_ROLLED
      for (uint32_t from = 0; from < world; from += kWarp) {
        if (from) mask = ranks(its, from);
        const uint32_t n = smaller(world - from, kWarp);
        uint32_t mine = 0;
        EPT_ROLLED
        for (uint32_t r = 0; r < n; r++) {
          const uint32_t those = __ballot_sync(kAll, int(mask >> r & 1));
          if (lane_id() == r) mine = those;
        }
        if (mine) atomicOr(&s.tiles[its.tile * world + from + lane_id()].those, mine);
      }
    }
  }
  // Some ids of a lane's token; returns which of the first kWarp ranks they are of. Each look at a table is made for
  // all of them before the next, since an answer takes longer than its instructions.
  EPT_DEVICE uint32_t count(const Ids &ids, bool all, bool before) const {
    uint32_t where[Ids::kMost], slot[Ids::kMost], mask = 0;
    EPT_UNROLL
    for (uint32_t i = 0; i < Ids::kMost; i++) {
      where[i] = kNowhere;
      if (valid(ids.id[i]))
        where[i] = s.where[ids.id[i]];
      else if (ids.id[i] != -1)  // nobody can be told before the messages go: it counts as none, and faults the lane
        s.bad[1] = uint32_t(ids.id[i]), s.bad[0] = 1;
    }
    EPT_UNROLL
    for (uint32_t i = 0; i < Ids::kMost; i++) {
      slot[i] = where[i] == kNowhere ? 0 : slot_of(where[i]);
      if (where[i] >> 16 < kWarp) mask |= 1u << (where[i] >> 16);
    }
    EPT_UNROLL
    for (uint32_t i = 0; i < Ids::kMost; i++) {
      if (where[i] == kNowhere) continue;
      if (all) atomicAdd(&s.counts[slot[i]], 1u);
      if (before) atomicAdd(&s.before[slot[i]], 1u);
    }
    return mask;
  }
  // How many rows go to each rank, and from the tiles before each. summed(rank): that is there. A barrier ends it.
  template <class Summed>
  EPT_DEVICE void sum(Summed summed) const {
    constexpr uint32_t kTogether = 4;
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      uint32_t rows = 0;
      EPT_ROLLED
      for (uint32_t first = 0; first < tiles(); first += kTogether) {
        uint32_t those[kTogether];
        EPT_UNROLL
        for (uint32_t i = 0; i < kTogether; i++)
          those[i] = first + i < tiles() ? s.tiles[(first + i) * world + r].those : 0;
        EPT_UNROLL
        for (uint32_t i = 0; i < kTogether; i++) {
          if (first + i < tiles()) s.tiles[(first + i) * world + r].before = rows;
          rows += uint32_t(__popc(those[i]));
        }
      }
      s.rows_to[r] = rows;
      summed(r);
    }
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
  // Of the tokens before that one, those that go to that rank.
  EPT_DEVICE uint32_t rows_before(uint32_t token, uint32_t rank) const {
    return token < a.tokens ? rows_before(token, s.tiles[token / kWarp * world + rank]) : s.rows_to[rank];
  }
  EPT_DEVICE uint32_t rows_before(uint32_t token, const TileRows &its) const {
    return its.before + uint32_t(__popc(its.those & ((1u << token % kWarp) - 1)));
  }
  // Of this block's.
  EPT_DEVICE uint32_t own_rows(uint32_t rank) const { return rows_before(end, rank) - rows_before(first, rank); }
  // act(rank, row, goes) for all ranks, by a lane each, and all lanes of the warp: whether the token goes there, and as
  // which of its rows.
  template <class Act>
  EPT_DEVICE void each_rank(uint32_t token, Act act) const {
    EPT_ROLLED
    for (uint32_t from = 0; from < world; from += kWarp) {
      const uint32_t r = from + lane_id();
      TileRows its{};
      if (r < world) its = s.tiles[token / kWarp * world + r];
      act(r, rows_before(token, its), (its.those >> token % kWarp & 1) != 0);
    }
  }

  // What is kept of a token's ranks and rows.
  EPT_DEVICE void keep(uint32_t token) const {
    int32_t *to = a.routing.parts + uint64_t(token) * fan * 2;
    uint32_t n = 0;
    each_rank(token, [&](uint32_t r, uint32_t row, bool goes) {
      const uint32_t those = __ballot_sync(kAll, int(goes));
      if (goes) {
        int32_t *its = to + (n + uint32_t(__popc(those & below()))) * 2;
        its[0] = int32_t(r);
        its[1] = int32_t(row);
      }
      n += uint32_t(__popc(those));
    });
    if (lane_id() >= n && lane_id() < fan) to[lane_id() * 2] = -1;
  }

  // The last blocks have a token less, or none: they do what one block does for all.
  EPT_DEVICE uint32_t from_last() const { return gridDim.x - 1 - blockIdx.x; }

  EPT_DEVICE Peer ask_peer(uint32_t r) const {
    Peer its;
    if (r > world) return its;
    its.first = a.object.first[r];
    if (r == world) return its;
    its.next = a.object.first[r + 1];
    its.way = ask_way(t, r);
    return its;
  }
  // Where the rows for a rank go: a place that follows from its window, or that place() will find; and where its list
  // does. Of the message to this rank itself the list stands apart, since the rows that all lists name stand there.
  EPT_DEVICE void set(uint32_t r, const Peer &its) const {
    s.first[r] = its.first;
    if (r == world) return;
    const bool own = r == t.rank, listed = t.lists && its.way.mapped && (own || its.way.memory);
    const uint64_t before = received() + before_rows(r, its.next - its.first);
    char *at = its.way.mapped ? device::address<char>(its.way.window + before) : nullptr;
    s.rows_at[r] = at;
    s.lists[r] = !listed ? nullptr : own ? a.routing.own : reinterpret_cast<uint32_t *>(at);
  }
  // Bytes of a message before that place.
  EPT_DEVICE uint64_t before_rows(uint32_t r, uint32_t experts) const {
    return t.lists && r == t.rank ? a.object.shape.dispatch_header() : ept_dispatch_header_bytes(experts);
  }
  EPT_DEVICE char *message_to(uint32_t r) const { return s.rows_at[r] - before_rows(r, s.first[r + 1] - s.first[r]); }

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
  const uint32_t world, top_k, fan;
  const uint32_t row_bytes, vectors;
  const uint32_t parts, units;  // Deal
  const uint32_t first, end;    // this block's tokens
  // In the order in which it is asked for; what is to be waited for last.
  const StateThen state;
  const uint32_t fault;  // when this block began
  Needed needed;
  const uint64_t generation;
  const uint32_t present;  // the membership of the next dispatch
};

}  // namespace ept::moe::cuda
