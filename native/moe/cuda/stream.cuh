// SPDX-License-Identifier: Apache-2.0
//
// stream.cuh: rows as they are read: by 16 bytes a thread, kAhead of them under way at any time, in a ring of the
// thread's own in shared memory. So a warp waits for memory once a row and not once a load, and no register is held by
// what is under way.
//
// INVARIANT. A thread reads only what it fetched itself, after it has waited for that fetch; and it fetches into a
// place only after its read of that place in program order. So no barrier is needed, and rows are seen as ordinary
// loads see them: what was ordered before the call (an acquire and a barrier) is ordered before the fetches.
#pragma once

#include "moe/cuda/shared.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

// So many steps of kEach vectors are under way before the first is read.
template <uint32_t kEach>
constexpr uint32_t kFirst = kAhead / kEach - 1;

// A stream has `steps` steps, the same number in all lanes: next() gives where the kEach vectors of 16 bytes of the
// next one stand, or NULL for none in this lane. kNear: lanes share sectors of memory, which then come through the
// cache. This asks for the first kFirst steps; until finish_stream the thread fetches nothing else.
template <uint32_t kEach, bool kNear, class Next>
EPT_DEVICE void start_stream(Piece *ring, uint32_t steps, Next &&next) {
  Piece *mine = ring + threadIdx.x;
  EPT_ROLLED
  for (uint32_t step = 0; step < kFirst<kEach>; step++) {
    const char *from = step < steps ? next() : nullptr;
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach && from; i++)
      fetch16<kNear>(reinterpret_cast<char *>(mine + (step * kEach + i) * blockDim.x), from + i * 16);
    end_fetches();
  }
}

// next() goes on with step kFirst; use(vectors) takes those of a step, in the same order.
template <uint32_t kEach, bool kNear, class Next, class Use>
EPT_DEVICE void finish_stream(Piece *ring, uint32_t steps, Next &&next, Use use) {
  constexpr uint32_t kSteps = kAhead / kEach;
  const uint32_t stride = blockDim.x;
  Piece *mine = ring + threadIdx.x;
  uint32_t slot = 0;
  EPT_ROLLED
  for (uint32_t step = 0; step < steps; step++) {
    const uint32_t into = slot == 0 ? kSteps - 1 : slot - 1;  // the place that the last step was read from
    const char *from = step + kSteps - 1 < steps ? next() : nullptr;
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach && from; i++)
      fetch16<kNear>(reinterpret_cast<char *>(mine + (into * kEach + i) * stride), from + i * 16);
    end_fetches();
    await_fetches<kSteps - 1>();
    Vector held[kEach];
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach; i++)
      held[i] = load16(reinterpret_cast<const char *>(mine + (slot * kEach + i) * stride));
    use(held);
    slot = slot + 1 == kSteps ? 0 : slot + 1;
  }
}

template <uint32_t kEach, bool kNear, class Next, class Use>
EPT_DEVICE void stream(Piece *ring, uint32_t steps, Next next, Use use) {
  start_stream<kEach, kNear>(ring, steps, next);
  finish_stream<kEach, kNear>(ring, steps, next, use);
}

}  // namespace ept::moe::cuda
