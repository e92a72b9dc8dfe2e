// SPDX-License-Identifier: Apache-2.0
//
// streamed.cuh: dispatch, late weights and combine where a call may have more tokens than a region holds. What a row
// is, and where it goes, is as in the kernels of calls that fit; how messages are cut, granted and found is
// chunks.cuh's. Every call of an AllToAll that streams comes here, long or not: a short rank receives from long ones.
#pragma once

#include "moe/cuda/chunks.cuh"
#include "moe/cuda/combine.cuh"
#include "moe/cuda/dispatch_recv.cuh"
#include "moe/cuda/dispatch_send.cuh"
#include "moe/cuda/late_weights.cuh"

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
EPT_DEVICE Region dispatch_place(const LaneTable &t, const Shape &shape, uint32_t slot, uint32_t source) {
  const Region region = shape.dispatch_region(source);
  return {t.map.recv(EPT_PHASE_DISPATCH, slot) + region.offset, region.bytes};
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
  uint32_t nth = 0, left = those;
  for (uint32_t i = 0; left; i++, left &= left - 1)
    if (i == lane_id()) nth = uint32_t(__ffs(int(left)) - 1);
  const auto n = uint32_t(__popc(those));
  plan.rank = from_lane(rank, nth);
  plan.row = from_lane(uint32_t(row), nth);
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

// ---- dispatch ----

class StreamedSender : public DispatchSender {
 public:
  EPT_DEVICE StreamedSender(const StreamedDispatch &args, const StreamedDispatchShared &shared, const ChunkState &state)
      : DispatchSender(args.out, shared.send, true),
        w(state),
        what(args.how),
        number(args.how.first ? generation : args.out.lane.state->received[EPT_PHASE_DISPATCH]),
        counts(args.how.first ? shared.send.counts : state.experts),
        out(args.out.lane, args.out.object, *this, kDispatchSend, EPT_PHASE_DISPATCH, number, row_bytes, shared.out,
            state) {}

  // The first launch.
  EPT_DEVICE void run() {
    note(t, kDispatchSend, 0);
    const uint32_t fault = fault_of(t);
    begin();
    const bool works = !is_faulted(fault) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    leave_half(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    if (works) send_first();
    note(t, kDispatchSend, 5);
  }
  // The second, before its roles. All threads; the answer is the same for all.
  EPT_DEVICE bool begin_rest() {
    begin(EPT_PHASE_DISPATCH);
    __syncthreads();
    return __syncthreads_or(out.plan()) != 0;
  }
  EPT_DEVICE void rest_of_tokens() {
    send_rest(t, a.routing, out, w, fan, a.tokens,
              [&](uint32_t token, uint32_t n, const TokenPlan &plan) { pack(token, n, plan); });
  }
  EPT_DEVICE void settle_grants(uint32_t r) const { out.settle_grants(r); }

  // -- ChunksOut's Kind --
  EPT_DEVICE uint32_t set() const { return what.first ? uint32_t(kNext) : uint32_t(EPT_PHASE_DISPATCH); }
  EPT_DEVICE uint32_t rows_to(uint32_t r) const { return what.first ? s.rows_to[r] : a.routing.rows_to[r]; }
  EPT_DEVICE uint64_t header_bytes(uint32_t r) const { return DispatchSender::header_bytes(r); }
  EPT_DEVICE Region staging(uint32_t r) const {
    return staged_dispatch(t, a.object.shape, uint32_t(number & 1), r,
                           [&](uint32_t q) { return header_bytes(q) + uint64_t(rows_to(q)) * row_bytes; });
  }
  EPT_DEVICE Region target(uint32_t) const { return dispatch_place(t, a.object.shape, uint32_t(number & 1), t.rank); }
  EPT_DEVICE void header(uint32_t r, ept_moe_header &h) const {
    if (!a.weights && a.tokens) h.flags |= EPT_MOE_NO_WEIGHTS;
    h.payload_bytes = uint32_t(a.object.payload);
    h.scale_bytes = a.scale_bytes;
    h.payload_format = uint32_t(a.payload_format);
    h.scale_format = uint32_t(a.scale_format);
    const Region sums = sums_of(r);
    h.combine_offset = sums.offset;
    h.combine_capacity = sums.bytes;
  }
  EPT_DEVICE void beside(uint32_t r, char *to) const {
    const uint32_t local = s.first[r + 1] - s.first[r];
    const auto words = uint32_t((header_bytes(r) - EPT_MOE_HEADER_BYTES) / 4);
    for (uint32_t e = lane_id(); e < words; e += kWarp)
      reinterpret_cast<uint32_t *>(to)[e] = e < local ? counts[s.first[r] + e] : 0;
  }

 private:
  // Where in our combine slot that rank's sums go: packed, or even shares.
  EPT_DEVICE Region sums_of(uint32_t r) const {
    const Shape &shape = a.object.shape;
    uint64_t at = 0, all = 0;
    for (uint32_t q = 0; q < world; q++) {
      if (q == r) at = all;
      all += align_up(shape.combine_header() + rows_to(q) * shape.combine_row, kAlign);
    }
    if (all > shape.combine_recv()) return share(shape.combine_recv(), world, r);
    return {at, shape.combine_header() + rows_to(r) * shape.combine_row};
  }

  EPT_DEVICE void send_first() {
    count();
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x) {
      expect(t, EPT_PHASE_DISPATCH, generation, r, dispatch_place(t, a.object.shape, slot(), r).offset);
      const Region sums = sums_of(r);
      a.routing.rows_to[r] = s.rows_to[r];
      a.routing.combine_at[r] = sums.offset;
      a.routing.combine_room[r] = sums.bytes;
    }
    for (uint32_t e = threadIdx.x; e < a.object.experts && blockIdx.x == 0; e += blockDim.x) w.experts[e] = s.counts[e];
    (void)out.plan();
    DispatchSender::number();
    if (is_faulted(t)) return;  // a barrier, too
    if (blockIdx.x == 0 && warp_id() == warps() - 1) out.count();
    out.empty();
    for (uint32_t token = first + warp_id(); token < end; token += warps()) {
      TokenPlan plan;
      const uint32_t n = plan_token(a.routing, out, fan, token, 0, kFree, plan);
      pack(token, n, plan);
      out.packed(plan.rank, plan.row);
    }
    tell_bad_ids();
  }
  // A row at each of the first n lanes' ranks, and what is kept of the token.
  EPT_DEVICE void pack(uint32_t token, uint32_t n, const TokenPlan &plan) const {
    char *to = plan.rank >= 0 ? out.row_at(uint32_t(plan.rank), plan.row) : nullptr;
    const auto look = [&] { rest(token, plan.rank, to, n); };
    if (!a.quantise)
      copy(token, 0, false, look, to, n);
    else if (element_size(a.x_format) == 2)
      quantise<2>(token, 0, false, look, to, n);
    else
      quantise<4>(token, 0, false, look, to, n);
  }

  const ChunkState &w;
  const Streamed &what;
  const uint64_t number;
  const uint32_t *const counts;
  const ChunksOut<StreamedSender> out;
};

class StreamedReceiver : public DispatchReceiver {
 public:
  EPT_DEVICE StreamedReceiver(const StreamedDispatch &args, const StreamedDispatchShared &shared,
                              const ChunkState &state)
      : DispatchReceiver(args.in, shared.recv),
        w(state),
        what(args.how),
        chunks(shared.in),
        in(args.in.lane, *this, kDispatchRecv, EPT_PHASE_DISPATCH, args.in.lane.state->received[EPT_PHASE_DISPATCH],
           shared.in, state, args.how.discards != 0) {}

  EPT_DEVICE void begin() {
    in.begin();
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) s.rows[r] = s.begin[r] = 0, s.return_at[r] = 0;
    for (uint32_t i = threadIdx.x; i < world * local; i += blockDim.x) s.cursor[i] = s.counts[i] = 0;
    look_up(t, EPT_PHASE_DISPATCH, generation, s.sources);
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
  }
  EPT_DEVICE bool read(const Roles &roles) {
    if (what.discards) {
      while (!in.all_in(roles.reader(), roles.readers()))
        if (in.lead(roles.reader(), roles.readers()) == Led::kFaulted) return false;
      return true;
    }
    return read_rows(t, roles, chunks, w, in, [&](uint32_t source, uint32_t row) { copy_row(source, row); });
  }
  // When all rows are read, and a barrier: what stands beside them. All threads.
  EPT_DEVICE void tail() {
    if (what.discards) return;
    const Taking members = taking(t, EPT_PHASE_DISPATCH);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows[r] = w.total[r];
      s.return_at[r] = members.has(r) ? a.routing.return_at[r] : 0;
    }
    for (uint32_t i = threadIdx.x; i < world * local; i += blockDim.x) s.counts[i] = w.counts[i];
    __syncthreads();
    add_up();
    blanks();
  }
  // The last block. All threads.
  EPT_DEVICE void finish() const {
    const uint32_t met = fault_of(t);
    if (met && !what.discards) blank_all();
    if (a.mirror && warp_id() == 0) mirror(met);
    uint32_t granted = 0;
    for (uint32_t r = threadIdx.x; r < world && !met; r += blockDim.x) granted += in.settle_counts(r);
    if (granted) add_grants(t, object, EPT_PHASE_DISPATCH, granted);
  }
  EPT_DEVICE static void add_grants(const LaneTable &t, const ObjectTable &object, uint32_t phase, uint32_t granted) {
    auto *to = object.sent + (uint64_t(t.lane) * EPT_PHASES + phase) * kTallies + kGrants;
    atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(granted));
  }

  // -- ChunksIn's Kind --
  EPT_DEVICE uint64_t header_bytes() const { return ept_dispatch_header_bytes(local); }
  EPT_DEVICE Region region(uint32_t r) const { return dispatch_place(t, object.shape, uint32_t(generation & 1), r); }
  EPT_DEVICE bool first(uint32_t r) {
    if (!read_dispatch_header(t, object, kDispatchRecv, generation, membership, r, a.scale_bytes, a.payload_format,
                              a.scale_format, s, true))
      return false;
    __syncwarp();
    for (uint32_t e = lane_id(); e < local; e += kWarp) w.counts[r * local + e] = s.counts[r * local + e];
    if (lane_id() == 0) {
      const ept_moe_header h = get_header(t.in[r] + region(r).offset);
      w.total[r] = s.rows[r];
      w.flags[r] = s.flags[r];
      if (!what.discards) a.routing.return_at[r] = h.combine_offset, a.routing.return_room[r] = h.combine_capacity;
    }
    __syncwarp();
    return true;
  }
  EPT_DEVICE bool may_place(uint32_t r) {
    if (a.layout == kByRank) return true;
    const uint32_t until = a.layout == kContiguous ? world : r;
    const Taking members = taking(t, EPT_PHASE_DISPATCH);
    uint32_t lacks = 0;
    for (uint32_t q = lane_id(); q < until; q += kWarp)
      if (members.has(q) && !lent(&w.begun[q])) lacks = 1;
    if (__ballot_sync(kAll, int(lacks))) return false;
    // What other blocks' leaders found.
    uint32_t before = 0;
    for (uint32_t q = lane_id(); q < until; q += kWarp) {
      const uint32_t rows = w.total[q];
      s.rows[q] = rows;
      if (q < r) before += rows;
    }
    before = warp_sum(before);
    for (uint32_t i = lane_id(); i < until * local && per_expert; i += kWarp) s.counts[i] = w.counts[i];
    if (lane_id() == 0) w.begin[r] = s.begin[r] = before;
    __syncwarp();
    return true;
  }
  EPT_DEVICE bool place(uint32_t r, const char *rows, uint32_t from, uint32_t to) {
    uint64_t needed = s.rows[r];
    if (a.layout == kRows) needed += s.begin[r];
    if (a.layout == kContiguous && from == 0) needed = groups(r);
    if (a.layout == kMasked || from) needed = 0;
    if (needed > leading) {
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(r), kRoom, generation, needed, leading);
      return false;
    }
    return !per_expert || index(r, rows - uint64_t(from) * row_bytes, {from, to, 1});
  }

 private:
  EPT_DEVICE void copy_row(uint32_t source, uint32_t j) {
    const char *row = from_lane(lane_id() == 0 ? in.row_at(source, j, row_bytes) : nullptr, 0);
    const uint64_t kept = uint64_t(w.begin[source]) + j;
    int32_t at = -1;
    if (per_expert) {
      if (lane_id() < top_k) at = a.routing.place[kept * top_k + lane_id()];
    } else if (lane_id() == 0) {
      at = int32_t(a.layout == kByRank ? source * leading + j : kept);
    }
    const uint32_t places = __ballot_sync(kAll, int(at >= 0));
    payload(row, at, places, 0, 1);
    if (lane_id() == 0) s.flags[source] = w.flags[source];  // the same, whoever writes it
    __syncwarp();
    rest(source, row, at, places);
  }

  const ChunkState &w;
  const Streamed &what;
  const InShared &chunks;
  ChunksIn<StreamedReceiver> in;
};

