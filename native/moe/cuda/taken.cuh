// SPDX-License-Identifier: Apache-2.0
//
// taken.cuh: pieces of a half's work, which all warps of a launch take as they have time, whichever block they are of.
// So nobody waits for the share of a block that begins late, since another kernel has its multiprocessor: where ranks'
// shares of a GPU overlap, a combine with shares by block took two kernels' time.
//
// INVARIANT. A piece is worked at once: it is of who has moved the lane's count over it. Each block does that for a
// piece a warp as it begins, and each warp for one more when it is through with one; so all are taken as soon as one
// block has no more to do, whether others have begun or not. Where there are fewer pieces than warps, block and warp
// say whose one is, since whoever comes first must not take them all. Counts are by generation, and who raises a
// generation has emptied the next one's (protocol.cuh).
#pragma once

#include "moe/cuda/protocol.cuh"

namespace ept::moe::cuda {

class Taken {
 public:
  // `word`: of the block's shared memory, this object's until first() has returned.
  EPT_DEVICE Taken(const LaneTable &t, uint32_t half, uint64_t generation, uint32_t *word)
      : count_(&t.state->taken[half][generation & 1]), word_(word) {}

  // All threads of the block call both; what is asked for in the first comes until the second. `most`: there are no
  // more pieces than so many.
  EPT_DEVICE void begin(uint32_t most = UINT32_MAX) {
    if (threadIdx.x == 0 && most >= gridDim.x * warps()) next_ = atomicAdd(count_, warps());
  }
  // The warp's first piece of so many: numbers that are not below that are none. The same count in all blocks.
  EPT_DEVICE uint32_t first(uint32_t pieces) {
    const uint32_t all = gridDim.x * warps();
    none_ = pieces;
    some_ = pieces >= all;
    many_ = pieces >= 2 * all;
    if (!some_) return blockIdx.x + gridDim.x * warp_id();
    if (threadIdx.x == 0) *word_ = next_;
    __syncthreads();
    ask();
    return *word_ + warp_id();
  }
  // The next one, if that is known before this one is done. An answer takes a third of the time of a piece, so where
  // each warp has several, it is asked for ahead; where not, that would take what others are about to begin.
  EPT_DEVICE uint32_t coming() {
    if (!many_) return none_;
    const uint32_t next = from_lane(next_, 0);
    ask();
    return next;
  }
  // This one is done.
  EPT_DEVICE bool asks() const { return some_ && !many_; }
  EPT_DEVICE uint32_t next() const { return take_one(count_); }

 private:
  EPT_DEVICE void ask() {
    if (many_ && lane_id() == 0) next_ = atomicAdd(count_, 1u);
  }

  uint32_t *const count_, *const word_;
  uint32_t none_ = 0, next_ = 0;
  bool many_ = false, some_ = false;
};

// From piece u on, the warp's first: work(piece, its), false: no more. look(piece) gives what it must know of one,
// which is asked for ahead where it can be; `its` is the first one's.
template <class Its, class Look, class Work>
EPT_DEVICE void work_at(Taken &taken, uint32_t pieces, uint32_t u, Its its, Look look, Work work) {
  while (u < pieces) {
    uint32_t next = taken.coming();
    Its coming = look(next);
    if (!work(u, its)) return;
    if (taken.asks()) {
      next = taken.next();
      coming = look(next);
    }
    u = next;
    its = coming;
  }
}

}  // namespace ept::moe::cuda
