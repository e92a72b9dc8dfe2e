// SPDX-License-Identifier: Apache-2.0
//
// late_weights.cuh: weights that are known only at combine. Each token's go to the ranks that have its row, and take
// the place of those that came with the dispatch, for one combine. A message of the phase of dispatch, with a
// generation of its own: so what protocol.cuh says of messages holds for these. They are small, and few calls have
// them: each row is one piece, and a source's rows are read by one block.
#pragma once

#include "moe/cuda/initiated.cuh"
#include "moe/cuda/protocol.cuh"

namespace ept::moe::cuda {

class LateSender {
 public:
  EPT_DEVICE LateSender(const LateSend &args, char **messages)
      : a(args),
        t(args.lane),
        at(messages),
        generation(args.lane.state->sent[EPT_PHASE_DISPATCH]),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(uint32_t(ept_late_weights_row_bytes(args.object.top_k))) {}

  EPT_DEVICE void run() {
    const uint32_t membership = a.routing.membership[0], present = t.state->membership[kNext];
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault_of(t) | (membership ^ present)) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    const Leaving leaving = leave_send(t, kDispatchSend);
    if (works) send();
    end_send(leaving, t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
  }

 private:
  EPT_DEVICE uint64_t bytes_to(uint32_t rank) const {
    return EPT_MOE_HEADER_BYTES + uint64_t(a.routing.rows_to[rank]) * row_bytes;
  }
  EPT_DEVICE uint64_t received() const {
    return dispatch_place(t, a.object.shape, uint32_t(generation & 1), t.rank).offset;
  }

  EPT_DEVICE void send() {
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) {
      if (blockIdx.x == 0)
        expect(t, EPT_PHASE_DISPATCH, generation, r,
               dispatch_place(t, a.object.shape, uint32_t(generation & 1), r).offset);
      char *window = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
      uint64_t begin = t.map.send(EPT_PHASE_DISPATCH, uint32_t(generation & 1));
      for (uint32_t q = 0; q < r && !window; q++) begin += q == t.rank ? 0 : align_up(bytes_to(q), kAlign);
      at[r] = window ? window + received() : staged(t, r, begin);
    }
    __syncthreads();
    if (blockIdx.x == 0 && warp_id() == 0)
      tally(
          t, a.object, EPT_PHASE_DISPATCH, [&](uint32_t r) { return a.routing.rows_to[r]; },
          [&](uint32_t r) { return bytes_to(r); });
    const Taking members = taking(t, kNext);
    const uint32_t first = blockIdx.x + gridDim.x * warp_id(), step = gridDim.x * warps();
    for (uint32_t r = first; r < t.world; r += step) {
      if (lane_id() != 0 || !members.has(r)) continue;
      ept_moe_header h = header_of(t, a.object, EPT_PHASE_DISPATCH, generation, a.routing.rows_to[r]);
      h.flags |= EPT_MOE_LATE_WEIGHTS;
      h.row_bytes = row_bytes;
      put_header(at[r], h);
      if (r == t.rank)
        post_own(t, EPT_PHASE_DISPATCH, generation);
      else
        piece(r);
    }
    __syncwarp();
    for (uint32_t token = first; token < a.tokens; token += step) {
      const uint32_t k = lane_id();
      const bool pair = k < a.object.top_k;
      const float weight = pair ? a.weights[token * a.strides[0] + k * a.strides[1]] : 0.0f;
      for (uint32_t p = 0; p < fan; p++) {
        const int32_t *part = a.routing.parts + (uint64_t(token) * fan + p) * 2;
        if (part[0] < 0) break;
        char *to = at[part[0]] + EPT_MOE_HEADER_BYTES + uint64_t(uint32_t(part[1])) * row_bytes;
        if (k * 4 < row_bytes) reinterpret_cast<float *>(to)[k] = weight;
        __syncwarp();
        if (k == 0) piece(uint32_t(part[0]));
      }
    }
    post_initiated(t, kDispatchSend, EPT_PHASE_DISPATCH, generation,
                   [&](uint32_t r) -> Packed { return {at[r], received(), bytes_to(r), a.routing.rows_to[r] + 1}; });
  }
  // One thread, which has seen it.
  EPT_DEVICE void piece(uint32_t rank) {
    if (rank != t.rank && packed(t, rank, 1, a.routing.rows_to[rank] + 1))
      post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, rank, at[rank], received(), bytes_to(rank));
  }

  const LateSend &a;
  const LaneTable &t;
  char **const at;  // [world] the message to that rank
  const uint64_t generation;
  const uint32_t fan, row_bytes;
};

class LateReceiver {
 public:
  EPT_DEVICE LateReceiver(const LateRecv &args, uint32_t *last, uint32_t *good)
      : a(args),
        t(args.lane),
        word(last),
        came(good),
        generation(args.lane.state->received[EPT_PHASE_DISPATCH]),
        row_bytes(ept_late_weights_row_bytes(args.object.top_k)) {}

  EPT_DEVICE void run() {
    if (!is_faulted(t)) {
      const Taking members = taking(t, EPT_PHASE_DISPATCH);
      for (uint32_t source = blockIdx.x; source < t.world; source += gridDim.x)
        if (members.has(source)) read(source);
    }
    if (last_block(t, kDispatchRecv, word)) end_half(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation);
  }

 private:
  EPT_DEVICE void read(uint32_t source) {
    const char *at = t.in[source] + dispatch_place(t, a.object.shape, uint32_t(generation & 1), source).offset;
    const uint32_t begin = a.routing.begin[source], rows = a.routing.begin[source + 1] - begin;
    __syncthreads();
    if (threadIdx.x == 0) *came = wait(source, at, rows);
    __syncthreads();
    const uint32_t top_k = a.object.top_k;
    for (uint32_t i = threadIdx.x; i < rows * top_k && *came; i += blockDim.x)
      a.late[uint64_t(begin) * top_k + i] =
          reinterpret_cast<const float *>(at + EPT_MOE_HEADER_BYTES + i / top_k * row_bytes)[i % top_k];
  }
  EPT_DEVICE bool wait(uint32_t source, const char *at, uint32_t rows) const {
    const uint64_t deadline = device::deadline_in(t.timeout_ns);
    while (!has_arrived(t, source, EPT_PHASE_DISPATCH, generation))
      if (!may_wait(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, source, deadline)) return false;
    const ept_moe_header h = get_header(at);
    uint32_t wrong = check_header(t, a.object, EPT_PHASE_DISPATCH, generation, t.state->membership[EPT_PHASE_DISPATCH],
                                  source, h, row_bytes, a.object.max_tokens, EPT_MOE_LATE_WEIGHTS);
    if (!wrong && h.rows != rows) wrong = 12;
    if (!wrong)
      hear(t, source, h, true);  // no other block reads it
    else
      refuse_header(t, kCombineSend, source, generation, rows, wrong);
    return !wrong;
  }

  const LateRecv &a;
  const LaneTable &t;
  uint32_t *const word, *const came;
  const uint64_t generation, row_bytes;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_late_send(EPT_ARGUMENT(ept::moe::cuda::LateSend) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  LateSender(args, carve.take<char *>(args.lane.world)).run();
}

EPT_KERNEL moe_late_recv(EPT_ARGUMENT(ept::moe::cuda::LateRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  uint32_t *words = carve.take<uint32_t>(2);
  LateReceiver(args, words, words + 1).run();
}