// ---- weights that are known only at combine ----

class StreamedLateSender {
 public:
  EPT_DEVICE StreamedLateSender(const StreamedLate &args, const StreamedLateShared &shared, const ChunkState &state)
      : a(args.out),
        t(args.out.lane),
        w(state),
        is_first(args.how.first != 0),
        generation(is_first ? args.out.lane.state->sent[EPT_PHASE_DISPATCH]
                            : args.out.lane.state->received[EPT_PHASE_DISPATCH]),
        fan(uint32_t(args.out.object.shape.fan())),
        row_bytes(uint32_t(ept_late_weights_row_bytes(args.out.object.top_k))),
        out(t, args.out.object, *this, kDispatchSend, EPT_PHASE_DISPATCH, generation, row_bytes, shared.out, state) {}

  EPT_DEVICE void run() {
    const uint32_t membership = a.routing.membership[0], present = t.state->membership[kNext];
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault_of(t) | (membership ^ present)) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    leave_half(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    if (works) send_first();
  }
  EPT_DEVICE bool begin_rest() const { return __syncthreads_or(out.plan()) != 0; }
  EPT_DEVICE void rest_of_tokens() const {
    send_rest(t, a.routing, out, w, fan, a.tokens,
              [&](uint32_t token, uint32_t n, const TokenPlan &plan) { pack(token, n, plan); });
  }
  EPT_DEVICE void settle_grants(uint32_t r) const { out.settle_grants(r); }

