// SPDX-License-Identifier: Apache-2.0
//
// streamed.cuh: what dispatch, late weights and combine (streamed_*.cuh) have in common where a call may have more
// tokens than a region holds. What a row is, and where it goes, is as in the kernels of calls that fit; how messages
// are cut, granted and found is chunks.cuh's. Every call of an AllToAll that streams comes here, long or not: a short
// rank receives from long ones.
#pragma once

#include "moe/cuda/chunks.cuh"

namespace ept::moe::cuda {

// Warps of a second launch: the first ones of each block send, where there is something left to send.
struct Roles {
  uint32_t senders;  // of this block's warps
  EPT_DEVICE bool sends() const { return warp_id() < senders; }
  EPT_DEVICE uint32_t readers() const { return gridDim.x * (warps() - senders); }
  EPT_DEVICE uint32_t reader() const { return (warp_id() - senders) * gridDim.x + blockIdx.x; }
  EPT_DEVICE uint32_t sender() const { return warp_id() * gridDim.x + blockIdx.x; }
};
EPT_DEVICE Roles roles(bool rest) { return {rest ? warps() / 2 : 0}; }

// The first of the rows r, r + n, r + 2n, ... that is `me`'s of n warps: another one for each rank, so that few rows of
// each are spread over all.
EPT_DEVICE uint32_t first_row(uint32_t me, uint32_t n, uint32_t rank, uint32_t world) {
  return (me + n - rank * (n / world + 1) % n) % n;
}

EPT_DEVICE ChunkState state_of(const Streamed &how, uint32_t world, uint32_t experts, uint32_t local) {
  Carve carve(how.state);
  return chunk_state(carve, world, experts, local);
}
// By the last block, when nobody else looks at it any more.
EPT_DEVICE void clear(const Streamed &how, uint32_t world, uint32_t experts, uint32_t local) {
  Carve carve(how.state);
  chunk_state(carve, world, experts, local);
  auto *words = reinterpret_cast<uint64_t *>(how.state);
  for (uint64_t i = threadIdx.x; i < carve.bytes() / 8; i += blockDim.x) words[i] = 0;
}

// Places of messages in the slots of dispatch, which weights that come late have too. Packed one behind another where
// all fit, else in even shares.
template <class Bytes>
EPT_DEVICE Region staged_dispatch(const LaneTable &t, const Shape &shape, uint32_t slot, uint32_t r, Bytes bytes) {
  uint64_t at = 0, all = 0;
  for (uint32_t q = 0; q < t.world; q++) {
    if (q == t.rank) continue;
    if (q == r) at = all;
    all += align_up(bytes(q), kAlign);
  }
  const uint64_t base = t.map.send(EPT_PHASE_DISPATCH, slot);
  if (all <= shape.dispatch_send()) return {base + at, bytes(r)};
  const Region part = share(shape.dispatch_send(), t.world - 1, r < t.rank ? r : r - 1);
  return {base + part.offset, part.bytes};
}

// A token's ranks and rows there, in the first lanes, as far as they are in chunks [from, to): the whole warp. Says how
// many.
struct TokenPlan {
  int32_t rank;
  uint32_t row;
};
template <class Out>
EPT_DEVICE uint32_t plan_token(const RoutingArrays &routing, const Out &out, uint32_t fan, uint32_t token,
                               uint32_t from, uint32_t to, TokenPlan &plan) {
  int32_t rank = -1, row = 0;
  if (lane_id() < fan) {
    const int32_t *its = routing.parts + (uint64_t(token) * fan + lane_id()) * 2;
    rank = its[0], row = its[1];
  }
  const uint32_t chunk = rank >= 0 ? out.chunk_of(uint32_t(rank), uint32_t(row)) : 0;
  const uint32_t those = __ballot_sync(kAll, int(rank >= 0 && chunk >= from && chunk < to));
  const uint32_t n = uint32_t(__popc(those)), from_there = moves_from(those);
  plan.rank = from_lane(rank, from_there);
  plan.row = from_lane(uint32_t(row), from_there);
  if (lane_id() >= n) plan.rank = -1;
  return n;
}
constexpr uint32_t kFree = 2;  // chunks of a message that need no grant

// Takes tokens in order; send(token, n, plan) packs one for its first n lanes' ranks. False: the lane is faulted.
template <class Out, class Send>
EPT_DEVICE bool send_rest(const LaneTable &t, const RoutingArrays &routing, const Out &out, const ChunkState &state,
                          uint32_t fan, uint32_t tokens, Send send) {
  for (;;) {
    const uint32_t token = take_one(state.token);
    if (token >= tokens) return true;
    TokenPlan plan;
    const uint32_t n = plan_token(routing, out, fan, token, kFree, 0xffffffffu, plan);
    if (!n) continue;
    const bool open = plan.rank < 0 || out.await(uint32_t(plan.rank), out.chunk_of(uint32_t(plan.rank), plan.row));
    if (__ballot_sync(kAll, int(!open))) return false;
    send(token, n, plan);
    out.packed(plan.rank, plan.row);
    if (from_lane(lane_id() == 0 ? fault_of(t) : 0, 0)) return false;
  }
}

// Reads rows of each source as they are ready: read(source, row). False: the lane is faulted.
template <class In, class Read>
EPT_DEVICE bool read_rows(const LaneTable &t, const Roles &roles, const InShared &s, const ChunkState &w, In &in,
                          Read read) {
  const uint32_t me = roles.reader(), n = roles.readers();
  uint32_t *next = s.next + warp_id() * t.world;
  for (uint32_t r = lane_id(); r < t.world; r += kWarp) next[r] = first_row(me, n, r, t.world);
  __syncwarp();
  const Taking members = taking(t, EPT_PHASE_DISPATCH);
  for (;;) {
    const Led led = in.lead(me, n);
    if (led == Led::kFaulted) return false;
    bool over = in.all_in(me, n);
    for (uint32_t base = 0; base < t.world; base += kWarp) {
      const uint32_t r = base + lane_id();
      uint32_t ready = 0, left = 0;
      if (r < t.world && members.has(r)) {
        ready = uint32_t(lent(&w.ready[r]));
        left = !lent(&w.begun[r]) || next[r] < w.total[r];
      }
      const uint32_t can = __ballot_sync(kAll, int(r < t.world && next[r] < ready));
      over = __ballot_sync(kAll, int(left)) == 0 && over;
      for (uint32_t those = can; those; those &= those - 1) {
        const auto lane = uint32_t(__ffs(int(those)) - 1);
        const uint32_t source = base + lane, until = from_lane(ready, lane);
        for (uint32_t row = from_lane(next[source], 0); row < until; row += n) {
          read(source, row);
          in.read(lane_id() == 0 ? int32_t(source) : -1, row);
          if (lane_id() == 0) next[source] = row + n;
          __syncwarp();
        }
      }
    }
    if (over) return true;
  }
}

// For stats: grants of a phase, as its receiver's last block gives them.
EPT_DEVICE void add_grants(const LaneTable &t, const ObjectTable &object, uint32_t phase, uint32_t granted) {
  auto *to = object.sent + (uint64_t(t.lane) * EPT_PHASES + phase) * kTallies + kGrants;
  atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(granted));
}

