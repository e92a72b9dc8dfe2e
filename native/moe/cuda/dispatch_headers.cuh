// SPDX-License-Identifier: Apache-2.0
//
// dispatch_headers.cuh: what a source says of its message before its rows; and the kernel that reads no more than that,
// for who must know how many rows come before there are outputs for them.
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

// Where that rank's lane is mapped here; NULL: it isn't.
EPT_DEVICE const char *memory_of(const LaneTable &t, uint32_t rank) {
  return rank == t.rank ? t.in[rank] : device::window(t.paths[rank], 0);
}

// What a dispatch expects of all its sources.
struct DispatchFormat {
  uint32_t scale_bytes;
  int32_t payload, scale;
};
// What is wrong in a header that is not as most are.
EPT_SELDOM uint32_t check_dispatch_header(const LaneTable &t, const ObjectTable &object, uint64_t generation,
                                          uint32_t membership, uint32_t source, const DispatchFormat &format,
                                          const ept_moe_header &h) {
  const uint64_t row = ept_row_bytes(object.payload, format.scale_bytes, object.top_k);
  const uint32_t wrong =
      check_header(t, object, EPT_PHASE_DISPATCH, generation, membership, source, h, row, object.max_tokens);
  if (wrong) return wrong;
  if (h.rows && (h.scale_bytes != format.scale_bytes || h.payload_format != uint32_t(format.payload) ||
                 (format.scale_bytes && h.scale_format != uint32_t(format.scale))))
    return 9;
  return h.combine_offset % kAlign ? 11 : 0;
}

// Reads the header and the counts of a source that has come. `there`: the source's own memory; NULL: its message can't
// be a list. amid(): they are under way. The whole warp. False: the lane is faulted.
template <class Amid>
EPT_DEVICE bool read_dispatch_header(const LaneTable &t, const ObjectTable &object, uint32_t half, uint64_t generation,
                                     uint32_t membership, uint32_t source, const DispatchFormat &format,
                                     const RecvShared &s, const char *there, bool tells, Amid amid) {
  const char *at = s.sources.message[source];
  constexpr uint32_t kTogether = 8;  // loads under way
  uint32_t n[kTogether];
  const auto ask = [&](uint32_t base) {
    EPT_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      const uint32_t e = base + i * kWarp + lane_id();
      n[i] = e < object.local ? reinterpret_cast<const uint32_t *>(at + EPT_MOE_HEADER_BYTES)[e] : 0;
    }
  };
  __syncwarp();
  const HeaderThen h(at);
  ask(0);
  const auto row = uint32_t(ept_row_bytes(object.payload, format.scale_bytes, object.top_k));
  HeaderWord expected = header_word(t, object, EPT_PHASE_DISPATCH, generation, membership, source, row);
  expected.is(EPT_FIELD(scale_bytes), format.scale_bytes);
  expected.is(EPT_FIELD(payload_format), uint32_t(format.payload));
  if (format.scale_bytes) expected.is(EPT_FIELD(scale_format), uint32_t(format.scale));
  expected.is(EPT_FIELD(combine_offset), 0, kAlign - 1);
  amid();
  uint32_t sum = 0;
  EPT_ROLLED
  for (uint32_t base = 0; base < object.local; base += kTogether * kWarp) {
    if (base) ask(base);
    EPT_UNROLL
    for (uint32_t i = 0; i < kTogether; i++) {
      const uint32_t e = base + i * kWarp + lane_id();
      if (e < object.local) s.counts[source * object.local + e] = n[i];
      sum += n[i] < (1u << 30) ? n[i] : 1u << 30;  // so that no sum of a peer's making wraps round
    }
  }
  sum = warp_sum(sum >> 5) * 32 + warp_sum(sum & 31);
  uint32_t wrong = 0;
  if (!is_as_expected(h, expected, object.max_tokens))
    wrong = check_dispatch_header(t, object, generation, membership, source, format, h.whole());
  const uint32_t rows = h.word(EPT_FIELD(total_rows)), flags = h.word(EPT_FIELD(flags));
  const uint64_t offset = h.number(EPT_FIELD(combine_offset));
  const uint64_t capacity = h.number(EPT_FIELD(combine_capacity)), room = object.shape.combine_recv();
  if (!wrong && sum > uint64_t(rows) * object.top_k) wrong = 10;
  if (!wrong && (capacity < EPT_MOE_HEADER_BYTES || offset > room || capacity > room - offset)) wrong = 11;
  if (!wrong && flags & EPT_MOE_LISTED && !there) wrong = 13;
  if (!wrong && t.acks && tells) hear(t, source, h, tells);
  if (lane_id() == 0) {
    if (wrong) refuse_header(t, half, source, generation, 0, wrong);
    s.rows[source] = rows;
    s.return_at[source] = offset;
    s.runs[source].flags = flags;
  }
  return wrong == 0;
}

// Headers alone, by one block.
class Waiter {
 public:
  EPT_DEVICE Waiter(const DispatchWait &args, const RecvShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        at_first(args.lane, EPT_PHASE_DISPATCH),
        generation(at_first.state.received(EPT_PHASE_DISPATCH)),
        membership(at_first.state.membership(EPT_PHASE_DISPATCH)) {}
  EPT_DEVICE bool header(uint32_t source) {
    return read_dispatch_header(t, a.object, kDispatchRecv, generation, membership, source,
                                {a.scale_bytes, a.payload_format, a.scale_format}, s, memory_of(t, source),
                                blockIdx.x == 0, [] {});
  }
  EPT_DEVICE bool may_begin(uint32_t) const { return true; }
  EPT_DEVICE bool begin(uint32_t) const { return true; }
  EPT_DEVICE void run() {
    for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) s.rows[r] = 0;
    for (uint32_t i = threadIdx.x; i < t.world * a.object.local; i += blockDim.x) s.counts[i] = 0;
    look_up(t, EPT_PHASE_DISPATCH, generation, membership, at_first.origin, s.sources,
            [&](uint32_t r) { return dispatch_place(t, a.object.shape, uint32_t(generation & 1), r).offset; });
    __syncthreads();
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, *this);
    __syncthreads();
    if (threadIdx.x != 0) return;
    uint64_t sums[4] = {};
    const bool failed = fault_of(t) != 0;
    for (uint32_t r = 0; r < t.world && !failed; r++) {
      sums[0] += s.rows[r];
      sums[1] = at_least(sums[1], s.rows[r]);
    }
    for (uint32_t e = 0; e < a.object.local && !failed; e++) {
      uint64_t n = 0;
      for (uint32_t r = 0; r < t.world; r++) n += s.counts[r * a.object.local + e];
      sums[2] += align_up(n, a.object.alignment);
      sums[3] = at_least(sums[3], n);
    }
    for (uint32_t i = 0; i < 4; i++) a.arrival[i] = sums[i];
  }

 private:
  const DispatchWait &a;
  const LaneTable &t;
  const RecvShared &s;
  const AtFirst at_first;
  const uint64_t generation;
  const uint32_t membership;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_wait(EPT_ARGUMENT(ept::moe::cuda::DispatchWait) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local);
  Waiter(args, shared).run();
}