  EPT_DEVICE uint32_t set() const { return is_first ? uint32_t(kNext) : uint32_t(EPT_PHASE_DISPATCH); }
  EPT_DEVICE uint32_t rows_to(uint32_t r) const { return a.routing.rows_to[r]; }
  EPT_DEVICE uint64_t header_bytes(uint32_t) const { return EPT_MOE_HEADER_BYTES; }
  EPT_DEVICE Region staging(uint32_t r) const {
    return staged_dispatch(t, a.object.shape, uint32_t(generation & 1), r,
                           [&](uint32_t q) { return EPT_MOE_HEADER_BYTES + uint64_t(rows_to(q)) * row_bytes; });
  }
  EPT_DEVICE Region target(uint32_t) const {
    return dispatch_place(t, a.object.shape, uint32_t(generation & 1), t.rank);
  }
  EPT_DEVICE void header(uint32_t, ept_moe_header &h) const { h.flags |= EPT_MOE_LATE_WEIGHTS; }
  EPT_DEVICE void beside(uint32_t, char *) const {}

 private:
  EPT_DEVICE void send_first() const {
    for (uint32_t r = threadIdx.x; r < t.world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_DISPATCH, generation, r,
             dispatch_place(t, a.object.shape, uint32_t(generation & 1), r).offset);
    (void)out.plan();
    if (is_faulted(t)) return;
    if (blockIdx.x == 0 && warp_id() == warps() - 1) out.count();
    out.empty();
    const uint32_t first = blockIdx.x + gridDim.x * warp_id(), step = gridDim.x * warps();
    for (uint32_t token = first; token < a.tokens; token += step) {
      TokenPlan plan;
      const uint32_t n = plan_token(a.routing, out, fan, token, 0, kFree, plan);
      pack(token, n, plan);
      out.packed(plan.rank, plan.row);
    }
  }
  EPT_DEVICE void pack(uint32_t token, uint32_t n, const TokenPlan &plan) const {
    const uint32_t k = lane_id();
    const float weight = k < a.object.top_k ? a.weights[token * a.strides[0] + k * a.strides[1]] : 0.0f;
    char *to = plan.rank >= 0 ? out.row_at(uint32_t(plan.rank), plan.row) : nullptr;
    for (uint32_t p = 0; p < n; p++) {
      auto *there = reinterpret_cast<float *>(from_lane(to, p));
      if (k * 4 < row_bytes) there[k] = weight;
    }
  }