// Either launch of a phase. Of the second, `send` is what a warp that sends does.
template <class Sender, class Receiver, class Args, class Shared, class Send>
EPT_DEVICE void run_streamed(const Args &args, const Shared &shared, uint32_t half, uint32_t phase, uint32_t *word,
                             Send send) {
  const LaneTable &t = args.out.lane;
  const ObjectTable &object = args.out.object;
  const ChunkState state = state_of(args.how, t.world, object.experts, object.local);
  Sender out(args, shared, state);
  if (args.how.first) {
    out.run();
    return;
  }
  Receiver in(args, shared, state);
  note(t, half, 0);
  const uint32_t fault = fault_of(t);
  const uint64_t generation = t.state->received[phase];
  in.begin();
  const Roles these = roles(out.begin_rest());  // a barrier
  bool whole = false;
  if (!is_faulted(fault)) {
    whole = true;
    if (these.sends())
      send(out, these);
    else
      whole = in.read(these);
  }
  if (!__syncthreads_or(!whole) && !is_faulted(t)) in.tail();
  const bool last = last_block(t, half, word);
  if (last) {
    __syncthreads();
    in.finish();
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) out.settle_grants(r);
    __syncthreads();
    clear(args.how, t.world, object.experts, object.local);
    end_half(t, half, phase, generation);
  }
  note(t, half, 5);
}

}  // namespace ept::moe::cuda
