// SPDX-License-Identifier: Apache-2.0
//
// dispatch_plan.cuh: the routing scan of a dispatch: which rank each token of a block goes to, and as which of its
// rows. Each block scans all ids for itself (they are few, and no block then waits for another), and owns a run of
// tokens.
//
// A token's row number at rank r is the count of earlier tokens that go to r: by tiles of 32 tokens, a tile a warp, the
// tokens of a tile that go to r are one ballot. So numbers are the same in every block and on every run.
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
  EPT_DEVICE int64_t id_at(const char *at) const {
    return a.ids_64 ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
  }
  EPT_DEVICE bool valid(int64_t id) const { return id >= 0 && id < int64_t(a.object.experts); }
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
      s.counts[e] = 0;
    }
    if (set == kNext && blockIdx.x == 0 && threadIdx.x == 0) a.routing.membership[0] = t.state->membership[kNext];
    const uint32_t back = blockDim.x - 1 - threadIdx.x;
    for (uint32_t r = back; r < world; r += blockDim.x) {
      s.pending[r] = s.pieces[r] = 0;
      s.rows_at[r] = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
    }
    for (uint32_t r = back < kWarp ? world + 1 : back - kWarp; r <= world; r += blockDim.x - kWarp)
      s.first[r] = a.object.first[r];
    if (threadIdx.x < 2) s.bad[threadIdx.x] = 0;
  }

  // Tokens of each tile that go to each rank, and rows of each expert.
  EPT_DEVICE void count() {
    for (uint32_t tile = warp_id(); tile < tiles(); tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      uint64_t mask = 0;
      each_id(token, [&](uint32_t, int64_t expert) {
        if (valid(expert)) {
          const uint32_t where = s.where[expert], rank = where >> 16;
          if (where == kNowhere) return;
          atomicAdd(&s.counts[s.first[rank] + (where & 0xffff)], 1u);
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
          if (lane_id() == 0) s.tile_rows[tile * world + r] = uint32_t(__popc(those));
        }
      }
    }
    __syncthreads();
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      uint32_t before = 0;
      for (uint32_t tile = 0; tile < tiles(); tile++) {
        const uint32_t here = s.tile_rows[tile * world + r];
        s.tile_rows[tile * world + r] = before;
        before += here;
      }
      s.rows_to[r] = before;
    }
    __syncthreads();
  }

  // The last blocks have a token less, or none: they do what one block does for all.
  EPT_DEVICE uint32_t from_last() const { return gridDim.x - 1 - blockIdx.x; }

  // Where each message is packed, and where each rank's sums go: one warp, while the others number rows.
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
        char *window = s.rows_at[r];
        s.rows_at[r] = (window ? window + received() : staged(t, r, begin + messages - message)) + header;
        s.combine_at[r] = combine + all - sums;
        if (from_last() == 0) {
          a.routing.combine_at[r] = s.combine_at[r];
          a.routing.rows_to[r] = s.rows_to[r];
        }
      }
      begin += from_lane(messages, kWarp - 1);
      combine += from_lane(all, kWarp - 1);
    }
    if (from_last() == 0)
      tally(
          t, a.object, EPT_PHASE_DISPATCH, [&](uint32_t r) { return s.rows_to[r]; },
          [&](uint32_t r) { return header_bytes(r) + uint64_t(s.rows_to[r]) * row_bytes; });
  }

  // The parts of this block's tokens.
  EPT_DEVICE void number() {
    const Taking members = taking(t, kNext);
    for (uint32_t r = from_last() + gridDim.x * threadIdx.x; r < world; r += gridDim.x * blockDim.x)
      if (members.has(r)) add_pieces(r, 1);
    const uint32_t until = end > first ? (end + kWarp - 1) / kWarp : 0;
    for (uint32_t tile = first / kWarp + warp_id(); tile < until; tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      const bool mine = token >= first && token < end;
      uint32_t n = 0;
      int32_t *to = a.routing.parts + uint64_t(token) * fan * 2;
      int32_t *kept = mine && token - first < kKept ? s.parts + (token - first) * fan * 2 : nullptr;
      for (uint32_t from = 0; from < world; from += 64) {
        const uint64_t mask = ranks(token, from);
        EPT_ROLLED
        for (uint32_t r = from; r < world && r < from + 64; r++) {
          const bool goes = mask >> (r - from) & 1;
          const uint32_t those = __ballot_sync(kAll, int(goes));
          if (!mine || !goes) continue;
          const auto number = int32_t(s.tile_rows[tile * world + r] + uint32_t(__popc(those & below())));
          to[2 * n] = int32_t(r);
          to[2 * n + 1] = number;
          if (kept) kept[2 * n] = int32_t(r), kept[2 * n + 1] = number;
          add_pieces(r, units);
          n++;
        }
      }
      if (!mine) continue;
      EPT_ROLLED
      for (; n < fan; n++) {
        to[2 * n] = -1;
        if (kept) kept[2 * n] = -1;
      }
    }
  }
  EPT_DEVICE void add_pieces(uint32_t rank, uint32_t pieces) {
    atomicAdd(&s.pending[rank], pieces);
    atomicAdd(&s.pieces[rank], pieces);
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