  const LateSend &a;
  const LaneTable &t;
  const ChunkState &w;
  const bool is_first;
  const uint64_t generation;
  const uint32_t fan, row_bytes;
  const ChunksOut<StreamedLateSender> out;
};

class StreamedLateReceiver {
 public:
  EPT_DEVICE StreamedLateReceiver(const StreamedLate &args, const StreamedLateShared &shared, const ChunkState &state)
      : a(args.in),
        t(args.in.lane),
        w(state),
        chunks(shared.in),
        generation(args.in.lane.state->received[EPT_PHASE_DISPATCH]),
        row_bytes(ept_late_weights_row_bytes(args.in.object.top_k)),
        in(t, *this, kDispatchRecv, EPT_PHASE_DISPATCH, generation, shared.in, state, false) {}

  EPT_DEVICE void begin() { in.begin(); }
  EPT_DEVICE bool read(const Roles &roles) {
    return read_rows(t, roles, chunks, w, in, [&](uint32_t source, uint32_t row) { copy_row(source, row); });
  }
  EPT_DEVICE void tail() const {}
  EPT_DEVICE void finish() const {
    uint32_t granted = 0;
    for (uint32_t r = threadIdx.x; r < t.world && !fault_of(t); r += blockDim.x) granted += in.settle_counts(r);
    if (granted) StreamedReceiver::add_grants(t, a.object, EPT_PHASE_DISPATCH, granted);
  }

