// SPDX-License-Identifier: Apache-2.0
//
// streamed_late.cuh: weights that are known only at combine, in chunks.
#pragma once

#include "moe/cuda/late_weights.cuh"
#include "moe/cuda/streamed.cuh"

namespace ept::moe::cuda {

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
    const Leaving leaving = leave_send(t, kDispatchSend);
    if (works) send_first();
    end_send(leaving, t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
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
    if (granted) add_grants(t, a.object, EPT_PHASE_DISPATCH, granted);
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
      if (wrong) refuse_header(t, kCombineSend, r, generation, rows, wrong);
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

}  // namespace ept::moe::cuda

EPT_KERNEL moe_streamed_late(EPT_ARGUMENT(ept::moe::cuda::StreamedLate) args) {
  using namespace ept::moe::cuda;
  const LaneTable &t = args.out.lane;
  if (!t.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const StreamedLateShared shared = streamed_late_shared(carve, blockDim.x, t.world);
  run_streamed<StreamedLateSender, StreamedLateReceiver>(
      args, shared, kDispatchRecv, EPT_PHASE_DISPATCH, shared.word,
      [](StreamedLateSender &out, const Roles &) { out.rest_of_tokens(); });
}
