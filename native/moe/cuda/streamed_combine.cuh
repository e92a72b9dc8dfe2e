// SPDX-License-Identifier: Apache-2.0
//
// streamed_combine.cuh: results back, in chunks.
#pragma once

#include "moe/cuda/combine.cuh"
#include "moe/cuda/streamed.cuh"

namespace ept::moe::cuda {

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
    begin();
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault | (membership ^ present)) && settle(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    const Leaving leaving = leave_send(t, kCombineSend);
    if (works) send_first();
    end_send(leaving, t, kCombineSend, EPT_PHASE_COMBINE, generation);
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
    fill(out.row_at(rank, row), rank, row, 0, places_of_row(uint64_t(s.begin[rank]) + row), Going());
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
      : CombineReceiver(args.in, shared.both),
        w(state),
        discards(args.how.discards != 0),
        in(args.in.lane, *this, kCombineRecv, EPT_PHASE_COMBINE, args.in.lane.state->received[EPT_PHASE_COMBINE],
           shared.in, state, args.how.discards != 0) {}

  EPT_DEVICE void begin() {
    in.begin();
    look_up(t, EPT_PHASE_COMBINE, generation, membership, at_first.origin, s.sources,
            [&](uint32_t r) { return expect_sums(r); });
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
    if (granted) add_grants(t, object, EPT_PHASE_COMBINE, granted);
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
    sum(number, 0, from, parts_here);
    if (a.row_weights.data) sum_beside(number, from, beside, parts_here);
    in.read(rank, row);
    return true;
  }

  const ChunkState &w;
  const bool discards;
  ChunksIn<StreamedCombineReceiver> in;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_streamed_combine(EPT_ARGUMENT(ept::moe::cuda::StreamedCombine) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const StreamedCombineShared shared = streamed_combine_shared(carve, blockDim.x, t.world);
  run_streamed<StreamedCombineSender, StreamedCombineReceiver>(
      args, shared, kCombineRecv, EPT_PHASE_COMBINE, shared.both.word,
      [](StreamedCombineSender &out, const Roles &roles) { out.send_granted(roles); });
}