  EPT_DEVICE uint64_t header_bytes() const { return EPT_MOE_HEADER_BYTES; }
  EPT_DEVICE Region region(uint32_t r) const { return dispatch_place(t, a.object.shape, uint32_t(generation & 1), r); }
  EPT_DEVICE bool first(uint32_t r) const {
    uint32_t wrong = 0;
    if (lane_id() == 0) {
      const uint32_t rows = a.routing.begin[r + 1] - a.routing.begin[r];
      const ept_moe_header h = get_header(t.in[r] + region(r).offset);
      wrong = check_header(t, a.object, EPT_PHASE_DISPATCH, generation, t.state->membership[EPT_PHASE_DISPATCH], r, h,
                           row_bytes, a.object.max_tokens, EPT_MOE_LATE_WEIGHTS);
      if (!wrong && h.total_rows != rows) wrong = 12;
      if (!wrong) hear(t, r, h, true);
      if (wrong) raise_fault(t, uint32_t(-EPT_E_MISMATCH), kCombineSend, int32_t(r), kHeader, generation, rows, wrong);
      w.total[r] = rows;
    }
    return from_lane(wrong, 0) == 0;
  }
  EPT_DEVICE bool may_place(uint32_t) const { return true; }
  EPT_DEVICE bool place(uint32_t, const char *, uint32_t, uint32_t) const { return true; }

 private:
  EPT_DEVICE void copy_row(uint32_t source, uint32_t row) {
    const char *from = from_lane(lane_id() == 0 ? in.row_at(source, row, row_bytes) : nullptr, 0);
    const uint32_t top_k = a.object.top_k;
    if (lane_id() >= top_k) return;
    a.late[(uint64_t(a.routing.begin[source]) + row) * top_k + lane_id()] =
        reinterpret_cast<const float *>(from)[lane_id()];
  }

  const LateRecv &a;
  const LaneTable &t;
  const ChunkState &w;
  const InShared &chunks;
  const uint64_t generation, row_bytes;
  ChunksIn<StreamedLateReceiver> in;
};

// ---- combine ----

