// SPDX-License-Identifier: Apache-2.0
//
// trial.cuh: rounds of messages of one length to all ranks that are reached in one way, as a send posts them, and how
// long they take (trial.h). A round ends for a rank when its messages are posted and the others' are in, for all its
// blocks: like a lane's launches, rounds of a rank never run beside each other.
#pragma once

#include "moe/cuda/initiated.cuh"

namespace ept::moe::cuda {

class TrialRun {
 public:
  EPT_DEVICE explicit TrialRun(const TrialArgs &args) : a(args), t(args.lane) {}

  EPT_DEVICE void run() const {
    const uint64_t deadline = device::deadline_in(t.timeout_ns);
    uint64_t begun = 0;
    for (uint32_t round = 0; round < a.warm + a.rounds; round++) {
      if (round == a.warm) begun = Hardware::now();
      const uint64_t generation = a.first + round;
      posts(generation);
      receives(generation, deadline);
      if (!all_here(round, deadline)) return;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.took = (Hardware::now() - begun) / a.rounds;
  }

 private:
  EPT_DEVICE uint64_t at(uint32_t r) const { return r * a.room; }
  EPT_DEVICE void posts(uint64_t generation) const {
    const uint32_t slot = uint32_t(generation & 1);
    const uint64_t received = t.map.recv(EPT_PHASE_DISPATCH, slot) + at(t.rank);
    const uint64_t sent = t.map.send(EPT_PHASE_DISPATCH, slot);
    post_initiated(t, kDispatchSend, EPT_PHASE_DISPATCH, generation,
                   [&](uint32_t r) -> Packed { return {staged(t, r, sent + at(r)), received, a.bytes, 0}; });
    for (uint32_t r = blockIdx.x; r < t.world && threadIdx.x == 0; r += gridDim.x)
      if (t.paths[r].kind == EPT_DEVICE_PROXY)
        post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, r, staged(t, r, sent + at(r)), received, a.bytes);
  }
  EPT_DEVICE void receives(uint64_t generation, uint64_t deadline) const {
    for (uint32_t r = blockIdx.x; r < t.world && threadIdx.x == 0; r += gridDim.x)
      while (t.paths[r].kind != EPT_DEVICE_NONE && !has_arrived(t, r, EPT_PHASE_DISPATCH, generation))
        if (!may_wait(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, r, deadline)) return;
  }
  // All blocks have ended the round; the same answer for the whole block. No: a fault.
  EPT_DEVICE bool all_here(uint32_t round, uint64_t deadline) const {
    __syncthreads();
    bool good = true;
    if (threadIdx.x == 0) {
      uint32_t *counter = &t.state->blocks[kDispatchSend];
      (void)device::count_in(counter, 1);
      const uint32_t all = gridDim.x * uint32_t(a.first + round + 1);  // of all launches so far
      while (good = !fault_of(t), good && device::count_in(counter, 0) < all) {
        EPT_REST();
        if (Hardware::now() > deadline)
          raise_fault(t, uint32_t(-EPT_E_TIMEOUT), kDispatchSend, -1, kLate, a.first + round, all, 0);
      }
    }
    return !__syncthreads_or(!good);
  }

  const TrialArgs &a;
  const LaneTable &t;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_trial(EPT_ARGUMENT(ept::moe::cuda::TrialArgs) args) {
  if (args.rounds == 0) return;
  ept::moe::cuda::TrialRun(args).run();
}
