// SPDX-License-Identifier: Apache-2.0
//
// streamed_dispatch.cuh: tokens to experts, in chunks.
#pragma once

#include "moe/cuda/dispatch_recv.cuh"
#include "moe/cuda/dispatch_send.cuh"
#include "moe/cuda/streamed.cuh"

namespace ept::moe::cuda {

class StreamedSender : public DispatchSender {
 public:
  EPT_DEVICE StreamedSender(const StreamedDispatch &args, const StreamedDispatchShared &shared, const ChunkState &state)
      : DispatchSender(args.out, shared.send),
        w(state),
        what(args.how),
        number(args.how.first ? generation : args.out.lane.state->received[EPT_PHASE_DISPATCH]),
        counts(args.how.first ? shared.send.counts : state.experts),
        out(args.out.lane, args.out.object, *this, kDispatchSend, EPT_PHASE_DISPATCH, number, row_bytes, shared.out,
            state) {}

  // The first launch.
  EPT_DEVICE void run() {
    note(t, kDispatchSend, 0);
    begin(members());
    if (blockIdx.x == 0 && threadIdx.x == 0) a.routing.membership[0] = present;
    const bool works = !is_faulted(fault) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    const Leaving leaving = leave_send(t, kDispatchSend);
    if (works) send_first();
    if (end_send(leaving, t, kDispatchSend, EPT_PHASE_DISPATCH, generation)) tell_bad_ids();
    note(t, kDispatchSend, 5);
  }
  // The second, before its roles. All threads; the answer is the same for all.
  EPT_DEVICE bool begin_rest() {
    begin(taking(t, EPT_PHASE_DISPATCH));
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
    scan(true);
    __syncthreads();
    sum([](uint32_t) {});
    __syncthreads();
    if (warp_id() == 0) order();
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x) {
      expect(t, EPT_PHASE_DISPATCH, generation, r, dispatch_place(t, a.object.shape, slot(), r).offset);
      const Region sums = sums_of(r);
      a.routing.rows_to[r] = s.rows_to[r];
      a.routing.combine_at[r] = sums.offset;
      a.routing.combine_room[r] = sums.bytes;
    }
    for (uint32_t e = threadIdx.x; e < a.object.experts && blockIdx.x == 0; e += blockDim.x) w.experts[e] = s.counts[e];
    (void)out.plan();
    for (uint32_t token = first + warp_id(); token < end; token += warps()) keep(token);
    if (is_faulted(t)) return;  // a barrier, too
    if (blockIdx.x == 0 && warp_id() == warps() - 1) out.count();
    out.empty();
    for (uint32_t token = first + warp_id(); token < end; token += warps()) {
      TokenPlan plan;
      const uint32_t n = plan_token(a.routing, out, fan, token, 0, kFree, plan);
      pack(token, n, plan);
      out.packed(plan.rank, plan.row);
    }
  }
  // A row at each of the first n lanes' ranks, and what is kept of the token.
  EPT_DEVICE void pack(uint32_t token, uint32_t n, const TokenPlan &plan) const {
    char *to = plan.rank >= 0 ? out.row_at(uint32_t(plan.rank), plan.row) : nullptr;
    fetch(token, 0);
    rest(token, [&](auto write) { write(n < kWarp ? (1u << n) - 1 : kAll, to, uint32_t(plan.rank)); });
    s.to[threadIdx.x] = to;
    __syncwarp();
    payload(token, 0, {n, 0, {}});
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
    for (uint32_t i = threadIdx.x; i < world * local; i += blockDim.x) s.counts[i] = 0;
    look_up(t, EPT_PHASE_DISPATCH, generation, membership, at_first.origin, s.sources,
            [&](uint32_t r) { return message_of(r); });
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
    bulk.begin();
  }
  EPT_DEVICE bool read(const Roles &roles) {
    if (what.discards) {
      while (!in.all_in(roles.reader(), roles.readers()))
        if (in.lead(roles.reader(), roles.readers()) == Led::kFaulted) return false;
      return true;
    }
    const bool whole =
        read_rows(t, roles, chunks, w, in, [&](uint32_t source, uint32_t row) { copy_row(source, row); });
    bulk.end();
    return whole;
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

  // -- ChunksIn's Kind --
  EPT_DEVICE uint64_t header_bytes() const { return ept_dispatch_header_bytes(local); }
  EPT_DEVICE Region region(uint32_t r) const { return dispatch_place(t, object.shape, uint32_t(generation & 1), r); }
  EPT_DEVICE bool first(uint32_t r) {
    if (!read_dispatch_header(t, object, kDispatchRecv, generation, membership, r, format(), s, nullptr, true, [] {}))
      return false;
    __syncwarp();
    for (uint32_t e = lane_id(); e < local; e += kWarp) w.counts[r * local + e] = s.counts[r * local + e];
    if (lane_id() == 0) {
      const ept_moe_header h = get_header(t.in[r] + region(r).offset);
      w.total[r] = s.rows[r];
      w.flags[r] = s.runs[r].flags;
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
    if (lane_id() == 0) w.begin[r] = s.runs[r].begin = before;
    __syncwarp();
    return true;
  }
  EPT_DEVICE bool place(uint32_t r, const char *rows, uint32_t from, uint32_t to) {
    uint64_t needed = s.rows[r];
    if (a.layout == kRows) needed += s.runs[r].begin;
    if (per_expert && from == 0) needed = groups(r);
    if (from) needed = 0;
    if (needed > leading) {
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(r), kRoom, generation, needed, leading);
      return false;
    }
    return !per_expert || index(r, rows, from, to);
  }

 private:
  // Places of rows [from, to), for the blocks that copy them; `rows`: where the first of them is.
  EPT_DEVICE bool index(uint32_t r, const char *rows, uint32_t from, uint32_t to) const {
    const PairLanes lanes(top_k);
    bool good = true;
    for (uint32_t j = from + lanes.row(); j < to && lanes.k() < top_k; j += lanes.rows()) {
      const Pair pair = pair_of(r, rows + uint64_t(j - from) * row_bytes, lanes.k());
      const int32_t place = place_of(r, pair);
      keep_place(r, j, lanes.k(), place, pair);
      good = good && place != kRefused;
    }
    __syncwarp();
    return __ballot_sync(kAll, int(!good)) == 0;
  }
  EPT_DEVICE void copy_row(uint32_t source, uint32_t j) {
    const char *row = from_lane(lane_id() == 0 ? in.row_at(source, j, row_bytes) : nullptr, 0);
    const uint64_t kept = uint64_t(w.begin[source]) + j;
    int32_t at = -1;
    if (per_expert) {
      if (lane_id() < top_k) at = a.routing.place[kept * top_k + lane_id()];
    } else if (lane_id() == 0) {
      at = int32_t(a.layout == kByRank ? source * leading + j : kept);
    }
    if (lane_id() == 0) s.runs[source].flags = w.flags[source], s.runs[source].parts = divisor(1);  // whoever writes it
    __syncwarp();
    Row its;
    its.at = row, its.source = source, its.j = j;
    const Span16 all = {0, vectors};
    fetch(its, all);
    move(its, all, at, [] {});
    rest(its, at);
  }

  const ChunkState &w;
  const Streamed &what;
  const InShared &chunks;
  ChunksIn<StreamedReceiver> in;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_streamed_dispatch(EPT_ARGUMENT(ept::moe::cuda::StreamedDispatch) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const ObjectTable &object = args.out.object;
  const StreamedDispatchShared shared =
      streamed_dispatch_shared(carve, blockDim.x, t.world, object.experts, object.local, args.out.tokens);
  run_streamed<StreamedSender, StreamedReceiver>(args, shared, kDispatchRecv, EPT_PHASE_DISPATCH, shared.recv.word,
                                                 [](StreamedSender &out, const Roles &) { out.rest_of_tokens(); });
}