class StreamedCombineSender : public CombineSender {
 public:
  EPT_DEVICE StreamedCombineSender(const StreamedCombine &args, const StreamedCombineShared &shared,
                                   const ChunkState &state)
      : CombineSender(args.out, shared.both),
        is_first(args.how.first != 0),
        number(is_first ? generation : args.out.lane.state->received[EPT_PHASE_COMBINE]),
        at(shared.out),
        next_out(shared.next_out),
        out(args.out.lane, args.out.object, *this, kCombineSend, EPT_PHASE_COMBINE, number, row_bytes, shared.out,
            state) {}

  EPT_DEVICE void run() {
    const uint32_t fault = fault_of(t), membership = a.routing.membership[0], present = t.state->membership[kNext];
    begin();
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault | (membership ^ present)) && settle(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    leave_half(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    if (works) send_first();
  }
  EPT_DEVICE bool begin_rest() {
    begin();
    __syncthreads();
    return __syncthreads_or(out.plan()) != 0;
  }
  // Rows of chunks that were granted, of whichever rank has one.
  EPT_DEVICE void send_granted(const Roles &roles) {
    const uint32_t me = roles.sender(), n = gridDim.x * roles.senders;
    uint32_t *next = next_out + warp_id() * world;
    for (uint32_t r = lane_id(); r < world; r += kWarp) next[r] = kFree * at.per[r] + first_row(me, n, r, world);
    __syncwarp();
    uint64_t deadline = device::deadline_in(t.timeout_ns);
    for (;;) {
      uint32_t missing = world;
      bool over = true, moved = false;
      for (uint32_t base = 0; base < world; base += kWarp) {
        const uint32_t r = base + lane_id();
        const bool left = r < world && next[r] < at.rows[r];
        const uint64_t open = left ? out.open(r) : 0;
        const uint32_t lefts = __ballot_sync(kAll, int(left));
        const uint32_t can = __ballot_sync(kAll, int(left && out.chunk_of(r, next[r]) < open));
        if (lefts) over = false;
        if (lefts & ~can && missing == world) missing = base + uint32_t(__ffs(int(lefts & ~can)) - 1);
        for (uint32_t those = can; those; those &= those - 1) {
          const auto lane = uint32_t(__ffs(int(those)) - 1);
          const uint32_t rank = base + lane;
          const auto chunks = uint32_t(from_lane(open, lane));
          uint32_t row = from_lane(next[rank], 0);
          while (row < at.rows[rank] && out.chunk_of(rank, row) < chunks) {
            const uint32_t good = lane_id() == 0 ? out.reuse(rank, out.chunk_of(rank, row)) : 0;
            if (!from_lane(good, 0)) return;
            pack(rank, row);
            row += n;
          }
          if (lane_id() == 0) next[rank] = row;
          __syncwarp();
          moved = true;
        }
      }
      if (over) return;
      if (moved) {
        deadline = device::deadline_in(t.timeout_ns);
        continue;
      }
      uint32_t go_on = 1;
      if (lane_id() == 0 && missing < world) {
        const uint64_t *word = t.words[missing] + grant_index(EPT_PHASE_COMBINE);
        const uint64_t target =
            t.offsets[missing * kSignals + grant_index(EPT_PHASE_COMBINE)] + out.chunk_of(missing, next[missing]) - 1;
        go_on = may_wait(t, kCombineSend, number, missing, word, target, deadline);
      }
      if (!from_lane(go_on, 0)) return;
    }
  }
  EPT_DEVICE void settle_grants(uint32_t r) const { out.settle_grants(r); }

  EPT_DEVICE uint32_t set() const { return is_first ? uint32_t(kNext) : uint32_t(EPT_PHASE_COMBINE); }
  EPT_DEVICE uint32_t rows_to(uint32_t r) const { return rows_of(r); }
  EPT_DEVICE uint64_t header_bytes(uint32_t) const { return EPT_MOE_HEADER_BYTES; }
  EPT_DEVICE Region staging(uint32_t r) const {
    const Region region = object.shape.combine_staging(r < t.rank ? r : r - 1);
    return {t.map.send(EPT_PHASE_COMBINE, uint32_t(number & 1)) + region.offset, region.bytes};
  }
  EPT_DEVICE Region target(uint32_t r) const {
    return {t.map.recv(EPT_PHASE_COMBINE, uint32_t(number & 1)) + a.routing.return_at[r], a.routing.return_room[r]};
  }
  EPT_DEVICE void header(uint32_t, ept_moe_header &h) const {
    h.payload_bytes = uint32_t(object.returned);
    h.payload_format = object.returned_format;
    if (a.row_weights.data) h.flags |= EPT_MOE_ROW_WEIGHTS;
  }
  EPT_DEVICE void beside(uint32_t, char *) const {}

 private:
  EPT_DEVICE void send_first() {
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_COMBINE, generation, r, t.map.recv(EPT_PHASE_COMBINE, slot()) + a.routing.combine_at[r]);
    (void)out.plan();
    if (is_faulted(t)) return;
    if (blockIdx.x == 0 && warp_id() == warps() - 1) out.count();
    out.empty();
    const uint32_t me = warp_id() * gridDim.x + blockIdx.x, n = gridDim.x * warps();
    for (uint32_t i = 1; i <= world; i++) {
      const uint32_t rank = turn(i), free = kFree * at.per[rank];
      const uint32_t until = at.rows[rank] < free ? at.rows[rank] : free;
      for (uint32_t row = first_row(me, n, rank, world); row < until; row += n) pack(rank, row);
    }
  }
  EPT_DEVICE void pack(uint32_t rank, uint32_t row) const {
    fill(out.row_at(rank, row), rank, row, 0);
    out.packed(lane_id() == 0 ? int32_t(rank) : -1, row);
  }

