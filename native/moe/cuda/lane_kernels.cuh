// SPDX-License-Identifier: Apache-2.0
//
// lane_kernels.cuh: what is done to a lane between its steps, by one block.
#pragma once

#include "moe/cuda/protocol.cuh"

// Each source's message of the phase's open generation is read and thrown away. One block.
EPT_KERNEL moe_drain(EPT_ARGUMENT(ept::moe::cuda::Drain) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  const LaneTable &t = args.lane;
  const uint64_t generation = t.state->received[args.phase];
  const uint32_t half = args.phase == EPT_PHASE_DISPATCH ? kDispatchRecv : kCombineRecv;
  const uint64_t deadline = ept::device::deadline_in(t.timeout_ns);
  const Taking members = taking(t, args.phase);
  for (uint32_t source = threadIdx.x; source < t.world; source += blockDim.x)
    while (members.has(source) && !has_arrived(t, source, args.phase, generation) &&
           may_wait(t, half, args.phase, generation, source, deadline)) {}
  for (uint32_t source = threadIdx.x; source < t.world && t.acks; source += blockDim.x)
    if (members.has(source) && has_arrived(t, source, args.phase, generation))
      hear(t, source, landed(t, args.phase, generation, source));
  __syncthreads();
  if (threadIdx.x == 0) raise_received(t, args.phase, generation);
}

// One block, while no other kernel of the lane runs.
EPT_KERNEL moe_take_members(EPT_ARGUMENT(ept::moe::cuda::TakeMembers) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  const LaneTable &t = args.lane;
  for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x)
    t.out[kNext * t.world + r] = uint8_t(args.out[r / 64] >> r % 64 & 1);
  if (threadIdx.x != 0) return;
  const uint32_t before = t.state->membership[kNext];
  t.state->membership[kNext] = args.membership;
  if (args.code)
    raise_fault(t, args.code, kCombineSend, args.peer, kMembers, t.state->sent[EPT_PHASE_COMBINE], before,
                args.membership);
}
