// SPDX-License-Identifier: Apache-2.0
//
// bulk.cuh: rows as the GPU's copy engine moves them, on sm_90 and later: a run of bytes into the warp's ring in shared
// memory, and from there to each place. So what a warp spends doesn't grow with the bytes, which were 365 of its 976
// instructions for half a row where threads copy (stream.cuh); they do that where there is no such engine.
//
// INVARIANT. A warp has one run at a time. It is fetched when each lane has waited until the engine has read what that
// lane had put of the run before; it is put when its barrier has told that it is there. What the warp has acquired
// before fetch() is what is fetched: one lane asks for all, and orders that (fence_copies). No thread ends, or tells
// anybody that it is through, before all that it put is written.
#pragma once

#include "moe/cuda/shared.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

class BulkRun {
 public:
  static constexpr uint32_t kMost = kAhead * kWarp * sizeof(Piece);  // bytes, a warp's part of the ring

  // `arrived`: [warps].
  EPT_DEVICE BulkRun(Piece *ring, uint64_t *arrived)
      : memory_(reinterpret_cast<char *>(ring + warp_id() * (kAhead * kWarp))), arrived_(arrived + warp_id()) {}

  // Before the first; the whole warp, as all but put().
  EPT_DEVICE void begin() const {
    if (has_copies() && lane_id() == 0) make_barrier(arrived_);
    __syncwarp();
  }
  // `bytes`: a multiple of 16.
  EPT_DEVICE void fetch(const char *from, uint32_t bytes) const {
    await_copies_read();
    __syncwarp();
    if (lane_id() != 0) return;
    fence_copies();
    copy_in(memory_, from, bytes, arrived_);
  }
  // Where it is, until the next is fetched.
  EPT_DEVICE const char *await() {
    await_copy(arrived_, turn_);
    turn_ ^= 1;
    return memory_;
  }
  // Each lane by itself; then end_puts().
  EPT_DEVICE static void put(char *to, const char *run, uint32_t bytes) { copy_out(to, run, bytes); }
  EPT_DEVICE static void end_puts() { end_copies(); }
  // All that was put is written.
  EPT_DEVICE static void end() {
    if (has_copies()) await_copies();
  }

 private:
  char *const memory_;
  uint64_t *const arrived_;
  uint32_t turn_ = 0;  // the parity of the barrier's phase that is under way
};

}  // namespace ept::moe::cuda