  const bool is_first;
  const uint64_t number;
  const OutShared &at;
  uint32_t *const next_out;
  const ChunksOut<StreamedCombineSender> out;
};

class StreamedCombineReceiver : public CombineReceiver {
 public:
  EPT_DEVICE StreamedCombineReceiver(const StreamedCombine &args, const StreamedCombineShared &shared,
                                     const ChunkState &state)
      : CombineReceiver(args.in, shared.both, true),
        w(state),
        discards(args.how.discards != 0),
        in(args.in.lane, *this, kCombineRecv, EPT_PHASE_COMBINE, args.in.lane.state->received[EPT_PHASE_COMBINE],
           shared.in, state, args.how.discards != 0) {}

  EPT_DEVICE void begin() {
    in.begin();
    look_up(t, EPT_PHASE_COMBINE, generation, s.sources);
  }
  EPT_DEVICE bool read(const Roles &roles) {
    const uint32_t me = roles.reader(), n = roles.readers();
    for (uint32_t token = me; token < a.tokens && !discards; token += n)
      if (!sum_token(token, me, n)) return false;
    while (!in.all_in(me, n))
      if (in.lead(me, n) == Led::kFaulted) return false;
    return true;
  }
  EPT_DEVICE void tail() const {}
  EPT_DEVICE void finish() const {
    if (fault_of(t)) {
      if (!discards) blank_all();
      return;
    }
    uint32_t granted = 0;
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) granted += in.settle_counts(r);
    if (granted) StreamedReceiver::add_grants(t, object, EPT_PHASE_COMBINE, granted);
  }

  EPT_DEVICE uint64_t header_bytes() const { return EPT_MOE_HEADER_BYTES; }
  EPT_DEVICE Region region(uint32_t r) const {
    return {t.map.recv(EPT_PHASE_COMBINE, uint32_t(generation & 1)) + a.routing.combine_at[r],
            a.routing.combine_room[r]};
  }
  EPT_DEVICE bool first(uint32_t r) {
    if (!header(r, true)) return false;
    if (lane_id() == 0) {
      w.total[r] = a.routing.rows_to[r];
      w.flags[r] = s.beside[r];
    }
    __syncwarp();
    return true;
  }
  EPT_DEVICE bool may_place(uint32_t) const { return true; }
  EPT_DEVICE bool place(uint32_t, const char *, uint32_t, uint32_t) const { return true; }

 private:
  // False: the lane is faulted.
  EPT_DEVICE bool sum_token(uint32_t number, uint32_t me, uint32_t n) {
    int32_t rank = -1;
    uint32_t row = 0;
    if (lane_id() < fan) {
      const int32_t *its = a.routing.parts + (uint64_t(number) * fan + lane_id()) * 2;
      rank = its[0], row = uint32_t(its[1]);
    }
    while (__ballot_sync(kAll, int(rank >= 0 && lent(&w.ready[uint32_t(rank)]) <= row)))
      if (in.lead(me, n) == Led::kFaulted) return false;
    const char *from = nullptr;
    uint32_t beside = 0;
    if (rank >= 0) {
      beside = w.flags[rank];
      from = in.row_at(uint32_t(rank), row, row_bytes + beside);
    }
    __syncwarp();
    const auto parts_here = uint32_t(__popc(__ballot_sync(kAll, int(from != nullptr))));
    if (element_size(int32_t(object.returned_format)) == 2)
      sum<2>(number, 0, from, parts_here);
    else
      sum<4>(number, 0, from, parts_here);
    if (a.row_weights.data) sum_beside(number, from, beside, parts_here);
    in.read(rank, row);
    return true;
  }

  const ChunkState &w;
  const bool discards;
  ChunksIn<StreamedCombineReceiver> in;
};

// The second launch of each: `send` is what a warp that sends does.
template <class Out, class In, class Send>
EPT_DEVICE void run_rest(const Streamed &how, const LaneTable &t, const ObjectTable &object, uint32_t half,
                         uint32_t phase, uint32_t *word, Out &out, In &in, Send send) {
  note(t, half, 0);
  const uint32_t fault = fault_of(t);
  const uint64_t generation = t.state->received[phase];
  in.begin();
  const Roles these = roles(out.begin_rest());  // a barrier
  bool whole = false;
  if (!is_faulted(fault)) {
    whole = true;
    if (these.sends())
      send(these);
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
    clear(how, t.world, object.experts, object.local);
    end_half(t, half, &t.state->received[phase], generation);
  }
  note(t, half, 5);
}

}  // namespace ept::moe::cuda

EPT_KERNEL moe_streamed_dispatch(EPT_ARGUMENT(ept::moe::cuda::StreamedDispatch) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const ObjectTable &object = args.out.object;
  const StreamedDispatchShared shared =
      streamed_dispatch_shared(carve, blockDim.x, t.world, object.experts, object.local, args.out.tokens, object.top_k,
                               uint32_t(object.shape.fan()));
  const ChunkState state = state_of(args.how, t.world, object.experts, object.local);
  StreamedSender out(args, shared, state);
  if (args.how.first) {
    out.run();
    return;
  }
  StreamedReceiver in(args, shared, state);
  run_rest(args.how, t, object, kDispatchRecv, EPT_PHASE_DISPATCH, shared.recv.word, out, in,
           [&](const Roles &) { out.rest_of_tokens(); });
}

EPT_KERNEL moe_streamed_late(EPT_ARGUMENT(ept::moe::cuda::StreamedLate) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const ObjectTable &object = args.out.object;
  const StreamedLateShared shared = streamed_late_shared(carve, blockDim.x, t.world);
  const ChunkState state = state_of(args.how, t.world, object.experts, object.local);
  StreamedLateSender out(args, shared, state);
  if (args.how.first) {
    out.run();
    return;
  }
  StreamedLateReceiver in(args, shared, state);
  run_rest(args.how, t, object, kDispatchRecv, EPT_PHASE_DISPATCH, shared.word, out, in,
           [&](const Roles &) { out.rest_of_tokens(); });
}

EPT_KERNEL moe_streamed_combine(EPT_ARGUMENT(ept::moe::cuda::StreamedCombine) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const ObjectTable &object = args.out.object;
  const StreamedCombineShared shared = streamed_combine_shared(carve, blockDim.x, t.world);
  const ChunkState state = state_of(args.how, t.world, object.experts, object.local);
  StreamedCombineSender out(args, shared, state);
  if (args.how.first) {
    out.run();
    return;
  }
  StreamedCombineReceiver in(args, shared, state);
  run_rest(args.how, t, object, kCombineRecv, EPT_PHASE_COMBINE, shared.both.word, out, in,
           [&](const Roles &roles) { out.send_granted(roles); });
}
